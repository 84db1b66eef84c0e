"""Rules for functions of a model's own.

SharedPrimal follows each function of torch that a model calls. To run one beside its rule takes
as long as a small layer does. So where a few of them that a model calls one after the other have
one rule, the model may say it, and they are met as one.

A model that is shipped as one file takes this module with it, so it needs no other of flowspace.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["IN_STEPS", "OWN_RULES", "followed", "in_steps", "linear_map", "with_rule"]

OWN_RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
"""The rule for each function of a model's own that has one.

For one that is followed step by step it is what is called with a runner of steps.
"""

IN_STEPS: set[Callable[..., Any]] = set()
"""Those among them that are followed step by step."""

followed = threading.local()
"""The carrier and the second run of each thread."""

Ruled = TypeVar("Ruled", bound=Callable[..., Any])


def with_rule(rule: Callable[..., Any]) -> Callable[[Ruled], Ruled]:
    """Let SharedPrimal meet a function of the model's own as one, with a rule.

    It runs as it is written in every other place. In the first pass that meets it, SharedPrimal
    compares the rule with the tangents of what the function calls.

    Args:
        rule: as `rule` takes it; it may return NotImplemented, and the function is followed.

    Returns:
        what decorates a function that returns a tensor or a tuple of them, draws nothing and
        writes nothing, with all that moves among its arguments; called with arguments by name,
        it is followed.

    Raises:
        DerivativeError: on the first call by SharedPrimal, if the rule is wrong.
    """

    def mark(function: Ruled) -> Ruled:
        OWN_RULES[function] = rule

        @functools.wraps(function)
        def met(*args: Any, **named: Any) -> Any:
            if named or torch.compiler.is_compiling():
                return function(*args, **named)
            carrier = getattr(followed, "carrier", None)
            if carrier is None:
                return function(*args)
            return carrier.meet(function, args)

        return met  # type: ignore[return-value]

    return mark


def _linear(call: Any, x: Any, *constants: Any) -> Any:
    """The tangent is f(dx); the batch lies where f puts it."""
    if x is not call.duals[0] or len(call.duals) > 1:
        return NotImplemented
    found = call.func(x.tangent, *constants)
    if isinstance(found, tuple):
        return list(found)
    return found


def linear_map(function: Ruled) -> Ruled:
    """Let SharedPrimal meet a function of the model's own as one, whose tangent is f(dx).

    It runs as it is written in every other place; where another argument moves too, the functions
    in it are followed.

    Args:
        function: as `with_rule` takes it; linear in its first argument, a tensor, and each row of
            the batch apart.

    Raises:
        DerivativeError: on the first call by SharedPrimal, if it is not linear.
    """
    return with_rule(_linear)(function)


def in_steps(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let SharedPrimal meet a function of the model's own as one, and follow it step by step.

    To meet a function where it is called takes as long as a small layer does. The steps of this
    one are not met: each hands its tangent on to the next.

    It runs as it is written in every other place. In the first pass that meets it, SharedPrimal
    compares what it finds with the tangents of what the function calls.

    Args:
        function: called as ``function(run, *args)``, with all that moves among the arguments. It
            calls its steps as ``run(step, *args)``. What moves, arguments and what steps returned,
            it hands to steps, or picks one of a tuple, and does nothing else with it: sizes and
            dtypes are arguments too. A step is a builtin function of torch that has a rule, a
            function of the model's own that has one, or any function whose arguments do not move.
            It draws nothing and writes nothing. The function returns a tensor or a tuple of them.

    Returns:
        the function of the other arguments, with ``run`` given; called with arguments by name, it
        is followed.

    Raises:
        DerivativeError: by SharedPrimal, if a step has no rule, or if value or tangents are other
            than those of what the function calls.
    """

    def plain(*args: Any, **named: Any) -> Any:
        return function(_called, *args, **named)

    # not by functools.wraps, which would show the caller a first argument that is not its own
    for attribute in functools.WRAPPER_ASSIGNMENTS:
        setattr(plain, attribute, getattr(function, attribute))
    IN_STEPS.add(plain)
    return with_rule(function)(plain)


def _called(step: Callable[..., Any], *args: Any) -> Any:
    """Return what a step returns."""
    return step(*args)
