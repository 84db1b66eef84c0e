"""One training step of a compiled network, by a route to the derivative or by a rival."""

import abc
import copy
import ctypes
import functools
import gc
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import CHANNELS, DEVICE, TimmViT, finish, growth, timed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowspace import CrossFlowLoss, FiniteDifference, ForwardMode, SharedPrimal, TimePairs
from flowspace.derivatives import Derivative
from flowspace.derivatives.route import scatter

__all__ = [
    "EAGER",
    "OURS_EAGER",
    "PLAIN",
    "ROUTES",
    "SHARES",
    "CompiledSetting",
    "Pair",
    "Row",
    "Step",
    "crossflow",
    "ours",
    "rows_of",
    "vit_s",
]

PLAIN, EAGER = "plain step", "plain step, eager"
OURS_EAGER = "SharedPrimal, half moving, eager"

TURN = 0.25
"""Seconds that a process has in a round."""

WARM_UP = 3
"""Steps before the first that is timed; they compile."""

SHARES = {0.25: "a quarter", 0.5: "half", 1.0: "all"}
"""Names of the shares of rows that move."""


# --- networks


@dataclass
class Problem:
    """A network, the blocks it repeats, and a batch to train it on."""

    network: nn.Module
    blocks: Sequence[nn.Module]
    latents: Tensor
    targets: Tensor
    labels: Tensor


def crossflow(batch: int, **changes: Any) -> Problem:
    """Build CrossFlow-B; its head is drawn, since a head of zeros has no derivative."""
    from flowspace.vision import CrossFlowGenerator

    torch.manual_seed(0)
    network = CrossFlowGenerator.from_preset("crossflow-b", **changes).to(DEVICE)
    nn.init.normal_(network.head.weight, std=0.02)
    grid, classes = network.config["grid"], network.config["classes"]
    size = 16 * grid
    return Problem(
        network,
        list(network.blocks),
        latents=torch.randn(batch, 32, grid, grid, device=DEVICE),
        targets=torch.randn(batch, 3, size, size, device=DEVICE),
        labels=torch.randint(0, classes, (batch,), device=DEVICE),
    )


def vit_s(batch: int) -> Problem:
    """Build ViT-S of timm, on 64 tokens."""
    torch.manual_seed(0)
    network = TimmViT(8, width=384, depth=12).to(DEVICE)
    latents = torch.randn(batch, CHANNELS, 8, 8, device=DEVICE)
    labels = torch.zeros(batch, dtype=torch.long, device=DEVICE)
    return Problem(network, list(network.vit.blocks), latents, latents, labels)


@dataclass(frozen=True)
class CompiledSetting:
    """One network and batch.

    Attributes:
        name: says what the network is.
        build: makes it, with a batch of so many rows.
        batch: rows.
        whole: compile the whole network; False compiles its blocks, each on its own.
        moving: shares of the rows that are off the diagonal, and so need a derivative.
        autocast: to bfloat16.
        eager: measure the eager steps too.
        routes: measure all routes; False leaves those out whose derivative runs uncompiled.
        compiles: how many times the seconds to compile are measured; 0 lets the processes, a row
            each, compile at the same time.
        graphs: the compiled steps run in CUDA graphs, whose memory and errors are not measured.
        paired: measure two steps in one process too, one of each in turn.
    """

    name: str
    build: Callable[[int], Problem]
    batch: int
    whole: bool = True
    moving: tuple[float, ...] = (0.5,)
    autocast: bool = False
    eager: bool = False
    routes: bool = True
    compiles: int = 1
    graphs: bool = False
    paired: bool = False

    @property
    def title(self) -> str:
        """One line that says what was measured."""
        what, dtype = "blocks compiled", "float32"
        if self.whole:
            what = "whole compiled"
        if self.graphs:
            what += " in CUDA graphs"
        if self.autocast:
            dtype = "bfloat16 autocast"
        return f"{self.name}, batch {self.batch}, {dtype}, {what}"


# --- routes, and their rivals


def of_all_rows(network: nn.Module, z: Tensor, t: Tensor, s: Tensor, y: Tensor, v: Tensor) -> Any:
    """Return value and derivative by torch.func.jvp, as public ports of MeanFlow do."""

    def fn(z: Tensor, t: Tensor) -> Tensor:
        return network(z, t, s, labels=y)

    value, slope = torch.func.jvp(fn, (z, t), (v, torch.ones_like(t)))
    return value, slope.detach()


