"""Frozen encoders: layouts, normalisation, ranges, and what is said where weights are missing."""

import re

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLKVAE,
    AutoencoderKLWan,
    AutoencoderTiny,
    VQModel,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flowspace import CrossFlowLoss, InputError, RunError
from flowspace.vision.encoders import (
    SOURCES,
    LatentEncoder,
    _renamed,
    from_ldm,
    load_encoder,
    make_buildable,
)


def images(rows=4, side=32, seed=0):
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def va_vae_like(widths=(8, 8, 16), latent=4, **changes):
    torch.manual_seed(0)
    count = len(widths)
    settings = {
        "down_block_types": ("DownEncoderBlock2D",) * (count - 1) + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (count - 1),
        "block_out_channels": widths,
        "layers_per_block": 2,
        "latent_channels": latent,
        "norm_num_groups": min(32, widths[0]),
        "scaling_factor": 1.0,
        "force_upcast": False,
    }
    return AutoencoderKL(**(settings | changes))


def in_ldm_layout(network):
    """The names of the reference, written from its modules: an inverse made by hand, not from the
    map under test.
    """
    count, found = len(network.config.block_out_channels), {}
    for name, value in network.state_dict().items():
        parts = name.split(".")
        if parts[0] in ("encoder", "decoder") and parts[1] in ("down_blocks", "up_blocks"):
            level = int(parts[2]) if parts[1] == "down_blocks" else count - 1 - int(parts[2])
            kind = {
                "resnets": "block",
                "attentions": "attn",
                "downsamplers": "downsample",
                "upsamplers": "upsample",
            }[parts[3]]
            middle = [kind] if "sample" in kind else [kind, parts[4]]
            parts = [
                parts[0],
                {"down_blocks": "down", "up_blocks": "up"}[parts[1]],
                str(level),
                *middle,
                *parts[5:],
            ]
        elif parts[1] == "mid_block":
            inner = f"block_{int(parts[3]) + 1}" if parts[2] == "resnets" else "attn_1"
            parts = [parts[0], "mid", inner, *parts[4:]]
        old = ".".join(parts)
        for new, plain in (("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")):
            old = old.replace(new, plain)
        if ".attn" in old:
            for new, plain in (
                ("group_norm", "norm"),
                ("to_q", "q"),
                ("to_k", "k"),
                ("to_v", "v"),
                ("to_out.0", "proj_out"),
            ):
                old = old.replace(f".{new}.", f".{plain}.")
            value = value[..., None, None] if value.ndim == 2 else value
        found[old] = value
    return found


def test_va_vaes_layout_has_the_references_size_and_every_name_has_its_place():
    with torch.device("meta"):
        network = va_vae_like((128, 128, 256, 256, 512), 32)
    assert sum(p.numel() for p in network.parameters()) == 69_836_067
    old = in_ldm_layout(network)
    assert len(old) == 342 and any("down.4.attn.1.q" in name for name in old)
    wanted = {name: value.shape for name, value in network.state_dict().items()}
    assert {
        (r := _renamed(name, value, 5))[0]: r[1].shape for name, value in old.items()
    } == wanted


def test_weights_in_the_references_layout_load_strictly_and_other_tensors_are_left_out(tmp_path):
    network = va_vae_like()
    extra = {
        "loss.discriminator.weight": torch.zeros(3),
        "foundation_model.x": torch.zeros(2),
        "linear_proj.weight": torch.zeros(1),
    }
    torch.save({"state_dict": in_ldm_layout(network) | extra}, tmp_path / "vavae-small.pt")
    torch.save(
        {"mean": torch.full((1, 4, 1, 1), 0.3), "std": torch.full((1, 4, 1, 1), 2.0)},
        tmp_path / "latents_stats.pt",
    )
    encoder = load_encoder(tmp_path / "vavae-small.pt")
    x = images()
    raw = network.eval().encode(x).latent_dist.mode()
    torch.testing.assert_close(encoder.encode(x), (raw - 0.3) / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        encoder.decode(encoder.encode(x)), network.decode(raw).sample, rtol=1e-4, atol=1e-5
    )
    assert torch.equal(load_encoder(tmp_path).encode(x), encoder.encode(x))


