"""Layers that the vision transformers of this package share."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp, SwiGLU
from timm.layers.norm import RmsNorm
from torch import Tensor, nn

from flowspace.derivatives.own_rules import in_steps, linear_map, with_rule

__all__ = [
    "MLPS",
    "AdaptiveBlock",
    "AdaptiveOutput",
    "FourierEmbedding",
    "Norm",
    "RotaryAttention",
    "RotaryGrid",
    "TimeEmbedding",
    "gelu",
    "modulated",
    "silence",
    "sines_of_grid",
    "swiglu",
    "turned",
]

FREQUENCIES = 128
"""Sines and cosines of a time: as many of each."""

SLOWEST = 1e4
"""The slowest wave of rotary positions has this period over 2 pi, in cells; the usual one."""


class Norm(RmsNorm):
    """An RMS norm whose weight is cast to its input's dtype: under autocast torch's fused kernel
    takes no other.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x / sqrt(mean(x^2) + eps) * weight``, over the last axis."""
        weight = self.weight
        if weight.dtype != x.dtype:
            weight = weight.to(x.dtype)
        return torch.rms_norm(x, self.normalized_shape, weight, self.eps)


class TimeEmbedding(nn.Module):
    """Sines and cosines of a time, then a small MLP."""

    def __init__(self, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.first = nn.Linear(2 * FREQUENCIES, hidden, bias=False)
        self.second = nn.Linear(hidden, width, bias=False)

    def forward(self, time: Tensor) -> Tensor:
        """Map ``(B,)`` to ``(B, width)``; periods from 10 down to 1/16, formed in float32."""
        slowest, fastest = math.log10(0.2 * math.pi), math.log10(32 * math.pi)
        rates = torch.logspace(slowest, fastest, FREQUENCIES, device=time.device)
        angle = time.float()[:, None] * rates
        waves = torch.cat([angle.cos(), angle.sin()], 1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(waves)))


class FourierEmbedding(nn.Module):
    """Sines and cosines of a time at random frequencies that are never trained, then an MLP.

    Frequencies are standard normal, in periods a unit of time (Tancik et al., arXiv 2006.10739).

    Attributes:
        frequencies: ``(count,)``, a buffer: saved with the weights and not trained.
    """

    frequencies: Tensor

    def __init__(self, width: int, count: int = 256) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(count))
        self.first = nn.Linear(2 * count, width)
        self.second = nn.Linear(width, width)

    def _apply(self, fn: Any, recurse: bool = True) -> "FourierEmbedding":
        """Move the module, as ``to`` does; frequencies keep their dtype, for the angles' sake."""
        kept = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype != kept.dtype and not kept.is_meta:
            self.frequencies = kept.to(self.frequencies.device)
        return self

    def forward(self, time: Tensor) -> Tensor:
        """Map ``(B,)`` to ``(B, width)``; angles are formed in float32 at least."""
        exact = torch.promote_types(time.dtype, torch.float32)
        periods = time.to(exact)[:, None] * self.frequencies.to(exact)
        angle = 2 * math.pi * periods
        waves = torch.cat([angle.sin(), angle.cos()], 1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(waves)))


class RotaryGrid(nn.Module):
    """Rotary positions of the cells of a grid, in real arithmetic: half of a head for rows, half
    for columns.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(
        self, height: int, width: int, device: torch.device, before: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return cosines and sines ``(before + height width, size)``, as `turned` takes them.

        Numbers i and i + size/2 of a token turn together. The first ``before`` tokens, which are
        no cells, do not turn.
        """
        quarter = self.size // 4
        rates = SLOWEST ** (-torch.arange(quarter, device=device) / quarter)
        row = torch.arange(height, device=device)[:, None] * rates
        column = torch.arange(width, device=device)[:, None] * rates
        rows = row.repeat_interleave(width, 0)
        columns = column.repeat(height, 1)
        angle = torch.cat([rows, columns], 1)
        angle = F.pad(angle, (0, 0, before, 0))
        cosine, sine = angle.cos(), angle.sin()
        return torch.cat([cosine, cosine], 1), torch.cat([-sine, sine], 1)


def sines_of_grid(height: int, width: int, size: int, device: torch.device) -> Tensor:
    """Return fixed positions ``(height width, size)`` of the cells of a grid.

    They are sines, then cosines, of the column, and the same of the row, at a quarter of the size
    rates each (MAE, arXiv 2111.06377; DiT, arXiv 2212.09748).
    """
    quarter = size // 4
    rates = SLOWEST ** (-torch.arange(quarter, device=device) / quarter)
    column = torch.arange(width, device=device)[:, None] * rates
    row = torch.arange(height, device=device)[:, None] * rates
    columns = column.repeat(height, 1)
    rows = row.repeat_interleave(width, 0)
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], 1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return ``x (1 + scale) + shift``; adaLN's change of a normalised x (arXiv 2212.09748)."""
    return x * (1 + scale) + shift


def _tangent_of_gated(call: Any, gate: Any, value: Any) -> Any:
    """The tangent is silu'(gate) dgate value + silu(gate) dvalue."""
    if len(call.duals) < 2:
        return NotImplemented
    rows = gate.rows
    tangent = torch.ops.aten.silu_backward.default(gate.tangent * value.rows, rows)
    return torch.addcmul(tangent, F.silu(rows), value.tangent)


@with_rule(_tangent_of_gated)
def gated(gate: Tensor, value: Tensor) -> Tensor:
    """Return ``silu(gate) value``, of one shape."""
    return F.silu(gate) * value


