"""What a model does past torch's function modes: writes through views, lists, ``.data`` and
operators, copies, and functions that were looked up before. Each is right, or refused by name.
"""

import concurrent.futures
import contextlib
import copy
import functools
import gc
import threading
import weakref
from collections import Counter

import numpy
import pytest
import torch
from comparison import left_in_cycles, untouched
from torch import nn
from torch.masked import masked_tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from flowspace import DerivativeError, FiniteDifference, ForwardMode, SharedPrimal
from flowspace.derivatives.hidden_calls import active_carrier, follows_compiled
from flowspace.derivatives.shared_primal import passes

DOUBLE = torch.float64
HALF = torch.tensor([True, False, True, False])
ROUTES = [SharedPrimal(), ForwardMode(), FiniteDifference(), FiniteDifference(order=1)]


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


WEIGHT = normal(0, 6, 6)
PRIMALS = normal(1, 4, 6), torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=DOUBLE)
TANGENTS = normal(2, 4, 6), torch.ones(4, dtype=DOUBLE)


def wanted(fn, rows=None):
    derivative = torch.func.jvp(fn, PRIMALS, TANGENTS)[1]
    return derivative if rows is None else derivative * rows[:, None]


def close(found, exact, tolerance=1e-9):
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)


# --- writes into what the model holds


@torch.library.custom_op("unseen_calls::double", mutates_args={"x"})
def double(x: torch.Tensor) -> None:
    x.mul_(2)


@torch.library.custom_op("unseen_calls::sine_into", mutates_args={"out"})
def sine_into(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x.sin())


@torch.library.custom_op("unseen_calls::number", mutates_args=())
def number(x: torch.Tensor) -> float:
    return float(x.sum())


def read_and_written(buffer):
    values, indices = buffer[None], torch.zeros(1, dtype=torch.long)
    torch.max(values * 2, 0, out=(buffer, indices))


WRITES = {
    "a view": lambda n: n[0].add_(1),
    "an operator of Python": lambda n: n.__setitem__(0, n[0].__iadd__(1)),
    "a view of one axis more": lambda n: n.unsqueeze(0).mul_(2),
    "data": lambda n: n.data.add_(1),
    "data, twice": lambda n: n.data.mul_(4) is n.data.sub_(2),
    "itself, and data": lambda n: n.mul_(4) is n.data.sub_(2),
    "a list": lambda n: torch._foreach_add_([n], 1.0),
    "two results": read_and_written,
    "an operator of torch.library": double,
    "an operator of aten": lambda n: torch.ops.aten.add_(n, 1.0),
}


@pytest.mark.parametrize("mixes", [False, True], ids=["apart", "mixed"])
@pytest.mark.parametrize("route", ROUTES, ids=repr)
@pytest.mark.parametrize("name", WRITES)
def test_a_buffer_moves_once_however_it_is_written(name, route, mixes):
    buffer = torch.ones(1, dtype=DOUBLE)

    def fn(z, t):
        WRITES[name](buffer)
        h = (z @ WEIGHT).sin() * t[:, None]
        return h - h.mean(0) if mixes else h

    try:
        route(fn, PRIMALS, TANGENTS, HALF)
    except DerivativeError as error:
        assert "write" in str(error)  # refused by name
    assert buffer == 2


@pytest.mark.parametrize("name", [name for name in WRITES if name != "two results"])
@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
def test_a_buffer_that_is_written_and_used_is_the_plain_programs(name, rows):
    """Also in the backward pass: the second pass leaves no count of a write."""
    weight = WEIGHT.clone().requires_grad_()

    def evaluate(buffer):
        def fn(z, t):
            WRITES[name](buffer)
            h = (z @ weight).sin() * t[:, None]
            return (h - h.mean(0)) * buffer

        return fn

    plain = evaluate(torch.ones(1, dtype=DOUBLE))(*PRIMALS)
    value, derivative = SharedPrimal()(
        evaluate(torch.ones(1, dtype=DOUBLE)), PRIMALS, TANGENTS, rows
    )
    close(value, plain)
    close(derivative, wanted(lambda z, t: 2 * plain_part(z, t, WEIGHT), rows))
    gradients = [torch.autograd.grad(x.square().sum(), weight)[0] for x in (value, plain)]
    close(*gradients)


def plain_part(z, t, weight):
    h = (z @ weight).sin() * t[:, None]
    return h - h.mean(0)


def test_finite_differences_start_each_evaluation_from_the_same_buffers():
    """Values that lie on one line because a buffer moved at each step are refused."""
    buffer = torch.ones(1, dtype=DOUBLE)

    def fn(z, t):
        buffer.add_(1)
        return plain_part(z, t, WEIGHT) * buffer

    for route in ROUTES[1:]:
        with pytest.raises(DerivativeError, match="remembers its calls"):
            route(fn, PRIMALS, TANGENTS)


