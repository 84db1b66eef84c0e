"""The ImageNet recipe: from a folder of pictures to a pipeline one can ship, on one machine or
many.

A run's folder holds ``config.json``, ``encoder/`` (where stage 1 was trained on the spot),
``generator/`` (checkpoints, the log, pictures), ``pipeline/`` (what one ships), ``samples/`` and
``metrics.json``. The same command continues a run that was stopped.
"""

from flowspace.recipes.imagenet.ablation import ABLATIONS, ablate, ablation_table
from flowspace.recipes.imagenet.decoders import DecoderRun
from flowspace.recipes.imagenet.run import Run

__all__ = ["ABLATIONS", "DecoderRun", "Run", "ablate", "ablation_table"]
