"""DiT^DH, RAE's network in latents: a deep encoder, and a head that is wide and shallow.

Latents of a representation encoder have hundreds of channels, more than a transformer as wide as
DiT can carry through every block. DiT^DH (Zheng et al., arXiv 2510.11690, after the decoupled head
of Wang et al., arXiv 2504.05741) leaves the depth to an encoder of DiT's width, which says what
each cell should become, and gives the noisy latent itself to two blocks of width 2,048:

    c = silu(e(t) + e(label))
    h = encoder(z_t, c)                 one condition for all cells
    v = head(z_t, linear(silu(e(t) + h)))      a condition for each cell

Both are conditioned by adaLN. MeanFlow's form (MF-RAE, arXiv 2511.13019) returns the average
velocity from t to s instead: it adds an embedding of t - s to e(t) in both places. That embedding
begins at zero, so that the form built from a flow-matching network returns what that one does.

Each cell of the latent is a token. Blocks have RMS norms, rotary positions, biases and a SwiGLU
of hidden size 8/3 of the width; only the encoder has fixed positions beside the rotary ones.
Times are as everywhere here, t = 0 data and t = 1 noise, which are RAE's too.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  # pipelines look for it here
from timm.layers.mlp import SwiGLU
from torch import Tensor, nn

from flowspace.errors import InputError, RunError
from flowspace.vision.layers import (
    AdaptiveBlock,
    AdaptiveOutput,
    FourierEmbedding,
    Norm,
    RotaryGrid,
    silence,
    sines_of_grid,
)
from flowspace.vision.shapes import check_latent, pair_of
from flowspace.vision.transformer import (
    LabelledTransformer,
    check_rotary,
    embedding_of_labels,
    initialise_linear,
    initialise_small,
    preset_of,
)
from flowspace.vision.weights import read_tensors

__all__ = ["SIZES", "DiTDH"]

SIZES: dict[str, dict[str, Any]] = {
    "s": {"depth": 12, "width": 384, "heads": 6},
    "b": {"depth": 12, "width": 768, "heads": 12},
    "xl": {"depth": 28, "width": 1152, "heads": 16},
}
"""The encoder of each published size; the head of all has 2 blocks of width 2,048 and 16 heads."""


class DiTDH(LabelledTransformer):
    """Maps noisy latents ``(B, channels, h, w)`` to their velocity, of the same shape.

    Args:
        channels: of the latent; 768 for RAE's encoders of base size.
        grid: the cells of a latent: a side of a square, or a pair (height, width). 16 for images
            of 256 pixels, 32 for 512.
        classes: labels run from 0 to classes - 1; label ``classes`` is the null class. 0:
            unconditional.
        depth: blocks of the encoder.
        width: of the encoder's tokens; a multiple of 4 heads.
        heads: of the encoder's attention.
        head_depth: blocks of the head.
        head_width: of the head's tokens; a multiple of 4 head_heads.
        head_heads: of the head's attention.
        average: whether it is MeanFlow's form, of the average velocity from t to s; flow
            matching's ignores s.
        null_trained: whether the null class was trained, as it is where labels are dropped. The
            network does not depend on it: it is a record for those who draw without labels.

    Raises:
        InputError: if sizes do not fit together.
    """

    _no_split_modules = ["AdaptiveBlock"]  # noqa: RUF012  # diffusers' name and type
    _repeated_blocks = ["AdaptiveBlock"]  # noqa: RUF012  # what it compiles
    _keep_in_fp32_modules = ["frequencies"]  # noqa: RUF012  # of the times, when it is loaded

    @register_to_config
    def __init__(
        self,
        channels: int = 768,
        grid: int | Sequence[int] = 16,
        classes: int = 1000,
        depth: int = 28,
        width: int = 1152,
        heads: int = 16,
        head_depth: int = 2,
        head_width: int = 2048,
        head_heads: int = 16,
        average: bool = False,
        null_trained: bool = False,
    ) -> None:
        super().__init__()
        pair_of(grid, "grid")
        check_rotary(width, heads)
        check_rotary(head_width, head_heads, "head_")
        self.gradient_checkpointing = False
        self.time = FourierEmbedding(width)
        self.difference: FourierEmbedding | None = None
        if average:
            self.difference = FourierEmbedding(width)
        self.label = embedding_of_labels(classes, width)
        self.embed = nn.Linear(channels, width)
        self.blocks = _blocks(width, heads, depth)
        self.rotary = RotaryGrid(width // heads)
        self.project = nn.Linear(width, head_width)
        self.head_embed = nn.Linear(channels, head_width)
        self.head_blocks = _blocks(head_width, head_heads, head_depth)
        self.head_rotary = RotaryGrid(head_width // head_heads)
        self.last = AdaptiveOutput(head_width, channels, Norm)
        self._initialise()

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "DiTDH":
        """Build one of the published sizes: ``s``, ``b`` or ``xl``.

        Raises:
            InputError: if there is no preset of that name.
        """
        return cls(**(preset_of(SIZES, name) | changes))

    @classmethod
    def from_flow_matching(cls, source: "DiTDH | str | Path", **expected: Any) -> "DiTDH":
        """Build MeanFlow's form from a flow-matching network: what it returns is the same for all
        s, to the bit, until it is trained.

        Args:
            source: the network, which is copied, or the folder that it was saved in.
            expected: arguments of the constructor that the network must have been built with, such
                as the ``width`` that a config names.

        Raises:
            InputError: if the network is MeanFlow's form already, or not of the expected sizes.
            RunError: if a folder holds no network, or its weights are broken.
        """
        taught, name = source, "a network"
        if not isinstance(taught, DiTDH):
            taught, name = _loaded(Path(taught)), f"the network in {source}"
        config = taught.settings
        if config["average"]:
            raise InputError(
                f"got {name}, which is of average velocities already; copy it, or write "
                "DiTDH.from_pretrained(folder)"
            )
        _require(name, config, expected)
        made = cls(**(config | {"average": True}))
        made.load_state_dict(taught.state_dict(), strict=False)
        return made.to(taught.embed.weight)  # type: ignore[arg-type]  # its device and dtype

    @classmethod
    def from_published(cls, path: str | Path) -> "DiTDH":
        """Load a file of weights in the layout of RAE's own code, such as ``stage2_model.pt``, or
        of MF-RAE's, which is MeanFlow's form.

        Sizes are read off the tensors. The null class counts as trained, as it was there.

        Args:
            path: a checkpoint of torch or a safetensors file, of tensors alone.

        Raises:
            RunError: if the file cannot be read, or its names or shapes do not make the network.
        """
        tensors = read_tensors(Path(path))
        try:
            made = cls(**_published_sizes(tensors))
            made.load_state_dict(_from_published(tensors, made.config))
        except (KeyError, IndexError, RuntimeError, InputError) as error:
            raise RunError(
                f"{path} is not a DiT^DH in the layout of RAE's code: {error}"
            ) from error
        if not _same_positions(tensors["pos_embed"], made.config):
            raise RunError(f"{path} has other positions than sines and cosines of the grid")
        return made

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape of one latent, (channels, h, w)."""
        height, width = pair_of(self.config["grid"], "grid")
        return self.config["channels"], height, width

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return velocities ``(B, channels, h, w)`` of noisy latents of that shape.

        Args:
            latents: z_t.
            t: times ``(B,)`` in [0, 1].
            s: destinations ``(B,)`` of the average velocity; without them it is the velocity at t.
                Flow matching's form does not look at them.
            labels: classes ``(B,)``.

        Raises:
            InputError: if the latents' shape or the labels do not fit.
        """
        batch, channels, height, width = latents.shape
        check_latent((channels, height, width), self.latent_shape, "network")
        self.check_labels(labels)
        _check_rows(batch, {"t": t, "s": s, "labels": labels})
        times = self._times(t, s)[:, None]
        cells = latents.flatten(2).transpose(1, 2)
        positions = sines_of_grid(height, width, self.config["width"], latents.device)
        # Under autocast the residual streams stay in the weights' precision.
        precision = self.embed.weight.dtype
        h = self.embed(cells).to(precision) + positions.to(precision)
        condition = self._condition(times, labels)
        h = self._through(self.blocks, h, condition, self.rotary)
        condition = self.project(F.silu(times + h))
        x = self.head_embed(cells).to(precision)
        x = self._through(self.head_blocks, x, condition, self.head_rotary)
        velocities = self.last(x, condition)
        return velocities.transpose(1, 2).reshape(batch, channels, height, width)

    def _times(self, t: Tensor, s: Tensor | None) -> Tensor:
        """Return the embedding ``(B, width)`` of t, and in MeanFlow's form of t - s."""
        embedded = self.time(t)
        if self.difference is None:
            return embedded
        if s is None:
            s = t
        return embedded + self.difference(t - s)

    def _condition(self, times: Tensor, labels: Tensor | None) -> Tensor:
        """Return the encoder's condition ``(B, 1, width)``."""
        if self.label is None or labels is None:
            return F.silu(times)
        return F.silu(times + self.label(labels)[:, None])

    def _through(
        self, blocks: nn.ModuleList, x: Tensor, condition: Tensor, rotary: nn.Module
    ) -> Tensor:
        _, height, width = self.latent_shape
        turn = rotary(height, width, x.device)
        return self.through(blocks, x, condition, *turn)

    def _initialise(self) -> None:
        """Begin as RAE's does; blocks begin by returning their input, the whole by zero."""
        for layer in (self.embed, self.head_embed):
            initialise_linear(layer)
        initialise_small(self.time.first, self.time.second, self.label)
        if self.difference is not None:
            initialise_small(self.difference.first)
            silence(self.difference.second)


