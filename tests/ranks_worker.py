"""FSDP2 against a plain network, on one process or two. Started by test_silent_faults.py."""

import copy
import os
import signal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flowspace import (
    CrossFlowLoss,
    DerivativeError,
    FiniteDifference,
    ForwardMode,
    ImprovedMeanFlowLoss,
    MeanFlowLoss,
    PixelMeanFlowLoss,
)


class Net(nn.Module):
    def __init__(self, mixes):
        super().__init__()
        self.embed, self.head, self.mixes = nn.Linear(6, 32), nn.Linear(32, 4), mixes
        parts = (nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        self.blocks = nn.ModuleList([nn.Sequential(*copy.deepcopy(parts)) for _ in range(2)])

    def forward(self, z, t, s):
        h = self.embed(torch.cat([z, t[:, None], s[:, None]], 1))
        for block in self.blocks:
            h = h + block(h)
        return self.head(h - h.mean(0) if self.mixes else h)


def batch(shares):
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, len(shares), 4, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.25, 0.95, len(shares), dtype=torch.float64)
    return z, {"noise": noise, "t": t, "s": t * torch.tensor(shares, dtype=torch.float64)}


def check_buffers():
    """DDP writes into buffers unseen: forward mode says so, and is exact where it does not."""
    z, rest = batch([1, 0.3] * 3)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double().eval()
    loss_fn = MeanFlowLoss(derivative=ForwardMode())
    wanted = loss_fn(lambda z, t, s: net(z * t[:, None]), z, **rest).residual
    for broadcast in (True, False):
        ddp = nn.parallel.DistributedDataParallel(net, broadcast_buffers=broadcast)
        try:
            found = loss_fn(lambda z, t, s, ddp=ddp: ddp(z * t[:, None]), z, **rest).residual
        except DerivativeError as error:
            assert broadcast and "broadcast_buffers=False" in str(error)
        else:
            assert not broadcast and torch.equal(found, wanted)
    print("DDP with buffers agrees", flush=True)


def main():
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    losses = {
        "MeanFlow": MeanFlowLoss(),
        "MeanFlow ForwardMode": MeanFlowLoss(derivative=ForwardMode()),
        "MeanFlow FiniteDifference": MeanFlowLoss(derivative=FiniteDifference()),
        "ImprovedMeanFlow": ImprovedMeanFlowLoss(),
        "PixelMeanFlow": PixelMeanFlowLoss(),
        "MeanFlow gap": MeanFlowLoss(gap=0.5),
    }
    if torch.__version__ < "2.11":  # where a jvp counts as a write into what FSDP2 gathers
        del losses["MeanFlow ForwardMode"]
    if size == 2:
        losses |= {
            "CrossFlow": CrossFlowLoss(),
            "order 1": MeanFlowLoss(derivative=FiniteDifference(order=1)),
        }
    shares = [1, 0.3] * 3 if size == 1 else [[1.0] * 6, [0.3] * 6][rank]
    z, rest = batch(shares)
    for turn, (name, loss_fn) in enumerate(losses.items()):
        torch.manual_seed(0)
        plain = Net(mixes=size == 2 and turn % 2 == 0).double()
        net = copy.deepcopy(plain)
        for part in (*net.blocks, net):
            fully_shard(part, mesh=init_device_mesh("cpu", (size,)))
        signal.alarm(20)  # a process that waits for ever ends here
        out = loss_fn(net, z, **rest)
        out.loss.mean().backward()
        wanted = loss_fn(plain, z, **rest)
        wanted.loss.mean().backward()
        signal.alarm(0)
        torch.testing.assert_close(out.residual, wanted.residual, rtol=1e-6, atol=1e-6)
        for found, parameter in zip(net.parameters(), plain.parameters(), strict=True):
            dist.all_reduce(parameter.grad)
            torch.testing.assert_close(
                found.grad.full_tensor(), parameter.grad / size, rtol=1e-6, atol=1e-6
            )
        print(f"{name} agrees", flush=True)
    if size == 1:
        check_buffers()
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
