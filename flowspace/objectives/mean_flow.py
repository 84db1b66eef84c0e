"""MeanFlow: identity (I) for the average velocity (Geng et al., arXiv 2505.13447)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowspace.arrays import over_rows
from flowspace.objectives.engine import Objective
from flowspace.penalties import Adaptive
from flowspace.statistics import MeanFlowStatistic, Statistic
from flowspace.times import LogitNormalTimes, TimePairs

__all__ = ["MeanFlowLoss"]


@dataclass(frozen=True, kw_only=True)
class MeanFlowLoss(Objective):
    """R = f + (t - s) D_t f - v, in one space; targets are accepted and ignored.

    Any statistic may stand in for the average velocity: identity (I) always holds.
    """

    @classmethod
    def published(cls, **changes: Any) -> "MeanFlowLoss":
        """Return it with the paper's numbers: logit-normal times (-0.4, 1), sorted, 3/4 on s = t,
        L / sg(L + 0.01), summed.
        """
        settings = {
            "times": TimePairs(LogitNormalTimes(-0.4, 1.0), equal=0.75),
            "penalty": Adaptive(),
        }
        return cls(**(settings | changes))

    def default_statistic(self) -> Statistic:
        """Return the average velocity."""
        return MeanFlowStatistic()

    def known(self, x: Tensor, z_t: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return (gamma/delta)' z_t + (1 + gamma/delta) v: identity (I)."""
        c = self.coefficients
        return over_rows(c.state(t, s), z_t) * z_t + over_rows(c.velocity(t, s), v) * v

    def known_between(
        self, x: Tensor, z_t: Tensor, z_r: Tensor, t: Tensor, r: Tensor, s: Tensor
    ) -> Tensor:
        """Return (1 + gamma/delta) z_t - (1 + gamma/delta) z_r: identity (I), integrated."""
        weight = self.coefficients.velocity
        return over_rows(weight(t, s), z_t) * z_t - over_rows(weight(r, s), z_r) * z_r
