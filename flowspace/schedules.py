r"""Schedules: how much of the data and of the noise a state holds at each time.

A schedule is a pair of functions with $z_t = \alpha(t) z + \beta(t) \epsilon$, velocity
$v = \alpha'(t) z + \beta'(t) \epsilon$, and signal to noise $\lambda(t) = \alpha(t) / \beta(t)$.
Time 0 is data and time 1 is noise: $\alpha(0) = 1, \beta(0) = 0, \alpha(1) = 0, \beta(1) = 1$;
$\beta > 0$ and $\lambda' < 0$ on $(0, 1)$, where $\lambda'(1) = 0$ is legal. Nothing else is
assumed: alpha + beta = 1 and alpha^2 + beta^2 = 1 are examples.
"""

import math
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor

from flowspace.arrays import is_number, over_rows
from flowspace.backends import backend_of, one_backend
from flowspace.errors import ExpressionError, InputError, ScheduleError, TimeError
from flowspace.formulas import T, parse
from flowspace.inputs import check_states, kind_of
from flowspace.time_functions import Source, TimeFunction, unseen_slope, values_of
from flowspace.typeset import latex_of

__all__ = [
    "TIME_FLOOR",
    "CosineSchedule",
    "LinearSchedule",
    "PolynomialSchedule",
    "Schedule",
    "VariancePreservingSchedule",
    "over_rows",
]

TIME_FLOOR = 0.01
"""The smallest t that is drawn: lambda is infinite at t = 0, the one singular end of every
schedule.
"""

END_TOLERANCE = 1e-6
"""How far alpha and beta may miss 0 and 1 at the ends: float64 rounding of any formula, far below
what training sees.
"""

GRID_POINTS = 1025
"""Where a schedule is checked at construction: evenly on [TIME_FLOOR, 1], both ends included."""


