"""The image side (extra ``vision``): generators, encoders, image losses, pipelines."""

from flowspace.vision.adversarial import AdversarialLoss, Discriminator
from flowspace.vision.encoders import LatentEncoder, load_encoder
from flowspace.vision.generator import CrossFlowGenerator
from flowspace.vision.perceptual import LearnedDistance, PerceptualLoss, TimmFeatures
from flowspace.vision.pipeline import CrossFlowDecoder, CrossFlowPipeline

__all__ = [
    "AdversarialLoss",
    "CrossFlowDecoder",
    "CrossFlowGenerator",
    "CrossFlowPipeline",
    "Discriminator",
    "LatentEncoder",
    "LearnedDistance",
    "PerceptualLoss",
    "TimmFeatures",
    "load_encoder",
]
