"""Follows a function of the model's own step by step, with no alias between two steps."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flowspace.derivatives import rules
from flowspace.derivatives.own_rules import IN_STEPS, OWN_RULES
from flowspace.derivatives.rules import EVALUATING, RULES, At
from flowspace.derivatives.rules.dual import Dual, LostRowsError
from flowspace.derivatives.torch_internals import set_gradients
from flowspace.errors import DerivativeError

__all__ = ["by_steps"]


def by_steps(call: rules.Call, *args: Any) -> Any:
    """Run a function that `in_steps` marked, once; return its tangents, as a rule does.

    Raises:
        DerivativeError: if it is not made of steps.
        LostRowsError: if a step mixes rows.
    """
    name, runner = call.func.__name__, Runner(call)
    try:
        out = call.run(OWN_RULES[call.func], runner, *args)
    except (AttributeError, TypeError) as error:  # of what is no tensor
        raise DerivativeError(
            f"got {type(error).__name__} from {name}, which in_steps follows step by step: "
            f"{error}; hand what moves to run alone, as in run(torch.add, x, y) for x + y"
        ) from error
    outputs = out
    if type(out) is not tuple:
        outputs = (out,)
    if not all(isinstance(x, Dual | Tensor) for x in outputs):
        raise DerivativeError(
            f"got {type(out).__name__} from {name}, which in_steps follows step by step; return a "
            "tensor or a tuple of tensors"
        )
    primals = tuple(map(_primal, outputs))
    call.out = primals if type(out) is tuple else primals[0]
    if runner.lost:
        raise LostRowsError
    if runner.unfit:
        return NotImplemented
    return [_at(x) for x in outputs if rules.differentiable(_primal(x))]


class Runner:
    """Runs steps for their value, and their rules beside them.

    It is called where the program records gradients, if it does, and calls rules without. After a
    step whose tangent is not found it goes on for the value alone: what runs twice with gradient
    saves twice, which a checkpoint counts.

    Attributes:
        name: of the function.
        grad: whether the program records gradients.
        lost: a step mixes rows.
        unfit: the rule of a step does not take its arguments.
    """

    def __init__(self, call: rules.Call) -> None:
        self.name = call.func.__name__
        self.grad = call.grad
        self.lost = self.unfit = False

    def __call__(self, step: Callable[..., Any], *args: Any) -> Any:
        """Return what a step returns, with duals in place of tensors that carry a tangent."""
        inner = getattr(step, "__wrapped__", None)
        if inner is not None and inner in OWN_RULES:
            step = inner
        if step in IN_STEPS:
            return OWN_RULES[step](self, *args)
        duals: list[Dual] = []
        primals = _primals(args, duals)
        if not duals or self.lost or self.unfit:
            return step(*primals)
        call = rules.Call(step, args, {}, primals, {}, duals, grad=self.grad)
        found = self._ruled(call, getattr(step, "__name__", repr(step)))
        if self.lost or self.unfit:
            return call.evaluate()
        try:
            return _with_tangents(call, found)
        except LostRowsError:
            self.lost = True
            return call.out

    def _ruled(self, call: rules.Call, name: str) -> Any:
        """Return what the rule of a step returns, once the step has been run.

        Raises:
            DerivativeError: if the step has no rule.
        """
        rule = OWN_RULES.get(call.func) or RULES.get(name)
        if rule is None:
            raise DerivativeError(
                f"got {name} as a step of {self.name}, for which there is no rule; call it "
                "outside of the function, or leave out in_steps"
            )
        if name not in EVALUATING:
            call.evaluate()
        set_gradients(False)
        try:
            found = rule(call, *call.args)
        except LostRowsError:
            self.lost, found = True, None
        except TypeError:  # arguments in an order that the rule does not know
            self.unfit, found = True, None
        finally:
            set_gradients(self.grad)
        if found is NotImplemented:
            self.unfit = True
        return found


def _with_tangents(call: rules.Call, found: Any) -> Any:
    """Return what a step returned, with the tangents that its rule returned: one, or a list of
    those of outputs that can move.
    """
    out = call.out
    if type(found) is not list:
        return _dual(call, out, found)
    tangents = iter(found)
    if not isinstance(out, tuple):
        return _dual(call, out, next(tangents, None))
    parts = list(out)
    for i, part in enumerate(out):
        if rules.differentiable(part):
            parts[i] = _dual(call, part, next(tangents, None))
    return tuple(parts)


def _dual(call: rules.Call, out: Any, tangent: Any) -> Any:
    """Return one output of a step with its tangent, if it has one."""
    if tangent is None or not rules.differentiable(out):
        return out
    if type(tangent) is not At:
        tangent = call.at(out, tangent)
    numbers, dtype = tangent.tangent, out.dtype
    if numbers.dtype is not dtype:
        numbers = numbers.to(dtype)
    return Dual(out, numbers, tangent.layout)


def _primals(values: Sequence[Any], duals: list[Dual]) -> list[Any]:
    """Return values with the primals of duals, which are added to those that were found before."""
    found = []
    for value in values:
        if type(value) is Dual:
            duals.append(value)
            found.append(value.primal)
        elif type(value) in (list, tuple):
            found.append(type(value)(_primals(value, duals)))
        else:
            found.append(value)
    return found


def _primal(value: Any) -> Any:
    """Return the primal of a dual, and any other value as it is."""
    if type(value) is Dual:
        return value.primal
    return value


def _at(value: Any) -> At | None:
    """Return the tangent of a dual, and None for what does not move."""
    if type(value) is Dual:
        return At(value.tangent, value.layout)
    return None
