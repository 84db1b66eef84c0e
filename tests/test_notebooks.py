"""The notebooks: each source runs from top to bottom, and the notebook beside it is made of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "docs" / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))
each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def cells(text):
    """The cells of a source in the percent format: whether each is prose, and its text."""
    found = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        prose = "[markdown]" in head
        if prose:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        found.append((prose, body.strip()))
    return found


def notebook(source):
    return json.loads(source.with_suffix(".ipynb").read_text())


@each_notebook
def test_a_notebook_has_the_cells_of_its_source(source):
    made = [
        (cell["cell_type"] == "markdown", "".join(cell["source"]).strip())
        for cell in notebook(source)["cells"]
    ]
    assert made == cells(source.read_text()), f"jupytext --to ipynb --execute {source}"


@each_notebook
def test_jupytext_reads_the_same_cells_out_of_a_source(source):
    jupytext = pytest.importorskip("jupytext")
    read = jupytext.read(source)
    found = [(cell.cell_type == "markdown", cell.source.strip()) for cell in read.cells]
    assert found == cells(source.read_text())


@each_notebook
def test_a_notebook_was_run_in_order_without_an_error_and_shows_pictures(source):
    code = [cell for cell in notebook(source)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    kinds = {output["output_type"] for output in outputs}
    assert "error" not in kinds
    assert not [o["text"] for o in outputs if o.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert source.with_suffix(".ipynb").stat().st_size < 500_000


RUN = """
import runpy, sys, warnings
import matplotlib

matplotlib.use("Agg")
runpy.run_path(sys.argv[1])
"""


@each_notebook
def test_a_source_runs_from_top_to_bottom_without_a_warning(source, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", RUN, source],
        cwd=tmp_path,
        env=os.environ | {"FLOWSPACE_QUICK": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.iterdir())


def test_every_notebook_is_a_page_of_the_site_with_its_pictures():
    pytest.importorskip("nbconvert")
    config = pytest.importorskip("mkdocs.config").load_config(str(ROOT / "docs" / "mkdocs.yml"))
    files = sys.modules["mkdocs.structure.files"].get_files(config)
    files = config.plugins.on_files(files, config=config)  # the hooks are among them
    navigation = (ROOT / "docs" / "mkdocs.yml").read_text()
    for source in SOURCES:
        name = f"notebooks/{source.stem}.md"
        assert f": {name}\n" in navigation
        text = files.get_file_from_path(name).content_string
        pictures = re.findall(r"!\[png\]\((.*?)\)", text)
        assert len(pictures) >= 2
        for picture in pictures:
            found = files.get_file_from_path(f"notebooks/{picture}")
            assert found.content_bytes.startswith(b"\x89PNG")
