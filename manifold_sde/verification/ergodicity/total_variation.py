"""The total variation distance of two samples, without the bias of finite samples."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Cells of the manifold by its dimension.
CELLS = {1: 16, 2: 32}


def cells(points: Array, count: int) -> Array:
    """Centres of cells (count, D), each the farthest of the points from those before."""
    chosen = [points[0]]
    distances = np.linalg.norm(points - chosen[0], axis=1)
    for _ in range(count - 1):
        chosen.append(points[int(distances.argmax())])
        distances = np.minimum(distances, np.linalg.norm(points - chosen[-1], axis=1))
    return np.stack(chosen)


def total_variation(a: Array, b: Array, centers: Array) -> tuple[float, float]:
    """Total variation distance of the laws on cells, with its standard error.

    It is the largest difference of the probabilities of unions of cells. Estimated by the same
    sample that chooses the union it would be too large by the order of sqrt(cells / n): here each
    half of the samples chooses the union on which the other half is counted, and the two are
    averaged. The result has no positive bias, and is near 0 or below for equal laws.

    Args:
        a: Independent points (n, D).
        b: Independent points (m, D).
        centers: Centres of the cells (k, D); a point belongs to the nearest.

    Returns:
        The distance, which is at most that of the laws themselves, and its standard error.
    """
    labels = [_nearest(sample, centers) for sample in (a, b)]
    values, variances = [], []
    for fold in (0, 1):
        chosen, counted = (
            [_shares(label[which::2], len(centers)) for label in labels]
            for which in (fold, 1 - fold)
        )
        union = chosen[0] > chosen[1]
        p, q = float(counted[0][union].sum()), float(counted[1][union].sum())
        sizes = [len(label[1 - fold :: 2]) for label in labels]
        values.append(p - q)
        variances.append(max(p * (1 - p), 0.25 / sizes[0]) / sizes[0])
        variances[-1] += max(q * (1 - q), 0.25 / sizes[1]) / sizes[1]
    return 0.5 * sum(values), 0.5 * math.sqrt(sum(variances))


def _nearest(points: Array, centers: Array) -> NDArray[np.int64]:
    products = points @ centers.T - 0.5 * (centers**2).sum(1)
    return np.asarray(products.argmax(1), dtype=np.int64)


def _shares(labels: NDArray[np.int64], count: int) -> Array:
    return np.bincount(labels, minlength=count) / len(labels)
