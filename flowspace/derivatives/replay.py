"""Run a model again: with the draws of its first run, and without a second trace in its buffers.

A second run is wanted where a route evaluates the model twice, or an objective asks it for its
own velocity. Dropout must then draw the same masks, running statistics must move once, and what a
compiled part writes is put back as well.

Draws are repeated from the generator of the CPU, that of the device, Python's ``random`` and
numpy's global state. What nobody can repeat, such as a generator of the model's own, `agree`
finds: a second run at the same point must give the same value.
"""

import contextlib
import inspect
import random
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode

from flowspace.backends import backend_of, torch_backend
from flowspace.backends.process import forward_mode_lock, several_processes
from flowspace.derivatives import hidden_calls
from flowspace.errors import DerivativeError

__all__ = [
    "RandomState",
    "RowsMixError",
    "agree",
    "batch_statistics",
    "forward_mode_lock",
    "in_transform",
    "on_copies",
    "restoring_buffers",
    "several_processes",
    "uncompiled",
    "without_trace",
]


def in_transform(tensor: Tensor) -> bool:
    """Return whether a tensor belongs to a transform of torch.func, and so has no values to ask
    for.
    """
    return not torch_backend.has_values(tensor)


def on_copies(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return fn of copies of its tensors, so that a model which writes into its times or latents
    changes nobody else's.
    """

    def of_copies(*primals: Any) -> Tensor:
        return fn(*(p.clone() if isinstance(p, Tensor) else p for p in primals))

    of_copies.__name__ = getattr(fn, "__name__", "of_copies")
    return of_copies


TOLERANCES = {8: 1e-6, 4: 1e-3, 2: 5e-2}
"""How far two evaluations at one point may lie apart, over the largest value, by the bytes of the
numbers in them.
"""


def agree(first: Tensor, second: Tensor, itemsize: int, slack: float = 1.0) -> bool:
    """Return whether two evaluations at one point differ by rounding alone.

    Args:
        first: a value.
        second: the same, evaluated again; in another shape it does not agree.
        itemsize: the bytes of the least precise numbers that were computed with.
        slack: multiplies the tolerance.
    """
    if first.shape != second.shape:
        return False
    xp = backend_of(first)
    if 0 in first.shape or not (xp.has_values(first) and xp.has_values(second)):
        return True
    tolerance = slack * TOLERANCES[max(2, min(itemsize, 8))]
    near = abs(first - second).max() <= tolerance * abs(first).max()
    return bool(near) or not bool(xp.isfinite(first).all())


class RandomState:
    """The state of the random generators before a run, to see whether it drew and to let it draw
    the same again.

    Args:
        device: whose generator counts beside the CPU's.
        of_python: whether those of Python's ``random`` and of numpy count too; they cost more to
            ask than torch's.
    """

    def __init__(self, device: torch.device, of_python: bool = False) -> None:
        self.sources: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
            (torch.get_rng_state, torch.set_rng_state)
        ]
        module = None if device.type in ("cpu", "meta") else getattr(torch, device.type, None)
        if hasattr(module, "get_rng_state"):
            self.sources.append(_of_device(module, device))
        if of_python:
            self.sources.append((random.getstate, random.setstate))
            if (numpy_random := sys.modules.get("numpy.random")) is not None:
                self.sources.append((numpy_random.get_state, numpy_random.set_state))
        self.before = self._state()
        self.torchs = 1 + hasattr(module, "get_rng_state")

    def _state(self) -> list[Any]:
        return [get() for get, _ in self.sources]

    def happened(self) -> bool:
        """Return whether random numbers have been drawn since."""
        return not all(map(_equal, self._state(), self.before))

    def replay(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return fn with the draws of the first call, leaving the generators as they are now.

        Those of Python count if they have been drawn from by now: to ask them takes longer.
        """
        states = list(zip(self.sources, self._state(), self.before, strict=True))
        moved = [
            (source, before)
            for i, (source, now, before) in enumerate(states)
            if i < self.torchs or not _equal(now, before)
        ]

        def again(*primals: Any) -> Any:
            now = [get() for (get, _), _ in moved]
            try:
                for (_, put), before in moved:
                    put(before)
                return fn(*primals)
            finally:
                for ((_, put), _), state in zip(moved, now, strict=True):
                    put(state)

        again.__name__ = getattr(fn, "__name__", "again")
        return again


def _of_device(
    module: Any, device: torch.device
) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """Return how the state of a device's generator is read and set; not every device's functions
    take the device.
    """
    if not inspect.signature(module.get_rng_state).parameters:
        return module.get_rng_state, module.set_rng_state
    return lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device)


def _equal(first: Any, second: Any) -> bool:
    """Return whether two states of a generator are the same: each a tensor, or a tuple that may
    hold an array.
    """
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    same = (a == b for a, b in zip(first, second, strict=True))
    return all(bool(part.all()) if hasattr(part, "all") else part for part in same)


