"""Representation autoencoders: a frozen encoder that was trained to see, and a decoder of its
features (RAE, Zheng et al., arXiv 2510.11690), by diffusers' ``AutoencoderRAE``.

The decoder is a transformer that is trained to

    L = L1(x', x) + w_L LPIPS(x', x) + w_G eta GAN(x')

where x' = D(E(x) + sigma n), n is standard normal, and sigma = tau u with u uniform in [0, 1] and
one for each image. A generator's latents miss the encoder's by a little; the noise teaches the
decoder to bear that. At inference there is none. The adaptive weight eta is the ratio of the
gradients of both parts at the decoder's last layer, as in latent diffusion (arXiv 2012.09841).

Published: w_L = 1, w_G = 0.75, tau = 0.8, LPIPS from the first epoch, the discriminator trained
from epoch 6 and heard from epoch 8 of 16; batches of 512, AdamW at 2e-4 to 2e-5 with betas 0.9 and
0.95, an average of decay 0.9978.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowspace.errors import InputError
from flowspace.vision.adversarial import LARGEST_BALANCE, SMALLEST_SLOPE, balance
from flowspace.vision.encoders import RAE_EPSILON, LatentEncoder, make_buildable

__all__ = [
    "DECODERS",
    "ENCODERS",
    "DecoderLoss",
    "DecoderTerms",
    "RAEReconstruction",
    "balance_at",
    "build_rae",
    "keep_statistics",
    "with_decoder",
]

ENCODERS: dict[str, dict[str, Any]] = {
    "dinov2": {"encoder_patch_size": 14, "encoder_input_size": 224},
    "mae": {"encoder_patch_size": 16, "encoder_input_size": 256},
    "siglip2": {
        "encoder_patch_size": 16,
        "encoder_input_size": 256,
        "encoder_norm_mean": [0.5, 0.5, 0.5],
        "encoder_norm_std": [0.5, 0.5, 0.5],
    },
}
"""The encoders of base size, which all make 768 channels on 16 x 16 cells of 256 x 256 pixels:
DINOv2 with registers, MAE and SigLIP2.
"""

DECODERS: dict[str, dict[str, Any]] = {
    "b": {
        "decoder_hidden_size": 768,
        "decoder_num_hidden_layers": 12,
        "decoder_num_attention_heads": 12,
        "decoder_intermediate_size": 3072,
    },
    "l": {
        "decoder_hidden_size": 1024,
        "decoder_num_hidden_layers": 24,
        "decoder_num_attention_heads": 16,
        "decoder_intermediate_size": 4096,
    },
    "xl": {
        "decoder_hidden_size": 1152,
        "decoder_num_hidden_layers": 28,
        "decoder_num_attention_heads": 16,
        "decoder_intermediate_size": 4096,
    },
}
"""The published sizes of the decoder, as arguments of diffusers' class."""


# --- the autoencoder ---------------------------------------------------------------------------


def build_rae(encoder: str = "dinov2", decoder: str = "xl", **changes: Any) -> Any:
    """Build diffusers' ``AutoencoderRAE`` of published sizes, with random weights.

    `with_decoder` gives a loaded one, whose encoder was trained, another decoder.

    Args:
        encoder: ``dinov2``, ``mae`` or ``siglip2``.
        decoder: ``b``, ``l`` or ``xl``.
        changes: arguments of diffusers' class.

    Raises:
        InputError: if there is no encoder or decoder of that name.
        RunError: if transformers, of which the encoders are, is missing.
    """
    if encoder not in ENCODERS:
        raise InputError(f"got encoder {encoder!r}; write one of {', '.join(ENCODERS)}")
    make_buildable("AutoencoderRAE")
    from diffusers.models.autoencoders.autoencoder_rae import AutoencoderRAE

    sizes: dict[str, Any] = ENCODERS[encoder] | _decoder(decoder)
    return AutoencoderRAE(encoder_type=encoder, **(sizes | changes))


