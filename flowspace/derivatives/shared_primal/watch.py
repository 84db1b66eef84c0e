"""What reaches a model, or changes in it, unseen by every mode.

Torch shows no mode what a C++ extension that is bound by hand calls, what runs within
``torch._C.DisableTorchFunction()`` or in a thread that was there before, and what others do with
memory that was handed out: by dlpack, as an array of numpy, by its address. What comes of it has
no tangent, as if it were constant. A `Watch` finds it by two questions:

* Where does a tensor come from that the model uses? One that was made in this pass, by no function
  that was seen, is a stranger. What tells its age is Python's collector of cycles: it keeps the
  objects that were made since it last ran apart, and says when it runs.
* Is a tensor what it was? It is compared with what it held when it was last seen, or before the
  pass where it is a buffer or a variable: on a CPU by its numbers, elsewhere by autograd's count
  of writes. What moves and was written to unseen is refused; what stands still is a stranger.

A stranger may be a constant all the same, as ``torch.Tensor([1.0])`` is, of which no mode is told
either, or memory that is still to be filled. So if there are any, the model is evaluated twice
more: at the same point, and at a point nearby. What is the same tensor there and another one here
is refused (`check_strangers`). What the model takes out of torch itself, of what it detached, is
meant to be constant.

All this takes longer than some functions of the model, so it is done in the first passes over a
model, and then in ever fewer.
"""

import ctypes
import gc
import sys
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.utils import _pytree as pytree

from flowspace.derivatives.replay import in_transform, is_alive, several_processes, version_of
from flowspace.derivatives.shared_primal.passes import tensors_of
from flowspace.derivatives.torch_internals import alone, memory_of, not_intercepted
from flowspace.errors import DerivativeError

__all__ = ["FILLING", "Stranger", "Watch", "check_strangers", "moved_a_little"]


class Print(NamedTuple):
    """What a tensor held when it was last seen.

    Attributes:
        epoch: how often its memory had been written to by functions that were seen.
        content: see `_content`.
    """

    epoch: int
    content: int


class Seen(NamedTuple):
    """What is known of a tensor.

    Attributes:
        tensor: it; another may have its id later.
        held: what it held; None: it is not compared.
        derived: it stands still, and was computed from what moves.
    """

    tensor: weakref.ref[Tensor]
    held: Print | None
    derived: bool


class Stranger(NamedTuple):
    """A tensor of unknown origin that a model used.

    Attributes:
        place: where it was used: the line of the program, the shape, and the how many-th there.
        values: what it held.
        name: of the function that made it, in the backward pass, if it has a gradient.
        memory: its own, if nobody was seen to make it; 0 if it was seen before and has changed.
    """

    place: Hashable
    values: Tensor
    name: str | None
    memory: int


