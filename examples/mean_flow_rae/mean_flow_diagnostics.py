"""What the paper argues with, on a finished run: initialisations, variance, differences.

    python examples/mean_flow_rae/mean_flow_diagnostics.py CONFIG [out=RUN] [key=value ...]

takes the networks of the run that mean_flow_rae.py made of the same CONFIG and key=value, and
leaves ``diagnostics.json``, three PNGs and ``diagnostics.html`` in its folder:

* loss and gradient norm of distillation from random, flow-matching and mid-trained weights;
* the mean square of the residual and the variance of the gradient for mix 0, 1/2 and 1, with one
  network and the same rows (proposition 3.1), of the teacher and of one with an error;
* the exact derivative against central differences of 1e-4 to 1e-2: its error, how far the samples
  of a short distillation come to lie from those by the exact derivative, the time of the
  quickest step, and it over that of the exact one (table 3).

The three tables are printed.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "common"))
from rae_settings import RAEConfig, check
from reading import as_dict, from_command_line, replaced, run_program

if __name__ == "__main__":
    CONFIG, _ = from_command_line(RAEConfig, __doc__, (), check, Path("runs/mean_flow_rae"))

import mean_flow_rae
import page
import torch
from central_difference import CentralDifference
from judging import plan_of
from loop import accelerator_of
from matplotlib import pyplot as plt
from mean_flow_rae import copied
from pictures import images_of
from rae_representation import encoded, representation
from rae_work import NOISE, TIMES, Work
from torch import Tensor

from flowspace import (
    FlowMap,
    LinearSchedule,
    LossOutput,
    MeanFlowStatistic,
    Objective,
    SharedPrimal,
)
from flowspace.demo.page import markdown_table, png, write_beside
from flowspace.training import BatchRows, Draws, KeyedPairs, KeyedRows
from flowspace.vision import DiTDH

STEPS = 60
"""Of each short distillation."""

BATCHES = 32
"""Over which variances are taken."""

DIFFERENCES = (1e-4, 1e-3, 5e-3, 1e-2)
"""Steps of the difference, of table 3."""

MIXES = (0.0, 0.5, 1.0)
"""Shares of the teacher's velocity."""

ERROR = 0.5
"""Spread of the error of an inexact teacher, which is added to its velocity, everywhere alike."""


class TrialStep(NamedTuple):
    """One step of a short distillation.

    Attributes:
        loss: mean over the batch.
        norm: of the gradient, before clipping.
        seconds: that it took; see `seconds_on`.
    """

    loss: float
    norm: float
    seconds: float


