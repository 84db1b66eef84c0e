"""The network of a run: untrained, or begun with the weights of another one."""

import functools
from typing import Any

import torch
from pixel_flow_conditions import Conditions
from pixel_flow_settings import PixelFlowConfig

from flowspace import InputError
from flowspace.vision import PixelFlowTransformer

__all__ = ["begun", "network_of"]

SIZES = ("patch", "depth", "width", "heads")
"""Settings of the network in which weights must agree with it."""

TOLD = ("classes", "interval", "text_width", "null_trained")
"""What weights may lack that a network is told."""


def network_of(config: PixelFlowConfig, conditions: Conditions) -> PixelFlowTransformer:
    """Build the network: untrained, or with the weights that it begins with.

    Raises:
        InputError: if the config says no size, or another one than those weights have.
    """
    n = config.network
    sizes = {}
    for name in ("depth", "width", "heads"):
        size = getattr(n, name)
        if size is not None:
            sizes[name] = size
    if n.preset is None and len(sizes) < 3:
        raise InputError("got network.preset = null; write network.depth, width and heads too")
    kind: Any = PixelFlowTransformer
    if n.preset is not None:
        kind = functools.partial(PixelFlowTransformer.from_preset, n.preset)
    torch.manual_seed(config.training.seed)
    network = kind(
        patch=n.patch,
        interval=config.cascade.objective != "flow-matching",
        null_trained=config.condition.drop > 0,
        **sizes,
        **conditions.of_network,
    )
    if n.begin is not None:
        network = begun(n.begin, network)
    network.gradient_checkpointing = n.checkpointing
    return network


def begun(folder: str, wanted: PixelFlowTransformer) -> PixelFlowTransformer:
    """Return a network that is built as another one, and begins as the network of a folder.

    What it is told beside comes in through layers that begin at zero; see
    `PixelFlowTransformer.extended`.

    Args:
        folder: of ``save_pretrained``.
        wanted: has the sizes; its weights are not taken.

    Raises:
        InputError: if the folder's network has other sizes, or is told what the other is not.
    """
    found = PixelFlowTransformer.from_pretrained(folder)
    for name in SIZES:
        own, asked = found.config[name], wanted.config[name]
        if own != asked:
            raise InputError(
                f"got network.{name} = {asked} for network.begin = {folder}, which has {own}; "
                f"write network.{name}={own}"
            )
    changes = {name: wanted.config[name] for name in TOLD}
    return found.extended(**changes)
