"""Importing flowspace is cheap, its pages say what is there, and its files keep their order."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flowspace

ROOT = Path(__file__).parents[1]
HEAVY = (
    "timm",
    "diffusers",
    "lpips",
    "matplotlib",
    "jax",
    "sklearn",
    "tqdm",
    "safetensors",
    "transformers",
    "mlxtend",
)


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=120,
    )
    return done.stdout.strip()


def test_importing_flowspace_pulls_in_nothing_heavy():
    """Beyond what torch and sympy themselves import."""
    code = f"""
import sys, torch, sympy
before = set(sys.modules)
from flowspace import *
print([name for name in {HEAVY!r} if name in set(sys.modules) - before])"""
    assert python(code) == "[]"


def test_importing_flowspace_imports_no_package_but_torch_and_sympy():
    code = """
import sys, torch, sympy
before = {name.split(".")[0] for name in sys.modules}
from flowspace import *
after = {name.split(".")[0] for name in sys.modules}
print(sorted(after - before - set(sys.stdlib_module_names)))"""
    assert python(code) == "['flowspace']"


def test_importing_flowspace_adds_an_eighth_to_the_time_of_torch_and_sympy():
    """Of processor time, within one process: beside other work both take longer."""
    code = (
        "import torch, sympy, time; imported = time.process_time(); from flowspace import *; "
        "print((time.process_time() - imported) / imported)"
    )
    assert min(float(python(code)) for _ in range(3)) < 1 / 8


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["derive", "--alhpa", "1"], ["x"]]
)
def test_help_and_mistyped_arguments_do_not_wait_for_torch(arguments):
    code = f"""
import contextlib, io, sys
from flowspace.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    with contextlib.suppress(SystemExit):
        main({arguments})
print([name for name in ("torch", "sympy", "numpy") if name in sys.modules])"""
    assert python(code) == "[]"


def test_modules_and_names_are_found_where_they_are_asked_for():
    code = """
import flowspace
print(flowspace.times.TimePairs is flowspace.TimePairs, "CrossFlowLoss" in dir(flowspace))
flowspace.CrosFlowLoss"""
    with pytest.raises(subprocess.CalledProcessError) as failed:
        python(code)
    assert failed.value.stdout.strip() == "True True"
    assert "module 'flowspace' has no attribute 'CrosFlowLoss'" in failed.value.stderr


def test_every_public_name_exists_and_none_is_missing():
    assert sorted(flowspace.__all__) == list(flowspace.__all__) or set(flowspace.__all__) <= set(
        dir(flowspace)
    )
    for name in flowspace.__all__:
        assert getattr(flowspace, name).__doc__ or name == "TIME_FLOOR"


CONTRACT = [
    "Schedule",
    "LinearSchedule",
    "CosineSchedule",
    "ScheduleError",
    "Statistic",
    "MatchedStatistic",
    "MeanFlowStatistic",
    "ConsistencyStatistic",
    "check_criteria",
    "CriterionError",
    "UniformTimes",
    "LogitNormalTimes",
    "ShiftedTimes",
    "TimePairs",
    "AbsoluteError",
    "SquaredError",
    "HuberError",
    "Adaptive",
    "ForwardMode",
    "FiniteDifference",
    "CrossFlowLoss",
    "FlowMatchingLoss",
    "MeanFlowLoss",
    "ConsistencyLoss",
    "FlowMap",
]


@pytest.mark.parametrize("name", CONTRACT)
def test_the_names_of_the_contract_are_there(name):
    assert name in flowspace.__all__


def test_every_error_is_one_of_flowspace():
    for name in flowspace.__all__:
        if name.endswith("Error") and name not in ("AbsoluteError", "SquaredError", "HuberError"):
            assert issubclass(getattr(flowspace, name), flowspace.FlowspaceError)


def test_the_version_is_that_of_the_changelog_and_of_the_citation():
    changelog = re.search(
        r"^## \[?v?(\d+\.\d+\.\d+\S*?)\]?(\s|$)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    citation = re.search(
        r"^version: [\"']?([^\s\"']+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE
    )
    assert changelog and citation
    assert flowspace.__version__ == changelog[1] == citation[1]


def test_the_package_is_typed():
    assert (Path(flowspace.__file__).parent / "py.typed").exists()


def test_the_image_side_imports_what_it_needs_when_asked_and_says_what_is_missing():
    code = """
import sys
sys.modules["diffusers"] = None
import flowspace.vision
from flowspace.vision import FolderImages, AdversarialLoss
assert "timm" not in sys.modules
placed = {name for names in flowspace.vision.PLACES.values() for name in names}
assert placed.issuperset(flowspace.vision.__all__)
try:
    from flowspace.vision import CrossFlowGenerator
except ImportError as error:
    print(error)"""
    assert "pip install 'flowspace[vision]'" in python(code)


def test_the_reference_shows_how_every_objective_is_called():
    [pattern] = re.findall(r'filters: \["!(.*?)"\]', (ROOT / "docs" / "mkdocs.yml").read_text())
    assert re.search(pattern, "_private") and re.search(pattern, "__init__")
    assert not re.search(pattern, "__call__") and not re.search(pattern, "published")
    page = (ROOT / "docs" / "pages" / "reference.md").read_text()
    inherited = re.findall(r"inherited_members: \[(.*?)\], members: \[CrossFlowLoss", page)
    assert len(inherited) == 1 and "__call__" in inherited[0].split(", ")


def rooms():
    """The files and folders of flowspace, from the lowest up, as its README lists them."""
    page = (ROOT / "flowspace" / "README.md").read_text()
    section = page.split("## Who may import whom")[1].split("\n## ")[0]
    return [
        name.removesuffix(".py") for name in re.findall(r"^\| `(\w+)(?:\.py|/)`", section, re.M)
    ]


def imported_rooms(tree):
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.startswith("flowspace.")
        ):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (
                n.name.split(".")[1] for n in node.names if n.name.startswith("flowspace.")
            )


def test_a_file_imports_only_from_rooms_below_its_own():
    order, arrows = rooms(), 0
    for path in sorted((ROOT / "flowspace").rglob("*.py")):
        own = path.relative_to(ROOT / "flowspace").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for other in imported_rooms(ast.parse(path.read_text())):
            assert order.index(other) <= order.index(own), f"{path} imports from {other}"
            arrows += own != other
    assert arrows > 100


def test_every_name_of_the_glossary_is_in_the_code():
    page = (ROOT / "docs" / "pages" / "glossary.md").read_text()
    code = "\n".join(path.read_text() for path in sorted((ROOT / "flowspace").rglob("*.py")))
    words = set(re.findall(r"\w+", code))
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    names = {name for row in rows for name in re.findall(r"`([A-Za-z_.]+)`", row[-1])}
    assert len(rows) > 40 and len(names) > 50
    assert [name for name in sorted(names) if not set(name.split(".")) - {"py"} <= words] == []


def test_a_module_that_cannot_be_imported_says_why(monkeypatch):
    """``from flowspace import`` hides an AttributeError: it takes the name for absent."""

    def missing(place):
        raise AttributeError("module 'torch' has no attribute 'newer'")

    monkeypatch.setattr(flowspace.importlib, "import_module", missing)
    monkeypatch.delitem(vars(flowspace), "ConsistencyLoss", raising=False)
    with pytest.raises(ImportError, match=r"flowspace\.objectives cannot be imported.*'newer'"):
        from flowspace import ConsistencyLoss  # noqa: F401
