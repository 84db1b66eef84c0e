"""The command line: ``flowspace derive | demo | encode | train | sample | evaluate | export``."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowspace import __version__
from flowspace.criteria import check_criteria
from flowspace.errors import FlowspaceError
from flowspace.schedules import Schedule
from flowspace.statistics import AbstractStatistic, MatchedStatistic, Statistic

if TYPE_CHECKING:
    from flowspace.recipes.imagenet import Run

__all__ = ["main"]

EVALUATED = (
    "Samples are drawn once, over all processes, and kept; the same command goes on where it was "
    "stopped."
)
ENCODED = (
    "Shards of latents, pictures and labels; whole ones are kept, and the same command goes on "
    "where it was stopped."
)
FORMULAS = ("--alpha", "--beta", "--gamma", "--delta", "--kappa")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, 1 where a criterion or a run fails, 130 if interrupted."""
    options = _parser().parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    try:
        return options.command(options)
    except FlowspaceError as error:
        print(f"flowspace: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(
            f"flowspace: {error.name} is not installed; write: pip install "
            f"'flowspace[{_extra(options, error.name)}]'",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(
            f"flowspace: {error}; what was saved before is whole: once this is repaired, the same "
            "command continues",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(
            "\nflowspace: stopped; the same command continues from the last checkpoint",
            file=sys.stderr,
        )
        return 130


def _extra(options: argparse.Namespace, name: str | None) -> str:
    if name == "datasets":
        return name
    return {_demo: "demo", _export: "onnx"}.get(options.command, "vision")


def _joined(arguments: Sequence[str]) -> list[str]:
    """Join each formula to its option, so that ``--delta -t/(t-s)`` is not read as an option named
    -t.

    What is changed in a config may stand before or after the options of ``train``, which take no
    values.
    """
    if arguments and arguments[0] == "train":
        return sorted(arguments, key=lambda argument: argument.startswith("-"))
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in FORMULAS:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "flowspace", description="Cross-space flow maps: derive, check, train, sample."
    )
    parser.add_argument("--version", action="version", version=f"flowspace {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    derive = commands.add_parser(
        "derive",
        help="derive kappa and the residual of a schedule and a statistic, and check the criteria",
        description="Prints kappa, the two criteria and the other properties, and the residual, "
        "also as LaTeX; exits 1 with the reason, and with the objective that fits, where "
        "CrossFlowLoss refuses the statistic. Give two of --gamma, --delta and --kappa, or none "
        "of the three for the matched statistic.",
    )
    derive.add_argument(
        "--alpha",
        default="1 - t",
        help="weight of the data, a formula in t (default: %(default)s)",
    )
    derive.add_argument(
        "--beta", default="t", help="weight of the noise, a formula in t (default: %(default)s)"
    )
    derive.add_argument(
        "--gamma", help="weight of the state in the statistic, a formula in t and s"
    )
    derive.add_argument("--delta", help="weight of the velocity's integral, a formula in t and s")
    derive.add_argument("--kappa", help="a formula in s, from which gamma or delta is derived")
    derive.set_defaults(command=_derive)
    demo = commands.add_parser(
        "demo",
        help="train one-step digits from a noisy latent and report how good they are",
        description="Real handwritten digits, two stages, one evaluation; leaves checkpoints, "
        "samples.png, metrics.json and "
        "report.html. Run it again to continue a run that was stopped.",
    )
    demo.add_argument(
        "--dataset", default="digits", choices=["digits", "mnist"], help="default: %(default)s"
    )
    demo.add_argument("--out", type=Path, help="where the run is kept (default: runs/DATASET)")
    demo.add_argument(
        "--seeds", type=int, default=1, help="how many seeds to average (default: %(default)s)"
    )
    demo.add_argument(
        "--baselines",
        action="store_true",
        help="also a denoiser, latent MeanFlow + decoder, decoder on noise",
    )
    demo.set_defaults(command=_demo)
    _add_recipe(commands)
    return parser


def _add_recipe(commands: Any) -> None:
    """Add the commands of the ImageNet recipe."""
    train = commands.add_parser(
        "train",
        help="train a generator from a config: stage 1 and a latent generator if it asks for "
        "them, the generator, its pipeline",
        description="Run it again to continue a run that was stopped. For several processes: "
        "torchrun --nproc_per_node N "
        "-m flowspace.cli train CONFIG.",
    )
    train.add_argument(
        "config", type=Path, help="a YAML file, such as examples/imagenet/configs/smoke.yaml"
    )
    train.add_argument(
        "changes", nargs="*", help="what differs, such as training.batch=64 out=runs/other"
    )
    train.add_argument(
        "--evaluate",
        action="store_true",
        help="also draw samples, judge them, and reload the pipeline",
    )
    train.add_argument(
        "--ablate", action="store_true", help="also without GAN, without perceptual, without both"
    )
    train.set_defaults(command=_train)
    encode = commands.add_parser(
        "encode", help="compute the latents of a config's pictures once", description=ENCODED
    )
    encode.add_argument(
        "config",
        type=Path,
        help="a YAML file; data.latents names the folder (default: OUT/latents)",
    )
    encode.add_argument("changes", nargs="*", help="what differs, such as encoder.half=true")
    encode.set_defaults(command=_encode)
    evaluate = commands.add_parser(
        "evaluate", help="draw samples of a run and judge them", description=EVALUATED
    )
    evaluate.add_argument("run", type=Path, help="the folder that flowspace train made")
    evaluate.set_defaults(command=_evaluate)
    sample = commands.add_parser("sample", help="draw images of a run's pipeline into a folder")
    sample.add_argument("run", type=Path, help="the folder that flowspace train made")
    sample.add_argument("--labels", type=int, nargs="+", default=[0], help="classes (default: 0)")
    sample.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    sample.add_argument("--out", type=Path, default=Path("samples"), help="default: %(default)s")
    sample.set_defaults(command=_sample)
    export = commands.add_parser(
        "export",
        help="write a run's generator as a program without flowspace, checked against eager",
        description="The suffix says which: .pt2 (torch.export) or .onnx (needs the extra "
        "'onnx').",
    )
    export.add_argument("run", type=Path, help="the folder that flowspace train made")
    export.add_argument("out", type=Path, help="the file, .pt2 or .onnx")
    export.set_defaults(command=_export)


def _derive(options: argparse.Namespace) -> int:
    schedule = Schedule(options.alpha, options.beta)
    report = check_criteria(schedule, _statistic(options, schedule))
    print(report)
    print(f"{'LaTeX':<12}{report.latex()}")
    for name in ("Criterion 1", "Criterion 2"):
        if report.reasons[name].startswith("FAILS"):
            reason = report.reasons[name].removeprefix("FAILS").strip()
            print(f"flowspace: {name}: {reason}", file=sys.stderr)
    if report.advice:
        print(f"flowspace: {report.advice}", file=sys.stderr)
        return 1
    return 0


def _statistic(options: argparse.Namespace, schedule: Schedule) -> AbstractStatistic:
    """Return the statistic of two of gamma, delta and kappa, or the matched one of none."""
    gamma, delta, kappa = options.gamma, options.delta, options.kappa
    given = [each for each in (gamma, delta, kappa) if each is not None]
    if not given:
        return MatchedStatistic()
    if len(given) != 2:
        raise FlowspaceError(
            f"got {len(given)} of --gamma, --delta and --kappa; give two of the three, the third "
            "is derived, or none for the matched statistic"
        )
    if kappa is None:
        return Statistic(gamma, delta)
    return Statistic.from_kappa(schedule, kappa, delta=delta, gamma=gamma)


def _demo(options: argparse.Namespace) -> int:
    from flowspace.demo.page import markdown_table
    from flowspace.recipes import digits

    if options.seeds < 1:
        raise FlowspaceError(f"--seeds {options.seeds} came; write 1 or more")
    folder = options.out or Path("runs") / options.dataset
    with _one_thread():
        metrics = digits.run(
            digits.SETTINGS[options.dataset], folder, options.baselines, options.seeds
        )
    print(markdown_table(digits.HEAD, digits.rows(metrics)))
    print(
        f"\nmeans over {options.seeds} seed(s); pictures: {folder / 'samples.png'}, page: "
        f"{folder / 'report.html'}"
    )
    return 0


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep small networks on one thread, unless OMP_NUM_THREADS says otherwise: more wait for each
    other.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if "OMP_NUM_THREADS" in os.environ else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(options: argparse.Namespace) -> int:
    from flowspace.demo.page import markdown_table
    from flowspace.recipes.config import load
    from flowspace.recipes.imagenet import DecoderRun, Run, ablate, ablation_table

    config = load(options.config, options.changes)
    if options.ablate:
        print(ablation_table(ablate(config)))
        return 0
    run = Run(config)
    run.check(judged=options.evaluate)
    if config.latent:
        DecoderRun(run).check()
    run.train()
    if config.latent:
        rows = [(name, f"{kid:.4g}") for name, kid in DecoderRun(run).train().items()]
        if run.parts.place.rank == 0:
            print(markdown_table(("decoder of the latent generator's samples", "KID"), rows))
            print(f"\nover its training: {config.out / 'decoders.png'}")
    if options.evaluate:
        options.run = config.out
        _judge(run)
        if run.parts.place.rank == 0:
            same = run.same_in_a_fresh_process()
            print(
                "the pipeline in a fresh process draws "
                f"{'the same images' if same else 'OTHER IMAGES'}"
            )
            return 0 if same else 1
    return 0


def _encode(options: argparse.Namespace) -> int:
    from flowspace.recipes.config import load
    from flowspace.recipes.imagenet import Run

    print(
        f"latents in {Run(load(options.config, options.changes)).encode()}; train with "
        "data.latents=FOLDER"
    )
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from flowspace.recipes.imagenet import Run

    _judge(Run.of(options.run))
    return 0


def _judge(run: "Run") -> None:
    from flowspace.demo.page import markdown_table

    scores = run.evaluate()
    if run.parts.place.rank == 0:
        rows = [(name, f"{value:.4g}") for name, value in scores.values.items()]
        print(markdown_table((f"{scores.count} samples, {scores.extractor}", "value"), rows))
        print(f"\nreference {scores.reference[:16]}; pictures: {run.config.out / 'samples.png'}")


def _sample(options: argparse.Namespace) -> int:
    import torch

    from flowspace.recipes.imagenet import Run

    draws = [torch.Generator().manual_seed(options.seed + i) for i in range(len(options.labels))]
    found = Run.of(options.run).pipeline()(options.labels, generator=draws)
    options.out.mkdir(parents=True, exist_ok=True)
    for number, (label, picture) in enumerate(zip(options.labels, found.images, strict=True)):  # type: ignore[union-attr]
        picture.save(options.out / f"{number:04d}-class-{label}.png")
    print(f"{len(options.labels)} image(s) in {options.out}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from flowspace.recipes.imagenet import Run
    from flowspace.vision.export import Onnx, TorchExport

    formats = {".pt2": TorchExport, ".onnx": Onnx}
    if options.out.suffix not in formats:
        raise FlowspaceError(
            f"{options.out} came; write a file that ends in {' or '.join(formats)}"
        )
    apart = formats[options.out.suffix]()(Run.of(options.run).pipeline().generator, options.out)
    print(f"{options.out}: differs from eager by at most {apart:.1g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
