"""Rules for arithmetic and for elementwise functions whose derivative is at hand.

Any other elementwise function is differentiated by `pointwise`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowspace.derivatives.rules.dual import Dual, rowwise, shared_rows
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


@rule("add radd")
def add(call: Call, x: Any, y: Any, *, alpha: float = 1) -> At:
    """d(x + alpha y) = dx + alpha dy."""
    shared_rows(call.duals)
    tx, ty = tangent_of(x), tangent_of(y)
    if ty is not None and alpha != 1:
        ty = alpha * ty
    return call.along_with(sum_of(tx, ty))


@rule("sub subtract")
def sub(call: Call, x: Any, y: Any, *, alpha: float = 1) -> At:
    """d(x - alpha y) = dx - alpha dy."""
    shared_rows(call.duals)
    tx, ty = tangent_of(x), tangent_of(y)
    if tx is not None and ty is not None and alpha == 1:
        return call.along_with(tx - ty)
    return call.along_with(sum_of(tx, None if ty is None else -alpha * ty))


@rule("mul multiply rmul")
def mul(call: Call, x: Any, y: Any) -> At:
    """d(x y) = dx y + x dy."""
    rows = shared_rows(call.duals)
    tx, ty = tangent_of(x), tangent_of(y)
    left = None if tx is None else tx * rows(y)
    right = None if ty is None else rows(x) * ty
    return call.along_with(sum_of(left, right))


@rule("div truediv true_divide divide")
def div(call: Call, x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    """d(x / y) = dx / y where y does not move, and by torch.func.jvp where it does."""
    if rounding_mode or isinstance(y, Dual):
        return pointwise(call)
    return call.along_with(x.tangent / shared_rows(call.duals)(y))


@rule("prelu")
def prelu(call: Call, x: Any, weight: Any) -> list[Tensor]:
    """The tangent is that of torch.func.jvp, for the moving rows of (B, C, *) pictures."""
    for dual in call.duals:
        dual.only_batch_first()
    return forward(call, rows_of)


def _kernel(name: str, derivative: Callable[..., Tensor], of_output: bool = False) -> None:
    """Register an elementwise function of one tensor.

    Its derivative is called with the tangent and the input, or the output, and with the further
    arguments of the function.
    """

    @rule(name)
    def kernel(call: Call, x: Dual, *args: Any, **kwargs: Any) -> Tensor:
        """The tangent is f'(x) dx, by the kernel of torch's backward pass where it has one."""
        if x.primal.is_complex():
            return pointwise(call)  # type: ignore[return-value]  # a backward kernel conjugates
        primal = call.out if of_output else x.primal

        def product(t: Tensor, p: Tensor) -> Tensor:
            return derivative(t, p, *args, **kwargs)

        return rowwise(product, x.tangent, primal.detach(), x.layout)

    kernel.__name__ = kernel.__qualname__ = name


_kernel("exp", lambda t, y: t * y, of_output=True)
_kernel("square", lambda t, x: 2 * t * x)
_kernel("sin", lambda t, x: t * x.cos())
_kernel("cos", lambda t, x: -t * x.sin())
_kernel("silu", lambda t, x, *_, **__: torch.ops.aten.silu_backward(t, x))
_kernel(
    "gelu",
    lambda t, x, approximate="none": torch.ops.aten.gelu_backward(t, x, approximate=approximate),
)
_kernel("relu", lambda t, x: torch.ops.aten.threshold_backward(t, x, 0))
_kernel("tanh", lambda t, y: torch.ops.aten.tanh_backward(t, y), of_output=True)
_kernel("sigmoid", lambda t, y: torch.ops.aten.sigmoid_backward(t, y), of_output=True)
