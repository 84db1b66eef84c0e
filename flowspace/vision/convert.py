r"""Weights of a trained flow-matching network as the start of a flow map, and back.

`convert` reads a checkpoint in the layout of SiT's, LightningDiT's or JiT's own code and returns a
`DiT` that is called as ``model(z_t, t, s, labels=...)``, in the times of this package. It returns
what the old network does, for every s, until the embedding of t - s is trained:

| layout | the old network | the new one |
|---|---|---|
| ``sit``, ``lightning-dit`` | v' = dz/dt' at t' = 1 - t | v = -v', the average velocity at s = t |
| ``jit`` | x of z at t' = 1 - t | x, the matched statistic's f at s = t |

So the first two continue with `MeanFlowLoss` and its kin, the last with `PixelMeanFlowLoss` or
`CrossFlowLoss`; `DiT.with_pixel_head` leads from latents to pixels. `to_layout` gives the weights
their old names again.

Nothing in a file tells on which path, or in which latents, its network was trained: files of DiT,
which predicts noise at times from 0 to 1,000, have the names and shapes of SiT's. That is for the
caller to know.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowspace.errors import InputError, RunError
from flowspace.vision.dit import SIZES, DiT
from flowspace.vision.transformer import check_choice

__all__ = ["LAYOUTS", "convert", "read_checkpoint", "to_layout"]

LAYOUTS = ("sit", "lightning-dit", "jit")
"""The layouts that are known, by the names of their repositories."""

AVERAGES = ("ema", "model_ema1", "model_ema")
"""Where training checkpoints keep the average of the weights, which is what one samples with."""

PREFIXES = ("module.", "_orig_mod.", "net.")
"""What wrappers put before a name: distributed training, torch.compile, and JiT's training."""

RENAMED = {
    "x_embedder.proj": "embed",
    "x_embedder.proj1": "embed.down",
    "x_embedder.proj2": "embed.up",
    "t_embedder.mlp.0": "time.first",
    "t_embedder.mlp.2": "time.second",
    "y_embedder.embedding_table": "label",
    "final_layer.norm_final": "last.norm",
    "final_layer.linear": "last.linear",
    "final_layer.adaLN_modulation.1": "last.modulation",
}
IN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "qkv",
    "attn.q_norm": "q_norm",
    "attn.k_norm": "k_norm",
    "attn.proj": "proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "adaLN_modulation.1": "modulation",
}
WHOLE = {"pos_embed": "position", "in_context_posemb": "context"}
"""Modules and whole tensors there, and here."""

