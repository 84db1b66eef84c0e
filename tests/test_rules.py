"""Each argument of a torch function may move, alone or beside the others, in its place or by name:
the derivative is torch's own, or the argument is refused.
"""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from comparison import ROUTE, by_differences, check_seeded, exact
from programs import WHICH, choose
from strategies import normal

from flowspace import DerivativeError
from flowspace.derivatives.hidden_calls import follows_compiled


def positive(seed, *shape):
    return normal(seed, *shape).abs() + 0.5


def matrices(size):
    return normal(1, 4, size, size) + 3 * torch.eye(size, dtype=torch.float64)


COLUMNS = torch.tensor([[0, 1], [1, 2], [3, 2], [4, 5]])
MASK = normal(9, 4, 6) > 0
ROWS, CHANNELS = normal(10, 4, 6), normal(11, 4, 6, 5)
AFFINE = {"weight": normal(1, 6), "bias": normal(2, 6)}
STORED = {"running_mean": normal(3, 6), "running_var": positive(4, 6)}

# name: function, arguments, those of them that may move
MOVING = {
    "batch_norm": (F.batch_norm, {"input": CHANNELS, **STORED, **AFFINE}, "input weight bias"),
    "batch_norm in training": (
        functools.partial(F.batch_norm, training=True),
        {"input": ROWS, "running_mean": None, "running_var": None, **AFFINE},
        "input weight bias",
    ),
    "instance_norm": (
        F.instance_norm,
        {"input": CHANNELS, "running_mean": None, "running_var": None, **AFFINE},
        "input weight bias",
    ),
    "layer_norm": (
        F.layer_norm,
        {"input": ROWS, "normalized_shape": (6,), **AFFINE},
        "input weight bias",
    ),
    "rms_norm": (
        F.rms_norm,
        {"input": ROWS, "normalized_shape": (6,), "weight": normal(1, 6)},
        "input weight",
    ),
    "group_norm": (
        F.group_norm,
        {"input": CHANNELS, "num_groups": 2, **AFFINE},
        "input weight bias",
    ),
    "linear": (
        F.linear,
        {"input": ROWS, "weight": normal(1, 3, 6), "bias": normal(2, 3)},
        "input weight bias",
    ),
    "conv1d": (
        F.conv1d,
        {"input": CHANNELS, "weight": normal(1, 3, 6, 2), "bias": normal(2, 3)},
        "input weight bias",
    ),
    "prelu": (F.prelu, {"input": CHANNELS, "weight": normal(1, 6)}, "input weight"),
    "addmm": (
        torch.addmm,
        {"input": normal(1, 4, 3), "mat1": ROWS, "mat2": normal(2, 6, 3)},
        "input mat1 mat2",
    ),
    "attention": (
        F.scaled_dot_product_attention,
        {
            "query": CHANNELS,
            "key": normal(1, 4, 6, 5),
            "value": normal(2, 4, 6, 5),
            "attn_mask": normal(3, 4, 6, 6),
        },
        "query key value attn_mask",
    ),
    "addcmul": (
        functools.partial(torch.addcmul, value=0.7),
        {"input": ROWS, "tensor1": normal(1, 4, 6), "tensor2": normal(2, 4, 1)},
        "input tensor1 tensor2",
    ),
    "addcmul of shorter": (
        torch.addcmul,
        {"input": normal(1, 6), "tensor1": ROWS, "tensor2": normal(2, 4, 6)},
        "input tensor1 tensor2",
    ),
    "add with a factor": (
        functools.partial(torch.add, alpha=0.7),
        {"input": ROWS, "other": normal(1, 4, 6)},
        "input other",
    ),
    "causal attention": (
        functools.partial(F.scaled_dot_product_attention, is_causal=True, scale=0.7),
        {"query": CHANNELS, "key": normal(1, 4, 6, 5), "value": normal(2, 4, 6, 5)},
        "query key value",
    ),
    "lerp": (
        torch.lerp,
        {"input": ROWS, "end": normal(1, 4, 6), "weight": normal(2, 4, 6)},
        "input end weight",
    ),
    "clamp": (
        torch.clamp,
        {"input": ROWS, "min": normal(1, 4, 6) - 1, "max": normal(2, 4, 6) + 1},
        "input min max",
    ),
    "clip by numbers": (
        torch.clip,
        {
            "input": ROWS,
            "min": torch.tensor(-0.5, dtype=torch.float64),
            "max": torch.tensor(0.4, dtype=torch.float64),
        },
        "input min max",
    ),
    "where": (
        torch.where,
        {"condition": MASK, "input": ROWS, "other": normal(1, 4, 6)},
        "input other",
    ),
    "masked_fill": (
        torch.masked_fill,
        {"input": ROWS, "mask": MASK, "value": torch.tensor(0.3, dtype=torch.float64)},
        "input value",
    ),
    "scatter": (
        torch.scatter,
        {"input": ROWS, "dim": 1, "index": COLUMNS, "src": normal(1, 4, 2)},
        "input src",
    ),
    "index_add": (
        torch.index_add,
        {"input": ROWS, "dim": 1, "index": torch.tensor([0, 3]), "source": normal(1, 4, 2)},
        "input source",
    ),
    "embedding": (
        F.embedding,
        {"input": torch.tensor([0, 3, 2, 1]), "weight": normal(1, 4, 6)},
        "weight",
    ),
    "cross_entropy": (
        F.cross_entropy,
        {"input": ROWS, "target": torch.softmax(normal(1, 4, 6), 1)},
        "input target",
    ),
    "maximum by name": (torch.max, {"input": ROWS, "other": normal(1, 4, 6)}, "input other"),
    "copysign": (torch.copysign, {"input": ROWS, "other": normal(1, 4, 6)}, "input"),
    "solve": (
        torch.linalg.solve,
        {"A": matrices(3), "B": normal(1, 4, 3, 2)},
        "A B",
    ),
    "diff": (
        torch.diff,
        {"input": ROWS, "n": 1, "dim": 1, "prepend": normal(1, 4, 1), "append": normal(2, 4, 1)},
        "input prepend append",
    ),
}
NUMBER = torch.tensor(0.3, dtype=torch.float64)
# as above; the last argument is one that torch reads as a constant, beside one that moves
READ = {
    "add": (torch.add, {"input": ROWS, "other": normal(1, 4, 6), "alpha": NUMBER}),
    "sub": (torch.sub, {"input": ROWS, "other": normal(1, 4, 6), "alpha": NUMBER}),
    "addmm": (
        torch.addmm,
        {"input": normal(1, 3), "mat1": ROWS, "mat2": normal(2, 6, 3), "beta": NUMBER},
    ),
    "addcmul": (
        torch.addcmul,
        {"input": ROWS, "tensor1": normal(1, 4, 6), "tensor2": normal(2, 4, 6), "value": NUMBER},
    ),
    "pad": (F.pad, {"input": ROWS, "pad": (1, 2), "mode": "constant", "value": NUMBER}),
    "leaky_relu": (F.leaky_relu, {"input": ROWS, "negative_slope": NUMBER}),
    "elu": (F.elu, {"input": ROWS, "alpha": NUMBER}),
    "softplus": (F.softplus, {"input": ROWS, "beta": NUMBER}),
    "hardtanh": (F.hardtanh, {"input": ROWS, "min_val": -0.3, "max_val": NUMBER}),
    "index_add": (
        torch.index_add,
        {
            "input": ROWS,
            "dim": 1,
            "index": torch.tensor([0, 3]),
            "source": normal(1, 4, 2),
            "alpha": NUMBER,
        },
    ),
    "cross_entropy": (
        F.cross_entropy,
        {"input": ROWS, "target": torch.tensor([0, 2, 1, 5]), "weight": positive(1, 6)},
    ),
    "vector_norm": (torch.linalg.vector_norm, {"x": ROWS, "ord": NUMBER + 2}),
    "layer_norm": (
        F.layer_norm,
        {"input": ROWS, "normalized_shape": (6,), "weight": None, "bias": None, "eps": NUMBER},
    ),
}


