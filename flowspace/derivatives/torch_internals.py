"""Private names of torch that the carrier of tangents needs, under names that say what they do."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _set_grad_enabled as set_gradients_seen
from torch._functorch import eager_transforms
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as exit_autocast
from torch.autograd import forward_ad
from torch.autograd.grad_mode import _enter_inference_mode as enter_inference_mode
from torch.autograd.grad_mode import _exit_inference_mode as exit_inference_mode
from torch.nn.attention import _backend_from_string as attention_kernel_of
from torch.nn.attention import _cur_sdpa_kernel_backends as attention_kernels
from torch.nn.attention import _sdpa_kernel as choose_attention_kernels
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "active_transform",
    "alone",
    "attention_kernel_of",
    "attention_kernels",
    "base_transform",
    "below_modes_of_the_user",
    "choose_attention_kernels",
    "close_forward_mode",
    "dispatch_modes",
    "enter_autocast",
    "enter_function_mode",
    "enter_inference_mode",
    "exit_autocast",
    "exit_inference_mode",
    "forward_mode_is_open",
    "function_modes",
    "leave_function_mode",
    "leave_function_modes",
    "left_after_errors",
    "memory_of",
    "negated_view",
    "not_intercepted",
    "operators_of_networks",
    "outside_innermost_mode",
    "outside_transforms",
    "rms_norm_and_scale",
    "set_gradients",
    "set_gradients_seen",
    "set_version",
    "softmax_backward",
    "subclasses_enabled",
    "transform_level",
    "unseen_by_modes",
]

_C: Any = torch._C

unseen_by_modes = _disable_current_modes
"""A context in which no dispatch mode sees what is called."""

not_intercepted = _C.DisableTorchFunction
"""A context in which no function mode, and no subclass of Tensor, sees what is called."""

subclasses_enabled = _C._is_torch_function_enabled
"""Returns whether subclasses of Tensor see what is called."""

set_gradients = _C._set_grad_enabled
"""Turns gradients on or off, without the cost of a context."""

dispatch_modes = _C._len_torch_dispatch_stack
"""Returns how many dispatch modes see what is called."""

function_modes = _C._len_torch_function_stack
"""Returns how many function modes see what is called in this thread."""

outside_innermost_mode = _pop_mode_temporarily
"""A context in which the function mode that was entered last sees nothing."""

leave_function_mode = _C._pop_torch_function_stack
"""Leaves the function mode that was entered last, and returns it."""

enter_function_mode = _C._push_on_torch_function_stack
"""Enters a function mode."""

transform_level = _C._functorch.maybe_current_level
"""Returns how many transforms of torch.func are at work, or None."""

active_transform = _C._functorch.peek_interpreter_stack
"""Returns the innermost transform of torch.func at work, or None."""

outside_transforms = temporarily_clear_interpreter_stack
"""A context in which no transform of torch.func sees what is called."""

base_transform = _C._functorch.get_unwrapped
"""Returns the tensor that a transform of torch.func wrapped."""

rms_norm_and_scale = _C._VariableFunctions._fused_rms_norm
"""Returns what `rms_norm` does, and 1/rms(x) beside it."""

softmax_backward = _C._VariableFunctions._softmax_backward_data
"""Returns y (dx - sum(y dx)) for dx, y and an axis; the operator of torch.ops takes longer."""

negated_view = _C._VariableFunctions._neg_view
"""Returns the numbers of a tensor with the other sign, in the same memory."""

operators_of_networks = _C._nn
"""Holds builtin functions of torch.nn.functional."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let no mode see what is called, and neither autograd nor transforms of torch.func follow."""
    with torch.no_grad(), not_intercepted(), unseen_by_modes(), outside_transforms():
        yield


def memory_of(tensor: Tensor) -> int:
    """Return a number for the memory that a tensor and its views share.

    A fake tensor, which has no memory, has such a number too.
    """
    return tensor.untyped_storage()._cdata


def set_version(tensor: Tensor, version: int) -> None:
    """Let autograd count so many writes into a tensor: it holds again what it held then."""
    _C._autograd._unsafe_set_version_counter((tensor,), (version,))


@contextlib.contextmanager
def below_modes_of_the_user(mode: Any) -> Iterator[None]:
    """Enter a function mode below those that a user entered round it: they go first, and may call
    other functions than the one they are called with.
    """
    above = []
    while function_modes() and not _is_ours(_C._get_function_stack_at(function_modes() - 1)):
        above.append(leave_function_mode())
    depth = function_modes()
    try:
        for entered in (mode, *reversed(above)):
            enter_function_mode(entered)
        yield
    finally:
        leave_function_modes(depth)
        for entered in reversed(above):
            enter_function_mode(entered)


def _is_ours(mode: Any) -> bool:
    """Return whether a function mode is of this library, or of torch, as that of a device is."""
    return type(mode).__module__.partition(".")[0] in ("torch", "flowspace")


def leave_function_modes(count: int) -> None:
    """Leave the innermost function modes, down to so many."""
    while function_modes() > count:
        leave_function_mode()


def forward_mode_is_open() -> bool:
    """Return whether a level of forward mode is open in this process."""
    return forward_ad._current_level >= 0


@contextlib.contextmanager
def left_after_errors() -> Iterator[None]:
    """Leave the transforms of torch.func that were entered within, if an error ends it.

    A captured graph enters and leaves them by calls like any other: an error on the way skips
    those that leave, and every later transform of the process would raise.
    """
    depth = _C._functorch.get_dynamic_layer_stack_depth()
    refusal = _C._autograd._saved_tensors_hooks_get_disabled_error_message()
    is_open = forward_mode_is_open()
    try:
        yield
    except BaseException:
        _C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        _C._autograd._saved_tensors_hooks_enable()
        if refusal is not None:
            _C._autograd._saved_tensors_hooks_disable(refusal)
        if not is_open:
            close_forward_mode()
        raise


def close_forward_mode() -> None:
    """Close the level of forward mode that an interrupt may have left open.

    It may be open in torch's own count or in that of its Python code, so both are set back.
    """
    while active_transform() is not None:
        _C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(0)
    try:
        level = _C._enter_dual_level()
    except RuntimeError:  # it is open
        level = 0
    _C._exit_dual_level(level=level)
    forward_ad._current_level = -1
    eager_transforms.JVP_NESTING = 0
