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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flowspace.arrays import Cond, is_number, over_rows
from flowspace.backends import torch_backend
from flowspace.backends.process import several_processes
from flowspace.errors import InputError
from flowspace.inputs import require

__all__ = ["Guidance", "RandomGuidance", "check_guidance"]

Interval: TypeAlias = tuple[float, float]
Predict: TypeAlias = Callable[..., Tensor]
"""A model or velocity ``(z, t, ..., **cond)``."""

WHOLE: Interval = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance of one strength.

    Args:
        omega: the weight of the velocity itself, a number from 0 up or, for sampling, one for each
            row, of shape ``(B,)``.
        own_weight: the paper's kappa, the weight of the network's own conditional velocity, in
            [0, 1); sampling knows only
            omega / (1 - own_weight).
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
    own_weight: float = 0.0
    interval: Interval = WHOLE
    drop: float = 0.1

    def __post_init__(self) -> None:
        require(
            isinstance(self.null, Mapping) and bool(self.null),
            "null",
            self.null,
            "it names what the model is given instead, as {'labels': 1000}",
        )
        for name, value in self.null.items():
            require(
                isinstance(value, Tensor | bool) or is_number(value),
                f"null[{name!r}]",
                value,
                "write a number or a tensor: what a row is given in place of its condition",
            )
        require(
            _is_strength(self.omega),
            "omega",
            self.omega,
            "write 1 for no guidance and more for stronger guidance",
        )
        require(
            is_number(self.own_weight) and 0 <= self.own_weight < 1,
            "own_weight",
            self.own_weight,
            "the effective scale is omega / (1 - own_weight), so write 0 <= own_weight < 1",
        )
        _check_interval(self.interval)
        require(
            is_number(self.drop) and 0 <= self.drop <= 1,
            "drop",
            self.drop,
            "it is the share of rows without their condition, in [0, 1]",
        )

    def drop_condition(
        self, cond: Cond, t: Tensor, s: Tensor, generator: torch.Generator | None
    ) -> tuple[Cond, Tensor]:
        """Return the condition of a training step, and the mask ``(B,)`` of rows that lost theirs.

        Args:
            cond: the model's arguments as the caller gave them.
            t: times ``(B,)``.
            s: destinations ``(B,)``.
            generator: the source of the mask.
        """
        how = {"generator": generator, "device": t.device}
        drawn = torch_backend.uniform(t.shape, how)
        dropped = drawn < self.drop
        return self._without(cond, dropped), dropped

    def guided(
        self, v: Tensor, own: Callable[[Cond], Tensor], t: Tensor, cond: Cond, dropped: Tensor
    ) -> Tensor:
        """Return v_g, of v's shape.

        Args:
            v: the velocity that would be learned without guidance, ``(B, *)``.
            own: from a condition to the network's velocity at (z_t, t), without gradient.
            t: times ``(B,)``.
            cond: from `drop_condition`.
            dropped: from `drop_condition`; these rows are not guided.
        """
        weights = self._weights(t, cond)
        if weights is None:
            return v
        omega, kappa = weights
        omega = over_rows(torch.where(dropped, 1.0, omega), v)
        kappa = over_rows(torch.where(dropped, 0.0, kappa), v)
        condition = self.own_condition(t, cond)
        u_null = own(self._without(condition))
        mixed = omega * v + (1 - omega - kappa) * u_null
        if self._mixes:
            u_cond = own(condition)
            mixed = mixed + kappa * u_cond
        return mixed

    def own_condition(self, t: Tensor, cond: Cond) -> Cond:
        """Return the condition under which the network's own velocity is taken."""
        return cond

    def apply(self, predict: Predict) -> Predict:
        """Return a model or velocity ``(z, t, ..., **cond)`` that is guided with the effective
        scale, for sampling.

        It costs two evaluations; where no row's time is in the interval, one, unless other
        processes may wait for it.
        """

        def guided(z: Tensor, t: Tensor, *rest: Tensor, **cond: Any) -> Tensor:
            inside = self._inside(t)
            f_cond = predict(z, t, *rest, **cond)
            if not several_processes() and not bool(inside.any()):
                return f_cond
            f_null = predict(z, t, *rest, **self._without(cond))
            scale = self._omega_beside(t) / (1 - self.own_weight)
            scale = torch.where(inside, scale, 1.0)
            scale = over_rows(scale, f_null).to(f_null.dtype)
            return f_null + scale * (f_cond - f_null)

        return guided

    @property
    def _mixes(self) -> bool:
        return self.own_weight > 0

    def _inside(self, t: Tensor) -> Tensor:
        """Return the mask ``(B,)`` of times within the interval."""
        low, high = self.interval
        return (low <= t) & (t <= high)

    def _omega_beside(self, t: Tensor) -> Tensor:
        """Return omega as a tensor of the times' device and dtype."""
        return torch.as_tensor(self.omega, device=t.device, dtype=t.dtype)

    def _weights(self, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor] | None:
        """Return omega and kappa of each row, or None where nothing is guided."""
        is_one = not isinstance(self.omega, Tensor) and self.omega == 1
        if is_one and not self._mixes:
            return None
        inside = self._inside(t)
        omega = torch.where(inside, self._omega_beside(t), 1.0)
        kappa = torch.where(inside, self.own_weight, torch.zeros_like(t))
        return omega, kappa

    def _without(self, cond: Cond, rows: Tensor | None = None) -> Cond:
        """Return the condition with the null values in the masked rows, None: in all."""
        missing = ", ".join(sorted(self.null.keys() - cond.keys()))
        if missing:
            given = ", ".join(sorted(cond)) or "nothing"
            raise InputError(
                f"got a null value for {missing}, but cond has {given}; give cond the same names"
            )
        replaced = dict(cond)
        for name, null in self.null.items():
            replaced[name] = self._nulled(cond[name], null, rows)
        return replaced

    @staticmethod
    def _nulled(given: Any, null: Any, rows: Tensor | None) -> Any:
        if not isinstance(given, Tensor):
            raise InputError(
                f"got {type(given).__name__} in cond where guidance drops rows; "
                "give a tensor of shape (B, *)"
            )
        null = torch.as_tensor(null, dtype=given.dtype, device=given.device)
        if rows is None:
            return null.expand_as(given).contiguous()
        return torch.where(over_rows(rows, given), null, given)


