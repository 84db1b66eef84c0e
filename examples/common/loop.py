"""What surrounds the loop of a training, over accelerate: rows, rates, logs, checkpoints, looks.

The loop itself, with the losses and backward, is each program's own, `fit`: it stands within
`training`, which begins or goes on. Everything random in a step follows from (seed, step, row),
so a run that was stopped goes on as if it had not been, also with another number of processes.
"""

import contextlib
import datetime
import functools
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import journal
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from journal import Log
from profiling import Profile, span
from safetensors.torch import save_file
from sections import TrainingConfig
from stage import Losses, Stage
from state import Run
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from flowspace import RunError
from flowspace.training import (
    BatchRows,
    Draws,
    KeyedRows,
    MuonAdamW,
    PlainAdamW,
    in_its_own_group,
    locked,
    stopped_by_sigterm,
)

__all__ = [
    "Training",
    "accelerator_of",
    "check_processes",
    "locked_by_first",
    "optimizer_of",
    "rate",
    "steps_of",
    "training",
]

LONGEST_WAIT = datetime.timedelta(hours=1)
"""What the processes wait for the first one: it makes the features of a million pictures alone."""


# --- the processes -----------------------------------------------------------------------------


def accelerator_of(
    t: TrainingConfig, folder: Path, settings: Mapping[str, Any] | None = None
) -> Accelerator:
    """Return the processes that ``accelerate launch`` or ``torchrun`` started; one otherwise.

    Args:
        t: says the precision, the device and the trackers.
        folder: of the run, where trackers write.
        settings: of the run, which trackers are told.
    """
    precision = "no"
    if t.bfloat16:
        precision = "bf16"
    trackers: list[Any] = [name for name in ("tensorboard", "wandb") if getattr(t, name)]
    accelerator = Accelerator(
        cpu=t.cpu or not torch.cuda.is_available(),
        mixed_precision=precision,
        log_with=trackers or None,
        project_dir=folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32, on a GPU
    if trackers:
        accelerator.init_trackers("flowspace", journal.texts(settings or {}))
    return accelerator


def check_processes(t: TrainingConfig, accelerator: Accelerator, program: str) -> None:
    """See that there are as many processes as the settings expect.

    Raises:
        RunError: if there are not.
    """
    count = accelerator.num_processes
    if t.processes not in (None, count):
        raise RunError(
            f"got {count} process(es), training.processes = {t.processes} are expected; "
            f"write: torchrun --nproc_per_node N {program} ..."
        )


def locked_by_first(folder: Path, accelerator: Accelerator) -> AbstractContextManager[Any]:
    """Return a context in which the first process holds the folder of a run against other runs."""
    if accelerator.is_main_process:
        return locked(folder)
    return contextlib.nullcontext()


# --- rates, rows -------------------------------------------------------------------------------


def optimizer_of(t: TrainingConfig) -> MuonAdamW | PlainAdamW:
    """Return what builds the optimiser of a network."""
    kind: type[MuonAdamW] | type[PlainAdamW] = PlainAdamW
    if t.optimizer == "muon":
        kind = MuonAdamW
    if t.betas is None:
        return kind(t.learning_rate, t.weight_decay)
    return kind(t.learning_rate, t.weight_decay, t.betas)


def steps_of(t: TrainingConfig, count: int) -> int:
    """Return how many steps a training on so many pictures takes."""
    return t.steps or math.ceil(t.epochs * count / t.batch)


def rate(step: int, t: TrainingConfig, count: int) -> float:
    """Return the factor of the learning rate: a linear rise, then half a cosine down, or a line.

    Args:
        step: from 0 on.
        t: whose ``final_rate`` is what is left at the end; 1 keeps the rate. Where it says
            ``decay_epochs``, the rate falls linearly between them.
        count: pictures, for the length of an epoch.
    """
    warmup = round(t.warmup_epochs * count / t.batch)
    if step < warmup:
        return (step + 1) / warmup
    if t.decay_epochs is not None:
        first, last = t.decay_epochs
        each = t.batch / count
        progress = (step * each - first) / max(last - first, each)
        return 1 - (1 - t.final_rate) * min(1.0, max(0.0, progress))
    falling = max(1, steps_of(t, count) - warmup)
    progress = min(1.0, (step - warmup) / falling)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return t.final_rate + (1 - t.final_rate) * cosine


# --- a training --------------------------------------------------------------------------------


@contextlib.contextmanager
def training(
    stage: Stage, accelerator: Accelerator, profile: Profile | None = None
) -> Iterator["Training"]:
    """Begin a training, or go on with it; its loop is what stands in this context.

    However the loop ends, the bar is closed, readers are stopped, and SIGTERM is as before.

    Args:
        stage: says what is trained.
        accelerator: of the processes.
        profile: of a few steps, of which nothing is then logged or saved.

    Raises:
        RunError: if too many steps were not finite, or the folder holds a run of other settings.
        SystemExit: with code 0, when SIGTERM came; the step was finished and saved.
    """
    run = Training(stage, accelerator, profile)
    with stopped_by_sigterm() as run.signals, run.log.bar, contextlib.closing(run.stream):
        yield run


class Training(Run):
    """A run as the loop of a program sees it.

    Attributes:
        log: of the run.
        stream: yields the rows of each part of a batch.
        signals: that came; the run ends with the step that is taken.
        logged: whether this step is.
        closing: whether a part of its batch is the last one.
    """

    def __init__(self, stage: Stage, accelerator: Accelerator, profile: Profile | None) -> None:
        t = stage.training
        count = len(stage.rows)
        steps = steps_of(t, count)
        super().__init__(stage, accelerator)
        start = self.resume()
        if stage.begun and accelerator.is_main_process:
            stage.begun()
        if profile is not None:
            steps = start + profile.steps
            profile.first = start
        self.profile = profile
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        factor = functools.partial(rate, t=t, count=count)
        self.schedule = LambdaLR(self.optimizer, factor, last_epoch=start - 1)
        loader = DataLoader(
            KeyedRows(stage.rows, t.seed, stage.flip),
            batch_sampler=BatchRows(start, steps, t.batch, self.shares),
            num_workers=stage.workers,
            pin_memory=accelerator.device.type == "cuda",
            worker_init_fn=in_its_own_group,
        )
        stage.network.train()
        self.log = Log(stage, accelerator, start, steps)
        self.stream = self.log.timed(loader)
        self.signals: list[int] = []
        self.logged = False
        self.closing = True
        if start:
            self.look(start)  # unless it was, before the run was stopped

    def steps(self) -> Iterator[int]:
        """Yield each step; before the next one what it left is written down, saved, looked at."""
        t = self.stage.training
        for step in self.log.bar:
            self.step = step
            asked = step % t.log_every == 0 or step + 1 == self.log.steps
            self.logged = self.profile is None and asked
            with self.profile or contextlib.nullcontext():
                yield step
            self.schedule.step()
            if self.profile is None:
                self.keep()

    def parts(self) -> Iterator[tuple[list[Tensor], Draws]]:
        """Yield the rows of each part of a batch that this process takes, and their draws."""
        t = self.stage.training
        device = self.accelerator.device
        for number, (first, last) in enumerate(self.shares):
            draws = Draws(t.seed, self.step, first, last, t.batch, device)
            torch.manual_seed(draws.seed_of_rows)
            with span("data"):
                batch = [rows.to(device, non_blocking=True) for rows in next(self.stream)]
            self.closing = number + 1 == len(self.shares)
            yield batch, draws

    def exchanged(self, network: Any) -> AbstractContextManager[Any]:
        """Return the context of a part of a batch: gradients are exchanged after the last one.

        DDP decides it in the forward pass, FSDP2 by a switch.
        """
        if hasattr(network, "set_requires_gradient_sync"):
            network.set_requires_gradient_sync(self.closing)
        elif not self.closing:
            return self.accelerator.no_sync(network)
        return contextlib.nullcontext()

    def measure(self, cost: Losses, loss: Tensor) -> None:
        """Keep what some rows cost, for the log and `update`, before their backward pass.

        Args:
            cost: its terms, each of which is logged with its gradient.
            loss: what is trained, of each row ``(B,)``.
        """
        self.costs.append((loss.detach(), cost.times))
        if self.logged:
            self.log.measure(cost)

    def measure_answer(self, answer: Tensor) -> None:
        """Keep the discriminator's loss of some rows ``(B,)`` for the log."""
        if self.logged:
            self.log.answers.append(answer.detach().float())

    def keep(self) -> None:
        """Write down, save and look at what a step left, as far as its number asks for it."""
        t = self.stage.training
        done = self.step + 1
        if self.logged or self.accelerator.device.type == "cpu":
            self.check_finite()
        if self.logged:
            self.log.write(self.step, self)
        stopping = self.asked_to_stop(self.signals)
        if done % t.checkpoint_every == 0 or done == self.log.steps or stopping:
            self.save(done)
        if stopping:
            raise SystemExit(0)
        self.look(done)

    def look(self, done: int) -> None:
        """Let the stage look at the averaged network, log what it says, and keep it if asked.

        It looks every so many steps and at the end; a look that was is not repeated.

        Args:
            done: how many steps were taken.
        """
        stage = self.stage
        accelerator = self.accelerator
        asked = done % stage.training.look_every == 0 or done == self.log.steps
        if stage.look is None or not asked:
            return
        averaged = self.averaged()
        if accelerator.is_main_process and not stage.look.was(done):
            found = dict(stage.look(done, averaged))
            if found:
                record = {"name": stage.name, "step": done - 1, "watch": found}
                journal.append(stage.folder, record)
                journal.track(stage, accelerator, found, done)
            if stage.training.snapshots:
                snapshot(stage.folder, done, averaged)
        accelerator.wait_for_everyone()


def snapshot(folder: Path, step: int, network: nn.Module) -> None:
    """Keep averaged weights of a step, for numbers over training."""
    path = folder / f"average-{step:08d}.safetensors"
    partial = path.with_suffix(".partial")
    tensors = {}
    for name, value in network.state_dict().items():
        tensors[name] = value.cpu().contiguous()
    save_file(tensors, partial)
    os.replace(partial, path)
