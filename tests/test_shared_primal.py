"""SharedPrimal gives the value of the plain program, its gradient and its forward derivative,
whatever the program is.

How programs are generated and how an operation is added is told on the first page of programs.py,
what is compared on that of comparison.py.
"""

import contextlib
import math
import random
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparison import (
    ROUTE,
    by_differences,
    check,
    check_seeded,
    close,
    exact,
    masked,
    state,
    untouched,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import DOUBLE, STEPS, WHICH, choose, drawn, inputs
from strategies import normal, seeds
from torch import nn
from torch.utils.checkpoint import checkpoint

from flowspace import DerivativeError, InputError
from flowspace.derivatives import rules
from flowspace.derivatives.rules import dual as duals
from flowspace.derivatives.rules import norms
from flowspace.derivatives.shared_primal import kinds

# --- laws of generated programs


NAMES = [(group, name) for group in STEPS for name in STEPS[group]]
AT_ONCE = [pair for pair in NAMES if pair[0] != "writing"]


@pytest.mark.parametrize(("group", "name"), AT_ONCE, ids=[name for _, name in AT_ONCE])
@settings(max_examples=25)
@given(seeds)
def test_every_step_in_any_frame_has_the_value_tangent_and_gradient_of_the_plain_program(
    group, name, seed
):
    program, primals, tangents, rows = drawn(seed, [(group, name)], bare=True)
    check(program, primals, tangents, rows, tuple(program.weights.values()))


@pytest.mark.parametrize("alone", [False, True], ids=["rows together", "rows one by one"])
@settings(max_examples=500)
@given(seeds)
def test_a_generated_program_has_the_value_tangent_and_gradient_of_the_plain_one(alone, seed):
    program, primals, tangents, rows = drawn(seed, AT_ONCE, most=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duals, "LARGE_ROW", 1 if alone else 1 << 40)
        check(program, primals, tangents, rows, tuple(program.weights.values()), tolerance=1e-10)


@pytest.mark.parametrize("function", [F.gelu, torch.tanh], ids=["of the input", "of the output"])
@pytest.mark.parametrize("which", ["one", "half"])
@pytest.mark.parametrize("large", [1, 1 << 40])
def test_large_rows_are_worked_on_where_they_lie(function, which, large, monkeypatch):
    gathered, restrict = [], duals.restrict
    monkeypatch.setattr(duals, "LARGE_ROW", large)
    monkeypatch.setattr(
        duals, "restrict", lambda x, layout: gathered.append(x.ndim) or restrict(x, layout)
    )
    assert (
        check_seeded(
            lambda z, t: function((z * t[:, None])[:, None] * WIDE[:, :1]).sum(1), choose(4, which)
        )
        == 1
    )
    assert (3 in gathered) == (large > 1)


@settings(max_examples=200)
@given(seeds)
def test_a_program_that_writes_has_the_value_tangent_and_gradient_of_the_plain_one(seed):
    program, primals, tangents, rows = drawn(
        seed, [pair for pair in NAMES if pair[0] == "writing"], most=3
    )
    check(program, primals, tangents, rows, tuple(program.weights.values()), tolerance=1e-10)


@settings(max_examples=60)
@given(seeds, st.floats(-3, 3), st.floats(-3, 3))
def test_the_derivative_is_linear_in_the_tangent(seed, a, b):
    program, primals, first, rows = drawn(seed, AT_ONCE, most=3)
    second = inputs(program.shape, seed)[1]
    both = tuple(a * u + b * v for u, v in zip(first, second, strict=True))
    parts = [ROUTE(program, primals, v, rows)[1] for v in (first, second, both)]
    close(parts[2], a * parts[0] + b * parts[1], 1e-9)


@settings(max_examples=100)
@given(seeds)
def test_nothing_is_left_behind(seed):
    program, primals, tangents, rows = drawn(seed, AT_ONCE, most=3)
    before = [x.clone() for x in (*primals, *tangents, *program.weights.values())]
    with untouched():
        ROUTE(program, primals, tangents, rows)
    for now, then in zip((*primals, *tangents, *program.weights.values()), before, strict=True):
        assert torch.equal(now, then) and now.grad is None


# --- how often the model runs


def rotated(z, t):
    first, second = z.chunk(2, -1)
    angle = t[:, None] * torch.arange(3)
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()],
        -1,
    )


def transformed(z, t):
    q, k, v = F.linear(z, WIDE).reshape(len(z), 3, 2, 3, 1).permute(1, 0, 2, 3, 4)
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(z), 6)
    return F.layer_norm(z + h, (6,)) * (1 + t)[:, None]


def assigned(z, t):
    y = (z * 2).view(-1, 2, 3)
    y[:, :, 1:] = z[:, :4].sin().view(-1, 2, 2)
    y[..., 0] = 1.0
    y[:, [1, 0], [0, 2]] = normal(1, 2)
    return y.flatten(1) * t[:, None]


def assigned_across(z, t):
    y = z * 2
    y[1:] = z[:-1].sin()
    return y * t[:, None]


def assigned_in_some_rows(z, t):
    y = z * 2
    y[1:] = normal(1, len(z) - 1, 6)
    return y * t[:, None]


def assigned_in_another_order(z, t):
    y = torch.cat([z, z * t[:, None]])
    y[:, :3] = z.repeat_interleave(2, 0)[:, 3:].sin()
    return y.unflatten(0, (2, -1)).sum(0)