def with_decoder(autoencoder: Any, decoder: str, **changes: Any) -> Any:
    """Return a representation autoencoder of the same encoder, and an untrained decoder.

    Args:
        autoencoder: diffusers', such as ``load_encoder("rae-dinov2").autoencoder``; it stays as it
            is.
        decoder: ``b``, ``l`` or ``xl``.
        changes: arguments of diffusers' class.

    Raises:
        InputError: if there is no decoder of that name.
    """
    config = {name: value for name, value in autoencoder.config.items() if name[0] != "_"}
    made = type(autoencoder)(**(config | _decoder(decoder) | changes))
    made.encoder.load_state_dict(autoencoder.encoder.state_dict())
    return made


def _decoder(name: str) -> dict[str, Any]:
    if name not in DECODERS:
        raise InputError(f"got decoder {name!r}; write one of {', '.join(DECODERS)}")
    return DECODERS[name]


def keep_statistics(encoder: LatentEncoder) -> None:
    """Move the statistics of an encoder into its representation autoencoder, to be saved with it.

    The encoder's latents stay what they were: the autoencoder normalises them from now on.

    Args:
        encoder: of diffusers' ``AutoencoderRAE``, with statistics ``(C, h, w)``, as it has them
            after ``fit(images, by_position=True)``.

    Raises:
        InputError: if the autoencoder normalises its latents already, or statistics are missing.
    """
    autoencoder: Any = encoder.autoencoder
    if autoencoder._latents_mean.numel() > 1:
        raise InputError(
            "got an autoencoder that normalises its latents already; build it with "
            "latents_mean=None, latents_std=None"
        )
    mean, std = encoder.mean.float(), encoder.std.float()
    if mean.numel() == 1:
        raise InputError(
            "got an encoder without statistics of its channels; write encoder.fit(images, "
            "by_position=True) first"
        )
    where = autoencoder._latents_mean.device
    autoencoder._latents_mean = mean.to(where)
    autoencoder._latents_std = std.to(where)
    autoencoder.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    encoder.set_statistics(torch.zeros_like(mean), torch.ones_like(std))


