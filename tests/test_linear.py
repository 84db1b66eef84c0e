"""The linear autoencoder: an independent decomposition, and that it is an encoder like others."""

import pytest
import torch

pytest.importorskip("diffusers")

from flowspace import InputError, RunError
from flowspace.vision.encoders import LatentEncoder, load_encoder
from flowspace.vision.linear import LinearAutoencoder


def pictures(count=40, size=8):
    draw = torch.Generator().manual_seed(0)
    small = torch.randn(count, 3, size // 2, size // 2, generator=draw)
    smooth = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    return torch.tanh(smooth + 0.1 * torch.randn(count, 3, size, size, generator=draw))


def fitted(channels, images):
    return LinearAutoencoder(4, channels).fit(images.split(7))


def squares(images):
    return torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("channels", [1, 5, 20])
def test_what_it_loses_is_the_rest_of_the_singular_values(channels):
    images = pictures()
    lost = (fitted(channels, images)(images) - images).double().square().sum()
    rows = squares(images).double()
    values = torch.linalg.svdvals(rows - rows.mean(0))
    torch.testing.assert_close(lost, values[channels:].square().sum(), rtol=1e-4, atol=1e-4)


def test_with_all_components_nothing_is_lost():
    images = pictures()
    torch.testing.assert_close(fitted(48, images)(images), images, rtol=1e-5, atol=1e-5)


def test_components_are_not_correlated_and_each_cell_sees_its_own_square():
    images = pictures()
    network = fitted(6, images)
    latents = network.encode(images).latent
    assert latents.shape == (40, 6, 2, 2)
    covariance = torch.cov(latents.permute(1, 0, 2, 3).flatten(1))
    spread = covariance.diagonal()
    assert (covariance - spread.diag()).abs().max() < 1e-4 * spread.max()
    assert torch.equal(spread, spread.sort(descending=True).values)
    other = images.clone()
    other[:, :, 4:, :4] += 1
    moved = (network.encode(other).latent != latents).any(1).any(0)
    assert moved.tolist() == [[False, False], [True, False]]


def test_it_is_loaded_as_the_encoder_of_a_run(tmp_path):
    images = pictures()
    network = fitted(5, images)
    whole = LatentEncoder(network).fit([images])
    statistics = (whole.mean.flatten().tolist(), whole.std.flatten().tolist())
    network.register_to_config(latents_mean=statistics[0], latents_std=statistics[1])
    network.save_pretrained(tmp_path)
    again = load_encoder(tmp_path)
    latents = again.encode(images)
    torch.testing.assert_close(latents, whole.encode(images))
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(5))
    torch.testing.assert_close(again.decode(latents), network(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="write multiples of 4"):
        again.encode(images[..., :6])
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="not what was saved"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("channels", [0, 49])
def test_more_components_than_numbers_are_refused(channels):
    with pytest.raises(InputError, match="write 1 to 48"):
        LinearAutoencoder(4, channels)


def test_it_is_not_fitted_to_nothing():
    with pytest.raises(InputError, match="got no images"):
        LinearAutoencoder(4, 2).fit([])
