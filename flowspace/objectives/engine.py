r"""The one engine: times -> state -> derivative -> residual -> target -> penalty.

For coefficients a, b and a known part K (c x by identity (II), or (gamma/delta)' z_t + (1 +
gamma/delta) v by identity (I)) the residual $R = a f + b D_t f - K$ is zero at the exact f in the
mean given z_t. Divided by its signed scale m and with everything but the prediction detached it
becomes a target,

$$y^* = \mathrm{sg}(f - R/m), \qquad \text{loss} = d(w(t, s) (f - y^*)).$$

In the literal form the penalty is taken of w R itself and the gradient flows through a f alone.

Integrated from r to t instead of differentiated, either identity reads f(z_t)/delta(t, s) =
f(z_r)/delta(r, s) + K(r, t) on one path: the two-point form, y* = sg((b(r, s) f(z_r, r, s) + K(r,
t))/b(t, s)), at the price of one more evaluation.

The same holds on tensors of torch and on arrays of JAX, whichever come: what differs is in
`flowspace.backends`.
"""

import abc
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from flowspace.arrays import (
    Cond,
    Model,
    at_least_float32,
    check_times,
    checked_times,
    draw_noise,
    is_number,
    over_rows,
)
from flowspace.backends import backend_of, one_backend, torch_backend
from flowspace.derivatives import Derivative, SharedPrimal
from flowspace.derivatives.reached import OnCopies
from flowspace.derivatives.replay import RandomState, without_trace
from flowspace.errors import InputError, TimeError
from flowspace.flow_map import FlowMap
from flowspace.guidance import Guidance, check_guidance
from flowspace.inputs import (
    check_flag,
    check_model,
    checked_cond,
    is_function,
    kind_of,
    refuse_misfit,
    refuse_unfit,
    require,
    takes,
    velocity_of,
)
from flowspace.objectives.inputs import (
    Batch,
    check_output,
    checked_batch,
    evaluated,
    warn_of_scale,
    with_fields,
)
from flowspace.penalties import Penalty, SquaredError
from flowspace.schedules import LinearSchedule, Schedule
from flowspace.statistics import (
    AbstractStatistic,
    Coefficients,
    PointCoefficients,
)
from flowspace.times import DrawPairs, PairSampler, TimePairs, TimeSampler, drawn_pairs

__all__ = ["LossOutput", "Objective", "PathPoint"]

Weight: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A function of (t, s): numbers for rows, each of shape ``(B,)``."""


class LossOutput(NamedTuple):
    """What an objective returns.

    Attributes:
        loss: the penalty of each row, of shape ``(B,)``, with gradient.
        prediction: f(z_t, t, s), of the targets' shape, with gradient.
        target: y*, detached; what perceptual and feature losses compare the prediction with.
        residual: R, detached; zero in the mean at the exact f.
        z_t: the noisy state, of the latents' shape.
        t: the times, of shape ``(B,)``.
        s: the destinations, of shape ``(B,)``.
        velocity: the velocity at z_t that the residual used: conditional, given, or guided; of the
            latents' shape.
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor
    residual: Tensor
    z_t: Tensor
    t: Tensor
    s: Tensor
    velocity: Tensor


class PathPoint(NamedTuple):
    """A point of the path for each row, and what the residual needs to know there.

    Attributes:
        state: z_t as the model is given it, in the latents' dtype, of shape ``(B, *)``.
        t: times, of shape ``(B,)``.
        s: destinations, of shape ``(B,)``.
        velocity: the velocity at z_t that stands in the residual, of the state's shape.
        data: x, the clean latents or the targets, of the prediction's shape.
        cond: keyword arguments of the model.
        library: the functions of the arrays, `flowspace.backends`.
        dropped: which rows lost their condition, of shape ``(B,)``; None without guidance.
        most_off_diagonal: how many rows have s < t at most; None where only the device knows.
    """

    state: Tensor
    t: Tensor
    s: Tensor
    velocity: Tensor
    data: Tensor
    cond: Cond
    library: Any = torch_backend
    dropped: Tensor | None = None
    most_off_diagonal: int | None = None

    @property
    def z(self) -> Tensor:
        """The state in at least float32, in which coefficients are applied."""
        return at_least_float32(self.state)

    def weighted(self, weight: Weight, values: Tensor) -> Tensor:
        """Return weight(t, s) times values of shape ``(B, *)``, one weight for each row."""
        weights = weight(self.t, self.s)
        return over_rows(weights, values) * values


