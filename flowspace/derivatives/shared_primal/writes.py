"""Functions that write in place: what becomes of tangents whose primals share memory.

A tensor that is alone in its memory gets its new tangent. Where others share it, a mirror of the
whole memory holds the tangents from then on, laid out as the primals are, and every view reads its
own from there.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowspace.derivatives import rules
from flowspace.derivatives.bindings import Bindings
from flowspace.derivatives.replay import (
    base_of,
    in_transform,
    is_alive,
    put_back,
    root_of,
    version_of,
)
from flowspace.derivatives.rules.dual import Dual, Layout, LostRowsError, restrict
from flowspace.derivatives.shared_primal.dispatch_changes import (
    refuse_changed,
    value_without_modes,
)
from flowspace.derivatives.shared_primal.watch import FILLING
from flowspace.derivatives.torch_internals import (
    dispatch_modes,
    memory_of,
    negated_view,
    not_intercepted,
    operators_of_networks,
)
from flowspace.errors import DerivativeError

if TYPE_CHECKING:
    from flowspace.derivatives.shared_primal.carrier import Carrier

__all__ = ["Writes", "memory_below"]


class Writes:
    """What a model wrote into while a carrier was at work.

    Attributes:
        mirrors: by memory, the tangents of all that shares it, and the memory, held lest its place
            be given away.
        partial: in these mirrors only some rows are right, and only who knows where they lie may
            read them.
        versions: by memory of complex numbers, how often autograd had seen it written to when the
            carrier last saw it.
        before: what tensors without a tangent held before they were first written to, should the
            model be run again.
        bindings: what buffers were before other tensors were bound to their names, for the same.
        read_detached: memory of tensors at rest that x.data or x.detach() shares, which torch
            counts as no view.
    """

    def __init__(self, carrier: "Carrier") -> None:
        self.carrier = carrier
        self.mirrors: dict[int, tuple[Tensor, Any]] = {}
        self.partial = False
        self.versions: dict[int, int] = {}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.bindings = Bindings()
        self.read_detached: set[int] = set()

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Give the model what it had before it wrote, to run it again, and then what it wrote."""
        written = []
        for tensor, then in self.before.values():
            if is_alive(tensor):  # FSDP2 frees what it gathered
                written.append((tensor, tensor.detach().clone(), then, version_of(tensor)))
        bound = Bindings()
        for module, name, _ in self.bindings.before.values():
            bound.note(module, name)
        try:
            self.bindings.restore()
            # the first last: one memory may be known by several tensors, as by x and x.data
            for tensor, _, then, _ in reversed(written):
                if tensor.shape == then.shape:  # else it was made in the pass, and resized
                    tensor.detach().copy_(then)
            yield
        finally:
            # autograd may have saved them in the first pass: they are as they were then
            for tensor, now, _, version in written:
                put_back(tensor, now, version)
            bound.restore()

    def release(self) -> None:
        """Let go of the carrier and the tangents, once its pass is over."""
        self.mirrors = {}
        del self.carrier

    def remember(self, *targets: Tensor) -> None:
        """Keep what tensors without a tangent held before the model first wrote to them, or may
        have written to them unseen; views stand for what they are views of.

        Once tangents are lost, results of this pass are among these tensors; those that autograd
        knows are left alone.
        """
        for target in targets:
            root = root_of(target)
            if id(root) in self.before or in_transform(root):
                continue
            if not (self.carrier.lost and root.grad_fn is not None):
                self.before[id(root)] = root, root.detach().clone()

    def detached(self, tensor: Tensor) -> None:
        """Note that a tensor without a tangent may be written to through another."""
        if tensor.layout == torch.strided:
            self.read_detached.add(memory_below(tensor))

    def seen(self, tensor: Tensor) -> None:
        """Note that what is in the memory of complex numbers by now is known."""
        if not tensor.is_inference():
            self.versions[memory_below(tensor)] = tensor._version

    def about_to_write(self, *targets: Tensor) -> None:
        """Note that a function writes into tensors without a tangent."""
        self.remember(*targets)
        if self.carrier.watch is not None:
            self.carrier.watch.rewritten(*targets)

    def _seen_written(self, target: Tensor) -> None:
        """Note a write that was seen."""
        if self.carrier.watch is not None:
            self.carrier.watch.rewritten(target)
        if self.versions and memory_below(target) in self.versions:
            self.seen(target)

    def check_seen(self, tensor: Tensor) -> None:
        """Raise DerivativeError if complex numbers were written to unseen: torch hands the
        assignment of a real or imaginary part to no mode.
        """
        if tensor.is_inference():
            return
        if self.versions.get(memory_below(tensor), tensor._version) != tensor._version:
            raise DerivativeError(
                "got x.real = y or x.imag = y for complex numbers that move with z_t or t, which "
                "torch does without a function that tangents follow; write x.real.copy_(y), "
                "x = torch.complex(y, x.imag), or derivative=ForwardMode()"
            )

    def mirrored(self, tensor: Tensor, layout: Layout | None) -> Tensor | None:
        """Return the tangent that a tensor's memory holds, if one was written there."""
        if tensor.layout != torch.strided or not rules.differentiable(tensor):
            return None
        mirror = self.mirrors.get(memory_below(tensor))
        if mirror is None:
            return None
        # a copy: what is written to the memory later does not change a tangent that was read
        place = _place(mirror[0], tensor)
        if layout is None:
            return place.clone()
        return restrict(place, layout)

    def write(self, call: rules.Call, name: str, target: Tensor) -> Tensor | None:
        """Run a function that writes into its first argument, and write the tangent beside it."""
        if not isinstance(call.args[0], Dual):
            self.remember(target)
            if self.stopped(target):
                self._move_as_its_memory(call, target)
        with torch.no_grad(), not_intercepted():
            tangent, layout = self._written_tangent(call, name)
        plain = self._without_modes(call, name)

        def run() -> None:
            call.evaluate()
            self._seen_written(target)
            refuse_changed(name, call.primals[0], plain)

        self.put(target, tangent, layout, run)
        if name == "setitem":
            return None
        return target

    def _without_modes(self, call: rules.Call, name: str) -> Any:
        """Return what a function is about to write, were there no dispatch modes, or None for no
        matter what.
        """
        written_as_given = name in FILLING or name == "setitem"
        if self.carrier.watch is None or written_as_given or not dispatch_modes():
            return None
        return value_without_modes(_form_out_of_place(name), call.primals, call.options)

    def put(
        self,
        target: Tensor,
        tangent: Tensor,
        layout: Layout | None,
        run: Callable[[], Any] | None = None,
    ) -> None:
        """Give a tensor another tangent, before or after ``run`` writes its primal.

        Raises:
            LostRowsError: if the tangent has not every row, and those of the tensor lie elsewhere
                or are not known.
        """
        if run is None:
            self._seen_written(target)
        dual = self.carrier.dual(target)
        if dual is None and layout is not None and self._alone(target):
            if run is not None:
                run()
            self.carrier.begin(target, tangent, layout)
            return
        if layout is not None and not _same_place(layout, dual):
            raise LostRowsError
        # A tensor without a tangent may be a view of one that has: the mirror then tells both.
        shared = dual is None or self.shared(target)
        if not (shared or self.mirrors):
            # alone in its memory: the dual tells all that is known of it
            if run is not None:
                run()
            if dual is not None:
                dual.tangent, dual.layout = tangent, layout
            return
        # The mirror takes over the tangents of all that lies in the memory before the primal is
        # written: a dual tells nothing of its memory afterwards.
        self.partial = self.partial or layout is not None
        with not_intercepted():
            mirror = self._mirror(target)
        if run is not None:
            run()
        written = target
        if dual is not None:
            written = dual.primal
        with torch.no_grad(), not_intercepted():
            _write_rows(_place(mirror, written), tangent, layout)

    def _alone(self, target: Tensor) -> bool:
        """Return whether a tensor was made in this pass, as zeros that are filled, and has its
        memory for itself.

        Views of it that were taken before are met when they are read.
        """
        if self.carrier.traced or not self.carrier.has_made(target):
            return False
        key = memory_below(target)
        if key in self.mirrors or key in self.read_detached:
            return False
        return not self.shared(target)

    def stopped(self, target: Tensor) -> bool:
        """Return whether a tensor carries no tangent, as x.data does, where its memory does."""
        if not self.carrier.is_detached(target):
            return False
        return memory_below(target) in self.mirrors or self.shared(target)

    def _move_as_its_memory(self, call: rules.Call, target: Tensor) -> None:
        """Let the first argument, which was detached, move as what lies in its memory does.

        What is written into x.data is read from x, and from then on from x.data too.

        Raises:
            LostRowsError: if not every row has a tangent.
        """
        key = memory_below(target)
        sharing = [alias for alias in self.carrier.aliases() if memory_below(alias) == key]
        duals = [*call.duals, *map(self.carrier.held, sharing)]
        if any(dual.layout is not None for dual in duals):
            raise LostRowsError
        with torch.no_grad(), not_intercepted():
            tangent = _place(self._mirror(target), target).clone()
        self.carrier.attach(key)
        moving = Dual(target, tangent, None, self.carrier)
        call.args = [moving, *call.args[1:]]
        call.duals.insert(0, moving)

    def shared(self, target: Tensor) -> bool:
        """Return whether another tensor that carries a tangent lies in the memory of this one."""
        return any(
            a is not target and memory_below(a) == memory_below(target)
            for a in self.carrier.aliases()
        )

    def _written_tangent(self, call: rules.Call, name: str) -> tuple[Tensor, Layout | None]:
        """Return the tangent that the first argument has after the function."""
        target, layout = call.args[0], call.duals[0].layout
        following = [*call.args[1:], *call.kwargs.values()]
        filled = name == "fill_" and not isinstance(following[0], Dual)
        if name in rules.CONSTANT or filled:
            return torch.zeros_like(target.tangent), layout
        if name in ("copy_", "fill_", "setitem"):
            index, source = ..., following[0]
            if name == "setitem":
                index, source = following[:2]
            found = rules.assigned(target, index, source)
            return found.tangent, found.layout
        # x.add_(y) has the tangent of x.add(y), whose rule is asked for it
        given = call.args, call.kwargs, call.primals, call.options, call.duals
        other = rules.Call(_form_out_of_place(name), *given, call.traced)
        out = other.evaluate()
        rule = rules.rule_of(name[:-1]) or rules.without_rule
        try:
            tangent = rule(other, *other.args, **other.kwargs)
        except TypeError:  # arguments that the rule does not know
            tangent = rules.forward(other)
        if isinstance(tangent, list):
            tangent = tangent[0]
        dual = self.carrier.held(self.carrier.wrap_output(other, out, tangent))
        return dual.tangent.to(call.primals[0].dtype), dual.layout

    def _mirror(self, target: Tensor) -> Tensor:
        """Return the tangents of a whole memory, laid out as it is."""
        key = memory_below(target)
        if in_transform(target):
            raise DerivativeError(
                "inside torch.func a tensor is written to that has other views; write "
                "derivative=ForwardMode()"
            )
        if key not in self.mirrors:
            # One number of the mirror for each of the memory: a view of the one, however it
            # strides and overlaps others, is then the same view of the other.
            count = _numbers_in_memory(target, self.carrier.traced)
            flat = torch.zeros(count, dtype=target.dtype, device=target.device)
            for alias in self.carrier.aliases():
                if memory_below(alias) == key:
                    self._copy(self.carrier.held(alias), flat)
            self.mirrors[key] = flat, target.untyped_storage()
        return self.mirrors[key][0]

    def _copy(self, dual: Dual, flat: Tensor) -> None:
        """Copy a tangent to its place in a mirror; an expanded axis is there once.

        Raises:
            LostRowsError: if the rows lie along an expanded axis, and have not all a tangent.
        """
        shown, tangent, layout = dual.primal, dual.tangent, dual.layout
        for axis, stride in enumerate(shown.stride()):
            if stride == 0 and shown.shape[axis] > 1:
                if layout is not None and layout.axis == axis:
                    raise LostRowsError
                shown, tangent = shown.narrow(axis, 0, 1), tangent.narrow(axis, 0, 1)
        _write_rows(_place(flat, shown), tangent, layout)


