"""Draw a score over training for several runs, as the paper's figure 4 does for three GAN weights.

    python examples/imagenet/compare.py RUN RUN ... [--out compare.png]

The score is that of the looks, or, where the runs kept their averages (training.snapshots) and
``--samples`` is given, of so many samples of each.
"""

import argparse
from pathlib import Path
from typing import Any

import settings


def main() -> None:
    """Draw the curves and print where each ends."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="folders that train.py made")
    add("--samples", type=int, help="of each average that a run kept")
    add("--out", type=Path, default=Path("compare.png"), help="a PNG")
    options = parser.parse_args()
    configs = [settings.of_run(folder) for folder in options.runs]
    curves = {}
    for config in configs:
        curve = looked(config)
        if options.samples:
            curve = sampled(config, options.samples)
        if not curve:
            raise settings.SettingsError(
                f"got {config.out}, whose looks have no scores; give --samples and "
                "training.snapshots=true, or a judge that is at hand"
            )
        curves[str(config.out)] = curve
    draw(curves, options.out)
    for name, curve in curves.items():
        step = max(curve)
        best = min(curve.values())
        print(f"{name}: {curve[step]:.4g} at step {step}, best {best:.4g}")
    print(f"over training: {options.out}")


def looked(config: settings.ImageNetConfig) -> dict[int, float]:
    """Return the first score of each look of a run, by its step."""
    import journal

    curve = {}
    for record in journal.latest(config.out / "generator"):
        watched = record.get("watch")
        if not watched:
            continue
        step = record["step"] + 1
        curve[step] = next(iter(watched.values()))
    return curve


def sampled(config: settings.ImageNetConfig, samples: int) -> dict[int, float]:
    """Return the first score of so many samples of each average that a run kept."""
    import build
    import judging
    import ship
    import train

    from flowspace.vision.evaluate import features_of, judge
    from flowspace.vision.weights import read_tensors

    device = train.accelerator_of(config).device
    images = build.images_of(config)
    network = build.generator_of(config, len(images.names))
    network.to(device).eval()
    encoder = ship.needed_encoder(config, device)
    sample = build.sampler_of(config, network, encoder)
    plan = ship.plan_of(config, network, samples)
    extractor = judging.extractor_of(config, device)
    real = judging.reference_of(config, extractor, images)
    curve = {}
    folder = config.out / "generator"
    for path in sorted(folder.glob("average-*.safetensors")):
        network.load_state_dict(read_tensors(path))
        made = judging.drawn(plan, sample, device)
        features = features_of(extractor, made.split(plan.batch))
        scores = judge(extractor, features, real)
        step = path.stem.removeprefix("average-")
        curve[int(step)] = ship.first_of(scores)
    return curve


def draw(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Write the curves as a PNG."""
    from matplotlib import pyplot as plt

    from flowspace.demo.page import png, write_beside

    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for name, curve in curves.items():
        points: list[Any] = sorted(curve.items())
        steps, values = zip(*points, strict=True)
        axis.semilogy(steps, values, marker="o", label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("distance to the pictures")
    axis.legend(fontsize=7)
    write_beside(path, png(figure))


if __name__ == "__main__":
    settings.run_program(main)
