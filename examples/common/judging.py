"""Judging a finished run: its samples, each of which follows from its number alone, and scores.

``metrics.json`` keeps them: ``count``, ``extractor``, ``reference`` and ``values`` are of the
first set of samples; ``sets`` has the least of several and their spread; ``representations`` has
the score over several extractors.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from image_losses import weights_of
from page import tables, write_json
from pictures import images_of, pictures_in_order, stacked
from sections import ExtractorConfig, ProgramConfig
from torch import Tensor, nn

from flowspace import InputError
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
    least_and_spread,
    rounded,
    validation_ratio,
)
from flowspace.vision.perceptual import TimmFeatures

__all__ = [
    "Sampler",
    "batches_of",
    "digest",
    "drawn",
    "evaluate",
    "extractor_of",
    "extractors_of",
    "forget",
    "plan_of",
    "ready_judges",
    "reference_of",
    "table",
    "tried_judge",
]

METRICS = "metrics.json"

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
    count = count or e.samples
    return Plan(count, classes, shape, batch=e.batch, shard=e.shard)


@torch.no_grad()
def drawn(plan: Plan, draw: Sampler, device: torch.device) -> Tensor:
    """Return the samples of a plan, uint8 ``(count, 3, size, size)``, on the CPU."""
    made = []
    for noise, labels in batches_of(plan, device):
        images = draw(noise, labels)
        made.append(rounded(images).cpu())
    return torch.cat(made)


def batches_of(plan: Plan, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield noise and labels of the samples of a plan, a batch at a time."""
    for first in range(0, plan.count, plan.batch):
        last = min(first + plan.batch, plan.count)
        noise, labels = plan.inputs(first, last)
        yield noise.to(device), labels.to(device)


def digest(network: nn.Module) -> str:
    """Return a digest of a network's weights."""
    found = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        found.update(name.encode())
        values = tensor.detach().cpu().float().contiguous()
        found.update(values.numpy().tobytes())
    return found.hexdigest()[:16]


def evaluate(
    config: ProgramConfig, plan: Plan, draw: Sampler, maker: str, accelerator: Accelerator
) -> Scores | None:
    """Draw the samples that are missing, over all processes; the first one judges them.

    Leaves ``samples/`` (``samples-2/`` and so on, where there are several sets),
    ``metrics.json`` and ``samples.png`` in the folder of the run, and prints the scores.

    Args:
        config: of the run.
        plan: which samples; see `plan_of`.
        draw: draws some.
        maker: the `digest` of the network; samples of another one are refused.
        accelerator: of the processes.

    Returns:
        The scores of the first set, in the first process.

    Raises:
        InputError, RunError: if what judges, or its pictures, cannot be used; nothing is drawn.
    """
    device = accelerator.device
    judges: list[Extractor] = []
    if accelerator.is_main_process:
        judges = ready_judges(config, device)
    rank = accelerator.process_index
    for folder, one in sets_of(config, plan).items():
        one.draw(draw, folder, maker, device, rank, accelerator.num_processes)
    accelerator.wait_for_everyone()
    scores = None
    if accelerator.is_main_process:
        scores = judged(config, plan, maker, judges)
        text = (config.out / METRICS).read_text()
        found = json.loads(text)
        print(table(found))
    accelerator.wait_for_everyone()
    return scores


def sets_of(config: ProgramConfig, plan: Plan) -> dict[Path, Plan]:
    """Return the plan of each set of samples by its folder: they differ by the seed."""
    plans = {config.out / "samples": plan}
    for number in range(1, config.evaluation.sets):
        folder = config.out / f"samples-{number + 1}"
        plans[folder] = replace(plan, seed=plan.seed + number)
    return plans


def forget(config: ProgramConfig) -> None:
    """Delete the samples and the scores of a run, which are of other weights than it has now."""
    for folder in [config.out / "samples", *config.out.glob("samples-*")]:
        shutil.rmtree(folder, ignore_errors=True)
    (config.out / METRICS).unlink(missing_ok=True)


def judged(config: ProgramConfig, plan: Plan, maker: str, judges: Sequence[Extractor]) -> Scores:
    """Judge the samples that were drawn and write down what came out; return the first scores.

    One set is in memory at a time.
    """
    e = config.evaluation
    extractor = judges[0]
    pictures = images_of(config.data, config.out.parent)
    if e.tried:
        tried_judge(config, extractor, pictures)
    real = reference_of(config, extractor, pictures)
    scores: list[Scores] = []
    found: dict[str, Any] = {}
    for folder, one in sets_of(config, plan).items():
        samples = one.read(folder, maker)
        features = features_of(extractor, samples.split(e.batch))
        scores.append(judge(extractor, features, real, e.pinned))
        if len(scores) == 1:
            shown = sheet(samples, plan.classes)
            write_beside(config.out / "samples.png", shown)
            if e.extractors:
                found["representations"] = ratios(config, samples, pictures, judges)
    if len(scores) > 1:
        found["sets"] = least_and_spread(scores)
    first = scores[0]
    write_json(config.out / METRICS, asdict(first) | found)
    return first


