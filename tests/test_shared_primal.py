"""SharedPrimal gives the value of the plain program, its gradient and its forward derivative,
whatever the program is.

Programs are generated: a list of steps on a tensor (B, N, C), each inside frames that lay the
tensor out in another way. The derivative is compared with torch.func.jvp of the whole batch,
masked afterwards, so that a rule which loses track of the rows, or a row that mixes into another
one unseen, shows.
"""

import contextlib
import copy
import math
import random
import re
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, note, settings
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from flowspace import DerivativeError, InputError, SharedPrimal
from flowspace.derivatives import rules
from flowspace.derivatives.rules import dual as duals
from flowspace.derivatives.shared_primal import kinds

ROUTE = SharedPrimal()
DOUBLE = torch.float64


# --- generated programs
# ------------------------------------------------------------------------------------------------


class Draw:
    """What a program draws while it is built: constants, weights and choices, the same at every
    call.
    """

    def __init__(self, seed, weights, axis):
        self.random, self.seed, self.count, self.weights, self.axis = (
            random.Random(seed),
            seed,
            0,
            weights,
            axis,
        )

    def const(self, *shape):
        self.count += 1
        return normal(hash((self.seed, self.count)) % 2**31, *shape)

    def weight(self, *shape):
        self.count += 1
        key = self.seed, self.count, shape
        if key not in self.weights:
            scale = math.sqrt(max(1, shape[-1] if shape else 1))
            self.weights[key] = (
                normal(hash((self.seed, self.count)) % 2**31, *shape) / scale
            ).requires_grad_()
        return self.weights[key]

    def mask(self, *shape):
        return self.const(*shape) > -0.3

    def below(self, count):
        return self.random.randrange(count)

    def one(self, *options):
        return self.random.choice(options)

    def dim(self, x):
        """An axis; seldom the batch, which mixes the rows and costs the program a second pass."""
        options = [i for i in range(x.ndim) if i != self.axis or self.below(8) == 0] or [0]
        chosen = self.one(*options)
        return chosen if self.below(2) else chosen - x.ndim

    def broadcast(self, x):
        """A shape that broadcasts with that of x; it has a batch axis or not."""
        shape = [n if self.below(3) else 1 for n in x.shape]
        return shape[self.below(2) * self.below(x.ndim) :]


STEPS, FRAMES = {}, {}


def steps(group):
    """Register functions of (x, draw) that return a tensor of the same shape."""

    def register(function):
        STEPS.setdefault(group, {})[function.__name__] = function
        return function

    return register


def frame(function):
    """Register a function of (x, draw, inner) that lays x out in another way, calls inner(x,
    axis), and lays it back.
    """
    FRAMES[function.__name__] = function
    return function


# --- frames


@frame
def plain(x, draw, inner):
    return inner(x, draw.axis)


@frame
def permuted(x, draw, inner):
    order = list(range(x.ndim))
    draw.random.shuffle(order)
    back = [order.index(i) for i in range(x.ndim)]
    how = draw.below(4)
    there = (
        x.permute(order)
        if how == 0
        else x.permute(*order)
        if how == 1
        else torch.permute(x, order)
    )
    there = there.contiguous() if draw.below(2) else there
    axis = None if draw.axis is None else back[draw.axis]
    out = inner(there, axis)
    return out.movedim(list(range(x.ndim)), order) if how == 3 else out.permute(back)


@frame
def transposed(x, draw, inner):
    if x.ndim < 2:
        return inner(x, draw.axis)
    i, j = draw.random.sample(range(x.ndim), 2)
    axis = {i: j, j: i}.get(draw.axis, draw.axis)
    swap = draw.one(torch.transpose, torch.swapaxes, torch.Tensor.transpose)
    if {i, j} == {x.ndim - 2, x.ndim - 1} and draw.below(2):
        return inner(x.mT, axis).mT
    return swap(inner(swap(x, i - x.ndim, j), axis), i, j)


