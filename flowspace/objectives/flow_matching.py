"""Flow matching (Lipman et al., arXiv 2210.02747).

It is MeanFlow on the diagonal, where the average velocity is the velocity.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowspace.objectives.inputs import Batch
from flowspace.objectives.mean_flow import MeanFlowLoss
from flowspace.times import DrawPairs, TimePairs

__all__ = ["FlowMatchingLoss"]


@dataclass(frozen=True, kw_only=True)
class FlowMatchingLoss(MeanFlowLoss):
    """R = f - v, with s = t in every row; a given s is accepted and ignored.

    By default t is one uniform draw. Other pairs give their t, which is the larger of two draws
    where they are sorted first: write ``TimePairs(times, equal=1.0, mask_first=True)``.
    """

    times: DrawPairs = TimePairs(equal=1.0, mask_first=True)

    @classmethod
    def published(cls, **changes: Any) -> "FlowMatchingLoss":
        """Return it with the paper's numbers, its own defaults: uniform times, mean squares."""
        return cls(**changes)

    def _pairs(
        self, batch: Batch, t: Tensor | None, s: Tensor | None, generator: Any
    ) -> tuple[Tensor, Tensor]:
        t, _ = super()._pairs(batch, t, t, generator)
        return t, t
