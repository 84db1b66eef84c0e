"""Functions of the times under one name; they live in `formulas` and `time_functions`."""

from flowspace.formulas import S, T, parse, precise_values
from flowspace.time_functions import NUDGE, Source, TimeFunction

__all__ = ["NUDGE", "S", "Source", "T", "TimeFunction", "parse", "precise_values"]
