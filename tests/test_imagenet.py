"""The ImageNet program on small real pictures: the same code as the large configs, resumed, shared
out, refused.
"""

import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launch import in_processes
from safetensors.torch import load_file

from flowspace import ExpressionError, InputError, RunError
from flowspace.times import TIME_FLOOR
from flowspace.training import AdversarialStep, assign

for needed in ("pydantic", "accelerate", "diffusers", "timm", "torch_fidelity", "torchvision"):
    pytest.importorskip(needed)

PROGRAM = Path(__file__).parents[1] / "examples" / "imagenet"
sys.path.insert(0, str(PROGRAM))
settings = importlib.import_module("settings")  # finds examples/common
build = importlib.import_module("build")
judging = importlib.import_module("judging")
loop = importlib.import_module("loop")
report = importlib.import_module("report")
sections = importlib.import_module("sections")
ship = importlib.import_module("ship")
stage_one = importlib.import_module("stage_one")
train = importlib.import_module("train")
evaluate = importlib.import_module("flowspace.vision.evaluate")
SettingsError = settings.SettingsError

CONFIGS = sorted((PROGRAM / "configs").rglob("*.yaml"))
FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = FIXTURES / "imagenet-losses.json"
TINY = """
data: {{path: {data}, size: 16, classes: 2, workers: 0}}
encoder: {{stage_one: {{steps: 3, batch: 8, widths: [8, 8], channels: 4}}}}
generator: {{preset: null, depth: 1, width: 32, heads: 2, channels: 4, grid: 8, patch: 2,
             class_tokens: 2, time_tokens: 2}}
objective: {{shifted: false}}
training: {{steps: 6, batch: 8, warmup_epochs: 0.1, emas: [0.9, 0.5], bfloat16: false, cpu: true,
            checkpoint_every: 2, look_every: 100, log_every: 2, optimizer: adamw,
            learning_rate: 1.0e-3}}
evaluation: {{samples: 24, batch: 8, tried: 0}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    draw = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for number in range(12):
            pixels = torch.randint(0, 256, (16, 16, 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def tiny(data, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(data=data))
    return path


@pytest.fixture
def config(tiny, tmp_path):
    return settings.load(tiny, [f"out={tmp_path / 'run'}"])


@pytest.fixture(scope="module")
def encoder_folder(data, tmp_path_factory):
    """An autoencoder that was trained once, for the runs that need not train one."""
    folder = tmp_path_factory.mktemp("encoder")
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(data=data))
    run(settings.load(path, [f"out={folder / 'run'}", "training.steps=1"]))
    return folder / "run" / "encoder"


def given(config, folder, **sections):
    """The config with an encoder that was trained before."""
    encoder = settings.EncoderConfig(name=str(folder))
    return settings.replaced(config, encoder=encoder, **sections)


def alone():
    """Forget the processes that an earlier run of this process had."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def run(config, *options):
    alone()
    settings.check_places(config)
    train.main(config, options)


def weights(folder):
    (path,) = sorted(folder.glob("generator/step-*.safetensors"))[-1:]
    return load_file(path)


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def records(config):
    return [
        json.loads(line)
        for line in (config.out / "generator" / "log.jsonl").read_text().splitlines()
    ]


# --- a run -------------------------------------------------------------------------------------


def test_a_run_trains_ships_logs_and_ends_with_its_page(config, capsys):
    run(config)
    steps = [record for record in records(config) if "loss" in record]
    assert [record["step"] for record in steps] == [0, 2, 4, 5]
    assert set(steps[0]["raw"]) == {"flow"} and set(steps[0]["by"]) == {"t", "s"}
    assert steps[0]["slopes"]["flow"] > 0
    for record, taken, left in zip(steps, (1, 2, 2, 1), (5, 3, 1, 0), strict=True):
        assert record["rows_a_second"] * record["seconds"] == pytest.approx(8 * taken)
        assert record["seconds_left"] == pytest.approx(left * record["seconds"] / taken)
    assert (config.out / "generator" / "sheet-0000006.png").exists()
    card = (config.out / "pipeline" / "README.md").read_text()
    assert "Not evaluated." in card and "labels=[0]" in card
    page = (config.out / "report.html").read_text()
    assert "24 images in 2 classes" in page and "sample.py" in page
    assert "Each picture was seen 2.0 times" in page
    assert page.count("data:image/png") == 4  # classes, nearest, over training, by t
    assert page.count("<svg") == 2  # losses, gradients
    assert f"cpu, {torch.get_num_threads()} thread(s)" in page
    assert settings.of_run(config.out) == config
    assert "report.html" in capsys.readouterr().out


def test_the_time_on_the_page_is_of_both_stages_and_the_device_is_where_it_trained(config):
    run(config)
    for stage, name, seconds in (("encoder/training", "card A", 60), ("generator", "card B", 120)):
        record = {"step": 0, "loss": 1.0, "seconds": seconds, "device": name}
        (config.out / stage / "log.jsonl").write_text(json.dumps(record) + "\n")
    page = report.page.provenance
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.page, "curves", lambda log: [])
        patch.setattr(report.page, "provenance", lambda log: told.append(page(log)) or told[0])
        report.write(config)
    _, rows = told[0]
    assert dict(rows)["time"] == "3.0 minutes of training logged"
    assert dict(rows)["device"] == "card B"


def test_the_page_of_a_run_says_commands_that_work(config):
    found = report.commands(config, 2)
    assert "--labels 0 1;" in found and "from_pretrained" in found
    assert "--labels 0 1 2;" in report.commands(config, 1000)
    across = settings.replaced(config, generator={"space": "latent"})
    assert "from_pretrained" not in report.commands(across, 2)


def test_the_steps_that_trackers_are_told_never_fall(config, monkeypatch):
    """wandb drops what is of an earlier step than what came before; stage 1 comes first."""
    told = []
    accelerator = importlib.import_module("accelerate").Accelerator
    monkeypatch.setattr(accelerator, "log", lambda self, values, step: told.append((step, values)))
    run(settings.replaced(config, training={"log_every": 1}))
    steps = [step for step, _ in told]
    assert steps == sorted(steps) and steps[-1] == 3 + 6 - 1
    names = [next(iter(values)).split("/")[0] for _, values in told]
    assert names == ["autoencoder"] * 3 + ["generator"] * 6


def test_a_run_has_the_losses_that_were_stored(config):
    """A change of these numbers is a change of what every run trains: say so in the changelog."""
    changed = settings.replaced(config, training={"log_every": 1, "steps": 8})
    run(changed)
    losses = [record["loss"] for record in records(changed) if "loss" in record]
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(losses) + "\n")
    rounding = 1e-3
    if torch.__version__ < "2.14":  # whose kernels round otherwise, which grows from step to step
        rounding = 1e-2
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=rounding)


