"""Which properties a statistic has under a schedule, why not, and which objective fits."""

import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from flowspace.errors import CriterionError
from flowspace.formulas import precise_values, random_points, readable
from flowspace.inputs import require
from flowspace.schedules import TIME_FLOOR, Schedule
from flowspace.statistics import (
    DIAGONAL_POINTS,
    DIAGONAL_TOLERANCE,
    GROWS,
    AbstractStatistic,
    Coefficients,
    Statistic,
    worst_on_diagonal,
)
from flowspace.time_functions import NUDGE, TimeFunction
from flowspace.typeset import latex_term, text_of

__all__ = ["CriteriaReport", "check_criteria"]

CORNER = 1e-12
"""Criterion 2's limits are evaluated so near (1, 0), with 50 digits.

For callables it is `NUDGE`, in float64.
"""

BEFORE_CORNER = 100
"""For comparison a limit is also evaluated so many times farther away.

An infinite one is smaller there, by more than `GROWS`.
"""

LIMIT_TOLERANCE = 1e-4
"""That near the corner, gamma and delta may be so far from 1 and -1."""

LABEL = 12
"""Characters that a report gives to the name of a row."""

EXPLODES = 1e6
"""A coefficient beyond this at t = 1e-9 is reported as singular for t -> 0."""


