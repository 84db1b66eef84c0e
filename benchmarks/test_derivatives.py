"""A training step by each route: ``pytest benchmarks --benchmark-enable``; `derivatives.py` prints ratios."""

import pytest
import torch
from derivatives import ROUTES, Setting

SETTING = Setting(width=64, depth=2)


@pytest.mark.parametrize("job", ["forward", "plain", *ROUTES])
def test_step(benchmark, job):
    if "fused" in job:
        pytest.skip("raises NotImplementedError: fused attention has no forward derivative")
    torch.manual_seed(0)
    benchmark(SETTING.jobs(SETTING.build(), ROUTES)[job])
