"""Programs in several processes of this machine, as torchrun starts them; what shortens one."""

import os
import subprocess
import sys

__all__ = ["SHORT_MEAN_FLOW_RAE", "in_processes"]

SHORT_MEAN_FLOW_RAE = (
    "data.path=digits/test",
    "decoder={steps: 2, batch: 4}",
    "flow_matching={steps: 3}",
    "mid_training={steps: 2, batch: 2}",
    "distillation={steps: 3}",
    "fine_tuning={steps: 2}",
    "training.batch=4",
    "training.checkpoint_every=2",
    "training.log_every=1",
    "network.depth=1",
    "network.head_depth=1",
    "evaluation={samples: 10, batch: 10}",
    "teacher_steps=3",
)
"""What makes a run of examples/mean_flow_rae short: some steps of every stage."""


def in_processes(count, program, *arguments):
    """Return what a program ended with, its output kept; each process has one thread."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    return subprocess.run(
        [sys.executable, *torchrun, *map(str, (program, *arguments))],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
