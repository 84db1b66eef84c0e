"""The family on the same footing: ``python benchmarks/objectives.py`` prints the tables of the
docs page "Which objective?".

``--data digits`` (default) or ``mnist``: every objective trains the same ViT for the same number
of steps with the same seeds on the digits of ``flowspace demo`` and is judged as there, in 1, 2, 4
and 8 steps where it has them; latents are decoded by the autoencoder's decoder. ``--data
swiss_roll``: one space of two dimensions, squared errors, sliced Wasserstein distance. ``--data
costs``: time and peak memory of a step over those of flow matching, the same network and batch.
"""

import argparse
import functools
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, clock, finish, resident
from derivatives import Setting
from matplotlib import pyplot as plt
from torch import Tensor, nn

from flowspace import (
    AlphaFlowLoss,
    ConsistencyLoss,
    CrossFlowLoss,
    FiniteDifference,
    FlowMap,
    FlowMatchingLoss,
    ImprovedMeanFlowLoss,
    MeanFlowDistillationLoss,
    MeanFlowLoss,
    PixelMeanFlowLoss,
    SquaredError,
    TimePairs,
    TrajectoryMatchingLoss,
    VelocityFlow,
)
from flowspace.demo import digits
from flowspace.demo.data import CLASSES, SETTINGS, Settings, load, seeded
from flowspace.demo.metrics import Verdict
from flowspace.demo.networks import Patches
from flowspace.demo.page import grid, markdown_table, png, write_beside
from flowspace.demo.stage_one import World, prepare
from flowspace.objectives import Objective

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "swiss_roll"))
import swiss_roll

Teacher = Callable[..., Tensor]
Encoder = Callable[[Tensor], Tensor]
STEPS = (1, 2, 4, 8)
MOST = TimePairs(equal=0.75)
TEACHER = "flow matching"
FORWARD = "a forward pass without gradient"


@dataclass(frozen=True)
class Entry:
    """One objective of the comparison.

    Attributes:
        name: its row.
        make: from the teacher's velocity, a trained flow-matching network, and the encoder to the
            objective.
        space: ``latent`` (and a decoder), ``pixels`` (no autoencoder) or ``across`` (latent to
            pixels).
        renoise: how several steps are taken, see `FlowMap.sample`.
        steps: the numbers of steps that it can be sampled in.
    """

    name: str
    make: Callable[[Teacher, Encoder], Objective]
    space: str = "latent"
    renoise: bool | None = None
    steps: tuple[int, ...] = STEPS


FAMILY = (
    Entry(TEACHER, lambda *_: FlowMatchingLoss()),
    Entry("MeanFlow", lambda *_: MeanFlowLoss(times=MOST)),
    Entry("improved MeanFlow", lambda *_: ImprovedMeanFlowLoss()),
    Entry("alpha-Flow, alpha = 0.1", lambda *_: AlphaFlowLoss(gap=0.1)),
    Entry("consistency", lambda *_: ConsistencyLoss(), renoise=True),
    Entry("consistency, two points", lambda *_: ConsistencyLoss(gap=0.1), renoise=True),
    Entry("consistency trajectory", lambda *_: ConsistencyLoss(times=TimePairs(equal=0.0))),
    Entry(
        "MeanFlow distillation",
        lambda teacher, _: MeanFlowDistillationLoss(teacher=teacher, times=MOST),
    ),
    Entry(
        "trajectory matching",
        lambda teacher, _: TrajectoryMatchingLoss(teacher=teacher, steps=8, pairs=1),
    ),
    Entry("pixel MeanFlow", lambda *_: PixelMeanFlowLoss(), "pixels"),
    Entry("CrossFlow", lambda *_: CrossFlowLoss(), "across"),
    Entry("CrossFlow, uniform times", lambda *_: CrossFlowLoss(times=TimePairs()), "across"),
    Entry(
        "CrossFlow, estimated velocity", lambda _, encode: CrossFlowLoss(estimate=encode), "across"
    ),
    Entry("consistency, across", lambda *_: ConsistencyLoss(), "across"),
)

ONE_SPACE = {entry.name for entry in FAMILY} - {
    "consistency, across",
    "CrossFlow, estimated velocity",
}


