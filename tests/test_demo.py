"""The recipes: metrics against closed forms, data that nothing is judged by, a whole small run
from the outside.
"""

import dataclasses
import html.parser
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowspace import InputError, RunError
from flowspace.demo import page as report
from flowspace.recipes import digits, metrics, swiss_roll
from flowspace.recipes.networks import Autoencoder, JudgeClassifier, SmallViT
from flowspace.training import LoopSettings


def test_frechet_distance_of_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    first = (
        torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
        * torch.tensor([1.0, 2.0, 0.5])
        + 1
    )
    second = torch.randn(200_000, 3, generator=generator, dtype=torch.float64) * torch.tensor(
        [2.0, 1.0, 0.5]
    )
    assert metrics.frechet_distance(first, second) == pytest.approx(3 + 1 + 1, rel=0.01)


@given(st.integers(0, 100))
def test_frechet_distance_is_symmetric_shift_invariant_and_zero_for_equals(seed):
    a, b = torch.randn(
        2, 50, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a))
    assert metrics.frechet_distance(a + 5, b + 5) == pytest.approx(
        metrics.frechet_distance(a, b), abs=1e-9
    )


def test_diversity_scales_with_the_images_and_is_zero_for_copies():
    images, labels = torch.randn(60, 1, 4, 4), torch.arange(60) % 3
    assert metrics.diversity(images / 2, labels, images, labels) == pytest.approx(0.5)
    copies = images[:3].repeat(20, 1, 1, 1)
    assert metrics.diversity(copies, labels, images, labels) == pytest.approx(0, abs=1e-6)


@given(st.integers(0, 50))
def test_sliced_wasserstein_is_zero_for_reorderings_and_grows_with_a_shift(seed):
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(seed))
    assert swiss_roll.sliced_wasserstein(points, points.flip(0)) == pytest.approx(0, abs=1e-6)
    near, far = (swiss_roll.sliced_wasserstein(points, points + shift) for shift in (0.1, 1.0))
    assert 0 < near < far


def test_the_roll_is_lifted_without_distortion():
    world = swiss_roll.World.of(0)
    points = swiss_roll.roll(20_000, torch.Generator().manual_seed(5))
    torch.testing.assert_close(world.images(points).norm(dim=1), points.norm(dim=1))
    latents = world.latents(points)
    torch.testing.assert_close(latents.mean(0), torch.zeros(2), atol=0.03, rtol=0)
    assert latents.square().mean() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    "variant", swiss_roll.VARIANTS, ids=lambda v: f"{v.schedule}, {v.property}"
)
@pytest.mark.parametrize("literal", [False, True])
def test_every_variant_of_the_roll_can_be_trained(variant, literal):
    result = swiss_roll.train(variant, literal, seed=0, steps=2, batch=32)
    assert result.samples.shape == (5000, 2)
    assert math.isfinite(result.distance)


@pytest.mark.slow
def test_the_matched_statistic_learns_the_roll_and_an_unanchored_one_does_not():
    matched, never = (swiss_roll.train(swiss_roll.VARIANTS[i], False, seed=0) for i in (0, 6))
    assert matched.distance < 0.05
    assert not never.distance < 1


def test_nothing_is_judged_by_what_it_was_trained_on():
    data = digits.load("digits")
    assert len(data.images) + len(data.test_images) == 1797
    rows = {
        name: {tuple(image.flatten().tolist()) for image in images}
        for name, images in (
            ("test", data.test_images),
            ("first", data.half(0)[0]),
            ("second", data.half(1)[0]),
            ("all", data.images),
        )
    }
    assert not rows["first"] & rows["second"]
    assert not rows["test"] & rows["all"]
    assert rows["first"] | rows["second"] == rows["all"]
    assert data.images.min() == -1
    assert data.images.max() == 1


def test_judges_are_averaged_each_against_its_own_features():
    data = digits.load("digits")
    networks = tuple(JudgeClassifier(8).eval() for _ in range(2))
    images, labels = data.half(0)
    alone = [digits.Judge((network,), data).score(images, labels) for network in networks]
    both = digits.Judge(networks, data).score(images, labels)
    assert alone[0].frechet != pytest.approx(alone[1].frechet, rel=1e-3)
    assert both.frechet == pytest.approx((alone[0].frechet + alone[1].frechet) / 2)
    assert both.accuracy == pytest.approx((alone[0].accuracy + alone[1].accuracy) / 2)


