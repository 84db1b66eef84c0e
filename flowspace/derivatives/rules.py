"""What each torch function does to a tangent.

A rule is called like its function, with a `Call` before the arguments and a `Dual` in place of every tensor that has a
tangent. It returns the tangent of the output, a list of them, or an `At` where the layout of the rows is not that of the
input's. It raises LostRowsError where rows mix. A function without a rule is differentiated by torch.func.jvp, on all rows.

To add one: decorate ``def f(call, x, ...)`` with ``@rule("name other_name")``, x.tangent in, tangent out; ``x.rows`` is the
primal where the tangent is, ``x.untouched(dim)`` says that the function works along dim, `call.out` is what the function
returned.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from flowspace.derivatives.duals import Dual, Layout, LostRowsError, restrict, rowwise, shared_rows
from flowspace.errors import DerivativeError

__all__ = [
    "CONSTANT",
    "RANDOM",
    "At",
    "Call",
    "Rule",
    "assigned",
    "decompositions",
    "differentiable",
    "forward",
    "moves",
    "rule_of",
]

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}

CONSTANT = frozenset(
    "zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full new_empty "
    "new_tensor new_empty_strided bernoulli multinomial poisson normal zero_ normal_ uniform_ bernoulli_ "
    "exponential_ random_ cauchy_ log_normal_ geometric_".split()
)
"""Functions whose output does not move with their input."""

UNTAGGED = frozenset({"hardswish", "log_sigmoid", "complex", "polar"})
"""Elementwise functions that torch does not say it of."""

BY_MKLDNN = frozenset({"lstm"})
"""Functions whose kernel for single precision has no forward derivative: theirs is formed in double precision."""

_UNKNOWN = object()


class At(NamedTuple):
    """A tangent whose rows lie elsewhere than in the input."""

    tangent: Tensor
    layout: Layout | None


class Call:
    """One call of a torch function with duals among its arguments: ``args`` holds duals, ``primals`` what they stand for."""

    def __init__(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], primals: Sequence[Any],
        options: dict[str, Any], duals: list[Dual],
    ) -> None:  # fmt: skip
        self.func, self.args, self.kwargs, self.duals = func, args, kwargs, duals
        self.primals, self.options = primals, options
        self.grad = torch.is_grad_enabled()
        self.out: Any = _UNKNOWN

    def run(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of primals, with gradient where the program has it."""
        with torch.set_grad_enabled(self.grad):
            return func(*args, **kwargs)

    def evaluate(self) -> Any:
        """Return what the function returns for the primals, which becomes `out`; it is run once."""
        if self.out is _UNKNOWN:
            self.out = self.func(*self.primals, **self.options)
        return self.out

    def along_with(self, tangent: Tensor) -> At:
        """Return the tangent of a broadcasting function, expanded to the output's shape."""
        dual, shape = self.duals[0], self.out.shape
        layout = dual.layout and dual.layout.on(len(shape) - dual.ndim + dual.layout.axis)
        shape = layout.shape(shape) if layout else shape
        return At(tangent if tangent.shape == shape else tangent.expand(shape), layout)


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the functions of these names, which spaces separate."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def rule_of(name: str) -> Rule | None:
    """Return the rule for a torch function by its plain name, without underscores."""
    return RULES.get(name) or (pointwise if name and is_pointwise(name) else None)


@functools.lru_cache(None)
def is_pointwise(name: str) -> bool:
    """Return whether each element of the output depends on one of each input, as torch says of most."""
    packet = getattr(torch.ops.aten, name, None)
    return name in UNTAGGED or (
        packet is not None
        and any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())
    )


