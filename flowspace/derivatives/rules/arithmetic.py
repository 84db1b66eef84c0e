"""Rules for arithmetic and for elementwise functions whose derivative is at hand.

Any other elementwise function is differentiated by `pointwise`, which is torch.func.jvp of it on
the rows that have a tangent: right for each, and slower than a rule. Arguments broadcast: a
tangent is expanded to the shape of the output, and a constant with a batch axis is restricted to
the rows that have a tangent.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowspace.derivatives.rules.dual import Dual, check_same_rows, rowwise, shared_rows
from flowspace.derivatives.rules.registry import (
    At,
    Call,
    forward,
    pointwise,
    rows_of,
    rule,
    sum_of,
    tangent_of,
)

aten = torch.ops.aten


@rule("add radd")
def add(call: Call, x: Any, y: Any, *, alpha: Any = 1) -> Any:
    """d(x + alpha y) = dx + alpha dy."""
    if isinstance(alpha, Dual):
        return forward(call)
    if not isinstance(y, Dual):
        return call.along_with(x.tangent)
    if isinstance(x, Dual):
        check_same_rows(call.duals)
        return call.along_with(torch.add(x.tangent, y.tangent, alpha=alpha))
    tangent = y.tangent
    if alpha != 1:
        tangent = alpha * tangent
    return call.along_with(tangent)


@rule("sub subtract")
def sub(call: Call, x: Any, y: Any, *, alpha: Any = 1) -> Any:
    """d(x - alpha y) = dx - alpha dy."""
    if isinstance(alpha, Dual):
        return forward(call)
    check_same_rows(call.duals)
    dx, dy = tangent_of(x), tangent_of(y)
    if dy is None:
        return call.along_with(dx)  # type: ignore[arg-type]
    if dx is not None and alpha == 1:
        return call.along_with(dx - dy)
    return call.along_with(sum_of(dx, -alpha * dy))


@rule("mul multiply rmul")
def mul(call: Call, x: Any, y: Any) -> At:
    """d(x y) = dx y + x dy."""
    restricted = shared_rows(call.duals)
    if len(call.duals) == 2:
        tangent = restricted(x) * y.tangent
        return call.along_with(torch.addcmul(tangent, x.tangent, restricted(y)))
    if isinstance(x, Dual):
        return call.along_with(x.tangent * restricted(y))
    return call.along_with(restricted(x) * y.tangent)


@rule("addcmul")
def addcmul(call: Call, start: Any, x: Any, y: Any, *, value: Any = 1) -> Any:
    """d(start + value x y) = dstart + value (dx y + x dy)."""
    if isinstance(value, Dual):
        return forward(call)
    restricted = shared_rows(call.duals)
    tangent = tangent_of(start)
    for factor, other in ((x, y), (y, x)):
        if not isinstance(factor, Dual):
            continue
        if tangent is None:
            tangent = value * factor.tangent * restricted(other)
        else:
            tangent = torch.addcmul(tangent, factor.tangent, restricted(other), value=value)
    return call.along_with(tangent)  # type: ignore[arg-type]  # one of the three moves


@rule("div truediv true_divide divide")
def div(call: Call, x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    """d(x / y) = dx / y where y does not move, and by torch.func.jvp where it does."""
    if rounding_mode or isinstance(y, Dual):
        return pointwise(call)
    restricted = shared_rows(call.duals)
    return call.along_with(x.tangent / restricted(y))


@rule("prelu")
def prelu(call: Call, x: Any, weight: Any) -> list[Tensor]:
    """The tangent is that of torch.func.jvp, for the moving rows of (B, C, *) pictures."""
    for dual in call.duals:
        dual.only_batch_first()
    return forward(call, rows_of)


def _kernel(name: str, derivative: Callable[..., Tensor], of_output: bool = False) -> None:
    """Register an elementwise function of one tensor.

    Args:
        name: of the function.
        derivative: called with the tangent, the input and the further arguments of the function,
            and with ``out``, which may be the memory of the input.
        of_output: it is called with the output in place of the input.
    """

    @rule(name)
    def kernel(call: Call, x: Dual, *args: Any, **kwargs: Any) -> At | list[Tensor]:
        """The tangent is f'(x) dx, by the kernel of torch's backward pass where it has one."""
        primal = x.primal
        if primal.is_complex():
            return pointwise(call)  # a backward kernel conjugates
        if of_output:
            primal = call.out

        def product(tangent: Tensor, primal: Tensor, out: Tensor | None = None) -> Tensor:
            return derivative(tangent, primal, out, *args, **kwargs)

        tangent = rowwise(product, x.tangent, primal.detach(), x.layout, call.traced)
        return At(tangent, x.layout)

    kernel.__name__ = kernel.__qualname__ = name


def _backward(name: str, *more: Any) -> Callable[..., Tensor]:
    """Return f'(x) dx by a kernel of torch's backward pass.

    Args:
        name: of the kernel.
        more: its arguments after the tangent and the input.
    """
    packet = getattr(aten, name)

    def derivative(dx: Tensor, x: Tensor, out: Tensor | None, *_: Any, **named: Any) -> Tensor:
        named.pop("inplace", None)
        if out is None:
            return packet.default(dx, x, *more, **named)
        return packet.grad_input(dx, x, *more, grad_input=out, **named)

    return derivative


# f'(x) dx, where y is f(x): (1 - y^2) dx for tanh, y (1 - y) dx for sigmoid.
_kernel("exp", lambda dx, y, out: torch.mul(dx, y, out=out), of_output=True)
_kernel("square", lambda dx, x, out: torch.mul(dx, x, out=out).mul_(2))
_kernel("sin", lambda dx, x, out: torch.mul(dx, x.cos(), out=out))
_kernel("cos", lambda dx, x, out: torch.mul(dx, x.sin(), out=out).neg_())
_kernel("silu", _backward("silu_backward"))
_kernel("gelu", _backward("gelu_backward"))
_kernel("relu", _backward("threshold_backward", 0))
_kernel("tanh", _backward("tanh_backward"), of_output=True)
_kernel("sigmoid", _backward("sigmoid_backward"), of_output=True)


@rule(
    "mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss kl_div poisson_nll_loss "
    "binary_cross_entropy binary_cross_entropy_with_logits"
)
def mse_loss(call: Call, *args: Any, **kwargs: Any) -> list[Tensor]:
    """The tangent is that of an elementwise function, unless its numbers are summed up."""
    if not call.out.ndim:
        return forward(call)
    return pointwise(call)
