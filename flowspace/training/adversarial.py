"""The adversarial step: a discriminator that is trained beside a generator, in turns.

No gradient of the generator's loss reaches the discriminator's weights, and none of the
discriminator's reaches the generator. Both players see the same rows of a batch, changed by draws
of (seed, step, row).
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from flowspace.training.draws import Draws
from flowspace.training.optimizers import PlainAdamW

__all__ = ["AdversarialStep"]

REAL_CHANGES, FAKE_CHANGES = 3, 4
"""Streams of the draws by which real and made images are changed."""


class Judgement(Protocol):
    """The losses of both players, such as `AdversarialLoss`."""

    changes: int

    def weight(self, t: Tensor) -> Tensor:
        """Return w(t)."""
        ...

    def opinion(self, discriminator: nn.Module, fake: Tensor, changes: Tensor | None) -> Tensor:
        """Return the generator's loss of each row, before w(t)."""
        ...

    def discriminator(
        self, discriminator: nn.Module, real: Tensor, fake: Tensor, changes: Tensor | None
    ) -> Tensor:
        """Return the discriminator's loss of each row."""
        ...


class AdversarialStep:
    """Both losses of a generator and a discriminator at one step.

    Args:
        discriminator: only its heads, the parameters that ask for a gradient, are trained.
        loss: of both players.
        wrap: returns the discriminator as it is called for its own loss, such as under DDP.
        start: the step from which the discriminator is trained and, one step later, heard.
        learning_rate: of the heads, by AdamW with the betas of GANs.

    Attributes:
        optimizer: of the heads.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        loss: Judgement,
        wrap: Callable[[nn.Module], Any] = lambda network: network,
        *,
        start: int = 0,
        learning_rate: float = 2e-4,
    ) -> None:
        self.discriminator = discriminator
        self.loss = loss
        self.start = start
        self.heads = [p for p in discriminator.parameters() if p.requires_grad]
        self.optimizer = PlainAdamW(learning_rate, 0.0, (0.0, 0.99))(discriminator)
        self.wrapped = wrap(discriminator)

    def plays(self, step: int) -> bool:
        """Whether the discriminator is trained at a step."""
        return step >= self.start

    def opinion(self, made: Tensor, draws: Draws) -> Tensor | None:
        """Return what the generator is told of each of its images, ``(B,)``, before w(t).

        Args:
            made: images ``(B, 3, H, W)``, with gradient.
            draws: of the step; before the discriminator was trained, None is returned.
        """
        if draws.step <= self.start:
            return None
        changes = self._changes(draws, FAKE_CHANGES)
        for head in self.heads:
            head.requires_grad_(False)
        try:
            return self.loss.opinion(self.discriminator, made, changes)
        finally:
            for head in self.heads:
                head.requires_grad_(True)

    def answer(self, real: Tensor, made: Tensor, draws: Draws) -> Tensor:
        """Return the discriminator's loss of each row ``(B,)``; the images are detached."""
        changes = self._changes(draws, REAL_CHANGES)
        return self.loss.discriminator(self.wrapped, real, made.detach(), changes)

    def kept(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint holds: the frozen features are loaded again."""
        state = self.discriminator.state_dict()
        return {name: value for name, value in state.items() if not name.startswith("features.")}

    def _changes(self, draws: Draws, stream: int) -> Tensor:
        return draws.uniform((self.loss.changes,), stream)