@frame
def merged(x, draw, inner):
    if x.ndim < 2:
        return inner(x, draw.axis)
    i = draw.below(x.ndim - 1)
    j = i + 1 + draw.below(x.ndim - 1 - i)
    axis = draw.axis
    if axis is not None and axis > i:
        axis = i if axis <= j else axis - (j - i)
    shape = x.shape
    out = inner(
        x.flatten(i, j) if draw.below(2) else x.reshape(*shape[:i], -1, *shape[j + 1 :]), axis
    )
    return (
        out.unflatten(i, shape[i : j + 1])
        if draw.below(2)
        else out.reshape_as(x)
        if draw.below(2)
        else out.view(shape)
    )


@frame
def refactored(x, draw, inner):
    count, shape = x.numel(), []
    while count > 1 and len(shape) < 4:
        factor = draw.one(*[k for k in range(1, count + 1) if count % k == 0])
        shape.append(factor)
        count //= factor
    shape.append(count)
    batch = None
    if draw.axis is not None and len(set(x.shape)) == x.ndim:
        batch = next((i for i, n in enumerate(shape) if n == x.shape[draw.axis]), None)
    return inner(x.reshape(shape), batch).reshape(x.shape)


@frame
def with_an_axis(x, draw, inner):
    i = draw.below(x.ndim + 1)
    axis = None if draw.axis is None else draw.axis + (i <= draw.axis)
    how = draw.below(3)
    if how == 0:
        return inner(x.unsqueeze(i), axis).squeeze(i)
    if how == 1:
        return inner(x[(slice(None),) * i + (None,)], axis).select(i, 0)
    return inner(
        x[(Ellipsis, *[None] * (i == x.ndim))] if i == x.ndim else x.unsqueeze(i - x.ndim - 1),
        axis,
    ).sum(i)


@frame
def expanded(x, draw, inner):
    out = inner(x.unsqueeze(0).expand(2, *x.shape), None if draw.axis is None else draw.axis + 1)
    return out[0] - out[-1] * 0.5


@frame
def repeated(x, draw, inner):
    dim = draw.dim(x)
    counts = [1 + (i == dim % x.ndim) for i in range(x.ndim)]
    twice = (
        x.repeat(counts)
        if draw.below(2)
        else x.tile(counts)
        if draw.below(2)
        else x.repeat_interleave(2, dim)
    )
    out = inner(twice, draw.axis)
    return out.narrow(dim, 0, x.shape[dim]) if draw.below(2) else out.chunk(2, dim)[1]


@frame
def stacked(x, draw, inner):
    i = draw.below(x.ndim + 1)
    other = x.cos() if draw.below(2) else draw.const(*x.shape)
    parts = [x, other] if draw.below(2) else [other, x]
    axis = None if draw.axis is None else draw.axis + (i <= draw.axis)
    first, second = inner(torch.stack(parts, i), axis).unbind(i)
    return first + 0.3 * second


@frame
def joined(x, draw, inner):
    dim = draw.dim(x)
    shape = list(x.shape)
    shape[dim] = 1 + draw.below(3)
    other = x.cos() if draw.below(2) else draw.const(*shape)
    parts = [x, other] if draw.below(2) else [other, x]
    sizes = [p.shape[dim] for p in parts]
    out = inner(torch.cat(parts, dim) if draw.below(2) else torch.cat(parts, dim=dim), draw.axis)
    found = out.split(sizes, dim)
    return found[parts.index(x) if parts[0] is x else 1]


