"""A training step does not ask the device for a value: on a GPU, Python runs ahead of it."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flowspace import (
    ConsistencyLoss,
    CrossFlowLoss,
    FiniteDifference,
    ForwardMode,
    SharedPrimal,
    TimePairs,
)

WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select")


class AsksNothing(TorchDispatchMode):
    """Fails where the device would be waited for: a value is read, or a shape depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = (
            [i for i in args[1] if i is not None and i.dtype == torch.bool]
            if name in ("index", "index_put", "index_put_")
            else []
        )
        assert name not in WAITING and not masks, f"a step waits for the device in {func}"
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """A small network of latents ``(B, 6)`` and times."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 6)

    def forward(self, z, t, s):
        return self.second(torch.tanh(self.first(torch.cat([z, t[:, None], s[:, None]], 1))))


@pytest.mark.parametrize("rows", [1, 7, 8])
@pytest.mark.parametrize("equal", [0.0, 0.3, 0.5, 1.0])
def test_a_step_with_drawn_times_does_not_wait_for_the_device(rows, equal):
    net, loss, z = Net(), CrossFlowLoss(times=TimePairs(equal=equal)), torch.randn(rows, 6)
    loss(net, z)  # warnings of the first latents are formed once
    with AsksNothing():
        loss(net, z).loss.mean().backward()


def test_a_step_of_a_consistency_model_does_not_wait_for_the_device():
    net, loss, z = Net(), ConsistencyLoss(), torch.randn(8, 6)
    loss(net, z)
    with AsksNothing():
        loss(net, z).loss.mean().backward()


def test_a_step_with_given_times_is_seen_to_wait():
    t = torch.linspace(0.1, 0.9, 8)
    with pytest.raises(AssertionError, match="waits"), AsksNothing():
        CrossFlowLoss()(Net(), torch.randn(8, 6), t=t, s=t / 2)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to wait for")
def test_on_a_gpu_torch_sees_no_wait_in_a_step():
    net, loss, z = Net().cuda(), CrossFlowLoss(), torch.randn(8, 6, device="cuda")
    loss(net, z).loss.mean().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(net, z).loss.mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("route", [SharedPrimal(), ForwardMode(), FiniteDifference()], ids=str)
@pytest.mark.parametrize("at_most", [3, 4, 5, 6])
def test_a_bound_on_the_rows_does_not_change_the_derivative(route, at_most):
    net, z, t = Net().double(), torch.randn(6, 6).double(), torch.linspace(0.2, 0.9, 6).double()
    mask = torch.tensor([False, True, False, True, True, False])
    arguments = net, (z, t, t / 2), (torch.randn_like(z), torch.ones_like(t), None)
    exact = route(*arguments, mask)
    for found, wanted in zip(route(*arguments, mask, at_most), exact, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_bound_that_is_too_low_is_seen():
    net, z, t = Net(), torch.randn(4, 6), torch.linspace(0.2, 0.9, 4)
    mask = torch.tensor([True, False, True, True])
    _, derivative = SharedPrimal()(net, (z, t, t), (z, t, None), mask, 2)
    assert derivative.isnan().all(1).tolist() == [False, False, False, True]


@pytest.mark.parametrize("rows", [1, 2, 7, 32])
@pytest.mark.parametrize("equal", [0.0, 0.1, 0.5, 0.75, 1.0])
def test_no_more_rows_are_off_the_diagonal_than_a_sampler_says(rows, equal):
    times = TimePairs(equal=equal)
    most = times.most_off_diagonal(rows)
    for seed in range(50):
        t, s = times(rows, generator=torch.Generator().manual_seed(seed))
        assert most - 1 <= int((s < t).sum()) <= most


def test_a_sampler_that_draws_otherwise_says_nothing():
    class Apart(TimePairs):
        def draw(self, rows, source):
            t = self.times.draw(rows, source)
            return t, t / 2

    assert Apart().most_off_diagonal(8) is None
    assert TimePairs().most_off_diagonal(8) == 4
