"""Penalties are their formulas, row by row."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal, seeds

from flowspace import AbsoluteError, Adaptive, HuberError, InputError, SquaredError

POINTWISE = {
    "squared": (SquaredError, lambda d: d**2),
    "absolute": (AbsoluteError, abs),
    "huber": (HuberError, lambda d: d**2 / 2 if abs(d) <= 1 else abs(d) - 0.5),
}
PENALTIES = [
    *(make(summed=summed) for make, _ in POINTWISE.values() for summed in (False, True)),
    HuberError(0.3),
    Adaptive(),
    Adaptive(AbsoluteError(), 0.5, 1e-3),
]
shapes = st.sampled_from([(1,), (4,), (3, 2), (2, 3, 4)])


@settings(max_examples=40)
@given(st.sampled_from(list(POINTWISE)), st.booleans(), shapes, seeds)
def test_a_penalty_is_its_formula(name, summed, shape, seed):
    make, formula = POINTWISE[name]
    difference = 2 * normal(seed, *shape)
    for row, value in zip(difference, make(summed=summed)(difference), strict=True):
        entries = [formula(float(d)) for d in row.flatten()]
        assert float(value) == pytest.approx(
            sum(entries) / (1 if summed else len(entries)), rel=1e-12
        )


@settings(max_examples=40)
@given(st.sampled_from(PENALTIES), shapes, seeds)
def test_rows_do_not_see_each_other(penalty, shape, seed):
    difference = normal(seed, *shape)
    whole = penalty(difference)
    assert whole.shape == shape[:1] and (whole >= 0).all()
    alone = torch.cat([penalty(row[None]) for row in difference])
    torch.testing.assert_close(whole, alone, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_no_difference_costs_nothing(penalty):
    assert (penalty(torch.zeros(3, 5)) == 0).all()


@settings(max_examples=30)
@given(st.sampled_from([0.1, 1.0, 3.0]), seeds)
def test_huber_is_torchs_and_meets_itself_at_the_threshold(threshold, seed):
    d = 4 * normal(seed, 3, 7)
    wanted = torch.nn.functional.huber_loss(
        d, torch.zeros_like(d), reduction="none", delta=threshold
    ).mean(1)
    torch.testing.assert_close(HuberError(threshold)(d), wanted, rtol=1e-13, atol=1e-13)


@settings(max_examples=30)
@given(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([1e-3, 0.01, 1.0]), seeds)
def test_adaptive_divides_value_and_gradient_by_a_constant(p, c, seed):
    d = normal(seed, 4, 3).requires_grad_()
    for inner in (SquaredError(), SquaredError(summed=True), AbsoluteError()):
        plain, adapted = inner(d), Adaptive(inner, p, c)(d)
        weight = (plain.detach() + c) ** -p
        torch.testing.assert_close(adapted, plain * weight, rtol=1e-13, atol=1e-13)
        found = torch.autograd.grad(adapted.sum(), d)[0]
        wanted = torch.autograd.grad((plain * weight).sum(), d)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: HuberError(0), "threshold = 0"),
        (lambda: HuberError(-1), "threshold = -1"),
        (lambda: HuberError(math.nan), "threshold = nan"),
        (lambda: Adaptive(c=0), "c = 0"),
        (lambda: HuberError(True), "threshold = True"),
        (lambda: Adaptive(c=True), "c = True"),
        (lambda: Adaptive(c=math.inf), "c = inf"),
        (lambda: Adaptive(p=-1), "p = -1"),
        (lambda: Adaptive(p=math.inf), "p = inf"),
        (lambda: Adaptive(p=True), "p = True"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_their_values(make, named):
    with pytest.raises(InputError, match=named):
        make()


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_a_penalty_survives_pickling(penalty):
    assert pickle.loads(pickle.dumps(penalty)) == penalty
