"""What a run of the ImageNet recipe is made of, as typed dataclasses, and how they are read from YAML (pydantic checks them).

A config may name another one as its ``base`` and say only what differs.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from flowspace.errors import InputError, RunError

__all__ = ["Config", "load"]

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Attributes: the folder of one folder a class (or ``openmoji``, drawn from the package), its size and classes."""

    path: str = "data/imagenet/train"
    size: int = Field(256, ge=8)
    classes: int | None = Field(1000, ge=1)
    flip: bool = True
    workers: int = Field(8, ge=1)


@dataclass(frozen=True, config=STRICT)
class PerceptualConfig:
    """A perceptual term: a timm network (or ``lpips``), its weights (a file, or ``package:NAME``), layers and weight."""

    network: str
    weights: str | None = None
    weight: float = Field(1.0, ge=0)
    size: int | None = 224
    layers: tuple[int, ...] | None = None
    below: float = 2.0
    literal: bool = False


@dataclass(frozen=True, config=STRICT)
class AdversarialConfig:
    """The discriminator: heads on a frozen timm network; ``power`` is p of w(t) = alpha(t)^p."""

    network: str
    weights: str | None = None
    weight: float = Field(0.1, ge=0)
    size: int | None = 224
    layers: tuple[int, ...] = (2, 5, 8, 11)
    channels: tuple[int, ...] = (384, 384, 384, 384)
    width: int = 64
    kernel: int = 9
    power: float = Field(1.0, ge=0)
    start: int = Field(0, ge=0)
    learning_rate: float = Field(2e-4, gt=0)
    augmented: bool = True
    penalty: float = Field(0.0, ge=0)
    r1: float = Field(0.0, ge=0)


