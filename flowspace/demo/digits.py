"""The demo: digits or pictures of your own, from a noisy latent to pixels in one evaluation.

Stage 1 makes an autoencoder and keeps the encoder, frozen. Stage 2 trains a small network from
noisy latents to pixels with `CrossFlowLoss`, class-conditional where there are classes, with a
perceptual term. Samples are judged by classifiers that share no weights, seed or architecture with
the perceptual one, and no training images where there are enough to halve; test images are seen by
nothing else.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowspace.demo import results
from flowspace.demo.data import (
    CLASSES,
    SETTINGS,
    Data,
    PictureSettings,
    Settings,
    in_range,
    load,
    seeded,
)
from flowspace.demo.loop import CPU, Trainer
from flowspace.demo.metrics import AT_ONCE, Verdict
from flowspace.demo.networks import Patches, SmallViT, ViTSize
from flowspace.demo.picture_networks import FromWholeLatent, PictureSize
from flowspace.demo.record import KEPT
from flowspace.demo.stage_one import World, prepare
from flowspace.flow_map import FlowMap
from flowspace.objectives import CrossFlowLoss, FlowMatchingLoss, MeanFlowLoss, Objective
from flowspace.solvers import VelocityFlow
from flowspace.training.draws import Draws, seed_of

__all__ = ["HEAD", "SETTINGS", "Method", "Settings", "by_class", "draw", "methods", "rows", "run"]

DRAWS = 4
"""How many sets of samples a method is judged by, each as large as the set of real images it is
compared with.
"""

SHOWN = 8
"""Pictures of a class that are shown."""

MAIN = "crossflow"

SHIFTS = 2
"""Keeps the shifts of a step apart from the other uses of (seed, step)."""

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

    def train(
        self, world: World, settings: Settings, folder: Path, device: torch.device = CPU
    ) -> nn.Module:
        """Train the network of this method; methods that output images get the perceptual term."""

        def loss(network: nn.Module, batch: tuple[Tensor, ...], draws: Draws) -> Tensor:
            latents, images, labels = batch
            out = self._outcome(network, (latents, in_range(images), labels), draws)
            mean = out.loss.mean()
            if not settings.perceptual or not self._perceives(world):
                return mean
            first, second = out.prediction, out.target
            if not self.pixels:
                first = world.autoencoder.decode(first)
                second = world.autoencoder.decode(second)
            if isinstance(settings, PictureSettings):
                first, second = shifted(first, second, draws)
            return mean + settings.perceptual * world.perceptual(first, second).mean()

        def watch(step: int, network: nn.Module) -> None:
            labels = torch.arange(world.data.classes).repeat_interleave(SHOWN)
            noise = noise_of(world, len(labels), settings.generator.seed)
            images, _ = self.draw(network, world, noise, labels)
            results.keep_look(folder, step, images.unflatten(0, (-1, SHOWN)))

        context = settings.context() | {"objective": repr(self.objective)}
        trainer = Trainer(self.name, settings.generator, folder, context, device, watch)
        tensors = (world.latents, world.data.images, world.data.labels)
        return trainer.train(self.network(world, settings), tensors, loss)

    def network(self, world: World, settings: Settings) -> nn.Module:
        """Build the same network for every method; only its last layer knows the output space."""
        torch.manual_seed(settings.generator.seed)
        if isinstance(settings, PictureSettings):
            numbers = world.latents.shape[1]
            shape: tuple[int, ...] = (numbers,)
            if self.pixels:
                shape = tuple(world.data.images.shape[1:])
            inner = PictureSize(settings.width, settings.depth, settings.cells)
            return FromWholeLatent(numbers, shape, world.data.classes, inner)
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

    def draw(
        self, network: nn.Module, world: World, noise: Tensor, labels: Tensor, steps: int = 1
    ) -> tuple[Tensor, float]:
        """Return images on the CPU, drawn a few at a time, and the seconds that all took."""
        device = next(network.parameters()).device
        images = []
        start = time.perf_counter()
        for z, c in zip(noise.split(AT_ONCE), labels.split(AT_ONCE), strict=True):
            drawn = self.sample(network, world, z.to(device), c.to(device), steps)
            images.append(drawn.cpu())
        return torch.cat(images), time.perf_counter() - start


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


@dataclass(frozen=True)
class Made:
    """What one seed made.

    Attributes:
        scores: by method, those of real images first.
        samples: by method, ``(classes, K, C, H, W)``, real images first.
        seconds: how long each part took.
        folder: of the seed.
    """

    scores: dict[str, Verdict]
    samples: dict[str, Tensor]
    seconds: dict[str, float] = field(default_factory=dict)
    folder: Path = Path()


def run(
    settings: Settings,
    folder: Path,
    baselines: bool = False,
    seeds: int = 1,
    data: Data | None = None,
) -> dict[str, Any]:
    """Do the main job and leave in the folder checkpoints, ``samples.png``, 50 samples a class as
    ``samples/CLASS/0.png`` to ``49.png``, ``metrics.json`` and ``report.html``.

    A run that was stopped continues with the same call. Returns what ``metrics.json`` holds.

    Args:
        settings: of `SETTINGS`, or as `flowspace.demo.sets.chosen` returns them.
        folder: where the run is kept.
        baselines: also train and judge the other methods.
        seeds: how many runs are averaged.
        data: the pictures; None loads those that the settings name.

    Raises:
        RunError: if the folder holds a run with other settings.
        InputError: if the data set is not known.
    """
    chosen = [MAIN]
    if baselines:
        chosen += ["denoiser", "meanflow+decoder", DECODER_ON_NOISE]
    start = time.perf_counter()
    if data is None:
        data = load(settings.dataset)
    made = []
    for seed in range(seeds):
        made.append(run_seed(settings, seed, chosen, folder / f"seed-{seed}", data))
    scores = {name: summary([found.scores[name] for found in made]) for name in made[0].scores}
    first = made[0]
    first.seconds["whole"] = time.perf_counter() - start
    return results.leave(folder, settings, data, scores, first)


def run_seed(settings: Settings, seed: int, chosen: list[str], folder: Path, data: Data) -> Made:
    """Train and judge the chosen methods with one seed."""
    settings = seeded(settings, seed)
    device = device_of(settings)
    clock = results.Clock()
    world, judge = prepare(data, settings, folder, device)
    clock.passed("autoencoder and judges")
    scores = {"real": judge.real()}
    samples = {"real": by_class(data.test_images, data.test_labels, data.classes)}
    for name in chosen:
        method = methods(settings).get(name)
        network = None
        if method:
            network = method.train(world, settings, folder / name, device)
        clock.passed(name)
        images, labels, cost = draw(method, network, world, seed)
        scores[name] = judge.score(images, labels, cost)
        samples[name] = by_class(images, labels, data.classes, KEPT)
        clock.passed("sampling and judging")
    return Made(scores, samples, clock.seconds, folder)


def device_of(settings: Settings) -> torch.device:
    """Return where networks are trained: those of pictures on a GPU where there is one; the
    digits' are too small for it, and are the same numbers everywhere on a CPU.
    """
    if isinstance(settings, PictureSettings) and torch.cuda.is_available():
        return torch.device("cuda")
    return CPU


def draw(
    method: Method | None, network: nn.Module | None, world: World, seed: int, steps: int = 1
) -> tuple[Tensor, Tensor, float]:
    """Return judged samples, their labels and the milliseconds an image took; no method is the
    decoder on pure noise.
    """
    classes, judged = world.data.classes, world.data.judged
    count = judged * max(DRAWS, -(-KEPT * classes // judged))
    labels = torch.arange(count) % classes
    noise = noise_of(world, count, seed)
    if method is not None and network is not None:
        images, seconds = method.draw(network, world, noise, labels, steps)
        return images, labels, 1000 * seconds / count
    start = time.perf_counter()
    parts = []
    with torch.no_grad():
        for z in noise.split(AT_ONCE):
            decoded = world.autoencoder.decode(z.to(world.device))
            parts.append(decoded.cpu())
    return torch.cat(parts), labels, 1000 * (time.perf_counter() - start) / count


def shifted(first: Tensor, second: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Return both images shifted alike by up to 7 pixels, around the edges: the strides of the
    perceptual network would leave a fine texture unseen if they always fell on the same pixels.
    """
    generator = torch.Generator().manual_seed(seed_of(draws.seed, draws.step, SHIFTS))
    down, right = torch.randint(8, (2,), generator=generator).tolist()
    return first.roll((down, right), (2, 3)), second.roll((down, right), (2, 3))


