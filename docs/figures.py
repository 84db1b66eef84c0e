"""Where the numbers of the pages come from: lists what is out of date, makes outputs again.

    python docs/figures.py                          # what is older than its code, what is by hand
    python docs/figures.py docs/outputs/NAME.txt    # run its command again and store the output

A comment above a table, or above a paragraph with a measured number, names the command that
prints it and the file that keeps what it printed. `docs/pages/numbers.md` says how to write one;
`tests/test_figures.py` holds tables and paragraphs to them.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

__all__ = ["Output", "Paragraph", "Table", "misses", "output_of", "pages", "paragraphs", "tables"]

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = ROOT / "docs" / "outputs"

MARKER = re.compile(r"<!-- (from|cited|given|table): (.+?) -->")
"""``table`` holds for all that stands above the next ``end of table``, which tests/test_cost.py
makes again word by word; the others hold for the next table or paragraph.
"""

END = "<!-- end of table -->"

HIDDEN = re.compile(r"^ *```.*?^ *```|<!--.*?-->", re.MULTILINE | re.DOTALL)
"""Code, and comments that are no markers."""

WHOLE = r"\d+(?:,\d{3})*"
UNIT = r"(?:%|(?:s|ms|(?:milli)?seconds?|minutes?|hours?|[MG]i?B|GFLOPs|M|million|times)\b)"
RESULT = re.compile(
    r"(?<![\w.-])(?:"
    rf"-?{WHOLE}(?:\.\d+(?:e[-+]\d+)?|e[-+]\d+)(?!\.?\d)"
    rf"|{WHOLE}(?= ?{UNIT}| of (?:the )?\d)"
    rf"|(?:(?<=distance )|(?<=distance of )){WHOLE})"
)
"""A number that may have been measured: a fraction, with a unit, so many of many, a distance."""

UNMEASURED = re.compile(
    r"`[^`]*`|\]\([^)]*\)|arXiv [\d.]+|^[?!]{3}.*"
    r"|\b(?:Python|torch|jax|SA) \d+(?:\.\d+)+(?:(?: and|,| or) \d+(?:\.\d+)+)*",
    re.IGNORECASE | re.MULTILINE,
)
"""What no number is read from: code, addresses, names of papers, titles of what unfolds, versions.
"""

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")

CELL = re.compile(r"[-<>*~ ]*\d[\d,.]*(?:e[-+]?\d+)?[*%]*(?: [MGx%±/].*| ?\(.*)?")
"""A cell that is a number, perhaps with its unit or its spread; formulas and sentences are not."""


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        page: from the root of the repository.
        line: of its head, counted from 1.
        rows: the cells of each row below the head.
        kind: ``from``, ``cited``, ``table``, or nothing where there is no marker above it.
        source: what the marker says.
    """

    page: str
    line: int
    rows: tuple[tuple[str, ...], ...]
    kind: str
    source: str

    @property
    def numeric(self) -> bool:
        """Whether a cell beside the first column is a number."""
        return any(CELL.fullmatch(cell) for row in self.rows for cell in row[1:])

    @property
    def markers(self) -> tuple[tuple[str, str], ...]:
        """The comment above it, as a paragraph has them."""
        return ((self.kind, self.source),)


@dataclass(frozen=True)
class Paragraph:
    """A paragraph or a list of a page.

    Attributes:
        page: from the root of the repository.
        line: of its first line, counted from 1.
        text: its words.
        markers: kind and source of each comment above it: ``from``, or ``cited`` or ``given``
            with the numbers that need no command.
    """

    page: str
    line: int
    text: str
    markers: tuple[tuple[str, str], ...]

    def unsaid(self) -> list[str]:
        """Return the numbers that stand neither in an output nor in a comment above it."""
        printed: list[Decimal] = []
        told: list[Decimal] = []
        for kind, source in self.markers:
            if kind == "table":
                return []
            if kind == "from":
                printed += numbers(output_of(source).text)
            else:
                told += numbers(source)
        words = UNMEASURED.sub(" ", self.text)
        found = numbers(" ".join(RESULT.findall(words)))
        return [str(each) for each in found if each not in told and not stands(each, printed)]


@dataclass(frozen=True)
class Output:
    """What a command printed, as it is kept.

    Attributes:
        path: of the file.
        command: that printed it.
        commit: of the code that ran.
        code: files and folders that the output depends on.
        made: ``again`` where the tests run the command, ``alone`` where it takes too long for
            them or is a measurement of time, ``by hand`` where the page itself was copied.
        text: what was printed.
    """

    path: Path
    command: str
    commit: str
    code: tuple[str, ...]
    made: str
    text: str

    @classmethod
    def read(cls, path: Path) -> "Output":
        """Read a stored output: lines of a name and a value, an empty line, what was printed."""
        head, _, text = path.read_text().partition("\n\n")
        said = dict(line.split(": ", 1) for line in head.splitlines())
        code = tuple(said["code"].split())
        return cls(path, said["command"], said["commit"], code, said["made"], text)

    def write(self, text: str, commit: str) -> None:
        """Store what the command printed now."""
        made = self.made.replace("by hand", "alone")
        head = f"command: {self.command}\ncommit: {commit}\ncode: {' '.join(self.code)}\n"
        self.path.write_text(f"{head}made: {made}\n\n{text}")

    def printed(self) -> str:
        """Run the command and return what it prints."""
        words = shlex.split(self.command)
        if words[0] not in ("python", "flowspace"):
            raise SystemExit(f"no command makes {self.path.name}: {self.command}")
        words[0] = str(Path(sys.executable).with_name(words[0]))
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        run = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{self.command} failed: {run.stderr[-2000:]}")
        return run.stdout

    def changed(self) -> list[str]:
        """Return the commits that changed its code after it was made, the newest first."""
        commits = f"{self.commit}..HEAD"
        return git("log", "--format=%h %s", commits, "--", *self.code).splitlines()


