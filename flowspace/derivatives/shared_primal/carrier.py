"""The carrier: a function mode that runs each torch function as it is, and its rule beside it.

A tensor that carries a tangent is an alias of its primal with one attribute more, a `Dual`. For a
function that is called with such aliases the carrier

1. unpacks the arguments, into duals for the rule and primals for the function (`unpack`),
2. decides by the function's kind (`kinds.treatment_of`): enter it, run it with its rule, write in
   place, refuse it,
3. runs the function on the primals, with gradient, and the rule on the duals, without (`ruled`),
4. wraps the outputs in aliases again, each with its tangent and where its rows lie
   (`wrap_output`).

Autograd saves primals and never aliases, so a tangent is freed when the model lets go of it.

A model calls some hundred functions in a step, and with small layers the steps above cost more
than the arithmetic. So the common case, a builtin with a rule and one output, takes few calls of
Python; what is rare is asked for last.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from flowspace.derivatives import hidden_calls, rules
from flowspace.derivatives.own_rules import OWN_RULES
from flowspace.derivatives.replay import RandomState, in_transform, written_by
from flowspace.derivatives.rules import EVALUATING, NO_TENSORS, PLAIN_TYPES, RANDOM, RULES, At
from flowspace.derivatives.rules.dual import Dual, Layout, LostRowsError
from flowspace.derivatives.shared_primal import custom_functions, higher_order, own_functions
from flowspace.derivatives.shared_primal.dispatch_changes import (
    refuse_changed,
    value_without_modes,
)
from flowspace.derivatives.shared_primal.kinds import (
    DATA_READ,
    OUT_OF_PLACE,
    REFUSED,
    TRANSFORMED,
    UNSEEN,
    WHOLE,
    Treatment,
    refusal,
    treatment_of,
    warn_of_whole_numbers,
)
from flowspace.derivatives.shared_primal.watch import Watch
from flowspace.derivatives.shared_primal.writes import Writes, memory_below
from flowspace.derivatives.torch_internals import (
    base_transform,
    dispatch_modes,
    enter_function_mode,
    function_modes,
    leave_function_mode,
    not_intercepted,
    set_gradients,
    subclasses_enabled,
    transform_level,
)
from flowspace.errors import DerivativeError

__all__ = ["FIELD", "Carrier"]

FIELD = "_flowspace_dual"
"""The attribute of an alias that holds its dual."""

MOVING = "_flowspace_moving"
"""The attribute of a tensor that is no view, in whose memory something moves."""

MADE = "_flowspace_made"
"""The attribute of a tensor that the model made in a pass, for itself."""

MAKERS = frozenset(
    "zeros ones empty full zeros_like ones_like empty_like full_like new new_zeros new_ones "
    "new_empty new_full clone".split()
)
"""Functions that make tensors which are then filled."""

PLAIN = Tensor.__torch_function__.__func__  # pyright: ignore
"""What a subclass of Tensor does with functions unless it says something else."""

WITH_STATISTICS = ("batch_norm", "instance_norm")
"""Functions that may write into statistics which they are given."""

_UNFIT = object()
"""In place of a tangent: the rule does not take these arguments."""


class Carrier(TorchFunctionMode):
    """Carries tangents through the torch functions that are called while it is entered.

    Attributes:
        traced: what it runs is being traced, on tensors without values.
        lost: rows mix, or may mix: the tangents stop, and every row needs one.
        idle: it lets every function pass.
        moving: the mark of tensors in whose memory something moves.
        live: the aliases that were made, as long as they live.
        has_detached: there are tensors that share memory with these, and carry none.
        hands_out: the model took the memory of such a tensor, and may make others of it.
        writes: what became of tensors that the model wrote into.
        inside: the functions written in others that it has entered.
        level: the transforms of torch.func that it was made within.
        elsewhere: a function was called in another thread with what moves.
        refused: the error of a function that was refused, which the model may have caught.
        kept: the aliases that were made in a function of a subclass of Tensor.
        watch: what it tells of the tensors that it sees, in a pass that is watched.
    """

    def __init__(self, traced: bool = False, watch: Watch | None = None) -> None:
        super().__init__()
        self.traced = traced
        self.watch = watch
        self.lost = False
        self.idle = False
        self.live: list[weakref.ref[Tensor]] = []
        self.moving = object()
        self.has_detached = False
        self.hands_out = False
        self.writes = Writes(self)
        self.inside: list[Any] = []
        self.level = transform_level()
        self.elsewhere = False
        self.refused: DerivativeError | None = None
        self.kept: list[Tensor] | None = None

    # --- tensors and their tangents

    def wrap(self, primal: Tensor, tangent: Tensor, layout: Layout | None) -> Tensor:
        """Return an alias of a primal that carries a tangent."""
        # A view has the values, memory and graph of its primal, and is an object of its own: the
        # attribute is then on no tensor that anybody else holds.
        alias = primal.view_as(primal)
        dtype = primal.dtype
        if tangent.dtype is not dtype:
            tangent = tangent.to(dtype)
        if self.traced:
            dual = Dual(primal, tangent.detach(), layout, self)
        else:
            dual = Dual(primal, tangent, layout, self, primal.is_leaf)
            # views of its memory that no function made are found by their base
            base = alias._base
            if base is not None:
                setattr(base, MOVING, self.moving)
            if dtype.is_complex:
                dual.unsure = True
                self.writes.seen(primal)
        setattr(alias, FIELD, dual)
        self.live.append(weakref.ref(alias))
        if self.kept is not None:
            self.kept.append(alias)
        if self.watch is not None:
            dual.unsure = True
            self.watch.known(primal)  # torch may come to it by the alias
        return alias

    def begin(self, tensor: Tensor, tangent: Tensor, layout: Layout) -> None:
        """Let a tensor of the model's own carry a tangent itself, once it was written to."""
        dual = Dual(tensor, tangent.to(tensor.dtype), layout, self, self.watch is not None)
        if tensor.dtype.is_complex:
            dual.unsure = True
            self.writes.seen(tensor)
        setattr(tensor, FIELD, dual)
        setattr(tensor, MOVING, self.moving)
        self.live.append(weakref.ref(tensor))

    def held(self, alias: Tensor) -> Dual:
        """Return the dual of an alias."""
        return getattr(alias, FIELD)

    def dual(self, tensor: Tensor) -> Dual | None:
        """Return what a tensor carries that a function is given, or None."""
        dual = self.carried(tensor)
        if self.watch is not None and not self.lost:
            if dual is None:
                self.watch.met_at_rest(tensor)
            else:
                self.watch.met_moving(tensor)
        return dual

    def carried(self, tensor: Tensor) -> Dual | None:
        """Return what a tensor carries now, or None."""
        held = getattr(tensor, FIELD, None)
        # An alias of another carrier, as where the model evaluates a route itself, is a plain
        # tensor to this one.
        if held is None or held.owner is not self:
            held = None
            if self.live and transform_level() != self.level:
                self._refuse_transforms(tensor)
        elif held.tangent is None:
            return None  # detached, so it has no part in the mirror of the memory that it shares
        elif held.unsure:
            held = self._as_it_is_now(tensor, held)
        if self.writes.mirrors:
            mirrored = self._mirrored(tensor, held)
            if mirrored is not None:
                return mirrored
        if held is None and not (self.lost or self.traced):
            self._refuse_hidden(tensor)
        return held

    def _mirrored(self, tensor: Tensor, held: Dual | None) -> Dual | None:
        """Return the dual of a tensor in memory that was written to in part, or None elsewhere.

        What lies there now is told by its mirror alone.
        """
        primal, layout = tensor, None
        if held is not None:
            primal, layout = held.primal, held.layout
        tangent = self.writes.mirrored(primal, layout)
        if tangent is None:
            return None
        if layout is None and self.writes.partial:
            self.lost = True  # where its rows lie is not known
            return None
        return Dual(primal, tangent, layout, self)

    def _as_it_is_now(self, alias: Tensor, held: Dual) -> Dual:
        """Return the dual of an alias, to which torch may have done something unseen: put it into
        a graph without its primal, or written to a part of its complex numbers.

        An autograd.Function whose ``apply`` was looked up before this pass hands out aliases that
        torch put into the graph, and not their primals.

        Raises:
            DerivativeError: if a part of complex numbers was assigned.
        """
        if alias.dtype.is_complex and not self.lost:
            self.writes.check_seen(alias)
        if not (held.primal.is_leaf and isinstance(alias.grad_fn, BackwardCFunction)):
            return held
        return self.put_into_graph(alias, held)

    def put_into_graph(self, alias: Tensor, held: Dual) -> Dual:
        """Return the dual of an alias that torch put into the graph in place of its primal."""
        with not_intercepted():
            primal = alias.clone()  # a view that was made without gradient cannot be written to
        dual = Dual(primal, held.tangent, held.layout, self)
        dual.unsure = held.unsure
        setattr(alias, FIELD, dual)
        return dual

    def _refuse_unseen(self, view: Tensor) -> None:
        """Raise DerivativeError for an unmarked view of what moves.

        No function that the carrier saw has made it: torch.Tensor(x) and x.as_subclass(...) call
        none.
        """
        if getattr(view._base, MOVING, None) is not self.moving:
            return
        if self._carries(view._base):
            self.lost = True  # it was taken before its base began to move
            return
        if rules.differentiable(view) and not isinstance(view, nn.Parameter):
            raise DerivativeError(UNSEEN)

    def _refuse_hidden(self, tensor: Tensor) -> None:
        """Raise DerivativeError for a tensor in which something moves unseen: a view that no
        function made, or one of a subclass that works below all modes on a tensor which it holds.
        """
        if tensor._is_view():
            self._refuse_unseen(tensor)
        if type(tensor) in (Tensor, nn.Parameter):
            return
        if any(map(self._carries, vars(tensor).values())):
            raise DerivativeError(
                f"got a {type(tensor).__name__} that holds a tensor which moves with z_t or t, "
                "where tangents cannot follow; write plain tensors, or "
                "derivative=FiniteDifference()"
            )

    def _carries(self, tensor: Any) -> bool:
        """Return whether a tensor carries a tangent of its own."""
        held = getattr(tensor, FIELD, None)
        return held is not None and held.owner is self and held.tangent is not None

    def _refuse_transforms(self, tensor: Tensor) -> None:
        """Raise DerivativeError for a tensor that carries a tangent inside torch.func.vmap, grad
        or jvp.
        """
        # A transform hands on a tensor of its own without the attribute; the alias is beneath.
        while in_transform(tensor):
            tensor = base_transform(tensor)
            held = getattr(tensor, FIELD, None)
            if held is not None and held.owner is self:
                raise DerivativeError(TRANSFORMED)

    def detached(self, tensor: Tensor) -> Tensor:
        """Mark a tensor that shares memory with one that carries a tangent, and carries none
        itself.
        """
        self.has_detached = True
        setattr(tensor, FIELD, Dual(tensor, None, None, self))  # type: ignore[arg-type]
        self.live.append(weakref.ref(tensor))
        return tensor

    def is_detached(self, tensor: Tensor) -> bool:
        """Return whether a tensor is marked as one that carries no tangent."""
        held = getattr(tensor, FIELD, None)
        return held is not None and held.owner is self and held.tangent is None

    def attach(self, memory: int) -> None:
        """Take the mark off the detached tensors in a memory: they move as it does."""
        for reference in self.live:
            tensor = reference()
            if tensor is None or not self.is_detached(tensor):
                continue
            if memory_below(tensor) == memory:
                delattr(tensor, FIELD)

    def let_go(self, tensor: Tensor) -> bool:
        """Take its tangent off a tensor; return whether it had one of its own."""
        had = hasattr(tensor, FIELD)
        if had:
            delattr(tensor, FIELD)
        return had

    def release(self) -> None:
        """Let go of every tangent that the model still holds, and of the graph and the writes.

        What it keeps of a pass, such as a cache, is then a plain tensor, and holds no memory of
        tangents. Nothing of the pass waits for Python's collector of cycles.
        """
        for reference in self.live:
            alias = reference()
            if alias is not None:
                self.let_go(alias)
        self.live, self.watch = [], None
        self.writes.release()

    def aliases(self) -> Iterator[Tensor]:
        """Iterate over the tensors that carry a tangent."""
        for reference in list(self.live):
            alias = reference()
            held = getattr(alias, FIELD, None)
            if alias is not None and held is not None and held.tangent is not None:
                yield alias

    def unpack(self, values: Sequence[Any], duals: list[Dual]) -> tuple[list[Any], list[Any]]:
        """Return arguments with duals in place of the tensors that carry a tangent, and with their
        primals; the duals are added to those that were found before.
        """
        given, primals, mirrors = list(values), list(values), self.writes.mirrors
        for i, value in enumerate(values):
            kind = type(value)
            if kind in NO_TENSORS or (kind is nn.Parameter and not mirrors):
                continue  # a parameter is never an alias, nor a view of one
            if kind is Tensor or isinstance(value, Tensor):
                # what is not plainly an alias of this carrier is looked at more closely
                dual = getattr(value, FIELD, None)
                if dual is None or dual.owner is not self or dual.unsure or mirrors:
                    dual = self.dual(value)
                if dual is not None and dual.tangent is not None:
                    duals.append(dual)
                    given[i], primals[i] = dual, dual.primal
            elif isinstance(value, (tuple, list)):
                given[i], primals[i] = self._unpack_nested(value, duals)
        return given, primals

    def _unpack_nested(self, values: Sequence[Any], duals: list[Dual]) -> tuple[Any, Any]:
        """Return a list or tuple of arguments, unpacked, as one of its kind."""
        given, primals = self.unpack(values, duals)
        if isinstance(values, list):
            return given, primals
        make = getattr(type(values), "_make", tuple)
        return make(given), make(primals)

    def _unpack_named(
        self, values: Mapping[str, Any], duals: list[Dual]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return arguments by name, unpacked.

        Raises:
            DerivativeError: if something that moves is written to a tensor given as out.
        """
        given, primals = self.unpack(list(values.values()), duals)
        if duals and values.get("out") is not None:
            raise DerivativeError(refusal("out="))
        return dict(zip(values, given, strict=True)), dict(zip(values, primals, strict=True))

    # --- one function

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a torch function, and its rule beside it.

        What torch.compile captures, it captures without tangents.
        """
        if is_dynamo_compiling():
            return hidden_calls.call_captured(func, args, kwargs)
        if self.idle:
            return func(*args, **(kwargs or {}))
        by_subclass = types and not PLAIN_TYPES.issuperset(types) and subclasses_enabled()
        # What the carrier itself does is not the model: torch.compile is not to capture it.
        before = hidden_calls.capture_callback()
        if before is not None:
            hidden_calls.set_capture_callback(None)
        elif not by_subclass and treatment_of(func).kind == "metadata":
            return func(*args, **(kwargs or {}))
        try:
            if by_subclass:
                return self._by_subclass(func, types, args, kwargs or {})
            if self.watch is not None:
                return self._watched(self.watch, func, args, kwargs or {})
            return self.carry(func, args, kwargs or {})
        except DerivativeError as error:
            self.refused = error
            raise
        finally:
            if before is not None:
                hidden_calls.set_capture_callback(before)

    def _watched(
        self, watch: Watch, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a torch function, and tell of what it writes to and returns."""
        kind, name = treatment_of(func)
        if kind == "in place":
            watch.filled(args[0], name)
        elif name == "data_ptr":
            watch.says_where(args[0])
        elif name.endswith(WITH_STATISTICS):
            watch.rewritten(*pytree.tree_leaves((args, kwargs)))
        derived, before = self.derived((args, kwargs)), len(watch.strangers)
        out = self.carry(func, args, kwargs)
        found = out
        if name == "setitem" or kind == "refused":  # it returns nothing
            found = args[0]
        watch.returned(found, derived, before)
        return out

    def derived(self, values: Any) -> bool:
        """Return whether a tensor among values moves, is detached of what does, or was computed
        from it in a pass that is watched.
        """
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, Tensor):
                held = getattr(leaf, FIELD, None)
                if held is not None and held.owner is self:
                    return True
        return self.watch is not None and self.watch.is_derived(values)

    def _by_subclass(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Let a subclass of Tensor that has functions of its own go first, and follow what it
        calls.
        """
        for cls in types:
            if getattr(cls.__torch_function__, "__func__", None) is PLAIN:
                continue
            before, self.kept = self.kept, []
            try:
                with self:
                    out = cls.__torch_function__(func, types, args, kwargs)
                out = pytree.tree_map(self._found_again, out)
                if self.watch is not None:
                    self.watch.made(out)
                return out
            finally:
                self.kept = before
        return self.carry(func, args, kwargs)

    def _found_again(self, out: Any) -> Any:
        """Return what a subclass returned, with the tangent that it had before the subclass gave
        it its own type, which no mode sees.
        """
        if not isinstance(out, Tensor) or type(out) is Tensor or hasattr(out, FIELD):
            return out
        for alias in self.kept or ():
            same = alias.shape == out.shape and alias.stride() == out.stride()
            if same and alias.data_ptr() == out.data_ptr():
                held = self.held(alias)
                return self.wrap(out, held.tangent, held.layout)
        return out

    def carry(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a torch function, and its rule beside it."""
        treatment = treatment_of(func)
        kind, name = treatment
        if kind == "metadata":
            return func(*args, **kwargs)
        if kind == "itself" and _is_itself(args, kwargs):
            return args[0]
        duals: list[Dual] = []
        given, primals = self.unpack(args, duals)
        named, options = kwargs, kwargs
        if kwargs:
            named, options = self._unpack_named(kwargs, duals)
        if not duals and not (kind == "in place" and self.writes_below(args[0])):
            return self._at_rest(func, treatment, args, kwargs)
        call = rules.Call(func, given, named, primals, options, duals, self.traced)
        if kind == "higher order" and self.traced and not self.lost:
            return higher_order.run(self, call, name, args)
        if transform_level() != self.level:
            raise DerivativeError(TRANSFORMED)
        # There will be a second pass for the tangents; this one goes on for the value.
        if not self.lost:
            try:
                if kind == "rule":
                    return self.ruled(call, name)
                return self._treated(call, treatment, args, kwargs)
            except LostRowsError:
                # the call has kept what the function returned, so it is not run twice
                self.lost = True
        self._refuse_once_lost(treatment)
        return _value_alone(call, args)

    def writes_below(self, target: Tensor) -> bool:
        """Return whether to write into a tensor is to write, through a detached one, into memory
        that moves.
        """
        if not self.has_detached or self.lost:
            return False
        if self.hands_out and self.writes.shared(target):
            self.detached(target)  # as it is if it was made of the memory
        return self.writes.stopped(target)

    def _at_rest(
        self,
        func: Callable[..., Any],
        treatment: Treatment,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a function none of whose arguments carries a tangent."""
        if self.lost:
            self._refuse_once_lost(treatment)
        if treatment.kind == "higher order" and self.traced and not self.lost:
            call = rules.Call(func, args, kwargs, args, kwargs, [], self.traced)
            return higher_order.run(self, call, treatment.name, args)
        if treatment.kind in ("in place", "refused") or "out" in kwargs:
            self.writes.about_to_write(*written_by(func, args, kwargs))
        elif treatment.kind == "detached":
            self.writes.detached(args[0])
            if treatment == DATA_READ:
                self.writes.remember(args[0])  # what is written through it, nobody sees
        elif treatment.kind == "leaves":
            args = self._handing_out(args)
        out = func(*args, **kwargs)
        if self.has_detached and args and isinstance(args[0], Tensor):
            self._mark_views(args[0], out)
        return self._made(treatment.name, out)

    def _handing_out(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of a function that hands out values of a tensor without a tangent:
        who gets them is not to get our mark.
        """
        if not args or not isinstance(args[0], Tensor):
            return args
        detached = self.is_detached(args[0])
        if self.watch is not None:
            self.watch.hands_out(args[0], detached)
        if not detached:
            return args
        self.hands_out = True
        with not_intercepted():
            return args[0].detach(), *args[1:]

    def _made(self, name: str, out: Any) -> Any:
        """Return what a function returned, marked if it is a tensor made for the model."""
        if name in MAKERS and isinstance(out, Tensor):
            setattr(out, MADE, self.moving)
        return out

    def has_made(self, tensor: Tensor) -> bool:
        """Return whether a tensor was made in this pass."""
        return getattr(tensor, MADE, None) is self.moving

    def _refuse_once_lost(self, treatment: Treatment) -> None:
        """Raise DerivativeError for a function that drops tangents, whatever it is called with.

        In the second pass, which is without gradient, the model may go round it.
        """
        if treatment.kind == "refused" and treatment.name in REFUSED:
            raise DerivativeError(REFUSED[treatment.name])

    def _mark_views(self, source: Tensor, out: Any) -> None:
        """Mark the parts of an output that are views of a detached tensor, as it is marked."""
        held = getattr(source, FIELD, None)
        if held is None or held.owner is not self or held.tangent is not None:
            return
        memory = memory_below(source)
        for part in pytree.tree_leaves(out):
            if not isinstance(part, Tensor) or part.layout != torch.strided or part is source:
                continue
            if memory_below(part) == memory:
                self.detached(part)

    def _treated(
        self,
        call: rules.Call,
        treatment: Treatment,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Do what the kind of a function asks for that is not just called with its rule."""
        func, (kind, name) = call.func, treatment
        if kind == "python":
            return self._python(call, name, args, kwargs)
        if kind == "random":
            parts = rules.decompositions(name, args, kwargs)
            if parts:
                return self.enter(func, parts, args, kwargs)
        if kind in ("refused", "leaves"):
            raise DerivativeError(refusal(name or func.__name__, kind))
        if kind == "in place":
            return self.writes.write(call, name, args[0])
        if kind in ("constant", "itself") and call.returns_first():
            return args[0]
        if kind == "constant":
            return self._made(name, call.out)
        if kind == "detached":
            return self.detached(call.evaluate())
        if kind == "higher order":
            return higher_order.run(self, call, name, args)
        return self.ruled(call, name)

    def meet(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a function of the model's own that has a rule, as one where no other mode is to see
        what it calls.
        """
        if self.idle or function_modes() != 1:
            return function(*args)
        innermost = leave_function_mode()
        try:
            return self.__torch_function__(function, (), args)
        finally:
            enter_function_mode(innermost)

    def _python(
        self, call: rules.Call, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Enter a function that is written in others, or stand for it if it was entered before."""
        func = call.func
        if func in OWN_RULES:
            return own_functions.run(self, call, args)
        # Some call the builtin of their own name: seen for the second time, it has a rule.
        if func in self.inside or (func in OUT_OF_PLACE and not kwargs["inplace"]):
            return self.ruled(call, name)
        off = func is F.dropout and not (kwargs["training"] and kwargs["p"])
        # Most models call dropout also where it does nothing.
        if off and not kwargs["inplace"]:
            return args[0]
        return self.enter(func, _unchecked(func), args, kwargs)

    def ruled(self, call: rules.Call, name: str) -> Any:
        """Run a function as it is, and its rule, or torch.func.jvp of it, beside it.

        For a rule and one output, as mostly, what others here do is written out.
        """
        rule = RULES.get(name)
        if rule is None or self.traced or name in EVALUATING or dispatch_modes():
            return self._ruled_otherwise(call, name)
        out = call.evaluate()
        if type(out) is not Tensor or not out.is_floating_point():
            return self._ruled_otherwise(call, name)
        found: Any = _UNFIT
        with not_intercepted():
            set_gradients(False)
            try:
                found = rule(call, *call.args, **call.kwargs)
            except TypeError:
                pass
            finally:
                set_gradients(call.grad)
        if type(found) is At:
            return self.wrap(out, found.tangent, found.layout)
        if found is _UNFIT:
            return self._ruled_otherwise(call, name)
        return self.with_tangents(call, found)

    def _ruled_otherwise(self, call: rules.Call, name: str) -> Any:
        """Do what `ruled` does, whatever the function is and returns."""
        rule, draws = RULES.get(name), None
        if rule is None:
            rule, draws = self._by_forward_mode(call, name)
        # Two rules of norms run the function itself, by a kernel that returns mean and scale too.
        # A dispatch mode of the user, and a subclass of Tensor, have to see the function that the
        # model calls.
        by_rule = name in EVALUATING
        if by_rule and not self.traced:
            by_rule = not dispatch_modes() and call.of_plain_tensors()
        if not by_rule and not rules.moves(call.evaluate()):
            if name in WHOLE:
                warn_of_whole_numbers(name)
            return call.out
        if draws is not None and draws.changed():
            if any(dual.layout for dual in call.duals):
                raise LostRowsError  # the draws belong to the whole batch
            call.func = draws.replay(call.func)
        try:
            found = self.tangents(call, rule)
        except TypeError:  # arguments in an order or under names that the rule does not know
            call.run(call.evaluate)
            found = rules.forward(call)
        if self.watch is not None and dispatch_modes() and draws is None and name not in RANDOM:
            plain = value_without_modes(call.func, call.primals, call.options)
            refuse_changed(name, call.out, plain)
        return self.with_tangents(call, found)

    def with_tangents(self, call: rules.Call, found: Any) -> Any:
        """Return what a function returned, with what its rule found."""
        out = call.out
        if type(found) is At:
            return self.wrap(out, found.tangent, found.layout)
        if isinstance(out, Tensor) and type(found) is not list:
            return self.wrap_output(call, out, found)
        return self._wrap_outputs(call, found)

    def _by_forward_mode(
        self, call: rules.Call, name: str
    ) -> tuple[rules.Rule, RandomState | None]:
        """Return what stands for the rule of a function without one, and the state of the
        generators before it, if it may draw.

        torch.func.jvp runs the function again, and has to draw what the function drew. That state
        is slow to ask for, so only where it may be needed; one written in Python may draw before
        it calls the operator of its name.
        """
        draws = None
        drawing = isinstance(call.func, FunctionType) or rules.may_draw(name)
        if not self.traced and drawing:
            draws = RandomState(call.duals[0].primal.device)
        return rules.rule_of(name) or rules.without_rule, draws

    def tangents(self, call: rules.Call, rule: Any) -> Any:
        """Call a rule, unseen by function modes, and by dispatch modes of the user, who would take
        it for the model.

        A trace records no switch of the grad mode: its tangents are detached.
        """
        with not_intercepted():
            if self.traced:
                return rule(call, *call.args, **call.kwargs)
            set_gradients(False)
            try:
                if not dispatch_modes():
                    return rule(call, *call.args, **call.kwargs)
                with hidden_calls.outside_modes():
                    return rule(call, *call.args, **call.kwargs)
            finally:
                set_gradients(call.grad)

    def enter(
        self, func: Any, body: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a function that is written in others, with the carrier inside it."""
        self.inside.append(func)
        try:
            with self:
                return body(*args, **kwargs)
        finally:
            self.inside.pop()

    def _wrap_outputs(self, call: rules.Call, found: Any) -> Any:
        """Return outputs with their tangents, which a rule returned in a list for those that can
        move.
        """
        out = call.out
        if isinstance(out, Tensor):
            if not found:
                return out
            return self.wrap_output(call, out, found[0])
        tangents = iter(found)

        def wrap(x: Any) -> Any:
            if not rules.differentiable(x):
                return x
            return self.wrap_output(call, x, next(tangents, None))

        if type(out) in (tuple, list):
            return type(out)([wrap(x) for x in out])
        return pytree.tree_map(wrap, out)

    def wrap_output(self, call: rules.Call, out: Tensor, tangent: Any) -> Tensor:
        """Return an output with its tangent; where its rows lie is told by the rule, or found by
        its shape.
        """
        if tangent is None:
            return out
        if type(tangent) is not At:
            tangent = call.at(out, tangent)
        return self.wrap(out, tangent.tangent, tangent.layout)

    # --- what no function mode sees

    def met_elsewhere(self, values: Iterable[Any]) -> None:
        """Note a function of these values that the model calls in another thread."""
        if any(map(self._carries, values)):
            self.elsewhere = True

    def through_function(self, cls: type, args: tuple[Any, ...], outs: Any) -> Any:
        """Return the outputs of a custom function with the tangents that its forward pass gave
        them.
        """
        outs = custom_functions.outputs(self, cls, args, outs)
        if self.watch is not None:
            self.watch.made(outs)
        return outs

    def through_script(
        self, original: Callable[..., Any], function: Any, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Run a function of torch.jit and differentiate it as one."""
        out = custom_functions.run_script(self, original, function, args, kwargs)
        if self.watch is not None:
            with not_intercepted():
                self.watch.made(out)
        return out


def _value_alone(call: rules.Call, args: tuple[Any, ...]) -> Any:
    """Return what a function returns, without a tangent: its first argument is the alias still."""
    if call.returns_first():
        return args[0]
    return call.out


def _is_itself(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether these ask a tensor for the dtype that it has, which returns it as it is.

    Models ask for it before most layers, and mean it under autocast only.
    """
    return len(args) == 2 and not kwargs and args[1] is args[0].dtype


def _copy_unchecked(func: Any) -> Callable[..., Any]:
    """Return a copy of a Python function of torch in which nobody seems to intercept it.

    Such a function first asks whether its arguments are special, and if so hands itself back to
    the mode: entered from there, it would come back for ever. In the copy, which has globals of
    its own, the answer is no; torch's function stays as it is for everybody else.
    """
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    return_false = dict.fromkeys(names, lambda *_: False)
    copy = type(func)(
        func.__code__,
        {**func.__globals__, **return_false},
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


_copies: dict[Any, Callable[..., Any]] = {}


def _unchecked(func: Any) -> Callable[..., Any]:
    """Return a Python function of torch without its first question, whether somebody intercepts
    it.
    """
    if func not in _copies:
        _copies[func] = _copy_unchecked(func)
    return _copies[func]
