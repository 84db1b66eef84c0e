"""Compiled parts of a model, run with their tangents.

torch.compile captures a function as a graph of torch functions, and guards everything that its
Python depended on: shapes, dtypes, train or eval, attributes, hooks, grad mode, autocast. None of
that is done again here. While a carrier is active, the backend that the user chose is handed
another graph than the captured one:

    captured graph    inputs                                  torch functions, captured by dynamo
                      -> outputs
    dual graph        inputs, tangents, indices of rows       a carrier run over the captured
                      -> outputs, their tangents              graph, traced by make_fx

No dual tensor is left in the dual graph, only arithmetic. The backend fuses, plans and partitions
it as it would the captured one, attention of the value stays fused, and gradients flow through the
value alone. What dynamo leaves to Python between two graphs is carried function by function.

The way of a call:

1. dynamo captures a function and asks `Backend`, which makes a `Region` of the graph.
2. A call of the region looks for the `Program` of its case: which inputs move, how many rows have
   a tangent, and whether gradients are recorded.
3. If there is none, a carrier runs over the captured graph on tensors without values (`_carried`),
   make_fx writes down what it does, and the user's backend compiles that.
4. The program is given primals, tangents and indices; its outputs are wrapped as aliases again.

The moving rows change from call to call, and a graph has room for a fixed number of them. That is
rounded up to a share of the batch, and the indices are padded: the last row is computed more than
once. What cannot be traced runs as it was captured, function by function, with one warning.
"""

import contextlib
import copy
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, _guards, _refs, fx, nn
from torch._C._autograd import _get_data_attr as data_of  # pyright: ignore
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import config as dynamo_config
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.exc import RestartAnalysis, SkipFrame
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flowspace.derivatives import hidden_calls, replay
from flowspace.derivatives.rules.dual import ChosenRows, Dual, Layout, LostRowsError
from flowspace.derivatives.shared_primal.carrier import FIELD, Carrier
from flowspace.derivatives.shared_primal.higher_order import GraphRunner, body_of
from flowspace.derivatives.shared_primal.writes import memory_below
from flowspace.derivatives.torch_internals import left_after_errors, not_intercepted
from flowspace.errors import DerivativeError

__all__ = ["Backend", "Region", "warn_of", "warn_of_limit"]

SHARES = 4
"""A graph has room for a number of moving rows that is a multiple of this share of the batch."""

TOO_MANY = (
    "its sizes, or whole numbers that it is given, change from call to call: {} were compiled"
)
"""Why sizes that torch.compile left open have no program."""

_PLAIN = "plain"
"""The key of the program without tangents."""

Function = Callable[..., Any]
"""What runs a graph, or compiles one."""

Values = Sequence[Any]
"""Inputs or outputs of a graph: tensors, numbers, None."""

Duals = Sequence[Dual | None]
"""For each of several values what it carries, or None."""

Place = tuple[int, int, int] | None
"""The axis, outer and inner numbers of a `Layout`; None where a tangent has every row."""


class Moving(NamedTuple):
    """One of several tensors that has a tangent.

    Attributes:
        number: which one it is.
        place: where the batch lies in it.
    """

    number: int
    place: Place


class Program(NamedTuple):
    """A compiled graph, and how its outputs are read.

    Attributes:
        run: takes inputs, tangents of those that move, and indices of rows, if some rows are left
            out; returns outputs, tangents of those that move, and the new tangents of inputs that
            were written to. It is None if rows mix.
        outputs: how many outputs the captured graph has.
        moving: the outputs that move.
        written: the inputs that have another tangent afterwards.
        lost: rows mix, or a tangent lies where it cannot be followed: there is no dual graph for
            some of the rows.
        room: how many moving rows it takes; None: all of them.
    """

    run: Function | None
    outputs: int = 0
    moving: tuple[Moving, ...] = ()
    written: tuple[Moving, ...] = ()
    lost: bool = False
    room: int | None = None


class Backend:
    """A backend of torch.compile that has dual graphs compiled by another backend.

    Two of them are equal if these are, so that dynamo does not capture a function again.
    """

    def __init__(self, backend: Function) -> None:
        self.backend = backend

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Backend) and self.backend == other.backend

    def __hash__(self) -> int:
        return hash(Backend)

    def __call__(self, graph: fx.GraphModule, inputs: Values) -> "Region":
        """Return what runs a captured graph."""
        _refuse_open_numbers(graph)
        return Region(graph, inputs, self.backend)


