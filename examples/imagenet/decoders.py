"""The generator as a decoder of latents that another model sampled (section 4.4 of the paper).

    python examples/imagenet/decoders.py RUN LATENT_RUN [--levels 0.05 0.1 0.2] [--samples 10000]

LATENT_RUN is a finished run of ``configs/latent-flow-matching.yaml``, which kept its averages over
training. The samples of each are decoded by the autoencoder's own decoder and by the generator of
RUN at several noise levels, and judged alike. Leaves ``decoders.json`` and ``decoders.png`` in
LATENT_RUN; numbers that are there are kept, so the same command goes on where it was stopped.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import settings

OWN = "the autoencoder's decoder"


def main() -> None:
    """Judge the decoders over the training of the latent generator."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, help="of a generator of images")
    add("latent_run", type=Path, help="of a generator of latents")
    add("--levels", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    add("--samples", type=int, default=10_000)
    add(
        "--keep-scale",
        action="store_true",
        help="of a generator that sees t: latents are not scaled by alpha(level)",
    )
    options = parser.parse_args()
    image = settings.of_run(options.run)
    latent = settings.of_run(options.latent_run)
    snapshots = sorted((latent.out / "generator").glob("average-*.safetensors"))
    if latent.generator.space != "latent" or not snapshots:
        raise settings.SettingsError(
            f"got {options.latent_run}, which kept no averages of a generator of latents; "
            "train configs/latent-flow-matching.yaml, or write training.snapshots=true"
        )
    decode_and_judge(image, latent, snapshots, options)


def decode_and_judge(
    image: settings.ImageNetConfig,
    latent: settings.ImageNetConfig,
    snapshots: list[Path],
    options: argparse.Namespace,
) -> None:
    """Judge every decoder at every snapshot, and draw the figure."""
    import build  # with torch, which a wrong folder need not wait for
    import judging
    import ship
    import train
    from page import write_json

    from flowspace.demo.page import write_beside
    from flowspace.vision.evaluate import features_of, judge
    from flowspace.vision.weights import read_tensors

    device = train.accelerator_of(latent).device
    images = build.images_of(latent)
    encoder = ship.stage_one.loaded(latent).to(device)
    network = build.generator_of(latent, len(images.names))
    network.to(device).eval()
    sample = build.latent_sampler_of(latent, network)
    decoders = decoders_of(image, encoder, options, device)
    plan = ship.plan_of(latent, network, options.samples)
    extractor = judging.extractor_of(latent, device)
    real = judging.reference_of(latent, extractor, images)
    path = latent.out / "decoders.json"
    asked = {
        "samples": plan.count,
        "judge": extractor.name,
        "decoders": sorted(decoders),
        "generator": ship.shipped_of(image).get("weights"),
    }
    found = kept(path, asked)
    for snapshot in snapshots:
        step = snapshot.stem.removeprefix("average-").lstrip("0")
        if step in found:
            continue
        network.load_state_dict(read_tensors(snapshot))
        made = decoded(plan, sample, decoders, device)
        scores = {}
        for name, batches in made.items():
            features = features_of(extractor, batches)
            verdict = judge(extractor, features, real)
            scores[name] = ship.first_of(verdict)
        found[step] = scores
        write_json(path, {"asked": asked, "scores": found})
        said = [f"{name} {value:.4g}" for name, value in scores.items()]
        print(f"step {step}: {', '.join(said)}")
    curves = figure(found, extractor.distance_name)
    write_beside(latent.out / "decoders.png", curves)


def decoded(plan: Any, sample: Any, decoders: dict[str, Any], device: Any) -> dict[str, list[Any]]:
    """Return the images that each decoder makes of the same latents, uint8, a batch at a time."""
    import judging
    import torch

    from flowspace.vision.evaluate import rounded

    made: dict[str, list[Any]] = {name: [] for name in decoders}
    with torch.no_grad():
        for noise, labels in judging.batches_of(plan, device):
            latents = sample(noise, labels)
            for name, decode in decoders.items():
                images = decode(latents, labels)
                made[name].append(rounded(images).cpu())
    return made


def kept(path: Path, asked: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the numbers that a file keeps, unless they are of another question."""
    if path.exists():
        before = json.loads(path.read_text())
        if before.get("asked") == asked:
            return before["scores"]
    return {}


def decoders_of(
    image: settings.ImageNetConfig, encoder: Any, options: argparse.Namespace, device: Any
) -> dict[str, Any]:
    """Return functions from latents and labels to images, by name."""
    import ship

    from flowspace.vision.pipeline import CrossFlowDecoder

    generator = ship.generator_of_run(image).to(device).eval()
    o = image.objective
    found: dict[str, Any] = {OWN: lambda latents, labels: encoder.decode(latents)}
    for level in options.levels:
        decoder = CrossFlowDecoder.of(
            generator,
            t=level,
            alpha=o.alpha,
            beta=o.beta,
            rescale=not options.keep_scale,
        )

        def decode(latents: Any, labels: Any, decoder: Any = decoder) -> Any:
            (images,) = decoder.decode(latents, False, labels=labels)
            return images

        found[f"CrossFlowDecoder, t = {level:g}"] = decode
    return found


def figure(found: dict[str, dict[str, float]], score: str) -> bytes:
    """Return the score of each decoder over training, as a PNG."""
    from matplotlib import pyplot as plt

    from flowspace.demo.page import png

    drawn, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    steps = sorted(found, key=int)
    places = [int(step) for step in steps]
    for name in found[steps[-1]]:
        values = [found[step][name] for step in steps]
        axis.semilogy(places, values, marker="o", label=name)
    axis.set_xlabel("training steps of the latent generator")
    axis.set_ylabel(score)
    axis.legend(fontsize=7)
    return png(drawn)


if __name__ == "__main__":
    settings.run_program(main)