def moved(value, z, t):
    """A tensor and something of z and t in its shape: of its row where it has rows."""
    if value.ndim and len(value) == len(z):
        change = z @ normal(20, 6, value[0].numel()) + t[:, None]
        return value + 0.1 * change.reshape(value.shape)
    direction = torch.linspace(-1, 1, value.numel(), dtype=torch.float64) + 0.3
    return value + 0.1 * (z.mean() + t[0]) * direction.reshape(value.shape)


def model_of(function, arguments, moving, way):
    """A model in which these arguments move, all given in their places, some or all by name."""

    def model(z, t):
        given = dict(arguments)
        for name in moving:
            given[name] = moved(given[name], z, t)
        names = list(given)
        if way == "in places":
            out = function(*given.values())
        elif way == "by name":
            out = function(**given)
        else:
            out = function(given.pop(names[0]), **given)
        if out.ndim and len(out) == len(z):
            return z.sin() + out.reshape(len(z), -1).sin().sum(1, keepdim=True)
        return z.sin() * out.sin().sum()

    return model


SUBSETS = []
for name, (_, _, movable) in MOVING.items():
    names = movable.split()
    SUBSETS.extend((name, (one,)) for one in names)
    if len(names) > 1:
        SUBSETS.append((name, tuple(names)))


