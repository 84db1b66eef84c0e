"""A judge of digits that shares nothing with what is trained: the demo's classifiers.

They see 8 x 8 grey pictures and were trained on half of the training digits; samples are averaged
over squares to that size. For digits alone; other pictures are judged by ``judging.py``.
"""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from flowspace.demo.data import SETTINGS, load
from flowspace.demo.metrics import Judge, Verdict
from flowspace.demo.stage_one import judge_of_grey

__all__ = ["grey", "judge_of", "table"]

SIDE = 8
"""Pixels a side of scikit-learn's digits."""


def judge_of(folder: Path) -> Judge:
    """Return the classifiers, trained into a folder where they are not there yet."""
    plan = SETTINGS["digits"].classifier
    return judge_of_grey(load("digits"), plan, folder, {"dataset": "digits"})


def grey(samples: Tensor) -> Tensor:
    """Return uint8 samples ``(N, 3, H, W)`` as the judges see them, ``(N, 1, 8, 8)``."""
    means = samples.float().mean(1, keepdim=True) / 127.5 - 1
    return F.adaptive_avg_pool2d(means, SIDE)


def table(verdicts: dict[str, Verdict]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the head and the rows of a table of verdicts by name."""
    head = ("samples", "accuracy", "diversity", "Frechet distance")
    rows = []
    for name, verdict in verdicts.items():
        row = (
            name,
            f"{verdict.accuracy:.3f}",
            f"{verdict.diversity:.2f}",
            f"{verdict.frechet:.1f}",
        )
        rows.append(row)
    return head, rows
