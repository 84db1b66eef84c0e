"""What every method is given, trained first: autoencoder, perceptual distance, judges.

Stage 1 of CrossFlow is the autoencoder, whose encoder is kept, frozen. The judges share no
weights, seed, architecture or training images with the perceptual classifier.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowspace.demo.data import Data, Settings
from flowspace.demo.loop import Trainer
from flowspace.demo.metrics import Judge
from flowspace.demo.networks import Autoencoder, FeatureClassifier, JudgeClassifier, Patches
from flowspace.training.draws import Draws

__all__ = ["JUDGES", "FeatureDistance", "World", "prepare"]

JUDGES = 3
"""How many classifiers judge, whose scores are averaged: a Frechet distance in the features of one
depends on its seed.
"""

SMOOTHING = 1e-4
"""Added under the root of a perceptual distance, whose gradient is infinite at zero."""

JITTER = (0.17, 0.25, 0.25)
"""The largest turn in radians, and the largest shifts in half widths of a picture."""


@dataclass(frozen=True)
class FeatureDistance:
    """Distance of a classifier's features: the root mean square of each stage, in units of its
    spread on real images.
    """

    network: FeatureClassifier
    scales: tuple[float, ...]

    @classmethod
    def of(cls, network: FeatureClassifier, images: Tensor) -> "FeatureDistance":
        """Measure the scales, and freeze the network."""
        network.requires_grad_(False)
        with torch.no_grad():
            return cls(network, tuple(float(f.var(0).mean()) for f in network.features(images)))

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
    distance.
    """

    data: Data
    autoencoder: Autoencoder | Patches
    latents: Tensor
    perceptual: FeatureDistance


def prepare(data: Data, settings: Settings, folder: Path) -> tuple[World, Judge]:
    """Train what every method shares: the autoencoder, the perceptual classifier, the judges."""
    autoencoder = train_autoencoder(data, settings, folder / "autoencoder")
    autoencoder.requires_grad_(False)
    with torch.no_grad():
        latents = autoencoder.encode(data.images)

    def classifier(kind: type[nn.Module], half: int, seed: int, name: str) -> Any:
        plan = replace(settings.classifier, seed=settings.classifier.seed + seed)
        trainer = Trainer(name, plan, folder / name, {"dataset": settings.dataset})
        torch.manual_seed(plan.seed)
        return trainer.train(kind(data.side), data.half(half), classification)

    features = classifier(FeatureClassifier, 0, 0, "features")
    judges = []
    for k in range(1, JUDGES + 1):
        judges.append(classifier(JudgeClassifier, 1, 100 * k, f"judge-{k}"))
    world = World(data, autoencoder, latents, FeatureDistance.of(features, data.images))
    return world, Judge(tuple(judges), data)


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
    return F.cross_entropy(network(jitter(images, draws.generator)), labels)


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
