"""PixelFlow's transformer: the velocity of noisy pictures of any resolution, in pixels.

A diffusion transformer whose tokens are squares of pixels. Positions are rotary, so that one
network serves every resolution of a cascade, and it is told which one it looks at: the number of
tokens a side is embedded and added to the embeddings of time and class. Captions enter through
attention to the tokens of a text encoder, after the attention among the picture's own.

PixelFlow's paper (arXiv 2504.07963, 3.3) has the sizes of DiT-XL, patches of 4 x 4 pixels, and
pictures of several resolutions packed into one batch. Norms of queries and keys over all heads, an
RMS norm before the MLP and 677 million parameters are those of its public code. Ours are the
smaller sizes, the layers without biases that embed the times, the second time of one-step stages,
a norm of the text, and the learned token that stands for no text.

The paper's time is 0 at noise; here it is 1, as everywhere in flowspace.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  # pipelines look for it here
from torch import Tensor, nn

from flowspace.errors import InputError
from flowspace.vision.layers import (
    FREQUENCIES,
    SLOWEST,
    Norm,
    RotaryGrid,
    TimeEmbedding,
    modulated,
    turned,
)
from flowspace.vision.packing import Packing
from flowspace.vision.transformer import (
    LabelledTransformer,
    check_rotary,
    embedding_of_labels,
    initialise_linear,
    initialise_small,
    preset_of,
)

__all__ = ["PRESETS", "PixelFlowTransformer"]

PRESETS: dict[str, dict[str, Any]] = {
    "b": {"depth": 12, "width": 768, "heads": 12},
    "l": {"depth": 24, "width": 1024, "heads": 16},
    "xl": {"depth": 28, "width": 1152, "heads": 16},
}
"""``xl`` is the paper's; the others are those of ViT-B and ViT-L."""

EXTENSIONS = ("classes", "interval", "null_trained", "text_width")
"""What may differ between a network and one that is extended from it."""

ONE_A_PICTURE = ("t", "s", "labels")
"""Of these a picture has one number."""

ByResolution = Sequence[Tensor]
"""Of pictures of several sizes, a tensor for each size."""


class Captions(NamedTuple):
    """The captions of pictures, as a network sees them.

    Attributes:
        tokens: of a text encoder, ``(B, L, text_width)``.
        mask: which of them there are, ``(B, L)``; at least one in a row.
    """

    tokens: Tensor
    mask: Tensor


class BlockContext(NamedTuple):
    """What every block is given beside tokens and condition.

    Attributes:
        packing: which tokens belong to one picture.
        cosine: of the rotary positions, ``(N, width of a head)``.
        sine: as the cosine.
        captions: of all pictures in order, or None.
    """

    packing: Packing
    cosine: Tensor
    sine: Tensor
    captions: Captions | None


