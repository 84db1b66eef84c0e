"""Guidance in training and sampling, and the solvers of plain velocity models."""

import math
from dataclasses import replace

import pytest
import torch
from gaussian import Gaussian, column
from hypothesis import given, settings
from strategies import PRESETS, cross_flow, formula_schedules, normal, pairs, seeds
from tolerances import EXACT, within

from flowspace import (
    CrossFlowLoss,
    DormandPrince,
    Euler,
    FlowMap,
    Guidance,
    Heun,
    ImprovedMeanFlowLoss,
    InputError,
    MatchedStatistic,
    MeanFlowDistillationLoss,
    MeanFlowLoss,
    PixelMeanFlowLoss,
    RandomGuidance,
    Statistic,
    TimeError,
    VelocityFlow,
)
from flowspace.solvers import falling_grid

LINEAR, NULL = PRESETS["linear"], {"labels": 3}


class Record(list):
    """What a model was given in each evaluation: of a plain list one a step is kept."""


class Labelled(torch.nn.Module):
    """A model that remembers what it was given."""

    def __init__(self, head=False):
        super().__init__()
        self.weight, self.table = (
            torch.nn.Parameter(normal(0, 3, 3)),
            torch.nn.Parameter(normal(1, 4, 3)),
        )
        self.head, self.seen = head, Record()

    def forward(self, z, t, s, labels, omega=None, t_min=None, t_max=None):
        self.seen.append(
            {"labels": labels, "omega": omega, "t_min": t_min, "t_max": t_max, "s": s, "t": t}
        )
        f = torch.tanh(z @ self.weight) + self.table[labels] * column(1 + t - s / 2)
        f = f if omega is None else f * column(omega)
        return (f, f + 1) if self.head else f


close = within(EXACT)


def call(loss_fn, net, times, seed, rows=6):
    z, noise, labels = normal(seed, rows, 3), normal(seed + 1, rows, 3), torch.arange(rows) % 3
    draw = torch.Generator().manual_seed(seed)
    return (
        loss_fn(
            net, z, noise=noise, t=times[0], s=times[1], cond={"labels": labels}, generator=draw
        ),
        z,
        noise,
    )


@settings(max_examples=20, deadline=None)
@given(pairs(rows=6, diagonal=True), seeds)
def test_the_velocity_is_mean_flows_mixture_inside_the_interval_and_untouched_elsewhere(
    times, seed
):
    net, guide = (
        Labelled(),
        Guidance(null=NULL, omega=1.7, own_weight=0.4, interval=(0.3, 0.8), drop=0.3),
    )
    out, z, noise = call(MeanFlowLoss(guidance=guide), net, times, seed)
    t = times[0]
    z_t, v = LINEAR.perturb(z, noise, t)
    labels, plain = torch.arange(6) % 3, Labelled()
    lost = net.seen[-1]["labels"] == 3  # the model itself is evaluated last
    free, own = (
        plain(z_t, t, t, labels=torch.full((6,), 3)),
        plain(z_t, t, t, labels=torch.where(lost, 3, labels)),
    )
    mixed = 1.7 * v + (1 - 1.7 - 0.4) * free + 0.4 * own
    guided = (t >= 0.3) & (t <= 0.8) & ~lost
    close(out.velocity, torch.where(column(guided), mixed, v).detach())


def test_one_mask_of_dropped_rows_serves_every_evaluation_of_a_step():
    net, guide = Labelled(), Guidance(null=NULL, omega=2.0, own_weight=0.3, drop=0.5)
    t = torch.linspace(0.3, 1, 40, dtype=torch.float64)
    call(MeanFlowLoss(guidance=guide), net, (t, t / 2), 0, rows=40)
    masks = [seen["labels"] == 3 for seen in net.seen]
    partial = [mask for mask in masks if not mask.all()]
    assert len(partial) >= 2 and all(torch.equal(mask, partial[0]) for mask in partial)
    assert 10 < int(partial[0].sum()) < 30


