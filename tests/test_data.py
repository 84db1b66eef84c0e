"""Folders of pictures: cropped as ADM does, the same for a step whatever ran before, broken files
skipped and named.
"""

import io
import json
import os
import pathlib
import pickle
import random
import resource
import struct
import tarfile
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from rows import batch

from flowspace import InputError, RunError
from flowspace.vision.data import DatasetImages, FolderImages, centre_crop
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
    images = FolderImages(folder, 8)
    later = batch(images, 35, 40, 0)
    for step in (0, 3, 7):
        found = batch(images, 5 * step, 5 * step + 5, 0)
    assert all(torch.equal(a, b) for a, b in zip(later, found, strict=True))
    assert not torch.equal(later[0], batch(FolderImages(folder, 8), 35, 40, 1)[0])


def test_every_pass_shows_every_image_once_and_flips_half_of_them(folder):
    images = FolderImages(folder, 8)
    seen, flips = [], 0
    plain = [images[i][0] for i in range(12)]
    for step in range(20):
        pictures, labels = batch(images, 6 * step, 6 * step + 6, 0)
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
    still = batch(images, 0, 12, 0, flip=False)[0]
    assert all(any(torch.equal(p, q) for q in plain) for p in still)


def test_a_batch_may_be_larger_than_the_folder(folder):
    pictures, labels = batch(FolderImages(folder, 8), 30, 60, 0)
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
    assert batch(images, 0, 12, 0)[0].shape == (12, 3, 8, 8)


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
    for mine, theirs in zip(batch(images, 3, 20, 1), batch(plain, 3, 20, 1), strict=True):
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
    first = batch(images, 3, 40, 7)
    parts = [batch(again, a, b, 7) for a, b in ((3, 11), (11, 40))]
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


# --- strangers' files
# -------------------------------------------------------------------------------------------------


