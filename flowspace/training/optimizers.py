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

__all__ = ["MuonAdamW", "PlainAdamW", "Together", "assign"]


def assign(network: nn.Module, inside: Sequence[str] = ("blocks",)) -> dict[str, list[str]]:
    """Return the names of the parameters that ``muon`` and ``adamw`` train, in the network's
    order.

    Args:
        network: any module.
        inside: names of the containers whose linear layers' weights are Muon's.

    Raises:
        InputError: if a container has no linear layer, so that the split is not what it says.
    """
    modules = dict(network.named_modules())
    found: dict[str, list[str]] = {"muon": [], "adamw": []}
    for name, parameter in network.named_parameters():
        owner, _, leaf = name.rpartition(".")
        matrix = isinstance(modules[owner], nn.Linear) and leaf == "weight" and parameter.ndim == 2
        within = any(name.startswith(f"{container}.") for container in inside)
        found["muon" if matrix and within else "adamw"].append(name)
    for container in inside:
        if not any(name.startswith(f"{container}.") for name in found["muon"]):
            raise InputError(
                f"the network has no linear layer inside {container!r}; name the containers of "
                "its blocks"
            )
    return found


@dataclass(frozen=True)
class PlainAdamW:
    """Builds AdamW for all parameters.

    Args:
        learning_rate: at its peak.
        weight_decay: of every parameter.
        betas: its two averages.
    """

    learning_rate: float = 8e-4
    weight_decay: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)

    def __call__(self, network: nn.Module) -> torch.optim.Optimizer:
        """Return the optimiser of a network's parameters that ask for a gradient."""
        held = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(
            held, self.learning_rate, self.betas, weight_decay=self.weight_decay
        )


@dataclass(frozen=True)
class MuonAdamW:
    """Builds both optimisers for a network: what a training loop is given.

    Args:
        learning_rate: of both; Muon's update is scaled to the size of Adam's
            (``match_rms_adamw``), so one rate serves.
        weight_decay: of both.
        betas: of AdamW.
        momentum: of Muon.
        inside: see `assign`.

    Raises:
        InputError: if the rate is not positive or the decay negative, or torch has no Muon, which
            came with 2.9.
    """

    learning_rate: float = 8e-4
    weight_decay: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95
    inside: tuple[str, ...] = ("blocks",)

    def __post_init__(self) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise InputError(
                f"torch {torch.__version__} has no torch.optim.Muon; install torch 2.9 or newer"
            )
        if not (self.learning_rate > 0 and self.weight_decay >= 0):
            raise InputError(
                f"learning_rate = {self.learning_rate}, weight_decay = {self.weight_decay} came; "
                "write > 0 and >= 0"
            )

    def __call__(self, network: nn.Module) -> "Together":
        """Return the optimisers of a network's parameters that ask for a gradient."""
        parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        names = {
            key: [parameters[name] for name in group if name in parameters]
            for key, group in assign(network, self.inside).items()
        }
        muon = torch.optim.Muon(
            names["muon"],
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        adamw = torch.optim.AdamW(
            names["adamw"], lr=self.learning_rate, weight_decay=self.weight_decay, betas=self.betas
        )
        return Together([muon, adamw])


class Together:
    """Several optimisers of disjoint parameters as one: step, zero_grad, param_groups, state."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        held = [parameter for group in self.param_groups for parameter in group["params"]]
        if len(held) != len(set(held)):
            raise InputError(
                "a parameter is held by two optimisers; each parameter belongs to one"
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all, whose rates may be set."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """The state of each parameter, of whichever optimiser holds it."""
        return {
            parameter: slots
            for optimizer in self.optimizers
            for parameter, slots in optimizer.state.items()
        }

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Take one step of each."""
        if closure is not None:
            raise InputError(
                "a closure came; these optimisers evaluate nothing again: call step()"
            )
        for optimizer in self.optimizers:
            optimizer.step()

    def put(self, parameter: Tensor, slot: str, value: Tensor) -> None:
        """Set one slot of a parameter's state in the optimiser that holds it."""
        for optimizer in self.optimizers:
            if any(
                parameter is held for group in optimizer.param_groups for held in group["params"]
            ):
                optimizer.state[parameter][slot] = value
                return
        raise InputError("the parameter belongs to none of the optimisers")
