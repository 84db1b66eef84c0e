"""Programs in several processes of this machine, as torchrun starts them."""

import os
import subprocess
import sys

__all__ = ["in_processes"]


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
