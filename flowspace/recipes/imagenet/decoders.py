"""The generator as a decoder of latents that another model sampled (section 4.4 of the paper).

A latent generator is trained by flow matching in the encoder's space. While it learns, its samples
are decoded by the autoencoder's own decoder and by the finished run's generator at several noise
levels, and judged alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from flowspace.demo.page import png, write_beside
from flowspace.errors import InputError
from flowspace.flow_map import FlowMap
from flowspace.objectives import FlowMatchingLoss
from flowspace.recipes.config import LatentConfig
from flowspace.recipes.imagenet.look import sheet
from flowspace.recipes.imagenet.parts import optimizer_of
from flowspace.recipes.imagenet.run import Run
from flowspace.solvers import Heun, VelocityFlow
from flowspace.times import ShiftedTimes, TimePairs, UniformTimes
from flowspace.training import Watch, records, train
from flowspace.vision.evaluate import Plan, features_of, judge, rounded
from flowspace.vision.generator import CrossFlowGenerator
from flowspace.vision.pipeline import CrossFlowDecoder
from flowspace.vision.steps import FlowStep

__all__ = ["DecoderRun"]

OWN = "the autoencoder's decoder"


@dataclass(frozen=True)
class DecoderRun:
    """Trains the latent generator of a finished run, in ``latent/`` of its folder.

    Args:
        run: finished; its config has a section ``latent``.
    """

    run: Run

    @property
    def latent(self) -> LatentConfig:
        """The section.

        Raises:
            InputError: if there is none.
        """
        if self.run.config.latent is None:
            raise InputError("the config has no section latent; write latent: {}, or its sizes")
        return self.run.config.latent

    @cached_property
    def objective(self) -> FlowMatchingLoss:
        """Flow matching with the run's schedule."""
        c = self.run.config
        dim = c.generator.channels * c.generator.grid**2
        times = TimePairs(ShiftedTimes(dim) if c.objective.shifted else UniformTimes(), equal=1.0)
        return FlowMatchingLoss(schedule=self.run.parts.schedule, times=times)

    def network(self) -> CrossFlowGenerator:
        """Build the untrained latent generator: the generator's blocks, a cell for a cell."""
        g, latent = self.run.config.generator, self.latent
        torch.manual_seed(latent.training.seed)
        return CrossFlowGenerator(
            g.channels,
            g.grid,
            patch=1,
            outputs=g.channels,
            classes=self.run.parts.classes,
            depth=latent.depth,
            width=latent.width,
            heads=latent.heads,
            mlp=g.mlp,
            class_tokens=g.class_tokens,
            time_tokens=g.time_tokens,
        )

    def check(self) -> None:
        """See that the latent generator can be built, before the run is trained."""
        with torch.device("meta"):
            self.network()

    def sample(self, network: nn.Module, noise: Tensor, labels: Tensor) -> Tensor:
        """Return latents by the ODE: two evaluations a step of Heun's rule."""
        velocity = FlowMap(network, self.objective.schedule, self.objective.outputs).velocity
        steps = max(1, self.latent.evaluations // 2)
        return VelocityFlow(velocity, Heun()).sample(noise, cond={"labels": labels}, steps=steps)

    def decoders(self) -> dict[str, Any]:
        """Return functions of (latents, labels) by name."""
        o = self.run.config.objective
        generator = self.run.pipeline().generator
        found: dict[str, Any] = {OWN: lambda z, labels: self.run.encoder.decode(z)}
        for level in self.latent.levels:
            decoder = CrossFlowDecoder.of(
                generator, t=level, alpha=o.alpha, beta=o.beta, rescale=self.latent.rescale
            )
            found[f"CrossFlowDecoder, t = {level:g}"] = lambda z, labels, d=decoder: d.decode(
                z, False, labels=labels
            )[0]
        return found

    def train(self) -> dict[str, float]:
        """Train what is left to train, draw ``decoders.png``, and return KID by decoder at the
        end.
        """
        c, parts, latent = self.run.config, self.run.parts, self.latent
        folder = c.out / "latent"
        encoded = None if parts.cached else self.run.encoder.encode
        step = FlowStep(
            self.objective, encoded, {}, c.objective.drop_labels, parts.classes, across=False
        )
        train(
            "latent",
            self.network(),
            parts.cached or parts.batches,
            step.loss,
            parts.settings(latent.training),
            folder,
            parts.context("data", "encoder")
            | {"latent": [latent.depth, latent.width, latent.heads]},
            optimizer_of(latent.training),
            parts.place,
            Decoded(self, latent.training.look_every),
            parts.trackers(latent.training, folder),
        )
        curves = self.curves()
        if parts.place.rank == 0:
            write_beside(c.out / "decoders.png", _figure(curves))
        parts.place.wait()
        return {name: points[-1][1] for name, points in curves.items()}

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Return (step, KID) by decoder and judge, from the log: another judge of the same run has
        other numbers.
        """
        found: dict[str, dict[int, float]] = {}
        for record in records(self.run.config.out / "latent"):
            for name, value in record.get("watch", {}).items():
                found.setdefault(name, {})[record["step"] + 1] = value
        return {name: sorted(points.items()) for name, points in found.items()}


@dataclass
class Decoded(Watch):
    """Samples latents, decodes them by each decoder, and scores the images.

    Args:
        decoding: the run.
        every: steps between looks.
    """

    decoding: DecoderRun
    every: int

    def __call__(self, step: int, averaged: nn.Module) -> Mapping[str, float]:
        """Return KID by decoder and judge, and leave a sheet of each."""
        run = self.decoding.run
        c, parts = run.config, run.parts
        shape = (c.generator.channels, c.generator.grid, c.generator.grid)
        plan = Plan(self.decoding.latent.samples, parts.classes, shape, batch=c.evaluation.batch)
        decoders = self.decoding.decoders()
        images: dict[str, list[Tensor]] = {name: [] for name in decoders}
        with torch.no_grad():
            for first in range(0, plan.count, plan.batch):
                noise, labels = plan.inputs(first, min(first + plan.batch, plan.count))
                labels = labels.to(parts.place.device)
                latents = self.decoding.sample(averaged, noise.to(parts.place.device), labels)
                for name, decode in decoders.items():
                    images[name].append(rounded(decode(latents, labels)).cpu())
        extractor = parts.extractor()
        real, found = parts.real(extractor), {}
        for number, (name, made) in enumerate(images.items()):
            write_beside(
                c.out / "latent" / f"decoder-{number}-{step + 1:07d}.png",
                sheet(torch.cat(made), parts.classes),
            )
            found[f"{name} ({extractor.name})"] = judge(
                extractor, features_of(extractor, made), real
            ).kid
        return found


def _figure(curves: Mapping[str, list[tuple[int, float]]]) -> bytes:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for name, points in curves.items():
        axis.semilogy(
            [step for step, _ in points], [kid for _, kid in points], marker="o", label=name
        )
    axis.set_xlabel("training steps of the latent generator")
    axis.set_ylabel("KID")
    axis.legend(fontsize=7)
    return png(figure)
