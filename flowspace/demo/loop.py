"""The training loop of the demo: a network, tensors in memory, Adam, an average of the weights.

Everything random in a step follows from (seed, step), so a run that was killed continues from its
last checkpoint to the same weights, bit for bit, as one that was not.
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from flowspace.errors import RunError
from flowspace.training.checkpoints import (
    Checkpoints,
    fill,
    flatten_optimizer,
    packed,
    restore_optimizer,
    unpacked,
)
from flowspace.training.draws import Draws, seed_of
from flowspace.training.signals import stopped_by_sigterm

__all__ = ["StepLoss", "TrainSettings", "Trainer", "Watch", "rows_of"]

StepLoss = Callable[[nn.Module, tuple[Tensor, ...], Draws], Tensor]
"""The mean loss of a batch, with gradient."""

Watch = Callable[[int, nn.Module], None]
"""Is given the number of steps that were done and the averaged network, in eval mode."""

HARMLESS = ("checkpoint_every", "log_every", "skips")
"""Settings that the weights do not depend on: a run goes on with others."""

CPU = torch.device("cpu")

ORDER = 1
"""Keeps the order of a pass apart from the other uses of (seed, number)."""


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast to train.

    Attributes:
        steps: optimiser steps in all.
        batch: rows a step.
        learning_rate: of Adam, at its peak.
        warmup: steps over which it rises.
        final_rate: the share of it that is left at the end of the cosine decay; 1 keeps it.
        ema: the decay of the averaged weights, which are returned.
        clip: the largest gradient norm.
        seed: of everything random.
        checkpoint_every: steps between checkpoints.
        log_every: steps between records of the log.
        skips: steps whose loss or gradient is not finite are skipped; one more than so many ends
            the run.
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
    log_every: int = 50
    skips: int = 10

    def rate(self, step: int) -> float:
        """Return the learning rate: a linear rise, then half a cosine down to ``final_rate``."""
        if step < self.warmup:
            return self.learning_rate * ((step + 1) / self.warmup)
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        fallen = (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * fallen)

    def averaged(self, held: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
        """Return the average after a step; early ones follow the weights faster."""
        decay = min(self.ema, int(count) / (int(count) + 9))
        return held.lerp(new, 1 - decay)

    def logged(self, step: int) -> bool:
        """Whether the log has a record of a step."""
        return step % self.log_every == 0 or step + 1 == self.steps

    def saved(self, step: int) -> bool:
        """Whether a checkpoint is written after a step."""
        return (step + 1) % self.checkpoint_every == 0 or step + 1 == self.steps


@dataclass(frozen=True)
class Trainer:
    """Trains networks in one folder, and continues what was stopped there.

    Args:
        name: what the progress bar and the log call the run.
        settings: how long and how fast.
        folder: where checkpoints and ``log.jsonl`` go, and from where the run continues.
        context: what else the weights depend on, such as the data set; a run of another context
            is not continued.
        device: where the network is trained. On a GPU it is compiled.
        watch: is called before the first step, and after each whole share of the steps; it must
            not draw from torch's own generator. None watches nothing.
        looks: how many shares.
    """

    name: str
    settings: TrainSettings
    folder: Path
    context: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = CPU
    watch: Watch | None = None
    looks: int = 6

    def train(self, network: nn.Module, tensors: tuple[Tensor, ...], loss: StepLoss) -> nn.Module:
        """Train a network in place on rows of the tensors; return its average, in eval mode.

        Raises:
            RunError: if too many losses are not finite, or the folder holds another run.
            SystemExit: with code 0, when SIGTERM came; the step was finished and saved.
        """
        s = self.settings
        checkpoints = Checkpoints(self.folder, self.plan())
        network.to(self.device)
        run = _Progress(network, s)
        if self.device.type == "cuda":
            network.compile()
        start = run.restored(checkpoints)
        network.train()
        if start == 0:
            self.look(0, run.average.module)
        with stopped_by_sigterm() as signals, self.bar(start) as bar:
            for step in bar:
                chosen = rows_of(step, s, len(tensors[0]))
                batch = tuple(tensor[chosen].to(self.device) for tensor in tensors)
                record = run.step(step, batch, loss)
                if s.logged(step) or "why" in record:
                    bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
                    self.log({"name": self.name, "step": step, **record})
                run.refuse_more_skips(record)
                self.look(step + 1, run.average.module)
                if s.saved(step) or signals:
                    checkpoints.save(step + 1, run.tensors())
                if signals:
                    raise SystemExit(0)
        return run.average.module.requires_grad_(False).eval()

    def look(self, done: int, average: nn.Module) -> None:
        """Show the averaged network to who watches, where a share of the steps is done."""
        if self.watch is None or done not in self.looks_at():
            return
        training = average.training
        self.watch(done, average.eval())
        average.train(training)

    def looks_at(self) -> set[int]:
        """Return after how many steps the network is shown."""
        return {number * self.settings.steps // self.looks for number in range(self.looks + 1)}

    def plan(self) -> dict[str, Any]:
        """Return everything that the weights depend on."""
        settings = asdict(self.settings)
        for name in HARMLESS:
            del settings[name]
        return {"name": self.name, **settings, **self.context}

    def bar(self, start: int) -> "tqdm[int]":
        """Return the steps that are left, shown as a progress bar."""
        steps = range(start, self.settings.steps)
        return tqdm(steps, self.name, self.settings.steps, initial=start, unit="step")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record to the log, a JSON object a line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def rows_of(step: int, settings: TrainSettings, count: int) -> Tensor:
    """Return which of so many rows a step takes from the endless stream of them, which is shuffled
    anew in every pass.
    """
    first = step * settings.batch
    passes = []
    for number in range(first // count, (first + settings.batch - 1) // count + 1):
        generator = torch.Generator().manual_seed(seed_of(settings.seed, number, ORDER))
        passes.append(torch.randperm(count, generator=generator))
    return torch.cat(passes)[first % count :][: settings.batch]


class _Progress:
    """Everything that changes while a network is trained."""

    def __init__(self, network: nn.Module, settings: TrainSettings) -> None:
        self.network, self.settings = network, settings
        self.optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
        self.average = AveragedModel(network, avg_fn=settings.averaged)
        self.average.update_parameters(network)  # the first call copies
        self.skipped = 0

    def step(self, step: int, batch: tuple[Tensor, ...], loss: StepLoss) -> dict[str, Any]:
        """Take one step, or skip it where it is not finite; returns what is logged of it."""
        s = self.settings
        torch.manual_seed(seed_of(s.seed, step))  # of dropout
        draws = Draws(s.seed, step, 0, s.batch, s.batch, batch[0].device)
        for group in self.optimizer.param_groups:
            group["lr"] = s.rate(step)
        self.optimizer.zero_grad()
        mean = loss(self.network, batch, draws)
        mean.backward()
        value = float(mean.detach())
        norm = float(nn.utils.clip_grad_norm_(self.network.parameters(), s.clip))
        record = {"loss": value, "gradient_norm": norm, "rate": s.rate(step)}
        if math.isfinite(value) and math.isfinite(norm):
            self.optimizer.step()
            self.average.update_parameters(self.network)
            return record
        self.skipped += 1
        why = f"the loss is {value} at step {step}, its gradient's norm {norm}"
        return record | {"skipped": self.skipped, "why": why}

    def refuse_more_skips(self, record: Mapping[str, Any]) -> None:
        """Say that a step was skipped, and end the run after too many."""
        if "why" not in record:
            return
        if self.skipped > self.settings.skips:
            raise RunError(
                f"{record['why']}; {self.skipped} steps were not finite, more than skips = "
                f"{self.settings.skips}: lower learning_rate = {self.settings.learning_rate}"
            )
        warnings.warn(
            f"{record['why']}; the step is skipped ({self.skipped} so far)", stacklevel=3
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on."""
        return packed(
            {
                "network": self.network.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": flatten_optimizer(self.optimizer, self.network),
                "run": {"skipped": torch.tensor(self.skipped)},
            }
        )

    def restored(self, checkpoints: Checkpoints) -> int:
        """Put back the latest checkpoint; returns the step that comes next."""
        found = checkpoints.latest()
        if found is None:
            return 0
        step, tensors = found
        parts = unpacked(tensors)
        fill(self.network.state_dict(), parts["network"], checkpoints.folder)
        fill(self.average.state_dict(), parts["average"], checkpoints.folder)
        restore_optimizer(self.optimizer, self.network, parts.get("optimizer", {}))
        self.skipped = int(parts["run"]["skipped"])
        return step
