"""The one training loop, with EMA, checkpoints and logs; used by every recipe, imported only by
them.
"""

from flowspace.training.adversarial import AdversarialStep
from flowspace.training.batches import Batches, TensorBatches
from flowspace.training.checkpoints import (
    Checkpoints,
    fill,
    flatten_optimizer,
    locked,
    packed,
    restore_optimizer,
    unpacked,
    whole,
)
from flowspace.training.draws import Draws, KeyedPairs, seed_of
from flowspace.training.journal import BINS, Journal, Tracker, records
from flowspace.training.loop import Game, LoopSettings, Terms, Watch, cosine_decay, train
from flowspace.training.optimizers import MuonAdamW, PlainAdamW, Together, assign
from flowspace.training.order import BatchRows, KeyedRows, Rows, share_of
from flowspace.training.place import OneProcess, Place, Processes
from flowspace.training.signals import stopped_by_sigterm

__all__ = [
    "BINS",
    "AdversarialStep",
    "BatchRows",
    "Batches",
    "Checkpoints",
    "Draws",
    "Game",
    "Journal",
    "KeyedPairs",
    "KeyedRows",
    "LoopSettings",
    "MuonAdamW",
    "OneProcess",
    "Place",
    "PlainAdamW",
    "Processes",
    "Rows",
    "TensorBatches",
    "Terms",
    "Together",
    "Tracker",
    "Watch",
    "assign",
    "cosine_decay",
    "fill",
    "flatten_optimizer",
    "locked",
    "packed",
    "records",
    "restore_optimizer",
    "seed_of",
    "share_of",
    "stopped_by_sigterm",
    "train",
    "unpacked",
    "whole",
]
