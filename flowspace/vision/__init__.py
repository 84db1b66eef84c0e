"""The image side (extra ``vision``): generators, encoders, data, image losses, pipelines; each
imported when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowspace.vision.adversarial import AdversarialLoss, Discriminator
    from flowspace.vision.data import DatasetImages, FolderImages
    from flowspace.vision.dit import DiT
    from flowspace.vision.dit_dh import DiTDH
    from flowspace.vision.encoders import LatentEncoder, load_encoder
    from flowspace.vision.generator import CrossFlowGenerator
    from flowspace.vision.latents import LatentImages
    from flowspace.vision.perceptual import LearnedDistance, PerceptualLoss, TimmFeatures
    from flowspace.vision.pipeline import CrossFlowDecoder, CrossFlowPipeline
    from flowspace.vision.pixel_flow import PixelFlowTransformer
    from flowspace.vision.pixel_mean_flow import PixelMeanFlowTransformer
    from flowspace.vision.rae import DecoderLoss, RAEReconstruction, build_rae
    from flowspace.vision.scheduler import FlowMapScheduler, PipelineNetwork
    from flowspace.vision.shards import ShardImages
    from flowspace.vision.text import TextEncoder, load_text_encoder

__all__ = [
    "AdversarialLoss",
    "CrossFlowDecoder",
    "CrossFlowGenerator",
    "CrossFlowPipeline",
    "DatasetImages",
    "DecoderLoss",
    "DiT",
    "DiTDH",
    "Discriminator",
    "FlowMapScheduler",
    "FolderImages",
    "LatentEncoder",
    "LatentImages",
    "LearnedDistance",
    "PerceptualLoss",
    "PipelineNetwork",
    "PixelFlowTransformer",
    "PixelMeanFlowTransformer",
    "RAEReconstruction",
    "ShardImages",
    "TextEncoder",
    "TimmFeatures",
    "build_rae",
    "load_encoder",
    "load_text_encoder",
]

PLACES = {
    "adversarial": ("AdversarialLoss", "Discriminator"),
    "data": ("DatasetImages", "FolderImages"),
    "dit": ("DiT",),
    "dit_dh": ("DiTDH",),
    "encoders": ("LatentEncoder", "load_encoder"),
    "latents": ("LatentImages",),
    "generator": ("CrossFlowGenerator",),
    "perceptual": ("LearnedDistance", "PerceptualLoss", "TimmFeatures"),
    "pipeline": ("CrossFlowDecoder", "CrossFlowPipeline"),
    "pixel_flow": ("PixelFlowTransformer",),
    "pixel_mean_flow": ("PixelMeanFlowTransformer",),
    "rae": ("DecoderLoss", "RAEReconstruction", "build_rae"),
    "scheduler": ("FlowMapScheduler", "PipelineNetwork"),
    "shards": ("ShardImages",),
    "text": ("TextEncoder", "load_text_encoder"),
}


def __getattr__(name: str) -> Any:
    for place, names in PLACES.items():
        if name in names:
            try:
                return getattr(importlib.import_module(f"flowspace.vision.{place}"), name)
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    f"{name} needs {error.name}, which is not installed; write: pip install "
                    "'flowspace[vision]'",
                    name=error.name,
                ) from error
    raise AttributeError(f"flowspace.vision has no {name}; it has {', '.join(__all__)}")
