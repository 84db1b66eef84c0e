"""What one sees of a run: sheets of samples while it trains, and its page at the end.

A program puts together the parts of its page, paragraphs, PNGs and tables, and calls `write`.
"""

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import journal
import torch
from profiling import name_of
from sections import ProgramConfig
from torch import Tensor, nn

import flowspace
from flowspace.demo import page as demo_page
from flowspace.demo.page import png, sheet, write_beside
from flowspace.vision.data import Images

__all__ = [
    "Sheets",
    "beside",
    "class_rows",
    "curves",
    "keep_config",
    "passes_done",
    "provenance",
    "real_pictures",
    "scores_tables",
    "settings_table",
    "sheets_over_training",
    "steps_done",
    "tables",
    "unfinished",
    "write",
    "write_json",
]

SHOWN = 8
"""Pictures of a class in a picture, of at most so many classes."""

MOST_SHEETS = 4
"""Sheets over training that a page shows: the first, the last and some between."""

FEW_PASSES = 10
"""Passes over the pictures below which a page says that nothing is trained to its end."""

Log = Sequence[Mapping[str, Any]]
"""Records of a run, one a logged step: what `journal.latest` returns."""

Part = demo_page.Part
"""A paragraph, a PNG, the head and the rows of a table, or HTML."""


