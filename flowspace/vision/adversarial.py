"""The adversarial loss: a hinge GAN whose discriminator is small heads on frozen features (as in
Sauer et al., arXiv 2111.01007).

The generator's weight falls with the noise as w(t) = alpha(t)^p, p = 1 by default: an image that
is mostly guessed cannot be judged as real. This is our reading of CrossFlow (arXiv 2606.19970).
Its text says that both losses are hinge losses (B.4), that the generator's is weighed by a
function of time of which three were tried (B.5), that a uniform weight "can overemphasize low-
signal regions", and that too large a weight lets samples collapse (figure 4). The functions are
missing from it. It also says that with a uniform weight "low-time samples" collapse (figure 6).
Where time runs from data to noise, as here and in its equations, low times have the most signal,
which contradicts the low-signal regions; where it runs the other way, as its appendix C says of
its toy program, the two agree, and with alpha(t)^p. Which is meant cannot be decided from the
text.

Ours and not the paper's: the heads and the layers that they judge, the changes of images, LeCam's
and R1's terms (off by default), and in the example's settings the loss's weight of 0.1 and the
step from which the discriminator is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from flowspace.errors import InputError
from flowspace.schedules import Schedule
from flowspace.vision.perceptual import FeatureNetwork

__all__ = ["CHANGES", "AdversarialLoss", "Discriminator", "augment", "balance", "tokens_of"]

CHANGES = 5
"""Numbers that `augment` needs for an image: brightness, saturation, contrast, two shifts."""

SLOPE = 0.2
"""Of the leaky ReLUs below 0, as usual in discriminators."""

SMALLEST_SLOPE = 1e-6
"""Added to the adversarial gradient's norm, which may vanish."""

LARGEST_BALANCE = 1e4
"""The bound of the adaptive weight, as in latent diffusion and RAE: where the adversarial gradient
vanishes it means nothing.
"""


class Discriminator(nn.Module):
    """Spectral-norm heads on the layers of frozen features: real is above 0, fake below.

    For distributed training, wrap it and call the wrapper where its own weights are trained, or
    their gradients are not synchronised.

    Args:
        features: frozen; only the heads are trained.
        channels: of each layer of the features, tokens ``(B, N, C)`` or maps ``(B, C, h, w)``.
        width: of the heads.
        kernel: of the heads' spatial convolution, odd.
    """

    def __init__(
        self, features: FeatureNetwork, channels: Sequence[int], width: int = 64, kernel: int = 9
    ) -> None:
        super().__init__()
        self.features: FeatureNetwork = features
        self.heads = nn.ModuleList(Head(count, width, kernel) for count in channels)

    def compile_network(self, **options: Any) -> "Discriminator":
        """Compile the frozen features in place; returns itself.

        The heads, which are small and whose spectral norms change with each step, stay as they
        are. The loss cannot have ``r1`` then: torch.compile has no second derivatives.

        Args:
            options: those of ``torch.compile``.
        """
        self.features.compile_network(**options)
        return self

    def train(self, mode: bool = True) -> "Discriminator":
        """Set the mode of the heads; the features stay in eval mode."""
        return super().train(mode)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, N)`` of images ``(B, 3, H, W)`` in [-1, 1], over all positions of
        all heads.
        """
        layers = self.features(images)
        if len(layers) != len(self.heads):
            raise InputError(
                f"the features have {len(layers)} layers for {len(self.heads)} heads; give "
                "channels of each"
            )
        logits = []
        for head, layer in zip(self.heads, layers, strict=True):
            tokens = tokens_of(layer)
            logits.append(head(tokens).flatten(1))
        return torch.cat(logits, 1)


class Head(nn.Module):
    """A pointwise layer, a residual convolution along the positions, a logit for each position."""

    def __init__(self, channels: int, width: int, kernel: int) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise InputError(
                f"got kernel = {kernel}; write an odd number, so that positions stay where they "
                "are"
            )
        self.first = spectral_norm(nn.Conv1d(channels, width, 1))
        self.kernel = kernel
        self.second = spectral_norm(nn.Conv1d(width, width, kernel))
        self.last = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(B, C, N)`` to ``(B, 1, N)``."""
        channels = tokens.shape[1:2]
        x = F.layer_norm(tokens.mT, channels).mT
        x = F.leaky_relu(self.first(x), SLOPE)
        around = F.leaky_relu(self.second(self._padded(x)), SLOPE)
        x = (x + around) / 2**0.5
        return self.last(x)

    def _padded(self, x: Tensor) -> Tensor:
        """Continue the positions at both ends as on a circle, by half of the kernel."""
        count, half = x.shape[2], self.kernel // 2
        places = torch.arange(-half, count + half, device=x.device)
        return x[:, :, places % count]


