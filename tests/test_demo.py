"""The demo: metrics against closed forms, data that nothing is judged by, its training loop, a
whole small run from the outside.
"""

import dataclasses
import html.parser
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flowspace import InputError, RunError
from flowspace.demo import data, digits, metrics, stage_one
from flowspace.demo.loop import Trainer, TrainSettings, rows_of
from flowspace.demo.networks import Autoencoder, JudgeClassifier, SmallViT


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


@given(st.integers(0, 100), st.sampled_from([3, 8, 40]))
def test_frechet_distance_of_correlated_features_few_or_many(seed, count):
    """The root's trace is the sum of the roots of the eigenvalues of C1 C2; few rows leave some
    of them zero.
    """
    generator = torch.Generator().manual_seed(seed)
    a, b, mixed = (
        torch.randn(rows, 6, generator=generator, dtype=torch.float64) for rows in (count, 50, 6)
    )
    a, b = a @ mixed, b + 1
    c1, c2 = torch.cov(a.T), torch.cov(b.T)
    roots = torch.linalg.eigvals(c1 @ c2).real.clamp(min=0).sqrt().sum()
    wanted = (a.mean(0) - b.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * roots
    assert metrics.frechet_distance(a, b) == pytest.approx(float(wanted), rel=1e-5)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_moments_of_features_are_formed_in_float64():
    a, b = (1000 + torch.randn(2, 500, 4)).double()
    found = metrics.frechet_distance(a.float(), b.float())
    assert found == pytest.approx(metrics.frechet_distance(a.float().double(), b.float().double()))


def test_diversity_scales_with_the_images_and_is_zero_for_copies():
    images, labels = torch.randn(60, 1, 4, 4), torch.arange(60) % 3
    assert metrics.diversity(images / 2, labels, images, labels) == pytest.approx(0.5)
    copies = images[:3].repeat(20, 1, 1, 1)
    assert metrics.diversity(copies, labels, images, labels) == pytest.approx(0, abs=1e-6)


def test_pairs_are_of_one_class_and_classes_count_alike(monkeypatch):
    """Those of the first class are 1 apart, those of the second 3; the third has one image."""
    rows = torch.tensor([0.0, 1.0, 5.0, 8.0, 11.0, 9.0]).reshape(-1, 1, 1, 1)
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    assert metrics.within_class_distance(rows, labels) == pytest.approx((1 + 4) / 2)
    monkeypatch.setattr(metrics, "MOST_PAIRED", 2)
    assert metrics.within_class_distance(rows, labels) == pytest.approx((1 + 3) / 2)


class HandJudge(nn.Module):
    """Features by one matrix, classes by another; remembers how many images it saw at once."""

    def __init__(self, seed):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(16, 3, generator=draw))
        self.head, self.seen = nn.Linear(3, 2), []
        nn.init.normal_(self.head.weight, generator=draw)

    def features(self, images):
        self.seen.append((len(images), images.dtype, torch.is_grad_enabled()))
        return images.flatten(1) @ self.matrix


@pytest.fixture
def judged(monkeypatch):
    """Two judges of uint8 pictures in two classes, of which twelve are compared at a time."""
    monkeypatch.setattr(metrics, "AT_ONCE", 5)
    monkeypatch.setattr(data, "MOST_JUDGED", 12)
    pictures = torch.randint(0, 256, (60, 1, 4, 4), dtype=torch.uint8)
    labels = torch.arange(60) // 2 % 2
    held = data.Data(
        pictures[:40], labels[:40], pictures[40:], labels[40:], class_names=("a", "b")
    )
    return metrics.Judge((HandJudge(0), HandJudge(1)), held)


def test_a_verdict_is_the_mean_of_the_judges_over_sets_of_the_size_that_is_compared(judged):
    made, labels = torch.rand(24, 1, 4, 4) * 2 - 1, torch.arange(24) % 2
    held = judged.data
    test = held.test_images / 127.5 - 1
    accuracies, distances = [], []
    for network in judged.networks:
        found, wanted = (x.flatten(1) @ network.matrix.detach() for x in (made, test))
        accuracies.append((network.head(found).argmax(1) == labels).double().mean())
        distances += [metrics.frechet_distance(part, wanted) for part in found.split(12)]
    verdict = judged.score(made, labels, 7.0)
    assert verdict.accuracy == pytest.approx(float(sum(accuracies)) / 2)
    assert verdict.frechet == pytest.approx(sum(distances) / 4)
    spread = metrics.diversity(made, labels, test, held.test_labels)
    assert verdict.diversity == pytest.approx(spread) and verdict.milliseconds == 7
    for network in judged.networks:
        assert {seen[1:] for seen in network.seen} == {(torch.float32, False)}
        assert max(count for count, _, _ in network.seen) == 5


