"""A jitted CrossFlow step on JAX over a hand-written one of the same MLP: ``python
benchmarks/jax_step.py`` (extra ``jax``).

Both draw times and noise from a key, differentiate by one `jax.jvp`, and take a step of gradient
descent; the hand-written step is for the linear schedule alone, and draws which rows lie on the
diagonal by a coin each. Medians of interleaved runs.
"""

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flowspace import CrossFlowLoss, TimePairs
from flowspace.demo.page import markdown_table

ROUNDS = 201
UNCOUNTED = 5
"""Rounds before them, which compile and warm up."""

SIZE = 16
OBJECTIVE = CrossFlowLoss(times=TimePairs())

Loss = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def mlp(weights: list[jax.Array], z: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
    """Return the output of an MLP with SiLU of (z, t, s)."""
    times = jnp.stack([t, s], 1)
    h = jnp.concatenate([z, times], 1)
    *hidden, last = weights
    for weight in hidden:
        h = jax.nn.silu(h @ weight)
    return h @ last


def by_flowspace(weights: Any, z: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
    """Return the loss of `CrossFlowLoss`."""
    network = functools.partial(mlp, weights)
    out = OBJECTIVE(network, z, x, generator=key)
    return out.loss.mean()


def by_hand(weights: Any, z: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
    """Return y* = (s/t) x + (1 - s/t) sg(f - t D_t f), written out."""
    for_times, for_diagonal, for_noise = jax.random.split(key, 3)
    rows = len(z)
    pair = jax.random.uniform(for_times, (2, rows), minval=0.01)
    diagonal = jax.random.bernoulli(for_diagonal, 0.5, (rows,))
    t = pair.max(0)
    s = jnp.where(diagonal, t, pair.min(0))
    noise = jax.random.normal(for_noise, z.shape)
    T, S = t[:, None], s[:, None]
    z_t = (1 - T) * z + T * noise

    def of_state(z: jax.Array, t: jax.Array) -> jax.Array:
        return mlp(weights, z, t, s)

    tangents = (noise - z, jnp.ones_like(t))
    f, df = jax.jvp(of_state, (z_t, t), tangents)
    target = S / T * x + (1 - S / T) * (f - T * df)
    error = f - jax.lax.stop_gradient(target)
    return (error**2).mean()


def step_of(loss: Loss) -> Callable[..., Any]:
    """Return a jitted step of gradient descent."""
    slope_of = jax.value_and_grad(loss)

    @jax.jit
    def step(weights: Any, z: jax.Array, x: jax.Array, key: jax.Array) -> Any:
        value, slope = slope_of(weights, z, x, key)
        moved = jax.tree.map(lambda w, g: w - 1e-3 * g, weights, slope)
        return value, moved

    return step


def medians(rounds: int, steps: Sequence[Callable[..., Any]], *arguments: Any) -> list[float]:
    """Return the median seconds of each step, run in turn, every other time backwards."""
    seconds: list[list[float]] = [[] for _ in steps]
    order = list(range(len(steps)))
    for _ in range(UNCOUNTED + rounds):
        order.reverse()
        for number in order:
            step = steps[number]
            start = time.perf_counter()
            out = step(*arguments)
            jax.block_until_ready(out)
            taken = time.perf_counter() - start
            seconds[number].append(taken)
    return [statistics.median(taken[UNCOUNTED:]) for taken in seconds]


def weights_of(width: int, keys: jax.Array) -> list[jax.Array]:
    """Draw the weights of an MLP with three hidden layers."""
    sizes = (SIZE + 2, width, width, width, SIZE)
    weights = []
    for key, shape in zip(keys, itertools.pairwise(sizes), strict=False):
        weight = jax.random.normal(key, shape)
        weights.append(weight / shape[0] ** 0.5)
    return weights


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="1 shows that it runs")
    options = parser.parse_args()
    rows = []
    for width, batch in ((128, 512), (512, 256), (512, 2048)):
        keys = jax.random.split(jax.random.key(0), 8)
        weights = weights_of(width, keys)
        shape = (batch, SIZE)
        z = jax.random.normal(keys[4], shape)
        x = jax.random.normal(keys[5], shape)
        steps = (step_of(by_flowspace), step_of(by_hand))
        ours, theirs = medians(options.rounds, steps, weights, z, x, keys[7])
        row = (
            f"3 hidden layers of {width}, batch {batch}",
            f"{ours / theirs:.3f}",
            f"{1000 * ours:.2f}",
            f"{1000 * theirs:.2f}",
        )
        rows.append(row)
    head = ("MLP", "CrossFlow step over the hand-written one", "ms", "ms by hand")
    device, *_ = jax.devices()
    print(f"{device.device_kind}, jax {jax.__version__}\n")
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()
