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


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton, which runs it, is missing"
)


@needs_triton
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
    assert len(lines) == 15
    wrong = [line for line in lines if not float(line[1]) < 3e-6]
    assert not wrong
    chosen = {name for name, _, rows in lines if rows == "True"}
    assert chosen == {"rows", "no tokens", "None, False, 2", "aot_eager, False, 2"}


@needs_triton
@pytest.mark.parametrize(
    ("capability", "kilobytes"),
    [(80, 163), (89, 99), (90, 227)],
    ids=["Ampere", "Ada and other GPUs of desktops", "Hopper"],
)
@pytest.mark.parametrize("size", [64, 128])
def test_it_fits_into_the_shared_memory_of_smaller_gpus(capability, kilobytes, size):
    """Compiled for GPUs that are not there; their limits are those of the CUDA C guide."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flowspace.derivatives.rules import attention_triton

    keys, stages = attention_triton.pace(size, size)
    kernel = attention_triton._kernel
    side = attention_triton.padded(size)
    constants = {"size": size, "channels": size, "size_padded": side, "channels_padded": side}
    constants |= {"causal": True, "QUERIES": attention_triton.QUERIES, "KEYS": keys}
    tensors = {"query", "key", "value", "query_tangent", "key_tangent", "value_tangent", "out"}
    kinds = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(tensors, "*bf16")
    kinds |= {"rows": "*i64", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: kinds[name] for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): x for name, x in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(kernel.arg_names)
            if name in tensors or name.endswith(("_row", "_head", "_token"))
        },
    )
    options = {"num_warps": attention_triton.WARPS, "num_stages": stages}
    made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert 0 < made.metadata.shared <= 1024 * kilobytes


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
        lambda q, k, v: (q[..., None, :], k, v),
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


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a generation, as far as the kernel asks."""

    def made(capability, cuda="13.0"):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        attention_kernel._device_fits.cache_clear()

    yield made
    attention_kernel._device_fits.cache_clear()


@needs_triton
def test_without_a_compiler_the_formulas_take_its_place_with_one_warning(monkeypatch, gpu):
    def fail():
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    gpu((9, 0))
    monkeypatch.setattr(attention_kernel, "_try_once", fail)
    with pytest.warns(
        UserWarning, match=r"Failed to find C compiler\.\); .* and slower"
    ) as caught:
        assert not attention_kernel._device_fits()
    assert not attention_kernel._device_fits()
    assert len(caught) == 1


@needs_triton
@pytest.mark.parametrize(
    ("capability", "cuda", "fits"),
    [((8, 0), "12.8", True), ((7, 5), "12.8", False), ((9, 4), None, False)],
    ids=["Ampere", "Turing", "AMD"],
)
def test_it_is_for_nvidias_gpus_from_ampere_on(monkeypatch, gpu, capability, cuda, fits):
    gpu(capability, cuda)
    monkeypatch.setattr(attention_kernel, "_try_once", lambda: None)
    assert attention_kernel._device_fits() == fits
