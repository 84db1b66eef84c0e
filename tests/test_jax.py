"""The same objects on JAX arrays: the numbers of torch, and what only JAX has: keys, jit, grad,
vmap and shard_map.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowspace import (
    AbsoluteError,
    Adaptive,
    AlphaFlowLoss,
    ConsistencyLoss,
    CosineSchedule,
    CrossFlowLoss,
    DerivativeError,
    FiniteDifference,
    FlowMap,
    FlowMatchingLoss,
    ForwardMode,
    Guidance,
    HuberError,
    ImprovedMeanFlowLoss,
    InputError,
    LinearSchedule,
    LogitNormalTimes,
    LossOutput,
    MatchedStatistic,
    MeanFlowLoss,
    MeanFlowStatistic,
    PixelMeanFlowLoss,
    PowerTimes,
    Schedule,
    ScheduleError,
    SharedPrimal,
    ShiftedTimes,
    SquaredError,
    Statistic,
    TimeError,
    TimePairs,
    ToDataTimes,
    TrajectoryMatchingLoss,
    UniformTimes,
    VariancePreservingSchedule,
    check_criteria,
)

jax = pytest.importorskip("jax")
jnp = jax.numpy

ROOT = Path(__file__).parents[1]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
KEY = 7


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    """Float64 with x64 switched on, float32 without."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", request.param == torch.float64)
    yield request.param
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def to_jax(tree):
    return jax.tree.map(
        lambda x: jnp.asarray(x.detach().numpy()) if isinstance(x, torch.Tensor) else x, tree
    )


def assert_same(found, wanted, tolerance):
    """To a tolerance relative to the largest element."""
    found, wanted = np.asarray(found), wanted.detach().numpy()
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert np.abs(found - wanted).max(initial=0.0) <= tolerance * max(
        1.0, np.abs(wanted).max(initial=0.0)
    )


# --- one network in both libraries
# -----------------------------------------------------------------------------------

WIDTH, SIZE, ROWS = 32, 6, 16


def weights_of(dtype, seed=1):
    shapes = [(SIZE + 2, WIDTH), (WIDTH,), (WIDTH, WIDTH), (WIDTH,), (WIDTH, SIZE)]
    return [
        strategies.normal(seed + i, *shape, dtype=dtype) / shape[0] ** 0.5
        for i, shape in enumerate(shapes)
    ]


def mlp(xp, weights):
    def model(z, t, s, shift=0.0):
        h = xp.concatenate([z, t[:, None], s[:, None]], 1)
        h = xp.tanh(h @ weights[0] + weights[1])
        h = xp.tanh(h @ weights[2] + weights[3])
        return h @ weights[4] + shift

    return model


