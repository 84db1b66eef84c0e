r"""What a network is trained to output, as a statistic of the path, and its residual.

A statistic $(\gamma, \delta)$ names the function $f(z_t, t, s) = \gamma z_t + \delta \int_s^t
v\,d\tau$ with v the marginal velocity of the probability-flow ODE. Differentiating $f/\delta$
along the path gives two identities:

$$D_t(f/\delta) = (\gamma/\delta)' z_t + (1 + \gamma/\delta) v \qquad \text{(I), always}$$

$$D_t(f/\delta) = \kappa(s) \lambda'(t) z \qquad \text{(II), if } \kappa = (1 + \gamma/\delta)
\beta(t) \text{ has no t in it}$$

With b = 1/delta, a = b' (in t) and c = kappa lambda', (II) is the residual R = a f + b D_t f - c
x. Assumed: delta is not zero inside ``0 < s < t < 1``. Not assumed: that gamma, delta are finite
on the edges; only a, b, c are used there.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeAlias

import sympy
import torch
from torch import Tensor

from flowspace.arrays import over_rows
from flowspace.backends import backend_of
from flowspace.errors import CriterionError, FlowspaceError, InputError
from flowspace.formulas import (
    NOT_ZERO,
    S,
    T,
    has_values,
    precise_values,
    random_points,
    readable,
)
from flowspace.inputs import require
from flowspace.schedules import TIME_FLOOR, Schedule
from flowspace.time_functions import (
    NUDGE,
    Source,
    TimeFunction,
    limit_on_edge,
    unseen_slope,
    values_of,
)
from flowspace.typeset import text_of

__all__ = [
    "AbstractStatistic",
    "Coefficients",
    "ConsistencyStatistic",
    "MatchedStatistic",
    "MeanFlowStatistic",
    "PointCoefficients",
    "Statistic",
]

Kappa: TypeAlias = "sympy.Expr | TimeFunction"
"""kappa as a formula in s, or as a function where callables are behind it."""

POINTS = 12
"""Random (t, s) at which a claim about formulas is tested: one wrong answer in 10^50 each."""

DIAGONAL_TOLERANCE = 1e-4
"""On the diagonal, b and a/c - 1 may be so far from zero.

It is `NUDGE` over the smallest t, for callables that are 0/0 there.
"""

DIAGONAL_POINTS = 64

LARGE = 1e3
GROWS = 5
"""What is larger than `LARGE` on the diagonal, and grows by this factor towards it, is infinite.

