"""Weights of other repositories as the start of a flow map: what comes out, what is refused, that
training goes on, and the way back.

Each layout is computed once more by hand, from its paper and its names, in plain products.
"""

import argparse
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("diffusers")
pytest.importorskip("timm")

from safetensors.torch import save_file

from flowspace import (
    CrossFlowLoss,
    FlowMap,
    FlowMatchingLoss,
    ForwardMode,
    ImprovedMeanFlowLoss,
    InputError,
    LinearSchedule,
    MatchedStatistic,
    MeanFlowLoss,
    PixelMeanFlowLoss,
    RunError,
    SharedPrimal,
)
from flowspace.vision.convert import LAYOUTS, convert, to_layout
from flowspace.vision.dit import PRESETS, DiT

# --- the layouts by hand -----------------------------------------------------------------------

CLASSES, WIDTH, DEPTH, HEADS = 5, 32, 3, 2
SHAPES = {"sit": (4, 8, 2), "lightning-dit": (6, 4, 1), "jit": (3, 16, 4)}
"""Channels, side and patch."""
START, BOTTLENECK, CONTEXT = 1, 7, 3
KNOWN = {"sit": {"heads": HEADS}, "lightning-dit": {}, "jit": {"context_start": START}}


def angles(side, size):
    """The angle of each pair of neighbours, (cells, size / 2): half by row, half by column."""
    rates = 10000 ** (-torch.arange(0, size // 2, 2).double() / (size // 2))
    rows = [torch.cat([i * rates, j * rates]) for i in range(side) for j in range(side)]
    return torch.stack(rows)


def places(side, width):
    """Sines and cosines of the column, then of the row."""
    rates = 10000 ** (-torch.arange(width // 4).double() / (width // 4))
    rows = []
    for i in range(side):
        for j in range(side):
            rows.append(
                torch.cat(
                    [(j * rates).sin(), (j * rates).cos(), (i * rates).sin(), (i * rates).cos()]
                )
            )
    return torch.stack(rows)[None]


def checkpoint(layout, seed=0, sigma=False):
    """Random weights by the names of a layout, with a trained network's sizes of numbers."""
    channels, size, patch = SHAPES[layout]
    side, head, gated = size // patch, WIDTH // HEADS, layout != "sit"
    hidden = 8 * WIDTH // 3 if gated else 4 * WIDTH
    numbers = channels * patch**2 * (2 if sigma else 1)
    shapes = {
        "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
        "final_layer.linear": (numbers, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }
    if layout == "jit":
        shapes["x_embedder.proj2"] = (WIDTH, BOTTLENECK, 1, 1)
    else:
        shapes["x_embedder.proj"] = (WIDTH, channels, patch, patch)
    norms = {"final_layer.norm_final": WIDTH}
    for i in range(DEPTH):
        block = f"blocks.{i}."
        shapes[block + "attn.qkv"] = (3 * WIDTH, WIDTH)
        shapes[block + "attn.proj"] = (WIDTH, WIDTH)
        shapes[block + "adaLN_modulation.1"] = (6 * WIDTH, WIDTH)
        if gated:
            shapes[block + "mlp.w12"] = (2 * hidden, WIDTH)
            shapes[block + "mlp.w3"] = (WIDTH, hidden)
        else:
            shapes[block + "mlp.fc1"] = (hidden, WIDTH)
            shapes[block + "mlp.fc2"] = (WIDTH, hidden)
        norms |= {block + "norm1": WIDTH, block + "norm2": WIDTH}
        if layout == "jit":
            norms |= {block + "attn.q_norm": head, block + "attn.k_norm": head}
    draw = torch.Generator().manual_seed(seed)
    found = {"pos_embed": places(side, WIDTH).float()}
    for name, shape in shapes.items():
        spread = 1 / math.sqrt(math.prod(shape[1:]))
        found[name + ".weight"] = spread * torch.randn(shape, generator=draw)
        found[name + ".bias"] = 0.1 * torch.randn(shape[0], generator=draw)
    if gated:
        for name, count in norms.items():
            found[name + ".weight"] = 1 + 0.3 * torch.randn(count, generator=draw)
    table = torch.randn(CLASSES + 1, WIDTH, generator=draw)
    found["y_embedder.embedding_table.weight"] = table
    if layout == "jit":
        down = torch.randn(BOTTLENECK, channels, patch, patch, generator=draw)
        found["x_embedder.proj1.weight"] = down / math.sqrt(channels * patch**2)
        found["in_context_posemb"] = torch.randn(1, CONTEXT, WIDTH, generator=draw)
    if layout == "lightning-dit":
        angle = angles(side, head).repeat_interleave(2, 1)
        found["feat_rope.freqs_cos"] = angle.cos().float()
        found["feat_rope.freqs_sin"] = angle.sin().float()
    return found


class ByHand:
    """The forward pass of one layout's own code, in float64, from its tensors by their names."""

    def __init__(self, layout, tensors):
        self.layout, self.heads = layout, HEADS
        self.w = {name: value.double() for name, value in tensors.items()}
        self.channels, size, self.patch = SHAPES[layout]
        self.side = size // self.patch

    def linear(self, name, x):
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def norm(self, name, x):
        if self.layout == "sit":
            centred = x - x.mean(-1, keepdim=True)
            return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[name + ".weight"]

    def turned(self, x):
        """Neighbours as complex numbers; tokens of the context are not turned."""
        if self.layout == "sit":
            return x
        context = x.shape[2] - self.side**2
        angle = angles(self.side, x.shape[-1])
        pairs = torch.view_as_complex(
            x[:, :, context:].reshape(*x.shape[:2], -1, angle.shape[1], 2)
        )
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([x[:, :, :context], torch.view_as_real(pairs).flatten(3)], 2)

    def attention(self, block, x):
        q, k, v = self.linear(block + "attn.qkv", x).chunk(3, -1)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (q, k, v))
        if self.layout == "jit":
            q, k = self.norm(block + "attn.q_norm", q), self.norm(block + "attn.k_norm", k)
        q, k = self.turned(q), self.turned(k)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.linear(block + "attn.proj", (weights @ v).transpose(1, 2).flatten(2))

    def mlp(self, block, x):
        if self.layout == "sit":
            hidden = F.gelu(self.linear(block + "mlp.fc1", x), approximate="tanh")
            return self.linear(block + "mlp.fc2", hidden)
        gate, x = self.linear(block + "mlp.w12", x).chunk(2, -1)
        return self.linear(block + "mlp.w3", F.silu(gate) * x)

    def __call__(self, z, time, labels):
        """What the layout's network returns at its own time, which runs from noise to data."""
        w = self.w
        rates = torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
        waves = time.double()[:, None] * rates
        waves = torch.cat([waves.cos(), waves.sin()], 1)
        embedded = self.linear("t_embedder.mlp.2", F.silu(self.linear("t_embedder.mlp.0", waves)))
        label = w["y_embedder.embedding_table.weight"][labels]
        c = F.silu(embedded + label)[:, None]
        squares = F.unfold(z.double(), self.patch, stride=self.patch).transpose(1, 2)
        if self.layout == "jit":
            few = squares @ w["x_embedder.proj1.weight"].flatten(1).T
            x = few @ w["x_embedder.proj2.weight"].flatten(1).T + w["x_embedder.proj2.bias"]
        else:
            x = squares @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"]
        x = x + w["pos_embed"]
        for i in range(DEPTH):
            if self.layout == "jit" and i == START:
                x = torch.cat([label[:, None] + w["in_context_posemb"], x], 1)
            block = f"blocks.{i}."
            parts = self.linear(block + "adaLN_modulation.1", c).chunk(6, -1)
            shift, scale, gate = parts[:3]
            h = self.norm(block + "norm1", x) * (1 + scale) + shift
            x = x + gate * self.attention(block, h)
            shift, scale, gate = parts[3:]
            x = x + gate * self.mlp(block, self.norm(block + "norm2", x) * (1 + scale) + shift)
        x = x[:, -(self.side**2) :]
        shift, scale = self.linear("final_layer.adaLN_modulation.1", c).chunk(2, -1)
        h = self.norm("final_layer.norm_final", x) * (1 + scale) + shift
        numbers = self.linear("final_layer.linear", h)
        p, c = self.patch, numbers.shape[-1] // self.patch**2
        cells = numbers.view(len(z), self.side, self.side, p, p, c)
        image = torch.einsum("bhwpqc->bchpwq", cells).reshape(len(z), c, *z.shape[2:])
        return image[:, : self.channels]

    def here(self, z, t, labels):
        """The same in our time: the velocity from data to noise, or the clean image."""
        found = self(z, 1 - t.double(), labels)
        return found if self.layout == "jit" else -found


def batch(layout, rows=6, dtype=torch.float32):
    channels, size, _ = SHAPES[layout]
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(rows, channels, size, size, generator=draw, dtype=dtype)
    t = 0.1 + 0.9 * torch.rand(rows, generator=draw, dtype=dtype)
    s = t * torch.rand(rows, generator=draw, dtype=dtype)
    return z, t, s, torch.arange(rows) % (CLASSES + 1)


def converted(layout, **changes):
    return convert(checkpoint(layout), layout, **(KNOWN[layout] | changes))


def trained(network):
    """The same with an embedding of t - s that is no longer zero."""
    torch.manual_seed(3)
    torch.nn.init.normal_(network.difference.second.weight, std=0.3)
    return network


# --- what comes out ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@given(share=st.floats(0, 1))
@settings(max_examples=10, deadline=None)
def test_the_converted_network_returns_what_the_old_one_does_for_every_s(layout, share):
    z, t, _, y = batch(layout)
    network = converted(layout)
    expected = ByHand(layout, checkpoint(layout)).here(z, t, y)
    torch.testing.assert_close(
        network(z, t, share * t, labels=y).double(), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("layout", ["sit", "lightning-dit"])
def test_the_channels_of_a_variance_are_dropped(layout):
    z, t, s, y = batch(layout)
    tensors = checkpoint(layout, sigma=True)
    network = convert(tensors, layout, **KNOWN[layout])
    assert network.config["sigma"]
    expected = ByHand(layout, tensors).here(z, t, y)
    torch.testing.assert_close(network(z, t, s, labels=y).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_of_another_spread_is_brought_to_one(layout):
    """JiT of 512 pixels sees z' = (1 - t) x + 2 t eps: here z = z'/2, of data x/2."""
    z, t, s, y = batch(layout)
    network = converted(layout, noise_scale=2.0)
    expected = ByHand(layout, checkpoint(layout)).here(2 * z, t, y) / 2
    torch.testing.assert_close(network(z, t, s, labels=y).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_network_without_the_new_embedding_ignores_s(layout):
    z, t, s, y = batch(layout)
    network = converted(layout, average=False)
    assert network.difference is None
    assert torch.equal(network(z, t, s, labels=y), converted(layout)(z, t, s, labels=y))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trained_embedding_sees_s(layout):
    z, t, s, y = batch(layout)
    network = trained(converted(layout))
    far = network(z, t, 0 * s, labels=y) - network(z, t, t, labels=y)
    assert far.abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_converted_has_memory_of_its_own(layout):
    tensors = checkpoint(layout)
    before = {name: value.clone() for name, value in tensors.items()}
    network = convert(tensors, layout, **KNOWN[layout])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(7)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert all(parameter.requires_grad for parameter in network.parameters())


# --- and back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_old_names_and_numbers_come_back(layout):
    tensors = checkpoint(layout)
    back = to_layout(trained(converted(layout)), layout)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        tolerance = 2e-6 if name.startswith("feat_rope.") else 0
        torch.testing.assert_close(back[name], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trained_network_comes_back_through_a_file(layout, tmp_path):
    z, t, s, y = batch(layout)
    network = converted(layout)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
        network.difference.second.weight.zero_()
    save_file(to_layout(network, layout), tmp_path / "back.safetensors")
    again = convert(tmp_path / "back.safetensors", layout, **KNOWN[layout])
    assert torch.equal(again(z, t, s, labels=y), network(z, t, s, labels=y))


# --- files -------------------------------------------------------------------------------------


def test_the_average_of_a_training_checkpoint_is_taken(tmp_path):
    """As the three repositories save them: with options, wrapped names and the optimiser."""
    model, average = checkpoint("jit", seed=1), checkpoint("jit", seed=2)
    saved = {
        "model": {f"net.{name}": value for name, value in model.items()},
        "model_ema1": {f"net.{name}": value for name, value in average.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 3,
        "args": argparse.Namespace(model="JiT-B/16"),
    }
    torch.save(saved, tmp_path / "checkpoint.pth")
    z, t, s, y = batch("jit")
    for weights, tensors in ((None, average), ("model", model)):
        network = convert(tmp_path / "checkpoint.pth", "jit", weights=weights, context_start=START)
        expected = convert(tensors, "jit", context_start=START)
        assert torch.equal(network(z, t, s, labels=y), expected(z, t, s, labels=y))
    with pytest.raises(RunError, match="no table 'ema'"):
        convert(tmp_path / "checkpoint.pth", "jit", weights="ema")


@pytest.mark.parametrize("first", range(5))
def test_an_average_is_taken_before_a_model_and_of_several_the_first(first):
    kinds = ["ema", "model_ema1", "model_ema", "model", "state_dict"][first:]
    tables = {kind: checkpoint("sit", seed=seed) for seed, kind in enumerate(kinds)}
    saved = dict(reversed(tables.items())) | {"optimizer": {"state": {}}}
    found = to_layout(convert(saved, "sit", heads=HEADS), "sit")
    for name, tensor in tables[kinds[0]].items():
        assert torch.equal(found[name], tensor)


def test_names_that_were_wrapped_more_than_once_are_unwrapped():
    plain = checkpoint("sit")
    wrapped = {f"module._orig_mod.net.module.{name}": value for name, value in plain.items()}
    found = to_layout(convert(wrapped, "sit", heads=HEADS), "sit")
    assert found.keys() == plain.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_is_of_the_precision_of_its_weights_its_new_embedding_too(dtype):
    tensors = {name: value.to(dtype) for name, value in checkpoint("sit").items()}
    network = convert(tensors, "sit", heads=HEADS)
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    torch.save({"ema": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(RunError, match="tensors and nothing else"):
        convert(tmp_path / "harmful.pt", "sit")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_of_something_else_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((RunError, InputError)):
        convert(tmp_path / name, "sit")


def test_a_saved_network_loads_as_ever(tmp_path):
    z, t, s, y = batch("jit")
    network = trained(converted("jit"))
    network.save_pretrained(tmp_path)
    again = DiT.from_pretrained(tmp_path)
    assert torch.equal(again(z, t, s, labels=y), network(z, t, s, labels=y))


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_table_that_does_not_fit_is_refused_by_the_name_of_a_tensor(layout, data):
    tensors = checkpoint(layout)
    name = data.draw(st.sampled_from(sorted(tensors)))
    fault = data.draw(st.sampled_from(["missing", "longer", "deeper", "renamed"]))
    value = tensors.pop(name)
    if fault == "longer":
        tensors[name] = torch.cat([value, value[:1]])
    elif fault == "deeper":
        tensors[name] = value[None]
    elif fault == "renamed":
        tensors[name + ".other"] = value
    # One more class, or a network without context or rotary positions, is a network too.
    whole = name in ("in_context_posemb", "y_embedder.embedding_table.weight")
    if whole or name.startswith("feat_rope.freqs_cos"):
        return
    with pytest.raises(InputError, match="got"):
        convert(tensors, layout, heads=HEADS, context_start=START)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("blocks.1.mlp.fc1.bias"), "no tensor blocks.1.mlp.fc1.bias"),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 15, WIDTH)}), "15 cells"),
        (lambda w: w.update({"blocks.7.attn.qkv.weight": torch.zeros(2, 2)}), "blocks.7"),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 16, WIDTH, dtype=int)}), "int64"),
        (lambda w: w.update({"epoch": 3}), "got int under 'epoch'"),
        (lambda w: w.clear(), "no tensors"),
    ],
)
def test_an_error_says_what_does_not_fit(change, said):
    tensors = checkpoint("sit")
    change(tensors)
    with pytest.raises(InputError, match=said):
        convert(tensors, "sit", heads=HEADS)


