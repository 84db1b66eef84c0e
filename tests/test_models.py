"""Unmodified models of other libraries: SharedPrimal gives their value, their gradient and their
forward derivative.
"""

import copy
import functools
import warnings

import pytest
import torch
from strategies import normal
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowspace import SharedPrimal

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
MODELS = {}
PICTURE, SMALL = (4, 3, 64, 64), (4, 3, 32, 32)
TOKENS = (4, 5, 16)
TEXT = normal(5, 4, 5, 16)
KEEP = torch.arange(5) < torch.tensor([5, 3, 2, 4])[:, None]


class Case:
    """A model, what is called with (x, t), and how exactly the derivative is known.

    ``single``: the model computes parts in float32 whatever comes. ``random``: it draws, and
    torch.func.jvp draws otherwise than the plain program, so that finite differences are the
    reference.
    """

    def __init__(self, build, shape, call, train=False, single=False, random=False):
        self.build, self.shape, self.call, self.train = build, shape, call, train
        self.single, self.random = single, random


def model(name, build, shape, call, **options):
    MODELS[name] = Case(build, shape, call, **options)


def scaled(x, t):
    return x * (1 + t.reshape(-1, *[1] * (x.ndim - 1)))


def picture(net, x, t):
    return net(scaled(x, t))


# --- timm


def timm(name, shape=SMALL, title=None, train=False, random=False, **options):
    def build():
        options.setdefault("num_classes", 5)
        return pytest.importorskip("timm").create_model(name, pretrained=False, **options)

    model(f"timm {title or name}", build, shape, picture, train=train, random=random)


timm("vit_small_patch16_224", img_size=32, depth=2)
timm(
    "vit_small_patch16_224",
    title="vit, registers",
    img_size=32,
    depth=2,
    qk_norm=True,
    reg_tokens=2,
    dynamic_img_size=True,
)
timm(
    "vit_base_patch16_siglip_224",
    title="vit, attention pool",
    img_size=32,
    depth=1,
    embed_dim=24,
    num_heads=2,
)
timm("deit3_small_patch16_224", img_size=32, depth=2)
timm(
    "deit3_small_patch16_224",
    title="deit3, training",
    img_size=32,
    depth=2,
    embed_dim=24,
    num_heads=2,
    drop_path_rate=0.5,
    proj_drop_rate=0.2,
    attn_drop_rate=0.2,
    train=True,
    random=True,
)
timm("eva02_tiny_patch14_224", (4, 3, 28, 28), img_size=28, depth=2)
timm("vit_small_patch16_dinov3", img_size=32, depth=2)
timm("convnext_atto", PICTURE)
timm("mixer_s16_224", img_size=32)
timm("swin_tiny_patch4_window7_224", (3, 3, 56, 56), img_size=56, depths=(2, 2), num_heads=(3, 6))
timm("swinv2_tiny_window8_256", (3, 3, 64, 64), img_size=64, depths=(2, 2), num_heads=(3, 6))
timm("resnet18", PICTURE)
timm("resnet18", PICTURE, title="resnet18, training", train=True)
timm("efficientnet_b0", PICTURE)
timm("mobilenetv3_small_100", PICTURE, title="mobilenetv3, training", train=True)
timm("mobilevit_xxs", PICTURE)
timm("maxvit_tiny_tf_224", PICTURE, img_size=64, depths=(1, 1), embed_dim=(32, 64), stem_width=16)
timm("cait_xxs24_224", img_size=32, depth=2)
timm("xcit_nano_12_p16_224", img_size=32, depth=2)
timm("poolformer_s12", (3, 3, 32, 32))
timm("beit_base_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3)
timm("levit_128s", (2, 3, 224, 224))
timm("pvt_v2_b0", (3, 3, 32, 32))
timm("edgenext_xx_small", PICTURE)
timm("fastvit_t8", (3, 3, 64, 64))
timm("ghostnet_100", (3, 3, 32, 32))


# --- torch


def encoder(**options):
    return lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32, 0.1, batch_first=True, **options), 2
    )


def attend(net, x, t, **options):
    h = scaled(x, t)
    return net(h, h, h, **options)[0]


def tokens_first(net, x, t):
    return net(scaled(x, t).transpose(0, 1)).transpose(0, 1)