class TraceContext(NamedTuple):
    """What a graph is traced and compiled with.

    Attributes:
        examples: its inputs without values; sizes may be symbols.
        fake: the mode that these belong to.
        tracing: what dynamo tells a backend beside the graph.
    """

    examples: list[Any]
    fake: Any
    tracing: Any

    @classmethod
    def of(cls, inputs: Values) -> "TraceContext":
        """Return the context of a capture that is going on, or one made for these inputs."""
        tracing = _guards.TracingContext.try_get()
        fake = _fake_mode(inputs, tracing)
        if tracing is None:
            tracing = _guards.TracingContext(fake)
        examples = list(inputs)
        for i, value in enumerate(inputs):
            if isinstance(value, Tensor):
                examples[i] = _without_values(value, fake, tracing)
        return cls(examples, fake, tracing)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Enter the context that dynamo captured the graph in, also after the capture."""
        if _guards.TracingContext.try_get() is not None:
            yield
            return
        with _guards.tracing(self.tracing):
            yield


def _fake_mode(inputs: Values, tracing: Any) -> Any:
    """Return the mode of inputs without values, or that of the capture, or a new one."""
    for value in inputs:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    if tracing is not None and tracing.fake_mode:
        return tracing.fake_mode
    return FakeTensorMode()


def _without_values(tensor: Tensor, fake: Any, tracing: Any) -> Tensor:
    """Return a tensor without values, with the symbols for sizes that dynamo gave it."""
    if isinstance(tensor, FakeTensor):
        return tensor
    symbols, source = tracing.tensor_to_context.get(tensor), None
    if symbols is not None:
        source = symbols.tensor_source
    with not_intercepted():
        return fake.from_tensor(tensor, symbolic_context=symbols, source=source)


def _has_symbols(value: Any) -> bool:
    """Return whether a size, or a size of a tensor, was left open by torch.compile."""
    if isinstance(value, Tensor):
        return any(map(_has_symbols, value.shape))
    return isinstance(value, torch.SymInt | torch.SymFloat)


class Region:
    """A captured graph, with the programs that were made of it.

    Attributes:
        backend: compiles graphs.
        captured: the graph as dynamo captured it.
        followed: the same, to be run under a carrier.
        context: what it was captured with.
        dynamic: sizes were left open.
        writes: the inputs that it writes into.
        mixes: it has a norm over the batch.
        frame: the number of the function that it was captured of, the same in each capture.
        programs: by case and sizes, a program, or the error that there was instead of it.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Values, backend: Function) -> None:
        self.backend = backend
        self.captured = _copied(graph)
        self.followed = _made_visible(self.captured)
        self.context = TraceContext.of(inputs)
        self.dynamic = any(_has_symbols(x) for x in self.context.examples)
        self.writes = _written_inputs(self.captured, self.context)
        self.mixes = _mixes(self.captured)
        capture = _guards.CompileContext.current_compile_id()
        self.frame = capture.frame_id if capture is not None else None
        self.programs: dict[Any, Program | Exception] = {}
        if not self._prepared(inputs):
            self.programs[_PLAIN, ()] = Program(backend(graph, inputs))

    def _prepared(self, inputs: Values) -> bool:
        """Make the program of the first call while dynamo captures; return whether it suffices.

        The graph without tangents is compiled at once only where the first call needs it.
        """
        carrier = hidden_calls.active_carrier()
        if carrier is None or carrier.lost:
            return False
        try:
            duals = _duals_of(carrier, inputs)
        except DerivativeError:  # raised by the call itself, where dynamo does not turn it
            return False
        if not any(duals):
            return False
        program = self.program(carrier, duals, inputs)
        if isinstance(program, Exception) or program.lost:
            return False
        return not _value_recomputed()

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph, and the tangents of its inputs beside it."""
        carrier = hidden_calls.active_carrier()
        out = self._call(carrier, inputs)
        if carrier is None:
            return out
        if not carrier.lost:
            _mark_detached(carrier, inputs, out)
        if carrier.watch is not None:
            carrier.watch.made(out, carrier.derived(inputs))
        return out

    def _call(self, carrier: Carrier | None, inputs: Values) -> Any:
        """Run the graph under a carrier, if there is one."""
        duals = _duals_of(carrier, inputs)
        primals = list(inputs)
        for i, dual in enumerate(duals):
            if dual is not None:
                primals[i] = dual.primal
        if self._writes_below(carrier, duals, primals):
            warn_of(ValueError("it writes through x.detach() or x.data into what moves"))
            with left_after_errors():
                return self.followed(*inputs)
        self._announce_writes(carrier, duals, primals)
        if carrier is None or carrier.lost or not any(duals):
            return self._run_plain(carrier, primals)
        program = self.program(carrier, duals, primals)
        if isinstance(program, DerivativeError):
            raise program
        if isinstance(program, Exception):
            with left_after_errors():
                return self.followed(*inputs)
        if program.lost:
            carrier.lost = True
            return self._run_plain(carrier, primals)
        moving = [dual for dual in duals if dual is not None]
        run = self._run_dual
        if _value_recomputed():
            run = self._run_separately
        # what is done round the program is not the model: the carrier does not meet it
        with not_intercepted():
            return run(carrier, program, inputs, primals, moving)

    def _writes_below(self, carrier: Carrier | None, duals: Duals, primals: Values) -> bool:
        """Return whether the graph writes, through a detached tensor, into memory that moves."""
        if carrier is None or not self.writes or not carrier.has_detached:
            return False
        with not_intercepted():
            return any(duals[i] is None and carrier.writes_below(primals[i]) for i in self.writes)

    def _announce_writes(self, carrier: Carrier | None, duals: Duals, primals: Values) -> None:
        """Tell a second run and a carrier what the graph is about to write into."""
        run = hidden_calls.active_second_run()
        if run is None and not self.writes:
            return
        with not_intercepted():
            if run is not None:
                run.mixes(self.mixes)
            for i in self.writes:
                if run is not None:
                    run.remember(primals[i])
                if carrier is not None and duals[i] is None:
                    carrier.writes.about_to_write(primals[i])

    def _run_dual(
        self,
        carrier: Carrier,
        program: Program,
        inputs: Values,
        primals: list[Any],
        duals: list[Dual],
    ) -> tuple[Any, ...]:
        """Run a program; return outputs as aliases with their tangents.

        Inputs that were written to are given their new tangents.
        """
        chosen = _chosen_of(duals)
        size = program.room
        # A graph is compiled for tangents as `_dual_examples` makes them: contiguous.
        tangents = []
        for dual in duals:
            tangent = _padded(dual.tangent, dual.layout, size)
            tangents.append(tangent.contiguous())
        with hidden_calls.Paused(carrier):
            out = program.run(*primals, *tangents, *_indices(chosen, size))  # type: ignore[misc]
        # What comes out: outputs, tangents of those that move, tangents of inputs written to.
        values = list(out[: program.outputs])
        derivatives = iter(out[program.outputs :])
        for i, place in program.moving:
            layout = _layout(place, chosen)
            tangent = _shortened(next(derivatives), layout, size)
            values[i] = carrier.wrap(values[i], tangent, layout)
        for i, place in program.written:
            layout = _layout(place, chosen)
            tangent = _shortened(next(derivatives), layout, size)
            try:
                carrier.writes.put(inputs[i], tangent, layout)
            except LostRowsError:
                carrier.lost = True
        return tuple(values)

    def _run_separately(
        self,
        carrier: Carrier,
        program: Program,
        inputs: Values,
        primals: list[Any],
        duals: list[Dual],
    ) -> tuple[Any, ...]:
        """Run the plain graph for the value, and a program without gradient for the tangents.

        A checkpoint will run the plain graph again, and compare what both save for the backward
        pass, so the value has to be the plain graph's here too. Both runs draw the same random
        numbers, and the second writes into copies.
        """
        # cloned before the plain graph writes into them
        copies = list(primals)
        for i in self.writes:
            copies[i] = primals[i].clone()
        state = replay.RandomState(duals[0].primal.device)
        values = self._run_plain(carrier, primals)
        with torch.no_grad():
            others = state.replay(self._run_dual)(carrier, program, inputs, copies, duals)
        outputs = []
        for value, other in zip(values, others, strict=True):
            outputs.append(_with_tangent_of(other, value, carrier))
        return tuple(outputs)

    def _run_plain(self, carrier: Carrier | None, inputs: Values) -> Any:
        """Run the graph as it was captured, compiled, without tangents."""
        with hidden_calls.Paused(carrier), not_intercepted():
            program = self._program_for(_PLAIN, inputs, self._make_plain)
            if isinstance(program, Program) and program.run is not None:
                return program.run(*inputs)
            return self.captured(*inputs)

    # --- making programs

    def program(self, carrier: Carrier, duals: Duals, inputs: Values) -> Program | Exception:
        """Return the program for the inputs that move, or why there is none.

        Where the value is the plain graph's, the program records no gradient.
        """
        moving = _moving(duals)
        chosen = _chosen_of([dual for dual in duals if dual is not None])
        gradient = torch.is_grad_enabled() and not _value_recomputed()
        case = moving, self._room(moving, chosen, gradient), gradient
        known = self.programs.get((case, ()))
        if known is not None:
            return known
        with hidden_calls.Paused(carrier), torch.set_grad_enabled(gradient):
            return self._program_for(
                case, inputs, lambda c: self._make(c, case[0], chosen, case[1])
            )

    def _room(
        self, moving: tuple[Moving, ...], chosen: ChosenRows | None, gradient: bool
    ) -> int | None:
        """Return how many moving rows a program is to have room for; None: for all.

        Where sizes were left open, a program that has room enough serves smaller batches too; the
        first one has room for as many rows as moved before the sizes were seen to change.
        """
        if chosen is None:
            return None
        room = _room(chosen)
        if self.dynamic:
            known = []
            for case, sizes in self.programs:
                if sizes == () and case != _PLAIN and (case[0], case[2]) == (moving, gradient):
                    known.append(case[1])
            enough = [size for size in known if size is not None and size >= chosen.few]
            if enough:
                return min(enough)
            before = min(_most_rows.get(self.frame, 0), MOST_PADDING * chosen.batch)
            room = max(room, before) | 1  # odd: a batch of that size asks for another capture
            if room == chosen.batch:
                room += 2
        _most_rows[self.frame] = max(_most_rows.get(self.frame, 0), room)
        return room

    def _program_for(
        self, case: Any, inputs: Values, make: Callable[[TraceContext], Program]
    ) -> Program | Exception:
        """Return the program of a case, made once; or why it could not be made.

        Sizes that dynamo left open stay open in what is made while it captures, since it guards
        what that assumes of them. What is made later is made for the sizes of these inputs, of
        which there may be as many as torch.compile captures one function.
        """
        program = self.programs.get((case, ()))
        if program is not None:
            return program
        capturing = _guards.TracingContext.try_get() is not None
        context, sizes = self.context, ()
        # Outside a capture nobody would guard what a trace assumes of open sizes.
        if self.dynamic and not capturing:
            sizes = _sizes(inputs)
            program = self.programs.get((case, sizes))
            if program is not None:
                return program
            if self._too_many(sizes):
                error = RuntimeError(TOO_MANY.format(dynamo_config.recompile_limit))
                warn_of(error)
                return error
            context = TraceContext.of(inputs)
        try:
            # torch.compile traces in one thread at a time, and this is no less of a trace
            with compile_lock, context.entered(), left_after_errors():
                program = make(context)
        except Exception as error:
            if capturing and isinstance(error, RestartAnalysis):
                raise  # dynamo captures again, with one number less left open
            if _is_of_a_signal(error):
                raise
            if capturing and self.dynamic:
                return error  # the call, whose sizes are known, may be traced nevertheless
            program = error
            if not isinstance(error, DerivativeError):
                warn_of(error)
        self.programs[case, sizes] = program
        return program

    def _too_many(self, sizes: tuple[Any, ...]) -> bool:
        """Return whether programs were made for as many other sizes as there may be."""
        others = {known for _, known in self.programs if known not in ((), sizes)}
        return len(others) >= dynamo_config.recompile_limit

    def _make_plain(self, context: TraceContext) -> Program:
        """Have the captured graph compiled."""
        return Program(self.backend(_copied(self.captured), context.examples))

    def _make(
        self,
        context: TraceContext,
        moving: tuple[Moving, ...],
        chosen: ChosenRows | None,
        size: int | None,
    ) -> Program:
        """Trace a carrier over the captured graph, and have the dual graph compiled, with room for
        so many moving rows.
        """
        count = len(context.examples)
        made: list[Program] = []

        def dual_graph(*flat: Any) -> list[Any]:
            inputs, tangents = list(flat[:count]), flat[count:]
            in_trace = None
            if chosen is not None and size is not None:
                in_trace = ChosenRows(tangents[-1], _batch(inputs, moving), size, True)
            out, program = _carried(self.followed, inputs, moving, tangents, in_trace)
            made.append(program)
            return out

        examples = [*context.examples, *_dual_examples(context, moving, chosen, size)]
        # pre_dispatch: the trace stays above autograd and autocast, so the backend differentiates
        # the value as it would in the captured graph. Parameters that the captured graph holds
        # itself are not fake.
        with context.fake, _no_saving_hooks():
            trace = make_fx(dual_graph, pre_dispatch=True, _allow_non_fake_inputs=True)
            traced = trace(*examples)
        if made[-1].lost:  # kept as well: the next call with these inputs needs no trace
            return made[-1]
        _refuse_constants(traced)
        _pass_origin_on(self.captured, traced)
        return made[-1]._replace(run=self.backend(traced, examples), room=size)


def _carried(
    captured: fx.GraphModule,
    inputs: list[Any],
    moving: Sequence[Moving],
    tangents: Sequence[Tensor],
    chosen: ChosenRows | None,
) -> tuple[list[Any], Program]:
    """Run a captured graph under a carrier.

    Returns:
        outputs, then tangents; and a program that cannot run yet, which tells how to read them.
    """
    carrier = Carrier(traced=True)
    # An input whose tangent is another one afterwards was written to in place.
    before: dict[int, Tensor] = {}
    # the last tangent may be the indices of the rows
    for (i, place), tangent in zip(moving, tangents, strict=False):
        inputs[i] = carrier.wrap(inputs[i], tangent, _layout(place, chosen))
        before[i] = carrier.held(inputs[i]).tangent
    with carrier:
        values = GraphRunner(captured, carrier).run(*inputs)
    if carrier.lost:
        return [], Program(None, lost=True)
    outputs = [_primal(value) for value in values]
    moved = _duals_of(carrier, values)
    written = _duals_of(carrier, inputs)
    for i, dual in enumerate(written):
        if dual is not None and dual.tangent is before.get(i):
            written[i] = None
    for dual in (*moved, *written):
        if dual is not None:
            outputs.append(dual.tangent.detach())
    return outputs, Program(None, len(moved), _moving(moved), _moving(written))


def _primal(value: Any) -> Any:
    """Return the primal of an alias, and any other value as it is."""
    held = getattr(value, FIELD, None)
    if held is None:
        return value
    return held.primal


# --- graphs


def _value_recomputed() -> bool:
    """Return whether a checkpoint will run this part again for its backward pass."""
    return torch.is_grad_enabled() and hidden_calls.under_checkpoint()


def _no_saving_hooks() -> Any:
    """Let a trace save its tensors without the hooks of a checkpoint, which would count them.

    Where there are none, none are set: transforms of torch.func refuse any.
    """
    if not hidden_calls.under_checkpoint():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    """Return the tensor that was given."""
    return tensor


def _refuse_open_numbers(graph: fx.GraphModule) -> None:
    """Have dynamo leave a function to Python that changes a float of its own, such as a counter.

    dynamo makes the new number an output of the graph, and under a function mode the graph that
    comes here lacks it.

    Raises:
        SkipFrame: to dynamo, which runs the function as it is written from then on.
    """
    (output,) = graph.graph.find_nodes(op="output")
    if any(value is None for value in output.args[0]):  # type: ignore[union-attr]
        warn_of(ValueError("it changes a Python float of its own; make that a buffer"))
        raise SkipFrame


def _copied(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a graph that a backend may change without changing this one."""
    copied = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    _pass_origin_on(graph, copied)
    return copied


