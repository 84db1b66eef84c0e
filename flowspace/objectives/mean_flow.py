"""MeanFlow: identity (I) for the average velocity (Geng et al., arXiv 2505.13447)."""

from dataclasses import dataclass

from torch import Tensor

from flowspace.objectives.engine import Objective
from flowspace.schedules import over_rows
from flowspace.statistics import MeanFlowStatistic, Statistic

__all__ = ["MeanFlowLoss"]


@dataclass(frozen=True, kw_only=True)
class MeanFlowLoss(Objective):
    """R = f + (t - s) D_t f - v, in one space; targets are accepted and ignored.

    Any statistic may stand in for the average velocity: identity (I) always holds.
    """

    def default_statistic(self) -> Statistic:
        """Return the average velocity."""
        return MeanFlowStatistic()

    def known(self, x: Tensor, z_t: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return (gamma/delta)' z_t + (1 + gamma/delta) v: identity (I)."""
        c = self.coefficients
        return over_rows(c.state(t, s), z_t) * z_t + over_rows(c.velocity(t, s), v) * v
