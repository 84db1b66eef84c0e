"""The rule for scaled dot product attention, in blocks.

With S = scale q k' + mask, P = softmax(S) and y = P v, the tangent is

    dS = scale (dq k' + q dk') + dmask
    dP = P (dS - rowsum(P dS))
    dy = dP v + P dv

where products of scores are elementwise. The value is left to torch's fused kernel, which keeps
no scores. For the tangent they are formed again, a block of queries at a time, so that no more
memory is needed than for one block:

* eager, `_eager_tangent`: where all heads of a row fit into a block, a block is all queries of
  some heads of some rows; else it is some queries of one head, for one or several rows. The memory
  of S is used for dS. Where everything fits into one block, `_small_tangent` asks for less;
* traced, `_traced_tangent`: a block is some queries of all heads and rows, as formulas without
  writes, which a compiler fuses;
* on a GPU in half precision, without a mask, `attention_kernel`: one kernel, eager and traced.

All work on tensors with four axes: (rows, heads, tokens, channels).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowspace.derivatives.rules import attention_kernel
from flowspace.derivatives.rules.dual import (
    Dual,
    Layout,
    check_same_rows,
    shared_rows,
    whole_primal,
)
from flowspace.derivatives.rules.registry import At, Call, rule, sum_of, tangent_of
from flowspace.derivatives.torch_internals import softmax_backward

BLOCK_ELEMENTS = 1 << 17
"""Scores that the tangent of attention holds at once, so that they stay in a CPU's cache.

A block has the scores of 64 queries at least.
"""

GPU_BLOCK_ELEMENTS = 1 << 24
"""Scores held at once on other devices, where each block costs a launch of every kernel."""

TRACED_ELEMENTS = 1 << 26
"""Scores held at once in a trace, whose blocks hold all rows and heads: a compiler fuses them."""


class Operands(NamedTuple):
    """The tensors of an attention, or their tangents; None is one that is not there."""

    query: Any
    key: Any
    value: Any
    mask: Any

    def map(self, function: Callable[[Any], Any]) -> "Operands":
        """Return the result of a function for each operand that is there."""
        return Operands(*[None if x is None else function(x) for x in self])

    def at(self, index: Any) -> "Operands":
        """Return the same part of every operand."""
        return self.map(lambda x: x[index])

    def repeat_heads(self, times: int) -> "Operands":
        """Return operands in which each head of key and value serves so many of the query."""
        query, key, value, mask = self
        if key is not None:
            key = key.repeat_interleave(times, -3)
        if value is not None:
            value = value.repeat_interleave(times, -3)
        return Operands(query, key, value, mask)

    def merge_heads(self) -> "Operands":
        """Return operands whose first axis holds the heads of the first row, then the second's."""
        return self.map(lambda x: x.flatten(0, 1))

    def at_queries(self, block: slice) -> "Operands":
        """Return the operands of some queries: each of them sees all keys and values."""
        return self._replace(query=_cut(self.query, block), mask=_cut(self.mask, block))


class Form(NamedTuple):
    """What kind of attention it is.

    Attributes:
        scale: what the scores are multiplied by.
        causal: no query sees a later key.
    """

    scale: float
    causal: bool