@frame
def halved(x, draw, inner):
    dim = draw.dim(x)
    if x.shape[dim] % 2:
        return inner(x, draw.axis)
    if draw.below(2):
        first, second = x.chunk(2, dim)
    else:
        first, second = torch.split(x, x.shape[dim] // 2, dim)
    return torch.cat([inner(first, draw.axis), second], dim=dim)


@frame
def padded(x, draw, inner):
    if x.ndim < 2 or draw.axis == x.ndim - 1:
        return inner(x, draw.axis)
    out = inner(F.pad(x, (1, 2), value=0.7), draw.axis)
    return out[..., 1:-2]


@frame
def reordered(x, draw, inner):
    dim = draw.dim(x)
    order = list(range(x.shape[dim]))
    draw.random.shuffle(order)
    order = torch.tensor(order)
    if draw.below(2):
        return inner(x.index_select(dim, order), draw.axis).index_select(dim, order.argsort())
    index = (slice(None),) * (dim % x.ndim)
    return inner(x[(*index, order)], draw.axis)[(*index, order.argsort())]


# --- steps that work element by element


def elementwise(*functions):
    for name, function in functions:
        STEPS.setdefault("elementwise", {})[name] = function


elementwise(
    ("sin", lambda x, draw: torch.sin(x)),
    ("cos", lambda x, draw: x.cos() + x),
    ("exp", lambda x, draw: torch.exp(-x.square())),
    ("silu", lambda x, draw: F.silu(x)),
    ("gelu", lambda x, draw: F.gelu(x, approximate=draw.one("none", "tanh"))),
    ("tanh", lambda x, draw: x.tanh() - 0.3 * x),
    ("sigmoid", lambda x, draw: x * x.sigmoid()),
    ("relu", lambda x, draw: F.relu(x) if draw.below(2) else x.relu()),
    ("leaky", lambda x, draw: F.leaky_relu(x, 0.2) + F.elu(-x)),
    ("softplus", lambda x, draw: F.softplus(x) + F.mish(x)),
    ("abs", lambda x, draw: x.abs() + x.sign()),
    ("neg", lambda x, draw: -x + (2 - x) / 3),
    ("pow", lambda x, draw: x**2 + x.square() * x.pow(3) * 0.1 + 0.7**x),
    ("divide", lambda x, draw: x / (2 + x.cos()) + 1 / (3 + x.sin())),
    ("clamp", lambda x, draw: x.clamp(-0.5, 1) + x.clamp_min(0.2) + torch.maximum(x, -x)),
    ("root", lambda x, draw: torch.sqrt(x**2 + 1) + (x**2 + 1).rsqrt() + torch.log1p(x**2)),
    (
        "alpha",
        lambda x, draw: (
            torch.add(x, x.sin(), alpha=0.3) - torch.sub(draw.const(*x.shape), x, alpha=2)
        ),
    ),
    ("detach", lambda x, draw: x * x.detach() + x.detach().sin()),
    (
        "copies",
        lambda x, draw: (
            x.clone() + x.to(torch.float64) * x.double().contiguous() + torch.zeros_like(x)
        ),
    ),
    (
        "steps",
        lambda x, draw: (
            x * (x > 0.1)
            + x.round()
            + (x * 2).floor() * x
            + (4 * x).to(torch.int64).to(x.dtype) * x
        ),
    ),
    ("item", lambda x, draw: x * len(x) / max(x.shape)),
)


@steps("elementwise")
def shift(x, draw):
    return x + draw.const(*draw.broadcast(x))


@steps("elementwise")
def minus(x, draw):
    return draw.const(*draw.broadcast(x)) - x - draw.const(*draw.broadcast(x))


@steps("elementwise")
def scale(x, draw):
    return x * draw.weight(*draw.broadcast(x)) + draw.const(*draw.broadcast(x)) * x


@steps("elementwise")
def quotient(x, draw):
    return x / (draw.const(*draw.broadcast(x)) ** 2 + 1) + draw.const(*draw.broadcast(x)) / (
        x**2 + 1
    )


@steps("elementwise")
def where(x, draw):
    return torch.where(
        draw.mask(*draw.broadcast(x)), x, draw.const(*draw.broadcast(x))
    ) + torch.where(x > 0, x.sin(), x)


@steps("elementwise")
def masked_fill(x, draw):
    return x.masked_fill(draw.mask(*draw.broadcast(x)), 0.3)


@steps("elementwise")
def lerp(x, draw):
    return torch.lerp(x, draw.const(*x.shape), 0.3) + torch.addcmul(
        x, x, draw.const(*draw.broadcast(x)), value=0.5
    )


@steps("elementwise")
def no_grad(x, draw):
    with torch.no_grad():
        y = x.sin() * draw.const(*draw.broadcast(x))
    return x + y


@steps("elementwise")
def complex_numbers(x, draw):
    c = torch.complex(x, x.sin()) * torch.exp(1j * draw.const(*draw.broadcast(x)))
    return torch.view_as_real(c).sum(-1) + (c * c.conj()).real + c.imag + c.abs()


@steps("elementwise")
def gate(x, draw):
    if draw.axis is None:
        return x
    shape = [n if i == draw.axis else 1 for i, n in enumerate(x.shape)]
    return x * draw.const(*shape) + x.masked_fill(draw.mask(*shape), 0.0)


# --- steps along an axis


@steps("along")
def centre(x, draw):
    return x - x.mean(draw.dim(x), keepdim=True) + x.sum(dim=draw.dim(x), keepdim=True)


@steps("along")
def extremes(x, draw):
    dim = draw.dim(x)
    return (
        x * x.amax(dim, keepdim=True)
        + x.max(dim, keepdim=True).values
        + x.min(dim, keepdim=True)[0] * x
    )


@steps("along")
def spread(x, draw):
    dim = draw.dim(x)
    if x.shape[dim] < 2:
        return x
    variance, mean = torch.var_mean(x, dim, keepdim=True)
    return (x - mean) / (variance + 1).sqrt() + x.std(dim=dim, keepdim=True)


@steps("along")
def norms(x, draw):
    dim = draw.dim(x)
    return (
        x / (x.norm(dim=dim, keepdim=True) + 1)
        + torch.logsumexp(x, dim, keepdim=True)
        + F.normalize(x + 2, dim=dim)
    )


@steps("along")
def softmax(x, draw):
    dim = draw.dim(x)
    return F.softmax(x, dim=dim) + x.softmax(dim) if draw.below(2) else F.log_softmax(x, dim)


@steps("along")
def running(x, draw):
    dim = draw.dim(x)
    return x.cumsum(dim) if draw.below(2) else torch.cumprod(x.cos() + 0.5, dim=dim)


@steps("along")
def rolled(x, draw):
    dim = draw.dim(x)
    return (
        x.roll(1, dim) * x.flip(dim)
        if draw.below(3)
        else torch.roll(x, (1, 2), (dim, draw.dim(x)))
    )


@steps("along")
def ordered(x, draw):
    dim = draw.dim(x)
    return x.sort(dim).values + x.topk(1, dim).values


@steps("along")
def differences(x, draw):
    dim = draw.dim(x)
    return torch.cat([x.narrow(dim, 0, 1), x.diff(dim=dim)], dim)


@steps("along")
def gathered(x, draw):
    dim = draw.dim(x)
    index = torch.randint(
        x.shape[dim], x.shape, generator=torch.Generator().manual_seed(draw.seed)
    )
    return x.gather(dim, index)


@steps("along")
def indexed(x, draw):
    dim = draw.dim(x) % x.ndim
    head = (slice(None),) * dim
    count = x.shape[dim]
    first, last = x[(*head, slice(0, 1))], x[(*head, -1)].unsqueeze(dim)
    picked = x[(*head, torch.arange(count).flip(0))] * x[(*head, [0] * count)]
    masked = x[(*head, torch.arange(count) < 1)]
    tail = x[(Ellipsis, *[slice(None)] * (x.ndim - 1 - dim))] if draw.below(2) else x[...]
    return picked + first * last + masked + x[(*head, None)].squeeze(dim) + tail


@steps("along")
def unbound(x, draw):
    dim = draw.dim(x)
    parts = x.unbind(dim)
    return torch.stack([parts[-1], *parts[:-1]], dim) + torch.stack(
        [p * i for i, p in enumerate(parts)], dim=dim
    )


@steps("along")
def pieces(x, draw):
    dim = draw.dim(x)
    sizes = [1, x.shape[dim] - 1]
    first, rest = x.split(sizes, dim)
    return torch.cat([rest.sin(), first], dim) + torch.cat(torch.tensor_split(x, 2, dim), dim)


@steps("along")
def rotary(x, draw):
    dim = draw.dim(x)
    if x.shape[dim] % 2:
        return x
    first, second = x.chunk(2, dim)
    angle = draw.const(*first.shape[-1:])
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()],
        dim,
    )


