"""How a config is read: a dataclass of settings, a YAML file, changes of the command line.

Nothing heavy is imported here: a key that is misspelt, a value that does not fit and a path that
is not there are refused before torch is. A config may name another one as its ``base`` and say
only what differs. A program declares its settings as frozen dataclasses of pydantic::

    @dataclass(frozen=True, config=STRICT)
    class Config:
        name: str
        out: Path
        training: TrainingConfig = field(default_factory=TrainingConfig)

Where the file says nothing, ``name`` is its own and ``out`` a folder of that name.
"""

import dataclasses
import difflib
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

try:
    import yaml
    from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed; write: pip install -e '.[vision]'")

__all__ = [
    "STRICT",
    "Count",
    "Decay",
    "Number",
    "Positive",
    "SettingsError",
    "Share",
    "Size",
    "Weight",
    "as_dict",
    "check_folder",
    "check_installed",
    "check_weights",
    "check_writable",
    "depends_on",
    "from_command_line",
    "load",
    "of_run",
    "replaced",
    "run_program",
]

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Of every dataclass of settings: no unknown keys, no infinities."""

MOST = 10**9
"""No size, count or number of steps of a run is larger."""

LARGEST = 2**14
"""No width, depth or side of a network is larger."""

LARGEST_FILE = 2**20
"""Bytes of a config; a larger file is none."""

RUNS = Path("runs")
"""Where runs are left, unless a config says ``out``."""

FREE = ("workers", "compile")
"""Settings of sections that weights do not depend on."""

Count = Annotated[int, Field(ge=1, le=MOST, strict=True)]
Size = Annotated[int, Field(ge=1, le=LARGEST, strict=True)]
Number = Annotated[int, Field(ge=0, le=MOST, strict=True)]
Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]

Settings = TypeVar("Settings")
"""A dataclass of settings."""


class SettingsError(ValueError):
    """A config, or what it names, that cannot be used; says what came and what to write."""


def as_dict(config: Any) -> dict[str, Any]:
    """Return the settings as JSON has them."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def depends_on(config: Any, *sections: str) -> dict[str, Any]:
    """Return the sections of a config that weights depend on, as JSON has them.

    How many processes read, and whether the network is compiled, is left out.
    """
    settings = as_dict(config)
    found = {}
    for section in sections:
        found[section] = settings[section]
        if isinstance(found[section], dict):
            for name in FREE:
                found[section].pop(name, None)
    return found


def replaced(config: Settings, **sections: Any) -> Settings:
    """Return a config with sections changed by mappings, or replaced."""
    changes = {}
    for name, value in sections.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(config, name), **value)
        changes[name] = value
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


# --- a program ---------------------------------------------------------------------------------


def from_command_line(
    kind: type[Settings],
    usage: str | None,
    options: Sequence[str] = (),
    check: Callable[[Settings], None] | None = None,
    runs: Path = RUNS,
) -> tuple[Settings, list[str]]:
    """Return the config of ``CONFIG key=value ...`` and the options that were given.

    Ends the program, with one line that says why, where they cannot be used.

    Args:
        kind: the dataclass of the settings.
        usage: what is printed where no config is named: the program's docstring.
        options: that the program knows, such as ``--evaluate``.
        check: raises `SettingsError` where what a config names is not there.
        runs: the folder of runs.
    """
    arguments = sys.argv[1:]
    asked = [argument for argument in arguments if argument.startswith("-")]
    given = [argument for argument in arguments if not argument.startswith("-")]
    if not given:
        print(usage)
        raise SystemExit(2)
    path, *changes = given
    try:
        for option in asked:
            if option not in options:
                known = ", ".join(options) or "none"
                raise SettingsError(f"got {option}; options are {known}")
        config = load(kind, Path(path), changes, runs)
        if check is not None:
            check(config)
    except SettingsError as error:
        name = Path(sys.argv[0]).name
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    return config, asked


OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
"""What torch says, of a card and of a CPU."""


def run_program(main: Callable[[], Any]) -> None:
    """Run a program; what a user can mend ends it with one line that says how."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        sys.exit(f"{name}: {error}; what was saved is whole: repair this, and run it again")
    except ValueError as error:  # of which flowspace's errors and ours are
        from flowspace import FlowspaceError

        if not isinstance(error, (SettingsError, FlowspaceError)):
            raise
        sys.exit(f"{name}: {error}")
    except RuntimeError as error:
        if not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        reason, *_ = str(error).splitlines()
        sys.exit(
            f"{name}: the memory does not suffice ({reason}); write a smaller training.batch, a "
            "larger training.accumulate, or a smaller network, and run it again"
        )


# --- files -------------------------------------------------------------------------------------


def load(
    kind: type[Settings], path: Path, changes: Sequence[str] = (), runs: Path = RUNS
) -> Settings:
    """Read a config.

    Args:
        kind: the dataclass of the settings.
        path: of a YAML file.
        changes: such as ``training.batch=64``; the value is YAML.
        runs: the folder of runs, for a config that does not say ``out``.

    Raises:
        SettingsError: if a file is missing or no YAML, a key is not known (the nearest one is
            named), or a value does not fit.
    """
    found = {"name": path.stem, "out": str(default_out(path, runs))}
    found |= _read(path)
    for change in changes:
        found = _merged(found, _change(change))
    return _checked(kind, found, str(path))


def default_out(path: Path, runs: Path = RUNS) -> Path:
    """Return the folder of a config's run: ``runs/paper/b-adamw`` of ``configs/paper/b-adamw``."""
    parts = path.with_suffix("").parts
    if "configs" in parts:
        below = parts[::-1].index("configs")
        return Path(runs, *parts[len(parts) - below :])
    return Path(runs, path.stem)


