"""What is published: the package's description, its extras, its workflows, and the files in it."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import flowspace
from flowspace.doctor.libraries import BROUGHT, DISTRIBUTIONS

tomllib = pytest.importorskip("tomllib")  # of Python 3.11

ROOT = Path(__file__).parents[1]
DESCRIPTION = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = DESCRIPTION["project"]
EXTRAS = PROJECT["optional-dependencies"]
ADDRESS = "https://github.com/flowspace-lib/flowspace"


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower()


def floor_of(library, requirements):
    """The oldest version of a library that a list asks for."""
    [found] = [each for each in requirements if name_of(each) == library]
    return re.search(r">=([\d.]+)", found)[1]


def brought_by(extra):
    """What an extra installs, also by the extras that it includes."""
    found = set()
    for requirement in EXTRAS[extra]:
        own = re.fullmatch(r"flowspace\[(.*)\]", requirement)
        if own:
            found = found.union(*map(brought_by, own[1].split(",")))
        else:
            found.add(name_of(requirement))
    return found


# --- the description


def test_the_description_is_valid():
    api = pytest.importorskip("validate_pyproject.api")
    api.Validator()(DESCRIPTION)


def test_the_licence_the_addresses_and_the_pythons_are_named():
    assert PROJECT["license"] == "MIT" and PROJECT["license-files"] == ["LICENSE"]
    assert not [each for each in PROJECT["classifiers"] if each.startswith("License")]
    assert all(address.startswith(ADDRESS) for address in PROJECT["urls"].values())
    oldest = PROJECT["requires-python"].removeprefix(">=")
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert pythons[0] == oldest and len(pythons) == len(set(pythons)) >= 4


def test_every_extra_that_is_named_anywhere_exists():
    named = set()
    for folder in ("flowspace", "examples", "benchmarks", "docs/pages", ".ci", ".github", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yml", ".yaml") or path.name == "run":
                named.update(re.findall(r"flowspace\[([a-z,]+)\]", path.read_text()))
    named.update(re.findall(r"flowspace\[([a-z,]+)\]", (ROOT / "README.md").read_text()))
    extras = {extra for each in named for extra in each.split(",")} - {"odd"}  # a test's own
    assert len(extras) > 5
    assert extras <= set(EXTRAS)


def imported_names(node):
    """The modules that a part of a program imports, or asks for by name."""
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            yield from (name.name for name in each.names)
        elif isinstance(each, ast.ImportFrom) and each.module and not each.level:
            yield each.module
        elif isinstance(each, ast.Call) and each.args:
            function = getattr(each.func, "attr", getattr(each.func, "id", ""))
            argument = each.args[0]
            if function in ("find_spec", "import_module") and isinstance(argument, ast.Constant):
                yield argument.value


def libraries_of(node):
    """What has to be installed for a part of a program, beside the core's libraries."""
    core = {name_of(each) for each in PROJECT["dependencies"]} | {"flowspace"}
    core.add("triton")  # torch brings it where there may be a GPU; it is looked for elsewhere
    for module in imported_names(node):
        package = module.split(".")[0]
        if package in sys.stdlib_module_names:
            continue
        name = DISTRIBUTIONS.get(package, package.replace("_", "-")).lower()
        name = BROUGHT.get(name, name)
        if name not in core:
            yield name


def sources():
    for path in sorted((ROOT / "flowspace").rglob("*.py")):
        yield path, ast.parse(path.read_text())


def test_an_extra_brings_each_library_that_flowspace_imports():
    everything = set().union(*map(brought_by, EXTRAS))
    asked_for = {name: path for path, tree in sources() for name in libraries_of(tree)}
    assert len(asked_for) > 8
    unknown = {name: path for name, path in asked_for.items() if name not in everything}
    assert unknown == {}


def test_an_error_that_names_an_extra_names_one_that_brings_what_is_missing():
    checked = 0
    for path, tree in sources():
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            texts = [n.value for n in ast.walk(function) if isinstance(n, ast.Constant)]
            said = "\n".join(text for text in texts if isinstance(text, str))
            wanted = set(libraries_of(function))
            for extra in re.findall(r"pip install 'flowspace\[(\w+)\]'", said):
                if wanted:
                    assert wanted & brought_by(extra), (path, function.name, wanted, extra)
                    checked += 1
    assert checked >= 3


@pytest.mark.parametrize(("room", "extra"), [("vision", "vision"), ("demo", "demo")])
def test_a_room_imports_what_its_extra_brings(room, extra):
    """At the top of its files: what is imported further in has an error of its own."""
    for path, tree in sources():
        if path.relative_to(ROOT / "flowspace").parts[0] == room:
            top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
            for node in top:
                assert set(libraries_of(node)) <= brought_by(extra), path


# --- the files that others read


@pytest.fixture(scope="module")
def workflow():
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())


def test_the_workflow_runs_the_script_and_nothing_else(workflow):
    steps = workflow["jobs"]["run"]["steps"]
    assert steps[-1]["run"] == "bash .ci/run"
    for step in steps[:-1]:
        assert not re.search(r"pip install|pytest|ruff|pyright|mkdocs", step.get("run", ""))
    assert list(workflow["jobs"]) == ["run"]


