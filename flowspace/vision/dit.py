"""DiT, the transformer of SiT, LightningDiT and JiT, which are one network with different parts.

Each square of a latent or an image is a token, with fixed sines and cosines for its place. Blocks
are shifted, scaled and gated by the sum of the embeddings of time and label (adaLN-zero, Peebles &
Xie, arXiv 2212.09748):

| | SiT (arXiv 2401.08740) | LightningDiT (2501.01423) | JiT (2511.13720) |
|---|---|---|---|
| maps | latents to velocities | latents to velocities | images to clean images |
| norms | layer, without weights | RMS | RMS |
| MLP | GELU (tanh), 4 widths | SwiGLU, 8/3 widths | SwiGLU, 8/3 widths |
| rotary positions | no | yes | yes |
| queries and keys | as they are | as they are | normalised |
| squares | one layer | one layer | two layers, through a bottleneck |
| context | none | none | 32 tokens of the label, from an inner block on |

All three count time from noise to data. Here t = 0 is data: the network embeds 1 - t, and returns
minus its velocity.

MeanFlow's form adds an embedding of t - s to that of the time. It begins at zero, so that a
network of flow matching becomes one of average velocities that returns the same for all s. See
`flowspace.vision.convert` for files of weights.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  # pipelines look for it here
from timm.layers.mlp import Mlp, SwiGLU
from torch import Tensor, nn

from flowspace.errors import InputError
from flowspace.vision.layers import (
    FREQUENCIES,
    SLOWEST,
    AdaptiveBlock,
    AdaptiveOutput,
    Norm,
    RotaryGrid,
    TimeEmbedding,
    silence,
    sines_of_grid,
)
from flowspace.vision.transformer import (
    LabelledTransformer,
    check_choice,
    check_rotary,
    initialise_linear,
    initialise_small,
    preset_of,
)

__all__ = ["PRESETS", "DiT"]

SIZES: dict[str, dict[str, Any]] = {
    "s": {"depth": 12, "width": 384, "heads": 6},
    "b": {"depth": 12, "width": 768, "heads": 12},
    "l": {"depth": 24, "width": 1024, "heads": 16},
    "xl": {"depth": 28, "width": 1152, "heads": 16},
    "h": {"depth": 32, "width": 1280, "heads": 16},
}
SIT: dict[str, Any] = {"channels": 4, "size": 32, "patch": 2, "sigma": True}
LIGHTNING: dict[str, Any] = {
    "channels": 32,
    "size": 16,
    "patch": 1,
    "norm": "rms",
    "mlp": "swiglu",
    "rotary": True,
}
JIT: dict[str, Any] = {
    "channels": 3,
    "size": 256,
    "patch": 16,
    "norm": "rms",
    "mlp": "swiglu",
    "rotary": True,
    "normalised_heads": True,
    "context_tokens": 32,
    "predicts": "data",
}
PRESETS: dict[str, dict[str, Any]] = {
    "sit-s": SIT | SIZES["s"],
    "sit-b": SIT | SIZES["b"],
    "sit-l": SIT | SIZES["l"],
    "sit-xl": SIT | SIZES["xl"],
    "lightning-dit-b": LIGHTNING | SIZES["b"],
    "lightning-dit-l": LIGHTNING | SIZES["l"],
    "lightning-dit-xl": LIGHTNING | SIZES["xl"],
    "jit-b": JIT | SIZES["b"] | {"bottleneck": 128, "context_start": 4},
    "jit-l": JIT | SIZES["l"] | {"bottleneck": 128, "context_start": 8},
    "jit-h": JIT | SIZES["h"] | {"bottleneck": 256, "context_start": 10},
}
"""The published sizes, for pictures of 256 pixels. For 512 write ``size=64`` for a SiT, and
``size=512, patch=32`` for a JiT.
"""

PREDICTIONS = ("velocity", "data")


class DiT(LabelledTransformer):
    """Maps noisy states ``(B, channels, size, size)`` to velocities or to clean data.

    Args:
        channels: of a state.
        size: its side.
        patch: side of the square that becomes a token; the size is a multiple of it.
        classes: labels run from 0 to classes - 1; label ``classes`` is the null class.
        depth: blocks.
        width: of the tokens; a multiple of the heads, and of 4 heads with rotary positions.
        heads: of the attention.
        hidden: of the MLPs; by default 4 widths with GELU and 8/3 with SwiGLU.
        norm: ``"layer"``, without weights, or ``"rms"``.
        mlp: ``"gelu"`` or ``"swiglu"``.
        rotary: whether queries and keys are turned by their place.
        normalised_heads: whether they pass an RMS norm.
        bottleneck: channels between a square and its token; 0: none.
        context_tokens: tokens of the label that are put before the others; 0: none.
        context_start: the block before which they are.
        predicts: ``"velocity"``, that from data to noise, or ``"data"``.
        outputs: channels of the output, where they are not the state's.
        output_patch: side of the square that a token becomes, where it is not the patch.
        sigma: whether the last layer has twice the channels, of which the second half, once meant
            for a variance, is dropped.
        noise_scale: standard deviation of the noise that the network saw. Here noise has 1: the
            states are multiplied by this number and the output is divided by it, so the data
            are to be divided by it too.
        average: whether the network sees t - s; otherwise it ignores s.
        null_trained: whether the null class was trained: a record for those who draw without
            labels.

    Raises:
        InputError: if sizes do not fit together.
    """

    _no_split_modules = ["AdaptiveBlock"]  # noqa: RUF012  # diffusers' name and type
    _repeated_blocks = ["AdaptiveBlock"]  # noqa: RUF012  # what it compiles
    position: Tensor

    @register_to_config
    def __init__(
        self,
        channels: int = 4,
        size: int = 32,
        patch: int = 2,
        classes: int = 1000,
        depth: int = 12,
        width: int = 768,
        heads: int = 12,
        hidden: int | None = None,
        norm: str = "layer",
        mlp: str = "gelu",
        rotary: bool = False,
        normalised_heads: bool = False,
        bottleneck: int = 0,
        context_tokens: int = 0,
        context_start: int = 0,
        predicts: str = "velocity",
        outputs: int | None = None,
        output_patch: int | None = None,
        sigma: bool = False,
        noise_scale: float = 1.0,
        average: bool = True,
        null_trained: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(size, patch, width, heads, rotary)
        check_choice("norm", norm, NORMS)
        check_choice("mlp", mlp, MLPS)
        check_choice("predicts", predicts, PREDICTIONS)
        if context_tokens and not 0 <= context_start < depth:
            raise InputError(
                f"got context_start = {context_start}, depth = {depth}; write a block's number"
            )
        self.gradient_checkpointing = False
        self.embed: nn.Module = nn.Conv2d(channels, width, patch, stride=patch)
        if bottleneck:
            self.embed = SquareEmbedding(channels, patch, bottleneck, width)
        side = size // patch
        positions = sines_of_grid(side, side, width, torch.device("cpu"))
        self.register_buffer("position", positions[None])
        self.time = WaveEmbedding(width)
        self.difference: TimeEmbedding | None = None
        if average:
            self.difference = TimeEmbedding(width, width)
        self.label = nn.Embedding(classes + 1, width)
        self.context: nn.Parameter | None = None
        if context_tokens:
            self.context = nn.Parameter(0.02 * torch.randn(1, context_tokens, width))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            inner = MLPS[mlp](width, hidden)
            self.blocks.append(AdaptiveBlock(width, heads, NORMS[norm], inner, normalised_heads))
        self.turns = RotaryGrid(width // heads)
        numbers = (outputs or channels) * (output_patch or patch) ** 2
        if sigma:
            numbers *= 2
        self.last = AdaptiveOutput(width, numbers, NORMS[norm])
        self._initialise()

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "DiT":
        """Build a published size, such as ``sit-xl``, ``lightning-dit-b`` or ``jit-h``.

        Args:
            name: one of `PRESETS`.
            changes: other arguments of the network, such as ``patch=4``.

        Raises:
            InputError: if there is no preset of that name.
        """
        return cls(**(preset_of(PRESETS, name) | changes))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape of one state, (channels, size, size)."""
        size = self.config["size"]
        return self.config["channels"], size, size

    @property
    def _side(self) -> int:
        """The cells a side of a state."""
        return self.config["size"] // self.config["patch"]

    def with_pixel_head(self, compression: int, outputs: int = 3) -> "DiT":
        """Return a copy that maps latents to images, as CrossFlow trains it.

        Every block, embedding and norm is a copy. New is the last linear layer alone, which makes
        pixels of tokens and begins at zero: the first image is grey.

        Args:
            compression: pixels a side for each cell of the latent: 8 for SiT's latents, 16 for
                VA-VAE's. A token of ``patch`` cells becomes ``patch * compression`` pixels.
            outputs: channels of the image.

        Raises:
            InputError: if the compression is no positive whole number.
        """
        if not isinstance(compression, int) or compression < 1:
            raise InputError(
                f"got compression = {compression!r}; write the pixels a side of one cell of the "
                "latent, such as 8"
            )
        config = self.settings | {
            "outputs": outputs,
            "output_patch": compression * self.config["patch"],
            "predicts": "data",
            "sigma": False,
        }
        made = type(self)(**config)
        weights = self.state_dict()
        for name, value in made.last.linear.state_dict().items():
            weights[f"last.linear.{name}"] = value
        made.load_state_dict(weights)
        return made.to(self.label_weight).train(self.training)  # type: ignore[arg-type]

    @property
    def label_weight(self) -> Tensor:
        """The embeddings of the classes, ``(classes + 1, width)``, the null class last."""
        return self.label.weight  # type: ignore[union-attr]  # always made

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return velocities or clean data, of the state's shape, or images of the pixel head.

        Args:
            z_t: noisy states ``(B, channels, size, size)``.
            t: times ``(B,)`` in [0, 1].
            s: destinations ``(B,)``, of which only t - s is seen; None: t.
            labels: classes ``(B,)``.

        Raises:
            InputError: if the states' shape or the labels do not fit.
        """
        self._check(tuple(z_t.shape[1:]), labels)
        scale = self.config["noise_scale"]
        if scale != 1:
            z_t = scale * z_t
        label = self.label(labels)  # type: ignore[misc]  # there are classes
        condition = self._times(t, s) + label
        cells = self._cells(z_t)
        cells = self._through_all(cells, condition[:, None], label)
        output = self._squares(self.last(cells, condition[:, None]))
        if self.config["predicts"] == "velocity":
            output = -output
        if scale != 1:
            output = output / scale
        return output

    def _times(self, t: Tensor, s: Tensor | None) -> Tensor:
        """Return the embedding ``(B, width)`` of the time from noise, 1 - t, and of t - s."""
        embedded = self.time(1 - t)
        if self.difference is None or s is None:
            return embedded
        return embedded + self.difference(t - s)

    def _cells(self, z_t: Tensor) -> Tensor:
        """Return the tokens ``(B, cells, width)`` of states, with their positions."""
        tokens = self.embed(z_t).flatten(2).transpose(1, 2)
        # Under autocast the residual stream stays in the weights' precision.
        precision = self.label_weight.dtype
        return tokens.to(precision) + self.position.to(precision)

    def _through_all(self, cells: Tensor, condition: Tensor, label: Tensor) -> Tensor:
        """Return the tokens of cells after all blocks."""
        turn = self._turn(cells.device)
        if self.context is None:
            return self.through(self.blocks, cells, condition, *turn)
        start = self.config["context_start"]
        cells = self.through(self.blocks[:start], cells, condition, *turn)
        context = label[:, None] + self.context
        before = context.shape[1]
        tokens = torch.cat([context.to(cells.dtype), cells], 1)
        turn = self._turn(cells.device, before)
        tokens = self.through(self.blocks[start:], tokens, condition, *turn)
        return tokens[:, before:]

    def _turn(self, device: torch.device, before: int = 0) -> tuple[Tensor | None, Tensor | None]:
        """Return the rotary positions of cells after so many tokens of the context, or Nones."""
        if not self.config["rotary"]:
            return None, None
        return self.turns(self._side, self._side, device, before)

    def _squares(self, cells: Tensor) -> Tensor:
        """Put the numbers of each token into its square; in a token, channels come last."""
        patch = self.config["output_patch"] or self.config["patch"]
        squares = cells.unflatten(2, (patch, patch, -1)).unflatten(1, (self._side, self._side))
        maps = squares.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        if self.config["sigma"]:
            maps = maps.chunk(2, 1)[0]
        return maps

    def _check(self, shape: tuple[int, ...], labels: Tensor | None) -> None:
        if shape != self.latent_shape:
            raise InputError(
                f"got states of shape (B, {', '.join(map(str, shape))}); this network takes (B, "
                f"{', '.join(map(str, self.latent_shape))})"
            )
        self.check_labels(labels)

    def _initialise(self) -> None:
        """Begin as DiT does; blocks begin by returning their input, the whole by zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                initialise_linear(module)
        initialise_small(self.label, self.time.first, self.time.second)
        for block in self.blocks:
            silence(block.modulation)  # type: ignore[arg-type]
        silence(self.last.modulation)
        silence(self.last.linear)
        self.initialise_difference()

    def initialise_difference(self) -> None:
        """Let the embedding of t - s begin at zero: the network returns the same for all s."""
        if self.difference is not None:
            initialise_small(self.difference.first)
            nn.init.zeros_(self.difference.second.weight)


