"""What reaches a model past every function mode, or changes in it: refused by name, in the first
passes over a model and in ever fewer later. A constant is none the worse for its origin.
"""

import contextlib
import copy
import ctypes
import functools
import gc
import math
import pickle
import queue
import threading
from collections import Counter
from multiprocessing.pool import ThreadPool

import numpy
import pytest
import torch
from programs import choose
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.dlpack import to_dlpack

from flowspace import DerivativeError, FiniteDifference, ForwardMode, SharedPrimal
from flowspace.derivatives.shared_primal import passes, watch

DOUBLE = torch.float64
ROUTES = [SharedPrimal(), ForwardMode()]


@pytest.fixture(scope="module", autouse=True)
def _end_of_the_pool():
    yield
    POOL.terminate()


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


WEIGHT = normal(0, 6, 6)
PRIMALS = normal(1, 4, 6), torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=DOUBLE)
TANGENTS = normal(2, 4, 6), torch.ones(4, dtype=DOUBLE)
BOTH = PRIMALS, TANGENTS


@pytest.fixture(autouse=True)
def _new_models(monkeypatch):
    monkeypatch.setattr(passes, "_passes", Counter())


def by_differences(fn, rows=None):
    (z, t), (dz, dt), step = PRIMALS, TANGENTS, 1e-5
    derivative = (fn(z + step * dz, t + step * dt) - fn(z - step * dz, t - step * dt)) / (2 * step)
    derivative = derivative.detach()
    return derivative if rows is None else derivative * rows[:, None]


def near(found, exact):
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7)


def hidden(function, *args):
    with torch._C.DisableTorchFunction():
        return function(*args)


def numbers_at(tensor):
    return (ctypes.c_double * tensor.numel()).from_address(tensor.data_ptr())


# --- what moves, unseen

POOL = ThreadPool(1)
TASKS, RESULTS = queue.Queue(), queue.Queue()
SCRATCH = torch.zeros(4, 6, dtype=DOUBLE)


def work():
    while True:
        RESULTS.put(TASKS.get().sin())


threading.Thread(target=work, daemon=True).start()


def by_worker(x):
    TASKS.put(x)
    return RESULTS.get()


def squared_by_numpy(h):
    array = h.numpy()
    numpy.multiply(array, array, out=array)


def squared_by_address(source, target):
    for i, number in enumerate(numbers_at(source)):
        numbers_at(target)[i] = number**2


def memory_of_another(h):
    other = torch.empty(0, dtype=DOUBLE)
    other.set_(h)
    return other


def with_zeros(h):
    h[:, 0] = 0
    return h


def written(write):
    """A model that writes unseen into what moves."""

    def model(z, t):
        h = z * 2
        write(h)
        return h * t[:, None]

    return model


def filled(write):
    """A model that writes unseen into zeros of its own."""

    def model(z, t):
        out = torch.zeros_like(z)
        write(z * 2, out)
        return out * t[:, None] + z

    return model


def to_scratch(z, t):
    hidden(SCRATCH.copy_, z.sin())
    return SCRATCH * t[:, None]


