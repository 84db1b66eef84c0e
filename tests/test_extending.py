"""One of each part, added from outside with public names alone, and a law that it obeys.

These are the programs that `flowspace/README.md` and the page "Write your own" show.
"""

import inspect
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from gaussian import Gaussian
from hypothesis import given, settings
from strategies import normal, pairs, seeds
from tolerances import DERIVED, within
from torch import Tensor

from flowspace import (
    AbstractStatistic,
    CrossFlowLoss,
    Derivative,
    ForwardMode,
    InputError,
    LinearSchedule,
    MatchedStatistic,
    MeanFlowLoss,
    Objective,
    PairSampler,
    PathPoint,
    Penalty,
    RandomSource,
    Schedule,
    SharedPrimal,
    Statistic,
    UniformTimes,
    check_criteria,
    rule,
)

ROOT = Path(__file__).parents[1]
OWN = ROOT / "docs" / "pages" / "write_your_own.md"
LONGEST = 30
"""Lines that adding a part may take."""


# --- a schedule


class SquaredSchedule(Schedule):
    """``alpha = 1 - t^2, beta = t^2``: the linear schedule, read at the square of the time."""

    def __init__(self) -> None:
        super().__init__("1 - t**2", "t**2")


def callable_schedule():
    return Schedule(alpha=lambda t: 1 - t**2, beta=lambda t: t**2)


# --- a statistic


def early_statistic(schedule: Schedule) -> Statistic:
    """``kappa = s (2 - s), delta = -t/(t - s)``; gamma follows."""
    return Statistic.from_kappa(schedule, kappa="s*(2 - s)", delta="-t/(t - s)")


# --- an objective


@dataclass(frozen=True, kw_only=True)
class MixedLoss(Objective):
    """The data by identity (II), mixed with a velocity, such as a teacher's, by identity (I)."""

    statistic: AbstractStatistic = field(default_factory=MatchedStatistic)
    share: float = 0.5

    def check_settings(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"got share = {self.share}; write a number in [0, 1]")

    def known_part(self, at: PathPoint) -> Tensor:
        c = self.coefficients
        by_data = at.weighted(c.data, at.data)
        by_velocity = at.weighted(c.state, at.z) + at.weighted(c.velocity, at.velocity)
        return self.share * by_data + (1 - self.share) * by_velocity


# --- a penalty


@dataclass(frozen=True)
class SmoothError(Penalty):
    """``sqrt(d^2 + h^2) - h``, averaged: squared below h, absolute above."""

    h: float = 0.1

    def __call__(self, difference: Tensor) -> Tensor:
        smooth = (difference**2 + self.h**2) ** 0.5 - self.h
        return smooth.reshape(len(smooth), -1).mean(1)


def absolute(difference: Tensor) -> Tensor:
    """``|d|``, averaged: a plain function is a penalty too."""
    return difference.abs().flatten(1).mean(1)


# --- times


@dataclass(frozen=True)
class ShortSteps(PairSampler):
    """t uniform, and s at most a share of t below it: what a sampler of many steps asks for."""

    share: float = 0.25

    def draw(self, rows: int, source: RandomSource) -> tuple[Tensor, Tensor]:
        first, second = source.split(2)
        t = UniformTimes().draw(rows, first)
        return t, t * (1 - self.share * second.uniform(rows))


def from_noise(rows, *, generator, device, dtype):
    """t = 1 in every row, s uniform: a plain function is a pair sampler too."""
    s = torch.rand(rows, generator=generator, device=device, dtype=dtype)
    return torch.ones_like(s), s


# --- a route to the derivative


@dataclass(frozen=True)
class ReverseMode(Derivative):
    """Exact, by two backward passes: for models whose functions have no forward derivative."""

    def evaluate(self, fn, primals, tangents, indices):
        moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

        def of_moving(*inputs):
            arguments = list(primals)
            for i, value in zip(moving, inputs, strict=True):
                arguments[i] = value
            return fn(*arguments)

        inputs = tuple(primals[i].detach() for i in moving)
        directions = tuple(tangents[i] for i in moving)
        derivative = torch.autograd.functional.jvp(of_moving, inputs, directions)[1]
        return fn(*primals), derivative.detach()


# --- a rule


@rule("matrix_exp linalg_matrix_exp")
def matrix_exp(call, x):
    """``d exp(X)`` is the upper right block of ``exp([[X, dX], [0, X]])``."""
    x.untouched(-2, -1)
    size = x.rows.shape[-1]
    top = torch.cat([x.rows, x.tangent], -1)
    bottom = torch.cat([torch.zeros_like(x.rows), x.rows], -1)
    return torch.matrix_exp(torch.cat([top, bottom], -2))[..., :size, size:]