def test_an_autoencoder_without_statistics_asks_for_them_and_fitted_latents_are_standard(tmp_path):
    va_vae_like().save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    with pytest.raises(InputError, match="call fit"):
        encoder.encode(images())
    batches = [images(8, seed=seed) for seed in range(3)]
    encoder.fit(batches)
    latents = torch.cat([encoder.encode(batch) for batch in batches]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(4), atol=1e-3, rtol=0)
    again = LatentEncoder(encoder.autoencoder)
    again.set_statistics(encoder.mean.flatten(), encoder.std.flatten())
    assert torch.equal(again.encode(batches[0]), encoder.encode(batches[0]))
    with pytest.raises(InputError, match="no images"):
        encoder.fit([])


def test_scaling_factor_shift_and_latent_statistics_of_a_config_are_applied():
    x = images()
    network = va_vae_like(scaling_factor=0.18215)
    torch.testing.assert_close(
        LatentEncoder(network).encode(x), 0.18215 * network.encode(x).latent_dist.mode()
    )
    network = va_vae_like(scaling_factor=1.5305, shift_factor=0.0609)
    torch.testing.assert_close(
        LatentEncoder(network).encode(x), 1.5305 * (network.encode(x).latent_dist.mode() - 0.0609)
    )
    network = va_vae_like(latents_mean=(1.0, 2.0, 3.0, 4.0), latents_std=(2.0,) * 4)
    wanted = (
        network.encode(x).latent_dist.mode() - torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(-1, 1, 1)
    ) / 2
    torch.testing.assert_close(LatentEncoder(network).encode(x), wanted)


def test_flux_latents_are_packed_and_normalised_by_its_batch_norm():
    torch.manual_seed(0)
    network = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    network.bn.running_mean.normal_()
    network.bn.running_var.uniform_(0.5, 2)
    encoder, x = LatentEncoder(network), images()
    raw = network.encode(x).latent_dist.mode()
    b, c, h, w = raw.shape
    packed = (
        raw.view(b, c, h // 2, 2, w // 2, 2)
        .permute(0, 1, 3, 5, 2, 4)
        .reshape(b, 4 * c, h // 2, w // 2)
    )
    torch.testing.assert_close(encoder.encode(x), network.bn(packed), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        encoder.decode(encoder.encode(x)), network.decode(raw).sample, rtol=1e-3, atol=1e-4
    )


def deep_compression(**changes):
    return AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        attention_head_dim=8,
        **changes,
    )


def test_a_deep_compression_autoencoder_loads_from_its_folder(tmp_path):
    deep_compression(scaling_factor=0.5).save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert encoder.encode(images()).shape[:2] == (4, 4) and encoder.known


def rae(kind, **changes):
    from diffusers import AutoencoderRAE

    pytest.importorskip("transformers")
    make_buildable("AutoencoderRAE")
    torch.manual_seed(0)
    settings = {
        "encoder_hidden_size": 64,
        "encoder_patch_size": 8,
        "encoder_num_hidden_layers": 2,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 16,
        "patch_size": 8,
        "encoder_input_size": 32,
    }
    return AutoencoderRAE(encoder_type=kind, **settings, **changes).eval()


@pytest.mark.parametrize("kind", ["dinov2", "mae", "siglip2"])
def test_representation_autoencoders_take_images_from_0_and_normalise_their_latents_themselves(
    kind, tmp_path
):
    mean, std = torch.randn(64, 4, 4), torch.rand(64, 4, 4) + 0.5
    network, x = rae(kind, latents_mean=mean, latents_std=std), images()
    network.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert encoder.known and encoder.encode(x).shape == (4, 64, 4, 4)
    torch.testing.assert_close(encoder.encode(x), network.encode((x + 1) / 2).latent)
    plain = rae(kind).encode((x + 1) / 2).latent
    torch.testing.assert_close(
        encoder.encode(x), (plain - mean) / (std + 1e-5), rtol=1e-4, atol=2e-4
    )
    z = encoder.encode(x)
    torch.testing.assert_close(encoder.decode(z), 2 * network.decode(z).sample - 1)


def test_a_representation_autoencoder_that_brings_no_statistics_is_fitted():
    encoder = LatentEncoder(rae("mae"))
    assert not encoder.known
    latents = encoder.fit([images(16)]).encode(images(16)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(64), atol=1e-4, rtol=0)


def test_without_transformers_a_representation_autoencoder_says_what_to_install(
    tmp_path, monkeypatch
):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderRAE"}')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install 'flowspace\[rae\]'"):
        load_encoder(tmp_path)


