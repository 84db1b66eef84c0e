"""The settings of a run, as typed dataclasses; ``examples/common/reading.py`` reads them.

Nothing heavy is imported here, and every program of this folder imports it before anything that
stands in ``examples/common``, which it puts on the path.
"""

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "common"))

import reading
from pydantic import Field
from pydantic.dataclasses import dataclass
from reading import (
    STRICT,
    Count,
    Positive,
    SettingsError,
    Share,
    Size,
    Weight,
    replaced,
    run_program,
)
from sections import (
    SETS,
    AdversarialConfig,
    EvaluationConfig,
    PerceptualConfig,
    PicturesConfig,
    ProgramConfig,
    TrainingConfig,
)

__all__ = [
    "AdversarialConfig",
    "EvaluationConfig",
    "ImageNetConfig",
    "PerceptualConfig",
    "SettingsError",
    "TrainingConfig",
    "check_evaluation",
    "check_places",
    "from_command_line",
    "load",
    "of_run",
    "replaced",
    "run_program",
]

MEAN_FLOWS = ("meanflow", "improved-meanflow")
"""Objectives whose paper says their times."""


@dataclass(frozen=True, config=STRICT)
class DataConfig(PicturesConfig):
    """The pictures; ``latents`` is the folder that ``encode.py`` wrote.

    It is read instead of running the encoder.
    """

    latents: str | None = None


@dataclass(frozen=True, config=STRICT)
class StageOneConfig:
    """An autoencoder trained on the spot; its decoder is kept only for comparison.

    ``linear`` is the side of the squares of pixels of which a linear autoencoder keeps
    ``channels`` principal components, in closed form; the other settings are then not used.
    """

    channels: Size = 8
    linear: Size | None = None
    widths: Annotated[tuple[Size, ...], Field(min_length=1)] = (32, 64, 64)
    steps: Count = 500
    batch: Count = 32
    learning_rate: Positive = 1e-3
    kl: Weight = 1e-4
    adversarial: AdversarialConfig | None = None


@dataclass(frozen=True, config=STRICT)
class EncoderConfig:
    """A name or path for `load_encoder`, or ``stage_one`` to train one.

    ``weights`` is the folder that holds ``NAME/`` of a name; None asks the hub's cache.
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
    images. ``head_kind`` is what makes pixels of cells; the convolutional one is ours, and has
    ``head_channels`` at the resolution of the image. ``compile`` runs its blocks, the
    encoder and the networks of the image losses compiled, where training calls them.
    """

    preset: str | None = "crossflow-b"
    space: Literal["image", "latent"] = "image"
    channels: Size = 32
    grid: Size = 16
    patch: Size = 16
    depth: Size | None = None
    width: Size | None = None
    heads: Size | None = None
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    condition: Literal["s", "t,s", "t-s"] = "s"
    class_tokens: Size = 12
    time_tokens: Size = 4
    head_kind: Literal["linear", "convolutional"] = "linear"
    head_channels: Size = 16
    checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True, config=STRICT)
