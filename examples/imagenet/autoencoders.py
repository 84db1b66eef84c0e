"""The autoencoder that an encoder's settings name: its layers alone, to be counted."""

from collections.abc import Sequence
from typing import Any

import torch
from settings import EncoderConfig
from torch import nn

from flowspace.vision.encoders import load_encoder
from flowspace.vision.rae import build_rae

__all__ = ["Encoding", "autoencoder"]

STAGES = {
    "va-vae": ((128, 128, 256, 256, 512), 32),
    "sd-vae": ((128, 256, 512, 512), 4),
    "sd3-vae": ((128, 256, 512, 512), 16),
}
"""Widths and latent channels of the published autoencoders of the layout of latent diffusion."""

DEFAULTS = {
    "flux2": "AutoencoderKLFlux2",
    "dc-ae": "AutoencoderDC",
}
"""Published autoencoders that diffusers' classes build by default."""

PLAIN = "DownEncoderBlock2D"
"""What diffusers calls an encoder's block of convolutions alone."""

RAE = "rae-"
"""What the names of representation autoencoders begin with; the encoder's name follows."""


class Encoding(nn.Module):
    """The encoder of an autoencoder, as a module of its own."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.encoder = whole.encoder
        self.encode = whole.encode  # no submodule: the decoder's parameters are not counted

    def forward(self, images: torch.Tensor) -> None:
        """Encode."""
        self.encode(images)


def autoencoder(encoder: EncoderConfig) -> nn.Module:
    """Return the autoencoder of an encoder's settings, without its weights if it is known here."""
    import diffusers

    name, stage = encoder.name, encoder.stage_one
    if stage is not None:
        return of_latent_diffusion(
            stage.widths,
            stage.channels,
            layers_per_block=1,
            norm_num_groups=8,
            mid_block_add_attention=False,
        )
    if name in DEFAULTS:
        return getattr(diffusers, DEFAULTS[name])()
    if name is not None and name.startswith(RAE):
        return build_rae(name.removeprefix(RAE), "xl")  # the decoder that is published with each
    if name not in STAGES:
        published = load_encoder(name or "", weights=encoder.weights)
        return published.autoencoder.to("meta")
    widths, channels = STAGES[name]
    last = PLAIN
    if name == "va-vae":
        last = "AttnDownEncoderBlock2D"
    return of_latent_diffusion(widths, channels, last, layers_per_block=2)


def of_latent_diffusion(
    widths: Sequence[int], channels: int, last: str = PLAIN, **settings: Any
) -> nn.Module:
    """Return an autoencoder of the layout of latent diffusion.

    Args:
        widths: of its blocks, the finest first.
        channels: of its latents.
        last: the kind of the encoder's last block.
        settings: of diffusers' ``AutoencoderKL``, beside these.
    """
    import diffusers

    library: Any = diffusers
    blocks = [PLAIN] * len(widths)
    blocks[-1] = last
    return library.AutoencoderKL(
        down_block_types=tuple(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        block_out_channels=widths,
        latent_channels=channels,
        **settings,
    )
