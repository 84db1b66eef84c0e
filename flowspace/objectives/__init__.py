"""One objective a file, each a few lines over `flowspace.objectives.engine`."""

from flowspace.objectives.consistency import ConsistencyLoss
from flowspace.objectives.cross_flow import CrossFlowLoss
from flowspace.objectives.engine import LossOutput, Objective
from flowspace.objectives.flow_matching import FlowMatchingLoss
from flowspace.objectives.mean_flow import MeanFlowLoss

__all__ = ["ConsistencyLoss", "CrossFlowLoss", "FlowMatchingLoss", "LossOutput", "MeanFlowLoss", "Objective"]
