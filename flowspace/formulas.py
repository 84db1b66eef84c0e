"""Formulas in t and s: text read over a whitelist, and sympy's algebra kept to a bounded time.

`T` and `S` are the symbols; t and s are tensors everywhere else. Text comes from configuration
files, so it is never evaluated by Python, and nothing that could keep sympy busy reaches it: what
takes long is told beforehand by the size of a formula, see `is_small`.
"""

import ast
import math
import operator
import random
import re
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import mpmath
import sympy
from sympy.functions.elementary.trigonometric import TrigonometricFunction

from flowspace.errors import ExpressionError

__all__ = [
    "NOT_ZERO",
    "S",
    "T",
    "has_values",
    "is_defined",
    "own_symbols",
    "parse",
    "precise_values",
    "random_points",
    "readable",
    "tidy",
]

T, S = sympy.symbols("t s", positive=True)


INFINITE = (sympy.nan, sympy.zoo, sympy.oo, -sympy.oo)

SOMEWHERE = (0.5, 0.25)
"""The point (t, s) at which constants are evaluated."""

MAX_TEXT = 1000
MAX_SHOWN = 80
"""Characters of a text that a message shows."""

MAX_DEPTH = 40
"""Levels of functions, powers, and products inside sums; sympy recurses over them."""

MAX_EXPONENT = 64
MAX_EXP = 700
"""exp of more than this overflows float64."""

NOT_ZERO = 1e-30
"""What counts as zero for a formula evaluated with 50 digits."""

MAX_CANCEL = 40
"""Operations beyond which cancelling a formula may take seconds."""

MAX_TERMS = 250
"""Terms after multiplying out, beyond which cancelling or factoring may take seconds."""

MAX_DEGREE = 8
"""The power of one term up to which factoring does not feel its degree."""

MAX_FUNCTIONS = 6
MAX_POWER = 4
"""Different sines and the like, and powers, beyond which their rewriting may take seconds."""

NAMES = {"t": T, "s": S, "pi": sympy.pi}
FUNCTIONS = {
    "exp": sympy.exp,
    "log": sympy.log,
    "sqrt": sympy.sqrt,
    "sin": sympy.sin,
    "cos": sympy.cos,
    "tan": sympy.tan,
    "cot": sympy.cot,
}

MAX_ANGLE = 1e12
MAX_ARGUMENT = {
    "exp": 1e6,
    "sin": MAX_ANGLE,
    "cos": MAX_ANGLE,
    "tan": MAX_ANGLE,
    "cot": MAX_ANGLE,
}
"""How large an argument may be inside the triangle; beyond, 50 digits take for ever."""

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
SUMS = (ast.Add, ast.Sub)
PRODUCTS = (ast.Mult, ast.Div)

FOREIGN = {
    "^": "powers are written **",
    "\N{GREEK SMALL LETTER PI}": "write pi",
    "\N{MINUS SIGN}": "a minus is written -",
    "\N{MIDDLE DOT}": "products are written *",
    "\N{MULTIPLICATION SIGN}": "products are written *",
    "\N{SUPERSCRIPT TWO}": "powers are written **",
}
"""What people write for what is written otherwise here."""

MISSING_PRODUCT = re.compile(
    r"""
    \d \s* [a-z(]                               # a number before a name or a bracket
    | \b (t|s|pi) \s* \(                        # a name before a bracket
    | \) \s* [\w(]                              # a bracket before anything
    | \b (t|s|pi|\d) \s+ (t|s|pi|[a-z]+ \( )    # two names side by side
    """,
    re.VERBOSE,
)


# --- text -> sympy
# -------------------------------------------------------------------------------------------------


def parse(text: str) -> sympy.Expr:
    """Read a formula in t and s, such as ``"sin(pi*t/2)"``, over a whitelist.

    Allowed are numbers, ``t``, ``s``, ``pi``, ``+ - * / **`` and exp, log, sqrt, sin, cos, tan,
    cot. Nothing is evaluated by Python, and a text that could keep sympy busy (power towers,
    constant exponents above 64, deep nesting, more than 1,000 characters) is refused before sympy
    sees it.

    Raises:
        ExpressionError: what is not allowed, and what to write instead.
    """
    if len(text) > MAX_TEXT:
        raise ExpressionError(
            f"got an expression of {len(text)} characters, "
            f"the limit is {MAX_TEXT}; pass a callable instead"
        )
    shown = shortened(text)
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        _refuse_deep(tree)
        _refuse_towers(tree)
        expression = _build(tree)
    except ExpressionError as error:
        raise ExpressionError(f"{shown}: {error}") from None
    except ArithmeticError:
        raise ExpressionError(f"{shown} divides by zero or overflows") from None
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise ExpressionError(
            f"{shown} is not a formula{_hint(text)}; write something like '1 - t' or 'sin(pi*t/2)'"
        ) from None
    if not has_values(expression):
        raise ExpressionError(f"{shown} divides by zero, overflows or is not real")
    return expression


