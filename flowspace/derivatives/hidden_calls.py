"""Calls that no function mode sees, and how a carrier or a second run is told of them.

A function mode sees the functions of torch that Python calls. Five kinds of call pass it by:

    autograd.Function.apply      torch runs the forward pass itself    -> Carrier.through_function
    functions of torch.jit       an interpreter in C++ runs them       -> Carrier.through_script
    what torch.compile compiled  a kernel runs, no function at all     -> compiled.Backend
    what another thread calls    no mode of this thread is entered     -> met_elsewhere of both
    module.buffer = tensor       Python binds a name                   -> bindings.Bindings

So the first four are replaced (`_patch`) by functions that ask for this thread's active carrier,
or second run, and hand the call to it; where there is none they do what the original does. For the
fifth, torch calls a hook of ours. This is the one place of the house that changes torch for the
whole process. It does so only while a mode of ours is entered in some thread; the last one to
leave puts the originals back. What stands for ``apply`` is looked up in the metaclass: to replace
an attribute of a class, Python goes through the hundreds below it, in each pass.

For torch.compile the replaced function is `_callback_from_stance`. Each call of something
compiled asks it for the callback that captures frames, and keeps compiled code by that callback.
We return another callback, with a backend round the user's one, so what was compiled for plain
calls and what is compiled for tangents never mix.
"""

import contextlib
import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import Function
from torch.autograd.function import FunctionMeta
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch as python_dispatch
from torch.utils import _pytree as pytree

from flowspace.backends.process import forward_mode_lock
from flowspace.derivatives.own_rules import followed
from flowspace.derivatives.torch_internals import not_intercepted, unseen_by_modes

if TYPE_CHECKING:
    from flowspace.derivatives.replay import RestoringMode
    from flowspace.derivatives.shared_primal.carrier import Carrier

__all__ = [
    "Paused",
    "active_carrier",
    "active_second_run",
    "call_captured",
    "capture_as_outside",
    "capture_callback",
    "dynamo_loaded",
    "following",
    "follows_compiled",
    "outside_modes",
    "patched",
    "protecting",
    "set_capture_callback",
    "under_checkpoint",
    "warn_of_old_torch",
]

STAYING = frozenset({"FakeTensorMode", "FlopCounterMode", "_FlopCounterMode"})
"""Dispatch modes of torch that tangents are computed in, by name: to import them takes long."""

_lock = threading.Lock()
"""Held while torch is changed or put back."""

_users: list[type] = []
"""The modes that are entered now, in all threads."""

_originals: list[tuple[Any, str, Any]] = []
"""What was replaced: its holder, its name there, and the original; None if there was none."""

_told: set[Callable[..., Any]] = set()
"""Functions that torch.compile was told not to capture."""

_listening = contextlib.ExitStack()
"""What ends that torch tells us of buffers."""


def active_carrier() -> "Carrier | None":
    """Return the carrier that is followed in this thread, or None."""
    return getattr(followed, "carrier", None)


class Paused:
    """A context in which a carrier passes over what is called; nothing happens for None."""

    def __init__(self, carrier: "Carrier | None") -> None:
        self.carrier = carrier

    def __enter__(self) -> None:
        if self.carrier is not None:
            self.before = active_carrier(), self.carrier.idle
            followed.carrier, self.carrier.idle = None, True
            if self.carrier.watch is not None:
                self.carrier.watch.pause()

    def __exit__(self, *_: object) -> None:
        if self.carrier is not None:
            followed.carrier, self.carrier.idle = self.before
            if self.carrier.watch is not None:
                self.carrier.watch.resume()


@contextlib.contextmanager
def _idle() -> Iterator[None]:
    """Let the active carrier pass over what torch.compile asks of tensors, to say why it captures
    again: it reads what its guards read of an alias, not what the primal has.
    """
    carrier = active_carrier()
    if carrier is None:
        yield
        return
    idle, carrier.idle = carrier.idle, True
    if carrier.watch is not None:
        carrier.watch.pause()
    try:
        yield
    finally:
        carrier.idle = idle
        if carrier.watch is not None:
            carrier.watch.resume()


@contextlib.contextmanager
def following(carrier: "Carrier") -> Iterator[None]:
    """Hand a carrier the calls that no function mode sees."""
    before, followed.carrier = active_carrier(), carrier
    try:
        with patched(type(carrier)):
            yield
    finally:
        followed.carrier = before


def active_second_run() -> "RestoringMode | None":
    """Return what keeps the writes of the second run that this thread is in, or None."""
    return getattr(followed, "second_run", None)


@contextlib.contextmanager
def protecting(run: "RestoringMode") -> Iterator[None]:
    """Tell a second run of the calls that no function mode sees."""
    before, followed.second_run = active_second_run(), run
    try:
        with patched(type(run)):
            yield
    finally:
        followed.second_run = before


