"""DiT^DH: the published sizes, what it sees, MeanFlow's form of a flow-matching network, and that
the library's routes take it as it is.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("diffusers")
pytest.importorskip("timm")

from flowspace import (
    FiniteDifference,
    FlowMatchingLoss,
    ForwardMode,
    InputError,
    MeanFlowDistillationLoss,
    MeanFlowLoss,
    RunError,
    SharedPrimal,
)
from flowspace.vision import CrossFlowGenerator, DiTDH
from flowspace.vision.dit_dh import SIZES
from flowspace.vision.layers import FourierEmbedding, sines_of_grid

SMALL = {
    "channels": 6,
    "grid": 4,
    "classes": 5,
    "depth": 2,
    "width": 32,
    "heads": 4,
    "head_width": 48,
    "head_heads": 4,
}


def small(trained=True, **changes):
    """A small network; a trained one has no zeros left but those of the new embedding."""
    torch.manual_seed(0)
    network = DiTDH(**(SMALL | changes))
    if trained:
        for name, weight in network.named_parameters():
            if "modulation" in name or name.startswith("last."):
                torch.nn.init.normal_(weight, std=0.2)
    return network


def train_difference(network):
    torch.nn.init.normal_(network.difference.second.weight, std=0.3)
    return network


def batch(rows=6, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(rows, 6, 4, 4, generator=draw, dtype=dtype)
    t = 0.1 + 0.9 * torch.rand(rows, generator=draw, dtype=dtype)
    return z, t, t * torch.rand(rows, generator=draw, dtype=dtype), torch.arange(rows) % 6


# --- the published network ---------------------------------------------------------------------


@pytest.mark.parametrize(("average", "millions"), [(False, 839), (True, 841)])
def test_the_large_one_has_the_published_number_of_parameters(average, millions):
    with torch.device("meta"):
        network = DiTDH.from_preset("xl", average=average)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == pytest.approx(millions * 1e6, rel=5e-3)
    assert network.latent_shape == (768, 16, 16)


@pytest.mark.parametrize(("name", "wide"), [("s", 64), ("b", 64), ("xl", 72)])
def test_a_head_of_a_preset_is_as_wide_as_that_of_dit(name, wide):
    assert SIZES[name]["width"] == wide * SIZES[name]["heads"]


@pytest.mark.parametrize("name", ["s", "b", "xl"])
def test_a_preset_counts_as_its_matrices_do(name):
    """18 d^2 numbers in a block: 4 of attention, 8 of the MLP, 6 of its modulation."""
    with torch.device("meta"):
        network = DiTDH.from_preset(name)
    c = network.config
    encoder = 18 * c["depth"] * c["width"] ** 2
    head = 18 * c["head_depth"] * c["head_width"] ** 2
    matrices = [
        parameter.numel()
        for blocks in (network.blocks, network.head_blocks)
        for parameter in blocks.parameters()
        if parameter.ndim == 2
    ]
    assert (c["head_depth"], c["head_width"], c["head_heads"]) == (2, 2048, 16)
    assert sum(matrices) == pytest.approx(encoder + head, rel=1e-3)


def rotated(x):
    """Pairs (i, i + half) as complex numbers, turned by row or column times 1e4^(-k/n)."""
    half = x.shape[-1] // 2
    rates = 1e4 ** (-torch.arange(half // 2, dtype=x.dtype) / (half // 2))
    turned = torch.empty_like(x)
    for cell in range(16):
        angle = torch.cat([cell // 4 * rates, cell % 4 * rates])
        pair = torch.complex(x[:, :, cell, :half], x[:, :, cell, half:])
        pair = pair * torch.polar(torch.ones_like(angle), angle)
        turned[:, :, cell] = torch.cat([pair.real, pair.imag], -1)
    return turned


def placed(cells):
    """Add sines and cosines of column and row, cell by cell."""
    quarter = cells.shape[-1] // 4
    rates = 1e4 ** (-torch.arange(quarter, dtype=cells.dtype) / quarter)
    for cell in range(16):
        column, row = cell % 4 * rates, cell // 4 * rates
        cells[:, cell] += torch.cat([column.sin(), column.cos(), row.sin(), row.cos()])
    return cells


class ByHand:
    """The network once more, written from the papers in plain products."""

    def __init__(self, weights, turn=rotated):
        self.weights, self.turn = weights, turn

    def __call__(self, z, t, s, y):
        time = self.embedded("time", t)
        if "difference.frequencies" in self.weights:
            time = time + self.embedded("difference", t - s)
        cells = z.flatten(2).mT
        h = placed(self.linear("embed", cells))
        c = F.silu(time + self.weights["label.weight"][y])[:, None]
        for i in range(2):
            h = self.block(f"blocks.{i}", h, c)
        c = self.linear("project", F.silu(time[:, None] + h))
        x = self.linear("head_embed", cells)
        for i in range(2):
            x = self.block(f"head_blocks.{i}", x, c)
        shift, scale = self.linear("last.modulation", F.silu(c)).chunk(2, -1)
        x = self.linear("last.linear", self.norm("last.norm", x) * (1 + scale) + shift)
        return x.mT.reshape(z.shape)

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].mT + self.weights[f"{name}.bias"]

    def embedded(self, name, time):
        angle = 2 * math.pi * time[:, None] * self.weights[f"{name}.frequencies"]
        hidden = self.linear(f"{name}.first", torch.cat([angle.sin(), angle.cos()], 1))
        return self.linear(f"{name}.second", F.silu(hidden))

    def norm(self, name, x):
        size = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x / size * self.weights[f"{name}.weight"]

    def block(self, name, x, condition):
        found = self.linear(f"{name}.modulation", F.silu(condition)).chunk(6, -1)
        inside = self.norm(f"{name}.norm1", x) * (1 + found[1]) + found[0]
        q, k, v = self.linear(f"{name}.qkv", inside).unflatten(2, (3, 4, -1)).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = self.turn(q) @ self.turn(k).mT / q.shape[-1] ** 0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + found[2] * self.linear(f"{name}.proj", mixed)
        inside = self.norm(f"{name}.norm2", x) * (1 + found[4]) + found[3]
        gate = self.linear(f"{name}.mlp.fc1_g", inside)
        value = self.linear(f"{name}.mlp.fc1_x", inside)
        return x + found[5] * self.linear(f"{name}.mlp.fc2", F.silu(gate) * value)


@pytest.mark.parametrize("average", [False, True])
def test_it_is_the_network_of_the_papers(average):
    network = small(average=average).double()
    if average:
        train_difference(network)
    z, t, s, y = batch(dtype=torch.float64)
    found = network(z, t, s, labels=y)
    wanted = ByHand(network.state_dict())(z, t, s, y)
    # Rotary and fixed positions are formed in float32.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert found.std() > 0.1


def test_it_begins_at_a_velocity_of_zero_and_its_frequencies_are_not_trained():
    z, t, s, y = batch()
    network = small(trained=False)
    assert torch.equal(network(z, t, s, labels=y), torch.zeros_like(z))
    assert "time.frequencies" not in dict(network.named_parameters())
    assert "time.frequencies" in network.state_dict()


def test_both_embeddings_of_cells_begin_as_xavier_says():
    network = small(trained=False)
    for layer in (network.embed, network.head_embed):
        inputs, outputs = layer.in_features, layer.out_features
        bound = math.sqrt(6 / (inputs + outputs))
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


def test_without_classes_it_is_the_network_whose_label_is_embedded_by_zeros():
    z, t, s, y = batch()
    alone, labelled = small(classes=0), small()
    labelled.load_state_dict(alone.state_dict(), strict=False)
    torch.nn.init.zeros_(labelled.label.weight)
    torch.testing.assert_close(alone(z, t, s), labelled(z, t, s, labels=y))


def test_under_autocast_the_residual_streams_keep_the_precision_of_the_weights():
    network, seen = small(), []
    for block in (network.blocks[0], network.head_blocks[0]):
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    z, t, s, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        network(z, t, s, labels=y)
    assert seen == [torch.float32] * 2


def test_positions_tell_cells_apart_and_columns_come_first():
    found = sines_of_grid(2, 3, 8, torch.device("cpu"))
    assert found.shape == (6, 8) and len(found.unique(dim=0)) == 6
    assert torch.equal(found[0, :4], found[3, :4]) and torch.equal(found[0, 4:], found[1, 4:])


def test_times_are_embedded_in_their_own_precision():
    embedding = FourierEmbedding(8).double()
    time = torch.tensor([0.3], dtype=torch.float64)
    step = 1e-9  # lost in float32
    assert not torch.equal(embedding(time), embedding(time + step))


# --- what it sees ------------------------------------------------------------------------------


def test_flow_matching_ignores_s_and_mean_flow_sees_t_and_the_difference():
    z, t, s, y = batch()
    plain, average = small(), train_difference(small(average=True))
    base = plain(z, t, s, labels=y)
    assert torch.equal(base, plain(z, t, labels=y))
    assert not torch.equal(base, plain(z, 0.5 * t, s, labels=y))
    base = average(z, t, s, labels=y)
    assert not torch.equal(base, average(z, t, 0.5 * s, labels=y))
    assert not torch.equal(base, average(z, t + 0.1, s + 0.1, labels=y))
    assert torch.equal(average(z, t, labels=y), average(z, t, t, labels=y))


def test_rows_do_not_mix_and_every_parameter_matters():
    network = train_difference(small(average=True)).double()
    z, t, s, y = batch(dtype=torch.float64)
    whole = network(z, t, s, labels=y)
    for i in range(len(z)):
        row = slice(i, i + 1)
        alone = network(z[row], t[row], s[row], labels=y[row])
        torch.testing.assert_close(whole[row], alone)
    whole.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_on_a_rectangle_without_blocks_each_cell_moves_alone():
    network = small(grid=(2, 5), depth=0, head_depth=0, classes=0)
    z, t = torch.randn(1, 6, 2, 5, generator=torch.Generator().manual_seed(0)), torch.ones(1)
    other = z.clone()
    other[:, :, 1, 3] += 1
    moved = (network(z, t) != network(other, t)).any(1)[0]
    wanted = torch.zeros(2, 5, dtype=torch.bool)
    wanted[1, 3] = True
    assert torch.equal(moved, wanted)


# --- MeanFlow's form of a flow-matching network ------------------------------------------------


@pytest.mark.parametrize("in_folder", [False, True])
def test_mean_flows_form_of_a_flow_matching_network_returns_the_same_for_all_s(
    in_folder, tmp_path
):
    teacher, (z, t, s, y) = small().eval(), batch()
    source = teacher
    if in_folder:
        teacher.save_pretrained(tmp_path)
        source = tmp_path
    student = DiTDH.from_flow_matching(source, width=32, grid=4)
    wanted = teacher(z, t, labels=y)
    for destination in (torch.zeros(6), s, t):
        assert torch.equal(student(z, t, destination, labels=y), wanted)
    student(z, t, s, labels=y).square().sum().backward()
    assert student.difference.second.weight.grad.abs().sum() > 0
    with torch.no_grad():
        student.embed.weight.add_(1)
    assert torch.equal(teacher(z, t, labels=y), wanted)


def test_weights_of_other_sizes_are_one_error_that_names_both(tmp_path):
    small().save_pretrained(tmp_path)
    wanted = {"width": 64, "depth": 3, "channels": 6}
    with pytest.raises(InputError, match="width = 32, depth = 2, where width = 64, depth = 3"):
        DiTDH.from_flow_matching(tmp_path, **wanted)
    with pytest.raises(InputError, match="breadth = 3, which DiTDH does not take"):
        DiTDH.from_flow_matching(tmp_path, breadth=3)
    with pytest.raises(InputError, match="of average velocities already"):
        DiTDH.from_flow_matching(small(average=True))
    assert DiTDH.from_flow_matching(small(grid=(4, 4)), grid=[4, 4]).latent_shape == (6, 4, 4)


def test_a_folder_of_another_network_is_refused(tmp_path):
    CrossFlowGenerator(channels=6, grid=4, patch=2, depth=1, width=32, heads=4).save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match="CrossFlowGenerator, not of DiTDH"):
        DiTDH.from_flow_matching(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["_class_name"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="no network that was saved"):
        DiTDH.from_flow_matching(tmp_path)


def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path):
    network, (z, t, s, y) = train_difference(small(average=True)).eval(), batch()
    network.save_pretrained(tmp_path)
    again = DiTDH.from_pretrained(tmp_path)
    assert torch.equal(network(z, t, s, labels=y), again(z, t, s, labels=y))
    assert dict(again.config)["average"] is True


# --- the layout of RAE's code ------------------------------------------------------------------


def published(average):
    """Random weights of the small network, by the names and shapes of RAE's own code."""
    shapes = {
        "s_embedder.proj.weight": (32, 6, 1, 1),
        "s_embedder.proj.bias": (32,),
        "x_embedder.proj.weight": (48, 6, 1, 1),
        "x_embedder.proj.bias": (48,),
        "s_projector.weight": (48, 32),
        "s_projector.bias": (48,),
        "y_embedder.embedding_table.weight": (6, 32),
        "final_layer.norm_final.weight": (48,),
        "final_layer.linear.weight": (6, 48),
        "final_layer.linear.bias": (6,),
        "final_layer.adaLN_modulation.1.weight": (96, 48),
        "final_layer.adaLN_modulation.1.bias": (96,),
        "enc_feat_rope.freqs_cos": (16, 8),
        "dec_feat_rope.freqs_cos": (16, 12),
    }
    for name in ("t_embedder", "r_embedder")[: 1 + average]:
        shapes |= {f"{name}.W": (256,), f"{name}.mlp.0.weight": (32, 512)}
        shapes |= {f"{name}.mlp.0.bias": (32,), f"{name}.mlp.2.weight": (32, 32)}
        shapes |= {f"{name}.mlp.2.bias": (32,)}
    for i, d in enumerate((32, 32, 48, 48)):
        layers = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "adaLN_modulation.1": (6 * d, d)}
        layers |= {"mlp.w12": (2 * (8 * d // 3), d), "mlp.w3": (d, 8 * d // 3)}
        for name, shape in layers.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        shapes |= {f"blocks.{i}.norm1.weight": (d,), f"blocks.{i}.norm2.weight": (d,)}
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = 0.2 * torch.randn(shape, generator=draw)
    tensors["pos_embed"] = placed(torch.zeros(1, 16, 32))
    return tensors


def by_our_names(tensors):
    """The same, q and k in the order in which they are, so that neighbours turn together."""
    pairs = [
        ("s_embedder.proj", "embed"),
        ("x_embedder.proj", "head_embed"),
        ("s_projector", "project"),
        ("y_embedder.embedding_table", "label"),
        ("t_embedder.W", "time.frequencies"),
        ("r_embedder.W", "difference.frequencies"),
        ("t_embedder", "time"),
        ("r_embedder", "difference"),
        ("final_layer.", "last."),
        ("norm_final", "norm"),
        ("adaLN_modulation.1", "modulation"),
        ("attn.", ""),
        ("blocks.2.", "head_blocks.0."),
        ("blocks.3.", "head_blocks.1."),
        ("mlp.0", "first"),
        ("mlp.2", "second"),
        ("mlp.w3", "mlp.fc2"),
    ]
    found = {}
    for name, value in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        if "mlp.w12" in name:
            gate, linear = value.double().chunk(2)
            found[name.replace("w12", "fc1_g")] = gate
            found[name.replace("w12", "fc1_x")] = linear
        else:
            found[name] = value.double().squeeze()
    return found


def rotated_neighbours(x):
    """Pairs (2 i, 2 i + 1) as complex numbers, turned as `rotated` turns (i, i + half)."""
    halves = torch.cat([x[..., ::2], x[..., 1::2]], -1)
    return rotated(halves).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize("average", [False, True])
def test_weights_of_raes_code_are_the_network_that_turns_neighbours(average, tmp_path):
    tensors = published(average)
    torch.save(tensors, tmp_path / "stage2_model.pt")
    network = DiTDH.from_published(tmp_path / "stage2_model.pt").double()
    z, t, s, y = batch(dtype=torch.float64)
    wanted = ByHand(by_our_names(tensors), rotated_neighbours)(z, t, s, y)
    torch.testing.assert_close(network(z, t, s, labels=y), wanted, rtol=1e-5, atol=1e-5)
    assert network.config["average"] is average and network.require_null() == 5
    assert wanted.std() > 0.1


def test_what_is_not_in_raes_layout_is_one_clear_error(tmp_path):
    path, tensors = tmp_path / "weights.pt", published(False)
    for name, value, says in (
        ("blocks.1.mlp.w3.weight", None, "mlp.fc2"),
        ("s_embedder.proj.weight", None, "s_embedder"),
        ("blocks.1.attn.proj.bias", torch.zeros(3), r"blocks\.1\.proj"),
        ("something.weight", torch.zeros(3), "something"),
        ("pos_embed", torch.zeros(1, 16, 32), "other positions"),
        ("pos_embed", torch.zeros(16), "tuple index out of range"),
        ("enc_feat_rope.freqs_cos", torch.zeros(16, 6), "width = 32, heads = 5"),
    ):
        changed = {key: tensor for key, tensor in tensors.items() if key != name}
        if value is not None:
            changed[name] = value
        torch.save(changed, path)
        with pytest.raises(RunError, match=says):
            DiTDH.from_published(path)


# --- derivatives, compilation, precision -------------------------------------------------------


def test_the_shared_primal_is_forward_mode_and_both_are_the_difference():
    network = train_difference(small(average=True)).double()
    z, t, s, y = batch(dtype=torch.float64)

    def model(z, t, s):
        return network(z, t, s, labels=y)

    velocity = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)
    tangents = (velocity, torch.ones_like(t), torch.zeros_like(s))
    with sdpa_kernel(SDPBackend.MATH):  # fused kernels have no forward derivative
        wanted = torch.func.jvp(model, (z, t, s), tangents)
    for route in (SharedPrimal(), ForwardMode()):
        found = route(model, (z, t, s), tangents)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-10, atol=1e-10)
    near = FiniteDifference(1e-5, order=2)(model, (z, t, s), tangents)[1]
    torch.testing.assert_close(near, wanted[1], rtol=1e-6, atol=1e-6)
    assert wanted[1].abs().max() > 0.1


def loss_and_gradients(network, **settings):
    z, t, s, y = batch(dtype=network.dtype)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=z.dtype)
    network.zero_grad()
    loss_fn = MeanFlowLoss(**settings)
    out = loss_fn(network, z, noise=noise, t=t, s=s, cond={"labels": y})
    out.loss.mean().backward()
    return out.loss.detach(), [p.grad.clone() for p in network.parameters()]


