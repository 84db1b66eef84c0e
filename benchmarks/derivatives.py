"""What D_t f costs by each route: ``python benchmarks/derivatives.py`` prints the tables of the
docs.

Per route and setting: a whole training step and its peak memory over a plain regression step of
the same network, the derivative over a forward pass, and the largest error against float64 forward
mode. The jobs run in turn, in one process; a ratio is the median of the rounds' ratios, with their
quartiles behind it: what differs by less is not told apart. Times are of the CPU where there is
one thread, which neighbours on a shared machine disturb least; memory is the growth over what the
process held before its first step, in a fresh process each. ``--plot FILE`` draws cost against
tokens. On a machine with a GPU the same command runs there. ``--compiled`` prints what the routes
cost on compiled networks instead (`compiled.py`).
"""

import argparse
import copy
import importlib.util
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import CHANNELS, DEVICE, TimmViT, clock, finish, growth, number, spread
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowspace import CrossFlowLoss, FiniteDifference, ForwardMode, SharedPrimal, TimePairs
from flowspace.demo.networks import SmallViT, ViTSize
from flowspace.demo.page import markdown_table, png, write_beside
from flowspace.derivatives import Derivative

HEAD = (
    "route",
    "step / plain step",
    "derivative / forward pass",
    "peak memory / plain step",
    "largest error",
)


