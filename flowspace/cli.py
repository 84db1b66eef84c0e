"""The command line: ``flowspace derive | demo | doctor | explore``.

A command imports what it needs when it runs, so that ``--help`` does not wait for torch.
"""

import argparse
import contextlib
import difflib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flowspace import __version__
from flowspace.demo.request import SIDES, check_count, check_data, check_out, namesake
from flowspace.errors import FlowspaceError

if TYPE_CHECKING:
    from flowspace.schedules import Schedule
    from flowspace.statistics import AbstractStatistic

__all__ = ["main"]

FORMULAS = ("--alpha", "--beta", "--gamma", "--delta", "--kappa")


class Parser(argparse.ArgumentParser):
    """A parser that says which argument a mistyped one may have been."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and what is near to it; exit 2."""
        typed = re.search(r"(?:arguments: |choice: ')([\w-]+)", message)
        if typed:
            near = difflib.get_close_matches(typed[1], self._words(), n=1)
            if near:
                message = f"{message}; did you mean {near[0]}?"
        super().error(message)

    def _words(self) -> list[str]:
        """Return the options and the commands that this parser takes."""
        words: list[str] = []
        for action in self._actions:
            words += [*action.option_strings, *map(str, action.choices or ())]
        return words


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, 1 where a criterion or a run fails, 130 if interrupted."""
    if arguments is None:
        arguments = sys.argv[1:]
    options, unknown = _parser().parse_known_args(_joined(arguments))
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return options.command(options)
    except FlowspaceError as error:
        print(f"flowspace: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        from flowspace.doctor.libraries import missing_library

        remedy = missing_library(error.name or "")
        print(f"flowspace: {error.name} is not installed; write: {remedy}", file=sys.stderr)
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
    parser = Parser(
        "flowspace", description="Cross-space flow maps: derive, check, train, sample."
    )
    parser.add_argument("--version", action="version", version=f"flowspace {__version__}")
    parser.set_defaults(command=_nothing, parser=parser)
    commands = parser.add_subparsers(metavar="COMMAND")
    _add_derive(commands)
    _add_demo(commands)
    _add_doctor(commands)
    _add_explore(commands)
    return parser


def _add_derive(commands: "argparse._SubParsersAction[Parser]") -> None:
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
    derive.set_defaults(command=_derive, parser=derive)


def _add_demo(commands: "argparse._SubParsersAction[Parser]") -> None:
    demo = commands.add_parser(
        "demo",
        help="train a one-step generator on digits or on your own pictures, and judge it",
        description="Two stages, one evaluation: real handwritten digits, or your own pictures. "
        "Leaves checkpoints, samples/CLASS/0.png to 49.png, samples.png, metrics.json and "
        "report.html. Run it again to continue a run that was stopped.",
    )
    demo.add_argument(
        "--data",
        "--dataset",
        default="digits",
        metavar="DATA",
        help="a folder of pictures, flat or with one folder a class; or digits, mnist, "
        "fashion-mnist, openmoji, shapes (default: %(default)s)",
    )
    demo.add_argument(
        "--side",
        type=int,
        help=f"pixels a side: {', '.join(map(str, SIDES))} (default: chosen from the pictures); "
        "they are cropped to their middle square and scaled",
    )
    demo.add_argument("--steps", type=int, help="of the generator (default: by the pictures)")
    demo.add_argument("--out", type=Path, help="where the run is kept (default: runs/DATA)")
    demo.add_argument(
        "--seeds", type=int, default=1, help="how many seeds to average (default: %(default)s)"
    )
    demo.add_argument(
        "--baselines",
        action="store_true",
        help="also a denoiser, latent MeanFlow + decoder, decoder on noise",
    )
    demo.set_defaults(command=_demo, parser=demo)


def _add_doctor(commands: "argparse._SubParsersAction[Parser]") -> None:
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine can do, or what a model of yours needs",
        description="Without MODEL: versions, device, attention kernels, torch.compile, and which "
        "extra brings what is missing. With MODEL: the error and the cost of each way to "
        "differentiate it, whether its rows mix and its times leave torch, and what to write. "
        "MODEL is MODULE:FUNCTION or FILE.py:FUNCTION, as in my_model:build; the function takes "
        "nothing and returns model, or (model, latents), or (model, latents, images), or (model, "
        "latents, images, cond). The file is imported and the function is run.",
    )
    doctor.add_argument(
        "model", nargs="?", type=_target, metavar="MODEL", help="as in my_model:build"
    )
    doctor.add_argument(
        "--latents",
        type=_shape,
        metavar="B,...",
        help="shape of random latents, as in 4,16,32,32, where the function returns no batch",
    )
    doctor.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help="about how long it may take; compiling takes most (default: %(default)s)",
    )
    doctor.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out: a second or two"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.set_defaults(command=_doctor, parser=doctor)


def _add_explore(commands: "argparse._SubParsersAction[Parser]") -> None:
    explore = commands.add_parser(
        "explore",
        help="open a local page on which one types a schedule and a statistic",
        description="Opens a page in the browser: type alpha, beta, gamma, delta, kappa or h, and "
        "see the criteria, the residual and its coefficients, the flow of a mixture, and a small "
        "network that trains. It is served to this machine alone, without a network.",
    )
    explore.add_argument(
        "--port", type=int, help="default: 8080, or any free one if that is taken"
    )
    explore.add_argument(
        "--host", default="127.0.0.1", help="a loopback address (default: %(default)s)"
    )
    explore.add_argument(
        "--no-open", action="store_true", help="only print the address, open no window"
    )
    explore.set_defaults(command=_explore, parser=explore)


def _target(text: str) -> str:
    """Return the name of a model's function, if it has both of its parts."""
    module, _, function = text.partition(":")
    if not module or not function:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; write MODULE:FUNCTION or FILE.py:FUNCTION, as in my_model:build"
        )
    return text


