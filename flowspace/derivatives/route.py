"""What every route to a derivative has in common: one value with gradient, one derivative without, on the rows asked for.

The value is ``fn(*primals)`` as it stands. The derivative is computed beside it, without gradient and outside autocast, from
the same draws of the random generator, so that dropout masks agree. It is computed only on the rows that need it, unless fn
drew random numbers: then the masks belong to the whole batch, and so does the evaluation.
"""

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flowspace.errors import InputError

__all__ = ["Derivative"]


class Derivative(abc.ABC):
    """A route to the directional derivative of a function of one batch."""

    def __call__(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Tensor | None],
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the value with gradient and the directional derivative without.

        Args:
            fn: a function of the primals that returns one tensor of shape ``(B, *)``.
            primals: its arguments; by convention the second, where there is one, is t. An argument may be any nesting of
                dicts and lists of tensors; a tensor in it whose first axis is B belongs to the rows.
            tangents: one for each primal, of its shape, or None where it is constant.
            rows: a mask of shape ``(B,)``: where the derivative is wanted; elsewhere it is zero. None: everywhere.

        Raises:
            InputError: if there are not as many tangents as primals, or fn returns no tensor.
        """
        if len(primals) != len(tangents):
            raise InputError(f"{len(primals)} primals and {len(tangents)} tangents came; write None for a constant")
        device = primals[0].device
        draws = _Draws(device)
        value = fn(*primals)
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != len(primals[0]):
            came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"the model returned {came}; wrap it so that it returns one tensor of shape (B, *)")
        if rows is not None and not bool(rows.any()):
            return value, torch.zeros_like(value)
        chosen = None if rows is None or bool(rows.all()) or draws.happened() else rows.nonzero().squeeze(1)
        with torch.no_grad(), _full_precision(device) as widened:
            start = _take((primals, tangents), chosen, len(value), widened)
            known = None if widened or value.dtype.itemsize < 4 else value.detach()
            known = known if known is None or chosen is None else known[chosen]
            found = self.derive(draws.replay(fn), start[0], start[1], known)
        return value, _scatter(found, chosen, rows, value)

    @abc.abstractmethod
    def derive(
        self, fn: Callable[..., Tensor], primals: Sequence[Any], tangents: Sequence[Tensor | None], value: Tensor | None
    ) -> Tensor:
        """Return the derivative on the given rows; ``value`` is fn(*primals), where it is known to full precision."""


class _Draws:
    """The state of the random generators before fn was called, to see whether it drew and to let it draw the same again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self._state()

    def _state(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def happened(self) -> bool:
        return any(not torch.equal(now, then) for now, then in zip(self._state(), self.before, strict=True))

    def replay(self, fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return fn with the draws of the first call, leaving the generators as they are now."""

        def again(*primals: Any) -> Tensor:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                torch.set_rng_state(self.before[0])
                if self.device.type == "cuda":
                    torch.cuda.set_rng_state(self.before[1], self.device)
                return fn(*primals)

        return again


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[bool]:
    """Leave autocast, where a derivative would lose its digits; yields whether it was on."""
    on = torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext():
        yield on


def _take(tree: Any, chosen: Tensor | None, batch: int, widen: bool) -> Any:
    """Select rows of every tensor that has them, detached, in float32 where autocast was on."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach()
        if widen and leaf.is_floating_point() and leaf.dtype.itemsize < 4:
            leaf = leaf.float()
        return leaf[chosen] if chosen is not None and leaf.ndim and leaf.shape[0] == batch else leaf

    return pytree.tree_map(one, tree)


def _scatter(found: Tensor, chosen: Tensor | None, rows: Tensor | None, value: Tensor) -> Tensor:
    if chosen is not None:
        everywhere = torch.zeros(value.shape, dtype=found.dtype, device=found.device)
        return everywhere.index_copy(0, chosen, found)
    if rows is None:
        return found
    return torch.where(rows.reshape(-1, *[1] * (found.ndim - 1)), found, 0.0)
