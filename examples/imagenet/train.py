"""Train a generator from noisy latents to images; leave a pipeline one can ship, and a page.

    accelerate launch examples/imagenet/train.py CONFIG [key=value ...] [--evaluate] [--profile]

CONFIG is a YAML file, such as examples/imagenet/configs/smoke.yaml. The same command continues a
run that was stopped, also with another number of processes: everything random in a step follows
from (seed, step, row). With more steps it continues a run that was finished. ``--evaluate`` judges
the run at its end; ``--profile`` measures a few steps and says where their time goes.

A run's folder holds ``config.json``, ``encoder/`` (where stage 1 was trained on the spot),
``generator/`` (checkpoints, the log, pictures), ``pipeline/`` (what one ships), ``samples/``,
``metrics.json`` and ``report.html``.
"""

# settings are refused before torch is imported, which takes seconds
import settings

if __name__ == "__main__":
    CONFIG, OPTIONS = settings.from_command_line(__doc__, ("--evaluate", "--profile"))

import contextlib
import dataclasses
import datetime
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import build
import journal
import report
import ship
import stage_one
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from journal import Log
from profiling import Profile, span
from settings import Config
from stage import Losses, LossesOf, Stage
from state import Run
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from flowspace import RunError
from flowspace.training import (
    AdversarialStep,
    BatchRows,
    Draws,
    KeyedPairs,
    KeyedRows,
    in_its_own_group,
    locked,
    share_of,
    stopped_by_sigterm,
    whole,
)
from flowspace.vision.adversarial import balance
from flowspace.vision.encoders import LatentEncoder
from flowspace.vision.perceptual import literal_pair

LONGEST_WAIT = datetime.timedelta(hours=1)
"""What the processes wait for the first one: it makes the features of a million pictures alone."""

NOISE, TIMES, DROPPED = range(3)
"""Streams of the draws of a step."""


def main(config: Config, options: Sequence[str] = ()) -> None:
    """Train what is left to train; leave the pipeline, the samples and the page."""
    accelerator = accelerator_of(config)
    first, count = accelerator.is_main_process, accelerator.num_processes
    if config.training.processes not in (None, count):
        raise RunError(
            f"got {count} process(es), training.processes = {config.training.processes} are "
            "expected; write: torchrun --nproc_per_node N examples/imagenet/train.py ..."
        )
    with locked(config.out) if first else contextlib.nullcontext():
        profile = Profile(config, accelerator) if "--profile" in options else None
        fit(prepared(config, accelerator, "--evaluate" in options), accelerator, profile)
        if profile is not None:
            return
        if first:
            ship.pipeline(config)
        accelerator.wait_for_everyone()
        if "--evaluate" in options:
            ship.evaluate(config, accelerator)
        if first:
            print(f"finished; the page of the run: {report.write(config)}")
        accelerator.wait_for_everyone()