@contextlib.contextmanager
def patched(mode: type) -> Iterator[None]:
    """Change torch for as long as any mode of ours is entered in any thread."""
    with _lock:
        if not _users:
            _patch()
        if follows_compiled():
            for function in {mode.__torch_function__, *OURS} - _told:
                torch._dynamo.eval_frame.skip_code(function.__code__)
                _told.add(function)
        _users.append(mode)
    try:
        yield
    finally:
        with _lock:
            _users.remove(mode)
            if not _users:
                _restore()


def _patch() -> None:
    """Replace the functions of torch that run what no function mode sees."""
    _replace(FunctionMeta, "apply", _Apply())
    places: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (torch._C.ScriptFunction, "__call__", _script),
        (torch._C.ScriptMethod, "__call__", _script),
        (threading.Thread, "start", _start),
        (ThreadPoolExecutor, "submit", _submit),
    ]
    if follows_compiled():
        places.append((torch._dynamo.eval_frame, "_callback_from_stance", _callback))
    elif dynamo_loaded():
        places.append((torch._dynamo.eval_frame, "_callback_from_stance", _warning_callback))
    for holder, name, replacement in places:
        _replace(holder, name, replacement(holder.__dict__[name]))
    handle = register_module_buffer_registration_hook(_note_buffer)
    # the same number each time: what torch.compile captured asks for it
    hooks = handle.hooks_dict_ref()
    if hooks is not None:
        hooks[HOOK] = hooks.pop(handle.id)
        handle.id = HOOK
    _listening.callback(handle.remove)


HOOK = -1
"""The number of our hook, which no other has."""


def _replace(holder: Any, name: str, replacement: Any) -> None:
    """Replace an attribute, which there may be none of, and remember it."""
    _originals.append((holder, name, holder.__dict__.get(name)))
    setattr(holder, name, replacement)


def _restore() -> None:
    """Put the originals back."""
    for holder, name, original in reversed(_originals):
        if original is None:
            delattr(holder, name)
        else:
            setattr(holder, name, original)
    _originals.clear()
    _listening.close()


def _note_buffer(module: Any, name: str, tensor: Any) -> None:
    """Tell what is active in this thread that a buffer is about to be another tensor."""
    if torch.compiler.is_dynamo_compiling():
        return
    carrier, run = active_carrier(), active_second_run()
    if carrier is not None:
        carrier.writes.bindings.note(module, name)
    if run is not None:
        run.bindings.note(module, name)


class _Apply:
    """Gives apply of classes of autograd.Function, where a carrier is active one that is followed.

    It is an attribute of their metaclass, and Python asks it before the classes, since it can be
    written to.
    """

    def __get__(self, cls: Any, metaclass: type) -> Any:
        """Return the function of a class, as the class has it itself or inherits it."""
        # No function of Python is called on the way: torch.compile may be capturing frames.
        owner = cls
        for owner in cls.__mro__:
            if "apply" in owner.__dict__:
                break
        found = owner.__dict__["apply"]
        if getattr(followed, "carrier", None) is None:
            return found.__get__(None, cls)
        if owner is Function:
            return MethodType(_apply, cls)
        if issubclass(cls, Function):
            _replace_in_class()
        return found.__get__(None, cls)

    def __set__(self, cls: Any, function: Any) -> None:
        """Give a class a function of its own."""
        _replace_in_class()
        type.__setattr__(cls, "apply", function)


def _replace_in_class() -> None:
    """Replace apply in autograd.Function itself: a class below has one of its own, and calls that
    of Function as ``super().apply``, which is not asked of the metaclass.
    """
    with _lock:
        if isinstance(vars(FunctionMeta).get("apply"), _Apply):
            del FunctionMeta.apply  # pyright: ignore[reportAttributeAccessIssue]
            _originals.remove((FunctionMeta, "apply", None))
            _replace(Function, "apply", classmethod(_apply))


def _apply(cls: type, *args: Any, **kwargs: Any) -> Any:
    """Call apply of a custom function, and follow it.

    Where torch.compile leaves a call to Python, it is not to capture this frame, and not what
    follows the call, but the forward pass within it.
    """
    original = Function.__dict__["apply"]
    for holder, _, replaced in _originals:
        if holder is Function:
            original = replaced
    outs = original.__get__(None, cls)(*args, **kwargs)
    before = capture_callback()
    if before is None:
        return _followed(cls, args, outs)
    set_capture_callback(None)
    try:
        return _followed(cls, args, outs)
    finally:
        set_capture_callback(before)


_apply.__name__ = "apply"  # by which torch.compile knows it

