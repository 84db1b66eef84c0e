"""The training loop: one step is one batch, its loss, its gradient, clipped; EMA beside it; checkpoints and logs.

Everything random in a step follows from (seed, step): which rows, their noise and times, dropout. So a run that was killed
continues from its last checkpoint to the same weights, bit for bit, as one that was not.
"""

import abc
import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flowspace.errors import RunError
from flowspace.training.checkpoints import Checkpoints, flatten_optimizer, restore_optimizer
from flowspace.training.optimizers import Together

__all__ = ["Batches", "LoopSettings", "TensorBatches", "cosine_decay", "train"]

Batch = tuple[Tensor, ...]
StepLoss = Callable[[nn.Module, Batch, torch.Generator], Tensor]


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast to train.

    Attributes:
        steps: optimiser steps in all.
        batch: rows a step.
        learning_rate: of Adam, at its peak.
        warmup: steps over which it rises.
        final_rate: the share of it that is left at the end of the cosine decay.
        ema: the decay of the averaged weights that are returned; 0 returns the weights themselves.
        clip: the largest gradient norm.
        seed: of everything random.
        checkpoint_every: steps between checkpoints.
    """

    steps: int
    batch: int = 128
    learning_rate: float = 1e-3
    warmup: int = 100
    final_rate: float = 0.05
    ema: float = 0.995
    clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 500


class Batches(abc.ABC):
    """Where batches come from; the batch of a step depends on nothing but the step."""

    @abc.abstractmethod
    def __call__(self, step: int, size: int, seed: int) -> Batch:
        """Return the tensors of one batch, each with ``size`` rows."""


@dataclass(frozen=True)
class TensorBatches(Batches):
    """Batches from tensors in memory, shuffled anew in every pass."""

    tensors: tuple[Tensor, ...]

    def __call__(self, step: int, size: int, seed: int) -> Batch:
        """Return rows ``step * size`` to ``(step + 1) * size`` of the endless shuffled stream."""
        rows = len(self.tensors[0])
        first, last = step * size, (step + 1) * size
        passes = [self._order(seed, p, rows) for p in range(first // rows, (last - 1) // rows + 1)]
        chosen = torch.cat(passes)[first % rows :][:size]
        return tuple(tensor[chosen] for tensor in self.tensors)

    @staticmethod
    def _order(seed: int, number: int, rows: int) -> Tensor:
        return torch.randperm(rows, generator=torch.Generator().manual_seed(seed_of(seed, number, 1)))


def seed_of(*parts: int) -> int:
    """Mix integers into one seed, so that neighbouring steps and seeds share nothing."""
    mixed = 0
    for part in parts:
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
        mixed ^= mixed >> 29
    return mixed


def cosine_decay(step: int, settings: LoopSettings) -> float:
    """Return the factor of the learning rate: a linear rise, then half a cosine down to ``final_rate``."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.final_rate + (1 - settings.final_rate) * (1 + math.cos(math.pi * progress)) / 2


def train(
    name: str,
    network: nn.Module,
    batches: Batches,
    loss: StepLoss,
    settings: LoopSettings,
    folder: Path | None = None,
    context: Mapping[str, Any] | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer | Together] | None = None,
) -> nn.Module:
    """Train a network in place and return its averaged copy, in eval mode.

    Args:
        name: what the progress bar and the log call it.
        network: the module to train; on resuming its weights are replaced.
        batches: where batches come from.
        loss: a function of (network, batch, generator) that returns a scalar.
        settings: how long and how fast.
        folder: where checkpoints and ``log.jsonl`` go, and from where the run continues; None keeps nothing.
        context: what else the weights depend on, such as the data set; a run of another context is not continued.
        optimizer: builds the optimiser of a network, such as `MuonAdamW()`; by default Adam. Its rates follow the same
            warm-up and decay, from the ones that it was built with.

    Raises:
        RunError: if a loss is not finite, or the folder holds a run with other settings.
    """
    averaged = copy.deepcopy(network).requires_grad_(False).eval()
    plan = {"name": name, **asdict(settings), **(context or {})} | ({"optimizer": repr(optimizer)} if optimizer else {})
    made = optimizer(network) if optimizer else torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    peaks = [group["lr"] for group in made.param_groups]
    checkpoints = Checkpoints(folder, plan) if folder else None
    start = _resume(checkpoints, network, averaged, made) if checkpoints else 0
    network.train()
    with tqdm(range(start, settings.steps), name, settings.steps, initial=start, unit="step", mininterval=0.5) as bar:
        for step in bar:
            for group, peak in zip(made.param_groups, peaks, strict=True):
                group["lr"] = peak * cosine_decay(step, settings)
            value, norm = _step(step, network, made, batches, loss, settings)
            _average(averaged, network, min(settings.ema, (step + 1) / (step + 10)))
            if step % 50 == 0 or step + 1 == settings.steps:
                bar.set_postfix(loss=f"{value:.4f}", refresh=False)
                _log(folder, {"name": name, "step": step, "loss": value, "gradient_norm": norm})
            if checkpoints and ((step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps):
                checkpoints.save(step + 1, _pack(network, averaged, made))
    return averaged


def _step(
    step: int,
    network: nn.Module,
    optimizer: torch.optim.Optimizer | Together,
    batches: Batches,
    loss: StepLoss,
    settings: LoopSettings,
) -> tuple[float, float]:
    key = seed_of(settings.seed, step)
    torch.manual_seed(key)
    device = next(network.parameters()).device
    batch = tuple(tensor.to(device, non_blocking=True) for tensor in batches(step, settings.batch, settings.seed))
    value = loss(network, batch, torch.Generator(device).manual_seed(key))
    if not bool(value.detach().isfinite()):
        raise RunError(
            f"the loss is {float(value.detach())} at step {step}; lower learning_rate = {settings.learning_rate}"
        )
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
    optimizer.step()
    return float(value.detach()), float(norm)


@torch.no_grad()
def _average(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    for mine, theirs in zip(averaged.parameters(), network.parameters(), strict=True):
        mine.lerp_(theirs, 1 - decay)
    for mine, theirs in zip(averaged.buffers(), network.buffers(), strict=True):
        mine.copy_(theirs)


def _pack(network: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer | Together) -> dict[str, Tensor]:
    parts = {
        "network": network.state_dict(),
        "ema": averaged.state_dict(),
        "optimizer": flatten_optimizer(optimizer, network),
    }
    return {f"{part}:{key}": value for part, tensors in parts.items() for key, value in tensors.items()}


def _resume(
    checkpoints: Checkpoints, network: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer | Together
) -> int:
    found = checkpoints.latest()
    if found is None:
        return 0
    step, tensors = found
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "ema": {}, "optimizer": {}}
    for key, value in tensors.items():
        part, name = key.split(":", 1)
        parts[part][name] = value
    try:
        network.load_state_dict(parts["network"])
        averaged.load_state_dict(parts["ema"])
    except RuntimeError as error:
        raise RunError(
            f"{checkpoints.folder} holds another network; choose another folder or delete it ({error})"
        ) from None
    restore_optimizer(optimizer, network, parts["optimizer"])
    return step


def _log(folder: Path | None, record: dict[str, Any]) -> None:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
