"""Costs on paper, from the code: parameters, FLOPs, memory and GPU-hours, counted on meta tensors
without a weight in memory.

FLOPs are multiply-adds times two, as torch's counter has them; elementwise work is not counted. A
training step of a generator is its forward pass, twice that for the gradient, and one more forward
pass' products for the derivative on the share of the rows that needs it (`SharedPrimal`).
GPU-hours assume a utilisation that is stated with them; none of them has been run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flowspace.errors import InputError
from flowspace.vision.generator import PRESETS, CrossFlowGenerator

__all__ = [
    "HEAD",
    "NOTE",
    "RIVALS",
    "Cost",
    "Rival",
    "Share",
    "counted",
    "generator_cost",
    "report",
    "rivals",
]

IMAGENET = 1_281_167
"""Images of ImageNet's training set."""

GIGA = 1e9
ADAM_STATES = {"muon": 1, "adamw": 2}
"""Numbers that each optimiser keeps for a parameter."""

ACTIVATIONS_PER_TOKEN = 34
"""Numbers that one block keeps for each token and unit of width in a training step with fused
attention and a SwiGLU of 8/3: about 14 for attention (norm, q, k, v twice for their norms, output)
and 20 for the MLP; Korthikanti et al., arXiv 2205.05198.
"""


def counted(
    build: Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]],
) -> tuple[int, float]:
    """Return the parameters and the FLOPs of one forward call.

    Args:
        build: makes the module, its arguments and keywords; run on the meta device.
    """
    with torch.device("meta"), torch.no_grad():
        module, args, cond = build()
        with FlopCounterMode(display=False) as counter:
            module.eval()(*args, **cond)
    return sum(p.numel() for p in module.parameters()), float(counter.get_total_flops())


@dataclass(frozen=True)
class Share:
    """What one image of a training step costs outside the generator.

    Attributes:
        name: of the network.
        parameters: how many numbers, frozen.
        step: FLOPs of one image.
    """

    name: str
    parameters: int
    step: float


@dataclass(frozen=True)
class Cost:
    """What a generator costs.

    Attributes:
        name: of the preset.
        parameters: how many numbers.
        forward: FLOPs of one image, forward.
        equal: the share of rows with s = t, which need no derivative.
        activations: bytes that one image of a training step keeps, in bfloat16, without
            checkpointing.
        matrices: how many of the parameters Muon trains; the rest is AdamW's.
        epochs: of its training.
        beside: the encoder and the image losses.
        apart: other trainings of the same run, such as stage 1; their ``step`` is of the whole
            training.
    """

    name: str
    parameters: int
    forward: float
    equal: float
    activations: float
    matrices: int
    epochs: float = 160
    beside: tuple[Share, ...] = ()
    apart: tuple[Share, ...] = ()

    @property
    def step(self) -> float:
        """FLOPs of one image in a training step: forward, gradient, derivative."""
        return (3 + (1 - self.equal)) * self.forward

    @property
    def whole(self) -> float:
        """FLOPs of one image in a training step, with what stands beside the generator."""
        return self.step + sum(share.step for share in self.beside)

    def memory(
        self, batch: int, devices: int = 1, sharded: bool = False, averages: int = 3
    ) -> float:
        """Return the bytes on one device: float32 weights, gradients, optimiser states and
        averages, and activations.

        Args:
            batch: images on one device.
            devices: over which FSDP2 shards everything but activations.
            sharded: FSDP2; False is DDP, where every device holds all.
            averages: EMAs.
        """
        states = ADAM_STATES["muon"] * self.matrices + ADAM_STATES["adamw"] * (
            self.parameters - self.matrices
        )
        held = 4 * (self.parameters * (2 + averages) + states)
        return held / (devices if sharded else 1) + batch * self.activations

    def hours(
        self, peak: float = 989e12, utilisation: float = 0.4, images: int = IMAGENET
    ) -> float:
        """Return GPU-hours of the whole training; peak in FLOP/s, the default an H100's in
        bfloat16.
        """
        total = self.epochs * images * self.whole + sum(share.step for share in self.apart)
        return total / (peak * utilisation) / 3600


