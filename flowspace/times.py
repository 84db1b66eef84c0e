"""How times are drawn: a `TimeSampler` draws t for each row, a `PairSampler` draws (t, s).

Samplers are frozen and hold no state; the randomness comes from the generator that is passed in:
one of torch draws tensors, a key of JAX draws arrays. Every t is at least `TIME_FLOOR`, since
lambda is infinite at t = 0.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from flowspace.arrays import is_number
from flowspace.backends import backend_of, torch_backend
from flowspace.errors import InputError, TimeError
from flowspace.inputs import check_flag, check_generator, kind_of
from flowspace.schedules import TIME_FLOOR

__all__ = [
    "KarrasTimes",
    "LogitNormalTimes",
    "PairSampler",
    "PowerTimes",
    "RandomSource",
    "ShiftedTimes",
    "TimePairs",
    "TimeSampler",
    "ToDataTimes",
    "UniformTimes",
]

DrawPairs: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
"""``(rows, *, generator, device, dtype)`` to t and s, each of shape ``(rows,)``."""

REFERENCE_DIM = 4096
"""The latent size at which a shift is 1: 4 x 32 x 32, where the shift of Esser et al. (arXiv
2403.03206) was set.
"""


class RandomSource(NamedTuple):
    """Where random numbers come from: tensors from a generator of torch, arrays from a JAX key.

    Attributes:
        generator: a torch.Generator, None for torch's own, or a key of JAX.
        device: where tensors are drawn.
        dtype: of what is drawn.
        library: the functions of the arrays that are drawn, `flowspace.backends`.
    """

    generator: Any
    device: torch.device | str | None
    dtype: Any
    library: Any

    @classmethod
    def of(cls, generator: Any, device: torch.device | str | None, dtype: Any) -> "RandomSource":
        """Return the source for a generator of torch or a key of JAX.

        Raises:
            InputError: if the generator is neither, or torch has no such device or no real numbers
                of such a dtype.
        """
        library = backend_of(generator)
        if library is torch_backend:
            check_generator(generator)
            _check_place(device, dtype)
        return cls(generator, device, dtype, library)

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniformly from [0, 1)."""
        return self.library.uniform(shape, self._how())

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers."""
        return self.library.normal(shape, self._how())

    def split(self, count: int) -> "list[RandomSource]":
        """Return that many sources of independent numbers, to be used in their order."""
        generators = self.library.split(self.generator, count)
        return [self._replace(generator=generator) for generator in generators]

    def _how(self) -> dict[str, Any]:
        return {"generator": self.generator, "device": self.device, "dtype": self.dtype}


def _check_place(device: Any, dtype: Any) -> None:
    """Raise InputError unless torch can draw real numbers of a dtype on a device."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"got dtype = {dtype!r}; write a real one, such as torch.float32")
    if device is None or isinstance(device, torch.device):
        return
    try:
        torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f'got device = {device!r}; write for example "cpu" or "cuda"') from None


def _check_rows(rows: Any) -> None:
    """Raise InputError unless a number of rows is a whole number from 0 up."""
    is_whole = hasattr(rows, "__index__") and not isinstance(rows, bool)
    if not is_whole or rows < 0:
        raise InputError(f"got rows = {rows!r}; write how many times are drawn, such as 256")


class TimeSampler(abc.ABC):
    """Draws one time per row, in [TIME_FLOOR, 1]; a subclass says how in `draw`."""

    def __call__(
        self,
        rows: int,
        *,
        generator: Any = None,
        device: torch.device | str | None = None,
        dtype: Any = torch.float32,
    ) -> Tensor:
        """Return times of shape ``(rows,)``."""
        _check_rows(rows)
        return self.draw(rows, RandomSource.of(generator, device, dtype))

    @abc.abstractmethod
    def draw(self, rows: int, source: RandomSource) -> Tensor:
        """Return times of shape ``(rows,)``, drawn from a source."""


@dataclass(frozen=True)
class UniformTimes(TimeSampler):
    """Uniform on [low, high].

    Args:
        low: the smallest time.
        high: the largest time.

    Raises:
        TimeError: unless TIME_FLOOR <= low < high <= 1.
    """

    low: float = TIME_FLOOR
    high: float = 1.0

    def __post_init__(self) -> None:
        are_numbers = is_number(self.low) and is_number(self.high)
        if not (are_numbers and TIME_FLOOR <= self.low < self.high <= 1):
            raise TimeError(
                f"got low = {self.low}, high = {self.high}; write {TIME_FLOOR} <= low < high <= 1"
            )

    def draw(self, rows: int, source: RandomSource) -> Tensor:
        """Return times of shape ``(rows,)``."""
        t = self.low + (self.high - self.low) * source.uniform(rows)
        return source.library.clamp(t, self.low, self.high)