@dataclass(frozen=True)
class CriteriaReport:
    """What holds for one statistic under one schedule; ``str(report)`` is the page to read.

    Attributes:
        schedule: what the statistic was checked under.
        statistic: with gamma and delta written out for that schedule.
        coefficients: what multiplies what in the residual.
        criterion1: kappa = (1 + gamma/delta) beta(t) depends on s alone, so identity (II) holds
            (CrossFlow's Criterion 1).
        criterion2: gamma(1,0) = 1 and delta(1,0) = -1, so f at (1, 0) is a sample (CrossFlow's
            Criterion 2).
        anchored: b(t,t) = 0, so on the diagonal the residual is a reconstruction loss.
        matched: a(t,t) = c(t,t), so it reconstructs x itself and not a multiple of it.
        kappa: the derived kappa as a sympy expression in s, a function for callables, None if
            Criterion 1 fails.
        singular: the edges on which a, b or c has no finite value.
        reasons: one line for each property, by its name.
    """

    schedule: Schedule
    statistic: Statistic
    coefficients: Coefficients
    criterion1: bool
    criterion2: bool
    anchored: bool
    matched: bool
    kappa: "sympy.Expr | TimeFunction | None"
    singular: tuple[str, ...]
    reasons: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether both criteria hold."""
        return self.criterion1 and self.criterion2

    def raise_if_failed(self) -> None:
        """Raise CriterionError with the whole report if Criterion 1 or 2 fails."""
        failed = []
        if not self.criterion1:
            failed.append("1")
        if not self.criterion2:
            failed.append("2")
        if failed:
            names = " and ".join(failed)
            raise CriterionError(f"Criterion {names} failed.\n{self}")

    @property
    def advice(self) -> str:
        """Which objective fits where `CrossFlowLoss` refuses the statistic, or an empty text."""
        if not self.criterion1:
            return _advice_without_data(self.coefficients)
        if self.coefficients.data_vanishes:
            return (
                "kappa = 0: the data term vanishes, so nothing ties f to x; use ConsistencyLoss()"
            )
        if not self.criterion2:
            return _advice_for_no_sample(*_corner(self.coefficients))
        return ""

    def residual(self) -> str:
        """The residual in readable form: identity (II) where Criterion 1 holds, else (I)."""
        c = self.coefficients
        letters = {"a": c.prediction, "b": c.derivative}
        if self.criterion1:
            lines = ["R = a f + b D_t f - c x"]
            letters["c"] = c.data
        else:
            lines = ["R = a f + b D_t f - p z_t - q v"]
            letters["p"] = c.state
            letters["q"] = c.velocity
        for letter, function in letters.items():
            lines.append(f"{letter} = {_text(function)}")
        return "\n".join(lines)

    def latex(self) -> str:
        """The residual as LaTeX, coefficients written out."""
        c = self.coefficients
        terms = [
            _latex("a", c.prediction, "f"),
            _latex("b", c.derivative, "D_t f"),
        ]
        if self.criterion1:
            terms.append(_latex("c", c.data, "x", sign=-1))
        else:
            terms.append(_latex("p", c.state, "z_t", sign=-1))
            terms.append(_latex("q", c.velocity, "v", sign=-1))
        present = [term for term in terms if term]
        return "R = " + " ".join(present).removeprefix("+ ")

    def _statistic(self) -> str:
        gamma = _text(self.statistic.gamma)
        delta = _text(self.statistic.delta)
        return f"gamma(t, s) = {gamma}, delta(t, s) = {delta}"

    def _kappa(self) -> str:
        if isinstance(self.kappa, sympy.Expr):
            return text_of(self.kappa)
        return str(self.kappa or "none")

    def __str__(self) -> str:
        rows = [
            ("schedule", str(self.schedule)),
            ("statistic", self._statistic()),
            ("kappa(s)", self._kappa()),
            *self.reasons.items(),
            ("singular", ", ".join(self.singular) or "nowhere"),
            ("residual", self.residual()),
        ]
        if self.advice:
            rows.append(("advice", self.advice))
        lines = []
        for name, text in rows:
            indented = text.replace("\n", "\n" + " " * LABEL)
            lines.append(name.ljust(LABEL) + indented)
        return "\n".join(lines)


def check_criteria(schedule: Schedule, statistic: AbstractStatistic) -> CriteriaReport:
    """Derive kappa, and say which properties a statistic has under a schedule.

    They are the two criteria, anchored and matched.

    Args:
        schedule: alpha and beta.
        statistic: gamma and delta.

    Returns:
        A report that never raises by itself; see `CriteriaReport.raise_if_failed`.

    Raises:
        InputError: if schedule or statistic is none.
        CriterionError: if delta is zero, complex or not finite where times may lie.
    """
    require(
        isinstance(statistic, AbstractStatistic),
        "statistic",
        statistic,
        "write check_criteria(LinearSchedule(), MatchedStatistic())",
    )
    c = statistic.coefficients(schedule)
    properties = {
        "Criterion 1": _criterion1(c),
        "Criterion 2": _criterion2(c),
        "anchored": _anchored(c),
        "matched": _matched(c),
    }
    return CriteriaReport(
        schedule=schedule,
        statistic=statistic.on(schedule),
        coefficients=c,
        criterion1=not c.failure,
        criterion2=properties["Criterion 2"].holds,
        anchored=c.anchored,
        matched=properties["matched"].holds,
        kappa=_kappa(c),
        singular=tuple(_singular_edges(c)),
        reasons={name: str(each) for name, each in properties.items()},
    )


def _kappa(c: Coefficients) -> "sympy.Expr | TimeFunction | None":
    if c.failure:
        return None
    return c.kappa


@dataclass(frozen=True)
class _Property:
    """Whether something holds, and why or why not."""

    holds: bool
    reason: str

    def __str__(self) -> str:
        if self.holds:
            return f"holds  {self.reason}"
        return f"FAILS  {self.reason}"


def _criterion1(c: Coefficients) -> _Property:
    if c.failure:
        return _Property(False, c.failure)
    return _Property(True, "kappa depends on s alone: the velocity drops out, identity (II)")


def _criterion2(c: Coefficients) -> _Property:
    gamma, delta = _corner(c)
    gamma_text = _value("gamma(1,0)", gamma)
    delta_text = _value("delta(1,0)", delta)
    values = f"{gamma_text}, {delta_text}"
    is_one = abs(gamma - 1) < LIMIT_TOLERANCE
    is_minus_one = abs(delta + 1) < LIMIT_TOLERANCE
    if is_one and is_minus_one:
        return _Property(True, f"{values}: f at (1, 0) is a sample")
    why = "f at (1, 0) is no sample; they must be 1 and -1"
    return _Property(False, f"{values}: {why}")


def _anchored(c: Coefficients) -> _Property:
    if c.anchored:
        return _Property(True, "b(t,t) = 0: on s = t the residual is a reconstruction loss")
    size, time = worst_on_diagonal(c.derivative)
    return _Property(False, f"b(t,t) is not 0 but {_size(size)} at t = {time:.3g}")


def _matched(c: Coefficients) -> _Property:
    if c.failure:
        return _Property(False, "there is no c without Criterion 1")
    if c.data_vanishes:
        return _Property(False, "c = 0: there is no data term to match")

    def miss(t: Tensor, s: Tensor) -> Tensor:
        return c.prediction(t, s) / c.data(t, s) - 1

    size, time = worst_on_diagonal(miss)
    if size <= DIAGONAL_TOLERANCE:
        return _Property(True, "a(t,t) = c(t,t): it reconstructs x itself")
    return _Property(False, f"a/c - 1 is not 0 but {_size(size)} at s = t = {time:.3g}")


def _value(name: str, value: float) -> str:
    if math.isnan(value):
        return f"{name} is undefined"
    if math.isinf(value):
        return f"{name} is infinite"
    return f"{name} = {value:.6g}"


def _size(value: float) -> str:
    if math.isinf(value):
        return "infinite"
    return f"{value:.4g} in size"


def _advice_without_data(c: Coefficients) -> str:
    why = "without Criterion 1 there is no data term"
    if _is_mean_flow(c):
        return f"{why}, and f is the average velocity; use MeanFlowLoss(), in one space"
    return (
        f"{why}; use MeanFlowLoss(statistic=...), "
        "which has a velocity in its place, in one space, "
        "or Statistic.from_kappa(schedule, kappa, delta), "
        "which derives the gamma that meets it"
    )


def _is_mean_flow(c: Coefficients) -> bool:
    """Return whether gamma = 0 and delta = 1/(t - s), at points inside the triangle."""
    points = random_points(DIAGONAL_POINTS)
    t, s = torch.tensor(points, dtype=torch.float64).unbind(1)
    keeps_state = torch.allclose(c.velocity(t, s), torch.ones_like(t))
    return keeps_state and torch.allclose(c.derivative(t, s), t - s)


def _advice_for_no_sample(gamma: float, delta: float) -> str:
    factor = -delta
    is_proportional = abs(gamma - factor) < LIMIT_TOLERANCE * abs(factor)
    if is_proportional:
        return (
            f"f at (1, 0) is {factor:.6g} times a sample: divide gamma and delta by {factor:.6g}"
        )
    return (
        "f at (1, 0) is no sample, so one step from noise gives none; "
        "use MatchedStatistic(), or CrossFlowLoss(check=False) to train it all the same"
    )


def _corner(c: Coefficients) -> tuple[float, float]:
    """Return gamma = (gamma/delta)/b and delta = 1/b in the limit (t, s) -> (1, 0).

    Each is infinite where it still grows, and nan where it is 0/0.
    """
    formulas = (c.derivative.expression, c.velocity.expression)
    distance = CORNER
    if any(formula is None for formula in formulas):
        distance = NUDGE
    gamma, delta = _near_corner(c, distance)
    farther = BEFORE_CORNER * distance
    gamma_before, delta_before = _near_corner(c, farther)
    return _limit(gamma, gamma_before), _limit(delta, delta_before)


def _near_corner(c: Coefficients, distance: float) -> tuple[float, float]:
    b = _at_point(c.derivative, distance)
    kept = _at_point(c.velocity, distance)
    if b == 0 and kept == 1:
        return math.nan, math.inf
    if b == 0:
        return math.inf, math.inf
    return float((kept - 1) / b), float(1 / b)


def _at_point(function: TimeFunction, distance: float) -> Any:
    """Return a function's value at that distance from (1, 0), with 50 digits for a formula."""
    if function.expression is not None:
        near = sympy.Float(distance, 50)
        point = (1 - near, near)
        return precise_values(function.expression, [point])[0]
    near = torch.tensor(distance, dtype=torch.float64)
    return float(function(1 - near, near))


