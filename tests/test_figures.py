"""Every measured number of a page is one that a command printed: docs/figures.py says when."""

import sys
from decimal import Decimal
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "docs"))

import figures  # pyright: ignore[reportMissingImports]

TABLES = [table for page in figures.pages() for table in figures.tables(page)]
FROM = [table for table in TABLES if table.kind == "from"]
PARAGRAPHS = [each for page in figures.pages() for each in figures.paragraphs(page)]
SOURCES = {
    source for each in [*TABLES, *PARAGRAPHS] for kind, source in each.markers if kind == "from"
}
OUTPUTS = [figures.output_of(source) for source in sorted(SOURCES)]


def place(table):
    return f"{table.page}:{table.line}"


def test_every_table_of_numbers_says_where_they_come_from():
    unsaid = [place(table) for table in TABLES if table.numeric and not table.kind]
    assert not unsaid, f"{unsaid}: docs/pages/numbers.md says what to write above a table"


@pytest.mark.parametrize("table", FROM, ids=place)
def test_every_number_of_a_table_was_printed(table):
    output = figures.output_of(table.source)
    missing = figures.misses(table, output.text)
    assert not missing, f"{place(table)} has rows that {output.path} has not: {missing}"


def test_every_measured_number_of_a_sentence_was_printed():
    unsaid = {place(each): each.unsaid() for each in PARAGRAPHS if each.unsaid()}
    assert not unsaid, f"{unsaid}: docs/pages/numbers.md says what to write above a paragraph"


def test_every_stored_output_is_of_a_page_and_says_what_it_is():
    used = {output.path for output in OUTPUTS}
    assert used == set((figures.ROOT / "docs" / "outputs").glob("*.txt"))
    for output in OUTPUTS:
        assert output.made in ("again", "alone", "by hand")
        assert all((figures.ROOT / path).exists() for path in output.code), output.path


AGAIN = {output.command: output for output in OUTPUTS if output.made == "again"}


@pytest.mark.parametrize("command", AGAIN)
def test_what_is_printed_now_is_what_was_stored(command):
    pytest.importorskip("accelerate")  # of the extra vision, which some commands need
    output = AGAIN[command]
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


@pytest.mark.parametrize(
    ("text", "unsaid"),
    [
        ("A step costs 1.07 of a plain one.", ["1.07"]),
        ("It takes 88 s, then 1,200 ms and 7 minutes.", ["88", "1200", "7"]),
        ("Of 40 % it has 118 M parameters, 3 million and 1.4 GB.", ["40", "118", "3", "1.4"]),
        ("off by 2e-02, at a distance of 131, 98 of 100", ["0.02", "131", "98"]),
        ("3,000 steps of 128 rows; Python 3.10, torch 2.9 or 2.11.1, `x = 0.5`, [a](b1.5.md)", []),
        ("arXiv 2504.07963, version 2.14.1, commit 11e0393, 8x8 pixels, t in [0, 1]", []),
    ],
)
def test_a_sentence_with_a_fraction_a_unit_or_a_distance_needs_a_source(text, unsaid):
    assert figures.Paragraph("page", 1, text, ()).unsaid() == unsaid


def test_a_sentence_is_held_to_the_comments_above_it(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    head = "command: python a.py\ncommit: 1\ncode: a.py\nmade: again\n\n"
    (tmp_path / "a.txt").write_text(head + "real 0.0063, took 88.4 s\n")
    page = tmp_path / "page.md"
    marker = "<!-- from: python a.py | a.txt -->"
    given = "<!-- given: 0.02, a setting -->"
    page.write_text(
        f"{marker}\n{given}\n\nFrom s = 0.02 it has\n0.0063 in 88 s.\n\nAnd 0.0063.\n\n"
        f"{marker}\n\n* 0.0063\n* 0.0064\n\n```text\n0.7\n```\n<!-- setup\n\n0.8\n-->\n"
    )
    found = [*figures.paragraphs(page)]
    assert [each.line for each in found] == [4, 7, 11]
    assert [each.unsaid() for each in found] == [[], ["0.0063"], ["0.0064"]]
    page.write_text("<!-- from: python b.py | a.txt -->\n\nIt has 0.0063.\n")
    with pytest.raises(ValueError, match=r"is of python a\.py"):
        next(figures.paragraphs(page)).unsaid()


def test_what_stands_in_a_table_that_is_made_again_word_by_word_is_left_to_that_test(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- table: python a.py -->\n| a | b |\n| - | - |\n| c | 1.0 |\n\n40 %, assumed\n"
        "<!-- end of table -->\n\n50 %, measured\n"
    )
    assert [each.unsaid() for each in figures.paragraphs(page)] == [[], ["50"]]
    assert [each.kind for each in figures.tables(page)] == ["table"]
