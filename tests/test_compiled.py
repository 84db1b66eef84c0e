"""SharedPrimal on compiled models: the eager route's value, derivative, gradient, draws and
buffers, and never a stale graph.

The logic is tested with ``aot_eager``, which traces and partitions as inductor does and compiles
nothing; few tests use inductor.
"""

import copy
import dataclasses
import functools
import itertools
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from programs import choose
from tolerances import TRAINED, within
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.convert_frame import compile_lock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from flowspace import (
    ConsistencyLoss,
    CrossFlowLoss,
    DerivativeError,
    FiniteDifference,
    FlowMatchingLoss,
    ForwardMode,
    ImprovedMeanFlowLoss,
    MeanFlowLoss,
    PixelMeanFlowLoss,
    SharedPrimal,
    objectives,
)
from flowspace.backends.process import forward_mode_lock
from flowspace.demo.networks import SmallViT, ViTSize
from flowspace.derivatives import hidden_calls, route, shared_primal
from flowspace.derivatives.shared_primal import compiled, contexts

pytestmark = [
    pytest.mark.skipif(
        not hidden_calls.follows_compiled(), reason="torch.compile is met from torch 2.11 on"
    ),
    pytest.mark.filterwarnings("ignore:.*recompile_limit.*"),
    # torch.compile looks at the gradient of every input
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
EAGER = "aot_eager"
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
LOSS = MeanFlowLoss()


@pytest.fixture
def programs(monkeypatch):
    """Every dual graph that is traced is appended."""
    made, make = [], compiled.Region._make
    monkeypatch.setattr(
        compiled.Region, "_make", lambda self, *args: made.append(self) or make(self, *args)
    )
    return made


def column(t):
    return t[:, None, None]


class Block(nn.Module):
    """Attention with a written-out norm, whose rsqrt has no rule, and a rate of dropout that may
    change.
    """

    def __init__(self, width=8, drop=0.0):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.mlp = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.drop = drop

    def forward(self, h):
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        h = h + F.dropout(
            self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), self.drop
        )
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
        return h + F.gelu(self.mlp(h))


class Net(nn.Module):
    def __init__(self, drop=0.0, saved=None, count=1):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block(drop=drop) for _ in range(count))
        self.saved = saved or (lambda block, h: block(h))

    def forward(self, z, t, s):
        h = self.first(z) * (1 + column(t)) + column(s)
        for block in self.blocks:
            h = self.saved(block, h)
        return self.last(h)


def compile_whole(net, **options):
    net.compile(**({"backend": EAGER} | options))
    return net


def compile_blocks(net, **options):
    for block in net.blocks:
        block.compile(**({"backend": EAGER} | options))
    return net


def as_optimized_module(net, **options):
    return torch.compile(net, **({"backend": EAGER} | options))


HOW = {
    "whole": compile_whole,
    "blocks": compile_blocks,
    "torch.compile": as_optimized_module,
    "fullgraph": functools.partial(as_optimized_module, fullgraph=True),
    "dynamic": functools.partial(as_optimized_module, dynamic=True),
}


def pair(net, how=compile_whole):
    """Return a net that is compiled and one, with the same weights, that is not."""
    torch.manual_seed(0)
    net = net().double() if callable(net) and not isinstance(net, nn.Module) else net.double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return how(copy.deepcopy(net)), net


# --- how often a model is evaluated


@pytest.mark.parametrize("how", [lambda net: net, compile_blocks], ids=["eager", "blocks"])
def test_each_of_several_processes_evaluates_once_whatever_rows_move(monkeypatch, how):
    """A permutation puts the batch on an axis that is found by its number of rows. Where all of
    them moved it was not found, and the others waited for a process that evaluated twice.
    """
    monkeypatch.setattr(route, "several_processes", lambda: True)
    passes, evaluate_beside = [], shared_primal.evaluate_beside
    monkeypatch.setattr(
        shared_primal,
        "evaluate_beside",
        lambda *args: passes.append(args) or evaluate_beside(*args),
    )
    model, written = pair(Net(count=2), how)
    torch.manual_seed(0)
    z, v = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    t = torch.rand(8, dtype=torch.float64)
    primals, tangents = (z, t, t / 2), (v, torch.ones_like(t), None)
    _, wanted = ForwardMode()(written, primals, tangents)
    for count in range(len(z) + 1):
        rows = torch.arange(len(z)) < count
        _, found = SharedPrimal()(model, primals, tangents, rows=rows)
        close(found, torch.where(rows[:, None, None], wanted, 0.0))
        assert len(passes) == count + 1


