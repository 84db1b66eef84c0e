"""Functions that draw random numbers, written in others whose draws are seen.

What such a function draws must be the same for the value and for the tangent, and torch does not
hand it out. So the draw is made on its own, once, and what is done with it is left to the rules of
other functions: dropout of x is x times dropout of ones.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["RANDOM", "decompositions"]

RANDOM = frozenset(
    "scaled_dot_product_attention dropout feature_dropout alpha_dropout feature_alpha_dropout "
    "dropout_ feature_dropout_ alpha_dropout_ feature_alpha_dropout_ rrelu_".split()
)
"""Functions that may have to be written in others, see `decompositions`."""


SATURATION = 1.7580993408473766
"""Minus what a SELU tends to for small numbers."""


def decompositions(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Any] | None:
    """Return the function, written in others, that stands for one that draws random numbers.

    It is None for attention without dropout, which draws none.
    """
    if name == "scaled_dot_product_attention":
        dropout = kwargs.get("dropout_p", 0.0)
        if len(args) > 4:
            dropout = args[4]
        if not dropout:
            return None
        return _attention
    if name == "rrelu_":
        return _in_place(_leaky)
    if name.endswith("_"):
        return _in_place(getattr(torch, name[:-1]))
    if "alpha" in name:
        return _alpha_dropout(getattr(torch, name))
    return _dropout(getattr(torch, name))


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return attention with dropout.

    On a CPU torch computes it in single precision where it is given half, in and out of autocast,
    which makes half of what it is given first.
    """
    dtype = query.dtype
    if torch.is_autocast_enabled("cpu") and dtype.itemsize < 8:
        dtype = torch.get_autocast_dtype("cpu")
    if not query.is_cpu or dtype.itemsize >= 4:
        return _attention_in_parts(query, key, value, *args, **kwargs)

    def halved(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.to(dtype)
        return x

    given = [halved(x).float() for x in (query, key, value)]
    options = {name: halved(x) for name, x in kwargs.items()}
    with torch.autocast("cpu", enabled=False):
        return _attention_in_parts(*given, *map(halved, args), **options).to(dtype)


def _attention_in_parts(  # noqa: PLR0913  # torch's arguments
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return attention with dropout, whose mask must be the same for primal and tangent.

    A fused kernel would draw its mask inside; written in parts, dropout is a function of its own.
    """
    if enable_gqa:
        heads = query.shape[-3]
        key = key.repeat_interleave(heads // key.shape[-3], -3)
        value = value.repeat_interleave(heads // value.shape[-3], -3)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    # torch too scales query and key by the root each, so that large scores do not overflow
    root = math.sqrt(abs(scale))
    scores = (query * math.copysign(root, scale)) @ (key * root).mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.softmax(scores, -1)
    if attn_mask is not None:
        # a query that sees no key has weights of nan, and torch's function returns zero
        blind = (scores == -math.inf).all(-1, keepdim=True)
        weights = weights.masked_fill(blind, 0.0)
    return torch.dropout(weights, dropout_p, True) @ value


def _dropout(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a dropout function as a product with what it makes of ones.

    That is the mask, scaled; it does not move, so the tangent is multiplied by it too.
    """

    def dropout(input: Tensor, p: float = 0.5, train: bool = True) -> Tensor:
        if train and p > 0:
            return input * function(torch.ones_like(input), float(p), True)
        return input

    return dropout


def _alpha_dropout(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an alpha dropout as torch forms it. What it keeps of ones stays positive.

    It keeps mean and variance of what a SELU returns (Klambauer et al., arXiv 1706.02515).
    """

    def dropout(input: Tensor, p: float = 0.5, train: bool = True) -> Tensor:
        if not train or p <= 0:
            return input
        if p >= 1:
            return input * 0.0
        kept = (function(torch.ones_like(input), float(p), True) > 0).to(input.dtype)
        scale = 1 / math.sqrt((SATURATION**2 * p + 1) * (1 - p))
        shift = (kept - 1) * (SATURATION * scale) + SATURATION * scale * p
        return input * (kept * scale) + shift

    return dropout


def _leaky(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return a leaky ReLU with slopes that are drawn, of a copy: autograd saves what it is of."""
    return torch.rrelu(input.clone(), *args, **kwargs)


def _in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that writes into its input what another one returns."""

    def drop(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input.copy_(function(input, *args, **kwargs))

    return drop
