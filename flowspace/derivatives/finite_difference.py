"""Finite differences: no forward-mode AD, so any kernel and any engine, at the price of a small
error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowspace.arrays import over_rows
from flowspace.backends import backend_of
from flowspace.derivatives.replay import RestoringMode, agree, several_processes
from flowspace.derivatives.second_run import First, Second, SecondRun
from flowspace.errors import DerivativeError, InputError

__all__ = ["FiniteDifference"]

BENT = 20.0
"""How far three values of a smooth function may lie from one line, over their span and the step.
"""

ROUNDING = (1e-5, 1e-10)
"""How far they may lie from it by rounding, over the largest: in single and in double precision.
"""


@dataclass(frozen=True)
class FiniteDifference(SecondRun):
    """Differences along the tangent: ``f(x + o v)`` for small offsets o.

    Args:
        step: the size h of an offset, in units of t.
        order: 2: two more evaluations, at t - h and t - 2h, error O(h^2). 1: error O(h), two more
            evaluations as well, of which one is at the same point: two values alone do not tell
            whether they are of one function. Rows without room towards the data step ahead, so
            that t never leaves [0, 1].

    Where the values do not lie near one line, or under autocast, the model is evaluated once more,
    at the same point.

    Raises:
        InputError: unless 0 < step <= 0.25 and order is 1 or 2.
        DerivativeError: when called, if the model gives other values each time, or computes in
            half precision by itself.
    """

    step: float = 5e-3
    order: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.step <= 0.25:
            raise InputError(
                f"step = {self.step} came; it is a difference of times, so write 0 < step <= 0.25"
            )
        if self.order not in (1, 2):
            raise InputError(f"order = {self.order} came; write 1 or 2")

    def evaluate_pure(
        self, fn: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any | None]
    ) -> tuple[Any, Any]:
        """Return value with gradient and difference quotient of a function on JAX arrays."""
        xp, value = backend_of(*primals), fn(*primals)
        known = xp.detach(value)
        offsets, weights = self._stencil(primals)
        ahead = self._values(fn, primals, tangents, offsets)
        if (
            xp.has_values(known)
            and not self._on_one_line(known, ahead, offsets)
            and not agree(known, fn(*primals), 4, 10.0)
        ):
            raise DerivativeError(
                "got another value from the model when it was evaluated again at the same point; "
                "it draws "
                "anew in each call, as flax.nnx's Dropout does: pass what it draws in cond, or "
                "evaluate it "
                "without"
            )
        total = over_rows(weights[0], known) * known
        for there, weight in zip(ahead, weights[1:], strict=True):
            total = total + over_rows(weight, known) * there
        return value, xp.detach(total)

    def derive(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Tensor | None],
        first: First,
        mixed: bool,
    ) -> Second:
        """Return the difference quotient on the given rows, and the value if it was evaluated
        again.

        It is where nothing else would tell that the second run is not the first one: of order 2,
        the values lie near one line if it is.
        """
        if any(
            v is not None and p.dtype.itemsize < 4 for p, v in zip(primals, tangents, strict=True)
        ):
            raise InputError(
                f"a state of dtype {primals[0].dtype} came, whose rounding drowns a step of "
                f"{self.step}; keep latents in "
                "float32 (with autocast for speed), or use ForwardMode()"
            )
        offsets, weights = self._backward(primals) if mixed else self._stencil(primals)
        ahead = self._values(fn, primals, tangents, offsets)
        known = None
        if (
            not first.exact
            or several_processes()
            or not self._on_one_line(first.value, ahead, offsets)
        ):
            known = fn(*primals)
        value = first.value if known is None else known
        total = over_rows(weights[0], value) * value
        for there, weight in zip(ahead, weights[1:], strict=True):
            total = total + over_rows(weight, value) * there
        return Second(total, known)

    def check_run(self, run: RestoringMode) -> None:
        """Refuse a model that computes in half precision by itself, or draws what cannot be drawn
        again.
        """
        if run.halved is not None:
            raise DerivativeError(
                f"got a model that computes in half precision by itself ({run.halved}), whose "
                "rounding "
                f"drowns a step of {self.step}; write derivative=SharedPrimal(), or switch "
                "autocast on "
                "round the loss instead of inside the model: there this route leaves it"
            )
        if run.own_generator is not None:
            raise DerivativeError(
                "got a model that draws from a torch.Generator of its own, which draws anew each "
                "time the "
                "model is evaluated; draw from torch's own generator, which is replayed, or write "
                "derivative=SharedPrimal(), which evaluates the model once"
            )

    def _values(
        self,
        fn: Callable[..., Any],
        primals: Sequence[Any],
        tangents: Sequence[Any | None],
        offsets: list[Any],
    ) -> list[Any]:
        """Return the function's value at each offset."""

        def at(offset: Any) -> Any:
            moved = (
                p if v is None else p + over_rows(backend_of(p).cast(offset, p.dtype), p) * v
                for p, v in zip(primals, tangents, strict=True)
            )
            return fn(*moved)

        return [at(offset) for offset in offsets]

    def _on_one_line(self, value: Any, ahead: list[Any], offsets: list[Any]) -> bool:
        """Return whether three values lie so near one line that all are of one smooth function.

        Where dropping rows or drawing anew changed a value, the distance is that change; else it
        is smaller than the difference of two values by the step. A False costs one evaluation.
        """
        if self.order == 1 or any(values.shape != value.shape for values in ahead):
            return False
        if not all(map(backend_of(value).has_values, (value, *ahead))):
            return True
        ratio = over_rows(offsets[1] / offsets[0], value)
        off = abs(ahead[1] - value - ratio * (ahead[0] - value)).max()
        span, rounding = abs(ahead[1] - ahead[0]).max(), ROUNDING[value.dtype.itemsize >= 8]
        return bool(off <= min(0.5, BENT * self.step) * span + rounding * abs(value).max())

    def _backward(self, primals: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the same offsets for every row, for a function that mixes them: where t has more
        room.
        """
        t = self._times(primals)
        below, above = t.min(), 1 - t.max()
        back = (below >= self.order * self.step) | (below >= above)
        room = torch.where(back, below, above) / self.order
        h = torch.minimum(t.new_tensor(self.step), room).expand(t.shape)
        h = torch.where(back, -h, h)
        if self.order == 1:
            return [h], [-1 / h, 1 / h]
        return [h, 2 * h], [-1.5 / h, 2 / h, -0.5 / h]

    def _times(self, primals: Sequence[Any]) -> Tensor:
        """Return the times, which by convention are the second primal."""
        xp = backend_of(*primals)
        if len(primals) > 1 and xp.is_array(primals[1]) and xp.is_floating(primals[1]):
            return primals[1]
        return xp.like(xp.as_array(0.5, primals[0]), xp.flatten(primals[0])[:, 0])

    def _stencil(self, primals: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Return offsets, and the weights of f itself and of f at each offset.

        Each row steps towards the data, where t has room for it: rows may mix unseen, so they step
        alike, and a row's difference does not depend on its batch.
        """
        t, xp = self._times(primals), backend_of(*primals)
        back = t - self.order * self.step >= 0
        near = xp.cast(xp.where(back, -1.0, 1.0), t.dtype) * self.step
        if self.order == 1:
            return [near], [-1 / near, 1 / near]
        return [near, 2 * near], [-1.5 / near, 2 / near, -0.5 / near]
