"""What every route to a derivative has in common: one value with gradient, one derivative without,
on the rows asked for.

The value is ``fn(*primals)`` as it stands. The derivative is computed only on the rows that need
it; where processes wait for each other, each evaluates fn as often as the others, also without
such a row. Routes that evaluate fn again are in `flowspace.derivatives.second_run`.

On JAX arrays nothing depends on values: every row is differentiated, and the exact routes are one:
jax.jvp, in one pass.
"""

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowspace.arrays import over_rows
from flowspace.backends import backend_of, one_backend, torch_backend
from flowspace.derivatives import hidden_calls
from flowspace.derivatives.replay import in_transform, several_processes
from flowspace.derivatives.rules.dual import writable
from flowspace.errors import DerivativeError, InputError
from flowspace.inputs import check_device, is_function, kind_of

__all__ = ["Derivative", "checked", "scatter"]


class Derivative(abc.ABC):
    """A route to the directional derivative of a function of one batch."""

    def __call__(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Tensor | None],
        rows: Tensor | None = None,
        at_most: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the value with gradient and the directional derivative without.

        Args:
            fn: a function of the primals that returns one tensor of shape ``(B, *)``.
            primals: its arguments; by convention the second, where there is one, is t. An argument
                may be any nesting of dicts and lists of tensors; a tensor in it whose first axis
                is B belongs to the rows.
            tangents: one for each primal, of its shape, or None where it is constant.
            rows: a mask of shape ``(B,)``: where the derivative is wanted; elsewhere it is zero.
                None: everywhere. Under torch.func.vmap, where a mask has no values yet, and on JAX
                arrays all are computed.
            at_most: a number of rows that the mask does not exceed, where it is known without
                asking the device for it: to count the rows of a mask, a GPU is waited for. Where
                the mask has more all the same, the derivative of some of its rows is NaN.

        Raises:
            InputError: if there are not as many tangents as primals, one is no tensor of its
                primal's shape, or fn is no function or returns no tensor.
            DerivativeError: if the route cannot differentiate fn.
        """
        if len(primals) != len(tangents):
            raise InputError(
                f"got {len(primals)} primals and {len(tangents)} tangents; write None for a "
                "constant"
            )
        if not is_function(fn):
            raise InputError(
                f"got {kind_of(fn)} for a function; write the model, or a function of the primals"
            )
        for primal, tangent in zip(primals, tangents, strict=True):
            if tangent is not None:
                _check_tangent(primal, tangent)
        if rows is not None and tuple(rows.shape) != tuple(primals[0].shape[:1]):
            raise InputError(
                f"got rows of shape {tuple(rows.shape)} for {len(primals[0])} rows; "
                "write a mask of one truth value a row"
            )
        xp = one_backend(*primals, *tangents)
        if xp is not torch_backend:
            value, derivative = self.evaluate_pure(fn, primals, tangents)
            checked(value, primals)
            if rows is not None:
                derivative = xp.where(over_rows(rows, derivative), derivative, 0.0)
            return value, derivative
        if torch.compiler.is_compiling():
            evaluate = torch.compiler.disable(self._captured_rows)  # pyright: ignore
            return evaluate(fn, primals, tangents, rows, at_most)  # pyright: ignore
        return self._evaluate_rows(fn, primals, tangents, rows, at_most)

    def _captured_rows(self, fn: Callable[..., Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
        """Evaluate within a step that torch.compile captures: it captures the model, as a graph of
        its own.

        Raises:
            DerivativeError: if the step is a part of a model whose tangents are carried.
        """
        if hidden_calls.active_carrier() is not None:
            raise DerivativeError(
                f"got {type(self).__name__}() evaluated by a compiled part of a model that is "
                "differentiated itself, where its value would count as constant; call that part "
                "uncompiled, with torch.compiler.disable"
            )
        return self._evaluate_rows(hidden_calls.capture_as_outside(fn), *rest)

    def _evaluate_rows(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Tensor | None],
        mask: Tensor | None,
        at_most: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Choose the rows; not traced by torch.compile, since it depends on values."""
        indices = None
        if mask is not None and not in_transform(mask):
            indices = _indices(mask, at_most)
        if indices is not None and not len(indices):
            value = checked(fn(*primals), primals)
            return value, torch.zeros_like(value)
        found = self.evaluate(fn, primals, tangents, indices)
        value, derivative = self._checked_pair(found, primals)
        if mask is None:
            return value, derivative
        elsewhere: Any = 0.0
        if indices is not None and at_most is not None:
            missed = mask.index_fill(0, indices, False)
            numbers = derivative.new_zeros(len(mask)).masked_fill_(missed, math.nan)
            mask, elsewhere = mask & ~missed, over_rows(numbers, derivative)
        return value, torch.where(over_rows(mask, derivative), derivative, elsewhere)

    def _checked_pair(self, found: Any, primals: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return what `evaluate` returned.

        Raises:
            InputError: if the model returned no tensor of rows, or a route of the user's own
                anything but a value and a derivative of its shape.
        """
        came = kind_of(found)
        if isinstance(found, tuple | list) and len(found) == 2:
            value, derivative = checked(found[0], primals), found[1]
            if isinstance(derivative, Tensor) and derivative.shape == value.shape:
                return value, derivative
            came = f"a derivative of {kind_of(derivative)} beside a value of {kind_of(value)}"
        raise InputError(
            f"got {came} from {type(self).__name__}.evaluate; "
            "return the value and the derivative, two tensors of one shape"
        )

    @abc.abstractmethod
    def evaluate(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Tensor | None],
        indices: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the value with gradient and the derivative on the rows of these indices, or on
        all for None.
        """

    def evaluate_pure(
        self, fn: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any | None]
    ) -> tuple[Any, Any]:
        """Return the value with gradient and the derivative of a function on JAX arrays, which has
        no side effects.
        """
        return backend_of(*primals).value_and_derivative(fn, primals, tangents)


