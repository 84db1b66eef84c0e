"""What a run leaves in its folder: samples as files, figures, the page, and its record."""

import io
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from flowspace.demo.data import Data, Settings
from flowspace.demo.page import grid, png, write_beside
from flowspace.demo.record import Look, RunRecord, nearest, to_bytes
from flowspace.demo.report import report

if TYPE_CHECKING:
    from flowspace.demo.digits import Made

__all__ = ["Clock", "doubts", "keep_look", "leave", "looks", "record_of"]

MAIN = "crossflow"

SHOWN = 8
"""Pictures of a class in ``samples.png``."""

MOST_ROWS = 12
"""Classes in it."""

ENLARGED = 2
"""Pixels a side of one pixel in it."""

DIGITS_SIDE = 8
"""Pixels a side of scikit-learn's digits, too small to be shown but in a figure."""

ALONG = "along"
"""The folder, in that of a method, of the samples during training."""

FEWEST_TESTED_OF_A_CLASS = 20

FEWEST_FOR_FRECHET = 128
"""Twice the features of a judge: of fewer images a covariance of them means little."""

FEWEST_FOR_JUDGES = 30
"""Pictures of a class that a judge is trained on."""

ABLE = 0.9
"""The accuracy of the judges on real images below which theirs on samples says little."""


class Clock:
    """How long each part of a run took.

    Attributes:
        seconds: by the name of the part; parts of one name are added up.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def passed(self, name: str) -> None:
        """Say what the time since the last call was for."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


# --- samples during training
# -------------------------------------------------------------------------------------------------


def keep_look(folder: Path, step: int, images: Tensor) -> None:
    """Keep samples of a step ``(classes, K, C, H, W)`` in the folder of their method."""
    content = save({"pictures": to_bytes(images).contiguous()})
    write_beside(folder / ALONG / f"{step:08d}.safetensors", content)


def looks(folder: Path) -> list[Look]:
    """Return the samples during training that a method's folder holds, by step; torn files are
    passed over.
    """
    found = []
    for path in sorted((folder / ALONG).glob("*.safetensors")):
        try:
            found.append(Look(int(path.stem), load(path.read_bytes())["pictures"]))
        except (SafetensorError, KeyError, ValueError):
            continue
    return found


# --- the whole of it
# -------------------------------------------------------------------------------------------------


