"""Shared primal: the value with gradient and D_t f without, in one forward pass of the unmodified
model.

Every torch function that the model calls is intercepted. It runs as it is, so the value, its
gradient, the kernels, the random numbers and the buffers are those of the plain program; beside
it, under no_grad and from detached primals, the tangents of its inputs become the tangent of its
output.

    SharedPrimal.evaluate            one pass; a second one over all rows where rows mix
      run                            makes a carrier and its first aliases, takes the tangent of
        what comes out Carrier (carrier)            a function mode: unpacks, runs the function and
        its rule, wraps
          kinds                      what is done about each torch function
          rules                      the tangent of each torch function, over a Dual: primal,
          tangent, where the rows lie Writes (writes)            functions that write in place;
          memory that tensors share higher_order               operators that take graphs:
          checkpoints, custom functions that were captured hidden_calls               what no
          function mode sees; the only place that patches torch
            Backend, Region (compiled)   parts under torch.compile: one graph of value and tangent
            each
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowspace.derivatives import hidden_calls
from flowspace.derivatives.replay import RandomState, restoring_buffers, uncompiled
from flowspace.derivatives.route import Derivative, scatter
from flowspace.derivatives.rules.dual import Layout, Rows
from flowspace.derivatives.shared_primal.carrier import FIELD, Carrier
from flowspace.errors import DerivativeError, InputError

__all__ = ["SharedPrimal"]


@dataclass(frozen=True)
class SharedPrimal(Derivative):
    """Exact, at the price of a forward pass on the rows that need it; any model of torch
    functions, attention kept fused.

    Under autocast the tangents are cast as the primals are; elsewhere they have the primals'
    precision. Rows that mix, as in batch norm in train mode, are found on the way: then the
    derivative is computed in a pass of its own, over all rows. What torch.compile compiled runs
    compiled, with its tangents.

    Raises:
        DerivativeError: where a function of the model has no forward derivative; it names the
            function and another route.
    """

    def evaluate(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Tensor | None],
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the value with gradient and the derivative without."""
        draws = RandomState(primals[0].device, of_python=True)
        few = None if rows is None else Rows.of(rows, len(primals[0]))
        versions = _versions(primals)
        value, tangent, before = run(fn, primals, tangents, few)
        if before is not None:
            if versions != _versions(primals):
                raise DerivativeError(
                    "the model writes into its input, so it cannot be run again; write z = "
                    "z.clone() first"
                )
            with _rewound(before):
                tangent = self.derive(draws.replay(fn), primals, tangents, None)
            few = None
        if tangent is None:
            return value, torch.zeros_like(value)
        return value, tangent if few is None else scatter(tangent, few.chosen, value)

    def derive(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Tensor | None],
        value: Tensor | None,
        mixed: bool = False,
    ) -> Tensor:
        """Return the derivative on every row, in a pass of its own that leaves no trace."""
        with torch.no_grad(), restoring_buffers():
            value, tangent, _ = run(fn, primals, tangents, None)
        return torch.zeros_like(value) if tangent is None else tangent


def _versions(primals: Sequence[Any]) -> list[int]:
    return [p._version for p in primals if isinstance(p, Tensor) and not p.is_inference()]


class Run(NamedTuple):
    """What a pass gives: the value; its tangent, if it moves; and, if the tangent was lost,
    buffers as they were before.
    """

    value: Tensor
    tangent: Tensor | None
    before: dict[int, tuple[Tensor, Tensor]] | None


def run(
    fn: Callable[..., Tensor],
    primals: Sequence[Any],
    tangents: Sequence[Tensor | None],
    rows: Rows | None,
) -> Run:
    """Run fn once, with the tangents beside it."""
    carrier = Carrier()
    layout = rows and Layout(0, 1, 1, rows)
    inputs = [
        p
        if v is None
        else carrier.wrap(p, (v if rows is None else v[rows.chosen]).detach(), layout)
        for p, v in zip(primals, tangents, strict=True)
    ]
    met = hidden_calls.dynamo_loaded()
    if met and not hidden_calls.follows_compiled():
        _warn_of_old_torch()
    try:
        with hidden_calls.following(carrier), _as_written(), carrier:
            out = fn(*inputs)
        if hidden_calls.dynamo_loaded() and not met:
            carrier.lost = (
                True  # the model loaded torch.compile on its way: what it compiled was not met
            )
        if not isinstance(out, Tensor):
            got = type(out).__name__
            raise InputError(
                f"the model returned {got}; wrap it so that it returns one tensor of shape (B, *)"
            )
        dual, plain = carrier.dual(out), getattr(out, FIELD, None)
    finally:
        carrier.release()
    lost = carrier.lost or (
        dual is not None and dual.layout is not None and dual.layout[:3] != (0, 1, 1)
    )
    value = out if plain is None else plain.primal
    return Run(
        value,
        None if lost or dual is None else dual.tangent,
        carrier.writes.before if lost else None,
    )


def _as_written() -> contextlib.AbstractContextManager[Any]:
    """Run what was compiled as it was written, where this torch does not let it be met."""
    return contextlib.nullcontext() if hidden_calls.follows_compiled() else uncompiled()


@functools.cache
def _warn_of_old_torch() -> None:
    warnings.warn(
        f"got torch {torch.__version__}; what is compiled of a model runs as it was written "
        "beside its tangents, "
        "right and slower; from torch 2.11 on it runs compiled",
        stacklevel=5,
    )


@contextlib.contextmanager
def _rewound(before: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Give buffers the values from before the first pass, for a second one, and then those from
    after it again.
    """
    after = [(tensor, tensor.detach().clone(), then) for tensor, then in before.values()]
    try:
        for tensor, _, then in after:
            tensor.detach().copy_(then)
        yield
    finally:
        for tensor, now, _ in after:
            tensor.detach().copy_(now)
