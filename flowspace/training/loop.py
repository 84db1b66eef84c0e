"""The training loop: one step is one batch, its loss, its gradient, clipped; EMA beside it;
checkpoints and logs.

Everything random in a step follows from (seed, step, row): which rows, their noise and times,
dropout. So a run that was killed continues from its last checkpoint to the same weights, bit for
bit, as one that was not; and several processes train what one would with the whole batch.
"""

import abc
import contextlib
import copy
import math
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flowspace.errors import RunError
from flowspace.training.batches import Ahead, Batch, Batches
from flowspace.training.checkpoints import (
    Checkpoints,
    flatten_optimizer,
    restore_optimizer,
    whole,
)
from flowspace.training.draws import Draws, seed_of
from flowspace.training.journal import Journal, Tracker, by_bins
from flowspace.training.optimizers import Together
from flowspace.training.place import OneProcess, Place, norm_of, put

__all__ = ["Game", "LoopSettings", "StepLoss", "Terms", "Watch", "cosine_decay", "train"]

HARMLESS = ("checkpoint_every", "log_every", "skips")
"""Settings that the weights do not depend on: a run goes on with others."""

LOGGED_PACE = 30.0
"""Seconds between states of the progress bar where it goes to a file, as a cluster's log."""

Optimizer = torch.optim.Optimizer | Together
MakeOptimizer = Callable[[nn.Module], Optimizer]


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast to train.

    Attributes:
        steps: optimiser steps in all.
        batch: rows a step, over all processes.
        learning_rate: of Adam, at its peak.
        warmup: steps over which it rises.
        final_rate: the share of it that is left at the end of the cosine decay; 1 keeps it.
        ema: the decay of the averaged weights that are returned; 0 returns the weights themselves.
        more_emas: decays of further averages, kept in the checkpoints.
        clip: the largest gradient norm.
        seed: of everything random.
        checkpoint_every: steps between checkpoints.
        accumulate: parts that a process takes its rows in, to need less memory.
        log_every: steps between records of the log.
        bfloat16: run networks under autocast; objectives form coefficients and targets in float32
            all the same.
        skips: steps whose loss or gradient is not finite are skipped; one more than so many ends
            the run.
    """

    steps: int
    batch: int = 128
    learning_rate: float = 1e-3
    warmup: int = 100
    final_rate: float = 0.05
    ema: float = 0.995
    more_emas: tuple[float, ...] = ()
    clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 500
    accumulate: int = 1
    log_every: int = 50
    bfloat16: bool = False
    skips: int = 10


@dataclass(frozen=True)
class Terms:
    """What the loss of some rows is made of.

    Attributes:
        parts: losses of each row ``(B,)``, weighted, with gradient; their sum is trained.
        raw: the same as measured, without weights; only logged.
        times: t and s of each row ``(B,)``; losses are logged by them.
        prediction: ``(B, *)``, at which the gradient of each part is measured for the log.
        shown: what the opponent of a `Game` is shown.
    """

    parts: Mapping[str, Tensor]
    raw: Mapping[str, Tensor] = field(default_factory=dict)
    times: Mapping[str, Tensor] = field(default_factory=dict)
    prediction: Tensor | None = None
    shown: Any = None

    @property
    def rows(self) -> Tensor:
        """The trained loss of each row."""
        return torch.stack([part.float() for part in self.parts.values()]).sum(0)

    def slopes(self) -> dict[str, Tensor]:
        """Return the norm of each part's gradient at the prediction, for each row ``(B,)``."""
        if self.prediction is None:
            return {}
        found = {}
        for name, part in self.parts.items():
            (slope,) = torch.autograd.grad(
                part.sum(), self.prediction, retain_graph=True, allow_unused=True
            )
            found[name] = (
                torch.zeros_like(part, dtype=torch.float32)
                if slope is None
                else slope.float().flatten(1).norm(dim=1)
            )
        return found


StepLoss = Callable[[nn.Module, Batch, Draws], Tensor | Terms]


