"""Pictures from a folder of classes: cropped, flipped, in [-1, 1], the same for a step whatever
ran before it.

A file that cannot be read is replaced by the next one that can, counted and named; it never ends a
run.
"""

import abc
import concurrent.futures
import functools
import io
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flowspace.errors import InputError, RunError
from flowspace.training import Batches, seed_of

__all__ = ["DatasetImages", "FolderBatches", "FolderImages", "Images", "centre_crop"]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""What is decoded, whatever a file calls itself: Pillow would hand PostScript named x.png to an
outside program.
"""

MOST_NAMED = 5


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """Return the middle square of a picture, scaled to size: halved by boxes while it is twice as
    large, then bicubic.

    The preprocessing of ADM (Dhariwal & Nichol, arXiv 2105.05233), which DiT, MeanFlow and
    CrossFlow share.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


class Images(abc.ABC):
    """Labelled images by number; what cannot be read is skipped, counted and named.

    Attributes:
        size: pixels a side.
        labels: the class of each.
        names: of the classes.
        broken: what could not be read so far, by name, and why.
    """

    size: int
    labels: tuple[int, ...]
    names: tuple[str, ...]
    broken: dict[str, str]

    @abc.abstractmethod
    def open(self, index: int) -> Image.Image:
        """Open one picture; it may raise what broken pictures raise."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Return what one picture is called in reports."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image ``(3, size, size)`` in [-1, 1] and its class; for a broken one, those of
        the next whole one.

        Raises:
            RunError: if none can be read.
        """
        for offset in range(len(self)):
            at = (index + offset) % len(self)
            name = self.name(at)
            if name in self.broken:
                continue
            try:
                with self.open(at) as picture:
                    square = centre_crop(picture.convert("RGB"), self.size)
            except (
                UnidentifiedImageError,
                OSError,
                SyntaxError,
                ValueError,
                Image.DecompressionBombError,
            ) as error:
                self.broken[name] = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"{name} cannot be read and is skipped ({len(self.broken)} so far): {error}",
                    stacklevel=2,
                )
                continue
            pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).reshape(
                self.size, self.size, 3
            )
            return pixels.permute(2, 0, 1).float() / 127.5 - 1, self.labels[at]
        raise RunError(f"none of the {len(self)} images can be read; the first is {self.name(0)}")

    def order(self, seed: int, number: int) -> Sequence[int]:
        """Return the order in which a pass takes the images."""
        return order_of(seed, number, len(self))

    def report(self) -> str:
        """Say how many images each class has, and what was broken."""
        counts = Counter(self.labels)
        sizes = [counts[label] for label in range(len(self.names))]
        text = (
            f"{len(self)} images in {len(self.names)} classes, {min(sizes)} to {max(sizes)} a "
            "class"
        )
        empty = [name for name, size in zip(self.names, sizes, strict=True) if not size]
        if empty:
            text += f"; empty: {', '.join(empty[:MOST_NAMED])}"
        if self.broken:
            text += (
                f"; {len(self.broken)} could not be read: "
                f"{', '.join(list(self.broken)[:MOST_NAMED])}"
            )
        return text


