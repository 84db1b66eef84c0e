"""Text is read over a whitelist; formulas, callables and their derivatives agree."""

import math
import operator
import pickle
import time

import mpmath
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import mixed_callables, mixed_texts, parameters

import flowspace.expressions
from flowspace import (
    ExpressionError,
    FlowspaceError,
    LinearSchedule,
    MatchedStatistic,
    PolynomialSchedule,
    Schedule,
    Statistic,
    check_criteria,
    time_functions,
)
from flowspace.formulas import (
    S,
    T,
    expanded_terms,
    has_values,
    parse,
    precise_values,
    random_points,
    readable,
    tidy,
)
from flowspace.time_functions import TimeFunction
from flowspace.typeset import latex_of, text_of

HOSTILE = {
    "import": "__import__('os')",
    "import inside": "t + __import__('os').system('true')",
    "attribute": "t.real",
    "attribute of number": "(1).__class__",
    "dunder": "().__class__.__base__.__subclasses__()",
    "lambda": "lambda: t",
    "call of lambda": "(lambda t: t)(t)",
    "eval": "eval('1')",
    "open": "open('/etc/passwd')",
    "walrus": "(u := t)",
    "subscript": "t[0]",
    "text": "'t'",
    "bytes": "b'9'*9",
    "list": "[t for t in (1, 2)]",
    "comparison": "t < s",
    "condition": "t if t else s",
    "boolean": "True",
    "complex": "1j*t",
    "none": "None",
    "ellipsis": "...",
    "f-string": "f'{t}'",
    "keyword": "exp(x=t)",
    "star": "exp(*t)",
    "two arguments": "log(t, 2)",
    "unknown function": "gamma(t)",
    "unknown name": "u",
    "caret": "t^2",
    "floor division": "t//s",
    "modulo": "t % s",
    "shift": "1 << 999999999",
    "matrix product": "t @ s",
    "statement": "t; s",
    "assignment": "t = 1",
    "tower": "9**9**9**9",
    "left tower": "((9**60)**60)**60",
    "power": "t**65",
    "negative power": "t**-65",
    "number power": "2**1000000000",
    "hidden power": "2**(t-t+10**9)",
    "hidden product": "2**(60*60*60*60 + t - t)",
    "hidden exp": "exp(1000000000*log(2))",
    "exp": "exp(1000000)",
    "exp of exp": "exp(exp(exp(exp(9))))",
    "product beside t": "2**(60*60*60*60*60*60*60*60*t)",
    "product beside s": "(1 + t)**(60*60*60*60*60*s)",
    "log in exponent": "2**(log(2)*t)",
    "power of exp": "exp(60)**(60*60)",
    "length": "t" + "+t" * 500,
    "deep": "(" * 400 + "t" + ")" * 400,
    "deep call": "sin(" * 180 + "t" + ")" * 180 + "x",
    "signs": "-" * 999 + "t)",
    "zero": "1/0",
    "zero over zero": "0/0",
    "zero power": "0**-1",
    "logarithm of zero": "log(0)",
    "cotangent of zero": "cot(0)",
    "root of a negative": "sqrt(-1)",
    "infinite": "1e999",
    "empty": "",
    "blank": "   ",
    "null byte": "t\0",
    "unclosed": "(t",
    "comment": "# t",
    "nested functions": "cos(" * 150 + "t" + ")" * 150,
    "nested logarithms": "log(1+" * 100 + "t" + ")" * 100,
    "continued fraction": "1/(1+" * 140 + "t" + ")" * 140,
    "nested products": "(" * 100 + "t" + "+1)*t" * 100,
    "root of a negative number": "t*(-8)**(1/3)",
    "large argument": "sin(exp(1e300*t))",
    "large number": "1" + "0" * 400 + "*t",
    "power of a large number": "(1e300)**60*t",
    "small number": "1e-300*1e-300*t",
    "keyword beside an argument": "exp(t, base=2)",
    "power of a power": "((1 + t)**60)**60",
    "powers with a time between": "(((1 + t)**60)**s)**60",
    "negative exponent by a sum": "t**(-60 - 60)",
    "exp of exp of a time": "exp(exp(t))",
    "exp of a logarithm": "exp(log(t))",
    "large argument of exp": "exp(1e7*t)",
    "large angle": "sin(1e13*t)",
    "large angle but at one time": f"sin(1e15*(t - {random_points(3)[0][0]!r}))",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_no_formula_is_refused_and_quickly(text):
    start = time.process_time()
    with pytest.raises(ExpressionError):
        parse(text)
    assert time.process_time() - start < 1


@given(number=st.integers(2**60, 10**60), sign=st.sampled_from([1, -1]))
@settings(max_examples=20, deadline=None)
def test_whole_numbers_of_more_than_64_bits_are_numbers_like_others(number, sign):
    t = torch.tensor([0.3], dtype=torch.float64)
    value = TimeFunction(f"{sign * number}*t + sqrt(t)")(t)
    assert math.isclose(float(value), sign * number * 0.3 + math.sqrt(0.3), rel_tol=1e-15)


NO_VALUE = {
    "hidden zero": "1/log(sin(1)**2 + cos(1)**2)",
    "hidden zero beside t": "t + 1/log(sin(1)**2 + cos(1)**2)",
    "overflow": "t*exp(700)*exp(700)",
    "root of a negative": "t*(-8)**(1/3)",
    "logarithm of a negative": "t*log(cos(2))",
}


@pytest.mark.parametrize("text", NO_VALUE.values(), ids=NO_VALUE.keys())
def test_a_constant_without_a_value_is_one_error_wherever_text_is_taken(text):
    with pytest.raises(ExpressionError, match="is not real"):
        parse(text)
    with pytest.raises(ExpressionError):
        TimeFunction(text)
    with pytest.raises(ExpressionError):
        Schedule(text, "t")
    with pytest.raises(ExpressionError):
        Statistic(text, "-1")
    with pytest.raises(ExpressionError):
        Statistic.from_kappa(LinearSchedule(), text.replace("t*", "s*"), "-1")


@pytest.mark.parametrize("depth", [1, 10, 40])
def test_some_nesting_is_allowed(depth):
    text = "cos(" * depth + "t" + ")" * depth
    value = 0.3
    for _ in range(depth):
        value = math.cos(value)
    times = torch.tensor([0.3], dtype=torch.float64)
    assert float(TimeFunction(text)(times)) == pytest.approx(value, rel=1e-12)


def test_more_is_refused_and_sums_and_products_are_no_nesting():
    with pytest.raises(ExpressionError, match="nested more than 40 deep"):
        parse("cos(" * 41 + "t" + ")" * 41)
    assert parse("*".join(["t", "s"] * 100)) == T**100 * S**100
    assert parse("t" + " - s" * 101) == T - 101 * S


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("exp(t**2)", sympy.exp(T**2)),
        ("exp(1e5*t)", sympy.exp(100_000 * T)),
        ("sin(1e11*t)", sympy.sin(10**11 * T)),
        ("+t", T),
    ],
)
def test_what_is_far_from_a_limit_is_read(text, wanted):
    assert parse(text) == wanted


