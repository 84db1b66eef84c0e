"""What the pages say is true: programs run, commands parse, links lead somewhere.

How a page is written so that it is tested:

* Every ``python`` block runs. The blocks of a page share one namespace, in order, in an empty
  folder, with one thread and with warnings as errors.
* ``<!-- not run: REASON -->`` before a block is the only way out of it.
* ``<!-- shortened: 3000 to 20 -->`` before a block: the test writes 20 for 3000.
* ``<!-- needs: diffusers accelerate -->`` anywhere on a page skips it where one is not installed.
* ``<!-- setup`` ... ``-->`` holds Python that readers do not see, such as a folder of pictures.
* ``<!-- prints -->`` before a ``text`` block: it is what the block before it prints.
* ``pycon`` blocks are doctests; ``...`` stands for any text.
* ``bash`` blocks: ``flowspace derive`` runs; other ``flowspace`` commands are parsed, and every
  file of this repository that a command names is there.
"""

import argparse
import contextlib
import doctest
import importlib
import inspect
import io
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo

import flowspace
from flowspace.cli import main
from flowspace.derivatives import rules
from flowspace.derivatives.hidden_calls import follows_compiled

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
MARK = re.compile(r"<!-- (not run|prints|shortened)(?:: *([^>]*?))? *-->\s*\Z")


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
def alone():
    """One thread, torch.compile's own limit, which a run with compiled blocks has raised, and no
    rule of a derivative stays that a page adds.
    """
    threads, known = torch.get_num_threads(), dict(rules.RULES)
    torch.set_num_threads(1)
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch.set_num_threads(threads)
    rules.RULES.clear()
    rules.RULES.update(known)


def run_python(block, page, names):
    text = block.code
    if block.mark == "shortened":
        long, short = block.reason.split(" to ")
        assert text.count(long) == 1, f"{named(page)}:{block.line}: {long}"
        text = text.replace(long, short)
    code = compile("\n" * block.line + text, named(page), "exec")
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
@pytest.mark.usefixtures("alone")
def test_the_programs_of_a_page_run_as_written(page, tmp_path, monkeypatch):
    for module in sorted(needed(page)):
        pytest.importorskip(module)
    if page.stem == "with_compile" and not follows_compiled():
        pytest.skip("what is compiled runs compiled from torch 2.11 on")
    monkeypatch.chdir(tmp_path)
    names, printed = {"__name__": "page"}, ""
    for block in blocks(page):
        if block.mark == "prints":
            assert block.code.rstrip() == printed.rstrip(), f"{named(page)}:{block.line}"
        elif block.kind in RUNS and block.mark != "not run":
            printed = RUNS[block.kind](block, page, names)


def needed(page):
    """The libraries that a page says it needs."""
    return {
        module
        for needs in re.findall(r"<!-- needs: (.*?) *-->", page.read_text())
        for module in needs.split()
    }


@pytest.mark.parametrize("page", with_programs(), ids=named)
def test_a_page_says_which_libraries_it_needs(page):
    """Beyond those of the core; what is for pictures needs diffusers."""
    imported = set()
    for block in blocks(page):
        if block.kind in ("python", "pycon") and block.mark != "not run":
            code = re.sub(r"^(>>>|\.\.\.) ", "", block.code, flags=re.MULTILINE)
            imported.update(re.findall(r"^ *(?:from|import) ([\w.]+)", code, re.MULTILINE))
    if any(module.startswith("flowspace.vision") for module in imported):
        imported.add("diffusers")
    packages = {module.split(".")[0] for module in imported}
    known = set(sys.stdlib_module_names) | {"flowspace", "numpy", "pytest", "sympy", "torch"}
    assert packages - known <= needed(page), packages - known - needed(page)


def test_few_programs_are_left_out_and_each_says_why():
    left = [
        (named(page), block.line, block.reason)
        for page in PAGES
        for block in blocks(page)
        if block.mark == "not run" and block.kind != "bash"
    ]
    assert all(reason for _, _, reason in left), left
    assert len(left) <= NOT_RUN, left