@dataclass(frozen=True)
class WithGradients(Derivative):
    """What public ports do: torch.func.jvp of the whole batch with gradients on, the tangent
    detached.
    """

    fused: bool = False

    def evaluate(
        self,
        fn: Callable[..., Tensor],
        primals: Sequence[Any],
        tangents: Sequence[Any],
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return value and derivative, of every row."""
        z, t, *rest = primals
        v, one, *_ = tangents

        def of_state(z: Tensor, t: Tensor) -> Tensor:
            return fn(z, t, *rest)

        attention: Any = nullcontext()
        if not self.fused:
            attention = sdpa_kernel(SDPBackend.MATH)
        with attention:
            value, slope = torch.func.jvp(of_state, (z, t), (v, one))
        return value, slope.detach()


ROUTES: dict[str, Derivative] = {
    "SharedPrimal": SharedPrimal(),
    "ForwardMode": ForwardMode(),
    "FiniteDifference(order=1)": FiniteDifference(order=1),
    "FiniteDifference(order=2)": FiniteDifference(order=2),
    "torch.func.jvp with gradients": WithGradients(),
    "the same, attention fused": WithGradients(fused=True),
}


@dataclass(frozen=True)
class Setting:
    """One network and batch.

    Attributes:
        network: ``adaLN ViT`` (of the digits demo), ``timm ViT`` (unmodified, times added to its
            input) or ``timm ViT-S``.
        width: of the tokens.
        depth: blocks.
        tokens: a square number.
        batch: rows.
        equal: the share of rows with s = t, which need no derivative.
        dtype: ``float32``, or ``bfloat16`` for autocast.
    """

    network: str = "adaLN ViT"
    width: int = 192
    depth: int = 6
    tokens: int = 64
    batch: int = 16
    equal: float = 0.5
    dtype: str = "float32"

    @property
    def side(self) -> int:
        """Cells a side of the latents."""
        return int(self.tokens**0.5)

    def autocast(self) -> torch.autocast:
        """Return the context in which the network is called."""
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def build(self) -> nn.Module:
        """Return the network, from latents ``(B, 16, side, side)`` to latents."""
        side = self.side
        torch.manual_seed(0)
        if self.network == "adaLN ViT":
            size = ViTSize(self.width, self.depth, self.width // 64)
            net: nn.Module = SmallViT(CHANNELS, side, outputs=CHANNELS, size=size)
        else:
            net = TimmViT(side, self.width, self.depth)
        for parameter in net.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return net.to(DEVICE)

    def jobs(
        self, network: nn.Module, routes: dict[str, Derivative]
    ) -> dict[str, Callable[[], Any]]:
        """Return a step by each route, after a plain regression step and a forward pass."""
        rows, side = self.batch, self.side
        latents = torch.randn(rows, CHANNELS, side, side, device=DEVICE)
        cond = {"labels": torch.zeros(rows, dtype=torch.long, device=DEVICE)}

        def forward() -> None:
            with torch.no_grad(), self.autocast():
                t = torch.rand(rows, device=DEVICE)
                network(latents, t, t, **cond)

        def plain() -> None:
            t = torch.rand(rows, device=DEVICE)
            noise = torch.randn_like(latents)
            with self.autocast():
                out = network(latents + noise, t, t, **cond)
            error = out - latents
            error.square().mean().backward()

        def step(objective: CrossFlowLoss) -> None:
            with self.autocast():
                out = objective(network, latents, cond=cond)
            out.loss.mean().backward()

        jobs: dict[str, Callable[[], Any]] = {"forward": forward, "plain": plain}
        for name, route in routes.items():
            pairs = TimePairs(equal=self.equal)
            objective = CrossFlowLoss(derivative=route, times=pairs)
            jobs[name] = partial(step, objective)
        return jobs


def times(setting: Setting, rounds: int) -> dict[str, list[float] | str]:
    """Return the seconds of each job in each round, run in turn; or what it raises."""
    jobs = setting.jobs(setting.build(), ROUTES)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    failed: dict[str, str] = {}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            if name in failed:
                continue
            start = clock()
            try:
                job()
            except (RuntimeError, NotImplementedError) as error:
                failed[name] = f"raises {type(error).__name__}"
            finish()
            taken = clock() - start
            seconds[name].append(taken)
    found: dict[str, list[float] | str] = {}
    for name, (_, *counted) in seconds.items():
        found[name] = failed.get(name, counted)
    return found


def peak(setting: Setting, name: str) -> float:
    """Return the peak memory of one step, in bytes, over what was held before: run in a process of
    its own.

    Of a batch four times as large, up to 4,096 tokens in all, so that what the libraries allocate
    for themselves does not show.
    """
    rows_of_4096_tokens = max(setting.batch, 4096 // setting.tokens)
    large = replace(setting, batch=min(4 * setting.batch, rows_of_4096_tokens))
    routes = {route: ROUTES[route] for route in ROUTES if route == name}
    job = large.jobs(large.build(), routes)[name]
    if DEVICE.type == "cpu":
        small = replace(setting, tokens=4, batch=4)
        small.jobs(small.build(), routes)[name]()
    return growth(job)


def peaks(setting: Setting, names: Sequence[str]) -> dict[str, float]:
    """Return the peak memory of each job over the plain step's, each in a fresh process."""
    found = {}
    told = json.dumps(asdict(setting))
    for name in names:
        command = [sys.executable, __file__, "--peak", name, "--setting", told]
        done = subprocess.run(command, capture_output=True, text=True)
        found[name] = math.nan
        if done.returncode == 0:
            found[name] = float(done.stdout.split()[-1])
    return {name: value / found["plain"] for name, value in found.items()}


def errors(setting: Setting) -> dict[str, float]:
    """Return the largest error of each route over the largest entry of the derivative, against
    float64 forward mode.
    """
    network = setting.build()
    rows = min(setting.batch, 4)
    shape = (rows, CHANNELS, setting.side, setting.side)
    z = torch.randn(shape, device=DEVICE)
    v = torch.randn(shape, device=DEVICE)
    t = torch.linspace(0.2, 0.9, rows, device=DEVICE)
    labels = torch.zeros(rows, dtype=torch.long, device=DEVICE)

    def derivative(route: Derivative, net: nn.Module, dtype: torch.dtype) -> Tensor:
        def of_state(z: Tensor, t: Tensor) -> Tensor:
            return net(z, t, 0.5 * t, labels=labels)

        times = t.to(dtype)
        primals = (z.to(dtype), times)
        tangents = (v.to(dtype), torch.ones_like(times))
        _, slope = route(of_state, primals, tangents)
        return slope

    double = copy.deepcopy(network).double()
    exact = derivative(ForwardMode(), double, torch.float64)
    found = {}
    for name, route in ROUTES.items():
        try:
            with setting.autocast():
                slope = derivative(route, network, torch.float32)
            error = slope - exact
            found[name] = float(error.abs().max() / exact.abs().max())
        except (RuntimeError, NotImplementedError):
            found[name] = math.nan
    return found


def table(setting: Setting, rounds: int, memory: bool) -> tuple[str, dict[str, float]]:
    """Measure one setting; return its Markdown table and the steps over a plain step of the routes
    that ran.
    """
    seconds = times(setting, rounds)
    wrong = errors(setting)
    more = {}
    if memory:
        more = peaks(setting, ["plain", *ROUTES])
    base, forward = seconds["plain"], seconds["forward"]
    rows, ratio = [], {}
    for name in ROUTES:
        took = seconds[name]
        if isinstance(took, str):
            rows.append((name, took, "", "", ""))
            continue
        if isinstance(base, str) or isinstance(forward, str):
            rows.append((name, "", "", "", ""))
            continue
        steps = [t / b for t, b in zip(took, base, strict=True)]
        passes = [(t - b) / f for t, b, f in zip(took, base, forward, strict=True)]
        ratio[name] = statistics.median(steps)
        row = (
            name,
            spread(steps),
            f"{statistics.median(passes):.2f}",
            number(more.get(name, math.nan), ".2f"),
            number(wrong[name], ".0e"),
        )
        rows.append(row)
    return markdown_table(HEAD, rows), ratio


def title(s: Setting) -> str:
    """Return one line that says what was measured."""
    network = f"{s.network}, width {s.width}, {s.depth} blocks"
    return (
        f"{network}, {s.tokens} tokens, batch {s.batch}, "
        f"{s.equal:.0%} of the rows on the diagonal, {s.dtype}"
    )


def settings(tokens: Sequence[int], network: str, equal: Sequence[float]) -> list[Setting]:
    """Return what the docs show: shares of s = t, widths, dtypes, timm's networks where timm is
    installed, and tokens.
    """
    shares = (0.0, 0.5, 0.75)
    found = [Setting(equal=equal) for equal in shares]
    if importlib.util.find_spec("timm"):
        found += [Setting("timm ViT", equal=equal) for equal in shares]
        found += [Setting("timm ViT-S", 384, 12, equal=equal) for equal in shares]
    found += [Setting(width=384), Setting(dtype="bfloat16")]
    for count in tokens:
        if count == 64:
            continue
        batch = max(2, 1024 // count)
        found += [Setting(network, tokens=count, batch=batch, equal=share) for share in equal]
    return found


def plot(points: dict[int, dict[str, float]]) -> bytes:
    """Draw the cost of a step against the number of tokens; return a PNG."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    counts = sorted(points)
    for name in ROUTES:
        ran = [count for count in counts if name in points[count]]
        if ran:
            costs = [points[count][name] for count in ran]
            axes.plot(ran, costs, marker="o", label=name)
    axes.set(xscale="log", xlabel="tokens", ylabel="training step / plain step", ylim=(1, None))
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return png(figure)


def measure_compiled(arguments: argparse.Namespace) -> None:
    """Print the tables of compiled networks."""
    import compiled

    options = compiled.Options(
        rounds=arguments.rounds,
        only=arguments.only,
        memory=not arguments.no_memory,
        compile_time=not arguments.no_compile_time,
        rivals=arguments.rivals,
    )
    compiled.report(options)


def arguments_of_command() -> argparse.Namespace:
    """Return what the command was given."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--tokens", type=int, nargs="*", default=[64, 256, 1024, 4096])
    add(
        "--network",
        default="adaLN ViT",
        help="of the settings with other than 64 tokens, or timm ViT",
    )
    add(
        "--equal",
        type=float,
        nargs="*",
        default=[0.5],
        help="their shares of rows on the diagonal",
    )
    add("--routes", nargs="*", default=list(ROUTES), choices=list(ROUTES))
    add("--rounds", type=int, default=9)
    add("--compiled", action="store_true", help="compiled networks, one thread")
    add("--rivals", action="store_true", help="with what is usual, compiled (slow)")
    add("--no-compile-time", action="store_true", help="let torch use its caches")
    add("--threads", type=int, default=1)
    add("--only", default="", help="measure the settings whose title contains this")
    add(
        "--no-memory",
        action="store_true",
        help="skip the peak memory, which starts a process each",
    )
    add("--plot", type=Path)
    add("--peak", help=argparse.SUPPRESS)
    add("--setting", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Print the tables."""
    arguments = arguments_of_command()
    torch.set_num_threads(arguments.threads)
    if arguments.compiled:
        measure_compiled(arguments)
        return
    if arguments.peak:
        setting = Setting(**json.loads(arguments.setting))
        print(peak(setting, arguments.peak))
        return
    for name in set(ROUTES) - set(arguments.routes):
        del ROUTES[name]
    device = f"CPU, {arguments.threads} thread(s)"
    if DEVICE.type == "cuda":
        device = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {device}\n")
    points = {}
    for setting in settings(arguments.tokens, arguments.network, arguments.equal):
        if arguments.only not in title(setting):
            continue
        size = max(64, setting.tokens * setting.width // 192)
        rounds = max(2, arguments.rounds * 64 // size)
        text, ratio = table(setting, rounds, not arguments.no_memory)
        print(f"{title(setting)}:\n\n{text}\n", flush=True)
        if setting == Setting(arguments.network, tokens=setting.tokens, batch=setting.batch):
            points[setting.tokens] = ratio
    if arguments.plot:
        write_beside(arguments.plot, plot(points))


if __name__ == "__main__":
    main()
