"""What flowspace adds to the ImageNet recipe, on its smoke run: ``python benchmarks/imagenet.py``.

One-step generation by the pipeline over the bare call of its network; times, state, coefficients,
residual, target and penalty, forward and backward, over a training step of both players; and how
long the training waited for its pictures. CPU seconds of interleaved runs in one process, medians;
the waiting is wall-clock, from the run's own log.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from overhead import Known

from flowspace.demo.page import markdown_table
from flowspace.recipes.config import Config, load
from flowspace.recipes.imagenet import Run
from flowspace.training import Draws
from flowspace.vision.steps import Adversarial, FlowStep

SMOKE = Path(__file__).parents[1] / "examples" / "imagenet" / "configs" / "smoke.yaml"
ROUNDS, IMAGES = 41, 50


def ratio(job: Callable[[], object], over: Callable[[], object]) -> float:
    """Return the median CPU time of a job over that of another, run in turn."""
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(ROUNDS + 2):
        for kept, one in zip(seconds, (job, over), strict=True):
            start = time.process_time()
            one()
            kept.append(time.process_time() - start)
    return statistics.median(seconds[0][2:]) / statistics.median(seconds[1][2:])


def generation(run: Run) -> float:
    """Return the pipeline's time over its network's."""
    pipeline = run.pipeline()
    c = run.config.generator
    noise, labels = (
        torch.randn(IMAGES, c.channels, c.grid, c.grid),
        torch.arange(IMAGES) % run.parts.classes,
    )
    one = torch.ones(IMAGES)

    @torch.no_grad()
    def bare() -> None:
        pipeline.generator(noise, one, 0 * one, labels=labels)

    return ratio(lambda: pipeline(labels, latents=noise, output_type="pt"), bare)


def arithmetic(run: Run) -> float:
    """Return the objective's own time, its network known beforehand, over a training step without
    its optimisers.
    """
    step, network, batch = run.step(), run.parts.generator(), run.config.training.batch
    assert isinstance(step, Adversarial)
    rows = run.parts.batches(0, batch, 0)
    draws = Draws(0, step.start + 1, 0, batch, batch, torch.device("cpu"))
    latents, images = run.encoder.encode(rows[0]), rows[0]
    known = Known(torch.randn_like(images, requires_grad=True), torch.randn_like(images))
    bare = FlowStep(dataclasses.replace(run.objective, derivative=known), None)

    def whole() -> None:
        terms = step.loss(network, step.opponent, rows, draws)
        terms.rows.mean().backward()
        step.answer(step.opponent, terms, draws).mean().backward()

    return ratio(lambda: bare.loss(network, (latents, *rows), draws).rows.mean().backward(), whole)


def waiting(run: Run) -> float:
    """Return the share of the training that waited for pictures, its first step left out."""
    log = (run.config.out / "generator" / "log.jsonl").read_text().splitlines()
    found = [record for record in map(json.loads, log) if "waited" in record][1:]
    return sum(record["waited"] for record in found) / sum(record["seconds"] for record in found)


def main() -> None:
    """Train the smoke run in a temporary folder and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        config: Config = load(SMOKE, [f"out={folder}/smoke"])
        run = Run(config)
        run.train()
        rows = [
            (
                "one-step generation by the pipeline, over the bare network call",
                f"{generation(run):.4f}",
                "1.02",
            ),
            (
                "flowspace's own arithmetic, share of a training step",
                f"{arithmetic(run):.4f}",
                "0.02",
            ),
            ("waiting for pictures, share of the training", f"{waiting(run):.4f}", "0"),
        ]
    print(markdown_table(("smoke.yaml", "measured", "limit"), rows))


if __name__ == "__main__":
    main()