def test_pictures_are_judged_alike_whether_they_are_kept_in_bytes_or_not(judged):
    held = judged.data
    images, labels = held.half(0)
    assert judged.score(images, labels) == judged.score(data.in_range(images), labels)


def test_real_pictures_have_the_accuracy_of_the_test_and_the_distance_of_the_rest(judged):
    held = judged.data
    real, unseen = judged.real(), judged.score(*held.compared())
    test = judged.score(held.test_images, held.test_labels)
    assert (real.accuracy, real.frechet, real.diversity) == (
        test.accuracy,
        unseen.frechet,
        unseen.diversity,
    )
    assert test.accuracy != unseen.accuracy and test.frechet < unseen.frechet


def test_without_classes_there_is_no_accuracy(judged):
    held = dataclasses.replace(judged.data, conditional=False)
    verdict = metrics.Judge(judged.networks, held).real()
    assert verdict.accuracy is None and verdict.frechet > 0


def test_nothing_is_judged_by_what_it_was_trained_on():
    found = data.load("digits")
    assert len(found.images) + len(found.test_images) == 1797
    rows = {
        name: {tuple(image.flatten().tolist()) for image in images}
        for name, images in (
            ("test", found.test_images),
            ("first", found.half(0)[0]),
            ("second", found.half(1)[0]),
            ("all", found.images),
        )
    }
    assert not rows["first"] & rows["second"]
    assert not rows["test"] & rows["all"]
    assert rows["first"] | rows["second"] == rows["all"]
    assert found.images.min() == -1
    assert found.images.max() == 1


def test_judges_are_averaged_each_against_its_own_features():
    found = data.load("digits")
    networks = tuple(JudgeClassifier(8).eval() for _ in range(2))
    images, labels = found.half(0)
    alone = [metrics.Judge((network,), found).score(images, labels) for network in networks]
    both = metrics.Judge(networks, found).score(images, labels)
    assert alone[0].frechet != pytest.approx(alone[1].frechet, rel=1e-3)
    assert both.frechet == pytest.approx((alone[0].frechet + alone[1].frechet) / 2)
    assert both.accuracy == pytest.approx((alone[0].accuracy + alone[1].accuracy) / 2)


def test_judges_of_grey_pictures_learn_once_from_seeds_and_a_half_of_their_own(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(stage_one, "JUDGES", 2)
    found = data.load("digits")
    plan = TrainSettings(steps=2, batch=4, warmup=1)
    first, second = stage_one.judge_of_grey(found, plan, tmp_path / "a", {}).networks
    assert not torch.equal(first.head.weight, second.head.weight)
    images = found.images.clone()
    images[0::2] = math.nan  # the half of the perceptual network
    half = dataclasses.replace(found, images=images)
    for folder in ("a", "b"):  # kept, then trained again
        again, _ = stage_one.judge_of_grey(half, plan, tmp_path / folder, {}).networks
        assert torch.equal(again.head.weight, first.head.weight)
    with pytest.raises(RunError, match="other settings"):
        stage_one.judge_of_grey(found, plan, tmp_path / "a", {"dataset": "digits"})


def test_an_unknown_data_set_is_refused():
    with pytest.raises(InputError, match="'digits' or 'mnist'"):
        data.load("cifar")


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
    data.Settings(),
    width=16,
    depth=1,
    heads=2,
    generator=TrainSettings(steps=3, batch=8),
    autoencoder=TrainSettings(steps=3, batch=8),
    classifier=TrainSettings(steps=3, batch=8),
)


