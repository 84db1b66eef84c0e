"""The generator: the paper's sizes, its shapes, what it sees, and that the library's routes take
it as it is.
"""

import warnings

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("timm")

from dataclasses import replace

from torch.nn.attention import SDPBackend, sdpa_kernel

from flowspace import CrossFlowLoss, FiniteDifference, ForwardMode, InputError, SharedPrimal
from flowspace.vision import CrossFlowGenerator
from flowspace.vision.generator import CONDITIONS, HEADS, ConvolutionalHead
from flowspace.vision.layers import Norm, RotaryGrid, turned

SMALL = {"channels": 4, "grid": 4, "patch": 2, "classes": 5, "depth": 2, "width": 32, "heads": 4}


def small(**changes):
    torch.manual_seed(0)
    network = CrossFlowGenerator(**(SMALL | changes))
    torch.nn.init.normal_(network.head.weight, std=0.1)
    return network


def batch(rows=6, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(rows, 4, 4, 4, generator=draw, dtype=dtype)
    t = 0.1 + 0.9 * torch.rand(rows, generator=draw, dtype=dtype)
    return z, t, t * torch.rand(rows, generator=draw, dtype=dtype), torch.arange(rows) % 6


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize(
    ("name", "millions"), [("crossflow-b", 95), ("crossflow-l", 315), ("crossflow-xl", 461)]
)
def test_the_presets_have_the_papers_sizes(name, millions, mlp):
    with torch.device("meta"):
        network = CrossFlowGenerator.from_preset(name, mlp=mlp)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(millions * 1e6, rel=5e-3)
    width, depth = network.config["width"], network.config["depth"]
    matrices = sum(
        p.numel() for block in network.blocks for p in block.parameters() if p.ndim == 2
    )
    assert matrices == pytest.approx(12 * width**2 * depth, rel=2e-3)
    assert not [name for name, _ in network.named_parameters() if name.endswith("bias")]


def test_it_maps_a_latent_grid_to_an_image_of_256_pixels():
    with torch.device("meta"):
        network = CrossFlowGenerator.from_preset("crossflow-b", depth=1)
        latents, time, labels = (
            torch.empty(2, 32, 16, 16),
            torch.empty(2),
            torch.empty(2, dtype=torch.long),
        )
        assert network(latents, time, time, labels=labels).shape == (2, 3, 256, 256)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_it_sees_the_times_that_it_is_conditioned_on_and_no_others(condition):
    network, (z, t, s, y) = small(condition=condition), batch()
    base, other = network(z, t, s, labels=y), 0.5 * t
    sees_t = not torch.equal(base, network(z, other, s, labels=y))
    sees_s = not torch.equal(base, network(z, t, 0.5 * s, labels=y))
    assert (sees_t, sees_s) == {"s": (False, True), "t,s": (True, True), "t-s": (True, True)}[
        condition
    ]
    if condition == "t-s":
        torch.testing.assert_close(
            base, network(z, t + 0.1, s + 0.1, labels=y), rtol=1e-4, atol=1e-5
        )


def test_rows_do_not_mix_and_every_parameter_matters():
    network, (z, t, s, y) = small().double(), batch(dtype=torch.float64)
    whole = network(z, t, s, labels=y)
    for i in range(len(z)):
        torch.testing.assert_close(
            whole[i : i + 1],
            network(z[i : i + 1], t[i : i + 1], s[i : i + 1], labels=y[i : i + 1]),
        )
    whole.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_a_pair_of_equal_sides_is_the_square_to_the_bit():
    z, t, s, y = batch()
    assert torch.equal(small()(z, t, s, labels=y), small(grid=(4, 4))(z, t, s, labels=y))


def test_on_a_rectangle_each_cell_is_the_square_of_pixels_at_its_own_place():
    """Without blocks cells do not mix, so that what a cell moves is its own."""
    network, s = small(grid=(2, 5), depth=0, classes=0), torch.zeros(1)
    z = torch.randn(1, 4, 2, 5, generator=torch.Generator().manual_seed(0))
    assert network.latent_shape == z.shape[1:] and network(z, s, s).shape == (1, 3, 4, 10)
    other = z.clone()
    other[:, :, 1, 3] += 1
    moved = (network(z, s, s) != network(other, s, s)).any(1)[0]
    wanted = torch.zeros(4, 10, dtype=torch.bool)
    wanted[2:4, 6:8] = True
    assert torch.equal(moved, wanted)


def test_a_rectangle_is_saved_and_differentiated_like_a_square(tmp_path):
    network = small(grid=(2, 8), classes=0).double().eval()
    draw = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 3, 4, 2, 8, generator=draw, dtype=torch.float64)
    x = torch.randn(3, 3, 4, 16, generator=draw, dtype=torch.float64)
    t = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    found = [
        CrossFlowLoss(derivative=route)(network, z, x, noise=noise, t=t, s=t / 2)
        for route in (SharedPrimal(), ForwardMode())
    ]
    torch.testing.assert_close(found[0].target, found[1].target, rtol=1e-12, atol=1e-12)
    network.float().save_pretrained(tmp_path)
    again = CrossFlowGenerator.from_pretrained(tmp_path)
    one = torch.ones(3)
    assert torch.equal(again(z.float(), one, one), network(z.float(), one, one))


