"""Representation autoencoders: published sizes, statistics of each position, noise that is keyed
and only in training, and the decoder's loss with its adaptive weight.
"""

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from flowspace import InputError, LinearSchedule
from flowspace.training import Draws
from flowspace.vision import LatentEncoder, PerceptualLoss, load_encoder
from flowspace.vision.adversarial import LARGEST_BALANCE, AdversarialLoss, Discriminator, balance
from flowspace.vision.encoders import RAE_EPSILON
from flowspace.vision.perceptual import FeatureNetwork
from flowspace.vision.rae import (
    DECODERS,
    ENCODERS,
    DecoderLoss,
    RAEReconstruction,
    balance_at,
    build_rae,
    keep_statistics,
    with_decoder,
)

TINY_ENCODER = {
    "encoder_hidden_size": 64,
    "encoder_patch_size": 8,
    "encoder_num_hidden_layers": 2,
    "encoder_input_size": 32,
    "patch_size": 8,
}
TINY = TINY_ENCODER | {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 32,
}


def images(rows=4, seed=0):
    return torch.rand(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tiny(encoder="mae", **changes):
    torch.manual_seed(0)
    return build_rae(encoder, "b", **(TINY | changes)).eval()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_published_sizes_are_those_of_their_matrices(encoder, decoder):
    """4 d^2 + 2 d m numbers in a block, and the latents are 768 channels on 16 x 16 cells."""
    with torch.device("meta"):
        network = build_rae(encoder, decoder)
    assert RAEReconstruction(network).latent_shape == (768, 16, 16)
    assert network.config.image_size is None and network.decoder_image_size == 256
    d, layers, _, m = DECODERS[decoder].values()
    blocks = [p for p in network.decoder.decoder_layers.parameters() if p.ndim == 2]
    assert sum(p.numel() for p in blocks) == layers * (4 * d**2 + 2 * d * m)
    assert network.config.decoder_num_attention_heads == d // {"b": 64, "l": 64, "xl": 72}[decoder]


def test_siglip_is_given_images_in_minus_one_to_one():
    settings = ENCODERS["siglip2"]
    for mean, std in zip(settings["encoder_norm_mean"], settings["encoder_norm_std"], strict=True):
        assert ((0 - mean) / std, (1 - mean) / std) == (-1, 1)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_new_decoder_leaves_the_encoder_as_it_is(encoder):
    old = tiny(encoder, latents_mean=normal(64, 4, 4), latents_std=normal(64, 4, 4).exp())
    new = with_decoder(old, "b", **(TINY | {"decoder_hidden_size": 32})).eval()
    x = (images() + 1) / 2
    assert torch.equal(new.encode(x).latent, old.encode(x).latent)
    assert new.decoder.decoder_pred.weight.shape == (192, 32)
    assert old.decoder.decoder_pred.weight.shape == (192, 16)


def test_unknown_names_and_shapes_are_one_clear_error():
    with pytest.raises(InputError, match="write one of dinov2, mae, siglip2"):
        build_rae("clip")
    with pytest.raises(InputError, match="write one of b, l, xl"):
        build_rae("mae", "huge")
    with pytest.raises(InputError, match="tau = -1"):
        RAEReconstruction(tiny(), tau=-1)
    with pytest.raises(InputError, match="images of the decoder's size"):
        DecoderLoss()(images(), images()[:, :, :16])


# --- statistics of each position ---------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["dinov2", "mae"])
def test_statistics_of_each_position_make_latents_of_mean_0_and_spread_1_at_each(
    encoder, tmp_path
):
    fitted = LatentEncoder(tiny(encoder))
    batches = [images(16, seed) for seed in range(3)]
    fitted.fit(batches, by_position=True)
    assert fitted.mean.shape == (64, 4, 4)
    whole = LatentEncoder(tiny(encoder)).fit(batches)
    before = fitted.encode(batches[0])
    keep_statistics(fitted)
    torch.testing.assert_close(fitted.encode(batches[0]), before, rtol=1e-4, atol=1e-4)
    fitted.autoencoder.save_pretrained(tmp_path)
    saved = load_encoder(tmp_path)
    assert saved.known
    for encoder in (fitted, LatentEncoder(fitted.autoencoder), saved):
        latents = torch.cat([encoder.encode(batch) for batch in batches])
        assert latents.mean(0).abs().max() < 1e-3
        assert (latents.std(0, correction=0) - 1).abs().max() < 2e-3
    coarse = torch.cat([whole.encode(batch) for batch in batches])
    assert (coarse.std(0, correction=0) - 1).abs().max() > 0.1  # of each channel alone
    torch.testing.assert_close(saved.decode(latents), fitted_decoding(saved, latents))


def fitted_decoding(encoder, latents):
    return 2 * encoder.autoencoder.decode(latents).sample - 1


def test_statistics_of_positions_are_added_and_divided_at_their_own_place():
    encoder, x = LatentEncoder(tiny()).fit([images(8)], by_position=True), images(8)
    again = LatentEncoder(encoder.autoencoder, encoder.mean, encoder.std)
    assert torch.equal(again.encode(x), encoder.encode(x))
    raw = encoder.autoencoder.encode((x + 1) / 2).latent
    torch.testing.assert_close(encoder.encode(x), (raw - raw.mean(0)) / raw.std(0, correction=0))
    torch.testing.assert_close(
        encoder.decode(encoder.encode(x)), fitted_decoding(encoder, raw), rtol=1e-4, atol=1e-5
    )
    encoder.set_statistics(normal(64, 3, 3), normal(64, 3, 3).exp())
    with pytest.raises(InputError, match=r"latents on 4 x 4 cells.*position of 3 x 3"):
        encoder.encode(x)


def test_one_image_has_no_spread_at_a_position():
    with pytest.raises(InputError, match=r"channel \d+ of the latents at row \d, column \d"):
        LatentEncoder(tiny()).fit([images(1)], by_position=True)


def test_statistics_are_not_kept_twice():
    network = tiny(latents_mean=normal(64, 4, 4), latents_std=normal(64, 4, 4).exp())
    with pytest.raises(InputError, match="normalises its latents already"):
        keep_statistics(LatentEncoder(network))
    with pytest.raises(InputError, match="without statistics"):
        keep_statistics(LatentEncoder(tiny()))


def test_the_decoder_is_trained_also_where_a_frozen_encoder_held_the_autoencoder():
    encoder = LatentEncoder(tiny()).fit([images(4)], by_position=True)
    network = RAEReconstruction(encoder.autoencoder)
    network(images(2)).square().mean().backward()
    moved = {name for name, p in network.named_parameters() if p.grad is not None}
    assert moved and all(".decoder." in name for name in moved)


# --- the noise of training ---------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_noise_of_spread_tau_u_is_added_to_the_encoders_features_in_training_alone(own):
    """Whether or not the autoencoder normalises its latents: the noise is on its features."""
    statistics = {}
    if own:
        statistics = {"latents_mean": normal(64, 4, 4), "latents_std": normal(64, 4, 4).exp()}
    network = RAEReconstruction(tiny(noise_tau=0.8, **statistics), tau=0.5)
    plain = tiny()  # of the same weights
    x, uniform, noise = images(), torch.tensor([0.0, 0.3, 0.6, 1.0]), normal(4, 64, 4, 4, seed=1)
    features = plain.encode((x + 1) / 2).latent
    sigma = 0.5 * uniform.reshape(4, 1, 1, 1)
    noisy = 2 * plain.decode(features + sigma * noise).sample - 1
    clean = 2 * plain.decode(features).sample - 1
    given = {"uniform": uniform, "noise": noise}
    torch.testing.assert_close(network.train()(x, **given), noisy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.eval()(x, **given), clean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.eval()(x), clean, rtol=1e-4, atol=1e-4)
    assert (noisy - clean)[1:].abs().amax((1, 2, 3)).min() > 1e-2


def test_draws_of_a_step_and_row_are_the_noise_however_rows_are_shared_out():
    network, x = RAEReconstruction(tiny()).train(), images()

    def made(step, first, last):
        draws = Draws(0, step, first, last, 4, torch.device("cpu"))
        uniform, noise = draws.uniform((), 1), draws.normal(network.latent_shape, 2)
        return network(x[first:last], uniform, noise)

    whole = made(3, 0, 4)
    shared = torch.cat([made(3, 0, 1), made(3, 1, 4)])
    torch.testing.assert_close(whole, shared, rtol=1e-4, atol=1e-5)
    assert (whole - made(4, 0, 4)).abs().max() > 1e-2


def test_noise_that_is_not_given_has_the_spread_of_tau_times_a_uniform_number():
    """The mean square of sigma n is tau^2 / 3."""
    network = RAEReconstruction(tiny(), tau=0.8).train()
    torch.manual_seed(0)
    drawn = network._noise(torch.zeros(4000, 64, 1, 1), None, None)
    assert drawn.square().mean() == pytest.approx(0.8**2 / 3, rel=0.05)
    spreads = drawn.flatten(1).std(1)
    assert spreads.max() < 0.8 * 1.4 and spreads.min() < 0.05


def test_the_frozen_encoder_gets_no_gradient_and_stays_in_eval_mode():
    network = RAEReconstruction(tiny("dinov2")).train()
    assert not any(module.training for module in network.autoencoder.encoder.modules())
    assert network.autoencoder.decoder.training
    before = [p.clone() for p in network.autoencoder.encoder.parameters()]
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    DecoderLoss()(network(images()), images()).loss.mean().backward()
    optimizer.step()
    assert all(p.grad is None for p in network.autoencoder.encoder.parameters())
    assert all(p.grad.abs().sum() > 0 for p in network.autoencoder.decoder.parameters())
    assert len(trained) == len(list(network.autoencoder.decoder.parameters()))
    after = network.autoencoder.encoder.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_where_features_have_no_spread_noise_is_divided_as_they_are():
    network, noise = RAEReconstruction(tiny()), normal(2, 64, 4, 4)
    network.autoencoder._latents_std = torch.zeros(1)
    found = network._noise(torch.zeros_like(noise), torch.tensor([0.5, 1.0]), noise)
    sigma = torch.tensor([0.4, 0.8]).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(found, sigma * noise / RAE_EPSILON)


def test_in_bfloat16_noise_of_float32_leaves_everything_in_bfloat16():
    network = RAEReconstruction(tiny().bfloat16()).train()
    made = network(images().bfloat16(), torch.rand(4), normal(4, *network.latent_shape))
    assert made.dtype == torch.bfloat16 and made.isfinite().all()


def test_an_encoder_that_was_trained_elsewhere_is_frozen_and_its_images_get_no_gradient():
    autoencoder = tiny("dinov2").train()
    autoencoder.encoder.requires_grad_(True)
    network, x = RAEReconstruction(autoencoder), images().requires_grad_()
    assert not any(p.requires_grad for p in autoencoder.encoder.parameters())
    assert not any(module.training for module in autoencoder.encoder.modules())
    made = network(x)
    assert torch.autograd.grad(made.sum(), x, allow_unused=True) == (None,)


def test_weights_and_spread_are_the_published_ones_where_nothing_is_said():
    assert RAEReconstruction(tiny()).tau == 0.8
    assert (DecoderLoss().perceptual_weight, DecoderLoss().adversarial_weight) == (1, 0.75)


# --- the loss ----------------------------------------------------------------------------------


class Convolved(FeatureNetwork):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Conv2d(3, 8, 4, 4)
        self.requires_grad_(False)

    def forward(self, images):
        return [self.layer(images).tanh()]


def discriminator():
    torch.manual_seed(2)
    return Discriminator(Convolved(), [8], width=16, kernel=3).eval()


def slope_at(weight, loss):
    return torch.autograd.grad(loss.mean(), weight, retain_graph=True)[0].norm()


def test_the_loss_is_absolute_error_and_perceptual_distance_of_each_row():
    perceptual = PerceptualLoss(Convolved())
    made, x = images(seed=1), images()
    terms = DecoderLoss(perceptual, perceptual_weight=2.0)(made, x)
    wanted = (made - x).abs().mean((1, 2, 3)) + 2 * perceptual(made, x)
    torch.testing.assert_close(terms.loss, wanted)
    assert terms.loss.shape == (4,) and terms.adversarial.abs().sum() == 0


def test_the_adversarial_gradient_is_three_quarters_of_the_others_at_the_last_layer():
    network, x = RAEReconstruction(tiny()).eval(), images()
    made = network(x)
    opinion = AdversarialLoss(LinearSchedule(), augmented=False).opinion(discriminator(), made)
    loss_fn = DecoderLoss(PerceptualLoss(Convolved()))
    terms = loss_fn(made, x, opinion, network.last_layer)
    others = loss_fn(made, x).loss
    wanted = 0.75 * slope_at(network.last_layer, others)
    found = slope_at(network.last_layer, terms.loss - others)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)
    assert terms.balance.ndim == 0 and not terms.balance.requires_grad
    each = loss_fn(made, x, opinion)
    torch.testing.assert_close(each.balance, balance(others, opinion, made))


def test_the_adaptive_weight_is_the_ratio_of_two_known_gradients_with_its_floor_and_bound():
    """Of a linear layer: the mean of w x has gradient mean(x), and twice it the double."""
    weight = torch.tensor([1.0, 1.0], requires_grad=True)
    x = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    rows = (weight * x).sum(1)
    assert balance_at(weight, 2 * rows, rows).item() == pytest.approx(2, rel=1e-5)
    assert balance_at(weight, rows, 0 * rows).item() == LARGEST_BALANCE
    small = balance_at(weight, 1e-6 * rows, 1e-6 * rows).item()  # |grad| = 5e-6, and 1e-6 below
    assert small == pytest.approx(5 / 6, rel=1e-4)
    assert weight.grad is None


def test_a_decoder_learns_to_reconstruct():
    network, x = RAEReconstruction(tiny(), tau=0.1).train(), images(2)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 1e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(60):
        loss = DecoderLoss()(network(x), x).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
