"""What the loop trains: a network, its losses, and the rows that it reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from sections import TrainingConfig
from torch import Tensor, nn

from flowspace import CascadeOutput, InputError, LossOutput
from flowspace.training import AdversarialStep, Draws, Rows


@dataclass
class Losses:
    """What some rows cost.

    Attributes:
        terms: each ``(B,)``, as measured, with gradient.
        weights: of each; a number, or a detached tensor ``(B,)``.
        times: t, and s where there is one, of each row ``(B,)``: the log sorts the terms by them.
        made: what the network made of the rows ``(B, *)``, with gradient; None where the log need
            not say how strong the gradient of each term is, and there is no discriminator.
        real: what the discriminator is shown beside it; None where there is none.
    """

    terms: dict[str, Tensor]
    weights: dict[str, float | Tensor]
    times: dict[str, Tensor] = field(default_factory=dict)
    made: Tensor | None = None
    real: Tensor | None = None

    @classmethod
    def of_flow(cls, out: LossOutput | CascadeOutput, made: Tensor | None = None) -> "Losses":
        """Return what an objective alone costs, by t and s."""
        return cls({"flow": out.loss}, {"flow": 1.0}, {"t": out.t, "s": out.s}, made)

    @property
    def rows(self) -> Tensor:
        """The weighted sum of the terms, which is trained, ``(B,)`` in float32."""
        terms = list(self.weighted().values())
        return torch.stack(terms).sum(0)

    def weighted(self) -> dict[str, Tensor]:
        """Return each term times its weight."""
        found = {}
        for name, term in self.terms.items():
            found[name] = self.weights[name] * term.float()
        return found

    def shown(self) -> tuple[Tensor, Tensor]:
        """Return what a discriminator is shown: what was made, and what is real.

        Raises:
            InputError: if the losses do not say.
        """
        if self.made is None or self.real is None:
            raise InputError(
                "got losses without made or real, which the discriminator is shown; "
                "write Losses(terms, weights, times, made, real)"
            )
        return self.made, self.real

    def gradients(self) -> dict[str, Tensor]:
        """Return the norm of each weighted term's gradient at what was made, by row ``(B,)``.

        Nothing, where the losses do not say what was made.
        """
        norms: dict[str, Tensor] = {}
        if self.made is None:
            return norms
        for name, term in self.weighted().items():
            (gradient,) = torch.autograd.grad(
                term.sum(), self.made, retain_graph=True, allow_unused=True
            )
            norms[name] = torch.zeros_like(term)
            if gradient is not None:
                norms[name] = gradient.float().flatten(1).norm(dim=1)
        return norms


LossesOf = Callable[[nn.Module, Sequence[Tensor], Draws], Losses]
"""From a network, a batch and the draws of its rows to what they cost."""


class LookCallback(Protocol):
    """Looks at an averaged network."""

    def __call__(self, step: int, averaged: nn.Module) -> Mapping[str, float]:
        """Return numbers for the log."""
        ...

    def was(self, step: int) -> bool:
        """Whether a step was looked at before."""
        ...


@dataclass
class Stage:
    """One training.

    Attributes:
        name: what the progress bar and the log call it.
        network: is trained in place.
        losses: of some rows.
        rows: what is read.
        training: for how long, and how.
        folder: of its checkpoints and its log.
        optimizer: builds the optimiser of the network.
        depends: what else the weights depend on; a checkpoint of other settings is refused.
        flip: whether mirror images are trained too.
        workers: processes that read.
        adversary: trained beside the network.
        look: looks at the averaged network now and then; returns numbers for the log.
        begun: is called once what the folder holds is accepted as this training's.
        compiled: whether the network's blocks run compiled, and the derivative with them.
        offset: steps of the trainings before this one, for trackers, whose steps never fall.
    """

    name: str
    network: nn.Module
    losses: LossesOf
    rows: Rows
    training: TrainingConfig
    folder: Path
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    depends: Mapping[str, Any] = field(default_factory=dict)
    flip: bool = True
    workers: int = 0
    adversary: AdversarialStep | None = None
    look: LookCallback | None = None
    begun: Callable[[], None] | None = None
    compiled: bool = False
    offset: int = 0
