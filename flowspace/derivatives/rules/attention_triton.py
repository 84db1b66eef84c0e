"""The kernel of `attention_kernel`, whose head comment has its formulas."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["QUERIES", "WARPS", "launch", "pace", "padded"]

QUERIES = 64
"""A program holds so many queries."""

NARROW = 64
"""Channels of a head up to which registers hold twice as many keys."""

WARPS = 4
"""Of 32 threads, for one program."""

LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(x) is 2 to the power of x times this."""

SMALLEST = 16
"""The smallest side of a product on matrix units."""


def launch(
    out: Tensor,
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    rows: Tensor | None,
    scale: float,
    causal: bool,
) -> None:
    """Write the tangent of attention; see `attention_kernel.attention_tangent`."""
    if out.numel() == 0:
        return
    operands = [_channels_beside(x) for x in (*primals, *tangents)]
    few, heads, count, channels = out.shape
    size, keys = operands[0].shape[3], operands[1].shape[2]
    if keys == 0:
        out.zero_()
        return
    strides: list[int] = []
    for x in (*operands, out):
        strides += _strides(x)
    keys_at_once, stages = pace(size, channels)
    programs = few * heads * triton.cdiv(count, QUERIES)
    with torch.cuda.device_of(out):
        kernel: Any = _kernel[(programs,)]
        kernel(
            *operands,
            out,
            rows,
            *strides,
            heads,
            count,
            keys,
            scale,
            size,
            channels,
            padded(size),
            padded(channels),
            causal,
            QUERIES,
            keys_at_once,
            num_warps=WARPS,
            num_stages=stages,
        )


def pace(size: int, channels: int) -> tuple[int, int]:
    """Return how many keys a program takes at a time, and how many loads are under way at once.

    They were the quickest of 12 on an H200, and fit into the shared memory of smaller GPUs.
    """
    if max(size, channels) > NARROW:
        return 32, 2
    return 64, 3


def padded(size: int) -> int:
    """Return the side of a product that holds so many channels."""
    return triton.next_power_of_2(max(size, SMALLEST))


def _channels_beside(x: Any) -> Any:
    """Return a tensor in which the channels of a token lie side by side; None stays."""
    if x is None or x.stride(3) == 1:
        return x
    return x.contiguous()


def _strides(x: Tensor | None) -> list[int]:
    """Return the strides of rows, heads and tokens."""
    if x is None:
        return [0, 0, 0]
    return list(x.stride()[:3])


@triton.jit
def _loaded(head, first, offsets, token_stride, there, width: tl.constexpr, side: tl.constexpr):
    """Return the channels of some tokens of one head, from the first on; zeros where there are
    none. Memory may be longer than 32 bits count, so the first is counted in 64.
    """
    channel = tl.arange(0, side)
    start = head + tl.cast(first, tl.int64) * token_stride
    places = start + offsets[:, None] * token_stride + channel[None, :]
    return tl.load(places, mask=there[:, None] & (channel < width)[None, :], other=0.0)


@triton.jit
def _kernel(
    query, key, value, query_tangent, key_tangent, value_tangent, out, rows,
    q_row, q_head, q_token,
    k_row, k_head, k_token,
    v_row, v_head, v_token,
    dq_row, dq_head, dq_token,
    dk_row, dk_head, dk_token,
    dv_row, dv_head, dv_token,
    out_row, out_head, out_token,
    heads, count, keys, scale,
    size: tl.constexpr, channels: tl.constexpr,
    size_padded: tl.constexpr, channels_padded: tl.constexpr,
    causal: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Write the tangent for some queries of one head of one row."""
    blocks = tl.cdiv(count, QUERIES)
    pair = tl.program_id(0) // blocks
    moving = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    row = moving
    if rows is not None:
        row = tl.load(rows + moving).to(tl.int64)
    first = tl.program_id(0) % blocks * QUERIES
    here = tl.arange(0, QUERIES)
    places = first + here
    there = places < count
    query += row * q_row + head * q_head
    q = _loaded(query, first, here, q_token, there, size, size_padded)
    dq = q
    if query_tangent is not None:
        query_tangent += moving * dq_row + head * dq_head
        dq = _loaded(query_tangent, first, here, dq_token, there, size, size_padded)
    key += row * k_row + head * k_head
    value += row * v_row + head * v_head
    if key_tangent is not None:
        key_tangent += moving * dk_row + head * dk_head
    if value_tangent is not None:
        value_tangent += moving * dv_row + head * dv_head

    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    reference = tl.zeros([QUERIES], tl.float32)
    l = tl.zeros([QUERIES], tl.float32)  # noqa: E741  # the names of the formulas
    a = tl.zeros([QUERIES], tl.float32)
    o = tl.zeros([QUERIES, channels_padded], tl.float32)
    e = tl.zeros([QUERIES, channels_padded], tl.float32)
    last = keys
    if causal:
        last = tl.minimum(keys, first + QUERIES)
    for begin in range(0, last, KEYS):
        steps = tl.arange(0, KEYS)
        others = begin + steps
        known = others < keys
        k = _loaded(key, begin, steps, k_token, known, size, size_padded)
        v = _loaded(value, begin, steps, v_token, known, channels, channels_padded)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
        seen = known[None, :]
        if causal:
            seen = seen & (others[None, :] <= places[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2(scores - new_largest[:, None])
        shrunk = tl.exp2(largest - new_largest)
        largest = new_largest
        rounded = p.to(v.dtype)
        l = l * shrunk + tl.sum(p, 1)  # noqa: E741
        o = o * shrunk[:, None] + tl.dot(rounded, v, input_precision="ieee")
        e = e * shrunk[:, None]
        if value_tangent is not None:
            dv = _loaded(value_tangent, begin, steps, dv_token, known, channels, channels_padded)
            e += tl.dot(rounded, dv, input_precision="ieee")
        if query_tangent is not None or key_tangent is not None:
            ds = tl.zeros([QUERIES, KEYS], tl.float32)
            if query_tangent is not None:
                ds = tl.dot(dq, tl.trans(k), ds, input_precision="ieee")
            if key_tangent is not None:
                dk = _loaded(key_tangent, begin, steps, dk_token, known, size, size_padded)
                ds = tl.dot(q, tl.trans(dk), ds, input_precision="ieee")
            ds *= scale
            if begin == 0:
                reference = tl.sum(p * ds, 1) / l
            p *= ds - reference[:, None]
            a = a * shrunk + tl.sum(p, 1)
            e += tl.dot(p.to(v.dtype), v, input_precision="ieee")
    dy = (e - (a / l)[:, None] * o) / l[:, None]
    channel = tl.arange(0, channels_padded)
    target = out + moving * out_row + head * out_head + tl.cast(first, tl.int64) * out_token
    target += here[:, None] * out_token + channel[None, :]
    tl.store(target, dy, mask=there[:, None] & (channel < channels)[None, :])
