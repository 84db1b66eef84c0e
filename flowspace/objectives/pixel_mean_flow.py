"""Pixel MeanFlow: the network predicts the image, the loss is improved MeanFlow's (Lu et al.,
arXiv 2601.22158).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from flowspace.arrays import Model, over_rows
from flowspace.backends import backend_of
from flowspace.errors import InputError
from flowspace.expressions import combine, t
from flowspace.objectives.engine import (
    LossOutput,
)
from flowspace.objectives.improved_mean_flow import ImprovedMeanFlowLoss
from flowspace.penalties import Adaptive
from flowspace.statistics import Statistic
from flowspace.times import LogitNormalTimes, TimePairs

__all__ = ["CONVERSION_FLOOR", "PixelMeanFlowLoss"]

CONVERSION_FLOOR = 0.05
"""The smallest t by which z_t - f is divided, in the prediction and in the target; the
reference's, which bounds 1/t by 20.
"""


@dataclass(frozen=True, kw_only=True)
class PixelMeanFlowLoss(ImprovedMeanFlowLoss):
    """The network predicts the clean image f; u = (z_t - f)/max(t, floor) is formed inside what is
    differentiated.

    For another schedule u = (beta'/beta) z_t + beta lambda' f. Both heads predict images.
    Prediction and target of the output are images, z_t - max(t, floor) u, though the loss is of
    velocities: what a perceptual loss compares.

    Args:
        floor: the smallest t of the conversion, in [0, 1).
        perceptual_below: the t below which a perceptual loss is of use, see `perceptual_mask`; 0.8
            or 0.6 in the reference.
    """

    floor: float = CONVERSION_FLOOR
    perceptual_below: float = 0.8

    @classmethod
    def published(cls, **changes: Any) -> "PixelMeanFlowLoss":
        """Return it with the paper's numbers: logit-normal times (0.8, 0.8), half on s = t before
        sorting, L / sg(L + 0.01).
        """
        settings = {
            "times": TimePairs(LogitNormalTimes(0.8, 0.8), mask_first=True),
            "penalty": Adaptive(),
        }
        return cls(**(settings | changes))

    def check_statistic(self) -> None:
        """Refuse a floor that is no time, and another statistic than the average velocity."""
        if not 0 <= self.floor < 1:
            raise InputError(f"floor = {self.floor} came; it is a time, so write 0 <= floor < 1")
        if self.statistic != self.default_statistic():
            raise InputError(
                "a statistic came; the images of pixel MeanFlow become average velocities: leave "
                "it out"
            )

    @cached_property
    def outputs(self) -> Statistic:
        """Gamma = -beta'/(beta^2 lambda'), delta = 1/((t - s) beta lambda'); linear: 1 and -t/(t -
        s).
        """
        beta, slope = self.schedule.functions[1], self.schedule.signal_to_noise_slope
        gamma = combine(lambda b, d, m: -d / (b**2 * m), (beta, t), (beta.dot, t), (slope, t))
        apart = Statistic("0", "1/(t - s)").delta
        return Statistic(
            gamma, combine(lambda a, b, m: a / (b * m), (apart, None), (beta, t), (slope, t))
        )

    def to_velocity(self, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Return (z_t - f)/max(t, floor), or its like for another schedule."""
        return self.schedule.velocity(output, z_t, backend_of(t).clamp(t, self.floor))

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
        """Return the velocities of improved MeanFlow, the target's with the same floor as the
        prediction's.
        """
        floored = self.to_velocity(self.schedule.latents(v, z_t, t), z_t, t)
        v = backend_of(t).where(over_rows(t < self.floor, v), floored, v)
        return super().velocities(model, z_t, v, t, s, cond, dropped)

    def perceptual_mask(self, out: LossOutput) -> Tensor:
        """Return which rows ``(B,)`` a perceptual loss is of use for: t < perceptual_below."""
        return out.t < self.perceptual_below

    def _output(
        self, f: Tensor, rest: Tensor, z_t: Tensor, v: Tensor, t: Tensor, s: Tensor
    ) -> LossOutput:
        out = super()._output(f, rest, z_t, v, t, s)
        xp = backend_of(t)
        floored = xp.clamp(t, self.floor)
        images = (
            self.schedule.latents(u, xp.cast(z_t, u.dtype), floored)
            for u in (out.prediction, out.target)
        )
        return out._replace(**dict(zip(("prediction", "target"), images, strict=True)))
