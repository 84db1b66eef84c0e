"""What a model of one's own needs: the error and the cost of each route, and which to write."""

import dataclasses
import itertools
import math
import statistics
from dataclasses import dataclass
from typing import Any

from flowspace.doctor.accuracy import AGREEMENT, Accuracy, examine_accuracy
from flowspace.doctor.compiled import start_compiled
from flowspace.doctor.steps import (
    PLAIN,
    ROUTES,
    StepCost,
    Stopwatch,
    one_thread,
    run_in_turn,
    steps_of,
)
from flowspace.doctor.target import Example, load

__all__ = ["Examination", "RouteFigures", "examine_model"]

RIGHT = 2e-2
"""The largest error of a route that is advised: that of differences, and of half precision."""

WORTH = 0.7
"""A route comes before a preferred one where its step takes less than this part of that one's."""

PREFERRED = (
    "SharedPrimal()",
    "ForwardMode()",
    "FiniteDifference(order=2)",
    "FiniteDifference(order=1)",
)
"""The routes, exact ones first, and the default before all."""

EAGER_SHARE = 0.5
"""What part of the time that is left the uncompiled steps may take."""


@dataclass(frozen=True)
class RouteFigures:
    """What was found of one route.

    Attributes:
        name: what one writes to have it.
        error: of its derivative; None where there is none.
        eager: its step over the plain step.
        compiled: the same, both compiled.
        failure: what it raised, or empty.
    """

    name: str
    error: float | None
    eager: StepCost | None
    compiled: StepCost | None
    failure: str

    @property
    def right(self) -> bool:
        """Whether it may be advised."""
        return not self.failure and self.error is not None and self.error <= RIGHT

    @property
    def cost(self) -> float:
        """Its step over the plain step, uncompiled; infinite where it was not measured."""
        if self.eager is None:
            return math.inf
        return self.eager.median

    def clearly_below(self, share: float, other: "RouteFigures") -> bool:
        """Return whether its cost is below a share of another's, quartiles included."""
        if self.eager is None or other.eager is None:
            return False
        return self.eager.high < share * other.eager.low


@dataclass(frozen=True)
class Examination:
    """What was found of a model.

    Attributes:
        example: the model and its batch.
        accuracy: the errors and what the model is like.
        routes: the figures of each route.
        compiled: why not every route was measured compiled, or empty.
        milliseconds: of a plain step, not compiled.
        over_eager: the compiled plain step over the uncompiled one; None if not measured.
        warned: what flowspace warned of on the way.
    """

    example: Example
    accuracy: Accuracy
    routes: list[RouteFigures]
    compiled: str
    milliseconds: float | None
    over_eager: float | None
    warned: list[str]

    @property
    def advised(self) -> RouteFigures | None:
        """The route to write: the first that is right, unless another is clearly much cheaper."""
        right = [route for name in PREFERRED for route in self.routes if route.name == name]
        right = [route for route in right if route.right]
        if not right:
            return None
        chosen = right[0]
        cheaper = [route for route in right if route.clearly_below(WORTH, chosen)]
        return min([chosen, *cheaper], key=lambda route: route.cost)

    @property
    def hidden(self) -> bool:
        """Whether exact routes and differences disagree: something is hidden, or not smooth."""
        if self.accuracy.apart is not None and self.accuracy.apart > AGREEMENT:
            return True
        exact = [route for route in self.routes if not route.name.startswith("Finite")]
        return any(not route.failure and not route.right for route in exact)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        example, accuracy = self.example, self.accuracy
        advised = self.advised
        return {
            "target": example.name,
            "latents": list(example.latents.shape),
            "images": list(example.images.shape),
            "cond": list(example.cond),
            "reference": accuracy.reference,
            "apart": accuracy.apart,
            "remarks": accuracy.remarks,
            "findings": accuracy.findings._asdict(),
            "routes": [_route_as_dict(route) for route in self.routes],
            "plain_step_milliseconds": self.milliseconds,
            "compiled": self.compiled,
            "compiled_over_eager": self.over_eager,
            "warnings": self.warned,
            "write": advised and advised.name,
        }


def _route_as_dict(route: RouteFigures) -> dict[str, Any]:
    """Return a route for JSON; a cost is a dict of its quartiles."""
    found = dataclasses.asdict(route)
    for name in ("eager", "compiled"):
        cost = getattr(route, name)
        if cost is not None:
            found[name] = cost._asdict()
    return found


def examine_model(
    name: str, latents: tuple[int, ...] | None, seconds: float, compiling: bool = True
) -> Examination:
    """Return what a model needs.

    Args:
        name: as `flowspace.doctor.target.load` takes it.
        latents: the shape of a batch, where none is given by the model's function.
        seconds: about how long it may take; each step runs a few times in any case.
        compiling: whether the model is compiled, in a process of its own.

    Raises:
        InputError: if there is no such model, or a plain forward pass of it fails.
    """
    watch = Stopwatch(seconds)
    example = load(name, latents)
    process = None
    if compiling:
        process = start_compiled(name, latents)
    try:
        with one_thread(example.latents.device):
            accuracy = examine_accuracy(example)
            trials = run_in_turn(example, steps_of(example), EAGER_SHARE * watch.left)
        compiled: dict[str, Any] = {"reason": "not asked for"}
        if process is not None:
            compiled = process.measure(watch)
    finally:
        if process is not None:
            process.end()
    plain = trials.pop(PLAIN)
    milliseconds = None
    if not plain.failure:
        milliseconds = 1000 * statistics.median(plain.seconds)
    told = [accuracy.warned, *[trial.warned for trial in trials.values()]]
    told.append(compiled.get("warned", []))
    warned = list(dict.fromkeys(itertools.chain.from_iterable(told)))
    routes = []
    for route in ROUTES:
        trial = trials[route]
        eager = None
        if trial.seconds and not trial.failure and not plain.failure:
            eager = StepCost.of(trial.seconds, plain.seconds)
        error, failure = accuracy.errors.get(route), accuracy.failures.get(route)
        together = None
        if route in compiled.get("costs", {}):
            together = StepCost(*compiled["costs"][route])
        figures = RouteFigures(route, error, eager, together, failure or trial.failure)
        routes.append(figures)
    return Examination(
        example,
        accuracy,
        routes,
        _reason(compiled),
        milliseconds,
        compiled.get("over_eager"),
        warned,
    )


def _reason(compiled: dict[str, Any]) -> str:
    """Return why steps were not measured compiled: each that failed, and the time."""
    failures = compiled.get("failures", {})
    reasons = [f"{step}: {text}" for step, text in failures.items()]
    if compiled.get("reason"):
        reasons.append(compiled["reason"])
    return "; ".join(reasons)
