"""One thread, one seed, one profile for every test."""

import os
import re
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


OF_TORCH = re.compile(
    r"test_models.*diffusers (UNet2DModel|AutoencoderKL)"  # group norm of channels last
    r"|(model_by_hand|a_thousand_t_needs.*)\[unet"  # likewise
    r"|aminmax|adaptive_integrator_inside"  # which has nextafter
    r"|(mask_computes_only|anchored_statistics).*ForwardMode"  # a jvp of no rows
    r"|activation_checkpoints_change_nothing.ForwardMode"  # a function without jvp
    r"|interrupt_leaves_nothing_behind.ForwardMode"  # a level that stays
    r"|the_kernel_is_the_derivative_of_attention"  # Triton 3.5's interpreter with numpy 2.4
)
"""Tests of what torch 2.9 itself raises at, most of it in its forward mode."""


def pytest_collection_modifyitems(items):
    """Skip what an older torch cannot do itself."""
    if torch.__version__ < "2.11":
        skip = pytest.mark.skip(reason="torch 2.9 itself raises")
        for item in items:
            if OF_TORCH.search(item.nodeid):
                item.add_marker(skip)


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
        torch._dynamo.reset()  # the numbers of functions begin again
        if compiled := sys.modules.get("flowspace.derivatives.shared_primal.compiled"):
            compiled._most_rows.clear()
