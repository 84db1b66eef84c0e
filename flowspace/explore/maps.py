"""The residual's coefficients over the triangle 0 <= s <= t <= 1, as numbers to draw.

R = a f + b D_t f - c x where Criterion 1 holds; else R = a f + b D_t f - p z_t - q v, with
p = (gamma/delta)' and q = 1 + gamma/delta.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowspace.criteria import EXPLODES
from flowspace.schedules import TIME_FLOOR
from flowspace.statistics import DIAGONAL_POINTS, Coefficients
from flowspace.time_functions import TimeFunction

__all__ = ["EDGES", "GRID", "CoefficientMap", "coefficient_maps", "singular_edges", "terms"]

GRID = 96
"""Cells along each axis."""

NEAR_ZERO = 1e-9
"""t so small shows what grows for t -> 0."""

EDGES = ("s = t", "s = 0", "t = 1", "t -> 0")
"""Where a coefficient may have no finite value, in the words of the report."""

TYPICAL = 0.9
"""The share of the triangle whose values the colours tell apart; beyond they are full."""


@dataclass(frozen=True)
class CoefficientMap:
    """The values of one coefficient over the triangle.

    Attributes:
        name: a, b, c, p or q.
        place: what it stands in front of.
        values: at the centres of the cells, ``(GRID, GRID)``, row by s and column by t; above the
            diagonal, where s > t, nan.
        limit: the size up to which values are told apart; 0 where all are zero.
        singular: the edges on which it has no finite value.
    """

    name: str
    place: str
    values: np.ndarray
    limit: float
    singular: tuple[str, ...]

    def at(self, t: float, s: float) -> tuple[float, float, float]:
        """Return the centre (t, s) of the cell around a point, and the value there."""
        column, row = _cell(t), _cell(s)
        return (column + 0.5) / GRID, (row + 0.5) / GRID, float(self.values[row, column])


def coefficient_maps(coefficients: Coefficients) -> list[CoefficientMap]:
    """Return the maps of all coefficients of a residual, in its order."""
    return [_map(*each) for each in terms(coefficients)]


def terms(c: Coefficients) -> list[tuple[str, str, TimeFunction]]:
    """Return the name of each coefficient, what it stands in front of, and its function."""
    found = [("a", "f", c.prediction), ("b", "D_t f", c.derivative)]
    if c.failure:
        return [*found, ("p", "z_t", c.state), ("q", "v", c.velocity)]
    return [*found, ("c", "x", c.data)]


def singular_edges(function: TimeFunction) -> tuple[str, ...]:
    """Return the edges on which a coefficient has no finite value."""
    times = torch.linspace(TIME_FLOOR, 1, DIAGONAL_POINTS, dtype=torch.float64)
    near = torch.tensor([NEAR_ZERO], dtype=torch.float64)
    values = (
        function(times, times),
        function(times, torch.zeros_like(times)),
        function(torch.ones_like(times), times),
        function(near, near / 2),
    )
    limits = (torch.inf, torch.inf, torch.inf, EXPLODES)
    bounded = map(_bounded, values, limits)
    return tuple(edge for edge, fine in zip(EDGES, bounded, strict=True) if not fine)


def _bounded(values: Tensor, limit: float) -> bool:
    return bool((values.abs() < limit).all())


def _map(name: str, place: str, function: TimeFunction) -> CoefficientMap:
    centres = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    s, t = torch.meshgrid(centres, centres, indexing="ij")
    inside = s <= t
    values = torch.full_like(t, torch.nan)
    values[inside] = function(t[inside], s[inside])
    sizes = values[inside].abs()
    sizes = sizes[sizes.isfinite()]
    limit = 0.0
    if len(sizes):
        limit = float(sizes.quantile(TYPICAL)) or float(sizes.max())
    return CoefficientMap(name, place, values.numpy(), limit, singular_edges(function))


def _cell(time: float) -> int:
    return min(GRID - 1, max(0, int(time * GRID)))
