"""Train pixel MeanFlow: images in one evaluation, without latents (arXiv 2601.22158).

    accelerate launch examples/pixel_mean_flow/pixel_mean_flow.py CONFIG [key=value ...]
    python examples/pixel_mean_flow/pixel_mean_flow.py --check

CONFIG is a YAML file, such as examples/pixel_mean_flow/configs/digits.yaml. The same command
continues a run that was stopped. With ``--evaluate`` it is judged at its end. ``--check`` builds
the networks of all published configs without memory for their weights, and trains nothing.

A run's folder holds ``config.json``, ``network/`` (checkpoints, the log, sheets of samples),
``transformer/`` (the averaged network, as diffusers saves it), ``metrics.json`` and
``report.html``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# settings are refused before torch is imported, which takes seconds
import pixel_settings
import reading
from pixel_settings import CLASSIFIERS, PAPER, PUBLISHED, PixelMeanFlowConfig, Published

if __name__ == "__main__":
    CONFIG, OPTIONS = pixel_settings.from_command_line(__doc__)

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import image_losses
import journal
import judges
import judging
import loop
import page
import torch
from accelerate import Accelerator
from pictures import images_of, in_range
from pixel_perceptual import perceptual_of, same_crops
from stage import Losses, LossesOf, Stage
from torch import Tensor, nn

from flowspace import (
    FlowMap,
    InputError,
    LinearSchedule,
    LogitNormalTimes,
    MatchedStatistic,
    PixelMeanFlowLoss,
    RandomGuidance,
    TimePairs,
    UniformTimes,
)
from flowspace.times import PairSampler, RandomSource
from flowspace.training import Draws, KeyedPairs, MuonAdamW, assign
from flowspace.vision import PixelMeanFlowTransformer
from flowspace.vision.data import Images

PROGRAM = "examples/pixel_mean_flow/pixel_mean_flow.py"

NOISE, TIMES = range(2)
"""Streams of the draws of a step."""

MATRICES = ("blocks", "image_head", "velocity_head", "scalars")
"""Where Muon trains the linear layers: everywhere but in the embedding of patches."""

OFFSET = 0.01
"""Added to a perceptual distance before a row is divided by it, as `Adaptive` does."""

EARLIEST = 0.01
"""The smallest of the uniform times."""


def main(config: PixelMeanFlowConfig, options: Sequence[str] = ()) -> None:
    """Train what is left to train; leave the network, the samples and the page."""
    accelerator = loop.accelerator_of(config.training, config.out, reading.as_dict(config))
    loop.check_processes(config.training, accelerator, PROGRAM)
    if "--evaluate" in options and config.evaluation.extractor != CLASSIFIERS:
        judging.extractors_of(config, accelerator.device)  # missing weights end the run here
    with loop.locked_by_first(config.out, accelerator):
        averaged = fit(prepared(config, accelerator), accelerator)
        network = averaged.without_velocity_head()
        if accelerator.is_main_process:
            network.save_pretrained(config.out / "transformer")
        if "--evaluate" in options:
            evaluate(config, network, accelerator)
        if accelerator.is_main_process:
            written = report(config, network)
            print(f"finished; the page of the run: {written}")
        accelerator.wait_for_everyone()


def fit(stage: Stage, accelerator: Accelerator) -> Any:
    """Train a network in place, or go on with it; return its averaged copy, in eval mode."""
    t = stage.training
    with loop.training(stage, accelerator) as run:
        for _ in run.steps():  # each ends with the rate, the log, a checkpoint, a look
            run.zero_grad()
            for batch, draws in run.parts():  # this process's rows, in t.accumulate parts
                with run.exchanged(run.network):  # gradients, after the last part
                    with accelerator.autocast():
                        cost = stage.losses(run.network, batch, draws)
                    loss = cost.rows  # of each row, the weighted sum of the terms
                    run.measure(cost, loss)
                    accelerator.backward(loss.mean() / t.accumulate)
            run.update()  # clips; what is not finite changes nothing
    return run.averaged()


# --- what is trained ---------------------------------------------------------------------------


def prepared(config: PixelMeanFlowConfig, accelerator: Accelerator) -> Stage:
    """Return the training; what can be refused is refused before a step is paid for."""
    images = images_of(config.data, config.out.parent)
    batch = config.training.batch
    if batch > len(images):
        raise InputError(
            f"got training.batch = {batch} for {len(images)} pictures; "
            "write a batch that is not larger"
        )
    classes = len(images.names)
    torch.manual_seed(config.training.seed)
    network = network_of(config, classes)
    perceptual = perceptual_of(config, accelerator.device)
    if accelerator.is_main_process:
        print(images.report())
    settings = reading.as_dict(config)
    sections = ("data", "network", "objective", "perceptual")
    folder = config.out / "network"
    draw = partial(shown_samples, config, classes, accelerator.device)
    return Stage(
        "network",
        network,
        losses_of(config, perceptual, classes),
        images,
        config.training,
        folder,
        optimizer_of(config),
        depends={name: settings[name] for name in sections},
        flip=config.data.flip,
        workers=config.data.workers,
        look=page.Sheets(folder, classes, draw),
        begun=partial(page.keep_config, config.out, settings),
        compiled=config.network.compile,
    )


def network_of(config: PixelMeanFlowConfig, classes: int) -> PixelMeanFlowTransformer:
    """Return the network, with both heads."""
    sizes = reading.as_dict(config.network)
    preset = sizes.pop("preset")
    sizes.pop("compile")
    return PixelMeanFlowTransformer.from_preset(
        preset,
        config.data.size,
        classes=classes,
        null_trained=config.objective.drop > 0,
        **{name: size for name, size in sizes.items() if size is not None},
    )


def optimizer_of(config: PixelMeanFlowConfig) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return what builds the optimiser: Muon's matrices are in the heads and embeddings too."""
    optimizer = loop.optimizer_of(config.training)
    if isinstance(optimizer, MuonAdamW):
        return replace(optimizer, inside=MATRICES)
    return optimizer


