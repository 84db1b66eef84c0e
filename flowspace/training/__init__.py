"""The one training loop, with EMA, checkpoints and logs; used by every recipe, imported only by them."""

from flowspace.training.checkpoints import Checkpoints
from flowspace.training.loop import Batches, LoopSettings, TensorBatches, cosine_decay, seed_of, train
from flowspace.training.optimizers import MuonAdamW, Together, assign

__all__ = [
    "Batches",
    "Checkpoints",
    "LoopSettings",
    "MuonAdamW",
    "TensorBatches",
    "Together",
    "assign",
    "cosine_decay",
    "seed_of",
    "train",
]
