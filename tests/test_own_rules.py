"""Functions of a model's own that have a rule are met as one, and are right however they are
called.
"""

import functools
from typing import ClassVar

import pytest
import torch
from comparison import by_differences, left_in_cycles
from programs import WHICH, choose
from strategies import normal
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flowspace import DerivativeError, ForwardMode, SharedPrimal
from flowspace.derivatives import in_steps, linear_map, with_rule
from flowspace.derivatives.rules import RULES
from flowspace.derivatives.shared_primal import carrier, own_functions

SIZE = 6
WEIGHT = normal(0, SIZE, SIZE)
PRIMALS = normal(1, 4, SIZE), torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
TANGENTS = normal(2, 4, SIZE), torch.ones(4, dtype=torch.float64)


@pytest.fixture(autouse=True)
def first_pass(monkeypatch):
    """Each test is the first that meets a function."""
    monkeypatch.setattr(own_functions, "_compared", set())


@linear_map
def turned(x, cosine, sine):
    return x * cosine + x.roll(1, -1) * sine


@linear_map
def apart(x, parts):
    x = x.unflatten(1, (parts, -1)).permute(1, 0, 2)
    return x[0], x[1:]


@linear_map
def scaled(x, weights):
    return x * weights[0] - x.flip(-1) * weights[1]


def _of_product(call, x, y):
    if len(call.duals) < 2:
        return NotImplemented
    return x.tangent * y.rows + x.rows * y.tangent


@with_rule(_of_product)
def product(x, y):
    return x * y


def _of_gated(call, x, y):
    return x.tangent * y.rows.sin() + x.rows * y.rows.cos() * y.tangent


@with_rule(_of_gated)
def gated(x, y):
    return x * y.sin()


@with_rule(lambda call, x, y: x.tangent * y.rows)
def half_of_product(x, y):
    return x * y


@linear_map
def mixed(x):
    return x - x.mean(0)


@linear_map
def squared(x):
    return x.square()


@linear_map
def shifted(x):
    return x + 1


@linear_map
def cut(x):
    return x.detach()


@in_steps
def turned_unit(run, x, first, weights):
    """Of functions of torch, one of which has a rule that evaluates it, and of our own."""
    unit = run(torch.rms_norm, x, (SIZE,), None, 1e-6)
    cosine, sine = run(torch.cos, first), run(torch.stack, weights)
    return run(torch.tanh, run(turned, unit, cosine, sine[0]))


@in_steps
def parts_in_steps(run, x):
    first, rest = run(apart, run(torch.sin, x), 3)
    last = run(turned_unit, x, WEIGHT[0], (WEIGHT[1], WEIGHT[2]))
    return first, run(torch.square, rest), last


@in_steps
def nested_steps(run, x, first, weights):
    return run(product, run(torch.sin, x), run(turned_unit, x, first, weights))


@in_steps
def mixed_in_steps(run, x):
    return run(torch.tanh, run(mixed, run(torch.sin, x)))


@in_steps
def averaged_in_steps(run, x):
    """The last step of some finds no tangent on some rows."""
    wave = run(torch.sin, x)
    return run(torch.sub, wave, run(torch.mean, wave, 0, True))


@torch.no_grad()
def table(w):
    return w[0].cos()


def doubled(function):
    return functools.wraps(function)(lambda *args: 2 * function(*args))


@in_steps
def with_decorated_steps(run, x, w):
    factor = run(torch.add, run(table, w), run(doubled(torch.sin), w[1]))
    return run(torch.mul, run(torch.sin, x), factor)


def _of_numbered(call, x):
    return [2 * x.tangent]


@with_rule(_of_numbered)
def numbered(x):
    return torch.arange(x.shape[1]), 2 * x


@in_steps
def numbered_in_steps(run, x):
    order, twice = run(numbered, x)
    return run(torch.index_select, twice, 1, order)


@in_steps
def branching(run, x):
    if isinstance(x, torch.Tensor):
        return run(torch.sin, x)
    return run(torch.add, run(torch.sin, x), 1.0)


@in_steps
def by_its_shape(run, x):
    return run(torch.mul, x, x.shape[1])


@in_steps
def in_a_list(run, x):
    return [run(torch.sin, x)]


@in_steps
def with_a_partial(run, x):
    return run(functools.partial(torch.sin), x)


