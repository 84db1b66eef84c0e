"""PixelFlow's transformer: the paper's size, what it sees, pictures of several sizes packed into
one batch, captions, and that the library's objectives take it as it is.
"""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("diffusers")
pytest.importorskip("timm")

from flowspace import (
    CrossFlowLoss,
    FlowMatchingLoss,
    ForwardMode,
    Guidance,
    InputError,
    MeanFlowLoss,
    SharedPrimal,
)
from flowspace.cascade import Cascade, CascadeLoss
from flowspace.vision import PixelFlowTransformer

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from packing import padded, separate

SMALL = {"patch": 2, "classes": 5, "depth": 2, "width": 32, "heads": 4}
WORDS = 6


def small(dtype=torch.float64, **changes):
    """A network whose every weight matters."""
    torch.manual_seed(0)
    network = PixelFlowTransformer(**(SMALL | changes))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.to(dtype)


def batch(rows=4, side=8, dtype=torch.float64):
    draw = torch.Generator().manual_seed(side)
    z = torch.randn(rows, 3, side, side, generator=draw, dtype=dtype)
    t = 0.1 + 0.9 * torch.rand(rows, generator=draw, dtype=dtype)
    return z, t, t * torch.rand(rows, generator=draw, dtype=dtype), torch.arange(rows) % 6


def captions(rows=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randn(rows, WORDS, 12, generator=draw, dtype=torch.float64)
    return tokens, torch.arange(WORDS) <= torch.arange(rows)[:, None] % WORDS


def gradients(network, velocities):
    network.zero_grad()
    sum(v.square().sum() for v in velocities).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


def assert_same(one, other, atol=1e-5):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=atol, atol=atol)


# --- the network


def test_xl_has_the_papers_677_million_parameters():
    with torch.device("meta"):
        network = PixelFlowTransformer.from_preset("xl")
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(677e6, rel=5e-3)
    sizes = {name: network.config[name] for name in ("depth", "width", "heads", "patch")}
    assert sizes == {"depth": 28, "width": 1152, "heads": 16, "patch": 4}


@pytest.mark.parametrize("name", ["b", "l", "xl"])
def test_every_preset_maps_pictures_to_velocities_of_their_shape(name):
    with torch.device("meta"):
        network = PixelFlowTransformer.from_preset(name, depth=1)
        z, t, labels = torch.empty(2, 3, 256, 256), torch.empty(2), torch.zeros(2).long()
        assert network(z, t, t, labels=labels).shape == z.shape


def test_it_begins_at_velocity_zero():
    network = PixelFlowTransformer(**SMALL)
    z, t, s, y = batch(dtype=torch.float32)
    assert torch.equal(network(z, t, s, labels=y), torch.zeros_like(z))


@pytest.mark.parametrize("interval", [False, True])
def test_it_sees_time_and_label_and_the_destination_only_if_built_for_it(interval):
    network, (z, t, s, y) = small(interval=interval), batch()
    base = network(z, t, s, labels=y)
    for other in (network(z, t / 2, s - t / 2, labels=y), network(z, t, s, labels=5 - y)):
        assert (base - other).abs().flatten(1).max(1).values.min() > 1e-3
    assert torch.equal(base, network(z, t, s / 2, labels=y)) != interval
    if not interval:
        assert torch.equal(base, network(z, t, labels=y))


def test_the_resolution_is_seen_even_where_every_token_is_alike():
    """On a constant picture attention averages equal tokens, so positions cannot be told."""
    network, t = small(), torch.full((1,), 0.5, dtype=torch.float64)
    corners = []
    for side in (4, 8, 16):
        z = torch.ones(1, 3, side, side, dtype=torch.float64)
        corners.append(network(z, t, labels=torch.zeros(1).long())[..., 0, 0])
    assert (corners[0] - corners[1]).abs().max() > 1e-3
    assert (corners[1] - corners[2]).abs().max() > 1e-3


def test_a_token_is_the_square_of_pixels_at_its_own_place():
    """Without blocks tokens do not mix, so that what a pixel moves is its own square."""
    network, (z, t, s, y) = small(depth=0), batch(1)
    other = z.clone()
    other[:, 0, 2, 5] += 1
    moved = (network(z, t, s, labels=y) != network(other, t, s, labels=y)).any(1)[0]
    wanted = torch.zeros(8, 8, dtype=torch.bool)
    wanted[2:4, 4:6] = True
    assert torch.equal(moved, wanted)


def test_rows_do_not_mix_and_every_parameter_matters():
    network, (z, t, s, y) = small(interval=True, text_width=12), batch()
    text, mask = captions()
    whole = network(z, t, s, y, text, mask)
    for i in range(len(z)):
        row = slice(i, i + 1)
        alone = network(z[row], t[row], s[row], y[row], text[row], mask[row])
        torch.testing.assert_close(whole[row], alone)
    assert all(g.abs().sum() > 0 for g in gradients(network, [whole]).values())