def test_a_finished_run_is_made_longer_by_more_steps(config, encoder_folder, tmp_path):
    short = given(config, encoder_folder)
    run(short)
    longer = settings.replaced(short, training={"steps": 9})
    run(longer)
    whole = settings.replaced(longer, out=tmp_path / "whole")
    run(whole)
    assert same(weights(short.out), weights(whole.out))


def test_samples_follow_from_their_number_alone(config, encoder_folder):
    made = given(config, encoder_folder)
    run(made)
    first = ship.pictures(made, [0, 1, 1], seed=5)
    again = ship.pictures(made, [1, 1], seed=6)
    assert first[1].tobytes() == again[0].tobytes()
    assert first[2].tobytes() == again[1].tobytes()
    with pytest.raises(RunError, match="got labels"):
        ship.pictures(made, [2], seed=0)


def test_the_pipeline_draws_the_same_in_a_fresh_process(config, encoder_folder, tmp_path):
    made = given(config, encoder_folder)
    run(made)
    drawn = ship.pictures(made, [1], seed=3)[0]
    command = [sys.executable, str(PROGRAM / "sample.py"), str(made.out), "--labels", "1"]
    out = tmp_path / "drawn"
    subprocess.run([*command, "--seed", "3", "--out", str(out)], check=True, capture_output=True)
    from PIL import Image

    assert Image.open(out / "0000-class-1.png").tobytes() == drawn.tobytes()


def test_any_average_is_shipped_and_the_best_is_named(config, encoder_folder, tmp_path, capsys):
    made = given(config, encoder_folder, training={"emas": (0.9, 0.1)})
    judged = judged_by_resnet(made, tmp_path)
    run(judged, "--evaluate")
    (looked,) = [record["watch"] for record in records(judged) if "watch" in record]
    assert looked["score"] == pytest.approx(looked["KID (test_resnet)"])
    first = ship.digest(ship.generator_of_run(judged))
    alone()
    accelerator = train.accelerator_of(judged)
    ship.change_average(judged, accelerator, 0.1)
    assert ship.digest(ship.generator_of_run(judged)) != first
    with pytest.raises(RunError, match=r"the run keeps 0\.1, 0\.9"):
        ship.change_average(judged, accelerator, 0.7)
    best = ship.best_average(judged, accelerator)
    assert best in (0.9, 0.1)
    assert f"which is shipped: {best}" in capsys.readouterr().out


def test_several_sets_and_representations_are_judged_and_shown(config, encoder_folder, tmp_path):
    """The held-out pictures are the first set of samples: then every ratio is 1."""
    from torchvision.utils import save_image

    made = given(config, encoder_folder, training={"emas": (0.9, 0.1)})
    made = judged_by_resnet(made, tmp_path)
    run(made, "--evaluate")
    alone_found = json.loads((made.out / "metrics.json").read_text())
    generator = ship.generator_of_run(made).eval()
    plan, maker = ship.plan_of(made, generator), judging.digest(generator)
    samples = plan.read(made.out / "samples", maker)
    for number, sample in enumerate(samples):
        path = tmp_path / "held out" / "01"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(sample / 255, path)
    asked = {
        "sets": 2,
        "extractors": (sections.ExtractorConfig("test_resnet", made.evaluation.weights, 48),),
        "held_out": str(tmp_path / "held out"),
    }
    several = settings.replaced(made, evaluation=asked)
    alone()
    accelerator = train.accelerator_of(several)
    ship.evaluate(several, accelerator)
    found = json.loads((made.out / "metrics.json").read_text())
    assert {name: found[name] for name in alone_found} == alone_found  # those of the first set
    extractor = judging.extractor_of(made, torch.device("cpu"))
    second = dataclasses.replace(plan, seed=1).read(made.out / "samples-2", maker)
    real = judging.reference_of(made, extractor, build.images_of(made)).features
    features = evaluate.features_of(extractor, second.split(8))
    other = evaluate.frechet_distance(features, evaluate.Features(real))
    (name, value), *_ = found["values"].items()
    assert found["sets"][name] == pytest.approx(min(value, other))
    assert found["sets"][f"{name}, spread of 2 sets"] == pytest.approx(abs(value - other))
    assert value != other
    ratios = found["representations"]
    assert set(ratios["values"]) == {"test_resnet", "test_resnet@48", "mean"}
    assert ratios["values"] == pytest.approx(dict.fromkeys(ratios["values"], 1), rel=1e-3)
    page = report.write(several).read_text()
    assert "the least over several sets" in page and "that of 24 held-out pictures" in page
    assert "with the training picture nearest to it" in page
    ship.change_average(several, accelerator, several.training.emas[1])
    kept = [path.name for path in made.out.glob("samples*")]
    assert kept == ["samples.png"] and not (made.out / "metrics.json").exists()


def judged_by_resnet(config, folder):
    path = folder / "judge.pt"
    torch.manual_seed(0)
    torch.save(importlib.import_module("timm").create_model("test_resnet").state_dict(), path)
    asked = {"extractor": "test_resnet", "weights": str(path), "samples": 24, "batch": 8}
    return settings.replaced(config, evaluation=asked)


# --- kills, disks, signals ---------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[4])
import settings, torch, train
from safetensors import safe_open

torch.set_num_threads(1)
path, out, wanted = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
changes = ["training.checkpoint_every=1", "training.steps=24", "encoder.stage_one.steps=12"]
# A checkpoint of 34 MB, so that some kills meet its write.
changes += ["generator.width=256", "generator.depth=2"]


def born(folder):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.dup2(2, 1)
        train.main(settings.load(path, [f"out={folder}", *changes]))
        os._exit(0)
    return child


start = time.perf_counter()
_, status = os.waitpid(born(out / "whole"), 0)
assert status == 0, status
whole = time.perf_counter() - start
draw, killed, readable = random.Random(1), 0, 0
for _ in range(3 * wanted):
    child = born(out / "killed")
    time.sleep(draw.uniform(0, whole / 5))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    of = ("killed/encoder/training/step-*.safetensors", "killed/generator/step-*.safetensors")
    for file in [file for pattern in of for file in out.glob(pattern)]:
        with safe_open(file, "pt") as tensors:
            readable += sum(tensors.get_tensor(name).numel() > 0 for name in tensors.keys()) > 0
    if killed == wanted:
        break
