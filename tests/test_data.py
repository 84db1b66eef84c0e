"""Folders of pictures: cropped as ADM does, the same for a step whatever ran before, broken files
skipped and named.
"""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from flowspace import InputError, RunError
from flowspace.vision.data import DatasetImages, FolderBatches, FolderImages, centre_crop
from flowspace.vision.shards import INDEX, ShardImages


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
        picture = picture.resize(
            tuple(x // 2 for x in picture.size), resample=Image.Resampling.BOX
        )
    scale = size / min(*picture.size)
    picture = picture.resize(
        tuple(round(x * scale) for x in picture.size), resample=Image.Resampling.BICUBIC
    )
    pixels = np.array(picture)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(16, 16), (40, 16), (70, 33), (15, 64), (200, 130)])
def test_the_crop_is_that_of_the_reference(shape):
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert np.array_equal(
        np.array(centre_crop(Image.fromarray(pixels), 16)), reference_crop(pixels, 16)
    )


def test_classes_are_numbered_by_name_and_images_are_in_range(folder):
    images = FolderImages(folder, 16, classes=3)
    assert images.names == ("ape", "cat", "dog") and len(images) == 12
    assert list(images.labels) == [0] * 3 + [1] * 5 + [2] * 4
    picture, label = images[3]
    assert (
        picture.shape == (3, 16, 16)
        and label == 1
        and -1 <= picture.min() < -0.5 < 0.5 < picture.max() <= 1
    )
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


def test_a_row_is_the_picture_in_pixels_and_its_mirror_image(folder):
    images = FolderImages(folder, 8)
    for index in (0, 7, -1):
        pixels, label = images.row(index)
        picture, expected = images[index]
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 8, 8) and label == expected
        assert torch.equal(pixels.float() / 127.5 - 1, picture)
        assert torch.equal(images.row(index, mirrored=True)[0], pixels.flip(-1))
    for index in (12, -13):
        with pytest.raises(IndexError, match="there are 12 images"):
            images.row(index)


@pytest.mark.filterwarnings("ignore:.*cannot be read")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_what_a_worker_of_a_loader_cannot_read_is_known_to_the_main_process(folder, start):
    torn = folder / "cat" / "1.png"
    torn.write_bytes(b"no image")
    images = FolderImages(folder, 8)
    loader = torch.utils.data.DataLoader(images, 5, num_workers=1, multiprocessing_context=start)
    seen = torch.cat([pictures for pictures, _ in loader])
    assert images.broken.keys() == {str(torn)}
    assert "1 could not be read" in images.report() and str(torn) in images.report()
    assert torch.equal(seen, torch.stack([images[index][0] for index in range(12)]))


def test_images_are_pickled_whole(folder):
    images = FolderImages(folder, 8)
    again = pickle.loads(pickle.dumps(images))
    assert again.paths == images.paths and torch.equal(again[3][0], images[3][0])


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
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(plain.names))}
    )
    held = [{"path": None, "bytes": path.read_bytes()} for path in plain.paths]
    rows = datasets.Dataset.from_dict(
        {"image": held, "label": list(plain.labels)}, features=features
    )
    rows.to_parquet(str(tmp_path / "a.parquet")) if how == "parquet" else rows.save_to_disk(
        str(tmp_path / "set")
    )
    images = DatasetImages(tmp_path if how == "parquet" else tmp_path / "set", 8)
    assert images.names == plain.names and images.report() == plain.report()
    for mine, theirs in zip(
        FolderBatches(images)(3, 20, 1), FolderBatches(plain)(3, 20, 1), strict=True
    ):
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
    with (
        pytest.warns(UserWarning, match=r"row \d"),
        pytest.raises(RunError, match="none of the 2 images"),
    ):
        images[0]
    with pytest.raises(RunError, match="no parquet"):
        DatasetImages(tmp_path / "none", 8)


# --- shards
# -------------------------------------------------------------------------------------------------