@steps("along")
def fourier(x, draw):
    dim = draw.dim(x)
    spectrum = torch.fft.rfft(x, dim=dim, norm="ortho")
    return torch.fft.irfft(
        spectrum * draw.const(*spectrum.shape[-1:]), n=x.shape[dim], dim=dim, norm="ortho"
    )


# --- steps that mix features


@steps("mixing")
def linear(x, draw):
    width = x.shape[-1]
    return F.linear(x, draw.weight(width, width), draw.weight(width))


@steps("mixing")
def product(x, draw):
    width = x.shape[-1]
    return (
        x @ draw.weight(width, width)
        if draw.below(2)
        else torch.matmul(x, draw.const(width)).unsqueeze(-1) * x
    )


@steps("mixing")
def left_product(x, draw):
    if x.ndim < 2:
        return x
    count = x.shape[-2]
    return draw.weight(count, count) @ x


@steps("mixing")
def self_product(x, draw):
    return x @ x.mT @ x / x.shape[-1] if x.ndim > 1 else x


@steps("mixing")
def batched_product(x, draw):
    if x.ndim < 3:
        return x
    lead = [n if draw.below(2) else 1 for n in x.shape[:-2]]
    width = x.shape[-1]
    return x @ draw.const(*lead, width, width)


@steps("mixing")
def bmm(x, draw):
    if x.ndim != 3:
        return x
    scores = torch.baddbmm(
        draw.const(*x.shape[:2], x.shape[1]), x, x.mT, beta=draw.one(0, 1), alpha=0.3
    )
    return torch.bmm(scores, x) + torch.bmm(x, draw.const(len(x), x.shape[2], x.shape[2]))


