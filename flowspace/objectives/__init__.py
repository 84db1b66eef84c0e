"""One objective a file, each a few lines over `flowspace.objectives.engine`."""

from flowspace.objectives.alpha_flow import AlphaFlowLoss, alpha_at
from flowspace.objectives.consistency import ConsistencyLoss
from flowspace.objectives.cross_flow import CrossFlowLoss
from flowspace.objectives.distillation import MeanFlowDistillationLoss
from flowspace.objectives.engine import LossOutput, Objective, PathPoint
from flowspace.objectives.flow_matching import FlowMatchingLoss
from flowspace.objectives.improved_mean_flow import ImprovedMeanFlowLoss
from flowspace.objectives.mean_flow import MeanFlowLoss
from flowspace.objectives.pixel_mean_flow import PixelMeanFlowLoss
from flowspace.objectives.trajectory_matching import TrajectoryMatchingLoss

__all__ = [
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
]