def differentiable(value: Any) -> bool:
    """Return whether a value is a tensor of real or complex numbers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def moves(out: Any) -> bool:
    """Return whether an output has any part that can carry a tangent."""
    if isinstance(out, (tuple, list)):
        return any(moves(part) for part in out)
    return differentiable(out) or isinstance(out, dict)


def forward(call: Call, rows: Callable[[Any], Any] | None = None) -> list[Tensor]:
    """Differentiate this one function by torch.func.jvp, on the rows that ``rows`` restricts its arguments to.

    Raises:
        LostRowsError: without ``rows``, if the tangents have not every row.
        DerivativeError: if torch has no forward derivative of it.
    """
    if rows is None and any(d.layout for d in call.duals):
        raise LostRowsError
    rows = rows or shared_rows(call.duals)
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    fixed = [rows(leaf) for leaf in leaves]
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Dual)]

    def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
        filled = list(fixed)
        for i, value in zip(moving, inputs, strict=True):
            filled[i] = value
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return tuple(leaf for leaf in pytree.tree_leaves(call.func(*args, **kwargs)) if differentiable(leaf))

    name = getattr(call.func, "__name__", str(call.func))
    if name in BY_MKLDNN:
        fixed = [value.double() if differentiable(value) else value for value in fixed]
    try:
        # torch writes the tangent in the primal's layout, which an expanded one has no room for
        inputs = [fixed[i].contiguous() if 0 in fixed[i].stride() else fixed[i] for i in moving]
        directions = tuple(leaves[i].tangent.to(x.dtype) for i, x in zip(moving, inputs, strict=True))
        return list(torch.func.jvp(outputs, tuple(inputs), directions)[1])
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise DerivativeError(
            f"torch has no forward derivative of {name} ({str(error).splitlines()[0]}); write derivative=FiniteDifference(), "
            "which needs none"
        ) from error


def pointwise(call: Call, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Differentiate an elementwise function."""
    return forward(call, shared_rows(call.duals))


# --- arithmetic --------------------------------------------------------------------------------------------------------


def _tangent(value: Any) -> Tensor | None:
    return value.tangent if isinstance(value, Dual) else None


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor:
    if first is None or second is None:
        return second if first is None else first  # type: ignore[return-value]
    return first + second


@rule("add radd")
def _(call: Call, x: Any, y: Any, *, alpha: float = 1) -> At:
    shared_rows(call.duals)
    ty = _tangent(y)
    return call.along_with(_sum(_tangent(x), ty if ty is None or alpha == 1 else alpha * ty))


@rule("sub subtract")
def _(call: Call, x: Any, y: Any, *, alpha: float = 1) -> At:
    shared_rows(call.duals)
    tx, ty = _tangent(x), _tangent(y)
    if tx is not None and ty is not None and alpha == 1:
        return call.along_with(tx - ty)
    return call.along_with(_sum(tx, None if ty is None else -alpha * ty))


@rule("mul multiply rmul")
def _(call: Call, x: Any, y: Any) -> At:
    rows = shared_rows(call.duals)
    tx, ty = _tangent(x), _tangent(y)
    return call.along_with(_sum(None if tx is None else tx * rows(y), None if ty is None else rows(x) * ty))


