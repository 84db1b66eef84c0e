"""What a generator or a config costs, beside what other methods cost; nothing is run.

    python examples/imagenet/costs.py crossflow-b             a size of the paper
    python examples/imagenet/costs.py CONFIG.yaml             also its encoder and image losses
    python examples/imagenet/costs.py FOLDER                  a line for each of its configs
    python examples/imagenet/costs.py mf-rae                  MF-RAE's own comparison, as it counts
    python examples/imagenet/costs.py --write README.md       its tables again, as printed today

Parameters and FLOPs are counted on meta tensors; memory and hours are estimates from them. Hours
assume a share of the card's peak, unless ``--run FOLDER`` names a run in which it was measured.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import rivals
from flops import IMAGENET, PEAK, Cost, alone, cost_of, generator_cost
from results import PAPER_CONFIGS, PUBLISHED, PublishedMethod, paper_row
from sections import SETS
from settings import GeneratorConfig, ImageNetConfig, SettingsError, load, of_run
from utilisation import NOT_RUN, Utilisation, measured

from flowspace.errors import FlowspaceError

__all__ = ["main", "report", "table", "with_tables"]

GIGA, GIB = 1e9, 2.0**30
PUBLISHED_SIZE = 256
"""Pixels a side of the images that the published numbers are of."""

# --- what is printed ---------------------------------------------------------------------------

ONE_IMAGE = ("one image", "million parameters", "GFLOPs", "GFLOPs, a multiply-add as one")
TRAINING = ("training", "estimate")
BESIDE = (
    "one image of 256 x 256",
    "kind",
    "evaluations",
    "million parameters",
    "GFLOPs",
    "GFLOPs, a multiply-add as one",
    "of which decoder",
    "published FID",
)

NOTE = """\
FLOPs are counted by torch on meta tensors, a multiply-add as two; papers mostly count it as one,
as the column beside does. Memory and hours are estimates from them. Memory holds weights,
gradients, averages and states of the optimisers in float32, and activations in bfloat16; it leaves
out the frozen networks and what the image losses keep. What others publish is table 1 of the
CrossFlow paper (arXiv 2606.19970) unless a source stands beside it. Their GFLOPs are counted here,
decoder included, where the network can be built here: DiT, MeanFlow and the decoders of diffusers'
modules, DiT^DH, pixel MeanFlow and CrossFlow of this library's."""


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; columns of numbers are aligned to the right."""
    rules = [rule(cells) for cells in zip(*rows, strict=True)]
    lines = (head, rules, *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rule(cells: Sequence[str]) -> str:
    """Return what stands between a column's head and its cells, and aligns them."""
    if any(re.search("[a-z]", cell) for cell in cells):
        return "---"
    return "---:"


def flops(count: float) -> tuple[str, str]:
    """Write FLOPs in both conventions, in units of 10^9."""
    return f"{count / GIGA:,.1f}", f"{count / 2 / GIGA:,.1f}"


def millions(parameters: int) -> str:
    """Write a number of parameters."""
    return f"{parameters / 1e6:.1f}"


def rounded(hours: float) -> str:
    """Write hours to the hour, or fewer than ten of them to two digits."""
    if hours < 10:
        return f"{hours:.2g}"
    return f"{hours:,.0f}"


def report(cost: Cost, utilisation: Utilisation, batch: int = 32, devices: int = 8) -> str:
    """Return the tables of one image, of the training, and of other methods.

    Args:
        cost: of a generator, alone or with its config's other networks.
        utilisation: of the device.
        batch: images on one device.
        devices: over which FSDP2 shares out the weights.
    """
    parts = [
        markdown(ONE_IMAGE, one_image(cost)),
        markdown(TRAINING, estimates(cost, utilisation, batch, devices)),
    ]
    if cost.size == PUBLISHED_SIZE:
        parts.append(markdown(BESIDE, beside(cost)))
    return "\n\n".join([*parts, NOTE])


def one_image(cost: Cost) -> list[tuple[str, ...]]:
    """Return what one image costs, part by part."""
    step = f"generator's step, {100 * cost.equal:.0f} % of the rows on s = t"
    rows = [
        ("forward", millions(cost.parameters), *flops(cost.forward)),
        (step, "", *flops(cost.generator_step)),
    ]
    for network in cost.networks:
        name = f"{network.name}, frozen"
        parameters = millions(network.parameters)
        rows.append((name, parameters, *flops(network.flops)))
    if cost.networks:
        rows.append(("whole step", "", *flops(cost.step)))
    return rows


