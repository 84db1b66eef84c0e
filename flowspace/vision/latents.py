"""Latents computed once: shards of latents, pictures and labels that training reads instead of
running the encoder.

A shard holds consecutive images: ``latents`` ``(n, 1 or 2, C, h, w)`` in float16, normalised, of
the image and its mirror image; ``images`` ``(n, 3, H, W)`` in uint8; ``labels`` ``(n,)``. A
posterior that is sampled is drawn once for each of them, by the image's number. Shards are written
beside and renamed, so that an interrupted run leaves whole ones, and goes on after them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from flowspace.errors import InputError, RunError
from flowspace.training.draws import seed_of
from flowspace.vision.data import Images, order_of
from flowspace.vision.encoders import LatentEncoder
from flowspace.vision.tensor_files import check_whole, metadata_of, write_whole

__all__ = ["LatentImages", "encode", "fingerprint"]

DRAWN = 7
"""Keeps the draws of posteriors apart from the other uses of a number."""

MADE = ("count", "shard", "flip", "images", "encoder")
"""What a shard says of itself."""

MOST_OPEN = 64
"""Shards that are kept open at once."""


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
        RunError: if the folder holds shards of other images, another encoder or other settings,
            or cannot be written, or a latent is not finite.
        InputError: if the encoder's statistics are not known, or a number is not positive.
    """
    if min(batch, shard) < 1 or not encoder.known:
        raise InputError(
            f"got batch = {batch}, shard = {shard}; write 1 or more, and fit() the encoder first"
        )
    made = {"count": len(images), "shard": shard, "flip": flip, **fingerprint(images, encoder)}
    starts = range(0, len(images), shard)[rank::ranks]
    for start in tqdm(starts, "latents", unit="shard", disable=rank > 0):
        path = _path(folder, start)
        if path.exists():
            if _made(path) != made:
                raise RunError(
                    f"{path} holds other images, another encoder or other settings; choose "
                    "another folder"
                )
            continue
        end = min(start + shard, len(images))
        parts: dict[str, list[Tensor]] = {"latents": [], "images": [], "labels": []}
        for first in range(start, end, batch):
            numbers = range(first, min(first + batch, end))
            found = _encoded(images, encoder, numbers, flip)
            for name, tensor in found.items():
                parts[name].append(tensor)
        tensors = {name: torch.cat(tensors) for name, tensors in parts.items()}
        write_whole(path, tensors, {"made": json.dumps(made, sort_keys=True)})


def _encoded(
    images: Images, encoder: LatentEncoder, numbers: range, flip: bool
) -> dict[str, Tensor]:
    """Return the tensors of some consecutive images."""
    device = encoder.mean.device
    pictures, labels = [], []
    for number in numbers:
        picture, label = images.row(number)
        pictures.append(picture)
        labels.append(label)
    pixels = torch.stack(pictures)
    x = pixels.float() / 127.5 - 1
    views = [x]
    if flip:
        views.append(x.flip(-1))
    encoded = []
    for mirrored, view in enumerate(views):
        draws = []
        for number in numbers:
            seed = seed_of(number, DRAWN, mirrored)
            draws.append(torch.Generator(device).manual_seed(seed))
        latents = encoder.encode(view.to(device), draws)
        encoded.append(latents.cpu())
    latents = torch.stack(encoded, 1).half()
    finite = latents.flatten(1).isfinite().all(1)
    if not finite.all():
        number = numbers[int(finite.int().argmin())]
        raise RunError(
            f"the latent of {images.name(number)} is not finite in half precision; the encoder's "
            "weights are broken, or it overflows: run it in float32, and fit() its statistics"
        )
    return {"latents": latents, "images": pixels, "labels": torch.tensor(labels)}


def fingerprint(images: Images, encoder: LatentEncoder) -> dict[str, str]:
    """Say which images and which encoder, by their names, weights and statistics."""
    names = [Path(images.name(number)).name for number in range(len(images))]
    pictures = hashlib.sha256("\n".join(names).encode())
    weights = hashlib.sha256()
    for tensor in encoder.state_dict().values():
        numbers = tensor.detach().cpu().float().contiguous().numpy()
        weights.update(numbers.tobytes())
    kind = "mean"
    if encoder.sample:
        kind = "sampled"
    return {
        "images": f"{pictures.hexdigest()[:16]} of {images.size} pixels",
        "encoder": f"{weights.hexdigest()[:16]}, {kind}",
    }


