"""What was wrong without a word is right, or refused by name: each test has the right value beside
it.
"""

import contextlib
import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # or nothing of ours asks for its stance
import torch.nn.functional as F
from launch import in_processes
from strategies import normal
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import flowspace.derivatives.replay as replay
import flowspace.derivatives.route as routes
from flowspace import (
    ConsistencyLoss,
    CrossFlowLoss,
    DerivativeError,
    FiniteDifference,
    FlowMatchingLoss,
    ForwardMode,
    ImprovedMeanFlowLoss,
    InputError,
    MeanFlowLoss,
    PixelMeanFlowLoss,
    SharedPrimal,
    TrajectoryMatchingLoss,
)
from flowspace.backends.process import forward_mode_lock

RANKS = Path(__file__).with_name("ranks_worker.py")
ROUTES = [SharedPrimal(), ForwardMode(), FiniteDifference(1e-4), FiniteDifference(1e-6, order=1)]
each_route = pytest.mark.parametrize("route", ROUTES, ids=repr)
each_second_run = pytest.mark.parametrize("route", ROUTES[1:], ids=repr)


def arguments(rows=6, width=3):
    """A batch of which every other row lies on the diagonal, and the directions (v, 1, 0)."""
    t = torch.linspace(0.25, 0.95, rows, dtype=torch.float64)
    s = torch.where(torch.arange(rows) % 2 == 0, t, 0.3 * t)
    return (normal(0, rows, width), t, s), (normal(1, rows, width), torch.ones_like(t), None)


def exact(model, primals, tangents, **cond):
    """The value and the directional derivative on all rows."""
    moving = tuple(primals[:2])
    return torch.func.jvp(lambda z, t: model(z, t, primals[2], **cond), moving, tangents[:2])


def near(found, wanted, route=None):
    tolerance = 1e-4 if isinstance(route, FiniteDifference) else 1e-10
    torch.testing.assert_close(found, wanted.detach(), rtol=tolerance, atol=tolerance)


def derived(route, model, primals, tangents, **cond):
    """The value and the derivative on the rows off the diagonal, by a route."""

    def fn(z, t, s, cond):
        return model(z, t, s, **cond)

    rows = primals[2] < primals[1]
    value, derivative = route(fn, (*primals, cond), (*tangents, None), rows=rows)
    return value, derivative[rows], rows


# --- rows that need each other
# ---------------------------------------------------------------------------------------

GRAPH = torch.tensor([0, 0, 0, 1, 1, 2])
TABLE = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(6, 3)


def packed(z, t, s, graph=GRAPH):
    total = torch.zeros(3, z.shape[1], dtype=z.dtype).index_add(0, graph, z)
    return torch.sin(z * (1 + t[:, None])) + total[graph] + s[:, None]


def across(z, t, s):
    return z * (1 + t[:, None]) + torch.softmax(z @ z.T, -1) @ z + s[:, None]


def centred(z, t, s):
    return (z - z.mean(0)) * (1 + t[:, None]).sin()


def faintly(z, t, s):
    return torch.sin(z) * t[:, None] + 0.03 * torch.cos(z.sum(0) + t.sum())


def codebook(z, t, s, table, index):
    return torch.tanh(z * (1 + t[:, None]) + table[index])


MIXED = {
    "the graph in cond": (packed, {"graph": GRAPH}),
    "the graph held by the model": (packed, {}),
    "attention across rows": (across, {}),
    "a mean over rows": (centred, {}),
    "a faint sum over rows": (faintly, {}),
    "a table of as many rows": (
        codebook,
        {"table": TABLE, "index": torch.tensor([0, 2, 1, 0, 5, 3])},
    ),
}
each_mixed = pytest.mark.parametrize(("model", "cond"), MIXED.values(), ids=MIXED)


@each_route
@each_mixed
def test_rows_that_need_each_other_are_evaluated_together(route, model, cond):
    primals, tangents = arguments()
    value, derivative, rows = derived(route, model, primals, tangents, **cond)
    wanted = exact(model, primals, tangents, **cond)
    near(value, wanted[0])
    near(derivative, wanted[1][rows], route)


@each_second_run
def test_rows_that_stay_apart_are_evaluated_alone(route):
    primals, tangents = arguments()
    sizes = []

    def model(z, t, s):
        sizes.append(len(z))
        return torch.sin(z * (1 + t[:, None]))

    derived(route, model, primals, tangents)
    assert sizes[0] == 6 and len(sizes) > 1 and set(sizes[1:]) == {3}


@pytest.mark.parametrize("order", [1, 2])
def test_finite_differences_of_rows_that_mix_unseen_go_one_way(order):
    """One row at an end of time would step to the one side, and the others to the other."""
    (z, t, s), tangents = arguments()
    t = t.index_fill(0, torch.tensor(5), 1.0)
    wanted = exact(centred, (z, t, s), tangents)[1]
    route = FiniteDifference(1e-4 if order == 2 else 1e-6, order)
    near(route(centred, (z, t, s), tangents)[1], wanted, route)


