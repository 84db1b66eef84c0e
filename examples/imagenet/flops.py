"""What a config costs on paper: its generator, what stands beside it, and the whole training.

A training step of a generator is its forward pass, twice that for the gradient, and one more
forward pass' products for the derivative, on the rows that need it. A multiply-add is two FLOPs
(`counting`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

# first: it finds examples/common, of which the others import
from settings import (
    AdversarialConfig,
    EncoderConfig,
    GeneratorConfig,
    ImageNetConfig,
    ObjectiveConfig,
    PerceptualConfig,
)

# isort: split
import build
import torch
from autoencoders import Encoding, autoencoder
from counting import Call, counted, one_row, pictures, products_of
from torch import nn

from flowspace import ConsistencyLoss, TimePairs
from flowspace.vision import CrossFlowGenerator

__all__ = [
    "IMAGENET",
    "PEAK",
    "Cost",
    "Share",
    "alone",
    "cost_of",
    "generator_cost",
    "utilisation",
]

IMAGENET = 1_281_167
"""Images of ImageNet's training set."""

PEAK = 989e12
"""FLOP/s of an H100 in dense bfloat16, as its data sheet has it."""

MUON_STATES, ADAMW_STATES = 1, 2
"""Numbers that each optimiser keeps for a parameter."""

ACTIVATIONS_PER_TOKEN = 34
"""Numbers that one block keeps for each token and unit of width in a training step.

With fused attention and a SwiGLU of 8/3: about 14 for attention (norm, q, k, v, the norms of q and
k, output) and 20 for the MLP; after Korthikanti et al., arXiv 2205.05198.
"""


@dataclass(frozen=True)
class Share:
    """What something beside the generator adds to the costs of its training.

    Attributes:
        name: of the network, or of the other training.
        parameters: how many numbers.
        flops: of one image, or of the whole training.
    """

    name: str
    parameters: int
    flops: float


@dataclass(frozen=True)
class Cost:
    """What a generator and its training cost.

    Attributes:
        name: of the preset or of the config.
        parameters: how many numbers.
        matrices: how many of them Muon trains; the rest is AdamW's.
        forward: FLOPs of one image, forward.
        activations: bytes that one image of a training step keeps, in bfloat16.
        attention: how many of them are attention's own products.
        equal: the share of rows with s = t, which need no derivative.
        boundary: losses of one more evaluation, with its gradient, such as consistency's.
        again: forward passes that checkpointing runs again for each gradient.
        averages: of the weights, that are kept beside them.
        kind: of its image, as ``results.PublishedMethod.family`` has it.
        size: of its image, in pixels a side.
        evaluations: of the network for one image.
        decoder: FLOPs of the decoder for one image; 0 where the network returns images.
        images: that the whole training sees.
        networks: frozen ones that a training step also runs, by the FLOPs of one image.
        trainings: that come before, such as stage 1, and what is computed once, by all its FLOPs.
    """

    name: str
    parameters: int
    matrices: int
    forward: float
    activations: float
    attention: float = 0.0
    equal: float = 0.5
    boundary: int = 0
    again: int = 0
    averages: int = 3
    kind: str = "1-NFE latent-to-pixel"
    size: int = 256
    evaluations: int = 1
    decoder: float = 0.0
    images: float = 160 * IMAGENET
    networks: tuple[Share, ...] = ()
    trainings: tuple[Share, ...] = ()

    @property
    def generator_step(self) -> float:
        """FLOPs of one image in the generator's part of a training step."""
        with_gradient, derivative = 3 + self.again, 1 - self.equal
        return (with_gradient * (1 + self.boundary) + derivative) * self.forward

    @property
    def step(self) -> float:
        """FLOPs of one image in a training step, frozen networks included."""
        return self.generator_step + sum(network.flops for network in self.networks)

    @property
    def training(self) -> float:
        """FLOPs of everything that is trained."""
        before = sum(training.flops for training in self.trainings)
        return self.images * self.step + before

    def memory(self, batch: int, devices: int = 1) -> float:
        """Return the bytes on one device, the frozen networks left out.

        They are weights, gradients, averages and states of the optimisers in float32, and the
        activations.

        Args:
            batch: images on one device.
            devices: that share out (FSDP2) all but the activations; 1: each holds all (DDP).
        """
        others = self.parameters - self.matrices
        states = MUON_STATES * self.matrices + ADAMW_STATES * others
        numbers = self.parameters * (2 + self.averages) + states
        return 4 * numbers / devices + batch * self.activations

    def hours(self, utilisation: float, peak: float = PEAK) -> float:
        """Return the device-hours of everything that is trained.

        Args:
            utilisation: the share of the peak that the training reaches.
            peak: of one device, in FLOP/s.
        """
        return self.training / (peak * utilisation) / 3600