@dataclass(frozen=True)
class PowerTimes(TimeSampler):
    """``u^power`` with u uniform on [0, 1], laid over [TIME_FLOOR, 1]: a power above 1 moves times
    towards the data.

    With power 2 half of the times are below a quarter; the larger of two is uniform.

    Args:
        power: of the uniform number; 1 draws uniform times.

    Raises:
        TimeError: unless the power is positive.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not (is_number(self.power) and 0 < self.power < math.inf):
            raise TimeError(
                f"got power = {self.power}; "
                "write a positive number, above 1 for more times near the data"
            )

    def draw(self, rows: int, source: RandomSource) -> Tensor:
        """Return times of shape ``(rows,)``."""
        bent = source.uniform(rows) ** self.power
        t = TIME_FLOOR + (1 - TIME_FLOOR) * bent
        return source.library.clamp(t, TIME_FLOOR, 1.0)


@dataclass(frozen=True)
class LogitNormalTimes(TimeSampler):
    """``sigmoid(mean + spread n)`` with n standard normal (Esser et al., arXiv 2403.03206), raised
    to TIME_FLOOR.

    MeanFlow draws with mean -0.4 and spread 1, pixel MeanFlow with 0.8 and 0.8.

    Args:
        mean: of the normal number; negative moves times towards the data.
        spread: its standard deviation.

    Raises:
        TimeError: unless spread is positive.
    """

    mean: float = -0.4
    spread: float = 1.0

    def __post_init__(self) -> None:
        are_numbers = is_number(self.mean) and is_number(self.spread)
        if not (are_numbers and 0 < self.spread < math.inf and math.isfinite(self.mean)):
            raise TimeError(
                f"got mean = {self.mean}, spread = {self.spread}; "
                "write finite numbers, spread above 0"
            )

    def draw(self, rows: int, source: RandomSource) -> Tensor:
        """Return times of shape ``(rows,)``."""
        logit = self.mean + self.spread * source.normal(rows)
        t = source.library.sigmoid(logit)
        return source.library.clamp(t, TIME_FLOOR)


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
    times: TimeSampler = UniformTimes()

    def __post_init__(self) -> None:
        if not isinstance(self.times, TimeSampler):
            raise TimeError(
                f"got times = {self.times!r}; write for example ShiftedTimes(dim, UniformTimes())"
            )
        if not (is_number(self.dim) and 1 <= self.dim < math.inf):
            raise TimeError(
                f"got dim = {self.dim}; "
                "it is the number of elements of a latent, such as 32 * 16 * 16"
            )

    @property
    def shift(self) -> float:
        """The factor k, above 1 where times move towards the noise."""
        return math.sqrt(self.dim / REFERENCE_DIM)

    def draw(self, rows: int, source: RandomSource) -> Tensor:
        """Return times of shape ``(rows,)``."""
        t = self.times.draw(rows, source)
        shifted = self.shift * t / (1 + (self.shift - 1) * t)
        return source.library.clamp(shifted, TIME_FLOOR, 1.0)


@dataclass(frozen=True)
class KarrasTimes(TimeSampler):
    """Noise levels uniform on the grid of Karras et al. (arXiv 2206.00364, eq. 5).

    With u uniform on [0, 1] the level is (lowest^(1/r) + u (highest^(1/r) - lowest^(1/r)))^r, and
    t = level/(1 + level), at which the linear schedule has it; raised to TIME_FLOOR.

    Args:
        lowest: the lowest level, positive.
        highest: the highest level, above the lowest.
        rho: r, positive.

    Raises:
        TimeError: if a number is out of its range.
    """

    lowest: float = 0.002
    highest: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        are_numbers = is_number(self.lowest) and is_number(self.highest)
        if not (are_numbers and 0 < self.lowest < self.highest < math.inf):
            raise TimeError(
                f"got lowest = {self.lowest}, highest = {self.highest}; write 0 < lowest < highest"
            )
        if not (is_number(self.rho) and 0 < self.rho < math.inf):
            raise TimeError(f"got rho = {self.rho}; write a positive number, such as 7")

    def draw(self, rows: int, source: RandomSource) -> Tensor:
        """Return times of shape ``(rows,)``."""
        low = self.lowest ** (1 / self.rho)
        high = self.highest ** (1 / self.rho)
        level = (low + (high - low) * source.uniform(rows)) ** self.rho
        t = level / (1 + level)
        return source.library.clamp(t, TIME_FLOOR)


class PairSampler(abc.ABC):
    """Draws (t, s) for each row, with TIME_FLOOR <= t <= 1 and 0 <= s <= t.

    A subclass says how in `draw`.
    """

    def __call__(
        self,
        rows: int,
        *,
        generator: Any = None,
        device: torch.device | str | None = None,
        dtype: Any = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """Return t and s, each of shape ``(rows,)``."""
        _check_rows(rows)
        return self.draw(rows, RandomSource.of(generator, device, dtype))

    @abc.abstractmethod
    def draw(self, rows: int, source: RandomSource) -> tuple[Tensor, Tensor]:
        """Return t and s, each of shape ``(rows,)``, drawn from a source."""

    def most_off_diagonal(self, rows: int) -> int | None:
        """Return how many of so many rows have s < t at most, or None where that is not known.

        A training step that knows it does not wait for the device to count them.
        """
        return None


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

    times: TimeSampler = UniformTimes()
    equal: float = 0.5
    mask_first: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.times, TimeSampler):
            raise TimeError(
                f"got times = {self.times!r}; "
                "write for example TimePairs(UniformTimes(), equal=0.5)"
            )
        check_flag("mask_first", self.mask_first)
        if not (is_number(self.equal) and 0 <= self.equal <= 1):
            raise TimeError(
                f"got equal = {self.equal}; it is the share of rows with s = t, between 0 and 1"
            )

    def draw(self, rows: int, source: RandomSource) -> tuple[Tensor, Tensor]:
        """Return t and s, each of shape ``(rows,)``."""
        for_first, for_second, for_rank, for_rounding = source.split(4)
        first = self.times.draw(rows, for_first)
        second = self.times.draw(rows, for_second)
        rank = for_rank.uniform(rows).argsort().argsort()
        xp = source.library
        # Where the share is no whole number of rows, one of the two beside it is drawn; rounded,
        # it may be one too few, once in a million draws.
        most = self.equal * rows - for_rounding.uniform()
        diagonal = rank < xp.clamp(most, self._least_equal(rows))
        if self.mask_first:
            second = xp.where(diagonal, first, second)
        t = xp.maximum(first, second)
        s = xp.minimum(first, second)
        return t, xp.where(diagonal, t, s)

    def _least_equal(self, rows: int) -> int:
        """Return how many of so many rows are on the diagonal at least."""
        return math.floor(self.equal * rows)

    def most_off_diagonal(self, rows: int) -> int | None:
        """Return how many of so many rows have s < t at most; None in a subclass that draws them
        in another way.
        """
        kind = type(self)
        if kind.draw is not TimePairs.draw:
            return None
        if kind.__call__ is not TimePairs.__call__:
            return None
        return rows - self._least_equal(rows)


@dataclass(frozen=True)
class ToDataTimes(PairSampler):
    """t as drawn and s = 0 in every row: the pairs of consistency models.

    Args:
        times: how t is drawn.

    Raises:
        TimeError: unless times is a `TimeSampler`.
    """

    times: TimeSampler = UniformTimes()

    def __post_init__(self) -> None:
        if not isinstance(self.times, TimeSampler):
            raise TimeError(
                f"got times = {self.times!r}; write for example ToDataTimes(UniformTimes())"
            )

    def draw(self, rows: int, source: RandomSource) -> tuple[Tensor, Tensor]:
        """Return t and s = 0, each of shape ``(rows,)``."""
        t = self.times.draw(rows, source)
        return t, source.library.zeros_like(t)

    def most_off_diagonal(self, rows: int) -> int:
        """Return how many of so many rows have s < t at most: all."""
        return rows


def drawn_pairs(times: DrawPairs, rows: int, **settings: Any) -> tuple[Tensor, Tensor]:
    """Return t and s as a sampler or a user's function draws them.

    Args:
        times: what draws them.
        rows: how many.
        settings: generator, device and dtype.

    Raises:
        TimeError: unless each has shape ``(rows,)``.
    """
    drawn: Any = times(rows, **settings)
    if not isinstance(drawn, tuple | list) or len(drawn) != 2:
        raise TimeError(
            f"got {kind_of(drawn)} from {times!r} for {rows} rows; "
            f"return t and s of shape ({rows},) each"
        )
    t, s = drawn
    if not hasattr(t, "shape") or not hasattr(s, "shape"):
        raise TimeError(
            f"got {kind_of(t)} and {kind_of(s)} from {times!r} for {rows} rows; "
            f"return t and s as tensors of shape ({rows},) each"
        )
    if t.shape != (rows,) or s.shape != (rows,):
        raise TimeError(
            f"got times of shapes {tuple(t.shape)} and {tuple(s.shape)} "
            f"from {times!r} for {rows} rows; "
            f"return t and s of shape ({rows},) each"
        )
    return t, s
