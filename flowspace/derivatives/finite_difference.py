"""Finite differences, which need no forward-mode AD: any kernel and any engine, and a small error.

With offsets o_1, o_2 of the times and weights w, the derivative along the tangent is

    D_t f = w_0 f(x) + w_1 f(x + o_1 v) + w_2 f(x + o_2 v)

which for o = (h, 2h) has the weights (-3/2, 2, -1/2) / h: the derivative of the parabola through
three points. That they lie near one line also tells, without another evaluation, that all three
values are of one function: fresh draws, or rows that were dropped, would scatter them.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowspace.arrays import is_number, over_rows
from flowspace.backends import backend_of
from flowspace.derivatives.replay import RestoringMode, agree, several_processes
from flowspace.derivatives.second_run import REFUSAL_SLACK, First, Second, SecondRun
from flowspace.errors import DerivativeError, InputError

__all__ = ["FiniteDifference"]

CURVATURE = 20.0
"""How far three values of a smooth function may lie from a line, over their span and the step."""

FAR = 0.5
"""Three values that lie so far from a line, over their span, tell nothing of the derivative."""

ROUNDING_FLOAT32 = 1e-5
"""How far they may lie from it by rounding, over the largest value."""

ROUNDING_FLOAT64 = 1e-10
"""The same in double precision."""


class Stencil(NamedTuple):
    """Where f is evaluated, and what each value is multiplied by.

    Attributes:
        offsets: of the times, one for each row.
        weights: of f itself, and of f at each offset.
    """

    offsets: list[Any]
    weights: list[Any]

    def derivative(self, values: Sequence[Any]) -> Any:
        """Return the difference of f itself and of f at each offset."""
        first = values[0]
        total = over_rows(self.weights[0], first) * first
        for value, weight in zip(values[1:], self.weights[1:], strict=True):
            total = total + over_rows(weight, first) * value
        return total


@dataclass(frozen=True)
class FiniteDifference(SecondRun):
    """Differences along the tangent: ``f(x + o v)`` for small offsets o.

    Args:
        step: the size h of an offset, in units of t.
        order: 2: two more evaluations, at t - h and t - 2h, error O(h^2). 1: error O(h), two more
            evaluations as well, of which one is at the same point: two values alone do not tell
            whether they are of one function. Rows without room towards the data step ahead, so
            that t never leaves [0, 1].

    Of order 2, the model is evaluated once more, at the same point, on some of the rows, where
    the values do not lie near one line, under autocast, or where the model keeps something of each
    evaluation, as the norms of weights that torch estimates step by step.

    A warning says so where the function is far from a line over the step.

    Raises:
        InputError: unless 0 < step <= 0.25 and order is 1 or 2.
        DerivativeError: when called, if the model gives other values each time, or computes in
            half precision by itself.
    """

    step: float = 5e-3
    order: int = 2

    def __post_init__(self) -> None:
        if not (is_number(self.step) and 0 < self.step <= 0.25):
            raise InputError(
                f"got step = {self.step!r}; it is a difference of times, so write 0 < step <= 0.25"
            )
        if self.order not in (1, 2):
            raise InputError(f"got order = {self.order!r}; write 1 or 2")

    def evaluate_pure(
        self, fn: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any | None]
    ) -> tuple[Any, Any]:
        """Return value with gradient and difference quotient of a function on JAX arrays."""
        xp, value = backend_of(*primals), fn(*primals)
        here = xp.detach(value)
        stencil = self._stencil(primals)
        shifted = self._values(fn, primals, tangents, stencil)
        in_doubt = not self._on_one_line(here, shifted, stencil)
        if in_doubt and xp.has_values(here):
            if not agree(here, fn(*primals), 4, REFUSAL_SLACK):
                raise DerivativeError(
                    "got another value from the model when it was evaluated again at the same "
                    "point; it draws anew in each call, as flax.nnx's Dropout does: pass what it "
                    "draws in cond, or evaluate it without"
                )
            doubt = self._doubt(here, shifted, stencil)
            if doubt is not None:
                warnings.warn(doubt, stacklevel=2)
        return value, xp.detach(stencil.derivative([here, *shifted]))

    def derive(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Tensor | None],
        first: First,
        mixed: bool,
    ) -> Second:
        """Return the difference quotient on the given rows, and the value if it was evaluated.

        It is evaluated again where nothing else would tell that the second run is not the first
        one: of order 2, the values lie near one line if it is. On some rows it always is, for the
        model may mix them by so little that the values still do.
        """
        self._check_precision(primals, tangents)
        stencil_of = self._stencil
        if mixed:
            stencil_of = self._common_stencil
        stencil = stencil_of(primals)
        shifted = self._values(fn, primals, tangents, stencil)
        in_doubt = not first.exact or not first.whole or first.kept() or several_processes()
        if not in_doubt and self._on_one_line(first.value, shifted, stencil):
            return Second(stencil.derivative([first.value, *shifted]), None)
        value = fn(*primals)
        doubt = self._doubt(value, shifted, stencil)
        return Second(stencil.derivative([value, *shifted]), value, doubt=doubt)

    def _doubt(self, value: Any, shifted: list[Any], stencil: Stencil) -> str | None:
        """Return what is to be said of a step over which the function is far from a line."""
        if self.order == 1 or self._on_one_line(value, shifted, stencil, FAR):
            return None
        return (
            f"the model's values at t, t - h and t - 2h, of h = {self.step}, lie far from a line: "
            "the difference may be wrong by as much as the derivative. Models that are given "
            f"t * 1000 need a smaller step: write FiniteDifference({self.step / 50:g}), or "
            "SharedPrimal(), which is exact"
        )

    def _check_precision(self, primals: Sequence[Any], tangents: Sequence[Tensor | None]) -> None:
        """Raise InputError for a state whose numbers are too coarse for the step."""
        for primal, tangent in zip(primals, tangents, strict=True):
            if tangent is not None and primal.dtype.itemsize < 4:
                raise InputError(
                    f"got a state of dtype {primals[0].dtype}, whose rounding drowns a step of "
                    f"{self.step}; keep latents in float32 (with autocast for speed), or use "
                    "ForwardMode()"
                )

    def check_run(self, run: RestoringMode) -> None:
        """Refuse a model that computes in half precision by itself, or has its own generator."""
        if run.halved is not None:
            raise DerivativeError(
                f"got a model that computes in half precision by itself ({run.halved}), whose "
                f"rounding drowns a step of {self.step}; write derivative=SharedPrimal(), or "
                "switch autocast on round the loss instead of inside the model: there this route "
                "leaves it"
            )
        if run.own_generator is not None:
            raise DerivativeError(
                "got a model that draws from a torch.Generator of its own, which draws anew each "
                "time the model is evaluated; draw from torch's own generator, which is replayed, "
                "or write derivative=SharedPrimal(), which evaluates the model once"
            )

    def _values(
        self,
        fn: Callable[..., Any],
        primals: Sequence[Any],
        tangents: Sequence[Any | None],
        stencil: Stencil,
    ) -> list[Any]:
        """Return the function's value at each offset."""
        values = []
        for offset in stencil.offsets:
            moved = []
            for primal, tangent in zip(primals, tangents, strict=True):
                if tangent is not None:
                    cast = backend_of(primal).cast(offset, primal.dtype)
                    primal = primal + over_rows(cast, primal) * tangent
                moved.append(primal)
            values.append(fn(*moved))
        return values

    def _on_one_line(
        self, value: Any, shifted: list[Any], stencil: Stencil, curvature: float | None = None
    ) -> bool:
        """Return whether three values lie so near one line that all are of one smooth function.

        Where dropping rows or drawing anew changed a value, the distance is that change; else it
        is smaller than the difference of two values by the step. A False costs one evaluation.
        """
        if self.order == 1 or any(other.shape != value.shape for other in shifted):
            return False
        if not all(map(backend_of(value).has_values, (value, *shifted))):
            return True
        near, far = shifted
        first, second = stencil.offsets
        ratio = over_rows(second / first, value)
        distance = abs(far - value - ratio * (near - value)).max()
        span = abs(far - near).max()
        rounding = ROUNDING_FLOAT32
        if value.dtype.itemsize >= 8:
            rounding = ROUNDING_FLOAT64
        if curvature is None:
            curvature = min(FAR, CURVATURE * self.step)
        return bool(distance <= curvature * span + rounding * abs(value).max())

    def _common_stencil(self, primals: Sequence[Any]) -> Stencil:
        """Return the same offsets for every row, for a function that mixes them.

        They go where t has room: towards the data if it has enough there, or more than ahead.
        """
        t = self._times(primals)
        below, above = t.min(), 1 - t.max()
        back = (below >= self.order * self.step) | (below >= above)
        room = torch.where(back, below, above) / self.order
        h = torch.minimum(t.new_tensor(self.step), room).expand(t.shape)
        return self._stencil_from(torch.where(back, -h, h))

    def _times(self, primals: Sequence[Any]) -> Tensor:
        """Return the times, which by convention are the second primal."""
        xp = backend_of(*primals)
        if len(primals) > 1:
            t = primals[1]
            if xp.is_array(t) and xp.is_floating(t):
                return t
        return xp.like(xp.as_array(0.5, primals[0]), xp.flatten(primals[0])[:, 0])

    def _stencil(self, primals: Sequence[Any]) -> Stencil:
        """Return an offset for each row.

        Each row steps towards the data, where t has room for it. Rows may mix without a sign of
        it, so they step alike, and a row's difference does not depend on its batch.
        """
        t, xp = self._times(primals), backend_of(*primals)
        back = t - self.order * self.step >= 0
        sign = xp.cast(xp.where(back, -1.0, 1.0), t.dtype)
        return self._stencil_from(sign * self.step)

    def _stencil_from(self, h: Any) -> Stencil:
        """Return the stencil with this first offset."""
        if self.order == 1:
            return Stencil([h], [-1 / h, 1 / h])
        return Stencil([h, 2 * h], [-1.5 / h, 2 / h, -0.5 / h])