def shortened(text: str) -> str:
    """Return a text in quotes, for a message; of a long one the beginning."""
    if len(text) <= MAX_SHOWN:
        return repr(text)
    return repr(text[:MAX_SHOWN]) + "..."


def is_defined(expression: sympy.Expr) -> bool:
    """Return whether sympy found neither a division by zero nor an imaginary number."""
    return not expression.has(*INFINITE, sympy.I)


def has_values(expression: sympy.Expr) -> bool:
    """Return whether the constants in a formula are real numbers of float64.

    sympy does not see every zero: ``1/log(sin(1)**2 + cos(1)**2)`` is evaluated to know.
    """
    if not is_defined(expression):
        return False
    if not _fits_float64(expression):
        return False
    parts = expression.atoms(sympy.Pow, sympy.Function)
    return all(_has_value(part) for part in parts if part.is_number)


def _has_value(constant: Any) -> bool:
    if not _size(constant) < sys.float_info.max:
        return False
    if isinstance(constant, sympy.Pow) and constant.exp.is_negative:
        return _size(constant.base) > NOT_ZERO
    return True


def _size(constant: Any) -> Any:
    """Return the absolute value of a constant formula, to 50 digits."""
    return abs(precise_values(constant, [SOMEWHERE])[0])


def own_symbols(expression: sympy.Expr) -> sympy.Expr:
    """Replace the caller's symbols named t and s, whatever their assumptions, by ours."""
    names = {str(symbol) for symbol in expression.free_symbols}
    strangers = sorted(names - {"t", "s"})
    if strangers:
        names = ", ".join(strangers)
        raise ExpressionError(f"{expression} has the symbols {names}; only t and s are times")
    ours: dict[Any, Any] = {symbol: NAMES[str(symbol)] for symbol in expression.free_symbols}
    return expression.subs(ours)