@pytest.mark.parametrize("way", ["in places", "by name", "one in its place"])
@pytest.mark.parametrize(("name", "moving"), SUBSETS)
def test_any_argument_may_move(name, moving, way):
    function, arguments, _ = MOVING[name]
    model = model_of(function, arguments, moving, way)
    for which in WHICH:
        check_seeded(model, choose(4, which), by_differences, tolerance=1e-8)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", READ)
def test_an_argument_that_torch_reads_as_a_constant_is_refused(name, alone):
    function, arguments = READ[name]
    first = next(n for n, value in arguments.items() if isinstance(value, torch.Tensor))
    moving = [first, list(arguments)[-1]]
    if alone:
        moving = moving[1:]
    model = model_of(function, arguments, moving, "one in its place")
    with pytest.raises(DerivativeError, match=r"FiniteDifference\(\)"):
        check_seeded(model, None, by_differences)


@pytest.mark.parametrize("which", WHICH)
def test_a_norm_with_a_weight_that_moves_writes_its_statistics_once(which):
    mean, var = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)

    def model(z, t):
        return F.batch_norm(z, mean, var, weight=1 + t.mean() * AFFINE["weight"], training=True)

    z, t = normal(1, 4, 6), positive(2, 4)
    model(z, t)
    wanted = mean.clone(), var.clone()
    mean.zero_()
    var.fill_(1)
    ROUTE(model, (z, t), (z, torch.ones_like(t)), choose(4, which))
    torch.testing.assert_close((mean, var), wanted)


FILLED = {
    "full_like": lambda z, t: z * torch.full_like(z, t.mean()),
    "full_like by name": lambda z, t: z * torch.full_like(z, fill_value=t[0]),
    "new_full": lambda z, t: z * z.new_full((4, 6), t[0]),
    "full": lambda z, t: z * torch.full((4, 6), t[0], dtype=torch.float64),
    "a constant": lambda z, t: z * torch.full_like(z, 0.3) * t[:, None],
    "of a constant": lambda z, t: z * torch.full_like(ROWS, t.mean()),
}


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", FILLED)
def test_a_tensor_filled_with_a_number_that_moves_moves(name, which):
    check_seeded(FILLED[name], choose(4, which), by_differences, tolerance=1e-8)


VECTOR = normal(12, 6)
SEVERAL = {
    "broadcast_tensors": lambda z, t: z * torch.broadcast_tensors(z, VECTOR)[0],
    "broadcast_tensors of a constant": lambda z, t: (
        z * torch.broadcast_tensors(VECTOR, t[:, None], z)[1]
    ),
    "Normal": lambda z, t: torch.distributions.Normal(z, 1.0).log_prob(t[:, None]),
    "meshgrid": lambda z, t: z * torch.meshgrid(t, VECTOR, indexing="ij")[0],
    "meshgrid of all": lambda z, t: (
        z * torch.mul(*torch.meshgrid(t, z.mean() * VECTOR, indexing="ij"))
    ),
    "meshgrid of columns and rows": lambda z, t: z * torch.meshgrid(VECTOR, t, indexing="xy")[1],
    "atleast_2d": lambda z, t: z * torch.atleast_2d(VECTOR, t[:, None])[1],
    "atleast_3d": lambda z, t: z * torch.atleast_3d(z, VECTOR)[0][..., 0],
    "atleast_1d of one": lambda z, t: z * torch.atleast_1d(t)[:, None],
}
MIXING = ("meshgrid of all",)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_outputs_some_may_be_at_rest(name, which):
    calls = check_seeded(SEVERAL[name], choose(4, which))
    assert calls == 1 or name in MIXING


