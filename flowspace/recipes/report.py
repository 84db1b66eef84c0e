"""What a run leaves to look at: a grid of pictures, a table, one self-contained page."""

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # the backend must be chosen first
from matplotlib.figure import Figure

__all__ = ["grid", "markdown_table", "page", "png", "write_beside"]

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
        rows = [
            torch.cat([*torch.nn.functional.pad(row[:, 0], (1, 1, 1, 1), value=1.0)], 1)
            for row in pictures
        ]
        axis.imshow(torch.cat(rows, 0).clamp(-1, 1), cmap="gray_r", vmin=-1, vmax=1)
        height = rows[0].shape[0]
        axis.set_yticks(
            [height * (label + 0.5) for label in range(classes)],
            [str(label) for label in range(classes)],
        )
        axis.set_xticks([])
        axis.set_title(title, fontsize=11)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    return figure


def png(figure: Figure, dpi: int = 130) -> bytes:
    """Return a figure as PNG and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(
    title: str, parts: Sequence[str | bytes | tuple[Sequence[str], Sequence[Sequence[str]]]]
) -> str:
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


def _part(part: str | bytes | tuple[Sequence[str], Sequence[Sequence[str]]]) -> str:
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    if isinstance(part, bytes):
        return f'<img alt="figure" src="data:image/png;base64,{base64.b64encode(part).decode()}">'
    head, rows = part
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"


def write_beside(path: Path, content: str | bytes) -> None:
    """Write a file beside and rename it, so that a reader never finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)
