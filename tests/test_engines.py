"""CrossFlowLoss under the engines that train large models; its derivative needs nothing special of
them.
"""

import copy
from pathlib import Path

import pytest
import torch
from launch import in_processes
from strategies import normal
from torch import nn
from torch.utils.checkpoint import checkpoint

from flowspace import CrossFlowLoss, FiniteDifference, ForwardMode, SharedPrimal

ROUTES = [SharedPrimal(), ForwardMode(), FiniteDifference(1e-4)]
each_route = pytest.mark.parametrize("route", ROUTES, ids=repr)


class Net(nn.Module):
    def __init__(self, dropout=0.0, checkpointed=False, norm=nn.LayerNorm):
        super().__init__()
        self.embed, self.head, self.times = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(2, 32)
        self.norm, self.inner, self.dropout = norm(32), nn.Linear(32, 32), nn.Dropout(dropout)
        self.checkpointed = checkpointed

    def block(self, h):
        return h + self.inner(self.dropout(nn.functional.gelu(self.norm(h))))

    def forward(self, z, t, s):
        h = self.embed(z) + self.times(torch.stack([t, s], 1))
        return self.head(
            checkpoint(self.block, h, use_reentrant=False) if self.checkpointed else self.block(h)
        )


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options).double()


def batch(rows=16):
    t = torch.linspace(0.05, 1.0, rows, dtype=torch.float64)
    s = torch.where(torch.arange(rows) % 2 == 0, t, 0.3 * t)
    return normal(1, rows, 8), {"noise": normal(2, rows, 8), "t": t, "s": s}


def step(loss_fn, model, cast=torch.float64):
    z, rest = batch()
    model.zero_grad()
    out = loss_fn(model, z.to(cast), **{k: v.to(cast) for k, v in rest.items()})
    out.loss.mean().backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


def same(first, second, tolerance=1e-12):
    torch.testing.assert_close(first[0].loss, second[0].loss, rtol=0, atol=tolerance)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], rtol=0, atol=tolerance)


COMPILED = ["ddp+blocks", "ddp+within", "ddp+round", "fsdp2+blocks"]


@pytest.mark.parametrize(
    "how", ["ddp", "static_graph", "find_unused_parameters", "fsdp2", *COMPILED]
)
def test_two_processes_have_the_gradients_of_one(how):
    done = in_processes(2, Path(__file__).with_name("engines_worker.py"), how)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"{how}: 3 steps agree") == 2


@each_route
def test_activation_checkpoints_change_nothing(route):
    loss_fn = CrossFlowLoss(derivative=route)
    same(step(loss_fn, net(checkpointed=True)), step(loss_fn, net()))


@each_route
def test_gradients_accumulate_over_parts_of_a_batch(route):
    model, loss_fn = net(), CrossFlowLoss(derivative=route)
    _, whole = step(loss_fn, model)
    z, rest = batch()
    model.zero_grad()
    for part in (slice(0, 8), slice(8, 16)):
        (
            loss_fn(model, z[part], **{k: v[part] for k, v in rest.items()}).loss.mean() / 2
        ).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("route", ROUTES[:2], ids=repr)
def test_torch_func_differentiates_the_loss_and_maps_it(route):
    model, loss_fn = net(), CrossFlowLoss(derivative=route)
    out, wanted = step(loss_fn, model)
    z, rest = batch()

    def loss(parameters):
        def called(z, t, s):
            return torch.func.functional_call(model, parameters, (z, t, s))

        return loss_fn(called, z, **rest).loss.mean()

    parameters = dict(model.named_parameters())
    for name, gradient in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-12)
    two = {name: torch.stack([p.detach(), 1.1 * p.detach()]) for name, p in parameters.items()}
    each = [loss({name: p[i] for name, p in two.items()}) for i in range(2)]
    torch.testing.assert_close(torch.func.vmap(loss)(two), torch.stack(each), rtol=0, atol=1e-12)

    def of_row(z, noise, t, s):
        return loss_fn(model, z[None], noise=noise[None], t=t[None], s=s[None]).loss[0]

    rows = torch.func.vmap(of_row)(z, rest["noise"], rest["t"], rest["s"])
    torch.testing.assert_close(rows, out.loss, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("route", "bound"), [(SharedPrimal(), 0.03), (ForwardMode(), 0.03)], ids=repr
)
def test_under_bfloat16_autocast_the_residual_is_near_that_of_float64(route, bound):
    exact, _ = step(CrossFlowLoss(derivative=ForwardMode()), net())
    model = copy.deepcopy(net()).float()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = step(CrossFlowLoss(derivative=route), model, torch.float32)
    assert out.residual.dtype == out.target.dtype == torch.float32
    error = (out.residual.double() - exact.residual).abs().max() / exact.residual.abs().max()
    assert error < bound, float(error)