def batch(dtype, rows=ROWS):
    """Latents, images, noise and times that hold the diagonal, both ends and what lies between."""
    latents, images, noise = (
        strategies.normal(seed, rows, SIZE, dtype=dtype) for seed in (11, 12, 13)
    )
    t = torch.linspace(0.1, 1, rows, dtype=dtype)
    s = t * torch.tensor([1.0, 0.0, 0.4, 0.8], dtype=dtype).repeat(rows // 4)
    return latents, images, noise, t, s


OBJECTIVES = {
    "cross flow": CrossFlowLoss(),
    "cross flow, literal": CrossFlowLoss(literal=True),
    "cross flow, cosine": CrossFlowLoss(schedule=CosineSchedule()),
    "cross flow, cosine, literal": CrossFlowLoss(schedule=CosineSchedule(), literal=True),
    "cross flow, variance preserving": CrossFlowLoss(schedule=VariancePreservingSchedule()),
    "cross flow, weighted Huber": CrossFlowLoss(
        penalty=HuberError(0.5), weight=lambda t, s: 1 / (t + s)
    ),
    "cross flow, own velocity": CrossFlowLoss(estimate=lambda x: x),
    "cross flow, two points": CrossFlowLoss(gap=0.2),
    "cross flow, forward mode": CrossFlowLoss(derivative=ForwardMode()),
    "cross flow, not anchored": CrossFlowLoss(
        statistic=Statistic.from_kappa(LinearSchedule(), "(1 + s)/2", "-(1 + t)/(1 + s)"),
        check=False,
    ),
    "mean flow": MeanFlowLoss(),
    "mean flow, literal": MeanFlowLoss(literal=True),
    "mean flow, published": MeanFlowLoss.published(),
    "improved mean flow": ImprovedMeanFlowLoss(),
    "pixel mean flow": PixelMeanFlowLoss(),
    "pixel mean flow, literal": PixelMeanFlowLoss(literal=True),
    "pixel mean flow, cosine": PixelMeanFlowLoss(schedule=CosineSchedule()),
    "flow matching": FlowMatchingLoss(),
    "consistency": ConsistencyLoss(),
    "alpha flow": AlphaFlowLoss(gap=0.3, bound=4.0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_torch(name, dtype):
    objective, weights = OBJECTIVES[name], weights_of(dtype)
    latents, images, noise, t, s = batch(dtype)
    one_space = (
        isinstance(objective, MeanFlowLoss | ConsistencyLoss) or objective.estimate is not None
    )
    targets = None if one_space else images
    given_ = {"noise": noise, "t": t, "s": s}

    for w in weights:
        w.requires_grad_()
    wanted = objective(mlp(torch, weights), latents, targets, **given_)
    slopes = torch.autograd.grad(wanted.loss.mean(), weights)

    def loss(parameters):
        out = objective(mlp(jnp, parameters), to_jax(latents), to_jax(targets), **to_jax(given_))
        return out.loss.mean(), out

    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(to_jax(weights))
    for field in LossOutput._fields:
        assert_same(getattr(found, field), getattr(wanted, field), TOLERANCE[dtype])
    for slope, expected in zip(gradient, slopes, strict=True):
        assert_same(slope, expected, TOLERANCE[dtype])


def test_finite_differences_are_those_of_torch(x64):
    latents, images, noise, t, s = batch(torch.float64)
    for order in (1, 2):
        objective = CrossFlowLoss(derivative=FiniteDifference(order=order))
        weights = weights_of(torch.float64)
        wanted = objective(mlp(torch, weights), latents, images, noise=noise, t=t, s=s)
        found = objective(
            mlp(jnp, to_jax(weights)),
            *map(to_jax, (latents, images)),
            **to_jax({"noise": noise, "t": t, "s": s}),
        )
        assert_same(found.loss, wanted.loss, 1e-10)


def test_with_x64_float32_arrays_have_coefficients_of_float64(x64):
    t = torch.tensor([0.5, 0.9, 1.0])
    s = t - torch.tensor([1e-6, 1e-7, 1e-6])
    c = MatchedStatistic().coefficients(CosineSchedule())
    for part in (c.prediction, c.derivative, c.scale):
        assert_same(part(to_jax(t), to_jax(s)), part(t, s), 1e-7)


def test_without_x64_the_scale_of_rows_near_the_diagonal_has_its_sign():
    t = jnp.linspace(0.05, 1, 512)
    for schedule in strategies.PRESETS.values():
        c = MatchedStatistic().coefficients(schedule)
        for gap in (1e-7, 1e-6, 1e-5, 1e-4):
            assert (c.scale(t, t - gap)[:-1] < 0).all()


# --- schedules, statistics, penalties
# --------------------------------------------------------------------------------

CALLS = ("alpha", "beta", "alpha_dot", "beta_dot", "signal_to_noise", "signal_to_noise_dot")


def in_x64(test):
    """Run a test of hypothesis with float64; a fixture would be made once for all examples."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        jax.config.update("jax_enable_x64", True)
        try:
            test(*args, **kwargs)
        finally:
            jax.config.update("jax_enable_x64", False)

    return run


@given(strategies.formula_schedules, strategies.pairs())
@in_x64
def test_schedules_have_the_values_of_torch(schedule, times):
    t = times[0]
    for call in CALLS:
        assert_same(getattr(schedule, call)(to_jax(t)), getattr(schedule, call)(t), 1e-12)
        assert getattr(schedule, call)(to_jax(t[0])).shape == ()


@given(st.data(), strategies.pairs(diagonal=True))
@in_x64
def test_coefficients_have_the_values_of_torch_edges_included(data, times):
    schedule = data.draw(strategies.formula_schedules)
    statistic = data.draw(strategies.any_statistics_for(schedule))
    c = strategies.coefficients(schedule, statistic)
    for part in (c.prediction, c.derivative, c.state, c.velocity, c.scaled_kappa, c.scale):
        found, wanted = np.asarray(part(*to_jax(times))), part(*times).numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("schedule", strategies.PRESETS.values(), ids=strategies.PRESETS)
def test_presets_have_the_values_of_torch(schedule, dtype):
    t = torch.linspace(0.1, 1, 64, dtype=dtype)
    z, noise = (strategies.normal(seed, 64, 3, 2, dtype=dtype) for seed in (1, 2))
    for call in CALLS:
        tolerance = 10 * TOLERANCE[dtype]  # lambda' is large near t = 0
        assert_same(
            jax.jit(getattr(schedule, call))(to_jax(t)), getattr(schedule, call)(t), tolerance
        )
    for found, wanted in zip(
        schedule.perturb(*map(to_jax, (z, noise, t))), schedule.perturb(z, noise, t), strict=True
    ):
        assert_same(found, wanted, 10 * TOLERANCE[dtype])


def test_the_step_undoes_the_prediction(x64):
    c = MatchedStatistic().coefficients(CosineSchedule())
    z_t, z_s = (jax.random.normal(jax.random.key(i), (4, 3)) for i in range(2))
    t, s = jnp.array([0.3, 0.6, 0.9, 1.0]), jnp.array([0.1, 0.5, 0.2, 0.4])
    f = c.prediction_of(z_t, z_s, t, s)
    np.testing.assert_allclose(c.step(f, z_t, t, s), z_s, atol=1e-12)


def test_a_callable_of_plain_arithmetic_serves_both_libraries(x64):
    plain, text = (
        Schedule(lambda t: (1 - t) * (1 + t), lambda t: t),
        Schedule("(1 - t)*(1 + t)", "t"),
    )
    t = jnp.linspace(0.05, 1, 20)
    for call in CALLS:
        np.testing.assert_allclose(
            getattr(plain, call)(t), getattr(text, call)(t), rtol=1e-12, atol=1e-12
        )


def of_jax():
    return Schedule(lambda t: jnp.cos(jnp.pi * t / 2), lambda t: jnp.sin(jnp.pi * t / 2))


def test_a_callable_written_in_jax_is_checked_derived_and_used(dtype):
    schedule, cosine = of_jax(), CosineSchedule()
    report = check_criteria(schedule, MatchedStatistic())
    assert report.ok and report.anchored and report.matched
    t = torch.linspace(0.1, 1, 20, dtype=dtype)
    for call in CALLS:
        assert_same(
            getattr(schedule, call)(to_jax(t)), getattr(cosine, call)(t), 10 * TOLERANCE[dtype]
        )
    latents, images, noise, t, s = to_jax(batch(dtype))
    model = mlp(jnp, to_jax(weights_of(dtype)))

    def jitted(objective):
        return jax.jit(lambda z: objective(model, z, images, noise=noise, t=t, s=s))(latents)

    found, wanted = (jitted(CrossFlowLoss(schedule=each)) for each in (schedule, cosine))
    tolerance = (
        1e-4 if dtype == torch.float64 else 1e-2
    )  # 0/0 on the edges is met just inside the triangle
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=tolerance)


def test_a_callable_that_fails_in_both_libraries_is_told_what_failed_in_torch():
    def broken(t):
        raise RuntimeError("of torch" if isinstance(t, torch.Tensor) else "of JAX")

    with pytest.raises(ScheduleError, match="of torch"):
        Schedule(broken, "t")


PENALTIES = [
    SquaredError(),
    SquaredError(summed=True),
    AbsoluteError(),
    HuberError(0.5),
    HuberError(2.0, summed=True),
    Adaptive(),
    Adaptive(AbsoluteError(), p=0.5),
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
@pytest.mark.parametrize("shape", [(5,), (5, 4), (5, 2, 3)])
def test_penalties_and_their_gradients_are_those_of_torch(penalty, shape, dtype):
    difference = strategies.normal(3, *shape, dtype=dtype).requires_grad_()
    wanted = penalty(difference)
    (slope,) = torch.autograd.grad(wanted.sum(), difference)
    assert_same(penalty(to_jax(difference)), wanted, TOLERANCE[dtype])
    assert_same(jax.grad(lambda d: penalty(d).sum())(to_jax(difference)), slope, TOLERANCE[dtype])


# --- times
# -------------------------------------------------------------------------------------------------

SAMPLERS = [
    UniformTimes(),
    UniformTimes(0.2, 0.6),
    LogitNormalTimes(),
    LogitNormalTimes(0.8, 0.8),
    PowerTimes(),
    ShiftedTimes(512),
    ShiftedTimes(8192, LogitNormalTimes()),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_times_have_the_distribution_that_they_have_on_torch(sampler):
    rows = 20000
    found = np.sort(sampler(rows, generator=jax.random.key(KEY)))
    wanted = sampler(rows, generator=torch.Generator().manual_seed(KEY)).sort().values.numpy()
    assert found.dtype == np.float32
    shares = np.searchsorted(found, wanted, side="right") / rows
    assert (
        np.abs(shares - np.arange(1, rows + 1) / rows).max() < 0.02
    )  # Kolmogorov-Smirnov: 1 in 1000


@pytest.mark.parametrize("mask_first", [False, True])
@pytest.mark.parametrize("equal", [0.0, 0.25, 0.5, 1.0])
def test_pairs_are_sorted_with_the_share_of_rows_on_the_diagonal(equal, mask_first):
    pairs = TimePairs(LogitNormalTimes(), equal=equal, mask_first=mask_first)
    t, s = jax.jit(lambda key: pairs(1000, generator=key))(jax.random.key(KEY))
    assert ((s >= 0) & (s <= t) & (t <= 1) & (t > 0)).all()
    assert abs(int((s == t).sum()) - 1000 * equal) <= 2
    wanted = pairs(20000, generator=torch.Generator().manual_seed(KEY))
    found = pairs(20000, generator=jax.random.key(KEY))
    for mine, other in zip(found, wanted, strict=True):
        assert abs(float(mine.mean()) - float(other.mean())) < 0.01


def test_which_rows_are_on_the_diagonal_has_nothing_to_do_with_their_times():
    t, s = TimePairs(equal=0.5, mask_first=True)(20000, generator=jax.random.key(KEY))
    on = np.asarray(s == t)
    assert abs(np.asarray(t)[on].mean() - 0.505) < 0.01


def test_one_key_draws_the_same_and_another_something_else():
    pairs = TimePairs()
    first, again, other = (pairs(64, generator=jax.random.key(seed)) for seed in (1, 1, 2))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert (first[0] != other[0]).any()
    assert (ToDataTimes()(8, generator=jax.random.key(0))[1] == 0).all()


def test_a_raw_key_is_a_key_and_dtypes_of_both_libraries_are_known(x64):
    assert UniformTimes()(8, generator=jax.random.PRNGKey(0)).shape == (8,)
    for dtype in (torch.float64, jnp.float64, "float64"):
        assert TimePairs()(8, generator=jax.random.key(0), dtype=dtype)[0].dtype == jnp.float64


# --- jit, grad, vmap, shard_map
# --------------------------------------------------------------------------------------


def setting(rows=ROWS):
    weights = to_jax(weights_of(torch.float32))
    latents, images = (jax.random.normal(jax.random.key(seed), (rows, SIZE)) for seed in (1, 2))
    return weights, latents, images, jax.random.key(KEY)


DRAWN = [
    "cross flow",
    "cross flow, cosine, literal",
    "mean flow, published",
    "pixel mean flow",
    "consistency",
]


@pytest.mark.parametrize("name", DRAWN)
def test_jit_changes_nothing_and_the_output_is_a_pytree(name):
    weights, latents, _, key = setting()

    def loss(parameters, z, k):
        out = OBJECTIVES[name](mlp(jnp, parameters), z, generator=k)
        return out.loss.mean(), out

    step = jax.value_and_grad(loss, has_aux=True)
    found, wanted = jax.jit(step)(weights, latents, key), step(weights, latents, key)
    assert isinstance(found[0][1], LossOutput)
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DRAWN)
def test_vmap_is_a_loop(name):
    weights, latents, _, key = setting()
    groups, keys = latents.reshape(4, 4, SIZE), jax.random.split(key, 4)

    def loss(z, k):
        return OBJECTIVES[name](mlp(jnp, weights), z, generator=k).loss

    together = jax.vmap(loss)(groups, keys)
    assert together.shape == (4, 4)
    np.testing.assert_allclose(
        together, jnp.stack([loss(*each) for each in zip(groups, keys, strict=True)]), rtol=1e-4
    )


def test_gradients_of_each_row_by_vmap_of_grad():
    weights, latents, images, _ = setting()
    t, s = jnp.linspace(0.2, 1, ROWS), jnp.linspace(0, 0.8, ROWS)

    def loss(parameters, *row):
        z, x, noise, t, s = (part[None] for part in row)
        return CrossFlowLoss()(mlp(jnp, parameters), z, x, noise=noise, t=t, s=s).loss[0]

    noise = jax.random.normal(jax.random.key(3), latents.shape)
    rows = jax.vmap(jax.grad(loss), (None, 0, 0, 0, 0, 0))(weights, latents, images, noise, t, s)

    def mean(parameters):
        return CrossFlowLoss()(
            mlp(jnp, parameters), latents, images, noise=noise, t=t, s=s
        ).loss.mean()

    for each, whole in zip(rows, jax.grad(mean)(weights), strict=True):
        np.testing.assert_allclose(each.mean(0), whole, atol=1e-5)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from flowspace import CrossFlowLoss, MeanFlowLoss, PixelMeanFlowLoss
shard_map = getattr(jax, "shard_map", None)
if shard_map is None:
    from jax.experimental.shard_map import shard_map
assert jax.device_count() == 2
mesh = Mesh(np.array(jax.devices()), ("rows",))
keys = jax.random.split(jax.random.key(0), 6)
w = jax.random.normal(keys[0], (8, 6)) / 3
z, noise = jax.random.normal(keys[1], (2, 8, 6))
t = jnp.linspace(0.2, 1, 8); s = t * jnp.array([1, 0, 0.5, 0.7] * 2)

def model(w):
    return lambda z, t, s: jnp.tanh(jnp.concatenate([z, t[:, None], s[:, None]], 1) @ w)

for objective in (CrossFlowLoss(), MeanFlowLoss(), PixelMeanFlowLoss()):
    def loss(w, z, noise, t, s):
        return objective(model(w), z, noise=noise, t=t, s=s).loss.mean()

    @jax.jit
    @partial(shard_map, mesh=mesh, in_specs=(P(), *[P("rows")] * 4), out_specs=P())
    def given(w, *batch):
        return jax.lax.pmean(loss(w, *batch), "rows")

    value, slope = jax.value_and_grad(given)(w, z, noise, t, s)
    wanted, expected = jax.value_and_grad(loss)(w, z, noise, t, s)
    assert abs(value - wanted) < 1e-5 * abs(wanted), (value, wanted)
    assert abs(slope - expected).max() < 1e-5 * abs(expected).max()

    @jax.jit
    @partial(shard_map, mesh=mesh, in_specs=(P(), P("rows"), P()), out_specs=(P(), P("rows")))
    def drawn(w, z, key):
        out = objective(model(w), z, generator=jax.random.fold_in(key, jax.lax.axis_index("rows")))
        return jax.lax.pmean(out.loss.mean(), "rows"), out.t

    mean, times = drawn(w, z, keys[2])
    assert np.isfinite(mean) and len(set(times.tolist())) == 8

    spread = NamedSharding(mesh, P("rows"))
    value = jax.jit(loss)(w, *(jax.device_put(x, spread) for x in (z, noise, t, s)))
    assert abs(value - wanted) < 1e-5 * abs(wanted)
print("agree")
"""


def python(code, **environment):
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(
    jax.__version_info__ < (0, 7), reason="an older shard_map joins no whole with a part"
)
def test_shard_map_over_two_devices_is_one_batch():
    flags = "--xla_force_host_platform_device_count=2"
    assert python(SHARDED, XLA_FLAGS=flags, JAX_PLATFORMS="cpu") == "agree"


def test_a_jitted_training_step_learns():
    objective, (weights, latents, _, key) = CrossFlowLoss(), setting(256)
    latents = latents[:, :1] * jnp.ones(SIZE)  # on a line, which a network sees through the noise

    @jax.jit
    def step(parameters, k):
        slope = jax.grad(lambda p: objective(mlp(jnp, p), latents, generator=k).loss.mean())(
            parameters
        )
        return jax.tree.map(lambda p, g: p - 0.05 * g, parameters, slope)

    def error(parameters):
        t, s, noise = jnp.full(256, 0.4), jnp.zeros(256), jax.random.normal(key, latents.shape)
        z_t, _ = objective.schedule.perturb(latents, noise, t)
        return ((mlp(jnp, parameters)(z_t, t, s) - latents) ** 2).mean()

    before = error(weights)
    for k in jax.random.split(key, 400):
        weights = step(weights, k)
    assert error(weights) < 0.3 * before


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "objective", [CrossFlowLoss(schedule=CosineSchedule()), MeanFlowLoss(), PixelMeanFlowLoss()]
)
def test_flow_maps_sample_what_they_sample_on_torch_also_under_jit(objective, steps, dtype):
    weights, noise = weights_of(dtype), strategies.normal(5, 4, SIZE, dtype=dtype)
    wanted = FlowMap(mlp(torch, weights), objective.schedule, objective.outputs).sample(
        noise, steps=steps
    )
    flow_map = FlowMap(mlp(jnp, to_jax(weights)), objective.schedule, objective.outputs)
    sample = functools.partial(flow_map.sample, steps=steps)
    for run in (sample, jax.jit(sample)):
        assert_same(run(to_jax(noise)), wanted, 10 * TOLERANCE[dtype])


def test_flow_maps_end_in_another_space_and_renoise_with_a_key():
    flow_map = FlowMap(lambda z, t, s: z[:, :2], LinearSchedule(), MatchedStatistic())
    noise, encode = jax.random.normal(jax.random.key(1), (4, SIZE)), lambda x: jnp.tile(x, 3)
    assert (flow_map.sample(noise) == noise[:, :2]).all()
    first, again, other = (
        jax.jit(lambda z, k: flow_map.sample(z, steps=3, encode=encode, generator=k))(
            noise, jax.random.key(seed)
        )
        for seed in (1, 1, 2)
    )
    assert first.shape == (4, 2) and (first == again).all() and (first != other).any()
    with pytest.raises(InputError, match="one key"):
        flow_map.sample(noise, steps=3, encode=encode)
    with pytest.raises(InputError, match="guidance"):
        flow_map.sample(noise, guidance=Guidance(null={"shift": 0.0}))


# --- routes
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [SharedPrimal(), ForwardMode(), FiniteDifference()], ids=repr)
def test_routes_find_the_derivative_and_let_no_gradient_through_it(route, x64):
    z, v = (jax.random.normal(jax.random.key(seed), (4, 3)) for seed in (1, 2))
    t = jnp.array([0.2, 0.5, 0.9, 1.0])

    def of(w):
        return route(
            lambda z_, t_, c: jnp.sin(w * z_) * t_[:, None] ** 2 * c["k"],
            (z, t, {"k": 2.0}),
            (v, jnp.ones(4), None),
        )

    value, derivative = of(1.3)
    exact = 2 * (1.3 * v * jnp.cos(1.3 * z) * t[:, None] ** 2 + 2 * t[:, None] * jnp.sin(1.3 * z))
    np.testing.assert_allclose(value, 2 * jnp.sin(1.3 * z) * t[:, None] ** 2, rtol=1e-12)
    np.testing.assert_allclose(
        derivative, exact, atol=1e-12 if not isinstance(route, FiniteDifference) else 1e-2
    )
    assert jax.grad(lambda w: of(w)[1].sum())(1.3) == 0
    assert jax.grad(lambda w: of(w)[0].sum())(1.3) != 0


def test_rows_that_are_not_wanted_are_zero_though_their_derivative_is_none():
    route, t = SharedPrimal(), jnp.array([0.0, 0.25])
    _, derivative = route(
        lambda z, t: z * jnp.sqrt(t)[:, None],
        (jnp.ones((2, 2)), t),
        (None, jnp.ones(2)),
        rows=t > 0,
    )
    np.testing.assert_allclose(derivative, [[0, 0], [1, 1]])


def test_a_function_with_no_forward_derivative_is_named_with_another_route():
    @jax.custom_vjp
    def fused(z):
        return z * 2

    fused.defvjp(lambda z: (fused(z), None), lambda _, g: (2 * g,))
    _, latents, _, key = setting()
    with pytest.raises(DerivativeError, match=r"custom_vjp.*FiniteDifference"):
        CrossFlowLoss()(lambda z, t, s: fused(z), latents, generator=key)
    out = CrossFlowLoss(derivative=FiniteDifference())(
        lambda z, t, s: fused(z), latents, generator=key
    )
    assert jnp.isfinite(out.loss).all()


def test_conditions_are_any_pytrees():
    weights, latents, _, key = setting()
    deep = {"shift": {"a": [jnp.ones((ROWS, SIZE)), None]}}

    def model(z, t, s, shift, name):
        return mlp(jnp, weights)(z, t, s, shift["a"][0])

    plain = CrossFlowLoss()(
        mlp(jnp, weights), latents, cond={"shift": jnp.ones((ROWS, SIZE))}, generator=key
    )
    nested = CrossFlowLoss()(model, latents, cond=deep | {"name": "any"}, generator=key)
    assert (plain.loss == nested.loss).all()


def test_half_precision_latents_are_compared_in_float32():
    weights, latents, _, key = setting()
    out = CrossFlowLoss()(mlp(jnp, weights), latents.astype(jnp.bfloat16), generator=key)
    assert (out.z_t.dtype, out.t.dtype, out.loss.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


# --- keys and checks
# -------------------------------------------------------------------------------------------------


def refused(error, match, objective=None, model=None, **options):
    weights, latents, _, _ = setting()
    with pytest.raises(error, match=match):
        (objective or CrossFlowLoss())(model or mlp(jnp, weights), latents, **options)


def test_a_key_is_needed_where_something_is_drawn_and_only_there():
    weights, latents, _, key = setting()
    t, s, noise = jnp.full(ROWS, 0.5), jnp.zeros(ROWS), jnp.ones_like(latents)
    for options in ({}, {"noise": noise}, {"t": t, "s": s}):
        refused(InputError, r"got generator = None.*generator=jax\.random\.key\(0\)", **options)
        refused(
            InputError,
            r"got generator = None.*generator=jax\.random\.key\(0\)",
            ConsistencyLoss(),
            **options,
        )
    CrossFlowLoss()(mlp(jnp, weights), latents, noise=noise, t=t, s=s)
    refused(InputError, r"shape \(3,\).*one key", generator=jax.random.split(key, 3))
    refused(InputError, "got generator = 7", generator=7)


def test_times_and_noise_come_from_independent_keys():
    weights, latents, _, key = setting(512)
    out = MeanFlowLoss(times=TimePairs(LogitNormalTimes(), equal=0))(
        mlp(jnp, weights), 0 * latents, generator=key
    )
    noise = out.z_t[:, 0] / out.t
    assert abs(np.corrcoef(noise, jax.scipy.special.logit(out.t))[0, 1]) < 0.15
    assert abs(np.corrcoef(noise, out.s)[0, 1]) < 0.15


BAD_TIMES = [
    ({"t": 0.0, "s": 0.0}, "t is out of range"),
    ({"t": 1.5, "s": 0.0}, "t is out of range"),
    ({"t": 0.5, "s": 0.6}, "s is out of range"),
    ({"t": float("nan"), "s": 0.0}, "t is out of range"),
]


@pytest.mark.parametrize(("times", "message"), BAD_TIMES)
def test_given_times_are_checked_outside_jit_with_the_words_of_torch(times, message):
    weights, latents, _, key = setting()
    arrays = {name: jnp.full(ROWS, value) for name, value in times.items()}
    refused(TimeError, message, generator=key, **arrays)
    with pytest.raises(TimeError) as of_jax_:
        CrossFlowLoss()(mlp(jnp, weights), latents, generator=key, **arrays)
    with pytest.raises(TimeError) as of_torch:
        tensors = {name: torch.full((ROWS,), value) for name, value in times.items()}
        CrossFlowLoss()(mlp(torch, weights_of(torch.float32)), torch.zeros(ROWS, SIZE), **tensors)
    assert str(of_jax_.value) == str(of_torch.value)
    jax.jit(lambda z, given: CrossFlowLoss()(mlp(jnp, weights), z, generator=key, **given).loss)(
        latents, arrays
    )


def test_given_times_have_their_shape_and_type_checked_also_while_traced():
    weights, latents, _, key = setting()

    def step(t, s):
        return CrossFlowLoss()(mlp(jnp, weights), latents, t=t, s=s, generator=key).loss

    for run in (step, jax.jit(step)):
        assert run(jnp.float32(0.5), jnp.zeros(ROWS)).shape == (ROWS,)
        with pytest.raises(TimeError, match=r"t.astype\(float\)"):
            run(jnp.ones(ROWS, int), jnp.zeros(ROWS))
        with pytest.raises(TimeError, match="shape"):
            run(jnp.ones(3), jnp.zeros(ROWS))
    with pytest.raises(TimeError, match="only one"):
        step(jnp.ones(ROWS), None)


def test_arrays_of_both_libraries_do_not_mix():
    _, latents, _, key = setting()
    match = "got tensors of torch and arrays of JAX together"
    refused(InputError, match, noise=torch.zeros(ROWS, SIZE), generator=key)
    refused(InputError, match, generator=torch.Generator())
    refused(InputError, match, t=torch.ones(ROWS), s=jnp.zeros(ROWS), generator=key)
    with pytest.raises(InputError, match=match):
        CrossFlowLoss()(
            mlp(torch, weights_of(torch.float32)), torch.zeros(ROWS, SIZE), generator=key
        )
    with pytest.raises(InputError, match=match):
        LinearSchedule().perturb(latents, torch.zeros(ROWS, SIZE), jnp.ones(ROWS))


def test_what_does_not_fit_is_refused_with_the_words_of_torch():
    weights, latents, _, key = setting()
    got_scalar = r"got shape \(\) from the model"
    refused(InputError, got_scalar, model=lambda z, t, s: z.sum(), generator=key)
    refused(InputError, "got tuple from the model", model=lambda z, t, s: (z, z), generator=key)
    refused(InputError, "noise of shape", noise=jnp.ones((2, 2)), generator=key)
    with pytest.raises(InputError, match="got latents of dtype int32 and shape"):
        CrossFlowLoss()(mlp(jnp, weights), latents.astype(int), generator=key)
    with pytest.raises(InputError, match="each row needs its pair"):
        CrossFlowLoss()(mlp(jnp, weights), latents, latents[:3], generator=key)
    with pytest.raises(TimeError, match="use \\(B,\\)"):
        LinearSchedule().perturb(latents, latents, jnp.ones(3))


def test_what_is_not_there_on_jax_says_so():
    key = jax.random.key(0)
    refused(
        InputError,
        "guidance",
        CrossFlowLoss(guidance=Guidance(null={"shift": 0.0})),
        generator=key,
    )
    refused(InputError, "head=False", ImprovedMeanFlowLoss(head=True), generator=key)
    teacher = TrajectoryMatchingLoss(statistic=MeanFlowStatistic(), teacher=lambda z, t: z)
    refused(InputError, "trajectory matching", teacher, generator=key)


# --- the page and imports
# --------------------------------------------------------------------------------------------


def test_the_example_of_the_page_runs():
    example = (
        (ROOT / "docs" / "pages" / "jax.md").read_text().split("```python\n")[1].split("```")[0]
    )
    assert 0 < float(python(example)) < 1.1


def test_torch_needs_no_jax():
    code = """
import sys
sys.modules["jax"] = None
import torch
from flowspace import CrossFlowLoss, Schedule
loss_fn = CrossFlowLoss(schedule=Schedule(lambda t: 1 - t, lambda t: t))
loss = loss_fn(lambda z, t, s: z, torch.zeros(4, 2)).loss
print(tuple(loss.shape))"""
    assert python(code) == "(4,)"


def test_jax_is_imported_by_nobody_but_the_user():
    code = """
import sys, torch
import flowspace
flowspace.CrossFlowLoss()(lambda z, t, s: z, torch.zeros(4, 2))
print("jax" in sys.modules, "flowspace.backends.jax_backend" in sys.modules)"""
    assert python(code) == "False False"


@pytest.mark.parametrize("name", ["torch_backend", "jax_backend"])
def test_a_backend_has_what_the_other_has(name):
    import importlib

    module = importlib.import_module(f"flowspace.backends.{name}")
    own = {"on_tensors", "value_and_derivative"} if name == "jax_backend" else set()
    from flowspace.backends import jax_backend, torch_backend

    assert set(module.__all__) - own == set(torch_backend.__all__) & set(jax_backend.__all__)
    assert all(hasattr(module, each) for each in module.__all__)
