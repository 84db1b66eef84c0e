"""Every route gives the same value and the same derivative, and leaves nothing behind."""

import contextlib
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal, seeds

from flowspace import (
    FiniteDifference,
    ForwardMode,
    ImprovedMeanFlowLoss,
    InputError,
    MeanFlowLoss,
    PixelMeanFlowLoss,
    SharedPrimal,
)
from flowspace.derivatives import rules

ROUTES = [SharedPrimal(), ForwardMode(), FiniteDifference(), FiniteDifference(1e-3, order=1)]
each_route = pytest.mark.parametrize("route", ROUTES, ids=repr)
each_that_calls_again = pytest.mark.parametrize("route", ROUTES[1:], ids=repr)
WEIGHT = normal(7, 3, 3).requires_grad_()


def smooth(z, t, s):
    return torch.tanh(z @ WEIGHT) * torch.cos(3 * t - s)[:, None] + (t**2 * s)[:, None] * z


def arguments(seed=0, rows=5, low=0.0, high=1.0):
    t = low + (high - low) * torch.linspace(0, 1, rows, dtype=torch.float64)
    primals = (normal(seed, rows, 3), t, t / 2)
    return primals, (normal(seed + 1, rows, 3), torch.ones_like(t), torch.zeros_like(t))


def exact(fn, primals, tangents):
    return torch.func.jvp(fn, primals, tangents)[1].detach()


@settings(max_examples=20)
@given(seeds)
def test_forward_mode_is_the_directional_derivative(seed):
    primals, tangents = arguments(seed)
    value, derivative = ForwardMode()(smooth, primals, tangents)
    torch.testing.assert_close(value, smooth(*primals), rtol=0, atol=0)
    torch.testing.assert_close(
        derivative, exact(smooth, primals, tangents), rtol=1e-13, atol=1e-13
    )


