"""The family's identities: one formula under many names, closed forms on Gaussian data, and what
distillation gains.
"""

from dataclasses import replace

import pytest
import torch
from gaussian import Gaussian, column
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Net
from strategies import (
    PRESETS,
    cross_flow,
    formula_schedules,
    normal,
    pairs,
    schedules,
    seeds,
    statistics_for,
)
from tolerances import EXACT, within

from flowspace import (
    AlphaFlowLoss,
    ConsistencyLoss,
    ConsistencyStatistic,
    CrossFlowLoss,
    Euler,
    FiniteDifference,
    FlowMap,
    FlowMatchingLoss,
    Guidance,
    ImprovedMeanFlowLoss,
    InputError,
    LogitNormalTimes,
    MatchedStatistic,
    MeanFlowDistillationLoss,
    MeanFlowLoss,
    PixelMeanFlowLoss,
    ShiftedTimes,
    SquaredError,
    Statistic,
    TimeError,
    TimePairs,
    TrajectoryMatchingLoss,
    alpha_at,
)
from flowspace.objectives.engine import PathPoint

LINEAR = PRESETS["linear"]


close = within(EXACT)


def equal(first, second, net, tolerance=1e-10):
    """Loss and gradient of two outputs of one network."""
    close(first.loss, second.loss, tolerance)
    for a, b in zip(
        *(torch.autograd.grad(out.loss.sum(), list(net.parameters())) for out in (first, second)),
        strict=True,
    ):
        close(a, b, tolerance * (1 + b.abs().max().item()))


# --- the same thing under another name
# ----------------------------------------------------------------------------------


@settings(max_examples=20)
@given(pairs(rows=6, diagonal=True), seeds)
def test_pixel_mean_flow_along_the_conditional_velocity_is_cross_flow_weighted_by_one_over_t(
    times, seed
):
    (t, s), net, z, noise = times, Net(), normal(seed, 6, 3), normal(seed + 1, 6, 3)
    pixel = PixelMeanFlowLoss(own_tangent=False)(net, z, noise=noise, t=t, s=s)
    cross = CrossFlowLoss(schedule=LINEAR, weight=lambda t, s: 1 / t)(
        net, z, noise=noise, t=t, s=s
    )
    close(pixel.prediction, cross.prediction)
    close(pixel.target, cross.target, 1e-9)
    equal(pixel, cross, net, 1e-9)


@settings(max_examples=20)
@given(schedules, pairs(rows=6, diagonal=True), seeds)
def test_mean_flow_on_the_diagonal_is_flow_matching(schedule, times, seed):
    t, net, z, noise = times[0], Net(), normal(seed, 6, 3), normal(seed + 1, 6, 3)
    mean, plain = (
        cls(schedule=schedule)(net, z, noise=noise, t=t, s=t)
        for cls in (MeanFlowLoss, FlowMatchingLoss)
    )
    equal(mean, plain, net)
    close(mean.target, schedule.perturb(z, noise, t)[1])


@settings(max_examples=20)
@given(schedules, pairs(rows=6), seeds)
def test_consistency_is_the_residual_of_the_engine_for_kappa_zero(schedule, times, seed):
    t, net, z, noise = times[0], Net(), normal(seed, 6, 3), normal(seed + 1, 6, 3)
    zero = torch.zeros_like(t)
    own = ConsistencyLoss(schedule=schedule, boundary=0.0)(net, z, noise=noise, t=t, s=zero)
    engine = cross_flow(schedule, ConsistencyStatistic())(net, z, noise=noise, t=t, s=zero)
    equal(own, engine, net)
    close(own.residual, engine.residual)


@settings(max_examples=20)
@given(pairs(rows=6), seeds, st.sampled_from([0.05, 0.3, 1.0]))
def test_alpha_flows_target_is_the_references(times, seed, alpha):
    """u_tgt = (dt v + (t - dt - r) u(x - dt v, r, t - dt))/(t - r) with dt = alpha (t - r)."""
    (t, s), net, z, noise = times, Net(), normal(seed, 6, 3), normal(seed + 1, 6, 3)
    out = AlphaFlowLoss(gap=alpha)(net, z, noise=noise, t=t, s=s)
    z_t, v = LINEAR.perturb(z, noise, t)
    dt = alpha * (t - s)
    earlier = net(z_t - column(dt) * v, t - dt, s).detach()
    wanted = (column(dt) * v + column(t - dt - s) * earlier) / column(t - s)
    close(out.target, wanted, 1e-9)
    close(out.loss, alpha * (out.prediction - wanted).square().mean(1), 1e-9)


@pytest.mark.parametrize("bound", [torch.inf, 100.0])
def test_alpha_flow_on_the_diagonal_is_flow_matching_whatever_its_alpha(bound):
    net, z, noise = Net(), normal(0, 4, 3), normal(1, 4, 3)
    t = torch.linspace(0.2, 1, 4, dtype=torch.float64)
    out = AlphaFlowLoss(gap=0.3, bound=bound)(net, z, noise=noise, t=t, s=t)
    equal(out, FlowMatchingLoss()(net, z, noise=noise, t=t), net)


