"""CrossFlow: identity (II), no velocity target (arXiv 2606.19970)."""

import warnings
from dataclasses import dataclass

from torch import Tensor

from flowspace.criteria import check_criteria
from flowspace.errors import CriterionError
from flowspace.objectives.engine import Objective
from flowspace.schedules import over_rows
from flowspace.statistics import MatchedStatistic, Statistic

__all__ = ["CrossFlowLoss"]


@dataclass(frozen=True, kw_only=True)
class CrossFlowLoss(Objective):
    """R = a f + b D_t f - c x, with z replaced by its paired image x: f may live in another space than z_t.

    For the linear schedule and the matched statistic y* = (s/t) x + (1 - s/t) sg(f - t D_t f).
    """

    def default_statistic(self) -> Statistic:
        """Return the universal default."""
        return MatchedStatistic()

    def check_statistic(self) -> None:
        """Refuse a statistic that fails a criterion or has no data term; warn of one that is not anchored."""
        report = check_criteria(self.schedule, self.statistic)  # type: ignore[arg-type]
        if report.criterion1 and report.coefficients.data_vanishes:
            raise CriterionError(
                f"kappa = 0, so the data term vanishes and nothing ties f to the data; use ConsistencyLoss(), which adds "
                f"the boundary loss that this family needs.\n{report}"
            )
        report.raise_if_failed()
        if not report.anchored:
            warnings.warn(
                f"the statistic is not anchored, so no row is a reconstruction loss and training may diverge; compare "
                f"MatchedStatistic().\n{report}",
                stacklevel=4,
            )

    def known(self, x: Tensor, z_t: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return c x: identity (II)."""
        return over_rows(self.coefficients.data(t, s), x) * x
