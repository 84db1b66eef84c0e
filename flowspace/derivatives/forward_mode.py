"""Forward-mode automatic differentiation by torch.func.jvp, beside an ordinary forward pass."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from flowspace.derivatives.replay import forward_mode_lock, in_transform
from flowspace.derivatives.rules.registry import CONSTANT, differentiable
from flowspace.derivatives.second_run import First, Second, SecondRun
from flowspace.errors import DerivativeError

__all__ = ["ForwardMode"]

STOPS = CONSTANT | {"detach", "detach_", "where"}
"""Functions whose output may stand still though their input moves; where: only its condition may
move.
"""

LEAVES = frozenset({"item", "tolist", "numpy", "__array__", "__float__", "__complex__"})
"""Functions that hand a value out of torch, where nothing follows it."""

OF_TORCH = (
    "forward AD",
    "functorch",
    "torch.func",
    "TransformType",
    "vmap",
    "jvp",
    "data pointer",
    "setup_context",
)
"""What the messages say by which torch refuses to run something in forward mode."""


@dataclass(frozen=True)
class ForwardMode(SecondRun):
    """Exact: one more forward pass, in forward-mode AD, without gradient.

    Fused attention kernels have no forward derivative, so attention runs on the math kernel for
    this pass only; the setting is restored afterwards, also after an error. The pass with gradient
    keeps the fused kernels. Threads take turns: torch counts its levels of forward mode for the
    whole process.

    Raises:
        DerivativeError: where the model calls what has no forward derivative, or hands a value
            that moves out of torch.
    """

    def derive(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Tensor | None],
        first: First,
        mixed: bool,
    ) -> Second:
        """Return the derivative on the given rows, and the value, which comes with it."""
        moving = [i for i, tangent in enumerate(tangents) if tangent is not None]
        inputs = tuple(primals[i] for i in moving)

        def of_moving(*moved: Tensor) -> Tensor:
            arguments = list(primals)
            for i, value in zip(moving, moved, strict=True):
                arguments[i] = value
            with _Followed():
                return fn(*arguments)

        try:
            with _alone(), sdpa_kernel(SDPBackend.MATH):
                directions = tuple(tangents[i] for i in moving)
                found = torch.func.jvp(of_moving, inputs, directions)
        except (RuntimeError, NotImplementedError, KeyError) as error:
            if not any(mark in str(error) for mark in OF_TORCH):
                raise
            raise DerivativeError(
                f"got a model that torch.func.jvp cannot differentiate ({_reason(error)}); write "
                "derivative=SharedPrimal(), or FiniteDifference(), which needs no forward "
                "derivatives"
            ) from error
        return Second(derivative=found[1], value=found[0])


class _Followed(TorchFunctionMode):
    """Raises DerivativeError where a tangent ends without a word: torch.func.jvp goes on with
    zeros.
    """

    def __init__(self) -> None:
        super().__init__()
        self.level = torch._C._functorch.maybe_current_level()  # pyright: ignore

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inside = torch._C._functorch.maybe_current_level() != self.level  # pyright: ignore
        if inside or not any(map(_moves, _tensors((*args, *kwargs.values())))):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name in LEAVES:
            called = f"{name.strip('_')}()" if name.startswith("__") else f".{name}()"
            raise DerivativeError(
                f"got {called} of a tensor that moves with z_t or t: its value leaves torch, "
                "where no tangent follows it; keep it a tensor, write .detach() first if it is a "
                "constant, or derivative=FiniteDifference()"
            )
        out = func(*args, **kwargs)
        parts = [part for part in _tensors((out,)) if differentiable(part) and part.numel()]
        if parts and name not in STOPS and not any(map(_moves, parts)):
            raise DerivativeError(
                f"got {_called(func)}, which has no forward derivative, of a tensor that moves "
                "with z_t "
                "or t; write derivative=FiniteDifference(), which needs none, or .detach() first "
                "if it "
                "is a constant"
            )
        return out


def _called(func: Any) -> str:
    """Return a function's name for a message; what reads an attribute is called by it."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return f".{getattr(getattr(func, '__self__', None), '__name__', 'data')}"
    return func.name() if isinstance(func, torch._ops.OpOverload) else name


def _tensors(values: Any) -> Iterator[Tensor]:
    """Iterate over the tensors among values, and in the tuples and lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (tuple, list):
            yield from _tensors(value)


def _moves(tensor: Tensor) -> bool:
    """Return whether a tensor has a tangent now."""
    return in_transform(tensor) and forward_ad.unpack_dual(tensor).tangent is not None


def _reason(error: Exception) -> str:
    """Return the first line of what torch says; of operators that take functions it says a key
    alone.
    """
    if isinstance(error, KeyError):
        return "it calls an operator that takes a function, such as flex_attention, scan or cond"
    if "captured Tensor" in str(error):
        return (
            "something writes into a tensor that it holds, unseen by torch's functions, as "
            "DistributedDataParallel does into buffers unless broadcast_buffers=False"
        )
    return str(error).strip().partition("\n")[0].rstrip(".")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep other threads out, and leave no level of forward mode behind, come what may."""
    with forward_mode_lock:
        outermost = forward_ad._current_level < 0
        try:
            yield
        except BaseException:
            if outermost:
                _close_level()
            raise


def _close_level() -> None:
    """Close the level of forward mode that an interrupt may have left open, in torch's own count
    or in Python's.
    """
    while torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(0)  # pyright: ignore
    try:
        level = torch._C._enter_dual_level()
    except RuntimeError:  # it is open
        level = 0
    torch._C._exit_dual_level(level=level)
    forward_ad._current_level = -1
    eager_transforms.JVP_NESTING = 0