@settings(max_examples=60)
@given(st.floats(-0.5, 2), st.floats(-1, 1), st.floats(0.1, 2), st.sampled_from([1.0, 25.0, 1e6]))
def test_alpha_is_a_sigmoid_that_falls_from_start_to_end_and_is_snapped_near_one_and_zero(
    progress, start, length, steepness
):
    place = torch.tensor((progress - start) / length - 0.5, dtype=torch.float64)
    wanted = float(torch.sigmoid(-steepness * place))
    if wanted < 0.005:
        wanted = 0.0
    if wanted > 0.995:
        wanted = 1.0
    found = alpha_at(progress, start, start + length, steepness)
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-12)


def test_alpha_falls_as_the_reference_does_where_nothing_is_said():
    assert alpha_at(0.6) == alpha_at(0.6, 0.0, 1.0, 25.0) == pytest.approx(0.07585818)


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ((float("nan"),), "progress"),
        ((-float("inf"),), "progress"),
        ((0.5, 0.2, 0.2), "write start < end"),
        ((0.5, 0.8, 0.2), "write start < end"),
        ((0.5, 0.0, float("inf")), "write start < end"),
        ((0.5, 0.0, 1.0, float("inf")), "steepness"),
        ((0.5, 0.0, 1.0, 0.0), "steepness"),
    ],
)
def test_an_alpha_of_numbers_out_of_range_is_refused(numbers, says):
    with pytest.raises(InputError, match=says):
        alpha_at(*numbers)


@settings(max_examples=20)
@given(st.data(), formula_schedules, seeds)
def test_the_two_point_form_tends_to_the_derivative(draws, schedule, seed):
    statistic = draws.draw(statistics_for(schedule))
    t, s = draws.draw(pairs(rows=4, inside=True, gap=0.1))
    net, z, noise = Net(), normal(seed, 4, 3), normal(seed + 1, 4, 3)
    loss_fn = cross_flow(schedule, statistic)
    exact = loss_fn(net, z, noise=noise, t=t, s=s)
    near = [replace(loss_fn, gap=g)(net, z, noise=noise, t=t, s=s) for g in (1e-3, 1e-5)]
    b = column(loss_fn.coefficients.derivative(t, s))
    for g, out in zip((1e-3, 1e-5), near, strict=True):
        step = column(g * (t - s))
        slope = (
            (out.prediction - out.target) * b / step
        )  # the difference quotient of f/delta - K, which tends to R
        error = (slope - exact.residual).abs().max() / (1 + exact.residual.abs().max())
        assert error < 3e3 * g, (g, error)


def test_the_two_point_form_for_kappa_zero_is_discrete_consistency():
    """y* = f at the earlier point of the same path, in one space and across."""
    net, z, noise, x = Net(), normal(0, 5, 3), normal(1, 5, 3), normal(2, 5, 3)
    t = torch.linspace(0.2, 1, 5, dtype=torch.float64)
    zero = torch.zeros_like(t)
    for targets in (None, x):
        out = ConsistencyLoss(gap=0.2, boundary=0.0)(net, z, targets, noise=noise, t=t, s=zero)
        earlier = LINEAR.perturb(z, noise, 0.8 * t)[0]
        close(out.target, net(earlier, 0.8 * t, zero).detach())


# --- Gaussian data
# -------------------------------------------------------------------------------------------------


def at_means(loss_fn, data, model, t, s, seed):
    """The residual of data and noise at their means given z_t; for affine f this is its
    conditional mean.
    """
    z_t = data.sample_state(t, seed)
    out = loss_fn(model, data.clean(z_t, t), noise=data.grain(z_t, t), t=t, s=s)
    close(out.z_t, z_t)
    return out.prediction.detach() - out.target


@settings(max_examples=20)
@given(formula_schedules, pairs(rows=6, inside=True, gap=0.05), seeds)
def test_the_exact_average_velocity_solves_improved_mean_flow_and_distillation(
    schedule, times, seed
):
    (t, s), data = times, Gaussian.random(schedule, seed)
    exact = data.average_velocity()
    for loss_fn in (
        ImprovedMeanFlowLoss(schedule=schedule),
        MeanFlowDistillationLoss(schedule=schedule, teacher=data.velocity),
        MeanFlowDistillationLoss(schedule=schedule, teacher=data.velocity, mix=0.3),
    ):
        off = at_means(loss_fn, data, exact, t, s, seed)
        close(off, torch.zeros_like(off), 1e-8)
        off = at_means(loss_fn, data, lambda *x: 1.1 * exact(*x), t, s, seed)
        assert (off.abs().amax(1) > 1e-5).all()


