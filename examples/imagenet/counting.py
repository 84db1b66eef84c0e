"""FLOPs of a network's forward pass: counted on meta tensors, without a weight in memory.

A multiply-add is two FLOPs here, as in torch's counter; papers mostly write it as one, and some
leave out attention's own products (`Products.as_published`). Elementwise work is not counted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Call", "Products", "counted", "one_row", "pictures", "products_of"]

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A module, and the arguments and keywords that it is called with."""

ATTENTION = ("bmm", "scaled_dot_product")
"""What torch calls the products of queries with keys and of weights with values."""


@dataclass(frozen=True)
class Products:
    """FLOPs of the matrix products of one forward call, a multiply-add as two.

    Attributes:
        layers: of linear layers and convolutions.
        attention: of attention's own, queries with keys and weights with values.
    """

    layers: float
    attention: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.layers + self.attention

    @property
    def as_published(self) -> float:
        """As MF-RAE (arXiv 2511.13019) counts: a multiply-add as one, of the layers alone.

        Its text does not say so. Its numbers for four networks do, which are 0 to 0.6 % from these
        and up to 4 % from those with attention.
        """
        return self.layers / 2


def products_of(build: Callable[[], Call]) -> tuple[int, Products]:
    """Return the parameters of a module and the products of one forward call.

    Args:
        build: makes the module and its arguments; run on the meta device.
    """
    with torch.device("meta"), torch.no_grad():
        module, arguments, keywords = build()
        with FlopCounterMode(display=False) as counter:
            module.eval()(*arguments, **keywords)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    layers, attention = 0.0, 0.0
    for name, count in counter.get_flop_counts()["Global"].items():
        of_attention = any(each in str(name) for each in ATTENTION)
        if of_attention:
            attention += count
        else:
            layers += count
    return parameters, Products(layers, attention)


def counted(build: Callable[[], Call]) -> tuple[int, float]:
    """Return the parameters of a module and the FLOPs of one forward call.

    Args:
        build: makes the module and its arguments; run on the meta device.
    """
    parameters, products = products_of(build)
    return parameters, products.total


def one_row(network: Any) -> Call:
    """Return a call of a network of latents, times and labels, on one row of zeros."""
    time = torch.ones(1)
    labels = torch.zeros(1, dtype=torch.long)
    latents = torch.zeros(1, *network.latent_shape)
    return network, (latents, time, time), {"labels": labels}


def pictures(size: int) -> torch.Tensor:
    """Return one picture, of zeros."""
    return torch.zeros(1, 3, size, size)
