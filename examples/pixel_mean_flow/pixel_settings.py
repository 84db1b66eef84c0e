"""The settings of a run of pixel MeanFlow; nothing heavy is imported here."""

import sys
from dataclasses import dataclass as plain
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))

import reading
from pydantic import Field
from pydantic.dataclasses import dataclass
from reading import STRICT, Count, Positive, SettingsError, Share
from sections import SETS, PerceptualConfig, ProgramConfig, check_judges

PAPER = Path(__file__).parent / "configs" / "paper"
"""The configs with the published settings."""

CLASSIFIERS = "classifiers"
"""The ``evaluation.extractor`` of grey sets: classifiers that are trained on the spot."""

GREY = ("digits", "mnist", "fashion-mnist")
"""What they judge."""

Strength = Annotated[float, Field(ge=1)]


@dataclass(frozen=True, config=STRICT)
class PixelMeanFlowNetworkConfig:
    """A preset, ``b``, ``l`` or ``h``, and what differs from it; null takes the preset's.

    ``compile`` runs the blocks compiled, and the derivative with them.
    """

    preset: Literal["b", "l", "h"] = "b"
    patch: Count | None = None
    depth: Count | None = None
    width: Count | None = None
    heads: Count | None = None
    bottleneck: Count | None = None
    head_depth: Count | None = None
    tokens: tuple[Count, ...] | None = None
    compile: bool = False


@dataclass(frozen=True, config=STRICT)
class PixelMeanFlowObjectiveConfig:
    """The noise, the times and the guidance in training.

    ``noise_scale`` is the standard deviation of the noise. t and s are logit-normal with
    ``location`` and ``spread``, for the ``uniform`` share of rows uniform; half of the rows have
    s = t. The strength of the guidance is drawn from [1, ``largest_omega``] with a density of
    omega^-``power``; ``drop`` is the share of rows without a class. ``crop`` is the side of the
    random crops that perceptual terms compare; null compares whole images.
    """

    noise_scale: Positive = 1.0
    location: float = 0.8
    spread: Positive = 0.8
    uniform: Share = 0.0
    largest_omega: Strength = 8.0
    power: float = 1.0
    drop: Share = 0.1
    crop: Count | None = None


@dataclass(frozen=True, config=STRICT)
class PixelPerceptualConfig(PerceptualConfig):
    """A perceptual term; ``pooled`` compares the mean of the last features over the image."""

    pooled: bool = False


@dataclass(frozen=True, config=STRICT)
class PixelMeanFlowSamplingConfig:
    """The guidance of samples: its strength, and the interval of times that it is told."""

    omega: Strength = 7.0
    interval: tuple[Share, Share] = (0.0, 1.0)


@dataclass(frozen=True, config=STRICT)
class PixelMeanFlowConfig(ProgramConfig):
    """All settings of a run."""

    network: PixelMeanFlowNetworkConfig = field(default_factory=PixelMeanFlowNetworkConfig)
    objective: PixelMeanFlowObjectiveConfig = field(default_factory=PixelMeanFlowObjectiveConfig)
    perceptual: tuple[PixelPerceptualConfig, ...] = ()
    sampling: PixelMeanFlowSamplingConfig = field(default_factory=PixelMeanFlowSamplingConfig)


def from_command_line(usage: str | None) -> tuple[PixelMeanFlowConfig | None, list[str]]:
    """Return the config and the options of the command line; no config with ``--check``."""
    if sys.argv[1:] == ["--check"]:
        return None, []
    return reading.from_command_line(PixelMeanFlowConfig, usage, ("--evaluate",), check)


def check(config: PixelMeanFlowConfig) -> None:
    """See that what a config names is there, before torch is imported.

    The weights of what judges are looked for with ``--evaluate`` alone.

    Raises:
        SettingsError: if it is not.
    """
    path, evaluation = config.data.path, config.evaluation
    places = {
        "data.path": path,
        "evaluation.reference": evaluation.reference,
        "evaluation.held_out": evaluation.held_out,
    }
    for key, place in places.items():
        reading.check_folder(key, place, SETS)
    files = {}
    for number, term in enumerate(config.perceptual):
        files[f"perceptual.{number}.weights"] = term.weights
    reading.check_weights(files)
    if evaluation.extractor == CLASSIFIERS and path not in GREY:
        raise SettingsError(
            f"got evaluation.extractor = {CLASSIFIERS} for data.path = {path}; "
            f"they judge {', '.join(GREY)}"
        )
    if "--evaluate" in sys.argv:
        check_judges(evaluation)
    reading.check_writable(config.out)


@plain(frozen=True)
class Published:
    """What the paper reports for a config of `PAPER`.

    Attributes:
        config: its name.
        fid: with 50,000 samples in one evaluation, on ImageNet.
        millions: parameters of the network that samples, where the paper counts them.
    """

    config: str
    fid: float
    millions: float | None = None


PUBLISHED = (
    Published("b-256", 3.12, 118),
    Published("l-256", 2.52, 410),
    Published("h-256", 2.22, 956),
    Published("h-512", 2.48),
)
