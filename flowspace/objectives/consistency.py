"""Consistency: kappa = 0, tied to the data by a boundary loss (Song et al., arXiv 2303.01469;
continuous time).
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowspace.arrays import Model, at_least_float32, draw_noise
from flowspace.backends import backend_of
from flowspace.errors import CriterionError, InputError
from flowspace.objectives.engine import LossOutput, Objective, evaluated
from flowspace.schedules import TIME_FLOOR
from flowspace.statistics import ConsistencyStatistic, Statistic
from flowspace.times import PairSampler, ToDataTimes

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

    boundary: float = 1.0

    def default_statistic(self) -> Statistic:
        """Return gamma = 1, delta = -1."""
        return ConsistencyStatistic()

    def default_times(self) -> PairSampler:
        """Return t uniform and s = 0."""
        return ToDataTimes()

    def check_statistic(self) -> None:
        """Refuse a statistic whose kappa is not zero, and a negative boundary weight."""
        if not self.boundary >= 0:
            raise InputError(
                f"boundary = {self.boundary} came; it weighs a loss, so write 0 or more"
            )
        if self.literal:
            raise CriterionError(
                "a = 0 for kappa = 0, so the literal form has no gradient; write literal=False"
            )
        c = self.statistic.coefficients(self.schedule)  # type: ignore[union-attr]
        if c.failure or not c.data_vanishes:
            raise CriterionError(
                f"kappa is not 0 for {self.statistic}; use CrossFlowLoss(statistic=...) for it"
            )

    def known(self, x: Tensor, z_t: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return zero: with kappa = 0 nothing of the data is left."""
        return backend_of(x).zeros_like(x)

    def known_between(
        self, x: Tensor, z_t: Tensor, z_r: Tensor, t: Tensor, r: Tensor, s: Tensor
    ) -> Tensor:
        """Return zero."""
        return backend_of(x).zeros_like(x)

    def __call__(
        self, model: Model, latents: Tensor, targets: Tensor | None = None, **options: Any
    ) -> LossOutput:
        """Return the loss of each row, boundary included; see `Objective.__call__`."""
        out = super().__call__(model, latents, targets, **options)
        if not self.boundary:
            return out
        xp, noise = backend_of(latents), options.get("noise")
        if noise is None:
            noise = draw_noise(latents, xp.split(options.get("generator"), 3)[2])
        s = out.s if targets is None else xp.zeros_like(out.s)
        z_u, _ = self.schedule.perturb(latents, noise, u := xp.clamp(s, TIME_FLOOR))
        x = self.schedule.perturb(latents, noise, s)[0] if targets is None else targets
        edge = at_least_float32(
            evaluated(model, z_u, u, s, options.get("cond") or {})
        ) - at_least_float32(x)
        return out._replace(loss=out.loss + self.boundary * self.penalty(edge))  # type: ignore[misc]