@each_mixed
@pytest.mark.parametrize("kind", [ImprovedMeanFlowLoss, PixelMeanFlowLoss])
def test_the_networks_own_velocity_is_one_of_the_whole_batch(kind, model, cond):
    (z, t, s), (noise, _, _) = arguments()
    out = kind()(model, z, noise=noise, t=t, s=s, cond=cond)

    def velocity(z_t, t, s):
        f = model(z_t, t, s, **cond)
        return f if kind is ImprovedMeanFlowLoss else (z_t - f) / t.clamp(min=0.05)[:, None]

    own = velocity(out.z_t, out.t, out.t)
    u, du = torch.func.jvp(lambda z, t: velocity(z, t, s), (out.z_t, t), (own, torch.ones_like(t)))
    near(out.residual, u + (t - s)[:, None] * du - out.velocity)


def test_the_own_velocity_under_batch_norm_is_one_of_the_whole_batch():
    (z, t, s), (noise, _, _) = arguments()
    norm = nn.BatchNorm1d(3).double()

    def model(z, t, s):
        return norm(z) * (1 + t)[:, None]

    def plain(z, t, s):
        return F.batch_norm(z, None, None, training=True) * (1 + t)[:, None]

    out = ImprovedMeanFlowLoss()(model, z, noise=noise, t=t, s=s)
    own = plain(out.z_t, t, t)
    u, du = torch.func.jvp(lambda z, t: plain(z, t, s), (out.z_t, t), (own, torch.ones_like(t)))
    near(out.residual, u + (t - s)[:, None] * du - out.velocity)
    assert norm.num_batches_tracked == 1


def summed(z, t, s, table):
    return torch.tanh(z * (1 + t[:, None]) + table.sum(0))


@pytest.mark.parametrize(
    ("model", "cond"), [(summed, {"table": TABLE}), *list(MIXED.values())[:4]]
)
def test_trajectory_matching_gives_every_pair_the_whole_condition(model, cond):
    (z, _, _), (noise, _, _) = arguments()
    loss_fn = TrajectoryMatchingLoss(teacher=lambda z, t, **cond: -z * (1 + t)[:, None], steps=3)
    out = loss_fn(model, z, noise=noise, cond=cond)
    parts = zip(out.z_t.split(6), out.t.split(6), out.s.split(6), strict=True)
    near(out.prediction, torch.cat([model(*part, **cond) for part in parts]))


def test_trajectory_matching_takes_all_pairs_at_once_where_it_may():
    (z, _, _), (noise, _, _) = arguments()
    sizes = []

    def model(z, t, s, labels):
        sizes.append(len(z))
        return z * labels[:, None]

    loss_fn = TrajectoryMatchingLoss(teacher=lambda z, t, **cond: -z, steps=3)
    loss_fn(model, z, noise=noise, cond={"labels": torch.arange(6)})
    assert sizes == [36, 6]


# --- a second run that is not the first one
# --------------------------------------------------------------------------

OWN = torch.Generator()
OWN_NUMPY = np.random.default_rng(0)


def masked(z, t, s, mask):
    return torch.sin(z * mask) * (1 + t)[:, None]


def mask_of_python(z):
    return torch.tensor([[random.random() for _ in row] for row in z], dtype=z.dtype)


DRAWN = {
    "random": mask_of_python,
    "numpy": lambda z: torch.from_numpy(np.random.rand(*z.shape)),
    "one layer less, by random": lambda z: torch.tensor(
        float(random.random() < 0.5), dtype=z.dtype
    ),
    "one layer less, by numpy": lambda z: torch.tensor(
        float(np.random.rand() < 0.5), dtype=z.dtype
    ),
}


@each_second_run
@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_what_python_and_numpy_draw_is_drawn_again(route, draw):
    primals, tangents = arguments()
    for seed in range(4):
        random.seed(seed)
        np.random.seed(seed)
        mask = draw(primals[0])
        wanted = exact(lambda z, t, s, mask=mask: masked(z, t, s, mask), primals, tangents)[1]
        after = random.getstate(), np.random.get_state()[2]
        random.seed(seed)
        np.random.seed(seed)
        derivative, rows = derived(
            route, lambda z, t, s: masked(z, t, s, draw(z)), primals, tangents
        )[1:]
        near(derivative, wanted[rows], route)
        assert (random.getstate(), np.random.get_state()[2]) == after


def counter():
    calls = []

    def model(z, t, s):
        calls.append(0)
        return torch.sin(z + len(calls)) * t[:, None]

    return model


REMEMBERS = {
    "a generator of torch": lambda: (
        lambda z, t, s: z * torch.rand(z.shape, generator=OWN, dtype=z.dtype) * t[:, None]
    ),
    "a generator of numpy": lambda: (
        lambda z, t, s: z * torch.from_numpy(OWN_NUMPY.random(z.shape)) * t[:, None]
    ),
    "a count of its calls": counter,
}