class WaveEmbedding(nn.Module):
    """Cosines and sines of a time, then an MLP (DiT's).

    Frequencies fall from 1 to nearly 1e-4, a geometric row: of a time in [0, 1] even the fastest
    turns by one radian.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * FREQUENCIES, width)
        self.second = nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        """Map ``(B,)`` to ``(B, width)``; angles are formed in float32 at least."""
        exact = torch.promote_types(time.dtype, torch.float32)
        steps = torch.arange(FREQUENCIES, device=time.device, dtype=exact) / FREQUENCIES
        angle = time.to(exact)[:, None] * SLOWEST**-steps
        waves = torch.cat([angle.cos(), angle.sin()], 1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(waves)))


class SquareEmbedding(nn.Module):
    """A square becomes a few channels, and these become a token (JiT's bottleneck)."""

    def __init__(self, channels: int, patch: int, bottleneck: int, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, bottleneck, patch, stride=patch, bias=False)
        self.up = nn.Conv2d(bottleneck, width, 1)

    def forward(self, states: Tensor) -> Tensor:
        """Map ``(B, channels, H, W)`` to ``(B, width, H / patch, W / patch)``."""
        return self.up(self.down(states))


def _layer_norm(width: int) -> nn.Module:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def _gelu(width: int, hidden: int | None) -> nn.Module:
    act: Any = partial(nn.GELU, approximate="tanh")
    return Mlp(width, hidden or 4 * width, act_layer=act)


def _swiglu(width: int, hidden: int | None) -> nn.Module:
    return SwiGLU(width, hidden or 8 * width // 3)


NORMS = {"layer": _layer_norm, "rms": Norm}
MLPS = {"gelu": _gelu, "swiglu": _swiglu}


def _check_sizes(size: int, patch: int, width: int, heads: int, rotary: bool) -> None:
    if size % patch:
        raise InputError(
            f"got size = {size}, patch = {patch}; write a size that is a multiple of the patch"
        )
    if width % heads or width % 4:
        raise InputError(
            f"got width = {width}, heads = {heads}; write a width that is a multiple of the heads "
            "and of 4"
        )
    if rotary:
        check_rotary(width, heads)