# --- what a config costs -----------------------------------------------------------------------

PERCEPTUAL_PASSES = 3
"""Of a perceptual network: forward on the prediction, back to it, forward on the target.

Its weights have no gradient.
"""

ADVERSARIAL_PASSES = 4
"""Of the discriminator's features: forward on the prediction and back to it, then forward on the
real and the made image.
"""

ADAPTIVE_PASSES = 1
"""More of each image loss, backward, where their gradients are compared at the image."""


def alone(generator: GeneratorConfig, equal: float = 0.5) -> ImageNetConfig:
    """Return the config of a generator alone, of which a share of the rows has s = t."""
    return ImageNetConfig(
        name=generator.preset or "these sizes",
        out=Path("runs"),
        encoder=EncoderConfig(name="va-vae"),
        generator=generator,
        objective=ObjectiveConfig(equal=equal),
    )


def generator_cost(config: ImageNetConfig) -> Cost:
    """Count the generator of a config and nothing beside it.

    Raises:
        InputError: if there is no preset of its name.
    """
    with torch.device("meta"):
        network = build.generator_of(config, config.data.classes or 1000)
    parameters, products = products_of(partial(one_row, network))
    matrices = [each for each in network.blocks.parameters() if each.ndim == 2]
    objective = build.objective_of(config)
    equal = 0.0
    if isinstance(objective.times, TimePairs):
        equal = objective.times.equal
    return Cost(
        name=config.name,
        parameters=parameters,
        matrices=sum(each.numel() for each in matrices),
        forward=products.total,
        attention=products.attention,
        activations=activations_of(network, config.generator.checkpointing),
        equal=equal,
        boundary=int(isinstance(objective, ConsistencyLoss)),
        again=int(config.generator.checkpointing),
    )


def activations_of(network: CrossFlowGenerator, checkpointing: bool) -> float:
    """Return the bytes that one image of a training step keeps, in bfloat16."""
    c = network.config
    cells = math.prod(network.latent_shape[1:])
    tokens = cells + c["time_tokens"] + c["class_tokens"]
    numbers = ACTIVATIONS_PER_TOKEN * c["depth"]
    if checkpointing:
        # The input of every block, and the inside of the one that is run again.
        numbers = c["depth"] + ACTIVATIONS_PER_TOKEN
    return 2.0 * numbers * tokens * c["width"]


def cost_of(config: ImageNetConfig) -> Cost:
    """Count a config: its generator, its encoder, its image losses and stage 1.

    Raises:
        InputError: if there is no preset of its name.
    """
    generator = generator_cost(config)
    training, size = config.training, config.data.size
    encoder = encoder_share(config.encoder, size)
    cost = replace(
        generator,
        averages=len(training.emas),
        size=size,
        evaluations=config.evaluation.evaluations,
        images=training.epochs * IMAGENET,
    )
    if training.steps is not None:
        cost = replace(cost, images=training.steps * training.batch)
    if training.optimizer == "adamw":
        cost = replace(cost, matrices=0)
    if config.generator.space == "latent":
        whole = whole_autoencoder(config.encoder, size)
        decoder = whole.flops - encoder.flops
        cost = replace(cost, kind="latent space", decoder=decoder)
    return replace(
        cost,
        networks=tuple(frozen_networks(config, cost, encoder)),
        trainings=(*stage_one(config), *latents_made(config, encoder)),
    )


