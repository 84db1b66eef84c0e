"""Shared primal: the value with gradient and D_t f without, in one forward pass of the unmodified
model.

Every torch function that the model calls is intercepted. It runs as it is, so the value, its
gradient, the kernels, the random numbers and the buffers are those of the plain program; beside
it, under no_grad and from detached primals, the tangents of its inputs become the tangent of its
output.

Who holds whom, from the outside in:

* `SharedPrimal.evaluate`: one pass over the model; a second one over all rows where rows mix.
* `evaluate_beside`: makes a carrier and its first aliases, runs the model, and takes the tangent
  of what comes out.
* `carrier.Carrier`: a function mode; unpacks arguments, runs a function and its rule, wraps.
* `kinds`: what is done about each torch function.
* `rules`: the tangent of each torch function, over a `Dual`: primal, tangent, and the rows that
  the tangent has.
* `own_functions`: functions of a model's own that have a rule (`own_rules`), and are met as one;
  `steps` follows those that say their steps.
* `custom_functions`: what torch runs in C++: custom functions of autograd, and those of torch.jit.
* `writes.Writes`: functions that write in place, and memory that tensors share.
* `higher_order`: operators that take graphs, such as checkpoints and captured custom functions.
* `compiled.Backend` and `compiled.Region`: a part under torch.compile, as one graph of value and
  tangent.
* `contexts.Contexts`: autocast and others that a captured graph enters.
* `hidden_calls`: what no function mode sees; the only place that patches torch.
* `watch.Watch`: what is left unseen, found by what the model uses that nobody made; `passes`: when
  that is done.
* `dispatch_changes`: dispatch modes that change what functions return.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowspace.derivatives import hidden_calls
from flowspace.derivatives.reached import OnCopies, copies_of
from flowspace.derivatives.replay import (
    REFUSAL_SLACK,
    RandomState,
    RestoringMode,
    agree,
    restoring_buffers,
    uncompiled,
)
from flowspace.derivatives.route import Derivative, scatter
from flowspace.derivatives.rules.dual import ChosenRows, Layout
from flowspace.derivatives.shared_primal.carrier import FIELD, Carrier
from flowspace.derivatives.shared_primal.kinds import ELSEWHERE
from flowspace.derivatives.shared_primal.passes import is_watched
from flowspace.derivatives.shared_primal.watch import (
    Stranger,
    Watch,
    check_strangers,
    moved_a_little,
)
from flowspace.derivatives.shared_primal.writes import Writes
from flowspace.derivatives.torch_internals import below_modes_of_the_user
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
        indices: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the value with gradient and the derivative without."""
        draws = RandomState(primals[0].device, of_python=True)
        chosen = None
        if indices is not None:
            chosen = ChosenRows.of(indices, len(primals[0]))
        copied: Callable[[], list[Any]] = functools.partial(_copies, primals, tangents)
        given = fn
        if isinstance(given, OnCopies):
            # they are made here: to carry tangents through the making of copies costs more
            fn, copied = given.fn, functools.partial(copies_of, primals)
        copies = copied()
        at_point = _AtPoint(fn, tangents, copied, draws, is_watched(fn))
        value, tangent, lost, writes = at_point.first(copies, chosen)
        if lost:
            tangent = at_point.tangent_of_all_rows(value.detach(), writes)
            chosen = None
        if fn is given:
            _hand_back(primals, copies)
        if tangent is None:
            return value, torch.zeros_like(value)
        if chosen is not None:
            tangent = scatter(tangent, chosen.indices, value)
        outer = hidden_calls.active_carrier()
        if outer is not None and outer.watch is not None:
            outer.watch.made(tangent)  # a model that evaluates a route is given a constant
        return value, tangent


@dataclass(frozen=True)
class _AtPoint:
    """The passes over one function at one point.

    Attributes:
        fn: the function.
        tangents: of its arguments.
        copied: returns its arguments, in memory of their own.
        draws: the state of the generators before the first pass.
        watched: the passes are watched.
    """

    fn: Callable[..., Tensor]
    tangents: Sequence[Tensor | None]
    copied: Callable[[], list[Any]]
    draws: RandomState
    watched: bool

    def first(self, primals: Sequence[Any], chosen: ChosenRows | None) -> "Evaluation":
        """Return what the first pass gives, with gradient."""
        watch = self._watch()
        found = evaluate_beside(self.fn, primals, self.tangents, chosen, watch)
        self._check(watch, found.writes)
        return found

    def tangent_of_all_rows(self, value: Tensor, writes: Writes) -> Tensor | None:
        """Return the tangent of a pass over all rows, where the first one lost it.

        Raises:
            DerivativeError: if the value is another one this time.
        """
        watch = self._watch()
        found, run = self._again(self.copied(), writes, watch)
        self._check(watch, writes)
        if found.lost:
            raise DerivativeError(
                "the derivative was lost on all rows as well as on some, which is no fault of "
                "the model; write derivative=ForwardMode()"
            )
        _check_repeats(value, found.value, run)
        return found.tangent

    def _again(
        self, primals: Sequence[Any], writes: Writes, watch: Watch | None
    ) -> "tuple[Evaluation, RestoringMode]":
        """Return what another pass gives, over all rows and without gradient."""
        with writes.undone(), torch.no_grad(), restoring_buffers(self.fn) as run:
            again = self.draws.replay(self.fn)
            found = evaluate_beside(again, primals, self.tangents, None, watch)
            # its own memory may be put back as well
            return found._replace(value=found.value.clone()), run

    def _watch(self) -> Watch | None:
        """Return what watches a pass, or None."""
        if not self.watched:
            return None
        return Watch(self.fn)

    def _check(self, watch: Watch | None, writes: Writes) -> None:
        """Raise DerivativeError if something moves that a pass used, and that nobody made."""
        if watch is None or not watch.strangers:
            return

        def strangers_at(primals: Sequence[Any]) -> list[Stranger]:
            there = Watch(self.fn, watch.strangers)
            _, run = self._again(primals, writes, there)
            run.restore_generators()
            return there.strangers

        check_strangers(
            watch.strangers,
            lambda: strangers_at(self.copied()),
            lambda: strangers_at(moved_a_little(self.copied(), self.tangents)),
        )