def keep_config(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write ``config.json`` into the folder of a run, from which `reading.of_run` reads it."""
    write_json(folder / "config.json", settings)


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """Write a file of JSON beside its place, and move it there."""
    text = json.dumps(found, indent=2)
    write_beside(path, f"{text}\n")


# --- while it trains ---------------------------------------------------------------------------


@dataclass
class Sheets:
    """Draws a sheet of samples of the averaged network now and then: the ``look`` of a stage.

    Args:
        folder: of the stage, where ``sheet-STEP.png`` is left.
        classes: sample i has class i mod classes.
        draw: from the averaged network to samples, uint8 ``(N, 3, H, W)``.
        score: from samples to numbers for the log; None gives none.
    """

    folder: Path
    classes: int
    draw: Callable[[nn.Module], Tensor]
    score: Callable[[Tensor], Mapping[str, float]] | None = None

    def was(self, step: int) -> bool:
        """Whether a step was looked at before."""
        return self.path(step).exists()

    def path(self, step: int) -> Path:
        """Return where the sheet of a step is left."""
        return self.folder / f"sheet-{step:07d}.png"

    def __call__(self, step: int, averaged: nn.Module) -> Mapping[str, float]:
        """Leave the sheet of a step and return the scores."""
        samples = self.draw(averaged)
        write_beside(self.path(step), sheet(samples, self.classes))
        if self.score is None:
            return {}
        return self.score(samples)


# --- parts of a page ---------------------------------------------------------------------------


def write(path: Path, title: str, parts: Sequence[Part]) -> Path:
    """Write a page of paragraphs, PNGs and tables into one file, and return its path."""
    write_beside(path, demo_page.page(title, parts))
    return path


def steps_done(log: Log) -> int:
    """Return how many steps a log tells of."""
    steps = [record["step"] for record in log if "loss" in record]
    if not steps:
        return 0
    return steps[-1] + 1


def seconds_logged(log: Log) -> float:
    """Return the seconds of training that a log tells of."""
    seconds = 0.0
    for record in log:
        if "loss" in record:
            seconds += record.get("seconds", 0.0)
    return seconds


def passes_done(config: ProgramConfig, count: int, log: Log) -> float:
    """Return how often each of so many pictures was seen."""
    return steps_done(log) * config.training.batch / count


def unfinished(config: ProgramConfig, count: int, log: Log) -> list[Part]:
    """Return a sentence that says so where pictures were seen a few times only."""
    passes = passes_done(config, count, log)
    if passes >= FEW_PASSES:
        return []
    return [
        f"Each picture was seen {passes:.1f} times: everything ran, and nothing is trained to "
        "its end. Samples are blots until the network has seen its pictures many more times."
    ]


def scores_tables(folder: Path, command: str) -> list[Part]:
    """Return the scores of a run, or how it is judged where it was not.

    Args:
        folder: of the run.
        command: that judges it.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return [f"Not judged yet: {command}"]
    found = json.loads(path.read_text())
    return list(tables(found))


def tables(found: Mapping[str, Any]) -> list[demo_page.Table]:
    """Return what ``metrics.json`` keeps as tables: the first set, all sets, representations."""
    title = f"{found['count']} samples, {found['extractor']}"
    shown = {title: found["values"]}
    if "sets" in found:
        shown["the least over several sets"] = found["sets"]
    if "representations" in found:
        compared = found["representations"]
        title = f"Frechet distance over that of {compared['count']} held-out pictures"
        shown[title] = compared["values"]
    made: list[demo_page.Table] = []
    for title, values in shown.items():
        head = (title, "value")
        rows = [(name, f"{value:.4g}") for name, value in values.items()]
        made.append((head, rows))
    return made


def sheets_over_training(folder: Path) -> list[Part]:
    """Return some of the sheets of a stage, under a line that says of which steps they are."""
    paths = sorted(folder.glob("sheet-*.png"))
    if len(paths) > MOST_SHEETS:
        paths = [paths[place] for place in spread(MOST_SHEETS, len(paths))]
    steps = []
    pictures: list[Part] = []
    for path in paths:
        step = path.stem.removeprefix("sheet-")
        steps.append(str(int(step)))
        pictures.append(path.read_bytes())
    title = demo_page.heading("Samples during training")
    return [title, f"The same noise after {', '.join(steps)} steps:", *pictures]


def spread(count: int, length: int) -> list[int]:
    """Return so many places, from the first to the last of a length."""
    each = (length - 1) / (count - 1)
    return [round(number * each) for number in range(count)]


def curves(log: Log) -> list[Part]:
    """Return the losses, the scores and the gradients' norms of a log, where it has them.

    One look is no curve.
    """
    parts: list[Part] = [demo_page.heading("Losses"), demo_page.losses(log)]
    looks = [record for record in log if record.get("watch")]
    if len(looks) > 1:
        parts += ["Scores of a few samples during training:", demo_page.scores(looks)]
    sloped = [record for record in log if "t" in record.get("slopes_by", {})]
    if any(record["slopes_by"]["t"] for record in sloped):
        parts.append("Norms of each term's gradient at the prediction, by t:")
        parts.append(demo_page.slopes(sloped))
    return parts


def settings_table(settings: Mapping[str, Any]) -> Part:
    """Return all settings of a run by their keys."""
    rows = list(journal.texts(settings).items())
    table = (("setting", "value"), rows)
    return demo_page.details("All settings", table)


def provenance(log: Log, device: torch.device | None = None) -> Part:
    """Return what made a run and its page: the command, the versions, the time, the device.

    Args:
        log: of the run.
        device: on which it was trained; None takes the one that the log names last.
    """
    minutes = seconds_logged(log) / 60
    rows = [
        ("command", shlex.join(["python", *sys.argv])),
        ("versions", f"flowspace {flowspace.__version__}, torch {torch.__version__}"),
        ("time", f"{minutes:.1f} minutes of training logged"),
    ]
    devices = [record["device"] for record in log if "device" in record]
    if device is not None:
        devices.append(name_of(device))
    if devices:
        rows.append(("device", devices[-1]))
    return ("made by", ""), rows


def real_pictures(images: Images, label: int, count: int = SHOWN) -> list[Tensor]:
    """Return the first pictures of a class, uint8, and white ones where there are too few."""
    found = []
    for number, own in enumerate(images.labels):
        if own == label and len(found) < count:
            pixels, _ = images.row(number)
            found.append(pixels)
    shape = (3, images.size, images.size)
    white = torch.full(shape, 255, dtype=torch.uint8)
    missing = count - len(found)
    return [*found, *[white] * missing]


def beside(samples: Sequence[Tensor], images: Images) -> bytes:
    """Return real pictures and the samples of each class side by side, a row a class: a PNG."""
    rows = {}
    for label, made in enumerate(samples):
        name = images.names[label]
        real = real_pictures(images, label)
        rows[name] = torch.stack([*real, *made])
    return class_rows(rows)


def class_rows(rows: Mapping[str, Tensor]) -> bytes:
    """Return a PNG of rows of uint8 pictures ``(N, 3, H, W)``, each beside its name."""
    from matplotlib import pyplot as plt
    from torchvision.utils import make_grid

    count = len(rows)
    size = (9, 0.62 * count)
    figure, axes = plt.subplots(count, figsize=size, squeeze=False, layout="constrained")
    for axis, (name, pictures) in zip(axes.flat, rows.items(), strict=True):
        strip = make_grid(pictures, len(pictures), padding=2, pad_value=255)
        axis.imshow(strip.permute(1, 2, 0))
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    return png(figure)