def write_shards(folder, counts, as_json=False):
    """Return the pictures and labels of webdataset's shards, in their order."""
    draw, found = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for number, count in enumerate(counts):
        with tarfile.open(folder / f"part-{number:03d}.tar", "w") as tar:
            for row in range(count):
                pixels = draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
                label = (number + row) % 3
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "png")
                text = json.dumps({"label": label}) if as_json else str(label)
                for suffix, content in (
                    ("json" if as_json else "cls", text.encode()),
                    ("png", buffer.getvalue()),
                ):
                    member = tarfile.TarInfo(f"{number}/sample-{row}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                found.append((pixels, label))
    return found


@pytest.mark.parametrize("as_json", [False, True])
def test_pictures_of_shards_are_what_was_written(tmp_path, as_json):
    wanted = write_shards(tmp_path, (4, 1, 3), as_json)
    for _ in range(2):  # the second time from the index
        images = ShardImages(tmp_path, 8, classes=3)
        assert len(images) == 8 and images.labels == tuple(label for _, label in wanted)
        assert images.report() == "8 images in 3 classes, 2 to 3 a class"
        for number, (pixels, label) in enumerate(wanted):
            picture, found = images[number]
            crop = torch.from_numpy(np.array(centre_crop(Image.fromarray(pixels), 8))).permute(
                2, 0, 1
            )
            assert found == label and torch.equal(picture, crop.float() / 127.5 - 1)
        assert (tmp_path / INDEX).exists()


def test_a_pass_over_shards_sees_every_picture_once_and_a_window_of_shards_at_a_time(tmp_path):
    counts = (4, 1, 3, 5, 2, 6)
    write_shards(tmp_path, counts)
    images = ShardImages(tmp_path, 8, window=2)
    shard = [number for number, count in enumerate(counts) for _ in range(count)]
    orders = [images.order(seed, number) for seed in (0, 1) for number in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(21))
        visited = [shard[row] for row in order]
        last = {k: len(visited) - visited[::-1].index(k) for k in set(visited)}
        open_at = [
            sum(k in visited[:at] and last[k] > at for k in range(len(counts))) for at in range(21)
        ]
        assert max(open_at) <= 2
    assert len({tuple(order) for order in orders}) == 4
    again = ShardImages(tmp_path, 8, window=2)
    first = FolderBatches(images)(3, 40, 7)
    parts = [FolderBatches(again)(a, b, 7) for a, b in ((3, 11), (11, 40))]
    assert torch.equal(first[0], torch.cat([part[0] for part in parts]))


def test_shards_that_changed_are_read_again(tmp_path):
    write_shards(tmp_path, (2,))
    assert len(ShardImages(tmp_path, 8)) == 2
    write_shards(tmp_path, (2, 3))
    assert len(ShardImages(tmp_path, 8)) == 5


def test_a_broken_picture_in_a_shard_is_skipped_and_named(tmp_path):
    write_shards(tmp_path, (3,))
    images = ShardImages(tmp_path, 8)
    _, offset, length, _ = images.places[1].tolist()
    with (tmp_path / "part-000.tar").open("r+b") as file:
        file.seek(offset)
        file.write(bytes(length))
    with pytest.warns(UserWarning, match=f"byte {offset}"):
        assert torch.equal(images[1][0], images[2][0])
    assert "1 could not be read" in images.report()


def test_what_is_no_shard_is_refused_by_name(tmp_path):
    with pytest.raises(RunError, match="holds no shards"):
        ShardImages(tmp_path)
    write_shards(tmp_path, (3,))
    with pytest.raises(RunError, match="0 to 1 are expected"):
        ShardImages(tmp_path, classes=2)
    whole = (tmp_path / "part-000.tar").read_bytes()
    (tmp_path / "part-000.tar").write_bytes(whole[:1700])
    with pytest.raises(RunError, match=r"part-000\.tar is"):
        ShardImages(tmp_path)
    with tarfile.open(tmp_path / "part-000.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(RunError, match="a has no class"):
        ShardImages(tmp_path)


def test_shards_that_webdataset_wrote_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "part-%03d.tar"), maxcount=3, verbose=0) as sink:
        for row in range(5):
            pixels = np.full((10, 10, 3), 40 * row, dtype=np.uint8)
            sink.write(
                {"__key__": f"sample{row:04d}", "png": Image.fromarray(pixels), "cls": row % 2}
            )
    images = ShardImages(tmp_path, 10, classes=2)
    assert images.labels == (0, 1, 0, 1, 0) and len(images.paths) == 2
    assert [round(float((images[row][0].mean() + 1) * 127.5)) for row in range(5)] == [
        0,
        40,
        80,
        120,
        160,
    ]


def test_postscript_under_the_name_of_a_picture_is_not_decoded(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(UnidentifiedImageError):
        FolderImages(tmp_path, size=16).open(0)
