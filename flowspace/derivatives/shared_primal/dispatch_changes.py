"""Dispatch modes of a model's own that change what functions return.

A tangent is that of the function that the model calls, so such a mode is refused.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from flowspace.derivatives.hidden_calls import STAYING
from flowspace.derivatives.replay import agree, base_of
from flowspace.derivatives.rules.registry import differentiable
from flowspace.derivatives.torch_internals import (
    alone,
    not_intercepted,
    unseen_by_modes,
)
from flowspace.errors import DerivativeError

__all__ = ["refuse_changed", "value_without_modes"]


def value_without_modes(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Return what a function returns outside the dispatch modes that a model entered.

    None stands for no matter what: there are none, or they only count, or make tensors without
    values.
    """
    modes = [type(mode).__name__ for mode in _get_current_dispatch_mode_stack()]
    if not modes or STAYING.intersection(modes):
        return None
    with torch.no_grad(), not_intercepted(), unseen_by_modes():
        # it may write into them, as a norm into its statistics
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (tuple(args), kwargs))
        return func(*args, **kwargs)


def refuse_changed(name: str, out: Any, plain: Any) -> None:
    """Raise DerivativeError if a dispatch mode changes what a function returns: a tangent would be
    that of the function that the model calls.

    Args:
        name: of the function.
        out: what it returned.
        plain: what it returns outside of dispatch modes, or None for no matter what.
    """
    if plain is None:
        return
    pairs = zip(pytree.tree_leaves(out), pytree.tree_leaves(plain), strict=False)
    modes = [type(mode).__name__ for mode in _get_current_dispatch_mode_stack()]
    with alone():
        for ours, other in pairs:
            if not isinstance(ours, Tensor):
                continue
            ours, other = base_of(ours).detach(), base_of(other).detach()
            if differentiable(ours) and not agree(ours, other, ours.itemsize):
                raise DerivativeError(
                    f"got another value of {name} within {', '.join(modes)} than outside: a "
                    "dispatch mode that changes functions, whose tangents would be those of the "
                    "functions that the model calls; write what it does into the model, or "
                    "derivative=FiniteDifference()"
                )
