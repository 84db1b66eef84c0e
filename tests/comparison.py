"""A route to the derivative against the plain program: value, gradient, draws and tangent.

`check` evaluates a program as it is and through `SharedPrimal`, and asks for the same value, the
same gradient of every weight, the same random state afterwards, and torch's own forward derivative
of the whole batch, masked afterwards. The exact derivative is `exact`; where torch has none, as of
functions that draw, it is a difference of order four with the same draws, `by_differences`.
"""

import contextlib
import copy
import gc

import torch
from programs import inputs
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowspace import SharedPrimal

ROUTE = SharedPrimal()


def close(found, wanted, tolerance=1e-11):
    size = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(
        found, wanted, rtol=0, atol=tolerance * max(1.0, size), equal_nan=True
    )


def exact(fn, primals, tangents):
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(
            fn, tuple(x.clone() for x in primals), tuple(x.clone() for x in tangents)
        )[1].detach()


def by_differences(fn, primals, tangents, step=1e-4):
    """The derivative by finite differences of order four, each with the same random numbers."""
    total, start = 0.0, torch.get_rng_state()
    for h, weight in {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}.items():
        torch.set_rng_state(start)
        with torch.no_grad():
            there = copy.deepcopy(fn) if isinstance(fn, nn.Module) else fn
            total = total + weight / step * there(
                *(p + h * step * v for p, v in zip(primals, tangents, strict=True))
            )
    return total


def state():
    """What a pass may not change."""
    unseen = (
        torch.autograd.Function.__dict__["apply"],
        vars(torch.autograd.function.FunctionMeta).get("apply"),
        torch._C.ScriptMethod.__call__,
        torch._C.ScriptFunction.__call__,
    )
    return *unseen, torch.is_grad_enabled(), torch._C._len_torch_function_stack()


@contextlib.contextmanager
def untouched():
    before = state()
    try:
        yield
    finally:
        assert state() == before


def masked(derivative, rows):
    return (
        derivative
        if rows is None
        else torch.where(rows.reshape(-1, *[1] * (derivative.ndim - 1)), derivative, 0.0)
    )


def check(fn, primals, tangents, rows, weights=(), wanted=None, tolerance=1e-11):
    """Assert that value, derivative, gradient and random state are those of the plain program;
    return how often fn ran.
    """
    calls = []

    def counted(*args):
        calls.append(1)
        return fn(*args)

    start = torch.get_rng_state()
    value = fn(*(x.clone() for x in primals))
    after = torch.get_rng_state()
    torch.set_rng_state(start)
    wanted = exact(fn, primals, tangents) if wanted is None else wanted
    torch.set_rng_state(start)
    with untouched():
        found, derivative = ROUTE(counted, tuple(x.clone() for x in primals), tangents, rows)
    assert torch.equal(torch.get_rng_state(), after)
    close(found, value)
    assert found.requires_grad == value.requires_grad and not derivative.requires_grad
    close(derivative, masked(wanted, rows), tolerance)
    if weights and value.requires_grad:
        probe = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).reshape(value.shape)
        gradients = (
            torch.autograd.grad((v * probe).sum(), weights, allow_unused=True)
            for v in (found, value)
        )
        for mine, theirs in zip(*gradients, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                close(mine, theirs)
    return len(calls)


def check_seeded(fn, rows, wanted=exact, weights=(), tolerance=1e-11, shape=(4, 6)):
    """Check a program of z of shape (4, 6) and t against a reference that is given the random
    state of the program.
    """
    torch.manual_seed(5)
    primals, tangents = inputs(shape)
    reference = wanted(fn, primals, tangents)
    torch.manual_seed(5)
    return check(fn, primals, tangents, rows, weights, reference, tolerance)


def left_in_cycles(run):
    """What a call leaves to Python's collector of cycles: tensors, and objects of ours and of
    autograd's graph; the first call may keep some for good.
    """
    run()
    while gc.collect():  # what other tests left, piece by piece
        pass
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        run()
        gc.collect()
        left = [x for x in gc.garbage if isinstance(x, torch.Tensor)]
        left += [x for x in gc.garbage if type(x).__module__.partition(".")[0] == "flowspace"]
        return left + [x for x in gc.garbage if type(x).__name__.endswith("Backward0")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
