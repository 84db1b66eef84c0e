"""Trajectory matching: consistency mid-training on a teacher's Euler trajectory (Hu et al., arXiv
2509.24526).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flowspace.arrays import Model, at_least_float32, over_rows
from flowspace.backends import backend_of, torch_backend
from flowspace.derivatives.replay import Draws, RowsMixError, agree, untouched
from flowspace.errors import InputError, TimeError
from flowspace.objectives.engine import (
    LossOutput,
    check_batch,
    check_model,
    check_sources,
    checked_cond,
    evaluated,
    refuse_unfit,
)
from flowspace.objectives.mean_flow import MeanFlowLoss
from flowspace.solvers import Euler

__all__ = ["TrajectoryMatchingLoss"]


@dataclass(frozen=True, kw_only=True)
class TrajectoryMatchingLoss(MeanFlowLoss):
    """f is regressed on what makes its step exact on a teacher's trajectory: (x_i - x_j)/(t_i -
    t_j) for the average velocity.

    The labels of the model are the times of the points themselves, on the shifted grid on which
    the teacher was solved.

    Args:
        teacher: a callable ``(z_t, t, **cond)``, such as a flow-matching network at s = t, or
            `Guidance.apply` of one.
        points: of the trajectory, from noise to data, both ends included; 16 in the reference.
        pairs: how many of the pairs t_i > t_j are drawn for a batch; None takes all.
        shift: k of the grid t' = k t / (1 + (k - 1) t), such as ``ShiftedTimes(dim).shift``; 1
            leaves it even.
    """

    teacher: Callable[..., Tensor]
    points: int = 16
    pairs: int | None = None
    shift: float = 1.0

    @classmethod
    def published(cls, **changes: Any) -> "TrajectoryMatchingLoss":
        """Return it with the reference's numbers: 16 points, 64 of their pairs, mean squares; give
        ``teacher`` and ``shift``.
        """
        settings: dict[str, Any] = {"pairs": 64}
        return cls(**(settings | changes))

    def check_statistic(self) -> None:
        """Refuse what is no teacher, too few points, more pairs than there are, a shift that is
        not positive, unused parts.
        """
        if self.gap is not None or self.guidance is not None or self.velocity is not None:
            raise InputError(
                "gap, guidance or velocity came; leave it out, and guide the teacher: "
                "Guidance.apply"
            )
        if not callable(self.teacher):
            raise InputError(
                f"teacher = {self.teacher!r} came; write a function (z_t, t, **cond) of the "
                "velocity"
            )
        if self.points < 2:
            raise InputError(f"points = {self.points} came; a trajectory has at least 2")
        most = self.points * (self.points - 1) // 2
        if self.pairs is not None and not 1 <= self.pairs <= most:
            raise InputError(
                f"pairs = {self.pairs} came; {self.points} points make {most} pairs, so write "
                "that many at most, or None for all"
            )
        if not self.shift > 0:
            raise InputError(
                f"shift = {self.shift} came; write more than 0, as ShiftedTimes(dim).shift"
            )

    def grid(self, like: Tensor) -> Tensor:
        """Return the times of the points, ``(points,)``, falling from 1 to 0."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        t = torch.linspace(1, 0, self.points, device=like.device, dtype=dtype)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def __call__(
        self, model: Model, latents: Tensor, targets: Tensor | None = None, **options: Any
    ) -> LossOutput:
        """Return the loss of each pair of each row: every field has B rows for the first pair,
        then B for the next, ...

        Args:
            model: any callable ``model(z_t, t, s, **cond)``.
            latents: of shape ``(B, *)``; only their shape, dtype and device count, since the
                teacher makes the path.
            targets: accepted and ignored.
            options: cond, noise and generator as for every objective; t and s are refused: the
                grid has them.
        """
        cond, noise, generator = (options.get(name) for name in ("cond", "noise", "generator"))
        check_batch(latents, latents)
        check_model(model)
        check_sources(latents, noise, generator)
        if backend_of(latents, noise) is not torch_backend:
            raise InputError(
                "JAX arrays came, but trajectory matching is written for tensors of torch; pass "
                "tensors"
            )
        if options.get("t") is not None or options.get("s") is not None:
            raise TimeError(
                "t or s came; trajectory matching takes its times from the teacher's grid: leave "
                "them out"
            )
        cond = checked_cond(cond)
        if noise is None:
            noise = torch.randn(
                latents.shape, generator=generator, device=latents.device, dtype=latents.dtype
            )
        times = self.grid(noise)
        try:
            path = Euler().path(lambda z, t: self.teacher(z, t, **cond), noise, times)
        except TypeError as error:
            refuse_unfit(model, cond, error)
            raise
        early, late = self._pairs(generator, noise.device)
        rows = len(noise)
        t, s = (times[index].repeat_interleave(rows) for index in (early, late))
        z_t, z_s = (path[index].flatten(0, 1) for index in (early, late))
        f = at_least_float32(self._predicted(model, z_t, t, s, cond, rows))
        wanted = self.coefficients.prediction_of(
            at_least_float32(z_t), at_least_float32(z_s), t, s
        )
        a, m = (
            over_rows(part(t, s), f)
            for part in (self.coefficients.prediction, self.coefficients.scale)
        )
        v = (at_least_float32(z_t) - at_least_float32(z_s)) / over_rows(t - s, z_t)
        return self._output(f, (m - a) * f.detach() - m * wanted, z_t, v, t, s)

    def _predicted(
        self, model: Model, z_t: Tensor, t: Tensor, s: Tensor, cond: dict[str, Any], rows: int
    ) -> Tensor:
        """Return what the model gives for all pairs: at once, or pair by pair where that is
        another value.

        It is where the model mixes rows, or where cond holds a tensor that all rows share and
        whose first axis is B; batch norm in train mode sees all pairs at once.
        """
        pairs = list(zip(z_t.split(rows), t.split(rows), s.split(rows), strict=True))
        draws = Draws(z_t.device, of_python=True)
        try:
            f = evaluated(model, z_t, t, s, _repeated(cond, rows, len(pairs)))
            if len(pairs) == 1 or draws.happened() or self._is_first(f, model, pairs[0], cond):
                return f
        except Exception as error:  # pair by pair the model raises it again, if it is its own
            if isinstance(error, TypeError):
                refuse_unfit(model, cond, error)
        return torch.cat([evaluated(model, *pair, cond) for pair in pairs])

    def _is_first(
        self, f: Tensor, model: Model, pair: tuple[Tensor, Tensor, Tensor], cond: dict[str, Any]
    ) -> bool:
        """Return whether the first pair's rows have the same value among all pairs and by
        themselves.
        """
        try:
            with torch.no_grad(), untouched(mixed=False) as run:
                alone = evaluated(model, *pair, cond)
        except RowsMixError as error:
            if error.finder is None:
                raise
            return True
        halved = run.halved is not None or f.dtype.itemsize < 4
        return agree(f[: len(alone)].detach(), alone, 2 if halved else f.dtype.itemsize)

    def _pairs(
        self, generator: torch.Generator | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the indices of the pairs' two points, the earlier on the path first."""
        early, late = torch.triu_indices(self.points, self.points, 1, device=device)
        if self.pairs is None:
            return early, late
        chosen = torch.randperm(len(early), generator=generator, device=device)[: self.pairs]
        return early[chosen], late[chosen]


def _repeated(cond: dict[str, Any], rows: int, count: int) -> dict[str, Any]:
    """Repeat what belongs to the rows, once a pair."""

    def one(leaf: Any) -> Any:
        per_row = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows
        return leaf.repeat(count, *[1] * (leaf.ndim - 1)) if per_row else leaf

    return pytree.tree_map(one, cond)
