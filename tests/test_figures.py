"""Every number of a table is one that a command printed: docs/figures.py says which and when."""

import sys
from decimal import Decimal
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "docs"))

import figures  # pyright: ignore[reportMissingImports]

TABLES = [table for page in figures.pages() for table in figures.tables(page)]
FROM = [table for table in TABLES if table.kind == "from"]


def place(table):
    return f"{table.page}:{table.line}"


def test_every_table_of_numbers_says_where_they_come_from():
    unsaid = [place(table) for table in TABLES if table.numeric and not table.kind]
    assert not unsaid, f"{unsaid}: docs/pages/numbers.md says what to write above a table"


@pytest.mark.parametrize("table", FROM, ids=place)
def test_every_number_of_a_table_was_printed(table):
    assert table.output.command == table.command
    missing = figures.misses(table, table.output.text)
    assert not missing, f"{place(table)} has rows that {table.output.path} has not: {missing}"


def test_every_stored_output_is_of_a_table_and_says_what_it_is():
    used = {table.output.path for table in FROM}
    assert used == set((figures.ROOT / "docs" / "outputs").glob("*.txt"))
    for output in map(figures.Output.read, used):
        assert output.made in ("again", "alone", "by hand")
        assert all((figures.ROOT / path).exists() for path in output.code), output.path


AGAIN = {table.command: table for table in FROM if table.output.made == "again"}


@pytest.mark.parametrize("command", AGAIN)
def test_what_is_printed_now_is_what_was_stored(command):
    pytest.importorskip("accelerate")  # of the extra vision, which some commands need
    output = AGAIN[command].output
    assert output.printed() == output.text, f"write: python docs/figures.py {output.path}"


# --- the laws of the check itself


def table(*rows):
    return figures.Table("page", 1, rows, "from", "python a.py | a.txt")


@pytest.mark.parametrize(
    ("written", "printed", "stands"),
    [
        ("0.98", "0.9849", True),
        ("0.98", "0.9851", False),
        ("-0.0", "-0.04", True),
        ("6e-07", "6.4e-07", True),
        ("6e-07", "5e-07", False),
        ("1,234", "1234", True),
        ("12", "12.6", False),
    ],
)
def test_a_number_is_what_was_printed_rounded(written, printed, stands):
    assert (not figures.misses(table(("a", written)), f"| a | {printed} |")) == stands


def test_the_numbers_of_a_row_stand_in_one_line():
    row = table(("a", "1.0", "2.0 (1.5 to 2.5)"))
    assert not figures.misses(row, "other 9\na 1.0 2.0 1.5 2.5")
    assert figures.misses(row, "a 1.0 2.0\nb 1.5 2.5") == ["a | 1.0 | 2.0 (1.5 to 2.5)"]


@pytest.mark.parametrize("cell", ["0.98", "-0.1", "**1.98**", "> 1e3", "118.2 M", "1.1 (1 to 2)"])
def test_a_cell_that_is_a_number_needs_a_source(cell):
    assert table(("a", cell)).numeric


@pytest.mark.parametrize("cell", ["1 - t", "0 is data", "t = 0", "", "-", "1/t - 1/s", "`b-256`"])
def test_formulas_and_words_need_none(cell):
    assert not table(("1.0", cell)).numeric


def test_a_marker_holds_for_the_table_under_it_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    one = "| a | b |\n| --- | --- |\n| c | 1.0 |\n"
    fenced = f"```text\n{one}```\n"
    page.write_text(f"<!-- cited: a paper -->\n\n{one}\n{fenced}\n{one}")
    found = [*figures.tables(page)]
    assert [each.kind for each in found] == ["cited", ""]
    assert [each.line for each in found] == [3, 13]


def test_numbers_are_read_with_the_digits_that_were_written():
    numbers = figures.numbers("v2, x1.0, 1,000 (0.50 to -3e-07)")
    assert numbers == [1000, Decimal("0.50"), Decimal("-3e-07")]
