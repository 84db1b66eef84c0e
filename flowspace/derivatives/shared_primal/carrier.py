"""The carrier: a function mode that runs each torch function as it is, and its rule beside it.

A tensor that carries a tangent is an alias of its primal with one attribute more, a `Dual`. For a
function that is called with such aliases the carrier

1. unpacks the arguments, into duals for the rule and primals for the function (`Carrier.unpack`),
2. decides by the function's kind (`kinds.plan_of`): enter it, run it with its rule, write in
place, refuse it, 3. runs the function on the primals, with gradient, and the rule on the duals,
without (`Carrier.ruled`), 4. wraps the outputs in aliases again, each with its tangent and where
its rows lie (`Carrier.wrap_output`).

Autograd saves primals and never aliases, so a tangent is freed when the model lets go of it.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from flowspace.derivatives import hidden_calls, rules
from flowspace.derivatives.replay import RandomState, in_transform
from flowspace.derivatives.rules.dual import Dual, Layout, LostRowsError
from flowspace.derivatives.shared_primal import higher_order
from flowspace.derivatives.shared_primal.kinds import (
    TRANSFORMED,
    WHOLE,
    Plan,
    plan_of,
    refusal,
    warn_of_whole_numbers,
)
from flowspace.derivatives.shared_primal.writes import Writes
from flowspace.errors import DerivativeError

__all__ = ["FIELD", "Carrier"]

FIELD = "_flowspace_dual"
"""The attribute of an alias that holds its dual."""


class Carrier(TorchFunctionMode):
    """Carries tangents through the torch functions that are called while it is entered.

    Attributes:
        traced: what it runs is being traced, on tensors without values.
        lost: rows mix, or may mix: the tangents stop, and every row needs one.
        idle: it lets every function pass.
        live: the aliases that carry a tangent, by id, as long as they live.
        writes: what became of tensors that the model wrote into.
        inside: the functions written in others that it has entered.
    """

    def __init__(self, traced: bool = False) -> None:
        super().__init__()
        self.traced = traced
        self.lost = False
        self.idle = False
        self.live: dict[int, weakref.ref[Tensor]] = {}
        self.writes = Writes(self)
        self.inside: list[Any] = []
        self.level = torch._C._functorch.maybe_current_level()  # pyright: ignore

    # --- tensors and their tangents

    def wrap(self, primal: Tensor, tangent: Tensor, layout: Layout | None) -> Tensor:
        """Return an alias of a primal that carries a tangent."""
        alias = primal.view_as(primal)
        if tangent.dtype != primal.dtype:
            tangent = tangent.to(primal.dtype)
        if self.traced:
            tangent = tangent.detach()
        alias._flowspace_dual = Dual(primal, tangent, layout, self)  # type: ignore[attr-defined]
        self.live[id(alias)] = weakref.ref(alias)
        return alias

    def held(self, alias: Tensor) -> Dual:
        """Return the dual of an alias."""
        return getattr(alias, FIELD)

    def dual(self, tensor: Tensor) -> Dual | None:
        """Return what a tensor carries now, or None."""
        held = getattr(tensor, FIELD, None)
        held = held if held is not None and held.owner is self else None
        if held is None and self.live and in_transform(tensor):
            self._refuse_transforms(tensor)
        if held is not None and held.tangent is None:
            return None
        if self.writes.mirrors:
            tangent = self.writes.mirrored(tensor if held is None else held.primal)
            if tangent is not None:
                return Dual(tensor if held is None else held.primal, tangent, None, self)
        return held

    def _refuse_transforms(self, tensor: Tensor) -> None:
        """Raise DerivativeError for a tensor that carries a tangent inside torch.func.vmap, grad
        or jvp.
        """
        while in_transform(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)  # pyright: ignore
            if getattr(tensor, FIELD, None) is not None and getattr(tensor, FIELD).owner is self:
                raise DerivativeError(TRANSFORMED)

    def _detached(self, tensor: Tensor) -> Tensor:
        """Mark a tensor that shares memory with one that carries a tangent, and carries none
        itself.
        """
        setattr(tensor, FIELD, Dual(tensor, None, None, self))  # type: ignore[arg-type]
        self.live[id(tensor)] = weakref.ref(tensor)
        return tensor

    def release(self) -> None:
        """Let go of every tangent that the model still holds."""
        for reference in self.live.values():
            if (alias := reference()) is not None and hasattr(alias, FIELD):
                delattr(alias, FIELD)
        self.live, self.writes.mirrors = {}, {}

    def aliases(self) -> Iterator[Tensor]:
        """Iterate over the tensors that carry a tangent."""
        for reference in list(self.live.values()):
            alias = reference()
            if (
                alias is not None
                and getattr(getattr(alias, FIELD, None), "tangent", None) is not None
            ):
                yield alias

    def unpack(self, value: Any, duals: list[Dual]) -> tuple[Any, Any]:
        """Return an argument with duals in place of the tensors that carry a tangent, and with
        their primals.
        """
        if isinstance(value, Tensor):
            dual = self.dual(value)
            if dual is None:
                return value, value
            duals.append(dual)
            return dual, dual.primal
        if not isinstance(value, (tuple, list)):
            return value, value
        pairs = [self.unpack(x, duals) for x in value]
        given, primals = [x for x, _ in pairs], [x for _, x in pairs]
        if isinstance(value, list):
            return given, primals
        make = getattr(type(value), "_make", tuple)  # torch.Size holds numbers only
        return make(given), make(primals)

    # --- one function

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a torch function, and its rule beside it; what torch.compile captures, it captures
        without tangents.
        """
        if torch.compiler.is_dynamo_compiling():
            return hidden_calls.call_captured(func, args, kwargs)
        if self.idle:
            return func(*args, **(kwargs or {}))
        before = hidden_calls.capture_callback()
        if before is None:
            return self.carry(func, args, kwargs or {})
        hidden_calls.set_capture_callback(None)
        try:
            return self.carry(func, args, kwargs or {})
        finally:
            hidden_calls.set_capture_callback(before)

    def carry(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a torch function, and its rule beside it."""
        plan = plan_of(func)
        if plan.kind == "metadata":
            return func(*args, **kwargs)
        duals: list[Dual] = []
        given, primals, named, options = [], [], {}, {}
        for value in args:
            dual, primal = self.unpack(value, duals)
            given.append(dual)
            primals.append(primal)
        for key, value in kwargs.items():
            named[key], options[key] = self.unpack(value, duals)
        if plan.kind == "higher order" and self.traced and not self.lost:
            return higher_order.run(
                self, rules.Call(func, given, named, primals, options, duals), plan.name, args
            )
        if not duals:
            if plan.kind == "in place" or isinstance(kwargs.get("out"), Tensor):
                self.writes.remember(kwargs.get("out", args[0] if args else None))
            return func(*args, **kwargs)
        if torch._C._functorch.maybe_current_level() != self.level:  # pyright: ignore
            raise DerivativeError(TRANSFORMED)
        call = rules.Call(func, given, named, primals, options, duals)
        call.traced = self.traced
        if self.lost:
            return call.evaluate()
        try:
            return self._planned(call, plan, args, kwargs)
        except LostRowsError:
            self.lost = True
            return call.evaluate()

    def _planned(
        self, call: rules.Call, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Do what the function's kind asks for."""
        func, (kind, name) = call.func, plan
        if kind == "rule" or (kind == "python" and func in self.inside):
            return self.ruled(call, name)
        if kind == "python":
            if (
                func is F.dropout
                and not (kwargs["training"] and kwargs["p"])
                and not kwargs["inplace"]
            ):
                return args[0]
            return self._enter(func, _unchecked(func), args, kwargs)
        if kind == "random" and (parts := rules.decompositions(name, args, kwargs)):
            return self._enter(func, parts, args, kwargs)
        if kind in ("refused", "leaves"):
            raise DerivativeError(refusal(name or func.__name__))
        if kind == "in place":
            return self.writes.write(call, name, args[0])
        if kind == "constant":
            return args[0] if call.evaluate() is call.primals[0] else call.out
        if kind == "detached":
            return self._detached(call.evaluate())
        if kind == "higher order":
            return higher_order.run(self, call, name, args)
        return self.ruled(call, name)

    def ruled(self, call: rules.Call, name: str) -> Any:
        """Run a function as it is, and its rule, or torch.func.jvp of it, beside it."""
        rule = rules.rule_of(name)
        may_draw = rule in (None, rules.pointwise) and not self.traced and rules.may_draw(name)
        draws = RandomState(call.duals[0].primal.device) if may_draw else None
        by_rule = name == "layer_norm" and (self.traced or not hidden_calls.dispatched())
        if not by_rule and not rules.moves(call.evaluate()):
            if name in WHOLE:
                warn_of_whole_numbers(name)
            return call.out
        if draws is not None and draws.changed():
            if any(dual.layout for dual in call.duals):
                raise LostRowsError  # the draws belong to the whole batch
            call.func = draws.replay(call.func)
        try:
            found = self._tangents(call, rule)
        except TypeError:  # arguments in an order or under names that the rule does not know
            call.run(call.evaluate)
            found = rules.forward(call)
        return self._wrap_outputs(call, found)

    def _tangents(self, call: rules.Call, rule: Any) -> Any:
        """Call a rule, unseen by function modes, and by dispatch modes of the user, who would take
        it for the model.

        A trace records no switch of the grad mode: its tangents are detached.
        """
        if self.traced:
            with torch._C.DisableTorchFunction():  # pyright: ignore
                return rule(call, *call.args, **call.kwargs) if rule else rules.forward(call)
        torch._C._set_grad_enabled(False)
        try:
            with torch._C.DisableTorchFunction():  # pyright: ignore
                if not hidden_calls.dispatched():
                    return rule(call, *call.args, **call.kwargs) if rule else rules.forward(call)
                with hidden_calls.outside_modes():
                    return rule(call, *call.args, **call.kwargs) if rule else rules.forward(call)
        finally:
            torch._C._set_grad_enabled(call.grad)

    def _enter(
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
        out = call.out
        if isinstance(out, Tensor):
            if not isinstance(found, list):
                return self.wrap_output(call, out, found)
            return self.wrap_output(call, out, found[0]) if found else out
        tangents = iter(found)

        def wrap(x: Any) -> Any:
            return (
                self.wrap_output(call, x, next(tangents, None)) if rules.differentiable(x) else x
            )

        if type(out) in (tuple, list):
            return type(out)([wrap(x) for x in out])
        return pytree.tree_map(wrap, out)

    def wrap_output(self, call: rules.Call, out: Tensor, tangent: Any) -> Tensor:
        """Return an output with its tangent; where its rows lie is told by the rule, or found by
        its shape.
        """
        if tangent is None:
            return out
        if isinstance(tangent, rules.At):
            return self.wrap(out, tangent.tangent, tangent.layout)
        layout = call.duals[0].layout
        if layout is None or (
            tangent.ndim > layout.axis and tangent.shape == torch.Size(layout.shape(out.shape))
        ):
            return self.wrap(out, tangent, layout)
        if out.ndim != tangent.ndim:
            raise LostRowsError
        moved = [
            axis
            for axis, (full, few) in enumerate(zip(out.shape, tangent.shape, strict=True))
            if full != few
        ]
        if len(moved) != 1 or (out.shape[moved[0]], tangent.shape[moved[0]]) != (
            layout.size,
            layout.chosen,
        ):
            raise LostRowsError
        return self.wrap(out, tangent, layout.on(moved[0]))

    # --- what no function mode sees

    def through_function(self, cls: type, args: tuple[Any, ...], outs: Any) -> Any:
        """Return the outputs of a custom function with the tangents that its forward pass gave
        them.
        """
        given = [
            leaf
            for leaf in pytree.tree_leaves(args)
            if isinstance(leaf, Tensor) and self.dual(leaf)
        ]
        if not given or self.lost:
            return outs

        def one(out: Any) -> Any:
            if not rules.differentiable(out) or not out.numel():
                return out
            if (
                torch.is_grad_enabled()
                and not out.requires_grad
                and any(x.requires_grad for x in given)
            ):
                return out  # marked as not differentiable
            dual = self.dual(out)
            if dual is None:
                same = [
                    x for x in given if x.shape == out.shape and x.data_ptr() == out.data_ptr()
                ]
                if not same:
                    raise DerivativeError(
                        f"{cls.__name__} is an autograd.Function whose forward pass is not made "
                        "of torch functions; write "
                        "derivative=FiniteDifference(), or ForwardMode() if it defines jvp"
                    )
                dual = self.dual(same[0])
            elif hasattr(out, FIELD):
                delattr(out, FIELD)
                if cls.__module__.partition(".")[0] != "torch":  # torch's own hand their inputs on
                    out = (
                        out.clone()
                    )  # of a view that was made without gradient, and so could not be written to
            return self.wrap(out, dual.tangent, dual.layout)  # type: ignore[union-attr]

        return pytree.tree_map(one, outs)

    def through_script(
        self, original: Callable[..., Any], function: Any, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Run a function of torch.jit and differentiate it as one."""

        def script(*inputs: Any, **options: Any) -> Any:
            with torch.jit.optimized_execution(False):  # pyright: ignore  # whose second call has wrong tangents
                return original(function, *inputs, **options)

        script.__name__ = f"torch.jit function {getattr(function, 'name', '')}"
        with torch._C.DisableTorchFunction():  # pyright: ignore
            self.inside.append(script)
            try:
                return self.carry(script, args, kwargs)
            finally:
                self.inside.pop()


def _copy_unchecked(func: Any) -> Callable[..., Any]:
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
