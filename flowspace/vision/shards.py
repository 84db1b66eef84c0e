"""Pictures in tar files, as webdataset stores them: read in place, shard after shard, by any
number of machines.

A sample is the files of one key: a picture (``KEY.jpg``) and its class, an integer (``KEY.cls``,
or ``label`` of ``KEY.json``). A tar file is not compressed, so a picture is read where it lies,
and any row of the stream can be asked for: a run continues bit for bit, and every process reads
its own rows. In a pass shards come in random order, and pictures are shuffled within a window of a
few, so that a disk or a network reads each shard once.
"""

import functools
import io
import json
import os
import tarfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowspace.errors import InputError, RunError
from flowspace.training.draws import seed_of
from flowspace.vision.data import FORMATS, SUFFIXES, Images

__all__ = ["ShardImages"]

INDEX = "flowspace-index.safetensors"
"""Where each picture lies, kept beside the shards: reading the headers of a million pictures takes
a minute.
"""


class ShardImages(Images):
    """Images in the tar files of a folder.

    Args:
        root: holds ``*.tar``; they are taken in the order of their names.
        size: pixels a side.
        classes: how many are expected; None takes as many as the largest label asks for.
        window: shards among which pictures are shuffled.

    Attributes:
        labels: the class of each picture.
        names: of the classes: their numbers.
        paths: of the shards.
        places: shard, offset, length and label of each picture, ``(N, 4)``.
        counts: pictures of each shard.

    Raises:
        RunError: if there are no shards, a shard is torn, a picture has no class, or a class is
            not below ``classes``.
        InputError: if size or window is not positive.
    """

    def __init__(
        self, root: Path, size: int = 256, classes: int | None = None, window: int = 16
    ) -> None:
        if window < 1:
            raise InputError(f"got window = {window}; it counts shards: write 1 or more")
        self.root = Path(root)
        self.window = window
        self.paths = tuple(sorted(self.root.glob("*.tar")))
        if not self.paths:
            raise RunError(
                f"{root} holds no shards; give the folder that holds webdataset's *.tar"
            )
        self.places = _index(self.root, self.paths)
        labels = self.places[:, 3].tolist()
        count = classes or max(labels) + 1
        if not 0 <= min(labels) <= max(labels) < count:
            raise RunError(
                f"{root} holds classes {min(labels)} to {max(labels)}, 0 to {count - 1} are "
                "expected"
            )
        shards = self.places[:, 0]
        self.counts = tuple(torch.bincount(shards, minlength=len(self.paths)).tolist())
        super().__init__(size, labels, [str(number) for number in range(count)])

    def open(self, index: int) -> Image.Image:
        """Read one picture from its place."""
        shard, offset, length, _ = self.places[index].tolist()
        with self.paths[shard].open("rb") as file:
            file.seek(offset)
            return Image.open(io.BytesIO(file.read(length)), formats=FORMATS)

    def name(self, index: int) -> str:
        """Return the shard and the byte at which a picture begins."""
        shard, offset, _, _ = self.places[index].tolist()
        return f"{self.paths[shard]}, byte {offset}"

    def order(self, seed: int, number: int) -> Sequence[int]:
        """Return the order of a pass: shards at random, pictures at random within a window of
        them.
        """
        return _order(seed, number, self.counts, self.window)


@functools.lru_cache(maxsize=4)
def _order(seed: int, number: int, counts: tuple[int, ...], window: int) -> Sequence[int]:
    draw = torch.Generator().manual_seed(seed_of(seed, number, 1))
    starts = torch.tensor((0, *counts)).cumsum(0).tolist()
    shards = torch.randperm(len(counts), generator=draw).tolist()
    found: list[int] = []
    for first in range(0, len(shards), window):
        rows = torch.cat(
            [torch.arange(starts[k], starts[k + 1]) for k in shards[first : first + window]]
        )
        found += rows[torch.randperm(len(rows), generator=draw)].tolist()
    return found


def _index(root: Path, paths: Sequence[Path]) -> Tensor:
    """Return shard, offset, length and label of every picture, ``(N, 4)``; kept in a file where
    the folder can be written.
    """
    shards = json.dumps(
        [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    )
    try:
        with safe_open(root / INDEX, "pt") as file:
            if (file.metadata() or {}).get("shards") == shards:
                return file.get_tensor("places")
    except (SafetensorError, OSError):
        pass  # there is none yet, or not a whole one
    rows = [(number, *row) for number, path in enumerate(paths) for row in _pictures(path)]
    if not rows:
        raise RunError(
            f"{root} holds shards without pictures; known are {', '.join(sorted(SUFFIXES))}"
        )
    places = torch.tensor(rows)
    partial = root / f"{INDEX}.{os.getpid()}.partial"
    try:
        save_file({"places": places}, partial, {"shards": shards})
        os.replace(partial, root / INDEX)
    except (SafetensorError, OSError) as error:
        warnings.warn(
            f"{root / INDEX} cannot be kept ({error}); the shards are read again each time",
            stacklevel=2,
        )
    return places


def _pictures(path: Path) -> list[tuple[int, int, int]]:
    """Return the offset, length and label of each picture of a shard."""
    pictures: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, suffix = os.path.splitext(member.name)
                if suffix.lower() in SUFFIXES:
                    pictures[key] = (member.offset_data, member.size)
                elif suffix in (".cls", ".json"):
                    label = _label(tar.extractfile(member).read(), suffix)  # type: ignore[union-attr]
                    labels |= {} if label is None else {key: label}
    except (tarfile.TarError, OSError, ValueError) as error:
        raise RunError(
            f"{path} is no whole shard ({error}); fetch it again, or take it away"
        ) from error
    end = max((offset + length for offset, length in pictures.values()), default=0)
    if end > path.stat().st_size:
        raise RunError(
            f"{path} is cut off: its last picture ends at byte {end}; fetch it again, or take it "
            "away"
        )
    missing = sorted(pictures.keys() - labels.keys())
    if missing:
        raise RunError(
            f"{path}: {missing[0]} has no class ({len(missing)} in all); write KEY.cls, or label "
            "in KEY.json"
        )
    return [(*place, labels[key]) for key, place in pictures.items()]


def _label(content: bytes, suffix: str) -> int | None:
    if suffix == ".cls":
        return int(content)
    found: Any = json.loads(content)
    return found.get("label") if isinstance(found, dict) else None
