"""The paper's derivative: a central difference along the velocity (section 3.4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flowspace import Derivative
from flowspace.arrays import over_rows


@dataclass(frozen=True)
class CentralDifference(Derivative):
    """(f(x + h v) - f(x - h v)) / (2 h): both sides in one forward pass without gradient.

    Times leave [s, 1] by up to h, as in the paper's code; the network takes them. One without
    random draws, whose rows do not mix.
    """

    step: float = 0.005

    def evaluate(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Tensor | None],
        indices: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the value with gradient and the derivative on the rows of these indices."""
        value = fn(*primals)
        rows = len(value)
        if indices is None:
            indices = torch.arange(rows, device=value.device)
        twice = torch.cat([indices, indices])

        def sides(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows:
                return leaf.detach()[twice]
            return leaf

        h = torch.full((len(twice),), self.step, device=value.device)
        h[len(indices) :] *= -1
        points = []
        for primal, tangent in zip(primals, tangents, strict=True):
            point = pytree.tree_map(sides, primal)
            if tangent is not None:
                point = point + over_rows(h, point) * sides(tangent)
            points.append(point)
        with torch.no_grad():
            ahead, behind = fn(*points).float().chunk(2)
        slope = (ahead - behind) / (2 * self.step)
        derivative = torch.zeros(value.shape, dtype=slope.dtype, device=value.device)
        return value, derivative.index_copy(0, indices, slope)