ONE_PASS = {
    "rotary": rotated,
    "attention": transformed,
    "time first": lambda z, t: (
        z.reshape(-1, 2, 3).transpose(0, 1).flatten(0, 1).sin().view(2, -1, 3).sum(0)
    ),
    "convolution": lambda z, t: F.group_norm(F.conv1d(z[:, None], normal(1, 4, 1, 3)), 2).mean(1),
    "pooling": lambda z, t: (
        F.interpolate(F.avg_pool1d(z[:, None], 2), scale_factor=2)[:, 0] * t[:, None]
    ),
    "embedding": lambda z, t: z * F.embedding(torch.arange(len(z)) % 3, normal(2, 3, 6)),
    "conditions": lambda z, t: torch.where(normal(3, len(z), 1) > 0, z, t[:, None]),
    "einsum": lambda z, t: torch.einsum("bi,bj,bij->bj", z, z, normal(4, len(z), 6, 6)),
    "sinusoids": lambda z, t: (
        z * torch.cat([(t[:, None] * normal(5, 3)).sin(), (t[:, None] * normal(5, 3)).cos()], 1)
    ),
    "batch norm": lambda z, t: F.batch_norm(z, normal(6, 6), normal(6, 6) ** 2),
    "spectrum": lambda z, t: torch.fft.irfft(torch.fft.rfft(z) * t[:, None], n=6),
    "dropout": lambda z, t: F.dropout(z, 0.5),
    "in place": lambda z, t: F.hardswish((2 * z).mul_(t[:, None]).relu_(), inplace=True),
    "assigned": assigned,
    "by name": lambda z, t: (
        normal(1, len(z), 1, 6)
        .baddbmm(batch2=z[:, :, None] * SQUARE, batch1=z[:, None], alpha=0.5, beta=2)
        .flatten(1)
        + F.group_norm(F.layer_norm(z, normalized_shape=(6,), weight=SQUARE[0]), num_groups=2)
        * t[:, None]
    ),
    "copied": lambda z, t: (
        (2 * z).copy_(z.sin(), True) * torch.ones_like(z).mul(z).copy_(t[:, None])
    ),
    "dropout in place": lambda z, t: F.dropout(2 * z, 0.5, inplace=True) * t[:, None],
    "what torch calls not elementwise": lambda z, t: (
        torch.polar(F.hardswish(z).square() + 1, z).real
        * torch.complex(z, t[:, None].expand_as(z)).imag
        + F.logsigmoid(z)
    ),
    "along an axis": lambda z, t: (
        z.logcumsumexp(1)
        + z.cummax(1)[0] * t[:, None]
        + z.quantile(0.3, 1, keepdim=True)
        + z.nanmean(1, keepdim=True)
    ),
    "similarity": lambda z, t: (
        z * F.cosine_similarity(z[:, None], normal(1, 1, 5, 6), dim=2).sum(1, keepdim=True)
    ),
    "spectrum of all but the rows": lambda z, t: (
        torch.fft.ifftn(
            torch.fft.ifftshift(
                torch.fft.fftshift(torch.fft.fftn(z * t[:, None], dim=(-1,)), dim=1), dim=1
            ),
            dim=(1,),
        ).real
    ),
    "two batches in one": lambda z, t: (
        torch.cat([z, z * t[:, None]]).sin().unflatten(0, (2, -1))
    ).sum(0),
    "joined and parted": lambda z, t: (
        sum(torch.cat([z, z.sin(), z.cos(), z.exp()]).chunk(2)).split(len(z))[1] * t[:, None]
    ),
    "repeated": lambda z, t: (
        (z.repeat_interleave(3, dim=0).sin().unflatten(0, (-1, 3)) * normal(1, 3, 6)).sum(1)
        * z.repeat(2, 3).sin().view(2, -1, 18)[1, :, 5:11]
        * torch.tile(t, (5,)).view(5, -1, 1).sum(0)
    ),
    "two batches in the last axis": lambda z, t: (
        torch.cat([z.T, z.T.cos()], 1).exp().view(6, 2, -1)[:, 1].T
    ),
}
MIXED = {
    "mean": lambda z, t: z - z.mean(0),
    "batch statistics": lambda z, t: F.batch_norm(z, None, None, None, None, True),
    "pairs": lambda z, t: torch.softmax(z @ z.T, -1) @ z,
    "sorted": lambda z, t: z.sort(0)[0],
    "running": lambda z, t: z.cumsum(0),
    "turned": lambda z, t: z.flip(0) * t[:, None],
    "neighbours": lambda z, t: z.roll(1, 0) + z[torch.arange(len(z)).roll(1)],
    "one row": lambda z, t: z * z[0],
    "assigned across": assigned_across,
    "assigned in some rows": assigned_in_some_rows,
    "assigned in another order": assigned_in_another_order,
    "assigned to one row": lambda z, t: (z * 2).index_put_((torch.tensor(0),), z[1]),
    "across": lambda z, t: z.reshape(2, -1, 6).flip(0).reshape(-1, 6),
    "parted otherwise than joined": lambda z, t: (
        torch.cat([z, z.sin(), z.cos()]).chunk(2)[1].mul(2)[: len(z)]
    ),
    "repeated unevenly": lambda z, t: (
        z.repeat_interleave(torch.arange(len(z)) % 2 + 1, 0).sum(0) * z
    ),
    "turned to the other axis": lambda z, t: z[:, :4].T,
    "tokens": lambda z, t: F.scaled_dot_product_attention(z, z, z),
    "normalised last": lambda z, t: F.layer_norm(z - z.mean(0), (6,), SQUARE[0]),
    "statistics of all": lambda z, t: F.layer_norm(z, z.shape),
    "channels": lambda z, t: F.conv1d(z, normal(7, len(z), len(z), 3), padding=1),
}
WIDE = normal(8, 18, 6)


@pytest.mark.parametrize("name", ONE_PASS)
@pytest.mark.parametrize("which", WHICH)
def test_the_model_runs_once_where_rows_stay_apart(name, which):
    assert check_seeded(ONE_PASS[name], choose(4, which)) == 1


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("which", WHICH)
def test_rows_that_mix_are_found_and_cost_one_pass_more(name, which):
    assert check_seeded(MIXED[name], choose(4, which)) == (2 if which in ("one", "half") else 1)


BLOCKS = {
    "whole": {},
    "causal": {"is_causal": True},
    "biased": {"attn_mask": normal(1, 4, 1, 100, 100)},
    "masked for each row": {"attn_mask": normal(2, 4, 1, 1, 100) > 0},
    "few keys and heads": {"enable_gqa": True, "scale": 0.2},
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("which", [None, "one", "half"])
@pytest.mark.parametrize("elements", [1, 100 * 64 * 3, 100 * 100 * 6, 1 << 20])
def test_the_tangent_of_attention_does_not_depend_on_its_blocks(
    name, which, elements, monkeypatch
):
    monkeypatch.setattr(rules.attention, "BLOCK_ELEMENTS", elements)

    def fn(z, t):
        moved = z * t[:, None]
        q = (moved @ normal(1, 6, 100 * 4 * 2)).reshape(-1, 100, 4, 2).transpose(1, 2)
        heads = 2 if name == "few keys and heads" else 4
        k, v = (
            (moved @ normal(2, 6, 2 * 100 * heads * 2))
            .reshape(-1, 2, 100, heads, 2)
            .permute(1, 0, 3, 2, 4)
        )
        return F.scaled_dot_product_attention(q, k, v, **BLOCKS[name]).transpose(1, 2).flatten(2)

    assert check_seeded(fn, choose(4, which)) == 1


@pytest.mark.parametrize("order", ["vkq", "kvq", "vqk"])
@pytest.mark.parametrize("elements", [1, 1 << 20])
def test_attention_may_be_called_by_name_in_any_order(order, elements, monkeypatch):
    monkeypatch.setattr(rules.attention, "BLOCK_ELEMENTS", elements)
    names = {"q": "query", "k": "key", "v": "value"}

    def fn(z, t):
        moved = (z * t[:, None]).reshape(-1, 1, 3, 2)
        given = {"q": moved.sin(), "k": 2 * moved, "v": moved.cos()}
        out = F.scaled_dot_product_attention(**{names[x]: given[x] for x in order})
        return out.flatten(1)

    assert check_seeded(fn, choose(4, "half")) == 1


# --- random numbers


def tokens(z):
    return (z @ SQUARE).reshape(len(z), 1, 3, 2)


SQUARE = normal(9, 6, 6)
DRAWING = {
    "native_dropout": lambda z, t: torch.native_dropout(z, 0.4, True)[0],
    "between the layers of an LSTM": lambda z, t: LSTM(z[None])[0][0],
    "alpha dropout": lambda z, t: (
        F.alpha_dropout(z, 0.4, True) * F.feature_alpha_dropout(z[..., None], 0.4, True)[..., 0]
    ),
    "dropout2d in place": lambda z, t: F.dropout2d(
        (z @ SQUARE)[:, :, None, None], 0.4, inplace=True
    ).flatten(1),
    "attention where all is masked": lambda z, t: F.scaled_dot_product_attention(
        tokens(z),
        tokens(z),
        tokens(z),
        dropout_p=0.4,
        attn_mask=torch.tensor([[True] * 3, [False] * 3, [True] * 3]),
    ).flatten(1),
    "nn.Dropout": lambda z, t: nn.Dropout(0.3)(z @ SQUARE).sin() * t[:, None],
    "dropout in place": lambda z, t: F.dropout(z @ SQUARE, 0.3, inplace=True).sin(),
    "dropout1d": lambda z, t: F.dropout1d((z @ SQUARE)[:, :, None], 0.4)[..., 0],
    "dropout2d": lambda z, t: F.dropout2d((z @ SQUARE)[:, :, None, None], 0.4).flatten(1),
    "of a transposed tensor": lambda z, t: F.dropout((z @ SQUARE).T, 0.4).T,
    "attention": lambda z, t: F.scaled_dot_product_attention(
        tokens(z), tokens(z), tokens(z), dropout_p=0.4
    ).flatten(1),
    "causal attention": lambda z, t: F.scaled_dot_product_attention(
        tokens(z), tokens(z).sin(), tokens(z), dropout_p=0.4, is_causal=True, scale=0.3
    ).flatten(1),
    "stochastic depth": lambda z, t: z + (z @ SQUARE) * z.new_empty(len(z), 1).bernoulli_(0.5),
    "noise": lambda z, t: z * torch.rand_like(z) + torch.randn(len(z), 6) * t[:, None],
    "gumbel": lambda z, t: F.gumbel_softmax(z, dim=-1),
    "with rows that mix": lambda z, t: F.dropout(z, 0.3) * F.dropout(z, 0.5).mean(0),
}


torch.manual_seed(0)
LSTM = nn.LSTM(6, 3, 2, dropout=0.5).double()


@pytest.mark.parametrize("name", DRAWING)
@pytest.mark.parametrize("which", WHICH)
def test_value_and_derivative_share_their_random_numbers(name, which):
    check_seeded(DRAWING[name], choose(4, which), wanted=by_differences, tolerance=1e-7)


# --- custom functions, scripts, transforms


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class Both(torch.autograd.Function):
    @staticmethod
    def forward(x, y):
        return x * y, x + y.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, first, second):
        x, y = ctx.saved_tensors
        return first * y + second, first * x + second * y.cos()


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.cumsum(0)

    @staticmethod
    def backward(ctx, grad):
        return grad.flip(0).cumsum(0).flip(0)


class Numpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


CUSTOM = {
    "one output": (lambda z, t: Sine.apply(z @ LEAF), lambda z, t: torch.sin(z @ LEAF)),
    "of the input": (
        lambda z, t: Sine.apply(z) * t[:, None],
        lambda z, t: torch.sin(z) * t[:, None],
    ),
    "two outputs": (
        lambda z, t: sum(Both.apply(z @ LEAF, z)),
        lambda z, t: (z @ LEAF) * z + z @ LEAF + z.sin(),
    ),
    "identity": (lambda z, t: Reversal.apply(z @ LEAF).sin(), lambda z, t: (z @ LEAF).sin()),
    "rows that mix": (lambda z, t: Sums.apply(z @ LEAF), lambda z, t: (z @ LEAF).cumsum(0)),
}
LEAF = normal(10, 6, 6).requires_grad_()


@pytest.mark.parametrize("name", CUSTOM)
@pytest.mark.parametrize("which", WHICH)
def test_an_autograd_function_of_torch_functions_is_differentiated_by_its_forward_pass(
    name, which
):
    fn, same = CUSTOM[name]
    check_seeded(fn, choose(4, which), wanted=lambda fn, *args: exact(same, *args), weights=[LEAF])


@pytest.mark.parametrize("which", [None, "half"])
@pytest.mark.parametrize("enabled", [True, False])
def test_an_autograd_function_that_leaves_torch_is_refused_by_name(which, enabled):
    with (
        torch.set_grad_enabled(enabled),
        pytest.raises(DerivativeError, match=r"Numpy.*FiniteDifference"),
    ):
        ROUTE(lambda z, t: Numpy.apply(z @ LEAF), *inputs((4, 6)), choose(4, which))


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.filterwarnings("ignore")
def test_scripted_and_traced_code_is_differentiated(which):
    @torch.jit.script
    def scripted(x, y):
        return torch.tanh(x) * y + x.sum(-1, keepdim=True)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6)).double()
    module, traced = (
        torch.jit.script(net.requires_grad_(False)),
        torch.jit.trace(net, torch.zeros(4, 6, dtype=DOUBLE)),
    )
    assert (
        check_seeded(lambda z, t: scripted(z @ LEAF, y=z), choose(4, which), weights=[LEAF]) <= 2
    )
    for made in (module, traced):
        check_seeded(
            lambda z, t, made=made: made(z @ LEAF) * t[:, None], choose(4, which), weights=[LEAF]
        )


