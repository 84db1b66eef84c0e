"""Work in processes of their own, so that the page answers while sympy and torch are busy.

A process can be stopped at any time; a thread cannot. Where the system can fork, processes are
forked from one that has imported torch and sympy, which takes a tenth of a second.
"""

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from flowspace.errors import FlowspaceError
from flowspace.explore.answers import Answer, Refused, answers
from flowspace.explore.design import Design

__all__ = ["GRACE", "TIME_LIMIT", "Calculator", "Ended", "Job", "warm_up"]

TIME_LIMIT = 20.0
"""Seconds after which a design is given up."""

GRACE = 0.4
"""Seconds that a newer question waits for an older one; then another process takes it."""

PRELOADED = ["flowspace.explore.workers", "flowspace.explore.training", "torchdiffeq"]


def _context() -> Any:
    """Return how processes are started: forked from one that has imported everything."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Job:
    """A function that runs in a process of its own, and what it has sent.

    Args:
        target: called in the process with its end of a pipe and the arguments.
        arguments: what else it is called with.
    """

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = _context()
        self.pipe, other = context.Pipe()
        self._process = context.Process(target=target, args=(other, *arguments), daemon=True)
        self._process.start()
        other.close()

    def poll(self) -> list[Any]:
        """Return what has been sent since the last call, without waiting."""
        found = []
        try:
            while self.pipe.poll():
                found.append(self.pipe.recv())
        except (EOFError, OSError):
            pass
        return found

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process.is_alive()

    def stop(self) -> None:
        """End the process at once."""
        self._process.kill()
        self.pipe.close()


class Ended:
    """The last thing that a job sends: it has nothing more to say.

    Args:
        problem: why, if it was not for having finished.
    """

    def __init__(self, problem: str = "") -> None:
        self.problem = problem


def send_all(pipe: Connection, function: Callable[..., Iterable[Any]], *arguments: Any) -> None:
    """Send what a function yields, then `Ended`; for a `Job`."""
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):  # the page was left
        try:
            for each in function(*arguments):
                pipe.send(each)
            pipe.send(Ended())
        except FlowspaceError as error:
            pipe.send(Ended(str(error)))


def answer_questions(pipe: Connection) -> None:
    """Answer designs until the pipe closes; a newer question ends the answer to an older one."""
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        _rehearse(pipe)
        while True:
            number, design = pipe.recv()
            pipe.send((number, None))
            for answer in _answers_or_failure(design):
                pipe.send((number, answer))
                if pipe.poll():
                    break
            else:
                pipe.send((number, Ended()))


def _rehearse(pipe: Connection) -> None:
    """Answer the first design to nobody, until a question comes: what sympy and torch do once in a
    process is then done.
    """
    for _ in _answers_or_failure(Design()):
        if pipe.poll():
            return


def _answers_or_failure(design: Design) -> Iterator[Answer]:
    """Yield the answers; what no one has foreseen is said on the page and ends nothing."""
    try:
        yield from answers(design)
    except Exception as error:
        reason = f"these formulas made {type(error).__name__}: {error}; write them another way"
        yield Refused({"statistic": reason})


class Calculator:
    """Answers questions about designs, the newest first; one at a time.

    A question that an older one keeps waiting goes to a second process, and the first is stopped.
    """

    def __init__(self) -> None:
        self._job, self._spare = Job(answer_questions), Job(answer_questions)
        self._number = 0
        self._design = Design()
        self._asked = 0.0
        self._taken = self._ended = True

    def ask(self, design: Design) -> None:
        """Ask about a design; what was asked before is no longer answered."""
        self._number += 1
        self._design, self._asked = design, time.monotonic()
        self._taken = self._ended = False
        self._job.pipe.send((self._number, design))

    @property
    def waiting(self) -> float:
        """How many seconds the newest question has waited for its last part; 0 at its end."""
        if self._ended:
            return 0.0
        return time.monotonic() - self._asked

    def poll(self) -> list[Answer]:
        """Return the parts of the newest answer that came since the last call.

        Raises:
            FlowspaceError: if the answer takes longer than `TIME_LIMIT`.
        """
        found = []
        for number, answer in self._job.poll():
            if number != self._number:
                continue
            self._taken = True
            if isinstance(answer, Ended):
                self._ended = True
            elif answer is not None:
                found.append(answer)
        if not self._taken and self.waiting > GRACE:
            self._replace()
            self._taken = True
            self._job.pipe.send((self._number, self._design))
        if self.waiting > TIME_LIMIT or (not self._job.running and not self._ended):
            self._replace()
            self._ended = True
            raise FlowspaceError(
                f"got formulas whose algebra takes longer than {TIME_LIMIT:g} seconds; write "
                "shorter ones, or use the library with callables"
            )
        return found

    def stop(self) -> None:
        """End both processes."""
        self._job.stop()
        self._spare.stop()

    def _replace(self) -> None:
        """Stop the process that is busy, and put the second one in its place."""
        self._job.stop()
        self._job, self._spare = self._spare, Job(answer_questions)


def warm_up() -> None:
    """Import what the processes need, before the first of them is asked for."""
    Job(send_all, tuple).poll()