@in_steps
def squared_in_steps(run, x):
    return run(squared, run(torch.sin, x))


@in_steps
def by_a_function_without_rule(run, x):
    return run(torch.expm1, x)


@in_steps
def with_an_operator(run, x):
    return run(torch.sin, x) + 1


@in_steps
def with_a_method(run, x):
    return run(torch.sin, x).tanh()


@in_steps
def with_a_function(run, x):
    return torch.tanh(run(torch.sin, x))


def heads(z, t, w):
    first, rest = apart((z @ w).sin(), 3)
    return first.tanh() * rest.sum(0).sin() * t[:, None]


def writing(z, t, w):
    first, rest = apart((z @ w).sin(), 3)
    first.mul_(t[:, None])
    return first + rest.square().sum(0)


def parted(z, t, w):
    first, rest, last = parts_in_steps((z @ w) * t[:, None])
    return last + (first + rest.sum(0)).repeat(1, 3)


MODELS = {
    "one argument moves": lambda z, t, w: turned((z @ w).sin(), WEIGHT[0], WEIGHT[1]).tanh(),
    "the others move": lambda z, t, w: turned((z @ w).sin(), t[:, None].cos(), t[:, None].sin()),
    "only the others move": lambda z, t, w: turned(w[:4], t[:, None].cos(), t[:, None]) @ w,
    "the batch moves": heads,
    "outputs are written to": writing,
    "weights in a tuple": lambda z, t, w: scaled((z @ w) * t[:, None], (w[0], w[1])).sin(),
    "a rule of two": lambda z, t, w: product((z @ w).sin(), z * t[:, None]),
    "a rule of two where one moves": lambda z, t, w: product((z @ w) * t[:, None], w[:4]),
    "nothing moves": lambda z, t, w: z @ turned(w, WEIGHT[0], WEIGHT[1]) * t[:, None],
    "a checkpoint": lambda z, t, w: checkpoint(
        lambda h: gated(turned(h, WEIGHT[0], WEIGHT[1]).tanh(), h), z @ w, use_reentrant=False
    ),
    "a checkpoint where another moves": lambda z, t, w: checkpoint(
        lambda h: turned(h.sin(), t[:, None], WEIGHT[1]).tanh(), z @ w, use_reentrant=False
    ),
    "by name": lambda z, t, w: turned(x=(z @ w) * t[:, None], cosine=w[0], sine=WEIGHT[1]),
    "rows mix": lambda z, t, w: mixed((z @ w).sin() * t[:, None]).tanh(),
    "in steps": lambda z, t, w: turned_unit((z @ w) * t[:, None], w[2], (w[0], WEIGHT[1])).sin(),
    "in steps, where others move": lambda z, t, w: turned_unit(z @ w, t[:, None], (w[0], w[1])),
    "in steps, where only others move": lambda z, t, w: (
        turned_unit(w[:4], t[:, None], (w[0], w[1])) * z
    ),
    "in steps, with several outputs": parted,
    "in steps within others": lambda z, t, w: nested_steps(
        (z @ w) * t[:, None], w[2], (w[0], w[1])
    ),
    "in steps in a checkpoint": lambda z, t, w: checkpoint(
        lambda h: turned_unit(h, w[2], (w[0], w[1])).tanh(), z @ w, use_reentrant=False
    ),
    "in steps in a checkpoint, where others move": lambda z, t, w: checkpoint(
        lambda h: turned_unit(h, t[:, None], (w[0], w[1])).tanh(), z @ w, use_reentrant=False
    ),
    "in steps in a checkpoint, where rows mix": lambda z, t, w: checkpoint(
        lambda h: averaged_in_steps(h).tanh(), (z @ w) * t[:, None], use_reentrant=False
    ),
    "in steps, with a step that another function made": lambda z, t, w: with_decorated_steps(
        (z @ w) * t[:, None], w
    ),
    "in steps, with whole numbers beside": lambda z, t, w: numbered_in_steps(z @ w) * t[:, None],
    "in steps, by name": lambda z, t, w: turned_unit(
        x=(z @ w) * t[:, None], first=w[2], weights=(w[0], w[1])
    ),
    "in steps, where rows mix": lambda z, t, w: mixed_in_steps((z @ w) * t[:, None]),
}


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", MODELS)
def test_value_gradient_and_derivative_are_right(name, which):
    rows = choose(4, which)
    weight = WEIGHT.clone().requires_grad_()

    def fn(z, t):
        return MODELS[name](z, t, weight)

    exact = by_differences(fn, PRIMALS, TANGENTS)
    plain = fn(*PRIMALS)
    for _ in range(3):  # the tangents of both ways are compared in the first pass alone
        value, derivative = SharedPrimal()(fn, PRIMALS, TANGENTS, rows)
        assert torch.equal(value, plain)
        found, wanted = (
            torch.autograd.grad(x.sin().sum(), weight)[0] for x in (value, fn(*PRIMALS))
        )
        torch.testing.assert_close(found, wanted)
        kept = exact if rows is None else exact * rows[:, None]
        torch.testing.assert_close(derivative, kept, rtol=1e-6, atol=1e-7)


