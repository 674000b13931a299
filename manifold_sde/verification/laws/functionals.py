"""Functions of the direction and of paths whose means are compared, declared before drawing.

Over short times a pilot run of the direction diffusion, at u and at u (1 + departure) on the same
Brownian paths, gives the principal coordinates of the directions, the spread of each functional,
and the effect that a clock (a time scale, a variance of the noise) has on it that is off by the
departure. In equilibrium a random walk over Gamma_1 that does not know the noise gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manifold_sde.verification.laws.engine import Array
from manifold_sde.verification.subject import Subject

#: Principal coordinates of a pilot run that are compared.
_COORDINATES = 2
#: Part of the largest variance above which a coordinate's increments count as well.
_WIDE = 0.25
#: Spread, in units of what is at hand, up to which a functional counts as constant.
_CONSTANT = 1e-6
#: Components of a random walk that are compared, and part of the variance below which one is none.
_MOST, _NEGLIGIBLE = 4, 1e-4


@dataclass(frozen=True)
class PathFunctional:
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


def path_functionals(
    subject: Subject, directions: Tensor, wrong: Tensor, growth: Tensor
) -> tuple[PathFunctional, ...]:
    """The functionals of paths from the start, by a pilot run.

    Args:
        subject: The system under test.
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
    wide = axes[:, values.flip(0)[:kept] > _WIDE * values[-1]]

    def along(axis: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda y0, y: (_unit(y[-1]) - centre) @ axis

    def variation(y0: Tensor, y: Tensor) -> Tensor:
        """Sum of the squares of the increments along the axes, from moment to moment."""
        path = torch.cat([y0.expand_as(y[:1]), y])
        return (_unit(path).diff(dim=0) @ wide).square().sum((0, -1))

    candidates: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        **{f"coordinate {j + 1}": along(axes[:, j]) for j in range(kept)},
        "quadratic variation": variation,
        "log pdet H": lambda y0, y: subject.geometry.log_pseudo_determinant(_unit(y[-1])),
        "log tr Sigma": lambda y0, y: subject.problem.noise_trace(_unit(y[-1])).log(),
    }
    found = []
    for name, function in candidates.items():
        compute = _as_numpy(function)
        right, off = compute(subject.start, directions), compute(subject.start, wrong)
        if right.std() > _CONSTANT * max(1.0, float(np.abs(right).max())):
            effect = abs(float((off - right).mean()))
            spread, wider = float(right.std()), max(float(off.std() - right.std()), 0.0)
            found.append(PathFunctional(name, False, compute, spread, effect, wider))
    norm = _as_numpy(lambda y0, y: y[-1].norm(dim=-1).log())
    moved = 0.25 * (growth[1] - growth[0])
    spread = 0.25 * float(growth[0].std())
    return (*found, PathFunctional("log norm", True, norm, spread, float(moved.mean().abs())))


def _unit(y: Tensor) -> Tensor:
    return y / y.norm(dim=-1, keepdim=True)


def _as_numpy(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Array]:
    def compute(y0: Tensor, y: Tensor) -> Array:
        values: Array = function(y0, y).detach().cpu().double().numpy()
        return values

    return compute


class Functionals(Mapping[str, Callable[[Array], Array]]):
    """The components of the direction along which the manifold is longest, and their products.

    They are the principal components of a random walk over Gamma_1 that does not depend on the
    noise: for a curve, a surface or a sphere they are its first harmonics.

    Args:
        points: Points of Gamma_1, (n, D).
    """

    def __init__(self, points: Tensor) -> None:
        values = points.numpy()
        self.center = values.mean(0)
        _, sizes, axes = np.linalg.svd(values - self.center, full_matrices=False)
        kept = int((sizes**2 > _NEGLIGIBLE * (sizes**2).sum()).sum())
        self.axes = axes[: min(max(kept, 1), _MOST)]
        count = len(self.axes)
        self._pairs = [(i, j) for i in range(count) for j in range(i, count)][: 2 * count]
        self._names = [f"component {i + 1}" for i in range(count)]
        self._names += [
            f"component {i + 1} squared" if i == j else f"components {i + 1} and {j + 1}"
            for i, j in self._pairs
        ]

    def table(self, directions: Array | Tensor) -> Array:
        """All values at directions: (n, D) -> (n, m)."""
        points = directions.numpy() if isinstance(directions, Tensor) else directions
        components = (points - self.center) @ self.axes.T
        products = [components[:, i] * components[:, j] for i, j in self._pairs]
        return np.concatenate([components, np.stack(products, 1)], 1)

    def tensor(self, directions: Tensor) -> Tensor:
        """All values as a tensor, as solutions ask for: (n, D) -> (n, m)."""
        return torch.from_numpy(self.table(_unit(directions).detach().cpu().to(torch.float64)))

    def __getitem__(self, name: str) -> Callable[[Array], Array]:
        if name not in self._names:
            raise KeyError(name)
        column = self._names.index(name)
        return lambda points: np.asarray(self.table(points)[:, column])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