@pytest.mark.filterwarnings("ignore:CrossFlowLoss")
@pytest.mark.parametrize("kind", [MeanFlowLoss, CrossFlowLoss, FlowMatchingLoss])
def test_the_librarys_objectives_differentiate_it_exactly(kind):
    network, (z, t, s, y) = small(interval=True, text_width=12), batch()
    text, mask = captions()
    cond = {"labels": y, "text": text, "text_mask": mask}
    noise = torch.randn_like(z)
    found = []
    for route in (SharedPrimal(), ForwardMode()):
        out = kind(derivative=route)(network, z, z, cond=cond, noise=noise, t=t, s=s)
        found.append(out.target)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


# --- packing


@st.composite
def mixtures(draw):
    sides = draw(st.lists(st.sampled_from([2, 4, 6, 8, 12]), min_size=1, max_size=4))
    return [(draw(st.integers(1, 3)), side) for side in sides]


@settings(max_examples=15)
@given(mixtures())
def test_packed_is_separate_and_padded(mixture):
    """Velocities and gradients of every weight; a size may come twice."""
    network = small()
    parts = [batch(rows, side) for rows, side in mixture]
    z, t, _, y = [list(each) for each in zip(*parts, strict=True)]
    ways = [network.packed(z, t, labels=y), separate(network, z, t, y), padded(network, z, t, y)]
    found = [gradients(network, velocities) for velocities in ways]
    for velocities, slopes in zip(ways[1:], found[1:], strict=True):
        assert_same(ways[0], velocities)
        assert_same(found[0].values(), slopes.values())


def test_in_float32_packed_is_padded_to_the_fifth_digit():
    network = PixelFlowTransformer(**(SMALL | {"width": 64}))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    parts = [batch(2, side, torch.float32) for side in (4, 8, 16)]
    z, t, _, y = [list(each) for each in zip(*parts, strict=True)]
    assert_same(network.packed(z, t, labels=y), padded(network, z, t, y))


def test_packed_pictures_have_their_own_captions_and_destinations():
    network = small(interval=True, text_width=12)
    parts = [(*batch(rows, side), *captions(rows, side)) for rows, side in ((3, 4), (2, 8))]
    lists = [list(each) for each in zip(*parts, strict=True)]
    alone = [network(*part) for part in parts]
    assert_same(network(*lists), alone)
    found = [gradients(network, velocities) for velocities in (network(*lists), alone)]
    assert_same(found[0].values(), found[1].values())


def test_no_work_is_done_for_tokens_that_are_not_there():
    """Every linear layer that sees tokens sees as many as there are."""
    network, seen = small(), []
    for layer in (network.embed, network.blocks[0].attention.qkv, network.blocks[1].mlp[0]):
        layer.register_forward_hook(lambda layer, given, out: seen.append(given[0].shape[:2]))
    parts = [batch(rows, side) for rows, side in ((3, 4), (2, 8), (1, 16))]
    z, t, _, y = [list(each) for each in zip(*parts, strict=True)]
    network.packed(z, t, labels=y)
    assert seen == [(1, 3 * 4 + 2 * 16 + 1 * 64)] * 3


# --- captions


def test_tokens_that_are_masked_do_not_matter_and_those_that_are_not_do():
    network, (z, t, s, y) = small(text_width=12), batch()
    text, mask = captions()
    base = network(z, t, s, y, text, mask)
    changed = torch.where(mask[..., None], text, text + 1)
    torch.testing.assert_close(network(z, t, s, y, changed, mask), base)
    longer = torch.nn.functional.pad(text, (0, 0, 0, 3))
    unseen = torch.nn.functional.pad(mask, (0, 3))
    torch.testing.assert_close(network(z, t, s, y, longer, unseen), base)
    changed = torch.where(mask[..., None], text + 1, text)
    moved = (network(z, t, s, y, changed, mask) - base).abs().flatten(1).max(1).values
    assert moved.min() > 1e-3


