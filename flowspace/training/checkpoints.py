"""Checkpoints in safetensors: written beside and renamed, checked on load, never unpickled.

A checkpoint holds whole tensors under ``part:name``, however they are shared out among processes,
so another number of processes continues from it. A digest of all of them is kept beside, since
safetensors has none of its own and a flipped bit would give another run.
"""

import contextlib
import hashlib
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flowspace.errors import RunError

__all__ = [
    "Checkpoints",
    "alike",
    "digest_of",
    "fill",
    "flatten_optimizer",
    "locked",
    "packed",
    "restore_optimizer",
    "unpacked",
    "whole",
]

DIGEST = "sha256"

LONGEST_GOODBYE = 8.0
"""Seconds that the reading processes of a killed run may live on, and its lock with them."""

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
        text = json.dumps(self.settings, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> Path:
        """Write one checkpoint beside and rename it, so that an interrupted write leaves the
        earlier ones.

        What interrupted writes left is removed; nobody else writes into the folder.
        """
        for pattern in LEFT_OVER:
            for torn in list(self.folder.glob(pattern)):
                torn.unlink()
        path = self._write(self.folder / f"step-{step:08d}.safetensors", step, tensors)
        for old in self._paths()[: -self.keep]:
            old.unlink()
        return path

    def _write(self, path: Path, step: int, tensors: Mapping[str, Tensor]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        metadata = {
            "step": str(step),
            "fingerprint": self.fingerprint,
            "settings": json.dumps(self.settings, default=str),
        }
        held = {}
        for name, tensor in tensors.items():
            held[name] = tensor.detach().cpu().contiguous().clone()
        metadata[DIGEST] = digest_of(held)
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
        """Return the step and tensors of the latest whole checkpoint, None where there is none.

        Raises:
            RunError: if it belongs to other settings, or none of several can be read.
        """
        found = self.read_latest()
        if found is None:
            return None
        path, metadata, tensors = found
        self._check_settings(path, metadata)
        return int(metadata["step"]), tensors

    def read_latest(self) -> tuple[Path, dict[str, str], dict[str, Tensor]] | None:
        """Return the path, metadata and tensors of the latest whole checkpoint, of any settings.

        Raises:
            RunError: if none of several can be read.
        """
        paths = self._paths()
        for path in reversed(paths):
            try:
                with safe_open(path, "pt") as file:
                    metadata = file.metadata() or {}
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                _check_whole(path, metadata, tensors)
            except (SafetensorError, OSError) as error:
                warnings.warn(
                    f"{path} cannot be read ({error}); trying the one before", stacklevel=2
                )
                continue
            return path, metadata, tensors
        if paths:
            raise RunError(
                f"none of the {len(paths)} checkpoints in {self.folder} can be read; delete the "
                "folder to begin anew"
            )
        return None

    def _check_settings(self, path: Path, metadata: Mapping[str, str]) -> None:
        if metadata.get("fingerprint") == self.fingerprint:
            return
        theirs = _flat(json.loads(metadata.get("settings", "{}")))
        ours = _flat(json.loads(json.dumps(self.settings, default=str)))
        changes = []
        for name in sorted({*theirs, *ours}):
            before, now = theirs.get(name), ours.get(name)
            if before != now:
                changes.append(f"{name}: {before!r} there, {now!r} now")
        raise RunError(
            f"{path} belongs to a run with other settings ({', '.join(changes) or 'unknown'}); "
            "choose another folder, delete this one to begin anew, or run with its settings to "
            "continue"
        )

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested settings by path, such as ``objective.kind``."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value
    return found


def _check_whole(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """See that a checkpoint is the one that was written under this name.

    Raises:
        OSError: if it is not.
        RunError: if it was written by an earlier version, which kept no digest.
    """
    if "fingerprint" in metadata and DIGEST not in metadata:
        raise RunError(
            f"{path} was written by an earlier version of flowspace, without a digest; continue "
            "it with that version, or choose another folder"
        )
    step = int(path.stem.removeprefix("step-"))
    told = metadata.get("step")
    if told != str(step):
        raise OSError(f"it says that it is of step {told}")
    if metadata.get(DIGEST, "") != digest_of(tensors):
        raise OSError("its tensors have another digest than when they were written")


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors by name: of names, types, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        numbers = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(numbers.view(torch.uint8).numpy().data)
    return found.hexdigest()


# --- what a checkpoint holds -------------------------------------------------------------------


def packed(parts: Mapping[str, Mapping[str, Tensor]], kept: bool = True) -> dict[str, Tensor]:
    """Return the tensors of several parts in one table on the CPU; all processes must call.

    Args:
        parts: tensors by name; they may be shared out, and are made whole one after the other.
        kept: whether this process wants the table; the others help to make it.
    """
    table = {}
    for part, tensors in parts.items():
        for name, value in tensors.items():
            tensor = whole(value)
            if kept:
                table[f"{part}:{name}"] = tensor.detach().cpu()
    return table


def unpacked(table: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the parts that `packed` put together.

    Args:
        table: what `packed` returned.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in table.items():
        part, name = key.split(":", 1)
        parts.setdefault(part, {})[name] = value
    return parts


@torch.no_grad()
def fill(state: Mapping[str, Tensor], values: Mapping[str, Tensor], where: Path) -> None:
    """Copy saved tensors into those of the same names and shapes.

    Args:
        state: is changed in place; its tensors may be shared out.
        values: whole tensors.
        where: they come from, for the message.

    Raises:
        RunError: if they are another network's.
    """
    others = set(state.keys() ^ values.keys())
    for name in state.keys() & values.keys():
        if state[name].shape != values[name].shape:
            others.add(name)
    if others:
        raise RunError(
            f"{where} holds another network: {', '.join(sorted(others)[:3])} differ "
            f"({len(others)} in all); choose another folder or delete it"
        )
    for name, tensor in state.items():
        tensor.copy_(alike(values[name].to(tensor.device), tensor))


def flatten_optimizer(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """Return the optimiser's state as tensors named by parameter and slot.

    Args:
        optimizer: of the network's parameters.
        network: whose names of parameters are taken.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    tensors = {}
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{names[parameter]}/{slot}"] = value
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, network: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `flatten_optimizer` returned.

    Args:
        optimizer: is changed in place.
        network: whose parameters it trains.
        tensors: what `flatten_optimizer` returned.
    """
    parameters = dict(network.named_parameters())
    for key, value in tensors.items():
        name, slot = key.rsplit("/", 1)
        parameter = parameters[name]
        if slot != "step":  # a number, which some optimisers keep on the CPU
            value = alike(value.to(parameter.device), parameter)
        elif _on_device(optimizer, parameter):
            value = value.to(parameter.device)
        optimizer.state[parameter][slot] = value


def _on_device(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Whether the optimiser counts the steps of a parameter on its device."""
    for group in optimizer.param_groups:
        if any(parameter is held for held in group["params"]):
            return bool(group.get("fused") or group.get("capturable"))
    return False


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its parts, where it is shared out; all processes must call.

    Args:
        tensor: a plain tensor is returned as it is.
    """
    full = getattr(tensor, "full_tensor", None)
    if full is None:
        return tensor
    return full()


def alike(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor shared out as another one is."""
    if not hasattr(like, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)  # type: ignore


# --- who writes --------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder for this process; two runs in one would write over each other.

    The lock ends with the process, however it ends.

    Args:
        folder: is made if it is not there.

    Raises:
        RunError: if another process has it; names it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # there is none on Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        deadline = time.monotonic() + LONGEST_GOODBYE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise RunError(
                        f"{folder} is used by {file.read().strip() or 'another process'}; wait "
                        "for it, or choose another folder"
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
