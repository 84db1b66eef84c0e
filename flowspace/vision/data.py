"""Pictures from a folder of classes: cropped, flipped, in [-1, 1], the same for a step whatever ran before it.

A file that cannot be read is replaced by the next one that can, counted and named; it never ends a run.
"""

import concurrent.futures
import functools
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flowspace.errors import InputError, RunError
from flowspace.training import Batches, seed_of

__all__ = ["FolderBatches", "FolderImages", "centre_crop"]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
MOST_NAMED = 5


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """Return the middle square of a picture, scaled to size: halved by boxes while it is twice as large, then bicubic.

    The preprocessing of ADM (Dhariwal & Nichol, arXiv 2105.05233), which DiT, MeanFlow and CrossFlow share.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


@dataclass(frozen=True)
class FolderImages:
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
        RunError: if the folder does not exist, has no images, or another number of classes than expected.
    """

    root: Path
    size: int = 256
    classes: int | None = None
    paths: tuple[Path, ...] = field(init=False, repr=False)
    labels: tuple[int, ...] = field(init=False, repr=False)
    names: tuple[str, ...] = field(init=False, repr=False)
    broken: dict[Path, str] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"size = {self.size} came; it counts pixels a side")
        root = Path(self.root)
        if not root.is_dir():
            raise RunError(f"{root} is no folder; give the folder that holds one folder of images a class")
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if self.classes is not None and len(names) != self.classes:
            raise RunError(f"{root} holds {len(names)} classes, {self.classes} are expected; the first are {names[:3]}")
        found = [(path, label) for label, name in enumerate(names) for path in sorted((root / name).rglob("*"))]
        found = [(path, label) for path, label in found if path.suffix.lower() in SUFFIXES]
        if not found:
            raise RunError(f"{root} holds no images in folders of classes; known are {', '.join(sorted(SUFFIXES))}")
        for name, value in (("names", names), ("paths", [p for p, _ in found]), ("labels", [n for _, n in found])):
            object.__setattr__(self, name, tuple(value))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image ``(3, size, size)`` in [-1, 1] and its class; for a broken file, those of the next whole one.

        Raises:
            RunError: if no file can be read.
        """
        for offset in range(len(self.paths)):
            at = (index + offset) % len(self.paths)
            path = self.paths[at]
            if path in self.broken:
                continue
            try:
                with Image.open(path) as picture:
                    square = centre_crop(picture.convert("RGB"), self.size)
            except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                self.broken[path] = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"{path} cannot be read and is skipped ({len(self.broken)} so far): {error}", stacklevel=2
                )
                continue
            pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).reshape(self.size, self.size, 3)
            return pixels.permute(2, 0, 1).float() / 127.5 - 1, self.labels[at]
        raise RunError(f"none of the {len(self.paths)} images in {self.root} can be read")

    def report(self) -> str:
        """Say how many images each class has, and what was broken."""
        counts = Counter(self.labels)
        sizes = [counts[label] for label in range(len(self.names))]
        text = f"{len(self.paths)} images in {len(self.names)} classes, {min(sizes)} to {max(sizes)} a class"
        empty = [name for name, size in zip(self.names, sizes, strict=True) if not size]
        if empty:
            text += f"; empty: {', '.join(empty[:MOST_NAMED])}"
        if self.broken:
            named = ", ".join(str(path) for path in list(self.broken)[:MOST_NAMED])
            text += f"; {len(self.broken)} could not be read: {named}"
        return text


@dataclass(frozen=True)
class FolderBatches(Batches):
    """Batches of images and labels, shuffled anew in every pass; the flip of an image follows from the seed, pass and index.

    Args:
        images: where they come from.
        flip: mirror every other image, at random.
        workers: threads that read files.
    """

    images: FolderImages
    flip: bool = True
    workers: int = 4

    def __call__(self, first: int, last: int, seed: int) -> tuple[Tensor, ...]:
        """Return images ``(last - first, 3, H, W)`` and labels of rows ``first`` to ``last`` of the endless stream."""
        rows = len(self.images)
        places = [divmod(place, rows) for place in range(first, last)]
        chosen = [(number, order_of(seed, number, rows)[index]) for number, index in places]
        loaded = list(_readers(self.workers).map(lambda pair: self._one(seed, *pair), chosen))
        pictures, labels = zip(*loaded, strict=True)
        return torch.stack(pictures), torch.tensor(labels)

    def _one(self, seed: int, number: int, index: int) -> tuple[Tensor, int]:
        picture, label = self.images[index]
        mirrored = self.flip and seed_of(seed, number, index, 2) >> 31 & 1
        return (picture.flip(-1) if mirrored else picture), label


@functools.lru_cache(maxsize=4)
def order_of(seed: int, number: int, rows: int) -> Sequence[int]:
    """Return the order of a pass; two passes meet in a batch, and the next is already asked for."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed_of(seed, number, 1))).tolist()


@functools.lru_cache(maxsize=1)
def _readers(workers: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(workers, "readers")
