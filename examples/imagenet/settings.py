"""The settings of a run, as typed dataclasses, and how they are read from YAML.

Nothing heavy is imported here: a key that is misspelt, a value that does not fit and a path that
is not there are refused before torch is. A config may name another one as its ``base`` and say
only what differs.
"""

import dataclasses
import difflib
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

try:
    import yaml
    from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
    from pydantic.dataclasses import dataclass
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed; write: pip install -e '.[vision]'")

__all__ = ["Config", "SettingsError", "check_places", "from_command_line", "load", "of_run"]

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
MOST = 10**9
"""No size, count or number of steps of a run is larger."""

LARGEST_FILE = 2**20
"""Bytes of a config; a larger file is none."""

EARLIEST = 0.01
"""The smallest time that is drawn: ``flowspace.schedules.TIME_FLOOR``, which needs torch."""

Count = Annotated[int, Field(ge=1, le=MOST, strict=True)]
Number = Annotated[int, Field(ge=0, le=MOST, strict=True)]
Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Level = Annotated[float, Field(ge=EARLIEST, le=1)]


class SettingsError(ValueError):
    """A config, or what it names, that cannot be used; says what came and what to write."""


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Pictures: a folder of one folder a class (or ``emoji``, drawn from a package), their size.

    ``source`` says whether the path is such a folder, a Hugging Face data set, or webdataset's
    shards; ``latents`` is the folder that ``encode.py`` wrote, read instead of running the
    encoder.
    """

    path: str = "data/imagenet/train"
    source: Literal["folder", "dataset", "shards"] = "folder"
    size: Count = 256
    classes: Count | None = 1000
    flip: bool = True
    workers: Number = 8
    latents: str | None = None


@dataclass(frozen=True, config=STRICT)
class PerceptualConfig:
    """A perceptual term: a timm network (or ``lpips``), its weights, layers and weight.

    ``weights`` is a file, or ``package:NAME``; ``unit`` scales the features of each place to
    length 1, as LPIPS does. ``literal`` compares what the paper compares, the scaled prediction
    with the image; ``largest_step`` bounds the factor |b/a| of that prediction, None
    does not.
    """

    network: str
    weights: str | None = None
    weight: Weight = 1.0
    size: Count | None = 224
    layers: tuple[int, ...] | None = None
    below: Positive = 2.0
    unit: bool = False
    literal: bool = False
    largest_step: Positive | None = None


@dataclass(frozen=True, config=STRICT)
class AdversarialConfig:
    """The discriminator: heads on a frozen timm network; ``power`` is p of w(t) = alpha(t)^p.

    ``adaptive`` also weighs it by the ratio of the gradients at each image.
    """

    network: str
    weights: str | None = None
    weight: Weight = 0.1
    size: Count | None = 224
    layers: tuple[int, ...] = (2, 5, 8, 11)
    channels: tuple[int, ...] = (384, 384, 384, 384)
    width: Count = 64
    kernel: Count = 9
    power: Weight = 1.0
    start: Number = 0
    learning_rate: Positive = 2e-4
    augmented: bool = True
    penalty: Weight = 0.0
    r1: Weight = 0.0
    adaptive: bool = False


@dataclass(frozen=True, config=STRICT)
class StageOneConfig:
    """An autoencoder trained on the spot; its decoder is kept only for comparison."""

    channels: Count = 8
    widths: Annotated[tuple[Count, ...], Field(min_length=1)] = (32, 64, 64)
    steps: Count = 500
    batch: Count = 32
    learning_rate: Positive = 1e-3
    kl: Weight = 1e-4
    adversarial: AdversarialConfig | None = None


@dataclass(frozen=True, config=STRICT)
class EncoderConfig:
    """A name or path for `load_encoder`, or ``stage_one`` to train one.

    ``fit`` images estimate unknown statistics; ``pack`` makes one cell of pack x pack cells.
    """

    name: str | None = None
    weights: Path | None = None
    sample: bool = False
    half: bool = False
    pack: Count | None = None
    fit: Count = 10_000
    stage_one: StageOneConfig | None = None


@dataclass(frozen=True, config=STRICT)
class GeneratorConfig:
    """One of the presets, or sizes of one's own; None takes the preset's.

    ``space`` is where it ends: in images, or in latents, which the encoder's decoder takes to
    images. ``compile`` runs its blocks and
    the networks of the image losses compiled; ``refined`` channels of convolutions at the
    resolution of the image follow the blocks, which is ours.
    """

    preset: str | None = "crossflow-b"
    space: Literal["image", "latent"] = "image"
    channels: Count = 32
    grid: Count = 16
    patch: Count = 16
    depth: Count | None = None
    width: Count | None = None
    heads: Count | None = None
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    condition: Literal["s", "t,s", "t-s"] = "s"
    class_tokens: Count = 12
    time_tokens: Count = 4
    refined: Number = 0
    checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True, config=STRICT)
class ObjectiveConfig:
    """Which objective, its schedule, how often s = t, and how many labels are dropped.

    ``literal`` puts the stop-gradient where the paper writes it; ``estimated`` differentiates
    along the estimated marginal velocity. ``consistency`` is kappa = 0 with its boundary loss.
    """

    kind: Literal["crossflow", "consistency", "meanflow", "improved-meanflow", "flow-matching"] = (
        "crossflow"
    )
    alpha: str = "1 - t"
    beta: str = "t"
    literal: bool = False
    estimated: bool = False
    penalty: Literal["absolute", "squared", "huber"] | None = None
    equal: Share = 0.5
    shifted: bool = True
    drop_labels: Share = 0.0


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    """The optimiser and the loop; ``steps`` overrides ``epochs``.

    The first of ``emas`` is shipped, unless ``evaluate.py --average`` chooses another.
    ``snapshots`` keeps the averages of every look.
    """

    epochs: Positive = 160
    steps: Count | None = None
    batch: Count = 1024
    accumulate: Count = 1
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: Positive = 8e-4
    weight_decay: Weight = 1e-6
    warmup_epochs: Weight = 5
    final_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    emas: Annotated[tuple[Decay, ...], Field(min_length=1)] = (0.9999, 0.9995, 0.999)
    clip: Positive = 1.0
    bfloat16: bool = True
    sharded: bool = False
    processes: Count | None = None
    cpu: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = 0
    checkpoint_every: Count = 2000
    log_every: Count = 50
    look_every: Count = 5000
    snapshots: bool = False
    skips: Number = 10
    tensorboard: bool = False
    wandb: bool = False


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """How many samples are judged, by what, and against which folder.

    ``extractor`` is ``inception`` or a timm network; ``pinned`` is the SHA-256 that the
    reference's features must have; a file of samples holds ``shard`` batches; ``evaluations`` is
    of a sampler that takes several steps; the judge is tried on ``tried`` real pictures first,
    and 0 trusts it.
    """

    samples: Count = 50_000
    extractor: str = "inception"
    weights: str | None = None
    size: Count | None = None
    reference: str | None = None
    pinned: str | None = None
    batch: Count = 50
    shard: Count = 20
    evaluations: Count = 1
    tried: Number = 2000


@dataclass(frozen=True, config=STRICT)
class Config:
    """A whole run."""

    name: str
    out: Path
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    perceptual: tuple[PerceptualConfig, ...] = ()
    adversarial: AdversarialConfig | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.encoder.stage_one and self.encoder.name:
            raise ValueError(
                f"got encoder.name = {self.encoder.name!r} beside encoder.stage_one; write one of "
                "them, and null for the other"
            )
        if not (self.encoder.stage_one or self.encoder.name):
            raise ValueError(
                "got no encoder; write encoder.name, such as va-vae or a path, or "
                "encoder.stage_one to train one"
            )
        kind, literal = self.objective.kind, self.objective.literal
        if kind != "crossflow" and (literal or self.objective.estimated):
            raise ValueError(
                f"got literal or estimated with objective.kind = {kind}; both are crossflow's"
            )
        if kind not in ("crossflow", "consistency") and self.generator.space == "image":
            raise ValueError(
                f"got objective.kind = {kind} for images, but it stays in one space; write "
                "generator.space=latent"
            )
        across = self.perceptual or self.adversarial
        if across and self.generator.space == "latent":
            raise ValueError(
                "got perceptual or adversarial losses for latents; they compare images: leave "
                "them out, or write generator.space=image"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        return TypeAdapter(Config).dump_python(self, mode="json")


# --- reading -----------------------------------------------------------------------------------


def from_command_line(
    usage: str,
    options: Sequence[str] = (),
    arguments: Sequence[str] | None = None,
    latents_made: bool = False,
) -> tuple[Config, list[str]]:
    """Return the config of ``CONFIG key=value ...`` and the options that were given.

    With ``latents_made`` the folder of latents need not be there.

    Ends the program, with one line that says why, where they cannot be used.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    asked = [argument for argument in given if argument.startswith("-")]
    given = [argument for argument in given if not argument.startswith("-")]
    if not given:
        print(usage)
        raise SystemExit(2)
    try:
        for option in asked:
            if option not in options:
                raise SettingsError(f"got {option}; options are {', '.join(options) or 'none'}")
        config = load(Path(given[0]), given[1:])
        check_places(config, latents_made)
    except SettingsError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    return config, asked


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


