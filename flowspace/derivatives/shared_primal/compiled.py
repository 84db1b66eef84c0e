"""Compiled parts of a model, run with their tangents: value and tangent as one graph, compiled by
the user's own backend.

torch.compile captures a function as a graph of torch functions, and guards everything that its
Python depended on: shapes, dtypes, train or eval, attributes, hooks, grad mode, autocast. None of
that is done again here. While a carrier is at work, the backend that the user chose is handed
another graph than the captured one:

    captured graph    inputs                           -> outputs                     torch
    functions, by dynamo dual graph        inputs, tangents, moving rows    -> outputs, their
    tangents     a carrier run over it, by make_fx

No dual tensor is left in it, only arithmetic: the backend fuses, plans and partitions it as it
would the captured one, attention of the value stays fused, and gradients flow through the value
alone. What dynamo leaves to Python between two graphs goes on by the carrier, function by
function.

A graph is traced again for another set of inputs that move, and for more moving rows than it has
room for; fewer are padded. What cannot be traced runs as it was captured, function by function,
with one warning.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, _guards, fx
from torch._dynamo.exc import RestartAnalysis
from torch._ops import HigherOrderOperator
from torch.fx.experimental.proxy_tensor import make_fx

from flowspace.derivatives import hidden_calls, replay
from flowspace.derivatives.rules.dual import Dual, Layout, LostRowsError, Rows
from flowspace.derivatives.shared_primal.carrier import Carrier
from flowspace.errors import DerivativeError

__all__ = ["Backend", "Region"]

SHARES = 4
"""A graph has room for a number of moving rows that is a multiple of this share of the batch, or
for just those asked for.
"""

_PLAIN = "plain"
"""The key of the graph as it was captured."""

Place = tuple[int, int, int] | None
"""Where the batch lies in a tensor that moves, as in a `Layout`; None: its tangent has every row.
"""


class Moving(NamedTuple):
    """A tensor among several that has a tangent: its number, and where its rows lie."""

    number: int
    place: Place


class Program(NamedTuple):
    """A dual graph, compiled.

    Attributes:
        run: takes inputs, tangents of those that move, and the moving rows, if not all do; returns
            outputs, tangents of those that move, and the new tangents of inputs that were written
            to.
        outputs: how many outputs the captured graph has.
        moving: those that move.
        written: the inputs that have another tangent afterwards.
        lost: rows mix, or a tangent lies where it cannot be followed: there is no dual graph for
            some of the rows.
    """

    run: Callable[..., Any] | None
    outputs: int = 0
    moving: tuple[Moving, ...] = ()
    written: tuple[Moving, ...] = ()
    lost: bool = False


class Backend:
    """A backend of torch.compile that has dual graphs compiled by another one; equal to others of
    an equal one.
    """

    def __init__(self, backend: Callable[..., Any]) -> None:
        self.backend = backend

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Backend) and self.backend == other.backend

    def __hash__(self) -> int:
        return hash(Backend)

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> "Region":
        """Return what runs a captured graph."""
        _warn_of_limit()
        return Region(graph, inputs, self.backend)


class Setting(NamedTuple):
    """What a graph is traced and compiled with.

    Attributes:
        examples: its inputs without values; sizes may be symbols.
        fake: the mode that these belong to.
        context: what dynamo tells a backend beside the graph.
    """

    examples: list[Any]
    fake: Any
    context: Any

    @classmethod
    def of(cls, inputs: Sequence[Any]) -> "Setting":
        """Return the setting of a capture that is going on, or one of its own, of just these
        inputs.
        """
        context = _guards.TracingContext.try_get()
        given = next(
            (x.fake_mode for x in inputs if isinstance(x, torch._subclasses.FakeTensor)), None
        )
        fake = given or (context and context.fake_mode) or torch._subclasses.FakeTensorMode()
        context = context or _guards.TracingContext(fake)
        examples = [_faked(x, fake, context) if isinstance(x, Tensor) else x for x in inputs]
        return cls(examples, fake, context)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Be in the context that dynamo captured the graph in, also after it."""
        if _guards.TracingContext.try_get() is not None:
            yield
            return
        with _guards.tracing(self.context):
            yield