def picture(value, kind="PNG", size=(16, 16)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(buffer, kind)
    return buffer.getvalue()


def png(width, height, bits, colours, data):
    """A PNG of which each part is as it is said."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def one_class(root, contents):
    """Return images of files with these contents, in the order of their names."""
    (root / "a").mkdir(parents=True)
    for name, content in contents.items():
        (root / "a" / name).write_bytes(content)
    return FolderImages(root, 4)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 10, 120, 250])
    return image


MODES = {
    "16-bit grey": (
        saved(Image.fromarray(np.full((4, 4), 0x8040, dtype=np.uint16))),
        (128, 128, 128),
    ),
    "16-bit dark grey": (saved(Image.fromarray(np.full((4, 4), 255, dtype=np.uint16))), (0, 0, 0)),
    "16-bit colours": (
        png(4, 4, 16, 2, (b"\0" + b"\x80\x40\x10\x00\xff\xff" * 4) * 4),
        (128, 16, 255),
    ),
    "16-bit grey and alpha": (
        png(4, 4, 16, 4, (b"\0" + b"\x80\x40\x10\x00" * 4) * 4),
        (128, 128, 128),
    ),
    "palette": (saved(palette()), (10, 120, 250)),
    "palette of alphas": (saved(palette(), transparency=b"\x05\x80"), (10, 120, 250)),
    "palette with a hole": (saved(palette(), transparency=1), (10, 120, 250)),
    "gif": (saved(palette(), "GIF"), (10, 120, 250)),
    "grey with a hole": (saved(Image.new("L", (4, 4), 77), transparency=77), (77, 77, 77)),
    "grey and alpha": (saved(Image.new("LA", (4, 4), (77, 3))), (77, 77, 77)),
    "colours and alpha": (saved(Image.new("RGBA", (4, 4), (10, 120, 250, 3))), (10, 120, 250)),
    "one bit": (saved(Image.new("1", (4, 4), 1)), (255, 255, 255)),
    "two bits": (png(4, 4, 2, 0, b"\0\x55" * 4), (85, 85, 85)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_its_right_values(tmp_path, mode):
    content, colour = MODES[mode]
    pixels, _ = one_class(tmp_path, {"x.png": content}).row(0)
    assert torch.equal(
        pixels, torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand_as(pixels)
    )


def test_inks_become_colours(tmp_path):
    content = saved(Image.new("CMYK", (16, 16), (20, 120, 60, 40)), "JPEG", quality=100)
    pixels, _ = one_class(tmp_path, {"x.jpg": content}).row(0)
    expected = torch.tensor([(255 - ink) * (255 - 40) / 255 for ink in (20, 120, 60)])
    assert (pixels.float() - expected[:, None, None]).abs().max() <= 3


def test_pixels_of_an_unknown_range_are_no_picture(tmp_path):
    class Floating(FolderImages):
        def open(self, index):
            return Image.new("F", (4, 4), 0.5)

    images = Floating(one_class(tmp_path, {"x.png": b""}).root, 4)
    with pytest.warns(UserWarning, match="floating-point"), pytest.raises(RunError):
        images.row(0)


def test_pictures_that_would_fill_the_memory_are_skipped_and_named(tmp_path):
    images = one_class(
        tmp_path,
        {
            "1.png": png(1, 65000, 1, 0, b"\0\0" * 65000),
            "2.png": png(65000, 1, 1, 0, bytes(8126)),
            "3.png": png(13000, 13000, 1, 0, bytes(13000 * 1626)),
            "4.png": png(2**31 - 1, 2**31 - 1, 1, 0, b"\0"),
            "5.png": picture(200),
        },
    )
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, limit[1]))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows = [images.row(index)[0] for index in range(5)]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert all(torch.equal(row, torch.full_like(row, 200)) for row in rows)
    assert [pathlib.Path(name).name for name in images.broken] == [
        "1.png",
        "2.png",
        "3.png",
        "4.png",
    ]
    assert sum("cannot be read" in str(warning.message) for warning in caught) == 4


def test_only_regular_files_of_a_bounded_length_are_opened(tmp_path):
    images = one_class(tmp_path, {"z.png": picture(200)})
    os.mkfifo(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").symlink_to("/dev/zero")
    (tmp_path / "a" / "3.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a" / "4.png").mkdir()
    with (tmp_path / "a" / "5.webp").open("wb") as file:
        file.write(saved(Image.new("RGB", (4, 4)), "WEBP"))
        file.truncate(40 * 2**30)
    images = FolderImages(tmp_path, 4)
    with pytest.warns(UserWarning, match="regular"):
        assert torch.equal(images.row(0)[0], images.row(5)[0])
    assert len(images.broken) == 5


def test_a_long_row_of_broken_pictures_ends_soon(tmp_path, monkeypatch):
    images = one_class(tmp_path, {f"{number:02}.png": b"" for number in range(30)})
    monkeypatch.setattr("flowspace.vision.data.MOST_IN_A_ROW", 7)
    with pytest.warns(UserWarning), pytest.raises(RunError, match=r"none of the 7 .*09\.png"):
        images.row(9)
    assert len(images.broken) == 7


def write_shard(path, members):
    """Write a tar file of members; a TarInfo is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, dict):
                for field, value in content.items():
                    setattr(member, field, value)
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def greys(images):
    return [
        (int(images.row(index)[0].float().mean()), images.labels[index])
        for index in range(len(images))
    ]


def test_further_pictures_of_a_sample_are_not_trained_on(tmp_path):
    members = []
    for key, value, label in (("22.05", 200, b"1"), ("b/c", 60, b"0")):
        members += [
            (f"{key}.seg.png", picture(0)),
            (f"{key}.JPG", picture(value, "JPEG")),
            (f"{key}.cls", label),
            (f"{key}.mask.left.png", picture(1)),
            (f"{key}.json", b'{"label": "tench"}'),
        ]
    write_shard(tmp_path / "0.tar", members)
    assert greys(ShardImages(tmp_path, 8)) == [(200, 1), (60, 0)]


