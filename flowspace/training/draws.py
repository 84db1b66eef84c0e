"""Randomness of a run: everything random in a step follows from (seed, step, row), so any number
of processes draw the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

__all__ = ["Draws", "seed_of"]

ROWS = 3
"""Keeps the streams of rows apart from the other uses of (seed, step, ...)."""


def seed_of(*parts: int) -> int:
    """Mix integers into one seed, so that neighbouring steps and seeds share nothing."""
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
        return self._seeded(*((self.first,) if self.first else ()))

    def rows(self, draw: Callable[[int, torch.Generator], Any], stream: int) -> Any:
        """Return these rows of what is drawn for the whole batch: the same numbers in one process
        as in many.

        Args:
            draw: a function of the number of rows and a generator; returns a tensor, or a tuple of
                them, of that many rows.
            stream: keeps different draws of a step apart.
        """
        whole = draw(self.batch, self._seeded(ROWS, stream))
        parts = tuple(
            part[self.first : self.last]
            for part in (whole if isinstance(whole, tuple) else (whole,))
        )
        return parts if isinstance(whole, tuple) else parts[0]

    def _seeded(self, *more: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed_of(self.seed, self.step, *more))
