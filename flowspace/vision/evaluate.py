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
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from flowspace.errors import InputError, RunError
from flowspace.training.draws import seed_of
from flowspace.vision.perceptual import TimmFeatures
from flowspace.vision.tensor_files import metadata_of, read_whole, write_whole
from flowspace.vision.weights import read_tensors

__all__ = [
    "Extractor",
    "Features",
    "Inception",
    "Nearest",
    "Plan",
    "Scores",
    "TimmExtractor",
    "check_judge",
    "features_of",
    "frechet_distance",
    "judge",
    "kernel_distance",
    "least_and_spread",
    "nearest",
    "rounded",
    "validation_ratio",
]

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
COMPARED = 10_000
"""Images of each set, at most, that precision and recall compare."""

NEIGHBOURS = 3
"""The k of precision and recall (Kynkaanniemi et al., arXiv 1904.06991)."""

SUBSET = 1000
SUBSETS = 100
"""KID's usual subsets: 100 of 1,000, or of all images where there are fewer."""

DISTANCES = ("FID", "FD-", "Frechet distance", "KID")
"""How the names of distances begin: less is better."""

NOISE = 5
"""Keeps the noise of samples apart from the other uses of a seed."""

Sample = Callable[[Tensor, Tensor], Tensor]
Distances = dict[str, dict[str, list[float]]]
"""By the name of the distance, those of each set over the splits of `check_judge`."""


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
        least = min(self.count, self.batch, self.shard)
        if least < 1 or self.classes < 0:
            raise InputError(
                f"got {self}; count, batch and shard are at least 1, classes at least 0"
            )

    def inputs(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return noise ``(last - first, *shape)`` and labels of these samples."""
        noise = []
        for number in range(first, last):
            draw = torch.Generator()
            draw.manual_seed(seed_of(self.seed, number, NOISE))
            noise.append(torch.randn(self.shape, generator=draw))
        labels = torch.arange(first, last) % max(1, self.classes)
        return torch.stack(noise), labels

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
            RunError: if the folder holds samples of another plan or maker or under another's
                name, it cannot be written, or a sample is not finite.
        """
        starts = self._starts()[rank::ranks]
        for start in tqdm(starts, "samples", unit="file", disable=rank > 0):
            path = self._path(folder, start)
            if self._kept(path, maker, start):
                continue
            images = []
            for first in self._batches(start):
                images.append(self._batch(sample, first, device))
            write_whole(path, {"images": torch.cat(images)}, self._metadata(maker, start))

    def read(self, folder: Path, maker: str) -> Tensor:
        """Return all samples, uint8 ``(count, 3, H, W)``.

        Raises:
            RunError: if some are missing, or are not what was drawn.
        """
        paths, missing = [], []
        for start in self._starts():
            path = self._path(folder, start)
            paths.append(path)
            if not self._kept(path, maker, start):
                missing.append(path)
        if missing:
            raise RunError(
                f"{missing[0]} is missing ({len(missing)} of {len(paths)}); the same command "
                "draws what is left"
            )
        found = []
        for path in paths:
            tensors, _ = read_whole(path)
            found.append(tensors["images"])
        return torch.cat(found)

    def _starts(self) -> range:
        """The first sample of each file."""
        return range(0, self.count, self.batch * self.shard)

    def _batches(self, start: int) -> range:
        """The first sample of each batch of one file."""
        end = min(start + self.batch * self.shard, self.count)
        return range(start, end, self.batch)

    @staticmethod
    def _path(folder: Path, start: int) -> Path:
        return folder / f"samples-{start:07d}.safetensors"

    def _batch(self, sample: Sample, first: int, device: torch.device) -> Tensor:
        noise, labels = self.inputs(first, min(first + self.batch, self.count))
        with torch.no_grad():
            images = sample(noise.to(device), labels.to(device)).cpu()
        finite = images.flatten(1).isfinite().all(1)
        if not finite.all():
            number = first + int(finite.int().argmin())
            raise RunError(
                f"sample {number} is not finite; the weights are broken, or half precision "
                "overflows"
            )
        return rounded(images)

    def _metadata(self, maker: str, start: int) -> dict[str, str]:
        plan = json.dumps(asdict(self) | {"maker": maker}, sort_keys=True)
        return {"plan": plan, "first": str(start)}

    def _kept(self, path: Path, maker: str, start: int) -> bool:
        """Whether a file is there, of these samples."""
        found = metadata_of(path)
        if found is None:
            return False
        wanted = self._metadata(maker, start)
        if found.get("plan") != wanted["plan"]:
            raise RunError(
                f"{path} holds samples of another run or plan; delete {path.parent} to draw anew"
            )
        if found.get("first") != wanted["first"]:
            raise RunError(
                f"{path} holds the samples from {found.get('first')} on, not those from {start} "
                "on; delete it to draw them anew"
            )
        return True


@dataclass(frozen=True)
class Features:
    """What a network sees in a set of images: features ``(N, F)`` and, where it classifies, logits
    ``(N, K)``.
    """

    features: Tensor
    logits: Tensor | None = None

    @property
    def digest(self) -> str:
        """The SHA-256 of the features, which pins a reference."""
        numbers = self.features.cpu().numpy()
        return hashlib.sha256(numbers.tobytes()).hexdigest()

    def save(self, path: Path, made: str = "") -> None:
        """Write them into a file.

        Args:
            path: of the file.
            made: says of which images by which network they are.

        Raises:
            RunError: if it cannot be written.
        """
        tensors = {"features": self.features}
        if self.logits is not None:
            tensors["logits"] = self.logits
        write_whole(path, tensors, {"made": made})

    @classmethod
    def load(cls, path: Path, made: str = "") -> "Features":
        """Read them from a file that `save` wrote.

        Raises:
            RunError: if it cannot be read, does not hold what was written, or features of other
                images or another network.
        """
        tensors, metadata = read_whole(path)
        held = metadata.get("made")
        if held != made or "features" not in tensors:
            raise RunError(
                f"{path} holds features of {held!r}, not of {made!r}; delete it to make them anew"
            )
        return cls(tensors["features"], tensors.get("logits"))

    def __getitem__(self, rows: Any) -> "Features":
        """Return the features of some of the images."""
        logits = self.logits
        if logits is not None:
            logits = logits[rows]
        return Features(self.features[rows], logits)

    def __len__(self) -> int:
        return len(self.features)


FeaturesByName = Mapping[str, Features]
"""By the names of the extractors that made them."""


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

    @property
    def distance_name(self) -> str:
        """What the Frechet distance of these features is called."""
        if self.classic:
            return "FID"
        return f"Frechet distance ({self.name})"

    @property
    def kernel_name(self) -> str:
        """What the kernel distance of these features is called."""
        if self.classic:
            return "KID"
        return f"KID ({self.name})"


class Inception(Extractor):
    """Inception-v3 as FID has it (torch-fidelity's port of the TensorFlow weights).

    Args:
        weights: the file of its weights.

    Raises:
        RunError: if there is no such file, or it holds anything but Inception's tensors; nothing
            else is unpickled.
    """

    name, classic = "inception-v3", True

    def __init__(self, weights: Path | None, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        if weights is None or not weights.is_file():
            raise RunError(
                f"{weights or INCEPTION} is missing; FID needs Inception's weights: fetch "
                f"{INCEPTION} from the releases of "
                "torch-fidelity (v0.2.0) and write evaluation.weights=PATH"
            )
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        tensors = read_tensors(weights)
        layers = ["2048", "logits_unbiased"]
        # torch-fidelity unpickles what it is given: it is given tensors.
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / INCEPTION
            torch.save(tensors, copy)
            try:
                network = FeatureExtractorInceptionV3(self.name, layers, str(copy))
            except RuntimeError as error:
                raise RunError(
                    f"{weights} does not hold the weights of Inception, as {INCEPTION} does"
                ) from error
        self.network = network.to(self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Return pooled features (2,048) and unbiased logits."""
        pooled, logits = self.network(images.to(self.device))
        return Features(pooled.cpu().float(), logits.cpu().float())


class TimmExtractor(Extractor):
    """A timm network: the mean of its last map, and its logits; of a DINOv2 network its class
    token, whose Frechet distance is FD-DINOv2 (Stein et al., arXiv 2306.04675).

    Published FD-DINOv2 is that of ``vit_large_patch14_dinov2`` at 224 pixels, with another
    interpolation of its positions than timm's.

    Args:
        features: the network.
        name: of it; the size that images are brought to is added, since other sizes are other
            features.
    """

    def __init__(self, features: TimmFeatures, name: str) -> None:
        self.network = features
        self.dino = "dinov2" in name
        self.name = name
        if features.size is not None:
            self.name = f"{name}@{features.size}"

    @property
    def distance_name(self) -> str:
        """What the Frechet distance of these features is called."""
        if self.dino:
            return f"FD-DINOv2 ({self.name})"
        return super().distance_name

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Return pooled features and logits."""
        device = next(self.network.parameters()).device
        (maps,) = self.network(images.to(device).float() / 127.5 - 1)
        network: Any = self.network.network
        if self.dino:  # which has no logits
            token = network.forward_head(maps, pre_logits=True)
            return Features(token.cpu())
        positions = (1,)
        if maps.ndim == 4:
            positions = (2, 3)
        pooled = maps.mean(positions)
        logits = network.forward_head(maps)
        return Features(pooled.cpu(), logits.cpu())


@dataclass(frozen=True)
class Nearest:
    """The training image that is nearest to each of some samples.

    Distances are root mean squares over pixels, where white is 1 away from black.

    Attributes:
        index: of the nearest training image, ``(N,)``.
        distance: to it, ``(N,)``.
        apart: from that training image to the nearest other one, ``(N,)``.
    """

    index: Tensor
    distance: Tensor
    apart: Tensor

    @property
    def share(self) -> float:
        """The share of samples that are nearer to a training image than any other one is to it.

        It is 1 where every sample recalls a training image. A blot is near to many images too, so
        that the number says something only of samples that one has looked at.
        """
        recalled = self.distance < self.apart
        return float(recalled.double().mean())


def nearest(samples: Tensor, training: Tensor) -> Nearest:
    """Return the training image nearest to each sample, by its pixels.

    Args:
        samples: uint8, ``(N, C, H, W)``.
        training: uint8, ``(M, C, H, W)``, at least two.

    Raises:
        InputError: if there are fewer than two training images, or the sizes differ.
    """
    alike = samples.shape[1:] == training.shape[1:]
    if len(training) < 2 or not alike:
        raise InputError(
            f"got samples of shape {tuple(samples.shape)} and training images of shape "
            f"{tuple(training.shape)}; images of one size are compared, with at least two of "
            "training"
        )
    distance, index = _distances(samples, training).min(1)
    found, where = index.unique(return_inverse=True)
    others = _distances(training[found], training)
    others[torch.arange(len(found)), found] = torch.inf
    apart = others.min(1).values
    return Nearest(index, distance, apart[where])


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """Return the root mean square difference of each pair of uint8 images, ``(N, M)``."""
    a = first.flatten(1).float() / 255
    b = second.flatten(1).float() / 255
    exact = "donot_use_mm_for_euclid_dist"  # equal images have a distance of zero
    return torch.cdist(a, b, compute_mode=exact) / math.sqrt(a.shape[1])


def features_of(extractor: Extractor, batches: Iterable[Tensor]) -> Features:
    """Return the features of all batches of uint8 images.

    Raises:
        InputError: if there are none.
    """
    features, logits = [], []
    for images in batches:
        part = extractor(images)
        features.append(part.features)
        if part.logits is not None:
            logits.append(part.logits)
    if not features:
        raise InputError("got no images to extract features of")
    if not logits:
        return Features(torch.cat(features))
    return Features(torch.cat(features), torch.cat(logits))


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
        InputError: if there are fewer than four images, or features that are not finite, or of
            another width than the real ones.
    """
    _check(samples, real)
    if pinned is not None and real.digest != pinned:
        raise RunError(
            f"the reference's features have SHA-256 {real.digest}, {pinned} is pinned; other "
            "images or weights"
        )
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    near = prc_features_to_metric(
        _spread_over(samples).cpu().float(),
        _spread_over(real).cpu().float(),
        prc_neighborhood=NEIGHBOURS,
        prc_save_cpu_ram=True,
        verbose=False,
    )
    distance, spread = kernel_distance(samples, real)
    values = {
        extractor.distance_name: frechet_distance(samples, real),
        extractor.kernel_name: distance,
        f"{extractor.kernel_name}, spread": spread,
        "precision": float(near["precision"]),
        "recall": float(near["recall"]),
    }
    if extractor.classic and samples.logits is not None:
        score = isc_features_to_metric(samples.logits.cpu())
        values["IS"] = float(score["inception_score_mean"])
    return Scores(len(samples), extractor.name, real.digest, values)


def _spread_over(features: Features) -> Tensor:
    """Return the features of at most `COMPARED` images, evenly spread over all of them.

    Precision and recall compare every image with every other one.
    """
    step = -(-len(features) // COMPARED)
    return features.features[::step]


def frechet_distance(samples: Features, real: Features) -> float:
    """Return the squared Frechet distance of the Gaussians of two sets' features.

    Raises:
        InputError: see `judge`.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    _check(samples, real)
    mine = fid_features_to_statistics(samples.features.cpu().double())
    theirs = fid_features_to_statistics(real.features.cpu().double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the matrix root, for sets smaller than the features
        found = fid_statistics_to_metric(mine, theirs, verbose=False)
    return float(found["frechet_inception_distance"])


def kernel_distance(samples: Features, real: Features) -> tuple[float, float]:
    """Return KID, the squared kernel distance of two sets' features, and its spread.

    KID is the mean over 100 random subsets of 1,000 images of each set, and its spread that over
    the subsets. Of fewer than 2,000 images such subsets are nearly the whole sets, and tell
    nothing; the spread is then that over subsets of half as many images. Such halves spread as
    much as KID does over other sets of this size: half the images double the variance, and half
    of that is left while the images stay the same. Where the sets do not differ it is too large,
    by up to sqrt(3).

    Raises:
        InputError: see `judge`.
    """
    _check(samples, real)
    count = min(len(samples), len(real))
    mean, spread = _subsets(samples, real, min(SUBSET, count))
    if count < 2 * SUBSET:
        _, spread = _subsets(samples, real, min(SUBSET, count // 2))
    return mean, spread


def _subsets(samples: Features, real: Features, size: int) -> tuple[float, float]:
    """Return the mean and the spread of KID over subsets of this size."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    subsets = SUBSETS
    if size == len(samples) == len(real):  # every subset is the whole set
        subsets = 1
    found = kid_features_to_metric(
        samples.features.cpu().float(),
        real.features.cpu().float(),
        kid_subset_size=size,
        kid_subsets=subsets,
        verbose=False,
    )
    mean = found["kernel_inception_distance_mean"]
    return float(mean), float(found["kernel_inception_distance_std"])


def _check(samples: Features, real: Features) -> None:
    """Refuse sets that cannot be compared."""
    _check_set("samples", samples)
    _check_set("real images", real)
    mine = samples.features.shape[1]
    theirs = real.features.shape[1]
    if mine != theirs:
        raise InputError(
            f"got {mine} features of the samples and {theirs} of the real images; one network "
            "makes both"
        )


def _check_set(name: str, found: Features) -> None:
    """Refuse features of which precision, recall or a spread cannot be computed."""
    shape = tuple(found.features.shape)
    if len(shape) != 2 or shape[1] < 2:
        raise InputError(
            f"got features of the {name} of shape {shape}; they are (images, features), with "
            "two features or more"
        )
    if shape[0] <= NEIGHBOURS:
        raise InputError(
            f"got {shape[0]} {name}; at least {NEIGHBOURS + 1} are compared, for precision "
            "and recall"
        )
    for table in (found.features, found.logits):
        if table is None:
            continue
        finite = table.isfinite().all(1)
        bad = len(table) - int(finite.sum())
        if bad:
            raise InputError(
                f"got features of the {name} that are not finite, of {bad} of {shape[0]}; the "
                "network's weights are broken, or half precision overflows"
            )


# --- more than one number ------------------------------------------------------------------------


def validation_ratio(
    samples: FeaturesByName, real: FeaturesByName, held_out: FeaturesByName
) -> dict[str, float]:
    """Compare samples with real images that nobody trained on, in several representations.

    In each of them the ratio is ``frechet_distance(samples, real)`` over
    ``frechet_distance(held_out, real)``: 1 is as good as other real images, and less says that
    samples are nearer to the real images than those are, as copies would be. One representation's
    Frechet distance may be trained for; the mean over several (FDr, arXiv 2604.28190) is harder to
    please.

    Args:
        samples: features of the samples, by the name of the extractor.
        real: of the real images that both are compared with, by the same names.
        held_out: of as many other real images as there are samples.

    Returns:
        The ratio in each representation, and under ``mean`` their mean.

    Raises:
        InputError: if the names differ or are none, there are not as many samples as held-out
            images, these have no distance, or see `judge`.
    """
    if not samples or not samples.keys() == real.keys() == held_out.keys():
        raise InputError(
            f"got features by {sorted(samples)}, {sorted(real)} and {sorted(held_out)}; each "
            "extractor sees the samples, the real and the held-out images"
        )
    ratios = {}
    for name, mine in samples.items():
        others = held_out[name]
        if len(mine) != len(others):
            raise InputError(
                f"got {len(mine)} samples and {len(others)} held-out images for {name}; a Frechet "
                "distance falls with their number: give as many of both"
            )
        unit = frechet_distance(others, real[name])
        if not unit > 0:
            raise InputError(
                f"the held-out images have the distance {unit} from the real ones by {name}; give "
                "other images than those, and a network that tells images apart"
            )
        ratios[name] = frechet_distance(mine, real[name]) / unit
    return ratios | {"mean": sum(ratios.values()) / len(ratios)}


def least_and_spread(scores: Sequence[Scores]) -> dict[str, float]:
    """Return the least of each distance over several sets of samples, and how far they spread.

    Published FIDs are often the least of three sets, drawn with three seeds of a `Plan`.

    Args:
        scores: of two sets or more, by one extractor, against one reference.

    Returns:
        For each Frechet and kernel distance the least, and largest less least under its name with
        ``, spread of N sets``.

    Raises:
        InputError: if there are fewer than two, or they cannot be compared.
    """
    kinds = {(one.count, one.extractor, one.reference) for one in scores}
    if len(scores) < 2 or len(kinds) != 1:
        raise InputError(
            f"got {len(scores)} scores of {len(kinds)} kinds; give two or more, of as many "
            "samples each, by one extractor, against one reference"
        )
    found = {}
    for name in scores[0].values:
        if not name.startswith(DISTANCES) or name.endswith("spread"):
            continue
        values = [one.values[name] for one in scores]
        least = min(values)
        found[name] = least
        found[f"{name}, spread of {len(values)} sets"] = max(values) - least
    return found


# --- a judge is judged ---------------------------------------------------------------------------


def check_judge(
    extractor: Extractor, images: Tensor, splits: int = 3, batch: int = 50, seed: int = 0
) -> Distances:
    """Test a judge in the use that is made of it: whether it knows real images.

    Real images are cut into halves at random. To one half the other one must be nearer than the
    same images blurred, with their pixels shuffled, or one of them repeated; by the Frechet and by
    the kernel distance, in every split. A network that does not see what is wrong with them, or
    has too many features for so few images, says nothing of samples either.

    Args:
        extractor: the network, with the size to which it brings images.
        images: twice as many real ones as will be judged, uint8 ``(N, 3, H, W)``, of the size that
            will be judged.
        splits: how often they are cut.
        batch: images that the network sees at once.
        seed: of the halves and the pixels.

    Returns:
        By the name of the distance, those of each set over the splits.

    Raises:
        RunError: if real images are not nearest; it names what was not told apart, and by which
            distance.
        InputError: if there are fewer than eight images, or they are no images.
    """
    fewest = 2 * (NEIGHBOURS + 1)
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) < fewest:
        raise InputError(
            f"got images of {images.dtype} and shape {tuple(images.shape)}; give uint8 (N, 3, H, "
            f"W), {fewest} or more"
        )
    draw = torch.Generator().manual_seed(seed)
    batches = images.split(batch)
    real = features_of(extractor, batches)
    blurred = map(_blurred, batches)
    shuffled = [_shuffled(part, draw) for part in batches]
    sets = {
        "real": real,
        "blurred": features_of(extractor, blurred),
        "pixel-shuffled": features_of(extractor, shuffled),
    }
    half = len(images) // 2
    found: Distances = {extractor.distance_name: {}, extractor.kernel_name: {}}
    for _ in range(splits):
        order = torch.randperm(len(images), generator=draw)
        mine = order[:half]
        theirs = real[order[half : 2 * half]]
        compared = {name: features[mine] for name, features in sets.items()}
        compared["collapsed"] = real[mine[:1].expand(half)]
        for name, features in compared.items():
            frechet = frechet_distance(features, theirs)
            kernel, _ = _subsets(features, theirs, min(SUBSET, half))
            found[extractor.distance_name].setdefault(name, []).append(frechet)
            found[extractor.kernel_name].setdefault(name, []).append(kernel)
    _check_order(extractor, half, found)
    return found


def _check_order(extractor: Extractor, count: int, found: Distances) -> None:
    """Refuse a judge to which real images are not the nearest."""
    faults = []
    for distance, sets in found.items():
        farthest = max(sets["real"])
        for name, values in sets.items():
            least = min(values)
            if name != "real" and not least > farthest:
                faults.append(
                    f"{name} images by {distance} ({least:.4g}, real ones {farthest:.4g})"
                )
    if faults:
        raise RunError(
            f"{extractor.name} does not tell apart real images, {count} a set, from "
            f"{'; '.join(faults)}: judge with another network or image size, or more images"
        )


def _blurred(images: Tensor) -> Tensor:
    """Return images that were four times smaller between."""
    size = images.shape[-2:]
    quarter = [max(1, side // 4) for side in size]
    small = F.interpolate(images.float(), quarter, mode="area")
    large = F.interpolate(small, size, mode="bilinear", align_corners=False)
    return large.round().clamp(0, 255).to(torch.uint8)


def _shuffled(images: Tensor, draw: torch.Generator) -> Tensor:
    """Return images with their pixels at random places, of each at others."""
    flat = images.flatten(2)
    keys = torch.rand(len(flat), 1, flat.shape[2], generator=draw)
    places = keys.argsort(-1).expand_as(flat)
    return flat.gather(2, places).reshape(images.shape)
