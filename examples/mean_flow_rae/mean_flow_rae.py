"""MeanFlow on a representation autoencoder, in the paper's stages (arXiv 2511.13019).

    accelerate launch examples/mean_flow_rae/mean_flow_rae.py CONFIG [key=value ...] [OPTION ...]

CONFIG is a YAML file, such as examples/mean_flow_rae/configs/small.yaml. In a row are trained

    decoder          of the frozen encoder's features: RAE's stage 1
    flow_matching    the teacher, at uniform times that are shifted by sqrt(dim / 4096)
    mid_training     the average velocity between points of the teacher's trajectories
    distillation     MeanFlow with the teacher's velocity, by central differences
    fine_tuning      MeanFlow with the one-point velocity; optional
    scratch          the baseline: MeanFlow alone, for as many evaluations of the network

as far as the config has them. The same command continues a run that was stopped, in whichever
stage it was. ``--check`` builds everything without weights and sees that the shapes fit;
``--evaluate`` judges samples of one and of two evaluations; of a teacher alone, of teacher_steps.

A run's folder holds a folder of each stage (checkpoints, the log, samples), ``network/`` (what one
ships), ``scores.json`` and ``report.html``.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "common"))
from rae_settings import RAEConfig, check
from reading import as_dict, from_command_line, replaced, run_program

if __name__ == "__main__":
    CONFIG, OPTIONS = from_command_line(
        RAEConfig, __doc__, ("--check", "--evaluate"), check, Path("runs/mean_flow_rae")
    )

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import page
import torch
from accelerate import Accelerator
from central_difference import CentralDifference
from judging import digest, drawn, evaluate, extractors_of, plan_of
from loop import accelerator_of, check_processes, locked_by_first, steps_of
from pictures import LOOK_EVERY, images_of, in_range
from rae_report import evaluations_of, sampler_of, shipped_of, write_report
from rae_representation import check_shapes, encoded, representation
from rae_work import DROPPED, NOISE, STAGES, TIMES, Work
from stage import Losses, LossesOf
from torch import Tensor, nn

from flowspace import (
    Derivative,
    FlowMatchingLoss,
    MeanFlowDistillationLoss,
    MeanFlowLoss,
    Objective,
    RunError,
    SharedPrimal,
    ShiftedTimes,
    TimePairs,
    TrajectoryMatchingLoss,
)
from flowspace.training import Draws, KeyedPairs, share_of
from flowspace.vision import DiTDH
from flowspace.vision.data import Images
from flowspace.vision.encoders import LatentEncoder

SHEET = 80
"""Samples that are looked at when a stage ends."""


# --- stages 1 to 4: the objectives -------------------------------------------------------------


def no_teacher(z_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
    """Stand in for the teacher in stages that do not ask it."""
    raise RuntimeError("a stage without a teacher asked it")


def derivative_of(config: RAEConfig) -> Derivative:
    """Return the central difference, or the exact derivative."""
    if config.objectives.difference is None:
        return SharedPrimal()
    return CentralDifference(config.objectives.difference)


def objectives_of(config: RAEConfig, teacher: Any) -> dict[str, tuple[Objective, float]]:
    """Return the objective of each stage, and how often it evaluates a network for a row.

    Evaluations are forward passes: of the teacher, of the network with gradient, and of both
    sides of a difference or of the derivative beside it.
    """
    o, dim = config.objectives, config.dim
    pairs = o.pairs or o.steps * (o.steps + 1) // 2
    moving = 2.0
    if o.difference is None:
        moving = 1.0
    diagonal = TimePairs(ShiftedTimes(dim), equal=1.0, mask_first=True)
    flow = FlowMatchingLoss(times=diagonal)
    trajectories = TrajectoryMatchingLoss.published(
        dim,
        teacher=teacher,
        steps=o.steps,
        pairs=pairs,
        trajectories=None,  # as many as the batch has rows
    )
    derivative = derivative_of(config)
    taught = MeanFlowDistillationLoss.published(
        dim,
        teacher=teacher,
        times=TimePairs(ShiftedTimes(dim), equal=o.equal),
        mix=o.mix,
        derivative=derivative,
    )
    tuned = dataclasses.replace(taught, mix=0.0)
    scratch = MeanFlowLoss.published(derivative=derivative)
    off_diagonal = moving * (1 - o.equal)
    return {
        "flow_matching": (flow, 1),
        "mid_training": (trajectories, o.steps + pairs + 1),  # the first pair is seen twice
        "distillation": (taught, 1 + float(o.mix > 0) + off_diagonal),
        "fine_tuning": (tuned, 1 + off_diagonal),
        "scratch": (scratch, 1 + moving / 4),
    }


def latent_losses(
    objective: Objective, encoder: LatentEncoder, null: int, drop: float
) -> LossesOf:
    """Return the loss of an objective on a batch of latents, or of pictures that are encoded.

    Args:
        objective: draws its times by (seed, step, row).
        encoder: is not called where the batch brings latents.
        null: the label that stands in for those that are dropped.
        drop: the share of them.
    """
    drawn_times = not isinstance(objective, TrajectoryMatchingLoss)
    pairs = KeyedPairs(objective.times, TIMES)  # type: ignore[arg-type]
    if drawn_times:
        objective = dataclasses.replace(objective, times=pairs)

    def losses(network: nn.Module, batch: Sequence[Tensor], draws: Draws) -> Losses:
        z, labels = batch
        if z.dtype == torch.uint8:
            z = encoder.encode(in_range(z), check=draws.step % LOOK_EVERY == 0)
        if drop:
            dropped = draws.uniform((), DROPPED) < drop
            labels = torch.where(dropped, null, labels)
        pairs.draws = draws
        source = None
        if not drawn_times:
            source = draws.generator  # of the pairs of a trajectory's points
        noise = draws.normal(z.shape[1:], NOISE)
        out = objective(network, z, cond={"labels": labels}, noise=noise, generator=source)
        return Losses.of_flow(out, out.prediction)

    return losses


# --- the run -----------------------------------------------------------------------------------


def in_latents(
    work: Work, name: str, network: DiTDH, encoder: LatentEncoder, teacher: Any = no_teacher
) -> DiTDH:
    """Train a network of velocities or of average velocities as a stage says."""
    config, classes = work.config, work.classes
    objective, _ = objectives_of(config, teacher)[name]
    steps, drop = 1, 0.0
    if name == "flow_matching":
        steps = config.teacher_steps
        drop = config.objectives.drop_labels
    plan = plan_of(config, classes, config.latent, SHEET)

    def look(averaged: nn.Module) -> Tensor:
        draw = sampler_of(config, averaged, encoder, steps)
        return drawn(plan, draw, work.accelerator.device)

    return work.fit(
        name,
        network,
        latent_losses(objective, encoder, classes, drop),
        look=page.Sheets(config.out / name, classes, look),
        compiled=config.network.compile,
    )


def teacher_of(work: Work, encoder: LatentEncoder) -> DiTDH:
    """Return the frozen teacher: from its folder, or from the stage that trains it."""
    config = work.config
    if config.teacher is not None:
        teacher = DiTDH.from_pretrained(config.teacher)
    else:
        torch.manual_seed(config.training.seed)
        sizes = config.sizes(work.classes)
        network = DiTDH(**sizes, null_trained=config.objectives.drop_labels > 0)
        teacher = in_latents(work, "flow_matching", network, encoder)
    teacher.to(work.accelerator.device).requires_grad_(False).eval()  # type: ignore[arg-type]
    if config.network.compile:
        teacher.compile_blocks()
    return teacher


def students_of(work: Work, encoder: LatentEncoder, teacher: DiTDH) -> dict[str, DiTDH]:
    """Return the networks of average velocities by their stages, each begun where the one before
    it ended, the first from the teacher; the baseline from random weights.
    """
    found: dict[str, DiTDH] = {}
    torch.manual_seed(work.config.training.seed)  # of its new embedding, in a continued run too
    network = DiTDH.from_flow_matching(teacher)
    for name in ("mid_training", "distillation", "fine_tuning"):
        if getattr(work.config, name) is not None:
            found[name] = in_latents(work, name, network, encoder, teacher)
            network = copied(found[name])
    return found


def copied(network: DiTDH) -> DiTDH:
    """Return a copy that is trained."""
    return copy.deepcopy(network).requires_grad_(True).train()


def with_baseline(config: RAEConfig, count: int) -> RAEConfig:
    """Return the config with as many steps of the baseline as have the evaluations of all stages
    in latents, where it does not say how many.

    Args:
        config: of the run.
        count: pictures.
    """
    scratch = config.scratch
    if scratch is None or scratch.steps is not None or scratch.epochs is not None:
        return config
    objectives = objectives_of(config, no_teacher)
    total = 0.0
    for name in STAGES[1:-1]:
        stage = getattr(config, name)
        if stage is None:
            continue
        t = stage.over(config.training, 0)
        _, evaluations = objectives[name]
        total += steps_of(t, count) * t.batch * evaluations
    _, evaluations = objectives["scratch"]
    batch = scratch.over(config.training, 0).batch
    steps = round(total / (batch * evaluations))
    return replaced(config, scratch={"steps": steps})


def main(config: RAEConfig, options: Sequence[str] = ()) -> None:
    """Train what is left to train; leave the network and the page."""
    if "--check" in options:
        check_shapes(config)
        return
    accelerator = accelerator_of(config.training, config.out, as_dict(config))
    check_processes(config.training, accelerator, "examples/mean_flow_rae/mean_flow_rae.py")
    images = images_of(config.data, config.out.parent)
    config = with_baseline(config, len(images))
    check_early(config, accelerator, images, "--evaluate" in options)
    sizes = config.sizes(len(images.names))
    work = Work(config, accelerator, images, images)
    with locked_by_first(config.out, accelerator):
        encoder = representation(work)
        if config.representation.cached:
            work.rows = encoded(work, encoder)
        teacher = teacher_of(work, encoder)
        networks = {"flow_matching": teacher} | students_of(work, encoder, teacher)
        if config.scratch is not None:
            torch.manual_seed(config.training.seed)
            network = DiTDH(**sizes, average=True)
            networks["scratch"] = in_latents(work, "scratch", network, encoder)
        shipped = shipped_of(networks)
        if accelerator.is_main_process:
            networks[shipped].save_pretrained(config.out / "network")
        if "--evaluate" in options:
            judge_samples(work, shipped, networks[shipped], encoder)
        if accelerator.is_main_process:
            path = write_report(config, images, networks, encoder)
            print(f"finished; the page of the run: {path}")
        accelerator.wait_for_everyone()


def check_early(config: RAEConfig, accelerator: Accelerator, images: Images, judged: bool) -> None:
    """See that batches and the teacher fit and the judge's weights are there, before a step of
    any stage is paid for.

    Raises:
        RunError: if a batch is larger than the pictures or cannot be shared out, or weights are
            missing.
        InputError: if the teacher has other sizes than the config.
    """
    for name in STAGES:
        if getattr(config, name) is not None:
            check_batch(config, name, accelerator, len(images))
    if config.teacher is not None:
        DiTDH.from_flow_matching(config.teacher, **config.sizes(len(images.names)))
    if judged:
        extractors_of(config, accelerator.device)


def check_batch(config: RAEConfig, name: str, accelerator: Accelerator, count: int) -> None:
    """See that the batch of a stage is not larger than the pictures, and can be shared out.

    Raises:
        RunError: if it is not.
    """
    stage = getattr(config, name)
    t = stage.over(config.training, 0)
    if t.batch > count:
        key = f"{name}.batch"
        if stage.batch is None:
            key = "training.batch"
        raise RunError(
            f"got {key} = {t.batch} for {count} pictures; write a batch that is not larger"
        )
    share_of(t.batch, accelerator.process_index, accelerator.num_processes, t.accumulate)


def judge_samples(work: Work, name: str, network: DiTDH, encoder: LatentEncoder) -> None:
    """Draw and judge as many samples of a stage's network as the config says."""
    config = work.config
    for steps in evaluations_of(config, name):
        own = dataclasses.replace(config, out=config.out / f"evaluations-{steps}")
        draw = sampler_of(config, network, encoder, steps)
        plan = plan_of(own, work.classes, config.latent)
        evaluate(own, plan, draw, digest(network), work.accelerator)


if __name__ == "__main__":
    run_program(functools.partial(main, CONFIG, OPTIONS))