def tokens_of(layer: Tensor) -> Tensor:
    """Return features as ``(B, C, N)``: of a map ``(B, C, h, w)``, or of tokens ``(B, N, C)``."""
    if layer.ndim == 4:
        return layer.flatten(2)
    if layer.ndim == 3:
        return layer.mT
    return layer.unsqueeze(2)


@dataclass(frozen=True)
class AdversarialLoss:
    """Hinge losses of both players (Lim & Ye, arXiv 1705.02894).

    Args:
        schedule: whose alpha weighs the generator's loss.
        power: p of w(t) = alpha(t)^p, at least 0; 0 weighs all times alike. See the module's text
            for what is known of the paper's.
        augmented: the same random changes for real and fake images (DiffAug, Zhao et al., arXiv
            2006.10738).
        penalty: weight of LeCam's regularisation towards the other side's mean logit (arXiv
            2104.03310); 0 leaves it out.
        r1: weight of the squared gradient at real images (Mescheder et al., arXiv 1801.04406); 0
            leaves it out.

    Raises:
        InputError: if a number is negative.
    """

    schedule: Schedule
    power: float = 1.0
    augmented: bool = True
    penalty: float = 0.0
    r1: float = 0.0
    changes: ClassVar[int] = CHANGES

    def __post_init__(self) -> None:
        for name in ("power", "penalty", "r1"):
            value = getattr(self, name)
            if not value >= 0:
                raise InputError(f"got {name} = {value}; write 0 or more")

    def weight(self, t: Tensor) -> Tensor:
        """Return w(t) = alpha(t)^p, of t's shape."""
        return self.schedule.alpha(t).clamp(min=0) ** self.power

    def opinion(
        self, discriminator: nn.Module, fake: Tensor, changes: Tensor | None = None
    ) -> Tensor:
        """Return what the generator's loss of each row ``(B,)`` is before w(t): minus the mean
        logit.
        """
        if self.augmented:
            fake = augment(fake, changes)
        return -discriminator(fake).mean(1)

    def generator(
        self, discriminator: nn.Module, fake: Tensor, t: Tensor, changes: Tensor | None = None
    ) -> Tensor:
        """Return the generator's loss of each row ``(B,)``, -w(t) mean logit; the discriminator's
        own gradient is unused.
        """
        opinion = self.opinion(discriminator, fake, changes)
        weight = self.weight(t).to(opinion.dtype)
        return weight * opinion

    def discriminator(
        self, discriminator: nn.Module, real: Tensor, fake: Tensor, changes: Tensor | None = None
    ) -> Tensor:
        """Return the discriminator's loss of each row ``(B,)``, half of both hinges, in one call
        of it.

        Args:
            discriminator: called once, on real and fake images together, so that a wrapper
                synchronises one gradient.
            real: images in [-1, 1].
            fake: images of the generator; detached, clamped to [-1, 1] and rounded to 255 levels,
                as stored images are.
            changes: see `augment`; a real and a fake image of one row are changed alike.
        """
        levels = (fake.detach().clamp(-1, 1) + 1) * 127.5
        stored = levels.round() / 127.5 - 1
        real = real.detach().requires_grad_(self.r1 > 0)
        images = torch.cat([real, stored])
        if self.augmented:
            if changes is not None:
                changes = torch.cat([changes, changes])
            images = augment(images, changes)
        on_real, on_fake = discriminator(images).chunk(2)
        real_hinge = F.relu(1 - on_real).mean(1)
        fake_hinge = F.relu(1 + on_fake).mean(1)
        loss = 0.5 * (real_hinge + fake_hinge)
        if self.penalty:
            real_apart = on_real - on_fake.mean().detach()
            fake_apart = on_fake - on_real.mean().detach()
            apart = real_apart.square() + fake_apart.square()
            loss = loss + self.penalty * apart.mean(1)
        if self.r1:
            logits = on_real.mean(1).sum()
            (slope,) = torch.autograd.grad(logits, real, create_graph=True)
            loss = loss + self.r1 / 2 * slope.square().flatten(1).sum(1)
        return loss


