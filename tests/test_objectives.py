"""The laws of the losses: what the residual, the target and the gradient are, for every statistic
and schedule.
"""

import math
import pickle
from dataclasses import replace

import pytest
import torch
from gaussian import Gaussian, column
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Net
from strategies import (
    ANCHORED_DELTAS,
    PRESETS,
    any_statistics_for,
    coefficients,
    cross_flow,
    derived,
    normal,
    pairs,
    schedules,
    seeds,
    statistics_for,
)
from tolerances import TRAINED, within

from flowspace import (
    AbsoluteError,
    Adaptive,
    ConsistencyLoss,
    ConsistencyStatistic,
    CriterionError,
    CrossFlowLoss,
    FiniteDifference,
    FlowMatchingLoss,
    FlowspaceError,
    ForwardMode,
    HuberError,
    ImprovedMeanFlowLoss,
    InputError,
    LogitNormalTimes,
    MatchedStatistic,
    MeanFlowLoss,
    MeanFlowStatistic,
    PixelMeanFlowLoss,
    PowerTimes,
    Schedule,
    SquaredError,
    Statistic,
    TimeError,
    TimePairs,
    UniformTimes,
)

LINEAR, COSINE = PRESETS["linear"], PRESETS["cosine"]
LOSSES = [CrossFlowLoss(), MeanFlowLoss(), FlowMatchingLoss(), ConsistencyLoss()]
each_loss = pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda loss_fn: type(loss_fn).__name__)


def batch(seed, rows, dim=3, out=None):
    return normal(seed, rows, dim), normal(seed + 1, rows, out or dim), normal(seed + 2, rows, dim)


close = within(TRAINED)


def gradients(loss, net):
    return torch.autograd.grad(loss.sum(), list(net.parameters()), retain_graph=True)


def total_derivative(net, z_t, v, t, s):
    return torch.func.jvp(lambda z, u: net(z, u, s), (z_t, t), (v, torch.ones_like(t)))[1].detach()


# --- Gaussian data: the exact f has a residual of zero conditional mean
# ----------------------------------------------
#
# f of a Gaussian is affine in z_t, so the conditional mean of the residual given z_t is the
# residual at the conditional means: with E[z | z_t] for the latents and E[eps | z_t] for the
# noise, the state is z_t itself and its velocity the marginal one.


def mean_residual(loss_fn, data, model, t, s, seed, targets=lambda clean: clean):
    z_t = data.sample_state(t, seed)
    clean, grain = data.clean(z_t, t), data.grain(z_t, t)
    out = loss_fn(model, clean, targets(clean), noise=grain, t=t, s=s)
    torch.testing.assert_close(out.z_t, z_t, rtol=1e-11, atol=1e-11)
    return out.residual / column(loss_fn.coefficients.scale(t, s))


@settings(max_examples=40)
@given(st.data(), schedules, seeds)
def test_the_exact_statistic_has_a_residual_of_zero_mean_and_a_perturbed_one_has_not(
    draws, schedule, seed
):
    t, s = draws.draw(pairs(rows=6, diagonal=True))
    data, loss_fn = Gaussian.random(schedule, seed), cross_flow(schedule)
    residual = mean_residual(loss_fn, data, data.matched(), t, s, seed)
    close(residual, torch.zeros_like(residual), 1e-6)
    exact = data.matched()
    perturbed = mean_residual(
        loss_fn, data, lambda z, t, s: exact(z, t, s) + 0.1 * column(1 + t), t, s, seed
    )
    moves = (
        loss_fn.coefficients.prediction(t, s).abs() + loss_fn.coefficients.derivative(t, s).abs()
        > 1e-6
    )
    assert (perturbed.abs().amax(1)[moves] > 1e-3).all()


@settings(max_examples=40)
@given(st.data(), schedules, seeds)
def test_so_has_every_statistic_that_meets_criterion_1(draws, schedule, seed):
    statistic = draws.draw(statistics_for(schedule))
    t, s = draws.draw(pairs(inside=True, gap=0.05))
    data = Gaussian.random(schedule, seed)
    written = statistic.on(schedule) if isinstance(statistic, MatchedStatistic) else statistic
    model = data.statistic(written.gamma, written.delta)
    loss_fn = cross_flow(schedule, statistic)
    residual = mean_residual(loss_fn, data, model, t, s, seed)
    close(residual, torch.zeros_like(residual), 1e-6)
    wrong = mean_residual(loss_fn, data, lambda *x: 1.1 * model(*x), t, s, seed)
    # By linearity R of 1.1 f is 1.1 c x - c x.
    c = loss_fn.coefficients
    left = column(0.1 * c.data(t, s) / c.scale(t, s)) * data.clean(data.sample_state(t, seed), t)
    close(wrong, left, 1e-6)


@settings(max_examples=40)
@given(st.data(), schedules, seeds)
def test_so_has_every_statistic_by_identity_one(draws, schedule, seed):
    statistic = draws.draw(any_statistics_for(schedule))
    t, s = draws.draw(pairs(inside=True, gap=0.05))
    data, loss_fn = (
        Gaussian.random(schedule, seed),
        MeanFlowLoss(schedule=schedule, statistic=statistic),
    )
    written = statistic.on(schedule) if isinstance(statistic, MatchedStatistic) else statistic
    residual = mean_residual(
        loss_fn, data, data.statistic(written.gamma, written.delta), t, s, seed
    )
    close(residual, torch.zeros_like(residual), 1e-6)


