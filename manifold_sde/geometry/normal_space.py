r"""The range of H at ONE point by products: nothing of size D x D, J never stored whole.

At y on the manifold H has rank M and an orthonormal basis Q (D, M) of eigenvectors. A route knows
how to make the eigenvalues and what it takes to multiply by Q and its transpose, a *frame*, and
everything else follows: the projection P v = v - Q Q^T v, the pseudo-inverse, Newton's step back
to the manifold, log pdet H, and the turning force T[H^+] of the drift.

- :class:`JacobianRoute`: least squares that interpolate. With J J^T = W S W^T the basis is
  Q = J^T W S^{-1/2} and the eigenvalues are S / Xi: a frame is W S^{-1/2}, (Xi K, M), and J acts
  by forward and reverse mode.
- :class:`LeadingRoute`: any loss whose rank is not known, on the way to the manifold.
- :class:`HessianRoute`: any loss. H has rank M, so its products with M columns near its range
  determine it: with B = H A one has H = B (A^T B)^{-1} B^T. A frame is Q itself.

Functions of single points, composable with ``torch.func``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import vjp, vmap

from manifold_sde import rng
from manifold_sde.derivatives import unit_rows
from manifold_sde.geometry.spectrum import normal_directions
from manifold_sde.loss import LeastSquaresLoss, Loss

#: Tensors of the size of a block that are alive at once while its rows are worked on.
_COPIES = 8


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


class NormalRoute(ABC):
    """Range of H at one point.

    Args:
        loss: The loss of one vector.
        rank: Rank M.
        memory: Bytes that a block of vectors may take together with what is computed from it.
    """

    def __init__(self, loss: Loss, rank: int, memory: int) -> None:
        self.loss = loss
        self.rank = rank
        self.memory = memory

    def block(self, x: Tensor) -> int:
        """Number of vectors of the size of x that fit into the memory."""
        return max(1, self.memory // (_COPIES * x.element_size() * self.loss.dim))

    @abstractmethod
    def frame(self, y: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues (M,), ascending, and what multiplies by Q: (D,), (D, d) -> (M,), (k, M)."""

    @abstractmethod
    def anchor(self, frame: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        """What a frame at a point nearby can be made from: (D, d)."""

    @abstractmethod
    def components(self, y: Tensor, frame: tuple[Tensor, Tensor], v: Tensor) -> Tensor:
        """Q^T v: (D,) -> (M,)."""

    @abstractmethod
    def combine(self, y: Tensor, frame: tuple[Tensor, Tensor], c: Tensor) -> Tensor:
        """Q c: (M,) -> (D,)."""

    @abstractmethod
    def turning(self, y: Tensor, frame: tuple[Tensor, Tensor]) -> Tensor:
        """Script T of H^+, up to a part in the range of H: (D,)."""

    @abstractmethod
    def newton_step(self, y: Tensor, frame: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        """Displacement that takes x towards the manifold, by the frame of y: to be subtracted."""

    def project(self, y: Tensor, frame: tuple[Tensor, Tensor], v: Tensor) -> Tensor:
        """P v: (D,) -> (D,). The second pass removes the rounding of a squared Jacobian."""
        for _ in range(2):
            v = v - self.combine(y, frame, self.components(y, frame, v))
        return v

    def inverse(self, y: Tensor, frame: tuple[Tensor, Tensor], v: Tensor) -> Tensor:
        """H^+ v: (D,) -> (D,)."""
        return self.combine(y, frame, self.components(y, frame, v) / frame[0])

    def script_t(self, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Sum over k of d^2(grad L)[a_k, b_k], rows (k, D) each: -> (D,)."""
        total = torch.zeros_like(y)
        size = self.block(y)
        for p, q in zip(a.split(size), b.split(size), strict=True):
            total = total + vmap(lambda s, t: self.loss.third_derivative(y, s, t))(p, q).sum(0)
        return total

    def basis_rows(self, y: Tensor, frame: tuple[Tensor, Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """The eigenvectors as rows, in blocks: which, and (b, D)."""
        size = self.block(y)
        for first in range(0, self.rank, size):
            last = min(first + size, self.rank)
            units = unit_rows(self.rank, first, last, y)
            yield slice(first, last), vmap(lambda c: self.combine(y, frame, c))(units)


class JacobianRoute(NormalRoute):
    """Least squares where the residuals vanish: H = J^T J / Xi.

    There is no anchor: (D, 0).

    Args:
        loss: Least squares of one vector.
        rank: Rank M, at most the number of residuals.
        memory: As for :class:`NormalRoute`.
        floor: Eigenvalue, relative to the largest, up to which a direction has no slope, and is not
            moved in. On the manifold there is none.
    """

    loss: LeastSquaresLoss

    def __init__(
        self, loss: LeastSquaresLoss, rank: int, memory: int, *, floor: float = 0.0
    ) -> None:
        super().__init__(loss, rank, memory)
        self.floor = floor

    def blocks(self, y: Tensor) -> Iterator[tuple[int, int, slice]]:
        """Blocks of samples: the first, the one after the last, and their residuals."""
        k = self.loss.n_outputs
        size = max(1, self.block(y) // k)
        for first in range(0, self.loss.n_samples, size):
            last = min(first + size, self.loss.n_samples)
            yield first, last, slice(first * k, last * k)

    def gram(self, y: Tensor) -> Tensor:
        """J J^T: (D,) -> (Xi K, Xi K); by forward mode along its rows where they are not all here.

        Forward mode costs less than a matrix product where samples have several outputs.
        """
        parts = []
        for first, last, _ in self.blocks(y):
            rows = self.loss.rows(y, first, last)
            if last - first == self.loss.n_samples:
                return rows @ rows.T
            parts.append(vmap(lambda v: self.loss.residual_product(y, v))(rows))
        gram = torch.cat(parts)
        return 0.5 * (gram + gram.T)

    def frame(self, y: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """S / Xi and W S^{-1/2}, from the M largest eigenvalues S of the Gram matrix."""
        squares, vectors = eigen(self.gram(y))
        first = len(squares) - self.rank
        squares, vectors = squares[first:], vectors[:, first:]
        scales = squares.rsqrt()
        if self.floor > 0.0:
            scales = torch.where(squares > self.floor * squares[-1], scales, 0.0)
            squares = squares.clamp(min=torch.finfo(squares.dtype).eps * squares[-1])
        return squares / self.loss.n_samples, vectors * scales

    def anchor(self, frame: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        """None."""
        return y.new_zeros(len(y), 0)

    def components(self, y: Tensor, frame: tuple[Tensor, Tensor], v: Tensor) -> Tensor:
        """Q^T v by one forward mode."""
        return frame[1].T @ self.loss.residual_product(y, v)

    def combine(self, y: Tensor, frame: tuple[Tensor, Tensor], c: Tensor) -> Tensor:
        """Q c by one reverse mode."""
        return self.loss.residual_transposed_product(y, frame[1] @ c)

    def turning(self, y: Tensor, frame: tuple[Tensor, Tensor]) -> Tensor:
        """2 sum_i (Hessian of r_i) X_i, with X the rows of the transposed pseudo-inverse of J."""
        weights = frame[1] @ frame[1].T
        pull = vjp(self.loss.residuals, y)[1]
        total = torch.zeros_like(y)
        for first, last, which in self.blocks(y):
            dual = vmap(lambda w: pull(w)[0])(weights[which])
            total = total + self.loss.bend(y, first, last, dual)
        return 2.0 * total

    def newton_step(self, y: Tensor, frame: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        """The step of Gauss and Newton: J^+ r."""
        return self.combine(y, frame, frame[1].T @ self.loss.residuals(x))


class HessianRoute(NormalRoute):
    """Any loss: products of the Hessian with as many vectors as its rank.

    The anchor of a point is an orthonormal basis of the range of H at a point nearby, (D, M).
    """

    def products(self, y: Tensor, columns: Tensor) -> Tensor:
        """H A in blocks of columns: (D,), (D, k) -> (D, k)."""
        parts = [
            vmap(lambda v: self.loss.hessian_product(y, v), in_dims=1, out_dims=1)(part)
            for part in columns.split(self.block(y), dim=1)
        ]
        return torch.cat(parts, dim=1)

    def frame(self, y: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of the H of rank M whose product with A is that of H."""
        images = self.products(y, anchor)
        columns, upper = torch.linalg.qr(images)
        inner = anchor.T @ images
        small = upper @ torch.linalg.solve(0.5 * (inner + inner.T), upper.T)
        values, vectors = eigen(0.5 * (small + small.T))
        return values, columns @ vectors

    def anchor(self, frame: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        """The basis."""
        return frame[1]

    def components(self, y: Tensor, frame: tuple[Tensor, Tensor], v: Tensor) -> Tensor:
        """Q^T v."""
        return frame[1].T @ v

    def combine(self, y: Tensor, frame: tuple[Tensor, Tensor], c: Tensor) -> Tensor:
        """Q c."""
        return frame[1] @ c

    def turning(self, y: Tensor, frame: tuple[Tensor, Tensor]) -> Tensor:
        """Sum over i of d^2(grad L)[q_i, q_i] / lambda_i."""
        rows = frame[1].T
        return self.script_t(y, rows, rows / frame[0][:, None])

    def newton_step(self, y: Tensor, frame: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        """Q Lambda^-1 Q^T grad L(x)."""
        return self.inverse(y, frame, self.loss.gradient(x))


class LeadingRoute(HessianRoute):
    """Any loss of unknown rank: as many leading eigenvectors of H as stand out.

    They are those of H in a subspace that has been multiplied by H: on the manifold exactly its
    range, off it approximately, which costs a flow iterations and no accuracy. Frames of different
    points differ in size. The anchor is a basis with a few further columns.

    Args:
        loss: The loss of one vector.
        memory: As for :class:`NormalRoute`.
    """

    #: Eigenvalue, relative to the largest, from which on a direction stands out.
    floor = 1e-4
    #: Columns to begin with, and beside those that stood out nearby; and their largest number.
    spare, most = 16, 512

    #: Newton step, relative to the norm, at which points count as near the manifold.
    nearby = 1e-9

    def __init__(self, loss: Loss, memory: int) -> None:
        super().__init__(loss, self.spare, memory)

    def start(self, y: Tensor) -> Tensor:
        """An anchor from nothing."""
        return fixed_vectors(y, min(self.spare, len(y)))

    def approach(self, x: Tensor, steps: int) -> Tensor:
        """A point next to the manifold and near x, (D,), by at most so many Newton steps."""
        near = self.start(x)
        for _ in range(steps):
            frame = self.frame(x, near)
            step, near = self.newton_step(x, frame, x), self.anchor(frame, x)
            x = x - step
            if float(step.norm()) <= self.nearby * float(x.norm()):
                break
        return x

    def frame(self, y: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """The eigenvalues that stand out, ascending, and their vectors; at least one."""
        most = min(self.loss.dim, self.most)
        while True:
            basis = torch.linalg.qr(self.products(y, anchor))[0]
            inner = basis.T @ self.products(y, basis)
            values, vectors = eigen(0.5 * (inner + inner.T))
            size = values.abs()
            out = size > self.floor * size.max()
            if not bool(out.all()) or anchor.shape[1] >= most:
                break
            more = min(anchor.shape[1], most - anchor.shape[1])
            anchor = torch.cat([basis, fixed_vectors(y, more)], dim=1)
        out = out | (size == size.max())
        return values[out], basis @ vectors[:, out]

    def anchor(self, frame: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        """The basis, and room for more."""
        near = frame[1]
        more = min(self.spare, self.loss.dim - near.shape[1])
        return torch.cat([near, fixed_vectors(y, more)], dim=1) if more else near

    def newton_step(self, y: Tensor, frame: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        """As for known rank, in the directions that are normal at this distance."""
        force = self.components(y, frame, self.loss.gradient(x))
        normal = normal_directions(frame[0][None], force[None], None)[0]
        return self.combine(y, frame, torch.where(normal, force / frame[0], 0.0))
