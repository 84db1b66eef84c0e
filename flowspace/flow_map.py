"""Sampling with a flow map: one evaluation, or several by the step of its statistic."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowspace.arrays import Model, checked_times, draw_noise, over_rows
from flowspace.backends import backend_of, torch_backend
from flowspace.errors import InputError
from flowspace.guidance import Guidance
from flowspace.schedules import TIME_FLOOR, Schedule
from flowspace.solvers import falling_grid
from flowspace.statistics import Statistic

__all__ = ["FlowMap"]

NOTHING_LEFT = 1e-4
"""What counts as zero for the weight of z_t in the step to s = 0; callables are 0/0 there and
evaluated just inside.
"""


@dataclass(frozen=True)
class FlowMap:
    """A model, the schedule of its path and the statistic that it outputs: X(t, s) takes z_t to
    z_s.

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
                raise InputError(
                    f"{name} = {value!r} came; write for example FlowMap(model, ..., "
                    f"{name}={example})"
                )

    def step(
        self,
        z_t: Tensor,
        t: Tensor | float,
        s: Tensor | float,
        cond: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Return z_s = (1 + gamma/delta) z_t - f(z_t, t, s)/delta, in one space; the times are
        checked, which costs a sync.

        Args:
            z_t: states of shape ``(B, *)``.
            t: times in (0, 1], of shape ``()`` or ``(B,)``.
            s: destinations in [0, t], likewise.
            cond: keyword arguments of the model.

        Raises:
            TimeError: if times are of the wrong type, shape or range.
            InputError: if the model returns another shape than the states'.
        """
        t, s = checked_times(t, s, z_t)
        prediction = self._predict(z_t, t, s, dict(cond or {}))
        if prediction.shape != z_t.shape:
            raise InputError(
                f"the model returns shape {tuple(prediction.shape)} for states of "
                f"{tuple(z_t.shape)}; several steps "
                "across spaces need encode=, a function from images to latents"
            )
        return self.statistic.coefficients(self.schedule).step(prediction, z_t, t, s)

    def velocity(self, z_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Return the velocity at z_t that the model stands for on the diagonal s = t, in one
        space: an ODE's right-hand side.

        Times below TIME_FLOOR, where an image says nothing of the velocity, are taken for it.

        Args:
            z_t: states of shape ``(B, *)``.
            t: times of shape ``(B,)``.
            cond: the model's other arguments.

        Raises:
            CriterionError: if the statistic is not anchored.
            InputError: if the model returns another shape than the states'.
        """
        t = backend_of(t).clamp(t, TIME_FLOOR)
        prediction = self._predict(z_t, t, t, cond)
        if prediction.shape != z_t.shape:
            raise InputError(
                f"the model returns shape {tuple(prediction.shape)} for states of "
                f"{tuple(z_t.shape)}; a velocity needs one space"
            )
        return self.statistic.coefficients(self.schedule).diagonal_velocity(prediction, z_t, t)

    def _predict(self, z: Tensor, t: Tensor, s: Tensor, cond: dict[str, Any]) -> Tensor:
        prediction = self.model(z, t, s, **cond)
        if not backend_of(z).is_array(prediction):
            raise InputError(
                f"the model returned {type(prediction).__name__}; wrap it so that it returns one "
                "tensor"
            )
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
        renoise: bool | None = None,
        guidance: Guidance | None = None,
        generator: Any = None,
    ) -> Tensor:
        """Return samples from noise.

        In one space each step is z_s = (1 + gamma/delta) z_t - f/delta, or, with ``renoise=True``,
        a step to s = 0 and back to the next time with fresh noise: the sampler of consistency
        models (Song et al., arXiv 2303.01469, algorithm 1).

        Across spaces (``encode`` given, or one step of a model that returns another shape) the
        last evaluation's -f/delta at s = 0 is the sample. In between, by default, the same is
        re-encoded and re-noised to the next time, which needs only that f is a sample;
        ``renoise=False`` takes the step with the re-encoded f(z_t, t, s), which is exact only for
        an affine encoder, since f is an average of posterior means.

        Args:
            noise: standard normal noise of the latents' shape, ``(B, *)``.
            cond: keyword arguments of the model.
            steps: evaluations, on an even grid from 1 to 0.
            times: the grid itself, falling from 1 to 0, instead of ``steps``.
            encode: from the model's output to latents.
            renoise: see above; by default only across spaces.
            guidance: classifier-free guidance of f: two evaluations a step instead of one.
            generator: the source of the noise that re-noising adds: a torch.Generator, or on JAX
                arrays a key.

        Raises:
            TimeError: if the grid does not fall from 1 to 0.
            InputError: if several steps across spaces have no ``encode``.
        """
        if guidance is not None and backend_of(noise) is not torch_backend:
            raise InputError(
                "guidance came with JAX arrays, which it does not know; guide inside the model"
            )
        grid = falling_grid(noise, steps, times)
        flow = self if guidance is None else replace(self, model=guidance.apply(self.model))
        return flow._walk(
            noise,
            grid,
            dict(cond or {}),
            encode,
            encode is not None if renoise is None else renoise,
            generator,
        )

    def _walk(
        self,
        z: Tensor,
        grid: Tensor,
        cond: dict[str, Any],
        encode: Callable[[Tensor], Tensor] | None,
        renoise: bool,
        generator: Any,
    ) -> Tensor:
        xp, c = backend_of(z), self.statistic.coefficients(self.schedule)
        draws = (
            xp.split(generator, len(grid)) if renoise and len(grid) > 2 else (None,) * len(grid)
        )
        for (t, s), draw in zip(itertools.pairwise(grid), draws, strict=False):
            last = bool(s == 0)
            t, s = xp.one_per_row(t, len(z)), xp.one_per_row(s, len(z))
            end = xp.zeros_like(s) if renoise else s
            prediction = self._predict(z, t, end, cond)
            if prediction.shape != z.shape and encode is None and not last:
                raise InputError(
                    f"the model returns shape {tuple(prediction.shape)} for states of "
                    f"{tuple(z.shape)}; several steps "
                    "across spaces need encode=, a function from images to latents"
                )
            if last and (encode is not None or prediction.shape != z.shape):
                return self._clean(prediction, t)
            if not renoise or last:
                z = c.step(encode(prediction) if encode else prediction, z, t, s)
                continue
            clean = (
                c.step(prediction, z, t, end)
                if encode is None
                else encode(self._clean(prediction, t))
            )
            z, _ = self.schedule.perturb(xp.cast(clean, z.dtype), draw_noise(z, draw), s)
        return z

    def _clean(self, prediction: Tensor, t: Tensor) -> Tensor:
        """Return the step to s = 0 across spaces, -f/delta(t, 0): nothing of z_t may be left in
        it.
        """
        c, xp = self.statistic.coefficients(self.schedule), backend_of(prediction)
        zero = xp.zeros_like(t)
        left = abs(c.velocity(t, zero)).max()
        if xp.has_values(left) and bool(left > NOTHING_LEFT):
            raise InputError(
                f"the step to s = 0 keeps some of z_t for {self.statistic}, so it cannot end in "
                "another space; use a statistic "
                "with kappa(0) = 0, such as MatchedStatistic()"
            )
        return xp.cast(
            -over_rows(c.derivative(t, zero), prediction) * prediction, prediction.dtype
        )