def leave(
    folder: Path, settings: Settings, data: Data, scores: Mapping[str, Any], made: "Made"
) -> dict[str, Any]:
    """Write what a run leaves to look at, and return what ``metrics.json`` holds.

    Args:
        folder: of the run.
        settings: it was started with.
        data: what it was given.
        scores: by method, means over seeds, and each seed's.
        made: what the first seed made.
    """
    metrics = {
        "dataset": settings.dataset,
        "seeds": len(next(iter(scores.values()))["by_seed"]),
        "class_names": list(data.class_names),
        "counts": counts(data),
        "doubts": doubts(data, scores),
        "skipped": dict(data.skipped),
        "seconds": made.seconds,
        "settings": plain(settings),
        "methods": dict(scores),
    }
    record = record_of(folder, settings, data, metrics, made)
    shown = {name: images[:, :SHOWN] for name, images in made.samples.items()}
    write_samples(folder / "samples", data.class_names, record.samples)
    write_beside(folder / "samples.png", overview(shown, data))
    write_beside(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_beside(folder / "report.html", report(record))
    return metrics


def overview(shown: Mapping[str, Tensor], data: Data) -> bytes:
    """Return a PNG of real pictures, then of samples of each method, one row a class.

    Args:
        shown: by method, ``(classes, K, C, H, W)`` in [-1, 1], or uint8.
        data: of the run.
    """
    if data.side == DIGITS_SIDE:
        return png(grid(shown, data.classes))
    blocks = []
    for images in shown.values():
        pictures = images[:MOST_ROWS]
        if pictures.dtype != torch.uint8:
            pictures = to_bytes(pictures)
        framed = torch.nn.functional.pad(pictures, (1, 1, 1, 1), value=255)
        rows = [torch.cat([*row], 2) for row in framed]
        blocks.append(torch.nn.functional.pad(torch.cat(rows, 1), (4, 4, 4, 4), value=255))
    whole = torch.cat(blocks, 2)
    return as_png(whole.repeat_interleave(ENLARGED, 1).repeat_interleave(ENLARGED, 2))


def plain(settings: Settings) -> dict[str, Any]:
    """Return settings as numbers and text."""
    return asdict(settings) | {"penalty": repr(settings.penalty)}


def counts(data: Data) -> dict[str, int]:
    """Return how many pictures there were."""
    return {
        "training": len(data.images),
        "held out": len(data.test_images),
        "skipped": len(data.skipped),
    }


def record_of(
    folder: Path, settings: Settings, data: Data, metrics: Mapping[str, Any], made: "Made"
) -> RunRecord:
    """Return the record of a run."""
    samples = to_bytes(made.samples[MAIN])
    training, held_out = stored(data.images), stored(data.test_images)
    place, distance = nearest(samples.flatten(0, 1), training)
    others = {}
    for name, images in made.samples.items():
        if name not in ("real", MAIN):
            others[name] = to_bytes(images)
    return RunRecord(
        dataset=settings.dataset,
        folder=folder,
        class_names=data.class_names,
        conditional=data.conditional,
        samples=samples,
        nearest=training[place].unflatten(0, samples.shape[:2]),
        nearest_distance=distance.unflatten(0, samples.shape[:2]),
        real=held_out,
        real_labels=data.test_labels,
        real_distance=nearest(held_out, training)[1],
        metrics=metrics,
        settings=metrics["settings"],
        along=looks(made.folder / MAIN),
        others=others,
        curves=curves(made.folder),
        seconds=made.seconds,
        doubts=metrics["doubts"],
        skipped=data.skipped,
        counts=metrics["counts"],
    )


def stored(images: Tensor) -> Tensor:
    """Return uint8 images."""
    if images.dtype == torch.uint8:
        return images
    return to_bytes(images)


def curves(folder: Path) -> dict[str, list[Mapping[str, Any]]]:
    """Return the log of each training in the folder of a seed, by its name, one record a step: the
    later where a run that continued took a step again.
    """
    found = {}
    for path in sorted(folder.glob("*/log.jsonl")):
        records: dict[int, Mapping[str, Any]] = {}
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
                records[record["step"]] = record
            except (ValueError, KeyError):
                continue  # the line that was being written when the run was killed
        found[path.parent.name] = [records[step] for step in sorted(records)]
    return found


def write_samples(folder: Path, names: Sequence[str], samples: Tensor) -> None:
    """Write samples ``(classes, K, C, H, W)`` as ``CLASS/0.png`` and on; those of classes that are
    no more are removed.
    """
    for other in set(_children(folder)) - set(names):
        shutil.rmtree(folder / other)
    for name, pictures in zip(names, samples, strict=True):
        for number, picture in enumerate(pictures):
            write_beside(folder / name / f"{number}.png", as_png(picture))


def _children(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, which need not exist."""
    if not folder.exists():
        return []
    return [entry.name for entry in folder.iterdir() if entry.is_dir()]


def as_png(picture: Tensor) -> bytes:
    """Return one uint8 picture ``(C, H, W)`` as PNG."""
    values = picture.permute(1, 2, 0).contiguous().numpy()
    if values.shape[-1] == 1:
        values = values[..., 0]
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "png")
    return buffer.getvalue()


# --- what cannot be trusted
# -------------------------------------------------------------------------------------------------


def copied(data: Data) -> int:
    """Return how many held-out pictures are also training pictures, of whatever class."""
    known = {hash(row.numpy().tobytes()) for row in data.images}
    return sum(hash(row.numpy().tobytes()) in known for row in data.test_images)


def doubts(data: Data, scores: Mapping[str, Any]) -> list[str]:
    """Return sentences that say which figures cannot be trusted, and why; often none."""
    found = []
    held_out = len(data.test_images)
    copies = copied(data)
    if copies:
        found.append(
            f"{copies} of {held_out} held-out pictures are also training pictures, pixel for "
            "pixel, and say nothing about new ones. Keep one of each."
        )
    if held_out < FEWEST_FOR_FRECHET:
        found.append(
            f"The Frechet distance cannot be trusted: it is of {held_out} held-out pictures, and "
            f"the judges have 64 features. {FEWEST_FOR_FRECHET} or more would do."
        )
    if not data.conditional:
        found.append(
            "There is no accuracy: the pictures have no classes. The judges were trained to tell "
            "quarter turns apart."
        )
        return found
    trained = int(torch.bincount(data.half(1)[1], minlength=data.classes).min())
    tested = int(torch.bincount(data.test_labels, minlength=data.classes).min())
    if trained < FEWEST_FOR_JUDGES:
        found.append(
            f"The accuracy is a rough one: for one class the judges saw {trained} pictures, and "
            f"{FEWEST_FOR_JUDGES} or more would do."
        )
    if data.shared:
        found.append(
            "The pictures are too few to halve them. The judges were trained on the same pictures "
            "as the generator, so a copy of one is right in their eyes. The row real has their "
            "accuracy on held-out pictures, but its Frechet distance is of pictures they know."
        )
    real = scores["real"]["accuracy"]
    if real < ABLE:
        found.append(
            f"The accuracy of samples says little: the judges themselves are right on {real:.2f} "
            "of the held-out real pictures."
        )
    if tested < FEWEST_TESTED_OF_A_CLASS:
        found.append(
            f"The diversity is a rough one: of one class {tested} pictures are held out, and "
            f"{FEWEST_TESTED_OF_A_CLASS} or more would do."
        )
    return found