@settings(max_examples=30)
@given(st.data(), schedules, seeds)
def test_so_have_the_average_velocity_the_velocity_and_the_consistency_function(
    draws, schedule, seed
):
    t, s = draws.draw(pairs(rows=6, diagonal=True))
    data = Gaussian.random(schedule, seed)
    average = data.average_velocity()
    for loss_fn, model in (
        (MeanFlowLoss(schedule=schedule), average),
        (FlowMatchingLoss(schedule=schedule), lambda z, t, s: data.velocity(z, t)),
        (
            ConsistencyLoss(schedule=schedule, boundary=0.0),
            lambda z, t, s: data.transported(z, t, s.detach()),
        ),
    ):
        here = t if isinstance(loss_fn, FlowMatchingLoss) else s
        residual = mean_residual(loss_fn, data, model, t, here, seed)
        close(residual, torch.zeros_like(residual), 1e-7)


@settings(max_examples=40)
@given(st.data(), schedules, seeds)
def test_so_has_the_matched_statistic_of_images_in_a_space_of_other_dimension(
    draws, schedule, seed
):
    t, s = draws.draw(pairs(rows=6, diagonal=True))
    data, exact = Gaussian.random(schedule, seed), Gaussian.random(schedule, seed).matched()
    matrix, offset = normal(seed + 3, 5, 3), normal(seed + 4, 5)

    def lift(x):
        return x @ matrix.T + offset

    loss_fn = cross_flow(schedule)
    residual = mean_residual(loss_fn, data, lambda z, t, s: lift(exact(z, t, s)), t, s, seed, lift)
    assert residual.shape == (6, 5)
    close(residual, torch.zeros_like(residual), 1e-6)
    wrong = mean_residual(
        loss_fn, data, lambda z, t, s: lift(exact(z, t, s)) - 0.1 * offset, t, s, seed, lift
    )
    assert (wrong.abs().amax(1)[loss_fn.coefficients.prediction(t, s).abs() > 1e-3] > 1e-6).all()


@settings(max_examples=40)
@given(
    st.data(),
    schedules,
    seeds,
    st.sampled_from(ANCHORED_DELTAS),
    st.sampled_from(["s", "sin(pi*s/2)", "(1 + s)/2"]),
)
def test_so_has_every_anchored_statistic_there(draws, schedule, seed, delta, kappa):
    statistic = derived(schedule, kappa, delta)
    t, s = draws.draw(pairs(inside=True, gap=0.05))
    data = Gaussian.random(schedule, seed)
    matrix, offset = normal(seed + 3, 5, 3), normal(seed + 4, 5)
    model = data.across(matrix, offset, statistic.gamma, statistic.delta)
    loss_fn = cross_flow(schedule, statistic)
    residual = mean_residual(loss_fn, data, model, t, s, seed, lambda x: x @ matrix.T + offset)
    close(residual, torch.zeros_like(residual), 1e-6)


def test_for_the_exact_statistic_the_mean_over_samples_vanishes_too():
    """The same by plain averaging of the loss's own samples: E[R | z_t] = 0 makes E[R z_t] and
    E[R] zero.
    """
    data, rows = Gaussian.random(LINEAR, 0), 200_000
    latents = data.mean + (normal(1, rows, 3) * data.spread) @ data.rotation.T
    t, s = (
        torch.full((rows,), 0.6, dtype=torch.float64),
        torch.full((rows,), 0.2, dtype=torch.float64),
    )
    out = CrossFlowLoss()(data.matched(), latents, noise=normal(2, rows, 3), t=t, s=s)
    for moment in (out.residual, out.residual * out.z_t, out.residual * out.z_t.square()):
        assert (moment.mean(0).abs() < 5 * moment.std(0) / math.sqrt(rows)).all()
    assert out.residual.std() > 0.1


# --- rows
# -------------------------------------------------------------------------------------------------


@each_loss
@settings(max_examples=10)
@given(times=pairs(rows=5, diagonal=True), seed=seeds)
def test_a_batch_of_different_times_is_a_loop_over_single_times(loss_fn, times, seed):
    net, (z, x, noise) = Net(), batch(seed, 5)
    shift = normal(seed + 5, 5, 3)
    out = loss_fn(net, z, x, noise=noise, t=times[0], s=times[1], cond={"shift": shift})
    for i in range(5):
        row = slice(i, i + 1)
        alone = loss_fn(
            net,
            z[row],
            x[row],
            noise=noise[row],
            t=times[0][row],
            s=times[1][row],
            cond={"shift": shift[row]},
        )
        scalar = loss_fn(
            net,
            z[row],
            x[row],
            noise=noise[row],
            t=times[0][i],
            s=times[1][i],
            cond={"shift": shift[row]},
        )
        for name, whole in zip(out._fields, out, strict=True):
            close(whole[row], getattr(alone, name), 1e-11)
            close(whole[row], getattr(scalar, name), 1e-11)