def squares(z, size):
    rows = 0.3 * z @ normal(13, 6, size * size)
    return 3 * torch.eye(size, dtype=z.dtype) + rows.reshape(-1, size, size)


COMPILED = {
    "ldexp": lambda z, t: torch.ldexp(z, torch.tensor(2)) * t[:, None],
    "copysign": lambda z, t: z * torch.copysign(z, VECTOR),
    "det of a part": lambda z, t: z * torch.linalg.det(z[:, :4].reshape(-1, 2, 2))[:, None],
    "svdvals": lambda z, t: z * torch.linalg.svdvals(squares(z, 3))[:, :1],
}
for size in (1, 2, 3):
    for function in (torch.linalg.det, torch.logdet):
        COMPILED[f"{function.__name__} of {size}"] = lambda z, t, f=function, n=size: (
            z * f(squares(z, n) @ squares(z, n).mT)[:, None]
        )
    COMPILED[f"inv of {size}"] = lambda z, t, n=size: (
        z * torch.linalg.inv(squares(z, n)).sum((1, 2))[:, None]
    )
    COMPILED[f"solve of {size}"] = lambda z, t, n=size: (
        z * torch.linalg.solve(squares(z, n), squares(z, n).mT[..., :1]).sum((1, 2))[:, None]
    )


@pytest.mark.skipif(not follows_compiled(), reason="torch.compile is met from torch 2.11 on")
@pytest.mark.parametrize("which", ["all", "half"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_functions_without_a_rule_are_traced_and_right(name, which):
    model = COMPILED[name]
    compiled = torch.compile(model, backend="aot_eager")

    def wanted(fn, primals, tangents):
        return exact(model, primals, tangents)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_seeded(compiled, choose(4, which), wanted, tolerance=1e-10)


def test_a_factor_of_addcmul_that_moves_alone_or_beside_its_start_is_refused():
    def model(z, t):
        return torch.addcmul(z, torch.ones_like(ROWS), torch.ones_like(ROWS), value=t.mean())

    with pytest.raises(DerivativeError, match=r"FiniteDifference\(\)"):
        check_seeded(model, None, by_differences)


SQUARES = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "addcmul": lambda x, y: torch.addcmul(x, x, y),
}


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", SQUARES)
def test_a_square_meets_its_transpose_with_rows_on_another_axis(name, which):
    def model(z, t):
        square = z[:, :4]
        return torch.cat([SQUARES[name](square, square.mT), z[:, 4:]], 1)

    check_seeded(model, choose(4, which), by_differences, tolerance=1e-8)


HEADS, BIAS = normal(30, 4, 2, 5, 8), normal(31, 5, 5)
DRAWING = {
    "attention": lambda x: F.scaled_dot_product_attention(x, HEADS.to(x), x.sin(), None, 0.3),
    "attention with a bias": lambda x: F.scaled_dot_product_attention(
        x, x.cos(), HEADS.to(x), BIAS.to(x), dropout_p=0.3, scale=0.4
    ),
    "causal attention": lambda x: F.scaled_dot_product_attention(
        x, x, x, dropout_p=0.3, is_causal=True
    ),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.37, True),
    "feature alpha dropout": lambda x: F.feature_alpha_dropout(x, 0.37, True),
    "dropout in place": lambda x: F.dropout(x * 2, 0.37, True, inplace=True),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DRAWING)
def test_what_draws_has_value_and_gradient_to_the_bit_in_every_precision(name, dtype, autocast):
    weight = torch.ones(4, 1, 1, 1, dtype=dtype, requires_grad=True)

    def model(z, t):
        return DRAWING[name](z * weight) * t[:, None, None, None]

    z, t = normal(32, 4, 2, 5, 8).to(dtype), torch.linspace(0.2, 0.8, 4).to(dtype)
    found = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for route in (None, ROUTE):
            torch.manual_seed(0)
            value = model(z, t) if route is None else route(model, (z, t), (z, t))[0]
            found.append((value, torch.autograd.grad(value.sum(), weight)[0]))
    for plain, ours in zip(*found, strict=True):
        assert plain.dtype == ours.dtype and torch.equal(plain, ours)
