"""Models of diffusers whose weights are checked when they are loaded."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from flowspace.errors import RunError

__all__ = ["CheckedModel", "check_digests", "keep_digests"]

DIGESTS = "_digests"
"""The entry of ``config.json`` that holds the SHA-256 of each file of weights, by its name, and
that of its own arguments. What begins with an underscore is no argument of the model, and other
readers pass it over.
"""

WEIGHTS = ("*.safetensors", "*.bin")
BLOCK = 1 << 20
"""Bytes that are read at once."""


class CheckedModel(ModelMixin, ConfigMixin):
    """A model whose folder keeps a digest of each file of weights, and of its config.

    A flipped bit of a weight is otherwise noticed by nobody: safetensors has no checksum, and a
    tensor that is missing is only warned of, and left empty. So is an argument whose name has a
    flipped bit: the model has its default then. All of them are refused where a folder is loaded,
    which is also how a pipeline loads from the hub. A folder without digests, of other programs or
    older versions, is loaded as it is.
    """

    config_name = "config.json"

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the model as diffusers does, with the digests of its files.

        Args:
            save_directory: the folder.
            is_main_process: whether this process writes the config.
            push_to_hub: also upload it, to ``repo_id`` or to the folder's name.
            kwargs: those of diffusers' method.
        """
        folder = Path(save_directory)
        repository = kwargs.pop("repo_id", folder.name)
        super().save_pretrained(folder, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            keep_digests(folder, self.config_name)
        if push_to_hub:
            self.push_to_hub(repository, token=kwargs.get("token"))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any
    ) -> Any:
        """Load a model as diffusers does, and see that its weights are whole.

        Raises:
            RunError: if the config or a file of weights is not what was saved, or a tensor is
                missing.
        """
        place = pretrained_model_name_or_path
        folder = Path(str(place)) / (kwargs.get("subfolder") or "")
        check_digests(folder, cls.config_name)
        told = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(place, output_loading_info=True, **kwargs)
        model, found = loaded
        missing = sorted(found["missing_keys"])
        if missing:
            raise RunError(
                f"the weights in {place} lack {len(missing)} tensor(s) of {cls.__name__}, such as "
                f"{missing[0]}; fetch them again"
            )
        if told:
            return model, found
        return model


def _weights(folder: Path) -> list[Path]:
    return sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def _digest_of_arguments(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a config without what begins with an underscore."""
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    text = json.dumps(arguments, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def keep_digests(folder: Path, config_name: str = "config.json") -> None:
    """Write the digests of a folder's weights and arguments into its config.

    Args:
        folder: that diffusers saved a model into.
        config_name: of its config.
    """
    place = folder / config_name
    config = json.loads(place.read_text())
    digests = {path.name: _digest(path) for path in _weights(folder)}
    digests[config_name] = _digest_of_arguments(config)
    config[DIGESTS] = digests
    place.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_digests(folder: Path, config_name: str = "config.json") -> None:
    """See that a folder holds what was saved; one without digests is let through.

    Args:
        folder: that a model was saved into.
        config_name: of its config.

    Raises:
        RunError: if its config or weights have another digest than its config says.
    """
    try:
        config = json.loads((folder / config_name).read_text())
        wanted = dict(config.get(DIGESTS, {}))
    except (OSError, ValueError, TypeError, AttributeError):
        return  # diffusers says what is wrong with a config
    if wanted.get(config_name) not in (None, _digest_of_arguments(config)):
        raise RunError(
            f"{folder / config_name} is not what was saved: its arguments have another SHA-256 "
            f"than it says; fetch it again, or take {config_name!r} out of its {DIGESTS!r} if you "
            "changed them on purpose"
        )
    for path in _weights(folder):
        if path.name in wanted and _digest(path) != wanted[path.name]:
            raise RunError(
                f"{path} is not what was saved: its SHA-256 is another than {config_name} says; "
                "fetch it again"
            )
