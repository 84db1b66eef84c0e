"""Trajectory matching (Hu et al., arXiv 2509.24526).

Consistency mid-training on a teacher's Euler trajectory.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flowspace.arrays import (
    Cond,
    Model,
    at_least_float32,
    draw_noise,
    is_count,
    is_number,
    over_rows,
)
from flowspace.backends import one_backend, torch_backend
from flowspace.derivatives.replay import RandomState, RowsMixError, agree, restoring_buffers
from flowspace.errors import InputError, TimeError
from flowspace.inputs import (
    check_model,
    checked_cond,
    is_function,
    refuse_unfit,
    require,
    velocity_of,
)
from flowspace.objectives.engine import LossOutput, PathPoint
from flowspace.objectives.inputs import Batch, checked_batch, evaluated, with_fields
from flowspace.objectives.mean_flow import MeanFlowLoss
from flowspace.solvers import Euler
from flowspace.times import ShiftedTimes

__all__ = ["TrajectoryMatchingLoss"]

SINGLE, HALF = 4, 2
"""Bytes of a number in float32, and in float16 or bfloat16."""


@dataclass(frozen=True, kw_only=True)
class TrajectoryMatchingLoss(MeanFlowLoss):
    """f is regressed on what makes its step exact on a teacher's trajectory.

    For the average velocity that is (x_i - x_j)/(t_i - t_j).

    The labels of the model are the times of the points themselves, on the shifted grid on which
    the teacher was solved.

    Args:
        teacher: a callable ``(z_t, t, **cond)``, such as a flow-matching network at s = t, or
            `Guidance.apply` of one.
        steps: of Euler from noise to data, an evaluation of the teacher each; a trajectory has one
            point more.
        pairs: how many of the pairs t_i > t_j are drawn for a batch; None takes all.
        trajectories: how many rows of the batch, the first ones, begin a trajectory; None takes
            all. The other rows, with their noise and conditions, are left out.
        shift: k of the grid t' = k t / (1 + (k - 1) t), such as ``ShiftedTimes(dim).shift``; 1
            leaves it even.
    """

    teacher: Callable[..., Tensor]
    steps: int = 16
    pairs: int | None = None
    trajectories: int | None = None
    shift: float = 1.0

    @classmethod
    # dim, which others do not take: the grid needs it
    def published(cls, dim: int, **changes: Any) -> "TrajectoryMatchingLoss":  # pyright: ignore
        """Return it as MeanFlow on representation autoencoders takes it (section 3.2, 5).

        16 steps of Euler, two trajectories an iteration, squared error; the grid is shifted by
        sqrt(dim / 4096), as the teacher's times. Its code differs: 15 steps between 16 points,
        and labels on an even grid. That 64 of the 136 pairs are drawn is the code's, which draws
        them of 120; the text is silent. Give ``teacher``.

        Args:
            dim: the number of elements of a latent, such as 768 * 16 * 16.
            changes: any field of the objective.
        """
        settings: dict[str, Any] = {
            "pairs": 64,
            "trajectories": 2,
            "shift": ShiftedTimes(dim).shift,
        }
        return cls(**(settings | changes))

    def check_settings(self) -> None:
        """Refuse what is no teacher, numbers out of their range, and parts that have no use."""
        without_use = (self.gap, self.guidance, self.velocity)
        if any(each is not None for each in without_use):
            raise InputError(
                "got gap, guidance or velocity; "
                "leave it out, and guide the teacher: Guidance.apply"
            )
        require(
            is_function(self.teacher),
            "teacher",
            self.teacher,
            "write a function (z_t, t, **cond) of the velocity",
        )
        require(
            is_count(self.steps),
            "steps",
            self.steps,
            "a trajectory has a whole number of steps, at least 1",
        )
        most = self.steps * (self.steps + 1) // 2
        require(
            self.pairs is None or (is_count(self.pairs) and self.pairs <= most),
            "pairs",
            self.pairs,
            f"{self.steps} steps make {most} pairs, so write that many at most, or None for all",
        )
        require(
            self.trajectories is None or is_count(self.trajectories),
            "trajectories",
            self.trajectories,
            "write how many rows of a batch begin a trajectory, at least 1, or None for all",
        )
        require(
            is_number(self.shift) and 0 < self.shift < math.inf,
            "shift",
            self.shift,
            "write more than 0, as ShiftedTimes(dim).shift",
        )

    def grid(self, like: Tensor) -> Tensor:
        """Return the times of the points, ``(steps + 1,)``, falling from 1 to 0."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        points = self.steps + 1
        t = torch.linspace(1, 0, points, device=like.device, dtype=dtype)
        shifted = self.shift * t
        return shifted / (shifted + (1 - t))  # exactly 1 at t = 1

    def __call__(  # noqa: PLR0913  # the public door: each argument has its name
        self,
        model: Model,
        latents: Tensor,
        targets: Tensor | None = None,
        *,
        cond: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
        t: Tensor | None = None,
        s: Tensor | None = None,
        generator: Any = None,
    ) -> LossOutput:
        """Return the loss of each pair of each trajectory.

        Every field has one row for each trajectory for the first pair, then as many for the next,
        and so on.

        Args:
            model: any callable ``model(z_t, t, s, **cond)``.
            latents: of shape ``(B, *)``; only their shape, dtype and device count, since the
                teacher makes the path.
            targets: accepted and ignored.
            cond: keyword arguments of model and teacher.
            noise: where the trajectories begin, of the latents' shape; by default drawn.
            t: refused: the teacher's grid has the times.
            s: refused likewise.
            generator: the source of noise and pairs, a torch.Generator.

        Raises:
            InputError: if shapes do not fit, the batch has fewer rows than trajectories are asked
                for, or JAX arrays came.
            TimeError: if t or s came.
        """
        xp = one_backend(latents, noise, generator)
        given = checked_cond(cond)
        batch = Batch(latents, None, given, noise, generator, xp)
        check_model(model)
        checked_batch(batch)
        if xp is not torch_backend:
            raise InputError(
                "got JAX arrays, but trajectory matching "
                "is written for tensors of torch; pass tensors"
            )
        if t is not None or s is not None:
            raise TimeError(
                "got t or s; trajectory matching takes its times "
                "from the teacher's grid: leave them out"
            )
        batch = self._begun(batch)
        noise = batch.noise
        if noise is None:
            noise = draw_noise(batch.latents, generator)
        at, z_s = self._on_trajectory(model, batch, noise)
        f = self._predicted(model, at, len(batch.latents))
        f = at_least_float32(f)
        target = self.coefficients.prediction_of(at.z, z_s, at.t, at.s)
        weights = self.coefficients.at(at.t, at.s)
        a, _, m = weights.over_rows(f)
        rest = (m - a) * f.detach() - m * target
        return self._output(f, rest, at, weights)

    def _begun(self, batch: Batch) -> Batch:
        """Return the rows of a batch that begin a trajectory."""
        count, rows = self.trajectories, len(batch.latents)
        if count is None or count == rows:
            return batch
        if count > rows:
            raise InputError(
                f"got a batch of {rows} rows for trajectories = {count}; "
                "pass at least as many rows, or write trajectories=None to begin one at each"
            )

        def first(leaf: Any) -> Any:
            if _is_per_row(leaf, rows):
                return leaf[:count]
            return leaf

        latents = batch.latents[:count]
        cond = pytree.tree_map(first, batch.cond)
        noise = batch.noise
        if noise is not None:
            noise = noise[:count]
        return with_fields(batch, latents=latents, noise=noise, cond=cond)

    def _on_trajectory(
        self, model: Model, batch: Batch, noise: Tensor
    ) -> tuple[PathPoint, Tensor]:
        """Return the earlier points of all pairs on the trajectory, and the later states.

        Each has B rows for the first pair, then B for the next; the velocity is the average one.
        """
        cond, times = batch.cond, self.grid(noise)

        def taught(z: Tensor, t: Tensor) -> Tensor:
            return velocity_of("teacher", self.teacher, z, t, cond)

        path = Euler().path(taught, noise, times)
        early, late = self._pairs_of_points(batch.generator, times.device)
        rows = len(batch.latents)
        t = times[early].repeat_interleave(rows)
        s = times[late].repeat_interleave(rows)
        z_t = path[early].flatten(0, 1)
        z_s = at_least_float32(path[late].flatten(0, 1))
        moved = at_least_float32(z_t) - z_s
        velocity = moved / over_rows(t - s, z_t)
        at = PathPoint(z_t, t, s, velocity, batch.latents, cond)
        return at, z_s

    def _predicted(self, model: Model, at: PathPoint, rows: int) -> Tensor:
        """Return what the model gives for all pairs.

        They are evaluated at once, or pair by pair where that is another value.

        It is where the model mixes rows, or where cond holds a tensor that all rows share and
        whose first axis is B; batch norm in train mode sees all pairs at once.
        """
        cond = at.cond
        states = at.state.split(rows)
        t, s = at.t.split(rows), at.s.split(rows)
        pairs = list(zip(states, t, s, strict=True))
        draws = RandomState(at.state.device, of_python=True)
        try:
            repeated = _repeated(cond, rows, len(pairs))
            f = evaluated(model, at.state, at.t, at.s, repeated)
            if len(pairs) == 1 or draws.changed():
                return f
            if self._is_first(f, model, pairs[0], cond):
                return f
        except Exception as error:  # pair by pair the model raises it again, if it is its own
            if isinstance(error, TypeError):
                refuse_unfit(model, cond, error)
        return torch.cat([evaluated(model, *pair, cond) for pair in pairs])

    def _is_first(
        self, f: Tensor, model: Model, pair: tuple[Tensor, Tensor, Tensor], cond: Cond
    ) -> bool:
        """Return whether the first pair has the same value among all pairs and by itself."""
        try:
            with torch.no_grad(), restoring_buffers(model, mixed=False) as run:
                alone = evaluated(model, *pair, cond)
        except RowsMixError as error:
            if error.finder is None:
                raise
            return True
        itemsize = f.dtype.itemsize
        if run.halved is not None or itemsize < SINGLE:
            itemsize = HALF
        among_all = f[: len(alone)].detach()
        return agree(among_all, alone, itemsize)

    def _pairs_of_points(
        self, generator: torch.Generator | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the indices of the pairs' two points, the earlier on the path first."""
        points = self.steps + 1
        early, late = torch.triu_indices(points, points, 1, device=device)
        if self.pairs is None:
            return early, late
        order = torch.randperm(len(early), generator=generator, device=device)
        chosen = order[: self.pairs]
        return early[chosen], late[chosen]


def _is_per_row(leaf: Any, rows: int) -> bool:
    """Return whether a value in cond is a tensor that belongs to the rows."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == rows


def _repeated(cond: Cond, rows: int, count: int) -> Cond:
    """Repeat what belongs to the rows, once a pair."""

    def repeated(leaf: Any) -> Any:
        if not _is_per_row(leaf, rows):
            return leaf
        other_axes = [1] * (leaf.ndim - 1)
        return leaf.repeat(count, *other_axes)

    return pytree.tree_map(repeated, cond)
