"""Pictures in tar files, as webdataset stores them: read in place, shard after shard, by any
number of machines.

A sample is the files of one key: a picture (``KEY.jpg``) and its class, an integer (``KEY.cls``,
or ``label`` of ``KEY.json``). Further pictures of a sample carry a name of their own
(``KEY.seg.png``) and are not read. A tar file is not compressed, so a picture is read where it
lies, and any row of the stream can be asked for: a run continues bit for bit, and every process
reads its own rows. In a pass shards come in random order, and pictures are shuffled within a
window of a few, so that a disk or a network reads each shard once.
"""

import functools
import hashlib
import io
import json
import os
import tarfile
import uuid
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
from flowspace.vision.data import (
    BROKEN,
    FORMATS,
    MOST_BYTES,
    MOST_CLASSES,
    MOST_SHOWN,
    SUFFIXES,
    Images,
    class_of,
)

__all__ = ["ShardImages"]

INDEX = "flowspace-index.safetensors"
"""Where each picture lies, kept beside the shards: reading the headers of a million pictures takes
a minute.
"""

LABELS = frozenset({".cls", ".json"})

MOST_LABEL_BYTES = 2**24
"""Of one file that holds a class: a sparse one may claim gigabytes."""


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
        RunError: if there are no shards, a shard is torn, a picture has no class or a sample two
            pictures, a name occurs twice, or a class is not below ``classes``.
        InputError: if size or window is not positive.
    """

    def __init__(
        self, root: Path, size: int = 256, classes: int | None = None, window: int = 16
    ) -> None:
        if window < 1:
            raise InputError(f"got window = {window}; it counts shards: write 1 or more")
        if classes is not None and not 1 <= classes <= MOST_CLASSES:
            raise InputError(f"got classes = {classes}; write 1 to {MOST_CLASSES}")
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
        if not length:
            raise OSError(f"it is no plain file of at most {MOST_BYTES} bytes")
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
        parts = []
        for shard in shards[first : first + window]:
            parts.append(torch.arange(starts[shard], starts[shard + 1]))
        rows = torch.cat(parts)
        order = torch.randperm(len(rows), generator=draw)
        found += rows[order].tolist()
    return found


def _index(root: Path, paths: Sequence[Path]) -> Tensor:
    """Return shard, offset, length and label of every picture, ``(N, 4)``; kept in a file where
    the folder can be written.
    """
    names = []
    for path in paths:
        if not path.is_file():
            raise RunError(f"{path} is no regular file; take it away")
        status = path.stat()
        names.append((path.name, status.st_size, status.st_mtime_ns))
    shards = json.dumps(names)
    kept = _kept(root / INDEX, shards)
    if kept is not None:
        return kept
    rows = []
    for number, path in enumerate(paths):
        for row in _Shard(path).rows():
            rows.append((number, *row))
    if not rows:
        raise RunError(
            f"{root} holds shards without pictures; known are {', '.join(sorted(SUFFIXES))}"
        )
    places = torch.tensor(rows)
    metadata = {"shards": shards, "digest": _digest(places)}
    partial = root / f"{INDEX}.{uuid.uuid4().hex}.partial"
    try:
        save_file({"places": places}, partial, metadata)
        os.replace(partial, root / INDEX)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        warnings.warn(
            f"{root / INDEX} cannot be kept ({error}); the shards are read again each time",
            stacklevel=2,
        )
    return places


def _kept(path: Path, shards: str) -> Tensor | None:
    """Return the index that is kept of these shards, if there is one and it is whole."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            places = file.get_tensor("places").clone()  # away from the file, which may change
    except (SafetensorError, OSError):
        return None
    if metadata.get("shards") != shards or metadata.get("digest") != _digest(places):
        return None
    return places


def _digest(places: Tensor) -> str:
    return hashlib.sha256(places.numpy().tobytes()).hexdigest()