@each_loss
@pytest.mark.parametrize("derivative", [ForwardMode(), FiniteDifference()], ids=repr)
def test_anchored_statistics_never_differentiate_the_diagonal(loss_fn, derivative):
    if isinstance(loss_fn, ConsistencyLoss):
        pytest.skip("b(t,t) = -1: not anchored")
    t = torch.tensor([0.5, 0.6, 0.7, 1.0], dtype=torch.float64)
    s = torch.tensor([0.5, 0.2, 0.7, 0.0], dtype=torch.float64)
    calls = []

    def model(z, t_, s_, row):
        calls.append(row.tolist())
        return torch.tanh(z) * column(1 + t_)

    loss_fn = replace(loss_fn, derivative=derivative)
    z, x, noise = batch(0, 4)
    loss_fn(model, z, x, noise=noise, t=t, s=s, cond={"row": torch.arange(4)})
    assert calls[0] == [0, 1, 2, 3]
    if isinstance(loss_fn, FlowMatchingLoss):
        assert len(calls) == 1
    else:
        assert len(calls) > 1 and all(call == [1, 3] for call in calls[1:])
        calls.clear()
        loss_fn(model, z, x, noise=noise, t=t, s=t, cond={"row": torch.arange(4)})
        assert len(calls) == 1


def test_a_statistic_that_is_not_anchored_is_differentiated_on_the_diagonal():
    statistic = Statistic.from_kappa(LINEAR, "s", "t/s")
    loss_fn, net, (z, x, noise) = cross_flow(LINEAR, statistic), Net(), batch(0, 3)
    t = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    out = loss_fn(net, z, x, noise=noise, t=t, s=t)
    z_t, v = LINEAR.perturb(z, noise, t)
    c = loss_fn.coefficients
    a, b, data = (column(f(t, t)) for f in (c.prediction, c.derivative, c.data))
    close(out.residual, a * net(z_t, t, t) + b * total_derivative(net, z_t, v, t, t) - data * x)


@pytest.mark.parametrize("derivative", [ForwardMode(), FiniteDifference()], ids=repr)
def test_the_destination_is_a_constant_of_the_derivative(derivative):
    """The tangent is (v, 1, 0): a model with an infinite slope in s, such as sqrt(s) at s = 0, has
    a finite D_t f.
    """
    t, s = tensor(0.5, 1.0), tensor(0.0, 0.0)
    loss_fn, z = CrossFlowLoss(derivative=derivative), normal(0, 2, 3)
    out = loss_fn(lambda z, t, s: z * column(1 + s.sqrt()), z, t=t, s=s)
    assert out.target.isfinite().all()


@pytest.mark.parametrize("derivative", [ForwardMode(), FiniteDifference()], ids=repr)
@each_loss
def test_one_time_for_all_rows_is_that_time_in_every_row(loss_fn, derivative):
    loss_fn, net, (z, x, noise) = replace(loss_fn, derivative=derivative), Net(), batch(0, 4)
    for schedule in (LINEAR, Schedule(lambda t: 1 - t, lambda t: t)):
        made = replace(loss_fn, schedule=schedule)
        one = made(net, z, x, noise=noise, t=tensor(0.5)[0], s=tensor(0.25)[0])
        each = made(
            net,
            z,
            x,
            noise=noise,
            t=torch.full((4,), 0.5).double(),
            s=torch.full((4,), 0.25).double(),
        )
        for a, b in zip(one, each, strict=True):
            close(a, b, 1e-12)


@settings(max_examples=15)
@given(schedules, pairs(rows=5, diagonal=True), seeds)
def test_the_routes_agree_in_the_loss(schedule, times, seed):
    net, (z, x, noise) = Net(), batch(seed, 5)
    exact, near = (
        cross_flow(schedule, None, derivative=route)(
            net, z, x, noise=noise, t=times[0], s=times[1]
        )
        for route in (ForwardMode(), FiniteDifference(1e-4))
    )
    close(near.target, exact.target, 1e-4)


# --- the target form
# -------------------------------------------------------------------------------------------------

WEIGHTS = [None, lambda t, s: 1 + t - s]
PENALTIES = [
    SquaredError(),
    AbsoluteError(),
    HuberError(0.5),
    Adaptive(),
    SquaredError(summed=True),
]


@settings(max_examples=40)
@given(st.data(), schedules, seeds, st.sampled_from(WEIGHTS), st.sampled_from(PENALTIES))
def test_the_gradient_is_that_of_a_distance_to_a_constant_target(
    draws, schedule, seed, weight, penalty
):
    statistic = draws.draw(statistics_for(schedule))
    t, s = draws.draw(pairs(rows=5, inside=True))
    net, (z, x, noise) = Net(), batch(seed, 5)
    loss_fn = replace(cross_flow(schedule, statistic), weight=weight, penalty=penalty)
    out = loss_fn(net, z, x, noise=noise, t=t, s=s)
    assert (
        not out.target.requires_grad
        and not out.residual.requires_grad
        and out.prediction.requires_grad
    )
    target = out.target.clone()
    c = coefficients(schedule, statistic)
    close(target, out.prediction.detach() - out.residual / column(c.scale(t, s)), 1e-12)
    w = 1 if weight is None else column(weight(t, s))
    wanted = penalty(w * (net(out.z_t, t, s) - target))
    close(out.loss, wanted, 1e-12)
    for found, asked in zip(gradients(out.loss, net), gradients(wanted, net), strict=True):
        close(found, asked, 1e-11)


