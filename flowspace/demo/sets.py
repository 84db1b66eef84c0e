"""What ``--data`` names: a set that a package ships, or a folder of pictures.

Each becomes settings and data, of which a part is held out to judge by.
"""

import gzip
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flowspace.demo.data import SETTINGS, Data, PictureSettings, Settings, load
from flowspace.demo.loop import TrainSettings
from flowspace.demo.pictures import FoundPictures, read_folder
from flowspace.demo.request import check_data
from flowspace.demo.shapes import drawn_shapes
from flowspace.errors import InputError

__all__ = ["CLOTHES", "FASHION_MNIST", "SHIPPED", "chosen", "fashion_mnist", "split"]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` leaves its files."""

CLOTHES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""The classes of Fashion-MNIST (Xiao et al., arXiv 1708.07747), in their order."""

IMAGES_HEADER, LABELS_HEADER = 16, 8
"""Bytes before the values of an idx file: its magic number and its sizes, four bytes each."""

MOST_HELD_OUT = 5000
"""Pictures that are held out at most, over all classes."""

FEWEST_TO_HALVE = 200
"""Training pictures of a class: of fewer, judges and perceptual network both need all."""

FEW = 1000
"""Training pictures for which the recipe's steps are meant; of more, the steps grow as the root of
their number.
"""

HELD_OUT = 4
"""One picture in so many is held out."""


def chosen(name: str, side: int | None = None, steps: int | None = None) -> tuple[Settings, Data]:
    """Return the settings and the data of a name or a folder.

    Args:
        name: one of `flowspace.demo.request.NAMES`, or a folder of pictures.
        side: pixels a side; None chooses. Digits, MNIST and Fashion-MNIST have their own.
        steps: of the generator; None is the recipe's own number.

    Raises:
        InputError: if it is none of these, its package is not installed, or the folder does not
            hold what a run needs.
    """
    check_data(name, side)
    if name in SETTINGS:
        settings, data = SETTINGS[name], load(name)
    elif name in SHIPPED:
        settings, data = pictures(name, SHIPPED[name](side))
    else:
        settings, data = pictures(name, read_folder(Path(name), side))
    if steps is not None:
        settings = replace(settings, generator=replace(settings.generator, steps=steps))
    return settings, data


def pictures(name: str, found: FoundPictures) -> tuple[PictureSettings, Data]:
    """Return the settings and the data of pictures that were read."""
    data = split(found)
    settings = PictureSettings(dataset=name, pictures=digest(data))
    more = max(1.0, len(data.images) / FEW) ** 0.5
    settings = replace(
        settings,
        generator=longer(settings.generator, more),
        classifier=longer(settings.classifier, more**0.5),
    )
    return settings, data


def longer(plan: TrainSettings, times: float) -> TrainSettings:
    """Return a plan of so many times as many steps, to the next hundred."""
    return replace(plan, steps=100 * round(plan.steps * times / 100))


def split(found: FoundPictures) -> Data:
    """Hold out a quarter of each class, at random but always alike; the rest is for training.

    Of large classes less is held out: `MOST_HELD_OUT` over their number.

    Training pictures come class by class, so that every other one is half of each class.
    """
    generator = torch.Generator().manual_seed(0)
    most = max(2, MOST_HELD_OUT // len(found.class_names))
    training, held_out = [], []
    for label in range(len(found.class_names)):
        places = (found.labels == label).nonzero().flatten()
        places = places[torch.randperm(len(places), generator=generator)]
        cut = min(len(places) // HELD_OUT, most)
        held_out.append(places[:cut])
        training.append(places[cut:])
    kept, tested = torch.cat(training), torch.cat(held_out)
    return Data(
        found.pixels[kept],
        found.labels[kept],
        found.pixels[tested],
        found.labels[tested],
        found.class_names,
        found.conditional,
        shared=min(len(places) for places in training) < FEWEST_TO_HALVE,
        skipped=found.skipped,
    )


def digest(data: Data) -> str:
    """Return a digest of the training pictures and their classes."""
    found = hashlib.sha256(str(tuple(data.images.shape)).encode())
    found.update(data.images.numpy().tobytes())
    found.update(data.labels.numpy().tobytes())
    return found.hexdigest()[:16]


# --- sets that packages ship
# -------------------------------------------------------------------------------------------------


def fashion_mnist(part: str = "train", folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Return the pixels, uint8 ``(N, 28, 28)``, and the labels of Debian's package.

    Args:
        part: ``train``, 60,000 pictures, or ``t10k``, 10,000 others.
        folder: of the files; None is where the package leaves them.

    Raises:
        InputError: if it is not installed, or its files are broken.
    """
    folder = folder or FASHION_MNIST
    try:
        pixels = _values(folder / f"{part}-images-idx3-ubyte.gz", IMAGES_HEADER)
        labels = _values(folder / f"{part}-labels-idx1-ubyte.gz", LABELS_HEADER)
        return pixels.reshape(-1, 28, 28), labels.long()
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        raise InputError(
            f"Fashion-MNIST cannot be read ({error}); it comes from Debian's package "
            "dataset-fashion-mnist: write apt-get install dataset-fashion-mnist"
        ) from error


def _values(path: Path, header: int) -> Tensor:
    """Return the bytes of a gzipped idx file behind its header, uint8 ``(N,)``."""
    content = gzip.decompress(path.read_bytes())[header:]
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _clothes(_: int | None) -> FoundPictures:
    """Return the training pictures of Fashion-MNIST, which have a side of their own."""
    pixels, labels = fashion_mnist()
    return FoundPictures(pixels[:, None], labels, CLOTHES, True, {}, {})


def _openmoji(side: int | None) -> FoundPictures:
    """Return the drawings of OpenMoji, drawn from the package's font."""
    from flowspace.demo.emoji import drawings

    return drawings(side or 32)


def _shapes(side: int | None) -> FoundPictures:
    """Return shapes that a program draws."""
    return drawn_shapes(side or 32)


SHIPPED: Mapping[str, Callable[[int | None], FoundPictures]] = {
    "fashion-mnist": _clothes,
    "openmoji": _openmoji,
    "shapes": _shapes,
}
"""What makes the pictures of a set, given their side; None is its own choice."""