def _limit(value: float, before: float) -> float:
    if abs(value) > GROWS * abs(before) and abs(value) > 1:
        return math.inf
    return value


def _singular_edges(c: Coefficients) -> list[str]:
    times = torch.linspace(TIME_FLOOR, 1, DIAGONAL_POINTS, dtype=torch.float64)
    near = torch.tensor([1e-9], dtype=torch.float64)
    functions = [c.prediction, c.derivative]
    if c.failure:
        functions += [c.state, c.velocity]
    else:
        functions.append(c.data)

    def bounded(t: Tensor, s: Tensor, limit: float = torch.inf) -> bool:
        sizes = torch.stack([f(t, s).abs() for f in functions])
        return bool((sizes < limit).all())

    edges = {
        "s = t": bounded(times, times),
        "s = 0": bounded(times, torch.zeros_like(times)),
        "t = 1": bounded(torch.ones_like(times), times),
        "t -> 0": bounded(near, near / 2, EXPLODES),
    }
    return [name for name, fine in edges.items() if not fine]


_SIGNS = {1: "+", -1: "-"}


def _latex(letter: str, function: TimeFunction, symbol: str, sign: int = 1) -> str:
    """Return a term of the residual; a callable coefficient by its letter."""
    if function.expression is None:
        return f"{_SIGNS[sign]} {letter}(t, s) {symbol}"
    return latex_term(sign * readable(function.expression), symbol)


def _text(function: TimeFunction) -> str:
    if function.expression is None:
        return str(function)
    return text_of(readable(function.expression))