@cache
def generator_cost(preset: str | None, equal: float = 0.5, **changes: Any) -> Cost:
    """Count one of the presets, or, for None, a generator of the sizes in ``changes``.

    Raises:
        InputError: if there is no preset of that name, or the share is outside [0, 1].
    """
    if preset is not None and preset not in PRESETS:
        raise InputError(f"preset {preset!r} came; write one of {', '.join(PRESETS)}")
    if not 0 <= equal <= 1:
        raise InputError(
            f"equal = {equal} came; it is the share of rows with s = t, between 0 and 1"
        )
    found: dict[str, Any] = {}

    def build() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        network = found["network"] = CrossFlowGenerator(
            **(PRESETS.get(preset or "", {}) | changes)
        )
        c = network.config
        time = torch.ones(1)
        labels = {"labels": torch.zeros(1, dtype=torch.long)} if c["classes"] else {}
        return network, (torch.zeros(1, c["channels"], c["grid"], c["grid"]), time, time), labels

    parameters, forward = counted(build)
    network = found["network"]
    c = network.config
    tokens = c["grid"] ** 2 + c["time_tokens"] + (c["class_tokens"] if c["classes"] else 0)
    matrices = sum(p.numel() for p in network.blocks.parameters() if p.ndim == 2)
    activations = 2.0 * ACTIVATIONS_PER_TOKEN * tokens * c["width"] * c["depth"]
    return Cost(preset or "own sizes", parameters, forward, equal, activations, matrices)


# --- what others need for one image
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rival:
    """Another way to an image of ImageNet at 256 pixels.

    Attributes:
        name: of the method.
        fid: as published, with its source.
        source: where the FID stands.
        network: counts one evaluation.
        evaluations: of the network for one image, guidance included.
        decoder: counts the decoder, or None where the network returns pixels.
    """

    name: str
    fid: float
    source: str
    network: Callable[[], tuple[int, float]]
    evaluations: int = 1
    decoder: Callable[[], tuple[int, float]] | None = None


def _transformer(
    channels: int, side: int, patch: int, layers: int, head: int, outputs: int
) -> tuple[int, float]:
    """Count diffusers' DiT of 16 heads."""

    def build() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

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
        return (
            network,
            (torch.zeros(1, channels, side, side),),
            {"timestep": index, "class_labels": index},
        )

    return counted(build)


def _dit() -> tuple[int, float]:
    return _transformer(4, 32, 2, 28, 72, 8)


def _dit_dh() -> tuple[int, float]:
    """RAE's DiTDH-XL: DiT-XL on 768 channels of 16 x 16, and a head of 2 blocks of width 2,048."""
    body, head = _transformer(768, 16, 1, 28, 72, 768), _transformer(768, 16, 1, 2, 128, 768)
    return body[0] + head[0], body[1] + head[1]


def _rae_decoder() -> tuple[int, float]:
    """RAE's ViT-XL decoder of 28 blocks of width 1,152."""

    def build() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

        network = RAEDecoder(768, 1152, 28, 16, 4096, num_patches=256)
        return network, (torch.zeros(1, 256, 768),), {}

    return counted(build)


def _sd_decoder() -> tuple[int, float]:
    def build() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        from diffusers.models.autoencoders.vae import Decoder

        widths: Any = (128, 256, 512, 512)
        blocks: Any = ("UpDecoderBlock2D",) * 4
        network = Decoder(
            4, 3, up_block_types=blocks, block_out_channels=widths, layers_per_block=2
        )
        return network, (torch.zeros(1, 4, 32, 32),), {}

    return counted(build)


def _pixel_transformer(width: int, depth: int, heads: int) -> Callable[[], tuple[int, float]]:
    """A transformer of pixel MeanFlow's width and depth on 256 tokens of 16 x 16 pixels, in this
    library's blocks.
    """

    def count() -> tuple[int, float]:
        def build() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
            network = CrossFlowGenerator(
                channels=768, width=width, depth=depth, heads=heads, class_tokens=8, time_tokens=12
            )
            time = torch.ones(1)
            return (
                network,
                (torch.zeros(1, 768, 16, 16), time, time),
                {"labels": torch.zeros(1, dtype=torch.long)},
            )

        return counted(build)

    return count


