"""Pictures of a folder, read once: flat or one folder a class, of any sizes, grey or in colour.

What cannot be read is left out, counted and named; it never ends a run. Reading is bounded as in
`flowspace.vision.data`, whose `Images` does it.
"""

import os
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from flowspace.demo.request import check_side
from flowspace.errors import InputError
from flowspace.vision.data import BROKEN, FORMATS, SUFFIXES, Images, check_file, check_shape

__all__ = [
    "FEWEST",
    "FEWEST_OF_A_CLASS",
    "FoundPictures",
    "read_folder",
]

FEWEST = 20
"""Pictures in a folder, of which a quarter is held out."""

FEWEST_OF_A_CLASS = 8
"""Of which two are held out; the other six train all networks."""

COMMON_SIDES = (28, 32, 48, 64)
"""Of which one is taken where none is asked for."""

MOST_LOOKED_AT = 500
"""Pictures whose sizes are looked at to choose a side."""

MANY = 1000
"""From so many pictures on, reading shows how far it is."""

MOST_NAMED = 5

NO_ENDING = "without an ending"
"""What files such as ``README`` are counted under."""

TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")
"""Modes of pictures that may be transparent."""

SYSTEM = ("__MACOSX",)
"""Folders that systems leave, besides those whose names begin with a dot."""


@dataclass(frozen=True)
class FoundPictures:
    """What a folder held.

    Attributes:
        pixels: uint8 ``(N, C, side, side)``: one channel where every picture is grey, else three.
        labels: the class of each, ``(N,)``.
        class_names: in the order of the labels.
        conditional: whether there are classes: False for a flat folder.
        skipped: files that could not be read, by name, and why.
        ignored: how many other files there were, by their ending.
    """

    pixels: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    conditional: bool
    skipped: dict[str, str]
    ignored: dict[str, int]


def read_folder(root: Path | str, side: int | None = None) -> FoundPictures:
    """Read the pictures of a folder, cropped to their middle square and scaled to one side.

    A folder that holds folders has one class for each of them, and whatever lies deeper belongs
    to it. A folder that holds one folder alone stands for that one. Transparent pictures are laid
    on white, and pictures are turned as their cameras say.

    Args:
        root: the folder.
        side: pixels a side: 28, 32, 40, 48, 56 or 64. None takes 28, 32, 48 or 64, the largest
            that is no larger than the shorter side of half of the pictures.

    Raises:
        InputError: if it is no folder, holds no pictures, too few of them, or pictures beside
            folders of pictures; if the name of a class is not UTF-8; if the side is none of those.
    """
    check_side(side)
    root = _innermost(Path(root))
    groups, ignored, empty = _files_by_class(root)
    _check_names(root, groups)
    conditional = len(groups) > 1
    paths, labels = [], []
    for label, files in enumerate(groups.values()):
        paths += files
        labels += [label] * len(files)
    names = tuple(groups)
    images = PictureFiles(paths, labels, names, side or _common_side(paths))
    pixels, kept = images.read()
    skipped = {printable(name): printable(why) for name, why in images.broken.items()}
    found = FoundPictures(pixels, torch.tensor(labels)[kept], names, conditional, skipped, ignored)
    _check_counts(root, found)
    _warn(root, found, empty)
    return found


class PictureFiles(Images):
    """Picture files with the class of each.

    Args:
        paths: of the files.
        labels: the class of each.
        names: of the classes.
        size: pixels a side.
    """

    def __init__(
        self, paths: Sequence[Path], labels: Sequence[int], names: Sequence[str], size: int
    ) -> None:
        super().__init__(size, labels, names)
        self.paths = tuple(paths)

    def open(self, index: int) -> Image.Image:
        """Open one file: turned as its camera says, and laid on white where it is transparent."""
        check_file(self.paths[index])
        with Image.open(self.paths[index], formats=FORMATS) as held:
            check_shape(held)  # before anything is decoded
            picture = ImageOps.exif_transpose(held)  # a copy
        if "transparency" in picture.info or picture.mode in TRANSPARENT:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(white, picture)
        return picture

    def name(self, index: int) -> str:
        """Return the path of one file."""
        return str(self.paths[index])

    def read(self) -> tuple[Tensor, Tensor]:
        """Return the pixels of all that can be read, uint8 ``(N, C, size, size)``, and which
        these are, a mask over the files.
        """
        pixels = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        kept = torch.zeros(len(self), dtype=torch.bool)
        rows = tqdm(range(len(self)), "reading", unit="picture", disable=len(self) < MANY)
        for index in rows:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is broken is said once, at the end
                found = self._pixels(index)
            if found is not None:
                pixels[index] = found
                kept[index] = True
        if not bool(kept.all()):
            pixels = pixels[kept]
        first = pixels[:, :1]
        if bool((pixels == first).all()):
            pixels = first.clone()
        return pixels, kept


# --- which files
# -------------------------------------------------------------------------------------------------


def _innermost(root: Path) -> Path:
    """Return the folder that holds pictures or several folders: archives often wrap it in
    others.
    """
    if not root.is_dir():
        raise InputError(
            f"got --data {root}, which is no folder; write the folder of your pictures"
        )
    while True:
        entries = list(_visible(root))
        folders = [entry for entry in entries if entry.is_dir()]
        pictures = any(entry.suffix.lower() in SUFFIXES for entry in entries)
        if pictures or len(folders) != 1:
            return root
        root = folders[0]