def _faked(tensor: Tensor, fake: Any, context: Any) -> Tensor:
    """Return a tensor without values, with the symbols for sizes that dynamo gave it."""
    if isinstance(tensor, torch._subclasses.FakeTensor):
        return tensor
    symbols: Any = context.tensor_to_context.get(tensor)
    source = None if symbols is None else symbols.tensor_source
    with torch._C.DisableTorchFunction():  # pyright: ignore
        return fake.from_tensor(tensor, symbolic_context=symbols, source=source)


def _has_symbols(value: Any) -> bool:
    """Return whether a size, or a size of a tensor, was left open."""
    sizes = value.shape if isinstance(value, Tensor) else [value]
    return any(isinstance(size, torch.SymInt | torch.SymFloat) for size in sizes)


class Region:
    """A captured graph, with the programs that were made of it."""

    def __init__(
        self, graph: fx.GraphModule, inputs: Sequence[Any], backend: Callable[..., Any]
    ) -> None:
        self.backend = backend
        self.captured = _copied(graph)
        self.setting = Setting.of(inputs)
        self.open = any(_has_symbols(x) for x in self.setting.examples)
        self.writes = _written_inputs(self.captured, self.setting)
        self.mixes = _mixes(self.captured)
        self.programs: dict[Any, Program | Exception] = {}
        carrier = hidden_calls.active_carrier()
        duals = _duals(carrier, inputs) if carrier and not carrier.lost else []
        followed = False
        if carrier is not None and any(duals):
            apart = torch.is_grad_enabled() and hidden_calls.under_checkpoint()
            with torch.no_grad() if apart else contextlib.nullcontext():
                program = self.program(carrier, duals, inputs)
            followed = isinstance(program, Program) and not program.lost and not apart
        if not followed:
            self.programs[_PLAIN, ()] = Program(backend(graph, inputs))

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph, and the tangents of its inputs beside it.

        Where a checkpoint will run the plain graph again, and compare what is saved for the
        backward pass, the value is the plain graph's, and the tangents are computed apart, without
        gradient.
        """
        carrier, run = hidden_calls.active_carrier(), hidden_calls.active_second_run()
        duals = _duals(carrier, inputs)
        primals = [
            x if dual is None else dual.primal for x, dual in zip(inputs, duals, strict=True)
        ]
        if run is not None:
            run.mixes(self.mixes)
        for index in self.writes:
            if run is not None:
                run.remember(primals[index])
            if carrier is not None and duals[index] is None:
                carrier.writes.remember(primals[index])
        if carrier is None or not any(duals) or carrier.lost:
            return self._plain(carrier, primals)
        apart = torch.is_grad_enabled() and hidden_calls.under_checkpoint()
        with torch.no_grad() if apart else contextlib.nullcontext():
            program = self.program(carrier, duals, primals)
        if isinstance(program, DerivativeError):
            raise program
        if isinstance(program, Exception):
            return self.captured(*inputs)
        if program.lost:
            carrier.lost = True
            return self._plain(carrier, primals)
        moving = [dual for dual in duals if dual]
        if not apart:
            return self._dual(carrier, program, inputs, primals, moving)
        copies = [x.clone() if i in self.writes else x for i, x in enumerate(primals)]
        draws = replay.RandomState(moving[0].primal.device)
        values = self._plain(carrier, primals)
        with torch.no_grad():
            again = draws.replay(self._dual)(carrier, program, inputs, copies, moving)
        return tuple(_with_tangent(carrier, *pair) for pair in zip(values, again, strict=True))

    def _dual(
        self,
        carrier: Carrier,
        program: Program,
        inputs: Sequence[Any],
        primals: list[Any],
        duals: list[Dual],
    ) -> tuple[Any, ...]:
        """Run a program; return the outputs with their tangents, and give inputs that were written
        to their new ones.
        """
        rows = _rows(duals)
        size = _size(rows) if rows else None
        with hidden_calls.paused(carrier), torch._C.DisableTorchFunction():  # pyright: ignore
            tangents = [_resized(dual.tangent, dual.layout, size).contiguous() for dual in duals]
            chosen = [_padded(rows.chosen, size)] if rows else []
            out = program.run(*primals, *tangents, *chosen)  # type: ignore[misc]
        values, rest = list(out[: program.outputs]), iter(out[program.outputs :])
        for index, place in program.moving:
            layout = Layout(*place, rows) if place and rows else None
            values[index] = carrier.wrap(
                values[index], _resized(next(rest), layout, size, back=True), layout
            )
        for index, place in program.written:
            layout = Layout(*place, rows) if place and rows else None
            try:
                carrier.writes.put(
                    inputs[index], _resized(next(rest), layout, size, back=True), layout
                )
            except LostRowsError:
                carrier.lost = True
        return tuple(values)

    def _plain(self, carrier: Carrier | None, inputs: Sequence[Any]) -> Any:
        """Run the graph as it was captured, compiled, without tangents."""
        with hidden_calls.paused(carrier), torch._C.DisableTorchFunction():  # pyright: ignore
            program = self._kept(_PLAIN, inputs, self._make_plain)
            run = program.run if isinstance(program, Program) else None
            return self.captured(*inputs) if run is None else run(*inputs)

    # --- making programs

    def program(
        self, carrier: Carrier, duals: Sequence[Dual | None], inputs: Sequence[Any]
    ) -> Program | Exception:
        """Return the program for the inputs that move, or why there is none."""
        moving = tuple(Moving(i, _place(dual.layout)) for i, dual in enumerate(duals) if dual)
        rows = _rows([dual for dual in duals if dual])
        key = moving, _size(rows) if rows else None, torch.is_grad_enabled()
        with hidden_calls.paused(carrier):
            return self._kept(key, inputs, lambda setting: self._make(setting, moving, rows))

    def _kept(
        self, key: Any, inputs: Sequence[Any], make: Callable[["Setting"], Program]
    ) -> Program | Exception:
        """Return the program of a key, made once; or why it could not be made.

        Sizes that dynamo left open stay open in what is made while it captures, since it guards
        what that assumes of them. What is made later is made for the sizes of these inputs.
        """
        known = self.programs.get((key, ()))
        if known is not None:
            return known
        capturing, sizes = _guards.TracingContext.try_get() is not None, ()
        if self.open and not capturing:
            sizes = tuple(tuple(x.shape) if isinstance(x, Tensor) else x for x in inputs)
        if (key, sizes) not in self.programs:
            setting = Setting.of(inputs) if sizes else self.setting
            try:
                with setting.entered():
                    self.programs[key, sizes] = make(setting)
            except DerivativeError as error:
                self.programs[key, sizes] = error
            except Exception as error:
                if capturing and isinstance(error, RestartAnalysis):
                    raise  # dynamo captures again, with one number less left open
                self.programs[key, sizes] = error
                _warn_of(error)
        return self.programs[key, sizes]

    def _make_plain(self, setting: "Setting") -> Program:
        """Have the captured graph compiled."""
        return Program(self.backend(_copied(self.captured), setting.examples))

    def _make(self, setting: "Setting", moving: tuple[Moving, ...], rows: Rows | None) -> Program:
        """Trace a carrier over the captured graph, and have the dual graph compiled."""
        count, size = len(setting.examples), _size(rows) if rows else None
        with setting.fake:
            given = [_example(setting.examples[m.number], m.place, size) for m in moving]
            index = []
            if rows:
                where = rows.chosen.device
                index.append(torch.zeros(size, dtype=torch.int64, device=where))  # type: ignore
        facts: list[Program] = []

        def dual_graph(*flat: Any) -> list[Any]:
            inputs, tangents = list(flat[:count]), flat[count:]
            few = None if rows is None else Rows(tangents[-1], _batch(inputs, moving), size, True)  # type: ignore
            out, fact = _carried(self.captured, inputs, moving, tangents, few)
            facts.append(fact)
            return out

        examples = [*setting.examples, *given, *index]
        with setting.fake, _unpacked():
            trace = make_fx(dual_graph, pre_dispatch=True, _allow_non_fake_inputs=True)
            traced = trace(*examples)
        if facts[-1].lost:
            return facts[-1]
        _refuse_constants(traced)
        _tell_origin(self.captured, traced)
        return facts[-1]._replace(run=self.backend(traced, examples))


class _Steps(fx.Interpreter):
    """Runs a graph; shows a carrier the operators that take graphs, some of which no function mode
    sees.
    """

    def __init__(self, graph: fx.GraphModule, carrier: Carrier) -> None:
        super().__init__(graph)
        self.carrier = carrier

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call one function of the graph."""
        if isinstance(target, HigherOrderOperator):
            return self.carrier.carry(target, args, kwargs)
        return super().call_function(target, args, kwargs)