@settings(max_examples=20)
@given(seeds, st.sampled_from([1e-2, 1e-3, 1e-4]))
def test_finite_differences_agree_with_forward_mode(seed, step):
    primals, tangents = arguments(seed)
    wanted = exact(smooth, primals, tangents)
    for order, tolerance in ((1, 60 * step), (2, 600 * step**2)):
        value, derivative = FiniteDifference(step, order)(smooth, primals, tangents)
        torch.testing.assert_close(value, smooth(*primals), rtol=0, atol=0)
        torch.testing.assert_close(derivative, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("order", [1, 2])
def test_the_error_of_a_finite_difference_is_of_its_order(order):
    primals, tangents = arguments(3, rows=9)
    wanted = exact(smooth, primals, tangents)
    errors = [
        (FiniteDifference(step, order)(smooth, primals, tangents)[1] - wanted).abs().amax(1)
        for step in (2e-3, 1e-3)
    ]
    ratio = errors[0] / errors[1]
    assert ((ratio > 2**order * 0.75) & (ratio < 2**order * 1.35)).all(), ratio


@settings(max_examples=30)
@given(seeds, st.floats(1e-3, 0.25), st.floats(0, 1))
def test_order_two_is_exact_for_quadratics_also_at_the_ends(seed, step, at):
    def quadratic(z, t, s):
        return z**2 + t[:, None] * z - 3 * (t**2)[:, None] + s[:, None]

    (z, _, s), tangents = arguments(seed)
    primals = (z, torch.tensor([0.0, step / 2, at, 1 - step / 2, 1.0], dtype=torch.float64), s)
    derivative = FiniteDifference(step, 2)(quadratic, primals, tangents)[1]
    torch.testing.assert_close(
        derivative, exact(quadratic, primals, tangents), rtol=1e-10, atol=1e-10
    )


@settings(max_examples=30)
@given(
    st.floats(1e-3, 0.25),
    st.sampled_from([1, 2]),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_a_finite_difference_never_leaves_the_unit_interval(step, order, times):
    for dtype in (torch.float32, torch.float64):
        t = torch.tensor([0.0, 1.0, step, 1 - step, *times], dtype=dtype)
        seen = []

        def model(z, t, s, seen=seen):
            seen.append(t)
            return z * t[:, None]

        z = torch.ones(8, 2, dtype=dtype)
        FiniteDifference(step, order)(
            model, (z, t, t / 2), (z, torch.ones_like(t), torch.zeros_like(t))
        )
        assert len(seen) == 3 and all(bool(((times >= 0) & (times <= 1)).all()) for times in seen)


@each_route
def test_the_value_carries_gradient_and_the_derivative_never_does(route):
    primals, tangents = arguments(0, low=0.1, high=0.9)
    value, derivative = route(smooth, primals, tangents)
    assert value.requires_grad and not derivative.requires_grad
    found = torch.autograd.grad(value.square().sum(), WEIGHT)[0]
    wanted = torch.autograd.grad(smooth(*primals).square().sum(), WEIGHT)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@each_that_calls_again
@settings(max_examples=15)
@given(mask=st.lists(st.booleans(), min_size=5, max_size=5))
def test_a_mask_computes_only_its_rows_and_is_zero_elsewhere(route, mask):
    primals, tangents = arguments(1)
    rows, calls = torch.tensor(mask), []

    def watched(z, t, s, cond):
        calls.append(cond["row"].tolist())
        return smooth(z, t, s) * cond["scale"][:, None]

    cond = {"row": torch.arange(5), "scale": torch.linspace(1, 2, 5, dtype=torch.float64)}
    _, whole = route(watched, (*primals, cond), (*tangents, None))
    calls.clear()
    _, derivative = route(watched, (*primals, cond), (*tangents, None), rows=rows)
    assert calls[0] == list(range(5))
    assert all(call == rows.nonzero().squeeze(1).tolist() for call in calls[1:])
    assert any(mask) == (len(calls) > 1)
    torch.testing.assert_close(
        derivative, torch.where(rows[:, None], whole, 0.0), rtol=1e-11, atol=1e-11
    )


@each_route
def test_nested_conditions_follow_their_rows_and_what_is_no_row_is_left_alone(route):
    primals, tangents = arguments(1)
    rows = torch.tensor([True, False, True, True, False])
    table = normal(4, 7, 3)

    def model(z, t, s, cond):
        assert cond["table"].shape == (7, 3) and cond["name"] == "x"
        return smooth(z, t, s) + cond["table"][cond["deep"][0]["label"]] * t[:, None]

    cond = {"table": table, "deep": [{"label": torch.tensor([6, 5, 4, 3, 2])}], "name": "x"}
    whole = route(model, (*primals, cond), (*tangents, None))[1]
    some = route(model, (*primals, cond), (*tangents, None), rows=rows)[1]
    torch.testing.assert_close(some[rows], whole[rows], rtol=1e-11, atol=1e-11)


# --- random numbers in the model
# -------------------------------------------------------------------------------------


class Dropped(torch.nn.Module):
    def __init__(self, masks=None):
        super().__init__()
        self.weight, self.masks = torch.nn.Parameter(normal(3, 3, 16)), masks

    def forward(self, z, t, s):
        hidden = torch.sin(z @ self.weight + t[:, None])
        hidden = F.dropout(hidden, 0.5) if self.masks is None else hidden * self.masks
        return hidden @ self.weight.T * (1 + t * s)[:, None]


@each_route
@pytest.mark.parametrize("masked", [False, True])
def test_dropout_is_the_same_in_value_and_derivative(route, masked):
    primals, tangents = arguments(0, rows=6)
    rows = torch.tensor([True, False, True, False, True, True]) if masked else None
    torch.manual_seed(5)
    masks = F.dropout(torch.ones(6, 16, dtype=torch.float64), 0.5)
    fixed = Dropped(masks)
    torch.manual_seed(5)
    value, derivative = route(Dropped(), primals, tangents, rows=rows)
    torch.testing.assert_close(value, fixed(*primals), rtol=1e-13, atol=1e-13)
    wanted = route(fixed, primals, tangents)[1]
    torch.testing.assert_close(
        derivative, wanted if rows is None else torch.where(rows[:, None], wanted, 0.0)
    )


@each_route
@pytest.mark.parametrize("masked", [False, True])
def test_the_generator_is_left_as_a_plain_forward_leaves_it(route, masked):
    primals, tangents = arguments(0, rows=6)
    rows = torch.tensor([True, False] * 3) if masked else None
    for model in (Dropped(), smooth):
        torch.manual_seed(1)
        model(*primals)
        wanted = torch.get_rng_state()
        torch.manual_seed(1)
        route(model, primals, tangents, rows=rows)
        assert torch.equal(torch.get_rng_state(), wanted)


# --- attention
# -------------------------------------------------------------------------------------------------


def attention(z, t, s):
    tokens = z.reshape(len(z), 1, 3, 1) * torch.linspace(-1, 1, 8, dtype=z.dtype) + t.reshape(
        -1, 1, 1, 1
    )
    return F.scaled_dot_product_attention(tokens, tokens.sin(), tokens.cos()).mean((1, 3))


def attention_by_hand(z, t, s):
    tokens = z.reshape(len(z), 1, 3, 1) * torch.linspace(-1, 1, 8, dtype=z.dtype) + t.reshape(
        -1, 1, 1, 1
    )
    weights = torch.softmax(tokens @ tokens.sin().transpose(-1, -2) / math.sqrt(8), -1)
    return (weights @ tokens.cos()).mean((1, 3))


def backends():
    from torch.backends import cuda

    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


@each_route
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_attention_can_be_differentiated(route, dtype):
    primals, tangents = ([x.to(dtype) for x in group] for group in arguments(0))
    value, derivative = route(attention, primals, tangents)
    wanted = exact(attention_by_hand, tuple(primals), tuple(tangents))
    tolerance = 1e-5 if isinstance(route, ForwardMode) else 2e-2
    torch.testing.assert_close(value, attention_by_hand(*primals), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(derivative, wanted, rtol=tolerance, atol=tolerance)


@each_that_calls_again
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("flash", [False, True])
def test_the_attention_backends_are_restored_also_after_an_error(route, fails, flash):
    primals, tangents = arguments(0)
    calls = []

    def model(z, t, s):
        calls.append(backends())
        if fails and len(calls) > 1:
            raise RuntimeError("inside the model")
        return attention(z, t, s)

    before = torch.backends.cuda.flash_sdp_enabled()
    try:
        torch.backends.cuda.enable_flash_sdp(flash)
        chosen = backends()
        with (
            pytest.raises(RuntimeError, match="inside the model")
            if fails
            else contextlib.nullcontext()
        ):
            route(model, primals, tangents)
        assert backends() == chosen == calls[0] and len(calls) > 1
    finally:
        torch.backends.cuda.enable_flash_sdp(before)


@each_that_calls_again
def test_an_error_inside_the_derivative_leaves_the_generator_and_grad_mode_alone(route):
    primals, tangents = arguments(0)
    calls = []

    def model(z, t, s):
        calls.append(torch.rand(()))
        if len(calls) > 1:
            raise RuntimeError("inside the model")
        return z

    torch.manual_seed(0)
    torch.rand(())
    wanted = torch.get_rng_state()
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="inside the model"):
        route(model, primals, tangents)
    assert torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), wanted)


