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
from verdicts import in_pixels, mean_of, said, write_json

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
        "CrossFlow, estimated velocity",
        lambda _, encode: CrossFlowLoss(estimate=encode),
        "across",
    ),
    Entry("consistency, across", lambda *_: ConsistencyLoss(), "across"),
)

ONE_SPACE = {entry.name for entry in FAMILY} - {
    "consistency, across",
    "CrossFlow, estimated velocity",
}


@dataclass(frozen=True)
class Found:
    """What came out: scores by the name of the row and the number of steps, one a seed; and what
    the first seed drew in one step.
    """

    scores: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, steps: int, score: Any) -> None:
        """Keep the score of one more seed."""
        by_steps = self.scores.setdefault(name, {})
        by_steps.setdefault(steps, []).append(score)

    def show(self, name: str, drawn: Tensor) -> None:
        """Keep what was drawn, unless an earlier seed's is kept."""
        self.pictures.setdefault(name, drawn)


# --- digits
# -------------------------------------------------------------------------------------------------


def shortened(settings: Settings, steps: int, stages: Sequence[str]) -> Settings:
    """Return the settings with so many steps of some stages."""
    plans = {}
    for name in stages:
        plan = getattr(settings, name)
        plans[name] = replace(plan, steps=steps)
    return replace(settings, **plans)


def judged(
    settings: Settings, folder: Path, seeds: int, chosen: list[Entry]
) -> tuple[dict[str, Any], bytes]:
    """Train and judge each objective with each seed; return scores by name and number of steps,
    and a PNG of samples.
    """
    found = Found()
    for seed in range(seeds):
        plan = seeded(settings, seed)
        data = load(settings.dataset)
        place = folder / f"seed-{seed}"
        world, judge = prepare(data, plan, place)
        found.add("real", 1, judge.real())
        found.show("real", digits.by_class(data.test_images, data.test_labels))
        teacher: Any = None
        for entry in chosen:
            there = world
            if entry.space == "pixels":
                there = in_pixels(world, plan.patch)
            method = method_of(entry, teacher, there, plan)
            network = method.train(there, plan, place / method.name).eval()
            if entry.name == TEACHER:
                teacher = DiagonalVelocity(network.requires_grad_(False))
            distances = []
            for steps in entry.steps:
                images, labels, cost = digits.draw(method, network, there, seed, steps)
                score = judge.score(images, labels, cost)
                found.add(entry.name, steps, score)
                distances.append(f"{score.frechet:.1f} in {steps}")
                if steps == 1:
                    found.show(entry.name, digits.by_class(images, labels))
            said(f"seed {seed}: {entry.name}: Frechet distance {', '.join(distances)}")
    sheet = grid(found.pictures, CLASSES, across=5)
    return found.scores, png(sheet, dpi=70)


def method_of(entry: Entry, teacher: Any, world: World, settings: Settings) -> digits.Method:
    """Return how an entry is trained and sampled on the digits."""
    objective: Any = entry.make(teacher, world.autoencoder.encode)
    across = entry.space == "across"
    if across:
        objective = replace(objective, penalty=settings.penalty)
    name = re.sub(r"[^a-zA-Z0-9]+", "-", entry.name)
    return digits.Method(name, objective, pixels=across, renoise=entry.renoise)


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
    floor = mean_of(found["real"][1], "frechet")
    rows = []
    for name, by_steps in found.items():
        accuracy = mean_of(by_steps[1], "accuracy")
        diversity = mean_of(by_steps[1], "diversity")
        excess = dict.fromkeys(STEPS, "")
        for n, scores in by_steps.items():
            if name == "real":
                continue
            over = mean_of(scores, "frechet") - floor
            excess[n] = f"{over:.1f}"
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
    found = Found()
    for seed in range(seeds):
        world = swiss_roll.RollSpaces.of(seed)
        teacher: Any = None
        draw = torch.Generator().manual_seed(7000 + seed)
        real = world.latents(swiss_roll.roll(5000, draw))
        other = world.latents(swiss_roll.roll(5000, draw))
        distance = swiss_roll.sliced_wasserstein(real, other)
        found.add("real", 1, distance)
        found.show("real", real)
        for entry in chosen:
            made: Any = entry.make(teacher, itself)
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
            distances = {}
            for n in entry.steps:
                samples = flow.sample(noise, steps=n, **renoise)
                distances[n] = swiss_roll.sliced_wasserstein(samples, real)
                found.add(entry.name, n, distances[n])
                if n == 1:
                    found.show(entry.name, samples)
            said(f"seed {seed}: {entry.name} {distances[1]:.3f}")
    return found.scores, scatter(found.pictures)


