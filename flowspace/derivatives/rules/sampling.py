"""Rules for functions of points: grids of them, samples of a picture at points that may move, and
distances between them. Of the last two torch has no forward derivative.
"""

from collections.abc import Callable
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
from flowspace.derivatives.rules.registry import At, Call, forward, rows_of, rule, sum_of

aten = torch.ops.aten


@rule("grid_sampler")
def grid_sampler(call: Call, x: Any, grid: Any, *modes: Any) -> Any:
    """The tangent is the samples of dx, and the slope of x at each point times the point's motion.

    x has shape (B, C, H, W) or (B, C, D, H, W), the grid (B, *, 2) or (B, *, 3).
    """
    for dual in call.duals:
        dual.only_batch_first()
    restricted = shared_rows(call.duals)
    pictures, points = restricted(x), restricted(grid)
    tangent = None
    if isinstance(x, Dual):
        tangent = call.func(x.tangent, points, *modes)
    if isinstance(grid, Dual):
        motion = _slope(pictures, points, modes) * grid.tangent[:, None]
        tangent = sum_of(tangent, motion.sum(-1))
    return At(tangent, call.duals[0].layout)  # type: ignore[arg-type]  # one of the two moves


@rule("affine_grid_generator")
def affine_grid_generator(call: Call, theta: Dual, size: Any, *align: Any) -> Tensor:
    """The tangent is the grid of dtheta, of shape (B, 2, 3) or (B, 3, 4)."""
    theta.only_batch_first()
    return call.func(theta.tangent, [len(theta.tangent), *size[1:]], *align)


def _slope(pictures: Tensor, points: Tensor, modes: Any) -> Tensor:
    """Return the derivative of each sample by its point, of shape (B, C, *, 2 or 3).

    torch's backward pass sums it over channels, so each channel is a picture of its own here.
    """
    batch, channels = pictures.shape[:2]
    backward = aten.grid_sampler_2d_backward.default
    if pictures.ndim == 5:
        backward = aten.grid_sampler_3d_backward.default
    single = pictures.reshape(-1, 1, *pictures.shape[2:])
    each = points.repeat_interleave(channels, 0)
    ones = torch.ones_like(each[..., 0])[:, None]
    slope = backward(ones, single, each, *modes, [False, True])[1]
    return slope.reshape(batch, channels, *slope.shape[1:])


@rule("cdist")
def cdist(call: Call, x: Any, y: Any, p: float = 2.0, *mode: Any, **named: Any) -> Any:
    """The tangent of the distance |x - y| is (x - y)(dx - dy) / |x - y|, and zero where x is y.

    x has shape (*, P, C), y (*, R, C), the distances (*, P, R). Other norms than those of finite
    p >= 1 are left to torch.func.jvp.
    """
    if not 1 <= p < float("inf"):
        return forward(call)
    layout, restricted = _rows_of_distances(call, y)
    difference = restricted(x)[..., :, None, :] - restricted(y)[..., None, :, :]
    motion = None
    if isinstance(x, Dual):
        motion = x.tangent[..., :, None, :]
    if isinstance(y, Dual):
        motion = sum_of(motion, -y.tangent[..., None, :, :])
    distance = torch.linalg.vector_norm(difference, p, -1)
    together = distance == 0
    slope = difference.sign() * difference.abs() ** (p - 1)
    tangent = (slope * motion).sum(-1) / distance.masked_fill(together, 1.0) ** (p - 1)
    return At(tangent.masked_fill(together, 0.0), layout)


def _rows_of_distances(call: Call, y: Any) -> tuple[Layout | None, Callable[[Any], Any]]:
    """Return where the batch lies in distances, and what restricts the points to its rows.

    Raises:
        LostRowsError: if each point of the batch meets the others.
    """
    dual, ndim = call.duals[0], call.out.ndim
    dual.untouched(-1)
    layout = dual.layout
    if layout is None:
        return None, whole_primal
    right = dual.ndim - layout.axis
    if right > 2:
        return layout.on(ndim - right), shared_rows(call.duals)
    if len(call.duals) > 1:
        raise LostRowsError
    if dual is y:
        right = 1
    return layout.on(ndim - right), rows_of