class Schedule:
    """A noise schedule (alpha, beta), checked at construction.

    Args:
        alpha: the weight of the data: text such as ``"cos(pi*t/2)"``, a sympy expression in t, or
            a callable on tensors.
        beta: the weight of the noise, likewise.

    Raises:
        ScheduleError: if the ends are wrong, a value is not finite on [TIME_FLOOR, 1], or lambda
            does not fall; it names the time and the values.
        ExpressionError: if a text is no formula in t.
    """

    def __init__(self, alpha: Source, beta: Source) -> None:
        self._alpha = TimeFunction(alpha)
        self._beta = TimeFunction(beta)
        self._ratio = self._alpha / self._beta
        self._check_ends()
        self._check_inside()

    def __getattr__(self, name: str) -> Any:
        """Say what is missing in a subclass whose ``__init__`` does not call this one's."""
        if name in ("_alpha", "_beta", "_ratio"):
            raise ScheduleError(
                f"got a {type(self).__name__} without alpha and beta; "
                "write super().__init__(alpha, beta) in its __init__"
            )
        return self.__getattribute__(name)  # raises AttributeError in Python's words

    @property
    def functions(self) -> tuple[TimeFunction, TimeFunction]:
        """Alpha and beta as functions that know their formula and derivative."""
        return self._alpha, self._beta

    @property
    def signal_to_noise_slope(self) -> TimeFunction:
        """lambda' as a function that knows its formula."""
        return self._ratio.dot

    def alpha(self, t: Tensor | float) -> Tensor:
        """The weight of the data at t, of shape ``()`` or ``(B,)``; the same shape comes out."""
        return self._alpha(_as_times(t))

    def beta(self, t: Tensor | float) -> Tensor:
        """The weight of the noise at t, of shape ``()`` or ``(B,)``; the same shape comes out."""
        return self._beta(_as_times(t))

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        """The derivative of alpha at t; the same shape comes out."""
        return self._alpha.dot(_as_times(t))

    def beta_dot(self, t: Tensor | float) -> Tensor:
        """The derivative of beta at t; the same shape comes out."""
        return self._beta.dot(_as_times(t))

    def signal_to_noise(self, t: Tensor | float) -> Tensor:
        """Lambda = alpha / beta at t; infinite at t = 0, zero at t = 1."""
        return self._ratio(_as_times(t))

    def signal_to_noise_dot(self, t: Tensor | float) -> Tensor:
        """Lambda' = (alpha' beta - alpha beta') / beta^2 at t, negative on (0, 1)."""
        return self._ratio.dot(_as_times(t))

    def perturb(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noisy state and its conditional velocity.

        Args:
            latents: clean latents z of shape ``(B, *)``.
            noise: standard normal noise of the same shape.
            t: times of shape ``()`` or ``(B,)``.

        Returns:
            ``z_t = alpha z + beta noise`` in the latents' dtype and ``v = alpha' z + beta' noise``
            in at least float32, each of shape ``(B, *)``.

        Raises:
            InputError: if latents or noise are not real numbers, their shapes differ, or tensors
                came beside JAX arrays.
            TimeError: if t is of whole numbers or has another shape.
        """
        xp = one_backend(latents, noise, t)
        check_states("latents", latents)
        check_states("noise", noise)
        shape = tuple(latents.shape)
        if noise.shape != latents.shape:
            raise InputError(
                f"got noise of shape {tuple(noise.shape)} "
                f"for latents of shape {shape}; they must be equal"
            )
        t = _as_times(t, latents)
        if tuple(t.shape) not in ((), shape[:1]):
            raise TimeError(
                f"got t of shape {tuple(t.shape)} for latents of shape {shape}; use (B,) or ()"
            )
        path = self._alpha, self._beta, self._alpha.dot, self._beta.dot
        weights = [over_rows(each, latents) for each in values_of(path, t)]
        alpha, beta, alpha_dot, beta_dot = weights
        z_t = alpha * latents + beta * noise
        v = alpha_dot * latents + beta_dot * noise
        return xp.cast(z_t, latents.dtype), v

    def velocity(self, latents: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (beta'/beta) z_t + beta lambda' z of the path from z through z_t.

        Args:
            latents: clean latents, or an estimate of them, ``(B, *)``.
            z_t: states of the same shape.
            t: times in (0, 1], of shape ``(B,)``.
        """
        of_state, of_latents = self._velocity_weights(t, z_t)
        return of_state * z_t + of_latents * latents

    def latents(self, velocity: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Return the clean latents that a velocity at z_t points from, where lambda'(t) < 0."""
        of_state, of_latents = self._velocity_weights(t, z_t)
        return (velocity - of_state * z_t) / of_latents

    def prepare(self) -> None:
        """Compile now what would otherwise be compiled in the first call of `velocity`."""
        for part in self._velocity_parts:
            part.prepare()

    @cached_property
    def _velocity_parts(self) -> tuple[TimeFunction, TimeFunction]:
        """beta'/beta and beta lambda'."""
        of_state = self._beta.dot / self._beta
        of_latents = self._beta * self._ratio.dot
        return of_state, of_latents

    def _velocity_weights(self, t: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor]:
        """Return beta'/beta and beta lambda' at t, to broadcast over the rows of z_t."""
        times = _as_times(t)
        of_state, of_latents = self._velocity_parts
        return (
            over_rows(of_state(times), z_t),
            over_rows(of_latents(times), z_t),
        )

    def _check_ends(self) -> None:
        self._check_end("alpha", 0.0, wanted=1.0)
        self._check_end("alpha", 1.0, wanted=0.0)
        self._check_end("beta", 0.0, wanted=0.0)
        self._check_end("beta", 1.0, wanted=1.0)

    def _check_end(self, name: str, time: float, wanted: float) -> None:
        function = {"alpha": self._alpha, "beta": self._beta}[name]
        value = _value_at(function, time, name)
        if abs(value - wanted) <= END_TOLERANCE:
            return
        advice = self._advice(name, time, value)
        raise ScheduleError(
            f"got {name}({time:g}) = {value:.6g}, but it must be {wanted:g}: "
            "t = 0 is data (alpha = 1, beta = 0) "
            "and t = 1 is noise (alpha = 0, beta = 1); "
            f"{name} is {function}.{advice}"
        )

    def _advice(self, name: str, time: float, value: float) -> str:
        """Return how an end that is wrong may be mended."""
        if (name, time) == ("alpha", 1.0) and 0 < value < 1:
            return _TERMINAL_ADVICE
        are_swapped = _runs(self._beta, 1.0, 0.0) and _runs(self._alpha, 0.0, 1.0)
        if are_swapped:
            return f" They are swapped: write alpha = {self._beta}, beta = {self._alpha}."
        return ""

    def _check_inside(self) -> None:
        times = torch.linspace(TIME_FLOOR, 1.0, GRID_POINTS, dtype=torch.float64)
        alpha = _evaluate(self._alpha, times, "alpha")
        beta = _evaluate(self._beta, times, "beta")
        alpha_dot = _evaluate(self._alpha.dot, times, "alpha'")
        beta_dot = _evaluate(self._beta.dot, times, "beta'")
        _check_finite("alpha", alpha, times)
        _check_finite("beta", beta, times)
        _check_finite("alpha'", alpha_dot, times)
        _check_finite("beta'", beta_dot, times)
        for name, function in (("alpha", self._alpha), ("beta", self._beta)):
            unseen = unseen_slope(function)
            if unseen is not None:
                raise ScheduleError(f"got {name} = {function}, {unseen}")
        why = "beta must be positive on (0, 1]"
        _refuse(beta <= 0, times, beta, why, "beta")
        ratio = self.signal_to_noise(times)
        slope = self.signal_to_noise_dot(times)
        why = "lambda = alpha/beta must fall: lambda' < 0 on (0, 1)"
        _refuse(slope[:-1] >= 0, times, slope, why, "lambda'")
        why = "lambda = alpha/beta must fall strictly"
        _refuse(ratio.diff() >= 0, times, ratio, why, "lambda")

    def _repr_latex_(self) -> str:
        alpha = rf"\alpha(t) = {_latex(self._alpha)}"
        beta = rf"\beta(t) = {_latex(self._beta)}"
        return rf"${alpha}, \quad {beta}$"

    def __str__(self) -> str:
        return f"alpha(t) = {self._alpha}, beta(t) = {self._beta}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return False
        return self.functions == other.functions

    def __hash__(self) -> int:
        return hash(self.functions)


class LinearSchedule(Schedule):
    """``alpha = 1 - t, beta = t``: rectified flow, flow matching's optimal-transport path (Liu et
    al., arXiv 2209.03003).
    """

    def __init__(self) -> None:
        super().__init__("1 - t", "t")


class CosineSchedule(Schedule):
    """``alpha = cos(pi t/2), beta = sin(pi t/2)``: variance preserving, constant speed on the
    circle (arXiv 2303.08797).
    """

    def __init__(self) -> None:
        super().__init__("cos(pi*t/2)", "sin(pi*t/2)")


class PolynomialSchedule(Schedule):
    """``alpha = (1 - t)^n, beta = 1 - (1 - t)^n``: the convex polynomial path (Lipman et al.,
    arXiv 2412.06264, in t -> 1 - t).

    Args:
        power: n, from 1 (the linear schedule) to 64, the largest that a formula may have; for n >
            1 lambda'(1) = 0.

    Raises:
        ScheduleError: if n < 1, where alpha' is infinite at t = 1.
        ExpressionError: if n > 64.
    """

    def __init__(self, power: float = 2) -> None:
        if not (is_number(power) and 1 <= power < math.inf):
            raise ScheduleError(
                f"got power = {power!r}; below 1 alpha' is infinite at t = 1, so write 1 or more"
            )
        alpha = parse(f"(1 - t)**{power}")
        super().__init__(alpha, 1 - alpha)


class VariancePreservingSchedule(Schedule):
    r"""The variance-preserving diffusion of Ho et al. and Song et al. (arXiv 2011.13456), rescaled
    to zero terminal SNR.

    With $\bar\alpha(t) = \exp(-\tfrac12 \beta_{min} t - \tfrac14 (\beta_{max} - \beta_{min}) t^2)$
    the raw alpha(1) is not zero, so a sampler that starts at pure noise starts where training
    never was. As Lin et al. (arXiv 2305.08891) advise, $\alpha = (\bar\alpha(t) - \bar\alpha(1)) /
    (1 - \bar\alpha(1))$, $\beta = \sqrt{1 - \alpha^2}$.

    Args:
        beta_min: the diffusion rate at t = 0, positive.
        beta_max: the diffusion rate at t = 1, at least beta_min.

    Raises:
        ScheduleError: if not 0 < beta_min <= beta_max.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        are_numbers = is_number(beta_min) and is_number(beta_max)
        if not (are_numbers and 0 < beta_min <= beta_max < math.inf):
            raise ScheduleError(
                f"got beta_min = {beta_min!r}, beta_max = {beta_max!r}; "
                "write 0 < beta_min <= beta_max"
            )
        growth = f"({beta_max} - {beta_min})"
        raw: Any = parse(f"exp(-{beta_min}*t/2 - {growth}*t**2/4)")
        end = raw.subs(T, 1)
        alpha = (raw - end) / (1 - end)
        super().__init__(alpha, sympy.sqrt(1 - alpha**2))


_TERMINAL_ADVICE = (
    " A raw diffusion schedule leaves signal at t = 1, where sampling starts; "
    "rescale it to zero terminal SNR, "
    "(alpha(t) - alpha(1))/(1 - alpha(1)) with beta = sqrt(1 - alpha**2), "
    "as VariancePreservingSchedule() does."
)


def _latex(function: TimeFunction) -> str:
    if function.expression is None:
        return r"\text{callable}"
    return latex_of(function.expression)


def _as_times(t: Tensor | float, beside: Tensor | None = None) -> Tensor:
    xp = backend_of(t, beside)
    try:
        times = xp.as_array(t)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TimeError(
            f"got times of {kind_of(t)}; write a tensor of real numbers, or one in [0, 1]"
        ) from error
    if not xp.is_floating(times):
        hint = xp.to_float.format("t")
        raise TimeError(
            f"got times of dtype {times.dtype}; "
            f"flowspace's times are real numbers in [0, 1]: write {hint}"
        )
    return xp.at_least_float32(times)


def _evaluate(function: TimeFunction, times: Tensor, name: str) -> Tensor:
    try:
        return function(times)
    except ExpressionError:
        raise
    except Exception as error:
        shape = tuple(times.shape)
        raise ScheduleError(
            f"{name} fails on a float64 tensor of times of shape {shape}: {error}"
        ) from error


def _value_at(function: TimeFunction, time: float, name: str) -> float:
    precise = torch.tensor(time, dtype=torch.float64)
    return float(_evaluate(function, precise, name))


def _runs(function: TimeFunction, start: float, end: float) -> bool:
    """Return whether a function runs from one value to the other."""
    miss_at_data = abs(_value_at(function, 0.0, "") - start)
    miss_at_noise = abs(_value_at(function, 1.0, "") - end)
    return max(miss_at_data, miss_at_noise) <= END_TOLERANCE


def _check_finite(name: str, values: Tensor, times: Tensor) -> None:
    why = f"{name} must be finite on [{TIME_FLOOR}, 1]"
    _refuse(~values.isfinite(), times, values, why, name)


def _refuse(bad: Tensor, times: Tensor, values: Tensor, why: str, name: str) -> None:
    """Refuse a schedule with the first bad time, its value and the next."""
    if not bool(bad.any()):
        return
    first = int(bad.nonzero()[0])
    around = slice(first, first + 2)
    shown = []
    for time, value in zip(times[around], values[around], strict=True):
        shown.append(f"{name}({float(time):.4g}) = {float(value):.6g}")
    raise ScheduleError(f"{why}, but {', '.join(shown)}")
