"""Cross-space flow maps: from a schedule and a statistic to one-step images, without a velocity
target.

Times everywhere: t = 0 is data, t = 1 is noise, s is the destination, 0 <= s <= t <= 1.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowspace.adapters import Adapter, adapt
    from flowspace.cascade import (
        Cascade,
        CascadeBatch,
        CascadeFlow,
        CascadeLoss,
        CascadeOutput,
        CascadeStage,
    )
    from flowspace.citations import citation
    from flowspace.criteria import CriteriaReport, check_criteria
    from flowspace.derivatives import (
        Derivative,
        FiniteDifference,
        ForwardMode,
        SharedPrimal,
        rule,
    )
    from flowspace.errors import (
        CriterionError,
        DerivativeError,
        ExpressionError,
        FlowspaceError,
        InputError,
        RunError,
        ScheduleError,
        TimeError,
    )
    from flowspace.flow_map import FlowMap
    from flowspace.guidance import Guidance, RandomGuidance
    from flowspace.objectives import (
        AlphaFlowLoss,
        ConsistencyLoss,
        CrossFlowLoss,
        FlowMatchingLoss,
        ImprovedMeanFlowLoss,
        LossOutput,
        MeanFlowDistillationLoss,
        MeanFlowLoss,
        Objective,
        PathPoint,
        PixelMeanFlowLoss,
        TrajectoryMatchingLoss,
        alpha_at,
    )
    from flowspace.penalties import AbsoluteError, Adaptive, HuberError, Penalty, SquaredError
    from flowspace.schedules import (
        TIME_FLOOR,
        CosineSchedule,
        LinearSchedule,
        PolynomialSchedule,
        Schedule,
        VariancePreservingSchedule,
    )
    from flowspace.solvers import DormandPrince, Euler, Heun, VelocityFlow
    from flowspace.statistics import (
        AbstractStatistic,
        ConsistencyStatistic,
        MatchedStatistic,
        MeanFlowStatistic,
        Statistic,
    )
    from flowspace.times import (
        KarrasTimes,
        LogitNormalTimes,
        PairSampler,
        PowerTimes,
        RandomSource,
        ShiftedTimes,
        TimePairs,
        TimeSampler,
        ToDataTimes,
        UniformTimes,
    )

__version__ = "0.1.0"

__all__ = [
    "TIME_FLOOR",
    "AbsoluteError",
    "AbstractStatistic",
    "Adapter",
    "Adaptive",
    "AlphaFlowLoss",
    "Cascade",
    "CascadeBatch",
    "CascadeFlow",
    "CascadeLoss",
    "CascadeOutput",
    "CascadeStage",
    "ConsistencyLoss",
    "ConsistencyStatistic",
    "CosineSchedule",
    "CriteriaReport",
    "CriterionError",
    "CrossFlowLoss",
    "Derivative",
    "DerivativeError",
    "DormandPrince",
    "Euler",
    "ExpressionError",
    "FiniteDifference",
    "FlowMap",
    "FlowMatchingLoss",
    "FlowspaceError",
    "ForwardMode",
    "Guidance",
    "Heun",
    "HuberError",
    "ImprovedMeanFlowLoss",
    "InputError",
    "KarrasTimes",
    "LinearSchedule",
    "LogitNormalTimes",
    "LossOutput",
    "MatchedStatistic",
    "MeanFlowDistillationLoss",
    "MeanFlowLoss",
    "MeanFlowStatistic",
    "Objective",
    "PairSampler",
    "PathPoint",
    "Penalty",
    "PixelMeanFlowLoss",
    "PolynomialSchedule",
    "PowerTimes",
    "RandomGuidance",
    "RandomSource",
    "RunError",
    "Schedule",
    "ScheduleError",
    "SharedPrimal",
    "ShiftedTimes",
    "SquaredError",
    "Statistic",
    "TimeError",
    "TimePairs",
    "TimeSampler",
    "ToDataTimes",
    "TrajectoryMatchingLoss",
    "UniformTimes",
    "VariancePreservingSchedule",
    "VelocityFlow",
    "adapt",
    "alpha_at",
    "check_criteria",
    "citation",
    "rule",
]

PLACES = {
    "adapters": ("Adapter", "adapt"),
    "cascade": (
        "Cascade",
        "CascadeBatch",
        "CascadeFlow",
        "CascadeLoss",
        "CascadeOutput",
        "CascadeStage",
    ),
    "citations": ("citation",),
    "criteria": ("CriteriaReport", "check_criteria"),
    "derivatives": ("Derivative", "FiniteDifference", "ForwardMode", "SharedPrimal", "rule"),
    "errors": (
        "CriterionError",
        "DerivativeError",
        "ExpressionError",
        "FlowspaceError",
        "InputError",
        "RunError",
        "ScheduleError",
        "TimeError",
    ),
    "flow_map": ("FlowMap",),
    "guidance": ("Guidance", "RandomGuidance"),
    "objectives": (
        "AlphaFlowLoss",
        "ConsistencyLoss",
        "CrossFlowLoss",
        "FlowMatchingLoss",
        "ImprovedMeanFlowLoss",
        "LossOutput",
        "MeanFlowDistillationLoss",
        "MeanFlowLoss",
        "Objective",
        "PathPoint",
        "PixelMeanFlowLoss",
        "TrajectoryMatchingLoss",
        "alpha_at",
    ),
    "penalties": ("AbsoluteError", "Adaptive", "HuberError", "Penalty", "SquaredError"),
    "schedules": (
        "TIME_FLOOR",
        "CosineSchedule",
        "LinearSchedule",
        "PolynomialSchedule",
        "Schedule",
        "VariancePreservingSchedule",
    ),
    "solvers": ("DormandPrince", "Euler", "Heun", "VelocityFlow"),
    "statistics": (
        "AbstractStatistic",
        "ConsistencyStatistic",
        "MatchedStatistic",
        "MeanFlowStatistic",
        "Statistic",
    ),
    "times": (
        "KarrasTimes",
        "LogitNormalTimes",
        "PairSampler",
        "PowerTimes",
        "RandomSource",
        "ShiftedTimes",
        "TimePairs",
        "TimeSampler",
        "ToDataTimes",
        "UniformTimes",
    ),
}
"""Where each public name is: it is imported when it is asked for, since torch takes seconds."""


def _imported(place: str) -> Any:
    """Return a module of this package.

    Raises:
        ImportError: with its cause, where that is an AttributeError, such as a name that torch
            does not have: ``from flowspace import`` would take it for a name that is not here.
    """
    try:
        return importlib.import_module(f"flowspace.{place}")
    except AttributeError as error:
        raise ImportError(f"flowspace.{place} cannot be imported: {error}") from error


def __getattr__(name: str) -> Any:
    if name in PLACES:
        return _imported(name)
    for place, names in PLACES.items():
        if name in names:
            value = getattr(_imported(place), name)
            globals()[name] = value  # the next time it is found at once
            return value
    raise AttributeError(f"module 'flowspace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
