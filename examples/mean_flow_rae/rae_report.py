"""What a run leaves beside its weights: scores of small sets, figures, ``report.html``."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import digits_judge
import journal
import page
import torch
from judging import Sampler, drawn, plan_of
from matplotlib import pyplot as plt
from pictures import in_range, stacked
from rae_settings import RAEConfig
from reading import as_dict
from torch import Tensor, nn

from flowspace import FlowMap, LinearSchedule, MeanFlowStatistic, ShiftedTimes, VelocityFlow
from flowspace.demo.metrics import Verdict
from flowspace.demo.page import png, write_beside
from flowspace.vision.data import Images
from flowspace.vision.encoders import LatentEncoder
from flowspace.vision.evaluate import rounded

__all__ = [
    "draws_of",
    "evaluations_of",
    "sampler_of",
    "shipped_of",
    "stage_curves",
    "write_report",
]

SHOWN = 10
"""Samples of each sampler in the figure."""

ROUGH = 16
"""Steps of the teacher that its trajectories have, in the paper."""

TITLES = {
    "flow_matching": "flow matching",
    "mid_training": "mid-training",
    "distillation": "distillation",
    "fine_tuning": "fine-tuning",
    "scratch": "MeanFlow from scratch",
}


def sampler_of(
    config: RAEConfig, network: nn.Module, encoder: LatentEncoder, steps: int
) -> Sampler:
    """Return what draws pictures in so many evaluations, on the grid that times are shifted to.

    A network of velocities is solved by Euler, one of average velocities jumps.
    """
    shift = ShiftedTimes(config.dim).shift
    grid = []
    for left in range(steps, -1, -1):
        grid.append(shift * left / (shift * left + steps - left))
    flow: Any = VelocityFlow(network)
    if network.config["average"]:  # type: ignore[index]  # a DiTDH
        flow = FlowMap(network, LinearSchedule(), MeanFlowStatistic())

    def draw(noise: Tensor, labels: Tensor) -> Tensor:
        latents = flow.sample(noise, cond={"labels": labels}, times=grid)
        return encoder.decode(latents)

    return draw


def shipped_of(names: Iterable[str]) -> str:
    """Return the stage whose network is shipped: the last one, but for the baseline."""
    *_, last = [name for name in names if name != "scratch"]
    return last


def evaluations_of(config: RAEConfig, name: str) -> tuple[int, ...]:
    """Return in how many evaluations ``--evaluate`` judges the network of a stage."""
    if name == "flow_matching":
        return (config.teacher_steps,)
    return 1, 2


def draws_of(config: RAEConfig, names: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Return which samplers are compared: by title the stage, and how many evaluations."""
    found = {}
    for name in names:
        counts = evaluations_of(config, name)
        if name == "flow_matching":
            counts = (*counts, ROUGH, 1)
        for steps in counts:
            evaluations = "evaluations"
            if steps == 1:
                evaluations = "evaluation"
            found[f"{TITLES[name]}, {steps} {evaluations}"] = (name, steps)
    return found


def write_report(
    config: RAEConfig,
    images: Images,
    networks: Mapping[str, nn.Module],
    encoder: LatentEncoder,
) -> Path:
    """Judge what can be judged on the spot, draw the figures, and write the page.

    Args:
        config: of the run.
        images: that were trained on.
        networks: the averaged network of each stage.
        encoder: with the decoder.
    """
    device = encoder.mean.device
    plan = plan_of(config, len(images.names), config.latent)
    samples = {}
    for title, (name, steps) in draws_of(config, networks).items():
        draw = sampler_of(config, networks[name], encoder, steps)
        samples[title] = drawn(plan, draw, device)
    sheet = sheet_of(images, encoder, samples)
    write_beside(config.out / "samples.png", sheet)
    curves = stage_curves(config.out, list(networks))
    write_beside(config.out / "stages.png", curves)
    parts: list[page.Part] = [
        "Pictures, reconstructions, and samples of each stage, the same noise in each row:",
        sheet,
    ]
    if config.data.path == "digits":
        labels = torch.arange(plan.count) % plan.classes
        verdicts = verdicts_of(config, samples, labels)
        parts += ["By classifiers that no stage saw:", digits_judge.table(verdicts)]
    for steps in evaluations_of(config, shipped_of(networks)):
        folder = config.out / f"evaluations-{steps}"
        if folder.exists():
            parts += page.scores_tables(folder, "--evaluate")
    parts += ["Loss and gradient norm of the stages, before clipping:", curves]
    log = []
    for name in networks:
        log += journal.latest(config.out / name)
    parts += [page.provenance(log, device), page.settings_table(as_dict(config))]
    return page.write(config.out / "report.html", f"MeanFlow-RAE: {config.name}", parts)


def sheet_of(images: Images, encoder: LatentEncoder, samples: Mapping[str, Tensor]) -> bytes:
    """Return pictures, their reconstructions and the first samples of each kind: a PNG."""
    pictures = stacked(images, range(SHOWN))
    shown = {"pictures": pictures, "reconstructed": reconstructed(pictures, encoder)}
    for title, made in samples.items():
        shown[title] = made[:SHOWN]
    return page.class_rows(shown)


def verdicts_of(
    config: RAEConfig, samples: Mapping[str, Tensor], labels: Tensor
) -> dict[str, Verdict]:
    """Judge samples of digits, by title, and leave ``scores.json``."""
    judge = digits_judge.judge_of(config.out.parent / "judges")
    verdicts = {"real digits": judge.real()}
    for title, pictures in samples.items():
        grey = digits_judge.grey(pictures)
        verdicts[title] = judge.score(grey, labels)
    found = {title: asdict(verdict) for title, verdict in verdicts.items()}
    page.write_json(config.out / "scores.json", found)
    return verdicts


def reconstructed(pictures: Tensor, encoder: LatentEncoder) -> Tensor:
    """Return what the decoder makes of the latents of uint8 pictures."""
    images = in_range(pictures.to(encoder.mean.device))
    latents = encoder.encode(images)
    return rounded(encoder.decode(latents)).cpu()


def stage_curves(folder: Path, names: list[str]) -> bytes:
    """Plot loss and gradient norm of stages over their steps: a PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in names:
        log = [record for record in journal.latest(folder / name) if "loss" in record]
        steps = [record["step"] for record in log]
        title = TITLES.get(name, name)
        for axis, key in zip(axes, ("loss", "gradient_norm"), strict=True):
            values = [record[key] for record in log]
            axis.plot(steps, values, label=title)
    for axis, label in zip(axes, ("loss of the stage", "gradient norm"), strict=True):
        axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.set_ylabel(label)
    axes[1].legend(fontsize=8)
    return png(figure)
