"""Rules for functions that take entries of a tensor, write into it, repeat it or join several.

All are linear. What needs care is where the batch lies afterwards; an axis holds it as `outer`
blocks of B rows, of `inner` entries each:

    x[:, 3]                            takes the batch axis whole: the same layout
    x[2:]                              does not: LostRowsError, and every row gets a tangent
    x.repeat(3, 1)                     the batch again and again: outer is 3 times as large
    x.repeat_interleave(3, 0)          each row 3 times: inner is 3 times as large
    torch.cat([x, y])                  one batch after the other: outer of both together
    torch.stack([x, y])                a new axis before the batch's: it moves on by one
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowspace.derivatives.rules.dual import (
    Dual,
    Layout,
    LostRowsError,
    shared_rows,
    whole_primal,
)
from flowspace.derivatives.rules.registry import At, Call, forward, rule, tangent_of

__all__ = ["assigned"]


@rule("getitem")
def getitem(call: Call, x: Any, index: Any) -> Any:
    """The tangent is dx[index]."""
    if not isinstance(x, Dual):
        return forward(call)
    _takes_whole_batch(x, index)
    return x.tangent[call.primals[1]]


def _axes_taken(entry: Any) -> int:
    """Return how many axes of a tensor one entry of an index stands for."""
    if entry is None:
        return 0
    if str(getattr(entry, "dtype", "")) in MASKS:
        return entry.ndim
    return 1


MASKS = ("torch.bool", "torch.uint8", "bool")
"""Types of the numbers of masks, of which the last is numpy's."""


def _entries(index: Any) -> list[Any]:
    """Return the entries of an index, of which there is one where it is no tuple."""
    if isinstance(index, tuple):
        return list(index)
    return [index]


def _takes_whole_batch(x: Dual, index: Any) -> None:
    """Raise LostRowsError unless an index takes the batch axis whole.

    The entries of the index are walked along the axes that each stands for, until one stands for
    the batch axis. An ellipsis is first written out as whole axes.
    """
    if x.layout is None:
        return
    last = -1  # of the axes that the entries up to this one stand for
    for entry in _written_out(index, x.ndim):
        last += _axes_taken(entry)
        if last < x.layout.axis or entry is None:
            continue
        if isinstance(entry, slice) and entry == slice(None):
            return
        raise LostRowsError


def _written_out(index: Any, ndim: int) -> list[Any]:
    """Return the entries of an index of a tensor of so many axes, whole axes among them."""
    entries = _entries(index)
    taken = [_axes_taken(entry) for entry in entries]
    places = [i for i, entry in enumerate(entries) if entry is Ellipsis]
    place = len(entries)
    if places:
        place = places[0]
        taken[place] = 0
    entries[place : place + 1] = [slice(None)] * (ndim - sum(taken))
    return entries


def assigned(target: Any, index: Any, source: Any) -> At:
    """Return the tangent of a target after the assignment ``target[index] = source``.

    Raises:
        LostRowsError: if that is not an assignment within each row of the batch.
    """
    layout = None
    if isinstance(source, Dual) and source.layout is not None:
        layout = _assigned_rows(whole_primal(target), index, source)
    if isinstance(target, Dual):
        if layout is not None and (target.layout is None or target.layout[:3] != layout[:3]):
            raise LostRowsError
        _takes_whole_batch(target, index)
        layout = target.layout
        if isinstance(source, Dual) and source.layout is None and layout is not None:
            raise LostRowsError
        tangent = target.tangent.clone()
    elif layout is not None:
        tangent = target.new_zeros(layout.shape(target.shape))
    else:
        tangent = torch.zeros_like(target)
    if isinstance(source, Dual):
        tangent[index] = source.tangent
    else:
        tangent[index] = 0
    return At(tangent, layout)


def _assigned_rows(target: Tensor, index: Any, source: Dual) -> Layout:
    """Return where the rows of a source lie in a target that it is assigned to.

    A tensor as an index may change the order of axes, so it is not looked at further.

    Raises:
        LostRowsError: if they lie on no whole axis of as many rows.
    """
    layout = source.layout
    place = target.detach()[index].ndim - source.ndim + layout.axis  # type: ignore[union-attr]
    axis = -1
    for entry in _written_out(index, target.ndim):
        if isinstance(entry, int):
            axis += 1
            continue
        if entry is not None and not isinstance(entry, slice):
            raise LostRowsError
        axis += _axes_taken(entry)
        if place == 0:
            if entry != slice(None) or target.shape[axis] != layout.size:  # type: ignore
                raise LostRowsError
            return layout.on(axis)  # type: ignore[union-attr]
        place -= 1
    raise LostRowsError


