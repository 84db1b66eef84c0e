"""The page of a run of ``flowspace demo``: what was trained, what it draws, and how good that is.

A section is a function from the record of the run to parts of a page.
"""

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowspace
from flowspace.demo.page import (
    Markup,
    Part,
    Table,
    curves,
    details,
    escaped,
    heading,
    listing,
    named_rows,
    page,
    pair,
    picture_address,
)
from flowspace.demo.record import RunRecord

__all__ = ["copies", "report"]

IN_A_ROW = 8
"""Pictures of a class in a row."""

MOST_ROWS = 12
"""Classes that are shown, at most."""

CLOSEST = 6
"""Samples nearest of all to a training picture that are shown."""

PAIRS = 18
"""Other samples that are shown beside their nearest training picture."""

LOOKS = 6
"""Looks during training that are shown, at most."""

MAIN = "crossflow"

COLUMNS = {
    "accuracy": (
        "accuracy",
        "How often classifiers see the class that was asked for. They learned from real pictures "
        "alone, and share no weights with anything that trained the generator; no pictures "
        "either, unless a note below says that there were too few.",
        "{:.3f}",
    ),
    "diversity": (
        "diversity",
        "How far pictures of one class are from each other, on average, over the same for real "
        "pictures. 1 is as varied as real ones, 0 is one picture again and again.",
        "{:.2f}",
    ),
    "frechet": (
        "Frechet distance",
        "How far the samples as a whole are from held-out real pictures, in the features of the "
        "classifiers. Lower is better. Real pictures are not at 0 either: two sets of real "
        "pictures differ by chance, and the first row says by how much.",
        "{:.1f}",
    ),
    "excess": (
        "excess over real",
        "The Frechet distance less that of real pictures. 0 is as good as real.",
        "{:.1f}",
    ),
    "milliseconds": (
        "ms per image",
        "Milliseconds for a sample on this machine, many drawn together.",
        "{:.2f}",
    ),
}
"""By the key of a score: the head of its column, what it means, how it is written."""

NAMES = {
    "real": "real pictures",
    MAIN: "CrossFlow",
    "denoiser": "one-step denoiser",
    "meanflow+decoder": "latent MeanFlow + decoder",
    "decoder on noise": "decoder on noise",
}

METHODS = {
    MAIN: "One network from a noisy latent to pixels, in one evaluation.",
    "denoiser": "The same network, shown pure noise alone. The best that it can return is the "
    "average picture of a class.",
    "meanflow+decoder": "The usual way: one network makes a latent in one evaluation, and a "
    "decoder makes the picture from it.",
    "decoder on noise": "The decoder, given noise for a latent: no generator at all.",
}


def report(record: RunRecord) -> str:
    """Return the page of a run as one HTML file."""
    parts: list[Part] = [
        *lead(record),
        *beside(record),
        *copies(record),
        *along(record),
        *scores(record),
        *others(record),
        *training(record),
        *made(record),
        *onward(record),
    ]
    return page(f"{name_of(record)}: each picture in one evaluation", parts)


def name_of(record: RunRecord) -> str:
    """Return what the set is called."""
    return Path(record.dataset).name or record.dataset


# --- what it is
# -------------------------------------------------------------------------------------------------


def lead(record: RunRecord) -> list[Part]:
    """Return what CrossFlow does, in a sentence and a drawing."""
    text = (
        "CrossFlow trains one network that takes a noisy latent, a short list of numbers, and "
        "returns the picture. Each sample on this page is one evaluation of that network. "
        "There is no decoder."
    )
    return [
        Markup(f"<p class=lead>{text}</p>"),
        drawing(record.samples[0, 0]),
        in_short(record),
    ]


def in_short(record: RunRecord) -> str:
    """Return the scores in a sentence or two."""
    real, main = record.metrics["methods"]["real"], record.metrics["methods"][MAIN]
    text = ""
    if main["accuracy"] is not None:
        text = (
            f"Classifiers that know real pictures alone see the class that was asked for in "
            f"{main['accuracy']:.1%} of the samples, and the right class in "
            f"{real['accuracy']:.1%} of held-out real pictures. "
        )
    text += (
        f"The samples' Frechet distance to held-out pictures is {main['frechet']:.1f}; that of "
        f"other real pictures is {real['frechet']:.1f}. A sample took "
        f"{main['milliseconds']:.2f} ms on this machine."
    )
    if record.doubts:
        text += " Not all of this can be trusted: see the notes under the table below."
    return text


