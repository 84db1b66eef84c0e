"""Weights from files that strangers made: tensors are read, nothing is executed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowspace.errors import RunError

__all__ = ["read_tensors"]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or of a checkpoint of torch, in which nothing else
    is unpickled.

    Args:
        path: the file; a checkpoint may hold its tensors under ``state_dict``.

    Raises:
        RunError: if it cannot be read, asks for anything but tensors, or is no table of them.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RunError(
            f"{path} cannot be read as weights, which are tensors and nothing else: "
            f"{_first_line(error)}"
        ) from error
    table = loaded
    if isinstance(loaded, Mapping):
        table = loaded.get("state_dict", loaded)
    if not isinstance(table, Mapping) or not table:
        raise RunError(f"{path} holds {type(table).__name__}, not a table of tensors by name")
    for name, tensor in table.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise RunError(
                f"{path} holds {type(tensor).__name__} under {name!r}, where a tensor by name "
                "belongs"
            )
    return dict(table)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