# --- half precision
# -------------------------------------------------------------------------------------------------


@each_that_calls_again
def test_under_autocast_the_derivative_is_that_of_full_precision(route):
    weight = normal(7, 3, 3).float()

    def model(z, t, s):
        return torch.tanh(z @ weight) * (1 + t)[:, None]

    primals, tangents = ([x.float() for x in group] for group in arguments(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, derivative = route(model, primals, tangents)
        assert torch.is_autocast_enabled("cpu")
    wanted = route(model, primals, tangents)[1]
    assert derivative.dtype == torch.float32
    torch.testing.assert_close(derivative, wanted, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(value.float(), model(*primals), rtol=2e-2, atol=2e-2)


@each_route
def test_under_autocast_a_bfloat16_state_is_widened_for_the_derivative(route):
    weight = normal(7, 3, 3).float()

    def model(z, t, s):
        return torch.tanh(z @ weight) * (1 + t)[:, None]

    (z, t, s), (v, one, zero) = ([x.float() for x in group] for group in arguments(0))
    z, v = z.bfloat16(), v.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        derivative = route(model, (z, t, s), (v, one, zero))[1]
    assert derivative.dtype == torch.float32
    wanted = exact(model, (z.float(), t, s), (v.float(), one, zero))
    torch.testing.assert_close(derivative, wanted, rtol=1e-2, atol=1e-2)


@each_route
def test_the_derivative_at_a_bfloat16_state_is_right_or_refused(route):
    """The model computes in float32 whatever comes; a step of 0.005 must not drown unseen in the
    rounding of the state.
    """
    weight = normal(7, 3, 3).float()

    def model(z, t, s):
        return torch.tanh(z.float() @ weight) * (1 + t)[:, None]

    (z, t, s), (v, one, zero) = ([x.float() for x in group] for group in arguments(0))
    z, v = z.bfloat16(), v.bfloat16()
    wanted = exact(model, (z.float(), t, s), (v.float(), one, zero))
    try:
        derivative = route(model, (z, t, s), (v, one, zero))[1]
    except InputError:
        return
    torch.testing.assert_close(derivative.float(), wanted, rtol=5e-2, atol=5e-2)


# --- what is refused
# -------------------------------------------------------------------------------------------------


@each_route
def test_as_many_tangents_as_primals_are_needed(route):
    with pytest.raises(InputError, match="3 primals and 2 tangents"):
        route(smooth, *(group[: 3 - i] for i, group in enumerate(arguments(0))))


@each_route
def test_a_model_that_returns_no_tensor_is_refused(route):
    with pytest.raises(InputError, match="tuple"):
        route(lambda z, t, s: (z, t), *arguments(0))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"step": 0}, "step = 0"),
        ({"step": -1e-3}, "step = -0.001"),
        ({"step": 0.3}, "step = 0.3"),
        ({"step": math.nan}, "step = nan"),
        ({"order": 3}, "order = 3"),
        ({"order": 0}, "order = 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_their_values(options, named):
    with pytest.raises(InputError, match=named):
        FiniteDifference(**options)


def test_a_misspelt_keyword_is_a_type_error():
    with pytest.raises(TypeError):
        FiniteDifference(steps=0.1)


@each_route
def test_a_route_survives_pickling(route):
    assert pickle.loads(pickle.dumps(route)) == route


# --- shared primal
# -------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.lists(st.booleans(), min_size=5, max_size=5))
def test_shared_primal_calls_the_model_once_whatever_the_rows(mask):
    primals, tangents = arguments(1)
    calls = []

    def watched(z, t, s):
        calls.append(len(z))
        return smooth(z, t, s)

    _, derivative = SharedPrimal()(watched, primals, tangents, rows=torch.tensor(mask))
    assert calls == [5]
    wanted = torch.where(torch.tensor(mask)[:, None], exact(smooth, primals, tangents), 0.0)
    torch.testing.assert_close(derivative, wanted, rtol=1e-12, atol=1e-12)


def test_a_rule_of_ones_own_is_as_the_docs_say():
    page = (Path(__file__).parent.parent / "docs" / "pages" / "derivatives.md").read_text()
    code = re.search(r"## A rule for a new function.*?```python\n(.*?)```", page, re.S).group(1)
    before = dict(rules.RULES)
    try:
        exec(code, {})
        assert rules.RULES.keys() - before.keys() == {"logit"}
        primals, tangents = arguments(2)

        def model(z, t, s):
            return torch.logit(torch.sigmoid(z) * 0.9) * t[:, None]

        derivative = SharedPrimal()(model, primals, tangents)[1]
        torch.testing.assert_close(
            derivative, exact(model, primals, tangents), rtol=1e-11, atol=1e-11
        )
    finally:
        rules.RULES.clear()
        rules.RULES.update(before)


class Lazy(torch.nn.Module):
    """A model that builds a table in its first call, and keeps it."""

    def __init__(self, fill, mixing):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.fill, self.mixing = torch.nn.Linear(3, 3).double(), fill, mixing
        self.table = None

    def forward(self, z, t, s):
        if self.table is None:
            self.table = self.fill()
        if self.mixing:
            z = z - z.mean(0)
        return torch.tanh(self.linear(z * self.table)) * (1 + t - s)[:, None]


def filled(write):
    """Return what makes zeros and fills them."""

    def fill():
        table = torch.zeros(3, dtype=torch.float64)
        write(table, torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
        return table

    return fill


def _one_by_one(table, values):
    for i in range(3):
        table[i] = values[i]


FILLS = {
    "copied": filled(lambda table, values: table.copy_(values)),
    "narrowed": filled(lambda table, values: table.narrow(0, 1, 2).copy_(values[1:])),
    "one by one": filled(_one_by_one),
    "as data": filled(lambda table, values: table.data.copy_(values)),
    "of another": lambda: torch.ones(3, dtype=torch.float64).cumsum(0).neg_().add_(1),
}


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
@pytest.mark.parametrize("mixing", [False, True], ids=["apart", "mixing"])
@pytest.mark.parametrize(
    "loss_fn",
    [
        PixelMeanFlowLoss(),
        ImprovedMeanFlowLoss(),
        MeanFlowLoss(gap=0.5),
        MeanFlowLoss(derivative=ForwardMode()),
        MeanFlowLoss(derivative=FiniteDifference()),
        MeanFlowLoss(),
    ],
    ids=lambda loss_fn: f"{type(loss_fn).__name__}-{type(loss_fn.derivative).__name__}",
)
def test_a_table_that_a_model_builds_in_its_first_call_is_kept(loss_fn, mixing, fill):
    """Where the first call was one without a trace, the table was zeros from then on: so were
    parameters that FSDP2 pads in the first call, of an older torch.
    """
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    times = {"t": torch.full((4,), 0.8).double(), "s": torch.full((4,), 0.3).double()}
    lazy, built = Lazy(fill, mixing), Lazy(fill, mixing)
    built.table = fill()
    for _ in range(2):
        found = loss_fn(lazy, z, noise=z.flip(0), **times).loss
        torch.testing.assert_close(found, loss_fn(built, z, noise=z.flip(0), **times).loss)
    torch.testing.assert_close(lazy.table, fill())
