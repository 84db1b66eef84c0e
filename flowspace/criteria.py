"""Which properties a statistic has under a schedule, and why not."""

import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from flowspace.errors import CriterionError, InputError
from flowspace.formulas import precise_values, readable
from flowspace.schedules import TIME_FLOOR, Schedule
from flowspace.statistics import (
    DIAGONAL_POINTS,
    DIAGONAL_TOLERANCE,
    AbstractStatistic,
    Coefficients,
    Statistic,
    worst_on_diagonal,
)
from flowspace.time_functions import NUDGE, TimeFunction

__all__ = ["CriteriaReport", "check_criteria"]

CORNER = 1e-12
"""How near (1, 0) Criterion 2's limits are evaluated, with 50 digits; for callables `NUDGE`, in
float64.
"""

LIMIT_TOLERANCE = 1e-4
"""How far gamma and delta may be from 1 and -1 that near the corner."""

EXPLODES = 1e6
"""A coefficient beyond this at t = 1e-9 is reported as singular for t -> 0."""


@dataclass(frozen=True)
class CriteriaReport:
    """What holds for one statistic under one schedule; ``str(report)`` is the page to read.

    Attributes:
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
        if not self.ok:
            names = [
                name
                for name, holds in (("1", self.criterion1), ("2", self.criterion2))
                if not holds
            ]
            raise CriterionError(f"Criterion {' and '.join(names)} failed.\n{self}")

    def residual(self) -> str:
        """The residual in readable form: identity (II) where Criterion 1 holds, else (I)."""
        c = self.coefficients
        rows = [("a", c.prediction), ("b", c.derivative)]
        rows += [("c", c.data)] if self.criterion1 else [("p", c.state), ("q", c.velocity)]
        form = "R = a f + b D_t f - c x" if self.criterion1 else "R = a f + b D_t f - p z_t - q v"
        return "\n".join([form, *(f"{name} = {_text(function)}" for name, function in rows)])

    def latex(self) -> str:
        """The residual as LaTeX, coefficients written out."""
        c = self.coefficients
        known = [(c.data, "x")] if self.criterion1 else [(c.state, "z_t"), (c.velocity, "v")]
        terms = [(c.prediction, "f"), (c.derivative, "D_t f")]
        left = " + ".join(rf"\left({_latex(f)}\right) {symbol}" for f, symbol in terms)
        return (
            "R = "
            + left
            + "".join(rf" - \left({_latex(f)}\right) {symbol}" for f, symbol in known)
        )

    def _statistic(self) -> str:
        return (
            f"gamma(t, s) = {_text(self.statistic.gamma)}, delta(t, s) = "
            f"{_text(self.statistic.delta)}"
        )

    def __str__(self) -> str:
        kappa = "none" if self.kappa is None else self.kappa
        rows = [
            ("schedule", str(self.schedule)),
            ("statistic", self._statistic()),
            ("kappa(s)", str(kappa)),
        ]
        rows += [(name, text) for name, text in self.reasons.items()]
        rows += [
            ("singular", ", ".join(self.singular) or "nowhere"),
            ("residual", self.residual()),
        ]
        return "\n".join(f"{name:<12}{text}".replace("\n", "\n" + " " * 12) for name, text in rows)


def check_criteria(schedule: Schedule, statistic: AbstractStatistic) -> CriteriaReport:
    """Derive kappa and say which properties a statistic has under a schedule: the two criteria,
    anchored, matched.

    Returns:
        A report that never raises by itself; see `CriteriaReport.raise_if_failed`.

    Raises:
        InputError: if schedule or statistic is none.
        CriterionError: if delta is zero, complex or not finite where times may lie.
    """
    if not isinstance(statistic, AbstractStatistic):
        raise InputError(
            f"statistic = {statistic!r} came; write check_criteria(LinearSchedule(), "
            "MatchedStatistic())"
        )
    c = statistic.coefficients(schedule)
    first = not c.failure
    kappa = c.kappa if first else None
    gamma, delta = _corner(c)
    second = abs(gamma - 1) < LIMIT_TOLERANCE and abs(delta + 1) < LIMIT_TOLERANCE
    off, off_at = worst_on_diagonal(c.derivative)
    gap, gap_at = (
        worst_on_diagonal(lambda t, s: c.prediction(t, s) / c.data(t, s) - 1)
        if first
        else (math.inf, 0.0)
    )
    matched = gap <= DIAGONAL_TOLERANCE
    reasons = {
        "Criterion 1": _line(
            first, "kappa depends on s alone: the velocity drops out, identity (II)", c.failure
        ),
        "Criterion 2": _line(
            second,
            f"gamma(1,0) = {gamma:.6g}, delta(1,0) = {delta:.6g}: f at (1, 0) is "
            + ("a sample" if second else "no sample; they must be 1 and -1"),
        ),
        "anchored": _line(
            c.anchored,
            "b(t,t) = 0: on s = t the residual is a reconstruction loss",
            f"b(t,t) is not 0 but {off:.4g} in size at t = {off_at:.3g}",
        ),
        "matched": _line(
            matched,
            "a(t,t) = c(t,t): it reconstructs x itself",
            f"a/c - 1 is not 0 but {gap:.4g} in size at s = t = {gap_at:.3g}"
            if first
            else "there is no c without Criterion 1",
        ),
    }
    return CriteriaReport(
        schedule,
        statistic.on(schedule),
        c,
        first,
        second,
        c.anchored,
        matched,
        kappa,
        tuple(_singular_edges(c, first)),
        reasons,
    )


def _line(holds: bool, why: str, why_not: str = "") -> str:
    return f"{'holds' if holds else 'FAILS'}  {why if holds else why_not or why}"


def _corner(c: Coefficients) -> tuple[float, float]:
    """Return gamma = (gamma/delta)/b and delta = 1/b in the limit (t, s) -> (1, 0)."""
    if c.derivative.expression is not None and c.velocity.expression is not None:
        corner = [(1 - sympy.Float(CORNER, 50), sympy.Float(CORNER, 50))]
        b, kept = (
            precise_values(f.expression, corner)[0]
            for f in (c.derivative, c.velocity)
            if f.expression is not None
        )
    else:
        t, s = (torch.tensor(time, dtype=torch.float64) for time in (1 - NUDGE, NUDGE))
        b, kept = float(c.derivative(t, s)), float(c.velocity(t, s))
    return (float((kept - 1) / b), float(1 / b)) if b else (float("nan"), float("inf"))


def _singular_edges(c: Coefficients, first: bool) -> list[str]:
    times = torch.linspace(TIME_FLOOR, 1, DIAGONAL_POINTS, dtype=torch.float64)
    near = torch.tensor([1e-9], dtype=torch.float64)
    functions: list[TimeFunction] = [
        c.prediction,
        c.derivative,
        *([c.data] if first else [c.state, c.velocity]),
    ]

    def bounded(t: Tensor, s: Tensor, limit: float = torch.inf) -> bool:
        return all(bool((f(t, s).abs() < limit).all()) for f in functions)

    edges: dict[str, Any] = {
        "s = t": bounded(times, times),
        "s = 0": bounded(times, torch.zeros_like(times)),
        "t = 1": bounded(torch.ones_like(times), times),
        "t -> 0": bounded(near, near / 2, EXPLODES),
    }
    return [name for name, fine in edges.items() if not fine]


def _latex(function: TimeFunction) -> str:
    return (
        r"\text{callable}"
        if function.expression is None
        else sympy.latex(readable(function.expression))
    )


def _text(function: TimeFunction) -> str:
    return str(function if function.expression is None else readable(function.expression))
