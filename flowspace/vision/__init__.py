"""The image side (extra ``vision``): generators, encoders, image losses, pipelines."""

from flowspace.vision.encoders import LatentEncoder, load_encoder
from flowspace.vision.generator import CrossFlowGenerator

__all__ = ["CrossFlowGenerator", "LatentEncoder", "load_encoder"]
