"""CrossFlow: identity (II), no velocity target (arXiv 2606.19970)."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowspace.arrays import Model, at_least_float32, over_rows
from flowspace.criteria import check_criteria
from flowspace.derivatives.replay import unseen
from flowspace.errors import CriterionError, InputError
from flowspace.objectives.engine import LossOutput, Objective, evaluated
from flowspace.statistics import MatchedStatistic, Statistic
from flowspace.times import PairSampler, PowerTimes, TimePairs

__all__ = ["CrossFlowLoss"]


@dataclass(frozen=True, kw_only=True)
class CrossFlowLoss(Objective):
    """R = a f + b D_t f - c x, with z replaced by its paired image x: f may live in another space
    than z_t.

    For the linear schedule and the matched statistic y* = (s/t) x + (1 - s/t) sg(f - t D_t f).

    Args:
        estimate: None differentiates f along the conditional velocity; a function from the model's
            output to latents (in one space ``lambda x: x``) along the velocity that the network
            itself estimates: that of ``estimate(f(z_t, t, t))``.

    Raises:
        InputError: if an argument is of the wrong kind, or gap = 1.
        CriterionError: if check is on and the statistic fails a criterion, or kappa = 0, which is
            `ConsistencyLoss`'s.

    Warns:
        UserWarning: if the statistic is not anchored.
    """

    estimate: Callable[[Tensor], Tensor] | None = None

    def default_statistic(self) -> Statistic:
        """Return the universal default."""
        return MatchedStatistic()

    def default_times(self) -> PairSampler:
        """Return squared uniform draws, half of the rows on s = t: what is sampled, s = 0, is tied
        to the data at small times.
        """
        return TimePairs(PowerTimes(2.0), mask_first=True)

    def check_statistic(self) -> None:
        """Refuse a statistic that fails a criterion or has no data term; warn of one that is not
        anchored.
        """
        if self.gap == 1:
            raise InputError("gap = 1 came; at r = s = 0 lambda is infinite, so write less than 1")
        report = check_criteria(self.schedule, self.statistic)  # type: ignore[arg-type]
        if report.criterion1 and report.coefficients.data_vanishes:
            raise CriterionError(
                "kappa = 0, so the data term vanishes and nothing ties f to the data; use "
                "ConsistencyLoss(), which adds "
                f"the boundary loss that this family needs.\n{report}"
            )
        report.raise_if_failed()
        if not report.anchored:
            warnings.warn(
                "the statistic is not anchored, so no row is a reconstruction loss and training "
                "may diverge; compare "
                f"MatchedStatistic().\n{report}",
                stacklevel=4,
            )

    def known(self, x: Tensor, z_t: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return c x: identity (II); guided, in one space, the same by identity (I),
        (gamma/delta)' z_t + (1 + gamma/delta) v.
        """
        c = self.coefficients
        if self.guidance is None:
            return over_rows(c.data(t, s), x) * x
        return over_rows(c.state(t, s), z_t) * z_t + over_rows(c.velocity(t, s), v) * v

    def known_between(
        self, x: Tensor, z_t: Tensor, z_r: Tensor, t: Tensor, r: Tensor, s: Tensor
    ) -> Tensor:
        """Return kappa (lambda_t - lambda_r) x: identity (II), integrated; guided, in one space,
        by identity (I).
        """
        c, ratio = self.coefficients, self.schedule.signal_to_noise
        if self.guidance is None:
            return over_rows(c.scaled_kappa(t, s) * (ratio(t) - ratio(r)), x) * x
        return over_rows(c.velocity(t, s), z_t) * z_t - over_rows(c.velocity(r, s), z_r) * z_r

    def own_velocity(self, model: Model, z_t: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        """Return the velocity of the latents that the model's clean prediction on the diagonal
        stands for.
        """
        if self.estimate is None:
            return super().own_velocity(model, z_t, t, cond)
        c = self.coefficients
        ratio, estimate = c.prediction(t, t) / c.data(t, t), self.estimate

        def cleaned() -> Tensor:
            f = at_least_float32(evaluated(model, z_t, t, t, cond))
            return estimate(over_rows(ratio, f) * f)

        clean = unseen(cleaned, z_t)
        return self.schedule.velocity(at_least_float32(clean), at_least_float32(z_t), t)

    def velocities(
        self,
        model: Model,
        z_t: Tensor,
        v: Tensor,
        t: Tensor,
        s: Tensor,
        cond: dict[str, Any],
        dropped: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the velocity of the tangent, estimated where asked for, and that of the known
        part.
        """
        tangent, v = super().velocities(model, z_t, v, t, s, cond, dropped)
        return (tangent if self.estimate is None else self.own_velocity(model, z_t, t, cond)), v

    def __call__(
        self, model: Model, latents: Tensor, targets: Tensor | None = None, **options: Any
    ) -> LossOutput:
        """Return the loss of each row; see `Objective.__call__`. Guidance in training needs one
        space: no targets.
        """
        if self.guidance is not None and targets is not None:
            raise InputError(
                "guidance came with targets of another space, where the guided velocity says "
                "nothing of them; leave targets "
                "out, or guide at sampling: FlowMap.sample(..., guidance=...)"
            )
        return super().__call__(model, latents, targets, **options)
