"""How near two numbers must be, and why no nearer: everything is compared in float64.

`close = within(EXACT)` at the top of a file says how near its numbers are; a test that knows of a
coarser one passes it.
"""

import torch

EXACT = 1e-10
"""The same formula written twice: a few dozen roundings, divided by t or b down to 1e-2."""

TRAINED = 1e-9
"""Values and gradients through a small network, where roundings add up over its sums."""

DERIVED = 1e-8
"""Closed forms against automatic derivatives, or against 0/0 evaluated just inside an edge."""


def within(tolerance):
    """Return the comparison of two tensors with this tolerance, relative and absolute."""

    def close(actual, wanted, tolerance=tolerance):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)

    return close