def output_of(source: str) -> Output:
    """Return the output that a comment names.

    Raises:
        ValueError: if the output is of another command than the comment says.
    """
    command, _, path = source.rpartition(" | ")
    output = Output.read(ROOT / path)
    if output.command != command:
        raise ValueError(f"{path} is of {output.command}, a comment says {command}")
    return output


def git(*words: str) -> str:
    """Return what git prints."""
    return subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def pages() -> list[Path]:
    """Return the pages whose numbers are held to their commands."""
    found = [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs" / "pages").glob("*.md")),
    ]
    return [*found, *sorted((ROOT / "examples").glob("*/README.md"))]


def blocks(page: Path) -> Iterator[tuple[int, list[str], tuple[tuple[str, str], ...]]]:
    """Return the tables and paragraphs: first line, lines, and the markers above each."""
    markers: list[tuple[str, str]] = []
    lines: list[str] = []
    start = 0
    text = HIDDEN.sub(without_words, page.read_text())
    for number, indented in enumerate([*text.splitlines(), ""], 1):
        line = indented.strip()
        found = MARKER.fullmatch(line)
        other = bool(lines) and line.startswith("|") != lines[0].startswith("|")
        if lines and (not line or found or other or line == END):
            yield start, lines, tuple(markers)
            lines = []
            markers = [each for each in markers if each[0] == "table"]
        if found:
            markers.append((found[1], found[2]))
        elif line == END:
            markers = []
        elif line:
            start = start if lines else number
            lines.append(line)


def without_words(hidden: re.Match[str]) -> str:
    """Return what keeps the place of code or of a comment, on as many lines."""
    if MARKER.fullmatch(hidden[0]) or hidden[0] == END:
        return hidden[0]
    return "<" + "\n" * hidden[0].count("\n")


def tables(page: Path) -> Iterator[Table]:
    """Return the tables of a page, each with the marker that stands above it."""
    name = str(page.relative_to(ROOT))
    for line, lines, markers in blocks(page):
        if lines[0].startswith("|"):
            rows = [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in lines]
            kind, source = markers[-1] if markers else ("", "")
            yield Table(name, line, tuple(rows[2:]), kind, source)


def paragraphs(page: Path) -> Iterator[Paragraph]:
    """Return the paragraphs and lists of a page, each with the markers that stand above it."""
    name = str(page.relative_to(ROOT))
    for line, lines, markers in blocks(page):
        if lines[0][0] not in "|#<":
            yield Paragraph(name, line, " ".join(lines), markers)


def misses(table: Table, text: str) -> list[str]:
    """Return the rows of a table whose numbers, rounded, stand in no one line of a text.

    The first column names the row, and is not looked at.
    """
    lines = [numbers(line) for line in text.splitlines()]
    missing = []
    for row in table.rows:
        wanted = numbers(" | ".join(row[1:]))
        if not any(all(stands(number, line) for number in wanted) for line in lines):
            missing.append(" | ".join(row))
    return missing


def numbers(text: str) -> list[Decimal]:
    """Return the numbers of a text, with the digits that were written."""
    return [Decimal(found.replace(",", "")) for found in NUMBER.findall(text)]


def stands(number: Decimal, line: list[Decimal]) -> bool:
    """Whether a line has a number that is this one once it is rounded to as many digits."""
    half = Decimal(5).scaleb(int(number.as_tuple().exponent) - 1)
    return any(abs(other - number) <= half for other in line)


def out_of_date() -> None:
    """List the outputs that are older than their code, and those that no command has made.

    What the tests make again cannot be older.
    """
    for path in sorted(OUTPUTS.glob("*.txt")):
        output = Output.read(path)
        newer = output.changed()
        if output.made == "again" or (not newer and output.made != "by hand"):
            continue
        print(f"{path.relative_to(ROOT)}, made {output.made} at {output.commit}")
        print(f"    {len(newer)} later changes of {', '.join(output.code)}")
        print(f"    {output.command}")


def main() -> None:
    """List what is out of date, or make the outputs that are named again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", nargs="*", type=Path, metavar="docs/outputs/NAME.txt", help="to be made again"
    )
    paths = parser.parse_args().paths
    for path in paths:
        if path.resolve() not in OUTPUTS.glob("*.txt"):
            parser.error(f"got {path}, which is no output; write a file of docs/outputs/")
    for path in paths:
        output = Output.read(path.resolve())
        output.write(output.printed(), git("rev-parse", "--short", "HEAD").strip())
    if not paths:
        out_of_date()


if __name__ == "__main__":
    main()
