"""What the network is told of a picture: its class, or its caption."""

import unicodedata
from dataclasses import dataclass
from typing import Any

import torch
from pixel_flow_settings import PixelFlowConfig
from torch import Tensor

from flowspace import InputError
from flowspace.vision.data import FolderImages, Images
from flowspace.vision.text import load_text_encoder


def captions_of(images: Images) -> list[str]:
    """Return a caption of each picture: what Unicode calls an emoji, or else its class."""
    captions = []
    for index, label in enumerate(images.labels):
        caption = images.names[label]
        if isinstance(images, FolderImages):
            caption = unicode_name(images.paths[index].stem) or caption
        captions.append(caption)
    return captions


def unicode_name(stem: str) -> str:
    """Return the name of the character of a hexadecimal code, or nothing."""
    try:
        return unicodedata.name(chr(int(stem, 16))).lower()
    except ValueError:
        return ""


@dataclass(frozen=True)
class Conditions:
    """What the network may be told: a class, or the tokens of a caption.

    Attributes:
        names: of the classes, or the captions.
        text: tokens ``(N, L, width)`` of each caption and which there are; None for classes.
    """

    names: tuple[str, ...]
    text: tuple[Tensor, Tensor] | None = None

    def of(self, labels: Tensor, dropped: Tensor | None = None) -> dict[str, Tensor]:
        """Return the network's arguments for labels ``(B,)``, of which some are dropped."""
        if dropped is None:
            dropped = torch.zeros_like(labels, dtype=torch.bool)
        if self.text is None:
            return {"labels": torch.where(dropped, len(self.names), labels)}
        tokens, mask = self.text
        return {
            "text": tokens[labels],
            "text_mask": mask[labels] & ~dropped[:, None],
        }

    @property
    def null(self) -> dict[str, Any]:
        """What the network is told instead, where it is told nothing."""
        if self.text is None:
            return {"labels": len(self.names)}
        return {"text_mask": False}

    @property
    def of_network(self) -> dict[str, int]:
        """What the network is built with."""
        if self.text is None:
            return {"classes": len(self.names), "text_width": 0}
        tokens, _ = self.text
        return {"classes": 0, "text_width": tokens.shape[-1]}


def conditions_of(config: PixelFlowConfig, images: Images, device: torch.device) -> Conditions:
    """Return the classes of pictures, or their captions, encoded once.

    Raises:
        InputError: if the encoder's tokens are not as wide as the config says.
    """
    c = config.condition
    if c.kind == "classes":
        return Conditions(images.names)
    encoder = load_text_encoder(c.encoder, length=c.length).to(device)
    if encoder.width != c.width:
        raise InputError(
            f"got condition.width = {c.width} for {c.encoder}, whose tokens are "
            f"{encoder.width} wide; write condition.width={encoder.width}"
        )
    captions = images.names
    tokens, masks = [], []
    for first in range(0, len(captions), 64):
        some, there = encoder.encode(captions[first : first + 64])
        tokens.append(some)
        masks.append(there)
    return Conditions(captions, (torch.cat(tokens), torch.cat(masks)))