class GatedMlp(SwiGLU):
    """timm's gated MLP, which drops nothing and has no norm within."""

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens to tokens of the same width."""
        return self.fc2(gated(self.fc1_g(x), self.fc1_x(x)))


def swiglu(width: int) -> nn.Module:
    """Return a gated MLP of hidden size 8/3 of the width, without biases."""
    hidden = 8 * round(width / 3)
    return GatedMlp(width, hidden, bias=False)


def gelu(width: int) -> nn.Module:
    """Return an MLP of hidden size 4 times the width, without biases."""
    return Mlp(width, 4 * width, bias=False)


MLPS = {"swiglu": swiglu, "gelu": gelu}


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair of numbers (x_i, x_j), j = i + size/2, of ``(..., tokens, size)`` by its
    token's angle, to (x_i cos - x_j sin, x_j cos + x_i sin); the sines of x_j have their sign.
    """
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), sine)


@linear_map
def split(x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return queries with keys ``(2, B, heads, N, size)``, and values, of ``(B, N, 3 width)``."""
    batch, tokens, _ = x.shape
    parts = x.reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return parts[:2], parts[2]


@linear_map
def placed(
    pair: Tensor,
    weights: Tensor | None,
    cosine: Tensor | None,
    sine: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return queries and keys, multiplied by the weights of their norms and turned."""
    if weights is not None:
        pair = pair * weights
    if cosine is not None and sine is not None:
        pair = turned(pair, cosine, sine)
    query, key = pair.to(dtype).unbind()
    return query, key


@linear_map
def joined(heads: Tensor) -> Tensor:
    """Return tokens ``(B, N, width)`` of their parts ``(B, heads, N, size)``."""
    return heads.transpose(1, 2).flatten(2)


def stacked(weights: tuple[Tensor, Tensor]) -> Tensor:
    """Return the weights of the queries' norm and of the keys', ``(2, 1, 1, 1, size)``."""
    return torch.stack(weights).view(2, 1, 1, 1, -1)


@in_steps
def attended(
    run: Callable[..., Any],
    qkv: Tensor,
    heads: int,
    norm: tuple[Any, float] | None,
    weights: tuple[Tensor, Tensor] | None,
    cosine: Tensor | None,
    sine: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return tokens ``(B, N, width)`` of queries, keys and values ``(B, N, 3 width)``.

    Queries and keys are normalised and turned as one tensor, which takes fewer calls.
    """
    pair, v = run(split, qkv, heads)
    factors = None
    if norm is not None:
        shape, eps = norm
        pair = run(torch.rms_norm, pair, shape, None, eps)
        factors = run(stacked, weights)
    q, k = run(placed, pair, factors, cosine, sine, dtype)
    return run(joined, run(F.scaled_dot_product_attention, q, k, v))


class RotaryAttention(nn.Module):
    """Attention among tokens whose queries and keys are turned by their places; a block of a
    transformer inherits it, and makes the layers.

    Attributes:
        heads: of the attention.
        qkv: maps a token to its queries, keys and values, all heads of one after the other.
        q_norm: an RMS norm of a head's query, or nothing.
        k_norm: likewise of its key.
        proj: maps what the heads found to a token.
    """

    heads: int
    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    proj: nn.Linear

    def attention(self, x: Tensor, cosine: Tensor | None, sine: Tensor | None) -> Tensor:
        """Map tokens ``(B, N, width)`` to tokens; without cosines and sines nothing is turned."""
        norm: tuple[Any, float] | None = None
        weights: tuple[Tensor, Tensor] | None = None
        if isinstance(self.q_norm, Norm) and isinstance(self.k_norm, Norm):
            norm = self.q_norm.normalized_shape, self.q_norm.eps
            weights = self.q_norm.weight, self.k_norm.weight
        qkv = self.qkv(x)
        return self.proj(attended(qkv, self.heads, norm, weights, cosine, sine, qkv.dtype))


class AdaptiveBlock(RotaryAttention):
    """Attention and an MLP on normalised tokens, both shifted, scaled and gated by a condition
    (adaLN-zero, arXiv 2212.09748); it begins by returning its input.

    Args:
        width: of the tokens.
        heads: of the attention.
        norm: makes a norm of tokens of a width.
        mlp: maps tokens to tokens.
        normalised_heads: whether queries and keys pass an RMS norm.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        norm: Callable[[int], nn.Module],
        mlp: nn.Module,
        normalised_heads: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if normalised_heads:
            self.q_norm, self.k_norm = Norm(width // heads), Norm(width // heads)
        self.proj = nn.Linear(width, width)
        self.mlp = mlp
        silence(self.modulation)

    def forward(
        self, x: Tensor, condition: Tensor, cosine: Tensor | None, sine: Tensor | None
    ) -> Tensor:
        """Map tokens ``(B, N, width)`` to tokens.

        Args:
            x: the tokens; those of the context come first.
            condition: ``(B, 1, width)``, or ``(B, N, width)`` where each token has its own.
            cosine: of the rotary positions ``(N, width / heads)``; None: without.
            sine: likewise.
        """
        parts = self.modulation(F.silu(condition)).chunk(6, -1)
        shift, scale, gate = parts[:3]
        x = x + gate * self.attention(modulated(self.norm1(x), shift, scale), cosine, sine)
        shift, scale, gate = parts[3:]
        return x + gate * self.mlp(modulated(self.norm2(x), shift, scale))


class AdaptiveOutput(nn.Module):
    """A linear layer on normalised tokens, shifted and scaled by a condition; begins at zero."""

    def __init__(self, width: int, numbers: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.norm = norm(width)
        self.linear = nn.Linear(width, numbers)
        silence(self.modulation)
        silence(self.linear)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map tokens ``(B, N, width)`` to ``(B, N, numbers)``."""
        shift, scale = self.modulation(F.silu(condition)).chunk(2, -1)
        return self.linear(modulated(self.norm(x), shift, scale))


def silence(layer: nn.Linear) -> None:
    """Let a layer begin at zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