def _build(node: ast.AST) -> sympy.Expr:
    """Build the sympy expression of a syntax tree from the leaves up.

    Raises:
        ExpressionError: if something is not on the list.
    """
    match node:
        case ast.Constant(value=int() | float() as value) if _is_number(value):
            return sympy.Rational(repr(value))
        case ast.Name(id=name) if name in NAMES:
            return NAMES[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_build(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _build(operand)
        case ast.BinOp(op=ast.Pow(), left=base, right=exponent):
            return _power(_build(base), _build(exponent))
        case ast.BinOp(op=sign, left=left, right=right) if type(sign) in OPERATORS:
            operation = OPERATORS[type(sign)]
            return operation(_build(left), _build(right))
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in FUNCTIONS:
            return _function(name, _build(argument))
    names = ", ".join(NAMES)
    functions = ", ".join(FUNCTIONS)
    raise ExpressionError(
        f"{ast.unparse(node)!r} is not allowed{_hint_at(node)}; "
        f"only numbers, {names}, + - * / ** and {functions} are"
    )


def _is_number(value: float) -> bool:
    return not isinstance(value, bool) and math.isfinite(value)


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    _refuse_constant(exponent, MAX_EXPONENT, "an exponent")
    for number in exponent.atoms(sympy.Number):
        _refuse_constant(number, MAX_EXPONENT, "a number in an exponent")
    power = base**exponent
    if power.is_number and power.is_extended_real is False:
        raise ExpressionError(f"({base})**({exponent}) is not real")
    return power


def _function(name: str, argument: sympy.Expr) -> sympy.Expr:
    if name == "exp":
        _refuse_constant(argument, MAX_EXP, "an argument of exp")
    if name in MAX_ARGUMENT:
        limit = MAX_ARGUMENT[name]
        values = precise_values(argument, random_points(3), 15)
        sizes = [abs(value) for value in values]
        if any(size > limit for size in sizes):
            largest = mpmath.nstr(max(sizes), 3)
            raise ExpressionError(
                f"got an argument of {name} of {largest}, the limit is {limit:g}"
            )
    return FUNCTIONS[name](argument)


def _refuse_constant(value: sympy.Expr, limit: float, what: str) -> None:
    """Refuse a constant beyond the limit, before a power of it is formed."""
    if not value.is_number:
        return
    size = abs(complex(value))
    if not size <= limit:
        raise ExpressionError(f"got {what} of {size:.3g}, the limit is {limit}")


def _refuse_deep(tree: ast.AST) -> None:
    """Refuse deep nesting; a sum of sums is one sum, and a product of products one product."""
    waiting = [(tree, 0)]
    while waiting:
        node, level = waiting.pop()
        if level > MAX_DEPTH:
            raise ExpressionError(
                f"got functions, powers and brackets nested more than {MAX_DEPTH} deep; "
                "pass a callable instead"
            )
        for child in _operands(node):
            is_flat = False
            for kind in (SUMS, PRODUCTS):
                is_flat |= _is_binary(node, kind) and _is_binary(child, kind)
            waiting.append((child, level + (not is_flat)))


def _operands(node: ast.AST) -> list[ast.expr]:
    """Return what stands in a syntax tree one level down, without its operators."""
    children = ast.iter_child_nodes(node)
    return [child for child in children if isinstance(child, ast.expr)]


def _is_binary(node: ast.AST, kind: type | tuple[type, ...]) -> bool:
    """Return whether an operator of a kind stands between two operands."""
    return isinstance(node, ast.BinOp) and isinstance(node.op, kind)


def _refuse_towers(node: ast.AST) -> float:
    """Return by how much powers multiply up in this tree.

    Raises:
        ExpressionError: if they are towers, where sympy would form gigantic numbers.
    """
    match node:
        case ast.BinOp(op=ast.Pow(), left=base, right=exponent):
            _refuse_inside(exponent, "an exponent", ("exp", "log", "sqrt"))
            growth = _refuse_towers(base) * _largest_number(exponent)
            if growth > MAX_EXPONENT:
                raise ExpressionError(
                    f"got constant exponents that multiply to {growth:.3g}, "
                    f"the limit is {MAX_EXPONENT}"
                )
            return growth
        case ast.Call(func=ast.Name(id="exp"), args=arguments):
            for argument in arguments:
                _refuse_inside(argument, "the argument of exp", ("exp", "log"))
    growths = [_refuse_towers(child) for child in ast.iter_child_nodes(node)]
    return max(growths, default=1.0)


def _refuse_inside(node: ast.AST, where: str, functions: tuple[str, ...]) -> None:
    """Refuse powers in an exponent, and exp and log in an exponent or in exp: towers."""
    for inner in ast.walk(node):
        is_power = _is_binary(inner, ast.Pow) and "sqrt" in functions
        is_function = isinstance(inner, ast.Name) and inner.id in functions
        if is_function or is_power:
            raise ExpressionError(
                f"{ast.unparse(inner)!r} inside {where} is a power tower; "
                "write a**t instead of exp(t*log(a)), or pass a callable"
            )


def _largest_number(node: ast.AST) -> float:
    """Return the size of the largest number in a syntax tree, 1 at least."""
    largest = 1.0
    for inner in ast.walk(node):
        match inner:
            case ast.Constant(value=int() | float() as number):
                largest = max(largest, abs(float(number)))
    return largest


def _hint_at(node: ast.AST) -> str:
    """Return what a syntax tree that is not allowed may have meant."""
    if isinstance(node, ast.Call) and _is_factor(node.func):
        return " (products are written *)"
    if isinstance(node, ast.Constant):
        return _hint_at_constant(node.value)
    return _hint(ast.unparse(node))


def _hint_at_constant(value: Any) -> str:
    if isinstance(value, float):
        return " (a number is at most 1.8e308)"
    return ""


def _is_factor(node: ast.AST) -> bool:
    """Return whether what is called was meant to be multiplied, as in ``t(1 - t)``."""
    if isinstance(node, ast.Name):
        return node.id in NAMES
    return isinstance(node, (ast.BinOp, ast.Constant, ast.Call))


def _hint(text: str) -> str:
    """Return how a text's foreign signs are written here, or where a product lacks its sign."""
    for sign, advice in FOREIGN.items():
        if sign in text:
            return f" ({advice})"
    if MISSING_PRODUCT.search(text):
        return " (products are written *)"
    return ""


# --- sympy's algebra, in bounded time
# -------------------------------------------------------------------------------------------------


def tidy(expression: sympy.Expr) -> sympy.Expr:
    """Cancel common factors, which also removes most 0/0 on edges; large formulas stay."""
    if not is_small(expression, MAX_CANCEL):
        return expression
    if expression.has(sympy.exp, sympy.log):
        return expression
    powers = expression.atoms(sympy.Pow)
    if not all(power.exp.is_integer for power in powers):
        return expression
    cancelled: Any = sympy.cancel(expression)
    factored: Any = sympy.factor(cancelled)
    if not _fits_float64(factored):
        return expression
    return factored


@lru_cache(maxsize=256)
def readable(expression: sympy.Expr) -> sympy.Expr:
    """Return the shortest form of a formula that a few quick rewritings find."""
    if not is_small(expression, 2 * MAX_CANCEL):
        return expression
    if expression.has(sympy.exp, sympy.log):
        return expression
    forms: list[Any] = [expression, sympy.factor(expression)]
    shorter = min(forms, key=sympy.count_ops)
    if _is_plain_trigonometry(shorter):
        expanded = sympy.expand(shorter)
        forms.append(sympy.trigsimp(shorter))
        forms.append(sympy.factor(sympy.trigsimp(expanded)))
    forms = [form for form in forms if _fits_float64(form)]
    shortest: Any = min(forms, key=sympy.count_ops, default=expression)
    return shortest.replace(_is_sine, _with_factored_argument)


def _is_sine(part: Any) -> bool:
    """Return whether a part of a formula is a sine or the like."""
    return isinstance(part, TrigonometricFunction)


def _with_factored_argument(sine: Any) -> Any:
    return sine.func(sympy.factor(sine.args[0]))


def _is_plain_trigonometry(expression: sympy.Expr) -> bool:
    """Return whether there are a few sines and the like of simple arguments, for `trigsimp`."""
    if expression.count_ops() > MAX_CANCEL:
        return False
    functions = expression.atoms(TrigonometricFunction)
    if not 0 < len(functions) <= MAX_FUNCTIONS:
        return False
    for function in functions:
        nested = function.args[0].has(sympy.Function, sympy.Pow)
        if nested or not function.free_symbols:
            return False
    orders = [abs(power.exp) for power in expression.atoms(sympy.Pow)]
    return all(order.is_number and order <= MAX_POWER for order in orders)


def _fits_float64(expression: sympy.Expr) -> bool:
    """Return whether every number in a formula is one of float64."""
    largest = sys.float_info.max
    for number in expression.atoms(sympy.Rational):
        if not max(abs(number.p), number.q) < largest:
            return False
    return True


def is_small(expression: sympy.Expr, operations: int) -> bool:
    """Return whether multiplying out, cancelling and factoring take a moment only."""
    if expression.count_ops() > operations:
        return False
    return expanded_terms(expression) <= MAX_TERMS


def expanded_terms(expression: sympy.Basic) -> float:
    """Return about how many terms a formula has once it is multiplied out."""
    sizes = [expanded_terms(part) for part in expression.args]
    if isinstance(expression, sympy.Add):
        return sum(sizes)
    if isinstance(expression, sympy.Mul):
        return math.prod(sizes)
    if isinstance(expression, sympy.Pow) and isinstance(expression.exp, sympy.Rational):
        return _power_terms(sizes[0], expression.exp)
    size = max(sizes, default=1)
    if size > MAX_DEGREE:
        return 4 * size
    return size


def _power_terms(terms: float, exponent: sympy.Rational) -> float:
    """Return how many terms a power of a sum has.

    A root or a high power of one term counts as the polynomial that factoring makes of it.
    """
    order = max(abs(exponent.p), exponent.q)
    if terms <= 1 and exponent.q == 1 and order <= MAX_DEGREE:
        return 1
    if terms <= 1 or terms > MAX_TERMS:
        return 4 * order * terms
    return math.comb(int(terms) + order - 1, order)


def precise_values(
    expression: sympy.Expr, points: Sequence[tuple[Any, ...]], digits: int = 50
) -> list[Any]:
    """Evaluate a formula at (t, s) points with that many digits; nan where it has no value."""
    if not is_defined(expression):
        return [mpmath.nan] * len(points)
    function = sympy.lambdify((T, S), expression, modules="mpmath")
    with mpmath.workdps(digits):
        return [_real_value(function, point) for point in points]


def _real_value(function: Callable[..., Any], point: tuple[Any, ...]) -> Any:
    try:
        value = mpmath.mpmathify(function(*map(mpmath.mpf, point)))
    except (ArithmeticError, ValueError):
        return mpmath.nan
    if isinstance(value, mpmath.mpc) and value.imag:
        return mpmath.nan
    return value.real


def random_points(count: int) -> list[tuple[float, float]]:
    """Return points 0 < s < t < 1, the same in every call, so that checks never waver."""
    draw = random.Random(count)
    points = []
    for _ in range(count):
        first = draw.uniform(0.02, 0.98)
        second = draw.uniform(0.02, 0.98)
        points.append((max(first, second), min(first, second)))
    return points
