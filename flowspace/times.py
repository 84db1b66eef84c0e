"""How times are drawn: a `TimeSampler` draws t for each row, a `TimePairs` draws (t, s) with s <=
t.

Samplers are frozen and hold no state; the randomness comes from the generator that is passed in:
one of torch draws tensors, a key of JAX draws arrays. Every t is at least `TIME_FLOOR`, since
lambda is infinite at t = 0.
"""

import abc
import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flowspace.backends import backend_of
from flowspace.errors import TimeError
from flowspace.schedules import TIME_FLOOR

__all__ = [
    "LogitNormalTimes",
    "PairSampler",
    "PowerTimes",
    "ShiftedTimes",
    "TimePairs",
    "TimeSampler",
    "ToDataTimes",
    "UniformTimes",
]

How: TypeAlias = dict[str, Any]
"""The generator or key, device and dtype of a draw, as torch's random functions take them."""

REFERENCE_DIM = 4096
"""The latent size at which a shift is 1: 4 x 32 x 32, where the shift of Esser et al. (arXiv
2403.03206) was set.
"""


class TimeSampler(abc.ABC):
    """Draws one time per row, in [TIME_FLOOR, 1]."""

    def __call__(
        self,
        rows: int,
        *,
        generator: Any = None,
        device: torch.device | str | None = None,
        dtype: Any = torch.float32,
    ) -> Tensor:
        """Return times of shape ``(rows,)``."""
        return self._draw(rows, {"generator": generator, "device": device, "dtype": dtype})

    @abc.abstractmethod
    def _draw(self, rows: int, how: How) -> Tensor: ...


@dataclass(frozen=True)
class UniformTimes(TimeSampler):
    """Uniform on [low, high].

    Raises:
        TimeError: unless TIME_FLOOR <= low < high <= 1.
    """

    low: float = TIME_FLOOR
    high: float = 1.0

    def __post_init__(self) -> None:
        if not TIME_FLOOR <= self.low < self.high <= 1:
            raise TimeError(
                f"low = {self.low}, high = {self.high} came; write {TIME_FLOOR} <= low < high <= 1"
            )

    def _draw(self, rows: int, how: How) -> Tensor:
        xp = backend_of(how["generator"])
        return xp.clamp(
            self.low + (self.high - self.low) * xp.uniform((rows,), how), self.low, self.high
        )


@dataclass(frozen=True)
class PowerTimes(TimeSampler):
    """``u^power`` with u uniform on [0, 1], laid over [TIME_FLOOR, 1]: a power above 1 moves times
    towards the data.

    With power 2 half of the times are below a quarter; the larger of two is uniform.

    Raises:
        TimeError: unless the power is positive.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.power < math.inf:
            raise TimeError(
                f"power = {self.power} came; write a positive number, above 1 for more times near "
                "the data"
            )

    def _draw(self, rows: int, how: How) -> Tensor:
        xp = backend_of(how["generator"])
        return xp.clamp(
            TIME_FLOOR + (1 - TIME_FLOOR) * xp.uniform((rows,), how) ** self.power, TIME_FLOOR, 1.0
        )


@dataclass(frozen=True)
class LogitNormalTimes(TimeSampler):
    """``sigmoid(mean + spread n)`` with n standard normal (Esser et al., arXiv 2403.03206), raised
    to TIME_FLOOR.

    MeanFlow draws with mean -0.4 and spread 1, pixel MeanFlow with 0.8 and 0.8.

    Raises:
        TimeError: unless spread is positive.
    """

    mean: float = -0.4
    spread: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.spread < math.inf and math.isfinite(self.mean)):
            raise TimeError(
                f"mean = {self.mean}, spread = {self.spread} came; write finite numbers, spread "
                "above 0"
            )

    def _draw(self, rows: int, how: How) -> Tensor:
        xp = backend_of(how["generator"])
        return xp.clamp(xp.sigmoid(self.mean + self.spread * xp.normal((rows,), how)), TIME_FLOOR)


@dataclass(frozen=True)
class ShiftedTimes(TimeSampler):
    """``t' = k t / (1 + (k - 1) t)`` with ``k = sqrt(dim / 4096)``: more noise for larger latents
    (arXiv 2403.03206).

    Args:
        dim: the number of elements of a latent, such as 32 * 16 * 16; the shift k grows with its
            root.
        times: what is shifted.

    Raises:
        TimeError: unless dim is positive.
    """

    dim: int
    times: TimeSampler = field(default_factory=UniformTimes)

    def __post_init__(self) -> None:
        if not self.dim >= 1:
            raise TimeError(
                f"dim = {self.dim} came; it is the number of elements of a latent, such as 32 * "
                "16 * 16"
            )

    @property
    def shift(self) -> float:
        """K, above 1 where times move towards the noise."""
        return math.sqrt(self.dim / REFERENCE_DIM)

    def _draw(self, rows: int, how: How) -> Tensor:
        t = self.times(rows, **how)
        return backend_of(t).clamp(self.shift * t / (1 + (self.shift - 1) * t), TIME_FLOOR, 1.0)


class PairSampler(abc.ABC):
    """Draws (t, s) for each row, with TIME_FLOOR <= t <= 1 and 0 <= s <= t."""

    def __call__(
        self,
        rows: int,
        *,
        generator: Any = None,
        device: torch.device | str | None = None,
        dtype: Any = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """Return t and s, each of shape ``(rows,)``."""
        return self._draw(rows, {"generator": generator, "device": device, "dtype": dtype})

    @abc.abstractmethod
    def _draw(self, rows: int, how: How) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class TimePairs(PairSampler):
    """Two draws, sorted into s <= t, with a share of the rows on the diagonal s = t.

    Args:
        times: how each of the two is drawn.
        equal: the share of rows with s = t, in [0, 1]; which rows is random, how many is not (but
            for rounding).
        mask_first: False sorts first, so that t on the diagonal is the larger of two draws
            (MeanFlow); True puts rows on the diagonal before sorting, so that t there is a plain
            draw (pixel MeanFlow).

    Raises:
        TimeError: if the share is outside [0, 1].
    """

    times: TimeSampler = field(default_factory=UniformTimes)
    equal: float = 0.5
    mask_first: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.times, TimeSampler):
            raise TimeError(
                f"times = {self.times!r} came; write for example TimePairs(UniformTimes(), "
                "equal=0.5)"
            )
        if not 0 <= self.equal <= 1:
            raise TimeError(
                f"equal = {self.equal} came; it is the share of rows with s = t, between 0 and 1"
            )

    def _draw(self, rows: int, how: How) -> tuple[Tensor, Tensor]:
        xp = backend_of(how["generator"])
        hows: list[How] = [how | {"generator": draw} for draw in xp.split(how["generator"], 4)]
        first, second = (self.times(rows, **how) for how in hows[:2])
        rank = xp.uniform((rows,), hows[2]).argsort().argsort()
        diagonal = rank + xp.uniform((), hows[3]) < self.equal * rows
        if self.mask_first:
            second = xp.where(diagonal, first, second)
        t, s = xp.maximum(first, second), xp.minimum(first, second)
        return t, xp.where(diagonal, t, s)


@dataclass(frozen=True)
class ToDataTimes(PairSampler):
    """t as drawn and s = 0 in every row: the pairs of consistency models."""

    times: TimeSampler = field(default_factory=UniformTimes)

    def _draw(self, rows: int, how: How) -> tuple[Tensor, Tensor]:
        t = self.times(rows, **how)
        return t, backend_of(t).zeros_like(t)