def ratios(
    config: ProgramConfig, samples: Tensor, pictures: Images, judges: Sequence[Extractor]
) -> dict[str, Any]:
    """Return the score over several representations, and of how many samples.

    It compares as many samples as there are held-out pictures, where these are fewer.
    """
    e = config.evaluation
    others = pictures_at(config, e.held_out)
    count = min(len(samples), len(others))
    mine: dict[str, Features] = {}
    real: dict[str, Features] = {}
    held_out: dict[str, Features] = {}
    for extractor in judges:
        name = extractor.name
        batches = samples[:count].split(e.batch)
        mine[name] = features_of(extractor, batches)
        real[name] = reference_of(config, extractor, pictures)
        path = config.out / f"held-out-{name}.safetensors"
        features = kept_features(path, config, extractor, others, e.held_out)
        held_out[name] = features[:count]
    return {"count": count, "values": validation_ratio(mine, real, held_out)}


def table(found: Mapping[str, Any]) -> str:
    """Return the scores that ``metrics.json`` keeps as Markdown tables."""
    parts = [markdown_table(head, rows) for head, rows in tables(found)]
    reference = found["reference"]
    parts.append(f"reference {reference[:16]}")
    return "\n\n".join(parts)


# --- the judge ---------------------------------------------------------------------------------


def extractor_of(config: ProgramConfig, device: torch.device) -> Extractor:
    """Return the network that judges."""
    e = config.evaluation
    settings = ExtractorConfig(e.extractor, e.weights, e.size)
    return extractor_named(settings, device)


def extractors_of(config: ProgramConfig, device: torch.device) -> list[Extractor]:
    """Return all networks whose representations are compared, the one that judges first.

    Raises:
        InputError: if two of them are the same.
    """
    found = [extractor_of(config, device)]
    for one in config.evaluation.extractors:
        found.append(extractor_named(one, device))
    names = [extractor.name for extractor in found]
    if len(set(names)) < len(names):
        raise InputError(
            f"got evaluation.extractors {', '.join(names)}; "
            "write each once, the extractor that judges is the first of them"
        )
    return found


def ready_judges(config: ProgramConfig, device: torch.device) -> list[Extractor]:
    """Return all networks that judge, once they and the pictures that they compare are there.

    Raises:
        InputError: if a network does not fit.
        RunError: if weights are missing, or a folder holds no such pictures.
    """
    judges = extractors_of(config, device)
    e = config.evaluation
    for path in (config.data.path, e.reference, e.held_out):
        if path is not None:
            pictures_at(config, path)
    return judges


def pictures_at(config: ProgramConfig, path: str | None) -> Images:
    """Return the pictures at another path than a run's own, of its size and classes."""
    return images_of(replace(config.data, path=path), config.out.parent)


def extractor_named(one: ExtractorConfig, device: torch.device) -> Extractor:
    """Return a network that judges, from its settings."""
    weights = weights_of(one.weights)
    if one.network == "inception":
        return Inception(weights, device)
    features = TimmFeatures(one.network, weights=weights, size=one.size)
    return TimmExtractor(features.to(device), one.network)


def reference_of(config: ProgramConfig, extractor: Extractor, images: Images) -> Features:
    """Return the features of the real images, kept in the run's folder.

    Raises:
        RunError: if those that are kept are of other images.
    """
    name = config.data.path
    reference = config.evaluation.reference
    if reference:
        name = reference
        images = pictures_at(config, reference)
    path = config.out / f"reference-{extractor.name}.safetensors"
    return kept_features(path, config, extractor, images, name)


def kept_features(
    path: Path, config: ProgramConfig, extractor: Extractor, images: Images, name: str | None
) -> Features:
    """Return the features of pictures; a file keeps them, and refuses to be those of others."""
    made = f"{name}, {len(images)} images, by {extractor.name}"
    if path.exists():
        return Features.load(path, made)
    batches = pictures_in_order(images, config.evaluation.batch, config.data.workers)
    found = features_of(extractor, batches)
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
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=draw).tolist()
    pictures = stacked(images, order[:count])
    found = check_judge(extractor, pictures, splits=1, batch=e.batch)
    write_json(path, found)
    return found
