r"""Scalar functions of the times, from text, sympy expressions, numbers or callables.

A `TimeFunction` is $g(t)$ or $g(t, s)$, elementwise over tensors of torch or arrays of JAX. With a
formula behind it the derivative in t is symbolic, the compiled code is made once, and removable
singularities on the edges ``s = t``, ``s = 0`` and ``t = 1`` are filled in with their limits. With
a callable behind it the derivative is forward-mode automatic differentiation, and a value that is
not finite is replaced by the one `NUDGE` inside the triangle ``0 < s < t < 1``.

Text comes from configuration files, so it is read over a whitelist and never evaluated by Python.
"""

import ast
import math
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import sympy
import torch
from sympy.core.function import Application
from torch import Tensor

from flowspace.backends import backend_of, handed_over
from flowspace.errors import ExpressionError

__all__ = ["NUDGE", "Source", "TimeFunction", "combine", "parse", "precise_values", "s", "t"]

Source: TypeAlias = "str | float | sympy.Expr | Callable[..., Any] | TimeFunction"

t, s = sympy.symbols("t s", positive=True)

NUDGE = 1e-7
"""How far inside the triangle a callable is evaluated where it is 0/0 on an edge: small against
any time that matters, large against float64 rounding of t - s.
"""

NUDGE_SINGLE = 3e-4
"""The same against float32 rounding, where there is no float64: its square root."""

MAX_TEXT = 1000
MAX_EXPONENT = 64
MAX_EXP = 700
"""exp of more than this overflows float64."""

EDGES = ((s, t), (s, sympy.Integer(0)), (t, sympy.Integer(1)))
MAX_ORDER = 4
NOT_ZERO = 1e-30
"""What counts as zero for a formula evaluated with 50 digits."""

MAX_CANCEL = 40
"""Operations beyond which cancelling a formula may take seconds."""

NAMES = {"t": t, "s": s, "pi": sympy.pi}
FUNCTIONS = {
    name: getattr(sympy, name) for name in ("exp", "log", "sqrt", "sin", "cos", "tan", "cot")
}
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


# --- text -> sympy
# -------------------------------------------------------------------------------------------------


def parse(text: str) -> sympy.Expr:
    """Read a formula in t and s, such as ``"sin(pi*t/2)"``, over a whitelist.

    Allowed are numbers, ``t``, ``s``, ``pi``, ``+ - * / **`` and exp, log, sqrt, sin, cos, tan,
    cot. Nothing is evaluated by Python, and a text that could keep sympy busy (power towers,
    constant exponents above 64, more than 1,000 characters) is refused before sympy sees it.

    Raises:
        ExpressionError: what is not allowed, and what to write instead.
    """
    if len(text) > MAX_TEXT:
        raise ExpressionError(
            f"an expression of {len(text)} characters came, the limit is {MAX_TEXT}; pass a "
            "callable instead"
        )
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        _refuse_towers(tree)
        expression = _build(tree)
    except ExpressionError as error:
        raise ExpressionError(f"{text!r}: {error}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        raise ExpressionError(
            f"{text!r} is not a formula; write something like '1 - t' or 'sin(pi*t/2)'"
        ) from None
    if expression.has(sympy.nan, sympy.zoo, sympy.oo, sympy.I):
        raise ExpressionError(f"{text!r} divides by zero, overflows or is not real")
    return expression