@pytest.fixture
def only_parsed(monkeypatch, tmp_path):
    """Commands are parsed, and then do nothing."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self, args=None, namespace=None):
        options, rest = parse(self, args, namespace)
        options.command = lambda _: 0
        return options, rest

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", with_programs(), ids=named)
@pytest.mark.usefixtures("only_parsed")
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
                assert main(words[1:]) == 0


@pytest.mark.parametrize("page", with_programs(), ids=named)
def test_what_is_installed_and_run_is_of_the_virtual_environment(page):
    bash = [block for block in blocks(page) if block.kind == "bash"]
    for block in bash:
        for command in commands(block.code):
            first = re.sub(r"^([A-Z_]+=\S+ )*", "", command).split()[0]
            assert first not in ("pip", "python", "pytest", "flowspace"), (
                f"{named(page)}:{block.line}: write .venv/bin/{first}"
            )


# --- links ---------------------------------------------------------------------------------------


def without_code(text):
    return re.sub(r"^( *)```.*?^\1```|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)


def slug(heading):
    """The anchor that code hosts and mkdocs make of a heading."""
    words = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading).strip().lower())
    return re.sub(r"[\s]+", "-", words)


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {slug(heading) for heading in headings}


LINKING = [
    *PAGES,
    *sorted((ROOT / "examples").glob("*/README.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
]


@pytest.mark.parametrize("page", LINKING, ids=named)
def test_every_link_leads_to_a_file_and_a_heading(page):
    text = without_code(page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)|<a href=\"([^\"]+)\"", text):
        address = link[0] or link[1]
        if re.match(r"(https?|mailto):", address):
            continue
        path, _, anchor = address.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{named(page)}: {address}"
        names_code = anchor.startswith("flowspace.")  # mkdocs looks at those of the reference
        if anchor and not names_code:
            assert anchor in anchors(target), f"{named(page)}: {address}"


def cells(row):
    """How many cells a row of a table has: code between backticks does not hide a bar."""
    return len(re.findall(r"(?<!\\)\|", row.strip())) - 1


@pytest.mark.parametrize("page", LINKING, ids=named)
def test_every_row_of_a_table_has_the_cells_of_its_head(page):
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^ *\|.*\|\n?)+", text, re.MULTILINE):
        head, *rows = table.strip().splitlines()
        for row in rows:
            assert cells(row) == cells(head), f"{named(page)}: {row}"


FORMULA_PLACES = [*PAGES[2:], *sorted((ROOT / "flowspace").rglob("*.py"))]
"""Pages, and docstrings that the reference shows."""


def test_every_formula_of_a_line_is_a_paragraph_of_its_own():
    """Two in one paragraph are drawn as one, with the signs between them."""
    for place in FORMULA_PLACES:
        lines = place.read_text().splitlines()
        for number, line in enumerate(lines):
            if line.strip().startswith("$$"):
                assert not lines[number - 1].strip(), f"{named(place)}:{number + 1}"


def pages_of_nav():
    nav = (ROOT / "docs" / "mkdocs.yml").read_text().split("\nnav:")[1]
    return re.findall(r": ([\w/]+\.md)$", nav, re.MULTILINE)


def test_every_page_is_in_the_navigation_once():
    written = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    notebooks = {
        f"notebooks/{path.stem}.md" for path in (DOCS.parent / "notebooks").glob("*.ipynb")
    }
    nav = pages_of_nav()
    assert written | notebooks == set(nav) and len(nav) == len(set(nav))


@pytest.fixture(scope="module")
def llms():
    """The hook that writes the map of the site for language models."""
    pytest.importorskip("mkdocs")
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "llms.py")))


def test_the_map_for_language_models_has_a_sentence_of_every_page(llms):
    for page in PAGES[2:]:
        sentence = llms.first_sentence(page.read_text())
        assert re.match(r"[A-Za-z`].{20,}", sentence), f"{named(page)}: {sentence!r}"
        assert not re.search(r"\]\(|<|\n", sentence), f"{named(page)}: {sentence!r}"


def test_the_map_for_language_models_lists_the_navigation_in_its_order(llms):
    nav = [{"A": "index.md"}, {"B": [{"C": "c.md"}, {"D": [{"E": "e/f.md"}]}]}]
    assert list(llms.listed(nav)) == [
        ("", "A", "index.md"),
        ("B", "C", "c.md"),
        ("D", "E", "e/f.md"),
    ]
    assert [llms.address(page) for page in ("index.md", "c.md", "e/f.md")] == ["./", "c/", "e/f/"]


# --- the reference -------------------------------------------------------------------------------

REFERENCE = [DOCS / f"reference{part}.md" for part in ("", "_vision", "_training")]
PUBLIC = [
    "flowspace",
    "flowspace.demo.picture_networks",
    "flowspace.demo.pictures",
    "flowspace.derivatives",
    "flowspace.training",
    "flowspace.vision",
]
BUILT_BY = {"Adapter": "adapt"}
"""Classes that nobody makes by hand, and the function that says what they are made of."""


def public():
    """Every public object that can be called, by its full name."""
    for module in PUBLIC:
        package = importlib.import_module(module)
        for name in package.__all__:
            yield module, name


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_on_a_page_of_reference(module):
    shown = set(flowspace.errors.__all__)
    for page in REFERENCE:
        for members in re.findall(r"[ {]members: \[(.*?)\]", page.read_text()):
            shown.update(members.split(", "))
    missing = set(importlib.import_module(module).__all__) - shown
    assert not missing


def documented(doc):
    """The names in the sections Args and Attributes of a docstring."""
    names = set()
    sections = re.findall(r"^(?:Args|Attributes):\n((?:^(?: .*)?\n?)+)", doc, re.MULTILINE)
    for section in sections:
        for listed in re.findall(r"^ {4}([\w, *]+?):", section, re.MULTILINE):
            names.update(re.split(r"[, *]+", listed))
    return names


def of_class(cls):
    """The docstrings of a class and its bases here, and the code that makes an object."""
    docs, sources = [], []
    for base in cls.__mro__:
        if not base.__module__.startswith("flowspace"):
            continue
        docs.append(inspect.cleandoc(base.__doc__ or ""))
        for method in ("__init__", "__post_init__"):
            made = base.__dict__.get(method)
            if made is not None and made.__code__.co_filename == inspect.getsourcefile(base):
                docs.append(inspect.cleandoc(made.__doc__ or ""))
                sources.append(inspect.getsource(made))
    return "\n\n".join(docs), "".join(sources)


def asked(thing):
    """What the docstring of a callable is held to: its text, its arguments, its code."""
    if inspect.isclass(thing):
        doc, source = of_class(thing)
    else:
        doc, source = inspect.getdoc(thing) or "", inspect.getsource(thing)
    arguments = set(inspect.signature(thing).parameters)
    return doc, {name for name in arguments if not name.startswith("_")}, source


@pytest.mark.parametrize(("module", "name"), public())
def test_every_public_docstring_says_what_it_takes_and_raises(module, name):
    if module == "flowspace.vision":
        pytest.importorskip("diffusers")
        pytest.importorskip("timm")
    package = importlib.import_module(module)
    thing = getattr(package, name)
    is_error = inspect.isclass(thing) and issubclass(thing, Exception)
    if not callable(thing) or is_error or getattr(thing, "_is_protocol", False):
        return
    doc, arguments, source = asked(thing)
    if name in BUILT_BY:
        doc += "\n\n" + (inspect.getdoc(getattr(package, BUILT_BY[name])) or "")
    missing = arguments - documented(doc) - {"args", "kwargs", "self"}
    assert not missing, f"{module}.{name} does not say what these are: {sorted(missing)}"
    if re.search(r"^\s+raise ", source, re.MULTILINE):
        assert "Raises:" in doc, f"{module}.{name} does not say what it raises"


def test_every_objective_says_how_it_is_called():
    for name in flowspace.__all__:
        thing = getattr(flowspace, name)
        if inspect.isclass(thing) and issubclass(thing, flowspace.Objective):
            doc = inspect.getdoc(thing.__call__) or ""
            arguments = set(inspect.signature(thing.__call__).parameters) - {"self"}
            assert arguments <= documented(doc) and "Raises:" in doc, name
