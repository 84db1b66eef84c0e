"""What one sees of a run: sheets of samples, a few scores while it trains, the gradients of each
term by t.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowspace.recipes.imagenet.parts import Parts
from flowspace.recipes.report import png, write_beside
from flowspace.training import Watch
from flowspace.vision.evaluate import Plan, features_of, judge, rounded

__all__ = ["WATCHED", "Look", "sheet", "slopes"]

SHOWN = 8
"""Samples of a class in a picture, of at most so many classes."""

WATCHED = 400
"""Samples that the watch scores: enough to see a trend, far too few for a number to report."""


@dataclass
class Look(Watch):
    """Draws a sheet of samples and scores a few.

    Args:
        parts: of the run, with its pictures and judge.
        every: steps between looks.
    """

    parts: Parts
    every: int

    def __call__(self, step: int, averaged: nn.Module) -> Mapping[str, float]:
        """Leave ``sheet-STEP.png``; the score is KID's, where the judge is at hand."""
        c, parts = self.parts.config, self.parts
        device = parts.place.device
        shape = (c.generator.channels, c.generator.grid, c.generator.grid)
        plan = Plan(WATCHED, parts.classes, shape, batch=c.evaluation.batch)
        found = []
        with torch.no_grad():
            for first in range(0, plan.count, plan.batch):
                noise, labels = plan.inputs(first, min(first + plan.batch, plan.count))
                one = noise.new_ones(len(noise)).to(device)
                found.append(
                    rounded(
                        averaged(noise.to(device), one, 0 * one, labels=labels.to(device))
                    ).cpu()
                )
        images = torch.cat(found)
        write_beside(
            c.out / "generator" / f"sheet-{step + 1:07d}.png", sheet(images, parts.classes)
        )
        if c.evaluation.extractor == "inception":
            return {}
        extractor = parts.extractor()
        scores = judge(
            extractor, features_of(extractor, images.split(plan.batch)), parts.real(extractor)
        )
        return scores.values | {"score": scores.kid}


def sheet(images: Tensor, classes: int) -> bytes:
    """Return a PNG of uint8 images whose classes take turns: a row for each class."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    shown = torch.cat([images[label::classes][:SHOWN] for label in range(min(classes, SHOWN))])
    buffer = io.BytesIO()
    to_pil_image(make_grid(shown, SHOWN, padding=2, pad_value=255)).save(buffer, "png")
    return buffer.getvalue()


def slopes(log: Sequence[Mapping[str, Any]]) -> bytes:
    """Plot the norms of each term's gradient at the prediction by t, over the second half of a log
    (the paper's figure 7).
    """
    from matplotlib import pyplot as plt

    found = [line["slopes_by"]["t"] for line in log if line.get("slopes_by")]
    found = found[len(found) // 2 :]
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for name in found[-1] if found else ():
        rows = torch.tensor(
            [
                [math.nan if v is None else v for v in record[name]]
                for record in found
                if name in record
            ]
        )
        middles = (torch.arange(rows.shape[1]) + 0.5) / rows.shape[1]
        axis.semilogy(middles, rows.nanmean(0), marker="o", label=name)
    axis.set_xlabel("t")
    axis.set_ylabel("norm of the gradient at the prediction")
    axis.legend()
    return png(figure)
