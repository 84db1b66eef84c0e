"""Checkpoints in safetensors: written beside and renamed, checked on load, never unpickled."""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flowspace.errors import RunError
from flowspace.training.optimizers import Together
from flowspace.training.place import alike

__all__ = ["Checkpoints", "flatten_optimizer", "restore_optimizer"]

LEFT_OVER = (".tmp*", "*.partial")
"""What a write that was killed leaves beside the checkpoints: the temporary file of safetensors,
and ours.
"""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in one folder, named by their step.

    Args:
        folder: where they are; made when the first one is saved.
        settings: what the run was started with; a checkpoint of other settings is refused.
        keep: how many of the latest are kept.
    """

    folder: Path
    settings: Mapping[str, Any]
    keep: int = 2

    @property
    def fingerprint(self) -> str:
        """A digest of the settings."""
        return hashlib.sha256(
            json.dumps(self.settings, sort_keys=True, default=str).encode()
        ).hexdigest()[:16]

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> Path:
        """Write one checkpoint beside and rename it, so that an interrupted write leaves the
        earlier ones.

        What interrupted writes left is removed; nobody else writes into the folder.
        """
        for torn in [path for pattern in LEFT_OVER for path in self.folder.glob(pattern)]:
            torn.unlink()
        path = self._write(self.folder / f"step-{step:08d}.safetensors", step, tensors, {})
        for old in self._paths()[: -self.keep]:
            old.unlink()
        return path

    def keep_best(self, step: int, tensors: Mapping[str, Tensor], score: float) -> bool:
        """Write ``best.safetensors`` if the score is lower than that of the one there; returns
        whether it was.
        """
        path = self.folder / "best.safetensors"
        try:
            with safe_open(path, "pt") as file:
                before = file.metadata() or {}
        except (SafetensorError, OSError):
            before = {}
        if before.get("fingerprint") == self.fingerprint and not score < float(before["score"]):
            return False
        self._write(path, step, tensors, {"score": repr(score)})
        return True

    def _write(
        self, path: Path, step: int, tensors: Mapping[str, Tensor], more: Mapping[str, str]
    ) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        metadata = {
            "step": str(step),
            "fingerprint": self.fingerprint,
            "settings": json.dumps(self.settings, default=str),
            **more,
        }
        held = {
            name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
        }
        try:
            save_file(held, partial, metadata)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        except (SafetensorError, OSError) as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                f"{path} cannot be written ({error}); the checkpoints before it are whole"
            ) from error
        partial.replace(path)
        return path

    def latest(self) -> tuple[int, dict[str, Tensor]] | None:
        """Return the step and tensors of the latest readable checkpoint, or None where there is
        none.

        Raises:
            RunError: if it belongs to other settings, or none of several can be read.
        """
        paths = self._paths()
        for path in reversed(paths):
            try:
                with safe_open(path, "pt") as file:
                    metadata = file.metadata() or {}
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                warnings.warn(
                    f"{path} cannot be read ({error}); trying the one before", stacklevel=2
                )
                continue
            self._check_settings(path, metadata)
            return int(metadata["step"]), tensors
        if paths:
            raise RunError(
                f"none of the {len(paths)} checkpoints in {self.folder} can be read; delete the "
                "folder to begin anew"
            )
        return None

    def _check_settings(self, path: Path, metadata: Mapping[str, str]) -> None:
        if metadata.get("fingerprint") != self.fingerprint:
            theirs = json.loads(metadata.get("settings", "{}"))
            ours = json.loads(json.dumps(self.settings, default=str))
            names = sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k))
            changes = ", ".join(
                f"{k}: {theirs.get(k)!r} there, {ours.get(k)!r} now" for k in names
            )
            raise RunError(
                f"{path} belongs to a run with other settings ({changes or 'unknown'}); choose "
                "another folder, delete this "
                "one to begin anew, or run with its settings to continue"
            )

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))


def flatten_optimizer(
    optimizer: torch.optim.Optimizer | Together, network: nn.Module
) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named by parameter and slot."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    return {
        f"{names[parameter]}/{slot}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer | Together, network: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `flatten_optimizer` returned."""
    parameters = dict(network.named_parameters())
    for key, value in tensors.items():
        name, slot = key.rsplit("/", 1)
        parameter = parameters[name]
        value = value if slot == "step" else alike(value.to(parameter.device), parameter)
        if isinstance(optimizer, Together):
            optimizer.put(parameter, slot, value)
        else:
            optimizer.state[parameter][slot] = value
