"""Rules for products of matrices, convolutions and einsum, which are linear in each factor.

With two factors that move, d(x y) = dx y + x dy. A factor with a batch axis is restricted to the
rows that have a tangent; one without is used as it is. The batch must lie on the same axis of the
factors that move, and must not be summed over:

    x (B, N, C), y (B, C, D)     the batch is a stack of matrices: both may move
    x (B, C),    y (C, D)        the batch is the rows of one matrix: y must be at rest
    x (N, B),    y (B, C)        the batch is summed over: LostRowsError
"""

import string
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowspace.derivatives.rules.dual import (
    ChosenRows,
    Dual,
    Layout,
    LostRowsError,
    restrict,
    same,
    shared_rows,
    whole_primal,
)
from flowspace.derivatives.rules.registry import (
    At,
    Call,
    forward,
    rows_of,
    rule,
    sum_of,
    tangent_of,
)


@rule("linear")
def linear(call: Call, x: Any, weight: Any, bias: Any = None) -> Any:
    """d(x w' + b) = dx w' where only x moves, as it does unless weights are made of z_t or t."""
    if len(call.duals) > 1 or not isinstance(x, Dual):
        return forward(call)
    x.untouched(-1)
    return At(F.linear(x.tangent, weight), x.layout)


@rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution")
def conv1d(call: Call, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
    """d(x * w + b) = dx * w where only x moves.

    Pictures have the batch first, or in their channels, in groups; a single one, without a batch
    axis, is left to torch.func.jvp.
    """
    if _in_groups(x, weight, bias):
        return _of_groups(call, x, weight, args, kwargs)
    if len(call.duals) > 1 or not isinstance(x, Dual) or x.ndim != weight.ndim:
        return forward(call)
    x.only_batch_first()
    return call.func(x.tangent, weight, None, *args, **kwargs)


def _in_groups(x: Any, weight: Any, bias: Any) -> bool:
    """Return whether the rows of the batch are groups of channels, each with weights of its own.

    So a StyleGAN modulates: x (1, B C, H, W), weights (B O, C, ...), of B groups.
    """
    if isinstance(bias, Dual) or x.ndim != weight.ndim:
        return False
    for value, axis in ((x, 1), (weight, 0)):
        if isinstance(value, Dual) and (value.layout is None or value.layout.axis != axis):
            return False
    return True


def _of_groups(call: Call, x: Any, weight: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> At:
    """d(x * w) = dx * w + x * dw, in the groups of the rows that have a tangent.

    Raises:
        LostRowsError: if a group has channels of several rows.
    """
    place = 3
    if call.func.__name__ == "convolution":
        place = 5
    groups, given = kwargs.get("groups", 1), list(args)
    if len(args) > place:
        groups = args[place]
    rows = call.duals[0].layout.chosen  # type: ignore[union-attr]
    if groups % rows.batch or call.out.shape[1] % rows.batch:
        raise LostRowsError
    fewer = groups // rows.batch * rows.few
    if len(args) > place:
        given[place] = fewer
    else:
        kwargs = {**kwargs, "groups": fewer}
    channels, kernels = _group_rows(x, 1, rows), _group_rows(weight, 0, rows)
    tangent = None
    if isinstance(x, Dual):
        tangent = call.func(x.tangent, kernels, None, *given, **kwargs)
    if isinstance(weight, Dual):
        tangent = sum_of(tangent, call.func(channels, weight.tangent, None, *given, **kwargs))
    layout = Layout(1, 1, call.out.shape[1] // rows.batch, rows)
    return At(tangent, layout)  # type: ignore[arg-type]  # one of the two moves


def _group_rows(value: Any, axis: int, rows: ChosenRows) -> Tensor:
    """Return what belongs to these rows, where each row has an equal share of an axis."""
    primal = whole_primal(value)
    share, left = divmod(primal.shape[axis], rows.batch)
    layout = Layout(axis, 1, share, rows)
    if left or (isinstance(value, Dual) and value.layout[:3] != layout[:3]):  # type: ignore[index]
        raise LostRowsError
    return restrict(primal, layout)


@rule("matmul bmm mm")
def matmul(call: Call, x: Any, y: Any) -> Tensor:
    """d(x y) = dx y + x dy."""
    return _product(call, x, y)


@rule("_grouped_mm")
def grouped_mm(
    call: Call, x: Any, y: Any, offs: Any = None, bias: Any = None, **named: Any
) -> Any:
    """d(x y) = dx y + x dy, where groups of rows of x have a matrix each, as experts have.

    The rows are sorted by their experts, so that the batch is no axis of theirs.
    """
    if bias is not None or any(dual.layout for dual in call.duals):
        return forward(call)
    tangent = None
    if isinstance(x, Dual):
        tangent = call.func(x.tangent, whole_primal(y), offs, **named)
    if isinstance(y, Dual):
        tangent = sum_of(tangent, call.func(whole_primal(x), y.tangent, offs, **named))
    return tangent


@rule("baddbmm addmm")
def baddbmm(
    call: Call, start: Any, *factors: Any, beta: Any = 1, alpha: Any = 1, **named: Any
) -> Any:
    """d(beta start + alpha x y) = alpha (dx y + x dy) where start does not move."""
    if any(isinstance(value, Dual) for value in (start, beta, alpha)):
        return forward(call)
    factors = (*factors, *[named[name] for name in sorted(named)])
    return alpha * _product(call, *factors)


def _product(call: Call, x: Any, y: Any) -> Tensor:
    """Return dx y + x dy, for matrices that have the batch on an axis which is not summed over.

    Raises:
        LostRowsError: where the batch is summed over, or lies on different axes of x and y.
    """
    within = False  # the batch is the rows or columns of matrices, and no stack of them
    for dual, contracted, other in ((x, 1, y), (y, 2, x)):
        if not isinstance(dual, Dual) or dual.layout is None:
            continue
        axis = dual.ndim - dual.layout.axis  # of the batch, counted from the last
        if axis == contracted or dual.ndim < 2:
            raise LostRowsError
        within = axis < 3
        if within and isinstance(other, Dual):
            raise LostRowsError
    restricted = rows_of
    if x.ndim > 2 and y.ndim > 2 and not within:
        # a factor that is no stack of matrices has no batch axis to broadcast along
        restricted = shared_rows(call.duals)
    if len({d.layout and d.ndim - d.layout.axis for d in call.duals}) > 1:
        raise LostRowsError
    dx, dy = tangent_of(x), tangent_of(y)
    if dy is None:
        return torch.matmul(dx, restricted(y))  # type: ignore[arg-type]
    tangent = torch.matmul(restricted(x), dy)
    if dx is None:
        return tangent
    return torch.matmul(dx, restricted(y)) + tangent


@rule("outer ger")
def outer(call: Call, x: Any, y: Any) -> Any:
    """d(x y') = dx y' + x dy', for vectors; of a moving y the batch goes to the second axis."""
    if len(call.duals) > 1:
        return forward(call)
    layout = call.duals[0].layout
    if isinstance(x, Dual):
        return At(torch.outer(x.tangent, y), layout)
    return At(torch.outer(x, y.tangent), layout and layout.on(1))


@rule("tensordot")
def tensordot(call: Call, x: Any, y: Any, *dims: Any, **named: Any) -> Any:
    """The tangent is that of the product with the one factor that moves, on its rows."""
    if len(call.duals) > 1 or len(dims) != 2 or named:
        return forward(call)
    if isinstance(x, Dual):
        x.untouched(*dims[0])
        return call.func(x.tangent, y, *dims)
    y.untouched(*dims[1])
    return call.func(x, y.tangent, *dims)


@rule("einsum")
def einsum(call: Call, equation: str, *operands: Any, path: Any = None) -> Any:
    """The tangent is the sum of the products in which one factor is replaced by its tangent.

    The batch is a letter of the equation, in which an ellipsis is spelled out.
    """
    if isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    terms, output = _spelled(equation, [x.ndim for x in operands])
    equation = f"{','.join(terms)}->{output}"
    moving = [(i, x) for i, x in enumerate(operands) if isinstance(x, Dual)]
    label = _batch_label(terms, output, moving)
    layout = call.duals[0].layout
    fixed = []
    for term, value in zip(terms, operands, strict=True):
        if isinstance(value, Dual):
            value = value.primal.detach()
        fixed.append(_restricted_on(value, layout, term.find(label)))
    tangent = None
    for i, x in moving:
        product = torch.einsum(equation, *fixed[:i], x.tangent, *fixed[i + 1 :])
        tangent = sum_of(tangent, product)
    return At(tangent, layout and layout.on(output.index(label)))  # type: ignore[arg-type]


def _spelled(equation: str, ndims: Sequence[int]) -> tuple[list[str], str]:
    """Return the operands' terms and the output of an einsum, with letters for an ellipsis, and
    with the output that torch takes where none is written: letters that stand once, sorted.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:
        once = sorted(letter for letter in set(inputs) - set(",.") if inputs.count(letter) == 1)
        output = "..." * ("..." in inputs) + "".join(once)
    spare = "".join(letter for letter in string.ascii_letters if letter not in equation)
    terms, most = inputs.split(","), 0
    for i, (term, ndim) in enumerate(zip(terms, ndims, strict=True)):
        if "..." in term:
            count = ndim - len(term) + 3
            most = max(most, count)
            # axes of an ellipsis are the same counted from the last
            terms[i] = term.replace("...", spare[:count][::-1])
    return terms, output.replace("...", spare[:most][::-1])


def _batch_label(terms: Sequence[str], output: str, moving: Sequence[tuple[int, Dual]]) -> str:
    """Return the letter of the batch axis in an einsum, or an empty text where it has none.

    Raises:
        LostRowsError: if operands have the batch under different letters or in different blocks,
            or if the batch is summed over or a diagonal is taken of it.
    """
    labels = {terms[i][x.layout.axis] for i, x in moving if x.layout}
    if any(term.count(label) > 1 for term in terms for label in labels):
        raise LostRowsError
    blocks = [x.layout and x.layout[1:3] for _, x in moving]
    if len(labels) > 1 or not labels <= set(output) or not same(blocks):
        raise LostRowsError
    if not labels:
        return ""
    return labels.pop()


def _restricted_on(value: Tensor, layout: Layout | None, axis: int) -> Tensor:
    """Return the rows of a tensor whose batch lies on this axis, if it has one there."""
    if layout and axis >= 0 and value.shape[axis] == layout.size:
        return restrict(value, layout.on(axis))
    return value