def filled(z, t):
    out = torch.zeros(5, 6, dtype=DOUBLE)
    out[1:] = z @ WEIGHT * t[:, None]
    return out[1:] * out[:-1]


def gathered(z, t):
    h = z @ WEIGHT * t[:, None]
    out = torch.zeros_like(h)
    order = torch.tensor([2, 0, 3, 1])
    out.index_add_(0, order, h[order])
    out[order] = h.sin()[order] * out[order]
    return out * out


@pytest.mark.parametrize("fn", [filled, gathered])
@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
def test_what_a_model_fills_across_rows_goes_through_the_backward_pass(fn, rows):
    inputs = [primal.clone().requires_grad_() for primal in PRIMALS]
    value, derivative = SharedPrimal()(fn, inputs, TANGENTS, rows)
    plain = fn(*inputs)
    close(value, plain)
    close(derivative, wanted(fn, rows))
    for found, exact in zip(
        torch.autograd.grad(value.square().sum(), inputs),
        torch.autograd.grad(plain.square().sum(), inputs),
        strict=True,
    ):
        close(found, exact)


# --- what moves, written or handed on past the modes


def summed_into(z, t):
    out = torch.zeros(4, 1, dtype=DOUBLE)
    torch.sum(z, 1, keepdim=True, out=out)
    return z * out


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def dirty(z, t):
    h = z * t[:, None]
    Dirty.apply(h)
    return h * z


def dirty_and_written(z, t):
    h = z * t[:, None]
    y = Dirty.apply(h)
    y.add_(z)
    return h * z + y


def written_in_part(z, t):
    h = z * t[:, None]
    part = h[:, 1:]
    Dirty.apply(h)
    return h.sum(1, keepdim=True) * part


def sine_in_a_buffer(z, t):
    out = torch.zeros_like(z)
    sine_into(z * t[:, None], out)
    return out * z


def doubled(z, t):
    h = z * t[:, None]
    double(h)
    return h


PAST = {
    "an argument that a rule does not know": lambda z, t: (z * t[:, None]).scatter_(
        1, torch.zeros(4, 1, dtype=torch.long), 2.0, reduce="multiply"
    ),
    "memory": lambda z, t: z * torch.tensor((t * 2).untyped_storage().tolist()[:6]),
    "memory as numbers": lambda z, t: z * (t * 2).storage()[0],
    "out=": summed_into,
    "out= of what is constant": lambda z, t: torch.cos(WEIGHT[:4], out=z * 2) * z,
    "a function that writes into a part": written_in_part,
    "an operator that writes into a buffer": sine_in_a_buffer,
    "an operator that writes into what moves": doubled,
    "an operator that returns a number": lambda z, t: z * number(z * t[:, None]),
    "a list of what moves": lambda z, t: torch._foreach_mul_([z * 2], 3.0) or z,
    "pickling": lambda z, t: copy.copy(z * 2) * z,
    "dlpack": lambda z, t: torch.from_dlpack((z * 2).detach() + z) * z,
}


@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
@pytest.mark.parametrize("name", PAST)
def test_what_tangents_cannot_follow_is_refused(name, rows):
    with pytest.raises(DerivativeError, match="write"):
        SharedPrimal()(PAST[name], PRIMALS, TANGENTS, rows)