@steps("mixing")
def addmm(x, draw):
    if x.ndim != 2:
        return x
    width = x.shape[1]
    return torch.addmm(draw.weight(width), x, draw.weight(width, width), alpha=0.5) + torch.mm(
        x, draw.const(width, width)
    )


@steps("mixing")
def einsum(x, draw):
    if x.ndim > 4:
        return x
    names = "abcd"[: x.ndim]
    out = list(names)
    draw.random.shuffle(out)
    out = "".join(out)
    width = x.shape[-1]
    last = names[-1]
    other = torch.einsum(f"{names},{last}z->{names[:-1]}z", x, draw.weight(width, width))
    fixed = draw.const(*[x.shape[names.index(n)] for n in out])
    turned = torch.einsum(f"{names},{names}->{out}", x, other)
    return torch.einsum(f"{out},{out}->{names}", turned, fixed)


@steps("mixing")
def einsum_of_two(x, draw):
    if x.ndim != 3:
        return x
    scores = torch.einsum("bnc,bmc->bnm", x, x.sin())
    return torch.einsum("bnm, bmc -> bnc", scores, x) / x.shape[1]


@steps("mixing")
def layer_norm(x, draw):
    shape = x.shape[-1 - draw.below(min(2, x.ndim)) :]
    weight, bias = (draw.weight(*shape), draw.weight(*shape)) if draw.below(2) else (None, None)
    return F.layer_norm(x, shape, weight, bias, 1e-3)


@steps("mixing")
def rms_norm(x, draw):
    shape = x.shape[-1 - draw.below(min(2, x.ndim)) :]
    return F.rms_norm(x, shape, draw.weight(*shape) if draw.below(2) else None, 1e-3)


@steps("mixing")
def group_norm(x, draw):
    if x.ndim < 2 or math.prod(x.shape[2:]) * x.shape[1] < 2:
        return x
    channels = x.shape[1]
    groups = draw.one(*[g for g in range(1, channels + 1) if channels % g == 0])
    if channels // groups * math.prod(x.shape[2:]) < 2:
        groups = 1
    return F.group_norm(x, groups, draw.weight(channels), draw.weight(channels), 1e-3)


@steps("mixing")
def batch_norm(x, draw):
    if not 2 <= x.ndim <= 5 or len(x) * math.prod(x.shape[2:]) < 2:
        return x
    channels = x.shape[1]
    running = draw.const(channels), draw.const(channels) ** 2
    train = draw.below(4) == 0
    return F.batch_norm(
        x, *((None, None) if train else running), draw.weight(channels), None, train, 0.1, 1e-2
    )


