r"""Scalar functions of the times, from text, sympy expressions, numbers or callables.

A `TimeFunction` is $g(t)$ or $g(t, s)$, elementwise over tensors of torch or arrays of JAX. With a
formula behind it the derivative in t is symbolic, the compiled code is made once, and removable
singularities on the edges ``s = t``, ``s = 0`` and ``t = 1`` are filled in with their limits. With
a callable behind it the derivative is forward-mode automatic differentiation, and a value that is
not finite is replaced by the one `NUDGE` inside the triangle ``0 < s < t < 1``.

Time functions add, subtract, multiply and divide, with each other and with numbers, and
``f.at(S)`` reads a function of one time at s, so that what is derived stands in code as on paper::

    b = beta.at(S) * alpha / beta - alpha.at(S)
"""

import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import sympy
import torch
from sympy.core.function import Application
from torch import Tensor

from flowspace.backends import backend_of, handed_over
from flowspace.errors import ExpressionError, InputError
from flowspace.formulas import (
    NOT_ZERO,
    S,
    T,
    has_values,
    is_defined,
    own_symbols,
    parse,
    precise_values,
    tidy,
)
from flowspace.inputs import kind_of
from flowspace.typeset import text_of

__all__ = ["NUDGE", "Source", "TimeFunction", "limit_on_edge", "unseen_slope", "values_of"]

Function: TypeAlias = Callable[..., Any]
"""Any function of one or two tensors of times."""

Source: TypeAlias = "str | float | sympy.Expr | Function | TimeFunction"
Operand: TypeAlias = "TimeFunction | float | sympy.Expr"
Operation: TypeAlias = Callable[[Any, Any], Any]

NUDGE = 1e-7
"""How far inside the triangle a callable is evaluated where it is 0/0 on an edge: small against
any time that matters, large against float64 rounding of t - s.
"""

NUDGE_SINGLE = 3e-4
"""The same against float32 rounding, where there is no float64: its square root."""

Variables: TypeAlias = tuple[sympy.Symbol, ...]

EDGES = (
    (S, T),
    (S, sympy.Integer(0)),
    (T, sympy.Integer(1)),
)
"""Each a variable, and the end that it reaches on the edge."""

EDGE_TIMES = (0.37, 0.71)
"""Where on an edge it is asked whether a formula has a value there."""

DOUBLE = 8
"""Bytes of a number in float64."""

MAX_ORDER = 4
"""How often numerator and denominator are differentiated by l'Hopital's rule."""

MAX_LIMIT = 600
"""Operations beyond which a limit is found by numbers, one `NUDGE` inside, not by algebra."""


# --- sympy -> arrays
# -------------------------------------------------------------------------------------------------


def _on_arrays(name: str) -> Callable[[Any], Any]:
    """Return the arrays' function of that name, and math's for the numbers in a formula."""
    on_tensors = getattr(torch, name)
    on_numbers = getattr(math, name)

    def function(value: Any) -> Any:
        if isinstance(value, Tensor):
            return on_tensors(value)
        if isinstance(value, (int, float)):
            return on_numbers(value)
        return backend_of(value).elementwise(name, value)

    return function


INT64 = 2**63 - 1
"""The largest whole number that a tensor is multiplied by."""

DIGITS = 17
"""So many tell each number in double precision from the next."""

LARGEST = sympy.Float(sys.float_info.max)
"""The largest number in double precision; beyond it a constant overflows."""

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


def _refuse_unknown(expression: sympy.Expr) -> None:
    applied = expression.atoms(Application)
    names = {function.func.__name__ for function in applied}
    unknown = ", ".join(sorted(names - ON_ARRAYS.keys()))
    if unknown:
        raise ExpressionError(
            f"{expression} has {unknown}, which is not known on tensors; "
            "write a callable of t instead"
        )