@dataclass
class MixedPairs(PairSampler):
    """Times of one sampler, and for a share of the rows those of another."""

    pairs: PairSampler
    rare: PairSampler
    share: float

    def draw(self, rows: int, source: RandomSource) -> tuple[Tensor, Tensor]:
        """Return t and s, each ``(rows,)``."""
        first, second, choice = source.split(3)
        chosen = choice.uniform(rows) < self.share
        usual_t, usual_s = self.pairs.draw(rows, first)
        rare_t, rare_s = self.rare.draw(rows, second)
        t = torch.where(chosen, rare_t, usual_t)
        s = torch.where(chosen, rare_s, usual_s)
        return t, s


def objective_of(config: PixelMeanFlowConfig, classes: int) -> PixelMeanFlowLoss:
    """Return the paper's objective: two heads, adaptive weights, guidance drawn for each row."""
    o = config.objective
    times = LogitNormalTimes(o.location, o.spread)
    pairs: PairSampler = TimePairs(times, mask_first=True)
    if o.uniform:
        rare = TimePairs(UniformTimes(low=EARLIEST))
        pairs = MixedPairs(pairs, rare, o.uniform)
    guidance = RandomGuidance(
        null={"labels": classes},
        largest=o.largest_omega,
        power=o.power,
        drop=o.drop,
    )
    keyed = KeyedPairs(pairs, TIMES)
    return PixelMeanFlowLoss.published(times=keyed, head=True, guidance=guidance)


def losses_of(
    config: PixelMeanFlowConfig,
    perceptual: Mapping[str, image_losses.PerceptualTerm],
    classes: int,
) -> LossesOf:
    """Return the losses of some rows: of both heads' velocities, and perceptual distances."""
    objective = objective_of(config, classes)
    pairs: Any = objective.times
    o = config.objective

    def losses(network: nn.Module, batch: Sequence[Tensor], draws: Draws) -> Losses:
        pixels, labels = batch
        images = in_range(pixels)
        noise = o.noise_scale * draws.normal(images.shape[1:], NOISE)
        pairs.draws = draws
        out = objective(
            network,
            images,
            cond={"labels": labels},
            noise=noise,
            generator=draws.generator,
        )
        cost = Losses.of_flow(out)
        compared = (out.prediction, images)
        if o.crop is not None and perceptual:
            compared = same_crops(*compared, o.crop)
        for name, term in perceptual.items():
            distance = term.loss(*compared, out.t)
            cost.terms[name] = distance / (distance.detach() + OFFSET)
            cost.weights[name] = term.weight
        # Adaptive losses are near 1 whatever was learned: this one falls, and is not trained.
        error = (out.prediction - images).square().flatten(1).mean(1)
        cost.terms["squared error"] = error
        cost.weights["squared error"] = 0.0
        return cost

    return losses


# --- samples -----------------------------------------------------------------------------------


def sampler_of(config: PixelMeanFlowConfig, network: nn.Module) -> judging.Sampler:
    """Return what draws images, in as many evaluations as the config says: one.

    The strength may be beyond those in training, as the published 8.5 of the smallest network.
    """
    flow_map = FlowMap(network, LinearSchedule(), MatchedStatistic())
    low, high = config.sampling.interval
    steps = config.evaluation.evaluations

    def draw(noise: Tensor, labels: Tensor) -> Tensor:
        one = torch.ones(len(noise), device=noise.device)
        cond = {
            "labels": labels,
            "omega": config.sampling.omega * one,
            "t_min": low * one,
            "t_max": high * one,
        }
        scaled = config.objective.noise_scale * noise
        return flow_map.sample(scaled, cond=cond, steps=steps)

    return draw


