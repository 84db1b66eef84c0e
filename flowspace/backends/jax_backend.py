"""JAX: arrays may be traced, randomness comes from a key, and nothing depends on values that are
not known yet.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.core import Tracer
from jax.lax import stop_gradient as detach
from jax.nn import sigmoid
from jax.numpy import isfinite, maximum, minimum, ones_like, sign, square, where, zeros_like

from flowspace.errors import DerivativeError, InputError

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
    "on_tensors",
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
    "value_and_derivative",
    "where",
    "zeros_like",
]

to_float = "{}.astype(float)"
"""How a user makes real numbers of whole ones; for messages."""

RESOLUTION = 1e-5
"""How far apart t and s must be for b, a difference of numbers near 1 in float32, to have its
sign.
"""


def is_array(value: Any) -> bool:
    """Return whether a value is an array of JAX."""
    return isinstance(value, jax.Array)


def is_floating(array: Any) -> bool:
    """Return whether an array is of real numbers."""
    return jnp.issubdtype(array.dtype, jnp.floating)


def as_array(value: Any, like: Any = None) -> Any:
    """Return a number or array as an array; a number in the dtype of another."""
    if isinstance(value, float) and like is not None:
        return jnp.asarray(value, like.dtype)
    return jnp.asarray(value)


def cast(array: Any, dtype: Any) -> Any:
    """Return an array in a dtype."""
    return array.astype(dtype)


def at_least_float32(array: Any) -> Any:
    """Return an array in at least float32."""
    if array.dtype.itemsize >= 4:
        return array
    return array.astype(jnp.float32)


def as_float64(array: Any) -> Any:
    """Return an array in float64, or in float32 where JAX has no float64 switched on."""
    return array.astype(jnp.result_type(float))


def time_dtype(states: Any) -> Any:
    """Return the dtype of times beside states: float32, or float64 if they are."""
    return jnp.dtype("float64" if states.dtype == "float64" else "float32")


def device(array: Any) -> None:
    """Return None: JAX places what it computes by itself."""


def like(value: Any, like: Any, dtype: Any = None) -> Any:
    """Return a number or array in the shape of another, in its own dtype or the one given; a
    number in the other's.
    """
    if not isinstance(value, jax.Array):
        return jnp.full_like(like, float(value))
    if dtype is not None:
        value = value.astype(dtype)
    return jnp.broadcast_to(value, like.shape)


def one_per_row(time: Any, rows: int) -> Any:
    """Return an array of shape ``()`` or ``(rows,)``, or a tensor of one known time, in shape
    ``(rows,)``.
    """
    if isinstance(time, torch.Tensor):
        time = time.numpy()
    return jnp.broadcast_to(time, (rows,))


def flatten(array: Any) -> Any:
    """Return an array of shape ``(B, *)`` in shape ``(B, n)``."""
    rows, *axes = array.shape
    return array.reshape(rows, math.prod(axes))


def clamp(array: Any, low: float | None = None, high: float | None = None) -> Any:
    """Return an array with its values moved into [low, high]."""
    return jnp.clip(array, low, high)


def elementwise(name: str, array: Any) -> Any:
    """Apply a function of math, by its name, to each element."""
    if name == "erf":
        return jax.scipy.special.erf(array)
    return getattr(jnp, name)(array)


def off_diagonal(t: Any, s: Any) -> Any:
    """Return where t is so far above s that b(t, s), rounded, has its sign."""
    if jnp.result_type(float) == "float64":
        return s < t
    return t - s > RESOLUTION


def has_values(array: Any) -> bool:
    """Return whether an array has values to ask for: not while JAX traces."""
    return not isinstance(array, Tracer)


def time_derivative(function: Callable[..., Any], time: Any, *rest: Any) -> Any:
    """Return the derivative of an elementwise function in its first argument."""
    return jax.jvp(lambda u: function(u, *rest), (time,), (jnp.ones_like(time),))[1]


def value_and_derivative(
    fn: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any | None]
) -> tuple[Any, Any]:
    """Return fn(*primals) with gradient and its directional derivative without, in one pass; None
    is a constant.
    """
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def of_moving(*inputs: Any) -> Any:
        arguments = list(primals)
        for i, moved in zip(moving, inputs, strict=True):
            arguments[i] = moved
        return fn(*arguments)

    inputs = tuple(primals[i] for i in moving)
    directions = []
    for i in moving:
        tangent: Any = tangents[i]
        directions.append(tangent.astype(primals[i].dtype))
    try:
        value, derivative = jax.jvp(of_moving, inputs, tuple(directions))
    except Exception as error:
        if type(error).__name__ == "TraceContextError":
            raise DerivativeError(
                "got a model that changes a state of flax.nnx within the derivative, "
                "such as the counter of its Dropout's draws; "
                "pass what it draws in cond, or switch it off by model.eval()"
            ) from error
        if not isinstance(error, TypeError) or "custom_vjp" not in str(error):
            raise
        raise DerivativeError(
            "the model has a jax.custom_vjp function, which has no forward derivative; "
            "define it by jax.custom_jvp, or write derivative=FiniteDifference()"
        ) from error
    return value, jax.tree.map(detach, derivative)


def split(generator: Any, count: int) -> tuple[Any, ...]:
    """Return that many independent keys.

    Raises:
        InputError: unless one key came.
    """
    if not _is_key(generator):
        raise InputError(
            f"got generator = {_described(generator)}, but times or noise are to be drawn "
            "and JAX draws from one key, given each time; "
            "write generator=jax.random.key(0), split anew for every step"
        )
    return tuple(jax.random.split(generator, count))


def _is_key(value: Any) -> bool:
    if not isinstance(value, jax.Array):
        return False
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value.ndim == 0
    return value.dtype == jnp.uint32


def _described(value: Any) -> str:
    if isinstance(value, jax.Array):
        return f"{value.dtype} of shape {value.shape}"
    return repr(value)


def uniform(shape: tuple[int, ...], how: dict[str, Any]) -> Any:
    """Draw uniformly from [0, 1)."""
    return jax.random.uniform(how["generator"], shape, _dtype(how))


def normal(shape: tuple[int, ...], how: dict[str, Any]) -> Any:
    """Draw standard normal numbers."""
    return jax.random.normal(how["generator"], shape, _dtype(how))


def _dtype(how: dict[str, Any]) -> Any:
    dtype = how["dtype"]
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    return jnp.dtype(dtype)


def on_tensors(function: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Evaluate a function that is written in JAX on tensors, in float64, also while JAX traces
    something else.
    """
    # JAX before 0.8 has it among its experiments.
    home: Any = jax if hasattr(jax, "enable_x64") else jax.experimental  # type: ignore
    with jax.ensure_compile_time_eval(), home.enable_x64(True):
        arrays = [jnp.asarray(tensor.detach().cpu().numpy()) for tensor in tensors]
        value = function(*arrays)
        return torch.as_tensor(np.array(value), device=tensors[0].device)
