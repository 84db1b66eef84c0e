"""What Euler's steps cost a cascade, without a network: normal pictures, whose velocity is known.

    python examples/pixel_flow/normal_pictures.py

Pictures are normal with a spectrum like that of photographs, a power of 1 over the frequency
squared. Everything is linear then: a stage's states have known covariances, its exact velocity is
a matrix at each time, and so is the whole sampler, whose samples are normal too. The distance of
their law from the pictures' is Frechet's, over the variance of the pictures, with no noise of
sampling.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flowspace import Cascade, CascadeFlow, CascadeStage, Euler, FlowMatchingLoss
from flowspace.cascade import doubled, halved
from flowspace.demo.page import markdown_table

SIDE = 16
"""Pixels a side of a picture."""

STEPS = (12, 24, 60, 120)
"""Of Euler, in all stages together."""


def covariance_of_pictures() -> Tensor:
    """Return the covariance ``(N, N)`` of pictures with N pixels and a mean variance of 1."""
    rate = torch.fft.fftfreq(SIDE, dtype=torch.float64)
    squared = rate[:, None] ** 2 + rate**2
    power = 1 / (squared + 1 / SIDE**2)
    of_first = torch.fft.ifft2(power).real
    rows = []
    for i in range(SIDE):
        for j in range(SIDE):
            shifted = of_first.roll((i, j), (0, 1))
            rows.append(shifted.flatten())
    covariance = torch.stack(rows)
    return covariance / covariance.diagonal().mean()


def matrix_of(function: Callable[[Tensor], Tensor], side: int) -> Tensor:
    """Return the matrix of a linear function of pictures of a side."""
    return function(unit_pictures(side)).flatten(1).T


def unit_pictures(side: int) -> Tensor:
    """Return the pictures ``(N, 1, side, side)`` with a 1 in one of N pixels, and zeros."""
    return identity(side**2).reshape(-1, 1, side, side)


def identity(size: int) -> Tensor:
    """Return the identity matrix."""
    return torch.eye(size, dtype=torch.float64)


def blurred(pictures: Tensor) -> Tensor:
    """Return pictures halved and doubled again: what the stage before knows of them."""
    return doubled(halved(pictures))


class NormalStage:
    """The exact velocity of a stage: E[start - end | z_t] = M_t z_t.

    Args:
        stage: which.
        covariance: of pictures of the stage's size.
    """

    def __init__(self, stage: CascadeStage, covariance: Tensor) -> None:
        size = len(covariance)
        blur = identity(size)
        if stage.index:
            blur = matrix_of(blurred, round(size**0.5))
        self.stage = stage
        self.covariance = covariance
        self.of_end = (1 - stage.end) * identity(size)
        self.of_start = (1 - stage.start) * blur

    def velocity(self, z: Tensor, t: float) -> Tensor:
        """Return the velocity at pictures ``(B, 1, side, side)`` and the stage's own time t."""
        stage = self.stage
        to_x = self.of_start - self.of_end
        to_n = stage.start - stage.end
        of_x = (1 - t) * self.of_end + t * self.of_start
        of_n = (1 - t) * stage.end + t * stage.start
        eye = identity(len(of_x))
        own = of_x @ self.covariance @ of_x.T + of_n**2 * eye
        cross = to_x @ self.covariance @ of_x.T + to_n * of_n * eye
        states = z.flatten(1).T
        whitened = torch.linalg.solve(own, states).T
        return whitened.matmul(cross.T).reshape(z.shape)


def sampler_of(stages: int, covariance: Tensor) -> CascadeFlow:
    """Return the sampler of a cascade with the exact velocity in place of a network."""
    cascade = Cascade(stages)
    by_side: dict[int, NormalStage] = {}
    for stage in cascade:
        halvings = stages - 1 - stage.index
        down = matrix_of(partial(halved, times=halvings), SIDE)
        of_stage = down @ covariance @ down.T
        by_side[SIDE >> halvings] = NormalStage(stage, of_stage)

    def network(z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        normal = by_side[z.shape[-1]]
        low, high = normal.stage.window
        own_time = (float(t[0]) - low) / (high - low)
        return normal.velocity(z, own_time)

    flow_map = FlowMatchingLoss().flow_map(network)
    return CascadeFlow(cascade, flow_map, Euler())


def distance(first: Tensor, second: Tensor) -> float:
    """Return the squared Frechet distance of two centred normal laws, over the second's trace."""
    values, vectors = torch.linalg.eigh(second)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    squares = torch.linalg.eigvalsh(root @ first @ root)
    cross = squares.clamp(min=0).sqrt().sum()
    squared = first.trace() + second.trace() - 2 * cross
    return float(squared / second.trace())


def main() -> None:
    """Print the distance and the cost of cascades of one to four stages."""
    covariance = covariance_of_pictures()
    noise = unit_pictures(SIDE)
    head = ["stages", "pixels a step, of one stage's"]
    head += [f"{steps} steps" for steps in STEPS]
    rows = []
    for stages in (1, 2, 3, 4):
        pixels = sum(4.0**-k for k in range(stages)) / stages
        cells = [str(stages), f"{pixels:.3f}"]
        sampler = sampler_of(stages, covariance)
        for steps in STEPS:
            made = sampler.sample(noise, steps=steps // stages).flatten(1)
            missed = distance(made.T @ made, covariance)
            cells.append(f"{missed:.2e}")
        rows.append(cells)
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()