class Game(abc.ABC):
    """A loss with an opponent that is trained beside the network, such as a discriminator.

    Attributes:
        opponent: the other network.
        start: the step from which the opponent is trained.
        clip: the largest norm of the opponent's gradient.
    """

    opponent: nn.Module
    start: int = 0
    clip: float = 1.0

    @abc.abstractmethod
    def optimizer(self, network: nn.Module) -> Optimizer:
        """Build the optimiser of the opponent."""

    def kept(self) -> Mapping[str, Tensor]:
        """Return the opponent's tensors that checkpoints hold."""
        return self.opponent.state_dict()

    @abc.abstractmethod
    def loss(self, network: nn.Module, opponent: nn.Module, batch: Batch, draws: Draws) -> Terms:
        """Return the network's loss; no gradient reaches the opponent's weights."""

    @abc.abstractmethod
    def answer(self, opponent: nn.Module, terms: Terms, draws: Draws) -> Tensor:
        """Return the opponent's loss of each row ``(B,)``."""


class Watch(abc.ABC):
    """Looks at the averaged network now and then, such as by drawing samples and scoring them.

    Attributes:
        every: steps between looks; the last step is always looked at.
    """

    every: int

    @abc.abstractmethod
    def __call__(self, step: int, averaged: nn.Module) -> Mapping[str, float]:
        """Return what is logged; under ``"score"``, if it is there, lower is better, and the best
        is kept.

        Called in the first process only.
        """


def cosine_decay(step: int, settings: LoopSettings) -> float:
    """Return the factor of the learning rate: a linear rise, then half a cosine down to
    ``final_rate``.
    """
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.final_rate + (1 - settings.final_rate) * (1 + math.cos(math.pi * progress)) / 2


def train(
    name: str,
    network: nn.Module,
    batches: Batches,
    loss: StepLoss | Game,
    settings: LoopSettings,
    folder: Path | None = None,
    context: Mapping[str, Any] | None = None,
    optimizer: MakeOptimizer | None = None,
    place: Place | None = None,
    watch: Watch | None = None,
    trackers: Sequence[Tracker] = (),
    begun: Callable[[int], None] | None = None,
) -> nn.Module:
    """Train a network in place and return its averaged copy, in eval mode.

    Args:
        name: what the progress bar and the log call it.
        network: the module to train; on resuming its weights are replaced.
        batches: where batches come from.
        loss: a function of (network, batch, draws) that returns the loss of each row, its mean, or
            `Terms`; or a `Game`.
        settings: how long and how fast.
        folder: where checkpoints and ``log.jsonl`` go, and from where the run continues; None
            keeps nothing.
        context: what else the weights depend on, such as the data set; a run of another context is
            not continued.
        optimizer: builds the optimiser of a network, such as `MuonAdamW()`; by default Adam. Its
            rates follow the same warm-up and decay, from the ones that it was built with.
        place: the processes that share the batch; by default this one alone.
        watch: looks at the averaged network now and then.
        trackers: told every number of the log.
        begun: told the first step, once what the folder holds is accepted as this run's.

    Raises:
        RunError: if too many losses are not finite, the folder holds a run with other settings, or
            the batch cannot be shared by the processes.
        SystemExit: with code 0, when SIGTERM came; the step was finished and saved.
    """
    weighty = {key: value for key, value in asdict(settings).items() if key not in HARMLESS}
    plan = {"name": name, **weighty, **(context or {})} | (
        {"optimizer": repr(optimizer)} if optimizer else {}
    )
    make = optimizer or (lambda net: torch.optim.Adam(net.parameters(), lr=settings.learning_rate))
    run = _Run(name, network, loss, settings, make, place or OneProcess(), folder, plan)
    run.journal = Journal(
        folder if run.place.rank == 0 else None, trackers if run.place.rank == 0 else ()
    )
    start = run.resume()
    if begun:
        begun(start)
    with _stopped_by(signal.SIGTERM) as stopping:
        for step in run.steps(start, batches, watch):
            if run.stopped(bool(stopping)):
                run.save(step + 1)
                raise SystemExit(0)
    return run.averaged()


