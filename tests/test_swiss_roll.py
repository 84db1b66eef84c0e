"""The Swiss roll: its two spaces, its distance, and every variant in both forms."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[1] / "examples" / "swiss_roll"
sys.path.insert(0, str(FOLDER))
swiss_roll = importlib.import_module("swiss_roll")


@given(st.integers(0, 50))
def test_sliced_wasserstein_is_zero_for_reorderings_and_grows_with_a_shift(seed):
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(seed))
    assert swiss_roll.sliced_wasserstein(points, points.flip(0)) == pytest.approx(0, abs=1e-6)
    near, far = (swiss_roll.sliced_wasserstein(points, points + shift) for shift in (0.1, 1.0))
    assert 0 < near < far


def test_the_roll_is_lifted_without_distortion():
    world = swiss_roll.RollSpaces.of(0)
    points = swiss_roll.roll(20_000, torch.Generator().manual_seed(5))
    torch.testing.assert_close(world.images(points).norm(dim=1), points.norm(dim=1))
    latents = world.latents(points)
    torch.testing.assert_close(latents.mean(0), torch.zeros(2), atol=0.03, rtol=0)
    assert latents.square().mean() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    "variant", swiss_roll.VARIANTS, ids=lambda v: f"{v.schedule}, {v.h}, {v.property}"
)
@pytest.mark.parametrize("literal", [False, True])
def test_every_variant_of_the_roll_can_be_trained(variant, literal):
    result = swiss_roll.train(variant, literal, seed=0, steps=2, batch=32)
    assert result.samples.shape == (5000, 2)
    assert math.isfinite(result.distance)


@pytest.mark.slow
def test_the_matched_statistic_learns_the_roll_and_an_unanchored_one_does_not():
    matched, never = (swiss_roll.train(swiss_roll.VARIANTS[i], False, seed=0) for i in (0, 3))
    assert matched.distance < 0.05
    assert not never.distance < 1


def test_the_table_has_a_row_a_variant_and_counts_what_diverged():
    matched, other = swiss_roll.VARIANTS[0], swiss_roll.VARIANTS[8]
    cloud = torch.zeros(1, 2)
    results = [
        swiss_roll.RollResult(variant, literal, seed, distance, cloud)
        for variant, literal, *distances in (
            (matched, False, 0.25, 0.75),
            (matched, True, 2e3, float("nan")),
            (other, False, 0.5, 0.5),
            (other, True, 0.5, 1.5),
        )
        for seed, distance in enumerate(distances)
    ]
    table = swiss_roll.rows(results)
    assert [row[0] for row in table] == ["O1 O2 O3", "O3"]
    assert table[0][-2:] == ("0.500 ± 0.250", "> 1e3 in 2 of 2")
    assert table[1][-2:] == ("0.500 ± 0.000", "1.000 ± 0.500")


def test_every_observation_of_the_paper_has_as_many_rows_as_in_its_table():
    rows = " ".join(variant.observations for variant in swiss_roll.VARIANTS).split()
    assert [rows.count(name) for name in ("O1", "O2", "O3")] == [3, 4, 4]
