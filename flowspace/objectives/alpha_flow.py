"""alpha-Flow: MeanFlow's target in its two-point form, from flow matching to MeanFlow (Zhang et
al., arXiv 2510.20771).
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowspace.arrays import over_rows
from flowspace.backends import backend_of
from flowspace.errors import InputError
from flowspace.objectives.engine import LossOutput
from flowspace.objectives.mean_flow import MeanFlowLoss
from flowspace.penalties import Adaptive, SquaredError
from flowspace.times import LogitNormalTimes, TimePairs

__all__ = ["AlphaFlowLoss", "alpha_at"]

SNAP = 0.005
"""An alpha this near 0 or 1 is taken for it; the reference's."""


@dataclass(frozen=True, kw_only=True)
class AlphaFlowLoss(MeanFlowLoss):
    """y* = g v + (1 - g) sg u(z_r, r, s) with r = t - g (t - s), where ``gap`` = g is the paper's
    alpha.

    1 is flow matching of pairs, None or g -> 0 is MeanFlow. Rows off the diagonal are weighted by
    g, as in the reference. Over training replace it: ``dataclasses.replace(loss_fn,
    gap=alpha_at(step / steps) or None)``.

    Args:
        bound: the largest size of a target's element; the reference clamps at 4.
    """

    bound: float = math.inf

    @classmethod
    def published(cls, **changes: Any) -> "AlphaFlowLoss":
        """Return it with the reference's numbers: half on s = t, mean square / sg(it + 0.001),
        targets within 4.
        """
        settings = {
            "times": TimePairs(LogitNormalTimes(-0.4, 1.0)),
            "penalty": Adaptive(SquaredError(), c=1e-3),
            "bound": 4.0,
        }
        return cls(**(settings | changes))

    def check_statistic(self) -> None:
        """Refuse a bound that is not positive."""
        if not self.bound > 0:
            raise InputError(
                f"bound = {self.bound} came; it bounds the size of targets, so write 4.0 or "
                "another above 0"
            )

    def _output(
        self, f: Tensor, rest: Tensor, z_t: Tensor, v: Tensor, t: Tensor, s: Tensor
    ) -> LossOutput:
        xp = backend_of(f)
        if self.bound < math.inf:
            c = self.coefficients
            a, m = (over_rows(part(t, s), f) for part in (c.prediction, c.scale))
            fixed = xp.detach(f)
            target = xp.clamp(fixed - (a * fixed + rest) / m, -self.bound, self.bound)
            rest = m * (fixed - target) - a * fixed
        out = super()._output(f, rest, z_t, v, t, s)
        if self.gap is None:
            return out
        return out._replace(loss=xp.where(s < t, self.gap, xp.ones_like(out.loss)) * out.loss)


def alpha_at(
    progress: float, start: float = 0.0, end: float = 1.0, steepness: float = 25.0
) -> float:
    """Return the reference's alpha: a sigmoid that falls from 1 to 0 over [start, end] of
    training, snapped at the ends.

    Args:
        progress: the share of training that is done, in [0, 1].
        start: where the fall begins.
        end: where it is over, above start.
        steepness: of the sigmoid.
    """
    if not start < end:
        raise InputError(
            f"start = {start}, end = {end} came; alpha falls between them, so write start < end"
        )
    inside = (progress - start) / (end - start)
    alpha = 1 / (1 + math.exp(min(steepness * (inside - 0.5), 700)))
    return 1.0 if alpha > 1 - SNAP else 0.0 if alpha < SNAP else alpha
