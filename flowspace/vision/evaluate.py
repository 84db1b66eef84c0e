"""Judging samples: FID, IS, KID, precision and recall by torch-fidelity's formulas, over features
that are named.

Sample i of a plan has class i mod K and noise from (seed, i) alone, so it does not depend on the
batch, the process or their number. Images are rounded to 255 levels, round((x + 1) 127.5),
clamped; Inception resizes them as in its TensorFlow original (bilinear, inside torch-fidelity),
other networks as `TimmFeatures` does (bicubic, antialiased). Only Inception's numbers are called
FID and IS: others are Frechet distances of the features they name.
"""

import abc
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from flowspace.errors import InputError, RunError
from flowspace.training import seed_of
from flowspace.vision.perceptual import TimmFeatures
from flowspace.vision.weights import read_tensors

__all__ = [
    "Extractor",
    "Features",
    "Inception",
    "Plan",
    "Scores",
    "TimmExtractor",
    "features_of",
    "judge",
    "rounded",
]

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
NEIGHBOURS = 3
"""The k of precision and recall (Kynkaanniemi et al., arXiv 1904.06991)."""

SUBSET, SUBSETS = 1000, 100
"""KID's usual subsets: 100 of 1,000, or of all images where there are fewer."""

Sample = Callable[[Tensor, Tensor], Tensor]


