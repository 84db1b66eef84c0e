"""Functions that write in place: what becomes of tangents whose primals share memory.

A tensor that is alone in its memory gets its new tangent. Where others share it, a mirror of the
whole memory holds the tangents from then on, laid out as the primals are, and every view reads its
own from there.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowspace.derivatives import rules
from flowspace.derivatives.replay import in_transform
from flowspace.derivatives.rules.dual import Dual, Layout, LostRowsError
from flowspace.errors import DerivativeError

if TYPE_CHECKING:
    from flowspace.derivatives.shared_primal.carrier import Carrier

__all__ = ["Writes"]


class Writes:
    """What a model wrote into while a carrier was at work.

    Attributes:
        mirrors: by memory, the tangents of all that shares it, and the memory, held lest its place
            be given away.
        before: what tensors without a tangent held before they were first written to, should the
            model be run again.
    """

    def __init__(self, carrier: "Carrier") -> None:
        self.carrier = carrier
        self.mirrors: dict[int, tuple[Tensor, Any]] = {}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def remember(self, target: Any) -> None:
        """Keep what a tensor without a tangent held before the model first wrote to it.

        Once tangents are lost, results of this pass are among these tensors; those that autograd
        knows are left alone.
        """
        if not isinstance(target, Tensor) or id(target) in self.before or in_transform(target):
            return
        if not (self.carrier.lost and target.grad_fn is not None):
            self.before[id(target)] = target, target.detach().clone()

    def mirrored(self, tensor: Tensor) -> Tensor | None:
        """Return the tangent that a tensor's memory holds, if one was written there."""
        if tensor.layout != torch.strided or not rules.differentiable(tensor):
            return None
        flat, _ = self.mirrors.get(memory(tensor), (None, None))
        return None if flat is None else _place(flat, tensor).clone()

    def write(self, call: rules.Call, name: str, target: Tensor) -> Tensor | None:
        """Run a function that writes into its first argument, and write the tangent beside it."""
        if not isinstance(call.args[0], Dual):
            self.remember(target)
        with torch.no_grad(), torch._C.DisableTorchFunction():  # pyright: ignore
            tangent, layout = self._written_tangent(call, name)
        self.put(target, tangent, layout, call.evaluate)
        return None if name == "setitem" else target

    def put(
        self,
        target: Tensor,
        tangent: Tensor,
        layout: Layout | None,
        run: Callable[[], Any] | None = None,
    ) -> None:
        """Give a tensor another tangent, before or after ``run`` writes its primal.

        Raises:
            LostRowsError: if the tensor shares memory, or its rows lie elsewhere, and the tangent
                has not every row.
        """
        dual = self.carrier.dual(target)
        shared = self._shared(target)
        if layout is not None and (
            shared or dual is None or layout[:3] != (dual.layout or ())[:3]
        ):
            raise LostRowsError
        with torch._C.DisableTorchFunction():  # pyright: ignore
            alone = layout is not None or not (shared or dual is None or self.mirrors)
            mirror = None if alone else self._mirror(target)
        if run is not None:
            run()
        if mirror is None:
            if dual is not None:
                dual.tangent, dual.layout = tangent, layout
            return
        with torch.no_grad(), torch._C.DisableTorchFunction():  # pyright: ignore
            _place(mirror, dual.primal if dual else target).copy_(tangent)

    def _shared(self, target: Tensor) -> bool:
        return any(a is not target and memory(a) == memory(target) for a in self.carrier.aliases())

    def _written_tangent(self, call: rules.Call, name: str) -> tuple[Tensor, Layout | None]:
        """Return the tangent that the first argument has after the function."""
        target = call.args[0]
        primal = target.primal if isinstance(target, Dual) else target
        layout = call.duals[0].layout
        if name in rules.CONSTANT or (name == "fill_" and not isinstance(call.args[-1], Dual)):
            return torch.zeros_like(target.tangent), layout
        if name in ("copy_", "fill_", "setitem"):
            index, source = (
                call.args[1:3]
                if name == "setitem"
                else (..., [*call.args[1:], *call.kwargs.values()][0])
            )
            return rules.assigned(target, index, source), layout
        holders = (torch.Tensor, torch, torch._C._nn, F)  # pyright: ignore
        plain = next(
            (getattr(holder, name[:-1]) for holder in holders if hasattr(holder, name[:-1])), None
        )
        rule = rules.rule_of(name[:-1])
        if plain is None:
            raise DerivativeError(
                f"{name} writes in place and has no other form; write "
                "derivative=FiniteDifference()"
            )
        given = call.args, call.kwargs, call.primals, call.options, call.duals
        other = rules.Call(plain, *given, call.traced)
        other.evaluate()
        found = rule(other, *other.args, **other.kwargs) if rule else rules.forward(other)
        alias = self.carrier.wrap_output(
            other, other.out, found[0] if isinstance(found, list) else found
        )
        dual = self.carrier.held(alias)
        return dual.tangent.to(primal.dtype), dual.layout

    def _mirror(self, target: Tensor) -> Tensor:
        """Return the tangents of a whole memory, laid out as it is."""
        key = memory(target)
        if in_transform(target):
            raise DerivativeError(
                "inside torch.func a tensor is written to that has other views; write "
                "derivative=ForwardMode()"
            )
        if key not in self.mirrors:
            count = target.untyped_storage().nbytes() // target.element_size()
            flat = torch.zeros(count, dtype=target.dtype, device=target.device)
            for alias in self.carrier.aliases():
                if memory(alias) == key:
                    self._copy(self.carrier.held(alias), flat)
            self.mirrors[key] = flat, target.untyped_storage()
        return self.mirrors[key][0]

    def _copy(self, dual: Dual, flat: Tensor) -> None:
        """Copy a tangent to its place in a mirror; an expanded axis is there once."""
        if dual.primal.dtype != flat.dtype:
            raise DerivativeError(
                "a view of another dtype is written to; write derivative=ForwardMode()"
            )
        shown, tangent = dual.primal, dual.tangent
        for axis, stride in enumerate(shown.stride()):
            if stride == 0 and shown.shape[axis] > 1:
                shown, tangent = shown.narrow(axis, 0, 1), tangent.narrow(axis, 0, 1)
        _place(flat, shown).copy_(tangent)


def memory(tensor: Tensor) -> int:
    """Return a number for the memory that a tensor and its views share; a fake tensor, which has
    none, has one too.
    """
    while in_transform(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)  # pyright: ignore
    return tensor.untyped_storage()._cdata


def _place(flat: Tensor, primal: Tensor) -> Tensor:
    return flat.as_strided(primal.shape, primal.stride(), primal.storage_offset())
