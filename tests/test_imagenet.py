"""The ImageNet recipe on small real pictures: the same code as the large configs, resumed, shared
out, refused.
"""

import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowspace import InputError, RunError
from flowspace.cli import main
from flowspace.training import assign

for needed in ("pydantic", "accelerate", "diffusers", "timm", "torch_fidelity", "torchvision"):
    pytest.importorskip(needed)
configs = importlib.import_module("flowspace.recipes.config")
AdversarialConfig, LatentConfig, PerceptualConfig, TrainingConfig, load = (
    getattr(configs, name)
    for name in ("AdversarialConfig", "LatentConfig", "PerceptualConfig", "TrainingConfig", "load")
)
Run = importlib.import_module("flowspace.recipes.imagenet").Run
evaluate = importlib.import_module("flowspace.vision.evaluate")

CONFIGS = sorted((Path(__file__).parents[1] / "examples" / "imagenet" / "configs").glob("*.yaml"))
TINY = """
data: {{path: {data}, size: 16, classes: 2, workers: 1}}
encoder: {{name: null, stage_one: {{steps: 3, batch: 8, widths: [8, 8], channels: 4}}}}
generator: {{preset: null, depth: 1, width: 32, heads: 2, channels: 4, grid: 8, patch: 2,
             class_tokens: 2, time_tokens: 2}}
objective: {{shifted: false}}
training: {{steps: 6, batch: 8, warmup_epochs: 0.1, emas: [0.9, 0.5], bfloat16: false, cpu: true,
            checkpoint_every: 2, look_every: 100, log_every: 2, tensorboard: false,
            optimizer: adamw, learning_rate: 1.0e-3}}
evaluation: {{samples: 24, batch: 8}}
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
def config(data, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(data=data))
    return load(path, [f"out={tmp_path / 'run'}"])


class Pixels(evaluate.Extractor):
    """Features that are the pixels themselves."""

    name = "pixels"

    def __call__(self, images):
        return evaluate.Features(images.flatten(1).float(), None)


def change(config, **parts):
    """A section is changed by a mapping, or replaced."""
    new = {
        k: dataclasses.replace(getattr(config, k), **v) if isinstance(v, dict) else v
        for k, v in parts.items()
    }
    return dataclasses.replace(config, **new)


def weights(folder):
    (path,) = sorted(folder.glob("generator/step-*.safetensors"))[-1:]
    return load_file(path)


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def in_two_processes(*arguments):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [sys.executable, *torchrun, "-m", "flowspace.cli", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_run_trains_ships_and_logs(config):
    run = Run(config)
    run.train()
    records = [
        json.loads(line)
        for line in (config.out / "generator" / "log.jsonl").read_text().splitlines()
    ]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [0, 2, 4, 5]
    assert set(steps[0]["raw"]) == {"flow"} and set(steps[0]["by"]) == {"t", "s"}
    assert steps[0]["slopes"]["flow"] > 0
    for record, taken, left in zip(steps, (1, 2, 2, 1), (5, 3, 1, 0), strict=True):
        assert record["rows_a_second"] * record["seconds"] == pytest.approx(8 * taken)
        assert record["seconds_left"] == pytest.approx(left * record["seconds"] / taken)
    assert (config.out / "slopes.png").exists() and (
        config.out / "generator" / "sheet-0000006.png"
    ).exists()
    assert run.same_in_a_fresh_process((0, 1))
    card = (config.out / "pipeline" / "README.md").read_text()
    assert "Not evaluated." in card and "24 images in 2 classes" in card and "labels=[0]" in card
    again = Run.of(config.out)
    assert again.config == config


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from safetensors import safe_open
from flowspace.recipes.config import load
from flowspace.recipes.imagenet import Run

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
        Run(load(path, [f"out={folder}", *changes])).train()
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
    of = ("killed/encoder/training/step-*", "killed/generator/*.safetensors")
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


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_same_weights(config, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "tiny.yaml"), str(tmp_path), "20"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
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


ENCODER = "diffusion_pytorch_model.safetensors"


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_the_same_command_continues_once_there_is_room(
    config, tmp_path
):
    disk, path = tmp_path / "disk", tmp_path / "tiny.yaml"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("this user may not mount a small disk")
    command = [sys.executable, "-m", "flowspace.cli", "train", str(path), f"out={disk / 'run'}"]
    try:
        first = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert first.returncode == 1 and "Traceback" not in first.stderr
        assert [line for line in first.stderr.splitlines() if line.startswith("flowspace: ")] == [
            line for line in first.stderr.splitlines() if "No space left" in line
        ]
        for file in disk.glob("run/*/step-*.safetensors"):
            load_file(file)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
        Run(config).train()
        assert same(weights(config.out), weights(disk / "run"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [([], 1e-5), (["training.sharded=true"], 1e-5), (["training.optimizer=muon"], 2e-2)],
    ids=["ddp", "fsdp2", "muon"],
)
def test_two_processes_train_what_one_does(config, tmp_path, changes, tolerance):
    """Muon's Newton-Schulz steps are in bfloat16, so its updates agree to their rounding only."""
    Run(load(tmp_path / "tiny.yaml", [f"out={config.out}", *changes])).train()
    out = tmp_path / "two"
    found = in_two_processes(
        "train", tmp_path / "tiny.yaml", f"out={out}", "training.processes=2", *changes
    )
    assert found.returncode == 0, found.stderr[-2000:]
    one, two = weights(config.out), weights(out)
    assert one.keys() == two.keys()
    for name, value in one.items():
        if not name.startswith("optimizer:"):
            torch.testing.assert_close(
                two[name].float(), value.float(), rtol=0, atol=tolerance, msg=name
            )


