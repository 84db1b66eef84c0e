"""What perceptual terms of pixel MeanFlow compare: whole images or crops, maps or their means."""

from dataclasses import replace

import image_losses
import torch
from pixel_settings import PixelMeanFlowConfig
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from flowspace import SquaredError
from flowspace.vision.perceptual import FeatureNetwork, PerceptualLoss

__all__ = ["Pooled", "perceptual_of", "same_crops"]


class Pooled(FeatureNetwork):
    """The last features of a network, averaged over the image: ``(B, channels)``."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the means of the features of images ``(B, 3, H, W)``."""
        return [layer.flatten(2).mean(2) for layer in self.features(images)]


def perceptual_of(
    config: PixelMeanFlowConfig, device: torch.device
) -> dict[str, image_losses.PerceptualTerm]:
    """Return the perceptual terms by name; squared differences, summed where they are pooled."""
    size = config.objective.crop or config.data.size
    terms = image_losses.perceptual_of(config.perceptual, size, device, config.network.compile)
    found = {}
    for (name, term), settings in zip(terms.items(), config.perceptual, strict=True):
        features: nn.Module = term.loss.features
        if settings.pooled:
            features = Pooled(features)
        penalty = SquaredError(summed=settings.pooled)
        loss = PerceptualLoss(features, penalty, term.loss.below, term.loss.unit)
        found[name] = replace(term, loss=loss)
    return found


def same_crops(prediction: Tensor, images: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return random crops of both ``(B, 3, H, W)``, alike for each row, scaled to ``size``.

    They cover 8 to 100 % of the area in proportions of 3:4 to 4:3, as in the reference.
    """
    pairs = []
    for pair in torch.stack([prediction, images], 1):
        top, left, height, width = RandomResizedCrop.get_params(
            pair, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3]
        )
        crop = resized_crop(
            pair,
            top,
            left,
            height,
            width,
            size=[size, size],
            interpolation=InterpolationMode.BICUBIC,
            antialias=True,
        )
        pairs.append(crop)
    cropped = torch.stack(pairs)
    return cropped[:, 0], cropped[:, 1]