def test_under_bfloat16_autocast_the_tangent_of_shared_primal_is_within_two_percent():
    model, (z, rest) = net(), batch()
    primals, tangents = (
        (z, rest["t"], 0.5 * rest["t"]),
        (rest["noise"], torch.ones(16, dtype=torch.float64), None),
    )
    exact = ForwardMode()(model, primals, tangents)[1]
    single = [None if p is None else p.float() for p in (*primals, *tangents)]
    with torch.autocast("cpu", torch.bfloat16):
        tangent = SharedPrimal()(model.float(), single[:3], single[3:])[1]
    assert (tangent.double() - exact).abs().max() < 0.02 * exact.abs().max()


@each_route
def test_a_model_with_batch_norm_moves_in_all_rows_and_its_statistics_once(route):
    model, plain = net(norm=nn.BatchNorm1d), net(norm=nn.BatchNorm1d)
    (z, rest), loss_fn = batch(), CrossFlowLoss(derivative=route)
    out = loss_fn(model, z, **rest)
    plain(out.z_t, out.t, out.s)
    for (name, buffer), wanted in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, wanted), name
    whole = torch.func.jvp(
        lambda z, t: nn.functional.batch_norm(
            plain.embed(z) + plain.times(torch.stack([t, out.s], 1)), None, None, training=True
        ),
        (out.z_t, out.t),
        (rest["noise"] - z, torch.ones_like(out.t)),
    )
    normed = plain.norm(plain.embed(out.z_t) + plain.times(torch.stack([out.t, out.s], 1)))
    slope = torch.func.jvp(nn.functional.gelu, (normed,), (whole[1],))[1]
    moved = plain.embed.weight @ (rest["noise"] - z).T + plain.times.weight[:, :1]
    exact = (moved.T + slope @ plain.inner.weight.T) @ plain.head.weight.T
    c = loss_fn.coefficients
    a, b, data = (part(out.t, out.s)[:, None] for part in (c.prediction, c.derivative, c.data))
    wanted = a * out.prediction + b * exact - data * z
    torch.testing.assert_close(out.residual, wanted.detach(), rtol=1e-5, atol=1e-5)


@each_route
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["model", "loss"])
def test_what_torch_compile_compiled_is_right(route, how):
    pytest.importorskip("torch._inductor")
    (z, rest), model = batch(), net()
    loss_fn = CrossFlowLoss(derivative=route)
    wanted = loss_fn(model, z, **rest)
    compiled = torch.compile(model, backend="eager" if how == "loss" else "aot_eager")
    if how == "model":
        out = loss_fn(compiled, z, **rest)
    else:
        out = torch.compile(lambda z: loss_fn(model, z, **rest), backend="eager")(z)
    torch.testing.assert_close(out.residual, wanted.residual, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-9, atol=1e-9)


@each_route
def test_an_error_in_the_model_leaves_no_trace(route):
    def state():
        return (
            torch.is_grad_enabled(),
            torch.get_rng_state().tolist(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.autograd.Function.__dict__["apply"],
            torch._C.ScriptMethod.__dict__["__call__"],
            torch._C._len_torch_function_stack(),
        )

    def fails(z, t, s):
        raise ArithmeticError("here")

    (z, rest), before = batch(), state()
    with pytest.raises(ArithmeticError, match="here"):
        CrossFlowLoss(derivative=route)(fails, z, **rest)
    assert state() == before
