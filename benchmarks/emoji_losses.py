"""The paper's ablation of the two further losses, on emoji: ``python benchmarks/emoji_losses.py``.

examples/imagenet is run on configs/emoji.yaml with and without the perceptual and the adversarial
term of configs/smoke.yaml, for equal steps and several seeds, and judged by its own judge, which
has to rank pictures against spoilt ones first. A run that was stopped, or judged already, is
continued by the same command.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from small_pictures import pictures_of, samples_of
from verdicts import said

from flowspace.demo.page import markdown_table, mean_and_range, write_beside
from flowspace.vision.evaluate import nearest

ROOT = Path(__file__).parents[1]
IMAGENET = ROOT / "examples" / "imagenet"
CONFIGS = IMAGENET / "configs"

ARMS = {
    "without both": (),
    "perceptual": ("perceptual",),
    "GAN": ("adversarial",),
    "perceptual and GAN": ("perceptual", "adversarial"),
}
"""The sections of configs/smoke.yaml that each arm adds."""

HEAD = (
    "losses beside the regression",
    "Frechet distance",
    "KID",
    "precision",
    "recall",
    "drawings met, of 308",
    "share nearer to its drawing",
)


def changes_of(sections: tuple[str, ...], start: int) -> list[str]:
    """Return the changes of the config that add terms, the adversarial one from a step on."""
    text = (CONFIGS / "smoke.yaml").read_text()
    terms: dict[str, Any] = yaml.safe_load(text)
    terms["adversarial"]["start"] = start
    found = []
    for section in sections:
        found.append(f"{section}={json.dumps(terms[section])}")
    return found


def run(folder: Path, changes: list[str]) -> None:
    """Train and judge one run, or continue it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    program = [str(IMAGENET / "train.py"), str(CONFIGS / "emoji.yaml")]
    subprocess.run([*command, *program, *changes, f"out={folder}", "--evaluate"], check=True)


def numbers_of(folder: Path) -> list[float]:
    """Return the numbers of a row for a run that was judged."""
    text = (folder / "metrics.json").read_text()
    values: dict[str, float] = json.loads(text)["values"]
    found = []
    for name in ("Frechet", "KID", "precision", "recall"):
        found.append(next(value for key, value in values.items() if key.startswith(name)))
    samples = samples_of(folder)
    drawn = folder.parent / "emoji-smileys+animals-64"
    near = nearest(samples, pictures_of(drawn))
    return [*found, float(len(near.index.unique())), near.share]


def main() -> None:
    """Run all arms, seed by seed; print the table of those that are done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs") / "emoji-losses")
    parser.add_argument("changes", nargs="*", help="of the config, as evaluation.samples=50")
    options = parser.parse_args()
    found: dict[str, list[list[float]]] = {}
    for seed in range(options.seeds):
        for name, sections in ARMS.items():
            place = options.out / f"{name.replace(' ', '-')}-{seed}"
            changes = changes_of(sections, options.steps // 4)
            changes += [f"training.seed={seed}", f"training.steps={options.steps}"]
            changes += [f"training.look_every={options.steps}"]
            run(place, [*changes, *options.changes])
            found.setdefault(name, []).append(numbers_of(place))
            said(f"seed {seed}: {name}: {found[name][-1]}")
        write_beside(options.out / "table.md", f"{table(found)}\n")
    print(table(found))


def table(found: dict[str, list[list[float]]]) -> str:
    """Return means and ranges over seeds, an arm a row."""
    rows = []
    for name, of_seeds in found.items():
        cells = []
        for values, digits in zip(zip(*of_seeds, strict=True), (1, 2, 3, 3, 0, 2), strict=True):
            cells.append(mean_and_range(values, digits))
        rows.append((name, *cells))
    return markdown_table(HEAD, rows)


if __name__ == "__main__":
    main()