def itself(images: Tensor) -> Tensor:
    """Return images as the latents that they are, where both are in one space."""
    return images


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
        out = objective(network, latents, generator=draw)
        loss = out.loss.mean()
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
        batch, side = self.setting.batch, self.setting.side
        latents = torch.randn(batch, 16, side, side, device=DEVICE)
        cond = {"labels": torch.zeros(batch, dtype=torch.long, device=DEVICE)}

        def teacher(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                return network(z, t, t, labels=labels)

        def step(objective: Objective) -> None:
            out = objective(network, latents, cond=cond)
            out.loss.mean().backward()

        def forward() -> None:
            t = torch.rand(batch, device=DEVICE)
            with torch.no_grad():
                network(latents, t, t, **cond)

        made = {entry.name: entry.make(teacher, itself) for entry in FAMILY}
        made["pixel MeanFlow, conditional tangent"] = PixelMeanFlowLoss(own_tangent=False)
        made["MeanFlow distillation, finite difference"] = MeanFlowDistillationLoss(
            teacher=teacher,
            times=MOST,
            derivative=FiniteDifference(5e-3),
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
                taken = clock() - start
                found[name].append(taken)
        return {name: statistics.median(counted) for name, (_, *counted) in found.items()}

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
        note = (
            "By its evaluations (a teacher's, and two on a quarter of the rows) "
            f"distillation by finite differences should take {wanted:.2f}."
        )
        return f"{markdown_table(head, rows)}\n\n{note}"


def options_of_command() -> argparse.Namespace:
    """Return what the command was given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="digits", choices=["digits", "mnist", "swiss_roll", "costs"])
    add("--seeds", type=int, default=1)
    add("--steps", type=int, help="of training (default: the recipe's; 8000 for the roll)")
    add(
        "--only",
        default="",
        help="objectives whose name contains this; the teacher is always trained",
    )
    add("--rounds", type=int, default=15, help="of --data costs")
    add("--quick", action="store_true", help="5 steps of everything, one round")
    add("--threads", type=int, default=1)
    add("--out", type=Path, help="default: runs/objectives-DATA")
    add("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Print the table and save it, with a figure, in the folder of the run."""
    options = options_of_command()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(Costs().peak(options.peak))
        return
    if options.quick:
        options.seeds, options.steps, options.rounds = 1, 5, 1
    out = options.out or Path("runs") / f"objectives-{options.data}"
    start = time.perf_counter()
    if options.data == "costs":
        text = Costs().table(options.rounds)
    elif options.data == "swiss_roll":
        text = of_roll(options, out)
    else:
        text = of_digits(options, out)
    write_beside(out / "table.md", f"{text}\n")
    seconds = time.perf_counter() - start
    print(f"{text}\n\n{options.data}, {options.seeds} seed(s), {seconds:.0f} s; in {out}")


def chosen_of(options: argparse.Namespace) -> list[Entry]:
    """Return the objectives that were asked for, and the teacher."""
    found = []
    for entry in FAMILY:
        if options.only in entry.name or entry.name == TEACHER:
            found.append(entry)
    return found


def of_roll(options: argparse.Namespace, out: Path) -> str:
    """Compare on the Swiss roll; leave samples and scores, and return the table."""
    chosen = []
    for entry in chosen_of(options):
        if entry.name in ONE_SPACE:
            chosen.append(replace(entry, space="latent"))
    scores, picture = rolled(options.steps or 8000, options.seeds, chosen)
    write_beside(out / "samples.png", picture)
    write_json(out / "scores.json", scores)
    return roll_table(scores)


def of_digits(options: argparse.Namespace, out: Path) -> str:
    """Compare on a set of digits; leave samples and scores, and return the table."""
    settings = SETTINGS[options.data]
    if options.steps:
        settings = shortened(settings, options.steps, ("generator",))
    if options.quick:
        settings = shortened(settings, options.steps, ("autoencoder", "classifier"))
    scores, picture = judged(settings, out, options.seeds, chosen_of(options))
    found: dict[str, Any] = {}
    for name, by_steps in scores.items():
        found[name] = {}
        for n, each in by_steps.items():
            found[name][n] = [vars(score) for score in each]
    write_beside(out / "samples.png", picture)
    write_json(out / "scores.json", found)
    return digits_table(scores)


if __name__ == "__main__":
    main()
