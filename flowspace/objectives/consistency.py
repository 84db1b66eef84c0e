"""Consistency in continuous time: kappa = 0, and a boundary loss (Song et al., 2303.01469)."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flowspace.arrays import Model, at_least_float32, draw_noise, is_number
from flowspace.errors import CriterionError
from flowspace.inputs import require
from flowspace.objectives.engine import LossOutput, Objective, PathPoint
from flowspace.objectives.inputs import Batch, evaluated, with_fields
from flowspace.penalties import SquaredError
from flowspace.schedules import TIME_FLOOR
from flowspace.statistics import AbstractStatistic, ConsistencyStatistic
from flowspace.times import DrawPairs, KarrasTimes, ToDataTimes

__all__ = ["ConsistencyLoss"]


@dataclass(frozen=True, kw_only=True)
class ConsistencyLoss(Objective):
    """R = -D_t f: f = z_s is constant along the path, plus a boundary loss where the path meets s.

    The target form is y* = sg(f - (t - s) D_t f); with ``gap`` the discrete two-point form, y* =
    sg f(z_r, r, s). The boundary loss is the penalty of f(z_u, u, s) - z_s at u = max(s,
    TIME_FLOOR), on one path with noise of its own, added to each row. With s = 0 (the default) f
    is the consistency model and z_s the data. Where targets are given, of another space, the
    boundary is theirs, at s = 0. With ``times=TimePairs()``, any s, f is the consistency
    trajectory model, in one space.

    Args:
        boundary: what the boundary loss is multiplied by; not negative.
    """

    statistic: AbstractStatistic = field(default_factory=ConsistencyStatistic)
    times: DrawPairs = ToDataTimes()
    boundary: float = 1.0

    @classmethod
    def published(cls, **changes: Any) -> "ConsistencyLoss":
        """Return it with the numbers of consistency training (arXiv 2303.01469, section 5).

        Noise levels uniform on the grid of Karras et al. (rho = 7, from 0.002 to 80), s = 0, and
        summed squares. Its growing number of steps is ``gap``, which here may be None.
        """
        settings = {
            "times": ToDataTimes(KarrasTimes()),
            "penalty": SquaredError(summed=True),
        }
        return cls(**(settings | changes))

    def check_settings(self) -> None:
        """Refuse a negative boundary weight."""
        require(
            is_number(self.boundary) and 0 <= self.boundary < float("inf"),
            "boundary",
            self.boundary,
            "it weighs a loss, so write 0 or more",
        )

    def check_statistic(self) -> None:
        """Refuse a statistic whose kappa is not zero, and the literal form, where a = 0."""
        if self.literal:
            raise CriterionError(
                "got literal=True, but a = 0 for kappa = 0, "
                "so the literal form has no gradient; write literal=False"
            )
        if self.coefficients.failure or not self.coefficients.data_vanishes:
            raise CriterionError(
                f"got {self.statistic}, whose kappa is not 0; "
                "use CrossFlowLoss(statistic=...) for it"
            )

    def known_part(self, at: PathPoint) -> Tensor:
        """Return zero: with kappa = 0 nothing of the data is left."""
        return at.library.zeros_like(at.data)

    def known_part_between(self, at: PathPoint, earlier: PathPoint) -> Tensor:
        """Return zero: with kappa = 0 nothing of the data is left."""
        return at.library.zeros_like(at.data)

    def completed(self, out: LossOutput, model: Model, batch: Batch) -> LossOutput:
        """Return the output with the boundary loss added to each row."""
        if not self.boundary:
            return out
        xp, noise = batch.library, batch.noise
        if noise is None:
            for_noise = xp.split(batch.generator, 3)[2]
            noise = draw_noise(batch.latents, for_noise)
        s = out.s
        edge = batch.targets
        if edge is None:
            edge = self.schedule.perturb(batch.latents, noise, s)[0]
        else:
            s = xp.zeros_like(s)
        u = xp.clamp(s, TIME_FLOOR)
        z_u = self.schedule.perturb(batch.latents, noise, u)[0]
        f = at_least_float32(evaluated(model, z_u, u, s, batch.cond))
        boundary = self._penalised(f - at_least_float32(edge))
        loss = out.loss + self.boundary * boundary
        return with_fields(out, loss=loss)
