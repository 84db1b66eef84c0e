"""Which optimiser trains which parameter: Muon for the matrices inside blocks, AdamW for
everything else.

Muon orthogonalises the update of a matrix (Jordan et al., 2024), which means something for a
linear map between features and nothing for an embedding, a table of tokens or the first and last
layer, whatever their shape. So a parameter is Muon's if it is the weight of a linear layer inside
one of the named containers, and only then.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowspace.errors import InputError
from flowspace.training.checkpoints import whole

__all__ = ["CombinedOptimizer", "MuonAdamW", "PlainAdamW", "assign", "readable"]

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What torch.compile, FSDP and activation checkpointing put into the names of parameters."""


def assign(network: nn.Module, inside: Sequence[str] = ("blocks",)) -> dict[str, list[str]]:
    """Return the names of the parameters that ``muon`` and ``adamw`` train, in the network's
    order.

    Args:
        network: any module, also compiled or wrapped for several processes.
        inside: names of the containers whose linear layers' weights are Muon's, as the network
            has them before it is wrapped.

    Raises:
        InputError: if a container has no linear layer, so that the split is not what it says.
    """
    modules = dict(network.named_modules())
    groups: dict[str, list[str]] = {"muon": [], "adamw": []}
    used = set()
    for name, parameter in network.named_parameters():
        owner, _, leaf = name.rpartition(".")
        linear = isinstance(modules[owner], nn.Linear)
        matrix = linear and leaf == "weight" and parameter.ndim == 2
        container = _container(name, inside)
        if matrix and container is not None:
            groups["muon"].append(name)
            used.add(container)
        else:
            groups["adamw"].append(name)
    for container in inside:
        if container not in used:
            raise InputError(
                f"the network has no linear layer inside {container!r}; name the containers of "
                "its blocks"
            )
    return groups


def _container(name: str, inside: Sequence[str]) -> str | None:
    """Return the container that a parameter lies in, whatever the network is wrapped in."""
    plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    # DistributedDataParallel's prefix; a network may have a child of that name itself.
    unwrapped = plain.removeprefix("module.")
    for container in inside:
        if plain.startswith(f"{container}.") or unwrapped.startswith(f"{container}."):
            return container
    return None


@dataclass(frozen=True)
class PlainAdamW:
    """Builds AdamW for all parameters.

    Args:
        learning_rate: at its peak.
        weight_decay: of every parameter.
        betas: its two averages.
        fused: whether one kernel updates all parameters; None: where all of them are real, on a
            CPU or on CUDA.
    """

    learning_rate: float = 8e-4
    weight_decay: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    fused: bool | None = None

    def __call__(self, network: nn.Module) -> "CombinedOptimizer":
        """Return the optimiser of a network's parameters that ask for a gradient."""
        held = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return CombinedOptimizer(_adamw(self, held))


@dataclass(frozen=True)
class MuonAdamW:
    """Builds both optimisers for a network, as one: what a training loop is given.

    Args:
        learning_rate: of both; Muon's update is scaled to the size of Adam's
            (``match_rms_adamw``), so one rate serves.
        weight_decay: of both.
        betas: of AdamW.
        momentum: of Muon.
        inside: see `assign`.
        fused: as in `PlainAdamW`; Muon has no such kernel.

    Raises:
        InputError: if the rate is not positive or the decay negative.
    """

    learning_rate: float = 8e-4
    weight_decay: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95
    inside: tuple[str, ...] = ("blocks",)
    fused: bool | None = None

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and self.weight_decay >= 0):
            raise InputError(
                f"got learning_rate = {self.learning_rate}, weight_decay = {self.weight_decay}; "
                "write > 0 and >= 0"
            )

    def __call__(self, network: nn.Module) -> "CombinedOptimizer":
        """Return the optimiser of a network's parameters that ask for a gradient."""
        parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        groups = assign(network, self.inside)
        matrices = [parameters[name] for name in groups["muon"] if name in parameters]
        others = [parameters[name] for name in groups["adamw"] if name in parameters]
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(
                matrices,
                lr=self.learning_rate,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            optimizers.append(muon)
        return CombinedOptimizer([*optimizers, *_adamw(self, others)])


def _adamw(
    settings: PlainAdamW | MuonAdamW, parameters: Sequence[Tensor]
) -> list[torch.optim.Optimizer]:
    """Return AdamW of some parameters; nothing where there are none."""
    if not parameters:
        return []
    fused = settings.fused
    if fused is None and all(_has_kernel(parameter) for parameter in parameters):
        fused = True
    adamw = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=fused,
    )
    return [adamw]