@steps("mixing")
def attention(x, draw):
    if x.ndim < 2:
        return x
    tokens = x.shape[-2]
    options = {"scale": draw.one(None, 0.7)}
    kind = draw.below(4)
    if kind == 1:
        options["is_causal"] = True
    elif kind == 2:
        options["attn_mask"] = draw.mask(
            *[n if draw.below(2) else 1 for n in x.shape[:-2]], tokens, tokens
        )
    elif kind == 3:
        options["attn_mask"] = draw.const(tokens, tokens)
    q, k, v = (
        (x, x.sin(), x.cos())
        if draw.below(2)
        else F.linear(x, draw.weight(3 * x.shape[-1], x.shape[-1])).chunk(3, -1)
    )
    k = draw.const(*x.shape) if draw.below(4) == 0 else k
    v = draw.const(*x.shape) if draw.below(4) == 0 else v
    if not any(part is not x for part in (k, v)) or x.ndim > 5:
        return x
    return F.scaled_dot_product_attention(q, k, v, **options)


@steps("mixing")
def heads(x, draw):
    if x.ndim != 3:
        return x
    rows, tokens, width = x.shape
    qkv = F.linear(x, draw.weight(12, width)).reshape(rows, tokens, 3, 2, 2).permute(2, 0, 3, 1, 4)
    mask = draw.mask(rows, 1, 1, tokens) if draw.below(2) else None
    out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask)
    return x + F.linear(out.transpose(1, 2).reshape(rows, tokens, 4), draw.weight(width, 4))


@steps("mixing")
def grouped_heads(x, draw):
    if x.ndim != 3:
        return x
    rows, tokens, width = x.shape
    q = F.linear(x, draw.weight(8, width)).view(rows, tokens, 4, 2).transpose(1, 2)
    k, v = (
        F.linear(x, draw.weight(8, width))
        .view(rows, tokens, 2, 2, 2)
        .permute(2, 0, 3, 1, 4)
        .unbind(0)
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=draw.below(2) == 0, enable_gqa=True)
    return x + F.linear(out.transpose(1, 2).flatten(2), draw.weight(width, 8))


@steps("mixing")
def convolution(x, draw):
    if x.ndim not in (3, 4):
        return x
    channels, ones = x.shape[1], [3] * (x.ndim - 2)
    conv = F.conv1d if x.ndim == 3 else F.conv2d
    found = conv(x, draw.weight(channels, channels, *ones), draw.weight(channels), padding=1)
    return found + conv(x, draw.weight(channels, 1, *ones), padding=1, groups=channels)


@steps("mixing")
def transposed_convolution(x, draw):
    if x.ndim != 4:
        return x
    channels = x.shape[1]
    return F.conv_transpose2d(x, draw.weight(channels, channels, 3, 3), padding=1)


@steps("mixing")
def pooling(x, draw):
    if x.ndim == 3:
        return F.avg_pool1d(x, 3, 1, 1) + F.max_pool1d(x, 3, 1, 1) + F.adaptive_avg_pool1d(x, 1)
    if x.ndim == 4:
        return (
            F.avg_pool2d(x, 3, 1, 1) + F.max_pool2d(x, 3, 1, 1) + F.adaptive_avg_pool2d(x, (1, 1))
        )
    return x


@steps("mixing")
def resized(x, draw):
    if x.ndim == 3:
        return F.interpolate(x, scale_factor=2.0)[..., ::2] + F.interpolate(
            x, x.shape[-1], mode="linear"
        )
    if x.ndim == 4:
        return F.interpolate(
            F.interpolate(x, scale_factor=2.0, mode="bilinear"), x.shape[2:], mode="nearest"
        )
    return x


@steps("mixing")
def shuffled(x, draw):
    if x.ndim != 4 or x.shape[1] % 4:
        return x
    return F.pixel_unshuffle(F.pixel_shuffle(x, 2).sin(), 2)


@steps("mixing")
def patches(x, draw):
    if x.ndim != 4:
        return x
    unfolded = F.unfold(x, 3, padding=1)
    return F.fold(unfolded.sin(), x.shape[2:], 3, padding=1)


@steps("mixing")
def labels(x, draw):
    if draw.axis is None:
        return x
    table = draw.weight(5, x.shape[-1])
    index = torch.arange(x.shape[draw.axis]) % 5
    if draw.axis == x.ndim - 1:
        return x
    return x * F.embedding(index, table).reshape(
        x.shape[draw.axis], *[1] * (x.ndim - draw.axis - 2), x.shape[-1]
    )