@settings(max_examples=30)
@given(st.data(), schedules, seeds, st.sampled_from(WEIGHTS), st.sampled_from(PENALTIES))
def test_in_the_literal_form_the_gradient_flows_through_a_f_alone(
    draws, schedule, seed, weight, penalty
):
    statistic = draws.draw(statistics_for(schedule))
    t, s = draws.draw(pairs(rows=5, inside=True))
    net, (z, x, noise) = Net(), batch(seed, 5)
    loss_fn = replace(
        cross_flow(schedule, statistic), weight=weight, penalty=penalty, literal=True
    )
    out = loss_fn(net, z, x, noise=noise, t=t, s=s)
    z_t, v = schedule.perturb(z, noise, t)
    c = coefficients(schedule, statistic)
    a, b, data = (column(f(t, s)) for f in (c.prediction, c.derivative, c.data))
    residual = a * net(z_t, t, s) + (b * total_derivative(net, z_t, v, t, s) - data * x).detach()
    wanted = penalty((1 if weight is None else column(weight(t, s))) * residual)
    close(out.residual, residual.detach(), 1e-8)
    close(out.loss, wanted, 1e-7)
    for found, asked in zip(gradients(out.loss, net), gradients(wanted, net), strict=True):
        close(found, asked, 1e-7)


def test_the_literal_form_of_the_linear_schedule_is_the_papers_loss():
    t, s = torch.tensor([0.9, 0.5, 0.7]).double(), torch.tensor([0.3, 0.5, 0.0]).double()
    net, (z, x, noise) = Net(), batch(3, 3)
    out = CrossFlowLoss(literal=True, penalty=AbsoluteError())(net, z, x, noise=noise, t=t, s=s)
    z_t = column(1 - t) * z + column(t) * noise
    f, df = net(z_t, t, s), total_derivative(net, z_t, noise - z, t, s)
    wanted = (column(s / t**2) * (f - x) + column(1 - s / t) * df).abs().mean(1)
    close(out.loss, wanted)
    for found, asked in zip(gradients(out.loss, net), gradients(wanted, net), strict=True):
        close(found, asked)
    at_zero = gradients(out.loss[2], net)
    assert all(
        (gradient == 0).all() for gradient in at_zero
    )  # the factor a vanishes where one samples


@settings(max_examples=30)
@given(pairs(rows=6, diagonal=True), seeds)
def test_the_linear_target_mixes_the_data_with_the_prediction_one_time_ahead(times, seed):
    t, s = times
    net, (z, x, noise) = Net(), batch(seed, 6)
    out = CrossFlowLoss()(net, z, x, noise=noise, t=t, s=s)
    z_t = column(1 - t) * z + column(t) * noise
    f, df, share = (
        net(z_t, t, s).detach(),
        total_derivative(net, z_t, noise - z, t, s),
        column(s / t),
    )
    close(out.z_t, z_t, 1e-12)
    close(out.target, share * x + (1 - share) * (f - column(t) * df))
    close(-out.residual, column(s / t**2) * (f - x) + (1 - share) * df)


@settings(max_examples=30)
@given(schedules, pairs(rows=5, diagonal=True), seeds)
def test_the_target_on_the_diagonal_is_the_data(schedule, times, seed):
    t = times[0].clamp(max=0.999)
    net, (z, x, noise) = Net(), batch(seed, 5)
    out = cross_flow(schedule)(net, z, x, noise=noise, t=t, s=t)
    close(out.target, x, 1e-5 if schedule.functions[0].expression is None else 1e-9)


@pytest.mark.parametrize("beta", ["t", "sin(pi*t/2)", "t**2", "1 - (1 - t)**2"])
@pytest.mark.parametrize(
    "alpha", ["(1 - t)**2", "(1 - t)**3", "1 - sin(pi*t/2)", "cos(pi*t/2)**2"]
)
@pytest.mark.parametrize("written_out", [False, True])
def test_where_signal_to_noise_stands_still_the_target_is_data_or_nothing_is_learned(
    alpha, beta, written_out
):
    """lambda'(1) = 0: R is 0 f - 0 x at t = s = 1, and the target y* = f - R/m keeps f or is x."""
    schedule = Schedule(alpha, beta)
    statistic = MatchedStatistic()
    if written_out:
        statistic = statistic.on(schedule)
    net, (z, x, noise) = Net(), batch(0, 2)
    ones = torch.ones(2, dtype=torch.float64)
    out = CrossFlowLoss(schedule=schedule, statistic=statistic)(
        net, z, x, noise=noise, t=ones, s=ones
    )
    if bool((out.target - out.prediction).abs().max() > 1e-9):
        close(out.target, x)


# --- the statistics of the table
# -------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(schedules, pairs(rows=6, diagonal=True), seeds)
def test_mean_flow(schedule, times, seed):
    t, s = times
    net, (z, _, noise) = Net(), batch(seed, 6)
    out = MeanFlowLoss(schedule=schedule)(net, z, noise=noise, t=t, s=s)
    z_t, v = schedule.perturb(z, noise, t)
    f, df = net(z_t, t, s).detach(), total_derivative(net, z_t, v, t, s)
    close(out.residual, f + column(t - s) * df - v)
    close(out.target, v - column(t - s) * df)