class Workspace(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("space", torch.zeros(4, 6, dtype=DOUBLE))

    def forward(self, z, t):
        squared_by_address(z.detach(), self.space)
        return self.space * t[:, None]


UNSEEN = {
    "dlpack": lambda z, t: torch.from_dlpack(to_dlpack(z * 2)).sin() * z,
    "a pool of before": lambda z, t: POOL.apply(torch.sin, (z,)) * z,
    "a pool of before, row by row": lambda z, t: torch.stack(POOL.map(torch.sin, list(z))) * z,
    "a worker of before": lambda z, t: by_worker(z) * z,
    "a worker of before, of times": lambda z, t: by_worker(t)[:, None] * z,
    "before the first weights": lambda z, t: hidden(torch.sin, z) * t[:, None],
    "as the value": lambda z, t: hidden(torch.mul, z, t[:, None]),
    "in place": written(lambda h: hidden(h.mul_, h)),
    "in place, through detach": written(lambda h: hidden(h.detach().mul_, 3)),
    "in place, the latents": lambda z, t: hidden(z.mul_, z) * t[:, None],
    "before it is changed": lambda z, t: hidden(torch.sin, z).mul_(2).view(4, 6) * t[:, None],
    "before a part is changed": lambda z, t: with_zeros(hidden(torch.sin, z)) * t[:, None],
    "into zeros": filled(lambda h, out: hidden(out.copy_, h.sin())),
    "into a variable": to_scratch,
    "into a buffer": Workspace(),
    "numpy, through detach": written(lambda h: squared_by_numpy(h.detach())),
    "numpy, through data": written(lambda h: squared_by_numpy(h.data)),
    "numpy, then torch": written(lambda h: (squared_by_numpy(h.detach()), h.mul_(2))),
    "an address": written(lambda h: squared_by_address(h, h)),
    "an address, through detach": written(lambda h: squared_by_address(h.detach(), h)),
    "addresses": filled(squared_by_address),
    "set_": lambda z, t: memory_of_another(z * 2) * t[:, None],
    "set_, through detach": written(lambda h: (o := memory_of_another(h.detach())).mul_(o)),
}


@pytest.mark.parametrize("rows", [None, "half"])
@pytest.mark.parametrize("name", UNSEEN)
def test_what_moves_unseen_is_refused(name, rows):
    with pytest.raises(DerivativeError, match="torch shows to no function mode"):
        SharedPrimal()(UNSEEN[name], PRIMALS, TANGENTS, choose(4, rows))


OF_TORCH = {"in place", "in place, through detach", "in place, the latents"}
"""What torch itself gets wrong, where nobody sees it."""

FOLLOWED_BY_TORCH = {
    "before the first weights",
    "as the value",
    "before it is changed",
    "before a part is changed",
    "into zeros",
}


@pytest.mark.parametrize("rows", [None, "half"])
@pytest.mark.parametrize("name", sorted(set(UNSEEN) - OF_TORCH))
def test_forward_mode_refuses_it_or_is_right(name, rows):
    mask = choose(4, rows)
    if name in FOLLOWED_BY_TORCH:
        found = ForwardMode()(UNSEEN[name], PRIMALS, TANGENTS, mask)[1]
        near(found, by_differences(UNSEEN[name], mask))
        return
    with pytest.raises(DerivativeError):
        ForwardMode()(UNSEEN[name], PRIMALS, TANGENTS, mask)


@pytest.mark.parametrize("rows", [None, "half"])
@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_it_is_found_between_compiled_parts(after, mixes, rows):
    """Also where rows mix, and the tangent comes from a second pass."""
    weight = WEIGHT.clone().requires_grad_()
    block = torch.compile(lambda h: (h @ weight).tanh(), backend="aot_eager")

    def model(z, t, unseen=True):
        h = z - z.mean(0) if mixes else z
        h = block(h * t[:, None]) if after else h * t[:, None]
        h = by_worker(h.detach() + 0 * h) if unseen else h.sin()
        return block(h)

    seen = functools.partial(model, unseen=False)
    mask = choose(4, rows)
    near(SharedPrimal()(seen, PRIMALS, TANGENTS, mask)[1], by_differences(seen, mask))
    with pytest.raises(DerivativeError, match="torch shows to no function mode"):
        SharedPrimal()(model, PRIMALS, TANGENTS, mask)


def test_what_a_compiled_part_returns_may_not_be_written_to_unseen():
    doubled = torch.compile(lambda h: h * 2, backend="aot_eager")

    def model(z, t):
        h = doubled(z)
        hidden(h.mul_, h)
        return h * t[:, None]

    with pytest.raises(DerivativeError, match="written to unseen"):
        SharedPrimal()(model, PRIMALS, TANGENTS)


PARTS = torch.compile(lambda h: h * 2, backend="aot_eager")
STILL_FOUND = {
    "after a list of constants": lambda z, t: (
        torch.linspace(0, 1, 3).tolist(),
        hidden(torch.sin, z) * t[:, None],
    )[1],
    "after a number of constants": lambda z, t: (
        torch.ones(2).sum().item(),
        hidden(torch.sin, z) * t[:, None],
    )[1],
    "before a compiled part": lambda z, t: PARTS(hidden(torch.sin, z)) * t[:, None],
    "round a compiled part": lambda z, t: [h := hidden(torch.sin, z), PARTS(z) * h][1],
    "after a collection": lambda z, t: [
        h := hidden(torch.sin, z),
        gc.collect(),
        h * t[:, None],
    ][2],
}


@pytest.mark.parametrize("name", STILL_FOUND)
def test_it_is_found_whatever_else_a_model_does(name):
    with pytest.raises(DerivativeError, match="torch shows to no function mode"):
        SharedPrimal()(STILL_FOUND[name], PRIMALS, TANGENTS)


def test_an_attribute_of_a_module_may_not_be_written_to_unseen():
    class Scratch(nn.Module):
        space = None

        def __init__(self):
            super().__init__()
            self.space = torch.zeros(4, 6, dtype=DOUBLE)

        def forward(self, z, t):
            hidden(self.space.copy_, z.sin())
            return self.space * t[:, None]

    model = Scratch()
    with pytest.raises(DerivativeError, match="torch shows to no function mode"):
        SharedPrimal()(model, PRIMALS, TANGENTS)


def test_the_message_names_the_function_that_has_a_gradient():
    weight = WEIGHT.clone().requires_grad_()

    def model(z, t):
        return hidden(torch.tanh, z @ weight) * t[:, None]

    with pytest.raises(DerivativeError, match=r"shape \(4, 6\).*TanhBackward0 in the backward"):
        SharedPrimal()(model, PRIMALS, TANGENTS)


# --- what stands still, whatever made it


def dequantized(levels):
    """As an extension in C does it, of weights in whole numbers."""
    weight = torch.empty(levels.shape, dtype=DOUBLE)
    for i, level in enumerate(levels.flatten().tolist()):
        numbers_at(weight)[i] = 0.1 * level
    return weight


def uninitialised(z, t):
    noise = torch.DoubleTensor(4, 6).fill_(0.3)
    parts = torch.DoubleTensor(4, 6)
    parts[:, :3], parts[:, 3:] = 0.2, noise[:, 3:]
    return z * parts * t[:, None]


class Remembering(nn.Module):
    """Uses one norm twice, whose statistics are then other ones."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6, dtype=DOUBLE)

    def forward(self, z, t):
        return self.norm(self.norm(z).sin() * t[:, None])


LEVELS = torch.arange(36).reshape(6, 6) % 7
AT_REST = {
    "torch.Tensor": lambda z, t: torch.Tensor([2.0, 3.0])[1].double() * z * t[:, None],
    "numpy": lambda z, t: z @ torch.from_numpy(numpy.full((6, 6), 0.2)) * t[:, None],
    "weights, unseen": lambda z, t: z @ hidden(WEIGHT.sin) * t[:, None],
    "weights of an extension": lambda z, t: z @ dequantized(LEVELS) * t[:, None],
    "weights in another thread": lambda z, t: z @ by_worker(WEIGHT) * t[:, None],
    "uninitialised": uninitialised,
    "an address that is asked for": lambda z, t: z * t[:, None] * (1 + z.data_ptr() % 2),
    "numpy's draws": lambda z, t: z * torch.from_numpy(numpy.random.randn(4, 6)) * t[:, None],
}


@pytest.mark.parametrize("rows", [None, "half"])
@pytest.mark.parametrize("route", ROUTES, ids=repr)
@pytest.mark.parametrize("name", AT_REST)
def test_what_stands_still_may_come_from_anywhere(name, route, rows):
    asks = name in ("an address that is asked for", "weights of an extension")
    if asks and isinstance(route, ForwardMode):
        pytest.skip("torch.func.jvp has no addresses")
    mask = choose(4, rows)

    def model(z, t):
        numpy.random.seed(0)
        return AT_REST[name](z, t)

    near(route(model, PRIMALS, TANGENTS, mask)[1], by_differences(model, mask))


@pytest.mark.parametrize("rows", [None, "half"])
def test_statistics_belong_to_their_norm(rows):
    model, plain, calls = Remembering(), Remembering(), []
    model.register_forward_hook(lambda *_: calls.append(None))
    mask = choose(4, rows)
    near(SharedPrimal()(model, PRIMALS, TANGENTS, mask)[1], by_differences(Remembering(), mask))
    assert len(calls) == (2 if rows else 1)
    plain(*PRIMALS)
    near(model.norm.running_mean, plain.norm.running_mean)


def test_what_a_compiled_part_makes_is_no_stranger():
    doubled = torch.compile(lambda h: h * 2, backend="aot_eager")
    model, calls = counted(lambda z, t: doubled(WEIGHT)[:4] * z * t[:, None])
    SharedPrimal()(model, PRIMALS, TANGENTS)
    assert len(calls) == 1


def test_weights_that_have_a_gradient_may_be_prepared_unseen():
    weight = WEIGHT.clone().requires_grad_()

    def model(z, t):
        return z @ hidden(weight.sin) * t[:, None]

    value, derivative = SharedPrimal()(model, PRIMALS, TANGENTS)
    near(derivative, by_differences(model))
    gradients = [
        torch.autograd.grad(x.square().sum(), weight)[0] for x in (value, model(*PRIMALS))
    ]
    near(*gradients)


def with_address_asked(x):
    rounded = (x * 1e9).long()
    rounded.data_ptr()
    return torch.DoubleTensor(rounded.tolist()).sin()


CONSTANT_ON_PURPOSE = {
    "a list of what an address was asked of": with_address_asked,
    "numpy": lambda x: torch.from_numpy(numpy.sin(x.detach().numpy())),
    "a list": lambda x: torch.DoubleTensor(x.detach().tolist()).sin(),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())).sin(),
    "a deep copy": lambda x: copy.deepcopy(x.detach()).sin(),
    "dlpack": lambda x: torch.from_dlpack(x.detach()).sin(),
    "a mask": lambda x: torch.from_numpy((x > 0).numpy().astype(float)),
    "a route": lambda x: SharedPrimal()(torch.sin, (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.parametrize("name", CONSTANT_ON_PURPOSE)
def test_what_was_detached_counts_as_constant_wherever_it_goes(name):
    def model(z, t):
        return CONSTANT_ON_PURPOSE[name](z) * z * t[:, None]

    fixed = CONSTANT_ON_PURPOSE[name](PRIMALS[0])
    exact = torch.func.jvp(lambda z, t: fixed * z * t[:, None], PRIMALS, TANGENTS)[1]
    near(SharedPrimal()(model, PRIMALS, TANGENTS)[1], exact)


def test_modules_that_are_gone_leave_nothing_and_others_are_new():
    before = len(passes._numbers)
    for _ in range(3):
        assert passes.is_watched(nn.Linear(6, 6))
    gc.collect()
    assert len(passes._numbers) == before


@pytest.mark.parametrize("rows", [None, "half"])
def test_what_is_written_through_the_memory_of_a_detached_tensor_is_followed(rows):
    def model(z, t):
        h = z * 2
        other = torch.empty(0, dtype=DOUBLE)
        other.set_(h.detach().untyped_storage(), 0, h.shape)
        other.mul_(3)
        return h * t[:, None]

    mask = choose(4, rows)
    near(SharedPrimal()(model, PRIMALS, TANGENTS, mask)[1], by_differences(model, mask))


# --- how it is done


def counted(model):
    calls = []

    def counting(z, t):
        calls.append(z)
        return model(z, t)

    return counting, calls


@pytest.mark.parametrize("number", [1, 3])
def test_a_model_is_evaluated_again_only_where_something_is_strange(number):
    ordinary, calls = counted(lambda z, t: (z @ WEIGHT).sin() * t[:, None])
    strange, others = counted(AT_REST["torch.Tensor"])
    for _ in range(number):
        SharedPrimal()(ordinary, PRIMALS, TANGENTS)
        SharedPrimal()(strange, PRIMALS, TANGENTS)
    assert len(calls) == number
    assert len(others) == number + 2 * min(number, 2)  # in passes 1 and 2


def test_the_point_nearby_has_times_between_0_and_1():
    for t in (0.0, 0.5, 1.0):
        times = torch.full((4,), t)
        (moved,) = watch.moved_a_little([times], [torch.ones(4)])
        assert ((moved >= 0) & (moved <= 1) & (moved != times)).all()
        (moved,) = watch.moved_a_little([times.bfloat16()], [torch.ones(4)])
        assert moved.dtype == torch.bfloat16
    low = [torch.rand(8, dtype=torch.bfloat16) * 4 - 2]
    assert (watch.moved_a_little(low, [torch.ones(8, dtype=torch.bfloat16)])[0] != low[0]).all()
    mixed = [normal(3, 4).to(torch.complex128), 7]
    moved = watch.moved_a_little(mixed, [torch.ones(4, dtype=torch.complex128), None])
    assert (moved[0] != mixed[0]).all() and moved[1] == 7


def test_what_becomes_strange_later_is_found_later():
    def model(z, t):
        return (by_worker(z) if number >= 3 else z.sin()) * t[:, None]

    for number in range(1, 4):  # noqa: B007
        SharedPrimal()(model, PRIMALS, TANGENTS)
    with pytest.raises(DerivativeError, match="torch shows to no function mode"):
        SharedPrimal()(model, PRIMALS, TANGENTS)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("route", ROUTES, ids=repr)
def test_pythons_collector_is_left_as_it_was(route, enabled):
    def failing(z, t):
        raise ValueError("the model's own")

    (gc.enable if enabled else gc.disable)()
    try:
        route(lambda z, t: z * t[:, None], PRIMALS, TANGENTS)
        assert gc.isenabled() == enabled
        with pytest.raises(ValueError, match="own"):
            route(failing, PRIMALS, TANGENTS)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_pythons_collector_calls_nobody_after_a_pass():
    before = list(gc.callbacks)
    for failing in (False, True):
        with contextlib.suppress(ZeroDivisionError):
            SharedPrimal()(lambda z, t, f=failing: z * t[:, None] / (1 // (not f)), *BOTH)
        assert gc.callbacks == before


def test_where_processes_wait_for_each_other_what_has_a_gradient_is_refused(monkeypatch):
    monkeypatch.setattr(watch, "several_processes", lambda: True)
    weight = WEIGHT.clone().requires_grad_()
    constant, calls = counted(AT_REST["torch.Tensor"])
    near(SharedPrimal()(constant, PRIMALS, TANGENTS)[1], by_differences(AT_REST["torch.Tensor"]))
    assert len(calls) == 1
    with pytest.raises(DerivativeError, match="TanhBackward0"):
        SharedPrimal()(lambda z, t: hidden(torch.tanh, z @ weight) * t[:, None], PRIMALS, TANGENTS)


class Table(nn.Module):
    """Builds it in its first call."""

    table = None

    def forward(self, z, t):
        if self.table is None:
            self.table = torch.DoubleTensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        return z * self.table * t[:, None] * torch.DoubleTensor([2.0])


class Drawing(nn.Module):
    """Draws from generators of its own, and counts in an array that it has of a buffer."""

    def __init__(self):
        super().__init__()
        self.numpy_generator = numpy.random.default_rng(0)
        self.generator = torch.Generator().manual_seed(0)
        self.register_buffer("count", torch.zeros(1, dtype=DOUBLE))
        self.array = self.count.numpy()

    def forward(self, z, t):
        self.array += 1
        noise = torch.DoubleTensor(self.numpy_generator.normal(size=(4, 6)))
        more = torch.rand(4, 6, generator=self.generator, dtype=DOUBLE)
        self.factor = noise * more * self.count
        return z * self.factor * t[:, None]


@pytest.mark.parametrize("rows", [None, "half"])
def test_what_is_another_constant_in_each_call_is_none_of_its_business(rows):
    mask = choose(4, rows)
    model, plain = Table(), Table()
    near(SharedPrimal()(model, PRIMALS, TANGENTS, mask)[1], by_differences(plain, mask))
    model, plain = Drawing(), Drawing()
    derivative = SharedPrimal()(model, PRIMALS, TANGENTS, mask)[1]
    value = plain(*PRIMALS)
    close = value / (PRIMALS[0] * PRIMALS[1][:, None])
    exact = close * (TANGENTS[0] * PRIMALS[1][:, None] + PRIMALS[0])
    near(derivative, exact if mask is None else exact * mask[:, None])
    assert torch.equal(model.generator.get_state(), plain.generator.get_state())


class Halves(torch.Tensor):
    """Says itself what operators do, and knows few."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.mul.Tensor:
            raise NotImplementedError(func)
        return func(*(a.inner if isinstance(a, cls) else a for a in args)) / 2


def stored(values, dtype):
    return torch.frombuffer(bytearray(values), dtype=dtype)


class Averaging(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6, dtype=DOUBLE))

    def forward(self, z, t):
        self.mean.data = z.detach().mean(0)
        return z * self.mean.detach() * t[:, None]


