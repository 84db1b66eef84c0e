"""Run a model again: with the draws of its first run, and without a second trace in its buffers.

A second run is wanted where a route evaluates the model twice, or an objective asks it for its own velocity. Dropout must then
draw the same masks, running statistics must move once, and what a compiled part writes is put back as well.
"""

import contextlib
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flowspace.backends import backend_of, torch_backend
from flowspace.derivatives import hidden_calls

__all__ = [
    "Draws",
    "RowsMixError",
    "batch_statistics",
    "forward_mode_lock",
    "uncompiled",
    "unseen",
    "untouched",
    "wrapped",
]


def wrapped(tensor: Tensor) -> bool:
    """Return whether a tensor belongs to a transform of torch.func, and so has no values to ask for."""
    return not torch_backend.known(tensor)


class Draws:
    """The state of the random generators before a run, to see whether it drew and to let it draw the same again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self._state()

    def _state(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def happened(self) -> bool:
        """Return whether random numbers have been drawn since."""
        return any(not torch.equal(now, then) for now, then in zip(self._state(), self.before, strict=True))

    def replay(self, fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return fn with the draws of the first call, leaving the generators as they are now."""

        def again(*primals: Any) -> Tensor:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                torch.set_rng_state(self.before[0])
                if self.device.type == "cuda":
                    torch.cuda.set_rng_state(self.before[1], self.device)
                return fn(*primals)

        again.__name__ = getattr(fn, "__name__", "again")
        return again


def batch_statistics(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return the arguments, less the running statistics, of a norm that uses the batch's; None for any other function."""
    if func in (F.batch_norm, F.instance_norm):
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        x, _, _, weight, bias, train, *rest = bound.args
        return (x, None, None, weight, bias, train, *rest) if train else None
    if func in (torch.batch_norm, torch.instance_norm) and args[5]:
        return (*args[:3], None, None, *args[5:])
    return None


class RowsMixError(Exception):
    """A function that mixes rows was called by a program of which nobody knew it."""


forward_mode_lock = threading.RLock()
"""Held in every torch.func.jvp: torch counts its levels of forward mode for the whole process, not for a thread."""


class Untouched(TorchFunctionMode):
    """Keeps what a run writes into: running statistics are not given, other tensors are remembered as long as they live."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.mixed = mixed
        self.written: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return func(*args, **(kwargs or {}))
        if norm := batch_statistics(func, args, kwargs or {}):
            self.mixes(func in (F.batch_norm, torch.batch_norm))
            return func(*norm)
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], Tensor):
            if not wrapped(args[0]) and torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore
                args = (args[0].clone(), *args[1:])  # torch.func refuses to write into what a function captured
            else:
                self.remember(args[0])
        elif kwargs and isinstance(kwargs.get("out"), Tensor):
            self.remember(kwargs["out"])
        return func(*args, **(kwargs or {}))

    def mixes(self, rows: bool) -> None:
        """Raise RowsMixError if a function mixes rows and nobody said so."""
        if rows and not self.mixed:
            raise RowsMixError

    def remember(self, target: Tensor) -> None:
        """Keep what a tensor held before it was first written to."""
        key = id(target)
        if key not in self.written and not wrapped(target):
            gone = weakref.ref(target, lambda _: self.written.pop(key, None) and None)
            self.written[key] = gone, target.detach().clone()

    def restore(self) -> None:
        """Write the remembered values back."""
        with torch.no_grad():
            for reference, before in list(self.written.values()):
                if (target := reference()) is not None:
                    target.copy_(before)


@contextlib.contextmanager
def untouched(mixed: bool = True) -> Iterator[None]:
    """Evaluate a function again without a second trace in the buffers of its modules.

    Raises:
        RowsMixError: if it mixes rows and ``mixed`` does not say so.
    """
    mode = Untouched(mixed)
    try:
        with hidden_calls.within(mode), mode:
            yield
    finally:
        mode.restore()


def unseen(function: Callable[[], Any], beside: Tensor) -> Any:
    """Evaluate a function of arrays beside these without gradient, and without a trace in the buffers of its modules."""
    if (xp := backend_of(beside)) is not torch_backend:
        return xp.detach(function())
    with torch.no_grad(), untouched():
        return function()


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Run what torch.compile compiled as it was written: its kernels know nothing of forward-mode levels."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
