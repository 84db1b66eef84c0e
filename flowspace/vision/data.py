"""Pictures from a folder of classes: cropped, flipped, in [-1, 1], the same for a step whatever
ran before it.

A file that cannot be read is replaced by the next one that can, counted and named; it never ends a
run.
"""

import abc
import functools
import io
import os
import stat
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flowspace.errors import InputError, RunError
from flowspace.training.draws import seed_of

__all__ = ["DatasetImages", "FolderImages", "Images", "centre_crop"]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""What is decoded, whatever a file calls itself: Pillow would hand PostScript named x.png to an
outside program.
"""

BROKEN = (
    UnidentifiedImageError,
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    LookupError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What is raised for a picture that cannot be read."""

MOST_BYTES = 2**28
"""Of one file: some decoders read all of it before they look at it, and a sparse file of a few
kilobytes may claim gigabytes.
"""

MOST_PIXELS = 2**28 // 3
"""Of one picture: a quarter of a gigabyte in RGB, where Pillow begins to warn; a file of 200 KB
may hold as many.
"""

MOST_ASPECT = 64
"""Longer side over shorter side: the shorter one is scaled to the size asked for, and the longer
one with it.
"""

MOST_IN_A_ROW = 1000
"""Pictures that may be broken one after another; more, and the data is not what it should be."""

MOST_CLASSES = 100_000
"""Labels are below it, where nothing says how many classes there are: every class has a name."""

MOST_NAMED = 5

MOST_SHOWN = 60
"""Characters of what a file holds, in an error."""


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """Return the middle square of a picture, scaled to size: halved by boxes while it is twice as
    large, then bicubic.

    The preprocessing of ADM (Dhariwal & Nichol, arXiv 2105.05233), which DiT and MeanFlow share.
    """
    width, height = picture.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        picture = picture.resize((width, height), Image.Resampling.BOX)
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


class Images(abc.ABC):
    """Labelled images by number; what cannot be read is skipped, counted and named.

    Attributes:
        size: pixels a side.
        labels: the class of each.
        names: of the classes.
    """

    size: int
    labels: tuple[int, ...]
    names: tuple[str, ...]

    def __init__(self, size: int, labels: Iterable[int], names: Iterable[str]) -> None:
        if size < 1:
            raise InputError(f"got size = {size}; it counts pixels a side: write 1 or more")
        self.size = size
        self.labels = tuple(labels)
        self.names = tuple(names)
        # In shared memory, so that what a worker of a DataLoader finds broken is known here too.
        self._unreadable = torch.zeros(len(self.labels), dtype=torch.bool).share_memory_()
        self._reasons: dict[int, str] = {}

    @abc.abstractmethod
    def open(self, index: int) -> Image.Image:
        """Open one picture; it may raise what broken pictures raise."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Return what one picture is called in reports."""

    @property
    def broken(self) -> dict[str, str]:
        """What could not be read so far, by name, and why; also what the workers of a DataLoader
        could not read, whose reasons are in their own warnings.
        """
        found = {}
        for index in self._unreadable.nonzero().flatten().tolist():
            reason = self._reasons.get(index, "a worker could not read it")
            found[self.name(index)] = reason
        return found

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image ``(3, size, size)`` in [-1, 1] and its class.

        Raises:
            IndexError: if there is no such image.
            RunError: if neither it nor the next thousand can be read.
        """
        pixels, label = self.row(index)
        return pixels.float() / 127.5 - 1, label

    def row(self, index: int, mirrored: bool = False) -> tuple[Tensor, int]:
        """Return an image and its class; in place of a broken one, the next that is whole.

        Args:
            index: of the image.
            mirrored: swap left and right.

        Returns:
            Pixels, uint8 ``(3, size, size)``, and the class.

        Raises:
            IndexError: if there is no such image.
            RunError: if neither it nor the next thousand can be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"got index {index}; there are {len(self)} images")
        tried = min(len(self), MOST_IN_A_ROW)
        for offset in range(tried):
            at = (index + offset) % len(self)
            pixels = self._pixels(at)
            if pixels is None:
                continue
            if mirrored:
                pixels = pixels.flip(-1)
            return pixels, self.labels[at]
        first = self.name(index % len(self))
        raise RunError(f"none of the {tried} images can be read that begin with {first}")

    def _pixels(self, index: int) -> Tensor | None:
        """Return one image, uint8 ``(3, size, size)``, or None if it is broken."""
        if self._unreadable[index]:
            return None
        try:
            with self.open(index) as picture:
                check_shape(picture)  # before anything is decoded
                square = centre_crop(_rgb(picture), self.size)
        except BROKEN as error:
            self._unreadable[index] = True
            self._reasons[index] = f"{type(error).__name__}: {error}"
            count = int(self._unreadable.sum())
            warnings.warn(
                f"{self.name(index)} cannot be read and is skipped ({count} so far): {error}",
                stacklevel=4,
            )
            return None
        pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
        return pixels.reshape(self.size, self.size, 3).permute(2, 0, 1).contiguous()

    def order(self, seed: int, number: int) -> Sequence[int]:
        """Return the order in which a pass takes the images."""
        return order_of(seed, number, len(self))

    def report(self) -> str:
        """Say how many images each class has, and what was broken."""
        counts = Counter(self.labels)
        sizes, empty = [], []
        for label, name in enumerate(self.names):
            sizes.append(counts[label])
            if not counts[label]:
                empty.append(name)
        images = f"{len(self)} images in {len(self.names)} classes"
        parts = [f"{images}, {min(sizes)} to {max(sizes)} a class"]
        if empty:
            parts.append(f"empty: {', '.join(empty[:MOST_NAMED])}")
        broken = list(self.broken)
        if broken:
            named = ", ".join(broken[:MOST_NAMED])
            parts.append(f"{len(broken)} could not be read: {named}")
        return "; ".join(parts)


