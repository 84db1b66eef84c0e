"""How good samples are: Frechet distance of features, diversity."""

import torch
from torch import Tensor

__all__ = ["diversity", "frechet_distance"]


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features ``(N, D)``
    (Heusel et al., 1706.08500).
    """
    (m1, c1), (m2, c2) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (first, second))
    root = _root(c1)
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def within_class_distance(images: Tensor, labels: Tensor) -> float:
    """Return the mean Euclidean distance of pairs of one class, averaged over classes."""
    groups = [images[labels == label].flatten(1) for label in labels.unique()]
    return float(torch.stack([torch.nn.functional.pdist(group).mean() for group in groups]).mean())


def diversity(images: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor) -> float:
    """Return the mean distance within a class over the same for real images: 1 is as diverse as
    real ones.
    """
    return within_class_distance(images, labels) / within_class_distance(real, real_labels)