def _path(folder: Path, start: int) -> Path:
    return folder / f"latents-{start:08d}.safetensors"


def _made(path: Path) -> Mapping[str, Any]:
    """Return what a shard says of its images, their encoder and their settings."""
    try:
        about = metadata_of(path) or {}
        made = json.loads(about["made"])
        return {name: made[name] for name in MADE}
    except (KeyError, ValueError, TypeError, RecursionError):
        raise RunError(
            f"{path} cannot be read as a shard of latents; delete it and run "
            "examples/imagenet/encode.py CONFIG again"
        ) from None


class LatentImages:
    """Images, their latents and classes by number, from the shards that `encode` wrote.

    Files are opened when a row is asked for, by whoever asks: a worker of a DataLoader opens its
    own. The first to open one sees that it holds what was written, by its digest.

    Args:
        folder: of the shards.
        flip: mirror images will be asked for, so they must have been encoded.

    Attributes:
        made: what the shards say of their images, their encoder and their settings.

    Raises:
        RunError: if shards are missing, torn, or without mirror images where they are asked for.
    """

    def __init__(self, folder: Path, flip: bool = True) -> None:
        self.folder = Path(folder)
        self.flip = flip
        self._files: dict[Path, Any] = {}
        paths = sorted(self.folder.glob("latents-*.safetensors"))
        if not paths:
            raise RunError(
                f"{folder} holds no latents; write: python examples/imagenet/encode.py CONFIG"
            )
        every = [_made(path) for path in paths]
        self.made = every[0]
        shards = -(-self.made["count"] // self.made["shard"])
        alike = every.count(self.made)
        if not alike == len(paths) == shards:
            raise RunError(
                f"{folder} is not complete, or holds shards of two runs; run "
                "examples/imagenet/encode.py CONFIG again"
            )
        if flip and not self.made["flip"]:
            raise RunError(
                f"{folder} was encoded without mirror images; write data.flip=false, or encode "
                "again"
            )
        # In shared memory, so that no worker reads all of a shard that another one has.
        self._whole = torch.zeros(shards, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return self.made["count"]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def row(self, index: int, mirrored: bool = False) -> tuple[Tensor, Tensor, int]:
        """Return one image with its latent and class.

        Args:
            index: of the image.
            mirrored: the mirror image, and the latent of the mirror image.

        Returns:
            The latent, float16 ``(C, h, w)``; the image, uint8 ``(3, H, W)``; the class.

        Raises:
            IndexError: if there is no such image.
            InputError: if the mirror image was not encoded.
            RunError: if the shard was written again by another run, or does not hold what was
                written.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"got index {index}; there are {len(self)} images")
        if mirrored and not self.made["flip"]:
            raise InputError(
                f"got mirrored = True; {self.folder} was encoded without mirror images"
            )
        number = index % len(self)
        offset = number % self.made["shard"]
        file = self._opened(number - offset)
        one = slice(offset, offset + 1)
        latents = file.get_slice("latents")[one]
        images = file.get_slice("images")[one]
        label = file.get_slice("labels")[one]
        if mirrored:
            images = images.flip(-1)
        return latents[0, int(mirrored)], images[0], int(label)

    def order(self, seed: int, number: int) -> Sequence[int]:
        """Return the order in which a pass takes the images."""
        return order_of(seed, number, len(self))

    def _opened(self, start: int) -> Any:
        """Return the open file of the shard whose first image has this number."""
        path = _path(self.folder, start)
        file = self._files.get(path)
        if file is not None:
            return file
        if _made(path) != self.made:
            raise RunError(f"{path} was written again by another run; start this one anew")
        number = start // self.made["shard"]
        if not self._whole[number]:
            check_whole(path)
            self._whole[number] = True
        if len(self._files) >= MOST_OPEN:
            self._files.clear()
        file = safe_open(path, "pt").__enter__()
        self._files[path] = file
        return file
