"""MeanFlow distillation (MeanFlow of RAE latents, mf-rae).

A teacher's velocity stands in place of the noisy conditional one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowspace.arrays import Model, is_number
from flowspace.derivatives import FiniteDifference
from flowspace.errors import InputError
from flowspace.inputs import is_function, require, velocity_of
from flowspace.objectives.engine import PathPoint
from flowspace.objectives.inputs import with_fields
from flowspace.objectives.mean_flow import MeanFlowLoss
from flowspace.penalties import SquaredError
from flowspace.times import ShiftedTimes, TimePairs

__all__ = ["MeanFlowDistillationLoss"]


@dataclass(frozen=True, kw_only=True)
class MeanFlowDistillationLoss(MeanFlowLoss):
    """MeanFlow with v replaced by (1 - l) v + l v_teacher, in the target and in the tangent.

    What l trades is proposition 3.1: with A = 1 - (t - s) df/dz, the exact average velocity h and
    velocity v, and the bias B = (t - s) D_t (f - h) along v,

        E|R|^2 = E|f - h + B - l A (v_teacher - v)|^2 + (1 - l)^2 E|A (eps - z - v)|^2,

    where eps - z stands for the conditional velocity: its variance at l = 0, the teacher's error
    at l = 1. (The paper's equation 4 has B with the other sign.)

    Args:
        teacher: a callable ``(z_t, t, **cond)``, such as a flow-matching network at s = t, or
            `Guidance.apply` of one.
        mix: l, in [0, 1]; 0 is MeanFlow, training from data.
    """

    teacher: Callable[..., Tensor]
    mix: float = 1.0

    @classmethod
    # dim, which others do not take: the times need it
    def published(cls, dim: int, **changes: Any) -> "MeanFlowDistillationLoss":  # pyright: ignore
        """Return it with the paper's numbers (sections 3.3, 3.4 and 5).

        The teacher's uniform times, shifted by sqrt(dim / 4096), t > s in every row, summed
        squares, and differences of 0.005, which are one-sided here and central there. Its code
        differs: 3/4 of the rows lie on s = t, for which write
        ``times=TimePairs(ShiftedTimes(dim), equal=0.75)``. Give ``teacher``.

        Args:
            dim: the number of elements of a latent, such as 768 * 16 * 16.
            changes: any field of the objective.
        """
        settings = {
            "times": TimePairs(ShiftedTimes(dim), equal=0.0),
            "penalty": SquaredError(summed=True),
            "derivative": FiniteDifference(step=5e-3),
        }
        return cls(**(settings | changes))

    def check_settings(self) -> None:
        """Refuse what is no teacher, a mixture beyond [0, 1], and a second velocity."""
        require(
            is_function(self.teacher),
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
                "got velocity= beside teacher=; "
                "the teacher is what replaces the velocity: leave velocity out"
            )

    def residual_velocity(self, model: Model, at: PathPoint) -> Tensor:
        """Return the mixture of conditional and teacher's velocity, guided where asked for."""
        if self.mix:
            taught = velocity_of("teacher", self.teacher, at.state, at.t, at.cond)
            taught = at.library.detach(taught)
            mixed = (1 - self.mix) * at.velocity + self.mix * taught
            at = with_fields(at, velocity=mixed)
        return super().residual_velocity(model, at)
