"""What a finished run gives: its pipeline, samples that follow from their number, scores."""

import json
import os
import shutil
from typing import Any

import build
import judging
import report
import stage_one
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from judging import digest
from safetensors import SafetensorError
from settings import ImageNetConfig
from torch import Tensor

from flowspace import RunError
from flowspace.demo.page import markdown_table, write_beside
from flowspace.training import Checkpoints, fill, unpacked
from flowspace.vision.encoders import LatentEncoder
from flowspace.vision.evaluate import Plan, Scores
from flowspace.vision.generator import CrossFlowGenerator
from flowspace.vision.pipeline import CrossFlowPipeline

SHIPPED = "shipped.json"

BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
"""What libraries raise where files are torn."""


# --- the pipeline ------------------------------------------------------------------------------


def averaged(config: ImageNetConfig, average: float | None = None) -> CrossFlowGenerator:
    """Return the generator with one of its averages, from the last checkpoint.

    Args:
        config: of the run.
        average: its decay; None takes the first of ``training.emas``.

    Raises:
        RunError: if there is no checkpoint, or it has no such average.
    """
    folder = config.out / "generator"
    found = Checkpoints(folder, {}).read_latest()
    if found is None:
        raise RunError(f"{folder} holds no checkpoint; train.py makes one")
    *_, table = found
    parts = unpacked(table)
    if average is None:
        average = config.training.emas[0]
    name = f"ema-{average}"
    if name not in parts:
        kept = [part.removeprefix("ema-") for part in parts if part.startswith("ema-")]
        raise RunError(f"got the average {average}; the run keeps {', '.join(kept)}")
    classes = classes_of(parts[name])
    network = build.generator_of(config, classes)
    fill(network.state_dict(), parts[name], folder)
    return network.requires_grad_(False).eval()


def classes_of(state: dict[str, Tensor]) -> int:
    """Return the number of classes of a generator's weights; the last label is of no class."""
    return len(state["label.weight"]) - 1


def pipeline(config: ImageNetConfig, average: float | None = None) -> None:
    """Write ``pipeline/`` beside and rename it: the generator with one of its averages.

    What was drawn and measured of other weights goes.

    Args:
        config: of the run.
        average: its decay, which is remembered; None takes the one that was chosen before, or the
            first of ``training.emas``.
    """
    folder = config.out / "pipeline"
    if average is None:
        average = chosen(config)
    generator = averaged(config, average)
    partial = folder.with_name("pipeline.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if config.generator.space == "image":
        o = config.objective
        shipped = CrossFlowPipeline(generator, o.alpha, o.beta)
        shipped.card = report.card(config, generator, average)
        shipped.save_pretrained(partial)
    else:  # its latents need the encoder's decoder
        generator.save_pretrained(partial / "generator")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    weights = digest(generator)
    if shipped_of(config).get("weights") != weights:
        judging.forget(config)
    made = json.dumps({"average": average, "weights": weights})
    write_beside(config.out / SHIPPED, f"{made}\n")


def shipped_of(config: ImageNetConfig) -> dict[str, Any]:
    """Return which average was shipped, and the digest of its weights; nothing before."""
    try:
        text = (config.out / SHIPPED).read_text()
        found = json.loads(text)
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return found


def chosen(config: ImageNetConfig) -> float:
    """Return the decay of the average that is shipped."""
    average = shipped_of(config).get("average")
    if average in config.training.emas:
        return average
    return config.training.emas[0]


def generator_of_run(config: ImageNetConfig) -> CrossFlowGenerator:
    """Load the generator that was shipped.

    Raises:
        RunError: if the run is not finished, or what was shipped is broken.
    """
    folder = config.out / "pipeline"
    if not folder.exists():
        raise RunError(f"{folder} is missing: the run is not finished; train.py continues it")
    try:
        if config.generator.space == "latent":
            within = folder / "generator"
            return CrossFlowGenerator.from_pretrained(within, use_safetensors=True)
        found = CrossFlowPipeline.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
    except BROKEN as error:
        raise RunError(
            f"{folder} cannot be read ({error}); delete it: "
            "train.py ships it again from the last checkpoint"
        ) from error
    return found.generator


# --- samples and scores ------------------------------------------------------------------------


def evaluate(config: ImageNetConfig, accelerator: Accelerator) -> Scores | None:
    """Draw the samples that are missing, over all processes; the first one judges them.

    Leaves ``metrics.json``, the card of the pipeline and ``samples.png``; returns the scores in
    the first process.
    """
    device = accelerator.device
    generator = generator_of_run(config).to(device).eval()
    encoder = needed_encoder(config, device)
    draw = build.sampler_of(config, generator, encoder)
    plan = plan_of(config, generator)
    maker = digest(generator)
    scores = judging.evaluate(config, plan, draw, maker, accelerator)
    if scores is not None and config.generator.space == "image":
        card = report.card(config, generator, chosen(config), scores)
        write_beside(config.out / "pipeline" / "README.md", card)
    accelerator.wait_for_everyone()
    return scores


def first_of(scores: Scores) -> float:
    """Return the first number of a verdict, its Frechet distance."""
    return next(iter(scores.values.values()))


def change_average(config: ImageNetConfig, accelerator: Accelerator, average: float) -> None:
    """Ship another average of the run."""
    if accelerator.is_main_process:
        pipeline(config, average)
    accelerator.wait_for_everyone()


def best_average(config: ImageNetConfig, accelerator: Accelerator) -> float:
    """Judge each average that the run keeps, ship the best and name it; return its decay."""
    distances = {}
    for average in config.training.emas:
        change_average(config, accelerator, average)
        scores = evaluate(config, accelerator)
        if scores is not None:
            distances[average] = first_of(scores)
    told = [min(distances, key=distances.__getitem__, default=None)]
    broadcast_object_list(told)
    (best,) = told
    change_average(config, accelerator, best)
    evaluate(config, accelerator)
    if accelerator.is_main_process:
        rows = [(str(average), f"{value:.4g}") for average, value in distances.items()]
        print(markdown_table(("average", "distance"), rows))
        print(f"\nthe best, which is shipped: {best}")
    return best


def plan_of(
    config: ImageNetConfig, generator: CrossFlowGenerator, count: int | None = None
) -> Plan:
    """Return which samples of a generator are drawn."""
    g = config.generator
    shape = (g.channels, g.grid, g.grid)
    return judging.plan_of(config, generator.config["classes"], shape, count)


def needed_encoder(config: ImageNetConfig, device: torch.device) -> LatentEncoder | None:
    """Return the encoder where drawing samples needs it."""
    one_step = config.evaluation.evaluations == 1
    if one_step and config.generator.space == "image":
        return None
    return stage_one.loaded(config).to(device)


def pictures(config: ImageNetConfig, labels: list[int], seed: int) -> list[Any]:
    """Return an image of each label, as Pillow's; each follows from the seed and its place."""
    from torchvision.transforms.functional import to_pil_image

    from flowspace.vision.evaluate import rounded

    generator = generator_of_run(config).eval()
    classes = generator.config["classes"]
    if not all(0 <= label < classes for label in labels):
        raise RunError(f"got labels {labels}; they are from 0 to {classes - 1}")
    encoder = needed_encoder(config, torch.device("cpu"))
    draw = build.sampler_of(config, generator, encoder)
    g = config.generator
    shape = (g.channels, g.grid, g.grid)
    noise = []
    for place in range(len(labels)):
        source = torch.Generator().manual_seed(seed + place)
        noise.append(torch.randn(shape, generator=source))
    images = draw(torch.stack(noise), torch.tensor(labels))
    return [to_pil_image(image) for image in rounded(images)]
