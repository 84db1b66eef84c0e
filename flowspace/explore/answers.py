"""What the page shows of a design, part by part, the quick parts first."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import sympy
import torch
from latex2mathml.converter import convert

from flowspace.errors import FlowspaceError
from flowspace.explore.design import Design, DesignError, python_of, read, report_of
from flowspace.explore.maps import CoefficientMap, coefficient_maps, terms
from flowspace.explore.mixture import CLOVER, TIMES, flow
from flowspace.formulas import readable
from flowspace.statistics import Coefficients
from flowspace.typeset import latex_of, latex_term, text_of

__all__ = [
    "Answer",
    "Derived",
    "Properties",
    "Refused",
    "Residual",
    "Trajectories",
    "WrittenOut",
    "answers",
]

SIGNS = {1: "+", -1: "-"}
TRAJECTORIES = 120
TOO_LONG = 420
"""Characters of LaTeX beyond which a coefficient is shown by its letter."""


@dataclass(frozen=True)
class Refused:
    """Formulas that are no design: why, by the name of the formula."""

    problems: dict[str, str]


@dataclass(frozen=True)
class Derived:
    """What is known at once.

    Attributes:
        kappa: as text; empty where Criterion 1 fails.
        kappa_markup: the equation for kappa as MathML, likewise.
        maps: the residual's coefficients over the triangle.
    """

    kappa: str
    kappa_markup: str
    maps: list[CoefficientMap]


@dataclass(frozen=True)
class Properties:
    """The criteria.

    Attributes:
        holds: whether each property holds, by its name.
        reasons: why or why not, by its name.
        singular: the edges on which a coefficient has no finite value.
        advice: which objective fits where `CrossFlowLoss` refuses, or an empty text.
        python: the program that builds the same.
    """

    holds: dict[str, bool]
    reasons: dict[str, str]
    singular: tuple[str, ...]
    advice: str
    python: str


@dataclass(frozen=True)
class Residual:
    """The residual.

    Attributes:
        latex: in full.
        markup: its terms as MathML.
        is_whole: whether the terms show every coefficient in full.
    """

    latex: str
    markup: list[str]
    is_whole: bool


@dataclass(frozen=True)
class WrittenOut:
    """The statistic's formulas, as text, by name: gamma, delta, and kappa and h if there are."""

    formulas: dict[str, str]


@dataclass(frozen=True)
class Trajectories:
    """The mixture's flow under the schedule: states ``(n, B, 2)`` from noise to data.

    B is 0 where the solver does not come through.
    """

    states: np.ndarray


Answer = Refused | Derived | Properties | Residual | WrittenOut | Trajectories


def answers(design: Design) -> Iterator[Answer]:
    """Yield what the page shows of a design, the quick parts first; or why it is none."""
    try:
        schedule, statistic = read(design)
        coefficients = statistic.coefficients(schedule)
        yield _derived(coefficients)
        yield _properties(design)
    except DesignError as error:
        yield Refused(error.problems)
        return
    except FlowspaceError as error:
        yield Refused({"statistic": str(error)})
        return
    yield residual_of(coefficients)
    yield _written_out(design, coefficients)
    noise = torch.randn(
        TRAJECTORIES, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    try:
        yield Trajectories(flow(schedule, CLOVER, noise).numpy())
    except AssertionError:  # torchdiffeq's word for a step that became too small
        yield Trajectories(np.zeros((len(TIMES), 0, 2)))


def residual_of(coefficients: Coefficients) -> Residual:
    """Return the residual, term by term, so that it can be broken between them."""
    parts, shown = [], []
    for name, place, function in terms(coefficients):
        sign = 1
        if name in ("c", "p", "q"):
            sign = -1
        part = latex_term(sign * readable(_expression(function.expression)), place)
        if part:
            parts.append(part)
            shown.append(_shown(part, name, place, sign))
    first = _sum(shown[:1])
    return Residual(
        latex=_sum(parts),
        markup=[markup(first), *[markup("{} " + each) for each in shown[1:]]],
        is_whole=parts == shown,
    )


def _sum(parts: list[str]) -> str:
    return "R = " + " ".join(parts).removeprefix("+ ")


def markup(latex: str) -> str:
    """Return LaTeX as MathML."""
    return convert(latex, display="block")


def _derived(c: Coefficients) -> Derived:
    kappa = kappa_markup = ""
    if not c.failure:
        formula = readable(_expression(c.scaled_kappa.expression))
        kappa = text_of(formula)
        kappa_markup = convert(rf"\kappa(s) = {latex_of(formula)}")
    return Derived(kappa, kappa_markup, coefficient_maps(c))


def _properties(design: Design) -> Properties:
    report = report_of(design)
    holds, reasons = {}, {}
    for name, reason in report.reasons.items():
        holds[name] = reason.startswith("holds")
        reasons[name] = reason[len("holds") :].strip()
    return Properties(
        holds=holds,
        reasons=reasons,
        singular=report.singular,
        advice=report.advice,
        python=python_of(design),
    )


def _written_out(design: Design, c: Coefficients) -> WrittenOut:
    statistic = report_of(design).statistic
    formulas = {
        "gamma": _text(statistic.gamma.expression),
        "delta": _text(statistic.delta.expression),
    }
    kappa = _expression(c.scaled_kappa.expression)
    if not c.failure:
        formulas["kappa"] = _text(kappa)
    if not c.failure and kappa != 0:
        formulas["h"] = _text(_expression(c.derivative.expression) / kappa)
    return WrittenOut(formulas)


def _expression(formula: sympy.Expr | None) -> sympy.Expr:
    """Return a formula; what is typed always is one."""
    if formula is None:
        raise TypeError("got a callable, but a design is text only")
    return formula


def _text(formula: sympy.Expr | None) -> str:
    return text_of(readable(_expression(formula)))


def _shown(part: str, name: str, place: str, sign: int) -> str:
    """Return a term as it is shown: a very long coefficient by its letter."""
    if len(part) <= TOO_LONG:
        return part
    return f"{SIGNS[sign]} {name}(t, s) {place}"