def test_tokens_before_the_cells_stay_and_cells_turn_as_complex_numbers():
    x = torch.randn(2, 3, 3 + 2 * 4, 8, generator=torch.Generator().manual_seed(0))
    found = turned(x, *RotaryGrid(8)(2, 4, torch.device("cpu"), before=3))
    rates = torch.tensor([1.0, 1e-2])
    angles = [torch.cat([row * rates, column * rates]) for row in range(2) for column in range(4)]
    turns = torch.polar(torch.ones(8, 4), torch.stack(angles))
    pairs = turns * torch.complex(x[:, :, 3:, :4], x[:, :, 3:, 4:])
    assert torch.equal(found[:, :, :3], x[:, :, :3])
    torch.testing.assert_close(found[:, :, 3:], torch.cat([pairs.real, pairs.imag], -1))


def test_rotary_positions_turn_by_the_distance_of_cells():
    """q and k turned at two cells have a product that depends on the difference of rows and
    columns alone.
    """
    cosine, sine = RotaryGrid(8)(4, 4, torch.device("cpu"))
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    def at(x, cell):
        return turned(x[None], cosine[cell], sine[cell])[0]

    def product(a, b):
        return at(q, 4 * a[0] + a[1]) @ at(k, 4 * b[0] + b[1])

    torch.testing.assert_close(product((0, 1), (2, 2)), product((1, 2), (3, 3)))
    assert (product((0, 1), (2, 2)) - product((0, 1), (2, 3))).abs() > 1e-3


def test_every_route_differentiates_it_in_one_objective():
    network, (z, t, s, y) = small().double(), batch(dtype=torch.float64)
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    loss_fn, noise = (
        CrossFlowLoss(),
        torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=z.dtype),
    )
    found = [
        replace(loss_fn, derivative=route)(
            network, z, x, noise=noise, t=t, s=s, cond={"labels": y}
        ).target
        for route in (SharedPrimal(), ForwardMode(), FiniteDifference(1e-4))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_changes_nothing():
    network, (z, t, s, y) = small(), batch()
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    gradients = []
    for on in (False, True):
        (network.enable_gradient_checkpointing if on else network.disable_gradient_checkpointing)()
        network.zero_grad()
        out = CrossFlowLoss()(
            network, z, x, t=t, s=s, cond={"labels": y}, generator=torch.Generator().manual_seed(0)
        )
        out.loss.mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def counting(graphs):
    """A backend of torch.compile that keeps what it was given and runs it as it is."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("way", ["compile_blocks", "compile_repeated_blocks"])
def test_equal_blocks_are_compiled_once_and_change_nothing(way):
    """The second name is diffusers'."""
    network, (z, t, s, y) = small(depth=5), batch()
    plain, graphs, names = network(z, t, s, labels=y), [], set(network.state_dict())
    getattr(network, way)(backend=counting(graphs), fullgraph=True)
    torch.testing.assert_close(network(z, t, s, labels=y), plain)
    assert len(graphs) == 1 and set(network.state_dict()) == names
    other = z.flip(0)
    torch.testing.assert_close(
        network(other, t, s, labels=y)[0], network(other[:1], t[:1], s[:1], labels=y[:1])[0]
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_loss_of_compiled_blocks_is_the_loss_of_eager_ones():
    (z, t, s, y), networks = batch(), (small(), small().compile_blocks(backend="aot_eager"))
    draw = torch.Generator().manual_seed(2)
    x, noise = torch.randn(6, 3, 8, 8, generator=draw), torch.randn(z.shape, generator=draw)
    gradients = []
    for network in networks:
        out = CrossFlowLoss()(network, z, x, t=t, s=s, noise=noise, cond={"labels": y})
        out.loss.mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path):
    network, (z, t, s, y) = small(mlp="gelu", condition="t,s").eval(), batch()
    network.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    again = CrossFlowGenerator.from_pretrained(tmp_path)
    assert torch.equal(network(z, t, s, labels=y), again(z, t, s, labels=y))
    assert dict(again.config)["condition"] == "t,s"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: CrossFlowGenerator.from_preset("crossflow-xxl"), "crossflow-xl"),
        (lambda: small(condition="s,t"), "'t,s'"),
        (lambda: small(mlp="relu"), "'swiglu' or 'gelu'"),
        (lambda: small(width=36), "multiple of 4 heads"),
        (lambda: small(head_kind="conv"), "'linear', 'convolutional'"),
        (lambda: convolutional(patch=6), "power of two"),
        (lambda: convolutional(patch=1), "power of two"),
        (lambda: small(grid=(4, 4, 4)), r"pair \(height, width\)"),
        (
            lambda: small()(
                torch.zeros(1, 4, 2, 8), *torch.ones(2, 1), labels=torch.zeros(1).long()
            ),
            "4 channels on 4 x 4",
        ),
        (
            lambda: small()(
                torch.zeros(1, 3, 4, 4), *torch.ones(2, 1), labels=torch.zeros(1).long()
            ),
            "takes 4 channels",
        ),
        (lambda: small()(torch.zeros(1, 4, 4, 4), *torch.ones(2, 1)), "got no labels"),
        (
            lambda: small(classes=0)(
                torch.zeros(1, 4, 4, 4), *torch.ones(2, 1), labels=torch.zeros(1).long()
            ),
            "without classes",
        ),
    ],
)
def test_misuse_is_one_clear_error(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_under_autocast_the_norms_stay_in_torchs_fused_kernel():
    """Which warns, and falls apart into many, where a weight has another dtype than what it
    multiplies.
    """
    norm = Norm(8)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        found = norm(x)
    wanted = (
        x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    )
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)


