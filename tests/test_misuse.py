"""Plausible mistakes: each is one clear error of its own, before anything is lost."""

import copy
import pickle

import pytest
import sympy
import torch
from torch import nn

from flowspace import (
    Adaptive,
    CascadeLoss,
    ConsistencyLoss,
    CriterionError,
    CrossFlowLoss,
    FlowMap,
    InputError,
    LinearSchedule,
    LogitNormalTimes,
    MatchedStatistic,
    MeanFlowStatistic,
    PixelMeanFlowLoss,
    SquaredError,
    Statistic,
    TimeError,
    TimePairs,
    UniformTimes,
    check_criteria,
)
from flowspace.time_functions import TimeFunction

Z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def model(z, t, s):
    return z * t[:, None]


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "linear"},
        {"statistic": "matched"},
        {"times": UniformTimes()},
        {"penalty": "l1"},
        {"derivative": "auto"},
        {"weight": 2.0},
        {"velocity": torch.ones(3)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_argument_of_the_wrong_kind_is_named_with_what_to_write(options):
    with pytest.raises(
        InputError, match=f"got {next(iter(options))} = .*; .*write|it is a function"
    ):
        CrossFlowLoss(**options)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: TimePairs(0.5), TimeError),
        (lambda: TimePairs(UniformTimes), TimeError),
        (lambda: LogitNormalTimes(mean=float("nan")), TimeError),
        (lambda: Adaptive(1.0), InputError),
        (lambda: Adaptive(SquaredError), InputError),
        (lambda: FlowMap(model, LinearSchedule, MatchedStatistic()), InputError),
        (lambda: FlowMap(model, LinearSchedule(), None), InputError),
        (lambda: check_criteria(MatchedStatistic(), LinearSchedule()), InputError),
        (lambda: ConsistencyLoss(literal=True), CriterionError),
    ],
)
def test_parts_refuse_what_they_cannot_use(make, error):
    with pytest.raises(error):
        make()


@pytest.mark.parametrize(
    ("broken", "came"),
    [
        (lambda z, t, s: (z, z), "tuple"),
        (lambda z, t, s: z.sum(), r"shape \(\)"),
        (lambda z, t, s: z[:2], r"shape \(2, 3\)"),
    ],
)
def test_a_model_must_return_one_tensor_of_rows(broken, came):
    with pytest.raises(InputError, match=f"got {came}"):
        CrossFlowLoss()(broken, Z)


def test_cond_is_a_dict():
    with pytest.raises(InputError, match="write a dict"):
        CrossFlowLoss()(model, Z, cond=torch.ones(6))


def test_a_velocity_of_another_shape_is_refused():
    with pytest.raises(InputError, match="from velocity for states"):
        CrossFlowLoss(velocity=lambda z, t: z[:, :1])(model, Z)


def test_times_that_are_text_are_refused():
    with pytest.raises(TimeError, match=r"got t = '0\.5'"):
        CrossFlowLoss()(model, Z, t="0.5", s=torch.tensor(0.1))


def test_a_weight_may_be_a_number_at_every_time():
    plain, doubled = (
        CrossFlowLoss(weight=weight)(model, Z, generator=torch.Generator().manual_seed(1))
        for weight in (None, lambda t, s: 2.0)
    )
    torch.testing.assert_close(4 * plain.loss, doubled.loss)


@pytest.mark.parametrize("delta", ["sqrt(s - t)", "log(t - s - 5)", lambda t, s: t * torch.nan])
def test_a_delta_that_is_not_real_or_finite_is_refused(delta):
    with pytest.raises(CriterionError, match="not a finite real number"):
        Statistic("1", delta)


def test_the_matched_statistic_says_where_its_gamma_is():
    with pytest.raises(CriterionError, match=r"on\(schedule\).gamma"):
        _ = MatchedStatistic().gamma
    assert MatchedStatistic().on(LinearSchedule()).gamma.expression == sympy.Integer(1)
    assert (
        copy.deepcopy(MatchedStatistic())
        == pickle.loads(pickle.dumps(MatchedStatistic()))
        == MatchedStatistic()
    )
    assert MeanFlowStatistic() != MatchedStatistic()


def test_several_steps_keep_half_precision():
    network = nn.Linear(2, 2).bfloat16()

    def half(z, t, s):
        return network(z)

    noise = torch.randn(4, 2).bfloat16()
    for encode in (None, lambda x: x.float()):
        flow_map = FlowMap(half, LinearSchedule(), MatchedStatistic())
        assert flow_map.sample(noise, steps=3, encode=encode).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: PixelMeanFlowLoss()(lambda z, t, s: z[:, :1], Z), "states and predictions"),
        (lambda: PixelMeanFlowLoss()(lambda z, t, s: z.sum(-1), Z), "states and predictions"),
        (
            lambda: PixelMeanFlowLoss().flow_map(lambda z, t, s: torch.ones(2)).sample(Z),
            "got shape .* from the model",
        ),
        (lambda: CascadeLoss(cascade=0, objective=CrossFlowLoss()), "got cascade = 0"),
        (lambda: TimeFunction("1e300", 1)(torch.tensor([0.5])), "cannot hold"),
    ],
    ids=["broadcast", "summed", "sampled", "cascade", "overflow"],
)
def test_what_a_search_over_inputs_found_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()
