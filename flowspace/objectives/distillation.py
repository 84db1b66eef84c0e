"""MeanFlow distillation (MeanFlow of RAE latents, mf-rae).

A teacher's velocity stands in place of the noisy conditional one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowspace.arrays import Model, is_number
from flowspace.errors import InputError
from flowspace.inputs import require
from flowspace.objectives.engine import PathPoint, given_velocity
from flowspace.objectives.mean_flow import MeanFlowLoss
from flowspace.penalties import SquaredError
from flowspace.times import TimePairs

__all__ = ["MeanFlowDistillationLoss"]


@dataclass(frozen=True, kw_only=True)
class MeanFlowDistillationLoss(MeanFlowLoss):
    """MeanFlow with v replaced by (1 - l) v + l v_teacher, in the target and in the tangent.

    With the exact velocity as teacher the residual loses what the noise of v puts into it: its
    mean square falls by E |A dv|^2 with A = (t - s) d f/d z - 1 and dv = v - v_teacher.
    `FiniteDifference(step=5e-3)` as ``derivative`` is the reference's.

    Args:
        teacher: a callable ``(z_t, t, **cond)``, such as a flow-matching network at s = t, or
            `Guidance.apply` of one.
        mix: l, in [0, 1]; 0 is MeanFlow, training from data.
    """

    teacher: Callable[..., Tensor]
    mix: float = 1.0

    @classmethod
    def published(cls, **changes: Any) -> "MeanFlowDistillationLoss":
        """Return it with the reference's share of s = t, 3/4, and summed squares.

        Give ``teacher``, and shifted times.
        """
        settings = {"times": TimePairs(equal=0.75), "penalty": SquaredError(summed=True)}
        return cls(**(settings | changes))

    def check_settings(self) -> None:
        """Refuse what is no teacher, a mixture beyond [0, 1], and a second velocity."""
        require(
            callable(self.teacher),
            "teacher",
            self.teacher,
            "it is a function (z_t, t, **cond) that returns a velocity",
        )
        require(
            is_number(self.mix) and 0 <= self.mix <= 1,
            "mix",
            self.mix,
            "it is the teacher's share of the velocity, in [0, 1]",
        )
        if self.velocity is not None:
            raise InputError(
                "got velocity= beside teacher=; the teacher is what replaces the velocity: leave "
                "velocity out"
            )

    def residual_velocity(self, model: Model, at: PathPoint) -> Tensor:
        """Return the mixture of conditional and teacher's velocity, guided where asked for."""
        if self.mix:
            taught = given_velocity("teacher", self.teacher, at)
            at = at._replace(velocity=(1 - self.mix) * at.velocity + self.mix * taught)
        return super().residual_velocity(model, at)