# --- digits
# -------------------------------------------------------------------------------------------------


def in_pixels(world: World, patch: int) -> World:
    """Return the same world without an autoencoder: its latents are patches of pixels."""
    patches = Patches(patch)
    return replace(world, autoencoder=patches, latents=patches.encode(world.data.images))


def shortened(settings: Settings, steps: int, stages: Sequence[str]) -> Settings:
    """Return the settings with so many steps of some stages."""
    plans = {name: replace(getattr(settings, name), steps=steps) for name in stages}
    return replace(settings, **plans)


def judged(
    settings: Settings, folder: Path, seeds: int, chosen: list[Entry]
) -> tuple[dict[str, Any], bytes]:
    """Train and judge each objective with each seed; return scores by name and number of steps,
    and a PNG of samples.
    """
    found: dict[str, Any] = {}
    pictures: dict[str, Tensor] = {}
    for seed in range(seeds):
        plan = seeded(settings, seed)
        data = load(settings.dataset)
        place = folder / f"seed-{seed}"
        world, judge = prepare(data, plan, place)
        found.setdefault("real", {}).setdefault(1, []).append(judge.real())
        pictures.setdefault("real", digits.by_class(data.test_images, data.test_labels))
        teacher: Any = None
        for entry in chosen:
            there = world
            if entry.space == "pixels":
                there = in_pixels(world, plan.patch)
            objective: Any = entry.make(teacher, there.autoencoder.encode)
            across = entry.space == "across"
            if across:
                objective = replace(objective, penalty=plan.penalty)
            name = re.sub(r"[^a-zA-Z0-9]+", "-", entry.name)
            method = digits.Method(name, objective, pixels=across, renoise=entry.renoise)
            network = method.train(there, plan, place / method.name).eval()
            if entry.name == TEACHER:
                teacher = DiagonalVelocity(network.requires_grad_(False))
            by_steps = found.setdefault(entry.name, {})
            distances = []
            for steps in entry.steps:
                images, labels, cost = digits.draw(method, network, there, seed, steps)
                score = judge.score(images, labels, cost)
                by_steps.setdefault(steps, []).append(score)
                distances.append(f"{score.frechet:.1f} in {steps}")
                if steps == 1:
                    pictures.setdefault(entry.name, digits.by_class(images, labels))
            said(f"seed {seed}: {entry.name}: Frechet distance {', '.join(distances)}")
    return found, png(grid(pictures, CLASSES, across=5), dpi=70)


def said(line: str) -> None:
    """Say how far it is, beside what is printed."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class DiagonalVelocity:
    """The velocity of a flow-matching network, which knows only s = t; runs that it teaches are
    continued by this name.
    """

    network: nn.Module = field(repr=False)

    @torch.no_grad()
    def __call__(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the velocity ``(B, *)``."""
        return self.network(z, t, t, labels=labels)


def digits_table(found: dict[str, Any]) -> str:
    """Return the table: accuracy, diversity and Frechet excess in one step, and the excess in
    more.
    """

    def mean(scores: list[Verdict], name: str) -> float:
        return statistics.mean(getattr(score, name) for score in scores)

    floor = mean(found["real"][1], "frechet")
    rows = []
    for name, by_steps in found.items():
        accuracy = mean(by_steps[1], "accuracy")
        diversity = mean(by_steps[1], "diversity")
        excess = dict.fromkeys(STEPS, "")
        for n, scores in by_steps.items():
            if name != "real":
                excess[n] = f"{mean(scores, 'frechet') - floor:.1f}"
        rows.append((name, f"{accuracy:.3f}", f"{diversity:.2f}", *excess.values()))
    head = ("objective", "accuracy", "diversity", "excess, 1 step", "2", "4", "8")
    note = f"Frechet distance of real images: {floor:.1f}; the excess is over it."
    return f"{markdown_table(head, rows)}\n\n{note}"


# --- the Swiss roll in one space
# ----------------------------------------------------------------------------------------


