r"""Classifier-free guidance, in the training target and at sampling, as one small object (Ho &
Salimans, arXiv 2207.12598).

In training the velocity v of a row is replaced by a mixture with the network's own velocities,
with and without its condition (Geng et al., arXiv 2505.13447, eq. 21):

$$v_g = \omega v + (1 - \omega - \kappa)\, u(z_t | \text{null}) + \kappa\, u(z_t | \text{cond})$$

whose effective scale is $\omega / (1 - \kappa)$; outside the interval of times $v_g = v$. At
sampling a prediction becomes f(null) + scale (f(cond) - f(null)). Improved MeanFlow's form, v + (1
- 1/w)(u(cond) - u(null)), is omega = 1, kappa = 1 - 1/w.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowspace.arrays import over_rows
from flowspace.backends.process import several_processes
from flowspace.errors import InputError

__all__ = ["Guidance", "RandomGuidance"]

Cond = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance of one strength.

    Args:
        omega: the weight of the velocity itself, a number from 0 up or, for sampling, one for each
            row, of shape ``(B,)``.
        kappa: the weight of the network's own conditional velocity, in [0, 1); sampling knows only
            omega / (1 - kappa).
        interval: the times that are guided, both ends included, within [0, 1].
        null: the model's arguments when it is unconditional, such as ``{"labels": 1000}``; a
            number or tensor for each.
        drop: the share of rows that are trained without their condition, in [0, 1]; one mask
            serves a whole training step.

    Raises:
        InputError: if a number is out of its range.
    """

    null: Mapping[str, Any]
    omega: float | Tensor = 1.0
    kappa: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    drop: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.null, Mapping) or not self.null:
            raise InputError(
                f"null = {self.null!r} came; it names what the model is given instead, as "
                f"{{'labels': 1000}}"
            )
        if not bool(
            torch.as_tensor(
                (torch.as_tensor(self.omega) >= 0) & torch.as_tensor(self.omega).isfinite()
            ).all()
        ):
            raise InputError(
                f"omega = {self.omega} came; write 1 for no guidance and more for stronger "
                "guidance"
            )
        if not 0 <= self.kappa < 1:
            raise InputError(
                f"kappa = {self.kappa} came; the effective scale is omega / (1 - kappa), so 0 <= "
                "kappa < 1"
            )
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise InputError(
                f"interval = {self.interval} came; write times with 0 <= low < high <= 1, as "
                "(0.1, 0.7)"
            )
        if not 0 <= self.drop <= 1:
            raise InputError(
                f"drop = {self.drop} came; it is the share of rows without their condition, in "
                "[0, 1]"
            )

    def begin(
        self, cond: Cond, t: Tensor, s: Tensor, generator: torch.Generator | None
    ) -> tuple[Cond, Tensor]:
        """Return the condition that a training step uses throughout, and the mask ``(B,)`` of rows
        that lost theirs.
        """
        dropped = torch.rand(t.shape, generator=generator, device=t.device) < self.drop
        return self._without(cond, dropped), dropped

    def guided(
        self, v: Tensor, own: Callable[[Cond], Tensor], t: Tensor, cond: Cond, dropped: Tensor
    ) -> Tensor:
        """Return v_g, of v's shape.

        Args:
            v: the velocity that would be learned without guidance, ``(B, *)``.
            own: from a condition to the network's velocity at (z_t, t), without gradient.
            t: times ``(B,)``.
            cond: from `begin`.
            dropped: from `begin`; these rows are not guided.
        """
        weights = self._weights(t, cond)
        if weights is None:
            return v
        omega, kappa = (
            over_rows(torch.where(dropped, idle, w), v)
            for w, idle in zip(weights, (1.0, 0.0), strict=True)
        )
        mixed = omega * v + (1 - omega - kappa) * own(self._without(self.seen(t, cond)))
        return mixed + kappa * own(self.seen(t, cond)) if self._mixes else mixed

    def seen(self, t: Tensor, cond: Cond) -> Cond:
        """Return the condition under which the network's own velocity is taken."""
        return cond

    def apply(self, predict: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a model or velocity ``(z, t, ..., **cond)`` that is guided with the effective
        scale, for sampling.

        It costs two evaluations; where no row's time is in the interval, one, unless other
        processes may wait for it.
        """

        def guided(z: Tensor, t: Tensor, *rest: Tensor, **cond: Any) -> Tensor:
            inside = (self.interval[0] <= t) & (t <= self.interval[1])
            with_condition = predict(z, t, *rest, **cond)
            if not several_processes() and not bool(inside.any()):
                return with_condition
            scale = torch.as_tensor(self.omega, device=t.device, dtype=t.dtype) / (1 - self.kappa)
            without = predict(z, t, *rest, **self._without(cond))
            scale = over_rows(torch.where(inside, scale, 1.0), without).to(without.dtype)
            return without + scale * (with_condition - without)

        return guided

    @property
    def _mixes(self) -> bool:
        return self.kappa > 0

    def _weights(self, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor] | None:
        """Return omega and kappa of each row, or None where nothing is guided."""
        if not isinstance(self.omega, Tensor) and self.omega == 1 and self.kappa == 0:
            return None
        inside = (self.interval[0] <= t) & (t <= self.interval[1])
        omega = torch.as_tensor(self.omega, device=t.device, dtype=t.dtype)
        return torch.where(inside, omega, 1.0), torch.where(
            inside, self.kappa, torch.zeros_like(t)
        )

    def _without(self, cond: Cond, rows: Tensor | None = None) -> Cond:
        """Return the condition with the null values in the masked rows, None: in all."""
        missing = self.null.keys() - cond.keys()
        if missing:
            raise InputError(
                f"guidance has a null value for {', '.join(sorted(missing))}, but cond has "
                f"{', '.join(sorted(cond)) or 'nothing'}; give cond the same names"
            )
        return cond | {
            name: self._nulled(cond[name], value, rows) for name, value in self.null.items()
        }

    @staticmethod
    def _nulled(given: Any, null: Any, rows: Tensor | None) -> Any:
        if not isinstance(given, Tensor):
            raise InputError(
                f"cond holds {type(given).__name__} where guidance drops rows; give a tensor of "
                "shape (B, *)"
            )
        replacement = torch.as_tensor(null, dtype=given.dtype, device=given.device)
        if rows is None:
            return replacement.expand_as(given).contiguous()
        return torch.where(over_rows(rows, given), replacement, given)


@dataclass(frozen=True, kw_only=True)
class RandomGuidance(Guidance):
    """Guidance whose strength and interval are drawn for each row and told to the model (improved
    and pixel MeanFlow).

    The model is given ``omega``, ``t_min`` and ``t_max``, each ``(B,)``, beside its other
    arguments, so that one network can be sampled at any strength, at one evaluation a step: see
    `told`. The weight has a density proportional to omega^-power on [1, largest]; t_min is uniform
    on [0, 0.5], t_max on [0.5, 1]; rows on the diagonal see the whole interval.

    Args:
        largest: the largest omega that is drawn, above 1; 8 in the reference.
        power: 1 in the reference (log-uniform), 2 for its larger models.

    Raises:
        InputError: if largest is not above 1.
    """

    largest: float = 8.0
    power: float = 1.0
    omega: float | Tensor = field(default=1.0, init=False)
    kappa: float = field(default=0.0, init=False)
    interval: tuple[float, float] = field(default=(0.0, 1.0), init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.largest < math.inf:
            raise InputError(
                f"largest = {self.largest} came; omega is drawn between 1 and it, so write more "
                "than 1"
            )

    def begin(
        self, cond: Cond, t: Tensor, s: Tensor, generator: torch.Generator | None
    ) -> tuple[Cond, Tensor]:
        """Return the condition with omega, t_min, t_max, and the mask of rows that lost theirs."""
        cond, dropped = super().begin(cond, t, s, generator)
        unit, low, high = torch.rand(
            3, len(t), generator=generator, device=t.device, dtype=t.dtype
        ).unbind()
        diagonal = s == t
        return cond | {
            "omega": self.strength(unit),
            "t_min": torch.where(diagonal, 0.0, 0.5 * low),
            "t_max": torch.where(diagonal, 1.0, 0.5 + 0.5 * high),
        }, dropped

    def strength(self, unit: Tensor) -> Tensor:
        """Return the quantile of omega, in [1, largest], at numbers in [0, 1]."""
        span = math.log(self.largest)
        if self.power == 1:
            return (unit * span).exp()
        bent = 1 - self.power
        return (torch.log1p(unit * math.expm1(bent * span)) / bent).exp().clamp(1, self.largest)

    def seen(self, t: Tensor, cond: Cond) -> Cond:
        """Return the condition with omega = 1 outside each row's interval."""
        inside = (cond["t_min"] <= t) & (t <= cond["t_max"])
        whole = {"t_min": torch.zeros_like(t), "t_max": torch.ones_like(t)}
        return cond | {"omega": torch.where(inside, cond["omega"], 1.0)} | whole

    def told(
        self, like: Tensor, omega: float | Tensor, interval: tuple[float, float] = (0.0, 1.0)
    ) -> dict[str, Tensor]:
        """Return what to add to cond when sampling: omega, t_min and t_max, each ``(B,)``, beside
        the noise.

        Raises:
            InputError: if omega is outside [1, largest], where the model was not trained, or the
                interval is none.
        """
        strengths = (
            torch.as_tensor(omega, device=like.device, dtype=torch.float32)
            .expand(len(like))
            .contiguous()
        )
        if not bool(((strengths >= 1) & (strengths <= self.largest)).all()):
            raise InputError(
                f"omega = {omega} came; the model was trained between 1 and {self.largest}"
            )
        if not 0 <= interval[0] < interval[1] <= 1:
            raise InputError(
                f"interval = {interval} came; write times with 0 <= low < high <= 1, as (0.1, 0.7)"
            )
        low, high = (torch.full_like(strengths, end) for end in interval)
        return {"omega": strengths, "t_min": low, "t_max": high}

    def apply(self, predict: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Refuse: the model takes its guidance as a condition."""
        raise InputError(
            "a model trained with RandomGuidance takes its strength as a condition; add "
            "told(noise, omega) to cond"
        )

    @property
    def _mixes(self) -> bool:
        return True

    def _weights(self, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), 1 - 1 / self.seen(t, cond)["omega"].to(t.dtype)

    def _without(self, cond: Cond, rows: Tensor | None = None) -> Cond:
        free = super()._without(cond, rows)
        return (
            free | {"omega": torch.ones_like(cond["omega"])}
            if rows is None and "omega" in cond
            else free
        )
