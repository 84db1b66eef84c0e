"""Stage 1: the frozen encoder, loaded or trained on the spot, and its latents' statistics."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flowspace.errors import InputError, RunError
from flowspace.recipes.config import StageOneConfig
from flowspace.recipes.imagenet.parts import Parts
from flowspace.training import LoopSettings, train
from flowspace.vision.encoders import LatentEncoder, load_encoder
from flowspace.vision.steps import Autoencoding, ReconstructionStep

__all__ = ["encoder_of"]

MEASURED = 32
"""Pictures that are encoded together when statistics are estimated."""


def encoder_of(parts: Parts) -> LatentEncoder:
    """Return the encoder of a config, with the statistics of its latents; an autoencoder is
    trained first where it asks so.

    Raises:
        InputError: if the config names no encoder.
        RunError: if weights are missing.
    """
    e, device = parts.config.encoder, parts.place.device
    folder = parts.config.out / "encoder"
    if e.stage_one is not None:
        if not (folder / "config.json").exists():
            _train(parts, e.stage_one, folder)
        try:
            return load_encoder(folder, sample=e.sample, pack=e.pack).to(device)
        except RunError as error:
            raise RunError(
                f"{error}; delete {folder / 'config.json'}: it is written again from stage 1's "
                "checkpoint"
            ) from error
    if e.name is None:
        raise InputError(
            "encoder.name is empty; write a name such as va-vae, a path, or encoder.stage_one"
        )
    dtype = torch.bfloat16 if e.half else torch.float32
    encoder = load_encoder(
        e.name, sample=e.sample, dtype=dtype, weights=e.weights, pack=e.pack
    ).to(device)
    if not encoder.known:
        _fit(parts, encoder, parts.config.out / "latents.safetensors")
    return encoder


def _train(parts: Parts, stage: StageOneConfig, folder: Path) -> None:
    """Train diffusers' autoencoder and leave it in the folder, with its latents' statistics."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    c, place = parts.config, parts.place
    torch.manual_seed(c.training.seed + 2)
    count = len(stage.widths)
    sizes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
        "block_out_channels": stage.widths,
        "latent_channels": stage.channels,
        "norm_num_groups": 8,
        "sample_size": c.data.size,
        "mid_block_add_attention": False,
    }
    autoencoder = AutoencoderKL(**sizes)
    step = ReconstructionStep(stage.kl, parts.perceptual(c.perceptual))
    settings = LoopSettings(
        stage.steps,
        stage.batch,
        stage.learning_rate,
        seed=c.training.seed + 3,
        ema=0.99,
        skips=c.training.skips,
        log_every=c.training.log_every,
        checkpoint_every=c.training.checkpoint_every,
    )
    network: Any = train(
        "autoencoder",
        Autoencoding(autoencoder),
        parts.batches,
        parts.opponent(stage.adversarial)(step) if stage.adversarial else step.loss,
        settings,
        folder / "training",
        parts.context("data", "encoder", "perceptual"),
        place=place,
    )
    encoder = LatentEncoder(network.autoencoder, torch.zeros(1), torch.ones(1)).to(place.device)
    _measure(parts, encoder)
    mean, std = (value.flatten().tolist() for value in (encoder.mean, encoder.std))
    network.autoencoder.register_to_config(latents_mean=mean, latents_std=std)
    if place.rank == 0:
        partial = folder / "partial"
        network.autoencoder.save_pretrained(partial)
        for path in sorted(
            partial.iterdir(), reverse=True
        ):  # the config last: it says that all is there
            os.replace(path, folder / path.name)
        shutil.rmtree(partial)
    place.wait()


def _measure(parts: Parts, encoder: LatentEncoder) -> None:
    """Estimate the statistics of the latents from the first pictures."""
    count = min(parts.config.encoder.fit, len(parts.images))
    starts = range(0, count, MEASURED)
    encoder.fit(
        parts.batches(s, min(s + MEASURED, count), 0)[0].to(parts.place.device) for s in starts
    )


def _fit(parts: Parts, encoder: LatentEncoder, path: Path) -> None:
    """Take the statistics that the run keeps, or estimate and keep them."""
    if not path.exists():
        _measure(parts, encoder)
        if parts.place.rank == 0:
            partial = path.with_suffix(".partial")
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"mean": encoder.mean.cpu(), "std": encoder.std.cpu()}, partial)
            os.replace(partial, path)
        parts.place.wait()
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise RunError(
            f"{path} cannot be read ({error}); delete it: the statistics are measured again"
        ) from error
    encoder.set_statistics(found["mean"], found["std"])
