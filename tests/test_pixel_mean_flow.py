"""The network of pixel MeanFlow: the paper's sizes, what it sees, its two heads, and that the
library's routes take it as it is.
"""

import copy
import functools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("diffusers")
pytest.importorskip("timm")

from flowspace import (
    Adaptive,
    FlowMap,
    ForwardMode,
    InputError,
    LinearSchedule,
    MatchedStatistic,
    PixelMeanFlowLoss,
    RandomGuidance,
    SharedPrimal,
)
from flowspace.training import assign
from flowspace.vision import PixelMeanFlowTransformer

SMALL = {"size": 8, "patch": 2, "classes": 5, "depth": 4, "head_depth": 2}
SMALL |= {"width": 32, "heads": 4, "bottleneck": 6}
ROWS = 6
COMPILED = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def small(**changes):
    """A network away from its beginning, where its blocks do nothing and its images are grey."""
    torch.manual_seed(0)
    network = PixelMeanFlowTransformer(**(SMALL | changes))
    for name, parameter in network.named_parameters():
        if "gate" in name or "last" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def batch(dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(ROWS, 3, 8, 8, generator=draw, dtype=dtype)
    t = 0.1 + 0.9 * torch.rand(ROWS, generator=draw, dtype=dtype)
    s = t * torch.rand(ROWS, generator=draw, dtype=dtype)
    return images, t, torch.where(torch.arange(ROWS) < 3, t, s), torch.arange(ROWS) % 6


def told(dtype=torch.float32):
    """The guidance of each row."""
    return {
        "omega": torch.linspace(1, 7, ROWS, dtype=dtype),
        "t_min": torch.linspace(0, 0.5, ROWS, dtype=dtype),
        "t_max": torch.linspace(0.5, 1, ROWS, dtype=dtype),
    }


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("name", "millions"), [("b", 118), ("l", 410), ("h", 956)])
def test_the_presets_have_the_papers_sizes_once_the_second_head_is_gone(name, millions):
    with torch.device("meta"):
        network = PixelMeanFlowTransformer.from_preset(name, two_heads=False)
        trained = PixelMeanFlowTransformer.from_preset(name)
    assert parameters(network) == pytest.approx(millions * 1e6, rel=5e-3)
    second = parameters(trained.velocity_head)
    assert parameters(trained) == parameters(network) + second
    matrices = 12 * 8 * network.config["width"] ** 2
    assert second == pytest.approx(matrices, rel=2e-2)


@pytest.mark.parametrize(("size", "patch"), [(256, 16), (512, 32)])
def test_a_preset_has_256_cells_at_either_resolution(size, patch):
    with torch.device("meta"):
        network = PixelMeanFlowTransformer.from_preset("b", size, depth=1, head_depth=1)
        images, time = torch.empty(2, 3, size, size), torch.empty(2)
        made = network(images, time, time, labels=torch.empty(2, dtype=torch.long))
    assert network.config["patch"] == patch
    assert network.position.shape[1] == 20 + 256
    assert [image.shape for image in made] == [images.shape, images.shape]


def test_it_begins_at_the_grey_image_and_its_blocks_pass_their_input_on():
    torch.manual_seed(0)
    network, (z, t, s, y) = PixelMeanFlowTransformer(**SMALL), batch()
    for image in network(z, t, s, labels=y, **told()):
        assert torch.equal(image, torch.zeros_like(z))
    x = torch.randn(2, 36, 32)
    assert torch.equal(network.blocks[0](x, *network.rotary(4, 4, x.device, before=20)), x)


def test_it_sees_the_length_of_the_step_and_each_condition_and_not_t_itself():
    network, (z, t, s, y), cond = small().double(), batch(torch.float64), told(torch.float64)
    base = network(z, t, s, labels=y, **cond)[0]
    later = network(z, t + 0.1, s + 0.1, labels=y, **cond)[0]
    torch.testing.assert_close(base, later)
    for name, value in (cond | {"labels": y}).items():
        other = {"labels": y} | cond | {name: value.roll(1)}
        assert not torch.allclose(base, network(z, t, s, **other)[0])
    assert not torch.allclose(base, network(z, t, 0.5 * s, labels=y, **cond)[0])