def frozen_networks(config: ImageNetConfig, cost: Cost, encoder: Share) -> list[Share]:
    """Count what a training step runs beside the generator, for one image."""
    networks = []
    if config.data.latents is None:
        networks.append(encoder)
    if config.objective.estimated:
        # One more evaluation of the generator, and its image encoded, where t and s differ.
        estimate = (1 - cost.equal) * (cost.forward + encoder.flops)
        networks.append(Share("the velocity's estimate", 0, estimate))
    losses = image_losses(config.perceptual, config.adversarial, config.data.size)
    return [*networks, *losses]


def utilisation(config: ImageNetConfig, rows: int, seconds: float, peak: float = PEAK) -> float:
    """Return the share of a device's peak that a measured training step reaches.

    Args:
        config: of the training; without ``adversarial`` if the discriminator had not begun.
        rows: of the step on one device.
        seconds: that the step took.
        peak: of the device, in FLOP/s.
    """
    step = cost_of(config).step
    return step * rows / (seconds * peak)


def image_losses(
    perceptual: Sequence[PerceptualConfig], adversarial: AdversarialConfig | None, size: int
) -> list[Share]:
    """Count the perceptual networks and the discriminator's features, for one image."""
    more = 0
    if adversarial is not None and adversarial.adaptive:
        more = ADAPTIVE_PASSES
    shares = []
    for loss in perceptual:
        side = loss.size or size
        if loss.network == "lpips":
            side = size  # it takes images as they are
        shares.append(image_loss(loss.network, side, PERCEPTUAL_PASSES + more))
    if adversarial is not None:
        side = adversarial.size or size
        features = image_loss(adversarial.network, side, ADVERSARIAL_PASSES + more)
        shares.append(replace(features, name=f"GAN on {features.name}"))
    return shares


@cache
def image_loss(name: str, size: int, passes: int) -> Share:
    """Count so many passes of a network of timm, or of LPIPS' VGG."""

    def build() -> Call:
        if name == "lpips":
            from torchvision.models import vgg16

            network: nn.Module = vgg16().features
        else:
            import timm

            network = timm.create_model(name, pretrained=False)
        return network, (pictures(size),), {}

    parameters, forward = counted(build)
    return Share(name, parameters, passes * forward)


def stage_one(config: ImageNetConfig) -> list[Share]:
    """Count the training of an autoencoder, with its image losses, if the config has one."""
    stage, size = config.encoder.stage_one, config.data.size
    if stage is None:
        return []
    whole = whole_autoencoder(config.encoder, size)
    losses = image_losses(config.perceptual, stage.adversarial, size)
    image = 3 * whole.flops + sum(loss.flops for loss in losses)
    images = stage.steps * stage.batch
    return [Share("stage 1", whole.parameters, images * image)]


def latents_made(config: ImageNetConfig, encoder: Share) -> list[Share]:
    """Count the latents of ImageNet, and of its mirrored images, where they are computed once."""
    if config.data.latents is None:
        return []
    images = IMAGENET * (1 + config.data.flip)
    return [Share("latents, computed once", encoder.parameters, images * encoder.flops)]


@cache
def encoder_share(encoder: EncoderConfig, size: int) -> Share:
    """Count the frozen encoder, for one image."""

    def build() -> Call:
        return Encoding(autoencoder(encoder)), (pictures(size),), {}

    parameters, forward = counted(build)
    return Share(f"encoder ({encoder.name or 'of stage 1'})", parameters, forward)


@cache
def whole_autoencoder(encoder: EncoderConfig, size: int) -> Share:
    """Count encoder and decoder, forward, for one image."""

    def build() -> Call:
        return autoencoder(encoder), (pictures(size),), {}

    parameters, forward = counted(build)
    return Share("autoencoder", parameters, forward)
