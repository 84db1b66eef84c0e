"""What a user meets at the door of every objective: functions in place of objects, the sampler
that belongs to it, the papers' numbers, and what is said once.
"""

import dataclasses
import inspect
import math
import warnings

import pytest
import torch
from gaussian import Gaussian, column
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal, pairs, seeds

import flowspace
from flowspace import (
    AlphaFlowLoss,
    ConsistencyLoss,
    CosineSchedule,
    CriterionError,
    CrossFlowLoss,
    FlowMap,
    FlowspaceError,
    HuberError,
    ImprovedMeanFlowLoss,
    InputError,
    KarrasTimes,
    LinearSchedule,
    MatchedStatistic,
    MeanFlowDistillationLoss,
    MeanFlowLoss,
    MeanFlowStatistic,
    Objective,
    PathPoint,
    PixelMeanFlowLoss,
    Schedule,
    ShiftedTimes,
    SquaredError,
    Statistic,
    TimeError,
    TimePairs,
    TrajectoryMatchingLoss,
    UniformTimes,
    inputs,
)
from flowspace.time_functions import TimeFunction

OBJECTIVES = [
    CrossFlowLoss(),
    MeanFlowLoss(),
    ImprovedMeanFlowLoss(),
    PixelMeanFlowLoss(),
    ConsistencyLoss(),
    AlphaFlowLoss(gap=0.3),
    MeanFlowDistillationLoss(teacher=lambda z, t: -z),
    flowspace.FlowMatchingLoss(),
]
each_objective = pytest.mark.parametrize(
    "loss_fn", OBJECTIVES, ids=lambda loss_fn: type(loss_fn).__name__
)


def model(z, t, s):
    return torch.tanh(z) * column(1 + t * s) + column(t - s)


def call(loss_fn, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return loss_fn(model, normal(seed, 8, 3), generator=generator, **options)


# --- functions in place of objects


@each_objective
@given(seed=seeds)
@settings(max_examples=5)
def test_a_penalty_may_be_a_function(loss_fn, seed):
    with_object = type(loss_fn)(**own(loss_fn), penalty=HuberError(0.3))
    with_function = type(loss_fn)(**own(loss_fn), penalty=lambda d: HuberError(0.3)(d))
    torch.testing.assert_close(call(with_object, seed).loss, call(with_function, seed).loss)


@each_objective
@given(seed=seeds)
@settings(max_examples=5)
def test_times_may_be_a_function(loss_fn, seed):
    def times(rows, *, generator, device, dtype):
        return TimePairs(equal=0.25)(rows, generator=generator, device=device, dtype=dtype)

    with_object = type(loss_fn)(**own(loss_fn), times=TimePairs(equal=0.25))
    with_function = type(loss_fn)(**own(loss_fn), times=times)
    torch.testing.assert_close(call(with_object, seed).loss, call(with_function, seed).loss)


def own(loss_fn):
    """The settings without which an objective is another one."""
    names = ("teacher", "gap")
    return {name: getattr(loss_fn, name) for name in names if getattr(loss_fn, name, None)}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"penalty": lambda difference: difference}, "got shape .* from penalty"),
        ({"penalty": lambda difference: difference.abs().mean()}, "got shape .* from penalty"),
        ({"penalty": SquaredError}, "got penalty"),
        ({"penalty": torch.nn.MSELoss()}, "got penalty"),
        ({"times": TimePairs}, "got times"),
        ({"times": lambda rows: rows}, "got times"),
        ({"times": lambda rows, **_: (torch.ones(2), torch.ones(2))}, "got times of shapes"),
        ({"weight": lambda t: t}, "got weight"),
    ],
)
def test_functions_that_do_not_fit_are_refused(options, named):
    with pytest.raises((InputError, TimeError), match=named):
        call(CrossFlowLoss(**options))


# --- the door itself


def test_every_objective_shows_what_it_is_called_with():
    names = {"cond", "noise", "t", "s", "generator"}
    for loss_fn in [*OBJECTIVES, TrajectoryMatchingLoss(teacher=lambda z, t: z)]:
        signature = inspect.signature(type(loss_fn).__call__)
        assert names <= set(signature.parameters), type(loss_fn)
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, type(loss_fn)


def test_formulas_are_compiled_when_an_objective_is_made_and_not_in_a_step(monkeypatch):
    """A step may be one that torch.compile captures, and sympy is not to be captured with it."""
    schedule = flowspace.Schedule("1 - t**3", "t**3")
    made = [dataclasses.replace(loss_fn, schedule=schedule) for loss_fn in OBJECTIVES]

    def refuse(*_):
        raise AssertionError("a formula is compiled in a step")

    monkeypatch.setattr(flowspace.time_functions, "_lambdify", refuse)
    for loss_fn in made:
        call(loss_fn)


