"""Grey pictures are judged by classifiers that are trained on the spot, and by nothing else.

They are the demo's: small convolutional networks that share no weights and no architecture with
the generator. They learn from half of the training pictures, and are tried on held-out ones.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from page import write_json
from pictures import images_of, stacked
from pixel_settings import CLASSIFIERS, PixelMeanFlowConfig
from torch import Tensor

from flowspace.demo.data import Data
from flowspace.demo.loop import TrainSettings
from flowspace.demo.metrics import Judge, Verdict
from flowspace.demo.stage_one import judge_of_grey
from flowspace.vision.data import Images

PLAN = TrainSettings(steps=600, batch=64)
"""How long a judge learns."""


def evaluate(config: PixelMeanFlowConfig, samples: Tensor) -> Mapping[str, float]:
    """Judge the samples of a run, and leave ``metrics.json`` in its folder.

    Args:
        config: of the run.
        samples: uint8 ``(N, 3, H, W)``, of which number i has class i mod the number of classes.
    """
    judge = judge_of(config)
    classes = len(judge.data.labels.unique())
    labels = torch.arange(len(samples)) % classes
    verdict = judge.score(grey(samples), labels)
    values = dict(numbers_of(verdict))
    for kind, value in numbers_of(judge.real()).items():
        values[f"{kind}, real pictures"] = value
    found = {
        "count": len(samples),
        "extractor": CLASSIFIERS,
        "values": values,
    }
    write_json(config.out / "metrics.json", found)
    return values


def judge_of(config: PixelMeanFlowConfig) -> Judge:
    """Return the judges of a config's pictures, trained where its neighbours left none."""
    folder = config.out.parent / f"judges-{config.data.path}-{config.data.size}"
    return judge_of_grey(data_of(config), PLAN, folder, {})


def data_of(config: PixelMeanFlowConfig) -> Data:
    """Return all training pictures and all held-out ones, in memory."""
    held_out = replace(config.data, path=f"{config.data.path}/test")
    images, labels = in_memory(images_of(config.data))
    test_images, test_labels = in_memory(images_of(held_out))
    return Data(images, labels, test_images, test_labels)


def in_memory(images: Images) -> tuple[Tensor, Tensor]:
    """Return pictures as judges take them, and their labels."""
    pictures = stacked(images, range(len(images)))
    return grey(pictures), torch.tensor(images.labels)


def grey(pictures: Tensor) -> Tensor:
    """Return uint8 pictures ``(N, 3, H, W)`` as ``(N, 1, H, W)`` in [-1, 1]."""
    return pictures.float().mean(1, keepdim=True) / 127.5 - 1


def numbers_of(verdict: Verdict) -> Mapping[str, float]:
    """Return a verdict by the names of its numbers."""
    return {
        "accuracy": verdict.accuracy,
        "diversity": verdict.diversity,
        "Frechet distance": verdict.frechet,
    }
