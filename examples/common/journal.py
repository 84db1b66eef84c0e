"""What a run writes down: JSON lines always, and whatever trackers accelerate has."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from profiling import name_of
from torch import Tensor
from tqdm import tqdm

LOG = "log.jsonl"

LOGGED_PACE = 30.0
"""Seconds between states of the progress bar where it goes to a file, as a cluster's log."""

BINS = 10
"""Times are reported in so many equal bins of [0, 1]."""


def append(folder: Path, record: Mapping[str, Any]) -> None:
    """Append a record to the log of a folder, after what a killed run was writing."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a log in the order they were written, without what is none.

    A killed run leaves an unfinished line; one that was continued wrote the steps after its
    checkpoint twice.
    """
    path = folder / LOG
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                found.append(record)
    return found


def latest(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a log by step, of each step the one that was written last."""
    by_step: dict[Any, dict[str, Any]] = {}
    for record in records(folder):
        by_step[record["step"], "watch" in record] = record
    return [by_step[key] for key in sorted(by_step)]


def flat(record: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """Return the numbers of nested records by path, as trackers take them; lists are numbered."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{key}/")
        elif isinstance(value, (int, float)):
            found[f"{before}{key}"] = value
    return found


def track(stage: Any, accelerator: Any, record: Mapping[str, Any], step: int) -> None:
    """Tell the trackers the numbers of a record, under the name of its stage.

    Their steps go on over the stages of a run: some trackers drop what is of an earlier step.
    """
    numbers = flat(record, f"{stage.name}/")
    accelerator.log(numbers, stage.offset + step)


def by_bins(values: Tensor, times: Tensor) -> list[float | None]:
    """Return the mean of the values ``(B,)`` in each of `BINS` equal bins of the times ``(B,)``.

    An empty bin has None.
    """
    number = (times * BINS).long().clamp(max=BINS - 1)
    count = torch.bincount(number, minlength=BINS).tolist()
    total = torch.bincount(number, weights=values.double(), minlength=BINS).tolist()
    means: list[float | None] = [None] * BINS
    for place, rows in enumerate(count):
        if rows:
            means[place] = total[place] / rows
    return means


def texts(settings: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Return nested settings by path as texts, as trackers take them."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= texts(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = str(value)
    return found


class Log:
    """The log of a training: its progress bar, its times, and a record of every few steps.

    Args:
        stage: that is trained.
        accelerator: of the processes; the first one writes.
        start: the first step.
        steps: the step after the last.
    """

    def __init__(self, stage: Any, accelerator: Any, start: int, steps: int) -> None:
        self.stage = stage
        self.accelerator = accelerator
        self.steps = steps
        pace = LOGGED_PACE
        if sys.stderr.isatty():
            pace = 0.5
        self.bar = tqdm(
            range(start, steps),
            stage.name,
            steps,
            initial=start,
            unit="step",
            mininterval=pace,
            maxinterval=20 * pace,
            disable=not accelerator.is_main_process,
        )
        self.since = start
        self.began = time.perf_counter()
        self.waited = 0.0
        self.measured: list[dict[str, dict[str, Tensor]]] = []
        self.answers: list[Tensor] = []

    def timed(self, loader: Iterable[Any]) -> Generator[Any, None, None]:
        """Yield what a loader does, and count the seconds that it was waited for."""
        batches = iter(loader)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield batch

    def measure(self, cost: Any) -> None:
        """Keep the terms of some rows, and the gradient of each at what was made."""
        measured = {
            "weighted": detached(cost.weighted()),
            "raw": detached(cost.terms),
            "times": detached(cost.times),
            "slopes": cost.gradients(),
        }
        self.measured.append(measured)

    def write(self, step: int, run: Any) -> None:
        """Write the record of a step; all processes must call."""
        record: dict[str, Any] = {
            "name": self.stage.name,
            "step": step,
            "loss": float(run.loss),
            "gradient_norm": float(run.norms[0]),
            "device": self.device(),
        }
        if len(run.norms) > 1:
            record["opponent_norm"] = float(run.norms[1])
        record["rate"] = run.optimizer.param_groups[0]["lr"]
        record["skipped"] = int(run.skipped)
        record |= self.details() | self.speed(step)
        self.measured = []
        self.answers = []
        if self.accelerator.is_main_process:
            append(self.stage.folder, record)
        track(self.stage, self.accelerator, record, step)
        self.bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)

    def device(self) -> str:
        """Return what trains: a card or a CPU, and how many processes."""
        name = name_of(self.accelerator.device)
        count = self.accelerator.num_processes
        if count == 1:
            return name
        return f"{count} processes, each on {name}"

    def details(self) -> dict[str, Any]:
        """Return the means of the terms and their gradients, also by bins of the times."""
        weighted = self.gathered("weighted")
        raw = self.gathered("raw")
        times = self.gathered("times")
        slopes = self.gathered("slopes")
        found: dict[str, Any] = {
            "weighted": means(weighted),
            "raw": means(raw),
            "slopes": means(slopes),
        }
        if self.answers:
            answers = torch.cat(self.answers).contiguous()
            answer = self.accelerator.gather(answers)
            found["raw"]["opponent"] = float(answer.mean())
        found["by"] = binned(raw, times)
        found["slopes_by"] = binned(slopes, times)
        return found

    def gathered(self, kind: str) -> dict[str, Tensor]:
        """Return what was measured of the rows of all processes, by name."""
        found = {}
        for name in self.measured[0][kind]:
            parts = []
            for measured in self.measured:
                parts.append(measured[kind][name].float())
            rows = torch.cat(parts).contiguous()
            found[name] = self.accelerator.gather(rows)
        return found

    def speed(self, step: int) -> dict[str, float]:
        """Return seconds since the last record, those that data was waited for, and the pace."""
        now = time.perf_counter()
        seconds = now - self.began
        self.began = now
        each = seconds / (step + 1 - self.since)
        self.since = step + 1
        waited = self.waited
        self.waited = 0.0
        return {
            "seconds": seconds,
            "waited": waited,
            "rows_a_second": self.stage.training.batch / each,
            "seconds_left": each * (self.steps - step - 1),
        }


def binned(
    values: Mapping[str, Tensor], times: Mapping[str, Tensor]
) -> dict[str, dict[str, list[float | None]]]:
    """Return the means of each value in bins of each of the times, by the time's name first."""
    found = {}
    for name, at in times.items():
        found[name] = {term: by_bins(cost, at) for term, cost in values.items()}
    return found


def detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without their graphs."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def means(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the mean of each."""
    return {name: float(value.mean()) for name, value in values.items()}
