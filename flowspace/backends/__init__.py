"""What differs between torch and JAX: two modules of the same functions, of which the arrays pick
one.

A module stands for its library as an array namespace does, so everything above is written once, as
``xp = backend_of(t)`` and ``xp.where(...)``. JAX is imported when an array of it is seen for the
first time, never before.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowspace.backends import torch_backend
from flowspace.errors import InputError

__all__ = ["backend_of", "handed_over", "one_backend"]


def backend_of(*arrays: Any) -> Any:
    """Return the functions of the first array's library; torch's, where none is an array."""
    for array in arrays:
        if isinstance(array, Tensor):
            return torch_backend
        if _is_jax(array):
            from flowspace.backends import jax_backend

            return jax_backend
    return torch_backend


def one_backend(*arrays: Any) -> Any:
    """Return the functions of the arrays' library.

    Raises:
        InputError: if arrays of torch came beside arrays of JAX.
    """
    xp = backend_of(*arrays)
    tensors = [isinstance(array, (Tensor, torch.Generator)) for array in arrays]
    if any(tensors) and not torch.compiler.is_compiling() and any(map(_is_jax, arrays)):
        raise InputError(
            "got tensors of torch and arrays of JAX together; "
            "write all of them in one library, generator included: "
            "generator=torch.Generator() or generator=jax.random.key(0)"
        )
    return xp


def handed_over(function: Callable[..., Any], times: tuple[Any, ...], error: Exception) -> Any:
    """Evaluate a function that failed on tensors on JAX arrays, for it may be written in JAX, or
    raise the error.
    """
    if (
        "jax" not in sys.modules
        or not isinstance(times[0], Tensor)
        or not torch_backend.has_values(times[0])
    ):
        raise error
    from flowspace.backends import jax_backend

    try:
        return jax_backend.on_tensors(function, times)
    except Exception:
        raise error from None


def _is_jax(array: Any) -> bool:
    if array is None or isinstance(array, (Tensor, float, int)):
        return False
    jax = sys.modules.get("jax")
    return hasattr(jax, "Array") and isinstance(array, jax.Array)  # type: ignore[union-attr]