OURS = (_note_buffer, _Apply.__get__, _Apply.__set__, _replace_in_class, _replace, _apply)
"""Functions that torch calls in the middle of the model's, and torch.compile is not to capture."""


def _followed(cls: type, args: tuple[Any, ...], outs: Any) -> Any:
    """Return the outputs of a custom function as the active carrier hands them on."""
    carrier = active_carrier()
    if carrier is None:
        return outs
    with not_intercepted():
        return carrier.through_function(cls, args, outs)


def _script(original: Any) -> Any:
    """Return what stands for the call of a function or method of torch.jit."""

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        carrier, run = active_carrier(), active_second_run()
        if run is not None:
            run.met_script((*args, *kwargs.values()))
        if carrier is None:
            return original(function, *args, **kwargs)
        return carrier.through_script(original, function, args, kwargs)

    return call


# --- threads


class _Elsewhere(TorchFunctionMode):
    """Tells passes of another thread, whose model started this one, of the functions called here.

    They follow none of them, so what moves there may not be among the arguments. This thread may
    outlive them.
    """

    def __init__(self, passes: Sequence[weakref.ref[Any]]) -> None:
        super().__init__()
        self.passes = passes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a torch function; one that reads no values that move is nobody's concern."""
        from flowspace.derivatives.shared_primal.kinds import treatment_of  # imports this module

        idle = torch.compiler.is_dynamo_compiling()
        if not idle and treatment_of(func).kind not in ("metadata", "constant", "detached"):
            values = pytree.tree_leaves((args, kwargs))
            for run in filter(None, [reference() for reference in self.passes]):
                run.met_elsewhere(values)
        return call_captured(func, args, kwargs)


