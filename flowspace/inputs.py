"""What is asked of what a user passes in, and how it is said."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from flowspace.backends import backend_of
from flowspace.errors import InputError

__all__ = [
    "check_model",
    "check_states",
    "checked_cond",
    "first_time",
    "kind_of",
    "refuse_unfit",
    "require",
    "signature_of",
    "takes",
    "warn_once",
]

_seen: set[str] = set()
"""What was looked at or said in this process."""


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


def kind_of(value: Any) -> str:
    """Return what came, for messages: dtype and shape, or a type."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"dtype {value.dtype} and shape {tuple(value.shape)}"
    return f"type {type(value).__name__}"


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
            f"got a model with the arguments {signature}, "
            f"which cannot be called as model(z_t, t, s{named}): {unfit}; "
            "write it as def model(z_t, t, s, **cond), "
            "where cond has other names than z_t, t and s"
        ) from error


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


def checked_cond(cond: Any) -> dict[str, Any]:
    """Return cond as a dict.

    Raises:
        InputError: unless it names the model's arguments.
    """
    if cond is None:
        return {}
    if not isinstance(cond, Mapping):
        raise InputError(
            f"got cond of type {type(cond).__name__}; "
            "write a dict of the model's arguments, as in {'labels': y}"
        )
    return dict(cond)


def check_states(name: str, states: Any) -> None:
    """Raise InputError unless states are real numbers of shape ``(B, *)``, B at least 1."""
    xp = backend_of(states)
    are_numbers = xp.is_array(states) and xp.is_floating(states)
    if not are_numbers or states.ndim < 1:
        raise InputError(
            f"got {name} of {kind_of(states)}; a tensor of real numbers of shape (B, *) is needed"
        )
    if 0 in states.shape:
        raise InputError(
            f"got {name} of shape {tuple(states.shape)}, which hold no number; "
            "write at least one row of one number"
        )