def _check_tangent(primal: Any, tangent: Any) -> None:
    """Raise InputError unless a tangent is a tensor of its primal's shape."""
    if not (hasattr(primal, "shape") and hasattr(tangent, "shape")):
        raise InputError(
            f"got a tangent of {kind_of(tangent)} for a primal of {kind_of(primal)}; "
            "write two tensors of one shape, or None for the tangent of a constant"
        )
    if tangent.shape != primal.shape:
        raise InputError(
            f"got a tangent of shape {tuple(tangent.shape)} for a primal of shape "
            f"{tuple(primal.shape)}; write one of the same shape, or None"
        )


def _indices(mask: Tensor, at_most: int | None) -> Tensor | None:
    """Return the indices of the rows of a mask, None for all; among several processes always
    indices.

    A model whose rows mix is evaluated once more where only some of them are asked for, and other
    processes wait for that. So it must be found out that they mix where all rows are asked for
    too: the first is asked for twice then, since the axis that holds the batch in a tensor is
    found by a number of rows that differs from the batch's.

    Args:
        mask: which rows, of shape ``(B,)``.
        at_most: a number that they do not exceed, or None. So many indices are returned then, and
            the device is not waited for: those of the mask come first.
    """
    if at_most is None:
        indices = mask.nonzero().squeeze(1)
    else:
        indices = mask.argsort(descending=True, stable=True)[:at_most]
    all_rows = len(indices) == len(mask)
    if several_processes():
        if not len(indices):
            count = 2 if len(mask) == 1 else 1
            return torch.zeros(count, dtype=torch.long, device=mask.device)
        if all_rows:
            return torch.cat([indices, indices[:1]])
        return indices
    if all_rows:
        return None
    return indices


def checked(value: Any, primals: Sequence[Any]) -> Tensor:
    """Return what a model returned, or raise InputError unless it is one array of shape ``(B,
    *)``.
    """
    is_array = backend_of(*primals).is_array(value)
    if is_array and value.ndim >= 1 and len(value) == len(primals[0]):
        check_device("the output of the model", value, primals[0])
        return value
    came = type(value).__name__
    if is_array:
        came = f"shape {tuple(value.shape)}"
    raise InputError(
        f"got {came} from the model; wrap it so that it returns one tensor of shape (B, *)"
    )


def scatter(derivative: Tensor, indices: Tensor, value: Tensor) -> Tensor:
    """Return a derivative on the rows with these indices as one of the whole batch, zero
    elsewhere.
    """
    everywhere = torch.zeros(value.shape, dtype=derivative.dtype, device=derivative.device)
    if writable(everywhere, derivative):
        return everywhere.index_copy_(0, indices, derivative)
    return everywhere.index_copy(0, indices, derivative)