# --- an encoder


class PrincipalParts(torch.nn.Module):
    """The first principal directions of a set of images, each of mean 0 and spread 1."""

    def __init__(self, images: Tensor, size: int) -> None:
        super().__init__()
        self.shape, flat = images.shape[1:], images.flatten(1)
        _, spread, directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
        self.register_buffer("mean", flat.mean(0))
        self.register_buffer("spread", spread[:size] / (len(images) - 1) ** 0.5)
        self.register_buffer("directions", directions[:size])

    def encode(self, images: Tensor) -> Tensor:
        return (images.flatten(1) - self.mean) @ self.directions.T / self.spread

    def decode(self, latents: Tensor) -> Tensor:
        flat = latents * self.spread @ self.directions + self.mean
        return flat.unflatten(1, self.shape)


ADDED = (
    SquaredSchedule,
    early_statistic,
    MixedLoss,
    SmoothError,
    absolute,
    ShortSteps,
    from_noise,
    ReverseMode,
    matrix_exp,
)


@pytest.mark.parametrize("part", ADDED, ids=lambda part: part.__name__)
def test_adding_a_part_takes_less_than_thirty_lines_and_the_readme_shows_them(part):
    source = inspect.getsource(part)
    assert len(source.splitlines()) < LONGEST
    assert source in (ROOT / "flowspace" / "README.md").read_text()


@pytest.mark.parametrize("part", [*ADDED, PrincipalParts], ids=lambda part: part.__name__)
def test_the_page_of_how_to_write_your_own_shows_each_part(part):
    source = inspect.getsource(part)
    assert len(source.splitlines()) < LONGEST
    assert source in OWN.read_text()


@pytest.mark.parametrize("program", [Path(__file__), ROOT / "flowspace" / "README.md", OWN])
def test_all_that_is_imported_of_flowspace_comes_from_the_top(program):
    modules = re.findall(r"^(?:from|import) (flowspace\S*)", program.read_text(), re.MULTILINE)
    assert modules == ["flowspace"]


def test_every_file_that_the_readme_names_exists():
    page = (ROOT / "flowspace" / "README.md").read_text()
    named = set(re.findall(r"\b[a-z_/]+(?:\.py\b|/(?=`| ))", page))
    assert len(named) > 25
    places = (ROOT, ROOT / "flowspace")
    assert [n for n in sorted(named) if not any((place / n).exists() for place in places)] == []


# --- their laws


close = within(DERIVED)


def model(z_t, t, s):
    """A smooth function of all three that mixes no rows."""
    return torch.tanh(z_t + t[:, None]) * (1 + s[:, None]) + z_t.flip(1)


@pytest.mark.parametrize("schedule", [SquaredSchedule(), callable_schedule()], ids=str)
@settings(max_examples=10)
@given(pairs(), seeds)
def test_a_schedule_of_another_clock_takes_the_same_path_at_another_speed(schedule, times, seed):
    t, z, noise = times[0], normal(seed, 4, 3), normal(seed + 1, 4, 3)
    z_t, velocity = schedule.perturb(z, noise, t)
    z_u, velocity_u = LinearSchedule().perturb(z, noise, t**2)
    close(z_t, z_u)
    close(velocity, 2 * t[:, None] * velocity_u)
    close(schedule.latents(velocity, z_t, t), z)


def mean_loss(objective, data, statistic, times, seed):
    """The loss of the exact f where v and x are replaced by their means given z_t."""
    t, s = times
    z, noise = normal(seed, 4, 3), normal(seed + 1, 4, 3)
    z_t, _ = data.schedule.perturb(z, noise, t)
    f = data.statistic(statistic.gamma, statistic.delta)
    loss_fn = objective(schedule=data.schedule, velocity=lambda z_t, t: data.velocity(z_t, t))
    return loss_fn(f, z, data.clean(z_t, t), noise=noise, t=t, s=s)


@settings(max_examples=5)
@given(pairs(inside=True, gap=0.1), seeds)
def test_the_exact_clean_prediction_solves_the_residual_of_a_new_schedule(times, seed):
    schedule = SquaredSchedule()
    matched = MatchedStatistic().on(schedule)
    out = mean_loss(CrossFlowLoss, Gaussian.random(schedule, seed), matched, times, seed)
    close(out.residual, torch.zeros_like(out.residual))


