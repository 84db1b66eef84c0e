"""The paper's ablation: the full recipe, and what is left of it without its image losses."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flowspace.demo.page import markdown_table, page, write_beside
from flowspace.recipes.config import Config
from flowspace.recipes.imagenet.run import Run
from flowspace.vision.evaluate import Scores

__all__ = ["ABLATIONS", "ablate", "ablation_table"]

ABLATIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "without GAN": {"adversarial": None},
    "without perceptual": {"perceptual": ()},
    "without both": {"adversarial": None, "perceptual": ()},
}
"""What each arm leaves out."""


def ablate(config: Config) -> dict[str, Scores]:
    """Train and judge the full recipe, and without its image losses, on one encoder."""
    Run(config).encoder  # noqa: B018  # trained once, for all arms
    arms = {}
    for name, changes in ABLATIONS.items():
        arm = config
        if changes:
            encoder = replace(config.encoder, name=str(config.out / "encoder"), stage_one=None)
            encoder = encoder if config.encoder.stage_one else config.encoder
            arm = replace(
                config, **changes, encoder=encoder, out=config.out / name.replace(" ", "-")
            )
        run = Run(arm)
        run.train()
        arms[name] = run.evaluate()
    write_beside(
        config.out / "ablation.html", page(f"{config.name}: image losses", [_lines(arms)])
    )
    return arms


def ablation_table(arms: Mapping[str, Scores]) -> str:
    """Return the ablation as a Markdown table."""
    return markdown_table(*_lines(arms))


def _lines(arms: Mapping[str, Scores]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    names = tuple(next(iter(arms.values())).values)
    return ("recipe", *names), [
        (arm, *(f"{s.values[n]:.4g}" for n in names)) for arm, s in arms.items()
    ]
