"""The Swiss roll: which statistics train, and which do not (appendix C of CrossFlow).

A latent of two dimensions (the standardised, rotated roll) is mapped to "pixels" of sixteen (the
roll lifted by a random orthonormal matrix) in one step. What a variant chooses is h = b / kappa,
where b = 1/delta; everything else is equal. Rows are labelled O1 to O3, as the observations of the
paper's table:

* O1: kappa = 0 has no data term.
* O2: h is zero on the diagonal s = t, so those rows are reconstructions.
* O3: h fits the schedule, so they reconstruct x itself and not a multiple of it.

``python examples/swiss_roll/swiss_roll.py --quick`` runs in seconds, and tells nothing but that it
runs.
"""

import argparse
import math
import multiprocessing
import os
import statistics
from collections.abc import Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from flowspace import (
    AbsoluteError,
    ConsistencyLoss,
    ConsistencyStatistic,
    CosineSchedule,
    CrossFlowLoss,
    LinearSchedule,
    Penalty,
    Schedule,
    SquaredError,
    Statistic,
    TimePairs,
    ToDataTimes,
    UniformTimes,
)
from flowspace.demo.page import markdown_table, png, write_beside
from flowspace.objectives import Objective

EARLIEST = 0.02
"""The smallest t and s that are drawn, and where one-step samples are taken."""

PIXELS = 16
STEPS = 800
SHOWN = 5000
"""Points that are compared and drawn."""

NOT_LEARNED = 1e3
"""A distance beyond this is printed as a divergence."""

FORMS = {False: "target form", True: "literal form"}


# --- the variants
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        observations: of the paper's table that it belongs to.
        schedule: ``linear`` or ``cosine``.
        h: a formula in t and s; ``-`` for kappa = 0.
        property: what it shows.
    """

    observations: str
    schedule: str
    h: str
    property: str

    def objective(self, literal: bool) -> Objective:
        """Build the objective; the literal form takes absolute errors, the target form squared
        ones.
        """
        schedule, kappa = SCHEDULES[self.schedule]
        times = UniformTimes(low=EARLIEST)
        penalty: Penalty = SquaredError()
        if literal:
            penalty = AbsoluteError()
        if self.property == CLEAN_BOUNDARY:
            return ConsistencyLoss(
                schedule=schedule,
                times=ToDataTimes(times),
                penalty=penalty,
                literal=literal,
                check=False,
            )
        statistic: Statistic | ConsistencyStatistic = ConsistencyStatistic()
        if self.h != "-":
            statistic = Statistic.from_h(schedule, self.h, kappa)
        return CrossFlowLoss(
            schedule=schedule,
            statistic=statistic,
            times=TimePairs(times),
            penalty=penalty,
            literal=literal,
            check=False,
        )


SCHEDULES: dict[str, tuple[Schedule, str]] = {
    "linear": (LinearSchedule(), "s"),
    "cosine": (CosineSchedule(), "sin(pi*s/2)"),
}
"""Schedules, and kappa = beta(s)."""

LINEAR, COSINE = "1/t - 1/s", "cot(pi*t/2) - cot(pi*s/2)"
CLEAN_BOUNDARY = "kappa = 0, clean boundary only"
VARIANTS = (
    Variant("O1 O2 O3", "linear", LINEAR, "matched: kappa = s, zero on the diagonal"),
    Variant("O1", "linear", "-", "kappa = 0, no boundary"),
    Variant("O1", "linear", "-", CLEAN_BOUNDARY),
    Variant("O2", "linear", "1/t", "never zero"),
    Variant("O2", "linear", "1/t - 1/(s + 0.1)", "zero shifted by 0.1"),
    Variant("O2", "linear", "1/t - 1/(s + 0.3)", "zero shifted by 0.3"),
    Variant("O3", "linear", COSINE, "not matched"),
    Variant("O3", "cosine", LINEAR, "not matched"),
    Variant("O3", "cosine", COSINE, "matched"),
)


# --- the two spaces
# -------------------------------------------------------------------------------------------------


def roll(count: int, generator: torch.Generator) -> Tensor:
    """Draw points of the noisy Swiss roll: angle 1.5 pi (1 + 2u), radius the angle over 7.5, noise
    0.02; ``(count, 2)``.
    """
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(count, generator=generator))
    points = torch.stack([angle * angle.cos(), angle * angle.sin()], 1) / 7.5
    noise = torch.randn(count, 2, generator=generator)
    return points + 0.02 * noise


@dataclass(frozen=True)
class RollSpaces:
    """The two spaces: how a roll becomes a latent and an image."""

    lift: Tensor
    mean: Tensor
    std: Tensor
    turn: Tensor

    @classmethod
    def of(cls, seed: int) -> "RollSpaces":
        """Draw the lift; standardise and rotate the latent."""
        generator = torch.Generator().manual_seed(seed)
        columns = torch.randn(PIXELS, 2, generator=generator)
        lift, _ = torch.linalg.qr(columns)
        points = roll(20_000, generator)
        angle = torch.tensor(math.pi / 5)
        cos, sin = angle.cos(), angle.sin()
        turn = torch.stack([cos, -sin, sin, cos]).reshape(2, 2)
        return cls(lift, points.mean(0), points.std(0), turn)

    def latents(self, points: Tensor) -> Tensor:
        """The standardised roll, rotated: ``(B, 2)``."""
        standardised = (points - self.mean) / self.std
        return standardised @ self.turn.T

    def images(self, points: Tensor) -> Tensor:
        """The roll, lifted: ``(B, 16)``."""
        return points @ self.lift.T


class RollMLP(nn.Module):
    """An MLP with three hidden layers of 128, SiLU, on (z, t, s)."""

    def __init__(self, outputs: int = PIXELS, width: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, outputs),
        )

    def forward(self, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Map ``(B, 2)`` states and ``(B,)`` times to ``(B, outputs)``."""
        times = torch.stack([t, s], 1)
        return self.net(torch.cat([z, times], 1))