def test_without_strength_guidance_only_drops_and_costs_no_evaluation():
    t = torch.linspace(0.3, 1, 6, dtype=torch.float64)
    plain, guided = Labelled(), Labelled()
    first, _, _ = call(MeanFlowLoss(), plain, (t, t / 2), 0)
    second, _, _ = call(
        MeanFlowLoss(guidance=Guidance(null=NULL, drop=0.0)), guided, (t, t / 2), 0
    )
    close(first.loss, second.loss)
    assert len(plain.seen) == len(guided.seen)


@pytest.mark.parametrize("gap", [None, 0.3])
@settings(max_examples=4, deadline=None)
@given(schedule=formula_schedules, times=pairs(rows=6, inside=True), seed=seeds)
def test_guided_cross_flow_is_identity_one_and_with_strength_one_identity_two(
    gap, schedule, times, seed
):
    cross = replace(cross_flow(schedule), gap=gap)
    mean = MeanFlowLoss(schedule=schedule, statistic=MatchedStatistic(), gap=gap)
    weak, strong = (Guidance(null=NULL, omega=omega, drop=0.0) for omega in (1.0, 1.7))
    for first, second in (
        (cross, replace(cross, guidance=weak)),
        (replace(cross, guidance=strong), replace(mean, guidance=strong)),
    ):
        found, wanted = (call(loss_fn, Labelled(), times, seed)[0] for loss_fn in (first, second))
        close(found.residual, wanted.residual, 1e-7)
        close(found.target, wanted.target, 1e-7)
        close(found.velocity, wanted.velocity)


def test_a_taught_velocity_is_guided_as_one_that_is_given():
    guide, teacher = Guidance(null=NULL, omega=1.7, drop=0.0), Labelled()
    t = torch.linspace(0.3, 1, 6, dtype=torch.float64)

    def taught(z, t, labels):
        return teacher(z, t, t, labels)

    first = MeanFlowDistillationLoss(teacher=taught, guidance=guide)
    second = MeanFlowLoss(velocity=taught, guidance=guide)
    found, wanted = (call(loss_fn, Labelled(), (t, t / 2), 0)[0] for loss_fn in (first, second))
    close(found.velocity, wanted.velocity)
    close(found.target, wanted.target)
    assert not torch.allclose(found.velocity, taught(found.z_t, t, torch.arange(6) % 3))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("loss", [ImprovedMeanFlowLoss, PixelMeanFlowLoss])
def test_random_guidance_is_the_improved_papers_and_the_model_is_told(loss, head):
    net, guide = Labelled(head), RandomGuidance(null=NULL, drop=0.0)
    t = torch.linspace(0.06, 1, 50, dtype=torch.float64)
    s = torch.where(torch.arange(50) % 2 == 0, t, t / 3)
    out, z, noise = call(loss(guidance=guide, head=head), net, (t, s), 3, rows=50)
    told = next(seen for seen in net.seen if torch.equal(seen["s"], s) and len(seen["s"]) == 50)
    omega, inside = told["omega"], (told["t_min"] <= t) & (t <= told["t_max"])
    assert (
        ((omega >= 1) & (omega <= 8)).all()
        and (told["t_min"] <= 0.5).all()
        and (told["t_max"] >= 0.5).all()
    )
    assert (
        (told["t_min"][s == t] == 0).all()
        and (told["t_max"][s == t] == 1).all()
        and not inside.all()
    )
    z_t, v = LINEAR.perturb(z, noise, t)
    masked, plain = torch.where(inside, omega, torch.ones_like(t)), Labelled(head)

    def own(labels, strength):
        found = plain(z_t, t, t, labels=labels, omega=strength)
        found = found[1] if head else found
        return (z_t - found) / column(t) if loss is PixelMeanFlowLoss else found

    labels = torch.arange(50) % 3
    gap = own(labels, masked) - own(torch.full((50,), 3), torch.ones_like(t))
    close(out.velocity, (v + column(1 - 1 / masked) * gap).detach(), 1e-9)
    if loss is PixelMeanFlowLoss:
        return

    def average(z, u):
        found = plain(z, u, s, labels=labels, omega=omega)
        return found[0] if head else found

    tangents = (own(labels, masked).detach(), torch.ones_like(t))
    slope = torch.func.jvp(average, (z_t, t), tangents)[1]
    close(out.target, out.velocity - column(t - s) * slope.detach(), 1e-9)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_strength_has_a_density_that_falls_with_that_power(power):
    guide = RandomGuidance(null=NULL, largest=8.0, power=power)
    omega = guide.strength(torch.linspace(0, 1, 2001, dtype=torch.float64))
    close(omega[[0, -1]], torch.tensor([1.0, 8.0], dtype=torch.float64))

    def mass(x):
        return math.log(x) if power == 1 else (x ** (1 - power) - 1) / (1 - power)

    share = torch.tensor([mass(float(x)) / mass(8.0) for x in omega], dtype=torch.float64)
    close(share, torch.linspace(0, 1, 2001, dtype=torch.float64), 1e-9)