@pytest.mark.slow
def test_two_processes_draw_what_one_does(config):
    """Inception's weights cannot be had here: judging stops at their absence, after all samples
    were drawn.
    """
    run = Run(change(config, evaluation={"batch": 4, "shard": 2}))
    run.train()
    with pytest.raises(RunError, match="Inception"):
        run.evaluate()
    one = {path.name: path.read_bytes() for path in (config.out / "samples").iterdir()}
    assert len(one) == 3
    shutil.rmtree(config.out / "samples")
    found = in_two_processes("evaluate", config.out)
    assert "Inception's weights" in found.stderr
    assert {path.name: path.read_bytes() for path in (config.out / "samples").iterdir()} == one


def test_accumulation_trains_what_one_pass_does(config, tmp_path):
    Run(config).train()
    parts = change(config, training={"accumulate": 2})
    parts = dataclasses.replace(
        parts,
        out=tmp_path / "parts",
        encoder=dataclasses.replace(
            config.encoder, name=str(config.out / "encoder"), stage_one=None
        ),
    )
    Run(parts).train()
    one, two = weights(config.out), weights(parts.out)
    for name, value in one.items():
        torch.testing.assert_close(two[name].float(), value.float(), rtol=0, atol=1e-5, msg=name)


def test_training_reads_the_latents_that_were_encoded(config):
    folder = Run(config).encode()
    cached = change(config, data={"latents": str(folder)})
    Run(cached).train()
    with pytest.raises(RunError, match="other settings"):
        Run(config).train()
    records = [
        json.loads(line)
        for line in (config.out / "generator" / "log.jsonl").read_text().splitlines()
    ]
    assert records[0]["raw"]["flow"] > 0


