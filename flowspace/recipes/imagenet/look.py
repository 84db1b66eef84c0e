"""What one sees of a run: sheets of samples, a few scores while it trains, the gradients of each
term by t.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from flowspace.demo.page import sheet, slopes, write_beside
from flowspace.recipes.imagenet.parts import Parts
from flowspace.training import Watch
from flowspace.vision.evaluate import Plan, features_of, judge, rounded

__all__ = ["WATCHED", "Look", "sheet", "slopes"]

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
