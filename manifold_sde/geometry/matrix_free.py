r"""The range of H by products: nothing of size D x D, J never stored whole.

At y on the manifold H has rank M and an orthonormal basis Q (D, M) of eigenvectors. An
implementation makes the eigenvalues and what it takes to multiply by Q and its transpose; the rest
follows: the projection P v = v - Q Q^T v, the pseudo-inverse, Newton's method, and the sums of
third derivatives. The implementations are in
:mod:`~manifold_sde.geometry.matrix_free_spaces`.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde import rng
from manifold_sde.columns import column_norms
from manifold_sde.deadline import consult
from manifold_sde.derivatives import THIRD_COPIES, is_followed, unit_rows
from manifold_sde.geometry.kernels import at_one_point
from manifold_sde.geometry.normal_space import Frame, NormalSpace, to_unit
from manifold_sde.loss import slices
from manifold_sde.problem import Problem

#: Part of a step that the next one may have along it, so that their difference tells something.
_LEARNT = 0.5
#: Numbers of vectors, and of as many layers as samples of the root of their size, in a cache.
_CACHED = 2**17
#: Tensors of the size of a block that are alive at once while its rows are worked on.
_COPIES = 8

#: Vectors (b, D) and their partners (b, D): Sigma = sym(sum of a_j b_j^T).
Pairs = tuple[Tensor, Tensor]


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric matrix; NaN where it is not finite."""
    finite = torch.isfinite(matrix).all()
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    # LAPACK refuses what is not finite.
    values, vectors = torch.linalg.eigh(torch.where(finite, matrix, identity))
    return torch.where(finite, values, torch.nan), vectors


def fixed_vectors(y: Tensor, count: int) -> Tensor:
    """Fixed random orthonormal columns (D, k), in the dtype and on the device of y (D,)."""
    paths = torch.arange(count, device=y.device)
    zero = torch.zeros((), dtype=torch.int64, device=y.device)
    normals = rng.normals((0x5EED, 4), 0, paths, zero, len(y), y.dtype)
    return torch.linalg.qr(normals.reshape(len(y), count))[0]