def _watched(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what another thread is to run, so that the passes of this one hear of it."""
    active = [run for run in (active_carrier(), active_second_run()) if run is not None]
    if not active:
        return function
    passes = [weakref.ref(run) for run in active]
    del active

    def watched(*args: Any, **kwargs: Any) -> Any:
        with _Elsewhere(passes):
            return function(*args, **kwargs)

    return watched


def _start(original: Any) -> Any:
    """Return what stands for the start of a thread."""

    def start(thread: threading.Thread) -> None:
        if active_carrier() or active_second_run():
            thread.run = _watched(thread.run)
        original(thread)

    return start


def _submit(original: Any) -> Any:
    """Return what stands for handing a function to a pool, whose threads outlive it."""

    def submit(pool: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        watched = _watched(function)
        before = active_carrier(), active_second_run()
        followed.carrier = followed.second_run = None  # the pool may start a thread now
        try:
            return original(pool, watched, *args, **kwargs)
        finally:
            followed.carrier, followed.second_run = before

    return submit


# --- torch.compile


def dynamo_loaded() -> bool:
    """Return whether torch.compile was loaded, without which nothing was compiled."""
    return "torch._dynamo" in sys.modules


def follows_compiled() -> bool:
    """Return whether this torch lets tangents follow through what it compiled.

    2.11 does, and the newest tried, 2.14.
    """
    frames = torch.__dict__.get("_dynamo")
    if frames is None:
        return False
    names = ("_callback_from_stance", "_create_wrapped_callback", "innermost_backend")
    return all(hasattr(frames.eval_frame, name) for name in names)


def _warning_callback(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what stands for `_callback_from_stance` where what is compiled is not followed.

    What is marked not to be compiled, as activation checkpointing's own code, comes with None.
    """

    def callback_from_stance(callback: Any) -> Any:
        if active_carrier() is not None and callback not in (None, False):
            warn_of_old_torch()
        return original(callback)

    return callback_from_stance


@functools.cache
def warn_of_old_torch() -> None:
    """Warn, once, that something compiled is run as it was written."""
    warnings.warn(
        f"got torch {torch.__version__}; what is compiled of a model runs as it was written "
        "beside its tangents, right and slower; from torch 2.11 on it runs compiled",
        stacklevel=2,
    )


_dual_callbacks: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Ours for each callback of torch.compile: the same one each time, so that code is kept by it."""


def _callback(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what stands for `_callback_from_stance`.

    What is compiled while a carrier or a second run is active goes through `compiled.Backend`.
    Within a torch.func.jvp of ours it runs as it was written: a thread that compiles asks for the
    lock of forward mode, so one that has it must not compile.
    """

    def callback_from_stance(callback: Any) -> Any:
        if forward_mode_lock._is_owned():  # type: ignore[attr-defined]
            return None
        found = original(callback)
        active = active_carrier() is not None or active_second_run() is not None
        if not active or found in (None, False):
            return found
        if torch._dynamo.eval_frame._stance.stance == "fail_on_recompile":
            return original(_dual_callback(callback))
        return _dual_callback(found)

    return callback_from_stance


def _dual_callback(callback: Any) -> Any:
    """Return what compiles with tangents as another callback compiles without."""
    from flowspace.derivatives.shared_primal.compiled import Backend  # loads torch.compile

    ours = _dual_callbacks.get(callback)
    if ours is None:
        ours = callback
        backend = torch._dynamo.eval_frame.innermost_backend(callback)
        if not isinstance(backend, Backend):
            ours = _Callback(callback, Backend(backend))
        _dual_callbacks[callback] = ours
    return ours


class _Callback:
    """Compiles a frame with another backend, as the user said, with guards on hooks of modules.

    torch.compile leaves these out by default; a model with other hooks would run old code. It
    captures a function as often as it may without a derivative, with gradients and without: where
    rows mix a model is run in both ways, and what was captured without a derivative lies in the
    same place.

    Args:
        callback: what torch.compile made of the user's options.
        backend: compiles instead of the user's.
    """

    def __init__(self, callback: Any, backend: Any) -> None:
        from torch._dynamo import convert_frame
        from torch._dynamo.hooks import Hooks

        hooks, self.limit = Hooks(), None
        while hasattr(callback, "_torchdynamo_orig_backend"):
            hooks = getattr(callback, "hooks", hooks)
            self.limit = getattr(callback, "_recompile_limit", self.limit)
            callback = callback._torchdynamo_orig_backend
        self._torchdynamo_orig_backend = convert_frame.catch_errors_wrapper(
            convert_frame.convert_frame(backend, hooks), hooks
        )
        self.captures: weakref.WeakKeyDictionary[Any, dict[bool, int]] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(self, frame: Any, *args: Any, **kwargs: Any) -> Any:
        """Compile a frame; leave it to Python where our function mode keeps torch.compile from it,
        as from numpy arrays that are written to.
        """
        from torch._dynamo.exc import InternalTorchDynamoError, TorchRuntimeError
        from torch._dynamo.types import ConvertFrameReturn

        from flowspace.derivatives.shared_primal.compiled import warn_of, warn_of_limit

        config = torch._dynamo.config
        frames = torch._C._dynamo.eval_frame  # pyright: ignore
        kept = len(frames._debug_get_cache_entry_list(frame.f_code))
        captures, kind = self.captures.setdefault(frame.f_code, {}), torch.is_grad_enabled()
        count = min(captures.get(kind, 0), kept)  # torch may have forgotten some
        limit = self.limit or config.recompile_limit
        others = {"skip_nnmodule_hook_guards": False, "recompile_limit": limit + kept - count}
        try:
            with _idle(), config.patch(others):
                found = self._torchdynamo_orig_backend(frame, *args, **kwargs)
        except (InternalTorchDynamoError, TorchRuntimeError) as error:
            warn_of(error)
            return ConvertFrameReturn()
        if found.guarded_code is not None:
            captures[kind] = count + 1
            if captures[kind] == limit:
                warn_of_limit(limit)
        return found


capture_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback  # pyright: ignore
"""Returns what torch.compile captures frames with in this thread, or None.

It is a builtin: a function written in Python would be captured itself.
"""

set_capture_callback = torch._C._dynamo.eval_frame.set_eval_frame  # pyright: ignore
"""Sets what torch.compile captures frames with in this thread; None: it captures nothing."""


def outside_modes() -> contextlib.AbstractContextManager[Any]:
    """Leave every dispatch mode.

    Selective checkpointing caches what is called in its own, by the order of calls, and tangents
    are not among them. Modes that count operations count tangents too, and tensors without values
    need theirs: these stay.
    """
    for mode in python_dispatch._get_current_dispatch_mode_stack():
        if type(mode).__name__ in STAYING:
            return contextlib.nullcontext()
    return unseen_by_modes()


def call_captured(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None
) -> Any:
    """Call a function for torch.compile to capture, as if no mode of ours were there."""
    # written in Python, with super(), which torch 2.11 does not see through
    if func is torch.Tensor.unflatten:
        return torch.unflatten(*args, **(kwargs or {}))
    return func(*args, **(kwargs or {}))


def under_checkpoint() -> bool:
    """Return whether hooks pack what autograd saves.

    So do checkpoints, which compute it again in the backward pass and compare.
    """
    hooks: Any = torch._C._autograd  # pyright: ignore
    return hooks._top_saved_tensors_default_hooks(False) is not None


def capture_as_outside(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that torch.compile captures as it captures the step round it.

    A route is told not to be captured, since it depends on values; the model in it should be.
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
    """Return what captures frames in the innermost compiled call that led here, or None."""
    if not follows_compiled():
        return None
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and "callback" in frame.f_locals:
            return frame.f_locals["callback"]
        frame = frame.f_back
    return None