def test_the_workflow_tries_the_oldest_that_is_promised(workflow):
    rows = workflow["jobs"]["run"]["strategy"]["matrix"]["include"]
    oldest = PROJECT["requires-python"].removeprefix(">=")
    tried = {(row["python"], row["torch"].rpartition(".")[0]) for row in rows}
    assert (oldest, floor_of("torch", PROJECT["dependencies"])) in tried
    newest = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))[-1]
    assert (newest, "") in tried


def test_each_command_of_a_developer_is_one_of_the_script():
    script = (ROOT / ".ci/run").read_text().replace(".venv/bin/", "")
    tasks = DESCRIPTION["tool"]["poe"]["tasks"]
    commands = [task for task in tasks.values() if isinstance(task, str)]
    commands += [step["cmd"] for task in tasks.values() if isinstance(task, list) for step in task]
    for command in commands:
        assert command in script or command == "bash .ci/run", command


def test_every_file_of_tests_that_the_script_names_exists():
    named = re.findall(r"tests/\w+\.py", (ROOT / ".ci/run").read_text())
    assert len(named) > 20 and len(named) == len(set(named))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_tests_that_need_other_libraries_are_run_where_these_are_installed():
    installed_before = {"matplotlib", "torch._inductor", "torchdiffeq"}  # or come with torch
    second = (ROOT / ".ci" / "run").read_text()
    missing = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        needed = set(re.findall(r'importorskip\("([^"]+)"', path.read_text()))
        if needed - installed_before and f"tests/{path.name}" not in second:
            missing.append(path.name)
    assert not missing, "add them to the second command of .ci/run"


def test_the_conda_recipe_asks_for_what_the_package_asks_for():
    yaml = pytest.importorskip("yaml")
    recipe = yaml.safe_load((ROOT / ".github/conda/recipe.yaml").read_text())
    assert recipe["context"]["version"] == flowspace.__version__
    assert recipe["context"]["python_min"] == PROJECT["requires-python"].removeprefix(">=")
    runs = [each.replace("pytorch", "torch") for each in recipe["requirements"]["run"]]
    asked = [each.replace(" ", "") for each in runs if not each.startswith("python ")]
    assert sorted(asked) == sorted(PROJECT["dependencies"])
    [build] = DESCRIPTION["build-system"]["requires"]
    assert build in [each.replace(" ", "") for each in recipe["requirements"]["host"]]


def test_each_form_for_issues_that_needs_it_asks_for_what_the_doctor_says():
    yaml = pytest.importorskip("yaml")
    for name in ("bug", "wrong_derivative"):
        form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
        [asked] = [part for part in form["body"] if part.get("id") == "doctor"]
        assert "flowspace doctor" in asked["attributes"]["label"]
        assert asked["validations"]["required"]


def test_the_repository_passes_the_review_of_scientific_python():
    repo_review = pytest.importorskip("repo_review.processor")
    pytest.importorskip("sp_repo_review")
    _, results = repo_review.process(ROOT)
    failed = {each.name: each.description for each in results if each.result is False}
    assert failed == {}


# --- the archives


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The wheel and the source archive, built as they are for a release."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    [wheel] = folder.glob("*.whl")
    [source] = folder.glob("*.tar.gz")
    return {"wheel": wheel, "source archive": source}


def contents(path):
    if path.suffix == ".whl":
        return zipfile.ZipFile(path).namelist()
    with tarfile.open(path) as archive:
        return [name.partition("/")[2] for name in archive.getnames()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "source archive"])
def test_an_archive_has_the_package_and_its_licence_and_no_tests(archives, kind):
    names = contents(archives[kind])
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "flowspace").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert package <= set(names)
    assert "flowspace/py.typed" in names
    assert [name for name in names if name.endswith("LICENSE")]
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders <= {"docs", "flowspace", f"flowspace-{flowspace.__version__}.dist-info"}
    of_docs = [name for name in names if name.startswith("docs/")]
    assert of_docs in ([], ["docs/hatch_build.py"])  # makes the description of an index
    assert max(map(len, names)) < 120


@pytest.mark.slow
def test_the_archives_are_what_the_index_takes(archives):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, archives.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "source archive"])
def test_an_archive_installs_and_runs_the_quickstart_in_an_environment_of_its_own(
    archives, kind, tmp_path
):
    """Which borrows the libraries of this one: torch is not fetched again."""
    for library in ("matplotlib", "sklearn"):
        pytest.importorskip(library)
    venv.create(tmp_path / "own")
    [installed] = (tmp_path / "own").glob("lib/python*/site-packages")
    (installed / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    python, script = tmp_path / "own" / "bin" / "python", tmp_path / "own" / "bin" / "flowspace"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    command += ["--no-index", "--no-deps", "--no-build-isolation", str(archives[kind])]
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONPATH": ""}
    subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    page = (ROOT / "docs" / "pages" / "quickstart.md").read_text()
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    program += "\nimport flowspace\nprint(flowspace.__file__)\n"
    runs = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([str(python), "-c", program], check=False, **runs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(str(installed))
    told = subprocess.run([str(script), "--version"], check=True, **runs).stdout
    assert told.strip() == f"flowspace {flowspace.__version__}"