def test_without_guidance_it_is_told_omega_1_on_the_whole_interval():
    network, (z, t, s, y) = small(), batch()
    whole = {"omega": torch.ones(ROWS), "t_min": torch.zeros(ROWS), "t_max": torch.ones(ROWS)}
    bare, full = network(z, t, s, labels=y), network(z, t, s, labels=y, **whole)
    assert torch.equal(bare[0], full[0]) and torch.equal(bare[1], full[1])


def test_context_tokens_stand_before_the_cells_as_many_as_asked_for():
    network, (z, t, s, y) = small(tokens=(3, 1, 1, 1, 2)), batch()
    assert network.position.shape[1] == 8 + 16
    assert small(classes=0, tokens=(3, 1, 1, 1, 2)).position.shape[1] == 5 + 16
    assert network(z, t, s, labels=y)[0].shape == z.shape


def test_context_tokens_stand_in_the_order_of_the_config():
    """The class first, then omega, t_min, t_max and the step, so many tokens as asked for each."""
    counts = {"label": 1, "omega": 2, "t_min": 3, "t_max": 4, "step": 5}
    network, (z, t, s, y) = small(tokens=tuple(counts.values())).double(), batch(torch.float64)
    seen = []
    network.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0][0, :15]))
    network(z, t, s, labels=y)
    wanted = []
    for place, (name, count) in enumerate(counts.items()):
        torch.nn.init.zeros_(network.token[name])
        network(z, t, s, labels=y)
        moved = (seen[-1] != seen[-2]).any(1)
        wanted.extend([place] * count)
        assert torch.equal(moved, torch.tensor(wanted + [-1] * (15 - len(wanted))) == place)


def test_the_null_class_is_given_only_where_it_was_trained():
    assert small(null_trained=True).without_velocity_head().require_null() == 5
    with pytest.raises(InputError, match="null_trained=True"):
        small().require_null()


def test_rows_do_not_mix_and_every_parameter_matters():
    network, (z, t, s, y) = small().double(), batch(torch.float64)
    whole = torch.cat(network(z, t, s, labels=y), 1)
    for i in range(ROWS):
        one = slice(i, i + 1)
        alone = torch.cat(network(z[one], t[one], s[one], labels=y[one]), 1)
        torch.testing.assert_close(whole[one], alone)
    for head, images in zip(("image_head", "velocity_head"), whole.chunk(2, 1), strict=True):
        network.zero_grad()
        images.square().sum().backward(retain_graph=True)
        for name, parameter in network.named_parameters():
            if "_head." not in name or name.startswith(head):
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_cell_becomes_the_square_of_pixels_at_its_own_place():
    """Without gates cells do not mix, so that what a cell moves is its own."""
    network, (z, t, s, y) = small(), batch()
    for name, parameter in network.named_parameters():
        if "gate" in name:
            torch.nn.init.zeros_(parameter)
    other = z.clone()
    other[:, :, 2:4, 6:8] += 1
    wanted = torch.zeros(8, 8, dtype=torch.bool)
    wanted[2:4, 6:8] = True
    for a, b in zip(network(z, t, s, labels=y), network(other, t, s, labels=y), strict=True):
        assert torch.equal((a != b).any(1)[0], wanted)


def test_the_second_head_is_dropped_and_nothing_else_changes():
    network, (z, t, s, y) = small().double().eval(), batch(torch.float64)
    sampled = network.without_velocity_head()
    assert torch.equal(sampled(z, t, s, labels=y), network(z, t, s, labels=y)[0])
    own = network.state_dict()
    for name, value in sampled.state_dict().items():
        assert torch.equal(value, own[name]) and value.data_ptr() != own[name].data_ptr()
    left = {name for name in own if name not in sampled.state_dict()}
    assert {name.split(".")[0] for name in left} == {"velocity_head"}
    assert not sampled.training and sampled.config["two_heads"] is False


