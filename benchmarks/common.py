"""What benchmarks of the derivative share: the device, its clocks and memory, timm's ViT."""

import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = [
    "CHANNELS",
    "DEVICE",
    "TimmViT",
    "clock",
    "finish",
    "growth",
    "number",
    "resident",
    "spread",
    "timed",
]

DEVICE = torch.device("cpu")
if torch.cuda.is_available():
    DEVICE = torch.device("cuda")

CHANNELS = 16
"""Channels of the latents that `TimmViT` takes and returns."""


class TimmViT(nn.Module):
    """An unmodified timm vision transformer with fused attention; times are added to its input."""

    def __init__(self, side: int, width: int, depth: int) -> None:
        super().__init__()
        from timm.models import vision_transformer  # pyright: ignore[reportMissingImports]

        self.side = side
        self.vit = vision_transformer.VisionTransformer(
            img_size=side,
            patch_size=1,
            in_chans=CHANNELS,
            embed_dim=width,
            depth=depth,
            num_heads=width // 64,
            num_classes=0,
            class_token=False,
            global_pool="",
        )
        self.times = nn.Linear(2, CHANNELS)
        self.head = nn.Linear(width, CHANNELS)

    def forward(self, z: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        """Map latents ``(B, 16, side, side)`` to latents."""
        times = self.times(torch.stack([t, s], 1))
        tokens = self.vit(z + times[:, :, None, None])
        maps = self.head(tokens).transpose(1, 2)
        return maps.unflatten(2, (self.side, self.side))


# --- time and memory


def finish() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def clock() -> float:
    """Return seconds: of this process where it is one thread, else of the wall."""
    if DEVICE.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def timed(job: Callable[[], object]) -> float:
    """Return the seconds that a job takes, on a GPU by the events of its stream."""
    if DEVICE.type == "cpu":
        start = clock()
        job()
        return clock() - start
    first = torch.cuda.Event(enable_timing=True)
    last = torch.cuda.Event(enable_timing=True)
    finish()
    first.record()
    job()
    last.record()
    finish()
    return first.elapsed_time(last) / 1000


def resident(field: str) -> float:
    """Return a memory field of this process in bytes, as Linux tells it."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}, which Linux writes there")
    return 1024.0 * int(found[1])


def growth(job: Callable[[], object]) -> float:
    """Return the peak memory of a job in bytes, over what was held before it."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return float(torch.cuda.max_memory_allocated() - before)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident("VmRSS")
    job()
    return resident("VmHWM") - before


# --- numbers as text


def number(value: float, form: str) -> str:
    """Return a number, or nothing where there is none."""
    if math.isnan(value):
        return ""
    return format(value, form)


def spread(values: Sequence[float]) -> str:
    """Return the median and the quartiles of a ratio; of a single one, that."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
