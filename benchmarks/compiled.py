"""What D_t f costs under torch.compile: ``python benchmarks/derivatives.py --compiled``.

Every row of a table is one training step, which has processes of its own: what torch.compile keeps
of one step cannot slow another. On a CPU a row that a limit is for has three, since two that run
the same program may differ throughout. The processes take turns, a quarter of a second each a
round (one step at least). A round's time is the median of a row's processes, and a ratio the
median of the rounds' ratios, with their quartiles behind it. Seconds to compile are those of the
first three steps less three later ones, without torch's caches and with one compiler at a time: of
the CPU, its compilers' included, since neighbours on a shared machine disturb that least, and of
the wall on a GPU. Peak memory is the growth over what the process held before a step that was
compiled earlier. An error is the largest of the derivative over its largest entry, against float64
forward mode of the model as written.

"Paired" is another way to measure two steps where only overhead counts: one of each in turn in
one process, of which there are three. What slows the machine slows both, and neither finds the
CPU's caches as it left them.

On a GPU the same command adds CUDA graphs and the paper's smallest network under bfloat16.
"""

import contextlib
import functools
import importlib.util
import itertools
import math
import multiprocessing
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from common import DEVICE, number, spread
from compiled_steps import (
    EAGER,
    OURS_EAGER,
    PLAIN,
    ROUTES,
    SHARES,
    CompiledSetting,
    Pair,
    Row,
    Step,
    crossflow,
    ours,
    rows_of,
    vit_s,
)

from flowspace.demo.page import markdown_table

__all__ = ["Limits", "Options", "report", "settings"]

CACHES = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
NO_CACHES = CACHES | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}

ALIKE = 3
"""Processes of a row that a limit is for, on a CPU, and of a pair."""

PAIRS = 4
"""Steps of a pair in a round."""

HEAD = (
    "training step",
    "ms",
    "over the plain step",
    "seconds to compile",
    "peak memory / plain step",
    "largest error",
    "remark",
)


@dataclass(frozen=True)
class Limits:
    """What the project wants to hold; None where it has no limit.

    Attributes:
        step: a compiled step over the plain compiled step, by the share of rows that move.
        eager: an eager step over the plain eager step, half of the rows moving.
        compiling: seconds to compile over those of the plain step.
        peak: peak memory over that of the plain step, half of the rows moving.
        error: of the derivative.
    """

    step: Mapping[float, float] = field(default_factory=dict)
    eager: float | None = None
    compiling: float | None = None
    peak: float | None = 1.10
    error: float | None = 1e-5


VIT_S = "timm ViT-S, 64 tokens"
VIT_S_LIMITS = Limits({0.25: 1.15, 0.5: 1.25, 1.0: 1.45})


def settings() -> list[tuple[CompiledSetting, Limits]]:
    """Return what is measured on this device, and what is to hold."""
    if DEVICE.type == "cuda":
        return settings_of_gpu()
    small = functools.partial(crossflow, width=96, heads=3, grid=4, classes=10)
    name = "CrossFlow-B small (width 96, 32 tokens)"
    small_step = CompiledSetting(name, small, 4, eager=True, paired=True)
    blocks = replace(small_step, whole=False, compiles=3)
    whole = replace(small_step, routes=False)
    step = Limits({0.5: 1.40}, eager=1.65)
    found = [(blocks, replace(step, compiling=1.6)), (whole, step)]
    if importlib.util.find_spec("timm"):
        vit = CompiledSetting(VIT_S, vit_s, 16, whole=False, moving=tuple(SHARES))
        found.append((vit, VIT_S_LIMITS))
    return found


def settings_of_gpu() -> list[tuple[CompiledSetting, Limits]]:
    """Return what is measured on a GPU, and what is to hold."""
    name = "CrossFlow-B"
    blocks = CompiledSetting(
        name, crossflow, 32, whole=False, autocast=True, eager=True, routes=False
    )
    exact = replace(blocks, autocast=False, eager=False, compiles=0)
    graphs = CompiledSetting(
        name, crossflow, 32, autocast=True, routes=False, compiles=0, graphs=True
    )
    none = Limits(error=None)
    found = [
        (graphs, Limits({0.5: 1.40}, error=None)),
        (replace(graphs, batch=128), Limits({0.5: 1.30}, error=None)),
        (blocks, replace(none, eager=1.6, compiling=1.6)),
        (replace(blocks, batch=128, compiles=0), replace(none, eager=1.25)),
        (exact, Limits()),
    ]
    if importlib.util.find_spec("timm"):
        vit = replace(graphs, name=VIT_S, build=vit_s, batch=256, moving=tuple(SHARES))
        found.insert(2, (vit, replace(VIT_S_LIMITS, error=None)))
    return found


