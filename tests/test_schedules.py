"""A schedule is checked once, its derivatives are derivatives, and it perturbs as it says."""

import math
import pickle
import time

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    PRESETS,
    callable_schedules,
    formula_schedules,
    mixed,
    mixed_callable,
    normal,
    parameters,
    schedules,
    seeds,
)

from flowspace import (
    TIME_FLOOR,
    CosineSchedule,
    ExpressionError,
    InputError,
    LinearSchedule,
    PolynomialSchedule,
    Schedule,
    ScheduleError,
    TimeError,
    VariancePreservingSchedule,
)

GRID = torch.linspace(TIME_FLOOR, 1, 97, dtype=torch.float64)


@settings(max_examples=40)
@given(schedules)
def test_a_schedule_runs_from_data_to_noise_and_lambda_falls(schedule):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(ends), 1 - ends, rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule.beta(ends), ends, rtol=0, atol=1e-6)
    assert (schedule.signal_to_noise(GRID).diff() < 0).all()
    assert (schedule.signal_to_noise_dot(GRID[:-1]) < 0).all()


@settings(max_examples=40)
@given(schedules)
def test_every_derivative_is_that_of_autodiff_and_of_a_finite_difference(schedule):
    times, h = torch.linspace(0.05, 0.95, 31, dtype=torch.float64), 1e-5
    for function, derivative in (
        (schedule.alpha, schedule.alpha_dot),
        (schedule.beta, schedule.beta_dot),
        (schedule.signal_to_noise, schedule.signal_to_noise_dot),
    ):
        automatic = torch.func.jvp(function, (times,), (torch.ones_like(times),))[1]
        torch.testing.assert_close(derivative(times), automatic, rtol=1e-10, atol=1e-11)
        difference = (function(times + h) - function(times - h)) / (2 * h)
        torch.testing.assert_close(derivative(times), difference, rtol=1e-4, atol=1e-6)


@settings(max_examples=20)
@given(parameters)
def test_text_and_callable_are_the_same_schedule(choice):
    text, black_box = mixed(*choice), mixed_callable(*choice)
    for name in (
        "alpha",
        "beta",
        "alpha_dot",
        "beta_dot",
        "signal_to_noise",
        "signal_to_noise_dot",
    ):
        torch.testing.assert_close(
            getattr(text, name)(GRID), getattr(black_box, name)(GRID), rtol=1e-12, atol=1e-12
        )