class Watch:
    """Watches one pass over a model, while it is entered.

    Attributes:
        fn: the model.
        seen: by id, the tensors that functions made or were given.
        young: by id, the tensors that nobody was seen to make before Python last collected cycles.
        epochs: by memory, how often functions that were seen have written there.
        strangers: the tensors of unknown origin.
        places: how many tensors without a tangent were used on each line, of each shape.
        wanted: the places of strangers in another pass: what is used there is one here too.
        handed_out: the model took values that it had computed of what moves out of torch.
        addressed: by id, the tensors whose address it asked for.
        resting: what happens now is not the model.
    """

    def __init__(self, fn: Any, wanted: Sequence[Stranger] = ()) -> None:
        self.fn = fn
        self.wanted = {stranger.place for stranger in wanted}
        self.seen: dict[int, Seen] = {}
        self.young: dict[int, weakref.ref[Tensor]] = {}
        self.epochs: Counter[int] = Counter()
        self.strangers: list[Stranger] = []
        self.places: Counter[Hashable] = Counter()
        self.handed_out = False
        self.addressed: set[int] = set()
        self.resting = False

    def __enter__(self) -> "Watch":
        gc.collect(0)
        gc.callbacks.append(self._about_to_collect)
        self.made(list(tensors_of(self.fn)))
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._about_to_collect)
        self.seen.clear()
        self.young.clear()

    def pause(self) -> None:
        """Rest: what follows is not the model, and may take long."""
        self._keep_young()
        self.resting = True

    def resume(self) -> None:
        """Go on, and take what was made meanwhile for old."""
        gc.collect(0)
        self.resting = False

    def _about_to_collect(self, phase: str, _: Any) -> None:
        """Note which tensors are young before Python takes them for old."""
        if phase == "start" and not self.resting:
            self._keep_young()

    def _keep_young(self) -> None:
        """Note the tensors that were made, by no function that was seen, since Python collected
        cycles.
        """
        for young in gc.get_objects(0):
            if issubclass(type(young), Tensor) and self._entry(young) is None:
                self.young[id(young)] = weakref.ref(young)

    def made(self, out: Any, derived: bool = False) -> None:
        """Note what a function returned that was seen.

        Args:
            out: what it returned.
            derived: it was given what moves, or was derived from it.
        """
        with not_intercepted():
            for leaf in pytree.tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._note(leaf, self._print(leaf), derived)

    def returned(self, out: Any, derived: bool, since: int) -> None:
        """Note what a function returned, see `made`.

        One that returns a stranger, or views of it, has not read it: its numbers may still have to
        be filled in. So it is a stranger to the next function again.

        Args:
            out: what it returned.
            derived: it was given what moves, or was derived from it.
            since: how many strangers there were before it was called.
        """
        memories = {s.memory for s in self.strangers[since:] if s.memory}
        unread: set[int] = set()
        with not_intercepted():
            for leaf in pytree.tree_leaves(out):
                if memories and _has_memory(leaf) and memory_of(leaf) in memories:
                    unread.add(memory_of(leaf))
                else:
                    self.made(leaf, derived)
        if unread:
            read = [s for s in self.strangers[since:] if s.memory not in unread]
            self.strangers[since:] = read
            for number, entry in list(self.seen.items()):
                tensor = entry.tensor()
                if tensor is not None and _has_memory(tensor) and memory_of(tensor) in unread:
                    del self.seen[number]

    def is_derived(self, values: Any) -> bool:
        """Return whether a tensor among values moves, or was computed from what does."""
        for leaf in pytree.tree_leaves(values):
            if not isinstance(leaf, Tensor):
                continue
            entry = self._entry(leaf)
            if entry is not None and entry.derived:
                return True
        return False

    def known(self, tensor: Tensor) -> None:
        """Note a tensor that is no stranger, whatever becomes of it."""
        self._note(tensor, None, False)

    def rewritten(self, *targets: Any) -> None:
        """Note that a function which was seen writes to tensors."""
        with not_intercepted():
            for target in targets:
                if _has_memory(target):
                    self.epochs[memory_of(target)] += 1

    def filled(self, target: Tensor, name: str) -> None:
        """Note a function of this name that gives a tensor all its numbers: what it held before is
        nobody's concern.
        """
        if name in FILLING:
            self.made(target)

    def hands_out(self, tensor: Tensor, detached: bool) -> None:
        """Note that a function hands out the values of a tensor that carries no tangent."""
        if detached or self.is_derived(tensor):
            self.handed_out = True
        self.made(tensor, self.is_derived(tensor))

    def says_where(self, tensor: Tensor) -> None:
        """Note that a function says where a tensor lies, which may then be written to unseen."""
        self.addressed.add(id(tensor))
        self.made(tensor, self.is_derived(tensor))

    def met_moving(self, alias: Tensor) -> None:
        """Note that a function is given a tensor that carries a tangent.

        Raises:
            DerivativeError: if it was written to unseen.
        """
        with not_intercepted():
            if self._changed(alias):
                raise DerivativeError(
                    f"got a tensor of shape {tuple(alias.shape)} that moves with z_t or t, "
                    f"written to unseen{UNSEEN}"
                )

    def met_at_rest(self, tensor: Tensor) -> None:
        """Note that a function is given a tensor that carries no tangent."""
        with not_intercepted():
            if not isinstance(tensor, nn.Parameter) and _may_move(tensor) and _is_bare(tensor):
                self._met_at_rest(tensor)

    def _met_at_rest(self, tensor: Tensor) -> None:
        """Note a tensor that could carry a tangent, and carries none."""
        where = _place(), tuple(tensor.shape)
        self.places[where] += 1
        place = where, self.places[where]
        memory = 0
        if self._entry(tensor) is not None:
            strange = self._changed(tensor)
        elif self._is_young(tensor):
            strange, memory = True, memory_of(tensor)
            self.made(tensor)
        else:
            # what was there before may be written to by whom it belongs to
            strange = False
            self.known(tensor)
        if strange or place in self.wanted:
            self._suspect(tensor, place, memory)

    def _is_young(self, tensor: Tensor) -> bool:
        """Return whether a tensor was made in this pass, and by no function that was seen; a view
        is as old as what it is a view of.
        """
        base = tensor._base
        if base is not None:
            tensor = base
        if self._entry(tensor) is not None:
            return False
        kept = self.young.get(id(tensor))
        if kept is not None and kept() is tensor:
            return True
        return any(young is tensor for young in reversed(gc.get_objects(0)))

    def _suspect(self, tensor: Tensor, place: Hashable, memory: int) -> None:
        """Keep a tensor of unknown origin, to compare it with what it is elsewhere.

        Where other processes would have to do that too, or an engine gathers weights, it is not
        done: without a gradient it is taken for a constant.
        """
        name = None
        if tensor.grad_fn is not None:
            name = tensor.grad_fn.name()
        elif (self.handed_out and place not in self.wanted) or _engine_runs():
            return
        with alone():
            copy = tensor.detach().clone()
        self.strangers.append(Stranger(place, copy, name, memory))

    def _entry(self, tensor: Tensor) -> Seen | None:
        """Return what is known of a tensor; another may have had its id."""
        entry = self.seen.get(id(tensor))
        if entry is None or entry.tensor() is not tensor:
            return None
        return entry

    def _note(self, tensor: Tensor, held: Print | None, derived: bool) -> None:
        """Keep what a tensor holds; None: it is not compared."""
        self.seen[id(tensor)] = Seen(weakref.ref(tensor), held, derived)

    def _changed(self, tensor: Tensor) -> bool:
        """Return whether a tensor is another one than it was, and no function that was seen has
        written to its memory; note what it is now.
        """
        entry = self._entry(tensor)
        before = None
        if entry is not None:
            before = entry.held
            if before is None:
                return False
        now = self._print(tensor)
        self._note(tensor, now, entry is not None and entry.derived)
        if before is None or now is None:
            return False
        return now.epoch == before.epoch and now != before

    def _print(self, tensor: Tensor) -> Print | None:
        """Return what a tensor holds now; None for one without numbers of its own."""
        if not _has_memory(tensor):
            return None
        content = _content(tensor, id(tensor) in self.addressed)
        return Print(self.epochs[memory_of(tensor)], content)


