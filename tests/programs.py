"""Random programs, on which a derivative is compared with torch's own.

What a program is. A function of a batch z of shape (B, N, C) and times t of shape (B,), as a list
of steps. A *step* is a function of (x, draw) that returns a tensor of x's shape: a sine, a
product, attention, a write into a view. A *frame* lays the tensor out in another way, calls what
is inside it on that layout, and lays the result back: permuted, merged, padded, stacked with
another tensor. Each step stands within zero, one or two frames, so that a step meets its axes in
every order and its batch in every place, and the derivative has to follow the rows there. Between
steps the numbers are multiplied by (1 + t) and scaled to order one.

How one is generated. `drawn(seed, names)` picks the shape, the number of steps, their frames, the
inputs, the tangents and the mask of rows, all from the seed. What a step decides while it runs
(which axis, which variant, which constants) it asks of its `Draw`, which has a seed of its own and
answers the same at every call: a program is a function, and a failing one is made again from what
hypothesis prints. An axis is seldom the batch: a step along it mixes the rows, and is then to cost
one evaluation more and to stay right. `Draw.axis` is where the batch lies within the frames, or
None where it was merged with another axis.

What is compared. `comparison.check` runs a program plainly and through a route, and asks for the
same value, the same gradient of every weight, the same random state afterwards, and the derivative
of `torch.func.jvp` of the whole batch, masked afterwards: so a rule that loses track of the rows,
or a row that mixes into another one unseen, shows. The laws are in test_shared_primal.py.

How to add an operation. Write a step in the group that it belongs to (``elementwise``, ``along``
an axis, ``mixing`` features, ``writing`` into memory) and return x where the layout does not suit:

    @steps("along")
    def halved_sum(x, draw):
        return x - x.sum(draw.dim(x), keepdim=True) / 2

It is then tested by itself in any frame and in mixture with all others; nothing else is to be
listed. The result must be smooth enough for a derivative almost everywhere, of x's shape and
dtype, and of order one where x is. A frame is added likewise, under ``@frame``; it says where the
batch lies inside it.
"""

import math
import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hypothesis import note
from strategies import normal

DOUBLE = torch.float64


class Draw:
    """What a step draws: constants, weights and choices, the same at every call.

    Attributes:
        random: the source of choices.
        axis: where the batch lies, or None.
    """

    def __init__(self, seed, weights, axis):
        self.random = random.Random(seed)
        self.seed = seed
        self.count = 0
        self.weights = weights
        self.axis = axis

    def const(self, *shape):
        """Normal numbers, others at each call of one step."""
        self.count += 1
        return normal(hash((self.seed, self.count)) % 2**31, *shape)

    def weight(self, *shape):
        """A leaf that learns: made when it is first asked for, and kept by the program."""
        numbers = self.const(*shape)
        key = self.seed, self.count, shape
        if key not in self.weights:
            width = 1
            if shape:
                width = max(1, shape[-1])
            self.weights[key] = (numbers / math.sqrt(width)).requires_grad_()
        return self.weights[key]

    def mask(self, *shape):
        """True in six of ten places."""
        return self.const(*shape) > -0.3

    def below(self, count):
        """A whole number from 0 to below the count."""
        return self.random.randrange(count)

    def one(self, *options):
        """One of the options."""
        return self.random.choice(options)

    def dim(self, x):
        """An axis; seldom the batch, which mixes the rows and costs the program a second pass."""
        options = [i for i in range(x.ndim) if i != self.axis or self.below(8) == 0]
        chosen = self.one(*(options or [0]))
        if self.below(2):
            return chosen
        return chosen - x.ndim

    def broadcast(self, x):
        """A shape that broadcasts with that of x; it has a batch axis or not."""
        shape = [n if self.below(3) else 1 for n in x.shape]
        return shape[self.below(2) * self.below(x.ndim) :]

    def axis_after(self, i):
        """Where the batch lies once an axis is put before axis i."""
        if self.axis is None:
            return None
        return self.axis + (i <= self.axis)


STEPS, FRAMES = {}, {}
WHICH = [None, "all", "one", "half", "none"]
"""Which rows the derivative is asked for, as `choose` takes it."""


