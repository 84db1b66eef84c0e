"""What is asked of what a user passes in, and how it is said."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowspace.backends import backend_of
from flowspace.errors import InputError

__all__ = [
    "check_device",
    "check_flag",
    "check_generator",
    "check_model",
    "check_real",
    "check_source",
    "check_states",
    "checked_cond",
    "first_time",
    "is_function",
    "kind_of",
    "refuse_misfit",
    "refuse_unfit",
    "require",
    "signature_of",
    "takes",
    "velocity_of",
    "warn_once",
]

_seen: set[str] = set()
"""What was looked at or said in this process."""


def require(holds: bool, name: str, value: Any, remedy: str) -> None:
    """Raise InputError with what came and what to write instead, unless a condition holds."""
    if not holds:
        raise InputError(f"got {name} = {value!r}; {remedy}")


def check_flag(name: str, value: Any) -> None:
    """Raise InputError unless a switch is True or False: every text is true, also "no"."""
    require(isinstance(value, bool), name, value, "write True or False")


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


def is_function(value: Any) -> bool:
    """Return whether a value can be called, and is no class in place of its object."""
    return callable(value) and not isinstance(value, type)


def takes(function: Any, *arguments: Any, **keywords: Any) -> bool:
    """Return whether a function, no class, can be called with these arguments, if it tells.

    Within a step that torch.compile captures it is not asked: on Python 3.14 `inspect.signature`
    has a cache, which torch warns of.
    """
    if not is_function(function):
        return False
    if torch.compiler.is_compiling():
        return True
    try:
        signature = signature_of(function)
    except (TypeError, ValueError):  # callables that do not tell their arguments
        return True
    try:
        signature.bind(*arguments, **keywords)
    except TypeError:
        return False
    return True


def refuse_unfit(
    function: Any,
    cond: Mapping[str, Any],
    error: TypeError,
    name: str = "model",
    arguments: Sequence[str] = ("z_t", "t", "s"),
) -> None:
    """Raise InputError if a function of the user cannot be called as it is called.

    Args:
        function: a model, or a velocity.
        cond: its arguments by name.
        error: that the call raised.
        name: of the function, for the message.
        arguments: its arguments by place.
    """
    try:
        signature = signature_of(function)
    except (TypeError, ValueError):  # callables that do not tell their arguments
        return
    try:
        signature.bind(*arguments, **cond)
    except TypeError as unfit:
        placed = ", ".join(arguments)
        named = "".join(f", {each}=..." for each in cond)
        others = f"{', '.join(arguments[:-1])} and {arguments[-1]}"
        raise InputError(
            f"got a {name} with the arguments {signature}, "
            f"which cannot be called as {name}({placed}{named}): {unfit}; "
            f"write it as def {name}({placed}, **cond), "
            f"where cond has other names than {others}"
        ) from error


def refuse_misfit(model: Any, states: Any, error: RuntimeError, name: str = "latents") -> None:
    """Raise InputError if a module failed on states of another device or dtype than its weights.

    Args:
        model: what was called.
        states: what it was called with.
        error: that the call raised.
        name: of the states, for the message.
    """
    if not isinstance(model, torch.nn.Module) or not isinstance(states, Tensor):
        return
    if not any(word in str(error) for word in ("device", "dtype", "type")):
        return
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    if not weights:
        return
    device, dtype = weights[0].device, weights[0].dtype
    if device != states.device:
        raise InputError(
            f"got {name} on {states.device} for a model on {device}; "
            f"write {name}.to({str(device)!r})"
        ) from error
    if dtype != states.dtype and not torch.is_autocast_enabled(device.type):
        raise InputError(
            f"got {name} of {states.dtype} for a model of {dtype}; write {name}.to({dtype})"
        ) from error


def velocity_of(
    name: str, function: Callable[..., Any], z_t: Any, t: Any, cond: Mapping[str, Any]
) -> Any:
    """Return what a user's velocity gives at states ``(B, *)`` and times ``(B,)``.

    Raises:
        InputError: if it cannot be called with them, or returns anything but one array of the
            states' shape.
    """
    try:
        velocity = function(z_t, t, **cond)
    except TypeError as error:
        refuse_unfit(function, cond, error, name, ("z_t", "t"))
        raise
    except RuntimeError as error:
        refuse_misfit(function, z_t, error, "states")
        raise
    if not backend_of(z_t).is_array(velocity):
        raise InputError(
            f"got {kind_of(velocity)} from {name}; return one array of the states' shape"
        )
    check_device(f"the output of {name}", velocity, z_t)
    if velocity.shape != z_t.shape:
        raise InputError(
            f"got shape {tuple(velocity.shape)} from {name} "
            f"for states of shape {tuple(z_t.shape)}; "
            "return a velocity of the states' shape"
        )
    return velocity


def check_model(model: Any) -> None:
    """Raise InputError for what cannot be called, and for a class in place of its object."""
    if isinstance(model, type):
        raise InputError(
            f"got model = {model.__name__}, a class; write an object of it, {model.__name__}(...)"
        )
    if not callable(model):
        came = repr(model)
        if backend_of(model).is_array(model):
            came = f"an array of {kind_of(model)}"
        raise InputError(
            f"got model = {came}, which cannot be called; write a function (z_t, t, s, **cond)"
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


def check_device(what: str, array: Any, states: Any) -> None:
    """Raise InputError if a tensor is on another device than the states or latents."""
    if not isinstance(array, Tensor) or not isinstance(states, Tensor):
        return
    if array.device != states.device:
        raise InputError(
            f"got {what} on {array.device} beside latents on {states.device}; "
            f"move it there by .to({str(states.device)!r})"
        )


def check_real(output: Any) -> None:
    """Raise InputError unless a model returned real numbers."""
    if not backend_of(output).is_floating(output):
        raise InputError(
            f"got dtype {output.dtype} from the model; it is to return real numbers, "
            "so return .real or .float() of it"
        )


def check_source(generator: Any, beside: Any) -> None:
    """Raise InputError unless what is drawn beside tensors has a generator of torch, or None."""
    if isinstance(beside, Tensor):
        check_generator(generator)


def check_generator(generator: Any) -> None:
    """Raise InputError unless a generator is one of torch, or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(
            f"got generator = {generator!r}; "
            "write torch.Generator().manual_seed(0), or leave it out"
        )