def summed_by_threads(z, t):
    found = []
    threads = [
        threading.Thread(target=lambda x=x: found.append((x * t[:, None]).sin()))
        for x in (z, z * 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found[0] + found[1]


def summed_by_a_pool(z, t):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return sum(pool.map(lambda x: x * t[:, None], [z, WEIGHT[:4]]))


POOL = concurrent.futures.ThreadPoolExecutor(1)


def added_by_a_pool_of_before(z, t):
    return z * POOL.submit(torch.stack, [t] * 6, 1).result()


@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
@pytest.mark.parametrize("route", ROUTES[:2])
@pytest.mark.parametrize("fn", [summed_by_threads, summed_by_a_pool, added_by_a_pool_of_before])
def test_what_moves_in_another_thread_is_refused(fn, route, rows):
    POOL.submit(torch.ones, 1).result()
    with pytest.raises(DerivativeError, match="in another thread"):
        route(fn, PRIMALS, TANGENTS, rows)
    derivative = FiniteDifference(1e-3)(fn, PRIMALS, TANGENTS, rows)[1]
    close(derivative, FiniteDifference(1e-4)(fn, PRIMALS, TANGENTS, rows)[1], 1e-4)


def test_a_thread_that_outlives_a_pass_holds_nothing_of_it():
    carriers, end = [], threading.Event()

    def model(z, t):
        carriers.append(weakref.ref(active_carrier()))
        threading.Thread(target=end.wait, daemon=True).start()
        return z * t[:, None]

    SharedPrimal()(model, PRIMALS, TANGENTS)
    gc.collect()
    held = carriers[0]()
    end.set()
    assert held is None


def test_what_stands_still_may_be_used_in_another_thread():
    seen = []

    def model(z, t):
        constant = POOL.submit(lambda: WEIGHT.sin()).result()
        POOL.submit(lambda: seen.append(z.shape)).result()
        return z @ constant * t[:, None]

    for route in ROUTES[:2]:
        derivative = route(model, PRIMALS, TANGENTS)[1]
        close(derivative, wanted(lambda z, t: z @ WEIGHT.sin() * t[:, None]))
    assert seen


class Doubled(torch.Tensor):
    """A weight that is kept as its half."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.matmul:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0] @ (args[1].as_subclass(torch.Tensor) * 2)
        return super().__torch_function__(func, types, args, kwargs)


class Logged(torch.Tensor):
    """Hands all functions on, and gives what they return its own type."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs)


class Cosine(TorchFunctionMode):
    """Computes the cosine where a model asks for the sine."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.sin:
            func = torch.Tensor.cos
        return func(*args, **(kwargs or {}))


OTHER_FUNCTIONS = {
    "a subclass": (lambda z, t: z.matmul(WEIGHT.as_subclass(Doubled)) * t[:, None], None),
    "a subclass that hands on": (
        lambda z, t: z.matmul(WEIGHT.as_subclass(Logged)).sin() * t[:, None],
        None,
    ),
    "a subclass that is written into": (
        lambda z, t: z.matmul(WEIGHT.as_subclass(Logged)).mul_(t[:, None]) * z,
        None,
    ),
    "a mode round the pass": (lambda z, t: z.sin() * t[:, None], Cosine),
    "a mode round the pass, rows that mix": (lambda z, t: z.sin() * t.mean(), Cosine),
}


@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
@pytest.mark.parametrize("name", OTHER_FUNCTIONS)
def test_the_function_that_is_computed_is_differentiated(name, rows):
    """Whoever puts it in place of another one."""
    model, mode = OTHER_FUNCTIONS[name]
    with contextlib.ExitStack() as outside:
        if mode is not None:
            outside.enter_context(mode())
        value, derivative = SharedPrimal()(model, PRIMALS, TANGENTS, rows)
        assert torch._C._len_torch_function_stack() == (mode is not None)
        close(value.as_subclass(torch.Tensor), model(*PRIMALS).as_subclass(torch.Tensor))
        step, (z, t), (dz, dt) = 1e-5, PRIMALS, TANGENTS
        change = model(z + step * dz, t + step * dt) - model(z - step * dz, t - step * dt)
    exact = change.as_subclass(torch.Tensor) / (2 * step)
    if rows is not None:
        exact = exact * rows[:, None]
    close(derivative.as_subclass(torch.Tensor), exact, 1e-8)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_what_a_tensor_holds_that_works_on_it_below_all_modes_is_refused():
    def model(z, t):
        return masked_tensor(z * t[:, None], z > 0).sum(1).to_tensor(0.0)[:, None] * z

    with pytest.raises(DerivativeError, match="got a MaskedTensor that holds a tensor"):
        SharedPrimal()(model, PRIMALS, TANGENTS)


UNSEEN = {
    "elementwise": lambda h: h.tanh(),
    "a product": lambda h: h @ WEIGHT,
    "a view": lambda h: h.unflatten(1, (2, 3)).flip(2).flatten(1),
}


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
def test_a_function_that_torch_shows_to_no_mode_is_refused(name, rows, monkeypatch):
    monkeypatch.setattr(passes, "_passes", Counter())
    weight = WEIGHT.clone().requires_grad_()

    def model(z, t, hidden=True):
        h = (z @ weight) * t[:, None]
        with torch._C.DisableTorchFunction() if hidden else contextlib.nullcontext():
            h = UNSEEN[name](h)
        return h.sin() @ weight

    exact = wanted(functools.partial(model, hidden=False), rows)
    seen = functools.partial(model, hidden=False)
    close(SharedPrimal()(seen, PRIMALS, TANGENTS, rows=rows)[1], exact)
    with pytest.raises(DerivativeError, match="shows to no function mode"):
        SharedPrimal()(model, PRIMALS, TANGENTS, rows=rows)
    for route in ROUTES[1:3]:
        close(route(model, PRIMALS, TANGENTS, rows=rows)[1], exact, 1e-2)


class Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.mark_dirty(x)
        return x.add_(y)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient


class AddedToTheSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x):
        ctx.mark_dirty(x)
        return x.add_(y)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient


SEEN = {
    "a subclass that hands on": lambda z, t, w: z.matmul(w).matmul(WEIGHT.as_subclass(Logged)),
    "a function that writes": lambda z, t, w: Added.apply(z @ w, (z @ w).sin()) * t[:, None],
}


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
def test_what_stands_in_the_graph_itself_and_is_followed_is_not_refused(name, rows, monkeypatch):
    monkeypatch.setattr(passes, "_passes", Counter())
    weight = WEIGHT.clone().requires_grad_()

    def model(z, t):
        return SEEN[name](z, t, weight).as_subclass(torch.Tensor)

    follow = functools.partial(SEEN[name], w=weight)
    value, derivative = SharedPrimal()(follow, PRIMALS, TANGENTS, rows)
    plain = model(*PRIMALS)
    close(value.as_subclass(torch.Tensor), plain)
    gradients = [torch.autograd.grad(x.square().sum(), weight)[0] for x in (value, plain)]
    close(*gradients)
    step, (z, t), (dz, dt) = 1e-5, PRIMALS, TANGENTS
    change = model(z + step * dz, t + step * dt) - model(z - step * dz, t - step * dt)
    exact = change.detach() / (2 * step)
    close(
        derivative.as_subclass(torch.Tensor),
        exact if rows is None else exact * rows[:, None],
        1e-8,
    )


def test_a_function_that_writes_into_another_input_than_its_first_is_refused(monkeypatch):
    """Its gradient would be wrong: an alias is a view, of which torch finds the first alone."""
    monkeypatch.setattr("flowspace.derivatives.shared_primal.is_watched", lambda fn: False)
    weight = WEIGHT.clone().requires_grad_()

    def model(z, t):
        return AddedToTheSecond.apply((z @ weight).sin(), z @ weight) * t[:, None]

    with pytest.raises(DerivativeError, match="AddedToTheSecond writes in place"):
        SharedPrimal()(model, PRIMALS, TANGENTS)
    with torch.no_grad():
        exact = wanted(lambda z, t: ((z @ WEIGHT).sin() + z @ WEIGHT) * t[:, None])
        close(SharedPrimal()(model, PRIMALS, TANGENTS)[1], exact)


def test_the_first_passes_over_a_model_are_watched_and_then_ever_fewer():
    def closure(model):
        def step(z, t):
            return model(z) * t[:, None]

        return functools.partial(step, t=None)

    for model in torch.nn.Linear(2, 2), torch.nn.Linear(2, 2):
        numbers = [n for n in range(1, 1000) if passes.is_watched(closure(model))]
        assert numbers == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert passes.is_watched(model) and passes.is_watched(model.forward)

    def of_itself(z):
        return of_itself(later(z))

    assert passes.is_watched(of_itself)
    later = model
    for _ in range(9):  # each may come where the one before lay
        assert passes.is_watched(torch.nn.Linear(2, 2))


def test_a_refusal_that_a_model_catches_is_a_refusal():
    def model(z, t):
        try:
            return z * float(t[0])
        except Exception:
            return z * 3

    with pytest.raises(DerivativeError, match=r"got float\(\) of a tensor that moves"):
        SharedPrimal()(model, PRIMALS, TANGENTS)


LISTS = {
    "by a number": lambda z, t: sum(torch._foreach_mul([z * t[:, None], z.sin()], 2.0)),
    "by a list": lambda z, t: sum(torch._foreach_mul([z.cos(), z], [z, z * t[:, None]])),
}


@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
@pytest.mark.parametrize("name", LISTS)
def test_functions_of_lists_that_write_nothing_are_followed(name, rows):
    found = SharedPrimal()(LISTS[name], PRIMALS, TANGENTS, rows)[1]
    written = {
        "by a number": lambda z, t: 2 * z * t[:, None] + 2 * z.sin(),
        "by a list": lambda z, t: z.cos() * z + z * z * t[:, None],
    }
    close(found, wanted(written[name], rows))


@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
@pytest.mark.parametrize(
    ("fn", "written"),
    [
        (dirty, lambda z, t: 2 * z * z * t[:, None]),
        (dirty_and_written, lambda z, t: (2 * z * t[:, None] + z) * (z + 1)),
    ],
)
def test_a_function_that_writes_into_its_input_moves_it(fn, written, rows):
    inputs = [primal.clone().requires_grad_() for primal in PRIMALS]
    value, derivative = SharedPrimal()(fn, inputs, TANGENTS, rows)
    plain = written(*inputs)
    close(value, plain)
    close(derivative, wanted(written, rows))
    found = torch.autograd.grad(value.square().sum(), inputs)
    for one, other in zip(found, torch.autograd.grad(plain.square().sum(), inputs), strict=True):
        close(one, other)


@pytest.mark.parametrize("fn", [sine_in_a_buffer, doubled])
def test_forward_mode_refuses_operators_that_write(fn):
    with pytest.raises(DerivativeError, match="an operator that writes into its arguments"):
        ForwardMode()(fn, PRIMALS, TANGENTS)


@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
@pytest.mark.parametrize(
    "fn",
    [
        lambda z, t: torch.zeros(4, 6, dtype=DOUBLE).fill_(value=t[0]) * z,
        lambda z, t: torch.zeros_like(input=z) + torch.sign(input=z) * z,
        lambda z, t: torch.zeros(4, 6, dtype=DOUBLE).copy_(other=z) * t[:, None],
    ],
)
def test_arguments_may_be_given_by_name(fn, rows):
    close(SharedPrimal()(fn, PRIMALS, TANGENTS, rows)[1], wanted(fn, rows))


@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
def test_a_deep_copy_moves_as_what_it_copies(rows):
    def fn(z, t):
        return copy.deepcopy(z * 2) * t[:, None]

    close(
        SharedPrimal()(fn, PRIMALS, TANGENTS, rows)[1],
        wanted(lambda z, t: 2 * z * t[:, None], rows),
    )


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class Steeper(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


class Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight, x * 2

    @staticmethod
    def backward(ctx, first, second):
        x, weight = ctx.saved_tensors
        return first @ weight.T + 2 * second, x.T @ first


SINE, STEEPER, BOTH, DIRTY = Sine.apply, Steeper.apply, Both.apply, Dirty.apply


def dirty_at_once(z, t, w):
    h = z @ w
    DIRTY(h)
    return h * t[:, None]


BOUND = {
    "a function": (
        lambda z, t, w: SINE(z @ w) * t[:, None],
        lambda z, t, w: (z @ w).sin() * t[:, None],
    ),
    "the last": (
        lambda z, t, w: SINE(z * t[:, None] @ w),
        lambda z, t, w: (z * t[:, None] @ w).sin(),
    ),
    "a view": (lambda z, t, w: STEEPER(z @ w) * t[:, None], lambda z, t, w: z @ w * t[:, None]),
    "a view that is written to": (
        lambda z, t, w: STEEPER(z @ w).mul_(t[:, None]),
        lambda z, t, w: z @ w * t[:, None],
    ),
    "an input that is written to": (dirty_at_once, lambda z, t, w: 2 * (z @ w) * t[:, None]),
    "rows that mix": (
        lambda z, t, w: SINE(z @ w - (z @ w).mean(0)) * t[:, None],
        lambda z, t, w: (z @ w - (z @ w).mean(0)).sin() * t[:, None],
    ),
    "rows that mix later": (
        lambda z, t, w: SINE(z @ w) - SINE(z @ w).mean(0) * t[:, None],
        lambda z, t, w: (z @ w).sin() - (z @ w).sin().mean(0) * t[:, None],
    ),
    "two results": (
        lambda z, t, w: BOTH(z @ w, w)[0] * BOTH(z, w)[1] * t[:, None],
        lambda z, t, w: z @ w @ w * 2 * z * t[:, None],
    ),
}


@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
@pytest.mark.parametrize("name", BOUND)
def test_a_function_whose_apply_was_looked_up_before_keeps_its_gradient(name, rows):
    """``apply = MyFunction.apply`` at the head of a module, as torch's own pages have it."""
    fn, written = BOUND[name]
    weight = nn.Parameter(WEIGHT.clone())
    if name == "a view that is written to":
        plain = (lambda z, t: STEEPER(z @ weight) * t[:, None])(*PRIMALS)
    else:
        plain = fn(*PRIMALS, weight)
    value, derivative = SharedPrimal()(lambda z, t: fn(z, t, weight), PRIMALS, TANGENTS, rows)
    close(value, plain)
    close(derivative, wanted(lambda z, t: written(z, t, WEIGHT), rows))
    gradients = [torch.autograd.grad(x.square().sum(), weight)[0] for x in (value, plain)]
    close(*gradients)


class SineByDefault(Sine):
    """Has an ``apply`` of its own, with a default: torch's takes no names."""

    @classmethod
    def apply(cls, x, twice=False):
        return super().apply(x) * (2 if twice else 1)


class SineOfNumpy(torch.autograd.Function):
    @classmethod
    def apply(cls, *args):
        return super().apply(*args)

    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(numpy.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def sine_given_within(z, t, w):
    class Given(Sine):
        pass

    Given.apply = classmethod(lambda cls, x: Sine.apply(x) * 2)
    return Given.apply(z @ w) * t[:, None]


OF_ITS_OWN = {
    "one": (
        lambda z, t, w: SineByDefault.apply(z @ w, twice=True) * t[:, None],
        lambda z, t, w: 2 * (z @ w).sin() * t[:, None],
    ),
    "torch's before it, and after": (
        lambda z, t, w: Sine.apply(SineByDefault.apply(Sine.apply(z @ w))) * t[:, None],
        lambda z, t, w: (z @ w).sin().sin().sin() * t[:, None],
    ),
    "one that it is given": (
        sine_given_within,
        lambda z, t, w: 2 * (z @ w).sin() * t[:, None],
    ),
}


@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
@pytest.mark.parametrize("name", OF_ITS_OWN)
def test_a_function_with_an_apply_of_its_own_is_followed(name, rows):
    fn, written = OF_ITS_OWN[name]
    weight = nn.Parameter(WEIGHT.clone())
    with untouched():
        value, derivative = SharedPrimal()(lambda z, t: fn(z, t, weight), PRIMALS, TANGENTS, rows)
    plain = written(*PRIMALS, weight)
    close(value, plain)
    close(derivative, wanted(lambda z, t: written(z, t, WEIGHT), rows))
    gradients = [torch.autograd.grad(x.square().sum(), weight)[0] for x in (value, plain)]
    close(*gradients)


def test_a_function_with_an_apply_of_its_own_that_leaves_torch_is_refused():
    with untouched(), pytest.raises(DerivativeError, match="SineOfNumpy"):
        SharedPrimal()(lambda z, t: SineOfNumpy.apply(z @ WEIGHT) * t[:, None], PRIMALS, TANGENTS)


def test_to_follow_custom_functions_leaves_their_class_as_it_is():
    """To replace an attribute of a class, Python goes through the hundreds below it."""
    applies, before = [], vars(torch.autograd.Function)["apply"]

    def fn(z, t):
        applies.append(vars(torch.autograd.Function)["apply"])
        return Sine.apply(z @ WEIGHT) * t[:, None]

    SharedPrimal()(fn, PRIMALS, TANGENTS)
    assert applies == [before]


# --- attention without tokens


@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0)])
def test_attention_without_queries_or_keys_is_followed(queries, keys, rows):
    masks = torch.zeros(queries, keys, dtype=torch.bool)
    key, value = normal(3, 4, keys, 6), normal(4, 4, keys, 6)

    def model(z, t):
        query = (z * t[:, None])[:, None].expand(-1, queries, -1)
        return nn.functional.scaled_dot_product_attention(query, key, value, masks)

    for fn in (model, lambda z, t: model(z, t)[:, None]):
        value_here, derivative = SharedPrimal()(fn, PRIMALS, TANGENTS, rows)
        close(value_here, fn(*PRIMALS))
        close(derivative, torch.zeros_like(value_here))