def steps(group):
    """Register a function of (x, draw) that returns a tensor of x's shape."""

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


def beside(x, shape, draw):
    """x with another tensor, that moves as x does or is a constant of this shape; either first."""
    other = x.cos() if draw.below(2) else draw.const(*shape)
    if draw.below(2):
        return [x, other]
    return [other, x]


@frame
def plain(x, draw, inner):
    return inner(x, draw.axis)


@frame
def permuted(x, draw, inner):
    order = list(range(x.ndim))
    draw.random.shuffle(order)
    back = [order.index(i) for i in range(x.ndim)]
    how = draw.below(4)
    if how == 0:
        there = x.permute(order)
    elif how == 1:
        there = x.permute(*order)
    else:
        there = torch.permute(x, order)
    if draw.below(2):
        there = there.contiguous()
    axis = None
    if draw.axis is not None:
        axis = back[draw.axis]
    out = inner(there, axis)
    if how == 3:
        return out.movedim(list(range(x.ndim)), order)
    return out.permute(back)


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
    """Axes i to j become one."""
    if x.ndim < 2:
        return inner(x, draw.axis)
    i = draw.below(x.ndim - 1)
    j = i + 1 + draw.below(x.ndim - 1 - i)
    axis, shape = draw.axis, x.shape
    if axis is not None and axis > j:
        axis -= j - i
    elif axis is not None and axis > i:
        axis = i
    if draw.below(2):
        flat = x.flatten(i, j)
    else:
        flat = x.reshape(*shape[:i], -1, *shape[j + 1 :])
    out = inner(flat, axis)
    if draw.below(2):
        return out.unflatten(i, shape[i : j + 1])
    if draw.below(2):
        return out.reshape_as(x)
    return out.view(shape)


@frame
def refactored(x, draw, inner):
    """The same numbers in any other shape, in which the batch may be an axis still or not."""
    count, shape = x.numel(), []
    while count > 1 and len(shape) < 4:
        divisors = [k for k in range(1, count + 1) if count % k == 0]
        factor = draw.one(*divisors)
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
    axis = draw.axis_after(i)
    how = draw.below(3)
    if how == 0:
        return inner(x.unsqueeze(i), axis).squeeze(i)
    if how == 1:
        return inner(x[(slice(None),) * i + (None,)], axis).select(i, 0)
    if i == x.ndim:
        return inner(x[..., None], axis).sum(i)
    return inner(x.unsqueeze(i - x.ndim - 1), axis).sum(i)


@frame
def expanded(x, draw, inner):
    out = inner(x.unsqueeze(0).expand(2, *x.shape), draw.axis_after(0))
    return out[0] - out[-1] * 0.5


@frame
def repeated(x, draw, inner):
    dim = draw.dim(x)
    counts = [1 + (i == dim % x.ndim) for i in range(x.ndim)]
    if draw.below(2):
        twice = x.repeat(counts)
    elif draw.below(2):
        twice = x.tile(counts)
    else:
        twice = x.repeat_interleave(2, dim)
    out = inner(twice, draw.axis)
    if draw.below(2):
        return out.narrow(dim, 0, x.shape[dim])
    return out.chunk(2, dim)[1]


@frame
def stacked(x, draw, inner):
    i = draw.below(x.ndim + 1)
    parts = beside(x, x.shape, draw)
    first, second = inner(torch.stack(parts, i), draw.axis_after(i)).unbind(i)
    return first + 0.3 * second


@frame
def joined(x, draw, inner):
    dim = draw.dim(x)
    shape = list(x.shape)
    shape[dim] = 1 + draw.below(3)
    parts = beside(x, shape, draw)
    sizes = [part.shape[dim] for part in parts]
    if draw.below(2):
        both = torch.cat(parts, dim)
    else:
        both = torch.cat(parts, dim=dim)
    pieces = inner(both, draw.axis).split(sizes, dim)
    if parts[0] is x:
        return pieces[0]
    return pieces[1]


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
    below = x / (draw.const(*draw.broadcast(x)) ** 2 + 1)
    return below + draw.const(*draw.broadcast(x)) / (x**2 + 1)


@steps("elementwise")
def where(x, draw):
    chosen = torch.where(draw.mask(*draw.broadcast(x)), x, draw.const(*draw.broadcast(x)))
    return chosen + torch.where(x > 0, x.sin(), x)


