"""Judging a finished run: its samples, each of which follows from its number alone, and scores."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator
from image_losses import weights_of
from pictures import images_of, pictures_in_order
from sections import ProgramConfig
from torch import Tensor, nn

from flowspace.demo.page import markdown_table, sheet, write_beside
from flowspace.vision.data import Images
from flowspace.vision.evaluate import (
    Extractor,
    Features,
    Inception,
    Plan,
    Scores,
    TimmExtractor,
    check_judge,
    features_of,
    judge,
    rounded,
)
from flowspace.vision.perceptual import TimmFeatures

__all__ = [
    "Sampler",
    "digest",
    "drawn",
    "evaluate",
    "extractor_of",
    "plan_of",
    "reference_of",
    "table",
    "tried_judge",
]

Sampler = Callable[[Tensor, Tensor], Tensor]
"""From noise ``(B, *)`` and labels ``(B,)`` to images in [-1, 1], ``(B, 3, H, W)``."""


# --- samples -----------------------------------------------------------------------------------


def plan_of(
    config: ProgramConfig, classes: int, shape: tuple[int, ...], count: int | None = None
) -> Plan:
    """Return which samples are drawn: each follows from its number alone.

    Args:
        config: of the run.
        classes: sample i has class i mod classes.
        shape: of the noise of one.
        count: None takes as many as the config says.
    """
    e = config.evaluation
    return Plan(count or e.samples, classes, shape, batch=e.batch, shard=e.shard)


@torch.no_grad()
def drawn(plan: Plan, draw: Sampler, device: torch.device) -> Tensor:
    """Return the samples of a plan, uint8 ``(count, 3, size, size)``, on the CPU."""
    made = []
    for first in range(0, plan.count, plan.batch):
        noise, labels = plan.inputs(first, min(first + plan.batch, plan.count))
        made.append(rounded(draw(noise.to(device), labels.to(device))).cpu())
    return torch.cat(made)


def digest(network: nn.Module) -> str:
    """Return a digest of a network's weights."""
    found = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def evaluate(
    config: ProgramConfig, plan: Plan, draw: Sampler, maker: str, accelerator: Accelerator
) -> Scores | None:
    """Draw the samples that are missing, over all processes; the first one judges them.

    Leaves ``samples/``, ``metrics.json`` and ``samples.png`` in the folder of the run, and prints
    the scores.

    Args:
        config: of the run.
        plan: which samples; see `plan_of`.
        draw: draws some.
        maker: the `digest` of the network; samples of another one are refused.
        accelerator: of the processes.

    Returns:
        The scores, in the first process.
    """
    folder, device = config.out / "samples", accelerator.device
    plan.draw(draw, folder, maker, device, accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    scores = None
    if accelerator.is_main_process:
        samples = plan.read(folder, maker)
        scores = judged(config, samples, device)
        write_beside(config.out / "samples.png", sheet(samples, plan.classes))
        print(table(scores))
    accelerator.wait_for_everyone()
    return scores


def judged(config: ProgramConfig, samples: Tensor, device: torch.device) -> Scores:
    """Judge samples, uint8 ``(N, 3, H, W)``, and write down what came out."""
    extractor = extractor_of(config, device)
    pictures = images_of(config.data, config.out.parent)
    if config.evaluation.tried:
        tried_judge(config, extractor, pictures)
    real = reference_of(config, extractor, pictures)
    features = features_of(extractor, samples.split(config.evaluation.batch))
    scores = judge(extractor, features, real, config.evaluation.pinned)
    write_beside(config.out / "metrics.json", json.dumps(asdict(scores), indent=2) + "\n")
    return scores


def table(scores: Scores) -> str:
    """Return the scores as a Markdown table."""
    lines = [(name, f"{value:.4g}") for name, value in scores.values.items()]
    head = (f"{scores.count} samples, {scores.extractor}", "value")
    return f"{markdown_table(head, lines)}\n\nreference {scores.reference[:16]}"


# --- the judge ---------------------------------------------------------------------------------


def extractor_of(config: ProgramConfig, device: torch.device) -> Extractor:
    """Return the network that judges."""
    e = config.evaluation
    weights = weights_of(e.weights)
    if e.extractor == "inception":
        return Inception(weights, device)
    features = TimmFeatures(e.extractor, weights=weights, size=e.size)
    return TimmExtractor(features.to(device), e.extractor)


def reference_of(config: ProgramConfig, extractor: Extractor, images: Images) -> Features:
    """Return the features of the real images, kept in the run's folder.

    Raises:
        RunError: if those that are kept are of other images.
    """
    e = config.evaluation
    if e.reference:
        images = images_of(replace(config.data, path=e.reference), config.out.parent)
    path = config.out / f"reference-{extractor.name}.safetensors"
    made = f"{e.reference or config.data.path}, {len(images)} images, by {extractor.name}"
    if path.exists():
        return Features.load(path, made)
    found = features_of(extractor, pictures_in_order(images, e.batch, config.data.workers))
    features = Features(found.features.contiguous(), None)
    features.save(path, made)
    return features


def tried_judge(config: ProgramConfig, extractor: Extractor, images: Images) -> dict[str, Any]:
    """See that a judge knows real pictures, as it is used here; what was seen is kept.

    Raises:
        RunError: if it cannot tell them from blurred, shuffled or repeated ones.
    """
    e = config.evaluation
    count = min(e.tried, len(images)) // 2 * 2
    path = config.out / f"judge-{extractor.name}-{count}.json"
    if path.exists():
        return json.loads(path.read_text())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pictures = torch.stack([images.row(number)[0] for number in order[:count].tolist()])
    found = check_judge(extractor, pictures, splits=1, batch=e.batch)
    write_beside(path, json.dumps(found, indent=2) + "\n")
    return found