class PixelFlowTransformer(LabelledTransformer):
    """Maps pictures ``(B, channels, side, side)`` at times ``(B,)`` to velocities of that shape.

    Any side that the patch divides will do, and several in one call: a list of pictures, one
    tensor for each resolution, gives a list of velocities; see `packed`.

    Args:
        channels: of a picture.
        patch: pixels a side of one token.
        classes: labels run from 0 to classes - 1; label ``classes`` is the null class of guidance.
            0: no labels.
        depth: blocks.
        width: of the tokens; a multiple of 4 heads.
        heads: of the attention.
        interval: embed t - s beside t, for one-step stages; without it the network is a velocity
            at t, and s is ignored.
        text_width: of the tokens of a text encoder; 0: no text.
        null_trained: whether the null class was trained: a record for those who draw without
            labels.

    Raises:
        InputError: if sizes do not fit together.
    """

    _no_split_modules = ["PixelFlowBlock"]  # noqa: RUF012  # diffusers' name and type
    _repeated_blocks = ["PixelFlowBlock"]  # noqa: RUF012  # what compile_repeated_blocks compiles

    @register_to_config
    def __init__(
        self,
        channels: int = 3,
        patch: int = 4,
        classes: int = 1000,
        depth: int = 28,
        width: int = 1152,
        heads: int = 16,
        interval: bool = False,
        text_width: int = 0,
        null_trained: bool = False,
    ) -> None:
        super().__init__()
        check_rotary(width, heads)
        self.gradient_checkpointing = False
        numbers = channels * patch * patch
        self.embed = nn.Linear(numbers, width)
        self.time = TimeEmbedding(width, width)
        self.resolution = ResolutionEmbedding(width)
        self.span: TimeEmbedding | None = None
        if interval:
            self.span = TimeEmbedding(width, width)
        self.label = embedding_of_labels(classes, width)
        self.null_text: nn.Parameter | None = None
        if text_width:
            self.null_text = nn.Parameter(torch.randn(1, 1, text_width))
            self.text_norm = Norm(text_width)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks.append(PixelFlowBlock(width, heads, text_width))
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, numbers)
        self.rotary = RotaryGrid(width // heads)
        self._initialise()

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "PixelFlowTransformer":
        """Build a network of a known size: ``b``, ``l``, or ``xl``, the paper's.

        Raises:
            InputError: if there is no preset of that name.
        """
        return cls(**(preset_of(PRESETS, name) | changes))

    def extended(self, **changes: Any) -> "PixelFlowTransformer":
        """Return a copy of this network with more conditions, which begins as this one.

        A second time (``interval=True``) and text (``text_width=2048``) come in through layers
        that begin at zero, so the copy's output is at first this network's. One thing alone can
        be taken away, the labels (``classes=0``): then their part of the condition is missing.

        Args:
            changes: of ``classes`` to 0, ``interval``, ``text_width`` and ``null_trained``.

        Raises:
            InputError: if anything else is to change, another number of classes is asked for, or
                a second time or text that this network has is to go or to be another.
        """
        classes = self.config["classes"]
        unknown = set(changes) - set(EXTENSIONS)
        if unknown or changes.get("classes", 0) not in (0, classes):
            raise InputError(
                f"got changes {changes}; the weights serve {', '.join(EXTENSIONS)} alone, and "
                f"classes = 0 or {classes}"
            )
        for name in ("interval", "text_width"):
            own = self.config[name]
            value = changes.get(name, own)
            if own and value != own:
                raise InputError(
                    f"got {name} = {value} for a network with {name} = {own}; an extended network "
                    f"keeps what it has: leave {name} out"
                )
        other = type(self)(**(self.settings | changes))
        other.load_state_dict(self.state_dict(), strict=False)
        nn.Module.to(other, self.device, self.dtype)
        return other

    def compile_blocks(self, **options: Any) -> "PixelFlowTransformer":
        """Compile each block in place; returns itself.

        The blocks are equal, so one graph serves all of them. Weights and their names stay.

        Pictures packed into one batch bring their numbers along, and torch compiles anew for some
        of them: write batches that the number of stages divides, whose numbers never change. In
        training with 4 stages, 8 pictures took 1 graph, 10 took 3, and 6 took 4, since a size with
        one picture is always compiled apart; the first sampling added 2. After 8 graphs, torch's
        ``recompile_limit``, new sizes run without compilation.

        Args:
            options: those of ``torch.compile``.
        """
        return super().compile_blocks(**options)

    def forward(
        self,
        z: Tensor | Sequence[Tensor],
        t: Any,
        s: Any = None,
        labels: Any = None,
        text: Any = None,
        text_mask: Any = None,
    ) -> Any:
        """Return the velocity of pictures of one resolution, or as `packed` of several.

        Args:
            z: noisy pictures ``(B, channels, side, side)``, or a list of them.
            t: times ``(B,)``, 1 at noise.
            s: destinations ``(B,)``; they matter to a network that was built with ``interval``.
            labels: ``(B,)``, for a network with classes.
            text: tokens of the captions, ``(B, L, text_width)``, for a network with text.
            text_mask: which of these there are, ``(B, L)``; None: all. A caption without any is
                the null text of guidance, so that ``Guidance(null={"text_mask": False})`` drops
                captions.

        Raises:
            InputError: if shapes, labels or text do not fit the network.
        """
        if not isinstance(z, Tensor):
            return self.packed(z, t, s, labels, text, text_mask)
        conditions: list[Any] = []
        for value in (s, labels, text, text_mask):
            if value is not None:
                value = [value]
            conditions.append(value)
        return self.packed([z], [t], *conditions)[0]

    def packed(
        self,
        pictures: ByResolution,
        t: ByResolution,
        s: ByResolution | None = None,
        labels: ByResolution | None = None,
        text: ByResolution | None = None,
        text_mask: ByResolution | None = None,
    ) -> list[Tensor]:
        """Return the velocities of pictures of several resolutions, computed as one sequence.

        Each picture attends to itself alone, and nothing is padded: the result is that of one
        call for each resolution, in about the time of one call for as many tokens. Under a
        wrapper, such as DistributedDataParallel, call the model itself with these lists.

        Args:
            pictures: for each resolution a tensor ``(B_k, channels, side_k, side_k)``.
            t: for each resolution times ``(B_k,)``; so are all that follow.
            s: destinations.
            labels: labels.
            text: tokens ``(B_k, L, text_width)``, of one length L for all.
            text_mask: which of these there are, ``(B_k, L)``.

        Raises:
            InputError: as for `forward`.
        """
        if not len(pictures):
            raise InputError("got no pictures; write one tensor for each resolution, at least one")
        self._check(pictures, labels, text)
        given = {"t": t, "s": s, "labels": labels, "text": text, "text_mask": text_mask}
        for name, values in given.items():
            _check_rows(name, values, pictures)
        if text is not None:
            _check_text(text, text_mask, self.config["text_width"])
        patch = self.config["patch"]
        device = pictures[0].device
        sides = [z.shape[-1] // patch for z in pictures]
        sizes, own_side, patches, cosines, sines = [], [], [], [], []
        for z, side in zip(pictures, sides, strict=True):
            sizes.append((len(z), side * side))
            own_side.append(torch.full((len(z),), side, device=device))
            patches.append(_patches(z, patch))
            cosine, sine = self.rotary(side, side, device)
            cosines.append(cosine)
            sines.append(sine)
        packing = Packing(tuple(sizes))
        condition = self._condition(_joined(own_side), _joined(t), _joined(s), _joined(labels))
        captions = self._captions(_joined(text), _joined(text_mask))
        cosine, sine = packing.repeat(cosines), packing.repeat(sines)
        context = BlockContext(packing, cosine, sine, captions)
        out = self._velocity(packing.join(patches), condition, context)
        velocities = []
        for part, side in zip(packing.split(out), sides, strict=True):
            velocities.append(_picture(part, side, patch))
        return velocities

    def _velocity(self, patches: Tensor, condition: Tensor, context: BlockContext) -> Tensor:
        """Return the velocity of patches, of their shape."""
        # A copy in the weights' type: under autocast the sum over the blocks stays float32, and
        # torch.compile's guards fail on an x that is a view in one call and not in the next.
        x = self.embed(patches).to(self.embed.weight.dtype, copy=True)
        x = self.through(self.blocks, x, condition, context)
        shift, scale = self.modulation(condition).chunk(2, -1)
        spread = context.packing.spread
        y = modulated(_without_scale(x), spread(shift), spread(scale))
        return self.head(y)

    def _condition(
        self, sides: Tensor, t: Tensor, s: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        """Return what modulates the tokens of each picture, ``(B, width)``."""
        total = self.time(t) + self.resolution(sides)
        if self.label is not None and labels is not None:
            total = total + self.label(labels)
        if self.span is not None:
            if s is None:
                raise InputError(
                    "got no s for a network of two times; write s=, where a step from t is to end"
                )
            total = total + self.span(t - s)
        return F.silu(total)

    def _captions(self, text: Tensor | None, mask: Tensor | None) -> Captions | None:
        """Return captions, each after the learned token that stands for no text."""
        if self.null_text is None or text is None:
            return None
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        null = self.null_text.expand(len(text), -1, -1)
        tokens = torch.cat([null, text.to(null.dtype)], 1)
        there = F.pad(mask.bool(), (1, 0), value=True)
        return Captions(self.text_norm(tokens), there)

    def _check(
        self,
        pictures: ByResolution,
        labels: ByResolution | None,
        text: ByResolution | None,
    ) -> None:
        for z in pictures:
            self._check_picture(tuple(z.shape))
        self.check_labels(labels)
        if self.null_text is None and text is not None:
            raise InputError("got text for a network without; build it with text_width=")
        if self.null_text is not None and text is None:
            width = self.config["text_width"]
            raise InputError(
                f"got no text; write text= with tokens (B, L, {width}) of a text encoder, and "
                "text_mask="
            )

    def _check_picture(self, shape: tuple[int, ...]) -> None:
        channels, patch = self.config["channels"], self.config["patch"]
        square = len(shape) == 4 and shape[2] == shape[3]
        if not square or shape[1] != channels or shape[2] % patch:
            raise InputError(
                f"got a picture of shape {shape}; this network takes squares of {channels} "
                f"channels, (B, {channels}, side, side), with a side that is a multiple of {patch}"
            )

    def _initialise(self) -> None:
        """Initialise as a DiT, where each block begins as the identity and the velocity is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                initialise_linear(module)
        for embedding in (self.time, self.resolution):
            initialise_small(embedding.first, embedding.second)
        initialise_small(self.label)
        silent: list[nn.Linear] = [self.modulation, self.head]
        if self.span is not None:
            silent.append(self.span.second)
        for block in self.blocks:
            silent.extend(block.silent())  # type: ignore[operator]
        for layer in silent:
            nn.init.zeros_(layer.weight)


class ResolutionEmbedding(nn.Module):
    """Sines and cosines of the tokens a side, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * FREQUENCIES, width)
        self.second = nn.Linear(width, width)

    def forward(self, sides: Tensor) -> Tensor:
        """Map whole numbers ``(B,)`` to ``(B, width)``; periods from 2 pi up to 2 pi 10^4."""
        rates = SLOWEST ** (-torch.arange(FREQUENCIES, device=sides.device) / FREQUENCIES)
        angle = sides[:, None] * rates
        waves = torch.cat([angle.cos(), angle.sin()], 1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(waves)))


class PixelFlowBlock(nn.Module):
    """Attention within a picture, attention to its caption, and an MLP; the first and last are
    shifted, scaled and gated by the condition.
    """

    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = SelfAttention(width, heads)
        self.captions: CrossAttention | None = None
        if text_width:
            self.captions = CrossAttention(width, heads, text_width)
        self.norm = Norm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor, condition: Tensor, context: BlockContext) -> Tensor:
        """Map tokens to tokens of that shape.

        Args:
            x: ``(1, N, width)``, or of one resolution ``(B, n, width)``.
            condition: of the pictures, ``(B, width)``.
            context: where they lie, and their captions.
        """
        spread = context.packing.spread
        shift, scale, gate, *of_mlp = self.modulation(condition).chunk(6, -1)
        y = modulated(_without_scale(x), spread(shift), spread(scale))
        x = x + spread(gate) * self.attention(y, context)
        if self.captions is not None and context.captions is not None:
            x = x + self.captions(x, context.captions, context.packing)
        shift, scale, gate = of_mlp
        y = modulated(self.norm(x), spread(shift), spread(scale))
        return x + spread(gate) * self.mlp(y)

    def silent(self) -> list[nn.Linear]:
        """Return the layers that begin at zero."""
        layers = [self.modulation]
        if self.captions is not None:
            layers.append(self.captions.proj)
        return layers


