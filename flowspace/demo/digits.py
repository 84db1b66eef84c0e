"""The demo: real handwritten digits, from a noisy latent to pixels in one evaluation.

Stage 1 trains an autoencoder and keeps the encoder, frozen. Stage 2 trains a small ViT from noisy
latents to pixels with `CrossFlowLoss`, class-conditional, with a perceptual term. Samples are
judged by classifiers that share no weights, seed, architecture or training images with the
perceptual one; test images are seen by nothing else.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowspace.demo.data import CLASSES, SETTINGS, Settings, load, seeded
from flowspace.demo.loop import Trainer
from flowspace.demo.metrics import AT_ONCE, Verdict
from flowspace.demo.networks import Patches, SmallViT, ViTSize
from flowspace.demo.page import grid, page, png, write_beside
from flowspace.demo.stage_one import JUDGES, World, prepare
from flowspace.flow_map import FlowMap
from flowspace.objectives import CrossFlowLoss, FlowMatchingLoss, MeanFlowLoss, Objective
from flowspace.solvers import VelocityFlow
from flowspace.training.draws import Draws, seed_of

__all__ = ["SETTINGS", "Method", "Settings", "draw", "methods", "run"]

DRAWS = 4
"""How many sets of samples a method is judged by, each as large as the set of real images it is
compared with.
"""

SHOWN = 8
"""Pictures of a class that are shown."""

DECODER_ON_NOISE = "decoder on noise"


# --- the methods
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One way to train the ViT.

    Attributes:
        name: of the run's folder and the row of the table.
        objective: the loss.
        pixels: whether it maps latents to images; else latents to latents.
        only_noise: whether it sees only t = s = 1.
        renoise: how `FlowMap.sample` takes several steps; None is its default.
    """

    name: str
    objective: Objective
    pixels: bool = True
    only_noise: bool = False
    renoise: bool | None = None

    def train(self, world: World, settings: Settings, folder: Path) -> nn.Module:
        """Train the ViT of this method; methods that output images get the perceptual term."""

        def loss(network: nn.Module, batch: tuple[Tensor, ...], draws: Draws) -> Tensor:
            out = self._outcome(network, batch, draws)
            mean = out.loss.mean()
            if not settings.perceptual or not self._perceives(world):
                return mean
            first, second = out.prediction, out.target
            if not self.pixels:
                first = world.autoencoder.decode(first)
                second = world.autoencoder.decode(second)
            return mean + settings.perceptual * world.perceptual(first, second).mean()

        context = settings.context() | {"objective": repr(self.objective)}
        trainer = Trainer(self.name, settings.generator, folder, context)
        tensors = (world.latents, world.data.images, world.data.labels)
        return trainer.train(self.network(world, settings), tensors, loss)

    def network(self, world: World, settings: Settings) -> SmallViT:
        """Build the same ViT for every method; only its last layer knows the output space."""
        torch.manual_seed(settings.generator.seed)
        channels, side = world.latents.shape[1], world.latents.shape[-1]
        outputs, patch = channels, 1
        if self.pixels:
            outputs, patch = 1, settings.patch
        size = ViTSize(settings.width, settings.depth, settings.heads)
        return SmallViT(channels, side, outputs, patch, size)

    def _outcome(self, network: nn.Module, batch: tuple[Tensor, ...], draws: Draws) -> Any:
        """Call the objective on a batch of latents, images and labels."""
        latents, images, labels = batch
        targets = time = None
        if self.pixels:
            targets = images
        if self.only_noise:
            time = latents.new_ones(len(latents))
        return self.objective(
            network,
            latents,
            targets,
            cond={"labels": labels},
            t=time,
            s=time,
            generator=draws.generator,
        )

    def _perceives(self, world: World) -> bool:
        """Whether what it outputs, or its patches, are images."""
        return self.pixels or isinstance(world.autoencoder, Patches)

    @torch.no_grad()
    def sample(
        self, network: nn.Module, world: World, noise: Tensor, labels: Tensor, steps: int = 1
    ) -> Tensor:
        """Return images in that many evaluations (and one of the decoder, for a method that
        outputs latents).
        """
        if self.only_noise:
            one = noise.new_ones(len(noise))
            return network(noise, one, one, labels=labels)
        cond = {"labels": labels}
        flow_map = FlowMap(network, self.objective.schedule, self.objective.outputs)
        if isinstance(self.objective, FlowMatchingLoss):
            out = VelocityFlow(flow_map.velocity).sample(noise, cond=cond, steps=steps)
        else:
            encode = None
            if self.pixels and steps > 1:
                encode = world.autoencoder.encode
            out = flow_map.sample(
                noise, cond=cond, steps=steps, encode=encode, renoise=self.renoise
            )
        if self.pixels:
            return out
        return world.autoencoder.decode(out)


def methods(settings: Settings) -> dict[str, Method]:
    """Return the main method and the baselines, at the same size and number of steps."""
    found = (
        Method("crossflow", CrossFlowLoss(penalty=settings.penalty)),
        Method("denoiser", CrossFlowLoss(penalty=settings.penalty), only_noise=True),
        Method("meanflow+decoder", MeanFlowLoss(), pixels=False),
    )
    return {method.name: method for method in found}