def _visible(folder: Path) -> Iterator[Path]:
    """Yield what a folder holds, sorted, but for what systems hide."""
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith(".") and entry.name not in SYSTEM:
            yield entry


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield all files of a folder and of those in it, sorted; links to folders are not
    followed.
    """
    for entry in _visible(folder):
        if not entry.is_dir():
            yield entry
        elif not entry.is_symlink():
            yield from _files_below(entry)


def _files_by_class(root: Path) -> tuple[dict[str, list[Path]], dict[str, int], list[str]]:
    """Return the picture files by the name of their class, how many other files there are by their
    ending, and the names of folders without pictures.
    """
    ignored: Counter[str] = Counter()
    empty: list[str] = []

    def pictures(files: Iterator[Path] | list[Path]) -> list[Path]:
        found = []
        for path in files:
            if path.suffix.lower() in SUFFIXES:
                found.append(path)
            else:
                ignored[path.suffix.lower() or NO_ENDING] += 1
        return found

    entries = list(_visible(root))
    loose = pictures([entry for entry in entries if not entry.is_dir()])
    groups = {}
    for entry in entries:
        if entry.is_dir():
            found = pictures(_files_below(entry))
            if found:
                groups[entry.name] = found
            else:
                empty.append(entry.name)
    if loose and groups:
        raise InputError(
            f"{root} holds {len(loose)} pictures beside folders of pictures "
            f"({', '.join(list(groups)[:MOST_NAMED])}); move them into folders of classes, or "
            "give a folder that holds pictures alone"
        )
    if loose:
        groups = {root.resolve().name: loose}
    if not groups:
        raise InputError(
            f"{root} holds no pictures; known are {', '.join(sorted(SUFFIXES))}{_others(ignored)}"
        )
    return groups, dict(ignored), empty


def _others(ignored: Counter[str]) -> str:
    """Say which other files there are."""
    if not ignored:
        return ""
    named = ", ".join(f"{count} {ending}" for ending, count in ignored.most_common(MOST_NAMED))
    return f"; it holds other files ({named}): if they are pictures, convert them to PNG"


def _common_side(paths: Sequence[Path]) -> int:
    """Return the largest common side that half of the pictures reach."""
    shorter = []
    stride = -(-len(paths) // MOST_LOOKED_AT)
    for path in paths[::stride]:
        try:
            check_file(path)
            with Image.open(path, formats=FORMATS) as picture:
                shorter.append(min(picture.size))
        except BROKEN:
            continue
    middle = statistics.median(shorter or [0])
    return max([side for side in COMMON_SIDES if side <= middle], default=COMMON_SIDES[0])


def _check_names(root: Path, names: Iterable[str]) -> None:
    """Refuse names of classes that no page and no JSON file can hold."""
    for name in names:
        if printable(name) != name:
            raise InputError(
                f"{printable(str(root))}: the name of the class {printable(name)} is not UTF-8; "
                "rename its folder"
            )


def printable(name: str) -> str:
    """Return a name, each byte that is not UTF-8 in hexadecimal."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# --- whether they are enough
# -------------------------------------------------------------------------------------------------


def _check_counts(root: Path, found: FoundPictures) -> None:
    """Refuse folders that cannot be split into what trains and what judges."""
    if len(found.labels) < FEWEST:
        raise InputError(
            f"{root} holds {len(found.labels)} pictures that can be read{_left_out(found)}; give "
            f"{FEWEST} or more, better 300"
        )
    if not found.conditional:
        return
    counts = torch.bincount(found.labels, minlength=len(found.class_names)).tolist()
    sizes = dict(zip(found.class_names, counts, strict=True))
    small = [name for name, count in sizes.items() if count < FEWEST_OF_A_CLASS]
    if small:
        named = ", ".join(f"{name} ({sizes[name]})" for name in small[:MOST_NAMED])
        raise InputError(
            f"{root}: {len(small)} of {len(sizes)} classes hold fewer than {FEWEST_OF_A_CLASS} "
            f"pictures that can be read: {named}; add pictures, take these folders away, or put "
            "all pictures into one folder to train without classes"
        )


def _left_out(found: FoundPictures) -> str:
    """Say how many files were left out, and name the first of them."""
    if not found.skipped:
        return ""
    named = ", ".join(os.path.basename(name) for name in list(found.skipped)[:MOST_NAMED])
    return f" ({len(found.skipped)} could not be read: {named})"


def _warn(root: Path, found: FoundPictures, empty: Sequence[str]) -> None:
    """Say once what was left out: files, and folders without pictures."""
    if empty:
        named = ", ".join(printable(name) for name in empty[:MOST_NAMED])
        warnings.warn(
            f"{len(empty)} folders of {root} hold no pictures and are no classes: {named}",
            stacklevel=3,
        )
    if found.skipped:
        whole = len(found.skipped) + len(found.labels)
        name, why = next(iter(found.skipped.items()))
        warnings.warn(
            f"{len(found.skipped)} of {whole} pictures of {root} cannot be read and are left out"
            f"; the first is {name}: {why}",
            stacklevel=3,
        )
