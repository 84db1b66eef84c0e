"""What runs in C++ as one: custom functions of autograd, and functions of torch.jit.

The forward pass of a custom function runs under the carrier, without gradient; what comes out is
given its tangent again. A function of torch.jit is differentiated as one, by torch.func.jvp.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flowspace.derivatives import rules
from flowspace.derivatives.shared_primal.kinds import refusal
from flowspace.derivatives.torch_internals import not_intercepted
from flowspace.errors import DerivativeError

if TYPE_CHECKING:
    from flowspace.derivatives.shared_primal.carrier import Carrier

__all__ = ["outputs", "run_script"]


def outputs(carrier: "Carrier", cls: type, args: tuple[Any, ...], outs: Any) -> Any:
    """Return the outputs of a custom function with the tangents that its forward pass gave
    them.

    Raises:
        DerivativeError: if it is not made of torch functions, or if what it wrote into cannot
            carry a tangent.
    """
    given = []
    for leaf in pytree.tree_leaves(args):
        if isinstance(leaf, Tensor) and carrier.carried(leaf):
            given.append(leaf)
    if not given or carrier.lost:
        return outs
    first = next((x for x in args if isinstance(x, Tensor)), None)

    def followed(out: Any) -> Any:
        if any(out is x for x in given):  # torch hands on what was marked as dirty
            return _dirtied(carrier, cls, out, out is first)
        return _output(carrier, cls, given, out)

    return pytree.tree_map(followed, outs)


def _output(carrier: "Carrier", cls: type, given: Sequence[Tensor], out: Any) -> Any:
    """Return one output of a custom function of these tensors that move, with its tangent."""
    if not rules.differentiable(out) or not out.numel():
        return out
    # The forward pass of a custom function runs without gradient, so its aliases are not in
    # the graph of its outputs: each output is wrapped again, as torch hands it out.
    in_graph = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if in_graph and not out.requires_grad:
        return out  # marked as not differentiable
    dual = carrier.carried(out)
    if dual is None:
        dual = carrier.carried(_same_memory(cls, given, out))
    elif carrier.let_go(out) and cls.__module__.partition(".")[0] != "torch":
        # Torch's own functions hand their inputs on. Others return a view that was made
        # without gradient, and so could not be written to.
        out = out.clone()
    return carrier.wrap(out, dual.tangent, dual.layout)  # type: ignore[union-attr]


def _dirtied(carrier: "Carrier", cls: type, alias: Tensor, first: bool) -> Tensor:
    """Return an input that a custom function wrote into, with its tangent, in its graph.

    Raises:
        DerivativeError: if others share its memory, or if it does not come first: an alias is
            a view, and torch loses the gradient of any other view that is written to.
    """
    held = carrier.held(alias)
    lost = alias.requires_grad and not first
    if lost or carrier.writes.shared(alias) or carrier.writes.mirrors:
        raise DerivativeError(refusal(cls.__name__))
    carrier.put_into_graph(alias, held)
    return alias


def _same_memory(cls: type, given: Sequence[Tensor], out: Tensor) -> Tensor:
    """Return the tensor among those given that an output without a tangent is.

    Raises:
        DerivativeError: if it is none of them: its values came from outside torch.
    """
    for x in given:
        if x.shape == out.shape and x.data_ptr() == out.data_ptr():
            return x
    raise DerivativeError(
        f"{cls.__name__} is an autograd.Function whose forward pass is not made of torch "
        "functions; write derivative=FiniteDifference(), or ForwardMode() if it defines jvp"
    )


def run_script(
    carrier: "Carrier",
    original: Callable[..., Any],
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a function of torch.jit and differentiate it as one."""

    def script(*inputs: Any, **options: Any) -> Any:
        # optimised, the second call has wrong tangents
        with torch.jit.optimized_execution(False):  # pyright: ignore
            return original(function, *inputs, **options)

    script.__name__ = f"torch.jit function {getattr(function, 'name', '')}"
    with not_intercepted():
        carrier.inside.append(script)
        try:
            return carrier.carry(script, args, kwargs)
        finally:
            carrier.inside.pop()
