"""Where the time of a step goes: a trace, and the share of each part of a step."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from flowspace.demo.page import write_beside

PARTS = ("data", "encoder", "flow", "perceptual", "adversarial", "backward", "optimiser")
"""The spans of a step, by the names they are recorded under.

``flow`` is the network with its derivative: one pass carries both. ``adversarial`` is the forward
pass of both players' losses.
"""

BESIDE = {"idle": "the card computes nothing", "utilisation": "of the card's peak"}
"""What is said below the parts where it is known, and in which words."""

KNOWN = ("H100", "H200")
"""Cards whose peak is known."""

span = record_function
"""Names a part of a step in a trace; costs microseconds where nothing is traced."""


class Profile:
    """Traces a few steps of a training, after some that are not counted; a context of each step.

    Args:
        folder: where ``trace.json`` and ``profile.json`` are left.
        accelerator: of the processes; the first one writes.
        utilisation: from the seconds of a step, and the number of the last one, to the share of a
            known card's peak that it reaches; None does not say.
        warmup: steps that are not counted: compiling, caches.
        active: steps that are.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Any,
        utilisation: Callable[[float, int], float] | None = None,
        warmup: int = 5,
        active: int = 20,
    ) -> None:
        self.folder = folder
        self.accelerator = accelerator
        self.utilisation = utilisation
        self.warmup = warmup
        self.active = active
        self.step = 0
        self.first = 0
        activities = [ProfilerActivity.CPU]
        if accelerator.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities)

    @property
    def steps(self) -> int:
        """How many steps are taken in all."""
        return self.warmup + self.active

    def __enter__(self) -> None:
        if self.step == self.warmup:
            self.profiler.start()
        self.step_span = record_function("step")
        self.step_span.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.accelerator.device.type == "cuda" and self.step >= self.warmup:
            torch.cuda.synchronize()
        self.step_span.__exit__(kind, error, trace)
        self.step += 1
        if self.step == self.steps and kind is None:
            self.profiler.stop()
            self.write()

    def write(self) -> None:
        """Leave the trace and the table, and print the table."""
        if not self.accelerator.is_main_process:
            return
        self.profiler.export_chrome_trace(str(self.folder / "trace.json"))
        events = list(self.profiler.key_averages())
        card = self.accelerator.device.type == "cuda"
        whole = on_host(events)["step"].cpu_time_total
        shares = shares_of(events, card)
        found: dict[str, Any] = {
            "device": name_of(self.accelerator.device),
            "milliseconds": whole / self.active / 1000,
            "shares": shares | {"other": 1 - sum(shares.values())},
        }
        if card:
            found["idle"] = max(0.0, 1 - busy_time(events) / whole)
        if self.utilisation and any(known in found["device"] for known in KNOWN):
            last = self.first + self.steps
            found["utilisation"] = self.utilisation(found["milliseconds"] / 1000, last)
        text = json.dumps(found, indent=2)
        write_beside(self.folder / "profile.json", text + "\n")
        print("\n".join(lines_of(found)))


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """Return what is printed of the content of ``profile.json``."""
    lines = [f"{found['milliseconds']:.1f} ms a step on {found['device']}; of them"]
    for part, share in found["shares"].items():
        lines.append(f"  {part:<12} {share:6.1%}")
    for name, words in BESIDE.items():
        if name in found:
            lines.append(f"{words}: {found[name]:.1%}")
    return lines


def on_host(events: Sequence[Any]) -> dict[str, Any]:
    """Return the events of the host by their names."""
    return {event.key: event for event in events if event.device_type == DeviceType.CPU}


def shares_of(events: Sequence[Any], card: bool) -> dict[str, float]:
    """Return the share of each part in the time of a step.

    On a card a part's time is its kernels'. The profiler gives a part those that its own thread
    started, and autograd has threads of its own: what they started is the backward pass's.

    Args:
        events: averages by name, as the profiler gives them.
        card: whether the steps ran on one.
    """
    host = on_host(events)
    whole = host["step"].cpu_time_total
    times = {}
    for part in PARTS:
        if part in host:
            times[part] = host[part].cpu_time_total
            if card:
                times[part] = host[part].device_time_total
    if card and "backward" in times:
        times["backward"] += max(0.0, busy_time(events) - host["step"].device_time_total)
    return {part: time / whole for part, time in times.items()}


def busy_time(events: Sequence[Any]) -> float:
    """Return the microseconds that the kernels of a card took."""
    busy = 0.0
    for event in events:
        kernel = event.device_type == DeviceType.CUDA
        if kernel and not event.is_user_annotation:
            busy += event.self_device_time_total
    return busy


def name_of(device: torch.device) -> str:
    """Return the name of a card, or of the kind of device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} thread(s)"