GATED = {"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}
"""A SwiGLU's modules; its first two layers are one there, gate first."""

TURNED = ("attn.qkv", "attn.q_norm", "attn.k_norm")
"""Modules whose numbers stand in another order here, where heads are turned.

Neighbours turn together there, here the i-th and the i-th of the second half. Products of a query
and a key stay what they are.
"""

NEIGHBOURS, HALVES = (-1, 2), (2, -1)
"""How the numbers of a head are paired, there and here."""

TURNS = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
"""The rotary positions that a file of LightningDiT keeps; they are computed here."""

Q_NORM = "blocks.0.attn.q_norm.weight"
"""There where queries and keys are normalised, and as long as a head."""

IGNORED = ("feat_rope_incontext.",)
"""What JiT computes from the same numbers, where a file keeps it."""

MODULES_THERE = {here: there for there, here in RENAMED.items()}
IN_BLOCK_THERE = {here: there for there, here in IN_BLOCK.items()}
WHOLE_THERE = {here: there for there, here in WHOLE.items()}
"""The same tables, from the names here to those there."""

HEADS = {size["width"]: size["heads"] for size in SIZES.values()}
STARTS = {12: 4, 24: 8, 32: 10}
"""Heads by width, and JiT's first block with context by depth: no tensor tells them."""


def convert(
    source: "Mapping[str, Tensor] | str | Path",
    layout: str,
    *,
    weights: str | None = None,
    **settings: Any,
) -> DiT:
    """Return a trained network as the start of a flow map, in the precision of its weights.

    Args:
        source: a file of safetensors or of torch, or a table of tensors by name. A training
            checkpoint may hold several tables.
        layout: ``"sit"``, ``"lightning-dit"`` or ``"jit"``.
        weights: which table of a training checkpoint, such as ``"model"``; by default the average
            of the weights, where there is one.
        settings: arguments of `DiT` that no tensor tells: ``heads``, where neither the width is a
            published one nor the file has rotary positions; ``context_start`` of a JiT of another
            depth; ``noise_scale``, 2 for a JiT of 512 pixels; ``average=False`` for the old
            network as it is, without the embedding of t - s.

    Raises:
        InputError: if the layout is not known, or a tensor is missing, left over or of another
            shape than the others ask for; the error names it.
        RunError: if the file cannot be read, or asks for anything but tensors.
    """
    check_choice("layout", layout, LAYOUTS)
    tensors = _without_prefixes(_table_of(source, weights))
    _check_table(tensors)
    arguments = _Sizes(tensors, layout, settings).arguments()
    with torch.device("meta"):
        made = DiT(**(arguments | settings))
    _check_fit(tensors, layout, made)
    made.load_state_dict(_from_layout(tensors, made), strict=False, assign=True)
    if made.difference is not None:
        made.difference.to_empty(device="cpu")
        made.difference.to(made.label_weight)  # type: ignore[call-overload]
        made.initialise_difference()
    return made


def to_layout(network: DiT, layout: str) -> dict[str, Tensor]:
    """Return a network's weights by the names of a layout, without the embedding of t - s.

    What comes out is what the layout's own code loads, and for s = t it computes what the network
    does as long as the embedding of t - s returns the same for t - s = 0; the rest of what was
    learned for s < t is not in the file. Save it with ``safetensors.torch.save_file``.

    Args:
        network: built by `convert`, or any `DiT` of such parts.
        layout: as in `convert`.

    Raises:
        InputError: if the network has parts that the layout has not.
    """
    check_choice("layout", layout, LAYOUTS)
    config = network.settings
    _check_parts(config, layout)
    found = {}
    for name, value in network.state_dict().items():
        if not name.startswith("difference."):
            found |= _named_there(name, value, network)
    if layout == "lightning-dit" and config["rotary"]:
        found |= _turns_of(network)
    return found


def read_checkpoint(path: str | Path, weights: str | None = None) -> dict[str, Tensor]:
    """Return a table of tensors from a file in which nothing but data is read.

    Args:
        path: a file of safetensors, by its ending, or of torch, read with ``weights_only=True``.
        weights: see `convert`.

    Raises:
        RunError: if it cannot be read, asks for anything but tensors, or holds no such table.
    """
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # The options of the run, which the training checkpoints of all three keep.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RunError(
            f"{path} cannot be read as weights, which are tensors and nothing else: "
            f"{_first_line(error)}"
        ) from error
    if not isinstance(loaded, Mapping):
        raise RunError(f"{path} holds {type(loaded).__name__}, not a table of tensors by name")
    return dict(_chosen(loaded, weights, str(path)))


# --- reading -----------------------------------------------------------------------------------


def _table_of(source: Any, weights: str | None) -> Mapping[str, Any]:
    """Return the table of tensors that is meant, from a file or from a table of tables."""
    if isinstance(source, str | Path):
        return read_checkpoint(source, weights)
    if not isinstance(source, Mapping):
        raise InputError(
            f"got source of type {type(source).__name__}; write a path, or a table of tensors, "
            "such as network.state_dict()"
        )
    return _chosen(source, weights, "the table")


def _chosen(loaded: Mapping[str, Any], weights: str | None, name: str) -> Mapping[str, Any]:
    """Return the table that is asked for, or the average, or the model, or the whole."""
    tables = {key: value for key, value in loaded.items() if isinstance(value, Mapping)}
    if weights is None:
        for key in (*AVERAGES, "model", "state_dict"):
            if key in tables:
                return tables[key]
        return loaded
    if not tables:
        raise RunError(f"got weights = {weights!r}, but {name} is one table; leave it out")
    if weights not in tables:
        raise RunError(
            f"{name} has no table {weights!r}; write one of {', '.join(map(repr, tables))}"
        )
    return tables[weights]


