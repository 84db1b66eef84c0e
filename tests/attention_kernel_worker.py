"""The kernel of attention's tangent, run by Triton's interpreter on a CPU, against the formulas in
float64. Started by test_attention_kernel.py.

Each line that is printed holds the name of a case, its error over the largest entry, and whether
the kernel was called with chosen rows.
"""

import copy
import os
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from torch import nn

from flowspace import ForwardMode, MeanFlowLoss, SharedPrimal
from flowspace.derivatives.rules import attention_kernel, attention_triton
from flowspace.derivatives.rules.attention import Form, Operands, _block_tangent


def against_formulas(name, sizes, causal=False, moving=(True, True, True), few=None):
    batch, heads, count, keys, size, channels = sizes
    q = torch.randn(batch, heads, count, size)
    # what all keys share is taken out of the scores' tangent, so let there be much of it
    k = torch.randn(batch, heads, keys, size) + 1
    v = torch.randn(batch, keys, heads, channels).transpose(1, 2)
    rows, every = None, torch.arange(batch)
    if few is not None:
        rows = every = torch.randperm(batch)[:few]
    shapes = [(len(every), *x.shape[1:]) for x in (q, k, v)]
    tangents = [
        torch.randn(shape) + 0.5 if there else None
        for shape, there in zip(shapes, moving, strict=True)
    ]
    got = attention_kernel.attention_tangent(q, k, v, *tangents, rows, 0.3, causal)
    primals = Operands(*[x[every].double() for x in (q, k, v)], None)
    moved = Operands(*tangents, None).map(torch.Tensor.double)
    wanted = _block_tangent(primals, moved, Form(0.3, causal), 0)
    error = (got - wanted).abs().max() / wanted.abs().max()
    print(name, float(error), rows is not None)


class Net(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.causal = causal
        self.qkv, self.out, self.time = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(1, 16)

    def forward(self, z, t):
        x = z + self.time(t[:, None])[:, None]
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


def against_forward_mode(backend, causal, moves):
    net = Net(causal)
    exact = copy.deepcopy(net).double()
    z, t, v = torch.randn(4, 9, 16), torch.rand(4), torch.randn(4, 9, 16)
    given = (z, t), (v, torch.ones(4)), moves
    _, wanted = ForwardMode()(exact, *(tuple(x.double() for x in xs) for xs in given[:2]), moves)
    if backend:
        net.compile(backend=backend)
    called = []
    attention_triton.launch = lambda *args: called.append(args) or launch(*args)
    _, slope = SharedPrimal()(net, *given)
    error = (slope - wanted).abs().max() / wanted.abs().max()
    assert called, "the kernel was not called"
    print(f"{backend}, {causal}, {int(moves.sum())}", float(error), called[0][3] is not None)


def under_transforms():
    """The gradient of each row alone, by torch.func, against that of the batch by autograd."""
    net = Net(causal=False)
    z, noise, t = torch.randn(4, 9, 16), torch.randn(4, 9, 16), torch.tensor([0.3, 0.5, 0.7, 0.9])
    loss, parameters = MeanFlowLoss(), dict(net.named_parameters())

    def of_rows(parameters, *rows):
        z, noise, t = rows

        def model(z_t, t, s):
            return torch.func.functional_call(net, parameters, (z_t, t))

        return loss(model, z, noise=noise, t=t, s=t / 2).loss.mean()

    rows = [x[:, None] for x in (z, noise, t)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: it goes through the rows one by one
        each = torch.func.vmap(torch.func.grad(of_rows), (None, 0, 0, 0))(parameters, *rows)
    wanted = torch.autograd.grad(of_rows(parameters, z, noise, t), net.qkv.weight)[0]
    error = (each["qkv.weight"].mean(0) - wanted).abs().max() / wanted.abs().max()
    print("each row's gradient", float(error), False)


launch = attention_triton.launch
torch.manual_seed(0)
against_formulas("square", (2, 3, 70, 70, 24, 24))
against_formulas("causal", (2, 3, 130, 70, 24, 24), causal=True)
against_formulas("rows", (5, 2, 20, 20, 16, 16), few=3)
against_formulas("tall", (2, 2, 5, 130, 40, 8))
against_formulas("no tokens", (3, 2, 20, 20, 16, 16), few=1)
for parts in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)):
    against_formulas(f"parts {parts}", (2, 2, 33, 65, 8, 8), moving=parts)

empty = torch.randn(2, 2, 0, 8)
for keys, queries in ((empty, torch.randn(2, 2, 5, 8)), (torch.randn(2, 2, 5, 8), empty)):
    tangents = torch.ones_like(queries), torch.ones_like(keys), torch.ones_like(keys)
    found = attention_kernel.attention_tangent(queries, keys, keys, *tangents, None, 1.0, False)
    assert found.shape == queries.shape and not found.any()

attention_kernel.DEVICES = frozenset({"cpu"})
attention_kernel.DTYPES = frozenset({torch.float32})
attention_kernel._device_fits = lambda: True
some, every = torch.tensor([True, False, True, False]), torch.ones(4, dtype=torch.bool)
for compiler in (None, "aot_eager"):
    against_forward_mode(compiler, False, some)
    against_forward_mode(compiler, True, every)
under_transforms()