def test_an_unknown_data_set_is_refused():
    with pytest.raises(InputError, match="'digits' or 'mnist'"):
        digits.load("cifar")


@pytest.mark.parametrize(("outputs", "patch"), [(1, 2), (4, 1)])
def test_the_vit_maps_a_latent_grid_to_its_output_space(outputs, patch):
    network = SmallViT(4, 5, outputs, patch)
    torch.nn.init.normal_(network.head.weight)
    z, t = torch.randn(3, 4, 5, 5), torch.rand(3)
    out = network(z, t, t / 2, labels=torch.tensor([0, 1, 2]))
    assert out.shape == (3, outputs, 5 * patch, 5 * patch)
    moved = z.clone()
    moved[1] += 1
    other = network(moved, t, t / 2, labels=torch.tensor([0, 1, 2]))
    torch.testing.assert_close(out[[0, 2]], other[[0, 2]])
    assert not torch.allclose(out[1], other[1])


@pytest.mark.parametrize(
    ("network", "pixels", "side"),
    [(Autoencoder(8, 4, 2), 8, 2), (Autoencoder(8, 4, 4), 8, 4), (Autoencoder(28, 4, 4), 28, 4)],
)
def test_latents_are_standardised_and_decoding_undoes_it(network, pixels, side):
    images = torch.randn(32, 1, pixels, pixels)
    network.fit_latents(images)
    latents = network.encode(images)
    assert latents.shape == (32, 4, side, side)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-5, rtol=0)
    assert network.decode(latents).shape == images.shape
    torch.testing.assert_close(network.decode(latents), network.decoder(network.encoder(images)))


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.sources, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]


TINY = dataclasses.replace(
    digits.Settings(),
    width=16,
    depth=1,
    heads=2,
    generator=LoopSettings(steps=3, batch=8),
    autoencoder=LoopSettings(steps=3, batch=8),
    classifier=LoopSettings(steps=3, batch=8),
)


def test_a_run_leaves_its_pictures_numbers_and_page_and_continues(tmp_path):
    first = digits.run(TINY, tmp_path, baselines=True, seeds=2)
    names = ["real", "crossflow", "denoiser", "meanflow+decoder", "decoder on noise"]
    assert list(first["methods"]) == names
    assert json.loads((tmp_path / "metrics.json").read_text())["methods"].keys() == set(names)
    page = Page((tmp_path / "report.html").read_text())
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert page.tags.count("tr") == 1 + len(names)
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.partial"))
    again = digits.run(TINY, tmp_path, baselines=True, seeds=2)
    for name in names:
        for key in ("accuracy", "diversity", "frechet"):
            assert again["methods"][name][key] == first["methods"][name][key]


def test_a_folder_of_another_run_is_refused(tmp_path):
    digits.run(TINY, tmp_path)
    with pytest.raises(RunError, match="other settings"):
        digits.run(dataclasses.replace(TINY, generator=LoopSettings(steps=4, batch=8)), tmp_path)


@pytest.mark.parametrize(
    "change", [{"perceptual": 0.0}, {"width": 32}, {"channels": 2}, {"patch": 2}]
)
def test_weights_are_not_taken_from_a_run_with_other_settings(tmp_path, change):
    digits.run(TINY, tmp_path)
    with pytest.raises(RunError, match=f"{next(iter(change))}: .* there, .* now"):
        digits.run(dataclasses.replace(TINY, **change), tmp_path)


def test_a_table_has_a_column_for_each_heading():
    table = report.markdown_table(("a", "b"), [("x", "1"), ("y", "2")])
    assert table.splitlines() == ["| a | b |", "| --- | ---: |", "| x | 1 |", "| y | 2 |"]


def test_the_page_escapes_what_it_is_given():
    assert "<script>" not in report.page(
        "<script>", ["<script>", (("<script>",), [("<script>",)])]
    )
