"""What a run leaves to look at: grids and sheets of pictures, curves, tables, one self-contained
page.

A page is one file. It asks for nothing from elsewhere and runs no script; it follows the reader's
light or dark theme, and its pictures wrap on a narrow screen.
"""

import base64
import contextlib
import html
import io
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # the backend must be chosen first
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

__all__ = [
    "Markup",
    "Part",
    "curves",
    "details",
    "escaped",
    "grid",
    "heading",
    "listing",
    "losses",
    "markdown_table",
    "mean_and_range",
    "named_rows",
    "page",
    "pair",
    "picture",
    "picture_address",
    "png",
    "scores",
    "sheet",
    "slopes",
    "strip",
    "vector",
    "write_beside",
]

STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --soft: #5d6773; --line: #d9dee4;
        --ground: #fdfdfc; --raised: #f2f4f6; --accent: #2a6fb0; --warm: #c2641f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7eaee; --soft: #a0a9b4; --line: #39414b; --ground: #14181d;
          --raised: #1e242b; --accent: #7db6ec; --warm: #eba063; } }
* { box-sizing: border-box; }
body { font: 17px/1.55 system-ui, sans-serif; max-width: 72rem; margin: 0 auto;
       padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--ground); }
h1 { font-size: 2rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.35rem; margin: 2.8rem 0 .4rem; padding-top: .8rem;
     border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p, dl, li { max-width: 46rem; overflow-wrap: anywhere; }
.lead { font-size: 1.15rem; }
.soft, figcaption { color: var(--soft); font-size: .92rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 1.2rem .4rem 0; text-align: right; vertical-align: top; }
.numbers th, .numbers td { white-space: nowrap; }
.words th, .words td { text-align: left; overflow-wrap: anywhere; }
.words td:first-child { min-width: 8rem; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--line); }
tbody td { border-bottom: 1px solid var(--line); }
dt { font-weight: 600; } dd { margin: 0 0 .6rem; color: var(--soft); }
pre { background: var(--raised); padding: .8rem 1rem; border-radius: .4rem; overflow-x: auto;
      font-size: .9rem; }
summary { cursor: pointer; color: var(--accent); }
figure { margin: 1rem 0; }
img, svg { max-width: 100%; height: auto; }
.crisp { image-rendering: pixelated; }
.doubt { border-left: 4px solid var(--warm); padding-left: .8rem; }
.drawing { width: 40rem; fill: currentColor; font: 18px system-ui, sans-serif;
           text-anchor: middle; }
.drawing path, .drawing .box { fill: none; stroke: var(--soft); stroke-width: 2; }
.drawing .box { stroke: var(--accent); stroke-width: 3; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; }
.figures > * { flex: 1 1 20rem; min-width: 0; max-width: 34rem; }
.row { display: grid; grid-template-columns: 7rem 1fr 1fr; gap: .3rem 1.2rem;
       align-items: center; margin: .35rem 0; }
.row.one { grid-template-columns: 7rem 1fr; }
.row > :first-child { overflow-wrap: anywhere; line-height: 1.2; }
.strip { display: grid; grid-template-columns: repeat(var(--across), minmax(0, 1fr));
         gap: 3px; }
.strip img, .pair img { display: block; width: 100%; border-radius: 2px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr));
         gap: .9rem 1.4rem; }
.pair { margin: 0; } .pair div { display: grid; grid-template-columns: 1fr 1fr; gap: 3px; }
@media (max-width: 44rem) {
  body { font-size: 16px; } h1 { font-size: 1.6rem; }
  .row, .row.one { grid-template-columns: 1fr; margin: .8rem 0; }
  .row.titles { display: none; }
  .strip[data-title]::before { content: attr(data-title); grid-column: 1 / -1;
                               color: var(--soft); font-size: .85rem; } }