def assert_same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_activation_checkpointing_changes_nothing():
    network = train_difference(small(average=True))
    plain = loss_and_gradients(network)
    network.enable_gradient_checkpointing()
    assert_same(loss_and_gradients(network), plain)


def counting(graphs):
    """A backend of torch.compile that keeps what it was given and runs it as it is."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_by_blocks_it_has_a_graph_for_the_encoder_and_one_for_the_head():
    network, (z, t, s, y) = small(depth=5), batch()
    plain, graphs = network(z, t, s, labels=y), []
    names = set(network.state_dict())
    network.compile_blocks(backend=counting(graphs), fullgraph=True)
    torch.testing.assert_close(network(z, t, s, labels=y), plain)
    assert len(graphs) == 2 and set(network.state_dict()) == names


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("route", [SharedPrimal(), FiniteDifference(5e-3)])
def test_a_loss_of_compiled_blocks_is_the_loss_of_eager_ones(route):
    plain = loss_and_gradients(train_difference(small(average=True)), derivative=route)
    compiled = train_difference(small(average=True)).compile_blocks(backend="aot_eager")
    assert_same(loss_and_gradients(compiled, derivative=route), plain)


def test_under_autocast_the_derivative_is_near_that_of_full_precision():
    network = train_difference(small(average=True))
    full = loss_and_gradients(network, derivative=SharedPrimal())
    with torch.autocast("cpu", torch.bfloat16):
        half = loss_and_gradients(network, derivative=SharedPrimal())
    torch.testing.assert_close(half[0], full[0], rtol=0.05, atol=0.05)
    for a, b in zip(half[1], full[1], strict=True):
        assert a.isfinite().all() and (a - b).norm() <= 0.1 * b.norm() + 1e-3


def test_in_bfloat16_it_returns_bfloat16():
    z, t, s, y = batch(dtype=torch.bfloat16)
    network = small(average=True).bfloat16()
    assert network(z, t, s, labels=y).dtype == torch.bfloat16


def test_it_is_a_teacher_and_a_student():
    """At a student that starts from its teacher, distillation's target is the teacher's velocity
    less (t - s) D_t of it.
    """
    teacher = small().double().eval()
    student = DiTDH.from_flow_matching(teacher)
    z, t, s, y = batch(dtype=torch.float64)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(4), dtype=z.dtype)
    given = {"noise": noise, "t": t, "s": s, "cond": {"labels": y}}
    out = MeanFlowDistillationLoss(teacher=teacher)(student, z, **given)
    column = t.reshape(-1, 1, 1, 1)
    z_t = (1 - column) * z + column * noise

    def velocity(z, t):
        return teacher(z, t, labels=y)

    taught = velocity(z_t, t)
    with sdpa_kernel(SDPBackend.MATH):
        change = torch.func.jvp(velocity, (z_t, t), (taught, torch.ones_like(t)))[1]
    wanted = taught - (t - s).reshape(-1, 1, 1, 1) * change
    torch.testing.assert_close(out.target, wanted)
    flow = FlowMatchingLoss()(teacher, z, noise=noise, t=t, cond={"labels": y})
    torch.testing.assert_close(flow.loss, (taught - (noise - z)).square().flatten(1).mean(1))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: DiTDH.from_preset("xxl"), "write one of s, b, xl"),
        (lambda: small(width=36), "width = 36, heads = 4"),
        (lambda: small(head_width=36), "head_width = 36, head_heads = 4"),
        (lambda: small(grid=(4, 4, 4)), r"pair \(height, width\)"),
        (lambda: small()(torch.zeros(1, 6, 2, 8), torch.ones(1)), "6 channels on 4 x 4"),
        (lambda: small()(torch.zeros(1, 6, 4, 4), torch.ones(1)), "got no labels"),
        (
            lambda: small(classes=0)(
                torch.zeros(1, 6, 4, 4), torch.ones(1), labels=torch.zeros(1).long()
            ),
            "without classes",
        ),
        (lambda: small().require_null(), "null class was not trained"),
    ],
)
def test_misuse_is_one_clear_error(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_a_trained_null_class_is_the_label_after_the_last():
    assert small(null_trained=True).require_null() == 5


def test_frequencies_stay_in_float32_whatever_the_weights_are(tmp_path):
    """Angles of periods up to dozens of turns: rounded to bfloat16 they would be other times."""
    network = small()
    frequencies = network.time.frequencies.clone()
    network.save_pretrained(tmp_path)
    loaded = DiTDH.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for each in (small().bfloat16(), loaded):
        assert each.time.frequencies.dtype == torch.float32
        assert each.embed.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.time.frequencies, frequencies)


@pytest.mark.parametrize("name", ["t", "s", "labels"])
def test_one_number_for_several_latents_is_refused(name):
    network = small()
    z = torch.zeros(3, *network.latent_shape)
    given = {"t": torch.ones(3), "s": torch.zeros(3), "labels": torch.zeros(3, dtype=torch.long)}
    given[name] = given[name][:1]
    with pytest.raises(InputError, match=rf"got {name} of shape \(1,\) for 3 latents"):
        network(z, **given)
