"""Tensors that carry a tangent, and where a batch lies in them.

A tangent is computed only for some rows of the batch. Shape functions move the batch axis about
and merge it with others, so a dual remembers its layout: the axis, and how many blocks of the
batch that axis holds (outer) of how many entries a row each (inner). Entry
``(o * B + b) * inner + i`` of the axis belongs to row b. Without a layout the tangent has every
row, and the primal's shape.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowspace.derivatives.torch_internals import transform_level

__all__ = [
    "ChosenRows",
    "Dual",
    "Layout",
    "LostRowsError",
    "check_same_rows",
    "restrict",
    "rowwise",
    "same",
    "shared_rows",
    "whole_primal",
    "writable",
]


class LostRowsError(Exception):
    """A function mixes the rows of the batch, or may do so: the tangent needs every row."""


class ChosenRows(NamedTuple):
    """The rows that have a tangent.

    Attributes:
        indices: which rows.
        batch: how many rows there are in all.
        few: how many have a tangent.
        traced: the indices have no values.
    """

    indices: Tensor
    batch: int
    few: int
    traced: bool = False

    @classmethod
    def of(cls, indices: Tensor, batch: int) -> "ChosenRows":
        """Return the rows with these indices."""
        return cls(indices, batch, len(indices))


class Layout(NamedTuple):
    """Where the batch lies: ``shape[axis] = outer * batch * inner``."""

    axis: int
    outer: int
    inner: int
    chosen: ChosenRows

    @property
    def size(self) -> int:
        """Size of the axis in a primal."""
        return self.outer * self.chosen.batch * self.inner

    @property
    def size_in_tangent(self) -> int:
        """Size of the axis in a tangent."""
        return self.outer * self.chosen.few * self.inner

    def on(self, axis: int) -> "Layout":
        """Return the layout of a batch that moved to another axis."""
        if axis == self.axis:
            return self
        return Layout(axis, self.outer, self.inner, self.chosen)

    def shape(self, shape: Sequence[int]) -> list[int]:
        """Return the shape of the tangent of a primal of this shape."""
        sizes = list(shape)
        sizes[self.axis] = self.size_in_tangent
        return sizes

    def fits(self, tangent: Sequence[int], primal: Sequence[int]) -> bool:
        """Return whether a tangent of a primal, by their shapes, has its rows here."""
        axis = self.axis
        if not len(tangent) == len(primal) > axis or tangent[axis] != self.size_in_tangent:
            return False
        after = axis + 1
        return tangent[:axis] == primal[:axis] and tangent[after:] == primal[after:]

    def found(self, tangent: Sequence[int], primal: Sequence[int]) -> "Layout":
        """Return the layout of a batch that a function moved to the axis where a tangent and its
        primal, by their shapes, differ.

        Raises:
            LostRowsError: if there is no such axis, or more than one.
        """
        if len(tangent) != len(primal):
            raise LostRowsError
        moved = [axis for axis, size in enumerate(primal) if size != tangent[axis]]
        if len(moved) != 1:
            raise LostRowsError
        layout = self.on(moved[0])
        if primal[layout.axis] != self.size or tangent[layout.axis] != self.size_in_tangent:
            raise LostRowsError
        return layout


def restrict(tensor: Tensor, layout: Layout | None) -> Tensor:
    """Return the rows of a full tensor that have a tangent."""
    if layout is None:
        return tensor
    axis, outer, inner, chosen = layout
    if outer == inner == 1:
        return _gathered(tensor, axis, chosen)
    blocks = tensor.unflatten(axis, (outer, chosen.batch, inner))
    return _gathered(blocks, axis + 1, chosen).flatten(axis, axis + 2)


SLOW_COUNT = 16
"""Up to so many indices, CUDA's `index_select` copies at a tenth of the memory's speed."""


def _gathered(tensor: Tensor, axis: int, chosen: ChosenRows) -> Tensor:
    """Return the chosen entries of an axis."""
    if tensor.is_cuda and not chosen.traced and chosen.few <= SLOW_COUNT:
        return torch.ops.aten.index.Tensor(tensor, [*[None] * axis, chosen.indices])
    return tensor.index_select(axis, chosen.indices)


LARGE_ROW = 1 << 15
"""Numbers in a row of the batch from which on a CPU works on it where it lies.

