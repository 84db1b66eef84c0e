"""The same steps under torch.compile, in a process of their own, which can be ended in time.

``python -m flowspace.doctor.compiled my_file:build`` imports what it needs, waits for a line on
its input, then compiles and measures, and tells what it found as one line of JSON. So it does not
take the processor while the other process measures.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flowspace.doctor.steps import PLAIN, Cost, Stopwatch, one_thread, run_in_turn, said, steps_of
from flowspace.doctor.target import load
from flowspace.errors import FlowspaceError

__all__ = ["CompiledSteps", "start_compiled"]

SHARE = 0.4
"""What part of the time that is left the measuring may take, in this process."""


@dataclass
class CompiledSteps:
    """A process that compiles a model, and measures its steps when it is told to.

    Attributes:
        process: it.
    """

    process: subprocess.Popen[str]

    def measure(self, watch: Stopwatch) -> dict[str, Any]:
        """Return what it found: `costs`, `failures`, `over_eager` and `warned`; or why not.

        Args:
            watch: the time that is left to it.
        """
        seconds = max(0.1, watch.left)
        order = json.dumps({"seconds": SHARE * seconds}) + "\n"
        try:
            told, written = self.process.communicate(order, timeout=seconds)
        except subprocess.TimeoutExpired:
            self.end()
            return {"reason": "not compiled in time; write --seconds 60"}
        lines = told.strip().splitlines()
        if lines:
            return json.loads(lines[-1])
        last = written.strip().splitlines()[-1:]
        return {"reason": f"its process ended: {''.join(last) or 'without a word'}"}

    def end(self) -> None:
        """End the process and those that it compiles in."""
        with contextlib.suppress(ProcessLookupError):
            if os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.communicate()


def start_compiled(name: str, latents: Sequence[int] | None) -> CompiledSteps:
    """Start a process that compiles the model of this name."""
    shape = ",".join(map(str, latents or ()))
    process = subprocess.Popen(
        [sys.executable, "-m", "flowspace.doctor.compiled", name, shape],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return CompiledSteps(process)


def main(name: str, shape: str) -> None:
    """Wait, compile, measure, and tell."""
    tell = sys.stdout
    sys.stdout = sys.stderr  # what a user's file prints is not for the other process
    latents = None
    if shape:
        latents = tuple(int(size) for size in shape.split(","))
    try:
        found = _measured(name, latents)
    except FlowspaceError as error:
        found = {"reason": said(error)}
    print(json.dumps(found), file=tell, flush=True)


def _measured(name: str, latents: tuple[int, ...] | None) -> dict[str, Any]:
    """Return the costs of the compiled steps, over the compiled plain step."""
    import torch._inductor.compile_fx  # seconds, which the other process does not wait for

    example = load(name, latents)
    order = json.loads(sys.stdin.readline() or "{}")
    model: Any = torch.compile(example.model)
    compiled = replace(example, model=model)
    steps = steps_of(compiled) | {"eager": steps_of(example)[PLAIN]}
    with one_thread(example.latents.device):
        run_in_turn(compiled, steps, 0)
        trials = run_in_turn(compiled, steps, order.get("seconds", 1.0))
    plain = trials.pop(PLAIN)
    uncompiled = trials.pop("eager")
    if plain.failure:
        return {"reason": f"the model does not compile: {plain.failure}"}
    costs, failures = {}, {}
    for step, trial in trials.items():
        if trial.failure:
            failures[step] = trial.failure
        else:
            costs[step] = Cost.of(trial.seconds, plain.seconds)
    return {
        "costs": costs,
        "failures": failures,
        "over_eager": Cost.of(plain.seconds, uncompiled.seconds).median,
        "warned": trials["SharedPrimal()"].warned,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
