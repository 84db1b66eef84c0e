"""The reference itself: its closed forms satisfy the equations that define them."""

import torch
from gaussian import Gaussian, column, matched_pair
from hypothesis import given, settings
from strategies import formula_schedules, normal, pairs, seeds
from tolerances import DERIVED, within

close = within(DERIVED)


@settings(max_examples=15)
@given(formula_schedules, pairs(inside=True), seeds)
def test_the_flow_map_solves_the_ode_and_its_parts_add_up(schedule, times, seed):
    (t, s), data = times, Gaussian.random(schedule, seed)
    z_t = data.sample_state(t, seed)
    speed = torch.func.jvp(lambda u: data.transported(z_t, t, u), (s,), (torch.ones_like(s),))[1]
    close(speed, data.velocity(data.transported(z_t, t, s), s))
    close(data.transported(z_t, t, t), z_t)
    mixed = schedule.perturb(data.clean(z_t, t), data.grain(z_t, t), t)
    close(mixed[0], z_t)
    close(mixed[1], data.velocity(z_t, t))


def test_the_posterior_mean_is_that_of_the_samples():
    from flowspace import LinearSchedule

    data, rows = Gaussian.random(LinearSchedule(), 0), 200_000
    z = data.mean + (normal(0, rows, 3) * data.spread) @ data.rotation.T
    t = torch.full((rows,), 0.4, dtype=torch.float64)
    z_t, _ = data.schedule.perturb(z, normal(1, rows, 3), t)
    error = z - data.clean(z_t, t)
    for moment in (error, error * z_t):
        assert (moment.mean(0).abs() < 5 * moment.std(0) / rows**0.5).all()


@settings(max_examples=10)
@given(formula_schedules, pairs(inside=True, gap=0.1), seeds)
def test_across_spaces_it_is_the_integral_of_the_posterior_means_along_the_path(
    schedule, times, seed
):
    """f/delta = integral_s^t kappa(s) lambda'(tau) E[x | z_tau] dtau, by Simpson's rule."""
    (t, s), data = (times[0], times[0] / 3 + times[1] / 2), Gaussian.random(schedule, seed)
    z_t = data.sample_state(t, seed)
    matrix, offset = normal(seed + 3, 5, 3), normal(seed + 4, 5)
    gamma, delta = matched_pair(schedule)
    panels = 200
    total = torch.zeros(len(t), 5, dtype=torch.float64)
    for i in range(panels + 1):
        tau = s + (t - s) * i / panels
        weight = (1 if i in (0, panels) else 4 if i % 2 else 2) / 3 * (t - s) / panels
        image = data.clean(data.transported(z_t, t, tau), tau) @ matrix.T + offset
        total = total + column(weight * schedule.signal_to_noise_dot(tau)) * image
    wanted = column(delta(t, s) * schedule.beta(s)) * total
    close(data.across(matrix, offset, gamma, delta)(z_t, t, s), wanted, 1e-4)
    close(wanted, data.matched()(z_t, t, s) @ matrix.T + offset, 1e-4)
