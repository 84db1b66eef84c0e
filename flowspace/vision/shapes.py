"""Heights and widths: of images, and of grids of cells."""

from collections.abc import Sequence

from flowspace.errors import InputError

__all__ = ["check_latent", "pair_of"]

Shape = tuple[int, int, int]
"""Channels, height and width."""


def pair_of(size: int | Sequence[int], name: str) -> tuple[int, int]:
    """Return the height and the width: of a square from one number, else of a pair.

    Args:
        size: a number, or two; JSON keeps pairs as lists.
        name: of the argument, for the error.

    Raises:
        InputError: if it is neither, or not positive.
    """
    sides = [size, size]
    if isinstance(size, Sequence):
        sides = list(size)
    whole = [side for side in sides if isinstance(side, int) and side > 0]
    if len(sides) != 2 or len(whole) != 2:
        raise InputError(
            f"got {name} = {size!r}; write the side of a square, or a pair (height, width) of "
            "positive whole numbers"
        )
    return whole[0], whole[1]


def check_latent(shape: Shape, own: Shape, network: str) -> None:
    """Refuse a latent that a network does not take.

    Args:
        shape: of the latent, (channels, h, w).
        own: that the network takes.
        network: what it is called, for the error.

    Raises:
        InputError: if they differ.
    """
    if shape != own:
        channels, height, width = shape
        own_channels, own_height, own_width = own
        raise InputError(
            f"got a latent of {channels} channels on {height} x {width} cells; this {network} "
            f"takes {own_channels} channels on {own_height} x {own_width}"
        )