_, status = os.waitpid(born(out / "killed"), 0)
assert status == 0, status
print(killed, readable)
"""
"""Trains a run to its end, then another that is killed so many times at random moments. Its
children are forked, since each would import for seconds what is imported once.
"""

ENCODER = "diffusion_pytorch_model.safetensors"


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_same_weights(tiny, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tiny), str(tmp_path), "20", str(PROGRAM)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert found.returncode == 0, found.stderr[-2000:]
    killed, readable = map(int, found.stdout.split()[-2:])
    assert killed == 20 and readable >= 20
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert same(
        *(load_file(tmp_path / name / "encoder" / ENCODER) for name in ("whole", "killed"))
    )
    names = [
        {path.name for path in (tmp_path / name / "generator").iterdir()}
        for name in ("whole", "killed")
    ]
    assert names[0] == names[1]  # what torn writes left is gone


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_the_same_command_continues_once_there_is_room(
    config, tiny, tmp_path
):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("this user may not mount a small disk")
    command = [sys.executable, str(PROGRAM / "train.py"), str(tiny), f"out={disk / 'run'}"]
    try:
        first = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert first.returncode == 1 and "Traceback" not in first.stderr
        assert first.stderr.count("train.py: ") == 1 and "No space left" in first.stderr
        for file in disk.glob("run/*/step-*.safetensors"):
            load_file(file)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
        run(config)
        assert same(weights(config.out), weights(disk / "run"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_and_ends_with_zero(tiny, tmp_path, workers):
    """It comes to the whole group of processes, as torchrun and SLURM send it."""
    out = tmp_path / "stopped"
    changes = ["training.steps=100000", "training.checkpoint_every=100000", "training.log_every=1"]
    changes.append(f"data.workers={workers}")
    command = [sys.executable, str(PROGRAM / "train.py"), str(tiny), f"out={out}", *changes]
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while not (out / "generator" / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 0
    assert len(list(out.glob("generator/step-*.safetensors"))) == 1


def test_a_step_that_is_not_finite_changes_nothing_is_named_and_ends_the_run_after_a_limit(
    config, encoder_folder, tmp_path, monkeypatch
):
    whole = train.generator_losses
    broken = set()

    def losses_of(*parts):
        losses = whole(*parts)

        def some_not_finite(network, batch, draws):
            cost = losses(network, batch, draws)
            if draws.step in broken:
                cost.weights["flow"] = torch.nan
            return cost

        return some_not_finite

    monkeypatch.setattr(train, "generator_losses", losses_of)
    kept = given(config, encoder_folder, training={"steps": 3, "checkpoint_every": 1})
    run(kept)
    before = weights(kept.out)
    broken.add(3)
    with pytest.warns(UserWarning, match=r"nan at step 3.*at t = .*it is skipped \(1 so far\)"):
        run(settings.replaced(kept, training={"steps": 4}))
    after = weights(kept.out)
    assert int(after.pop("run:skipped")) == 1
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    broken.update(range(4, 8))
    failing = settings.replaced(kept, training={"steps": 8, "skips": 2})
    with (
        pytest.warns(UserWarning, match="nan at step 4"),
        pytest.raises(RunError, match=r"3 steps were not finite.*training\.skips = 2"),
    ):
        run(failing)


# --- several processes -------------------------------------------------------------------------


def close(first, second, tolerance):
    assert first.keys() == second.keys()
    for name, value in first.items():
        if not name.startswith(("optimizer:", "answering:")):
            torch.testing.assert_close(
                second[name].float(), value.float(), rtol=0, atol=tolerance, msg=name
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "count", "tolerance"),
    [
        ([], 2, 1e-5),
        (["training.sharded=true"], 2, 1e-5),
        (["training.optimizer=muon"], 2, 2e-2),
        (["training.batch=12"], 3, 1e-5),
    ],
    ids=["ddp", "fsdp2", "muon", "three"],
)
def test_several_processes_train_what_one_does(
    tiny, encoder_folder, tmp_path, changes, count, tolerance
):
    """Muon's Newton-Schulz steps are in bfloat16, so its updates agree to their rounding only."""
    changes = [*changes, "encoder.stage_one=null", f"encoder.name={encoder_folder}"]
    run(settings.load(tiny, [f"out={tmp_path / 'one'}", *changes]))
    out = tmp_path / "several"
    found = in_processes(
        count, PROGRAM / "train.py", tiny, f"out={out}", f"training.processes={count}", *changes
    )
    assert found.returncode == 0, found.stderr[-2000:]
    close(weights(tmp_path / "one"), weights(out), tolerance)