def test_strengths_from_zero_up_may_differ_by_row():
    for omega in (0, 0.5, torch.tensor([0.0, 0.5, 7.0])):
        assert Guidance(null=NULL, omega=omega).omega is omega


def test_intervals_are_drawn_from_either_half_and_hold_their_ends():
    guide, rows = RandomGuidance(null=NULL, drop=0.0), 4000
    t = torch.linspace(0.06, 1, rows, dtype=torch.float64)
    s = torch.where(torch.arange(rows) % 4 == 0, t, t / 3)
    labels = torch.zeros(rows, dtype=torch.long)
    cond, _ = guide.drop_condition({"labels": labels}, t, s, torch.Generator().manual_seed(0))
    below, above = cond["t_min"][s < t], cond["t_max"][s < t]
    for ends, low in ((below, 0.0), (above, 0.5)):
        steps = torch.linspace(low, low + 0.5, len(ends), dtype=torch.float64)
        assert (ends.sort().values - steps).abs().max() < 0.02
    assert abs(float(torch.corrcoef(torch.stack([below, above]))[0, 1])) < 0.05
    for end in ("t_min", "t_max"):
        assert torch.equal(guide.own_condition(cond[end], cond)["omega"], cond["omega"])
    just_outside = guide.own_condition(above + 1e-9, {k: v[s < t] for k, v in cond.items()})
    assert (just_outside["omega"] == 1).all()


def test_at_sampling_the_scale_may_differ_by_row_and_is_one_outside_the_interval():
    net, noise = Labelled(), normal(0, 4, 3)
    omega, t = (
        torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64),
        torch.tensor([0.5, 0.5, 0.9, 0.5], dtype=torch.float64),
    )
    guided = Guidance(null=NULL, omega=omega, own_weight=0.5, interval=(0.2, 0.8)).apply(net)
    labels = torch.tensor([0, 1, 2, 0])
    with_, without = net(noise, t, t, labels=labels), net(noise, t, t, labels=torch.full((4,), 3))
    scale = torch.tensor([2.0, 4.0, 1.0, 8.0], dtype=torch.float64)
    close(guided(noise, t, t, labels=labels), without + column(scale) * (with_ - without))
    net.seen.clear()
    guided(noise, torch.full_like(t, 0.9), t, labels=labels)
    assert len(net.seen) == 1


