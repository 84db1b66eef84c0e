"""One thread, one seed, one profile for every test."""

import os
import sys

# Before torch is imported, and for the programs that tests start: more threads wait for each other
# where tests run in several processes.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# no shrinking: it takes minutes where an example derives formulas
settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """Forget what a test compiled: torch.compile captures a function eight times at most, for all
    tests of a process together.
    """
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