@settings(max_examples=20)
@given(schedules, seeds)
def test_perturb_mixes_and_its_velocity_is_the_derivative_of_the_state(schedule, seed):
    latents, noise = normal(seed, 5, 2, 3), normal(seed + 1, 5, 2, 3)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    z_t, velocity = schedule.perturb(latents, noise, t)
    alpha, beta = (weight(t).reshape(5, 1, 1) for weight in (schedule.alpha, schedule.beta))
    torch.testing.assert_close(z_t, alpha * latents + beta * noise, rtol=1e-14, atol=1e-14)
    moved = torch.func.jvp(
        lambda u: schedule.perturb(latents, noise, u)[0], (t,), (torch.ones_like(t),)
    )[1]
    torch.testing.assert_close(velocity, moved, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", PRESETS.values(), ids=PRESETS)
def test_one_time_for_all_rows_is_that_time_in_every_row(schedule):
    latents, noise = normal(0, 4, 3), normal(1, 4, 3)
    one, each = torch.tensor(0.3, dtype=torch.float64), torch.full((4,), 0.3, dtype=torch.float64)
    for a, b in zip(
        schedule.perturb(latents, noise, one), schedule.perturb(latents, noise, each), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@settings(max_examples=20)
@given(
    schedules, st.sampled_from([torch.float32, torch.float64]), st.sampled_from([(), (1,), (7,)])
)
def test_shape_and_dtype_of_the_times_come_out(schedule, dtype, shape):
    t = torch.full(shape, 0.4, dtype=dtype)
    for name in (
        "alpha",
        "beta",
        "alpha_dot",
        "beta_dot",
        "signal_to_noise",
        "signal_to_noise_dot",
    ):
        value = getattr(schedule, name)(t)
        assert value.shape == t.shape and value.dtype == dtype


@settings(max_examples=20)
@given(schedules)
def test_float32_is_float64_rounded(schedule):
    for name in ("alpha", "beta", "alpha_dot", "beta_dot"):
        exact, rounded = getattr(schedule, name)(GRID), getattr(schedule, name)(GRID.float())
        torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_times_are_widened(dtype):
    assert LinearSchedule().alpha(torch.tensor([0.5], dtype=dtype)).dtype == torch.float32


def test_perturb_keeps_the_dtype_of_half_latents_and_the_precision_of_their_velocity():
    latents = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    z_t, velocity = LinearSchedule().perturb(latents, latents, torch.tensor([0.2, 0.7]))
    assert z_t.dtype == torch.bfloat16
    assert velocity.dtype == torch.float32


def test_the_presets_are_their_formulas():
    t = GRID
    torch.testing.assert_close(LinearSchedule().alpha(t), 1 - t)
    torch.testing.assert_close(LinearSchedule().beta(t), t)
    torch.testing.assert_close(CosineSchedule().alpha(t), torch.cos(math.pi * t / 2))
    torch.testing.assert_close(CosineSchedule().beta(t), torch.sin(math.pi * t / 2))
    torch.testing.assert_close(PolynomialSchedule(3).alpha(t), (1 - t) ** 3)
    torch.testing.assert_close(PolynomialSchedule(3).beta(t), 1 - (1 - t) ** 3)
    raw = torch.exp(-0.1 * t / 2 - 19.9 * t**2 / 4)
    alpha = (raw - raw[-1]) / (1 - raw[-1])
    torch.testing.assert_close(VariancePreservingSchedule().alpha(t), alpha)
    torch.testing.assert_close(VariancePreservingSchedule().beta(t), (1 - alpha**2).sqrt())


@given(st.sampled_from([1, 1.5, 2, 4]))
@settings(max_examples=4)
def test_a_polynomial_of_power_one_is_linear_and_of_more_ends_flat(power):
    end = float(PolynomialSchedule(power).signal_to_noise_dot(1.0))
    assert end == (-1 if power == 1 else 0)


@settings(max_examples=6)
@given(st.floats(0.05, 1), st.floats(1, 30))
def test_variance_preserving_preserves_variance(low, high):
    schedule = VariancePreservingSchedule(low, high)
    torch.testing.assert_close(
        schedule.alpha(GRID) ** 2 + schedule.beta(GRID) ** 2, torch.ones_like(GRID)
    )


INVALID = {
    "alpha(0)": (("0.9 - 0.9*t", "t"), r"alpha\(0\) = 0.9"),
    "alpha(1)": (("1 - t/2", "t"), r"alpha\(1\) = 0.5"),
    "beta(0)": (("1 - t", "(1 + t)/2"), r"beta\(0\) = 0.5"),
    "beta(1)": (("1 - t", "t/2"), r"beta\(1\) = 0.5"),
    "reversed": (("t", "1 - t"), r"alpha\(0\) = 0,"),
    "not falling": (("(1 - t)*(1 + 40*t*(t - 0.5)**2)", "t*(1 + 30*t*(1 - t))"), "lambda"),
    "rising in the middle": (("1 - t + 0.5*sin(2*pi*t)**2*sin(6*pi*t)", "t"), "lambda"),
    "beta negative": (("1 - t", "t - 3*sin(pi*t)*t"), "beta must be positive"),
    "derivative not finite": (("1 - t", "1 - sqrt(1 - t)"), "beta' must be finite"),
    "value not finite": (
        ("(1 - t)*sin(t - 0.505)/(t - 0.505)/sin(0.505)*0.505", "t"),
        r"alpha must be finite.*0.505",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_what_is_no_schedule_is_refused_with_the_time_and_the_values(case):
    sources, named = INVALID[case]
    with pytest.raises(ScheduleError, match=named) as caught:
        Schedule(*sources)
    assert "=" in str(caught.value)


def test_a_derivative_that_is_not_a_number_is_refused():
    def kinked(t):
        return torch.where(
            t > 2, torch.sqrt(t - 1.5), 1 - t
        )  # nan in the branch not taken: a nan derivative

    class Broken(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(t):
            return 1 - t

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def jvp(ctx, tangent):
            return tangent * float("nan")

    assert kinked(torch.tensor(0.5)) == 0.5
    with pytest.raises(ScheduleError, match=r"alpha' must be finite.*nan"):
        Schedule(Broken.apply, lambda t: t)


def test_a_value_that_is_not_a_number_is_refused():
    def hole(t):
        return torch.where((t > 0.4) & (t < 0.45), torch.nan, 1 - t)

    with pytest.raises(ScheduleError, match=r"alpha must be finite.*alpha\(0\.40\d*\) = nan"):
        Schedule(hole, "t")


def test_a_callable_that_fails_is_reported_as_such():
    with pytest.raises(ScheduleError, match=r"alpha fails.*boom"):
        Schedule(lambda t: (_ for _ in ()).throw(RuntimeError("boom")), "t")


def test_a_raw_diffusion_schedule_is_refused_with_the_advice_to_rescale():
    with pytest.raises(
        ScheduleError, match=r"alpha\(1\) = 0.0065.*zero terminal SNR.*VariancePreservingSchedule"
    ):
        Schedule("exp(-0.1*t/2 - 19.9*t**2/4)", "sqrt(1 - exp(-0.1*t - 19.9*t**2/2))")


@pytest.mark.parametrize("low, high", [(0, 1), (-1, 2), (2, 1), (math.nan, 1), (1, math.inf)])
def test_rates_out_of_order_are_refused(low, high):
    with pytest.raises(ScheduleError, match="beta_min"):
        VariancePreservingSchedule(low, high)


@pytest.mark.parametrize("power", [0.5, 0, -1, math.nan])
def test_a_power_below_one_is_refused(power):
    with pytest.raises(ScheduleError, match="power"):
        PolynomialSchedule(power)


def test_a_misspelt_keyword_is_a_type_error():
    with pytest.raises(TypeError):
        Schedule(alfa="1 - t", beta="t")


@pytest.mark.parametrize("source", [None, ["t"], True])
def test_a_source_of_another_kind_is_refused(source):
    with pytest.raises(ExpressionError):
        Schedule(source, "t")


def test_times_of_whole_numbers_are_refused():
    with pytest.raises(TimeError, match="int64"):
        LinearSchedule().alpha(torch.tensor([0, 1]))
    with pytest.raises(TimeError, match="int64"):
        LinearSchedule().perturb(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([0, 1]))


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1,), (0,)])
def test_times_of_another_shape_than_the_rows_are_refused(shape):
    with pytest.raises(TimeError, match="shape"):
        LinearSchedule().perturb(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(shape))


def test_noise_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"\(2, 3\).*\(2, 4\)"):
        LinearSchedule().perturb(torch.zeros(2, 4), torch.zeros(2, 3), torch.zeros(2))


@settings(max_examples=15)
@given(formula_schedules)
def test_a_schedule_survives_pickling_and_equals_itself(schedule):
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule and hash(again) == hash(schedule) and type(again) is type(schedule)
    torch.testing.assert_close(again.beta_dot(GRID), schedule.beta_dot(GRID), rtol=0, atol=0)


@settings(max_examples=10)
@given(formula_schedules, callable_schedules)
def test_schedules_can_be_read(formula, black_box):
    assert "alpha(t) =" in str(formula) and "beta(t) =" in str(formula)
    assert r"\alpha(t)" in formula._repr_latex_() and "callable" in black_box._repr_latex_()
    assert "a callable" in str(black_box)


def test_different_schedules_are_different():
    assert LinearSchedule() == Schedule("1 - t", "t") and LinearSchedule() != CosineSchedule()


def test_sympy_text_and_callable_give_one_schedule():
    t = sympy.Symbol("t")
    made = [
        Schedule("(1 - t)**2", "t"),
        Schedule((1 - t) ** 2, t),
        Schedule(lambda u: (1 - u) ** 2, lambda u: u),
    ]
    values = [schedule.signal_to_noise_dot(GRID) for schedule in made]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", PRESETS.values(), ids=PRESETS)
def test_a_call_on_256_times_costs_less_than_50_functions_of_torch(schedule):
    t = torch.linspace(0.01, 1, 256)

    def once(function):
        start = time.thread_time()
        for _ in range(50):
            function(t)
        return (time.thread_time() - start) / 50

    def five_functions(t):
        return t.double().square().exp().sqrt().float()

    for function in (schedule.alpha, schedule.beta, schedule.alpha_dot, schedule.beta_dot):
        took, five = zip(*[(once(function), once(five_functions)) for _ in range(20)], strict=True)
        assert min(took) < 10 * min(five)