def _shape(text: str) -> tuple[int, ...]:
    """Return a shape from text such as 4,16,32,32."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(
            f"got {text!r}; write sizes with commas, rows first, as in 4,16,32,32"
        )
    return tuple(int(size) for size in text.split(","))


def _nothing(options: argparse.Namespace) -> None:
    options.parser.error("the following arguments are required: COMMAND")


def _derive(options: argparse.Namespace) -> int:
    _given(options)  # refused before torch and sympy are imported, which takes seconds
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


def _given(options: argparse.Namespace) -> list[str]:
    """Return what was given of gamma, delta and kappa: two of the three, or none."""
    given = [each for each in (options.gamma, options.delta, options.kappa) if each is not None]
    if len(given) not in (0, 2):
        raise FlowspaceError(
            f"got {len(given)} of --gamma, --delta and --kappa; give two of the three, the third "
            "is derived, or none for the matched statistic"
        )
    return given


def _statistic(options: argparse.Namespace, schedule: "Schedule") -> "AbstractStatistic":
    """Return the statistic of two of gamma, delta and kappa, or the matched one of none."""
    from flowspace.statistics import MatchedStatistic, Statistic

    gamma, delta, kappa = options.gamma, options.delta, options.kappa
    if not _given(options):
        return MatchedStatistic()
    if kappa is None:
        return Statistic(gamma, delta)
    return Statistic.from_kappa(schedule, kappa, delta=delta, gamma=gamma)


def _demo(options: argparse.Namespace) -> int:
    folder = options.out or Path("runs") / Path(options.data).resolve().name
    check_count("--seeds", options.seeds)
    check_count("--steps", options.steps)
    check_data(options.data, options.side)
    check_out(folder)
    from flowspace.demo import digits, sets
    from flowspace.demo.page import markdown_table

    if namesake(options.data):
        print(namesake(options.data), file=sys.stderr)
    with _one_thread(), _plain_warnings():
        settings, data = sets.chosen(options.data, options.side, options.steps)
        metrics = digits.run(settings, folder, options.baselines, options.seeds, data)
    print(markdown_table(digits.HEAD, digits.rows(metrics)))
    for doubt in metrics["doubts"]:
        print(f"\n{doubt}")
    print(
        f"\nmeans over {options.seeds} seed(s); samples: {folder / 'samples'}, pictures: "
        f"{folder / 'samples.png'}, page: {folder / 'report.html'}"
    )
    return 0


def _doctor(options: argparse.Namespace) -> int:
    if options.model is None:
        from flowspace.doctor.machine import examine_machine
        from flowspace.doctor.page import machine_page

        machine = examine_machine()
        _print_either(options.json, machine.as_dict(), machine_page(machine))
        return 0
    if not options.seconds > 0:
        raise FlowspaceError(f"got --seconds {options.seconds:g}; write more than 0")
    from flowspace.doctor.examination import examine_model
    from flowspace.doctor.page import model_page

    found = examine_model(
        options.model, options.latents, options.seconds, compiling=not options.no_compile
    )
    _print_either(options.json, found.as_dict(), model_page(found))
    return int(found.advised is None)


def _explore(options: argparse.Namespace) -> int:
    from flowspace.explore.server import serve

    serve(options.host, options.port, open_browser=not options.no_open)
    return 0


def _print_either(as_json: bool, record: dict[str, Any], page: str) -> None:
    if as_json:
        page = json.dumps(record, indent=2, allow_nan=False)
    print(page)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print each warning as one line, without the place in the code that it comes from."""

    def show(message: Warning | str, *_: Any) -> None:
        print(f"flowspace: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


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
