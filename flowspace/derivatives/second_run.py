"""Routes that evaluate the model again: what that second run needs to be the first one.

Both runs are given copies of the primals, since a model may write into them. The second is made
without gradient and outside autocast, with the same draws, so that dropout masks agree, and leaves
the model's buffers as the first run left them. It is made on the rows alone that need a derivative
where that changes nothing. If fn drew random numbers, these belong to the whole batch; if it mixes
rows, or is given a tensor that all rows share and whose first axis is B, its value on some rows is
another one, which the route finds by comparing it with the first run's. Then all rows are
evaluated, as they are where other processes wait for this one. If the second run on all rows
differs too, it is not the first one, and the route refuses.
"""

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flowspace.derivatives.replay import (
    RandomState,
    RestoringMode,
    RowsMixError,
    agree,
    in_transform,
    on_copies,
    restoring_buffers,
    several_processes,
    uncompiled,
)
from flowspace.derivatives.route import Derivative, checked, scatter
from flowspace.errors import DerivativeError, FlowspaceError

__all__ = ["First", "Second", "SecondRun"]

REFUSAL_SLACK = 10.0
"""A second run on all rows is refused where it differs by more than this times what sends one on
some rows to all rows.
"""


class First(NamedTuple):
    """What the first run gave on the rows of the second.

    Attributes:
        value: fn(*primals), detached.
        exact: whether it is known to full precision.
    """

    value: Tensor
    exact: bool


class Second(NamedTuple):
    """What the second run gave: the derivative, and the value at the same point, or None where it
    was not evaluated there.
    """

    derivative: Tensor
    value: Tensor | None


class SecondRun(Derivative):
    """A route that evaluates the model a second time, or more often."""

    def evaluate(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Tensor | None],
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the value with gradient and the derivative; ``rows`` are the indices where it is
        wanted, None all.

        Raises:
            DerivativeError: if the second run is not the first one, or the route cannot
                differentiate fn.
        """
        fn, device = on_copies(fn), primals[0].device
        draws = RandomState(device, of_python=True)
        value = checked(fn(*primals), primals)
        if rows is not None and (draws.changed() or several_processes() or in_transform(value)):
            rows = None
        with torch.no_grad(), _full_precision(device) as widened, uncompiled():
            first = First(value.detach(), not widened and value.dtype.itemsize >= 4)
            attempt = _Attempt(self, draws.replay(fn), primals, tangents, first, widened)
            found = None if rows is None else attempt.on_rows(rows)
            if found is not None:
                return value, scatter(found, rows, value)  # type: ignore[arg-type]
            return value, attempt.on_all(mixed=rows is not None)

    @abc.abstractmethod
    def derive(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Tensor | None],
        first: First,
        mixed: bool,
    ) -> Second:
        """Return the derivative on the given rows, and the value there where it was evaluated
        again.

        ``first`` is what the first run gave there; ``mixed`` says that fn may mix the rows.
        """

    def check_run(self, run: RestoringMode) -> None:
        """Raise DerivativeError for a run in which the model did what the route cannot bear."""


class _Attempt:
    """The second run of one function at one point."""

    def __init__(
        self,
        route: SecondRun,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Any],
        first: First,
        widened: bool,
    ) -> None:
        self.route, self.fn, self.first, self.widened = route, fn, first, widened
        self.primals, self.tangents = primals, tangents

    def on_rows(self, rows: Tensor) -> Tensor | None:
        """Return the derivative on these rows, or None if the model needs all of them."""
        first = self.first._replace(value=self.first.value[rows])
        try:
            second, itemsize = self._run(first, rows, mixed=False)
        except FlowspaceError:
            raise
        # Whatever a model raises that needs all rows: what is its own is raised again on all rows.
        except Exception:
            return None
        if second.derivative.shape != first.value.shape:
            return None
        same = second.value is None or agree(first.value, second.value, itemsize)
        return second.derivative if same else None

    def on_all(self, mixed: bool) -> Tensor:
        """Return the derivative on every row."""
        try:
            second, itemsize = self._run(self.first, None, mixed)
        except RowsMixError as error:
            if mixed or error.finder is None:
                raise
            second, itemsize = self._run(self.first, None, mixed=True)
        if second.value is None or agree(self.first.value, second.value, itemsize, REFUSAL_SLACK):
            return second.derivative
        raise DerivativeError(
            "got another value from the model when it was evaluated again at the same point, "
            f"which {self.route!r} needs to do; "
            "it draws from a generator of its own, or remembers its calls: draw from torch's "
            "generator, or write "
            "derivative=SharedPrimal(), which evaluates the model once"
        )

    def _run(self, first: First, rows: Tensor | None, mixed: bool) -> tuple[Second, int]:
        """Return what a second run gives, and the bytes of the least precise numbers in either
        run.
        """
        inputs, directions = take(
            (self.primals, self.tangents), rows, len(self.first.value), self.widened
        )
        with restoring_buffers(mixed) as run:
            second = self.route.derive(self.fn, inputs, directions, first, mixed)
        self.route.check_run(run)
        halved = run.halved is not None or not first.exact
        return second, 2 if halved else first.value.dtype.itemsize


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
        return (
            leaf[chosen] if chosen is not None and leaf.ndim and leaf.shape[0] == batch else leaf
        )

    return pytree.tree_map(one, tree)