@rule("scaled_dot_product_attention")
def scaled_dot_product_attention(  # noqa: PLR0913  # torch's arguments
    call: Call,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> At:
    """The tangent is dP v + P dv, where P is the attention; the module's docstring tells dP."""
    for dual in call.duals:
        dual.untouched(-1, -2)
    out, dual = call.out, call.duals[0]
    shape, layout = out.shape, dual.layout
    if layout is not None:
        layout = layout.on(out.ndim - dual.ndim + layout.axis)
        shape = layout.shape(shape)
    if scale is None:
        scale = 1 / math.sqrt(whole_primal(query).shape[-1])
    form = Form(scale, is_causal)
    check_same_rows(call.duals)
    given = Operands(query, key, value, attn_mask)
    if attn_mask is None and not call.traced and _is_small(given[:3], out, shape):
        return At(_small_tangent(given[:3], form).reshape(shape), layout)
    tangents = given.map(tangent_of)
    if out.device.type in attention_kernel.DEVICES:
        tangent = _kernel_tangent(given.map(whole_primal), tangents, form, dual.layout)
        if tangent is not None:
            return At(tangent, layout)
    primals = given.map(shared_rows(call.duals))
    if enable_gqa:
        times = primals.query.shape[-3] // primals.key.shape[-3]
        primals = primals.repeat_heads(times)
        tangents = tangents.repeat_heads(times)
    # all axes before tokens and channels, two at least: the last of them is called heads
    lead = tuple(shape[:-2])
    while len(lead) < 2:
        lead = (1, *lead)
    primals = primals.map(lambda x: _four_axes(x, lead, out.dtype))
    tangents = tangents.map(lambda x: _four_axes(x, lead, out.dtype))
    if call.traced:
        tangent = _traced_tangent(primals, tangents, form)
        return At(tangent.reshape(shape), layout)
    tangent = _eager_tangent(primals, tangents, form)
    return At(tangent.reshape(shape), layout)


def _four_axes(x: Tensor, lead: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor of shape (rows, heads, tokens, any), in this dtype if it is not boolean.

    It is expanded without a copy where at most one of the axes that become rows is longer than 1.
    """
    if x.ndim == 4 and x.dtype == dtype and x.shape[:2] == lead:
        return x  # as most are: the steps below take longer than a small product
    if x.dtype != torch.bool:
        x = x.to(dtype)
    *batches, heads = lead
    missing = len(lead) + 2 - x.ndim
    x = x.reshape(*[1] * missing, *x.shape)
    last = x.shape[-3:]
    if max(x.shape[:-3]) > 1:
        x = x.expand(*batches, *last)
    x = x.flatten(0, -4)
    return x.expand(math.prod(batches), heads, -1, -1)


def _cut(x: Tensor | None, block: slice) -> Tensor | None:
    """Return some queries of a tensor; an axis of one query, the same for all, stays."""
    if x is None or x.shape[-2] == 1:
        return x
    return x[..., block, :]


# --- on a GPU


def _kernel_tangent(
    primals: Operands, tangents: Operands, form: Form, layout: Layout | None
) -> Tensor | None:
    """Return the tangent by the kernel, or None where it does not take these operands.

    The primals have every row of the batch, of which the kernel reads those that move.
    """
    *operands, mask = primals
    if mask is not None or not attention_kernel.takes(operands):
        return None
    rows = None
    if layout is not None:
        if layout[:3] != (0, 1, 1):
            return None
        rows = layout.chosen.indices
    dtype = primals.query.dtype
    query, key, value, _ = tangents.map(lambda x: x.to(dtype))
    return attention_kernel.attention_tangent(
        *operands, query, key, value, rows, form.scale, form.causal
    )


# --- eager


def _is_small(operands: Sequence[Any], out: Tensor, shape: Sequence[int]) -> bool:
    """Return whether query, key and value all move and have four axes, and their scores fit into
    one block.

    Args:
        operands: query, key and value.
        out: of the attention.
        shape: of the tangent.
    """
    device = out.device.type
    if device != "cpu" or device in attention_kernel.DEVICES or len(shape) != 4:
        return False
    for x in operands:
        if not isinstance(x, Dual):
            return False
        primal = x.primal
        if primal.ndim != 4 or primal.shape[:2] != out.shape[:2] or primal.dtype is not out.dtype:
            return False
    rows, heads, count, _ = shape
    return rows * heads * count * operands[1].primal.shape[2] <= BLOCK_ELEMENTS


def _small_tangent(duals: Sequence[Dual], form: Form) -> Tensor:
    """Return the tangent in one block, (rows heads, tokens, channels), of query, key and value.

    To prepare what other cases need takes longer than a small product.
    """
    query, key, value = (x.rows.flatten(0, 1) for x in duals)
    tangents = Operands(*[x.tangent.flatten(0, 1) for x in duals], mask=None)
    out = value.new_empty(*query.shape[:2], value.shape[2])
    _write_block(out, Operands(query, key, value, None), tangents, form, 0)
    return out


def _eager_tangent(primals: Operands, tangents: Operands, form: Form) -> Tensor:
    """Return the tangent, (rows, heads, tokens, channels)."""
    query, value = primals.query, primals.value
    batch, heads, count, _ = query.shape
    keys, channels = primals.key.shape[2], value.shape[3]
    elements = GPU_BLOCK_ELEMENTS
    if query.is_cpu:
        elements = BLOCK_ELEMENTS
    of_row = heads * count * keys
    # a mask that rows or heads share is copied for each pair, which is for few scores alone
    if batch * of_row <= elements or (primals.mask is None and of_row <= elements):
        out = value.new_empty(batch * heads, count, channels)
        at_once = elements // max(1, count * keys)
        _write_pairs(out, primals.merge_heads(), tangents.merge_heads(), form, at_once)
        return out.unflatten(0, (batch, heads))
    # in memory the heads of a token lie side by side, so that to merge them next takes no copy
    out = value.new_empty(batch, count, heads, channels).transpose(1, 2)
    # first as many queries of one row as fit, then as many rows
    queries = min(count, max(64, elements // keys))
    rows_at_once = max(1, elements // (queries * keys))
    _write_blocks(out, primals, tangents, form, (rows_at_once, queries))
    return out


def _write_pairs(
    out: Tensor, primals: Operands, tangents: Operands, form: Form, at_once: int
) -> None:
    """Write the tangent in blocks of pairs of a row and a head, which are the first axis."""
    if len(out) <= at_once:
        _write_block(out, primals, tangents, form, 0)
        return
    for first in range(0, len(out), at_once):
        part = slice(first, first + at_once)
        _write_block(out[part], primals.at(part), tangents.at(part), form, 0)


def _write_blocks(
    out: Tensor, primals: Operands, tangents: Operands, form: Form, sizes: tuple[int, int]
) -> None:
    """Write the tangent in blocks of so many rows and so many queries of one head."""
    batch, heads, count, _ = out.shape
    rows_at_once, queries = sizes
    first_rows = range(0, batch, rows_at_once)
    first_queries = range(0, count, queries)
    starts = itertools.product(first_rows, range(heads), first_queries)
    for row, head, first in starts:
        part = slice(row, row + rows_at_once), head
        block = slice(first, first + queries)
        here, moved = primals.at(part), tangents.at(part)
        target = out[part][:, block]
        _write_block(target, here.at_queries(block), moved.at_queries(block), form, first)


def _write_block(
    out: Tensor, primals: Operands, tangents: Operands, form: Form, first: int
) -> None:
    """Write dP v + P dv for the queries from the first on.

    The memory of the scores is used again for dS.
    """
    q, k, v, mask = primals
    dq, dk, dv, dmask = tangents
    keys = k.mT
    # S, with -inf where a query does not see a key
    scores = out.new_empty(*q.shape[:2], k.shape[1])
    scores.baddbmm_(q, keys, beta=0.0, alpha=form.scale)
    if form.causal:
        scores.masked_fill_(_later(scores, first), -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -math.inf)
    elif mask is not None:
        scores.add_(mask)
    p = _probabilities(scores, mask)
    if p.dtype is not v.dtype:
        p = p.to(v.dtype)
    # dS, in the memory of S; kept is 1.0 where there is something to add to
    kept = 0.0
    if dmask is not None:
        scores.copy_(dmask)
        kept = 1.0
    if dq is not None:
        scores.baddbmm_(dq, keys, beta=kept, alpha=form.scale)
        kept = 1.0
    if dk is not None:
        scores.baddbmm_(q, dk.mT, beta=kept, alpha=form.scale)
        kept = 1.0
    # the matrix of softmax is symmetric, so its backward kernel makes dP of dS
    if kept:
        dp = softmax_backward(scores, p, -1, p.dtype)
        out.baddbmm_(dp, v, beta=0.0)
    if dv is not None:
        out.baddbmm_(p, dv, beta=kept)


# --- traced


def _traced_tangent(primals: Operands, tangents: Operands, form: Form) -> Tensor:
    """Return the tangent in blocks of queries, as formulas and not as writes.

    Where the number of queries or keys is a symbol, there is one block.
    """
    count, keys = primals.query.shape[2], primals.key.shape[2]
    if isinstance(count, torch.SymInt) or isinstance(keys, torch.SymInt):
        return _block_tangent(primals, tangents, form, 0)
    batch, heads = primals.query.shape[:2]
    if tangents.query is not None:
        batch = tangents.query.shape[0]
    # -(-a // b) is a / b, rounded up
    elements, blocks = batch * heads * count * keys, 1
    if not isinstance(elements, torch.SymInt):
        blocks = -(-elements // TRACED_ELEMENTS)
    step = -(-count // blocks)
    parts = []
    for first in range(0, count, step):
        block = slice(first, first + step)
        here, moved = primals.at_queries(block), tangents.at_queries(block)
        parts.append(_block_tangent(here, moved, form, first))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, 2)


def _block_tangent(primals: Operands, tangents: Operands, form: Form, first: int) -> Tensor:
    """Return dP v + P dv for the queries from the first on, as formulas."""
    q, k, v, mask = primals
    dq, dk, dv, dmask = tangents
    keys = k.mT
    scores = form.scale * (q @ keys)
    if form.causal:
        scores = scores.masked_fill(_later(scores, first), -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    p = _probabilities(scores, mask)
    ds = dy = None
    if dq is not None:
        ds = dq @ keys
    if dk is not None:
        ds = sum_of(ds, q @ dk.mT)
    if ds is not None:
        ds = form.scale * ds
    if dmask is not None:
        ds = sum_of(ds, dmask)
    if dv is not None:
        dy = p @ dv
    if ds is not None:
        dp = p * (ds - (p * ds).sum(-1, keepdim=True))
        dy = sum_of(dy, dp @ v)
    return dy  # type: ignore[return-value]


# --- both


def _later(scores: Tensor, first: int) -> Tensor:
    """Return which keys come after which query, for the queries from the first on."""
    ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    return ones.triu(1 + first)


def _probabilities(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return the softmax of masked scores; it is zero where all keys of a query are masked."""
    if mask is None:
        return torch.softmax(scores, -1)
    return torch.ops.aten._safe_softmax(scores, -1)
