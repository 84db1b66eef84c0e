"""The networks of other methods, counted as ours are: what one image costs them.

Each function returns the products of one call. What a method's paper says of its widths and depths
is put into the layers that diffusers or this library has for them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from flops import Call, Products, alone, dit_dh, generator_cost, products_of, rae_decoder
from settings import GeneratorConfig

__all__ = ["RIVALS", "Rival", "dit", "latent_network", "representation_decoder", "sd_decoder"]


def transformer(channels: int, side: int, patch: int, layers: int, head: int) -> Products:
    """Count diffusers' DiT of 16 heads.

    On SD-VAE's 4 channels it returns 8, a mean and a variance of each, as DiT does.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    outputs = channels
    if channels == 4:
        outputs = 8

    def build() -> Call:
        network = DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=head,
            in_channels=channels,
            out_channels=outputs,
            num_layers=layers,
            sample_size=side,
            patch_size=patch,
        )
        index = torch.zeros(1, dtype=torch.long)
        latents = torch.zeros(1, channels, side, side)
        return network, (latents,), {"timestep": index, "class_labels": index}

    return products_of(build)[1]


def dit() -> Products:
    """Count DiT-XL/2, whose width, depth and tokens MeanFlow-XL/2 shares."""
    return transformer(channels=4, side=32, patch=2, layers=28, head=72)


def latent_network(grid: int = 16) -> Products:
    """Count DiT^DH-XL, of MeanFlow's form as MF-RAE trains it."""
    return products_of(partial(dit_dh, "xl", grid))[1]


def representation_decoder(grid: int = 16) -> Products:
    """Count RAE's ViT-XL decoder: 28 blocks of width 1,152."""
    return products_of(partial(rae_decoder, "xl", grid))[1]


def sd_decoder() -> Products:
    """Count the decoder of the SD-VAE."""
    from diffusers.models.autoencoders.vae import Decoder

    def build() -> Call:
        network = Decoder(
            in_channels=4,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        return network, (torch.zeros(1, 4, 32, 32),), {}

    return products_of(build)[1]


def of_generator(settings: GeneratorConfig) -> Products:
    """Count a generator of this library."""
    cost = generator_cost(alone(settings))
    return Products(cost.forward - cost.attention, cost.attention)


def crossflow(preset: str) -> Products:
    """Count CrossFlow in one of the paper's sizes."""
    return of_generator(GeneratorConfig(preset=preset))


def pixel_mean_flow(width: int, depth: int, heads: int) -> Products:
    """Count a transformer of pixel MeanFlow's size on squares of 16 x 16 pixels.

    Its blocks are this library's; 256 squares and 20 context tokens are pixel MeanFlow's.
    """
    settings = GeneratorConfig(
        preset=None,
        channels=768,
        width=width,
        depth=depth,
        heads=heads,
        class_tokens=8,
        time_tokens=12,
    )
    return of_generator(settings)


@dataclass(frozen=True)
class Rival:
    """What draws an image by another method.

    Attributes:
        network: counts one evaluation.
        decoder: counts the decoder; None where the network returns pixels.
    """

    network: Callable[[], Products]
    decoder: Callable[[], Products] | None = None


RIVALS = {
    "DiT-XL/2": Rival(dit, sd_decoder),
    "MeanFlow-XL/2": Rival(dit, sd_decoder),
    "MF-RAE, DiTDH-XL": Rival(latent_network, representation_decoder),
    "pMF-B/16": Rival(partial(pixel_mean_flow, width=768, depth=16, heads=12)),
    "pMF-L/16": Rival(partial(pixel_mean_flow, width=1024, depth=32, heads=16)),
    "pMF-H/16": Rival(partial(pixel_mean_flow, width=1280, depth=48, heads=16)),
    "CrossFlow-B": Rival(partial(crossflow, "crossflow-b")),
    "CrossFlow-L": Rival(partial(crossflow, "crossflow-l")),
    "CrossFlow-XL": Rival(partial(crossflow, "crossflow-xl")),
}
"""Methods whose networks can be built here, by their names in ``results.PUBLISHED``."""