def _copies(primals: Sequence[Any], tangents: Sequence[Tensor | None]) -> list[Any]:
    """Return the primals, those that move as copies.

    A model that writes into its input can then be run again, and what its caller holds of a primal
    lies in another memory.
    """
    copies = list(primals)
    for i, tangent in enumerate(tangents):
        if tangent is not None:
            copies[i] = primals[i].clone()
    return copies


def _hand_back(primals: Sequence[Any], copies: Sequence[Any]) -> None:
    """Write into the primals what the model wrote into their copies."""
    for primal, copy in zip(primals, copies, strict=True):
        if copy is primal or primal.is_inference() or copy.is_inference():
            continue  # nobody may write into a tensor of inference mode
        if not copy._version:
            continue
        with torch.no_grad():
            primal.copy_(copy)


def _check_repeats(first: Tensor, second: Tensor, run: RestoringMode) -> None:
    """Raise DerivativeError if a model had another value when it was run again."""
    itemsize = first.dtype.itemsize
    if run.halved is not None:
        itemsize = 2
    if not agree(first, second, itemsize, REFUSAL_SLACK):
        raise DerivativeError(
            "got another value from the model when it was evaluated again at the same point, "
            "which SharedPrimal() does where rows mix; it draws from a generator of its own, or "
            "remembers its calls: draw from torch's generator, and keep what it remembers in "
            "buffers that it writes in place"
        )


class Evaluation(NamedTuple):
    """What a pass over a model gives.

    Attributes:
        value: what the model returned, with gradient.
        tangent: its tangent on the rows asked for; None where it does not move or was lost.
        lost: the tangent was lost: it needs every row.
        writes: what the model wrote in the pass.
    """

    value: Tensor
    tangent: Tensor | None
    lost: bool
    writes: Writes


def evaluate_beside(
    fn: Callable[..., Tensor],
    primals: Sequence[Any],
    tangents: Sequence[Tensor | None],
    chosen: ChosenRows | None,
    watch: Watch | None = None,
) -> Evaluation:
    """Evaluate fn once, with the tangents beside it, and watch what it uses."""
    if watch is None:
        return _evaluate_beside(Carrier(), fn, primals, tangents, chosen)
    with watch:
        return _evaluate_beside(Carrier(watch=watch), fn, primals, tangents, chosen)


def _evaluate_beside(
    carrier: Carrier,
    fn: Callable[..., Tensor],
    primals: Sequence[Any],
    tangents: Sequence[Tensor | None],
    chosen: ChosenRows | None,
) -> Evaluation:
    """Evaluate fn once, with a carrier that nobody has used."""
    inputs = _aliases(carrier, primals, tangents, chosen)
    loaded = hidden_calls.dynamo_loaded()
    try:
        with hidden_calls.following(carrier), _as_written(), below_modes_of_the_user(carrier):
            out = fn(*inputs)
        if carrier.refused is not None:
            raise carrier.refused
        if carrier.elsewhere:
            raise DerivativeError(ELSEWHERE)
        if hidden_calls.dynamo_loaded() and not loaded:
            # the model loaded torch.compile on its way: what it compiled was not followed
            carrier.lost = True
        if not isinstance(out, Tensor):
            raise InputError(
                f"got {type(out).__name__} from the model; wrap it so that it returns one tensor "
                "of shape (B, *)"
            )
        dual, held = carrier.dual(out), getattr(out, FIELD, None)
        value = out
        if held is not None:
            value = held.primal
    finally:
        carrier.release()
    if carrier.lost or (dual is not None and _elsewhere(dual.layout)):
        return Evaluation(value, None, True, carrier.writes)
    if dual is None:
        return Evaluation(value, None, False, carrier.writes)
    return Evaluation(value, dual.tangent, False, carrier.writes)


def _aliases(
    carrier: Carrier,
    primals: Sequence[Any],
    tangents: Sequence[Tensor | None],
    chosen: ChosenRows | None,
) -> list[Any]:
    """Return the primals, as aliases that carry a tangent where there is one."""
    layout, found = None, []
    if chosen is not None:
        layout = Layout(0, 1, 1, chosen)
    for primal, tangent in zip(primals, tangents, strict=True):
        if tangent is None:
            found.append(primal)
            continue
        if chosen is not None:
            tangent = tangent[chosen.indices]
        found.append(carrier.wrap(primal, tangent.detach(), layout))
    if carrier.watch is not None:
        carrier.watch.made(found)
    return found


def _elsewhere(layout: Layout | None) -> bool:
    """Return whether the rows of a result lie along another axis than its first."""
    return layout is not None and layout[:3] != (0, 1, 1)


def _as_written() -> contextlib.AbstractContextManager[Any]:
    """Run what was compiled as it was written, where this torch does not let it be followed."""
    if hidden_calls.follows_compiled():
        return contextlib.nullcontext()
    return uncompiled()
