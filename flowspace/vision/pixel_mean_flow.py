"""The network of pixel MeanFlow (Lu et al., arXiv 2601.22158): a vision transformer from a noisy
image to the clean one.

Each square of pixels is a token, embedded through a bottleneck of fewer channels. Before the cells
stand context tokens, each a learned vector plus the embedding of what it tells: the class, the
strength omega of the guidance as 1 - 1/omega, the ends t_min and t_max of its interval, and the
length t - s of the step. Blocks are pre-norm, without biases; each of their two branches ends in a
gate, a learned vector that begins at zero.

Behind a shared trunk stand two heads of equal blocks. One predicts the image x of the average
velocity u = (z_t - x)/t, the other that of the instantaneous velocity v. The conversion is the
objective's, `PixelMeanFlowLoss(head=True)`. For sampling the second head is dropped, see
`PixelMeanFlowTransformer.without_velocity_head`: the paper's 118, 410 and 956 million parameters
are those of the network without it.

Ours are the frequencies of the scalars' embeddings, the pairing of numbers in rotary positions,
which a permutation of weights undoes, and hidden sizes that are multiples of 8.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  # pipelines look for it here
from torch import Tensor, nn

from flowspace.errors import InputError
from flowspace.vision.layers import Norm, RotaryAttention, RotaryGrid, TimeEmbedding, swiglu
from flowspace.vision.transformer import (
    LabelledTransformer,
    check_rotary,
    embedding_of_labels,
    preset_of,
)

__all__ = ["PRESETS", "PixelMeanFlowTransformer"]

PRESETS: dict[str, dict[str, Any]] = {
    "b": {"depth": 16, "width": 768, "heads": 12, "bottleneck": 128},
    "l": {"depth": 32, "width": 1024, "heads": 16, "bottleneck": 128},
    "h": {"depth": 48, "width": 1280, "heads": 16, "bottleneck": 256},
}
"""The paper's three sizes, by the names of its models; 16 x 16 cells at every resolution."""

PRESET_CELLS = 16
"""Cells a side of the presets: patches of 16 pixels at 256, of 32 at 512."""

TOLD = ("label", "omega", "t_min", "t_max", "step")
"""What context tokens tell, in their order; ``step`` is the length t - s."""

BLOCK_GAIN = 0.32
"""Matrices of blocks begin with this standard deviation over the root of their inputs."""