# --- graphs in what torch.compile captured


def steeper_in_a_checkpoint(z, t, w):
    return checkpoint(
        lambda h: Steeper.apply(h @ w).sin(), z @ w * t[:, None], use_reentrant=False
    )


def constant_in_a_checkpoint(z, t, w):
    def scaled(z, t):
        return z @ w * torch.tensor([t[0], t[1], t[2], t[3]], dtype=DOUBLE)[:, None]

    return checkpoint(scaled, z, t, use_reentrant=False)


@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
def test_a_function_in_a_checkpoint_that_is_compiled_keeps_its_own_gradient(rows):
    weight = WEIGHT.clone().requires_grad_()
    plain = steeper_in_a_checkpoint(*PRIMALS, weight)
    wished = torch.autograd.grad(plain.square().sum(), weight)[0]
    captured = torch.compile(steeper_in_a_checkpoint, backend="aot_eager")
    model = functools.partial(captured, w=weight)
    value, derivative = SharedPrimal()(model, PRIMALS, TANGENTS, rows)
    close(value, plain)
    close(torch.autograd.grad(value.square().sum(), weight)[0], wished)
    close(derivative, wanted(lambda z, t: (z @ WEIGHT * t[:, None] @ WEIGHT).sin(), rows))


def test_a_constant_of_what_moves_in_a_checkpoint_that_is_compiled_is_refused():
    captured = torch.compile(constant_in_a_checkpoint, backend="aot_eager")
    with pytest.raises(DerivativeError, match=r"derivative of torch\.tensor|argument of tensor"):
        SharedPrimal()(functools.partial(captured, w=WEIGHT), PRIMALS, TANGENTS)


