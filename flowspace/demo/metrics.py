"""How good samples are: Frechet distance of features, diversity, and classifiers that judge."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowspace.demo.data import Data, in_range
from flowspace.demo.networks import JudgeClassifier
from flowspace.demo.picture_networks import PictureJudge

__all__ = ["Judge", "Verdict", "diversity", "frechet_distance"]

MOST_PAIRED = 2000
"""Images of a class whose pairs are compared."""

AT_ONCE = 256
"""Images that are drawn or judged together: more do not stay in the cache."""


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features ``(N, D)``
    (Heusel et al., 1706.08500).
    """
    m1, c1 = _moments(first)
    m2, c2 = _moments(second)
    root = _root(c1)
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance, in float64."""
    x = features.double()
    return x.mean(0), torch.cov(x.T)


def _root(matrix: Tensor) -> Tensor:
    """Return the symmetric root of a covariance."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def within_class_distance(images: Tensor, labels: Tensor) -> float:
    """Return the mean Euclidean distance of pairs of one class, averaged over classes."""
    means = []
    for label in labels.unique():
        rows = images[labels == label].flatten(1)
        if len(rows) > 1:
            means.append(torch.nn.functional.pdist(rows[:MOST_PAIRED]).mean())
    return float(torch.stack(means).mean())


def diversity(images: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor) -> float:
    """Return the mean distance within a class over the same for real images: 1 is as diverse as
    real ones.
    """
    return within_class_distance(images, labels) / within_class_distance(real, real_labels)


@dataclass(frozen=True)
class Verdict:
    """What the judges say of one set of images; without classes there is no accuracy."""

    accuracy: float | None
    diversity: float
    frechet: float
    milliseconds: float = 0.0


@dataclass(frozen=True)
class Judge:
    """Independent classifiers and the real test images that they compare with."""

    networks: tuple[JudgeClassifier | PictureJudge, ...]
    data: Data

    def score(self, images: Tensor, labels: Tensor, milliseconds: float = 0.0) -> Verdict:
        """Return accuracy on the labels, diversity and Frechet distance to real test images."""
        d = self.data
        images, test_images = in_range(images), in_range(d.test_images)
        scores = torch.tensor(
            [self._scores(network, images, labels) for network in self.networks],
            dtype=torch.float64,
        )
        accuracy, frechet = scores.mean(0).tolist()
        spread = diversity(images, labels, test_images, d.test_labels)
        if not d.conditional:
            accuracy = None
        return Verdict(accuracy, spread, frechet, milliseconds)

    def real(self) -> Verdict:
        """Return the same for real images: accuracy on the test images, the rest of the half that
        no judge has seen.

        A Frechet distance falls with the number of samples and is larger for images that the judge
        was trained on, so every set that is compared with the test images has the size of that
        half.
        """
        d = self.data
        test = self.score(d.test_images, d.test_labels)
        unseen = self.score(*d.compared())
        return replace(unseen, accuracy=test.accuracy)

    @torch.no_grad()
    def _scores(
        self, network: JudgeClassifier | PictureJudge, images: Tensor, labels: Tensor
    ) -> tuple[float, float]:
        """Return one judge's accuracy and Frechet distance."""
        found = _features(network, images)
        test = _features(network, self.data.test_images)
        device = found.device
        right = (network.head(found).argmax(1) == labels.to(device)).double().mean()
        sets = found.split(self.data.judged)
        distances = [frechet_distance(features, test) for features in sets]
        return float(right), sum(distances) / len(distances)


def _features(network: JudgeClassifier | PictureJudge, images: Tensor) -> Tensor:
    """Return the features of many images, a few at a time."""
    device = next(network.parameters()).device
    parts = []
    for part in images.split(AT_ONCE):
        parts.append(network.features(in_range(part).to(device)))
    return torch.cat(parts)
