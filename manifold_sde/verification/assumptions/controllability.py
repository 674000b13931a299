"""Assumption 5.2: noise along the manifold, at every point of it and in every direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import grad, vmap

from manifold_sde.geometry.tangent_noise import tangent_noise
from manifold_sde.paper import implements
from manifold_sde.problem import Problem
from manifold_sde.verification.assumptions.search import Valued, along_kernel, lowest
from manifold_sde.verification.assumptions.survey import Survey, assumption, extremes, show_point
from manifold_sde.verification.result import Result, found

#: Name of the check of the product of the groups' spheres.
IN_GROUPS = "controllability of the groups' directions"
#: Part of the variance up to which there is none.
NONE = 1e-12
#: Smallest singular value, over the largest on Gamma_1, that is none, and that is too small to say.
VANISHES, SMALL = 1e-7, 1e-4


def smallest_noise(problem: Problem, rank: int, groups: Sequence[Sequence[int]]) -> Valued:
    """The smallest singular value of the noise along Gamma_1, with its gradient.

    With its unit vectors t and w, its derivative along u is t^T d sigma[u] w, and what comes of the
    turning of the tangent space, - d^3 L[u, t, H^+ sigma w].
    """

    def coupling(z: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return (problem.noise.product(problem.pointwise, z, w) * t).sum()

    def function(y: Tensor) -> tuple[Tensor, Tensor]:
        values, t, w = tangent_noise(problem, y, rank, groups)
        eigenvalues, vectors = torch.linalg.eigh(problem.hessian(y))
        kernel, normal = vectors[..., : -rank or None], vectors[..., problem.dim - rank :]
        across = normal.mT @ problem.noise_product(y, w)[..., None]
        across = (normal @ (across / eigenvalues[:, problem.dim - rank :, None]))[..., 0]
        slope = vmap(grad(coupling))(y, t, w) - problem.third_derivative(y, t, across)
        return values[:, -1], along_kernel(y, kernel, slope)

    return function


def check_diffusion(survey: Survey) -> Result | None:
    """The noise does not vanish on the manifold, and has a part along it."""
    problem, points = survey.subject.problem, _points(survey)
    if survey.manifold_dim == 0:
        return None
    trace, elsewhere = problem.noise_trace(points), problem.noise_trace(survey.starts)
    whole, away = float(trace.max()), float(elsewhere.median())
    if whole <= NONE * away:
        detail = (
            f"tr Sigma is at most {whole:.1g} on Gamma_1, and {away:.2g} at a random direction: "
            "the noise vanishes on the manifold"
        )
        meaning = (
            "Every sample is fitted, or the noise is none: there is no drift and no diffusion, "
            "and the direction stands still. Use noise that is left at the minimum: of "
            "augmentation, of labels (least squares), or SphericalNoise as a model."
        )
        return found("fails", detail, 1.0, 0.0, meaning)
    values = tangent_noise(problem, points, survey.rank, [range(problem.dim)])[0]
    part = (values**2).sum(1) / trace.clamp(min=NONE * whole)
    if float(part.max()) <= NONE:
        detail = (
            f"tr Sigma is {whole:.2g} on Gamma_1, and the part along it {float(part.max()):.1g} "
            "of that: all noise is across the manifold"
        )
        meaning = (
            "This is no diffusion but a deterministic flow (of label noise: towards small tr H), "
            "and there need not be one equilibrium."
        )
        return found("fails", detail, 1.0, 0.0, meaning)
    detail = (
        f"tr Sigma is between {float(trace.min()):.2g} and {whole:.2g} on Gamma_1, "
        f"{float(part.min()):.0%} to {float(part.max()):.0%} of it along Gamma_1"
    )
    return found("holds", detail, 0.0, 0.0)


@implements("Assumption 5.2")
def check_controllability(survey: Survey) -> Sequence[Result]:
    """The noise spans the tangent space of Gamma_1 at every point."""
    everything = (range(survey.subject.problem.dim),)
    results = [_controllability(survey, everything)]
    groups = survey.groups
    if groups is not None and len(groups) > 1:
        results.append(replace(_controllability(survey, groups), name=IN_GROUPS))
    return results


def _controllability(survey: Survey, groups: Sequence[Sequence[int]]) -> Result:
    problem, points, rank = survey.subject.problem, _points(survey), survey.rank
    dims = problem.dim - rank - len(groups)
    if dims < 1:
        return found("holds", "there is no direction to move in", 0.0, 0.0)
    values = tangent_noise(problem, points, rank, groups)[0]
    scale = float(values.max())
    away = float(problem.noise_trace(survey.starts).median()) ** 0.5
    if scale <= NONE**0.5 * away:
        detail = f"the noise moves along none of the {dims} dimensions at any point"
        return found("fails", detail, 0.0, -VANISHES, not_unique(dims))
    reached = (values > VANISHES * scale).sum(1)
    pictures = (extremes("Noise along Gamma_1", "singular value of T^T sigma", values),)
    if int(reached.max()) < dims:
        detail = (
            f"the noise moves along at most {int(reached.max())} of the {dims} dimensions, at "
            f"each of {len(points)} points"
        )
        return found("fails", detail, 0.0, -VANISHES, not_unique(dims), pictures=pictures)
    function = smallest_noise(problem, rank, groups)
    where, smallest = lowest(survey, function, points, values[:, -1])
    ratio = smallest / scale
    detail = (
        f"singular values of the noise along the {dims} dimensions are between "
        f"{smallest:.2g} and {scale:.2g} (ratio {ratio:.2g}), the smallest at "
        f"{show_point(where)}"
    )
    if ratio <= VANISHES:
        meaning = (
            "At this point the noise does not span the tangent space. In one dimension the path "
            "may never get past it; in more it may go around."
        )
        return found("fails", detail, -ratio, -VANISHES, meaning, pictures=pictures)
    if ratio <= SMALL:
        meaning = (
            "The noise is so small in some direction that it cannot be told from none; if it is "
            "not, mixing takes its inverse square in time."
        )
        return found("undecided", detail, -ratio, -VANISHES, meaning, pictures=pictures)
    return found("holds", detail, -ratio, -VANISHES, pictures=pictures)


def _points(survey: Survey) -> Tensor:
    """The points at which H has the rank of the start."""
    return survey.points[survey.ranks == survey.rank]


def not_unique(dims: int) -> str:
    """What it means that the noise moves along fewer dimensions than there are."""
    return (
        "The direction moves in fewer than "
        f"{dims} dimensions, unless brackets of the fields lead out of them. The law after "
        "finitely many steps (Theorem 4.4) stands; the equilibrium of Theorem 5.4 need not be "
        "unique."
    )


CHECKS = (
    assumption("diffusion along the manifold", ("Assumption 5.2",), check_diffusion),
    assumption("controllability", ("Assumption 5.2",), check_controllability),
)
