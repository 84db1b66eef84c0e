"""Forward-mode automatic differentiation by torch.func.jvp, beside an ordinary forward pass.

torch.func.jvp goes on with a tangent of zero where a function has no forward derivative, or where
a value leaves torch. That would be a wrong answer without a sign of it, so a function mode looks
at what each function returns, and raises DerivativeError where a tangent ends.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from flowspace.derivatives.replay import (
    RandomState,
    RestoringMode,
    base_of,
    forward_mode_lock,
    in_transform,
    written_by,
    written_places,
)
from flowspace.derivatives.rules import RANDOM
from flowspace.derivatives.rules.registry import CONSTANT, differentiable, may_draw
from flowspace.derivatives.second_run import First, Second, SecondRun
from flowspace.derivatives.shared_primal.dispatch_changes import (
    refuse_changed,
    value_without_modes,
)
from flowspace.derivatives.shared_primal.kinds import ELSEWHERE, LEAVES, leaving
from flowspace.derivatives.shared_primal.passes import is_watched
from flowspace.derivatives.shared_primal.watch import (
    Stranger,
    Watch,
    check_strangers,
    moved_a_little,
)
from flowspace.derivatives.shared_primal.writes import memory_below
from flowspace.derivatives.torch_internals import (
    close_forward_mode,
    dispatch_modes,
    forward_mode_is_open,
    function_modes,
    leave_function_modes,
    memory_of,
    outside_transforms,
    transform_level,
)
from flowspace.errors import DerivativeError

__all__ = ["ForwardMode"]

STOPS = CONSTANT | {"detach", "detach_", "where"}
"""Functions whose output may stand still though their input moves.

In `where` it may be the condition alone that moves.
"""

DRAWING = frozenset("dropout rand_like randn_like randint_like bernoulli".split())
"""Functions that draw a number for each of a tensor's, in the order of its memory."""

FIRST_COUNTS = frozenset("to type_as expand_as view_as reshape_as".split())
"""Functions that take what follows their first argument for its dtype or shape alone."""

FIRST_IS_KIND = frozenset("full_like new_full".split())
"""Functions that take their first argument for its dtype or shape alone."""

FOR_A_KIND = FIRST_COUNTS | FIRST_IS_KIND
"""All functions that take some argument for its dtype or shape alone."""

OF_TENSORS = frozenset(
    "add sub mul div matmul mm bmm linear cat stack __add__ __radd__ __sub__ __rsub__ __mul__ "
    "__rmul__ __truediv__ __rtruediv__ __matmul__ __rmatmul__".split()
)
"""Functions that take no tensor for a number unless by name; models call them most."""

OF_TORCH = (
    "forward AD",
    "forward gradient",
    "not have strides",
    "functorch",
    "torch.func",
    "TransformType",
    "vmap",
    "jvp",
    "data pointer",
    "setup_context",
    "TensorWrapper",
    "for inference tensor",
    "INTERNAL ASSERT",
)
"""Words by which one knows that torch refuses to run something in forward mode."""


@dataclass(frozen=True)
class ForwardMode(SecondRun):
    """Exact: one more forward pass, in forward-mode AD, without gradient.

    Fused attention kernels have no forward derivative, so attention runs on the math kernel for
    this pass only; the setting is restored afterwards, also after an error. The pass with gradient
    keeps the fused kernels. Threads take turns: torch counts its levels of forward mode for the
    whole process.

    Raises:
        DerivativeError: where the model calls what has no forward derivative, or hands a value
            that moves out of torch.
    """

    def derive(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Tensor | None],
        first: First,
        mixed: bool,
    ) -> Second:
        """Return the derivative on the given rows, and the value, which comes with it."""
        watch = Watch(fn) if is_watched(fn) else None
        value, derivative = _derive(fn, primals, tangents, watch)
        if watch is None or not watch.strangers:
            return Second(derivative, value)

        def strangers_at(primals: Sequence[Any]) -> list[Stranger]:
            there = Watch(fn, watch.strangers)
            _derive(fn, primals, tangents, there)
            return there.strangers

        def check() -> None:
            moved = moved_a_little(primals, tangents)
            check_strangers(
                watch.strangers, lambda: strangers_at(primals), lambda: strangers_at(moved)
            )

        return Second(derivative, value, check)

    def check_run(self, run: RestoringMode) -> None:
        """Raise DerivativeError if the model followed tangents in another thread, where torch goes
        on without them.
        """
        if run.elsewhere:
            raise DerivativeError(ELSEWHERE)