# --- a process for each step


def serve(pipe: Any, setting: CompiledSetting, rows: Sequence[Row]) -> None:
    """Build a step, or a pair, and run what is asked for by name, until None is; errors are told
    as text.
    """
    torch.set_num_threads(1)
    step: Step | Pair | None = None
    while (what := pipe.recv()) is not None:
        try:
            if step is None:
                step = Pair(setting, *rows) if len(rows) > 1 else Step(setting, *rows)
            method = getattr(step, what)
            pipe.send(method())
        except Exception as error:
            first = next(iter(str(error).splitlines()), "").replace("|", "/")
            pipe.send(f"raises {type(error).__name__}: {first[:120]}")


class Process:
    """A fresh process that runs one step when it is its turn, or two of a pair."""

    def __init__(
        self, setting: CompiledSetting, environment: Mapping[str, str], *rows: Row
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, setting, rows))
        with _environment(environment):
            self.process.start()
        theirs.close()

    def ask(self, what: str) -> Any:
        """Return what a method of the step or pair returns, or a text that says what it raises."""
        self.tell(what)
        return self.reply()

    def tell(self, what: str) -> None:
        """Let it run a method of the step or pair."""
        with contextlib.suppress(OSError):
            self.pipe.send(what)

    def reply(self) -> Any:
        """Return what the method returns, or a text that says what it raises."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return "its process ended"

    def figure(self, what: str) -> float:
        """Return what a method of the step or pair returns, or nan where it raises."""
        reply = self.ask(what)
        if isinstance(reply, str):
            print(f"{what}: {reply}", file=sys.stderr)
            return math.nan
        return reply

    def end(self) -> None:
        """Let the process end."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join()


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        for name in changes:
            del os.environ[name]
        os.environ.update(before)


# --- a table


@dataclass
class Figures:
    """What was measured of a row; steps and compiling in seconds, peak in bytes, paired over a
    plain step.
    """

    steps: list[float] = field(default_factory=list)
    paired: list[float] = field(default_factory=list)
    compiling: list[float] = field(default_factory=list)
    peak: float = math.nan
    error: float = math.nan
    remark: str = ""

    @property
    def compiling_median(self) -> float:
        """The median of the seconds to compile, or nan where they were not measured."""
        if not self.compiling:
            return math.nan
        return statistics.median(self.compiling)


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    rounds: int = 15
    only: str = ""
    memory: bool = True
    compile_time: bool = True
    rivals: bool = False


def measure(setting: CompiledSetting, options: Options) -> dict[str, Figures]:
    """Measure every row of a setting; return the figures by name."""
    rows = {row.name: row for row in rows_of(setting, options.rivals)}
    found = {row.name: Figures(remark=row.remark) for row in rows.values()}
    _run_in_turn(setting, rows, found, options)
    if setting.paired:
        for above, below in ((ours(0.5), PLAIN), (OURS_EAGER, EAGER)):
            found[above].paired = _paired(setting, rows[above], rows[below], options.rounds)
    repeats = 0
    if options.compile_time:
        repeats = setting.compiles - 1
    for _ in range(repeats):
        for name in (PLAIN, *map(ours, setting.moving)):
            process = Process(setting, NO_CACHES, rows[name])
            reply = process.ask("start")
            process.end()
            if not isinstance(reply, str):
                seconds, _ = reply
                found[name].compiling.append(seconds)
    return found


def _paired(setting: CompiledSetting, above: Row, below: Row, rounds: int) -> list[float]:
    """Return the ratios of two steps that take turns in one process, from a few processes."""
    found: list[float] = []
    for _ in range(ALIKE):
        process = Process(setting, CACHES, above, below)
        reply = process.ask("start")
        if isinstance(reply, str):
            print(f"paired: {reply}", file=sys.stderr)
        else:
            found += [process.figure("ratio") for _ in range(PAIRS * rounds)]
        process.end()
    return found


def _run_in_turn(
    setting: CompiledSetting,
    rows: Mapping[str, Row],
    found: dict[str, Figures],
    options: Options,
) -> None:
    """Let a process for each row step in turn, and tell their errors."""
    processes = _processes(setting, rows, found, options.compile_time and setting.compiles > 0)
    others = {name: _others(setting, rows[name]) for name in processes}
    for _ in range(options.rounds):
        for name, process in processes.items():
            taken = [each.ask("seconds") for each in (process, *others[name])]
            found[name].steps.append(statistics.median(taken))
    for process in itertools.chain(*others.values()):
        process.end()
    for name, process in processes.items():
        if options.memory and not setting.graphs:
            found[name].peak = process.figure("peak")
        if rows[name].route is not None and not setting.graphs:
            found[name].error = process.figure("error")
        process.end()


