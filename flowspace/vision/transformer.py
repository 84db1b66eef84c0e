"""What the transformers of this package share: blocks that are compiled or checkpointed one by
one, labels with a null class, presets, and how layers begin.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowspace.errors import InputError
from flowspace.vision.checked_model import CheckedModel

__all__ = [
    "SMALL",
    "LabelledTransformer",
    "check_choice",
    "check_rotary",
    "embedding_of_labels",
    "initialise_linear",
    "initialise_small",
    "preset_of",
]

SMALL = 0.02
"""The standard deviation of embeddings at the beginning, that of DiT."""

Self = TypeVar("Self", bound="LabelledTransformer")


class LabelledTransformer(CheckedModel):
    """A network of equal blocks, of which labels from 0 to classes - 1 may be told.

    A subclass has ``classes`` and ``null_trained`` among its arguments, and sets ``label`` and
    ``gradient_checkpointing``.

    Attributes:
        label: the embedding of labels, whose last entry is the null class; None without classes.
        gradient_checkpointing: whether blocks are run again in the backward pass.
    """

    _supports_gradient_checkpointing = True
    label: nn.Embedding | None
    gradient_checkpointing: bool

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor that it was built with."""
        return {key: value for key, value in self.config.items() if not key.startswith("_")}

    def compile_blocks(self: Self, **options: Any) -> Self:
        """Compile each block in place; returns itself.

        Equal blocks share one graph, in a fraction of the time that the whole network takes to
        compile. What is left out, the embeddings and the head, is small. Weights and their names
        stay as they are.

        Args:
            options: those of ``torch.compile``.
        """
        self.compile_repeated_blocks(**options)
        return self

    def require_null(self) -> int:
        """Return the label of the null class.

        Raises:
            InputError: if it was not trained: its embedding is then what it began with.
        """
        if not self.config["null_trained"]:
            raise InputError(
                "got a network whose null class was not trained, which guidance and drawing "
                "without labels need; write labels, or network.register_to_config("
                "null_trained=True) if labels were dropped in training"
            )
        return self.config["classes"]

    def check_labels(self, labels: Any) -> None:
        """Refuse labels for a network without classes, and none for one that has some.

        Raises:
            InputError: in both cases.
        """
        if self.label is None and labels is not None:
            raise InputError("got labels for a network without classes; leave them out")
        if self.label is not None and labels is None:
            classes = self.config["classes"]
            raise InputError(
                f"got no labels; write labels= with classes from 0 to {classes - 1}, or "
                f"{classes} for none"
            )

    def through(self, blocks: Iterable[nn.Module], x: Tensor, *context: Any) -> Tensor:
        """Return tokens after some blocks, each given the same context."""
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *context, use_reentrant=False)
            else:
                x = block(x, *context)
        return x


def embedding_of_labels(classes: int, width: int) -> nn.Embedding | None:
    """Return the embedding of so many labels and of the null class; None without classes."""
    if not classes:
        return None
    return nn.Embedding(classes + 1, width)


def preset_of(presets: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Return the arguments that a preset stands for.

    Raises:
        InputError: if there is no preset of that name.
    """
    if name not in presets:
        raise InputError(f"got preset {name!r}; write one of {', '.join(presets)}")
    return presets[name]


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse an argument that is none of the choices.

    Raises:
        InputError: if it is none; the error has the argument's name and the choices.
    """
    if value not in choices:
        raise InputError(f"got {name} = {value!r}; write one of {', '.join(map(repr, choices))}")


def check_rotary(width: int, heads: int, part: str = "") -> None:
    """Refuse a width of whose heads rotary positions cannot turn pairs for rows and for columns.

    Args:
        width: of the tokens.
        heads: of the attention.
        part: what stands before the names of both arguments, for the error.

    Raises:
        InputError: if the width is no multiple of 4 heads.
    """
    if width % (4 * heads):
        raise InputError(
            f"got {part}width = {width}, {part}heads = {heads}; rotary positions need a width "
            "that is a multiple of 4 heads"
        )


def initialise_linear(layer: nn.Linear | nn.Conv2d) -> None:
    """Draw the matrix of a layer as Xavier's rule says; its biases begin at zero."""
    nn.init.xavier_uniform_(layer.weight.flatten(1))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def initialise_small(*layers: nn.Linear | nn.Embedding | None) -> None:
    """Draw the weights of layers from a normal distribution of spread 0.02; None is no layer."""
    for layer in layers:
        if layer is not None:
            nn.init.normal_(layer.weight, std=SMALL)
