"""What one sees of a run: sheets of samples while it trains, and its page at the end."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import build
import journal
import torch
from settings import Config
from torch import Tensor, nn

from flowspace import RunError
from flowspace.demo import page
from flowspace.vision.card import model_card
from flowspace.vision.data import Images
from flowspace.vision.encoders import LatentEncoder
from flowspace.vision.evaluate import Plan, Scores, features_of, judge, rounded
from flowspace.vision.generator import CrossFlowGenerator

SHOWN = 8
"""Samples of a class in a picture, of at most so many classes."""

WATCHED = 400
"""Samples that are scored while it trains: enough for a trend, too few for a number to report."""

MOST_SHEETS = 4
"""Sheets over training that a page shows: the first, the last and some between."""

SHOWN_TIMES = (0.02, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Times whose one-step images of noisy latents are shown."""

FEW_PASSES = 10
"""Passes over the pictures below which a page says that nothing is trained to its end."""

sheet = page.sheet


def keep_config(config: Config) -> None:
    """Write ``config.json`` into the folder of a run."""
    page.write_beside(config.out / "config.json", json.dumps(config.as_dict(), indent=2) + "\n")


@dataclass
class Look:
    """Draws a sheet of samples of the averaged network, and scores a few.

    Args:
        config: of the run.
        images: real ones, by which they are scored.
        encoder: whose decoder takes latents to images.
        device: where samples are drawn.
    """

    config: Config
    images: Images
    encoder: LatentEncoder
    device: torch.device

    def was(self, step: int) -> bool:
        """Whether a step was looked at before."""
        return self.path(step).exists()

    def path(self, step: int) -> Path:
        """Return where the sheet of a step is left."""
        return self.config.out / "generator" / f"sheet-{step:07d}.png"

    def __call__(self, step: int, averaged: nn.Module) -> Mapping[str, float]:
        """Leave ``sheet-STEP.png`` and return the scores, where the judge is at hand."""
        c, classes = self.config, len(self.images.names)
        plan = Plan(
            WATCHED,
            classes,
            (c.generator.channels, c.generator.grid, c.generator.grid),
            batch=c.evaluation.batch,
        )
        draw = build.sampler_of(c, averaged, self.encoder)
        samples = build.drawn(plan, draw, self.device)
        page.write_beside(self.path(step), sheet(samples, classes))
        if c.evaluation.extractor == "inception":
            return {}  # compare.py and evaluate.py judge by it, once the run is finished
        extractor = build.extractor_of(c, self.device)
        features = features_of(extractor, samples.split(plan.batch))
        scores = judge(extractor, features, build.reference_of(c, extractor, self.images))
        return scores.values | {"score": scores.kid}


# --- the page ----------------------------------------------------------------------------------


def write(config: Config) -> Path:
    """Write ``report.html``: what was trained, its samples beside real pictures, its curves."""
    images = build.images_of(config)
    log = journal.latest(config.out / "generator")
    parts: list[Any] = [summary(config, images, log)]
    passes = passes_done(config, images, log)
    if passes < FEW_PASSES:
        parts.append(
            f"Each picture was seen {passes:.1f} times: everything ran, and nothing is trained to "
            "its end. Samples are blots until the network has seen its pictures many more times."
        )
    parts += [scores_of(config), "Samples of each class (right) beside training pictures (left):"]
    parts.append(beside(config, images))
    parts += ["Samples over training, at steps " + ", ".join(steps_shown(config)) + ":"]
    parts += [path.read_bytes() for path in sheets(config)]
    parts += ["Losses, and scores of a few samples, over training:", page.losses(log)]
    if any(record.get("watch") for record in log):
        parts.append(page.scores(log))
    parts += ["Norms of each term's gradient at the prediction, by t (the paper's figure 7):"]
    parts.append(page.slopes(log))
    if config.generator.space == "image":
        parts += by_time(config, images)
    parts += [commands(config)]
    path = config.out / "report.html"
    page.write_beside(path, page.page(config.name, parts))
    return path


def summary(config: Config, images: Images, log: list[dict[str, Any]]) -> Any:
    """Return a table of what was trained, on what, and for how long."""
    c, t = config, config.training
    steps = [record for record in log if "loss" in record]
    seconds = sum(record.get("seconds", 0.0) for record in steps)
    rows = [
        ("pictures", f"{images.report()}, {c.data.size} pixels"),
        ("encoder", c.encoder.name or "trained on the spot"),
        ("objective", objective_line(c)),
        ("perceptual", ", ".join(term.network for term in c.perceptual) or "none"),
        ("adversarial", c.adversarial.network if c.adversarial else "none"),
        ("optimiser", f"{t.optimizer}, {steps_done(steps)} steps of {t.batch}"),
        ("time", f"{seconds / 60:.1f} minutes of training logged"),
    ]
    return ("what", "value"), rows


def objective_line(config: Config) -> str:
    """Return what the objective is in a few words."""
    o = config.objective
    kind = o.kind
    if o.literal:
        kind += ", the paper's literal form"
    if o.estimated:
        kind += ", estimated velocity"
    return f"{kind}; alpha = {o.alpha}, beta = {o.beta}"


def passes_done(config: Config, images: Images, log: list[dict[str, Any]]) -> float:
    """Return how often each picture was seen."""
    steps = [record for record in log if "loss" in record]
    return steps_done(steps) * config.training.batch / len(images)


