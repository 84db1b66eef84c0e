"""What flowspace itself adds to a training step: ``python benchmarks/overhead.py``.

Times, state, coefficients, residual, target and penalty, forward and backward, with the network
and its derivative replaced by tensors computed beforehand, over a plain regression step and over a
CrossFlow step of the same ViT (4 blocks of width 256, 64 tokens, batch 64). Medians of interleaved
runs in one process.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowspace import CrossFlowLoss
from flowspace.demo.networks import SmallViT, ViTSize
from flowspace.demo.page import markdown_table
from flowspace.derivatives import Derivative

ROUNDS = 15


@dataclass(frozen=True)
class Known(Derivative):
    """A route that costs nothing: value and derivative were computed beforehand."""

    value: Tensor
    slope: Tensor

    def __call__(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Any],
        rows: Tensor | None = None,
        at_most: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what is known."""
        return self.value, self.slope

    def evaluate(self, fn: Any, primals: Any, tangents: Any, rows: Any) -> tuple[Tensor, Tensor]:
        """Return what is known."""
        return self.value, self.slope


def medians(jobs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each job, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 2):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            taken = time.perf_counter() - start
            seconds[name].append(taken)
    return {name: statistics.median(values[2:]) for name, values in seconds.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="1 shows that it runs")
    options = parser.parse_args()
    torch.manual_seed(0)
    network = SmallViT(16, 8, outputs=3, patch=2, size=ViTSize(256, 4, 4))
    z = torch.randn(64, 16, 8, 8)
    x = torch.randn(64, 3, 16, 16)
    cond = {"labels": torch.randint(10, (64,))}
    value = torch.randn_like(x, requires_grad=True)
    slope = torch.randn_like(x)
    objective = CrossFlowLoss()
    bare = CrossFlowLoss(derivative=Known(value, slope))

    def plain() -> None:
        t = torch.rand(64)
        error = network(z, t, t, **cond) - x
        error.square().mean().backward()

    def cross_flow() -> None:
        out = objective(network, z, x, cond=cond)
        out.loss.mean().backward()

    def overhead() -> None:
        out = bare(network, z, x, cond=cond)
        out.loss.mean().backward()

    jobs = {
        "plain regression step": plain,
        "CrossFlow step": cross_flow,
        "flowspace itself": overhead,
    }
    found = medians(jobs, options.rounds)
    base = found["plain regression step"]
    rows = []
    for name, seconds in found.items():
        rows.append((name, f"{seconds / base:.4f}", f"{1000 * seconds:.2f}"))
    print(markdown_table(("what", "over a plain step", "ms, this machine"), rows))


if __name__ == "__main__":
    main()