def _engine_runs() -> bool:
    """Return whether several processes run, or one that torch.distributed was set up in: FSDP2
    gathers weights into memory that held anything.
    """
    return several_processes() or (distributed.is_available() and distributed.is_initialized())


FILLING = frozenset(
    "copy_ fill_ zero_ normal_ uniform_ random_ bernoulli_ exponential_ cauchy_ log_normal_ "
    "geometric_".split()
)
"""Functions that write all numbers of a tensor without reading them."""


def _has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor has numbers that lie in a memory of its own."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and tensor.layout == torch.strided and not in_transform(tensor)


OF_TORCH = getattr(Tensor, "__torch_dispatch__", None)
"""What tensors have that do not say themselves what operators do with them."""


def _is_bare(tensor: Tensor) -> bool:
    """Return whether a tensor has numbers in one memory, which may be copied and compared."""
    of_torch = getattr(type(tensor), "__torch_dispatch__", None) is OF_TORCH
    strided = tensor.layout == torch.strided and not tensor.is_nested
    return of_torch and strided and not tensor.is_meta


def _place() -> Hashable:
    """Return the line of the program that torch and this library were called from."""
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in ("flowspace", "torch"):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


def _may_move(tensor: Tensor) -> bool:
    """Return whether a tensor could carry a tangent, and has values."""
    return (tensor.is_floating_point() or tensor.is_complex()) and not in_transform(tensor)


