"""Finite differences: no forward-mode AD, so any kernel and any engine, at the price of a small error."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowspace.backends import backend_of
from flowspace.derivatives.route import Derivative
from flowspace.errors import InputError
from flowspace.schedules import over_rows

__all__ = ["FiniteDifference"]


@dataclass(frozen=True)
class FiniteDifference(Derivative):
    """Differences along the tangent: ``f(x + o v)`` for small offsets o.

    Args:
        step: the size h of an offset, in units of t.
        order: 1: one-sided, one more evaluation, error O(h). 2: central, two more evaluations, error O(h^2). The side is
            chosen for each row so that t never leaves [0, 1]; near the ends order 2 takes both offsets on one side.

    Raises:
        InputError: unless 0 < step <= 0.25 and order is 1 or 2.
    """

    step: float = 5e-3
    order: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.step <= 0.25:
            raise InputError(f"step = {self.step} came; it is a difference of times, so write 0 < step <= 0.25")
        if self.order not in (1, 2):
            raise InputError(f"order = {self.order} came; write 1 (one-sided) or 2 (central)")

    def evaluate_pure(
        self, fn: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any | None]
    ) -> tuple[Any, Any]:
        """Return the value with gradient and the difference quotient of a function on JAX arrays."""
        detach, value = backend_of(*primals).detach, fn(*primals)
        return value, detach(self.derive(fn, primals, tangents, detach(value)))

    def derive(
        self, fn: Callable[..., Tensor], primals: Sequence[Any], tangents: Sequence[Tensor | None], value: Tensor | None,
        mixed: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return the difference quotient on the given rows."""
        if any(v is not None and p.dtype.itemsize < 4 for p, v in zip(primals, tangents, strict=True)):
            raise InputError(
                f"a state of dtype {primals[0].dtype} came, whose rounding drowns a step of {self.step}; keep latents in "
                "float32 (with autocast for speed), or use ForwardMode()"
            )
        offsets, weights = self._backward(primals) if mixed else self._stencil(primals)

        def at(offset: Tensor) -> Tensor:
            moved = (
                p if v is None else p + over_rows(backend_of(p).cast(offset, p.dtype), p) * v
                for p, v in zip(primals, tangents, strict=True)
            )
            return fn(*moved)

        value = fn(*primals) if value is None else value
        total = over_rows(weights[0], value) * value
        for offset, weight in zip(offsets, weights[1:], strict=True):
            total = total + over_rows(weight, value) * at(offset)
        return total

    def _backward(self, primals: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the same offsets for every row, for a function that mixes them: towards the data, where t has room."""
        t = self._times(primals)
        h = torch.minimum(t.new_tensor(self.step), t.min() / self.order).expand(t.shape)
        if self.order == 1:
            return [-h], [1 / h, -1 / h]
        return [-h, -2 * h], [1.5 / h, -2 / h, 0.5 / h]

    def _times(self, primals: Sequence[Any]) -> Tensor:
        """Return the times, which by convention are the second primal."""
        xp = backend_of(*primals)
        if len(primals) > 1 and xp.is_array(primals[1]) and xp.is_floating(primals[1]):
            return primals[1]
        return xp.expand(xp.as_array(0.5, primals[0]), xp.flatten(primals[0])[:, 0])

    def _stencil(self, primals: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Return per-row offsets, and the weights of f itself and of f at each offset."""
        t, h, xp = self._times(primals), self.step, backend_of(*primals)
        inward = xp.cast(xp.where(t < 0.5, 1.0, -1.0), t.dtype)
        if self.order == 1:
            backward_fits = t - h >= 0
            offset = xp.cast(xp.where(backward_fits, -1.0, 1.0), t.dtype) * h
            return [offset], [-1 / offset, 1 / offset]
        central = (t - h >= 0) & (t + h <= 1)
        near, far = inward * h, xp.where(central, -inward * h, 2 * inward * h)
        here = xp.where(central, 0.0, -1.5 / near)
        return [near, far], [here, xp.where(central, 0.5, 2.0) / near, -0.5 / near]
