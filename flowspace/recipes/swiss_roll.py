"""The Swiss roll: which statistics train, and which do not (the experiment of CrossFlow's appendix
C).

A latent of two dimensions (the standardised, rotated roll) is mapped to "pixels" of sixteen (the
roll lifted by a random orthonormal matrix) in one step. What a variant chooses is h = b / kappa,
where b = 1/delta; everything else is equal.
"""

import argparse
import concurrent.futures
import itertools
import math
import multiprocessing
import os
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from flowspace.demo.page import markdown_table, png, write_beside
from flowspace.objectives import ConsistencyLoss, CrossFlowLoss, Objective
from flowspace.penalties import AbsoluteError, SquaredError
from flowspace.schedules import CosineSchedule, LinearSchedule, Schedule
from flowspace.statistics import ConsistencyStatistic, Statistic
from flowspace.times import TimePairs, ToDataTimes, UniformTimes

__all__ = ["VARIANTS", "Result", "Variant", "figure", "main", "rows", "run", "sliced_wasserstein"]

EARLIEST = 0.02
"""The smallest t and s that are drawn, and where one-step samples are taken."""

PIXELS = 16
NOT_LEARNED = 1e3
"""A distance beyond this is printed as a divergence."""


@dataclass(frozen=True)
class Variant:
    """One row of the table: a schedule, and h(t, s) as text; or a consistency objective."""

    schedule: str
    h: str
    property: str

    def objective(self, literal: bool) -> Objective:
        """Build the objective; the literal form takes absolute errors, the target form squared
        ones.
        """
        schedule: Schedule = {"linear": LinearSchedule, "cosine": CosineSchedule}[self.schedule]()
        times = UniformTimes(low=EARLIEST)
        common = {
            "schedule": schedule,
            "penalty": AbsoluteError() if literal else SquaredError(),
            "literal": literal,
        }
        if self.property == "kappa = 0, clean boundary":
            return ConsistencyLoss(times=ToDataTimes(times), check=False, **common)
        kappa = {"linear": "s", "cosine": "sin(pi*s/2)"}[self.schedule]
        statistic = (
            ConsistencyStatistic()
            if self.h == "-"
            else Statistic.from_kappa(schedule, kappa, f"1/(({kappa})*({self.h}))")
        )
        return CrossFlowLoss(statistic=statistic, times=TimePairs(times), check=False, **common)


LINEAR, COSINE = "1/t - 1/s", "cot(pi*t/2) - cot(pi*s/2)"
VARIANTS = (
    Variant("linear", LINEAR, "matched"),
    Variant("cosine", COSINE, "matched"),
    Variant("linear", "1/t - 1/(s + 0.1)", "zero shifted by 0.1"),
    Variant("linear", "1/t - 1/(s + 0.3)", "zero shifted by 0.3"),
    Variant("linear", COSINE, "unmatched"),
    Variant("cosine", LINEAR, "unmatched"),
    Variant("linear", "1/t", "never zero"),
    Variant("linear", "-", "kappa = 0, no boundary"),
    Variant("linear", "-", "kappa = 0, clean boundary"),
)


@dataclass(frozen=True)
class Result:
    """What one training run of a variant gave."""

    variant: Variant
    literal: bool
    seed: int
    distance: float
    samples: Tensor


def roll(count: int, generator: torch.Generator) -> Tensor:
    """Draw points of the noisy Swiss roll: angle 1.5 pi (1 + 2u), radius the angle over 7.5, noise
    0.02; ``(count, 2)``.
    """
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(count, generator=generator))
    points = torch.stack([angle * angle.cos(), angle * angle.sin()], 1) / 7.5
    return points + 0.02 * torch.randn(count, 2, generator=generator)