def rolled(steps: int, seeds: int, chosen: list[Entry]) -> tuple[dict[str, Any], bytes]:
    """Train each objective on the standardised roll; return distances by name and number of steps,
    and a PNG of samples.
    """
    found: dict[str, Any] = {}
    clouds: dict[str, Tensor] = {}
    for seed in range(seeds):
        world = swiss_roll.RollSpaces.of(seed)
        teacher: Any = None
        draw = torch.Generator().manual_seed(7000 + seed)
        real = world.latents(swiss_roll.roll(5000, draw))
        other = world.latents(swiss_roll.roll(5000, draw))
        distance = swiss_roll.sliced_wasserstein(real, other)
        found.setdefault("real", {}).setdefault(1, []).append(distance)
        clouds.setdefault("real", real)
        for entry in chosen:
            made: Any = entry.make(teacher, lambda x: x)
            objective: Any = replace(made, penalty=SquaredError())
            network = train_roll(objective, world, steps, seed)
            flow: Any = FlowMap(network, objective.schedule, objective.outputs)
            if entry.name == TEACHER:
                teacher = flow.velocity
                flow = VelocityFlow(teacher)
            noise = torch.randn(5000, 2, generator=draw)
            renoise: dict[str, Any] = {}
            if entry.renoise:
                renoise = {"renoise": True, "generator": draw}
            by_steps = found.setdefault(entry.name, {})
            for n in entry.steps:
                samples = flow.sample(noise, steps=n, **renoise)
                distance = swiss_roll.sliced_wasserstein(samples, real)
                by_steps.setdefault(n, []).append(distance)
                if n == 1:
                    clouds.setdefault(entry.name, samples)
            said(f"seed {seed}: {entry.name} {by_steps[1][-1]:.3f}")
    return found, scatter(clouds)