def _lambdify(expression: sympy.Expr, variables: Variables) -> Function:
    """Compile a formula for tensors and arrays, and try it.

    Raises:
        ExpressionError: if a constant in it divides by zero, overflows or is not real.
    """
    large = [n for n in expression.atoms(sympy.Integer) if INT64 < abs(n) < LARGEST]
    written = expression.xreplace({n: sympy.Float(n, DIGITS) for n in large})
    try:
        function = sympy.lambdify(variables, written, modules=[ON_ARRAYS], cse=True)
        times = torch.tensor([0.75, 0.25], dtype=torch.float64)
        value = function(*times[: len(variables)])
    except (ArithmeticError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ExpressionError(
            f"{expression} divides by zero, overflows or is not real: {error}"
        ) from None
    is_complex = isinstance(value, complex)
    if isinstance(value, Tensor):
        is_complex = value.is_complex()
    if is_complex:
        raise ExpressionError(f"{expression} is not real")
    return function


# --- limits on the edges
# -------------------------------------------------------------------------------------------------


def limit_on_edge(
    expression: sympy.Expr, variable: sympy.Symbol, end: sympy.Expr
) -> sympy.Expr | None:
    """Return the limit of a formula for ``variable -> end``, by l'Hopital's rule.

    Returns None where plain substitution gives a value, and where the limit is infinite. Where it
    is not found in `MAX_ORDER` derivatives, or the formula is too large for them, it returns
    `sympy.nan`.
    """
    points = [_on_edge(variable, end, time) for time in EDGE_TIMES]
    if not _has_nan(precise_values(expression, points)):
        return None
    if expression.count_ops() > MAX_LIMIT:
        return sympy.nan
    by_sines = expression.rewrite([sympy.cot, sympy.tan], sympy.sin)
    top, bottom = sympy.fraction(sympy.together(by_sines))
    for _ in range(MAX_ORDER):
        if top.count_ops() + bottom.count_ops() > MAX_LIMIT:
            return sympy.nan
        tops = precise_values(top, points)
        bottoms = precise_values(bottom, points)
        if _has_nan(tops + bottoms):
            return sympy.nan
        if all(abs(value) > NOT_ZERO for value in bottoms):
            return (top / bottom).subs(variable, end)
        if any(abs(value) > NOT_ZERO for value in tops):
            return None
        top = top.diff(variable)
        bottom = bottom.diff(variable)
    return sympy.nan


def _on_edge(variable: sympy.Symbol, end: sympy.Expr, time: float) -> tuple[Any, Any]:
    """Return the point (t, s) of an edge at which the other variable is that time."""
    if variable == T:
        return end, time
    return time, end.subs(T, time)


def _has_nan(values: list[Any]) -> bool:
    return any(not math.isfinite(value) for value in values)


@dataclass(frozen=True)
class _Limit:
    """The values of a formula on the edge ``variable = end``."""

    variable: sympy.Symbol
    end: sympy.Expr
    values: Function

    def fill(self, values: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the values, on the edge those of the limit."""
        time = t if self.variable == T else s
        end = t if self.end == T else int(self.end)
        on_edge = time == end
        limit = self.values(t, s)
        return backend_of(t).where(on_edge, limit, values)


def _compile(expression: sympy.Expr, variables: Variables) -> Function:
    """Compile for tensors and arrays, once; a removable singularity on an edge is filled in."""
    inside = _lambdify(expression, variables)
    if len(variables) == 1:
        return inside
    limits = []
    is_complete = True
    for variable, end in EDGES:
        limit = limit_on_edge(expression, variable, end)
        if limit is sympy.nan:
            is_complete = False
        elif limit is not None:
            on_edge = _lambdify(limit, variables)
            limits.append(_Limit(variable, end, on_edge))
    if is_complete and not limits:
        return inside

    def with_limits(t: Tensor, s: Tensor) -> Tensor:
        values = inside(t, s)
        if not is_complete:
            values = _finite_inside(inside, values, t, s)
        for limit in limits:
            values = limit.fill(values, t, s)
        return values

    return with_limits


def _finite_inside(function: Function, values: Any, t: Tensor, s: Tensor) -> Tensor:
    """Return a function's values, and where they are not finite those just inside the triangle."""
    xp = backend_of(t)
    nudge = NUDGE_SINGLE
    if t.dtype.itemsize == DOUBLE:
        nudge = NUDGE
    t_inside = xp.clamp(t, None, 1 - nudge)
    s_inside = xp.clamp(s, nudge)
    s_inside = xp.minimum(s_inside, t_inside - nudge)
    just_inside = function(t_inside, s_inside)
    return xp.where(xp.isfinite(values), values, just_inside)


# --- the function
# -------------------------------------------------------------------------------------------------


class TimeFunction:
    """A scalar function of t, or of t and s, applied elementwise.

    Args:
        source: text (see `parse`), a number, a sympy expression in t and s, or a callable on
            tensors of times.
        arity: 1 for a function of t, 2 for a function of (t, s).

    Raises:
        ExpressionError: if the source is none of these, or a function of t alone mentions s.
    """

    def __init__(self, source: Source, arity: int = 1) -> None:
        if isinstance(source, TimeFunction):
            source = source.source
        self.source = source
        self.arity = arity
        self.variables = (T, S)[:arity]
        self._formula = formula = _formula_of(source)
        if formula is None:
            return
        _refuse_unknown(formula)
        if not is_defined(formula):
            raise ExpressionError(f"{source} divides by zero, overflows or is not real")
        if not formula.free_symbols <= set(self.variables):
            raise ExpressionError(f"{source} depends on s, but is a function of t alone")
        if isinstance(source, str):
            self.prepare()

    @cached_property
    def expression(self) -> sympy.Expr | None:
        """The sympy expression, or None where a callable is behind the function."""
        is_derived = isinstance(self.source, (_Arithmetic, _Reading))
        if self._formula is None or not is_derived:
            return self._formula
        return tidy(self._formula)

    def __call__(self, *times: Tensor) -> Tensor:
        """Return the values at the times, all of shape ``()`` or ``(B,)``, with that shape and the
        times' dtype.

        They are formed in float64: b is a small difference of large numbers near the diagonal, and
        there are only B of them. JAX has float64 only where it is switched on.

        Raises:
            InputError: unless there is an array of real numbers for each time.
        """
        return values_of((self,), *times)[0]

    def _check_times(self, xp: Any, times: tuple[Any, ...]) -> None:
        """Raise InputError unless there is an array of real numbers for each time."""
        are_real = all(xp.is_array(time) and xp.is_floating(time) for time in times)
        if len(times) == self.arity and are_real:
            return
        came = " and ".join(kind_of(time) for time in times) or "nothing"
        names = " and ".join(map(str, self.variables))
        raise InputError(
            f"got times of {came} for a function of {names}; "
            "write a tensor of real numbers for each, such as torch.tensor(0.5)"
        )

    def prepare(self) -> Function:
        """Compile now rather than in the first call, which a compiler may be watching."""
        return self._evaluate

    @cached_property
    def _evaluate(self) -> Function:
        if self.expression is None:
            return self._call_anywhere
        return _compile(self.expression, self.variables)

    @cached_property
    def dot(self) -> "TimeFunction":
        """The partial derivative in t: symbolic for a formula, forward-mode AD for a callable."""
        if self.expression is not None:
            slope = tidy(self.expression.diff(T))
            return TimeFunction(slope, self.arity)

        def derivative(time: Tensor, *rest: Tensor) -> Tensor:
            return backend_of(time).time_derivative(self._call, time, *rest)

        return TimeFunction(derivative, self.arity)

    def at(self, time: sympy.Symbol) -> "TimeFunction":
        """Return a function of one time as a function of (t, s), read at `T` or at `S`."""
        if self.arity != 1 or time not in (T, S):
            raise ExpressionError(
                f"got ({self}).at({time}); a function of one time is read at T or at S"
            )
        return TimeFunction(_Reading(self, time), 2)

    def __add__(self, other: Operand) -> "TimeFunction":
        return _combined(operator.add, self, other)

    def __radd__(self, other: Operand) -> "TimeFunction":
        return _combined(operator.add, other, self)

    def __sub__(self, other: Operand) -> "TimeFunction":
        return _combined(operator.sub, self, other)

    def __rsub__(self, other: Operand) -> "TimeFunction":
        return _combined(operator.sub, other, self)

    def __mul__(self, other: Operand) -> "TimeFunction":
        return _combined(operator.mul, self, other)

    def __rmul__(self, other: Operand) -> "TimeFunction":
        return _combined(operator.mul, other, self)

    def __truediv__(self, other: Operand) -> "TimeFunction":
        return _combined(operator.truediv, self, other)

    def __rtruediv__(self, other: Operand) -> "TimeFunction":
        return _combined(operator.truediv, other, self)

    def __neg__(self) -> "TimeFunction":
        return _combined(operator.mul, -1, self)

    def _call(self, *times: Tensor) -> Tensor:
        values = self.source(*times)  # type: ignore[operator]
        return backend_of(*times).like(values, times[0])

    def _call_anywhere(self, *times: Tensor) -> Tensor:
        """Call on tensors or arrays.

        A callable that fails on tensors may be written in JAX, so it is tried there.
        """
        try:
            return self._call_inside(*times)
        except Exception as error:
            return handed_over(self._call_inside, times, error)

    def _call_inside(self, *times: Tensor) -> Tensor:
        """Call in float64, as `__call__` does; of two times, where not finite, just inside."""
        values = self._call(*times)
        if self.arity == 1:
            return values
        return _finite_inside(self._call, values, *times)

    def raw(self, *times: Tensor) -> Tensor:
        """Evaluate with 0/0 on the edges where a callable has it, so that it may still cancel."""
        if self.expression is None:
            return self._call(*times)
        return self(*times)

    def __str__(self) -> str:
        if isinstance(self.source, str):
            return self.source
        if self.expression is None:
            return "a callable"
        return text_of(self.expression)

    def __repr__(self) -> str:
        return f"TimeFunction({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TimeFunction):
            return False
        return (self.source, self.arity) == (other.source, other.arity)

    def __hash__(self) -> int:
        return hash((self.source, self.arity))

    def __reduce__(self) -> tuple[Any, ...]:
        return TimeFunction, (self.source, self.arity)


@dataclass(frozen=True)
class _Arithmetic:
    """Two functions of the times, or a function and a number, with an operation between them."""

    operation: Operation
    left: "TimeFunction | float"
    right: "TimeFunction | float"

    def formula(self) -> sympy.Expr | None:
        """Return the formula of both, or None where one is a callable."""
        left = _operand_formula(self.left)
        right = _operand_formula(self.right)
        if left is None or right is None:
            return None
        return self.operation(left, right)

    def __call__(self, *times: Tensor) -> Tensor:
        """Return the values where a callable is among the two."""
        left = _operand_values(self.left, times)
        right = _operand_values(self.right, times)
        return self.operation(left, right)


@dataclass(frozen=True)
class _Reading:
    """A function of one time as a function of (t, s)."""

    function: TimeFunction
    time: sympy.Symbol

    def formula(self) -> sympy.Expr | None:
        """Return the formula in that time, or None for a callable."""
        formula: Any = self.function._formula
        if formula is None:
            return None
        return formula.subs(T, self.time)

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        """Return the values of a callable."""
        if self.time == T:
            return self.function.raw(t)
        return self.function.raw(s)


def _combined(operation: Operation, left: Operand, right: Operand) -> TimeFunction:
    arity = 1
    operands: list[Any] = []
    for operand in (left, right):
        if isinstance(operand, sympy.Expr):
            operand = TimeFunction(operand, _arity_of(operand))
        if isinstance(operand, TimeFunction):
            arity = max(arity, operand.arity)
        elif not isinstance(operand, (int, float)):
            return NotImplemented
        operands.append(operand)
    return TimeFunction(_Arithmetic(operation, *operands), arity)


def _arity_of(expression: sympy.Expr) -> int:
    if "s" in map(str, expression.free_symbols):
        return 2
    return 1


def _operand_formula(operand: "TimeFunction | float") -> sympy.Expr | None:
    if isinstance(operand, TimeFunction):
        return operand._formula
    return sympy.sympify(operand)


def _operand_values(operand: "TimeFunction | float", times: tuple[Tensor, ...]) -> Any:
    if isinstance(operand, TimeFunction):
        return operand.raw(*times[: operand.arity])
    return operand


def values_of(functions: Sequence[TimeFunction], *times: Tensor) -> list[Tensor]:
    """Return the values of several functions of the same times, each as its own call returns them;
    the times are checked and made float64 once.
    """
    xp = backend_of(*times)
    functions[0]._check_times(xp, times)
    like = times[0]
    precise = [xp.as_float64(time) for time in times]
    return [xp.like(each._evaluate(*precise), like, like.dtype) for each in functions]


def _formula_of(source: Source) -> sympy.Expr | None:
    if isinstance(source, str):
        return parse(source)
    if isinstance(source, (_Arithmetic, _Reading)):
        return source.formula()
    is_number = isinstance(source, (int, float)) and not isinstance(source, bool)
    if is_number or isinstance(source, sympy.Expr):
        given: Any = sympy.sympify(source)
        formula = own_symbols(given)
        if not has_values(formula):
            raise ExpressionError("got a formula that divides by zero, overflows or is not real")
        return formula
    if callable(source):
        return None
    raise ExpressionError(
        f"got {source!r} of type {type(source).__name__}; "
        "write text such as '1 - t', a number, "
        "a sympy expression or a callable on tensors"
    )


# --- what torch does not see of a callable
# -------------------------------------------------------------------------------------------------

SLOPE_STEP = 1e-3
"""Half the step of the differences that a callable's derivative is compared with.

Over it float32, which a callable may compute in, rounds a slope by 1e-4.
"""

SLOPE_TOLERANCE = 0.05
"""A slope that is off by this share is another one; a kink or a cell of a table is let pass."""

ROUNDED = 1e-2
"""Slopes that differ by less are the same: their values were rounded."""


def unseen_slope(function: TimeFunction) -> str | None:
    """Return what is wrong with the derivative in t of a callable, to end a message; or None.

    Torch takes what a callable computes outside torch, or behind ``.detach()``, for a constant:
    its derivative is then silently zero. It is compared with differences at 15 times, and is
    wrong where more than half of them tell so.
    """
    if function.expression is not None:
        return None
    t = torch.linspace(0.2, 0.9, 15, dtype=torch.float64)
    others = (t / 3,) * (function.arity - 1)
    rise = function(t + SLOPE_STEP, *others) - function(t - SLOPE_STEP, *others)
    difference = rise / (2 * SLOPE_STEP)
    slope = function.dot(t, *others)
    off = (slope - difference).abs()
    wrong = off > SLOPE_TOLERANCE * (slope.abs() + difference.abs()) + ROUNDED
    if wrong.sum() * 2 <= len(t):
        return None
    worst = int(off.argmax())
    return (
        f"whose derivative in t is {slope[worst]:.3g} for torch at t = {t[worst]:.3g}, "
        f"where its values rise by {difference[worst]:.3g} a unit of time; "
        "write it in functions of torch, without .detach(), .item() or a table"
    )
