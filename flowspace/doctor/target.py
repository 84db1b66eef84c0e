"""A model and a batch from text such as ``my_package.my_model:build`` or ``my_file.py:build``.

``build()`` takes no arguments and returns one of

    model
    model, latents
    model, latents, images
    model, latents, images, cond

with the model as a callable ``model(z_t, t, s, **cond)``, latents and images of shape ``(B, *)``
and cond a dict of the model's other arguments. Without latents a shape is looked for that the
model takes. Without images the latents stand for them, if the model returns their shape.
"""

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowspace.backends import torch_backend
from flowspace.errors import InputError
from flowspace.inputs import check_model, check_states, checked_cond, kind_of

__all__ = ["Example", "load"]

ROWS = 4
"""How many rows a batch has that is made up here."""

SIDES = (32, 16, 8, 28, 64, 4)
"""What sides of pictures are tried on a model that says nothing."""

LENGTHS = (64, 16)
"""What numbers of tokens are tried on one."""

MOST_LAYERS = 4
"""How many layers' sizes are tried."""

TRIED = "random; their shape was found by trying"
"""What is said of latents that nobody gave."""

HOW = (
    "write def build(): return model, or return model, latents, images, cond, of which the last "
    "ones may be left out"
)
"""What a user is told who wrote something else."""


@dataclass(frozen=True)
class Example:
    """A model and one batch of it.

    Attributes:
        name: what was asked for.
        model: any callable ``model(z_t, t, s, **cond)``.
        latents: clean latents, of shape ``(B, *)``.
        images: what the model outputs, of shape ``(B, *)``.
        cond: the model's other arguments.
        remark: how the batch came about, where it was not given.
    """

    name: str
    model: Callable[..., Tensor]
    latents: Tensor
    images: Tensor
    cond: dict[str, Any]
    remark: str = ""

    def modules(self) -> list[nn.Module]:
        """Return the modules that a model consists of, also of a function that holds them."""
        return modules_of(self.model)


def load(name: str, latents: tuple[int, ...] | None = None) -> Example:
    """Return the model and the batch that a text names.

    Args:
        name: ``module:function``, ``file.py:function``, or the name of a module object in place
            of a function.
        latents: their shape, where ``build`` returns a model alone.

    Raises:
        InputError: if there is no such function, it fails, or it returns something else.
    """
    module, _, attribute = name.partition(":")
    found = _attribute(_module(module), module, attribute)
    parts = _parts(_built(name, found))
    model = parts[0]
    check_model(model)
    given = list(parts[1:]) + [None] * (4 - len(parts))
    cond = checked_cond(given[2])
    remark = ""
    if given[0] is None:
        given[0], remark = _found_latents(model, cond, latents)
    check_states("latents", given[0])
    example = Example(name, model, given[0], given[0], cond, remark)
    return replace(example, images=_images(example, given[1]))


def _module(name: str) -> Any:
    """Return a module by its name or its file; the current folder counts."""
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if name.endswith(".py"):
            return _file(Path(name))
        return importlib.import_module(name)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise InputError(
                f"got {name}, and found no such module in {folder} or on Python's path; run the "
                "command where the module is, or write the file: path/to/my_model.py:build"
            ) from error
        raise InputError(
            f"{name} imports {error.name}, which is not installed; install it, then try again"
        ) from error
    # whatever a user's own file raises while it is imported
    except Exception as error:
        raise InputError(f"{name} cannot be imported: {_said(error)}") from error


