"""What a run writes down: JSON lines always, and whatever trackers it is given."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["BINS", "Journal", "Tracker", "by_bins", "records"]

LOG = "log.jsonl"

BINS = 10
"""Times are reported in so many equal bins of [0, 1]."""


class Tracker(Protocol):
    """What shows numbers over steps, such as accelerate's ``TensorBoardTracker`` and
    ``WandBTracker``.
    """

    def log(self, values: dict[str, Any], step: int | None) -> None:
        """Take the numbers of a step."""


@dataclass(frozen=True)
class Journal:
    """The log of a run.

    Args:
        folder: where ``log.jsonl`` grows; None writes nothing.
        trackers: also told every number.
    """

    folder: Path | None
    trackers: Sequence[Tracker] = ()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; it names its step."""
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOG).open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # what a killed run was writing
                        file.write(b"\n")
                file.write(json.dumps(record).encode() + b"\n")
        numbers = dict(_flat(record))
        for tracker in self.trackers:
            tracker.log(numbers, step=record["step"])


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's log in the order they were written, without lines that a
    killed run left unfinished.

    A run that was continued wrote the steps after its checkpoint twice.
    """
    path, found = folder / LOG, []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _flat(record: Mapping[str, Any], before: str = "") -> list[tuple[str, float]]:
    """Return the numbers of nested records by path; lists are numbered."""
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        inner = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(inner, Mapping):
            found += _flat({str(k): v for k, v in inner.items()}, f"{before}{key}/")
        elif isinstance(inner, (int, float)):
            found.append((f"{before}{key}", inner))
    return found


def by_bins(values: Tensor, times: Tensor) -> list[float | None]:
    """Return the mean of the values ``(B,)`` in each of `BINS` equal bins of the times ``(B,)``;
    None where a bin is empty.
    """
    number = (times * BINS).long().clamp(max=BINS - 1)
    count = torch.bincount(number, minlength=BINS)
    total = torch.bincount(number, weights=values.double(), minlength=BINS)
    return [float(t / c) if c else None for t, c in zip(total, count, strict=True)]