@settings(max_examples=20)
@given(schedules, pairs(rows=6), seeds)
def test_flow_matching_is_mean_flow_on_the_diagonal(schedule, times, seed):
    t, s = times
    net, (z, _, noise) = Net(), batch(seed, 6)
    flow = FlowMatchingLoss(schedule=schedule)(net, z, noise=noise, t=t, s=s)
    mean = MeanFlowLoss(schedule=schedule)(net, z, noise=noise, t=t, s=t)
    for name in flow._fields:
        close(getattr(flow, name), getattr(mean, name), 1e-14)
    close(flow.target, schedule.perturb(z, noise, t)[1], 1e-12)
    for found, asked in zip(gradients(flow.loss, net), gradients(mean.loss, net), strict=True):
        close(found, asked, 1e-14)


@settings(max_examples=20)
@given(schedules, pairs(rows=6, diagonal=True), seeds)
def test_consistency(schedule, times, seed):
    t, s = times
    net, (z, x, noise) = Net(out=4), batch(seed, 6, out=4)
    out = ConsistencyLoss(schedule=schedule, boundary=0.0)(net, z, x, noise=noise, t=t, s=s)
    z_t, v = schedule.perturb(z, noise, t)
    f, df = net(z_t, t, s).detach(), total_derivative(net, z_t, v, t, s)
    close(out.residual, -df)
    close(out.target, f - column(t - s) * df)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_boundary_of_consistency_ties_it_to_the_data(share):
    """Targets are those of s = 0, whatever the destinations of the rows are."""
    net, (z, x, noise) = Net(out=4), batch(0, 3, out=4)
    t = torch.tensor([0.3, 0.6, 1.0]).double()
    s = share * t
    plain, tied = (
        ConsistencyLoss(boundary=weight)(net, z, x, noise=noise, t=t, s=s).loss
        for weight in (0.0, 0.5)
    )
    floor = torch.full((3,), 0.01, dtype=torch.float64)
    edge = net(0.99 * z + 0.01 * noise, floor, 0 * floor) - x
    close(tied - plain, 0.5 * edge.square().mean(1))


def test_a_boundary_of_weight_zero_costs_no_evaluation():
    z, calls = normal(0, 3, 3), []

    def model(z, t, s):
        calls.append(len(z))
        return torch.tanh(z)

    counts = []
    for weight in (0.0, 1.0):
        calls.clear()
        ConsistencyLoss(boundary=weight)(model, z, t=tensor(0.3, 0.6, 1), s=tensor(0, 0, 0))
        counts.append(len(calls))
    assert counts[1] == counts[0] + 1


def test_a_velocity_replaces_the_conditional_one_in_target_and_tangent():
    net, (z, _, noise) = Net(), batch(0, 4)
    t, s = torch.tensor([0.3, 0.6, 0.8, 1.0]).double(), torch.tensor([0.1, 0.6, 0.5, 0.0]).double()

    def teacher(z_t, t, shift):
        return torch.sin(z_t) * column(t) + shift

    def student(z, t, s, shift):
        return net(z, t, s)

    shift = normal(9, 4, 3)
    out = MeanFlowLoss(velocity=teacher)(student, z, noise=noise, t=t, s=s, cond={"shift": shift})
    z_t, _ = LINEAR.perturb(z, noise, t)
    v = teacher(z_t, t, shift)
    close(out.target, v - column(t - s) * total_derivative(net, z_t, v, t, s))
    shifted = CrossFlowLoss(velocity=teacher)(
        student, z, noise=noise, t=t, s=s, cond={"shift": shift}
    )
    f, share = net(z_t, t, s).detach(), column(s / t)
    close(
        shifted.target,
        share * z + (1 - share) * (f - column(t) * total_derivative(net, z_t, v, t, s)),
    )


# --- invariances
# -------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(schedules, pairs(rows=5, diagonal=True), seeds, st.sampled_from([-2.0, -1.0, 0.25, 3.0]))
def test_a_statistic_scaled_by_a_constant_scales_f_and_its_target_and_nothing_else(
    schedule, times, seed, factor
):
    """gamma, delta -> k gamma, k delta: the same network times k has the same residual, and k
    times the target.
    """
    written = derived(schedule, "s", "-t/(t - s)")
    if written.gamma.expression is not None:
        scaled = Statistic(factor * written.gamma.expression, factor * written.delta.expression)
    else:
        scaled = Statistic(
            lambda t, s: factor * written.gamma(t, s), lambda t, s: factor * written.delta(t, s)
        )
    net, (z, x, noise) = Net(), batch(seed, 5)
    options = {"noise": noise, "t": times[0], "s": times[1]}
    plain = cross_flow(schedule, written)(net, z, x, **options)
    found = CrossFlowLoss(schedule=schedule, statistic=scaled, check=False)(
        lambda *arguments: factor * net(*arguments), z, x, **options
    )
    tolerance = 1e-8 if written.gamma.expression is not None else 1e-4
    close(found.target, factor * plain.target, tolerance)
    close(found.residual, plain.residual, tolerance)
    close(found.prediction, factor * plain.prediction, 1e-12)
    close(found.loss, factor**2 * plain.loss, tolerance)
    for name in ("z_t", "t", "s"):
        assert torch.equal(getattr(found, name), getattr(plain, name))