@pytest.mark.slow
def test_another_number_of_processes_continues_a_run(tiny, encoder_folder, tmp_path):
    changes = ["encoder.stage_one=null", f"encoder.name={encoder_folder}"]
    run(settings.load(tiny, [f"out={tmp_path / 'one'}", *changes]))
    out = tmp_path / "other"
    found = in_processes(
        2,
        PROGRAM / "train.py",
        tiny,
        f"out={out}",
        "training.steps=3",
        "training.sharded=true",
        *changes,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    run(settings.load(tiny, [f"out={out}", *changes]))
    close(weights(tmp_path / "one"), weights(out), 1e-5)


@pytest.mark.slow
def test_two_processes_draw_what_one_does(config, encoder_folder, tmp_path):
    made = judged_by_resnet(given(config, encoder_folder), tmp_path)
    made = settings.replaced(made, evaluation={"batch": 4, "shard": 2})
    run(made)
    alone()
    ship.evaluate(made, train.accelerator_of(made))
    one = {path.name: path.read_bytes() for path in (made.out / "samples").iterdir()}
    assert len(one) == 3
    shutil.rmtree(made.out / "samples")
    found = in_processes(2, PROGRAM / "evaluate.py", made.out)
    assert found.returncode == 0, found.stderr[-2000:]
    assert {path.name: path.read_bytes() for path in (made.out / "samples").iterdir()} == one


def test_latents_of_another_encoder_are_refused_before_any_step(config, encoder_folder, tmp_path):
    made = given(config, encoder_folder)
    alone()
    folder = importlib.import_module("encode").main(made)
    other = settings.replaced(config, out=tmp_path / "other", data={"latents": str(folder)})
    with pytest.raises(RunError, match="made by encoder"):
        run(settings.replaced(other, training={"seed": 5}))
    assert not list(other.out.glob("generator/log.jsonl"))


def test_scores_and_samples_of_other_weights_go_and_a_chosen_average_stays(
    config, encoder_folder, tmp_path
):
    made = given(config, encoder_folder, training={"emas": (0.9, 0.1)})
    judged = judged_by_resnet(made, tmp_path)
    run(judged, "--evaluate")
    samples = judged.out / "samples"
    alone()
    ship.change_average(judged, train.accelerator_of(judged), 0.1)
    assert not samples.exists() and not (judged.out / "metrics.json").exists()
    card = (judged.out / "pipeline" / "README.md").read_text()
    assert "average 0.1" in card
    run(judged, "--evaluate")
    assert ship.chosen(judged) == 0.1 and samples.exists()
    before = {path.name: path.stat().st_mtime_ns for path in samples.iterdir()}
    run(judged, "--evaluate")
    assert before == {path.name: path.stat().st_mtime_ns for path in samples.iterdir()}
    run(settings.replaced(judged, training={"steps": 8}))
    assert not (judged.out / "metrics.json").exists()


def test_samples_of_several_evaluations_follow_from_their_noise(config, encoder_folder):
    made = given(config, encoder_folder, evaluation={"evaluations": 2})
    run(made)
    first, again = (ship.pictures(made, [0, 1], seed=5) for _ in range(2))
    assert [a.tobytes() for a in first] == [b.tobytes() for b in again]


@pytest.mark.parametrize("sample", [False, True], ids=["mean", "drawn"])
def test_accumulation_trains_what_one_pass_does(config, encoder_folder, tmp_path, sample):
    """Also where latents are drawn from the encoder's posterior: a draw is a row's own."""
    whole = given(config, encoder_folder)
    whole = settings.replaced(whole, encoder={"sample": sample})
    run(whole)
    parts = settings.replaced(whole, out=tmp_path / "parts", training={"accumulate": 2})
    run(parts)
    close(weights(whole.out), weights(parts.out), 1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo's and inductor's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_blocks_train_what_eager_ones_do(config, encoder_folder, tmp_path):
    asked = image_loss(tmp_path)
    eager = given(
        config,
        encoder_folder,
        perceptual=(settings.PerceptualConfig(**asked),),
        adversarial=settings.AdversarialConfig(**asked, channels=(32, 32), start=1),
    )
    run(eager)
    compiled = settings.replaced(eager, out=tmp_path / "compiled", generator={"compile": True})
    run(compiled)
    run(settings.replaced(compiled, training={"steps": 8}))  # either goes on with the other's
    run(settings.replaced(eager, training={"steps": 8}))
    steps = [
        [record for record in records(made) if "loss" in record] for made in (eager, compiled)
    ]
    for name in ("loss", "gradient_norm", "raw", "slopes"):
        assert steps[0][0][name] == pytest.approx(steps[1][0][name], rel=1e-4)
    # Adam's first steps are as long for a gradient that is all rounding as for any other.
    losses = [[record["loss"] for record in records] for records in steps]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert weights(eager.out).keys() == weights(compiled.out).keys()


@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_the_encoder_of_a_run_is_compiled_where_the_config_asks_so(
    config, encoder_folder, monkeypatch
):
    """By a backend that runs what it is given, which keeps the compiler of C++ out."""
    graphs, whole = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compiled(model, **options):
        return whole(model, backend=backend)

    eager = given(config, encoder_folder)
    encoder = stage_one.loaded(eager)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    wanted = encoder.encode(images)
    monkeypatch.setattr(torch, "compile", compiled)
    assert encoder.compile_network() is encoder
    torch.testing.assert_close(encoder.encode(images), wanted)
    assert graphs
    asked, taken = [], stage_one.LatentEncoder.compile_network

    def compile_network(self, **options):
        asked.append(self)
        return taken(self, **options)

    monkeypatch.setattr(stage_one.LatentEncoder, "compile_network", compile_network)
    alone()
    accelerator = train.accelerator_of(eager)
    train.prepared(eager, accelerator)
    assert not asked
    train.prepared(settings.replaced(eager, generator={"compile": True}), accelerator)
    assert len(asked) == 1


def test_workers_read_what_this_process_does(config, encoder_folder, tmp_path):
    one = given(config, encoder_folder)
    run(one)
    two = settings.replaced(one, out=tmp_path / "two", data={"workers": 2})
    run(two)
    assert same(weights(one.out), weights(two.out))


def test_training_reads_the_latents_that_were_encoded(config, encoder_folder):
    encode = importlib.import_module("encode")
    made = given(config, encoder_folder)
    alone()
    folder = encode.main(made)
    cached = settings.replaced(made, data={"latents": str(folder)})
    run(cached)
    assert records(cached)[0]["raw"]["flow"] > 0
    with pytest.raises(RunError, match="other settings"):
        run(made)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("training.bach=3", r"training\.bach is not known; did you mean training\.batch"),
        ("training.batch=-3", r"got training\.batch = -3"),
        ("training.batch=true", r"got training\.batch = True"),
        ("training.batch=10000000000", r"got training\.batch = 10000000000"),
        ("training.steps=0", r"got training\.steps = 0"),
        ("generator.depth=20000", r"got generator\.depth = 20000"),
        ("generator.class_tokens=20000", r"got generator\.class_tokens = 20000"),
        ("data.size=20000", r"got data\.size = 20000"),
        ("training.learning_rate=.inf", r"got training\.learning_rate = inf"),
        ("training.clip=.nan", r"got training\.clip = nan"),
        ("training.emas=[]", r"got training\.emas = \[\]"),
        ("training.emas=[0.9", "whose value is not YAML"),
        ("training.emas=*a", "whose value is not YAML"),
        ("encoder.name=va-vae", "beside encoder.stage_one"),
        ("encoder.stage_one=null", "got no encoder"),
        ("objective.kind=meanflow", "write generator.space=latent"),
        (
            "perceptual=[{network: lpips, layers: [1]}]",
            r"perceptual\.0 .*size, layers or unit for lpips.*leave them out",
        ),
        ("perceptual=[{network: lpips, size: 64}]", "size, layers or unit for lpips"),
        ("perceptual=[{network: lpips, unit: true}]", "size, layers or unit for lpips"),
        ("encoder.half=true", "write encoder.half=false encoder.weights=null"),
        ("encoder.weights=vae.pt", "write encoder.half=false encoder.weights=null"),
        ("evaluation.extractors=[{network: resnet18}]", "write evaluation.held_out=FOLDER"),
        ("generator.width", "write KEY=VALUE"),
    ],
)
def test_settings_that_do_not_fit_are_one_error(tiny, change, words):
    with pytest.raises(SettingsError, match=words):
        settings.load(tiny, [change])


