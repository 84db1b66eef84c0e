"""Train PixelFlow: one transformer that takes noise to pixels, from small pictures to large.

    accelerate launch examples/pixel_flow/pixel_flow.py CONFIG [key=value ...] [--check]

CONFIG is a YAML file, such as examples/pixel_flow/configs/smoke.yaml. The run's folder is left
with ``network/`` (what one loads), ``samples/``, ``metrics.json`` and ``report.html``. The same
command continues a run that was stopped. ``--check`` trains nothing: it builds the network without
memory, sees that its shapes fit, and counts what a sample costs.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "common"))

# settings are refused before torch is imported, which takes seconds
import pixel_flow_settings
import reading
from pixel_flow_settings import PixelFlowConfig

if __name__ == "__main__":
    CONFIG, OPTIONS = reading.from_command_line(
        PixelFlowConfig,
        __doc__,
        ("--check",),
        pixel_flow_settings.check,
        runs=Path("runs/pixel_flow"),
    )

import functools
import textwrap
from collections.abc import Sequence
from typing import Any

import journal
import judging
import loop
import page
import torch
from accelerate import Accelerator
from page import Sheets
from pictures import images_of, in_range
from pixel_flow_conditions import Conditions, captions_of, conditions_of
from pixel_flow_costs import cost_line, cost_table, flops_of, solver_line
from pixel_flow_network import network_of
from stage import Losses, LossesOf, Stage
from torch import Tensor, nn

from flowspace import (
    Cascade,
    CascadeFlow,
    CascadeLoss,
    CrossFlowLoss,
    DormandPrince,
    Euler,
    FlowMatchingLoss,
    Guidance,
    InputError,
    MeanFlowLoss,
    Objective,
)
from flowspace.training import Draws
from flowspace.vision.data import Images
from flowspace.vision.evaluate import Plan, rounded

NOISE, TIMES, STAGES, DROPPED = range(4)
"""Streams of the draws of a step."""

OBJECTIVES: dict[str, type[Objective]] = {
    "flow-matching": FlowMatchingLoss,
    "meanflow": MeanFlowLoss,
    "crossflow": CrossFlowLoss,
}

SHOWN = 8
"""Samples of a class that a picture shows."""

LONGEST_LINE = 14
"""Letters in a line of a name beside pictures."""


def main(config: PixelFlowConfig, options: Sequence[str] = ()) -> None:
    """Train, draw, judge, and leave the page of the run."""
    if "--check" in options:
        print(check(config))
        return
    accelerator = loop.accelerator_of(config.training, config.out, reading.as_dict(config))
    loop.check_processes(config.training, accelerator, "examples/pixel_flow/pixel_flow.py")
    check_share(config, accelerator.num_processes)
    judging.extractors_of(config, accelerator.device)  # missing weights end the run here
    with loop.locked_by_first(config.out, accelerator):
        images = pictures_of(config)
        conditions = conditions_of(config, images, accelerator.device)
        stage = prepared(config, images, conditions)
        network = fit(stage, accelerator)
        if accelerator.is_main_process:
            network.save_pretrained(config.out / "network")  # type: ignore[operator]
        draw = sampler_of(config, network, conditions)
        plan = plan_of(config, conditions)
        judging.evaluate(config, plan, draw, judging.digest(network), accelerator)
        if accelerator.is_main_process:
            path = report(config, images, network, conditions)
            print(f"finished; the page of the run: {path}")
        accelerator.wait_for_everyone()


def fit(stage: Stage, accelerator: Accelerator) -> nn.Module:
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


# --- pictures, and what the network is told of them --------------------------------------------


def pictures_of(config: PixelFlowConfig) -> Images:
    """Return the pictures; with captions, each caption is a class of its own."""
    images = images_of(config.data, config.out.parent)
    if config.condition.kind == "captions":
        captions = captions_of(images)
        images.names = tuple(sorted(set(captions)))
        number = {name: index for index, name in enumerate(images.names)}
        images.labels = tuple(number[caption] for caption in captions)
    return images


# --- what is trained ---------------------------------------------------------------------------


def loss_of(config: PixelFlowConfig) -> CascadeLoss:
    """Return the objective on the stages: PixelFlow's is flow matching."""
    objective = OBJECTIVES[config.cascade.objective]()
    return CascadeLoss(Cascade(config.stages), objective, config.cascade.packed)


