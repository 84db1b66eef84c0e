"""Operators that take graphs: what torch.compile makes of checkpoints and of custom functions, and
what torch has of its own.

A body that only stands for itself is run under the carrier. A checkpoint's body is too, and what
is traced of it is marked to be computed again. A custom function keeps its own backward pass: it
stays one operator for the value, and its tangent is that of its forward pass. The others
(flex_attention, scan, cond, map) are refused by name: they have no tangent.
"""

import itertools
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy

from flowspace.derivatives import rules
from flowspace.derivatives.shared_primal.contexts import Contexts
from flowspace.derivatives.torch_internals import not_intercepted, outside_innermost_mode
from flowspace.errors import DerivativeError

if TYPE_CHECKING:
    from flowspace.derivatives.shared_primal.carrier import Carrier

__all__ = ["GraphRunner", "body_of", "run"]

_checkpoints = itertools.count(1 << 20)
"""Numbers for checkpoints in traces, far from those that torch gives to its own, from 1 on."""


class GraphRunner(fx.Interpreter):
    """Runs a graph under a carrier.

    Operators that take graphs are handed to the carrier here: no function mode sees some of them.
    """

    def __init__(self, graph: fx.GraphModule, carrier: "Carrier") -> None:
        super().__init__(graph)
        self.extra_traceback = False  # a refusal is told as in the eager route
        self.carrier, self.contexts = carrier, Contexts()

    def run(self, *args: Any, **options: Any) -> Any:
        """Run the graph; after an error it is in no context that it entered."""
        with self.contexts.left():
            return super().run(*args, **options)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call one function of the graph."""
        if isinstance(target, HigherOrderOperator):
            with outside_innermost_mode():  # it is the carrier, which enters itself again
                return self.carrier.carry(target, args, kwargs)
        call = self.contexts.call_of(target)
        if call is not None:
            return call(*args)
        return super().call_function(target, args, kwargs)


def run(carrier: "Carrier", call: rules.Call, name: str, args: tuple[Any, ...]) -> Any:
    """Run an operator that takes graphs, with the tangents of its arguments.

    Raises:
        DerivativeError: if it has no tangent.
    """
    if name == "autograd_function_apply":
        return _custom_function(carrier, call, args)
    if name == "register_hook":
        return _hooked(carrier, call)
    body = _BODIES.get(name)
    if body is None and not call.duals:
        return call.evaluate()
    if body is None:
        raise DerivativeError(
            f"torch's operator {name} has no forward derivative; write "
            "derivative=FiniteDifference()"
        )
    graph, operands = body(args)
    before = _traced_nodes()
    if carrier.traced:
        graph = GraphRunner(graph, carrier).run
    with carrier:
        out = graph(*operands)
    if name == "tag_activation_checkpoint":
        _mark_recomputed(before)
    return out


def _hooked(carrier: "Carrier", call: rules.Call) -> Any:
    """Return the tensor that a model sets a hook on, which meets the gradient of the value alone.

    Raises:
        ValueError: in a trace, which would lose the hook: the part is left to Python.
    """
    if carrier.traced:
        raise ValueError("a trace would lose the hook of a tensor")
    out = call.evaluate()
    if not call.duals:
        return out
    dual = call.duals[0]
    return carrier.wrap(out, dual.tangent, dual.layout)


Arguments = tuple[Any, ...]
"""What an operator is called with."""

Body = tuple[Any, Arguments]
"""A graph, and what it is called with."""


def _first(args: Arguments) -> Body:
    """Return the graph that comes first, and its inputs, which are all that follows."""
    return args[0], args[1:]


def _without_name(args: Arguments) -> Body:
    """Return the graph that comes first, and its inputs, which follow its name."""
    return args[0], args[2:]


_BODIES: dict[str, Callable[[Arguments], Body]] = {
    "wrap": _first,
    "tag_activation_checkpoint": _first,
    "invoke_subgraph": _without_name,
}
"""The body of an operator, and what it is called with, among its arguments."""


def body_of(node: fx.Node) -> Body | None:
    """Return the graph that a node of a graph only stands for, and what it is called with."""
    if not isinstance(node.target, HigherOrderOperator):
        return None
    body = _BODIES.get(node.target.name())
    if body is None:
        return None
    return body(node.args)


def _tracer() -> Any:
    """Return what writes a trace down, or None where nothing is traced."""
    mode = proxy_tensor.get_proxy_mode()
    if mode is None:
        return None
    return mode.tracer


def _nodes() -> Collection[fx.Node]:
    """Return the functions that a trace has by now."""
    tracer = _tracer()
    if tracer is None:
        return ()
    return tracer.graph.nodes


def _traced_nodes() -> int:
    """Return how many functions a trace has by now."""
    return len(_nodes())


def _mark_recomputed(before: int) -> None:
    """Mark what was traced since as torch marks a checkpoint's body, for the partition of forward
    and backward pass.
    """
    number = next(_checkpoints)
    for node in itertools.islice(_nodes(), before, None):
        node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
        node.meta["ac_graph_id"] = number


def _custom_function(carrier: "Carrier", call: rules.Call, args: tuple[Any, ...]) -> Any:
    """Run a captured autograd.Function on the primals, and its forward pass on aliases for their
    tangents.

    Run twice: traced into its parts, the function would lose the backward pass that it brings.

    Raises:
        ValueError: if the second run would not be as the first: it writes into what it is given,
            or draws random numbers.
    """
    forward, backward, *inputs = args
    given = [x for x in call.primals[2:] if isinstance(x, Tensor)]
    before = [x._version for x in given]
    values = _recorded(call, (forward, backward, *call.primals[2:]))
    if not call.duals:
        return values
    if [x._version for x in given] != before:
        raise ValueError("an autograd.Function writes into its input; return a new tensor")
    start = _traced_nodes()
    with carrier, torch.no_grad():
        outputs, _ = forward(*inputs)
    _refuse_draws(start)
    fixed = call.options.get("non_differentiable_idx", ())
    if isinstance(values, Tensor):
        if 0 in fixed:
            return values
        return _with_tangent(carrier, values, outputs)
    found = []
    for number, (value, output) in enumerate(zip(values, outputs, strict=True)):
        if number not in fixed:
            value = _with_tangent(carrier, value, output)
        found.append(value)
    return tuple(found)


def _refuse_draws(before: int) -> None:
    """Raise ValueError if what was traced since draws random numbers."""
    for node in itertools.islice(_nodes(), before, None):
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ValueError(
                f"{node.target} in an autograd.Function would draw other numbers for the tangent"
            )


def _with_tangent(carrier: "Carrier", value: Any, output: Any) -> Any:
    """Return a value with the tangent that another run of the same gave, if any."""
    if not isinstance(output, Tensor):
        return value
    dual = carrier.dual(output)
    if dual is None:
        return value
    return carrier.wrap(value, dual.tangent, dual.layout)


def _recorded(call: rules.Call, args: tuple[Any, ...]) -> Any:
    """Run an operator as one node of a trace, or as it is where nothing is traced."""
    tracer = _tracer()
    if tracer is None:
        return call.func(*args, **call.options)
    # The operator is written down by hand: traced as it runs, it would fall into its parts.
    with proxy_tensor.disable_proxy_modes_tracing(), not_intercepted():
        out = call.func(*args, **call.options)
    for graph in args[:2]:
        tracer.root.register_module(tracer.get_fresh_qualname("body"), graph)
    proxies = pytree.tree_map(tracer.unwrap_proxy, args)
    node = tracer.create_proxy("call_function", call.func, proxies, call.options)
    return proxy_tensor.track_tensor_tree(out, node, constant=None, tracer=tracer)
