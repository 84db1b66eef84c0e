r"""Gaussian data, where everything is known in closed form: the reference against which the
library is tested.

For z ~ N(mean, Sigma) the state is z_t ~ N(alpha mean, C_t) with C_t = alpha^2 Sigma + beta^2, so

    E[z | z_t] = mean + alpha Sigma C_t^-1 (z_t - alpha mean)          E[eps | z_t] = beta C_t^-1
    (z_t - alpha mean)

and, since all C_t commute, the probability-flow ODE transports z_t to z_s = alpha_s mean +
(C_s/C_t)^(1/2) (z_t - alpha_t mean). Hence f = gamma z_t + delta (z_t - z_s) for every statistic.
For images x = A z + c, identity (II) says that f/delta is the integral of kappa(s) lambda'(tau)
E[x | z_tau] along the path (b(s,s) = 0: anchored), and E[x | z_tau] = A E[z | z_tau] + c, so f = A
f_z + delta kappa(s) (lambda_t - lambda_s) c. Matched: delta kappa (lambda_t - lambda_s) = 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowspace import Schedule


def column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1)


@dataclass(frozen=True)
class Gaussian:
    schedule: Schedule
    mean: Tensor
    rotation: Tensor
    spread: Tensor

    @classmethod
    def random(cls, schedule, seed, dim=3):
        draw = torch.Generator().manual_seed(seed)
        mean, matrix = (
            torch.randn(*shape, generator=draw, dtype=torch.float64)
            for shape in ((dim,), (dim, dim))
        )
        spread = torch.rand(dim, generator=draw, dtype=torch.float64) + 0.3
        return cls(schedule, mean, torch.linalg.qr(matrix)[0], spread)

    def variances(self, t):
        alpha, beta = column(self.schedule.alpha(t)), column(self.schedule.beta(t))
        return (alpha * self.spread) ** 2 + beta**2

    def centred(self, z_t, t):
        """z_t - alpha mean, in the eigenvectors of Sigma."""
        return (z_t - column(self.schedule.alpha(t)) * self.mean) @ self.rotation

    def sample_state(self, t, seed):
        noise = torch.randn(
            len(t),
            len(self.mean),
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64,
        )
        centred = noise * self.variances(t).sqrt()
        return column(self.schedule.alpha(t)) * self.mean + centred @ self.rotation.T

    def clean(self, z_t, t):
        weights = column(self.schedule.alpha(t)) * self.spread**2 / self.variances(t)
        return self.mean + (weights * self.centred(z_t, t)) @ self.rotation.T

    def grain(self, z_t, t):
        return (
            column(self.schedule.beta(t)) / self.variances(t) * self.centred(z_t, t)
        ) @ self.rotation.T

    def velocity(self, z_t, t):
        dots = self.schedule.alpha_dot(t), self.schedule.beta_dot(t)
        return column(dots[0]) * self.clean(z_t, t) + column(dots[1]) * self.grain(z_t, t)

    def transported(self, z_t, t, s):
        """z_s = X(t, s)(z_t)."""
        ratio = (self.variances(s) / self.variances(t)).sqrt()
        return (
            column(self.schedule.alpha(s)) * self.mean
            + (ratio * self.centred(z_t, t)) @ self.rotation.T
        )

    def integral(self, z_t, t, s):
        return z_t - self.transported(z_t, t, s)

    def statistic(self, gamma, delta, diagonal=None):
        """The exact f as a model; `diagonal` is what it is where s = t and delta is infinite.

        s is a constant of the derivative (beta(s) = sqrt(1 - alpha^2) has an infinite slope at s =
        0).
        """

        def model(z_t, t, s):
            apart = torch.where(s < t, s, t / 2).detach()
            f = column(gamma(t, apart)) * z_t + column(delta(t, apart)) * self.integral(
                z_t, t, apart
            )
            return f if diagonal is None else torch.where(column(s < t), f, diagonal(z_t, t))

        return model

    def matched(self):
        return self.statistic(*matched_pair(self.schedule), diagonal=self.clean)

    def average_velocity(self):
        return self.statistic(
            lambda t, s: torch.zeros_like(t), lambda t, s: 1 / (t - s), diagonal=self.velocity
        )

    def across(self, matrix, offset, gamma, delta):
        """The exact f for images x = matrix z + offset, for an anchored statistic that meets
        Criterion 1.
        """
        within = self.statistic(gamma, delta)

        def model(z_t, t, s):
            s = s.detach()
            kappa = (1 + gamma(t, s) / delta(t, s)) * self.schedule.beta(t)
            fall = self.schedule.signal_to_noise(t) - self.schedule.signal_to_noise(s)
            return within(z_t, t, s) @ matrix.T + column(delta(t, s) * kappa * fall) * offset

        return model


def matched_pair(schedule):
    """gamma and delta of the matched statistic, written from the definition."""

    def delta(t, s):
        return schedule.beta(t) / (
            schedule.beta(s) * schedule.alpha(t) - schedule.alpha(s) * schedule.beta(t)
        )

    return lambda t, s: delta(t, s) * (schedule.beta(s) / schedule.beta(t) - 1), delta
