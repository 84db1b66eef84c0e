"""Small networks that several test files train and differentiate."""

import torch
from gaussian import column
from strategies import normal

__all__ = ["Net"]


class Net(torch.nn.Module):
    """A smooth model in float64 from `dim` to `out` dimensions, of all its arguments."""

    def __init__(self, dim=3, out=None, seed=0):
        super().__init__()
        self.first = torch.nn.Parameter(normal(seed, dim, 8))
        self.second = torch.nn.Parameter(normal(seed + 1, 8, out or dim))

    def forward(self, z, t, s, shift=None):
        hidden = torch.tanh(z @ self.first + column(t) - 2 * column(s))
        f = hidden @ self.second * column(1 + t * s)
        if shift is None:
            return f
        return f + shift * column(t)
