"""What tangents in bfloat16 do to training: ``python benchmarks/bfloat16.py`` trains CrossFlow on
the digits of ``flowspace demo`` four times from each seed and prints the table of the docs.

The trainings of a seed have the same draws and steps. What a network under bfloat16 autocast
rounds is rounded here by hand, on float32 kernels: after each torch function the tangent, or
tangent and value, is rounded to the eight bits of bfloat16's mantissa. Products are summed in
float32, as tensor cores do; weights are not rounded. Deeper networks round more often, so one row
has tangents that are rounded eight times as coarsely. A run that was stopped is continued by the
same command.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from verdicts import Scores, cells_of, said, write_scores

from flowspace import CrossFlowLoss, TimePairs
from flowspace.demo import digits
from flowspace.demo.data import SETTINGS, Settings, load, seeded
from flowspace.demo.page import markdown_table, write_beside
from flowspace.demo.stage_one import prepare
from flowspace.derivatives import shared_primal
from flowspace.derivatives.rules.dual import Layout
from flowspace.derivatives.shared_primal.carrier import Carrier

HEAD = ("rounded", "accuracy", "diversity", "Frechet distance", "residual off by")

BITS = 8
"""Of the mantissa of bfloat16."""

FEW_BITS = 5
"""Of a mantissa whose rounding errors are eight times as large."""


def rounded(x: Tensor, bits: int = BITS) -> Tensor:
    """Return the nearest numbers whose mantissa has so many bits."""
    mantissa, exponent = torch.frexp(x)
    scale = 2.0**bits
    return torch.ldexp((mantissa * scale).round() / scale, exponent)


class RoundedTangents(Carrier):
    """Rounds each tangent."""

    def wrap(self, primal: Tensor, tangent: Tensor, layout: Layout | None) -> Tensor:
        """Return an alias of a primal that carries a rounded tangent."""
        return super().wrap(primal, rounded(tangent), layout)


class CoarseTangents(Carrier):
    """Rounds each tangent to fewer bits."""

    def wrap(self, primal: Tensor, tangent: Tensor, layout: Layout | None) -> Tensor:
        """Return an alias of a primal that carries a coarsely rounded tangent."""
        return super().wrap(primal, rounded(tangent, FEW_BITS), layout)


class RoundedPairs(Carrier):
    """Rounds each value, whose gradient passes as if it were not, and each tangent."""

    def wrap(self, primal: Tensor, tangent: Tensor, layout: Layout | None) -> Tensor:
        """Return an alias of a rounded primal that carries a rounded tangent."""
        if primal.is_floating_point():
            primal = primal + (rounded(primal) - primal).detach()
        return super().wrap(primal, rounded(tangent), layout)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: of the row.
        carrier: what carries the tangents.
    """

    name: str
    carrier: type[Carrier]

    @property
    def folder(self) -> str:
        """Name of the folder of its run."""
        return self.name.replace(",", "").replace(" ", "-")

    def carrying(self) -> mock._patch:  # pyright: ignore
        """Have `SharedPrimal` carry tangents this way."""
        return mock.patch.object(shared_primal, "Carrier", self.carrier)


ARMS = (
    Arm("nothing", Carrier),
    Arm("tangents", RoundedTangents),
    Arm("values and tangents", RoundedPairs),
    Arm(f"tangents, to {FEW_BITS} bits", CoarseTangents),
)


def compared(settings: Settings, folder: Path, seeds: int) -> Scores:
    """Train and judge every arm with every seed; return the scores by name."""
    data = load(settings.dataset)
    scores: Scores = {}
    for seed in range(seeds):
        plan = seeded(settings, seed)
        place = folder / f"seed-{seed}"
        world, judge = prepare(data, plan, place)
        scores.setdefault("real digits", []).append(judge.real())
        for arm in ARMS:
            objective = CrossFlowLoss(penalty=plan.penalty)
            method = digits.Method(arm.folder, objective)
            with arm.carrying():
                network = method.train(world, plan, place / arm.folder)
            images, labels, cost = digits.draw(method, network, world, seed)
            score = judge.score(images, labels, cost)
            scores.setdefault(arm.name, []).append(score)
            said(f"seed {seed}: {arm.name}: {score}")
    return scores


def errors(settings: Settings) -> dict[str, float]:
    """Return how far the residual of each arm is from that of float32, relative, in the root mean
    square, for a network with drawn weights.
    """
    data = load(settings.dataset)
    torch.manual_seed(0)
    side = data.side // settings.patch
    size = digits.ViTSize(settings.width, settings.depth, settings.heads)
    network = digits.SmallViT(settings.channels, side, 1, settings.patch, size)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    latents = torch.randn(64, settings.channels, side, side)
    targets = data.images[:64]
    cond = {"labels": torch.zeros(64, dtype=torch.long)}
    # on no row do the times agree
    objective = CrossFlowLoss(times=TimePairs(equal=0.0))

    def residual(arm: Arm) -> Tensor:
        draws = torch.Generator().manual_seed(0)
        with arm.carrying(), torch.no_grad():
            out = objective(network, latents, targets, cond=cond, generator=draws)
        return out.prediction - out.target

    exact = residual(ARMS[0])
    found = {}
    for arm in ARMS:
        off = residual(arm) - exact
        found[arm.name] = float(off.norm() / exact.norm())
    return found


def table(scores: Scores, off: dict[str, float]) -> str:
    """Return the means over seeds, and the range of the distance."""
    rows = []
    for name, found in scores.items():
        error = ""
        if name in off:
            error = f"{off[name]:.0e}"
        rows.append((name, *cells_of(found), error))
    return markdown_table(HEAD, rows)


def main() -> None:
    """Print the table and save it in the folder of the run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=3)
    add("--steps", type=int, help="default: those of flowspace demo")
    add("--threads", type=int, default=1)
    add("--out", type=Path, default=Path("runs") / "bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = SETTINGS["digits"]
    start = time.perf_counter()
    if options.steps:
        plan = replace(settings.generator, steps=options.steps)
        settings = replace(settings, generator=plan)
    off = errors(settings)
    scores = compared(settings, options.out, options.seeds)
    write_scores(options.out / "scores.json", scores)
    text = table(scores, off)
    write_beside(options.out / "table.md", f"{text}\n")
    seconds = time.perf_counter() - start
    print(f"{text}\n\n{seconds:.0f} s; in {options.out}")


if __name__ == "__main__":
    main()