def _derive(
    fn: Callable[..., Tensor],
    primals: Sequence[Any],
    tangents: Sequence[Tensor | None],
    watch: Watch | None,
) -> tuple[Tensor, Tensor]:
    """Return the value and the derivative of a function, and watch what it uses.

    Raises:
        DerivativeError: if torch cannot differentiate it.
    """
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None]
    inputs = tuple(primals[i] for i in moving)
    directions = tuple(tangents[i] for i in moving)

    def of_moving(*moved: Tensor) -> Tensor:
        arguments = list(primals)
        for i, value in zip(moving, moved, strict=True):
            arguments[i] = value
        with _NoLostTangents(watch):
            return fn(*arguments)

    try:
        with watch or contextlib.nullcontext(), _one_thread(), sdpa_kernel(SDPBackend.MATH):
            both: Any = torch.func.jvp(of_moving, inputs, directions)
    except (RuntimeError, NotImplementedError, KeyError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            # it came while torch opened a level, which torch then failed to close
            raise error.__context__ from None
        if not any(mark in str(error) for mark in OF_TORCH):
            raise
        raise DerivativeError(
            f"got a model that torch.func.jvp cannot differentiate ({_reason(error)}); write "
            "derivative=SharedPrimal(), or FiniteDifference(), which needs no forward "
            "derivatives"
        ) from error
    return both


class _NoLostTangents(TorchFunctionMode):
    """Raises DerivativeError where a tangent ends, and torch.func.jvp would go on with zeros.

    Attributes:
        watch: what it tells of the tensors that it sees, in a pass that is watched.
        level: the transforms of torch.func that it was made within; inside further ones, which
            are the model's own, nothing is checked.
        stopped: by memory, what tells whether it is still there, of tensors that stand still and
            share it with one that moves.
        spoiled: by memory, such tensors that were written to: torch changed the value of the one
            that moves, and not its tangent.
    """

    def __init__(self, watch: Watch | None) -> None:
        super().__init__()
        self.watch = watch
        self.level = transform_level()
        self.stopped: dict[int, StorageWeakRef] = {}
        self.spoiled: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function; raise if what it is given has a tangent and what it returns has none."""
        kwargs = kwargs or {}
        # a transform that the model itself calls follows its tensors by levels of its own
        if transform_level() != self.level:
            return func(*args, **kwargs)
        given = list(_tensors((*args, *kwargs.values())))
        written: list[Tensor] = []
        if kwargs or written_places(func).numbers:
            written = written_by(func, args, kwargs)
        if self.spoiled:
            self._refuse_spoiled(given)
        if self.stopped:
            self._note_spoiled(written)
        before = 0
        if self.watch is not None:
            before = len(self.watch.strangers)
            self.watch.rewritten(*written)
            for tensor in given:
                self.watch.met_at_rest(tensor)
        if any(map(_moves, given)):
            out = self._follow(func, args, kwargs, written)
        else:
            out = func(*args, **kwargs)
        if self.watch is not None:
            self.watch.returned(out, False, before)
        return out

    def _note_spoiled(self, written: Sequence[Tensor]) -> None:
        """Note that a tensor is written to that stands still, and shares memory with one that
        moves, or moved: it may be used no more.
        """
        for target in written:
            memory = memory_below(target)
            held = self.stopped.get(memory)
            if held is not None and not held.expired() and not _moves(target):
                self.spoiled[memory] = target

    def _refuse_spoiled(self, given: Sequence[Tensor]) -> None:
        """Raise DerivativeError for a tensor that moves, and was written to by another that shares
        its memory and stands still.
        """
        for tensor in given:
            if _moves(tensor) and memory_below(tensor) in self.spoiled:
                raise DerivativeError(
                    "got a write into x.detach() of a tensor x that moves with z_t or t and is "
                    "used afterwards: torch changes its value, and not its tangent; write "
                    "x.detach().clone(), or derivative=SharedPrimal()"
                )

    def _follow(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, written: Sequence[Tensor]
    ) -> Any:
        """Run a function of what moves."""
        name = getattr(func, "__name__", str(func))
        if name in LEAVES:
            raise DerivativeError(leaving(name))
        _refuse_written(func)
        if name in FOR_A_KIND and not any(map(_moves, _tensors(_counted(name, args, kwargs)))):
            return func(*args, **kwargs)
        if written:
            args, kwargs = _apart(args, kwargs, written[0])
        if (kwargs or name not in OF_TENSORS) and name not in STOPS | FIRST_COUNTS:
            _check_each(func, args, kwargs, written)
        plain = self._without_modes(func, args, kwargs, name, written)
        out = _drawn(func, name, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        refuse_changed(name, out, plain)
        if name == "detach":
            base = base_of(out)
            self.stopped[memory_of(base)] = StorageWeakRef(base.untyped_storage())
        # What cannot carry a tangent (whole numbers, nothing at all) has not lost one.
        parts = [part for part in _tensors((out,)) if differentiable(part) and part.numel()]
        if parts and name not in STOPS and not any(map(_moves, parts)):
            raise DerivativeError(
                f"got {_called(func)}, which has no forward derivative, of a tensor that moves "
                "with z_t or t; write derivative=FiniteDifference(), which needs none, or "
                ".detach() first if it is a constant"
            )
        return out

    def _without_modes(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, name: str, written: Sequence[Tensor]
    ) -> Any:
        """Return what a function is about to return, were there no dispatch modes, or None for no
        matter what: it draws, or nobody watches.
        """
        if self.watch is None or not dispatch_modes() or name in RANDOM | CONSTANT:
            return None
        if may_draw(name):
            return None
        copies = args
        if written and args:
            copies = (args[0].clone(), *args[1:])
        return value_without_modes(func, copies, kwargs)


def _counted(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
    """Return the arguments whose numbers a function takes that has others for their kind."""
    if name in FIRST_COUNTS:
        return args[:1]
    return (*args[1:], *kwargs.values())


def _drawn(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return what a function draws that is given a tensor which is not contiguous, and None for
    any other: torch.func.jvp would draw in another order than the first run did.
    """
    if name not in DRAWING:
        return None
    options = dict(kwargs)
    x = options.pop("input", args[0] if args else None)
    in_place = options.get("inplace") or (len(args) > 3 and args[3])
    if in_place or not isinstance(x, Tensor) or x.is_contiguous():
        return None
    with outside_transforms():
        if name != "dropout":
            return func(base_of(x), *args[1:], **options)
        mask = func(torch.ones_like(base_of(x)), *args[1:], **options)
    return x * mask


_followed: set[Hashable] = set()
"""Functions, and the kinds of their arguments, of which torch follows each tangent."""


def _check_each(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: Sequence[Tensor]
) -> None:
    """Raise DerivativeError for an argument whose tangent torch drops beside that of another.

    Such are tensors that it takes for numbers, as the alpha of torch.add. Each argument is tried
    alone, once for each function and kind of arguments.
    """
    given = [*args, *kwargs.values()]
    ranks = [x.ndim for x in given if isinstance(x, Tensor)]
    # a builtin takes a tensor for a number if it has no axis
    if len(ranks) < 2 or (all(ranks) and not isinstance(func, FunctionType)):
        return
    moving = [i for i, x in enumerate(given) if isinstance(x, Tensor) and _moves(x)]
    tried = [i for i in moving if not any(given[i] is target for target in written)]
    if len(moving) < 2 or not tried:
        return
    kinds = tuple(x.ndim if isinstance(x, Tensor) else None for x in given)
    case = func, tuple(kwargs), tuple(moving), kinds
    if case in _followed:
        return
    repeated = RandomState(given[moving[0]].device).replay(func)
    for i in tried:
        alone = list(given)
        for other in moving:
            if other != i:
                alone[other] = given[other].detach().clone()
        named = dict(zip(kwargs, alone[len(args) :], strict=True))
        try:
            out = repeated(*alone[: len(args)], **named)
        except (RuntimeError, NotImplementedError):
            continue  # as it is called, it may raise the same
        parts = [part for part in _tensors((out,)) if differentiable(part) and part.numel()]
        if parts and not any(map(_moves, parts)):
            raise DerivativeError(
                f"got an argument of {_called(func)}, of shape {tuple(given[i].shape)}, that "
                "moves with z_t or t and that torch takes for a constant; write .detach() first "
                "if it is one, or derivative=FiniteDifference()"
            )
    if getattr(func, "__closure__", None) is None:  # closures are made anew for each call
        _followed.add(case)


def _apart(
    args: tuple[Any, ...], kwargs: dict[str, Any], target: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a function that writes into the first, the others in memory of
    their own: torch's formulas for tangents read them after the write.
    """
    memory = memory_below(target)

    def apart(value: Any) -> Any:
        if isinstance(value, Tensor) and memory_below(value) == memory:
            return value.clone()
        return value

    others = tuple(map(apart, args[1:]))
    return (*args[:1], *others), {name: apart(value) for name, value in kwargs.items()}


def _refuse_written(func: Any) -> None:
    """Raise DerivativeError for an operator of torch.library that writes into its arguments: torch
    lets it write the values, and nothing of a tangent.
    """
    if isinstance(func, OpOverload | OpOverloadPacket) and written_places(func).numbers:
        raise DerivativeError(
            f"got {_called(func)}, an operator that writes into its arguments, of a tensor that "
            "moves with z_t or t; write derivative=FiniteDifference()"
        )


def _called(func: Any) -> str:
    """Return a function's name for a message; what reads an attribute is called by it."""
    if isinstance(func, OpOverload):
        return func.name()
    name = getattr(func, "__name__", str(func))
    if name != "__get__":
        return name
    attribute = getattr(func, "__self__", None)
    return f".{getattr(attribute, '__name__', 'data')}"


def _tensors(values: Any) -> Iterator[Tensor]:
    """Iterate over the tensors among values, and in the tuples and lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (tuple, list):
            yield from _tensors(value)


def _moves(tensor: Tensor) -> bool:
    """Return whether a tensor has a tangent now; torch gives none to a sparse one."""
    if not in_transform(tensor):
        return False
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None
    except NotImplementedError:  # it is sparse
        return False


def _reason(error: Exception) -> str:
    """Return the first line of what torch says, or something clearer."""
    if isinstance(error, KeyError):  # the message is the operator's key
        return "it calls an operator that takes a function, such as flex_attention, scan or cond"
    if "captured Tensor" in str(error):
        return (
            "something writes into a tensor that it holds, unseen by torch's functions, as "
            "DistributedDataParallel does into buffers unless broadcast_buffers=False"
        )
    return str(error).strip().partition("\n")[0].rstrip(".")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep other threads out, and leave no level of forward mode and no function mode behind, also
    after an interrupt.

    Python may be interrupted as a context is about to be left, which is then not left: so it is
    with the lock.
    """
    is_owned = forward_mode_lock._is_owned  # type: ignore[attr-defined]
    held = is_owned()
    try:
        with forward_mode_lock, _nothing_left():
            yield
    except BaseException:
        while is_owned() and not held:
            forward_mode_lock.release()
        raise


@contextlib.contextmanager
def _nothing_left() -> Iterator[None]:
    """Leave the levels of forward mode, which torch counts for the whole process, and the function
    modes that an interrupt left entered.
    """
    outermost, modes = not forward_mode_is_open(), function_modes()
    try:
        yield
    except BaseException:
        leave_function_modes(modes)
        if outermost:
            close_forward_mode()
        raise