def plan_of(config: PixelMeanFlowConfig, classes: int, count: int | None = None) -> judging.Plan:
    """Return which samples are drawn: number i has class i mod classes."""
    shape = (3, config.data.size, config.data.size)
    return judging.plan_of(config, classes, shape, count)


def shown_samples(
    config: PixelMeanFlowConfig, classes: int, device: torch.device, averaged: nn.Module
) -> Tensor:
    """Return the samples of a sheet, uint8 ``(N, 3, size, size)``."""
    network = averaged
    if isinstance(averaged, PixelMeanFlowTransformer):
        network = averaged.without_velocity_head()
    count = page.SHOWN * min(classes, page.SHOWN)
    plan = plan_of(config, classes, count)
    return judging.drawn(plan, sampler_of(config, network), device)


def evaluate(config: PixelMeanFlowConfig, network: nn.Module, accelerator: Accelerator) -> None:
    """Draw the samples of the config and judge them; leaves ``metrics.json``."""
    images = images_of(config.data, config.out.parent)
    plan = plan_of(config, len(images.names))
    draw = sampler_of(config, network)
    if config.evaluation.extractor != CLASSIFIERS:
        judging.evaluate(config, plan, draw, judging.digest(network), accelerator)
        return
    if accelerator.is_main_process:
        samples = judging.drawn(plan, draw, accelerator.device)
        values = judges.evaluate(config, samples)
        for name, value in values.items():
            print(f"{name}: {value:.3f}")


# --- the page ----------------------------------------------------------------------------------


def report(config: PixelMeanFlowConfig, network: nn.Module) -> Path:
    """Write ``report.html``: samples beside real pictures, scores, curves, settings."""
    images = images_of(config.data, config.out.parent)
    folder = config.out / "network"
    log = journal.latest(folder)
    device = next(network.parameters()).device
    command = f"python {PROGRAM} CONFIG out={config.out} --evaluate"
    parts: list[Any] = [
        *page.unfinished(config, len(images), log),
        "One-step samples of each class (right) beside training pictures (left):",
        beside(config, network, images),
        *page.scores_tables(config.out, command),
        *page.sheets_over_training(folder),
        *page.curves(log),
        page.provenance(log, device),
        page.settings_table(reading.as_dict(config)),
    ]
    return page.write(config.out / "report.html", config.name, parts)


def beside(config: PixelMeanFlowConfig, network: nn.Module, images: Images) -> bytes:
    """Return a PNG of training pictures and samples, a row a class."""
    classes = len(images.names)
    device = next(network.parameters()).device
    plan = plan_of(config, classes, page.SHOWN * classes)
    samples = judging.drawn(plan, sampler_of(config, network), device)
    made = [samples[label::classes] for label in range(min(classes, 10))]
    return page.beside(made, images)


# --- the published settings --------------------------------------------------------------------


def check() -> None:
    """Build the networks of all published configs on meta tensors, and see what they return."""
    for published in PUBLISHED:
        path = PAPER / f"{published.config}.yaml"
        config = reading.load(PixelMeanFlowConfig, path)
        print(checked(config, published))


def checked(config: PixelMeanFlowConfig, published: Published) -> str:
    """Return a line on a published config, whose network takes its images and returns two.

    Raises:
        ValueError: if it does not, or has another size than is published.
    """
    classes = config.data.classes or 1000
    shape = (2, 3, config.data.size, config.data.size)
    objective_of(config, classes)
    with torch.device("meta"):
        network = network_of(config, classes)
        images, time = torch.empty(shape), torch.empty(2)
        told = {"omega": time, "t_min": time, "t_max": time}
        labels = torch.empty(2, dtype=torch.long)
        made = network(images, time, time, labels=labels, **told)
    found = [tuple(image.shape) for image in made]
    if found != [shape, shape]:
        raise ValueError(f"{config.name} returns {found} for images of {shape}")
    trained, second = 0, 0
    for name, parameter in network.named_parameters():
        trained += parameter.numel()
        if name.startswith("velocity"):
            second += parameter.numel()
    millions = (trained - second) / 1e6
    wanted = published.millions
    if wanted is not None and abs(millions / wanted - 1) > 0.005:
        raise ValueError(f"{config.name} has {millions:.1f} M parameters, not {wanted} M")
    muon = len(assign(network, MATRICES)["muon"])
    sizes = network.config
    return (
        f"{config.name}: {sizes['depth']} blocks of width {sizes['width']}; "
        f"{millions:.1f} M parameters sample, "
        f"{trained / 1e6:.1f} M are trained, {muon} matrices by Muon; "
        f"images {shape}; published FID {published.fid}, not run here"
    )


if __name__ == "__main__":
    if CONFIG is None:
        check()
    else:
        reading.run_program(partial(main, CONFIG, OPTIONS))
