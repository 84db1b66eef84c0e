"""Sampling with a flow map: one evaluation, or several through the step that every statistic has."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowspace.errors import InputError, TimeError
from flowspace.objectives.engine import Model, check_times
from flowspace.schedules import Schedule, over_rows
from flowspace.statistics import Statistic

__all__ = ["FlowMap"]

NOTHING_LEFT = 1e-4
"""What counts as zero for the weight of z_t in the step to s = 0; callables are 0/0 there and evaluated just inside."""


@dataclass(frozen=True)
class FlowMap:
    """A model, the schedule of its path and the statistic that it outputs: X(t, s) takes z_t to z_s.

    Args:
        model: any callable ``model(z_t, t, s, **cond)``.
        schedule: the schedule it was trained with.
        statistic: the statistic it was trained for.
    """

    model: Model
    schedule: Schedule
    statistic: Statistic

    def __post_init__(self) -> None:
        for name, kind, example in (
            ("schedule", Schedule, "LinearSchedule()"),
            ("statistic", Statistic, "MatchedStatistic()"),
        ):
            if not isinstance(value := getattr(self, name), kind):
                raise InputError(f"{name} = {value!r} came; write for example FlowMap(model, ..., {name}={example})")

    def step(self, z_t: Tensor, t: Tensor | float, s: Tensor | float, cond: Mapping[str, Any] | None = None) -> Tensor:
        """Return z_s = (1 + gamma/delta) z_t - f(z_t, t, s)/delta, in one space; the times are checked, which costs a sync.

        Args:
            z_t: states of shape ``(B, *)``.
            t: times in (0, 1], of shape ``()`` or ``(B,)``.
            s: destinations in [0, t], likewise.
            cond: keyword arguments of the model.

        Raises:
            TimeError: if times are of the wrong type, shape or range.
            InputError: if the model returns another shape than the states'.
        """
        t, s = check_times(t, s, z_t)
        prediction = self._predict(z_t, t, s, dict(cond or {}))
        if prediction.shape != z_t.shape:
            raise InputError(
                f"the model returns shape {tuple(prediction.shape)} for states of {tuple(z_t.shape)}; several steps "
                "across spaces need encode=, a function from images to latents"
            )
        return self.statistic.coefficients(self.schedule).step(prediction, z_t, t, s)

    def _predict(self, z: Tensor, t: Tensor, s: Tensor, cond: dict[str, Any]) -> Tensor:
        prediction = self.model(z, t, s, **cond)
        if not isinstance(prediction, Tensor):
            raise InputError(f"the model returned {type(prediction).__name__}; wrap it so that it returns one tensor")
        return prediction

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        *,
        cond: Mapping[str, Any] | None = None,
        steps: int = 1,
        times: Sequence[float] | Tensor | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
        renoise: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return samples from noise.

        In one space each step is z_s = (1 + gamma/delta) z_t - f/delta. Across spaces (``encode`` given, or one step of a
        model that returns another shape) the last evaluation's -f/delta at s = 0 is the sample. In between, by default, the
        same is re-encoded and re-noised to the next time, which needs only that f is a sample; ``renoise=False`` takes the step
        with the re-encoded f(z_t, t, s), which is exact only for an affine encoder, since f is an average of posterior means.

        Args:
            noise: standard normal noise of the latents' shape, ``(B, *)``.
            cond: keyword arguments of the model.
            steps: evaluations, on an even grid from 1 to 0.
            times: the grid itself, falling from 1 to 0, instead of ``steps``.
            encode: from the model's output to latents.
            renoise: see above; only with ``encode``.
            generator: the source of the noise that re-noising adds.

        Raises:
            TimeError: if the grid does not fall from 1 to 0.
            InputError: if several steps across spaces have no ``encode``.
        """
        grid = self._grid(noise, steps, times)
        cond, z = dict(cond or {}), noise
        c = self.statistic.coefficients(self.schedule)
        for t, s in itertools.pairwise(grid):
            t, s = t.expand(len(z)).contiguous(), s.expand(len(z)).contiguous()
            last = bool(s[0] == 0)
            prediction = self._predict(z, t, torch.zeros_like(s) if encode and renoise else s, cond)
            across = encode is not None or prediction.shape != z.shape
            if last and across:
                return self._clean(prediction, t)
            if encode is None and prediction.shape != z.shape:
                raise InputError(
                    f"the model returns shape {tuple(prediction.shape)} for states of {tuple(z.shape)}; several steps "
                    "across spaces need encode=, a function from images to latents"
                )
            if encode and renoise:
                fresh = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
                z, _ = self.schedule.perturb(encode(self._clean(prediction, t)).to(z.dtype), fresh, s)
            else:
                z = c.step(encode(prediction) if encode else prediction, z, t, s)
        return z

    def _clean(self, prediction: Tensor, t: Tensor) -> Tensor:
        """Return the step to s = 0 across spaces, -f/delta(t, 0): nothing of z_t may be left in it."""
        c, zero = self.statistic.coefficients(self.schedule), torch.zeros_like(t)
        if bool(c.velocity(t, zero).abs().max() > NOTHING_LEFT):
            raise InputError(
                f"the step to s = 0 keeps some of z_t for {self.statistic}, so it cannot end in another space; use a statistic "
                "with kappa(0) = 0, such as MatchedStatistic()"
            )
        return (-over_rows(c.derivative(t, zero), prediction) * prediction).to(prediction.dtype)

    def _grid(self, noise: Tensor, steps: int, times: Sequence[float] | Tensor | None) -> Tensor:
        dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
        if times is None:
            if not isinstance(steps, int) or steps < 1:
                raise TimeError(f"steps = {steps} came; it counts evaluations, so write 1 or a larger integer")
            return torch.linspace(1, 0, steps + 1, device=noise.device, dtype=dtype)
        grid = torch.as_tensor(times, device=noise.device, dtype=dtype)
        if grid.ndim != 1 or len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or bool((grid.diff() >= 0).any()):
            raise TimeError(f"times = {grid.tolist()} came; the grid falls strictly from 1 to 0, as in [1, 0.5, 0]")
        return grid