class PixelMeanFlowTransformer(LabelledTransformer):
    """Maps noisy images ``(B, channels, size, size)`` to clean ones, of the same shape.

    Args:
        size: pixels a side of an image.
        patch: pixels a side of one cell; the size is a multiple of it.
        channels: of the image.
        classes: labels run from 0 to classes - 1; label ``classes`` is the null class of guidance.
            0: unconditional.
        depth: blocks between an image and its prediction, those of one head included.
        width: of the tokens; a multiple of 4 heads.
        heads: of the attention.
        bottleneck: channels between a patch and its token.
        head_depth: how many of the blocks belong to a head; there are so many more in training.
        tokens: context tokens for the class, omega, t_min, t_max and t - s.
        two_heads: whether the second head is there, which training needs and sampling not.
        null_trained: whether the null class was trained, as it is where labels are dropped: a
            record for those who draw without labels.

    Raises:
        InputError: if sizes do not fit together.
    """

    _no_split_modules = ["GatedBlock"]  # noqa: RUF012  # diffusers' name and type
    _repeated_blocks = ["GatedBlock"]  # noqa: RUF012  # its compile_repeated_blocks compiles them

    @register_to_config
    def __init__(
        self,
        size: int = 256,
        patch: int = 16,
        channels: int = 3,
        classes: int = 1000,
        depth: int = 16,
        width: int = 768,
        heads: int = 12,
        bottleneck: int = 128,
        head_depth: int = 8,
        tokens: Sequence[int] = (8, 4, 2, 2, 4),
        two_heads: bool = True,
        null_trained: bool = False,
    ) -> None:
        super().__init__()
        if size % patch:
            raise InputError(
                f"got size = {size}, patch = {patch}; write a size that is a multiple of the patch"
            )
        check_rotary(width, heads)
        if len(tokens) != len(TOLD):
            raise InputError(
                f"got tokens = {tokens}; write a number for each of {', '.join(TOLD)}"
            )
        if not 0 < head_depth <= depth:
            raise InputError(
                f"got head_depth = {head_depth}, depth = {depth}; a head's blocks are counted in "
                "depth: write 1 <= head_depth <= depth"
            )
        self.gradient_checkpointing = False
        self.embed = BottleneckEmbedding(channels, patch, bottleneck, width)
        self.label = embedding_of_labels(classes, width)
        length = (size // patch) ** 2
        told: dict[str, nn.Parameter] = {}
        scalars: dict[str, nn.Module] = {}
        for name, count in zip(TOLD, tokens, strict=True):
            if name != "label":
                scalars[name] = TimeEmbedding(width, width)
            elif not classes:
                continue
            told[name] = nn.Parameter(torch.empty(count, width))
            length += count
        self.token = nn.ParameterDict(told)
        self.scalars = nn.ModuleDict(scalars)
        self.position = nn.Parameter(torch.empty(1, length, width))
        self.blocks = _blocks(width, heads, depth - head_depth)
        outputs = channels * patch * patch
        self.image_head = PixelHead(width, heads, head_depth, outputs)
        self.velocity_head: PixelHead | None = None
        if two_heads:
            self.velocity_head = PixelHead(width, heads, head_depth, outputs)
        self.rotary = RotaryGrid(width // heads)
        self._initialise()

    @classmethod
    def from_preset(cls, name: str, size: int = 256, **changes: Any) -> "PixelMeanFlowTransformer":
        """Build one of the paper's sizes, ``b``, ``l`` or ``h``, for images of 256 or 512 pixels.

        Args:
            name: of the preset.
            size: pixels a side; the patch is a sixteenth of it.
            changes: other arguments of the network.

        Raises:
            InputError: if there is no preset of that name.
        """
        sizes = preset_of(PRESETS, name)
        grid: dict[str, Any] = {"size": size, "patch": size // PRESET_CELLS}
        return cls(**(grid | sizes | changes))

    def without_velocity_head(self) -> "PixelMeanFlowTransformer":
        """Return a copy that predicts the image alone, with the same weights, for sampling."""
        config: dict[str, Any] = dict(self.config) | {"two_heads": False}
        with torch.device("meta"):
            copy = type(self)(**config)
        own = self.state_dict()
        kept = {name: own[name].clone() for name in copy.state_dict()}
        copy.load_state_dict(kept, assign=True)
        return copy.train(self.training)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of one image, (channels, size, size)."""
        size = self.config["size"]
        return self.config["channels"], size, size

    @property
    def _side(self) -> int:
        """The cells a side of an image."""
        return self.config["size"] // self.config["patch"]

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        omega: Tensor | None = None,
        t_min: Tensor | None = None,
        t_max: Tensor | None = None,
    ) -> Any:
        """Return predicted images; with the velocity head a pair of them, (of u, of v).

        Args:
            z_t: noisy images ``(B, channels, size, size)``.
            t: times ``(B,)`` in [0, 1].
            s: destinations ``(B,)``; only t - s is seen.
            labels: classes ``(B,)``.
            omega: strengths of the guidance ``(B,)``, at least 1; None: 1, no guidance.
            t_min: where the guidance begins ``(B,)``; None: 0.
            t_max: where it ends ``(B,)``; None: 1.

        Raises:
            InputError: if the images or the labels do not fit.
        """
        self._check(tuple(z_t.shape[1:]), labels)
        scalars = {
            "omega": 1 - 1 / _or_constant(omega, 1.0, t),
            "t_min": _or_constant(t_min, 0.0, t),
            "t_max": _or_constant(t_max, 1.0, t),
            "step": t - s,
        }
        context = self._context(scalars, labels)
        cells = self.embed(z_t).to(context.dtype)
        x = torch.cat([context, cells], 1) + self.position
        before = context.shape[1]
        turn = self.rotary(self._side, self._side, x.device, before)
        x = self.through(self.blocks, x, *turn)
        image = self._predicted(self.image_head, x, turn)
        if self.velocity_head is None:
            return image
        return image, self._predicted(self.velocity_head, x, turn)

    def _context(self, scalars: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        """Return the context tokens ``(B, 20, width)``, of the class first."""
        embedded = {name: embed(scalars[name]) for name, embed in self.scalars.items()}
        if self.label is not None and labels is not None:
            embedded["label"] = self.label(labels)
        # ParameterDict has its names by the alphabet, so it is TOLD that says the order.
        tokens = []
        for name in TOLD:
            if name in self.token:
                tokens.append(self.token[name] + embedded[name][:, None])
        return torch.cat(tokens, 1)

    def _predicted(self, head: "PixelHead", x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Return the images of one head, ``(B, channels, size, size)``."""
        x = self.through(head.blocks, x, *turn)
        side = self._side
        cells = head.norm(x[:, -side * side :])
        pixels = head.last(cells).transpose(1, 2)
        maps = pixels.unflatten(2, (side, side))
        return F.pixel_shuffle(maps, self.config["patch"])

    def _check(self, shape: tuple[int, ...], labels: Tensor | None) -> None:
        if shape != self.image_shape:
            raise InputError(f"got images of shape {shape}; this network takes {self.image_shape}")
        self.check_labels(labels)

    @torch.no_grad()
    def _initialise(self) -> None:
        """The reference's beginning: blocks that pass their input on, and the grey image."""
        width = self.config["width"]
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            gain = 1.0
            if "blocks." in name:
                gain = BLOCK_GAIN
            nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        drawn: list[Tensor] = list(self.token.values())
        if self.label is not None:
            drawn.append(self.label.weight)
        for embedding in drawn:
            nn.init.normal_(embedding, std=1 / math.sqrt(width))
        nn.init.normal_(self.position, std=0.02)
        nn.init.xavier_uniform_(self.embed.down.weight.flatten(1))
        nn.init.xavier_uniform_(self.embed.up.weight)
        for head in (self.image_head, self.velocity_head):
            if head is not None:
                nn.init.zeros_(head.last.weight)


class BottleneckEmbedding(nn.Module):
    """A patch of pixels becomes a few channels, and these become a token."""

    def __init__(self, channels: int, patch: int, bottleneck: int, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, bottleneck, patch, stride=patch, bias=False)
        self.up = nn.Linear(bottleneck, width)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(B, channels, H, W)`` to tokens ``(B, cells, width)``."""
        cells = self.down(images).flatten(2).transpose(1, 2)
        return self.up(cells)


class PixelHead(nn.Module):
    """The parts of a head: blocks, and from each token a square of pixels."""

    def __init__(self, width: int, heads: int, depth: int, outputs: int) -> None:
        super().__init__()
        self.blocks = _blocks(width, heads, depth)
        self.norm = Norm(width)
        self.last = nn.Linear(width, outputs, bias=False)


class GatedBlock(RotaryAttention):
    """Attention and a gated MLP, each after an RMS norm, scaled by a vector and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        size = width // heads
        self.q_norm, self.k_norm = Norm(size), Norm(size)
        self.proj = nn.Linear(width, width, bias=False)
        self.mlp = swiglu(width)
        self.attention_gate = nn.Parameter(torch.zeros(width))
        self.mlp_gate = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Map tokens ``(B, context + cells, width)`` to tokens."""
        x = x + self.attention_gate * self.attention(self.norm1(x), cosine, sine)
        return x + self.mlp_gate * self.mlp(self.norm2(x))


def _blocks(width: int, heads: int, depth: int) -> nn.ModuleList:
    return nn.ModuleList(GatedBlock(width, heads) for _ in range(depth))


def _or_constant(given: Tensor | None, value: float, like: Tensor) -> Tensor:
    """Return what was given, or a constant of the times' shape and type."""
    if given is None:
        return torch.full_like(like, value)
    return given