def test_a_divisor_is_zero_where_30_digits_of_it_are():
    """sqrt(2) less its first 39 digits, and less its first 20."""
    with pytest.raises(ExpressionError, match="divides by zero"):
        parse("t/(sqrt(2) - 141421356237309504880168872420969807857/10**38)")
    assert has_values(parse("t/(sqrt(2) - 14142135623730950488/10**19)"))


def test_nothing_is_evaluated(tmp_path):
    trace = tmp_path / "trace"
    for text in (
        f"open({str(trace)!r}, 'w')",
        f"exp(open({str(trace)!r}, 'w'))",
        f"t + [open({str(trace)!r}, 'w')][0]",
    ):
        with pytest.raises(ExpressionError):
            parse(text)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_hostile_text_is_refused_wherever_text_is_taken(name):
    with pytest.raises(ExpressionError, match="__import__"):
        Schedule(**({"alpha": "1 - t", "beta": "t"} | {name: "__import__('os')"}))
    with pytest.raises(ExpressionError, match="__import__"):
        Statistic(
            **(
                {"gamma": "1", "delta": "-1"}
                | {{"alpha": "gamma", "beta": "delta"}[name]: "__import__('os')"}
            )
        )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("t^2", r"\*\*"),
        ("u + t", "'u'"),
        ("t**65", "limit is 64"),
        ("exp(1000)", "limit is 700"),
        ("t" + "+t" * 500, "1001 characters"),
        ("t.real", "t.real"),
        ("2**(2**t)", "power tower"),
        ("True", "'True' is not allowed; only numbers"),
        ("1e999", r"'1e309' is not allowed \(a number is at most 1.8e308\)"),
        ("gamma(t)", r"'gamma\(t\)' is not allowed; only"),
        ("s(1 - t)", r"not allowed \(products are written \*\)"),
        ("t^s", r"not allowed \(powers are written \*\*\)"),
        ("1^t", r"not allowed \(powers are written \*\*\)"),
        ("u" * 90, f"^'{'u' * 80}'\\.\\.\\.: "),
    ],
)
def test_a_refusal_names_what_came_and_what_is_allowed(text, named):
    with pytest.raises(ExpressionError, match=named):
        parse(text)