@settings(max_examples=30)
@given(
    st.sampled_from([LINEAR, COSINE]),
    st.sampled_from(["s", "s*(2 - s)", "(1 + s)/2", "sin(pi*s/2)", "3*s**2"]),
    st.sampled_from(["(1/t - 1/s)", "(cot(pi*t/2) - cot(pi*s/2))", "(1/t - 1/(s + 0.1))", "1/t"]),
    pairs(rows=5, inside=True),
    seeds,
)
def test_the_target_does_not_depend_on_kappa_and_the_literal_residual_is_proportional_to_it(
    schedule, kappa, h, times, seed
):
    net, (z, x, noise) = Net(), batch(seed, 5)
    options = {"noise": noise, "t": times[0], "s": times[1]}
    outs = [
        cross_flow(schedule, derived(schedule, weight, f"1/(({weight})*{h})"))(
            net, z, x, **options
        )
        for weight in (kappa, "1")
    ]
    close(outs[0].target, outs[1].target, 1e-7)
    weight = column(
        coefficients(schedule, derived(schedule, kappa, f"1/(({kappa})*{h})")).scaled_kappa(*times)
    )
    close(outs[0].residual, weight * outs[1].residual, 1e-7)


@settings(max_examples=20)
@given(schedules, pairs(rows=5, diagonal=True), seeds)
def test_the_target_is_bounded_by_the_data_the_prediction_and_its_derivative(
    schedule, times, seed
):
    t, s = times
    net, (z, x, noise) = Net(), batch(seed, 5)
    out = cross_flow(schedule)(net, z, x, noise=noise, t=t, s=s)
    z_t, v = schedule.perturb(z, noise, t)
    size = (
        x.abs()
        + 2 * out.prediction.detach().abs()
        + column(t - s) * total_derivative(net, z_t, v, t, s).abs()
    )
    assert (out.target.abs() <= size * (1 + 1e-5) + 1e-9).all()


# --- dtypes
# -------------------------------------------------------------------------------------------------


class Half(torch.nn.Module):
    """A model that computes in the dtype of its weights."""

    def __init__(self, dtype):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3, dtype=dtype)

    def forward(self, z, t, s):
        return torch.tanh(self.linear(z)) * column(1 + t - s).to(z.dtype)


@each_loss
def test_bfloat16_latents_give_a_float32_residual_and_target(loss_fn):
    torch.manual_seed(0)
    z = normal(0, 8, 3).bfloat16()
    out = loss_fn(Half(torch.bfloat16), z, generator=torch.Generator().manual_seed(0))
    assert out.residual.dtype == out.target.dtype == out.loss.dtype == torch.float32
    assert all(tensor.isfinite().all() for tensor in out)
    out.loss.sum().backward()


