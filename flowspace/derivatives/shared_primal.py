"""Shared primal: the value with gradient and D_t f without, in one forward pass of the unmodified model.

Every torch function that the model calls is intercepted. It runs as it is, so the value, its gradient, the kernels, the random
numbers and the buffers are those of the plain program; beside it, under no_grad and from detached primals, the tangents of its
inputs become the tangent of its output. What the model holds is an alias of each primal that carries the tangent: autograd
saves primals and never aliases, so a tangent is freed when the model lets go of it.
"""

import contextlib
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from flowspace.derivatives import rules
from flowspace.derivatives.duals import Dual, Layout, LostRowsError, Rows
from flowspace.derivatives.route import Derivative, Draws, scatter, uncompiled, untouched, wrapped
from flowspace.errors import DerivativeError, InputError

__all__ = ["SharedPrimal"]


@dataclass(frozen=True)
class SharedPrimal(Derivative):
    """Exact, at the price of a forward pass on the rows that need it; any model of torch functions, attention kept fused.

    Under autocast the tangents are cast as the primals are; elsewhere they have the primals' precision. Rows that mix, as in
    batch norm in train mode, are found on the way: then the derivative is computed in a pass of its own, over all rows.

    Raises:
        DerivativeError: where a function of the model has no forward derivative; it names the function and another route.
    """

    def evaluate(
        self, fn: Callable[..., Tensor], primals: Sequence[Any], tangents: Sequence[Tensor | None], rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the value with gradient and the derivative without."""
        draws = Draws(primals[0].device)
        few = None if rows is None else Rows.of(rows, len(primals[0]))
        versions = _versions(primals)
        value, tangent, before = run(fn, primals, tangents, few)
        if before is not None:
            if versions != _versions(primals):
                raise DerivativeError(
                    "the model writes into its input, so it cannot be run again; write z = z.clone() first"
                )
            with _rewound(before):
                tangent = self.derive(draws.replay(fn), primals, tangents, None)
            few = None
        if tangent is None:
            return value, torch.zeros_like(value)
        return value, tangent if few is None else scatter(tangent, few.chosen, value)

    def derive(
        self, fn: Callable[..., Tensor], primals: Sequence[Any], tangents: Sequence[Tensor | None], value: Tensor | None,
        mixed: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return the derivative on every row, in a pass of its own that leaves no trace."""
        with torch.no_grad(), untouched():
            value, tangent, _ = run(fn, primals, tangents, None)
        return torch.zeros_like(value) if tangent is None else tangent


def _versions(primals: Sequence[Any]) -> list[int]:
    return [p._version for p in primals if isinstance(p, Tensor) and not p.is_inference()]


def run(
    fn: Callable[..., Tensor], primals: Sequence[Any], tangents: Sequence[Tensor | None], rows: Rows | None
) -> "Run":
    """Run fn once, with the tangents beside it."""
    carrier = Carrier()
    layout = rows and Layout(0, 1, 1, rows)
    inputs = [
        p if v is None else carrier.wrap(p, (v if rows is None else v[rows.chosen]).detach(), layout)
        for p, v in zip(primals, tangents, strict=True)
    ]
    try:
        with _watched(carrier), uncompiled(), carrier:
            out = fn(*inputs)
        if not isinstance(out, Tensor):
            came = type(out).__name__
            raise InputError(f"the model returned {came}; wrap it so that it returns one tensor of shape (B, *)")
        dual, plain = carrier.dual(out), getattr(out, _FIELD, None)
    finally:
        carrier.release()
    lost = carrier.lost or (dual is not None and dual.layout is not None and dual.layout[:3] != (0, 1, 1))
    value = out if plain is None else plain.primal
    return Run(value, None if lost or dual is None else dual.tangent, carrier.before if lost else None)


class Run(NamedTuple):
    """What a pass gives: the value; its tangent, if it moves; and, if the tangent was lost, buffers as they were before."""

    value: Tensor
    tangent: Tensor | None
    before: dict[int, tuple[Tensor, Tensor]] | None


@contextlib.contextmanager
def _rewound(before: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Give buffers the values from before the first pass, for a second one, and then those from after it again."""
    after = [(tensor, tensor.detach().clone(), then) for tensor, then in before.values()]
    try:
        for tensor, _, then in after:
            tensor.detach().copy_(then)
        yield
    finally:
        for tensor, now, _ in after:
            tensor.detach().copy_(now)


_active = threading.local()
_FIELD = "_flowspace_dual"
_RESHAPED = (
    "{} writes in place, where the tangent cannot follow; write a new tensor for it, or derivative=ForwardMode()"
)
_TRANSFORMED = "the model calls a transform of torch.func, where tangents cannot follow; write derivative=ForwardMode()"
_DROPPED = "the model calls autograd, which drops tangents; write FiniteDifference()"
_REFUSED = {"_make_dual": _TRANSFORMED, "_unpack_dual": _TRANSFORMED, "grad": _DROPPED, "backward": _DROPPED}
_METADATA = frozenset(
    "size dim ndimension numel nelement stride storage_offset is_floating_point is_complex is_contiguous get_device "
    "element_size __len__".split()
)
_AUTOGRAD = frozenset(
    "register_hook register_post_accumulate_grad_hook retain_grad requires_grad_ grad_fn grad _grad _backward_hooks "
    "_post_accumulate_grad_hooks is_leaf output_nr _base _version _register_hook_dict __repr__ __format__ __reduce_ex__".split()
)
_AS_BUILTIN = frozenset((F.layer_norm, F.group_norm, F.rms_norm, F.softmax, F.log_softmax))
_TENSORS = frozenset("T mT H mH real imag data".split())
_RESHAPING = {"transpose_", "t_", "squeeze_", "unsqueeze_", "swapaxes_", "swapdims_", "resize_", "set_", "resize_as_"}
_OPERATORS = {"iadd": "add_", "isub": "sub_", "imul": "mul_", "itruediv": "div_", "idiv": "div_", "ipow": "pow_"}
_BUILTIN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType)


class Carrier(TorchFunctionMode):
    """Carries tangents through the torch functions that are called while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = False
        self.live: dict[int, weakref.ref[Tensor]] = {}
        self.written: dict[int, tuple[Tensor, Any]] = {}
        self.inside: list[Any] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.level = torch._C._functorch.maybe_current_level()  # pyright: ignore

    # --- tensors and their tangents

    def wrap(self, primal: Tensor, tangent: Tensor, layout: Layout | None) -> Tensor:
        """Return an alias of a primal that carries a tangent."""
        alias, tangent = primal.view_as(primal), tangent.to(primal.dtype)
        setattr(alias, _FIELD, Dual(primal, tangent, layout, self))
        self.live[id(alias)] = weakref.ref(alias)
        return alias

    def dual(self, tensor: Tensor) -> Dual | None:
        """Return what a tensor carries."""
        found = getattr(tensor, _FIELD, None)
        found = found if found is not None and found.owner is self else None
        if found is None and self.live and wrapped(tensor):
            self._refuse_transforms(tensor)
        if found is not None and found.tangent is None:
            return None
        if self.written and rules.differentiable(tensor) and tensor.layout == torch.strided:
            flat, _ = self.written.get(_storage(tensor), (None, None))
            if flat is not None:
                primal = tensor if found is None else found.primal
                return Dual(primal, _place(flat, primal).clone(), None, self)
        return found

    def _refuse_transforms(self, tensor: Tensor) -> None:
        """Raise DerivativeError for a tensor that carries a tangent inside torch.func.vmap, grad or jvp."""
        while wrapped(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)  # pyright: ignore
            if getattr(tensor, _FIELD, None) is not None and getattr(tensor, _FIELD).owner is self:
                raise DerivativeError(_TRANSFORMED)

    def _remember(self, target: Any) -> None:
        """Keep what a tensor without a tangent held before the model first wrote to it, should the model be run again."""
        if isinstance(target, Tensor) and id(target) not in self.before and not self.lost and not wrapped(target):
            self.before[id(target)] = target, target.detach().clone()

    def _detached(self, tensor: Tensor) -> Tensor:
        """Mark a tensor that shares memory with one that carries a tangent, and carries none itself."""
        setattr(tensor, _FIELD, Dual(tensor, None, None, self))  # type: ignore[arg-type]
        self.live[id(tensor)] = weakref.ref(tensor)
        return tensor

    def release(self) -> None:
        """Let go of every tangent that the model still holds."""
        for reference in self.live.values():
            if (alias := reference()) is not None and hasattr(alias, _FIELD):
                delattr(alias, _FIELD)
        self.live, self.written = {}, {}

    def aliases(self) -> Iterator[Tensor]:
        """Iterate over the tensors that carry a tangent."""
        for reference in list(self.live.values()):
            alias = reference()
            if alias is not None and getattr(getattr(alias, _FIELD, None), "tangent", None) is not None:
                yield alias

    def unpack(self, value: Any, duals: list[Dual]) -> tuple[Any, Any]:
        """Return an argument with duals in place of the tensors that carry a tangent, and with their primals."""
        if isinstance(value, Tensor):
            dual = self.dual(value)
            if dual is None:
                return value, value
            duals.append(dual)
            return dual, dual.primal
        kind = type(value)
        if kind is tuple or kind is list:
            pairs = [self.unpack(x, duals) for x in value]
            return kind([x for x, _ in pairs]), kind([x for _, x in pairs])
        return value, value

    # --- one function

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a torch function, and its rule beside it."""
        kwargs = kwargs or {}
        plan = _plan(func)
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
        if not duals:
            if plan.kind == "in place" or isinstance(kwargs.get("out"), Tensor):
                self._remember(kwargs.get("out", args[0] if args else None))
            return func(*args, **kwargs)
        if torch._C._functorch.maybe_current_level() != self.level:  # pyright: ignore
            raise DerivativeError(_TRANSFORMED)
        call = rules.Call(func, given, named, primals, options, duals)
        if self.lost:
            return call.evaluate()
        try:
            return self._call(call, plan, args, kwargs)
        except LostRowsError:
            self.lost = True
            return call.evaluate()

    def _call(self, call: rules.Call, plan: "_Plan", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        func, (kind, name) = call.func, plan
        if kind == "rule" or (kind == "python" and func in self.inside):
            return self._ruled(call, name)
        if kind == "python":
            if func is F.dropout and not (kwargs["training"] and kwargs["p"]) and not kwargs["inplace"]:
                return args[0]
            return self._enter(func, _unchecked(func), args, kwargs)
        if kind == "random" and (parts := rules.decompositions(name, args, kwargs)):
            return self._enter(func, parts, args, kwargs)
        if kind == "refused":
            raise DerivativeError(_REFUSED.get(name, _RESHAPED.format(name or func.__name__)))
        if kind == "in place":
            return self._in_place(call, name, args[0])
        if kind == "constant":
            return args[0] if call.evaluate() is call.primals[0] else call.out
        if kind == "detached":
            return self._detached(call.evaluate())
        return self._ruled(call, name)

    def _ruled(self, call: rules.Call, name: str) -> Any:
        """Run a function as it is, and its rule, or torch.func.jvp of it, beside it."""
        rule = rules.rule_of(name)
        draws = Draws(call.duals[0].primal.device) if rule in (None, rules.pointwise) else None
        if name != "layer_norm" and not rules.moves(call.evaluate()):
            return call.out
        if draws is not None and draws.happened():
            if any(dual.layout for dual in call.duals):
                raise LostRowsError  # the draws belong to the whole batch
            call.func = draws.replay(call.func)
        torch._C._set_grad_enabled(False)
        try:
            with torch._C.DisableTorchFunction():  # pyright: ignore  # what a rule does is nobody else's to see
                found = rule(call, *call.args, **call.kwargs) if rule else rules.forward(call)
        except TypeError:  # arguments in an order or under names that the rule does not know
            call.run(call.evaluate)
            found = rules.forward(call)
        finally:
            torch._C._set_grad_enabled(call.grad)
        return self._wrap_outputs(call, found)

    def _enter(self, func: Any, body: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
            found = found[0] if isinstance(found, list) and found else found
            return out if isinstance(found, list) else self._wrap_output(call, out, found)
        tangents = iter(found)

        def wrap(x: Any) -> Any:
            return self._wrap_output(call, x, next(tangents, None)) if rules.differentiable(x) else x

        if type(out) in (tuple, list):
            return type(out)([wrap(x) for x in out])
        return pytree.tree_map(wrap, out)

    def _wrap_output(self, call: rules.Call, out: Tensor, tangent: Any) -> Tensor:
        if tangent is None:
            return out
        if isinstance(tangent, rules.At):
            return self.wrap(out, tangent.tangent, tangent.layout)
        layout = call.duals[0].layout
        if layout is None or (tangent.ndim > layout.axis and tangent.shape == torch.Size(layout.shape(out.shape))):
            return self.wrap(out, tangent, layout)
        if out.ndim != tangent.ndim:
            raise LostRowsError
        moved = [axis for axis, (full, few) in enumerate(zip(out.shape, tangent.shape, strict=True)) if full != few]
        if len(moved) != 1 or (out.shape[moved[0]], tangent.shape[moved[0]]) != (layout.size, layout.chosen):
            raise LostRowsError
        return self.wrap(out, tangent, layout.on(moved[0]))

    # --- functions that write

    def _in_place(self, call: rules.Call, name: str, target: Tensor) -> Tensor | None:
        """Run a function that writes into its first argument, and write the tangent beside it."""
        if not isinstance(call.args[0], Dual):
            self._remember(target)
        with torch.no_grad(), torch._C.DisableTorchFunction():  # pyright: ignore
            tangent, layout = self._written_tangent(call, name)
        if layout is not None and (not isinstance(call.args[0], Dual) or layout[:3] != (call.args[0].layout or ())[:3]):
            raise LostRowsError
        dual = self.dual(target)
        shared = any(a is not target and _storage(a) == _storage(target) for a in self.aliases())
        if layout is not None and shared:
            raise LostRowsError
        with torch._C.DisableTorchFunction():  # pyright: ignore
            before = (
                None if layout is not None or not (shared or dual is None or self.written) else self._mirror(target)
            )
        call.evaluate()
        if before is not None:
            with torch.no_grad(), torch._C.DisableTorchFunction():  # pyright: ignore
                _place(before, dual.primal if dual else target).copy_(tangent)
        elif dual is not None:
            dual.tangent, dual.layout = tangent, layout
        return None if name == "setitem" else target

    def _written_tangent(self, call: rules.Call, name: str) -> tuple[Tensor, Layout | None]:
        """Return the tangent that the first argument has after the function."""
        target = call.args[0]
        primal = target.primal if isinstance(target, Dual) else target
        layout = call.duals[0].layout
        if name in rules.CONSTANT or (name == "fill_" and not isinstance(call.args[-1], Dual)):
            return torch.zeros_like(target.tangent), layout
        if name in ("copy_", "fill_", "setitem"):
            index, source = call.args[1:3] if name == "setitem" else (..., [*call.args[1:], *call.kwargs.values()][0])
            return rules.assigned(target, index, source), layout
        holders = (torch.Tensor, torch, torch._C._nn, F)  # pyright: ignore
        plain = next((getattr(holder, name[:-1]) for holder in holders if hasattr(holder, name[:-1])), None)
        rule = rules.rule_of(name[:-1])
        if plain is None:
            raise DerivativeError(f"{name} writes in place and has no other form; write derivative=FiniteDifference()")
        other = rules.Call(plain, call.args, call.kwargs, call.primals, call.options, call.duals)
        other.evaluate()
        found = rule(other, *other.args, **other.kwargs) if rule else rules.forward(other)
        dual = getattr(self._wrap_output(other, other.out, found[0] if isinstance(found, list) else found), _FIELD)
        return dual.tangent.to(primal.dtype), dual.layout

    def _mirror(self, target: Tensor) -> Tensor:
        """Return the tangent of a whole storage, laid out as the storage is: every view of it reads its own from there."""
        key = _storage(target)
        if wrapped(target):
            raise DerivativeError(
                "inside torch.func a tensor is written to that has other views; write derivative=ForwardMode()"
            )
        if key not in self.written:
            count = target.untyped_storage().nbytes() // target.element_size()
            flat = torch.zeros(count, dtype=target.dtype, device=target.device)
            for alias in self.aliases():
                if _storage(alias) == key:
                    dual = getattr(alias, _FIELD)
                    if dual.primal.dtype != target.dtype:
                        raise DerivativeError("a view of another dtype is written to; write derivative=ForwardMode()")
                    shown, tangent = dual.primal, dual.tangent
                    for axis, stride in enumerate(shown.stride()):
                        if stride == 0 and shown.shape[axis] > 1:
                            shown, tangent = shown.narrow(axis, 0, 1), tangent.narrow(axis, 0, 1)
                    _place(flat, shown).copy_(tangent)
            self.written[key] = flat, target.untyped_storage()  # held, or its place in memory might be given away
        return self.written[key][0]

    # --- what no function mode sees

    def through_function(self, cls: type, args: tuple[Any, ...], outs: Any) -> Any:
        """Return the outputs of a custom function with the tangents that its forward pass gave them."""
        given = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor) and self.dual(leaf)]
        if not given or self.lost:
            return outs

        def one(out: Any) -> Any:
            if not rules.differentiable(out) or not out.numel():
                return out
            if torch.is_grad_enabled() and not out.requires_grad and any(x.requires_grad for x in given):
                return out  # marked as not differentiable
            dual = self.dual(out)
            if dual is None:
                same = [x for x in given if x.shape == out.shape and x.data_ptr() == out.data_ptr()]
                if not same:
                    raise DerivativeError(
                        f"{cls.__name__} is an autograd.Function whose forward pass is not made of torch functions; write "
                        "derivative=FiniteDifference(), or ForwardMode() if it defines jvp"
                    )
                dual = self.dual(same[0])
            elif hasattr(out, _FIELD):
                delattr(out, _FIELD)
                if cls.__module__.partition(".")[0] != "torch":  # torch's own hand their inputs on
                    out = out.clone()  # of a view that was made without gradient, and so could not be written to
            return self.wrap(out, dual.tangent, dual.layout)  # type: ignore[union-attr]

        return pytree.tree_map(one, outs)

    def through_script(self, original: Callable[..., Any], function: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run a function of torch.jit and differentiate it as one."""

        def script(*inputs: Any, **options: Any) -> Any:
            with torch.jit.optimized_execution(False):  # pyright: ignore  # whose second call has wrong tangents
                return original(function, *inputs, **options)

        script.__name__ = f"torch.jit function {getattr(function, 'name', '')}"
        with torch._C.DisableTorchFunction():  # pyright: ignore
            self.inside.append(script)
            try:
                return self.__torch_function__(script, (), args, kwargs)
            finally:
                self.inside.pop()


def _apply(original: Any) -> Any:
    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        outs = original.__get__(None, cls)(*args, **kwargs)
        carrier = getattr(_active, "carrier", None)
        if carrier is None:
            return outs
        with torch._C.DisableTorchFunction():  # pyright: ignore
            return carrier.through_function(cls, args, outs)

    return classmethod(apply)


def _script(original: Any) -> Any:
    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        carrier = getattr(_active, "carrier", None)
        return (
            original(function, *args, **kwargs)
            if carrier is None
            else carrier.through_script(original, function, args, kwargs)
        )

    return call


_UNSEEN = (
    (torch.autograd.Function, "apply", _apply),
    (torch._C.ScriptFunction, "__call__", _script),
    (torch._C.ScriptMethod, "__call__", _script),
)
_lock, _users, _originals = threading.Lock(), [], []


@contextlib.contextmanager
def _watched(carrier: Carrier) -> Iterator[None]:
    """Show a carrier the calls that no function mode sees, for as long as any carrier is at work in any thread."""
    before, _active.carrier = getattr(_active, "carrier", None), carrier
    with _lock:
        if not _users:
            _originals[:] = [cls.__dict__[name] for cls, name, _ in _UNSEEN]
            for (cls, name, seen), original in zip(_UNSEEN, _originals, strict=True):
                setattr(cls, name, seen(original))
        _users.append(carrier)
    try:
        yield
    finally:
        _active.carrier = before
        with _lock:
            _users.remove(carrier)
            if not _users:
                for (cls, name, _), original in zip(_UNSEEN, _originals, strict=True):
                    setattr(cls, name, original)


class _Plan(NamedTuple):
    """What is done about a torch function."""

    kind: str
    name: str


@functools.lru_cache(4096)
def _plan(func: Any) -> _Plan:
    """Return the plain name of a function (add for torch.add, Tensor.add, Tensor.__add__), and its kind.

    A Python function of torch is entered; when it then calls the builtin of its own name, it is seen again, and stands for that.
    """
    name = getattr(func, "__name__", "")
    field = func.__self__.__name__ if name in ("__get__", "__set__") else ""  # type: ignore[union-attr]
    if func in (torch.autograd.grad, Tensor.backward):
        return _Plan("refused", name)
    if name in _AUTOGRAD or field in _AUTOGRAD:
        return _Plan("constant", name)
    if func in _AS_BUILTIN:
        return _Plan("rule", name)
    if isinstance(func, types.FunctionType) and func.__module__.partition(".")[0] == "torch":
        return _Plan("python", name)
    if not isinstance(func, _BUILTIN):
        return _Plan("refused" if name.partition(".")[0].endswith("_") else "rule", "")
    if field:
        kind = "detached" if field == "data" else "rule" if field in _TENSORS else "metadata"
        if name == "__set__":
            kind = "refused" if field in _TENSORS else "constant"
        return _Plan(kind, field)
    if name.startswith("__") and name.endswith("__") and name != "__len__":
        name = _OPERATORS.get(name[2:-2], name[2:-2])
    return _Plan(_kind(name), name)


def _kind(name: str) -> str:
    if name in _METADATA:
        return "metadata"
    if name in rules.RANDOM:
        return "random"
    if name in _RESHAPING or name in _REFUSED:
        return "refused"
    if name == "setitem" or (name.endswith("_") and name[:-1]):
        return "in place"
    return "detached" if name == "detach" else "constant" if name in rules.CONSTANT else "rule"


def _storage(tensor: Tensor) -> int:
    while wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)  # pyright: ignore
    return tensor.untyped_storage().data_ptr()


def _place(flat: Tensor, primal: Tensor) -> Tensor:
    return flat.as_strided(primal.shape, primal.stride(), primal.storage_offset())


@functools.lru_cache(None)
def _unchecked(func: types.FunctionType) -> Callable[..., Any]:
    """Return a Python function of torch without its first question, whether somebody intercepts it."""
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    return_false = dict.fromkeys(names, lambda *_: False)
    copy = types.FunctionType(
        func.__code__, {**func.__globals__, **return_false}, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
