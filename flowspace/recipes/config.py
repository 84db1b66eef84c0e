"""What a run of the ImageNet recipe is made of, as typed dataclasses, and how they are read from
YAML (pydantic checks them).

A config may name another one as its ``base`` and say only what differs.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from flowspace.errors import InputError, RunError
from flowspace.schedules import TIME_FLOOR

__all__ = ["Config", "load"]

STRICT = ConfigDict(extra="forbid")
Count = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Level = Annotated[float, Field(ge=TIME_FLOOR, le=1)]


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Pictures: a folder of one folder a class (or ``openmoji``, drawn from the package), their
    size, how many classes.

    ``source`` says whether the path is such a folder, a Hugging Face data set, or webdataset's
    shards; ``latents`` is the folder of ``flowspace encode``, read instead of running the encoder.
    """

    path: str = "data/imagenet/train"
    source: Literal["folder", "dataset", "shards"] = "folder"
    size: Count = 256
    classes: Count | None = 1000
    flip: bool = True
    workers: Count = 8
    latents: str | None = None


@dataclass(frozen=True, config=STRICT)
class PerceptualConfig:
    """A perceptual term: a timm network (or ``lpips``), its weights (a file, or ``package:NAME``),
    layers and weight.

    ``unit`` scales the features of each place to length 1, as LPIPS does.
    """

    network: str
    weights: str | None = None
    weight: Weight = 1.0
    size: int | None = 224
    layers: tuple[int, ...] | None = None
    below: float = 2.0
    unit: bool = False
    literal: bool = False


@dataclass(frozen=True, config=STRICT)
class AdversarialConfig:
    """The discriminator: heads on a frozen timm network; ``power`` is p of w(t) = alpha(t)^p.

    ``adaptive`` also weighs it by the ratio of the gradients at each image.
    """

    network: str
    weights: str | None = None
    weight: Weight = 0.1
    size: int | None = 224
    layers: tuple[int, ...] = (2, 5, 8, 11)
    channels: tuple[int, ...] = (384, 384, 384, 384)
    width: int = 64
    kernel: int = 9
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

    channels: int = 8
    widths: tuple[int, ...] = (32, 64, 64)
    steps: Count = 500
    batch: Count = 32
    learning_rate: Positive = 1e-3
    kl: Weight = 1e-4
    adversarial: AdversarialConfig | None = None


@dataclass(frozen=True, config=STRICT)
class EncoderConfig:
    """A name or path for `load_encoder`, or ``stage_one`` to train one; ``fit`` images estimate
    unknown statistics.

    ``pack`` makes one cell of pack x pack cells.
    """

    name: str | None = "va-vae"
    weights: Path | None = None
    sample: bool = False
    half: bool = False
    pack: int | None = None
    fit: Count = 10_000
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

    ``consistency`` is kappa = 0 with its boundary loss; ``estimated`` differentiates along the
    estimated marginal velocity.
    """

    kind: Literal["crossflow", "consistency"] = "crossflow"
    alpha: str = "1 - t"
    beta: str = "t"
    literal: bool = False
    estimated: bool = False
    penalty: Literal["absolute", "squared", "huber"] = "absolute"
    equal: Share = 0.5
    shifted: bool = True
    drop_labels: Share = 0.0


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    """The optimiser and the loop; ``steps`` overrides ``epochs``."""

    epochs: Positive = 160
    steps: int | None = None
    batch: Count = 1024
    accumulate: Count = 1
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: Positive = 8e-4
    weight_decay: Weight = 1e-6
    warmup_epochs: Weight = 5
    final_rate: Positive = 1.0
    emas: Annotated[tuple[Decay, ...], Field(min_length=1)] = (0.9999, 0.9995, 0.999)
    clip: Positive = 1.0
    bfloat16: bool = True
    sharded: bool = False
    processes: int | None = None
    cpu: bool = False
    seed: int = 0
    checkpoint_every: Count = 2000
    log_every: Count = 50
    look_every: Count = 5000
    skips: Number = 10
    tensorboard: bool = True
    wandb: bool = False


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """How many samples are judged, by what (``inception``, or a timm network) and against which
    folder.

    ``pinned`` is the SHA-256 that the reference's features must have; a file of samples holds
    ``shard`` batches.
    """

    samples: Count = 50_000
    extractor: str = "inception"
    weights: str | None = None
    size: int | None = None
    reference: str | None = None
    pinned: str | None = None
    batch: Count = 50
    shard: Count = 20


@dataclass(frozen=True, config=STRICT)
class LatentConfig:
    """A latent generator by flow matching, in the blocks of `CrossFlowGenerator`
    (LightningDiT-B/1's size by default).

    It is trained once the run is finished, and its samples are decoded by the autoencoder's
    decoder and by `CrossFlowDecoder` at each of the noise ``levels``; ``evaluations`` is of its
    ODE, by Heun's rule two a step. A generator that sees s alone is told the level by ``rescale``,
    which multiplies latents by alpha(level).
    """

    depth: Count = 12
    width: Count = 768
    heads: Count = 12
    levels: tuple[Level, ...] = (0.05, 0.1, 0.2)
    rescale: bool = True
    evaluations: Count = 50
    samples: Count = 5000
    training: TrainingConfig = field(default_factory=TrainingConfig)


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
    latent: LatentConfig | None = None


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
        try:
            nested: Any = yaml.safe_load(value)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", error)
            raise InputError(
                f"{change!r} came, whose value is not YAML ({problem}); is it in quotes?"
            ) from None
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
        raise RunError(
            f"{path} cannot be read ({error.strerror}); write the path of a config in YAML"
        ) from None
    except yaml.YAMLError as error:
        raise RunError(f"{path} is not YAML: {error}") from None
    if not isinstance(found, dict):
        raise RunError(
            f"{path} holds {type(found).__name__}; a config is a mapping of keys to values"
        )
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
    inner = {one.name: one.type for one in fields(kinds[0])}
    for key, value in found.items():
        if key not in inner:
            near = difflib.get_close_matches(str(key), inner, 1)
            hint = f"did you mean {before}{near[0]}?" if near else f"known are {', '.join(inner)}"
            raise InputError(f"{path}: {before}{key} is not known; {hint}")
        _known(value, inner[key], path, f"{before}{key}.")


def _leaves(kind: Any) -> list[Any]:
    """Return the types that a hint is made of: of ``X | None`` and ``tuple[X, ...]``, X."""
    return [leaf for part in get_args(kind) for leaf in _leaves(part)] or [kind]
