"""What every method is given, trained first: autoencoder, perceptual distance, judges.

Stage 1 of CrossFlow is the autoencoder, whose encoder is kept, frozen. The judges share no
weights, seed or architecture with the perceptual classifier, and no training images where there
are enough to halve.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowspace.demo.data import Data, PictureSettings, Settings, in_range
from flowspace.demo.loop import Trainer, TrainSettings
from flowspace.demo.metrics import Judge
from flowspace.demo.networks import Autoencoder, FeatureClassifier, JudgeClassifier, Patches
from flowspace.demo.picture_networks import Components, PictureFeatures, PictureJudge
from flowspace.training.checkpoints import Checkpoints, fill
from flowspace.training.draws import Draws

__all__ = ["JUDGES", "FeatureDistance", "World", "judge_of_grey", "prepare"]

JUDGES = 3
"""How many classifiers judge, whose scores are averaged: a Frechet distance in the features of one
depends on its seed.
"""

CPU = torch.device("cpu")

QUARTERS = 4
"""Turns that are told apart where there are no classes."""

RECOLOUR = 0.4
"""The largest change of contrast, and of brightness."""

MANY = 4096
"""Images that are encoded together, and of which features are measured."""

SMOOTHING = 1e-4
"""Added under the root of a perceptual distance, whose gradient is infinite at zero."""

JITTER = (0.17, 0.25, 0.25)
"""The largest turn in radians, and the largest shifts in half widths of a picture."""


@dataclass(frozen=True)
class FeatureDistance:
    """Distance of a classifier's features: the root mean square of each stage, in units of its
    spread on real images.
    """

    network: FeatureClassifier | PictureFeatures
    scales: tuple[float, ...]

    @classmethod
    def of(cls, network: FeatureClassifier | PictureFeatures, images: Tensor) -> "FeatureDistance":
        """Measure the scales, and freeze the network."""
        network.requires_grad_(False)
        device = next(network.parameters()).device
        with torch.no_grad():
            features = network.features(in_range(images).to(device))
            return cls(network, tuple(float(f.var(0).mean()) for f in features))

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the distance of each row, ``(B,)``."""
        stages = zip(self.network.features(first), self.network.features(second), strict=True)
        squares = []
        for (f, g), scale in zip(stages, self.scales, strict=True):
            squares.append((f - g).square().flatten(1).mean(1) / scale)
        return (torch.stack(squares) + SMOOTHING).sqrt().mean(0)


@dataclass(frozen=True)
class World:
    """What every method is given: data, the frozen autoencoder, the latents, the perceptual
    distance, and the device of its networks; data and latents are on the CPU.
    """

    data: Data
    autoencoder: Autoencoder | Patches | Components
    latents: Tensor
    perceptual: FeatureDistance
    device: torch.device = CPU


