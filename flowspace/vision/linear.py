"""A linear autoencoder of squares of pixels, fitted in closed form: a first stage in seconds."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from torch import Tensor, nn

from flowspace.errors import InputError
from flowspace.vision.checked_model import CheckedModel

__all__ = ["LinearAutoencoder"]


class LinearAutoencoder(CheckedModel):
    """Each square of pixels becomes its first principal components, and back.

    Of all linear maps to so many numbers it loses the least of the squares' variance (Eckart and
    Young). What it loses no decoder gets back alone, but a network that sees all cells may know
    it: it suits a CrossFlow generator on a few thousand pictures, which needs of its encoder only
    that pictures stay apart.

    Args:
        spatial_compression_ratio: pixels a side of a square, which becomes one cell.
        latent_channels: components of a square.
        in_channels: of the images.
        latents_mean: of each component over cells; a record, by which `LatentEncoder` normalises.
        latents_std: likewise.

    Raises:
        InputError: if there are more components than numbers in a square.
    """

    @register_to_config
    def __init__(
        self,
        spatial_compression_ratio: int = 16,
        latent_channels: int = 8,
        in_channels: int = 3,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        numbers = in_channels * spatial_compression_ratio**2
        if not 1 <= latent_channels <= numbers:
            raise InputError(
                f"got latent_channels = {latent_channels} of squares of {numbers} numbers; write "
                f"1 to {numbers}"
            )
        self.center = nn.Parameter(torch.zeros(numbers), requires_grad=False)
        self.basis = nn.Parameter(torch.eye(latent_channels, numbers), requires_grad=False)

    def encode(self, images: Tensor) -> EncoderOutput:
        """Return the components ``(B, latent_channels, h, w)`` of images ``(B, C, H, W)``."""
        squares = self._squares(images) - self.center
        components = squares @ self.basis.T
        return EncoderOutput(latent=components.permute(0, 3, 1, 2))

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Return the images ``(B, C, H, W)`` of components, as near as these can say."""
        components = latents.permute(0, 2, 3, 1)
        squares = components @ self.basis + self.center
        side = self.config["spatial_compression_ratio"]
        images = F.pixel_shuffle(squares.permute(0, 3, 1, 2), side)
        return DecoderOutput(sample=images)

    def forward(self, images: Tensor) -> Tensor:
        """Return the images that their components stand for."""
        return self.decode(self.encode(images).latent).sample

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> "LinearAutoencoder":
        """Take the principal components of all squares of some images; returns itself.

        Args:
            batches: images ``(B, C, H, W)``.

        Raises:
            InputError: if there are none.
        """
        count = 0
        total = torch.zeros_like(self.center, dtype=torch.float64)
        products = torch.zeros(len(total), len(total), dtype=torch.float64, device=total.device)
        for images in batches:
            squares = self._squares(images).flatten(0, 2).double()
            total += squares.sum(0)
            products += squares.T @ squares
            count += len(squares)
        if not count:
            raise InputError("got no images; fit() takes batches (B, C, H, W)")
        center = total / count
        covariance = products / count - center[:, None] * center
        _, vectors = torch.linalg.eigh(covariance)  # in ascending order
        self.center.copy_(center)
        self.basis.copy_(vectors.T.flip(0)[: len(self.basis)])
        return self

    def _squares(self, images: Tensor) -> Tensor:
        """Return ``(B, h, w, C side^2)``."""
        side = self.config["spatial_compression_ratio"]
        return F.pixel_unshuffle(images, side).permute(0, 2, 3, 1)