def drawing(sample: Tensor) -> Markup:
    """Draw a noisy latent, the network, and a sample, uint8 ``(C, H, W)``."""
    numbers = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    cells = ""
    for row, line in enumerate(numbers.tolist()):
        for column, value in enumerate(line):
            share = min(1.0, abs(value) / 2)
            colour = "var(--warm)"
            if value < 0:
                colour = "var(--accent)"
            place = f'x="{20 + 38 * column}" y="{20 + 38 * row}"'
            cells += (
                f'<rect {place} width="36" height="36" fill="{colour}" opacity="{share:.2f}"/>'
            )
    return Markup(
        '<figure><svg class=drawing viewBox="0 0 640 215" role="img" '
        'aria-label="A noisy latent goes into one network, which returns the picture.">'
        f"{cells}"
        '<path d="M188 95h44m-9 -7l9 7l-9 7M412 95h44m-9 -7l9 7l-9 7"/>'
        '<rect class=box x="240" y="45" width="164" height="100" rx="12"/>'
        '<text x="322" y="90">one network,</text><text x="322" y="115">one evaluation</text>'
        f'<image class=crisp x="470" y="20" width="150" height="150" '
        f'href="{picture_address(sample)}"/>'
        '<text x="95" y="205">noisy latent</text><text x="545" y="205">picture</text>'
        "</svg></figure>"
    )


# --- what it draws
# -------------------------------------------------------------------------------------------------


def shown_classes(record: RunRecord) -> Sequence[tuple[int, str]]:
    """Return the classes that are shown, by label and name."""
    return list(enumerate(record.class_names))[:MOST_ROWS]


def beside(record: RunRecord) -> list[Part]:
    """Return real pictures and samples side by side, a row a class."""
    rows = {}
    for label, name in shown_classes(record):
        rows[name] = [record.held_out(label)[:IN_A_ROW], record.samples[label, :IN_A_ROW]]
    text = (
        "Left: real pictures that no network was trained on. Right: samples, the first of each "
        "class, not selected."
    )
    parts: list[Part] = [heading("Real pictures and samples"), text]
    if len(record.class_names) > MOST_ROWS:
        parts += [f"The first {MOST_ROWS} of {len(record.class_names)} classes."]
    if not record.conditional:
        parts += ["The pictures have no classes, so the network was told none."]
    files = record.folder / "samples"
    parts += [named_rows(rows, ("real", "samples")), f"More samples, as files: {files}"]
    return parts