@steps("mixing")
def prelu(x, draw):
    return F.prelu(x, draw.weight(x.shape[1] if x.ndim > 1 and draw.below(2) else 1))


# --- steps that write


@steps("writing")
def arithmetic_in_place(x, draw):
    y = x.sin() + x
    y += draw.const(*x.shape)
    y *= x
    y.sub_(x.cos()).mul_(0.5)
    y -= draw.const(*x.shape[-1:])
    y /= 2 + x.detach().abs()
    return y


@steps("writing")
def functions_in_place(x, draw):
    y = (x + 0.1).clamp_(-0.9, 0.8).masked_fill_(draw.mask(*x.shape), 0.2)
    return y + (2 * x).tanh_() + F.relu(x * 2, inplace=True)


@steps("writing")
def through_a_view(x, draw):
    y = x * 2
    view = y.narrow(draw.dim(x), 0, 1)
    before = y.clone()
    view.mul_(0.3).add_(1.0)
    other = y.flatten() if draw.below(2) else y[-1:]
    other[0] += 2.0
    return y + before * view


@steps("writing")
def under_a_view(x, draw):
    y = x * 2
    dim = draw.dim(x)
    view, rest = y.narrow(dim, 0, 1), y.narrow(dim, x.shape[dim] - 1, 1)
    y.mul_(x.detach())
    y.add_(1.0)
    return y * view.sin() + rest


@steps("writing")
def assignment(x, draw):
    y = x * 2
    dim = draw.dim(x) % x.ndim
    head = (slice(None),) * dim
    y[(*head, 0)] = x[(*head, -1)].sin()
    y[..., -1] = 0.4
    y[draw.mask(*x.shape)] = 0.3
    y[(*head, slice(0, 1))] *= 2
    return y


@steps("writing")
def fresh_buffer(x, draw):
    y = draw.one(
        torch.zeros_like,
        torch.empty_like,
        lambda x: x.new_zeros(x.shape),
        lambda x: torch.zeros(*x.shape).double(),
    )(x)
    dim = draw.dim(x) % x.ndim
    head = (slice(None),) * dim
    y[...] = 1.0
    y[(*head, slice(1, None))] = x[(*head, slice(0, -1))]
    y[(*head, slice(0, 1))] = x[(*head, slice(-1, None))] * 2
    return y + x


@steps("writing")
def copied_into_a_buffer(x, draw):
    y = torch.empty(x.shape, dtype=x.dtype)
    y.copy_(x.sin())
    z = torch.zeros(x.shape, dtype=x.dtype).add_(x).mul_(y)
    return y + z


@steps("writing")
def indexed_writes(x, draw):
    dim = draw.dim(x)
    index = torch.arange(x.shape[dim]).flip(0)
    y = x.index_add(dim, index, x.sin()) + x.index_copy(dim, index, x.cos())
    z = torch.zeros_like(x).index_add_(dim, index, x)
    where = torch.zeros(x.shape, dtype=torch.int64)
    return y + z + torch.zeros_like(x).scatter_add_(dim, where, x).scatter(dim, where, x)


# --- the whole program


def rescaled(x):
    """Keep numbers of order one, by a constant that says nothing about rows."""
    return x / x.detach().abs().max().clamp_min(1.0)


@dataclass
class Program:
    """A function of z of shape (B, N, C) and t of shape (B,), as a list of (frames, group, step,
    seed); bare: unscaled.
    """

    shape: tuple
    plan: tuple
    bare: bool = False
    weights: dict = field(default_factory=dict, repr=False)

    def step(self, x, axis, frames, group, name, seed):
        draw = Draw(seed, self.weights, axis)
        if not frames:
            return STEPS[group][name](x, draw)
        return FRAMES[frames[0]](
            x, draw, lambda y, at: self.step(y, at, frames[1:], group, name, seed + 1)
        )

    def __call__(self, z, t):
        h = z + 0.1 * t.sin()[:, None, None]
        for i, (frames, group, name, seed) in enumerate(self.plan):
            h = self.step(
                rescaled(h * (1 + t)[:, None, None]) if i else h, 0, frames, group, name, seed
            )
        return h if self.bare else rescaled(h)