"""

SHOWN = 8
"""Pictures of a class in a sheet, of at most so many classes."""

NEAR_ZERO = 1e-2
"""Below it in size curves with values of both signs are drawn on a linear scale."""

DECADE = 10
"""Ratio of the largest value to the smallest below which a log scale may have no power of ten."""

SPARSE = 100
"""The ratio above which powers of ten alone have a number: more numbers would touch."""

FLAT = 1.1
"""A ratio below which a curve is drawn flat: the scale would show noise as mountains."""

Log = Sequence[Mapping[str, Any]]
"""Records of a run, one a logged step."""

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""The head of a table and its rows."""

INK = "#010203"
"""What a figure is drawn in, which becomes the colour of the text around it."""

ENLARGED = 48
"""Sides of pictures, in pixels, up to which each pixel is shown as a sharp square."""


LEAST_WIDTH = 640
"""Pixels that a smaller PNG is enlarged to, at most, by a whole number."""


@dataclass(frozen=True)
class Markup:
    """HTML that a page takes as it is."""

    text: str


Part = str | bytes | Table | Markup
"""A paragraph, a PNG, a table, or HTML."""


# --- pictures
# -------------------------------------------------------------------------------------------------


def grid(columns: Mapping[str, Tensor], classes: int, across: int | None = None) -> Figure:
    """Draw blocks of pictures side by side: one row a class, one block a title.

    Args:
        columns: by title, the pictures ``(classes, K, 1, H, H)`` in [-1, 1].
        classes: how many rows.
        across: blocks in a line; None puts all into one.
    """
    across = across or len(columns)
    lines = -(-len(columns) // across)
    figure, axes = plt.subplots(
        lines, across, figsize=(3.4 * across, 5.4 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    for axis, (title, pictures) in zip(axes.flat, columns.items(), strict=False):
        _block(axis, pictures, classes)
        axis.set_title(title, fontsize=11)
    return figure


def _block(axis: Axes, pictures: Tensor, classes: int) -> None:
    """Draw one row of pictures a class, white lines between them."""
    framed = torch.nn.functional.pad(pictures[:, :, 0], (1, 1, 1, 1), value=1.0)
    rows = [torch.cat([*row], 1) for row in framed]
    axis.imshow(torch.cat(rows, 0).clamp(-1, 1), cmap="gray_r", vmin=-1, vmax=1)
    height = framed.shape[-2]
    middles = [height * (label + 0.5) for label in range(classes)]
    axis.set_yticks(middles, [str(label) for label in range(classes)])
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def png(figure: Figure, dpi: int = 130) -> bytes:
    """Return a figure as PNG and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()


def sheet(images: Tensor, classes: int) -> bytes:
    """Return a PNG of uint8 images ``(N, 3, H, W)`` whose classes take turns: a row for each
    class.
    """
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    across = min(SHOWN, max(1, len(images) // classes))
    rows = [images[label::classes][:across] for label in range(min(classes, SHOWN))]
    picture = to_pil_image(make_grid(torch.cat(rows), across, padding=2, pad_value=255))
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


# --- curves
# -------------------------------------------------------------------------------------------------


def losses(log: Log) -> Markup:
    """Plot the loss and each term as measured, without its weight, over steps."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in log:
        if "loss" not in record:
            continue
        lines.setdefault("loss", []).append((record["step"], record["loss"]))
        for name, value in record.get("raw", {}).items():
            lines.setdefault(name, []).append((record["step"], value))
    return curves(lines, "loss; terms without weights")


def scores(log: Log) -> Markup:
    """Plot each number that a look at the averaged network left, over steps."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in log:
        for name, value in record.get("watch", {}).items():
            lines.setdefault(name, []).append((record["step"], value))
    return curves(lines, "score")


def slopes(log: Log) -> Markup:
    """Plot the norms of each term's gradient at the prediction by t, over the second half of a log
    (the paper's figure 7).
    """
    found = [record["slopes_by"]["t"] for record in log if record.get("slopes_by")]
    half = found[len(found) // 2 :]
    with _inked():
        figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
        values: list[float] = []
        for name in dict.fromkeys(name for record in half[-1:] for name in record):
            rows = torch.tensor([_numbers(record[name]) for record in half if name in record])
            middles = (torch.arange(rows.shape[1]) + 0.5) / rows.shape[1]
            means = rows.nanmean(0)
            axis.plot(middles, means, marker="o", label=name)
            values.extend(means[means.isfinite()].tolist())
        _log_scale(axis, values)
        axis.set_xlabel("t")
        axis.set_ylabel("norm of the gradient at the prediction")
        return _finished(figure, axis)


def curves(lines: Mapping[str, Sequence[tuple[int, float]]], label: str) -> Markup:
    """Plot values over steps, on a log scale; where one is not positive, linear near zero.

    Args:
        lines: by name, pairs of a step and a value.
        label: of the values.
    """
    with _inked():
        figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
        for name, points in lines.items():
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, label=name)
        _log_scale(axis, [value for points in lines.values() for _, value in points])
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        return _finished(figure, axis)


def _log_scale(axis: Axes, values: Sequence[float]) -> None:
    """Give an axis a log scale with at least a few numbers; one that is linear near zero where a
    value is not positive.
    """
    least, most = min(values, default=0), max(values, default=0)
    if least <= 0:
        axis.set_yscale("symlog", linthresh=NEAR_ZERO)
        return
    axis.set_yscale("log")
    if most < DECADE * least:
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_minor_locator(NullLocator())
    elif most < SPARSE * least:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    if most < FLAT * least:
        axis.set_ylim(least / FLAT, most * FLAT)


@contextlib.contextmanager
def _inked() -> Iterator[None]:
    """Draw text and axes in `INK`, and keep letters as letters."""
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    found: Any = dict.fromkeys(names, INK)
    found |= {"svg.fonttype": "none", "svg.hashsalt": "flowspace", "legend.frameon": False}
    with plt.rc_context(found):
        yield


def _finished(figure: Figure, axis: Axes) -> Markup:
    """Name the curves, if there are any, and return the drawing."""
    axis.spines[["top", "right"]].set_visible(False)
    if axis.lines:
        axis.legend()
    return vector(figure)


def vector(figure: Figure) -> Markup:
    """Return a figure as inline SVG, and close it."""
    buffer = io.StringIO()
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=unsaid)
    plt.close(figure)
    drawn = buffer.getvalue()
    start = drawn.index("<svg")
    return Markup(drawn[start:].replace(INK, "currentColor"))


def _numbers(values: Sequence[float | None]) -> list[float]:
    """Return nan for bins without a row."""
    return [math.nan if value is None else value for value in values]


# --- tables and the page
# -------------------------------------------------------------------------------------------------


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_and_range(values: Sequence[float], digits: int) -> str:
    """Return the mean of values, and their range in brackets where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def page(title: str, parts: Sequence[Part]) -> str:
    """Return one self-contained HTML page of paragraphs (text), pictures (PNG bytes), tables
    (head, rows) and HTML (`Markup`).
    """
    body = "\n".join(_part(part) for part in parts)
    name = escaped(title)
    head = (
        '<meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{name}</title>'
    )
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head>"
        f"<body><h1>{name}</h1>\n{body}</body></html>\n"
    )


def _part(part: Part) -> str:
    """Return a paragraph, a picture or a table as HTML."""
    if isinstance(part, Markup):
        return part.text
    if isinstance(part, str):
        return f"<p>{escaped(part)}</p>"
    if isinstance(part, bytes):
        width = int.from_bytes(part[16:20], "big")  # of a PNG, which says so there
        times = max(1, LEAST_WIDTH // width)
        kind = ""
        if times > 1:
            kind = " class=crisp"
        style = f"width:{times * width}px"
        return f'<img{kind} alt="figure" style="{style}" src="{_address(part)}">'
    head, rows = part
    lines = "".join(f"<tr>{_cells(row, 'td')}</tr>" for row in rows)
    inner = f"<thead><tr>{_cells(head, 'th')}</tr></thead><tbody>{lines}</tbody>"
    kind = "numbers"
    if len(head) == 2:
        kind = "words"
    return f"<div class=wide><table class={kind}>{inner}</table></div>"


def _cells(row: Sequence[str], tag: str) -> str:
    """Return a row's cells as HTML."""
    return "".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in row)


def _address(content: bytes) -> str:
    """Return a PNG as the address of an image that is the image itself."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def escaped(text: str) -> str:
    """Return text as HTML shows it, letter by letter."""
    return html.escape(text)


def heading(text: str) -> Markup:
    """Return the title of a section."""
    return Markup(f"<h2>{escaped(text)}</h2>")


def listing(lines: Sequence[str]) -> Markup:
    """Return commands, one a line, to copy."""
    text = "\n".join(lines)
    return Markup(f"<pre>{escaped(text)}</pre>")


def details(title: str, part: Part) -> Markup:
    """Return a part that a reader opens by its title."""
    return Markup(f"<details><summary>{escaped(title)}</summary>{_part(part)}</details>")


def picture(pixels: Tensor, title: str) -> str:
    """Return one picture as HTML, a small one as sharp squares.

    Args:
        pixels: uint8, ``(C, H, W)``, grey or red, green and blue.
        title: what it shows, for those who do not see it.
    """
    crisp = ""
    if max(pixels.shape[1:]) <= ENLARGED:
        crisp = " class=crisp"
    return f'<img{crisp} alt="{escaped(title)}" src="{picture_address(pixels)}">'


def picture_address(pixels: Tensor) -> str:
    """Return a uint8 picture ``(C, H, W)`` as the address of an image that is the image itself."""
    from PIL import Image

    buffer = io.BytesIO()
    levels = pixels.permute(1, 2, 0).squeeze(2)
    Image.fromarray(levels.contiguous().numpy()).save(buffer, "png", optimize=True)
    return _address(buffer.getvalue())


def pair(first: Tensor, second: Tensor, caption: str) -> str:
    """Return two pictures side by side as HTML, above a caption."""
    inner = picture(first, caption) + picture(second, "the nearest training picture")
    below = f"<figcaption>{escaped(caption)}</figcaption>"
    return f"<figure class=pair><div>{inner}</div>{below}</figure>"


def named_rows(
    rows: Mapping[str, Sequence[Sequence[Tensor] | Tensor]], titles: Sequence[str] = ()
) -> Markup:
    """Return rows of pictures, each under or beside its name.

    Args:
        rows: by name, one strip of pictures or two.
        titles: of the strips, which have none of their own.
    """
    found = ""
    if titles:
        cells = "".join(f"<span>{escaped(title)}</span>" for title in titles)
        found = f'<div class="row titles soft"><span></span>{cells}</div>'
    across = max((len(each) for strips in rows.values() for each in strips), default=1)
    for name, strips in rows.items():
        label = f"<span>{escaped(name)}</span>"
        kind = "row"
        if len(strips) == 1:
            kind = "row one"
        shown = ""
        for pictures, title in zip(strips, titles or [""] * len(strips), strict=True):
            shown += strip(pictures, f"{title} {name}".strip(), title, across)
        found += f'<div class="{kind}">{label}{shown}</div>'
    return Markup(f"<div>{found}</div>")


def strip(pictures: Sequence[Tensor] | Tensor, title: str, kind: str = "", across: int = 0) -> str:
    """Return pictures in a row as HTML, each as wide as the others.

    Args:
        pictures: uint8 ``(C, H, W)`` each.
        title: what each shows, for those who do not see it.
        kind: is written above the row on a narrow screen.
        across: pictures that the row has room for; 0 is as many as there are.
    """
    shown = "".join(picture(each, title) for each in pictures)
    above = ""
    if kind:
        above = f' data-title="{escaped(kind)}"'
    return f'<div class=strip{above} style="--across:{across or len(pictures)}">{shown}</div>'


def write_beside(path: Path, content: str | bytes) -> None:
    """Write a file beside and rename it, so that a reader never finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    if isinstance(content, str):
        content = content.encode()
    partial.write_bytes(content)
    os.replace(partial, path)
