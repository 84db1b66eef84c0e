"""What the tangent of attention costs on a GPU: ``python benchmarks/attention.py``.

In bfloat16, half of the rows moving: torch's fused attention of all rows, for scale; then the
tangent by one kernel (`flowspace/derivatives/rules/attention_kernel.py`), and by products one
after the other, as written and compiled. Milliseconds are medians of calls in a row.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import DEVICE
from torch import Tensor

from flowspace.demo.page import markdown_table
from flowspace.derivatives.rules import attention
from flowspace.derivatives.rules.attention import Form, Operands
from flowspace.derivatives.rules.attention_kernel import attention_tangent

SHAPES = {
    "CrossFlow-B, batch 32": (32, 12, 272, 64),
    "ViT-S, batch 256": (256, 6, 64, 64),
    "4,096 tokens, batch 2": (2, 12, 4096, 64),
    "72 channels a head (CrossFlow-XL), batch 32": (32, 16, 272, 72),
    "128 channels a head, batch 16": (16, 8, 256, 128),
}
"""Rows, heads, tokens and channels."""

HEAD = ("attention", "fused, value alone", "kernel", "products, compiled", "products, eager")


def milliseconds(call: Callable[[], object]) -> float:
    """Return how long a call takes on the device."""
    from triton.testing import do_bench  # pyright: ignore[reportMissingImports]

    return float(do_bench(call, warmup=10, rep=50, return_mode="median"))


def by_products(
    form: Callable[..., Tensor], operands: list[Tensor], tangents: list[Tensor], rows: Tensor
) -> Tensor:
    """Return the tangent as the rule forms it where the kernel is not used."""
    primals = Operands(*[x.index_select(0, rows) for x in operands], None)
    scale = operands[0].shape[-1] ** -0.5
    return form(primals, Operands(*tangents, None), Form(scale, False))


def measured(shape: tuple[int, int, int, int]) -> list[str]:
    """Return the figures of one shape."""
    batch, heads, tokens, channels = shape

    def drawn(count: int) -> list[Tensor]:
        found = []
        for _ in range(3):
            x = torch.randn(count, tokens, heads, channels, device=DEVICE, dtype=torch.bfloat16)
            found.append(x.transpose(1, 2))
        return found

    operands, tangents = drawn(batch), drawn(batch // 2)
    rows = torch.randperm(batch, device=DEVICE)[: batch // 2]
    scale = channels**-0.5
    eager = functools.partial(by_products, attention._eager_tangent)
    traced = functools.partial(by_products, attention._traced_tangent)
    compiled = torch.compile(traced, dynamic=False)
    calls = [
        functools.partial(F.scaled_dot_product_attention, *operands),
        functools.partial(attention_tangent, *operands, *tangents, rows, scale, False),
        functools.partial(compiled, operands, tangents, rows),
        functools.partial(eager, operands, tangents, rows),
    ]
    return [f"{milliseconds(call):.3f}" for call in calls]


def main() -> None:
    """Print the table."""
    if DEVICE.type != "cuda":
        print("the kernel runs on an NVIDIA GPU, and there is none; nothing is measured")
        return
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, bfloat16\n")
    rows = [(name, *measured(shape)) for name, shape in SHAPES.items()]
    print(markdown_table(HEAD, rows))


if __name__ == "__main__":
    main()
