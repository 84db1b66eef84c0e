"""Stage 1: the frozen encoder, loaded or trained on the spot, and its latents' statistics."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import build
import torch
from accelerate import Accelerator
from image_losses import add_adversarial, add_perceptual, adversary_of, perceptual_of
from loop import optimizer_of
from pictures import in_range, stacked
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from settings import ImageNetConfig, StageOneConfig, TrainingConfig
from stage import Losses, Stage
from torch import Tensor, nn

from flowspace import InputError, RunError
from flowspace.training import AdversarialStep, Draws
from flowspace.vision.checked_model import keep_digests
from flowspace.vision.data import Images
from flowspace.vision.encoders import LatentEncoder, load_encoder
from flowspace.vision.linear import LinearAutoencoder

POSTERIOR = 5
"""The stream of the draws of posteriors, beside those of train.py."""

MEASURED = 32
"""Pictures that are encoded together when statistics are estimated."""

AVERAGE = 0.99
"""The decay of the averaged autoencoder, which is the one that is kept."""

Train = Callable[[Stage], nn.Module]


def shape_of(config: ImageNetConfig) -> tuple[int, int, int]:
    """Return the shape of the latents that stage 1 of a config will make."""
    stage = config.encoder.stage_one
    pack = config.encoder.pack or 1
    shrunk = stage.linear or 2 ** (len(stage.widths) - 1)
    side = config.data.size // shrunk // pack
    return stage.channels * pack**2, side, side


def check_fit(config: ImageNetConfig, latent: tuple[int, ...]) -> None:
    """See that latents of this shape, the generator and the pictures fit.

    Raises:
        InputError: if they do not; it says what to write.
    """
    g = config.generator
    size = config.data.size
    shape = (g.channels, g.grid, g.grid)
    sides_fit = g.space == "latent" or g.grid * g.patch == size
    if tuple(latent) != shape or not sides_fit:
        channels, grid, *_ = latent
        raise InputError(
            f"got latents of {tuple(latent)} for images of {size}; write "
            f"generator.channels={channels} generator.grid={grid} "
            f"generator.patch={size // grid}"
        )


def encoder_of(
    config: ImageNetConfig, images: Images, accelerator: Accelerator, train: Train
) -> LatentEncoder:
    """Return the encoder of a config, with the statistics of its latents.

    Args:
        config: of the run.
        images: by which it is trained where the config asks so, and statistics are estimated.
        accelerator: of the processes.
        train: takes a stage and returns the averaged network.

    Raises:
        RunError: if weights are missing.
    """
    e = config.encoder
    device = accelerator.device
    if e.stage_one is not None:
        folder = config.out / "encoder"
        if not (folder / "config.json").exists():
            if e.stage_one.linear:
                fit_linear(config, images, accelerator)
            else:
                train_autoencoder(config, images, accelerator, train)
        return loaded(config).to(device)
    encoder = loaded(config).to(device)
    accelerator.wait_for_everyone()  # who is late must not find what the first one writes now
    if not encoder.known:
        fit_statistics(config, images, encoder, accelerator)
        encoder = loaded(config).to(device)
    return encoder


def loaded(config: ImageNetConfig) -> LatentEncoder:
    """Load the encoder of a config, and the statistics that the run keeps.

    Raises:
        RunError: if what is there cannot be read; it says what to delete.
    """
    e = config.encoder
    folder = config.out / "encoder"
    if e.stage_one is not None:
        try:
            return load_encoder(folder, sample=e.sample, pack=e.pack)
        except RunError as error:
            raise RunError(
                f"{error}; delete {folder / 'config.json'}: it is written again from stage 1's "
                "checkpoint"
            ) from error
    dtype = torch.float32
    if e.half:
        dtype = torch.bfloat16
    encoder = load_encoder(e.name, sample=e.sample, dtype=dtype, weights=e.weights, pack=e.pack)
    path = config.out / "latents.safetensors"
    if not encoder.known and path.exists():
        try:
            found = load_file(path)
        except SafetensorError as error:
            raise RunError(
                f"{path} cannot be read ({error}); delete it: the statistics are measured again"
            ) from error
        encoder.set_statistics(found["mean"], found["std"])
    return encoder


def fit_statistics(
    config: ImageNetConfig, images: Images, encoder: LatentEncoder, accelerator: Accelerator
) -> None:
    """Estimate the statistics of the latents from the first pictures, and keep them."""
    encoder.fit(first_pictures(images, config.encoder.fit, accelerator.device))
    if accelerator.is_main_process:
        path = config.out / "latents.safetensors"
        partial = path.with_suffix(".partial")
        statistics = {"mean": encoder.mean.cpu(), "std": encoder.std.cpu()}
        save_file(statistics, partial)
        os.replace(partial, path)
    accelerator.wait_for_everyone()


def first_pictures(images: Images, count: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the first pictures in [-1, 1], in the order of the files."""
    count = min(count, len(images))
    for start in range(0, count, MEASURED):
        numbers = range(start, min(start + MEASURED, count))
        pixels = stacked(images, numbers)
        yield in_range(pixels.to(device))