def test_it_is_frozen_stays_in_eval_mode_and_samples_only_where_asked():
    encoder = LatentEncoder(va_vae_like(scaling_factor=0.5))
    encoder.train()
    assert not encoder.autoencoder.training and not any(
        p.requires_grad for p in encoder.parameters()
    )
    x = images()
    assert torch.equal(encoder.encode(x), encoder.encode(x))
    noisy = LatentEncoder(encoder.autoencoder, sample=True)
    draws = [noisy.encode(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_half_precision_gives_latents_in_float32(tmp_path):
    va_vae_like(scaling_factor=0.5).save_pretrained(tmp_path)
    half, full = (
        load_encoder(tmp_path, dtype=dtype).encode(images())
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert half.dtype == torch.float32
    assert (half - full).norm() < 0.03 * full.norm()


@pytest.mark.parametrize("name", SOURCES)
def test_missing_weights_are_named_with_their_place_and_the_command_that_fetches_them(
    name, tmp_path, monkeypatch
):
    with pytest.raises(RunError, match=re.escape(f"--local-dir {tmp_path / name}")) as error:
        load_encoder(name, weights=tmp_path)
    assert (SOURCES[name].files or ("config.json",))[0] in str(error.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RunError, match=f"hf download {SOURCES[name].repository}"):
        load_encoder(name)


def test_what_is_no_autoencoder_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(RunError, match="neither a folder"):
        load_encoder(tmp_path / "nothing")
    with pytest.raises(RunError, match="holds no autoencoder"):
        load_encoder(tmp_path)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(RunError, match="layout of latent diffusion"):
        load_encoder(tmp_path / "other.pt")
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(RunError, match="cannot be read"):
        load_encoder(tmp_path / "torn.pt")
    tensors = in_ldm_layout(va_vae_like())
    tensors.pop("decoder.mid.attn_1.q.weight")
    with pytest.raises(RunError, match="to_q"):
        from_ldm(tensors)


def test_images_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"takes \[-1, 1\]"):
        LatentEncoder(va_vae_like(scaling_factor=0.5)).encode(127.5 * (images() + 1))


def test_the_estimate_of_a_velocity_takes_predictions_of_any_range_and_draws_nothing():
    """It is the latent of the clamped prediction, by the posterior's mean even of an encoder that
    samples.
    """
    network = va_vae_like(scaling_factor=0.5)
    encoder = LatentEncoder(network, sample=True)
    far = 3 * images()
    wanted = 0.5 * network.encode(far.clamp(-1, 1)).latent_dist.mode()
    torch.testing.assert_close(encoder.encode_prediction(far), wanted)
    assert torch.equal(encoder.encode_prediction(far), encoder.encode_prediction(far))
    with pytest.raises(InputError, match="call fit"):
        LatentEncoder(va_vae_like()).encode_prediction(far)


def test_a_loss_along_the_estimated_velocity_trains_a_network_that_leaves_the_range():
    """The tangent is the velocity of the encoded prediction: seen against a loss that is told it
    outright.
    """
    encoder = LatentEncoder(va_vae_like(scaling_factor=0.5), sample=True)
    x = images()
    z = encoder.encode(x, torch.Generator().manual_seed(0))
    weight = torch.full((4, 3), 2.0, requires_grad=True)

    def model(z_t, t, s):
        painted = torch.einsum("bchw,cd->bdhw", z_t, weight)
        wide = painted.repeat_interleave(4, 2).repeat_interleave(4, 3)
        return (1 + t - s).reshape(-1, 1, 1, 1) * wide

    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    t, s = torch.tensor([[0.9, 0.7, 0.5, 0.3], [0.2, 0.1, 0.2, 0.1]])
    given = {"noise": noise, "t": t, "s": s}
    out = CrossFlowLoss(estimate=encoder.encode_prediction)(model, z, x, **given)
    assert out.prediction.detach().abs().max() > 1.5
    out.loss.mean().backward()
    assert weight.grad.isfinite().all() and weight.grad.abs().sum() > 0

    def velocity(z_t, t):
        clean = encoder.encode_prediction(model(z_t, t, t).detach())
        return (z_t - clean) / t.reshape(-1, 1, 1, 1)

    told = CrossFlowLoss(velocity=velocity)(model, z, x, **given)
    torch.testing.assert_close(out.target, told.target, rtol=1e-4, atol=1e-4)


def overflowing(**changes):
    """Its activations are far beyond 65504, where float16 ends."""
    network = va_vae_like(**changes)
    with torch.no_grad():
        network.encoder.down_blocks[0].resnets[0].conv2.weight.mul_(6e4).clamp_(-6e4, 6e4)
    return network


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_latents_that_overflow_in_float16_are_refused_and_not_fitted(scale, tmp_path):
    overflowing(scaling_factor=scale).save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path, dtype=torch.float16)
    with pytest.raises(InputError, match=r"AutoencoderKL in float16.*bfloat16"):
        encoder.encode(images()) if encoder.known else encoder.fit([images()])
    wide = load_encoder(tmp_path)
    if not wide.known:
        wide.fit([images()])
    assert wide.encode(images()).isfinite().all()


def test_an_autoencoder_that_must_not_be_in_float16_stays_in_float32_with_a_word(tmp_path):
    overflowing(scaling_factor=0.5, force_upcast=True).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="force_upcast"):
        encoder = load_encoder(tmp_path, dtype=torch.float16)
    assert torch.equal(encoder.encode(images()), load_encoder(tmp_path).encode(images()))
    half = load_encoder(tmp_path, dtype=torch.bfloat16)
    assert next(half.autoencoder.parameters()).dtype == torch.bfloat16


