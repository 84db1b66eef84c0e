"""A training step by each route: ``pytest benchmarks --benchmark-enable``; `derivatives.py` prints
ratios.
"""

import shutil

import compiled
import pytest
import torch
from compiled_steps import Step, rows_of
from derivatives import ROUTES, Setting

SETTING = Setting(width=64, depth=2)


@pytest.mark.parametrize("job", ["forward", "plain", *ROUTES])
def test_step(benchmark, job):
    if "fused" in job:
        pytest.skip("raises NotImplementedError: fused attention has no forward derivative")
    torch.manual_seed(0)
    benchmark(SETTING.jobs(SETTING.build(), ROUTES)[job])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("number", range(7))
def test_compiled_step(benchmark, number):
    setting, _ = compiled.settings()[0]
    step = Step(setting, rows_of(setting, rivals=False)[number])
    _, remark = step.start()
    benchmark(step)
    assert not remark