def test_a_setting_in_a_list_is_changed_by_its_number(tiny):
    terms = "perceptual=[{network: lpips}, {network: resnet18, weight: 2}]"
    changed = settings.load(tiny, [terms, "perceptual.1.weights=a.pt"])
    first, second = settings.load(tiny, [terms]).perceptual
    assert changed.perceptual == (first, dataclasses.replace(second, weights="a.pt"))
    with pytest.raises(SettingsError, match=r"perceptual\.2 is not known"):
        settings.load(tiny, [terms, "perceptual.2.weights=a.pt"])


def test_what_belongs_to_another_objective_is_refused(tiny):
    with pytest.raises(SettingsError, match="both are crossflow's"):
        settings.load(tiny, ["objective.kind=consistency", "objective.literal=true"])
    with pytest.raises(SettingsError, match="they compare images"):
        settings.load(tiny, ["generator.space=latent", "adversarial={network: resnet18}"])


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("meanflow", "objective.shifted=false", r"write objective\.shifted=true"),
        ("improved-meanflow", "objective.shifted=false", r"write objective\.shifted=true"),
        ("meanflow", "objective.equal=0.7", r"write objective\.equal=0\.5"),
        ("improved-meanflow", "objective.equal=0.7", r"write objective\.equal=0\.5"),
        ("flow-matching", "objective.equal=0.7", r"write objective\.equal=0\.5"),
        ("consistency", "objective.equal=0.7", r"write objective\.equal=0\.5"),
        ("meanflow", "generator.condition=s", "not see the time.*condition=t,s"),
        ("improved-meanflow", "generator.condition=s", "not see the time.*condition=t,s"),
        ("flow-matching", "generator.condition=t-s", "see no time.*condition=t,s"),
    ],
)
def test_what_an_objective_would_not_use_is_refused(tiny, kind, change, words):
    chosen = [f"objective.kind={kind}", "objective.shifted=true"]
    if kind != "consistency":
        chosen += ["generator.space=latent", "generator.condition=t,s"]
    settings.load(tiny, chosen)
    with pytest.raises(SettingsError, match=words):
        settings.load(tiny, [*chosen, change])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", "holds list"),
        ("a: &x [1]\nb: *x", "alias"),
        ("base: tiny.yaml", "its own base"),
        ("{" * 3000, "is not YAML"),
        ("!!python/object/apply:os.system [echo]", "is not YAML"),
    ],
)
def test_odd_files_are_one_error(tmp_path, text, words):
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=words):
        settings.load(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        settings.load(tmp_path / "none.yaml")
    with pytest.raises(SettingsError, match="is no run"):
        settings.of_run(tmp_path)


def test_a_finished_run_is_judged_otherwise_but_stays_what_was_trained(config):
    config.out.mkdir()
    (config.out / "config.json").write_text(json.dumps(config.as_dict()))
    changed = settings.of_run(config.out, ["evaluation.sets=3", "evaluation.samples=7"])
    assert changed == settings.replaced(config, evaluation={"sets": 3, "samples": 7})
    with pytest.raises(SettingsError, match=r"got training\.steps=3, but .*evaluation\.KEY=VALUE"):
        settings.of_run(config.out, ["training.steps=3"])


def test_a_mistyped_key_is_refused_before_torch_is_imported(tiny):
    code = (
        "import sys, runpy\n"
        "sys.argv = ['train.py', *sys.argv[2:]]\n"
        f"sys.path.insert(0, {str(PROGRAM)!r})\n"
        "try:\n"
        f"    runpy.run_path({str(PROGRAM / 'train.py')!r}, run_name='__main__')\n"
        "finally:\n"
        "    print([name for name in ('torch', 'diffusers', 'flowspace') if name in sys.modules])"
    )
    for change in ("training.bach=3", "data.path=/nowhere"):
        command = [sys.executable, "-c", code, "train.py", str(tiny), change]
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.returncode == 1 and found.stdout.strip() == "[]"
        assert found.stderr.startswith("train.py: ") and found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        ({"data": {"path": "/nowhere"}}, SettingsError, "is no folder"),
        ({"data": {"latents": "/nowhere"}}, SettingsError, "encode.py"),
        ({"data": {"classes": 3}}, RunError, "2 classes, 3 are expected"),
        ({"encoder": {"name": "va-vae", "stage_one": None}}, RunError, "hf download"),
        (
            {"encoder": {"name": "va-vae", "stage_one": None, "weights": Path("/nowhere")}},
            SettingsError,
            "encoder.weights = /nowhere, which is no folder; write encoder.weights=FOLDER",
        ),
        (
            {"encoder": {"name": "va-vae", "stage_one": None, "weights": Path("/")}},
            RunError,
            "/va-vae/.* is missing; fetch it .*--local-dir /va-vae",
        ),
        ({"generator": {"grid": 4}}, InputError, "generator.grid=8"),
        ({"generator": {"preset": "crossflow-z"}}, InputError, "crossflow-b"),
        ({"generator": {"width": None}}, InputError, "got no generator.width"),
        ({"training": {"batch": 9, "accumulate": 2}}, RunError, "multiple of 2"),
        ({"training": {"batch": 25}}, RunError, "25 for 24 pictures"),
        (
            {
                "encoder": {
                    "stage_one": settings.StageOneConfig(batch=25, widths=(8, 8), channels=4)
                }
            },
            RunError,
            r"encoder\.stage_one\.batch = 25 for 24 pictures",
        ),
        ({"objective": {"beta": "1-q"}}, ExpressionError, "'q' is not allowed"),
        ({"training": {"processes": 2}}, RunError, "torchrun"),
        (
            {"adversarial": settings.AdversarialConfig("resnet18", "/nowhere", size=None)},
            SettingsError,
            "adversarial.weights = /nowhere",
        ),
        (
            {"perceptual": (settings.PerceptualConfig("resnet18", "/nowhere"),)},
            SettingsError,
            r"perceptual\.0\.weights = /nowhere",
        ),
        ({"evaluation": {"held_out": "/nowhere"}}, SettingsError, "evaluation.held_out=FOLDER"),
        (
            {"evaluation": {"extractor": "resnet18", "weights": "/nowhere"}},
            SettingsError,
            "evaluation.weights = /nowhere",
        ),
    ],
)
def test_what_does_not_fit_is_one_error_before_any_step(config, parts, error, words):
    with pytest.raises(error, match=words):
        run(settings.replaced(config, **parts))
    assert not list(config.out.rglob("log.jsonl"))


