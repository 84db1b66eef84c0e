"""Folders of pictures: cropped as ADM does, the same for a step whatever ran before, broken files skipped and named."""

import numpy as np
import pytest
import torch
from PIL import Image

from flowspace import InputError, RunError
from flowspace.vision.data import DatasetImages, FolderBatches, FolderImages, centre_crop


@pytest.fixture
def folder(tmp_path):
    draw = np.random.default_rng(0)
    for name, count in (("cat", 5), ("ape", 3), ("dog", 4)):
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = draw.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.{'png' if i % 2 else 'JPEG'}")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


def reference_crop(array, size):
    """The published preprocessing, from its definition on arrays of pixels."""
    picture = Image.fromarray(array)
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.Resampling.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(tuple(round(x * scale) for x in picture.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(picture)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(16, 16), (40, 16), (70, 33), (15, 64), (200, 130)])
def test_the_crop_is_that_of_the_reference(shape):
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert np.array_equal(np.array(centre_crop(Image.fromarray(pixels), 16)), reference_crop(pixels, 16))


def test_classes_are_numbered_by_name_and_images_are_in_range(folder):
    images = FolderImages(folder, 16, classes=3)
    assert images.names == ("ape", "cat", "dog") and len(images) == 12
    assert list(images.labels) == [0] * 3 + [1] * 5 + [2] * 4
    picture, label = images[3]
    assert picture.shape == (3, 16, 16) and label == 1 and -1 <= picture.min() < -0.5 < 0.5 < picture.max() <= 1
    assert images.report() == "12 images in 3 classes, 3 to 5 a class"


def test_grey_pictures_and_pictures_with_transparency_become_rgb(tmp_path):
    (tmp_path / "a").mkdir()
    for mode in ("L", "RGBA", "P"):
        Image.new(mode, (9, 9), 1).save(tmp_path / "a" / f"{mode}.png")
    images = FolderImages(tmp_path, 8)
    assert {tuple(images[i][0].shape) for i in range(3)} == {(3, 8, 8)}


def test_the_batch_of_a_step_depends_on_nothing_but_the_step(folder):
    batches = FolderBatches(FolderImages(folder, 8))
    later = batches(35, 40, 0)
    for step in (0, 3, 7):
        found = batches(5 * step, 5 * step + 5, 0)
    assert all(torch.equal(a, b) for a, b in zip(later, found, strict=True))
    assert not torch.equal(later[0], FolderBatches(FolderImages(folder, 8))(35, 40, 1)[0])


def test_every_pass_shows_every_image_once_and_flips_half_of_them(folder):
    images = FolderImages(folder, 8)
    batches, seen, flips = FolderBatches(images), [], 0
    plain = [images[i][0] for i in range(12)]
    for step in range(20):
        pictures, labels = batches(6 * step, 6 * step + 6, 0)
        for picture, label in zip(pictures, labels, strict=True):
            straight = [i for i in range(12) if torch.equal(plain[i], picture)]
            mirrored = [i for i in range(12) if torch.equal(plain[i].flip(-1), picture)]
            (index,) = straight or mirrored
            flips += bool(mirrored)
            assert images.labels[index] == label
            seen.append(index)
    for start in range(0, 120, 12):
        assert sorted(seen[start : start + 12]) == list(range(12))
    assert 40 < flips < 80
    still = FolderBatches(images, flip=False)
    assert all(any(torch.equal(p, q) for q in plain) for p in still(0, 12, 0)[0])


def test_a_batch_may_be_larger_than_the_folder(folder):
    pictures, labels = FolderBatches(FolderImages(folder, 8))(30, 60, 0)
    assert pictures.shape == (30, 3, 8, 8) and len(labels) == 30


def test_broken_files_are_skipped_counted_and_named_and_never_end_a_run(folder):
    torn = folder / "cat" / "1.png"
    torn.write_bytes(torn.read_bytes()[:60])
    (folder / "dog" / "0.JPEG").write_bytes(b"no image")
    images = FolderImages(folder, 8)
    with pytest.warns(UserWarning, match=r"cannot be read and is skipped"):
        pictures = [images[i] for i in range(12)]
    assert torch.equal(pictures[4][0], pictures[5][0])
    assert len(images.broken) == 2 and str(torn) in images.broken
    assert "2 could not be read" in images.report() and str(torn) in images.report()
    assert FolderBatches(images)(0, 12, 0)[0].shape == (12, 3, 8, 8)


def test_a_folder_of_nothing_but_broken_files_is_one_error(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"")
    images = FolderImages(tmp_path, 8)
    with pytest.warns(UserWarning), pytest.raises(RunError, match="none of the 1 images"):
        images[0]


def test_what_is_no_data_set_is_refused_before_any_work(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    for make, says in (
        (lambda: FolderImages(folder / "nothing"), "is no folder"),
        (lambda: FolderImages(empty), "holds no images"),
        (lambda: FolderImages(folder, 8, classes=1000), "holds 3 classes, 1000 are expected"),
    ):
        with pytest.raises(RunError, match=says):
            make()
    with pytest.raises(InputError, match="size"):
        FolderImages(folder, 0)


@pytest.mark.parametrize("how", ["parquet", "disk"])
def test_a_data_set_gives_what_the_folder_gives(folder, tmp_path, how):
    datasets = pytest.importorskip("datasets")
    plain = FolderImages(folder, 8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(plain.names))})
    held = [{"path": None, "bytes": path.read_bytes()} for path in plain.paths]
    rows = datasets.Dataset.from_dict({"image": held, "label": list(plain.labels)}, features=features)
    rows.to_parquet(str(tmp_path / "a.parquet")) if how == "parquet" else rows.save_to_disk(str(tmp_path / "set"))
    images = DatasetImages(tmp_path if how == "parquet" else tmp_path / "set", 8)
    assert images.names == plain.names and images.report() == plain.report()
    for mine, theirs in zip(FolderBatches(images)(3, 20, 1), FolderBatches(plain)(3, 20, 1), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(RunError, match="no column 'picture'"):
        DatasetImages(images.path, 8, image="picture")
    with pytest.raises(RunError, match="classes, 9 are expected"):
        DatasetImages(images.path, 8, 9)


def test_a_broken_row_of_a_data_set_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    held = [{"path": None, "bytes": b"no picture"}] * 2
    datasets.Dataset.from_dict({"image": held, "label": [0, 1]}, features=features).to_parquet(
        str(tmp_path / "a.parquet")
    )
    images = DatasetImages(tmp_path, 8)
    with pytest.warns(UserWarning, match=r"row \d"), pytest.raises(RunError, match="none of the 2 images"):
        images[0]
    with pytest.raises(RunError, match="no parquet"):
        DatasetImages(tmp_path / "none", 8)
