"""What of the law is compared, and how far a wrong clock moves it: declared before drawing.

A pilot run of the direction diffusion, at u and at u (1 + departure) on the same Brownian paths,
gives the principal coordinates of the directions, the spread of each functional, and the effect
that a clock (a time scale, a variance of the noise) has on it that is off by the departure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifold_sde.verification.subject import Subject

Array = NDArray[np.float64]

#: Principal coordinates that are compared.
_COORDINATES = 2
#: Part of the largest variance from which on a coordinate's increments count as well.
_WIDE = 0.25
#: Spread, in units of what is at hand, up to which a functional counts as constant.
_CONSTANT = 1e-6


@dataclass(frozen=True)
class Functional:
    """A functional of paths.

    Attributes:
        name: Its name.
        of_norm: Whether it looks at the norm.
        compute: Function of the start (D,) and states (K, n, D) at the moments that returns (n,).
        spread: Its standard deviation.
        effect: How far the departure moves its mean.
        wider: How much larger its standard deviation is where the clock is off by the departure.
    """

    name: str
    of_norm: bool
    compute: Callable[[Tensor, Tensor], Array]
    spread: float
    effect: float
    wider: float = 0.0

    def deviation(self, shares: tuple[float, ...], multiple: float) -> float:
        """Standard deviation of a difference of two means, times sqrt(n).

        The side whose mean varies most has a clock that is off, and so another spread.

        Args:
            shares: Variances of the means of the two sides, in units of the functional's over n.
            multiple: By how many times the departure the clock is off.
        """
        wrong = max(shares)
        off = self.spread + multiple * self.wider
        return math.sqrt(wrong * off**2 + (sum(shares) - wrong) * self.spread**2)


def declare(
    subject: Subject, start: Tensor, directions: Tensor, wrong: Tensor, growth: Tensor
) -> tuple[Functional, ...]:
    """The functionals for a problem, from its pilot run.

    Args:
        subject: The subject.
        start: Start of the diffusion (D,), of norm 1.
        directions: Directions at the moments (K, n, D).
        wrong: The same paths with the clock off by the departure.
        growth: 4 log of the norm at ratio 0 at the last moment, right and wrong, (2, n).

    Returns:
        The functionals that are not constant, and log |Y| in any case.
    """
    last = directions[-1]
    centre = last.mean(0)
    values, vectors = torch.linalg.eigh((last - centre).T @ (last - centre) / (len(last) - 1))
    kept = max(1, int((values[-_COORDINATES:] > 1e-4 * values[-1]).sum()))
    axes = vectors[:, -kept:].flip(1)
    # Signs are conventions of LAPACK's: the largest component is positive.
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    candidates: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
        (f"coordinate {j + 1}", _coordinate(centre, axes[:, j])) for j in range(kept)
    ]
    wide = values.flip(0)[:kept] > _WIDE * values[-1]
    candidates.append(("quadratic variation", _variation(axes[:, wide])))
    candidates += [
        ("log pdet H", lambda y0, y: subject.geometry.log_pseudo_determinant(_unit(y[-1]))),
        ("log tr Sigma", lambda y0, y: subject.problem.noise_trace(_unit(y[-1])).log()),
    ]
    found = []
    for name, function in candidates:
        compute = _as_numpy(function)
        right, off = compute(start, directions), compute(start, wrong)
        if right.std() > _CONSTANT * max(1.0, float(np.abs(right).max())):
            effect = abs(float((off - right).mean()))
            spread, wider = float(right.std()), max(float(off.std() - right.std()), 0.0)
            found.append(Functional(name, False, compute, spread, effect, wider))
    norm = _as_numpy(lambda y0, y: y[-1].norm(dim=-1).log())
    moved = 0.25 * (growth[1] - growth[0])
    spread = 0.25 * float(growth[0].std())
    return (*found, Functional("log norm", True, norm, spread, float(moved.mean().abs())))


def _unit(y: Tensor) -> Tensor:
    return y / y.norm(dim=-1, keepdim=True)


def _coordinate(centre: Tensor, axis: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda y0, y: (_unit(y[-1]) - centre) @ axis


def _variation(axes: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Sum of the squares of the increments along the axes, from moment to moment."""

    def variation(y0: Tensor, y: Tensor) -> Tensor:
        path = torch.cat([y0.expand_as(y[:1]), y])
        return (_unit(path).diff(dim=0) @ axes).square().sum((0, -1))

    return variation


def _as_numpy(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Array]:
    def compute(y0: Tensor, y: Tensor) -> Array:
        values: Array = function(y0, y).detach().cpu().double().numpy()
        return values

    return compute
