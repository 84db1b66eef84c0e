"""Sampling: for the exact f every grid leads to the same place."""

import pickle
from functools import partial

import pytest
import torch
from gaussian import Gaussian, column
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import PRESETS, normal, pairs, schedules, seeds
from tolerances import DERIVED, within

from flowspace import (
    TIME_FLOOR,
    ConsistencyStatistic,
    FlowMap,
    InputError,
    LinearSchedule,
    MatchedStatistic,
    MeanFlowStatistic,
    Statistic,
    TimeError,
)

LINEAR = PRESETS["linear"]


def exact(name, schedule, seed):
    """An exact f with its statistic."""
    data = Gaussian.random(schedule, seed)
    statistic, model = {
        "matched": lambda: (MatchedStatistic(), data.matched()),
        "MeanFlow": lambda: (MeanFlowStatistic(), data.average_velocity()),
        "consistency": lambda: (ConsistencyStatistic(), data.transported),
        "displacement": lambda: (Statistic(0, 1), data.integral),
    }[name]()
    return data, FlowMap(model, schedule, statistic)


names = st.sampled_from(["matched", "MeanFlow", "consistency", "displacement"])
grids = st.lists(st.floats(0.05, 0.95), max_size=5, unique_by=lambda time: round(time, 2)).map(
    lambda inner: [1.0, *sorted(inner, reverse=True), 0.0]
)


close = within(DERIVED)


@settings(max_examples=40)
@given(names, schedules, seeds, st.integers(1, 6), grids)
def test_any_number_of_steps_is_one_step_for_the_exact_statistic(
    name, schedule, seed, steps, grid
):
    data, flow_map = exact(name, schedule, seed)
    noise = normal(seed, 5, 3)
    one = torch.ones(5, dtype=torch.float64)
    wanted = data.transported(noise, one, 0 * one)
    tolerance = 1e-8 if schedule.functions[0].expression is not None else 1e-5
    for options in ({}, {"steps": steps}, {"times": grid}, {"times": torch.tensor(grid)}):
        close(flow_map.sample(noise, **options), wanted, 1e-5 if "times" in options else tolerance)


@settings(max_examples=40)
@given(names, schedules, seeds, pairs(rows=5, gap=0.05))
def test_a_step_is_the_flow_map_and_its_inverse_times_compose(name, schedule, seed, times):
    (t, s), (data, flow_map) = times, exact(name, schedule, seed)
    z_t = data.sample_state(t, seed)
    z_s = flow_map.step(z_t, t, s)
    close(z_s, data.transported(z_t, t, s), 1e-5)
    middle = (t + s) / 2
    close(flow_map.step(flow_map.step(z_t, t, middle), middle, s), z_s, 1e-5)


@settings(max_examples=20)
@given(names, schedules, seeds)
def test_a_step_of_no_length_stays(name, schedule, seed):
    data, flow_map = exact(name, schedule, seed)
    t = torch.linspace(0.1, 0.95, 5, dtype=torch.float64)
    z_t = data.sample_state(t, seed)
    close(flow_map.step(z_t, t, t), z_t, 1e-5)


def test_samples_have_the_distribution_of_the_data():
    data, flow_map = exact("matched", LINEAR, 3)
    samples = flow_map.sample(normal(0, 40_000, 3), steps=2)
    covariance = (data.rotation * data.spread**2) @ data.rotation.T
    torch.testing.assert_close(samples.mean(0), data.mean, rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(samples.T), covariance, rtol=0, atol=0.05)


@settings(max_examples=20)
@given(schedules, seeds, grids)
def test_across_spaces_the_step_is_exact_for_an_affine_encoder(schedule, seed, grid):
    data = Gaussian.random(schedule, seed)
    matrix, offset, within = normal(seed + 3, 5, 3), normal(seed + 4, 5), data.matched()

    def encode(x):
        return torch.linalg.lstsq(matrix, (x - offset).T).solution.T

    flow_map = FlowMap(
        lambda *state: within(*state) @ matrix.T + offset, schedule, MatchedStatistic()
    )
    noise, one = normal(seed, 5, 3), torch.ones(5, dtype=torch.float64)
    wanted = data.transported(noise, one, 0 * one) @ matrix.T + offset
    close(flow_map.sample(noise), wanted, 1e-5)
    close(flow_map.sample(noise, times=grid, encode=encode, renoise=False), wanted, 1e-4)