def accelerator_of(config: Config) -> Accelerator:
    """Return the processes that ``accelerate launch`` or ``torchrun`` started; one otherwise."""
    t = config.training
    trackers = [name for name in ("tensorboard", "wandb") if getattr(t, name)]
    accelerator = Accelerator(
        cpu=t.cpu or not torch.cuda.is_available(),
        mixed_precision="bf16" if t.bfloat16 else "no",
        log_with=trackers or None,
        project_dir=config.out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32, on a GPU
    if trackers:
        accelerator.init_trackers("flowspace", journal.texts(config.as_dict()))
    return accelerator


# --- what is trained ---------------------------------------------------------------------------


def prepared(config: Config, accelerator: Accelerator, judged: bool = False) -> Stage:
    """Return the generator's training; stage 1 is trained first where the config asks for it.

    Everything that can be refused is refused before a step of either is paid for.

    Args:
        config: of the run.
        accelerator: of its processes.
        judged: whether the run will be judged, for which the judge's weights are needed.
    """
    device, rank = accelerator.device, accelerator.process_index
    if config.generator.compile:  # the log asks for each term's gradient before their sum's
        torch._functorch.config.donated_buffer = False
    images = build.images_of(config)
    rows = build.rows_of(config, images)
    share_of(config.training.batch, rank, accelerator.num_processes, config.training.accumulate)
    optimizer = build.optimizer_of(config.training)
    network = build.generator_of(config, len(images.names))
    if config.encoder.stage_one:
        stage_one.check_fit(config, stage_one.shape_of(config))
    if judged or config.evaluation.extractor != "inception":
        build.extractor_of(config, device)
    perceptual = build.perceptual_of(config, config.perceptual, device)
    adversary = None
    if config.adversarial:
        adversary = build.adversary_of(
            config, config.adversarial, device, accelerator.prepare_model
        )
    if accelerator.is_main_process:
        print(images.report())
    train_stage_one = functools.partial(fit, accelerator=accelerator)
    encoder = stage_one.encoder_of(config, images, accelerator, train_stage_one)
    one = build.in_range(images.row(0)[0][None].to(device))
    stage_one.check_fit(config, tuple(encoder.encode(one).shape[1:]))
    build.check_latents(rows, images, encoder)
    return Stage(
        "generator",
        network,
        generator_losses(config, encoder, perceptual, adversary, len(images.names)),
        rows,
        config.training,
        config.out / "generator",
        optimizer,
        depends=depends_on(
            config, "data", "encoder", "generator", "objective", "perceptual", "adversarial"
        ),
        flip=config.data.flip,
        workers=config.data.workers,
        adversary=adversary,
        look=report.Look(config, images, encoder, device),
        begun=functools.partial(report.keep_config, config),
        compiled=config.generator.compile,
    )


def depends_on(config: Config, *sections: str) -> dict[str, Any]:
    """Return the sections of a config that weights depend on."""
    found = config.as_dict()
    for section, name in (("data", "workers"), ("generator", "compile")):
        found[section].pop(name)
    return {name: found[name] for name in sections}


def generator_losses(
    config: Config,
    encoder: LatentEncoder,
    perceptual: Mapping[str, build.PerceptualTerm],
    adversary: AdversarialStep | None,
    null: int,
) -> LossesOf:
    """Return the losses of a generator: the flow, perceptual distances, the discriminator.

    Args:
        config: of the run.
        encoder: frozen; not called where the batch brings latents.
        perceptual: by name.
        adversary: None where there is none.
        null: the label of no class, which stands in for dropped labels.
    """
    estimate = encoder.encode_prediction if config.objective.estimated else None
    objective = build.objective_of(config, estimate)
    pairs = KeyedPairs(objective.times, TIMES)
    objective = dataclasses.replace(objective, times=pairs)
    drop, across = config.objective.drop_labels, config.generator.space == "image"

    def losses(network: nn.Module, batch: Sequence[Tensor], draws: Draws) -> Losses:
        *latents, pixels, labels = batch
        images = build.in_range(pixels)
        with span("encoder"):
            z = latents[0].float() if latents else encoder.encode(images)
        noise = draws.normal(z.shape[1:], NOISE)
        if drop:
            dropped = draws.uniform((), DROPPED) < drop
            labels = torch.where(dropped, null, labels)
        pairs.draws = draws
        cond = {"labels": labels}
        with span("flow"):
            out = objective(network, z, images if across else None, cond=cond, noise=noise)
        terms: dict[str, Tensor] = {"flow": out.loss}
        weights: dict[str, float | Tensor] = {"flow": 1.0}
        for name, term in perceptual.items():
            pair = (out.prediction, out.target)
            if term.literal:
                pair = literal_pair(objective, out, images, term.largest_step)
            with span("perceptual"):
                terms[name], weights[name] = term.loss(*pair, out.t), term.weight
        cost = Losses(terms, weights, {"t": out.t, "s": out.s}, out.prediction, images)
        if adversary is not None:
            with span("adversarial"):
                hear(adversary, cost, config.adversarial, draws)
        return cost

    return losses


def hear(
    adversary: AdversarialStep, cost: Losses, a: settings.AdversarialConfig, draws: Draws
) -> None:
    """Add the discriminator's opinion to the losses, weighed by w(t), once it was trained."""
    opinion = adversary.opinion(cost.made, draws)
    if opinion is None:
        return
    weight: float | Tensor = a.weight
    if a.adaptive:
        weight = a.weight * balance(cost.rows, opinion, cost.made)
    cost.terms["adversarial"] = adversary.loss.weight(cost.times["t"]) * opinion.float()
    cost.weights["adversarial"] = weight


# --- the loop ----------------------------------------------------------------------------------


def take(run: Run, step: int, stream: Iterator[Sequence[Tensor]], log: Log, logged: bool) -> None:
    """Take one step: the losses of this process's rows, their gradients, the update."""
    stage, t, accelerator = run.stage, run.stage.training, run.accelerator
    run.step = step
    run.optimizer.zero_grad(set_to_none=True)
    if stage.adversary:
        stage.adversary.optimizer.zero_grad(set_to_none=True)
    costs = []
    for number, (first, last) in enumerate(run.shares):
        draws = Draws(t.seed, step, first, last, t.batch, accelerator.device)
        torch.manual_seed(draws.seed_of_rows)
        with span("data"):
            batch = [rows.to(accelerator.device, non_blocking=True) for rows in next(stream)]
        closing = number + 1 == len(run.shares)
        with exchanged(run, run.network, closing):
            with accelerator.autocast():
                cost = stage.losses(run.network, batch, draws)
            if logged:
                log.measure(cost)
            backward(run, cost.rows)
        if stage.adversary and stage.adversary.plays(step):
            with exchanged(run, stage.adversary.wrapped, closing):
                with accelerator.autocast():
                    answer = stage.adversary.answer(cost.real, cost.made, draws)
                backward(run, answer.float())
            if logged:
                log.answers.append(answer.detach().float())
        costs.append((cost.rows.detach(), cost.times))
    with span("optimiser"):
        update(run, costs)


def exchanged(run: Run, network: nn.Module, closing: bool) -> AbstractContextManager[Any]:
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
    players = [(run.optimizer, list(run.stage.network.parameters()), run.stage.training.clip)]
    adversary = run.stage.adversary
    if adversary and adversary.plays(run.step):
        players.append((adversary.optimizer, adversary.heads, 1.0))
    run.norms = [whole(clip_grad_norm_(held, clip)) for _, held, clip in players]
    rows = torch.cat([cost for cost, _ in costs])
    run.loss = run.accelerator.reduce(rows.mean(), "mean")
    run.finite = torch.stack([run.loss, *run.norms]).isfinite().all().float()
    for optimizer, _, _ in players:
        optimizer.found_inf = 1 - run.finite
        optimizer.step()
    run.average()
    run.skipped += 1 - run.finite.long()
    run.note(rows, {k: torch.cat([times[k] for _, times in costs]) for k in costs[0][1]})


def fit(stage: Stage, accelerator: Accelerator, profile: Profile | None = None) -> nn.Module:
    """Train a network in place and return its averaged copy, in eval mode.

    Raises:
        RunError: if too many steps were not finite, or the folder holds a run of other settings.
        SystemExit: with code 0, when SIGTERM came; the step was finished and saved.
    """
    t, count = stage.training, len(stage.rows)
    steps = build.steps_of(t, count)
    run = Run(stage, accelerator)
    start = run.resume()
    if stage.begun and accelerator.is_main_process:
        stage.begun()
    if profile is not None:
        steps = start + profile.steps
        profile.first = start
    for group in run.optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    factor = functools.partial(build.rate, t=t, count=count)
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
            logged = profile is None and (step % t.log_every == 0 or step + 1 == steps)
            with profile or contextlib.nullcontext():
                take(run, step, stream, log, logged)
            schedule.step()
            if profile is None:
                keep(run, log, logged, signals)
    return run.averaged()


def keep(run: Run, log: Log, logged: bool, signals: Sequence[int]) -> None:
    """Write down, save and look at what a step left, as far as its number asks for it."""
    t, done = run.stage.training, run.step + 1
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
    stage, accelerator = run.stage, run.accelerator
    if stage.look is None or (done % stage.training.look_every and done != steps):
        return
    averaged = run.averaged()
    if accelerator.is_main_process and not stage.look.was(done):
        found = dict(stage.look(done, averaged))
        if found:
            journal.append(stage.folder, {"name": stage.name, "step": done - 1, "watch": found})
            accelerator.log(journal.flat(found), done)
        if stage.training.snapshots:
            ship.snapshot(stage.folder, done, averaged)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    settings.run_program(functools.partial(main, CONFIG, OPTIONS))
