"""What concerns the whole process rather than one call: threads that share it, processes that wait
for it.
"""

import threading

from torch import distributed

__all__ = ["forward_mode_lock", "several_processes"]

forward_mode_lock = threading.RLock()
"""Held in every torch.func.jvp: torch counts its levels of forward mode for the whole process."""


def several_processes() -> bool:
    """Return whether others may wait for this one: all then evaluate a model equally often."""
    ready = distributed.is_available() and distributed.is_initialized()
    return ready and distributed.get_world_size() > 1
