"""Every numeric setting of every public object, tried with numbers and texts that have no business
there: each is accepted with a meaning, or refused by one error of flowspace that says what came.

Settings are found in the dataclasses themselves, so a new one is tried without being listed.
"""

import dataclasses
import math

import pytest
import torch

import flowspace
from flowspace import (
    AlphaFlowLoss,
    ConsistencyLoss,
    CrossFlowLoss,
    FlowspaceError,
    MeanFlowDistillationLoss,
    TrajectoryMatchingLoss,
)

ODD = {
    "negative": -4.0,
    "a little negative": -1e-3,
    "zero": 0,
    "huge": 1e30,
    "a huge count": 10**30,
    "not a number": math.nan,
    "infinite": math.inf,
    "minus infinity": -math.inf,
    "text": "a half",
    "a list": [0.5],
    "a complex number": 1j,
}

# What an object needs to be made at all.
NEEDED = {
    "MeanFlowDistillationLoss": {"teacher": lambda z, t: -z},
    "TrajectoryMatchingLoss": {"teacher": lambda z, t: -z},
    "ShiftedTimes": {"dim": 4096},
    "Guidance": {"null": {"labels": 10}},
    "RandomGuidance": {"null": {"labels": 10}},
    "FlowMap": None,
    "VelocityFlow": None,
    "CascadeFlow": None,
    "CascadeLoss": None,
    "CascadeStage": {"index": 1, "count": 3},
}


def numeric_settings():
    """Every field of a public dataclass that holds a number, or None in place of one."""
    for name in flowspace.__all__:
        kind = getattr(flowspace, name)
        is_plain = dataclasses.is_dataclass(kind) and not getattr(kind, "__abstractmethods__", ())
        if not is_plain or NEEDED.get(name, {}) is None or name == "CriteriaReport":
            continue
        made = kind(**NEEDED.get(name, {}))
        for field in dataclasses.fields(kind):
            value = getattr(made, field.name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if field.init and (is_number or field.name in ("gap", "pairs", "trajectories")):
                yield kind, field.name


SETTINGS = list(numeric_settings())


def made(kind, **settings):
    return kind(**(NEEDED.get(kind.__name__, {}) | settings))


@pytest.mark.parametrize(
    ("kind", "setting"), SETTINGS, ids=[f"{kind.__name__}.{name}" for kind, name in SETTINGS]
)
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_an_odd_setting_is_meant_or_refused_by_name(kind, setting, odd):
    for extra in [{}, {"check": False}] if issubclass(kind, flowspace.Objective) else [{}]:
        try:
            kept = made(kind, **{setting: odd}, **extra)
        except FlowspaceError as error:
            assert "got" in str(error) and setting in str(error)
        else:
            assert isinstance(odd, int | float) and not math.isnan(odd), (kind, setting, odd)
            assert (getattr(kept, setting) == odd and abs(odd) < 1e30) or odd == math.inf


@pytest.mark.parametrize("odd", [*ODD.values(), 65], ids=[*ODD, "beyond the formulas"])
def test_an_odd_number_of_a_schedule_is_refused(odd):
    if odd != 65:
        with pytest.raises(FlowspaceError, match="got"):
            flowspace.VariancePreservingSchedule(beta_max=odd)
        with pytest.raises(FlowspaceError, match="got"):
            flowspace.alpha_at(0.5, steepness=odd)
    with pytest.raises(FlowspaceError):
        flowspace.PolynomialSchedule(odd)


def test_settings_are_found():
    names = {(kind.__name__, name) for kind, name in SETTINGS}
    assert {
        ("AlphaFlowLoss", "bound"),
        ("ConsistencyLoss", "boundary"),
        ("FiniteDifference", "step"),
        ("HuberError", "threshold"),
        ("TimePairs", "equal"),
        ("TrajectoryMatchingLoss", "steps"),
        ("UniformTimes", "low"),
    } <= names
    assert len(names) >= 40


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_steps_of_a_sampler_are_refused(odd):
    flow_map = CrossFlowLoss().flow_map(lambda z, t, s: z)
    with pytest.raises(FlowspaceError, match="got steps"):
        flow_map.sample(torch.randn(2, 3), steps=odd)


@pytest.mark.parametrize("odd", ["a half", 1j, [0.5], None])
@pytest.mark.parametrize("name", ["gamma", "delta"])
def test_an_odd_statistic_is_refused(name, odd):
    with pytest.raises(FlowspaceError):
        flowspace.Statistic(**({"gamma": "1", "delta": "-t/(t - s)"} | {name: odd}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: AlphaFlowLoss(bound=-4.0, check=False),
        lambda: ConsistencyLoss(boundary=-1, check=False),
        lambda: MeanFlowDistillationLoss(teacher=None, mix=7, check=False),
        lambda: TrajectoryMatchingLoss(teacher=torch.sin, steps=-3, check=False),
        lambda: TrajectoryMatchingLoss(teacher=torch.sin, pairs=0, check=False),
    ],
)
def test_what_check_lets_through_is_a_statistic_alone(make):
    with pytest.raises(FlowspaceError, match="got"):
        make()