@pytest.mark.parametrize("label", [b"7", b" 7\n", "7", 7, 7.0])
def test_a_class_is_a_number_or_the_text_of_one(tmp_path, label):
    name, content = "1.cls", label
    if not isinstance(label, bytes):
        name, content = "1.json", json.dumps({"label": label}).encode()
    write_shard(tmp_path / "0.tar", [("1.png", picture(9)), (name, content)])
    assert greys(ShardImages(tmp_path, 8)) == [(9, 7)]


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("1.cls", b"1"), ("1.png", picture(0))], r"two pictures of 1;.*KEY\.seg\.png"),
        ([("1.cls", b"1"), ("1.jpg", picture(0))], r"holds 1\.jpg twice"),
        ([("1.cls", b"1"), ("1.cls", b"1")], r"holds 1\.cls twice"),
        ([("1.cls", b"1"), ("1.json", b'{"label": 2}')], r"1 is of class 1 and.*of class 2"),
        ([("1.cls", b"n01440764")], r"1\.cls holds the class b'n01440764'.*an integer"),
        ([("1.cls", b"-1")], r"1\.cls holds the class b'-1'"),
        ([("1.cls", b"1000000000")], r"1\.cls holds the class b'1000000000'"),
        ([("1.cls", b"1" * 9000)], r"1\.cls holds the class"),
        ([("1.cls", b"1.5")], r"1\.cls holds the class"),
        ([("1.cls", b"\xff")], r"1\.cls holds the class"),
        ([("1.json", b'{"label": "tench"}')], r"1\.json holds the class tench"),
        ([("1.json", b'{"label": [1]}')], r"1\.json holds the class \[1\]"),
        ([("1.json", b"{")], r"1\.json holds the class"),
        ([("1.json", b"[" * 100000)], r"1\.json holds the class"),
        ([("1.json", b"{}")], "1 has no class"),
        ([("1.json", b"[1]")], "1 has no class"),
        ([("1.seg.png", picture(0))], "1 has no class"),
        ([("1.cls", b"1"), ("2.seg.png", picture(0))], "2.seg has no class"),
        ([("1.cls", {"type": tarfile.SYMTYPE, "linkname": "/etc/hostname"})], "no plain file"),
        ([("1.cls", {"type": tarfile.FIFOTYPE})], "no plain file"),
    ],
)
def test_a_shard_that_does_not_say_its_classes_is_one_error(tmp_path, members, says):
    write_shard(tmp_path / "0.tar", [("1.jpg", picture(200, "JPEG")), *members])
    with pytest.raises(RunError, match=says) as raised:
        ShardImages(tmp_path)
    assert "0.tar" in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_members_that_are_no_plain_files_are_skipped_and_named(tmp_path, kind):
    odd = {"type": kind, "linkname": "2.png"}
    members = [("1.png", odd), ("1.cls", b"0"), ("2.png", picture(90)), ("2.cls", b"1")]
    write_shard(tmp_path / "0.tar", [("d.png", {"type": tarfile.DIRTYPE}), *members])
    images = ShardImages(tmp_path, 8)
    with pytest.warns(UserWarning, match="no plain file"):
        assert greys(images) == [(90, 0), (90, 1)]
    assert len(images.broken) == 1