def causal(net, x, t):
    return net(
        scaled(x, t),
        mask=nn.Transformer.generate_square_subsequent_mask(5, dtype=x.dtype),
        is_causal=True,
    )


def padding(net, x, t):
    return net(scaled(x, t), src_key_padding_mask=~KEEP)


def across(net, x, t):
    h = scaled(x, t).transpose(0, 1)
    return net(h, h[..., :8], h[..., 8:], key_padding_mask=~KEEP)[0].transpose(0, 1)


for training in (False, True):
    options = {"train": training, "random": training}
    mode = "training" if training else "evaluation"
    model(
        f"torch TransformerEncoder, {mode}", encoder(activation="gelu"), TOKENS, picture, **options
    )
    model(
        f"torch TransformerEncoder, norm first, {mode}",
        encoder(norm_first=True),
        TOKENS,
        picture,
        **options,
    )
    model(f"torch TransformerEncoder, causal, {mode}", encoder(), TOKENS, causal, **options)
    model(f"torch TransformerEncoder, padding, {mode}", encoder(), TOKENS, padding, **options)
    attention = functools.partial(nn.MultiheadAttention, 16, 4, dropout=0.2, batch_first=True)
    model(f"torch MultiheadAttention, {mode}", attention, TOKENS, attend, **options)
    plain = functools.partial(attend, need_weights=False)
    model(f"torch MultiheadAttention, no weights, {mode}", attention, TOKENS, plain, **options)
    crossed = functools.partial(
        nn.MultiheadAttention,
        16,
        4,
        dropout=0.2,
        kdim=8,
        vdim=8,
        add_bias_kv=True,
        add_zero_attn=True,
    )
    model(f"torch MultiheadAttention, other keys, {mode}", crossed, TOKENS, across, **options)
model(
    "torch LSTM, training",
    functools.partial(nn.LSTM, 16, 8, 2, dropout=0.3, batch_first=True),
    TOKENS,
    lambda net, x, t: net(scaled(x, t))[0],
    train=True,
    random=True,
)
for recurrent in (nn.GRU, nn.LSTM, nn.RNN):
    model(
        f"torch {recurrent.__name__}",
        functools.partial(recurrent, 16, 8, 2, batch_first=True, bidirectional=True),
        TOKENS,
        lambda net, x, t: net(scaled(x, t))[0],
    )
model(
    "torch TransformerEncoder, tokens first",
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 2),
    TOKENS,
    tokens_first,
)


# --- torchvision


def vision(name, shape=PICTURE, train=False, random=False, **options):
    def build():
        return getattr(pytest.importorskip("torchvision").models, name)(num_classes=5, **options)

    model(f"torchvision {name}", build, shape, picture, train=train, random=random)


vision("mobilenet_v2")
vision("shufflenet_v2_x0_5")
vision("squeezenet1_0")
vision("densenet121", (2, 3, 32, 32))
vision(
    "VisionTransformer",
    SMALL,
    image_size=32,
    patch_size=16,
    num_layers=2,
    num_heads=4,
    hidden_dim=32,
    mlp_dim=64,
    dropout=0.2,
    train=True,
    random=True,
)
vision(
    "SwinTransformer",
    (3, 3, 32, 32),
    patch_size=[4, 4],
    embed_dim=24,
    depths=[2, 2],
    num_heads=[2, 4],
    window_size=[2, 2],
)


# --- diffusers

LATENT = (4, 4, 8, 8)
UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def diffusers(
    name, call, shape=LATENT, title=None, train=False, random=False, single=False, **options
):
    def build():
        return getattr(pytest.importorskip("diffusers"), name)(**options)

    model(
        f"diffusers {title or name}", build, shape, call, train=train, random=random, single=single
    )


def text(x):
    return TEXT.to(x.dtype)[: len(x)]


def labelled(net, x, t):
    return net(x, timestep=t * 999, class_labels=torch.arange(len(x))).sample


def timed(net, x, t):
    return net(x, t * 999).sample


def at_a_time(net, x, t):
    """The embedding of times is in float32, where finite differences drown."""
    return net(scaled(x, t), 500).sample


def captioned(net, x, t):
    return net(x, t * 999, text(x)).sample


def pooled(net, x, t):
    return net(x, text(x), text(x)[:, 0], t * 999).sample


