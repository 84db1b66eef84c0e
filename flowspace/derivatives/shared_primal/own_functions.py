"""Functions of a model's own that have a rule, or say their steps: met as one function.

The first time in each case, what the rule found is compared with the tangents of what the function
calls.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flowspace.derivatives import rules
from flowspace.derivatives.own_rules import IN_STEPS, OWN_RULES
from flowspace.derivatives.replay import agree
from flowspace.derivatives.rules import At
from flowspace.derivatives.rules.dual import LostRowsError
from flowspace.derivatives.shared_primal.steps import by_steps
from flowspace.derivatives.torch_internals import dispatch_modes
from flowspace.errors import DerivativeError

if TYPE_CHECKING:
    from flowspace.derivatives.shared_primal.carrier import Carrier

__all__ = ["run"]

_compared: set[tuple[Any, ...]] = set()
"""Functions whose rule was right, and in which case."""


def run(carrier: "Carrier", call: rules.Call, args: tuple[Any, ...]) -> Any:
    """Run a function of the model's own, and its rule beside it."""
    func, rule = call.func, OWN_RULES[call.func]
    if carrier.traced or not call.of_plain_tensors():
        return carrier.enter(func, func, args, {})
    if func in IN_STEPS:
        if dispatch_modes():  # they have to see what the model calls
            return carrier.enter(func, func, args, {})
        rule = by_steps
    else:
        call.evaluate()
    found = carrier.tangents(call, rule)
    if found is NotImplemented:
        tangents = [tangent for _, tangent in _followed(carrier, call, args)]
        return carrier.with_tangents(call, tangents)
    every_row = call.duals[0].layout is None
    case = func, every_row, len(call.duals), *map(type, call.args)
    if case not in _compared:
        _compare(carrier, call, found, args)
        _compared.add(case)
    return carrier.with_tangents(call, found)


def _followed(
    carrier: "Carrier", call: rules.Call, args: tuple[Any, ...]
) -> list[tuple[Tensor, At | None]]:
    """Return the outputs of what a function of the model's own calls that can move, each with
    its tangent.

    It was run for its value before. Without gradient nothing is saved again, which a
    checkpoint would count.

    Raises:
        LostRowsError: if rows mix in it.
    """
    with torch.no_grad():
        out = carrier.enter(call.func, call.func, args, {})
    if carrier.lost:
        raise LostRowsError
    found: list[tuple[Tensor, At | None]] = []
    for leaf in filter(rules.differentiable, pytree.tree_leaves(out)):
        dual = carrier.dual(leaf)
        if dual is None:
            found.append((leaf, None))
        else:
            found.append((dual.primal, At(dual.tangent, dual.layout)))
    return found


def _compare(carrier: "Carrier", call: rules.Call, found: Any, args: tuple[Any, ...]) -> None:
    """Compare what the rule of a function of the model's own found with the tangents of what
    the function calls, and their values where the rule ran it.

    Raises:
        DerivativeError: if they differ.
        LostRowsError: if rows mix in it.
    """
    name = call.func.__name__
    out = filter(rules.differentiable, pytree.tree_leaves(carrier.with_tangents(call, found)))
    values = filter(rules.differentiable, pytree.tree_leaves(call.out))
    followed = _followed(carrier, call, args)
    for (value, exact), leaf, other in zip(followed, out, values, strict=True):
        if not agree(value.detach(), other.detach(), other.itemsize):
            raise DerivativeError(
                f"got another value of {name}, a function of the model's own, where it was "
                "followed step by step, than of what it calls; write it without in_steps"
            )
        ours = carrier.dual(leaf)
        if exact is None or ours is None:
            same = exact is ours
        else:
            same = agree(exact.tangent, ours.tangent, ours.tangent.itemsize)
        if not same:
            raise DerivativeError(
                f"got a wrong tangent from the rule of {name}, a function of the model's own: "
                "another than that of what it calls; write it without the rule"
            )
