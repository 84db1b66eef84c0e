"""Rules for functions that work along some axes: reductions, sorts, Fourier transforms and parts.

Where one of these axes holds the batch, rows mix. Elsewhere the function works in each row on its
own. If it is linear (a sum, a part, a Fourier transform), what it does to x it does to dx; if not
(a norm, a maximum, a sort), torch.func.jvp differentiates it, on the rows that have a tangent.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flowspace.derivatives.rules.dual import Dual, LostRowsError, shared_rows
from flowspace.derivatives.rules.registry import At, Call, forward, pointwise, rule


def _dims(value: Any, ndim: int) -> Sequence[int]:
    """Return the axes that an argument names: one, several, or None for all."""
    if value is None:
        return range(ndim)
    if isinstance(value, int):
        return [value]
    return list(value)


def _along(names: str, dim_at: int, default: Any, linear: bool) -> None:
    """Register functions that work along the axes in one of their arguments.

    Args:
        names: of the functions.
        dim_at: where that argument stands after the first, unless it is named dim or dims.
        default: the axes where it is left out; None means all.
        linear: a function that is linear in the first argument is applied to the tangent.
    """

    @rule(names)
    def along(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The tangent is f(dx) for a linear f; for others it is that of torch.func.jvp."""
        dims = kwargs.get("dim", kwargs.get("dims", default))
        if len(args) > dim_at:
            dims = args[dim_at]
        if not isinstance(x, Dual) or isinstance(dims, Tensor):
            return forward(call)
        x.untouched(*_dims(dims, x.ndim))
        restricted = shared_rows(call.duals)
        if not linear or len(call.duals) > 1:
            return forward(call, restricted)
        if names.startswith("gather"):
            _takes_every_row(x, kwargs.get("index", args[-1] if args else None))
        options = {name: restricted(value) for name, value in kwargs.items()}
        tangent = call.func(x.tangent, *map(restricted, args), **options)
        if isinstance(tangent, tuple):
            return list(tangent)
        return tangent

    along.__name__ = along.__qualname__ = names.split()[0]


def _takes_every_row(x: Dual, index: Any) -> None:
    """Raise LostRowsError if an index of torch.gather has other rows than the batch."""
    if x.layout is not None and isinstance(index, Tensor):
        axis = x.layout.axis
        if index.shape[axis] != x.primal.shape[axis]:
            raise LostRowsError


# Linear functions.
_along("sum mean cumsum", dim_at=0, default=None, linear=True)
_along("unbind select narrow index_select", dim_at=0, default=0, linear=True)
_along("gather unfold", dim_at=0, default=0, linear=True)
_along("take_along_dim", dim_at=1, default=None, linear=True)
_along("tensor_split split_with_sizes", dim_at=1, default=0, linear=True)
_along("roll", dim_at=1, default=None, linear=True)
_along("fft_fftshift fft_ifftshift", dim_at=0, default=None, linear=True)
for _kind, _default in {"": -1, "2": (-2, -1), "n": None}.items():
    _names = [f"fft_{name}{_kind}" for name in "fft ifft rfft irfft hfft ihfft".split()]
    _along(" ".join(_names), dim_at=1, default=_default, linear=True)

# Others.
_along("nansum nanmean amax amin prod cumprod", dim_at=0, default=None, linear=False)
_along("var std var_mean std_mean", dim_at=0, default=None, linear=False)
_along("logcumsumexp cummax cummin", dim_at=0, default=None, linear=False)
_along("logsumexp glu sort", dim_at=0, default=-1, linear=False)
_along("linalg_vector_norm quantile nanquantile", dim_at=1, default=None, linear=False)
_along("diff topk", dim_at=1, default=-1, linear=False)
_along("cosine_similarity", dim_at=1, default=1, linear=False)
_along("kthvalue linalg_cross", dim_at=1, default=-1, linear=False)
_along("cross linalg_norm aminmax", dim_at=1, default=None, linear=False)
_along("linalg_matrix_norm", dim_at=1, default=(-2, -1), linear=False)
_along("mode", dim_at=0, default=-1, linear=False)

# Others, whose axis is named or always the same.
_along("trapezoid trapz cumulative_trapezoid", dim_at=9, default=-1, linear=False)
_along("pairwise_distance", dim_at=9, default=-1, linear=False)
_along("msort", dim_at=9, default=0, linear=False)


@rule("chunk split")
def chunk(call: Call, x: Dual, *args: Any, **kwargs: Any) -> list[Any]:
    """The tangent of a part is that part of dx; the batch axis may be cut between its blocks.

    So q, k, v = x.chunk(3) keep their rows where x holds the batch three times over.
    """
    dim = kwargs.get("dim", 0)
    if len(args) > 1:
        dim = args[1]
    layout, parts = x.layout, len(call.out)
    if layout is None or dim % x.ndim != layout.axis:
        return list(call.func(x.tangent, *args, **kwargs))
    if layout.outer % parts or any(part.shape[dim] * parts != layout.size for part in call.out):
        raise LostRowsError
    layout = layout._replace(outer=layout.outer // parts)
    return [At(part, layout) for part in x.tangent.chunk(parts, dim)]


@rule("flip")
def flip(call: Call, x: Dual, *axes: Any, dims: Any = None) -> Tensor:
    """The tangent is dx, flipped along the same axes."""
    if len(axes) == 1:
        axes = axes[0]
    dims = _dims(dims or axes, x.ndim)
    x.untouched(*dims)
    return x.tangent.flip(dims)


@rule("diagonal linalg_diagonal")
def diagonal(call: Call, x: Dual, *args: Any, **kwargs: Any) -> Tensor:
    """The tangent is the diagonal of dx, along two axes other than the batch's."""
    defaults = [0, 0, 1]
    if call.func.__name__ == "linalg_diagonal":
        defaults = [0, -2, -1]
    _, first, second = [*args, *defaults[len(args) :]]
    x.untouched(kwargs.get("dim1", first), kwargs.get("dim2", second))
    return call.func(x.tangent, *args, **kwargs)


@rule("diag_embed")
def diag_embed(call: Call, x: Dual, *args: Any, **kwargs: Any) -> Tensor:
    """The tangent has dx along its diagonals."""
    x.untouched(-1)
    return call.func(x.tangent, *args, **kwargs)


@rule("tril triu")
def tril(call: Call, x: Dual, *args: Any, **kwargs: Any) -> Tensor:
    """The tangent is f(dx), for functions f that work on the last two axes."""
    x.untouched(-1, -2)
    return call.func(x.tangent, *args, **kwargs)


@rule("max min median nanmedian")
def max_min_median(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The tangent is dx at the number that is taken, by torch.func.jvp.

    With a second tensor max and min are elementwise; without an axis they mix all rows.
    """
    if "other" in kwargs or (args and isinstance(args[0], Tensor | Dual)):
        return pointwise(call)
    dim = kwargs.get("dim")
    if args:
        dim = args[0]
    x.untouched(*_dims(dim, x.ndim))
    return forward(call, shared_rows(call.duals))
