"""Four ways to a picture in one evaluation, at equal network and steps: ``python
benchmarks/small_pictures.py --data mnist --seeds 3`` prints the table of the docs page "Small
pictures".

CrossFlow goes from a noisy latent to pixels; latent MeanFlow from a noisy latent to a latent, for
the autoencoder's decoder; pixel MeanFlow from noisy patches of pixels to pixels, without an
autoencoder; the one-step denoiser is CrossFlow's network, shown pure noise alone. All have the
settings of ``flowspace demo``, whose classifiers, trained on real pictures alone, judge them. A
run that was stopped is continued by the same command.

``--data emoji --run RUN`` looks at the samples of a run of examples/imagenet instead: each beside
its nearest training drawing, and how many are nearer to it than another drawing is.
"""

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from verdicts import Scores, cells_of, in_pixels, mean_of, said, write_scores

from flowspace import CrossFlowLoss, InputError, MeanFlowLoss, PixelMeanFlowLoss
from flowspace.demo import digits, sets
from flowspace.demo.data import CLASSES, SETTINGS, Data, Settings, load, seeded
from flowspace.demo.page import grid, markdown_table, png, write_beside
from flowspace.demo.stage_one import prepare

CELLS = 4
"""Tokens a side, whatever the size of the pictures."""

HEAD = ("method", "accuracy", "diversity", "Frechet distance", "over real against real")


# --- the data
# -------------------------------------------------------------------------------------------------


def scaled(data: Data, side: int) -> Data:
    """Return the same pictures with so many pixels a side, each the mean of what it covers."""
    size = (side, side)
    images = F.interpolate(data.images, size, mode="area")
    test_images = F.interpolate(data.test_images, size, mode="area")
    return replace(data, images=images, test_images=test_images)