def steps_done(steps: list[dict[str, Any]]) -> int:
    """Return how many steps a log tells of."""
    if not steps:
        return 0
    return steps[-1]["step"] + 1


def scores_of(config: Config) -> Any:
    """Return the scores as a table, or a sentence where the run was not judged."""
    path = config.out / "metrics.json"
    if not path.is_file():
        return f"Not judged yet: python examples/imagenet/evaluate.py {config.out}"
    found = json.loads(path.read_text())
    rows = [(name, f"{value:.4g}") for name, value in found["values"].items()]
    return (f"{found['count']} samples, {found['extractor']}", "value"), rows


def sheets(config: Config) -> list[Path]:
    """Return the sheets of samples that the page shows."""
    paths = sorted((config.out / "generator").glob("sheet-*.png"))
    if len(paths) <= MOST_SHEETS:
        return paths
    places = [round(i * (len(paths) - 1) / (MOST_SHEETS - 1)) for i in range(MOST_SHEETS)]
    return [paths[place] for place in places]


def steps_shown(config: Config) -> list[str]:
    """Return the steps of the sheets."""
    return [str(int(path.stem.split("-")[1])) for path in sheets(config)]


def beside(config: Config, images: Images) -> bytes:
    """Return real pictures and samples side by side, a row a class under its name."""
    import ship

    generator = ship.generator_of_run(config).eval()
    classes = generator.config["classes"]
    draw = build.sampler_of(config, generator, ship.needed_encoder(config, torch.device("cpu")))
    plan = ship.plan_of(config, generator, SHOWN * classes)
    rows = {}
    for label in range(min(SHOWN, classes)):
        made = []
        for number in range(label, plan.count, classes):
            made.append(rounded(draw(*plan.inputs(number, number + 1)))[0])
        rows[images.names[label]] = torch.stack([*real_pictures(images, label), *made])
    return class_rows(rows)


def class_rows(rows: Mapping[str, Tensor]) -> bytes:
    """Return a PNG of rows of uint8 pictures, each beside its name."""
    from matplotlib import pyplot as plt
    from torchvision.utils import make_grid

    figure, axes = plt.subplots(
        len(rows), figsize=(9, 0.62 * len(rows)), squeeze=False, layout="constrained"
    )
    for axis, (name, pictures) in zip(axes.flat, rows.items(), strict=True):
        strip = make_grid(pictures, len(pictures), padding=2, pad_value=255)
        axis.imshow(strip.permute(1, 2, 0))
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    return page.png(figure)


@torch.no_grad()
def by_time(config: Config, images: Images) -> list[str | bytes]:
    """Return what the generator makes of noisy latents of real pictures, a row a time.

    Nothing, where the encoder is not on this machine.

    Near t = 0 it should return the picture; a discriminator that weighs these rows as it does the
    others makes them collapse (the paper's figure 6).
    """
    import ship
    import stage_one

    generator = ship.generator_of_run(config).eval()
    try:
        encoder = stage_one.loaded(config)
    except RunError:
        return []
    numbers = [round(i * (len(images) - 1) / (SHOWN - 1)) for i in range(SHOWN)]
    pixels = torch.stack([images.row(number)[0] for number in numbers])
    labels = torch.tensor([images.labels[number] for number in numbers])
    latents = encoder.encode(build.in_range(pixels))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    schedule = build.schedule_of(config)
    rows = {"real": pixels}
    for time in SHOWN_TIMES:
        t = torch.full((SHOWN,), time)
        state = schedule.perturb(latents, noise, t)[0]
        rows[f"t = {time:g}"] = rounded(generator(state, t, 0 * t, labels=labels))
    text = "One-step images of noisy latents of real pictures, by t (the paper's figure 6):"
    return [text, class_rows(rows)]


def real_pictures(images: Images, label: int) -> list[Tensor]:
    """Return the first pictures of a class, uint8, and white ones where there are too few."""
    numbers = [number for number, own in enumerate(images.labels) if own == label][:SHOWN]
    rows = [images.row(number)[0] for number in numbers]
    white = torch.full((3, images.size, images.size), 255, dtype=torch.uint8)
    return rows + [white] * (SHOWN - len(rows))


def commands(config: Config) -> str:
    """Return what to do next."""
    return (
        f"Next: python examples/imagenet/sample.py {config.out} --labels 0 1 2; "
        f"python examples/imagenet/evaluate.py {config.out} --averages; longer: the same command "
        "with training.steps=MORE; on the hub: CrossFlowPipeline.from_pretrained("
        f"'{config.out / 'pipeline'}').push_to_hub('NAME')."
    )


def card(
    config: Config,
    generator: CrossFlowGenerator,
    average: float | None,
    scores: Scores | None = None,
) -> str:
    """Return the model card, with scores once there are some."""
    t = config.training
    training = {
        "pictures": f"{config.data.path}, {config.data.size} pixels",
        "encoder": config.encoder.name or "trained on the spot",
        "objective": objective_line(config),
        "perceptual": ", ".join(term.network for term in config.perceptual) or "none",
        "adversarial": config.adversarial.network if config.adversarial else "none",
        "optimiser": f"{t.optimizer}, batches of {t.batch}, rate {t.learning_rate}, average "
        f"{t.emas[0] if average is None else average}",
    }
    judged = None
    if scores:
        judged = {f"{name}, {scores.count} samples": v for name, v in scores.values.items()}
    o = config.objective
    return model_card(config.name, generator, o.alpha, o.beta, training, judged)
