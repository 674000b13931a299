r"""Eigenvectors of H by products, in three ways.

- :class:`JacobianSpace`: least squares with zero residuals. With J J^T = W S W^T the basis is
  Q = J^T W S^{-1/2} and the eigenvalues are S / Xi: a frame is W S^{-1/2}, (Xi K, M), and J acts
  by forward and reverse mode.
- :class:`HessianSpace`: any loss. H has rank M, so its products with M columns near its range
  determine it: with B = H A one has H = B (A^T B)^{-1} B^T. A frame is Q itself.
- :class:`LeadingSpace`: the same where the rank is not known yet.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp, vmap

from manifold_sde import ghost_products
from manifold_sde.geometry.matrix_free import MatrixFreeSpace, eigen, fixed_vectors
from manifold_sde.geometry.normal_space import Frame
from manifold_sde.geometry.rank import normal_directions
from manifold_sde.loss import LeastSquaresLoss
from manifold_sde.problem import Problem

#: Strips in which a Gram matrix of rows that are all here is made.
_STRIPS = 8
#: Numbers of the rows that forward mode goes along together: more are slower.
_CACHED = 2**21
#: Rows that forward mode goes along at once: it holds the samples' activations for each.
_ALONG = 32


class JacobianSpace(MatrixFreeSpace):
    """Least squares where the residuals vanish: H = J^T J / Xi.

    Reference bases are empty: (D, 0).

    Args:
        problem: Least squares.
        rank: Rank M, at most the number of residuals.
        memory: As for :class:`MatrixFreeSpace`.
        floor: Eigenvalue, relative to the largest, up to which a direction has no slope, and is not
            moved in. On the manifold there is none.
    """

    loss: LeastSquaresLoss

    def __init__(self, problem: Problem, rank: int, memory: int, *, floor: float = 0.0) -> None:
        super().__init__(problem, rank, memory)
        assert isinstance(problem.pointwise, LeastSquaresLoss)
        self.loss = problem.pointwise
        self.floor = floor
        #: The last point where a frame was made, and J there as its layers give it.
        self._kept: tuple[Tensor, ghost_products.LayerJacobian] | None = None

    def start_at(self, y: Tensor) -> Tensor:
        """Empty."""
        return y.new_zeros(len(y), 0)

    def blocks(self, y: Tensor, most: int | None = None) -> Iterator[tuple[int, int, slice]]:
        """Blocks of samples: the first, the one after the last, and their residuals."""
        k = self.loss.n_outputs
        size = max(1, min(self.block(y), most or self.loss.n_residuals) // k)
        for first in range(0, self.loss.n_samples, size):
            last = min(first + size, self.loss.n_samples)
            yield first, last, slice(first * k, last * k)

    def gram(self, y: Tensor) -> Tensor:
        """J J^T: (D,) -> (Xi K, Xi K).

        From what layers receive, or else by forward mode along its rows where they are not all
        here: that costs less than a matrix product where samples have several outputs. Either way a
        block of rows meets those from its own on alone: the rest is the transpose.
        """
        layers = ghost_products.jacobian(self.loss, y)
        if layers is not None:
            kept = layers.size * y.element_size() <= self.memory
            self._kept = (y.clone(), layers) if kept else None
            return layers.gram()
        if self.loss.n_residuals <= self.block(y):
            rows = self.loss.rows(y, 0, self.loss.n_samples)
            size = -(-len(rows) // _STRIPS)
            begins = range(0, len(rows), size)
            return _symmetric([rows[i : i + size] @ rows[i:].T for i in begins])
        strips = []
        for first, last, _ in self.blocks(y, max(1, _CACHED // self.loss.dim)):
            rows = self.loss.rows(y, first, last)
            along = functools.partial(self.loss.residual_product, y, first=first)
            strips.append(vmap(along, chunk_size=_ALONG)(rows))
        return _symmetric(strips)

    def frame_at(self, y: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """S / Xi and W S^{-1/2}, from the M largest eigenvalues S of the Gram matrix."""
        squares, vectors = eigen(self.gram(y))
        first = len(squares) - self.rank
        squares, vectors = squares[first:], vectors[:, first:]
        scales = squares.rsqrt()
        if self.floor > 0.0:
            scales = torch.where(squares > self.floor * squares[-1], scales, 0.0)
            squares = squares.clamp(min=torch.finfo(squares.dtype).eps * squares[-1])
        return squares / self.loss.n_samples, vectors * scales

    def frame(self, y: Tensor, basis: Tensor) -> Frame:
        """S / Xi (M, n) and W S^{-1/2} (Xi K, M, n)."""
        if not ghost_products.singly(self.loss, y):
            return super().frame(y, basis)
        found = [
            self.frame_at(z, b) for z, b in zip(y.T.contiguous(), basis.movedim(-1, 0), strict=True)
        ]
        return tuple(torch.stack(parts, -1) for parts in zip(*found, strict=True))

    def reference_at(self, y: Tensor, frame: Frame) -> Tensor:
        """Empty."""
        return y.new_zeros(len(y), 0)

    def components_at(self, y: Tensor, frame: Frame, v: Tensor) -> Tensor:
        """Q^T v by one forward mode, or less."""
        layers = self._layers(y)
        moved = self.loss.residual_product(y, v) if layers is None else layers.product(v)
        return frame[1].T @ moved

    def combine_at(self, y: Tensor, frame: Frame, c: Tensor) -> Tensor:
        """Q c by one reverse mode, or less."""
        layers, weights = self._layers(y), frame[1] @ c
        if layers is None:
            return self.loss.residual_transposed_product(y, weights)
        return layers.transposed_product(weights)

    def _layers(self, y: Tensor) -> ghost_products.LayerJacobian | None:
        """J at a point, where it is kept from a frame there."""
        if self._kept is None or not ghost_products.is_by_layers(self.loss, y):
            return None
        there, layers = self._kept
        alike = (y.dtype, y.device) == (there.dtype, there.device)
        return layers if alike and torch.equal(y, there) else None

    def third_of_inverse_at(self, y: Tensor, frame: Frame) -> Tensor:
        """2 sum_i (Hessian of r_i) X_i, with X the rows of the transposed pseudo-inverse of J."""
        weights = frame[1] @ frame[1].T
        pull = vjp(self.loss.residuals, y)[1]
        total = torch.zeros_like(y)
        for first, last, which in self.blocks(y):
            dual = vmap(lambda w: pull(w)[0])(weights[which])
            total = total + self.loss.bend(y, first, last, dual)
        return 2.0 * total

    def displacement_at(self, y: Tensor, frame: Frame, x: Tensor) -> Tensor:
        """The Gauss-Newton step: J^+ r."""
        return self.combine_at(y, frame, frame[1].T @ self.loss.residuals(x))


class HessianSpace(MatrixFreeSpace):
    """Any loss: products of the Hessian with as many vectors as its rank.

    The reference basis is an orthonormal basis of the range of H at a point nearby, (D, M).
    """

    #: Where the rank was found: the largest eigenvalue beyond it, relative to the largest of all.
    beyond = 0.0

    def start_at(self, y: Tensor) -> Tensor:
        """Fixed vectors, multiplied by H twice."""
        near = fixed_vectors(torch.empty(self.loss.dim).to(y), self.rank)
        for _ in range(2):
            near = self.frame_at(y, near)[1]
        return near

    def frame_at(self, y: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of the H of rank M whose product with A is that of H."""
        images = self.products(y, basis)
        columns, upper = torch.linalg.qr(images)
        inner = basis.T @ images
        small = upper @ torch.linalg.solve(0.5 * (inner + inner.T), upper.T)
        values, vectors = eigen(0.5 * (small + small.T))
        return values, columns @ vectors

    def settle(self, y: Tensor, basis: Tensor) -> tuple[Frame, Tensor]:
        """The frame with its point; NaN where H is not positive, as at a saddle of the loss."""
        (point, values, vectors), basis = super().settle(y, basis)
        return (point, torch.where(values[0] > 0.0, values, torch.nan), vectors), basis

    def reference_at(self, y: Tensor, frame: Frame) -> Tensor:
        """The basis."""
        return frame[1]

    def components_at(self, y: Tensor, frame: Frame, v: Tensor) -> Tensor:
        """Q^T v."""
        return frame[1].T @ v

    def combine_at(self, y: Tensor, frame: Frame, c: Tensor) -> Tensor:
        """Q c."""
        return frame[1] @ c

    def third_of_inverse_at(self, y: Tensor, frame: Frame) -> Tensor:
        """Sum over i of d^2(grad L)[q_i, q_i] / lambda_i."""
        rows = frame[1].T
        return self.script_t_at(y, rows, rows / frame[0][:, None])

    def displacement_at(self, y: Tensor, frame: Frame, x: Tensor) -> Tensor:
        """Q Lambda^-1 Q^T grad L(x)."""
        return self.inverse_at(y, frame, self.loss.gradient(x))