def loss_of(network, cond, dtype=torch.float64, **settings):
    """The objective as it is trained, along the second head's velocity."""
    z, t, s, _ = batch(dtype)
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(z.shape, generator=draw, dtype=dtype)
    settings = {"head": True, "penalty": Adaptive()} | settings
    return PixelMeanFlowLoss(**settings)(network, z, noise=noise, t=t, s=s, cond=cond)


def test_the_carried_derivative_is_forward_modes():
    network, (z, t, s, y) = small().double(), batch(torch.float64)
    cond = {"labels": y} | told(torch.float64)
    tangents = (torch.randn_like(z), torch.ones_like(t), torch.zeros_like(s))

    def average_velocity(z, t, s):
        return (z - network(z, t, s, **cond)[0]) / t[:, None, None, None]

    shared = SharedPrimal()(average_velocity, (z, t, s), tangents)
    _, forward = ForwardMode()(average_velocity, (z, t, s), tangents)
    torch.testing.assert_close(shared[1], forward, rtol=1e-10, atol=1e-10)
    assert forward.abs().max() > 0.1


def test_the_objective_is_the_same_by_either_route():
    network, (_, _, _, y) = small().double(), batch(torch.float64)
    cond = {"labels": y} | told(torch.float64)
    shared, forward = (
        loss_of(network, cond, derivative=route) for route in (SharedPrimal(), ForwardMode())
    )
    torch.testing.assert_close(shared.target, forward.target, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(shared.loss, forward.loss, rtol=1e-10, atol=1e-10)


def test_the_loss_is_the_papers_written_out():
    """u = (z - f)/t, V = u + (t - s) D u along the second head's v; |V - v|^2 and |v' - v|^2."""
    network, (x, t, s, y) = small().double(), batch(torch.float64)
    cond = {"labels": y}
    out = loss_of(network, cond)
    column = t[:, None, None, None]
    noise = (out.z_t - (1 - column) * x) / column
    given = noise - x

    def velocity(index, z, t, s):
        return (z - network(z, t, s, **cond)[index]) / t[:, None, None, None]

    own = velocity(1, out.z_t, t, t)
    tangents = (own, torch.ones_like(t), torch.zeros_like(s))
    with sdpa_kernel(SDPBackend.MATH):
        u, slope = torch.func.jvp(functools.partial(velocity, 0), (out.z_t, t, s), tangents)
    compound = u + (t - s)[:, None, None, None] * slope
    wanted = torch.zeros(ROWS, dtype=torch.float64)
    for error in (compound - given, velocity(1, out.z_t, t, s) - given):
        square = error.square().flatten(1).sum(1)
        wanted = wanted + square / (square + 0.01)
    torch.testing.assert_close(out.loss, wanted, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(out.prediction, network(out.z_t, t, s, **cond)[0])


def test_it_trains_under_guidance_drawn_for_each_row():
    network, (x, t, s, y) = small(), batch()
    guidance = RandomGuidance(null={"labels": 5}, largest=7.0)
    out = PixelMeanFlowLoss(head=True, guidance=guidance)(
        network, x, t=t, s=s, cond={"labels": y}, generator=torch.Generator().manual_seed(0)
    )
    out.loss.mean().backward()
    for name in ("omega", "t_min", "t_max", "step"):
        assert network.scalars[name].second.weight.grad.abs().sum() > 0, name


@COMPILED
def test_compiled_blocks_are_one_graph_and_give_the_same_losses():
    graphs, (_, _, _, y) = [], batch()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    network = small()
    compiled = copy.deepcopy(network)
    names = set(compiled.state_dict())
    compiled.compile_blocks(backend=backend, fullgraph=True)
    z, t, s, y = batch()
    torch.testing.assert_close(compiled(z, t, s, labels=y), network(z, t, s, labels=y))
    assert len(graphs) == 1 and set(compiled.state_dict()) == names


@COMPILED
@pytest.mark.parametrize("half", [False, True])
def test_a_step_of_compiled_blocks_is_the_step_of_eager_ones(half):
    (_, _, _, y), network = batch(), small(depth=1, head_depth=1)
    compiled = copy.deepcopy(network).compile_blocks(backend="aot_eager")
    found = []
    for net in (network, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = loss_of(net, {"labels": y} | told(), torch.float32)
        out.loss.mean().backward()
        found.append([out.target, out.loss.detach(), *(p.grad for p in net.parameters())])
    tolerance = 1e-4
    if half:
        tolerance = 3e-2
    for a, b in zip(*found, strict=True):
        scale = float(a.abs().max())
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * max(scale, 1e-6))


def test_in_bfloat16_the_derivative_is_near_that_of_float32():
    network, (_, _, _, y) = small(), batch()
    cond = {"labels": y} | told()
    plain = loss_of(network, cond, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss_of(network, cond, torch.float32)
    assert rounded.target.dtype == torch.float32
    error = (rounded.target - plain.target).norm() / plain.target.norm()
    assert 0 < error < 0.05


def test_activation_checkpointing_changes_nothing():
    network, (_, _, _, y) = small(), batch()
    gradients = []
    for switch in (network.disable_gradient_checkpointing, network.enable_gradient_checkpointing):
        switch()
        network.zero_grad()
        loss_of(network, {"labels": y}, torch.float32).loss.mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_its_images_are_samples_after_one_step_and_after_many():
    """One step is the prediction at (1, 0); the step of MatchedStatistic is pixel MeanFlow's."""
    network, (noise, t, _, y) = small().double().eval(), batch(torch.float64)
    sampled = network.without_velocity_head()
    flow_map = FlowMap(sampled, LinearSchedule(), MatchedStatistic())
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    made = flow_map.sample(noise, cond={"labels": y}, steps=1)
    torch.testing.assert_close(made, network(noise, one, zero, labels=y)[0])
    half = 0.5 * one
    first = network(noise, one, half, labels=y)[0]
    middle = noise - 0.5 * (noise - first)
    last = network(middle, half, zero, labels=y)[0]
    twice = flow_map.sample(noise, cond={"labels": y}, steps=2)
    torch.testing.assert_close(twice, last)


def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path):
    network, (z, t, s, y) = small().eval(), batch()
    for index, part in enumerate((network, network.without_velocity_head())):
        folder = tmp_path / str(index)
        part.save_pretrained(folder)
        again = PixelMeanFlowTransformer.from_pretrained(folder)
        assert dict(again.config)["two_heads"] is (index == 0)
        pair = zip([part(z, t, s, labels=y)], [again(z, t, s, labels=y)], strict=True)
        for a, b in pair:
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_muon_takes_the_matrices_of_trunk_and_heads():
    groups = assign(small(), ("blocks", "image_head", "velocity_head", "scalars"))
    assert "image_head.last.weight" in groups["muon"]
    assert "velocity_head.blocks.1.qkv.weight" in groups["muon"]
    left = {"label.weight", "position", "embed.down.weight", "token.omega"}
    assert left <= set(groups["adamw"])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: PixelMeanFlowTransformer.from_preset("xl"), "write one of b, l, h"),
        (lambda: small(size=9), "multiple of the patch"),
        (lambda: small(tokens=(1, 2)), "a number for each of label, omega"),
        (lambda: small(width=36), "multiple of 4 heads"),
        (lambda: small(head_depth=5), "1 <= head_depth <= depth"),
        (lambda: small()(torch.zeros(1, 1, 8, 8), *torch.ones(2, 1)), r"takes \(3, 8, 8\)"),
        (lambda: small()(torch.zeros(1, 3, 8, 8), *torch.ones(2, 1)), "got no labels"),
        (
            lambda: small(classes=0)(
                torch.zeros(1, 3, 8, 8), *torch.ones(2, 1), labels=torch.zeros(1).long()
            ),
            "without classes",
        ),
    ],
)
def test_misuse_is_one_clear_error(call, says):
    with pytest.raises(InputError, match=says):
        call()
