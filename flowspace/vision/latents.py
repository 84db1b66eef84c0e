"""Latents computed once: shards of latents, pictures and labels that training reads instead of
running the encoder.

A shard holds consecutive images: ``latents`` ``(n, 1 or 2, C, h, w)`` in float16, normalised, of
the image and its mirror image; ``images`` ``(n, 3, H, W)`` in uint8; ``labels`` ``(n,)``. A
posterior that is sampled is drawn once for each of them, by the image's number. Shards are written
beside and renamed, so that an interrupted run leaves whole ones, and goes on after them.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from flowspace.errors import InputError, RunError
from flowspace.training import Batches, seed_of
from flowspace.vision.data import Images, order_of
from flowspace.vision.encoders import LatentEncoder

__all__ = ["LatentBatches", "encode"]

DRAWN = 7
"""Keeps the draws of posteriors apart from the other uses of a number."""


def encode(
    images: Images,
    encoder: LatentEncoder,
    folder: Path,
    *,
    flip: bool = True,
    batch: int = 32,
    shard: int = 1024,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Encode all images into shards; those that are there are kept.

    Args:
        images: what is encoded.
        encoder: by which, with its statistics known.
        folder: of the shards.
        flip: also encode the mirror images.
        batch: images that are encoded together.
        shard: images of one file.
        rank: the number of this process; shard k is process k mod ranks'.
        ranks: how many there are.

    Raises:
        RunError: if the folder holds shards of other images, another encoder or other settings.
        InputError: if the encoder's statistics are not known, or a number is not positive.
    """
    if min(batch, shard) < 1 or not encoder.known:
        raise InputError(
            f"batch = {batch}, shard = {shard} came; write 1 or more, and fit() the encoder first"
        )
    made = {"count": len(images), "shard": shard, "flip": flip, **_fingerprint(images, encoder)}
    folder.mkdir(parents=True, exist_ok=True)
    device = encoder.mean.device
    starts = [start for start in range(0, len(images), shard) if start // shard % ranks == rank]
    for start in tqdm(starts, "latents", unit="shard", disable=rank > 0):
        path = _path(folder, start)
        if path.exists() and _made(path) == made:
            continue
        if path.exists():
            raise RunError(
                f"{path} holds other images, another encoder or other settings; choose another "
                "folder"
            )
        numbers = range(start, min(start + shard, len(images)))
        parts = [
            _encoded(images, encoder, numbers[i : i + batch], flip, device)
            for i in range(0, len(numbers), batch)
        ]
        tensors = {
            name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]
        }
        partial = path.with_suffix(".partial")
        try:
            save_file(tensors, partial, {"made": json.dumps(made, sort_keys=True)})
        except (SafetensorError, OSError) as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                f"{path} cannot be written ({error}); the shards before it are whole"
            ) from error
        os.replace(partial, path)


def _encoded(
    images: Images, encoder: LatentEncoder, numbers: range, flip: bool, device: torch.device
) -> dict[str, Tensor]:
    pictures, labels = zip(*(images[number] for number in numbers), strict=True)
    x = torch.stack(pictures)
    views = [x, x.flip(-1)] if flip else [x]
    draw = torch.Generator(device).manual_seed(seed_of(numbers[0], DRAWN))
    latents = torch.stack([encoder.encode(view.to(device), draw).cpu() for view in views], 1)
    pixels = ((x + 1) * 127.5).round().to(torch.uint8)
    return {"latents": latents.half(), "images": pixels, "labels": torch.tensor(labels)}


def _fingerprint(images: Images, encoder: LatentEncoder) -> dict[str, str]:
    """Say which images and which encoder, by their names, weights and statistics."""
    names = hashlib.sha256(
        "\n".join(Path(images.name(i)).name for i in range(len(images))).encode()
    )
    weights = hashlib.sha256()
    for tensor in encoder.state_dict().values():
        weights.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return {
        "images": f"{names.hexdigest()[:16]} of {images.size} pixels",
        "encoder": f"{weights.hexdigest()[:16]}, {'sampled' if encoder.sample else 'mean'}",
    }


def _path(folder: Path, start: int) -> Path:
    return folder / f"latents-{start:08d}.safetensors"


def _made(path: Path) -> Mapping[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["made"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error}); delete it and run flowspace encode again"
        ) from None


@dataclass(frozen=True)
class LatentBatches(Batches):
    """Batches of latents, images and labels from the shards that `encode` wrote, shuffled anew in
    every pass.

    Args:
        folder: of the shards.
        flip: mirror every other image, with the latent of its mirror image.

    Raises:
        RunError: if shards are missing, torn, or without mirror images where they are asked for.
    """

    folder: Path
    flip: bool = True
    made: Mapping[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        paths = sorted(Path(self.folder).glob("latents-*.safetensors"))
        if not paths:
            raise RunError(f"{self.folder} holds no latents; write: flowspace encode CONFIG")
        made = [_made(path) for path in paths]
        if any(one != made[0] for one in made) or len(paths) != -(
            -made[0]["count"] // made[0]["shard"]
        ):
            raise RunError(
                f"{self.folder} is not complete, or holds shards of two runs; run flowspace "
                "encode again"
            )
        if self.flip and not made[0]["flip"]:
            raise RunError(
                f"{self.folder} was encoded without mirror images; write data.flip=false, or "
                "encode again"
            )
        object.__setattr__(self, "made", made[0])

    def __len__(self) -> int:
        return self.made["count"]

    def __call__(self, first: int, last: int, seed: int) -> tuple[Tensor, ...]:
        """Return latents ``(B, C, h, w)``, images ``(B, 3, H, W)`` in [-1, 1] and labels of rows
        ``first`` to ``last``.
        """
        rows = [self._one(seed, *divmod(place, len(self))) for place in range(first, last)]
        latents, images, labels = zip(*rows, strict=True)
        return (
            torch.stack(latents).float(),
            torch.stack(images).float() / 127.5 - 1,
            torch.cat(labels),
        )

    def _one(self, seed: int, number: int, place: int) -> tuple[Tensor, ...]:
        index = order_of(seed, number, len(self))[place]
        mirrored = bool(self.flip and seed_of(seed, number, index, 2) >> 31 & 1)
        start = index // self.made["shard"] * self.made["shard"]
        at = slice(index - start, index - start + 1)
        file = _opened(_path(Path(self.folder), start))
        latents, images, labels = (
            file.get_slice(name)[at] for name in ("latents", "images", "labels")
        )
        return latents[0, int(mirrored)], images[0].flip(-1) if mirrored else images[0], labels


@functools.lru_cache(maxsize=64)
def _opened(path: Path) -> Any:
    return safe_open(path, "pt").__enter__()
