"""Which rows a process reads, for torch's `DataLoader`.

The order of a pass and the mirror images follow from (seed, pass, index), so they depend neither
on how many processes or workers read, nor on where a run was stopped.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.data import Dataset, Sampler

from flowspace.errors import RunError
from flowspace.training.draws import seed_of

__all__ = ["BatchRows", "KeyedRows", "Rows", "in_its_own_group", "share_of"]

MIRRORED = 2
"""Keeps the draws of mirror images apart from the other uses of (seed, pass, index)."""


class Rows(Protocol):
    """Labelled images by number, in an order that follows from a seed and the number of a pass."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def row(self, index: int, mirrored: bool = False) -> tuple[Any, ...]:
        """Return one, or its mirror image."""
        ...

    def order(self, seed: int, number: int) -> Sequence[int]:
        """Return the order in which a pass takes them."""
        ...


@dataclass(frozen=True)
class KeyedRows(Dataset[tuple[Any, ...]]):
    """The rows of an endless shuffled stream, by their place in it.

    Args:
        rows: of one pass.
        seed: of the order and the mirror images.
        flip: take the mirror image of every other row, at random.
    """

    rows: Rows
    seed: int
    flip: bool = True

    def __getitem__(self, place: int) -> tuple[Any, ...]:
        """Return the row at a place of the stream, 0 and more."""
        number, at = divmod(place, len(self.rows))
        index = self.rows.order(self.seed, number)[at]
        draw = seed_of(self.seed, number, index, MIRRORED) >> 31 & 1
        return self.rows.row(index, bool(self.flip and draw))


@dataclass(frozen=True)
class BatchRows(Sampler[list[int]]):
    """The places in the stream that one process reads: its share of each global batch.

    Args:
        first: the first step.
        last: the step after the last.
        batch: rows of a step, over all processes.
        shares: what this process takes of a batch, first and last rows, as `share_of` says.
    """

    first: int
    last: int
    batch: int
    shares: Sequence[tuple[int, int]]

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the places of each part of each step."""
        for step in range(self.first, self.last):
            start = step * self.batch
            for first, last in self.shares:
                yield list(range(start + first, start + last))

    def __len__(self) -> int:
        return max(0, self.last - self.first) * len(self.shares)


def share_of(batch: int, rank: int, ranks: int, parts: int = 1) -> list[tuple[int, int]]:
    """Return the first and last rows of a batch that a process takes, in so many parts.

    Args:
        batch: rows of all processes together.
        rank: the number of this process, from 0.
        ranks: how many processes there are.
        parts: how many parts a process takes its rows in.

    Raises:
        RunError: if the batch cannot be shared equally.
    """
    if batch % (ranks * parts):
        raise RunError(
            f"got batch = {batch} for {ranks} process(es) with accumulate = {parts}; write a "
            f"multiple of {ranks * parts}"
        )
    size = batch // (ranks * parts)
    shares = []
    for part in range(rank * parts, (rank + 1) * parts):
        first = part * size
        shares.append((first, first + size))
    return shares


def in_its_own_group(_: int) -> None:
    """Keep a reading process out of the signals that stop a run: `DataLoader`'s worker_init_fn.

    torchrun signals whole groups of processes, and a run that lost its readers cannot save.
    """
    if hasattr(os, "setpgrp"):  # Windows has none
        os.setpgrp()
