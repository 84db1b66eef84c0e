"""The loop of a training, over accelerate: steps, logs, checkpoints, looks.

A program says what it trains, as a `Stage`, and calls `fit`. Everything random in a step follows
from (seed, step, row), so a run that was stopped goes on as if it had not been, also with another
number of processes.
"""

import contextlib
import datetime
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
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
from stage import Stage
from state import Run
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
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
    whole,
)

__all__ = [
    "accelerator_of",
    "check_processes",
    "fit",
    "locked_by_first",
    "optimizer_of",
    "rate",
    "steps_of",
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
    trackers: list[Any] = []
    for name in ("tensorboard", "wandb"):
        if getattr(t, name):
            trackers.append(name)
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


# --- a step ------------------------------------------------------------------------------------


def take(run: Run, step: int, stream: Iterator[Sequence[Tensor]], log: Log, logged: bool) -> None:
    """Take one step: the losses of this process's rows, their gradients, the update."""
    stage = run.stage
    accelerator = run.accelerator
    t = stage.training
    run.step = step
    run.optimizer.zero_grad(set_to_none=True)
    if stage.adversary:
        stage.adversary.optimizer.zero_grad(set_to_none=True)
    costs = []
    for number, (first, last) in enumerate(run.shares):
        draws = Draws(t.seed, step, first, last, t.batch, accelerator.device)
        torch.manual_seed(draws.seed_of_rows)
        with span("data"):
            batch = []
            for rows in next(stream):
                batch.append(rows.to(accelerator.device, non_blocking=True))
        closing = number + 1 == len(run.shares)
        with exchanged(run, run.network, closing):
            with accelerator.autocast():
                cost = stage.losses(run.network, batch, draws)
            if logged:
                log.measure(cost)
            backward(run, cost.rows)
        if stage.adversary and stage.adversary.plays(step):
            made, real = cost.shown()
            with exchanged(run, stage.adversary.wrapped, closing):
                with span("adversarial"), accelerator.autocast():
                    answer = stage.adversary.answer(real, made, draws)
                backward(run, answer.float())
            if logged:
                log.answers.append(answer.detach().float())
        costs.append((cost.rows.detach(), cost.times))
    with span("optimiser"):
        update(run, costs)


def exchanged(run: Run, network: Any, closing: bool) -> AbstractContextManager[Any]:
    """Return the context of a part of a batch: gradients are exchanged after the last one.

    DDP decides it in the forward pass, FSDP2 by a switch.
    """
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(closing)
    elif not closing:
        return run.accelerator.no_sync(network)
    return contextlib.nullcontext()


def backward(run: Run, rows: Tensor) -> None:
    """Add the gradient of the mean of some rows, as a part of the batch's."""
    with span("backward"):
        run.accelerator.backward(rows.mean() / len(run.shares))


def update(run: Run, costs: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> None:
    """Step both players and the averages, unless a loss or a gradient is not finite.

    The device decides, and nothing waits for it: what is not finite changes nothing, and is
    read with the log.
    """
    parameters = list(run.stage.network.parameters())
    players: list[Any] = [(run.optimizer, parameters, run.stage.training.clip)]
    adversary = run.stage.adversary
    if adversary and adversary.plays(run.step):
        players.append((adversary.optimizer, adversary.heads, 1.0))
    run.norms = []
    for _, held, clip in players:
        norm = clip_grad_norm_(held, clip)
        run.norms.append(whole(norm))
    rows = torch.cat([cost for cost, _ in costs])
    mean: Any = run.accelerator.reduce(rows.mean(), "mean")
    run.loss = mean
    judged = torch.stack([run.loss, *run.norms])
    run.finite = judged.isfinite().all().float()
    for optimizer, _, _ in players:
        optimizer.found_inf = 1 - run.finite
        optimizer.step()
    run.average()
    run.skipped += 1 - run.finite.long()
    times = {}
    for name in costs[0][1]:
        times[name] = torch.cat([of_part[name] for _, of_part in costs])
    run.note(rows, times)


# --- a training --------------------------------------------------------------------------------


def fit(stage: Stage, accelerator: Accelerator, profile: Profile | None = None) -> nn.Module:
    """Train a network in place and return its averaged copy, in eval mode.

    Raises:
        RunError: if too many steps were not finite, or the folder holds a run of other settings.
        SystemExit: with code 0, when SIGTERM came; the step was finished and saved.
    """
    t = stage.training
    count = len(stage.rows)
    steps = steps_of(t, count)
    run = Run(stage, accelerator)
    start = run.resume()
    if stage.begun and accelerator.is_main_process:
        stage.begun()
    if profile is not None:
        steps = start + profile.steps
        profile.first = start
    for group in run.optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    factor = functools.partial(rate, t=t, count=count)
    schedule = LambdaLR(run.optimizer, factor, last_epoch=start - 1)
    loader = DataLoader(
        KeyedRows(stage.rows, t.seed, stage.flip),
        batch_sampler=BatchRows(start, steps, t.batch, run.shares),
        num_workers=stage.workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=in_its_own_group,
    )
    stage.network.train()
    log = Log(stage, accelerator, start, steps)
    stream = log.timed(loader)
    if start:
        look(run, start, steps)  # unless it was, before the run was stopped
    with stopped_by_sigterm() as signals, log.bar as bar:
        for step in bar:
            asked = step % t.log_every == 0 or step + 1 == steps
            logged = profile is None and asked
            with profile or contextlib.nullcontext():
                take(run, step, stream, log, logged)
            schedule.step()
            if profile is None:
                keep(run, log, logged, signals)
    return run.averaged()


def keep(run: Run, log: Log, logged: bool, signals: Sequence[int]) -> None:
    """Write down, save and look at what a step left, as far as its number asks for it."""
    t = run.stage.training
    done = run.step + 1
    if logged or run.accelerator.device.type == "cpu":
        run.check_finite()
    if logged:
        log.write(run.step, run)
    stopping = run.asked_to_stop(signals)
    if done % t.checkpoint_every == 0 or done == log.steps or stopping:
        run.save(done)
    if stopping:
        raise SystemExit(0)
    look(run, done, log.steps)


def look(run: Run, done: int, steps: int) -> None:
    """Let the stage look at the averaged network, log what it says, and keep it if asked.

    Args:
        run: that is looked at, at every so many steps and at the end.
        done: how many steps were taken; a look that was is not repeated.
        steps: of the whole training.
    """
    stage = run.stage
    accelerator = run.accelerator
    asked = done % stage.training.look_every == 0 or done == steps
    if stage.look is None or not asked:
        return
    averaged = run.averaged()
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