def _made_visible(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph, and of those in it, as of a checkpoint, where a carrier sees what
    dynamo writes in functions that no mode sees: torch.tensor of tensors that move, which is
    refused, and ``x.data``.
    """
    copied = _copied(graph)
    for name, body in copied.named_children():
        if isinstance(body, fx.GraphModule):
            setattr(copied, name, _made_visible(body))
    for node in copied.graph.find_nodes(op="call_function", target=_refs.tensor):
        node.target = _tensor
    for node in copied.graph.find_nodes(op="call_function", target=data_of):
        node.target = Tensor.detach
    copied.recompile()
    return copied


def _tensor(data: Any, **options: Any) -> Tensor:
    """Return torch.tensor of numbers and tensors.

    Raises:
        DerivativeError: if one of them carries a tangent.
    """
    for leaf in pytree.tree_leaves(data):
        held = getattr(leaf, FIELD, None)
        if held is not None and held.tangent is not None:
            raise DerivativeError(
                "torch has no forward derivative of torch.tensor of a tensor that moves with z_t "
                "or t: it takes a constant from it; write torch.stack([...]), or "
                "derivative=FiniteDifference()"
            )
    return _refs.tensor(data, **options)


def _placeholders(graph: fx.GraphModule) -> list[Any]:
    """Return the nodes that stand for a graph's inputs."""
    return list(graph.graph.find_nodes(op="placeholder"))


def _pass_origin_on(captured: fx.GraphModule, other: fx.GraphModule) -> None:
    """Tell a backend of another graph what dynamo told it of the captured graph's inputs.

    Above all it learns which of them are parameters, whose memory stays where it is.
    """
    names = getattr(captured, "_param_name_to_source", None)
    if names is None:
        return
    for name, _ in (*other.named_parameters(), *other.named_buffers()):
        if name not in names:
            return
    other.meta, other._param_name_to_source = dict(captured.meta), names
    # The first inputs of a dual graph are those of the captured one; tangents have no source.
    placeholders = _placeholders(other)
    for node in placeholders:
        node._dynamo_source = None
    for old, new in zip(_placeholders(captured), placeholders, strict=False):
        new._dynamo_source = old._dynamo_source
        if "tensor_dict" in old.meta:
            new.meta["tensor_dict"] = old.meta["tensor_dict"]


def _refuse_constants(traced: fx.GraphModule) -> None:
    """Raise RuntimeError if a tensor without values became a constant of a trace.

    It would be a tangent that was not followed.
    """
    for node in traced.graph.find_nodes(op="get_attr"):
        value = getattr(traced, str(node.target), None)
        if isinstance(value, FakeTensor):
            raise RuntimeError(f"{node.target} was not followed through the trace")


def _written_inputs(captured: fx.GraphModule, context: TraceContext) -> list[int]:
    """Return the numbers of the inputs that a graph writes into.

    Norms over the batch write into their running statistics; of other functions the operators
    tell, once the graph has been run on inputs without values, and where these hold graphs of
    their own, the versions that autograd counts.
    """
    written = _statistics(captured)
    seen, before = WrittenMemory(), _versions(context.examples)
    open_sizes = enable_python_dispatcher()
    with context.fake, seen, open_sizes, torch.no_grad(), contextlib.suppress(Exception):
        captured(*context.examples)
    for i, version in _versions(context.examples).items():
        value = context.examples[i]
        if version != before[i] or (_has_memory(value) and memory_below(value) in seen.memory):
            written.add(i)
    return sorted(written)


def _versions(inputs: Values) -> dict[int, int]:
    """Return by number how often autograd has seen each tensor written to."""
    return {i: x._version for i, x in enumerate(inputs) if isinstance(x, Tensor)}


class WrittenMemory(TorchDispatchMode):
    """Notes the memory that operators write into.

    Attributes:
        memory: where it lies.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.memory: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call an operator."""
        options = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return func(*args, **options)
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[i] if i < len(args) else options.get(argument.name)
            self.memory.update(
                memory_below(x) for x in pytree.tree_leaves(given) if _has_memory(x)
            )
        return func(*args, **options)


def _statistics(graph: fx.GraphModule) -> set[int]:
    """Return the numbers of the inputs that norms over the batch write into."""
    numbers = {node: i for i, node in enumerate(_placeholders(graph))}
    found: set[int] = set()
    for node in graph.graph.nodes:
        written: Sequence[Any] = ()
        body = body_of(node)
        if _over_batch(node):
            written = node.all_input_nodes[1:3]
        elif body is not None:
            inner, operands = body
            written = [operands[i] for i in _statistics(getattr(graph, inner.target))]
        found.update(numbers[x] for x in written if x in numbers)
    return found


def _nodes(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Iterate over the nodes of a graph and of those in it, as of a checkpoint."""
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def _over_batch(node: fx.Node) -> bool:
    """Return whether a node is a norm that uses the statistics of the batch."""
    arguments = replay.batch_statistics(node.target, node.args, node.kwargs)
    return arguments is not None


def _mixes(captured: fx.GraphModule) -> bool:
    """Return whether a graph has a norm over the batch."""
    norms = (torch.nn.functional.batch_norm, torch.batch_norm)
    return any(node.target in norms and _over_batch(node) for node in _nodes(captured))


# --- inputs, their tangents and where the rows lie


def _mark_detached(carrier: Carrier, inputs: Values, outputs: Values) -> None:
    """Mark the outputs that carry no tangent and share memory with an input that does, or with
    one that is marked.
    """
    at_rest = [x for x in outputs if isinstance(x, Tensor) and not hasattr(x, FIELD)]
    marked = [x for x in inputs if isinstance(x, Tensor) and hasattr(x, FIELD)]
    if not at_rest or not marked:
        return
    with not_intercepted():
        memory = {memory_below(x) for x in marked if _has_memory(x)}
        for value in at_rest:
            if _has_memory(value) and memory_below(value) in memory:
                carrier.detached(value)


def _has_memory(value: Any) -> bool:
    """Return whether a value is a tensor that others may share memory with."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def _duals_of(carrier: Carrier | None, values: Values) -> list[Dual | None]:
    """Return the dual of each value that carries a tangent, and None for the others."""
    duals: list[Dual | None] = [None] * len(values)
    if carrier is None:
        return duals
    mirrors = carrier.writes.mirrors
    with not_intercepted():
        for i, value in enumerate(values):
            if not isinstance(value, Tensor) or (type(value) is nn.Parameter and not mirrors):
                continue  # a parameter is never an alias, nor a view of one
            duals[i] = carrier.dual(value)
    return duals


def _with_tangent_of(other: Any, value: Any, carrier: Carrier) -> Any:
    """Return a value with the tangent that another one carries, if it carries any."""
    if not isinstance(other, Tensor):
        return value
    dual = carrier.dual(other)
    if dual is None:
        return value
    return carrier.wrap(value, dual.tangent, dual.layout)


def _moving(duals: Duals) -> tuple[Moving, ...]:
    """Return the number and the place of each dual."""
    moving = []
    for i, dual in enumerate(duals):
        if dual is not None:
            moving.append(Moving(i, _place(dual.layout)))
    return tuple(moving)


def _chosen_of(duals: Sequence[Dual]) -> ChosenRows | None:
    """Return the rows that have a tangent; None: all have."""
    for dual in duals:
        if dual.layout is not None:
            return dual.layout.chosen
    return None


def _place(layout: Layout | None) -> Place:
    """Return the numbers of a layout.

    Raises:
        ValueError: if one is a size that was left open.
    """
    if layout is None:
        return None
    outer = _whole_number(layout.outer)
    inner = _whole_number(layout.inner)
    return layout.axis, outer, inner


def _whole_number(size: Any) -> int:
    """Return a size as a number.

    Raises:
        ValueError: if it was left open.
    """
    if isinstance(size, torch.SymInt):
        size = size.node.maybe_as_int()
    if size is None:
        raise ValueError("rows lie in blocks of a size that torch.compile left open")
    return size


def _layout(place: Place, chosen: ChosenRows | None) -> Layout | None:
    """Return the layout of these rows at a place; None where a tangent has every row."""
    if place is None or chosen is None:
        return None
    return Layout(*place, chosen)


def _batch(inputs: Values, moving: Sequence[Moving]) -> Any:
    """Return the batch's size, which may be a symbol, from an input whose batch axis is known."""
    for i, place in moving:
        if place is not None:
            axis, outer, inner = place
            return inputs[i].shape[axis] // (outer * inner)
    raise ValueError("no input has a batch axis")


def _sizes(inputs: Values) -> tuple[Any, ...]:
    """Return the shapes of tensors and the values of other inputs."""
    sizes = list(inputs)
    for i, value in enumerate(inputs):
        if isinstance(value, Tensor):
            sizes[i] = tuple(value.shape)
    return tuple(sizes)


MOST_PADDING = 2
"""A program for open sizes has room for at most so many times the rows of the batch it is made
for.
"""

_most_rows: dict[int | None, int] = {}
"""By the number of a function, for how many moving rows there was room in a program of it."""


def _room(chosen: ChosenRows) -> int:
    """Return how many moving rows a graph has room for.

    It is the next multiple of a share of the batch, and never the batch: the axis that holds the
    batch in a tensor is found by another number of rows.
    """
    share = max(1, chosen.batch // SHARES)
    size = -(-chosen.few // share) * share
    if size < chosen.batch:
        return size
    return max(chosen.few, chosen.batch - 1)


def _indices(chosen: ChosenRows | None, size: int | None) -> list[Tensor]:
    """Return the indices of the moving rows, padded by repeating the last; none if all move."""
    if chosen is None:
        return []
    indices = chosen.indices
    if size is None or len(indices) == size:
        return [indices]
    last = indices[-1:].expand(size - len(indices))
    return [torch.cat([indices, last])]


def _padded(tangent: Tensor, layout: Layout | None, size: int | None) -> Tensor:
    """Return a tangent with room for so many rows, in which the last row is repeated."""
    if layout is None or size is None or size == layout.chosen.few:
        return tangent
    axis, outer, inner, chosen = layout
    blocks = tangent.unflatten(axis, (outer, chosen.few, inner))
    index = torch.arange(size, device=tangent.device).clamp_(max=chosen.few - 1)
    return blocks.index_select(axis + 1, index).flatten(axis, axis + 2)


def _shortened(tangent: Tensor, layout: Layout | None, size: int | None) -> Tensor:
    """Return the tangent of the rows that move, from one with room for so many."""
    if layout is None or size is None or size == layout.chosen.few:
        return tangent
    axis, outer, inner, chosen = layout
    blocks = tangent.unflatten(axis, (outer, size, inner))
    return blocks.narrow(axis + 1, 0, chosen.few).flatten(axis, axis + 2)


def _dual_examples(
    context: TraceContext,
    moving: Sequence[Moving],
    chosen: ChosenRows | None,
    size: int | None,
) -> list[Tensor]:
    """Return tangents, and indices of rows, without values, as a dual graph takes them."""
    examples = []
    with context.fake:
        for i, place in moving:
            primal = context.examples[i]
            shape = list(primal.shape)
            if place is not None and size is not None:
                axis, outer, inner = place
                shape[axis] = outer * size * inner
            dtype, device = primal.dtype, primal.device
            examples.append(torch.empty(shape, dtype=dtype, device=device))
        if chosen is not None and size is not None:
            device = chosen.indices.device
            examples.append(torch.zeros(size, dtype=torch.int64, device=device))
    return examples


# --- warnings


def warn_of_limit(limit: int) -> None:
    """Warn where a function was captured for the last time that torch.compile allows it."""
    warnings.warn(
        f"a compiled part of the model was captured {limit} times, since what its Python depends "
        "on changes from call to call (TORCH_LOGS=recompiles says what); torch.compile captures "
        "no more of it, and what differs again runs uncompiled, beside its tangents; it is right, "
        "and slower",
        stacklevel=3,
    )


_warned: set[str] = set()
"""The reasons that a warning was given for."""


def warn_of(error: Exception) -> None:
    """Warn, once for each reason, that a part runs uncompiled."""
    lines = str(error).splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0]}"[:200]
    if reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        f"a compiled part of the model runs uncompiled, beside its tangents ({reason}); it is "
        "right, and slower",
        stacklevel=3,
    )


def _is_of_a_signal(error: Exception) -> bool:
    """Return whether a signal handler of the user raised an error, which says nothing of a trace.

    Python runs it wherever the program happens to be: a trace takes seconds.
    """
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = [getattr(handler, "__code__", None) for handler in handlers]
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(frame.f_code in codes for frame in frames)