def convolutional(**changes):
    """A small generator whose convolutional head was moved away from the grey image."""
    torch.manual_seed(0)
    network = CrossFlowGenerator(**(SMALL | {"head_kind": "convolutional", "patch": 4} | changes))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.head.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.add_(noise / max(1, parameter[0].numel()) ** 0.5)
    return network


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_either_head_makes_images_of_one_size_and_begins_at_the_grey_one(head, patch):
    network = CrossFlowGenerator(**(SMALL | {"head_kind": head, "patch": patch}))
    z, t, s, labels = batch()
    assert torch.equal(network(z, t, s, labels=labels), torch.zeros(6, 3, 4 * patch, 4 * patch))


def test_a_convolutional_head_sees_across_the_borders_of_the_cells():
    """Without blocks cells do not mix before the head; one cell of sixteen is moved."""
    z, s = torch.zeros(1, 4, 4, 4), torch.zeros(1)
    z[:, :, :2] = 1
    other = z.clone()
    other[:, :, 1, 1] += 1
    for network, alone in (
        (convolutional(depth=0, classes=0), False),
        (small(depth=0, classes=0), True),
    ):
        moved = (network(z, s, s) != network(other, s, s)).any(1)[0]
        patch = network.config["patch"]
        inside = torch.zeros_like(moved)
        inside[patch : 2 * patch, patch : 2 * patch] = True
        assert moved[inside].any() and bool(moved[~inside].any()) is not alone


def test_a_stage_of_the_head_costs_about_as_much_as_the_next():
    """Half the channels at four times the places: multiply-adds of every stage but the last."""
    head = ConvolutionalHead(width=256, outputs=3, patch=16, channels=16)
    places, costs = 1, []
    for stage in head.stages:
        up = stage.up.weight.numel() * places
        places *= 4
        mixed = sum(p.numel() for p in stage.parameters() if p.ndim == 4) - stage.up.weight.numel()
        costs.append(up + mixed * places)
    first, *others = costs
    assert all(cost <= first for cost in others) and min(costs[1:-1]) >= 0.5 * first


@pytest.mark.parametrize("condition", ["s", "t,s"])
def test_the_derivative_goes_through_the_convolutional_head(condition):
    network = convolutional(condition=condition).double()
    z, t, s, labels = batch(dtype=torch.float64)

    def model(z, t, s):
        return network(z, t, s, labels=labels)

    tangents = (torch.randn_like(z), torch.ones_like(t), torch.zeros_like(s))
    with sdpa_kernel(SDPBackend.MATH):
        wanted = torch.func.jvp(model, (z, t, s), tangents)
    value, derivative = SharedPrimal()(model, (z, t, s), tangents)
    torch.testing.assert_close(value, wanted[0])
    torch.testing.assert_close(derivative, wanted[1], rtol=1e-10, atol=1e-10)
    assert derivative.abs().max() > 1e-2


def test_every_parameter_of_a_convolutional_head_matters_and_is_saved(tmp_path):
    network, (z, t, s, labels) = convolutional(), batch()
    image = network(z, t, s, labels=labels)
    image.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    network.save_pretrained(tmp_path)
    again = CrossFlowGenerator.from_pretrained(tmp_path)
    assert torch.equal(again(z, t, s, labels=labels), image)
