"""kappa and back, the two identities, and coefficients that are exact on every edge."""

import copy
import dataclasses
import math
import pickle

import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import (
    ANCHORED_DELTAS,
    DELTAS,
    KAPPAS,
    PRESETS,
    any_statistics_for,
    callable_schedules,
    coefficients,
    derived,
    formula_schedules,
    pairs,
    schedules,
    statistics_for,
)
from tolerances import EXACT, within

from flowspace import (
    TIME_FLOOR,
    ConsistencyStatistic,
    CosineSchedule,
    CriterionError,
    ExpressionError,
    FlowspaceError,
    InputError,
    LinearSchedule,
    MatchedStatistic,
    MeanFlowStatistic,
    PolynomialSchedule,
    Schedule,
    Statistic,
    check_criteria,
)
from flowspace.expressions import S as s
from flowspace.expressions import T as t
from flowspace.expressions import TimeFunction
from flowspace.formulas import random_points
from flowspace.statistics import POINTS as POINTS_INSIDE
from flowspace.statistics import AbstractStatistic, worst_on_diagonal
from flowspace.time_functions import NUDGE

LINEAR, COSINE = PRESETS["linear"], PRESETS["cosine"]
TIMES = torch.linspace(TIME_FLOOR, 1, 25, dtype=torch.float64)
ZERO, ONE = torch.zeros_like(TIMES), torch.ones_like(TIMES)
POINTS = [(0.9, 0.05), (0.83, 0.8), (0.31, 0.07), (0.5, 0.25)]


def vanishes(expression):
    """Zero with 50 digits at several points inside the triangle."""
    values = [
        expression.subs({t: sympy.Float(a, 60), s: sympy.Float(b, 60)}).evalf(50)
        for a, b in POINTS
    ]
    return all(abs(value) < 1e-40 for value in values)


close = within(EXACT)


# --- kappa
# -------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data(), formula_schedules, st.sampled_from(KAPPAS), st.sampled_from(DELTAS))
def test_kappa_from_gamma_and_delta_and_back(data, schedule, kappa, delta):
    statistic = derived(schedule, kappa, delta)
    again = statistic.kappa(schedule)
    assert again.free_symbols <= {s}
    assert vanishes(again - TimeFunction(kappa, 2).expression)
    back = Statistic.from_kappa(schedule, again, delta)
    t_, s_ = data.draw(pairs())
    close(back.gamma(t_, s_), statistic.gamma(t_, s_), 1e-9)


@settings(max_examples=15)
@given(callable_schedules, st.sampled_from(DELTAS), pairs())
def test_kappa_of_callables_is_derived_numerically(schedule, delta, times):
    t_, s_ = times
    statistic = Statistic.from_kappa(schedule, lambda s: s * (2 - s), delta)
    close(statistic.kappa(schedule)(t_, s_), s_ * (2 - s_), 1e-6)


@pytest.mark.parametrize(
    ("statistic", "schedule", "kappa"),
    [
        (Statistic("1", "-t/(t-s)"), LINEAR, s),
        (Statistic("1", "-1"), LINEAR, sympy.Integer(0)),
        (MatchedStatistic(), LINEAR, s),
        (MatchedStatistic(), COSINE, sympy.sin(sympy.pi * s / 2)),
        (MatchedStatistic().on(COSINE), COSINE, sympy.sin(sympy.pi * s / 2)),
        (ConsistencyStatistic(), COSINE, sympy.Integer(0)),
    ],
)
def test_kappa_of_the_table(statistic, schedule, kappa):
    assert vanishes(statistic.kappa(schedule) - kappa)


@settings(max_examples=25)
@given(schedules, st.floats(0.1, 0.9))
def test_kappa_of_the_matched_statistic_is_beta_of_s(schedule, at):
    kappa = MatchedStatistic().kappa(schedule)
    kappa = kappa if isinstance(kappa, TimeFunction) else TimeFunction(kappa, 2)
    s_ = torch.tensor([at], dtype=torch.float64)
    close(kappa(s_ + 0.05, s_), schedule.beta(s_), 1e-9)


