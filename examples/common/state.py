"""Everything of a training that changes from step to step, and what a checkpoint holds."""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from sections import TrainingConfig
from stage import Stage
from torch import Tensor, distributed, nn
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_

from flowspace import RunError
from flowspace.training import (
    Checkpoints,
    fill,
    flatten_optimizer,
    packed,
    restore_optimizer,
    share_of,
    unpacked,
    whole,
)
from flowspace.training.optimizers import readable

FREE = ("epochs", "steps", "checkpoint_every", "log_every", "look_every", "skips", "processes")
FREE += ("snapshots", "tensorboard", "wandb", "cpu", "sharded", "accumulate")
"""Settings that a run may go on with others of: its next step does not depend on them."""

AGREED_EVERY = 10
"""Steps after which several processes ask each other whether one was told to stop."""

GRAPHS = 32
"""Of one part: by stage, width, rows, gradients and tangents. What torch captured more often, or
more than 8 times where it is not told otherwise, runs uncompiled.
"""


class Run:
    """A stage that is being trained.

    Attributes:
        network: as it is called: under DDP, or sharded.
        averages: the averaged networks, by their decay.
        optimizer: of the network.
        shares: the first and last rows of each part of a batch that this process takes.
        step: that is taken.
        costs: of the parts of its batch so far: the loss of each row, and the times.
        loss: of the last step, the mean over all processes.
        norms: of its gradients, before they were clipped: the network's, the discriminator's.
        finite: 1 where the last step was, else 0.
        skipped: how many were not.
    """

    def __init__(self, stage: Stage, accelerator: Accelerator) -> None:
        self.stage = stage
        self.accelerator = accelerator
        t = stage.training
        rank = accelerator.process_index
        ranks = accelerator.num_processes
        device = accelerator.device
        self.shares = share_of(t.batch, rank, ranks, t.accumulate)
        self.step = 0
        self.costs: list[tuple[Tensor, Mapping[str, Tensor]]] = []
        self.loss = torch.zeros((), device=device)
        self.norms: list[Tensor] = []
        self.finite = torch.ones((), device=device)
        agree(stage.network, accelerator)
        self.plain = copy.deepcopy(stage.network)
        self.averages = {}
        for decay in t.emas:
            self.averages[str(decay)] = copy.deepcopy(stage.network)
        if stage.compiled:  # once it was copied: the copies only draw
            dynamo_config.recompile_limit = max(GRAPHS, dynamo_config.recompile_limit)
            # the log asks for each term's gradient before their sum's
            functorch_config.donated_buffer = False
            blocks: Any = stage.network
            blocks.compile_blocks()
        self.network = self.distributed()
        self.optimizer = stage.optimizer(stage.network)
        self.skipped = torch.zeros((), dtype=torch.long, device=device)
        self.named = 0
        self.fault: Tensor | None = None
        settings = {"name": stage.name, "training": kept_of(t), **stage.depends}
        self.checkpoints = Checkpoints(stage.folder, settings)

    def zero_grad(self) -> None:
        """Forget the gradients of both players."""
        for optimizer, _ in self.optimizers().values():
            optimizer.zero_grad(set_to_none=True)

    def update(self) -> None:
        """Step both players and the averages, unless a loss or a gradient is not finite.

        The device decides, and nothing waits for it: what is not finite changes nothing, and is
        read with the log.
        """
        parameters = list(self.stage.network.parameters())
        players: list[Any] = [(self.optimizer, parameters, self.stage.training.clip)]
        adversary = self.stage.adversary
        if adversary and adversary.plays(self.step):
            players.append((adversary.optimizer, adversary.heads, 1.0))
        self.norms = [whole(clip_grad_norm_(held, clip)) for _, held, clip in players]
        losses = torch.cat([loss for loss, _ in self.costs])
        mean: Any = self.accelerator.reduce(losses.mean(), "mean")
        self.loss = mean
        self.finite = torch.stack([self.loss, *self.norms]).isfinite().all().float()
        for optimizer, _, _ in players:
            optimizer.found_inf = 1 - self.finite
            optimizer.step()
        self.average()
        self.skipped += 1 - self.finite.long()
        times = {}
        for name in self.costs[0][1]:
            times[name] = torch.cat([of_part[name] for _, of_part in self.costs])
        self.note(losses, times)
        self.costs = []

    @torch.no_grad()
    def average(self) -> None:
        """Move each average towards the weights; its decay rises to its value in the first steps.

        torch's `AveragedModel` counts its updates on the CPU and copies the count to the device,
        for which it waits.
        """
        values = list(self.stage.network.parameters())
        for decay, network in self.averages.items():
            rising = (self.step + 1) / (self.step + 10)
            share = 1 - min(float(decay), rising)
            averages = list(network.parameters())
            if readable(self.finite):  # one pass in place of three
                torch._foreach_lerp_(averages, values, share * float(self.finite))
                continue
            towards = torch._foreach_sub(values, averages)
            torch._foreach_mul_(towards, share * self.finite)
            torch._foreach_add_(averages, towards)

    def distributed(self) -> nn.Module:
        """Return the network as it is called: on its device, under DDP, or sharded by FSDP2.

        accelerate would take a CPU's FSDP2 for DDP, and average what is not sharded yet.
        """
        accelerator = self.accelerator
        network = self.stage.network
        sharded = self.stage.training.sharded and accelerator.num_processes > 1
        for average in self.averages.values():
            average.to(accelerator.device)
            if sharded:
                shard(average, accelerator)
        if not sharded:
            return accelerator.prepare_model(network)
        return shard(network.to(accelerator.device), accelerator)

    def averaged(self, decay: str | None = None) -> nn.Module:
        """Return a whole copy of the network with averaged weights; all processes must call."""
        if decay is None:
            decay = next(iter(self.averages))
        average = self.averages[decay]
        state = {}
        for name, tensor in average.state_dict().items():
            state[name] = whole(tensor)
        self.plain.load_state_dict(state)
        self.plain.to(self.accelerator.device)
        return self.plain.requires_grad_(False).eval()

    def state(self) -> dict[str, Mapping[str, Tensor]]:
        """Return everything that the next step depends on, but for the optimisers'."""
        parts: dict[str, Mapping[str, Tensor]] = {"network": self.stage.network.state_dict()}
        for decay, average in self.averages.items():
            parts[f"ema-{decay}"] = average.state_dict()
        parts["run"] = {"skipped": self.skipped}
        if self.stage.adversary:
            parts["opponent"] = self.stage.adversary.kept()
        return parts

    def optimizers(self) -> dict[str, tuple[torch.optim.Optimizer, nn.Module]]:
        """Return the optimisers and whose parameters they hold, by the names of their states."""
        found = {"optimizer": (self.optimizer, self.stage.network)}
        adversary = self.stage.adversary
        if adversary:
            found["answering"] = (adversary.optimizer, adversary.discriminator)
        return found

    def save(self, step: int) -> None:
        """Write a checkpoint; all processes must call, the first one writes."""
        parts = self.state()
        for name, (optimizer, network) in self.optimizers().items():
            parts[name] = flatten_optimizer(optimizer, network)
        table = packed(parts, self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            self.checkpoints.save(step, table)
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Put back the latest checkpoint; return the step that comes next."""
        found = self.checkpoints.latest()
        if found is None:
            return 0
        step, table = found
        parts = unpacked(table)
        for name, state in self.state().items():
            kept = parts.get(name, {})
            fill(state, kept, self.stage.folder)
        for name, (optimizer, network) in self.optimizers().items():
            kept = parts.get(name, {})
            restore_optimizer(optimizer, network, kept)
        self.named = int(self.skipped)
        return step

    def note(self, rows: Tensor, times: Mapping[str, Tensor]) -> None:
        """Keep what a step that is not finite was, on the device: step, loss, norm, times."""
        worst = rows.isfinite().float().argmin(0, keepdim=True)
        # A row of another process may be the one that is not finite: then no time is named here.
        fine = rows.gather(0, worst)[0].isfinite()
        step = torch.full_like(self.loss, self.step)
        noted = [step, self.loss, self.norms[0]]
        for time in times.values():
            at = time.gather(0, worst)[0]
            noted.append(torch.where(fine, torch.nan, at))
        fault = torch.stack(noted)
        if self.fault is None:
            self.fault = torch.zeros_like(fault)
        self.fault = torch.where(self.finite.bool(), self.fault, fault)

    def check_finite(self) -> None:
        """Name a step that was skipped since the last check.

        Raises:
            RunError: if they are more than ``training.skips``.
        """
        now = int(self.skipped)
        if now == self.named or self.fault is None:
            return
        self.named = now
        step, loss, norm, *at = self.fault.tolist()
        text = f"the loss is {loss} at step {step:.0f}, its gradient's norm {norm}"
        named = []
        for name, time in zip("ts", at, strict=False):
            if math.isfinite(time):
                named.append(f"{name} = {time:.4g}")
        if named:
            text += f", at {', '.join(named)}"
        t = self.stage.training
        if now > t.skips:
            raise RunError(
                f"{text}; {now} steps were not finite, "
                f"more than training.skips = {t.skips}: "
                f"lower training.learning_rate = {t.learning_rate}"
            )
        warnings.warn(f"{text}; it is skipped ({now} so far)", stacklevel=2)

    def asked_to_stop(self, signals: Sequence[int]) -> bool:
        """Whether a process was asked to stop; several processes agree every few steps."""
        if self.accelerator.num_processes == 1:
            return bool(signals)
        if (self.step + 1) % AGREED_EVERY:
            return False
        mine = float(bool(signals))
        asked = torch.tensor(mine, device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum"))


def kept_of(training: TrainingConfig) -> dict[str, Any]:
    """Return the settings that a run goes on with alone.

    One that is not used is not kept: runs that began before there was one go on.
    """
    kept = {}
    for name, value in vars(training).items():
        if name not in FREE and value is not None:
            kept[name] = value
    return kept


@torch.no_grad()
def agree(network: nn.Module, accelerator: Accelerator) -> None:
    """Give every process the weights and buffers of the first one.

    DDP does so for the network that it is given, and for no copy; FSDP2 does not.
    """
    if accelerator.num_processes == 1:
        return
    for tensor in network.state_dict().values():
        sent = tensor.to(accelerator.device)
        distributed.broadcast(sent, 0)
        tensor.copy_(sent)


def shard(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Share out a network by FSDP2: each of its repeated blocks, and the rest."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    repeated = getattr(network, "_no_split_modules", None) or ()
    for module in list(network.modules()):
        if type(module).__name__ in repeated:
            fully_shard(module, mesh=mesh)
    return fully_shard(network, mesh=mesh)
