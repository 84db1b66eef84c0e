"""alpha-Flow: MeanFlow's target in its two-point form (Zhang et al., arXiv 2510.20771).

It leads from flow matching to MeanFlow.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowspace.arrays import is_number
from flowspace.errors import InputError
from flowspace.inputs import require, warn_once
from flowspace.objectives.engine import LossOutput, PathPoint
from flowspace.objectives.inputs import Batch, with_fields
from flowspace.objectives.mean_flow import MeanFlowLoss
from flowspace.penalties import Adaptive, SquaredError
from flowspace.statistics import PointCoefficients
from flowspace.times import LogitNormalTimes, TimePairs

__all__ = ["AlphaFlowLoss", "alpha_at"]

SNAP = 0.005
"""An alpha this near 0 or 1 is taken for it; the reference's."""

LARGEST_EXPONENT = 700
"""exp of more overflows in float64."""


@dataclass(frozen=True, kw_only=True)
class AlphaFlowLoss(MeanFlowLoss):
    """y* = g v + (1 - g) sg u(z_r, r, s) with r = t - g (t - s); ``gap`` = g is the paper's alpha.

    1 is flow matching of pairs, None or g -> 0 is MeanFlow. Rows off the diagonal are weighted by
    g, as in the reference. Over training replace it: ``dataclasses.replace(loss_fn,
    gap=alpha_at(step / steps) or None)``.

    Args:
        bound: the largest size of a target's element; the reference clamps at 4.

    Warns:
        UserWarning: once, when called without ``gap``, which is MeanFlow.
    """

    bound: float = math.inf

    @classmethod
    def published(cls, **changes: Any) -> "AlphaFlowLoss":
        """Return it with the reference's numbers; give ``gap``, or replace it over training.

        Half of the rows on s = t, mean square / sg(it + 0.001), targets within 4.
        """
        settings = {
            "times": TimePairs(LogitNormalTimes(-0.4, 1.0)),
            "penalty": Adaptive(SquaredError(), c=1e-3),
            "bound": 4.0,
        }
        return cls(**(settings | changes))

    def check_settings(self) -> None:
        """Refuse a bound that is not positive."""
        require(
            is_number(self.bound) and self.bound > 0,
            "bound",
            self.bound,
            "it bounds the size of targets, so write 4.0 or another above 0",
        )

    def check_call(self, batch: Batch) -> None:
        """Say that without ``gap`` this is MeanFlow."""
        super().check_call(batch)
        if self.gap is None:
            warn_once(
                "AlphaFlowLoss without gap trains MeanFlow, "
                "as at the end of its schedule; before "
                "that write dataclasses.replace(loss_fn, gap=alpha_at(step / steps) or None)"
            )

    def _output(
        self, f: Tensor, rest: Tensor, at: PathPoint, weights: PointCoefficients
    ) -> LossOutput:
        xp = at.library
        if self.bound < math.inf:
            a, _, m = weights.over_rows(f)
            fixed = xp.detach(f)
            residual = a * fixed + rest
            target = xp.clamp(fixed - residual / m, -self.bound, self.bound)
            rest = m * (fixed - target) - a * fixed
        out = super()._output(f, rest, at, weights)
        if self.gap is None:
            return out
        share = xp.where(at.s < at.t, self.gap, xp.ones_like(out.loss))
        return with_fields(out, loss=share * out.loss)


def alpha_at(
    progress: float, start: float = 0.0, end: float = 1.0, steepness: float = 25.0
) -> float:
    """Return the reference's alpha: a sigmoid that falls from 1 to 0, snapped at the ends.

    Args:
        progress: the share of training that is done, in [0, 1].
        start: where the fall begins.
        end: where it is over, above start.
        steepness: of the sigmoid, positive.

    Raises:
        InputError: if start is not below end, or a number is not finite or in its range.
    """
    require(
        is_number(progress) and math.isfinite(progress),
        "progress",
        progress,
        "it is a share of training, in [0, 1]",
    )
    are_numbers = is_number(start) and is_number(end)
    if not (are_numbers and start < end and math.isfinite(end - start)):
        raise InputError(
            f"got start = {start!r}, end = {end!r}; alpha falls between them, so write start < end"
        )
    require(
        is_number(steepness) and 0 < steepness < math.inf,
        "steepness",
        steepness,
        "write a positive number, such as 25",
    )
    done = (progress - start) / (end - start)
    exponent = min(steepness * (done - 0.5), LARGEST_EXPONENT)
    alpha = 1 / (1 + math.exp(exponent))
    if alpha > 1 - SNAP:
        return 1.0
    if alpha < SNAP:
        return 0.0
    return alpha
