"""The parts of a run, each built from its settings."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from judging import Sampler
from pictures import images_of as pictures_of
from settings import ImageNetConfig
from torch import Tensor, nn

from flowspace import (
    AbsoluteError,
    ConsistencyLoss,
    CrossFlowLoss,
    FlowMatchingLoss,
    HuberError,
    ImprovedMeanFlowLoss,
    InputError,
    MeanFlowLoss,
    Objective,
    RunError,
    Schedule,
    ShiftedTimes,
    SquaredError,
    TimePairs,
    UniformTimes,
)
from flowspace.solvers import Heun, VelocityFlow
from flowspace.times import ToDataTimes
from flowspace.training import Rows
from flowspace.vision.data import Images
from flowspace.vision.encoders import LatentEncoder
from flowspace.vision.generator import PRESETS, CrossFlowGenerator
from flowspace.vision.latents import LatentImages, fingerprint

PENALTIES = {"absolute": AbsoluteError, "squared": SquaredError, "huber": HuberError}


# --- pictures ----------------------------------------------------------------------------------


def images_of(config: ImageNetConfig) -> Images:
    """Return the pictures of a run; ``emoji`` draws them first."""
    return pictures_of(config.data, config.out.parent)


def check_latents(rows: Rows, images: Images, encoder: LatentEncoder) -> None:
    """See that latents that were encoded before are of these pictures, by this encoder.

    Raises:
        RunError: if they are not.
    """
    if not isinstance(rows, LatentImages):
        return
    for name, value in fingerprint(images, encoder).items():
        if rows.made[name] != value:
            raise RunError(
                f"got data.latents = {rows.folder}, made by {name} {rows.made[name]}; the "
                f"config's is {value}: encode again into another folder, or write "
                "data.latents=null"
            )


def rows_of(config: ImageNetConfig, images: Images) -> Rows:
    """Return what training reads: the pictures, or their latents where they were encoded.

    Raises:
        RunError: if there are fewer of them than a batch has rows, of stage 1 or the generator.
    """
    rows: Rows = images
    if config.data.latents:
        rows = LatentImages(Path(config.data.latents), config.data.flip)
    check_batch("training.batch", config.training.batch, len(rows))
    check_stage_one_batch(config, images)
    return rows


def check_stage_one_batch(config: ImageNetConfig, images: Images) -> None:
    """See that there are as many pictures as a batch of stage 1 has rows, where it has batches.

    Raises:
        RunError: if there are fewer.
    """
    stage = config.encoder.stage_one
    if stage and not stage.linear:
        check_batch("encoder.stage_one.batch", stage.batch, len(images))


def check_batch(name: str, batch: int, count: int) -> None:
    """See that there are as many pictures as a batch has rows.

    Raises:
        RunError: if there are fewer.
    """
    if batch > count:
        raise RunError(
            f"got {name} = {batch} for {count} pictures; write a batch that is not larger"
        )


# --- the network and its objective -------------------------------------------------------------


def generator_of(config: ImageNetConfig, classes: int) -> CrossFlowGenerator:
    """Build the untrained generator; one that stays in the latents' space returns latents.

    Raises:
        InputError: if the preset is not known, or sizes are missing or do not fit.
    """
    g = config.generator
    if g.preset is not None and g.preset not in PRESETS:
        raise InputError(
            f"got generator.preset = {g.preset!r}; write one of {', '.join(PRESETS)}, or null"
        )
    sizes = dict(PRESETS.get(g.preset or "", {}))
    for name in ("depth", "width", "heads"):
        if getattr(g, name) is not None:
            sizes[name] = getattr(g, name)
        if name not in sizes:
            raise InputError(
                f"got no generator.{name}; write a preset ({', '.join(PRESETS)}), or depth, width "
                "and heads"
            )
    patch = g.patch
    outputs = 3
    if g.space == "latent":
        patch = 1
        outputs = g.channels
    torch.manual_seed(config.training.seed)
    network = CrossFlowGenerator(
        g.channels,
        g.grid,
        patch,
        outputs,
        classes,
        mlp=g.mlp,
        condition=g.condition,
        class_tokens=g.class_tokens,
        time_tokens=g.time_tokens,
        head_kind=g.head_kind,
        head_channels=g.head_channels,
        null_trained=config.objective.drop_labels > 0,
        **sizes,
    )
    network.gradient_checkpointing = g.checkpointing
    return network


def schedule_of(config: ImageNetConfig) -> Schedule:
    """Return the schedule."""
    return Schedule(config.objective.alpha, config.objective.beta)


def objective_of(
    config: ImageNetConfig, estimate: Callable[[Tensor], Tensor] | None = None
) -> Objective:
    """Return the objective of a run.

    For crossflow the share ``equal`` of the rows has s = t, drawn once; elsewhere two draws are
    sorted (appendix B.3).

    Args:
        config: of the run.
        estimate: from images to latents, where the velocity is estimated.
    """
    o = config.objective
    g = config.generator
    dim = g.channels * g.grid**2
    times: Any = UniformTimes()
    if o.shifted:
        times = ShiftedTimes(dim)
    common: dict[str, Any] = {"schedule": schedule_of(config)}
    if o.penalty:
        common["penalty"] = PENALTIES[o.penalty]()
    if o.kind == "meanflow":
        return MeanFlowLoss.published(**common)
    if o.kind == "improved-meanflow":
        return ImprovedMeanFlowLoss.published(**common)
    if o.kind == "flow-matching":
        return FlowMatchingLoss(times=TimePairs(times, equal=1.0, mask_first=True), **common)
    if o.kind == "consistency":
        return ConsistencyLoss(times=ToDataTimes(times), **common)
    pairs = TimePairs(times, equal=o.equal, mask_first=True)
    if o.literal:
        return CrossFlowLoss.published(dim, times=pairs, estimate=estimate, **common)
    return CrossFlowLoss(times=pairs, estimate=estimate, **common)


def sampler_of(
    config: ImageNetConfig, network: nn.Module, encoder: LatentEncoder | None
) -> Sampler:
    """Return what draws images: the flow map of the objective, and a decoder after latents.

    Args:
        config: of the run.
        network: trained.
        encoder: whose decoder takes latents to images, and which re-encodes between several
            evaluations of a generator of images.
    """
    evaluations = config.evaluation.evaluations
    if config.generator.space == "latent":
        sample = latent_sampler_of(config, network)
        return lambda noise, labels: encoder.decode(sample(noise, labels))
    flow_map = objective_of(config).flow_map(network)
    if evaluations == 1:
        return lambda noise, labels: flow_map.sample(noise, cond={"labels": labels})

    def draw(noise: Tensor, labels: Tensor) -> Tensor:
        fresh = torch.Generator(noise.device)  # what is renoised follows from the noise alone
        fresh.manual_seed(zlib.crc32(noise.cpu().contiguous().numpy().tobytes()))
        return flow_map.sample(
            noise,
            cond={"labels": labels},
            steps=evaluations,
            encode=encoder.encode_prediction,
            generator=fresh,
        )

    return draw


def latent_sampler_of(config: ImageNetConfig, network: nn.Module) -> Sampler:
    """Return what draws latents: a flow map's steps, or the ODE by Heun's rule for flow matching.

    Heun's rule takes two evaluations a step.
    """
    evaluations = config.evaluation.evaluations
    flow_map = objective_of(config).flow_map(network)
    if config.objective.kind == "flow-matching":
        flow = VelocityFlow(flow_map.velocity, Heun())
        steps = max(1, evaluations // 2)
        return lambda noise, labels: flow.sample(noise, cond={"labels": labels}, steps=steps)

    def draw(noise: Tensor, labels: Tensor) -> Tensor:
        return flow_map.sample(noise, cond={"labels": labels}, steps=evaluations)

    return draw


# --- the losses at images ----------------------------------------------------------------------
