"""The same steps under torch.compile, in a process of their own, which can be ended in time.

``python -m flowspace.doctor.compiled my_file:build`` imports what it needs, waits for a line on
its input, then compiles and measures, and tells what it found as one line of JSON. So it does not
take the processor while the other process measures.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flowspace.doctor.steps import (
    PLAIN,
    StepCost,
    Stopwatch,
    Trial,
    one_thread,
    run_in_turn,
    said,
    steps_of,
)
from flowspace.doctor.target import load
from flowspace.errors import FlowspaceError

__all__ = ["CompiledSteps", "start_compiled"]

EAGER = "uncompiled"
"""The plain step of the model as it was written, beside the compiled ones."""

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
        """Return what it found: `costs`, `failures`, `over_eager` and `warned`; and in `reason`
        why that is not everything.

        Args:
            watch: the time that is left to it.
        """
        seconds = max(0.1, watch.left)
        order = json.dumps({"seconds": SHARE * seconds}) + "\n"
        reason = ""
        try:
            told, written = self.process.communicate(order, timeout=seconds)
        except subprocess.TimeoutExpired:
            reason = f"not all was compiled in time; write --seconds {2 * watch.seconds:.0f}"
            told, written = self.end()
        lines = told.strip().splitlines()
        if lines:
            return {"reason": reason} | json.loads(lines[-1])
        last = "".join(written.strip().splitlines()[-1:]) or "without a word"
        return {"reason": reason or f"its process ended: {last}"}

    def end(self) -> tuple[str, str]:
        """End the process and those that it compiles in; return what it told and wrote."""
        if self.process.poll() is None and os.name == "posix":
            os.killpg(self.process.pid, signal.SIGKILL)
        elif self.process.poll() is None:
            self.process.kill()
        return self.process.communicate()


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
        for found in _measured(name, latents):
            print(json.dumps(found), file=tell, flush=True)
    except FlowspaceError as error:
        print(json.dumps({"reason": said(error)}), file=tell, flush=True)


def _measured(name: str, latents: tuple[int, ...] | None) -> Iterator[dict[str, Any]]:
    """Iterate over what is known of the compiled steps: of the default route, then of all."""
    import torch._inductor.compile_fx  # seconds, which the other process does not wait for

    example = load(name, latents)
    order = json.loads(sys.stdin.readline() or "{}")
    model: Any = torch.compile(example.model)
    compiled = replace(example, model=model)
    every = steps_of(compiled) | {EAGER: steps_of(example)[PLAIN]}
    first = {step: every[step] for step in (PLAIN, "SharedPrimal()", EAGER)}
    for steps in (first, every):
        with one_thread(example.latents.device):
            run_in_turn(compiled, steps, 0)
            trials = run_in_turn(compiled, steps, order.get("seconds", 1.0) / 2)
        yield _costs(trials)


def _costs(trials: dict[str, Trial]) -> dict[str, Any]:
    """Return the costs of the compiled steps, over the compiled plain step."""
    plain, uncompiled = trials.pop(PLAIN), trials.pop(EAGER)
    if plain.failure:
        return {"reason": f"the model does not compile: {plain.failure}"}
    costs, failures = {}, {}
    for step, trial in trials.items():
        if trial.failure:
            failures[step] = trial.failure
        else:
            costs[step] = StepCost.of(trial.seconds, plain.seconds)
    return {
        "costs": costs,
        "failures": failures,
        "over_eager": StepCost.of(plain.seconds, uncompiled.seconds).median,
        "warned": trials["SharedPrimal()"].warned,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