def batch(rows=8, moving=4, seed=0):
    draw = functools.partial(
        torch.randn, rows, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    t = torch.linspace(0.3, 0.9, rows, dtype=torch.float64)
    s = torch.where(torch.arange(rows) < moving, 0.4 * t, t)
    return draw(), {"noise": draw(), "t": t, "s": s}


close = within(TRAINED)


def outcome(net, given, loss=LOSS):
    """Return value, residual, gradients, buffers and the state of the generator after one step."""
    torch.manual_seed(1)
    z, times = given
    net.zero_grad()
    out = loss(net, z, **times)
    if out.loss.requires_grad:
        out.loss.sum().backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    buffers = [b.clone() for b in net.buffers()]
    return [
        out.prediction.detach(),
        out.residual,
        *gradients,
        *buffers,
        torch.get_rng_state().double(),
    ]


def same(net, plain, given=None, loss=LOSS, tolerance=1e-9):
    given = given or batch()
    found, wanted = outcome(net, given, loss), outcome(plain, given, loss)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        close(a, b, tolerance)


# --- a compiled model in, a compiled derivative out


def told(caught):
    """Return what we warned of."""
    return [str(w.message) for w in caught if "compiled part" in str(w.message)]


@pytest.mark.parametrize("how", HOW)
def test_it_is_the_eager_routes(how, programs):
    net, plain = pair(Net(0.3), HOW[how])
    with warnings.catch_warnings(record=True) as caught:
        same(net, plain)
        same(net, plain, batch(6, 3, seed=2))
        same(net, plain, batch(8, 8))
    assert programs and not told(caught)


@pytest.mark.parametrize("moving", [1, 3, 8])
def test_it_is_forward_modes(moving):
    net, plain = pair(Net())
    z, times = batch(moving=moving)
    same_value = outcome(plain, (z, times), MeanFlowLoss(derivative=ForwardMode()))[1]
    close(outcome(net, (z, times))[1], same_value)


def test_equal_blocks_share_one_graph(programs):
    net, plain = pair(Net(count=3), compile_blocks)
    same(net, plain)
    same(net, plain, batch(seed=5))
    assert len(programs) == 1


def test_the_users_backend_compiles_the_dual_graph_with_what_it_was_given():
    graphs = []

    def backend(graph, inputs, *, note=None):
        graphs.append((graph, note))
        return torch._dynamo.lookup_backend(EAGER)(graph, inputs)

    net, plain = pair(
        Net(), functools.partial(compile_whole, backend=functools.partial(backend, note="kept"))
    )
    same(net, plain)
    assert [note for _, note in graphs] == ["kept"]
    targets = {str(node.target) for node in graphs[0][0].graph.nodes}
    assert "aten.scaled_dot_product_attention.default" in targets, (
        "attention of the value stays one operator"
    )
    assert not any("dual" in target for target in targets)


def test_two_backends_do_not_share_a_graph():
    seen = []

    def backend(name, graph, inputs):
        seen.append(name)
        return torch._dynamo.lookup_backend(EAGER)(graph, inputs)

    for name in ("a", "b"):
        net, plain = pair(
            Net(), functools.partial(compile_whole, backend=functools.partial(backend, name))
        )
        same(net, plain)
    assert seen == ["a", "b"]


@pytest.mark.parametrize("moving", [(4, 3, 4, 2, 4), (6, 5, 6)])
def test_another_number_of_moving_rows_needs_no_new_graph(moving, programs):
    net, plain = pair(Net())
    same(net, plain, batch(8, moving[0]))
    first = len(programs)
    for seed, rows in enumerate(moving):
        if rows > 2:
            same(net, plain, batch(8, rows, seed))
    assert len(programs) == first


def test_smaller_batches_need_no_new_graph_once_two_sizes_were_seen(programs):
    net, plain = pair(Net())
    for rows in (16, 12, 16):  # the last by the graph of open sizes, which now comes first
        same(net, plain, batch(rows, rows // 2))
    before = len(programs)
    for rows, moving in (
        (16, 8),
        (12, 6),
        (14, 7),
        (10, 6),
        (15, 8),
        (7, 3),
        (6, 5),
        (5, 2),
        (3, 1),
    ):
        same(net, plain, batch(rows, moving, seed=rows))
    assert len(programs) == before


@pytest.mark.parametrize("how", HOW)
def test_a_batch_of_many_sizes_is_compiled_a_few_times(how, programs):
    """The first batch, then open sizes, and one more where the room for rows is the batch."""
    net, plain = pair(Net(), HOW[how])
    parts = None
    for call, rows in enumerate((16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 16)):
        same(net, plain, batch(rows, rows // 2, seed=rows))
        if not call:
            parts = len(programs)
    assert len(programs) <= 3 * parts


def test_a_last_smaller_batch_makes_no_program_of_the_full_one_again(programs):
    net, plain = pair(Net())
    counts = []
    for rows in (16, 16, 9, 16, 9, 16, 12):
        same(net, plain, batch(rows, rows // 2, seed=rows))
        counts.append(len(programs))
    assert counts[2:] == [2 * counts[0]] * 5


@pytest.mark.parametrize("saved", ["captured", "around"])
def test_checkpoints_compute_again_what_was_computed(saved):
    how = compile_whole if saved == "captured" else compile_blocks
    net, plain = pair(Net(0.3, functools.partial(checkpoint, use_reentrant=False)), how)
    same(net, plain)
    same(net, plain, batch(8, 8))


@pytest.mark.parametrize("how", ["eager", "whole", "blocks"])
@pytest.mark.parametrize("moving", [4, 8])
def test_selective_checkpoints_keep_what_the_model_computed(how, moving):
    kept = (
        torch.ops.aten.addmm.default,
        torch.ops.aten.mm.default,
        torch.ops.aten.native_layer_norm.default,
    )

    def policy(context, operator, *args, **kwargs):
        return (
            CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE
        )

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    net, plain = pair(Net(), HOW.get(how, lambda net: net))
    net.saved = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    same(net, plain, batch(moving=moving))


def test_a_step_that_calls_the_loss_may_be_compiled(programs):
    net, plain = pair(Net(), lambda net: net)
    z, times = batch()

    @functools.partial(torch.compile, backend=EAGER)
    def step(z, noise, t, s):
        out = LOSS(net, z, noise=noise, t=t, s=s)
        return out.loss.sum(), out.residual

    total, residual = step(z, **times)
    total.backward()
    close(residual, outcome(plain, (z, times))[1])
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        close(p.grad, q.grad)
    assert programs


@pytest.mark.parametrize("loss", [CrossFlowLoss(), PixelMeanFlowLoss(), MeanFlowLoss(gap=0.5)])
def test_a_compiled_step_of_other_objectives_is_the_eager_one(loss):
    net, plain = pair(Net(), lambda net: net)
    step = torch.compile(lambda z, **times: loss(net, z, **times), backend=EAGER)
    z, times = batch()
    close(step(z, **times).residual, loss(plain, z, **times).residual)


@pytest.mark.parametrize("loss", [CrossFlowLoss(), FlowMatchingLoss()])
def test_a_compiled_step_draws_its_times_for_any_number_of_rows(loss):
    net, plain = pair(Net(), lambda net: net)
    step = torch.compile(lambda z: loss(net, z), backend=EAGER)
    for rows in (4, 3, 5):
        z = batch(rows)[0]
        torch.manual_seed(rows)
        found = step(z)
        torch.manual_seed(rows)
        close(found.residual, loss(plain, z).residual)


def test_a_compiled_step_may_change_a_setting_of_its_objective():
    net, plain = pair(Net(), lambda net: net)
    loss, (z, times) = MeanFlowLoss(gap=0.9), batch()

    def residual(model, gap):
        return dataclasses.replace(loss, gap=gap)(model, z, **times).residual

    step = torch.compile(lambda gap: residual(net, gap), backend=EAGER)
    for gap in (0.5, 0.25):
        close(step(gap), residual(plain, gap))


def test_objectives_change_their_records_as_torch_2_11_can_follow():
    """Its torch.compile loses the fields of what `_replace` and `_make` return, and raises."""
    folder = Path(objectives.__file__).parent
    for source in folder.rglob("*.py"):
        assert not re.search(r"\._(replace|make)\(", source.read_text()), source.name


def test_functional_call_of_a_compiled_model():
    net, plain = pair(Net())
    weights = {name: 1.3 * value.detach() for name, value in plain.named_parameters()}
    z, times = batch()
    found = LOSS(lambda *args: torch.func.functional_call(net, weights, args), z, **times)
    plain.load_state_dict(weights)
    close(found.residual, LOSS(plain, z, **times).residual)


@pytest.mark.parametrize(
    "loss", [CrossFlowLoss(), ImprovedMeanFlowLoss(), PixelMeanFlowLoss(), MeanFlowLoss(gap=0.5)]
)
def test_every_objective(loss):
    same(*pair(Net(0.2)), loss=loss)


@pytest.mark.parametrize("route", [ForwardMode(), FiniteDifference(), FiniteDifference(order=1)])
def test_other_routes_on_a_compiled_model(route):
    same(*pair(Net(0.2)), loss=MeanFlowLoss(derivative=route), tolerance=1e-7)


def test_consistency_moves_every_row():
    net, plain = pair(Net())
    z, times = batch()
    given = z, {**times, "s": torch.zeros_like(times["t"])}
    same(net, plain, given, ConsistencyLoss())


# --- never a stale graph


def evaluate(*nets):
    for net in nets:
        net.eval()


def set_rate(*nets):
    for net in nets:
        net.blocks[0].drop = 0.4


def replace_weights(*nets):
    new = torch.full((4, 8), 0.3, dtype=torch.float64)
    for net in nets:
        net.last.weight = nn.Parameter(new.clone())


def replace_block(*nets):
    block = Block().double()
    for net in nets:
        net.blocks[0] = copy.deepcopy(block)


def tie(*nets):
    for net in nets:
        net.blocks[0].mlp.weight = net.blocks[0].out.weight


def freeze(*nets):
    for net in nets:
        net.first.requires_grad_(False)


def hook(*nets):
    for net in nets:
        net.blocks[0].register_forward_hook(lambda module, args, out: 1.5 * out)


def pre_hook(*nets):
    for net in nets:
        net.last.register_forward_pre_hook(lambda module, args: (args[0].sin(),))


def other_function(*nets):
    for net in nets:
        net.saved = lambda block, h: block(h).tanh()


def to_float(*nets):
    for net in nets:
        net.float()


CHANGES = [
    evaluate,
    set_rate,
    replace_weights,
    replace_block,
    tie,
    freeze,
    hook,
    pre_hook,
    other_function,
]


@pytest.mark.parametrize("how", ["whole", "blocks"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(how, change):
    net, plain = pair(Net(), HOW[how])
    same(net, plain)
    change(getattr(net, "_orig_mod", net), plain)
    same(net, plain)
    same(net, plain, batch(seed=3))


def test_a_hook_that_is_taken_away_is_seen():
    net, plain = pair(Net())
    handles = [
        m.blocks[0].register_forward_hook(lambda module, args, out: 1.5 * out)
        for m in (net, plain)
    ]
    same(net, plain)
    for handle in handles:
        handle.remove()
    same(net, plain)


def test_grad_mode_autocast_and_dtype_are_seen():
    net, plain = pair(Net())
    same(net, plain)
    with torch.no_grad():
        same(net, plain)
    to_float(net, plain)
    z, times = batch()
    given = z.float(), {name: value.float() for name, value in times.items()}
    same(net, plain, given, tolerance=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        same(net, plain, given, tolerance=0.05)
    same(net, plain, given, tolerance=1e-5)


def test_other_inputs_that_move_are_seen():
    net, plain = pair(Net())
    z, times = batch()
    primals = (z, times["t"], times["s"])
    for tangents in (
        (z, None, None),
        (None, times["t"], None),
        (z.sin(), times["t"], times["s"]),
        (None, None, times["s"]),
    ):
        found, wanted = (SharedPrimal()(model, primals, tangents)[1] for model in (net, plain))
        close(found, wanted)


# --- what Python and torch make hard


class Valued(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, z, t, s):
        h = self.linear(z) * (1 + column(t))
        h = h.sin() if h.max() > 1 else h.cos()
        return h * column(s)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, z, t, s):
        self.calls += 1
        return self.linear(z).sin() * (self.calls + column(t)) + column(s)


class Masked(nn.Module):
    """What a mask takes has a size that depends on values: it is left to Python, between two
    graphs.
    """

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, z, t, s):
        h = self.linear(z) * (1 + column(t))
        kept = h[:, torch.arange(3) > 0]
        return torch.cat([h[:, :1], kept.sin()], 1) * column(s)


class Writing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, z, t, s):
        h = self.linear(z) * (1 + column(t))
        h += z
        h[:, :2] *= 2.0
        h[:, 1:3].mul_(column(s) + 1)
        h = h.relu_()
        y = torch.zeros_like(h)
        y[:, :2] = h[:, :2]
        y[:, 2:] += h[:, 2:].sin()
        return y


class Normed(nn.Module):
    """Its counter is beside the point: what is counted twice is seen in the buffers."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z, t, s):
        self.calls.add_(1)
        return self.norm(self.linear(z) * (1 + column(t))) * (1 + column(s))


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return 7 * gradient


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, z, t, s):
        return Straight.apply(self.linear(z) * (1 + column(t))) * column(s)


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, z, t, s):
        h = self.linear(z) * (1 + column(t))
        return (h - h.mean(0)).sin() + column(s)


@pytest.mark.parametrize("model", [Valued, Masked, Writing, Normed, Custom, Mixing])
@pytest.mark.parametrize("moving", [3, 8])
def test_hard_models_are_the_eager_routes(model, moving):
    net, plain = pair(model())
    for seed in range(2):
        same(net, plain, batch(moving=moving, seed=seed))
    evaluate(net, plain)
    same(net, plain, batch(moving=moving))


@pytest.mark.parametrize("route", [FiniteDifference(), ForwardMode(), SharedPrimal()])
def test_buffers_are_written_once(route):
    net, plain = pair(Normed())
    loss = MeanFlowLoss(derivative=route)
    for seed in range(3):
        same(net, plain, batch(seed=seed), loss, tolerance=1e-7)
    assert net.calls == 3


class Turned(nn.Module):
    """Its counter is written after a product that broadcasts over sizes left open."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("angles", torch.randn(3, 4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z, t, s):
        h = self.linear(z) * column(s)
        h = torch.addcmul(h * self.angles.cos(), h.roll(2, -1), self.angles.sin())
        self.calls.add_(1)
        return (h - h.mean(0)) * column(t) + self.calls


def test_buffers_are_written_once_where_sizes_are_open_and_torch_logs_no_error(caplog):
    net, plain = pair(Turned(), HOW["dynamic"])
    for rows in (4, 6, 5):
        same(net, plain, batch(rows, moving=2))
    assert net.calls == 3
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("start", "says"),
    [(0, "captured 8 times"), (0.0, "changes a Python float of its own")],
    ids=["whole", "float"],
)
def test_what_python_takes_from_a_counter_is_right_and_ends_in_one_warning(start, says):
    net, plain = pair(Counting())
    net.calls = plain.calls = start
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(12):
            same(net, plain, batch(seed=seed))
    assert len(told(caught)) == 1 and says in told(caught)[0]


DRAWING = {
    "alpha dropout": lambda z, t: F.alpha_dropout(z, 0.5, True) * t[:, None],
    "alpha dropout in place": lambda z, t: F.alpha_dropout(z * t[:, None], 0.5, True, True),
    "feature alpha dropout": lambda z, t: F.feature_alpha_dropout(z[..., None], 0.5, True)[..., 0],
    "rrelu": lambda z, t: F.rrelu(z, training=True) * t[:, None],
    "rrelu by name": lambda z, t: torch.rrelu(z, lower=0.2, upper=0.9, training=True),
    "dropout with its mask": lambda z, t: torch.native_dropout(z, 0.5, True)[0] * z,
    "noise": lambda z, t: z * torch.randn_like(z) + torch.bernoulli(z.sigmoid()) * t[:, None],
    "attention": lambda z, t: (
        F.scaled_dot_product_attention(z[..., None], z[..., None].sin(), z[..., None], None, 0.5)
    )[..., 0],
}


@pytest.mark.filterwarnings("ignore:a compiled part of the model runs uncompiled")
@pytest.mark.parametrize("how", ["eager", "model", "step"])
@pytest.mark.parametrize("name", DRAWING)
def test_the_tangent_is_of_the_numbers_that_the_value_drew(name, how):
    fn = DRAWING[name]
    model = fn if how == "eager" else torch.compile(fn, backend=EAGER)
    torch.manual_seed(0)
    primals = torch.randn(4, 6).double(), torch.rand(4).double()
    tangents = torch.randn(4, 6).double(), torch.rand(4).double()

    def value(step):
        torch.manual_seed(1)
        return model(*(p + step * v for p, v in zip(primals, tangents, strict=True)))

    wanted = (value(1e-6) - value(-1e-6)) / 2e-6
    for rows in (None, torch.tensor([True, False, True, True])):

        def evaluate(rows=rows):
            torch.manual_seed(1)
            return SharedPrimal()(fn if how == "step" else model, primals, tangents, rows)

        if how == "step":
            evaluate = torch.compile(evaluate, backend=EAGER)
        found, derivative = evaluate()
        torch.testing.assert_close(found, value(0.0))
        kept = wanted if rows is None else wanted * rows[:, None]
        torch.testing.assert_close(derivative, kept, rtol=1e-6, atol=1e-6)


class Hooked(nn.Module):
    """torch wraps what a full backward hook watches in an autograd.Function of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.linear.register_full_backward_hook(lambda module, inputs, outputs: None)

    def forward(self, z, t, s):
        return self.linear(z * (1 + column(t))).sin() * column(s)


class WithJvp(Straight):
    @staticmethod
    def jvp(ctx, tangent):
        return 5 * tangent


class OfPython(nn.Module):
    """An autograd.Function that defines jvp is not captured: its call is left to Python."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, z, t, s):
        return WithJvp.apply(self.linear(z) * (1 + column(t))) * column(s)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x.mul_(2.0)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class DoublesPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, z, t, s):
        h = self.linear(z) * (1 + column(t))
        return Doubled.apply(h[:, :2]) * column(s) + h[:, 1:]


class Doubles(DoublesPart):
    def forward(self, z, t, s):
        return Doubled.apply(self.linear(z) * (1 + column(t))) * column(s)


class Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, calls):
        calls.add_(1)
        return x.sin() * calls

    @staticmethod
    def backward(ctx, gradient):
        return 7 * gradient, None


class CountsCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z, t, s):
        return Counted.apply(self.linear(z) * (1 + column(t)), self.calls) * column(s)


class Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        mask = torch.rand_like(x) > 0.5
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, z, t, s):
        return Dropped.apply(self.linear(z) * (1 + column(t))) * column(s)


class DropsWeights(Drops):
    """What draws, and writes, is given nothing that moves."""

    def forward(self, z, t, s):
        weight = Doubled.apply(Dropped.apply(1.0 * self.linear.weight))
        return (z @ weight) * (1 + column(t)) * column(s)


@pytest.mark.parametrize("moving", [3, 8])
@pytest.mark.parametrize("model", [Hooked, OfPython])
def test_a_custom_function_that_is_left_to_python_is_followed(model, moving):
    net, plain = pair(model())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(2):
            same(net, plain, batch(moving=moving, seed=seed))
    assert not told(caught)


@pytest.mark.parametrize("moving", [3, 8])
@pytest.mark.parametrize("model", [Doubles, CountsCalls, Drops, DropsWeights])
def test_a_custom_function_that_writes_or_draws_does_so_once(model, moving):
    net, plain = pair(model())
    compiled._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(2):
            same(net, plain, batch(moving=moving, seed=seed))
    assert len(told(caught)) == (model is not DropsWeights)


@pytest.mark.filterwarnings("ignore:a compiled part of the model runs uncompiled")
@pytest.mark.parametrize("moving", [3, 8])
def test_a_custom_function_that_writes_into_a_part_is_refused(moving):
    net, _ = pair(DoublesPart())
    z, times = batch(moving=moving)
    primals, v = (z, times["t"], times["s"]), torch.ones_like(times["t"])
    with pytest.raises(DerivativeError, match="writes in place"):
        SharedPrimal()(net, primals, (z.sin(), v, None), torch.arange(8) < moving)


class CountsInNumpy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, z, t, s):
        self.calls.numpy()[0] += 1
        return self.linear(z).sin() * column(t) * column(s)


def test_what_a_function_mode_keeps_from_torch_compile_is_left_to_python():
    net, plain = pair(CountsInNumpy())
    compiled._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3):
            same(net, plain, batch(seed=seed))
    assert len(told(caught)) == 1


