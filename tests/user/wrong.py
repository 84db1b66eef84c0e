"""What users write by mistake. A type checker refuses each line that says so.

A line that it would accept is an error too: its comment is then unnecessary.
"""

import torch
from torch import Tensor

from flowspace import (
    CosineSchedule,
    CrossFlowLoss,
    FiniteDifference,
    FlowMap,
    FlowMatchingLoss,
    LinearSchedule,
    MatchedStatistic,
    MeanFlowDistillationLoss,
    Objective,
    PathPoint,
    SharedPrimal,
    SquaredError,
    Statistic,
    TimePairs,
    UniformTimes,
    VelocityFlow,
)


def model(z_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Be a model."""
    return z_t


latents = torch.randn(4, 2)
loss_fn = CrossFlowLoss()

# an argument that there is not, or that is mistyped
CrossFlowLoss(shedule=LinearSchedule())  # pyright: ignore[reportCallIssue]
FiniteDifference(steps=1e-2)  # pyright: ignore[reportCallIssue]
loss_fn(model, latents, labels=latents)  # pyright: ignore[reportCallIssue]

# settings by position: which is which is not seen
CrossFlowLoss(LinearSchedule())  # pyright: ignore[reportCallIssue]

# a class, or a text, in place of an object
CrossFlowLoss(schedule=CosineSchedule)  # pyright: ignore[reportArgumentType]
CrossFlowLoss(schedule="cosine")  # pyright: ignore[reportArgumentType]
CrossFlowLoss(derivative="shared")  # pyright: ignore[reportArgumentType]
CrossFlowLoss(statistic=SquaredError())  # pyright: ignore[reportArgumentType]
CrossFlowLoss(literal="yes")  # pyright: ignore[reportArgumentType]

# times of one kind where pairs are meant, and the other way round
TimePairs(equal="half")  # pyright: ignore[reportArgumentType]
TimePairs(TimePairs())  # pyright: ignore[reportArgumentType]

# what has to be given
MeanFlowDistillationLoss.published()  # pyright: ignore[reportCallIssue]
Statistic("1")  # pyright: ignore[reportCallIssue]
FlowMap(model)  # pyright: ignore[reportCallIssue]

# a batch that is no tensor, times without a name, and cond that is no dict
loss_fn(model, [[0.0, 1.0]])  # pyright: ignore[reportArgumentType]
loss_fn(model, latents, latents, torch.rand(4))  # pyright: ignore[reportCallIssue]
loss_fn(model, latents, cond=[latents])  # pyright: ignore[reportArgumentType]

# what comes out
loss_fn(model, latents).backward()  # pyright: ignore[reportAttributeAccessIssue]
print(loss_fn(model, latents).losses)  # pyright: ignore[reportAttributeAccessIssue]
loss_fn.schedule = LinearSchedule()  # pyright: ignore[reportAttributeAccessIssue]
loss_fn.flow_map(model).sample(latents, step=4)  # pyright: ignore[reportCallIssue]
print(VelocityFlow(model).sample(latents).loss)  # pyright: ignore[reportAttributeAccessIssue]

# a route, called with a model and a batch as if it were an objective
SharedPrimal()(model, latents)  # pyright: ignore[reportCallIssue]

# samplers of times and penalties where a schedule's functions are meant
LinearSchedule("1 - t", "t")  # pyright: ignore[reportCallIssue]
CrossFlowLoss(times=UniformTimes())  # pyright: ignore[reportArgumentType]
FlowMatchingLoss(statistic=MatchedStatistic)  # pyright: ignore[reportArgumentType]


class Unfinished(Objective):
    """An objective without a known part."""


Unfinished()  # pyright: ignore[reportAbstractUsage]


class Mistaken(Objective):
    """An objective whose known part takes something else."""

    def known_part(self, at: PathPoint, t: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return it."""
        return at.data
