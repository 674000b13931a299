"""The range of H from the Hessian itself: one elimination a point, or its eigenbasis."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde.geometry.elimination import newton_displacement, tangent_basis, tangent_inverse
from manifold_sde.geometry.normal_space import Frame, NormalSpace, to_unit
from manifold_sde.noise import SphericalNoise
from manifold_sde.problem import Problem

#: Largest dimension in which anything of the size D x D is made, and D second derivatives taken.
DENSE_LIMIT = 1000


class DenseSpace(NormalSpace):
    """The route for every problem of moderate dimension: Hessians and third derivatives.

    Reference bases are tangent bases nearby (D, D - M, n). A frame is a tangent basis with the
    pseudo-inverse (D, D, n), by one elimination, which is all that the noise of (18) asks for; any
    other noise needs an eigenbasis: tangent basis, the M eigenvalues, and their eigenvectors.

    Args:
        problem: The problem.
        rank: Rank M of its Hessian on the manifold.
        eigenbasis: Whether frames are eigenbases; by default as the noise asks for.
    """

    label = "HessianField"
    fresh_steps = 1
    shared_steps = 4

    def __init__(
        self,
        problem: Problem,
        rank: int,
        *,
        eigenbasis: bool | None = None,
    ) -> None:
        super().__init__(problem, rank)
        isotropic = isinstance(problem.noise, SphericalNoise)
        self.eigenbasis = not isotropic if eigenbasis is None else eigenbasis

    # Frames.

    def reference_basis(self, y: Tensor) -> Tensor:
        """Tangent bases by eigenvectors: (D, n) -> (D, D - M, n)."""
        return self.eigenframe(y)[0].contiguous()

    def frame(self, y: Tensor, basis: Tensor) -> Frame:
        """Tangent bases, with the pseudo-inverse or with eigenvalues and eigenvectors."""
        if self.eigenbasis:
            return self.eigenframe(y)
        found: Frame | None = self.whole("frame", lambda s, *at: s.frame(*at), y, basis)
        if found is None:
            hessian = self.kernels.run_last("hessian", self.loss.hessian, y)
            found = self.kernels.run_last("elimination", tangent_inverse, hessian, basis)
        return found

    def tangent_frame(self, y: Tensor, basis: Tensor) -> Frame:
        """Tangent bases alone, by elimination."""
        hessian = self.kernels.run_last("hessian", self.loss.hessian, y)
        return (self.kernels.run_last("tangent_basis", tangent_basis, hessian, basis),)

    def eigenframe(self, y: Tensor) -> Frame:
        """Tangent basis (D, D - M, n), eigenvalues (M, n) and eigenvectors (D, M, n) of H.

        NaN where a point is lost.
        """
        self.kernels.no_part_of_one("an eigendecomposition")
        hessian: Tensor = self.kernels.run_last("hessian", self.loss.hessian, y)
        return eigenframe_of(*self.kernels.eigh(hessian), self.rank)

    def project(self, y: Tensor, frame: Frame, v: Tensor) -> Tensor:
        """P v, by the tangent basis."""
        return _span(frame[0], _inner(frame[0], v))

    def inverse(self, y: Tensor, frame: Frame, v: Tensor) -> Tensor:
        """H^+ v."""
        if len(frame) == 2:
            return _inner(frame[1], v)
        _, values, normal = frame
        return _span(normal, _inner(normal, v) / values)

    # Third derivatives.

    def third_of_inverse(self, y: Tensor, frame: Frame) -> Tensor:
        """Script T of H^+, the whole of it."""
        if len(frame) == 2:
            result: Tensor = self.kernels.run_last("turning", self._third_along_axes, y, frame[1])
            return result
        _, values, normal = frame
        result = self.kernels.run_last("eigen_turning", self._script_t, y, normal, normal / values)
        return result

    def third_of_projection(self, y: Tensor, frame: Frame) -> Tensor:
        """H^+ script T of P."""
        third = self.kernels.run_last("curving", self._script_t, y, frame[0], frame[0])
        return self.inverse(y, frame, third)

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
        """In the eigenbasis each script T is a sum over one eigenvector and one combination.

        D - M third derivatives for the tangent block, M for the two others together.
        """
        if factor is not None:
            covariance = torch.einsum("imn,jmn->ijn", factor, factor)
        if covariance is None:
            covariance = self.kernels.run_last("covariance", self._covariance, y)

        def blocks(z: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
            return self.contract_at(z, *parts, mixed=mixed, normal=normal, tangent=tangent)

        name = f"contraction_{self.rank}_{mixed}_{normal}_{tangent}"
        result: tuple[Tensor, Tensor] = self.kernels.run_last(name, blocks, y, *frame, covariance)
        return result

    def contract_at(
        self,
        y: Tensor,
        kernel: Tensor,
        values: Tensor,
        q: Tensor,
        sigma: Tensor,
        *,
        mixed: float,
        normal: float,
        tangent: bool,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`contract` at ONE point, by its eigenframe and a covariance (D, D)."""
        block = q.T @ sigma
        lyapunov = (block @ q) / (values[:, None] + values[None, :])
        across = mixed * (kernel @ ((block @ kernel) / values[:, None]).T)
        across = across + normal * (q @ lyapunov)
        if not tangent:
            return torch.zeros_like(y), self._script_t(y, q, across)
        along = kernel @ (kernel.T @ sigma @ kernel)
        split = kernel.shape[1]
        thirds = self._thirds(y, torch.cat([kernel, q], 1), torch.cat([along, across], 1))
        return thirds[:split].sum(0), thirds[split:].sum(0)

    def noise_correction(self, y: Tensor, frame: Frame) -> Tensor:
        """Sum over j of the derivative of sigma_j along P sigma_j."""

        def correction(y: Tensor, basis: Tensor) -> Tensor:
            return self.noise.correction(self.loss, y, basis @ basis.T)

        result: Tensor = self.kernels.run_last("noise_correction", correction, y, frame[0])
        return result

    # Newton's method.

    def newton_step(self, y: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By one elimination, with the same reference basis for all steps."""
        found = self.whole("newton step", lambda s, *at: s.newton_step(*at)[:2], y, basis)
        if found is not None:
            return *found, basis
        gradient = self.kernels.run_last("gradient", self.loss.gradient, y)
        hessian = self.kernels.run_last("hessian", self.loss.hessian, y)
        moved = self.kernels.run_last("newton", _newton, y, hessian, basis, gradient)
        return *moved, basis

    def settle(self, y: Tensor, basis: Tensor) -> tuple[Frame, Tensor]:
        """The eliminated frame; its tangent basis is the reference from here on."""
        by_elimination = copy.copy(self)
        by_elimination.eigenbasis = False
        frame = by_elimination.frame(y, basis)
        return frame, frame[0]

    def shared_step(self, y: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
        """With the pseudo-inverse given."""

        def step(y: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
            return to_unit(y, inverse @ self.loss.gradient(y))

        result: tuple[Tensor, Tensor] = self.kernels.run_last("shared_step", step, y, frame[1])
        return result

    # Functions of one point.

    def _covariance(self, y: Tensor) -> Tensor:
        return self.noise.covariance(self.loss, y)

    def _thirds(self, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """d^2(grad L)[a_k, b_k] of columns (D, k) each: (k, D)."""
        third = self.loss.third_derivative
        return vmap(lambda p, q: third(y, p, q), in_dims=(1, 1))(a, b)

    def _script_t(self, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Script T of the symmetric part of a b^T, columns (D, k) each: (D,)."""
        return self._thirds(y, a, b).sum(0)

    def _third_along_axes(self, y: Tensor, matrix: Tensor) -> Tensor:
        axes, third = torch.eye(len(y), dtype=y.dtype, device=y.device), self.loss.third_derivative
        return vmap(lambda p, q: third(y, p, q), in_dims=(1, 1))(axes, matrix).sum(0)


def eigenframe_of(values: Tensor, vectors: Tensor, rank: int) -> Frame:
    """The frame of eigenvalues (D, n), ascending, and eigenvectors (D, D, n)."""
    split = len(values) - rank
    return vectors[:, :split], values[split:], vectors[:, split:]


def _newton(y: Tensor, hessian: Tensor, basis: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return to_unit(y, newton_displacement(hessian, basis, gradient))


def _inner(columns: Tensor, v: Tensor) -> Tensor:
    """Products of columns with v: (D, k, n), (D, n) -> (k, n)."""
    return (columns * v[:, None]).sum(0)


def _span(columns: Tensor, c: Tensor) -> Tensor:
    """Sums of columns: (D, k, n), (k, n) -> (D, n)."""
    return (columns * c).sum(1)
