"""What the demo is asked for, checked before torch is imported: a slip is answered at once."""

import difflib
from pathlib import Path

from flowspace.errors import InputError

__all__ = [
    "NAMES",
    "OWN_SIDES",
    "SIDES",
    "check_count",
    "check_data",
    "check_out",
    "check_side",
    "namesake",
]

NAMES = ("digits", "mnist", "fashion-mnist", "openmoji", "shapes")
"""The sets that ``--data`` names; anything else is a folder of pictures."""

SIDES = (28, 32, 40, 48, 56, 64)
"""Pixels a side that the recipe of pictures suits: four to seven cells, doubled two to four
times.
"""

OWN_SIDES = {"digits": 8, "mnist": 28, "fashion-mnist": 28}
"""Pixels a side of the sets whose pictures are taken as they are."""


def check_data(name: str, side: int | None = None) -> None:
    """Refuse data that is no set and no folder, and a side that it cannot have.

    Args:
        name: one of `NAMES`, or a folder of pictures.
        side: pixels a side; None chooses.

    Raises:
        InputError: if it is neither, its name is not UTF-8, or the side is none of its own or of
            `SIDES`.
    """
    if name not in NAMES and not Path(name).is_dir():
        near = difflib.get_close_matches(name, NAMES, n=1)
        meant = "".join(f"; did you mean {word}?" for word in near)
        raise InputError(
            f"got --data {name}, which is no folder; write the folder of your pictures, or one of "
            f"{', '.join(NAMES)}{meant}"
        )
    if name.encode(errors="replace").decode() != name:
        raise InputError(
            f"got --data {name!a}, a name that is not UTF-8, which report.html cannot hold; "
            "rename the folder"
        )
    own = OWN_SIDES.get(name)
    if own is None:
        check_side(side)
    elif side not in (None, own):
        raise InputError(
            f"got --side {side} with --data {name}, whose pictures have {own} pixels a side; "
            "leave --side out"
        )


def check_side(side: int | None) -> None:
    """Refuse a side that the recipe of pictures does not suit; None chooses one.

    Raises:
        InputError: if it is none of `SIDES`.
    """
    if side is not None and side not in SIDES:
        raise InputError(f"got --side {side}; write one of {', '.join(map(str, SIDES))}")


def check_count(option: str, count: int | None) -> None:
    """Refuse a number of steps or of seeds below 1; None leaves it to the recipe.

    Raises:
        InputError: if it is below 1.
    """
    if count is not None and count < 1:
        raise InputError(f"got {option} {count}; write 1 or more")


def check_out(folder: Path) -> None:
    """Refuse a place for the run that is a file, or lies below one.

    Raises:
        InputError: if it is.
    """
    for place in (folder, *folder.parents):
        if place.is_dir():
            return
        if place.exists():
            raise InputError(
                f"got --out {folder}, but {place} is a file; write a folder, which may be new"
            )


def namesake(name: str) -> str:
    """Return what is to be said where a set is taken and a folder of its name is there, or
    nothing.
    """
    if name not in NAMES or not Path(name).is_dir():
        return ""
    return (
        f"--data {name} is the set of that name, not the folder here; for the folder write "
        f"--data ./{name}"
    )
