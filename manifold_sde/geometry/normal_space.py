r"""The range of H at points near the manifold of minimisers: the interface of all routes.

At y on the manifold H has rank M; P is the projection on its kernel, the tangent space, and
N = I - P. Everything that the diffusions need of the manifold follows from a few products, which
an implementation provides for many points at once, points last in memory:

- :class:`~manifold_sde.geometry.dense.DenseSpace`: the Hessian, one elimination or its eigenbasis;
- :class:`~manifold_sde.geometry.least_squares.LeastSquaresSpace`: the rows of the Jacobian where
  all residuals vanish;
- :class:`~manifold_sde.geometry.matrix_free.MatrixFreeSpace`: products with J or H.

What is made of these products stands once, in :mod:`~manifold_sde.geometry.drift` and
:mod:`~manifold_sde.geometry.retraction`. Off the manifold, near it, each implementation is a smooth
extension; they agree on it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor

from manifold_sde.geometry.kernels import Kernels
from manifold_sde.problem import Problem

#: What an implementation computes at points before anything else, points last.
Frame = tuple[Tensor, ...]


class NormalSpace(ABC):
    """Range of H at unit vectors y (D, n) on or near the manifold, and its complement.

    A compiled kernel computes one thing: larger ones compile badly.

    Args:
        problem: The problem, with its noise.
        rank: Rank M of H on the manifold.
    """

    #: What checkpoints call the implementation.
    label: str
    #: Newton steps of a retraction with a frame of their own beyond those that the scheme asks
    #: for, and those that share the last frame.
    fresh_steps: int
    shared_steps: int

    def __init__(self, problem: Problem, rank: int) -> None:
        self.problem = problem
        self.loss = problem.pointwise
        self.noise = problem.noise
        self.rank = rank
        self.kernels = Kernels(problem, False)

    def with_kernels(self, kernels: Kernels) -> Self:
        """The same space, computed by other kernels."""
        other = copy.copy(self)
        other.kernels = kernels
        return other

    def whole(self, name: str, function: Callable[..., Any], y: Tensor, *arguments: Tensor) -> Any:
        """A function of a space and of tensors as one kernel; ``None`` where it is not compiled.

        Args:
            name: What the function computes.
            function: The function, which is the same for ONE point without the points' dimension.
            y: Unit vectors (D, n).
            *arguments: Other tensors, points last.
        """

        def one(kernels: Kernels, *given: Tensor) -> Any:
            return function(self.with_kernels(kernels), *given)

        return self.kernels.whole(f"{self.label} {name}", one, y, *arguments)

    def at_once(self, y: Tensor) -> int:
        """Number of points whose frames fit into the memory."""
        return y.shape[-1]

    def over_points(self, function: Callable[..., Any], *arguments: Tensor) -> Any:
        """A function of arrays with the points last, on as many points at once as fit."""
        return function(*arguments)

    @abstractmethod
    def reference_basis(self, y: Tensor) -> Tensor:
        """What frames at points nearby are made from: (D, n) -> (D, d, n), d may be 0."""

    @abstractmethod
    def frame(self, y: Tensor, basis: Tensor) -> Frame:
        """What the products below take: (D, n), reference bases nearby (D, d, n)."""

    def tangent_frame(self, y: Tensor, basis: Tensor) -> Frame:
        """A frame that is good for :meth:`project` alone, where that costs less."""
        return self.frame(y, basis)

    @abstractmethod
    def project(self, y: Tensor, frame: Frame, v: Tensor) -> Tensor:
        """P v: (D, n) -> (D, n)."""

    @abstractmethod
    def inverse(self, y: Tensor, frame: Frame, v: Tensor) -> Tensor:
        """H^+ v: (D, n) -> (D, n)."""

    @abstractmethod
    def third_of_inverse(self, y: Tensor, frame: Frame) -> Tensor:
        """Script T of H^+, up to a part in the range of H: (D, n). P T[H^+] is grad log pdet H."""

    @abstractmethod
    def third_of_projection(self, y: Tensor, frame: Frame) -> Tensor:
        """H^+ script T of P: (D, n)."""

    @abstractmethod
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
        """Script T of the blocks of a covariance.

        Args:
            y: Unit vectors (D, n); any norm on the manifold.
            frame: Their frame.
            mixed: Weight of sym(H^+ N Sigma P).
            normal: Weight of L^-1(N Sigma N).
            tangent: Whether the tangent block is wanted.
            covariance: Symmetric Sigma (D, D, n).
            factor: Or a factor (D, m, n) of it. With neither, the noise of the problem.

        Returns:
            Script T of P Sigma P, zero where it was not wanted, and of the weighted sum of the two
            others, (D, n) each, the latter up to a part in the range of H.
        """

    @abstractmethod
    def noise_correction(self, y: Tensor, frame: Frame) -> Tensor:
        """Sum over j of the derivative of sigma_j along P sigma_j, at fixed P: (D, n)."""

    # Newton's method.

    @abstractmethod
    def newton_step(self, y: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step with derivatives of its own, on the unit sphere.

        Returns:
            Unit vectors (D, n), lengths of the steps (n,), and reference bases (D, d, n).
        """

    @abstractmethod
    def settle(self, y: Tensor, basis: Tensor) -> tuple[Frame, Tensor]:
        """The frame that the last steps share, and reference bases, at unit vectors."""

    def shared_step(self, y: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
        """One step with a frame from nearby: unit vectors (D, n), lengths of the steps (n,)."""
        raise NotImplementedError

    def arrive(self, y: Tensor, frame: Frame, left: Tensor, small: float) -> tuple[Tensor, Tensor]:
        """The last steps, which share a frame.

        Args:
            y: Unit vectors (D, n).
            frame: The frame that :meth:`settle` made.
            left: Lengths of the steps before, (n,).
            small: Length of a step that has arrived.

        Returns:
            Unit vectors (D, n), and lengths of the last steps (n,).
        """
        for _ in range(self.shared_steps):
            y, left = self.shared_step(y, frame)
        return y, left

    # The noise.

    def tangent_noise(self, y: Tensor, basis: Tensor, w: Tensor) -> Tensor:
        """P sigma w: (D, n), (D, d, n), (m, n) -> (D, n)."""
        return self.project(y, self.tangent_frame(y, basis), self.kernels.noise_product(y, w))

    def tangent_factor(self, y: Tensor, basis: Tensor) -> Tensor:
        """P sigma: (D, n), (D, d, n) -> (D, m, n)."""
        factor = self.kernels.noise_factor(y)
        m = factor.shape[1]
        frame = (part.repeat_interleave(m, -1) for part in self.tangent_frame(y, basis))
        columns = factor.movedim(1, -1).flatten(1)
        found = self.project(y.repeat_interleave(m, -1), tuple(frame), columns)
        return found.unflatten(1, (-1, m)).movedim(-1, 1)


def to_unit(y: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """A step at ONE unit vector, on the sphere: where it ends (D,), and its length ()."""
    moved = y - step
    return moved * (moved * moved).sum().rsqrt(), (step * step).sum().sqrt()


def without_radial_part(v: Tensor, y: Tensor) -> Tensor:
    """The part of v orthogonal to unit vectors y: (D, n), (D, n) -> (D, n)."""
    return v - y * (y * v).sum(0)
