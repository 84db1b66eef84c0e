"""What the pages say is true: programs run, commands parse, links lead somewhere.

How a page is written so that it is tested:

* Every ``python`` block runs. The blocks of a page share one namespace, in order, in an empty
  folder, with one thread and with warnings as errors.
* ``<!-- not run: REASON -->`` before a block is the only way out of it.
* ``<!-- needs: diffusers accelerate -->`` anywhere on a page skips it where one is not installed.
* ``<!-- setup`` ... ``-->`` holds Python that readers do not see, such as a folder of pictures.
* ``<!-- prints -->`` before a ``text`` block: it is what the block before it prints.
* ``pycon`` blocks are doctests; ``...`` stands for any text.
* ``bash`` blocks: ``flowspace derive`` runs; other ``flowspace`` commands are parsed, and every
  file of this repository that a command names is there.
"""

import contextlib
import doctest
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from flowspace.cli import _joined, _parser, main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "pages"
PAGES = [ROOT / "README.md", ROOT / "flowspace" / "README.md", *sorted(DOCS.rglob("*.md"))]
NOT_RUN = 4
"""Blocks of all pages together that may be left out."""

BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<kind>\w+)[^\n]*\n(?P<body>.*?)^(?P=indent)```"
    r"|^<!-- setup\n(?P<setup>.*?)^-->",
    re.MULTILINE | re.DOTALL,
)
MARK = re.compile(r"<!-- (not run|prints)(?:: *(.*?))? *-->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    kind: str
    code: str
    line: int
    mark: str
    reason: str


def named(path):
    return str(path.relative_to(ROOT))


def blocks(page):
    text = page.read_text()
    for found in BLOCK.finditer(text):
        line = text[: found.start()].count("\n") + 1
        if found["setup"] is not None:
            yield Block("python", found["setup"], line, "", "")
            continue
        mark = MARK.search(text[: found.start()])
        body = re.sub(rf"^{found['indent']}", "", found["body"], flags=re.MULTILINE)
        name, reason = (mark[1], mark[2] or "") if mark else ("", "")
        yield Block(found["kind"], body, line, name, reason)


def commands(code):
    """The commands of a ``bash`` block, without what they are joined by."""
    joined = code.replace("\\\n", " ")
    for line in joined.splitlines():
        for command in re.split(r"&&|;", line.split(" #")[0]):
            if command.strip():
                yield command.strip()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_python(block, page, names):
    code = compile("\n" * block.line + block.code, named(page), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


def run_doctest(block, page, names):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    test = doctest.DocTestParser().get_doctest(
        block.code, names, named(page), named(page), block.line
    )
    test.globs = names  # a copy otherwise
    said = io.StringIO()
    runner.run(test, out=said.write, clear_globs=False)
    assert not runner.failures, said.getvalue()
    return ""


def run_bash(block, page, names):
    printed = io.StringIO()
    for command in commands(block.code):
        words = shlex.split(command)
        if words[0].endswith("flowspace") and words[1:2] == ["derive"]:
            with contextlib.redirect_stdout(printed):
                assert main(words[1:]) == 0, command
    return printed.getvalue()


RUNS = {"python": run_python, "py": run_python, "pycon": run_doctest, "bash": run_bash}


def with_programs():
    return [page for page in PAGES if any(block.kind in RUNS for block in blocks(page))]


@pytest.mark.parametrize("page", with_programs(), ids=named)
@pytest.mark.usefixtures("one_thread")
def test_the_programs_of_a_page_run_as_written(page, tmp_path, monkeypatch):
    for needs in re.findall(r"<!-- needs: (.*?) *-->", page.read_text()):
        for module in needs.split():
            pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    names, printed = {"__name__": "page"}, ""
    for block in blocks(page):
        if block.mark == "prints":
            assert block.code.rstrip() == printed.rstrip(), f"{named(page)}:{block.line}"
        elif block.kind in RUNS and block.mark != "not run":
            printed = RUNS[block.kind](block, page, names)


def test_few_programs_are_left_out_and_each_says_why():
    left = [
        (named(page), block.line, block.reason)
        for page in PAGES
        for block in blocks(page)
        if block.mark == "not run" and block.kind != "bash"
    ]
    assert all(reason for _, _, reason in left), left
    assert len(left) <= NOT_RUN, left


@pytest.mark.parametrize("page", with_programs(), ids=named)
def test_every_command_of_a_page_is_one_that_exists(page):
    for block in blocks(page):
        if block.kind != "bash":
            continue
        for command in commands(block.code):
            words = shlex.split(command)
            for word in words:
                if re.match(r"(examples|benchmarks|tests|docs)/[\w/.-]+\.(py|yaml|md)$", word):
                    assert (ROOT / word).exists(), f"{named(page)}:{block.line}: {word}"
            if words[0].endswith("bin/flowspace") or words[0] == "flowspace":
                with contextlib.redirect_stderr(io.StringIO()):
                    _parser().parse_args(_joined(words[1:]))