def test_a_flow_map_and_a_velocity_flow_take_guidance():
    net, noise, guide = (
        Labelled().requires_grad_(False),
        normal(0, 4, 3),
        Guidance(null=NULL, omega=2.0),
    )
    labels = torch.tensor([0, 1, 2, 0])
    flow = FlowMap(net, LINEAR, MeanFlowLoss().statistic)
    found = flow.sample(noise, cond={"labels": labels}, guidance=guide)
    one, zero = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    with_, without = (
        net(noise, one, zero, labels=labels),
        net(noise, one, zero, labels=torch.full((4,), 3)),
    )
    close(found, noise - without - 2 * (with_ - without))
    velocity = VelocityFlow(lambda z, t, labels: net(z, t, t, labels=labels))
    plain = velocity.sample(noise, cond={"labels": labels}, steps=3)
    assert (
        velocity.sample(noise, cond={"labels": labels}, steps=3, guidance=guide) - plain
    ).abs().max() > 0.01


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Guidance(null={}), "labels"),
        (lambda: Guidance(null=NULL, omega=-1.0), "omega"),
        (lambda: Guidance(null=NULL, omega=math.inf), "omega"),
        (lambda: Guidance(null=NULL, omega=torch.tensor([1.0, math.nan])), "omega"),
        (lambda: Guidance(null=NULL, interval=(0.1, 0.4, 0.7)), "interval"),
        (lambda: Guidance(null=NULL, interval=(0.4, 0.4)), "interval"),
        (lambda: Guidance(null=NULL, interval=(0.4, "0.7")), "interval"),
        (lambda: Guidance(null=NULL, own_weight=1.0), "own_weight"),
        (lambda: Guidance(null=NULL, interval=(0.7, 0.2)), "interval"),
        (lambda: Guidance(null=NULL, drop=1.5), "drop"),
        (lambda: RandomGuidance(null=NULL, largest=1.0), "largest"),
        (
            lambda: RandomGuidance(null=NULL).sampling_condition(torch.zeros(2, 3), 9.0),
            "between 1 and 8",
        ),
        (lambda: RandomGuidance(null=NULL).apply(Labelled()), "sampling_condition"),
        (lambda: MeanFlowLoss(guidance=2.0), "Guidance"),
        (
            lambda: MeanFlowLoss(guidance=Guidance(null=NULL))(
                lambda z, t, s: z, torch.zeros(2, 3)
            ),
            "same names",
        ),
        (
            lambda: MeanFlowLoss(guidance=Guidance(null=NULL))(
                Labelled(), torch.zeros(2, 3), cond={"labels": [0, 1]}
            ),
            "list",
        ),
        (
            lambda: CrossFlowLoss(guidance=Guidance(null=NULL))(
                Labelled(), torch.zeros(2, 3), torch.zeros(2, 5)
            ),
            "sampling",
        ),
    ],
)
def test_misuse_is_one_clear_error(make, says):
    with pytest.raises(InputError, match=says):
        make()


def test_told_gives_the_strength_and_the_interval_of_every_row():
    told = RandomGuidance(null=NULL).sampling_condition(torch.zeros(3, 2), 4.0, (0.1, 0.7))
    assert told["omega"].tolist() == [4.0] * 3
    close(told["t_min"], torch.full((3,), 0.1), 1e-6)
    close(told["t_max"], torch.full((3,), 0.7), 1e-6)


