"""Packed against padded pictures of several resolutions: ``python benchmarks/packing.py``.

A training step, forward and backward, of PixelFlow's transformer on the pictures of four stages,
equally many of each. Packed, they are one sequence without gaps; padded, every picture has as many
tokens as the largest, and attention is told by a mask which of them there are. The third row calls
the network once for each resolution. Medians of interleaved runs in one process.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from common import spread, timed
from torch import Tensor

from flowspace.demo.page import markdown_table
from flowspace.vision import PixelFlowTransformer
from flowspace.vision.layers import turned
from flowspace.vision.pixel_flow import PixelFlowBlock

SIDES = (8, 16, 32, 64)
"""Sides of the pictures in four stages, in pixels."""

CLASSES = 10
ROUNDS = 7


def padded(
    network: PixelFlowTransformer,
    pictures: Sequence[Tensor],
    t: Sequence[Tensor],
    labels: Sequence[Tensor],
) -> list[Tensor]:
    """Return the velocities that `PixelFlowTransformer.packed` returns, computed with padding.

    Written out by hand from the network's layers, for one without text and a second time.

    Args:
        network: whose velocities.
        pictures: for each resolution ``(B_k, channels, side_k, side_k)``.
        t: for each resolution times ``(B_k,)``.
        labels: for each resolution labels ``(B_k,)``.
    """
    patch = network.config["patch"]
    label: Any = network.label
    counts = [len(z) for z in pictures]
    sides = [z.shape[2] // patch for z in pictures]
    longest = max(sides) ** 2
    tokens, there, conditions = [], [], []
    cosines, sines = [], []
    for z, side, times, classes in zip(pictures, sides, t, labels, strict=True):
        rows, cells = len(z), side * side
        padding = (0, 0, 0, longest - cells)
        x = F.pixel_unshuffle(z, patch).flatten(2).transpose(1, 2)
        tokens.append(F.pad(x, padding))
        first = torch.arange(longest) < cells
        there.append(first.expand(rows, -1))
        cosine, sine = network.rotary(side, side, z.device)
        cosine, sine = F.pad(cosine, padding), F.pad(sine, padding)
        cosines.append(cosine.expand(rows, -1, -1))
        sines.append(sine.expand(rows, -1, -1))
        resolution = network.resolution(torch.tensor([side]))
        conditions.append(network.time(times) + resolution + label(classes))
    x = network.embed(torch.cat(tokens))
    condition = F.silu(torch.cat(conditions))
    turn = torch.cat(cosines)[:, None], torch.cat(sines)[:, None]
    mask = torch.cat(there)[:, None, None]
    blocks: Any = network.blocks
    for block in blocks:
        x = padded_block(block, x, condition, turn, mask)
    modulation = network.modulation(condition)[:, None]
    shift, scale = modulation.chunk(2, -1)
    x = F.layer_norm(x, x.shape[2:], eps=1e-6)
    out = network.head(x * (1 + scale) + shift)
    velocities = []
    for part, side in zip(out.split(counts), sides, strict=True):
        cells = part[:, : side * side].transpose(1, 2)
        maps = cells.unflatten(2, (side, side))
        velocities.append(F.pixel_shuffle(maps, patch))
    return velocities


def padded_block(
    block: PixelFlowBlock,
    x: Tensor,
    condition: Tensor,
    turn: tuple[Tensor, Tensor],
    there: Tensor,
) -> Tensor:
    """Return what a block makes of tokens ``(B, longest, width)`` of which some are not there."""
    layer = block.attention
    modulation = block.modulation(condition)[:, None]
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)

    y = F.layer_norm(x, x.shape[2:], eps=1e-6)
    y = y * (1 + scale1) + shift1
    q, k, v = layer.qkv(y).chunk(3, -1)
    q = heads_first(layer.q_norm(q), layer.heads)
    k = heads_first(layer.k_norm(k), layer.heads)
    v = heads_first(v, layer.heads)
    q = turned(q, *turn)
    k = turned(k, *turn)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=there)
    mixed = y.transpose(1, 2).flatten(2)
    x = x + gate1 * layer.proj(mixed)

    y = block.norm(x) * (1 + scale2) + shift2
    return x + gate2 * block.mlp(y)


def heads_first(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def separate(
    network: PixelFlowTransformer,
    pictures: Sequence[Tensor],
    t: Sequence[Tensor],
    labels: Sequence[Tensor],
) -> list[Tensor]:
    """Return the same velocities, by one call for each resolution."""
    velocities = []
    for z, times, classes in zip(pictures, t, labels, strict=True):
        velocities.append(network(z, times, labels=classes))
    return velocities


def packed(
    network: PixelFlowTransformer,
    pictures: Sequence[Tensor],
    t: Sequence[Tensor],
    labels: Sequence[Tensor],
) -> list[Tensor]:
    return network.packed(pictures, t, labels=labels)


WAYS = {"padded": padded, "one call a resolution": separate, "packed": packed}


def step(way: Callable[..., list[Tensor]], network: PixelFlowTransformer, batch: int) -> float:
    """Return the seconds of one step on a batch of pictures, equally many of each size."""
    count = batch // len(SIDES)
    pictures = [torch.randn(count, 3, side, side) for side in SIDES]
    t = [torch.rand(count) for _ in SIDES]
    labels = [torch.randint(CLASSES, (count,)) for _ in SIDES]

    def job() -> None:
        velocities = way(network, pictures, t, labels)
        losses = []
        for v, z in zip(velocities, pictures, strict=True):
            difference = v - z
            losses.append(difference.square().mean())
        torch.stack(losses).mean().backward()

    seconds = timed(job)
    network.zero_grad()
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--batch", type=int, default=32, help="pictures; a multiple of 4")
    add("--width", type=int, default=384)
    add("--depth", type=int, default=4)
    add("--rounds", type=int, default=ROUNDS, help="1 shows that it runs")
    options = parser.parse_args()
    torch.manual_seed(0)
    network = PixelFlowTransformer(
        classes=CLASSES,
        depth=options.depth,
        width=options.width,
        heads=options.width // 64,
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for way in WAYS.values():
        step(way, network, options.batch)  # not measured: the first call is slower
    for _ in range(options.rounds):
        for name, way in WAYS.items():
            taken = step(way, network, options.batch)
            seconds[name].append(taken)
    base = statistics.median(seconds["packed"])
    rows = []
    for name, taken in seconds.items():
        ratios = [each / base for each in taken]
        rows.append((name, spread(ratios)))
    print(markdown_table(("what", "over packed, quartiles"), rows))


if __name__ == "__main__":
    main()
