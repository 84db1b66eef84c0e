"""Our own source as one file that needs no flowspace, to be shipped beside weights.

Nothing is written twice: a module and all of flowspace that it imports, in the order in which they
import each other, less the imports between them. What other libraries give is imported at the top.
Two modules with one name for two things cannot stand in one file, and are refused.
"""

import ast
import importlib.util
import sys
import textwrap
from collections.abc import Iterator

from flowspace import __version__
from flowspace.errors import RunError

__all__ = ["standalone"]

HEADER = """# SPDX-License-Identifier: MIT
# Copyright the flowspace authors. Assembled from flowspace {version}:
# {names}
{docstring}
"""
LINE = 99
IMPORTS = (ast.Import, ast.ImportFrom)
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


def standalone(module: str) -> str:
    """Return one file with everything that a module has and needs, except other libraries.

    Args:
        module: by its name, such as ``"flowspace.vision.generator"``.

    Raises:
        RunError: if two modules give one name to two things, one imports under another name, or
            the source is not installed.
    """
    parts = _in_order(module, {})
    _check_names(parts)
    names = ", ".join(part.name for part in parts)
    header = HEADER.format(
        version=__version__,
        names=textwrap.fill(names, LINE - 2).replace("\n", "\n# "),
        docstring=parts[-1].docstring(),
    )
    sections = [f"{header}\n{_imports(parts)}".strip("\n")]
    for part in parts:
        body = part.body()
        if body:
            sections.append(body)
    return "\n\n\n".join(sections) + "\n"


class _Part:
    """A module's source, and what of it goes into the file."""

    def __init__(self, name: str) -> None:
        spec = importlib.util.find_spec(name)
        source = spec.loader.get_source(name)  # type: ignore[union-attr]
        if source is None:
            raise RunError(
                f"the source of {name} is not installed, so it cannot be shipped; install "
                "flowspace with its source, as pip does"
            )
        self.name = name
        self.source: str = source
        self.tree = ast.parse(self.source)

    def docstring(self) -> str:
        """Return the docstring as it is written."""
        return ast.get_source_segment(self.source, self.tree.body[0]) or ""

    def imports(self) -> Iterator[ast.Import | ast.ImportFrom]:
        """Give the imports at the top."""
        for node in self.tree.body:
            if isinstance(node, IMPORTS):
                yield node

    def neighbours(self) -> Iterator[str]:
        """Give the modules of flowspace that it imports."""
        for node in self.imports():
            if not isinstance(node, ast.ImportFrom) or not _is_ours(node):
                continue
            if any(each.asname for each in node.names):
                raise RunError(f"{self.name} imports under another name: {ast.unparse(node)}")
            yield str(node.module)

    def names(self) -> Iterator[str]:
        """Give the names that it defines."""
        for node in self.tree.body:
            targets: list[ast.expr] = []
            if isinstance(node, DEFINITIONS):
                yield node.name
            elif isinstance(node, ast.AnnAssign):
                targets = [node.target]
            elif isinstance(node, ast.Assign):
                targets = node.targets
            for target in targets:
                yield from _names_in(target)

    def body(self) -> str:
        """Return the source without its docstring, imports and ``__all__``, comments included."""
        lines = self.source.splitlines()
        for node in self.tree.body:
            if self._is_left_out(node):
                first, last = node.lineno - 1, node.end_lineno
                lines[first:last] = [""] * len(lines[first:last])
        text = "\n".join(lines).strip("\n")
        while "\n\n\n\n" in text:
            text = text.replace("\n\n\n\n", "\n\n\n")
        return text

    def _is_left_out(self, node: ast.stmt) -> bool:
        if isinstance(node, IMPORTS):
            return True
        if isinstance(node, ast.Assign):
            return ast.unparse(node.targets[0]) == "__all__"
        return node is self.tree.body[0] and isinstance(node, ast.Expr)


def _names_in(target: ast.expr) -> Iterator[str]:
    """Give the names that an assignment defines, except ``__all__``."""
    for node in ast.walk(target):
        if isinstance(node, ast.Name) and node.id != "__all__":
            yield node.id


def _is_ours(node: ast.Import | ast.ImportFrom) -> bool:
    return isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "flowspace"


def _in_order(name: str, seen: dict[str, _Part]) -> list[_Part]:
    """Return a module and all of flowspace that it needs, what is needed first."""
    seen[name] = part = _Part(name)
    found = []
    for neighbour in part.neighbours():
        if neighbour not in seen:
            found += _in_order(neighbour, seen)
    return [*found, part]


def _check_names(parts: list[_Part]) -> None:
    """Refuse a name that two modules define."""
    owners: dict[str, str] = {}
    for part in parts:
        for name in set(part.names()):
            if name in owners:
                raise RunError(
                    f"{part.name} and {owners[name]} both define {name}; rename one of them, "
                    "since they are shipped in one file"
                )
            owners[name] = part.name


def _imports(parts: list[_Part]) -> str:
    """Return what the modules import of other libraries, each once."""
    plain: set[str] = set()
    named: dict[str, set[str]] = {}
    for part in parts:
        for node in part.imports():
            if isinstance(node, ast.Import):
                plain.add(ast.unparse(node))
            elif not _is_ours(node):
                names = named.setdefault(str(node.module), set())
                names.update(ast.unparse(each) for each in node.names)
    lines = sorted(plain)
    for module, names in sorted(named.items()):
        lines.append(_import_line(module, sorted(names)))
    first, rest = [], []
    for line in lines:
        if _of_python(line):
            first.append(line)
        else:
            rest.append(line)
    blocks = ["\n".join(first), "\n".join(rest)]
    return "\n\n".join(filter(None, blocks))


def _import_line(module: str, names: list[str]) -> str:
    """Return an import of names, one a line where they do not fit on one."""
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= LINE:
        return line
    inside = "".join(f"    {name},\n" for name in names)
    return f"from {module} import (\n{inside})"


def _of_python(line: str) -> bool:
    """Return whether an import is of Python itself."""
    module = line.split()[1]
    package, _, _ = module.partition(".")
    return package in sys.stdlib_module_names
