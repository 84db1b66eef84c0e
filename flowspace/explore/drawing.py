"""Pictures of plain numbers, as SVG.

Colours are variables of the page's style sheet, so that light and dark need no second drawing; a
heat map is a small PNG of one colour a sign whose opacity is the size, cut to its triangle.
"""

import base64
import io
import math

import numpy as np
from PIL import Image

from flowspace.explore.maps import CoefficientMap

__all__ = ["clouds", "curve", "heat_map", "number", "paths"]

POSITIVE, NEGATIVE = (214, 137, 52), (79, 91, 213)
"""The colours of the signs; explore.css has the second as its accent."""

CONTRAST = 4.0
"""How far the colours of small values are spread."""

LEFT, TOP, SIDE = 22, 12, 216
"""Of the square in which a triangle lies, in units of its picture."""

SMALL_T = '<tspan class="small-letter" dy="3">t</tspan>'
PLACES = {"D_t f": f'D{SMALL_T}<tspan dy="-3"> f</tspan>', "z_t": f"z{SMALL_T}"}
"""What a coefficient may stand in front of, as it is written in a picture."""

PICTURE = (252, 252)
RANGE = 2.9
"""Clouds and paths are drawn for coordinates of this size."""

FAR = 50
"""Where points lie that are farther away, or nowhere."""

CLOUD = 300
"""The side of a picture of points."""


def heat_map(coefficient: CoefficientMap, number_of_map: int) -> str:
    """Return a coefficient over the triangle, with the edges marked on which it is singular."""
    clip = f"triangle{number_of_map}"
    right, bottom = LEFT + SIDE, TOP + SIDE
    corners = f"{LEFT},{bottom} {right},{bottom} {right},{TOP}"
    width, height = PICTURE
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{coefficient.name} over t and s">'
        f'<clipPath id="{clip}"><polygon points="{corners}"/></clipPath>'
        f'<image href="{_png(coefficient)}" x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}" '
        f'preserveAspectRatio="none" clip-path="url(#{clip})"/>'
        f'<polygon class="triangle" points="{corners}"/>'
        f"{''.join(_mark(edge) for edge in coefficient.singular)}"
        f"{_scale(coefficient, number_of_map)}{_axes()}"
        '<circle class="cursor" r="4" cx="-9" cy="-9"/></svg>'
    )


def paths(states: np.ndarray, shown: int = -1) -> str:
    """Return trajectories ``(n, B, 2)``: lines, grey dots where they begin, and coloured ones at
    one of the n times.
    """
    lines = "".join(_line(states[:, row]) for row in range(states.shape[1]))
    return _square(
        f'<path class="path" d="{lines}"/><path class="dots noise" d="{_dots(states[0])}"/>'
        f'<path class="dots made" d="{_dots(states[shown])}"/>',
        "trajectories from noise to data",
    )


def clouds(data: np.ndarray, samples: np.ndarray) -> str:
    """Return two clouds ``(N, 2)``, the data pale below the samples."""
    return _square(
        f'<path class="dots data" d="{_dots(data)}"/>'
        f'<path class="dots small made" d="{_dots(samples)}"/>',
        "one-step samples on the data",
    )


def curve(points: np.ndarray, steps: int) -> str:
    """Return a loss curve ``(n, 2)`` over the steps, the loss on a logarithmic axis."""
    width, height = CLOUD, 84
    losses = np.log10(np.maximum(points[:, 1], 1e-12))
    low, high = float(losses.min()), float(losses.max())
    span = max(high - low, 0.1)
    x = 4 + (width - 8) * points[:, 0] / steps
    y = 16 + (height - 26) * (high - losses) / span
    line = _polyline(np.stack([x, y], 1))
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="the loss">'
        f'<path class="axis" d="M4 {height - 6}H{width - 4}"/><path class="curve" d="{line}"/>'
        f'<text class="tick" x="4" y="10">loss {number(points[-1, 1])}</text>'
        f'<text class="tick end" x="{width - 4}" y="10">{steps} steps</text></svg>'
    )