# --- the gradient of an energy, as the model's value


def slope_of_energy(z, t):
    h = torch.tanh(z @ WEIGHT + t[:, None])
    with torch.enable_grad():
        if not h.requires_grad:  # as it is without gradient, and so in a second pass
            h = h.detach().requires_grad_()
        energy = torch.tanh(h @ WEIGHT).square().sum()
        return torch.autograd.grad(energy, h, create_graph=True)[0]


def mixed_slope_of_energy(z, t):
    return slope_of_energy(z - z.mean(0), t)


@pytest.mark.parametrize("model", [slope_of_energy, mixed_slope_of_energy])
@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
def test_a_model_that_calls_autograd_is_refused_or_right(model, rows):
    primals = PRIMALS[0].clone().requires_grad_(), PRIMALS[1]
    with pytest.raises(DerivativeError, match="calls autograd"):
        SharedPrimal()(model, primals, TANGENTS, rows)
    ahead = [p + 1e-6 * v for p, v in zip(PRIMALS, TANGENTS, strict=True)]
    behind = [p - 1e-6 * v for p, v in zip(PRIMALS, TANGENTS, strict=True)]
    exact = (model(*ahead) - model(*behind)).detach() / 2e-6
    exact = exact if rows is None else exact * rows[:, None]
    found = FiniteDifference()(model, primals, TANGENTS, rows)[1]
    assert (found - exact).norm() < 1e-2 * exact.norm()


