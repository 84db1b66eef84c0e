"""Compare a cascade with one resolution, and one-step stages with Euler's method.

    python examples/pixel_flow/pixel_flow_compare.py CONFIG [key=value ...] [--three-seeds]

Trains three networks of one size on the same pictures for as many steps: flow matching at full
resolution, flow matching on the cascade of the config, MeanFlow on the cascade. Each is sampled
without guidance. The judges have seen no training picture: a network of ImageNet, and a support
vector machine that is fitted to the held-out pictures and asked for the class of each sample.
The first is tried on real pictures before anything is trained (``evaluation.tried``).
With ``--three-seeds`` all of it is done for ``training.seed`` and the two after it, and the table
has means, with the range behind. Leaves ``compare.md`` and ``compare.png``, of the first seed, in
the folder of the config; a run that is there is not trained again.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "common"))

import pixel_flow_settings
import reading
from pixel_flow_settings import PixelFlowConfig

if __name__ == "__main__":
    CONFIG, OPTIONS = reading.from_command_line(
        PixelFlowConfig,
        __doc__,
        ("--three-seeds",),
        pixel_flow_settings.check_compared,
        runs=Path("runs/pixel_flow"),
    )

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import journal
import judging
import loop
import page
import pictures
import pixel_flow
import torch
from accelerate import Accelerator
from pixel_flow_costs import costs_of, flops_of
from torch import Tensor, nn

from flowspace.demo.page import markdown_table, mean_and_range, write_beside
from flowspace.vision.data import Images
from flowspace.vision.evaluate import Extractor, Features, features_of, judge

SHOWN = 10
"""Samples of each kind that the picture shows, one a class."""

HEAD = ("what", "evaluations", "GFLOPs a sample", "Frechet distance", "KID", "right class")

SEEDS = 3
"""Of ``--three-seeds``."""


class Judged(NamedTuple):
    """What one kind of sample costs and scores.

    Attributes:
        evaluations: of the network, for a sample.
        gflops: of a sample.
        distance: Frechet distance to the held-out pictures.
        kid: to them.
        right: share of samples in which the classifier sees the class that was asked for.
    """

    evaluations: int
    gflops: float
    distance: float
    kid: float
    right: float


@dataclass
class SeedResult:
    """What one seed gave.

    Attributes:
        rows: by what was sampled.
        shown: its first samples, uint8, by the same names.
        seconds: that the training of each network took.
    """

    rows: dict[str, Judged]
    shown: dict[str, Tensor]
    seconds: dict[str, float]


@dataclass
class Judges:
    """What every seed is given.

    Attributes:
        accelerator: that trains.
        extractor: of features, for the Frechet distance and KID.
        real: features of the held-out pictures.
        images: that are trained on.
        conditions: what networks are told.
    """

    accelerator: Accelerator
    extractor: Extractor
    real: Features
    images: Images
    conditions: pixel_flow.Conditions


def variants_of(config: PixelFlowConfig) -> dict[str, PixelFlowConfig]:
    """Return what is trained, by name."""
    cascaded = {"objective": "flow-matching", "packed": True}
    whole = cascaded | {"kickoff": config.data.size}
    one_step = {"objective": "meanflow", "packed": False}
    found = {
        "one resolution": changed(config, whole, "euler"),
        "cascade": changed(config, cascaded, "euler"),
        "cascade of MeanFlow": changed(config, one_step, "flow-map"),
    }
    return {name: in_own_folder(one, name) for name, one in found.items()}


def changed(config: PixelFlowConfig, cascade: dict[str, Any], solver: str) -> PixelFlowConfig:
    """Return a config with another cascade and solver, without guidance."""
    return replace(
        config,
        cascade=replace(config.cascade, **cascade),
        sampling=replace(config.sampling, solver=solver, guidance=1.0, ramp=None, steps=1),
    )


def in_own_folder(config: PixelFlowConfig, name: str) -> PixelFlowConfig:
    """Return a config whose run has a folder of its own."""
    folder = name.replace(" ", "-")
    return replace(config, out=config.out / folder)


def samplings_of(config: PixelFlowConfig) -> list[tuple[str, int | tuple[int, ...]]]:
    """Return which variant is sampled with how many steps of each stage."""
    count = len(config.steps)
    return [
        ("one resolution", sum(config.steps)),
        ("cascade", config.steps),
        ("one resolution", count),
        ("cascade", 1),
        ("cascade of MeanFlow", 1),
    ]


def main(config: PixelFlowConfig, options: Sequence[str] = ()) -> None:
    """Train each, sample each as asked, judge, and write the table down."""
    accelerator = loop.accelerator_of(config.training, config.out)
    extractor = judging.extractor_of(config, accelerator.device)
    images = pixel_flow.pictures_of(config)
    if config.evaluation.tried:
        judging.tried_judge(config, extractor, images)
    conditions = pixel_flow.conditions_of(config, images, accelerator.device)
    real = judging.reference_of(config, extractor, images)
    judges = Judges(accelerator, extractor, real, images, conditions)
    count = 1
    if "--three-seeds" in options:
        count = SEEDS
    found = []
    for seed in range(config.training.seed, config.training.seed + count):
        found.append(compared(of_seed(config, seed), judges))
    lines = [markdown_table(HEAD, table(found)), ""]
    for one in found:
        times = [f"{name} {seconds:.0f}" for name, seconds in one.seconds.items()]
        lines.append(f"Seconds of training: {', '.join(times)}")
    text = "\n".join([*lines, ""])
    write_beside(config.out / "compare.md", text)
    write_beside(config.out / "compare.png", page.class_rows(found[0].shown))
    print(text)


def of_seed(config: PixelFlowConfig, seed: int) -> PixelFlowConfig:
    """Return the config of a seed, whose runs have a folder of their own."""
    training = replace(config.training, seed=seed)
    return replace(config, training=training, out=config.out / f"seed-{seed}")


def table(found: Sequence[SeedResult]) -> list[list[str]]:
    """Return the cells of the table: means over seeds, with the range where there are several."""
    cells = []
    for name in found[0].rows:
        rows = [one.rows[name] for one in found]
        cells.append(
            [
                name,
                f"{rows[0].evaluations}",
                f"{rows[0].gflops:.3g}",
                mean_and_range([row.distance for row in rows], 1),
                mean_and_range([row.kid for row in rows], 2),
                mean_and_range([row.right for row in rows], 3),
            ]
        )
    return cells


def compared(config: PixelFlowConfig, judges: Judges) -> SeedResult:
    """Train and judge what is compared, with one seed."""
    variants = variants_of(config)
    networks, seconds = {}, {}
    for name, one in variants.items():
        stage = pixel_flow.prepared(one, judges.images, judges.conditions)
        networks[name] = pixel_flow.fit(stage, judges.accelerator)
        seconds[name] = page.seconds_logged(journal.latest(one.out / "training"))
    rows, shown = {}, {}
    for name, steps in samplings_of(config):
        sampling = replace(variants[name].sampling, steps=steps)
        one = replace(variants[name], sampling=sampling)
        title = f"{name}, {sum(one.steps)} steps"
        samples, rows[title] = judged(one, networks[name], judges)
        shown[title] = samples[:SHOWN]
    return SeedResult(rows, shown, seconds)


@torch.no_grad()
def judged(config: PixelFlowConfig, network: nn.Module, judges: Judges) -> tuple[Tensor, Judged]:
    """Return samples, uint8, and what they cost and score."""
    device = next(network.parameters()).device
    conditions = judges.conditions
    plan = pixel_flow.plan_of(config, conditions)
    draw = pixel_flow.sampler_of(config, network, conditions)
    samples = judging.drawn(plan, draw, device)
    made = features_of(judges.extractor, samples.split(plan.batch))
    scores = judge(judges.extractor, made, judges.real)
    distance = next(iter(scores.values.values()))
    one = torch.zeros(1, dtype=torch.long, device=device)
    flops = flops_of(config, network, conditions.of(one))
    costs, _ = costs_of(config, flops)
    labels = torch.arange(plan.count) % plan.classes
    share = right_class(config, samples, labels)
    gflops = sum(costs) / 1e9
    return samples, Judged(sum(config.steps), gflops, distance, scores.kid, share)


def right_class(config: PixelFlowConfig, samples: Tensor, labels: Tensor) -> float:
    """Return the share of samples in which a classifier of held-out pictures sees their class."""
    from sklearn.svm import SVC

    held_out = replace(config.data, path=config.evaluation.reference)
    images = pictures.images_of(held_out, config.out.parent)
    pixels = torch.cat(list(pictures.pictures_in_order(images, 50)))
    classifier = SVC().fit(flat(pixels), images.labels)
    return float(classifier.score(flat(samples), labels.numpy()))


def flat(pixels: Tensor) -> Any:
    """Return uint8 pictures ``(N, 3, H, W)`` as rows of numbers, of one colour."""
    return (pixels.float().mean(1) / 255).flatten(1).numpy()


if __name__ == "__main__":
    reading.run_program(functools.partial(main, CONFIG, OPTIONS))
