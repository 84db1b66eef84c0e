"""The generator: a vision transformer from a noisy latent grid to pixels in one evaluation.

Each cell of the latent is a token and becomes a square of pixels. Before the cells stand context
tokens: a few learned ones for the class and a few that carry the time. Blocks are pre-norm: RMS
norm, attention with normalised queries and keys and rotary positions on the cells, and an MLP; no
linear layer in them has a bias, so that a block of width d holds 12 d^2 numbers.

CrossFlow's paper (arXiv 2606.19970, B.2) has "a standard ViT backbone", patches of 16 x 16 pixels,
16 context tokens for class and time, the destination s as its only time, and 95, 315 and 461
million parameters at the depths and widths of `PRESETS`. The rest is ours, and comes out at these
counts: RMS norms, normalised queries and keys, rotary positions beside the learned ones, SwiGLU,
no biases, the heads of the attention, 12 of the 16 tokens for the class and 4 for the time, and a
last layer that begins at zero.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  # pipelines look for it here
from torch import Tensor, nn

from flowspace.errors import InputError
from flowspace.vision.layers import MLPS, Norm, RotaryAttention, RotaryGrid, TimeEmbedding
from flowspace.vision.shapes import check_latent, pair_of
from flowspace.vision.transformer import (
    SMALL,
    LabelledTransformer,
    check_choice,
    check_rotary,
    embedding_of_labels,
    initialise_small,
    preset_of,
)

__all__ = ["PRESETS", "CrossFlowGenerator"]

PRESETS: dict[str, dict[str, Any]] = {
    "crossflow-b": {"depth": 12, "width": 768, "heads": 12},
    "crossflow-l": {"depth": 24, "width": 1024, "heads": 16},
    "crossflow-xl": {"depth": 28, "width": 1152, "heads": 16},
}
"""Depth and width of the paper's three sizes; the heads are ours."""

HEADS = ("linear", "convolutional")
"""What may make pixels of cells."""

CONDITIONS: dict[str, tuple[str, ...]] = {
    "s": ("s",),
    "t,s": ("t", "s"),
    "t-s": ("t_minus_s",),
}
"""Which times a network sees, by the names of their embeddings."""


