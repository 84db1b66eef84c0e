"""Forward-mode automatic differentiation by torch.func.jvp, beside an ordinary forward pass with gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowspace.derivatives.route import Derivative

__all__ = ["ForwardMode"]


@dataclass(frozen=True)
class ForwardMode(Derivative):
    """Exact: one more forward pass, in forward-mode AD, without gradient.

    Fused attention kernels have no forward derivative, so attention runs on the math kernel for this pass only; the setting
    is restored afterwards, also after an error. The pass with gradient keeps the fused kernels.
    """

    def derive(
        self, fn: Callable[..., Tensor], primals: Sequence[Any], tangents: Sequence[Tensor | None], value: Tensor | None,
        mixed: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return the derivative on the given rows."""
        moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

        def of_moving(*inputs: Tensor) -> Tensor:
            arguments = list(primals)
            for i, moved in zip(moving, inputs, strict=True):
                arguments[i] = moved
            return fn(*arguments)

        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(of_moving, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving))[1]