@settings(max_examples=20)
@given(formula_schedules, pairs(rows=6, inside=True, gap=0.05), seeds)
def test_with_an_exact_teacher_the_residual_itself_vanishes(schedule, times, seed):
    """Not only its mean: nothing of the noise that made z_t is left in it."""
    (t, s), data = times, Gaussian.random(schedule, seed)
    loss_fn = MeanFlowDistillationLoss(schedule=schedule, teacher=data.velocity)
    out = loss_fn(
        data.average_velocity(), normal(seed, 6, 3), noise=normal(seed + 1, 6, 3), t=t, s=s
    )
    close(out.residual, torch.zeros_like(out.residual), 1e-8)


@settings(max_examples=20)
@given(formula_schedules, pairs(rows=6, inside=True, gap=0.05), seeds)
def test_the_images_of_pixel_mean_flow_are_what_its_statistic_says(schedule, times, seed):
    (t, s), data = times, Gaussian.random(schedule, seed)
    loss_fn = PixelMeanFlowLoss(schedule=schedule)
    exact = data.statistic(loss_fn.outputs.gamma, loss_fn.outputs.delta)
    whole = lambda z, t, s: torch.where(column(s < t), exact(z, t, s), data.clean(z, t))  # noqa: E731
    off = at_means(loss_fn, data, whole, t, s, seed)
    close(off, torch.zeros_like(off), 1e-7)
    z_t = data.sample_state(t, seed)
    close(
        FlowMap(exact, schedule, loss_fn.outputs).step(z_t, t, s),
        data.transported(z_t, t, s),
        1e-8,
    )
    off = at_means(loss_fn, data, lambda *x: whole(*x) + 0.1 * column(x[1]), t, s, seed)
    assert (off.abs().amax(1) > 1e-6).all()


@settings(max_examples=20)
@given(formula_schedules, pairs(rows=6, inside=True, gap=0.05), seeds)
def test_the_exact_trajectory_function_is_at_rest_and_at_its_boundary(schedule, times, seed):
    (t, s), data = times, Gaussian.random(schedule, seed)
    exact = lambda z, t, s: data.transported(z, t, s.detach())  # noqa: E731
    off = at_means(ConsistencyLoss(schedule=schedule, boundary=0.0), data, exact, t, s, seed)
    close(off, torch.zeros_like(off), 1e-8)
    z, noise, s = normal(seed, 6, 3), normal(seed + 1, 6, 3), s.clamp(min=0.02)
    far, near = (
        ConsistencyLoss(schedule=schedule, boundary=weight)(exact, z, noise=noise, t=t, s=s).loss
        for weight in (0.0, 1.0)
    )
    close(near - far, torch.zeros_like(far), 1e-8)


