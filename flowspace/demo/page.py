"""What a run leaves to look at: grids and sheets of pictures, curves, tables, one self-contained
page.
"""

import base64
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # the backend must be chosen first
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = [
    "grid",
    "losses",
    "markdown_table",
    "page",
    "png",
    "scores",
    "sheet",
    "slopes",
    "write_beside",
]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .35rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #222; }
tbody td { border-bottom: 1px solid #ddd; }
img { max-width: 100%; }
.note { color: #666; font-size: .9rem; }
"""

SHOWN = 8
"""Pictures of a class in a sheet, of at most so many classes."""

NEAR_ZERO = 1e-2
"""Below it in size curves with values of both signs are drawn on a linear scale."""

Log = Sequence[Mapping[str, Any]]
"""Records of a run, one a logged step."""

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""The head of a table and its rows."""


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


def losses(log: Log) -> bytes:
    """Plot the loss and each term as measured, without its weight, over steps: a PNG."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in log:
        if "loss" not in record:
            continue
        lines.setdefault("loss", []).append((record["step"], record["loss"]))
        for name, value in record.get("raw", {}).items():
            lines.setdefault(name, []).append((record["step"], value))
    return _curves(lines, "loss; terms without weights")


def scores(log: Log) -> bytes:
    """Plot each number that a look at the averaged network left, over steps: a PNG."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in log:
        for name, value in record.get("watch", {}).items():
            lines.setdefault(name, []).append((record["step"], value))
    return _curves(lines, "score")


def slopes(log: Log) -> bytes:
    """Plot the norms of each term's gradient at the prediction by t, over the second half of a log
    (the paper's figure 7).
    """
    found = [record["slopes_by"]["t"] for record in log if record.get("slopes_by")]
    half = found[len(found) // 2 :]
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for name in dict.fromkeys(name for record in half[-1:] for name in record):
        rows = torch.tensor([_numbers(record[name]) for record in half if name in record])
        middles = (torch.arange(rows.shape[1]) + 0.5) / rows.shape[1]
        axis.semilogy(middles, rows.nanmean(0), marker="o", label=name)
    axis.set_xlabel("t")
    axis.set_ylabel("norm of the gradient at the prediction")
    return _finished(figure, axis)


def _curves(lines: Mapping[str, Sequence[tuple[int, float]]], label: str) -> bytes:
    """Plot values over steps, on a log scale; where one is not positive, linear near zero."""
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, points in lines.items():
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, label=name)
    values = [value for points in lines.values() for _, value in points]
    if min(values, default=0) > 0:
        axis.set_yscale("log")
    else:
        axis.set_yscale("symlog", linthresh=NEAR_ZERO)
    axis.set_xlabel("step")
    axis.set_ylabel(label)
    return _finished(figure, axis)


def _finished(figure: Figure, axis: Axes) -> bytes:
    """Name the curves, if there are any, and return the PNG."""
    if axis.lines:
        axis.legend()
    return png(figure)


def _numbers(values: Sequence[float | None]) -> list[float]:
    """Return nan for bins without a row."""
    return [math.nan if value is None else value for value in values]


# --- tables and the page
# -------------------------------------------------------------------------------------------------


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(title: str, parts: Sequence[str | bytes | Table]) -> str:
    """Return one self-contained HTML page of paragraphs (text), pictures (PNG bytes) and tables
    (head, rows).
    """
    body = "\n".join(_part(part) for part in parts)
    name = html.escape(title)
    head = (
        '<meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{name}</title>'
    )
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head>"
        f"<body><h1>{name}</h1>\n{body}</body></html>\n"
    )


def _part(part: str | bytes | Table) -> str:
    """Return a paragraph, a picture or a table as HTML."""
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    if isinstance(part, bytes):
        return f'<img alt="figure" src="data:image/png;base64,{base64.b64encode(part).decode()}">'
    head, rows = part
    lines = "".join(f"<tr>{_cells(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{_cells(head, 'th')}</tr></thead><tbody>{lines}</tbody></table>"


def _cells(row: Sequence[str], tag: str) -> str:
    """Return a row's cells as HTML."""
    return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)


def write_beside(path: Path, content: str | bytes) -> None:
    """Write a file beside and rename it, so that a reader never finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    if isinstance(content, str):
        content = content.encode()
    partial.write_bytes(content)
    os.replace(partial, path)
