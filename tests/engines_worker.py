"""Two processes: CrossFlowLoss under DDP or FSDP2 against one process on the whole batch. Started
by test_engines.py.
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flowspace import CrossFlowLoss, ForwardMode
from flowspace.derivatives import hidden_calls
from flowspace.derivatives.shared_primal import compiled

ROWS, STEPS = 8, 3
PROGRAMS, make = [], compiled.Region._make
compiled.Region._make = lambda self, *args: PROGRAMS.append(self) or make(self, *args)


class Net(nn.Module):
    """Attention, norms and a layer that no step uses."""

    def __init__(self):
        super().__init__()
        self.embed, self.head, self.unused = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(2, 2)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True) for _ in range(2)
        )

    def forward(self, z, t, s):
        h = (
            self.embed(z * (1 + t[:, None]))[:, None]
            + torch.arange(3)[None, :, None] * s[:, None, None]
        )
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(1))


def wrapped(net, how, part="nothing"):
    """Return the net under an engine; its blocks, the net within or the engine round it may be
    compiled.
    """
    if part == "blocks":
        for i, block in enumerate(
            net.blocks
        ):  # not block.compile(): that has the hooks of FSDP2 within
            net.blocks[i] = torch.compile(block, backend="aot_eager")
    if part == "within":
        net.compile(backend="aot_eager")
    model = parallel(net, how)
    return torch.compile(model, backend="aot_eager") if part == "round" else model


def parallel(net, how):
    if how == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for part in (*net.blocks, net):
            fully_shard(part, mesh=mesh)
        return net
    options = {
        "static_graph": {"static_graph": True},
        "find_unused_parameters": {"find_unused_parameters": True},
    }
    return DistributedDataParallel(net, **options.get(how, {}))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    z, noise = torch.randn(2, ROWS, 8, generator=generator, dtype=torch.float64)
    t = 0.05 + 0.9 * torch.rand(ROWS, generator=generator, dtype=torch.float64)
    return z, noise, t, torch.where(torch.arange(ROWS) % 2 == 0, t, 0.3 * t)


def full(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def main(case):
    how, _, part = case.partition("+")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert dist.get_world_size() == 2
    torch.manual_seed(0)
    alone = Net().double()
    net = copy.deepcopy(alone)
    if how != "find_unused_parameters":
        del net.unused
    model, mine = wrapped(net, how, part), slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    for step in range(STEPS):
        z, noise, t, s = batch(step)
        model.zero_grad()
        alone.zero_grad()
        CrossFlowLoss()(
            model, z[mine], noise=noise[mine], t=t[mine], s=s[mine]
        ).loss.mean().backward()
        CrossFlowLoss(derivative=ForwardMode())(
            alone, z, noise=noise, t=t, s=s
        ).loss.mean().backward()
        wanted = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
        found = {
            name.replace("_orig_mod.", "").removeprefix("module."): full(p.grad)
            for name, p in model.named_parameters()
            if p.grad is not None
        }
        assert wanted.keys() <= found.keys(), wanted.keys() - found.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)
            both = [torch.empty_like(gradient) for _ in range(2)]
            dist.all_gather(both, found[name].contiguous())
            assert torch.equal(*both), f"{name} differs between the processes in step {step}"
    compiles = bool(part) and hidden_calls.follows_compiled()
    assert bool(PROGRAMS) == compiles, f"{len(PROGRAMS)} graphs with tangents"
    dist.barrier()
    dist.destroy_process_group()
    print(f"{case}: {STEPS} steps agree", flush=True)
    os._exit(0)  # gloo's threads now and then abort an interpreter that ends by itself


if __name__ == "__main__":
    main(sys.argv[1])
