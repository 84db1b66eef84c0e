"""What flowspace raises. Each error says what came, why it is wrong and what to write instead."""

__all__ = [
    "CriterionError",
    "DerivativeError",
    "ExpressionError",
    "FlowspaceError",
    "InputError",
    "RunError",
    "ScheduleError",
    "TimeError",
]


class FlowspaceError(ValueError):
    """Everything that flowspace refuses."""


class ExpressionError(FlowspaceError):
    """A text or sympy expression that is not a formula in the times."""


class ScheduleError(FlowspaceError):
    """A pair (alpha, beta) that is no schedule: wrong ends, not finite, or lambda not falling."""


class CriterionError(FlowspaceError):
    """A statistic that fails a criterion which the caller relies on."""


class TimeError(FlowspaceError):
    """Times of the wrong type, shape or range."""


class InputError(FlowspaceError):
    """Tensors, settings or model outputs that do not fit together."""


class RunError(FlowspaceError):
    """A run folder or checkpoint that cannot be continued as asked."""


class DerivativeError(FlowspaceError):
    """A model that the chosen route cannot differentiate; the message names one that can."""
