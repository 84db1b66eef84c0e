"""Terms of one training step of an image model: flow, perceptual and adversarial."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowspace.objectives import Objective
from flowspace.training import Draws, Game, Terms
from flowspace.vision.adversarial import CHANGES, AdversarialLoss, Discriminator, balance
from flowspace.vision.perceptual import PerceptualLoss, literal_pair

__all__ = ["Adversarial", "Autoencoding", "FlowStep", "Made", "Perceptual", "ReconstructionStep"]

NOISE, TIMES, DROPPED, REAL_CHANGES, FAKE_CHANGES, POSTERIOR = range(6)
"""Streams of random numbers of a step."""


@dataclass(frozen=True)
class Made:
    """What a network made of a batch.

    Attributes:
        terms: its losses so far.
        images: made, ``(B, 3, H, W)``, with gradient.
        real: the images of the batch.
        t: the noise of each row ``(B,)``.
    """

    terms: Terms
    images: Tensor
    real: Tensor
    t: Tensor


Make = Callable[[nn.Module, Sequence[Tensor], Draws], Made]


@dataclass(frozen=True)
class Perceptual:
    """A perceptual term.

    Args:
        loss: the distance.
        weight: of it.
        literal: compare what the paper writes, f + (b/a) sg(D_t f) with the image, instead of
            prediction and target.
    """

    loss: PerceptualLoss
    weight: float
    literal: bool = False


@dataclass(frozen=True)
class FlowStep:
    """A cross-space objective on latents and images, with perceptual terms.

    Args:
        objective: such as `CrossFlowLoss`.
        encode: from images ``(B, 3, H, W)`` to latents; None where the batch brings both, latents
            first.
        perceptual: terms by name.
        drop: the share of labels that are replaced by ``null``, for guidance.
        null: the label of no class.
        across: whether the network returns images; False trains one that stays in the latents'
            space.
    """

    objective: Objective
    encode: Callable[[Tensor], Tensor] | None
    perceptual: Mapping[str, Perceptual] = field(default_factory=dict)
    drop: float = 0.0
    null: int = 0
    across: bool = True

    def __call__(self, network: nn.Module, batch: Sequence[Tensor], draws: Draws) -> Made:
        """Return what the network made of (images, labels) or (latents, images, labels)."""
        *latents, images, labels = batch
        z = latents[0] if self.encode is None else self.encode(images)
        noise = draws.rows(
            lambda rows, g: torch.randn(rows, *z.shape[1:], generator=g, device=draws.device),
            NOISE,
        )
        t, s = draws.rows(
            lambda rows, g: self.objective.times(  # type: ignore[misc]
                rows, generator=g, device=draws.device
            ),
            TIMES,
        )
        if self.drop:
            gone = (
                draws.rows(
                    lambda rows, g: torch.rand(rows, generator=g, device=draws.device), DROPPED
                )
                < self.drop
            )
            labels = torch.where(gone, self.null, labels)
        out = self.objective(
            network,
            z,
            images if self.across else None,
            cond={"labels": labels},
            noise=noise,
            t=t,
            s=s,
        )
        raw = {"flow": out.loss}
        weights = {"flow": 1.0}
        for name, term in self.perceptual.items():
            pair = (
                literal_pair(self.objective, out, images)
                if term.literal
                else (out.prediction, out.target)
            )
            raw[name], weights[name] = term.loss(*pair, out.t), term.weight
        parts = {name: weights[name] * value for name, value in raw.items()}
        return Made(Terms(parts, raw, {"t": t, "s": s}, out.prediction), out.prediction, images, t)

    def loss(self, network: nn.Module, batch: Sequence[Tensor], draws: Draws) -> Terms:
        """Return the terms alone: the loss of a loop without an opponent."""
        return self(network, batch, draws).terms


@dataclass(frozen=True)
class ReconstructionStep:
    """Stage 1: an `Autoencoding` network by absolute error, the divergence of its posterior, and
    perceptual terms.

    Args:
        kl: weight of the divergence from a standard normal, per element of the latent.
        perceptual: terms by name.
    """

    kl: float = 1e-4
    perceptual: Mapping[str, Perceptual] = field(default_factory=dict)

    def __call__(self, network: nn.Module, batch: Sequence[Tensor], draws: Draws) -> Made:
        """Return the reconstruction of (images, ...), and its losses."""
        images = batch[0]
        posterior, made = network(images, draws, POSTERIOR)
        raw = {
            "reconstruction": (made - images).abs().flatten(1).mean(1),
            "kl": posterior.kl() / posterior.mean[0].numel(),
        }
        weights = {"reconstruction": 1.0, "kl": self.kl}
        for name, term in self.perceptual.items():
            raw[name], weights[name] = term.loss(made, images), term.weight
        parts = {name: weights[name] * value for name, value in raw.items()}
        return Made(Terms(parts, raw, {}, made), made, images, images.new_zeros(len(images)))

    def loss(self, network: nn.Module, batch: Sequence[Tensor], draws: Draws) -> Terms:
        """Return the terms alone."""
        return self(network, batch, draws).terms


class Autoencoding(nn.Module):
    """One of diffusers' autoencoders as one call, from images to the posterior and a
    reconstruction of a draw of it.
    """

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor, draws: Draws, stream: int) -> tuple[Any, Tensor]:
        """Return the posterior and the reconstruction ``(B, 3, H, W)``."""
        posterior = self.autoencoder.encode(images).latent_dist  # type: ignore[operator]
        shape = posterior.mean.shape[1:]
        noise = draws.rows(
            lambda rows, g: torch.randn(rows, *shape, generator=g, device=draws.device), stream
        )
        return posterior, self.autoencoder.decode(posterior.mean + posterior.std * noise).sample  # type: ignore[operator]


class Adversarial(Game):
    """Adds a discriminator to a step: a `Game` for the training loop.

    Args:
        make: the step.
        judge: both players' losses.
        discriminator: the opponent; only its heads are trained.
        weight: of the generator's adversarial term.
        start: the step from which the discriminator is trained and, one step later, heard.
        learning_rate: of the heads, by AdamW.
        adaptive: also weigh it by `balance`, so that its gradient at an image is as long as the
            other terms'.
    """

    def __init__(
        self,
        make: Make,
        judge: AdversarialLoss,
        discriminator: Discriminator,
        weight: float,
        start: int = 0,
        learning_rate: float = 2e-4,
        adaptive: bool = False,
    ) -> None:
        self.make, self.judge, self.weight, self.start = make, judge, weight, start
        self.opponent = discriminator
        self.learning_rate, self.adaptive = learning_rate, adaptive

    def kept(self) -> dict[str, Tensor]:
        """Return the heads' tensors: the frozen features are loaded, not kept."""
        return {
            k: v for k, v in self.opponent.state_dict().items() if not k.startswith("features.")
        }

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Build the heads' AdamW, with the betas of GANs."""
        heads = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(heads, self.learning_rate, (0.0, 0.99), weight_decay=0.0)

    def loss(
        self, network: nn.Module, opponent: nn.Module, batch: Sequence[Tensor], draws: Draws
    ) -> Terms:
        """Return the step's terms and, once the discriminator has begun, its opinion."""
        made = self.make(network, batch, draws)
        parts, raw = dict(made.terms.parts), dict(made.terms.raw)
        if draws.step > self.start:
            changes = self._changes(draws, FAKE_CHANGES)
            opinion = self.judge.opinion(opponent, made.images, changes)
            factor = balance(made.terms.rows, opinion, made.images) if self.adaptive else 1.0
            raw["adversarial"] = self.judge.weight(made.t).to(opinion.dtype) * opinion
            parts["adversarial"] = self.weight * factor * raw["adversarial"]
        return Terms(
            parts, raw, made.terms.times, made.terms.prediction, (made.real, made.images.detach())
        )

    def answer(self, opponent: nn.Module, terms: Terms, draws: Draws) -> Tensor:
        """Return the discriminator's loss of each row."""
        real, made = terms.shown
        return self.judge.discriminator(opponent, real, made, self._changes(draws, REAL_CHANGES))

    @staticmethod
    def _changes(draws: Draws, stream: int) -> Tensor:
        return draws.rows(
            lambda rows, g: torch.rand(rows, CHANGES, generator=g, device=draws.device), stream
        )