def prepare(
    data: Data, settings: Settings, folder: Path, device: torch.device = CPU
) -> tuple[World, Judge]:
    """Train what every method shares: the autoencoder, the perceptual classifier, the judges."""
    if isinstance(settings, PictureSettings):
        autoencoder: Any = fitted_components(data, settings, folder / "autoencoder")
    else:
        autoencoder = train_autoencoder(data, settings, folder / "autoencoder")
    autoencoder.requires_grad_(False)
    with torch.no_grad():
        parts = [autoencoder.encode(images) for images in data.images.split(MANY)]
    latents = torch.cat(parts)
    features = _classifier("features", data, settings, folder, device)
    judges = []
    for k in range(1, JUDGES + 1):
        judges.append(_classifier(f"judge-{k}", data, settings, folder, device))
    spread = data.images[:: -(-len(data.images) // MANY)]
    perceptual = FeatureDistance.of(features, spread)
    autoencoder.to(device)  # whose decoder is given what a network on the device made
    return World(data, autoencoder, latents, perceptual, device), Judge(tuple(judges), data)


def judge_of_grey(
    data: Data, plan: TrainSettings, folder: Path, context: Mapping[str, Any]
) -> Judge:
    """Train the judges of grey pictures with classes, each from a seed of its own, where the
    folder has not got them yet.

    Args:
        data: the judges learn from every other training picture, from the second on.
        plan: how long and how fast.
        folder: of a folder for each judge.
        context: what else they depend on, such as the data set.
    """
    judges = []
    for number in range(1, JUDGES + 1):
        own = replace(plan, seed=plan.seed + 100 * number)
        torch.manual_seed(own.seed)
        network = JudgeClassifier(data.side, data.classes)
        name = f"judge-{number}"
        trainer = Trainer(name, own, folder / name, context)
        judges.append(trainer.train(network, data.half(1), classification))
    return Judge(tuple(judges), data)


def _classifier(
    name: str, data: Data, settings: Settings, folder: Path, device: torch.device
) -> Any:
    """Train the perceptual classifier (``features``) on the first half of the training images, or
    a judge (``judge-1`` ...) on the second.
    """
    number = 0
    if name != "features":
        number = int(name.removeprefix("judge-"))
    plan = replace(settings.classifier, seed=settings.classifier.seed + 100 * number)
    loss, classes = classification, data.classes
    if not data.conditional:
        loss, classes = turns, QUARTERS
    elif number and isinstance(settings, PictureSettings):
        loss = colourful_classification
    torch.manual_seed(plan.seed)
    if isinstance(settings, PictureSettings):
        context = {"pictures": settings.pictures}
        kind = PictureJudge if number else PictureFeatures
        network: nn.Module = kind(data.channels, data.side, classes)
    else:
        context = {"dataset": settings.dataset}
        small = JudgeClassifier if number else FeatureClassifier
        network = small(data.side)
    trainer = Trainer(name, plan, folder / name, context, device)
    return trainer.train(network, data.half(min(number, 1)), loss)


def fitted_components(data: Data, settings: PictureSettings, folder: Path) -> Components:
    """Stage 1 in closed form: components of whole pictures; kept, so that a run that continues
    has the same.
    """
    numbers = min(settings.numbers, len(data.images) // 2)
    components = Components(tuple(data.images.shape[1:]), numbers)
    plan = {"pictures": settings.pictures, "numbers": numbers, "seed": settings.autoencoder.seed}
    checkpoints = Checkpoints(folder, plan)
    found = checkpoints.latest()
    if found is None:
        components.fit(data.images, settings.autoencoder.seed)
        checkpoints.save(1, components.state_dict())
    else:
        fill(components.state_dict(), found[1], folder)
    return components


def train_autoencoder(data: Data, settings: Settings, folder: Path) -> Autoencoder:
    """Stage 1: squared error of reconstructions."""
    torch.manual_seed(settings.autoencoder.seed)
    network = Autoencoder(data.side, settings.channels, data.side // settings.patch)
    trainer = Trainer("autoencoder", settings.autoencoder, folder, settings.context())
    trained: Any = trainer.train(network, (data.images,), reconstruction)
    trained.fit_latents(data.images)
    return trained


def reconstruction(network: nn.Module, batch: tuple[Tensor, ...], draws: Draws) -> Tensor:
    """Return the squared error of reconstructions."""
    (images,) = batch
    found: Any = network
    return F.mse_loss(found.decoder(found.encoder(images)), images)


def classification(network: nn.Module, batch: tuple[Tensor, ...], draws: Draws) -> Tensor:
    """Return the cross-entropy on jittered images."""
    images, labels = batch
    return F.cross_entropy(network(jitter(in_range(images), draws.generator)), labels)


def colourful_classification(
    network: nn.Module, batch: tuple[Tensor, ...], draws: Draws
) -> Tensor:
    """Return the cross-entropy on jittered images in other colours: of few pictures a judge would
    learn the colours, not the shapes.
    """
    images, labels = batch
    moved = recolour(jitter(in_range(images), draws.generator), draws.generator)
    return F.cross_entropy(network(moved), labels)


def recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change contrast and brightness of each channel by up to four tenths."""
    shape = (2, *images.shape[:2], 1, 1)
    drawn = torch.rand(shape, generator=generator, device=images.device)
    contrast, brightness = RECOLOUR * (2 * drawn - 1)
    return images * (1 + contrast) + brightness


def turns(network: nn.Module, batch: tuple[Tensor, ...], draws: Draws) -> Tensor:
    """Return the cross-entropy on how many quarter turns an image was given: where there are no
    classes, what tells them apart knows the pictures (Gidaris et al., arXiv 1803.07728).
    """
    images = in_range(batch[0])
    device = images.device
    quarters = torch.randint(QUARTERS, (len(images),), generator=draws.generator, device=device)
    turned = torch.stack([images.rot90(k, (2, 3)) for k in range(QUARTERS)])
    chosen = turned[quarters, torch.arange(len(images), device=device)]
    return F.cross_entropy(network(jitter(chosen, draws.generator)), quarters)


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to a pixel in eight, turn by up to 10 degrees, and add a little noise:
    augmentation for classifiers.
    """
    most = images.new_tensor(JITTER)[:, None]
    uniform = torch.rand(3, len(images), generator=generator, device=images.device)
    angle, dx, dy = (most * (2 * uniform - 1)).unbind()
    rows = [angle.cos(), -angle.sin(), dx, angle.sin(), angle.cos(), dy]
    turn = torch.stack(rows, 1).unflatten(1, (2, 3))
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1
    return moved + 0.1 * torch.randn(images.shape, generator=generator, device=images.device)