class CrossFlowGenerator(LabelledTransformer):
    """Maps latents ``(B, channels, h, w)`` to images ``(B, outputs, h patch, w patch)``.

    Args:
        channels: of the latent; 32 for VA-VAE.
        grid: the cells of a latent, for which positions are learned: a side of a square, or a
            pair (height, width).
        patch: pixels a side of one cell.
        outputs: channels of the image.
        classes: labels run from 0 to classes - 1; label ``classes`` is the null class of guidance.
            0: unconditional.
        depth: blocks.
        width: of the tokens; a multiple of 4 heads.
        heads: of the attention.
        mlp: ``"swiglu"`` (hidden size 8/3 of the width) or ``"gelu"`` (4 times).
        condition: which times the network sees: ``"s"`` (the paper's), ``"t,s"`` or ``"t-s"``.
        class_tokens: learned tokens for each class; with the next, 16 in the paper, which does not
            say how they are shared out.
        time_tokens: tokens that carry the time.
        null_trained: whether the null class was trained, as it is where labels are dropped or
            training is guided. The network does not depend on it: it is a record for those who
            draw without labels.
        head_kind: what makes pixels of cells: ``"linear"``, each cell on its own (the paper's), or
            ``"convolutional"``, as a decoder does, with a stage for each doubling of the
            resolution, which sees across the borders of the cells (ours).
        head_channels: of the convolutional head at the resolution of the image; a stage before it
            has twice as many, and none more than ``width``.

    Raises:
        InputError: if sizes do not fit together.
    """

    _no_split_modules = ["Block"]  # noqa: RUF012  # diffusers' name and type
    _repeated_blocks = ["Block"]  # noqa: RUF012  # what its compile_repeated_blocks compiles

    @register_to_config
    def __init__(
        self,
        channels: int = 32,
        grid: int | Sequence[int] = 16,
        patch: int = 16,
        outputs: int = 3,
        classes: int = 1000,
        depth: int = 12,
        width: int = 768,
        heads: int = 12,
        mlp: str = "swiglu",
        condition: str = "s",
        class_tokens: int = 12,
        time_tokens: int = 4,
        null_trained: bool = False,
        head_kind: str = "linear",
        head_channels: int = 16,
    ) -> None:
        super().__init__()
        check_choice("condition", condition, CONDITIONS)
        check_rotary(width, heads)
        check_choice("head_kind", head_kind, HEADS)
        cells = math.prod(pair_of(grid, "grid"))
        self.gradient_checkpointing = False
        self.embed = nn.Linear(channels, width, bias=False)
        self.position = nn.Parameter(0.02 * torch.randn(1, cells, width))
        self.label = embedding_of_labels(classes, class_tokens * width)
        self.time_token = nn.Parameter(0.02 * torch.randn(1, time_tokens, width))
        self.times = nn.ModuleDict()
        for name in CONDITIONS[condition]:
            self.times[name] = TimeEmbedding(width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp) for _ in range(depth))
        self.norm = Norm(width)
        self.head: nn.Linear | ConvolutionalHead
        if head_kind == "linear":
            self.head = nn.Linear(width, outputs * patch * patch, bias=False)
        else:
            self.head = ConvolutionalHead(width, outputs, patch, head_channels)
        self.rotary = RotaryGrid(width // heads)
        self._initialise()

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "CrossFlowGenerator":
        """Build one of the paper's sizes: ``crossflow-b``, ``crossflow-l``, ``crossflow-xl``.

        Raises:
            InputError: if there is no preset of that name.
        """
        return cls(**(preset_of(PRESETS, name) | changes))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape of one latent, (channels, h, w)."""
        height, width = pair_of(self.config["grid"], "grid")
        return self.config["channels"], height, width

    def forward(
        self, latents: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Return images for latents ``(B, channels, h, w)``, times ``(B,)`` in [0, 1] and labels
        ``(B,)``.

        Raises:
            InputError: if the latents' channels, the labels or the grid do not fit.
        """
        _, channels, height, width = latents.shape
        check_latent((channels, height, width), self.latent_shape, "generator")
        self.check_labels(labels)
        cells = latents.flatten(2).transpose(1, 2)
        x = self.embed(cells) + self.position
        context = self._context(t, s, labels)
        before = context.shape[1]
        x = torch.cat([context, x], 1)
        turn = self.rotary(height, width, x.device, before)
        x = self.through(self.blocks, x, *turn)
        cells = self.norm(x[:, before:])
        if isinstance(self.head, ConvolutionalHead):
            return self.head(_maps(cells, height, width))
        pixels = _maps(self.head(cells), height, width)
        return F.pixel_shuffle(pixels, self.config["patch"])

    def _context(self, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        times = {"s": s, "t": t, "t_minus_s": t - s}
        found = sum(embed(times[name]) for name, embed in self.times.items())
        tokens = self.time_token + found[:, None]  # type: ignore[index]
        if self.label is None or labels is None:
            return tokens
        classes = self.label(labels).unflatten(1, (-1, tokens.shape[2]))
        return torch.cat([classes, tokens.to(classes.dtype)], 1)

    def _initialise(self) -> None:
        """Small linear layers, and a head of zeros, so that training begins at the grey image."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                spread = min(SMALL, 1 / math.sqrt(module.in_features))
                nn.init.trunc_normal_(module.weight, std=spread)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        initialise_small(self.label)
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)


def _maps(cells: Tensor, height: int, width: int) -> Tensor:
    """Return ``(B, height width, C)`` cells as maps ``(B, C, height, width)``."""
    return cells.transpose(1, 2).unflatten(2, (height, width))


class ConvolutionalHead(nn.Module):
    """Makes pixels of cells as an autoencoder's decoder does: each stage doubles the resolution.

    A stage costs about as much as any other, since it has half the channels at four times the
    places: many channels where the drawing is laid out, few where its edges are made sharp.

    Args:
        width: channels of the cells.
        outputs: channels of the image.
        patch: pixels a side of one cell; a power of two.
        channels: at the resolution of the image; twice as many in the stage before it, but none
            has more than ``width``.

    Raises:
        InputError: if the patch is no power of two above 1.
    """

    def __init__(self, width: int, outputs: int, patch: int, channels: int) -> None:
        super().__init__()
        doublings = patch.bit_length() - 1
        if patch < 2 or patch != 2**doublings:
            raise InputError(
                f"got patch = {patch} with a convolutional head, which doubles the resolution in "
                "each stage; write a power of two, such as 16, or head_kind='linear'"
            )
        self.stages = nn.ModuleList()
        for left in reversed(range(doublings)):
            size = min(width, channels * 2**left)
            self.stages.append(UpwardStage(width, size, residual=left > 0))
            width = size
        self.last = _convolution(width, outputs, zero=True)

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``(B, width, h, w)`` to ``(B, outputs, h patch, w patch)``."""
        for stage in self.stages:
            maps = stage(maps)
        return self.last(maps)


class UpwardStage(nn.Module):
    """Doubles the resolution of maps, and mixes them with their neighbours.

    Args:
        inputs: channels.
        outputs: channels.
        residual: whether two more convolutions follow at the new resolution.
    """

    def __init__(self, inputs: int, outputs: int, residual: bool) -> None:
        super().__init__()
        self.up = _convolution(inputs, 4 * outputs)
        self.mix: nn.Sequential | None = None
        if residual:
            first = _convolution(outputs, outputs)
            last = _convolution(outputs, outputs, zero=True)
            self.mix = nn.Sequential(nn.SiLU(), first, nn.SiLU(), last)

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``(B, inputs, h, w)`` to ``(B, outputs, 2 h, 2 w)``."""
        maps = F.pixel_shuffle(self.up(maps), 2)
        if self.mix is not None:
            maps = maps + self.mix(maps)
        return F.silu(maps)


def _convolution(inputs: int, outputs: int, zero: bool = False) -> nn.Conv2d:
    """Return a 3 x 3 convolution that keeps the size of what passes through, or begins at zero."""
    made = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    if zero:
        nn.init.zeros_(made.weight)
    else:
        nn.init.kaiming_normal_(made.weight, nonlinearity="linear")
    return made


class Block(RotaryAttention):
    """Attention and an MLP, each after an RMS norm and added to its input."""

    def __init__(self, width: int, heads: int, mlp: str) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        size = width // heads
        self.q_norm, self.k_norm = Norm(size), Norm(size)
        self.proj = nn.Linear(width, width, bias=False)
        if mlp not in MLPS:
            raise InputError(f"got mlp = {mlp!r}; write 'swiglu' or 'gelu'")
        self.mlp = MLPS[mlp](width)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Map tokens ``(B, context + cells, width)`` to tokens."""
        x = x + self.attention(self.norm1(x), cosine, sine)
        return x + self.mlp(self.norm2(x))