class SelfAttention(nn.Module):
    """Attention among the tokens of a picture, turned by their positions; queries and keys are
    normalised over all heads at once.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = Norm(width), Norm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """Map tokens to tokens, of their shape."""
        q, k, v = self.qkv(x).chunk(3, -1)
        v = self._by_head(v)
        q = self._turned(self.q_norm(q), context).to(v.dtype)
        k = self._turned(self.k_norm(k), context).to(v.dtype)
        heads = context.packing.self_attention(q, k, v)
        return self.proj(heads.flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1))

    def _turned(self, x: Tensor, context: BlockContext) -> Tensor:
        heads_first = self._by_head(x).transpose(1, 2)
        return turned(heads_first, context.cosine, context.sine).transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention of a picture's tokens to those of its caption; it begins at zero."""

    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Norm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(text_width, 2 * width)
        self.q_norm, self.k_norm = Norm(width), Norm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, captions: Captions, packing: Packing) -> Tensor:
        """Map tokens to tokens, of their shape."""
        k, v = self.kv(captions.tokens).chunk(2, -1)
        v = self._by_head(v)
        q = self.q(self.norm(x))
        q = self._by_head(self.q_norm(q)).to(v.dtype)
        k = self._by_head(self.k_norm(k)).to(v.dtype)
        heads = packing.cross_attention(q, k, v, captions.mask)
        return self.proj(heads.flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1))