def losses_of(config: PixelFlowConfig, conditions: Conditions) -> LossesOf:
    """Return the loss of a step's rows, each in the stage that it is assigned to."""
    loss_fn = loss_of(config)
    objective: Any = loss_fn.objective
    times = objective.times
    cascade = loss_fn.cascade

    def losses(network: nn.Module, batch: Sequence[Tensor], draws: Draws) -> Losses:
        pixels, labels = batch

        def drawn_times(count: int, draw: torch.Generator) -> Sequence[Tensor]:
            return times(count, generator=draw, device=draws.device)

        t, s = draws.rows(drawn_times, TIMES)
        dropped = draws.uniform((), DROPPED) < config.condition.drop
        out = loss_fn(
            network,
            in_range(pixels),
            cond=conditions.of(labels, dropped),
            noise=draws.normal(pixels.shape[1:], NOISE),
            stages=draws.rows(cascade.assigned, STAGES),
            t=t,
            s=s,
        )
        return Losses.of_flow(out)

    return losses


def check_share(config: PixelFlowConfig, processes: int) -> None:
    """See that processes that share a network's parameters call it equally often.

    Unpacked, a process calls it once for each stage that has rows of its own; among S rows in a
    row each stage has one. FSDP2 waits in each call for the other processes.

    Raises:
        InputError: if a process may have no row of some stage.
    """
    t, stages = config.training, config.stages
    alone = processes == 1 or not t.sharded
    if alone or config.cascade.packed:
        return
    parts = processes * t.accumulate
    if t.batch // parts < stages:
        raise InputError(
            f"got training.batch = {t.batch} in {parts} parts, "
            "one a process and step of training.accumulate, with training.sharded=true: "
            f"fewer rows than the {stages} stages, "
            "so processes would call the network unequally often and wait for ever; "
            f"write training.batch={parts * stages} or more, or cascade.packed=true"
        )


def prepared(config: PixelFlowConfig, images: Images, conditions: Conditions) -> Stage:
    """Return the training; what can be refused is refused before a step is paid for."""
    batch = config.training.batch
    if batch > len(images):
        raise InputError(
            f"got training.batch = {batch} for {len(images)} pictures; "
            "write a batch that is not larger"
        )
    folder = config.out / "training"
    draw_few = functools.partial(sheet_of, config, conditions)
    return Stage(
        "network",
        network_of(config, conditions),
        losses_of(config, conditions),
        images,
        config.training,
        folder,
        loop.optimizer_of(config.training),
        depends=reading.depends_on(config, "data", "network", "cascade", "condition"),
        flip=config.data.flip,
        workers=config.data.workers,
        look=Sheets(folder, len(conditions.names), draw_few),
        begun=functools.partial(page.keep_config, config.out, reading.as_dict(config)),
        compiled=config.network.compile,
    )


# --- samples -----------------------------------------------------------------------------------


def flow_of(config: PixelFlowConfig, network: nn.Module) -> CascadeFlow:
    """Return the sampler of a trained network."""
    s = config.sampling
    solvers = {
        "euler": Euler(),
        "dormand-prince": DormandPrince(s.rtol, s.atol),
        "flow-map": None,
    }
    return loss_of(config).sampler(network, solvers[s.solver])


def sampler_of(
    config: PixelFlowConfig, network: nn.Module, conditions: Conditions
) -> judging.Sampler:
    """Return what draws pictures from noise of their shape and labels."""
    s = config.sampling
    flow = flow_of(config, network)
    guidance: Any = None
    if s.guidance != 1:
        guidance = Guidance(null=conditions.null, omega=s.guidance)
    if guidance is not None and s.ramp is not None:
        guidance = flow.cascade.ramp(guidance, s.ramp)

    def draw(noise: Tensor, labels: Tensor) -> Tensor:
        cond = conditions.of(labels)
        return flow.sample(noise, cond=cond, steps=steps_of(config), guidance=guidance)

    return draw


def steps_of(config: PixelFlowConfig) -> Any:
    """Return the steps of each stage; an adaptive solver takes its own."""
    if config.sampling.solver == "dormand-prince":
        return 1
    return config.sampling.steps


def plan_of(config: PixelFlowConfig, conditions: Conditions, count: int | None = None) -> Plan:
    """Return which samples are drawn: class after class, each from its own noise."""
    shape = (3, config.data.size, config.data.size)
    return judging.plan_of(config, len(conditions.names), shape, count)


