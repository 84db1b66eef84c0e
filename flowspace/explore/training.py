"""A small network, trained on the Swiss roll while one watches (appendix C of CrossFlow).

As in ``examples/swiss_roll`` the network is an MLP with three hidden layers of 128, batches have
512 points, t and s are uniform above 0.02, and a sample is one step from t = 1 to s = 0.02. Here
the roll is both latent and image, in the plane, and one wants to see its arms: so the network is
also given sines and cosines of z, the learning rate rises and falls, and samples are drawn by
averaged weights. A statistic that fails Criterion 1 is trained with MeanFlowLoss.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowspace.explore.design import Design, read, report_of
from flowspace.flow_map import FlowMap
from flowspace.objectives import CrossFlowLoss, MeanFlowLoss, Objective
from flowspace.times import TimePairs, UniformTimes

__all__ = ["TrainingLook", "objective_of", "roll", "train"]

EARLIEST = 0.02
"""The smallest t and s that are drawn, and where one-step samples are taken."""

BATCH = 512
SHOWN = 1000
"""Points that are drawn and compared."""

HARMONICS = 3
"""Waves of each number of z that the network is given, of periods 4, 2 and 4/3."""

HIGHEST_RATE, DECAY = 3e-3, 0.99
"""Of the learning rate, and of the average of the weights."""

EVERY = 0.6
"""Seconds between two looks at the samples."""

CURVE = 200
"""Points of the loss curve that are sent."""


@dataclass(frozen=True)
class TrainingLook:
    """A look at a training run.

    Attributes:
        step: how many steps were taken.
        steps: of how many.
        losses: ``(n, 2)``, steps and the mean loss around them.
        samples: one-step samples ``(SHOWN, 2)``.
        data: points of the roll ``(SHOWN, 2)``.
        distance: their sliced Wasserstein distance.
        problem: why it ended early, or an empty text.
    """

    step: int
    steps: int
    losses: np.ndarray
    samples: np.ndarray
    data: np.ndarray
    distance: float
    problem: str = ""

    @property
    def done(self) -> bool:
        """Whether nothing follows."""
        return bool(self.problem) or self.step >= self.steps


class RollNetwork(nn.Module):
    """An MLP with three hidden layers of 128, SiLU, on (z, t, s) and waves of z; in the plane."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4 + 4 * HARMONICS, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Map ``(B, 2)`` states and ``(B,)`` times to ``(B, 2)``."""
        rates = math.pi / 2 * torch.arange(1, HARMONICS + 1)
        angles = (z[:, :, None] * rates).flatten(1)
        return self.net(torch.cat([z, t[:, None], s[:, None], angles.sin(), angles.cos()], 1))


def roll(count: int, generator: torch.Generator) -> Tensor:
    """Draw points of the noisy Swiss roll, with a spread of about 1; ``(count, 2)``."""
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(count, generator=generator))
    points = torch.stack([angle * angle.cos(), angle * angle.sin()], 1) / 7.5
    return points + 0.02 * torch.randn(count, 2, generator=generator)


def objective_of(design: Design) -> Objective:
    """Return the objective that trains a design, whether or not the criteria hold.

    Raises:
        DesignError: if the design cannot be read.
    """
    schedule, statistic = read(design)
    times = TimePairs(UniformTimes(low=EARLIEST))
    if report_of(design).criterion1:
        return CrossFlowLoss(schedule=schedule, statistic=statistic, times=times, check=False)
    return MeanFlowLoss(schedule=schedule, statistic=statistic, times=times)


def train(design: Design, steps: int, seed: int = 0) -> Iterator[TrainingLook]:
    """Train a network on the roll; yields a look at it now and then, and one at the end.

    Raises:
        DesignError: if the design cannot be read.
    """
    run = _Run(design, steps, seed)
    looked = 0.0
    for step in range(1, steps + 1):
        loss = run.step()
        if not math.isfinite(loss):
            problem = f"the loss is not finite at step {step}: this statistic does not train here"
            yield run.look(step, steps, problem)
            return
        if step == steps or time.monotonic() - looked > EVERY:
            yield run.look(step, steps)
            looked = time.monotonic()


class _Run:
    """A network, its average, its objective and its optimizer."""

    def __init__(self, design: Design, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(1000 + seed)
        self.loss_fn = objective_of(design)
        self.network = RollNetwork()
        self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        self.optimizer = torch.optim.Adam(self.network.parameters(), HIGHEST_RATE)
        self.rate = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, HIGHEST_RATE, total_steps=steps, pct_start=0.1
        )
        self.noise = torch.randn(SHOWN, 2, generator=self.generator)
        self.data = roll(SHOWN, self.generator)
        self.losses: list[float] = []

    def step(self) -> float:
        """Take a step; returns the loss."""
        points = roll(BATCH, self.generator)
        loss = self.loss_fn(self.network, points, points, generator=self.generator).loss.mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.average.update_parameters(self.network)
        self.losses.append(loss.item())
        return self.losses[-1]

    def look(self, step: int, steps: int, problem: str = "") -> TrainingLook:
        """Return the samples of now."""
        samples = self._samples()
        return TrainingLook(
            step=step,
            steps=steps,
            losses=_thinned(self.losses),
            samples=samples.numpy(),
            data=self.data.numpy(),
            distance=_sliced_wasserstein(samples, self.data),
            problem=problem,
        )

    @torch.no_grad()
    def _samples(self) -> Tensor:
        """Return one-step samples from the same noise each time."""
        one = torch.ones(len(self.noise))
        made = self.average(self.noise, one, EARLIEST * one)
        if isinstance(self.loss_fn, MeanFlowLoss):
            flow_map = FlowMap(self.average, self.loss_fn.schedule, self.loss_fn.statistic)
            return flow_map.step(self.noise, one, EARLIEST * one)
        return made


def _thinned(losses: list[float]) -> np.ndarray:
    """Return at most `CURVE` points of a curve, each the mean of its steps."""
    each = max(1, math.ceil(len(losses) / CURVE))
    means = [
        (start + each / 2, sum(losses[start : start + each]) / len(losses[start : start + each]))
        for start in range(0, len(losses), each)
    ]
    return np.array(means)


def _sliced_wasserstein(first: Tensor, second: Tensor) -> float:
    """Return the mean absolute difference of sorted projections of two clouds ``(N, 2)``."""
    angles = torch.linspace(0, math.pi, 65)[:-1]
    directions = torch.stack([angles.cos(), angles.sin()])
    ours = (first @ directions).sort(0).values
    theirs = (second @ directions).sort(0).values
    return float((ours - theirs).abs().mean())
