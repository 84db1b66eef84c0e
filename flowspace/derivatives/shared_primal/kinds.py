"""What the carrier does about each torch function: one kind for each, found once and kept."""

import functools
import types
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from flowspace.derivatives import rules
from flowspace.derivatives.own_rules import OWN_RULES
from flowspace.derivatives.replay import written_places

__all__ = [
    "DATA_READ",
    "ELSEWHERE",
    "LEAVES",
    "OUT_OF_PLACE",
    "REFUSED",
    "TRANSFORMED",
    "UNSEEN",
    "WHOLE",
    "Treatment",
    "leaving",
    "refusal",
    "treatment_of",
    "warn_of_whole_numbers",
]

TRANSFORMED = (
    "the model calls a transform of torch.func, where tangents cannot follow; write "
    "derivative=ForwardMode()"
)
UNSEEN = (
    "got torch.Tensor(x) or x.as_subclass(...) of a tensor that moves with z_t or t, which torch "
    "does without a function that tangents follow; write x itself, or derivative=ForwardMode()"
)
ELSEWHERE = (
    "the model calls functions of torch in another thread, of a tensor that moves with z_t or t, "
    "where tangents cannot follow; call them in the thread of the model, or write "
    "derivative=FiniteDifference()"
)
DROPPED = "the model calls autograd, which drops tangents; write FiniteDifference()"
RESHAPED = (
    "{} writes in place, where the tangent cannot follow; write a new tensor for it, or "
    "derivative=ForwardMode()"
)
DETACHED = (
    "got .detach_() of a tensor that moves with z_t or t, which takes its own tangent from it; "
    "write x = x.detach()"
)
REFUSED = {
    "_make_dual": TRANSFORMED,
    "_unpack_dual": TRANSFORMED,
    "grad": DROPPED,
    "backward": DROPPED,
}
"""Functions that drop tangents, by their names, and what is said of them, also where nothing
moves: the model may go round them.
"""

METADATA = frozenset(
    "size dim ndimension numel nelement stride storage_offset is_floating_point is_complex "
    "is_contiguous get_device element_size __len__".split()
)
"""Functions that ask how a tensor is made, and not for its numbers: an alias answers as its
primal does.
"""

AUTOGRAD = frozenset(
    "register_hook register_post_accumulate_grad_hook retain_grad requires_grad_ grad_fn grad "
    "_grad _backward_hooks _post_accumulate_grad_hooks is_leaf output_nr _base _version "
    "_register_hook_dict __repr__ __format__".split()
)
"""Functions and fields of the graph of gradients, and of printing. They act on the
primal: a hook that is set on an alias has to be called in the backward pass of the value.
"""

LEAVES = frozenset(
    "item tolist numpy __array__ __float__ __complex__ __dlpack__ __reduce_ex__ storage "
    "untyped_storage".split()
)
"""Functions that hand a value, or its memory, out of torch, where no tangent follows it."""

ITSELF = frozenset("to contiguous float double type type_as".split())
"""Functions that return the tensor itself where it is already what they make of it."""

WHOLE = frozenset("long int short char byte to type".split())
"""Functions that may make whole numbers of others, which do not move."""

OUT_OF_PLACE = frozenset((F.silu, F.relu))
"""Functions written in Python that are called with their rule unless they are to write in place.

Their builtins have the same name, and no argument ``inplace``.
"""

AS_BUILTIN = frozenset(
    (F.layer_norm, F.group_norm, F.rms_norm, F.softmax, F.log_softmax, Tensor.unflatten)
)
"""Functions written in Python that are called with their rule at once, and not entered.

Models call them most, and to enter one takes longer than to call it.
"""

TORCHS_OWN = ("aten", "prims", "prim")
"""Namespaces of operators whose numbers are sizes and the like."""

TENSORS = frozenset("T mT H mH real imag data".split())
"""Fields that are tensors: to read one is a function with a rule. To write one is refused: it
gives a tensor other numbers, or another memory, without a function that has a rule.
"""

RESHAPING = {
    "transpose_",
    "t_",
    "squeeze_",
    "unsqueeze_",
    "swapaxes_",
    "swapdims_",
    "resize_",
    "set_",
    "resize_as_",
}
"""Functions that give a tensor itself another shape or memory. An alias is another tensor than its
primal, so one of the two would keep the old one.
"""

OPERATORS = {
    "iadd": "add_",
    "isub": "sub_",
    "imul": "mul_",
    "itruediv": "div_",
    "idiv": "div_",
    "ipow": "pow_",
}
"""Python's operators that write in place, and torch's functions for them."""

BUILTIN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
)
"""The types of functions written in C++. No mode sees what they call, so they need a rule."""