def test_broken_weights_and_images_that_are_not_numbers_are_named():
    network = va_vae_like(scaling_factor=0.5)
    with pytest.raises(InputError, match="between nan and nan"):
        LatentEncoder(network).encode(images() * torch.nan)
    with torch.no_grad():
        network.quant_conv.bias.fill_(torch.nan)
    with pytest.raises(InputError, match="weights are broken"):
        LatentEncoder(network).encode(images())


TWO_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
OTHERS = {
    "AutoencoderTiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    "VQModel": lambda: VQModel(block_out_channels=(8, 16), num_vq_embeddings=16, **TWO_LEVELS),
    "AutoencoderKLWan": lambda: AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_autoencoders_of_other_kinds_are_refused_by_name(kind, tmp_path):
    OTHERS[kind]().save_pretrained(tmp_path)
    with pytest.raises(RunError, match=f"holds {kind}, which does not encode one image"):
        load_encoder(tmp_path)


HALVING = {
    "asymmetric": lambda: AsymmetricAutoencoderKL(
        down_block_out_channels=(8, 16), up_block_out_channels=(8, 16), **TWO_LEVELS
    ),
    "hunyuan": lambda: AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=32,
    ),
    "kvae": lambda: AutoencoderKLKVAE(
        channels=32, ch_mult=(1, 2), num_enc_blocks=1, num_dec_blocks=1, z_channels=4
    ),
    "kl": lambda: AutoencoderKL(block_out_channels=(8, 16), **TWO_LEVELS),
    "dc": deep_compression,
}