def test_guidance_drops_captions_by_their_mask():
    """The velocity at scale w is null + w (caption - null); null does not depend on the text."""
    network, (z, t, s, _) = small(classes=0, text_width=12), batch()
    text, mask = captions()
    nothing = torch.zeros_like(mask)
    null = network(z, t, s, text=text, text_mask=nothing)
    other = network(z, t, s, text=torch.randn_like(text), text_mask=nothing)
    torch.testing.assert_close(null, other)
    guided = Guidance(null={"text_mask": False}, omega=3.0).apply(network)
    found = guided(z, t, s, text=text, text_mask=mask)
    plain = network(z, t, s, text=text, text_mask=mask)
    torch.testing.assert_close(found, null + 3 * (plain - null))
    assert (plain - null).abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [{"interval": True}, {"text_width": 12}, {"interval": True, "text_width": 12}],
)
def test_an_extended_network_begins_as_the_network(changes):
    network, (z, t, s, y) = small(), batch()
    more = network.extended(**changes)
    cond = {"labels": y}
    if "text_width" in changes:
        cond["text"], cond["text_mask"] = captions()
    velocity = more(z, t, s, **cond)
    torch.testing.assert_close(velocity, network(z, t, s, labels=y))
    found = gradients(more, [velocity])
    new = set(found) - set(network.state_dict())
    assert any(found[name].abs().sum() > 0 for name in new)  # so it learns to see them


def test_an_extended_network_keeps_what_it_has_and_may_be_told_so():
    network, (z, t, s, y) = small(interval=True, text_width=12), batch()
    text, mask = captions()
    same = network.extended(interval=True, text_width=12, null_trained=True)
    assert torch.equal(same(z, t, s, y, text, mask), network(z, t, s, y, text, mask))
    assert same.require_null() == 5


# --- what diffusers and torch do with it


def test_activation_checkpointing_changes_nothing():
    network, parts = small(), [batch(2, side) for side in (4, 8)]
    z, t, _, y = [list(each) for each in zip(*parts, strict=True)]
    found = [gradients(network, network(z, t, labels=y))]
    network.enable_gradient_checkpointing()
    found.append(gradients(network, network(z, t, labels=y)))
    assert_same(found[0].values(), found[1].values(), 1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_loss_of_compiled_blocks_is_the_loss_of_eager_ones():
    (z, t, s, y), noise = batch(dtype=torch.float32), torch.randn(4, 3, 8, 8)
    found = []
    for compiled in (False, True):
        network = small(torch.float32, interval=True)
        if compiled:
            network.compile_blocks(backend="aot_eager")
        out = MeanFlowLoss()(network, z, t=t, s=s, noise=noise, cond={"labels": y})
        found.append(gradients(network, [out.prediction - out.target]))
    for name, slope in found[0].items():
        torch.testing.assert_close(found[1][name], slope, rtol=1e-3, atol=1e-3 * slope.abs().max())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_take_packed_pictures_with_captions():
    parts = [(*batch(rows, side), *captions(rows, side)) for rows, side in ((3, 4), (2, 8))]
    lists = [list(each) for each in zip(*parts, strict=True)]
    plain = small(interval=True, text_width=12)
    compiled = small(interval=True, text_width=12)
    compiled.compile_blocks(backend="eager", fullgraph=True)
    assert_same(compiled(*lists), plain(*lists), 1e-10)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_blocks_train_and_draw_by_stages_that_do_not_divide_the_batch(packed):
    """Sizes and numbers of pictures change from call to call: every call must find its graph."""
    torch.manual_seed(0)
    torch.compiler.reset()
    parts = CascadeLoss(Cascade(4), FlowMatchingLoss(), packed=packed)
    plain = small(torch.float32)
    compiled = small(torch.float32).compile_blocks(backend="eager")
    for seed in range(5):
        x, labels = torch.randn(6, 3, 16, 16), torch.arange(6)
        losses = []
        for network in (plain, compiled):
            draw = torch.Generator().manual_seed(seed)
            out = parts(network, x, cond={"labels": labels}, generator=draw)
            out.loss.mean().backward()
            losses.append(out.loss)
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    noise, cond = torch.randn(2, 3, 16, 16), {"labels": torch.arange(2)}
    made = parts.sampler(compiled).sample(noise, cond=cond)
    assert made.isfinite().all()


@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_are_never_given_a_view(rows):
    """Guards of torch.compile on the base of a view fail at the next x that has no base."""
    network, (z, t, _, y), seen = small(), batch(rows), []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda _, given: seen.append(given[0]._is_view()))
    network(z, t, labels=y)
    network([z, z], [t, t], labels=[y, y])
    assert seen == [False] * 4


@pytest.mark.parametrize("sides", [(8,), (4, 8)])
def test_under_autocast_the_tokens_stay_in_float32(sides):
    """Linear layers compute in bfloat16, and what the blocks add up does not lose digits."""
    network, seen = small(torch.float32, text_width=12), []
    for block in network.blocks:
        block.register_forward_hook(lambda _, given, out: seen.extend([given[0].dtype, out.dtype]))
    parts = [(*batch(2, side, torch.float32), *captions(2, side)) for side in sides]
    lists = [list(each) for each in zip(*parts, strict=True)]
    with torch.autocast("cpu", torch.bfloat16):
        network(*lists)
    assert seen == [torch.float32] * 4


