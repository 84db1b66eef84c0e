"""Where a run runs: in one process, or in several that share every batch."""

import abc
import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flowspace.errors import RunError
from flowspace.training.checkpoints import alike, whole

__all__ = ["OneProcess", "Place", "Processes", "put", "whole"]


class Place(abc.ABC):
    """The processes of a run and the device of this one.

    Attributes:
        rank: the number of this process.
        ranks: how many there are.
        device: where this one computes.
    """

    rank: int = 0
    ranks: int = 1
    device: torch.device

    @abc.abstractmethod
    def wrap(self, network: nn.Module, sharded: bool = False) -> nn.Module:
        """Return the network on its device, called and differentiated by all processes together.

        Args:
            network: changed in place.
            sharded: whether it may be shared out, where the place does so at all; else each
                process has all of it.
        """

    @abc.abstractmethod
    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over the processes."""

    @abc.abstractmethod
    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, in their order."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Wait for all processes."""

    def quiet(self, wrapped: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which a backward pass does not exchange the gradients."""
        return getattr(wrapped, "no_sync", contextlib.nullcontext)()

    def range(self, batch: int, parts: int) -> list[tuple[int, int]]:
        """Return the first and last rows of a batch that this process takes, in so many parts.

        Raises:
            RunError: if the batch cannot be shared equally.
        """
        shares = self.ranks * parts
        if batch % shares:
            raise RunError(
                f"batch = {batch} came for {self.ranks} process(es) with accumulate = {parts}; "
                f"write a multiple of {shares}"
            )
        size = batch // shares
        return [
            ((self.rank * parts + p) * size, (self.rank * parts + p + 1) * size)
            for p in range(parts)
        ]


class OneProcess(Place):
    """This process alone.

    Args:
        device: where it computes; None takes the networks where they are.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.given = None if device is None else torch.device(device)
        self.device = self.given or torch.device("cpu")

    def wrap(self, network: nn.Module, sharded: bool = False) -> nn.Module:
        """Return the network itself, on the device."""
        if self.given is None:
            self.device = next(network.parameters()).device
        return network.to(self.device)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows."""
        return rows

    def wait(self) -> None:
        """Wait for nobody."""


class Processes(Place):
    """The processes that ``torchrun`` or ``accelerate launch`` started, by accelerate; one where
    none was started.

    Args:
        expected: how many there must be; None takes what there is. `accelerate launch --cpu`
            starts one whatever it is told.
        sharded: share out the weights, gradients and optimiser states of networks that may be
            (FSDP2); else DDP.
        cpu: stay on the CPU.

    Raises:
        RunError: if another number of processes runs.
    """

    def __init__(
        self, expected: int | None = None, sharded: bool = False, cpu: bool = False
    ) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=cpu or not torch.cuda.is_available())
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.device, self.sharded = self.accelerator.device, sharded
        if expected is not None and self.ranks != expected:
            raise RunError(
                f"{self.ranks} process(es) run, {expected} are expected; start them with: "
                "torchrun --nproc_per_node "
                f"{expected} -m flowspace.cli train ..."
            )

    def wrap(self, network: nn.Module, sharded: bool = False) -> nn.Module:
        """Return the network under DDP, or sharded by FSDP2: each of its repeated blocks, and the
        rest.
        """
        if not (sharded and self.sharded and self.ranks > 1):
            return self.accelerator.prepare_model(network)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        network.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.ranks,))
        blocks = getattr(network, "_no_split_modules", None) or ()
        for part in (
            *(module for module in network.modules() if type(module).__name__ in blocks),
            network,
        ):
            fully_shard(part, mesh=mesh)
        return network

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over the processes."""
        return self.accelerator.reduce(tensor, "mean")  # type: ignore[return-value]

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes."""
        return self.accelerator.gather(rows)  # type: ignore[return-value]

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()


def put(into: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be shared out."""
    with torch.no_grad():
        into.copy_(alike(value.to(into.device), into))


def norm_of(parameters: Iterable[Tensor], largest: float) -> Tensor:
    """Clip the gradients to the largest norm and return the norm that they had."""
    return whole(nn.utils.clip_grad_norm_(parameters, largest))