def estimates(
    cost: Cost, utilisation: Utilisation, batch: int, devices: int
) -> list[tuple[str, str]]:
    """Return what the training takes."""
    whole, shared = cost.memory(batch), cost.memory(batch, devices)
    sharded = f"memory, FSDP2 over {devices}, {batch} images a device"
    epochs = cost.images / IMAGENET
    rows = [
        ("parameters that Muon trains", f"{millions(cost.matrices)} million"),
        (f"memory, DDP, {batch} images a device", f"{whole / GIB:.1f} GiB"),
        (sharded, f"{shared / GIB:.1f} GiB"),
        ("images", f"{cost.images:,.0f}, as {epochs:.3g} epochs of ImageNet have"),
    ]
    for training in cost.trainings:
        rows.append((f"{training.name}, in all", f"{training.flops:.2g} FLOPs"))
    hours = f"{rounded(cost.hours(utilisation.share))} at {PEAK / 1e12:.0f} TFLOP/s"
    if not cost.networks and not cost.trainings:
        hours += ", the generator alone"
    rows.append(("H100-hours", hours))
    rows.append(("utilisation", str(utilisation)))
    return rows


def beside(cost: Cost) -> list[tuple[str, ...]]:
    """Return the generator's line and the lines of the published methods."""
    decoder = ""
    if cost.decoder:
        decoder, _ = flops(cost.decoder)
    own = (
        f"{cost.name}, this code",
        cost.kind,
        f"{cost.evaluations}",
        millions(cost.parameters),
        *flops(cost.evaluations * cost.forward + cost.decoder),
        decoder,
        NOT_RUN,
    )
    return [own, *(published(method) for method in PUBLISHED)]


def published(method: PublishedMethod) -> tuple[str, ...]:
    """Return the line of a published method, counted where it can be."""
    evaluations = f"{method.steps}"
    if method.evaluations > 1:
        evaluations = f"{method.steps} x {method.evaluations}"
    fid = f"{method.fid:.2f}"
    if method.source:
        fid += f" ({method.source})"
    counts = ("", "", "")
    if method.name in rivals.RIVALS:
        counts = image_of(method)
    return (
        method.name,
        method.family,
        evaluations,
        f"{method.parameters or ''}",
        *counts,
        fid,
    )


@cache
def image_of(method: PublishedMethod) -> tuple[str, str, str]:
    """Return a method's GFLOPs an image in both conventions, and the decoder's of them."""
    rival = rivals.RIVALS[method.name]
    count = method.steps * method.evaluations * rival.network().total
    if rival.decoder is None:
        return (*flops(count), "")
    decoder = rival.decoder().total
    of_decoder, _ = flops(decoder)
    return (*flops(count + decoder), of_decoder)


# --- MF-RAE's comparison -----------------------------------------------------------------------

MF_RAE = "mf-rae"
AS_PUBLISHED = ("GFLOPs of one image", "counted here", "in the paper", "with attention, as two")

AS_PUBLISHED_NOTE = """\
Counted here as MF-RAE (arXiv 2511.13019) counts: a multiply-add as one, and attention's own
products left out, without which its numbers come out. The last column counts as the other tables
do: a multiply-add as two, all products. Both are of the networks' own modules on meta tensors."""


def comparison() -> str:
    """Return the GFLOPs that MF-RAE compares itself by, beside those of its text."""
    rows = []
    for line in rivals.comparison():
        counted, total = f"{line.as_published:,.1f}", f"{line.total:,.1f}"
        rows.append((line.name, counted, f"{line.published:,}", total))
    return f"{markdown(AS_PUBLISHED, rows)}\n\n{AS_PUBLISHED_NOTE}"


# --- the table of a folder ---------------------------------------------------------------------

CONFIGS = ("config", "what differs", "H100-hours", "FID here")
IN_THE_PAPER = ("FID in the paper", "its row there")


def table(folder: Path, utilisation: Utilisation) -> str:
    """Return a table with a line for each config of ImageNet in a folder.

    The paper's FIDs stand beside the paper's configs alone.

    Raises:
        SettingsError: if the folder holds no such config.
    """
    head = CONFIGS
    papers = folder.resolve() == PAPER_CONFIGS.resolve()
    if papers:
        head = (*CONFIGS, *IN_THE_PAPER)
    rows = []
    for path in sorted(folder.glob("*.yaml")):
        config = load(path)
        if config.data.path in SETS:
            continue
        hours = cost_of(config).hours(utilisation.share)
        row = [
            f"`{path.stem}`",
            first_sentence(path),
            rounded(hours),
            own_fid(config),
        ]
        if papers:
            row += in_the_paper(path)
        rows.append(row)
    if not rows:
        raise SettingsError(
            f"{folder} holds no configs of ImageNet; "
            "write a folder such as examples/imagenet/configs"
        )
    return f"{markdown(head, rows)}\n\nUtilisation: {utilisation}."


