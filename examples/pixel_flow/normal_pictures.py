"""What Euler's steps cost a cascade, without a network: normal pictures, whose velocity is known.

    python examples/pixel_flow/normal_pictures.py

Pictures are normal with a spectrum like that of photographs, a power of 1 over the frequency
squared. Everything is linear then: a stage's states have known covariances, its exact velocity is
a matrix at each time, and so is the whole sampler, whose samples are normal too. The distance of
their law from the pictures' is Frechet's, over the variance of the pictures, with no noise of
sampling.
"""

import torch
from torch import Tensor

from flowspace import Cascade, CascadeFlow, CascadeStage, Euler, FlowMatchingLoss
from flowspace.cascade import doubled, halved
from flowspace.demo.page import markdown_table

SIDE = 16
"""Pixels a side of a picture."""

DIRECTIONS = SIDE**2


def covariance_of_pictures() -> Tensor:
    """Return the covariance ``(N, N)`` of pictures with N pixels and a mean variance of 1."""
    rate = torch.fft.fftfreq(SIDE, dtype=torch.float64)
    squared = rate[:, None] ** 2 + rate**2
    power = 1 / (squared + 1 / SIDE**2)
    row = torch.fft.ifft2(power).real
    rows = [row.roll((i, j), (0, 1)).flatten() for i in range(SIDE) for j in range(SIDE)]
    covariance = torch.stack(rows)
    return covariance / covariance.diagonal().mean()


def matrix_of(function: object, side: int) -> Tensor:
    """Return the matrix of a linear function of pictures of a side."""
    basis = torch.eye(side**2, dtype=torch.float64).reshape(-1, 1, side, side)
    return function(basis).flatten(1).T  # type: ignore[operator]


class NormalStage:
    """The exact velocity of a stage: E[start - end | z_t] = M_t z_t.

    Args:
        stage: which.
        covariance: of pictures of the stage's size.
    """

    def __init__(self, stage: CascadeStage, covariance: Tensor) -> None:
        size = len(covariance)
        side = round(size**0.5)
        eye = torch.eye(size, dtype=torch.float64)
        blur = eye
        if stage.index:
            blur = matrix_of(lambda x: doubled(halved(x)), side)
        self.stage, self.covariance = stage, covariance
        self.of_end = (1 - stage.end) * eye
        self.of_start = (1 - stage.start) * blur

    def velocity(self, z: Tensor, t: float) -> Tensor:
        """Return the velocity at pictures ``(B, 1, side, side)`` and the stage's own time t."""
        stage = self.stage
        to_x = self.of_start - self.of_end
        to_n = stage.start - stage.end
        of_x = (1 - t) * self.of_end + t * self.of_start
        of_n = (1 - t) * stage.end + t * stage.start
        eye = torch.eye(len(of_x), dtype=torch.float64)
        own = of_x @ self.covariance @ of_x.T + of_n**2 * eye
        cross = to_x @ self.covariance @ of_x.T + to_n * of_n * eye
        return torch.linalg.solve(own, z.flatten(1).T).T.matmul(cross.T).reshape(z.shape)


def sampler_of(stages: int, covariance: Tensor) -> CascadeFlow:
    """Return the sampler of a cascade with the exact velocity in place of a network."""
    cascade = Cascade(stages)
    by_side: dict[int, NormalStage] = {}
    for stage in cascade:
        halvings = stages - 1 - stage.index
        down = matrix_of(lambda x, times=halvings: halved(x, times), SIDE)
        by_side[SIDE >> halvings] = NormalStage(stage, down @ covariance @ down.T)

    def network(z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        normal = by_side[z.shape[-1]]
        low, high = normal.stage.window
        return normal.velocity(z, (float(t[0]) - low) / (high - low))

    return CascadeFlow(cascade, FlowMatchingLoss().flow_map(network), Euler())


def distance(first: Tensor, second: Tensor) -> float:
    """Return the squared Frechet distance of two centred normal laws, over the second's trace."""
    values, vectors = torch.linalg.eigh(second)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ first @ root).clamp(min=0).sqrt().sum()
    return float((first.trace() + second.trace() - 2 * cross) / second.trace())


def main() -> None:
    """Print the distance and the cost of cascades of one to four stages."""
    covariance = covariance_of_pictures()
    noise = torch.eye(DIRECTIONS, dtype=torch.float64).reshape(-1, 1, SIDE, SIDE)
    rows = []
    for stages in (1, 2, 3, 4):
        cells, sampler = [], sampler_of(stages, covariance)
        for steps in (12, 24, 60, 120):
            made = sampler.sample(noise, steps=steps // stages).flatten(1)
            cells.append(f"{distance(made.T @ made, covariance):.2e}")
        pixels = sum(4.0**-k for k in range(stages)) / stages
        rows.append([str(stages), f"{pixels:.3f}", *cells])
    steps_head = [f"{steps} steps" for steps in (12, 24, 60, 120)]
    print(markdown_table(["stages", "pixels a step, of one stage's", *steps_head], rows))


if __name__ == "__main__":
    main()
