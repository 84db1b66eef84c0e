"""Draw images of a run's pipeline.

python examples/imagenet/sample.py RUN --labels 0 1 2 --seed 0 --out samples
"""

import argparse
from pathlib import Path

import settings


def main() -> None:
    """Draw one image a label into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("run", type=Path, help="the folder that train.py made")
    add("--labels", type=int, nargs="+", default=[0], help="classes (default: 0)")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--out", type=Path, default=Path("samples"), help="default: %(default)s")
    options = parser.parse_args()
    config = settings.of_run(options.run)

    import ship  # with torch, which a wrong folder need not wait for

    pictures = ship.pictures(config, options.labels, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        name = f"{number:04d}-class-{options.labels[number]}.png"
        picture.save(options.out / name)
    print(f"{len(pictures)} image(s) in {options.out}")


if __name__ == "__main__":
    settings.run_program(main)
