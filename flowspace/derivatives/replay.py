"""Run a model again: with the draws of its first run, and without a second trace in its buffers.

A second run is wanted where a route evaluates the model twice, or an objective asks it for its
own velocity. Dropout must then draw the same masks, running statistics must move once, and what a
compiled part writes is put back as well.

* `RandomState` repeats draws from the generator of the CPU, that of the device, Python's
  ``random`` and numpy's global state.
* `restoring_buffers` puts back what a run writes into tensors that outlive it.
* `agree` finds what nobody can repeat, such as draws from a generator of the model's own: a second
  run at the same point must give the same value.
"""

import contextlib
import functools
import inspect
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from flowspace.backends import backend_of, torch_backend
from flowspace.backends.process import forward_mode_lock, several_processes
from flowspace.derivatives import hidden_calls
from flowspace.derivatives.bindings import Bindings, Snapshot
from flowspace.derivatives.reached import modules_of
from flowspace.derivatives.torch_internals import (
    active_transform,
    base_transform,
    below_modes_of_the_user,
    memory_of,
    outside_transforms,
    set_version,
)
from flowspace.errors import DerivativeError

__all__ = [
    "REFUSAL_SLACK",
    "RandomState",
    "RowsMixError",
    "agree",
    "base_of",
    "batch_statistics",
    "forward_mode_lock",
    "in_transform",
    "is_alive",
    "put_back",
    "restoring_buffers",
    "root_of",
    "several_processes",
    "uncompiled",
    "version_of",
    "without_trace",
    "written_by",
    "written_places",
]


def in_transform(tensor: Tensor) -> bool:
    """Return whether a tensor belongs to a transform of torch.func, and so has no values yet."""
    return not torch_backend.has_values(tensor)


def base_of(tensor: Tensor) -> Tensor:
    """Return the tensor that transforms of torch.func wrapped, or the tensor itself."""
    while in_transform(tensor):
        tensor = base_transform(tensor)
    return tensor


TOLERANCES = {8: 1e-6, 4: 1e-3, 2: 5e-2}
"""The largest difference of two evaluations at one point, over the largest value, by the bytes of
the numbers in them.
"""

REFUSAL_SLACK = 10.0
"""A second run on all rows may differ by so many times the tolerance of one on some rows."""


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


class Source(NamedTuple):
    """A source of random numbers: how its state is read and set."""

    read: Callable[[], Any]
    write: Callable[[Any], None]


