"""The toy of pixel MeanFlow: which quantity a network should predict where pixels are many.

A Swiss roll of two dimensions is lifted to D by a random orthonormal matrix, and noise is added in
all of them. A network of always the same width is trained by one and the same loss, that of the
average velocity u, and predicts either u itself or the clean point x, from which u = (z_t - x)/t
is formed. A clean point lies in the plane of the roll, whatever D is; a velocity holds the noise
of all D dimensions, which has to pass through the network.

    python examples/pixel_mean_flow/toy.py
    python examples/pixel_mean_flow/toy.py --quick    # in seconds; tells that it runs

One-step samples are judged within the plane, by the sliced Wasserstein distance to real points
(projections of one size in every D), and off it, by the share of their energy that lies there.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "swiss_roll"))

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from swiss_roll import cloud, roll, sliced_wasserstein  # pyright: ignore
from torch import Tensor, nn
from tqdm import tqdm

from flowspace import Adaptive, ImprovedMeanFlowLoss, PixelMeanFlowLoss, TimePairs, UniformTimes
from flowspace.demo.page import markdown_table, png, write_beside
from flowspace.objectives import Objective

DIMENSIONS = (2, 8, 16, 32, 64, 128, 256, 512)
WIDTH = 128
"""Of the network's hidden layers, in every dimension."""

EARLIEST = 0.02
"""The smallest time that is drawn."""

SHOWN = 5000
"""Points that are compared and drawn."""

PREDICTIONS: dict[str, Objective] = {
    "x": PixelMeanFlowLoss(penalty=Adaptive()),
    "u": ImprovedMeanFlowLoss(penalty=Adaptive()),
}
"""What is predicted, and the objective that takes such a prediction."""


class LiftedMLP(nn.Module):
    """An MLP with three hidden layers of `WIDTH`, SiLU, on (z, t, t - s)."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dimension + 2, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, dimension),
        )

    def forward(self, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Map ``(B, D)`` states and ``(B,)`` times to ``(B, D)``."""
        times = torch.stack([t, t - s], 1)
        return self.net(torch.cat([z, times], 1))


@dataclass(frozen=True)
class ToyResult:
    """What one training gave.

    Attributes:
        predicted: ``x`` or ``u``.
        dimension: D.
        seed: of the lift, the weights and the draws.
        distance: sliced Wasserstein distance within the plane.
        off_plane: share of the samples' energy that lies off the plane.
        samples: within the plane, ``(N, 2)``.
    """

    predicted: str
    dimension: int
    seed: int
    distance: float
    off_plane: float
    samples: Tensor


def lift_of(dimension: int, seed: int) -> Tensor:
    """Return a random matrix ``(D, 2)`` with orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(dimension, 2, generator=generator)
    orthonormal, _ = torch.linalg.qr(columns)
    return orthonormal


def train(predicted: str, dimension: int, seed: int, steps: int, batch: int = 256) -> ToyResult:
    """Train one network and judge its one-step samples, from t = 1 to s = 0."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    lift = lift_of(dimension, seed)
    network = LiftedMLP(dimension)
    times = TimePairs(UniformTimes(low=EARLIEST))
    loss_fn = dataclasses.replace(PREDICTIONS[predicted], times=times)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        points = roll(batch, generator) @ lift.T
        loss = loss_fn(network, points, generator=generator).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    noise = torch.randn(SHOWN, dimension, generator=generator)
    samples = sampled(network, predicted, noise)
    return judged(predicted, seed, samples, lift)


@torch.no_grad()
def sampled(network: nn.Module, predicted: str, noise: Tensor) -> Tensor:
    """Return one-step samples: the prediction of x, or z - u, at (t, s) = (1, 0)."""
    one = torch.ones(len(noise))
    output = network(noise, one, 0 * one)
    if predicted == "x":
        return output
    return noise - output


def judged(predicted: str, seed: int, samples: Tensor, lift: Tensor) -> ToyResult:
    """Compare samples ``(N, D)`` with real points, within the plane of the lift and off it."""
    within = samples @ lift
    off_plane = 1 - within.square().sum() / samples.square().sum()
    return ToyResult(
        predicted=predicted,
        dimension=len(lift),
        seed=seed,
        distance=sliced_wasserstein(within, real_points(len(samples), seed)),
        off_plane=float(off_plane.clamp(min=0)),
        samples=within,
    )


def real_points(count: int, seed: int) -> Tensor:
    """Return points of the roll that no network was trained on."""
    return roll(count, torch.Generator().manual_seed(2000 + seed))


