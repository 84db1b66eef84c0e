"""What one sees of a run: sheets of samples while it trains, and its page at the end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import build
import journal
import judging
import page
import torch
from page import Sheets
from pictures import in_range, stacked
from settings import ImageNetConfig
from torch import Tensor, nn

from flowspace import RunError
from flowspace.vision.card import model_card
from flowspace.vision.data import Images
from flowspace.vision.encoders import LatentEncoder
from flowspace.vision.evaluate import Scores, features_of, judge, nearest, rounded
from flowspace.vision.generator import CrossFlowGenerator

WATCHED = 400
"""Samples that are scored while it trains: enough for a trend, too few for a number to report."""

MOST_COMPARED = 10_000
"""Pictures of a set up to which the one nearest to each sample is looked for."""

SHOWN_TIMES = (0.02, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Times whose one-step images of noisy latents are shown."""


def look_of(
    config: ImageNetConfig, images: Images, encoder: LatentEncoder, device: torch.device
) -> Sheets:
    """Return what draws a sheet of samples of the averaged network, and scores a few.

    Args:
        config: of the run.
        images: real ones, by which they are scored.
        encoder: whose decoder takes latents to images.
        device: where samples are drawn.
    """
    g = config.generator
    e = config.evaluation
    classes = len(images.names)
    shape = (g.channels, g.grid, g.grid)
    plan = judging.plan_of(config, classes, shape, WATCHED)

    def draw(averaged: nn.Module) -> Tensor:
        sample = build.sampler_of(config, averaged, encoder)
        return judging.drawn(plan, sample, device)

    def score(samples: Tensor) -> Mapping[str, float]:
        extractor = judging.extractor_of(config, device)
        features = features_of(extractor, samples.split(plan.batch))
        real = judging.reference_of(config, extractor, images)
        scores = judge(extractor, features, real)
        return scores.values | {"score": scores.kid}

    if e.extractor == "inception":  # compare.py and evaluate.py judge by it, once it is finished
        return Sheets(config.out / "generator", classes, draw)
    return Sheets(config.out / "generator", classes, draw, score)


# --- the page ----------------------------------------------------------------------------------


def write(config: ImageNetConfig) -> Path:
    """Write ``report.html``: what was trained, its samples beside real pictures, its curves."""
    images = build.images_of(config)
    log = journal.latest(config.out / "generator")
    command = f"python examples/imagenet/evaluate.py {config.out}"
    samples = samples_of(config)
    parts: list[Any] = [
        summary(config, images, log),
        *page.unfinished(config, len(images), log),
        *page.scores_tables(config.out, command),
        "Samples of each class (right) beside training pictures (left):",
        page.beside(samples, images),
        *nearest_pictures(samples, images),
        *page.sheets_over_training(config.out / "generator"),
        *page.curves(log),
    ]
    if config.generator.space == "image":
        parts += by_time(config, images)
    first = journal.latest(config.out / "encoder" / "training")
    parts += [commands(config, len(images.names)), page.provenance([*first, *log])]
    parts += [page.settings_table(config.as_dict())]
    return page.write(config.out / "report.html", config.name, parts)


def summary(config: ImageNetConfig, images: Images, log: list[dict[str, Any]]) -> Any:
    """Return a table of what was trained, and on what."""
    c = config
    t = config.training
    steps = page.steps_done(log)
    rows = [
        ("pictures", f"{images.report()}, {c.data.size} pixels"),
        ("encoder", encoder_line(c)),
        ("objective", objective_line(c)),
        *image_losses(c).items(),
        ("optimiser", f"{t.optimizer}, {steps} steps of {t.batch}"),
    ]
    return ("what", "value"), rows


def image_losses(config: ImageNetConfig) -> dict[str, str]:
    """Return the networks of the image losses, by the kind of loss."""
    perceptual = [term.network for term in config.perceptual]
    adversarial = "none"
    if config.adversarial:
        adversarial = config.adversarial.network
    return {"perceptual": ", ".join(perceptual) or "none", "adversarial": adversarial}


def encoder_line(config: ImageNetConfig) -> str:
    """Return which encoder it is in a few words."""
    e = config.encoder
    if e.stage_one is None:
        return str(e.name)
    if e.stage_one.linear:
        return "linear, in closed form from these pictures"
    return "trained on the spot"