@pytest.mark.parametrize("wide", [0, 2 * WIDTH])
@pytest.mark.parametrize("name", ["feat_rope.freqs_cos", "feat_rope.freqs_sin"])
def test_positions_of_no_numbers_or_of_more_than_a_token_has_are_refused(name, wide):
    tensors = checkpoint("lightning-dit")
    tensors[name] = torch.zeros(16, wide)
    with pytest.raises(InputError, match=f"got {name}|heads"):
        convert(tensors, "lightning-dit")


def test_what_no_tensor_tells_is_asked_for():
    with pytest.raises(InputError, match="write heads="):
        convert(checkpoint("sit"), "sit")
    with pytest.raises(InputError, match="write context_start="):
        convert(checkpoint("jit"), "jit")
    with pytest.raises(InputError, match="write one of 'sit'"):
        convert(checkpoint("sit"), "dit", heads=HEADS)
    with pytest.raises(InputError, match="write a path"):
        convert(3, "sit")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_another_layout_than_the_file_has_is_refused(layout, other):
    """SiT's names are a part of LightningDiT's, which can be built without its own."""
    if other == layout or (layout, other) == ("sit", "lightning-dit"):
        return
    with pytest.raises(InputError):
        convert(checkpoint(layout), other, heads=HEADS, context_start=START)
    with pytest.raises(InputError, match="has no name"):
        to_layout(converted(layout), other)


