"""Homogeneity of losses, derivatives and noise: Definition 2.2, Lemmas 2.4 and 2.5."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde import loss_checks
from manifold_sde.arguments import check_integer
from manifold_sde.errors import ManifoldSDEError
from manifold_sde.geometry.dense import DENSE_LIMIT
from manifold_sde.paper import implements
from manifold_sde.problem import Problem
from manifold_sde.scale_invariance import euler_defects, euler_products
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.properties.defect import (
    Defect,
    flat_points,
    property_check,
    rounding,
    spread_norms,
    with_factors,
)
from manifold_sde.verification.subject import Subject

_NAMES = {1: "gradient", 2: "Hessian", 3: "third derivative"}
#: Numbers that a batch of Hessians, factors or covariances may have.
_MOST_NUMBERS = 2**24
#: Fixed vectors that a matrix is multiplied by where it does not fit into memory.
_PROBES = 4


def _losses(problem: Problem, x: Tensor) -> Tensor:
    """The sample losses, or the one loss: (n, D) -> (n, Xi or 1)."""
    return problem.loss(x)[:, None] if problem.n_samples is None else problem.sample_losses(x)


def loss_size(problem: Problem, x: Tensor) -> float:
    """Largest |L_xi| + |x| |grad L_xi| over samples, points and fixed directions.

    A computation of the losses to some units of rounding is that far off, at most.
    """
    points = torch.cat(
        [flat_points(x, problem.dim), loss_checks.fixed_directions(problem.dim).to(x)]
    )
    losses = _losses(problem, points).abs()
    if points.numel() * losses.shape[1] > _MOST_NUMBERS:
        return max(float(losses.max() + euler_defects(problem.pointwise, points)[1]), 1e-300)
    slopes = euler_products(problem.pointwise, points)[1]
    return max(float((losses + slopes).max()), 1e-300)


def _derivative(problem: Problem, x: Tensor, order: int) -> Tensor:
    """A derivative of L at points (n, D), flat: (n, ...); the third along fixed directions.

    The second is along fixed directions too, where H does not fit into memory.
    """
    if order == 1:
        return problem.gradient(x)
    if order == 2 and problem.dim <= DENSE_LIMIT:
        return problem.hessian(x).flatten(1)
    if order == 2:
        fixed = loss_checks.fixed_directions(problem.dim, _PROBES).to(x)
        return torch.cat([_hessian_products(problem, x, v.expand_as(x)) for v in fixed], 1)
    a, b = loss_checks.fixed_directions(problem.dim, 2).to(x)
    return problem.third_derivative(x, a.expand_as(x), b.expand_as(x))


def _hessian_products(problem: Problem, x: Tensor, v: Tensor) -> Tensor:
    """H(x) v: (n, D), (n, D) -> (n, D)."""
    return vmap(problem.pointwise.hessian_product)(x, v)


def _derivative_size(problem: Problem, x: Tensor) -> float:
    """Sum of the largest |x|^l |d^l L(x)|, l = 0 to 3, over the points."""
    norms = x.norm(dim=1)
    sizes = [(norms**order * _derivative(problem, x, order).norm(dim=1)).max() for order in _NAMES]
    return loss_size(problem, x) + float(sum(sizes))


@implements("Definition 2.2")
def scale_invariance(problem: Problem | Subject, x: Tensor, alpha: Tensor | float) -> Defect:
    """L_xi(alpha x) = L_xi(x) for every sample loss, by evaluating both sides.

    Args:
        problem: The problem.
        x: Points (..., D), not 0.
        alpha: Positive factors, that broadcast against (...).

    Returns:
        The largest |L_xi(alpha x) - L_xi(x)|, relative to the size of the losses and gradients.

    Source: Definition 2.2 with k = 0, Assumption 2.3.
    """
    owner = Subject.of(problem).problem
    points, factors = with_factors(x, alpha, owner.dim)
    gap = _losses(owner, factors * points) - _losses(owner, points)
    values = gap.abs().amax(1) / loss_size(owner, points)
    return Defect.of(values, rounding(points), "L(a x) = L(x)")


@implements("Lemma 2.4")
def derivative_degree(
    problem: Problem | Subject, x: Tensor, alpha: Tensor | float, order: int
) -> Defect:
    """The derivative of L of an order l has degree -l: d^l L(alpha x) = alpha^-l d^l L(x).

    Args:
        problem: The problem.
        x: Points (..., D), not 0.
        alpha: Positive factors, that broadcast against (...).
        order: 1 for the gradient, 2 for the Hessian, 3 for the third derivative along fixed
            directions.

    Returns:
        The largest difference, relative to the sizes of the derivatives up to the third.

    Source: Lemma 2.4.
    """
    owner = Subject.of(problem).problem
    order = check_integer("order", order, 1, 3)
    points, factors = with_factors(x, alpha, owner.dim)
    there, here = (_derivative(owner, z, order) for z in (factors * points, points))
    gap = (factors**order * there - here).norm(dim=1) * points.norm(dim=1) ** order
    values = gap / _derivative_size(owner, points)
    return Defect.of(values, rounding(points), f"the {_NAMES[order]} has degree {-order}")


def euler(problem: Problem | Subject, x: Tensor) -> Defect:
    """<x, grad L_xi(x)> = 0 for every sample, and H(x) x = -grad L(x).

    Both are Euler's theorem: for the losses, of degree 0, and for the gradient, of degree -1.

    Args:
        problem: The problem.
        x: Points (..., D), not 0.

    Returns:
        The largest defect, relative to the sizes of the derivatives.

    Source: Lemma 2.5.
    """
    owner = Subject.of(problem).problem
    points = flat_points(x, owner.dim)
    sums, _ = euler_defects(owner.pointwise, points)
    first = sums.abs().amax(1) / loss_size(owner, points)
    turned = _hessian_products(owner, points, points) + owner.gradient(points)
    second = turned.norm(dim=1) * points.norm(dim=1) / _derivative_size(owner, points)
    return Defect.of(torch.maximum(first, second), rounding(points), "<x, grad L> = 0 and H x = -g")


def points_everywhere(subject: Subject, most: int) -> tuple[Tensor, Tensor]:
    """Unit vectors all over the sphere, on Gamma_1 and near it, and norms to scale them to.

    Where no manifold is found, which scale invariance does not need, there are only the first.
    """
    directions = subject.cone_points(most)
    found = [directions / directions.norm(dim=1, keepdim=True)]
    half = max(1, most // 2)
    with contextlib.suppress(ManifoldSDEError):
        found += [subject.manifold_points(half), subject.attraction_points(half)]
    x = torch.cat(found)
    return x, spread_norms(subject, len(x))


def _points(subject: Subject, effort: Effort) -> tuple[Tensor, Tensor]:
    most = _MOST_NUMBERS // subject.problem.dim**2
    return points_everywhere(subject, max(2, min(effort.points, most)))


def _check_losses(subject: Subject, effort: Effort) -> list[Defect]:
    return [scale_invariance(subject, *_points(subject, effort))]


def _check_degrees(subject: Subject, effort: Effort) -> list[Defect]:
    x, norms = _points(subject, effort)
    return [derivative_degree(subject, x, norms, order) for order in _NAMES]


def _check_euler(subject: Subject, effort: Effort) -> list[Defect]:
    x, norms = _points(subject, effort)
    return [euler(subject, x * norms[:, None])]


def noise_columns(problem: Problem, x: Tensor) -> Tensor:
    """sigma, or its products with fixed vectors where it does not fit: (n, D) -> (n, D, k)."""
    if problem.dim <= DENSE_LIMIT or problem.dim * problem.n_noise <= _MOST_NUMBERS:
        return problem.noise_factor(x)
    fixed = loss_checks.fixed_directions(problem.n_noise, _PROBES).to(x)
    return torch.stack([problem.noise_product(x, w.expand(len(x), -1)) for w in fixed], -1)


def _covariances(problem: Problem, x: Tensor) -> Tensor:
    """Sigma, or its products with fixed vectors where it does not fit: (n, D) -> (n, D, k)."""
    if problem.dim <= DENSE_LIMIT:
        return problem.noise_covariance(x)
    noise, loss = problem.noise, problem.pointwise
    fixed = loss_checks.fixed_directions(problem.dim, _PROBES).to(x)
    back = vmap(noise.transposed_product, in_dims=(None, 0, None))
    pairs = [problem.noise_product(x, back(loss, x, v)) for v in fixed]
    return torch.stack(pairs, -1)


def noise_size(problem: Problem, x: Tensor) -> float:
    """Largest |x| |sigma(x)| over the points and fixed directions."""
    points = torch.cat(
        [flat_points(x, problem.dim), loss_checks.fixed_directions(problem.dim).to(x)]
    )
    sizes = points.norm(dim=1) * noise_columns(problem, points).flatten(1).norm(dim=1)
    return max(float(sizes.max()), 1e-300)


def _tolerance(problem: Problem, x: Tensor, size: float) -> float:
    """Rounding of sigma relative to its size: the gradients that it is made of are rounded."""
    return rounding(x) * (1.0 + loss_size(problem, x) / size)


def noise_degree(problem: Problem | Subject, x: Tensor, alpha: Tensor | float) -> Defect:
    """Sigma has degree -2, and its factor sigma -1: sigma(alpha x) = sigma(x) / alpha.

    Args:
        problem: The problem.
        x: Points (..., D), not 0.
        alpha: Positive factors, that broadcast against (...).

    Returns:
        The larger of the two defects, relative to the largest |x| |sigma(x)| and its square.

    Source: section 2, after Lemma 2.5.
    """
    owner = Subject.of(problem).problem
    points, factors = with_factors(x, alpha, owner.dim)
    norms, size = points.norm(dim=1), noise_size(owner, points)
    scaled = factors * points
    gap = factors[..., None] * noise_columns(owner, scaled) - noise_columns(owner, points)
    first = gap.flatten(1).norm(dim=1) * norms / size
    gap = factors[..., None] ** 2 * _covariances(owner, scaled) - _covariances(owner, points)
    second = gap.flatten(1).norm(dim=1) * (norms / size) ** 2
    return Defect.of(
        torch.maximum(first, second),
        2.0 * _tolerance(owner, points, size),
        "sigma has degree -1 and Sigma -2",
    )


def noise_is_tangent(problem: Problem | Subject, x: Tensor) -> Defect:
    """The noise does not act along the weights: sigma(x)^T x = 0.

    Args:
        problem: The problem.
        x: Points (..., D), not 0.

    Returns:
        The largest |sigma(x)^T x|, relative to the largest |x| |sigma(x)|.

    Source: Lemma 2.5 for the columns of sigma in (2).
    """
    owner = Subject.of(problem).problem
    points = flat_points(x, owner.dim)
    size = noise_size(owner, points)
    back = vmap(owner.noise.transposed_product, in_dims=(None, 0, 0))
    radial = back(owner.pointwise, points, points).norm(dim=1)
    return Defect.of(radial / size, _tolerance(owner, points, size), "sigma(x)^T x = 0")


def _points_of_noise(subject: Subject, effort: Effort) -> tuple[Tensor, Tensor]:
    dim = subject.problem.dim
    most = _MOST_NUMBERS // (dim * max(dim, subject.problem.n_noise))
    return points_everywhere(subject, max(2, min(effort.points, most)))


def _check_noise_degree(subject: Subject, effort: Effort) -> list[Defect]:
    return [noise_degree(subject, *_points_of_noise(subject, effort))]


def _check_tangent(subject: Subject, effort: Effort) -> list[Defect]:
    x, norms = _points_of_noise(subject, effort)
    return [noise_is_tangent(subject, x * norms[:, None])]


_NOT_INVARIANT = (
    "The loss is not constant along rays, so that weight decay changes what is minimised and the "
    "theory does not apply: look for a bias, affine parameters, an eps in a normalisation, or a "
    "trained last layer. problem.require_scale_invariance() names the coordinates."
)

#: The checks of this module.
CHECKS: tuple[Check, ...] = (
    property_check(
        "scale invariance of the losses",
        ("Definition 2.2", "Assumption 2.3"),
        _check_losses,
        _NOT_INVARIANT,
    ),
    property_check(
        "degrees of the derivatives",
        ("Lemma 2.4",),
        _check_degrees,
        "A derivative does not scale as that of a scale-invariant loss: the loss is not one, or "
        "its derivatives are not those of what it computes (problem.derivative_errors).",
    ),
    property_check("Euler's theorem", ("Lemma 2.5",), _check_euler, _NOT_INVARIANT),
    property_check(
        "degrees of the noise",
        ("Lemma 2.4",),
        _check_noise_degree,
        "The noise does not grow as 1 / |x| near the origin, as that of SGD does: there is no "
        "intrinsic clock, and (9) to (13) do not hold. Divide the factor by |x|.",
    ),
    property_check(
        "noise orthogonal to the weights",
        ("Lemma 2.5",),
        _check_tangent,
        "The noise moves the norm itself: the equation of the norm holds only in mean. Take the "
        "part along x away from the columns of the factor.",
    ),
)