# --- training and the distance
# -------------------------------------------------------------------------------------------------


def sliced_wasserstein(
    first: Tensor, second: Tensor, projections: int = 256, seed: int = 0
) -> float:
    """Return the mean absolute difference of sorted projections of two clouds of the same shape
    ``(N, D)``.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(first.shape[1], projections, generator=generator)
    directions = directions / directions.norm(dim=0)
    ours = (first @ directions).sort(0).values
    theirs = (second @ directions).sort(0).values
    return float((ours - theirs).abs().mean())


@dataclass(frozen=True)
class RollResult:
    """What one training run of a variant gave."""

    variant: Variant
    literal: bool
    seed: int
    distance: float
    samples: Tensor


def train(
    variant: Variant, literal: bool, seed: int, steps: int = STEPS, batch: int = 512
) -> RollResult:
    """Train one network and measure its one-step samples, t = 1 to s = 0.02."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    world = RollSpaces.of(seed)
    network = RollMLP()
    loss_fn = variant.objective(literal)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(steps):
        points = roll(batch, generator)
        latents, images = world.latents(points), world.images(points)
        out = loss_fn(network, latents, images, generator=generator)
        loss = out.loss.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        noise = torch.randn(SHOWN, 2, generator=generator)
        one = torch.ones(SHOWN)
        made = network(noise, one, EARLIEST * one)
    real = world.images(roll(SHOWN, generator))
    distance = sliced_wasserstein(made, real)
    return RollResult(variant, literal, seed, distance, made @ world.lift)


def floor(seed: int) -> float:
    """Return the distance between two independent real samples: no model can be expected to do
    better.
    """
    generator = torch.Generator().manual_seed(seed)
    world = RollSpaces.of(seed)
    first = world.images(roll(SHOWN, generator))
    second = world.images(roll(SHOWN, generator))
    return sliced_wasserstein(first, second)


def run(seeds: int, steps: int = STEPS, processes: int = 2) -> Iterator[RollResult]:
    """Train every variant in both forms with every seed, one thread a process; yields results as
    they come.
    """
    jobs = []
    for variant in VARIANTS:
        for literal in FORMS:
            jobs += [(variant, literal, seed, steps) for seed in range(seeds)]
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(processes, context) as pool:
        begun = [pool.submit(_one, job) for job in jobs]
        for done in futures.as_completed(begun):
            yield done.result()