@steps("elementwise")
def masked_fill(x, draw):
    return x.masked_fill(draw.mask(*draw.broadcast(x)), 0.3)


@steps("elementwise")
def lerp(x, draw):
    between = torch.lerp(x, draw.const(*x.shape), 0.3)
    return between + torch.addcmul(x, x, draw.const(*draw.broadcast(x)), value=0.5)


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
    highest = x.max(dim, keepdim=True).values
    lowest = x.min(dim, keepdim=True)[0]
    return x * x.amax(dim, keepdim=True) + highest + lowest * x


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
    by_norm = x / (x.norm(dim=dim, keepdim=True) + 1)
    return by_norm + torch.logsumexp(x, dim, keepdim=True) + F.normalize(x + 2, dim=dim)


@steps("along")
def softmax(x, draw):
    dim = draw.dim(x)
    if draw.below(2):
        return F.softmax(x, dim=dim) + x.softmax(dim)
    return F.log_softmax(x, dim)


@steps("along")
def running(x, draw):
    dim = draw.dim(x)
    if draw.below(2):
        return x.cumsum(dim)
    return torch.cumprod(x.cos() + 0.5, dim=dim)


@steps("along")
def rolled(x, draw):
    dim = draw.dim(x)
    if draw.below(3):
        return x.roll(1, dim) * x.flip(dim)
    return torch.roll(x, (1, 2), (dim, draw.dim(x)))


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
    source = torch.Generator().manual_seed(draw.seed)
    return x.gather(dim, torch.randint(x.shape[dim], x.shape, generator=source))


@steps("along")
def indexed(x, draw):
    dim = draw.dim(x) % x.ndim
    head = (slice(None),) * dim
    count = x.shape[dim]
    first, last = x[(*head, slice(0, 1))], x[(*head, -1)].unsqueeze(dim)
    picked = x[(*head, torch.arange(count).flip(0))] * x[(*head, [0] * count)]
    masked = x[(*head, torch.arange(count) < 1)]
    tail = x[...]
    if draw.below(2):
        tail = x[(Ellipsis, *[slice(None)] * (x.ndim - 1 - dim))]
    return picked + first * last + masked + x[(*head, None)].squeeze(dim) + tail


@steps("along")
def unbound(x, draw):
    dim = draw.dim(x)
    parts = x.unbind(dim)
    turned = torch.stack([parts[-1], *parts[:-1]], dim)
    return turned + torch.stack([part * i for i, part in enumerate(parts)], dim=dim)


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
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim)


@steps("along")
def fourier(x, draw):
    dim = draw.dim(x)
    spectrum = torch.fft.rfft(x, dim=dim, norm="ortho")
    filtered = spectrum * draw.const(*spectrum.shape[-1:])
    return torch.fft.irfft(filtered, n=x.shape[dim], dim=dim, norm="ortho")


# --- steps that mix features


@steps("mixing")
def linear(x, draw):
    width = x.shape[-1]
    return F.linear(x, draw.weight(width, width), draw.weight(width))


@steps("mixing")
def product(x, draw):
    width = x.shape[-1]
    if draw.below(2):
        return x @ draw.weight(width, width)
    return torch.matmul(x, draw.const(width)).unsqueeze(-1) * x


@steps("mixing")
def left_product(x, draw):
    if x.ndim < 2:
        return x
    count = x.shape[-2]
    return draw.weight(count, count) @ x


@steps("mixing")
def self_product(x, draw):
    if x.ndim < 2:
        return x
    return x @ x.mT @ x / x.shape[-1]


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
    rows, count, width = x.shape
    bias = draw.const(rows, count, count)
    scores = torch.baddbmm(bias, x, x.mT, beta=draw.one(0, 1), alpha=0.3)
    return torch.bmm(scores, x) + torch.bmm(x, draw.const(rows, width, width))


@steps("mixing")
def addmm(x, draw):
    if x.ndim != 2:
        return x
    width = x.shape[1]
    added = torch.addmm(draw.weight(width), x, draw.weight(width, width), alpha=0.5)
    return added + torch.mm(x, draw.const(width, width))