def load(path: Path, changes: Sequence[str] = ()) -> Config:
    """Read a config.

    Args:
        path: of a YAML file.
        changes: such as ``training.batch=64``; the value is YAML.

    Raises:
        SettingsError: if a file is missing or no YAML, a key is not known (the nearest one is
            named), or a value does not fit.
    """
    found = _read(path)
    for change in changes:
        found = _merged(found, _change(change))
    return _checked({"name": path.stem, "out": str(default_out(path))} | found, str(path))


def default_out(path: Path) -> Path:
    """Return the folder of a config's run: ``runs/paper/b-adamw`` of ``configs/paper/b-adamw``."""
    parts = path.with_suffix("").parts
    if "configs" in parts:
        last = len(parts) - 1 - parts[::-1].index("configs")
        return Path("runs", *parts[last + 1 :])
    return Path("runs", path.stem)


def of_run(folder: Path) -> Config:
    """Read the config that a run left in its folder.

    Raises:
        SettingsError: if the folder is none of a run.
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
    return _checked(found | {"out": str(folder)}, str(path))


def _checked(found: dict[str, Any], where: str) -> Config:
    _refuse_unknown(found, Config, where, "")
    try:
        return TypeAdapter(Config).validate_python(found)
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
_WithoutAliases.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), None
)


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
    return _merged(_read(path.parent / str(base), (*users, path)), found)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return the union of nested mappings; lists and values are replaced whole."""
    merged = {**under, **over}
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(under.get(key), Mapping):
            merged[key] = _merged(under[key], value)
    return merged