def value_alone(network: nn.Module, z: Tensor, t: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Return the value."""
    return network(z, t, s, labels=y)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled, for sizes as they come."""
    return torch.compile(function, dynamic=False)


@dataclass(frozen=True)
class CompiledRival(Derivative):
    """A usual way to the derivative, compiled whole by hand, for a network that takes labels."""

    network: nn.Module

    def evaluate(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Any],
        indices: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return value and derivative, on the rows with these indices."""
        z, t, s, cond = primals
        v, *_ = tangents
        inputs = (z, t, s, cond["labels"])
        value = compiled(value_alone)(self.network, *inputs)
        with torch.no_grad():
            few = [x[indices] for x in inputs]
            known = value.detach()[indices]
            slope = self.slope(few, v[indices], known)
        return value, scatter(slope.to(value.dtype), indices, value)

    @abc.abstractmethod
    def slope(self, inputs: Sequence[Tensor], v: Tensor, value: Tensor) -> Tensor:
        """Return the derivative on rows that move, from their z, t, s and labels."""


class CompiledWithGradients(CompiledRival):
    """torch.func.jvp of the whole batch with gradients on, the tangent detached."""

    def evaluate(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Any],
        indices: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return value and derivative, of every row."""
        z, t, s, cond = primals
        v, *_ = tangents
        with sdpa_kernel(SDPBackend.MATH):
            return compiled(of_all_rows)(self.network, z, t, s, cond["labels"], v)

    def slope(self, *_: Any) -> Tensor:
        """Not used: the value comes with the derivative."""
        raise NotImplementedError


class ForwardAndJvp(CompiledRival):
    """A forward pass, and torch.func.jvp without gradients of the rows that move."""

    def slope(self, inputs: Sequence[Tensor], v: Tensor, value: Tensor) -> Tensor:
        """Return the derivative on rows that move."""
        with sdpa_kernel(SDPBackend.MATH):
            _, slope = compiled(of_all_rows)(self.network, *inputs, v)
        return slope


class Difference(CompiledRival):
    """A forward pass, and one more of the rows that move, a small step earlier."""

    def slope(self, inputs: Sequence[Tensor], v: Tensor, value: Tensor) -> Tensor:
        """Return the difference quotient on rows that move."""
        z, t, s, labels = inputs
        h = FiniteDifference().step
        earlier = compiled(value_alone)(self.network, z - h * v, t - h, s, labels)
        return (value - earlier) / h


@dataclass(frozen=True)
class Row:
    """A training step that is measured.

    Attributes:
        name: what the table calls it.
        route: to the derivative, or a class of rivals; None is a plain regression step.
        moving: the share of rows off the diagonal.
        compiled: the network is.
        remark: what is to be known of it.
    """

    name: str
    route: Derivative | type[CompiledRival] | None = None
    moving: float = 0.5
    compiled: bool = True
    remark: str = ""

    @property
    def rival(self) -> bool:
        """Whether it compiles a program of its own."""
        return isinstance(self.route, type)


UNCOMPILED = "its derivative runs uncompiled"
ROUTES = [
    Row("ForwardMode, half moving", ForwardMode(), remark=UNCOMPILED),
    Row("FiniteDifference(order=1), half moving", FiniteDifference(order=1), remark=UNCOMPILED),
    Row("FiniteDifference(order=2), half moving", FiniteDifference(order=2), remark=UNCOMPILED),
]


def ours(share: float) -> str:
    """Return the name of the row of the default route."""
    return f"SharedPrimal, {SHARES[share]} moving"


def rows_of(setting: CompiledSetting, rivals: bool) -> list[Row]:
    """Return the rows of a table; rivals, compiled whole, stand beside whole networks."""
    found = [Row(PLAIN)]
    found += [Row(ours(share), SharedPrimal(), share) for share in setting.moving]
    if setting.eager:
        found.append(Row(EAGER, compiled=False))
        found.append(Row(OURS_EAGER, SharedPrimal(), compiled=False))
    if setting.routes:
        found += ROUTES
    if rivals and setting.whole:
        found.append(Row("torch.func.jvp with gradients, compiled", CompiledWithGradients))
        found.append(Row("forward pass + jvp of half without, compiled", ForwardAndJvp))
        found.append(Row("forward pass + one of half a step earlier, compiled", Difference))
    return found


# --- one step, in its own process


class Step:
    """The training step of a row, in this process."""

    def __init__(self, setting: CompiledSetting, row: Row) -> None:
        self.setting = setting
        self.row = row
        self.problem = setting.build(setting.batch)
        self.network = self.problem.network
        self.as_written = copy.deepcopy(self.network)
        self.route: Any = row.route
        if isinstance(row.route, type):
            self.route = row.route(self.network)
        times = TimePairs(equal=1 - row.moving)
        self.objective = CrossFlowLoss(derivative=self.route, times=times)
        if row.compiled and not row.rival:
            self._compile()

    def _compile(self) -> None:
        parts = self.problem.blocks
        if self.setting.whole:
            parts = [self.network]
        mode = None
        if self.setting.graphs:
            mode = "reduce-overhead"
        for part in parts:
            part.compile(mode=mode)

    def __call__(self) -> None:
        """Run forward and backward pass."""
        if self.setting.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        if self.route is None:
            loss = self._plain()
        else:
            loss = self._cross_flow()
        loss.backward()

    def _plain(self) -> Tensor:
        p = self.problem
        t = torch.rand(len(p.latents), device=DEVICE)
        noise = torch.randn_like(p.latents)
        with self._autocast():
            out = self.network(p.latents + noise, t, t, labels=p.labels)
        error = out.float() - p.targets
        return error.square().mean()

    def _cross_flow(self) -> Tensor:
        p = self.problem
        cond = {"labels": p.labels}
        with self._autocast():
            out = self.objective(self.network, p.latents, p.targets, cond=cond)
        return out.loss.mean()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.setting.autocast)

    def start(self) -> tuple[float, str]:
        """Run the first steps; return seconds of compiling, and what torch warned of."""
        seconds = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(WARM_UP):
                before = spent()
                self.network.zero_grad()
                self()
                taken = spent() - before
                seconds.append(taken)
        said = [str(warning.message) for warning in caught]
        remark = next((text for text in said if "runs uncompiled" in text), "")
        return sum(seconds) - WARM_UP * seconds[-1], remark

    def seconds(self) -> float:
        """Return how long a step takes, in the mean of as many as fit into a turn."""
        if DEVICE.type == "cuda":
            return self._seconds_on_gpu()
        took: list[float] = []
        while sum(took) < TURN:
            took.append(self.one())
        return statistics.mean(took)

    def one(self) -> float:
        """Return how long one step takes."""
        self.network.zero_grad()
        return timed(self)

    def _seconds_on_gpu(self) -> float:
        """Return how long a step takes among others: Python runs ahead of the GPU, as it does
        between two looks at the loss.
        """

        def steps(count: int) -> None:
            for _ in range(count):
                self.network.zero_grad()
                self()

        steps(2)  # the memory was given back to the other processes
        count = math.ceil(TURN / timed(functools.partial(steps, 2)) * 2)
        taken = timed(functools.partial(steps, count)) / count
        if not self.setting.graphs:  # whose memory stays theirs
            torch.cuda.empty_cache()
        return taken

    def peak(self) -> float:
        """Return the peak memory of one step in bytes, over what is held before it."""
        used = []
        for _ in range(5):
            self.network.zero_grad()
            gc.collect()
            give_back_memory()
            used.append(growth(self))
        return statistics.median(used)

    def error(self) -> float:
        """Return the largest error of the derivative over its largest entry, on four rows."""
        p = self.problem
        rows = len(p.latents)
        few = round(self.row.moving * rows)
        t = torch.linspace(0.2, 0.9, rows, device=DEVICE)
        moves = torch.arange(rows, device=DEVICE) < few
        s = torch.where(moves, 0.5 * t, t)
        v = torch.randn_like(p.latents)
        tangents = (v, torch.ones_like(t), None, None)

        def fn(z: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor:
            return self.network(z, t, s, **cond)

        primals = (p.latents, t, s, {"labels": p.labels})
        with self._autocast():
            _, slope = self.route(fn, primals, tangents, s < t)
        near = min(few, 4)
        exact = self._exact(v[:near], t[:near], s[:near])
        error = slope[:near] - exact
        return float(error.abs().max() / exact.abs().max())

    def _exact(self, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the derivative of the first rows by float64 forward mode."""
        few = len(t)
        double = self.as_written.double()
        labels = self.problem.labels[:few]
        s = s.double()

        def of_state(z: Tensor, t: Tensor) -> Tensor:
            return double(z, t, s, labels=labels)

        times = t.double()
        primals = (self.problem.latents[:few].double(), times)
        tangents = (v.double(), torch.ones_like(times))
        _, slope = ForwardMode()(of_state, primals, tangents)
        return slope


class Pair:
    """Two training steps in this process, one of each in turn."""

    def __init__(self, setting: CompiledSetting, above: Row, below: Row) -> None:
        self.above = Step(setting, above)
        self.below = Step(setting, below)

    def start(self) -> None:
        """Run the first steps of both."""
        self.below.start()
        self.above.start()

    def ratio(self) -> float:
        """Return how long the first takes over the second, run just before it."""
        below, above = self.below.one(), self.above.one()
        return above / below


def spent() -> float:
    """Return seconds: of this process and those it waited for, or of the wall with a GPU."""
    finish()
    if DEVICE.type == "cuda":
        return time.perf_counter()
    user, system, of_children, system_of_children, _ = os.times()
    return user + system + of_children + system_of_children


def give_back_memory() -> None:
    """Have glibc give back what was freed, and from now on at once: what is held is in use."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_mmap_threshold = -3
        libc.mallopt(m_mmap_threshold, 4096)
        libc.malloc_trim(0)