@pytest.mark.parametrize("schedule", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize(
    "statistic", [MeanFlowStatistic(), Statistic("t", "-1"), Statistic("1", "-1/(t-s)")]
)
def test_a_kappa_that_depends_on_t_is_refused_with_what_is_left_of_t(schedule, statistic):
    with pytest.raises(
        CriterionError,
        match=r"function of s alone, but at \(t, s\) = \(0\.\d+, 0\.\d+\) it is .* rate",
    ):
        statistic.kappa(schedule)


def test_a_callable_kappa_that_depends_on_t_is_refused():
    statistic = Statistic(lambda t, s: 0 * t, lambda t, s: 1 / (t - s))
    with pytest.raises(CriterionError, match=r"numerically to 1e-06.* changes with t at the rate"):
        statistic.kappa(LINEAR)


def test_from_kappa_refuses_a_kappa_that_mentions_t():
    with pytest.raises(CriterionError, match="depends on t"):
        Statistic.from_kappa(LINEAR, "s*t", "-1")


DESIGNS = [("s", "1"), ("s*(2 - s)", "1 + s*t"), ("sin(pi*s/2)", "2"), ("(1 + s)/20", "t")]


@settings(max_examples=40)
@given(st.data(), formula_schedules, st.sampled_from(DESIGNS))
def test_delta_from_kappa_and_gamma_is_equation_17_and_back(data, schedule, design):
    kappa, gamma = design
    statistic = Statistic.from_kappa(schedule, kappa, gamma=gamma)
    t_, s_ = data.draw(pairs(gap=0.05))
    wanted = TimeFunction(kappa, 2)(t_, s_)
    beta = schedule.beta(t_)
    assume(bool(((wanted - beta).abs() > 1e-3).all()))
    g = TimeFunction(gamma, 2)(t_, s_)
    close(statistic.gamma(t_, s_), g)
    close(statistic.delta(t_, s_), g * beta / (wanted - beta), 1e-9)
    again = statistic.kappa(schedule)
    assert vanishes(again - TimeFunction(kappa, 2).expression)


def test_the_papers_pair_comes_from_kappa_s_and_gamma_one():
    statistic = Statistic.from_kappa(LINEAR, "s", gamma="1")
    assert vanishes(statistic.delta.expression + t / (t - s))


def test_a_callable_gamma_gives_the_delta_of_its_formula():
    text = Statistic.from_kappa(LINEAR, "s", gamma="1 + t*s")
    black_box = Statistic.from_kappa(LINEAR, lambda s: s, gamma=lambda t, s: 1 + t * s)
    assert black_box.delta.expression is None
    close(black_box.delta(TIMES, TIMES / 3), text.delta(TIMES, TIMES / 3))


@pytest.mark.parametrize("given_", [{}, {"delta": "-1", "gamma": "1"}])
def test_from_kappa_takes_one_of_delta_and_gamma(given_):
    with pytest.raises(InputError, match="give one of the two"):
        Statistic.from_kappa(LINEAR, "s", **given_)


DIVIDED = {
    "linear": (LINEAR, "1/t - 1/s", "s"),
    "cosine": (COSINE, "cot(pi*t/2) - cot(pi*s/2)", "sin(pi*s/2)"),
}


@pytest.mark.parametrize("name", DIVIDED)
def test_h_is_lambda_t_minus_lambda_s_for_the_matched_statistic(name):
    schedule, h, kappa = DIVIDED[name]
    statistic = Statistic.from_h(schedule, h, kappa)
    t_, s_ = TIMES[1:], TIMES[1:] / 3
    matched = coefficients(schedule, MatchedStatistic())
    for each in ("prediction", "derivative", "data", "state", "velocity"):
        wanted = getattr(matched, each)(t_, s_)
        close(getattr(statistic.coefficients(schedule), each)(t_, s_), wanted, 1e-9)


@settings(max_examples=20)
@given(schedules, st.sampled_from(KAPPAS), st.sampled_from(["1/t - 1/s", "1/t - 1/(s + 0.1)"]))
def test_from_h_b_is_kappa_h_and_kappa_is_kappa(schedule, kappa, h):
    statistic = Statistic.from_h(schedule, h, kappa)
    c = statistic.coefficients(schedule)
    t_, s_ = TIMES[5:], TIMES[5:] / 2
    wanted = TimeFunction(kappa, 2)(t_, s_)
    assert not c.failure
    close(c.derivative(t_, s_), wanted * TimeFunction(h, 2)(t_, s_), 1e-9)
    close(c.scaled_kappa(t_, s_), wanted, 1e-6)


@pytest.mark.parametrize(("h", "kappa"), [("0", "s"), ("1/t - 1/s", "0"), ("t - 2*s", "t")])
def test_from_h_refuses_zeros_and_a_kappa_that_mentions_t(h, kappa):
    with pytest.raises(CriterionError, match=r"zero inside|depends on t"):
        Statistic.from_h(LINEAR, h, kappa)


def test_there_is_no_data_term_without_criterion_1():
    with pytest.raises(CriterionError, match="no data term"):
        coefficients(LINEAR, MeanFlowStatistic()).data  # noqa: B018


# --- the identities
# -------------------------------------------------------------------------------------------------

SYMBOLIC = {
    "matched": lambda schedule: MatchedStatistic(),
    "MeanFlow": lambda schedule: MeanFlowStatistic(),
    "consistency": lambda schedule: ConsistencyStatistic(),
    "from kappa": lambda schedule: derived(schedule, "s*(2 - s)", "-t/(t - s)"),
    "paper": lambda schedule: Statistic("1", "-t/(t-s)"),
}


@pytest.mark.parametrize("schedule", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("name", SYMBOLIC)
def test_identities_one_and_two_hold_symbolically(name, schedule):
    statistic = SYMBOLIC[name](schedule)
    written = statistic.on(schedule) if name == "matched" else statistic
    gamma, delta = written.gamma.expression, written.delta.expression
    alpha, beta = (function.expression for function in schedule.functions)
    c = coefficients(schedule, statistic)
    assert vanishes(c.derivative.expression - 1 / delta)
    assert vanishes(c.prediction.expression - sympy.diff(1 / delta, t))
    state, velocity = c.state.expression, c.velocity.expression
    assert vanishes(state - sympy.diff(gamma / delta, t)) and vanishes(
        velocity - 1 - gamma / delta
    )  # (I)
    noise_left = state * beta + velocity * beta.diff(t)
    if name == "MeanFlow" or (name == "paper" and schedule != LINEAR):
        assert c.failure and not vanishes(noise_left)
    else:
        assert not c.failure and vanishes(noise_left)
        assert vanishes(state * alpha + velocity * alpha.diff(t) - c.data.expression)  # (II)
        kappa = (velocity * beta).subs(t, sympy.Float(0.97, 60))
        assert vanishes(c.data.expression - kappa * sympy.diff(alpha / beta, t))


@settings(max_examples=40)
@given(st.data(), schedules)
def test_identity_one_holds_numerically(data, schedule):
    """D_t(f/delta) for f/delta = (gamma/delta) z_t + I with D_t z_t = D_t I = v, by autodiff of
    the library's own ratios.
    """
    statistic = data.draw(any_statistics_for(schedule))
    t_, s_ = data.draw(pairs(inside=True))
    c = coefficients(schedule, statistic)
    inverse, ratio = statistic.ratios(schedule)
    slope = torch.func.jvp(lambda u: ratio(u, s_), (t_,), (ONE[:4],))[1]
    close(c.state(t_, s_), slope, 1e-7)
    close(c.velocity(t_, s_), 1 + ratio(t_, s_))
    close(c.derivative(t_, s_), inverse(t_, s_))
    close(
        c.prediction(t_, s_), torch.func.jvp(lambda u: inverse(u, s_), (t_,), (ONE[:4],))[1], 1e-7
    )


@settings(max_examples=40)
@given(st.data(), schedules)
def test_identity_two_holds_numerically(data, schedule):
    """(gamma/delta)' z_t + (1 + gamma/delta) v = c z for every z and noise: compare what
    multiplies each.
    """
    statistic = data.draw(statistics_for(schedule))
    t_, s_ = data.draw(pairs(inside=True))
    c = coefficients(schedule, statistic)
    assert not c.failure
    state, velocity = c.state(t_, s_), c.velocity(t_, s_)
    size = (state * schedule.beta(t_)).abs().max() + 1
    noise_left = state * schedule.beta(t_) + velocity * schedule.beta_dot(t_)
    close(noise_left / size, ZERO[:4], 1e-8)
    data_left = state * schedule.alpha(t_) + velocity * schedule.alpha_dot(t_)
    close(c.data(t_, s_) / size, data_left / size, 1e-8)


@settings(max_examples=30)
@given(st.data(), formula_schedules)
def test_symbolic_coefficients_are_autodiff_are_finite_differences(data, schedule):
    statistic = data.draw(any_statistics_for(schedule))
    t_, s_ = data.draw(pairs(inside=True, gap=0.05))
    c, h = coefficients(schedule, statistic), 1e-5
    for function, derivative in ((c.derivative, c.prediction), (c.velocity, c.state)):
        difference = (function(t_ + h, s_) - function(t_ - h, s_)) / (2 * h)
        scale = 1 + derivative(t_, s_).abs()
        close(derivative(t_, s_) / scale, difference / scale, 1e-5)


@settings(max_examples=15)
@given(pairs(inside=True), st.sampled_from(ANCHORED_DELTAS))
def test_callables_give_the_coefficients_of_their_formulas(times, delta):
    t_, s_ = times
    formula = derived(LINEAR, "s", delta)
    black_box = Statistic(formula.gamma.__call__, formula.delta.__call__)
    wanted, found = coefficients(LINEAR, formula), black_box.coefficients(LINEAR)
    assert found.prediction.expression is None and not found.failure
    for name in ("prediction", "derivative", "state", "velocity", "data"):
        close(getattr(found, name)(t_, s_), getattr(wanted, name)(t_, s_), 1e-6)


# --- the matched statistic, in closed form
# ---------------------------------------------------------------------------


@settings(max_examples=30)
@given(schedules, pairs())
def test_the_matched_coefficients_are_their_closed_form(schedule, times):
    t_, s_ = times
    c = coefficients(schedule, MatchedStatistic())
    tolerance = 1e-9
    close(
        c.derivative(t_, s_),
        schedule.beta(s_) * schedule.signal_to_noise(t_) - schedule.alpha(s_),
        tolerance,
    )
    close(c.prediction(t_, s_), schedule.beta(s_) * schedule.signal_to_noise_dot(t_), tolerance)
    close(c.data(t_, s_), c.prediction(t_, s_), tolerance)
    close(c.velocity(t_, s_), schedule.beta(s_) / schedule.beta(t_), tolerance)


@settings(max_examples=30)
@given(st.data(), schedules)
def test_the_matched_step_is_a_ddim_jump(data, schedule):
    t_, s_ = data.draw(pairs())
    c = coefficients(schedule, MatchedStatistic())
    f, z_t = (torch.linspace(a, b, 4, dtype=torch.float64) for a, b in ((-1, 1), (2, -3)))
    noise = (z_t - schedule.alpha(t_) * f) / schedule.beta(t_)
    close(c.step(f, z_t, t_, s_), schedule.alpha(s_) * f + schedule.beta(s_) * noise, 1e-9)


@settings(max_examples=20)
@given(formula_schedules, pairs(gap=0.05))
def test_the_matched_statistic_written_out_is_the_same(schedule, times):
    t_, s_ = times
    written, short = (
        coefficients(schedule, MatchedStatistic().on(schedule)),
        coefficients(schedule, MatchedStatistic()),
    )
    for name in ("prediction", "derivative", "data", "state", "velocity"):
        close(getattr(written, name)(t_, s_), getattr(short, name)(t_, s_), 1e-8)


def test_the_matched_statistic_of_the_linear_schedule_is_the_papers():
    statistic = MatchedStatistic().on(LINEAR)
    assert vanishes(statistic.gamma.expression - 1) and vanishes(
        statistic.delta.expression + t / (t - s)
    )


def test_the_matched_statistic_of_the_cosine_schedule_is_that_of_the_table():
    delta = MatchedStatistic().on(COSINE).delta.expression
    assert vanishes(delta - sympy.sin(sympy.pi * t / 2) / sympy.sin(sympy.pi * (s - t) / 2))


# --- the edges
# -------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(formula_schedules)
def test_matched_coefficients_are_exact_on_the_diagonal(schedule):
    c = coefficients(schedule, MatchedStatistic())
    inner = TIMES[:-1]
    assert torch.allclose(c.derivative(inner, inner), ZERO[:-1], rtol=0, atol=1e-13)
    close(
        c.prediction(TIMES, TIMES),
        schedule.beta(TIMES) * schedule.signal_to_noise_dot(TIMES),
        1e-9,
    )
    close(c.data(TIMES, TIMES), c.prediction(TIMES, TIMES), 1e-12)


@settings(max_examples=30)
@given(formula_schedules)
def test_matched_coefficients_are_exact_at_s_zero_and_at_t_one(schedule):
    c = coefficients(schedule, MatchedStatistic())
    close(c.derivative(TIMES, ZERO), -ONE, 1e-13)
    close(c.prediction(TIMES, ZERO), ZERO, 1e-13)
    close(c.data(TIMES, ZERO), ZERO, 1e-13)
    close(c.velocity(TIMES, ZERO), ZERO, 1e-13)
    starts = torch.linspace(0, 0.99, 25, dtype=torch.float64)
    close(c.derivative(ONE, starts), -schedule.alpha(starts), 1e-12)
    close(
        c.prediction(ONE, starts), schedule.beta(starts) * schedule.alpha_dot(1.0).double(), 1e-6
    )
    close(c.velocity(ONE, starts), schedule.beta(starts), 1e-12)


@settings(max_examples=30)
@given(st.data(), schedules)
def test_coefficients_are_finite_on_every_edge_for_anchored_statistics(data, schedule):
    statistic = data.draw(statistics_for(schedule, ANCHORED_DELTAS))
    assume(
        not (statistic != MatchedStatistic() and "t**2" in str(statistic.delta))
    )  # 1/delta is infinite at s = -t only
    c = coefficients(schedule, statistic)
    for t_, s_ in ((TIMES, TIMES), (TIMES, ZERO), (ONE, TIMES)):
        for name in ("prediction", "derivative", "data", "state", "velocity"):
            assert getattr(c, name)(t_, s_).isfinite().all(), name


UNMATCHED = Statistic.from_kappa(LINEAR, "pi*s/2", "2/(pi*s*(cot(pi*t/2) - cot(pi*s/2)))")


def test_an_unmatched_statistic_is_exact_at_s_zero():
    """h = cot(pi t/2) - cot(pi s/2), kappa = pi s/2: kappa cot(pi s/2) -> 1 for s -> 0, so b(t, 0)
    = -1.
    """
    c = coefficients(LINEAR, UNMATCHED)
    close(c.derivative(TIMES, ZERO), -ONE, 1e-12)
    close(c.prediction(TIMES, ZERO), ZERO, 1e-12)
    close(c.data(TIMES, ZERO), ZERO, 1e-12)
    close(c.velocity(TIMES, ZERO), ZERO, 1e-12)


def test_an_unmatched_statistic_is_exact_on_the_diagonal_and_at_t_one():
    c = coefficients(LINEAR, UNMATCHED)
    inner = TIMES[:-1]
    close(c.derivative(inner, inner), ZERO[:-1], 1e-12)
    close(
        c.prediction(inner, inner),
        -(math.pi**2) / 4 * inner / torch.sin(math.pi * inner / 2) ** 2,
        1e-9,
    )
    close(c.data(TIMES, TIMES), -math.pi / 2 / TIMES, 1e-9)
    wanted = -(math.pi * inner / 2) / torch.tan(math.pi * inner / 2)
    close(c.derivative(ONE[:-1], inner), wanted, 1e-9)
    close(c.prediction(ONE, TIMES), -(math.pi**2) / 4 * TIMES, 1e-9)


@settings(max_examples=10)
@given(callable_schedules)
def test_matched_coefficients_of_callables_are_right_on_the_edges(schedule):
    c = coefficients(schedule, MatchedStatistic())
    close(c.derivative(TIMES, TIMES), ZERO, 1e-6)
    close(c.derivative(TIMES, ZERO), -ONE, 1e-6)
    close(c.data(TIMES, TIMES), c.prediction(TIMES, TIMES), 1e-6)
    close(c.prediction(TIMES, ZERO), ZERO, 1e-6)


def test_a_delta_that_is_infinite_on_the_diagonal_as_a_callable_is_as_the_text():
    black_box = Statistic(lambda t, s: torch.ones_like(t), lambda t, s: -t / (t - s)).coefficients(
        LINEAR
    )
    text = Statistic("1", "-t/(t-s)").coefficients(LINEAR)
    for t_, s_ in ((TIMES, TIMES), (TIMES, ZERO), (ONE, TIMES)):
        for name in ("prediction", "derivative", "data"):
            close(getattr(black_box, name)(t_, s_), getattr(text, name)(t_, s_), 2e-5)


@pytest.mark.parametrize("name", ["gamma", "delta"])
def test_gamma_and_delta_of_the_matched_statistic_depend_on_the_schedule(name):
    with pytest.raises(CriterionError, match=rf"MatchedStatistic\(\)\.on\(schedule\)\.{name}"):
        getattr(MatchedStatistic(), name)
    with pytest.raises(AttributeError):
        MatchedStatistic().epsilon  # noqa: B018


def test_a_statistic_is_a_pair_or_matched():
    for statistic in (MatchedStatistic(), Statistic("1", "-1"), MeanFlowStatistic()):
        assert isinstance(statistic, AbstractStatistic)
    assert not isinstance(MatchedStatistic(), Statistic)
    with pytest.raises(TypeError, match="abstract"):
        AbstractStatistic()


# --- the scale
# -------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data(), schedules)
def test_the_scale_bounds_what_multiplies_f_and_its_derivative(data, schedule):
    statistic = data.draw(any_statistics_for(schedule))
    t_, s_ = data.draw(pairs(rows=8, diagonal=True))
    c = coefficients(schedule, statistic)
    m = c.scale(t_, s_)
    assert not m.isnan().any() and (m != 0).all()
    assert ((c.prediction(t_, s_) / m).abs() <= 1 + 1e-12).all()
    off = s_ < t_
    assert ((c.derivative(t_, s_) / m).abs()[off] <= (t_ - s_)[off] * (1 + 1e-12)).all()
    assert ((c.derivative(t_, s_) / m)[off] >= 0).all()


@settings(max_examples=30)
@given(schedules, pairs(rows=8, diagonal=True))
def test_the_scale_also_bounds_the_data_for_the_matched_statistic(schedule, times):
    c = coefficients(schedule, MatchedStatistic())
    weight = c.data(*times) / c.scale(*times)
    assert (weight.abs() <= 1 + 1e-6).all()
    on = times[0] == times[1]
    slope = c.prediction(*times)
    close(weight[on & (slope != 0)], torch.ones_like(weight)[on & (slope != 0)], 1e-6)


@settings(max_examples=20)
@given(pairs(rows=8, diagonal=True))
def test_the_scales_of_the_table(times):
    t_, s_ = times
    close(coefficients(LINEAR, MatchedStatistic()).scale(t_, s_), -1 / t_, 1e-9)
    close(coefficients(LINEAR, MeanFlowStatistic()).scale(t_, s_), torch.ones_like(t_), 1e-9)


@settings(max_examples=20)
@given(st.data(), schedules)
def test_the_coefficients_at_a_point_are_those_of_the_functions(data, schedule):
    c = coefficients(schedule, data.draw(any_statistics_for(schedule)))
    t_, s_ = data.draw(pairs(rows=8, diagonal=True))
    at = c.at(t_, s_)
    close(at.prediction, c.prediction(t_, s_), 0)
    close(at.derivative, c.derivative(t_, s_), 0)
    close(at.scale, c.scale(t_, s_), 0)


def counting(function):
    """Return a function of time like this one, and the list that grows with its evaluations."""
    calls, evaluate, alike = [], function.prepare(), copy.copy(function)
    vars(alike)["_evaluate"] = lambda *times: calls.append(times) or evaluate(*times)
    return alike, calls


def test_at_a_point_a_and_b_are_evaluated_once_and_the_data_not_at_all():
    c = coefficients(LINEAR, MatchedStatistic())
    names = ("prediction", "derivative", "_data")
    counted = {name: counting(getattr(c, name)) for name in names}
    functions = {name: function for name, (function, _) in counted.items()}
    at = dataclasses.replace(c, **functions).at(TIMES, ZERO)
    assert {name: len(calls) for name, (_, calls) in counted.items()} == {
        "prediction": 1,
        "derivative": 1,
        "_data": 0,
    }
    close(at.scale, -1 / TIMES)


def test_the_coefficients_at_a_point_need_no_criterion():
    at = coefficients(LINEAR, MeanFlowStatistic()).at(TIMES, ZERO)
    close(at.prediction, ONE)
    close(at.derivative, TIMES)


def test_the_scale_is_a_where_b_vanishes_and_on_the_diagonal_and_infinite_where_a_does_too():
    half, time = torch.tensor([[0.5], [0.75]], dtype=torch.float64)
    shifted = coefficients(LINEAR, Statistic.from_kappa(LINEAR, "s + 1/4", "t/(s + 1/4 - t)"))
    assert float(shifted.derivative(time, half)) == 0
    close(shifted.scale(time, half), -0.75 / time**2)
    never = coefficients(LINEAR, Statistic.from_kappa(LINEAR, "s", "t/s"))
    close(never.scale(time, time), -1 / time)
    assert float(coefficients(LINEAR, ConsistencyStatistic()).scale(time, time)) == math.inf


def test_a_step_keeps_the_precision_of_the_states():
    z, t_ = torch.ones(2, 3, dtype=torch.bfloat16), torch.tensor([0.5, 0.7])
    step = coefficients(LINEAR, MatchedStatistic()).step(z.float(), z, t_, t_ / 2)
    assert step.dtype == torch.bfloat16


# --- construction
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "delta",
    [
        "0",
        0,
        "t - t",
        lambda t, s: torch.zeros_like(t),
        "sin(pi*t)*0",
        lambda t, s: torch.full_like(t, 1e-16),
    ],
)
def test_a_delta_of_zero_is_refused(delta):
    with pytest.raises(CriterionError, match="zero inside"):
        Statistic("1", delta)
    with pytest.raises(CriterionError, match="zero inside"):
        Statistic.from_kappa(LINEAR, "s", delta)


def test_a_large_kappa_of_callables_is_flat_and_matched_but_for_rounding():
    """What multiplies f and x is then one function."""
    statistic = Statistic.from_h(LINEAR, lambda t, s: 1 / t - 1 / s, lambda s: 1e12 * s)
    c = statistic.coefficients(LINEAR)
    assert c.data is c.prediction


@pytest.mark.parametrize(
    ("gamma", "kappa"),
    [
        ("1 - s*(t**0.5 - 1)*(t**0.5 + 1)/(t*(t - 1))", s),
        ("1 - (sin(s)**2 + cos(s)**2)/t", sympy.Integer(1)),
    ],
    ids=["0/0 at noise", "longer than it need be"],
)
def test_kappa_is_its_limit_at_noise_as_one_reads_it(gamma, kappa):
    assert Statistic(gamma, "-1").kappa(LINEAR) == kappa


def test_a_kappa_that_is_zero_at_one_time_is_no_kappa_of_zero():
    """Not even at one of those at which it is looked at."""
    _, zero = random_points(POINTS_INSIDE)[0]
    statistic = Statistic.from_kappa(LINEAR, f"s - {zero!r}", "-t/(t - s)")
    assert not statistic.coefficients(LINEAR).data_vanishes


def test_what_is_infinite_at_noise_has_no_kappa():
    with pytest.raises(CriterionError, match="must be a function of s alone"):
        Statistic("1/(1 - t)", "-1").kappa(LINEAR)


class Nameless(AbstractStatistic):
    """1 + gamma/delta times t is the root of a negative number, which does not change with t."""

    def ratios(self, schedule):
        return TimeFunction("s - t", 2), TimeFunction("sqrt(s - 1)/t - 1", 2)

    def on(self, schedule):
        return Statistic("1", "-1")


def test_what_is_no_number_is_no_kappa_though_it_does_not_change():
    assert "function of s alone" in Nameless().coefficients(LINEAR).failure


@settings(max_examples=10)
@given(st.floats(0.5, 1), st.floats(0.5, 1))
def test_kappa_of_callables_does_not_see_t_at_all(first, second):
    statistic = Statistic.from_kappa(LINEAR, lambda s: s**1.3 + 0.1, lambda t, s: -t / (t - s))
    kappa, s_ = statistic.kappa(LINEAR), torch.linspace(0.01, 0.4, 9, dtype=torch.float64)
    found = [kappa(torch.full_like(s_, time), s_) for time in (first, second)]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], s_**1.3 + 0.1)