# --- the whole run
# -------------------------------------------------------------------------------------------------


def run(
    settings: Settings, folder: Path, baselines: bool = False, seeds: int = 1
) -> dict[str, Any]:
    """Do the main job and leave checkpoints, ``samples.png``, ``metrics.json`` and ``report.html``
    in the folder.

    A run that was stopped continues with the same call. Returns what ``metrics.json`` holds.

    Raises:
        RunError: if the folder holds a run with other settings.
        InputError: if the data set is not known.
    """
    chosen = ["crossflow"]
    if baselines:
        chosen += ["denoiser", "meanflow+decoder", DECODER_ON_NOISE]
    runs = [run_seed(settings, seed, chosen, folder / f"seed-{seed}") for seed in range(seeds)]
    scores, samples = runs[0]
    metrics = {
        "dataset": settings.dataset,
        "seeds": seeds,
        "settings": asdict(settings) | {"penalty": repr(settings.penalty)},
        "methods": {name: summary([found[name] for found, _ in runs]) for name in scores},
    }
    picture = png(grid(samples, CLASSES))
    write_beside(folder / "samples.png", picture)
    write_beside(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_beside(folder / "report.html", report(metrics, picture))
    return metrics


def run_seed(
    settings: Settings, seed: int, chosen: list[str], folder: Path
) -> tuple[dict[str, Verdict], dict[str, Tensor]]:
    """Train and judge the chosen methods with one seed; return scores and samples by name, those
    of real images first.
    """
    settings = seeded(settings, seed)
    data = load(settings.dataset)
    world, judge = prepare(data, settings, folder)
    scores = {"real": judge.real()}
    samples = {"real": by_class(data.test_images, data.test_labels)}
    for name in chosen:
        method = methods(settings).get(name)
        network = None
        if method:
            network = method.train(world, settings, folder / name)
        images, labels, cost = draw(method, network, world, seed)
        scores[name] = judge.score(images, labels, cost)
        samples[name] = by_class(images, labels)
    return scores, samples


def draw(
    method: Method | None, network: nn.Module | None, world: World, seed: int, steps: int = 1
) -> tuple[Tensor, Tensor, float]:
    """Return judged samples, their labels and the milliseconds an image took; no method is the
    decoder on pure noise.
    """
    count = DRAWS * len(world.data.half(0)[0])
    labels = torch.arange(count) % CLASSES
    generator = torch.Generator().manual_seed(seed_of(seed, count))
    noise = torch.randn(count, *world.latents.shape[1:], generator=generator)
    start = time.perf_counter()
    images = []
    with torch.no_grad():
        for z, c in zip(noise.split(AT_ONCE), labels.split(AT_ONCE), strict=True):
            if method is None or network is None:
                images.append(world.autoencoder.decode(z))
            else:
                images.append(method.sample(network, world, z, c, steps))
    return torch.cat(images), labels, 1000 * (time.perf_counter() - start) / count


def by_class(images: Tensor, labels: Tensor) -> Tensor:
    """Return the first few images of each class, ``(classes, SHOWN, 1, H, H)``."""
    return torch.stack([images[labels == label][:SHOWN] for label in range(CLASSES)])


# --- what it leaves to read
# -------------------------------------------------------------------------------------------------

HEAD = ("method", "accuracy", "diversity", "Frechet distance", "excess over real", "ms per image")


def summary(scores: list[Verdict]) -> dict[str, Any]:
    """Return the mean of each score over seeds, and each seed's."""
    each = [asdict(score) for score in scores]
    means = {key: sum(row[key] for row in each) / len(each) for key in each[0]}
    return means | {"by_seed": each}


def rows(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the table of a run: means over seeds, the real images first."""
    floor = metrics["methods"]["real"]["frechet"]
    found = []
    for name, m in metrics["methods"].items():
        excess = cost = ""
        if name != "real":
            excess = f"{m['frechet'] - floor:.1f}"
            cost = f"{m['milliseconds']:.2f}"
        scores = (f"{m['accuracy']:.3f}", f"{m['diversity']:.2f}", f"{m['frechet']:.1f}")
        found.append((name, *scores, excess, cost))
    return found


def report(metrics: Mapping[str, Any], picture: bytes) -> str:
    """Return the page: what was done, the table, the pictures."""
    settings, seeds = metrics["settings"], metrics["seeds"]
    plan = settings["generator"]
    return page(
        f"flowspace demo: {metrics['dataset']} in one evaluation",
        [
            f"A ViT of {settings['depth']} blocks of width {settings['width']}, {plan['steps']} "
            f"steps of {plan['batch']} rows, maps a noisy latent to pixels in one evaluation. "
            f"Means over {seeds} seed(s).",
            (HEAD, rows(metrics)),
            f"Accuracy: how often independent judges ({JUDGES} classifiers, averaged, that share "
            "no weights, seed, architecture or training images with the perceptual network) see "
            "the class that was asked for; for real, on test images. Frechet distance: in the "
            "judges' features, against real test images; for real, of images that no judge has "
            "seen either. Diversity: mean distance within a class over that of real test images.",
            picture,
            "One row a class. Real test images first; every other block is one-step samples of "
            "the first seed, not selected.",
        ],
    )
