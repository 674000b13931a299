"""Coefficients and retraction for many points near the manifold at once, points last.

Everything is evaluated at the direction of a point and extended by homogeneity: with r = |x|, the
noise has degree -1 and the drifts of (8) without their -c y have degree -3. Near the manifold, off
it, this is a smooth extension; on it, it is exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from manifold_sde.geometry.kernels import Kernels
from manifold_sde.problem import Problem

#: Last step of a retraction that has arrived, relative to the norm.
ARRIVED = {torch.float64: 1e-12, torch.float32: 1e-5}


class Field(ABC):
    """Coefficients of the limiting diffusions on batches of points.

    Points are columns: x (D, n), with anchors (D, d, n): what a route carries from point to point,
    such as tangent bases nearby. A compiled kernel computes one thing: larger ones compile badly.

    Args:
        problem: The problem.
        compiled: Whether the kernels are compiled.
    """

    def __init__(self, problem: Problem, *, compiled: bool = False) -> None:
        self.problem = problem
        self.kernels = Kernels(problem, compiled)

    @abstractmethod
    def anchor(self, x: Tensor) -> Tensor:
        """Anchors of points of the manifold: (D, n) -> (D, d, n)."""

    @abstractmethod
    def noise(self, x: Tensor, anchor: Tensor, w: Tensor) -> Tensor:
        """P sigma w: (D, n), (D, d, n), (m, n) -> (D, n)."""

    @abstractmethod
    def direction_drift(self, y: Tensor, anchor: Tensor, calculus: str) -> Tensor:
        """Drift of the direction diffusion at unit vectors: (D, n), (D, d, n) -> (D, n).

        The calculus is "ito", "stratonovich", or "tangent" for the part of the Ito drift that is
        tangent to Gamma_1.
        """

    @abstractmethod
    def drift_and_noise(
        self, y: Tensor, anchor: Tensor, w: Tensor, calculus: str
    ) -> tuple[Tensor, Tensor]:
        """Both at unit vectors, for less than one after the other.

        Args:
            y: Unit vectors (D, n).
            anchor: Anchors nearby (D, d, n).
            w: Increments (m, n).
            calculus: "ito", "stratonovich" or "tangent".

        Returns:
            Drift of the direction diffusion and P sigma w, (D, n) each.
        """

    def tangent_increment(self, y: Tensor, anchor: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """Tangent part of the Ito drift times h, and P sigma w, at unit vectors.

        Args:
            y: Unit vectors (D, n).
            anchor: Anchors nearby (D, d, n).
            h: Steps, () or (n,).
            w: Increments (m, n).

        Returns:
            Tensor (D, n).
        """
        drift, noise = self.drift_and_noise(y, anchor, w, "tangent")
        return h * drift + noise

    @abstractmethod
    def retract(
        self, x: Tensor, anchor: Tensor, fresh_steps: int = 2
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Points of the manifold near x, with the norms of x.

        A fixed number of steps, so that nothing has to wait for a result.

        Args:
            x: Points near the manifold (D, n).
            anchor: Anchors nearby (D, d, n).
            fresh_steps: Newton steps with derivatives of their own.

        Returns:
            Points (D, n), anchors there (D, d, n), and whether the point arrived, (n,): one that
            did not is NaN.
        """

    def trace(self, x: Tensor) -> Tensor:
        """V = tr Sigma at the direction: (D, n) -> (n,)."""
        return self.kernels.noise_trace(x)

    def drift(self, x: Tensor, anchor: Tensor, calculus: str) -> Tensor:
        """Drift of (8) at ratio 0: (D, n), (D, d, n) -> (D, n).

        Args:
            x: Points.
            anchor: Anchors nearby.
            calculus: "ito" or "stratonovich".
        """
        r = x.norm(dim=0)
        y = x / r
        return (self.direction_drift(y, anchor, calculus) + 0.5 * self.trace(y) * y) / r**3