Smaller rows are first copied beside each other.
"""


def rowwise(
    function: Callable[..., Tensor],
    tangent: Tensor,
    primal: Tensor,
    layout: Layout | None,
    traced: bool,
) -> Tensor:
    """Return an elementwise function of a tangent, and of the rows of a primal that have one.

    The primal is full, and the result has the tangent's shape. To a CPU memory that is new costs
    more than the arithmetic does: the result takes the place of the rows that were gathered, and
    large rows are not gathered first.

    Args:
        function: of a tangent and a primal, and of ``out``, a tensor to write the result into.
        tangent: on its rows.
        primal: on every row.
        layout: of the tangent.
        traced: the tensors have no values.
    """
    if layout is None or traced or not writable(tangent, primal):
        return function(tangent, restrict(primal, layout))
    first = layout[:3] == (0, 1, 1) and tangent.device.type == "cpu"
    if first and tangent.numel() >= LARGE_ROW * len(tangent):
        found = torch.empty_like(tangent)
        for row, there in enumerate(layout.chosen.indices.tolist()):
            function(tangent[row], primal[there], out=found[row])
        return found
    rows = restrict(primal, layout)
    return function(tangent, rows, out=rows)


def writable(first: Tensor, second: Tensor) -> bool:
    """Return whether a function of these may write into memory of ours: they are plain tensors,
    and no transform of torch.func is at work.
    """
    return type(first) is Tensor and type(second) is Tensor and transform_level() is None


class Dual:
    """A primal of the plain program, its tangent, and the layout of the tangent's rows.

    The layout is None where the tangent has every row. `unsure` says that torch may do something
    to the tensor that carries it which its owner, a carrier, does not see.
    """

    __slots__ = ("layout", "owner", "primal", "tangent", "unsure")

    def __init__(
        self,
        primal: Tensor,
        tangent: Tensor,
        layout: Layout | None,
        owner: object = None,
        unsure: bool = False,
    ) -> None:
        self.primal = primal
        self.tangent = tangent
        self.layout = layout
        self.owner = owner
        self.unsure = unsure

    @property
    def rows(self) -> Tensor:
        """The primal where the tangent is, detached."""
        if self.layout is None:
            return self.primal.detach()
        return restrict(self.primal, self.layout)

    @property
    def ndim(self) -> int:
        """Number of axes of the primal, and of the tangent."""
        return self.primal.ndim

    def untouched(self, *dims: int) -> None:
        """Raise LostRowsError if a function that works along these axes works along the batch."""
        if self.layout is None:
            return
        axis, ndim = self.layout.axis, self.primal.ndim
        if axis in dims or axis - ndim in dims:
            raise LostRowsError

    def only_batch_first(self) -> None:
        """Raise LostRowsError unless the batch is the first axis, as in (B, C, *) pictures."""
        if self.layout is not None and self.layout.axis != 0:
            raise LostRowsError


def same(values: Sequence[Any]) -> bool:
    """Return whether all of these are equal; sizes may be symbols, which have no hash."""
    return all(value == values[0] for value in values[1:])


def whole_primal(value: Any) -> Any:
    """Return the primal of a dual, on every row, and any other value as it is."""
    if isinstance(value, Dual):
        return value.primal.detach()
    return value


def check_same_rows(duals: Sequence[Dual]) -> None:
    """Raise LostRowsError unless duals have the batch on the same axis, counted from the last.

    Nothing is asked of duals beside a first one without a layout, nor of others without one.
    """
    first = duals[0]
    layout, ndim = first.layout, first.primal.ndim
    if layout is None:
        return
    right = ndim - layout.axis
    for dual in duals[1:]:
        other, ndims = dual.layout, dual.primal.ndim
        if other is None or (other is layout and ndims == ndim):
            continue
        if ndims - other.axis != right or other[1:3] != layout[1:3]:
            raise LostRowsError


def shared_rows(duals: Sequence[Dual]) -> Callable[[Any], Any]:
    """Return what restricts an argument of a broadcasting function to the rows of the duals.

    A constant is restricted too, where it has a batch axis.

    Raises:
        LostRowsError: if the duals do not have the batch on the same axis, counted from the last.
    """
    first = duals[0]
    layout = first.layout
    if layout is None:
        return whole_primal
    check_same_rows(duals)
    right = first.primal.ndim - layout.axis

    def restricted(value: Any) -> Any:
        if isinstance(value, Dual):
            return value.rows
        constant = not isinstance(value, Tensor) or value.ndim < right
        if constant or value.shape[-right] == 1 or value.shape[-right] != layout.size:
            return value
        return restrict(value, layout.on(value.ndim - right))

    return restricted