UNUSUAL = {
    "sparse": lambda z, t: (
        z
        @ torch.sparse.DoubleTensor(
            torch.tensor([[0], [1]]), torch.ones(1, dtype=DOUBLE), (6, 6)
        ).to_dense()
    ),
    "a byte": lambda z, t: z * stored([60] * 6, torch.float8_e4m3fn).double() * t[:, None],
    "infinite": lambda z, t: z * torch.DoubleTensor([math.nan, math.inf]).nan_to_num(1, 2)[1],
    "empty": lambda z, t: z * torch.DoubleTensor([]).sum() + z * t[:, None],
    "a subclass": lambda z, t: z * (Halves(WEIGHT[:4]) * 2.0) * t[:, None],
    "expanded": lambda z, t: z * torch.DoubleTensor([2.0]).expand(4, 6) * t[:, None],
    "windows": lambda z, t: z * torch.DoubleTensor(range(9)).unfold(0, 6, 1) * t[:, None],
    "another memory for a buffer": Averaging(),
}


@pytest.mark.filterwarnings("ignore:torch.sparse.SparseTensor")
@pytest.mark.parametrize("name", UNUSUAL)
def test_what_stands_still_may_be_of_any_kind(name):
    model = UNUSUAL[name]
    if name == "another memory for a buffer":
        mean = PRIMALS[0].mean(0)
        exact = torch.func.jvp(lambda z, t: z * mean * t[:, None], *BOTH)[1]
    else:
        exact = by_differences(model)
    near(SharedPrimal()(model, PRIMALS, TANGENTS)[1], exact)


