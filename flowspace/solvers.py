"""Solvers of the probability-flow ODE for plain velocity models, and the grids of times that they
step on.

A velocity is a callable ``(z_t, t, **cond)`` on ``(B, *)`` states and ``(B,)`` times; the ODE is
dz/dt = v(z, t), solved from the first time of a grid to its last. Heun's and the adaptive method
are torchdiffeq's (extra ``ode``).
"""

import abc
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowspace.errors import InputError, TimeError
from flowspace.guidance import Guidance

__all__ = ["DormandPrince", "Euler", "Heun", "Solver", "VelocityFlow", "falling_grid"]

Velocity = Callable[..., Tensor]


class Solver(abc.ABC):
    """A method for dz/dt = v(z, t)."""

    @abc.abstractmethod
    def path(self, velocity: Velocity, z: Tensor, times: Tensor) -> Tensor:
        """Return the states at each time of a monotone grid ``(n,)``, the first of them z: ``(n,
        B, *)``.
        """


@dataclass(frozen=True)
class Euler(Solver):
    """One evaluation a step: z_s = z_t - (t - s) v(z_t, t), first order."""

    def path(self, velocity: Velocity, z: Tensor, times: Tensor) -> Tensor:
        """Return the states at each time of a monotone grid ``(n,)``, the first of them z: ``(n,
        B, *)``.
        """
        states = [z]
        with torch.no_grad():
            for t, s in itertools.pairwise(times):
                slope = _checked(velocity(z, t.expand(len(z)).contiguous()), z)
                z = (z + (s - t) * slope).to(z.dtype)
                states.append(z)
        return torch.stack(states)


@dataclass(frozen=True)
class Heun(Solver):
    """Two evaluations a step, second order; the last one is at the last time, so v must be finite
    there.

    Raises:
        InputError: on use, if torchdiffeq (the extra ``ode``) is not installed.
    """

    def path(self, velocity: Velocity, z: Tensor, times: Tensor) -> Tensor:
        """Return the states at each time of a monotone grid ``(n,)``, the first of them z: ``(n,
        B, *)``.
        """
        return _odeint(velocity, z, times, method="heun2")


@dataclass(frozen=True)
class DormandPrince(Solver):
    """The adaptive method of order 5(4); the grid says only where states are wanted.

    Args:
        rtol: relative tolerance of a step, above 0.
        atol: absolute tolerance of a step, above 0.

    Raises:
        InputError: if a tolerance is not above 0; on use, if torchdiffeq (the extra ``ode``) is
            not installed.
    """

    rtol: float = 1e-5
    atol: float = 1e-5

    def __post_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0):
            raise InputError(
                f"rtol = {self.rtol}, atol = {self.atol} came; tolerances are above 0, such as "
                "1e-5"
            )

    def path(self, velocity: Velocity, z: Tensor, times: Tensor) -> Tensor:
        """Return the states at each time of a monotone grid ``(n,)``, the first of them z: ``(n,
        B, *)``.
        """
        return _odeint(velocity, z, times, method="dopri5", rtol=self.rtol, atol=self.atol)


def _odeint(velocity: Velocity, z: Tensor, times: Tensor, **options: Any) -> Tensor:
    try:
        from torchdiffeq import odeint  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "this solver is torchdiffeq's, which is not installed; write: pip install "
            "'flowspace[ode]'"
        ) from error

    def slope(t: Tensor, state: Tensor) -> Tensor:
        return _checked(
            velocity(state, t.to(times.dtype).expand(len(state)).contiguous()), state
        ).to(state.dtype)

    with torch.no_grad():
        return odeint(slope, z, times, **options)  # pyright: ignore[reportReturnType]


def _checked(velocity: Tensor, z: Tensor) -> Tensor:
    if velocity.shape != z.shape:
        raise InputError(
            f"the velocity has shape {tuple(velocity.shape)} for states of shape {tuple(z.shape)}"
        )
    return velocity


@dataclass(frozen=True)
class VelocityFlow:
    """A plain velocity model and a solver: samples by the ODE.

    Args:
        velocity: a callable ``(z_t, t, **cond)``; of a flow map, `FlowMap.velocity`.
        solver: `Euler()`, `Heun()` or `DormandPrince()`.
    """

    velocity: Velocity
    solver: Solver = field(default_factory=Euler)

    def sample(
        self,
        noise: Tensor,
        *,
        cond: Mapping[str, Any] | None = None,
        steps: int = 32,
        times: Sequence[float] | Tensor | None = None,
        guidance: Guidance | None = None,
    ) -> Tensor:
        """Return samples from noise ``(B, *)``.

        Args:
            noise: standard normal noise of the latents' shape.
            cond: keyword arguments of the velocity.
            steps: on an even grid from 1 to 0.
            times: the grid itself, falling from 1 to 0, instead of ``steps``.
            guidance: classifier-free guidance; two evaluations instead of one.

        Raises:
            TimeError: if the grid does not fall from 1 to 0.
        """
        given = dict(cond or {})
        velocity = self.velocity if guidance is None else guidance.apply(self.velocity)
        return self.solver.path(
            lambda z, t: velocity(z, t, **given), noise, falling_grid(noise, steps, times)
        )[-1]


def falling_grid(noise: Tensor, steps: int, times: Sequence[float] | Tensor | None) -> Tensor:
    """Return the times of a sampler ``(n,)``, beside the noise: the given ones, or ``steps`` even
    steps from 1 to 0.

    Raises:
        TimeError: if steps is no count, or given times do not fall strictly from 1 to 0.
    """
    dtype = torch.float64 if noise.dtype.itemsize == 8 else torch.float32
    device = (
        noise.device if isinstance(noise, Tensor) else None
    )  # beside JAX arrays the grid is known, not traced
    if times is None:
        if not isinstance(steps, int) or steps < 1:
            raise TimeError(
                f"steps = {steps} came; it counts evaluations, so write 1 or a larger integer"
            )
        return torch.linspace(1, 0, steps + 1, device=device, dtype=dtype)
    grid = torch.as_tensor(times, device=device, dtype=dtype)
    if (
        grid.ndim != 1
        or len(grid) < 2
        or grid[0] != 1
        or grid[-1] != 0
        or bool((grid.diff() >= 0).any())
    ):
        raise TimeError(
            f"times = {grid.tolist()} came; the grid falls strictly from 1 to 0, as in [1, 0.5, 0]"
        )
    return grid
