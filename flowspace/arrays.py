"""What every part does with arrays of either library: rows, precision, given times, drawn noise.

Each function asks once which library its arrays are of; whatever differs between the libraries is
in `flowspace.backends`.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard

from torch import Tensor

from flowspace.backends import backend_of
from flowspace.errors import TimeError

__all__ = [
    "Cond",
    "Model",
    "at_least_float32",
    "check_times",
    "checked_times",
    "draw_noise",
    "is_count",
    "is_number",
    "over_rows",
]

LARGEST_SETTING = 1e9
"""A finite setting beyond this is a slip: what it scales would overflow."""

SINGLE = 4
"""Bytes of a number in float32."""

Model: TypeAlias = Callable[..., Tensor]
"""Any callable ``model(z_t, t, s, **cond)`` on ``(B, *)`` states and ``(B,)`` times."""

Cond: TypeAlias = dict[str, Any]
"""A model's arguments beside state and times, by name."""


def is_number(value: Any) -> bool:
    """Return whether a setting is a real number of a size with a meaning, or infinite.

    No text, no truth value and not NaN; nothing beyond LARGEST_SETTING.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    size: Any = abs(value)
    return size <= LARGEST_SETTING or size == math.inf


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether a value is a whole number of at least 1."""
    return isinstance(value, int) and is_number(value) and value >= 1


def over_rows(values: Tensor, like: Tensor) -> Tensor:
    """View values of shape ``()`` or ``(B,)`` to broadcast over rows of shape ``(B, *)``."""
    if not values.ndim:
        return values
    other_axes = (1,) * (like.ndim - values.ndim)
    return values.reshape(values.shape + other_axes)


def at_least_float32(array: Tensor) -> Tensor:
    """Return an array in its own precision, or in float32 if that is lower."""
    if array.dtype.itemsize >= SINGLE:
        return array
    return backend_of(array).at_least_float32(array)


def draw_noise(like: Tensor, generator: Any) -> Tensor:
    """Draw standard normal noise of the shape, dtype and device of latents."""
    xp = backend_of(like)
    how = {"generator": generator, "device": xp.device(like), "dtype": like.dtype}
    return xp.normal(like.shape, how)


def checked_times(t: Tensor | float, s: Tensor | float, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return given times, one for each row.

    Args:
        t: times in (0, 1], of shape ``()`` or ``(B,)``.
        s: destinations in [0, t], likewise.
        states: of shape ``(B, *)``, beside which they are: their library, device and precision.

    Raises:
        TimeError: if they are of another type, shape or range. This waits for the device.
    """
    t = _one_per_row("t", t, states)
    s = _one_per_row("s", s, states)
    check_times(t, s)
    return t, s


def check_times(t: Tensor, s: Tensor, origin: str = "") -> None:
    """Raise TimeError unless 0 <= s <= t <= 1 and t > 0 in each row; this waits for the device.

    Args:
        t: times of shape ``(B,)``.
        s: destinations of shape ``(B,)``.
        origin: where they come from, for the message.
    """
    _check_range("t", (t > 0) & (t <= 1), t, s, origin)
    _check_range("s", (s >= 0) & (s <= t), t, s, origin)


def _one_per_row(name: str, time: Tensor | float, states: Tensor) -> Tensor:
    xp, rows = backend_of(states), len(states)
    if isinstance(time, int) and not isinstance(time, bool):
        raise TimeError(f"got {name} = {time}; times are real numbers: write {name} = {time}.0")
    if not isinstance(time, float) and not xp.is_array(time):
        raise TimeError(
            f"got {name} = {time!r}; times are tensors of real numbers of shape () or (B,)"
        )
    array: Tensor = xp.as_array(time, states)
    if not xp.is_floating(array):
        hint = xp.to_float.format(name)
        raise TimeError(
            f"got {name} of dtype {array.dtype}; times are real numbers in [0, 1]: write {hint}"
        )
    if array.shape not in ((), (rows,)):
        raise TimeError(
            f"got {name} of shape {tuple(array.shape)}; "
            f"it must be () or ({rows},), one time per row"
        )
    times = xp.cast(array, xp.time_dtype(states))
    return xp.one_per_row(times, rows)


def _check_range(name: str, holds: Tensor, t: Tensor, s: Tensor, origin: str) -> None:
    are_known = backend_of(holds).has_values(holds)
    if not are_known or bool(holds.all()):
        return
    row = holds.tolist().index(False)
    t_, s_ = float(t[row]), float(s[row])
    raise TimeError(
        f"got t = {t_:.6g}, s = {s_:.6g} in row {row}{origin}; {name} is out of range: "
        "times obey 0 <= s <= t <= 1 with t > 0, "
        "where t = 0 is data (lambda is infinite there) and t = 1 is noise"
    )
