"""Pictures that need no package: five shapes in any colours, sizes and places, drawn by a program.

For trying the recipe on colour pictures, and as a set whose truth is known: more of the same are
drawn by another seed.
"""

import colorsys
import math
import random
from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageDraw

from flowspace.demo.pictures import FoundPictures

__all__ = ["SHAPES", "drawn_shapes", "shape"]

OF_A_KIND = 60
"""Pictures of a shape."""

OVERSAMPLED = 4
"""Pictures are drawn so many times larger and scaled down, so that edges are smooth."""

Points = list[tuple[float, float]]


def shape(kind: str, source: random.Random, side: int = 32) -> Image.Image:
    """Draw one shape on a ground of another hue.

    Args:
        kind: of `SHAPES`.
        source: of its colour, size, place and turn.
        side: pixels a side.
    """
    whole = side * OVERSAMPLED
    hue = source.random()
    strong = colour(hue, 0.6 + 0.4 * source.random(), 0.6 + 0.4 * source.random())
    other = (hue + 0.3 + 0.4 * source.random()) % 1
    pale = colour(other, 0.15 + 0.2 * source.random(), 0.75 + 0.25 * source.random())
    radius = whole * (0.26 + 0.12 * source.random())
    across = whole / 2 + whole * 0.1 * (2 * source.random() - 1)
    down = whole / 2 + whole * 0.1 * (2 * source.random() - 1)
    turn = math.radians(15 * (2 * source.random() - 1))
    picture = Image.new("RGB", (whole, whole), pale)
    pen = ImageDraw.Draw(picture)
    if kind == "circle":
        box = (across - radius, down - radius, across + radius, down + radius)
        pen.ellipse(box, fill=strong)
    else:
        cosine, sine = math.cos(turn), math.sin(turn)
        corners = []
        for x, y in OUTLINES[kind]():
            right = across + radius * (x * cosine - y * sine)
            corners.append((right, down + radius * (x * sine + y * cosine)))
        pen.polygon(corners, fill=strong)
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    """Return a colour in bytes."""
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return int(255 * red), int(255 * green), int(255 * blue)


def around(corners: int, radii: Sequence[float], first: float) -> Points:
    """Return corners around the origin, whose radii take turns, from an angle on."""
    points = []
    for number in range(corners):
        angle = first + 2 * math.pi * number / corners
        radius = radii[number % len(radii)]
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


def cross() -> Points:
    """Return the twelve corners of a cross."""
    w = 0.36
    upper = [(-w, -1.0), (w, -1.0), (w, -w), (1.0, -w), (1.0, w), (w, w)]
    return [*upper, *[(-x, -y) for x, y in upper]]


OUTLINES: dict[str, Callable[[], Points]] = {
    "square": lambda: around(4, [1.15], math.pi / 4),
    "triangle": lambda: around(3, [1.2], -math.pi / 2),
    "star": lambda: around(10, [1.25, 0.5], -math.pi / 2),
    "cross": cross,
}

SHAPES = ("circle", "square", "triangle", "star", "cross")


def drawn_shapes(side: int = 32, seed: int = 0) -> FoundPictures:
    """Return 60 pictures of each shape, uint8 ``(300, 3, side, side)``, classes by name.

    Args:
        side: pixels a side.
        seed: another one draws others.
    """
    source = random.Random(seed)
    by_name = {}
    for kind in SHAPES:
        pictures = [shape(kind, source, side) for _ in range(OF_A_KIND)]
        order = sorted(range(OF_A_KIND), key=str)  # as their files would be read
        by_name[kind] = [pictures[number] for number in order]
    names = tuple(sorted(by_name))
    rows = []
    for name in names:
        for picture in by_name[name]:
            rows.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8))
    pixels = torch.stack(rows).reshape(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()
    labels = torch.arange(len(names)).repeat_interleave(OF_A_KIND)
    return FoundPictures(pixels, labels, names, True, skipped={}, ignored={})