class Treatment(NamedTuple):
    """What is done about a torch function.

    Attributes:
        kind: what is done; a word of these.

            * metadata: it asks for no values, and is called.
            * rule: its rule is called beside it.
            * python: it is written in other functions of torch, and entered.
            * random: it draws, and may be written in others.
            * in place: it writes into its first argument.
            * itself: it may return its first argument as it is.
            * constant: its output does not move.
            * detached: its output shares memory, and does not move.
            * leaves: its value leaves torch.
            * higher order: it takes graphs.
            * refused: it has no tangent.
        name: its plain name (add for torch.add, Tensor.add and Tensor.__add__).
    """

    kind: str
    name: str


DATA_READ = Treatment("detached", "data")
"""Of the field ``data``: autograd counts no writes through it."""


@functools.lru_cache(4096)
def treatment_of(func: Any) -> Treatment:
    """Return what is done about a torch function.

    A Python function of torch is entered; when it then calls the builtin of its own name, it is
    seen again, and stands for that.
    """
    name = getattr(func, "__name__", "")
    if func in (torch.autograd.grad, Tensor.backward):
        return Treatment("refused", name)
    if name in LEAVES:
        return Treatment("leaves", name)
    if isinstance(func, HigherOrderOperator):
        return Treatment("higher order", func.name())
    if func is Tensor.__deepcopy__:
        return Treatment("rule", "clone")
    if func in OWN_RULES:
        return Treatment("python", name)
    if func in AS_BUILTIN:
        return Treatment("rule", name)
    if name in ("__get__", "__set__") and not isinstance(func, types.FunctionType):
        return Treatment(_field_kind(func.__self__.__name__, name), func.__self__.__name__)
    if name in AUTOGRAD:
        return Treatment("constant", name)
    return _treatment_of_call(func, name)


def _field_kind(field: str, access: str) -> str:
    """Return the kind of reading a field of a tensor, or of writing it."""
    if field in AUTOGRAD:
        return "constant"
    if access == "__set__":
        if field in TENSORS:
            return "refused"
        return "constant"
    if field == "data":
        return "detached"
    if field in TENSORS:
        return "rule"
    return "metadata"


def _treatment_of_call(func: Any, name: str) -> Treatment:
    """Return what is done about a function that is called, by its name."""
    if isinstance(func, types.FunctionType) and func.__module__.partition(".")[0] == "torch":
        return Treatment("python", name)
    if isinstance(func, OpOverload | OpOverloadPacket):
        return _treatment_of_operator(func)
    if not isinstance(func, BUILTIN):
        return Treatment("rule", "")
    if name.startswith("__") and name.endswith("__") and name != "__len__":
        name = OPERATORS.get(name[2:-2], name[2:-2])
    return Treatment(_kind(name), name)


def _treatment_of_operator(func: Any) -> Treatment:
    """Return what is done about an operator, by its schema."""
    name = func.__name__.partition(".")[0]
    if written_places(func).numbers:
        return Treatment("refused", name)
    if name == "detach":
        return Treatment("detached", name)
    overload = func
    if isinstance(func, OpOverloadPacket):
        overload = getattr(func, func.overloads()[0])
    if overload.namespace not in TORCHS_OWN and _returns_numbers(overload):
        return Treatment("leaves", name)
    return Treatment("rule", "")


def _returns_numbers(overload: OpOverload) -> bool:
    """Return whether an operator returns floats of Python."""
    kinds = [str(result.type) for result in overload._schema.returns]
    return any(kind in ("float", "number", "complex", "List[float]") for kind in kinds)


def _kind(name: str) -> str:
    """Return the kind of a builtin function, by its plain name."""
    if name in METADATA:
        return "metadata"
    if name in rules.RANDOM:
        return "random"
    if name in RESHAPING or name in REFUSED or name == "detach_":
        return "refused"
    if name.startswith("_foreach_") and name.endswith("_"):  # tensors of a list are written to
        return "refused"
    if name == "setitem" or (name.endswith("_") and name[:-1]):
        return "in place"
    if name == "detach":
        return "detached"
    if name in rules.CONSTANT:
        return "constant"
    if name in ITSELF:
        return "itself"
    return "rule"


@functools.cache
def warn_of_whole_numbers(name: str) -> None:
    """Warn, once, of whole numbers made of what moves: a table of times looked up by them has no
    derivative.
    """
    warnings.warn(
        f"got whole numbers, by .{name}(), of a tensor that moves with z_t or t: they count as "
        "constant, so what is looked up by them has derivative zero; keep real numbers if it "
        "should have one",
        stacklevel=2,
    )


def leaving(name: str) -> str:
    """Return why a function is refused that hands a value out of torch."""
    called = f".{name}()"
    if name.startswith("__"):
        called = f"{name.strip('_')}()"
    return (
        f"got {called} of a tensor that moves with z_t or t: its value leaves torch, where "
        "no tangent follows it; keep it a tensor, write .detach() first if it is a constant, "
        "or derivative=FiniteDifference()"
    )


def refusal(name: str, kind: str = "refused") -> str:
    """Return why a function of this name and kind is refused, and what to write instead."""
    if kind == "leaves":
        return leaving(name)
    if name == "detach_":
        return DETACHED
    return REFUSED.get(name, RESHAPED.format(name))