@pytest.mark.parametrize("moving", [2, 8])
def test_a_constant_made_of_what_moves_is_refused(moving):
    z, times = batch()

    def model(z, t, s):
        return z * torch.tensor([t[0], t[1]]).sum()

    rows = torch.arange(8) < moving
    for fn in (model, torch.compile(model, backend=EAGER)):
        with pytest.raises(
            DerivativeError, match=r"(derivative|argument) of (torch\.)?tensor.* constant"
        ):
            SharedPrimal()(fn, (z, times["t"], times["s"]), (z, z[:, 0, 0], None), rows)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")
def test_a_constant_made_of_what_does_not_move_is_a_constant():
    weight = torch.rand(2, dtype=torch.float64, requires_grad=True)

    def model(z, t, s):
        return z * torch.tensor([weight[0], weight[1]]).sum() * column(t)

    z, times = batch()
    found = [
        SharedPrimal()(fn, (z, times["t"], times["s"]), (z, z[:, 0, 0], None))
        for fn in (model, torch.compile(model, backend=EAGER))
    ]
    for a, b in zip(*found, strict=True):
        close(a, b)


@torch._dynamo.config.patch(recompile_limit=3)
@pytest.mark.parametrize("given", ["length", "number"])
def test_sizes_that_change_from_call_to_call_end_in_one_warning(given, programs):
    compiled._warned.clear()
    linear = nn.Linear(4, 4).double()

    def model(z, t, s, number):
        return linear(z).sin() * column(t) * (1 + number)

    fn = torch.compile(model, backend=EAGER, dynamic=given == "length" or None)
    traces = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in range(12):
            z, times = batch(8)
            few = 3 if call < 2 else (3, 7)[call % 2]  # open sizes have room for the first
            t, number, rows = times["t"], 3, torch.arange(8) < few
            if given == "length":
                z = torch.randn(8, 3 + call, 4, dtype=torch.float64)
            else:
                number += call
            primals, tangents = (z, t, t), (z.sin(), torch.ones_like(t), None)
            found, wanted = (
                SharedPrimal()(functools.partial(of, number=number), primals, tangents, rows)
                for of in (fn, model)
            )
            for a, b in zip(found, wanted, strict=True):
                close(a, b)
            traces.append(len(programs))
    assert traces[-1] == traces[-4] <= 6
    assert len(told(caught)) == 1 and "change from call to call" in told(caught)[0]