def flux(net, x, t):
    ids = torch.zeros(16, 3, dtype=x.dtype)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return net(
        x, text(x), text(x)[:, 0], t, ids, torch.zeros(5, 3, dtype=x.dtype), guidance=None
    ).sample


def decoded(net, x, t):
    return net.decode(scaled(x, t)).sample


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4}
diffusers(
    "DiTTransformer2DModel",
    labelled,
    num_layers=2,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=10,
    norm_num_groups=4,
    **HEADS,
)
SPATIAL = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    **UNET,
}
diffusers("UNet2DModel", timed, **SPATIAL)
diffusers(
    "UNet2DModel",
    at_a_time,
    title="UNet2DModel, training",
    dropout=0.2,
    train=True,
    random=True,
    **SPATIAL,
)
diffusers(
    "UNet2DConditionModel",
    captioned,
    sample_size=8,
    in_channels=4,
    out_channels=4,
    cross_attention_dim=16,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    **UNET,
)
diffusers(
    "SD3Transformer2DModel",
    pooled,
    sample_size=8,
    patch_size=2,
    num_layers=2,
    joint_attention_dim=16,
    caption_projection_dim=16,
    pooled_projection_dim=16,
    pos_embed_max_size=8,
    qk_norm="rms_norm",
    **HEADS,
)
diffusers(
    "FluxTransformer2DModel",
    flux,
    (4, 16, 4),
    patch_size=1,
    in_channels=4,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=16,
    pooled_projection_dim=16,
    axes_dims_rope=(4, 4, 8),
    single=True,
)
diffusers(
    "WanTransformer3DModel",
    captioned,
    (2, 4, 2, 8, 8),
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    ffn_dim=16,
    num_layers=1,
    rope_max_seq_len=32,
    single=True,
)
for part, size in (("decoder", LATENT), ("encoder", (4, 3, 16, 16))):
    diffusers(
        "AutoencoderKL",
        decoded
        if part == "decoder"
        else lambda net, x, t: net.encode(scaled(x, t)).latent_dist.mode(),
        size,
        title=f"AutoencoderKL, {part}",
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )


# --- transformers

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
LANGUAGE = {"vocab_size": 20, "max_position_embeddings": 32, **VIT}


def transformers(name, call, shape, train=False, random=False, single=False, **options):
    def build():
        library = pytest.importorskip("transformers")
        return getattr(library, name)(getattr(library, name.replace("Model", "Config"))(**options))

    model(f"transformers {name}", build, shape, call, train=train, random=random, single=single)


def hidden(net, x, t):
    return net(scaled(x, t)).last_hidden_state


def embedded(net, x, t):
    return net(inputs_embeds=scaled(x, t), attention_mask=KEEP.long()).last_hidden_state


transformers(
    "ViTModel", hidden, SMALL, image_size=32, patch_size=16, train=True, random=True, **VIT
)
transformers("Dinov2Model", hidden, SMALL, image_size=32, patch_size=16, **VIT)
transformers("LlamaModel", embedded, TOKENS, num_key_value_heads=1, single=True, **LANGUAGE)
transformers("BertModel", embedded, TOKENS, **LANGUAGE)


# --- laws


def built(case, dtype=torch.float64):
    torch.manual_seed(0)
    net = case.build().to(dtype).train(case.train)
    for (
        weight
    ) in net.parameters():  # heads and gates that start near zero would hide what comes before
        if weight.ndim and weight.abs().max() < 1e-3:
            nn.init.normal_(weight, std=0.2)
    return net


def inputs(case, dtype=torch.float64):
    t = torch.linspace(0.1, 0.9, case.shape[0], dtype=dtype)
    return (normal(1, *case.shape).to(dtype), t), (
        normal(2, *case.shape).to(dtype),
        torch.ones_like(t),
    )


def seeded(fn, *args):
    torch.manual_seed(5)
    return fn(*args)


