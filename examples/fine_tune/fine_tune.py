"""A trained flow-matching network becomes a one-step generator of 8x8 digits, on a CPU in minutes.

A small SiT is trained by flow matching and saved as SiT's own code saves it. Its file is converted
and training goes on as MeanFlow. MeanFlow from scratch is judged after as many steps as that, and
after the sum of both. Judges that share nothing with them say how good one step is, beside the old
network's 1, 2 and 50 steps of Euler.

    python examples/fine_tune/fine_tune.py --seeds 2
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowspace import Euler, FlowMatchingLoss, MeanFlowLoss, Objective
from flowspace.demo.data import Data, load
from flowspace.demo.metrics import Judge, Verdict
from flowspace.demo.networks import JudgeClassifier
from flowspace.solvers import VelocityFlow
from flowspace.vision.convert import convert, to_layout
from flowspace.vision.dit import DiT

SIZE = {
    "channels": 1,
    "size": 8,
    "patch": 2,
    "classes": 10,
    "depth": 3,
    "width": 64,
    "heads": 4,
}
"""Of the network."""

BATCH, DECAY = 64, 0.99
JUDGES = 2
MEAN_FLOW = MeanFlowLoss.published()

Scores = tuple[float, float, float]
"""Accuracy, diversity and Frechet distance."""


def train(  # noqa: PLR0913  # all that decides a training
    network: DiT, data: Data, objective: Objective, steps: int, seed: int, falling: bool
) -> DiT:
    """Train on all training images; returns the average of the weights.

    The learning rate is constant, or falls to zero in the second half.
    """
    draw = torch.Generator().manual_seed(seed)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)

    def factor(step: int) -> float:
        if not falling:
            return 1.0
        return min(1.0, 2 - 2 * step / steps)

    rate = LambdaLR(optimizer, factor)
    for step in range(1, steps + 1):
        rows = torch.randint(len(data.images), (BATCH,), generator=draw)
        cond = {"labels": data.labels[rows]}
        out = objective(network, data.images[rows], cond=cond, generator=draw)
        optimizer.zero_grad()
        out.loss.mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.update_parameters(network)
        if step % 500 == 0:
            difference = out.prediction - out.target
            error = difference.square().mean().item()
            print(f"  step {step}: squared error {error:.3f}", flush=True)
    return average.module


def judges(data: Data, seed: int) -> Judge:
    """Train classifiers on half of the training images."""
    networks = []
    images, labels = data.half(0)
    for number in range(JUDGES):
        torch.manual_seed(1000 * seed + number)
        network = JudgeClassifier(data.side)
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        for _ in range(600):
            rows = torch.randint(len(images), (64,))
            logits = network(images[rows])
            loss = F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        networks.append(network.eval())
    return Judge(tuple(networks), data)


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, Scores]:
    """Return the scores of each row of the table."""
    data = load("digits")
    judge = judges(data, seed)
    teacher, students = trained(seed, data, options)
    draw = torch.Generator().manual_seed(seed + 3)
    labels = data.test_labels.repeat(3)
    shape = data.images.shape[1:]
    noise = torch.randn(len(labels), *shape, generator=draw)
    cond = {"labels": labels}
    made = {}
    for count in (1, 2, 50):
        flow = VelocityFlow(teacher, Euler())
        made[f"flow matching, Euler, {count}"] = flow.sample(noise, cond=cond, steps=count)
    for name, network in students.items():
        flow_map = MEAN_FLOW.flow_map(network)
        made[f"MeanFlow, {name}, 1"] = flow_map.sample(noise, cond=cond)
    found = {}
    for name, images in made.items():
        verdict = judge.score(images.clamp(-1, 1), labels)
        found[name] = scores_of(verdict)
    found["real digits"] = scores_of(judge.real())
    return found


def trained(seed: int, data: Data, options: argparse.Namespace) -> tuple[DiT, dict[str, DiT]]:
    """Return the network of flow matching, and those of MeanFlow by where they began."""
    steps, old_steps, falling = options.steps, options.old_steps, options.falling
    torch.manual_seed(seed)
    print(f"seed {seed}: flow matching")
    begun = DiT(**SIZE, average=False)
    teacher = train(begun, data, FlowMatchingLoss(), old_steps, seed, falling)
    file = options.out / f"sit-{seed}.safetensors"
    save_file(to_layout(teacher, "sit"), file)

    print(f"seed {seed}: the converted network, as MeanFlow")
    start = convert(file, "sit", heads=SIZE["heads"])
    student = train(start, data, MEAN_FLOW, steps, seed + 1, falling)

    print(f"seed {seed}: MeanFlow from scratch")
    students = {"converted": student}
    lengths = {"scratch": steps, "scratch, steps of both": old_steps + steps}
    for name, count in lengths.items():
        torch.manual_seed(seed + 2)
        students[name] = train(DiT(**SIZE), data, MEAN_FLOW, count, seed + 1, falling)
    return teacher, students


def scores_of(verdict: Verdict) -> Scores:
    """Return what the table shows of a verdict."""
    return verdict.accuracy or 0.0, verdict.diversity, verdict.frechet


def main() -> None:
    """Train, judge and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--old-steps", type=int, default=2000, help="of flow matching")
    add("--steps", type=int, default=1000, help="of MeanFlow")
    add("--falling", action="store_true", help="let the learning rate fall")
    add("--seeds", type=int, default=1)
    add("--out", type=Path, default=Path("runs/fine_tune"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # more would wait for each other
    options.out.mkdir(parents=True, exist_ok=True)
    tables = []
    for seed in range(options.seeds):
        tables.append(one_seed(seed, options))
        show(tables)


def show(tables: list[dict[str, Scores]]) -> None:
    """Print means and standard deviations over the seeds that are done."""
    print("| network, evaluations | accuracy | diversity | Frechet distance |")
    print("|---|---:|---:|---:|")
    for name in tables[0]:
        figures = torch.tensor([table[name] for table in tables], dtype=torch.float64)
        means = figures.mean(0).tolist()
        spreads = figures.std(0, correction=0).tolist()
        cells = []
        for mean, spread, digits in zip(means, spreads, (3, 2, 1), strict=True):
            cells.append(f"{mean:.{digits}f} ± {spread:.{digits}f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