class _Shard:
    """The samples of one tar file.

    Attributes:
        pictures: the offset and length of each, by its name without the suffix; a length of zero
            where the picture is no plain file, or too long.
        labels: the class of each sample, by its key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pictures: dict[str, tuple[int, int]] = {}
        self.labels: dict[str, int] = {}
        self._names: set[str] = set()
        self._refused: dict[str, str] = {}
        self._end = 0
        try:
            with tarfile.open(path, "r:") as tar:
                self._read(tar)
        except RunError:
            raise
        except (tarfile.TarError, *BROKEN, RecursionError, MemoryError) as error:
            raise RunError(
                f"{path} is no whole shard ({error}); fetch it again, or take it away"
            ) from error
        if self._end > path.stat().st_size:
            raise RunError(
                f"{path} is cut off: its last picture ends at byte {self._end}; fetch it again, "
                "or take it away"
            )

    def _read(self, tar: tarfile.TarFile) -> None:
        before = -1
        for member in tar:
            if member.offset <= before:  # a forged header may lead back, for ever
                raise ValueError(f"{member.name} begins before the file that precedes it")
            before = member.offset
            stem, suffix = os.path.splitext(member.name)
            suffix = suffix.lower()
            if member.isdir() or suffix not in SUFFIXES | LABELS:
                continue
            if member.name in self._names:
                raise RunError(
                    f"{self.path} holds {member.name} twice; nothing says which is meant"
                )
            self._names.add(member.name)
            if suffix in LABELS:
                self._add_label(stem, member, tar)
            else:
                self._add_picture(stem, member)

    def _add_picture(self, stem: str, member: tarfile.TarInfo) -> None:
        if stem in self.pictures:
            raise RunError(
                f"{self.path} holds two pictures of {stem}; name those that are not meant "
                "KEY.NAME.png, such as KEY.seg.png"
            )
        start, length = member.offset_data, 0
        if _plain(member) and member.size <= MOST_BYTES:
            length = member.size
            self._end = max(self._end, start + length)
        self.pictures[stem] = (start, length)

    def _add_label(self, stem: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        file = None
        if _plain(member) and member.size <= MOST_LABEL_BYTES:
            file = tar.extractfile(member)
        if file is None:
            raise RunError(
                f"{self.path}: {member.name} is no plain file of at most {MOST_LABEL_BYTES} bytes"
            )
        content = file.read()
        if member.name.lower().endswith(".json"):
            content = _label_of(content)
        if content is None:
            return
        label = class_of(content)
        if label is None:
            self._refused[stem] = f"{member.name} holds the class {str(content)[:MOST_SHOWN]}"
            return
        if self.labels.setdefault(stem, label) != label:
            raise RunError(
                f"{self.path}: {stem} is of class {self.labels[stem]} and, by {member.name}, of "
                f"class {label}"
            )

    def rows(self) -> list[tuple[int, int, int]]:
        """Return the offset, length and label of each sample's picture."""
        rows, missing = [], []
        for stem, place in self.pictures.items():
            if stem in self.labels:
                rows.append((*place, self.labels[stem]))
            elif not self._is_further(stem):
                missing.append(stem)
        if missing:
            first = min(missing)
            reason = self._refused.get(first, f"{first} has no class")
            raise RunError(
                f"{self.path}: {reason} ({len(missing)} in all); write an integer from 0 to "
                f"{MOST_CLASSES - 1} as KEY.cls, or as label in KEY.json"
            )
        return rows

    def _is_further(self, stem: str) -> bool:
        """Whether a picture is a further one of a sample that has one under its key alone."""
        while "." in os.path.basename(stem):
            stem = os.path.splitext(stem)[0]
            if stem in self.pictures and stem in self.labels:
                return True
        return False


def _plain(member: tarfile.TarInfo) -> bool:
    """Whether a member lies in the tar file as it is; links, devices and sparse files do not."""
    return member.isfile() and not member.issparse()


def _label_of(content: bytes) -> Any:
    """Return the label that a JSON file names, or None; what is no JSON as it is."""
    try:
        found: Any = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if isinstance(found, dict):
        return found.get("label")
    return None