@dataclass(frozen=True, kw_only=True)
class Objective(abc.ABC):
    """An objective: a frozen object, called with a model and a batch.

    A subclass says what its known part K is, and redefines fields whose defaults differ.

    Args:
        schedule: alpha and beta.
        statistic: what the model outputs.
        times: how pairs (t, s) are drawn: a `PairSampler`, or a function ``(rows, *, generator,
            device, dtype)`` that returns t and s, each of shape ``(rows,)``.
        penalty: a `Penalty`, or a function from a difference ``(B, *)`` to numbers ``(B,)``.
        weight: a function of (t, s), each of shape ``(B,)``, that multiplies the difference before
            the penalty.
        derivative: the route to D_t f.
        literal: the paper's stop-gradient: penalty(w R), with gradient through a f alone.
        check: refuse a statistic that the objective cannot use; False trains it all the same.
        velocity: a callable ``(z_t, t, **cond)`` that replaces the conditional velocity, for
            distillation and estimates.
        guidance: classifier-free guidance of the target, and the share of rows that lose their
            condition; in one space.
        gap: None for the derivative; a share g in (0, 1] for the two-point form with
            r = t - g (t - s).

    Raises:
        InputError: if an argument is of the wrong kind or out of its range.
        CriterionError: if check is on and the statistic fails.
    """

    schedule: Schedule = field(default_factory=LinearSchedule)
    statistic: AbstractStatistic = None  # type: ignore[assignment]  # each objective has its own
    times: DrawPairs = TimePairs()
    penalty: Callable[[Tensor], Tensor] = SquaredError()
    weight: Weight | None = None
    derivative: Derivative = SharedPrimal()
    literal: bool = False
    check: bool = True
    velocity: Callable[..., Tensor] | None = None
    guidance: Guidance | None = None
    gap: float | None = None
    coefficients: Coefficients = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.init and getattr(self, each.name) is None:
                object.__setattr__(self, each.name, _default_of(each))
        self._check_kinds()
        # Derived and compiled now: the first call may be one that torch.compile or JAX captures.
        coefficients = self.statistic.coefficients(self.schedule)
        coefficients.prepare()
        self.schedule.prepare()
        object.__setattr__(self, "coefficients", coefficients)
        self.check_settings()
        if self.check:
            self.check_statistic()

    def _check_kinds(self) -> None:
        require(
            isinstance(self.schedule, Schedule),
            "schedule",
            self.schedule,
            "write for example LinearSchedule() or Schedule(alpha='1 - t', beta='t')",
        )
        require(
            isinstance(self.statistic, AbstractStatistic),
            "statistic",
            self.statistic,
            "write for example MatchedStatistic() or Statistic(gamma='1', delta='-t/(t - s)')",
        )
        draws = takes(self.times, 1, generator=None, device=None, dtype=None)
        require(
            draws and not isinstance(self.times, TimeSampler),
            "times",
            self.times,
            "it draws pairs (t, s), so write for example TimePairs(UniformTimes(), equal=0.5), "
            "or a function (rows, *, generator, device, dtype) that returns t and s",
        )
        require(
            takes(self.penalty, None),
            "penalty",
            self.penalty,
            "write for example SquaredError() or AbsoluteError()",
        )
        require(
            self.weight is None or takes(self.weight, None, None),
            "weight",
            self.weight,
            "it is a function of (t, s), so write for example lambda t, s: 1 / t",
        )
        require(
            isinstance(self.derivative, Derivative),
            "derivative",
            self.derivative,
            "a route is an object, so write for example SharedPrimal() or FiniteDifference()",
        )
        check_flag("literal", self.literal)
        check_flag("check", self.check)
        require(
            self.velocity is None or is_function(self.velocity),
            "velocity",
            self.velocity,
            "it is a function (z_t, t, **cond) that returns a tensor like z_t",
        )
        check_guidance(self.guidance)
        self._check_gap()

    def _check_gap(self) -> None:
        if self.gap is None:
            return
        require(
            is_number(self.gap) and 0 < self.gap <= 1,
            "gap",
            self.gap,
            "it is the share of t - s that the second point lies earlier, "
            "so write for example 0.1, or None for the derivative",
        )
        if self.literal:
            raise InputError(
                "got gap with literal=True; "
                "the two-point form has a target only: write literal=False"
            )
        if type(self).known_part_between is Objective.known_part_between:
            raise InputError(
                f"got gap for {type(self).__name__}, which has no two-point form; "
                "define known_part_between, or leave gap out"
            )

    def check_settings(self) -> None:  # noqa: B027  # most objectives have no other settings
        """Refuse an objective's own settings that are out of their range; never switched off."""

    def check_statistic(self) -> None:  # noqa: B027  # most objectives take any statistic
        """Refuse a statistic that the objective cannot use; ``check=False`` switches it off."""

    def check_call(self, batch: Batch) -> None:  # noqa: B027  # most objectives take any batch
        """Refuse a batch that the objective cannot use."""

    @abc.abstractmethod
    def known_part(self, at: PathPoint) -> Tensor:
        """Return the known part K of the residual R = a f + b D_t f - K, of the data's shape."""

    def known_part_between(self, at: PathPoint, earlier: PathPoint) -> Tensor:
        """Return the integral of the known part from the earlier point to the other.

        Only the two-point form (``gap``) needs it. Both points are on one path and have one s; the
        result is of the data's shape.
        """
        raise NotImplementedError

    @cached_property
    def outputs(self) -> AbstractStatistic:
        """What the model returns, as `FlowMap` takes it.

        It is another than ``statistic`` where the model returns images.
        """
        return self.statistic

    def flow_map(self, model: Model) -> FlowMap:
        """Return the sampler of a model that was trained with this objective."""
        return FlowMap(model, self.schedule, self.outputs)

    def own_velocity(self, model: Model, at: PathPoint) -> Tensor:
        """Return the velocity that the model itself predicts at z_t, without gradient.

        It is read from the model's value on the diagonal s = t.

        Raises:
            InputError: if the model returns another space than the states'.
        """

        def on_diagonal() -> Tensor:
            return evaluated(model, at.state, at.t, at.t, at.cond)

        prediction = without_trace(on_diagonal, at.state)
        if prediction.shape != at.state.shape:
            raise InputError(
                f"got shape {tuple(prediction.shape)} from the model "
                f"for latents of {tuple(at.state.shape)}, "
                "so it has no velocity of its own to be guided by; "
                "guide at sampling: FlowMap.sample(..., guidance=...)"
            )
        prediction = at_least_float32(prediction)
        return self.coefficients.diagonal_velocity(prediction, at.z, at.t)

    def residual_velocity(self, model: Model, at: PathPoint) -> Tensor:
        """Return the velocity in the known part: given, guided, or the conditional one."""
        velocity = at.velocity
        if self.velocity is not None:
            velocity = velocity_of("velocity", self.velocity, at.state, at.t, at.cond)
            velocity = at.library.detach(velocity)
        if self.guidance is None or at.dropped is None:
            return velocity

        def own(cond: Cond) -> Tensor:
            return self.own_velocity(model, with_fields(at, cond=cond))

        return self.guidance.guided(velocity, own, at.t, at.cond, at.dropped)

    def tangent_velocity(self, model: Model, at: PathPoint) -> Tensor:
        """Return the velocity along which f is differentiated: that of the known part."""
        return at.velocity

    def wrapped(self, model: Model) -> Model:
        """Return the function that is differentiated: the model itself."""
        return model

    def completed(self, out: LossOutput, model: Model, batch: Batch) -> LossOutput:
        """Return the output with what an objective adds to its loss.

        Args:
            out: what the residual gives.
            model: as `wrapped` returned it.
            batch: as the caller gave it.
        """
        return out

    def __call__(  # noqa: PLR0913  # the public door: each argument has its name
        self,
        model: Model,
        latents: Tensor,
        targets: Tensor | None = None,
        *,
        cond: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
        t: Tensor | None = None,
        s: Tensor | None = None,
        generator: Any = None,
    ) -> LossOutput:
        """Return the loss of each row and what it was made of.

        Args:
            model: any callable ``model(z_t, t, s, **cond)`` on ``(B, *)`` latents and ``(B,)``
                times.
            latents: clean latents z, of shape ``(B, *)``, a floating dtype.
            targets: what the model outputs, x, of shape ``(B, *)``; by default the latents
                themselves.
            cond: keyword arguments of the model; tensors whose first axis is B belong to the rows.
            noise: standard normal noise of the latents' shape; by default drawn.
            t: times in (0, 1], of shape ``()`` or ``(B,)``; by default drawn. Checked, which costs
                a device sync; not while JAX traces.
            s: destinations in [0, t], likewise; given if and only if t is.
            generator: the source of times and noise: a torch.Generator, or on JAX arrays a key,
                which must be given.

        Raises:
            InputError: if shapes do not fit, tensors came beside JAX arrays, or a key is missing.
            TimeError: if given times are of the wrong type, shape or range.

        Warns:
            UserWarning: once, if the first latents are not finite or far wider than the noise.
        """
        xp = one_backend(latents, targets, noise, t, s, generator)
        given = checked_cond(cond)
        batch = Batch(latents, targets, given, noise, generator, xp)
        check_model(model)
        self.check_call(checked_batch(batch))
        warn_of_scale(type(self).__name__, batch)
        at, noise = self._drawn_point(batch, t, s)
        function = self.wrapped(model)
        try:
            out = self._evaluate(function, at, latents, noise)
        except TypeError as error:
            refuse_unfit(model, at.cond, error)
            raise
        except RuntimeError as error:
            refuse_misfit(model, latents, error)
            raise
        return self.completed(out, function, batch)

    def _drawn_point(
        self, batch: Batch, t: Tensor | None, s: Tensor | None
    ) -> tuple[PathPoint, Tensor]:
        """Return a point of the conditional path for each row, and the noise that leads there."""
        latents, noise = batch.latents, batch.noise
        for_times, for_noise = None, None
        if noise is None or (t is None and s is None):
            for_times, for_noise = batch.library.split(batch.generator, 2)
        most = None
        if t is None and isinstance(self.times, PairSampler):
            most = self.times.most_off_diagonal(len(latents))
        t, s = self._pairs(batch, t, s, for_times)
        if noise is None:
            noise = draw_noise(latents, for_noise)
        z_t, velocity = self.schedule.perturb(latents, noise, t)
        at = PathPoint(
            state=z_t,
            t=t,
            s=s,
            velocity=velocity,
            data=batch.data,
            cond=batch.cond,
            library=batch.library,
            most_off_diagonal=most,
        )
        if self.guidance is None:
            return at, noise
        if at.library is not torch_backend:
            raise InputError(
                "got guidance with JAX arrays, which it does not know; "
                "write velocity= with a mixture"
            )
        cond, dropped = self.guidance.drop_condition(batch.cond, t, s, batch.generator)
        at = with_fields(at, cond=cond, dropped=dropped)
        return at, noise

    def _pairs(
        self, batch: Batch, t: Tensor | None, s: Tensor | None, generator: Any
    ) -> tuple[Tensor, Tensor]:
        """Return times and destinations: those given, checked, or drawn."""
        if t is not None and s is not None:
            return checked_times(t, s, batch.latents)
        if t is not None or s is not None:
            raise TimeError("got only one of t and s; give both, or neither to have them drawn")
        xp, latents = batch.library, batch.latents
        t, s = drawn_pairs(
            self.times,
            len(latents),
            generator=generator,
            device=xp.device(latents),
            dtype=xp.time_dtype(latents),
        )
        self._check_first_draw(t, s)
        return t, s

    def _check_first_draw(self, t: Tensor, s: Tensor) -> None:
        """Raise TimeError if drawn times are out of range; only until a draw was right, for a look
        waits for the device.
        """
        seen = vars(self)
        if torch.compiler.is_compiling() or "_drawn" in seen or not backend_of(t).has_values(t):
            return
        check_times(t, s, f" from times = {self.times!r}")
        seen["_drawn"] = True

    def _evaluate(self, model: Model, at: PathPoint, latents: Tensor, noise: Tensor) -> LossOutput:
        conditional = at.velocity
        at = with_fields(at, velocity=self.residual_velocity(model, at))
        tangent = self.tangent_velocity(model, at)
        v = at_least_float32(at.velocity)
        x = at_least_float32(at.data)
        at = with_fields(at, velocity=v, data=x)
        weights = self.coefficients.at(at.t, at.s)
        if self.gap is None:
            f, rest = self._differentiated(model, at, tangent, weights)
            return self._output(f, rest, at, weights)
        earlier = at.t - self.gap * (at.t - at.s)
        r = at.library.where(at.s < at.t, earlier, at.t)
        z_r = self.schedule.perturb(latents, noise, r)[0]
        turned = conditional - at.velocity
        z_r = z_r + over_rows(at.t - r, z_r) * turned
        z_r = at.library.cast(z_r, at.state.dtype)
        before = with_fields(at, state=z_r, t=r)
        f, rest = self._two_points(model, at, before, weights)
        return self._output(f, rest, at, weights)

    def _differentiated(
        self, model: Model, at: PathPoint, tangent: Tensor, weights: PointCoefficients
    ) -> tuple[Tensor, Tensor]:
        """Return f and what the residual is without a f: b D_t f - K.

        On the diagonal D_t f is not computed where b = 0 there.
        """

        def fn(z_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
            return model(z_t, t, s, **cond)

        xp = at.library
        primals = (at.state, at.t, at.s, at.cond)
        along_state = xp.cast(tangent, at.state.dtype)
        tangents = (along_state, xp.ones_like(at.t), None, None)
        rows: tuple[Tensor | None, int | None] = (None, None)
        if self.coefficients.anchored:
            rows = (at.s < at.t, at.most_off_diagonal)
        f, derivative = self.derivative(OnCopies(fn), primals, tangents, *rows)
        f = at_least_float32(f)
        derivative = at_least_float32(derivative)
        known = self.known_part(at)
        check_output(f, known)
        b = over_rows(weights.derivative, f)
        return f, b * derivative - known

    def _two_points(
        self, model: Model, at: PathPoint, earlier: PathPoint, weights: PointCoefficients
    ) -> tuple[Tensor, Tensor]:
        """Return f and what the residual is without a f, from f at an earlier point of the path.

        Off the diagonal R = m (f - y*) with y* = (b(r, s) f(z_r, r, s) + K(r, t))/b(t, s).
        """
        xp = at.library

        def evaluate_earlier() -> Tensor:
            return evaluated(model, earlier.state, earlier.t, earlier.s, earlier.cond)

        if xp is torch_backend:
            draws = RandomState(at.state.device)
            evaluate_earlier = draws.replay(evaluate_earlier)
        f = at_least_float32(evaluated(model, at.state, at.t, at.s, at.cond))
        f_r = at_least_float32(without_trace(evaluate_earlier, at.state))
        between = self.known_part_between(at, earlier)
        check_output(f, between)
        a, b, m = weights.over_rows(f)
        off_diagonal = over_rows(at.s < at.t, f)
        b = xp.where(off_diagonal, b, 1.0)
        b_r_times_f_r = earlier.weighted(self.coefficients.derivative, f_r)
        target = (b_r_times_f_r + between) / b
        rest = (m - a) * xp.detach(f) - m * target
        on_diagonal = -self.known_part(at)
        return f, xp.where(off_diagonal, rest, on_diagonal)

    def _output(
        self, f: Tensor, rest: Tensor, at: PathPoint, weights: PointCoefficients
    ) -> LossOutput:
        """Return the output for a prediction and what the residual is without a f."""
        xp = at.library
        a, m = over_rows(weights.prediction, f), over_rows(weights.scale, f)
        fixed = xp.detach(f)
        residual = xp.detach(a * fixed + rest)
        target = fixed - residual / m
        difference = f - target
        if self.literal:
            difference = a * f + rest
        if self.weight is not None:
            difference = over_rows(self._weights(self.weight, at), f) * difference
        return LossOutput(
            loss=self._penalised(difference),
            prediction=f,
            target=target,
            residual=residual,
            z_t=at.state,
            t=at.t,
            s=at.s,
            velocity=at.velocity,
        )

    def _weights(self, weight: Weight, at: PathPoint) -> Tensor:
        """Return the weight of each row, of shape ``(B,)`` or ``()``."""
        weights, rows = weight(at.t, at.s), len(at.t)
        if is_number(weights):
            return at.library.as_array(weights, at.t)
        if at.library.is_array(weights) and tuple(weights.shape) in ((), (rows,)):
            return weights
        raise InputError(
            f"got {kind_of(weights)} from weight = {self.weight!r} for {rows} rows; "
            f"return one number for each row, of shape ({rows},)"
        )

    def _penalised(self, difference: Tensor) -> Tensor:
        """Return the penalty of each row, of shape ``(B,)``."""
        loss, rows = self.penalty(difference), len(difference)
        if isinstance(self.penalty, Penalty):
            return loss
        came = kind_of(loss)
        if backend_of(difference).is_array(loss):
            if tuple(loss.shape) == (rows,):
                return loss
            came = f"shape {tuple(loss.shape)}"
        raise InputError(
            f"got {came} from penalty = {self.penalty!r} for {rows} rows; "
            "reduce over all axes but the first, "
            "as in lambda d: d.abs().flatten(1).mean(1)"
        )


def _default_of(each: Field[Any]) -> Any:
    """Return the default of a field, for which None stands too; None where there is none."""
    if each.default_factory is not MISSING:
        return each.default_factory()
    if each.default is not MISSING:
        return each.default
    return None