@each_second_run
@pytest.mark.parametrize("make", REMEMBERS.values(), ids=REMEMBERS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_model_that_gives_another_value_each_time_is_refused(route, make, masked):
    primals, tangents = arguments()
    if not masked:
        primals = (*primals[:2], 0.3 * primals[1])
    with pytest.raises(
        DerivativeError, match=r"^got .*write derivative=SharedPrimal|derivative=SharedPrimal"
    ):
        derived(route, make(), primals, tangents)


@pytest.mark.parametrize("route", ROUTES[2:], ids=repr)
def test_finite_differences_refuse_a_coin_of_the_models_own_generator(route):
    """Half of the time a second toss falls as the first, and the value does not tell."""
    primals, tangents = arguments()
    own = torch.Generator().manual_seed(0)

    def model(z, t, s):
        return torch.sin(z) * t[:, None] * (torch.rand((), generator=own, dtype=z.dtype) < 0.5)

    for _ in range(4):
        with pytest.raises(DerivativeError, match=r"torch\.Generator of its own"):
            derived(route, model, primals, tangents)


@each_second_run
def test_a_generator_that_is_seeded_in_each_call_is_none_of_its_own(route):
    primals, tangents = arguments()

    def model(z, t, s):
        seeded = torch.Generator().manual_seed(3)
        return torch.sin(z * torch.rand(3, generator=seeded, dtype=z.dtype)) * t[:, None]

    derivative, rows = derived(route, model, primals, tangents)[1:]
    near(derivative, exact(model, primals, tangents)[1][rows], route)


@pytest.mark.parametrize("route", [FiniteDifference(), FiniteDifference(order=1)], ids=repr)
@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_finite_differences_of_what_is_rounded_inside_are_refused(route, how):
    weight = normal(3, 3, 3).float()

    def model(z, t, s):
        if how == "cast":
            return (z.bfloat16() @ weight.bfloat16()).float() * t[:, None]
        with torch.autocast("cpu", torch.bfloat16):
            return (z @ weight).float() * t[:, None]

    primals, tangents = arguments()
    single = [None if p is None else p.float() for p in (*primals, *tangents)]
    with pytest.raises(
        DerivativeError, match=r"half precision by itself.*bfloat16.*derivative=SharedPrimal"
    ):
        derived(route, model, single[:3], single[3:])


@pytest.mark.parametrize("takes_device", [False, True])
def test_the_draws_of_any_device_are_drawn_again(monkeypatch, takes_device):
    class Module:
        state = torch.tensor([1])

        if takes_device:

            def get_rng_state(self, device):
                assert device.type == "xpu"
                return self.state

            def set_rng_state(self, state, device):
                self.state = state
        else:

            def get_rng_state(self):
                return self.state

            def set_rng_state(self, state):
                self.state = state

    module = Module()
    monkeypatch.setattr(torch, "xpu", module)
    draws = replay.RandomState(torch.device("xpu"))
    assert not draws.changed()

    def draw():
        module.state = module.state + 1
        return module.state

    assert draw() == 2 and draws.changed()
    assert draws.replay(draw)() == 2 and module.state == 2


def test_arrays_of_jax_from_a_model_that_remembers_are_refused():
    jax = pytest.importorskip("jax")
    calls = []

    def model(z, t, s):
        calls.append(0)
        return jax.numpy.sin(z + len(calls)) * t[:, None]

    z, t = jax.numpy.ones((4, 2)), jax.numpy.full(4, 0.5)
    for order in (1, 2):
        with pytest.raises(DerivativeError, match=r"another value"):
            FiniteDifference(order=order)(model, (z, t, t), (z, jax.numpy.ones_like(t), None))


# --- what a second run leaves behind
# ---------------------------------------------------------------------------------


class Queue(nn.Module):
    """Writes what it saw into buffers, by an index and in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(4, 3, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, z, t, s):
        self.queue[int(self.count) % 4] = z.detach().mean(0)
        self.count += 1
        return torch.sin(z) * t[:, None]


@pytest.mark.parametrize("route", [ForwardMode(), FiniteDifference(1e-4)], ids=repr)
def test_what_a_model_writes_it_writes_once(route):
    (z, t, s), tangents = arguments()
    model, plain = Queue(), Queue()
    plain(z, t, s)
    derived(route, model, (z, t, s), tangents)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, plain.get_buffer(name)), name


class Kept(nn.Module):
    """Reads what it has written into a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(6, 3, dtype=torch.float64))

    def forward(self, z, t, s):
        self.kept.copy_(torch.sin(z) * t[:, None])
        return self.kept * 2


def test_forward_mode_reads_what_was_written():
    primals, tangents = arguments()
    primals = (*primals[:2], 0.3 * primals[1])
    with torch.no_grad():
        derivative = derived(ForwardMode(), Kept(), primals, tangents)[1]
    near(derivative, exact(lambda z, t, s: 2 * torch.sin(z) * t[:, None], primals, tangents)[1])


def test_what_autograd_does_not_see_is_an_engines_and_stays():
    """FSDP2 fills memory that it has kept, out of autograd's sight, and frees it before the run
    ends.
    """
    filled, freed, held = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    with replay.restoring_buffers(None):
        for tensor in (filled, freed):
            with torch.autograd._unsafe_preserve_version_counter(tensor):
                tensor.copy_(torch.ones(3))
        freed.untyped_storage().resize_(0)
        held.copy_(torch.ones(3))
    assert filled.tolist() == [1.0] * 3 and held.tolist() == [0.0] * 3