def of_run(kind: type[Settings], folder: Path, changes: Sequence[str] = ()) -> Settings:
    """Read the config that a run left in its folder.

    Args:
        kind: the dataclass of the settings.
        folder: of the run.
        changes: of how it is judged, such as ``evaluation.sets=3``.

    Raises:
        SettingsError: if the folder is none of a run, or a change is of what was trained.
    """
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(
            f"{folder} is no run ({error}); write the folder that train.py made"
        ) from None
    if not isinstance(found, dict):
        raise SettingsError(f"{path} holds {type(found).__name__}, not the settings of a run")
    for change in changes:
        if not change.startswith("evaluation."):
            raise SettingsError(
                f"got {change}, but {folder} was trained with what it says; "
                "write evaluation.KEY=VALUE"
            )
        found = _merged(found, _change(change))
    return _checked(kind, found | {"out": str(folder)}, str(path))


def _checked(kind: type[Settings], found: dict[str, Any], where: str) -> Settings:
    _refuse_unknown(found, kind, where, "")
    try:
        return TypeAdapter(kind).validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if not place:
        raise SettingsError(f"{where}: {message}")
    raise SettingsError(f"{where}: got {place} = {first['input']!r}; {message}")


class _WithoutAliases(yaml.SafeLoader):
    """A loader that refuses aliases, by which a small file can ask for endless memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name); write the value out")
        return super().compose_node(parent, index)


# YAML 1.1 takes 8e-4 for text, since it has no point.
_FLOAT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_WithoutAliases.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, None)


def _parsed(text: str) -> Any:
    return yaml.load(text, _WithoutAliases)  # a SafeLoader


def _change(change: str) -> dict[str, Any]:
    keys, equals, value = change.partition("=")
    if not equals:
        raise SettingsError(f"got {change!r}; write KEY=VALUE, such as training.batch=64")
    try:
        nested: Any = _parsed(value)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = getattr(error, "problem", error)
        raise SettingsError(
            f"got {change!r}, whose value is not YAML ({problem}); is it in quotes?"
        ) from None
    for key in reversed(keys.split(".")):
        nested = {key: nested}
    return nested


def _read(path: Path, users: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return what a file says, over what its bases say."""
    if path in users:
        raise SettingsError(f"{path} is its own base, by {users[-1]}")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise SettingsError(f"{path} is larger than {LARGEST_FILE} bytes; it is no config")
        found = _parsed(path.read_text())
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read ({error.strerror}); write the path of a config in YAML"
        ) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"{path} is not YAML: {error}") from None
    if not isinstance(found, dict):
        raise SettingsError(
            f"{path} holds {type(found).__name__}; a config is a mapping of keys to values"
        )
    base = found.pop("base", None)
    if base is None:
        return found
    under = _read(path.parent / str(base), (*users, path))
    return _merged(under, found)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return the union of nested mappings; lists and values are replaced whole.

    A number as a key changes that item of a list: ``perceptual.0.weight=0.5``.
    """
    merged = {**under, **over}
    for key, value in over.items():
        if not isinstance(value, Mapping):
            continue
        before = under.get(key)
        if isinstance(before, list):
            items = {str(number): item for number, item in enumerate(before)}
            if value.keys() <= items.keys():
                merged[key] = list(_merged(items, value).values())
        elif isinstance(before, Mapping):
            merged[key] = _merged(before, value)
    return merged


def _refuse_unknown(found: Any, kind: Any, where: str, before: str) -> None:
    """Refuse keys that a dataclass has not, naming the nearest that it has."""
    if isinstance(found, list):
        for item in found:
            _refuse_unknown(item, kind, where, before)
    kinds = [part for part in _leaves(kind) if is_dataclass(part)]
    if not kinds or not isinstance(found, Mapping):
        return
    first, *_ = kinds
    known = {one.name: one.type for one in fields(first)}
    for key, value in found.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"known are {', '.join(known)}"
            if near:
                hint = f"did you mean {before}{near[0]}?"
            raise SettingsError(f"{where}: {before}{key} is not known; {hint}")
        _refuse_unknown(value, known[key], where, f"{before}{key}.")


def _leaves(kind: Any) -> list[Any]:
    """Return the types that a hint is made of: of ``X | None`` and ``tuple[X, ...]``, X."""
    leaves: list[Any] = []
    for part in get_args(kind):
        leaves += _leaves(part)
    return leaves or [kind]


# --- what the settings name --------------------------------------------------------------------


def check_folder(key: str, place: str | None, known: Sequence[str] = ()) -> None:
    """See that a setting names a folder that is there, or one of the names that are known.

    Raises:
        SettingsError: if it does not.
    """
    if place is None or place in known or Path(place).is_dir():
        return
    raise SettingsError(f"got {key} = {place}, which is no folder; write {key}=FOLDER")


def check_weights(files: Mapping[str, str | None]) -> None:
    """See that files of weights are there, by their keys; ``package:NAME`` is no file.

    Raises:
        SettingsError: if one is not.
    """
    for key, weights in files.items():
        if not weights or weights.startswith("package:"):
            continue
        if not Path(weights).is_file():
            raise SettingsError(f"got {key} = {weights}, which is no file; write {key}=FILE")


def check_installed(key: str, package: str) -> None:
    """See that a package that a setting needs is installed.

    Raises:
        SettingsError: if it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise SettingsError(f"{key}=true needs {package}; write: pip install {package}")


def check_writable(folder: Path) -> None:
    """See that a folder can be written to; it is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(
            f"{folder} cannot be written to ({reason}); write out=FOLDER, another one"
        ) from None
