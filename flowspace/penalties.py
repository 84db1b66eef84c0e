"""Penalties: a difference of shape ``(B, *)`` becomes a number per row, of shape ``(B,)``.

Each is frozen and reduces over all axes but the first: to the mean, or to the sum with
``summed=True``. The choice matters for `Adaptive`, whose offset c is negligible beside a sum over
200,000 pixels and not beside their mean.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowspace.arrays import is_number
from flowspace.backends import backend_of
from flowspace.errors import InputError
from flowspace.inputs import check_flag, is_function, kind_of

__all__ = ["AbsoluteError", "Adaptive", "HuberError", "Penalty", "SquaredError"]


class Penalty(abc.ABC):
    """A function from differences to a number per row."""

    @abc.abstractmethod
    def __call__(self, difference: Tensor) -> Tensor:
        """Return the penalty of each row: ``(B, *)`` becomes ``(B,)``."""


def _check_difference(difference: Any) -> None:
    """Raise InputError unless a difference is a tensor with rows."""
    is_array = backend_of(difference).is_array(difference)
    if not (is_array and difference.ndim):
        raise InputError(
            f"got a difference of {kind_of(difference)}; write a tensor of shape (B, *)"
        )


def _over_axes(values: Tensor, summed: bool) -> Tensor:
    axes = tuple(range(1, values.ndim))
    if not axes:
        return values
    if summed:
        return values.sum(axes)
    return values.mean(axes)


@dataclass(frozen=True)
class SquaredError(Penalty):
    """``d^2``, averaged or summed over the axes of a row.

    Args:
        summed: the sum over the axes of a row instead of the mean.
    """

    summed: bool = False

    def __post_init__(self) -> None:
        check_flag("summed", self.summed)

    def __call__(self, difference: Tensor) -> Tensor:
        """Return the penalty of each row: ``(B, *)`` becomes ``(B,)``."""
        _check_difference(difference)
        squares = backend_of(difference).square(difference)
        return _over_axes(squares, self.summed)


@dataclass(frozen=True)
class AbsoluteError(Penalty):
    """``|d|``, averaged or summed over the axes of a row.

    Args:
        summed: the sum over the axes of a row instead of the mean.
    """

    summed: bool = False

    def __post_init__(self) -> None:
        check_flag("summed", self.summed)

    def __call__(self, difference: Tensor) -> Tensor:
        """Return the penalty of each row: ``(B, *)`` becomes ``(B,)``."""
        _check_difference(difference)
        return _over_axes(abs(difference), self.summed)


@dataclass(frozen=True)
class HuberError(Penalty):
    """``d^2/2`` up to the threshold h and ``h (|d| - h/2)`` beyond it (Huber, 1964).

    Args:
        threshold: h, above which the penalty grows linearly.
        summed: the sum over the axes of a row instead of the mean.

    Raises:
        InputError: unless the threshold is positive.
    """

    threshold: float = 1.0
    summed: bool = False

    def __post_init__(self) -> None:
        check_flag("summed", self.summed)
        if not (is_number(self.threshold) and self.threshold > 0):
            raise InputError(
                f"got threshold = {self.threshold}; write a positive number, or AbsoluteError()"
            )

    def __call__(self, difference: Tensor) -> Tensor:
        """Return the penalty of each row: ``(B, *)`` becomes ``(B,)``."""
        _check_difference(difference)
        xp = backend_of(difference)
        h = self.threshold
        size = abs(difference)
        parabola = xp.square(size) / 2
        line = h * (size - h / 2)
        values = xp.where(size <= h, parabola, line)
        return _over_axes(values, self.summed)


@dataclass(frozen=True)
class Adaptive(Penalty):
    """``L / sg((L + c)^p)`` for the penalty L of each row (Geng et al., arXiv 2505.13447: squared
    and summed, p = 1).

    With p = 1 every row's loss is near 1 whatever it has learned, so log the plain penalty beside
    it.

    Args:
        penalty: from differences ``(B, *)`` to numbers ``(B,)``.
        p: the power; 0 leaves the penalty as it is.
        c: the offset, positive.

    Raises:
        InputError: unless c is positive and p at least 0.
    """

    penalty: Callable[[Tensor], Tensor] = SquaredError(summed=True)
    p: float = 1.0
    c: float = 0.01

    def __post_init__(self) -> None:
        if not is_function(self.penalty):
            raise InputError(
                f"got penalty = {self.penalty!r}; "
                "write for example Adaptive(SquaredError(summed=True))"
            )
        are_numbers = is_number(self.p) and is_number(self.c)
        if not (are_numbers and 0 < self.c < math.inf and 0 <= self.p < math.inf):
            raise InputError(f"got p = {self.p}, c = {self.c}; write p >= 0 and c > 0")

    def __call__(self, difference: Tensor) -> Tensor:
        """Return the penalty of each row: ``(B, *)`` becomes ``(B,)``."""
        _check_difference(difference)
        value = self.penalty(difference)
        fixed = backend_of(value).detach(value)
        return value / (fixed + self.c) ** self.p