def test_the_statistic_gives_back_the_kappa_that_it_was_derived_from():
    s = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    c = early_statistic(LinearSchedule()).coefficients(LinearSchedule())
    for t in (s + 0.05, torch.ones_like(s)):
        close(c.scaled_kappa(t, s), s * (2 - s))
    report = check_criteria(LinearSchedule(), early_statistic(LinearSchedule()))
    assert report.criterion1 and report.criterion2 and report.anchored


@settings(max_examples=5)
@given(pairs(inside=True, gap=0.1), seeds)
def test_the_exact_f_of_the_statistic_has_no_residual_and_another_has(times, seed):
    statistic, data = early_statistic(LinearSchedule()), Gaussian.random(LinearSchedule(), seed)

    def loss_fn(**settings):
        return CrossFlowLoss(statistic=statistic, **settings)

    out = mean_loss(loss_fn, data, statistic, times, seed)
    close(out.residual, torch.zeros_like(out.residual))
    times = (times[0], times[0] / 2)
    other = mean_loss(loss_fn, data, MatchedStatistic().on(data.schedule), times, seed)
    assert other.residual.abs().max() > 1e-3


@settings(max_examples=5)
@given(pairs(inside=True, gap=0.1), seeds)
def test_the_objective_is_solved_by_the_exact_f_whatever_its_share(times, seed):
    data = Gaussian.random(LinearSchedule(), seed)
    matched = MatchedStatistic().on(data.schedule)
    for share in (0.0, 0.3, 1.0):
        out = mean_loss(
            lambda share=share, **kw: MixedLoss(share=share, **kw), data, matched, times, seed
        )
        close(out.residual, torch.zeros_like(out.residual))


def teacher(z_t, t):
    return torch.sin(z_t) * t[:, None]


@pytest.mark.parametrize(
    ("share", "identity"), [(1.0, CrossFlowLoss), (0.0, MeanFlowLoss)], ids=["(II)", "(I)"]
)
def test_the_objective_is_one_identity_alone_at_either_end_of_its_share(share, identity):
    z, noise, (t, s) = normal(0, 4, 3), normal(1, 4, 3), fixed_times()
    matched = MatchedStatistic()
    wanted = identity(statistic=matched, velocity=teacher)(model, z, noise=noise, t=t, s=s)
    there = MixedLoss(share=share, velocity=teacher)(model, z, noise=noise, t=t, s=s)
    close(there.residual, wanted.residual)
    between = MixedLoss(velocity=teacher)(model, z, noise=noise, t=t, s=s)
    assert (between.residual - wanted.residual).abs().max() > 1e-3


def test_on_one_path_with_its_own_velocity_the_share_makes_no_difference():
    z, noise, (t, s) = normal(0, 4, 3), normal(1, 4, 3), fixed_times()
    wanted = MixedLoss(share=0.0)(model, z, noise=noise, t=t, s=s)
    close(MixedLoss(share=0.7)(model, z, noise=noise, t=t, s=s).residual, wanted.residual)


def test_the_objective_refuses_a_share_that_is_none_and_samples_by_its_statistic():
    with pytest.raises(InputError, match="got share = 2"):
        MixedLoss(share=2, check=False)
    noise = normal(0, 4, 3)
    sample = MixedLoss().flow_map(model).sample(noise, steps=2)
    close(sample, CrossFlowLoss().flow_map(model).sample(noise, steps=2))