def objective_line(config: ImageNetConfig) -> str:
    """Return what the objective is in a few words."""
    o = config.objective
    kind = o.kind
    if o.literal:
        kind += ", the paper's literal form"
    if o.estimated:
        kind += ", estimated velocity"
    return f"{kind}; alpha = {o.alpha}, beta = {o.beta}"


def samples_of(config: ImageNetConfig) -> list[Tensor]:
    """Return a few samples of each of the first classes, uint8 ``(SHOWN, 3, size, size)``."""
    import ship

    generator = ship.generator_of_run(config).eval()
    classes = generator.config["classes"]
    encoder = ship.needed_encoder(config, torch.device("cpu"))
    draw = build.sampler_of(config, generator, encoder)
    plan = ship.plan_of(config, generator, page.SHOWN * classes)
    found = []
    for label in range(min(page.SHOWN, classes)):
        made = []
        for number in range(label, plan.count, classes):
            noise, labels = plan.inputs(number, number + 1)
            (image,) = rounded(draw(noise, labels))
            made.append(image)
        found.append(torch.stack(made))
    return found


def nearest_pictures(samples: list[Tensor], images: Images) -> list[str | bytes]:
    """Return each sample with its nearest training picture, and how many are copies of it.

    Nothing for a set of more than `MOST_COMPARED` pictures, all of which would be read.
    """
    if not 2 <= len(images) <= MOST_COMPARED:
        return []
    training = stacked(images, range(len(images)))
    made = torch.cat(samples)
    found = nearest(made, training)
    pairs = torch.cat([made, training[found.index]], 3)
    rows = {}
    for label, row in enumerate(pairs.split(page.SHOWN)):
        rows[images.names[label]] = row
    distance = float(found.distance.median())
    apart = float(found.apart.median())
    text = (
        "Each sample (left) with the training picture nearest to it (right), by its pixels. "
        f"{found.share:.0%} of these samples are nearer to one "
        "than it is to any other training picture: copies are, and so are blots. "
        f"The median distance is {distance:.3f}; "
        f"of these pictures from others it is {apart:.3f}."
    )
    return [text, page.class_rows(rows)]


@torch.no_grad()
def by_time(config: ImageNetConfig, images: Images) -> list[str | bytes]:
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
    numbers = page.spread(page.SHOWN, len(images))
    shown = [images.row(number) for number in numbers]
    pictures, classes = zip(*shown, strict=True)
    pixels = torch.stack(pictures)
    labels = torch.tensor(classes)
    latents = encoder.encode(in_range(pixels))
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=source)
    schedule = build.schedule_of(config)
    rows = {"real": pixels}
    for time in SHOWN_TIMES:
        t = torch.full((page.SHOWN,), time)
        state, _ = schedule.perturb(latents, noise, t)
        made = generator(state, t, 0 * t, labels=labels)
        rows[f"t = {time:g}"] = rounded(made)
    text = "One-step images of noisy latents of real pictures, by t (the paper's figure 6):"
    return [text, page.class_rows(rows)]


def commands(config: ImageNetConfig, classes: int) -> str:
    """Return what to do next, of a generator of so many classes."""
    labels = " ".join(str(label) for label in range(min(3, classes)))
    found = [
        f"Next: python examples/imagenet/sample.py {config.out} --labels {labels}",
        f"python examples/imagenet/evaluate.py {config.out} --averages",
        "longer: the same command with training.steps=MORE",
    ]
    if config.generator.space == "image":  # elsewhere pipeline/ holds the generator alone
        folder = config.out / "pipeline"
        shipped = f"CrossFlowPipeline.from_pretrained('{folder}')"
        found.append(f"on the hub: {shipped}.push_to_hub('NAME')")
    return "; ".join(found) + "."


def card(
    config: ImageNetConfig,
    generator: CrossFlowGenerator,
    average: float | None,
    scores: Scores | None = None,
) -> str:
    """Return the model card, with scores once there are some."""
    t = config.training
    if average is None:
        average = t.emas[0]
    optimiser = f"{t.optimizer}, batches of {t.batch}, rate {t.learning_rate}"
    training = {
        "pictures": f"{config.data.path}, {config.data.size} pixels",
        "encoder": encoder_line(config),
        "objective": objective_line(config),
        **image_losses(config),
        "optimiser": f"{optimiser}, average {average}",
    }
    judged = None
    if scores:
        count = scores.count
        judged = {f"{name}, {count} samples": value for name, value in scores.values.items()}
    o = config.objective
    return model_card(config.name, generator, o.alpha, o.beta, training, judged)