# --- writes through .data and .detach() into what moves


class IntoScratch(torch.autograd.Function):
    """As torchdiffeq keeps the stages of a Runge-Kutta step."""

    @staticmethod
    def forward(ctx, scratch, value, place):
        ctx.place = place
        scratch.data[:, place] = value
        return scratch

    @staticmethod
    def backward(ctx, grad):
        return grad, grad[:, ctx.place], None


def stages(z, t):
    scratch = torch.empty(4, 3, dtype=z.dtype)
    scratch = IntoScratch.apply(scratch, t.sin(), 0)
    scratch = IntoScratch.apply(scratch, z[:, 1], 1)
    scratch = IntoScratch.apply(scratch, (scratch[:, :2] * z[:, :2]).sum(1), 2)
    return scratch @ WEIGHT[:3]


def filled_twice(z, t):
    h = torch.zeros(4, 2, dtype=z.dtype)
    h.data[:, 0] = z[:, 0]
    h.data[:, 1] = t
    return h * 1


def filled_detached(z, t):
    h = torch.zeros(4, 2, dtype=z.dtype)
    still = h.detach()
    still[:, 0] = z[:, 0]
    h.detach().view(8)[1::2] = t
    return h * 1


def filled_for_inference(z, t):
    with torch.inference_mode():
        h = torch.zeros(4, 2, dtype=z.dtype)
        h[:, :1].copy_(z[:, :1])
        h[:, 1] = t
    return h * z[:, 1:2]


