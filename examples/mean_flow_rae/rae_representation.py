"""Stage 0: the frozen encoder with its decoder, as diffusers' ``AutoencoderRAE``, which is trained
where a run says so; and latents in memory.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from image_losses import adversary_of, perceptual_of, weights_of
from pictures import in_range, pictures_in_order
from rae_settings import RAEConfig
from rae_work import NOISE, SPREAD, Work
from stage import Losses, LossesOf
from torch import Tensor, nn

from flowspace import InputError, LinearSchedule
from flowspace.training import AdversarialStep, Draws, Rows
from flowspace.vision import DiTDH
from flowspace.vision.data import Images
from flowspace.vision.encoders import LatentEncoder, load_encoder
from flowspace.vision.perceptual import TimmFeatures
from flowspace.vision.rae import (
    DecoderLoss,
    RAEReconstruction,
    build_rae,
    keep_statistics,
    with_decoder,
)

__all__ = [
    "LatentRows",
    "autoencoder_of",
    "check_shapes",
    "encoded",
    "representation",
    "unfilled",
]


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


# --- its training ------------------------------------------------------------------------------


def representation(work: Work) -> LatentEncoder:
    """Return the frozen encoder with its decoder, which is trained first if a stage says so."""
    config, accelerator = work.config, work.accelerator
    torch.manual_seed(config.training.seed)
    autoencoder = autoencoder_of(config).to(accelerator.device)
    compiled = config.network.compile
    if compiled:
        autoencoder.encoder.compile()
    if config.decoder is None:
        return LatentEncoder(autoencoder)
    if autoencoder._latents_mean.numel() == 1:
        encoder = LatentEncoder(autoencoder)
        keep_statistics(encoder.fit(pictures_of(work), by_position=True))
    network = RAEReconstruction(autoencoder, config.representation.tau)
    if compiled:
        for layer in autoencoder.decoder.decoder_layers:
            layer.compile()
    adversary = None
    settings = config.representation.adversarial
    if settings is not None:
        adversary = adversary_of(config, settings, LinearSchedule(), accelerator, compiled)
    losses = decoder_losses(config, network, adversary, accelerator.device)
    averaged = work.fit("decoder", network, losses, adversary=adversary)
    if compiled:  # a copy runs as it was written
        averaged.autoencoder.encoder.compile()
    return LatentEncoder(averaged.autoencoder)


def pictures_of(work: Work) -> Iterator[Tensor]:
    """Yield all pictures in their order, in [-1, 1], on the device."""
    for pixels in pictures_in_order(work.images, 64, work.config.data.workers):
        yield in_range(pixels.to(work.accelerator.device))


def decoder_losses(
    config: RAEConfig,
    reconstruction: RAEReconstruction,
    adversary: AdversarialStep | None,
    device: torch.device,
) -> LossesOf:
    """Return L1 + w_L LPIPS + w_G eta GAN of pictures whose features were made noisy."""
    r = config.representation
    loss = DecoderLoss()
    if r.adversarial is not None:
        loss = dataclasses.replace(loss, adversarial_weight=r.adversarial.weight)
    if r.perceptual is not None:
        (term,) = perceptual_of([r.perceptual], config.data.size, device).values()
        if config.network.compile:  # LPIPS too
            features: Any = term.loss.features
            features.compile_network()
        loss = dataclasses.replace(loss, perceptual=term.loss, perceptual_weight=term.weight)

    def losses(network: nn.Module, batch: Sequence[Tensor], draws: Draws) -> Losses:
        images = in_range(batch[0])
        spread = draws.uniform((), SPREAD)
        noise = draws.normal(config.latent, NOISE)
        made = network(images, spread, noise)
        opinion, last = None, None
        if adversary is not None:
            opinion = adversary.opinion(made, draws)
        if not config.training.sharded:
            last = reconstruction.last_layer
        terms = loss(made, images, opinion, last)
        return Losses({"reconstruction": terms.loss}, {"reconstruction": 1.0}, {}, made, images)

    return losses


# --- latents in memory -------------------------------------------------------------------------


@dataclass
class LatentRows:
    """The latents of all pictures, encoded once, with their labels.

    ``latents`` are ``(N, 1 or 2, C, h, w)``, of each picture, and of its mirror image where these
    are trained too.
    """

    images: Images
    latents: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def row(self, index: int, mirrored: bool = False) -> tuple[Tensor, int]:
        """Return the latent ``(C, h, w)`` of a picture or of its mirror image, and its class."""
        return self.latents[index, int(mirrored)], self.images.labels[index]

    def order(self, seed: int, number: int) -> Sequence[int]:
        """Return the order in which a pass takes them."""
        return self.images.order(seed, number)


def encoded(work: Work, encoder: LatentEncoder) -> Rows:
    """Return the latents of all pictures, which the other stages read."""
    found = []
    for images in pictures_of(work):
        views = [images]
        if work.config.data.flip:
            views.append(images.flip(-1))
        latents = [encoder.encode(view).cpu() for view in views]
        found.append(torch.stack(latents, 1))
    return LatentRows(work.images, torch.cat(found))


# --- do the shapes fit? ------------------------------------------------------------------------


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
            made = autoencoder.encode(torch.empty(2, *picture))
            require_shape("latents", made.latent, config.latent)
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
