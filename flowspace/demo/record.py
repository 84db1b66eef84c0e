"""One run as one object: what its page shows, and what its files say.

All pictures are uint8 with one channel (grey) or three (RGB): ``C`` in the shapes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["KEPT", "Look", "RunRecord", "nearest", "to_bytes"]

KEPT = 50
"""Samples of a class that a run keeps as files."""


@dataclass(frozen=True)
class Look:
    """One-step samples of the averaged network during training; every look has the same noise.

    Attributes:
        step: how many steps were done; 0 is before the first.
        pictures: uint8 ``(classes, K, C, H, W)``.
    """

    step: int
    pictures: Tensor


@dataclass(frozen=True)
class RunRecord:
    """What a run made and measured, of its first seed where it has several.

    Attributes:
        dataset: the name of the set (``digits``), or the folder of the pictures as it was given.
        folder: where the run is kept: ``samples/CLASS/0.png`` and the other files.
        class_names: in the order of the labels, at least one; a flat folder has one class, whose
            name is that of the folder.
        conditional: whether the network is told the class; False for a flat folder.
        samples: one-step samples of the main method, uint8 ``(classes, 50, C, H, W)``, not
            selected: ``samples[k, i]`` is the file ``samples/CLASS/i.png`` of class k.
        nearest: the training picture that is nearest to each sample, of the same shape. Nearest
            of all training pictures, whatever their class, by the root mean square over pixels.
        nearest_distance: that distance, ``(classes, 50)``; 2 lies between black and white.
        real: held-out pictures, uint8 ``(M, C, H, W)``, which no network was trained on.
        real_labels: the class of each, ``(M,)``.
        real_distance: the distance from each held-out picture to its nearest training picture,
            ``(M,)``: what `nearest_distance` is compared with to see whether samples are copies.
        along: samples during training, in the order of their steps; may be empty.
        others: samples of the baselines by name, uint8 ``(classes, K, C, H, W)``; empty without
            ``--baselines``.
        curves: by the name of a training (``crossflow``, ``autoencoder``, ``judge-1``), the
            records of its log: each has ``step``, ``loss``, ``gradient_norm`` and ``rate``.
        metrics: what ``metrics.json`` holds. ``metrics["methods"]["crossflow"]`` has
            ``accuracy``, ``diversity``, ``frechet``, ``milliseconds`` and ``by_seed``;
            ``metrics["methods"]["real"]`` the same of real pictures. ``accuracy`` is None where
            there is one class.
        settings: what the run was trained with: nested, of numbers and text alone.
        seconds: how long each part took in this call, by name, and ``whole``. Parts that an
            earlier call had done are near zero.
        doubts: sentences that say which figures cannot be trusted and why; often empty.
        skipped: files that could not be read, by name, and why; often empty.
        counts: how many pictures: ``training``, ``held out``, ``skipped``.
    """

    dataset: str
    folder: Path
    class_names: tuple[str, ...]
    conditional: bool
    samples: Tensor
    nearest: Tensor
    nearest_distance: Tensor
    real: Tensor
    real_labels: Tensor
    real_distance: Tensor
    metrics: Mapping[str, Any]
    settings: Mapping[str, Any]
    along: Sequence[Look] = ()
    others: Mapping[str, Tensor] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    doubts: Sequence[str] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    def held_out(self, label: int) -> Tensor:
        """Return the held-out pictures of one class, uint8 ``(M, C, H, W)``."""
        return self.real[self.real_labels == label]


def to_bytes(images: Tensor) -> Tensor:
    """Return pictures in [-1, 1] as uint8, rounded; what leaves the range is cut."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def nearest(pictures: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place of the nearest training picture to each picture, and the distance, both
    ``(N,)``.

    Args:
        pictures: ``(N, C, H, W)``, uint8 or in [-1, 1].
        training: of the same kind, ``(M, C, H, W)``.

    The distance is the root mean square over pixels, where black is -1 and white 1.
    """
    rows = _flat(pictures)
    best = torch.full((len(rows),), torch.inf)
    place = torch.zeros(len(rows), dtype=torch.long)
    for start in range(0, len(training), 4096):
        found = _flat(training[start : start + 4096])
        distances = torch.cdist(rows, found)
        smallest, where = distances.min(1)
        better = smallest < best
        best = torch.where(better, smallest, best)
        place = torch.where(better, where + start, place)
    return place, best / rows.shape[1] ** 0.5


def _flat(pictures: Tensor) -> Tensor:
    """Return float rows in [-1, 1]."""
    if pictures.dtype == torch.uint8:
        pictures = pictures.float() / 127.5 - 1
    return pictures.flatten(1)
