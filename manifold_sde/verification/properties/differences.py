"""Derivatives of a map by differences, with what the truncation leaves."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

#: Steps, each half of the one before: the largest one for first and for second derivatives.
_FIRST, _SECOND = 0.03, 0.06
_HALVINGS = 3


def derivative(
    function: Callable[[Tensor], Tensor], y: Tensor, v: Tensor, accuracy: float
) -> tuple[Tensor, Tensor]:
    """First directional derivatives by extrapolated central differences, of order six.

    Args:
        function: Map of points (n, D) to tensors (n, ...).
        y: Points (n, D).
        v: Directions (n, k, D) of about the size of y; the step is a part of them.
        accuracy: Absolute accuracy of the values.

    Returns:
        The derivatives (n, k, ...), and the bound (n, k) of their error: the difference of the
        last two columns of the extrapolation, and what the accuracy of the values leaves.
    """
    steps = [_FIRST / 2**i for i in range(_HALVINGS)]
    sides = _values(function, y, v, [s for h in steps for s in (h, -h)])
    quotients = [(a - b) / (2 * h) for a, b, h in zip(sides[::2], sides[1::2], steps, strict=True)]
    return _extrapolated(quotients, 2.0 * accuracy / steps[-1])


def second_derivative(
    function: Callable[[Tensor], Tensor], y: Tensor, v: Tensor, accuracy: float
) -> tuple[Tensor, Tensor]:
    """Second derivatives along one direction twice; arguments and result as for the first."""
    steps = [_SECOND / 2**i for i in range(_HALVINGS)]
    middle, *sides = _values(function, y, v, [0.0, *(s for h in steps for s in (h, -h))])
    pairs = zip(sides[::2], sides[1::2], steps, strict=True)
    quotients = [(a - 2 * middle + b) / h**2 for a, b, h in pairs]
    return _extrapolated(quotients, 8.0 * accuracy / steps[-1] ** 2)


def _values(
    function: Callable[[Tensor], Tensor], y: Tensor, v: Tensor, steps: list[float]
) -> list[Tensor]:
    """Values at y + h v for the steps h, (n, k, ...) each, in one call."""
    points = torch.stack([y[:, None] + h * v for h in steps])
    values = function(points.reshape(-1, y.shape[-1]))
    return list(values.reshape(*points.shape[:-1], *values.shape[1:]))


def _extrapolated(quotients: list[Tensor], rounding: float) -> tuple[Tensor, Tensor]:
    """Richardson's tableau of quotients whose errors are even powers of the step."""
    columns = [quotients]
    while len(columns[-1]) > 1:
        factor = 4.0 ** len(columns)
        last = columns[-1]
        columns.append([b + (b - a) / (factor - 1.0) for a, b in itertools.pairwise(last)])
    best, before = columns[-1][-1], columns[-2][-1]
    truncation = (best - before).flatten(2).norm(dim=2)
    return best, truncation + rounding
