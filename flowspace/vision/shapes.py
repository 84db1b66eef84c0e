"""Heights and widths: of images, and of grids of cells."""

from collections.abc import Sequence

from flowspace.errors import InputError

__all__ = ["pair_of"]


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
