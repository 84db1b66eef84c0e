"""Training steps to compare: a plain one, and one by each route to D_t f, run in turn.

What is told of a step is its ratio to the plain step of the same round, so that what else the
machine does touches both.
"""

import contextlib
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowspace.backends import torch_backend
from flowspace.derivatives import Derivative, FiniteDifference, ForwardMode, SharedPrimal
from flowspace.doctor.target import Example
from flowspace.objectives import CrossFlowLoss

__all__ = [
    "PLAIN",
    "ROUTES",
    "StepCost",
    "Stopwatch",
    "Trial",
    "one_thread",
    "recorded_warnings",
    "run_in_turn",
    "said",
    "steps_of",
]

ROUTES: dict[str, Derivative] = {
    "SharedPrimal()": SharedPrimal(),
    "ForwardMode()": ForwardMode(),
    "FiniteDifference(order=1)": FiniteDifference(order=1),
    "FiniteDifference(order=2)": FiniteDifference(order=2),
}
"""Each route by what one writes to have it."""

PLAIN = "plain step"

MOST_ROUNDS = 15
FEWEST_ROUNDS = 2


class Stopwatch:
    """How much of a time limit is left.

    Attributes:
        seconds: the limit.
        end: when it is over.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """The seconds that are left; below zero when the time is over."""
        return self.end - time.monotonic()


class StepCost(NamedTuple):
    """A step over the plain step: the median of the rounds' ratios, and its quartiles."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, above: list[float], below: list[float]) -> "StepCost":
        """Return the cost of paired seconds, round by round."""
        ratios = [a / b for a, b in zip(above, below, strict=False)]
        if len(ratios) == 1:
            return cls(ratios[0], ratios[0], ratios[0], 1)
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(middle, low, high, len(ratios))


class Trial(NamedTuple):
    """What came of the steps of one kind.

    Attributes:
        seconds: of each round.
        failure: what it raised, or empty.
        warned: what it warned of.
    """

    seconds: list[float]
    failure: str
    warned: list[str]


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Measure a CPU by one thread, unless OMP_NUM_THREADS says otherwise: what one thread of a
    process takes, other programs disturb least.
    """
    before = torch.get_num_threads()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def steps_of(example: Example) -> dict[str, Callable[[], Any]]:
    """Return a training step of each kind: the plain one first, then one by each route."""
    found: dict[str, Callable[[], Any]] = {PLAIN: lambda: _plain(example)}
    for name, route in ROUTES.items():
        found[name] = _step(example, CrossFlowLoss(derivative=route))
    return found


def _plain(example: Example) -> None:
    """Make a step of regression, with the same evaluations as any training has."""
    latents = example.latents
    t = torch.rand(len(latents), device=latents.device).to(torch_backend.time_dtype(latents))
    z_t = latents + torch.randn_like(latents)
    out = example.model(z_t, t, 0.5 * t, **example.cond)
    _backward((out - example.images).square().mean())


def _step(example: Example, objective: CrossFlowLoss) -> Callable[[], None]:
    def run() -> None:
        out = objective(example.model, example.latents, example.images, cond=example.cond)
        _backward(out.loss.mean())

    return run


def _backward(loss: Tensor) -> None:
    """Go back where there is a parameter to go to."""
    if loss.requires_grad:
        loss.backward()


def run_in_turn(
    example: Example,
    steps: Mapping[str, Callable[[], Any]],
    seconds: float,
) -> dict[str, Trial]:
    """Run the steps in turn until a time is over; what one raises does not end the others.

    Each is run once before, which is not counted: it pays for what is made only once.
    """
    trials = {name: Trial([], "", []) for name in steps}
    for name, step in steps.items():
        trials[name] = _once(example, step, trials[name])
        trials[name].seconds.clear()
    watch, rounds = Stopwatch(seconds), 0
    while rounds < MOST_ROUNDS and (watch.left > 0 or rounds < FEWEST_ROUNDS):
        for name, step in steps.items():
            if not trials[name].failure:
                trials[name] = _once(example, step, trials[name])
        rounds += 1
    return trials


def _once(example: Example, step: Callable[[], Any], trial: Trial) -> Trial:
    """Run a step once more; return what came of it so far."""
    for module in example.modules():
        module.zero_grad(set_to_none=True)
    with recorded_warnings() as warned:
        _wait(example.latents.device)
        start = _clock(example.latents.device)
        failure = ""
        try:
            step()
            _wait(example.latents.device)
        # whatever a user's own model raises
        except Exception as error:
            failure = said(error)
        trial.seconds.append(_clock(example.latents.device) - start)
    return Trial(trial.seconds, failure, list(dict.fromkeys([*trial.warned, *warned])))


@contextlib.contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """Keep warnings from the screen; the list has their texts afterwards, each once.

    Those that Python shows to nobody are left out.
    """
    hidden = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    said_of = [str(each.message) for each in caught if not issubclass(each.category, hidden)]
    texts += dict.fromkeys(said_of)


def _clock(device: torch.device) -> float:
    """Return seconds: of this process where it is one thread of a CPU, else of the wall."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def _wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def said(error: Exception) -> str:
    """Return an error as one line; its type too, unless it is one of flowspace."""
    text = " ".join(str(error).split())
    if type(error).__module__.startswith("flowspace"):
        return text
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}".rstrip(": ")