def test_a_run_leaves_its_pictures_numbers_and_page_and_continues(tmp_path):
    first = digits.run(TINY, tmp_path, baselines=True, seeds=2)
    names = ["real", "crossflow", "denoiser", "meanflow+decoder", "decoder on noise"]
    assert list(first["methods"]) == names
    assert json.loads((tmp_path / "metrics.json").read_text())["methods"].keys() == set(names)
    page = Page((tmp_path / "report.html").read_text())
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    tables = (tmp_path / "report.html").read_text().split("</table>")
    assert tables[0].count("<tr>") == 1 + len(names)
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.partial"))
    again = digits.run(TINY, tmp_path, baselines=True, seeds=2)
    for name in names:
        for key in ("accuracy", "diversity", "frechet"):
            assert again["methods"][name][key] == first["methods"][name][key]


def test_a_folder_of_another_run_is_refused(tmp_path):
    digits.run(TINY, tmp_path)
    with pytest.raises(RunError, match="other settings"):
        digits.run(dataclasses.replace(TINY, generator=TrainSettings(steps=4, batch=8)), tmp_path)


@pytest.mark.parametrize(
    "change", [{"perceptual": 0.0}, {"width": 32}, {"channels": 2}, {"patch": 2}]
)
def test_weights_are_not_taken_from_a_run_with_other_settings(tmp_path, change):
    digits.run(TINY, tmp_path)
    with pytest.raises(RunError, match=f"{next(iter(change))}: .* there, .* now"):
        digits.run(dataclasses.replace(TINY, **change), tmp_path)


# --- the training loop


SETTINGS = TrainSettings(steps=40, batch=16, warmup=5, checkpoint_every=7)


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4))


def loss(net, batch, draws):
    (x,) = batch
    return (net(x + torch.randn(x.shape, generator=draws.generator)) - x).square().mean()


def points():
    return (torch.randn(50, 4, generator=torch.Generator().manual_seed(1)),)


def trained(folder, net=None, of=loss, settings=SETTINGS, context=None):
    trainer = Trainer("a", settings, Path(folder), context or {})
    return trainer.train(net or network(), points(), of)


def equal(first, second):
    return all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [0, 6, 7, 20, 39])
def test_a_run_that_was_stopped_continues_to_the_same_weights(tmp_path, at):
    whole, resumed = network(), network()
    average = trained(tmp_path / "whole", whole)

    def failing(net, batch, draws):
        if draws.step == at:
            raise Killed
        return loss(net, batch, draws)

    with pytest.raises(Killed):
        trained(tmp_path / "killed", of=failing)
    continued = trained(tmp_path / "killed", resumed)
    assert equal(whole, resumed)
    assert equal(average, continued)