def fixed_times():
    t = torch.tensor([0.9, 0.7, 0.5, 0.4], dtype=torch.float64)
    return t, t * torch.tensor([0.0, 0.5, 0.9, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "penalty", [SmoothError(), SmoothError(h=10.0), absolute], ids=["h 1", "h 10", "absolute"]
)
def test_the_loss_is_the_penalty_of_prediction_less_target_row_by_row(penalty):
    z, noise, (t, s) = normal(0, 4, 3), normal(1, 4, 3), fixed_times()
    out = CrossFlowLoss(penalty=penalty)(model, z, noise=noise, t=t, s=s)
    close(out.loss, penalty(out.prediction - out.target))
    for row in range(4):
        close(out.loss[row : row + 1], penalty((out.prediction - out.target)[row : row + 1]))


@settings(max_examples=20)
@given(seeds)
def test_the_smooth_penalty_lies_below_both_of_its_limits_and_meets_them(seed):
    d = normal(seed, 4, 3, 2)
    size, square = absolute(d), (d**2).flatten(1).mean(1)
    for h in (0.01, 0.1, 1.0):
        assert (SmoothError(h)(d) <= torch.minimum(size, square / (2 * h)) + 1e-12).all()
    close(SmoothError(1e-9)(d), size, 1e-6)
    close(2e3 * SmoothError(1e3)(d), square, 1e-4)


@pytest.mark.parametrize(
    ("times", "longest"),
    [(ShortSteps(), 0.25), (ShortSteps(0.5), 0.5), (from_noise, 1.0)],
    ids=["a quarter", "a half", "from noise"],
)
def test_pairs_obey_their_order_and_their_span_and_come_from_the_generator(times, longest):
    z = normal(0, 512, 3)

    def drawn(seed):
        draw = torch.Generator().manual_seed(seed)
        return CrossFlowLoss(times=times)(model, z, generator=draw)

    out, again, other = drawn(0), drawn(0), drawn(1)
    assert ((out.s >= 0) & (out.s <= out.t) & (out.t > 0) & (out.t <= 1)).all()
    share = (out.t - out.s) / out.t
    assert share.max() <= longest
    assert (share.mean() - longest / 2).abs() < 5 * longest / math.sqrt(12 * 512)
    close(out.s, again.s, 0)
    assert (out.s != other.s).any()


def test_the_pair_sampler_draws_arrays_from_a_key():
    jax = pytest.importorskip("jax")
    t, s = ShortSteps()(64, generator=jax.random.key(0))
    assert isinstance(s, jax.Array) and bool(((0.75 * t <= s) & (s <= t)).all())


def test_the_route_agrees_with_the_others_in_the_loss_and_in_its_gradient():
    z, noise, (t, s) = normal(0, 4, 3), normal(1, 4, 3), fixed_times()
    found = []
    for route in (SharedPrimal(), ReverseMode()):
        weight = torch.eye(3, dtype=torch.float64, requires_grad=True)
        loss_fn = CrossFlowLoss(derivative=route)
        out = loss_fn(lambda z, t, s, w=weight: model(z @ w, t, s), z, noise=noise, t=t, s=s)
        out.loss.sum().backward()
        found.append((out.loss, out.residual, weight.grad))
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs)


def rotated(z, t):
    """z turned by an angle that depends on time and on z."""
    turn = torch.zeros(len(z), 2, 2, dtype=z.dtype)
    angle = t[:, None, None] * (1 + z[:, :1, None] ** 2)
    return (
        torch.matrix_exp(angle * (turn + torch.tensor([[0.0, -1.0], [1.0, 0.3]]))) @ z[:, :, None]
    ).squeeze(2)


@pytest.mark.parametrize("asked", [[0, 1, 2, 3], [1, 3], [2]], ids=str)
def test_the_rule_is_the_derivative_that_torch_has_on_the_rows_asked_for_alone(asked):
    seen = []

    @rule("matrix_exp")
    def counted(call, x):
        seen.append(len(x.tangent))
        return matrix_exp(call, x)

    try:
        t, rows = fixed_times()[0], torch.zeros(4, dtype=torch.bool)
        rows[asked] = True
        given = (normal(0, 4, 2), t), (normal(1, 4, 2), torch.ones_like(t))
        value, derivative = SharedPrimal()(rotated, *given, rows=rows)
        wanted = ForwardMode()(rotated, *given)
    finally:
        rule("matrix_exp")(matrix_exp)
    close(value, wanted[0])
    close(derivative, torch.where(rows[:, None], wanted[1], 0.0))
    assert seen == [len(asked)]


def encoded(size=3):
    images = normal(0, 32, 2, 2, 2) + normal(1, 2, 2, 2)
    return images, PrincipalParts(images, size)


def test_latents_have_mean_zero_and_spread_one_and_decoding_is_a_projection():
    images, encoder = encoded()
    latents = encoder.encode(images)
    close(latents.mean(0), torch.zeros(3, dtype=torch.float64))
    close(latents.T.cov(), torch.eye(3, dtype=torch.float64))
    close(encoder.encode(encoder.decode(latents)), latents)
    lost = images - encoder.decode(latents)
    close(encoder.encode(lost + encoder.decode(0 * latents)), 0 * latents)
    assert lost.abs().max() > 0.1
    whole = PrincipalParts(images, 8)
    close(whole.decode(whole.encode(images)), images)


def test_several_steps_through_an_affine_encoder_are_the_exact_flow_map():
    _, encoder = encoded()
    data = Gaussian.random(LinearSchedule(), 0)
    clean = data.matched()

    def images(z_t, t, s):
        return encoder.decode(clean(z_t, t, s))

    noise, one = normal(2, 4, 3), torch.ones(4, dtype=torch.float64)
    wanted = encoder.decode(data.transported(noise, one, 0 * one))
    flow_map = CrossFlowLoss().flow_map(images)
    for steps in (1, 3):
        sample = flow_map.sample(noise, steps=steps, encode=encoder.encode, renoise=False)
        close(sample, wanted)
