"""What only a GPU can show: half precision, CUDA graphs, and that nothing is waited for."""

import copy

import pytest
import torch
from torch import nn

from flowspace import CrossFlowLoss, ForwardMode, SharedPrimal
from flowspace.derivatives.rules import attention_kernel
from flowspace.derivatives.rules.attention import Form, Operands, _block_tangent

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    # torch's own words, on what its compiler and its check for waits do
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]

ROWS, SIDE = 8, 4


def generator():
    vision = pytest.importorskip("flowspace.vision")
    torch.manual_seed(0)
    net = vision.CrossFlowGenerator(
        channels=4, grid=SIDE, patch=2, classes=3, depth=2, width=128, heads=2
    ).cuda()
    nn.init.normal_(net.head.weight, std=0.02)
    return net


def batch():
    torch.manual_seed(1)
    z = torch.randn(ROWS, 4, SIDE, SIDE, device="cuda")
    x = torch.randn(ROWS, 3, 2 * SIDE, 2 * SIDE, device="cuda")
    return z, x, torch.randint(0, 3, (ROWS,), device="cuda")


def autocast(enabled=True):
    return torch.autocast("cuda", torch.bfloat16, enabled=enabled)


def derivatives(net, half, moves):
    """Return the derivative by the default route, and by float64 forward mode, where rows move."""
    z, _, labels = batch()
    t = torch.linspace(0.2, 0.9, ROWS, device="cuda")
    s, v = torch.where(moves, t / 2, t), torch.randn_like(z)
    exact = copy.deepcopy(net).double()

    def of(network, few):
        return lambda z, t: network(z, t, s[few].to(t.dtype), labels=labels[few])

    every = torch.arange(ROWS, device="cuda")
    with autocast(half):
        _, slope = SharedPrimal()(of(net, every), (z, t), (v, torch.ones_like(t)), moves)
    few = moves.nonzero().flatten()
    wide = [x[few].double() for x in (z, t, v)]
    _, wanted = ForwardMode()(of(exact, few), wide[:2], (wide[2], torch.ones_like(wide[1])))
    return slope[few], wanted


def off(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(272, 272, 64), (64, 64, 72), (100, 40, 128), (5, 7, 8)])
@pytest.mark.parametrize("moving", [(1, 1, 1), (1, 0, 0), (0, 1, 1)])
def test_the_kernel_of_attention_is_nearer_than_products_in_half_precision(
    dtype, causal, sizes, moving
):
    torch.manual_seed(0)
    count, keys, size = sizes
    q = torch.randn(6, 3, count, size, device="cuda", dtype=dtype)
    k, v = torch.randn(2, 6, 3, keys, size, device="cuda", dtype=dtype)
    rows = torch.tensor([5, 0, 3], device="cuda")
    tangents = [
        torch.randn_like(x[:3]) + 1 if there else None
        for x, there in zip((q, k, v), moving, strict=True)
    ]
    assert attention_kernel.takes((q, k, v))
    got = attention_kernel.attention_tangent(q, k, v, *tangents, rows, size**-0.5, causal)

    def formulas(dtype):
        primals = Operands(*[x[rows].to(dtype) for x in (q, k, v)], None)
        moved = Operands(*tangents, None).map(lambda x: x.to(dtype))
        return _block_tangent(primals, moved, Form(size**-0.5, causal), 0)

    wanted = formulas(torch.float64)
    assert off(got, wanted) < 1.2 * off(formulas(dtype), wanted) + 1e-3
    assert off(got, wanted) < 2e-2


@pytest.mark.parametrize("part", ["nothing", "blocks"])
@pytest.mark.parametrize("moving", [0.5, 1.0])
def test_the_derivative_in_float32_is_that_of_float64(part, moving):
    net = generator()
    if part == "blocks":
        for block in net.blocks:
            block.compile()
    moves = torch.arange(ROWS, device="cuda") < moving * ROWS
    assert off(*derivatives(net, False, moves)) < 1e-5


@pytest.mark.parametrize("part", ["nothing", "blocks"])
def test_the_derivative_in_bfloat16_is_as_near_as_bfloat16_lets_it(part, monkeypatch):
    called, launch = [], attention_kernel.attention_tangent
    monkeypatch.setattr(
        attention_kernel, "attention_tangent", lambda *args: called.append(args) or launch(*args)
    )
    net = generator()
    if part == "blocks":
        for block in net.blocks:
            block.compile()
    moves = torch.arange(ROWS, device="cuda") % 2 == 0
    assert off(*derivatives(net, True, moves)) < 3e-2
    assert called


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("eps", [None, 1e-2])
def test_the_derivative_of_an_rms_norm(dtype, half, eps):
    torch.manual_seed(0)
    norm = nn.RMSNorm(24, eps=eps, device="cuda", dtype=dtype)
    nn.init.uniform_(norm.weight)
    exact = copy.deepcopy(norm).double()
    if eps is None and dtype != torch.float64:  # the default is that of the input's dtype
        exact.eps = torch.finfo(torch.float32).eps
    z, v = torch.randn(2, 4, 5, 24, device="cuda", dtype=dtype)
    moves = torch.tensor([True, False, True, True], device="cuda")
    with autocast(half and dtype == torch.float32):
        _, slope = SharedPrimal()(norm, (z,), (v,), moves)
    _, wanted = ForwardMode()(exact, (z.double(),), (v.double(),))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    assert off(slope[moves], wanted[moves]) < tolerance


@pytest.mark.parametrize("part", ["nothing", "blocks"])
def test_a_step_of_the_generator_does_not_wait_for_the_device(part):
    net, (z, x, labels), loss = generator(), batch(), CrossFlowLoss()
    if part == "blocks":
        for block in net.blocks:
            block.compile()

    def step():
        with autocast():
            out = loss(net, z, x, cond={"labels": labels})
        out.loss.mean().backward()

    step()
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steps_in_cuda_graphs_have_the_gradients_of_steps_as_written():
    z, x, labels = batch()
    written, graphs = generator(), generator()
    graphs.compile(mode="reduce-overhead")
    loss = CrossFlowLoss()
    for seed in range(5):
        grads = []
        for net in (written, graphs):
            torch.manual_seed(seed)
            torch.compiler.cudagraph_mark_step_begin()
            net.zero_grad()
            loss(net, z, x, cond={"labels": labels}).loss.mean().backward()
            grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]).clone())
        assert off(grads[1], grads[0]) < 1e-4