HELD = torch.zeros(4, 2, dtype=DOUBLE)
HELD_TOO = HELD.detach()


def filled_before(z, t):
    HELD_TOO[:, 0] = z[:, 0]
    HELD_TOO[:, 1] = t
    return HELD * 1


def part_replaced(z, t):
    h = z * 2
    h.detach()[:, 0] = t
    return h * 1


def read_from_both(z, t):
    h = z * 2
    still = h.detach()
    still[:, 0].copy_(t)
    still.add_(t[:, None])
    return still * 3 + h


def stopped_and_written(z, t):
    h = z * 2
    h.data[:, 0] = 0
    h.data.mul_(3)
    return h * 1


def first_column(z, column):
    return torch.cat([column[:, None], z[:, 1:]], 1)


THROUGH_DATA = {
    "stages of an integrator": (
        stages,
        lambda z, t: (
            torch.stack([t.sin(), z[:, 1], t.sin() * z[:, 0] + z[:, 1] ** 2], 1) @ WEIGHT[:3]
        ),
    ),
    "filled part by part": (filled_twice, lambda z, t: torch.stack([z[:, 0], t], 1)),
    "filled through a detached one": (
        filled_detached,
        lambda z, t: torch.stack([z[:, 0], t], 1),
    ),
    "filled through one detached before": (
        filled_before,
        lambda z, t: torch.stack([z[:, 0], t], 1),
    ),
    "filled for inference": (
        filled_for_inference,
        lambda z, t: torch.stack([z[:, 0], t], 1) * z[:, 1:2],
    ),
    "a part replaced": (part_replaced, lambda z, t: first_column(z * 2, t)),
    "read from both": (
        read_from_both,
        lambda z, t: 4 * (first_column(z * 2, t) + t[:, None]),
    ),
    "a constant written": (
        stopped_and_written,
        lambda z, t: first_column(z * 6, torch.zeros_like(t)),
    ),
}


