"""Rules for functions of a model's own.

SharedPrimal follows each function of torch that a model calls. To run one beside its rule takes
as long as a small layer does. So where a few of them that a model calls one after the other have
one rule, the model may say it, and they are met as one.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from flowspace.derivatives import hidden_calls
from flowspace.derivatives.rules.dual import Dual
from flowspace.derivatives.rules.registry import Call, Rule

__all__ = ["OWN_RULES", "linear_map", "with_rule"]

OWN_RULES: dict[Callable[..., Any], Rule] = {}
"""The rule for each function of a model's own that has one."""

Function = TypeVar("Function", bound=Callable[..., Any])


def with_rule(rule: Rule) -> Callable[[Function], Function]:
    """Let SharedPrimal meet a function of the model's own as one, with a rule.

    It runs as it is written in every other place. In the first pass that meets it, SharedPrimal
    compares the rule with the tangents of what the function calls.

    Args:
        rule: as `rule` takes it; it may return NotImplemented, and the function is followed.

    Returns:
        what decorates a function that is called without names, returns a tensor or a tuple of
        them, draws nothing and writes nothing.

    Raises:
        DerivativeError: on the first call by SharedPrimal, if the rule is wrong.
    """

    def mark(function: Function) -> Function:
        OWN_RULES[function] = rule

        @functools.wraps(function)
        def met(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return function(*args)
            carrier = hidden_calls.active_carrier()
            if carrier is None:
                return function(*args)
            return carrier.meet(function, args)

        return met  # type: ignore[return-value]

    return mark


def _linear(call: Call, x: Any, *constants: Any) -> Any:
    """The tangent is f(dx); the batch lies where f puts it."""
    if not isinstance(x, Dual) or len(call.duals) > 1:
        return NotImplemented
    found = call.func(x.tangent, *constants)
    if isinstance(found, tuple):
        return list(found)
    return found


def linear_map(function: Function) -> Function:
    """Let SharedPrimal meet a function of the model's own as one: it is linear in its first
    argument, and keeps the rows of the batch apart.

    Where another argument moves too, the functions in it are followed. See `with_rule`.
    """
    return with_rule(_linear)(function)
