"""Sections of a config that several programs share; they import nothing heavy."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from reading import (
    STRICT,
    Count,
    Decay,
    Number,
    Positive,
    SettingsError,
    Size,
    Weight,
    check_weights,
)

SETS = (
    "emoji",
    "emoji/smileys+animals",
    "digits",
    "digits/test",
    "mnist",
    "mnist/test",
    "fashion-mnist",
    "fashion-mnist/test",
)
"""Pictures that install from packages, for ``data.path``; see ``pictures.py``."""


@dataclass(frozen=True, config=STRICT)
class PicturesConfig:
    """Pictures: a folder of one folder a class, or one of `SETS`; and their size.

    ``source`` says whether the path is such a folder, a Hugging Face data set, or webdataset's
    shards.
    """

    path: str = "data/imagenet/train"
    source: Literal["folder", "dataset", "shards"] = "folder"
    size: Size = 256
    classes: Count | None = 1000
    flip: bool = True
    workers: Number = 8


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    """The optimiser and the loop; ``steps`` overrides ``epochs``.

    The rate rises linearly over ``warmup_epochs`` and falls to ``final_rate`` of it by half a
    cosine; between two ``decay_epochs`` it falls linearly instead. ``betas`` are AdamW's; None
    takes the library's, 0.9 and 0.95.

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
    decay_epochs: tuple[Weight, Weight] | None = None
    betas: tuple[Decay, Decay] | None = None
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
class PerceptualConfig:
    """A perceptual term: a timm network (or ``lpips``), its weights, layers and weight.

    ``weights`` is a file, or ``package:NAME``; ``unit`` scales the features of each place to
    length 1, as LPIPS does itself: it has its own layers, and takes images as they are.
    ``literal`` compares what the paper compares, the scaled prediction
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

    def __post_init__(self) -> None:
        resized = self.size not in (PerceptualConfig.size, None)
        if self.network == "lpips" and (resized or self.layers is not None or self.unit):
            raise ValueError(
                "got size, layers or unit for lpips, which takes images as they are, by its own "
                "layers, scaled already; leave them out"
            )


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
    width: Size = 64
    kernel: Size = 9
    power: Weight = 1.0
    start: Number = 0
    learning_rate: Positive = 2e-4
    augmented: bool = True
    penalty: Weight = 0.0
    r1: Weight = 0.0
    adaptive: bool = False


@dataclass(frozen=True, config=STRICT)
class ExtractorConfig:
    """A network that judges: ``inception`` or a timm network, its weights, the size it knows."""

    network: str
    weights: str | None = None
    size: Count | None = None


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """How many samples are judged, by what, and against which folder.

    ``extractor`` is ``inception`` or a timm network; ``pinned`` is the SHA-256 that the
    reference's features must have; a file of samples holds ``shard`` batches; ``evaluations`` is
    of a sampler that takes several steps; the judge is tried on ``tried`` real pictures first,
    and 0 trusts it.

    ``sets`` of samples are drawn by as many seeds: published FIDs are often the least of three,
    so that and the spread are said beside the first set's. More ``extractors`` give the score
    over several representations: the samples' Frechet distance over that of ``held_out``
    pictures, which nobody trained on, averaged (arXiv 2604.28190).
    """

    samples: Count = 50_000
    sets: Count = 1
    extractor: str = "inception"
    weights: str | None = None
    size: Count | None = None
    extractors: tuple[ExtractorConfig, ...] = ()
    reference: str | None = None
    held_out: str | None = None
    pinned: str | None = None
    batch: Count = 50
    shard: Count = 20
    evaluations: Count = 1
    tried: Number = 2000

    def __post_init__(self) -> None:
        if self.extractors and self.held_out is None:
            raise ValueError(
                "got extractors without held_out; their distances are over those of pictures that "
                "nobody trained on: write evaluation.held_out=FOLDER"
            )


@dataclass(frozen=True, config=STRICT)
class ProgramConfig:
    """What the config of every program has: a program's own derives from it.

    Where a file does not say them, ``name`` is the file's and ``out`` a folder of that name.
    """

    name: str
    out: Path
    data: PicturesConfig = field(default_factory=PicturesConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def check_judges(evaluation: EvaluationConfig) -> None:
    """See that the weights of all networks that judge are there.

    Raises:
        SettingsError: if they are not.
    """
    judges = {"evaluation": (evaluation.extractor, evaluation.weights)}
    for number, one in enumerate(evaluation.extractors):
        judges[f"evaluation.extractors.{number}"] = (one.network, one.weights)
    for key, (network, weights) in judges.items():
        if network == "inception" and weights is None:
            raise SettingsError(
                f"got {key}.weights = null for inception, whose weights are a file; "
                f"write {key}.weights=FILE"
            )
        check_weights({f"{key}.weights": weights})
