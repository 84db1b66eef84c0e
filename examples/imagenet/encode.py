"""Compute the latents of a config's pictures once, so that training need not run the encoder.

    accelerate launch examples/imagenet/encode.py CONFIG [key=value ...]

Shards of latents, pictures and labels go into ``data.latents``, or ``OUT/latents``. Shards that
are whole are kept: the same command goes on where it was stopped.
"""

# settings are refused before torch is imported, which takes seconds
import settings

if __name__ == "__main__":
    CONFIG, _ = settings.from_command_line(__doc__, latents_made=True)

import functools
from pathlib import Path

import build
import stage_one
import train
from accelerate import Accelerator
from loop import locked_by_first
from settings import ImageNetConfig

from flowspace.vision.latents import encode


def main(config: ImageNetConfig) -> Path:
    """Encode what is left to encode, shared by the processes; return the folder."""
    accelerator = train.accelerator_of(config)
    with locked_by_first(config.out, accelerator):
        return encoded(config, accelerator)


def encoded(config: ImageNetConfig, accelerator: Accelerator) -> Path:
    """Encode the pictures by the encoder, which is trained first where the config asks so."""
    images = build.images_of(config)
    build.check_stage_one_batch(config, images)
    fit = functools.partial(train.fit, accelerator=accelerator)
    encoder = stage_one.encoder_of(config, images, accelerator, fit)
    if config.generator.compile:
        encoder.compile_network()
    folder = Path(config.data.latents or config.out / "latents")
    rank = accelerator.process_index
    ranks = accelerator.num_processes
    encode(images, encoder, folder, flip=config.data.flip, rank=rank, ranks=ranks)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"latents in {folder}; train with data.latents={folder}")
    return folder


if __name__ == "__main__":
    settings.run_program(functools.partial(main, CONFIG))