def test_under_autocast_it_runs_and_stays_near():
    network, parts = small(torch.float32), [batch(2, side, torch.float32) for side in (4, 8)]
    z, t, _, y = [list(each) for each in zip(*parts, strict=True)]
    plain = network(z, t, labels=y)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(z, t, labels=y)
    for a, b in zip(found, plain, strict=True):
        assert (a - b).square().mean() < 0.05 * b.square().mean()


def test_saved_and_loaded_its_weights_are_the_same_to_the_bit(tmp_path):
    network, (z, t, s, y) = small(torch.float32, interval=True), batch(dtype=torch.float32)
    network.save_pretrained(tmp_path)
    again = PixelFlowTransformer.from_pretrained(tmp_path)
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    torch.testing.assert_close(network(z, t, s, labels=y), again(z, t, s, labels=y))


ONE, LABEL = torch.ones(1), torch.zeros(1).long()


def told(text=None, t=None, **changes):
    """Call a network of two pictures with captions, of which something does not fit."""
    network, (z, times, s, y) = small(text_width=12, interval=True), batch(2)
    if t is None:
        t = times
    if text is None:
        text = captions(2)[0]
    return network(z, t, **({"s": s, "labels": y, "text": text} | changes))


def two_lengths():
    parts = [(*batch(2, side), captions(2)[0]) for side in (4, 8)]
    z, t, s, y, text = [list(each) for each in zip(*parts, strict=True)]
    text[1] = text[1][:, :4]
    return small(text_width=12, interval=True)(z, t, s, y, text)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: PixelFlowTransformer.from_preset("xxl"), "xl"),
        (lambda: small(width=36), "multiple of 4 heads"),
        (lambda: small()(torch.zeros(1, 3, 8, 4), ONE, labels=LABEL), "squares of 3 channels"),
        (lambda: small()(torch.zeros(1, 3, 5, 5), ONE, labels=LABEL), "multiple of 2"),
        (lambda: small()(torch.zeros(1, 1, 8, 8), ONE, labels=LABEL), "squares of 3 channels"),
        (lambda: small()(torch.zeros(1, 3, 8, 8), ONE), "got no labels"),
        (lambda: small(classes=0)(torch.zeros(1, 3, 8, 8), ONE, labels=LABEL), "without classes"),
        (
            lambda: small(classes=0, text_width=12)(torch.zeros(1, 3, 8, 8), ONE),
            r"tokens \(B, L, 12\)",
        ),
        (
            lambda: small()(
                torch.zeros(1, 3, 8, 8), ONE, labels=LABEL, text=torch.zeros(1, 2, 12)
            ),
            "text_width=",
        ),
        (
            lambda: small(torch.float32, interval=True)(
                torch.zeros(1, 3, 8, 8), ONE, labels=LABEL
            ),
            "got no s",
        ),
        (
            lambda: small()(
                [torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 8, 8)],
                [torch.ones(2), torch.ones(1)],
                labels=[LABEL, torch.zeros(2).long()],
            ),
            r"got t for \[2, 1\] pictures, and \[1, 2\]",
        ),
        (lambda: small()(torch.zeros(2, 3, 8, 8), ONE, labels=LABEL), r"t for \[1\] pictures"),
        (lambda: small().extended(width=64), "classes, interval"),
        (lambda: small().extended(classes=7), "classes = 0 or 5"),
        (lambda: small().require_null(), "null_trained"),
        (lambda: small(interval=True).extended(interval=False), "leave interval out"),
        (lambda: small(text_width=12).extended(text_width=0), "leave text_width out"),
        (lambda: small(text_width=12).extended(text_width=16), "text_width = 16 for a network"),
        (lambda: small()([], [], labels=[]), "got no pictures"),
        (lambda: told(t=0.5), r"t = \[0.5\] for \[2\] pictures"),
        (lambda: told(t=torch.ones(2, 1)), r"write shapes \[\(2,\)\]"),
        (lambda: told(labels=1), "no list of tensors"),
        (lambda: told(torch.zeros(2, 5, 9)), r"write \(B, L, 12\)"),
        (lambda: told(torch.zeros(2, 12)), r"write \(B, L, 12\)"),
        (lambda: told(text_mask=torch.ones(2, 4)), r"write \(2, 6\)"),
        (two_lengths, "captions of 6 and of 4 tokens"),
        (
            lambda: small()([torch.zeros(1, 3, 8, 8)], ONE, labels=[LABEL]),
            "no list of tensors",
        ),
    ],
)
def test_misuse_is_one_clear_error(call, says):
    with pytest.raises(InputError, match=says):
        call()