class MatrixFreeSpace(NormalSpace):
    """The range of H by products.

    Methods that end in ``_at`` are of ONE point, composable with ``torch.func``.

    Args:
        problem: The problem.
        rank: Rank M.
        memory: Bytes that a block of vectors may take together with what is computed from it.
    """

    label = "MatrixFreeField"
    fresh_steps = 0
    shared_steps = 4

    def __init__(self, problem: Problem, rank: int, memory: int) -> None:
        super().__init__(problem, rank)
        self.memory = memory

    def block(self, x: Tensor, copies: int = 1) -> int:
        """Number of vectors of the size of x that fit into the memory.

        Each comes with what the samples pass through: so many copies of it.
        """
        vector = _COPIES * x.element_size() * self.loss.dim
        return max(1, self.memory // (vector + self.loss.held(copies)))

    @property
    def few(self) -> int:
        """Number of vectors that go through the samples together: more fall out of the cache."""
        layers = (self.loss.n_samples or 1) * math.isqrt(self.loss.dim)
        return max(1, _CACHED // (self.loss.dim + layers))

    # At one point.

    @abstractmethod
    def start_at(self, y: Tensor) -> Tensor:
        """A reference basis from nothing: (D,) -> (D, d)."""

    @abstractmethod
    def frame_at(self, y: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues (M,), ascending, and what multiplies by Q: (D,), (D, d) -> (M,), (k, M)."""

    @abstractmethod
    def reference_at(self, y: Tensor, frame: Frame) -> Tensor:
        """The reference basis that a frame makes for points nearby: (D, d)."""

    @abstractmethod
    def components_at(self, y: Tensor, frame: Frame, v: Tensor) -> Tensor:
        """Q^T v: (D,) -> (M,)."""

    @abstractmethod
    def combine_at(self, y: Tensor, frame: Frame, c: Tensor) -> Tensor:
        """Q c: (M,) -> (D,)."""

    @abstractmethod
    def third_of_inverse_at(self, y: Tensor, frame: Frame) -> Tensor:
        """Script T of H^+, up to a part in the range of H: (D,)."""

    @abstractmethod
    def displacement_at(self, y: Tensor, frame: Frame, x: Tensor) -> Tensor:
        """What Newton's method takes away from x, by the frame of y: (D,)."""

    def project_at(self, y: Tensor, frame: Frame, v: Tensor) -> Tensor:
        """P v: (D,) -> (D,). The second pass removes the rounding of a squared Jacobian."""
        for _ in range(2):
            v = v - self.combine_at(y, frame, self.components_at(y, frame, v))
        return v

    def inverse_at(self, y: Tensor, frame: Frame, v: Tensor) -> Tensor:
        """H^+ v: (D,) -> (D,)."""
        return self.combine_at(y, frame, self.components_at(y, frame, v) / frame[0])

    def products(self, y: Tensor, columns: Tensor) -> Tensor:
        """H A in blocks of columns: (D,), (D, k) -> (D, k)."""
        parts = [
            self.loss.hessian_products(y, part, self.few) for part in columns.T.split(self.block(y))
        ]
        return torch.cat(parts).T

    def script_t_at(self, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Sum over k of d^2(grad L)[a_k, b_k], rows (k, D) each: -> (D,)."""
        size, total = min(self.block(y, THIRD_COPIES), self.few), torch.zeros_like(y)
        for p, q in zip(a.split(size), b.split(size), strict=True):
            consult()
            total = total + vmap(lambda s, t: self.loss.third_derivative(y, s, t))(p, q).sum(0)
        return total

    def eigenvectors_at(self, y: Tensor, frame: Frame) -> Iterator[tuple[slice, Tensor]]:
        """The eigenvectors as rows, in blocks: which, and (b, D)."""
        for which, units in self._unit_rows(y, self.rank):
            yield which, vmap(lambda c: self.combine_at(y, frame, c))(units)

    def noise_pairs_at(self, y: Tensor) -> Iterator[Pairs]:
        """Columns of sigma(y), each with itself."""
        for which in slices(self.noise.n_components(self.loss), self.block(y)):
            block = self.noise.columns(self.loss, y, which)
            yield block, block

    def _unit_rows(self, y: Tensor, count: int) -> Iterator[tuple[slice, Tensor]]:
        """Unit vectors in blocks: which, and (b, count)."""
        size = self.block(y)
        for first in range(0, count, size):
            last = min(first + size, count)
            yield slice(first, last), unit_rows(count, first, last, y)

    # At many, points last.

    def at_once(self, y: Tensor) -> int:
        """Number of points whose frames fit into the memory."""
        return max(1, self.block(y) // max(1, self.rank))

    def over_points(self, function: Callable[..., Any], *arguments: Tensor) -> Any:
        """A function of arrays with the points last, on as many points at once as fit."""
        size, n = self.at_once(arguments[0]), arguments[0].shape[-1]
        if n <= size:
            return function(*arguments)
        found = [
            function(*(a[..., first : first + size] for a in arguments))
            for first in range(0, n, size)
        ]
        if isinstance(found[0], Tensor):
            return torch.cat(found, -1)
        return tuple(torch.cat(parts, -1) for parts in zip(*found, strict=True))

    def at_points(self, function: Callable[..., Any], *arguments: Tensor) -> Any:
        """A function of ONE point at all points, as many at once as fit."""
        return self.over_points(functools.partial(each, function), *arguments)

    def reference_basis(self, y: Tensor) -> Tensor:
        """Reference bases from nothing: (D, n) -> (D, d, n)."""
        result: Tensor = each(self.start_at, y)
        return result

    def frame(self, y: Tensor, basis: Tensor) -> Frame:
        """Eigenvalues (M, n), and what multiplies by the eigenvectors (k, M, n)."""
        frame: Frame = each(self.frame_at, y, basis)
        return frame

    def project(self, y: Tensor, frame: Frame, v: Tensor) -> Tensor:
        """P v: (D, n) -> (D, n)."""
        result: Tensor = each(lambda z, u, *f: self.project_at(z, f, u), y, v, *frame)
        return result

    def inverse(self, y: Tensor, frame: Frame, v: Tensor) -> Tensor:
        """H^+ v: (D, n) -> (D, n)."""
        result: Tensor = each(lambda z, u, *f: self.inverse_at(z, f, u), y, v, *frame)
        return result

    def third_of_inverse(self, y: Tensor, frame: Frame) -> Tensor:
        """Script T of H^+, up to a part in the range of H: (D, n)."""
        result: Tensor = each(lambda z, *f: self.third_of_inverse_at(z, f), y, *frame)
        return result

    def third_of_projection(self, y: Tensor, frame: Frame) -> Tensor:
        """H^+ script T of P = I - Q Q^T, by D + M third derivatives: (D, n)."""

        def at_one(z: Tensor, *f: Tensor) -> Tensor:
            total = torch.zeros_like(z)
            for _, units in self._unit_rows(z, len(z)):
                total = total + self.script_t_at(z, units, units)
            for _, rows in self.eigenvectors_at(z, f):
                total = total - self.script_t_at(z, rows, rows)
            return self.inverse_at(z, f, total)

        result: Tensor = each(at_one, y, *frame)
        return result

    def contract(
        self,
        y: Tensor,
        frame: Frame,
        *,
        mixed: float,
        normal: float,
        tangent: bool = False,
        covariance: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sums of third derivatives along pairs of vectors, a block of them in memory."""
        given = tuple(a for a in (covariance, factor) if a is not None)

        def at_one(z: Tensor, values: Tensor, weights: Tensor, *own: Tensor) -> Pairs:
            size = self.block(z)
            if covariance is not None:
                identity = torch.eye(len(z), dtype=z.dtype, device=z.device)
                pairs: Any = zip(own[0].split(size), identity.split(size), strict=True)
            elif factor is not None:
                pairs = ((block, block) for block in own[0].T.split(size))
            elif not tangent and self.rank < self.noise.n_components(self.loss):
                return self._contract_noise_at(z, (values, weights), mixed, normal)
            else:
                pairs = self.noise_pairs_at(z)
            return self._contract_at(z, (values, weights), pairs, mixed, normal, tangent)

        result: Pairs = each(at_one, y, *frame, *given)
        return result

    def _contract_at(
        self,
        y: Tensor,
        frame: Frame,
        pairs: Iterator[Pairs],
        mixed: float,
        normal: float,
        tangent: bool,
    ) -> Pairs:
        values = frame[0]
        along, across = torch.zeros_like(y), torch.zeros_like(y)
        inner = y.new_zeros(len(values), len(values))

        def split(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Q^T v, H^+ v and P v of rows."""
            components = vmap(lambda z: self.components_at(y, frame, z))(v)
            inverse = vmap(lambda c: self.combine_at(y, frame, c / values))(components)
            return components, inverse, vmap(lambda z: self.project_at(y, frame, z))(v)

        for a, b in pairs:
            left = split(a)
            right = left if b is a else split(b)
            inner = inner + left[0].T @ right[0]
            if b is a:
                across = across + mixed * self.script_t_at(y, left[1], left[2])
            else:
                both = torch.cat([left[1], right[1]]), torch.cat([right[2], left[2]])
                across = across + (0.5 * mixed) * self.script_t_at(y, *both)
            if tangent:
                along = along + self.script_t_at(y, left[2], right[2])
        inner = (0.5 * normal) * (inner + inner.T) / (values[:, None] + values[None, :])
        parts = _pairs_of(inner)
        for which in slices(len(parts[0]), self.block(y)):
            rows = [vmap(lambda c: self.combine_at(y, frame, c))(part[which]) for part in parts]
            across = across + self.script_t_at(y, *rows)
        return along, across

    def _contract_noise_at(self, y: Tensor, frame: Frame, mixed: float, normal: float) -> Pairs:
        """As :meth:`_contract_at` of the noise, by Sigma q of the M eigenvectors q of H.

        N Sigma = sum of q (Sigma q)^T: a forward pass, a reverse pass and a third derivative for
        each of them, in place of those for each column of sigma.
        """
        values, across = frame[0], torch.zeros_like(y)
        rows = torch.cat(
            [
                vmap(lambda v: self.noise.transposed_product(self.loss, y, v))(q)
                for _, q in self.eigenvectors_at(y, frame)
            ]
        )
        inner = normal * (rows @ rows.T) / (values[:, None] + values[None, :])

        def image(w: Tensor) -> Tensor:
            return self.project_at(y, frame, self.noise.product(self.loss, y, w))

        for which, q in self.eigenvectors_at(y, frame):
            images = vmap(image)(rows[which]) * (mixed / values[which])[:, None]
            columns = vmap(lambda c: self.combine_at(y, frame, c))(inner[which])
            across = across + self.script_t_at(y, q, images + columns)
        return torch.zeros_like(y), across

    def noise_correction(self, y: Tensor, frame: Frame) -> Tensor:
        """Sum over j of the derivative of sigma_j along P sigma_j: (D, n).

        Where that along sigma_j costs little, what is along the M eigenvectors is taken away.
        """
        count = self.noise.n_components(self.loss)

        turned = functools.partial(self.noise.turned, self.loss)

        def at_one(z: Tensor, *f: Tensor) -> Tensor:
            def column(w: Tensor) -> Tensor:
                return turned(z, w, self.project_at(z, f, self.noise.product(self.loss, z, w)))

            def normal(q: Tensor) -> Tensor:
                return turned(z, self.noise.transposed_product(self.loss, z, q), q)

            total = self.noise.own_correction(self.loss, z) if self.rank < count else None
            if total is not None:
                for _, rows in self.eigenvectors_at(z, f):
                    total = total - vmap(normal)(rows).sum(0)
                return total
            total = torch.zeros_like(z)
            for _, units in self._unit_rows(z, count):
                total = total + vmap(column)(units).sum(0)
            return total

        result: Tensor = each(at_one, y, *frame)
        return result

    # Newton's method.

    def newton_step(self, y: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A step with a frame of its own, which makes the next reference."""
        frame, basis = self.settle(y, basis)
        return *self.shared_step(y, frame), basis

    def settle(self, y: Tensor, basis: Tensor) -> tuple[Frame, Tensor]:
        """The frame with the point at which it was made, and its reference."""
        frame = self.frame(y, basis)
        basis = each(lambda z, *f: self.reference_at(z, f), y, *frame)
        return (y, *frame), basis

    def shared_step(self, y: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
        """By the frame of a point nearby."""

        def at_one(x: Tensor, base: Tensor, *f: Tensor) -> tuple[Tensor, Tensor]:
            return to_unit(x, self.displacement_at(base, f, x))

        result: tuple[Tensor, Tensor] = each(at_one, y, *frame)
        return result

    def arrive(self, y: Tensor, frame: Frame, left: Tensor, small: float) -> tuple[Tensor, Tensor]:
        """The last steps, by Broyden's method from a shared frame; points that arrived stay.

        Source: Kelley, "Iterative Methods for Linear and Nonlinear Equations", SIAM 1995, 7.3.
        """

        def displacement(x: Tensor, base: Tensor, *f: Tensor) -> Tensor:
            return self.displacement_at(base, f, x)

        moves: list[Tensor] = []
        for _ in range(self.shared_steps):
            moves.append(_by_broyden(each(displacement, y, *frame), moves))
            end, length = y - moves[-1], column_norms(moves[-1])
            on_the_way = ~(left <= small)
            y, left = (
                torch.where(on_the_way, end / column_norms(end), y),
                torch.where(on_the_way, length, left),
            )
            if bool((left <= small).all()):
                break
        return y, left


def _by_broyden(move: Tensor, before: list[Tensor]) -> Tensor:
    """A step (D, n) with the curvature that those before it have shown."""

    def share(of: Tensor) -> Tensor:
        return (of * move).sum(0) / (of * of).sum(0).clamp(min=torch.finfo(of.dtype).tiny)

    plain = move
    for last, following in itertools.pairwise(before):
        move = move + following * share(last)
    if not before:
        return plain
    part = share(before[-1])
    # Where steps do not become shorter there is nothing to be learnt from them.
    return torch.where(part.abs() < _LEARNT, move / (1.0 - part), plain)


def _pairs_of(matrix: Tensor) -> Pairs:
    """Rows (k, M) and partners whose products add up to a symmetric matrix (M, M).

    Of the solution of a Lyapunov equation with few columns a few dozen eigenvalues are more than
    rounding, whatever M is (Penzl, Systems & Control Letters 40, 2000). In a transform it is not
    known which, and there are M pairs.
    """
    if is_followed(matrix):
        return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device), matrix
    sizes, axes = eigen(matrix)
    small = sizes.abs() < torch.finfo(sizes.dtype).eps * sizes.abs().max()
    rows = axes[:, ~small].T
    return rows, rows * sizes[~small, None]


def each(function: Callable[..., Any], *arguments: Tensor) -> Any:
    """A function of one point at all points, points last; what has one point serves all."""
    n = max(a.shape[-1] for a in arguments)
    if n == 1:
        return at_one_point(function, *arguments)
    one = [a.shape[-1] == 1 < n for a in arguments]
    dims = tuple(None if o else -1 for o in one)
    given = (a[..., 0] if o else a.contiguous() for a, o in zip(arguments, one, strict=True))
    return vmap(function, in_dims=dims, out_dims=-1)(*given)