def _others(setting: CompiledSetting, row: Row) -> list[Process]:
    """Return more processes that run the same as the first one of a row that a limit is for."""
    if DEVICE.type != "cpu" or row in ROUTES or row.rival:
        return []
    others = [Process(setting, CACHES, row) for _ in range(ALIKE - 1)]
    for process in others:
        process.ask("start")
    return others


def _processes(
    setting: CompiledSetting, rows: Mapping[str, Row], found: dict[str, Figures], alone: bool
) -> dict[str, Process]:
    """Return a process for each row that has run its first steps: one after the other, so that
    the seconds to compile can be measured, or all at the same time.
    """
    processes: dict[str, Process] = {}
    for name, row in rows.items():
        print(f"starting: {setting.title}: {name}", file=sys.stderr)
        timed = alone and row.compiled and row not in ROUTES
        environment: Mapping[str, str] = {}
        if alone:
            environment = CACHES
        if timed:
            environment = NO_CACHES
        processes[name] = Process(setting, environment, row)
        processes[name].tell("start")
        if alone:
            _wait_for_start(processes, row, found[name], timed)
    if not alone:
        for name, row in rows.items():
            _wait_for_start(processes, row, found[name], False)
    return processes


def _wait_for_start(
    processes: dict[str, Process], row: Row, figures: Figures, timed: bool
) -> None:
    """Note what the first steps of a process came to; end it if they raised."""
    reply = processes[row.name].reply()
    if isinstance(reply, str):
        figures.remark = reply
        processes.pop(row.name).end()
        return
    compiling, warned = reply
    if timed:
        figures.compiling.append(compiling)
    figures.remark = warned or row.remark


def ratios(above: Figures, below: Figures) -> list[float]:
    """Return the ratio of two steps in each round."""
    return [a / b for a, b in zip(above.steps, below.steps, strict=True)]


def table(found: Mapping[str, Figures]) -> str:
    """Return the figures as a Markdown table."""
    plain = found[PLAIN]
    lines = []
    for name, row in found.items():
        if not row.steps:
            lines.append((name, "", "", "", "", "", row.remark))
            continue
        line = (
            name,
            f"{1000 * statistics.median(row.steps):.1f}",
            spread(ratios(row, plain)),
            number(row.compiling_median, ".1f"),
            number(row.peak / plain.peak, ".2f"),
            number(row.error, ".0e"),
            row.remark,
        )
        lines.append(line)
    return markdown_table(HEAD, lines)


def held(setting: CompiledSetting, limits: Limits, found: Mapping[str, Figures]) -> str:
    """Return the figures that have a limit, beside it, as a Markdown table."""
    plain, half = found[PLAIN], found[ours(0.5)]
    lines: list[tuple[str, str, str]] = []

    def line(what: str, figure: str, limit: float | None, form: str = ".2f") -> None:
        if limit is not None and figure:
            lines.append((what, figure, format(limit, form)))

    def step(what: str, above: Figures, below: Figures, limit: float | None) -> None:
        """Hold the pairs, where two steps took turns in one process: what a step takes differs
        more from process to process than the limit is away.
        """
        if above.paired:
            line(f"{what}, paired", spread(above.paired), limit)
        else:
            line(what, spread(ratios(above, below)), limit)

    for share, limit in limits.step.items():
        what = f"compiled step over the plain compiled one, {SHARES[share]} moving"
        step(what, found[ours(share)], plain, limit)
    if limits.eager:
        what = "eager step over the plain eager one, half moving"
        step(what, found[OURS_EAGER], found[EAGER], limits.eager)
    compiling = number(half.compiling_median / plain.compiling_median, ".2f")
    line("seconds to compile over the plain step's", compiling, limits.compiling)
    memory = number(half.peak / plain.peak, ".2f")
    line("peak memory over the plain step's, half moving", memory, limits.peak)
    worst = max(found[ours(share)].error for share in setting.moving)
    line("largest error", number(worst, ".0e"), limits.error, ".0e")
    return markdown_table(("what the project wants to hold", "measured", "limit"), lines)


def report(options: Options) -> None:
    """Print the tables."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        print(f"no C++ compiler ({compiler}) is on the path, so torch.compile cannot compile")
        return
    name = "CPU, 1 thread"
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {name}, under torch.compile\n", flush=True)
    for setting, limits in settings():
        if options.only not in setting.title:
            continue
        found = measure(setting, options)
        print(f"{setting.title}:\n\n{table(found)}\n", flush=True)
        if found[PLAIN].steps and found[ours(0.5)].steps:
            print(f"{held(setting, limits, found)}\n", flush=True)