def test_stage_one_is_not_trained_by_encode_either_where_its_batch_does_not_fit(config):
    stage = settings.StageOneConfig(batch=25, widths=(8, 8), channels=4)
    alone()
    with pytest.raises(RunError, match=r"encoder\.stage_one\.batch = 25 for 24 pictures"):
        importlib.import_module("encode").main(
            settings.replaced(config, encoder={"stage_one": stage})
        )
    assert not list(config.out.rglob("log.jsonl"))


@pytest.mark.parametrize(
    ("part", "asked", "words"),
    [
        ("perceptual", {"layers": (9,)}, r"layers = \(9,\).* does not run on images of 16 pixels"),
        (
            "perceptual",
            {"network": "test_resnett"},
            "timm knows no network 'test_resnett'; near are test_resnet",
        ),
        ("adversarial", {"layers": (0, 9)}, r"layers = \(0, 9\).* does not run on images of 16"),
        ("adversarial", {"channels": (1,)}, r"write adversarial.channels=\[32,32\]"),
        ("adversarial", {"channels": (32, 40)}, r"write adversarial.channels=\[32,32\]"),
    ],
)
def test_layers_that_a_network_has_not_are_one_error_before_any_step(
    config, tmp_path, part, asked, words
):
    asked = image_loss(tmp_path) | asked
    term = settings.AdversarialConfig(**asked)
    if part == "perceptual":
        term = (settings.PerceptualConfig(**asked),)
    with pytest.raises(InputError, match=words):
        run(settings.replaced(config, **{part: term}))
    assert not list(config.out.rglob("log.jsonl"))


def image_loss(folder):
    path = folder / "judge.pt"
    torch.manual_seed(0)
    torch.save(importlib.import_module("timm").create_model("test_resnet").state_dict(), path)
    return {"network": "test_resnet", "weights": str(path), "size": None, "layers": (0, 1)}


def test_weights_that_only_judging_needs_are_asked_for_before_the_training(config):
    with pytest.raises(RunError, match="Inception's weights"):
        run(config, "--evaluate")
    assert not list(config.out.rglob("log.jsonl"))


@pytest.mark.parametrize("name", ["reference", "held_out"])
def test_pictures_that_only_judging_needs_are_looked_at_before_anything_is_paid_for(
    config, encoder_folder, tmp_path, name
):
    from PIL import Image

    folder = tmp_path / "others" / "one class"
    folder.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(folder / "0.png")
    made = judged_by_resnet(given(config, encoder_folder), tmp_path)
    asked = settings.replaced(made, evaluation={name: str(folder.parent)})
    with pytest.raises(RunError, match="holds 1 classes, 2 are expected"):
        run(asked, "--evaluate")
    assert not (made.out / "generator").exists()
    run(made)
    alone()
    with pytest.raises(RunError, match="holds 1 classes, 2 are expected"):
        ship.evaluate(asked, train.accelerator_of(asked))
    assert not (made.out / "samples").exists()


def test_a_folder_that_cannot_be_written_to_is_one_error_before_any_step(config, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", Path("/proc/run"), tmp_path / "a\0b"):
        with pytest.raises(SettingsError, match=r"cannot be written to \(.*write out=FOLDER"):
            run(settings.replaced(config, out=out))


def test_two_runs_in_one_folder_are_refused_and_the_holder_is_named(config):
    from flowspace.training import locked

    with locked(config.out), pytest.raises(RunError, match=f"is used by process {os.getpid()} on"):
        run(config)


def test_a_run_that_was_moved_or_logs_otherwise_goes_on(config, encoder_folder, tmp_path):
    made = given(config, encoder_folder)
    run(made)
    made.out.rename(tmp_path / "moved")
    before = weights(tmp_path / "moved")
    changes = {"log_every": 1, "checkpoint_every": 3}
    run(settings.replaced(made, out=tmp_path / "moved", training=changes, data={"workers": 1}))
    assert same(before, weights(tmp_path / "moved"))


def test_a_checkpoint_of_another_config_is_refused(config, encoder_folder):
    made = given(config, encoder_folder)
    run(made)
    kept = (made.out / "config.json").read_bytes()
    with pytest.raises(RunError, match="other settings"):
        run(settings.replaced(made, objective={"equal": 0.25}))
    assert (made.out / "config.json").read_bytes() == kept


def test_a_run_of_the_first_version_is_refused_by_name(config, encoder_folder):
    shutil.copytree(FIXTURES / "run-of-the-first-version", config.out)
    with pytest.raises(SettingsError, match=r"config\.json: latent is not known"):
        settings.of_run(config.out)
    with pytest.raises(RunError, match="was written by an earlier version of flowspace"):
        run(given(config, encoder_folder))


@pytest.mark.parametrize(
    ("torn", "deleted"),
    [
        ("pipeline/generator/diffusion_pytorch_model.safetensors", "pipeline"),
        ("pipeline/generator/config.json", "pipeline"),
        ("pipeline/model_index.json", "pipeline"),
        ("encoder/diffusion_pytorch_model.safetensors", "encoder/config.json"),
        ("encoder/config.json", "encoder/config.json"),
    ],
)
def test_a_torn_file_is_one_error_that_says_what_to_delete_and_is_made_again(
    config, torn, deleted
):
    run(config)
    path, told = config.out / torn, config.out / deleted
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=f"delete {told}:| cannot be read .*delete it:"):
        ship.generator_of_run(config) if deleted == "pipeline" else stage_one.loaded(config)
    shutil.rmtree(told) if told.is_dir() else told.unlink()
    run(config)
    assert path.read_bytes() == whole


def test_a_flipped_bit_in_a_checkpoint_is_noticed(config, encoder_folder):
    made = given(config, encoder_folder)
    run(made)
    paths = sorted(made.out.glob("generator/step-*.safetensors"))
    for path in paths:
        content = bytearray(path.read_bytes())
        content[-5] ^= 4
        path.write_bytes(content)
    with (
        pytest.warns(UserWarning, match="another digest"),
        pytest.raises(RunError, match=f"none of the {len(paths)} checkpoints"),
    ):
        run(made)


@pytest.mark.parametrize("place", [-5, 60], ids=["a weight", "a name"])
def test_a_flipped_bit_in_the_encoder_of_stage_one_is_noticed(config, place):
    run(config)
    path = config.out / "encoder" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    told = config.out / "encoder" / "config.json"
    with pytest.raises(RunError, match=f"{path} is not what was saved.*; delete {told}:"):
        stage_one.loaded(config)


