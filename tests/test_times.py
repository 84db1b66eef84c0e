"""Times stay where they belong, and the generator alone decides them."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds

from flowspace import (
    TIME_FLOOR,
    CrossFlowLoss,
    KarrasTimes,
    LogitNormalTimes,
    PowerTimes,
    ShiftedTimes,
    TimeError,
    TimePairs,
    ToDataTimes,
    UniformTimes,
)
from flowspace.times import RandomSource

SAMPLERS = [
    UniformTimes(),
    UniformTimes(0.3, 0.6),
    LogitNormalTimes(),
    LogitNormalTimes(0.8, 0.8),
    LogitNormalTimes(-30, 1),
    LogitNormalTimes(30, 1),
    PowerTimes(),
    PowerTimes(0.5),
    PowerTimes(30.0),
    ShiftedTimes(64),
    ShiftedTimes(32 * 16 * 16),
    ShiftedTimes(10**6, LogitNormalTimes()),
    KarrasTimes(),
]
samplers = st.sampled_from(SAMPLERS)
PAIRS = st.builds(TimePairs, samplers, st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans())


def generator(seed):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60)
@given(samplers, seeds, st.sampled_from([torch.float32, torch.float64]), st.integers(0, 300))
def test_times_are_between_the_floor_and_one(sampler, seed, dtype, rows):
    t = sampler(rows, generator=generator(seed), dtype=dtype)
    assert t.shape == (rows,) and t.dtype == dtype
    floor = torch.tensor(TIME_FLOOR, dtype=dtype)
    assert ((t >= floor) & (t <= 1)).all()


@settings(max_examples=60)
@given(
    st.one_of(PAIRS, st.builds(ToDataTimes, samplers)),
    seeds,
    st.sampled_from([torch.float32, torch.float64]),
)
def test_pairs_are_ordered(sampler, seed, dtype):
    t, s = sampler(64, generator=generator(seed), dtype=dtype)
    assert t.shape == s.shape == (64,) and t.dtype == s.dtype == dtype
    assert ((s >= 0) & (s <= t) & (t >= torch.tensor(TIME_FLOOR, dtype=dtype)) & (t <= 1)).all()


@settings(max_examples=30)
@given(st.one_of(samplers, PAIRS), seeds)
def test_the_same_seed_draws_the_same_and_the_global_generator_is_left_alone(sampler, seed):
    before = torch.get_rng_state()
    first, second = sampler(32, generator=generator(seed)), sampler(32, generator=generator(seed))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_draws_something_else():
    assert not torch.equal(
        UniformTimes()(32, generator=generator(0)), UniformTimes()(32, generator=generator(1))
    )


@settings(max_examples=40)
@given(seeds, st.integers(1, 200), st.floats(0, 1), st.booleans())
def test_the_share_on_the_diagonal_is_the_one_asked_for(seed, rows, equal, mask_first):
    t, s = TimePairs(equal=equal, mask_first=mask_first)(
        rows, generator=generator(seed), dtype=torch.float64
    )
    assert abs(int((t == s).sum()) - equal * rows) < 1


def test_the_share_is_met_on_average_where_it_is_no_whole_number_of_rows():
    draw = generator(0)
    counts = [int(torch.eq(*TimePairs(equal=0.35)(5, generator=draw)).sum()) for _ in range(2000)]
    assert set(counts) == {1, 2} and abs(sum(counts) / 2000 - 1.75) < 0.04


def test_which_rows_are_on_the_diagonal_is_random():
    draw = generator(0)
    share = (
        sum(torch.eq(*TimePairs(equal=0.5)(8, generator=draw)).double() for _ in range(2000))
        / 2000
    )
    assert ((share - 0.5).abs() < 0.06).all()


@pytest.mark.parametrize(
    ("mask_first", "mean", "median"), [(False, 2 / 3, math.sqrt(0.5)), (True, 1 / 2, 1 / 2)]
)
def test_masked_before_sorting_the_diagonal_is_a_plain_draw_and_after_it_the_larger_of_two(
    mask_first, mean, median
):
    t, s = TimePairs(UniformTimes(TIME_FLOOR, 1), 0.5, mask_first)(
        40_000, generator=generator(0), dtype=torch.float64
    )
    unit = (t - TIME_FLOOR) / (1 - TIME_FLOOR)
    on = t == s
    assert (
        abs(float(unit[on].mean()) - mean) < 0.01
        and abs(float(unit[on].median()) - median) < 0.015
    )
    assert abs(float(unit[~on].mean()) - 2 / 3) < 0.01
    assert abs(float(((s - TIME_FLOOR) / (1 - TIME_FLOOR))[~on].mean()) - 1 / 3) < 0.01


@settings(max_examples=30)
@given(seeds, st.sampled_from([1, 64, 4096, 8192, 10**6]), samplers)
def test_shifted_times_are_their_formula(seed, dim, inner):
    t = inner(64, generator=generator(seed), dtype=torch.float64)
    k = math.sqrt(dim / 4096)
    wanted = (k * t / (1 + (k - 1) * t)).clamp(min=TIME_FLOOR)
    found = ShiftedTimes(dim, inner)(64, generator=generator(seed), dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def test_a_shift_of_one_changes_nothing_and_a_larger_latent_is_noisier():
    plain = UniformTimes()(64, generator=generator(0), dtype=torch.float64)
    same, more = (
        ShiftedTimes(dim)(64, generator=generator(0), dtype=torch.float64) for dim in (4096, 8192)
    )
    torch.testing.assert_close(same, plain)
    assert ShiftedTimes(4096).shift == 1 and (more[plain < 1] > plain[plain < 1]).all()


def test_the_distributions_are_those_of_their_names():
    uniform = UniformTimes(0.2, 0.6)(40_000, generator=generator(0), dtype=torch.float64)
    assert (
        abs(float(uniform.mean()) - 0.4) < 0.003
        and abs(float(uniform.std()) - 0.4 / math.sqrt(12)) < 0.002
    )
    logit = torch.logit(
        LogitNormalTimes(0.8, 0.8)(40_000, generator=generator(0), dtype=torch.float64)
    )
    assert abs(float(logit.mean()) - 0.8) < 0.02 and abs(float(logit.std()) - 0.8) < 0.02


@settings(max_examples=20)
@given(st.floats(0.2, 5), seeds)
def test_a_power_of_uniform_times_has_the_distribution_of_its_formula(power, seed):
    draws = PowerTimes(power)(4000, generator=generator(seed), dtype=torch.float64)
    unit = ((draws - TIME_FLOOR) / (1 - TIME_FLOOR)).clamp(0, 1) ** (1 / power)
    assert (
        unit.sort().values - torch.linspace(0, 1, 4000, dtype=torch.float64)
    ).abs().max() < 0.045


@settings(max_examples=20)
@given(st.floats(0.02, 1), st.floats(1.5, 50), st.floats(0.5, 9), seeds)
def test_karras_times_are_their_formula(lowest, span, rho, seed):
    highest = lowest * span
    unit = torch.rand(64, generator=generator(seed), dtype=torch.float64)
    level = (lowest ** (1 / rho) * (1 - unit) + highest ** (1 / rho) * unit) ** rho
    found = KarrasTimes(lowest, highest, rho)(64, generator=generator(seed), dtype=torch.float64)
    torch.testing.assert_close(found, level / (1 + level), rtol=1e-12, atol=1e-12)


class JustBelowOne(RandomSource):
    """Single numbers are the largest of float32 below one."""

    def uniform(self, *shape):
        drawn = super().uniform(*shape)
        if shape:
            return drawn
        return torch.full_like(drawn, 1 - 2**-24)


def test_a_draw_that_rounds_to_the_next_row_takes_none_from_the_diagonal():
    source = JustBelowOne.of(generator(0), None, torch.float32)
    t, s = TimePairs(equal=0.5).draw(8, source)
    assert int((t == s).sum()) == 4


def test_only_the_plain_way_to_draw_says_how_many_rows_are_off_the_diagonal():
    class Called(TimePairs):
        def __call__(self, rows, **settings):
            t, s = super().__call__(rows, **settings)
            return t, s / 2

    assert Called().most_off_diagonal(8) is None
    assert TimePairs(equal=0.35).most_off_diagonal(5) == 4
    assert ToDataTimes().most_off_diagonal(5) == 5


def test_the_larger_of_two_squared_times_is_uniform():
    t, s = TimePairs(PowerTimes(2), 0.0)(40_000, generator=generator(0), dtype=torch.float64)
    low, high = ((x - TIME_FLOOR) / (1 - TIME_FLOOR) for x in (s, t))
    assert (
        abs(float(high.mean()) - 1 / 2) < 0.006
        and abs(float(high.std()) - 1 / math.sqrt(12)) < 0.004
    )
    assert abs(float(((low / high) < 0.25).double().mean()) - 1 / 2) < 0.01


def test_cross_flow_ties_small_times_to_the_data():
    """The shares that the page "Training well" states."""
    rows = 100_000
    t, s = CrossFlowLoss().times(rows, generator=generator(0), dtype=torch.float64)
    plain, same = TimePairs()(rows, generator=generator(0), dtype=torch.float64)
    share, before = (float((x[x == y] < 0.05).double().mean()) for x, y in ((t, s), (plain, same)))
    assert share == pytest.approx(1 / 5, abs=0.01) and before == pytest.approx(1 / 600, abs=0.001)
    off = t != s
    assert float((s[off] < t[off] / 4).double().mean()) == pytest.approx(0.455, abs=0.01)


@settings(max_examples=10)
@given(samplers, seeds)
def test_to_data_ends_at_zero_in_every_row(inner, seed):
    t, s = ToDataTimes(inner)(16, generator=generator(seed))
    assert torch.equal(t, inner(16, generator=generator(seed))) and (s == 0).all()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: UniformTimes(0.5, 0.4), "0.5.*0.4"),
        (lambda: UniformTimes(0.0, 1.0), "low = 0.0"),
        (lambda: UniformTimes(0.1, 1.5), "1.5"),
        (lambda: UniformTimes(math.nan, 1), "nan"),
        (lambda: UniformTimes(0.5, 0.5), "low = 0.5, high = 0.5"),
        (lambda: UniformTimes(0.5, True), "high = True"),
        (lambda: UniformTimes("0.5", 1.0), "low = 0.5"),
        (lambda: PowerTimes(0), "power = 0"),
        (lambda: PowerTimes(True), "power = True"),
        (lambda: PowerTimes(math.inf), "power = inf"),
        (lambda: LogitNormalTimes(0, 0), "spread = 0"),
        (lambda: LogitNormalTimes(0, math.inf), "spread = inf"),
        (lambda: LogitNormalTimes(math.inf, 1), "mean = inf"),
        (lambda: LogitNormalTimes(True, 1), "mean = True"),
        (lambda: LogitNormalTimes(0, True), "spread = True"),
        (lambda: KarrasTimes(0), "lowest = 0"),
        (lambda: KarrasTimes(2.0, 2.0), "highest = 2.0"),
        (lambda: KarrasTimes(True, 2.0), "lowest = True"),
        (lambda: KarrasTimes(0.5, True), "highest = True"),
        (lambda: KarrasTimes(0.5, math.inf), "highest = inf"),
        (lambda: KarrasTimes(rho=0), "rho = 0"),
        (lambda: KarrasTimes(rho=math.inf), "rho = inf"),
        (lambda: ShiftedTimes(0), "dim = 0"),
        (lambda: ShiftedTimes(-4), "dim = -4"),
        (lambda: TimePairs(equal=1.5), "equal = 1.5"),
        (lambda: TimePairs(equal=-0.1), "equal = -0.1"),
        (lambda: TimePairs(equal=math.nan), "equal = nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_their_values(make, named):
    with pytest.raises(TimeError, match=named):
        make()


def test_a_misspelt_keyword_is_a_type_error():
    for make in (
        lambda: TimePairs(equals=0.5),
        lambda: UniformTimes(lo=0.1),
        lambda: ShiftedTimes(dims=4),
    ):
        with pytest.raises(TypeError):
            make()


@settings(max_examples=10)
@given(PAIRS)
def test_a_sampler_survives_pickling_and_holds_no_state(sampler):
    again = pickle.loads(pickle.dumps(sampler))
    assert again == sampler and hash(again) == hash(sampler)
    with pytest.raises(AttributeError):
        sampler.equal = 0.1
