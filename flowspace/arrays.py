"""What every part does with arrays of either library: rows, precision, given times, drawn noise.

Each function asks once which library its arrays are of; whatever differs between the libraries is
in `flowspace.backends`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from flowspace.backends import backend_of
from flowspace.errors import TimeError

__all__ = ["Model", "at_least_float32", "checked_times", "draw_noise", "over_rows"]

Model = Callable[..., Tensor]
"""Any callable ``model(z_t, t, s, **cond)`` on ``(B, *)`` states and ``(B,)`` times."""


def over_rows(values: Tensor, like: Tensor) -> Tensor:
    """View values of shape ``()`` or ``(B,)`` so that they broadcast over the rows of ``like``, of
    shape ``(B, *)``.
    """
    return (
        values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values
    )


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32."""
    return backend_of(tensor).at_least_float32(tensor)


def draw_noise(like: Tensor, generator: Any) -> Tensor:
    """Draw standard normal noise of the shape, dtype and device of latents."""
    xp = backend_of(like)
    return xp.normal(
        like.shape, {"generator": generator, "device": xp.device(like), "dtype": like.dtype}
    )


def checked_times(t: Tensor | float, s: Tensor | float, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return given times as ``(B,)`` tensors beside the states, or raise TimeError unless 0 <= s
    <= t, 0 < t <= 1.
    """
    pair: list[Tensor] = []
    xp, rows = backend_of(states), len(states)
    for name, time in (("t", t), ("s", s)):
        if not (isinstance(time, float) or xp.is_array(time)):
            raise TimeError(
                f"{name} = {time!r} came; times are tensors of real numbers of shape () or (B,)"
            )
        time = xp.as_array(time, states)
        if not xp.is_floating(time):
            hint = xp.to_float.format(name)
            raise TimeError(
                f"{name} of dtype {time.dtype} came; times are real numbers in [0, 1]: write "
                f"{hint}"
            )
        if time.shape not in ((), (rows,)):
            raise TimeError(
                f"{name} of shape {tuple(time.shape)} came; it must be () or ({rows},), one time "
                "per row"
            )
        pair.append(xp.one_per_row(xp.cast(time, xp.time_dtype(states)), rows))
    above, below = pair
    for name, bad in (
        ("t", ~((above > 0) & (above <= 1))),
        ("s", ~((below >= 0) & (below <= above))),
    ):
        if xp.has_values(bad) and bool(bad.any()):
            row = bad.tolist().index(True)
            raise TimeError(
                f"t = {float(above[row]):.6g}, s = {float(below[row]):.6g} came in row {row}; "
                f"{name} is out of range: times obey "
                "0 <= s <= t <= 1 with t > 0, where t = 0 is data (lambda is infinite there) and "
                "t = 1 is noise"
            )
    return above, below