def _build(node: ast.AST) -> sympy.Expr:
    """Build the sympy expression of a syntax tree, from the leaves up, refusing what is not on the
    list.
    """
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(
            value, bool
        ) and math.isfinite(value):
            return sympy.Rational(repr(value))
        case ast.Name(id=name) if name in NAMES:
            return NAMES[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_build(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _build(operand)
        case ast.BinOp(op=ast.Pow(), left=base, right=exponent):
            power = _bounded(_build(exponent), MAX_EXPONENT, "an exponent")
            for number in power.atoms(sympy.Number):
                _bounded(number, MAX_EXPONENT, "a number in an exponent")
            return _build(base) ** power
        case ast.BinOp(op=operator, left=left, right=right) if type(operator) in OPERATORS:
            return OPERATORS[type(operator)](_build(left), _build(right))
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in FUNCTIONS:
            value = _build(argument)
            return FUNCTIONS[name](
                _bounded(value, MAX_EXP, "an argument of exp") if name == "exp" else value
            )
    hint = (
        " (powers are written **)"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor)
        else ""
    )
    raise ExpressionError(
        f"{ast.unparse(node)!r} is not allowed{hint}; only numbers, {', '.join(NAMES)}, + - * / "
        "** and "
        f"{', '.join(FUNCTIONS)} are"
    )


def _bounded(value: sympy.Expr, limit: float, what: str) -> sympy.Expr:
    """Refuse a constant beyond the limit, before a power of it is formed."""
    if value.is_number and not abs(complex(value)) <= limit:
        raise ExpressionError(
            f"{what} of {float(abs(complex(value))):.3g} came, the limit is {limit}"
        )
    return value


def _refuse_towers(node: ast.AST) -> float:
    """Return by how much powers multiply up in this tree; refuse towers, where sympy would form
    gigantic numbers.
    """
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        _refuse_inside(node.right, "an exponent")
        growth = _refuse_towers(node.left) * max(1.0, _largest_number(node.right))
        if growth > MAX_EXPONENT:
            raise ExpressionError(
                f"constant exponents that multiply to {growth:.3g} came, the limit is "
                f"{MAX_EXPONENT}"
            )
        return growth
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "exp":
        for argument in node.args:
            _refuse_inside(argument, "the argument of exp", ("exp", "log"))
    return max((_refuse_towers(child) for child in ast.iter_child_nodes(node)), default=1.0)


def _refuse_inside(
    node: ast.AST, where: str, functions: tuple[str, ...] = ("exp", "log", "sqrt")
) -> None:
    """Refuse powers in an exponent, and exp and log in an exponent or in exp: towers."""
    for inner in ast.walk(node):
        is_power = (
            isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Pow) and "sqrt" in functions
        )
        if is_power or (isinstance(inner, ast.Name) and inner.id in functions):
            raise ExpressionError(
                f"{ast.unparse(inner)!r} inside {where} is a power tower; write a**t instead of "
                "exp(t*log(a)), or pass "
                "a callable"
            )


def _largest_number(node: ast.AST) -> float:
    numbers = (
        n.value
        for n in ast.walk(node)
        if isinstance(n, ast.Constant) and isinstance(n.value, (int, float))
    )
    return max((abs(float(number)) for number in numbers), default=1.0)


def _own_symbols(expression: sympy.Expr) -> sympy.Expr:
    """Replace the caller's symbols named t and s, whatever their assumptions, by ours."""
    strangers = {symbol for symbol in expression.free_symbols if str(symbol) not in ("t", "s")}
    if strangers:
        names = ", ".join(sorted(map(str, strangers)))
        raise ExpressionError(f"{expression} has the symbols {names}; only t and s are times")
    return expression.subs({symbol: NAMES[str(symbol)] for symbol in expression.free_symbols})


# --- sympy -> arrays
# -------------------------------------------------------------------------------------------------


def _on_arrays(name: str) -> Callable[[Any], Any]:
    """Return the arrays' function of that name, and math's for the plain numbers that formulas
    contain.
    """
    on_tensors, on_numbers = getattr(torch, name), getattr(math, name)

    def function(value: Any) -> Any:
        if isinstance(value, Tensor):
            return on_tensors(value)
        return (
            on_numbers(value)
            if isinstance(value, (int, float))
            else backend_of(value).elementwise(name, value)
        )

    return function


ELEMENTWISE = (
    "exp log sqrt sin cos tan sinh cosh tanh asin acos atan asinh acosh atanh erf".split()
)
ON_ARRAYS: dict[str, Any] = {name: _on_arrays(name) for name in ELEMENTWISE}
ON_ARRAYS |= {
    "cot": lambda x: 1 / ON_ARRAYS["tan"](x),
    "pi": math.pi,
    "e": math.e,
    "E": math.e,
    "Abs": abs,
}


def _lambdify(expression: sympy.Expr, variables: tuple[sympy.Symbol, ...]) -> Callable[..., Any]:
    unknown = {f.func.__name__ for f in expression.atoms(Application)} - ON_ARRAYS.keys()
    if unknown:
        raise ExpressionError(
            f"{expression} has {', '.join(sorted(unknown))}, which is not known on tensors; write "
            "a callable of t instead"
        )
    return sympy.lambdify(variables, expression, modules=[ON_ARRAYS], cse=True)


