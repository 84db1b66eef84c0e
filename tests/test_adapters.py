"""Networks of other libraries in objectives and samplers: what is derived from them is what a
hand-written model gives, and what does not fit is one clear error.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

import diffusers
from gaussian import Gaussian
from huggingface_hub import PyTorchModelHubMixin
from hypothesis import given, settings
from strategies import PRESETS, normal, seeds
from torch import nn

from flowspace import (
    CrossFlowLoss,
    FiniteDifference,
    FlowMap,
    FlowMatchingLoss,
    ForwardMode,
    ImprovedMeanFlowLoss,
    InputError,
    LinearSchedule,
    MeanFlowLoss,
    MeanFlowStatistic,
    SharedPrimal,
    VelocityFlow,
    adapt,
    vision,
)
from flowspace.derivatives.hidden_calls import follows_compiled


def awake(module):
    """Every parameter drawn anew: what begins at zero would hide what stands behind it."""
    draw = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        with torch.no_grad():
            parameter.add_((noise / max(4, parameter.shape[-1]) ** 0.5).to(parameter.dtype))
    return module


def unet(**changes):
    shape = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    down = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    up = {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    size = {"sample_size": 4, "in_channels": 2, "out_channels": 2, "num_class_embeds": 5}
    return diffusers.UNet2DModel(**(shape | down | up | size | changes)).eval()


def dit(**changes):
    size = {"sample_size": 4, "patch_size": 2, "in_channels": 2, "out_channels": 2}
    width = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
    made = diffusers.DiTTransformer2DModel(**(size | width | {"num_embeds_ada_norm": 5} | changes))
    return awake(made.eval())


class TimeEmbedder(nn.Module):
    """Named and built as in the code of DiT and SiT."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angle = t[:, None] * torch.arange(1, 5, device=t.device)
        waves = torch.cat([angle.cos(), angle.sin()], 1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class SiT(nn.Module):
    """A network as SiT's code has it: ``forward(x, t, y)`` with a time in [0, 1]."""

    def __init__(self, width=8):
        super().__init__()
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = nn.Embedding(6, width)
        self.blocks = nn.ModuleList(nn.Linear(3 + width, 3 + width) for _ in range(2))
        self.final_layer = nn.Linear(3 + width, 3)

    def forward(self, x, t, y):
        return self.body(x, self.t_embedder(t) + self.y_embedder(y))

    def body(self, x, c):
        h = torch.cat([x, c], 1)
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return self.final_layer(h)


def sit():
    torch.manual_seed(2)
    return awake(SiT().double())


T_, S_ = (torch.tensor(x, dtype=torch.float64) for x in ([0.9, 0.7, 0.5], [0.1, 0.7, 0.0]))
LABELS = torch.tensor([0, 3, 4])


def jvp(model, z, v):
    """The derivative along the path, by forward mode through a hand-written model."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        tangents = (v, torch.ones_like(T_), torch.zeros_like(S_))
        return torch.func.jvp(model, (z, T_, S_), tangents)


def along(route, model, z, v):
    """The same by a route, as an objective calls it."""
    arguments = (z, T_, S_)
    value, derivative = route(
        lambda z, t, s: model(z, t, s, labels=LABELS), arguments, (v, torch.ones_like(T_), None)
    )
    return value.detach(), derivative


# --- the same as by hand


@pytest.mark.parametrize("route", [SharedPrimal(), ForwardMode()], ids=["shared", "forward"])
@pytest.mark.parametrize("build", [unet, dit], ids=["unet", "dit"])
def test_value_and_derivative_of_a_network_of_diffusers_are_those_of_a_model_by_hand(build, route):
    network = build().double()
    z, v = normal(0, 3, 2, 4, 4), normal(1, 3, 2, 4, 4)

    def by_hand(z, t, s):
        return network(z, timestep=1000 * t, class_labels=LABELS).sample

    wanted, slope = jvp(by_hand, z, v)
    value, derivative = along(route, adapt(network, names={"labels": "class_labels"}), z, v)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(derivative, slope)
    assert slope.abs().max() > 1e-2


@pytest.mark.parametrize("build", [unet, dit], ids=["unet", "dit"])
def test_a_finite_difference_of_a_thousand_t_needs_a_step_far_below_the_default(build):
    model = adapt(build(), names={"labels": "class_labels"})
    z, v, one = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.ones(3)

    def derivative(route):
        arguments = (z, T_.float(), S_.float())
        return route(lambda z, t, s: model(z, t, s, labels=LABELS), arguments, (v, one, None))[1]

    exact = derivative(ForwardMode())

    def error(route):
        return float((derivative(route) - exact).norm() / exact.norm())

    with pytest.warns(UserWarning, match="far from a line"):
        assert error(FiniteDifference()) > 0.5
    assert error(FiniteDifference(step=1e-4)) < 0.02


@pytest.mark.parametrize(
    "route",
    [SharedPrimal(), ForwardMode(), FiniteDifference(step=1e-4)],
    ids=lambda r: repr(r)[:9],
)
def test_an_added_time_is_the_embedding_that_one_would_add_by_hand(route):
    network = sit()
    adapted = adapt(network, {"t": "t"}, names={"labels": "y"}, added="t - s")
    added = awake(adapted.added)
    z, v = normal(0, 3, 3), normal(1, 3, 3)
    low, high = math.log10(2 * math.pi / 10), math.log10(2 * math.pi * 16)
    rates = torch.logspace(low, high, 64, dtype=torch.float64)

    def by_hand(z, t, s):
        angle = (t - s)[:, None] * rates
        hidden = F.silu(added.first(torch.cat([angle.cos(), angle.sin()], 1)))
        angle = t[:, None] * torch.arange(1, 5)
        first = network.t_embedder.mlp(torch.cat([angle.cos(), angle.sin()], 1))
        return network.body(z, first + added.second(hidden) + network.y_embedder(LABELS))

    wanted, slope = jvp(by_hand, z, v)
    value, derivative = along(route, adapted, z, v)
    torch.testing.assert_close(value, wanted)
    tolerance = 1e-9
    if isinstance(route, FiniteDifference):
        tolerance = 1e-3
    torch.testing.assert_close(derivative, slope, rtol=tolerance, atol=tolerance)


class Average(nn.Module):
    """A network of two times, under any names and in any order."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(3, 3, 3))

    def average(self, x, t, s):
        return torch.tanh(x @ self.weight) * (1 + t * s)[:, None] + (t - s)[:, None]


class XTRY(Average):
    def forward(self, x, t, r, y=None):
        return self.average(x, t, r)


class XRT(Average):
    def forward(self, x, r, t):
        return self.average(x, t, r)


class XTH(Average):
    def forward(self, x, t, h):
        return self.average(x, t, t - h)


class Diffusers(Average):
    def forward(self, sample, timestep, r_timestep, return_dict=True):
        return {"sample": self.average(sample, timestep / 1000, r_timestep / 1000)}


class Reversed(Average):
    """Time runs from noise to data, and so does what it returns."""

    def forward(self, x, tau, end):
        return -self.average(x, 1 - tau, 1 - end)


OF_TWO_TIMES = {
    "x, t, r, y": lambda: adapt(XTRY()),
    "x, r, t": lambda: adapt(XRT()),
    "x, t, h": lambda: adapt(XTH()),
    "diffusers": lambda: adapt(Diffusers(), output=lambda out: out["sample"]),
    "reversed": lambda: adapt(Reversed(), {"tau": "1 - t", "end": "1 - s"}, factor=-1.0),
    "functions": lambda: adapt(
        Reversed(), {"tau": lambda t, s: 1 - t, "end": lambda t, s: 1 - s}, factor=-1.0
    ),
}


@pytest.mark.parametrize("name", OF_TWO_TIMES)
def test_every_signature_of_two_times_is_one_and_the_same_model(name):
    model, direct = OF_TWO_TIMES[name](), Average()
    z, v = normal(0, 3, 3), normal(1, 3, 3)
    wanted, slope = jvp(direct.average, z, v)
    value, derivative = SharedPrimal()(model, (z, T_, S_), (v, torch.ones_like(T_), None))
    torch.testing.assert_close(value.detach(), wanted)
    torch.testing.assert_close(derivative, slope)


class OfGaussian(nn.Module):
    """The exact velocity of Gaussian data, as SiT's direction has it: t = 1 is data."""

    def __init__(self, gaussian):
        super().__init__()
        self.gaussian = gaussian

    def forward(self, x, tau):
        return -self.gaussian.velocity(x, 1 - tau)


@given(seed=seeds)
@settings(max_examples=3)
def test_a_network_of_the_other_direction_flows_to_the_same_data(seed):
    exact = Gaussian.random(PRESETS["linear"], seed)
    noise = normal(seed, 16, 3)
    model = adapt(OfGaussian(exact), {"tau": "1 - t"}, factor=-1.0)
    end = VelocityFlow(FlowMap(model, LinearSchedule(), MeanFlowStatistic()).velocity).sample(
        noise, steps=100
    )
    one, zero = torch.ones(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    torch.testing.assert_close(end, exact.transported(noise, one, zero), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "loss_fn",
    [CrossFlowLoss(), MeanFlowLoss(), ImprovedMeanFlowLoss(), FlowMatchingLoss()],
    ids=lambda loss_fn: type(loss_fn).__name__,
)
def test_a_unet_of_diffusers_trains_under_every_objective_and_samples(loss_fn):
    model = adapt(unet(), added="t - s")
    z, cond = torch.randn(4, 2, 4, 4), {"class_labels": torch.tensor([0, 1, 2, 3])}
    out = loss_fn(model, z, cond=cond)
    out.loss.mean().backward()
    assert out.loss.shape == (4,) and bool(out.loss.isfinite().all())
    assert model.network.conv_in.weight.grad.abs().sum() > 0
    assert loss_fn.flow_map(model).sample(z, cond=cond, steps=2).shape == z.shape


# --- an added time


@pytest.mark.parametrize("build", [unet, dit], ids=["unet", "dit"])
def test_an_added_time_changes_nothing_until_it_is_trained(build):
    network = build()
    z, t, s = torch.randn(3, 2, 4, 4), T_.float(), S_.float()
    before = network(z, timestep=1000 * t, class_labels=LABELS).sample
    model = adapt(network, names={"labels": "class_labels"}, added="t - s")
    assert torch.equal(model(z, t, s, labels=LABELS), before)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(z, t, s, labels=LABELS).square().mean().backward()
    assert model.added.second.weight.grad.abs().sum() > 0
    optimizer.step()
    here, there = (model(z, t, x, labels=LABELS) for x in (s, t))
    assert torch.equal(here[1], there[1])  # its s is t already
    assert not torch.equal(here[0], there[0])


def test_a_copy_adds_its_own_time():
    """As a running average of the weights has it."""
    model = adapt(sit(), {"t": "t"}, added="t - s")
    average = copy.deepcopy(model)
    awake(model.added)
    z = normal(0, 3, 3)
    still = sit()(z, T_, LABELS)
    torch.testing.assert_close(average(z, T_, S_, y=LABELS), still)
    assert not torch.equal(model(z, T_, S_, y=LABELS), still)


@pytest.mark.parametrize("build", [unet, dit], ids=["unet", "dit"])
def test_blocks_that_are_run_again_in_the_backward_pass_know_the_added_time(build):
    model = adapt(build(), names={"labels": "class_labels"}, added="t - s").train()
    awake(model.added)
    z, t, s = torch.randn(3, 2, 4, 4), T_.float(), S_.float()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(0)
        model(z, t, s, labels=LABELS).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.enable_gradient_checkpointing()
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
    with pytest.raises(InputError, match="outside of the adapted model"):
        model.network(z, 1000 * t, class_labels=LABELS)


def test_a_block_that_is_run_again_without_the_added_time_is_refused():
    model = adapt(dit(), names={"labels": "class_labels"}, added="t - s").train()
    model.network.enable_gradient_checkpointing()
    out = model(torch.randn(3, 2, 4, 4), T_.float(), S_.float(), labels=LABELS)
    with pytest.raises(InputError, match=r"adapted\.enable_gradient_checkpointing"):
        out.sum().backward()


# --- precision, names, compilation


def test_states_are_cast_to_bfloat16_weights_and_times_are_not():
    model = adapt(unet().bfloat16(), names={"labels": "class_labels"})
    z, s = torch.randn(2, 2, 4, 4), torch.zeros(2)
    seen = []
    model.network.register_forward_pre_hook(
        lambda _, inputs, named: seen.append((inputs[0].dtype, named["timestep"])),
        with_kwargs=True,
    )
    out = model(z, torch.tensor([0.999, 1.0]), s, labels=torch.tensor([0, 1]))
    assert out.dtype == torch.float32
    [(dtype, times)] = seen
    assert dtype == torch.bfloat16 and times.tolist() == pytest.approx([999.0, 1000.0])
    loss = CrossFlowLoss()(model, z, cond={"labels": torch.tensor([0, 1])}).loss
    assert loss.dtype == torch.float32 and bool(loss.isfinite().all())


class OfContext(nn.Module):
    """Remembers what it is given; its first parameter is no real number."""

    def __init__(self):
        super().__init__()
        self.count = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

    def forward(self, x, t, s, **given):
        self.given = given | {"t": t, "x": x}
        return [x * self.weight]


def test_conditions_of_several_axes_are_cast_and_those_of_one_are_not():
    model = adapt(OfContext())
    cond = {
        "context": torch.randn(3, 2, 4),
        "places": torch.ones(3, 2, dtype=torch.int64),
        "scale": torch.tensor([999.0, 1000.0, 1001.0]),
        "words": ["one", "two", "three"],
    }
    out = model(torch.randn(3, 3), T_.float(), S_.float(), **cond)
    assert out.dtype == torch.float32
    given = model.network.given
    assert given["x"].dtype == given["context"].dtype == torch.bfloat16
    assert given["t"].dtype == torch.float32
    for name in ("places", "scale", "words"):
        assert given[name] is cond[name]


def test_a_network_that_names_its_precision_gets_states_of_it():
    """As diffusers' do, whose first weight may be one that is kept in float32."""
    network = Average().float()
    network.dtype = torch.bfloat16
    network.forward = lambda x, t, s: x
    seen = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    assert adapt(network, {"t": "t", "s": "s"})(normal(0, 3, 3), T_, S_).dtype == torch.float32
    assert seen == [torch.bfloat16]


class Uneven(nn.Module):
    """The embedding of its time has layers of two widths, and another precision than they."""

    def __init__(self):
        super().__init__()
        self.t_embedder = nn.Sequential(nn.Linear(1, 16), nn.Linear(16, 3))
        self.last = nn.Linear(3, 3).bfloat16()

    def forward(self, x, t):
        embedded = self.t_embedder(t[:, None])
        return self.last(x.to(embedded.dtype) + embedded).float()


def test_an_added_time_is_as_wide_as_the_embedding_and_of_its_precision():
    network = Uneven()
    network.t_embedder.register_forward_hook(lambda _, inputs, output: output.bfloat16())
    model = adapt(network, {"t": "t"}, added="t - s")
    z, t, s = torch.randn(3, 3), T_.float(), S_.float()
    still = model(z, t, s)
    assert model.added.second.weight.shape == (3, 3)
    awake(model.added)
    assert model(z, t, s).shape == still.shape and not torch.equal(model(z, t, s), still)


def test_a_model_that_is_called_within_its_own_call_adds_to_each_call_its_own_time():
    model = adapt(sit(), {"t": "t"}, added="t - s")
    awake(model.added)
    z, inner = normal(0, 3, 3), []

    def call_once(module, inputs):
        if not inner:
            inner.append(None)
            inner.append(model(z, S_, 0 * S_, y=LABELS))

    wanted = model(z, T_, S_, y=LABELS), model(z, S_, 0 * S_, y=LABELS)
    model.network.register_forward_pre_hook(call_once)
    assert torch.equal(model(z, T_, S_, y=LABELS), wanted[0])
    assert torch.equal(inner[1], wanted[1])


class Repeated(Average):
    _repeated_blocks = ("Block",)

    def forward(self, x, t, s):
        return self.average(x, t, s)

    def compile_repeated_blocks(self, **options):
        self.options = options


def test_blocks_that_a_network_names_itself_are_compiled_by_it():
    model = adapt(Repeated())
    assert model.compile_blocks(backend="eager") is model
    assert model.network.options == {"backend": "eager"}


def test_tensors_keep_their_names():
    network = unet()
    names = set(network.state_dict())
    model = adapt(network, added="t - s")
    assert set(network.state_dict()) == names
    added = {
        f"added.{layer}.{kind}" for layer in ("first", "second") for kind in ("weight", "bias")
    }
    assert set(model.state_dict()) == {f"network.{name}" for name in names} | added


COMPILED = {
    "dit": (
        lambda: adapt(dit(num_layers=1), names={"y": "class_labels"}, added="t - s"),
        (2, 4, 4),
    ),
    "sit": (lambda: adapt(sit().float(), {"t": "t"}, added="t - s"), (3,)),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", COMPILED)
def test_blocks_that_are_compiled_give_the_same_loss_and_gradient(name):
    """The added time is known inside of a block too, which is where DiT's embeddings are."""
    build, shape = COMPILED[name]
    model, z, found, graphs = build(), torch.randn(3, *shape), [], []
    awake(model.added)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for _ in range(2):
        model.zero_grad()
        times = {"t": T_.float(), "s": S_.float()}
        out = MeanFlowLoss()(model, z, cond={"y": LABELS}, noise=z.flip(0), **times)
        out.loss.sum().backward()
        found.append((out.loss.detach(), model.added.first.weight.grad.clone()))
        model.compile_blocks(backend=backend)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)  # which round differently
    assert graphs or not follows_compiled()


def test_a_network_that_is_compiled_already_is_adapted_by_its_own_arguments():
    network = unet()
    compiled = adapt(torch.compile(network, backend="eager"), names={"labels": "class_labels"})
    assert compiled.times == adapt(network).times
    with pytest.raises(InputError, match="a state first and then timestep, classes by name"):
        adapt(torch.compile(network, backend="eager"), names={"labels": "classes"})


class OfTheHub(nn.Module, PyTorchModelHubMixin):
    """A user's own class around an adapted network."""

    def __init__(self, channels: int = 3):
        super().__init__()
        self.model = adapt(unet(in_channels=channels), added="t - s")

    def forward(self, z, t, s, **cond):
        return self.model(z, t, s, **cond)


def test_a_class_of_the_hub_with_an_adapted_network_is_saved_and_loaded(tmp_path):
    made = awake(OfTheHub(channels=2))
    made.save_pretrained(tmp_path)
    again = OfTheHub.from_pretrained(tmp_path)
    cond = {"class_labels": LABELS}
    z, t, s = torch.randn(3, 2, 4, 4), T_.float(), S_.float()
    assert torch.equal(again(z, t, s, **cond), made(z, t, s, **cond))


@pytest.mark.parametrize(
    "name",
    ["CrossFlowGenerator", "DiTDH", "PixelFlowTransformer", "PixelMeanFlowTransformer"],
)
def test_networks_of_flowspace_are_models_of_diffusers_which_share_themselves(name):
    """So none of them needs the hub's mixin."""
    pytest.importorskip("timm")
    network = getattr(vision, name)
    assert issubclass(network, diffusers.ModelMixin)
    assert callable(network.push_to_hub) and callable(network.from_pretrained)


# --- what does not fit


class Dictionary(nn.Module):
    def forward(self, x, t, s):
        return {"prediction": x}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: adapt(lambda z, t: z), "a function needs no adapter"),
        (lambda: adapt(sit()), r"do not tell their range; write times=\{'t': 't'\}"),
        (lambda: adapt(sit(), {"time": "t"}), "does not take a state first and then time by name"),
        (lambda: adapt(sit(), {"t": "t"}, names={"labels": "classes"}), "classes by name"),
        (lambda: adapt(XTH(), added="t - s"), "none is called time_embedding"),
        (lambda: adapt(unet(), added="t - s", added_to="embedding"), "write one of time_proj"),
        (lambda: adapt(unet(), added="t - s", added_to=""), "write one of .*class_embedding"),
        (lambda: adapt(unet(), names=["labels"]), r"got names = \['labels'\]"),
        (lambda: adapt(unet(), times=["timestep"]), r"got times = \['timestep'\]"),
        (lambda: adapt(unet(), output="sample"), "got output = 'sample'"),
        (lambda: adapt(unet(), added="t - s").add_time("s"), "an added time already"),
        (lambda: adapt(unet(), added="t - s", added_to="conv_act"), "without a linear layer"),
        (lambda: adapt(unet(), added_to="time_embedding"), "added='t - s' too"),
        (lambda: adapt(unet(), factor="-1"), "factor = '-1'"),
        (
            lambda: adapt(XTH()).enable_gradient_checkpointing(),
            "torch.utils.checkpoint themselves",
        ),
        (lambda: adapt(XTH()).compile_blocks(), r"write adapted\.compile\(\)"),
    ],
)
def test_what_cannot_be_adapted_is_one_clear_error(call, says):
    with pytest.raises(InputError, match=says):
        call()