It grows so from 100 `NUDGE` away to one, where 1/x grows a hundredfold.
"""

NEVER = 1e-15
"""A delta this small inside the triangle is float64 rounding of zero."""

NUMERIC = 1e-6
"""What counts as zero for callables, whose derivative is automatic, in float64."""


class PointCoefficients(NamedTuple):
    """What multiplies what in the residual at given times.

    Attributes:
        prediction: a, in front of f.
        derivative: b, in front of D_t f.
        scale: m = sign(b) max(|a|, |b|/(t - s)). Dividing the residual by it bounds what
            multiplies f and (t - s) D_t f by one in size; x too where c = a, as for the matched
            statistic.
    """

    prediction: Tensor
    derivative: Tensor
    scale: Tensor

    def over_rows(self, values: Tensor) -> "PointCoefficients":
        """Return the same, to broadcast over the rows of values ``(B, *)``."""
        return PointCoefficients(*[over_rows(each, values) for each in self])


@dataclass(frozen=True)
class Coefficients:
    """What multiplies what in the residual of one statistic under one schedule, as functions.

    Each is a function of (t, s).

    Attributes:
        prediction: a = b', in front of f.
        derivative: b = 1/delta, in front of D_t f.
        state: (gamma/delta)', in front of z_t in identity (I).
        velocity: 1 + gamma/delta, in front of v in identity (I), and of z_t in the step.
        scaled_kappa: kappa = velocity * beta(t), a function of s alone where Criterion 1 holds.
        failure: why Criterion 1 fails, or an empty text.
        data: c = kappa lambda', in front of x in identity (II).
    """

    prediction: TimeFunction
    derivative: TimeFunction
    state: TimeFunction
    velocity: TimeFunction
    scaled_kappa: TimeFunction
    failure: str
    _data: TimeFunction

    @property
    def data(self) -> TimeFunction:
        """c = kappa lambda', in front of x in identity (II).

        Raises:
            CriterionError: where Criterion 1 fails, since (II) does not hold there.
        """
        if self.failure:
            raise CriterionError(f"the residual has no data term: {self.failure}")
        return self._data

    @cached_property
    def anchored(self) -> bool:
        """Whether b(t,t) = 0: then rows on the diagonal need no derivative."""
        return worst_on_diagonal(self.derivative)[0] <= DIAGONAL_TOLERANCE

    @property
    def data_vanishes(self) -> bool:
        """Whether kappa is zero everywhere, so that the residual has no data term.

        That is so in the consistency family.
        """
        return bool(_is_zero(self.scaled_kappa).all())

    @property
    def kappa(self) -> Kappa:
        """kappa as a sympy expression in s, or as a function where callables are behind it."""
        if self.scaled_kappa.expression is None:
            return self.scaled_kappa
        return self.scaled_kappa.expression

    def prepare(self) -> bool:
        """Compile every function now rather than in the first call; returns `anchored`."""
        self._compile()
        return self.anchored

    def _compile(self) -> None:
        for each in fields(self):
            function = getattr(self, each.name)
            if isinstance(function, TimeFunction):
                function.prepare()

    def at(self, t: Tensor, s: Tensor) -> PointCoefficients:
        """Return a, b and m at (t, s), of shape ``(B,)`` each; a and b are evaluated once.

        On the diagonal, and where b = 0, m = a. Where that is zero too nothing is to be learned:
        R/m = 0 by its limit, and m is infinite.
        """
        xp = backend_of(t)
        a, b = values_of((self.prediction, self.derivative), t, s)
        off_diagonal = xp.off_diagonal(t, s) & (b != 0)
        duration = xp.where(off_diagonal, t - s, 1.0)
        size = xp.maximum(abs(a), abs(b) / duration)
        m = xp.where(off_diagonal, xp.sign(b) * size, a)
        m = xp.where(m == 0, math.inf, m)
        return PointCoefficients(a, b, m)

    def scale(self, t: Tensor, s: Tensor) -> Tensor:
        """Return m alone, see `at`."""
        return self.at(t, s).scale

    def step(self, prediction: Tensor, z_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return z_s = (1 + gamma/delta) z_t - f/delta, in one space.

        It is identity (I), integrated, and exact for the exact f.
        """
        kept = over_rows(self.velocity(t, s), z_t)
        b = over_rows(self.derivative(t, s), z_t)
        z_s = kept * z_t - b * prediction
        return backend_of(z_t).cast(z_s, z_t.dtype)

    def prediction_of(self, z_t: Tensor, z_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the f whose step takes z_t to z_s: `step` solved for f; s < t, in one space."""
        kept = over_rows(self.velocity(t, s), z_t)
        b = over_rows(self.derivative(t, s), z_t)
        return (kept * z_t - z_s) / b

    def diagonal_velocity(self, prediction: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Return the velocity that f(z_t, t, t) stands for, in one space.

        It is identity (I) where b(t, t) = 0.

        Raises:
            CriterionError: if the statistic is not anchored; then the diagonal says nothing of the
                velocity.
        """
        if not self.anchored:
            raise CriterionError(
                "got a statistic that is not anchored, "
                "so f on the diagonal does not say what the velocity is; "
                "give a velocity of its own, such as velocity=teacher"
            )
        a = over_rows(self.prediction(t, t), z_t)
        state = over_rows(self.state(t, t), z_t)
        velocity = over_rows(self.velocity(t, t), z_t)
        return (a * prediction - state * z_t) / velocity


class AbstractStatistic(abc.ABC):
    """What a network may be trained to output: `Statistic`, a pair, or `MatchedStatistic`.

    A subclass says what 1/delta and gamma/delta are under a schedule; all else follows.
    """

    @abc.abstractmethod
    def ratios(self, schedule: Schedule) -> tuple[TimeFunction, TimeFunction]:
        """Return b = 1/delta and gamma/delta under a schedule."""

    @abc.abstractmethod
    def on(self, schedule: Schedule) -> "Statistic":
        """Return the same statistic with gamma and delta written out for one schedule."""

    def coefficients(self, schedule: Schedule) -> Coefficients:
        """Return what multiplies f, D_t f, x, z_t and v in the residual under a schedule.

        It is derived once, then remembered.
        """
        require(
            isinstance(schedule, Schedule),
            "schedule",
            schedule,
            "write for example LinearSchedule()",
        )
        return _derive(self, schedule)

    def kappa(self, schedule: Schedule) -> Kappa:
        """Return (1 + gamma/delta) beta(t), which by Criterion 1 is a function of s alone.

        It is a sympy expression in s, or for callables a function of (t, s) that ignores t.

        Raises:
            CriterionError: if (1 + gamma/delta) beta(t) depends on t; it says what is left of t.
        """
        c = self.coefficients(schedule)
        if c.failure:
            raise CriterionError(f"Criterion 1 fails for {self} under {schedule}: {c.failure}")
        return c.kappa

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"


class Statistic(AbstractStatistic):
    """A pair (gamma, delta), which says f = gamma z_t + delta times the integral of v from s to t.

    Each is text, a number, a sympy expression in t and s, or a callable on tensors.

    Args:
        gamma: the weight of the state z_t.
        delta: the weight of the integral of the velocity; not zero.

    Raises:
        CriterionError: if delta is zero.
        ExpressionError: if a text is no formula in t and s.
    """

    def __init__(self, gamma: Source, delta: Source) -> None:
        self.gamma = TimeFunction(gamma, 2)
        self.delta = TimeFunction(delta, 2)
        named = {"gamma": self.gamma, "delta": self.delta}
        for name, function in named.items():
            _check_function(name, function)
        if bool(_is_zero(self.delta).any()):
            raise CriterionError(
                f"got delta = {self.delta}, which is zero inside 0 < s < t < 1, "
                "so f would not see the path and 1/delta does not exist; "
                "write for example '-t/(t - s)'"
            )

    @classmethod
    def from_kappa(
        cls,
        schedule: Schedule,
        kappa: Source,
        delta: "Source | None" = None,
        gamma: "Source | None" = None,
    ) -> "Statistic":
        """Derive delta or gamma from the other, so that Criterion 1 holds by construction.

        gamma = delta (kappa(s)/beta(t) - 1), or delta = gamma beta(t)/(kappa(s) - beta(t)): the
        paper's eq. 17, in the order in which one designs: a kappa, then how f weighs the state.

        Args:
            schedule: the schedule under which kappa is meant.
            kappa: a function of s, as text in ``s``, a number, a sympy expression or a callable of
                one tensor of times.
            delta: as in the constructor; then gamma is derived.
            gamma: as in the constructor; then delta is derived.

        Raises:
            InputError: if both delta and gamma are given, or neither.
            CriterionError: if kappa mentions t, or delta is zero.
        """
        require(
            isinstance(schedule, Schedule),
            "schedule",
            schedule,
            "write for example Statistic.from_kappa(LinearSchedule(), 's', delta='-t/(t - s)')",
        )
        kappa_ = _function_of_s(kappa)
        beta = schedule.functions[1]
        if delta is not None and gamma is None:
            delta_ = cls(0, delta).delta
            return cls(delta_ * (kappa_ / beta - 1), delta_)
        if gamma is not None and delta is None:
            gamma_ = TimeFunction(gamma, 2)
            return cls(gamma_, gamma_ * beta / (kappa_ - beta))
        raise InputError(
            f"got delta = {delta!r} and gamma = {gamma!r}; "
            "give one of the two, the other follows from kappa"
        )

    @classmethod
    def from_h(cls, schedule: Schedule, h: Source, kappa: Source) -> "Statistic":
        """Derive both from the divided coefficient h = b/kappa, so that Criterion 1 holds.

        delta = 1/(kappa h) and gamma = 1/(beta(t) h) - delta. The target y* depends on h alone;
        kappa decides whether f at (1, 0) is a sample, kappa(0) h(1, 0) = -1, and weighs the
        literal residual. The matched statistic has h = lambda(t) - lambda(s) and kappa = beta.

        Args:
            schedule: the schedule under which they are meant.
            h: a function of (t, s), such as ``"1/t - 1/s"``; zero on s = t for an anchored one.
            kappa: a function of s, as in `from_kappa`.

        Raises:
            CriterionError: if kappa mentions t, or kappa or h is zero inside 0 < s < t < 1.
        """
        b = _function_of_s(kappa) * TimeFunction(h, 2)
        if bool(_is_zero(b).any()):
            raise CriterionError(
                f"got kappa h = {b}, which is zero inside 0 < s < t < 1, "
                "so delta = 1/(kappa h) does not exist; "
                "write for example h='1/t - 1/s', kappa='s'"
            )
        return cls.from_kappa(schedule, kappa, delta=1 / b)

    def ratios(self, schedule: Schedule) -> tuple[TimeFunction, TimeFunction]:
        """Return b = 1/delta and gamma/delta, the same under every schedule."""
        b = 1 / self.delta
        return b, self.gamma / self.delta

    def on(self, schedule: Schedule) -> "Statistic":
        """Return the statistic itself: its gamma and delta are written out."""
        return self

    def __str__(self) -> str:
        return f"gamma(t, s) = {self.gamma}, delta(t, s) = {self.delta}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Statistic):
            return False
        return (self.gamma, self.delta) == (other.gamma, other.delta)

    def __hash__(self) -> int:
        return hash((self.gamma, self.delta))


def _check_function(name: str, function: TimeFunction) -> None:
    """Raise CriterionError for a gamma or delta that is no finite real function, or whose
    derivative torch does not see.
    """
    try:
        is_finite = bool(_inside(function).isfinite().all())
        unseen = unseen_slope(function)
    except FlowspaceError:
        raise
    except Exception as error:
        raise CriterionError(
            f"{name} fails on two float64 tensors of times, t and s: {error}"
        ) from error
    if not is_finite:
        raise CriterionError(
            f"got {name} = {function}, "
            "which is not a finite real number everywhere inside 0 < s < t < 1; "
            "write for example gamma='1', delta='-t/(t - s)'"
        )
    if unseen is not None:
        raise CriterionError(f"got {name} = {function}, {unseen}")


class MatchedStatistic(AbstractStatistic):
    """The default, which meets both criteria under any schedule, anchored and matched.

    With kappa(s) = beta_s and delta = beta_t / (beta_s alpha_t - alpha_s beta_t) it has

        b = beta_s lambda_t - alpha_s,  a = c = beta_s lambda'_t,  gamma/delta = beta_s/beta_t - 1

    and f is the clean prediction that makes a DDIM jump from t to s exact. Nothing is to be
    chosen; gamma and delta follow from the schedule, see `on`.
    """

    def ratios(self, schedule: Schedule) -> tuple[TimeFunction, TimeFunction]:
        """Return b = beta_s lambda_t - alpha_s and gamma/delta = beta_s/beta_t - 1."""
        alpha, beta = schedule.functions
        b = beta.at(S) * alpha / beta - alpha.at(S)
        return b, beta.at(S) / beta - 1

    def on(self, schedule: Schedule) -> Statistic:
        """Return the same statistic with gamma and delta written out for one schedule."""
        b, ratio = self.ratios(schedule)
        delta = 1 / b
        return Statistic(ratio / b, delta)

    @property
    def gamma(self) -> TimeFunction:
        """Raises CriterionError: it depends on the schedule, see `on`."""
        raise CriterionError(_depends_on_schedule("gamma"))

    @property
    def delta(self) -> TimeFunction:
        """Raises CriterionError: it depends on the schedule, see `on`."""
        raise CriterionError(_depends_on_schedule("delta"))

    def __str__(self) -> str:
        return "matched: kappa(s) = beta(s), delta = beta_t/(beta_s alpha_t - alpha_s beta_t)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MatchedStatistic)

    def __hash__(self) -> int:
        return hash(MatchedStatistic)


def _depends_on_schedule(name: str) -> str:
    return f"{name} depends on the schedule here; write MatchedStatistic().on(schedule).{name}"


class MeanFlowStatistic(Statistic):
    """``gamma = 0, delta = 1/(t - s)``: f is the average velocity, and Criterion 1 fails.

    Geng et al., arXiv 2505.13447.
    """

    def __init__(self) -> None:
        super().__init__(0, "1/(t - s)")


class ConsistencyStatistic(Statistic):
    """``gamma = 1, delta = -1``: f = z_s, and kappa = 0.

    Song et al., arXiv 2303.01469; in the form with trajectories Kim et al., arXiv 2310.02279.
    """

    def __init__(self) -> None:
        super().__init__(1, -1)


@lru_cache(maxsize=128)
def _derive(statistic: AbstractStatistic, schedule: Schedule) -> Coefficients:
    b, ratio = statistic.ratios(schedule)
    beta = schedule.functions[1]
    velocity = 1 + ratio
    scaled = velocity * beta
    kappa = _at_noise(scaled)
    a = b.dot
    c = kappa * schedule.signal_to_noise_slope
    # One function where a = c everywhere: written in two ways, the one is 0 and the other 1e-16
    # where lambda' = 0, and the target c/m x would lose its data there.
    if _equal(a, c):
        a = c
    derived = Coefficients(
        prediction=a,
        derivative=b,
        state=ratio.dot,
        velocity=velocity,
        scaled_kappa=kappa,
        failure=_left_of_t(scaled),
        _data=c,
    )
    derived._compile()
    return derived


def worst_on_diagonal(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """Return the largest size of a function on the diagonal s = t, and where that is.

    It is infinite where it is not finite, or large and still grows towards the diagonal: rounded,
    or evaluated just inside, an infinite limit is a large number.
    """
    times = torch.linspace(TIME_FLOOR, 1 - TIME_FLOOR, DIAGONAL_POINTS, dtype=torch.float64)
    sizes = function(times, times).abs()
    infinite = ~sizes.isfinite()
    large = sizes > LARGE
    if bool(large.any()):
        near = function(times, times - 100 * NUDGE).abs()
        nearer = function(times, times - NUDGE).abs()
        infinite |= large & (nearer > GROWS * near)
    sizes = sizes.where(~infinite, torch.inf)
    worst = sizes.argmax()
    return float(sizes[worst]), float(times[worst])


def _inside(function: TimeFunction) -> Tensor:
    """Return a function's values at `POINTS` points inside the triangle."""
    points = random_points(POINTS)
    t, s = torch.tensor(points, dtype=torch.float64).unbind(1)
    return function(t, s)


def _is_zero(function: TimeFunction) -> Tensor:
    """Return at which of `POINTS` points inside the triangle a function is zero."""
    return _inside(function).abs() < NEVER


def _equal(first: TimeFunction, second: TimeFunction) -> bool:
    """Whether two functions have the same values at `POINTS` points inside the triangle."""
    if first.expression is None or second.expression is None:
        values, others = _inside(first), _inside(second)
        tolerance = NUMERIC * others.abs().clamp(min=1)
        return bool(((values - others).abs() <= tolerance).all())
    points = random_points(POINTS)
    values = precise_values(first.expression, points)
    others = precise_values(second.expression, points)
    for value, other in zip(values, others, strict=True):
        tolerance = NOT_ZERO * max(1, abs(other))
        if not abs(value - other) <= tolerance:
            return False
    return True


def _function_of_s(kappa: Source) -> TimeFunction:
    knows_times = isinstance(kappa, (sympy.Expr, TimeFunction))
    if callable(kappa) and not knows_times:
        return TimeFunction(kappa).at(S)
    function = TimeFunction(kappa, 2)
    formula = function.expression
    if formula is not None and T in formula.free_symbols:
        raise CriterionError(
            f"got kappa = {function}, which depends on t; "
            "Criterion 1 asks for a function of s alone"
        )
    return function


def _at_noise(scaled: TimeFunction) -> TimeFunction:
    """Return kappa as a function of s: (1 + gamma/delta) beta(t) at t = 1, or its limit there."""
    formula = scaled.expression
    if formula is None:

        def at_noise(t: Tensor, s: Tensor) -> Tensor:
            return scaled.raw(backend_of(t).ones_like(t), s)

        return TimeFunction(at_noise, 2)
    value: Any = formula.subs(T, 1)
    if not has_values(value):
        value = limit_on_edge(formula, T, sympy.Integer(1))
    if value is None or not has_values(value):
        value = formula.subs(T, (1 + S) / 2)
    return TimeFunction(readable(value), 2)


def _left_of_t(scaled: TimeFunction) -> str:
    """Return an empty text if (1 + gamma/delta) beta(t) is free of t, else what is left of t."""
    points = random_points(POINTS)
    formula = scaled.expression
    if formula is None:
        values = _inside(scaled).tolist()
        slopes = _inside(scaled.dot).tolist()
        tolerance = NUMERIC
        what = f"(1 + gamma/delta) beta(t), derived numerically to {NUMERIC:g},"
    else:
        values = precise_values(formula, points)
        slopes = precise_values(formula.diff(T), points)
        tolerance = NOT_ZERO
        what = f"(1 + gamma/delta) beta(t) = {text_of(readable(formula))}"
    for (t, s), value, slope in zip(points, values, slopes, strict=True):
        is_flat = abs(slope) <= tolerance * max(1, abs(value))
        if not is_flat or not math.isfinite(value):
            return (
                f"{what} must be a function of s alone, "
                f"but at (t, s) = ({t:.3f}, {s:.3f}) it is {float(value):.5g} "
                f"and changes with t at the rate {float(slope):.5g}"
            )
    return ""
