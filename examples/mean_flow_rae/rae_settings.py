"""The settings of a run, read before torch is imported."""

import dataclasses
import math
import sys
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass
from reading import (
    STRICT,
    Count,
    Decay,
    Positive,
    SettingsError,
    Share,
    Weight,
    check_folder,
    check_installed,
    check_weights,
    check_writable,
)
from sections import SETS, AdversarialConfig, PerceptualConfig, ProgramConfig, TrainingConfig


@dataclass(frozen=True, config=STRICT)
class RepresentationConfig:
    """The frozen encoder, and the decoder of its features.

    Either ``source``, published weights by name or a folder, whose encoder is kept; its decoder
    too, unless the stage ``decoder`` trains another one of the size ``decoder``. Or a timm
    ``network`` with ``weights``, one of whose ``layers`` is the representation: ``cell`` pixels a
    side are one cell, of so many ``channels``.
    """

    source: str | None = None
    encoder: str = "dinov2"
    decoder: str = "xl"
    sizes: dict[str, int] = field(default_factory=dict)
    network: str | None = None
    weights: str | None = None
    layer: int = 2
    channels: Count = 768
    cell: Count = 16
    tau: Weight = 0.8
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None
    cached: bool = False


@dataclass(frozen=True, config=STRICT)
class DiTDHConfig:
    """DiT^DH, on a grid of ``grid`` x ``grid`` cells."""

    grid: Count = 16
    depth: Count = 28
    width: Count = 1152
    heads: Count = 16
    head_depth: Count = 2
    head_width: Count = 2048
    head_heads: Count = 16
    compile: bool = False


@dataclass(frozen=True, config=STRICT)
class StageConfig:
    """What a stage's training has other than ``training``; None is as there."""

    epochs: Positive | None = None
    steps: Count | None = None
    batch: Count | None = None
    accumulate: Count | None = None
    learning_rate: Positive | None = None
    warmup_epochs: Weight | None = None
    final_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    decay_epochs: tuple[Weight, Weight] | None = None
    emas: tuple[Decay, ...] | None = None
    clip: Positive | None = None

    def over(self, training: TrainingConfig, seed: int) -> TrainingConfig:
        """Return the training of this stage, which draws from a seed of its own."""
        said = {}
        for name, value in dataclasses.asdict(self).items():
            if value is not None:
                said[name] = value
        return dataclasses.replace(training, **said, seed=training.seed + seed)


@dataclass(frozen=True, config=STRICT)
class ObjectivesConfig:
    """``drop_labels`` is of flow matching; ``steps`` and ``pairs`` are the trajectories'; the
    derivative is the central difference of ``difference``, or exact where that is null; ``mix`` is
    the teacher's share of the velocity in distillation, ``equal`` the share of s = t. Times are
    shifted for ``dim`` numbers of a latent, by sqrt(dim / 4096), and where it is null for as many
    as there are: 4096, which shifts nothing, suits smaller latents, whose times would lean to the
    data.
    """

    drop_labels: Share = 0.0
    steps: Count = 16
    pairs: Count | None = 64
    difference: Positive | None = 0.005
    mix: Share = 1.0
    equal: Share = 0.0
    dim: Count | None = None


@dataclass(frozen=True, config=STRICT)
class RAEConfig(ProgramConfig):
    """A run: the stages that are not null, in this order.

    ``teacher`` is the folder of a flow-matching network, instead of the stage that trains one;
    ``scratch`` is the baseline, MeanFlow without the other stages.
    """

    representation: RepresentationConfig = field(default_factory=RepresentationConfig)
    network: DiTDHConfig = field(default_factory=DiTDHConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    teacher: Path | None = None
    decoder: StageConfig | None = None
    flow_matching: StageConfig | None = None
    mid_training: StageConfig | None = None
    distillation: StageConfig | None = None
    fine_tuning: StageConfig | None = None
    scratch: StageConfig | None = None
    teacher_steps: Count = 50

    def __post_init__(self) -> None:
        r = self.representation
        if (r.source is None) == (r.network is None):
            raise ValueError("write representation.source or representation.network, one of them")
        if r.network is not None and self.decoder is None:
            raise ValueError("features of a network have no decoder; write a stage decoder")
        if (self.teacher is None) == (self.flow_matching is None):
            raise ValueError("write teacher or flow_matching: where the teacher comes from")
        if self.evaluation.evaluations != 1:
            raise ValueError(
                f"got evaluation.evaluations = {self.evaluation.evaluations}, but one and two are "
                "judged; leave it out, and write teacher_steps for the steps of a teacher alone"
            )
        grid, size = self.network.grid, self.data.size
        if r.network is not None and grid * r.cell != size:
            raise ValueError(
                f"{grid} cells of {r.cell} pixels are no picture of {size}; "
                f"write network.grid={size // r.cell}"
            )

    @property
    def latent(self) -> tuple[int, int, int]:
        """The shape of a latent, (channels, h, w)."""
        return self.representation.channels, self.network.grid, self.network.grid

    @property
    def dim(self) -> int:
        """How many numbers of a latent times are shifted for."""
        return self.objectives.dim or math.prod(self.latent)

    def sizes(self, classes: int) -> dict[str, Any]:
        """Return the arguments of the network for so many classes."""
        found = dataclasses.asdict(self.network)
        found.pop("compile")
        return found | {"channels": self.representation.channels, "classes": classes}


def check(config: RAEConfig) -> None:
    """See that what a config names is there, and that its folder can be written to, unless only
    shapes are looked at.

    Raises:
        SettingsError: if it is not.
    """
    if "--check" in sys.argv:
        return
    pictures = (*SETS, *[f"{name}/test" for name in SETS])
    check_folder("data.path", config.data.path, pictures)
    if config.teacher is not None and not config.teacher.is_dir():
        raise SettingsError(f"got teacher = {config.teacher}, no folder; write teacher=FOLDER")
    check_weights(_weights(config))
    if "--evaluate" in sys.argv:
        e = config.evaluation
        check_folder("evaluation.reference", e.reference, pictures)
        check_folder("evaluation.held_out", e.held_out, pictures)
        check_weights(_weights_of_judges(config))
    if config.training.wandb:
        check_installed("training.wandb", "wandb")
    check_writable(config.out)


def _weights(config: RAEConfig) -> dict[str, str | None]:
    """Return the files of weights that training needs, by their keys."""
    r = config.representation
    found = {"representation.weights": r.weights}
    if r.perceptual is not None:
        found["representation.perceptual.weights"] = r.perceptual.weights
    if r.adversarial is not None:
        found["representation.adversarial.weights"] = r.adversarial.weights
    return found


def _weights_of_judges(config: RAEConfig) -> dict[str, str | None]:
    """Return the files of weights of the networks that judge, by their keys."""
    found = {"evaluation.weights": config.evaluation.weights}
    for number, judge in enumerate(config.evaluation.extractors):
        found[f"evaluation.extractors.{number}.weights"] = judge.weights
    return found
