"""What benchmarks share that train and judge on several seeds: scores, their means, their file."""

import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowspace.demo.metrics import Verdict
from flowspace.demo.networks import Patches
from flowspace.demo.page import write_beside
from flowspace.demo.stage_one import World

__all__ = ["Scores", "cells_of", "in_pixels", "mean_of", "said", "write_json", "write_scores"]

Scores = dict[str, list[Verdict]]
"""Verdicts by the name of the row, one a seed."""


def in_pixels(world: World, patch: int) -> World:
    """Return the same world without an autoencoder: its latents are patches of pixels."""
    patches = Patches(patch)
    latents = patches.encode(world.data.images)
    return replace(world, autoencoder=patches, latents=latents)


def said(line: str) -> None:
    """Say how far it is, beside what is printed."""
    print(line, file=sys.stderr, flush=True)


def mean_of(verdicts: list[Verdict], name: str) -> float:
    """Return the mean of one number of verdicts, by its name."""
    return statistics.mean(getattr(verdict, name) for verdict in verdicts)


def cells_of(verdicts: list[Verdict]) -> tuple[str, str, str]:
    """Return accuracy, diversity and Frechet distance: means, and the distance's range."""
    accuracy = mean_of(verdicts, "accuracy")
    diversity = mean_of(verdicts, "diversity")
    distance = mean_of(verdicts, "frechet")
    distances = [verdict.frechet for verdict in verdicts]
    span = f"{min(distances):.1f} to {max(distances):.1f}"
    return f"{accuracy:.3f}", f"{diversity:.2f}", f"{distance:.1f} ({span})"


def write_scores(path: Path, scores: Scores) -> None:
    """Write all numbers of all verdicts."""
    found = {}
    for name, verdicts in scores.items():
        found[name] = [vars(verdict) for verdict in verdicts]
    write_json(path, found)


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """Write a file of JSON."""
    text = json.dumps(found, indent=2)
    write_beside(path, f"{text}\n")
