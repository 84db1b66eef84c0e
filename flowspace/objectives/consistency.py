"""Consistency: kappa = 0, tied to the data by a boundary loss (Song et al., arXiv 2303.01469; continuous time)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowspace.errors import CriterionError, InputError
from flowspace.objectives.engine import LossOutput, Model, Objective, in_full
from flowspace.schedules import TIME_FLOOR
from flowspace.statistics import ConsistencyStatistic, Statistic
from flowspace.times import PairSampler, ToDataTimes

__all__ = ["ConsistencyLoss"]


@dataclass(frozen=True, kw_only=True)
class ConsistencyLoss(Objective):
    """R = -D_t f: f is constant along the path, plus a boundary loss where the path meets the data.

    The target form is y* = sg(f - (t - s) D_t f). The boundary loss is the penalty of f(z_t, t, s) - x at the smallest time,
    t = TIME_FLOOR, s = 0, added to each row. Targets may live in another space than the latents.

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
            raise InputError(f"boundary = {self.boundary} came; it weighs a loss, so write 0 or more")
        if self.literal:
            raise CriterionError("a = 0 for kappa = 0, so the literal form has no gradient; write literal=False")
        c = self.statistic.coefficients(self.schedule)  # type: ignore[union-attr]
        if c.failure or not c.data_vanishes:
            raise CriterionError(f"kappa is not 0 for {self.statistic}; use CrossFlowLoss(statistic=...) for it")

    def known(self, x: Tensor, z_t: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return zero: with kappa = 0 nothing of the data is left."""
        return torch.zeros_like(x)

    def __call__(self, model: Model, latents: Tensor, targets: Tensor | None = None, **options: Any) -> LossOutput:
        """Return the loss of each row, boundary included; see `Objective.__call__`."""
        out = super().__call__(model, latents, targets, **options)
        if not self.boundary:
            return out
        options |= {"t": torch.tensor(TIME_FLOOR), "s": torch.tensor(0.0)}
        t, s = self._pair(latents, options["t"], options["s"], None)
        noise = options.get("noise")
        if noise is None:
            noise = torch.randn(
                latents.shape, generator=options.get("generator"), device=latents.device, dtype=latents.dtype
            )
        z_t, _ = self.schedule.perturb(latents, noise, t)
        prediction, x = model(z_t, t, s, **(options.get("cond") or {})), latents if targets is None else targets
        edge = in_full(prediction) - in_full(x)
        return out._replace(loss=out.loss + self.boundary * self.penalty(edge))  # type: ignore[misc]
