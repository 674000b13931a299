"""Scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from manifold_sde.errors import ArgumentError, MissingDependencyError
from manifold_sde.networks.data.images import Images, chosen
from manifold_sde.networks.mlp import generator_of


def _scikit_learn() -> Any:
    try:
        return importlib.import_module("sklearn.datasets")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "the digits come with scikit-learn",
            received="no module sklearn",
            expected="scikit-learn, an optional dependency",
            remedy='pip install "manifold_sde[networks]"',
        ) from error


def digits(
    n_train: int = 1000,
    *,
    seed: int | torch.Generator = 0,
    test: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Images:
    """1797 real images of handwritten digits, 8 x 8, divided at random.

    The pixels are shifted and scaled together, so that those of the training images have mean 0
    and variance 1.

    Args:
        n_train: Number of training images.
        seed: Seed or generator of the division.
        test: Number of test images; by default all others.
        dtype: Floating-point type of the images.

    Raises:
        MissingDependencyError: If scikit-learn is not installed.
        ArgumentError: If there are not so many images.

    Source: The test set of Alpaydin and Kaynak, "Optical recognition of handwritten digits" (UCI,
    1998).
    """
    loaded = _scikit_learn().load_digits()
    images = torch.as_tensor(loaded.images, dtype=dtype)[:, None]
    targets = torch.as_tensor(loaded.target, dtype=torch.int64)
    generator = generator_of(seed)
    train, rest = chosen(len(images), n_train, generator, "n_train")
    if len(train) < 2:
        raise ArgumentError(
            "there are too few training images",
            received=f"n_train={n_train}",
            expected="at least 2",
            remedy="n_train=1000",
        )
    tested = rest[chosen(len(rest), test, generator, "test")[0]]
    mean, deviation = images[train].mean(), images[train].std()
    images = (images - mean) / deviation
    return Images(
        inputs=images[train],
        targets=targets[train],
        test_inputs=images[tested],
        test_targets=targets[tested],
        classes=tuple(map(str, range(10))),
    )
