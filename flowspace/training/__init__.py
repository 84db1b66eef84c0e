"""The one training loop, with EMA, checkpoints and logs; used by every recipe, imported only by
them.
"""

from flowspace.training.batches import Batches, TensorBatches
from flowspace.training.checkpoints import Checkpoints
from flowspace.training.draws import Draws, seed_of
from flowspace.training.journal import BINS, Journal, Tracker, records
from flowspace.training.loop import Game, LoopSettings, Terms, Watch, cosine_decay, train
from flowspace.training.optimizers import MuonAdamW, PlainAdamW, Together, assign
from flowspace.training.place import OneProcess, Place, Processes

__all__ = [
    "BINS",
    "Batches",
    "Checkpoints",
    "Draws",
    "Game",
    "Journal",
    "LoopSettings",
    "MuonAdamW",
    "OneProcess",
    "Place",
    "PlainAdamW",
    "Processes",
    "TensorBatches",
    "Terms",
    "Together",
    "Tracker",
    "Watch",
    "assign",
    "cosine_decay",
    "records",
    "seed_of",
    "train",
]