@steps("mixing")
def einsum(x, draw):
    if x.ndim > 4:
        return x
    names = "abcd"[: x.ndim]
    order = list(names)
    draw.random.shuffle(order)
    out = "".join(order)
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
    weight = bias = None
    if draw.below(2):
        weight, bias = draw.weight(*shape), draw.weight(*shape)
    return F.layer_norm(x, shape, weight, bias, 1e-3)


@steps("mixing")
def rms_norm(x, draw):
    shape = x.shape[-1 - draw.below(min(2, x.ndim)) :]
    weight = None
    if draw.below(2):
        weight = draw.weight(*shape)
    return F.rms_norm(x, shape, weight, 1e-3)


@steps("mixing")
def group_norm(x, draw):
    if x.ndim < 2 or math.prod(x.shape[1:]) < 2:
        return x
    channels, places = x.shape[1], math.prod(x.shape[2:])
    divisors = [g for g in range(1, channels + 1) if channels % g == 0]
    groups = draw.one(*divisors)
    if channels // groups * places < 2:
        groups = 1
    return F.group_norm(x, groups, draw.weight(channels), draw.weight(channels), 1e-3)


@steps("mixing")
def batch_norm(x, draw):
    if not 2 <= x.ndim <= 5 or len(x) * math.prod(x.shape[2:]) < 2:
        return x
    channels = x.shape[1]
    mean, variance = draw.const(channels), draw.const(channels) ** 2
    train = draw.below(4) == 0
    if train:
        mean = variance = None
    return F.batch_norm(x, mean, variance, draw.weight(channels), None, train, 0.1, 1e-2)


@steps("mixing")
def attention(x, draw):
    if x.ndim < 2:
        return x
    tokens, width = x.shape[-2:]
    options = {"scale": draw.one(None, 0.7)}
    kind = draw.below(4)
    if kind == 1:
        options["is_causal"] = True
    elif kind == 2:
        lead = [n if draw.below(2) else 1 for n in x.shape[:-2]]
        options["attn_mask"] = draw.mask(*lead, tokens, tokens)
    elif kind == 3:
        options["attn_mask"] = draw.const(tokens, tokens)
    if draw.below(2):
        q, k, v = x, x.sin(), x.cos()
    else:
        q, k, v = F.linear(x, draw.weight(3 * width, width)).chunk(3, -1)
    if draw.below(4) == 0:
        k = draw.const(*x.shape)
    if draw.below(4) == 0:
        v = draw.const(*x.shape)
    if x.ndim > 5:
        return x
    return F.scaled_dot_product_attention(q, k, v, **options)


@steps("mixing")
def heads(x, draw):
    """Two heads of width two, as vision transformers write them."""
    if x.ndim != 3:
        return x
    rows, tokens, width = x.shape
    qkv = F.linear(x, draw.weight(12, width)).reshape(rows, tokens, 3, 2, 2).permute(2, 0, 3, 1, 4)
    mask = None
    if draw.below(2):
        mask = draw.mask(rows, 1, 1, tokens)
    out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask)
    return x + F.linear(out.transpose(1, 2).reshape(rows, tokens, 4), draw.weight(width, 4))


@steps("mixing")
def grouped_heads(x, draw):
    """Four heads of queries that share two of keys and values."""
    if x.ndim != 3:
        return x
    rows, tokens, width = x.shape
    q = F.linear(x, draw.weight(8, width)).view(rows, tokens, 4, 2).transpose(1, 2)
    kv = F.linear(x, draw.weight(8, width)).view(rows, tokens, 2, 2, 2)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=draw.below(2) == 0, enable_gqa=True)
    return x + F.linear(out.transpose(1, 2).flatten(2), draw.weight(width, 8))


@steps("mixing")
def convolution(x, draw):
    if x.ndim not in (3, 4):
        return x
    channels, kernel = x.shape[1], [3] * (x.ndim - 2)
    conv = F.conv2d
    if x.ndim == 3:
        conv = F.conv1d
    full = conv(x, draw.weight(channels, channels, *kernel), draw.weight(channels), padding=1)
    return full + conv(x, draw.weight(channels, 1, *kernel), padding=1, groups=channels)


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
    if x.ndim != 4:
        return x
    whole = F.adaptive_avg_pool2d(x, (1, 1))
    return F.avg_pool2d(x, 3, 1, 1) + F.max_pool2d(x, 3, 1, 1) + whole