def _numbers_in_memory(tensor: Tensor, traced: bool) -> int:
    """Return how many numbers fit into the memory of a tensor.

    A trace knows no size of a memory; where sizes are open it knows those of the tensor.
    """
    root = root_of(tensor)
    is_open = traced and any(isinstance(size, torch.SymInt) for size in root.shape)
    if is_open and root.is_contiguous() and root.storage_offset() == 0:
        return math.prod(root.shape)
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _write_rows(place: Tensor, tangent: Tensor, layout: Layout | None) -> None:
    """Write a tangent to its place in a mirror, where the rows that have none are zero."""
    if layout is None:
        place.copy_(tangent)
        return
    axis, outer, inner, chosen = layout
    blocks = place.unflatten(axis, (outer, chosen.batch, inner))
    rows = tangent.to(place.dtype).unflatten(axis, (outer, chosen.few, inner))
    blocks.index_copy_(axis + 1, chosen.indices, rows)


def _same_place(layout: Layout, dual: Dual | None) -> bool:
    """Return whether the rows of a dual lie as a layout says."""
    return dual is not None and dual.layout is not None and layout[:3] == dual.layout[:3]


def _form_out_of_place(name: str) -> Callable[..., Any]:
    """Return the function that computes what one of this name, with _ at its end, writes.

    Raises:
        DerivativeError: if there is none.
    """
    for holder in (torch.Tensor, torch, operators_of_networks, F):
        if hasattr(holder, name[:-1]):
            return getattr(holder, name[:-1])
    raise DerivativeError(
        f"{name} writes in place and has no other form; write derivative=FiniteDifference()"
    )


def memory_below(tensor: Tensor) -> int:
    """Return a number for the memory that a tensor, as transforms wrapped it, and its views
    share.
    """
    return memory_of(base_of(tensor))


def _place(flat: Tensor, primal: Tensor) -> Tensor:
    """Return the part of a mirror that lies where a primal lies in its memory.

    A primal may be the real or imaginary part of the numbers there, and lazily conjugated or
    negated: then the memory holds other numbers than it shows.

    Raises:
        DerivativeError: if it shows the bits of its memory as other numbers still.
    """
    if primal.dtype != flat.dtype:
        if primal.dtype.to_real() != flat.dtype.to_real():
            raise DerivativeError(
                "a view of another dtype is written to; write derivative=ForwardMode()"
            )
        if flat.is_complex():
            flat = torch.view_as_real(flat).flatten()
        else:
            flat = torch.view_as_complex(flat[: len(flat) // 2 * 2].unflatten(0, (-1, 2)))
    part = flat.as_strided(primal.shape, primal.stride(), primal.storage_offset())
    if primal.is_conj():
        part = part.conj()
    if primal.is_neg():
        part = negated_view(part)
    return part
