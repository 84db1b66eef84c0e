"""How the total derivative D_t f, the directional derivative of f along (v, 1, 0), is computed."""

from flowspace.derivatives.finite_difference import FiniteDifference
from flowspace.derivatives.forward_mode import ForwardMode
from flowspace.derivatives.own_rules import in_steps, linear_map, with_rule
from flowspace.derivatives.route import Derivative
from flowspace.derivatives.rules import rule
from flowspace.derivatives.shared_primal import SharedPrimal

__all__ = [
    "Derivative",
    "FiniteDifference",
    "ForwardMode",
    "SharedPrimal",
    "in_steps",
    "linear_map",
    "rule",
    "with_rule",
]