@pytest.mark.parametrize("kind", HALVING)
def test_each_kind_halves_rectangles_and_refuses_what_does_not_fill_whole_cells(kind):
    torch.manual_seed(0)
    encoder = LatentEncoder(HALVING[kind](), torch.zeros(1), torch.ones(1))
    wide = torch.zeros(2, 3, 16, 32)
    latents = encoder.encode(wide)
    assert latents.shape[2:] == (8, 16) and encoder.decode(latents).shape == wide.shape
    for call in (encoder.encode, encoder.encode_prediction):
        with pytest.raises(InputError, match=r"15 x 32 pixels.*multiples of 2"):
            call(wide[:, :, 1:])
    with pytest.raises(InputError, match=r"write \(B, 3, H, W\)"):
        encoder.encode(wide[0])


def test_packed_cells_are_filled_too():
    encoder = LatentEncoder(va_vae_like(scaling_factor=0.5), pack=2)
    assert encoder.encode(torch.zeros(1, 3, 8, 24)).shape[2:] == (1, 3)
    with pytest.raises(InputError, match="multiples of 8"):
        encoder.encode(torch.zeros(1, 3, 8, 12))


def test_a_representation_autoencoder_does_not_squeeze_rectangles():
    encoder = LatentEncoder(rae("mae"), torch.zeros(1), torch.ones(1))
    with pytest.raises(InputError, match="crop them to squares"):
        encoder.encode(torch.zeros(1, 3, 16, 32))


# --- any module, any id


class Halves(nn.Module):
    """An autoencoder that nobody knows: squares of two pixels become cells."""

    def encode(self, images):
        return nn.functional.pixel_unshuffle(images, 2) * 3 + 1

    def decode(self, latents):
        return nn.functional.pixel_shuffle((latents - 1) / 3, 2)


def of_functions():
    module = Halves()
    return LatentEncoder.of(module.encode, module.decode)


@pytest.mark.parametrize("build", [lambda: LatentEncoder(Halves()), of_functions])
def test_any_module_or_two_functions_are_an_encoder_whose_latents_are_standard(build):
    encoder, x = build(), images(8)
    with pytest.raises(InputError, match="call fit"):
        encoder.encode(x)
    latents = encoder.fit([x]).encode(x)
    assert latents.shape == (8, 12, 16, 16)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(encoder.decode(latents), x, atol=1e-5, rtol=0)


class LooksAtNothing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "item")
        return func(*args, **(kwargs or {}))


def test_without_a_check_no_value_is_looked_at_and_the_latents_are_the_same():
    encoder, x = of_functions(), images(8)
    encoder.fit([x])
    with LooksAtNothing():
        latents = encoder.encode(x, check=False)
        with pytest.raises(AssertionError):
            encoder.encode(x)
    assert torch.equal(latents, encoder.encode(x))
    assert encoder.encode(3 * x, check=False).shape == latents.shape
    with pytest.raises(InputError, match="takes"):
        encoder.encode(3 * x)


@pytest.mark.parametrize("given", [(), (torch.zeros(4), torch.ones(4))], ids=["fitted", "given"])
def test_statistics_are_on_the_device_of_the_weights(given):
    """As of an autoencoder that was trained on a GPU; meta is a device that every machine has."""
    autoencoder = nn.Conv2d(3, 4, 1, device="meta")
    autoencoder.encode = autoencoder.decode = autoencoder.forward
    encoder = LatentEncoder(autoencoder, *given)
    encoder.known = True
    assert encoder.encode_prediction(torch.zeros(2, 3, 4, 4, device="meta")).is_meta
    encoder.set_statistics(torch.zeros(4), torch.ones(4))
    assert encoder.mean.is_meta and encoder.std.is_meta