def on_edge(expression: sympy.Expr, variable: sympy.Symbol, end: sympy.Expr) -> sympy.Expr | None:
    """Return the limit of a formula for ``variable -> end`` where plain substitution is 0/0, by
    l'Hopital's rule.

    Returns None where substitution is fine, and where the limit is infinite or not found in
    `MAX_ORDER` derivatives.
    """
    points = [
        tuple(end.subs(t, time) if v == variable else time for v in (t, s))
        for time in (0.37, 0.71)
    ]
    if not _has_nan(precise_values(expression, points)):
        return None
    top, bottom = sympy.fraction(
        sympy.together(expression.rewrite([sympy.cot, sympy.tan], sympy.sin))
    )
    for _ in range(MAX_ORDER):
        tops, bottoms = (precise_values(part, points) for part in (top, bottom))
        if _has_nan(tops + bottoms):
            return None
        if all(abs(value) > NOT_ZERO for value in bottoms):
            return (top / bottom).subs(variable, end)
        if any(abs(value) > NOT_ZERO for value in tops):
            return None
        top, bottom = top.diff(variable), bottom.diff(variable)
    return None


def _has_nan(values: list[Any]) -> bool:
    return any(not math.isfinite(value) for value in values)


def _compile(expression: sympy.Expr, variables: tuple[sympy.Symbol, ...]) -> Callable[..., Any]:
    """Compile for tensors and arrays, once; on an edge with a removable singularity the limit is
    taken there, exactly.
    """
    inside = _lambdify(expression, variables)
    if len(variables) == 1:
        return inside
    edges = []
    for variable, end in EDGES:
        value = on_edge(expression, variable, end)
        if value is not None:
            edges.append((variable, end, _lambdify(value, variables)))
    if not edges:
        return inside

    def with_edges(t_: Tensor, s_: Tensor) -> Tensor:
        xp, values = backend_of(t_), inside(t_, s_)
        for variable, end, filled in edges:
            time = t_ if variable == t else s_
            here = time == (t_ if end == t else int(end))
            values = xp.where(here, filled(t_, s_), values)
        return values

    return with_edges


# --- the function
# -------------------------------------------------------------------------------------------------


class TimeFunction:
    """A scalar function of t, or of t and s, applied elementwise.

    Args:
        source: text (see `parse`), a number, a sympy expression in t and s, or a callable on
            tensors of times.
        arity: 1 for a function of t, 2 for a function of (t, s).

    Attributes:
        expression: the sympy expression, or None where a callable is behind it.

    Raises:
        ExpressionError: if the source is none of these, or a function of t alone mentions s.
    """

    def __init__(self, source: Source, arity: int = 1) -> None:
        if isinstance(source, TimeFunction):
            source = source.source
        self.source, self.arity = source, arity
        self.variables = (t, s)[:arity]
        self.expression: sympy.Expr | None = _to_expression(source)
        if self.expression is not None and not self.expression.free_symbols <= set(self.variables):
            raise ExpressionError(f"{source} depends on s, but is a function of t alone")
        self._evaluate: Callable[..., Any] = (
            self._call_anywhere
            if self.expression is None
            else _compile(self.expression, self.variables)
        )

    def __call__(self, *times: Tensor) -> Tensor:
        """Return the values at the times, all of shape ``()`` or ``(B,)``, with that shape and the
        times' dtype.

        They are formed in float64: b is a small difference of large numbers near the diagonal, and
        there are only B of them. JAX has float64 only where it is switched on.
        """
        xp, like = backend_of(*times), times[0]
        return xp.like(self._evaluate(*(xp.as_float64(time) for time in times)), like, like.dtype)

    @cached_property
    def dot(self) -> "TimeFunction":
        """The partial derivative in t: symbolic where there is a formula, forward-mode AD where
        there is a callable.
        """
        if self.expression is not None:
            return TimeFunction(tidy(self.expression.diff(t)), self.arity)

        def derivative(time: Tensor, *rest: Tensor) -> Tensor:
            return backend_of(time).time_derivative(self._call, time, *rest)

        return TimeFunction(derivative, self.arity)

    def _call(self, *times: Tensor) -> Tensor:
        return backend_of(*times).like(self.source(*times), times[0])  # type: ignore[operator]

    def _call_anywhere(self, *times: Tensor) -> Tensor:
        """Call on tensors or arrays; a callable that fails on tensors may be written in JAX, so it
        is tried there.
        """
        try:
            return self._call_inside(*times)
        except Exception as error:
            return handed_over(self._call_inside, times, error)

    def _call_inside(self, *times: Tensor) -> Tensor:
        """Call, in float64 as `__call__` passes it; where that is not finite and there are two
        times, go just inside.
        """
        value = self._call(*times)
        if self.arity == 1:
            return value
        xp, nudge = backend_of(value), NUDGE if times[0].dtype.itemsize == 8 else NUDGE_SINGLE
        t_ = xp.clamp(times[0], None, 1 - nudge)
        s_ = xp.minimum(xp.clamp(times[1], nudge), t_ - nudge)
        return xp.where(xp.isfinite(value), value, self._call(t_, s_))

    def raw(self, *times: Tensor) -> Tensor:
        """Evaluate as the source has it, 0/0 on the edges included, so that a combination can
        still cancel it.
        """
        return self._call(*times) if self.expression is None else self(*times)

    def __str__(self) -> str:
        if isinstance(self.source, str):
            return self.source
        return "a callable" if self.expression is None else str(self.expression)

    def __repr__(self) -> str:
        return f"TimeFunction({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TimeFunction) and (self.source, self.arity) == (
            other.source,
            other.arity,
        )

    def __hash__(self) -> int:
        return hash((self.source, self.arity))

    def __reduce__(self) -> tuple[Any, ...]:
        return TimeFunction, (self.source, self.arity)


