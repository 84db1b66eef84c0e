"""CrossFlow: identity (II), no velocity target (arXiv 2606.19970)."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowspace.arrays import Model, at_least_float32, over_rows
from flowspace.criteria import check_criteria
from flowspace.derivatives.replay import without_trace
from flowspace.errors import CriterionError, InputError
from flowspace.inputs import is_function, require
from flowspace.objectives.engine import Objective, PathPoint
from flowspace.objectives.inputs import Batch, evaluated
from flowspace.statistics import AbstractStatistic, MatchedStatistic
from flowspace.times import DrawPairs, PowerTimes, ShiftedTimes, TimePairs

__all__ = ["CrossFlowLoss"]


@dataclass(frozen=True, kw_only=True)
class CrossFlowLoss(Objective):
    """R = a f + b D_t f - c x, with z replaced by its paired image x.

    f may live in another space than z_t. For the linear schedule and the matched statistic
    y* = (s/t) x + (1 - s/t) sg(f - t D_t f). By default times are squared uniform draws, half of
    the rows on s = t: what is sampled, s = 0, is tied to the data at small times.

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

    statistic: AbstractStatistic = MatchedStatistic()
    times: DrawPairs = TimePairs(PowerTimes(2.0), mask_first=True)
    estimate: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def published(cls, dim: int, **changes: Any) -> "CrossFlowLoss":
        """Return it with the paper's choices: the literal form and shifted uniform times.

        Half of the rows lie on s = t with one draw each; elsewhere two draws are sorted (appendix
        B.3).

        Args:
            dim: the number of elements of a latent, such as 32 * 16 * 16: times are shifted by
                sqrt(dim / 4096).
            changes: any field of the objective.
        """
        settings = {
            "literal": True,
            "times": TimePairs(ShiftedTimes(dim), mask_first=True),
        }
        return cls(**(settings | changes))

    def check_settings(self) -> None:
        """Refuse an estimate that is no function, and gap = 1."""
        require(
            self.estimate is None or is_function(self.estimate),
            "estimate",
            self.estimate,
            "it is a function from the model's output to latents, in one space lambda x: x",
        )
        require(
            self.gap != 1,
            "gap",
            self.gap,
            "at r = s = 0 lambda is infinite, so write less than 1",
        )

    def check_statistic(self) -> None:
        """Refuse a statistic that fails a criterion or has no data term.

        Warns:
            UserWarning: of a statistic that is not anchored.
        """
        report = check_criteria(self.schedule, self.statistic)
        if report.criterion1 and report.coefficients.data_vanishes:
            raise CriterionError(
                "got kappa = 0, so the data term vanishes and nothing ties f to the data; "
                "use ConsistencyLoss(), "
                f"which adds the boundary loss that this family needs.\n{report}"
            )
        report.raise_if_failed()
        if not report.anchored:
            warnings.warn(
                "the statistic is not anchored, "
                "so no row is a reconstruction loss and training may diverge; "
                f"compare MatchedStatistic().\n{report}",
                stacklevel=4,
            )

    def check_call(self, batch: Batch) -> None:
        """Refuse guidance in training with targets of another space."""
        if self.guidance is not None and batch.targets is not None:
            raise InputError(
                "got guidance with targets of another space, "
                "where the guided velocity says nothing of them; "
                "leave targets out, or guide at sampling: FlowMap.sample(..., guidance=...)"
            )

    def known_part(self, at: PathPoint) -> Tensor:
        """Return K = c x: identity (II).

        Guided, in one space, K = (gamma/delta)' z_t + (1 + gamma/delta) v: identity (I).
        """
        c = self.coefficients
        if self.guidance is None:
            return at.weighted(c.data, at.data)
        of_state = at.weighted(c.state, at.z)
        return of_state + at.weighted(c.velocity, at.velocity)

    def known_part_between(self, at: PathPoint, earlier: PathPoint) -> Tensor:
        """Return kappa (lambda_t - lambda_r) x: identity (II), integrated.

        Guided, in one space, by identity (I).
        """
        c = self.coefficients
        if self.guidance is None:
            ratio = self.schedule.signal_to_noise
            fall = ratio(at.t) - ratio(earlier.t)
            weight = c.scaled_kappa(at.t, at.s) * fall
            return over_rows(weight, at.data) * at.data
        kept = at.weighted(c.velocity, at.z)
        return kept - earlier.weighted(c.velocity, earlier.z)

    def own_velocity(self, model: Model, at: PathPoint) -> Tensor:
        """Return the velocity of the latents that the model's clean prediction stands for."""
        if self.estimate is None:
            return super().own_velocity(model, at)
        c, estimate = self.coefficients, self.estimate
        to_data = c.prediction(at.t, at.t) / c.data(at.t, at.t)

        def clean_latents() -> Tensor:
            f = evaluated(model, at.state, at.t, at.t, at.cond)
            f = at_least_float32(f)
            return estimate(over_rows(to_data, f) * f)

        latents = without_trace(clean_latents, at.state)
        latents = at_least_float32(latents)
        return self.schedule.velocity(latents, at.z, at.t)

    def tangent_velocity(self, model: Model, at: PathPoint) -> Tensor:
        """Return the velocity along which f is differentiated, estimated where asked for."""
        if self.estimate is None:
            return at.velocity
        return self.own_velocity(model, at)
