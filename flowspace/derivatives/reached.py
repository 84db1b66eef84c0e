"""What a function reaches: the modules and functions that it calls, as far as Python tells."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

__all__ = ["OnCopies", "copies_of", "modules_of", "reached", "variables"]


class OnCopies:
    """A function of copies of its tensors.

    A model that writes into its times or latents then changes nobody else's.

    Attributes:
        fn: the function.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.__name__ = getattr(fn, "__name__", "OnCopies")

    def __call__(self, *primals: Any) -> Any:
        """Return what the function returns for copies."""
        return self.fn(*copies_of(primals))


def copies_of(values: Sequence[Any]) -> list[Any]:
    """Return values, tensors as copies."""
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


def reached(fn: Any) -> Iterator[Any]:
    """Iterate over what a function calls as far as its wrappers and variables tell, from outside
    in.
    """
    waiting, met = [fn], set()
    while waiting:
        held = waiting.pop()
        if id(held) in met:
            continue
        met.add(id(held))
        yield held
        if isinstance(held, functools.partial):
            waiting.append(held.func)
        elif isinstance(held, OnCopies):
            waiting.append(held.fn)
        elif isinstance(held, MethodType):
            waiting += [held.__func__, held.__self__]
        elif isinstance(held, FunctionType):
            waiting += filter(callable, variables(held))


def modules_of(fn: Any) -> Iterator[nn.Module]:
    """Iterate over the modules that a function reaches, and those within them, each once; objects
    that call modules are asked for these.
    """
    met: set[nn.Module] = set()
    for held in reached(fn):
        found = [held]
        if not isinstance(held, (nn.Module, FunctionType, type)):
            found = list(getattr(held, "__dict__", {}).values())
        for module in found:
            if isinstance(module, nn.Module):
                for each in module.modules():
                    if each not in met:
                        met.add(each)
                        yield each


def variables(fn: FunctionType) -> list[Any]:
    """Return the variables of a closure that have a value."""
    held = []
    for cell in fn.__closure__ or ():
        with contextlib.suppress(ValueError):  # it has none yet
            held.append(cell.cell_contents)
    return held
