"""The one training loop, with EMA, checkpoints and logs; used by every recipe, imported only by them."""

from flowspace.training.checkpoints import Checkpoints
from flowspace.training.loop import Batches, LoopSettings, TensorBatches, cosine_decay, seed_of, train

__all__ = ["Batches", "Checkpoints", "LoopSettings", "TensorBatches", "cosine_decay", "seed_of", "train"]