def test_weights_of_an_encoder_are_never_unpickled(config):
    run(config)
    autoencoder = stage_one.loaded(config).autoencoder
    folder = config.out / "encoder"
    torch.save(autoencoder.state_dict(), folder / "diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(RunError, match="holds no autoencoder"):
        stage_one.loaded(config)


# --- the judge's reference ---------------------------------------------------------------------


class Pixels(evaluate.Extractor):
    """Features that are the pixels themselves."""

    name = "pixels"

    def __call__(self, images):
        return evaluate.Features(images.flatten(1).float(), None)


def test_features_of_the_reference_are_kept_and_refused_where_they_are_torn(config):
    images, extractor = build.images_of(config), Pixels()
    config.out.mkdir()
    first = judging.reference_of(config, extractor, images).features
    (path,) = config.out.glob("reference-*")
    whole = path.read_bytes()
    for torn in (whole[:100], whole[:-3] + bytes(3)):
        path.write_bytes(torn)
        with pytest.raises(RunError, match=path.name):
            judging.reference_of(config, extractor, images)
    path.unlink()
    assert torch.equal(judging.reference_of(config, extractor, images).features, first)
    other = settings.replaced(config, evaluation={"reference": config.data.path + "/"})
    with pytest.raises(RunError, match="features of"):
        judging.reference_of(other, extractor, images)


class Blind(evaluate.Extractor):
    """Features that say nothing of the images."""

    name = "blind"

    def __call__(self, images):
        return evaluate.Features(torch.randn(len(images), 4), None)


def test_a_judge_that_does_not_know_real_pictures_judges_nothing(config):
    config.out.mkdir()
    images = build.images_of(config)
    tried = settings.replaced(config, evaluation={"tried": 24})
    with pytest.raises(RunError, match="blind"):
        judging.tried_judge(tried, Blind(), images)
    assert not list(config.out.glob("judge-*"))


def test_a_reference_is_of_the_size_that_the_judge_sees(config, tmp_path):
    config.out.mkdir()
    judged, found = judged_by_resnet(config, tmp_path), []
    for size in (None, 48):
        changed = settings.replaced(judged, evaluation={"size": size})
        extractor = judging.extractor_of(changed, torch.device("cpu"))
        found.append(judging.reference_of(changed, extractor, build.images_of(changed)).features)
    assert not torch.allclose(*found)
    names = sorted(path.name for path in config.out.glob("reference-*"))
    assert names == ["reference-test_resnet.safetensors", "reference-test_resnet@48.safetensors"]


# --- image losses ------------------------------------------------------------------------------


def test_all_losses_are_trained_logged_and_resumed(config, encoder_folder, tmp_path):
    asked = image_loss(tmp_path)
    whole = given(
        config,
        encoder_folder,
        perceptual=(
            settings.PerceptualConfig(**asked),
            settings.PerceptualConfig(**asked | {"layers": (1,), "unit": True}),
        ),
        adversarial=settings.AdversarialConfig(**asked, channels=(32, 32), start=1, adaptive=True),
    )
    run(whole)
    last = records(whole)[-2]
    names = {"flow", "test_resnet", "test_resnet 2", "adversarial", "opponent"}
    assert set(last["raw"]) == names and last["opponent_norm"] > 0
    assert set(last["slopes"]) == names - {"opponent"}
    weighted = sum(last["weighted"].values())
    assert weighted == pytest.approx(last["loss"], rel=1e-4)
    stopped = settings.replaced(whole, out=tmp_path / "stopped", training={"steps": 4})
    run(stopped)
    run(settings.replaced(stopped, training={"steps": 6}))
    assert same(weights(whole.out), weights(stopped.out))


def test_no_gradient_of_one_player_reaches_the_other():
    class Judgement:
        changes = 5

        def weight(self, t):
            return 1 - t

        def opinion(self, discriminator, fake, changes):
            return -discriminator(fake).mean(1)

        def discriminator(self, discriminator, real, fake, changes):
            return discriminator(fake).mean(1) - discriminator(real).mean(1)

    from flowspace.training import Draws

    torch.manual_seed(0)
    network = torch.nn.Linear(4, 3)
    step = AdversarialStep(network, Judgement(), start=2)
    images = torch.randn(8, 4, requires_grad=True)
    draws = [Draws(0, number, 0, 8, 8, torch.device("cpu")) for number in (2, 3)]
    assert step.opinion(images, draws[0]) is None and not step.plays(1) and step.plays(2)
    step.opinion(images, draws[1]).sum().backward()
    assert images.grad is not None and all(p.grad is None for p in network.parameters())
    images.grad = None
    step.answer(torch.randn(8, 4), images, draws[1]).sum().backward()
    assert images.grad is None and all(p.grad is not None for p in network.parameters())


def test_a_step_that_is_not_logged_does_not_wait_for_the_device(
    config, encoder_folder, tmp_path, monkeypatch
):
    """From cached latents, as the large configs have them, with all losses."""
    from test_waiting import AsksNothing

    alone()
    made = given(config, encoder_folder)
    folder = importlib.import_module("encode").main(made)
    asked, steps = image_loss(tmp_path), loop.Training.steps
    watched = []

    def steps_that_ask_nothing(run):
        for step in steps(run):
            if step < 2 or run.logged:
                yield step
                continue
            stream, run.stream = run.stream, iter([next(run.stream)])
            with AsksNothing():
                yield step
            run.stream = stream
            watched.append((run.stage.name, step))

    monkeypatch.setattr(loop.Training, "steps", steps_that_ask_nothing)
    for module in ("state", "flowspace.training.optimizers"):  # as it is on a GPU
        monkeypatch.setattr(f"{module}.readable", lambda tensor: False)
    adversarial = settings.AdversarialConfig(**asked, channels=(32, 32))
    run(
        settings.replaced(
            made,
            data={"latents": str(folder)},
            perceptual=(settings.PerceptualConfig(**asked),),
            adversarial=adversarial,
            training={"log_every": 10},
        )
    )
    assert watched == [("generator", step) for step in (2, 3, 4)]


# --- the configs -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_config_is_read_and_its_objective_is_built(path):
    config = settings.load(path)
    objective = build.objective_of(config, lambda images: images)
    assert objective.schedule.alpha(torch.tensor(0.0)) == 1
    if path.parent.name == "paper" and config.objective.kind == "crossflow":
        assert objective.literal
    if config.generator.preset:
        with torch.device("meta"):
            network = build.generator_of(config, 1000)
        assert assign(network)["muon"]


def test_the_readme_says_how_to_ask_for_fd_dinov2(tiny):
    text = (PROGRAM / "README.md").read_text()
    (several,) = re.findall(r"`(evaluation\.extractors=\[.*?\])`", text)
    alone_asked = re.findall(r"`(evaluation\.extractor=\S+) (evaluation\.size=\S+)`", text)
    asked = settings.load(tiny, [several, "evaluation.held_out=FOLDER"]).evaluation.extractors
    assert asked == (sections.ExtractorConfig("vit_large_patch14_dinov2", size=224),)
    assert settings.load(tiny, alone_asked[0]).evaluation.extractor == asked[0].network
    assert importlib.import_module("timm").is_model(asked[0].network)


def test_the_configs_of_figure_4_differ_in_the_exponent_and_keep_what_is_compared():
    for folder, literal in ((PROGRAM / "configs", False), (PROGRAM / "configs" / "paper", True)):
        names = ("b-gan-power-0", "crossflow-b", "b-gan-power-2")
        configs = [settings.load(folder / f"{name}.yaml") for name in names]
        assert [config.adversarial.power for config in configs] == [0, 1, 2]
        assert all(config.training.snapshots for config in configs)
        assert all(config.objective.literal is literal for config in configs)
        assert not settings.load(folder / "crossflow-xl.yaml").training.snapshots


def test_the_papers_times_are_those_of_its_appendix():
    """Half of the rows have s = t with one shifted draw; elsewhere two draws are sorted (B.3)."""
    config = settings.load(PROGRAM / "configs" / "paper" / "crossflow-b.yaml")
    t, s = build.objective_of(config).times(40_000, generator=torch.Generator().manual_seed(0))
    shift = (32 * 16 * 16 / 4096) ** 0.5
    uniform = torch.linspace(TIME_FLOOR, 1, 100_001)
    shifted = (shift * uniform / (1 + (shift - 1) * uniform)).clamp(min=TIME_FLOOR)
    diagonal = t == s
    assert float(diagonal.float().mean()) == pytest.approx(0.5)
    assert float(t[diagonal].mean()) == pytest.approx(float(shifted.mean()), abs=5e-3)
    assert float((t[diagonal] < 0.05).float().mean()) == pytest.approx(
        float((shifted < 0.05).float().mean()), abs=3e-3
    )
    both = torch.stack([t, s])[:, ~diagonal].flatten()
    assert float(both.mean()) == pytest.approx(float(shifted.mean()), abs=5e-3)


def test_the_consistency_row_goes_to_the_data():
    config = settings.load(PROGRAM / "configs" / "paper" / "b-consistency.yaml")
    objective = build.objective_of(config)
    _, s = objective.times(100, generator=torch.Generator().manual_seed(0))
    assert (s == 0).all() and objective.boundary > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"kind": "consistency"}},
        {"objective": {"literal": True, "estimated": True, "penalty": "squared"}},
        {"objective": {"drop_labels": 0.5}},
        {
            "generator": {"space": "latent", "condition": "t,s"},
            "objective": {"kind": "meanflow", "shifted": True},
        },
        {
            "generator": {"space": "latent", "condition": "t,s"},
            "objective": {"kind": "improved-meanflow", "shifted": True},
        },
        {
            "generator": {"space": "latent", "condition": "t,s"},
            "objective": {"kind": "flow-matching"},
            "evaluation": {"evaluations": 4},
            "training": {"snapshots": True, "look_every": 3},
        },
    ],
    ids=["consistency", "estimated", "dropped", "meanflow", "improved", "flow-matching"],
)
def test_every_objective_trains_and_ships(config, encoder_folder, changes):
    made = given(config, encoder_folder, **changes)
    run(made)
    assert records(made)[-1].get("loss", 1) > 0
    assert len(ship.pictures(made, [0, 1], seed=0)) == 2
    kept = sorted(path.name for path in made.out.glob("generator/average-*"))
    if made.training.snapshots:
        assert kept == ["average-00000003.safetensors", "average-00000006.safetensors"]