class ObjectiveConfig:
    """Which objective, its schedule, how often s = t, and how many labels are dropped.

    ``literal`` puts the stop-gradient where the paper writes it; ``estimated`` differentiates
    along the estimated marginal velocity. ``consistency`` is kappa = 0 with its boundary loss.
    ``literal``, ``estimated`` and ``equal`` are crossflow's; the mean flows draw the times of
    their papers, without the shift.
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
class ImageNetConfig(ProgramConfig):
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    perceptual: tuple[PerceptualConfig, ...] = ()
    adversarial: AdversarialConfig | None = None

    def __post_init__(self) -> None:
        check_encoder(self.encoder)
        check_objective(self.objective, self.generator)
        across = self.perceptual or self.adversarial
        if across and self.generator.space == "latent":
            raise ValueError(
                "got perceptual or adversarial losses for latents; they compare images: leave "
                "them out, or write generator.space=image"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        return reading.as_dict(self)


# --- what fits together ------------------------------------------------------------------------


def check_encoder(encoder: EncoderConfig) -> None:
    """See that the encoder is either named or trained, and that its settings are used.

    Raises:
        ValueError: if they do not fit; it says what to write.
    """
    if encoder.stage_one and encoder.name:
        raise ValueError(
            f"got encoder.name = {encoder.name!r} beside encoder.stage_one; write one of "
            "them, and null for the other"
        )
    if not (encoder.stage_one or encoder.name):
        raise ValueError(
            "got no encoder; write encoder.name, such as va-vae or a path, or "
            "encoder.stage_one to train one"
        )
    if encoder.stage_one and (encoder.half or encoder.weights):
        raise ValueError(
            "got encoder.half or encoder.weights beside encoder.stage_one, whose encoder is "
            "trained here and stays in float32; write encoder.half=false encoder.weights=null"
        )


def check_objective(objective: ObjectiveConfig, generator: GeneratorConfig) -> None:
    """See that the objective uses its settings, and that the network sees the times it needs.

    Raises:
        ValueError: if they do not fit; it says what to write.
    """
    kind = objective.kind
    if kind != "crossflow" and (objective.literal or objective.estimated):
        raise ValueError(
            f"got literal or estimated with objective.kind = {kind}; both are crossflow's"
        )
    if kind not in ("crossflow", "consistency") and generator.space == "image":
        raise ValueError(
            f"got objective.kind = {kind} for images, but it stays in one space; write "
            "generator.space=latent"
        )
    if kind != "crossflow" and objective.equal != ObjectiveConfig.equal:
        raise ValueError(
            f"got objective.equal = {objective.equal} with objective.kind = {kind}, whose times "
            f"are its own; leave it out, or write objective.equal={ObjectiveConfig.equal}"
        )
    if kind in MEAN_FLOWS and not objective.shifted:
        raise ValueError(
            f"got objective.shifted = false with objective.kind = {kind}, which draws the times "
            "of its paper; leave it out, or write objective.shifted=true"
        )
    check_condition(kind, generator.condition)


def check_condition(kind: str, condition: str) -> None:
    """See that the network of an objective in latents sees what its rows differ in.

    Raises:
        ValueError: if it does not.
    """
    if kind in MEAN_FLOWS and condition == "s":
        raise ValueError(
            f"got generator.condition = s with objective.kind = {kind}: the network would not "
            "see the time of its input; write generator.condition=t,s"
        )
    if kind == "flow-matching" and condition == "t-s":
        raise ValueError(
            "got generator.condition = t-s with objective.kind = flow-matching, where s = t: the "
            "network would see no time; write generator.condition=t,s"
        )


# --- reading -----------------------------------------------------------------------------------


def from_command_line(
    usage: str | None, options: Sequence[str] = (), latents_made: bool = False
) -> tuple[ImageNetConfig, list[str]]:
    """Return the config of ``CONFIG key=value ...`` and the options that were given.

    With ``latents_made`` the folder of latents need not be there.

    Ends the program, with one line that says why, where they cannot be used.
    """
    check = functools.partial(check_places, latents_made=latents_made)
    return reading.from_command_line(ImageNetConfig, usage, options, check)


def load(path: Path, changes: Sequence[str] = ()) -> ImageNetConfig:
    """Read a config, with changes such as ``training.batch=64``; see `reading.load`."""
    return reading.load(ImageNetConfig, path, changes)


def of_run(folder: Path, changes: Sequence[str] = ()) -> ImageNetConfig:
    """Read the config that a run left in its folder; see `reading.of_run`."""
    return reading.of_run(ImageNetConfig, folder, changes)


# --- what the settings name --------------------------------------------------------------------


def check_places(config: ImageNetConfig, latents_made: bool = False) -> None:
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
        if place not in (None, *SETS) and not Path(place).is_dir():
            hint = f"write data.{name}=FOLDER"
            if name == "latents":
                hint += ", which encode.py makes of the same config, or null to encode every step"
            raise SettingsError(f"got data.{name} = {place}, which is no folder; {hint}")
    check_evaluation(config)
    if config.encoder.weights:
        reading.check_folder("encoder.weights", os.fspath(config.encoder.weights))
    reading.check_weights(_weights(config))
    if config.training.wandb:
        reading.check_installed("training.wandb", "wandb")
    reading.check_writable(config.out)


def check_evaluation(config: ImageNetConfig) -> None:
    """See that what judges is there, but for Inception's weights, which may come later.

    Raises:
        SettingsError: if it is not.
    """
    e = config.evaluation
    reading.check_folder("evaluation.held_out", e.held_out, SETS)
    files: dict[str, str | None] = {}
    if e.extractor != "inception":
        files["evaluation.weights"] = e.weights
    for number, judge in enumerate(e.extractors):
        if judge.network != "inception":
            files[f"evaluation.extractors.{number}.weights"] = judge.weights
    reading.check_weights(files)


def _weights(config: ImageNetConfig) -> dict[str, str | None]:
    """Return the files of weights that training needs, by their keys."""
    found: dict[str, str | None] = {}
    for number, term in enumerate(config.perceptual):
        found[f"perceptual.{number}.weights"] = term.weights
    if config.adversarial:
        found["adversarial.weights"] = config.adversarial.weights
    return found