@pytest.mark.parametrize(
    ("layout", "change", "part"),
    [
        ("jit", {"bottleneck": 0}, "no bottleneck"),
        ("jit", {"predicts": "velocity"}, "velocities"),
        ("sit", {"bottleneck": 4}, "a bottleneck"),
        ("sit", {"context_tokens": 2, "context_start": 1}, "context tokens"),
        ("sit", {"predicts": "data"}, "clean data"),
        ("sit", {"rotary": True}, "rotary positions"),
        ("sit", {"outputs": 8}, "a pixel head"),
        ("sit", {"output_patch": 4}, "a pixel head"),
    ],
)
def test_a_part_that_a_layout_has_not_is_named(layout, change, part):
    network = DiT(**(converted(layout).settings | change))
    with pytest.raises(InputError, match=f"a network with {part}, for which"):
        to_layout(network, layout)


def test_rotary_positions_of_a_file_are_those_of_the_grid_or_refused():
    """JiT computes them, whether or not a file keeps them; SiT has none."""
    there = checkpoint("lightning-dit")
    z, t, s, y = batch("jit")
    kept = checkpoint("jit")
    angle = angles(4, WIDTH // HEADS).repeat_interleave(2, 1)
    kept |= {"feat_rope.freqs_cos": angle.cos(), "feat_rope.freqs_sin": angle.sin()}
    network = convert(kept, "jit", context_start=START)
    assert torch.equal(network(z, t, s, labels=y), converted("jit")(z, t, s, labels=y))
    for name in ("feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        moved = there | {name: there[name] + 0.01}
        with pytest.raises(InputError, match=f"got {name} of other rotary positions"):
            convert(moved, "lightning-dit")
    surplus = checkpoint("sit") | {"feat_rope.freqs_sin": there["feat_rope.freqs_sin"]}
    with pytest.raises(InputError, match=r"got feat_rope.freqs_sin .* does not have"):
        convert(surplus, "sit", heads=HEADS)


def test_a_pixel_head_has_no_name_in_a_layout():
    with pytest.raises(InputError, match="a pixel head"):
        to_layout(converted("sit").with_pixel_head(8), "sit")


# --- training goes on --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["sit", "lightning-dit"])
@pytest.mark.parametrize("loss_fn", [MeanFlowLoss(), ImprovedMeanFlowLoss(), FlowMatchingLoss()])
def test_on_the_diagonal_the_loss_is_flow_matching_s(layout, loss_fn):
    """There it is mean((v' - (x - eps))^2) of the old network's own v', at its own time."""
    z, t, _, y = batch(layout)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    network = trained(converted(layout))
    torch.nn.init.zeros_(network.difference.second.weight)
    out = loss_fn(network, z, cond={"labels": y}, noise=noise, t=t, s=t)
    z_t = (1 - t)[:, None, None, None] * z + t[:, None, None, None] * noise
    velocity = ByHand(layout, checkpoint(layout))(z_t, 1 - t.double(), y)
    expected = (velocity - (z - noise)).square().flatten(1).mean(1)
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-4, atol=1e-5)


def test_on_the_diagonal_jit_s_losses_are_its_own():
    """x-prediction: |x' - x|^2 by CrossFlow, and over max(t, 0.05)^2, JiT's own, by pMF."""
    z, t, _, y = batch("jit")
    t = torch.cat([t[:-1], torch.tensor([0.02])])
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    network = converted("jit")
    given = {"cond": {"labels": y}, "noise": noise, "t": t, "s": t}
    z_t = (1 - t)[:, None, None, None] * z + t[:, None, None, None] * noise
    image = ByHand("jit", checkpoint("jit")).here(z_t, t, y)
    expected = (image - z).square().flatten(1).mean(1)
    found = CrossFlowLoss()(network, z, **given).loss.double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found = PixelMeanFlowLoss()(network, z, **given).loss.double()
    weighed = expected / t.double().clamp(min=0.05) ** 2
    torch.testing.assert_close(found, weighed, rtol=1e-4, atol=1e-5)


OBJECTIVES = [
    ("sit", MeanFlowLoss(), None),
    ("lightning-dit", ImprovedMeanFlowLoss(), None),
    ("jit", PixelMeanFlowLoss(), None),
    ("jit", CrossFlowLoss(), None),
    ("sit", CrossFlowLoss(), 2),
    ("lightning-dit", CrossFlowLoss(), 4),
]


@pytest.mark.parametrize(("layout", "loss_fn", "compression"), OBJECTIVES)
def test_training_goes_on(layout, loss_fn, compression):
    z, t, s, y = batch(layout)
    s[::2] = t[::2]  # as in training, half of the rows
    network, targets = converted(layout), None
    if compression:
        network = network.with_pixel_head(compression)
        targets = F.interpolate(z, scale_factor=compression)[:, :3]
    optimizer = torch.optim.Adam(network.parameters(), 5e-4)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        out = loss_fn(network, z, targets, cond={"labels": y}, noise=noise, t=t, s=s)
        out.loss.mean().backward()
        optimizer.step()
        losses.append(out.loss.mean().item())
    assert losses[-1] < 0.9 * losses[0]
    assert network.difference.second.weight.abs().max() > 0


def test_a_pixel_head_is_new_and_nothing_else():
    network = trained(converted("sit"))
    pixels = network.with_pixel_head(8)
    z, t, s, y = batch("sit")
    assert torch.equal(pixels(z, t, s, labels=y), torch.zeros(len(z), 3, 64, 64))
    new = dict(pixels.state_dict())
    for name, value in network.state_dict().items():
        if not name.startswith("last.linear."):
            assert torch.equal(new[name], value)
    with torch.no_grad():
        pixels.last.linear.weight.fill_(1)
    assert network.last.linear.weight.std() > 0
    with pytest.raises(InputError, match="compression = 0"):
        network.with_pixel_head(0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_of_one_step_is_the_old_network_s_first(layout):
    """One Euler step of the old network from noise: z + v' for velocities, x' for images."""
    z, _, _, y = batch(layout)
    statistic = MatchedStatistic() if layout == "jit" else MeanFlowLoss().outputs
    flow_map = FlowMap(converted(layout), LinearSchedule(), statistic)
    old = ByHand(layout, checkpoint(layout))(z, torch.zeros(len(z)), y)
    expected = old if layout == "jit" else z + old
    found = flow_map.sample(z, cond={"labels": y})
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_routes_agree_compiled_and_checkpointed_too(layout):
    z, t, s, y = batch(layout)
    network = trained(converted(layout))
    checkpointed = copy.deepcopy(network)
    checkpointed.gradient_checkpointing = True
    models = [
        (network, ForwardMode()),
        (network, SharedPrimal()),
        (checkpointed, SharedPrimal()),
    ]
    if layout != "lightning-dit":  # whose blocks have the parts of the others'
        compiled = copy.deepcopy(network).compile_blocks(backend="aot_eager")
        models.append((compiled, SharedPrimal()))
    found = []
    for model, route in models:
        loss_fn = MeanFlowLoss(statistic=MatchedStatistic(), derivative=route)
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
        out = loss_fn(model, z, cond={"labels": y}, noise=noise, t=t, s=s)
        model.zero_grad()
        out.loss.mean().backward()
        gradient = model.blocks[0].qkv.weight.grad.clone()
        found.append((out.loss.detach(), gradient))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_half_precision_it_is_near_itself(layout):
    z, t, s, y = batch(layout)
    network = trained(converted(layout))
    full = network(z, t, s, labels=y)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(z, t, s, labels=y)
    half = network.bfloat16()(z.bfloat16(), t.bfloat16(), s.bfloat16(), labels=y)
    assert half.dtype == torch.bfloat16
    for found in (mixed, half):
        assert (found.float() - full).norm() < 0.05 * full.norm()


# --- the published sizes -----------------------------------------------------------------------

PUBLISHED = {
    ("sit-s", 2): 33,
    ("sit-b", 2): 130,
    ("sit-l", 2): 458,
    ("sit-xl", 2): 675,
    ("lightning-dit-xl", 1): 675,
    ("jit-b", 16): 131,
    ("jit-l", 16): 459,
    ("jit-h", 16): 953,
    ("jit-b", 32): 133,
    ("jit-l", 32): 462,
    ("jit-h", 32): 956,
}


@pytest.mark.parametrize(("name", "patch"), PUBLISHED)
def test_presets_have_the_published_numbers_of_parameters(name, patch):
    size = 512 if patch == 32 else PRESETS[name]["size"]
    with torch.device("meta"):
        network = DiT.from_preset(name, patch=patch, size=size, average=False)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == pytest.approx(PUBLISHED[name, patch] * 1e6, rel=5e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_found_again_from_its_tensors(name):
    layout = name.rpartition("-")[0]
    with torch.device("meta"):
        network = DiT.from_preset(name, average=False, null_trained=True)
    found = convert(to_layout(network, layout), layout, average=False)
    own = network.settings | {"hidden": found.config["hidden"]}
    assert found.settings == own


def test_unknown_presets_and_parts_are_refused():
    with pytest.raises(InputError, match="write one of sit-s"):
        DiT.from_preset("sit-xxl")
    with pytest.raises(InputError, match="multiple of the patch"):
        DiT(size=9)
    with pytest.raises(InputError, match="write one of 'layer'"):
        DiT(norm="batch")
    with pytest.raises(InputError, match="multiple of 4 heads"):
        DiT(width=24, heads=4, rotary=True)
    with pytest.raises(InputError, match="a block's number"):
        DiT(depth=2, width=32, heads=4, context_tokens=3, context_start=2)
    network = converted("sit")
    with pytest.raises(InputError, match=r"\(B, 4, 8, 8\)"):
        network(torch.zeros(1, 4, 4, 4), torch.ones(1), labels=torch.zeros(1, dtype=int))
    with pytest.raises(InputError, match="got no labels"):
        network(torch.zeros(1, 4, 8, 8), torch.ones(1))