def test_sigterm_saves_and_ends_with_zero(config, tmp_path):
    out = tmp_path / "stopped"
    command = [
        sys.executable,
        "-m",
        "flowspace.cli",
        "train",
        str(tmp_path / "tiny.yaml"),
        f"out={out}",
    ]
    process = subprocess.Popen(
        [
            *command,
            "training.steps=100000",
            "training.checkpoint_every=100000",
            "training.log_every=1",
        ],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (out / "generator" / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert len(list(out.glob("generator/step-*.safetensors"))) == 1


def test_a_misspelt_key_is_named_with_its_neighbour(config, tmp_path):
    with pytest.raises(
        InputError, match=r"training\.bach is not known; did you mean training\.batch"
    ):
        load(tmp_path / "tiny.yaml", ["training.bach=3"])
    with pytest.raises(InputError, match=r"training\.batch = -3 came"):
        load(tmp_path / "tiny.yaml", ["training.batch=-3"])
    with pytest.raises(InputError, match=r"training\.emas = \[\] came"):
        load(tmp_path / "tiny.yaml", ["training.emas=[]"])
    with pytest.raises(InputError, match=r"latent\.levels\.0 = 0 came"):
        load(tmp_path / "tiny.yaml", ["latent.levels=[0]"])
    with pytest.raises(InputError, match="whose value is not YAML"):
        load(tmp_path / "tiny.yaml", ["training.emas=[0.9"])
    with pytest.raises(RunError, match="cannot be read"):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        ({"data": {"path": "/nowhere"}}, RunError, "no folder"),
        ({"data": {"classes": 3}}, RunError, "2 classes, 3 are expected"),
        (
            {"encoder": {"name": "va-vae", "stage_one": None, "weights": Path("/nowhere")}},
            RunError,
            "hf download",
        ),
        ({"generator": {"grid": 4}}, InputError, "generator.grid=8"),
        ({"generator": {"preset": "crossflow-z"}}, InputError, "crossflow-b"),
        ({"training": {"batch": 9, "accumulate": 2}}, RunError, "multiple of 2"),
        ({"training": {"processes": 2}}, RunError, "torchrun"),
        (
            {"adversarial": AdversarialConfig("resnet18", "/nowhere", size=None)},
            RunError,
            "/nowhere cannot be read",
        ),
        (
            {"perceptual": (PerceptualConfig("resnet18", "/nowhere"),)},
            RunError,
            "/nowhere cannot be read",
        ),
        (
            {"evaluation": {"extractor": "resnet18", "weights": "/nowhere"}},
            RunError,
            "/nowhere cannot be read",
        ),
        (
            {"latent": LatentConfig(training=TrainingConfig(batch=9, accumulate=2, cpu=True))},
            RunError,
            "multiple of 2",
        ),
    ],
)
def test_what_does_not_fit_is_one_error_before_any_step(config, parts, error, words):
    with pytest.raises(error, match=words):
        Run(change(config, **parts)).train()
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
        (
            "adversarial",
            {"layers": (0, 9)},
            r"layers = \(0, 9\).* does not run on images of 16 pixels",
        ),
        ("adversarial", {"channels": (1,)}, r"write adversarial.channels=\[32,32\]"),
        ("adversarial", {"channels": (32, 40)}, r"write adversarial.channels=\[32,32\]"),
    ],
)
def test_layers_that_a_network_has_not_are_one_error_before_any_step(
    config, tmp_path, part, asked, words
):
    path = tmp_path / "judge.pt"
    torch.save(importlib.import_module("timm").create_model("test_resnet").state_dict(), path)
    asked = {
        "network": "test_resnet",
        "weights": str(path),
        "size": None,
        "layers": (0, 1),
    } | asked
    term = (PerceptualConfig(**asked),) if part == "perceptual" else AdversarialConfig(**asked)
    with pytest.raises(InputError, match=words):
        Run(change(config, **{part: term})).train()
    assert not list(config.out.rglob("log.jsonl"))


def test_two_perceptual_terms_of_one_network_both_count(config, tmp_path):
    path = tmp_path / "judge.pt"
    torch.save(importlib.import_module("timm").create_model("test_resnet").state_dict(), path)
    terms = [
        PerceptualConfig("test_resnet", str(path), size=None, layers=(n,), unit=n > 0)
        for n in (0, 1)
    ]
    found = Run(config).parts.perceptual(tuple(terms))
    assert list(found) == ["test_resnet", "test_resnet 2"]
    assert [term.loss.unit for term in found.values()] == [False, True]


def test_weights_that_only_judging_needs_are_asked_for_before_the_training(
    config, tmp_path, capsys
):
    assert main(["train", str(tmp_path / "tiny.yaml"), f"out={config.out}", "--evaluate"]) == 1
    assert "Inception's weights" in capsys.readouterr().err
    assert not list(config.out.rglob("log.jsonl"))


