"""Rules for softmax and for functions that give numbers a mean of zero or a size of one.

A norm is y = w u + b with u = (x - mean(x)) / std(x), and its tangent is

    dy = w (dx - mean(dx) - u mean(u dx)) / std(x)

where means are over the axes that are normalised. The matrix that dx is multiplied by, but for w,
is symmetric. So it is the one that the backward pass multiplies a gradient by, and torch's kernel
of the backward pass, called with dx in place of the gradient and without a weight, returns dy / w.
The same holds for softmax, whose matrix is diag(y) - y y'.

Mean and scale of the rows that have a tangent are taken from the forward pass where its kernel
returns them, and are formed again elsewhere.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowspace.derivatives.rules.dual import Dual, LostRowsError, restrict, writable
from flowspace.derivatives.rules.registry import At, Call, forward, rule
from flowspace.derivatives.torch_internals import (
    rms_norm_and_scale,
    softmax_backward,
    unseen_by_modes,
)

EVALUATING = frozenset({"layer_norm", "rms_norm"})
"""Functions whose rule runs the function itself, if it was not run before."""

INPUT_ONLY = [True, False, False]
"""Asks a backward kernel for the gradient of the input, and not of weight and bias."""

# The signatures below are those of torch's functions, argument by argument.


@rule("softmax _softmax")
def softmax(call: Call, x: Dual, dim: int, dtype: Any = None, *_: Any, **__: Any) -> Tensor:
    """The tangent is y (dx - sum(y dx)), where y is the output."""
    x.untouched(dim)
    y = restrict(call.out.detach(), x.layout)
    dx = x.tangent.to(y.dtype)
    return softmax_backward(dx, y, dim, y.dtype)


@rule("log_softmax")
def log_softmax(call: Call, x: Dual, dim: int, dtype: Any = None, *_: Any, **__: Any) -> Tensor:
    """The tangent is dx - sum(exp(y) dx), where y is the output.

    torch's backward kernel returns the transpose of that, g - exp(y) sum(g): no use here.
    """
    x.untouched(dim)
    p = restrict(call.out.detach(), x.layout).exp()
    dx = x.tangent.to(p.dtype)
    return dx - (p * dx).sum(dim, keepdim=True)


@rule("layer_norm")
def layer_norm(  # noqa: PLR0913  # torch's arguments
    call: Call,
    x: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    """The tangent is weight (dx - mean(dx) - u mean(u dx)) / std(x), where u = (x - mean) / std.

    If the function was not evaluated before, this rule does so, by the kernel that returns mean
    and scale beside the output.
    """
    if len(call.duals) > 1 or not isinstance(x, Dual):
        call.run(call.evaluate)
        return forward(call)
    x.untouched(*range(-len(normalized_shape), 0))
    x.tangent = x.tangent.contiguous()  # kept, for what is added to it has this layout too
    tangent, rows = x.tangent, x.rows
    if call.evaluated or torch.is_autocast_enabled(rows.device.type):
        # the output's dtype is known only once the function has been run as autocast runs it
        call.run(call.evaluate)
        dtype = call.out.dtype
        rows, tangent = rows.to(dtype), tangent.to(dtype)
        mean, scale = torch.native_layer_norm(rows, normalized_shape, None, None, eps)[1:]
    else:
        given = x.primal, normalized_shape, weight, bias, eps
        call.out, mean, scale = call.run(torch.native_layer_norm, *given)
        mean = restrict(mean, x.layout)
        scale = restrict(scale, x.layout)
    derivative = torch.ops.aten.native_layer_norm_backward.default(
        tangent, rows, normalized_shape, mean, scale, None, None, INPUT_ONLY
    )[0]
    if weight is not None:
        derivative.mul_(weight)
    return At(derivative, x.layout)


@rule("rms_norm")
def rms_norm(
    call: Call,
    x: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    eps: float | None = None,
) -> Any:
    """The tangent is weight (dx - u mean(u dx)) / rms(x), where u = x / rms(x).

    If the function was not evaluated before, this rule does so, by the kernel that returns 1/rms
    beside the output where it takes these.
    """
    if len(call.duals) > 1 or not isinstance(x, Dual):
        call.run(call.evaluate)
        return forward(call)
    dims = list(range(-len(normalized_shape), 0))
    x.untouched(*dims)
    scale = None
    if call.evaluated or call.traced or not _by_kernel(x.primal, normalized_shape, weight):
        call.run(call.evaluate)
    else:
        given = x.primal, normalized_shape, weight, eps
        call.out, scale = call.run(rms_norm_and_scale, *given)
        scale = restrict(scale, x.layout)
    rows, tangent = x.rows, x.tangent
    if scale is not None and rows.is_cuda:
        derivative, _ = torch.ops.aten._fused_rms_norm_backward.default(
            tangent.to(rows.dtype), rows, normalized_shape, scale, None, INPUT_ONLY[:2]
        )
    else:
        own = x.layout is not None and not call.traced and writable(rows, tangent)
        derivative = _of_unit(rows, tangent, dims, scale, eps, own)
    if weight is not None:
        derivative.mul_(weight)
    return At(derivative, x.layout)


def _of_unit(  # noqa: PLR0913  # what a norm needs
    x: Tensor, dx: Tensor, dims: list[int], scale: Tensor | None, eps: float | None, own: bool
) -> Tensor:
    """Return the tangent of x / rms(x), in at least float32, as torch forms it.

    Args:
        x: the rows that have a tangent.
        dx: their tangent.
        dims: the axes that are normalised, the last ones.
        scale: 1/rms(x), or None.
        eps: of the norm.
        own: x is a copy that nobody else has, so its memory may be used again: to a CPU memory
            that is new costs more than the arithmetic does.
    """
    if x.dtype is not torch.float32:
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, dx = x.to(dtype), dx.to(dtype)
    count = math.prod(x.shape[dims[0] :])
    if scale is None:
        if eps is None:
            eps = torch.finfo(x.dtype).eps
        scale = _scale(x, dims, count, eps)
    memory = None
    if own:
        memory = x
    u = torch.mul(x, scale, out=memory)
    product = u * dx
    share = product.sum(dims, keepdim=True)  # a mean costs a CPU twice as much
    if own:
        memory = product
    return torch.addcmul(dx, u, share, value=-1 / count, out=memory).mul_(scale)


def _scale(x: Tensor, dims: list[int], count: int, eps: float) -> Tensor:
    """Return 1/rms(x) along these axes, which hold so many numbers."""
    size = x.square().sum(dims, keepdim=True).div_(count)
    return size.add_(eps).rsqrt_()


def _by_kernel(x: Tensor, shape: Sequence[int], weight: Tensor | None) -> bool:
    """Return whether torch's `rms_norm` of these is the kernel that returns 1/rms(x) too.

    What autocast does, other dtypes and devices, pictures with channels last, and shapes that do
    not fit, which the kernel does not check, are left to torch.
    """
    device = "cpu"
    if x.is_cuda:
        device = "cuda"
    elif not x.is_cpu:
        return False
    if torch.is_autocast_enabled(device) and not (x.is_cuda and _autocast_leaves_it()):
        return False
    shape = tuple(shape)
    if x.shape[-len(shape) :] != shape:
        return False
    if x.is_complex() or (x.ndim > 3 and x.stride(1) == 1):
        return False
    return weight is None or (weight.dtype == x.dtype and weight.shape == shape)


@functools.cache
def _autocast_leaves_it() -> bool:
    """Return whether autocast on a CUDA device leaves `rms_norm` the dtype of its input.

    So it does in torch 2.11, where it casts the layer norm.
    """
    with unseen_by_modes(), torch.autocast("cuda", torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.ones(1, dtype=dtype, device="cuda")
            if torch.rms_norm(x, (1,)).dtype != dtype:
                return False
    return True


@rule("group_norm")
def group_norm(  # noqa: PLR0913  # torch's arguments
    call: Call,
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    """The tangent is that of layer_norm, over each group of channels.

    The weight is one number a channel, so it multiplies after the kernel, spread over the others.
    """
    if len(call.duals) > 1 or not isinstance(x, Dual):
        return forward(call)
    return _grouped(x, num_groups, weight, eps)


@rule("instance_norm")
def instance_norm(  # noqa: PLR0913  # torch's arguments
    call: Call,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    use_input_stats: bool,
    momentum: Any,
    eps: float,
    *_: Any,
) -> Any:
    """The tangent is that of layer_norm over each channel, or dx weight / std for a stored std."""
    if len(call.duals) > 1 or not isinstance(x, Dual):
        return _forward_with_copies(call, mean, var)
    if use_input_stats:
        return _grouped(x, x.primal.shape[1], weight, eps)
    x.only_batch_first()
    return _by_stored(x, weight, var, eps)


@rule("batch_norm")
def batch_norm(  # noqa: PLR0913  # torch's arguments
    call: Call,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: Any,
    eps: float,
    *_: Any,
) -> Any:
    """The tangent is dx weight / std for a stored std.

    In training, mean and std are of the batch: its rows mix, and each needs a tangent.
    """
    if len(call.duals) > 1 or not isinstance(x, Dual):
        return _forward_with_copies(call, mean, var)
    x.only_batch_first()
    if not training:
        return _by_stored(x, weight, var, eps)
    if x.layout is not None:
        raise LostRowsError
    rows, tangent = x.rows, x.tangent
    mean, scale = torch.native_batch_norm(rows, None, None, None, None, True, 0.0, eps)[1:]
    derivative = torch.ops.aten.native_batch_norm_backward(
        tangent, rows, None, None, None, mean, scale, True, eps, INPUT_ONLY
    )[0]
    return _scaled(derivative, _per_channel(weight, x.ndim))


def _forward_with_copies(call: Call, mean: Any, var: Any) -> list[Tensor]:
    """Differentiate a norm by torch.func.jvp, which writes into copies of the running statistics:
    the function itself has written into them already.
    """
    args = list(call.args)
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and (value is mean or value is var):
            args[i] = value.detach().clone()
    call.args = args
    return forward(call)


def _scaled(tangent: Tensor, weight: Tensor | None) -> Tensor:
    """Return a tangent times a weight, if there is one."""
    if weight is None:
        return tangent
    return tangent * weight


def _per_channel(weight: Tensor | None, ndim: int) -> Tensor | None:
    """Return one number a channel in the shape (1, C, 1, ...) of so many axes."""
    if weight is None:
        return None
    return weight.reshape(1, -1, *[1] * (ndim - 2))


def _by_stored(x: Dual, weight: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """Return the tangent of a norm that divides each channel by a stored standard deviation.

    Mean and standard deviation are numbers that do not move, so the norm is linear.
    """
    scale = _scaled(torch.rsqrt(var + eps), weight)
    return _scaled(x.tangent, _per_channel(scale, x.ndim))


def _grouped(x: Dual, groups: int, weight: Tensor | None, eps: float) -> Tensor:
    """Return the tangent of a norm over groups of channels.

    Its kernels want contiguous memory, and mean and scale of the rows, formed again here.
    """
    x.only_batch_first()
    rows = x.rows.contiguous()
    tangent = x.tangent.to(rows.dtype).contiguous()
    sizes = len(rows), rows.shape[1], math.prod(rows.shape[2:])
    _, mean, scale = torch.native_group_norm(rows, None, None, *sizes, groups, eps)
    derivative, _, _ = torch.ops.aten.native_group_norm_backward(
        tangent, rows, mean, scale, None, *sizes, groups, INPUT_ONLY
    )
    return _scaled(derivative, _per_channel(weight, x.ndim))
