"""Where the numbers of the pages come from: lists what is out of date, makes outputs again.

    python docs/figures.py                          # what is older than its code, what is by hand
    python docs/figures.py docs/outputs/NAME.txt    # run its command again and store the output

A comment above a table names the command that prints it and the file that keeps what it printed.
`docs/pages/numbers.md` says how to write one; `tests/test_figures.py` holds the tables to them.
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

__all__ = ["Output", "Table", "misses", "pages", "tables"]

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = ROOT / "docs" / "outputs"

MARKER = re.compile(r"<!-- (from|cited|table): (.+?) -->")
"""``table`` holds for all tables down to the next ``end of table``, which tests/test_cost.py makes
again word by word.
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
    def command(self) -> str:
        """The command that prints it."""
        return self.source.rpartition(" | ")[0]

    @property
    def output(self) -> "Output":
        """What the command printed."""
        return Output.read(ROOT / self.source.rpartition(" | ")[2])


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


def git(*words: str) -> str:
    """Return what git prints."""
    return subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def pages() -> list[Path]:
    """Return the pages whose tables are held to their commands."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").glob("*.md"))]
    return [*found, *sorted((ROOT / "examples").glob("*/README.md"))]


def tables(page: Path) -> Iterator[Table]:
    """Return the tables of a page, each with the marker that stands above it."""
    marker = ("", "")
    rows: list[tuple[str, ...]] = []
    fenced = False
    for number, indented in enumerate([*page.read_text().splitlines(), ""], 1):
        line = indented.strip()
        fenced ^= line.startswith("```")
        if line.startswith("|") and not fenced:
            rows.append(tuple(cell.strip() for cell in line.strip("|").split("|")))
            continue
        if rows:
            name = str(page.relative_to(ROOT))
            yield Table(name, number - len(rows), tuple(rows[2:]), *marker)
            rows = []
            if marker[0] != "table":
                marker = ("", "")
        found = MARKER.fullmatch(line)
        if found:
            marker = (found[1], found[2])
        elif line and (marker[0] != "table" or "end of table" in line):
            marker = ("", "")


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
    """List the outputs that are older than their code, and those that no command has made."""
    for path in sorted(OUTPUTS.glob("*.txt")):
        output = Output.read(path)
        newer = output.changed()
        if not newer and output.made != "by hand":
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
