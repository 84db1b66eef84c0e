"""A run: its encoder, its training, what it ships, its samples and scores."""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flowspace.demo.page import write_beside
from flowspace.errors import InputError, RunError
from flowspace.objectives import Objective
from flowspace.recipes.config import Config
from flowspace.recipes.imagenet.look import Look, sheet, slopes
from flowspace.recipes.imagenet.parts import Parts, optimizer_of
from flowspace.recipes.imagenet.stage_one import encoder_of
from flowspace.training import records, train
from flowspace.vision.card import model_card
from flowspace.vision.encoders import LatentEncoder
from flowspace.vision.evaluate import Plan, Scores, features_of, judge
from flowspace.vision.generator import CrossFlowGenerator
from flowspace.vision.latents import encode
from flowspace.vision.pipeline import CrossFlowPipeline
from flowspace.vision.steps import FlowStep

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """A run of a config.

    Args:
        config: of the run.

    Attributes:
        parts: what it is made of.
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
            raise RunError(
                f"{folder} is no run ({error}); write the folder that flowspace train made"
            ) from None
        return cls(TypeAdapter(Config).validate_python(found | {"out": str(folder)}))

    @cached_property
    def parts(self) -> Parts:
        """What needs no training."""
        return Parts(self.config)

    @cached_property
    def encoder(self) -> LatentEncoder:
        """The frozen encoder: trained on the spot, or loaded; its statistics are known."""
        return encoder_of(self.parts)

    @cached_property
    def objective(self) -> Objective:
        """The objective."""
        return self.parts.objective(
            self.encoder.encode if self.config.objective.estimated else None
        )

    def step(self) -> Any:
        """Return what a training step is: the flow step, with an opponent where there is a
        discriminator.

        The networks of the losses are built first, since the encoder may have to be trained.
        """
        c, parts = self.config, self.parts
        perceptual = parts.perceptual(c.perceptual)
        opposed = parts.opponent(c.adversarial) if c.adversarial else None
        encoded = None if parts.cached else self.encoder.encode
        flow = FlowStep(
            self.objective, encoded, perceptual, c.objective.drop_labels, parts.classes
        )
        return opposed(flow) if opposed else flow.loss

    def encode(self) -> Path:
        """Encode all pictures once, shared by the processes; returns the folder of the latents."""
        _check_folder(self.config.out)
        d = self.config.data
        folder = Path(d.latents) if d.latents else self.config.out / "latents"
        place = self.parts.place
        encode(
            self.parts.images,
            self.encoder,
            folder,
            flip=d.flip,
            rank=place.rank,
            ranks=place.ranks,
        )
        place.wait()
        return folder

    def train(self) -> CrossFlowGenerator:
        """Train what is left to train; returns the averaged generator and leaves ``pipeline/``."""
        c = self.config
        self.check()
        if self.parts.place.rank == 0:
            print(self.parts.images.report())
        network, step = self.parts.generator(), self.step()
        if not c.encoder.stage_one:
            images = self.parts.images[0][0][None].to(self.parts.place.device)
            self._check_fit(tuple(self.encoder.encode(images).shape[1:]))
        averaged: Any = train(
            "generator",
            network,
            self.parts.cached or self.parts.batches,
            step,
            self.parts.settings(c.training),
            c.out / "generator",
            self.parts.context(
                "data", "encoder", "generator", "objective", "perceptual", "adversarial"
            ),
            optimizer_of(c.training),
            self.parts.place,
            Look(self.parts, c.training.look_every),
            self.parts.trackers(c.training, c.out),
            self._keep_config,
        )
        if self.parts.place.rank == 0:
            self._ship(averaged)
            write_beside(c.out / "slopes.png", slopes(records(c.out / "generator")))
        self.parts.place.wait()
        return averaged

    def _keep_config(self, start: int) -> None:
        if self.parts.place.rank == 0:
            text = TypeAdapter(Config).dump_json(self.config, indent=2).decode()
            write_beside(self.config.out / "config.json", text)

    def check(self, judged: bool = False) -> None:
        """See that the run can be made, before any step of stage 1 or of the generator is paid
        for.

        Args:
            judged: whether `evaluate` will follow.

        Raises:
            InputError: if the sizes of encoder, generator and pictures do not fit.
            RunError: if pictures or weights are missing, the folder cannot be written to, or the
                batch cannot be shared.
        """
        c, parts = self.config, self.parts
        _check_folder(c.out)
        parts.generator()
        for t in (c.training, *((c.latent.training,) if c.latent else ())):
            parts.place.range(t.batch, t.accumulate)
            optimizer_of(t)
        if c.encoder.stage_one:
            stage, pack = c.encoder.stage_one, c.encoder.pack or 1
            side = c.data.size // 2 ** (len(stage.widths) - 1) // pack
            self._check_fit((stage.channels * pack**2, side, side))
        if judged or c.evaluation.extractor != "inception":
            parts.extractor()

    def _check_fit(self, latent: tuple[int, ...]) -> None:
        """See that latents of this shape, the generator and the pictures fit."""
        g, size = self.config.generator, self.config.data.size
        if latent != (g.channels, g.grid, g.grid) or g.grid * g.patch != size:
            raise InputError(
                f"the encoder makes latents of {latent} of images of {size}; write "
                f"generator.channels={latent[0]} "
                f"generator.grid={latent[1]} generator.patch={size // latent[1]}"
            )

    def _ship(self, averaged: CrossFlowGenerator) -> None:
        o, folder = self.config.objective, self.config.out / "pipeline"
        partial = folder.with_name("pipeline.partial")
        shutil.rmtree(partial, ignore_errors=True)
        pipeline = CrossFlowPipeline(averaged, o.alpha, o.beta)
        pipeline.card = self.card(averaged)
        pipeline.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)

    def card(self, generator: CrossFlowGenerator, scores: Scores | None = None) -> str:
        """Return the model card, with scores once there are some."""
        c, t = self.config, self.config.training
        training = {
            "pictures": f"{self.parts.images.report()}, {c.data.size} pixels",
            "encoder": c.encoder.name or "trained on the spot",
            "objective": f"{c.objective.kind}{', literal' if c.objective.literal else ''}, "
            f"{c.objective.equal:.0%} on s = t",
            "perceptual": ", ".join(p.network for p in c.perceptual) or "none",
            "adversarial": c.adversarial.network if c.adversarial else "none",
            "optimiser": f"{t.optimizer}, {self.parts.steps(t)} steps of {t.batch}, rate "
            f"{t.learning_rate}, average {t.emas[0]}",
        }
        judged = (
            {f"{name}, {scores.count} samples": v for name, v in scores.values.items()}
            if scores
            else None
        )
        return model_card(c.name, generator, c.objective.alpha, c.objective.beta, training, judged)

    def pipeline(self) -> CrossFlowPipeline:
        """Load what was shipped.

        Raises:
            RunError: if the run is not finished, or what was shipped is broken.
        """
        folder = self.config.out / "pipeline"
        if not (folder / "model_index.json").exists():
            raise RunError(
                f"{folder} is missing: the run is not finished; flowspace train continues it"
            )
        try:
            found = CrossFlowPipeline.from_pretrained(
                folder, local_files_only=True, use_safetensors=True
            )
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            SafetensorError,
        ) as error:
            raise RunError(
                f"{folder} cannot be read ({error}); delete it: flowspace train ships it again "
                "from the last checkpoint"
            ) from error
        return found.to(self.parts.place.device)

    def evaluate(self) -> Scores:
        """Draw the samples that are missing, over all processes, and judge them; leaves
        ``metrics.json``.
        """
        e, folder = self.config.evaluation, self.config.out / "samples"
        pipeline = self.pipeline()
        c = pipeline.generator.config
        plan = Plan(
            e.samples,
            self.parts.classes,
            (c["channels"], c["grid"], c["grid"]),
            batch=e.batch,
            shard=e.shard,
        )
        maker = digest(pipeline.generator)

        def sample(noise: Tensor, labels: Tensor) -> Tensor:
            return pipeline(labels, latents=noise, output_type="pt").images  # type: ignore[union-attr]

        place = self.parts.place
        plan.draw(sample, folder, maker, place.device, place.rank, place.ranks)
        place.wait()
        images, extractor = plan.read(folder, maker), self.parts.extractor()
        scores = judge(
            extractor,
            features_of(extractor, images.split(e.batch)),
            self.parts.real(extractor),
            e.pinned,
        )
        if place.rank == 0:
            write_beside(
                self.config.out / "metrics.json", json.dumps(asdict(scores), indent=2) + "\n"
            )
            write_beside(
                self.config.out / "pipeline" / "README.md", self.card(pipeline.generator, scores)
            )
            write_beside(self.config.out / "samples.png", sheet(images, self.parts.classes))
        return scores

    def same_in_a_fresh_process(self, labels: tuple[int, ...] = (0, 1, 2, 3)) -> bool:
        """Whether the shipped pipeline draws the same images here and in a new process."""
        folder, out = self.config.out / "pipeline", self.config.out / "fresh.safetensors"
        text = (
            "import sys, torch; from safetensors.torch import save_file; from flowspace.vision "
            "import CrossFlowPipeline\n"
            "pipeline = CrossFlowPipeline.from_pretrained(sys.argv[1])\n"
            f"images = pipeline(labels={list(labels)}, "
            "generator=torch.Generator().manual_seed(7), output_type='pt').images\n"
            "save_file({'images': images.contiguous()}, sys.argv[2])"
        )
        subprocess.run(
            [sys.executable, "-c", text, str(folder), str(out)],
            check=True,
            stderr=subprocess.DEVNULL,
        )
        here = self.pipeline().to("cpu")(
            labels=list(labels), generator=torch.Generator().manual_seed(7), output_type="pt"
        )
        there = load_file(out)["images"]
        out.unlink()
        return torch.equal(here.images, there)  # type: ignore[union-attr]


def _check_folder(folder: Path) -> None:
    """See that a folder can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written to ({error.strerror}); write out=FOLDER, another one"
        ) from None


def digest(network: nn.Module) -> str:
    """Return a digest of a network's weights."""
    found = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
