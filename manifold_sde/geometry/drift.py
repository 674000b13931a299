r"""The coefficients of the limiting diffusions at unit vectors, once for all routes.

With V = tr Sigma(y) and script T of the third derivatives, at a unit vector y,

    Ito drift of (8) without its -c y:             1/2 d^2 Phi[Sigma]
    Stratonovich drift of (8) without its -c y:    b = b_1 + 1/2 V y

where b_1 is tangent to Gamma_1, and both move with P sigma dW. The direction diffusion in the
clock u takes 1/2 V y away from either. For any noise

.. math::

    \partial^2\Phi[\Sigma] = -H^\dagger \mathcal T[P\Sigma P]
    - 2 P\, \mathcal T[\mathrm{sym}(H^\dagger N\Sigma P)]
    - P\, \mathcal T[\mathcal L^{-1}(N\Sigma N)], \qquad
    b = - P\, \mathcal T[\tfrac12 \mathcal L^{-1}(N\Sigma N)
    + \tfrac12 \mathrm{sym}(H^\dagger N\Sigma P)] - \tfrac12 P \sum_j \partial\sigma_j[P\sigma_j].

The noise of (18) has a multiple of the identity for its covariance, on the range of H and along
Gamma_1: then half the pseudo-inverse solves the Lyapunov equation, there is no mixed block, and the
tangent part of either drift is -(s^2 / 4) P T[H^+] = -(s^2 / 4) grad log pdet H.

Source: equations (8) and (13); d^2 Phi by Li, Wang and Arora, ICLR 2022, Lemmas 4.3 and 4.6.
"""

from __future__ import annotations

import functools

from torch import Tensor

from manifold_sde.errors import ArgumentError
from manifold_sde.geometry.dense import DENSE_LIMIT
from manifold_sde.geometry.normal_space import Frame, NormalSpace, without_radial_part
from manifold_sde.noise import SphericalNoise


def second_derivative(
    space: NormalSpace,
    y: Tensor,
    frame: Frame,
    *,
    covariance: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """Second derivative of Phi contracted with a covariance, at points of the manifold.

    Args:
        space: The route.
        y: Points (D, n).
        frame: Their frame.
        covariance: Symmetric Sigma (D, D, n).
        factor: Or a factor (D, m, n) of it. With neither, the noise of the problem.

    Returns:
        Tensor (D, n).
    """
    along, across = space.contract(
        y, frame, mixed=2.0, normal=1.0, tangent=True, covariance=covariance, factor=factor
    )
    return -space.inverse(y, frame, along) - space.project(y, frame, across)


def direction_drift(
    space: NormalSpace, y: Tensor, basis: Tensor, calculus: str, frame: Frame | None = None
) -> Tensor:
    """Drift of the direction diffusion.

    Args:
        space: The route.
        y: Unit vectors (D, n).
        basis: Reference bases nearby (D, d, n).
        calculus: "ito", "stratonovich", or "tangent" for the part of the Ito drift that is tangent
            to Gamma_1.
        frame: Their frame, where it is there already.

    Returns:
        Tensor (D, n).
    """
    if frame is None:
        at = functools.partial(direction_drift, calculus=calculus)
        found: Tensor | None = space.whole(f"{calculus} drift", at, y, basis)
        if found is None and y.shape[-1] > space.at_once(y):
            found = space.over_points(functools.partial(at, space), y, basis)
        if found is not None:
            return found
        frame = space.frame(y, basis)
    if calculus == "ito":
        return _ito_drift(space, y, frame)
    force = tangent_force(space, y, frame, calculus)
    return without_radial_part(space.project(y, frame, force), y)


def direction_drift_and_noise(
    space: NormalSpace, y: Tensor, basis: Tensor, w: Tensor, calculus: str
) -> tuple[Tensor, Tensor]:
    """The drift, and P sigma w, with one frame: (D, n), (D, d, n), (m, n) -> (D, n) each."""

    def at(s: NormalSpace, z: Tensor, near: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        frame = s.frame(z, near)
        noise = s.project(z, frame, s.kernels.noise_product(z, v))
        return direction_drift(s, z, near, calculus, frame), noise

    name = f"{calculus} drift and noise"
    found: tuple[Tensor, Tensor] | None = space.whole(name, at, y, basis, w)
    if found is None:
        found = space.over_points(functools.partial(at, space), y, basis, w)
    return found


def tangent_increment(space: NormalSpace, y: Tensor, basis: Tensor, h: Tensor, w: Tensor) -> Tensor:
    """Tangent part of the Ito drift times h, and P sigma w, by one projection.

    Args:
        space: The route.
        y: Unit vectors (D, n).
        basis: Reference bases nearby (D, d, n).
        h: Steps, () or (n,).
        w: Increments (m, n).

    Returns:
        Tensor (D, n).
    """

    def at(s: NormalSpace, z: Tensor, near: Tensor, step: Tensor, v: Tensor) -> Tensor:
        frame = s.frame(z, near)
        move = step * tangent_force(s, z, frame, "tangent") + s.kernels.noise_product(z, v)
        return without_radial_part(s.project(z, frame, move), z)

    arguments = (y, basis, h.expand(y.shape[1]), w)
    found: Tensor | None = space.whole("walk", at, *arguments)
    if found is None:
        found = space.over_points(functools.partial(at, space), *arguments)
    return found


def tangent_noise(space: NormalSpace, y: Tensor, basis: Tensor, w: Tensor) -> Tensor:
    """P sigma w: (D, n), (D, d, n), (m, n) -> (D, n)."""
    found: Tensor | None = space.whole("noise", type(space).tangent_noise, y, basis, w)
    if found is None:
        found = space.over_points(space.tangent_noise, y, basis, w)
    return found


def tangent_force(space: NormalSpace, y: Tensor, frame: Frame, calculus: str) -> Tensor:
    """What the tangent drift is the projection of: "stratonovich", or "tangent" for Ito's."""
    noise = space.noise
    if isinstance(noise, SphericalNoise):
        return (-0.25 * noise.scale**2) * space.third_of_inverse(y, frame)
    if calculus == "tangent":
        return -space.contract(y, frame, mixed=1.0, normal=0.5)[1]
    across = space.contract(y, frame, mixed=0.5, normal=0.5)[1]
    return -across - 0.5 * space.noise_correction(y, frame)


def _ito_drift(space: NormalSpace, y: Tensor, frame: Frame) -> Tensor:
    """Half of d^2 Phi[Sigma], minus V y / 2."""
    if len(y) > DENSE_LIMIT:
        raise ArgumentError(
            "the Ito drift cannot be had by products",
            received=f"dimension {len(y)}",
            expected=f"at most {DENSE_LIMIT}: its normal part takes D second derivatives",
            remedy='the Stratonovich form, sde.with_calculus("stratonovich"), or '
            'solve(..., method="walk"), which needs the tangent part alone',
        )
    radial = -0.5 * space.kernels.noise_trace(y) * y
    if not isinstance(space.noise, SphericalNoise):
        return 0.5 * second_derivative(space, y, frame) + radial
    # T[P - y y^T] is T[P], because the gradient is homogeneous and vanishes at y.
    tangent = space.project(y, frame, tangent_force(space, y, frame, "tangent"))
    return tangent - (0.5 * space.noise.scale**2) * space.third_of_projection(y, frame) + radial