def test_a_model_may_refuse_the_point_nearby():
    def model(z, t):
        assert torch.equal(t.detach(), PRIMALS[1])
        return z * t[:, None] * torch.DoubleTensor([2.0])

    exact = torch.func.jvp(lambda z, t: z * t[:, None] * 2, PRIMALS, TANGENTS)[1]
    near(SharedPrimal()(model, PRIMALS, TANGENTS)[1], exact)


def test_tangents_may_have_another_precision():
    primals = [x.bfloat16() for x in PRIMALS]
    value, _ = SharedPrimal()(
        lambda z, t: z * t[:, None] * torch.Tensor([2.0]).bfloat16(), primals, TANGENTS
    )
    assert value.dtype == torch.bfloat16


def test_threads_and_routes_within_do_not_disturb_it():
    """Python collects cycles for all of them."""

    def inner(x):
        return SharedPrimal()(torch.sin, (x,), (torch.ones_like(x),))[1]

    def model(z, t):
        a = torch.DoubleTensor([2.0])
        h = inner(z) * a
        b = torch.DoubleTensor([3.0])
        return h * z * inner(z) * b * torch.DoubleTensor([4.0]) * t[:, None]

    slope = PRIMALS[0].cos() ** 2 * 24
    exact = torch.func.jvp(lambda z, t: slope * z * t[:, None], PRIMALS, TANGENTS)[1]
    errors = []

    def run():
        try:
            for _ in range(8):
                near(SharedPrimal()(model, PRIMALS, TANGENTS)[1], exact)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