def _content(tensor: Tensor, addressed: bool) -> int:
    """Return a checksum of the numbers of a tensor on a CPU; elsewhere how often autograd has seen
    it written to, which the device need not be asked, unless its address is known.

    They are read where they lie: an array of numpy would keep their memory from being freed.
    """
    if tensor.device.type != "cpu" and not addressed:
        return version_of(tensor)
    if not tensor.numel() or not is_alive(tensor):
        return 0
    with alone():
        numbers = tensor.detach()
        count = numbers.numel() * numbers.element_size()
        memory = numbers.untyped_storage()
        start = numbers.data_ptr()
        if tensor.device.type != "cpu" or not numbers.is_contiguous():
            if count > memory.nbytes():  # an axis is expanded, or windows overlap
                memory = memory.cpu()
                start, count = memory.data_ptr(), memory.nbytes()
            else:
                numbers = numbers.contiguous().cpu()
                start = numbers.data_ptr()
        return zlib.crc32((ctypes.c_char * count).from_address(start))


def moved_a_little(primals: Sequence[Any], tangents: Sequence[Tensor | None]) -> list[Any]:
    """Return primals at a point nearby: those that have a tangent move, towards 1/2, so that times
    stay times.
    """
    moved = list(primals)
    for i, tangent in enumerate(tangents):
        if tangent is None:
            continue
        step = STEP * tangent
        if not tangent.is_complex():
            step = torch.where(primals[i] > 0.5, -step.abs(), step.abs())
        moved[i] = (primals[i] + step).to(primals[i].dtype)
    return moved


STEP = 2**-4
"""By how much a point nearby differs, in tangents: enough to be seen in bfloat16."""


def check_strangers(
    first: Sequence[Stranger],
    again: Callable[[], Sequence[Stranger]],
    nearby: Callable[[], Sequence[Stranger]],
) -> None:
    """Raise DerivativeError if tensors of unknown origin depend on what moves: they are the same
    when the model is evaluated again, and other ones at a point nearby.

    What is another one each time (memory that is still to be filled, draws of a generator of the
    model's own) or is not used each time (a table that was made once) is taken for a constant.

    Args:
        first: those that the model used.
        again: evaluates the model again, and returns those that it used.
        nearby: does so at a point nearby. Where other processes would have to do the same neither
            is called, and what has a gradient is taken to move.
    """
    if several_processes():
        raise DerivativeError(_refusal(first[0], "may change"))
    try:
        repeated, others = _by_place(again()), _by_place(nearby())
    except Exception:  # the model's own: of a counter, or of a point that it is not made for
        return
    for stranger in first:
        place = stranger.place
        if place not in repeated or place not in others:
            continue
        control = repeated[place]
        if _same(stranger.values, control) and not _same(control, others[place]):
            raise DerivativeError(_refusal(stranger, "changes"))


def _by_place(strangers: Sequence[Stranger]) -> dict[Hashable, Tensor]:
    """Return the values of strangers by the place where they were used."""
    return {stranger.place: stranger.values for stranger in strangers}


def _refusal(stranger: Stranger, verb: str) -> str:
    """Return why a stranger is refused."""
    origin = "made or written to unseen"
    if stranger.name is not None:
        origin = f"made unseen ({stranger.name} in the backward pass)"
    shape = tuple(stranger.values.shape)
    return f"got a tensor of shape {shape} that {verb} with z_t or t, {origin}{UNSEEN}"


def _same(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors of one shape hold the same bits."""
    with alone():
        bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (first, second)]
        return torch.equal(*bits)


UNSEEN = (
    ": torch shows to no function mode what a C++ extension, a thread of before, "
    "torch._C.DisableTorchFunction(), or memory handed out by dlpack, numpy or its address does, "
    "so its tangent would be lost; write functions of torch, called in the thread of the model, "
    "or derivative=FiniteDifference()"
)
"""Why a tensor is refused, and what to write instead."""
