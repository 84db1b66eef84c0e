"""Functions of a model's own that are linear, and so have a rule as they stand: df = f(dx).

SharedPrimal follows each function of torch that a model calls. That such a function runs beside
its rule takes as long as a small layer does, so a few functions that only move numbers about, or
multiply them by constants, are met as one if the model says that they are linear.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from flowspace.derivatives import hidden_calls
from flowspace.derivatives.rules.dual import Dual
from flowspace.derivatives.rules.registry import Call, rule

__all__ = ["LINEAR_MAP", "LINEAR_MAPS", "linear_map"]

LINEAR_MAP = "linear_map"
"""The name of the rule of all of them."""

LINEAR_MAPS: set[Callable[..., Any]] = set()
"""The functions that were said to be linear."""

Function = TypeVar("Function", bound=Callable[..., Any])


def linear_map(function: Function) -> Function:
    """Let SharedPrimal meet a function of the model's own as one, not as the functions in it.

    It runs as it is written in every other place. SharedPrimal compares the tangents of both ways
    in the first pass that meets it; where another argument moves too, it follows what is called.

    Args:
        function: called without names; linear in its first argument, a tensor whose rows it keeps
            apart; returns a tensor or a tuple of them. It draws nothing and writes nothing.

    Raises:
        DerivativeError: on the first call by SharedPrimal, if it is not linear.
    """
    LINEAR_MAPS.add(function)

    @functools.wraps(function)
    def met(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args)
        carrier = hidden_calls.active_carrier()
        if carrier is None:
            return function(*args)
        return carrier.meet(function, args)

    return met  # type: ignore[return-value]


@rule(LINEAR_MAP)
def linear(call: Call, x: Dual, *constants: Any) -> Any:
    """The tangent is f(dx); the batch lies where f puts it."""
    found = call.func(x.tangent, *constants)
    if isinstance(found, tuple):
        return list(found)
    return found
