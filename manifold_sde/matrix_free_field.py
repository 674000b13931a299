"""Coefficients of the limiting diffusions by products: nothing of size D x D.

The Stratonovich drift and the tangent part of the Ito drift, which is what a scheme that steps
along the tangent space and retracts needs, take as many derivatives as there are constraints and
columns of sigma. The normal part of the Ito drift takes D second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde.coefficients import without_radial_part
from manifold_sde.derivatives import jvp
from manifold_sde.errors import ArgumentError
from manifold_sde.field import ARRIVED, Field
from manifold_sde.geometry.contraction import contract, noise_pairs, noise_units
from manifold_sde.geometry.dense import DENSE_LIMIT
from manifold_sde.geometry.normal_space import NormalRoute
from manifold_sde.noise import SphericalNoise
from manifold_sde.problem import Problem

#: Newton steps of a retraction with a frame of their own, beyond those that the scheme asks for,
#: and those that share the last frame.
_MORE_STEPS = 1
_SHARED_STEPS = 3

Frame = tuple[Tensor, Tensor]


class MatrixFreeField(Field):
    """Coefficients on batches of points, by the range of H at each.

    Anchors are what the route makes a frame from: a basis of the range of H nearby (D, M, n), or
    nothing (D, 0, n).

    Args:
        problem: The problem.
        route: Makes frames.
        start: Makes the anchor of a point from nothing, (D,) -> (D, d).
    """

    def __init__(
        self, problem: Problem, route: NormalRoute, start: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(problem, compiled=False)
        self.route = route
        self.start = start
        self.loss = problem.pointwise

    def _each(self, function: Callable[..., Any], *arguments: Tensor) -> Any:
        """A function of one point at all points, as many at once as fit into the memory."""
        points = max(1, self.route.block(arguments[0]) // max(1, self.route.rank))
        inputs = (a.contiguous() for a in arguments)
        return vmap(function, in_dims=-1, out_dims=-1, chunk_size=points)(*inputs)

    def anchor(self, x: Tensor) -> Tensor:
        """Anchors of points of the manifold: (D, n) -> (D, d, n)."""
        result: Tensor = self._each(self.start, x / x.norm(dim=0))
        return result

    def noise(self, x: Tensor, anchor: Tensor, w: Tensor) -> Tensor:
        """P sigma w: (D, n), (D, d, n), (m, n) -> (D, n)."""
        r = x.norm(dim=0)

        def at_one(y: Tensor, near: Tensor, v: Tensor) -> Tensor:
            return self._noise(y, self.route.frame(y, near), v)

        result: Tensor = self._each(at_one, x / r, anchor, w)
        return result / r

    def direction_drift(self, y: Tensor, anchor: Tensor, calculus: str) -> Tensor:
        """Drift of the direction diffusion at unit vectors: (D, n), (D, d, n) -> (D, n)."""

        def at_one(y: Tensor, near: Tensor) -> Tensor:
            return self._drift(y, self.route.frame(y, near), calculus)

        result: Tensor = self._each(at_one, y, anchor)
        return result

    def drift_and_noise(
        self, y: Tensor, anchor: Tensor, w: Tensor, calculus: str
    ) -> tuple[Tensor, Tensor]:
        """Both with one frame."""

        def at_one(y: Tensor, near: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            frame = self.route.frame(y, near)
            return self._drift(y, frame, calculus), self._noise(y, frame, v)

        result: tuple[Tensor, Tensor] = self._each(at_one, y, anchor, w)
        return result

    def tangent_increment(self, y: Tensor, anchor: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """Drift and noise share a projection."""

        def at_one(y: Tensor, near: Tensor, step: Tensor, v: Tensor) -> Tensor:
            frame = self.route.frame(y, near)
            noise = self.problem.noise.product(self.loss, y, v)
            move = step * self._force(y, frame, "tangent") + noise
            return without_radial_part(self.route.project(y, frame, move), y)

        result: Tensor = self._each(at_one, y, anchor, h.expand(y.shape[1]), w)
        return result

    def retract(
        self, x: Tensor, anchor: Tensor, fresh_steps: int = 2
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Points of the manifold near x, with the norms of x, by Newton's method.

        Args:
            x: Points near the manifold (D, n).
            anchor: Anchors nearby (D, d, n).
            fresh_steps: Steps with a frame of their own, besides one more and three that share the
                last one.

        Returns:
            Points (D, n), anchors there (D, d, n), and whether the point arrived, (n,): one that
            did not is NaN.
        """
        r = x.norm(dim=0)

        def at_one(y: Tensor, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            base = y
            for _ in range(fresh_steps + _MORE_STEPS):
                base = y
                frame = self.route.frame(base, near)
                near = self.route.anchor(frame, base)
                y = _unit(base - self.route.newton_step(base, frame, base))
            left = y[0]
            for _ in range(_SHARED_STEPS):
                step = self.route.newton_step(base, frame, y)
                y, left = _unit(y - step), step.square().sum().sqrt()
            return y, near, left

        y, near, left = self._each(at_one, x / r, anchor)
        arrived = left <= ARRIVED.get(x.dtype, 1e-4)
        return torch.where(arrived, y * r, torch.nan), near, arrived

    # Functions of one unit vector.

    def _noise(self, y: Tensor, frame: Frame, w: Tensor) -> Tensor:
        return self.route.project(y, frame, self.problem.noise.product(self.loss, y, w))

    def _drift(self, y: Tensor, frame: Frame, calculus: str) -> Tensor:
        if calculus == "ito":
            return self._ito_drift(y, frame)
        force = self._force(y, frame, calculus)
        return without_radial_part(self.route.project(y, frame, force), y)

    def _force(self, y: Tensor, frame: Frame, calculus: str) -> Tensor:
        """What the tangent drift is the projection of."""
        route, noise = self.route, self.problem.noise
        if isinstance(noise, SphericalNoise):
            # -(s^2 / 4) grad log pdet H along Gamma_1, in either form.
            return -0.25 * noise.scale**2 * route.turning(y, frame)
        # What sigma_j itself turns by counts half of the mixed block, and by itself.
        stratonovich = calculus == "stratonovich"
        terms = contract(route, y, frame, noise_pairs(route, noise, y), tangent=False)
        force = -0.5 * terms.normal - (0.5 if stratonovich else 1.0) * terms.mixed
        if stratonovich:
            force = force - 0.5 * self._correction(y, frame)
        return force

    def _correction(self, y: Tensor, frame: Frame) -> Tensor:
        """Sum over j of the derivative of sigma_j along P sigma_j."""
        noise, loss = self.problem.noise, self.loss

        def column(w: Tensor) -> Tensor:
            along = self.route.project(y, frame, noise.product(loss, y, w))
            return jvp(lambda z: noise.product(loss, z, w), (y,), (along,))[1]

        total = torch.zeros_like(y)
        for units in noise_units(self.route, noise, y):
            total = total + vmap(column)(units).sum(0)
        return total

    def _ito_drift(self, y: Tensor, frame: Frame) -> Tensor:
        """Half of d^2 Phi[Sigma], minus V y / 2."""
        if len(y) > DENSE_LIMIT:
            raise ArgumentError(
                "the Ito drift cannot be had by products",
                received=f"dimension {len(y)}",
                expected=f"at most {DENSE_LIMIT}: its normal part takes D second derivatives",
                remedy='the Stratonovich form, sde.with_calculus("stratonovich"), or '
                'solve(..., method="walk"), which needs the tangent part alone',
            )
        route, noise = self.route, self.problem.noise
        terms = contract(route, y, frame, noise_pairs(route, noise, y), tangent=True)
        tangent = route.project(y, frame, 0.5 * terms.normal + terms.mixed)
        normal = route.inverse(y, frame, 0.5 * terms.tangent)
        return -tangent - normal - 0.5 * noise.trace(self.loss, y) * y


def _unit(y: Tensor) -> Tensor:
    return y * y.square().sum().rsqrt()
