"""Functions of the direction whose means are compared, declared before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifold_sde.verification.subject import Subject

Array = NDArray[np.float64]
Functional = Callable[[Array], Array]

#: Largest number of components, and the part of the variance below which one is none.
_MOST, _NEGLIGIBLE = 4, 1e-4


class Functionals(Mapping[str, Functional]):
    """The components of the direction along which the manifold is longest, and their products.

    They are the principal components of a walk over Gamma_1 that does not depend on the noise: for
    a curve, a surface or a sphere they are its first harmonics.

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
        self._names = [f"component {i + 1}" for i in range(count)]
        self._pairs = [(i, j) for i in range(count) for j in range(i, count)][: 2 * count]
        self._names += [
            f"component {i + 1} squared" if i == j else f"components {i + 1} and {j + 1}"
            for i, j in self._pairs
        ]

    @classmethod
    def of(cls, subject: Subject) -> Functionals:
        """Those of the subject's walk."""
        walks = subject.walks
        return cls(walks[len(walks) // 3 :].flatten(0, 1))

    def table(self, directions: Array | Tensor) -> Array:
        """All values at directions: (n, D) -> (n, m)."""
        points = directions.numpy() if isinstance(directions, Tensor) else directions
        components = (points - self.center) @ self.axes.T
        products = [components[:, i] * components[:, j] for i, j in self._pairs]
        return np.concatenate([components, np.stack(products, 1)], 1)

    def tensor(self, directions: Tensor) -> Tensor:
        """All values as a tensor, as solutions ask for: (n, D) -> (n, m)."""
        unit = directions / directions.norm(dim=1, keepdim=True)
        return torch.from_numpy(self.table(unit.detach().cpu().to(torch.float64)))

    def __getitem__(self, name: str) -> Functional:
        column = self._names.index(name) if name in self._names else -1
        if column < 0:
            raise KeyError(name)
        return lambda points: np.asarray(self.table(points)[:, column])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
