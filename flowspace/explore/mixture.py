r"""The exact flow of a mixture of Gaussians under a schedule.

For $z \sim \sum_k w_k N(\mu_k, \sigma_k^2)$ the state is $z_t \sim \sum_k w_k N(\alpha \mu_k,
C_k)$ with $C_k = \alpha^2 \sigma_k^2 + \beta^2$, and the marginal velocity is

$$v(z_t, t) = \sum_k p_k(z_t) \left[\alpha' \mu_k + \frac{\alpha \alpha' \sigma_k^2 + \beta
\beta'}{C_k} (z_t - \alpha \mu_k)\right]$$

with $p_k$ the probability of the component given $z_t$. Nothing in it is singular at t = 0 unless
$\alpha'$ or $\beta'$ is, so that trajectories end at `TIME_FLOOR`, as training does.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowspace.schedules import TIME_FLOOR, Schedule
from flowspace.solvers import DormandPrince

__all__ = ["CLOVER", "TIMES", "GaussianMixture", "flow"]

TIMES = torch.linspace(1, TIME_FLOOR, 41, dtype=torch.float64)
"""At which the page shows the flow."""

TOLERANCE = 1e-5
"""Of the solver: between two Gaussians an error grows a hundredfold."""


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of round Gaussians in the plane.

    Attributes:
        weights: ``(K,)``, positive, of sum 1.
        means: ``(K, 2)``.
        spreads: the standard deviations ``(K,)``.
    """

    weights: Tensor
    means: Tensor
    spreads: Tensor

    def velocity(self, schedule: Schedule, z_t: Tensor, t: Tensor) -> Tensor:
        """Return the marginal velocity at states ``(B, 2)``, all at one time t of shape ``()``."""
        alpha, beta = schedule.alpha(t), schedule.beta(t)
        alpha_dot, beta_dot = schedule.alpha_dot(t), schedule.beta_dot(t)
        variances = alpha**2 * self.spreads**2 + beta**2
        offsets = z_t[:, None] - alpha * self.means
        squares = (offsets**2).sum(2)
        scores = self.weights.log() - variances.log() - squares / (2 * variances)
        shares = scores.softmax(1)
        rates = (alpha * alpha_dot * self.spreads**2 + beta * beta_dot) / variances
        of_component = alpha_dot * self.means + rates[:, None] * offsets
        return (shares[:, :, None] * of_component).sum(1)


def clover(leaves: int = 5, radius: float = 1.6, spread: float = 0.16) -> GaussianMixture:
    """Return Gaussians of equal weight on a circle, a turn of the circle apart."""
    angles = math.pi / 2 + 2 * math.pi * torch.arange(leaves, dtype=torch.float64) / leaves
    means = radius * torch.stack([angles.cos(), angles.sin()], 1)
    weights = torch.full((leaves,), 1 / leaves, dtype=torch.float64)
    return GaussianMixture(weights, means, torch.full_like(weights, spread))


CLOVER = clover()
"""The mixture that the page shows."""


def flow(
    schedule: Schedule, mixture: GaussianMixture, noise: Tensor, times: Tensor = TIMES
) -> Tensor:
    """Return the states ``(n, B, 2)`` of the probability-flow ODE at falling times, noise first.

    Args:
        schedule: alpha and beta.
        mixture: the data.
        noise: ``(B, 2)`` at t = 1, in float64.
        times: ``(n,)``, falling from 1, not below `TIME_FLOOR`.

    Raises:
        InputError: if torchdiffeq is not installed.
    """

    def velocity(z_t: Tensor, t: Tensor) -> Tensor:
        return mixture.velocity(schedule, z_t, t[0].clamp(min=TIME_FLOOR))  # steps overshoot

    return DormandPrince(TOLERANCE, TOLERANCE).path(velocity, noise, times)
