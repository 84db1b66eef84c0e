"""One training step of a compiled network, by a route to the derivative or by a rival."""

import abc
import copy
import ctypes
import functools
import gc
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
    side, classes = network.config["grid"], network.config["classes"]
    return Problem(
        network,
        list(network.blocks),
        latents=torch.randn(batch, 32, side, side, device=DEVICE),
        targets=torch.randn(batch, 3, 16 * side, 16 * side, device=DEVICE),
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
        compiles: how many times the seconds to compile are measured.
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

    @property
    def title(self) -> str:
        """One line that says what was measured."""
        what = "whole compiled" if self.whole else "blocks compiled"
        dtype = "bfloat16 autocast" if self.autocast else "float32"
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
        inputs, v = (z, t, s, cond["labels"]), tangents[0]
        value = compiled(value_alone)(self.network, *inputs)
        with torch.no_grad():
            few = [x[indices] for x in inputs]
            slope = self.slope(few, v[indices], value.detach()[indices])
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
        with sdpa_kernel(SDPBackend.MATH):
            return compiled(of_all_rows)(self.network, z, t, s, cond["labels"], tangents[0])

    def slope(self, *_: Any) -> Tensor:
        """Not used: the value comes with the derivative."""
        raise NotImplementedError


class ForwardAndJvp(CompiledRival):
    """A forward pass, and torch.func.jvp without gradients of the rows that move."""

    def slope(self, inputs: Sequence[Tensor], v: Tensor, value: Tensor) -> Tensor:
        """Return the derivative on rows that move."""
        with sdpa_kernel(SDPBackend.MATH):
            return compiled(of_all_rows)(self.network, *inputs, v)[1]


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
        graphs: and runs in CUDA graphs.
        remark: what is to be known of it.
    """

    name: str
    route: Derivative | type[CompiledRival] | None = None
    moving: float = 0.5
    compiled: bool = True
    graphs: bool = False
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
    if DEVICE.type == "cuda" and setting.whole:
        found.append(Row(f"{PLAIN}, CUDA graphs", graphs=True))
        found.append(Row(f"{ours(0.5)}, CUDA graphs", SharedPrimal(), graphs=True))
    if rivals and setting.whole:
        found.append(Row("torch.func.jvp with gradients, compiled", CompiledWithGradients))
        found.append(Row("forward pass + jvp of half without, compiled", ForwardAndJvp))
        found.append(Row("forward pass + one of half a step earlier, compiled", Difference))
    return found


# --- one step, in its own process


class Step:
    """The training step of a row, in this process."""

    def __init__(self, setting: CompiledSetting, row: Row) -> None:
        self.setting, self.row, self.problem = setting, row, setting.build(setting.batch)
        self.network = self.problem.network
        self.as_written = copy.deepcopy(self.network)
        route = row.route
        self.route = route(self.network) if isinstance(route, type) else route
        times = TimePairs(equal=1 - row.moving)
        self.objective = CrossFlowLoss(derivative=self.route, times=times)
        if row.compiled and not row.rival:
            parts = [self.network] if setting.whole else self.problem.blocks
            for part in parts:
                part.compile(mode="reduce-overhead" if row.graphs else None)

    def __call__(self) -> None:
        """Run forward and backward pass."""
        if self.row.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        loss = self._plain() if self.route is None else self._cross_flow()
        loss.backward()

    def _plain(self) -> Tensor:
        p, rows = self.problem, len(self.problem.latents)
        t, noise = torch.rand(rows, device=DEVICE), torch.randn_like(p.latents)
        with self._autocast():
            out = self.network(p.latents + noise, t, t, labels=p.labels)
        return (out.float() - p.targets).square().mean()

    def _cross_flow(self) -> Tensor:
        p = self.problem
        with self._autocast():
            out = self.objective(self.network, p.latents, p.targets, cond={"labels": p.labels})
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
                seconds.append(spent() - before)
        said = [str(warning.message) for warning in caught]
        remark = next((text for text in said if "runs uncompiled" in text), "")
        return sum(seconds) - WARM_UP * seconds[-1], remark

    def seconds(self) -> float:
        """Return how long a step takes, in the mean of as many as fit into a turn."""
        if DEVICE.type == "cuda":  # the allocator was emptied for the other processes
            self()
        took: list[float] = []
        while sum(took) < TURN:
            self.network.zero_grad()
            took.append(timed(self))
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        return statistics.mean(took)

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
        p, rows = self.problem, len(self.problem.latents)
        few = round(self.row.moving * rows)
        t = torch.linspace(0.2, 0.9, rows, device=DEVICE)
        s = torch.where(torch.arange(rows, device=DEVICE) < few, 0.5 * t, t)
        v = torch.randn_like(p.latents)
        tangents = (v, torch.ones_like(t), None, None)

        def fn(z: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor:
            return self.network(z, t, s, **cond)

        with self._autocast():
            cond = {"labels": p.labels}
            slope = self.route(fn, (p.latents, t, s, cond), tangents, s < t)[1]
        near = min(few, 4)
        double = self.as_written.double()
        s, labels = s[:near].double(), p.labels[:near]
        primals = p.latents[:near].double(), t[:near].double()
        exact = ForwardMode()(
            lambda z, t: double(z, t, s, labels=labels),
            primals,
            (v[:near].double(), torch.ones_like(primals[1])),
        )[1]
        return float((slope[:near] - exact).abs().max() / exact.abs().max())


def spent() -> float:
    """Return seconds: of this process and those it waited for, or of the wall with a GPU."""
    finish()
    return time.perf_counter() if DEVICE.type == "cuda" else sum(os.times()[:4])


def give_back_memory() -> None:
    """Have glibc give back what was freed, and from now on at once: what is held is in use."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_mmap_threshold = -3
        libc.mallopt(m_mmap_threshold, 4096)
        libc.malloc_trim(0)