class RandomState:
    """The state of the random generators before a run, to let the run draw the same again.

    Args:
        device: whose generator counts beside the CPU's.
        of_python: whether those of Python's ``random`` and of numpy count too; they cost more to
            ask than torch's.
    """

    def __init__(self, device: torch.device, of_python: bool = False) -> None:
        self.sources = [Source(torch.get_rng_state, torch.set_rng_state)]
        if device.type not in ("cpu", "meta"):
            module = getattr(torch, device.type, None)
            if hasattr(module, "get_rng_state"):
                self.sources.append(_source_of_device(module, device))
        self.torch_sources = len(self.sources)
        if of_python:
            self.sources.append(Source(random.getstate, random.setstate))
            numpy_random = sys.modules.get("numpy.random")
            if numpy_random is not None:
                self.sources.append(Source(numpy_random.get_state, numpy_random.set_state))
        self.before = self._now()

    def _now(self) -> list[Any]:
        """Return the state of each source."""
        return [source.read() for source in self.sources]

    def changed(self) -> bool:
        """Return whether random numbers have been drawn since."""
        return not all(map(_equal, self._now(), self.before))

    def replay(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return fn with the draws of the first call, leaving the generators as they are now.

        Those of Python count if they have been drawn from by now: to ask them takes longer.
        """
        drawn = []
        for i, now in enumerate(self._now()):
            if i < self.torch_sources or not _equal(now, self.before[i]):
                drawn.append((self.sources[i], self.before[i]))

        def again(*primals: Any, **options: Any) -> Any:
            afterwards = [source.read() for source, _ in drawn]
            try:
                for source, before in drawn:
                    source.write(before)
                return fn(*primals, **options)
            finally:
                for (source, _), state in zip(drawn, afterwards, strict=True):
                    source.write(state)

        again.__name__ = getattr(fn, "__name__", "again")
        return again


def _source_of_device(module: Any, device: torch.device) -> Source:
    """Return a device's source of random numbers; not every device's functions take the device."""
    if not inspect.signature(module.get_rng_state).parameters:
        return Source(module.get_rng_state, module.set_rng_state)
    return Source(
        lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device)
    )


def _equal(first: Any, second: Any) -> bool:
    """Return whether two states are the same: each a tensor, or a tuple that may hold an array."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    for a, b in zip(first, second, strict=True):
        same = a == b
        if hasattr(same, "all"):
            same = same.all()
        if not same:
            return False
    return True


def batch_statistics(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """Return the arguments of a norm that uses the batch's statistics, without the running ones.

    None stands for any other function.
    """
    if func in (F.batch_norm, F.instance_norm):
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        x, _, _, weight, bias, train, *rest = bound.args
        if train:
            return x, None, None, weight, bias, train, *rest
    if func in (torch.batch_norm, torch.instance_norm) and args[5]:
        return (*args[:3], None, None, *args[5:])
    return None


class RowsMixError(Exception):
    """The model mixes rows, as batch norm does in train mode, which was not declared.

    Attributes:
        finder: the run that found it; None in an error that a model raised by itself.
    """

    def __init__(self, finder: "RestoringMode | None" = None) -> None:
        super().__init__("a function mixes the rows")
        self.finder = finder


class RestoringMode(TorchFunctionMode):
    """Watches a second run, to restore what it writes into.

    A norm over the batch is not given its running statistics. Other tensors that are written to
    are remembered, for as long as they live.

    Attributes:
        mixed: whether rows are known to mix.
        written: what tensors held before they were first written to, and how often autograd had
            seen them written.
        bindings: what buffers were before other tensors were bound to their names, and the memory
            of tensors before ``x.data = y``.
        snapshot: what the attributes of the modules were that the run reaches.
        replaced: the copies that stand for tensors that were written to inside torch.func.jvp: it
            refuses to write a tangent into what the function holds.
        halved: the first function that returned numbers of half precision, or None.
        own_generator: a generator of the model's own that was drawn from in a state which a second
            run cannot know, or None.
        generators: by id, the model's own, and their states before they were first drawn from.
        keeps: the model kept something of an evaluation, which was put back.
        elsewhere: a function was called in another thread with what belongs to torch.func.jvp.
        made: the memory that functions made in this run. What is written there replaces nothing,
            and may be kept, as a table that a model builds in its first call.
    """

    def __init__(self, mixed: bool, fn: Any = None) -> None:
        super().__init__()
        self.mixed = mixed
        self.snapshot: Snapshot | None = None
        if fn is not None and not torch.compiler.is_compiling():
            self.snapshot = Snapshot(modules_of(fn), several_processes())
        self.written: dict[int, tuple[weakref.ref[Tensor], Tensor, int]] = {}
        self.bindings = Bindings()
        self.replaced: dict[int, tuple[Tensor, Tensor]] = {}
        self.halved: str | None = None
        self.own_generator: torch.Generator | None = None
        self.generators: dict[int, tuple[torch.Generator, Tensor]] = {}
        self.elsewhere = False
        self.keeps = False
        self.made: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a torch function; note what it writes into, draws from and returns.

        It is called from here and no deeper: this frame is the one that torch.compile skips.
        """
        if torch.compiler.is_dynamo_compiling():
            return hidden_calls.call_captured(func, args, kwargs)
        kwargs = kwargs or {}
        norm = batch_statistics(func, args, kwargs)
        if norm is not None:
            self.mixes(func in (F.batch_norm, torch.batch_norm))
            return func(*norm)
        name = getattr(func, "__name__", "")
        if self.replaced:
            args = tuple(self._replacement(value) for value in args)
        written = written_by(func, args, kwargs)
        held = [target for target in written if not in_transform(target)]
        if isinstance(kwargs.get("generator"), torch.Generator):
            self.draws(kwargs["generator"])
        first = bool(held) and bool(args) and held[0] is args[0] and kwargs.get("out") is None
        if first and active_transform() is not None and _any_in_transform(args[1:]):
            args = (self._writable_copy(args[0]), *args[1:])
        elif held:
            self.remember(*held)
            if active_transform() is not None and not _any_in_transform((*args, *written)):
                with outside_transforms():  # they refuse to write into what a function holds
                    return func(*args, **kwargs)
        if name in OF_MEMORY:
            args = self._of_memory(func, name, args)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self._note(out, func, (*args, *kwargs.values()))
        return out

    def _of_memory(self, func: Any, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Note a function that hands out the memory of a tensor, or gives it another; return what
        it is to be called with.
        """
        data = name == "__get__" and func == DATA
        if data or (name in AS_ARRAY and not isinstance(args[0], nn.Parameter)):
            self.remember(args[0], unseen=True)  # what is written through it, nobody counts
        elif name == "__set__" and func == BIND_DATA and not in_transform(args[0]):
            self.bindings.note_memory(args[0])
            return args[0], base_of(args[1])  # memory of a transform ends with it
        return args

    def _note(self, out: Tensor, func: Any, arguments: Iterable[Any]) -> None:
        """Note the precision of what a function returned, and its memory."""
        name = getattr(func, "__name__", "")
        if self.halved is None and out.dtype in HALVES:
            self.halved = f"{name} returned {out.dtype}"
        if type(out) is Tensor and name not in OF_OTHERS and not out._is_view():
            self._note_memory(out, func, arguments)

    def _note_memory(self, out: Tensor, func: Any, arguments: Iterable[Any]) -> None:
        """Note the memory of what a function returned, unless it is that of an argument, or the
        function is the user's own operator, which may keep it.
        """
        memory = _memory_of(out)
        if (
            memory is None
            or memory in self.made
            or isinstance(func, (OpOverload, OpOverloadPacket))
        ):
            return
        for value in arguments:
            parts = value if type(value) in (list, tuple) else (value,)
            for part in parts:
                # a subclass may hand out memory that it holds, as a DTensor its local tensor
                if isinstance(part, Tensor) and (
                    type(part) not in (Tensor, nn.Parameter) or _memory_of(part) == memory
                ):
                    return
        self.made.add(memory)

    def met_elsewhere(self, values: Iterable[Any]) -> None:
        """Note a function of these values that the model calls in another thread."""
        if _any_in_transform(values):
            self.elsewhere = True

    def met_script(self, values: Iterable[Any]) -> None:
        """Raise DerivativeError for a function of torch.jit of what belongs to torch.func.jvp:
        once it is optimised, it drops tangents without a word.
        """
        if _any_in_transform(values):
            raise DerivativeError(
                "got a function of torch.jit, which drops tangents once it is optimised; write "
                "derivative=FiniteDifference(), which needs none, or SharedPrimal() where it was "
                "never called without"
            )

    def mixes(self, mixing: bool) -> None:
        """Raise RowsMixError if a function mixes rows and nobody said so."""
        if mixing and not self.mixed:
            raise RowsMixError(self)

    def draws(self, generator: torch.Generator) -> None:
        """Note a generator of the model's own, unless it was seeded just before: then it draws the
        same each time.
        """
        self.generators.setdefault(id(generator), (generator, generator.get_state()))
        fresh = torch.Generator(generator.device)
        fresh.manual_seed(generator.initial_seed())
        if not torch.equal(fresh.get_state(), generator.get_state()):
            self.own_generator = generator

    def restore_generators(self) -> None:
        """Set the model's own generators back, after a run that is none of its steps."""
        for generator, state in self.generators.values():
            generator.set_state(state)

    def _writable_copy(self, target: Tensor) -> Tensor:
        """Return a copy that is written to, and read from then on, instead of a held tensor."""
        if target._is_view():
            raise DerivativeError(
                "got a model that writes what moves into a part of a tensor that it holds, which "
                "torch.func.jvp cannot follow; write derivative=SharedPrimal(), or build that "
                "tensor anew in each call"
            )
        copy = target.clone()
        self.replaced[id(target)] = target, copy
        return copy

    def _replacement(self, value: Any) -> Any:
        """Return an argument with the copies that stand for tensors in it."""
        if isinstance(value, Tensor):
            return self.replaced.get(id(value), (None, value))[1]
        if type(value) in (tuple, list):
            return type(value)(self._replacement(part) for part in value)
        return value

    def remember(self, *targets: Tensor, unseen: bool = False) -> None:
        """Keep what tensors held before they were first written to, the whole of their memory.

        Args:
            targets: what is about to be written to; views stand for what they are views of.
            unseen: autograd will not count the writes.
        """
        for target in targets:
            root = root_of(target)
            key = id(root)
            if in_transform(root) or _memory_of(root) in self.made or key in self.bindings.memory:
                continue
            version = version_of(root)
            if unseen:
                version = -1
            if key in self.written:  # what it held first is kept
                reference, before, counted = self.written[key]
                self.written[key] = reference, before, min(counted, version)
                continue

            def forget(_: Any, key: int = key) -> None:
                self.written.pop(key, None)

            self.written[key] = weakref.ref(root, forget), root.detach().clone(), version

    def restore(self) -> None:
        """Write the remembered values back.

        Memory that an engine fills and frees, which autograd does not count as written, is left.
        What is as it was counts as not written to: autograd may have saved it before.
        """
        self.keeps = self.keeps or bool(self.written) or bool(self.bindings.before)
        self.bindings.restore()
        if self.snapshot is not None and self.snapshot.restore():
            self.keeps = True
        with torch.no_grad():
            # the first last: one memory may be known by several tensors, as by x and x.data
            for reference, before, version in reversed(list(self.written.values())):
                target = reference()
                if target is None or not is_alive(target):
                    continue
                now = version_of(target)
                if version < 0:
                    put_back(target, before, now)
                elif now != version:
                    put_back(target, before, version)

    def from_the_start(self, fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return fn, to be evaluated several times, each time with the buffers of the first."""

        def restarted(*primals: Any) -> Tensor:
            self.restore()
            out = fn(*primals)
            if isinstance(out, Tensor) and id(root_of(out)) in self.written:
                return out.clone()  # it would be put back as well
            return out

        restarted.__name__ = getattr(fn, "__name__", "restarted")
        return restarted


def _memory_of(tensor: Tensor) -> int | None:
    """Return a number for the memory of a tensor and its views; None for one without."""
    if in_transform(tensor):
        return None
    try:
        return memory_of(tensor)
    except (NotImplementedError, RuntimeError):  # sparse tensors, and others that lie in parts
        return None


def root_of(tensor: Tensor) -> Tensor:
    """Return the tensor that another one is a view of, or itself."""
    if tensor._is_view() and tensor._base is not None:
        return tensor._base
    return tensor


def put_back(target: Tensor, values: Tensor, version: int) -> None:
    """Write values that a tensor held before into it, and let autograd count as it did then."""
    target.detach().copy_(values)
    if version >= 0 and not target.is_inference():
        set_version(target, version)


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that a function writes into, by its name, or by its schema."""
    places = written_places(func)
    found = [kwargs.get(name) for name in places.names]
    found += [args[i] for i in places.numbers if i < len(args)]
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


class Places(NamedTuple):
    """The arguments that a function writes into.

    Attributes:
        numbers: of those given by position.
        names: of those given by name.
    """

    numbers: tuple[int, ...]
    names: tuple[str, ...]


OF_OTHERS = ("__get__", "as_tensor", "asarray", "from_dlpack", "from_numpy", "frombuffer")
"""Functions whose results may lie in memory that was there before."""

DATA = torch.Tensor.data.__get__  # pyright: ignore
"""Reads the field ``data`` of a tensor: the same memory, and writes that autograd does not count.
"""

BIND_DATA = torch.Tensor.data.__set__  # pyright: ignore
"""Gives a tensor other memory."""

AS_ARRAY = frozenset(("numpy", "__array__", "__dlpack__"))
"""Functions that hand the memory of a tensor to others."""

OF_MEMORY = AS_ARRAY | {"__get__", "__set__"}
"""Functions that may hand out the memory of a tensor, or give it another."""

OPERATORS_IN_PLACE = frozenset(
    f"__i{name}__" for name in "add sub mul matmul truediv floordiv div mod pow and or xor".split()
) | {"__setitem__", "__ilshift__", "__irshift__"}
"""Python's operators that write into their first operand."""


OF_ENGINES = frozenset({"fsdp", "c10d", "c10d_functional", "_c10d_functional"})
"""Namespaces of operators that gather weights into memory which the engine fills and frees."""


@functools.lru_cache(4096)
def written_places(func: Any) -> Places:
    """Return the arguments that a function of torch, or an operator, writes into."""
    if isinstance(func, OpOverloadPacket):
        overloads = [getattr(func, name) for name in func.overloads()]
    elif isinstance(func, OpOverload):
        overloads = [func]
    else:
        name = getattr(func, "__name__", "")
        writes = name.endswith("_") and not name.endswith("__")
        if writes or name in OPERATORS_IN_PLACE:
            return Places((0,), ("out",))
        return Places((), ("out",))
    numbers, names = set(), set()
    for overload in overloads:
        if overload.namespace in OF_ENGINES:
            continue
        for i, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            names.add(argument.name)
            if not argument.kwarg_only:
                numbers.add(i)
    return Places(tuple(sorted(numbers)), tuple(sorted(names)))


HALVES = (torch.bfloat16, torch.float16)
"""Numbers whose rounding drowns a finite difference."""


def _any_in_transform(values: Iterable[Any]) -> bool:
    """Return whether a tensor among these belongs to a transform of torch.func."""
    return any(isinstance(value, Tensor) and in_transform(value) for value in values)


def version_of(tensor: Tensor) -> int:
    """Return how often autograd has seen a tensor written to, or -1 where it does not count."""
    if tensor.is_inference():
        return -1
    return tensor._version


def is_alive(tensor: Tensor) -> bool:
    """Return whether a tensor still has its memory.

    FSDP2 frees that of whole parameters between uses. Tensors that are made of others have none.
    """
    try:
        held = tensor.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):
        return True
    return not tensor.numel() or held > 0


@contextlib.contextmanager
def restoring_buffers(fn: Any, mixed: bool = True) -> Iterator[RestoringMode]:
    """Evaluate a function again; afterwards its modules' buffers and attributes are as they were
    before.

    Args:
        fn: the function, or a module that it calls.
        mixed: it mixes rows, or may.

    Raises:
        RowsMixError: if it mixes rows and ``mixed`` does not say so.
    """
    mode = RestoringMode(mixed, fn)
    try:
        with hidden_calls.protecting(mode), below_modes_of_the_user(mode):
            yield mode
    finally:
        mode.restore()
        mode.written.clear()  # what calls back to the mode would keep it, with these tensors
        mode.replaced.clear()


def without_trace(function: Callable[[], Any], beside: Tensor) -> Any:
    """Evaluate a function without gradient, and without a trace in the buffers of its modules.

    Args:
        function: returns an array.
        beside: an array of the same library.
    """
    xp = backend_of(beside)
    if xp is not torch_backend:
        return xp.detach(function())
    with torch.no_grad(), restoring_buffers(function):
        found = function()
    if not torch.compiler.is_compiling():
        # an older torch (2.9) keeps what autocast cast without gradient, and hands it out later
        torch.clear_autocast_cache()
    return found


_stance_lock = threading.Lock()
"""Held while the stance of torch.compile is changed."""

_stance_users: list[object] = []
"""Who wants another stance now, in all threads."""

_stance = contextlib.ExitStack()
"""What sets the stance back."""


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run what torch.compile compiled as it was written.

    Its kernels know nothing of the levels of forward mode. The stance of torch.compile is that of
    the whole process: the first thread to come here sets it, and the last to leave sets it back.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    user = object()
    try:
        with _stance_lock:
            _stance_users.append(user)
            if len(_stance_users) == 1:
                _stance.enter_context(torch.compiler.set_stance("force_eager"))
        yield
    finally:
        with _stance_lock:
            if user in _stance_users:
                _stance_users.remove(user)
            if not _stance_users:
                _stance.close()