def copies(record: RunRecord) -> list[Part]:
    """Return samples beside their nearest training pictures, and whether they are copies."""
    distances = record.nearest_distance.flatten()
    usual = float(record.real_distance.quantile(0.5))
    middle = float(distances.quantile(0.5))
    share = float((distances < usual).double().mean())
    text = (
        "Left in each pair: a sample. Right: the training picture nearest to it. Below: their "
        "distance (root mean square over pixels, 2 from black to white). "
        f"Held-out real pictures are {usual:.2f} from their nearest training picture (median); "
        f"samples are {middle:.2f}. {share:.0%} of the samples are nearer than that median: of "
        "new real pictures 50% would be, of copies 100%. Blurred or simple pictures are near to "
        "many, so look at the pairs too."
    )
    order = distances.argsort().tolist()
    every = max(1, record.samples.shape[1] * len(record.samples) // PAIRS)
    return [
        heading("Does it copy its training pictures?"),
        text,
        Markup("<h3>The nearest pairs of all</h3>"),
        pairs(record, order[:CLOSEST]),
        Markup("<h3>Pairs from each class, not selected</h3>"),
        pairs(record, list(range(0, len(distances), every))[:PAIRS]),
    ]


def pairs(record: RunRecord, places: Sequence[int]) -> Markup:
    """Return the samples at some places, each beside its nearest training picture."""
    samples, near = record.samples.flatten(0, 1), record.nearest.flatten(0, 1)
    distances = record.nearest_distance.flatten()
    found = ""
    for place in places:
        name = record.class_names[place // record.samples.shape[1]]
        caption = f"{float(distances[place]):.2f}, asked for: {name}"
        if not record.conditional:
            caption = f"{float(distances[place]):.2f}"
        found += pair(samples[place], near[place], caption)
    return Markup(f"<div class=pairs>{found}</div>")


def along(record: RunRecord) -> list[Part]:
    """Return samples of the same noise during training, a row a look."""
    if not record.along:
        return []
    count = min(LOOKS, len(record.along))
    places = [
        round(number * (len(record.along) - 1) / max(1, count - 1)) for number in range(count)
    ]
    rows = {}
    for place in dict.fromkeys(places):
        look = record.along[place]
        each = max(1, 2 * IN_A_ROW // len(look.pictures))
        rows[f"step {look.step:,}"] = [look.pictures[:, :each].flatten(0, 1)[: 2 * IN_A_ROW]]
    text = "The same noise in every row, after so many training steps."
    return [heading("Samples during training"), text, named_rows(rows)]


# --- how good it is
# -------------------------------------------------------------------------------------------------


def scores(record: RunRecord) -> list[Part]:
    """Return the table of scores, with what each column means."""
    columns = columns_of(record)
    head = ("method", *[COLUMNS[key][0] for key in columns])
    rows = []
    for method, found in record.metrics["methods"].items():
        cells = [cell(record, method, found, key) for key in columns]
        rows.append((NAMES.get(method, method), *cells))
    terms = [f"<dt>{COLUMNS[key][0]}</dt><dd>{COLUMNS[key][1]}</dd>" for key in columns]
    parts: list[Part] = [heading("How good it is"), (head, rows), seeds_line(record)]
    parts += [Markup(f"<p class=doubt>{escaped(doubt)}</p>") for doubt in record.doubts]
    return [*parts, Markup(f"<dl>{''.join(terms)}</dl>")]


def columns_of(record: RunRecord) -> list[str]:
    """Return the scores that this run has."""
    found = list(COLUMNS)
    if record.metrics["methods"][MAIN]["accuracy"] is None:
        found.remove("accuracy")
    return found


def cell(record: RunRecord, method: str, found: Mapping[str, Any], key: str) -> str:
    """Return a score as text: its mean, and where there are several seeds its range."""
    if method == "real" and key in ("excess", "milliseconds"):
        return ""
    shape = COLUMNS[key][2]
    values = [value_of(record, seed, number, key) for number, seed in enumerate(found["by_seed"])]
    mean = shape.format(sum(values) / len(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({shape.format(min(values))} to {shape.format(max(values))})"


def value_of(record: RunRecord, scored: Mapping[str, Any], seed: int, key: str) -> float:
    """Return one score of one seed."""
    if key != "excess":
        return scored[key]
    real = record.metrics["methods"]["real"]["by_seed"][seed]
    return scored["frechet"] - real["frechet"]


def seeds_line(record: RunRecord) -> str:
    """Return what the figures are means of, or that one seed says little."""
    seeds = record.metrics["seeds"]
    if seeds == 1:
        return "One seed. Another seed gives other figures: --seeds 3 shows how far they spread."
    return (
        f"Means over {seeds} seeds, and the range from the smallest to the largest. Pictures and "
        "curves are those of the first seed."
    )


def others(record: RunRecord) -> list[Part]:
    """Return the samples of the baselines beside those of CrossFlow, a row a method."""
    if not record.others:
        return []
    each = max(1, 2 * IN_A_ROW // len(record.class_names))
    rows = {}
    for name, pictures in {MAIN: record.samples, **record.others}.items():
        rows[NAMES.get(name, name)] = [pictures[:, :each].flatten(0, 1)[: 2 * IN_A_ROW]]
    terms = []
    for name, text in METHODS.items():
        if name == MAIN or name in record.others:
            terms.append(f"<dt>{NAMES[name]}</dt><dd>{text}</dd>")
    text = "The same size of network, the same number of steps. Samples are not selected."
    listed = Markup(f"<dl>{''.join(terms)}</dl>")
    return [heading("Beside other ways to do it"), text, named_rows(rows), listed]


# --- how it was made
# -------------------------------------------------------------------------------------------------


def training(record: RunRecord) -> list[Part]:
    """Return the loss curves, each with what it should look like."""
    if not record.curves:
        return []
    generators = {}
    before = {}
    for name, log in record.curves.items():
        points = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
        if name in METHODS:
            generators[NAMES[name]] = points
        else:
            before[name] = points
    found = []
    for title, lines in (
        ("The generator: fast at first, then slowly, for its target moves with it.", generators),
        ("What is trained before it: the encoder, and the classifiers that judge.", before),
    ):
        if lines:
            drawn = curves(lines, "loss")
            found.append(f"<figure><figcaption>{title}</figcaption>{drawn.text}</figure>")
    return [heading("Losses"), Markup(f"<div class=figures>{''.join(found)}</div>")]


def made(record: RunRecord) -> list[Part]:
    """Return what made the run: command, versions, machine, time, settings."""
    machine = f"{platform.system()} on {platform.machine()}, {os.cpu_count()} cores, "
    machine += f"{torch.get_num_threads()} used"
    counts = [f"{count:,} {name}" for name, count in record.counts.items() if count]
    rows = [
        ("command", command_of(record)),
        ("pictures", ", ".join([record.dataset, *counts])),
        ("time of this call", duration(record.seconds)),
        ("machine", machine),
        ("versions", versions()),
    ]
    parts: list[Part] = [heading("How this was made"), (("what", ""), rows)]
    if record.skipped:
        unread: Table = (("file", "why it was left out"), list(record.skipped.items()))
        parts += [details(f"Files that could not be read ({len(record.skipped)})", unread)]
    settings: Table = (("setting", "value"), list(flat(record.settings)))
    return [*parts, details("All settings", settings)]


def versions() -> str:
    """Return the versions of what the figures depend on."""
    return (
        f"flowspace {flowspace.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def duration(seconds: Mapping[str, float]) -> str:
    """Return how long a call took, and its longest parts."""
    whole = seconds.get("whole", 0.0)
    parts = [(value, name) for name, value in seconds.items() if name != "whole" and value >= 1]
    text = spoken(whole)
    longest = [f"{name} {spoken(value)}" for value, name in sorted(parts, reverse=True)[:4]]
    if longest:
        text += f" ({', '.join(longest)})"
    return text


def spoken(seconds: float) -> str:
    """Return a time as one would say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min"


def flat(settings: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Return nested settings as rows of a dotted name and a value."""
    rows = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{above}{name}.")
        else:
            rows.append((f"{above}{name}", str(value)))
    return rows


def onward(record: RunRecord) -> list[Part]:
    """Return commands for what to do next."""
    command = command_of(record)
    parts: list[Part] = [heading("What to do next")]
    if not record.others:
        parts += [
            "Compare with other ways to do it. What is trained already is not trained again:",
            listing([f"{command} --baselines"]),
        ]
    if record.metrics["seeds"] == 1:
        parts += [
            "See how much the figures differ from seed to seed:",
            listing([f"{command} --seeds 3"]),
        ]
    return [
        *parts,
        "Train on pictures of your own, one folder a class, or all in one folder:",
        listing(["flowspace demo --data FOLDER"]),
    ]


def command_of(record: RunRecord) -> str:
    """Return the command of a run, which continues it; where Python started it, the command that
    does the same with the usual settings.
    """
    program, *words = sys.argv
    if Path(program).name == "flowspace" and words[:1] == ["demo"]:
        if "--seeds" in words:  # is said anew by what comes next
            place = words.index("--seeds")
            del words[place : place + 2]
        if record.metrics["seeds"] > 1:
            words += ["--seeds", str(record.metrics["seeds"])]
        return shlex.join(["flowspace", *words])
    return shlex.join(["flowspace", "demo", "--data", record.dataset, "--out", str(record.folder)])