def test_a_small_delta_is_no_delta_of_zero():
    Statistic("1", lambda t, s: torch.full_like(t, 1e-14))


def test_a_size_that_is_small_is_not_infinite_however_it_grows_towards_the_diagonal():
    size, _ = worst_on_diagonal(lambda t, s: torch.where(t - s < 10 * NUDGE, 1.0, 0.0))
    assert size == 1


def test_from_kappa_names_the_delta_that_came():
    with pytest.raises(FlowspaceError, match="got delta"):
        Statistic.from_kappa(LINEAR, "s", "log(s - t)")


@pytest.mark.parametrize("gamma", ["sqrt(s - t)", "log(t - s - 5)", "(s - t)**0.5"])
def test_a_formula_that_is_not_real_inside_the_triangle_is_refused_by_flowspace(gamma):
    with pytest.raises(FlowspaceError):
        Statistic(gamma, "-1").kappa(LINEAR)


def test_a_misspelt_keyword_is_a_type_error():
    with pytest.raises(TypeError):
        Statistic(gama="1", delta="-1")
    with pytest.raises(TypeError):
        Statistic.from_kappa(LINEAR, kapa="s", delta="-1")


@pytest.mark.parametrize("source", [None, ["t"], False])
def test_a_source_of_another_kind_is_refused(source):
    with pytest.raises(ExpressionError):
        Statistic("1", source)