@rule("repeat tile")
def repeat(call: Call, x: Dual, *sizes: Any) -> At:
    """The tangent is dx, repeated; repeats of the batch axis are further blocks of the batch."""
    if isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    counts = [1] * (x.ndim - len(sizes)) + list(sizes)
    layout = x.layout
    if layout is not None:
        axis = layout.axis + len(counts) - x.ndim
        layout = Layout(axis, layout.outer * counts[axis], layout.inner, layout.chosen)
    return At(x.tangent.repeat(counts), layout)


@rule("repeat_interleave")
def repeat_interleave(
    call: Call, x: Dual, repeats: Any, dim: Any = None, *, output_size: Any = None
) -> At:
    """The tangent is dx with its entries repeated; along the batch axis each row gets more."""
    layout = x.layout
    if layout is not None and (dim is None or dim % x.ndim == layout.axis):
        if dim is None or not isinstance(repeats, int):
            raise LostRowsError
        layout = layout._replace(inner=layout.inner * repeats)
    return At(x.tangent.repeat_interleave(repeats, dim), layout)


@rule("cat concat concatenate stack")
def cat(call: Call, tensors: Sequence[Any], dim: int = 0) -> At:
    """The tangent is that of each tensor, joined, with zeros for a tensor that does not move."""
    first, stacked = call.duals[0], call.func.__name__ == "stack"
    # cat passes over empty vectors
    tensors = [x for x in tensors if isinstance(x, Dual) or x.ndim == first.ndim]
    layout = first.layout
    for dual in call.duals:
        if (dual.layout and dual.layout[:3]) != (layout and layout[:3]):
            raise LostRowsError
    parts = []
    for x in tensors:
        tangent = tangent_of(x)
        if tangent is None:
            shape = x.shape
            if layout is not None and x.ndim > layout.axis:
                shape = layout.shape(shape)
            tangent = first.tangent.new_zeros(shape)
        parts.append(tangent)
    dim %= first.ndim + stacked
    if layout is not None and stacked and dim <= layout.axis:
        layout = layout.on(layout.axis + 1)
    elif layout is not None and dim == layout.axis:
        # each tensor adds its blocks of the batch, and only of a dual is it known that it has any
        if len(call.duals) < len(tensors):
            raise LostRowsError
        layout = layout._replace(outer=layout.outer * len(tensors))
    return At(call.func(parts, dim), layout)


@rule("scatter scatter_add")
def scatter(call: Call, x: Any, dim: int, index: Tensor, src: Any) -> Any:
    """The tangent is that of src, scattered into that of x, within each row of the batch."""
    layout = call.duals[0].layout
    if layout is not None:
        for value in (x, index, src):
            _check_row_for_row(call.duals[0], value, dim)
    restricted = shared_rows(call.duals)
    source = src
    if isinstance(src, Dual | Tensor):
        source = _tangent_or_zeros(src, restricted)
    elif call.duals[0] is not x:
        return forward(call)
    else:
        source = 0
    tangent = _tangent_or_zeros(x, restricted)
    return At(call.func(tangent, dim, restricted(index), source), layout)


def _check_row_for_row(dual: Dual, value: Any, dim: int) -> None:
    """Raise LostRowsError unless a tensor has the rows of a dual, and no axis else holds them."""
    dual.untouched(dim)
    if not isinstance(value, Dual | Tensor):
        return
    shape = whole_primal(value).shape
    layout = dual.layout
    if len(shape) != dual.ndim or shape[layout.axis] != layout.size:  # type: ignore[union-attr]
        raise LostRowsError


def _tangent_or_zeros(value: Any, restricted: Callable[[Any], Any]) -> Tensor:
    """Return the tangent of a tensor, which is zero where it does not move."""
    if isinstance(value, Dual):
        return value.tangent
    return torch.zeros_like(restricted(value))