class DistillationTrial:
    """Evaluates objectives on the batches of distillation, which follow from the run's seed.

    Args:
        work: of the run, with latents in memory.
        teacher: frozen.
    """

    def __init__(self, work: Work, teacher: DiTDH) -> None:
        self.work, self.teacher = work, teacher
        stage: Any = work.config.distillation
        self.training = stage.over(work.config.training, 7)

    def objective(self, teacher: Any = None, **changes: Any) -> Objective:
        """Return distillation's objective with another teacher, or with other settings."""
        config = replaced(self.work.config, objectives=changes)
        objectives = mean_flow_rae.objectives_of(config, teacher or self.teacher)
        return objectives["distillation"][0]

    def outputs(self, network: DiTDH, objective: Objective, steps: int) -> Iterator[LossOutput]:
        """Yield what the objective gives for the batches of so many steps."""
        seed, batch = self.training.seed, self.training.batch
        device = self.work.accelerator.device
        pairs = KeyedPairs(objective.times, TIMES)  # type: ignore[arg-type]
        objective = dataclasses.replace(objective, times=pairs)
        rows = KeyedRows(self.work.rows, seed, flip=False)
        batches = BatchRows(0, steps, batch, [(0, batch)])
        for step, places in enumerate(batches):
            pairs.draws = Draws(seed, step, 0, batch, batch, device)
            latents, labels = zip(*(rows[place] for place in places), strict=True)
            z = torch.stack(latents).to(device)
            cond = {"labels": torch.tensor(labels, device=device)}
            noise = pairs.draws.normal(z.shape[1:], NOISE)
            yield objective(network, z, cond=cond, noise=noise)

    def trained(self, network: DiTDH, objective: Objective) -> list[TrialStep]:
        """Distil in place for a few steps; return what each came to."""
        t = self.training
        device = self.work.accelerator.device
        weights = list(network.parameters())
        optimizer = torch.optim.AdamW(weights, t.learning_rate, (0.9, 0.95))
        found = []
        began = seconds_on(device)
        for out in self.outputs(network, objective, STEPS):
            loss = out.loss.mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(weights, t.clip)
            optimizer.step()
            value, size = float(loss.detach()), float(norm)
            ended = seconds_on(device)
            found.append(TrialStep(value, size, ended - began))
            began = ended
        return found

    def inexact(self) -> Any:
        """Return the teacher with an error, the same one for every state, time and label."""
        latent, device = self.work.config.latent, self.work.accelerator.device
        draw = torch.Generator().manual_seed(self.training.seed)
        error = ERROR * torch.randn(latent, generator=draw).to(device)

        def velocity(z_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
            return self.teacher(z_t, t, **cond) + error

        return velocity


def gradient_of(network: DiTDH, loss: Tensor) -> Tensor:
    """Return the gradient at all weights as one vector."""
    weights = list(network.parameters())
    parts = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


# --- the three questions -----------------------------------------------------------------------


def initialisations(trial: DistillationTrial, networks: Mapping[str, DiTDH]) -> dict[str, Any]:
    """Return losses and gradient norms of distillation from each network."""
    found = {}
    for name, network in networks.items():
        found[name] = trial.trained(copied(network), trial.objective())
    return found


def variances(trial: DistillationTrial, network: DiTDH) -> list[dict[str, Any]]:
    """Return, by teacher and its share, the residual's mean square and the gradient's variance."""
    found = []
    for name, teacher in {"trained": None, "with an error": trial.inexact()}.items():
        for mix in MIXES:
            objective = trial.objective(teacher, mix=mix)
            row = {"teacher": name, "mix": mix}
            found.append(row | spread(trial, copied(network), objective))
    return found


def spread(trial: DistillationTrial, network: DiTDH, objective: Objective) -> dict[str, float]:
    """Return the mean square of a row's residual, and the variance of a batch's gradient over
    batches, summed over the weights, beside the square of their mean.
    """
    residuals, gradients = [], []
    for out in trial.outputs(network, objective, BATCHES):
        squares = out.residual.square().flatten(1)
        residuals.append(squares.sum(1).mean())
        gradient = gradient_of(network, out.loss.mean())
        gradients.append(gradient.detach())
    stacked = torch.stack(gradients)
    return {
        "residual": float(torch.stack(residuals).mean()),
        "variance": float(stacked.var(0).sum()),
        "mean": float(stacked.mean(0).square().sum()),
    }


def differences(trial: DistillationTrial, network: DiTDH) -> list[dict[str, Any]]:
    """Return, by the step of the difference, its error, what it does to samples, and its time.

    ``samples`` is how far samples after a short distillation lie from those that the exact
    derivative's distillation ends with, over how far that one moved them. ``seconds`` are those
    of the quickest step: what else runs on a machine only makes steps slower.
    """
    exact = slopes(trial, network, None)
    before = samples_of(trial, network)
    found, after = [], before
    for step in (None, *DIFFERENCES):
        missed = slopes(trial, network, step) - exact
        error = missed.norm() / exact.norm()
        student = copied(network)
        steps = trial.trained(student, trial.objective(difference=step))
        seconds = min(one.seconds for one in steps)
        made = samples_of(trial, student)
        if step is None:
            after = made
        apart = (made - after).norm() / (after - before).norm()
        row = {"step": step, "error": float(error), "samples": float(apart)}
        found.append(row | {"seconds": seconds})
    for row in found:
        row["ratio"] = row["seconds"] / found[0]["seconds"]
    return found


def seconds_on(device: torch.device) -> float:
    """Return seconds: a CPU's own, which other programs do not lengthen, or else the clock's."""
    if device.type == "cpu":
        return time.process_time()
    return time.perf_counter()


def slopes(trial: DistillationTrial, network: DiTDH, step: float | None) -> Tensor:
    """Return D_t f of the first batch: the residual less its known part, over t - s."""
    derivative: Any = SharedPrimal()
    if step is not None:
        derivative = CentralDifference(step)
    (out,) = trial.outputs(network, trial.objective(), 1)
    labels = torch.zeros(len(out.t), dtype=torch.long, device=out.t.device)

    def model(z_t: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        return network(z_t, t, s, labels)

    primals = (out.z_t, out.t, out.s, labels)
    tangents = (out.velocity, torch.ones_like(out.t), None, None)
    _, slope = derivative(model, primals, tangents)
    return slope.detach()


@torch.no_grad()
def samples_of(trial: DistillationTrial, network: DiTDH) -> Tensor:
    """Return latents in one evaluation, of the noises that samples of a run begin with."""
    work = trial.work
    plan = plan_of(work.config, work.classes, work.config.latent)
    noise, labels = plan.inputs(0, plan.count)
    device = work.accelerator.device
    flow = FlowMap(network, LinearSchedule(), MeanFlowStatistic())
    return flow.sample(noise.to(device), cond={"labels": labels.to(device)}, steps=1)


# --- the page ----------------------------------------------------------------------------------


def main(config: RAEConfig) -> None:
    """Answer the three questions; leave the page."""
    accelerator = accelerator_of(config.training, config.out, as_dict(config))
    images = images_of(config.data, config.out.parent)
    config = mean_flow_rae.with_baseline(config, len(images))
    work = Work(config, accelerator, images, images)
    encoder = representation(work)
    work.rows = encoded(work, encoder)
    teacher = mean_flow_rae.teacher_of(work, encoder)
    students = mean_flow_rae.students_of(work, encoder, teacher)
    torch.manual_seed(config.training.seed)
    sizes = config.sizes(work.classes)
    random = DiTDH(**sizes, average=True)
    begun = {
        "random": random.to(accelerator.device),
        "flow matching": DiTDH.from_flow_matching(teacher),
        "mid-trained": students["mid_training"],
    }
    trial = DistillationTrial(work, teacher)
    found = {
        "initialisations": initialisations(trial, begun),
        "variances": variances(trial, students["distillation"]),
        "differences": differences(trial, students["mid_training"]),
    }
    page.write_json(config.out / "diagnostics.json", found)
    for rows in (beginnings(found), found["variances"], found["differences"]):
        print(markdown_table(*table(rows)), end="\n\n")
    print(f"the page: {write_page(config, found)}")


def write_page(config: RAEConfig, found: Mapping[str, Any]) -> Path:
    """Write figures and tables, and return the page's path."""
    curves = initial_curves(found["initialisations"])
    write_beside(config.out / "initialisations.png", curves)
    parts: list[page.Part] = [
        "Distillation from three initialisations: loss, and gradient norm before clipping.",
        curves,
        table(beginnings(found)),
        "The teacher's share of the velocity, same network and rows, for the teacher as it is and "
        f"with an error of spread {ERROR}, everywhere alike: "
        "mean square of the residual of a row, "
        "variance of a batch's gradient and square of its mean over batches.",
        table(found["variances"]),
        "The derivative: exact (no step) against central differences; "
        f"{STEPS} steps of distillation each, from the mid-trained network. "
        "The error is relative; samples: their distance from those that the exact derivative ends "
        "with, over how far it moved them; seconds are of the quickest step; the ratio is of "
        "them to the exact one's.",
        table(found["differences"]),
    ]
    return page.write(config.out / "diagnostics.html", f"Diagnostics: {config.name}", parts)


def beginnings(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return, by initialisation, how its distillation begins and its largest gradient norm."""
    rows = []
    for name, records in found["initialisations"].items():
        first = records[0]
        largest = max(step.norm for step in records)
        row = {"from": name, "loss": first.loss, "norm": first.norm, "largest norm": largest}
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return the head and the cells of a table of records that have the same names."""
    names = tuple(rows[0])
    cells = []
    for row in rows:
        cells.append([cell_of(row[name]) for name in names])
    return names, cells


def cell_of(value: Any) -> str:
    """Return a number as the tables show it; no step of a difference is the exact derivative."""
    if value is None:
        return "exact"
    if isinstance(value, str):
        return value
    return f"{value:.4g}"


def initial_curves(found: Mapping[str, Any]) -> bytes:
    """Plot losses and gradient norms over steps: a PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, records in found.items():
        losses, norms, _ = zip(*records, strict=True)
        axes[0].plot(range(len(losses)), losses, label=name)
        axes[1].plot(range(len(norms)), norms, label=name)
    for axis, label in zip(axes, ("loss of distillation", "gradient norm"), strict=True):
        axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.set_ylabel(label)
    axes[0].legend(fontsize=8)
    return png(figure)


if __name__ == "__main__":
    run_program(functools.partial(main, CONFIG))
