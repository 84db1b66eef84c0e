"""What autograd's graph tells of functions that nobody saw.

A function of a C++ extension that is bound by hand, and one that is called within
``torch._C.DisableTorchFunction()``, pass every function mode by. Such a function is called with an
alias in place of its primal, and its output carries no tangent, as if it were constant. But
autograd sees it: in the graph of the value it stands after the alias, where the carrier would have
called it with the primal. What the carrier follows stands there as well in few places: custom
functions, which it enters, and what a subclass of Tensor was made of.

To walk through a graph takes as long as some functions of the model, so it is done in the first
passes over a model, and then in ever fewer. A function that comes before the first weights, of
inputs that need no gradient, is in no graph and is not found; nor is one that writes into what
moves, for the graph of a view is that of its memory.
"""

import contextlib
import functools
import itertools
import weakref
from collections import Counter
from collections.abc import Hashable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from flowspace.errors import DerivativeError

__all__ = ["check_graph", "is_checked"]

_passes: Counter[Hashable] = Counter()
"""How many passes there were over each function."""

KNOWN = 4096
"""So many functions are counted; then all are new again, as for one who makes a module a step."""

_numbers: dict[int, tuple[weakref.ref[nn.Module], int]] = {}
"""A number for each module by its id, which another module may have later."""

_unused = itertools.count()


def is_checked(fn: Any) -> bool:
    """Return whether the graph of this pass over a function is checked, if it has one: in passes
    1, 2, 4, 8 and so on.
    """
    if not torch.is_grad_enabled():
        return False
    if len(_passes) > KNOWN:
        _passes.clear()
    key = _key(fn)
    _passes[key] += 1
    return _passes[key].bit_count() == 1


def _key(fn: Any) -> Hashable:
    """Return what a function has in common with itself in the next step, where it may be another
    closure round the same module.
    """
    found: list[Any] = []
    waiting, met = [fn], set()
    while waiting:
        held = waiting.pop()
        if id(held) in met:
            continue
        met.add(id(held))
        if isinstance(held, functools.partial):
            waiting.append(held.func)
        elif isinstance(held, MethodType):
            waiting += [held.__func__, held.__self__]
        elif isinstance(held, FunctionType):
            found.append(held.__code__)
            waiting += filter(callable, _held(held))
        elif isinstance(held, nn.Module):
            found.append(_number_of(held))
        else:
            found.append(type(held))
    return tuple(found)


def _number_of(module: nn.Module) -> int:
    """Return a number that no other module has, nor had."""
    known = _numbers.get(id(module))
    if known is None or known[0]() is not module:
        known = weakref.ref(module), next(_unused)
        _numbers[id(module)] = known
    return known[1]


def _held(fn: FunctionType) -> list[Any]:
    """Return the variables of a closure that have a value."""
    held = []
    for cell in fn.__closure__ or ():
        with contextlib.suppress(ValueError):  # it has none yet
            held.append(cell.cell_contents)
    return held


def check_graph(value: Tensor, aliases: set[Any]) -> None:
    """Walk through the graph of a value.

    Args:
        value: of the model, with gradient or without.
        aliases: the nodes of the tensors that stood for primals.

    Raises:
        DerivativeError: if a function was called with an alias unseen.
    """
    met = set()
    waiting = [value.grad_fn]
    aliases.discard(None)  # of what has no gradient
    while waiting:
        node = waiting.pop()
        if node is None or node in met:
            continue
        met.add(node)
        for before, _ in node.next_functions:
            if before in aliases and not isinstance(node, BackwardCFunction):
                raise DerivativeError(_unseen(node.name()))
            waiting.append(before)


def _unseen(name: str) -> str:
    """Return why a function is refused, by the name of its node in the graph."""
    return (
        f"got a function (in the backward pass {name}) called with what moves with z_t or t that "
        "torch shows to no function mode: one of a C++ extension, or one within "
        "torch._C.DisableTorchFunction(), whose tangent would be lost; write "
        "derivative=ForwardMode(), or FiniteDifference() where torch has no forward derivative "
        "of it"
    )
