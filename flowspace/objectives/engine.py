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
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowspace.arrays import Model, at_least_float32, checked_times, draw_noise, over_rows
from flowspace.backends import backend_of, one_backend, torch_backend
from flowspace.derivatives import Derivative, SharedPrimal
from flowspace.derivatives.replay import Draws, on_copies, unseen
from flowspace.derivatives.route import checked
from flowspace.errors import InputError, TimeError
from flowspace.guidance import Guidance
from flowspace.penalties import Penalty, SquaredError
from flowspace.schedules import LinearSchedule, Schedule
from flowspace.statistics import Coefficients, Statistic
from flowspace.times import PairSampler, TimePairs

__all__ = ["LossOutput", "Model", "Objective"]


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


@dataclass(frozen=True, kw_only=True)
class Objective(abc.ABC):
    """An objective: a frozen object, called with a model and a batch.

    Args:
        schedule: alpha and beta; `LinearSchedule()` by default.
        statistic: what the model outputs; each objective has its own default.
        times: how (t, s) are drawn; `TimePairs()`, uniform with half of the rows on s = t, where
            an objective has no other.
        penalty: from a difference to a number per row; `SquaredError()` by default.
        weight: a function of (t, s), each of shape ``(B,)``, that multiplies the difference before
            the penalty.
        derivative: the route to D_t f; `SharedPrimal()` by default.
        literal: the paper's stop-gradient: penalty(w R), with gradient through a f alone.
        check: refuse a statistic that the objective cannot use; False trains it all the same.
        velocity: a callable ``(z_t, t, **cond)`` that replaces the conditional velocity, for
            distillation and estimates.
        guidance: classifier-free guidance of the target, and the share of rows that lose their
            condition; in one space.
        gap: None for the derivative; a share g in (0, 1] for the two-point form with r = t - g (t
            - s).

    Raises:
        InputError: if an argument is of the wrong kind.
        CriterionError: if check is on and the statistic fails.
    """

    schedule: Schedule = field(default_factory=LinearSchedule)
    statistic: Statistic | None = None
    times: PairSampler | None = None
    penalty: Penalty | None = None
    weight: Callable[[Tensor, Tensor], Tensor] | None = None
    derivative: Derivative | None = None
    literal: bool = False
    check: bool = True
    velocity: Callable[..., Tensor] | None = None
    guidance: Guidance | None = None
    gap: float | None = None
    coefficients: Coefficients = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        defaults = {
            "statistic": self.default_statistic,
            "times": self.default_times,
            "penalty": SquaredError,
            "derivative": SharedPrimal,
            "schedule": LinearSchedule,
        }
        for name, make in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, make())
        self._check_kinds()
        if self.check:
            self.check_statistic()
        object.__setattr__(self, "coefficients", self.statistic.coefficients(self.schedule))  # type: ignore[union-attr]

    def _check_kinds(self) -> None:
        kinds = {
            "schedule": Schedule,
            "statistic": Statistic,
            "times": PairSampler,
            "penalty": Penalty,
            "derivative": Derivative,
        }
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind):
                raise InputError(f"{name} = {value!r} came; {_EXAMPLES[name]}")
        for name in ("weight", "velocity"):
            if (value := getattr(self, name)) is not None and not callable(value):
                raise InputError(f"{name} = {value!r} came; {_EXAMPLES[name]}")
        if self.guidance is not None and not isinstance(self.guidance, Guidance):
            raise InputError(f"guidance = {self.guidance!r} came; {_EXAMPLES['guidance']}")
        if self.gap is not None and not 0 < self.gap <= 1:
            raise InputError(f"gap = {self.gap} came; {_EXAMPLES['gap']}")
        if self.gap is not None and self.literal:
            raise InputError(
                "gap came with literal=True; the two-point form has a target only: write "
                "literal=False"
            )

    @abc.abstractmethod
    def default_statistic(self) -> Statistic:
        """Return the statistic of the objective."""

    def default_times(self) -> PairSampler:
        """Return how (t, s) are drawn where the caller does not say."""
        return TimePairs()

    def check_statistic(self) -> None:  # noqa: B027  # most objectives take any statistic
        """Refuse a statistic that the objective cannot use."""

    @abc.abstractmethod
    def known(self, x: Tensor, z_t: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the known part K of the residual, of the prediction's shape."""

    @abc.abstractmethod
    def known_between(
        self, x: Tensor, z_t: Tensor, z_r: Tensor, t: Tensor, r: Tensor, s: Tensor
    ) -> Tensor:
        """Return the integral of the known part from r to t along one path, of the prediction's
        shape.
        """

    @cached_property
    def outputs(self) -> Statistic:
        """What the model returns, as `FlowMap` takes it; another than ``statistic`` where the
        model returns images.
        """
        return self.statistic  # type: ignore[return-value]

    def own_velocity(self, model: Model, z_t: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        """Return the velocity that the model itself predicts, from its value on the diagonal,
        without gradient.
        """
        prediction = unseen(lambda: evaluated(model, z_t, t, t, cond), z_t)
        if prediction.shape != z_t.shape:
            raise InputError(
                f"the model returns shape {tuple(prediction.shape)} for latents of "
                f"{tuple(z_t.shape)}, so it has no velocity of "
                "its own to be guided by; guide at sampling: FlowMap.sample(..., guidance=...)"
            )
        return self.coefficients.diagonal_velocity(
            at_least_float32(prediction), at_least_float32(z_t), t
        )

    def velocities(
        self,
        model: Model,
        z_t: Tensor,
        v: Tensor,
        t: Tensor,
        s: Tensor,
        cond: dict[str, Any],
        dropped: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the velocity along which f is differentiated, and the one in the known part:
        given, guided, or v itself.
        """
        if self.velocity is not None:
            v = backend_of(z_t).detach(self.velocity(z_t, t, **cond))
            if v.shape != z_t.shape:
                raise InputError(
                    f"velocity returned shape {tuple(v.shape)} for states of shape "
                    f"{tuple(z_t.shape)}"
                )
        if self.guidance is not None and dropped is not None:
            v = self.guidance.guided(
                v, lambda seen: self.own_velocity(model, z_t, t, seen), t, cond, dropped
            )
        return v, v

    def __call__(
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
        """
        cond = checked_cond(cond)
        x = latents if targets is None else targets
        xp = one_backend(latents, x, noise, t, s, generator)
        check_batch(latents, x)
        check_model(model)
        check_sources(latents, noise, generator)
        draws = (
            xp.split(generator, 2) if noise is None or (t is None and s is None) else (None, None)
        )
        t, s = self._pair(latents, t, s, draws[0])
        noise = draw_noise(latents, draws[1]) if noise is None else noise
        z_t, conditional = self.schedule.perturb(latents, noise, t)
        dropped = None
        if self.guidance is not None:
            if xp is not torch_backend:
                raise InputError(
                    "guidance came with JAX arrays, which it does not know; write velocity= with "
                    "a mixture"
                )
            cond, dropped = self.guidance.begin(cond, t, s, generator)
        try:
            tangent, v = self.velocities(model, z_t, conditional, t, s, cond, dropped)
            x, v = at_least_float32(x), at_least_float32(v)
            if self.gap is not None:
                r = xp.where(s < t, t - self.gap * (t - s), t)
                z_r = self.schedule.perturb(latents, noise, r)[0] + over_rows(t - r, v) * (
                    conditional - v
                )
                f, rest = self._two_points(
                    model, x, z_t, xp.cast(z_r, z_t.dtype), v, (t, r, s), cond
                )
            else:
                f, rest = self._differentiated(model, x, z_t, v, tangent, t, s, cond)
            return self._output(f, rest, z_t, v, t, s)
        except TypeError as error:
            refuse_unfit(model, cond, error)
            raise

    def _differentiated(
        self,
        model: Model,
        x: Tensor,
        z_t: Tensor,
        v: Tensor,
        tangent: Tensor,
        t: Tensor,
        s: Tensor,
        cond: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Return f and what the residual is without a f: b D_t f - K."""
        f, df = (
            at_least_float32(tensor) for tensor in self._derive(model, z_t, tangent, t, s, cond)
        )
        known = self.known(x, at_least_float32(z_t), v, t, s)
        _check_shape(f, known)
        return f, over_rows(self.coefficients.derivative(t, s), f) * df - known

    def _two_points(
        self,
        model: Model,
        x: Tensor,
        z_t: Tensor,
        z_r: Tensor,
        v: Tensor,
        times: tuple[Tensor, Tensor, Tensor],
        cond: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Return f and what the residual is without a f in the two-point form, where R = m (f -
        y*) off the diagonal.
        """
        t, r, s = times
        c, xp = self.coefficients, backend_of(z_t)
        again = Draws(z_t.device).replay if xp is torch_backend else lambda function: function
        f = at_least_float32(evaluated(model, z_t, t, s, cond))
        earlier = at_least_float32(unseen(again(lambda: evaluated(model, z_r, r, s, cond)), z_t))
        between = self.known_between(x, at_least_float32(z_t), at_least_float32(z_r), t, r, s)
        _check_shape(f, between)
        a, b, before, m = (
            over_rows(part, f)
            for part in (c.prediction(t, s), c.derivative(t, s), c.derivative(r, s), c.scale(t, s))
        )
        apart = over_rows(s < t, f)
        target = (before * earlier + between) / xp.where(apart, b, 1.0)
        return f, xp.where(
            apart,
            (m - a) * xp.detach(f) - m * target,
            -self.known(x, at_least_float32(z_t), v, t, s),
        )

    def _output(
        self, f: Tensor, rest: Tensor, z_t: Tensor, v: Tensor, t: Tensor, s: Tensor
    ) -> LossOutput:
        c, xp = self.coefficients, backend_of(f)
        a, m = (over_rows(value(t, s), f) for value in (c.prediction, c.scale))
        residual = xp.detach(a * xp.detach(f) + rest)
        target = xp.detach(f) - residual / m
        difference = a * f + rest if self.literal else f - target
        if self.weight is not None:
            difference = over_rows(xp.as_array(self.weight(t, s), f), f) * difference
        return LossOutput(self.penalty(difference), f, target, residual, z_t, t, s, v)  # type: ignore[misc]

    def _derive(
        self, model: Model, z_t: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return f with gradient and D_t f along (v, 1, 0), not computed on the diagonal where b =
        0 there.
        """

        def fn(z_: Tensor, t_: Tensor, s_: Tensor, cond_: dict[str, Any]) -> Tensor:
            return model(z_, t_, s_, **cond_)

        xp = backend_of(z_t)
        tangents = (xp.cast(v, z_t.dtype), xp.ones_like(t), None, None)
        rows = s < t if self.coefficients.anchored else None
        return self.derivative(on_copies(fn), (z_t, t, s, cond), tangents, rows=rows)  # type: ignore[misc]

    def _pair(
        self, latents: Tensor, t: Tensor | None, s: Tensor | None, generator: Any
    ) -> tuple[Tensor, Tensor]:
        if t is None and s is None:
            xp = backend_of(latents)
            where = {"device": xp.device(latents), "dtype": xp.time_dtype(latents)}
            return self.times(len(latents), generator=generator, **where)  # type: ignore[misc]
        if t is None or s is None:
            raise TimeError("only one of t and s came; give both, or neither to have them drawn")
        return checked_times(t, s, latents)


_EXAMPLES = {
    "schedule": "write for example LinearSchedule() or Schedule(alpha='1 - t', beta='t')",
    "statistic": "write for example MatchedStatistic() or Statistic(gamma='1', delta='-t/(t - "
    "s)')",
    "times": "it draws pairs (t, s), so write for example TimePairs(UniformTimes(), equal=0.5)",
    "penalty": "write for example SquaredError() or AbsoluteError()",
    "weight": "it is a function of (t, s), so write for example lambda t, s: 1 / t",
    "velocity": "it is a function (z_t, t, **cond) that returns a tensor like z_t",
    "guidance": "write for example Guidance(null={'labels': 1000}, omega=2.0)",
    "gap": "it is the share of t - s that the second point lies earlier, so write for example "
    "0.1, or None for the derivative",
    "derivative": "a route is an object, so write for example SharedPrimal() or "
    "FiniteDifference()",
}


def evaluated(model: Model, z_t: Tensor, t: Tensor, s: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """Return what a model gives at states and times, which it may write into: it gets copies."""
    return checked(on_copies(lambda *inputs: model(*inputs, **cond))(z_t, t, s), (z_t,))


def signature_of(model: Any) -> inspect.Signature:
    """Return the arguments of a model: those of `forward` where it is a torch module."""
    while isinstance(inner := getattr(model, "module", None), torch.nn.Module):
        model = inner
    return inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model)


def refuse_unfit(model: Any, cond: Mapping[str, Any], error: TypeError) -> None:
    """Raise InputError if a model cannot be called as it is called."""
    try:
        signature = signature_of(model)
    except (TypeError, ValueError):  # callables that do not tell their arguments
        return
    try:
        signature.bind(None, None, None, **cond)
    except TypeError as unfit:
        named = "".join(f", {name}=..." for name in cond)
        raise InputError(
            f"got a model with the arguments {signature}, which cannot be called as "
            f"model(z_t, t, s{named}): {unfit}; write it as def model(z_t, t, s, **cond), where "
            "cond "
            "has other names than z_t, t and s"
        ) from error


def checked_cond(cond: Any) -> dict[str, Any]:
    """Return cond as a dict, or raise InputError unless it names the model's arguments."""
    if cond is not None and not isinstance(cond, Mapping):
        raise InputError(
            f"cond is {type(cond).__name__}; write a dict of the model's arguments, as in "
            f"{{'labels': y}}"
        )
    return dict(cond or {})


def check_model(model: Any) -> None:
    """Raise InputError for what cannot be called."""
    if not callable(model):
        raise InputError(
            f"got model = {model!r}, which cannot be called; write a function (z_t, t, s, **cond)"
        )


def check_sources(latents: Tensor, noise: Any, generator: Any) -> None:
    """Raise InputError for noise that is not of real numbers, and for a generator that is none."""
    xp = backend_of(latents)
    if noise is not None and not (xp.is_array(noise) and xp.is_floating(noise)):
        came = f"dtype {noise.dtype}" if xp.is_array(noise) else type(noise).__name__
        raise InputError(
            f"got noise of {came}; write real numbers of the latents' shape, or leave it out"
        )
    is_source = generator is None or isinstance(generator, torch.Generator)
    if xp is torch_backend and not is_source:
        raise InputError(
            f"got generator = {generator!r}; write torch.Generator().manual_seed(0), or leave it "
            "out"
        )


def _check_shape(f: Tensor, known: Tensor) -> None:
    if f.shape != known.shape:
        raise InputError(
            f"the model returned shape {tuple(f.shape)}, but the targets have {tuple(known.shape)}"
        )


def check_batch(latents: Tensor, targets: Tensor) -> None:
    """Raise InputError unless latents and targets are real numbers, as many rows of each."""
    xp = backend_of(latents, targets)
    for name, tensor in (("latents", latents), ("targets", targets)):
        is_array = xp.is_array(tensor)
        if not is_array or not xp.is_floating(tensor) or tensor.ndim < 1:
            came = (
                f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                if is_array
                else type(tensor).__name__
            )
            raise InputError(
                f"{name}: {came} came; a tensor of real numbers of shape (B, *) is needed"
            )
        if 0 in tensor.shape:
            raise InputError(
                f"got {name} of shape {tuple(tensor.shape)}, which hold no number; write at least "
                "one row of one number"
            )
    if len(latents) != len(targets):
        raise InputError(
            f"{len(latents)} latents and {len(targets)} targets came; each row needs its pair"
        )