def _file(path: Path) -> Any:
    """Return a module made of a file, whose neighbours it may import."""
    if not path.is_file():
        raise InputError(f"got {path}, and there is no such file; the folder is {os.getcwd()}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"got {path}, which Python does not read as a program")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _attribute(module: Any, name: str, attribute: str) -> Any:
    """Return what a module holds under a name, or tell which name is near."""
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = HOW
            if near:
                hint = f"did you mean {near[0]}?"
            raise InputError(f"got {name}:{attribute}, and {name} has no {part}; {hint}")
        found = getattr(found, part)
    return found


def _built(name: str, found: Any) -> Any:
    """Return what a function returns, or a model that stands there itself."""
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise InputError(f"got {name}, which is a {type(found).__name__} and no function; {HOW}")
    try:
        return found()
    except InputError:
        raise
    # whatever a user's own function raises
    except Exception as error:
        raise InputError(f"{name}() fails: {_said(error)}; {HOW}") from error


def _parts(built: Any) -> tuple[Any, ...]:
    """Return model, latents, images, cond: as many as came."""
    parts: tuple[Any, ...] = (built,)
    if isinstance(built, tuple):
        parts = built
    if not 1 <= len(parts) <= 4:
        raise InputError(f"got {len(parts)} values from build(); {HOW}")
    if not callable(parts[0]):
        raise InputError(
            f"got {kind_of(parts[0])} first from build(), which cannot be called; {HOW}"
        )
    return parts


def _images(example: Example, images: Any) -> Tensor:
    """Return the images of a batch; they have the shape of what the model returns."""
    out = plain_forward(example)
    if images is None:
        if out.shape == example.latents.shape:
            return example.latents
        return torch.randn(out.shape, dtype=out.dtype, device=out.device)
    check_states("images", images)
    if images.shape != out.shape:
        raise InputError(
            f"got images of shape {tuple(images.shape)} and a model that returns "
            f"{tuple(out.shape)}; they have to be equal"
        )
    return images


def plain_forward(example: Example) -> Tensor:
    """Return what the model returns of a batch, without gradient.

    Raises:
        InputError: if it fails, or returns something else than one tensor of shape ``(B, *)``.
    """
    rows, latents = len(example.latents), example.latents
    times = torch.linspace(0.3, 0.9, rows, device=latents.device)
    times = times.to(torch_backend.time_dtype(latents))
    try:
        with torch.no_grad():
            out = example.model(example.latents, times, 0.5 * times, **example.cond)
    # whatever a user's own model raises
    except Exception as error:
        raise InputError(
            f"model(z_t, t, s{_named(example.cond)}) fails on latents of {kind_of(latents)} and "
            f"times of {kind_of(times)}: {_said(error)}"
        ) from error
    if not isinstance(out, Tensor) or out.ndim < 1 or len(out) != rows:
        raise InputError(
            f"got {kind_of(out)} from the model for {rows} rows; wrap it so that it returns one "
            "tensor of shape (B, *)"
        )
    return out


def _found_latents(
    model: Any, cond: dict[str, Any], shape: tuple[int, ...] | None
) -> tuple[Tensor, str]:
    """Return random latents of a given shape, or of the first that the model takes."""
    device, dtype = _place(model)
    if shape is not None:
        return torch.randn(shape, device=device, dtype=dtype), f"random, of shape {shape}"
    mixing = None
    for candidate in _shapes(model):
        latents = torch.randn(candidate, device=device, dtype=dtype)
        example = Example("", model, latents, latents, cond)
        try:
            out = plain_forward(example)
            alone = plain_forward(replace(example, latents=latents[:2]))
        except InputError:
            continue
        if out.shape[1:] == alone.shape[1:]:
            return latents, TRIED
        mixing = latents  # its rows were taken for another axis, or it does mix them
    if mixing is not None:
        return mixing, TRIED
    raise InputError(
        "got a model alone from build(), and found no shape of latents that it takes; let it "
        "return model, latents, or write --latents 4,16,32,32 (the shape, rows first)"
    )


def _place(model: Any) -> tuple[torch.device, torch.dtype]:
    """Return where a model's first parameter is, and its dtype."""
    for module in modules_of(model):
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def modules_of(model: Any) -> list[nn.Module]:
    """Return a module, or those that a function holds: in its closure or in its globals."""
    if isinstance(model, nn.Module):
        return [model]
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module):
        return [owner]
    code = getattr(model, "__code__", None)
    if code is None:
        return []
    held = [cell.cell_contents for cell in model.__closure__ or () if _filled(cell)]
    held += [model.__globals__.get(name) for name in code.co_names]
    return [value for value in held if isinstance(value, nn.Module)]


def _filled(cell: Any) -> bool:
    """Return whether a cell of a closure holds a value yet."""
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _shapes(model: Any) -> Iterator[tuple[int, ...]]:
    """Iterate over shapes of latents that a model may take, by its convolutions, then by its
    linear layers.

    Times are often joined to the channels, so up to two channels less are tried too.
    """
    layers = [layer for module in modules_of(model) for layer in module.modules()]
    channels = [layer.in_channels for layer in layers if isinstance(layer, nn.Conv2d)]
    for number in list(dict.fromkeys(channels))[:MOST_LAYERS]:
        yield from _pictures(number)
    features = [layer.in_features for layer in layers if isinstance(layer, nn.Linear)]
    for number in list(dict.fromkeys(features))[:MOST_LAYERS]:
        yield from _vectors(number)


def _pictures(channels: int) -> Iterator[tuple[int, ...]]:
    """Iterate over shapes of pictures."""
    for fewer in range(min(3, channels)):
        for side in SIDES:
            yield ROWS, channels - fewer, side, side


def _vectors(features: int) -> Iterator[tuple[int, ...]]:
    """Iterate over shapes of vectors, and of tokens."""
    for fewer in (2, 0, 1):
        if features > fewer:
            yield ROWS, features - fewer
    for length in LENGTHS:
        yield ROWS, length, features


def _named(cond: dict[str, Any]) -> str:
    """Return the names of a model's other arguments, for a message."""
    return "".join(f", {name}=..." for name in cond)


def _said(error: Exception) -> str:
    """Return an error's type and its first line."""
    said = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {said}".rstrip(": ").rstrip(".")
