"""Routes that evaluate the model again, and what makes that second run the same as the first.

Both runs are given copies of the primals, since a model may write into them. The second is made
without gradient and outside autocast, with the same draws, so that dropout masks agree, and leaves
the model's buffers as the first run left them.

It is made on the rows alone that need a derivative, where that changes nothing. It changes
something

* if fn drew random numbers, which belong to the whole batch, or if other processes wait for this
  one: then all rows are evaluated at once;
* if fn mixes rows, or is given a tensor that all rows share and whose first axis is B: its value
  on some rows is then another one than the first run's, or it raises, and all rows are evaluated.

If the second run on all rows gives another value too, the model does not repeat itself, and the
route refuses.
"""

import abc
import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flowspace.derivatives.reached import OnCopies
from flowspace.derivatives.replay import (
    REFUSAL_SLACK,
    RandomState,
    RestoringMode,
    RowsMixError,
    agree,
    in_transform,
    restoring_buffers,
    several_processes,
    uncompiled,
)
from flowspace.derivatives.route import Derivative, checked, scatter
from flowspace.errors import DerivativeError, FlowspaceError

__all__ = ["First", "Second", "SecondRun"]


class First(NamedTuple):
    """What the first run gave on the rows of the second.

    Attributes:
        value: fn(*primals), detached.
        exact: whether it is known to full precision.
        whole: whether these are all rows, and not some of them.
        kept: tells, after two evaluations of the second run, whether the model keeps something of
            each, as a moving average: then these are of another function than the first run.
    """

    value: Tensor
    exact: bool
    whole: bool = True
    kept: Callable[[], bool] = lambda: False


class Second(NamedTuple):
    """What the second run gave.

    Attributes:
        derivative: along the tangents.
        value: fn at the same point, or None where it was not evaluated there.
        check: raises DerivativeError if the derivative is not to be trusted, or None.
        doubt: what is warned of if the derivative is taken, or None.
    """

    derivative: Tensor
    value: Tensor | None
    check: Callable[[], None] | None = None
    doubt: str | None = None

    def taken(self) -> Tensor:
        """Return the derivative, with a warning if it is in doubt."""
        if self.doubt is not None:
            warnings.warn(self.doubt, stacklevel=2)
        return self.derivative


