"""Compare a cascade with one resolution, and one-step stages with Euler's method.

    python examples/pixel_flow/pixel_flow_compare.py CONFIG [key=value ...]

Trains three networks of one size on the same pictures for as many steps: flow matching at full
resolution, flow matching on the cascade of the config, MeanFlow on the cascade. Each is sampled
without guidance. The judges have seen no training picture: a network of ImageNet, and a support
vector machine that is fitted to the held-out pictures and asked for the class of each sample.
The first is tried on real pictures before anything is trained (``evaluation.tried``).
Leaves ``compare.md`` and ``compare.png`` in the folder of the config; a run that is there is not
trained again, and other seeds are asked for by ``training.seed=1 out=...``.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "common"))

import pixel_flow_settings
import reading
from pixel_flow_settings import PixelFlowConfig

if __name__ == "__main__":
    CONFIG, _ = reading.from_command_line(
        PixelFlowConfig,
        __doc__,
        check=pixel_flow_settings.check_compared,
        runs=Path("runs/pixel_flow"),
    )

import functools
from dataclasses import replace
from typing import Any

import journal
import judging
import loop
import page
import pictures
import pixel_flow
import torch
from pixel_flow_costs import costs_of, flops_of
from torch import Tensor, nn

from flowspace.demo.page import markdown_table, write_beside
from flowspace.vision.evaluate import Extractor, features_of, judge

SHOWN = 10
"""Samples of each kind that the picture shows, one a class."""

HEAD = ("what", "evaluations", "GFLOPs a sample", "Frechet distance", "KID", "right class")


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


def main(config: PixelFlowConfig) -> None:
    """Train each, sample each as asked, judge, and write the table down."""
    accelerator = loop.accelerator_of(config.training, config.out)
    extractor = judging.extractor_of(config, accelerator.device)
    images = pixel_flow.pictures_of(config)
    if config.evaluation.tried:
        judging.tried_judge(config, extractor, images)
    conditions = pixel_flow.conditions_of(config, images, accelerator.device)
    variants = variants_of(config)
    networks, times = {}, []
    for name, one in variants.items():
        stage = pixel_flow.prepared(one, images, conditions)
        networks[name] = loop.fit(stage, accelerator)
        seconds = page.seconds_logged(journal.latest(one.out / "training"))
        times.append(f"{name} {seconds:.0f}")
    rows, shown = [], {}
    for name, steps in samplings_of(config):
        sampling = replace(variants[name].sampling, steps=steps)
        one = replace(variants[name], sampling=sampling)
        samples, cells = judged(one, networks[name], conditions, extractor)
        title = f"{name}, {sum(one.steps)} steps"
        rows.append([title, *cells])
        shown[title] = samples[:SHOWN]
    line = f"Seconds of training: {', '.join(times)}"
    text = f"{markdown_table(HEAD, rows)}\n\n{line}\n"
    write_beside(config.out / "compare.md", text)
    write_beside(config.out / "compare.png", page.class_rows(shown))
    print(text)


@torch.no_grad()
def judged(
    config: PixelFlowConfig,
    network: nn.Module,
    conditions: pixel_flow.Conditions,
    extractor: Extractor,
) -> tuple[Tensor, list[str]]:
    """Return samples, uint8, and the cells of their row in the table."""
    device = next(network.parameters()).device
    plan = pixel_flow.plan_of(config, conditions)
    draw = pixel_flow.sampler_of(config, network, conditions)
    samples = judging.drawn(plan, draw, device)
    images = pictures.images_of(config.data, config.out.parent)
    real = judging.reference_of(config, extractor, images)
    made = features_of(extractor, samples.split(plan.batch))
    scores = judge(extractor, made, real)
    distance = next(iter(scores.values.values()))
    one = torch.zeros(1, dtype=torch.long, device=device)
    flops = flops_of(config, network, conditions.of(one))
    costs, _ = costs_of(config, flops)
    labels = torch.arange(plan.count) % plan.classes
    share = right_class(config, samples, labels)
    cells = [
        f"{sum(config.steps)}",
        f"{sum(costs) / 1e9:.3g}",
        f"{distance:.1f}",
        f"{scores.kid:.3f}",
        f"{share:.3f}",
    ]
    return samples, cells


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
    reading.run_program(functools.partial(main, CONFIG))
