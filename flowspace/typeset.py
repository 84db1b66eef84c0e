r"""Formulas as one reads them: text that `parse` reads again, and LaTeX.

A factor that is a sum is written with the sign that makes it positive for 0 < s < t < 1, and a
sum begins with its positive terms: $1/(t - s)$, not $1/(-s + t)$ or $-1/(s - t)$.
"""

from typing import Any

import sympy
from sympy.printing.latex import LatexPrinter
from sympy.printing.str import StrPrinter

from flowspace.formulas import precise_values, random_points

__all__ = ["latex_of", "latex_term", "text_of"]

SIGN_POINTS = 40
"""Points inside the triangle at which the sign of a sum is asked for."""


MAX_DENOMINATOR = 100
"""Fractions beyond it came from decimals, and are written as these."""


class _ForReading:
    """Sums begin with their positive terms, and decimals stay decimals."""

    def _print_Rational(self, expr: sympy.Rational) -> str:
        if expr.q > MAX_DENOMINATOR:
            decimal = repr(float(expr))
            if sympy.Rational(decimal) == expr:
                return decimal
        return super()._print_Rational(expr)  # type: ignore[misc]

    def _as_ordered_terms(self, expr: sympy.Expr, order: Any = None) -> list[sympy.Expr]:
        terms = super()._as_ordered_terms(expr, order)  # type: ignore[misc]
        return sorted(terms, key=lambda term: term.could_extract_minus_sign())


class _TextPrinter(_ForReading, StrPrinter):
    pass


class _LatexPrinter(_ForReading, LatexPrinter):
    pass


def text_of(expression: sympy.Expr) -> str:
    """Return a formula as text that `parse` reads."""
    marked, sums = _with_marks(expression)
    text = _TextPrinter().doprint(marked)
    for mark, each in sums.items():
        inner = text_of(each)
        text = text.replace(f"({mark})", f"({inner})")
        text = text.replace(str(mark), f"({inner})")
    return text


def latex_of(expression: sympy.Expr) -> str:
    """Return a formula as LaTeX."""
    marked, sums = _with_marks(expression)
    names = {mark: str(mark) for mark in sums}
    text = _LatexPrinter({"symbol_names": names}).doprint(marked)
    for mark, each in sums.items():
        inner = latex_of(each)
        text = text.replace(f"{{{mark}}}", f"{{{inner}}}")
        text = text.replace(rf"\left({mark} \right)", rf"\left({inner} \right)")
        text = text.replace(str(mark), rf"\left({inner}\right)")
    return text


def latex_term(coefficient: sympy.Expr, symbol: str) -> str:
    r"""Return a coefficient times a symbol, with its sign in front: ``- \frac{s}{t^{2}} f``.

    It is empty for a coefficient of zero.
    """
    if coefficient == 0:
        return ""
    sign = "+"
    text = latex_of(coefficient)
    if isinstance(coefficient, sympy.Add):
        if _is_negative(coefficient):
            sign, text = "-", latex_of(-coefficient)
        text = rf"\left({text}\right)"
    elif text.startswith("- "):
        sign, text = "-", text.removeprefix("- ")
    elif text.startswith("-"):
        sign, text = "-", text.removeprefix("-")
    if text == "1":
        return f"{sign} {symbol}"
    return f"{sign} {text} {symbol}"


def _with_marks(expression: sympy.Expr) -> tuple[Any, dict[sympy.Symbol, Any]]:
    """Return a formula with marks for the factors that are sums, and these, made positive."""
    sums: dict[sympy.Symbol, Any] = {}

    def marked(part: Any) -> Any:
        if not part.args:
            return part
        inner = [marked_factor(each) for each in part.args]
        if not isinstance(part, (sympy.Mul, sympy.Pow)):
            inner = [marked(each) for each in part.args]
        return part.func(*inner)

    def marked_factor(part: Any) -> Any:
        if not isinstance(part, sympy.Add):
            return marked(part)
        sign = 1
        if _is_negative(part):
            sign = -1
        for mark, each in sums.items():
            if each == sign * part:
                return sign * mark
        mark = sympy.Symbol(f"~{len(sums)}~", positive=True)
        sums[mark] = sign * part
        return sign * mark

    return marked(expression), sums


def _is_negative(expression: sympy.Expr) -> bool:
    """Return whether a formula is negative everywhere inside 0 < s < t < 1, as far as is seen."""
    points = random_points(SIGN_POINTS)
    values = precise_values(expression, points, 15)
    return all(value < 0 for value in values)