def _has_kernel(parameter: Tensor) -> bool:
    return parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()


class CombinedOptimizer(torch.optim.Optimizer):
    """Optimisers of disjoint parameters as one, with one group of parameters each.

    A step can be called off without waiting for the device, by the protocol that
    `torch.amp.GradScaler` has with fused optimisers: where ``found_inf``, a tensor, is set and not
    zero, `step` leaves weights, moments and step counts as they are, bit for bit::

        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.found_inf = ~norm.isfinite()
        optimizer.step()

    A ``grad_scale`` that is set divides the gradients first. Both hold until they are set again.
    On a CPU it is read; a fused optimiser does this in its kernel. Others keep a copy of one
    parameter and its state at a time while they step it; if they count steps on the CPU for
    parameters elsewhere, as AdamW with ``fused=False`` does, this does wait.

    Args:
        optimizers: of one group of parameters each; they are steered through this object alone.

    Raises:
        InputError: if there are no parameters, one belongs to two optimisers, or an optimiser has
            several groups.
    """

    found_inf: Tensor
    grad_scale: Tensor
    _step_supports_amp_scaling = True

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        parts = list(optimizers)
        groups = [group for part in parts for group in part.param_groups]
        held = [parameter for group in groups for parameter in group["params"]]
        if not held:
            raise InputError("no parameter asks for a gradient; there is nothing to optimise")
        if len(held) != len(set(held)):
            raise InputError(
                "a parameter is held by two optimisers; each parameter belongs to one"
            )
        if len(groups) != len(parts):
            raise InputError(
                f"got {len(groups)} groups of {len(parts)} optimisers; give one optimiser a group"
            )
        super().__init__(groups, {})
        for part in parts:
            self.state.update(part.state)
        self._parts = parts
        self._bind()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_parts": self._parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also called by load_state_dict, with new groups and state
        self._bind()

    def _bind(self) -> None:
        """Let every part step its own group, with the state that is kept here."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups = [group]
            part.state = self.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse new parameters: which optimiser trains them is decided at construction.

        Raises:
            InputError: always, once this object is made.
        """
        if hasattr(self, "_parts"):
            raise InputError(
                "a group cannot be added: nothing says which optimiser trains it; make a new "
                "optimiser for the network"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of each, unless ``found_inf`` calls it off.

        Args:
            closure: computes the loss and its gradients anew, once for all.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            self._unscale(scale)
        found_inf = getattr(self, "found_inf", None)
        for part in self._parts:
            if found_inf is None:
                part.step()
            else:
                _step_unless(whole(found_inf).reshape(()) != 0, part)
        return loss

    def _unscale(self, scale: Tensor) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = _local(parameter.grad)
                    gradient.div_(scale.to(gradient.device))


def _step_unless(skip: Tensor, optimizer: Any) -> None:
    """Step an optimiser of one group, which changes nothing where ``skip``, a boolean, is true."""
    if readable(skip):
        if not skip:
            optimizer.step()
        return
    (group,) = optimizer.param_groups
    if group.get("fused"):
        optimizer.found_inf = skip.float()  # the kernels compare with 1
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf
        return
    try:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            before = {}
            for name, tensor in _tensors(optimizer, parameter).items():
                before[name] = tensor.clone()
            optimizer.param_groups = [group | {"params": [parameter]}]
            optimizer.step()
            for name, tensor in _tensors(optimizer, parameter).items():
                new = _local(tensor)
                old = torch.zeros_like(new)  # as Muon's and AdamW's moments and counts begin
                if name in before:
                    old = _local(before[name])
                new.copy_(torch.where(skip.to(new.device), old, new))
    finally:
        optimizer.param_groups = [group]


def readable(tensor: Tensor) -> bool:
    """Return whether Python may read a tensor: nothing waits, and torch.compile captures nothing
    that depends on its value.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return a parameter and the tensors of its state."""
    tensors = {"": parameter.detach()}
    for slot, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor):
            tensors[slot] = value
    return tensors


def _local(tensor: Any) -> Tensor:
    """Return this process's part of a tensor that is shared out; a plain one as it is."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    return tensor