@rule("div truediv true_divide divide")
def _(call: Call, x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode or isinstance(y, Dual):
        return pointwise(call)
    return call.along_with(x.tangent / shared_rows(call.duals)(y))


def _kernel(name: str, derivative: Callable[..., Tensor], of_output: bool = False) -> None:
    @rule(name)
    def _(call: Call, x: Dual, *args: Any, **kwargs: Any) -> Tensor:
        if x.primal.is_complex():
            return pointwise(call)  # type: ignore[return-value]  # a backward kernel conjugates
        primal = call.out if of_output else x.primal
        return rowwise(lambda t, p: derivative(t, p, *args, **kwargs), x.tangent, primal.detach(), x.layout)


_kernel("exp", lambda t, y: t * y, of_output=True)
_kernel("square", lambda t, x: 2 * t * x)
_kernel("sin", lambda t, x: t * x.cos())
_kernel("cos", lambda t, x: -t * x.sin())
_kernel("silu", lambda t, x, *_, **__: torch.ops.aten.silu_backward(t, x))
_kernel("gelu", lambda t, x, approximate="none": torch.ops.aten.gelu_backward(t, x, approximate=approximate))
_kernel("relu", lambda t, x: torch.ops.aten.threshold_backward(t, x, 0))
_kernel("tanh", lambda t, y: torch.ops.aten.tanh_backward(t, y), of_output=True)
_kernel("sigmoid", lambda t, y: torch.ops.aten.sigmoid_backward(t, y), of_output=True)


# --- linear in the first argument ------------------------------------------------------------------------------------------


@rule(
    "clone contiguous to type float double half bfloat16 cpu cuda type_as as_subclass real imag conj neg transpose "
    "permute swapaxes swapdims movedim moveaxis t T mT view_as_real view_as_complex"
)
def _moved(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Dual):
        return []
    return call.func(x.tangent, *call.primals[1:], **call.options)


@rule("view reshape flatten unflatten unsqueeze squeeze view_as reshape_as ravel")
def _(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Dual):
        return []
    shape, layout = call.out.shape, x.layout
    if call.out.dtype != x.primal.dtype:
        raise DerivativeError("a view of the bits of a number has no derivative; write x.to(dtype) for x.view(dtype)")
    if layout is None:
        return x.tangent.reshape(shape)
    if 0 in shape:
        raise LostRowsError
    before = math.prod(x.primal.shape[: layout.axis]) * layout.outer
    axis, done = 0, 1
    while axis < len(shape) and done * shape[axis] <= before:
        done, axis = done * shape[axis], axis + 1
    if axis == len(shape) or before % done or (done * shape[axis]) % (before * layout.rows.batch):
        raise LostRowsError
    outer = before // done
    layout = Layout(axis, outer, shape[axis] // (outer * layout.rows.batch), layout.rows)
    return At(x.tangent.reshape(layout.shape(shape)), layout)


@rule("expand expand_as broadcast_to")
def _(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
    return call.along_with(x.tangent) if isinstance(x, Dual) else []


def _dims(value: Any, ndim: int) -> Sequence[int]:
    if value is None:
        return range(ndim)
    return [value] if isinstance(value, int) else list(value)


def _along(names: str, position: int, default: Any, linear: bool) -> None:
    """Register functions that work along the axes in an argument: at this position after the first, named dim or dims."""

    @rule(names)
    def _(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
        dims = kwargs.get("dim", kwargs.get("dims", args[position] if len(args) > position else default))
        if not isinstance(x, Dual) or isinstance(dims, Tensor):
            return forward(call)
        x.untouched(*_dims(dims, x.ndim))
        rows = shared_rows(call.duals)
        if not linear or len(call.duals) > 1:
            return forward(call, rows)
        out = call.func(x.tangent, *(rows(a) for a in args), **{k: rows(v) for k, v in kwargs.items()})
        return list(out) if isinstance(out, tuple) else out


_along("sum mean cumsum", 0, None, linear=True)
_along("diff", 1, -1, linear=False)
_along("cosine_similarity", 1, 1, linear=False)
_along("unbind select narrow index_select gather unfold", 0, 0, linear=True)
_along("tensor_split split_with_sizes", 1, 0, linear=True)
_along("roll fft_fftn fft_ifftn fft_rfftn fft_irfftn", 1, None, linear=True)
_along("fft_fftshift fft_ifftshift", 0, None, linear=True)
_along("fft_fft fft_ifft fft_rfft fft_irfft", 1, -1, linear=True)
_along("fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2", 1, (-2, -1), linear=True)
_along("nansum nanmean amax amin var std prod cumprod var_mean std_mean", 0, None, linear=False)
_along("logcumsumexp cummax cummin", 0, None, linear=False)
_along("logsumexp glu sort", 0, -1, linear=False)
_along("linalg_vector_norm quantile nanquantile", 1, None, linear=False)
_along("topk", 1, -1, linear=False)


@rule("chunk split")
def _(call: Call, x: Dual, *args: Any, **kwargs: Any) -> list[Any]:
    dim, layout, parts = kwargs.get("dim", args[1] if len(args) > 1 else 0), x.layout, len(call.out)
    if layout is None or dim % x.ndim != layout.axis:
        return list(call.func(x.tangent, *args, **kwargs))
    if layout.outer % parts or any(part.shape[dim] * parts != layout.size for part in call.out):
        raise LostRowsError
    layout = layout._replace(outer=layout.outer // parts)
    return [At(part, layout) for part in x.tangent.chunk(parts, dim)]


@rule("repeat_interleave")
def _(call: Call, x: Dual, repeats: Any, dim: Any = None, *, output_size: Any = None) -> At:
    layout = x.layout
    if layout is not None and (dim is None or dim % x.ndim == layout.axis):
        if dim is None or not isinstance(repeats, int):
            raise LostRowsError
        layout = layout._replace(inner=layout.inner * repeats)
    return At(x.tangent.repeat_interleave(repeats, dim), layout)


@rule("flip")
def _(call: Call, x: Dual, *axes: Any, dims: Any = None) -> Tensor:
    dims = _dims(dims or (axes[0] if len(axes) == 1 else axes), x.ndim)
    x.untouched(*dims)
    return x.tangent.flip(dims)


@rule("tril triu diag_embed")
def _(call: Call, x: Dual, *args: Any, **kwargs: Any) -> Tensor:
    x.untouched(-1, -2)
    return call.func(x.tangent, *args, **kwargs)


@rule("prelu")
def _(call: Call, x: Any, weight: Any) -> list[Tensor]:
    for dual in call.duals:
        dual.only_batch_first()
    return forward(call, (lambda v: v.rows if isinstance(v, Dual) else v))


@rule("max min median")
def _(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
    if args and (isinstance(args[0], Tensor | Dual)):
        return pointwise(call)
    x.untouched(*_dims(kwargs.get("dim", args[0] if args else None), x.ndim))
    return forward(call, shared_rows(call.duals))


@rule("getitem")
def _(call: Call, x: Any, index: Any) -> Any:
    if not isinstance(x, Dual):
        return forward(call)
    _rows_whole(x, index)
    return x.tangent[call.primals[1]]


def _rows_whole(x: Dual, index: Any) -> None:
    """Raise LostRowsError unless an index takes the batch axis whole."""
    if x.layout is None:
        return
    entries = list(index) if isinstance(index, tuple) else [index]
    taken = [0 if e is None else e.ndim if isinstance(e, Tensor) and e.dtype == torch.bool else 1 for e in entries]
    if any(e is Ellipsis for e in entries):
        hole = next(i for i, e in enumerate(entries) if e is Ellipsis)
        taken[hole] = 0
        entries[hole : hole + 1] = [slice(None)] * (x.ndim - sum(taken))
    axis = -1
    for entry in [*entries, *[slice(None)] * x.ndim]:
        axis += 0 if entry is None else entry.ndim if isinstance(entry, Tensor) and entry.dtype == torch.bool else 1
        if axis >= x.layout.axis:
            if entry is None:
                continue
            if not (isinstance(entry, slice) and entry == slice(None)):
                raise LostRowsError
            break


def assigned(target: Any, index: Any, source: Any) -> Tensor:
    """Return the tangent of a target after the assignment ``target[index] = source``.

    Raises:
        LostRowsError: if that is not an assignment within each row of the batch.
    """
    duals = [value for value in (target, source) if isinstance(value, Dual)]
    if any(dual.layout for dual in duals):
        if not isinstance(target, Dual) or target.layout is None or target.layout.axis != 0:
            raise LostRowsError
        _rows_whole(target, index)
        if isinstance(source, Dual):
            simple = all(
                isinstance(e, slice | int) or e is Ellipsis for e in (index if isinstance(index, tuple) else [index])
            )
            aligned = source.layout is not None and source.layout[:3] == target.layout[:3]
            if not (simple and aligned and source.ndim == target.primal.detach()[index].ndim):
                raise LostRowsError
    tangent = target.tangent.clone() if isinstance(target, Dual) else torch.zeros_like(target)
    tangent[index] = source.tangent if isinstance(source, Dual) else 0
    return tangent


@rule("repeat tile")
def _(call: Call, x: Dual, *sizes: Any) -> At:
    counts = list(sizes[0] if isinstance(sizes[0], (tuple, list, torch.Size)) else sizes)
    counts = [1] * (x.ndim - len(counts)) + counts
    layout = x.layout
    if layout is not None:
        axis = layout.axis + len(counts) - x.ndim
        layout = Layout(axis, layout.outer * counts[axis], layout.inner, layout.rows)
    return At(x.tangent.repeat(counts), layout)


@rule("cat concat concatenate stack")
def _(call: Call, tensors: Sequence[Any], dim: int = 0) -> At:
    first, stacked = call.duals[0], call.func.__name__ == "stack"
    tensors = [x for x in tensors if isinstance(x, Dual) or x.ndim == first.ndim]  # cat passes over empty vectors
    layout = first.layout
    if any((d.layout and d.layout[:3]) != (layout and layout[:3]) for d in call.duals):
        raise LostRowsError
    parts = [_tangent(x) for x in tensors]
    for i, x in enumerate(tensors):
        if parts[i] is None:
            shape = x.shape if layout is None or x.ndim <= layout.axis else layout.shape(x.shape)
            parts[i] = first.tangent.new_zeros(shape)
    dim %= first.ndim + stacked
    if layout is not None and stacked and dim <= layout.axis:
        layout = layout.on(layout.axis + 1)
    elif layout is not None and dim == layout.axis:
        if len(call.duals) < len(tensors):
            raise LostRowsError
        layout = layout._replace(outer=layout.outer * len(tensors))
    return At(call.func(parts, dim), layout)


@rule("pad")
def _(call: Call, x: Dual, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    x.untouched(*range(-(len(pad) // 2), 0))
    return call.func(x.tangent, pad, mode)


@rule(
    "pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d"
)
def _(call: Call, x: Dual, *args: Any, **kwargs: Any) -> Tensor:
    x.only_batch_first()
    return call.func(x.tangent, *args, **kwargs)


@rule("max_pool1d max_pool2d max_pool3d adaptive_max_pool2d grid_sampler")
def _(call: Call, x: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    for dual in call.duals:
        dual.only_batch_first()
    return forward(call, shared_rows(call.duals))


# --- products ------------------------------------------------------------------------------------------------------------


@rule("linear")
def _(call: Call, x: Any, weight: Any, bias: Any = None) -> Any:
    if len(call.duals) > 1 or not isinstance(x, Dual):
        return forward(call)
    x.untouched(-1)
    return F.linear(x.tangent, weight)


@rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution")
def _(call: Call, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
    if len(call.duals) > 1 or not isinstance(x, Dual) or x.ndim != weight.ndim:
        return forward(call)
    x.only_batch_first()
    return call.func(x.tangent, weight, None, *args, **kwargs)


def _product(call: Call, x: Any, y: Any, product: Callable[..., Tensor] = torch.matmul) -> Tensor:
    for dual, contracted, other in ((x, 1, y), (y, 2, x)):
        if isinstance(dual, Dual) and dual.layout is not None:
            right = dual.ndim - dual.layout.axis
            if right == contracted or dual.ndim < 2 or (right < 3 and (isinstance(other, Dual) or other.ndim > 2)):
                raise LostRowsError
    rows = (
        shared_rows(call.duals) if all(v.ndim > 2 for v in (x, y)) else lambda v: v.rows if isinstance(v, Dual) else v
    )
    if len({d.layout and d.ndim - d.layout.axis for d in call.duals}) > 1:
        raise LostRowsError
    tx, ty = _tangent(x), _tangent(y)
    return _sum(None if tx is None else product(tx, rows(y)), None if ty is None else product(rows(x), ty))


@rule("matmul bmm mm")
def _(call: Call, x: Any, y: Any) -> Tensor:
    return _product(call, x, y)


@rule("baddbmm addmm")
def _(call: Call, start: Any, *factors: Any, beta: float = 1, alpha: float = 1, **named: Any) -> Tensor:
    if isinstance(start, Dual):
        return forward(call)  # type: ignore[return-value]
    return alpha * _product(call, *factors, *(named[name] for name in sorted(named)))


def _at(value: Tensor, layout: Layout | None, axis: int) -> Tensor:
    """Return the rows of a tensor whose batch lies on this axis, if it has one there."""
    return restrict(value, layout.on(axis)) if layout and axis >= 0 and value.shape[axis] == layout.size else value


@rule("einsum")
def _(call: Call, equation: str, *operands: Any, path: Any = None) -> Any:
    flat: list[Any] = list(operands[0]) if isinstance(operands[0], (list, tuple)) else list(operands)
    layouts = {id(d): d.layout for d in call.duals}
    if "->" not in equation or "." in equation:
        return forward(call)
    inputs, output = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    labels = {terms[i][x.layout.axis] for i, x in enumerate(flat) if isinstance(x, Dual) and x.layout}
    if any(term.count(label) > 1 for term in terms for label in labels):
        raise LostRowsError
    if len(labels) > 1 or not labels <= set(output) or len({v and v[1:3] for v in layouts.values()}) > 1:
        raise LostRowsError
    layout, label = call.duals[0].layout, next(iter(labels), "")

    def rows(term: str, value: Any) -> Tensor:
        value = value.primal.detach() if isinstance(value, Dual) else value
        return _at(value, layout, term.find(label))

    fixed = [rows(term, value) for term, value in zip(terms, flat, strict=True)]
    parts = [
        torch.einsum(equation, *fixed[:i], x.tangent, *fixed[i + 1 :])
        for i, x in enumerate(flat)
        if isinstance(x, Dual)
    ]
    return At(functools.reduce(torch.add, parts), layout and layout.on(output.index(label)))


# --- normalisation: the Jacobian is symmetric, so the kernel of the backward pass gives the tangent -------------------------


@rule("softmax _softmax")
def _(call: Call, x: Dual, dim: int, dtype: Any = None, *_: Any, **__: Any) -> Tensor:
    x.untouched(dim)
    y = restrict(call.out.detach(), x.layout)
    return torch.ops.aten._softmax_backward_data(x.tangent.to(y.dtype), y, dim, y.dtype)


@rule("log_softmax")
def _(call: Call, x: Dual, dim: int, dtype: Any = None, *_: Any, **__: Any) -> Tensor:
    x.untouched(dim)
    p, t = restrict(call.out.detach(), x.layout).exp(), x.tangent.to(call.out.dtype)
    return t - (p * t).sum(dim, keepdim=True)


def _scaled(tangent: Tensor, weight: Tensor | None, ndim: int | None = None) -> Tensor:
    if weight is None:
        return tangent
    return tangent * (weight if ndim is None else weight.reshape(1, -1, *[1] * (ndim - 2)))


@rule("layer_norm")
def _(
    call: Call,
    x: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    if len(call.duals) > 1 or not isinstance(x, Dual):
        call.run(call.evaluate)
        return forward(call)
    x.untouched(*range(-len(normalized_shape), 0))
    x.tangent = x.tangent.contiguous()  # kept, for what is added to it has this layout too
    tangent, rows = x.tangent, x.rows
    if torch.is_autocast_enabled(rows.device.type):
        call.run(call.evaluate)
        rows, tangent = rows.to(call.out.dtype), tangent.to(call.out.dtype)
        mean, scale = torch.native_layer_norm(rows, normalized_shape, None, None, eps)[1:]
    else:
        call.out, mean, scale = call.run(torch.native_layer_norm, x.primal, normalized_shape, weight, bias, eps)
        mean, scale = (restrict(value.detach(), x.layout) for value in (mean, scale))
    keep = [True, False, False]
    found = torch.ops.aten.native_layer_norm_backward(tangent, rows, normalized_shape, mean, scale, None, None, keep)[0]
    return found if weight is None else found.mul_(weight)


@rule("rms_norm")
def _(call: Call, x: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    if len(call.duals) > 1 or not isinstance(x, Dual):
        return forward(call)
    dims = list(range(-len(normalized_shape), 0))
    x.untouched(*dims)
    dtype = torch.promote_types(x.primal.dtype, torch.float32)  # as torch forms it, its default eps included
    rows, tangent = x.rows.to(dtype), x.tangent.to(dtype)
    scale = torch.rsqrt(rows.square().mean(dims, keepdim=True) + (torch.finfo(rows.dtype).eps if eps is None else eps))
    unit = rows * scale
    return _scaled(scale * (tangent - unit * (unit * tangent).mean(dims, keepdim=True)), weight)


@rule("group_norm")
def _(call: Call, x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Any:
    if len(call.duals) > 1 or not isinstance(x, Dual):
        return forward(call)
    return _grouped(x, num_groups, weight, eps)


@rule("instance_norm")
def _(
    call: Call, x: Any, weight: Any, bias: Any, mean: Any, var: Any, use_input_stats: bool, momentum: Any, eps: float, *_: Any
) -> Any:  # fmt: skip
    if len(call.duals) > 1 or not isinstance(x, Dual):
        return forward(call)
    if use_input_stats:
        return _grouped(x, x.primal.shape[1], weight, eps)
    x.only_batch_first()
    return x.tangent * _scaled(torch.rsqrt(var + eps), weight).reshape(1, -1, *[1] * (x.ndim - 2))


def _grouped(x: Dual, groups: int, weight: Tensor | None, eps: float) -> Tensor:
    """Return the tangent of a norm over groups of channels."""
    x.only_batch_first()
    rows, tangent = x.rows.contiguous(), x.tangent.to(x.primal.dtype).contiguous()
    sizes = len(rows), rows.shape[1], math.prod(rows.shape[2:])
    mean, scale = torch.native_group_norm(rows, None, None, *sizes, groups, eps)[1:]
    keep = [True, False, False]
    found = torch.ops.aten.native_group_norm_backward(tangent, rows, mean, scale, None, *sizes, groups, keep)[0]
    return _scaled(found, weight, x.ndim)


@rule("batch_norm")
def _(
    call: Call, x: Dual, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: Any, eps: float, *_: Any
) -> Any:
    x.only_batch_first()
    if not training:
        return x.tangent * _scaled(torch.rsqrt(var + eps), weight).reshape(1, -1, *[1] * (x.ndim - 2))
    if x.layout is not None:
        raise LostRowsError
    rows, tangent = x.rows, x.tangent
    mean, scale = torch.native_batch_norm(rows, None, None, None, None, True, 0.0, eps)[1:]
    keep = [True, False, False]
    found = torch.ops.aten.native_batch_norm_backward(tangent, rows, None, None, None, mean, scale, True, eps, keep)[0]
    return _scaled(found, weight, x.ndim)


# --- attention -------------------------------------------------------------------------------------------------------------

BLOCK_ELEMENTS = 1 << 17
"""Scores that the tangent of attention holds at once, so that they stay in a CPU's cache; or those of 64 queries."""
GPU_BLOCK_ELEMENTS = 1 << 24
"""The same on other devices, where each block costs a launch of every kernel."""


@rule("scaled_dot_product_attention")
def _(
    call: Call, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> At:  # fmt: skip
    for dual in call.duals:
        dual.untouched(-1, -2)
    rows, out = shared_rows(call.duals), call.out
    layout = call.duals[0].layout
    layout = layout and layout.on(out.ndim - call.duals[0].ndim + layout.axis)
    shape = layout.shape(out.shape) if layout else out.shape
    parts = [rows(x) for x in (query, key, value, attn_mask)] + [_tangent(x) for x in (query, key, value, attn_mask)]
    if enable_gqa:
        times = parts[0].shape[-3] // parts[1].shape[-3]  # type: ignore[union-attr]
        for i in (1, 2, 5, 6):
            parts[i] = None if parts[i] is None else parts[i].repeat_interleave(times, -3)  # type: ignore[union-attr]
    scale = 1 / math.sqrt((query.primal if isinstance(query, Dual) else query).shape[-1]) if scale is None else scale
    lead = (1, 1, *shape[:-2])[-max(2, len(shape) - 2) :]
    parts = [None if x is None else _four_axes(x if x.dtype == torch.bool else x.to(out.dtype), lead) for x in parts]
    found = out.new_empty(math.prod(lead[:-1]), shape[-2], lead[-1], shape[-1]).transpose(1, 2)
    _attention_tangent(parts, found, is_causal, scale)
    return At(found.reshape(shape), layout)


def _four_axes(x: Tensor, lead: Sequence[int]) -> Tensor:
    """Return a tensor of shape (rows, heads, tokens, any), expanded without a copy where no more than one axis is rows."""
    x = x.reshape(*[1] * (len(lead) + 2 - x.ndim), *x.shape)
    if max(x.shape[: len(lead) - 1]) > 1:
        x = x.expand(*lead[:-1], *x.shape[-3:])
    return x.reshape(-1, *x.shape[-3:]).expand(math.prod(lead[:-1]), lead[-1], -1, -1)


def _part(x: Tensor | None, rows: slice, head: int, queries: slice | None = None) -> Tensor | None:
    """Return a block of one head of a tensor with four axes, as a view; an axis of one query stays."""
    if x is None:
        return None
    x = x[rows, head]
    return x if queries is None or x.shape[1] == 1 else x[:, queries]


def _attention_tangent(parts: Sequence[Any], found: Tensor, causal: bool, scale: float) -> None:
    """Write the tangent of softmax(q k' scale + mask) v, in blocks of rows and queries of one head."""
    q, k, v, mask, tq, tk, tv, tmask = parts
    (batch, heads, count, _), keys = q.shape, k.shape[2]
    k, tk = k.mT, None if tk is None else tk.mT
    elements = BLOCK_ELEMENTS if q.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    queries = min(count, max(64, elements // keys))
    step = max(1, elements // (queries * keys))
    for row, head, first in itertools.product(range(0, batch, step), range(heads), range(0, count, queries)):
        rows, block = slice(row, row + step), slice(first, first + queries)
        primals = [_part(x, rows, head, b) for x, b in ((q, block), (k, None), (v, None), (mask, block))]
        tangents = [_part(x, rows, head, b) for x, b in ((tq, block), (tk, None), (tv, None), (tmask, block))]
        _block(primals, tangents, found[rows, head, block], causal, scale, first)


def _block(
    primals: Sequence[Any], tangents: Sequence[Any], found: Tensor, causal: bool, scale: float, first: int
) -> None:
    """Write dP v + P dv, with P the attention and dP = P * (dS - rowsum(P * dS)), dS = (dq k' + q dk') scale + dmask."""
    (q, k, v, mask), (tq, tk, tv, tmask) = primals, tangents
    scores = found.new_empty(len(q), q.shape[1], k.shape[2])
    _sum_products(scores, False, scale, (q, k))
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + first), -math.inf)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)
    p = (torch.softmax(scores, -1) if mask is None else torch.ops.aten._safe_softmax(scores, -1)).to(v.dtype)
    if tmask is not None:
        scores.copy_(tmask)
    moved = _sum_products(scores, tmask is not None, scale, (tq, k), (q, tk))
    tp = torch.ops.aten._softmax_backward_data(scores, p, -1, p.dtype) if moved else None
    _sum_products(found, False, 1.0, (tp, v), (p, tv))


def _sum_products(total: Tensor, added: bool, scale: float, *pairs: tuple[Tensor | None, Tensor | None]) -> bool:
    """Write the scaled sum of the products of these pairs, added to the total if so; return whether anything was written."""
    for x, y in pairs:
        if x is not None and y is not None:
            total.baddbmm_(x, y, beta=float(added), alpha=scale)
            added = True
    return added


# --- functions that are written in others ------------------------------------------------------------------------------------


def _attention_in_parts(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention with dropout, whose mask must be the same for primal and tangent."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    root = math.sqrt(abs(scale))
    scores = (query * math.copysign(root, scale)) @ (key * root).mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = torch.softmax(scores, -1)
    if attn_mask is not None:
        weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    return torch.dropout(weights, dropout_p, True) @ value


def _dropout(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def dropout(input: Tensor, p: float = 0.5, train: bool = True) -> Tensor:
        return input * function(torch.ones_like(input), p, True) if train and p > 0 else input

    return dropout


def _in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def drop(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input.copy_(function(input, *args, **kwargs))

    return drop


RANDOM = frozenset(
    "scaled_dot_product_attention dropout feature_dropout dropout_ feature_dropout_ alpha_dropout_ feature_alpha_dropout_ "
    "rrelu_".split()
)
"""Functions that may have to be written in others, see `decompositions`."""


def decompositions(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """Return the function, written in others, that stands for a torch function which draws random numbers."""
    if name == "scaled_dot_product_attention":
        dropped = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        return _attention_in_parts if dropped else None
    if name.endswith("_"):
        return _in_place(getattr(torch, name[:-1]))
    return _dropout(getattr(torch, name))
