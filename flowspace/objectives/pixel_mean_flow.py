"""Pixel MeanFlow (Lu et al., arXiv 2601.22158).

The network predicts the image, the loss is improved MeanFlow's.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from flowspace.arrays import Model, is_number, over_rows
from flowspace.backends import backend_of
from flowspace.errors import InputError
from flowspace.inputs import require
from flowspace.objectives.engine import LossOutput, PathPoint
from flowspace.objectives.improved_mean_flow import ImprovedMeanFlowLoss
from flowspace.objectives.inputs import with_fields
from flowspace.penalties import Adaptive
from flowspace.statistics import MeanFlowStatistic, PointCoefficients, Statistic
from flowspace.time_functions import TimeFunction
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
        """Return it with the paper's numbers.

        Logit-normal times (0.8, 0.8), half on s = t before sorting, L / sg(L + 0.01).
        """
        settings = {
            "times": TimePairs(LogitNormalTimes(0.8, 0.8), mask_first=True),
            "penalty": Adaptive(),
        }
        return cls(**(settings | changes))

    def check_settings(self) -> None:
        """Refuse a floor or a perceptual limit that is no time."""
        super().check_settings()
        require(
            is_number(self.floor) and 0 <= self.floor < 1,
            "floor",
            self.floor,
            "it is a time, so write 0 <= floor < 1",
        )
        below = self.perceptual_below
        require(
            is_number(below) and 0 <= below <= 1,
            "perceptual_below",
            below,
            "it is a time, so write a number in [0, 1]",
        )

    def check_statistic(self) -> None:
        """Refuse another statistic than the average velocity."""
        if self.statistic != MeanFlowStatistic():
            raise InputError(
                f"got statistic = {self.statistic!r}; "
                "the images of pixel MeanFlow become average velocities: leave it out"
            )

    @cached_property
    def outputs(self) -> Statistic:
        """The statistic of an image network.

        Its gamma is -beta'/(beta^2 lambda') and its delta 1/((t - s) beta lambda'); for the linear
        schedule 1 and -t/(t - s).
        """
        beta = self.schedule.functions[1]
        slope = self.schedule.signal_to_noise_slope
        gamma = -beta.dot / (beta * beta * slope)
        inverse = TimeFunction("1/(t - s)", 2)
        return Statistic(gamma, inverse / (beta * slope))

    def to_velocity(self, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Return (z_t - f)/max(t, floor), or its like for another schedule."""
        if output.shape != z_t.shape:
            raise InputError(
                f"got shape {tuple(output.shape)} from the model "
                f"for states of shape {tuple(z_t.shape)}; "
                "in pixel MeanFlow states and predictions are both images"
            )
        floored = backend_of(t).clamp(t, self.floor)
        return self.schedule.velocity(output, z_t, floored)

    def residual_velocity(self, model: Model, at: PathPoint) -> Tensor:
        """Return the velocity of improved MeanFlow, with the same floor as the prediction's."""
        clean = self.schedule.latents(at.velocity, at.state, at.t)
        floored = self.to_velocity(clean, at.state, at.t)
        below = over_rows(at.t < self.floor, at.velocity)
        velocity = at.library.where(below, floored, at.velocity)
        at = with_fields(at, velocity=velocity)
        return super().residual_velocity(model, at)

    def perceptual_mask(self, out: LossOutput) -> Tensor:
        """Return which rows ``(B,)`` a perceptual loss is of use for: t < perceptual_below."""
        return out.t < self.perceptual_below

    def _output(
        self, f: Tensor, rest: Tensor, at: PathPoint, weights: PointCoefficients
    ) -> LossOutput:
        out = super()._output(f, rest, at, weights)
        xp = at.library
        floored = xp.clamp(at.t, self.floor)
        state = xp.cast(at.state, out.prediction.dtype)
        image = self.schedule.latents(out.prediction, state, floored)
        target = self.schedule.latents(out.target, state, floored)
        return with_fields(out, prediction=image, target=target)
