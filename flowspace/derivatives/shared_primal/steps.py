"""Follows a function of the model's own step by step, with no alias between two steps."""

from collections.abc import Callable, Sequence
from typing import Any

from flowspace.derivatives import rules
from flowspace.derivatives.own_rules import IN_STEPS, OWN_RULES
from flowspace.derivatives.rules import EVALUATING, RULES, At
from flowspace.derivatives.rules.dual import Dual
from flowspace.derivatives.torch_internals import set_gradients
from flowspace.errors import DerivativeError

__all__ = ["by_steps"]


class UnruledError(Exception):
    """The rule of a step does not take its arguments."""


def by_steps(call: rules.Call, *args: Any) -> Any:
    """Run a function that `in_steps` marked; return its tangents, as a rule does."""
    try:
        out = call.run(IN_STEPS[call.func], Runner(call.func.__name__, call.grad), *args)
    except UnruledError:
        call.run(call.evaluate)
        return NotImplemented
    except (AttributeError, TypeError) as error:  # of what is no tensor
        name = call.func.__name__
        raise DerivativeError(
            f"got {type(error).__name__} from {name}, which in_steps follows step by step: "
            f"{error}; write run(function, x) for each function of what a step returned"
        ) from error
    if not isinstance(out, tuple):
        call.out = _primal(out)
        return _at(out)
    call.out = tuple(map(_primal, out))
    return [_at(x) for x in out if isinstance(x, Dual) or rules.differentiable(x)]


class Runner:
    """Runs steps for their value, and their rules beside them.

    It is called where the program records gradients, if it does, and calls rules without.

    Attributes:
        name: of the function.
        grad: whether the program records gradients.
    """

    def __init__(self, name: str, grad: bool) -> None:
        self.name = name
        self.grad = grad

    def __call__(self, step: Callable[..., Any], *args: Any) -> Any:
        """Return what a step returns, with duals in place of tensors that carry a tangent.

        Raises:
            DerivativeError: if the step has no rule.
        """
        step = getattr(step, "__wrapped__", step)
        if step in IN_STEPS:
            return IN_STEPS[step](self, *args)
        duals: list[Dual] = []
        primals = _primals(args, duals)
        if not duals:
            return step(*primals)
        call = rules.Call(step, args, {}, primals, {}, duals, grad=self.grad)
        found = self._ruled(call, step.__name__)
        if found is NotImplemented:
            raise UnruledError
        out = call.out
        if type(found) is not list:
            return _dual(call, out, found)
        tangents = iter(found)
        if isinstance(out, tuple):
            return tuple(_dual(call, x, next(tangents, None)) for x in out)
        return _dual(call, out, next(tangents, None))

    def _ruled(self, call: rules.Call, name: str) -> Any:
        """Return what the rule of a step returns, once the step has been run."""
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
            return rule(call, *call.args)
        finally:
            set_gradients(self.grad)


def _dual(call: rules.Call, out: Any, tangent: Any) -> Any:
    """Return one output of a step with its tangent, if it has one."""
    if tangent is None:
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
