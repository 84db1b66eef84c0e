"""Contexts that a captured graph enters: autocast, inference mode, a choice of attention kernels.

dynamo writes them as calls that set a state of torch. While a carrier traces the graph, what
follows has to see that state, and the dual graph has to set it again. torch's tracing does one of
the two: it writes autocast down and does not enter it, and enters the others and does not write
them down.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx.experimental import proxy_tensor

from flowspace.derivatives.torch_internals import (
    attention_kernel_of,
    attention_kernels,
    choose_attention_kernels,
    enter_autocast,
    enter_inference_mode,
    exit_autocast,
    exit_inference_mode,
    set_gradients_seen,
)

__all__ = ["Contexts"]


class Contexts:
    """The contexts that a graph is in.

    Attributes:
        autocasts: those of autocast that were entered, from outside in.
    """

    def __init__(self) -> None:
        self.autocasts: list[torch.autocast] = []
        self._calls: dict[Any, Callable[..., Any]] = {
            enter_autocast: self._enter_autocast,
            exit_autocast: self._exit_autocast,
            enter_inference_mode: self._enter_inference_mode,
            exit_inference_mode: set_gradients_seen,
            choose_attention_kernels: self._choose_attention_kernels,
        }

    def call_of(self, target: Any) -> Callable[..., Any] | None:
        """Return what is called in place of a function that enters or leaves a context, or None
        for any other.
        """
        return self._calls.get(target)

    @contextlib.contextmanager
    def left(self) -> Iterator[None]:
        """Leave, after an error, what was entered."""
        kernels = attention_kernels()
        try:
            yield
        except BaseException:
            while self.autocasts:
                self.autocasts.pop().__exit__(None, None, None)
            choose_attention_kernels(kernels)
            raise

    def _enter_autocast(self, *args: Any) -> None:
        """Enter autocast, which writes itself down."""
        autocast = torch.autocast(*args)
        autocast.__enter__()
        self.autocasts.append(autocast)

    def _exit_autocast(self, _: Any) -> None:
        """Leave the innermost autocast."""
        self.autocasts.pop().__exit__(None, None, None)

    def _enter_inference_mode(self, inference: bool) -> bool:
        """Stop recording gradients; return whether they were recorded, for the exit."""
        before = torch.is_grad_enabled()
        if inference:
            set_gradients_seen(False)
        return before

    def _choose_attention_kernels(self, kernels: list[Any], *args: Any) -> None:
        """Choose which kernels attention may take, here and in the dual graph."""
        tracer = proxy_tensor.get_proxy_mode().tracer  # type: ignore[union-attr]
        named = []
        for kernel in kernels:
            node = tracer.create_node("call_function", attention_kernel_of, (kernel.name,), {})
            named.append(node)
        tracer.create_node("call_function", choose_attention_kernels, (named, *args), {})
        choose_attention_kernels(kernels, *args)
