"""What users write. A type checker accepts it, and knows the type of what comes out.

`tests/test_user_types.py` runs pyright on this folder.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import flowspace
from flowspace import (
    AbstractStatistic,
    Adaptive,
    ConsistencyLoss,
    CriteriaReport,
    CrossFlowLoss,
    Derivative,
    FiniteDifference,
    FlowMap,
    FlowMatchingLoss,
    Guidance,
    HuberError,
    LinearSchedule,
    LogitNormalTimes,
    LossOutput,
    MatchedStatistic,
    MeanFlowDistillationLoss,
    MeanFlowLoss,
    Objective,
    PathPoint,
    Penalty,
    Schedule,
    SharedPrimal,
    SquaredError,
    Statistic,
    TimePairs,
    VelocityFlow,
    check_criteria,
)


class Network(nn.Module):
    """A model as users write it: times, destinations and labels."""

    def forward(self, z_t: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        """Map latents to images."""
        return z_t + (t - s + labels)[:, None]


def function(z_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Be a model without parameters."""
    return z_t * (t - s)[:, None]


def train(latents: Tensor, images: Tensor, labels: Tensor) -> None:
    """Make a step of training."""
    loss_fn = CrossFlowLoss()
    assert_type(loss_fn, CrossFlowLoss)
    out = loss_fn(Network(), latents, images, cond={"labels": labels})
    assert_type(out, LossOutput)
    assert_type(out.loss, Tensor)
    assert_type(out.prediction, Tensor)
    out.loss.mean().backward()
    loss_fn(function, latents)
    loss_fn(function, latents, noise=torch.randn_like(latents), generator=torch.Generator())
    loss_fn(lambda z_t, t, s: z_t, latents, t=torch.rand(4), s=torch.zeros(4))


def compiled(latents: Tensor) -> None:
    """Compile a model; whatever torch.compile returns is a model."""
    CrossFlowLoss()(torch.compile(Network()), latents)


def settings() -> list[Objective]:
    """Return objectives with settings of every kind."""
    schedule = Schedule(alpha="cos(pi*t/2)", beta="sin(pi*t/2)")
    by_functions = Schedule(lambda t: 1 - t, lambda t: t)
    assert_type(schedule.alpha(torch.rand(3)), Tensor)
    z_t, velocity = schedule.perturb(torch.randn(3, 2), torch.randn(3, 2), torch.rand(3))
    assert_type(z_t, Tensor)
    assert_type(velocity, Tensor)
    statistic = Statistic.from_kappa(schedule, kappa="s", delta="-t/(t-s)")
    assert_type(statistic, Statistic)
    report = check_criteria(schedule, statistic)
    assert_type(report, CriteriaReport)
    assert_type(report.criterion1, bool)
    return [
        CrossFlowLoss(schedule=schedule, statistic=MatchedStatistic(), literal=True),
        CrossFlowLoss(schedule=by_functions, weight=lambda t, s: 1 / t),
        CrossFlowLoss(times=TimePairs(LogitNormalTimes(-0.4, 1.0), equal=0.75)),
        CrossFlowLoss(penalty=Adaptive(SquaredError(summed=True))),
        CrossFlowLoss(derivative=FiniteDifference(step=1e-2, order=1)),
        FlowMatchingLoss(guidance=Guidance(null={"labels": 10}, omega=2.0)),
        MeanFlowLoss(schedule=LinearSchedule(), penalty=HuberError(0.1)),
        ConsistencyLoss(gap=0.1),
        MeanFlowDistillationLoss(teacher=lambda z_t, t: z_t),
        MeanFlowLoss.published(),
    ]


def published() -> None:
    """Know which class a published objective is of."""
    assert_type(CrossFlowLoss.published(16), CrossFlowLoss)
    assert_type(MeanFlowLoss.published(), MeanFlowLoss)


def sample(noise: Tensor) -> Tensor:
    """Sample in one step, in several, and by the ODE."""
    flow_map = CrossFlowLoss().flow_map(function)
    assert_type(flow_map, FlowMap)
    images = flow_map.sample(noise)
    assert_type(images, Tensor)
    flow_map.sample(noise, cond={"labels": noise}, steps=4, encode=lambda image: image)
    FlowMap(function, LinearSchedule(), MatchedStatistic()).sample(noise, steps=2)
    return VelocityFlow(lambda z_t, t: z_t).sample(noise, steps=8)


def derive(z_t: Tensor, t: Tensor) -> Tensor:
    """Call a route by itself."""
    route: Derivative = SharedPrimal()
    value, derivative = route(lambda z_t, t: z_t * t[:, None], (z_t, t), (z_t, torch.ones_like(t)))
    assert_type(value, Tensor)
    assert_type(derivative, Tensor)
    return derivative


class LogCosh(Penalty):
    """A penalty of one's own."""

    def __call__(self, difference: Tensor) -> Tensor:
        """Return one number for each row."""
        return difference.cosh().log().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class Denoising(Objective):
    """An objective of one's own: f is x, with s = t."""

    statistic: AbstractStatistic = field(default_factory=MatchedStatistic)
    scale: float = 1.0

    def known_part(self, at: PathPoint) -> Tensor:
        """Return c x."""
        return self.scale * at.data


class QuadraticSchedule(Schedule):
    """A schedule of one's own."""

    def __init__(self) -> None:
        super().__init__("1 - t**2", "t**2")


def own_parts(latents: Tensor) -> None:
    """Use them as the library's."""
    loss_fn = Denoising(schedule=QuadraticSchedule(), penalty=LogCosh(), scale=2.0)
    assert_type(loss_fn(function, latents), LossOutput)
    assert_type(loss_fn.schedule, Schedule)


def cite() -> str:
    """Cite."""
    text = flowspace.citation(CrossFlowLoss(penalty=LogCosh()))
    assert_type(text, str)
    return text


def caught(latents: Any) -> None:
    """Catch what flowspace raises."""
    try:
        CrossFlowLoss()(function, latents)
    except flowspace.DerivativeError as error:
        assert_type(str(error), str)
    except flowspace.FlowspaceError:
        raise
