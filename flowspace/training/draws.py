"""Randomness of a run: everything random in a step follows from (seed, step, row), so any number
of processes draw the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flowspace.errors import InputError
from flowspace.times import PairSampler, RandomSource

__all__ = ["Draws", "KeyedPairs", "seed_of"]

ROWS = 3
"""Keeps the streams of rows apart from the other uses of (seed, step, ...)."""


def seed_of(*parts: int) -> int:
    """Mix integers into one seed, so that neighbouring steps and seeds share nothing.

    Args:
        parts: such as the seed of a run, the number of a step and of a row.
    """
    mixed = 0
    for part in parts:
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
        mixed ^= mixed >> 29
    return mixed


@dataclass(frozen=True)
class Draws:
    """The randomness of some rows of one step's batch.

    Args:
        seed: of the run.
        step: whose batch it is.
        first: the first of these rows within the batch.
        last: the one after the last.
        batch: rows of the whole batch, over all processes.
        device: where tensors are drawn.
    """

    seed: int
    step: int
    first: int
    last: int
    batch: int
    device: torch.device

    @cached_property
    def generator(self) -> torch.Generator:
        """A generator for what need not be the same however the batch is shared out."""
        return torch.Generator(self.device).manual_seed(self.seed_of_rows)

    @property
    def seed_of_rows(self) -> int:
        """The seed of what need not be the same however the batch is shared out, as dropout."""
        if not self.first:
            return seed_of(self.seed, self.step)
        return seed_of(self.seed, self.step, self.first)

    def normal(self, shape: Sequence[int], stream: int) -> Tensor:
        """Return these rows of standard normal numbers, ``(rows, *shape)``."""

        def drawn(count: int, generator: torch.Generator) -> Tensor:
            return torch.randn(count, *shape, generator=generator, device=self.device)

        return self.rows(drawn, stream)

    def uniform(self, shape: Sequence[int], stream: int) -> Tensor:
        """Return these rows of numbers uniform on [0, 1), ``(rows, *shape)``."""

        def drawn(count: int, generator: torch.Generator) -> Tensor:
            return torch.rand(count, *shape, generator=generator, device=self.device)

        return self.rows(drawn, stream)

    def generators(self, stream: int) -> list[torch.Generator]:
        """Return a generator of its own for each of these rows, where a library draws itself."""
        found = []
        for row in range(self.first, self.last):
            seed = seed_of(self.seed, self.step, ROWS, stream, row)
            found.append(torch.Generator(self.device).manual_seed(seed))
        return found

    def rows(self, draw: Callable[[int, torch.Generator], Any], stream: int) -> Any:
        """Return these rows of what is drawn for the whole batch: the same numbers in one process
        as in many.

        Args:
            draw: a function of the number of rows and a generator; returns a tensor, or a tuple of
                them, of that many rows.
            stream: keeps different draws of a step apart.
        """
        seed = seed_of(self.seed, self.step, ROWS, stream)
        generator = torch.Generator(self.device).manual_seed(seed)
        whole = draw(self.batch, generator)
        own = slice(self.first, self.last)
        if isinstance(whole, tuple):
            return tuple(part[own] for part in whole)
        return whole[own]


@dataclass
class KeyedPairs(PairSampler):
    """The times of the rows of one step's batch, drawn for the whole batch.

    An objective draws its times itself; given one of these, it draws those of (seed, step, row),
    and need not check them, for which it would wait for the device.

    Attributes:
        pairs: how the times of a batch are drawn.
        draws: of the step; set before the objective is called.
        stream: keeps the times apart from other draws of a step.
    """

    pairs: PairSampler
    stream: int
    draws: Draws | None = None

    def draw(self, rows: int, source: RandomSource) -> tuple[Tensor, Tensor]:
        """Return t and s of the step's rows, each of shape ``(rows,)``; the source is not used.

        Raises:
            InputError: if no step was set, or it has another number of rows.
        """
        if self.draws is None or self.draws.last - self.draws.first != rows:
            raise InputError(
                f"got {rows} rows for {self.draws}; set draws to those of the step first"
            )
        device = self.draws.device

        def drawn(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            return self.pairs(count, generator=generator, device=device)

        return self.draws.rows(drawn, self.stream)

    def most_off_diagonal(self, rows: int) -> int | None:
        """Return how many of the step's rows have s < t at most: all, or all of the batch's."""
        if self.draws is None:
            return None
        most = self.pairs.most_off_diagonal(self.draws.batch)
        if most is None:
            return None
        return min(rows, most)
