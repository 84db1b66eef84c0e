"""The tangent of attention as one Triton kernel, for half precision on NVIDIA's GPUs.

With S = scale q k', P = softmax(S) and dS = scale (dq k' + q dk'), a program of the kernel holds
some queries of one head and passes over the keys once. It keeps, relative to the largest score
so far as fused attention does,

    l = rowsum(exp S)             a = rowsum(exp(S) (dS - r))
    o = exp(S) v                  e = (exp(S) (dS - r)) v + exp(S) dv

and at the end dy = (e - (a / l) o) / l. Any number r gives the same; the mean of dS under the
probabilities of the first keys is taken from it, since what all keys share would be lost to the
rounding of the products otherwise. Scores and sums are in float32; only the factors of products
are rounded to the dtype of the operands, as in fused attention.

The kernel reads the rows that move where they lie in the primals, so these are not copied.
It is an operator of torch, so that a compiler calls it as it is. Triton is imported by its first
call.
"""

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowspace.derivatives.torch_internals import unseen_by_modes

__all__ = ["attention_tangent", "takes"]

DEVICES = frozenset({"cuda"})
"""Where it runs."""

DTYPES = frozenset({torch.bfloat16, torch.float16})
"""Those that matrix units multiply without rounding; in float32 products one by one are faster."""

LARGEST_HEAD = 128
"""Channels of a head, at most: what a program holds has to fit into its registers."""

CAPABILITY = (8, 0)
"""NVIDIA's GPUs from which on matrix units take bfloat16 (Ampere)."""

TAGS = ("pt2_compliant_tag", "flexible_layout")
"""What compilers may take for granted: it runs under them, on any strides."""

_library = torch.library.Library("flowspace", "FRAGMENT")
_library.define(
    "attention_tangent(Tensor query, Tensor key, Tensor value, Tensor? query_tangent, "
    "Tensor? key_tangent, Tensor? value_tangent, Tensor? rows, float scale, bool causal) "
    "-> Tensor",
    tags=[getattr(torch.Tag, name) for name in TAGS if hasattr(torch.Tag, name)],
)

attention_tangent = torch.ops.flowspace.attention_tangent.default
"""Returns the tangent ``(few, heads, queries, channels)`` of attention.

Its arguments are query, key and value ``(batch, heads, tokens, channels)``; their tangents, whose
first axis is that of the rows that move, or None; the indices ``(few,)`` of these rows in the
batch, or None for all; the scale of the scores; and whether no query sees a later key.
"""


def takes(operands: Sequence[Tensor]) -> bool:
    """Return whether the kernel takes these queries, keys and values.

    They have the same rows and heads, dtype and device.
    """
    query, _, value = operands
    if query.device.type not in DEVICES or query.dtype not in DTYPES or not _device_fits():
        return False
    for x in operands:
        if x.ndim != 4 or x.dtype != query.dtype or x.shape[:2] != query.shape[:2]:
            return False
    return query.shape[-1] <= LARGEST_HEAD and value.shape[-1] <= LARGEST_HEAD


@functools.cache
def _device_fits() -> bool:
    """Return whether the GPU has matrix units for half precision, and Triton runs on it.

    Triton builds kernels with a C compiler, which may be missing: that is said once.
    """
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability() < CAPABILITY:
        return False
    try:
        _try_once()
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        warnings.warn(
            f"Triton cannot run the kernel of attention's tangent ({type(error).__name__}: "
            f"{first[:120]}); the tangent is right without it, and slower",
            stacklevel=2,
        )
        return False
    return True


def _try_once() -> None:
    """Run the kernel on a few numbers."""
    with unseen_by_modes(), torch.no_grad():
        x = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16, device="cuda")
        attention_tangent(x, x, x, x, None, None, None, 1.0, False)


def _empty(query: Tensor, value: Tensor, few: int) -> Tensor:
    """Return memory for the tangent, in which the heads of a token lie side by side: to merge
    them next takes no copy.
    """
    _, heads, count, _ = query.shape
    return query.new_empty(few, count, heads, value.shape[-1]).transpose(1, 2)


def _few(query: Tensor, rows: Tensor | None) -> int:
    """Return how many rows move."""
    if rows is None:
        return query.shape[0]
    return rows.shape[0]


def _launch(*given: Any) -> Tensor:
    """Run the kernel on the operator's arguments."""
    from flowspace.derivatives.rules.attention_triton import launch

    query, _, value, *_, rows, scale, causal = given
    out = _empty(query, value, _few(query, rows))
    launch(out, given[:3], given[3:6], rows, scale, causal)
    return out


def _without_values(*given: Any) -> Tensor:
    """Return what a trace takes for the tangent."""
    query, _, value, *_, rows, _, _ = given
    return _empty(query, value, _few(query, rows))


_library.impl("attention_tangent", _launch, "CompositeExplicitAutograd")
torch.library.register_fake("flowspace::attention_tangent", _without_values, lib=_library)