class SecondRun(Derivative):
    """A route that evaluates the model a second time, or more often."""

    def evaluate(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Tensor | None],
        indices: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the value with gradient and the derivative.

        Args:
            fn: a function of the primals.
            primals: its arguments.
            tangents: one for each primal, or None where it is constant.
            indices: of the rows where the derivative is wanted; None: of all.

        Raises:
            DerivativeError: if the second run is not the first one, or the route cannot
                differentiate fn.
        """
        fn, device = OnCopies(fn), primals[0].device
        state = RandomState(device, of_python=True)
        value = checked(fn(*primals), primals)
        if indices is not None and (state.changed() or several_processes() or in_transform(value)):
            indices = None
        with torch.no_grad(), _outside_autocast(device) as autocast, uncompiled():
            first = First(value.detach(), not autocast and value.dtype.itemsize >= 4)
            attempt = _Attempt(self, state.replay(fn), primals, tangents, first, autocast)
            if indices is None:
                return value, attempt.on_all(mixed=False)
            derivative = attempt.on_rows(indices)
            if derivative is not None:
                return value, scatter(derivative, indices, value)
            return value, attempt.on_all(mixed=True)

    @abc.abstractmethod
    def derive(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Tensor | None],
        first: First,
        mixed: bool,
    ) -> Second:
        """Return the derivative on the given rows, and the value there if it was evaluated.

        Args:
            fn: a function of the primals, with the draws of the first run.
            primals: its arguments, on the given rows.
            tangents: one for each primal, or None where it is constant.
            first: what the first run gave on these rows.
            mixed: fn may mix the rows.
        """

    def check_run(self, run: RestoringMode) -> None:
        """Raise DerivativeError for a run in which the model did what the route cannot follow."""


@dataclass(frozen=True)
class _Attempt:
    """The second run of one function at one point.

    Attributes:
        route: what differentiates.
        fn: the function, with the draws of the first run.
        primals: its arguments, on all rows.
        tangents: one for each primal, or None.
        first: what the first run gave on all rows.
        autocast: it was on in the first run.
    """

    route: SecondRun
    fn: Callable[..., Tensor]
    primals: Sequence[Any]
    tangents: Sequence[Any]
    first: First
    autocast: bool

    def on_rows(self, indices: Tensor) -> Tensor | None:
        """Return the derivative on these rows, or None if the model needs all of them."""
        first = self.first._replace(value=self.first.value[indices], whole=False)
        try:
            second, itemsize = self._run(first, indices, mixed=False)
        except FlowspaceError:
            raise
        # Whatever a model raises that needs all rows: what is its own is raised again on all rows.
        except Exception:
            return None
        if second.derivative.shape != first.value.shape:
            return None
        if second.value is None or _agree_in_each_place(first.value, second.value, itemsize):
            return second.taken()
        return None

    def on_all(self, mixed: bool) -> Tensor:
        """Return the derivative on every row."""
        try:
            second, itemsize = self._run(self.first, None, mixed)
        except RowsMixError as error:
            if mixed or error.finder is None:
                raise
            second, itemsize = self._run(self.first, None, mixed=True)
        if second.value is None or agree(self.first.value, second.value, itemsize, REFUSAL_SLACK):
            return second.taken()
        raise DerivativeError(
            "got another value from the model when it was evaluated again at the same point, "
            f"which {self.route!r} needs to do; it draws from a generator of its own, or "
            "remembers its calls: draw from torch's generator, or write "
            "derivative=SharedPrimal(), which evaluates the model once"
        )

    def _run(self, first: First, indices: Tensor | None, mixed: bool) -> tuple[Second, int]:
        """Return what a second run gives, and the bytes of the coarsest numbers in either run."""
        both = self.primals, self.tangents
        primals, tangents = pytree.tree_map(lambda leaf: self._input(leaf, indices), both)
        with restoring_buffers(self.fn, mixed) as run:
            fn = run.from_the_start(self.fn)
            first = first._replace(kept=lambda: run.keeps)
            second = self.route.derive(fn, primals, tangents, first, mixed)
            self.route.check_run(run)
            if second.check is not None:
                second.check()
        if run.halved is not None or not first.exact:
            return second, 2
        return second, first.value.dtype.itemsize

    def _input(self, leaf: Any, indices: Tensor | None) -> Any:
        """Return a tensor as the second run gets it, and anything else as it is.

        It is detached, in float32 where autocast was on, and on these rows if it has rows.
        """
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach()
        if self.autocast and leaf.is_floating_point() and leaf.dtype.itemsize < 4:
            leaf = leaf.float()
        if indices is None or not leaf.ndim or len(leaf) != len(self.first.value):
            return leaf
        return leaf[indices]


FLOOR = 0.01
"""What is smaller in all rows than so much of the largest value counts as if it were so large."""


def _agree_in_each_place(first: Tensor, second: Tensor, itemsize: int) -> bool:
    """Return whether two evaluations of the same rows differ by rounding alone, beside what a row
    holds in the same place: a part of the output that is small may mix rows beside one that is
    large.
    """
    if first.shape != second.shape or 0 in first.shape:
        return first.shape == second.shape
    largest = first.abs().amax(0)
    scale = torch.maximum(largest, FLOOR * largest.max())
    scale = torch.where(scale > 0, scale, 1.0)
    return agree(first / scale, second / scale, itemsize)


@contextlib.contextmanager
def _outside_autocast(device: torch.device) -> Iterator[bool]:
    """Leave autocast, where a derivative would lose its digits; yields whether it was on."""
    if not torch.is_autocast_enabled(device.type):
        yield False
        return
    with torch.autocast(device.type, enabled=False):
        yield True