def _to_expression(source: Source) -> sympy.Expr | None:
    if isinstance(source, str):
        return parse(source)
    if isinstance(source, (sympy.Expr, int, float)) and not isinstance(source, bool):
        return _own_symbols(sympy.sympify(source))
    if callable(source):
        return None
    raise ExpressionError(
        f"{source!r} of type {type(source).__name__} came; write text such as '1 - t', a number, "
        "a sympy expression or a "
        "callable on tensors"
    )


def combine(
    operation: Callable[..., Any],
    *functions: tuple[TimeFunction, sympy.Symbol | None],
    arity: int = 2,
) -> TimeFunction:
    """Combine functions into one: as one formula if each has one, else as a callable.

    Args:
        operation: arithmetic that works on sympy expressions and on tensors alike.
        functions: pairs of a function and its argument: `t` or `s` for a function of one time,
            None for one of both.
        arity: of the result.
    """
    if all(f.expression is not None for f, _ in functions):
        expressions = [
            f.expression if at is None else f.expression.subs(t, at)  # type: ignore[union-attr]
            for f, at in functions
        ]
        return TimeFunction(tidy(sympy.sympify(operation(*expressions))), arity)

    def call(*times: Tensor) -> Tensor:
        return operation(
            *(
                f.raw(*times) if at is None else f.raw(times[0] if at == t else times[1])
                for f, at in functions
            )
        )

    return TimeFunction(call, arity)


def tidy(expression: sympy.Expr) -> sympy.Expr:
    """Cancel common factors, which also removes most 0/0 on edges; large formulas are left as they
    are.
    """
    whole = all(power.exp.is_integer for power in expression.atoms(sympy.Pow))
    small = (
        whole and expression.count_ops() <= MAX_CANCEL and not expression.has(sympy.exp, sympy.log)
    )
    return sympy.factor(sympy.cancel(expression)) if small else expression


def readable(expression: sympy.Expr) -> sympy.Expr:
    """Return the shortest form of a formula that a few quick rewritings find."""
    if expression.count_ops() > 2 * MAX_CANCEL or expression.has(sympy.exp, sympy.log):
        return expression
    forms = [expression, sympy.factor(expression)]
    if expression.has(sympy.sin, sympy.cos):
        forms += [
            sympy.trigsimp(expression),
            sympy.factor(sympy.trigsimp(sympy.expand(expression))),
        ]
    return min(forms, key=lambda form: form.count_ops())


def precise_values(
    expression: sympy.Expr, points: Sequence[tuple[Any, ...]], digits: int = 50
) -> list[Any]:
    """Evaluate a formula at (t, s) points with that many digits (mpmath); nan where it has no
    value.
    """
    import mpmath

    function = sympy.lambdify((t, s), expression, modules="mpmath")
    values = []
    with mpmath.workdps(digits):
        for t_, s_ in points:
            try:
                value = mpmath.mpmathify(function(mpmath.mpf(t_), mpmath.mpf(s_)))
                values.append(
                    mpmath.nan if isinstance(value, mpmath.mpc) and value.imag else value.real
                )
            except (ZeroDivisionError, ValueError, OverflowError):
                values.append(mpmath.nan)
    return values


def random_points(count: int) -> list[tuple[float, float]]:
    """Return points 0 < s < t < 1, the same in every call, so that a check never answers
    differently twice.
    """
    draw = random.Random(count)
    pairs = (sorted((draw.uniform(0.02, 0.98), draw.uniform(0.02, 0.98))) for _ in range(count))
    return [(high, low) for low, high in pairs]