def test_fsdp2_on_one_process_is_exact():
    done = in_processes(1, RANKS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == 7 - (torch.__version__ < "2.11")


def test_no_process_waits_for_one_whose_rows_all_lie_on_the_diagonal():
    done = in_processes(2, RANKS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == 2 * (8 - (torch.__version__ < "2.11"))


# --- what forward mode cannot follow
# ---------------------------------------------------------------------------------


def flex(z, t, s):
    from torch.nn.attention.flex_attention import flex_attention

    q = (z * t[:, None])[:, None, :, None] * torch.ones(16, dtype=z.dtype)
    return flex_attention(q, q, q).mean((1, 3))


def conditional(z, t, s):
    return torch.cond(s.sum() > 0, torch.sin, torch.cos, (z * t[:, None],))


def inferred(z, t, s):
    with torch.inference_mode():
        h = z.sin() * t[:, None]
    return h * s[:, None]


def reentrant(z, t, s):
    return checkpoint(torch.sin, z * t[:, None], use_reentrant=True)


def flash(z, t, s):
    q = (z * t[:, None])[:, None, :, None] * torch.ones(8, dtype=z.dtype)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, q, q).mean((1, 3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", [flex, conditional, inferred, reentrant, flash])
def test_forward_mode_says_what_it_cannot_differentiate(model):
    primals, tangents = arguments()
    with pytest.raises(DerivativeError, match=r"^got .* write derivative="):
        derived(ForwardMode(), model, primals, tangents)
    if model is not flash:  # whose kernel knows no float64
        derivative, rows = derived(FiniteDifference(1e-4), model, primals, tangents)[1:]
        numeric = FiniteDifference(1e-3)(model, primals, tangents)[1]
        torch.testing.assert_close(derivative, numeric[rows], rtol=1e-3, atol=1e-3)


@torch.library.custom_op("silent_faults::tanh", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.tanh(x.detach().numpy()))


LEAVING = {
    "item": lambda z, t, s: z * t.sum().item(),
    "float": lambda z, t, s: z * float(t[0] + t[1]),
    "tolist": lambda z, t, s: z * torch.tensor(t.tolist(), dtype=z.dtype)[:, None],
    "numpy": lambda z, t, s: z * torch.from_numpy(np.sin(t.numpy()))[:, None],
    "data": lambda z, t, s: z * (t * 2).data[:, None],
    "silent_faults::tanh": lambda z, t, s: opaque(z) * t[:, None],
}


@pytest.mark.parametrize(("name", "model"), LEAVING.items(), ids=LEAVING)
def test_forward_mode_refuses_values_that_leave_torch_by_name(name, model):
    primals, tangents = arguments()
    with pytest.raises(DerivativeError, match=rf"^got .*{name}.*FiniteDifference"):
        ForwardMode()(model, primals, tangents)
    same = {"data": lambda z, t, s: z * (t * 2)[:, None]}.get(name, model)
    if name not in ("item", "float"):  # which take all rows' times
        derivative = FiniteDifference(1e-4)(same, primals, tangents)[1]
        numeric = FiniteDifference(1e-3)(same, primals, tangents)[1]
        torch.testing.assert_close(derivative, numeric, rtol=1e-4, atol=1e-4)


def test_what_stands_still_on_purpose_is_followed():
    primals, tangents = arguments()

    def model(z, t, s):
        zeros, order = torch.zeros_like(z), z.argsort(1)
        fixed = torch.where(z > 0, torch.ones((), dtype=z.dtype), 0.5)
        return z.detach() * t[:, None] + zeros + torch.floor(z) + fixed * z + order

    near(ForwardMode()(model, primals, tangents)[1], exact(model, primals, tangents)[1])


# --- models that write into what they are given
# ----------------------------------------------------------------------


def writes_times(z, t, s):
    t *= 0.5
    s += 0.01
    return torch.sin(z) * (t + s)[:, None]


def writes_latents(z, t, s):
    z *= 2
    return torch.sin(z) * (t + s)[:, None]


def plain_of(model):
    half = {"writes_times": lambda z, t, s: torch.sin(z) * (0.5 * t + s + 0.01)[:, None]}
    return half.get(model.__name__, lambda z, t, s: torch.sin(2 * z) * (t + s)[:, None])


each_writer = pytest.mark.parametrize("model", [writes_times, writes_latents])


@each_route
@each_writer
def test_a_model_may_write_into_its_arguments(route, model):
    primals, tangents = arguments()
    before = [p.clone() for p in primals]
    value, derivative, rows = derived(route, model, primals, tangents)
    wanted = exact(plain_of(model), before, tangents)
    near(value, wanted[0])
    near(derivative, wanted[1][rows], route)
    if not isinstance(route, SharedPrimal):  # which runs the plain program, once
        assert all(map(torch.equal, primals, before))


LOSSES = {
    "cross flow": CrossFlowLoss(),
    "estimated": CrossFlowLoss(estimate=lambda x: x),
    "flow matching": FlowMatchingLoss(),
    "two points": MeanFlowLoss(gap=0.5),
    "improved": ImprovedMeanFlowLoss(),
    "pixels": PixelMeanFlowLoss(),
    "consistency": ConsistencyLoss(),
}


@each_writer
@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
def test_every_objective_keeps_its_own_times_and_states(loss_fn, model):
    (z, t, s), (noise, _, _) = arguments()
    if isinstance(loss_fn, FlowMatchingLoss):
        s = t
    t_given, s_given, z_given = t.clone(), s.clone(), z.clone()
    out = loss_fn(model, z_given, noise=noise, t=t_given, s=s_given)
    wanted = loss_fn(plain_of(model), z, noise=noise, t=t, s=s)
    near(out.loss, wanted.loss)
    for given, before in (
        (z_given, z),
        (t_given, t),
        (s_given, s),
        (out.z_t, wanted.z_t),
        (out.t, t),
        (out.s, s),
    ):
        assert torch.equal(given, before)


# --- threads and interrupts
# ------------------------------------------------------------------------------------------


def test_threads_take_turns_in_forward_mode():
    primals, tangents = arguments(8, 16)
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(12))
    ).double()

    def timed(z, t, s):
        return model(z) * t[:, None]

    wanted, wrong = exact(timed, primals, tangents)[1].detach(), []

    def work():
        try:
            for _ in range(15):
                found = ForwardMode()(timed, primals, tangents)[1]
                if not torch.allclose(found, wanted, rtol=1e-9, atol=1e-9):
                    wrong.append("another derivative")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_compiled_runs_compiled_once_every_thread_has_left():
    """The stance of torch.compile is the whole process's, and threads leave in any order."""
    captured = []

    def backend(graph, inputs):
        captured.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: x.sin() + 1, backend=backend)
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    for thread in (first, second):
        thread.enter_context(replay.uncompiled())
    for thread in (first, second):
        compiled(torch.ones(3))
        assert not captured
        thread.close()
    compiled(torch.ones(3))
    assert len(captured) == 1