@dataclass(frozen=True, kw_only=True)
class RandomGuidance(Guidance):
    """Guidance whose strength and interval are drawn for each row, as conditions of the model.

    This is improved and pixel MeanFlow's.

    The model is given ``omega``, ``t_min`` and ``t_max``, each ``(B,)``, beside its other
    arguments, so that one network can be sampled at any strength, at one evaluation a step: see
    `sampling_condition`. The weight has a density proportional to omega^-power on [1, largest];
    t_min is uniform on [0, 0.5], t_max on [0.5, 1]; rows on the diagonal see the whole interval.

    Args:
        largest: the largest omega that is drawn, above 1; 8 in the reference.
        power: 1 in the reference (log-uniform), 2 for pixel MeanFlow's L at 256 pixels.

    Raises:
        InputError: if largest is not above 1.
    """

    largest: float = 8.0
    power: float = 1.0
    omega: float | Tensor = field(default=1.0, init=False)
    own_weight: float = field(default=0.0, init=False)
    interval: Interval = field(default=WHOLE, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            is_number(self.largest) and 1 < self.largest < math.inf,
            "largest",
            self.largest,
            "omega is drawn between 1 and it, so write more than 1",
        )
        require(
            is_number(self.power) and 0 <= self.power < math.inf,
            "power",
            self.power,
            "omega has a density of omega^-power, so write 0 or more, 1 for log-uniform",
        )

    def drop_condition(
        self, cond: Cond, t: Tensor, s: Tensor, generator: torch.Generator | None
    ) -> tuple[Cond, Tensor]:
        """Return the condition with omega, t_min, t_max, and the mask of rows that lost theirs."""
        cond, dropped = super().drop_condition(cond, t, s, generator)
        how = {"generator": generator, "device": t.device, "dtype": t.dtype}
        numbers = torch_backend.uniform((3, len(t)), how)
        unit, low, high = numbers.unbind()
        diagonal = s == t
        drawn = {
            "omega": self.strength(unit),
            "t_min": torch.where(diagonal, 0.0, 0.5 * low),
            "t_max": torch.where(diagonal, 1.0, 0.5 + 0.5 * high),
        }
        return cond | drawn, dropped

    def strength(self, unit: Tensor) -> Tensor:
        """Return the quantile of omega, in [1, largest], at numbers in [0, 1]."""
        span = math.log(self.largest)
        if self.power == 1:
            return (unit * span).exp()
        bent = 1 - self.power
        logarithm = torch.log1p(unit * math.expm1(bent * span)) / bent
        return logarithm.exp().clamp(1, self.largest)

    def own_condition(self, t: Tensor, cond: Cond) -> Cond:
        """Return the condition with omega = 1 outside each row's interval."""
        inside = (cond["t_min"] <= t) & (t <= cond["t_max"])
        own = {
            "omega": torch.where(inside, cond["omega"], 1.0),
            "t_min": torch.zeros_like(t),
            "t_max": torch.ones_like(t),
        }
        return cond | own

    def sampling_condition(
        self, like: Tensor, omega: float | Tensor, interval: Interval = WHOLE
    ) -> dict[str, Tensor]:
        """Return what to add to cond when sampling: omega, t_min and t_max, each ``(B,)``.

        Args:
            like: the noise, ``(B, *)``: how many rows, and where.
            omega: the strength, a number or one for each row, ``(B,)``, in [1, largest].
            interval: the times that are guided, within [0, 1].

        Raises:
            InputError: if omega is outside [1, largest], where the model was not trained, or the
                interval is none.
        """
        strength = torch.as_tensor(omega, device=like.device, dtype=torch.float32)
        strengths = strength.expand(len(like)).contiguous()
        trained = (strengths >= 1) & (strengths <= self.largest)
        if not bool(trained.all()):
            raise InputError(
                f"got omega = {omega}; the model was trained between 1 and {self.largest}"
            )
        _check_interval(interval)
        low, high = interval
        return {
            "omega": strengths,
            "t_min": torch.full_like(strengths, low),
            "t_max": torch.full_like(strengths, high),
        }

    def apply(self, predict: Predict) -> Predict:
        """Refuse: the model takes its guidance as a condition."""
        raise InputError(
            "got RandomGuidance to sample with, "
            "whose model takes its strength as a condition; "
            "add sampling_condition(noise, omega) to cond"
        )

    @property
    def _mixes(self) -> bool:
        return True

    def _weights(self, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        scale = self.own_condition(t, cond)["omega"].to(t.dtype)
        return torch.ones_like(t), 1 - 1 / scale

    def _without(self, cond: Cond, rows: Tensor | None = None) -> Cond:
        free = super()._without(cond, rows)
        if rows is not None or "omega" not in cond:
            return free
        return free | {"omega": torch.ones_like(cond["omega"])}


def check_guidance(guidance: Any) -> None:
    """Raise InputError unless it is a Guidance, or None."""
    require(
        guidance is None or isinstance(guidance, Guidance),
        "guidance",
        guidance,
        "write for example Guidance(null={'labels': 1000}, omega=2.0)",
    )


def _is_strength(omega: Any) -> bool:
    """Return whether omega is a number, or a tensor of numbers, from 0 up and finite."""
    if isinstance(omega, Tensor):
        return bool(((omega >= 0) & omega.isfinite()).all())
    return is_number(omega) and 0 <= omega < math.inf


def _check_interval(interval: Any) -> None:
    """Raise InputError unless an interval of times lies in [0, 1]."""
    is_pair = isinstance(interval, Sequence) and len(interval) == 2
    require(
        is_pair and all(is_number(time) for time in interval),
        "interval",
        interval,
        "write two times, as (0.1, 0.7)",
    )
    low, high = interval
    require(
        0 <= low < high <= 1,
        "interval",
        interval,
        "write times with 0 <= low < high <= 1, as (0.1, 0.7)",
    )
