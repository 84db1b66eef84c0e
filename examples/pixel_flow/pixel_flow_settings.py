"""The settings of the PixelFlow program; nothing heavy is imported here."""

import sys
from dataclasses import field
from typing import Annotated, Literal

import reading
from pydantic import Field
from pydantic.dataclasses import dataclass
from reading import STRICT, Count, Positive, SettingsError, Share, Weight
from sections import SETS, ProgramConfig, check_judges

__all__ = [
    "CascadeConfig",
    "ConditionConfig",
    "PixelFlowConfig",
    "PixelFlowNetworkConfig",
    "PixelFlowSamplingConfig",
    "check",
    "check_compared",
]


@dataclass(frozen=True, config=STRICT)
class PixelFlowNetworkConfig:
    """The transformer: a preset, or depth, width and heads; ``patch`` is pixels a side.

    ``begin`` is the folder of a trained network, such as ``network`` of another run, whose weights
    are the first ones; it may lack what this one is told. Null begins untrained.
    """

    preset: Literal["b", "l", "xl"] | None = "xl"
    depth: Count | None = None
    width: Count | None = None
    heads: Count | None = None
    patch: Count = 4
    begin: str | None = None
    compile: bool = False
    checkpointing: bool = False


@dataclass(frozen=True, config=STRICT)
class CascadeConfig:
    """The stages: ``kickoff`` is pixels a side of the first; its double follows, up to the size.

    ``kickoff`` equal to the size of the pictures is no cascade. ``packed`` trains all sizes in one
    call of the network, which flow matching alone allows.
    """

    kickoff: Count = 32
    objective: Literal["flow-matching", "meanflow", "crossflow"] = "flow-matching"
    packed: bool = True


@dataclass(frozen=True, config=STRICT)
class ConditionConfig:
    """What the network is told: classes or captions, which a share of the rows loses.

    ``encoder`` is that of captions: a folder, a name of the hub's cache, or ``minilm``; ``length``
    and ``width`` are those of its tokens.
    """

    kind: Literal["classes", "captions"] = "classes"
    drop: Share = 0.1
    encoder: str = "minilm"
    length: Count = 16
    width: Count = 384


@dataclass(frozen=True, config=STRICT)
class PixelFlowSamplingConfig:
    """How samples are drawn.

    ``steps`` are those of each stage: one number, or one for each. ``flow-map`` steps by the
    average velocity, which one-step stages need. ``guidance`` 1 is none; ``ramp`` are the shares
    of it that each stage takes, null is all of it in every stage.
    """

    solver: Literal["euler", "dormand-prince", "flow-map"] = "euler"
    steps: Count | tuple[Count, ...] = 30
    atol: Positive = 1e-6
    rtol: Positive = 1e-5
    guidance: Weight = 2.4
    ramp: Annotated[tuple[Share, ...], Field(min_length=1)] | None = None


@dataclass(frozen=True, config=STRICT)
class PixelFlowConfig(ProgramConfig):
    """A run."""

    network: PixelFlowNetworkConfig = field(default_factory=PixelFlowNetworkConfig)
    cascade: CascadeConfig = field(default_factory=CascadeConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    sampling: PixelFlowSamplingConfig = field(default_factory=PixelFlowSamplingConfig)

    def __post_init__(self) -> None:
        size, kickoff, patch = self.data.size, self.cascade.kickoff, self.network.patch
        if kickoff << (self.stages - 1) != size:
            raise ValueError(
                f"got cascade.kickoff = {kickoff} for data.size = {size}; each stage doubles the "
                f"one before, so write {size} for no cascade, or {size} halved, as {size // 2}"
            )
        if kickoff % patch:
            raise ValueError(
                f"got network.patch = {patch} for cascade.kickoff = {kickoff}; write a patch that "
                "divides it"
            )
        one_step = self.cascade.objective != "flow-matching"
        if one_step and (self.cascade.packed or self.sampling.solver != "flow-map"):
            raise ValueError(
                f"got cascade.objective = {self.cascade.objective}, which trains steps of the "
                "flow map; write cascade.packed=false sampling.solver=flow-map"
            )
        evaluations = self.evaluation.evaluations
        if evaluations != 1:
            raise ValueError(
                f"got evaluation.evaluations = {evaluations}, which PixelFlow does not read; "
                f"write sampling.steps={evaluations}, which are those of each stage"
            )
        for name in ("ramp", "steps"):
            given = getattr(self.sampling, name)
            if isinstance(given, tuple) and len(given) != self.stages:
                raise ValueError(
                    f"got {len(given)} numbers in sampling.{name} for {self.stages} stage(s); "
                    "write one for each, coarsest first"
                )

    @property
    def stages(self) -> int:
        """How many stages lead from the kick-off to the size of the pictures."""
        return max(1, (self.data.size // self.cascade.kickoff).bit_length())

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of each stage."""
        if isinstance(self.sampling.steps, int):
            return (self.sampling.steps,) * self.stages
        return self.sampling.steps


# --- what the settings name --------------------------------------------------------------------


def check(config: PixelFlowConfig) -> None:
    """See that what a config names is there, before torch is imported.

    With ``--check`` nothing is read and nothing is written, so nothing is looked for.

    Raises:
        SettingsError: if it is not.
    """
    if "--check" in sys.argv:
        return
    e = config.evaluation
    places = {
        "data.path": config.data.path,
        "evaluation.reference": e.reference,
        "evaluation.held_out": e.held_out,
    }
    for key, place in places.items():
        reading.check_folder(key, place, SETS)
    reading.check_folder("network.begin", config.network.begin)
    check_judges(e)
    reading.check_writable(config.out)


def check_compared(config: PixelFlowConfig) -> None:
    """See, as `check` does, that what `pixel_flow_compare.py` needs is there.

    Raises:
        SettingsError: if it is not.
    """
    if config.evaluation.reference is None:
        raise SettingsError(
            "got evaluation.reference = null, but what is compared is judged by held-out ones; "
            "write evaluation.reference=FOLDER, or a name such as digits/test"
        )
    check(config)