def test_an_expression_error_is_a_value_error_of_flowspace():
    assert issubclass(ExpressionError, FlowspaceError) and issubclass(FlowspaceError, ValueError)


@pytest.mark.parametrize("power", [-64, -1, 0, 0.5, 1, 64])
def test_a_constant_exponent_up_to_64_is_read(power):
    assert parse(f"t**{power}") == T ** sympy.Rational(str(power))


def test_a_text_of_1000_characters_is_read():
    assert parse(" + ".join(["t"] * 100).ljust(1000)) == 100 * T


@st.composite
def formulas(draw, depth=3):
    """A text and the plain Python function that it means."""
    kind = draw(
        st.sampled_from(
            ["t", "s", "number"] + ["+", "-", "*", "/", "**", "call", "sign"] * (depth > 0)
        )
    )
    if kind in ("t", "s"):
        return kind, (lambda t, s: t) if kind == "t" else (lambda t, s: s)
    if kind == "number":
        number = draw(st.sampled_from([1, 2, 0.5, 0.1, 3e-2, math.pi]))
        return "pi" if number == math.pi else repr(number), lambda t, s: number
    text, value = draw(formulas(depth - 1))
    if kind == "call":
        name = draw(st.sampled_from(["exp", "log", "sqrt", "sin", "cos", "tan", "cot"]))
        outer = {"cot": lambda x: 1 / math.tan(x)}.get(name) or getattr(math, name)
        return f"{name}(1 + ({text})**2/9)", lambda t, s: outer(1 + value(t, s) ** 2 / 9)
    if kind == "sign":
        return f"-({text})", lambda t, s: -value(t, s)
    if kind == "**":
        return f"({text})**2", lambda t, s: value(t, s) ** 2
    other_text, other = draw(formulas(depth - 1))
    operations = {
        "+": lambda t, s: value(t, s) + other(t, s),
        "-": lambda t, s: value(t, s) - other(t, s),
        "*": lambda t, s: value(t, s) * other(t, s),
        "/": lambda t, s: value(t, s) / (2 + other(t, s) ** 2),
    }
    return (
        f"({text})/(2 + ({other_text})**2)" if kind == "/" else f"({text}) {kind} ({other_text})",
        operations[kind],
    )


@settings(max_examples=60)
@given(formulas(), st.floats(0.1, 0.9), st.floats(0.1, 0.9))
def test_a_text_means_what_python_means_by_it(formula, a, b):
    text, meaning = formula
    try:
        function = TimeFunction(text, 2)
    except ExpressionError as error:
        assert "power tower" in str(error) or "limit" in str(
            error
        )  # exp of exp, exp of a large number
        return
    t_, s_ = (torch.tensor([time], dtype=torch.float64) for time in (max(a, b), min(a, b) / 2))
    wanted = meaning(float(t_), float(s_))
    assert float(function(t_, s_)) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@settings(max_examples=30)
