"""Sampling with a flow map: one evaluation, or several by the step of its statistic."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowspace.arrays import Cond, Model, checked_times, draw_noise, over_rows
from flowspace.backends import backend_of, torch_backend
from flowspace.errors import InputError
from flowspace.guidance import Guidance, check_guidance
from flowspace.inputs import (
    check_device,
    check_model,
    check_real,
    check_source,
    check_states,
    checked_cond,
    refuse_misfit,
    refuse_unfit,
    require,
    takes,
)
from flowspace.schedules import TIME_FLOOR, Schedule
from flowspace.solvers import falling_grid
from flowspace.statistics import AbstractStatistic, Coefficients

__all__ = ["FlowMap"]

Encode = Callable[[Tensor], Tensor]
"""From the model's output to latents."""

EXAMPLE = (
    "write for example FlowMap(model, schedule=LinearSchedule(), statistic=MatchedStatistic())"
)

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

    Raises:
        InputError: if model, schedule or statistic is none.
    """

    model: Model
    schedule: Schedule
    statistic: AbstractStatistic

    def __post_init__(self) -> None:
        check_model(self.model)
        require(
            isinstance(self.schedule, Schedule),
            "schedule",
            self.schedule,
            EXAMPLE,
        )
        require(
            isinstance(self.statistic, AbstractStatistic),
            "statistic",
            self.statistic,
            EXAMPLE,
        )

    @property
    def coefficients(self) -> Coefficients:
        """What multiplies what in the step of the statistic under the schedule."""
        return self.statistic.coefficients(self.schedule)

    def step(
        self,
        z_t: Tensor,
        t: Tensor | float,
        s: Tensor | float,
        cond: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Return z_s = (1 + gamma/delta) z_t - f(z_t, t, s)/delta, in one space.

        The times are checked, which waits for the device.

        Args:
            z_t: states of shape ``(B, *)``.
            t: times in (0, 1], of shape ``()`` or ``(B,)``.
            s: destinations in [0, t], likewise.
            cond: keyword arguments of the model.

        Raises:
            TimeError: if times are of the wrong type, shape or range.
            InputError: if the model returns another shape than the states'.
        """
        check_states("states", z_t)
        t, s = checked_times(t, s, z_t)
        given = checked_cond(cond)
        prediction = self._predict(z_t, t, s, given)
        _check_one_space(prediction, z_t)
        return self.coefficients.step(prediction, z_t, t, s)

    def velocity(self, z_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Return the velocity at z_t that the model stands for on the diagonal s = t.

        It is an ODE's right-hand side, in one space. Times below TIME_FLOOR, where an image says
        nothing of the velocity, are taken for it.

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
                f"got shape {tuple(prediction.shape)} from the model "
                f"for states of {tuple(z_t.shape)}; a velocity needs one space"
            )
        return self.coefficients.diagonal_velocity(prediction, z_t, t)

    def _predict(self, z: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        try:
            prediction = self.model(z, t, s, **cond)
        except TypeError as error:
            refuse_unfit(self.model, cond, error)
            raise
        except RuntimeError as error:
            refuse_misfit(self.model, z, error, "states")
            raise
        if not backend_of(z).is_array(prediction):
            raise InputError(
                f"got {type(prediction).__name__} from the model; "
                "wrap it so that it returns one tensor"
            )
        if not prediction.ndim or len(prediction) != len(z):
            raise InputError(
                f"got shape {tuple(prediction.shape)} from the model for {len(z)} rows; "
                "wrap it so that it returns one tensor of shape (B, *)"
            )
        check_device("the output of the model", prediction, z)
        check_real(prediction)
        return prediction

    @torch.no_grad()
    def sample(  # noqa: PLR0913  # the public door: each argument has its name
        self,
        noise: Tensor,
        *,
        cond: Mapping[str, Any] | None = None,
        steps: int = 1,
        times: Sequence[float] | Tensor | None = None,
        encode: Encode | None = None,
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
        check_states("noise", noise)
        check_source(generator, noise)
        _check_helpers(noise, encode, guidance)
        grid = falling_grid(noise, steps, times)
        flow = self
        if guidance is not None:
            flow = replace(self, model=guidance.apply(self.model))
        given = checked_cond(cond)
        if renoise is None:
            renoise = encode is not None
        if renoise:
            return flow._renoised(noise, grid, given, encode, generator)
        return flow._stepped(noise, grid, given, encode)

    def _stepped(self, z: Tensor, grid: Tensor, cond: Cond, encode: Encode | None) -> Tensor:
        """Return samples by the statistic's step along a grid."""
        times = [_per_row(time, z) for time in grid[:-1]]
        for t, s in itertools.pairwise(times):
            z = self._moved(z, t, s, cond, encode)
        return self._sample_at_data(z, times[-1], cond, encode)

    def _renoised(
        self,
        z: Tensor,
        grid: Tensor,
        cond: Cond,
        encode: Encode | None,
        generator: Any,
    ) -> Tensor:
        """Return samples by steps to s = 0 and back, with fresh noise, along a grid."""
        times = [_per_row(time, z) for time in grid[:-1]]
        pairs = list(itertools.pairwise(times))
        draws: Sequence[Any] = ()
        if pairs:
            sources = backend_of(z).split(generator, len(grid))
            draws = sources[: len(pairs)]
        for draw, (t, s) in zip(draws, pairs, strict=True):
            clean = self._clean_latents(z, t, cond, encode)
            noise = draw_noise(z, draw)
            z = self.schedule.perturb(clean, noise, s)[0]
        return self._sample_at_data(z, times[-1], cond, encode)

    def _moved(self, z: Tensor, t: Tensor, s: Tensor, cond: Cond, encode: Encode | None) -> Tensor:
        """Return z_s by the statistic's step, with f re-encoded where it is of another space."""
        prediction = self._predict(z, t, s, cond)
        if encode is not None:
            prediction = _encoded(encode, prediction, z)
        _check_one_space(prediction, z)
        return self.coefficients.step(prediction, z, t, s)

    def _clean_latents(self, z: Tensor, t: Tensor, cond: Cond, encode: Encode | None) -> Tensor:
        """Return the latents at s = 0, re-encoded where f is of another space."""
        sample = self._sample_at_data(z, t, cond, encode)
        if encode is not None:
            return _encoded(encode, sample, z)
        _check_one_space(sample, z)
        return sample

    def _sample_at_data(self, z: Tensor, t: Tensor, cond: Cond, encode: Encode | None) -> Tensor:
        """Return the sample at s = 0, in the space of the model's output."""
        zero = backend_of(t).zeros_like(t)
        prediction = self._predict(z, t, zero, cond)
        if encode is not None or prediction.shape != z.shape:
            return self._clean(prediction, t)
        return self.coefficients.step(prediction, z, t, zero)

    def _clean(self, prediction: Tensor, t: Tensor) -> Tensor:
        """Return the step to s = 0 across spaces, -f/delta(t, 0).

        Raises:
            InputError: if some of z_t is left in it, as far as that can be seen.
        """
        c, xp = self.coefficients, backend_of(prediction)
        zero = xp.zeros_like(t)
        left = abs(c.velocity(t, zero)).max()
        if xp.has_values(left) and bool(left > NOTHING_LEFT):
            raise InputError(
                f"got {self.statistic}, whose step to s = 0 keeps some of z_t, "
                "so it cannot end in another space; "
                "use a statistic with kappa(0) = 0, such as MatchedStatistic(), "
                "or the sampler of the objective, loss_fn.flow_map(model)"
            )
        b = over_rows(c.derivative(t, zero), prediction)
        return xp.cast(-b * prediction, prediction.dtype)


def _check_helpers(noise: Tensor, encode: Encode | None, guidance: Guidance | None) -> None:
    """Raise InputError for an encoder or a guidance that cannot help to sample."""
    require(
        encode is None or takes(encode, noise),
        "encode",
        encode,
        "it is a function from what the model returns to latents",
    )
    check_guidance(guidance)
    if guidance is not None and backend_of(noise) is not torch_backend:
        raise InputError(
            "got guidance with JAX arrays, which it does not know; guide inside the model"
        )


def _per_row(time: Tensor, states: Tensor) -> Tensor:
    """Return one time for each row of states, in their library."""
    return backend_of(states).one_per_row(time, len(states))


def _encoded(encode: Encode, sample: Tensor, states: Tensor) -> Tensor:
    """Return the latents of what a model returned, in the states' dtype.

    Raises:
        InputError: if they are no array of the states' shape.
    """
    try:
        latents: Any = encode(sample)
    except RuntimeError as error:
        refuse_misfit(encode, sample, error, "samples")
        raise
    xp = backend_of(states)
    if not xp.is_array(latents):
        raise InputError(
            f"got {type(latents).__name__} from encode; return latents, one array of shape (B, *)"
        )
    check_device("the output of encode", latents, states)
    if latents.shape != states.shape:
        raise InputError(
            f"got shape {tuple(latents.shape)} from encode for states of shape "
            f"{tuple(states.shape)}; it maps what the model returns to latents of their shape"
        )
    return xp.cast(latents, states.dtype)


def _check_one_space(prediction: Tensor, states: Tensor) -> None:
    if prediction.shape != states.shape:
        raise InputError(
            f"got shape {tuple(prediction.shape)} from the model "
            f"for states of {tuple(states.shape)}; "
            "several steps across spaces need encode=, a function from images to latents"
        )
