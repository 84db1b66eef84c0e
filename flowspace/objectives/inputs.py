"""What an objective asks of its inputs, and how a model is evaluated at given states and times."""

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowspace.arrays import Model
from flowspace.backends import torch_backend
from flowspace.derivatives.replay import on_copies
from flowspace.derivatives.route import checked
from flowspace.errors import InputError

__all__ = [
    "Batch",
    "check_model",
    "checked_batch",
    "checked_cond",
    "evaluated",
    "first_time",
    "refuse_unfit",
    "require",
    "signature_of",
    "takes",
    "warn_of_scale",
    "warn_once",
]

WIDE = 100.0
"""Latents with a spread this many times the noise's are taken for unscaled ones."""

_seen: set[str] = set()
"""What was looked at or said in this process."""


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
    cond: dict[str, Any]
    noise: Tensor | None
    generator: Any
    library: Any

    @property
    def data(self) -> Tensor:
        """What the model is to output: the targets, or the latents."""
        if self.targets is None:
            return self.latents
        return self.targets


def require(holds: bool, name: str, value: Any, remedy: str) -> None:
    """Raise InputError with what came and what to write instead, unless a condition holds."""
    if not holds:
        raise InputError(f"got {name} = {value!r}; {remedy}")


def first_time(what: str) -> bool:
    """Return whether this is the first time in the process that something is asked about.

    While torch.compile captures a step the answer is no, so that no look becomes part of it.
    """
    if torch.compiler.is_compiling() or what in _seen:
        return False
    _seen.add(what)
    return True


def warn_once(text: str) -> None:
    """Warn, once in a process for each text."""
    if first_time(text):
        warnings.warn(text, UserWarning, stacklevel=5)


def evaluated(model: Model, z_t: Tensor, t: Tensor, s: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """Return what a model gives at states and times, which it may write into: it gets copies."""
    return checked(on_copies(lambda *inputs: model(*inputs, **cond))(z_t, t, s), (z_t,))


def signature_of(model: Any) -> inspect.Signature:
    """Return the arguments of a model: those of `forward` where it is a torch module."""
    while isinstance(inner := getattr(model, "module", None), torch.nn.Module):
        model = inner
    if isinstance(model, torch.nn.Module):
        return inspect.signature(model.forward)
    return inspect.signature(model)


def takes(function: Any, *arguments: Any, **keywords: Any) -> bool:
    """Return whether a function, no class, can be called with these arguments, if it tells."""
    if not callable(function) or isinstance(function, type):
        return False
    try:
        signature = signature_of(function)
    except (TypeError, ValueError):  # callables that do not tell their arguments
        return True
    try:
        signature.bind(*arguments, **keywords)
    except TypeError:
        return False
    return True


def refuse_unfit(model: Any, cond: Mapping[str, Any], error: TypeError) -> None:
    """Raise InputError if a model cannot be called as it is called."""
    try:
        signature = signature_of(model)
    except (TypeError, ValueError):  # callables that do not tell their arguments
        return
    try:
        signature.bind(None, None, None, **cond)
    except TypeError as unfit:
        named = "".join(f", {name}=..." for name in cond)
        raise InputError(
            f"got a model with the arguments {signature}, which cannot be called as "
            f"model(z_t, t, s{named}): {unfit}; write it as def model(z_t, t, s, **cond), where "
            "cond has other names than z_t, t and s"
        ) from error


def checked_cond(cond: Any) -> dict[str, Any]:
    """Return cond as a dict.

    Raises:
        InputError: unless it names the model's arguments.
    """
    if cond is None:
        return {}
    if not isinstance(cond, Mapping):
        raise InputError(
            f"got cond of type {type(cond).__name__}; write a dict of the model's arguments, as "
            "in {'labels': y}"
        )
    return dict(cond)


def check_model(model: Any) -> None:
    """Raise InputError for what cannot be called, and for a class in place of its object."""
    if isinstance(model, type):
        raise InputError(
            f"got model = {model.__name__}, a class; write an object of it, {model.__name__}(...)"
        )
    if not callable(model):
        raise InputError(
            f"got model = {model!r}, which cannot be called; write a function (z_t, t, s, **cond)"
        )


def checked_batch(batch: Batch) -> Batch:
    """Return a batch that may be used.

    Raises:
        InputError: unless latents, targets and noise are real numbers, as many rows of latents and
            targets, and the generator is one.
    """
    xp, noise = batch.library, batch.noise
    _check_array("latents", batch.latents, xp)
    _check_array("targets", batch.data, xp)
    if len(batch.latents) != len(batch.data):
        raise InputError(
            f"got {len(batch.latents)} latents and {len(batch.data)} targets; each row needs its "
            "pair"
        )
    if noise is not None and not (xp.is_array(noise) and xp.is_floating(noise)):
        raise InputError(
            f"got noise of {_kind(noise)}; write real numbers of the latents' shape, or leave it "
            "out"
        )
    is_source = batch.generator is None or isinstance(batch.generator, torch.Generator)
    if xp is torch_backend and not is_source:
        raise InputError(
            f"got generator = {batch.generator!r}; write torch.Generator().manual_seed(0), or "
            "leave it out"
        )
    return batch


def _check_array(name: str, array: Any, xp: Any) -> None:
    if not xp.is_array(array) or not xp.is_floating(array) or array.ndim < 1:
        raise InputError(
            f"got {name} of {_kind(array)}; a tensor of real numbers of shape (B, *) is needed"
        )
    if 0 in array.shape:
        raise InputError(
            f"got {name} of shape {tuple(array.shape)}, which hold no number; write at least one "
            "row of one number"
        )


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
            "got latents that are not all finite, so the loss is not either; look at the encoder: "
            "half precision overflows in some, which float32 mends"
        )
        return
    spread = float(xp.detach(latents).std())
    if spread > WIDE:
        warn_once(
            f"got latents with a spread of {spread:.3g} beside noise with a spread of 1, which "
            "disappears in them; subtract their mean and divide by their spread"
        )


def _kind(value: Any) -> str:
    """Return what came, for messages: dtype and shape, or a type."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} and shape {tuple(value.shape)}"
    return f"type {type(value).__name__}"
