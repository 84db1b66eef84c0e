"""What a config costs: its generator, its encoder and its image losses, counted on meta tensors."""

from typing import Any

import torch
from torch import nn

from flowspace.recipes.config import AdversarialConfig, Config, EncoderConfig, PerceptualConfig
from flowspace.vision.cost import Cost, Share, counted, generator_cost
from flowspace.vision.encoders import load_encoder

__all__ = ["cost_of"]

PERCEPTUAL_PASSES = 3
"""Of a perceptual network: forward on the prediction, back to it, forward on the target. Its weights have no gradient."""

ADVERSARIAL_PASSES = 4
"""Of the discriminator's features: forward on the prediction and back to it, then forward on the real and the made image."""

STAGES = {
    "va-vae": ((128, 128, 256, 256, 512), 32),
    "sd-vae": ((128, 256, 512, 512), 4),
    "sd3-vae": ((128, 256, 512, 512), 16),
}
"""Widths and latent channels of the published autoencoders of the layout of latent diffusion."""

DEFAULTS = {"flux2": "AutoencoderKLFlux2", "dc-ae": "AutoencoderDC", "rae-dinov2": "AutoencoderRAE"}
"""Published autoencoders that diffusers' classes build by default."""


def cost_of(config: Config) -> Cost:
    """Count a config.

    Raises:
        InputError: if its preset is not known.
    """
    g, c = config.generator, config
    sizes = {name: getattr(g, name) for name in ("depth", "width", "heads") if getattr(g, name) is not None}
    names = ("channels", "grid", "patch", "mlp", "condition", "class_tokens", "time_tokens")
    settings = {name: getattr(g, name) for name in names}
    own = generator_cost(g.preset, c.objective.equal, classes=c.data.classes or 1000, **sizes, **settings)
    beside = [] if c.data.latents else [_encoder(c.encoder, c.data.size)]
    if c.objective.estimated and beside:
        beside.append(Share("velocity's estimate", 0, (1 - c.objective.equal) * (own.forward + beside[0].step)))
    beside += [_image_loss(p, c.data.size, PERCEPTUAL_PASSES, p.network) for p in c.perceptual]
    if c.adversarial:
        a = c.adversarial
        beside.append(_image_loss(a, c.data.size, ADVERSARIAL_PASSES, f"GAN on {a.network}"))
    return Cost(
        own.name,
        own.parameters,
        own.forward,
        own.equal,
        own.activations,
        own.matrices,
        c.training.epochs,
        tuple(beside),
    )


class _Encoding(nn.Module):
    """The encoder of an autoencoder, as a module of its own."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.encoder, self.autoencoder = autoencoder.encoder, [autoencoder]

    def forward(self, images: torch.Tensor) -> None:
        """Encode."""
        self.autoencoder[0].encode(images)


def _encoder(e: EncoderConfig, size: int) -> Share:
    def build() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        return _Encoding(_autoencoder(e)), (torch.zeros(1, 3, size, size),), {}

    parameters, forward = counted(build)
    return Share(f"encoder ({e.name or 'trained on the spot'})", parameters, forward)


def _autoencoder(e: EncoderConfig) -> nn.Module:
    import diffusers

    made: Any = diffusers
    if e.stage_one is None and e.name in DEFAULTS:
        return getattr(made, DEFAULTS[e.name])()
    if e.stage_one is None and e.name not in STAGES:
        return load_encoder(e.name or "", weights=e.weights).autoencoder.to("meta")
    stage = e.stage_one
    widths, channels = (stage.widths, stage.channels) if stage else STAGES[e.name or ""]
    down = ["DownEncoderBlock2D"] * len(widths)
    if e.name == "va-vae" and not stage:
        down[-1] = "AttnDownEncoderBlock2D"
    return made.AutoencoderKL(
        down_block_types=tuple(down),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1 if stage else 2,
        latent_channels=channels,
        norm_num_groups=8 if stage else 32,
        mid_block_add_attention=stage is None,
    )


def _image_loss(p: PerceptualConfig | AdversarialConfig, size: int, passes: int, name: str) -> Share:
    def build() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        if p.network == "lpips":
            from torchvision.models import vgg16

            network: nn.Module = vgg16().features
        else:
            import timm

            network = timm.create_model(p.network, pretrained=False)
        return network, (torch.zeros(1, 3, p.size or size, p.size or size),), {}

    parameters, forward = counted(build)
    return Share(name, parameters, passes * forward)