def _refuse_unknown(found: Any, kind: Any, where: str, before: str) -> None:
    """Refuse keys that a dataclass has not, naming the nearest that it has."""
    if isinstance(found, list):
        for item in found:
            _refuse_unknown(item, kind, where, before)
    kinds = [part for part in _leaves(kind) if is_dataclass(part)]
    if not kinds or not isinstance(found, Mapping):
        return
    known = {one.name: one.type for one in fields(kinds[0])}
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


def check_places(config: Config, latents_made: bool = False) -> None:
    """See that the folders and files of a config are there, and that its own can be written.

    Args:
        config: of the run.
        latents_made: whether the folder of latents will be made.

    Raises:
        SettingsError: if one is not.
    """
    for name in ("path", "latents"):
        place = getattr(config.data, name)
        if name == "latents" and latents_made:
            continue
        if place not in (None, "emoji") and not Path(place).is_dir():
            hint = f"write data.{name}=FOLDER"
            if name == "latents":
                hint += ", which encode.py makes of the same config, or null to encode every step"
            raise SettingsError(f"got data.{name} = {place}, which is no folder; {hint}")
    for key, weights in _weights(config).items():
        if weights and not weights.startswith("package:") and not Path(weights).is_file():
            raise SettingsError(f"got {key} = {weights}, which is no file; write {key}=FILE")
    if config.training.wandb and importlib.util.find_spec("wandb") is None:
        raise SettingsError("training.wandb=true needs wandb; write: pip install wandb")
    check_writable(config.out)


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


def _weights(config: Config) -> dict[str, str | None]:
    """Return the files of weights that training needs, by their keys.

    Inception judges a finished run, and its weights may come later.
    """
    found: dict[str, str | None] = {}
    if config.evaluation.extractor != "inception":
        found["evaluation.weights"] = config.evaluation.weights
    for number, term in enumerate(config.perceptual):
        found[f"perceptual.{number}.weights"] = term.weights
    if config.adversarial:
        found["adversarial.weights"] = config.adversarial.weights
    if config.encoder.weights:
        found["encoder.weights"] = os.fspath(config.encoder.weights)
    return found


def replaced(config: Config, **sections: Any) -> Config:
    """Return a config with sections changed by mappings, or replaced."""
    changes = {}
    for name, value in sections.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(config, name), **value)
        changes[name] = value
    return dataclasses.replace(config, **changes)
