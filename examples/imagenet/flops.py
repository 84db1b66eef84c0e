"""What a network costs on paper: counted on meta tensors, without a weight in memory.

A multiply-add is two FLOPs here, as in torch's counter; papers mostly write it as one, and some
leave out attention's own products (`Products.as_published`). Elementwise work is not counted. A
training step of a generator is its forward pass, twice that for the gradient, and one more forward
pass' products for the derivative, on the rows that need it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

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
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flowspace import ConsistencyLoss, TimePairs
from flowspace.vision import DiTDH
from flowspace.vision.encoders import load_encoder
from flowspace.vision.rae import DECODERS, build_rae

__all__ = [
    "IMAGENET",
    "PEAK",
    "Call",
    "Cost",
    "Products",
    "Share",
    "alone",
    "cost_of",
    "counted",
    "dit_dh",
    "generator_cost",
    "one_row",
    "products_of",
    "rae_decoder",
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

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A module, and the arguments and keywords that it is called with."""


ATTENTION = ("bmm", "scaled_dot_product")
"""What torch calls the products of queries with keys and of weights with values."""


@dataclass(frozen=True)
class Products:
    """FLOPs of the matrix products of one forward call, a multiply-add as two.

    Attributes:
        layers: of linear layers and convolutions.
        attention: of attention's own, queries with keys and weights with values.
    """

    layers: float
    attention: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.layers + self.attention

    @property
    def as_published(self) -> float:
        """As MF-RAE (arXiv 2511.13019) counts: a multiply-add as one, of the layers alone.

        Its text does not say so. Its numbers for four networks do, which are 0 to 0.6 % from these
        and up to 4 % from those with attention.
        """
        return self.layers / 2


def products_of(build: Callable[[], Call]) -> tuple[int, Products]:
    """Return the parameters of a module and the products of one forward call.

    Args:
        build: makes the module and its arguments; run on the meta device.
    """
    with torch.device("meta"), torch.no_grad():
        module, arguments, keywords = build()
        with FlopCounterMode(display=False) as counter:
            module.eval()(*arguments, **keywords)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    layers, attention = 0.0, 0.0
    for name, count in counter.get_flop_counts()["Global"].items():
        if any(each in str(name) for each in ATTENTION):
            attention += count
        else:
            layers += count
    return parameters, Products(layers, attention)


def counted(build: Callable[[], Call]) -> tuple[int, float]:
    """Return the parameters of a module and the FLOPs of one forward call.

    Args:
        build: makes the module and its arguments; run on the meta device.
    """
    parameters, products = products_of(build)
    return parameters, products.total


def one_row(network: Any) -> Call:
    """Return a call of a network of latents, times and labels, on one row of zeros."""
    time, labels = torch.ones(1), torch.zeros(1, dtype=torch.long)
    latents = torch.zeros(1, *network.latent_shape)
    return network, (latents, time, time), {"labels": labels}


def dit_dh(size: str = "xl", grid: int = 16) -> Call:
    """Return a call of DiT^DH in MeanFlow's form, on latents of so many cells a side."""
    return one_row(DiTDH.from_preset(size, grid=grid, average=True))


def rae_decoder(size: str = "xl", grid: int = 16) -> Call:
    """Return a call of RAE's decoder, on latents of so many cells a side."""
    from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

    cells = grid * grid
    network = RAEDecoder(
        hidden_size=768, num_patches=cells, image_size=16 * grid, **DECODERS[size]
    )
    return network, (torch.zeros(1, cells, 768),), {}


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
        return self.images * self.step + sum(training.flops for training in self.trainings)

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

STAGES = {
    "va-vae": ((128, 128, 256, 256, 512), 32),
    "sd-vae": ((128, 256, 512, 512), 4),
    "sd3-vae": ((128, 256, 512, 512), 16),
}
"""Widths and latent channels of the published autoencoders of the layout of latent diffusion."""

DEFAULTS = {
    "flux2": "AutoencoderKLFlux2",
    "dc-ae": "AutoencoderDC",
}
"""Published autoencoders that diffusers' classes build by default."""

RAE = "rae-"
"""What the names of representation autoencoders begin with; the encoder's name follows."""


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
    c = network.config

    parameters, products = products_of(lambda: one_row(network))
    cells = math.prod(network.latent_shape[1:])
    tokens = cells + c["time_tokens"] + c["class_tokens"]
    numbers = ACTIVATIONS_PER_TOKEN * c["depth"]
    if config.generator.checkpointing:
        # The input of every block, and the inside of the one that is run again.
        numbers = c["depth"] + ACTIVATIONS_PER_TOKEN
    objective = build.objective_of(config)
    equal = 0.0
    if isinstance(objective.times, TimePairs):
        equal = objective.times.equal
    return Cost(
        name=config.name,
        parameters=parameters,
        matrices=sum(each.numel() for each in network.blocks.parameters() if each.ndim == 2),
        forward=products.total,
        attention=products.attention,
        activations=2.0 * numbers * tokens * c["width"],
        equal=equal,
        boundary=int(isinstance(objective, ConsistencyLoss)),
        again=int(config.generator.checkpointing),
    )