@dataclass(frozen=True)
class World:
    """The two spaces: how a roll becomes a latent and an image."""

    lift: Tensor
    mean: Tensor
    std: Tensor
    turn: Tensor

    @classmethod
    def of(cls, seed: int) -> "World":
        """Draw the lift; standardise and rotate the latent."""
        generator = torch.Generator().manual_seed(seed)
        lift = torch.linalg.qr(torch.randn(PIXELS, 2, generator=generator))[0]
        points = roll(20_000, generator)
        angle = torch.tensor(math.pi / 5)
        turn = torch.stack(
            [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
        )
        return cls(lift, points.mean(0), points.std(0), turn)

    def latents(self, points: Tensor) -> Tensor:
        """The standardised roll, rotated: ``(B, 2)``."""
        return (points - self.mean) / self.std @ self.turn.T

    def images(self, points: Tensor) -> Tensor:
        """The roll, lifted: ``(B, 16)``."""
        return points @ self.lift.T


class Network(nn.Module):
    """An MLP with three hidden layers of 128, SiLU, on (z, t, s)."""

    def __init__(self, outputs: int = PIXELS, width: int = 128) -> None:
        super().__init__()
        sizes = [4, width, width, width]
        layers = [
            layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.SiLU())
        ]
        self.net = nn.Sequential(*layers, nn.Linear(width, outputs))

    def forward(self, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Map ``(B, 2)`` states and ``(B,)`` times to ``(B, outputs)``."""
        return self.net(torch.cat([z, t[:, None], s[:, None]], 1))


def sliced_wasserstein(
    first: Tensor, second: Tensor, projections: int = 256, seed: int = 0
) -> float:
    """Return the mean absolute difference of sorted projections of two clouds of the same shape
    ``(N, D)``.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(first.shape[1], projections, generator=generator)
    directions = directions / directions.norm(dim=0)
    return float(
        ((first @ directions).sort(0).values - (second @ directions).sort(0).values).abs().mean()
    )


def train(
    variant: Variant, literal: bool, seed: int, steps: int = 800, batch: int = 512
) -> Result:
    """Train one network and measure its one-step samples, t = 1 to s = 0.02."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    world, network, objective = World.of(seed), Network(), variant.objective(literal)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(steps):
        points = roll(batch, generator)
        loss = objective(
            network, world.latents(points), world.images(points), generator=generator
        ).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return measure(variant, literal, seed, world, network, generator)


@torch.no_grad()
def measure(
    variant: Variant,
    literal: bool,
    seed: int,
    world: World,
    network: nn.Module,
    generator: torch.Generator,
    count: int = 5000,
) -> Result:
    """Draw one-step samples and compare them with the real roll in pixels."""
    time = torch.ones(count)
    images = network(torch.randn(count, 2, generator=generator), time, EARLIEST * time)
    real = world.images(roll(count, generator))
    return Result(variant, literal, seed, sliced_wasserstein(images, real), images @ world.lift)


def floor(seed: int, count: int = 5000) -> float:
    """Return the distance between two independent real samples: no model can be expected to do
    better.
    """
    generator, world = torch.Generator().manual_seed(seed), World.of(seed)
    return sliced_wasserstein(
        world.images(roll(count, generator)), world.images(roll(count, generator))
    )


HEAD = ("schedule", "h = b/kappa", "", "target form", "literal form")


def rows(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """Return the table: the mean distance over seeds and, after ±, half of its range."""
    found: dict[tuple[Variant, bool], list[float]] = {}
    for result in results:
        found.setdefault((result.variant, result.literal), []).append(result.distance)
    return [
        (v.schedule, v.h, v.property, *(_spread(found[v, literal]) for literal in (False, True)))
        for v in VARIANTS
        if (v, False) in found
    ]


def _spread(distances: list[float]) -> str:
    if not all(distance < NOT_LEARNED for distance in distances):
        return f"> 1e3 in {sum(not d < NOT_LEARNED for d in distances)} of {len(distances)}"
    return f"{statistics.mean(distances):.3f} ± {(max(distances) - min(distances)) / 2:.3f}"


def figure(results: Iterable[Result]) -> Figure:
    """Draw the first seed's samples of every variant, the target form above the literal form,
    beside a real roll.
    """
    first = {(r.variant, r.literal): r for r in results if r.seed == 0}
    shown = [v for v in VARIANTS if (v, False) in first]
    fig, axes = plt.subplots(
        2, len(shown) + 1, figsize=(1.9 * (len(shown) + 1), 4.4), layout="constrained"
    )
    real = roll(5000, torch.Generator().manual_seed(0))
    for row, literal in enumerate((False, True)):
        clouds = [
            ("real", real),
            *((f"{v.schedule}\n{v.property}", first[v, literal].samples) for v in shown),
        ]
        for axis, (title, points) in zip(axes[row], clouds, strict=True):
            axis.scatter(*points.T, s=0.3, color="#1f4e79", rasterized=True)
            axis.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xticks=[], yticks=[], aspect="equal")
            axis.set_title(title if row == 0 else "", fontsize=8)
        axes[row][0].set_ylabel("literal form" if literal else "target form")
    return fig


def main(arguments: list[str] | None = None) -> None:
    """Train every variant with every seed, print the table and save the table and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="one thread each"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/swiss_roll"))
    options = parser.parse_args(arguments)
    total = 2 * len(VARIANTS) * options.seeds
    results = list(
        tqdm(run(options.seeds, options.steps, options.processes), "swiss roll", total, unit="run")
    )
    floors = [floor(seed) for seed in range(options.seeds)]
    text = (
        markdown_table(HEAD, rows(results)) + "\n\n"
        f"One step from t = 1 to s = {EARLIEST}, {options.steps} training steps; sliced "
        "Wasserstein distance, mean over "
        f"{options.seeds} seeds ± half of their range. Real against real: "
        f"{statistics.mean(floors):.4f}.\n"
    )
    write_beside(options.out / "table.md", text)
    write_beside(options.out / "rolls.png", png(figure(results)))
    print(f"{text}\npictures: {options.out / 'rolls.png'}")


def _one(job: tuple[Variant, bool, int, int]) -> Result:
    torch.set_num_threads(1)
    return train(*job)


def run(
    seeds: int = 3, steps: int = 800, processes: int = 2, variants: Iterable[Variant] = VARIANTS
) -> Iterator[Result]:
    """Train every variant in both forms with every seed, one thread a process; yields results as
    they come.
    """
    jobs = [
        (variant, literal, seed, steps)
        for variant in variants
        for literal in (False, True)
        for seed in range(seeds)
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        for future in concurrent.futures.as_completed([pool.submit(_one, job) for job in jobs]):
            yield future.result()
