"""What a config costs: its generator, its encoder, its image losses and other trainings, counted
on meta tensors.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowspace.errors import RunError
from flowspace.recipes.config import (
    AdversarialConfig,
    Config,
    EncoderConfig,
    PerceptualConfig,
    load,
)
from flowspace.vision.cost import IMAGENET, Cost, Share, counted, generator_cost
from flowspace.vision.encoders import load_encoder, make_buildable

__all__ = ["TABLE", "cost_of", "table"]

PERCEPTUAL_PASSES = 3
"""Of a perceptual network: forward on the prediction, back to it, forward on the target. Its
weights have no gradient.
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
    "rae-dinov2": "AutoencoderRAE",
}
"""Published autoencoders that diffusers' classes build by default."""

PAPER = {"crossflow-xl": 1.62, "crossflow-xl-literal": 1.62}
"""The paper's FID by config, where it is known to us: of CrossFlow-XL alone."""

TABLE = ("command", "what differs", "paper's FID", "ours", "H100-hours")
"""Heads of `table`."""


def cost_of(config: Config) -> Cost:
    """Count a config.

    Raises:
        InputError: if its preset is not known.
    """
    g, c = config.generator, config
    sizes = {
        name: getattr(g, name)
        for name in ("depth", "width", "heads")
        if getattr(g, name) is not None
    }
    names = ("channels", "grid", "patch", "mlp", "condition", "class_tokens", "time_tokens")
    settings = {name: getattr(g, name) for name in names}
    own = generator_cost(
        g.preset, c.objective.equal, classes=c.data.classes or 1000, **sizes, **settings
    )
    beside = [] if c.data.latents else [_encoder(c.encoder, c.data.size)]
    if c.objective.estimated and beside:
        beside.append(
            Share(
                "velocity's estimate", 0, (1 - c.objective.equal) * (own.forward + beside[0].step)
            )
        )
    beside += _image_losses(c.perceptual, c.adversarial, c.data.size)
    return Cost(
        own.name,
        own.parameters,
        own.forward,
        own.equal,
        own.activations,
        own.matrices,
        c.training.epochs,
        tuple(beside),
        tuple(_apart(c)),
    )


def _image_losses(
    perceptual: tuple[PerceptualConfig, ...], a: AdversarialConfig | None, size: int
) -> list[Share]:
    more = ADAPTIVE_PASSES if a and a.adaptive else 0
    sides = {
        p.network: size if p.network == "lpips" else p.size or size for p in perceptual
    }  # LPIPS takes images as they are
    found = [
        _image_loss(name, side, PERCEPTUAL_PASSES + more, name) for name, side in sides.items()
    ]
    if a:
        found.append(
            _image_loss(
                a.network, a.size or size, ADVERSARIAL_PASSES + more, f"GAN on {a.network}"
            )
        )
    return found


def _apart(c: Config) -> list[Share]:
    """Count the trainings beside the generator's: stage 1, with its image losses, and a latent
    generator.
    """
    found = []
    if c.encoder.stage_one:
        stage = c.encoder.stage_one
        parameters, forward = counted(
            lambda: (_autoencoder(c.encoder), (_picture(c.data.size),), {})
        )
        image = 3 * forward + sum(
            s.step for s in _image_losses(c.perceptual, stage.adversarial, c.data.size)
        )
        found.append(Share("stage 1", parameters, stage.steps * stage.batch * image))
    if c.latent:
        g, latent = c.generator, c.latent
        sizes = {"depth": latent.depth, "width": latent.width, "heads": latent.heads, "mlp": g.mlp}
        cells = {"channels": g.channels, "grid": g.grid, "patch": 1, "outputs": g.channels}
        tokens = {
            "class_tokens": g.class_tokens,
            "time_tokens": g.time_tokens,
            "classes": c.data.classes or 1000,
        }
        own = generator_cost(None, 1.0, **sizes, **cells, **tokens)
        image = own.step + (0 if c.data.latents else _encoder(c.encoder, c.data.size).step)
        t = latent.training
        found.append(
            Share(
                "latent generator",
                own.parameters,
                (t.steps * t.batch if t.steps else t.epochs * IMAGENET) * image,
            )
        )
    return found


def table(folder: Path) -> list[tuple[str, ...]]:
    """Return a row under `TABLE` for each config of a folder that has one of the paper's sizes.

    ``ours`` is the FID of the config's own run, where there is one.

    Raises:
        RunError: if the folder holds no such config.
    """
    rows = []
    for path in sorted(folder.glob("*.yaml")):
        config = load(path)
        if config.generator.preset is None:
            continue
        about = path.read_text().splitlines()[0].strip("# .")
        paper = PAPER.get(path.stem)
        hours = f"{cost_of(config).hours():.0f}"
        rows.append(
            (f"`flowspace train {path}`", about, f"{paper or ''}", _ours(config.out), hours)
        )
    if not rows:
        raise RunError(
            f"{folder} holds no configs with a preset; write a folder such as "
            "examples/imagenet/configs"
        )
    return rows


def _ours(out: Path) -> str:
    """Return the FID that a run was judged with."""
    try:
        return f"{json.loads((out / 'metrics.json').read_text())['values']['FID']:.2f}"
    except (OSError, ValueError, KeyError):
        return "not run here"


class _Encoding(nn.Module):
    """The encoder of an autoencoder, as a module of its own."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.encoder, self.autoencoder = autoencoder.encoder, [autoencoder]

    def forward(self, images: torch.Tensor) -> None:
        """Encode."""
        self.autoencoder[0].encode(images)


def _picture(size: int) -> torch.Tensor:
    return torch.zeros(1, 3, size, size)


@cache
def _encoder(e: EncoderConfig, size: int) -> Share:
    def build() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        return _Encoding(_autoencoder(e)), (_picture(size),), {}

    parameters, forward = counted(build)
    return Share(f"encoder ({e.name or 'trained on the spot'})", parameters, forward)


def _autoencoder(e: EncoderConfig) -> nn.Module:
    import diffusers

    made: Any = diffusers
    if e.stage_one is None and e.name in DEFAULTS:
        make_buildable(DEFAULTS[e.name])
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


@cache
def _image_loss(name: str, size: int, passes: int, called: str) -> Share:
    def build() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        if name == "lpips":
            from torchvision.models import vgg16

            network: nn.Module = vgg16().features
        else:
            import timm

            network = timm.create_model(name, pretrained=False)
        return network, (_picture(size),), {}

    parameters, forward = counted(build)
    return Share(called, parameters, passes * forward)
