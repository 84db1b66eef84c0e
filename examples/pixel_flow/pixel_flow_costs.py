"""What a sample of a cascade costs, stage by stage."""

from collections.abc import Mapping, Sequence

import torch
from pixel_flow_settings import PixelFlowConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowspace import Cascade, CascadeStage
from flowspace.demo.page import markdown_table

__all__ = ["cost_line", "cost_table", "costs_of", "flops_of", "solver_line"]


def flops_of(config: PixelFlowConfig, network: nn.Module, cond: Mapping[str, Tensor]) -> list[int]:
    """Return the floating-point operations of one evaluation in each stage, coarsest first.

    A multiply-add counts as two.

    Args:
        config: of the run.
        network: trained or not, also on the meta device.
        cond: its arguments for one picture.
    """
    device = next(network.parameters()).device
    there = {name: value.to(device) for name, value in cond.items()}
    t = torch.ones(1, device=device)
    counts = []
    for stage in Cascade(config.stages):
        side = side_of(config, stage)
        picture = torch.zeros(1, 3, side, side, device=device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(picture, t, t, **there)
        counts.append(counter.get_total_flops())
    return counts


def side_of(config: PixelFlowConfig, stage: CascadeStage) -> int:
    """Return the pixels a side of a stage's pictures."""
    return config.cascade.kickoff << stage.index


def costs_of(config: PixelFlowConfig, flops: Sequence[int]) -> tuple[list[int], int]:
    """Return the operations of a sample in each stage, and of one by as many steps of full size.

    Guidance, which takes two evaluations a step, is not counted.
    """
    costs = []
    for flop, count in zip(flops, config.steps, strict=True):
        costs.append(flop * count)
    return costs, flops[-1] * sum(config.steps)


def cost_line(config: PixelFlowConfig, flops: Sequence[int]) -> str:
    """Return in a sentence what a sample costs."""
    costs, single = costs_of(config, flops)
    whole = sum(costs)
    return (
        f"A sample takes {whole / 1e9:.4g} GFLOPs, "
        f"and {single / 1e9:.4g} by as many steps at full resolution: "
        f"{whole / single:.3f} of them."
    )


def solver_line(config: PixelFlowConfig) -> list[str]:
    """Return a sentence that says so where the solver takes other steps than are counted."""
    solver = config.sampling.solver
    if solver != "dormand-prince":
        return []
    counts = ", ".join(f"{count}" for count in config.steps)
    return [
        f"Counted are {counts} Euler steps in the stages, coarsest first. The samples here are "
        f"drawn by {solver}, which takes as many evaluations as its tolerances ask for."
    ]


def cost_table(config: PixelFlowConfig, flops: Sequence[int]) -> str:
    """Return a Markdown table of the stages."""
    costs, _ = costs_of(config, flops)
    stages = Cascade(config.stages)
    rows = []
    for stage, count, cost in zip(stages, config.steps, costs, strict=True):
        side = side_of(config, stage)
        low, high = stage.window
        row = {
            "stage": f"{stage.index}",
            "pixels": f"{side}",
            "tokens": f"{(side // config.network.patch) ** 2}",
            "times": f"{high:.3f} to {low:.3f}",
            "weight of the noise": f"{stage.start:.3f} to {stage.end:.3f}",
            "steps": f"{count}",
            "operations": f"{cost / sum(costs):.1%}",
        }
        rows.append(row)
    cells = [tuple(row.values()) for row in rows]
    return markdown_table(tuple(rows[0]), cells)