def references(seed: int) -> tuple[float, float]:
    """Return the distances to real points of other real points, and of noise."""
    real = real_points(SHOWN, seed)
    generator = torch.Generator().manual_seed(3000 + seed)
    other = roll(SHOWN, generator)
    noise = torch.randn(SHOWN, 2, generator=generator)
    return sliced_wasserstein(other, real), sliced_wasserstein(noise, real)


# --- the table and the figure ------------------------------------------------------------------

HEAD = ("D", "x: distance", "u: distance", "x: off the plane", "u: off the plane")


def rows(results: Sequence[ToyResult]) -> list[tuple[str, ...]]:
    """Return the table: means over seeds, and behind ± half of the range."""
    table = []
    for dimension in dimensions_of(results):
        same = [chosen(results, predicted, dimension) for predicted in PREDICTIONS]
        distances = [distance_of(each) for each in same]
        shares = [off_plane_of(each) for each in same]
        table.append((str(dimension), *distances, *shares))
    return table


def dimensions_of(results: Iterable[ToyResult]) -> list[int]:
    """Return the dimensions that were tried, in order."""
    return sorted({result.dimension for result in results})


def chosen(results: Iterable[ToyResult], predicted: str, dimension: int) -> list[ToyResult]:
    """Return the results of one cell of the table, one a seed."""
    found = []
    for result in results:
        if (result.predicted, result.dimension) == (predicted, dimension):
            found.append(result)
    return found


def distance_of(results: Sequence[ToyResult]) -> str:
    """Return the mean distance and half of its range."""
    found = [result.distance for result in results]
    half = (max(found) - min(found)) / 2
    return f"{statistics.mean(found):.3f} ± {half:.3f}"


def off_plane_of(results: Sequence[ToyResult]) -> str:
    """Return the mean share off the plane."""
    share = statistics.mean(result.off_plane for result in results)
    return f"{100 * share:.2f} %"


def figure(results: Sequence[ToyResult]) -> Figure:
    """Draw the first seed's samples within the plane, those of x above those of u."""
    dimensions = dimensions_of(results)
    columns = len(dimensions) + 1
    size = (1.7 * columns, 3.7)
    fig, axes = plt.subplots(2, columns, figsize=size, layout="constrained")
    real = roll(SHOWN, torch.Generator().manual_seed(0))
    for line, predicted in zip(axes, PREDICTIONS, strict=True):
        cloud(line[0], real)
        line[0].set_ylabel(f"{predicted}-prediction")
        for axis, dimension in zip(line[1:], dimensions, strict=True):
            first, *_ = chosen(results, predicted, dimension)
            cloud(axis, first.samples)
    axes[0][0].set_title("real", fontsize=9)
    for axis, dimension in zip(axes[0][1:], dimensions, strict=True):
        axis.set_title(f"D = {dimension}", fontsize=9)
    return fig


def main(arguments: list[str] | None = None) -> None:
    """Train every prediction in every dimension; leave the table and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=1)
    add("--steps", type=int, default=500)
    add("--dimensions", type=int, nargs="+", default=DIMENSIONS)
    add("--quick", action="store_true", help="one seed, 10 steps")
    add("--out", type=Path, default=Path("runs/pixel_mean_flow_toy"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.steps = 1, 10
    results: list[ToyResult] = []
    text = ""
    total = options.seeds * len(options.dimensions) * len(PREDICTIONS)
    with tqdm(total=total, desc="toy", unit="run") as bar:
        for seed in range(options.seeds):
            for dimension in options.dimensions:
                for predicted in PREDICTIONS:
                    result = train(predicted, dimension, seed, options.steps)
                    results.append(result)
                    bar.update()
            text = keep(results, options.steps, options.out)
    print(f"{text}\nfigure: {options.out / 'toy.png'}")


def keep(results: Sequence[ToyResult], steps: int, folder: Path) -> str:
    """Leave the table and the figure in a folder; returns the table."""
    seeds = sorted({result.seed for result in results})
    distances = torch.tensor([references(seed) for seed in seeds])
    real, noise = distances.mean(0).tolist()
    note = (
        f"{steps} training steps, mean over {len(seeds)} seed(s) ± half of their range; "
        f"real points against real ones: {real:.3f}, "
        f"noise against real ones: {noise:.3f}."
    )
    text = f"{markdown_table(HEAD, rows(results))}\n\n{note}\n"
    write_beside(folder / "table.md", text)
    write_beside(folder / "toy.png", png(figure(results)))
    return text


if __name__ == "__main__":
    main()