def _blocks(width: int, heads: int, depth: int) -> nn.ModuleList:
    blocks = nn.ModuleList()
    for _ in range(depth):
        mlp = SwiGLU(width, 8 * width // 3)
        blocks.append(AdaptiveBlock(width, heads, Norm, mlp))
    return blocks


def _loaded(folder: Path) -> DiTDH:
    """Load a network from its folder, once it is seen to be one."""
    try:
        kind = json.loads((folder / "config.json").read_text())["_class_name"]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{folder} holds no network that was saved: {error}") from error
    if kind != "DiTDH":
        raise InputError(f"got {folder}, a folder of {kind}, not of DiTDH")
    return DiTDH.from_pretrained(folder)


def _require(name: str, config: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse a network that was not built with the expected arguments, in one sentence of all."""
    for unknown in sorted(expected.keys() - config.keys()):
        raise InputError(f"got {unknown} = {expected[unknown]!r}, which DiTDH does not take")
    has, wants = [], []
    for key, value in expected.items():
        own = config[key]
        if _plain(value) != _plain(own):
            has.append(f"{key} = {own}")
            wants.append(f"{key} = {value}")
    if has:
        raise InputError(
            f"got {name}, of {', '.join(has)}, where {', '.join(wants)} is expected; give weights "
            "of these sizes, or expect the others"
        )


def _plain(value: Any) -> Any:
    """Return a pair as a tuple: JSON keeps it as a list."""
    if isinstance(value, list):
        return tuple(value)
    return value


def _check_rows(batch: int, given: Mapping[str, Tensor | None]) -> None:
    """Refuse what has not one number for each latent: it would be spread over all of them."""
    for name, value in given.items():
        if value is not None and value.shape != (batch,):
            raise InputError(
                f"got {name} of shape {tuple(value.shape)} for {batch} latents; write one number "
                f"for each, as {name}.expand({batch})"
            )


# --- the layout of RAE's code ------------------------------------------------------------------

RENAMED = {
    "s_embedder.proj": "embed",
    "x_embedder.proj": "head_embed",
    "s_projector": "project",
    "y_embedder.embedding_table": "label",
    "final_layer.norm_final": "last.norm",
    "final_layer.linear": "last.linear",
    "final_layer.adaLN_modulation.1": "last.modulation",
}
EMBEDDINGS = {"t_embedder": "time", "r_embedder": "difference"}
LAYERS = {"mlp.0": "first", "mlp.2": "second"}
IN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "mlp.w3": "mlp.fc2",
    "adaLN_modulation.1": "modulation",
}
"""Modules there, and here. Both SwiGLU's first layers are one there, ``mlp.w12``."""

FIXED = ("pos_embed", "enc_feat_rope.", "dec_feat_rope.")
"""What is computed here."""


def _published_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of the constructor, as the tensors' shapes say them."""
    width, channels = tensors["s_embedder.proj.weight"].shape[:2]
    head_width = tensors["x_embedder.proj.weight"].shape[0]
    norms = []
    for name, value in tensors.items():
        if name.endswith(".norm1.weight"):
            norms.append(len(value))
    return {
        "channels": channels,
        "grid": math.isqrt(tensors["pos_embed"].shape[1]),
        "classes": len(tensors["y_embedder.embedding_table.weight"]) - 1,
        "depth": norms.count(width),
        "width": width,
        "heads": width // tensors["enc_feat_rope.freqs_cos"].shape[1],
        "head_depth": norms.count(head_width),
        "head_width": head_width,
        "head_heads": head_width // tensors["dec_feat_rope.freqs_cos"].shape[1],
        "average": "r_embedder.W" in tensors,
        "null_trained": True,
    }


def _from_published(tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Return the tensors by their names here."""
    found = {}
    for name, value in tensors.items():
        if name.startswith(FIXED):
            continue
        module, _, kind = name.rpartition(".")
        first, _, rest = module.partition(".")
        if first == "blocks":
            found |= _of_block(rest, kind, value, config)
            continue
        if name.endswith("_embedder.W"):
            place = f"{EMBEDDINGS[module]}.frequencies"
        elif first in EMBEDDINGS:
            place = f"{EMBEDDINGS[first]}.{LAYERS[rest]}.{kind}"
        else:
            place = f"{RENAMED[module]}.{kind}"
            if value.ndim == 4:  # of a convolution of 1 x 1
                value = value.flatten(1)
        found[place] = value
    return found


def _of_block(module: str, kind: str, value: Tensor, config: Any) -> dict[str, Tensor]:
    """Return the tensors of a block's module: the encoder's are numbered before the head's."""
    number, _, name = module.partition(".")
    after = int(number) - config["depth"]
    place, heads = f"blocks.{number}", config["heads"]
    if after >= 0:
        place, heads = f"head_blocks.{after}", config["head_heads"]
    if name == "mlp.w12":
        gate, linear = value.chunk(2)
        return {f"{place}.mlp.fc1_g.{kind}": gate, f"{place}.mlp.fc1_x.{kind}": linear}
    if name == "attn.qkv":
        value = _with_halves(value, heads)
    return {f"{place}.{IN_BLOCK[name]}.{kind}": value}


def _with_halves(value: Tensor, heads: int) -> Tensor:
    """Put the rows of q and k in another order: neighbours turn together there, here the i-th and
    the i-th of the second half. Their products stay what they are.
    """
    q, k, v = value.unflatten(0, (3, heads, -1, 2)).unbind(0)  # (heads, size / 2, 2, ...)
    parts = [q.transpose(1, 2), k.transpose(1, 2), v]
    return torch.cat([part.flatten(0, 2) for part in parts])


def _same_positions(given: Tensor, config: Any) -> bool:
    side = config["grid"]
    own = sines_of_grid(side, side, config["width"], given.device)
    return torch.allclose(given[0].float(), own, atol=1e-3)