def noise_of(world: World, count: int, seed: int) -> Tensor:
    """Return standard normal noise of the latents' shape, of a seed."""
    generator = torch.Generator().manual_seed(seed_of(seed, count))
    return torch.randn(count, *world.latents.shape[1:], generator=generator)


def by_class(images: Tensor, labels: Tensor, classes: int = CLASSES, shown: int = SHOWN) -> Tensor:
    """Return the first few images of each class, ``(classes, shown, C, H, W)``; where a class has
    fewer, they begin again.
    """
    rows = []
    for label in range(classes):
        found = images[labels == label]
        rows.append(found[torch.arange(shown) % len(found)])
    return torch.stack(rows)


# --- what it leaves to read
# -------------------------------------------------------------------------------------------------

HEAD = ("method", "accuracy", "diversity", "Frechet distance", "excess over real", "ms per image")


def summary(scores: list[Verdict]) -> dict[str, Any]:
    """Return the mean of each score over seeds, and each seed's."""
    each = [asdict(score) for score in scores]
    means: dict[str, Any] = {}
    for key in each[0]:
        values = [row[key] for row in each]
        means[key] = None
        if None not in values:
            means[key] = sum(values) / len(values)
    return means | {"by_seed": each}


def rows(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the table of a run: means over seeds, the real images first."""
    floor = metrics["methods"]["real"]["frechet"]
    found = []
    for name, m in metrics["methods"].items():
        excess = cost = ""
        accuracy = "-"
        if name != "real":
            excess = f"{m['frechet'] - floor:.1f}"
            cost = f"{m['milliseconds']:.2f}"
        if m["accuracy"] is not None:
            accuracy = f"{m['accuracy']:.3f}"
        scores = (accuracy, f"{m['diversity']:.2f}", f"{m['frechet']:.1f}")
        found.append((name, *scores, excess, cost))
    return found
