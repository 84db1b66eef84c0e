"""The rule for scaled dot product attention, in blocks.

With S = scale q k' + mask, P = softmax(S) and y = P v, the tangent is

    dS = scale (dq k' + q dk') + dmask
    dP = P (dS - rowsum(P dS))
    dy = dP v + P dv

where products of scores are elementwise. The value is left to torch's fused kernel. For the
tangent the scores are formed again, a block of queries of one head at a time, so that no more
memory is needed than for one block.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowspace.derivatives.rules.dual import shared_rows
from flowspace.derivatives.rules.registry import At, Call, rule, sum_of, tangent_of

BLOCK_ELEMENTS = 1 << 17
"""Scores that the tangent of attention holds at once, so that they stay in a CPU's cache.

A block has the scores of 64 queries at least.
"""

GPU_BLOCK_ELEMENTS = 1 << 24
"""Scores held at once on other devices, where each block costs a launch of every kernel."""

TRACED_ELEMENTS = 1 << 26
"""Scores held at once in a trace, whose blocks hold all rows and heads: a compiler fuses them."""

Operands = Sequence[Any]
"""Query, key, value and mask, or their tangents; None is a mask or a tangent that is not there."""


@rule("scaled_dot_product_attention")
def scaled_dot_product_attention(
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
    rows, out = shared_rows(call.duals), call.out
    shape, layout = out.shape, call.duals[0].layout
    if layout:
        layout = layout.on(out.ndim - call.duals[0].ndim + layout.axis)
        shape = layout.shape(shape)
    given = (query, key, value, attn_mask)
    primals, tangents = [rows(x) for x in given], [tangent_of(x) for x in given]
    if enable_gqa:
        times = primals[0].shape[-3] // primals[1].shape[-3]
        primals = _heads_repeated(primals, times)
        tangents = _heads_repeated(tangents, times)
    if scale is None:
        scale = 1 / math.sqrt(primals[0].shape[-1])
    # all axes before tokens and channels, two at least: the last of them is called heads
    lead = (1, 1, *shape[:-2])[-max(2, len(shape) - 2) :]
    primals = [_four_axes(x, lead, out.dtype) for x in primals]
    tangents = [_four_axes(x, lead, out.dtype) for x in tangents]
    if call.traced:
        found = _traced_tangent(primals, tangents, is_causal, scale)
        return At(found.reshape(shape), layout)
    # in memory the heads of a token lie side by side, so that to merge them next takes no copy
    found = out.new_empty(math.prod(lead[:-1]), shape[-2], lead[-1], shape[-1]).transpose(1, 2)
    _attention_tangent(primals, tangents, found, is_causal, scale)
    return At(found.reshape(shape), layout)


def _heads_repeated(operands: Operands, times: int) -> list[Any]:
    """Return operands with each head of key and value given to so many heads of the query."""
    query, key, value, mask = operands
    key = None if key is None else key.repeat_interleave(times, -3)
    value = None if value is None else value.repeat_interleave(times, -3)
    return [query, key, value, mask]


def _four_axes(x: Tensor | None, lead: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """Return a tensor of shape (rows, heads, tokens, any), in this dtype if it is not boolean.

    It is expanded without a copy where at most one of the axes that become rows is longer than 1.
    """
    if x is None:
        return None
    if x.dtype != torch.bool:
        x = x.to(dtype)
    x = x.reshape(*[1] * (len(lead) + 2 - x.ndim), *x.shape)
    if max(x.shape[: len(lead) - 1]) > 1:
        x = x.expand(*lead[:-1], *x.shape[-3:])
    return x.reshape(-1, *x.shape[-3:]).expand(math.prod(lead[:-1]), lead[-1], -1, -1)


def _attention_tangent(
    primals: Operands, tangents: Operands, found: Tensor, causal: bool, scale: float
) -> None:
    """Write the tangent in blocks of rows and queries of one head; operands have four axes."""
    q, k, v, mask = primals
    tq, tk, tv, tmask = tangents
    (batch, heads, count, _), keys = q.shape, k.shape[2]
    primals = q, k.mT, v, mask
    tangents = tq, None if tk is None else tk.mT, tv, tmask
    elements = BLOCK_ELEMENTS if q.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    # first as many queries of one row as fit, then as many rows
    queries = min(count, max(64, elements // keys))
    step = max(1, elements // (queries * keys))
    blocks = itertools.product(range(0, batch, step), range(heads), range(0, count, queries))
    for row, head, first in blocks:
        rows, block = slice(row, row + step), slice(first, first + queries)
        cuts = (block, None, None, block)  # every query sees all keys and values
        here = [_part(x, rows, head, cut) for x, cut in zip(primals, cuts, strict=True)]
        moved = [_part(x, rows, head, cut) for x, cut in zip(tangents, cuts, strict=True)]
        _block(here, moved, found[rows, head, block], causal, scale, first)


def _traced_tangent(primals: Operands, tangents: Operands, causal: bool, scale: float) -> Tensor:
    """Return the tangent in blocks of queries, as formulas and not as writes."""
    count, keys = primals[0].shape[2], primals[1].shape[2]
    if isinstance(count, torch.SymInt) or isinstance(keys, torch.SymInt):
        return _formula(primals, tangents, causal, scale, 0)
    heads = primals[0].shape[1] * (tangents[0] if tangents[0] is not None else primals[0]).shape[0]
    blocks = 1 if isinstance(heads, torch.SymInt) else -(-heads * count * keys // TRACED_ELEMENTS)
    step = -(-count // blocks)
    parts = []
    for first in range(0, count, step):
        block = slice(first, first + step)
        cuts = (block, None, None, block)  # every query sees all keys and values
        here = [_queries(x, cut) for x, cut in zip(primals, cuts, strict=True)]
        moved = [_queries(x, cut) for x, cut in zip(tangents, cuts, strict=True)]
        parts.append(_formula(here, moved, causal, scale, first))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _queries(x: Tensor | None, queries: slice | None) -> Tensor | None:
    """Return some queries of a tensor with four axes; an axis of one query stays."""
    if x is None or queries is None or x.shape[2] == 1:
        return x
    return x[:, :, queries]


def _formula(
    primals: Operands, tangents: Operands, causal: bool, scale: float, first: int
) -> Tensor:
    """Return dP v + P dv for the queries from the first on."""
    q, k, v, mask = primals
    tq, tk, tv, tmask = tangents
    scores = scale * (q @ k.mT)
    if causal:
        scores = scores.masked_fill(_later(scores, first), -math.inf)
    if mask is None:
        p = torch.softmax(scores, -1)
    else:
        boolean = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if boolean else scores + mask
        p = torch.ops.aten._safe_softmax(scores, -1)  # zero where all keys of a query are masked
    moved = None if tq is None else scale * (tq @ k.mT)
    if tk is not None:
        moved = sum_of(moved, scale * (q @ tk.mT))
    if tmask is not None:
        moved = sum_of(moved, tmask)
    found = None if tv is None else p @ tv
    if moved is not None:
        dp = p * (moved - (p * moved).sum(-1, keepdim=True))
        found = sum_of(found, dp @ v)
    return found  # type: ignore[return-value]


def _part(x: Tensor | None, rows: slice, head: int, queries: slice | None) -> Tensor | None:
    """Return a block of one head of a tensor with four axes, as a view.

    An axis of one query, as in a mask that is the same for all, stays.
    """
    if x is None:
        return None
    x = x[rows, head]
    return x if queries is None or x.shape[1] == 1 else x[:, queries]


def _block(
    primals: Operands,
    tangents: Operands,
    found: Tensor,
    causal: bool,
    scale: float,
    first: int,
) -> None:
    """Write dP v + P dv for the queries from the first on; the keys are transposed already.

    The memory of the scores is used again for dS.
    """
    q, k, v, mask = primals
    tq, tk, tv, tmask = tangents
    scores = found.new_empty(len(q), q.shape[1], k.shape[2])
    _sum_products(scores, False, scale, (q, k))
    if causal:
        scores.masked_fill_(_later(scores, first), -math.inf)
    if mask is None:
        p = torch.softmax(scores, -1)
    else:
        boolean = mask.dtype == torch.bool
        scores = scores.masked_fill_(~mask, -math.inf) if boolean else scores.add_(mask)
        p = torch.ops.aten._safe_softmax(scores, -1)  # zero where all keys of a query are masked
    p = p.to(v.dtype)
    if tmask is not None:
        scores.copy_(tmask)
    moved = _sum_products(scores, tmask is not None, scale, (tq, k), (q, tk))
    tp = torch.ops.aten._softmax_backward_data(scores, p, -1, p.dtype) if moved else None
    _sum_products(found, False, 1.0, (tp, v), (p, tv))


def _later(scores: Tensor, first: int) -> Tensor:
    """Return which keys come after which query, for the queries from the first on."""
    ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    return ones.triu(1 + first)


def _sum_products(
    total: Tensor, added: bool, scale: float, *pairs: tuple[Tensor | None, Tensor | None]
) -> bool:
    """Write the scaled sum of the products of these pairs, added to what is there if `added`.

    A pair with None is passed over. Returns whether the total holds anything by now.
    """
    for x, y in pairs:
        if x is not None and y is not None:
            total.baddbmm_(x, y, beta=float(added), alpha=scale)
            added = True
    return added