def cost_of(config: ImageNetConfig) -> Cost:
    """Count a config: its generator, its encoder, its image losses and stage 1.

    Raises:
        InputError: if there is no preset of its name.
    """
    cost = generator_cost(config)
    encoder = encoder_share(config.encoder, config.data.size)
    networks = []
    if config.data.latents is None:
        networks.append(encoder)
    if config.objective.estimated:
        # One more evaluation of the generator, and its image encoded, where t and s differ.
        estimate = (1 - cost.equal) * (cost.forward + encoder.flops)
        networks.append(Share("the velocity's estimate", 0, estimate))
    networks += image_losses(config.perceptual, config.adversarial, config.data.size)

    training = config.training
    images = training.epochs * IMAGENET
    if training.steps is not None:
        images = training.steps * training.batch
    matrices = cost.matrices
    if training.optimizer == "adamw":
        matrices = 0
    kind, decoder = cost.kind, cost.decoder
    if config.generator.space == "latent":
        kind = "latent space"
        decoder = whole_autoencoder(config.encoder, config.data.size).flops - encoder.flops
    return replace(
        cost,
        matrices=matrices,
        averages=len(training.emas),
        kind=kind,
        size=config.data.size,
        evaluations=config.evaluation.evaluations,
        decoder=decoder,
        images=images,
        networks=tuple(networks),
        trainings=(*stage_one(config), *latents_made(config, encoder)),
    )


def utilisation(config: ImageNetConfig, rows: int, seconds: float, peak: float = PEAK) -> float:
    """Return the share of a device's peak that a measured training step reaches.

    Args:
        config: of the training; without ``adversarial`` if the discriminator had not begun.
        rows: of the step on one device.
        seconds: that the step took.
        peak: of the device, in FLOP/s.
    """
    return cost_of(config).step * rows / (seconds * peak)


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
    return [Share("stage 1", whole.parameters, stage.steps * stage.batch * image)]


def latents_made(config: ImageNetConfig, encoder: Share) -> list[Share]:
    """Count the latents of ImageNet, and of its mirrored images, where they are computed once."""
    if config.data.latents is None:
        return []
    images = IMAGENET * (1 + config.data.flip)
    return [Share("latents, computed once", encoder.parameters, images * encoder.flops)]


class Encoding(nn.Module):
    """The encoder of an autoencoder, as a module of its own."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.encoder = whole.encoder
        self.encode = whole.encode  # no submodule: the decoder's parameters are not counted

    def forward(self, images: torch.Tensor) -> None:
        """Encode."""
        self.encode(images)


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
    parameters, forward = counted(lambda: (autoencoder(encoder), (pictures(size),), {}))
    return Share("autoencoder", parameters, forward)


def autoencoder(encoder: EncoderConfig) -> nn.Module:
    """Return the autoencoder of an encoder's settings, without its weights if it is known here."""
    import diffusers

    name, stage = encoder.name, encoder.stage_one
    library: Any = diffusers
    if stage is not None:
        blocks = ["DownEncoderBlock2D"] * len(stage.widths)
        return library.AutoencoderKL(
            down_block_types=tuple(blocks),
            up_block_types=("UpDecoderBlock2D",) * len(blocks),
            block_out_channels=stage.widths,
            layers_per_block=1,
            latent_channels=stage.channels,
            norm_num_groups=8,
            mid_block_add_attention=False,
        )
    if name in DEFAULTS:
        return getattr(library, DEFAULTS[name])()
    if name is not None and name.startswith(RAE):
        return build_rae(name.removeprefix(RAE), "xl")  # the decoder that is published with each
    if name not in STAGES:
        return load_encoder(name or "", weights=encoder.weights).autoencoder.to("meta")
    widths, channels = STAGES[name]
    blocks = ["DownEncoderBlock2D"] * len(widths)
    if name == "va-vae":
        blocks[-1] = "AttnDownEncoderBlock2D"
    return library.AutoencoderKL(
        down_block_types=tuple(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=channels,
    )


def pictures(size: int) -> torch.Tensor:
    """Return one picture, of zeros."""
    return torch.zeros(1, 3, size, size)
