"""Rules for functions that give a tensor another shape, axis order, dtype or resolution.

Most are linear in their first argument: what they do to it, they do to its tangent. Those that
merge and split axes (`view`) are told only the output's shape, so where the batch lies in it is
worked out in memory order: see `_viewed`.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flowspace.derivatives.rules.dual import Dual, Layout, LostRowsError, shared_rows
from flowspace.derivatives.rules.registry import At, Call, differentiable, forward, rule
from flowspace.errors import DerivativeError


@rule(
    "clone contiguous to type float double half bfloat16 cpu cuda type_as as_subclass real imag "
    "conj neg transpose permute swapaxes swapdims movedim moveaxis t T mT view_as_real "
    "view_as_complex"
)
def clone(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The tangent is f(dx); the batch lies where the function f puts it.

    It is found by the shapes of output and tangent, which differ in the batch axis alone.
    """
    if not isinstance(x, Dual):
        return []
    return call.func(x.tangent, *call.primals[1:], **call.options)


@rule("view reshape flatten unflatten unsqueeze squeeze view_as reshape_as ravel")
def view(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The tangent is dx in the output's shape, with fewer rows."""
    if not isinstance(x, Dual):
        return []
    shape, layout = call.out.shape, x.layout
    if call.out.dtype != x.primal.dtype:
        raise DerivativeError(
            "got a view of the bits of a number, which has no derivative; write x.to(dtype) for "
            "x.view(dtype)"
        )
    if layout is None:
        return x.tangent.reshape(shape)
    if 0 in shape:
        raise LostRowsError
    layout = _viewed(layout, x.primal.shape, shape)
    return At(x.tangent.reshape(layout.shape(shape)), layout)


def _viewed(layout: Layout, before: Sequence[int], after: Sequence[int]) -> Layout:
    """Return where the batch lies after a view of one shape as another.

    In memory order, a batch of B rows is `repeats` blocks of B pieces of equal length, whatever
    the shape. Each block must lie whole within one axis of the new shape.

    For (B, N, C) -> (B * N, C), repeats is 1 and the axis 0 holds the batch with inner = N; back
    again, or to (B, N * C), it has inner = 1.

    Raises:
        LostRowsError: if it does not.
    """
    if layout[:3] == (0, 1, 1) and before[0] == after[0]:
        return layout  # as it mostly is
    repeats = math.prod(before[: layout.axis]) * layout.outer
    # Go to the axis that holds the blocks. The axes before it have `passed` positions in all, and
    # repeats / passed blocks lie one after another at each position.
    axis, passed = 0, 1
    while axis < len(after) and passed * after[axis] <= repeats:
        passed = passed * after[axis]
        axis += 1
    if axis == len(after) or repeats % passed:
        raise LostRowsError
    if (passed * after[axis]) % (repeats * layout.chosen.batch):
        raise LostRowsError
    outer = repeats // passed
    inner = after[axis] // (outer * layout.chosen.batch)
    return Layout(axis, outer, inner, layout.chosen)


@rule("expand expand_as broadcast_to")
def expand(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The tangent is dx, expanded; there is none if just the shape comes from a moving tensor."""
    if not isinstance(x, Dual):
        return []
    return call.along_with(x.tangent)


@rule("as_strided")
def as_strided(
    call: Call,
    x: Dual,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Any:
    """The tangent is dx, read alike, where rows lie beside each other and each is read in it."""
    if x.layout is None:
        return forward(call)
    offset, primal = 0, x.primal
    if storage_offset is not None:
        offset = storage_offset - int(primal.storage_offset())
    x.only_batch_first()
    last = offset + sum((n - 1) * step for n, step in zip(size[1:], stride[1:], strict=True))
    whole = primal.is_contiguous() and size[0] == len(primal) and stride[0] == primal.stride(0)
    if not whole or offset < 0 or last >= stride[0]:
        raise LostRowsError
    tangent = x.tangent.contiguous()
    return tangent.as_strided([len(tangent), *size[1:]], stride, offset)


@rule("full full_like new_full")
def full(call: Call, *args: Any, fill_value: Any = None, **kwargs: Any) -> Any:
    """The tangent is that of the number the tensor is filled with, if it moves."""
    if fill_value is None:
        fill_value = args[-1]
    if not isinstance(fill_value, Dual):
        return []
    if fill_value.layout is not None:
        raise LostRowsError
    return At(fill_value.tangent.reshape(()).expand(call.out.shape), None)


@rule("broadcast_tensors")
def broadcast_tensors(call: Call, *tensors: Any) -> list[Any]:
    """The tangents are those of the tensors that move, expanded."""
    if isinstance(tensors[0], (tuple, list)):
        tensors = tuple(tensors[0])
    shape = call.out[0].shape
    found: list[Any] = []
    for x in tensors:
        if isinstance(x, Dual):
            found.append(_expanded(x, shape))
        elif differentiable(x):
            found.append(None)
    return found


def _expanded(x: Dual, shape: Sequence[int]) -> At:
    """Return the tangent of a tensor that is expanded to a shape."""
    layout = x.layout
    if layout is None:
        return At(x.tangent.expand(shape), None)
    layout = layout.on(len(shape) - x.ndim + layout.axis)
    return At(x.tangent.expand(layout.shape(shape)), layout)


@rule("meshgrid")
def meshgrid(call: Call, *tensors: Any, indexing: str = "ij") -> list[Any]:
    """The tangents are those of the vectors that move, expanded along the axes of the others."""
    if isinstance(tensors[0], (tuple, list)):
        tensors = tuple(tensors[0])
    axes = list(range(len(tensors)))
    if indexing == "xy" and len(axes) > 1:
        axes[:2] = 1, 0
    found: list[Any] = []
    for x, axis in zip(tensors, axes, strict=True):
        if not isinstance(x, Dual):
            if differentiable(x):
                found.append(None)
            continue
        shape, layout = call.out[0].shape, x.layout
        if layout is not None:
            layout = layout.on(axis)
            shape = layout.shape(shape)
        vector = x.tangent.reshape([-1] + [1] * (len(axes) - 1 - axis))
        found.append(At(vector.expand(shape), layout))
    return found


@rule("atleast_1d atleast_2d atleast_3d")
def atleast_1d(call: Call, *tensors: Any) -> list[Any]:
    """The tangents are those of the tensors that move, each with the axes that its tensor gets."""
    if isinstance(tensors[0], (tuple, list)):
        tensors = tuple(tensors[0])
    found: list[Any] = []
    for x in tensors:
        if isinstance(x, Dual):
            tangent, layout = call.func(x.tangent), x.layout
            if layout is not None:
                layout = layout.found(tangent.shape, call.func(x.primal.detach()).shape)
            found.append(At(tangent, layout))
        elif differentiable(x):
            found.append(None)
    return found


@rule("pad")
def pad(call: Call, x: Any, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Any:
    """The tangent is dx, padded alike, with zeros where x is padded with a constant."""
    if len(call.duals) > 1 or not isinstance(x, Dual):
        return forward(call)
    # two numbers for each axis, from the last on
    x.untouched(*[-1 - i // 2 for i, count in enumerate(pad) if count])
    return call.func(x.tangent, pad, mode)


@rule(
    "pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d "
    "upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d"
)
def pixel_shuffle(call: Call, x: Dual, *args: Any, **kwargs: Any) -> Tensor:
    """The tangent is f(dx), for linear functions f of (B, C, *) pictures."""
    x.only_batch_first()
    return call.func(x.tangent, *args, **kwargs)


@rule(
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_unpool2d max_unpool3d"
)
def max_pool1d(call: Call, x: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    """The tangent is that of torch.func.jvp, for the moving rows of (B, C, *) pictures."""
    for dual in call.duals:
        dual.only_batch_first()
    return forward(call, shared_rows(call.duals))