def exact(case, net):
    """The derivative of the whole batch by torch.func.jvp, or by finite differences where the
    model draws.
    """
    primals, tangents = inputs(case)
    still = copy.deepcopy(net)
    for part in still.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
            part.running_mean = part.running_var = part.num_batches_tracked = None

    def fn(x, t):
        return case.call(still, x, t)

    if (
        not case.random
    ):  # with gradient, since the fast path of nn.TransformerEncoder has no forward derivative
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(fn, primals, tangents)[1].detach()
    with torch.no_grad():
        step = 1e-5
        weights = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
        ends = [
            w * seeded(fn, *(p + h * step * v for p, v in zip(primals, tangents, strict=True)))
            for h, w in weights.items()
        ]
        return sum(ends) / step


def differ(found, wanted):
    """The largest difference, relative to the largest entry."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@functools.cache
def reference(name):
    case = MODELS[name]
    return exact(case, built(case))


each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_an_unmodified_model_has_its_value_its_gradient_and_its_forward_derivative(name):
    case = MODELS[name]
    plain, net = built(case), built(case)
    primals, tangents = inputs(case)
    value = seeded(case.call, plain, *primals)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    found, derivative = SharedPrimal()(lambda x, t: case.call(net, x, t), primals, tangents)
    assert torch.equal(torch.get_rng_state(), after)
    assert differ(found.detach(), value.detach()) < 1e-12 and not derivative.requires_grad
    assert differ(derivative, reference(name)) < (1e-7 if case.single or case.random else 1e-12)
    for mine, theirs in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    for output in (value, found):
        (
            output
            * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
        ).sum().backward()
    for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@each_model
def test_half_of_the_rows_have_the_derivative_of_the_whole_batch(name):
    case = MODELS[name]
    plain, net = built(case), built(case)
    primals, tangents = inputs(case)
    rows = torch.arange(len(primals[0])) % 2 == 0
    with torch.no_grad():
        seeded(case.call, plain, *primals)
    torch.manual_seed(5)
    derivative = SharedPrimal()(lambda x, t: case.call(net, x, t), primals, tangents, rows)[1]
    assert not derivative[~rows].any()
    assert differ(derivative[rows], reference(name)[rows]) < (
        1e-7 if case.single or case.random else 1e-12
    )
    for mine, theirs in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@each_model
def test_in_float32_the_derivative_is_that_of_float64(name):
    case = MODELS[name]
    net = built(case).float()
    primals, tangents = inputs(case, torch.float32)
    torch.manual_seed(5)
    derivative = SharedPrimal()(lambda x, t: case.call(net, x, t), primals, tangents)[1]
    assert derivative.dtype == torch.float32
    assert differ(derivative.double(), reference(name)) < 1e-5


COMPILED = [
    "timm vit_small_patch16_224",
    "timm deit3_small_patch16_224",
    "timm eva02_tiny_patch14_224",
    "timm vit_small_patch16_dinov3",
    "timm convnext_atto",
    "timm resnet18, training",
    "timm swin_tiny_patch4_window7_224",
    "torch TransformerEncoder, tokens first",
    "diffusers UNet2DModel, training",
    "diffusers DiTTransformer2DModel",
]


def whole(net):
    net.compile(backend="aot_eager")


def repeated_blocks(net):
    net.compile_repeated_blocks(backend="aot_eager")


@pytest.mark.parametrize(
    ("name", "compile_"),
    [
        *[(name, whole) for name in COMPILED],
        ("diffusers FluxTransformer2DModel", repeated_blocks),
        ("diffusers WanTransformer3DModel", repeated_blocks),
        ("diffusers UNet2DConditionModel", repeated_blocks),
    ],
)
def test_a_compiled_model_has_the_derivative_of_the_plain_one(name, compile_):
    """By a backend that traces and does not compile; nothing falls back to running as it was
    written.
    """
    case = MODELS[name]
    plain, net = built(case), built(case)
    compile_(net)
    primals, tangents = inputs(case)
    value = seeded(case.call, plain, *primals)
    rows = torch.arange(len(primals[0])) % 2 == 0
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compiled part")
        found, derivative = SharedPrimal()(
            lambda x, t: case.call(net, x, t), primals, tangents, rows
        )
    assert differ(found.detach(), value.detach()) < 1e-7
    assert not derivative[~rows].any()
    assert differ(derivative[rows], reference(name)[rows]) < (
        1e-7 if case.single or case.random else 1e-10
    )
    for mine, theirs in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    for output in (value, found):
        (
            output
            * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
        ).sum().backward()
    for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-7, atol=1e-7)