class _Run:
    """Everything that changes while a network is trained."""

    def __init__(
        self,
        name: str,
        network: nn.Module,
        loss: StepLoss | Game,
        settings: LoopSettings,
        make: MakeOptimizer,
        place: Place,
        folder: Path | None,
        plan: Mapping[str, Any],
    ) -> None:
        self.name, self.loss, self.settings, self.place = name, loss, settings, place
        self.parts = place.range(settings.batch, settings.accumulate)
        self.result = copy.deepcopy(network)
        self.network, self.wrapped = network, place.wrap(network, sharded=True)
        self.optimizer = make(network)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.averages = {
            str(decay): _held(network) for decay in (settings.ema, *settings.more_emas)
        }
        self.game = loss if isinstance(loss, Game) else None
        if self.game:
            self.opponent = place.wrap(self.game.opponent)
            self.answering = self.game.optimizer(self.game.opponent)
        self.skipped = 0
        self.checkpoints = Checkpoints(folder, plan) if folder else None
        self.journal = Journal(None)

    # --- one step
    # ---------------------------------------------------------------------------------------------

    def steps(self, start: int, batches: Batches, watch: Watch | None) -> Iterator[int]:
        """Train from a step on, and yield each one that is done."""
        s = self.settings
        self.network.train()
        ranges = [
            (step * s.batch + a, step * s.batch + b)
            for step in range(start, s.steps)
            for a, b in self.parts
        ]
        ahead = Ahead(batches, s.seed, ranges)
        stream = iter(ahead)
        pace = 0.5 if sys.stderr.isatty() else LOGGED_PACE
        shown = {"mininterval": pace, "maxinterval": 20 * pace, "disable": self.place.rank > 0}
        began, waited, since = time.perf_counter(), 0.0, start
        with tqdm(
            range(start, s.steps), self.name, s.steps, initial=start, unit="step", **shown
        ) as bar:
            for step in bar:
                last = step + 1 == s.steps
                logged = step % s.log_every == 0 or last
                record = self.step(step, stream, logged)
                if logged:
                    seconds, began = time.perf_counter() - began, time.perf_counter()
                    each, since = seconds / (step + 1 - since), step + 1
                    speed = {"seconds": seconds, "waited": ahead.waited - waited}
                    speed |= {
                        "rows_a_second": s.batch / each,
                        "seconds_left": each * (s.steps - step - 1),
                    }
                    waited = ahead.waited
                    bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
                    self.journal.write({"name": self.name, "step": step, **record, **speed})
                if watch and ((step + 1) % watch.every == 0 or last):
                    self.look(step, watch)
                if (step + 1) % s.checkpoint_every == 0 or last:
                    self.save(step + 1)
                yield step
        stream.close() if hasattr(stream, "close") else None  # type: ignore[attr-defined]

    def step(self, step: int, stream: Iterator[Batch], logged: bool) -> dict[str, Any]:
        """Take one step of both players; returns what is logged of it."""
        s = self.settings
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * cosine_decay(step, s)
        self.optimizer.zero_grad(set_to_none=True)
        plays = self.game is not None and step >= self.game.start
        if self.game:
            self.answering.zero_grad(set_to_none=True)
        seen: list[tuple[Terms, dict[str, Tensor]]] = []
        for number, (first, last) in enumerate(self.parts):
            draws = Draws(s.seed, step, first, last, s.batch, self.place.device)
            torch.manual_seed(seed_of(s.seed, step, *((first,) if first else ())))
            batch = tuple(
                tensor.to(self.place.device, non_blocking=True) for tensor in next(stream)
            )
            closing = number + 1 == len(self.parts)
            terms = self.forward(batch, draws)
            seen.append((_detached(terms), terms.slopes() if logged else {}))
            self.backward(self.wrapped, terms.rows.mean() / len(self.parts), closing)
            if self.game and plays:
                with self.precision():
                    answer = self.game.answer(self.opponent, seen[-1][0], draws)
                self.backward(self.opponent, answer.float().mean() / len(self.parts), closing)
                seen[-1][0].raw["opponent"] = answer.detach().float()  # type: ignore[index]
        return self.update(step, seen, plays, logged)

    def forward(self, batch: Batch, draws: Draws) -> Terms:
        """Return the terms of some rows."""
        with self.precision():
            if not self.game:
                found = self.loss(self.wrapped, batch, draws)  # type: ignore[operator]
                return found if isinstance(found, Terms) else Terms({"loss": found})
            self.game.opponent.requires_grad_(False)
            try:
                return self.game.loss(self.wrapped, self.game.opponent, batch, draws)
            finally:
                _trained(self.game.opponent, self.answering)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context that networks are called in."""
        return torch.autocast(
            self.place.device.type, torch.bfloat16, enabled=self.settings.bfloat16
        )

    def backward(self, wrapped: nn.Module, value: Tensor, closing: bool) -> None:
        """Add to the gradients; the processes exchange them after the last part."""
        with contextlib.nullcontext() if closing else self.place.quiet(wrapped):
            value.backward()

    def update(
        self, step: int, seen: list[tuple[Terms, dict[str, Tensor]]], plays: bool, logged: bool
    ) -> dict[str, Any]:
        """Clip, step and average, or skip what is not finite."""
        s = self.settings
        rows = torch.cat([terms.rows.reshape(-1) for terms, _ in seen])
        norm = norm_of(self.network.parameters(), s.clip)
        value = float(self.place.mean(rows.mean()))
        other = (
            norm_of(self.game.opponent.parameters(), self.game.clip)
            if self.game and plays
            else norm.new_zeros(())
        )
        record: dict[str, Any] = {"loss": value, "gradient_norm": float(norm)}
        if not (
            math.isfinite(value) and math.isfinite(float(norm)) and math.isfinite(float(other))
        ):
            self.skip(step, value, float(norm), rows, seen)
        else:
            self.optimizer.step()
            for decay, held in self.averages.items():
                _average(held, self.network, min(float(decay), (step + 1) / (step + 10)))
            if self.game and plays:
                self.answering.step()
                record["opponent_norm"] = float(other)
        if logged:
            record |= {
                "rate": self.optimizer.param_groups[0]["lr"],
                "skipped": self.skipped,
                **self.details(seen),
            }
        return record

    def skip(self, step: int, value: float, norm: float, rows: Tensor, seen: list[Any]) -> None:
        """Count a step that is not finite, say where, and end the run after too many."""
        self.skipped += 1
        times = {k: torch.cat([terms.times[k] for terms, _ in seen]) for k in seen[0][0].times}
        every = {k: self.place.gather(v.contiguous()) for k, v in times.items()}
        bad = (~self.place.gather(rows.contiguous()).isfinite()).nonzero().flatten()[:3].tolist()
        where = "; ".join(
            ", ".join(f"{k} = {float(v[row]):.4g}" for k, v in every.items())
            for row in bad
            if every
        )
        text = f"the loss is {value} at step {step}, its gradient's norm {norm}" + (
            f", at {where}" if where else ""
        )
        self.journal.write({"name": self.name, "step": step, "skipped": self.skipped, "why": text})
        if self.skipped > self.settings.skips:
            raise RunError(
                f"{text}; {self.skipped} steps were not finite, more than skips = "
                f"{self.settings.skips}: lower learning_rate "
                f"= {self.settings.learning_rate}"
            )
        if self.place.rank == 0:
            warnings.warn(f"{text}; the step is skipped ({self.skipped} so far)", stacklevel=2)

    def details(self, seen: list[tuple[Terms, dict[str, Tensor]]]) -> dict[str, Any]:
        """Return the means of each part, raw and weighted, and the losses and slopes by bins of
        the times.
        """

        def joined(
            pick: Callable[[Terms, dict[str, Tensor]], Mapping[str, Tensor]],
        ) -> dict[str, Tensor]:
            picked = [pick(*both) for both in seen]
            return {
                k: self.place.gather(
                    torch.cat([one[k].detach().float().reshape(-1) for one in picked]).contiguous()
                )
                for k in picked[0]
            }

        weighted, raw = joined(lambda terms, _: terms.parts), joined(lambda terms, _: terms.raw)
        times, slopes = joined(lambda terms, _: terms.times), joined(lambda _, found: found)
        binned = raw or weighted
        return {
            "weighted": {k: float(v.mean()) for k, v in weighted.items()},
            "raw": {k: float(v.mean()) for k, v in raw.items()},
            "slopes": {k: float(v.mean()) for k, v in slopes.items()},
            "by": {
                time: {k: by_bins(v, at) for k, v in binned.items() if len(v) == len(at)}
                for time, at in times.items()
            },
            "slopes_by": {
                time: {k: by_bins(v, at) for k, v in slopes.items()} for time, at in times.items()
            },
        }

    # --- what is kept
    # ---------------------------------------------------------------------------------------------

    def averaged(self, number: int = 0) -> nn.Module:
        """Return a copy of the network with the averaged weights; all processes must call."""
        held = list(self.averages.values())[number]
        state = {name: whole(tensor) for name, tensor in self.network.state_dict().items()}
        state |= {name: whole(tensor) for name, tensor in held.items()}
        self.result.load_state_dict(state)
        return self.result.to(self.place.device).requires_grad_(False).eval()

    def look(self, step: int, watch: Watch) -> None:
        """Let the watch look, log what it says and keep the best."""
        averaged = self.averaged()
        found = dict(watch(step, averaged)) if self.place.rank == 0 else {}
        self.journal.write({"name": self.name, "step": step, "watch": found}) if found else None
        if self.checkpoints and "score" in found:
            self.checkpoints.keep_best(step + 1, averaged.state_dict(), found["score"])
        self.place.wait()

    def stopped(self, asked: bool) -> bool:
        """Whether any process was asked to stop."""
        if self.place.ranks == 1:
            return asked
        return bool(self.place.mean(torch.tensor(float(asked), device=self.place.device)) > 0)

    def save(self, step: int) -> None:
        """Write a checkpoint; all processes must call, the first one writes."""
        if not self.checkpoints:
            return
        tensors = self.pack()
        if self.place.rank == 0:
            self.checkpoints.save(step, tensors)
        self.place.wait()

    def pack(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "network": self.network.state_dict(),
            "optimizer": flatten_optimizer(self.optimizer, self.network),
            "run": {"skipped": torch.tensor(self.skipped)},
        }
        parts |= {f"ema-{decay}": held for decay, held in self.averages.items()}
        if self.game:
            parts["opponent"] = self.game.kept()
            parts["answering"] = flatten_optimizer(self.answering, self.game.opponent)
        return {
            f"{part}:{key}": whole(value)
            for part, tensors in parts.items()
            for key, value in tensors.items()
        }

    def resume(self) -> int:
        """Put back the latest checkpoint; returns the step that comes next."""
        found = self.checkpoints.latest() if self.checkpoints else None
        if found is None:
            return 0
        step, tensors = found
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            part, name = key.split(":", 1)
            parts.setdefault(part, {})[name] = value
        self.fill(self.network.state_dict(), parts["network"])
        restore_optimizer(self.optimizer, self.network, parts.get("optimizer", {}))
        for decay, held in self.averages.items():
            self.fill(held, parts[f"ema-{decay}"])
        if self.game:
            self.fill(self.game.kept(), parts["opponent"])
            restore_optimizer(self.answering, self.game.opponent, parts.get("answering", {}))
        self.skipped = int(parts["run"]["skipped"])
        return step

    def fill(self, state: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Copy saved tensors into those of the same names and shapes.

        Raises:
            RunError: if they are another network's.
        """
        others = sorted(
            {k for k in state.keys() & values.keys() if state[k].shape != values[k].shape}
            | (state.keys() ^ values.keys())
        )
        if others:
            where = self.checkpoints.folder if self.checkpoints else "the folder"
            raise RunError(
                f"{where} holds another network: {', '.join(others[:3])} differ ({len(others)} in "
                "all); choose another folder "
                "or delete it"
            )
        for name, tensor in state.items():
            put(tensor, values[name])


def _held(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


@torch.no_grad()
def _average(held: Mapping[str, Tensor], network: nn.Module, decay: float) -> None:
    for name, parameter in network.named_parameters():
        held[name].lerp_(parameter, 1 - decay)


def _detached(terms: Terms) -> Terms:
    """Return terms without their graph, so that a step's parts do not keep one another's in
    memory.
    """
    parts, raw, times = (
        {k: v.detach() for k, v in found.items()}
        for found in (terms.parts, terms.raw, terms.times)
    )
    return Terms(parts, raw, times, None, terms.shown)


def _trained(network: nn.Module, optimizer: Optimizer) -> None:
    """Ask for the gradients of what an optimiser holds, and of nothing else."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in network.parameters():
        parameter.requires_grad_(parameter in held)


@contextlib.contextmanager
def _stopped_by(number: int) -> Iterator[list[int]]:
    """Collect a signal instead of dying of it; in a thread other than the main one, leave it
    alone.
    """
    came: list[int] = []

    def note(which: int, frame: FrameType | None) -> None:
        came.append(which)

    try:
        before = signal.signal(number, note)
    except ValueError:
        yield came
        return
    try:
        yield came
    finally:
        signal.signal(number, before)