def sheet_of(config: PixelFlowConfig, conditions: Conditions, network: nn.Module) -> Tensor:
    """Return a few samples, uint8."""
    count = SHOWN * min(SHOWN, len(conditions.names))
    plan = plan_of(config, conditions, count)
    draw = sampler_of(config, network, conditions)
    device = next(network.parameters()).device
    return judging.drawn(plan, draw, device)


# --- does it fit? ------------------------------------------------------------------------------


def check(config: PixelFlowConfig) -> str:
    """Return what a sample costs, from a network without memory, whose shapes are tried.

    Raises:
        InputError: if sizes do not fit together.
    """
    c = config.condition
    config = reading.replaced(config, network={"begin": None})
    with torch.device("meta"):
        names = [str(label) for label in range(config.data.classes or 1)]
        conditions = Conditions(tuple(names))
        if c.kind == "captions":
            tokens = torch.empty(1, c.length, c.width)
            mask = torch.ones(1, c.length, dtype=torch.bool)
            conditions = Conditions(("",), (tokens, mask))
        network = network_of(config, conditions).eval()
        cond = conditions.of(torch.zeros(1, dtype=torch.long))
    flops = flops_of(config, network, cond)
    parameters = sum(each.numel() for each in network.parameters())
    parts = [
        f"{config.name}: {parameters / 1e6:.0f} million parameters",
        cost_table(config, flops),
        cost_line(config, flops),
        *solver_line(config),
    ]
    return "\n\n".join(parts)


# --- the page ----------------------------------------------------------------------------------


def report(
    config: PixelFlowConfig, images: Images, network: nn.Module, conditions: Conditions
) -> Path:
    """Write ``report.html``: samples beside real pictures, what each stage ends with, curves."""
    log = journal.latest(config.out / "training")
    device = next(network.parameters()).device
    one = torch.zeros(1, dtype=torch.long, device=device)
    flops = flops_of(config, network, conditions.of(one))
    of_classes = class_rows(config, images, network, conditions)
    of_stages = stage_rows(config, network, conditions)
    parts: list[page.Part] = [
        cost_line(config, flops),
        *solver_line(config),
        *page.unfinished(config, len(images), log),
        *page.scores_tables(config.out, "the same command judges"),
        "Samples (right) beside pictures of the same class (left):",
        page.class_rows(of_classes),
        "What each stage ends with, and the noise that it leaves to the next:",
        page.class_rows(of_stages),
        *page.sheets_over_training(config.out / "training"),
        *page.curves(log),
        page.settings_table(reading.as_dict(config)),
        page.provenance(log, device),
    ]
    return page.write(config.out / "report.html", config.name, parts)


def class_rows(
    config: PixelFlowConfig, images: Images, network: nn.Module, conditions: Conditions
) -> dict[str, Tensor]:
    """Return real pictures, then samples, of the first classes or captions, by their name."""
    count = len(conditions.names)
    plan = plan_of(config, conditions, SHOWN * count)
    draw = sampler_of(config, network, conditions)
    device = next(network.parameters()).device
    of_a_class = SHOWN
    if conditions.text is not None:
        of_a_class = 1  # a caption has one picture
    rows = {}
    for label in range(min(SHOWN, count)):
        noise = []
        for number in range(label, plan.count, count):
            of_sample, _ = plan.inputs(number, number + 1)
            noise.append(of_sample)
        labels = torch.full((SHOWN,), label, device=device)
        made = draw(torch.cat(noise).to(device), labels)
        real = page.real_pictures(images, label, of_a_class)
        name = textwrap.fill(conditions.names[label], LONGEST_LINE)
        rows[name] = torch.stack([*real, *rounded(made).cpu()])
    return rows


def stage_rows(
    config: PixelFlowConfig, network: nn.Module, conditions: Conditions
) -> dict[str, Tensor]:
    """Return the last states of each stage, uint8, enlarged to one size (the paper's figure 3)."""
    plan = plan_of(config, conditions, 2 * SHOWN)
    noise, labels = plan.inputs(0, plan.count)
    device = next(network.parameters()).device
    cond = conditions.of(labels.to(device))
    flow = flow_of(config, network)
    states = flow.states(noise.to(device), cond=cond, steps=steps_of(config))
    size = config.data.size
    rows = {}
    for state in states:
        large = nn.functional.interpolate(state, size=(size, size), mode="nearest")
        rows[f"{state.shape[-1]} pixels"] = rounded(large).cpu()
    return rows


if __name__ == "__main__":
    reading.run_program(functools.partial(main, CONFIG, OPTIONS))
