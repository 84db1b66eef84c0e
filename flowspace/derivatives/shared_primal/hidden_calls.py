"""Calls that no function mode sees: autograd.Function, functions of torch.jit, what torch.compile compiled.

This is the one place that changes torch for the whole process, and it does so only while a carrier is at work in some thread:
other threads, and this one outside its carrier, pass through what stands there.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from flowspace.derivatives.shared_primal.carrier import Carrier

__all__ = ["at_work", "capture_by", "capturing", "compiles", "off_duty", "recomputes", "watched"]

_active = threading.local()
_lock = threading.Lock()
_users: list[Any] = []
_originals: list[tuple[Any, str, Any]] = []


def at_work() -> "Carrier | None":
    """Return the carrier that is at work in this thread, or None."""
    return getattr(_active, "carrier", None)


@contextlib.contextmanager
def off_duty(carrier: "Carrier | None") -> Iterator[None]:
    """Let a carrier see nothing of what is called."""
    if carrier is None:
        yield
        return
    before, idle = at_work(), carrier.idle
    _active.carrier, carrier.idle = None, True
    try:
        yield
    finally:
        _active.carrier, carrier.idle = before, idle


@contextlib.contextmanager
def watched(carrier: "Carrier") -> Iterator[None]:
    """Show a carrier the calls that no function mode sees, for as long as any carrier is at work in any thread."""
    before, _active.carrier = at_work(), carrier
    with _lock:
        if not _users:
            _patch(carrier)
        _users.append(carrier)
    try:
        yield
    finally:
        _active.carrier = before
        with _lock:
            _users.remove(carrier)
            if not _users:
                _restore()


def _patch(carrier: "Carrier") -> None:
    places: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (torch.autograd.Function, "apply", _apply),
        (torch._C.ScriptFunction, "__call__", _script),
        (torch._C.ScriptMethod, "__call__", _script),
    ]
    if compiles():
        torch._dynamo.eval_frame.skip_code(type(carrier).__torch_function__.__code__)
        places.append((torch._dynamo.eval_frame, "_callback_from_stance", _callback))
    for holder, name, replacement in places:
        original = holder.__dict__[name]
        _originals.append((holder, name, original))
        setattr(holder, name, replacement(original))


def _restore() -> None:
    for holder, name, original in _originals:
        setattr(holder, name, original)
    _originals.clear()


def _apply(original: Any) -> Any:
    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        outs = original.__get__(None, cls)(*args, **kwargs)
        carrier = at_work()
        if carrier is None:
            return outs
        with torch._C.DisableTorchFunction():  # pyright: ignore
            return carrier.through_function(cls, args, outs)

    return classmethod(apply)


def _script(original: Any) -> Any:
    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        carrier = at_work()
        if carrier is None:
            return original(function, *args, **kwargs)
        return carrier.through_script(original, function, args, kwargs)

    return call


# --- torch.compile


def compiles() -> bool:
    """Return whether this torch has what compiled parts need to be met: 2.11 does, and the newest tried, 2.14."""
    frames = torch.__dict__.get("_dynamo")
    return frames is not None and all(
        hasattr(frames.eval_frame, name)
        for name in ("_callback_from_stance", "_create_wrapped_callback", "innermost_backend")
    )


_dual_callbacks: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _callback(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Have what torch.compile compiles be compiled with its tangents where a carrier is at work."""

    def callback_from_stance(callback: Any) -> Any:
        callback = original(callback)
        if at_work() is None or callback in (None, False):
            return callback
        return _dual_callback(callback)

    return callback_from_stance


def _dual_callback(callback: Any) -> Any:
    """Return what compiles with tangents as another callback compiles without."""
    from flowspace.derivatives.shared_primal.compiled import Backend

    if callback not in _dual_callbacks:
        backend = torch._dynamo.eval_frame.innermost_backend(callback)
        known = isinstance(backend, Backend)
        _dual_callbacks[callback] = callback if known else _Callback(Backend(backend))
    return _dual_callbacks[callback]


class _Callback:
    """Compiles a frame, with guards on hooks of modules, which torch.compile leaves out by default."""

    def __init__(self, backend: Any) -> None:
        self._torchdynamo_orig_backend = torch._dynamo.eval_frame._create_wrapped_callback(backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            return self._torchdynamo_orig_backend(*args, **kwargs)


capturing = torch._C._dynamo.eval_frame.get_eval_frame_callback  # pyright: ignore
"""Returns what torch.compile captures frames with in this thread, or None; a builtin, so that it is none itself."""

capture_by = torch._C._dynamo.eval_frame.set_eval_frame  # pyright: ignore
"""Sets what torch.compile captures frames with in this thread; None: it captures nothing."""


def recomputes() -> bool:
    """Return whether what autograd saves is packed by hooks: a checkpoint computes it again and compares."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # pyright: ignore
