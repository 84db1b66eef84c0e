"""The image side (extra ``vision``): generators, encoders, image losses."""

from flowspace.vision.adversarial import AdversarialLoss, Discriminator
from flowspace.vision.encoders import LatentEncoder, load_encoder
from flowspace.vision.generator import CrossFlowGenerator
from flowspace.vision.perceptual import LearnedDistance, PerceptualLoss, TimmFeatures

__all__ = [
    "AdversarialLoss",
    "CrossFlowGenerator",
    "Discriminator",
    "LatentEncoder",
    "LearnedDistance",
    "PerceptualLoss",
    "TimmFeatures",
    "load_encoder",
]