def _one(job: tuple[Variant, bool, int, int]) -> RollResult:
    """Train one variant on one thread."""
    torch.set_num_threads(1)
    return train(*job)


# --- the table and the picture
# -------------------------------------------------------------------------------------------------

HEAD = ("observation", "schedule", "h = b/kappa", "", *FORMS.values())


def rows(results: Iterable[RollResult]) -> list[tuple[str, ...]]:
    """Return the table: the mean distance over seeds and, after ±, half of its range."""
    found: dict[tuple[Variant, bool], list[float]] = {}
    for result in results:
        key = (result.variant, result.literal)
        found.setdefault(key, []).append(result.distance)
    table = []
    for v in VARIANTS:
        if (v, False) in found:
            spreads = [_spread(found[v, literal]) for literal in FORMS]
            table.append((v.observations, v.schedule, v.h, v.property, *spreads))
    return table


def _spread(distances: list[float]) -> str:
    """Return the mean and half of the range, or how many diverged."""
    diverged = sum(not distance < NOT_LEARNED for distance in distances)  # nan is one
    if diverged:
        return f"> 1e3 in {diverged} of {len(distances)}"
    half = (max(distances) - min(distances)) / 2
    return f"{statistics.mean(distances):.3f} ± {half:.3f}"


def figure(results: Iterable[RollResult]) -> Figure:
    """Draw the first seed's samples of every variant, the target form above the literal form,
    beside a real roll.
    """
    first = {}
    for result in results:
        if result.seed == 0:
            first[result.variant, result.literal] = result.samples
    shown = [v for v in VARIANTS if (v, False) in first]
    columns = len(shown) + 1
    size = (1.9 * columns, 4.6)
    fig, axes = plt.subplots(2, columns, figsize=size, layout="constrained")
    real = roll(SHOWN, torch.Generator().manual_seed(0))
    for line, (literal, form) in zip(axes, FORMS.items(), strict=True):
        cloud(line[0], real)
        line[0].set_ylabel(form)
        for axis, v in zip(line[1:], shown, strict=True):
            cloud(axis, first[v, literal])
    for axis, v in zip(axes[0][1:], shown, strict=True):
        words = v.property.replace(", ", ",\n").replace(": ", ":\n")
        axis.set_title(f"{v.observations}, {v.schedule}\n{words}", fontsize=8)
    axes[0][0].set_title("real", fontsize=8)
    return fig


def cloud(axis: Axes, points: Tensor) -> None:
    """Draw points of the roll."""
    axis.scatter(*points.T, s=0.3, color="#1f4e79", rasterized=True)
    axis.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xticks=[], yticks=[], aspect="equal")


def main(arguments: list[str] | None = None) -> None:
    """Train every variant with every seed, print the table and save the table and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=STEPS)
    add("--quick", action="store_true", help="one seed, 10 steps")
    add("--processes", type=int, default=os.cpu_count() or 1, help="one thread each")
    add("--out", type=Path, default=Path("runs/swiss_roll"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.steps = 1, 10
    runs = run(options.seeds, options.steps, options.processes)
    total = len(FORMS) * len(VARIANTS) * options.seeds
    results = list(tqdm(runs, "swiss roll", total, unit="run"))
    real = statistics.mean(floor(seed) for seed in range(options.seeds))
    note = (
        f"One step from t = 1 to s = {EARLIEST}, {options.steps} training steps; "
        f"sliced Wasserstein distance, mean over {options.seeds} seeds ± half of their range. "
        f"Real against real: {real:.4f}."
    )
    text = f"{markdown_table(HEAD, rows(results))}\n\n{note}\n"
    write_beside(options.out / "table.md", text)
    write_beside(options.out / "rolls.png", png(figure(results)))
    print(f"{text}\npictures: {options.out / 'rolls.png'}")


if __name__ == "__main__":
    main()
