"""Which passes over a model are watched, and what a model reaches as far as its wrappers tell."""

import functools
import itertools
import weakref
from collections import Counter
from collections.abc import Hashable, Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from flowspace.derivatives.reached import OnCopies, reached, variables

__all__ = ["is_watched", "tensors_of"]

_passes: Counter[Hashable] = Counter()
"""How many passes there were over each function."""

KNOWN = 4096
"""So many functions are counted; then all are new again, as for one who makes a module a step."""

_numbers: dict[int, tuple[weakref.ref[nn.Module], int]] = {}
"""A number for each module that lives, by its id: modules may compare as they like."""

_unused = itertools.count()


def is_watched(fn: Any) -> bool:
    """Return whether this pass over a function is watched: passes 1, 2, 4, 8 and so on are."""
    if len(_passes) > KNOWN:
        _passes.clear()
    key = _key(fn), tuple(map(type, _get_current_dispatch_mode_stack()))
    _passes[key] += 1
    return _passes[key].bit_count() == 1


def _key(fn: Any) -> Hashable:
    """Return what a function has in common with itself in the next step, where it may be another
    closure round the same module.
    """
    found: list[Any] = []
    for held in reached(fn):
        if isinstance(held, FunctionType):
            found.append(held.__code__)
        elif isinstance(held, nn.Module):
            found.append(_number_of(held))
        elif not isinstance(held, WRAPPERS):
            found.append(type(held))
    return tuple(found)


WRAPPERS = (functools.partial, OnCopies, MethodType)
"""Types of objects that call another."""


def tensors_of(fn: Any) -> Iterator[Tensor]:
    """Iterate over the tensors that a function reaches and may have written to: buffers and
    attributes of its modules, and variables.
    """
    for held in reached(fn):
        if isinstance(held, nn.Module):
            for module in held.modules():
                values = (*module._buffers.values(), *vars(module).values())
                yield from (value for value in values if isinstance(value, Tensor))
        elif isinstance(held, FunctionType):
            names = held.__code__.co_names
            values = [held.__globals__.get(name) for name in names]
            for value in (*values, *variables(held)):
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    yield value


def _number_of(module: nn.Module) -> int:
    """Return a number that no other module has, nor had."""
    place = id(module)
    if place not in _numbers:
        gone = weakref.ref(module, lambda _: _numbers.pop(place, None))
        _numbers[place] = gone, next(_unused)
    return _numbers[place][1]