@pytest.mark.parametrize(
    ("model", "cond", "says"),
    [
        (lambda: adapt(sit().float(), {"t": "t"}), {}, "missing a required argument: 'y'"),
        (lambda: adapt(sit().float(), {"t": "t"}), {"classes": LABELS}, "cannot be called with"),
        (lambda: adapt(Dictionary()), {}, r"out\['prediction'\]"),
    ],
)
def test_what_cannot_be_called_is_one_clear_error(model, cond, says):
    with pytest.raises(InputError, match=says):
        model()(torch.randn(3, 3), T_.float(), S_.float(), **cond)
    with pytest.raises(InputError, match=says):
        CrossFlowLoss()(model(), torch.randn(3, 3), cond=cond)


def test_a_message_names_eight_modules_at_most():
    network = sit()
    network.times = nn.ModuleList(nn.Identity() for _ in range(20))
    with pytest.raises(InputError) as caught:
        adapt(network, {"t": "t"}, added="t - s", added_to="time")
    assert len(str(caught.value).rpartition("write one of ")[2].split(", ")) == 8


def test_a_module_that_returns_another_shape_than_an_embedding_is_refused():
    model = adapt(unet(), names={"labels": "class_labels"}, added="t - s", added_to="mid_block")
    with pytest.raises(InputError, match="let added_to name a module that returns the embedding"):
        model(torch.randn(3, 2, 4, 4), T_.float(), S_.float(), labels=LABELS)
