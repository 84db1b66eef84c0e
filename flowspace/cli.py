"""The command line: ``flowspace derive | demo``.

A command imports what it needs when it runs, so that ``--help`` does not wait for torch.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowspace import __version__
from flowspace.errors import FlowspaceError

if TYPE_CHECKING:
    from flowspace.schedules import Schedule
    from flowspace.statistics import AbstractStatistic

__all__ = ["main"]

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
            f"flowspace: {error.name} is not installed; write: pip install 'flowspace[demo]'",
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


def _joined(arguments: Sequence[str]) -> list[str]:
    """Join each formula to its option, so that ``--delta -t/(t-s)`` is no option named -t."""
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
    return parser


def _derive(options: argparse.Namespace) -> int:
    from flowspace.criteria import check_criteria
    from flowspace.schedules import Schedule

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


def _statistic(options: argparse.Namespace, schedule: "Schedule") -> "AbstractStatistic":
    """Return the statistic of two of gamma, delta and kappa, or the matched one of none."""
    from flowspace.statistics import MatchedStatistic, Statistic

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
    from flowspace.demo import digits
    from flowspace.demo.page import markdown_table

    if options.seeds < 1:
        raise FlowspaceError(f"got --seeds {options.seeds}; write 1 or more")
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


if __name__ == "__main__":
    sys.exit(main())