@settings(max_examples=10)
@given(formula_schedules, seeds)
def test_trajectory_matching_is_zero_for_the_exact_map_of_a_path_that_is_solved_exactly(
    schedule, seed
):
    """A constant velocity: Euler's steps are exact, and the average velocity is that constant."""
    constant, noise = normal(seed, 4, 3), normal(seed + 1, 4, 3)
    loss_fn = TrajectoryMatchingLoss(
        schedule=schedule, teacher=lambda z, t: constant, steps=4, shift=2.0
    )
    out = loss_fn(lambda z, t, s: constant.repeat(len(z) // 4, 1), noise, noise=noise)
    close(out.residual, torch.zeros_like(out.residual), 1e-9)
    close(out.velocity, constant.repeat(10, 1), 1e-9)
    assert out.loss.shape == (40,) and set(out.t.tolist()) < set(loss_fn.grid(noise).tolist())
    wrong = loss_fn(lambda z, t, s: constant.repeat(len(z) // 4, 1) + 0.1, noise, noise=noise)
    close(wrong.loss, torch.full((40,), 0.01, dtype=torch.float64), 1e-9)


def test_trajectory_matching_tends_to_the_exact_map_as_the_grid_is_refined():
    data, noise = Gaussian.random(LINEAR, 3), normal(0, 4, 3)
    sizes = []
    for steps in (8, 16, 32):
        loss_fn = TrajectoryMatchingLoss(teacher=data.velocity, steps=steps)
        exact = data.average_velocity()
        out = loss_fn(lambda z, t, s, exact=exact: exact(z, t, s), noise, noise=noise)
        sizes.append(float(out.residual.abs().mean()))
    assert sizes[0] > 1.6 * sizes[1] > 1.6**2 * sizes[2] > 0


def test_random_pairs_are_distinct_and_conditions_follow_their_rows():
    noise, seen = normal(0, 3, 2), {}

    def model(z, t, s, y):
        if len(z) > 3:  # the first pair is seen by itself once more
            seen.update(t=t, s=s, y=y)
        return z

    loss_fn = TrajectoryMatchingLoss(
        teacher=lambda z, t, y: z * column(y), steps=5, pairs=7, shift=3.0
    )
    loss_fn(
        model,
        noise,
        noise=noise,
        cond={"y": torch.arange(3.0).double()},
        generator=torch.Generator().manual_seed(0),
    )
    chosen = list(zip(seen["t"][::3].tolist(), seen["s"][::3].tolist(), strict=True))
    assert len(set(chosen)) == 7 and all(t > s for t, s in chosen)
    assert seen["y"].tolist() == [0.0, 1.0, 2.0] * 7
    even = torch.linspace(1, 0, 6, dtype=torch.float64)
    close(loss_fn.grid(noise), 3 * even / (1 + 2 * even))


@settings(max_examples=10)
@given(st.integers(1, 9), st.floats(0.3, 8), seeds)
def test_trajectory_matchings_labels_are_the_times_at_which_its_teacher_was_asked(
    steps, shift, seed
):
    asked, states, noise = [], [], normal(seed, 2, 3)

    def teacher(z, t):
        asked.append(float(t[0]))
        states.append(z)
        return torch.sin(3 * z) + column(t)

    loss_fn = TrajectoryMatchingLoss(teacher=teacher, steps=steps, shift=shift)
    out = loss_fn(lambda z, t, s: z, noise, noise=noise)
    assert len(asked) == steps and asked[0] == 1
    assert set(out.t.tolist()) == set(asked)
    assert set(out.s.tolist()) == {*asked[1:], 0.0}
    for row in range(len(out.t)):
        close(out.z_t[row], states[asked.index(out.t[row])][row % 2])
    even = torch.arange(steps, 0, -1).double() / steps
    close(torch.tensor(asked, dtype=torch.float64), shift * even / (1 + (shift - 1) * even))


def test_only_the_rows_that_begin_a_trajectory_are_solved_for():
    noise, asked = normal(0, 5, 3), []

    def teacher(z, t, y, table):
        asked.append(len(z))
        return z * column(y) + table.sum()

    cond = {"y": torch.arange(5.0).double(), "table": torch.ones(7, dtype=torch.float64)}
    some = TrajectoryMatchingLoss(teacher=teacher, steps=3, trajectories=2)
    out = some(lambda z, t, s, y, table: z * column(y), noise, noise=noise, cond=cond)
    assert asked == [2, 2, 2] and out.loss.shape == (2 * 6,)
    alone = TrajectoryMatchingLoss(teacher=teacher, steps=3)
    first = {"y": cond["y"][:2], "table": cond["table"]}
    whole = alone(lambda z, t, s, y, table: z * column(y), noise[:2], noise=noise[:2], cond=first)
    close(out.loss, whole.loss)
    close(out.z_t, whole.z_t)
    with pytest.raises(InputError, match="got a batch of 5 rows for trajectories = 6"):
        TrajectoryMatchingLoss(teacher=teacher, trajectories=6)(torch.sin, noise, cond=cond)


# --- the flow map
# -------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.data(), formula_schedules, seeds)
def test_the_flow_map_is_the_identity_on_the_diagonal_and_composes(draws, schedule, seed):
    statistic, data = draws.draw(statistics_for(schedule)), Gaussian.random(schedule, seed)
    t, s = draws.draw(pairs(rows=4, inside=True, gap=0.1))
    s = s.clamp(min=0.02)
    r = s / 2
    written = statistic.on(schedule)
    flow = FlowMap(data.statistic(written.gamma, written.delta), schedule, statistic)
    z_t = data.sample_state(t, seed)
    close(flow.step(flow.step(z_t, t, s), s, r), flow.step(z_t, t, r), 1e-7)
    close(flow.step(z_t, t, s), data.transported(z_t, t, s), 1e-7)
    close(flow.step(z_t, t, t - 1e-9), z_t, 1e-6)


@settings(max_examples=20)
@given(st.data(), formula_schedules, seeds)
def test_the_diagonal_of_an_anchored_statistic_is_a_velocity(draws, schedule, seed):
    data, t = Gaussian.random(schedule, seed), draws.draw(pairs(rows=4, inside=True))[0]
    z_t = data.sample_state(t, seed)
    for model, statistic in (
        (data.matched(), MatchedStatistic()),
        (data.average_velocity(), MeanFlowLoss().statistic),
    ):
        close(FlowMap(model, schedule, statistic).velocity(z_t, t), data.velocity(z_t, t), 1e-8)
    close(schedule.velocity(data.clean(z_t, t), z_t, t), data.velocity(z_t, t), 1e-8)
    close(schedule.latents(data.velocity(z_t, t), z_t, t), data.clean(z_t, t), 1e-7)


@settings(max_examples=5)
@given(pairs(rows=4, inside=True), seeds)
def test_the_velocity_that_an_estimate_stands_for_is_that_of_the_clean_prediction(times, seed):
    """f on the diagonal is c/a of the data, here 2."""
    t, data = times[0], Gaussian.random(LINEAR, seed)
    matrix, offset = normal(seed, 5, 3), normal(seed + 1, 5)
    statistic = Statistic("2", "-2*t/(t - s)")

    def model(z, t, s):
        return 2 * (data.clean(z, t) @ matrix.T + offset)

    loss_fn = CrossFlowLoss(
        statistic=statistic,
        check=False,
        estimate=lambda images: (images - offset) @ torch.linalg.pinv(matrix).T,
    )
    z_t = data.sample_state(t, seed)
    at = PathPoint(z_t, t, t, velocity=z_t, data=z_t, cond={})
    close(loss_fn.tangent_velocity(model, at), data.velocity(z_t, t), 1e-8)


# --- what distillation gains
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_the_residuals_mean_square_falls_by_that_of_what_the_noise_put_into_it(seed):
    """E|R_MFT|^2 - E|R_MFD|^2 = E|A dv|^2, A = (t - s) df/dz - 1, dv = v - teacher; for any
    network, an exact teacher.
    """
    rows, data, net = 200_000, Gaussian.random(LINEAR, seed), Net(seed=seed + 5)
    z = data.mean + (normal(seed, rows, 3) * data.spread) @ data.rotation.T
    noise = normal(seed + 1, rows, 3)
    t = torch.full((rows,), 0.7, dtype=torch.float64)
    s = torch.full((rows,), 0.2, dtype=torch.float64)
    with torch.no_grad():
        plain = MeanFlowLoss()(net, z, noise=noise, t=t, s=s)
        taught = MeanFlowDistillationLoss(teacher=data.velocity)(net, z, noise=noise, t=t, s=s)
        z_t, v = LINEAR.perturb(z, noise, t)
        dv = v - data.velocity(z_t, t)
        moved = torch.func.jvp(lambda x: net(x, t, s), (z_t,), (dv,))[1]
        noise_term = (column(t - s) * moved - dv).square().sum(1)
    gap = plain.residual.square().sum(1) - taught.residual.square().sum(1)
    close(plain.residual - taught.residual, column(t - s) * moved - dv, 1e-9)
    error = (gap - noise_term).std() / rows**0.5
    assert (gap - noise_term).mean().abs() < 5 * error
    assert noise_term.mean() > 50 * error


@settings(max_examples=20, deadline=None)
@given(formula_schedules, st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), seeds)
def test_distillation_trades_variance_for_the_teachers_error(schedule, mix, exact, seed):
    """Proposition 3.1 at each z_t, for any network: E[|R|^2 | z_t] = |f - h + B - l A dv_phi|^2 +
    (1 - l)^2 tr(A C A'), C the variance of the conditional velocity given z_t.

    R is affine in the conditional velocity, so six points with the mean and the variance of
    z given z_t give its mean square exactly.
    """
    data, net = Gaussian.random(schedule, seed), Net(seed=seed + 5)
    t, s = torch.tensor([0.7]).double(), torch.tensor([0.2]).double()
    z_t = data.sample_state(t, seed)
    v = data.velocity(z_t, t)
    off = torch.zeros_like(v) if exact else normal(seed + 9, 1, 3)
    loss_fn = MeanFlowDistillationLoss(
        schedule=schedule, teacher=lambda z, t: data.velocity(z, t) + off, mix=mix
    )

    spread = data.spread * column(schedule.beta(t)) / data.variances(t).sqrt()
    root = data.rotation * spread
    z = data.clean(z_t, t) + 3**0.5 * torch.cat([root.T, -root.T])
    noise = (z_t - column(schedule.alpha(t)) * z) / column(schedule.beta(t))
    out = loss_fn(net, z, noise=noise, t=t.expand(6), s=s.expand(6))
    close(out.z_t, z_t.expand(6, 3), 1e-9)
    measured = out.residual.square().sum(1).mean()

    slope = torch.func.jacrev(lambda x: net(x[None], t, s)[0])(z_t[0])
    through = torch.eye(3).double() - (t - s) * slope
    h = data.average_velocity()
    bias, moved = torch.func.jvp(
        lambda x, at: net(x, at, s) - h(x, at, s), (z_t, t), (v, torch.ones_like(t))
    )
    error = bias + (t - s) * moved - mix * off @ through.T
    falls = schedule.alpha(t) / schedule.beta(t)  # of the noise where z grows, at a fixed z_t
    turned = through @ root * (schedule.alpha_dot(t) - schedule.beta_dot(t) * falls)
    variance = (1 - mix) ** 2 * turned.square().sum()
    close(measured, error.square().sum() + variance, 1e-8)
    assert (variance > 0) == (mix < 1)


# --- linear networks
# -------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(pairs(rows=5, inside=True, gap=0.05), seeds)
def test_a_linear_network_has_closed_form_losses(times, seed):
    (t, s), w, b, c = times, normal(seed, 3, 3), normal(seed + 1, 3), normal(seed + 2, 3)
    z, noise = normal(seed + 3, 5, 3), normal(seed + 4, 5, 3)
    z_t, v = LINEAR.perturb(z, noise, t)

    def net(z, t, s):
        return z @ w.T + column(t) * b + column(s) * c

    f, gap = net(z_t, t, s), column(t - s)

    def check(loss_fn, difference):
        close(loss_fn(net, z, noise=noise, t=t, s=s).loss, difference.square().mean(1), 1e-8)

    check(MeanFlowLoss(), f + gap * (v @ w.T + b) - v)
    check(ImprovedMeanFlowLoss(), f + gap * (net(z_t, t, t) @ w.T + b) - v)
    check(MeanFlowDistillationLoss(teacher=lambda z, t: z), f + gap * (z_t @ w.T + b) - z_t)
    check(FlowMatchingLoss(), net(z_t, t, t) - v)
    check(CrossFlowLoss(), column(s / t) * (f - z) + gap * (v @ w.T + b))
    check(ConsistencyLoss(boundary=0.0), gap * (v @ w.T + b))
    u, own = (z_t - f) / column(t), (z_t - net(z_t, t, t)) / column(t)
    slope = (own - own @ w.T - b) / column(t) - (z_t - f) / column(t) ** 2
    check(PixelMeanFlowLoss(floor=0.0), u + gap * slope - v)
    r = t - 0.25 * (t - s)
    z_r = LINEAR.perturb(z, noise, r)[0]
    check(MeanFlowLoss(gap=0.25), f - (0.25 * gap * v + column(r - s) * net(z_r, r, s)) / gap)


@settings(max_examples=10)
@given(pairs(rows=5, inside=True, gap=0.05), seeds, st.booleans())
def test_an_auxiliary_head_is_the_own_velocity_and_is_regressed_on_the_same_one(
    times, seed, literal
):
    (t, s), gap = times, column(times[0] - times[1])
    w, b, h, c = (normal(seed + i, *shape) for i, shape in enumerate([(3, 3), (3,)] * 2))
    w.requires_grad_()
    h.requires_grad_()
    z, noise = normal(seed + 5, 5, 3), normal(seed + 6, 5, 3)
    z_t, v = LINEAR.perturb(z, noise, t)

    def net(z, t, s):
        return z @ w.T + column(t) * b, z @ h.T + column(s) * c

    out = ImprovedMeanFlowLoss(head=True, literal=literal)(net, z, noise=noise, t=t, s=s)
    slope = (net(z_t, t, t)[1] @ w.T + b).detach()
    trunk, head = net(z_t, t, s)
    wanted = (trunk + gap * slope - v).square().mean(1) + (head - v).square().mean(1)
    close(out.loss, wanted, 1e-9)
    found, asked = (torch.autograd.grad(loss.sum(), [w, h]) for loss in (out.loss, wanted))
    for a, b in zip(found, asked, strict=True):
        close(a, b, 1e-8)


@settings(max_examples=5)
@given(pairs(rows=5, diagonal=True), seeds)
def test_improved_mean_flow_along_the_conditional_velocity_is_mean_flow(times, seed):
    (t, s), net, z, noise = times, Net(), normal(seed, 5, 3), normal(seed + 1, 5, 3)
    first, second = (
        loss_fn(net, z, noise=noise, t=t, s=s)
        for loss_fn in (ImprovedMeanFlowLoss(own_tangent=False), MeanFlowLoss())
    )
    equal(first, second, net)
    close(first.target, second.target)


@pytest.mark.parametrize("name", ["head", "own_tangent"])
def test_switches_are_true_or_false(name):
    with pytest.raises(InputError, match=f"got {name} = 'yes'"):
        ImprovedMeanFlowLoss(**{name: "yes"})
    with pytest.raises(InputError, match=f"got {name} = 'yes'"):
        PixelMeanFlowLoss(**{name: "yes"})


@pytest.mark.parametrize("output", [3, [1, 2, 3], (torch.ones(2, 3),)])
def test_a_model_with_a_head_returns_two_tensors(output):
    with pytest.raises(InputError, match=r"with head=True; return \(u, v\)"):
        ImprovedMeanFlowLoss(head=True)(lambda z, t, s: output, torch.ones(2, 3))


def test_eulers_path_is_the_step_of_the_average_velocity():
    data, noise = Gaussian.random(LINEAR, 0), normal(0, 4, 3)
    grid = torch.linspace(1, 0, 6, dtype=torch.float64)
    path = Euler().path(lambda z, t: data.velocity(z, t), noise, grid)
    flow = FlowMap(lambda z, t, s: data.velocity(z, t), LINEAR, MeanFlowLoss().statistic)
    close(path[-1], flow.sample(noise, steps=5))


def test_published_numbers_are_the_references():
    mean, improved, pixel = (
        cls.published() for cls in (MeanFlowLoss, ImprovedMeanFlowLoss, PixelMeanFlowLoss)
    )
    for loss_fn, share, mean_t, spread, first in (
        (mean, 0.75, -0.4, 1.0, False),
        (improved, 0.5, -0.4, 1.0, False),
        (pixel, 0.5, 0.8, 0.8, True),
    ):
        times, penalty = loss_fn.times, loss_fn.penalty
        assert (times.equal, times.mask_first, times.times.mean, times.times.spread) == (
            share,
            first,
            mean_t,
            spread,
        )
        assert (penalty.p, penalty.c, penalty.penalty.summed) == (1.0, 0.01, True)
    alpha = AlphaFlowLoss.published(gap=0.2)
    assert (alpha.times.equal, alpha.penalty.c, alpha.penalty.penalty.summed, alpha.bound) == (
        0.5,
        1e-3,
        False,
        4.0,
    )
    assert alpha.times == TimePairs(LogitNormalTimes(-0.4, 1.0))
    assert FlowMatchingLoss.published() == FlowMatchingLoss()
    dim = 768 * 16 * 16
    matching = TrajectoryMatchingLoss.published(dim, teacher=torch.sin)
    assert (matching.steps, matching.pairs, matching.trajectories) == (16, 64, 2)
    assert matching.penalty == SquaredError() and matching.shift == (dim / 4096) ** 0.5
    distilled = MeanFlowDistillationLoss.published(dim, teacher=torch.sin)
    assert distilled.times == TimePairs(ShiftedTimes(dim), equal=0.0)
    assert distilled.penalty == SquaredError(summed=True) and distilled.mix == 1
    assert distilled.derivative == FiniteDifference(step=0.005)
    t, s = distilled.times(1000, generator=torch.Generator().manual_seed(0))
    assert (t > s).all()


def test_a_teacher_gets_no_gradient_and_is_not_asked_where_nothing_is_mixed_in():
    net, teacher, asked = Net(), Net(seed=5), []

    def taught(z, t):
        asked.append(len(z))
        return teacher(z, t, t)

    z, noise = normal(0, 3, 3), normal(1, 3, 3)
    t = torch.tensor([0.3, 0.6, 0.9]).double()
    given_ = {"noise": noise, "t": t, "s": t / 2}
    for literal in (False, True):
        loss_fn = MeanFlowDistillationLoss(teacher=taught, literal=literal)
        loss_fn(net, z, **given_).loss.sum().backward()
    assert len(asked) == 2 and net.first.grad is not None
    assert teacher.first.grad is None and teacher.second.grad is None
    plain = MeanFlowDistillationLoss(teacher=taught, mix=0.0)(net, z, **given_)
    equal(plain, MeanFlowLoss()(net, z, **given_), net)
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"mix": 1.001}, "got mix = 1.001"),
        ({"mix": -0.001}, "got mix = -0.001"),
        ({"teacher": 3}, "got teacher = 3"),
        ({"velocity": torch.sin}, "leave velocity out"),
    ],
)
def test_distillation_refuses_what_it_could_not_use(part, says):
    with pytest.raises(InputError, match=says):
        MeanFlowDistillationLoss(**({"teacher": torch.sin} | part))


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"steps": 0}, "got steps = 0"),
        ({"steps": 2.5}, "got steps = 2.5"),
        ({"steps": 3, "pairs": 7}, "got pairs = 7.*3 steps make 6 pairs"),
        ({"pairs": 0}, "got pairs = 0"),
        ({"trajectories": 0}, "got trajectories = 0"),
        ({"trajectories": 2.5}, "got trajectories = 2.5"),
        ({"shift": 0.0}, "got shift = 0.0"),
        ({"shift": float("inf")}, "got shift = inf"),
    ],
)
def test_numbers_of_trajectory_matching_out_of_range_are_refused(part, says):
    with pytest.raises(InputError, match=says):
        TrajectoryMatchingLoss(teacher=torch.sin, **part)