def check_shape(picture: Image.Image) -> None:
    """Refuse pictures that would fill the memory."""
    short, long = sorted(picture.size)
    if short < 1 or short * long > MOST_PIXELS or long > MOST_ASPECT * short:
        raise ValueError(
            f"got {picture.width} x {picture.height} pixels; at most {MOST_PIXELS} are read, and "
            f"sides of at most 1 to {MOST_ASPECT}"
        )


def _rgb(picture: Image.Image) -> Image.Image:
    """Return a picture in RGB, whatever its mode; transparency is dropped."""
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which nothing says the range")
    if picture.mode.startswith("I"):
        # 16-bit greyscale, which Pillow would clip at 255: the high byte, as it takes of colours.
        picture = picture.point(lambda level: level * (1 / 256))
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def check_file(path: Path) -> None:
    """Refuse what is no regular file, which may have no end, and files that are too large.

    Raises:
        OSError: for such a file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is no regular file")
    if status.st_size > MOST_BYTES:
        raise OSError(f"{path} has {status.st_size} bytes; at most {MOST_BYTES} are read")


class FolderImages(Images):
    """Images in one folder a class, as ImageNet is stored.

    Args:
        root: holds a folder a class; classes are numbered in the order of their names.
        size: pixels a side.
        classes: how many are expected; None takes what is there.

    Attributes:
        paths: of all images, sorted.
        labels: the class of each.
        names: of the classes.

    Raises:
        RunError: if the folder does not exist, has no images, or another number of classes than
            expected.
    """

    def __init__(self, root: Path, size: int = 256, classes: int | None = None) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise RunError(
                f"{root} is no folder; give the folder that holds one folder of images a class"
            )
        names = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        _check_classes(self.root, names, classes)
        paths, labels = [], []
        for label, name in enumerate(names):
            folder = self.root / name
            for path in sorted(folder.rglob("*")):
                if path.suffix.lower() in SUFFIXES:
                    paths.append(path)
                    labels.append(label)
        if not paths:
            raise RunError(
                f"{root} holds no images in folders of classes; known are "
                f"{', '.join(sorted(SUFFIXES))}"
            )
        self.paths = tuple(paths)
        super().__init__(size, labels, names)

    def open(self, index: int) -> Image.Image:
        """Open one file."""
        path = self.paths[index]
        check_file(path)
        return Image.open(path, formats=FORMATS)

    def name(self, index: int) -> str:
        """Return the path of one file."""
        return str(self.paths[index])


class DatasetImages(Images):
    """Images of a Hugging Face data set on this machine: a folder of ``save_to_disk``, or of
    parquet files.

    Args:
        path: of the folder.
        size: pixels a side.
        classes: how many are expected; None takes what is there.
        image: the column of the pictures.
        label: the column of the classes, integers.

    Raises:
        RunError: if the folder holds no such data set, a column is missing, a label is no class,
            or it has another number of classes.
    """

    def __init__(
        self,
        path: Path,
        size: int = 256,
        classes: int | None = None,
        image: str = "image",
        label: str = "label",
    ) -> None:
        from datasets import Image as ImageColumn

        self.path = Path(path)
        self.image = image
        rows = _dataset(self.path)
        for column in (image, label):
            if column not in rows.column_names:
                raise RunError(
                    f"{path} has no column {column!r}; it has {', '.join(rows.column_names)}"
                )
        names = getattr(rows.features[label], "names", None)
        labels = _classes(self.path, rows[label], names)
        if names is None:
            names = [str(number) for number in range(max(labels) + 1)]
        _check_classes(self.path, names, classes)
        try:
            self.rows = rows.cast_column(image, ImageColumn(decode=False))
        except Exception as error:
            raise RunError(
                f"{path}: the column {image!r} holds {rows.features[image]}, not pictures"
            ) from error
        super().__init__(size, labels, names)

    def open(self, index: int) -> Image.Image:
        """Open one picture from its bytes, or from the file of the data set that it names."""
        held = self.rows[index][self.image] or {}
        content, name = held.get("bytes"), held.get("path")
        if content:
            return Image.open(io.BytesIO(content), formats=FORMATS)
        if not name:
            raise ValueError("the row has no picture")
        path = (self.path / name).resolve()
        if not path.is_relative_to(self.path.resolve()):
            raise ValueError(
                f"it names {name}, outside the folder of the data set; store the bytes of the "
                "pictures in it"
            )
        check_file(path)
        return Image.open(path, formats=FORMATS)

    def name(self, index: int) -> str:
        """Return the number of a row."""
        return f"{self.path}, row {index}"


def class_of(value: Any) -> int | None:
    """Return the class that a label says, as a number or as the text of one; None if it says
    none.
    """
    if isinstance(value, bytes | str):
        try:
            value = int(value)
        except ValueError:
            return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or not 0 <= value < MOST_CLASSES:
        return None
    return int(value)


def _classes(source: Path, values: Iterable[Any], names: Sequence[str] | None) -> list[int]:
    """Return the class of each row."""
    count = MOST_CLASSES
    if names is not None:
        count = len(names)
    labels = []
    for row, value in enumerate(values):
        label = class_of(value)
        if label is None or label >= count:
            shown = str(value)[:MOST_SHOWN]
            raise RunError(
                f"{source}, row {row}: got the label {shown!r}; classes are integers from 0 to "
                f"{count - 1}"
            )
        labels.append(label)
    if not labels:
        raise RunError(f"{source} holds no rows")
    return labels


def _check_classes(source: Path, names: Sequence[str], expected: int | None) -> None:
    found = len(names)
    if expected not in (None, found):
        raise RunError(
            f"{source} holds {found} classes, {expected} are expected; the first are "
            f"{list(names[:3])}"
        )


def _dataset(path: Path) -> Any:
    """Return the rows of a data set."""
    import datasets

    files: Any = sorted(str(file) for file in path.rglob("*.parquet"))
    try:
        if files:
            return datasets.Dataset.from_parquet(files)
        rows = datasets.load_from_disk(str(path))
    except Exception as error:  # of many kinds, in several libraries
        raise RunError(
            f"{path} holds no parquet files and no data set that was saved to disk: {error}"
        ) from error
    if not isinstance(rows, datasets.DatasetDict):
        return rows
    if "train" not in rows:
        splits = ", ".join(map(str, rows))
        raise RunError(
            f"{path} holds the splits {splits}, and no split 'train'; give the folder of one"
        )
    return rows["train"]


@functools.lru_cache(maxsize=4)
def order_of(seed: int, number: int, rows: int) -> Sequence[int]:
    """Return the order of a pass; two passes meet in a batch."""
    draw = torch.Generator().manual_seed(seed_of(seed, number, 1))
    return torch.randperm(rows, generator=draw).tolist()
