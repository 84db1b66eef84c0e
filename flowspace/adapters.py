r"""Networks of other libraries as models of this one.

Here a model is called as ``model(z_t, t, s, **cond)`` and returns one tensor. A network of
diffusers is called as ``network(sample, timestep, class_labels=...)`` and returns an object with
``.sample``; its time runs to 1,000, and it has no destination. Others call the destination r, or
take h = t - s, or count time from noise to data. `adapt` says which of the network's arguments is
which formula of t and s, and nothing else changes: the network keeps its parameters and names.

A network of one time learns a second one from an embedding that is added to that of the first,

$$e(t) \leftarrow e(t) + W_2\, \mathrm{silu}(W_1 \phi(t - s)), \qquad W_2 = 0 \text{ at first,}$$

so that the adapted network returns at first, for every s, what the network does. Flow matching's
network is then MeanFlow's on the diagonal, from the first step on. phi are sines and cosines with
periods from 10 down to 1/16, slow enough for a derivative in t to be of the size of the rest (Lu &
Song, arXiv 2410.11081, section 4.1).
"""

import math
from collections.abc import Callable, Mapping
from inspect import Signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowspace.arrays import at_least_float32, is_number
from flowspace.errors import InputError
from flowspace.inputs import require, signature_of
from flowspace.time_functions import Source, TimeFunction

__all__ = ["Adapter", "adapt"]

KNOWN_TIMES: dict[tuple[str, ...], dict[str, str]] = {
    ("timestep", "r_timestep"): {
        "timestep": "1000*t",
        "r_timestep": "1000*s",
    },
    ("timestep",): {"timestep": "1000*t"},
    ("t", "s"): {"t": "t", "s": "s"},
    ("t", "r"): {"t": "t", "r": "s"},
    ("t", "h"): {"t": "t", "h": "t - s"},
}
"""What arguments of these names mean: of diffusers' networks, and of those of two times."""

TIME_EMBEDDINGS = ("time_embedding", "timestep_embedder", "t_embedder")
"""How modules are called that return the embedding of the time: diffusers' UNets, its
transformers, and the code of DiT and SiT.
"""

MOST_SHOWN = 8
"""How many of a network's modules a message names."""

FREQUENCIES = 64
"""Sines and cosines of an added time: as many of each."""

SLOWEST, FASTEST = 10.0, 1 / 16
"""Their periods."""


def adapt(  # noqa: PLR0913  # the public door: each argument has its name
    network: nn.Module,
    times: Mapping[str, Source] | None = None,
    *,
    names: Mapping[str, str] | None = None,
    factor: float = 1.0,
    output: Callable[[Any], Tensor] | None = None,
    added: "Source | None" = None,
    added_to: str | None = None,
) -> "Adapter":
    """Return a network of another library as a model, called as ``model(z_t, t, s, **cond)``.

    Args:
        network: any module whose first argument is z_t and which takes times of shape ``(B,)`` by
            name. It is used as it is, not copied.
        times: what each of its times is, by the argument's name: a formula in t and s, such as
            ``{"timestep": "1000*t"}``, ``{"t": "1 - t"}`` for a network whose time runs from noise
            to data, or ``{"t": "t", "h": "t - s"}``; or a function of two tensors ``(B,)``. By
            default ``timestep`` is 1000 t and ``r_timestep`` 1000 s, and of two times ``t`` is t,
            ``s`` and ``r`` are s, and ``h`` is t - s.
        names: the network's names of conditions, by the names they have here, such as ``{"labels":
            "class_labels"}``; other conditions keep their names.
        factor: what the output is multiplied by: -1 for velocities from noise to data.
        output: from what the network returns to a tensor, such as ``lambda out: out.sample[:,
            :4]``; by default the tensor itself, ``.sample``, or the first of a tuple.
        added: a time that the network does not take, such as ``"t - s"``; its embedding begins at
            zero and is added to that of the network's own time. From then on the network is called
            through the model alone.
        added_to: the module that returns the embedding of the network's own time, ``(B, width)``,
            by its name in ``network.named_modules()``; by default every one called
            ``time_embedding``, ``timestep_embedder`` or ``t_embedder``.

    Raises:
        InputError: if the network takes no arguments of these names, its times are not known and
            not given, or there is no embedding to add to.
        ExpressionError: if a text is no formula in t and s.
    """
    _check_parts(network, times, names, factor, output)
    if times is None:
        times = _known_times(network)
    renamed = dict(names or {})
    _check_names(network, [*times, *renamed.values()])
    made = Adapter(network, times, renamed, factor, output)
    if added is not None:
        made.add_time(added, added_to)
    elif added_to is not None:
        raise InputError(
            f"got added_to = {added_to!r} without a time that is added; write added='t - s' too"
        )
    return made