FILLED = {
    "fill_": lambda: torch.Tensor(6).double().fill_(2),
    "normal_": lambda: torch.Tensor(6).to(DOUBLE).normal_(generator=torch.Generator()),
    "columns": lambda: [o := torch.DoubleTensor(4, 6), [o[:, i].fill_(i) for i in range(6)]][0],
    "data": lambda: [o := torch.DoubleTensor(6), o.data.fill_(2)][0],
    "a view": lambda: torch.DoubleTensor(6).view(1, 6).fill_(1),
    "init": lambda: nn.init.constant_(torch.DoubleTensor(4, 6), 0.3),
    "out": lambda: torch.sin(WEIGHT[:4], out=torch.DoubleTensor(4, 6)),
    "clamp_": lambda: torch.DoubleTensor(6).clamp_(1, 1),
    "resize_": lambda: torch.DoubleTensor().resize_(6).fill_(1.0),
}


def test_memory_that_held_what_moves_may_be_filled_in_parts():
    def model(z, t):
        memory = hidden(z.clone)
        for column in range(6):
            memory[:, column].fill_(column)
        return z * memory * t[:, None]

    near(SharedPrimal()(model, PRIMALS, TANGENTS)[1], by_differences(model))


def test_memory_may_be_resized_where_rows_mix():
    def model(z, t):
        h = z * torch.empty(0, dtype=DOUBLE).resize_(6).fill_(2.0) * t[:, None]
        return h - h.mean(0)

    mask = choose(4, "half")
    near(SharedPrimal()(model, PRIMALS, TANGENTS, mask)[1], by_differences(model, mask))


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("route", ROUTES, ids=repr)
def test_memory_may_be_filled_in_any_way(name, route):
    """What it held before may be anything, also what moved and was freed."""

    def model(z, t):
        for size in (6, 24):
            [z.flatten()[:size].sin() for _ in range(20)]
        return (z * FILLED[name]()) * t[:, None]

    near(route(model, PRIMALS, TANGENTS)[1], by_differences(model))