def augment(images: Tensor, changes: Tensor | None = None) -> Tensor:
    """Shift by up to an eighth, change brightness, saturation and contrast: DiffAug without
    cutout, differentiable.

    Args:
        images: ``(B, 3, H, W)``.
        changes: how each image is changed, ``(B, 5)`` in [0, 1); None draws them.
    """
    rows, _, height, width = images.shape
    if changes is None:
        changes = torch.rand(rows, CHANGES, device=images.device)
    unit = changes.to(images.dtype).mT.reshape(CHANGES, rows, 1, 1, 1)
    brightness, saturation, contrast, vertical, horizontal = unit
    x = images + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + 2 * saturation * (x - grey)
    middle = x.mean((1, 2, 3), keepdim=True)
    x = middle + (0.5 + contrast) * (x - middle)
    down = _shift(vertical, height)
    right = _shift(horizontal, width)
    return _shifted(x, down, right)


def _shift(unit: Tensor, side: int) -> Tensor:
    """Return shifts ``(B, 1)`` by up to an eighth of a side, from numbers in [0, 1)."""
    shift = (2 * unit.flatten(1) - 1) * side / 8
    return shift.round().long()


def _shifted(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Read each image at pixels that lie ``down`` and ``right`` of its own, ``(B, 1)``; 0 where
    there are none.
    """
    rows, _, height, width = x.shape
    batch = torch.arange(rows, device=x.device)[:, None, None]
    row = torch.arange(height, device=x.device) + down
    column = torch.arange(width, device=x.device) + right
    row, column = row[:, :, None], column[:, None, :]
    nearest_row = row.clamp(0, height - 1)
    nearest_column = column.clamp(0, width - 1)
    channels_last = x.movedim(1, -1)
    moved = channels_last[batch, nearest_row, nearest_column]
    inside = (nearest_row == row) & (nearest_column == column)
    return torch.where(inside[:, None], moved.movedim(-1, 1), 0.0)


def balance(main: Tensor, adversarial: Tensor, images: Tensor) -> Tensor:
    """Return the adaptive weight |grad main| / |grad adversarial| of each row ``(B,)``, detached,
    at most `LARGEST_BALANCE`.

    Esser et al. (arXiv 2012.09841) compare the gradients of the last layer's weights over a batch.
    Here each row's are compared at its image, so that the weight depends neither on the other rows
    nor on how they are shared out, and weights may be sharded.

    Args:
        main: the other losses of each row ``(B,)``.
        adversarial: the adversarial loss of each row ``(B,)``, before w(t).
        images: that both judge, ``(B, 3, H, W)``.
    """
    ratio = _steepness(main, images) / (_steepness(adversarial, images) + SMALLEST_SLOPE)
    return ratio.clamp(max=LARGEST_BALANCE)


def _steepness(loss: Tensor, images: Tensor) -> Tensor:
    """Return the norm of the gradient of each row's loss at its image, ``(B,)``."""
    (slope,) = torch.autograd.grad(loss.sum(), images, retain_graph=True)
    return slope.float().flatten(1).norm(dim=1)