def first_sentence(path: Path) -> str:
    """Return the first sentence of the comment that a config begins with."""
    comment = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.strip("# "))
    return " ".join(comment).partition(". ")[0].rstrip(".")


def in_the_paper(path: Path) -> tuple[str, str]:
    """Return the FID that the paper has for one of its configs, and the row that has it."""
    row = paper_row(path)
    if row is None:
        return "", "no number in the text"
    return f"{row.fid:.2f}", f"{row.setting} ({row.table})"


def own_fid(config: ImageNetConfig) -> str:
    """Return the FID that a run of this config was judged with, if there is one."""
    try:
        run = of_run(config.out)
        text = (config.out / "metrics.json").read_text()
        scores = json.loads(text)
        fid = float(scores["values"]["FID"])
        count = int(scores["count"])
    except (OSError, ValueError, KeyError, TypeError):
        return NOT_RUN
    if network_and_losses(run) != network_and_losses(config):
        return NOT_RUN
    return f"{fid:.2f}, {count:,} samples"


def network_and_losses(config: ImageNetConfig) -> tuple[Any, ...]:
    """Return that in which a run and a config must agree for the run's FID to be the config's."""
    generator = replace(config.generator, compile=False, checkpointing=False)
    return generator, config.objective, config.perceptual, config.adversarial


TABLES = re.compile(
    r"(<!-- table: python examples/imagenet/costs\.py (.*?) -->\n).*?(<!-- end of table -->)",
    re.DOTALL,
)


def with_tables(page: str) -> str:
    """Return a page with the output of each command in place of what stands under it."""

    def printed(found: re.Match[str]) -> str:
        before, command, after = found.groups()
        text = output(parser().parse_args(command.split()))
        return f"{before}{text}\n{after}"

    return TABLES.sub(printed, page)


# --- the program -------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    usage = argparse.ArgumentParser(
        "costs.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = usage.add_argument
    add("of", nargs="?", help="a preset, a config's YAML file, their folder, or mf-rae")
    add("--equal", type=float, help="of a preset: the share of rows with s = t (default: 0.5)")
    add("--batch", type=int, default=32, help="images on one device (default: %(default)s)")
    add("--devices", type=int, default=8, help="that FSDP2 shards over (default: %(default)s)")
    add("--run", type=Path, help="the folder of a run that was profiled")
    add("--write", type=Path, help="a page whose tables are made again")
    return usage


def output(options: argparse.Namespace) -> str:
    """Return what a command line prints."""
    if options.of is None:
        raise SettingsError(
            "got no preset, no config and no folder; write one, such as crossflow-b"
        )
    if options.batch < 1 or options.devices < 1:
        raise SettingsError(
            f"got --batch {options.batch} --devices {options.devices}; write 1 or more of each"
        )
    if options.of == MF_RAE:
        return comparison()
    utilisation = Utilisation()
    if options.run is not None:
        utilisation = measured(options.run)
    path = Path(options.of)
    if path.is_dir():
        return table(path, utilisation)
    if path.suffix not in (".yaml", ".yml"):
        generator = GeneratorConfig(preset=options.of)
        cost = generator_cost(alone(generator, share_of(options)))
        return report(cost, utilisation, options.batch, options.devices)
    if options.equal is not None:
        raise SettingsError(
            f"got --equal beside {path}, which says objective.equal; leave --equal out"
        )
    cost = cost_of(load(path))
    text = report(cost, utilisation, options.batch, options.devices)
    row = paper_row(path)
    if row is None:
        return text
    return f"{text}\n\nIn the paper: {row.setting}, FID {row.fid:.2f} ({row.table}); {NOT_RUN}."


def share_of(options: argparse.Namespace) -> float:
    """Return the share of a preset's rows that have s = t."""
    if options.equal is None:
        return 0.5
    if not 0 <= options.equal <= 1:
        raise SettingsError(
            f"got --equal {options.equal}; it is a share of the rows, write one between 0 and 1"
        )
    return options.equal


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was asked for; returns 1 where it cannot be counted."""
    options = parser().parse_args(arguments)
    try:
        if options.write is None:
            print(output(options))
            return 0
        page = with_tables(options.write.read_text())
        options.write.write_text(page)
    except (FlowspaceError, SettingsError, OSError) as error:
        print(f"costs.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
