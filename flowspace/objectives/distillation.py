"""MeanFlow distillation: a teacher's velocity in place of the noisy conditional one (MeanFlow of
RAE latents, mf-rae).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowspace.arrays import Model
from flowspace.backends import backend_of
from flowspace.errors import InputError
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
        """Return it with the reference's share of s = t, 3/4, and summed squares; give
        ``teacher``, and shifted times.
        """
        settings = {"times": TimePairs(equal=0.75), "penalty": SquaredError(summed=True)}
        return cls(**(settings | changes))

    def check_statistic(self) -> None:
        """Refuse what is no teacher, and a mixture beyond [0, 1]."""
        if not callable(self.teacher):
            raise InputError(
                f"teacher = {self.teacher!r} came; it is a function (z_t, t, **cond) that returns "
                "a velocity"
            )
        if not 0 <= self.mix <= 1:
            raise InputError(
                f"mix = {self.mix} came; it is the teacher's share of the velocity, in [0, 1]"
            )
        if self.velocity is not None:
            raise InputError(
                "velocity= came beside teacher=; the teacher is what replaces the velocity: leave "
                "velocity out"
            )

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
        """Return the mixture of the conditional and the teacher's velocity, guided where asked
        for.
        """
        if self.mix:
            found = backend_of(z_t).detach(self.teacher(z_t, t, **cond))
            if found.shape != z_t.shape:
                raise InputError(
                    f"teacher returned shape {tuple(found.shape)} for states of shape "
                    f"{tuple(z_t.shape)}"
                )
            v = (1 - self.mix) * v + self.mix * found
        return super().velocities(model, z_t, v, t, s, cond, dropped)