def training_of(config: ImageNetConfig) -> TrainingConfig:
    """Return how the autoencoder is trained."""
    stage = config.encoder.stage_one
    return replace(
        config.training,
        steps=stage.steps,
        batch=stage.batch,
        learning_rate=stage.learning_rate,
        optimizer="adamw",
        emas=(AVERAGE,),
        seed=config.training.seed + 3,
        accumulate=1,
        sharded=False,
        warmup_epochs=0,
        final_rate=0.05,
    )


def fit_linear(config: ImageNetConfig, images: Images, accelerator: Accelerator) -> None:
    """Fit the linear autoencoder and leave it in ``encoder/``, as a trained one."""
    stage = config.encoder.stage_one
    network = LinearAutoencoder(stage.linear, stage.channels).to(accelerator.device)
    network.fit(first_pictures(images, config.encoder.fit, accelerator.device))
    keep(config, network, images, accelerator)


def train_autoencoder(
    config: ImageNetConfig, images: Images, accelerator: Accelerator, train: Train
) -> None:
    """Train diffusers' autoencoder and leave it in ``encoder/``, with its latents' statistics."""
    stage = config.encoder.stage_one
    folder = config.out / "encoder"
    torch.manual_seed(config.training.seed + 2)
    adversary = None
    if stage.adversarial:
        adversary = adversary_of(
            config,
            stage.adversarial,
            build.schedule_of(config),
            accelerator,
            config.generator.compile,
        )
    training = training_of(config)
    network = train(
        Stage(
            "autoencoder",
            Autoencoding(autoencoder_of(config, stage)),
            reconstruction_losses(config, stage, adversary, accelerator.device),
            images,
            training,
            folder / "training",
            optimizer_of(training),
            depends=depends_on(config),
            flip=config.data.flip,
            workers=config.data.workers,
            adversary=adversary,
        )
    )
    keep(config, network.autoencoder, images, accelerator)


def depends_on(config: ImageNetConfig) -> dict[str, Any]:
    """Return what the weights of stage 1 depend on, beside its training."""
    settings = config.as_dict()
    stage = settings["encoder"]["stage_one"] | {"steps": None}
    data = settings["data"] | {"workers": None, "latents": None}
    return {"data": data, "stage_one": stage, "perceptual": settings["perceptual"]}


def keep(
    config: ImageNetConfig, autoencoder: Any, images: Images, accelerator: Accelerator
) -> None:
    """Write the autoencoder with the statistics of its latents; the config says that all is."""
    folder = config.out / "encoder"
    encoder = LatentEncoder(autoencoder, torch.zeros(1), torch.ones(1))
    encoder.to(accelerator.device)
    encoder.fit(first_pictures(images, config.encoder.fit, accelerator.device))
    autoencoder.register_to_config(
        latents_mean=encoder.mean.flatten().tolist(),
        latents_std=encoder.std.flatten().tolist(),
    )
    if accelerator.is_main_process:
        partial = folder / "partial"
        autoencoder.save_pretrained(partial)
        keep_digests(partial)
        for path in sorted(partial.iterdir(), reverse=True):  # config.json comes last
            os.replace(path, folder / path.name)
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()


def autoencoder_of(config: ImageNetConfig, stage: StageOneConfig) -> nn.Module:
    """Build the untrained autoencoder."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    count = len(stage.widths)
    sizes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
        "block_out_channels": stage.widths,
        "latent_channels": stage.channels,
        "norm_num_groups": 8,
        "sample_size": config.data.size,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**sizes)


class Autoencoding(nn.Module):
    """An autoencoder as one call, from images to a posterior and a reconstruction of a draw."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor, draws: Draws) -> tuple[Any, Tensor]:
        """Return the posterior and the reconstruction ``(B, 3, H, W)``."""
        posterior = self.autoencoder.encode(images).latent_dist  # type: ignore[operator]
        noise = draws.normal(posterior.mean.shape[1:], POSTERIOR)
        latents = posterior.mean + posterior.std * noise
        return posterior, self.autoencoder.decode(latents).sample  # type: ignore[operator]


def reconstruction_losses(
    config: ImageNetConfig,
    stage: StageOneConfig,
    adversary: AdversarialStep | None,
    device: torch.device,
) -> Callable[[nn.Module, Sequence[Tensor], Draws], Losses]:
    """Return the losses of stage 1: absolute error, divergence of the posterior, perceptual."""
    perceptual = perceptual_of(
        config.perceptual, config.data.size, device, config.generator.compile
    )

    def losses(network: nn.Module, batch: Sequence[Tensor], draws: Draws) -> Losses:
        images = in_range(batch[0])
        posterior, made = network(images, draws)
        terms = {
            "reconstruction": (made - images).abs().flatten(1).mean(1),
            "kl": posterior.kl() / posterior.mean[0].numel(),
        }
        weights: dict[str, float | Tensor] = {"kl": stage.kl}
        weights["reconstruction"] = 1.0
        cost = Losses(terms, weights, made=made, real=images)
        add_perceptual(cost, perceptual, (made, images))
        add_adversarial(cost, adversary, stage.adversarial, draws)
        return cost

    return losses