def _carried(
    captured: fx.GraphModule,
    inputs: list[Any],
    moving: Sequence[Moving],
    tangents: Sequence[Tensor],
    rows: Rows | None,
) -> tuple[list[Any], Program]:
    """Run a captured graph under a carrier; return outputs and tangents, and what is to be known
    of them.
    """
    carrier = Carrier(traced=True)
    first: dict[int, Tensor] = {}
    for (index, place), tangent in zip(moving, tangents, strict=False):
        layout = Layout(*place, rows) if place and rows else None
        inputs[index] = carrier.wrap(inputs[index], tangent, layout)
        first[index] = carrier.held(inputs[index]).tangent
    with carrier:
        values = _Steps(captured, carrier).run(*inputs)
    if carrier.lost:
        return [], Program(None, lost=True)
    outs: list[Any] = []
    found: list[Tensor] = []
    moved, written = [], []
    for i, value in enumerate(values):
        dual = carrier.dual(value) if isinstance(value, Tensor) else None
        held = getattr(value, "_flowspace_dual", None)
        outs.append(value if held is None else held.primal)
        if dual is not None:
            moved.append(Moving(i, _place(dual.layout)))
            found.append(dual.tangent.detach())
    for i, value in enumerate(inputs):
        dual = carrier.dual(value) if isinstance(value, Tensor) else None
        if dual is not None and dual.tangent is not first.get(i):
            written.append(Moving(i, _place(dual.layout)))
            found.append(dual.tangent.detach())
    return [*outs, *found], Program(None, len(outs), tuple(moved), tuple(written))