class RAEReconstruction(nn.Module):
    """A representation autoencoder as one call, from images to images; the decoder is trained.

    Args:
        autoencoder: diffusers' ``AutoencoderRAE``. Its encoder is frozen and stays in eval mode,
            its decoder is not frozen, and noise of its own (``noise_tau``) is turned off.
        tau: the largest spread of the noise on latents in training.

    Raises:
        InputError: if tau is negative.
    """

    def __init__(self, autoencoder: Any, tau: float = 0.8) -> None:
        super().__init__()
        if not tau >= 0:
            raise InputError(f"got tau = {tau}, the spread of a noise; write 0 or more")
        self.autoencoder = autoencoder
        self.tau = tau
        autoencoder.noise_tau = 0.0
        autoencoder.encoder.requires_grad_(False)
        # it is frozen where the autoencoder comes from a `LatentEncoder`
        autoencoder.decoder.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "RAEReconstruction":
        """Set the mode, in which there is noise or not; the encoder stays in eval mode."""
        super().train(mode)
        self.autoencoder.encoder.eval()
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape of one latent, (channels, h, w)."""
        config = self.autoencoder.config
        side = config.encoder_input_size // config.encoder_patch_size
        return config.encoder_hidden_size, side, side

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adaptive weight compares gradients."""
        return self.autoencoder.decoder.decoder_pred.weight

    def forward(
        self, images: Tensor, uniform: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Return reconstructions ``(B, 3, H, W)`` of images ``(B, 3, H, W)`` in [-1, 1].

        Args:
            images: their side is the decoder's.
            uniform: u of the noise's spread tau u, ``(B,)`` in [0, 1); None draws it. In eval mode
                there is no noise, and neither is looked at.
            noise: standard normal, ``(B, *latent_shape)``; None draws it.
        """
        with torch.no_grad():
            latents = self.autoencoder.encode((images + 1) / 2).latent
            if self.training and self.tau:
                latents = latents + self._noise(latents, uniform, noise)
        return 2 * self.autoencoder.decode(latents).sample - 1

    def _noise(self, latents: Tensor, uniform: Tensor | None, noise: Tensor | None) -> Tensor:
        """Return the noise in units of the normalised latents; sigma is in those of the
        encoder's features.
        """
        if uniform is None:
            uniform = torch.rand(len(latents), device=latents.device)
        if noise is None:
            noise = torch.randn_like(latents)
        sigma = self.tau * uniform.reshape(-1, 1, 1, 1).to(latents.dtype)
        spread = self.autoencoder._latents_std + RAE_EPSILON
        return sigma * noise.to(latents.dtype) / spread


# --- its training ------------------------------------------------------------------------------


class DecoderTerms(NamedTuple):
    """The parts of a decoder's loss, each of every row ``(B,)``.

    Attributes:
        loss: the sum, with the weights.
        absolute: L1.
        perceptual: before its weight; 0 where there is none.
        adversarial: what the discriminator says, before its weight; 0 where it says nothing.
        balance: the adaptive weight eta, ``()``, or ``(B,)`` where it is each row's own.
    """

    loss: Tensor
    absolute: Tensor
    perceptual: Tensor
    adversarial: Tensor
    balance: Tensor


@dataclass(frozen=True)
class DecoderLoss:
    """L1 + w_L LPIPS + w_G eta GAN, of each row.

    Args:
        perceptual: a distance of images, (prediction, target) to ``(B,)``, such as
            `PerceptualLoss(LearnedDistance())`, the published one; None leaves it out.
        perceptual_weight: w_L.
        adversarial_weight: w_G.
    """

    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    perceptual_weight: float = 1.0
    adversarial_weight: float = 0.75

    def __call__(
        self,
        made: Tensor,
        images: Tensor,
        opinion: Tensor | None = None,
        last_layer: Tensor | None = None,
    ) -> DecoderTerms:
        """Return the loss and its parts.

        Args:
            made: reconstructions ``(B, 3, H, W)`` with gradient.
            images: what they are of, in [-1, 1].
            opinion: the adversarial loss of each row ``(B,)``, minus the mean logit, as
                `AdversarialLoss.opinion` and `AdversarialStep.opinion` return it; None before the
                discriminator is heard.
            last_layer: the weight at which gradients are compared, `RAEReconstruction.last_layer`;
                under DDP each process compares those of its own rows. None compares each row's at
                its image, as `balance` does, for weights that are sharded.

        Raises:
            InputError: if shapes differ.
        """
        if made.shape != images.shape:
            raise InputError(
                f"got reconstructions of shape {tuple(made.shape)} for images of "
                f"{tuple(images.shape)}; give images of the decoder's size"
            )
        absolute = (made - images).abs().flatten(1).mean(1)
        nothing = torch.zeros_like(absolute)
        perceptual = nothing
        if self.perceptual is not None:
            perceptual = self.perceptual(made, images)
        loss = absolute + self.perceptual_weight * perceptual
        if opinion is None:
            return DecoderTerms(loss, absolute, perceptual, nothing, nothing)
        if last_layer is None:
            eta = balance(loss, opinion, made)
        else:
            eta = balance_at(last_layer, loss, opinion)
        loss = loss + self.adversarial_weight * eta * opinion
        return DecoderTerms(loss, absolute, perceptual, opinion, eta)


def balance_at(weight: Tensor, main: Tensor, adversarial: Tensor) -> Tensor:
    """Return |grad main| / |grad adversarial| at a weight, of the means over the rows, ``()``,
    detached and at most `LARGEST_BALANCE`.

    Args:
        weight: of the last layer; a whole one, not a shard.
        main: the other losses of each row ``(B,)``.
        adversarial: the adversarial loss of each row ``(B,)``.
    """
    norms = []
    for loss in (main, adversarial):
        (slope,) = torch.autograd.grad(loss.mean(), weight, retain_graph=True)
        norms.append(slope.float().norm())
    return (norms[0] / (norms[1] + SMALLEST_SLOPE)).clamp(max=LARGEST_BALANCE)
