"""The tangent of attention as one kernel, by Triton's interpreter; `test_gpu.py` runs it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowspace.derivatives.rules import attention_kernel

WORKER = Path(__file__).parent / "attention_kernel_worker.py"


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton, which interprets it, is missing"
)
def test_the_kernel_is_the_derivative_of_attention():
    ran = subprocess.run(
        [sys.executable, str(WORKER)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    lines = [line.rsplit(maxsplit=2) for line in ran.stdout.splitlines()]
    assert len(lines) == 14
    wrong = [line for line in lines if not float(line[1]) < 3e-6]
    assert not wrong
    chosen = {name for name, _, rows in lines if rows == "True"}
    assert chosen == {"rows", "no tokens", "None, False, 2", "aot_eager, False, 2"}


def test_a_trace_knows_the_shape_and_the_layout_in_memory():
    q, k, v = (torch.empty(4, 3, 7, size, device="meta") for size in (8, 8, 5))
    rows = torch.empty(2, dtype=torch.long, device="meta")
    out = attention_kernel.attention_tangent(q, k, v, None, None, v[:2], rows, 1.0, False)
    assert out.shape == (2, 3, 7, 5)
    assert out.transpose(1, 2).is_contiguous()  # heads merge without a copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_has_no_use_for_it(dtype):
    x = torch.randn(2, 1, 4, 8, dtype=dtype)
    assert not attention_kernel.takes((x, x, x))


@pytest.mark.parametrize(
    "changed",
    [
        lambda q, k, v: (q, k.float(), v),
        lambda q, k, v: (q, k[:1], v),
        lambda q, k, v: (q, k, v[0]),
        lambda q, k, v: (q.repeat(1, 1, 1, 20), k.repeat(1, 1, 1, 20), v),
        lambda q, k, v: (q, k, v.repeat(1, 1, 1, 20)),
        lambda q, k, v: (q.double(), k.double(), v.double()),
    ],
)
def test_what_it_cannot_take_is_left_to_the_formulas(monkeypatch, changed):
    monkeypatch.setattr(attention_kernel, "DEVICES", {"cpu"})
    monkeypatch.setattr(attention_kernel, "_device_fits", lambda: True)
    q, k, v = torch.randn(3, 2, 1, 4, 8, dtype=torch.bfloat16)
    assert attention_kernel.takes((q, k, v))
    assert not attention_kernel.takes(changed(q, k, v))