# --- graphs


def _unpacked() -> Any:
    """Let a trace save its tensors without the hooks of a checkpoint, which would count them."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _copied(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a graph that a backend may change without changing this one."""
    copied = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    _tell_origin(graph, copied)
    return copied


def _tell_origin(captured: fx.GraphModule, other: fx.GraphModule) -> None:
    """Tell a backend what dynamo told it of the inputs: above all which are parameters, whose
    memory stays where it is.
    """
    known = getattr(captured, "_param_name_to_source", None)
    held = [name for name, _ in (*other.named_parameters(), *other.named_buffers())]
    if known is None or any(name not in known for name in held):
        return
    other.meta, other._param_name_to_source = dict(captured.meta), known
    theirs, ours = (
        captured.graph.find_nodes(op="placeholder"),
        other.graph.find_nodes(op="placeholder"),
    )
    for node in ours:
        node._dynamo_source = None
    for old, new in zip(theirs, ours, strict=False):
        new._dynamo_source = old._dynamo_source
        if "tensor_dict" in old.meta:
            new.meta["tensor_dict"] = old.meta["tensor_dict"]


def _refuse_constants(traced: fx.GraphModule) -> None:
    """Raise if a tensor without values became a constant of a trace, which would be a tangent that
    was not followed.
    """
    for node in traced.graph.find_nodes(op="get_attr"):
        value = getattr(traced, str(node.target), None)
        if isinstance(value, torch._subclasses.FakeTensor):
            raise RuntimeError(f"{node.target} was not followed through the trace")


def _written_inputs(captured: fx.GraphModule, setting: Setting) -> list[int]:
    """Return the inputs that a graph writes into."""
    examples = setting.examples
    holders = {node: i for i, node in enumerate(captured.graph.find_nodes(op="placeholder"))}
    norms = [
        node
        for node in captured.graph.nodes
        if replay.batch_statistics(node.target, node.args, node.kwargs)
    ]
    found = {holders[x] for node in norms for x in node.all_input_nodes[1:3] if x in holders}
    before = [x._version if isinstance(x, Tensor) else 0 for x in examples]
    if any(str(node.target).rstrip("'>").endswith("_") for node in captured.graph.nodes):
        with setting.fake, torch.no_grad(), contextlib.suppress(Exception):
            captured(*examples)
    return sorted(
        found
        | {i for i, x in enumerate(examples) if isinstance(x, Tensor) and x._version != before[i]}
    )