def sparse(name, claimed):
    """A sparse member of GNU's old format that holds nothing and claims to be long."""
    member = tarfile.TarInfo(name)
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:398] = b"%011o\0" % 0
    header[398:410] = b"%011o\0" % 0
    header[482] = 0
    header[483:495] = b"\x80" + bytes(3) + claimed.to_bytes(8, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("claimed", [40 * 2**30, 600])
@pytest.mark.parametrize("name", ["1.png", "1.cls", "1.json"])
def test_a_sparse_member_that_claims_forty_gigabytes_is_not_read(tmp_path, name, claimed):
    write_shard(tmp_path / "rest.tar", [("1.cls", b"1"), ("2.png", picture(90)), ("2.cls", b"1")])
    rest = (tmp_path / "rest.tar").read_bytes()
    if name != "1.png":
        write_shard(tmp_path / "rest.tar", [("1.png", picture(90))])
        rest = (tmp_path / "rest.tar").read_bytes()
    (tmp_path / "rest.tar").write_bytes(sparse(name, claimed) + rest)
    with tarfile.open(tmp_path / "rest.tar") as tar:
        assert tar.next().size == claimed
    if name == "1.png":
        with pytest.warns(UserWarning, match="no plain file"):
            assert greys(ShardImages(tmp_path, 8)) == [(90, 1), (90, 1)]
    else:
        with pytest.raises(RunError, match="no plain file"):
            ShardImages(tmp_path)


def test_flipped_bits_of_a_shard_are_refused_or_leave_pictures(tmp_path):
    write_shard(
        tmp_path / "a" / "0.tar",
        [
            (f"{n}.{kind}", {"png": picture(n), "cls": b"1"}[kind])
            for n in range(4)
            for kind in ("png", "cls")
        ],
    )
    whole = (tmp_path / "a" / "0.tar").read_bytes()
    draw, refused = random.Random(0), 0
    for number in range(150):
        torn = bytearray(whole)
        for _ in range(draw.choice([1, 1, 3])):
            at = draw.choice([0, 1024, 2048, 3072]) + draw.randrange(512)
            torn[at] ^= 1 << draw.randrange(8)
        root = tmp_path / str(number)
        root.mkdir()
        (root / "0.tar").write_bytes(torn)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                greys(ShardImages(root, 4))
        except RunError:
            refused += 1
    assert 10 < refused < 150


def test_an_index_that_was_changed_is_made_again(tmp_path):
    write_shards(tmp_path, (3,))
    labels = ShardImages(tmp_path, 8).labels
    places = ShardImages(tmp_path, 8).places
    kept = bytearray((tmp_path / INDEX).read_bytes())
    kept[-8] ^= 1
    (tmp_path / INDEX).write_bytes(kept)
    assert ShardImages(tmp_path, 8).labels == labels
    assert torch.equal(ShardImages(tmp_path, 8).places, places)
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(RunError, match=r"x\.tar is no regular file"):
        ShardImages(tmp_path)


def data_set(root, held, labels, kind="int64"):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
    rows = datasets.Dataset.from_dict({"image": held, "label": labels}, features=features)
    import pyarrow.parquet

    root.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(rows.with_format("arrow")[:], root / "a.parquet")


def test_rows_that_name_files_outside_the_data_sets_folder_are_not_read(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(1))
    root = tmp_path / "set"
    root.mkdir()
    (root / "inside.png").write_bytes(picture(90))
    (root / "link.png").symlink_to(secret)
    paths = [str(secret), "../secret.png", "link.png", "inside.png"]
    data_set(root, [{"path": path, "bytes": None} for path in paths] + [None], [0, 1, 2, 3, 4])
    images = DatasetImages(root, 8)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert [value for value, _ in greys(images)] == [90] * 5
    *outside, nothing = images.broken.values()
    assert len(outside) == 3 and all(
        "outside the folder of the data set" in why for why in outside
    )
    assert "no picture" in nothing


@pytest.mark.parametrize(
    ("labels", "kind", "shown"),
    [
        ([0, -1], "int64", "-1"),
        ([0, 10**9], "int64", "1000000000"),
        ([0, None], "int64", "None"),
        (["0", "cat"], "string", "cat"),
        ([0.0, 1.5], "float32", "1.5"),
    ],
)
def test_labels_of_a_data_set_that_are_no_classes_are_named(tmp_path, labels, kind, shown):
    data_set(tmp_path, [{"path": None, "bytes": picture(1)}] * 2, labels, kind)
    with pytest.raises(RunError, match=f"row 1: got the label '{shown}'"):
        DatasetImages(tmp_path, 8)


def test_a_data_set_without_pictures_or_training_split_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": [1.5, 2.5], "label": [0, 1]})
    rows.to_parquet(str(tmp_path / "a" / "a.parquet"))
    with pytest.raises(RunError, match=r"column 'image' holds .*, not pictures"):
        DatasetImages(tmp_path / "a", 8)
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "b"))
    with pytest.raises(RunError, match="holds the splits test, and no split 'train'"):
        DatasetImages(tmp_path / "b", 8)
    rows.select([]).to_parquet(str(tmp_path / "c" / "a.parquet"))
    with pytest.raises(RunError):
        DatasetImages(tmp_path / "c", 8)