def test_renoising_keeps_the_distribution_of_the_data():
    data = Gaussian.random(LINEAR, 3)
    matrix, offset, within = normal(3, 5, 3), normal(4, 5), data.matched()
    inverse = torch.linalg.pinv(matrix)
    flow_map = FlowMap(
        lambda *state: within(*state) @ matrix.T + offset, LINEAR, MatchedStatistic()
    )
    images = flow_map.sample(
        normal(0, 40_000, 3),
        times=[1.0, 0.6, 0.3, 0.0],
        encode=lambda x: (x - offset) @ inverse.T,
        generator=torch.Generator().manual_seed(1),
    )
    assert images.shape == (40_000, 5)
    samples = (images - offset) @ inverse.T
    covariance = (data.rotation * data.spread**2) @ data.rotation.T
    torch.testing.assert_close(samples.mean(0), data.mean, rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(samples.T), covariance, rtol=0, atol=0.05)


def watched(seen, out=5):
    def model(z, t, s, **cond):
        seen.append((float(t[0]), float(s[0]), t.shape, t.dtype, cond))
        return torch.zeros(len(z), out, dtype=z.dtype)

    return model


def test_renoising_asks_for_samples_and_stepping_for_the_next_time():
    for renoise, wanted in ((True, [0.0, 0.0]), (False, [0.5, 0.0])):
        seen = []
        flow_map = FlowMap(watched(seen), LINEAR, MatchedStatistic())
        flow_map.sample(normal(0, 2, 3), steps=2, encode=lambda x: x[:, :3], renoise=renoise)
        assert [call[0] for call in seen] == [1.0, 0.5] and [call[1] for call in seen] == wanted


def test_the_model_gets_times_of_one_per_row_and_its_conditions():
    for dtype in (torch.float32, torch.float64):
        seen, labels = [], torch.tensor([1, 2])
        flow_map = FlowMap(watched(seen, 3), LINEAR, MatchedStatistic())
        out = flow_map.sample(normal(0, 2, 3).to(dtype), cond={"labels": labels}, steps=3)
        assert out.dtype == dtype and len(seen) == 3
        assert all(call[2:4] == ((2,), dtype) and call[4]["labels"] is labels for call in seen)
        flow_map.step(
            normal(0, 2, 3).to(dtype),
            *torch.tensor([[0.5, 0.5], [0.1, 0.1]]).to(dtype),
            cond={"labels": labels},
        )
        assert seen[-1][4]["labels"] is labels


def test_sampling_needs_no_gradient_and_no_global_randomness():
    layer = torch.nn.Linear(3, 3)
    flow_map = FlowMap(lambda z, t, s: layer(z) * column(t), LINEAR, MatchedStatistic())
    before = torch.get_rng_state()
    generator = partial(torch.Generator().manual_seed, 1)
    noise = torch.randn(2, 3, generator=generator())
    first, second = (
        flow_map.sample(noise, steps=3, encode=torch.sin, generator=generator()) for _ in range(2)
    )
    assert (
        not first.requires_grad
        and torch.equal(first, second)
        and torch.equal(torch.get_rng_state(), before)
    )


def test_bfloat16_noise_gives_bfloat16_samples_and_float32_times():
    seen = []
    flow_map = FlowMap(watched(seen, 3), LINEAR, MatchedStatistic())
    out = flow_map.sample(torch.ones(2, 3, dtype=torch.bfloat16), steps=2)
    assert out.isfinite().all() and all(call[3] == torch.float32 for call in seen)


@pytest.mark.parametrize(
    "times",
    [
        [1.0],
        [1.0, 0.5],
        [0.9, 0.0],
        [0.0, 1.0],
        [1.0, 0.5, 0.5, 0.0],
        [1.0, 0.4, 0.6, 0.0],
        [[1.0, 0.0]],
    ],
)
def test_a_grid_that_does_not_fall_from_one_to_zero_is_refused(times):
    with pytest.raises(TimeError, match="falls strictly from 1 to 0"):
        FlowMap(watched([]), LINEAR, MatchedStatistic()).sample(normal(0, 2, 3), times=times)


@pytest.mark.parametrize("steps", [0, -1, 2.5])
def test_what_is_no_number_of_steps_is_refused(steps):
    with pytest.raises(TimeError, match=f"steps = {steps}"):
        FlowMap(watched([]), LINEAR, MatchedStatistic()).sample(normal(0, 2, 3), steps=steps)