# --- dispatch modes


class Steeper(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.ops.aten.sin.default else out


class Cosine(TorchDispatchMode):
    """Only for what writes in place."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.sin_.default:
            func = torch.ops.aten.cos_.default
        return func(*args, **(kwargs or {}))


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def within(mode, function):
    def model(z, t):
        h = z * 2
        with mode():
            h = function(h)
        return h * t[:, None]

    return model


@pytest.mark.parametrize("rows", [None, "half"])
@pytest.mark.parametrize("route", ROUTES, ids=repr)
@pytest.mark.parametrize(
    "model", [within(Steeper, torch.sin), within(Cosine, torch.sin_)], ids=["returns", "writes"]
)
def test_a_dispatch_mode_that_changes_functions_is_refused(model, route, rows):
    with pytest.raises(DerivativeError, match=r"got another value of sin_? within (Steep|Cos)"):
        route(model, PRIMALS, TANGENTS, choose(4, rows))
    FiniteDifference()(model, PRIMALS, TANGENTS, choose(4, rows))


@pytest.mark.parametrize("rows", [None, "half"])
@pytest.mark.parametrize("route", ROUTES, ids=repr)
@pytest.mark.parametrize("function", [torch.sin, torch.sin_, nn.Dropout(0.5), nn.Softmax(1)])
def test_one_that_changes_nothing_is_followed(function, route, rows):
    model, mask = within(Counting, function), choose(4, rows)

    def seeded(z, t):
        torch.manual_seed(0)
        return model(z, t)

    near(route(seeded, PRIMALS, TANGENTS, mask)[1], by_differences(seeded, mask))


@pytest.mark.parametrize("route", ROUTES, ids=repr)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_statistics_are_written_once_within_one(norm, route):
    options = {"track_running_stats": True, "dtype": DOUBLE}
    model, plain = norm(4 if norm is nn.InstanceNorm1d else 6, **options), None
    plain = copy.deepcopy(model)

    def normed(model):
        return lambda z, t: model(z) * t[:, None]

    with Counting():
        route(normed(model), PRIMALS, TANGENTS)
    normed(plain)(*PRIMALS)
    near(model.running_mean, plain.running_mean)


# --- forward mode, where torch itself is silent


STOPPED = {
    "weights": lambda z: [w := z.softmax(-1).detach(), w.div_(w.sum(0, keepdim=True) + 1)][1],
    "clamped": lambda z: z.abs().detach().clamp_(min=0.1),
    "masked": lambda z: [w := (z * 2).detach(), w.__setitem__(w < 0, 0)][0],
    "relu": lambda z: nn.functional.relu((z * 2).detach(), inplace=True),
    "filled with another": lambda z: torch.zeros_like(z).copy_((z * 3).detach().mul_(2)),
}


@pytest.mark.parametrize("rows", [None, "half"])
@pytest.mark.parametrize("route", ROUTES, ids=repr)
@pytest.mark.parametrize("name", STOPPED)
def test_what_was_detached_of_a_passing_result_may_be_written_to(name, route, rows):
    fixed, mask = STOPPED[name](PRIMALS[0]), choose(4, rows)
    exact = torch.func.jvp(lambda z, t: z * fixed * t[:, None], PRIMALS, TANGENTS)[1]
    exact = exact if mask is None else exact * mask[:, None]
    model = lambda z, t: z * STOPPED[name](z) * t[:, None]  # noqa: E731
    near(route(model, PRIMALS, TANGENTS, mask)[1], exact)


def test_forward_mode_refuses_a_value_that_was_written_to_through_detach():
    def model(z, t):
        h = z * t[:, None]
        h.detach().mul_(3)
        return h

    with pytest.raises(DerivativeError, match=r"got a write into x\.detach\(\)"):
        ForwardMode()(model, PRIMALS, TANGENTS)


@pytest.mark.parametrize("rows", [None, "half"])
@pytest.mark.parametrize("route", ROUTES, ids=repr)
@pytest.mark.parametrize(
    "write",
    [
        lambda h: h.mul_(h),
        lambda h: h.sub_(h * 0.3).mul_(h),
        lambda h: h.mul_(h[:]),
        lambda h: h.mul_(other=h),
        lambda h: h.div_(h.T.T.exp()).mul_(h.detach()),
    ],
)
def test_a_function_may_write_into_what_it_reads(write, route, rows):
    mask, model = choose(4, rows), written(write)
    detached = PRIMALS[0] * 2 / (PRIMALS[0] * 2).exp()

    def apart(z, t):
        h = z * 2
        names = write.__code__.co_names
        if "detach" in names:
            return h / h.exp() * detached * t[:, None]
        return (h - h * 0.3 if "sub_" in names else h) ** 2 * t[:, None]

    near(route(model, PRIMALS, TANGENTS, mask)[1], by_differences(apart, mask))


@pytest.mark.parametrize("rows", [None, "half"])
@pytest.mark.parametrize(
    "write",
    [
        lambda h: h.detach().mul_(3),
        lambda h: h.detach().copy_(h.sin()),
        lambda h: h.detach()[:, 1:].zero_(),
        lambda h: h.detach().__setitem__((slice(None), 0), math.pi),
    ],
)
def test_forward_mode_refuses_writes_through_detach(write, rows):
    model, mask = written(write), choose(4, rows)
    with pytest.raises(DerivativeError, match=r"got a write into x\.detach\(\)"):
        ForwardMode()(model, PRIMALS, TANGENTS, mask)
    near(SharedPrimal()(model, PRIMALS, TANGENTS, mask)[1], by_differences(model, mask))
