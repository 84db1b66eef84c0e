"""The table of rules, what a rule is given and returns, and the rule for any other function.

`forward` differentiates a function that has no rule, by torch.func.jvp of this one function.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

from flowspace.derivatives.replay import forward_mode_lock
from flowspace.derivatives.rules.dual import Dual, Layout, LostRowsError, shared_rows
from flowspace.derivatives.torch_internals import set_gradients
from flowspace.errors import DerivativeError

__all__ = [
    "CONSTANT",
    "NO_TENSORS",
    "PLAIN_TYPES",
    "RULES",
    "At",
    "Call",
    "Rule",
    "differentiable",
    "forward",
    "is_pointwise",
    "may_draw",
    "moves",
    "pointwise",
    "rows_of",
    "rule",
    "rule_of",
    "sum_of",
    "tangent_of",
    "without_rule",
]

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
"""The rule for each torch function, by the function's plain name."""

CONSTANT = frozenset(
    "zeros_like ones_like empty_like rand_like randn_like randint_like new_zeros "
    "new new_ones new_empty new_tensor new_empty_strided bernoulli multinomial poisson "
    "normal zero_ normal_ uniform_ bernoulli_ exponential_ random_ cauchy_ log_normal_ "
    "geometric_".split()
)
"""Functions whose output does not move with their input."""

PLAIN_TYPES = frozenset({Tensor, nn.Parameter})
"""Types of tensors that have no functions of their own."""

NUMBERS_AND_NAMES = (int, float, bool, str, slice, type(None), type(Ellipsis))
NO_TENSORS = frozenset((*NUMBERS_AND_NAMES, torch.dtype, torch.device, torch.Size))
"""Types of arguments that are no tensors and hold none."""

STANDING = {"linalg_lu": (0,), "lu": (0,), "lu_unpack": (0,)}
"""By function, the outputs of real numbers that stand still though its input moves: they permute
rows.
"""

NO_TANGENT = "its output has no tangent where its input has one"
"""What is said of an operator that drops the tangents of its inputs."""

WITHOUT_DERIVATIVE = (NO_TANGENT, "forward AD with")
"""Words by which a forward derivative that torch lacks is told from one that is not traced."""

UNTAGGED = frozenset(
    "hardswish log_sigmoid complex polar absolute negative fix arccos arccosh arcsin arcsinh "
    "arctan arctanh arctan2 special_expit special_gammaln special_ndtr special_psi".split()
)
"""Elementwise functions that torch does not tag as such."""

BY_MKLDNN = frozenset({"lstm"})
"""Functions whose kernel for single precision has no forward derivative.

Theirs is formed in double precision.
"""

STEPWISE = frozenset({"copysign", "nextafter", "hardshrink"})
"""Functions that have an argument with derivative zero, which torch gives no tangent."""

_UNKNOWN = object()


@dataclass(slots=True)
class At:
    """A tangent, and where its rows lie."""

    tangent: Tensor
    layout: Layout | None