def test_the_decoders_are_judged_over_the_training_of_a_latent_generator(
    config, encoder_folder, tmp_path, monkeypatch, capsys
):
    image = judged_by_resnet(given(config, encoder_folder), tmp_path)
    run(image)
    latent = settings.replaced(
        image,
        out=tmp_path / "latent",
        generator={"space": "latent", "condition": "t,s"},
        objective={"kind": "flow-matching"},
        evaluation={"evaluations": 2},
        training={"snapshots": True, "look_every": 3},
    )
    run(latent)
    decoders = importlib.import_module("decoders")
    alone()
    arguments = ["decoders.py", str(image.out), str(latent.out), "--samples", "16"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--levels", "0.1"])
    decoders.main()
    found = json.loads((latent.out / "decoders.json").read_text())["scores"]
    assert set(found) == {"3", "6"}
    assert set(found["6"]) == {decoders.OWN, "CrossFlowDecoder, t = 0.1"}
    assert (latent.out / "decoders.png").exists()
    monkeypatch.setattr(sys, "argv", ["decoders.py", str(image.out), str(image.out)])
    with pytest.raises(SettingsError, match="kept no averages"):
        decoders.main()


def test_runs_are_compared_over_their_training(
    config, encoder_folder, tmp_path, monkeypatch, capsys
):
    compare, runs = importlib.import_module("compare"), []
    for power in (0, 2):
        made = judged_by_resnet(given(config, encoder_folder), tmp_path)
        made = settings.replaced(
            made,
            out=tmp_path / f"power-{power}",
            adversarial=settings.AdversarialConfig(
                **image_loss(tmp_path), channels=(32, 32), power=power
            ),
            training={"snapshots": True, "look_every": 3},
        )
        run(made)
        runs.append(str(made.out))
    out = tmp_path / "compare.png"
    for more in ([], ["--samples", "16"]):
        alone()
        monkeypatch.setattr(sys, "argv", ["compare.py", *runs, "--out", str(out), *more])
        compare.main()
        assert out.exists()
        assert capsys.readouterr().out.count("at step 6") == 2
        out.unlink()


def test_a_profile_says_where_a_step_goes(config, encoder_folder, tmp_path, capsys):
    critic = settings.AdversarialConfig(**image_loss(tmp_path), channels=(32, 32))
    made = given(config, encoder_folder, adversarial=critic)
    run(made, "--profile")
    found = json.loads((made.out / "profile.json").read_text())
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert {"flow", "backward", "optimiser", "data"} <= set(found["shares"])
    trace = json.loads((made.out / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("adversarial") == 2 * 20  # what the generator hears, and the critic itself
    assert not list(made.out.glob("generator/step-*"))
    assert "ms a step" in capsys.readouterr().out
