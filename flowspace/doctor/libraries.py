"""Which libraries are installed, and which extra of flowspace brings the one that is not.

The lists are those of pyproject.toml, as the installed package tells them: none is kept here.
"""

import functools
import re
from importlib import metadata
from typing import NamedTuple

from flowspace.errors import RunError

__all__ = ["Library", "extras", "installed_version", "missing_library"]

DISTRIBUTIONS = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "torch_fidelity": "torch-fidelity",
    "yaml": "pyyaml",
}
"""What is installed under another name than it is imported by."""

BROUGHT = {
    "huggingface-hub": "diffusers",
    "mpmath": "sympy",
    "pillow": "matplotlib",
    "starlette": "nicegui",
}
"""What no extra names, since a library that it names brings it."""


class Library(NamedTuple):
    """A library that an extra brings.

    Attributes:
        name: what it is installed by.
        needed: its oldest version, as text; empty for any.
        version: the installed version, or None.
    """

    name: str
    needed: str
    version: str | None

    @property
    def ready(self) -> bool:
        """Whether it is installed, and new enough."""
        if self.version is None:
            return False
        return _release(self.version) >= _release(self.needed)


def installed_version(distribution: str) -> str | None:
    """Return the installed version of a library, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _requirements() -> tuple[tuple[str, str], ...]:
    """Return each extra and each of its requirements, as the package tells them.

    Raises:
        RunError: if flowspace is not installed, but only found beside the program.
    """
    try:
        texts = metadata.requires("flowspace") or []
    except metadata.PackageNotFoundError as error:
        raise RunError(
            "got a flowspace that is not installed, so nothing tells its extras; write: pip "
            "install -e . in the folder of its pyproject.toml"
        ) from error
    found = []
    for text in texts:
        requirement, _, marker = text.partition(";")
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        if extra:
            found.append((extra[1], requirement.strip()))
    return tuple(found)


def extras() -> dict[str, list[Library]]:
    """Return the libraries of each extra, also of those that it includes."""
    names: dict[str, list[str]] = {}
    for extra, requirement in _requirements():
        names.setdefault(extra, []).append(requirement)
    return {extra: _libraries(names, extra) for extra in names}


def _libraries(names: dict[str, list[str]], extra: str) -> list[Library]:
    """Return the libraries of one extra, each once."""
    found: dict[str, Library] = {}
    for requirement in names.get(extra, ()):
        own = re.fullmatch(r"flowspace\[([\w,\s-]+)\]", requirement)
        if own:
            for included in own[1].split(","):
                for library in _libraries(names, included.strip()):
                    found.setdefault(library.name, library)
            continue
        parts = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*(?:>=\s*([\w.]+))?", requirement)
        if parts:
            name, needed = parts[1].lower(), parts[2] or ""
            found[name] = Library(name, needed, installed_version(name))
    return list(found.values())


def missing_library(imported: str) -> str:
    """Return what to install for a module that could not be imported.

    The extra with the fewest libraries is named, or the library itself where none brings it.
    """
    package = imported.partition(".")[0]
    name = DISTRIBUTIONS.get(package, package.replace("_", "-")).lower()
    name = BROUGHT.get(name, name)
    fitting = {}
    try:
        known = extras()
    except RunError:
        return f"pip install {name}"
    for extra, libraries in known.items():
        if any(library.name == name for library in libraries):
            fitting[extra] = len(libraries)
    if not fitting:
        return f"pip install {name}"
    smallest = min(fitting, key=lambda extra: fitting[extra])
    return f"pip install 'flowspace[{smallest}]'"


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, to compare: 2.14.1+cpu is (2, 14, 1)."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    if numbers is None:
        return ()
    parts = [int(part) for part in numbers[0].split(".")]
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)
