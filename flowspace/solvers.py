"""Solvers of the probability-flow ODE for plain velocity models, and the grids they step on.

A velocity is a callable ``(z_t, t, **cond)`` on ``(B, *)`` states and ``(B,)`` times; the ODE is
dz/dt = v(z, t), solved from the first time of a grid to its last. Heun's and the adaptive method
are torchdiffeq's (extra ``ode``).
"""

import abc
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowspace.arrays import is_count, is_number
from flowspace.errors import InputError, TimeError
from flowspace.guidance import Guidance, check_guidance
from flowspace.inputs import check_states, checked_cond, is_function, require, velocity_of

__all__ = ["DormandPrince", "Euler", "Heun", "Solver", "VelocityFlow", "falling_grid"]

Velocity = Callable[..., Tensor]
"""Any callable ``(z_t, t, **cond)`` on ``(B, *)`` states and ``(B,)`` times."""

DOUBLE = 8
"""Bytes of a number in float64."""

UNDERFLOW = "underflow in dt"
"""What torchdiffeq says where an adaptive step would be of no length."""


class Solver(abc.ABC):
    """A method for dz/dt = v(z, t)."""

    @abc.abstractmethod
    def path(self, velocity: Velocity, z: Tensor, times: Tensor) -> Tensor:
        """Return the states ``(n, B, *)`` at the times ``(n,)`` of a monotone grid, z first."""


@dataclass(frozen=True)
class Euler(Solver):
    """One evaluation a step: z_s = z_t - (t - s) v(z_t, t), first order."""

    def path(self, velocity: Velocity, z: Tensor, times: Tensor) -> Tensor:
        """Return the states ``(n, B, *)`` at the times ``(n,)`` of a monotone grid, z first."""
        states = [z]
        with torch.no_grad():
            for t, s in itertools.pairwise(times):
                per_row = t.expand(len(z)).contiguous()
                v = velocity_of("the velocity", velocity, z, per_row, {})
                z = (z + (s - t) * v).to(z.dtype)
                states.append(z)
        return torch.stack(states)


@dataclass(frozen=True)
class Heun(Solver):
    """Two evaluations a step, second order.

    The last evaluation is at the last time, so v must be finite there.

    Raises:
        InputError: on use, if torchdiffeq (the extra ``ode``) is not installed.
    """

    def path(self, velocity: Velocity, z: Tensor, times: Tensor) -> Tensor:
        """Return the states ``(n, B, *)`` at the times ``(n,)`` of a monotone grid, z first."""
        return _odeint(velocity, z, times, method="heun2")


@dataclass(frozen=True)
class DormandPrince(Solver):
    """The adaptive method of order 5(4); the grid says only where states are wanted.

    Args:
        rtol: relative tolerance of a step, above 0.
        atol: absolute tolerance of a step, above 0.

    Raises:
        InputError: if a tolerance is not above 0; on use, if torchdiffeq (the extra ``ode``) is
            not installed, or the velocity asks for steps of no length.
    """

    rtol: float = 1e-5
    atol: float = 1e-5

    def __post_init__(self) -> None:
        for tolerance in (self.rtol, self.atol):
            if not (is_number(tolerance) and 0 < tolerance < math.inf):
                raise InputError(
                    f"got rtol = {self.rtol!r}, atol = {self.atol!r}; "
                    "tolerances are above 0, such as 1e-5"
                )

    def path(self, velocity: Velocity, z: Tensor, times: Tensor) -> Tensor:
        """Return the states ``(n, B, *)`` at the times ``(n,)`` of a monotone grid, z first."""
        return _odeint(velocity, z, times, method="dopri5", rtol=self.rtol, atol=self.atol)


def _odeint(velocity: Velocity, z: Tensor, times: Tensor, **options: Any) -> Tensor:
    try:
        from torchdiffeq import odeint  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "got a solver of torchdiffeq, which is not installed; "
            "write: pip install 'flowspace[ode]'"
        ) from error

    def right_hand_side(t: Tensor, state: Tensor) -> Tensor:
        t = t.to(times.dtype).expand(len(state)).contiguous()
        v = velocity_of("the velocity", velocity, state, t, {})
        return v.to(state.dtype)

    try:
        with torch.no_grad():
            return odeint(right_hand_side, z, times, **options)  # pyright: ignore[reportReturnType]
    except AssertionError as error:
        if UNDERFLOW not in str(error):
            raise
        raise InputError(
            f"got a velocity that asks for smaller steps than numbers tell apart, in states of "
            f"{z.dtype}: it is infinite, not a number, or rounded too coarsely; "
            "write noise in float32, larger tolerances or Euler()"
        ) from error


@dataclass(frozen=True)
class VelocityFlow:
    """A plain velocity model and a solver: samples by the ODE.

    Args:
        velocity: a callable ``(z_t, t, **cond)``; of a flow map, `FlowMap.velocity`.
        solver: `Euler()`, `Heun()` or `DormandPrince()`.
    """

    velocity: Velocity
    solver: Solver = Euler()

    def __post_init__(self) -> None:
        require(
            is_function(self.velocity),
            "velocity",
            self.velocity,
            "it is a function (z_t, t, **cond), such as FlowMap.velocity",
        )
        require(
            isinstance(self.solver, Solver),
            "solver",
            self.solver,
            "write for example Euler(), Heun() or DormandPrince()",
        )

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
        check_states("noise", noise)
        given = checked_cond(cond)
        velocity = self.velocity
        if guidance is not None:
            check_guidance(guidance)
            velocity = guidance.apply(velocity)
        grid = falling_grid(noise, steps, times)

        def conditioned(z: Tensor, t: Tensor) -> Tensor:
            return velocity_of("velocity", velocity, z, t, given)

        path = self.solver.path(conditioned, noise, grid)
        return path[-1]


def falling_grid(noise: Tensor, steps: int, times: Sequence[float] | Tensor | None) -> Tensor:
    """Return the times ``(n,)`` of a sampler, beside the noise.

    Args:
        noise: of either library; on JAX arrays the grid is a tensor, whose values are known.
        steps: how many even steps there are from 1 to 0.
        times: the grid itself instead, falling strictly from 1 to 0.

    Raises:
        TimeError: if steps is no count, or given times do not fall strictly from 1 to 0.
    """
    where: dict[str, Any] = {"device": None, "dtype": torch.float32}
    if noise.dtype.itemsize == DOUBLE:
        where["dtype"] = torch.float64
    if isinstance(noise, Tensor):
        where["device"] = noise.device
    if times is None:
        if not is_count(steps):
            raise TimeError(
                f"got steps = {steps!r}; it counts evaluations, so write 1 or a larger integer"
            )
        return torch.linspace(1, 0, steps + 1, **where)
    try:
        grid = torch.as_tensor(times, **where)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TimeError(f"got times = {times!r}; write numbers, as in [1, 0.5, 0]") from error
    if grid.ndim != 1 or len(grid) < 2 or not _falls(grid):
        raise TimeError(
            f"got times = {grid.tolist()}; the grid falls strictly from 1 to 0, as in [1, 0.5, 0]"
        )
    return grid


def _falls(grid: Tensor) -> bool:
    has_ends = bool(grid[0] == 1) and bool(grid[-1] == 0)
    return has_ends and bool((grid.diff() < 0).all())