def test_a_function_in_which_rows_mix_is_found_where_all_were_asked_for_before():
    """On all rows its rule is right."""

    def fn(z, t):
        return mixed((z @ WEIGHT).sin() * t[:, None]).tanh()

    exact = by_differences(fn, PRIMALS, TANGENTS)
    for rows in (None, choose(4, "half"), None):
        derivative = SharedPrimal()(fn, PRIMALS, TANGENTS, rows)[1]
        kept = exact if rows is None else exact * rows[:, None]
        torch.testing.assert_close(derivative, kept, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("function", [squared, shifted, cut, half_of_product])
def test_a_rule_that_is_wrong_is_refused_by_name(function):
    def fn(z, t):
        given = [(z @ WEIGHT).sin()]
        if function is half_of_product:
            given.append(z)
        return function(*given) + t[:, None]

    for _ in range(2):
        with pytest.raises(DerivativeError, match=f"from the rule of {function.__name__}"):
            SharedPrimal()(fn, PRIMALS, TANGENTS)
    exact = by_differences(fn, PRIMALS, TANGENTS)
    if function is not cut:
        found = ForwardMode()(fn, PRIMALS, TANGENTS)[1]
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7)


STEPS = {
    squared_in_steps: "from the rule of squared,",
    by_a_function_without_rule: "got expm1 as a step of by_a_function_without_rule",
    with_an_operator: r"TypeError from with_an_operator.*hand what moves to run",
    with_a_method: r"AttributeError from with_a_method.*hand what moves to run",
    branching: "got another value of branching,",
    by_its_shape: r"AttributeError from by_its_shape.*hand what moves to run alone",
    in_a_list: r"got list from in_a_list.*return a tensor",
    with_a_partial: "as a step of with_a_partial",
    with_a_function: r"TypeError from with_a_function.*hand what moves to run",
}


@pytest.mark.parametrize("function", STEPS)
def test_a_step_that_is_none_or_wrong_is_refused_by_name(function):
    with pytest.raises(DerivativeError, match=STEPS[function]):
        SharedPrimal()(lambda z, t: first_of(function(z)) * t[:, None], PRIMALS, TANGENTS)


def first_of(found):
    return found[0] if isinstance(found, list) else found


def test_steps_are_not_met_one_by_one(monkeypatch):
    """One alias is made for their last, and the steps are not seen."""
    made, wrap = [], carrier.Carrier.wrap

    def counted(self, primal, *more):
        made.append(primal)
        return wrap(self, primal, *more)

    def last(z, t):
        return turned_unit(z, t.detach()[:, None], (WEIGHT[0], WEIGHT[1]))

    SharedPrimal()(last, PRIMALS, TANGENTS)
    monkeypatch.setattr(carrier.Carrier, "wrap", counted)
    SharedPrimal()(last, PRIMALS, TANGENTS)
    assert len(made) == 3  # of z, of t and of the last step


def model(z, t):
    return turned((z @ WEIGHT).sin() * t[:, None], WEIGHT[0], WEIGHT[1]).tanh()


def test_it_is_met_as_one(monkeypatch):
    exact = SharedPrimal()(model, PRIMALS, TANGENTS)[1]

    def refused(*_, **__):
        raise AssertionError("the function was entered")

    monkeypatch.setitem(RULES, "roll", refused)
    assert torch.equal(SharedPrimal()(model, PRIMALS, TANGENTS)[1], exact)