def test_a_torch_without_muon_is_one_error_before_any_step(config, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(InputError, match=r"install torch 2\.9"):
        Run(change(config, training={"optimizer": "muon"})).train()
    assert not list(config.out.rglob("log.jsonl"))


def test_a_folder_that_cannot_be_written_to_is_one_error_before_any_step(config, tmp_path):
    (tmp_path / "file").write_text("")
    for job in (Run.train, Run.encode):
        with pytest.raises(
            RunError, match=r"file/run cannot be written to \(Not a directory\); write out=FOLDER"
        ):
            job(Run(dataclasses.replace(config, out=tmp_path / "file" / "run")))
    if os.getuid():
        config.out.mkdir()
        config.out.chmod(0o500)
    else:  # root may write anywhere but where nobody may
        config = dataclasses.replace(config, out=Path("/proc/run"))
    with pytest.raises(RunError, match=r"run cannot be written to"):
        Run(config).train()


def test_a_run_that_was_moved_or_logs_otherwise_goes_on(config, tmp_path):
    Run(config).train()
    (config.out).rename(tmp_path / "moved")
    before = weights(tmp_path / "moved")
    moved = change(config, training={"log_every": 1, "checkpoint_every": 3}, data={"workers": 2})
    Run(dataclasses.replace(moved, out=tmp_path / "moved")).train()
    assert same(before, weights(tmp_path / "moved"))


def test_a_checkpoint_of_another_config_is_refused(config):
    Run(config).train()
    kept = (config.out / "config.json").read_bytes()
    with pytest.raises(RunError, match="other settings"):
        Run(change(config, objective={"equal": 0.25})).train()
    assert (config.out / "config.json").read_bytes() == kept


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
    Run(config).train()
    path, told = config.out / torn, config.out / deleted
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=f"delete {told}:| cannot be read .*delete it:"):
        Run(config).pipeline() if deleted == "pipeline" else Run(config).encoder
    shutil.rmtree(told) if told.is_dir() else told.unlink()
    Run(config).train()
    assert path.read_bytes() == whole


def test_weights_of_an_encoder_are_never_unpickled(config):
    run = Run(config)
    torch.save(
        run.encoder.autoencoder.state_dict(),
        config.out / "encoder" / "diffusion_pytorch_model.bin",
    )
    (config.out / "encoder" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(RunError, match="holds no autoencoder"):
        Run(config).encoder  # noqa: B018


def test_torn_features_of_the_reference_are_made_again(config):
    parts = Run(config).parts
    extractor = Pixels()
    config.out.mkdir()
    first = parts.real(extractor).features
    (path,) = config.out.glob("reference-*")
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(parts.real(extractor).features, first)
    assert load_file(path)["features"].equal(first)


def test_a_reference_is_of_the_size_that_the_judge_sees(config, tmp_path):
    path = tmp_path / "judge.pt"
    torch.save(importlib.import_module("timm").create_model("test_resnet").state_dict(), path)
    config.out.mkdir()
    found = []
    for size in (None, 48):
        parts = Run(
            change(
                config, evaluation={"extractor": "test_resnet", "weights": str(path), "size": size}
            )
        ).parts
        found.append(parts.real(parts.extractor()).features)
    assert not torch.allclose(*found)
    names = sorted(path.name for path in config.out.glob("reference-*"))
    assert names == ["reference-test_resnet.safetensors", "reference-test_resnet@48.safetensors"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_read_and_its_objective_is_built(path):
    config = load(path)
    run = Run(config)
    if not config.objective.estimated:
        assert run.objective.schedule.alpha(torch.tensor(0.0)) == 1
    if config.generator.preset:
        with torch.device("meta"):
            from flowspace.vision import CrossFlowGenerator

            network = CrossFlowGenerator.from_preset(
                config.generator.preset, condition=config.generator.condition
            )
        assert assign(network)["muon"]