def test_several_steps_across_spaces_need_an_encoder():
    flow_map = FlowMap(watched([], 5), LINEAR, MatchedStatistic())
    assert flow_map.sample(normal(0, 2, 3)).shape == (2, 5)
    with pytest.raises(InputError, match=r"\(2, 5\).*\(2, 3\).*encode="):
        flow_map.sample(normal(0, 2, 3), steps=2)
    with pytest.raises(InputError, match=r"\(2, 5\).*\(2, 3\).*encode="):
        flow_map.sample(normal(0, 2, 3), steps=2, renoise=True)
    with pytest.raises(InputError, match=r"\(2, 5\).*\(2, 3\).*encode="):
        flow_map.step(normal(0, 2, 3), torch.full((2,), 0.5), torch.full((2,), 0.2))


@pytest.mark.parametrize("model", [3, torch.ones(2), torch.nn.Identity])
def test_a_flow_map_is_of_a_model_that_can_be_called(model):
    with pytest.raises(InputError, match="got model = "):
        FlowMap(model, LINEAR, MatchedStatistic())


def test_a_misspelt_keyword_is_a_type_error():
    with pytest.raises(TypeError):
        FlowMap(watched([]), LINEAR, MatchedStatistic()).sample(normal(0, 2, 3), step=2)


def test_a_flow_map_survives_pickling():
    flow_map = FlowMap(torch.nn.Identity(), LinearSchedule(), MatchedStatistic())
    again = pickle.loads(pickle.dumps(flow_map))
    assert again.schedule == flow_map.schedule and again.statistic == flow_map.statistic


@pytest.mark.parametrize("renoise", [True, False])
@pytest.mark.parametrize("steps", [1, 4])
def test_across_spaces_any_statistic_whose_step_forgets_the_state_ends_in_the_sample(
    renoise, steps
):
    schedule = LinearSchedule()
    statistic = Statistic.from_kappa(schedule, "s", "-t**2/(t-s)")
    c, point = statistic.coefficients(schedule), torch.tensor([3.0, -2.0], dtype=torch.float64)

    def exact(
        z, t, s
    ):  # data that is one point: z_s = (1 - s) point + s noise, and f solves the step for it
        noise = (z - (1 - t)[:, None] * point) / t[:, None]
        z_s = (1 - s)[:, None] * point + s[:, None] * noise
        return (c.velocity(t, s)[:, None] * z - z_s) / c.derivative(t, s)[:, None]

    noise = torch.randn(5, 2, dtype=torch.float64)
    samples = FlowMap(exact, schedule, statistic).sample(
        noise, steps=steps, encode=lambda x: x, renoise=renoise
    )
    torch.testing.assert_close(samples, point.expand(5, 2))


@pytest.mark.parametrize("statistic", [MeanFlowStatistic(), Statistic(-3, 1)])
def test_a_step_that_keeps_some_of_the_state_cannot_end_in_another_space(statistic):
    with pytest.raises(InputError, match="cannot end in another space"):
        FlowMap(lambda z, t, s: z, LinearSchedule(), statistic).sample(
            torch.randn(3, 2), encode=lambda x: x
        )


def test_a_step_takes_times_as_numbers_and_checks_them():
    flow_map, z = FlowMap(watched([], 3), LINEAR, MatchedStatistic()), normal(0, 2, 3)
    ones = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(
        flow_map.step(z, 0.9, 0.2), flow_map.step(z, 0.9 * ones, 0.2 * ones)
    )
    with pytest.raises(TimeError, match="s is out of range"):
        flow_map.step(z, 0.2, 0.9)


def test_a_model_that_returns_a_tuple_is_refused():
    with pytest.raises(InputError, match="got tuple from the model"):
        FlowMap(lambda z, t, s: (z, z), LINEAR, MatchedStatistic()).sample(normal(0, 2, 3))


def test_below_the_floor_of_times_a_velocity_is_that_of_the_floor():
    data, flow_map = exact("matched", LINEAR, 0)
    z = normal(0, 3, 3)
    floor = torch.full((3,), TIME_FLOOR, dtype=torch.float64)
    at_floor = flow_map.velocity(z, floor)
    for time in (0.0, TIME_FLOOR / 2):
        assert torch.equal(flow_map.velocity(z, torch.full_like(floor, time)), at_floor)
    above = 2 * floor
    close(flow_map.velocity(z, above), data.velocity(z, above), 1e-5)
    assert not torch.equal(flow_map.velocity(z, above), at_floor)


def test_a_velocity_needs_one_space():
    flow_map = FlowMap(watched([], 5), LINEAR, MatchedStatistic())
    with pytest.raises(InputError, match="a velocity needs one space"):
        flow_map.velocity(normal(0, 2, 3), torch.full((2,), 0.5))
