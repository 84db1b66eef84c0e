"""Improved MeanFlow: a regression on the velocity, along the network's own velocity (Geng et al.,
arXiv 2512.02012).
"""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowspace.arrays import Model, at_least_float32
from flowspace.backends import backend_of, torch_backend
from flowspace.derivatives.replay import on_copies, unseen
from flowspace.derivatives.route import checked
from flowspace.errors import InputError
from flowspace.objectives.engine import LossOutput, check_model, evaluated, signature_of
from flowspace.objectives.mean_flow import MeanFlowLoss
from flowspace.penalties import Adaptive
from flowspace.times import LogitNormalTimes, TimePairs

__all__ = ["ImprovedMeanFlowLoss"]


@dataclass(frozen=True, kw_only=True)
class ImprovedMeanFlowLoss(MeanFlowLoss):
    """V = u + (t - s) sg(D_t u) is regressed on v: MeanFlow's target form, with D_t u along the
    network's own velocity.

    The tangent is then a function of z_t alone, as it is for the exact u, and not of the noise
    that made z_t. It is taken on all rows, as in the reference: the value of a model that mixes
    its rows is another one on some of them, and nothing would tell.

    Args:
        own_tangent: differentiate along the network's own velocity; False: along the one in the
            target, as MeanFlow does.
        head: the model returns a pair (u, v), v of an auxiliary head: it is regressed on the same
            velocity, its loss is added, and it is the network's own velocity. Without, that is
            u(z_t, t, t). For sampling return u alone.
    """

    own_tangent: bool = True
    head: bool = False

    @classmethod
    def published(cls, **changes: Any) -> "ImprovedMeanFlowLoss":
        """Return it with the paper's numbers: logit-normal times (-0.4, 1), sorted, half on s = t,
        L / sg(L + 0.01), summed.
        """
        settings = {"times": TimePairs(LogitNormalTimes(-0.4, 1.0)), "penalty": Adaptive()}
        return cls(**(settings | changes))

    def own_velocity(self, model: Model, z_t: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        """Return the auxiliary head's velocity, or the model's own on the diagonal."""
        if not isinstance(model, _Trunk):
            return super().own_velocity(model, z_t, t, cond)
        velocity = unseen(lambda: evaluated(model, z_t, t, t, cond), z_t)
        return at_least_float32(model.heads.pop() if self.head else velocity)

    def to_velocity(self, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Return the velocity that an output of the model stands for: itself."""
        return output

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
        """Return the network's own velocity, under its condition, for the tangent, and the one to
        regress on.
        """
        tangent, v = super().velocities(model, z_t, v, t, s, cond, dropped)
        if self.own_tangent:
            seen = self.guidance.seen(t, cond) if self.guidance else cond
            tangent = self.own_velocity(model, z_t, t, seen)
        return tangent, v

    def __call__(
        self, model: Model, latents: Tensor, targets: Tensor | None = None, **options: Any
    ) -> LossOutput:
        """Return the loss of each row, that of the auxiliary head included; see
        `Objective.__call__`.
        """
        if self.head and backend_of(latents) is not torch_backend:
            raise InputError(
                "head=True came with JAX arrays, where a second output cannot be kept; write "
                "head=False"
            )
        check_model(model)
        trunk = _Trunk(model, self)
        out = super().__call__(trunk, latents, targets, **options)
        if not self.head:
            return out
        return out._replace(
            loss=out.loss + self.penalty(at_least_float32(trunk.heads[0]) - out.velocity)
        )  # type: ignore[misc]


class _Trunk:
    """The model as a function that returns the average velocity; what the auxiliary head returned
    is kept in ``heads``.
    """

    def __init__(self, model: Model, objective: ImprovedMeanFlowLoss) -> None:
        self.model, self.objective = model, objective
        self.heads: list[Tensor] = []

    @property
    def __signature__(self) -> inspect.Signature:
        return signature_of(self.model)

    def __call__(self, z_t: Tensor, t: Tensor, s: Tensor, **cond: Any) -> Tensor:
        output: Any = on_copies(lambda *inputs: self.model(*inputs, **cond))(z_t, t, s)
        if self.objective.head:
            output, head = _pair(output)
            self.heads.append(self.objective.to_velocity(checked(head, (z_t,)), z_t, t))
        return self.objective.to_velocity(checked(output, (z_t,)), z_t, t)


def _pair(output: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(output, tuple | list) and len(output) == 2):
        raise InputError(
            f"head=True came, but the model returned {type(output).__name__}; return (u, v), or "
            "write head=False"
        )
    return output[0], output[1]
