"""The frozen encoder with its decoder, as diffusers' ``AutoencoderRAE``; and latents in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from image_losses import weights_of
from rae_settings import RAEConfig
from torch import Tensor, nn

from flowspace import InputError
from flowspace.vision import DiTDH
from flowspace.vision.data import Images
from flowspace.vision.encoders import load_encoder
from flowspace.vision.perceptual import TimmFeatures
from flowspace.vision.rae import build_rae, with_decoder

__all__ = ["LatentRows", "autoencoder_of", "check_shapes", "unfilled"]


def unfilled(config: RAEConfig) -> Any:
    """Build diffusers' ``AutoencoderRAE`` of the config's sizes, with random weights."""
    r = config.representation
    sizes: dict[str, Any] = dict(r.sizes)
    if r.network is not None:
        sizes |= {
            "encoder_hidden_size": r.channels,
            "encoder_num_hidden_layers": 0,  # of the encoder that features take the place of
            "encoder_input_size": config.data.size,
            "encoder_patch_size": r.cell,
            "patch_size": r.cell,
            "encoder_norm_mean": [0.5, 0.5, 0.5],
            "encoder_norm_std": [0.5, 0.5, 0.5],
        }
    return build_rae(r.encoder, r.decoder, **sizes)


def autoencoder_of(config: RAEConfig) -> Any:
    """Return the autoencoder before its decoder is trained: published, or around features."""
    r = config.representation
    if r.network is None:
        published = load_encoder(str(r.source)).autoencoder
        if config.decoder is None:
            return published
        return with_decoder(published, r.decoder, **r.sizes)
    autoencoder = unfilled(config)
    autoencoder.encoder = TimmFeatures(
        r.network,
        weights=weights_of(r.weights),
        size=None,
        layers=(r.layer,),
    )
    autoencoder._encoder_forward_fn = tokens_of_features
    return autoencoder


def tokens_of_features(network: nn.Module, images: Tensor) -> Tensor:
    """Return features as tokens ``(B, h w, channels)`` of images in [-1, 1]."""
    (features,) = network(images)
    return features.flatten(2).transpose(1, 2)


@dataclass
class LatentRows:
    """The latents of all pictures, encoded once, with their labels."""

    images: Images
    latents: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def row(self, index: int, mirrored: bool = False) -> tuple[Tensor, int]:
        """Return one; a mirror image has no latent here."""
        return self.latents[index], self.images.labels[index]

    def order(self, seed: int, number: int) -> Sequence[int]:
        """Return the order in which a pass takes them."""
        return self.images.order(seed, number)


def check_shapes(config: RAEConfig) -> None:
    """Build the networks without memory, let shapes go through them, and print their sizes.

    Raises:
        InputError: if the shapes do not fit; it says which.
    """
    sizes = config.sizes(config.data.classes or 0)
    picture = (3, config.data.size, config.data.size)
    with torch.device("meta"):
        network = DiTDH(**sizes, average=True)
        autoencoder = unfilled(config)
        latents, t = torch.empty(2, *config.latent), torch.empty(2)
        labels = torch.zeros(2, dtype=torch.long)
        if config.representation.network is None:  # else the features' place is empty here
            encoded = autoencoder.encode(torch.empty(2, *picture))
            require_shape("latents", encoded.latent, config.latent)
        velocities = network(latents, t, t, labels)
        require_shape("velocities", velocities, config.latent)
        decoded = autoencoder.decode(latents)
        require_shape("pictures", decoded.sample, picture)
    parts = {"DiT^DH": network, "decoder": autoencoder.decoder}
    for name, part in parts.items():
        count = sum(parameter.numel() for parameter in part.parameters())
        print(f"{name}: {count / 1e6:.1f} million parameters")
    print(f"latents {config.latent}, pictures {picture}: all shapes fit")


def require_shape(name: str, made: Tensor, wanted: tuple[int, ...]) -> None:
    """Raise InputError unless what a network makes has the shape that the config says."""
    shape = tuple(made.shape[1:])
    if shape != wanted:
        raise InputError(
            f"got {name} of {shape} from networks whose config says {wanted}; "
            "write representation.channels, representation.sizes, "
            "network.grid, data.size to fit"
        )