def rounded(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as uint8: round((x + 1) 127.5), clamped to 0..255."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Plan:
    """Which samples are drawn.

    Args:
        count: how many.
        classes: sample i has class i mod classes; 0: no classes.
        shape: of the noise of one.
        seed: of the noise.
        batch: how many are drawn together, always the same ones, since rounding may depend on it.
        shard: a file holds so many batches.

    Raises:
        InputError: if a number is not positive.
    """

    count: int
    classes: int
    shape: tuple[int, ...]
    seed: int = 0
    batch: int = 50
    shard: int = 20

    def __post_init__(self) -> None:
        if min(self.count, self.batch, self.shard) < 1 or self.classes < 0:
            raise InputError(
                f"{self} came; count, batch and shard are at least 1, classes at least 0"
            )

    def inputs(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return noise ``(last - first, *shape)`` and labels of these samples."""
        noise = [
            torch.randn(
                self.shape, generator=torch.Generator().manual_seed(seed_of(self.seed, i, 5))
            )
            for i in range(first, last)
        ]
        return torch.stack(noise), torch.arange(first, last) % max(1, self.classes)

    def draw(
        self,
        sample: Sample,
        folder: Path,
        maker: str,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Draw this process's share of the samples into files, each written whole; files that are
        there are kept.

        Args:
            sample: from noise and labels to images in [-1, 1].
            folder: holds ``samples-FIRST.safetensors``.
            maker: says which weights draw; another one's files are refused.
            device: where ``sample`` wants its inputs.
            rank: the number of this process; file k is drawn by process k mod ranks.
            ranks: how many there are.

        Raises:
            RunError: if the folder holds samples of another plan or maker, or a sample is not
                finite.
        """
        folder.mkdir(parents=True, exist_ok=True)
        size = self.batch * self.shard
        starts = range(0, self.count, size)
        for start in tqdm(
            [s for s in starts if s // size % ranks == rank],
            "samples",
            unit="file",
            disable=rank > 0,
        ):
            path = folder / f"samples-{start:07d}.safetensors"
            if self._kept(path, maker):
                continue
            ends = range(start, min(start + size, self.count), self.batch)
            images = torch.cat([self._batch(sample, first, device) for first in ends])
            partial = path.with_suffix(".partial")
            save_file({"images": images.contiguous()}, partial, {"plan": self._name(maker)})
            os.replace(partial, path)

    def read(self, folder: Path, maker: str) -> Tensor:
        """Return all samples, uint8 ``(count, 3, H, W)``.

        Raises:
            RunError: if some are missing.
        """
        paths = [
            folder / f"samples-{s:07d}.safetensors"
            for s in range(0, self.count, self.batch * self.shard)
        ]
        missing = [path for path in paths if not self._kept(path, maker)]
        if missing:
            raise RunError(
                f"{missing[0]} is missing ({len(missing)} of {len(paths)}); the same command "
                "draws what is left"
            )
        found = []
        for path in paths:
            with safe_open(path, "pt") as file:
                found.append(file.get_tensor("images"))
        return torch.cat(found)

    def _batch(self, sample: Sample, first: int, device: torch.device) -> Tensor:
        noise, labels = self.inputs(first, min(first + self.batch, self.count))
        with torch.no_grad():
            images = sample(noise.to(device), labels.to(device)).cpu()
        bad = (~images.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise RunError(
                f"sample {first + bad[0]} is not finite; the weights are broken, or half "
                "precision overflows"
            )
        return rounded(images)

    def _name(self, maker: str) -> str:
        return json.dumps(asdict(self) | {"maker": maker}, sort_keys=True)

    def _kept(self, path: Path, maker: str) -> bool:
        try:
            with safe_open(path, "pt") as file:
                found = (file.metadata() or {}).get("plan")
        except (SafetensorError, OSError):
            return False
        if found != self._name(maker):
            raise RunError(
                f"{path} holds samples of another run or plan; delete {path.parent} to draw anew"
            )
        return True


@dataclass(frozen=True)
class Features:
    """What a network sees in a set of images: features ``(N, F)`` and, where it classifies, logits
    ``(N, K)``.
    """

    features: Tensor
    logits: Tensor | None

    @property
    def digest(self) -> str:
        """The SHA-256 of the features, which pins a reference."""
        return hashlib.sha256(self.features.contiguous().numpy().tobytes()).hexdigest()


class Extractor(abc.ABC):
    """A network whose features are compared.

    Attributes:
        name: what the numbers are called after.
        classic: whether they may be called FID and IS.
    """

    name: str
    classic: bool = False

    @abc.abstractmethod
    def __call__(self, images: Tensor) -> Features:
        """Return the features of uint8 images ``(B, 3, H, W)``."""


class Inception(Extractor):
    """Inception-v3 as FID has it (torch-fidelity's port of the TensorFlow weights).

    Args:
        weights: the file of its weights.

    Raises:
        RunError: if there is no such file, or it holds anything but Inception's tensors; nothing
            else is unpickled.
    """

    name, classic = "inception-v3", True

    def __init__(self, weights: Path | None) -> None:
        if weights is None or not weights.is_file():
            raise RunError(
                f"{weights or INCEPTION} is missing; FID needs Inception's weights: fetch "
                f"{INCEPTION} from the releases of "
                "torch-fidelity (v0.2.0) and write evaluation.weights=PATH"
            )
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        tensors = read_tensors(weights)
        with (
            tempfile.TemporaryDirectory() as folder
        ):  # torch-fidelity unpickles what it is given: it is given tensors
            copy = Path(folder) / INCEPTION
            torch.save(tensors, copy)
            try:
                self.network = FeatureExtractorInceptionV3(
                    self.name,
                    ["2048", "logits_unbiased"],
                    feature_extractor_weights_path=str(copy),
                )
            except RuntimeError as error:
                raise RunError(
                    f"{weights} does not hold the weights of Inception, as {INCEPTION} does"
                ) from error

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Return pooled features (2,048) and unbiased logits."""
        pooled, logits = self.network(images)
        return Features(pooled.cpu().float(), logits.cpu().float())


class TimmExtractor(Extractor):
    """A timm network: the mean of its last map, and its logits.

    Args:
        features: the network.
        name: of it; the size that images are brought to is added, since other sizes are other
            features.
    """

    def __init__(self, features: TimmFeatures, name: str) -> None:
        self.network, self.name = (
            features,
            name if features.size is None else f"{name}@{features.size}",
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Return pooled features and logits."""
        device = next(self.network.parameters()).device
        (maps,) = self.network(images.to(device).float() / 127.5 - 1)
        head: Any = self.network.network
        pooled = maps.mean((2, 3)) if maps.ndim == 4 else maps.mean(1)
        return Features(pooled.cpu(), head.forward_head(maps).cpu())


def features_of(extractor: Extractor, batches: Iterable[Tensor]) -> Features:
    """Return the features of all batches of uint8 images."""
    found = [extractor(images) for images in batches]
    logits = [part.logits for part in found if part.logits is not None]
    return Features(
        torch.cat([part.features for part in found]), torch.cat(logits) if logits else None
    )


@dataclass(frozen=True)
class Scores:
    """The verdict.

    Attributes:
        count: samples judged.
        extractor: whose features.
        reference: SHA-256 of the real images' features.
        values: by the name of the number; for an extractor other than Inception none is called FID
            or IS.
    """

    count: int
    extractor: str
    reference: str
    values: dict[str, float]

    @property
    def kid(self) -> float:
        """KID in the extractor's features."""
        return next(value for name, value in self.values.items() if name.startswith("KID"))


def judge(
    extractor: Extractor, samples: Features, real: Features, pinned: str | None = None
) -> Scores:
    """Compare samples with real images.

    Args:
        extractor: that made the features.
        samples: of the samples.
        real: of the real images.
        pinned: the digest that the real ones must have.

    Raises:
        RunError: if the reference has another digest.
    """
    if pinned is not None and real.digest != pinned:
        raise RunError(
            f"the reference's features have SHA-256 {real.digest}, {pinned} is pinned; other "
            "images or weights"
        )
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    subset = min(SUBSET, len(samples.features), len(real.features))
    frechet, score = (
        ("FID", "IS") if extractor.classic else (f"Frechet distance ({extractor.name})", "")
    )
    kid = "KID" if extractor.classic else f"KID ({extractor.name})"
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of scipy's matrix root, for sets smaller than the features
        both = (fid_features_to_statistics(part.features.double()) for part in (samples, real))
        values = {
            frechet: fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
        }
        found = kid_features_to_metric(
            samples.features,
            real.features,
            kid_subset_size=subset,
            kid_subsets=SUBSETS,
            verbose=False,
        )
        values |= {
            kid: found["kernel_inception_distance_mean"],
            f"{kid}, spread": found["kernel_inception_distance_std"],
        }
        near = prc_features_to_metric(
            samples.features, real.features, prc_neighborhood=NEIGHBOURS, verbose=False
        )
        values |= {name: near[name] for name in ("precision", "recall")}
        if score and samples.logits is not None:
            values[score] = isc_features_to_metric(samples.logits)["inception_score_mean"]
    return Scores(
        len(samples.features),
        extractor.name,
        real.digest,
        {k: float(v) for k, v in values.items()},
    )