def test_two_functions_take_the_module_they_belong_to_along():
    network = va_vae_like()
    encoder = LatentEncoder.of(network.encode, network.decode, torch.zeros(4), torch.ones(4))
    assert len(list(encoder.parameters())) == len(list(network.parameters()))
    assert not any(weight.requires_grad for weight in network.parameters())
    x = images()
    torch.testing.assert_close(encoder.encode(x), network.encode(x).latent_dist.mode())


@pytest.mark.parametrize("autoencoder", [nn.Conv2d(3, 4, 2), object(), None])
def test_what_cannot_encode_is_told_what_an_autoencoder_has(autoencoder):
    with pytest.raises(InputError, match=r"no module with encode.*LatentEncoder\.of"):
        LatentEncoder(autoencoder)


def test_an_encoder_alone_encodes_and_says_that_it_cannot_decode():
    network = nn.Conv2d(3, 4, 2, 2)
    network.encode = network.forward
    encoder = LatentEncoder(network, torch.zeros(4), torch.ones(4))
    latents = encoder.encode(torch.rand(1, 3, 8, 8))
    with pytest.raises(InputError, match=r"no module with decode"):
        encoder.decode(latents)


def test_a_module_that_returns_vectors_is_told_what_to_return():
    vectors = nn.Flatten()
    encoder = LatentEncoder.of(vectors, lambda latents: latents)
    with pytest.raises(InputError, match=r"got shape \(4, 3072\).*return latents \(B, C, h, w\)"):
        encoder.fit([images()])


def served(monkeypatch, folder):
    """Let the hub serve the files of a folder as those of ``someone/pictures``."""
    from diffusers import configuration_utils
    from diffusers.utils import hub_utils
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    asked = []

    def download(repo_id, filename=None, subfolder=None, **rest):
        asked.append((repo_id, filename, subfolder))
        if repo_id != "someone/pictures":
            raise LocalEntryNotFoundError("the hub cannot be reached")
        path = folder / (subfolder or "") / filename
        if not path.exists():
            raise EntryNotFoundError(f"no {filename}")
        return str(path)

    monkeypatch.setattr(configuration_utils, "hf_hub_download", download)
    monkeypatch.setattr(hub_utils, "hf_hub_download", download)
    return asked


@pytest.mark.parametrize("below", ["", "vae"])
def test_an_id_on_the_hub_gives_the_same_encoder_as_its_folder(tmp_path, monkeypatch, below):
    va_vae_like(scaling_factor=0.5).save_pretrained(tmp_path / below)
    asked = served(monkeypatch, tmp_path)
    encoder = load_encoder(f"someone/pictures/{below}".rstrip("/"))
    x = images()
    assert torch.equal(encoder.encode(x), load_encoder(tmp_path / below).encode(x))
    assert {name for name, *_ in asked} == {"someone/pictures"}
    assert any(file == "diffusion_pytorch_model.safetensors" for _, file, _ in asked)


def test_an_id_that_cannot_be_fetched_or_does_not_suit_is_one_clear_error(tmp_path, monkeypatch):
    served(monkeypatch, tmp_path)
    with pytest.raises(RunError, match=r"nobody/nothing is no folder.*as in nobody/nothing/vae"):
        load_encoder("nobody/nothing")
    AutoencoderTiny().save_pretrained(tmp_path)
    with pytest.raises(RunError, match=r"someone/pictures holds AutoencoderTiny"):
        load_encoder("someone/pictures")


def test_weights_that_lack_a_tensor_are_one_error_that_names_it(tmp_path):
    va_vae_like(scaling_factor=0.5).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"decoder.conv_in.bias", b"decoder.conv_in.biaw"))
    with pytest.raises(RunError, match=r"lack 1 tensor.*such as decoder.conv_in.bias; fetch"):
        load_encoder(tmp_path)
