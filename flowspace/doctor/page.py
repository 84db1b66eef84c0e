"""What a doctor found, as lines of text."""

from collections.abc import Iterable, Sequence

from flowspace.doctor.examination import Examination, RouteFigures
from flowspace.doctor.libraries import Library
from flowspace.doctor.machine import Machine
from flowspace.doctor.steps import StepCost

__all__ = ["machine_page", "model_page", "table"]

WIDTH = 12
"""Of the words that lines begin with."""

SMALL_STEP = 10.0
"""Milliseconds of a plain step, below which calls of functions take longer than their numbers."""


def machine_page(machine: Machine) -> str:
    """Return what a machine can do."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    attention = ", ".join(machine.attention) or "none"
    lines = [
        versions,
        _line("system", machine.system),
        _line("device", machine.device),
        _line("attention", f"these kernels run: {attention}"),
        _line("compile", machine.compiling),
        "",
    ]
    rows = []
    for extra, libraries in machine.extras.items():
        missing = [_wish(library) for library in libraries if not library.ready]
        state = "installed"
        if missing:
            state = "missing: " + ", ".join(missing)
        rows.append((extra, state))
    if machine.unknown:
        lines.append(_line("extras", machine.unknown))
    else:
        lines += table(("extra", "its libraries"), rows)
    missing_extras = machine.missing_extras()
    if missing_extras:
        lines += ["", f"To add some: pip install 'flowspace[{','.join(missing_extras)}]'"]
    lines += ["", "To examine a model of yours: flowspace doctor my_file:build"]
    return "\n".join(lines)


def _wish(library: Library) -> str:
    """Return a library, with the version that is needed where another one is there."""
    if library.version is None:
        return library.name
    return f"{library.name} {library.version} (needs {library.needed})"


def model_page(found: Examination) -> str:
    """Return what a model needs; the last line says what to write."""
    example, accuracy = found.example, found.accuracy
    batch = f"latents {tuple(example.latents.shape)}, images {tuple(example.images.shape)}"
    if example.cond:
        batch += f", cond {', '.join(example.cond)}"
    if example.remark:
        batch += f"; {example.remark}"
    lines = [
        _line("model", _model(found)),
        _line("batch", batch),
        _line("reference", accuracy.reference),
        "",
        *table(
            ("route", "error", "step / plain step", "both compiled"),
            [_route(route) for route in found.routes],
        ),
        "",
        *[_line("", text) for text in _failures(found.routes)],
        *_about(found),
        "",
        _advice(found),
    ]
    return "\n".join(lines)


def _model(found: Examination) -> str:
    example = found.example
    parameters = sum(p.numel() for module in example.modules() for p in module.parameters())
    kind = type(example.model).__name__
    latents = example.latents
    return (
        f"{example.name}: {kind}, {parameters:,} parameters, {latents.dtype} on {latents.device}"
    )


def _route(route: RouteFigures) -> tuple[str, str, str, str]:
    """Return a row of the table."""
    error = ""
    if route.error is not None:
        error = f"{route.error:.0e}"
    if route.failure:
        error = "refused"
    return route.name, error, _cost(route.eager), _cost(route.compiled)


def _cost(cost: StepCost | None) -> str:
    """Return a median with its quartiles."""
    if cost is None:
        return ""
    if cost.rounds < 3:
        return f"{cost.median:.2f}"
    return f"{cost.median:.2f} ({cost.low:.2f} to {cost.high:.2f})"


def _failures(routes: Iterable[RouteFigures]) -> list[str]:
    """Return each reason once, with the routes that gave it."""
    by_reason: dict[str, list[str]] = {}
    for route in routes:
        if route.failure:
            by_reason.setdefault(route.failure, []).append(route.name)
    return [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def _about(found: Examination) -> list[str]:
    """Return what is to be known of the model, a line each."""
    findings = found.accuracy.findings
    lines = []
    rows = "each stands for itself"
    if findings.rows_mix is None:
        rows = "one row, or none of its own: not known"
    elif findings.rows_mix:
        rows = "they mix: a row's output depends on the others, so all are differentiated"
    lines.append(_line("rows", rows))
    times = "the model uses t and s"
    if not findings.uses_t and not findings.uses_s:
        times = "the model uses neither t nor s: nothing tells it how noisy its input is"
    elif not findings.uses_t:
        times = "the model does not use t: nothing tells it how noisy its input is"
    elif not findings.uses_s:
        times = "the model does not use s: it can only learn one destination"
    lines.append(_line("times", times))
    if found.hidden:
        lines.append(
            _line(
                "hidden",
                "exact routes and differences disagree: a part of the model is detached, is not "
                "seen by torch, or is not smooth",
            )
        )
    lines += [_line("remark", text) for text in found.accuracy.remarks]
    if found.milliseconds is not None and found.milliseconds < SMALL_STEP:
        said = f"a plain step takes {found.milliseconds:.1f} ms: of so small a model the ratios"
        lines.append(_line("remark", f"{said} are mostly Python's; a larger one costs less"))
    lines += [_line("warning", text) for text in found.warned]
    if found.compiled:
        lines.append(_line("compiled", found.compiled))
    if found.over_eager is not None:
        lines.append(
            _line("compiled", f"a compiled plain step takes {found.over_eager:.2f} of a plain one")
        )
    return lines


def _advice(found: Examination) -> str:
    """Return the line that says what to write."""
    advised = found.advised
    if advised is None:
        return (
            "Write nothing yet: no route differentiates this model right. See the reasons above."
        )
    written = f"CrossFlowLoss(derivative={advised.name})"
    if advised.name == "SharedPrimal()":
        written = "CrossFlowLoss(), whose derivative is SharedPrimal() by default"
    if found.over_eager is not None and found.over_eager < 1:
        written += ", on torch.compile(model)"
    return f"Write: {written}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; its columns are as wide as they have to be."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _line(word: str, text: str) -> str:
    return f"{word:<{WIDTH}}{text}"