def number(value: float, digits: int = 3) -> str:
    """Return a number with a few digits, as one reads it."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")


def _png(coefficient: CoefficientMap) -> str:
    """Return the colours of a map as the address of a PNG."""
    values = coefficient.values.copy()
    rows, columns = np.indices(values.shape)
    above = rows > columns
    values[above] = np.diag(values)[columns[above]]  # so that no edge fades along the diagonal
    sizes = np.arcsinh(CONTRAST * np.abs(values) / (coefficient.limit or 1)) / math.asinh(CONTRAST)
    colours = np.zeros((*values.shape, 4), np.uint8)
    colours[..., :3] = np.where((values > 0)[..., None], POSITIVE, NEGATIVE)
    colours[..., 3] = 235 * np.nan_to_num(sizes, nan=0, posinf=1).clip(0, 1)
    buffer = io.BytesIO()
    Image.fromarray(colours[::-1]).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _mark(edge: str) -> str:
    """Return the mark of a singular edge; t -> 0 is the corner (0, 0)."""
    right, bottom = LEFT + SIDE, TOP + SIDE
    if edge == "t -> 0":
        return f'<circle class="singular" cx="{LEFT}" cy="{bottom}" r="6"/>'
    lines = {
        "s = t": f"M{LEFT} {bottom}L{right} {TOP}",
        "s = 0": f"M{LEFT} {bottom}H{right}",
        "t = 1": f"M{right} {bottom}V{TOP}",
    }
    return f'<path class="singular" d="{lines[edge]}"/>'


def _scale(coefficient: CoefficientMap, number_of_map: int) -> str:
    """Return the name and the scale of colours, in the half of the square that is empty."""
    place = PLACES.get(coefficient.place, coefficient.place)
    title = (
        f'<text class="name" x="{LEFT}" y="34">{coefficient.name}</text>'
        f'<text class="tick" x="{LEFT}" y="52">in front of {place}</text>'
    )
    if coefficient.limit == 0:
        return f'{title}<text class="tick" x="{LEFT}" y="70">zero everywhere</text>'
    gradient, limit = f"scale{number_of_map}", number(coefficient.limit, 2)
    negative, positive = f"rgb{NEGATIVE}", f"rgb{POSITIVE}"
    return (
        f'{title}<linearGradient id="{gradient}"><stop stop-color="{negative}"/>'
        f'<stop offset=".5" stop-color="{negative}" stop-opacity="0"/>'
        f'<stop offset=".5" stop-color="{positive}" stop-opacity="0"/>'
        f'<stop offset="1" stop-color="{positive}"/></linearGradient>'
        f'<rect x="{LEFT}" y="64" width="96" height="6" rx="3" fill="url(#{gradient})"/>'
        f'<text class="tick" x="{LEFT}" y="83">\N{MINUS SIGN}{limit}</text>'
        f'<text class="tick middle" x="{LEFT + 48}" y="83">0</text>'
        f'<text class="tick end" x="{LEFT + 96}" y="83">{limit}</text>'
    )


def _axes() -> str:
    right, bottom = LEFT + SIDE, TOP + SIDE
    return (
        f'<text class="tick middle" x="{LEFT}" y="{bottom + 18}">0</text>'
        f'<text class="axis-name middle" x="{LEFT + SIDE / 2}" y="{bottom + 18}">t</text>'
        f'<text class="tick middle" x="{right}" y="{bottom + 18}">1</text>'
        f'<text class="axis-name end" x="{right + 11}" y="{TOP + SIDE / 2}">s</text>'
    )


def _square(content: str, label: str) -> str:
    return f'<svg viewBox="0 0 {CLOUD} {CLOUD}" role="img" aria-label="{label}">{content}</svg>'


def _placed(points: np.ndarray) -> np.ndarray:
    """Return where points ``(N, 2)`` lie in a picture."""
    points = np.nan_to_num(points, nan=FAR, posinf=FAR, neginf=-FAR)
    clipped = points.clip(-FAR, FAR) * [1, -1]
    return (clipped / RANGE + 1) * CLOUD / 2


def _dots(points: np.ndarray) -> str:
    """Return points as lines of no length, which round ends make dots."""
    return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in _placed(points))


def _line(points: np.ndarray) -> str:
    return _polyline(_placed(points))


def _polyline(points: np.ndarray) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
