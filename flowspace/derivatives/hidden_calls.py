"""Calls that no function mode sees: autograd.Function, functions of torch.jit, what torch.compile
compiled.

This is the one place that changes torch for the whole process, and it does so only while a carrier
is at work in some thread: other threads, and this one outside its carrier, pass through what
stands there.
"""

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _python_dispatch as python_dispatch

if TYPE_CHECKING:
    from flowspace.derivatives.replay import RestoringMode
    from flowspace.derivatives.shared_primal.carrier import Carrier

__all__ = [
    "active_carrier",
    "set_capture_callback",
    "call_captured",
    "capture_as_outside",
    "capture_callback",
    "follows_compiled",
    "dispatched",
    "dynamo_loaded",
    "patched",
    "paused",
    "outside_modes",
    "under_checkpoint",
    "active_second_run",
    "following",
    "protecting",
]

STAYING = frozenset({"FakeTensorMode", "FlopCounterMode", "_FlopCounterMode"})
"""Dispatch modes of torch that tangents are computed in, by name: to import them takes long."""

_active = threading.local()
_lock = threading.Lock()
_users: list[type] = []
_originals: list[tuple[Any, str, Any]] = []


def active_carrier() -> "Carrier | None":
    """Return the carrier that is at work in this thread, or None."""
    return getattr(_active, "carrier", None)


@contextlib.contextmanager
def paused(carrier: "Carrier | None") -> Iterator[None]:
    """Let a carrier see nothing of what is called."""
    if carrier is None:
        yield
        return
    before, idle = active_carrier(), carrier.idle
    _active.carrier, carrier.idle = None, True
    try:
        yield
    finally:
        _active.carrier, carrier.idle = before, idle


@contextlib.contextmanager
def following(carrier: "Carrier") -> Iterator[None]:
    """Show a carrier the calls that no function mode sees."""
    before, _active.carrier = active_carrier(), carrier
    try:
        with patched(type(carrier)):
            yield
    finally:
        _active.carrier = before


def active_second_run() -> "RestoringMode | None":
    """Return what keeps the writes of the second run that this thread is in, or None."""
    return getattr(_active, "second_run", None)


@contextlib.contextmanager
def protecting(run: "RestoringMode") -> Iterator[None]:
    """Show a second run the calls that no function mode sees."""
    before, _active.second_run = active_second_run(), run
    try:
        with patched(type(run)):
            yield
    finally:
        _active.second_run = before


@contextlib.contextmanager
def patched(mode: type) -> Iterator[None]:
    """Meet calls that no function mode sees, for as long as any mode of ours is at work in any
    thread.
    """
    with _lock:
        if not _users:
            _patch()
        if follows_compiled():
            torch._dynamo.eval_frame.skip_code(mode.__torch_function__.__code__)
        _users.append(mode)
    try:
        yield
    finally:
        with _lock:
            _users.remove(mode)
            if not _users:
                _restore()


def _patch() -> None:
    places: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (torch.autograd.Function, "apply", _apply),
        (torch._C.ScriptFunction, "__call__", _script),
        (torch._C.ScriptMethod, "__call__", _script),
    ]
    if follows_compiled():
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
        carrier = active_carrier()
        if carrier is None:
            return outs
        with torch._C.DisableTorchFunction():  # pyright: ignore
            return carrier.through_function(cls, args, outs)

    return classmethod(apply)


def _script(original: Any) -> Any:
    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        carrier = active_carrier()
        if carrier is None:
            return original(function, *args, **kwargs)
        return carrier.through_script(original, function, args, kwargs)

    return call


# --- torch.compile


def dynamo_loaded() -> bool:
    """Return whether anything was compiled by torch.compile, as far as its being loaded tells."""
    return "torch._dynamo" in sys.modules


def follows_compiled() -> bool:
    """Return whether this torch has what compiled parts need to be met: 2.11 does, and the newest
    tried, 2.14.
    """
    frames = torch.__dict__.get("_dynamo")
    return frames is not None and all(
        hasattr(frames.eval_frame, name)
        for name in ("_callback_from_stance", "_create_wrapped_callback", "innermost_backend")
    )


_dual_callbacks: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _callback(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Have what torch.compile compiles be compiled with its tangents, or run without a trace in
    its buffers.
    """

    def callback_from_stance(callback: Any) -> Any:
        callback = original(callback)
        if (active_carrier() is None and active_second_run() is None) or callback in (None, False):
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
    """Compiles a frame, with guards on hooks of modules, which torch.compile leaves out by
    default.
    """

    def __init__(self, backend: Any) -> None:
        self._torchdynamo_orig_backend = torch._dynamo.eval_frame._create_wrapped_callback(backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            return self._torchdynamo_orig_backend(*args, **kwargs)


capture_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback  # pyright: ignore
"""Returns what torch.compile captures frames with in this thread, or None; a builtin, so that it
is none itself.
"""

set_capture_callback = torch._C._dynamo.eval_frame.set_eval_frame  # pyright: ignore
"""Sets what torch.compile captures frames with in this thread; None: it captures nothing."""


def dispatched() -> bool:
    """Return whether any dispatch mode sees what is called."""
    return torch._C._len_torch_dispatch_stack() > 0  # pyright: ignore


def outside_modes() -> contextlib.AbstractContextManager[Any]:
    """Leave every dispatch mode: selective checkpointing caches what is called in its own, by the
    order of calls.

    Modes that count operations count tangents too, and tensors without values need theirs: these
    stay.
    """
    modes = python_dispatch._get_current_dispatch_mode_stack()
    if any(type(mode).__name__ in STAYING for mode in modes):
        return contextlib.nullcontext()
    return python_dispatch._disable_current_modes()


def call_captured(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None
) -> Any:
    """Call a function as torch.compile captures it from within a mode of ours: as if that were not
    there.
    """
    if (
        func is torch.Tensor.unflatten
    ):  # written in Python, with super(), which torch 2.11 does not see through
        return torch.unflatten(*args, **(kwargs or {}))
    return func(*args, **(kwargs or {}))


def under_checkpoint() -> bool:
    """Return whether what autograd saves is packed by hooks: a checkpoint computes it again and
    compares.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # pyright: ignore


def capture_as_outside(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that torch.compile captures as it captures the step round it, from where
    it was told not to.
    """
    callback = _callback_outside()
    if callback is None:
        return fn

    def captured(*args: Any) -> Any:
        before = capture_callback()
        set_capture_callback(torch._dynamo.eval_frame._callback_from_stance(callback))
        try:
            return fn(*args)
        finally:
            set_capture_callback(before)

    captured.__name__ = getattr(fn, "__name__", "call_captured")
    return captured


def _callback_outside() -> Any:
    """Return what captures frames in the nearest call of something compiled, among those that led
    here.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and "callback" in frame.f_locals:
            return frame.f_locals["callback"] if follows_compiled() else None
        frame = frame.f_back
    return None