@each_route
def test_an_interrupt_leaves_nothing_behind(route):
    primals, tangents = arguments()

    def interrupted(line):
        """Run the route and interrupt it at the given line that it comes by."""
        seen = [0]

        def trace(frame, event, arg):
            if event == "line":
                seen[0] += 1
                if seen[0] == line:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return (
                trace
                if "eager_transforms" in frame.f_code.co_filename
                or "forward_mode" in frame.f_code.co_filename
                or "second_run" in frame.f_code.co_filename
                or "forward_ad" in frame.f_code.co_filename
                else None
            )

        sys.settrace(trace)
        try:
            derived(route, lambda z, t, s: torch.sin(z) * t[:, None], primals, tangents)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    line, wanted = 1, exact(lambda z, t, s: torch.sin(z) * t[:, None], primals, tangents)[1]
    while interrupted(line):
        assert torch.is_grad_enabled() and torch._C._len_torch_function_stack() == 0
        assert torch._C._functorch.peek_interpreter_stack() is None
        assert torch._dynamo.eval_frame._stance.stance == "default"
        assert not forward_mode_lock._is_owned()
        derivative, rows = derived(
            ForwardMode(), lambda z, t, s: torch.sin(z) * t[:, None], primals, tangents
        )[1:]
        near(derivative, wanted[rows])
        line += 2


# --- inputs
# -------------------------------------------------------------------------------------------------


@each_route
@pytest.mark.parametrize("whole", [False, True])
def test_a_constant_model_has_the_derivative_zero(route, whole):
    primals, tangents = arguments()
    fixed = normal(5, 6, 3)
    rows = None if whole else primals[2] < primals[1]
    value, derivative = route(lambda z, t, s: fixed, primals, tangents, rows=rows)
    assert torch.equal(value, fixed)
    torch.testing.assert_close(derivative, torch.zeros_like(fixed), rtol=0, atol=1e-6)


class TwoArguments(nn.Module):
    def forward(self, z, t):
        return z


class Empty:
    pass


Z = normal(0, 6, 3)
UNFIT = {
    "two arguments": (
        lambda z, t: z,
        {},
        r"got a model with the arguments \(z, t\).*write it as def model",
    ),
    "a module of two arguments": (TwoArguments(), {}, r"got a model with the arguments \(z, t\)"),
    "a class": (Empty, {}, "got model = Empty, a class"),
    "None": (None, {}, "got model = None, which cannot be called"),
    "text": ("net", {}, "got model = 'net', which cannot be called"),
    "cond has t": (
        lambda z, t, s: z,
        {"cond": {"t": torch.ones(6)}},
        "multiple values for argument 't'.*other names",
    ),
    "returns None": (lambda z, t, s: None, {}, "got NoneType from the model"),
    "no features": (
        lambda z, t, s: z,
        {"latents": torch.ones(6, 0)},
        r"got latents of shape \(6, 0\)",
    ),
    "complex noise": (
        lambda z, t, s: z,
        {"noise": torch.ones(6, 3) * 1j},
        "got noise of dtype torch.complex64",
    ),
    "a number as generator": (
        lambda z, t, s: z,
        {"generator": 0},
        "got generator = 0; write torch.Generator",
    ),
}