def batch_statistics(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """Return the arguments, less the running statistics, of a norm that uses the batch's; None for
    any other function.
    """
    if func in (F.batch_norm, F.instance_norm):
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        x, _, _, weight, bias, train, *rest = bound.args
        return (x, None, None, weight, bias, train, *rest) if train else None
    if func in (torch.batch_norm, torch.instance_norm) and args[5]:
        return (*args[:3], None, None, *args[5:])
    return None


class RowsMixError(Exception):
    """A function that mixes rows was called by a program of which nobody knew it.

    Attributes:
        finder: the run that found it; None in an error that a model raised by itself.
    """

    def __init__(self, finder: "RestoringMode | None" = None) -> None:
        super().__init__("a function mixes the rows")
        self.finder = finder


class RestoringMode(TorchFunctionMode):
    """Keeps what a run writes into: running statistics are not given, other tensors are remembered
    as long as they live.

    Attributes:
        mixed: whether rows are known to mix.
        written: what tensors held before they were first written to, and how often autograd had
            seen them written.
        replaced: what stands for tensors that were written to inside torch.func.jvp, which refuses
            to write to what is held.
        halved: the first function that returned numbers of half precision, or None.
        own_generator: a generator of the model's own that was drawn from in a state which a second
            run cannot know, or None.
    """

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.mixed = mixed
        self.written: dict[int, tuple[weakref.ref[Tensor], Tensor, int]] = {}
        self.replaced: dict[int, tuple[Tensor, Tensor]] = {}
        self.halved: str | None = None
        self.own_generator: torch.Generator | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return hidden_calls.call_captured(func, args, kwargs)
        if norm := batch_statistics(func, args, kwargs or {}):
            self.mixes(func in (F.batch_norm, torch.batch_norm))
            return func(*norm)
        name = getattr(func, "__name__", "")
        if self.replaced:
            args = tuple(self._replacement(value) for value in args)
        if args and isinstance(args[0], Tensor) and _writes(name):
            if (
                not in_transform(args[0])
                and torch._C._functorch.peek_interpreter_stack() is not None
            ):  # pyright: ignore
                if not any(
                    isinstance(value, Tensor) and in_transform(value) for value in args[1:]
                ):
                    self.remember(args[0])
                    with (
                        temporarily_clear_interpreter_stack()
                    ):  # which refuses to write into what a function holds
                        return func(*args, **(kwargs or {}))
                args = (self._written_inside(args[0]), *args[1:])
            else:
                self.remember(args[0])
        elif kwargs and isinstance(kwargs.get("out"), Tensor):
            self.remember(kwargs["out"])
        if kwargs and isinstance(kwargs.get("generator"), torch.Generator):
            self.draws(kwargs["generator"])
        out = func(*args, **(kwargs or {}))
        if self.halved is None and isinstance(out, Tensor) and out.dtype in HALVES:
            self.halved = f"{name} returned {out.dtype}"
        return out

    def mixes(self, rows: bool) -> None:
        """Raise RowsMixError if a function mixes rows and nobody said so."""
        if rows and not self.mixed:
            raise RowsMixError(self)

    def draws(self, generator: torch.Generator) -> None:
        """Note a generator of the model's own, unless it was seeded just before: then it draws the
        same each time.
        """
        fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
        if not torch.equal(fresh.get_state(), generator.get_state()):
            self.own_generator = generator

    def _written_inside(self, target: Tensor) -> Tensor:
        """Return a copy that is written to instead of a tensor that the model holds, and is read
        instead from then on.
        """
        if target._is_view():
            raise DerivativeError(
                "the model writes what moves into a part of a tensor that it holds, which "
                "torch.func.jvp cannot follow; "
                "write derivative=SharedPrimal(), or build that tensor anew in each call"
            )
        copy = target.clone()
        self.replaced[id(target)] = target, copy
        return copy

    def _replacement(self, value: Any) -> Any:
        """Return an argument with what stands for the tensors in it."""
        if isinstance(value, Tensor):
            return self.replaced.get(id(value), (None, value))[1]
        if type(value) in (tuple, list):
            return type(value)(self._replacement(part) for part in value)
        return value

    def remember(self, target: Tensor) -> None:
        """Keep what a tensor held before it was first written to."""
        key = id(target)
        if key not in self.written and not in_transform(target):
            gone = weakref.ref(target, lambda _: self.written.pop(key, None) and None)
            self.written[key] = gone, target.detach().clone(), _version(target)

    def restore(self) -> None:
        """Write the remembered values back, but for memory that an engine fills and frees unseen
        by autograd.
        """
        with torch.no_grad():
            for reference, before, version in list(self.written.values()):
                target = reference()
                if target is None or _version(target) == version >= 0 or not _alive(target):
                    continue
                target.copy_(before)


HALVES = (torch.bfloat16, torch.float16)
"""Numbers whose rounding drowns a finite difference."""


def _writes(name: str) -> bool:
    """Return whether a function of this name writes into its first argument."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _version(tensor: Tensor) -> int:
    """Return how often autograd has seen a tensor written to, or -1 where it does not count."""
    return -1 if tensor.is_inference() else tensor._version


def _alive(tensor: Tensor) -> bool:
    """Return whether a tensor still has its memory: FSDP2 frees that of whole parameters between
    uses.
    """
    try:
        held = tensor.untyped_storage().nbytes()
    except (
        NotImplementedError,
        RuntimeError,
    ):  # tensors that are made of others have no memory of their own
        return True
    return not tensor.numel() or held > 0


@contextlib.contextmanager
def restoring_buffers(mixed: bool = True) -> Iterator[RestoringMode]:
    """Evaluate a function again without a second trace in the buffers of its modules.

    Raises:
        RowsMixError: if it mixes rows and ``mixed`` does not say so.
    """
    mode = RestoringMode(mixed)
    try:
        with hidden_calls.protecting(mode), mode:
            yield mode
    finally:
        mode.restore()


def without_trace(function: Callable[[], Any], beside: Tensor) -> Any:
    """Evaluate a function of arrays beside these without gradient, and without a trace in the
    buffers of its modules.
    """
    if (xp := backend_of(beside)) is not torch_backend:
        return xp.detach(function())
    with torch.no_grad(), restoring_buffers():
        return function()


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Run what torch.compile compiled as it was written: its kernels know nothing of forward-mode
    levels.
    """
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
