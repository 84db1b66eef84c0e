"""Networks for pictures of 28 to 64 pixels a side, grey or in colour.

Principal components of whole pictures, a network from such a latent to pixels, and two unlike
classifiers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowspace.demo.data import in_range
from flowspace.demo.networks import HiddenClassifier, StagedClassifier, fourier
from flowspace.errors import InputError

__all__ = [
    "Components",
    "FromWholeLatent",
    "PictureFeatures",
    "PictureJudge",
    "PictureSize",
    "grid_of",
]

TIME_FEATURES = 128

FEWEST_CELLS = 4
"""A side of the grid at which convolutions begin, at least."""

FINEST = 8
"""Channels at the resolution of the picture; twice as many at each coarser one."""

ROUNDS = 8
"""Power iterations of the principal components (Halko et al., arXiv 0909.4061)."""

SPARE = 16
"""Components that are computed beyond those that are kept, for the accuracy of the last."""

MOST_FITTED = 4096
"""Pictures of which components are computed; of more, evenly spread ones."""

SAME = 1e-3
"""Pictures that differ by less, a quarter of a level of eight bits, are the same."""

SMALLEST_SPREAD = 1e-4
"""Of a component, over that of the first; one that varies less is kept at it."""


class Components(nn.Module):
    """An autoencoder in closed form: the principal components of whole pictures, each of mean 0
    and spread 1.

    Of all linear maps to so many numbers it loses the least of the pictures' variance (Eckart and
    Young), and every number sees the whole picture.

    Args:
        shape: of a picture, ``(C, H, W)``.
        numbers: of the latent.
    """

    center: Tensor
    basis: Tensor
    spread: Tensor

    def __init__(self, shape: Sequence[int], numbers: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        pixels = math.prod(shape)
        self.register_buffer("center", torch.zeros(pixels))
        self.register_buffer("basis", torch.eye(numbers, pixels))
        self.register_buffer("spread", torch.ones(numbers))

    def encode(self, images: Tensor) -> Tensor:
        """Return the latents ``(B, numbers)`` of pictures ``(B, C, H, W)``, also of uint8 ones."""
        rows = in_range(images).flatten(1) - self.center
        return rows @ self.basis.T / self.spread

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pictures ``(B, C, H, W)`` that latents stand for, as near as these can
        say.
        """
        rows = latents * self.spread @ self.basis + self.center
        return rows.unflatten(1, self.shape)

    @torch.no_grad()
    def fit(self, images: Tensor, seed: int) -> "Components":
        """Take the components of some pictures; returns itself.

        Args:
            images: ``(N, C, H, W)``, with ``N`` above the numbers.
            seed: of the random projection that finds them.

        Raises:
            InputError: if all pictures are the same, or no more than the numbers.
        """
        kept = len(self.spread)
        if len(images) <= kept:
            raise InputError(
                f"got {len(images)} pictures for a latent of {kept} numbers; give more, or "
                f"write Components(shape, {max(1, len(images) // 2)})"
            )
        stride = -(-len(images) // MOST_FITTED)
        rows = in_range(images[::stride]).flatten(1)
        center = rows.mean(0)
        if float((rows - center).abs().max()) < SAME:
            raise InputError(
                f"got {len(rows)} pictures that are all the same; give different ones"
            )
        wanted = min(kept + SPARE, *rows.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _, values, vectors = torch.svd_lowrank(rows - center, wanted, ROUNDS)
        spread = values[:kept] / len(rows) ** 0.5
        self.center.copy_(center)
        self.basis.copy_(vectors.T[:kept])
        self.spread.copy_(spread.clamp(min=float(spread[0]) * SMALLEST_SPREAD))
        return self


def grid_of(side: int) -> tuple[int, int]:
    """Return the side of the coarsest grid, at least 4 cells, and how often it is doubled to
    give the side of a picture.

    Args:
        side: pixels a side of the picture.
    """
    doublings = 0
    while side % 2 == 0 and side // 2 >= FEWEST_CELLS:
        side //= 2
        doublings += 1
    return side, doublings


@dataclass(frozen=True)
class PictureSize:
    """How large a network from latents to pictures is.

    Attributes:
        width: of the dense layers.
        depth: how many residual ones.
        cells: channels of the coarsest grid.
    """

    width: int = 384
    depth: int = 4
    cells: int = 96


class ConditionedLayer(nn.Module):
    """A residual layer whose norm is scaled and shifted by the condition (adaLN, arXiv
    2212.09748).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map ``(B, width)`` under a condition of the same shape."""
        scale, shift, gate = self.modulation(F.silu(condition)).chunk(3, -1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        return x + (1 + gate) * self.outer(F.silu(self.inner(h)))


class Doubling(nn.Module):
    """Doubles the resolution of maps, and mixes them with their neighbours."""

    def __init__(self, inputs: int, outputs: int, mixed: bool) -> None:
        super().__init__()
        self.up = nn.Conv2d(inputs, 4 * outputs, 3, padding=1)
        self.mix = nn.Conv2d(outputs, outputs, 3, padding=1) if mixed else None

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``(B, inputs, h, w)`` to ``(B, outputs, 2 h, 2 w)``."""
        maps = F.pixel_shuffle(self.up(maps), 2)
        if self.mix is not None:
            maps = maps + self.mix(F.silu(maps))
        return F.silu(maps)


class FromWholeLatent(nn.Module):
    """Maps a noisy latent to pixels: dense layers, to which every number is given, then
    convolutions that double the resolution up to that of the picture.

    Of a latent each of whose numbers sees the whole picture a cell of the picture needs all of
    them; dense layers hand them to it at once, where attention must gather them.

    Args:
        numbers: of the latent.
        shape: of what it outputs: of a picture ``(C, H, W)``, or ``(numbers,)`` of a latent.
        classes: how many there are.
        size: of the network.
    """

    def __init__(
        self,
        numbers: int,
        shape: Sequence[int],
        classes: int,
        size: PictureSize | None = None,
    ) -> None:
        super().__init__()
        size = size or PictureSize()
        width = size.width
        self.embed = nn.Linear(numbers, width)
        self.label = nn.Embedding(classes, width)
        self.times = nn.Sequential(
            nn.Linear(2 * TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.layers = nn.ModuleList(ConditionedLayer(width) for _ in range(size.depth))
        if len(shape) == 1:
            self.head: nn.Module = nn.Linear(width, shape[0])
        else:
            self.head = ConvolutionsUp(width, shape, size.cells)

    def forward(self, z: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        """Map ``(B, numbers)`` states, ``(B,)`` times and labels to ``(B, C, H, W)`` or ``(B,
        numbers)``.
        """
        features = torch.cat([fourier(t, TIME_FEATURES), fourier(s, TIME_FEATURES)], 1)
        condition = self.times(features) + self.label(labels)
        x = self.embed(z)
        for layer in self.layers:
            x = layer(x, condition)
        return self.head(F.layer_norm(x, x.shape[-1:]))


class ConvolutionsUp(nn.Module):
    """Makes a picture of a vector, as the decoder of an autoencoder does.

    Args:
        width: of the vector.
        shape: of the picture, ``(C, H, W)``.
        cells: channels of the coarsest grid.
    """

    def __init__(self, width: int, shape: Sequence[int], cells: int) -> None:
        super().__init__()
        grid, doublings = grid_of(shape[-1])
        self.begin = nn.Sequential(
            nn.Linear(width, cells * grid**2), nn.SiLU(), nn.Unflatten(1, (cells, grid, grid))
        )
        self.stages = nn.ModuleList()
        for left in reversed(range(doublings)):
            channels = min(cells, FINEST * 2**left)
            self.stages.append(Doubling(cells, channels, mixed=left > 0))
            cells = channels
        self.last = nn.Conv2d(cells, shape[0], 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, width)`` to ``(B, C, H, W)``."""
        maps = self.begin(x)
        for stage in self.stages:
            maps = stage(maps)
        return self.last(maps)


class PictureJudge(HiddenClassifier):
    """A convolutional classifier with pooling, group norms and ReLU that judges samples;
    `features` is its last hidden layer, ``(B, 64)``.

    Args:
        channels: of the pictures.
        side: of the pictures.
        classes: how many it tells apart.
        width: channels of its first layer.
    """

    def __init__(self, channels: int, side: int, classes: int, width: int = 32) -> None:
        super().__init__()
        pooled = -(-side // 2) // 4
        self.body = nn.Sequential(
            *_judging(channels, width, 5, 2),
            *_judging(width, 2 * width, 3, 1),
            nn.MaxPool2d(2),
            *_judging(2 * width, 2 * width, 3, 1),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(2 * width * pooled**2, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, classes)


def _judging(inputs: int, outputs: int, size: int, stride: int) -> tuple[nn.Module, ...]:
    """Return a convolution, its norm and its nonlinearity."""
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2)
    return convolution, nn.GroupNorm(8, outputs), nn.ReLU()


class PictureFeatures(StagedClassifier):
    """A strided classifier with group norms and GELU: its stages are the perceptual features.

    Args:
        channels: of the pictures.
        side: of the pictures.
        classes: how many it tells apart.
        width: channels of its first stage.
    """

    def __init__(self, channels: int, side: int, classes: int, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 4, 2, 1)
        self.stages = nn.ModuleList()
        grid = side // 2
        for inner in (width, 2 * width):
            self.stages.append(_feeling(inner))
            grid = -(-grid // 2)
        self.head = nn.Linear(4 * width * grid**2, classes)


def _feeling(width: int) -> nn.Sequential:
    """Return a stage that halves the resolution and doubles the channels."""
    return nn.Sequential(
        nn.GroupNorm(4, width),
        nn.GELU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1),
        nn.GELU(),
        nn.Conv2d(2 * width, 2 * width, 3, 1, 1),
    )