def _check_parts(network: Any, times: Any, names: Any, factor: Any, output: Any) -> None:
    """Raise InputError for an argument of `adapt` of the wrong kind."""
    require(
        isinstance(network, nn.Module),
        "network",
        network,
        "write a torch module; a function needs no adapter: def model(z_t, t, s, **cond)",
    )
    require(is_number(factor), "factor", factor, "write a number, such as -1.0")
    require(
        times is None or isinstance(times, Mapping),
        "times",
        times,
        "it says what each of the network's times is, as {'timestep': '1000*t'}",
    )
    require(
        names is None or isinstance(names, Mapping),
        "names",
        names,
        "it has the network's names of conditions, as {'labels': 'class_labels'}",
    )
    require(
        output is None or callable(output),
        "output",
        output,
        "it is a function from what the network returns to a tensor",
    )


class Adapter(nn.Module):
    """A network of another library as a model; `adapt` builds it, and tells what its arguments
    are.

    States and conditions of several axes are cast to the precision of the network's weights; times
    and other conditions of shape ``(B,)`` are not, since bfloat16 cannot tell 999 from 1,000. What
    comes back is in float32 at least.

    The names of its tensors are the network's with ``network.`` before them, and those of an added
    time begin with ``added.``. ``adapted.network`` is the network itself, to be saved as ever.

    Attributes:
        network: the network.
        added: the embedding of an added time, or None.
    """

    added: "AddedTime | None"

    def __init__(
        self,
        network: nn.Module,
        times: Mapping[str, Source],
        names: Mapping[str, str],
        factor: float = 1.0,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.times = {}
        for name, source in times.items():
            self.times[name] = TimeFunction(source, 2)
        self.names = dict(names)
        self.factor = factor
        self.output = output or _first_tensor
        self.added = None
        self._embedding = _Current()

    def add_time(self, time: Source, to: str | None = None) -> None:
        """Give the network a further time; see ``added`` and ``added_to`` of `adapt`.

        Raises:
            InputError: if it has one already, or there is no embedding to add to.
        """
        if self.added is not None:
            raise InputError("got a network that has an added time already; adapt a fresh one")
        modules = _time_embeddings(self.network, to)
        weight = _last_linear(modules).weight
        added = AddedTime(TimeFunction(time, 2), width=len(weight))
        self.added = added.to(weight)
        for name, module in modules.items():
            hook = _Adding(name, self._embedding)
            module.register_forward_hook(hook)

    def forward(self, z_t: Tensor, t: Tensor, s: Tensor, **cond: Any) -> Tensor:
        """Return what the network returns, in float32 at least.

        Args:
            z_t: states ``(B, *)``.
            t: times ``(B,)``.
            s: destinations ``(B,)``.
            cond: conditions, by their names here or the network's.

        Raises:
            InputError: if the network takes no such conditions, lacks one, or returns no tensor.
        """
        dtype = _precision(self.network)
        given = {name: time(t, s) for name, time in self.times.items()}
        for name, value in cond.items():
            given[self.names.get(name, name)] = _cast(value, dtype)
        before = self._embedding.value
        if self.added is not None:
            self._embedding.value = self.added(t, s)
        try:
            found = self.network(_cast(z_t, dtype), **given)
        except TypeError as error:
            _refuse_unfit(self.network, given, error)
            raise
        finally:
            self._embedding.value = before
        prediction = at_least_float32(self.output(found))
        if self.factor != 1:
            prediction = self.factor * prediction
        return prediction

    def compile_blocks(self, **options: Any) -> "Adapter":
        """Compile the network's blocks in place, one by one; returns itself.

        Those are what diffusers names for its ``compile_repeated_blocks``, or else what stands in
        the network's own lists of modules. Weights and their names stay as they are.

        Args:
            options: those of ``torch.compile``.

        Raises:
            InputError: if the network has no list of modules.
        """
        if getattr(self.network, "_repeated_blocks", None):
            self.network.compile_repeated_blocks(**options)  # type: ignore[operator]
            return self
        children = self.network.children()
        lists = [each for each in children if isinstance(each, nn.ModuleList)]
        if not lists:
            raise InputError(
                f"got {_kind(self.network)}, which has no list of blocks; write adapted.compile()"
            )
        for blocks in lists:
            for block in blocks:
                block.compile(**options)
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Let a network of diffusers run its blocks again in the backward pass, an added time
        included.

        Raises:
            InputError: if the network is not of diffusers, or has no such blocks.
        """
        if not getattr(self.network, "_supports_gradient_checkpointing", False):
            raise InputError(
                f"got {_kind(self.network)}, "
                "which has no gradient checkpointing of diffusers; "
                "let its blocks run under torch.utils.checkpoint themselves"
            )
        self.network.enable_gradient_checkpointing(self._checkpointed)  # type: ignore[operator]

    def _checkpointed(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """Run a block, now and again, under the embedding that is current now."""
        current = self._embedding

        def run(embedding: Tensor | None, *inputs: Any) -> Any:
            before = current.value
            current.value = embedding
            try:
                return block(*inputs)
            finally:
                current.value = before

        return checkpoint(run, current.value, *inputs, use_reentrant=False)


class AddedTime(nn.Module):
    """The embedding of a time that is added to a network's own: sines and cosines, then an MLP
    whose last layer begins at zero.

    Args:
        time: a function of (t, s).
        width: of the embedding.
    """

    def __init__(self, time: TimeFunction, width: int) -> None:
        super().__init__()
        self.time = time
        self.first = nn.Linear(2 * FREQUENCIES, width)
        self.second = nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, t: Tensor, s: Tensor) -> Tensor:
        """Map times ``(B,)`` to ``(B, width)``; angles are formed in float32 at least."""
        slowest = math.log10(2 * math.pi / SLOWEST)
        fastest = math.log10(2 * math.pi / FASTEST)
        rates = torch.logspace(slowest, fastest, FREQUENCIES, device=t.device, dtype=t.dtype)
        angle = self.time(t, s)[:, None] * rates
        waves = torch.cat([angle.cos(), angle.sin()], 1)
        waves = waves.to(self.first.weight.dtype)
        return self.second(F.silu(self.first(waves)))


class _Current:
    """The embedding that is added in the evaluation that is going on; None between evaluations."""

    value: Tensor | None = None


class _Adding:
    """A hook that adds the current embedding to what a module returns.

    It is an object, not a closure, so that a deep copy of the model adds its own.
    """

    def __init__(self, name: str, embedding: _Current) -> None:
        self.name = name
        self.embedding = embedding

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        added = self.embedding.value
        if added is None:
            raise InputError(
                f"got a call of {self.name} outside of the adapted model, "
                "which alone knows the time that was added: "
                "call what adapt returned, or a network that no time was added to; "
                "for gradient checkpointing write adapted.enable_gradient_checkpointing()"
            )
        if output.shape != added.shape:
            raise InputError(
                f"got shape {tuple(output.shape)} from {self.name}, "
                f"where the added time has {tuple(added.shape)}; "
                "let added_to name a module "
                "that returns the embedding of the time, (B, width)"
            )
        return output + added.to(output.dtype)


def _signature(network: nn.Module) -> Signature:
    """Return the arguments of a network, also of one that torch.compile wraps."""
    return signature_of(getattr(network, "_orig_mod", network))


def _kind(module: nn.Module) -> str:
    """Return the name of a module's class, for a message."""
    return type(module).__name__


def _described(network: nn.Module) -> str:
    """Return a network's class and the names of its arguments, for a message."""
    names = ", ".join(_signature(network).parameters)
    return f"{_kind(network)} with the arguments ({names})"


def _known_times(network: nn.Module) -> dict[str, str]:
    """Return what a network's times are, by their names alone."""
    signature = _signature(network)
    for arguments, times in KNOWN_TIMES.items():
        if signature.parameters.keys() >= set(arguments):
            return times
    raise InputError(
        f"got {_described(network)}, whose times do not tell their range; "
        "write times={'t': 't'} for times from 0, data, to 1, noise, "
        "{'t': '1 - t'} for the other direction, or {'t': '1000*t'}"
    )


def _check_names(network: nn.Module, names: list[str]) -> None:
    """Raise InputError unless a network takes a state first and has arguments of these names."""
    signature = _signature(network)
    try:
        signature.bind_partial(None, **dict.fromkeys(names))
    except TypeError as error:
        wanted = ", ".join(names)
        raise InputError(
            f"got {_described(network)}, which does not take a state first "
            f"and then {wanted} by name: {error}; "
            "name its own arguments in times= and names="
        ) from error


def _refuse_unfit(network: nn.Module, given: Mapping[str, Any], error: TypeError) -> None:
    """Raise InputError if a network cannot be called with what it was given."""
    signature = _signature(network)
    try:
        signature.bind(None, **given)
    except TypeError as unfit:
        names = ", ".join(given)
        raise InputError(
            f"got {_described(network)}, "
            f"which cannot be called with a state and {names}: {unfit}; "
            "give conditions in cond=, and their names in the network in names="
        ) from error


def _time_embeddings(network: nn.Module, name: str | None) -> dict[str, nn.Module]:
    """Return the modules that return the embedding of a network's own time, by name."""
    modules = dict(network.named_modules())
    if name is not None:
        if not name or name not in modules:
            raise _unknown_embedding(network, name)
        return {name: modules[name]}
    found = {}
    for each, module in modules.items():
        if each.rpartition(".")[2] in TIME_EMBEDDINGS:
            found[each] = module
    if not found:
        names = ", ".join(TIME_EMBEDDINGS)
        raise InputError(
            f"got {_kind(network)}, of whose modules none is called {names}; "
            "name the one that returns the embedding of the time, "
            "as added_to='time_mlp'"
        )
    return found


def _unknown_embedding(network: nn.Module, name: str) -> InputError:
    """Return the error for a name that no module has, with names that speak of an embedding."""
    likely = []
    for each, _ in network.named_modules():
        if "time" in each or "embed" in each:
            likely.append(each)
    names = ", ".join(likely[:MOST_SHOWN]) or "network.named_modules()"
    return InputError(
        f"got added_to = {name!r}, which {_kind(network)} does not have; write one of {names}"
    )


def _last_linear(modules: Mapping[str, nn.Module]) -> nn.Linear:
    """Return the last linear layer of modules that are alike: it tells the width."""
    for name, module in modules.items():
        linear = [each for each in module.modules() if isinstance(each, nn.Linear)]
        if linear:
            return linear[-1]
        raise InputError(
            f"got {name} to add a time to, a {_kind(module)} without a linear layer; "
            "name the module that returns the embedding of the time, (B, width), "
            "in added_to="
        )
    raise InputError("got no module to add a time to")


def _precision(network: nn.Module) -> torch.dtype | None:
    """Return the dtype of a network's weights, or None where it has none of real numbers."""
    dtype = getattr(network, "dtype", None)  # of diffusers, which knows what is kept in float32
    if isinstance(dtype, torch.dtype):
        return dtype
    for weight in network.parameters():
        if weight.is_floating_point():
            return weight.dtype
    return None


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """Return real numbers of several axes in a dtype, anything else as it is."""
    if dtype is None or not isinstance(value, Tensor):
        return value
    if value.ndim < 2 or not value.is_floating_point():
        return value
    return value.to(dtype)


def _first_tensor(found: Any) -> Tensor:
    """Return a tensor, the ``.sample`` of an object, or the first of a tuple."""
    sample = found
    if not isinstance(found, Tensor):
        sample = getattr(found, "sample", found)
    if isinstance(sample, (tuple, list)) and sample:
        sample = sample[0]
    if isinstance(sample, Tensor):
        return sample
    raise InputError(
        f"got {type(found).__name__} from the network; "
        "write output=, a function from it to one tensor, "
        "such as lambda out: out['prediction']"
    )
