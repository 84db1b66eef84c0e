"""How wrong each route's derivative of a model is, and what in the model makes it so.

The measure is the largest error over the largest entry, against two references that know nothing
of each other, both in float64 where the model lets itself be computed in it: torch's forward mode,
and central differences (f(x + h v) - f(x - h v)) / 2h. Where these two disagree something in the
model hides from torch, or is not smooth.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flowspace.backends import torch_backend
from flowspace.derivatives import Derivative, ForwardMode
from flowspace.derivatives.replay import RandomState, agree, restoring_buffers
from flowspace.doctor.steps import ROUTES, recorded_warnings, said
from flowspace.doctor.target import Example
from flowspace.schedules import LinearSchedule

__all__ = ["Accuracy", "Findings", "examine_accuracy"]

MOST_ROWS = 4
"""Of so many rows the errors are measured."""

DIFFERENCES = (1e-5, 1e-3)
"""The steps h of central differences: for smooth models, and for those that round somewhere."""

AGREEMENT = 1e-2
"""How far the two references may be apart."""

SMALL = 0.02
"""The spread of the numbers that stand for parameters which are all zero."""


class Findings(NamedTuple):
    """What was found out about a model beside its derivative.

    Attributes:
        rows_mix: whether a row's output depends on the other rows; None if it cannot be told.
        draws: it draws random numbers.
        uses_t: its output depends on t.
        uses_s: its output depends on s.
        zeros: how many of its parameters were all zero.
    """

    rows_mix: bool | None
    draws: bool
    uses_t: bool
    uses_s: bool
    zeros: int


@dataclass(frozen=True)
class Accuracy:
    """The errors of the routes.

    Attributes:
        reference: what they were measured against, in words.
        apart: how far forward mode and central differences were apart; None if only one ran.
        errors: by the name of the route.
        failures: what a route raised.
        findings: about the model.
        remarks: what else is to be known.
        warned: what was warned of on the way.
    """

    reference: str
    apart: float | None
    errors: dict[str, float]
    failures: dict[str, str]
    findings: Findings
    remarks: list[str]
    warned: list[str]


class Point(NamedTuple):
    """Where a derivative is taken: the state, its velocity, and the times of each row."""

    z_t: Tensor
    velocity: Tensor
    t: Tensor
    s: Tensor
    cond: dict[str, Any]

    def cast(self, dtype: torch.dtype) -> "Point":
        """Return it in other real numbers."""

        def one(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                return leaf.to(dtype)
            return leaf

        return pytree.tree_map(one, self)

    def rows(self, number: int) -> "Point":
        """Return the first rows of it, and of what belongs to them in cond."""
        of_all = len(self.z_t)

        def some(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == of_all:
                return leaf[:number]
            return leaf

        return pytree.tree_map(some, self)


def examine_accuracy(example: Example) -> Accuracy:
    """Return the errors of all routes on one batch of a model."""
    remarks: list[str] = []
    with recorded_warnings() as warned, _prepared(example) as (zeros, in_eval_mode):
        point = _point(example)
        few = point.rows(min(len(point.z_t), MOST_ROWS))
        if _value(example, few) is not None:
            point = few
        findings = _findings(example, point)._replace(zeros=zeros, draws=in_eval_mode)
        if in_eval_mode:
            remarks.append("the model draws random numbers: errors are those of its eval mode")
        if zeros:
            remarks.append(
                f"{zeros} parameters are all zero: for the errors they were small random numbers"
            )
        exact, differences, precision = _references(example, point)
        errors, failures = {}, {}
        reference = f"forward mode in {precision}"
        apart = None
        if exact is None:
            exact, reference = differences, f"central differences in {precision}"
        elif differences is not None:
            apart = _distance(differences, exact)
            reference = f"forward mode in {precision}, which differs from central differences by"
            reference += f" {apart:.0e}"
        for name, route in ROUTES.items():
            try:
                derivative = _derivative(route, example, point)
            # whatever a route, or a user's own model, raises
            except Exception as error:
                failures[name] = said(error)
                continue
            if exact is not None:
                errors[name] = _distance(derivative, exact)
    return Accuracy(reference, apart, errors, failures, findings, remarks, warned)


def _point(example: Example) -> Point:
    """Return a point of the linear path for each row, with s half of t."""
    latents = example.latents
    t = torch.linspace(0.9, 0.3, len(latents), device=latents.device)
    t = t.to(torch_backend.time_dtype(latents))
    z_t, velocity = LinearSchedule().perturb(latents, torch.randn_like(latents), t)
    return Point(z_t.to(latents.dtype), velocity.to(latents.dtype), t, 0.5 * t, example.cond)


def _references(example: Example, point: Point) -> tuple[Tensor | None, Tensor | None, str]:
    """Return the derivative by forward mode and by differences, and in which precision."""
    exact, differences = None, None
    with _in_double(example):
        double = point.cast(torch.float64)
        if _value(example, double) is not None:
            with contextlib.suppress(Exception):
                exact = _derivative(ForwardMode(), example, double)
            differences = _nearest_differences(example, double, exact)
    if exact is not None or differences is not None:
        return exact, differences, "float64"
    with contextlib.suppress(Exception):
        exact = _derivative(ForwardMode(), example, point)
    return exact, _central(example, point, 1e-2), "the model's own precision"


def _nearest_differences(example: Example, point: Point, exact: Tensor | None) -> Tensor | None:
    """Return central differences by the step that is nearest to forward mode, if that ran."""
    found = [_central(example, point, h) for h in DIFFERENCES]
    if exact is None or any(each is None for each in found):
        return found[0]
    return min(found, key=lambda each: _distance(each, exact))


def _central(example: Example, point: Point, h: float) -> Tensor | None:
    """Return (f(x + h v) - f(x - h v)) / 2h, or None where f cannot be evaluated."""
    values = []
    for offset in (h, -h):
        moved = point._replace(z_t=point.z_t + offset * point.velocity, t=point.t + offset)
        values.append(_value(example, moved))
    if any(value is None for value in values):
        return None
    return (values[0] - values[1]) / (2 * h)


def _derivative(route: Derivative, example: Example, point: Point) -> Tensor:
    """Return the derivative along (v, 1) by a route, at every row."""

    def fn(z_t: Tensor, t: Tensor) -> Tensor:
        return example.model(z_t, t, point.s, **point.cond)

    torch.manual_seed(0)
    with restoring_buffers(example.model):
        tangents = (point.velocity, torch.ones_like(point.t))
        return route(fn, (point.z_t, point.t), tangents)[1].detach()


def _value(example: Example, point: Point) -> Tensor | None:
    """Return what the model returns at a point, without a trace, or None where it raises."""
    torch.manual_seed(0)
    try:
        with torch.no_grad(), restoring_buffers(example.model):
            return example.model(point.z_t, point.t, point.s, **point.cond)
    # whatever a user's own model raises: then this is not possible with it
    except Exception:
        return None


def _findings(example: Example, point: Point) -> Findings:
    """Return what plain evaluations tell about a model."""
    value = _value(example, point)
    later = _value(example, point._replace(t=point.t + 0.05))
    nearer = _value(example, point._replace(s=0.5 * point.s))
    uses_t = _differ(value, later)
    uses_s = _differ(value, nearer)
    return Findings(_rows_mix(example, point, value), False, uses_t, uses_s, 0)


def _differ(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return True
    return not torch.equal(first, second)


def _rows_mix(example: Example, point: Point, value: Tensor | None) -> bool | None:
    """Return whether half of the rows alone give another output than among all rows."""
    half = len(point.z_t) // 2
    if value is None or not half:
        return None
    alone = _value(example, point.rows(half))
    if alone is None:
        return True
    return not agree(value[:half], alone, value.dtype.itemsize)


def _distance(found: Tensor | None, exact: Tensor | None) -> float:
    """Return the largest error over the largest entry."""
    if found is None or exact is None:
        return float("nan")
    largest = exact.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found.double() - exact.double()).abs().max() / largest)


# --- the model, changed for the time of an examination


@contextlib.contextmanager
def _prepared(example: Example) -> Iterator[tuple[int, bool]]:
    """Fill parameters of zeros, and switch to eval mode what draws; undone afterwards.

    Yields how many parameters were filled, and whether the model draws.
    """
    modules = example.modules()
    parameters = [p for module in modules for p in module.parameters()]
    zeros = [p for p in parameters if p.ndim > 1 and not p.detach().any()]
    trained = [module for top in modules for module in top.modules() if module.training]
    draws = False
    try:
        for parameter in zeros:
            nn.init.normal_(parameter, std=SMALL)
        if trained and _draws(example):
            draws = True
            for top in modules:
                top.eval()
        yield len(zeros), draws
    finally:
        for parameter in zeros:
            nn.init.zeros_(parameter)
        for module in trained:
            module.training = True


def _draws(example: Example) -> bool:
    """Return whether a forward pass draws random numbers."""
    point = _point(example)
    state = RandomState(example.latents.device, of_python=True)
    with contextlib.suppress(Exception), torch.no_grad(), restoring_buffers(example.model):
        example.model(point.z_t, point.t, point.s, **point.cond)
    return state.changed()


@contextlib.contextmanager
def _in_double(example: Example) -> Iterator[None]:
    """Compute in float64; afterwards parameters and buffers are bit for bit as they were."""
    tensors = [tensor for module in example.modules() for tensor in _floating(module)]
    before = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def _floating(module: nn.Module) -> Iterator[Tensor]:
    """Iterate over the parameters and buffers that are real numbers."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            yield tensor
