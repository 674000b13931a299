"""Assumption 2.1: a manifold of local minimisers, on which the Hessian has one rank."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.geometry.rank import gap_ratios
from manifold_sde.verification.assumptions.search import Valued, along_kernel, lowest
from manifold_sde.verification.assumptions.survey import Survey, assumption, extremes, show_point
from manifold_sde.verification.result import Result, Verdict, found
from manifold_sde.verification.subject import Subject

#: Part of its largest value on Gamma_1 to which the smallest nonzero eigenvalue may fall.
FALLEN, FALLING = 1e-7, 1e-6
#: Negative eigenvalue, relative to the largest, that is one beyond rounding.
NEGATIVE = 1e-8
#: Distances at which the loss is compared with that on the manifold, and its rounding units.
DISTANCES, UNITS = (3e-3, 1e-2), 64.0
#: Step along ker H, and the part of it by which its end may be off the manifold.
STEP, OFF = 1e-3, 0.1


def curvature(subject: Subject, rank: int, *, largest: bool = False) -> Valued:
    """The smallest nonzero eigenvalue of H, or one over the largest, with its gradient.

    The derivative of an eigenvalue along u is d^3 L[u, q, q] with its eigenvector q.

    Args:
        subject: The system under test.
        rank: Rank M of H.
        largest: Whether one over the largest is meant.
    """
    problem = subject.problem

    def function(y: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(problem.hessian(y))
        column = -1 if largest else values.shape[-1] - rank
        value, q = values[:, column], vectors[..., column]
        kernel = vectors[..., : values.shape[-1] - rank]
        slope = problem.third_derivative(y, q.contiguous(), q.contiguous())
        slope = along_kernel(y, kernel, slope)
        if largest:
            return 1.0 / value, -slope / value[:, None] ** 2
        return value, slope

    return function


def check_rank(survey: Survey) -> Result:
    """The rank of H is the same at all points found, and nowhere falls along the manifold."""
    subject = survey.subject
    values, ranks = survey.spectrum[0], survey.ranks
    rank, dim = survey.rank, subject.problem.dim
    if rank == 0 or bool((values[:, 0] < -NEGATIVE * values.abs().amax(1)).any()):
        return found("undecided", "H vanishes, or the points are no minimisers")
    other = torch.nonzero(ranks != rank)[:, 0]
    if len(other):
        index = int(other[0])
        detail = (
            f"rank {rank} at {show_point(survey.points[0])} and {int(ranks[index])} at "
            f"{show_point(survey.points[index])}; {len(other)} of {len(ranks)} points differ"
        )
        meaning = (
            "The minimisers are not one manifold. The limit holds as long as the path stays "
            "where the rank is that of its start."
        )
        return found("fails", detail, float(len(other)), 0.0, meaning)
    smallest = values[:, dim - rank]
    where, low = lowest(survey, curvature(subject, rank), survey.points, smallest)
    high = float(smallest.max())
    gaps = gap_ratios(values)[:, rank - 1]
    condition = float((values[:, -1] / smallest).max())
    ratio = low / high
    common = (
        f"rank {rank} at {len(ranks)} points, smallest gap {float(gaps.min()):.1e}; condition "
        f"number of H on its range up to {condition:.3g}; its smallest nonzero eigenvalue is "
        f"between {low:.3g} and {high:.3g} on Gamma_1"
    )
    pictures = (
        extremes(
            "Nonzero eigenvalues of H on Gamma_1", "eigenvalue", values[:, dim - rank :].flip(-1)
        ),
    )
    if ratio <= FALLING:
        verdict: Verdict = "fails" if ratio <= FALLEN else "undecided"
        detail = (
            f"the smallest nonzero eigenvalue of H is {high:.3g} at "
            f"{show_point(survey.points[smallest.argmax()])} and has fallen to {low:.2g} at "
            f"{show_point(where)}"
        )
        meaning = (
            f"The rank is {rank} in general and falls at a point. Near it the minimum is flat in "
            "a direction across, gradient flow is slow, and the limit does not describe SGD."
        )
        return found(verdict, detail, -ratio, -FALLEN, meaning, pictures=pictures)
    return found("holds", common, -ratio, -FALLEN, pictures=pictures)


def check_minimality(survey: Survey) -> Result:
    """The points found are local minimisers, and ker H is the tangent space of their manifold."""
    subject, points = survey.subject, survey.points
    values, vectors = survey.spectrum
    top = values.abs().amax(1).clamp(min=1e-300)
    negative = -values[:, 0] / top
    index = int(negative.argmax())
    if float(negative[index]) > NEGATIVE:
        detail = (
            f"H has the eigenvalue {float(values[index, 0]):.2g} (largest: {float(top[index]):.2g})"
            f" at {show_point(points[index])}"
        )
        return no_minimum(detail, float(negative[index]), NEGATIVE)
    directions = subject.normals(63, 4, *points.shape)
    kernel = vectors[..., : subject.problem.dim - survey.rank]
    directions[:2] = (kernel @ (kernel.mT @ directions[:2, ..., None]))[..., 0]
    fall, unit, where, distance = largest_fall(survey, directions)
    if fall > UNITS:
        detail = (
            f"the loss falls by {fall * unit:.2g} within {distance:g} of {show_point(where)}, "
            f"where rounding is {unit:.1g}"
        )
        return no_minimum(detail, fall, UNITS)
    off, where = _largest_miss(survey, vectors)
    if not off <= OFF:
        detail = (
            f"a step of {STEP:g} along ker H from {show_point(where)} is off the manifold by "
            f"{off:.2g} of its length" + ("" if off < 1e9 else ": gradient flow from there fails")
        )
        meaning = (
            "The kernel of the Hessian is larger than the tangent space: the minimum is flat of "
            "higher order in some direction across."
        )
        return found("fails", detail, off, OFF, meaning)
    detail = (
        f"no negative curvature (at most {max(float(negative.max()), 0.0):.1g} of the largest "
        f"eigenvalue) at {len(points)} points; the loss does not fall within {DISTANCES[-1]:g} "
        f"of them; steps along ker H stay on the manifold to {off:.1g} of their length"
    )
    return found("holds", detail, float(negative.max()), NEGATIVE)


def largest_fall(survey: Survey, directions: Tensor) -> tuple[float, float, Tensor, float]:
    """How far the loss falls near the points along directions (k, n, D), at both distances.

    Returns:
        The fall in units of rounding, that unit, the point, and the distance.
    """
    problem, points = survey.subject.problem, survey.points
    directions = torch.cat([directions, -directions])
    directions = directions / directions.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    losses = problem.loss(points)
    size = problem.loss(survey.starts).abs().max().clamp(min=losses.abs().max())
    unit = float(torch.finfo(points.dtype).eps * size)
    falls = torch.stack([losses - problem.loss(points + r * directions) for r in DISTANCES])
    # At both distances: a fall at the larger alone is another valley.
    least = falls.amin(0).amax(0) / max(unit, 1e-300)
    index = int(least.argmax())
    return float(least[index]), unit, points[index], DISTANCES[0]


def _largest_miss(survey: Survey, vectors: Tensor) -> tuple[float, Tensor]:
    """How far steps along ker H end off the manifold, relative to the step."""
    subject, points = survey.subject, survey.points[: survey.effort.points]
    kernel = vectors[: len(points), :, : subject.problem.dim - survey.rank]
    steps = (kernel @ subject.normals(64, len(points), kernel.shape[-1], 1))[..., 0]
    steps = STEP * steps / steps.norm(dim=1, keepdim=True)
    ends = subject.limits(points + steps)
    miss = (ends - points - steps).norm(dim=1).nan_to_num(nan=1e9) / STEP
    index = int(miss.argmax())
    return float(miss[index]), points[index]


def no_minimum(detail: str, statistic: float, limit: float) -> Result:
    """The result where the points are no minimisers."""
    meaning = (
        "These are saddles or maxima: SGD leaves them, and Phi is not defined around them. Give "
        "an x_init from which training comes to a minimum."
    )
    return found("fails", detail, statistic, limit, meaning)


CHECKS = (
    assumption("constant rank of the Hessian", ("Assumption 2.1",), check_rank),
    assumption("local minimality", ("Assumption 2.1",), check_minimality),
)
