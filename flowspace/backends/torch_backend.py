"""torch: arrays are tensors, randomness comes from a generator, which moves on as it is drawn
from.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import (
    Tensor,
    clamp,
    isfinite,
    maximum,
    minimum,
    ones_like,
    sigmoid,
    sign,
    square,
    where,
    zeros_like,
)
from torch.overrides import handle_torch_function, has_torch_function

from flowspace.backends.process import forward_mode_lock
from flowspace.errors import InputError

__all__ = [
    "as_array",
    "as_float64",
    "at_least_float32",
    "cast",
    "clamp",
    "detach",
    "device",
    "elementwise",
    "flatten",
    "has_values",
    "is_array",
    "is_floating",
    "isfinite",
    "like",
    "maximum",
    "minimum",
    "normal",
    "off_diagonal",
    "one_per_row",
    "ones_like",
    "sigmoid",
    "sign",
    "split",
    "square",
    "time_derivative",
    "time_dtype",
    "to_float",
    "uniform",
    "where",
    "zeros_like",
]

to_float = "{}.float()"
"""How a user makes real numbers of whole ones; for messages."""


def is_array(value: Any) -> bool:
    """Return whether a value is a tensor."""
    return isinstance(value, Tensor)


def is_floating(array: Tensor) -> bool:
    """Return whether a tensor is of real numbers."""
    return array.is_floating_point()


def as_array(value: Any, like: Any = None) -> Tensor:
    """Return a number or tensor as a tensor, on the device of another."""
    if like is not None:
        return torch.as_tensor(value, device=like.device)
    if isinstance(value, Tensor):  # a tensor stays itself, also to what follows its functions
        return value
    return torch.as_tensor(value)


def cast(array: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype."""
    return array.to(dtype)


def at_least_float32(array: Tensor) -> Tensor:
    """Return a tensor in at least float32."""
    if array.dtype.itemsize >= 4:
        return array
    return array.float()


def as_float64(array: Tensor) -> Tensor:
    """Return a tensor in float64."""
    return array.double()


def time_dtype(states: Tensor) -> torch.dtype:
    """Return the dtype of times beside states: float32, or float64 if they are."""
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def device(array: Tensor) -> torch.device:
    """Return where a tensor is."""
    return array.device


def like(value: Any, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a number or tensor in the shape of another, in its own dtype or the one given; a
    number in the other's.
    """
    if not isinstance(value, Tensor):
        number = float(value)
        if like.is_floating_point() and torch.finfo(like.dtype).max < abs(number) < math.inf:
            raise InputError(f"got {number:g}, which {like.dtype} cannot hold; give float64 times")
        return torch.full_like(like, number)
    if dtype is not None:
        value = value.to(dtype)
    if value.shape == like.shape:
        return value
    return value.expand_as(like)


def one_per_row(time: Tensor, rows: int) -> Tensor:
    """Return a tensor of shape ``()`` or ``(rows,)`` in shape ``(rows,)``."""
    return time.expand(rows).contiguous()


def flatten(array: Tensor) -> Tensor:
    """Return a tensor of shape ``(B, *)`` in shape ``(B, n)``."""
    if array.ndim > 1:
        return array.flatten(1)
    return array.unsqueeze(1)


def elementwise(name: str, array: Tensor) -> Tensor:
    """Apply a function of math, by its name, to each element."""
    return getattr(torch, name)(array)


def off_diagonal(t: Tensor, s: Tensor) -> Tensor:
    """Return where t is so far above s that b(t, s), rounded, has its sign."""
    return s < t


def detach(array: Tensor) -> Tensor:
    """Return a tensor through which no gradient flows."""
    return array.detach()


def has_values(array: Tensor) -> bool:
    """Return whether a tensor has values to ask for: not if it belongs to a transform of
    torch.func.
    """
    if torch.compiler.is_compiling():
        return True
    return not torch._C._functorch.is_functorch_wrapped_tensor(array)  # pyright: ignore


def time_derivative(function: Callable[..., Tensor], time: Tensor, *rest: Tensor) -> Tensor:
    """Return the derivative of an elementwise function in its first argument."""
    if has_torch_function((time,)):
        # A route may differentiate this in turn: as one function, it can.
        return handle_torch_function(time_derivative, (time,), function, time, *rest)
    time = time.contiguous()
    with forward_mode_lock:
        return torch.func.jvp(lambda u: function(u, *rest), (time,), (torch.ones_like(time),))[1]


def split(generator: torch.Generator | None, count: int) -> tuple[torch.Generator | None, ...]:
    """Return the sources of that many draws: the generator itself each time."""
    return (generator,) * count


def uniform(shape: tuple[int, ...], how: dict[str, Any]) -> Tensor:
    """Draw uniformly from [0, 1)."""
    return torch.rand(shape, **_told(how))


def normal(shape: tuple[int, ...], how: dict[str, Any]) -> Tensor:
    """Draw standard normal numbers."""
    return torch.randn(shape, **_told(how))


def _told(how: dict[str, Any]) -> dict[str, Any]:
    """Return how numbers are drawn, without what is None.

    A function that is told of a generator, be it None, does not take the sizes of a compiled
    step, which may be symbols.
    """
    return {name: value for name, value in how.items() if value is not None}