def _without_prefixes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors without what wrappers put before every name."""
    found = dict(tensors)
    while prefix := _prefix_of(found):
        found = {str(key).removeprefix(prefix): value for key, value in found.items()}
    return {key: value for key, value in found.items() if not str(key).startswith(IGNORED)}


def _prefix_of(tensors: Mapping[str, Any]) -> str:
    """Return what a wrapper put before every name, or nothing."""
    names = [str(key) for key in tensors]
    for prefix in PREFIXES:
        if names and all(name.startswith(prefix) for name in names):
            return prefix
    return ""


def _check_table(tensors: Mapping[str, Any]) -> None:
    if not tensors:
        raise InputError("got no tensors; write a path, or a table of tensors by name")
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(
                f"got {type(value).__name__} under {key!r}, where a tensor by name belongs; for a "
                "training checkpoint write weights='model', or the name of another table"
            )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# --- sizes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sizes:
    """What the shapes of a layout's tensors say of its network."""

    tensors: Mapping[str, Tensor]
    layout: str
    known: Mapping[str, Any]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `DiT`."""
        found = self._of_squares() | self._of_blocks()
        labels, _ = self._shape("y_embedder.embedding_table.weight", 2)
        found["classes"] = labels - 1
        found["null_trained"] = True
        found |= self._of_output(found["channels"], found["patch"])
        if self.layout == "jit":
            found |= self._of_context(found["depth"])
        return found

    def _of_squares(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.layout == "jit":
            bottleneck, channels, patch, _ = self._shape("x_embedder.proj1.weight", 4)
            found["bottleneck"] = bottleneck
        else:
            _, channels, patch, _ = self._shape("x_embedder.proj.weight", 4)
        _, cells, width = self._shape("pos_embed", 3)
        side = math.isqrt(cells)
        if side * side != cells:
            raise InputError(f"got pos_embed of {cells} cells, which are no square")
        return found | {
            "channels": channels,
            "patch": patch,
            "size": side * patch,
            "width": width,
            "heads": self._heads(width),
        }

    def _of_blocks(self) -> dict[str, Any]:
        there = self.tensors
        depth = 0
        while f"blocks.{depth}.attn.qkv.weight" in there:
            depth += 1
        norm, mlp = "layer", "gelu"
        if "blocks.0.norm1.weight" in there:
            norm = "rms"
        if "blocks.0.mlp.w12.weight" in there:
            mlp = "swiglu"
            _, hidden = self._shape("blocks.0.mlp.w3.weight", 2)
        else:
            hidden, _ = self._shape("blocks.0.mlp.fc1.weight", 2)
        return {
            "depth": depth,
            "norm": norm,
            "mlp": mlp,
            "hidden": hidden,
            "rotary": self.layout == "jit" or TURNS[0] in there,
            "normalised_heads": Q_NORM in there,
        }

    def _of_output(self, channels: int, patch: int) -> dict[str, Any]:
        numbers, _ = self._shape("final_layer.linear.weight", 2)
        if self.layout == "jit":
            return {"predicts": "data"}
        return {"predicts": "velocity", "sigma": numbers == 2 * channels * patch**2}

    def _of_context(self, depth: int) -> dict[str, Any]:
        if "in_context_posemb" not in self.tensors:
            return {}
        _, tokens, _ = self._shape("in_context_posemb", 3)
        if depth not in STARTS and "context_start" not in self.known:
            raise InputError(
                f"got a JiT of {depth} blocks, and no tensor tells before which of them the "
                "context is put; write context_start="
            )
        return {"context_tokens": tokens, "context_start": STARTS.get(depth, 0)}

    def _heads(self, width: int) -> int:
        """Return the number of heads, which no matrix tells, but positions and norms do."""
        for key in (TURNS[0], Q_NORM):
            if key in self.tensors:
                of_a_head = self.tensors[key].shape[-1]
                return max(1, width // max(1, of_a_head))
        if width not in HEADS and "heads" not in self.known:
            raise InputError(
                f"got tensors of width {width}, and none tells the number of heads; write heads="
            )
        return HEADS.get(width, 1)

    def _shape(self, key: str, axes: int) -> tuple[int, ...]:
        if key not in self.tensors:
            first = next(iter(self.tensors))
            raise InputError(
                f"got no tensor {key} for the layout {self.layout!r}; there are "
                f"{len(self.tensors)}, such as {first}"
            )
        shape = tuple(self.tensors[key].shape)
        if len(shape) != axes or 0 in shape:
            raise InputError(f"got {key} of shape {shape}, where {axes} axes belong")
        return shape


def _check_fit(tensors: Mapping[str, Tensor], layout: str, made: DiT) -> None:
    """Refuse a table that is not exactly the tensors of the network, by the first that is not."""
    expected = to_layout(made, layout)
    for key, wanted in expected.items():
        shape = tuple(wanted.shape)
        if key not in tensors:
            raise InputError(
                f"got no tensor {key}, of shape {shape}, for the layout {layout!r}; the other "
                "tensors ask for it"
            )
        given = tensors[key]
        if given.shape != shape:
            raise InputError(
                f"got {key} of shape {tuple(given.shape)}, where the other tensors ask for {shape}"
            )
        if not given.is_floating_point():
            raise InputError(f"got {key} of {given.dtype}, where real numbers belong")
    for key, value in tensors.items():
        computed = layout == "jit" and key.startswith("feat_rope.")
        if key not in expected and not computed:
            raise InputError(
                f"got {key} of shape {tuple(value.shape)}, which the layout {layout!r} does not "
                "have"
            )
    for key, turns in _turns_of(made).items():
        if key in tensors and not torch.allclose(tensors[key].float(), turns, atol=1e-3):
            raise InputError(f"got {key} of other rotary positions than those of the grid")


# --- names -------------------------------------------------------------------------------------


def _from_layout(tensors: Mapping[str, Tensor], made: DiT) -> dict[str, Tensor]:
    """Return the tensors by their names here, each with memory of its own."""
    found = {}
    for key, value in tensors.items():
        if key in WHOLE:
            found[WHOLE[key]] = value
            continue
        module, _, kind = key.rpartition(".")
        if module in RENAMED:
            found[f"{RENAMED[module]}.{kind}"] = value
        elif module.startswith("blocks."):
            _, number, name = module.split(".", 2)
            for here, tensor in _of_block(name, kind, value, made).items():
                found[f"blocks.{number}.{here}"] = tensor
    return {name: value.detach().clone() for name, value in found.items()}


def _of_block(name: str, kind: str, value: Tensor, made: DiT) -> dict[str, Tensor]:
    """Return the tensors of a block's module by their names here."""
    if name == "mlp.w12":
        gate, linear = value.chunk(2)
        return {f"mlp.fc1_g.{kind}": gate, f"mlp.fc1_x.{kind}": linear}
    if name in GATED:
        return {f"{GATED[name]}.{kind}": value}
    if name in TURNED and made.config["rotary"]:
        value = _reordered(name, value, made.config["heads"], NEIGHBOURS)
    return {f"{IN_BLOCK[name]}.{kind}": value}