@given(parameters, st.floats(0.02, 0.98))
def test_symbolic_derivative_is_autodiff_is_finite_difference(choice, at):
    time_ = torch.tensor(at, dtype=torch.float64)
    h = 1e-5
    for text, function in zip(mixed_texts(*choice), mixed_callables(*choice), strict=True):
        formula, black_box = TimeFunction(text), TimeFunction(function)
        assert formula.expression is not None and black_box.expression is None
        symbolic, automatic = formula.dot(time_), black_box.dot(time_)
        through_formula = torch.func.jvp(formula, (time_,), (torch.ones_like(time_),))[1]
        difference = (function(time_ + h) - function(time_ - h)) / (2 * h)
        torch.testing.assert_close(symbolic, automatic, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(symbolic, through_formula, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(symbolic, difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (5,)])
@pytest.mark.parametrize(
    "source", ["1 - t", "2", 2, sympy.Integer(3), lambda t: 1 - t, lambda t: 2.0]
)
def test_shape_and_dtype_of_the_times_come_out(source, shape, dtype):
    function = TimeFunction(source)
    times = torch.full(shape, 0.3, dtype=dtype)
    for value in (function(times), function.dot(times)):
        assert value.shape == times.shape and value.dtype == dtype


def test_symbols_of_the_caller_are_understood_whatever_their_assumptions():
    plain, real = sympy.Symbol("t"), sympy.Symbol("s", real=True)
    assert TimeFunction(plain + real, 2).expression == T + S


@pytest.mark.parametrize("source", [sympy.Symbol("u"), None, [1], True, object()])
def test_a_source_of_another_kind_is_refused(source):
    with pytest.raises(ExpressionError):
        TimeFunction(source)


@pytest.mark.parametrize("source", ["t + s", S, "s"])
def test_a_function_of_t_alone_may_not_mention_s(source):
    with pytest.raises(ExpressionError, match="depends on s"):
        TimeFunction(source)


REMOVABLE = {
    "sin(t - s)/(t - s)": ("s = t", lambda t, s: torch.ones_like(t)),
    "(exp(t) - exp(s))/(t - s)": ("s = t", lambda t, s: torch.exp(t)),
    "sin(pi*s/2)/s": ("s = 0", lambda t, s: torch.full_like(t, math.pi / 2)),
    "s*cot(s)*t": ("s = 0", lambda t, s: t),
    "log(t)/(1 - t)*s": ("t = 1", lambda t, s: -s),
    "(1 - cos(t - s))/(t - s)**2": ("s = t", lambda t, s: torch.full_like(t, 0.5)),
}


@pytest.mark.parametrize("text", REMOVABLE)
def test_a_removable_singularity_on_an_edge_is_filled_with_its_limit(text):
    edge, limit = REMOVABLE[text]
    t_ = torch.tensor([0.3, 0.8, 1.0 if edge == "t = 1" else 0.9], dtype=torch.float64)
    s_ = {"s = t": t_, "s = 0": torch.zeros_like(t_), "t = 1": t_ / 3}[edge]
    t_ = torch.ones_like(t_) if edge == "t = 1" else t_
    torch.testing.assert_close(
        TimeFunction(text, 2)(t_, s_), limit(t_, s_), rtol=1e-12, atol=1e-12
    )


def test_an_infinite_limit_is_not_filled():
    t_ = torch.tensor([0.5])
    assert not TimeFunction("1/(t - s)", 2)(t_, t_).isfinite().any()


LEAVES = {
    "1 + t": (1, lambda t: 1 + t),
    "cos(t)": (1, lambda t: t.cos() if isinstance(t, torch.Tensor) else jax_cos(t)),
    "t**2 + 2": (1, lambda t: t**2 + 2),
    "t*s + 1": (2, lambda t, s: t * s + 1),
    "3 - s": (2, lambda t, s: 3 - s),
}
OPERATIONS = (operator.add, operator.sub, operator.mul, operator.truediv)


def jax_cos(time):
    return pytest.importorskip("jax").numpy.cos(time)


@st.composite
def leaves(draw):
    """A time function of a formula or a callable, and its values at (t, s)."""
    text = draw(st.sampled_from(sorted(LEAVES)))
    arity, call = LEAVES[text]
    function = TimeFunction(text if draw(st.booleans()) else call, arity)
    if arity == 2:
        return function, call
    if draw(st.booleans()):
        return function, lambda t, s: call(t)
    return function.at(S), lambda t, s: call(s)


@st.composite
def arithmetic(draw, depth=2):
    """Time functions and numbers with operations between them, and the pointwise values."""
    left, left_values = draw(leaves() if depth == 0 else arithmetic(depth - 1))
    if draw(st.integers(0, 3)) == 0:
        return -left, lambda t, s: -left_values(t, s)
    operation = draw(st.sampled_from(OPERATIONS))
    if draw(st.booleans()):
        right, right_values = draw(leaves())
    else:
        number = draw(st.sampled_from([2, 0.5, -3]))
        right, right_values = number, lambda t, s: number
    if draw(st.booleans()) and operation is not operator.truediv:
        return operation(right, left), lambda t, s: operation(
            right_values(t, s), left_values(t, s)
        )
    return operation(left, right), lambda t, s: operation(left_values(t, s), right_values(t, s))


POINTS_T = torch.tensor([0.9, 0.5, 0.3], dtype=torch.float64)
POINTS_S = torch.tensor([0.2, 0.1, 0.25], dtype=torch.float64)


@settings(max_examples=80)
@given(arithmetic())
def test_arithmetic_is_pointwise_for_formulas_callables_and_mixtures(case):
    function, values = case
    if function.arity == 1:
        function = function.at(T)
    wanted = values(POINTS_T, POINTS_S)
    torch.testing.assert_close(function(POINTS_T, POINTS_S), wanted, rtol=1e-12, atol=1e-12)
    slope = torch.func.jvp(lambda t: values(t, POINTS_S), (POINTS_T,), (torch.ones(3).double(),))[
        1
    ]
    torch.testing.assert_close(function.dot(POINTS_T, POINTS_S), slope, rtol=1e-10, atol=1e-10)


@settings(max_examples=25)
@given(arithmetic(depth=1))
def test_arithmetic_is_pointwise_on_arrays_of_jax(case):
    jnp = pytest.importorskip("jax").numpy
    function, values = case
    if function.arity == 1:
        function = function.at(T)
    times = jnp.asarray(POINTS_T.numpy()), jnp.asarray(POINTS_S.numpy())
    torch.testing.assert_close(
        torch.tensor(function(*times).tolist()),
        torch.tensor(values(*times).tolist()),
        rtol=1e-5,
        atol=1e-5,
    )


def test_arithmetic_of_formulas_is_a_formula_and_survives_pickling():
    alpha, beta = TimeFunction("1 - t"), TimeFunction("t")
    b = beta.at(S) * alpha / beta - alpha.at(S)
    assert sympy.simplify(b.expression - (S / T - 1)) == 0
    again = pickle.loads(pickle.dumps(b))
    assert again == b and hash(again) == hash(b)
    assert b != beta.at(S) * alpha / beta


def test_a_0_over_0_of_callables_may_still_cancel():
    """On the diagonal 1/(t - s) is infinite and t - s zero; their product is one all the same."""
    gap = TimeFunction(lambda t, s: t - s, 2)
    inverse = TimeFunction(lambda t, s: 1 / (t - s), 2)
    product = (inverse * gap)(POINTS_T, POINTS_T)
    torch.testing.assert_close(product, torch.ones(3).double(), rtol=1e-6, atol=1e-6)


def test_what_is_no_operand_is_a_type_error_and_what_has_no_value_is_told():
    with pytest.raises(TypeError):
        TimeFunction("t") + "t"
    with pytest.raises(ExpressionError, match="divides by zero"):
        TimeFunction("t") / 0
    with pytest.raises(ExpressionError, match="read at T or at S"):
        TimeFunction("t*s", 2).at(S)
    with pytest.raises(ExpressionError, match="read at T or at S"):
        TimeFunction("t").at(sympy.Symbol("u"))


@pytest.mark.parametrize("text", REMOVABLE)
def test_a_limit_that_algebra_would_take_too_long_for_is_found_by_numbers(monkeypatch, text):
    monkeypatch.setattr(time_functions, "MAX_LIMIT", 0)
    edge, limit = REMOVABLE[text]
    t_ = torch.tensor([0.3, 0.8], dtype=torch.float64)
    s_ = {"s = t": t_, "s = 0": torch.zeros_like(t_), "t = 1": t_ / 3}[edge]
    if edge == "t = 1":
        t_ = torch.ones_like(t_)
    found = TimeFunction(text, 2)(t_, s_)
    torch.testing.assert_close(found, limit(t_, s_), rtol=1e-2, atol=1e-2)


MOMENTS = 5
"""Seconds of processor time; without a bound these took from half a minute to for ever."""


def test_a_broken_power_and_a_high_power_derive_in_a_moment_and_rightly():
    start = time.process_time()
    t_ = torch.linspace(0.1, 1, 7, dtype=torch.float64)
    s_ = t_ / 2
    schedules = {
        Schedule("1 - t", "t**1.333"): (lambda u: 1 - u, lambda u: u**1.333),
        PolynomialSchedule(64): (lambda u: (1 - u) ** 64, lambda u: 1 - (1 - u) ** 64),
    }
    for schedule, (alpha, beta) in schedules.items():
        report = check_criteria(schedule, MatchedStatistic())
        assert report.ok and report.anchored and report.matched, str(report)
        assert report.latex()
        b = report.coefficients.derivative(t_, s_)
        wanted = beta(s_) * alpha(t_) / beta(t_) - alpha(s_)
        torch.testing.assert_close(b, wanted, rtol=1e-12, atol=1e-12)
    assert time.process_time() - start < 2 * MOMENTS


def test_a_high_power_of_many_roots_derives_in_a_moment_and_rightly():
    start = time.process_time()
    text = "(t+s+pi+sqrt(2)+sqrt(3))**64"
    report = check_criteria(LinearSchedule(), Statistic(text, "-1"))
    assert not report.ok and str(report)
    gamma = report.statistic.gamma(POINTS_T, POINTS_S)
    wanted = (POINTS_T + POINTS_S + math.pi + math.sqrt(2) + math.sqrt(3)) ** 64
    torch.testing.assert_close(gamma, wanted, rtol=1e-12, atol=0)
    assert time.process_time() - start < MOMENTS


TEXTS = ["1/(t - s)", "t/(s - t)", "(s - t)/t", "s*(2 - s)", "t**1.333", "sqrt(1 - t**2)"]


@pytest.mark.parametrize("text", [*TEXTS, "1/(1 + 1/(s - t))", "(t - s)**0.5*(1 - t)**(-1.5)"])
def test_a_formula_as_one_reads_it_is_read_again(text):
    again = parse(text_of(parse(text)))
    points = [(0.9, 0.2), (0.5, 0.1)]
    assert precise_values(again, points) == pytest.approx(precise_values(parse(text), points))


@pytest.mark.parametrize(
    ("text", "written", "latex"),
    [
        ("1/(s - t)", "-1/(t - s)", r"- \frac{1}{t - s}"),
        ("1/(t - s)", "1/(t - s)", r"\frac{1}{t - s}"),
        ("(s - t)/t", "-(t - s)/t", r"- \frac{t - s}{t}"),
        ("(t - s)**2/t", "(t - s)**2/t", r"\frac{\left(t - s\right)^{2}}{t}"),
        ("2*s - s**2", "2*s - s**2", r"2 s - s^{2}"),
    ],
)
def test_differences_are_written_so_that_they_are_positive(text, written, latex):
    assert text_of(parse(text)) == written
    assert latex_of(parse(text)) == latex


def test_the_earlier_name_of_the_module_still_opens_pickles():
    assert flowspace.expressions.TimeFunction is TimeFunction
    assert pickle.loads(OLD_PICKLE) == TimeFunction("1 - t")


OLD_PICKLE = b"cflowspace.expressions\nTimeFunction\n(V1 - t\nI1\ntR."


def test_precise_values_have_fifty_digits_and_nan_where_there_is_no_value():
    value, none = precise_values(sympy.sqrt(2) / (T - S), [(2, 1), (1, 1)])
    assert mpmath.nstr(value, 45) == "1.41421356237309504880168872420969807856967188"
    assert math.isnan(none)
    for formula in (sympy.gamma(T - S), sympy.sqrt(S - T - 1), sympy.zoo, sympy.nan):
        assert math.isnan(precise_values(formula, [(1, 1)])[0])


@given(st.integers(1, 40))
def test_random_points_are_inside_the_triangle_and_the_same_in_every_call(count):
    points = random_points(count)
    assert points == random_points(count) and len(points) == count
    assert all(0 < s < t < 1 for t, s in points)


@pytest.mark.parametrize(
    "text",
    [
        "(exp(2*t) - 1)/(exp(t) - 1)",
        "t*log(t) + s*log(t)",
        "(t - 1)/(sqrt(t) - 1)",
        "(1e200*t + 1)**2 + s",
        "sin(1)**2 + cos(1)**2 + t",
        "sin(t**2)**2 + cos(t**2)**2",
        "sin(cos(t))**2 + cos(cos(t))**2",
    ],
)
def test_formulas_whose_algebra_may_take_long_or_overflow_stay_as_they_are(text):
    formula = parse(text)
    assert tidy(formula) == formula and readable(formula) == formula


@pytest.mark.parametrize(
    ("text", "shorter"),
    [
        ("sin(t)**2 + cos(t)**2 + s", "s + 1"),
        ("(t**2 - s**2)/(t - s)", "s + t"),
        ("s*sin(t) + t*sin(t)", "(s + t)*sin(t)"),
        ("cos(pi*t/2 + pi*s/2)", "cos(pi*(s/2 + t/2))"),
    ],
)
def test_a_formula_is_read_in_its_shorter_form(text, shorter):
    assert readable(tidy(parse(text))) == parse(shorter)


@st.composite
def polynomials(draw, depth=3):
    """Sums, products and powers of times and numbers."""
    kind = draw(st.sampled_from(["leaf"] + ["+", "*", "**"] * (depth > 0)))
    if kind == "leaf":
        return draw(st.sampled_from([T, S, 1 + T, S + T + 1, T - 2 * S]))
    part = draw(polynomials(depth - 1))
    if kind == "**":
        return part ** draw(st.integers(1, 4))
    other = draw(polynomials(depth - 1))
    return {"+": operator.add, "*": operator.mul}[kind](part, other)


@settings(max_examples=40)
@given(polynomials())
def test_the_terms_that_are_counted_are_no_fewer_than_those_of_the_multiplied_formula(formula):
    if expanded_terms(formula) < 2_000:
        terms = sympy.Add.make_args(sympy.expand(formula))
        assert len(terms) <= expanded_terms(formula)


@pytest.mark.parametrize(
    ("text", "terms"), [("t + s", 2), ("(1 + t)*(1 + s)", 4), ("(t + s + 1)**3", 10), ("t**8", 1)]
)
def test_they_are_as_many_where_none_cancel(text, terms):
    assert expanded_terms(parse(text)) == terms


@pytest.mark.parametrize("source", ["1 - t", 2, T**2 + 1, math.cos])
def test_a_function_survives_pickling(source):
    function = TimeFunction(source)
    again = pickle.loads(pickle.dumps(function))
    assert again == function and hash(again) == hash(function) and str(again) == str(function)


def test_a_sympy_function_that_is_not_known_on_tensors_is_refused_by_name():
    with pytest.raises(ExpressionError, match=r"has Max.*callable"):
        TimeFunction(sympy.Max(sympy.Rational(1, 2), T), 1)
    ramp = TimeFunction(sympy.asinh(T), 1)
    torch.testing.assert_close(ramp(torch.linspace(0, 1, 5)), torch.linspace(0, 1, 5).asinh())