RIVALS = (
    Rival(
        "DiT-XL/2, 250 steps with guidance + SD-VAE decoder",
        2.27,
        "arXiv 2212.09748",
        _dit,
        500,
        _sd_decoder,
    ),
    Rival("MeanFlow-XL/2 + SD-VAE decoder", 3.43, "arXiv 2505.13447", _dit, 1, _sd_decoder),
    Rival(
        "MF-RAE, DiTDH-XL + RAE's ViT-XL decoder",
        2.03,
        "arXiv 2511.13019",
        _dit_dh,
        1,
        _rae_decoder,
    ),
    Rival("pixel MeanFlow-B/16", 3.12, "its paper", _pixel_transformer(768, 16, 12)),
    Rival("pixel MeanFlow-L/16", 2.52, "its paper", _pixel_transformer(1024, 32, 16)),
    Rival("pixel MeanFlow-H/16", 2.22, "its paper", _pixel_transformer(1280, 48, 16)),
)
"""One-step methods and DiT; MeanFlow-XL/2 is counted as DiT-XL/2, whose width, depth and tokens it
shares.
"""


def rivals() -> list[tuple[str, str, str, str, str]]:
    """Return a row for each rival: name, parameters in millions, GFLOPs an image, of which
    decoder, published FID.
    """
    rows = []
    for rival in RIVALS:
        parameters, forward = rival.network()
        extra, decoder = rival.decoder() if rival.decoder else (0, 0.0)
        whole = rival.evaluations * forward + decoder
        rows.append(
            (
                rival.name,
                f"{(parameters + extra) / 1e6:.0f}",
                f"{whole / GIGA:,.0f}",
                f"{decoder / GIGA:,.0f}" if decoder else "",
                f"{rival.fid} ({rival.source})",
            )
        )
    return rows


HEAD = (
    "one image of 256 x 256",
    "million parameters",
    "GFLOPs",
    "of which decoder",
    "published FID",
)
NOTE = (
    "FLOPs are counted by torch on meta tensors (two a multiply-add); memory and hours are "
    "estimates from them: float32 "
    "weights, gradients, optimiser states and three averages, activations in bfloat16 without "
    "checkpointing. Memory leaves out "
    "the frozen networks beside the generator. DiT-XL/2 is diffusers' module, which embeds the "
    "time anew in every block."
)


def _frozen(share: Share) -> str:
    return f"{share.parameters / 1e6:.1f} million parameters, frozen"


def report(
    cost: Cost, batch: int = 32, devices: int = 8
) -> tuple[list[tuple[str, str]], list[tuple[str, ...]]]:
    """Return the rows of two tables: what a generator and its training cost, and its image beside
    its rivals' under `HEAD`.

    Args:
        cost: of the generator.
        batch: images on one device.
        devices: over which FSDP2 shards.
    """
    gib = 2.0**30
    left_out = "" if cost.beside else "; the generator alone"
    own = [
        (
            "parameters",
            f"{cost.parameters / 1e6:.1f} million, {cost.matrices / 1e6:.1f} of them in Muon's "
            "matrices",
        ),
        ("one image, forward", f"{cost.forward / GIGA:.1f} GFLOPs"),
        (
            "one image, generator's step",
            f"{cost.step / GIGA:.1f} GFLOPs, {cost.equal:.0%} of the rows on s = t",
        ),
        *(
            (f"one image, {share.name}", f"{share.step / GIGA:.1f} GFLOPs, {_frozen(share)}")
            for share in cost.beside
        ),
        ("one image, whole step", f"{cost.whole / GIGA:.1f} GFLOPs{left_out}"),
        *((f"{share.name}, whole training", f"{share.step:.2g} FLOPs") for share in cost.apart),
        (f"memory, DDP, {batch} images a device", f"{cost.memory(batch) / gib:.1f} GiB"),
        (
            f"memory, FSDP2 over {devices}, {batch} images a device",
            f"{cost.memory(batch, devices, True) / gib:.1f} GiB",
        ),
        (
            f"{cost.epochs:g} epochs of ImageNet"
            + "".join(f", {share.name}" for share in cost.apart),
            f"{cost.hours():,.0f} H100-hours at 40 % of 989 TFLOP/s{left_out}; not run here",
        ),
    ]
    size = cost.name.removeprefix("crossflow-").upper() if cost.name in PRESETS else cost.name
    fid = "1.62 for XL (arXiv 2606.19970); not run here"
    line = (
        f"CrossFlow, {size}",
        f"{cost.parameters / 1e6:.0f}",
        f"{cost.forward / GIGA:,.0f}",
        "",
        fid,
    )
    return own, [line, *rivals()]
