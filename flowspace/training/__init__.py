"""What no library offers and every training of images needs: draws by (seed, step, row), the rows
of a batch by (seed, pass, index), the adversarial step, exact resume, Muon beside AdamW.

The loop is the user's own; `fit` of `examples/imagenet/train.py` is one to copy, over accelerate.
"""

from flowspace.training.adversarial import AdversarialStep
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
from flowspace.training.optimizers import CombinedOptimizer, MuonAdamW, PlainAdamW, assign
from flowspace.training.order import BatchRows, KeyedRows, Rows, in_its_own_group, share_of
from flowspace.training.signals import stopped_by_sigterm

__all__ = [
    "AdversarialStep",
    "BatchRows",
    "Checkpoints",
    "CombinedOptimizer",
    "Draws",
    "KeyedPairs",
    "KeyedRows",
    "MuonAdamW",
    "PlainAdamW",
    "Rows",
    "assign",
    "fill",
    "flatten_optimizer",
    "in_its_own_group",
    "locked",
    "packed",
    "restore_optimizer",
    "seed_of",
    "share_of",
    "stopped_by_sigterm",
    "unpacked",
    "whole",
]