class LeadingSpace(HessianSpace):
    """Any loss of unknown rank: as many leading eigenvectors of H as stand out.

    They are those of H in a subspace that has been multiplied by H: on the manifold exactly its
    range, off it approximately, which costs a flow iterations and no accuracy. Frames of different
    points differ in size. The reference basis has a few further columns.

    Args:
        problem: The problem.
        memory: As for :class:`MatrixFreeSpace`.
    """

    #: Eigenvalue, relative to the largest, above which a direction stands out.
    floor = 1e-4
    #: Columns to begin with, and beside those that stood out nearby; and their largest number.
    spare, most = 16, 512

    #: Newton step, relative to the norm, at which points count as near the manifold.
    nearby = 1e-9

    def __init__(self, problem: Problem, memory: int) -> None:
        super().__init__(problem, self.spare, memory)

    def start_at(self, y: Tensor) -> Tensor:
        """Fixed vectors."""
        return fixed_vectors(y, min(self.spare, len(y)))

    def approach(self, x: Tensor, steps: int) -> Tensor:
        """A point next to the manifold and near x, (D,), by at most so many Newton steps."""
        near = self.start_at(x)
        for _ in range(steps):
            frame = self.frame_at(x, near)
            step, near = self.displacement_at(x, frame, x), self.reference_at(x, frame)
            x = x - step
            if float(step.norm()) <= self.nearby * float(x.norm()):
                break
        return x

    def frame_at(self, y: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """The eigenvalues that stand out, ascending, and their vectors; at least one."""
        most = min(self.loss.dim, self.most)
        while True:
            columns = torch.linalg.qr(self.products(y, basis))[0]
            inner = columns.T @ self.products(y, columns)
            values, vectors = eigen(0.5 * (inner + inner.T))
            size = values.abs()
            out = size > self.floor * size.max()
            if not bool(out.all()) or basis.shape[1] >= most:
                break
            more = min(basis.shape[1], most - basis.shape[1])
            basis = torch.cat([columns, fixed_vectors(y, more)], dim=1)
        out = out | (size == size.max())
        return values[out], columns @ vectors[:, out]

    def reference_at(self, y: Tensor, frame: Frame) -> Tensor:
        """The basis, and room for more."""
        near = frame[1]
        more = min(self.spare, self.loss.dim - near.shape[1])
        return torch.cat([near, fixed_vectors(y, more)], dim=1) if more else near

    def displacement_at(self, y: Tensor, frame: Frame, x: Tensor) -> Tensor:
        """As for known rank, in the directions that are normal at this distance."""
        force = self.components_at(y, frame, self.loss.gradient(x))
        normal = normal_directions(frame[0][None], force[None], None)[0]
        return self.combine_at(y, frame, torch.where(normal, force / frame[0], 0.0))


def _symmetric(strips: list[Tensor]) -> Tensor:
    """A symmetric matrix (n, n) of its rows in blocks, each from its own diagonal on."""
    n = strips[0].shape[1]
    upper = torch.cat([F.pad(strip, (n - strip.shape[1], 0)) for strip in strips]).triu()
    return upper + upper.triu(1).T