def _mixes(captured: fx.GraphModule) -> bool:
    """Return whether a graph has a norm over the batch."""
    norms = (torch.nn.functional.batch_norm, torch.batch_norm)
    calls = [node for node in captured.graph.nodes if node.target in norms]
    return any(replay.batch_statistics(node.target, node.args, node.kwargs) for node in calls)


# --- rows and tangents


def _duals(carrier: Carrier | None, inputs: Sequence[Any]) -> list[Dual | None]:
    if carrier is None:
        return [None] * len(inputs)
    return [carrier.dual(x) if isinstance(x, Tensor) else None for x in inputs]


def _with_tangent(carrier: Carrier, value: Any, other: Any) -> Any:
    """Return a value with the tangent of another one."""
    dual = carrier.dual(other) if isinstance(other, Tensor) else None
    return value if dual is None else carrier.wrap(value, dual.tangent, dual.layout)


def _rows(duals: Sequence[Dual]) -> Rows | None:
    return next((dual.layout.rows for dual in duals if dual.layout), None)


def _place(layout: Layout | None) -> Place:
    """Return where rows lie, in numbers.

    Raises:
        ValueError: if that depends on a size that was left open.
    """
    if layout is None:
        return None
    outer, inner = (
        x.node.maybe_as_int() if isinstance(x, torch.SymInt) else x for x in layout[1:3]
    )
    if outer is None or inner is None:
        raise ValueError("rows lie in blocks of a size that torch.compile left open")
    return layout.axis, outer, inner


def _batch(inputs: Sequence[Any], moving: Sequence[Moving]) -> Any:
    """Return the batch's size, which may be a symbol, from an input with a known batch axis."""
    index, (axis, outer, inner) = next((m.number, m.place) for m in moving if m.place)
    return inputs[index].shape[axis] // (outer * inner)


def _size(rows: Rows) -> int:
    """Return how many moving rows a graph has: the next multiple of a share of the batch."""
    share = max(1, rows.batch // SHARES)
    return min(rows.batch, -(-rows.few // share) * share)


def _padded(chosen: Tensor, size: int | None) -> Tensor:
    """Return as many numbers of rows: the last is repeated, and computed more than once."""
    if size is None or len(chosen) == size:
        return chosen
    return torch.cat([chosen, chosen[-1:].expand(size - len(chosen))])


def _resized(
    tangent: Tensor, layout: Layout | None, size: int | None, back: bool = False
) -> Tensor:
    """Return a tangent with room for as many rows, or shortened back to those that move."""
    if layout is None or size is None or size == layout.rows.few:
        return tangent
    axis, outer, inner, rows = layout
    apart = tangent.unflatten(axis, (outer, size if back else rows.few, inner))
    if back:
        return apart.narrow(axis + 1, 0, rows.few).flatten(axis, axis + 2)
    index = torch.arange(size, device=tangent.device).clamp_(max=rows.few - 1)
    return apart.index_select(axis + 1, index).flatten(axis, axis + 2)


def _example(primal: Tensor, place: Place, size: int | None) -> Tensor:
    """Return a tensor of the shape of a tangent, in the fake mode that is on."""
    shape = list(primal.shape)
    if place is not None:
        shape[place[0]] = place[1] * size * place[2]  # type: ignore[operator]
    return torch.empty(shape, dtype=primal.dtype, device=primal.device)


def _warn_of_limit() -> None:
    """Warn where a function is captured for the last time that torch.compile allows it."""
    capture, limit = (
        _guards.CompileContext.current_compile_id(),
        torch._dynamo.config.recompile_limit,
    )
    if capture is not None and capture.frame_compile_id == limit - 1:
        warnings.warn(
            f"a compiled part of the model was captured {limit} times, since what its Python "
            "depends on changes from call to "
            "call (TORCH_LOGS=recompiles says what); torch.compile captures no more of it, and "
            "what differs again runs "
            "uncompiled, beside its tangents; it is right, and slower",
            stacklevel=3,
        )


_warned: set[str] = set()


def _warn_of(error: Exception) -> None:
    first = next(iter(str(error).splitlines()), "")
    reason = f"{type(error).__name__}: {first}"[:200]
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"a compiled part of the model runs uncompiled, beside its tangents ({reason}); it is "
            "right, and slower",
            stacklevel=3,
        )