@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
@pytest.mark.parametrize("name", THROUGH_DATA)
def test_what_is_written_through_data_is_read_with_its_derivative(name, rows):
    """It keeps the derivatives of what it leaves as it was."""
    fn, written = THROUGH_DATA[name]
    value, derivative = SharedPrimal()(fn, PRIMALS, TANGENTS, rows)
    close(value, written(*PRIMALS))
    close(derivative, wanted(written, rows))


def test_an_adaptive_integrator_inside_a_model_is_differentiated():
    integrate = pytest.importorskip("torchdiffeq").odeint
    times = torch.tensor([0.0, 1.0], dtype=DOUBLE)

    def flow(z, t):
        def velocity(tau, x):
            return torch.tanh(x @ WEIGHT / 3) * tau * (1 + t[:, None])

        return integrate(velocity, z, times, method="dopri5", rtol=1e-9, atol=1e-9)[-1]

    ahead = [p + 1e-5 * v for p, v in zip(PRIMALS, TANGENTS, strict=True)]
    behind = [p - 1e-5 * v for p, v in zip(PRIMALS, TANGENTS, strict=True)]
    exact = (flow(*ahead) - flow(*behind)) / 2e-5
    close(SharedPrimal()(flow, PRIMALS, TANGENTS)[1], exact, 1e-6)


class Keeping(nn.Module):
    """Writes into a buffer, into what moves and into what it made; in train mode its rows mix."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(6, dtype=DOUBLE))
        self.norm = nn.BatchNorm1d(6, dtype=DOUBLE)
        self.weight = nn.Parameter(WEIGHT.clone())

    def forward(self, z, t):
        self.count.add_(1)
        made = torch.zeros_like(z)
        made[:, :3] = z[:, :3]
        made.add_(z @ self.weight).mul_(t[:, None])
        return self.norm(made)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
@pytest.mark.parametrize("route", ROUTES, ids=repr)
def test_nothing_of_a_pass_waits_for_the_collector_of_cycles(route, mode, rows):
    model = getattr(Keeping(), mode)()
    assert not left_in_cycles(lambda: route(model, PRIMALS, TANGENTS, rows=rows))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
def test_writes_in_a_checkpoint_that_is_compiled_are_followed_and_made_once(mode, rows):
    model = getattr(Keeping(), mode)()
    plain = copy.deepcopy(model)
    kept = functools.partial(checkpoint, model, use_reentrant=False)
    captured = torch.compile(kept, backend="aot_eager")
    value, derivative = SharedPrimal()(captured, PRIMALS, TANGENTS, rows)
    wished = plain(*PRIMALS)
    close(value, wished)
    for buffer, other in zip(model.buffers(), plain.buffers(), strict=True):
        close(buffer, other)
    gradients = torch.autograd.grad(value.pow(3).sum(), model.weight)
    close(gradients, torch.autograd.grad(wished.pow(3).sum(), plain.weight))
    step, (z, t), (dz, dt) = 1e-5, PRIMALS, TANGENTS
    change = plain(z + step * dz, t + step * dt) - plain(z - step * dz, t - step * dt)
    exact = change.detach() / (2 * step)
    close(derivative, exact if rows is None else exact * rows[:, None], 1e-7)


@pytest.mark.parametrize("rows", [None, HALF], ids=["all", "half"])
def test_a_route_within_a_compiled_model_is_refused_and_uncompiled_its_value_is_followed(rows):
    def inner(z, t):
        return (z @ WEIGHT).sin() * t[:, None]

    def value(z, t):
        return SharedPrimal()(inner, (z, t), TANGENTS)[0]

    def model(z, t, part=value):
        return part(z @ WEIGHT, t).tanh() @ WEIGHT

    compiled = torch.compile(model, backend="aot_eager")
    if not follows_compiled():
        pytest.skip("this torch runs it as it was written")
    with pytest.raises(DerivativeError, match=r"SharedPrimal\(\) evaluated by a compiled part"):
        SharedPrimal()(compiled, PRIMALS, TANGENTS, rows=rows)
    exact = wanted(functools.partial(model, part=inner), rows)
    apart = functools.partial(compiled, part=torch.compiler.disable(value))
    for each in (model, apart):
        close(SharedPrimal()(each, PRIMALS, TANGENTS, rows=rows)[1], exact)