@each_loss
@pytest.mark.parametrize("derivative", [ForwardMode(), FiniteDifference()], ids=repr)
def test_under_autocast_residual_and_target_are_float32_and_near_those_without(
    loss_fn, derivative
):
    torch.manual_seed(0)
    loss_fn, net, (z, _, noise) = (
        replace(loss_fn, derivative=derivative),
        Half(torch.float32),
        batch(0, 8),
    )
    z, noise = z.float(), noise.float()
    t = torch.linspace(0.2, 1, 8)
    options = {"noise": noise, "t": t, "s": t / 2}
    plain = loss_fn(net, z, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = loss_fn(net, z, **options)
    assert out.residual.dtype == out.target.dtype == out.loss.dtype == torch.float32
    torch.testing.assert_close(out.target, plain.target, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(out.loss, plain.loss, rtol=6e-2, atol=6e-2)


@pytest.mark.parametrize(
    "loss_fn",
    [*LOSSES, ImprovedMeanFlowLoss(), PixelMeanFlowLoss(), MeanFlowLoss(gap=0.5)],
    ids=lambda loss_fn: type(loss_fn).__name__,
)
def test_under_autocast_every_weight_has_its_gradient(loss_fn):
    """What is evaluated without gradient leaves no casts of the weights: torch 2.9 used them
    again, and most weights had no gradient.
    """
    net, (z, _, noise) = Half(torch.float32), batch(0, 8)
    t = torch.linspace(0.2, 1, 8)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled):
            out = loss_fn(net, z.float(), noise=noise.float(), t=t, s=t / 2)
        found.append(torch.autograd.grad(out.loss.mean(), list(net.parameters())))
    for plain, cast in zip(*found, strict=True):
        torch.testing.assert_close(cast, plain, rtol=0.1, atol=0.1 * float(plain.abs().max()))


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_of_the_latents_comes_out(loss_fn, dtype):
    net, z = Net().to(dtype), normal(0, 6, 3).to(dtype)
    out = loss_fn(net, z, generator=torch.Generator().manual_seed(0))
    assert all(tensor.dtype == dtype for tensor in out)
    assert out.loss.shape == out.t.shape == out.s.shape == (6,)


# --- conditions and randomness
# ---------------------------------------------------------------------------------------


@each_loss
def test_conditions_follow_their_rows(loss_fn):
    net, (z, x, noise) = Net(), batch(0, 6)
    t = torch.linspace(0.2, 1, 6, dtype=torch.float64)
    s = torch.where(torch.arange(6) % 2 == 0, t, t / 2)
    shift, order = normal(8, 6, 3), torch.tensor([3, 1, 5, 0, 2, 4])
    straight = loss_fn(net, z, x, noise=noise, t=t, s=s, cond={"shift": shift})
    turned = loss_fn(
        net,
        z[order],
        x[order],
        noise=noise[order],
        t=t[order],
        s=s[order],
        cond={"shift": shift[order]},
    )
    close(turned.target, straight.target[order], 1e-12)
    close(turned.loss, straight.loss[order], 1e-12)
    other = loss_fn(net, z, x, noise=noise, t=t, s=s, cond={"shift": shift + 1})
    assert not torch.allclose(other.loss, straight.loss)


@each_loss
def test_the_generator_alone_decides_times_and_noise(loss_fn):
    net, z = Net(), normal(0, 16, 3)
    before = torch.get_rng_state()
    first, second = (loss_fn(net, z, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    other = loss_fn(net, z, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(first.z_t, other.z_t)


def test_the_times_are_those_of_the_sampler():
    sampler = TimePairs(LogitNormalTimes(), 0.25)
    out = CrossFlowLoss(times=sampler)(
        Net(), normal(0, 32, 3), generator=torch.Generator().manual_seed(3)
    )
    wanted = sampler(32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.equal(out.t, wanted[0]) and torch.equal(out.s, wanted[1])


def test_the_defaults_are_those_of_the_contract():
    loss_fn = CrossFlowLoss()
    assert (
        loss_fn.schedule == LINEAR
        and loss_fn.statistic == MatchedStatistic()
        and not loss_fn.literal
    )
    assert (
        loss_fn.penalty == SquaredError()
        and isinstance(loss_fn.times, TimePairs)
        and loss_fn.check
    )
    assert loss_fn.times == TimePairs(PowerTimes(2.0), mask_first=True)
    explicit = CrossFlowLoss(
        schedule=LINEAR, statistic=None, times=None, penalty=None, weight=None, derivative=None
    )
    assert explicit == loss_fn
    assert (
        MeanFlowLoss().statistic == MeanFlowStatistic()
        and ConsistencyLoss().statistic == ConsistencyStatistic()
    )


def test_a_model_may_return_another_shape_than_its_state():
    images = normal(0, 4, 1, 5, 5)

    def model(z, t, s):
        return (
            z.mean(1).reshape(-1, 1, 1, 1)
            * torch.ones(1, 1, 5, 5, dtype=z.dtype)
            * t.reshape(-1, 1, 1, 1)
        )

    out = CrossFlowLoss()(
        model, normal(1, 4, 3), images, generator=torch.Generator().manual_seed(0)
    )
    assert (
        out.target.shape == out.prediction.shape == out.residual.shape == images.shape
        and out.z_t.shape == (4, 3)
    )


# --- what is refused
# -------------------------------------------------------------------------------------------------


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


BAD_TIMES = {
    "t above one": ((tensor(0.5, 1.25), tensor(0.1, 0.1)), r"got t = 1\.25, s = 0\.1 in row 1"),
    "t of zero": ((tensor(0.0, 0.5), tensor(0.0, 0.1)), r"got t = 0, s = 0 in row 0"),
    "t below zero": ((tensor(-0.5, 0.5), tensor(0.0, 0.1)), r"t = -0\.5"),
    "t no number": ((tensor(0.5, math.nan), tensor(0.1, 0.1)), "t = nan"),
    "s no number": ((tensor(0.5, 0.5), tensor(0.1, math.nan)), "s = nan"),
    "s below zero": ((tensor(0.5, 0.5), tensor(0.1, -0.125)), r"s = -0\.125"),
    "s above t": (
        (tensor(0.5, 0.5), tensor(0.1, 0.75)),
        r"got t = 0\.5, s = 0\.75 in row 1; s is out of range",
    ),
    "whole t": ((torch.tensor([1, 1]), tensor(0.1, 0.1)), "t of dtype torch.int64"),
    "whole s": ((tensor(0.5, 0.5), torch.tensor([0, 0])), "s of dtype torch.int64"),
    "t too long": ((tensor(0.5, 0.5, 0.5), tensor(0.1, 0.1)), r"t of shape \(3,\)"),
    "s of columns": ((tensor(0.5, 0.5), tensor(0.1, 0.1)[:, None]), r"s of shape \(2, 1\)"),
    "only t": ((tensor(0.5, 0.5), None), "only one of t and s"),
    "only s": ((None, tensor(0.5, 0.5)), "only one of t and s"),
}


@pytest.mark.parametrize("case", BAD_TIMES)
@pytest.mark.parametrize(
    "loss_fn", [CrossFlowLoss(), MeanFlowLoss(), ConsistencyLoss()], ids=lambda x: type(x).__name__
)
def test_times_out_of_range_type_or_shape_are_refused_with_their_values(loss_fn, case):
    (t, s), named = BAD_TIMES[case]
    with pytest.raises(TimeError, match=named):
        loss_fn(Net(), normal(0, 2, 3), t=t, s=s)


@pytest.mark.parametrize("loss_fn", [FlowMatchingLoss(), FlowMatchingLoss.published()], ids=str)
def test_flow_matching_draws_uniform_times_on_the_diagonal(loss_fn):
    """The largest gap to the uniform law over [0.01, 1] is that of 20,000 draws (Kolmogorov)."""
    rows = 20_000
    source = torch.Generator().manual_seed(0)
    out = loss_fn(lambda z, t, s: 0 * z, torch.ones(rows, 1), generator=source)
    assert torch.equal(out.s, out.t)
    ranks = (torch.arange(rows) + 0.5) / rows
    gap = (out.t.sort().values - (0.01 + 0.99 * ranks)).abs().max()
    assert float(gap) < 2 / rows**0.5
    assert float(out.t.mean()) == pytest.approx(0.505, abs=0.01)


def test_flow_matching_accepts_and_ignores_s_but_not_a_wrong_t():
    z = normal(0, 2, 3)
    out = FlowMatchingLoss()(Net(), z, t=tensor(0.5, 1.0), s=tensor(0.1, 0.2))
    assert torch.equal(out.s, out.t)
    FlowMatchingLoss()(Net(), z, t=tensor(0.5, 1.0))
    with pytest.raises(TimeError, match=r"t = 1\.5"):
        FlowMatchingLoss()(Net(), z, t=tensor(0.5, 1.5))


def test_the_ends_of_the_triangle_are_legal_times():
    z = normal(0, 3, 3)
    out = CrossFlowLoss()(Net(), z, t=tensor(1.0, 1.0, 1e-3), s=tensor(0.0, 1.0, 0.0))
    assert all(value.isfinite().all() for value in out)
    one = CrossFlowLoss()(Net(), z, t=torch.tensor(1.0), s=torch.tensor(0.0))
    assert one.t.shape == one.s.shape == (3,)


@each_loss
@pytest.mark.parametrize(
    ("latents", "targets", "named"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), None, "got latents of dtype torch.int64"),
        (torch.tensor(1.0), None, r"got latents of dtype torch.float32 and shape \(\)"),
        ([1.0, 2.0], None, "got latents of type list"),
        (torch.zeros(2, 3), torch.zeros(3, 3), "2 latents and 3 targets"),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3, dtype=torch.uint8),
            "got targets of dtype torch.uint8",
        ),
    ],
)
def test_batches_that_do_not_fit_are_refused(loss_fn, latents, targets, named):
    with pytest.raises(InputError, match=named):
        loss_fn(Net().float(), latents, targets)


@each_loss
def test_noise_and_predictions_of_another_shape_are_refused(loss_fn):
    z = normal(0, 2, 3)
    with pytest.raises(InputError, match=r"\(2, 4\)"):
        loss_fn(Net(), z, noise=normal(0, 2, 4))
    with pytest.raises(InputError, match=r"\(2, 5\).*\(2, 3\)"):
        loss_fn(Net(out=5), z)
    with pytest.raises(InputError, match="tuple"):
        loss_fn(lambda z, t, s: (z, z), z)


@each_loss
@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "linear"},
        {"statistic": "matched"},
        {"times": UniformTimes()},
        {"penalty": torch.nn.MSELoss()},
        {"derivative": "forward"},
        {"derivative": ForwardMode},
    ],
    ids=str,
)
def test_an_option_of_another_kind_is_refused_with_what_to_write(loss_fn, options):
    (name,) = options
    with pytest.raises(InputError, match=f"got {name} = .*; .*write"):
        type(loss_fn)(**options)