def slow_run(folder, seconds):
    """Return a process that trains in a folder, so many seconds a step."""
    script = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(os.path.dirname(__file__))!r})
        from test_demo import loss, trained
        def slow(*arguments):
            time.sleep({seconds})
            return loss(*arguments)
        trained({str(folder)!r}, of=slow)
        """
    )
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)


def steps_in(folder):
    return [int(path.stem.split("-")[1]) for path in folder.glob("step-*.safetensors")]


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 0)])
def test_a_process_that_is_ended_continues_to_the_same_weights(tmp_path, sent, code):
    process = slow_run(tmp_path / "ended", 0.05)
    deadline = time.monotonic() + 60
    while not steps_in(tmp_path / "ended") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.wait() == code
    assert 0 < max(steps_in(tmp_path / "ended")) < SETTINGS.steps
    whole, resumed = network(), network()
    trained(tmp_path / "whole", whole)
    trained(tmp_path / "ended", resumed)
    assert equal(whole, resumed)


def test_a_run_that_is_asked_to_stop_saves_the_step_it_is_at(tmp_path):
    def asked(net, batch, draws):
        if draws.step == 9:
            signal.raise_signal(signal.SIGTERM)
        return loss(net, batch, draws)

    with pytest.raises(SystemExit) as ended:
        trained(tmp_path, of=asked)
    assert ended.value.code == 0
    assert max(steps_in(tmp_path)) == 10


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = trained(tmp_path)

    def never(*_):
        raise AssertionError("trained again")

    assert equal(first, trained(tmp_path, of=never))


def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    whole, resumed = network(), network()
    trained(tmp_path, whole)
    last = max(tmp_path.glob("step-*.safetensors"))
    last.write_bytes(last.read_bytes()[:100])
    with pytest.warns(UserWarning, match="cannot be read"):
        trained(tmp_path, resumed)
    assert equal(whole, resumed)


def test_other_settings_are_refused_and_the_difference_is_named(tmp_path):
    trained(tmp_path, context={"dataset": "digits"})
    with pytest.raises(RunError, match="batch: 16 there, 8 now"):
        trained(tmp_path, settings=dataclasses.replace(SETTINGS, batch=8))
    with pytest.raises(RunError, match="dataset: 'digits' there, 'mnist' now"):
        trained(tmp_path, context={"dataset": "mnist"})
    often = dataclasses.replace(SETTINGS, log_every=1, checkpoint_every=1, skips=0)
    trained(tmp_path, settings=often, context={"dataset": "digits"})


def test_a_run_of_another_network_is_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(RunError, match="holds another network"):
        trained(tmp_path, nn.Sequential(nn.Linear(4, 4)))


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path):
    def lost(net, batch, draws):
        return net(batch[0]).sum() * torch.nan

    with (
        pytest.warns(UserWarning, match=r"nan at step \d"),
        pytest.raises(RunError, match=r"nan at step 2.*skips = 2"),
    ):
        trained(tmp_path, of=lost, settings=dataclasses.replace(SETTINGS, skips=2))


@pytest.mark.parametrize("gradient_alone", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, gradient_alone):
    seen = []

    def lost(net, batch, draws):
        seen.append(net[0].weight.detach().clone())
        mean = loss(net, batch, draws)
        if draws.step != 7:
            return mean
        if gradient_alone:
            return mean + net(batch[0]).mul(0).abs().sqrt().sum()  # 0 with a slope of 0/0
        return mean * math.nan

    with pytest.warns(UserWarning, match="at step 7"):
        trained(tmp_path, of=lost)
    assert torch.equal(seen[7], seen[8])
    assert not torch.equal(seen[8], seen[9])
    (record,) = (record for record in log(tmp_path) if "why" in record)
    assert record["step"] == 7
    assert record["skipped"] == 1


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_log_has_one_json_object_a_line(tmp_path):
    trained(tmp_path)
    assert [record["step"] for record in log(tmp_path)] == [0, 39]
    assert all(record["loss"] > 0 and record["gradient_norm"] > 0 for record in log(tmp_path))


@given(count=st.integers(1, 40), size=st.integers(1, 60), seed=st.integers(0, 9))
def test_every_pass_over_the_data_sees_every_row_once(count, size, seed):
    settings = TrainSettings(steps=1, batch=size, seed=seed)
    steps = range(3 * count // size + 1)
    stream = torch.cat([rows_of(step, settings, count) for step in steps])
    for one in stream[: len(stream) // count * count].split(count):
        assert torch.equal(one.sort().values, torch.arange(count))


def test_the_learning_rate_rises_then_falls_to_its_final_share():
    plan = TrainSettings(steps=100, learning_rate=0.5, warmup=10, final_rate=0.1)
    rates = [plan.rate(step) for step in range(101)]
    assert rates[:10] == [0.5 * (step + 1) / 10 for step in range(10)]
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.05)


def test_the_averaged_weights_follow_their_recursion(tmp_path):
    plan = TrainSettings(steps=12, batch=4, learning_rate=0.1, ema=0.5, warmup=1)
    net, seen = nn.Linear(4, 4), []

    def recording(module, batch, draws):
        seen.append(module.weight.detach().clone())
        return loss(module, batch, draws)

    average = trained(tmp_path, net, recording, plan)
    expected = seen[0].clone()
    for step, weight in enumerate([*seen[1:], net.weight.detach()]):
        decay = min(0.5, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average.weight, expected)
    assert not average.training
    assert not any(parameter.requires_grad for parameter in average.parameters())


def test_the_short_program_draws_one_step_samples(tmp_path):
    program = Path(__file__).parents[1] / "examples" / "digits" / "train.py"
    picture = tmp_path / "made" / "one.png"
    run = subprocess.run(
        [sys.executable, program, "--steps", "2", "--out", picture],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "step 0: loss" in run.stdout
    assert "of 100" in run.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(program.read_text().splitlines()) <= 80
