"""What one types on the page: formulas, and the schedule and statistic that they stand for.

A design is text only. It is read by the library's own parser, never by Python; it goes into a
link and comes back from one, and it is written as the Python that builds the same.
"""

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from urllib.parse import urlencode

from flowspace.criteria import CriteriaReport, check_criteria
from flowspace.errors import FlowspaceError, InputError
from flowspace.schedules import Schedule
from flowspace.statistics import AbstractStatistic, MatchedStatistic, Statistic
from flowspace.time_functions import TimeFunction

__all__ = ["FORMS", "Design", "DesignError", "python_of", "read", "report_of"]

FORMS: dict[tuple[str, ...], str] = {
    (): "matched",
    ("gamma", "delta"): "gamma, delta",
    ("delta", "kappa"): "kappa, delta",
    ("gamma", "kappa"): "kappa, gamma",
    ("kappa", "h"): "kappa, h",
}
"""Which formulas a statistic may be given by, and how the page calls that; the rest follows."""

OF_T = ("alpha", "beta")
"""The formulas of t alone, those of the schedule."""

MESSAGE_START = re.compile(r"(?:got )?(alpha|beta|gamma|delta|kappa h|kappa|h)\b")
"""How a message of the library begins that is about one formula."""


class DesignError(InputError):
    """Formulas that are no design.

    Attributes:
        problems: why, by the name of the formula; what is about several is under ``schedule`` or
            ``statistic``.
    """

    def __init__(self, problems: dict[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {why}" for name, why in problems.items()))
        self.problems = problems

    def __reduce__(self) -> tuple[type, tuple[dict[str, str]]]:
        return type(self), (self.problems,)


@dataclass(frozen=True)
class Design:
    """The formulas of a schedule and of a statistic, as text.

    Attributes:
        alpha: the weight of the data, in t.
        beta: the weight of the noise, in t.
        gamma: the weight of the state, in t and s; None where it follows from others.
        delta: the weight of the velocity's integral, likewise.
        kappa: a formula in s, likewise.
        h: b/kappa, a formula in t and s, likewise.

    Raises:
        InputError: if the formulas that are given are none of `FORMS`.
    """

    alpha: str = "1 - t"
    beta: str = "t"
    gamma: str | None = None
    delta: str | None = None
    kappa: str | None = None
    h: str | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            choices = "; ".join(" and ".join(form) for form in FORMS if form)
            raise InputError(
                f"got a statistic by {' and '.join(self.form)}; give one of these pairs: "
                f"{choices}; or none of them for the matched statistic"
            )

    @property
    def form(self) -> tuple[str, ...]:
        """The names of the formulas that the statistic is given by."""
        return tuple(name for name in NAMES[2:] if getattr(self, name) is not None)

    @property
    def formulas(self) -> dict[str, str]:
        """The formulas that are given, by name."""
        return {name: getattr(self, name) for name in (*OF_T, *self.form)}

    def query(self) -> str:
        """Return the design as the query of a link, without its question mark."""
        return urlencode(self.formulas)

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> "Design":
        """Return the design of a link; what a link does not name is as in `Design()`.

        Raises:
            InputError: if a name is unknown, or the formulas are none of `FORMS`.
        """
        unknown = [name for name in query if name not in NAMES]
        if unknown:
            raise InputError(f"got {unknown[0]} in the link; it may name {', '.join(NAMES)}")
        return cls(**query)

    def given_by(self, form: tuple[str, ...], formulas: Mapping[str, str]) -> "Design":
        """Return the same schedule with a statistic of another form."""
        chosen = {name: formulas[name] for name in form}
        return replace(Design(self.alpha, self.beta), **chosen)


NAMES = tuple(field.name for field in fields(Design))


@lru_cache(maxsize=64)
def read(design: Design) -> tuple[Schedule, AbstractStatistic]:
    """Return the schedule and the statistic of a design.

    Raises:
        DesignError: with every formula that cannot be read, or with what the schedule or the
            statistic lacks.
    """
    problems: dict[str, str] = {}
    for name, text in design.formulas.items():
        try:
            TimeFunction(text, _arity(name))
        except FlowspaceError as error:
            problems[name] = str(error)
    if problems:
        raise DesignError(problems)
    try:
        schedule = _schedule(design.alpha, design.beta)
    except FlowspaceError as error:
        raise _about(error, OF_T, "schedule") from error
    try:
        return schedule, _statistic(design, schedule)
    except FlowspaceError as error:
        raise _about(error, design.form, "statistic") from error


@lru_cache(maxsize=64)
def report_of(design: Design) -> CriteriaReport:
    """Return which properties a design has.

    Raises:
        DesignError: as `read` does.
    """
    schedule, statistic = read(design)
    try:
        return check_criteria(schedule, statistic)
    except FlowspaceError as error:
        raise _about(error, design.form, "statistic") from error


def python_of(design: Design) -> str:
    """Return the Python that builds a design, checks it, and its objective where one fits.

    Raises:
        DesignError: as `read` does.
    """
    report = report_of(design)
    loss = "CrossFlowLoss(schedule=schedule, statistic=statistic)"
    if not report.criterion1:
        loss = "MeanFlowLoss(schedule=schedule, statistic=statistic)"
    elif report.advice:
        loss = "CrossFlowLoss(schedule=schedule, statistic=statistic, check=False)"
    built = _statistic_in_python(design)
    names = sorted({"Schedule", "check_criteria", _first_word(loss), _first_word(built)})
    lines = [f"from flowspace import {', '.join(names)}", ""]
    lines.append(f"schedule = Schedule(alpha={design.alpha!r}, beta={design.beta!r})")
    lines += [f"statistic = {built}", "print(check_criteria(schedule, statistic))", ""]
    lines += [f"# {each}" for each in _wrapped(report.advice)]
    lines.append(f"loss_fn = {loss}")
    return "\n".join(lines) + "\n"


def _arity(name: str) -> int:
    if name in OF_T:
        return 1
    return 2


@lru_cache(maxsize=64)
def _schedule(alpha: str, beta: str) -> Schedule:
    return Schedule(alpha, beta)


def _statistic(design: Design, schedule: Schedule) -> AbstractStatistic:
    given = {name: getattr(design, name) for name in design.form}
    if not given:
        return MatchedStatistic()
    if "h" in given:
        return Statistic.from_h(schedule, **given)
    if "kappa" in given:
        return Statistic.from_kappa(schedule, **given)
    return Statistic(**given)


def _statistic_in_python(design: Design) -> str:
    given = [f"{name}={getattr(design, name)!r}" for name in design.form]
    if not given:
        return "MatchedStatistic()"
    if "h" in design.form:
        return f"Statistic.from_h(schedule, {', '.join(given)})"
    if "kappa" in design.form:
        return f"Statistic.from_kappa(schedule, {', '.join(given)})"
    return f"Statistic({', '.join(given)})"


def _first_word(call: str) -> str:
    """Return the name that is called, or whose method is."""
    return re.split(r"[.(]", call)[0]


def _about(error: FlowspaceError, names: tuple[str, ...], otherwise: str) -> DesignError:
    """Return an error under the name of the formula that its message is about."""
    start = MESSAGE_START.match(str(error))
    if start and start[1] in names:
        return DesignError({start[1]: str(error)})
    return DesignError({otherwise: str(error)})


def _wrapped(text: str, width: int = 90) -> list[str]:
    return textwrap.wrap(text, width)
