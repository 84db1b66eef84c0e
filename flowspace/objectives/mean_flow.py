"""MeanFlow: identity (I) for the average velocity (Geng et al., arXiv 2505.13447)."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flowspace.inputs import first_time, warn_once
from flowspace.objectives.engine import Objective, PathPoint
from flowspace.objectives.inputs import Batch
from flowspace.penalties import Adaptive
from flowspace.statistics import AbstractStatistic, MeanFlowStatistic
from flowspace.times import LogitNormalTimes, TimePairs

__all__ = ["MeanFlowLoss"]


@dataclass(frozen=True, kw_only=True)
class MeanFlowLoss(Objective):
    """R = f + (t - s) D_t f - v, in one space; targets are accepted and ignored.

    Any statistic may stand in for the average velocity: identity (I) always holds.

    Warns:
        UserWarning: once, when called with targets that are not the latents.
    """

    statistic: AbstractStatistic = field(default_factory=MeanFlowStatistic)

    @classmethod
    def published(cls, **changes: Any) -> "MeanFlowLoss":
        """Return it with the paper's numbers.

        Logit-normal times (-0.4, 1), sorted, 3/4 on s = t, L / sg(L + 0.01), summed.
        """
        settings = {
            "times": TimePairs(LogitNormalTimes(-0.4, 1.0), equal=0.75),
            "penalty": Adaptive(),
        }
        return cls(**(settings | changes))

    def check_call(self, batch: Batch) -> None:
        """Say that targets are ignored which are not the latents."""
        warn_of_targets(type(self).__name__, batch)

    def known_part(self, at: PathPoint) -> Tensor:
        """Return K = (gamma/delta)' z_t + (1 + gamma/delta) v: identity (I)."""
        c = self.coefficients
        of_state = at.weighted(c.state, at.z)
        return of_state + at.weighted(c.velocity, at.velocity)

    def known_part_between(self, at: PathPoint, earlier: PathPoint) -> Tensor:
        """Return (1 + gamma/delta) z_t - (1 + gamma/delta) z_r: identity (I), integrated."""
        c = self.coefficients
        kept = at.weighted(c.velocity, at.z)
        return kept - earlier.weighted(c.velocity, earlier.z)


def warn_of_targets(owner: str, batch: Batch) -> None:
    """Warn of targets that an objective in one space ignores, unless they are the latents.

    Values are compared in the first such batch of an owner alone: that waits for the device.
    """
    latents, targets = batch.latents, batch.targets
    if targets is None or targets is latents:
        return
    if not first_time(f"targets of {owner}"):
        return
    if targets.shape == latents.shape:
        are_known = batch.library.has_values(latents)
        if not are_known or bool((targets == latents).all()):
            return
    warn_once(
        f"{owner} ignores the targets that it got, of shape {tuple(targets.shape)}: "
        "it trains a velocity of the latents; "
        "leave targets out, or use CrossFlowLoss() to train images"
    )