def fashion(folder: Path, pictures: int) -> Data:
    """Read the first so many of 60,000 training pictures of clothes, and a third of their number
    from the 10,000 test pictures.

    Raises:
        InputError: if the files are not there.
    """
    parts = []
    for name, count in (("train", pictures), ("t10k", pictures // 3)):
        pixels, labels = sets.fashion_mnist(name, folder)
        images = pixels[:count, None].float() / 127.5 - 1
        parts += [images, labels[:count]]
    return Data(*parts)


# --- the methods
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComparedMethod:
    """A row of the table.

    Attributes:
        method: how it is trained and sampled.
        autoencoded: whether it starts from the autoencoder's latents; else from patches of pixels.
    """

    method: digits.Method
    autoencoded: bool = True


def entries(settings: Settings) -> tuple[ComparedMethod, ...]:
    """Return what is compared."""
    across = CrossFlowLoss(penalty=settings.penalty)
    cross_flow = digits.Method("CrossFlow", across)
    latent = digits.Method("latent MeanFlow + decoder", MeanFlowLoss(), pixels=False)
    pixel = digits.Method("pixel MeanFlow", PixelMeanFlowLoss(), pixels=False)
    denoiser = digits.Method("one-step denoiser", across, only_noise=True)
    return (
        ComparedMethod(cross_flow),
        ComparedMethod(latent),
        ComparedMethod(pixel, autoencoded=False),
        ComparedMethod(denoiser),
    )


def compared(settings: Settings, data: Data, folder: Path, seeds: int) -> Scores:
    """Train and judge every method with every seed; leave ``samples.png`` of the first one."""
    scores: Scores = {}
    pictures = {"real": digits.by_class(data.test_images, data.test_labels)}
    for seed in range(seeds):
        plan = seeded(settings, seed)
        place = folder / f"seed-{seed}"
        world, judge = prepare(data, plan, place)
        scores.setdefault("real", []).append(judge.real())
        for entry in entries(plan):
            method = entry.method
            name = method.name
            there = world
            if not entry.autoencoded:
                there = in_pixels(world, plan.patch)
            network = method.train(there, plan, place / name.replace(" ", "-"))
            images, labels, cost = digits.draw(method, network, there, seed)
            score = judge.score(images, labels, cost)
            scores.setdefault(name, []).append(score)
            pictures.setdefault(name, digits.by_class(images, labels))
            said(f"seed {seed}: {name}: {score}")
    sheet = grid(pictures, CLASSES, across=5)
    write_beside(folder / "samples.png", png(sheet, dpi=70))
    return scores


def table(scores: Scores) -> str:
    """Return the means over seeds, the range of the distance, and its ratio to the real one."""
    floor = mean_of(scores["real"], "frechet")
    rows = []
    for name, found in scores.items():
        ratio = mean_of(found, "frechet") / floor
        rows.append((name, *cells_of(found), f"{ratio:.1f}"))
    return markdown_table(HEAD, rows)


# --- a run of examples/imagenet
# -------------------------------------------------------------------------------------------------


def recalled(run: Path, training: Path, shown: int = 48) -> tuple[str, bytes]:
    """Return how near a run's samples are to their nearest training pictures, and a PNG of pairs.

    Args:
        run: the folder that train.py made and evaluate.py filled.
        training: a folder of one folder of pictures a class.
        shown: pairs in the picture, the first ones.
    """
    from flowspace.vision.evaluate import nearest

    samples = samples_of(run)
    pictures = pictures_of(training)
    found = nearest(samples, pictures)
    own = nearest(pictures, pictures)
    distance, apart = found.distance.median(), own.apart.median()
    met = len(found.index.unique())
    rows = (
        ("samples", f"{len(samples)}"),
        ("training pictures", f"{len(pictures)}"),
        ("distance to the nearest training picture, median", f"{distance:.3f}"),
        ("of training pictures to the nearest other, median", f"{apart:.3f}"),
        ("share nearer to it than another training picture is", f"{found.share:.2f}"),
        ("training pictures that are some sample's nearest", f"{met}"),
    )
    values = markdown_table(("what", "value"), rows)
    note = "Distances are root mean squares over pixels; white is 1 away from black."
    text = f"{values}\n\n{note}"
    partners = pictures[found.index[:shown]]
    return text, pairs(samples[:shown], partners)


def samples_of(run: Path) -> Tensor:
    """Return the samples that a run was judged by, uint8 ``(N, 3, H, W)``.

    Raises:
        InputError: if there are none.
    """
    from flowspace.vision.tensor_files import read_whole

    paths = sorted(run.rglob("samples-*.safetensors"))
    if not paths:
        raise InputError(
            f"got {run} without samples; write examples/imagenet/evaluate.py {run} first"
        )
    parts = []
    for path in paths:
        tensors, _ = read_whole(path)
        parts.append(tensors["images"])
    return torch.cat(parts)


def pictures_of(folder: Path) -> Tensor:
    """Return all pictures of a folder, uint8 ``(M, 3, H, W)``, in the order of their names.

    Raises:
        InputError: if there are none.
    """
    from torchvision.io import ImageReadMode, read_image

    paths = sorted(folder.glob("*/*.png"))
    if not paths:
        raise InputError(f"got {folder} without CLASS/NAME.png; emoji are drawn beside their run")
    pictures = [read_image(str(path), ImageReadMode.RGB) for path in paths]
    return torch.stack(pictures)


def pairs(samples: Tensor, pictures: Tensor, across: int = 8) -> bytes:
    """Return a PNG of samples, each with its nearest training picture on its right."""
    from torchvision.io import encode_png
    from torchvision.utils import make_grid

    framed = torch.cat([samples, pictures], 3)
    made: Any = make_grid(framed, across, padding=6, pad_value=200)
    return bytes(encode_png(made).tolist())


def main() -> None:
    """Print the table and save it, with pictures, in the folder of the run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="mnist", choices=["mnist", "fashion-mnist", "emoji"])
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=1000, help="of every method's training")
    add("--side", type=int, default=28, help="pixels, of either set")
    add("--pictures", type=int, default=3750, help="of Fashion-MNIST's 60,000")
    add("--folder", type=Path, default=sets.FASHION_MNIST, help="of Fashion-MNIST's files")
    add("--run", type=Path, help="of --data emoji: a run of examples/imagenet")
    add("--training", type=Path, help="of --data emoji: the folder of pictures")
    add("--threads", type=int, default=1)
    add("--out", type=Path, help="default: runs/small-DATA")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    out = options.out or Path("runs") / f"small-{options.data}"
    start = time.perf_counter()
    try:
        text = of(options, out)
    except InputError as error:
        sys.exit(f"skipped: {error}")
    write_beside(out / "table.md", f"{text}\n")
    seconds = time.perf_counter() - start
    print(f"{text}\n\n{options.data}, {seconds:.0f} s; in {out}")


def of(options: argparse.Namespace, out: Path) -> str:
    """Do what the options ask for; returns the text."""
    if options.data == "emoji":
        if options.run is None or options.training is None:
            raise InputError("--data emoji needs --run RUN and --training FOLDER")
        text, picture = recalled(options.run, options.training)
        write_beside(out / "pairs.png", picture)
        return text
    if options.data == "mnist":
        settings, data = SETTINGS["mnist"], load("mnist")
    else:
        settings = replace(SETTINGS["mnist"], dataset="fashion-mnist")
        data = fashion(options.folder, options.pictures)
    if options.side % CELLS:
        raise InputError(f"got --side {options.side}; write a multiple of {CELLS}")
    plan = replace(settings.generator, steps=options.steps)
    settings = replace(settings, generator=plan, patch=options.side // CELLS)
    data = scaled(data, options.side)
    scores = compared(settings, data, out, options.seeds)
    write_scores(out / "scores.json", scores)
    return table(scores)


if __name__ == "__main__":
    main()