def _without_scale(x: Tensor) -> Tensor:
    """Return the layer norm of tokens without weights: the modulation has them."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _patches(z: Tensor, patch: int) -> Tensor:
    """Return the squares of pictures ``(B, channels, side, side)`` as rows ``(B, n, w)``."""
    return F.pixel_unshuffle(z, patch).flatten(2).transpose(1, 2)


def _picture(patches: Tensor, side: int, patch: int) -> Tensor:
    """Return pictures from their squares: the inverse of `_patches`."""
    maps = patches.transpose(1, 2).unflatten(2, (side, side))
    return F.pixel_shuffle(maps, patch)


def _check_rows(name: str, values: ByResolution | None, pictures: ByResolution) -> None:
    """Raise InputError unless there is a value for each picture of each resolution."""
    if values is None:
        return
    wanted = [len(z) for z in pictures]
    advice = "write for each resolution one tensor with as many rows as it has pictures"
    if not _are_tensors(values):
        raise InputError(
            f"got {name} = {values} for {wanted} pictures, which is no list of tensors; {advice}"
        )
    shapes = [tuple(value.shape) for value in values]
    found: list[int | None] = []
    for shape in shapes:
        found.append(next(iter(shape), None))
    if found != wanted:
        raise InputError(f"got {name} for {found} pictures, and {wanted} pictures; {advice}")
    single = [(rows,) for rows in wanted]
    if name in ONE_A_PICTURE and shapes != single:
        raise InputError(
            f"got {name} of shapes {shapes}, and a picture has one; write shapes {single}"
        )


def _are_tensors(values: Any) -> bool:
    if not isinstance(values, Sequence):
        return False
    return all(isinstance(value, Tensor) for value in values)


def _check_text(text: ByResolution, masks: ByResolution | None, width: int) -> None:
    """Raise InputError unless captions are tokens of that width, and a mask fits its captions.

    Args:
        text: for each resolution tokens ``(B_k, L, width)``, of one length L for all.
        masks: for each resolution a mask ``(B_k, L)``, or None.
        width: of the tokens.
    """
    shapes = [tuple(tokens.shape) for tokens in text]
    for shape in shapes:
        if len(shape) != 3 or shape[2] != width:
            raise InputError(
                f"got text of shape {shape}; this network was built for tokens of width {width}: "
                f"write (B, L, {width})"
            )
        first, length = shapes[0][1], shape[1]
        if length != first:
            raise InputError(
                f"got captions of {first} and of {length} tokens, which do not go into one "
                "batch; pad them to one length, and write text_mask="
            )
    for mask, shape in zip(masks or [], shapes, strict=False):
        if tuple(mask.shape) != shape[:2]:
            raise InputError(
                f"got text_mask of shape {tuple(mask.shape)} for text of shape {shape}; a mask "
                f"says of each token whether it is there: write {shape[:2]}"
            )


def _joined(values: ByResolution | None) -> Any:
    """Return the values of all resolutions as one tensor."""
    if values is None:
        return None
    if len(values) == 1:
        return values[0]
    return torch.cat(list(values))
