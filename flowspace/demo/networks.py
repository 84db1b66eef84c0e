"""Small networks for small pictures: an autoencoder, a ViT from noisy latent to pixels, and two
unlike classifiers.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowspace.demo.data import CLASSES

__all__ = [
    "Autoencoder",
    "FeatureClassifier",
    "HiddenClassifier",
    "JudgeClassifier",
    "Patches",
    "SmallViT",
    "StagedClassifier",
    "ViTSize",
]


class Autoencoder(nn.Module):
    """Maps ``(B, 1, H, H)`` pictures to ``(B, channels, side, side)``, standardised per channel by
    `fit_latents`, and back.

    Every number sees the whole picture: the grid is only how the ViT takes them.

    Args:
        pixels: of a picture, a side; even.
        channels: of the latent.
        side: of its grid.
        width: of the convolutions.
        hidden: of the dense layer.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, pixels: int, channels: int, side: int, width: int = 32, hidden: int = 256
    ) -> None:
        super().__init__()
        grid, numbers = pixels // 2, channels * side * side
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, 1, 1),
            nn.SiLU(),
            nn.Conv2d(width, width, 4, 2, 1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(width * grid**2, hidden),
            nn.SiLU(),
            nn.Linear(hidden, numbers),
            nn.LayerNorm(numbers, elementwise_affine=False),
            nn.Unflatten(1, (channels, side, side)),
        )
        self.decoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(numbers, hidden),
            nn.SiLU(),
            nn.Linear(hidden, width * grid**2),
            nn.SiLU(),
            nn.Unflatten(1, (width, grid, grid)),
            nn.ConvTranspose2d(width, width, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(width, 1, 3, 1, 1),
        )
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def encode(self, images: Tensor) -> Tensor:
        """Return standardised latents."""
        return (self.encoder(images) - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures for standardised latents."""
        return self.decoder(latents * self.std + self.mean)

    @torch.no_grad()
    def fit_latents(self, images: Tensor) -> None:
        """Measure the mean and spread of each channel."""
        latents = self.encoder(images)
        self.mean.copy_(latents.mean((0, 2, 3), keepdim=True))
        self.std.copy_(latents.std((0, 2, 3), keepdim=True))


def fourier(time: Tensor, size: int) -> Tensor:
    """Return sines and cosines of ``(B,)`` times at ``size / 2`` frequencies, ``(B, size)``.

    None turns more than ten radians over [0, 1]: D_t f differentiates what stands here.
    """
    frequencies = torch.logspace(-1, 1, size // 2, device=time.device, dtype=time.dtype)
    angles = time[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class ConditionedBlock(nn.Module):
    """A transformer block whose norms are scaled and shifted by the condition (adaLN, Peebles &
    Xie, arXiv 2212.09748).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map ``(B, N, width)`` tokens under a ``(B, width)`` condition."""
        modulation = self.modulation(F.silu(condition))[:, None]
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation.chunk(6, -1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        x = x + (1 + gate1) * self.attention(h)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + (1 + gate2) * self.mlp(h)

    def attention(self, x: Tensor) -> Tensor:
        """Map ``(B, N, width)`` tokens by multi-head attention."""
        heads = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out(attended.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class ViTSize:
    """How large a ViT is.

    Attributes:
        width: of the tokens.
        depth: blocks.
        heads: of the attention.
    """

    width: int = 64
    depth: int = 3
    heads: int = 4


class SmallViT(nn.Module):
    """A ViT over the latent grid; each token becomes a patch of ``outputs`` channels and ``patch``
    pixels a side.

    Args:
        channels: of the latent.
        side: of the latent grid; one token a cell.
        outputs: channels of the output.
        patch: pixels a side of the output that one token becomes; 1 stays in the latent space.
        size: of the ViT.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        outputs: int = 1,
        patch: int = 1,
        size: ViTSize | None = None,
    ) -> None:
        super().__init__()
        size = size or ViTSize()
        width = size.width
        self.side, self.outputs, self.patch = side, outputs, patch
        self.embed = nn.Linear(channels, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, side * side, width))
        self.label = nn.Embedding(CLASSES, width)
        self.times = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        blocks = [ConditionedBlock(width, size.heads) for _ in range(size.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, outputs * patch * patch)
        nn.init.zeros_(self.head.weight)

    def forward(self, z: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        """Map ``(B, channels, side, side)`` states, ``(B,)`` times and labels to ``(B, outputs,
        side*patch, side*patch)``.
        """
        width = self.embed.out_features
        times = torch.cat([fourier(t, width), fourier(s, width)], 1)
        condition = self.times(times) + self.label(labels)
        x = self.embed(z.flatten(2).transpose(1, 2)) + self.position
        for block in self.blocks:
            x = block(x, condition)
        x = self.head(F.layer_norm(x, x.shape[-1:]))
        cells = x.transpose(1, 2).unflatten(2, (self.side, self.side))
        return F.pixel_shuffle(cells, self.patch)


class Patches(nn.Module):
    """An autoencoder without loss or weights: a square of pixels is a cell of its latent."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def encode(self, images: Tensor) -> Tensor:
        """Map ``(B, 1, H, H)`` to ``(B, patch^2, H/patch, H/patch)``."""
        return F.pixel_unshuffle(images, self.patch)

    def decode(self, latents: Tensor) -> Tensor:
        """Map patches back to images."""
        return F.pixel_shuffle(latents, self.patch)


class HiddenClassifier(nn.Module):
    """A classifier whose features are its last hidden layer: a ``body`` to it, then a ``head``."""

    body: nn.Module
    head: nn.Linear

    def features(self, images: Tensor) -> Tensor:
        """Return the last hidden layer, ``(B, 64)``."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, ``(B, classes)``."""
        return self.head(self.body(images))


class StagedClassifier(nn.Module):
    """A classifier whose features are those of each stage: a ``stem``, ``stages``, a ``head``."""

    stem: nn.Module
    stages: nn.ModuleList
    head: nn.Linear

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the output of the stem and of each stage."""
        found = [self.stem(images)]
        for stage in self.stages:
            found.append(stage(found[-1]))
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, ``(B, classes)``."""
        return self.head(F.gelu(self.features(images)[-1]).flatten(1))


class JudgeClassifier(HiddenClassifier):
    """A convolutional classifier that judges samples; `features` is its last hidden layer, ``(B,
    64)``.
    """

    def __init__(self, side: int, classes: int = CLASSES, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(2 * width * (side // 4) ** 2, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, classes)


class FeatureClassifier(StagedClassifier):
    """A residual, strided classifier without pooling, GELU and group norms: its stages are the
    perceptual features.
    """

    def __init__(self, side: int, classes: int = CLASSES, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(4, w),
                nn.GELU(),
                nn.Conv2d(w, 2 * w, 3, 2, 1),
                nn.GELU(),
                nn.Conv2d(2 * w, 2 * w, 3, 1, 1),
            )
            for w in (width, 2 * width)
        )
        grid = math.ceil(math.ceil(side / 2) / 2)
        self.head = nn.Linear(4 * width * grid**2, classes)