@each_loss
def test_a_misspelt_keyword_is_a_type_error(loss_fn):
    with pytest.raises(TypeError):
        type(loss_fn)(shedule=LINEAR)
    with pytest.raises(TypeError):
        loss_fn(Net(), normal(0, 2, 3), nois=normal(1, 2, 3))
    with pytest.raises(TypeError):
        type(loss_fn)(LINEAR)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="boundary = -1"):
        ConsistencyLoss(boundary=-1)
    with pytest.raises(InputError, match="boundary = inf"):
        ConsistencyLoss(boundary=math.inf)
    with pytest.raises(CriterionError, match="write literal=False"):
        ConsistencyLoss(literal=True)
    with pytest.raises(InputError, match=r"got gap = 1.*write less than 1"):
        CrossFlowLoss(gap=1)
    with pytest.raises(CriterionError):
        CrossFlowLoss(statistic=MeanFlowStatistic())
    with pytest.raises(FlowspaceError):
        CrossFlowLoss(schedule=Schedule("1 - t", "t"), statistic=Statistic("1", "-1"))


# --- objects
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss_fn",
    [
        *LOSSES,
        CrossFlowLoss(
            schedule=COSINE, penalty=Adaptive(), derivative=FiniteDifference(), literal=True
        ),
    ],
    ids=lambda loss_fn: type(loss_fn).__name__,
)
def test_an_objective_survives_pickling(loss_fn):
    again = pickle.loads(pickle.dumps(loss_fn))
    assert again == loss_fn
    net, z = Net(), normal(0, 8, 3)
    for a, b in zip(
        *(fn(net, z, generator=torch.Generator().manual_seed(0)) for fn in (loss_fn, again)),
        strict=True,
    ):
        assert torch.equal(a, b)


@each_loss
def test_an_objective_is_frozen(loss_fn):
    with pytest.raises(AttributeError):
        loss_fn.literal = True
