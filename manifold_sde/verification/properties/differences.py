"""Derivatives of a map by differences, with what the truncation leaves.

Steps are halved until the bound is small: a manifold that bends sharply has its differences settle
at steps that are shorter than its radius of curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Steps = tuple[float, ...]

#: The largest step for first and for second derivatives.
FIRST, SECOND = 0.03, 0.06
#: Further halvings at most, and the bound above which they are made, in units of the accuracy of
#: the values.
_HALVINGS, _ENOUGH = 6, 1e8
#: Part of their last change by which quotients that are settling change at most: 1/4 in the limit.
_SETTLING = 0.5


def derivative(
    function: Callable[[Tensor], Tensor],
    y: Tensor,
    v: Tensor,
    accuracy: float,
    step: float = FIRST,
) -> tuple[Tensor, Tensor]:
    """First directional derivatives by extrapolated central differences, of order six.

    Args:
        function: Map of points (n, D) to tensors (n, ...).
        y: Points (n, D).
        v: Directions (n, k, D) of about the size of y; the step is a part of them.
        accuracy: Absolute accuracy of the values.
        step: The largest step.

    Returns:
        The derivatives (n, k, ...), and the bound (n, k) of their error: the difference of the
        last two columns of the extrapolation, and what the accuracy of the values leaves; where
        quotients have not settled, their last change too.
    """
    shape, points = v.shape[:2], _each(y, v.shape[1])

    def quotients(which: Tensor, steps: Steps) -> list[Tensor]:
        sides = _beside(function, points[which], v.flatten(0, 1)[which], steps)
        return [(above - below) / (2.0 * h) for h, below, above in sides]

    found = _extrapolated(quotients, len(points), step, lambda h: 2.0 * accuracy / h, accuracy)
    return found[0].unflatten(0, shape), found[1].unflatten(0, shape)


def second_derivative(
    function: Callable[[Tensor], Tensor],
    y: Tensor,
    v: Tensor,
    accuracy: float,
    step: float = SECOND,
) -> tuple[Tensor, Tensor]:
    """Second derivatives along one direction twice; arguments and result as for the first."""
    shape, points = v.shape[:2], _each(y, v.shape[1])
    middle = _each(function(y), v.shape[1])

    def quotients(which: Tensor, steps: Steps) -> list[Tensor]:
        sides = _beside(function, points[which], v.flatten(0, 1)[which], steps)
        return [(above - 2.0 * middle[which] + below) / h**2 for h, below, above in sides]

    found = _extrapolated(quotients, len(points), step, lambda h: 8.0 * accuracy / h**2, accuracy)
    return found[0].unflatten(0, shape), found[1].unflatten(0, shape)


def _each(x: Tensor, count: int) -> Tensor:
    """What belongs to points (n, ...), so many times each: (n k, ...)."""
    return x.repeat_interleave(count, 0)


def _beside(
    function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, steps: Steps
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Steps h, and the values at x - h v and x + h v, (n, ...) each, all in one call."""
    values = function(torch.cat([x + s * v for h in steps for s in (-h, h)])).split(len(x))
    return zip(steps, values[::2], values[1::2], strict=True)


def _extrapolated(
    quotients: Callable[[Tensor, Steps], list[Tensor]],
    count: int,
    step: float,
    rounding: Callable[[float], float],
    accuracy: float,
) -> tuple[Tensor, Tensor]:
    """So many quotients, whose errors are even powers of the step, and the bounds of their errors.

    Args:
        quotients: Function of the numbers of some of them, and of steps.
        count: How many they are.
        step: The largest step.
        rounding: What the accuracy of the values leaves at a step.
        accuracy: That accuracy.
    """
    which = torch.arange(count)
    last = quotients(which, (step, step / 2.0, step / 4.0))
    best, bound = _romberg(last, rounding(step / 4.0))
    for i in range(3, 3 + _HALVINGS):
        again = bound[which] > _ENOUGH * accuracy
        if not bool(again.any()):
            break
        which = which[again]
        last = [last[1][again], last[2][again], *quotients(which, (step / 2**i,))]
        values, own = _romberg(last, rounding(step / 2**i))
        better = own < bound[which]
        best[which[better]], bound[which[better]] = values[better], own[better]
    return best, bound


def _romberg(quotients: list[Tensor], rounding: float) -> tuple[Tensor, Tensor]:
    """Richardson's extrapolation of quotients (n, ...) at three steps, and its bound (n,)."""
    first, second, third = quotients
    before, best = second + (second - first) / 3.0, third + (third - second) / 3.0
    found = best + (best - before) / 15.0
    truncation, moved, earlier = (
        gap.flatten(1).norm(dim=1) for gap in (found - best, third - second, second - first)
    )
    settling = moved <= _SETTLING * earlier
    return found, rounding + torch.where(settling, truncation, truncation + moved)
