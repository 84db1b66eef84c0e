"""What every route to a derivative has in common: one value with gradient, one derivative without, on the rows asked for.

The value is ``fn(*primals)`` as it stands. A route that evaluates fn again does so without gradient and outside autocast, with
the same draws of the random generator, so that dropout masks agree, and leaves the model's buffers as the first evaluation left
them. The derivative is computed only on the rows that need it, unless fn drew random numbers or mixes rows (batch norm in train
mode): then those belong to the whole batch, and so does the evaluation.

On JAX arrays nothing depends on values: every row is differentiated, and the exact routes are one: jax.jvp, in one pass.
"""

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flowspace.backends import backend_of, one_backend, torch_backend
from flowspace.derivatives import hidden_calls
from flowspace.derivatives.replay import Draws, RowsMixError, uncompiled, untouched, wrapped
from flowspace.errors import InputError
from flowspace.schedules import over_rows

__all__ = ["Derivative", "scatter", "take"]


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
            rows: a mask of shape ``(B,)``: where the derivative is wanted; elsewhere it is zero. None: everywhere. Under
                torch.func.vmap, where a mask has no values yet, and on JAX arrays all are computed.

        Raises:
            InputError: if there are not as many tangents as primals, or fn returns no tensor.
            DerivativeError: if the route cannot differentiate fn.
        """
        if len(primals) != len(tangents):
            raise InputError(f"{len(primals)} primals and {len(tangents)} tangents came; write None for a constant")
        for p, v in zip(primals, tangents, strict=True):
            if v is not None and v.shape != p.shape:
                raise InputError(f"a tangent of shape {tuple(v.shape)} came for a primal of shape {tuple(p.shape)}")
        if (xp := one_backend(*primals, *tangents)) is not torch_backend:
            value, derivative = self.evaluate_pure(fn, primals, tangents)
            _checked(value, primals)
            return value, derivative if rows is None else xp.where(over_rows(rows, derivative), derivative, 0.0)
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._captured_rows)(fn, primals, tangents, rows)  # pyright: ignore
        return self._evaluate_rows(fn, primals, tangents, rows)

    def _captured_rows(self, fn: Callable[..., Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
        """Evaluate within a step that torch.compile captures: it captures the model, as a graph of its own."""
        return self._evaluate_rows(hidden_calls.captured_as_outside(fn), *rest)

    def _evaluate_rows(
        self, fn: Callable[..., Tensor], primals: Sequence[Any], tangents: Sequence[Tensor | None], rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Choose the rows; not traced by torch.compile, since it depends on values."""
        unknown = rows is not None and wrapped(rows)
        if rows is not None and not unknown and not bool(rows.any()):
            value = _checked(fn(*primals), primals)
            return value, torch.zeros_like(value)
        chosen = None if rows is None or unknown or bool(rows.all()) else rows.nonzero().squeeze(1)
        value, derivative = self.evaluate(fn, primals, tangents, chosen)
        _checked(value, primals)
        if rows is not None:
            derivative = torch.where(rows.reshape(-1, *[1] * (derivative.ndim - 1)), derivative, 0.0)
        return value, derivative

    def evaluate(
        self, fn: Callable[..., Tensor], primals: Sequence[Any], tangents: Sequence[Tensor | None], rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the value with gradient and the derivative; ``rows`` are the indices where it is wanted, None all."""
        device = primals[0].device
        draws = Draws(device)
        value = _checked(fn(*primals), primals)
        if draws.happened():
            rows = None
        with torch.no_grad(), _full_precision(device) as widened, uncompiled():
            known = None if widened or value.dtype.itemsize < 4 else value.detach()

            def on(some: Tensor | None, mixed: bool) -> Tensor:
                inputs, directions = take((primals, tangents), some, len(value), widened)
                here = known if known is None or some is None else known[some]
                with untouched(mixed):
                    return self.derive(draws.replay(fn), inputs, directions, here, mixed)

            try:
                found = on(rows, False)
            except RowsMixError:
                rows, found = None, on(None, True)
        return value, found if rows is None else scatter(found, rows, value)

    def evaluate_pure(
        self, fn: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any | None]
    ) -> tuple[Any, Any]:
        """Return the value with gradient and the derivative of a function on JAX arrays, which has no side effects."""
        return backend_of(*primals).value_and_derivative(fn, primals, tangents)

    @abc.abstractmethod
    def derive(
        self, fn: Callable[..., Tensor], primals: Sequence[Any], tangents: Sequence[Tensor | None], value: Tensor | None,
        mixed: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return the derivative on the given rows.

        ``value`` is fn(*primals), where it is known to full precision; ``mixed`` says that fn mixes the rows.
        """


def _checked(value: Any, primals: Sequence[Any]) -> Tensor:
    is_array = backend_of(*primals).is_array(value)
    if not is_array or value.ndim < 1 or len(value) != len(primals[0]):
        came = f"shape {tuple(value.shape)}" if is_array else type(value).__name__
        raise InputError(f"the model returned {came}; wrap it so that it returns one tensor of shape (B, *)")
    return value


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[bool]:
    """Leave autocast, where a derivative would lose its digits; yields whether it was on."""
    on = torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext():
        yield on


def take(tree: Any, chosen: Tensor | None, batch: int, widen: bool) -> Any:
    """Select rows of every tensor that has them, detached, in float32 where autocast was on."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach()
        if widen and leaf.is_floating_point() and leaf.dtype.itemsize < 4:
            leaf = leaf.float()
        return leaf[chosen] if chosen is not None and leaf.ndim and leaf.shape[0] == batch else leaf

    return pytree.tree_map(one, tree)


def scatter(found: Tensor, rows: Tensor, value: Tensor) -> Tensor:
    """Return a derivative on the rows with these indices as one of the whole batch, zero elsewhere."""
    everywhere = torch.zeros(value.shape, dtype=found.dtype, device=found.device)
    return everywhere.index_copy(0, rows, found)