@dataclass(frozen=True)
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
        broken: what could not be read so far, and why.

    Raises:
        RunError: if the folder does not exist, has no images, or another number of classes than
            expected.
    """

    root: Path
    size: int = 256
    classes: int | None = None
    paths: tuple[Path, ...] = field(init=False, repr=False)
    labels: tuple[int, ...] = field(init=False, repr=False)
    names: tuple[str, ...] = field(init=False, repr=False)
    broken: dict[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"size = {self.size} came; it counts pixels a side")
        root = Path(self.root)
        if not root.is_dir():
            raise RunError(
                f"{root} is no folder; give the folder that holds one folder of images a class"
            )
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if self.classes is not None and len(names) != self.classes:
            raise RunError(
                f"{root} holds {len(names)} classes, {self.classes} are expected; the first are "
                f"{names[:3]}"
            )
        found = [
            (path, label)
            for label, name in enumerate(names)
            for path in sorted((root / name).rglob("*"))
        ]
        found = [(path, label) for path, label in found if path.suffix.lower() in SUFFIXES]
        if not found:
            raise RunError(
                f"{root} holds no images in folders of classes; known are "
                f"{', '.join(sorted(SUFFIXES))}"
            )
        for name, value in (
            ("names", names),
            ("paths", [p for p, _ in found]),
            ("labels", [n for _, n in found]),
        ):
            object.__setattr__(self, name, tuple(value))

    def open(self, index: int) -> Image.Image:
        """Open one file."""
        return Image.open(self.paths[index], formats=FORMATS)

    def name(self, index: int) -> str:
        """Return the path of one file."""
        return str(self.paths[index])


@dataclass(frozen=True)
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
        RunError: if the folder holds no such data set, a column is missing, or it has another
            number of classes.
    """

    path: Path
    size: int = 256
    classes: int | None = None
    image: str = "image"
    label: str = "label"
    labels: tuple[int, ...] = field(init=False, repr=False)
    names: tuple[str, ...] = field(init=False, repr=False)
    broken: dict[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)
    rows: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from datasets import Image as ImageColumn

        rows = _dataset(Path(self.path))
        missing = [
            column for column in (self.image, self.label) if column not in rows.column_names
        ]
        if missing:
            raise RunError(
                f"{self.path} has no column {missing[0]!r}; it has {', '.join(rows.column_names)}"
            )
        labels = tuple(int(label) for label in rows[self.label])
        kind = rows.features[self.label]
        names = tuple(getattr(kind, "names", None) or map(str, range(max(labels) + 1)))
        if self.classes is not None and len(names) != self.classes:
            raise RunError(
                f"{self.path} holds {len(names)} classes, {self.classes} are expected; the first "
                f"are {names[:3]}"
            )
        undecoded = rows.cast_column(self.image, ImageColumn(decode=False))
        for name, value in (("labels", labels), ("names", names), ("rows", undecoded)):
            object.__setattr__(self, name, value)

    def open(self, index: int) -> Image.Image:
        """Open one picture from its bytes, or from the file that it names."""
        found = self.rows[index][self.image]
        return Image.open(
            io.BytesIO(found["bytes"]) if found["bytes"] else found["path"], formats=FORMATS
        )

    def name(self, index: int) -> str:
        """Return the number of a row."""
        return f"{self.path}, row {index}"


def _dataset(path: Path) -> Any:
    import datasets

    files: Any = sorted(str(file) for file in path.rglob("*.parquet"))
    try:
        if files:
            return datasets.Dataset.from_parquet(files)
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise RunError(
            f"{path} holds no parquet files and no data set that was saved to disk: {error}"
        ) from error
    return found["train"] if isinstance(found, datasets.DatasetDict) else found


@dataclass(frozen=True)
class FolderBatches(Batches):
    """Batches of images and labels, shuffled anew in every pass; the flip of an image follows from
    the seed, pass and index.

    Args:
        images: where they come from.
        flip: mirror every other image, at random.
        workers: threads that read files.
    """

    images: Images
    flip: bool = True
    workers: int = 4

    def __call__(self, first: int, last: int, seed: int) -> tuple[Tensor, ...]:
        """Return images ``(last - first, 3, H, W)`` and labels of rows ``first`` to ``last`` of
        the endless stream.
        """
        rows = len(self.images)
        places = [divmod(place, rows) for place in range(first, last)]
        chosen = [(number, self.images.order(seed, number)[index]) for number, index in places]
        loaded = list(_readers(self.workers).map(lambda pair: self._one(seed, *pair), chosen))
        pictures, labels = zip(*loaded, strict=True)
        return torch.stack(pictures), torch.tensor(labels)

    def _one(self, seed: int, number: int, index: int) -> tuple[Tensor, int]:
        picture, label = self.images[index]
        mirrored = self.flip and seed_of(seed, number, index, 2) >> 31 & 1
        return (picture.flip(-1) if mirrored else picture), label


@functools.lru_cache(maxsize=4)
def order_of(seed: int, number: int, rows: int) -> Sequence[int]:
    """Return the order of a pass; two passes meet in a batch."""
    return torch.randperm(
        rows, generator=torch.Generator().manual_seed(seed_of(seed, number, 1))
    ).tolist()


@functools.lru_cache(maxsize=1)
def _readers(workers: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(workers, "readers")
