"""Where batches come from: an endless shuffled stream, of which anyone may ask for any rows at any
time.
"""

import abc
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowspace.training.draws import seed_of

__all__ = ["Ahead", "Batch", "Batches", "TensorBatches"]

Batch = tuple[Tensor, ...]


class Batches(abc.ABC):
    """An endless stream of rows; a row depends on nothing but the seed and its place in the
    stream.
    """

    @abc.abstractmethod
    def __call__(self, first: int, last: int, seed: int) -> Batch:
        """Return the tensors of rows ``first`` to ``last``, the last one left out."""


@dataclass(frozen=True)
class TensorBatches(Batches):
    """Batches from tensors in memory, shuffled anew in every pass."""

    tensors: tuple[Tensor, ...]

    def __call__(self, first: int, last: int, seed: int) -> Batch:
        """Return rows ``first`` to ``last`` of the endless shuffled stream."""
        rows = len(self.tensors[0])
        passes = [self._order(seed, p, rows) for p in range(first // rows, (last - 1) // rows + 1)]
        chosen = torch.cat(passes)[first % rows :][: last - first]
        return tuple(tensor[chosen] for tensor in self.tensors)

    @staticmethod
    def _order(seed: int, number: int, rows: int) -> Tensor:
        return torch.randperm(
            rows, generator=torch.Generator().manual_seed(seed_of(seed, number, 1))
        )


@dataclass
class Ahead:
    """Loads the next ranges of rows in a thread while the current one is used.

    Args:
        batches: the stream.
        seed: of its order.
        ranges: the rows that will be asked for, in order.
        depth: how many ranges are loaded ahead.

    Attributes:
        waited: seconds that the reader had to wait so far.
    """

    batches: Batches
    seed: int
    ranges: Sequence[tuple[int, int]]
    depth: int = 2
    waited: float = field(default=0.0, init=False)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batch of each range."""
        with ThreadPoolExecutor(1, "batches") as pool:
            coming: list[Future[Batch]] = []
            for number in range(len(self.ranges)):
                wanted = self.ranges[number + len(coming) : number + self.depth + 1]
                coming += [
                    pool.submit(self.batches, first, last, self.seed) for first, last in wanted
                ]
                try:
                    yield self._taken(coming.pop(0))
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def _taken(self, batch: Future[Batch]) -> Batch:
        start = time.perf_counter()
        found = batch.result()
        self.waited += time.perf_counter() - start
        return found
