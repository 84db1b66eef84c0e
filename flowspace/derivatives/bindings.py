"""What names were bound to before a run of a model bound them to others.

A model may keep its state in more than the memory of buffers: it binds a buffer or an attribute to
a new tensor, counts its calls, appends to a list, or gives a tensor other memory (``x.data = y``).
"""

import copy
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

__all__ = ["Bindings", "Snapshot"]

NUMBERS = (bool, int, float, complex)
CONTAINERS = (list, dict, set, deque)

OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has, which are torch's own."""

ENGINES = ("torch.distributed", "torch.nn.parallel", "torch._dynamo")
"""Where modules come from that keep the state of an engine in their attributes."""


class Bindings:
    """The tensors that buffers of modules were, and the memory of tensors, before a run changed
    them; they are noted as that happens.

    Attributes:
        before: by module and name: both, and the tensor.
        memory: by id: a tensor, and another one in the memory that it had.
    """

    def __init__(self) -> None:
        self.before: dict[tuple[int, str], tuple[nn.Module, str, Tensor]] = {}
        self.memory: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def note(self, module: nn.Module, name: str) -> None:
        """Keep what a buffer is, before it is another tensor for the first time."""
        tensor = getattr(module, name, None)
        if isinstance(tensor, Tensor):
            self.before.setdefault((id(module), name), (module, name, tensor))

    def note_memory(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor, before it is given another for the first time."""
        key = id(tensor)
        if key not in self.memory:
            gone = weakref.ref(tensor, lambda _: self.memory.pop(key, None))
            self.memory[key] = gone, tensor.data

    def restore(self) -> None:
        """Bind the names, and give the tensors the memory that they had."""
        for module, name, tensor in self.before.values():
            setattr(module, name, tensor)
        for reference, before in list(self.memory.values()):
            tensor = reference()
            if tensor is not None:
                tensor.data = before


class Snapshot:
    """What the attributes of modules are: buffers, frozen parameters, tensors, numbers, and what
    simple containers hold.

    Args:
        modules: whose attributes count.
        shared: several processes run the model: then buffers alone count, for an engine keeps its
            weights as attributes.
    """

    def __init__(self, modules: Iterable[nn.Module], shared: bool) -> None:
        self.held = []
        kinds: tuple[type, ...] = (Tensor, *NUMBERS, *CONTAINERS)
        if shared:
            kinds = ()
        for module in modules:
            if type(module).__module__.startswith(ENGINES) or not isinstance(
                module._buffers, dict
            ):
                continue  # a script's attributes are in C++
            own = {}
            for name, value in vars(module).items():
                if isinstance(value, kinds) and name not in OF_TORCH:
                    own[name] = value, _content(value)
            frozen = {}
            if not shared:
                frozen = {name: p for name, p in module._parameters.items() if _is_frozen(p)}
            if own or frozen or module._buffers:
                self.held.append((module, dict(module._buffers), frozen, own))

    def restore(self) -> bool:
        """Make the attributes what they were; those that are new stay.

        Returns:
            whether any had changed.
        """
        changed = False
        for module, buffers, frozen, own in self.held:
            if not _same(module._buffers, buffers):
                changed = True
                module._buffers.clear()
                module._buffers.update(buffers)
            for name, parameter in frozen.items():
                if module._parameters.get(name) is not parameter:
                    changed = True
                    module._parameters[name] = parameter
            attributes = vars(module)
            for name, (value, content) in own.items():
                if content is not None and not _same(value, content):
                    changed = True
                    _refill(value, content)
                if attributes.get(name) is not value:
                    changed = True
                    attributes[name] = value
        return changed


def _is_frozen(parameter: nn.Parameter | None) -> bool:
    """Return whether a parameter is one that does not learn, and no engine's part of one."""
    return type(parameter) is nn.Parameter and not parameter.requires_grad


def _content(value: Any) -> Any:
    """Return a copy of a container, and None for anything else."""
    if type(value) in CONTAINERS:
        return copy.copy(value)
    return None


def _same(now: Any, before: Any) -> bool:
    """Return whether two containers hold the same objects."""
    if len(now) != len(before):
        return False
    if isinstance(now, set):
        return now == before
    if isinstance(now, dict):
        now, before = [*now.keys(), *now.values()], [*before.keys(), *before.values()]
    return all(a is b for a, b in zip(now, before, strict=True))


def _refill(container: Any, content: Any) -> None:
    """Let a container hold what it held."""
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(content)
    else:
        container.extend(content)