def train_roll(
    objective: Objective, world: swiss_roll.RollSpaces, steps: int, seed: int
) -> nn.Module:
    """Adam with a rate that falls along a cosine from 1e-3 to 0, batches of 512."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(1000 + seed)
    network = swiss_roll.RollMLP(outputs=2)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        latents = world.latents(swiss_roll.roll(512, draw))
        loss = objective(network, latents, generator=draw).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        falling.step()
    return network.eval().requires_grad_(False)


def scatter(clouds: dict[str, Tensor]) -> bytes:
    """Draw one-step samples beside the real roll; return a PNG."""
    columns = 6
    lines = math.ceil(len(clouds) / columns)
    size = (1.9 * columns, 2.1 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")
    for axis, (name, points) in zip(axes.flat, clouds.items(), strict=False):
        axis.scatter(*points.T, s=0.3, color="#1f4e79", rasterized=True)
        axis.set_title(name, fontsize=8)
    for axis in list(axes.flat)[len(clouds) :]:
        axis.set_visible(False)
    return png(figure)


def roll_table(found: dict[str, Any]) -> str:
    """Return the table of distances: means over seeds."""
    rows = []
    for name, by_steps in found.items():
        cells = dict.fromkeys(STEPS, "")
        for n, distances in by_steps.items():
            cells[n] = f"{statistics.mean(distances):.3f}"
        rows.append((name, *cells.values()))
    return markdown_table(("objective", "1 step", "2", "4", "8"), rows)


# --- costs
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Steps of every objective with one network: time and memory over flow matching's."""

    setting: Setting = field(default_factory=lambda: Setting("timm ViT-S", 384, 12))

    def jobs(self) -> dict[str, Callable[[], None]]:
        """Return one training step of each objective, and a forward pass; teachers are the network
        itself.
        """
        network = self.setting.build()
        side = int(self.setting.tokens**0.5)
        latents = torch.randn(self.setting.batch, 16, side, side, device=DEVICE)
        cond = {"labels": torch.zeros(self.setting.batch, dtype=torch.long, device=DEVICE)}

        def teacher(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                return network(z, t, t, labels=labels)

        def step(objective: Objective) -> None:
            out = objective(network, latents, cond=cond)
            out.loss.mean().backward()

        def forward() -> None:
            t = torch.rand(self.setting.batch, device=DEVICE)
            with torch.no_grad():
                network(latents, t, t, **cond)

        made = {entry.name: entry.make(teacher, lambda x: x) for entry in FAMILY}
        made["pixel MeanFlow, conditional tangent"] = PixelMeanFlowLoss(own_tangent=False)
        made["MeanFlow distillation, finite difference"] = MeanFlowDistillationLoss(
            teacher=teacher, times=MOST, derivative=FiniteDifference(5e-3)
        )
        jobs: dict[str, Callable[[], None]] = {}
        for name, objective in made.items():
            jobs[name] = functools.partial(step, objective)
        return jobs | {FORWARD: forward}

    def seconds(self, rounds: int) -> dict[str, float]:
        """Return the median seconds of each job, run in turn, and of a forward pass."""
        jobs = self.jobs()
        found: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(rounds + 1):
            for name, job in jobs.items():
                start = clock()
                job()
                finish()
                found[name].append(clock() - start)
        return {name: statistics.median(values[1:]) for name, values in found.items()}

    def peak(self, name: str) -> float:
        """Return the growth of this process's memory in one step, in bytes: run in a process of
        its own.
        """
        larger = replace(self.setting, batch=2 * self.setting.batch)
        tiny = replace(self.setting, tokens=4, batch=2)
        job = Costs(larger).jobs()[name]
        Costs(tiny).jobs()[name]()  # what libraries keep
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        job()
        return resident("VmHWM") - before

    def table(self, rounds: int) -> str:
        """Measure; return the Markdown table."""
        seconds = self.seconds(rounds)
        peaks = {}
        for name in seconds:
            words = [sys.executable, __file__, "--peak", name]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            peaks[name] = float(done.stdout.split()[-1])
        base = seconds[TEACHER]
        rows = []
        for name in seconds:
            longer = seconds[name] / base
            larger = peaks[name] / peaks[TEACHER]
            rows.append((name, f"{longer:.2f}", f"{larger:.2f}"))
        wanted = 1 + 1.5 * seconds[FORWARD] / base
        head = ("objective", "step / flow matching", "peak memory / flow matching")
        return (
            f"{markdown_table(head, rows)}\n\n"
            "By its evaluations (a teacher's, and two on a quarter of the rows) distillation by "
            "finite differences should take "
            f"{wanted:.2f}."
        )


def main() -> None:
    """Print the table and save it, with a figure, in the folder of the run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="digits", choices=["digits", "mnist", "swiss_roll", "costs"]
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--steps", type=int, help="of training (default: the recipe's; 8000 for the roll)"
    )
    parser.add_argument(
        "--only",
        default="",
        help="objectives whose name contains this; the teacher is always trained",
    )
    parser.add_argument("--rounds", type=int, default=15, help="of --data costs")
    parser.add_argument("--quick", action="store_true", help="5 steps of everything, one round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: runs/objectives-DATA")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(Costs().peak(options.peak))
        return
    if options.quick:
        options.seeds, options.steps, options.rounds = 1, 5, 1
    out = options.out or Path("runs") / f"objectives-{options.data}"
    chosen = [entry for entry in FAMILY if options.only in entry.name or entry.name == TEACHER]
    start = time.perf_counter()
    picture = None
    found: dict[str, Any] = {}
    if options.data == "costs":
        text = Costs().table(options.rounds)
    elif options.data == "swiss_roll":
        chosen = [replace(entry, space="latent") for entry in chosen if entry.name in ONE_SPACE]
        found, picture = rolled(options.steps or 8000, options.seeds, chosen)
        text = roll_table(found)
    else:
        settings = SETTINGS[options.data]
        if options.steps:
            settings = shortened(settings, options.steps, ("generator",))
        if options.quick:
            settings = shortened(settings, options.steps, ("autoencoder", "classifier"))
        scores, picture = judged(settings, out, options.seeds, chosen)
        for name, by_steps in scores.items():
            found[name] = {n: [vars(score) for score in each] for n, each in by_steps.items()}
        text = digits_table(scores)
    write_beside(out / "table.md", text + "\n")
    if picture is not None:
        write_beside(out / "samples.png", picture)
        write_beside(out / "scores.json", json.dumps(found, indent=2) + "\n")
    seconds = time.perf_counter() - start
    print(f"{text}\n\n{options.data}, {options.seeds} seed(s), {seconds:.0f} s; in {out}")


if __name__ == "__main__":
    main()