def test_a_function_without_a_derivative_is_named_as_in_the_eager_route():
    def model(z, t, s):
        return torch.cdist(z, z.sin(), float("inf")).sum(-1, keepdim=True) * column(t)

    z, times = batch()
    messages = []
    for fn in (model, torch.compile(model, backend=EAGER)):
        with pytest.raises(DerivativeError) as caught:
            SharedPrimal()(fn, (z, times["t"], times["s"]), (z, torch.ones_like(times["t"]), None))
        messages.append(str(caught.value)[:60])
    assert "cdist" in messages[0] and "cdist" in messages[1]


def test_what_cannot_be_traced_runs_uncompiled_with_one_warning(monkeypatch):
    def fails(*args, **kwargs):
        raise NotImplementedError("no trace today")

    net, plain = pair(Net())
    monkeypatch.setattr(compiled, "make_fx", fails)
    with pytest.warns(UserWarning, match="runs uncompiled.*no trace today") as caught:
        same(net, plain)
        same(net, plain, batch(seed=1))
    assert sum("runs uncompiled" in str(warned.message) for warned in caught) == 1


def test_what_a_signal_handler_raises_while_a_part_is_traced_reaches_the_user(monkeypatch):
    def at_the_signal(number, frame):
        raise TimeoutError("the hour is over")

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGALRM)

    net, plain = pair(Net())
    before = signal.signal(signal.SIGALRM, at_the_signal)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(compiled, "make_fx", interrupted)
            with pytest.raises(Exception, match="the hour is over"):
                same(net, plain)
        same(net, plain)
    finally:
        signal.signal(signal.SIGALRM, before)