@steps("mixing")
def resized(x, draw):
    if x.ndim == 3:
        same = F.interpolate(x, x.shape[-1], mode="linear")
        return F.interpolate(x, scale_factor=2.0)[..., ::2] + same
    if x.ndim != 4:
        return x
    twice = F.interpolate(x, scale_factor=2.0, mode="bilinear")
    return F.interpolate(twice, x.shape[2:], mode="nearest")


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
    """A table of vectors, looked up for each row."""
    if draw.axis is None:
        return x
    rows, width = x.shape[draw.axis], x.shape[-1]
    table = draw.weight(5, width)
    if draw.axis == x.ndim - 1:
        return x
    looked_up = F.embedding(torch.arange(rows) % 5, table)
    ones = [1] * (x.ndim - draw.axis - 2)
    return x * looked_up.reshape(rows, *ones, width)


@steps("mixing")
def prelu(x, draw):
    count = 1
    if x.ndim > 1 and draw.below(2):
        count = x.shape[1]
    return F.prelu(x, draw.weight(count))


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
    other = y[-1:]
    if draw.below(2):
        other = y.flatten()
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
    """A function of z of shape (B, N, C) and t of shape (B,).

    Attributes:
        shape: that of z.
        plan: the steps in their order, each as (frames, group, step, seed).
        bare: whether the result is left unscaled.
        weights: what the steps have asked for, to be learned.
    """

    shape: tuple
    plan: tuple
    bare: bool = False
    weights: dict = field(default_factory=dict, repr=False)

    def step(self, x, axis, frames, group, name, seed):
        """The step within its frames, the first of them outermost."""
        draw = Draw(seed, self.weights, axis)
        if not frames:
            return STEPS[group][name](x, draw)

        def inner(y, at):
            return self.step(y, at, frames[1:], group, name, seed + 1)

        return FRAMES[frames[0]](x, draw, inner)

    def __call__(self, z, t):
        h = z + 0.1 * t.sin()[:, None, None]
        for i, (frames, group, name, seed) in enumerate(self.plan):
            if i:
                h = rescaled(h * (1 + t)[:, None, None])
            h = self.step(h, 0, frames, group, name, seed)
        if self.bare:
            return h
        return rescaled(h)


def drawn(seed, names, most=1, bare=False):
    """A program of these steps with its inputs, its tangents and its mask.

    Every choice is as likely as any other.

    Args:
        seed: what all is drawn from.
        names: the steps that may occur, each as (group, name).
        most: how many steps there are at most.
        bare: leave the result unscaled.
    """
    pick = random.Random(seed)
    shape = pick.choice([2, 3, 4, 6]), pick.choice([1, 2, 3, 4]), pick.choice([2, 3, 4, 6])
    layouts = []
    for _ in range(1 + pick.randrange(most)):
        layouts.append(tuple(pick.choices(sorted(FRAMES), k=pick.randrange(3))))
    plan = [(frames, *pick.choice(names), pick.randrange(10**6)) for frames in layouts]
    program = Program(shape, tuple(plan), bare)
    note(f"{program}")
    program(*inputs(shape)[0])  # which makes its weights
    primals, tangents = inputs(shape, pick.randrange(10**6))
    rows = choose(shape[0], pick.choice([*WHICH, "one", "half"]))
    return program, primals, tangents, rows


def choose(rows, which):
    """A mask of all, one, half or none of the rows; None is no mask."""
    if which is None:
        return None
    index = torch.arange(rows)
    masks = {
        "all": index >= 0,
        "one": index == rows - 1,
        "half": index % 2 == 0,
        "none": index < 0,
    }
    return masks[which]


def inputs(shape, seed=0, dtype=DOUBLE):
    """Primals (z, t) and tangents (v, 1): z of this shape, times from 0.1 to 0.9."""
    z, v = normal(seed, *shape).to(dtype), normal(seed + 1, *shape).to(dtype)
    t = torch.linspace(0.1, 0.9, shape[0], dtype=dtype)
    return (z, t), (v, torch.ones_like(t))