def nested(z, t):
    return nested_steps(z * t[:, None], WEIGHT[0], (WEIGHT[1], WEIGHT[2]))


def in_steps_alone(z, t):
    return turned_unit((z @ WEIGHT).sin() * t[:, None], WEIGHT[0], (WEIGHT[1], WEIGHT[2]))


WITH_RULES = {"a rule": model, "steps": in_steps_alone}

MODES = {
    "a device": lambda: torch.device("cpu"),
    "a counter of operations": lambda: FlopCounterMode(display=False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no gradient": torch.no_grad,
}


@pytest.mark.parametrize("with_rules", WITH_RULES.values(), ids=WITH_RULES)
@pytest.mark.parametrize("name", MODES)
def test_it_is_right_within_modes_of_the_user(name, with_rules):
    exact = SharedPrimal()(with_rules, PRIMALS, TANGENTS)
    with MODES[name]():
        found = SharedPrimal()(with_rules, PRIMALS, TANGENTS)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, check_dtype=False)


@pytest.mark.parametrize("with_rules", [model, in_steps_alone, nested])
def test_nothing_waits_for_the_collector_of_cycles(with_rules):
    rows = choose(4, "half")
    assert not left_in_cycles(lambda: SharedPrimal()(with_rules, PRIMALS, TANGENTS, rows))


class Noting(TorchFunctionMode):
    """Notes the functions that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


class NotingOperators(TorchDispatchMode):
    """Notes the operators that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_rules", WITH_RULES.values(), ids=WITH_RULES)
@pytest.mark.parametrize("mode", [Noting, NotingOperators])
def test_a_mode_of_the_user_sees_what_is_called(mode, with_rules):
    SharedPrimal()(with_rules, PRIMALS, TANGENTS)  # compares, and so calls once more
    with mode() as plain:
        with_rules(*PRIMALS)
    with mode() as beside:
        SharedPrimal()(with_rules, PRIMALS, TANGENTS)
    assert "roll" in plain.seen and set(plain.seen) <= set(beside.seen)


class Marked(torch.Tensor):
    """A tensor whose functions are noted."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs)


def marked_turned(x):
    return turned(x, WEIGHT[0].as_subclass(Marked), WEIGHT[1])


def marked_in_steps(x):
    return turned_unit(x, WEIGHT[0], (WEIGHT[1].as_subclass(Marked), WEIGHT[2]))


@pytest.mark.parametrize("counted", [marked_turned, marked_in_steps])
def test_a_subclass_of_tensor_sees_what_is_called(counted):
    names, exact = [], by_differences(model_of(counted), PRIMALS, TANGENTS)
    for run in (
        lambda: model_of(counted)(*PRIMALS),
        lambda: SharedPrimal()(model_of(counted), PRIMALS, TANGENTS),
    ):
        Marked.seen.clear()
        out = run()
        names.append([name for name in Marked.seen if name in ("mul", "add", "tanh")])
    out, exact = (x.as_subclass(torch.Tensor) for x in (out[1], exact))
    torch.testing.assert_close(out, exact, rtol=1e-6, atol=1e-7)
    assert names[0] == names[1] and set(names[0]) == {"mul", "add", "tanh"}


def model_of(last):
    return lambda z, t: last((z @ WEIGHT).sin() * t[:, None]).tanh()


@pytest.mark.parametrize("with_rules", WITH_RULES.values(), ids=WITH_RULES)
@pytest.mark.parametrize("which", [None, "half"])
def test_a_compiled_model_is_captured_with_what_it_calls(which, with_rules):
    rows = choose(4, which)
    compiled = torch.compile(with_rules, backend="aot_eager", fullgraph=True)
    exact = SharedPrimal()(with_rules, PRIMALS, TANGENTS, rows)
    found = SharedPrimal()(compiled, PRIMALS, TANGENTS, rows)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other)


def test_it_keeps_its_name_and_is_a_plain_function_elsewhere():
    assert turned.__name__ == "turned"
    x = normal(3, 4, SIZE)
    exact = x * WEIGHT[0] + x.roll(1, -1) * WEIGHT[1]
    assert torch.equal(turned(x, WEIGHT[0], WEIGHT[1]), exact)
    tangent = torch.func.jvp(lambda x: turned(x, WEIGHT[0], WEIGHT[1]), (x,), (x,))[1]
    assert torch.equal(tangent, exact)