def test_trajectory_matching_takes_all_pairs_there_are_and_no_times():
    loss_fn, z = TrajectoryMatchingLoss(teacher=lambda z, t: -z, steps=3, pairs=6), normal(0, 2, 3)
    out = loss_fn(lambda z, t, s: z, z, noise=z)
    assert len(set(zip(out.t.tolist(), out.s.tolist(), strict=True))) == 6
    assert loss_fn.grid(z.bfloat16()).dtype == torch.float32
    for times in ({"t": torch.ones(2)}, {"s": torch.zeros(2)}):
        with pytest.raises(TimeError, match="leave them out"):
            loss_fn(lambda z, t, s: z, z, **times)


def test_the_generator_alone_decides_trajectories_and_pairs():
    loss_fn, z = TrajectoryMatchingLoss(teacher=lambda z, t: -z, steps=5, pairs=4), normal(0, 2, 3)
    before = torch.get_rng_state()
    first, again, other = (
        loss_fn(lambda z, t, s: z, z, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.z_t, again.z_t) and torch.equal(first.s, again.s)
    assert not torch.equal(first.z_t, other.z_t) and not torch.equal(first.s, other.s)


def test_the_literal_form_of_trajectory_matching_has_its_gradient_through_a_f_alone():
    net, z = Net(), normal(0, 2, 3)
    loss_fn = TrajectoryMatchingLoss(
        teacher=lambda z, t: -z, steps=3, statistic=MatchedStatistic(), literal=True
    )
    out = loss_fn(net, z, noise=z)
    weight = column(loss_fn.coefficients.prediction(out.t, out.s))
    wanted = (2 * out.residual * weight * net(out.z_t, out.t, out.s)).mean(1)
    found, asked = (
        torch.autograd.grad(loss.sum(), list(net.parameters())) for loss in (out.loss, wanted)
    )
    for a, b in zip(found, asked, strict=True):
        close(a, b, 1e-9)


@pytest.mark.parametrize(("steps", "evaluations"), [(1, [2]), (3, [12])])
def test_pairs_are_evaluated_once_where_the_model_draws_and_where_there_is_one(steps, evaluations):
    """A second draw would be another value of a model that mixes nothing."""
    calls, z = [], normal(0, 2, 3)

    def model(z, t, s):
        calls.append(len(z))
        if steps == 1:
            return z
        return z + torch.rand_like(z)

    TrajectoryMatchingLoss(teacher=lambda z, t: -z, steps=steps)(model, z, noise=z)
    assert calls == evaluations


@pytest.mark.parametrize(
    "part", [{"gap": 0.1}, {"guidance": Guidance(null={"y": 0})}, {"velocity": torch.sin}]
)
def test_trajectory_matching_refuses_what_it_would_not_use(part):
    with pytest.raises(InputError, match="guide the teacher"):
        TrajectoryMatchingLoss(teacher=torch.sin, **part)


def test_alpha_flows_targets_are_bounded_and_its_alpha_falls_from_one_to_zero():
    t, s = torch.tensor([[0.9, 0.5], [0.2, 0.5]], dtype=torch.float64)
    z, noise = normal(0, 2, 3), normal(1, 2, 3)
    free, bound = (
        AlphaFlowLoss(gap=0.2, bound=b)(lambda z, t, s: 9 * z, z, noise=noise, t=t, s=s)
        for b in (torch.inf, 0.5)
    )
    close(bound.target, free.target.clamp(-0.5, 0.5))
    values = [alpha_at(i / 100) for i in range(101)]
    assert values == sorted(values, reverse=True) and (values[0], values[50], values[-1]) == (
        1.0,
        0.5,
        0.0,
    )


def test_below_the_floor_prediction_and_target_are_images_and_velocities_are_divided_by_it():
    net, z, noise = Net(), normal(0, 4, 3), normal(1, 4, 3)
    t = torch.tensor([0.02, 0.049, 0.07, 0.6]).double()
    z_t = LINEAR.perturb(z, noise, t)[0]
    for s in (t, t / 2):
        out = PixelMeanFlowLoss()(net, z, noise=noise, t=t, s=s)
        close(out.prediction, net(z_t, t, s))
        close(out.velocity, (z_t - z) / column(t.clamp(min=0.05)))
        if s is t:
            close(out.target, z)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"floor": 1.0}, "got floor = 1.0"),
        ({"floor": -0.01}, "got floor = -0.01"),
        ({"perceptual_below": 1.01}, "got perceptual_below = 1.01"),
        ({"perceptual_below": -0.01}, "got perceptual_below = -0.01"),
        ({"statistic": Statistic("1", "-1")}, "leave it out"),
    ],
)
def test_pixel_mean_flow_refuses_what_is_no_time_and_another_statistic(part, says):
    with pytest.raises(InputError, match=says):
        PixelMeanFlowLoss(**part)


def test_pixel_mean_flow_has_the_references_numbers_and_refuses_other_shapes():
    assert (PixelMeanFlowLoss().floor, PixelMeanFlowLoss().perceptual_below) == (0.05, 0.8)
    with pytest.raises(InputError, match="both images"):
        PixelMeanFlowLoss()(lambda z, t, s: z[:, :1], normal(0, 2, 3))


def test_perceptual_losses_of_pixel_mean_flow_see_rows_near_the_data():
    loss_fn, z = PixelMeanFlowLoss(perceptual_below=0.6), normal(0, 3, 3)
    t = torch.tensor([0.5, 0.6, 0.9], dtype=torch.float64)
    assert loss_fn.perceptual_mask(loss_fn(Net(), z, t=t, s=t / 2)).tolist() == [
        True,
        False,
        False,
    ]
