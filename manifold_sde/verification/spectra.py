r"""The range of H and the extremes of the noise along it, by products: no matrix is D x D.

Nothing here comes from :mod:`manifold_sde.geometry`, which it is used to check. At a point of the
manifold H has rank M, so that its products with a few more than M random vectors span its range
(Halko, Martinsson and Tropp, SIAM Review 53, 2011); fresh vectors say what is left outside. The
extremes of a covariance are those of Lanczos' method from a random vector: after k steps in n
dimensions the smallest Ritz value :math:`\theta` is above the smallest eigenvalue, and with
probability :math:`1 - \delta` by at most

.. math::

    \Bigl(\frac{\ln(1.648\sqrt n / \delta)}{2k - 1}\Bigr)^2 (\lambda_{\max} - \lambda_{\min})

(Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor
from torch.func import vmap

from manifold_sde.deadline import consult
from manifold_sde.errors import RankError
from manifold_sde.geometry.rank import gap_ratios
from manifold_sde.loss_checks import fixed_directions
from manifold_sde.problem import Problem

#: Vectors that H is multiplied by at once.
_BLOCK = 32
#: Products that are computed together: each holds what the samples pass through.
_AT_ONCE = 8
#: Size, relative to the largest eigenvalue, below which what H makes of a vector is rounding.
_FLOOR = 1e-11
#: Probability that what is said to be all is not.
DOUBT = 1e-4
#: Bytes that a basis may take.
_MOST_BYTES = 2**32
#: Bytes of a block of the basis: more than what glibc's allocator puts among other things.
_SLAB_BYTES = 2**25 + 2**12
#: Steps of Lanczos' method, and the length of a step, relative to the largest eigenvalue, at which
#: it has seen all eigenvalues.
_STEPS, _ENDED = 160, 1e-12


@dataclass(frozen=True)
class HessianRange:
    """The range of H at a point of the manifold.

    Attributes:
        values: The eigenvalues of H that are not zero, ascending, (M,).
        gap: The smallest of them over the largest size that is left, which counts as at least
            rounding level.
        left: Largest size of an eigenvalue outside the range, over the largest eigenvalue: those
            that were found there, and what random vectors leave room for, but with the probability
            :data:`DOUBT`.
        lowest: The most negative eigenvalue found, over the largest; 0 where there is none.
        rows: Orthonormal rows that span the range, in blocks (b, D).
        weights: The eigenvectors in them, (k, M).
    """

    values: Tensor
    gap: float
    left: float
    lowest: float
    rows: tuple[Tensor, ...]
    weights: Tensor

    @property
    def rank(self) -> int:
        """Rank M of H."""
        return len(self.values)

    def components(self, v: Tensor) -> Tensor:
        """Q^T v of vectors: (..., D) -> (..., M)."""
        return torch.cat([v @ block.T for block in self.rows], -1) @ self.weights

    def combine(self, c: Tensor) -> Tensor:
        """Q c: (..., M) -> (..., D)."""
        parts = (c @ self.weights.T).split([len(block) for block in self.rows], -1)
        total = parts[0] @ self.rows[0]
        for part, block in zip(parts[1:], self.rows[1:], strict=True):
            total = total + part @ block
        return total

    def project(self, v: Tensor) -> Tensor:
        """P v, the part in ker H, of vectors (..., D). The second pass removes rounding."""
        for _ in range(2):
            v = v - self.combine(self.components(v))
        return v

    def eigenvector(self, index: int) -> Tensor:
        """One of the eigenvectors, (D,)."""
        unit = torch.zeros_like(self.values)
        unit[index] = 1.0
        return self.combine(unit)


def hessian_range(problem: Problem, y: Tensor, generator: torch.Generator) -> HessianRange:
    """The range of H at a point, by twice as many products with H as its rank.

    Args:
        problem: The problem.
        y: Point (D,).
        generator: Draws the random vectors.

    Raises:
        RankError: If H is zero or not finite, or a basis of its range does not fit into memory.
    """
    dim = len(y)

    def products(v: Tensor) -> Tensor:
        consult()
        along = functools.partial(problem.pointwise.hessian_product, y)
        return vmap(along, chunk_size=_AT_ONCE)(v)

    basis = _Rows(dim, y.dtype)
    scale, outside = 0.0, 0.0
    while True:
        probes = torch.randn(_BLOCK, dim, dtype=y.dtype, generator=generator)
        images = products(probes)
        if not bool(torch.isfinite(images).all()):
            raise _no_range("the Hessian is not finite", "NaN or infinity in its products")
        scale = max(scale, float(torch.linalg.matrix_norm(images, 2)) / math.sqrt(_BLOCK))
        if scale == 0.0:
            raise _no_range("the Hessian is zero", "zero products with random vectors")
        for _ in range(2):
            for block in basis.blocks:
                images = images - (images @ block.T) @ block
        sizes, directions = torch.linalg.svd(images, full_matrices=False)[1:]
        new = sizes > _FLOOR * scale * math.sqrt(_BLOCK)
        if not bool(new.any()) or basis.count >= dim:
            # An eigenvalue outside has its square times a chi-square for the squares' sum.
            quantile = float(stats.chi2.ppf(DOUBT, _BLOCK))
            outside = math.sqrt(float(sizes.square().sum()) / quantile)
            break
        basis.append(directions[new])
        if basis.count * dim * y.element_size() > _MOST_BYTES:
            raise _no_range(
                "the rank of the Hessian is too large to be found by products",
                f"more than {basis.count} nonzero eigenvalues in dimension {dim}",
            )
    rows = basis.blocks
    strips = []
    for some in itertools.chain.from_iterable(block.split(_BLOCK) for block in rows):
        images = products(some)
        strips.append(torch.cat([images @ other.T for other in rows], 1))
    inner = torch.cat(strips)
    values, vectors = torch.linalg.eigh(0.5 * (inner + inner.T))
    ratios = gap_ratios(torch.cat([values.new_tensor([outside]), values]))
    rank = int(ratios.argmax()) + 1
    order = values.abs().argsort(descending=True)
    kept = order[:rank].sort().values
    top = float(values[order[0]].abs())
    rest = max(outside, *values[order[rank:]].abs().tolist(), 0.0)
    return HessianRange(
        values=values[kept],
        gap=float(ratios[rank - 1]),
        left=rest / top,
        lowest=min(float(values[0]) / top, 0.0),
        rows=rows,
        weights=vectors[:, kept],
    )


class _Rows:
    """Rows (D,) that become more, in blocks (b, D) of a size that allocators keep apart.

    Small ones, kept between what is computed on the way, hold as much again of the memory.
    """

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        self.count = 0
        self._like = torch.empty(0, dim, dtype=dtype)
        self._slabs: list[Tensor] = []
        self._size = max(_BLOCK, -(-_SLAB_BYTES // (dim * self._like.element_size())))

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        """The rows."""
        left = self.count - self._size * (len(self._slabs) - 1)
        return (*self._slabs[:-1], *(slab[:left] for slab in self._slabs[-1:]))

    def append(self, rows: Tensor) -> None:
        """Add rows (k, D)."""
        for row in rows:
            place = self.count % self._size
            if place == 0:
                self._slabs.append(self._like.new_empty(self._size, len(row)))
            self._slabs[-1][place] = row
            self.count += 1


def _no_range(problem: str, received: str) -> RankError:
    return RankError(
        problem,
        received=received,
        expected="a Hessian of rank M, 1 or more, whose range fits into memory",
        remedy="a point of the manifold (x_init=x), or a smaller network of the same kind",
    )


@dataclass(frozen=True)
class Extremes:
    """The smallest and the largest eigenvalue of a covariance on a space.

    Attributes:
        largest: The largest Ritz value, which no eigenvalue's absence makes too large.
        smallest: The smallest Ritz value: the smallest eigenvalue is not above it.
        least: What the smallest eigenvalue is not below, but with the probability :data:`DOUBT`.
        vector: Unit vector of the smallest Ritz value, (D,).
        steps: Steps of Lanczos' method.
    """

    largest: float
    smallest: float
    least: float
    vector: Tensor
    steps: int


def extremes_of(
    product: Callable[[Tensor], Tensor],
    project: Callable[[Tensor], Tensor],
    first: Tensor,
    dims: int,
    steps: int = _STEPS,
) -> Extremes:
    """The extreme eigenvalues of a positive semidefinite matrix on a subspace, by Lanczos' method.

    Args:
        product: The matrix times a vector: (D,) -> (D,).
        project: Projection of a vector on the subspace.
        first: Random normal vector (D,).
        dims: Dimension n of the subspace.
        steps: Most steps k.
    """
    v = project(first)
    v = v / v.norm()
    vectors, diagonal, beside = [v], [], []
    ended, top = False, 0.0
    for _ in range(min(steps, dims)):
        consult()
        image = product(vectors[-1])
        diagonal.append(float(image @ vectors[-1]))
        top = max(top, float(image.norm()))
        for _ in range(2):
            for one in vectors:
                image = image - (image @ one) * one
        # Last, as the recursion multiplies what is outside the subspace.
        image = project(image)
        length = float(image.norm())
        ended = length <= _ENDED * top or len(vectors) == dims
        if ended:
            break
        beside.append(length)
        vectors.append(image / length)
    count = len(diagonal)
    small = torch.diag(first.new_tensor(diagonal))
    for i, length in enumerate(beside[: count - 1]):
        small[i, i + 1] = small[i + 1, i] = length
    values, inner = torch.linalg.eigh(small)
    low, high = max(float(values[0]), 0.0), float(values[-1])
    least = low
    if not ended:
        # Either end is off by at most this part of the whole, which is wider by as much.
        part = (math.log(2.0 * 1.648 * math.sqrt(dims) / DOUBT) / (2 * count - 1)) ** 2
        least = max(low - part * (high - low) / (1.0 - 2.0 * part), 0.0) if part < 0.5 else 0.0
    vector = project(torch.stack(vectors[:count], 1) @ inner[:, 0])
    return Extremes(high, low, least, vector / vector.norm(), count)


def largest_curvature(problem: Problem, y: Tensor, steps: int = 24) -> Tensor:
    """The largest eigenvalue of H at a point, from below, by Lanczos' method: (D,) -> ()."""
    first = fixed_directions(len(y), 1)[0].to(y)

    def product(v: Tensor) -> Tensor:
        return problem.pointwise.hessian_product(y, v)

    return y.new_tensor(extremes_of(product, lambda v: v, first, len(y), steps).largest)