def _named_there(name: str, value: Tensor, network: DiT) -> dict[str, Tensor]:
    """Return a tensor by its name there; nothing of the second part of what is one there."""
    value = value.detach()
    if name in WHOLE_THERE:
        return {WHOLE_THERE[name]: value}
    module, _, kind = name.rpartition(".")
    if module in MODULES_THERE:
        return {f"{MODULES_THERE[module]}.{kind}": value}
    config = network.config
    _, number, module = module.split(".", 2)
    place = f"blocks.{number}"
    if module == "mlp.fc1_x":
        return {}
    if module == "mlp.fc1_g":
        linear = network.get_parameter(f"{place}.mlp.fc1_x.{kind}")
        return {f"{place}.mlp.w12.{kind}": torch.cat([value, linear.detach()])}
    if module == "mlp.fc2" and config["mlp"] == "swiglu":
        return {f"{place}.mlp.w3.{kind}": value}
    there = IN_BLOCK_THERE[module]
    if there in TURNED and config["rotary"]:
        value = _reordered(there, value, config["heads"], HALVES)
    return {f"{place}.{there}.{kind}": value}


def _reordered(name: str, value: Tensor, heads: int, pairs: tuple[int, int]) -> Tensor:
    """Put the numbers of queries and keys, or of a norm of one head, into another order.

    Args:
        name: of the module there.
        value: its weight or bias.
        heads: of the attention.
        pairs: `NEIGHBOURS` from their order to ours, `HALVES` from ours to theirs.
    """
    if name != "attn.qkv":
        return value.unflatten(0, pairs).T.flatten()
    q, k, v = value.unflatten(0, (3, heads, *pairs)).unbind(0)
    parts = [q.transpose(1, 2), k.transpose(1, 2), v]
    return torch.cat([part.flatten(0, 2) for part in parts])


def _turns_of(network: DiT) -> dict[str, Tensor]:
    """Return the rotary positions as a file of LightningDiT has them, ``(cells, head)``."""
    side = network.config["size"] // network.config["patch"]
    cosine, sine = network.turns(side, side, torch.device("cpu"))
    cosine, _ = cosine.chunk(2, 1)
    _, sine = sine.chunk(2, 1)
    parts = [part.repeat_interleave(2, 1) for part in (cosine, sine)]
    return dict(zip(TURNS, parts, strict=True))


def _check_parts(config: Mapping[str, Any], layout: str) -> None:
    """Refuse a network that has what a layout has no name for."""
    own = (config["outputs"], config["output_patch"])
    has = {"a pixel head": own != (None, None)}
    if layout == "jit":
        has["no bottleneck"] = not config["bottleneck"]
        has["velocities"] = config["predicts"] != "data"
    else:
        has["a bottleneck"] = bool(config["bottleneck"])
        has["context tokens"] = bool(config["context_tokens"])
        has["rotary positions"] = config["rotary"] and layout == "sit"
        has["clean data"] = config["predicts"] != "velocity"
    for part, found in has.items():
        if found:
            raise InputError(
                f"got a network with {part}, for which the layout {layout!r} has no name; write "
                "network.save_pretrained(folder)"
            )
