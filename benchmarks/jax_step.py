"""A jitted CrossFlow step on JAX over a hand-written one of the same MLP: ``python
benchmarks/jax_step.py`` (extra ``jax``).

Both draw times and noise from a key, differentiate by one `jax.jvp`, and take a step of gradient
descent; the hand-written step is for the linear schedule alone, and draws which rows lie on the
diagonal by a coin each. Medians of interleaved runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowspace import CrossFlowLoss, TimePairs
from flowspace.demo.page import markdown_table

ROUNDS = 201
SIZE = 16
OBJECTIVE = CrossFlowLoss(times=TimePairs())

Loss = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def mlp(weights: list[jax.Array], z: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
    """Return the output of an MLP with SiLU of (z, t, s)."""
    h = jnp.concatenate([z, t[:, None], s[:, None]], 1)
    for weight in weights[:-1]:
        h = jax.nn.silu(h @ weight)
    return h @ weights[-1]


def by_flowspace(weights: Any, z: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
    """Return the loss of `CrossFlowLoss`."""
    return OBJECTIVE(lambda z, t, s: mlp(weights, z, t, s), z, x, generator=key).loss.mean()


def by_hand(weights: Any, z: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
    """Return y* = (s/t) x + (1 - s/t) sg(f - t D_t f), written out."""
    for_times, for_diagonal, for_noise = jax.random.split(key, 3)
    pair = jax.random.uniform(for_times, (2, len(z)), minval=0.01)
    t = pair.max(0)
    s = jnp.where(jax.random.bernoulli(for_diagonal, 0.5, (len(z),)), t, pair.min(0))
    noise = jax.random.normal(for_noise, z.shape)
    z_t = (1 - t[:, None]) * z + t[:, None] * noise
    f, df = jax.jvp(lambda z, t: mlp(weights, z, t, s), (z_t, t), (noise - z, jnp.ones_like(t)))
    share = (s / t)[:, None]
    target = jax.lax.stop_gradient(share * x + (1 - share) * (f - t[:, None] * df))
    return ((f - target) ** 2).mean()


def step_of(loss: Loss) -> Callable[..., Any]:
    """Return a jitted step of gradient descent."""

    @jax.jit
    def step(weights: Any, z: jax.Array, x: jax.Array, key: jax.Array) -> Any:
        value, slope = jax.value_and_grad(loss)(weights, z, x, key)
        return value, jax.tree.map(lambda w, g: w - 1e-3 * g, weights, slope)

    return step


def medians(rounds: int, jobs: dict[str, Callable[..., Any]], *arguments: Any) -> dict[str, float]:
    """Return the median seconds of each job, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 5):
        names = list(jobs)
        for name in names if turn % 2 else reversed(names):
            start = time.perf_counter()
            jax.block_until_ready(jobs[name](*arguments))
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[5:]) for name, values in seconds.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="1 shows that it runs")
    options = parser.parse_args()
    rows = []
    for width, batch in ((128, 512), (512, 256), (512, 2048)):
        keys = jax.random.split(jax.random.key(0), 8)
        shapes = [(SIZE + 2, width), (width, width), (width, width), (width, SIZE)]
        weights = [
            jax.random.normal(key, shape) / shape[0] ** 0.5
            for key, shape in zip(keys, shapes, strict=False)
        ]
        z, x = (jax.random.normal(key, (batch, SIZE)) for key in keys[4:6])
        jobs = {"flowspace": step_of(by_flowspace), "hand": step_of(by_hand)}
        found = medians(options.rounds, jobs, weights, z, x, keys[7])
        ratio = found["flowspace"] / found["hand"]
        times = [f"{1000 * seconds:.2f}" for seconds in found.values()]
        rows.append((f"3 hidden layers of {width}, batch {batch}", f"{ratio:.3f}", *times))
    head = ("MLP", "CrossFlow step over the hand-written one", "ms", "ms by hand")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()
