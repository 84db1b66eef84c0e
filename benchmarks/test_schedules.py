"""Schedules and coefficients on a batch of 256: ``pytest benchmarks --benchmark-enable``."""

import pytest
import torch

from flowspace import (
    CosineSchedule,
    LinearSchedule,
    MatchedStatistic,
    PolynomialSchedule,
    VariancePreservingSchedule,
)

SCHEDULES = [
    LinearSchedule(),
    CosineSchedule(),
    PolynomialSchedule(2),
    VariancePreservingSchedule(),
]
CALLS = ["alpha", "beta", "alpha_dot", "beta_dot", "signal_to_noise", "signal_to_noise_dot"]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("call", CALLS)
def test_schedule(benchmark, schedule, call):
    benchmark(getattr(schedule, call), torch.rand(256))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("coefficient", ["prediction", "derivative", "data", "scale"])
def test_coefficient(benchmark, schedule, coefficient):
    t, s = torch.rand(2, 256).sort(0, descending=True).values
    benchmark(getattr(MatchedStatistic().coefficients(schedule), coefficient), t, s)