@settings(max_examples=15)
@given(st.data(), formula_schedules)
def test_a_statistic_survives_pickling_and_equals_itself(data, schedule):
    statistic = data.draw(any_statistics_for(schedule))
    again = pickle.loads(pickle.dumps(statistic))
    assert again == statistic and hash(again) == hash(statistic) and type(again) is type(statistic)
    assert str(again) == str(statistic)
    t_, s_ = data.draw(pairs(inside=True))
    wanted, found = coefficients(schedule, statistic), again.coefficients(schedule)
    torch.testing.assert_close(found.prediction(t_, s_), wanted.prediction(t_, s_), rtol=0, atol=0)


def test_statistics_differ_where_they_differ():
    assert MatchedStatistic() == MatchedStatistic() and MatchedStatistic() != MeanFlowStatistic()
    assert Statistic("1", "-1") != Statistic("1", "-t")
    assert LinearSchedule() != CosineSchedule() and Schedule("1-t", "t**2") != LinearSchedule()


@pytest.mark.parametrize("power", [2, 3, 4, 6])
def test_the_coefficients_are_precise_in_float32(power):
    schedule = PolynomialSchedule(power)
    c = MatchedStatistic().coefficients(schedule)
    pair = torch.rand(
        2, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).clamp(min=0.01)
    t, s = pair.max(0).values.float(), pair.min(0).values.float()
    u, r = 1 - t.double(), 1 - s.double()
    alpha_t, beta_t, alpha_s, beta_s = u**power, 1 - u**power, r**power, 1 - r**power
    b = beta_s * alpha_t / beta_t - alpha_s
    a = -beta_s * power * u ** (power - 1) / beta_t**2
    torch.testing.assert_close(c.derivative(t, s).double(), b, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(c.prediction(t, s).double(), a, rtol=1e-5, atol=1e-12)


def test_high_powers_are_valid_schedules():
    assert check_criteria(PolynomialSchedule(8), MatchedStatistic()).ok
