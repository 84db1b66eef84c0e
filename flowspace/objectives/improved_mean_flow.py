"""Improved MeanFlow (Geng et al., arXiv 2512.02012).

It is a regression on the velocity, along the network's own velocity.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowspace.arrays import Model, at_least_float32
from flowspace.backends import torch_backend
from flowspace.derivatives.reached import OnCopies
from flowspace.derivatives.replay import without_trace
from flowspace.derivatives.route import checked
from flowspace.errors import InputError
from flowspace.inputs import check_flag, signature_of
from flowspace.objectives.engine import LossOutput, PathPoint
from flowspace.objectives.inputs import Batch, check_output, evaluated, with_fields
from flowspace.objectives.mean_flow import MeanFlowLoss
from flowspace.penalties import Adaptive
from flowspace.times import LogitNormalTimes, TimePairs

__all__ = ["ImprovedMeanFlowLoss"]


@dataclass(frozen=True, kw_only=True)
class ImprovedMeanFlowLoss(MeanFlowLoss):
    """V = u + (t - s) sg(D_t u) is regressed on v: MeanFlow's target form, along u's own velocity.

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
        """Return it with the paper's numbers.

        Logit-normal times (-0.4, 1), sorted, half on s = t, L / sg(L + 0.01), summed.
        """
        settings = {
            "times": TimePairs(LogitNormalTimes(-0.4, 1.0)),
            "penalty": Adaptive(),
        }
        return cls(**(settings | changes))

    def own_velocity(self, model: Model, at: PathPoint) -> Tensor:
        """Return the auxiliary head's velocity, or the model's own on the diagonal."""
        if not isinstance(model, Trunk):
            return super().own_velocity(model, at)

        def on_diagonal() -> Tensor:
            return evaluated(model, at.state, at.t, at.t, at.cond)

        velocity = without_trace(on_diagonal, at.state)
        if self.head:
            velocity = model.heads.pop()
        check_output(velocity, at.state)
        return at_least_float32(velocity)

    def to_velocity(self, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Return the velocity that an output of the model stands for: itself."""
        return output

    def tangent_velocity(self, model: Model, at: PathPoint) -> Tensor:
        """Return the network's own velocity, under its own condition."""
        if not self.own_tangent:
            return at.velocity
        if self.guidance is not None:
            at = with_fields(at, cond=self.guidance.own_condition(at.t, at.cond))
        return self.own_velocity(model, at)

    def check_settings(self) -> None:
        """Refuse switches that are not True or False."""
        check_flag("head", self.head)
        check_flag("own_tangent", self.own_tangent)

    def check_call(self, batch: Batch) -> None:
        """Refuse an auxiliary head with JAX arrays, where a second output cannot be kept."""
        super().check_call(batch)
        if self.head and batch.library is not torch_backend:
            raise InputError(
                "got head=True with JAX arrays, "
                "where a second output cannot be kept; write head=False"
            )

    def wrapped(self, model: Model) -> Model:
        """Return the model as a function that returns the average velocity."""
        return Trunk(model, self)

    def completed(self, out: LossOutput, model: Model, batch: Batch) -> LossOutput:
        """Return the output with the loss of the auxiliary head added."""
        if not self.head or not isinstance(model, Trunk):
            return out
        error = at_least_float32(model.heads[0]) - out.velocity
        loss = out.loss + self._penalised(error)
        return with_fields(out, loss=loss)


class Trunk:
    """A model as a function that returns the average velocity.

    What the auxiliary head returned is kept in ``heads``, one entry for each evaluation.
    """

    def __init__(self, model: Model, objective: ImprovedMeanFlowLoss) -> None:
        self.model = model
        self.objective = objective
        self.heads: list[Tensor] = []

    @property
    def __signature__(self) -> inspect.Signature:
        return signature_of(self.model)

    def __call__(self, z_t: Tensor, t: Tensor, s: Tensor, **cond: Any) -> Tensor:
        to_velocity = self.objective.to_velocity

        def call(*inputs: Tensor) -> Any:
            return self.model(*inputs, **cond)

        output: Any = OnCopies(call)(z_t, t, s)
        if self.objective.head:
            output, head = _two_outputs(output)
            head = checked(head, (z_t,))
            self.heads.append(to_velocity(head, z_t, t))
        output = checked(output, (z_t,))
        return to_velocity(output, z_t, t)


def _two_outputs(output: Any) -> tuple[Tensor, Tensor]:
    is_pair = isinstance(output, tuple | list) and len(output) == 2
    if not is_pair:
        raise InputError(
            f"got {type(output).__name__} from the model with head=True; "
            "return (u, v), or write head=False"
        )
    return output[0], output[1]
