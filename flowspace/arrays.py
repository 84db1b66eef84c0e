"""What every part does with arrays of either library: rows, precision, given times, drawn noise.

Each function asks once which library its arrays are of; whatever differs between the libraries is
in `flowspace.backends`.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

from torch import Tensor

from flowspace.backends import backend_of
from flowspace.errors import TimeError

__all__ = ["Model", "at_least_float32", "checked_times", "draw_noise", "is_number", "over_rows"]

LARGEST_SETTING = 1e9
"""A finite setting beyond this is a slip: what it scales would overflow."""

SINGLE = 4
"""Bytes of a number in float32."""

Model = Callable[..., Tensor]
"""Any callable ``model(z_t, t, s, **cond)`` on ``(B, *)`` states and ``(B,)`` times."""


def is_number(value: Any) -> bool:
    """Return whether a setting is a real number of a size with a meaning, or infinite.

    No text, no truth value and not NaN; nothing beyond LARGEST_SETTING.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    size: Any = abs(value)
    return size <= LARGEST_SETTING or size == math.inf


def over_rows(values: Tensor, like: Tensor) -> Tensor:
    """View values of shape ``()`` or ``(B,)`` to broadcast over rows of shape ``(B, *)``."""
    if not values.ndim:
        return values
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


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
    above = _one_per_row("t", t, states)
    below = _one_per_row("s", s, states)
    _check_range("t", (above > 0) & (above <= 1), above, below)
    _check_range("s", (below >= 0) & (below <= above), above, below)
    return above, below


def _one_per_row(name: str, time: Tensor | float, states: Tensor) -> Tensor:
    xp, rows = backend_of(states), len(states)
    if not isinstance(time, float) and not xp.is_array(time):
        raise TimeError(
            f"got {name} = {time!r}; times are tensors of real numbers of shape () or (B,)"
        )
    array: Tensor = xp.as_array(time, states)
    if not xp.is_floating(array):
        raise TimeError(
            f"got {name} of dtype {array.dtype}; "
            f"times are real numbers in [0, 1]: write {xp.to_float.format(name)}"
        )
    if array.shape not in ((), (rows,)):
        raise TimeError(
            f"got {name} of shape {tuple(array.shape)}; "
            f"it must be () or ({rows},), one time per row"
        )
    return xp.one_per_row(xp.cast(array, xp.time_dtype(states)), rows)


def _check_range(name: str, holds: Tensor, t: Tensor, s: Tensor) -> None:
    if not backend_of(holds).has_values(holds) or bool(holds.all()):
        return
    row = holds.tolist().index(False)
    raise TimeError(
        f"got t = {float(t[row]):.6g}, s = {float(s[row]):.6g} in row {row}; "
        f"{name} is out of range: times obey 0 <= s <= t <= 1 with t > 0, "
        "where t = 0 is data (lambda is infinite there) and t = 1 is noise"
    )
