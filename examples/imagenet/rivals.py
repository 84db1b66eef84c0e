"""The networks of other methods, counted as ours are: what one image costs them.

Each function returns the products of one call. What a method's paper says of its widths and depths
is put into the layers that diffusers or this library has for them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from flops import alone, generator_cost  # first: it finds examples/common

# isort: split
from counting import Call, Products, one_row, products_of
from settings import GeneratorConfig

from flowspace.vision import DiTDH
from flowspace.vision.rae import DECODERS

__all__ = [
    "RIVALS",
    "Compared",
    "Rival",
    "comparison",
    "dit",
    "latent_network",
    "representation_decoder",
    "sd_decoder",
]


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
    """Count DiT^DH-XL, of MeanFlow's form as MF-RAE trains it, on so many cells a side."""

    def build() -> Call:
        return one_row(DiTDH.from_preset("xl", grid=grid, average=True))

    return products_of(build)[1]


def representation_decoder(grid: int = 16) -> Products:
    """Count RAE's ViT-XL decoder: 28 blocks of width 1,152, on so many cells a side."""
    from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

    cells = grid * grid

    def build() -> Call:
        network = RAEDecoder(
            hidden_size=768,
            num_patches=cells,
            image_size=16 * grid,
            **DECODERS["xl"],
        )
        return network, (torch.zeros(1, cells, 768),), {}

    return products_of(build)[1]


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


# --- MF-RAE's comparison -----------------------------------------------------------------------

GIGA = 1e9
HIGH = 32
"""Cells a side of the latents of 512 pixels."""


@dataclass(frozen=True)
class Compared:
    """What one image costs in MF-RAE's comparison (arXiv 2511.13019), in GFLOPs.

    Attributes:
        name: of what draws it.
        published: in the paper's text.
        as_published: counted here, as the paper counts.
        total: counted here, with attention, a multiply-add as two.
    """

    name: str
    published: int
    as_published: float
    total: float

    @classmethod
    def of(cls, name: str, published: int, *networks: Products) -> "Compared":
        """Return what some networks cost together."""
        as_published = sum(each.as_published for each in networks)
        total = sum(each.total for each in networks)
        return cls(name, published, as_published / GIGA, total / GIGA)


def comparison() -> list[Compared]:
    """Return what MF-RAE compares itself by."""
    sd, network = sd_decoder(), dit()
    decoder, dit_dh = representation_decoder(), latent_network()
    high_decoder, high_dit_dh = representation_decoder(HIGH), latent_network(HIGH)
    return [
        Compared.of("SD-VAE's decoder", 310, sd),
        Compared.of("DiT-XL/2", 114, network),
        Compared.of("MeanFlow-XL/2 in all", 424, sd, network),
        Compared.of("MeanFlow-XL/2 in all, 2 evaluations", 538, sd, network, network),
        Compared.of("RAE's ViT-XL decoder", 106, decoder),
        Compared.of("DiT^DH-XL, of average velocities", 157, dit_dh),
        Compared.of("MF-RAE in all", 263, decoder, dit_dh),
        Compared.of("MF-RAE in all, 2 evaluations", 420, decoder, dit_dh, dit_dh),
        Compared.of("MF-RAE in all, 512 pixels", 1051, high_decoder, high_dit_dh),
    ]