@dataclass(slots=True)
class Call:
    """One call of a torch function with duals among its arguments.

    Attributes:
        func: the function.
        args: its arguments, with duals for the tensors that carry a tangent.
        kwargs: those by name, likewise.
        primals: the arguments that the plain program has.
        options: those by name, likewise.
        duals: the duals among the arguments, one at least, in order.
        traced: the call is being traced, on tensors without values.
        out: what the function returned; see `evaluate`.
        grad: whether the plain program records gradients here.
    """

    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    primals: Sequence[Any]
    options: dict[str, Any]
    duals: list[Dual]
    traced: bool = False
    out: Any = _UNKNOWN
    grad: bool = field(default_factory=torch.is_grad_enabled)

    def run(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of primals, with gradient where the program has it."""
        before = torch.is_grad_enabled()
        set_gradients(self.grad)
        try:
            return func(*args, **kwargs)
        finally:
            set_gradients(before)

    @property
    def evaluated(self) -> bool:
        """Whether the function has been run."""
        return self.out is not _UNKNOWN

    def evaluate(self) -> Any:
        """Return what the function returns for the primals, kept as `out`; it is run once."""
        if self.out is _UNKNOWN:
            self.out = self.func(*self.primals, **self.options)
        return self.out

    def of_plain_tensors(self) -> bool:
        """Return whether no argument is of a subclass of Tensor with functions of its own."""
        return _are_plain(self.primals) and _are_plain(self.options.values())

    def returns_first(self) -> bool:
        """Run the function; return whether it hands its first argument on."""
        out = self.evaluate()
        return bool(self.primals) and out is self.primals[0]

    def at(self, out: Tensor, tangent: Tensor) -> At:
        """Return the tangent of an output, of which its rule did not say where its rows lie.

        Raises:
            LostRowsError: if that cannot be told by its shape.
        """
        layout = self.duals[0].layout
        if layout is not None:
            layout = layout.found(tangent.shape, out.shape)
        return At(tangent, layout)

    def along_with(self, tangent: Tensor) -> At:
        """Return the tangent of a broadcasting function, expanded to the output's shape."""
        dual, shape = self.duals[0], self.out.shape
        layout = dual.layout
        if shape == dual.primal.shape and tangent.shape == dual.tangent.shape:
            return At(tangent, layout)  # as it mostly is
        if layout is None:
            if tangent.shape != shape:
                tangent = tangent.expand(shape)
            return At(tangent, None)
        layout = layout.on(len(shape) - dual.ndim + layout.axis)
        if not layout.fits(tangent.shape, shape):
            tangent = tangent.expand(layout.shape(shape))
        return At(tangent, layout)


def _are_plain(values: Iterable[Any]) -> bool:
    """Return whether no tensor among these has functions of its own."""
    for value in values:
        kind = type(value)
        if kind in PLAIN_TYPES or kind in NO_TENSORS:
            continue
        if isinstance(value, Tensor):
            return False
        if isinstance(value, (tuple, list)) and not _are_plain(value):
            return False
    return True


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the functions of these names.

    Args:
        names: of functions of torch, separated by spaces, such as ``"sin"`` or ``"cat concat"``.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def rule_of(name: str) -> Rule | None:
    """Return the rule for a torch function by its plain name, without underscores."""
    rule = RULES.get(name)
    if rule is None and name and is_pointwise(name):
        return pointwise
    return rule


@functools.lru_cache(None)
def is_pointwise(name: str) -> bool:
    """Return whether each element of the output depends on one of each input.

    Torch tags most of the functions of which this holds.
    """
    if name in UNTAGGED:
        return True
    # torch.special.expm1 is torch.expm1 under another name, of which alone torch tells
    packet = getattr(torch.ops.aten, name.removeprefix("special_"), None)
    packet = packet or getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


@functools.lru_cache(None)
def may_draw(name: str) -> bool:
    """Return whether a function may draw random numbers, as far as torch's tags tell.

    A function that is composed of others, or that torch has no operator of, may.
    """
    if not name:
        return True
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return True
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    draws = torch.Tag.nondeterministic_seeded
    return any(draws in overload.tags or _composed(overload) for overload in overloads)


def _composed(overload: Any) -> bool:
    """Return whether an operator is written in others; one for numbers alone has no kernel."""
    if not torch._C._dispatch_has_kernel(overload.name()):
        return False
    return overload.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def differentiable(value: Any) -> bool:
    """Return whether a value is a tensor of real or complex numbers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def moves(out: Any) -> bool:
    """Return whether an output has any part that can carry a tangent."""
    if isinstance(out, Tensor):
        return out.is_floating_point() or out.is_complex()
    if isinstance(out, (tuple, list)):
        return any(moves(part) for part in out)
    return isinstance(out, dict)


def _in_double(value: Any) -> Any:
    """Return a tensor of numbers in double precision, and any other value as it is."""
    if differentiable(value):
        return value.double()
    return value


def forward(call: Call, restricted: Callable[[Any], Any] | None = None) -> list[Tensor]:
    """Differentiate this one function by torch.func.jvp, on the rows that its arguments have.

    Args:
        call: the call to differentiate.
        restricted: restricts an argument to the rows that have a tangent; None takes every row.

    Raises:
        LostRowsError: without ``restricted``, if the tangents have not every row.
        DerivativeError: if torch has no forward derivative of it.
    """
    if restricted is None:
        if any(d.layout for d in call.duals):
            raise LostRowsError
        restricted = shared_rows(call.duals)
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    fixed = [restricted(leaf) for leaf in leaves]
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Dual)]
    name = getattr(call.func, "__name__", str(call.func))
    if name in BY_MKLDNN:
        fixed = [_in_double(value) for value in fixed]

    def outputs(values: Sequence[Any]) -> tuple[Tensor, ...]:
        args, kwargs = pytree.tree_unflatten(list(values), spec)
        found = pytree.tree_leaves(call.func(*args, **kwargs))
        return tuple(leaf for leaf in found if differentiable(leaf))

    # torch writes the tangent in the primal's layout, which an expanded one has no room for
    for i in moving:
        if 0 in fixed[i].stride():
            fixed[i] = fixed[i].contiguous()
    tangents = [leaves[i].tangent.to(fixed[i].dtype) for i in moving]
    jvp = one_jvp
    if call.traced:
        jvp = traced_jvp
    try:
        if len(moving) > 1 and name not in STEPWISE:
            _check_followed(call, outputs, fixed, moving, tangents)
        return list(jvp(outputs, fixed, moving, tangents, STANDING.get(name, ())))
    except (RuntimeError, NotImplementedError, TypeError) as error:
        _refuse(call, name, error)
        raise


def _refuse(call: Call, name: str, error: Exception) -> None:
    """Raise DerivativeError for a function of which torch has no forward derivative.

    Of what fails in a trace that is known where torch says so. All else may be the trace's fault:
    the part can run uncompiled.
    """
    if call.traced and not any(words in str(error) for words in WITHOUT_DERIVATIVE):
        return
    raise DerivativeError(
        f"torch has no forward derivative of {name} ({str(error).splitlines()[0]}); "
        "write derivative=FiniteDifference(), which needs none"
    ) from error


_followed: set[Any] = set()
"""Functions, and the kinds of their arguments, of which torch follows each tangent."""


def _check_followed(
    call: Call,
    outputs: "Outputs",
    fixed: Sequence[Any],
    moving: Sequence[int],
    tangents: Sequence[Tensor],
) -> None:
    """Raise DerivativeError for an argument whose tangent torch drops beside that of another.

    Such are numbers, as the alpha of torch.add, and the weights of F.cross_entropy. Each argument
    is tried alone, once for each function and kind of arguments.
    """
    kinds = tuple(value.ndim if isinstance(value, Tensor) else None for value in fixed)
    case = call.func, tuple(call.kwargs), tuple(moving), kinds
    if case in _followed:
        return
    with contextlib.ExitStack() as outside:
        if call.traced:
            outside.enter_context(proxy_tensor.disable_proxy_modes_tracing())
            fixed = [_apart(value) for value in fixed]
            tangents = [_apart(tangent) for tangent in tangents]
        for i, tangent in zip(moving, tangents, strict=True):
            if not _depends(outputs, fixed, i, tangent):
                name = getattr(call.func, "__name__", str(call.func))
                raise DerivativeError(
                    f"got an argument of {name}, of shape {tuple(tangent.shape)}, that moves with "
                    "z_t or t and that torch takes for a constant; write .detach() first if it "
                    f"is one, {name} in other functions of torch, or "
                    "derivative=FiniteDifference()"
                )
    if not isinstance(call.func, types.FunctionType):  # closures are made anew for each call
        _followed.add(case)


OPEN = (torch.SymInt, torch.SymFloat)
"""Types of numbers that torch.compile left open."""


def _laid_out(value: Any) -> Any:
    """Return a tensor without gradient and contiguous, and a number as it is."""
    if isinstance(value, Tensor):
        return value.detach().contiguous()
    return value


def _apart(value: Any) -> Any:
    """Return a copy of a tensor, and any other value as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value


def _depends(outputs: "Outputs", fixed: Sequence[Any], i: int, tangent: Tensor) -> bool:
    """Return whether torch gives any output a tangent where one argument alone moves."""
    found = False

    def of_moving(value: Tensor) -> tuple[Tensor, ...]:
        nonlocal found
        out = outputs([*fixed[:i], value, *fixed[i + 1 :]])
        found = any(forward_ad.unpack_dual(x).tangent is not None for x in out)
        return out

    with forward_mode_lock:
        torch.func.jvp(of_moving, (fixed[i],), (tangent,))
    return found


Outputs = Callable[[Sequence[Any]], tuple[Tensor, ...]]
"""A function of a list of values, some of them tensors that move."""


def one_jvp(
    outputs: Outputs,
    fixed: Sequence[Any],
    moving: Sequence[int],
    tangents: Sequence[Tensor],
    standing: Sequence[int],
) -> tuple[Tensor, ...]:
    """Return the tangents of the outputs by torch.func.jvp.

    An operator without a forward derivative leaves its output without a tangent, and is refused;
    so is one that does not depend on what moves. torch counts levels of forward mode for the whole
    process, so one thread at a time is in one.

    Args:
        outputs: the function.
        fixed: its arguments.
        moving: which of them move.
        tangents: of these.
        standing: the outputs that stand still.

    Raises:
        RuntimeError: if another output has no tangent.
    """

    def of_moving(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = list(fixed)
        for i, value in zip(moving, inputs, strict=True):
            values[i] = value
        found = outputs(values)
        for number, out in enumerate(found):
            follows = not out.numel() or forward_ad.unpack_dual(out).tangent is not None
            if not follows and number not in standing:
                raise RuntimeError(NO_TANGENT)
        return found

    with forward_mode_lock:
        primals = tuple(fixed[i] for i in moving)
        return torch.func.jvp(of_moving, primals, tuple(tangents))[1]


def traced_jvp(
    outputs: Outputs,
    fixed: Sequence[Any],
    moving: Sequence[int],
    tangents: Sequence[Tensor],
    standing: Sequence[int],
) -> tuple[Tensor, ...]:
    """Return the tangents of the outputs within a trace, as `one_jvp` does.

    A trace above autograd would record torch.func.jvp as steps that mean nothing outside it. So
    it is traced apart, down to operators below autograd, and these are put in.

    Raises:
        ValueError: if the function draws random numbers: in a trace they cannot be drawn again.
    """
    places = [i for i, value in enumerate(fixed) if isinstance(value, (Tensor, *OPEN))]
    # Some formulas depend on the layout, as that of det does; a clone of a view has another one.
    inputs = [_laid_out(fixed[i]) for i in places]

    def derivative(*flat: Tensor) -> tuple[Tensor, ...]:
        values = list(fixed)
        for i, value in zip(places, flat[: len(places)], strict=True):
            values[i] = value
        return one_jvp(outputs, values, moving, flat[len(places) :], standing)

    given = [*inputs, *[tangent.contiguous() for tangent in tangents]]
    with proxy_tensor.disable_proxy_modes_tracing():
        graph = proxy_tensor.make_fx(derivative)(*map(_apart, given))
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ValueError(f"{node.target} would draw other numbers for the tangent")
        if node.target is torch.ops.aten._efficientzerotensor.default:
            # it has no memory: operators below autograd that read it end the process
            node.target = torch.ops.aten.zeros.default
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph(*given)


def pointwise(call: Call, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Differentiate an elementwise function."""
    return forward(call, shared_rows(call.duals))


def without_rule(call: Call, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Differentiate a function that has no rule."""
    return forward(call)


def tangent_of(value: Any) -> Tensor | None:
    """Return the tangent of a dual, and None for what does not move."""
    if isinstance(value, Dual):
        return value.tangent
    return None


def rows_of(value: Any) -> Any:
    """Return the primal of a dual where its tangent is, and any other value whole."""
    if isinstance(value, Dual):
        return value.rows
    return value


def sum_of(first: Tensor | None, second: Tensor | None) -> Tensor:
    """Return the sum of two tangents, of which one may be None."""
    if first is None:
        return second  # type: ignore[return-value]
    if second is None:
        return first
    return first + second