class Hooked(nn.Module):
    """Sets a hook on a tensor that moves, and on one that does not."""

    def __init__(self):
        super().__init__()
        self.first, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, z, t, s):
        h = self.first(z) * (1 + column(t)) + column(s)
        scale = self.scale.sin()
        for tensor in (h, scale):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: 2 * gradient)
        return (h * scale).sin()


@pytest.mark.filterwarnings("ignore:.*would lose the hook")
@pytest.mark.parametrize("moving", [0, 3, 8])
def test_hooks_of_tensors_meet_the_gradient(moving):
    net, plain = pair(Hooked())
    same(net, plain, batch(moving=moving))


def jvp_of_state(z, t):
    return torch.func.jvp(torch.sin, (z,), (z,))[1] * t[:, None]


def grad_of_state(z, t):
    return torch.func.grad(lambda x: (x.sin() * t[:, None]).sum())(z)


def vmap_round_state(z, t):
    y = z.sin()
    weights = torch.ones(3, 4, dtype=torch.float64)
    return torch.vmap(lambda w: y * w)(weights).sum(0) * t[:, None]


@pytest.mark.parametrize("fn", [jvp_of_state, grad_of_state, vmap_round_state])
def test_a_transform_in_a_model_is_refused_and_leaves_torch_as_it_was(fn):
    z, t = torch.rand(5, 4, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    net = torch.compile(fn, backend=EAGER)
    for rows in (None, torch.arange(5) < 2):
        with pytest.raises(DerivativeError, match=r"transform of torch.func.*ForwardMode\(\)$"):
            SharedPrimal()(net, (z, t), (z, torch.ones_like(t)), rows)
    torch.testing.assert_close(net(z, t), fn(z, t))
    weight = torch.ones(3, requires_grad=True)
    checkpoint(torch.sin, weight, use_reentrant=False).sum().backward()
    torch.testing.assert_close(torch.func.jvp(torch.sin, (z,), (z,))[1], z.cos() * z)


@pytest.mark.parametrize(
    ("dynamic", "sizes"), [(True, [(6, 3), (5, 3), (1, 3)]), (None, [(6, 3), (6, 5), (6, 1)])]
)
def test_an_axis_may_become_one_once_sizes_are_open(dynamic, sizes):
    def fn(z, t):
        return z.sin() * t[:, None, None]

    net = torch.compile(fn, backend=EAGER, dynamic=dynamic)
    for batch_size, tokens in sizes:
        z = torch.rand(batch_size, tokens, 4, dtype=torch.float64)
        t = torch.rand(batch_size, dtype=torch.float64)
        one = torch.ones_like(t)
        derivative = SharedPrimal()(net, (z, t), (z, one))[1]
        wanted = torch.func.jvp(fn, (z, t), (z, one))[1]
        torch.testing.assert_close(derivative, wanted)


@pytest.mark.parametrize("compiles", [False, True])
def test_primals_of_inference_mode(compiles):
    def fn(z, t):
        return z.sin() * t[:, None]

    net = fn
    if compiles:
        net = torch.compile(fn, backend=EAGER)
    with torch.inference_mode():
        z, t = torch.rand(5, 4).double(), torch.rand(5).double()
    before = z.clone()
    with torch.no_grad():
        derivative = SharedPrimal()(net, (z, t), (z, torch.ones_like(t)))[1]
    wanted = before.cos() * before * t[:, None] + before.sin()
    torch.testing.assert_close(derivative, wanted)
    assert torch.equal(z, before)


def test_no_other_thread_compiles_while_a_part_is_traced(monkeypatch):
    held, make = [], compiled.Region._make

    def watched(*args):
        taken = []
        other = threading.Thread(target=lambda: taken.append(compile_lock.acquire(blocking=False)))
        other.start()
        other.join()
        held.append(not taken[0])
        return make(*args)

    monkeypatch.setattr(compiled.Region, "_make", watched)
    net, plain = pair(Net())
    same(net, plain)
    same(net, plain, batch(moving=8))
    assert held and all(held)


def test_a_thread_in_forward_mode_does_not_compile():
    """One that compiles asks for the lock of forward mode: the two would wait for ever."""
    compiles = []

    def backend(graph, inputs):
        compiles.append(forward_mode_lock._is_owned())
        return graph

    inner = torch.compile(torch.sin, backend=backend)

    @torch.library.custom_op("flowspace_tests::compiled_inside", mutates_args=())
    def compiled_inside(x: torch.Tensor) -> torch.Tensor:
        return inner(x)

    compiled_inside.register_fake(torch.empty_like)
    z, times = batch()
    t, directions = times["t"], (z, torch.ones_like(times["t"]))
    with pytest.raises(DerivativeError, match="compiled_inside"):
        SharedPrimal()(lambda z, t: compiled_inside(z) * column(t), (z, t), directions)
    assert not any(compiles)


def test_a_stance_that_lets_nothing_be_captured_anew_is_kept():
    net, plain = pair(Net())
    same(net, plain)
    with torch.compiler.set_stance("fail_on_recompile"):
        same(net, plain)
        with pytest.raises(RuntimeError, match="Detected recompile"):
            same(net, plain, batch(4))


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile", "eager_then_compile"])
def test_other_stances_give_what_the_eager_route_gives(stance):
    net, plain = pair(Net())
    z, times = batch()
    net(z, times["t"], times["s"])  # captured without tangents: not to be run with them
    with torch.compiler.set_stance(stance):
        same(net, plain)
        same(net, plain, batch(4))


def test_nothing_is_left_behind():
    original = torch._dynamo.eval_frame._callback_from_stance
    net, plain = pair(Net())
    same(net, plain)
    with pytest.raises(ZeroDivisionError):
        LOSS(torch.compile(lambda z, t, s: z / 0 * (1 // 0), backend=EAGER), batch()[0])
    assert torch._dynamo.eval_frame._callback_from_stance is original
    assert hidden_calls.active_carrier() is None
    close(
        net(*(x for x in (batch()[0], *[batch()[1][k] for k in "ts"]))),
        plain(batch()[0], *[batch()[1][k] for k in "ts"]),
    )


LATE = """
import sys, torch
from flowspace import SharedPrimal

def model(z, t):
    return torch.compile(lambda z, t: z.sin() * t[:, None], backend="eager")(z, t)

z, t = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
assert "torch._dynamo" not in sys.modules
wanted = z.cos() * t[:, None] * z + z.sin()
found = SharedPrimal()(model, (z, t), (z, torch.ones_like(t)), torch.arange(4) < 2)[1]
torch.testing.assert_close(found, torch.where(torch.arange(4)[:, None] < 2, wanted, 0.0))
"""


def test_a_model_that_compiles_on_its_way_is_met_at_once():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LATE], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("moving", [4, 8])
def test_an_older_torch_runs_it_as_written_with_one_warning(monkeypatch, moving, programs):
    monkeypatch.setattr(hidden_calls, "follows_compiled", lambda: False)
    hidden_calls.warn_of_old_torch.cache_clear()
    net, plain = pair(Net(0.3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        outcome(plain, batch(moving=moving))  # nothing of it is compiled
    with pytest.warns(UserWarning, match="from torch 2.11 on it runs compiled") as caught:
        same(net, plain, batch(moving=moving))
        same(net, plain, batch(moving=moving, seed=1))
    assert len(caught) == 1 and not programs


# --- inductor


@COMPILER
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_inductor_computes_the_same(mode, programs):
    how = functools.partial(compile_blocks, backend="inductor", mode=mode)
    net, plain = pair(Net(count=2), how)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same(net, plain)
        same(net, plain, batch(moving=8))
    assert len(programs) == 2 and not told(caught)


@COMPILER
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductor_drops_what_the_plain_compiled_step_drops():
    net, _ = pair(Net(0.5), functools.partial(compile_whole, backend="inductor"))
    z, times = batch()
    torch.manual_seed(4)
    found = LOSS(net, z, **times).prediction
    torch.manual_seed(4)
    z_t = (1 - column(times["t"])) * z + column(times["t"]) * times["noise"]
    close(found, net(z_t, times["t"], times["s"]))


@pytest.mark.parametrize("mixed", [False, True])
def test_data_of_what_moves_is_what_it_is_where_nothing_is_compiled(mixed):
    def model(z, t, s):
        h = z.sin()
        if mixed:
            h.data.mul_(column(t).detach())
        return h * column(t) * column(t.data) + s.data.mean()

    z, times = batch()
    given = (z, times["t"], times["s"]), (z.cos(), torch.ones(8, dtype=z.dtype), None)
    rows = times["s"] < times["t"]
    both = [SharedPrimal()(f, *given, rows) for f in (model, torch.compile(model, backend=EAGER))]
    for a, b in zip(*both, strict=True):
        close(a, b)


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_gradients_of_several_batches_add_up(how):
    net, plain = pair(Net(count=2), HOW[how])
    for model in (net, plain):
        for seed in range(3):
            z, times = batch(seed=seed)
            LOSS(model, z, **times).loss.sum().backward()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        close(a.grad, b.grad)


@pytest.mark.parametrize("how", ["whole", "blocks", "torch.compile", "fullgraph"])
def test_reentrant_checkpoints_compute_again_what_was_computed(how):
    net, plain = pair(Net(0.3, functools.partial(checkpoint, use_reentrant=True)), HOW[how])
    for given in (batch(), batch(8, 8)):
        z, times = given
        same(net, plain, (z.requires_grad_(), times))


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_the_network_of_the_demo_runs_compiled(how, programs):
    def run(net):
        z = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
        t = torch.linspace(0.3, 0.9, 8).double()
        s = torch.where(torch.arange(8) < 4, 0.4 * t, t)
        out = LOSS(net, z, noise=z.cos(), t=t, s=s, cond={"labels": torch.arange(8) % 3})
        out.loss.sum().backward()
        return [out.prediction.detach(), out.residual, *[p.grad for p in net.parameters()]]

    make = functools.partial(SmallViT, 4, 4, outputs=4, size=ViTSize(16, 2, 2))
    net, plain = pair(make, HOW[how])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(net)
    for a, b in zip(found, run(plain), strict=True):
        close(a, b)
    assert programs and not told(caught)


class WithContexts(nn.Module):
    """Two layers with weights that enter a context between them."""

    def __init__(self, body):
        super().__init__()
        self.first, self.second, self.body = nn.Linear(4, 4), nn.Linear(4, 4), body

    def forward(self, z, t, s):
        return self.body(self, z * (1 + column(t)))


HALF = functools.partial(torch.autocast, "cpu", torch.bfloat16)


def kept_in_float32(net, x):
    with HALF():
        h = net.first(x).to(torch.float32)  # rounds, and is no call that does nothing
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) + net.second(h)


def an_island(net, x):
    with HALF():
        h = net.first(x)
        with torch.autocast("cpu", enabled=False):
            h = net.second(h.float()).sin()
        return net.second(h).to(torch.bfloat16).float()


def in_turn(net, x):
    for enabled in (True, False, True):
        with HALF(enabled=enabled):
            x = F.layer_norm(net.first(x).float(), (4,))
    return x + x.mean(-1, keepdim=True)


def inference(net, x):
    with torch.inference_mode():
        fixed = net.second(x)
    return net.first(x) * fixed.clone()


def no_gradient(net, x):
    with torch.no_grad():
        fixed = net.second(x)
        with torch.enable_grad():
            other = net.second(x.sin())
    return net.first(x) * fixed + other


def written_out_attention(net, x):
    with sdpa_kernel(SDPBackend.MATH):
        h = F.scaled_dot_product_attention(x, net.first(x), x)
    return net.second(F.scaled_dot_product_attention(h, h, x))


CONTEXTS = [kept_in_float32, an_island, in_turn, inference, no_gradient, written_out_attention]


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("rows", ["all", "half"])
@pytest.mark.parametrize("body", CONTEXTS, ids=lambda body: body.__name__)
def test_contexts_that_a_compiled_part_enters_are_those_of_the_model(body, rows, outer):
    def run(net):
        (z, times), p = batch(), list(net.parameters())
        t, s = times["t"].float(), times["s"].float()
        given = (z.float(), t, s), (z.cos().float(), torch.ones_like(t), None)
        with HALF(enabled=outer):
            value, derivative = SharedPrimal()(net, *given, choose(8, rows))
            (value.float() * z.sin().float()).sum().backward()
        assert not outer or torch.get_autocast_dtype("cpu") == torch.bfloat16
        return value, derivative, [x.grad for x in p]

    net = WithContexts(body)
    made = copy.deepcopy(net)
    made.compile(backend=EAGER)
    found, wanted = run(made), run(net)
    plain = copy.deepcopy(net)
    plain.compile(backend=EAGER)
    z, times = batch()
    with HALF(enabled=outer):
        value = plain(z.float(), times["t"].float(), times["s"].float())
    assert found[0].dtype == wanted[0].dtype == value.dtype
    torch.testing.assert_close(found[0], value)
    rounding = (0.05 if outer else 1e-6) * float(wanted[1].abs().max())
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=rounding)
    for a, b in zip(found[2], wanted[2], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert not torch.is_autocast_enabled("cpu") and torch.backends.cuda.flash_sdp_enabled()


def test_the_kernels_of_attention_are_those_that_the_model_chose():
    """No other kernel than the model's is in the dual graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend(EAGER)(graph, inputs)

    (z, times), net = batch(), WithContexts(written_out_attention).double()
    net.compile(backend=backend)
    SharedPrimal()(net, (z, times["t"], times["s"]), (z, torch.ones_like(times["t"]), None))
    names = [getattr(node.target, "__name__", "") for node in graphs[-1].graph.nodes]
    first, second = (i for i, name in enumerate(names) if name == "_sdpa_kernel")
    attention = [i for i, name in enumerate(names) if "scaled_dot_product" in name]
    assert first < attention[0] < second < attention[-1]


def test_a_part_that_fails_in_a_context_leaves_it():
    def failing(net, x):
        with HALF(), sdpa_kernel(SDPBackend.MATH):
            return torch.cdist(net.first(x).float(), x.sin(), float("inf")).sum(-1, keepdim=True)

    (z, times), net = batch(), WithContexts(failing)
    net.compile(backend=EAGER)
    given = (z.float(), times["t"].float(), times["s"].float())
    with pytest.raises(DerivativeError, match="cdist"):
        SharedPrimal()(net, given, (given[0], torch.ones(8), None))
    assert not torch.is_autocast_enabled("cpu") and torch.backends.cuda.flash_sdp_enabled()


def test_an_error_leaves_the_contexts_that_were_entered():
    """Also where no capture is going on, which would put back what torch was set to."""
    entered = contexts.Contexts()
    with pytest.raises(ZeroDivisionError), entered.left():
        for _ in range(2):
            entered.call_of(contexts.enter_autocast)("cpu", torch.bfloat16, True, None)
        contexts.choose_attention_kernels([SDPBackend.MATH])
        _ = 1 // 0
    assert not torch.is_autocast_enabled("cpu") and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("of", ["buffer", "spectral norm"])
def test_a_part_that_binds_a_buffer_is_captured_once(of, programs):
    class Binding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            if of == "spectral norm":
                nn.utils.parametrizations.spectral_norm(self.layer)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, z, t, s):
            if of == "buffer":
                self.mean = 0.9 * self.mean + 0.1 * z.detach().mean((0, 1))
            return self.layer(z) * column(t)

    torch.manual_seed(0)
    plain = Binding().double()
    net = copy.deepcopy(plain)
    net.compile(backend=EAGER)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(10):
            same(net, plain, batch(seed=seed))
    assert len(programs) == 1 and not told(caught)


LIMITED = {
    "clamp": lambda h, limit: h.clamp(-limit, 2 * limit),
    "hardshrink": lambda h, limit: F.hardshrink(h, limit / 2 - 0.1),
}


@pytest.mark.parametrize("name", LIMITED)
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_number_may_be_computed_of_one_left_open(dynamic, name, programs):
    class Limited(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.limit = nn.Linear(4, 4), 1.0

        def forward(self, z, t, s):
            return LIMITED[name](self.layer(z), self.limit) * column(t)

    net, plain = pair(Limited, functools.partial(compile_whole, dynamic=dynamic))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            net.limit = plain.limit = 1.0 + step / 8
            same(net, plain, batch(seed=step))
    assert not told(caught) and 0 < len(programs) <= 4  # torch.compile captures each number anew


def padded(net, z, t, s):
    h = net.layer(z * (1 + column(t)))
    rows, length, width = h.shape
    y = h.new_zeros(rows, length + 2, width)
    y[:, 1:-1] = h
    return (y[:, 1:-1] + y[:, :-2]).sin() - column(s)


def shifted(net, z, t, s):
    h = net.layer(z * (1 + column(t))).sin()
    h[:, 1:] += 2 * h[:, :-1]
    return h - column(s)


class Writing(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.layer, self.body = nn.Linear(4, 4), body

    def forward(self, z, t, s):
        return self.body(self, z, t, s)


@pytest.mark.parametrize("body", [padded, shifted])
@pytest.mark.parametrize("dynamic", [None, True])
def test_slices_are_written_where_sizes_are_open(body, dynamic, programs):
    net, plain = pair(
        functools.partial(Writing, body), functools.partial(compile_whole, dynamic=dynamic)
    )
    t = torch.linspace(0.3, 0.9, 8, dtype=torch.float64)
    times = {"t": t, "s": torch.where(torch.arange(8) < 4, 0.4 * t, t)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (6, 8, 10, 5):
            z = torch.randn(8, length, 4, dtype=torch.float64)
            same(net, plain, (z, times | {"noise": z.cos()}))
    assert (
        not told(caught) and 0 < len(programs) <= 4
    )  # the padded rows are found in a second pass


# --- at the edges of parts, and where sizes are open

WITHOUT_RULE = {
    "glu": F.glu,
    "complex": lambda h: torch.exp(1j * h).real,
    "fft": lambda h: torch.fft.fft(h).abs(),
    "cholesky": lambda h: torch.linalg.cholesky(h @ h.mT + torch.eye(3, dtype=h.dtype)),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_functions_without_a_rule_are_followed_where_sizes_are_open(name, dynamic):
    def model(z, t, s):
        return WITHOUT_RULE[name](z * column(t)) * (1 + column(s))

    net = torch.compile(model, backend=EAGER, dynamic=dynamic)
    for rows, moving in ((8, 4), (6, 3), (8, 8)):
        z, times = batch(rows, moving)
        given = (z, times["t"], times["s"]), (z.cos(), torch.ones_like(times["t"]), None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            both = [SharedPrimal()(f, *given, times["s"] < times["t"]) for f in (net, model)]
        assert not told(caught)
        for a, b in zip(*both, strict=True):
            close(a, b)


@pytest.mark.filterwarnings("ignore:a compiled part of the model runs uncompiled")
def test_what_fails_in_a_trace_alone_is_no_function_without_a_derivative():
    """torch.quantile fails on tensors without values."""

    def model(z, t, s):
        return torch.quantile(z * column(t), 0.3, -1, keepdim=True) * (1 + column(s))

    z, times = batch()
    given = (z, times["t"], times["s"]), (z.cos(), torch.ones_like(times["t"]), None)
    net = torch.compile(model, backend=EAGER)
    both = [SharedPrimal()(f, *given, times["s"] < times["t"]) for f in (net, model)]
    for a, b in zip(*both, strict=True):
        close(a, b)


class Shares(nn.Module):
    """Returns a tensor that shares memory with what it was given."""

    def __init__(self, of):
        super().__init__()
        self.of = of

    def forward(self, h):
        return self.of(h)


class Doubles(nn.Module):
    def forward(self, h):
        h.mul_(2.0)


SHARING = {
    "detach": (lambda h: h.detach(), 3),
    "data": (lambda h: h.data, 3),
    "view": (lambda h: h[:, :2], 2),
    "view of detach": (lambda h: h.detach()[:, :2], 2),
}


@pytest.mark.filterwarnings("ignore:a compiled part of the model runs uncompiled")
@pytest.mark.parametrize("compiled_parts", [(), ("first",), ("second",), ("first", "second")])
@pytest.mark.parametrize("of", SHARING)
@pytest.mark.parametrize("moving", [4, 8])
def test_memory_that_two_parts_share_is_followed(of, compiled_parts, moving):
    share, count = SHARING[of]
    parts = {"first": Shares(share), "second": Doubles()}
    for name in compiled_parts:
        parts[name].compile(backend=EAGER)

    def model(z, t, s):
        h = (z * (1 + column(t))).sin()
        shares = parts["first"](h)
        with torch.no_grad():
            parts["second"](shares)
        return h.cos() * (1 + column(s))

    def written_out(z, t, s):
        h = (z * (1 + column(t))).sin()
        scale = torch.ones(3, 1, dtype=h.dtype)
        scale[:count] = 2.0
        return (h * scale).cos() * (1 + column(s))

    z, times = batch(moving=moving)
    given = (z, times["t"], times["s"]), (z.cos(), torch.ones_like(times["t"]), None)
    with torch.no_grad():
        found = SharedPrimal()(model, *given, times["s"] < times["t"])
        wanted = ForwardMode()(written_out, *given, times["s"] < times["t"])
    for a, b in zip(found, wanted, strict=True):
        close(a, b)


class Scaled(nn.Module):
    """Its Python depends on a number that changes."""

    def __init__(self):
        super().__init__()
        self.linear, self.number = nn.Linear(4, 4), 0

    def forward(self, z, t, s):
        return self.linear(z) * (column(t) + self.number % 13)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"recompile_limit": 32}, 12),
        ({"options": {"guard_filter_fn": lambda guards: [False] * len(guards)}}, 1),
    ],
    ids=["limit", "guards"],
)
def test_the_users_limit_and_guards_are_kept(options, count):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net = Scaled().double()
    net.compile(backend=backend, dynamic=False, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in (*range(12), *range(12)):
            net.number = number
            z, times = batch()
            LOSS(net, z, **times).loss.sum().backward()
    assert len(graphs) == count and not told(caught)


def test_blocks_of_many_shapes_whose_rows_mix_are_all_captured():
    """Twice each, since the second run is without gradients: more often than the limit."""

    def block(i, o):
        return nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o), nn.SiLU())

    sizes = (4, 5, 6, 7, 8, 9, 4)
    plain = nn.Sequential(*[Shares(block(i, o)) for i, o in itertools.pairwise(sizes)])
    plain.double()
    net = copy.deepcopy(plain)
    graphs, aot_eager = [], lookup_backend(EAGER)
    for part in net:
        part.compile(backend=lambda *given: graphs.append(given) or aot_eager(*given))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        z, times = batch()
        given = (z[:, 0], times["t"]), (z[:, 1], torch.ones_like(times["t"]))
        rows = times["s"] < times["t"]
        both = [
            SharedPrimal()(lambda x, t, m=m: m(x * t[:, None]), *given, rows) for m in (net, plain)
        ]
    assert not told(caught) and len(graphs) >= 12
    for a, b in zip(*both, strict=True):
        close(a, b)


class CountingByLists(nn.Module):
    """Writes into a buffer by a function of lists; its rows mix."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z, t, s):
        torch._foreach_add_([self.calls], 1.0)
        h = z * column(t) + column(s)
        return (h - h.mean(0)) * self.calls


def test_buffers_that_functions_of_lists_write_into_are_written_once():
    net, plain = pair(CountingByLists)
    for _ in range(3):
        same(net, plain)
    assert net.calls == 3


class CountsAfterACondition(nn.Module):
    """Writes into a buffer after a graph within the graph; its rows mix."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z, t, s):
        state = (self.calls + 0.5,)
        weights = torch.cond(self.calls > 0.5, torch.sin, torch.cos, state)
        torch._foreach_add_([self.calls], 1.0)
        h = z * column(t) + column(s)
        return (h - h.mean(0)) * self.calls + weights


def test_buffers_that_are_written_after_a_graph_within_the_graph_are_written_once():
    net, plain = pair(CountsAfterACondition)
    for _ in range(3):
        same(net, plain)
    assert net.calls == 3
