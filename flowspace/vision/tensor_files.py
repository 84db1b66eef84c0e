"""Tensors in files of their own: written beside and renamed, and read only if they are what was
written.

safetensors has no checksum, and a flipped bit would give other results: the SHA-256 of the tensors
is kept in the metadata. All metadata is one text, since safetensors writes several in any order,
and the same tensors shall give the same file.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowspace.errors import RunError
from flowspace.training.checkpoints import digest_of

__all__ = ["check_whole", "metadata_of", "read_whole", "write_whole"]

ABOUT = "about"
DIGEST = "sha256"


def write_whole(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors beside the file and rename it, so that an interrupted write leaves nothing
    torn.

    Raises:
        RunError: if the file cannot be written, as on a full disk.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {**metadata, DIGEST: digest_of(held)}
    partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(held, partial, {ABOUT: json.dumps(about, sort_keys=True)})
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise RunError(
            f"{path} cannot be written ({error}); files that were written before are whole"
        ) from error


def read_whole(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file that `write_whole` wrote.

    Raises:
        RunError: if it cannot be read, or does not hold what was written.
    """
    tensors = {}
    with _opened(path) as file:
        metadata = _about(file.metadata())
        for name in file.keys():  # noqa: SIM118  # it is no dictionary
            tensors[name] = file.get_tensor(name).clone()  # away from the file, which may change
    _check_digest(path, tensors, metadata)
    return tensors, metadata


def check_whole(path: Path) -> None:
    """See that a file holds what `write_whole` wrote; its tensors are not kept in memory.

    Raises:
        RunError: if it cannot be read, or holds something else.
    """
    tensors = {}
    with _opened(path) as file:
        metadata = _about(file.metadata())
        for name in file.keys():  # noqa: SIM118  # it is no dictionary
            tensors[name] = file.get_tensor(name)
        _check_digest(path, tensors, metadata)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file of tensors; RunError where it cannot be read, at once or later."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} cannot be read ({error}); delete it to make it anew") from error


def _check_digest(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    if metadata.get(DIGEST) != digest_of(tensors):
        raise RunError(
            f"{path} does not hold what was written: its tensors have another SHA-256 than its "
            "metadata; delete it to make it anew"
        )


def metadata_of(path: Path) -> dict[str, str] | None:
    """Return what a file says of itself; None where there is no file that can be read."""
    try:
        with safe_open(path, "pt") as file:
            return _about(file.metadata())
    except (SafetensorError, OSError):
        return None


def _about(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return the metadata that `write_whole` wrote; nothing of a file that it did not write."""
    try:
        about = json.loads((metadata or {})[ABOUT])
    except (KeyError, ValueError, RecursionError):
        return {}
    if not isinstance(about, dict):
        return {}
    return about
