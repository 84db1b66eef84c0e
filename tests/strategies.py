"""Hypothesis strategies: random valid schedules, statistics and times.

Parameters come from short lists, and what is built from them is cached: a formula is derived once,
not once a test.
"""

import functools
import math

import torch
from hypothesis import strategies as st

from flowspace import (
    ConsistencyStatistic,
    CosineSchedule,
    CrossFlowLoss,
    LinearSchedule,
    MatchedStatistic,
    MeanFlowStatistic,
    PolynomialSchedule,
    Schedule,
    Statistic,
    VariancePreservingSchedule,
)

PRESETS = {
    "linear": LinearSchedule(),
    "cosine": CosineSchedule(),
    "polynomial": PolynomialSchedule(2),
    "variance preserving": VariancePreservingSchedule(),
}
KAPPAS = ("s", "s*(2 - s)", "sin(pi*s/2)", "(1 + s)/2", "s**2", "exp(s) - 1")
ANCHORED_DELTAS = ("-t/(t - s)", "1/(t - s)", "-(1 + t)/(t - s)", "-t*(1 + s)/(t**2 - s**2)")
DELTAS = (*ANCHORED_DELTAS, "-1", "-(1 + t)/(1 + s)", "-exp(t - s)")


def mixed_texts(w, p, u, q):
    """alpha falls from 1 to 0 and beta rises from 0 to 1, so lambda falls: a valid schedule for
    every choice.
    """
    return f"{w}*(1 - t)**{p} + {1 - w}*cos(pi*t/2)", f"{u}*t**{q} + {1 - u}*sin(pi*t/2)"


def mixed_callables(w, p, u, q):
    return (
        lambda t: w * (1 - t) ** p + (1 - w) * torch.cos(math.pi * t / 2),
        lambda t: u * t**q + (1 - u) * torch.sin(math.pi * t / 2),
    )


@functools.cache
def mixed(w, p, u, q):
    return Schedule(*mixed_texts(w, p, u, q))


@functools.cache
def mixed_callable(w, p, u, q):
    return Schedule(*mixed_callables(w, p, u, q))


@functools.cache
def rational(k, j):
    """alpha = (1-t)/(1+kt), beta = t(1+j)/(1+jt); k, j > -1."""
    return Schedule(f"(1 - t)/(1 + {k}*t)", f"t*{1 + j}/(1 + {j}*t)")


parameters = st.tuples(
    st.sampled_from([0.0, 0.25, 0.75, 1.0]),
    st.sampled_from([1, 1.5, 2, 3]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([1, 1.5, 2]),
)
formula_schedules = st.one_of(
    st.sampled_from(list(PRESETS.values())),
    parameters.map(lambda choice: mixed(*choice)),
    st.tuples(st.sampled_from([-0.5, 0.5, 2.0]), st.sampled_from([0, 1.0, 3.0])).map(
        lambda choice: rational(*choice)
    ),
)
callable_schedules = parameters.map(lambda choice: mixed_callable(*choice))
schedules = st.one_of(formula_schedules, callable_schedules)


@functools.cache
def derived(schedule, kappa, delta):
    return Statistic.from_kappa(schedule, kappa, delta)


@functools.cache
def coefficients(schedule, statistic):
    return statistic.coefficients(schedule)


@functools.cache
def cross_flow(schedule=PRESETS["linear"], statistic=None, check=False, **options):
    """Building a loss derives its formulas; the same one is built once."""
    return CrossFlowLoss(schedule=schedule, statistic=statistic, check=check, **options)


def statistics_for(schedule, deltas=DELTAS):
    """Statistics that meet Criterion 1 under a schedule."""
    made = st.tuples(st.sampled_from(KAPPAS), st.sampled_from(deltas)).map(
        lambda pair: derived(schedule, *pair)
    )
    return st.one_of(st.just(MatchedStatistic()), made)


def any_statistics_for(schedule):
    return st.one_of(
        statistics_for(schedule), st.sampled_from([MeanFlowStatistic(), ConsistencyStatistic()])
    )


@st.composite
def pairs(draw, rows=4, dtype=torch.float64, gap=0.02, diagonal=False, inside=False):
    """t and s of shape (rows,): s < t by at least the gap, or on the diagonal where asked for; the
    edges come often.
    """
    t_values, s_values = [], []
    for _ in range(rows):
        time = draw(
            st.floats(0.1, 0.97) if inside else st.one_of(st.just(1.0), st.floats(0.1, 1.0))
        )
        share = draw(
            st.floats(0.1, 1.0) if inside else st.one_of(st.just(0.0), st.floats(0.0, 1.0))
        )
        start = share * (time - gap)
        t_values.append(time)
        s_values.append(time if diagonal and draw(st.booleans()) else start)
    return torch.tensor(t_values, dtype=dtype), torch.tensor(s_values, dtype=dtype)


seeds = st.integers(0, 2**31 - 1)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