@pytest.mark.parametrize(("model", "options", "message"), UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize(
    "loss_fn",
    [*LOSSES.values(), TrajectoryMatchingLoss(teacher=lambda z, t, **_: z, steps=2)],
    ids=[*LOSSES, "trajectory"],
)
def test_what_cannot_be_a_model_or_a_batch_is_one_clear_error(loss_fn, model, options, message):
    with pytest.raises(InputError, match=message):
        loss_fn(model, **({"latents": Z} | options))


@each_second_run
def test_a_models_own_type_error_is_its_own(route):
    def model(z, t, s):
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        MeanFlowLoss(derivative=route)(model, Z)


@each_second_run
def test_an_error_of_ours_that_a_model_raises_is_the_models(route):
    primals, tangents = arguments()
    calls = []

    def model(z, t, s):
        calls.append(0)
        if len(calls) > 1:
            raise replay.RowsMixError
        return z

    with pytest.raises(replay.RowsMixError):
        route(model, primals, tangents)
    assert len(calls) == 2


class Transfers(TorchDispatchMode):
    """Counts what waits for the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in (
            "aten::nonzero",
            "aten::_local_scalar_dense",
            "aten::equal",
            "aten::is_nonzero",
        ):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_step_with_drawn_times_asks_the_device_nothing():
    net, loss_fn = nn.Linear(3, 3).double(), CrossFlowLoss()
    loss_fn(lambda z, t, s: net(z) * t[:, None], Z)  # the first batch is looked at
    with Transfers() as transfers:
        loss_fn(lambda z, t, s: net(z) * t[:, None], Z)
    assert "aten::nonzero" not in transfers.names
    assert (
        "aten::_local_scalar_dense" not in transfers.names
        and "aten::is_nonzero" not in transfers.names
    )


# --- numbers that are tensors, and tensors that stand for a shape
# ---------------------------------------------------------------------------------------

TAKEN_FOR_NUMBERS = {
    "softplus": lambda z, x: F.softplus(z, beta=3 * x),
    "leaky_relu": F.leaky_relu,
    "elu": lambda z, x: F.elu(z, alpha=x),
    "layer_norm": lambda z, x: F.layer_norm(z, (3,), eps=x),
    "normalize": lambda z, x: F.normalize(z, p=1 + x, dim=-1),
    "add": lambda z, x: torch.add(z, z.sin(), alpha=x),
    "add_": lambda z, x: (2 * z).add_(z.sin(), alpha=x),
    "addcmul": lambda z, x: z.addcmul(z, z, value=x),
    "attention": lambda z, x: F.scaled_dot_product_attention(z, z, z, scale=x),
    "pad": lambda z, x: F.pad(z, (1, 1), value=x)[..., 1:],
    "hardtanh": lambda z, x: F.hardtanh(z, -x, x),
    "vector_norm": lambda z, x: torch.linalg.vector_norm(z, 1 + x, dim=-1, keepdim=True) * z,
    "huber_loss": lambda z, x: F.huber_loss(z, 0 * z, reduction="none", delta=x),
    "addmm": lambda z, x: torch.addmm(z[0], z[0], GRID, beta=x)[None],
    "dropout": lambda z, x: F.dropout(z, p=x / 2),
}


@pytest.mark.parametrize("name", TAKEN_FOR_NUMBERS)
@pytest.mark.parametrize("route", ROUTES[:2], ids=repr)
def test_a_tensor_that_torch_takes_for_a_number_may_not_move(name, route):
    z, t = normal(0, 1, 3, 3), torch.tensor([0.6], dtype=torch.float64)
    tangents = normal(1, 1, 3, 3), torch.ones_like(t)

    def model(z, t):
        return TAKEN_FOR_NUMBERS[name](z, t[0])

    for _ in range(2):
        with pytest.raises(DerivativeError):
            route(model, (z, t), tangents)

    def fixed(z, t):
        return TAKEN_FOR_NUMBERS[name](z, t[0].detach().item())

    torch.manual_seed(0)
    found = route(fixed, (z, t), tangents)[1]
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):
        near(found, torch.func.jvp(lambda z: fixed(z, t), (z,), tangents[:1])[1])


GRID = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3)

TAKEN_FOR_A_KIND = {
    "type_as": lambda z: z * (z > 0).type_as(z),
    "to": lambda z: z * torch.arange(3).to(z),
    "expand_as": lambda z: z * GRID[:1].expand_as(z),
    "view_as": lambda z: z * GRID.repeat(2, 1).view_as(z),
    "reshape_as": lambda z: z * GRID.repeat(2, 1).reshape_as(z),
    "full_like": lambda z: z * torch.full_like(z, 2.0),
    "new_full": lambda z: z * z.new_full((3,), 2.0),
    "new": lambda z: z * z.new(z.shape).fill_(2.0),
    "new of numbers": lambda z: z * z.new([1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("name", TAKEN_FOR_A_KIND)
@each_route
def test_a_tensor_may_stand_for_its_shape_alone(name, route):
    primals, tangents = arguments()

    def model(z, t, s):
        return TAKEN_FOR_A_KIND[name](z) * t[:, None]

    _, derivative, rows = derived(route, model, primals, tangents)
    near(derivative, exact(model, primals, tangents)[1][rows], route)


@each_route
def test_a_constant_may_be_sparse(route):
    primals, tangents = arguments()
    sparse = torch.eye(3, dtype=torch.float64).to_sparse()

    def model(z, t, s):
        return z * sparse.coalesce().values() * t[:, None]

    if isinstance(route, ForwardMode):
        try:
            exact(model, primals, tangents)
        except RuntimeError as error:  # as torch 2.9 does
            pytest.skip(f"torch.func.jvp does not follow it: {error}")
    _, derivative, rows = derived(route, model, primals, tangents)
    near(derivative, exact(lambda z, t, s: z * t[:, None], primals, tangents)[1][rows], route)


def test_what_is_filled_with_what_moves_moves_or_is_refused():
    primals, tangents = arguments()

    def model(z, t, s):
        return z * torch.full_like(z, t[1])

    _, derivative, rows = derived(SharedPrimal(), model, primals, tangents)
    near(derivative, exact(lambda z, t, s: z * t[1], primals, tangents)[1][rows])
    with pytest.raises(DerivativeError, match="full_like"):
        ForwardMode()(model, primals, tangents)


@pytest.mark.parametrize("route", ROUTES[:2], ids=repr)
def test_new_of_a_tensor_that_moves_is_refused_or_right(route):
    primals, tangents = arguments()

    def model(z, t, s):  # it is z, in the memory of z
        return torch.zeros(0, dtype=z.dtype).new(z) * z

    for _ in range(3):  # the third is not watched
        with contextlib.suppress(DerivativeError):
            near(route(model, primals, tangents)[1], 2 * primals[0] * tangents[0])


LARGE = torch.eye(3, 2, dtype=torch.float64)


def positive(z):
    return torch.eye(3, dtype=z.dtype) + z[:, :, None] * z[:, None]


PARTLY_STANDING = {
    "lu": lambda z: torch.linalg.lu(positive(z)).U,
    "lu_unpack": lambda z: torch.lu_unpack(*torch.linalg.lu_factor(positive(z)))[2],
    "lstsq": lambda z: (
        torch.linalg.lstsq(LARGE + z[:, :, None], torch.ones(len(z), 3, 1, dtype=z.dtype)).solution
    ),
}


@pytest.mark.parametrize("name", PARTLY_STANDING)
@each_route
def test_a_function_may_return_more_than_what_moves(name, route):
    primals, tangents = arguments()

    def model(z, t, s):
        return PARTLY_STANDING[name](z + t[:, None]).flatten(1)

    _, derivative, rows = derived(route, model, primals, tangents)
    near(derivative, exact(model, primals, tangents)[1][rows], route)


@pytest.mark.parametrize("of", ["Laplace", "Cauchy", "Exponential", "Gumbel"])
@each_route
def test_samples_of_distributions_are_differentiated(of, route):
    primals, tangents = arguments()

    def model(z, t, s):
        parameters = (z.exp(),) if of == "Exponential" else (z, t[:, None].expand_as(z))
        return getattr(torch.distributions, of)(*parameters, validate_args=False).rsample()

    def of_seed(z, t, s):
        torch.manual_seed(0)
        return model(z, t, s)

    torch.manual_seed(0)
    _, derivative, rows = derived(route, model, primals, tangents)
    step = 1e-6
    z, t, s = primals
    there = of_seed(z + step * tangents[0], t + step, s)
    here = of_seed(z - step * tangents[0], t - step, s)
    torch.testing.assert_close(
        derivative, ((there - here) / (2 * step))[rows], rtol=1e-3, atol=1e-3
    )


@each_second_run
def test_dropout_of_what_is_not_contiguous_draws_the_same(route):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dtype=torch.float64)

    def model(z, t, s):
        return layer(z * t[:, None, None] + s[:, None, None])

    z, t, s = normal(0, 4, 5, 16), *arguments(4)[0][1:]
    primals, tangents = (z, t, s), (normal(1, 4, 5, 16), torch.ones_like(t), None)
    torch.manual_seed(1)
    wanted = SharedPrimal()(model, primals, tangents)[1]
    torch.manual_seed(1)
    near(route(model, primals, tangents)[1], wanted, route)


@pytest.mark.parametrize(
    "draw", [torch.rand_like, torch.randn_like, lambda x: x.sigmoid().bernoulli()]
)
def test_draws_in_the_shape_of_what_is_not_contiguous_are_the_same(draw):
    def model(z, t, s):
        return z * t[:, None] * draw(z.mT.contiguous().mT)

    primals, tangents = arguments()
    torch.manual_seed(1)
    wanted = SharedPrimal()(model, primals, tangents)[1]
    torch.manual_seed(1)
    near(ForwardMode()(model, primals, tangents)[1], wanted)


def test_a_tensor_that_moves_may_not_be_detached_in_place():
    primals, tangents = arguments()
    with pytest.raises(DerivativeError, match=r"write x = x.detach\(\)"):
        SharedPrimal()(lambda z, t, s: z * z.clone().detach_(), primals, tangents)


# --- rows that mix by little
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES[:3], ids=repr)
def test_a_small_part_that_mixes_rows_is_found_beside_a_large_one(route):
    primals, tangents = arguments()

    def model(z, t, s):
        small = 1e-4 * (z - z.mean(0)) * t[:, None]
        return torch.cat([300 + z, small], 1)

    _, derivative, rows = derived(route, model, primals, tangents)
    wanted = exact(model, primals, tangents)[1][rows]
    torch.testing.assert_close(derivative[:, 3:], wanted[:, 3:], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mixing", [1e-2, 1e-3, 1e-4, 1e-5])
@each_second_run
def test_rows_that_mix_by_little_make_no_large_error(mixing, route):
    primals, tangents = arguments()

    def model(z, t, s):
        x = z.float() * t[:, None].float()
        return (x + mixing * torch.sin(3 * x.mean(0))).to(z.dtype)

    def exactly(z, t, s):
        x = z * t[:, None]
        return x + mixing * torch.sin(3 * x.mean(0))

    route = type(route)() if isinstance(route, ForwardMode) else FiniteDifference()
    _, derivative, rows = derived(route, model, primals, tangents)
    error = (derivative - exact(exactly, primals, tangents)[1][rows]).abs().max()
    assert error < 5e-3


def test_an_operator_without_a_derivative_is_refused_whatever_it_returns():
    primals, tangents = arguments()
    with torch.library._scoped_library("flowspace_tests_state", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CPU")
        library.define("both(Tensor x) -> (Tensor, Tensor)")
        library.impl("both", lambda x: (2 * x, 3 * x), "CPU")
        operators = torch.ops.flowspace_tests_state
        for model in (
            lambda z, t, s: operators.twice(z),
            lambda z, t, s: operators.both.default(z)[1],
        ):
            for route in ROUTES[:2]:
                with pytest.raises(DerivativeError, match="no forward derivative"):
                    derived(route, model, primals, tangents)


PARTS = {
    "fewer rows are gathered": lambda x: x.gather(1, torch.zeros(3, 3, 4, dtype=torch.long)),
    "a numpy mask over the batch": lambda x: x.transpose(0, 1)[np.ones((5, 4), bool)],
    "a mask of bytes over the batch": lambda x: x.transpose(0, 1)[torch.ones(5, 4).byte()],
}


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("name", PARTS)
def test_an_index_of_other_rows_than_the_batch_is_followed(name):
    def model(x, t):
        h = x * t[:, None, None]
        return h * PARTS[name](h).sum()

    x, t = normal(0, 4, 5, 4).double(), torch.linspace(0.1, 0.9, 4).double()
    given = (x, t), (x.cos(), torch.ones_like(t))
    rows = torch.arange(4) < 2
    _, derivative = SharedPrimal()(model, *given, rows)
    wanted = torch.func.jvp(model, *given)[1]
    torch.testing.assert_close(derivative[rows], wanted[rows])


@pytest.mark.parametrize("step", [5e-3, 2e-2])
def test_differences_are_of_one_state_where_it_moves_by_little(step):
    """Each evaluation moves the estimate of a norm: less than the values do along the tangents."""
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.spectral_norm
    net = nn.Sequential(norm(nn.Linear(33, 64)), nn.SiLU(), norm(nn.Linear(64, 32)))
    for _ in range(20):
        net(torch.randn(1, 33))

    def model(z, t):
        return net(torch.cat([z, t[:, None]], 1))

    t = torch.rand(16) * 0.8 + 0.1
    given = (normal(1, 16, 32).float(), t), (normal(2, 16, 32).float(), torch.ones(16))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    _, wanted = SharedPrimal()(model, *given)
    net.load_state_dict(before)
    _, found = FiniteDifference(step)(model, *given)
    assert (found - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("batch", [1, 2])
def test_each_process_evaluates_once_whatever_rows_it_has_to_differentiate(monkeypatch, batch):
    """Of a batch of one row, none of which moves, two are asked for: one row would be the batch,
    whose axis is then not found after a transpose, and the others would wait.
    """
    monkeypatch.setattr(routes, "several_processes", lambda: True)
    calls = []

    def model(z, t, s):
        calls.append(z)
        return (z * (1 + t - s)[:, None, None]).transpose(1, 2).reshape(len(z), -1, 4)

    t = torch.full((batch,), 0.6)
    z = normal(0, batch, 4, 4).float()
    for moving in range(batch + 1):
        rows = torch.arange(batch) < moving
        SharedPrimal()(model, (z, t, t / 2), (z.cos(), torch.ones_like(t), None), rows)
    assert len(calls) == batch + 1


@pytest.mark.parametrize("moving", [3, 6])
def test_a_step_that_is_too_coarse_for_the_model_is_told(moving):
    """Models of diffusers are given t * 1000: half a period of a fast embedding lies in a step."""

    def model(z, t, s):
        return z * torch.sin(300 * t)[:, None] + s[:, None]

    primals, tangents = arguments()
    rows = torch.arange(6) < moving
    with pytest.warns(UserWarning, match=r"write FiniteDifference\(0.0001\)"):
        FiniteDifference()(model, primals, tangents, rows)
    _, found = FiniteDifference(1e-4)(model, primals, tangents, rows)
    wanted = exact(model, primals, tangents)[1][rows]
    assert (found[rows] - wanted).norm() < 1e-3 * wanted.norm()


def test_a_tensor_made_of_numbers_that_move_is_refused_in_forward_mode():
    """torch.Tensor([t[0]]) ends in an internal assertion of torch."""
    primals, tangents = arguments()
    with pytest.raises(DerivativeError, match="cannot differentiate"):
        derived(ForwardMode(), lambda z, t, s: z * torch.Tensor([t[0]]), primals, tangents)
