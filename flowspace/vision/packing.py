"""Tokens of pictures of several sizes in one batch, without padding (Dehghani et al., "Patch n'
Pack", arXiv 2307.06304).

Pictures of one size are a batch ``(B, n, ...)`` as ever. Pictures of several sizes become one
long row ``(1, N, ...)``: all tokens of the first size, picture after picture, then those of the
second. Linear layers and norms see the row as a whole. Attention must stay within a picture; since
all pictures of a size have equally many tokens, it is one fused call for each size, and no token
is computed that nobody needs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Packing"]


class Packing(NamedTuple):
    """Where the tokens of each picture lie.

    Attributes:
        sizes: for each size of picture, how many pictures there are, and tokens in one of them.
    """

    sizes: tuple[tuple[int, int], ...]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return tokens ``(B_k, n_k, *)`` of each size as one row ``(1, N, *)``; tokens of one
        size alone stay as they are.
        """
        if len(self.sizes) == 1:
            return parts[0]
        flat = [part.flatten(0, 1) for part in parts]
        return torch.cat(flat)[None]

    def split(self, row: Tensor) -> list[Tensor]:
        """Return the tokens ``(B_k, n_k, *)`` of each size: the inverse of `join`."""
        if len(self.sizes) == 1:
            return [row]
        lengths = [pictures * tokens for pictures, tokens in self.sizes]
        parts = []
        for part, size in zip(row[0].split(lengths), self.sizes, strict=True):
            parts.append(part.unflatten(0, size))
        return parts

    def by_size(self, values: Tensor) -> list[Tensor]:
        """Return values ``(B, *)`` of all pictures as those ``(B_k, *)`` of each size."""
        return list(values.split([pictures for pictures, _ in self.sizes]))

    def spread(self, values: Tensor) -> Tensor:
        """Return values ``(B, w)`` of pictures in a shape that broadcasts over their tokens."""
        if len(self.sizes) == 1:
            return values[:, None]
        parts = []
        for part, (_, tokens) in zip(self.by_size(values), self.sizes, strict=True):
            parts.append(part[:, None].expand(-1, tokens, -1))
        return self.join(parts)

    def repeat(self, parts: Sequence[Tensor]) -> Tensor:
        """Return values ``(n_k, w)`` of the tokens of one picture of each size, for all of them:
        ``(N, w)``, or ``(n, w)`` for one size alone.
        """
        if len(self.sizes) == 1:
            return parts[0]
        repeated = []
        for part, (pictures, _) in zip(parts, self.sizes, strict=True):
            repeated.append(part.repeat(pictures, 1))
        return torch.cat(repeated)

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention of tokens ``(1, N, heads, w)`` within each picture, in that shape."""
        parts = []
        for each in zip(self.split(q), self.split(k), self.split(v), strict=True):
            parts.append(attention(*each))
        return self.join(parts)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Return attention of tokens ``(1, N, heads, w)`` to their picture's own context.

        Args:
            q: of the tokens.
            k: of the context, ``(B, L, heads, w)`` for all pictures in order.
            v: as k.
            mask: which tokens of the context there are, ``(B, L)``; at least one for a picture.
        """
        contexts = zip(self.by_size(k), self.by_size(v), self.by_size(mask), strict=True)
        parts = []
        for part, (keys, values, there) in zip(self.split(q), contexts, strict=True):
            parts.append(attention(part, keys, values, there[:, None, None]))
        return self.join(parts)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return fused attention where heads follow tokens, as they come out of linear layers:
    ``(B, n, heads, w)`` from queries of that shape and keys and values ``(B, L, heads, w)``.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    found = F.scaled_dot_product_attention(q, k, v, mask)
    return found.transpose(1, 2)