def test_an_own_objective_needs_a_known_part_and_nothing_else():
    class Reconstruction(Objective):
        """R = f - x: a residual that knows x."""

        statistic: flowspace.Statistic = flowspace.MatchedStatistic()

        def known_part(self, at: PathPoint) -> torch.Tensor:
            return at.weighted(self.coefficients.data, at.data)

    ours, theirs = Reconstruction(statistic=flowspace.MatchedStatistic()), CrossFlowLoss()
    t, s = torch.rand(8, dtype=torch.float64) + 0.01, torch.zeros(8, dtype=torch.float64)
    t = t.clamp(max=1)
    torch.testing.assert_close(call(ours, t=t, s=s).loss, call(theirs, t=t, s=s).loss)
    with pytest.raises(InputError, match="got gap for Reconstruction"):
        Reconstruction(statistic=flowspace.MatchedStatistic(), gap=0.5)


# --- the sampler that belongs to an objective


@given(times=pairs(rows=6), schedule=st.sampled_from([LinearSchedule(), CosineSchedule()]))
@settings(max_examples=15)
def test_the_flow_map_of_an_objective_steps_exactly_where_its_model_is_exact(times, schedule):
    data = Gaussian.random(schedule, seed=0)
    t, s = times
    z_t = data.sample_state(t, seed=1)
    exact = {
        CrossFlowLoss(schedule=schedule): data.matched(),
        MeanFlowLoss(schedule=schedule): data.average_velocity(),
        ConsistencyLoss(schedule=schedule): data.transported,
    }
    for loss_fn, model in exact.items():
        flow_map = loss_fn.flow_map(model)
        assert flow_map == FlowMap(model, schedule, loss_fn.statistic)
        torch.testing.assert_close(
            flow_map.step(z_t, t, s), data.transported(z_t, t, s), rtol=1e-6, atol=1e-7
        )


def test_a_network_of_images_is_sampled_as_what_it_returns():
    loss_fn = PixelMeanFlowLoss()
    flow_map = loss_fn.flow_map(lambda z, t, s: 0 * z + 3)
    torch.testing.assert_close(flow_map.sample(torch.randn(4, 2)), torch.full((4, 2), 3.0))


def test_a_flow_map_of_a_velocity_that_ends_in_another_space_names_the_objectives_sampler():
    wrong = FlowMap(lambda z, t, s: z.repeat(1, 2), LinearSchedule(), MeanFlowStatistic())
    with pytest.raises(InputError, match=r"loss_fn\.flow_map\(model\)"):
        wrong.sample(torch.randn(4, 2))


# --- the papers' numbers


@pytest.mark.parametrize("dim", [4096, 32 * 16 * 16])
def test_published_crossflow_is_the_papers(dim):
    loss_fn = CrossFlowLoss.published(dim)
    assert loss_fn.literal and loss_fn.penalty == SquaredError()
    assert loss_fn.times == TimePairs(ShiftedTimes(dim, UniformTimes()), 0.5, mask_first=True)
    assert loss_fn.times.times.shift == math.sqrt(dim / 4096)
    rows = 4001
    t, s = loss_fn.times(rows, generator=torch.Generator().manual_seed(0))
    assert abs(int((t == s).sum()) - rows / 2) <= 1
    # One draw on the diagonal: there t is a plain shifted draw, no larger of two.
    plain = ShiftedTimes(dim)(rows, generator=torch.Generator().manual_seed(1))
    assert abs(float(t[t == s].median() - plain.median())) < 0.03
    assert CrossFlowLoss.published(dim, literal=False).literal is False