def drawn(seed, names, most=1, bare=False):
    """A program of these steps with its inputs and its mask; every choice is as likely as any
    other.
    """
    pick = random.Random(seed)
    shape = pick.choice([2, 3, 4, 6]), pick.choice([1, 2, 3, 4]), pick.choice([2, 3, 4, 6])
    frames = [
        tuple(pick.choices(sorted(FRAMES), k=pick.randrange(3)))
        for _ in range(1 + pick.randrange(most))
    ]
    program = Program(
        shape, tuple((lays, *pick.choice(names), pick.randrange(10**6)) for lays in frames), bare
    )
    note(f"{program}")
    program(*inputs(shape)[0])  # which makes its weights
    return (
        program,
        *inputs(shape, pick.randrange(10**6)),
        choose(shape[0], pick.choice([*WHICH, "one", "half"])),
    )


def choose(rows, which):
    """A mask of all, one, half or none of the rows; None is no mask."""
    masks = {
        "all": lambda i: True,
        "one": lambda i: i == rows - 1,
        "half": lambda i: i % 2 == 0,
        "none": lambda i: False,
    }
    return None if which is None else torch.tensor([masks[which](i) for i in range(rows)])


WHICH = [None, "all", "one", "half", "none"]


def inputs(shape, seed=0, dtype=DOUBLE):
    t = torch.linspace(0.1, 0.9, shape[0], dtype=dtype)
    return (normal(seed, *shape).to(dtype), t), (
        normal(seed + 1, *shape).to(dtype),
        torch.ones_like(t),
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


def close(found, wanted, tolerance=1e-11):
    size = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(
        found, wanted, rtol=0, atol=tolerance * max(1.0, size), equal_nan=True
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
@pytest.mark.parametrize("elements", [1, 100 * 64 * 3, 1 << 20])
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
    def fn(z, t):
        mask = torch.func.vmap(torch.cos)(normal(1, 4, 6)) + torch.func.grad(
            lambda x: x.sum() ** 2
        )(normal(2, 6))
        return z * mask * t[:, None]

    assert check_seeded(fn, choose(4, which)) == 1


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
        lambda z, t: torch.cdist(z[:, None], z[:, None] * 2)[:, 0],
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


def data_assigned(z, t):
    y = torch.zeros_like(z)
    y.data = z * 2
    return y * z


def part_of_what_is_detached(z, t):
    y = z * 2
    y[:, 0:1] *= 3
    return y[:, :3] * y.detach()[:, :3]


def conjugate_of_what_is_written(z, t):
    a = torch.complex(z, z.sin())
    c = a.conj()
    a.mul_(2 + 1j)
    return (c * c).imag + c.real


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
    "a conjugate of what is written": (conjugate_of_what_is_written, exact),
    "torch.Tensor of a tensor": (lambda z, t: torch.Tensor(z.float() * 2) * z, exact),
    "as_subclass": (lambda z, t: (z * 2).as_subclass(torch.Tensor) * z, exact),
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


STILL = (
    "the real part assigned",
    "a part of what is detached, after a write",
    "a conjugate of what is written",
    "torch.Tensor of a tensor",
    "as_subclass",
)
WRONG = pytest.mark.xfail(strict=True, reason="known fault")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=WRONG if name in STILL else ()) for name in FAULTS]
)
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
}
RUNNING_WRONGLY = {
    "assignment": by_assignment,
    "foreach": lambda net, z: torch._foreach_add_([net.mean], [z.detach().mean(0)]),
}
KNOWN = pytest.mark.xfail(
    strict=True, reason="known fault: of what is not seen to be written there is no memory"
)


@pytest.mark.parametrize(
    "name", [*RUNNING, *(pytest.param(name, marks=KNOWN) for name in RUNNING_WRONGLY)]
)
def test_a_running_mean_that_the_model_writes_takes_one_step_and_the_derivative_is_at_that_step(
    name,
):
    add, (primals, tangents) = {**RUNNING, **RUNNING_WRONGLY}[name], inputs((4, 6))
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
