"""The batch that an objective is called with, and how a model is evaluated on it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from flowspace.arrays import Cond, Model
from flowspace.derivatives.reached import OnCopies
from flowspace.derivatives.route import checked
from flowspace.errors import InputError
from flowspace.inputs import (
    check_device,
    check_real,
    check_source,
    check_states,
    first_time,
    kind_of,
    warn_once,
)

__all__ = [
    "Batch",
    "check_output",
    "checked_batch",
    "evaluated",
    "warn_of_scale",
    "with_fields",
]

WIDE = 100.0
"""Latents with a spread this many times the noise's are taken for unscaled ones."""


class Batch(NamedTuple):
    """What the caller of an objective gave, checked.

    Attributes:
        latents: clean latents, of shape ``(B, *)``.
        targets: what the model outputs, of shape ``(B, *)``, or None for the latents.
        cond: keyword arguments of the model.
        noise: of the latents' shape, or None if it is to be drawn.
        generator: the source of what is drawn: a torch.Generator, a key of JAX, or None.
        library: the functions of the arrays, `flowspace.backends`.
    """

    latents: Tensor
    targets: Tensor | None
    cond: Cond
    noise: Tensor | None
    generator: Any
    library: Any

    @property
    def data(self) -> Tensor:
        """What the model is to output: the targets, or the latents."""
        if self.targets is None:
            return self.latents
        return self.targets


Record = TypeVar("Record", bound=tuple)
"""A named tuple."""


def with_fields(record: Record, **changes: Any) -> Record:
    """Return a named tuple with other values in some fields.

    It is `_replace`, which torch.compile of torch 2.11 does not follow.
    """
    return type(record)(**{**record._asdict(), **changes})  # type: ignore[attr-defined]


def evaluated(model: Model, z_t: Tensor, t: Tensor, s: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """Return what a model gives at states and times, which it may write into: it gets copies."""

    def call(*inputs: Tensor) -> Tensor:
        return model(*inputs, **cond)

    output = OnCopies(call)(z_t, t, s)
    return checked(output, (z_t,))


def check_output(f: Tensor, like: Tensor) -> None:
    """Raise InputError unless a model returned real numbers of the targets' shape."""
    if f.shape != like.shape:
        raise InputError(
            f"got shape {tuple(f.shape)} from the model, "
            f"but the targets have {tuple(like.shape)}; "
            "give targets= of what the model returns"
        )
    check_real(f)


def checked_batch(batch: Batch) -> Batch:
    """Return a batch that may be used.

    Raises:
        InputError: unless latents, targets and noise are real numbers on one device, as many rows
            of latents and targets, and the generator is one.
    """
    xp, noise = batch.library, batch.noise
    check_states("latents", batch.latents)
    check_states("targets", batch.data)
    if len(batch.latents) != len(batch.data):
        raise InputError(
            f"got {len(batch.latents)} latents and {len(batch.data)} targets; "
            "each row needs its pair"
        )
    are_numbers = xp.is_array(noise) and xp.is_floating(noise)
    if noise is not None and not are_numbers:
        raise InputError(
            f"got noise of {kind_of(noise)}; "
            "write real numbers of the latents' shape, or leave it out"
        )
    check_device("targets", batch.data, batch.latents)
    check_device("noise", noise, batch.latents)
    check_source(batch.generator, batch.latents)
    return batch


def warn_of_scale(owner: str, batch: Batch) -> None:
    """Warn of latents that are not finite, or far wider than the noise, in an owner's first batch.

    Only the first batch of each kind of objective is looked at: a look waits for the device.
    """
    xp, latents = batch.library, batch.latents
    if not xp.has_values(latents) or not first_time(f"latents of {owner}"):
        return
    largest = float(abs(xp.detach(latents)).max())
    if not largest < math.inf:
        warn_once(
            "got latents that are not all finite, so the loss is not either; "
            "look at the encoder: half precision overflows in some, which float32 mends"
        )
        return
    spread = float(xp.detach(latents).std())
    if spread > WIDE:
        warn_once(
            f"got latents with a spread of {spread:.3g} beside noise "
            "with a spread of 1, which disappears in them; "
            "subtract their mean and divide by their spread"
        )