def test_published_consistency_is_the_papers():
    loss_fn = ConsistencyLoss.published(boundary=2.0)
    assert loss_fn.penalty == SquaredError(summed=True) and loss_fn.boundary == 2.0
    t, s = loss_fn.times(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert not s.any()
    # By the grid of the paper half of the levels are below its middle.
    middle = ((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7
    assert abs(float(((t / (1 - t)) < middle).double().mean()) - 0.5) < 0.03


@given(
    lowest=st.floats(0.02, 1),
    span=st.floats(1.5, 50),
    rho=st.floats(0.5, 9),
    seed=seeds,
)
@settings(max_examples=25)
def test_karras_times_lie_between_their_levels(lowest, span, rho, seed):
    times = KarrasTimes(lowest, lowest * span, rho)
    t = times(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    level = t / (1 - t)
    assert ((level >= lowest * (1 - 1e-9)) & (level <= lowest * span * (1 + 1e-9))).all()


# --- settings are always checked


@pytest.mark.parametrize(
    "make",
    [
        lambda check: AlphaFlowLoss(bound=-4.0, check=check),
        lambda check: PixelMeanFlowLoss(floor=-1, check=check),
        lambda check: MeanFlowDistillationLoss(teacher=None, mix=7, check=check),
        lambda check: MeanFlowDistillationLoss(teacher=torch.sin, mix=math.nan, check=check),
        lambda check: TrajectoryMatchingLoss(teacher=torch.sin, steps=-3, check=check),
        lambda check: ConsistencyLoss(boundary=-1, check=check),
        lambda check: CrossFlowLoss(gap="a half", check=check),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_check_is_of_the_statistic_alone(make, check):
    with pytest.raises(FlowspaceError, match="got"):
        make(check)


def test_without_the_check_a_statistic_that_fails_is_trained():
    fails = Statistic("t", "-t/(t - s)")
    with pytest.raises(CriterionError):
        CrossFlowLoss(statistic=fails)
    CrossFlowLoss(statistic=fails, check=False)


# --- what is said once


@pytest.fixture
def said(monkeypatch):
    """Nothing was said in this process yet."""
    monkeypatch.setattr(inputs, "_seen", set())


def texts(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in caught]


def test_targets_that_are_ignored_are_said_once(said):
    latents, images = torch.randn(4, 3), torch.randn(4, 7)
    many = [images, images, images.flip(0), images[:, :5]]
    calls = texts(lambda: [MeanFlowLoss()(model, latents, targets) for targets in many])
    assert len(calls) == 1 and "MeanFlowLoss ignores the targets" in calls[0]
    for loss_fn in (AlphaFlowLoss(gap=0.5), ImprovedMeanFlowLoss(), flowspace.FlowMatchingLoss()):
        name = type(loss_fn).__name__
        calls = texts(lambda called=loss_fn: called(model, latents, images))
        assert len(calls) == 1 and f"{name} ignores the targets" in calls[0]


def test_other_targets_of_the_same_shape_are_said_and_the_latents_are_not(said):
    latents = torch.randn(4, 3)
    assert not texts(lambda: MeanFlowLoss()(model, latents, latents))
    assert not texts(lambda: ImprovedMeanFlowLoss()(model, latents, latents.clone()))
    others = latents + torch.tensor([0.0, 1.0, 0.0])
    assert len(texts(lambda: MeanFlowLoss()(model, latents, others))) == 1
    assert not texts(lambda: CrossFlowLoss()(model, latents, latents + 1))


@pytest.mark.parametrize(
    ("latents", "said_of"),
    [
        (torch.full((4, 3), math.nan), "not all finite"),
        (torch.tensor([[1.0, math.inf]]), "not all finite"),
        (1e4 * torch.randn(64, 3), "a spread of"),
    ],
)
def test_latents_that_are_no_latents_are_said_once(said, latents, said_of):
    found = texts(lambda: [CrossFlowLoss()(model, latents) for _ in range(3)])
    assert len(found) == 1 and said_of in found[0]


def test_latents_like_the_noise_are_not_spoken_of(said):
    assert not texts(lambda: CrossFlowLoss()(model, 5 * torch.randn(64, 3)))


def test_alpha_flow_without_a_gap_says_that_it_is_mean_flow(said):
    latents = torch.randn(4, 3)
    assert not texts(lambda: AlphaFlowLoss(gap=0.5)(model, latents))
    found = texts(lambda: [AlphaFlowLoss()(model, latents) for _ in range(2)])
    assert len(found) == 1 and "trains MeanFlow" in found[0]


# --- what is equal


@pytest.mark.parametrize(
    ("make", "like", "others"),
    [
        (LinearSchedule, lambda: Schedule("1 - t", "t"), [CosineSchedule(), "1 - t", None]),
        (MeanFlowStatistic, lambda: Statistic(0, "1/(t - s)"), [MatchedStatistic(), 0]),
        (MatchedStatistic, MatchedStatistic, [MeanFlowStatistic(), "matched"]),
        (lambda: TimeFunction("t"), lambda: TimeFunction("t"), [TimeFunction("t", 2), "t"]),
    ],
    ids=["schedule", "statistic", "matched", "function"],
)
def test_what_is_made_alike_is_equal_and_nothing_else(make, like, others):
    assert make() == like() and hash(make()) == hash(like())
    for other in others:
        assert make() != other and other != make()
