"""The cascade: paths, jumps and samples against closed forms, and against the objectives alone.

Pictures here are normal, so everything is affine in them and their noise: a stage's path has a
mean and a covariance at every time, and its marginal velocity is known.
"""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from flowspace import (
    Cascade,
    CascadeFlow,
    CascadeLoss,
    CascadeStage,
    ConsistencyLoss,
    CrossFlowLoss,
    DormandPrince,
    Euler,
    FlowMatchingLoss,
    FlowspaceError,
    Guidance,
    InputError,
    MeanFlowDistillationLoss,
    MeanFlowLoss,
    MeanFlowStatistic,
    PixelMeanFlowLoss,
    RandomGuidance,
    TimeError,
    TimePairs,
    TrajectoryMatchingLoss,
    UniformTimes,
    VelocityFlow,
)
from flowspace.cascade import PairsOfStage, doubled, halved
from flowspace.cascade import _is_idle as is_idle
from flowspace.cascade import _sent as sent
from flowspace.objectives import engine
from flowspace.training import Draws, KeyedPairs

SIDE, STAGES = 4, 3
counts = st.integers(1, 5)
seeds = st.integers(0, 2**20)


def source(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(*shape, generator=source(seed), dtype=torch.float64)


def model(z, t, s, labels=None):
    """Some network: nonlinear, of every size, that sees both times and a label."""
    rows = (len(z), 1, 1, 1)
    shift = (t - 2 * s).reshape(rows)
    if labels is not None:
        shift = shift + 0.1 * labels.reshape(rows)
    return torch.tanh(z) * (1 + t * s).reshape(rows) + shift


# --- the stages


@pytest.mark.parametrize("k", range(4))
def test_four_stages_are_the_papers(k):
    """The paper's times run the other way: its start and end are 1 - ours."""
    stage, u = Cascade(4)[k], k / 4
    assert 1 - stage.start == pytest.approx(u / (2 - u))
    assert 1 - stage.end == pytest.approx((k + 1) / 4)
    edges = (0, 175, 426, 719, 1000)  # of the published sampler, in thousandths
    low, high = stage.window
    assert (1 - high) * 1000 == pytest.approx(edges[k], abs=1)
    assert (1 - low) * 1000 == pytest.approx(edges[k + 1], abs=1)


@given(count=counts, t=st.floats(0, 1))
def test_windows_fill_the_networks_time_in_order(count, t):
    windows = [stage.window for stage in Cascade(count)]
    assert windows[0][1] == 1 and windows[-1][0] == 0
    for (low, _), (_, high) in itertools.pairwise(windows):
        assert low == high
    for stage in Cascade(count):
        low, high = stage.window
        times = stage.global_time(torch.tensor([0.0, t, 1.0], dtype=torch.float64))
        torch.testing.assert_close(
            times, torch.tensor([low, low + t * (high - low), high], dtype=torch.float64)
        )


def test_a_stage_hands_the_network_its_own_window_and_nothing_else_changes():
    stage = Cascade(4)[2]
    seen = []
    stage.local(lambda z, *times, **cond: seen.append((z, times, cond)))(
        "z", torch.tensor(1.0), torch.tensor(0.0), labels="y"
    )
    (z, times, cond) = seen[0]
    assert (z, cond) == ("z", {"labels": "y"})
    assert [float(t) for t in times] == pytest.approx([stage.window[1], stage.window[0]])


@given(count=counts, seed=seeds)
@settings(max_examples=15, deadline=None)
def test_states_are_equations_2_and_3_with_bilinear_down_and_nearest_up(count, seed):
    images, noise = normal(seed, 2, 3, 8, 8), normal(seed + 1, 2, 3, 8, 8)
    small = interpolate(images, scale_factor=0.5, mode="bilinear", align_corners=False)
    coarse = interpolate(small, scale_factor=2, mode="nearest")
    for stage in Cascade(count):
        s = stage.index / count
        start_t, end_t = s / (2 - s), (stage.index + 1) / count
        end, start = stage.path(images, noise)
        torch.testing.assert_close(end, end_t * images + (1 - end_t) * noise)
        torch.testing.assert_close(start, start_t * coarse + (1 - start_t) * noise)


def test_the_first_stage_starts_from_noise_and_the_last_ends_with_the_image():
    images, noise = normal(0, 2, 3, 8, 8), normal(1, 2, 3, 8, 8)
    cascade = Cascade(4)
    assert torch.equal(cascade[0].path(images, noise)[1], noise)
    assert torch.equal(cascade[3].path(images, noise)[0], images)


# --- the jump


@given(count=st.integers(2, 5), seed=seeds)
@settings(max_examples=20, deadline=None)
def test_a_jump_lands_on_the_next_stages_start_for_every_image_and_noise(count, seed):
    """Not in law alone: path by path, where the coarser noise is 2 Down(n)."""
    images, noise = normal(seed, 2, 3, 8, 8), normal(seed + 1, 2, 3, 8, 8)
    cascade = Cascade(count)
    for before, after in itertools.pairwise(cascade):
        end, _ = before.path(halved(images), 2 * halved(noise))
        _, start = after.path(images, noise)
        torch.testing.assert_close(after.jump(end, noise), start)


@pytest.mark.parametrize("k", range(1, 4))
def test_a_jump_has_the_covariance_of_the_next_start(k):
    """As the paper draws it: with fresh noise, which knows nothing of the state's own.

    Everything is linear, so covariances are A A', with A read off a basis.
    """
    before, after = Cascade(4)[k - 1], Cascade(4)[k]
    side, u = 4, k / 4
    basis = torch.eye(side**2, dtype=torch.float64).reshape(-1, 1, side, side)
    small = torch.eye(side**2 // 4, dtype=torch.float64).reshape(-1, 1, side // 2, side // 2)
    added = after.jump(torch.zeros(side**2, 1, side // 2, side // 2).double(), basis).flatten(1)
    renoised = added.T @ added
    # alpha, beta and the correlation -1/3 are the paper's
    cell = doubled(small).flatten(1)
    same_cell = cell.T @ cell
    beta = math.sqrt(3) * (1 - u) / (2 - u)
    eye = torch.eye(side**2, dtype=torch.float64)
    torch.testing.assert_close(renoised, beta**2 * (4 / 3 * eye - same_cell / 3))
    # with the state's own noise it is white, with the spread of the start
    state = after.jump(before.end * small, torch.zeros(len(small), 1, side, side).double())
    carried = state.flatten(1).T @ state.flatten(1)
    torch.testing.assert_close(carried + renoised, after.start**2 * eye)


@given(count=counts, seed=seeds)
@settings(max_examples=10, deadline=None)
def test_the_noises_of_all_stages_are_white(count, seed):
    """2 Down is orthonormal: its rows have length one and no two overlap."""
    basis = torch.eye(256, dtype=torch.float64).reshape(256, 1, 16, 16)
    for noise in Cascade(count).noises(basis):
        matrix = noise.flatten(1)
        torch.testing.assert_close(
            matrix.T @ matrix, torch.eye(matrix.shape[1], dtype=torch.float64)
        )


# --- normal pictures


class NormalStage:
    """The path of one stage for pictures of mean m and covariance C, in closed form.

    z_t = A_t x + b_t n, so (z_t, v) is normal, and E[v | z_t] is affine in z_t.
    """

    def __init__(self, stage, mean, covariance):
        size = len(mean)
        side = math.isqrt(size)
        eye = torch.eye(size, dtype=torch.float64)
        rows = eye.reshape(size, 1, side, side)
        blur = eye
        if stage.index:
            blur = doubled(halved(rows)).flatten(1).T
        self.mean, self.covariance = mean, covariance
        self.end = (1 - stage.end) * eye, stage.end * eye
        self.start = (1 - stage.start) * blur, stage.start * eye

    def parts(self, t):
        """What multiplies x and n in z_t, and in the velocity."""
        mixed = [(1 - t) * e + t * s for e, s in zip(self.end, self.start, strict=True)]
        slopes = [s - e for e, s in zip(self.end, self.start, strict=True)]
        return mixed, slopes

    def law(self, t):
        (of_x, of_n), _ = self.parts(t)
        return of_x @ self.mean, of_x @ self.covariance @ of_x.T + of_n @ of_n.T

    def regression(self, t):
        """E[v | z_t] = offset + matrix (z_t - E z_t)."""
        (of_x, of_n), (to_x, to_n) = self.parts(t)
        _, covariance = self.law(t)
        cross = to_x @ self.covariance @ of_x.T + to_n @ of_n.T
        return to_x @ self.mean, torch.linalg.solve(covariance, cross.T).T

    def velocity(self, z, t):
        offset, matrix = self.regression(float(t[0]))
        centred = z.flatten(1) - self.law(float(t[0]))[0]
        return (offset + centred @ matrix.T).reshape(z.shape)


@functools.cache
def pictures(side):
    """The mean and the covariance of pictures of a size, those of `SIDE` x `SIDE` halved."""
    mean, factor = normal(7, SIDE**2), normal(8, SIDE**2, SIDE**2) / SIDE
    covariance = factor @ factor.T + 0.05 * torch.eye(SIDE**2, dtype=torch.float64)
    down = torch.eye(SIDE**2, dtype=torch.float64)
    size = SIDE
    while size > side:
        rows = torch.eye(size**2, dtype=torch.float64).reshape(-1, 1, size, size)
        down = halved(rows).flatten(1).T @ down
        size //= 2
    return down @ mean, down @ covariance @ down.T


@functools.cache
def normal_stages():
    sizes = [SIDE // 2 ** (STAGES - 1 - k) for k in range(STAGES)]
    return [
        NormalStage(stage, *pictures(size))
        for stage, size in zip(Cascade(STAGES), sizes, strict=True)
    ]


def exact_network(z, t, s):
    """The marginal velocity as one network: the size of z says which stage it is."""
    index = [SIDE // 2 ** (STAGES - 1 - k) for k in range(STAGES)].index(z.shape[-1])
    low, high = Cascade(STAGES)[index].window
    return normal_stages()[index].velocity(z, (t - low) / (high - low))


@pytest.mark.parametrize("k", range(STAGES))
def test_the_marginal_velocity_carries_the_starts_law_to_the_ends(k):
    """dm/dt = E v and dC/dt = M C + C M', with M the regression of v on z_t: from t = 1 to 0."""
    path = normal_stages()[k]
    mean, covariance = path.law(1.0)

    def slope(t, law):
        mean, covariance = law
        offset, matrix = path.regression(t)
        drift = offset + matrix @ (mean - path.law(t)[0])
        return drift, matrix @ covariance + covariance @ matrix.T

    def moved(law, by, step):
        return tuple(value + step * change for value, change in zip(law, by, strict=True))

    law, steps = (mean, covariance), 200
    h = -1 / steps
    for i in range(steps):
        t = 1 + i * h
        k1 = slope(t, law)
        k2 = slope(t + h / 2, moved(law, k1, h / 2))
        k3 = slope(t + h / 2, moved(law, k2, h / 2))
        k4 = slope(t + h, moved(law, k3, h))
        for weight, by in ((1, k1), (2, k2), (2, k3), (1, k4)):
            law = moved(law, by, weight * h / 6)
    for got, expected in zip(law, path.law(0.0), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_sampling_with_the_exact_velocity_gives_the_pictures_law():
    """The sampler is an affine map of its noise: its offset is the mean, A A' the covariance."""
    size = SIDE**2
    basis = torch.cat([torch.zeros(1, size), torch.eye(size)]).double()
    flow = FlowMatchingLoss().flow_map(exact_network)
    sampler = CascadeFlow(Cascade(STAGES), flow, DormandPrince(rtol=1e-6, atol=1e-6))
    made = sampler.sample(basis.reshape(-1, 1, SIDE, SIDE)).flatten(1)
    matrix = made[1:] - made[0]
    mean, covariance = pictures(SIDE)
    # the flow map takes times below 0.01 for 0.01, where the velocity is all but the same
    torch.testing.assert_close(made[0], mean, rtol=0, atol=2e-3)
    torch.testing.assert_close(matrix.T @ matrix, covariance, rtol=0, atol=2e-3)


def test_the_exact_velocity_has_the_least_loss():
    """Its gradient is zero in the mean: the loss of a network moved either way is larger."""
    rows = 6000
    mean, covariance = pictures(SIDE)
    factor = torch.linalg.cholesky(covariance)
    images = (mean + normal(1, rows, SIDE**2) @ factor.T).reshape(rows, 1, SIDE, SIDE)
    loss_fn = CascadeLoss(Cascade(STAGES), FlowMatchingLoss())
    t = torch.full((rows,), 0.4, dtype=torch.float64)
    losses = {}
    for scale in (0.9, 1.0, 1.1):

        def scaled(z, t, s, scale=scale):
            return scale * exact_network(z, t, s)

        out = loss_fn(
            scaled, images, noise=normal(2, *images.shape), t=t, s=t, generator=source(3)
        )
        losses[scale] = out.loss.reshape(-1).mean()
    assert losses[1.0] < losses[0.9] and losses[1.0] < losses[1.1]


# --- any objective


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize(
    "objective",
    [
        FlowMatchingLoss(),
        MeanFlowLoss(),
        CrossFlowLoss(),
        PixelMeanFlowLoss(),
        ConsistencyLoss(),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_one_stage_is_the_objective_itself(objective, seed):
    images, noise = normal(seed, 5, 3, 6, 6), normal(seed + 1, 5, 3, 6, 6)
    t = torch.rand(5, generator=source(seed)).double() * 0.9 + 0.1
    s = t * torch.rand(5, generator=source(seed + 1)).double()
    cond = {"labels": torch.arange(5).double()}
    out = CascadeLoss(Cascade(1), objective)(model, images, cond=cond, noise=noise, t=t, s=s)
    alone = objective(model, images, cond=cond, noise=noise, t=t, s=s)
    assert torch.equal(out.loss, alone.loss)
    assert torch.equal(out.t, alone.t) and torch.equal(out.s, alone.s)


@pytest.mark.parametrize(
    "objective", [FlowMatchingLoss(), MeanFlowLoss(), CrossFlowLoss()], ids=type
)
def test_each_row_is_trained_in_its_stage_whatever_the_others_are(objective):
    rows, cascade = 10, Cascade(3)
    images, noise = normal(0, rows, 2, 8, 8), normal(1, rows, 2, 8, 8)
    t = torch.linspace(0.2, 1, rows).double()
    s = t * torch.linspace(0, 1, rows).double()
    labels = torch.arange(rows).double()
    stages = cascade.assigned(rows, source(0))
    out = CascadeLoss(cascade, objective)(
        model, images, cond={"labels": labels}, noise=noise, stages=stages, t=t, s=s
    )
    assert torch.equal(out.stages, stages) and torch.equal(out.t, t)
    for i in range(rows):
        stage = cascade[int(stages[i])]
        shrink = cascade.stages - 1 - stage.index
        n = 2**shrink * halved(noise[i : i + 1], shrink)
        end, start = stage.path(halved(images[i : i + 1], shrink), n)
        alone = objective(
            stage.local(model),
            end,
            noise=start,
            cond={"labels": labels[i : i + 1]},
            t=t[i : i + 1],
            s=s[i : i + 1],
        )
        torch.testing.assert_close(out.loss[i : i + 1], alone.loss)


def test_the_velocity_that_is_learned_is_the_papers_with_the_sign_of_our_time():
    images, noise = normal(0, 4, 2, 8, 8), normal(1, 4, 2, 8, 8)
    out = CascadeLoss(Cascade(2), FlowMatchingLoss())(model, images, noise=noise)
    for index, part in out.outputs.items():
        stage = Cascade(2)[index]
        (batch,) = [
            b for b in Cascade(2).batches(images, noise, out.stages) if b.stage.index == index
        ]
        torch.testing.assert_close(part.target, -(batch.latents - batch.noise))
        assert part.z_t.shape[-1] == 8 // 2 ** (1 - stage.index)


def test_the_derivative_is_that_of_the_stages_time():
    """MeanFlow differentiates through the change of time: a network that is exact has no loss.

    With one image the path is the only one: the average velocity is start - end, whatever t and s.
    """
    image = normal(0, 1, 1, 8, 8).expand(4, 1, 8, 8)
    noise = normal(1, 1, 1, 8, 8).expand(4, 1, 8, 8)
    cascade = Cascade(2)
    known = {8: cascade[1].path(image, noise)}
    known[4] = cascade[0].path(halved(image), 2 * halved(noise))

    def exact(z, t, s):
        """Exact on the path, and it depends on z and t off it: the derivative is not idle."""
        end, start = (part[: len(z)] for part in known[z.shape[-1]])
        low, high = cascade[int(z.shape[-1] == 8)].window
        own = ((t - low) / (high - low)).reshape(-1, 1, 1, 1)
        on_path = (1 - own) * end + own * start
        return start - end + 3 * (z - on_path)

    out = CascadeLoss(cascade, MeanFlowLoss())(exact, image, noise=noise, generator=source(0))
    assert float(out.loss.max()) < 1e-20


def listed(pictures, t, s, labels):
    """The network for several sizes in one call."""
    return [model(*each) for each in zip(pictures, t, s, labels, strict=True)]


@given(rows=st.integers(1, 9), seed=seeds)
@settings(max_examples=10, deadline=None)
def test_packed_is_the_same_loss_and_gradient_in_one_call(rows, seed):
    images, noise = normal(seed, rows, 2, 8, 8), normal(seed + 1, rows, 2, 8, 8)
    cond = {"labels": torch.arange(rows).double()}
    results = []
    for packed in (False, True):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        calls = []

        def network(z, t, s, labels, calls=calls, scale=scale):
            calls.append(z)
            if isinstance(z, list):
                return [scale * part for part in listed(z, t, s, labels)]
            return scale * model(z, t, s, labels)

        t = torch.rand(rows, generator=source(seed)).double() * 0.9 + 0.1
        loss_fn = CascadeLoss(Cascade(3), FlowMatchingLoss(), packed=packed)
        out = loss_fn(network, images, cond=cond, noise=noise, t=t, s=t, generator=source(seed))
        out.loss.sum().backward()
        results.append((out.loss.detach(), scale.grad))
        assert len(calls) == (1 if packed else min(rows, 3))
    torch.testing.assert_close(results[1], results[0])


def test_packed_draws_its_times_and_refuses_what_it_cannot_do():
    images = normal(0, 6, 2, 8, 8)
    cond = {"labels": torch.arange(6).double()}
    loss_fn = CascadeLoss(Cascade(3), FlowMatchingLoss(), packed=True)
    out = loss_fn(listed, images, cond=cond, generator=source(0))
    assert float(out.t.min()) > 0 and torch.equal(out.t, out.s)
    guided = FlowMatchingLoss(guidance=Guidance(null={"labels": 9.0}, omega=2.0))
    for objective in (MeanFlowLoss(), guided):
        with pytest.raises(InputError, match="got packed=True for an objective"):
            CascadeLoss(Cascade(3), objective, packed=True)


# --- times, whoever draws them


NEAR, FAR = TimePairs(UniformTimes(0.01, 0.1)), TimePairs(UniformTimes(0.9, 1.0))


def network_of(packed):
    """A network without conditions, for one size or several."""
    if packed:
        return lambda z, t, s: [model(*each) for each in zip(z, t, s, strict=True)]
    return model


@pytest.mark.parametrize("packed", [False, True])
def test_each_stage_draws_by_its_own_objective(packed):
    objectives = [FlowMatchingLoss(times=NEAR), FlowMatchingLoss(times=FAR)]
    loss_fn = CascadeLoss(Cascade(2), objectives, packed)
    out = loss_fn(network_of(packed), normal(0, 8, 1, 4, 4), generator=source(0))
    assert float(out.t[out.stages == 0].max()) <= 0.1
    assert float(out.t[out.stages == 1].min()) >= 0.9


@given(rows=st.integers(1, 9), seed=seeds)
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("times", [(NEAR, NEAR), (NEAR, FAR)], ids=["alike", "apart"])
def test_packed_draws_what_is_drawn_unpacked(times, rows, seed):
    objectives = [FlowMatchingLoss(times=each) for each in times]
    images = normal(seed, rows, 1, 4, 4)
    outs = []
    for packed in (False, True):
        loss_fn = CascadeLoss(Cascade(2), objectives, packed)
        outs.append(loss_fn(network_of(packed), images, generator=source(seed)))
    for name in ("loss", "t", "s", "stages"):
        torch.testing.assert_close(getattr(outs[1], name), getattr(outs[0], name))


@pytest.mark.parametrize(
    ("objective", "packed"),
    [(FlowMatchingLoss, False), (FlowMatchingLoss, True), (MeanFlowLoss, False)],
)
def test_keyed_times_do_not_depend_on_the_split_over_processes(objective, packed):
    """Rows 0 to 12 by one process, or by two or three: the same times and losses."""
    rows = 12
    images, noise = normal(0, rows, 1, 8, 8), normal(1, rows, 1, 8, 8)
    stages = Cascade(3).assigned(rows, source(0))
    times = KeyedPairs(TimePairs(), 1)
    loss_fn = CascadeLoss(Cascade(3), objective(times=times), packed)
    found = []
    for processes in (1, 2, 3):
        parts = []
        size = rows // processes
        for first in range(0, rows, size):
            own = slice(first, first + size)
            times.draws = Draws(0, 5, first, first + size, rows, torch.device("cpu"))
            out = loss_fn(network_of(packed), images[own], noise=noise[own], stages=stages[own])
            parts.append(torch.stack([out.loss, out.t, out.s]))
        found.append(torch.cat(parts, 1))
    times.draws = Draws(0, 5, 0, rows, rows, torch.device("cpu"))
    t, s = times(rows)
    assert torch.equal(found[0][1], t.double())
    if objective is MeanFlowLoss:
        assert torch.equal(found[0][2], s.double())
    for split in found[1:]:
        torch.testing.assert_close(split, found[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("t", [0.5, torch.tensor(0.5), torch.full((6,), 0.5).double()])
def test_one_time_may_be_given_for_all_rows(packed, t):
    images, noise = normal(0, 6, 1, 8, 8), normal(1, 6, 1, 8, 8)
    loss_fn = CascadeLoss(Cascade(3), FlowMatchingLoss(), packed)
    given = {"noise": noise, "stages": torch.arange(6) % 3}
    every = torch.full((6,), 0.5).double()
    expected = CascadeLoss(Cascade(3), FlowMatchingLoss())(
        model, images, t=every, s=every, **given
    )
    for s in (t, 0.9, None):  # flow matching takes no notice of s
        out = loss_fn(network_of(packed), images, t=t, s=s, **given)
        torch.testing.assert_close(out.loss, expected.loss)
        assert torch.equal(out.t, every) and torch.equal(out.s, every)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("t", "wrong"),
    [
        (torch.full((2,), 0.5), r"got t of shape \(2,\); it must be \(\) or \(6,\)"),
        (1.5, r"got t = 1\.5"),
        (torch.ones(6).long(), "got t of dtype torch.int64"),
        ("noon", "got t = 'noon'"),
    ],
)
def test_given_times_are_those_of_the_whole_batch(packed, t, wrong):
    """Two times are as many as a stage has rows, and yet not one for each row."""
    loss_fn = CascadeLoss(Cascade(3), FlowMatchingLoss(), packed)
    with pytest.raises(TimeError, match=wrong):
        loss_fn(network_of(packed), normal(0, 6, 1, 8, 8), t=t, s=t)


def test_half_a_pair_of_times_is_refused_and_so_are_times_where_an_objective_takes_none():
    images, t = normal(0, 4, 1, 4, 4), torch.full((4,), 0.5).double()
    for half in ({"t": t}, {"s": t}):
        with pytest.raises(TimeError, match="got only one of t and s"):
            CascadeLoss(Cascade(2), MeanFlowLoss())(model, images, **half)
    matching = TrajectoryMatchingLoss(teacher=lambda z, t: z)
    with pytest.raises(FlowspaceError, match="got t or s; trajectory matching"):
        CascadeLoss(Cascade(2), matching)(model, images, t=t, s=t)


def test_a_sampler_of_the_wrong_number_of_times_is_refused():
    def few(rows, **how):
        return torch.full((2,), 0.5), torch.full((2,), 0.5)

    with pytest.raises(TimeError, match=r"got times of shapes \(2,\) and \(2,\) .* for 4 rows"):
        CascadeLoss(Cascade(2), FlowMatchingLoss(times=few))(model, normal(0, 4, 1, 4, 4))


@pytest.mark.parametrize("packed", [False, True])
def test_conditions_within_conditions_belong_to_their_rows_too(packed):
    """As in an objective alone: a label deep within dicts and tuples is the row's own."""

    def nested(z, t, s, deep):
        return model(z, t, s, deep["more"][0]) + deep["all"]

    def listed_nested(z, t, s, deep):
        return [nested(*each) for each in zip(z, t, s, deep, strict=True)]

    images, noise, labels = normal(0, 6, 1, 8, 8), normal(1, 6, 1, 8, 8), torch.arange(6).double()
    given = {"noise": noise, "stages": torch.arange(6) % 3, "t": 0.5, "s": 0.5}
    cond = {"deep": {"more": (labels, "text"), "all": torch.tensor(0.0)}}
    network = nested
    if packed:
        network = listed_nested
    out = CascadeLoss(Cascade(3), FlowMatchingLoss(), packed)(network, images, cond=cond, **given)
    flat = CascadeLoss(Cascade(3), FlowMatchingLoss())(
        model, images, cond={"labels": labels}, **given
    )
    torch.testing.assert_close(out.loss, flat.loss)


def test_row_numbers_go_to_a_gpu_from_pinned_memory_and_nothing_waits():
    """Without a GPU: what the rows are asked for."""

    class Rows:
        device, pinned = torch.device("cpu"), False

        def pin_memory(self):
            self.pinned = True
            return self

        def to(self, device, non_blocking=False):
            return device.type, self.pinned, non_blocking

    assert sent(Rows(), torch.device("cuda")) == ("cuda", True, True)
    assert sent(Rows(), torch.device("cpu")) == ("cpu", False, False)


@pytest.mark.parametrize("times", [(NEAR, NEAR), (NEAR, FAR)], ids=["alike", "apart"])
def test_drawn_times_are_looked_at_in_the_first_step_alone(monkeypatch, times):
    """To look at them waits for a GPU."""
    seen, check = [], engine.check_times
    monkeypatch.setattr(engine, "check_times", lambda *args: seen.append(args) or check(*args))
    loss_fn = CascadeLoss(Cascade(2), [FlowMatchingLoss(times=each) for each in times])
    images = normal(0, 6, 1, 4, 4)
    loss_fn(model, images)
    assert len(seen) == len(set(times))
    loss_fn(model, images)
    assert len(seen) == len(set(times))


def test_drawn_times_out_of_range_are_refused_by_the_name_of_what_drew_them():
    def times(rows, **_):
        return torch.full((rows,), 2.0), torch.zeros(rows)

    loss_fn = CascadeLoss(Cascade(2), CrossFlowLoss(times=times))
    with pytest.raises(TimeError, match=r"from times = <function .*times"):
        loss_fn(model, normal(0, 6, 1, 4, 4))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to wait for")
def test_on_a_gpu_a_step_of_a_cascade_waits_for_nothing():
    images = torch.randn(6, 1, 8, 8, device="cuda")
    loss_fn = CascadeLoss(Cascade(3), FlowMatchingLoss())
    loss_fn(model, images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_fn(model, images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_distillation_takes_an_objective_for_each_stage():
    cascade = Cascade(2)

    def teacher(z, t):
        return z * t.reshape(-1, 1, 1, 1)

    objectives = [MeanFlowDistillationLoss(teacher=stage.local(teacher)) for stage in cascade]
    images, noise = normal(0, 4, 2, 8, 8), normal(1, 4, 2, 8, 8)
    t = torch.full((4,), 0.5, dtype=torch.float64)
    out = CascadeLoss(cascade, objectives)(model, images, noise=noise, t=t, s=t)
    for index, part in out.outputs.items():
        at = cascade[index].global_time(part.t)
        torch.testing.assert_close(part.target, teacher(part.z_t, at))


# --- the draw of the stages


@given(count=counts, rows=st.integers(1, 40), seed=seeds)
def test_every_part_of_a_batch_has_all_stages_in_their_shares(count, rows, seed):
    stages = Cascade(count).assigned(rows, source(seed))
    assert torch.equal(stages, Cascade(count).assigned(rows, source(seed)))
    for first in range(rows - count + 1):
        assert sorted(stages[first : first + count].tolist()) == list(range(count))


def test_every_stage_comes_first_as_often_as_the_others():
    first = torch.stack([Cascade(4).assigned(1, source(seed)) for seed in range(800)])
    shares = torch.bincount(first.flatten(), minlength=4) / 800
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.06)


# --- the sampler


@pytest.mark.parametrize("solver", [Euler(), DormandPrince(), None], ids=str)
def test_one_stage_is_sampled_as_any_flow(solver):
    noise = normal(0, 3, 2, 6, 6)
    flow = FlowMatchingLoss().flow_map(model)
    got = CascadeFlow(Cascade(1), flow, solver).sample(noise, steps=5)
    alone = flow if solver is None else VelocityFlow(flow.velocity, solver)
    torch.testing.assert_close(got, alone.sample(noise, steps=5))


def test_one_step_of_each_stage_is_exact_where_the_flow_map_is():
    """With one image: S evaluations make it from its noise, and so does any number of steps."""
    image, noise = normal(0, 1, 1, 8, 8), normal(1, 1, 1, 8, 8)
    cascade = Cascade(3)
    paths = {}
    for stage in cascade:
        times = cascade.stages - 1 - stage.index
        small = halved(image, times)
        paths[small.shape[-1]] = stage.path(small, 2**times * halved(noise, times))

    def average_velocity(z, t, s):
        end, start = paths[z.shape[-1]]
        return start - end

    sampler = CascadeLoss(cascade, MeanFlowLoss()).sampler(average_velocity)
    torch.testing.assert_close(sampler.sample(noise), image)
    torch.testing.assert_close(sampler.sample(noise, steps=(3, 1, 2)), image)
    ends = sampler.states(noise)
    assert [end.shape[-1] for end in ends] == [2, 4, 8]
    for end in ends:
        torch.testing.assert_close(end, paths[end.shape[-1]][0])


def test_known_times_say_what_their_sampler_said():
    t = torch.rand(4)
    assert PairsOfStage(t, t / 2).most_off_diagonal(4) is None
    told = PairsOfStage(t, t / 2, 3)
    assert [told.most_off_diagonal(rows) for rows in (2, 3, 4)] == [2, 3, 3]
    assert told.of(torch.tensor([2, 0])).most == 3
    assert torch.equal(told.of(torch.tensor([2, 0])).s, t[[2, 0]] / 2)


def test_times_may_be_drawn_by_a_function_and_one_stage_has_its_sampler():
    def drawn(rows, *, generator, device, dtype):
        t = torch.linspace(0.2, 1, rows, device=device, dtype=dtype)
        return t, t / 2

    loss_fn = CascadeLoss(Cascade(1), MeanFlowLoss(times=drawn))
    out = loss_fn(model, normal(0, 4, 2, 4, 4))
    torch.testing.assert_close(out.t, torch.linspace(0.2, 1, 4, dtype=out.t.dtype))
    assert torch.equal(out.s, out.t / 2)
    assert loss_fn.sampler(model).flow.statistic == MeanFlowStatistic()


def test_a_stage_takes_one_step_unless_more_are_asked_for():
    flow = FlowMatchingLoss().flow_map(lambda z, t, s: -z * t[:, None, None, None])
    sampler, noise = CascadeFlow(Cascade(2), flow, Euler()), normal(0, 2, 1, 4, 4)
    assert torch.equal(sampler.sample(noise), sampler.sample(noise, steps=1))
    for found, wanted in zip(sampler.states(noise), sampler.states(noise, steps=1), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("steps", [3, (1, 2, 4)])
def test_steps_are_evaluations_of_each_stage(steps):
    sizes = []

    def counted(z, t, s):
        sizes.append(z.shape[-1])
        return -z

    flow = FlowMatchingLoss().flow_map(counted)
    CascadeFlow(Cascade(3), flow, Euler()).sample(normal(0, 2, 1, 8, 8), steps=steps)
    each = [steps] * 3 if isinstance(steps, int) else steps
    assert [sizes.count(size) for size in (2, 4, 8)] == list(each)


# --- guidance


def test_the_ramp_is_the_papers():
    ramp = Cascade(4).ramp(Guidance(null={"labels": 10}, omega=2.4))
    assert [each.omega for each in ramp] == pytest.approx([1, 1 + 1.4 / 6, 1 + 2.8 / 3, 2.4])
    assert {each.null["labels"] for each in ramp} == {10}


@given(omega=st.floats(0.2, 8), own_weight=st.floats(0, 0.9))
def test_the_ramp_is_of_the_effective_scale(omega, own_weight):
    """omega / (1 - own_weight) is what sampling knows; the first stage is not guided at all."""
    guidance = Guidance(null={"labels": 10}, omega=omega, own_weight=own_weight)
    ramp = Cascade(4).ramp(guidance)
    full = omega / (1 - own_weight)
    scales = [each.omega / (1 - each.own_weight) for each in ramp]
    expected = [1, 1 + (full - 1) / 6, 1 + (full - 1) * 2 / 3, full]
    assert scales == pytest.approx(expected)
    assert is_idle(ramp[0]) and {each.own_weight for each in ramp} == {own_weight}


def test_a_stage_without_strength_is_evaluated_once_and_others_with_and_without_their_label():
    seen = []

    def network(z, t, s, labels):
        seen.append((z.shape[-1], labels.tolist()))
        return labels.reshape(-1, 1, 1, 1) + 0 * z

    cascade = Cascade(2)
    guidance = cascade.ramp(Guidance(null={"labels": 7.0}, omega=3.0), shares=(0, 1))
    sampler = CascadeFlow(cascade, FlowMatchingLoss().flow_map(network), Euler())
    noise, labels = torch.zeros(2, 1, 4, 4), torch.tensor([1.0, 2.0])
    first, last = sampler.states(noise, cond={"labels": labels}, steps=1, guidance=guidance)
    assert seen == [(2, [1, 2]), (4, [1, 2]), (4, [7, 7])]
    torch.testing.assert_close(first[:, 0, 0, 0], -labels)
    guided = 7 + 3 * (labels - 7)
    torch.testing.assert_close(last[:, 0, 0, 0], -labels / 1.5 - guided)


def test_the_interval_of_guidance_is_of_the_networks_times():
    twice = []

    def network(z, t, s, labels):
        twice.append(z.shape[-1])
        return 0 * z

    low, _ = Cascade(2)[0].window
    guidance = Guidance(null={"labels": 7.0}, omega=3.0, interval=(0.0, low - 0.01))
    sampler = CascadeFlow(Cascade(2), FlowMatchingLoss().flow_map(network), Euler())
    sampler.sample(
        torch.zeros(2, 1, 4, 4), cond={"labels": torch.ones(2)}, steps=4, guidance=guidance
    )
    assert twice.count(2) == 4  # the first stage lies outside
    assert 4 < twice.count(4) <= 8


# --- errors


@pytest.mark.parametrize("stages", [0, -1, 2.0, True, "4"])
def test_stages_are_counted(stages):
    with pytest.raises(InputError, match="got stages = "):
        Cascade(stages)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (12, 8), (7, 7)])
def test_sizes_that_do_not_halve_are_refused_with_what_would(height, width):
    images = torch.zeros(2, 3, height, width)
    wrong = r"got images of \d+ x \d+ for 4 stages.*divisible by 8, or fewer stages"
    sampler = CascadeFlow(Cascade(4), FlowMatchingLoss().flow_map(model), Euler())
    with pytest.raises(InputError, match=wrong):
        CascadeLoss(Cascade(4), FlowMatchingLoss())(model, images)
    with pytest.raises(InputError, match=wrong):
        sampler.sample(images)


@pytest.mark.parametrize("steps", [0, -3, 1.5, True, (1, 2), (1, 2, 3, 0), (1, 2, -1)])
def test_steps_are_counts_one_for_each_stage(steps):
    sampler = CascadeFlow(Cascade(3), FlowMatchingLoss().flow_map(model), Euler())
    with pytest.raises(TimeError, match=r"got steps = .* for 3 stage\(s\); write 1 or a larger"):
        sampler.sample(torch.zeros(1, 1, 8, 8), steps=steps)


def test_guidance_has_one_strength_for_each_stage():
    guidance = Guidance(null={"labels": 10}, omega=2.4)
    with pytest.raises(InputError, match=r"got 4 shares of guidance for 3 stage\(s\); write one"):
        Cascade(3).ramp(guidance)
    with pytest.raises(InputError, match="got guidance = RandomGuidance"):
        Cascade(4).ramp(RandomGuidance(null={"labels": 10}))
    sampler = CascadeFlow(Cascade(3), FlowMatchingLoss().flow_map(model), Euler())
    for wrong in ([guidance] * 2, 2.4):
        with pytest.raises(InputError, match=r"got guidance = .* for 3 stage\(s\)"):
            sampler.sample(torch.zeros(1, 1, 8, 8), guidance=wrong)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"images": torch.zeros(2, 8, 8)}, "got images of type Tensor and shape"),
        ({"images": torch.zeros(2, 1, 8, 8).long()}, "got images of dtype"),
        ({"noise": torch.zeros(2, 1, 4, 4)}, "got noise of shape .* its halvings"),
        ({"stages": torch.zeros(3).long()}, "got stages of dtype .*one whole number for each"),
        ({"stages": torch.zeros(2)}, "got stages of dtype torch.float32"),
        ({"stages": torch.tensor([0, 2])}, "got stages from 0 to 2; .* to 1"),
    ],
)
def test_batches_that_do_not_fit_are_refused(options, wrong):
    given = {"images": torch.zeros(2, 1, 8, 8)} | options
    with pytest.raises(InputError, match=wrong):
        CascadeLoss(Cascade(2), FlowMatchingLoss())(model, **given)


def test_parts_of_the_wrong_kind_are_refused():
    flow = FlowMatchingLoss().flow_map(model)
    with pytest.raises(InputError, match="got objective = 'flow'"):
        CascadeLoss(Cascade(1), ["flow"])
    with pytest.raises(InputError, match=r"got 1 objectives for 2 stage\(s\)"):
        CascadeLoss(Cascade(2), [FlowMatchingLoss()])
    with pytest.raises(InputError, match="got flow = "):
        CascadeFlow(Cascade(2), model)
    with pytest.raises(InputError, match="got solver = 'euler'"):
        CascadeFlow(Cascade(2), flow, "euler")
    with pytest.raises(IndexError, match="got stage 2 of a cascade of 2"):
        Cascade(2)[2]
    assert Cascade(2)[1] == CascadeStage(1, 2)
