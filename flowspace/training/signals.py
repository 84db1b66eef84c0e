"""A run that is asked to stop finishes its step first."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

__all__ = ["stopped_by_sigterm"]


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[list[int]]:
    """Collect SIGTERM in a list instead of dying of it, so that a run can save first.

    In a thread other than the main one the signal is left alone.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    try:
        before = signal.signal(signal.SIGTERM, note)
    except ValueError:
        yield came
        return
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)