TRANSFORMS = {
    "vmap": lambda z, t: torch.func.vmap(lambda a, b: (a @ SQUARE) * b)(z, t),
    "vmap of columns": lambda z, t: torch.func.vmap(torch.sin, in_dims=1)(z).T,
    "grad": lambda z, t: torch.func.grad(lambda a: (a.sin() * t[:, None]).sum())(z),
    "vjp": lambda z, t: torch.func.vjp(torch.sin, z)[1](z)[0],
    "jvp": lambda z, t: torch.func.jvp(torch.sin, (z,), (z,))[1],
    "jacrev": lambda z, t: torch.func.jacrev(torch.sin)(z).sum((2, 3)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("which", [None, "half"])
def test_a_transform_inside_the_model_is_refused_and_forward_mode_named(name, which):
    with pytest.raises(DerivativeError, match=r"ForwardMode\(\)"):
        ROUTE(TRANSFORMS[name], *inputs((4, 6)), choose(4, which))


@pytest.mark.parametrize("which", WHICH)
def test_a_transform_of_constants_inside_the_model_is_none_of_its_business(which):
    """No mode sees what a transform returns: the first passes evaluate the model twice more."""

    def fn(z, t):
        mask = torch.func.vmap(torch.cos)(normal(1, 4, 6)) + torch.func.grad(
            lambda x: x.sum() ** 2
        )(normal(2, 6))
        return z * mask * t[:, None]

    assert check_seeded(fn, choose(4, which)) <= 3


@pytest.mark.parametrize("which", [None, "all", "half"])
def test_it_works_under_grad_of_an_outer_function(which):
    (z, t), tangents = inputs((4, 6))
    rows = choose(4, which)

    def loss(z):
        value, derivative = ROUTE(transformed, (z, t), tangents, rows)
        return ((value - derivative.detach()) ** 2).sum()

    fixed = masked(exact(transformed, (z, t), tangents), rows)
    wanted = torch.func.grad(lambda z: ((transformed(z, t) - fixed) ** 2).sum())(z)
    close(torch.func.grad(loss)(z), wanted)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("which", [None, "all", "half"])
def test_it_works_under_vmap_of_an_outer_function(which):
    rows = choose(4, which)
    pairs = [inputs((4, 6), seed) for seed in (0, 7, 9)]
    stacks = [torch.stack(group) for group in zip(*(p + v for p, v in pairs), strict=True)]

    def both(z, t, v, u):
        return ROUTE(transformed, (z, t), (v, u), rows)

    values, derivatives = torch.func.vmap(both)(*stacks)
    for i, (primals, tangents) in enumerate(pairs):
        close(values[i], transformed(*primals))
        close(derivatives[i], masked(exact(transformed, primals, tangents), rows))


# --- checkpoints, hooks, buffers, weights


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", ["plain", "dropout", "attention dropout", "rows that mix"])
def test_a_checkpointed_block_is_that_block(name, which):
    def block(h, t):
        h = F.layer_norm(h @ LEAF, (6,)).sin() * t[:, None]
        h = F.dropout(h, 0.4) if name == "dropout" else h
        p = 0.4 if name == "attention dropout" else 0.0
        h = h + F.scaled_dot_product_attention(
            tokens(h), tokens(h).sin(), tokens(h), dropout_p=p
        ).flatten(1)
        return h - h.mean(0) if name == "rows that mix" else F.gelu(h)

    def fn(z, t):
        return checkpoint(block, z @ LEAF, t, use_reentrant=False) * 2

    rows = choose(4, which)
    check_seeded(fn, rows, wanted=by_differences, tolerance=1e-7, weights=[LEAF])


class Net(nn.Module):
    """Batch norm, dropout, buffers that the forward pass writes, and one weight used twice."""

    def __init__(self, norm=nn.BatchNorm1d, p=0.3):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.first.weight
        self.norm, self.drop = norm(6), nn.Dropout(p)
        self.register_buffer("calls", torch.zeros(()))
        self.double()

    def forward(self, z, t):
        self.calls.add_(1)
        self.calls += 1
        return self.last(self.drop(self.norm(self.first(z)).tanh())) * (1 + t)[:, None]


def made(**options):
    torch.manual_seed(0)
    return Net(**options).train()


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("training", [True, False])
def test_a_module_with_buffers_and_tied_weights_takes_one_plain_step(which, training):
    net, plain = made().train(training), made().train(training)
    primals, tangents = inputs((4, 6))
    rows = choose(4, which)
    torch.manual_seed(3)
    value = plain(*primals)
    torch.manual_seed(3)
    found, derivative = ROUTE(net, primals, tangents, rows)
    close(found, value)
    for mine, theirs in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        close(mine, theirs)
    torch.manual_seed(3)
    close(derivative, masked(by_differences(plain, primals, tangents), rows), 1e-7)
    for output in (found, value):
        (output**2).sum().backward()
    for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        close(mine.grad, theirs.grad)


@pytest.mark.parametrize("which", WHICH)
def test_hooks_run_once(which):
    torch.manual_seed(0)
    net, hits = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double(), []
    net[0].register_forward_pre_hook(lambda *_: hits.append("before"))
    net[0].register_forward_hook(lambda *_: hits.append("after"))
    net[2].register_full_backward_hook(lambda *_: hits.append("module"))
    net[0].weight.register_hook(lambda g: hits.append("weight"))

    def fn(z, t):
        h = net[0](z)
        h.register_hook(lambda g: hits.append("tensor") or 2 * g)
        return net[2](net[1](h)) * t[:, None]

    primals, tangents = inputs((4, 6))
    results = []
    for run in (lambda: fn(*primals), lambda: ROUTE(fn, primals, tangents, choose(4, which))[0]):
        hits.clear()
        gradients = torch.autograd.grad(run().square().sum(), list(net.parameters()))
        assert sorted(hits) == ["after", "before", "module", "tensor", "weight"]
        results.append(gradients)
    for mine, theirs in zip(*results, strict=True):
        close(mine, theirs)
    check(
        fn,
        primals,
        tangents,
        choose(4, which),
        wanted=exact(lambda z, t: net[2](net[1](net[0](z))) * t[:, None], primals, tangents),
    )


def test_what_the_model_keeps_has_its_gradient_and_no_tangent():
    kept = []

    def fn(z, t):
        kept.append(torch.tanh(z @ LEAF))
        return kept[-1] * t[:, None]

    primals, tangents = inputs((4, 6))
    ROUTE(fn, primals, tangents)
    fn(*primals)
    mine, theirs = (torch.autograd.grad(h.square().sum(), LEAF)[0] for h in kept)
    close(mine, theirs)
    assert not vars(kept[0])

    def memory(z, t):
        return kept[0] * t[:, None] + z

    assert check(memory, primals, tangents, None) == 1


@pytest.mark.parametrize("which", WHICH)
def test_arguments_may_be_nested_and_only_those_with_a_tangent_move(which):
    (z, t), (v, u) = inputs((4, 6))
    conditions = {
        "labels": torch.tensor([2, 0, 1, 2]),
        "deep": [{"mask": normal(1, 4, 1) > 0}, normal(2, 4, 6)],
        "name": "x",
    }

    def fn(z, t, conditions, s):
        assert conditions["name"] == "x" and len(conditions["labels"]) == 4
        table = F.embedding(conditions["labels"], SQUARE)
        h = z * table + conditions["deep"][1] * (t - s)[:, None]
        return torch.where(conditions["deep"][0]["mask"], h, h.sin())

    rows = choose(4, which)
    value, derivative = ROUTE(fn, (z, t, conditions, t / 2), (v, u, None, None), rows)
    close(value, fn(z, t, conditions, t / 2))
    close(
        derivative,
        masked(
            exact(lambda z, t: fn(z, t, conditions, inputs((4, 6))[0][1] / 2), (z, t), (v, u)),
            rows,
        ),
    )


RESULTS = {
    "the input": lambda z, t: z,
    "a view": lambda z, t: z.reshape(len(z), 2, 3),
    "times": lambda z, t: t * 2,
    "one number a row": lambda z, t: z.sum(-1) * t,
    "a constant": lambda z, t: normal(1, 4, 6),
    "float32": lambda z, t: (z @ SQUARE).float(),
    "whole numbers on the way": lambda z, t: (
        z * F.embedding((t * 5).to(torch.long), SQUARE) + (z * 3).to(torch.int32)
    ),
}


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("which", WHICH)
def test_a_model_may_return_any_tensor_of_rows(name, which):
    check_seeded(RESULTS[name], choose(4, which), tolerance=1e-6 if name == "float32" else 1e-11)


def test_the_input_is_written_to_as_by_the_plain_program():
    def fn(z, t):
        z.mul_(2)
        z -= t[:, None]
        return z.sin()

    primals, tangents = inputs((4, 6))
    mine, theirs = [x.clone() for x in primals], [x.clone() for x in primals]
    wanted = exact(fn, primals, tangents)
    for which in (None, "half"):
        here = [x.clone() for x in mine]
        close(ROUTE(fn, here, tangents, choose(4, which))[1], masked(wanted, choose(4, which)))
        fn(*(there := [x.clone() for x in theirs]))
        assert torch.equal(here[0], there[0])


# --- what goes wrong


class Failure(Exception):
    pass


def fails_at(call):
    """A model that mixes rows, and fails when it is called for this time, deep inside."""
    calls = []

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append(1)
            if len(calls) == call:
                raise Failure
            return x.sin()

        @staticmethod
        def backward(ctx, grad):
            return grad

    def fn(z, t):
        with torch.no_grad():
            return Custom.apply(F.layer_norm(z - z.mean(0), (6,)))

    return fn


@pytest.mark.parametrize(("call", "which"), [(1, None), (1, "half"), (2, "half")])
@pytest.mark.parametrize("enabled", [True, False])
def test_an_exception_inside_the_model_comes_through_and_everything_is_as_before(
    call, which, enabled
):
    with torch.set_grad_enabled(enabled), untouched(), pytest.raises(Failure):
        ROUTE(fails_at(call), *inputs((4, 6)), choose(4, which))


@pytest.mark.parametrize(
    "fn", [lambda z, t: z @ SQUARE[:5], lambda z, t: F.linear(z, SQUARE[:, :5])]
)
def test_an_error_of_the_plain_program_is_that_error(fn):
    with pytest.raises(RuntimeError) as plain:
        fn(*inputs((4, 6))[0])
    for which in (None, "half"):
        with untouched(), pytest.raises(RuntimeError) as found:
            ROUTE(fn, *inputs((4, 6)), choose(4, which))
        assert str(found.value) == str(plain.value)


REFUSED = {
    "cdist": (
        lambda z, t: torch.cdist(z[:, None], z[:, None] * 2, math.inf)[:, 0],
        "cdist.*FiniteDifference",
    ),
    "unsqueeze_": (lambda z, t: (z * 2).unsqueeze_(0)[0], r"unsqueeze_.*ForwardMode\(\)"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("which", [None, "half"])
def test_what_has_no_tangent_is_refused_and_another_way_named(name, which):
    fn, message = REFUSED[name]
    with untouched(), pytest.raises(DerivativeError, match=message):
        ROUTE(fn, *inputs((4, 6)), choose(4, which))


@pytest.mark.parametrize("result", [None, (1, 2), torch.zeros(()), torch.zeros(3, 6)])
def test_a_model_that_returns_no_tensor_of_rows_is_refused(result):
    with untouched(), pytest.raises(InputError, match=r"shape \(B, \*\)"):
        ROUTE(lambda z, t: result, *inputs((4, 6)))


def test_passes_in_several_threads_do_not_disturb_one_another():
    before = state()
    primals, tangents = inputs((4, 6))
    wanted = exact(transformed, primals, tangents)
    barrier, found = threading.Barrier(3), []

    def fn(z, t):
        barrier.wait(timeout=20)
        return Reversal.apply(transformed(z, t))

    def work(which):
        for _ in range(4):
            derivative = ROUTE(fn, primals, tangents, choose(4, which))[1]
            found.append(float((derivative - masked(wanted, choose(4, which))).abs().max()))

    threads = [threading.Thread(target=work, args=(which,)) for which in (None, "half", "one")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 12 and max(found) < 1e-12
    assert state() == before


# --- rarer functions


def stopped_after_a_write(z, t):
    y = z * 2
    y[:, 0:1] *= 3
    return y * y.detach()


def from_nothing(z, t):
    """As caches of keys and values begin."""
    h = torch.tensor([], dtype=z.dtype)
    for part in z.chunk(3, 1):
        h = torch.cat([h, part.sin()], 1)
    return h


def squares(z, t, **options):
    return F.scaled_dot_product_attention(
        query=tokens(z), key=tokens(z), value=tokens(z).sin(), **options
    ).flatten(1)


RARER = {
    "cat with nothing": from_nothing,
    "detach after a write through a view": stopped_after_a_write,
    "data after a write through a view": lambda z, t: stopped_after_a_write(z, t).data * z,
    "sparse constant after a write": lambda z, t: (
        stopped_after_a_write(z, t) * torch.eye(6).to_sparse().to_dense().sum()
    ),
    "roll of a flat transposed tensor": lambda z, t: z.T.roll(1).T,
    "diff with a constant before": lambda z, t: z.diff(dim=1, prepend=normal(1, 4, 1)),
    "nansum": lambda z, t: (z + torch.tensor([0, math.nan, 0, 0, 0, 0])).nansum(1),
    "tanh of complex numbers": lambda z, t: torch.complex(z, z.sin()).tanh().real,
    "sigmoid of complex numbers": lambda z, t: torch.complex(z, z.sin()).sigmoid().imag,
    "fill_ with a number that moves": lambda z, t: (z * 1).fill_(z.mean()) * z,
    "silu in place": lambda z, t: (
        F.silu(z @ SQUARE, inplace=True) + F.relu6(z @ SQUARE, inplace=True)
    ),
    "hardswish in place": lambda z, t: (
        F.hardswish(z @ SQUARE, inplace=True) + F.leaky_relu(z * 2, 0.2, inplace=True)
    ),
    "attention by keywords": squares,
    "attention of a negative scale": lambda z, t: squares(z, t, scale=-0.4),
    "causal attention by keywords": lambda z, t: squares(z, t, is_causal=True, scale=0.4),
    "linear by keywords": lambda z, t: F.linear(input=z, weight=SQUARE),
    "convolution by keywords": lambda z, t: F.conv1d(
        input=z[:, None], weight=normal(1, 2, 1, 3)
    ).flatten(1),
    "arithmetic by keywords": lambda z, t: (
        torch.add(z, other=z.sin(), alpha=2) * torch.mul(input=z, other=z)
    ),
    "cat along an axis=": lambda z, t: torch.cat([z, z.sin()], axis=1),
    "tile by keyword": lambda z, t: torch.tile(z, dims=(1, 2)) + z.repeat(repeats=(1, 2)),
    "view_as": lambda z, t: normal(1, 24).view_as(z) * z + normal(2, 24).reshape_as(z),
    "float32 plus a float64 constant": lambda z, t: F.linear(z.float() + normal(1, 4, 6), SQUARE),
    "cat of two types": lambda z, t: F.linear(
        torch.cat([z[:, :3].float(), normal(1, 4, 3)], 1), SQUARE
    ),
    "einsum of one row": lambda z, t: torch.einsum("bi,bi->bi", z, normal(1, 1, 6)),
    "selected": lambda z, t: (
        z.select(1, 0)[:, None] * z.narrow(1, 1, 4) + z.unfold(1, 2, 1).sum(-1)[:, :4]
    ),
    "rows by index": lambda z, t: z[torch.arange(4), torch.tensor([0, 2, 1, 5])][:, None] * z,
    "recurrent": lambda z, t: torch.gru_cell(z, z.sin(), normal(1, 18, 6), normal(2, 18, 6)),
    "linear algebra": lambda z, t: torch.linalg.solve(
        z[:, :, None] * z[:, None] + torch.eye(6, dtype=z.dtype), z
    ),
    "weights that move": lambda z, t: F.linear(z, z.T @ z) + F.layer_norm(z, (6,), z[0], z[1]),
    "numbers that are read": lambda z, t: z * z[0, 0].detach().item() + float(z.detach().sum()),
}


@pytest.mark.parametrize("name", RARER)
@pytest.mark.parametrize("which", [None, "one", "half"])
def test_rarer_functions_and_ways_to_call_them_are_right_too(name, which):
    check_seeded(
        RARER[name],
        choose(4, which),
        tolerance=1e-6 if "float32" in name or "types" in name else 1e-11,
    )


LEAVING = {
    ".item()": lambda z, t: z * t[0].item(),
    ".tolist()": lambda z, t: z * torch.tensor(t.tolist(), dtype=DOUBLE)[:, None],
    ".numpy()": lambda z, t: z * torch.from_numpy(t.numpy())[:, None],
    "float()": lambda z, t: z * float(t[0]),
    "array()": lambda z, t: z * torch.from_numpy(np.asarray(t))[:, None],
}


@pytest.mark.parametrize("name", LEAVING)
def test_a_value_that_leaves_torch_is_refused_by_the_name_of_what_took_it(name):
    with pytest.raises(
        DerivativeError, match=r"got " + re.escape(name) + r".* write \.detach\(\) first"
    ):
        ROUTE(LEAVING[name], *inputs((4, 6)))


@pytest.mark.parametrize("cast", [lambda t: (t * 9).long(), lambda t: (t * 9).to(torch.int64)])
def test_a_table_looked_up_by_times_has_derivative_zero_and_one_warning(cast):
    kinds.warn_of_whole_numbers.cache_clear()
    primals, tangents = inputs((4, 6))
    table = normal(1, 10, 6)
    with pytest.warns(UserWarning, match="whole numbers") as caught:
        for _ in range(2):
            found = ROUTE(lambda z, t: z + table[cast(t).clamp(0, 9)], primals, tangents)[1]
    close(found, tangents[0])
    assert len(caught) == 1


@pytest.mark.parametrize("which", WHICH)
def test_a_constant_in_the_place_of_a_freed_buffer_carries_nothing(which):
    """The allocator gives the same place in memory again."""

    def fn(z, t):
        buffer = torch.zeros(4, 6, dtype=z.dtype)
        buffer[:, :3] = z[:, :3].sin()
        place, held = buffer.data_ptr(), []
        del buffer
        for i in range(200):
            held.append(torch.full((4, 6), float(i), dtype=z.dtype))
            if held[-1].data_ptr() == place:
                break
        return z + held[-1]

    primals, tangents = inputs((4, 6))
    close(ROUTE(fn, primals, tangents, choose(4, which))[1], masked(tangents[0], choose(4, which)))


@pytest.mark.parametrize("which", [None, "one", "half"])
def test_the_output_of_an_autograd_function_may_be_written_to(which):
    def fn(z, t):
        y = Sine.apply(z @ LEAF)
        y.add_(1).mul_(t[:, None])
        return y

    def same(z, t):
        return ((z @ LEAF).sin() + 1) * t[:, None]

    check_seeded(fn, choose(4, which), wanted=lambda fn, *args: exact(same, *args), weights=[LEAF])


@pytest.mark.parametrize("which", [None, "half"])
def test_an_autograd_function_of_the_input_that_leaves_torch_is_refused_too(which):
    with pytest.raises(DerivativeError, match="Numpy"):
        ROUTE(lambda z, t: Numpy.apply(z) * 2, *inputs((4, 6)), choose(4, which))


@pytest.mark.parametrize("which", [None, "half"])
def test_gradients_inside_the_model_are_refused(which):
    def fn(z, t):
        with torch.enable_grad():
            h = z @ LEAF
            return torch.autograd.grad((h.sin() * t[:, None]).sum(), h, create_graph=True)[0]

    with untouched(), pytest.raises(DerivativeError, match=r"FiniteDifference\(\)"):
        ROUTE(fn, *inputs((4, 6)), choose(4, which))


@pytest.mark.parametrize("which", [None, "half"])
def test_a_function_of_constants_that_closes_over_a_moving_tensor_is_refused(which):
    with untouched(), pytest.raises(DerivativeError, match=r"ForwardMode\(\)"):
        ROUTE(
            lambda z, t: torch.func.vmap(lambda a: a * z)(normal(1, 3, 4, 6)).sum(0),
            *inputs((4, 6)),
            choose(4, which),
        )


@pytest.mark.parametrize("which", WHICH)
def test_a_model_that_writes_into_its_input_and_mixes_rows_is_right_or_refused(which):
    def fn(z, t):
        z.mul_(2)
        return z.sin() * z.mean()

    primals, tangents = inputs((4, 6))
    wanted = masked(exact(fn, primals, tangents), choose(4, which))
    try:
        derivative = ROUTE(fn, primals, tangents, choose(4, which))[1]
    except DerivativeError:
        return
    close(derivative, wanted)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("mixes", [False, True])
def test_running_statistics_of_instance_norm_take_one_step(which, mixes):
    net, plain = (nn.InstanceNorm1d(6, track_running_stats=True).double() for _ in range(2))
    (z, t), tangents = inputs((4, 6, 3))
    plain(z)
    ROUTE(lambda z, t: net(z) - (z.mean(0) if mixes else 0), (z, t), tangents, choose(4, which))
    close(net.running_mean, plain.running_mean)


@pytest.mark.parametrize("fn", [lambda z, t: z, lambda z, t: z + 1, lambda z, t: z.flatten(1)])
@pytest.mark.parametrize("which", WHICH)
def test_the_derivative_has_no_gradient_though_the_tangent_has(fn, which):
    primals, (v, u) = inputs((4, 6))
    assert not ROUTE(fn, primals, (v.requires_grad_(), u), choose(4, which))[1].requires_grad


@pytest.mark.parametrize("which", [None, "half"])
def test_what_the_model_keeps_has_no_tangent_after_an_exception(which):
    kept = []

    def fn(z, t):
        kept.append(z * 2)
        raise Failure

    with pytest.raises(Failure):
        ROUTE(fn, *inputs((4, 6)), choose(4, which))
    assert not vars(kept[0])


@pytest.mark.parametrize("which", WHICH)
def test_an_expanded_tensor_may_have_a_tangent_of_another_layout(which):
    def fn(z, t):
        x = F.scaled_dot_product_attention(z, z.sin(), z.cos())[None].expand(2, *z.shape)
        return torch.complex(x, x.sin()).abs().sum(0)

    primals, tangents = inputs((4, 3, 5, 2))
    derivative = ROUTE(fn, primals, tangents, choose(4, which))[1]
    close(derivative, masked(exact(fn, primals, tangents), choose(4, which)))


# --- faults that are known: a program is to be right, or refused by a DerivativeError


def written_by_an_operator(z, t):
    y = z * 3
    torch.ops.aten.mul_(y, 2.0)
    return y * z


def real_part_assigned(z, t):
    a = torch.complex(z, z.sin())
    a.real = z * t[:, None]
    return (a * a).imag + a.real


def imaginary_part_assigned(z, t):
    a = torch.complex(z, z.sin())
    b = a[:, 1:]
    b.imag = 2.0
    a.conj().imag = z.cos()
    return (a * a).imag + (b * b).real.sum(1, keepdim=True)


class Labelled(torch.Tensor):
    """A subclass as libraries of pictures have them."""


def data_assigned(z, t):
    y = torch.zeros_like(z)
    y.data = z * 2
    return y * z


def part_of_what_is_detached(z, t):
    y = z * 2
    y[:, 0:1] *= 3
    return y[:, :3] * y.detach()[:, :3]


def part_of_what_is_detached_before(z, t):
    y = z * 2
    first = y.detach()[:, :3]
    y[:, 0:1] *= 3
    return y[:, :3] * first


def conjugate_of_what_is_written(z, t):
    a = torch.complex(z, z.sin())
    c = a.conj()
    a.mul_(2 + 1j)
    return (c * c).imag + c.real


def parts_of_what_is_written(z, t):
    a = torch.complex(z, z.sin())
    part, negative = a[:, :3], a.conj().imag
    a.mul_(2 + 1j)
    return torch.cat([part.real * t[:, None], part.imag * z[:, 3:]], 1) + negative


def backward_inside(z, t):
    with torch.enable_grad():
        x = z.detach().requires_grad_()
        ((x @ SQUARE).sin() * t[:, None]).sum().backward()
        return x.grad * 1


FAULTS = {
    "an operator that writes": (written_by_an_operator, exact),
    "the real part assigned": (real_part_assigned, exact),
    "data assigned": (data_assigned, lambda fn, z, v: 4 * z[0] * v[0]),
    "a part of what is detached, after a write": (part_of_what_is_detached, exact),
    "a part of what is detached, before a write": (part_of_what_is_detached_before, exact),
    "a conjugate of what is written": (conjugate_of_what_is_written, exact),
    "real parts of what is written": (parts_of_what_is_written, exact),
    "torch.Tensor of a tensor": (lambda z, t: torch.Tensor(z.float() * 2) * z, exact),
    "as_subclass": (lambda z, t: (z * 2).as_subclass(torch.Tensor) * z, exact),
    "as_subclass, a part": (lambda z, t: (z * 2).as_subclass(torch.Tensor)[:, 1:2] * z, exact),
    "as another subclass": (lambda z, t: z.as_subclass(Labelled) * t[:, None], exact),
    "the imaginary part assigned": (imaginary_part_assigned, exact),
    "requires_grad_": (
        lambda z, t: (z @ LEAF).requires_grad_() * 2,
        lambda fn, z, v: 2 * v[0] @ LEAF.detach(),
    ),
    "backward": (
        backward_inside,
        lambda fn, z, v: (torch.cos(z[0] @ SQUARE) * v[1][:, None]) @ SQUARE.T,
    ),
    "rrelu": (lambda z, t: F.rrelu(z, training=True), by_differences),
    "einsum with a diagonal": (lambda z, t: torch.einsum("bb,bi->bi", normal(1, 4, 4), z), exact),
    "nothing, reshaped": (lambda z, t: z + z[:, :0].T.reshape(4, 0).sum(1, keepdim=True), exact),
    "random_": (lambda z, t: z * torch.zeros_like(z * 2).copy_(z).random_(3), by_differences),
}


@pytest.mark.parametrize("name", FAULTS)
def test_programs_with_a_known_fault_are_right_or_refused(name):
    fn, wanted = FAULTS[name]
    for which in (None, "one", "half"):
        with contextlib.suppress(DerivativeError):
            check_seeded(fn, choose(4, which), wanted=wanted, tolerance=1e-7)


class Averaged(nn.Module):
    """Adds to a running mean, in one of many ways, and uses it."""

    def __init__(self, add):
        super().__init__()
        self.register_buffer("mean", normal(3, 6))
        self.add = add

    def forward(self, z, t):
        self.add(self, z)
        return z * self.mean.detach() + z.mean(0) * t[:, None]


def by_assignment(net, z):
    net.mean = 0.9 * net.mean + 0.1 * z.detach().mean(0)


RUNNING = {
    "lerp_": lambda net, z: net.mean.lerp_(z.detach().mean(0), 0.1),
    "copy_": lambda net, z: net.mean.copy_(net.mean + z.detach().mean(0)),
    "index": lambda net, z: net.mean.__setitem__(slice(3), z.detach().mean(0)[:3]),
    "data": lambda net, z: net.mean.data.add_(z.detach().mean(0)),
    "view": lambda net, z: net.mean[:3].add_(z.detach().mean(0)[:3]),
    "out=": lambda net, z: torch.add(net.mean, z.detach().mean(0), out=net.mean),
    "with gradient": lambda net, z: net.mean.lerp_(z.mean(0), 0.1),
    "foreach": lambda net, z: torch._foreach_add_([net.mean], [z.detach().mean(0)]),
    "assignment": by_assignment,
}


@pytest.mark.parametrize("name", RUNNING)
def test_a_running_mean_that_the_model_writes_takes_one_step_and_the_derivative_is_at_that_step(
    name,
):
    add, (primals, tangents) = RUNNING[name], inputs((4, 6))
    for which in WHICH:
        net, plain = Averaged(add), Averaged(add)
        value = plain(*primals)
        found, derivative = ROUTE(net, primals, tangents, choose(4, which))
        close(found, value)
        close(net.mean.detach(), plain.mean.detach())
        mean = plain.mean.detach()
        wanted = exact(
            lambda z, t, mean=mean: z * mean + z.mean(0) * t[:, None], primals, tangents
        )
        close(derivative, masked(wanted, choose(4, which)))


def test_what_a_wrapper_holds_of_the_input_is_constant():
    """Also a view of the memory that the input lies in."""
    whole, (primals, tangents) = normal(9, 4, 9), inputs((4, 6))
    part = whole[:, 3:]
    for which in WHICH:
        found = ROUTE(lambda z, t: z * part + whole[:, :6], (part, primals[1]), tangents, None)[1]
        close(found, tangents[0] * part)
        found = ROUTE(
            lambda z, t: z * part * z[0], (part, primals[1]), tangents, choose(4, which)
        )[1]
        wanted = (tangents[0] * part[0] + part * tangents[0][0]) * part
        close(found, masked(wanted, choose(4, which)))


@pytest.mark.parametrize("name", ["real", "imag"])
def test_a_part_of_complex_numbers_is_written_by_a_function_of_torch(name):
    def fn(z, t):
        a = torch.complex(z, z.sin())
        getattr(a, name).mul_(t[:, None])
        getattr(a.conj()[:, 1:], name).copy_(z[:, 1:].exp())
        return (a * a).imag + a.real

    for which in WHICH:
        check_seeded(fn, choose(4, which))
    with pytest.raises(DerivativeError, match=r"write x\.real\.copy_\(y\)"):
        ROUTE(real_part_assigned, *inputs((4, 6)), choose(4, "half"))


class Counting(nn.Module):
    """Depends on how often it was called, by what no function of torch changes."""

    def __init__(self, kind, mixes):
        super().__init__()
        self.kind, self.mixes = kind, mixes
        self.count, self.calls, self.mean = 0, [0], torch.zeros(6, dtype=DOUBLE)

    def forward(self, z, t):
        if self.kind == "attribute":
            self.count += 1
        elif self.kind == "list":
            self.calls[0] += 1
        else:
            self.mean = self.mean + z.detach().mean(0)
        scale = self.count + self.calls[0] + self.mean
        if self.mixes:
            return z * scale + z.mean(0) * t[:, None]
        return z * scale * t[:, None]


@pytest.mark.parametrize("kind", ["attribute", "list", "tensor"])
def test_a_model_that_counts_its_calls_is_followed_in_one_pass_and_refused_in_two(kind):
    primals, tangents = inputs((4, 6))
    for which in WHICH:
        once, rows = Counting(kind, mixes=False), choose(4, which)
        derivative = ROUTE(once, primals, tangents, rows)[1]
        scale = once.count + once.calls[0] + once.mean
        wanted = exact(lambda z, t, scale=scale: z * scale * t[:, None], primals, tangents)
        close(derivative, masked(wanted, rows))
    with pytest.raises(DerivativeError, match="remembers its calls"):
        ROUTE(Counting(kind, mixes=True), primals, tangents, choose(4, "half"))


def test_a_model_that_mixes_rows_may_write_into_its_input():
    def fn(z, t):
        z.mul_(2)
        return z * t[:, None] - z.mean(0)

    primals, tangents = inputs((4, 6))
    wanted = exact(lambda z, t: fn(z.clone(), t), primals, tangents)
    given = primals[0].clone()
    derivative = ROUTE(fn, (given, primals[1]), tangents, choose(4, "half"))[1]
    close(derivative, masked(wanted, choose(4, "half")))
    close(given, 2 * primals[0])


def test_the_second_pass_starts_from_the_buffers_of_the_first():
    """Spectral norm takes a step of the power iteration in every pass."""
    nets = []
    for _ in range(2):
        torch.manual_seed(1)
        nets.append(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6).double()))
    primals, tangents = inputs((4, 6))
    weight = (nets[0](torch.eye(6, dtype=DOUBLE)) - nets[0].bias).detach()
    found = ROUTE(lambda z, t: nets[1](z) - z.mean(0), primals, tangents, choose(4, "half"))[1]
    close(found, masked(tangents[0] @ weight - tangents[0].mean(0), choose(4, "half")))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("calls", [0, 2])
def test_a_scripted_module_with_weights_that_learn_is_right_or_refused(calls):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5 + calls), nn.SiLU(), nn.Linear(5 + calls, 6)).double()
    scripted, (primals, tangents) = torch.jit.script(net), inputs((4, 6))
    for _ in range(calls):
        scripted(primals[0])
    for _ in range(3):  # the second call runs what the first one was compiled to
        try:
            derivative = ROUTE(lambda z, t: scripted(z), primals, tangents)[1]
        except DerivativeError:
            continue
        close(derivative, exact(lambda z, t: net(z), primals, tangents))


@pytest.mark.parametrize("which", [None, "half"])
def test_it_works_in_inference_mode(which):
    wanted = exact(transformed, *inputs((4, 6)))
    with torch.inference_mode():
        primals, tangents = inputs((4, 6))
        derivative = ROUTE(transformed, primals, tangents, choose(4, which))[1]
    close(derivative, masked(wanted, choose(4, which)))


def test_rms_norm_of_bfloat16_has_the_eps_of_torch():
    def fn(z, t):
        return F.rms_norm((0.01 * z).to(torch.bfloat16), (6,)).to(z.dtype)

    primals, tangents = inputs((4, 6))
    close(ROUTE(fn, primals, tangents)[1], exact(fn, primals, tangents), 0.02)


@pytest.mark.skipif(norms.rms_norm_and_scale is None, reason="torch has no such kernel")
@pytest.mark.parametrize("which", [None, "half"])
def test_rms_norm_takes_its_scale_from_the_forward_pass(monkeypatch, which):
    """The value is that of the plain program to the bit, and no scale is formed again."""

    def fn(z, t):
        return F.rms_norm(z * t[:, None], (6,), SQUARE[0], 0.1)

    primals, tangents = inputs((4, 6))
    wanted = exact(fn, primals, tangents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "rms_norm_and_scale", None)
        close(ROUTE(fn, primals, tangents)[1], wanted)
    monkeypatch.setattr(norms, "_scale", None)
    value, derivative = ROUTE(fn, primals, tangents, choose(4, which))
    assert torch.equal(value, fn(*primals))
    close(derivative, masked(wanted, choose(4, which)))


@pytest.mark.parametrize(("shape", "weight"), [((3,), None), ((1,), 1), ((6,), 1), ((2, 4, 6), 6)])
def test_norms_of_shapes_that_do_not_fit_are_refused_as_torch_refuses_them(shape, weight):
    """The kernel that returns 1/rms would take them."""
    if weight is not None:
        weight = torch.ones(weight, dtype=torch.float64)
    primals, tangents = inputs((4, 6))
    with pytest.raises(RuntimeError) as wanted:
        torch.rms_norm(primals[0], shape, weight)
    with pytest.raises(RuntimeError, match=re.escape(str(wanted.value).splitlines()[0])):
        ROUTE(lambda z, t: torch.rms_norm(z, shape, weight), primals, tangents)


@pytest.mark.parametrize("norm", [F.rms_norm, F.layer_norm])
def test_a_subclass_of_tensor_sees_the_norm_that_its_weight_is_of(norm):
    called = []

    class Seen(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            called.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    weight = SQUARE[0].as_subclass(Seen)
    primals, tangents = inputs((4, 6))
    ROUTE(lambda z, t: norm(z, (6,), weight), primals, tangents)
    assert any(func.__name__ == norm.__name__ for func in called)


def test_no_tensor_is_made_when_routes_are_imported():
    """They may be imported late, where a mode keeps tensors without values."""
    code = (
        "from torch._subclasses import FakeTensorMode\n"
        "with FakeTensorMode():\n    import flowspace; flowspace.SharedPrimal"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    "draw", [random.random, lambda: np.random.rand(), lambda: torch.rand(()).item()]
)
def test_a_second_pass_draws_what_the_first_one_drew(draw):
    """Rows that mix need a second pass; the factor is Python's, numpy's or torch's."""
    factors = []

    def fn(z, t):
        factors.append(1 + draw())
        return factors[-1] * (z - z.mean(0)) * t[:, None]

    primals, tangents = inputs((4, 6))
    found = ROUTE(fn, primals, tangents, choose(4, "half"))[1]
    assert len(factors) == 2 and factors[0] == factors[1]
    wanted = exact(lambda z, t: factors[0] * (z - z.mean(0)) * t[:, None], primals, tangents)
    close(found, masked(wanted, choose(4, "half")))


class WritesPart(nn.Module):
    """Writes into a part of a tensor that is in the graph, so that its alias is no leaf."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6).double()

    def forward(self, z, t):
        y = self.layer(z)
        y[:, 0].mul_(3 * t)
        return y.sin()


class WritesWeight(nn.Module):
    """Writes what moves into the memory of a weight, and uses it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6, dtype=torch.float64), requires_grad=False)

    def forward(self, z, t):
        self.scale.copy_(t.mean() * torch.arange(6, dtype=torch.float64))
        return z.sin() * self.scale


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("kind", [WritesPart, WritesWeight])
def test_what_is_written_into_a_part_or_a_weight_is_read_from_there(kind, which):
    check_seeded(kind(), choose(4, which), by_differences, tolerance=1e-8)