# --- solvers
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "order"), [(Euler(), 1), (Heun(), 2)])
def test_fixed_steps_have_the_order_of_their_name(solver, order):
    data, noise = Gaussian.random(LINEAR, 1), normal(0, 6, 3)
    one, end = torch.ones(6, dtype=torch.float64), torch.full((6,), 0.2, dtype=torch.float64)
    exact, errors = data.transported(noise, one, end), []
    for steps in (16, 32, 64):
        grid = torch.linspace(1, 0.2, steps + 1, dtype=torch.float64)
        errors.append(float((solver.path(data.velocity, noise, grid)[-1] - exact).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.2)


@settings(max_examples=8, deadline=None)
@given(formula_schedules, seeds)
def test_the_adaptive_solver_keeps_its_tolerance_and_the_grid_only_says_where(schedule, seed):
    data, noise = Gaussian.random(schedule, seed), normal(seed, 4, 3)
    grid = torch.tensor([1.0, 0.6, 0.2], dtype=torch.float64)
    path = DormandPrince(1e-8, 1e-8).path(data.velocity, noise, grid)
    one = torch.ones(4, dtype=torch.float64)
    for state, time in zip(path, grid, strict=True):
        close(state, data.transported(noise, one, time * one), 1e-5)


@pytest.mark.parametrize("tolerances", [(1e-2, 1e-7), (1e-7, 1e-2)], ids=str)
def test_the_relative_and_the_absolute_tolerance_are_torchdiffeqs(tolerances):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    data, noise = Gaussian.random(LINEAR, 3), normal(2, 4, 3) / 30
    grid = torch.tensor([1, 0.1], dtype=torch.float64)
    rtol, atol = tolerances
    theirs = torchdiffeq.odeint(
        lambda t, z: data.velocity(z, t.expand(4)), noise, grid, rtol=rtol, atol=atol
    )
    close(DormandPrince(rtol, atol).path(data.velocity, noise, grid), theirs)
    exchanged = DormandPrince(atol, rtol).path(data.velocity, noise, grid)
    assert (exchanged - theirs).abs().max() > 1e-6


def test_by_default_the_adaptive_solver_is_exact_to_four_places():
    data, noise = Gaussian.random(LINEAR, 3), normal(2, 64, 3)
    one, grid = torch.ones(64, dtype=torch.float64), torch.tensor([1, 0.1], dtype=torch.float64)
    found = DormandPrince().path(data.velocity, noise, grid)[-1]
    close(found, data.transported(noise, one, 0.1 * one), 1e-4)


@pytest.mark.parametrize("solver", [Euler(), Heun(), DormandPrince()], ids=str)
@pytest.mark.parametrize(
    ("dtype", "of_times"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_a_velocity_sees_states_of_the_noises_precision_and_times_of_float32_at_least(
    solver, dtype, of_times
):
    """Its own precision does not spread, and nothing has a gradient."""
    weight, seen = torch.ones((), requires_grad=True), []

    def velocity(z, t):
        seen.append((z.dtype, t.dtype, t.shape, t.is_contiguous(), torch.is_grad_enabled()))
        return weight * z.double()

    found = VelocityFlow(velocity, solver).sample(torch.ones(3, 2, dtype=dtype), steps=3)
    assert set(seen) == {(dtype, of_times, (3,), True, False)}
    assert found.dtype == dtype and not found.requires_grad
    assert float(found[0, 0]) == pytest.approx(math.exp(-1), abs=0.1)


@pytest.mark.parametrize("tolerance", [0, -1e-5, math.inf, math.nan, "1e-5", None])
@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_tolerances_are_finite_numbers_above_zero(name, tolerance):
    with pytest.raises(InputError, match=f"got .*{name} = {tolerance!r}"):
        DormandPrince(**{name: tolerance})


@pytest.mark.parametrize(
    ("velocity", "dtype"),
    [(lambda z, t: z * math.nan, torch.float64), (lambda z, t: z, torch.float16)],
    ids=["nan", "float16"],
)
def test_a_velocity_that_the_adaptive_solver_cannot_follow_is_one_clear_error(velocity, dtype):
    flow = VelocityFlow(velocity, DormandPrince())
    with pytest.raises(InputError, match=f"smaller steps .* in states of {dtype}"):
        flow.sample(torch.ones(2, 3, dtype=dtype))


def test_an_assertion_of_a_velocity_is_its_own():
    def velocity(z, t):
        raise AssertionError("mine")

    with pytest.raises(AssertionError, match="mine"):
        VelocityFlow(velocity, DormandPrince()).sample(torch.ones(2, 3))


def test_our_euler_is_torchdiffeqs():
    torchdiffeq = pytest.importorskip("torchdiffeq")
    data, noise = Gaussian.random(LINEAR, 1), normal(0, 6, 3)
    grid = torch.linspace(1, 0.1, 8, dtype=torch.float64)
    theirs = torchdiffeq.odeint(
        lambda t, z: data.velocity(z, t.expand(6)), noise, grid, method="euler"
    )
    close(Euler().path(data.velocity, noise, grid), theirs)


def test_a_flow_maps_own_velocity_carries_noise_to_data():
    data, noise = Gaussian.random(LINEAR, 2), normal(0, 5, 3)
    flow = FlowMap(data.matched(), LINEAR, MatchedStatistic())
    one = torch.ones(5, dtype=torch.float64)
    found = VelocityFlow(flow.velocity, DormandPrince(1e-7, 1e-7)).sample(noise)
    close(found, data.transported(noise, one, 0 * one), 1e-3)


def test_the_consistency_sampler_keeps_the_law_of_the_data():
    """A step to s = 0 of the exact map and fresh noise: mean and covariance of Gaussian data, in
    one space and across.
    """
    data, rows = Gaussian.random(LINEAR, 4), 40_000
    noise, covariance = normal(0, rows, 3), data.rotation * data.spread**2 @ data.rotation.T
    exact = FlowMap(
        data.statistic(lambda t, s: torch.ones_like(t), lambda t, s: -torch.ones_like(t)),
        LINEAR,
        Statistic(1, -1),
    )
    samples = exact.sample(
        noise, steps=3, renoise=True, generator=torch.Generator().manual_seed(77)
    )
    assert (samples.mean(0) - data.mean).abs().max() < 0.03
    assert (torch.cov(samples.T) - covariance).abs().max() < 0.05
    matrix = normal(9, 3, 3)
    across = FlowMap(
        lambda z, t, s: data.matched()(z, t, s) @ matrix.T, LINEAR, MatchedStatistic()
    )
    images = across.sample(
        noise,
        steps=3,
        encode=lambda x: torch.linalg.solve(matrix, x.T).T,
        generator=torch.Generator().manual_seed(77),
    )
    close(images.mean(0), data.mean @ matrix.T, 0.05)
    assert (torch.cov(images.T) - matrix @ covariance @ matrix.T).abs().max() < 0.3


def test_a_grid_is_beside_the_noise_and_has_32_steps_where_nothing_is_said():
    grid = falling_grid(torch.empty(2, 3, device="meta"), 3, None)
    assert grid.device.type == "meta"
    seen = []
    VelocityFlow(lambda z, t: seen.append(float(t[0])) or z).sample(torch.ones(2, 3))
    assert seen == pytest.approx([1 - k / 32 for k in range(32)])


def test_grids_and_velocities_that_do_not_fit_are_refused():
    flow, noise = VelocityFlow(lambda z, t: z), torch.zeros(2, 3)
    for steps in (0, 2.0, True):
        with pytest.raises(TimeError, match="counts evaluations"):
            flow.sample(noise, steps=steps)
    for times in ([1, 0.5], [0.5, 0], [0, 1], [1, 0.5, 0.5, 0], [1, 0.2, 0.7, 0], [1], [[1, 0]]):
        with pytest.raises(TimeError, match="falls strictly from 1 to 0"):
            flow.sample(noise, times=times)
    for times in ([], 0.5, [[1], [0]]):
        with pytest.raises(TimeError, match="falls strictly from 1 to 0"):
            flow.sample(noise, times=times)
    for times in ([None, 0], ["1", "0"], [10**400, 0], torch.ones(2, device="meta")):
        with pytest.raises(TimeError, match="write numbers"):
            flow.sample(noise, times=times)
    for velocity in (3, torch.nn.Identity):
        with pytest.raises(InputError, match="got velocity = "):
            VelocityFlow(velocity)
    with pytest.raises(InputError, match="got solver = "):
        VelocityFlow(flow.velocity, Euler)
    with pytest.raises(InputError, match="shape"):
        VelocityFlow(lambda z, t: z[:, :1]).sample(noise)