@dataclass(frozen=True, config=STRICT)
class StageOneConfig:
    """An autoencoder trained on the spot; its decoder is kept only for comparison."""

    channels: int = 8
    widths: tuple[int, ...] = (32, 64, 64)
    steps: int = Field(500, ge=1)
    batch: int = Field(32, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    kl: float = Field(1e-4, ge=0)


@dataclass(frozen=True, config=STRICT)
class EncoderConfig:
    """A name or path for `load_encoder`, or ``stage_one`` to train one; ``fit`` images estimate unknown statistics."""

    name: str | None = "va-vae"
    weights: Path | None = None
    sample: bool = False
    half: bool = False
    fit: int = Field(10_000, ge=1)
    stage_one: StageOneConfig | None = None


@dataclass(frozen=True, config=STRICT)
class GeneratorConfig:
    """One of the presets, or sizes of one's own; None takes the preset's."""

    preset: str | None = "crossflow-b"
    channels: int = 32
    grid: int = 16
    patch: int = 16
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    condition: Literal["s", "t,s", "t-s"] = "s"
    class_tokens: int = 12
    time_tokens: int = 4
    checkpointing: bool = False


@dataclass(frozen=True, config=STRICT)
class ObjectiveConfig:
    """Which objective, its schedule, how often s = t, and how many labels are dropped.

    ``consistency`` is kappa = 0 with its boundary loss; ``estimated`` differentiates along the estimated marginal velocity.
    """

    kind: Literal["crossflow", "consistency"] = "crossflow"
    alpha: str = "1 - t"
    beta: str = "t"
    literal: bool = False
    estimated: bool = False
    penalty: Literal["absolute", "squared", "huber"] = "absolute"
    equal: float = Field(0.5, ge=0, le=1)
    shifted: bool = True
    drop_labels: float = Field(0.0, ge=0, le=1)


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    """The optimiser and the loop; ``steps`` overrides ``epochs``."""

    epochs: float = Field(160, gt=0)
    steps: int | None = None
    batch: int = Field(1024, ge=1)
    accumulate: int = Field(1, ge=1)
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = Field(8e-4, gt=0)
    weight_decay: float = Field(1e-6, ge=0)
    warmup_epochs: float = Field(5, ge=0)
    final_rate: float = Field(1.0, gt=0, le=1)
    emas: tuple[float, ...] = (0.9999, 0.9995, 0.999)
    clip: float = Field(1.0, gt=0)
    bfloat16: bool = True
    sharded: bool = False
    processes: int | None = None
    cpu: bool = False
    seed: int = 0
    checkpoint_every: int = Field(2000, ge=1)
    log_every: int = Field(50, ge=1)
    look_every: int = Field(5000, ge=1)
    skips: int = Field(10, ge=0)
    tensorboard: bool = True
    wandb: bool = False


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """How many samples are judged, by what (``inception``, or a timm network) and against which folder."""

    samples: int = Field(50_000, ge=1)
    extractor: str = "inception"
    weights: str | None = None
    size: int | None = None
    reference: str | None = None
    batch: int = Field(50, ge=1)


@dataclass(frozen=True, config=STRICT)
class Config:
    """A whole run."""

    name: str
    out: Path
    data: DataConfig = Field(default_factory=DataConfig)
    encoder: EncoderConfig = Field(default_factory=EncoderConfig)
    generator: GeneratorConfig = Field(default_factory=GeneratorConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    perceptual: tuple[PerceptualConfig, ...] = ()
    adversarial: AdversarialConfig | None = None
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)


def load(path: Path, changes: Sequence[str] = ()) -> Config:
    """Read a config.

    Args:
        path: of a YAML file.
        changes: such as ``training.batch=64``; the value is YAML.

    Raises:
        RunError: if a file is missing or is not YAML.
        InputError: if a key is not known, with the nearest one, or a value does not fit.
    """
    found = _read(path)
    for change in changes:
        keys, equals, value = change.partition("=")
        if not equals:
            raise InputError(f"{change!r} came; write KEY=VALUE, such as training.batch=64")
        nested: Any = yaml.safe_load(value)
        for key in reversed(keys.split(".")):
            nested = {key: nested}
        found = _merged(found, nested)
    found = {"name": path.stem, "out": f"runs/{path.stem}"} | found
    _known(found, Config, path, "")
    try:
        return TypeAdapter(Config).validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {where} = {first['input']!r} came; {first['msg']}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); write the path of a config in YAML") from None
    except yaml.YAMLError as error:
        raise RunError(f"{path} is not YAML: {error}") from None
    if not isinstance(found, dict):
        raise RunError(f"{path} holds {type(found).__name__}; a config is a mapping of keys to values")
    base = found.pop("base", None)
    return _merged(_read(path.parent / base), found) if base else found


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return the union of nested mappings; lists and values are replaced whole."""
    both = {
        key: _merged(under[key], value)
        for key, value in over.items()
        if isinstance(value, Mapping) and isinstance(under.get(key), Mapping)
    }
    return {**under, **over, **both}


def _known(found: Any, kind: Any, path: Path, before: str) -> None:
    """Refuse keys that a dataclass has not, naming the nearest that it has."""
    if isinstance(found, (list, tuple)):
        for item in found:
            _known(item, kind, path, before)
    kinds = [part for part in _leaves(kind) if is_dataclass(part)]
    if not kinds or not isinstance(found, Mapping):
        return
    inner = {field.name: field.type for field in fields(kinds[0])}
    for key, value in found.items():
        if key not in inner:
            near = difflib.get_close_matches(str(key), inner, 1)
            hint = f"did you mean {before}{near[0]}?" if near else f"known are {', '.join(inner)}"
            raise InputError(f"{path}: {before}{key} is not known; {hint}")
        _known(value, inner[key], path, f"{before}{key}.")


def _leaves(kind: Any) -> list[Any]:
    """Return the types that a hint is made of: of ``X | None`` and ``tuple[X, ...]``, X."""
    return [leaf for part in get_args(kind) for leaf in _leaves(part)] or [kind]
