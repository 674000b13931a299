"""Several groups of weights that the loss can be scaled by separately, and compactness."""

from __future__ import annotations

import torch

from manifold_sde.geometry.tangent_noise import radial_vectors
from manifold_sde.scale_invariance import SOLVED_DIM, describe_coordinates
from manifold_sde.verification.assumptions.minimisers import curvature
from manifold_sde.verification.assumptions.search import lowest
from manifold_sde.verification.assumptions.survey import Survey, assumption, show_point
from manifold_sde.verification.result import Result, Verdict, found

#: Factor by which the curvature may grow along Gamma_1: beyond it has no bound, or none is seen.
UNBOUNDED, GROWING = 1e6, 1e3
#: Most groups that are written out.
SHOWN = 4
#: What several groups mean, and for the theorem; and what it means not to know.
SEPARATE = (
    "So it is in every network that is normalised more than once: it is a property of the "
    "architecture and no fault. Gamma_1 is not compact: a group's norm can go to 0. Assumption "
    "5.1 fails, and Theorem 5.4 does not apply as stated. Theorem 4.4, the law after finitely "
    "many steps, does. Where the noise has no part along the radial vectors, as noise from "
    "drawing samples, Assumption 5.2 fails too, and the ratios of the groups' norms follow "
    "equations of their own, d|Y_g|^2 = (-2c |Y_g|^2 + tr Sigma_gg) dt: look at the direction of "
    "each group, with these norms as state."
)
NO_THEOREM = (
    "Nothing was simulated: what fails is what Theorem 5.4 assumes. So it does not say that there "
    "is one equilibrium from every start, and there may be one."
)
NOT_KNOWN = (
    "Every filter that feeds a normalisation is a group of its own. If there are several, "
    "Gamma_1 is not compact, and Theorem 5.4 does not apply as stated."
)


def check_groups(survey: Survey) -> Result:
    """All weights are one group: there is no part of them that the loss can be scaled by alone."""
    problem, groups = survey.subject.problem, survey.groups
    if groups is None:
        detail = (
            f"groups are looked for in at most {SOLVED_DIM} dimensions"
            if problem.dim > SOLVED_DIM
            else "the loss is not scale-invariant"
        )
        return found("undecided", detail, meaning=NOT_KNOWN)
    if len(groups) == 1:
        return found("holds", "all weights are one group", 1.0, 1.0)
    radial = radial_vectors(survey.points, groups)
    top = survey.spectrum[0][:, -1, None].clamp(min=1e-300)
    bent = (problem.hessian(survey.points) @ radial).norm(dim=1) / top
    factor = problem.noise_factor(survey.points)
    size = factor.flatten(1).norm(dim=1)[:, None].clamp(min=1e-300)
    moved = (factor.mT @ radial).norm(dim=1) / size
    shown = "; ".join(describe_coordinates(group, problem.dim) for group in groups[:SHOWN])
    more = f"; and {len(groups) - SHOWN} more" if len(groups) > SHOWN else ""
    detail = (
        f"{len(groups)} groups of weights can be scaled separately ({shown}{more}): each radial "
        f"vector is in ker H to {float(bent.max()):.1g}, and the noise along it is "
        f"{float(moved.max()):.1g} of the whole"
    )
    return found("fails", detail, float(len(groups)), 1.0, SEPARATE)


def not_compact(number: int, smallest: float, largest: float) -> Result:
    """The result where a group's norm can go to 0."""
    detail = (
        f"the norm of each of {number} groups can be any number in (0, 1); at the points "
        f"found it is between {smallest:.2g} and {largest:.2g}"
    )
    meaning = (
        "This follows from the groups: Gamma_1 is not compact. Near its ends the noise is large "
        "and steps must be small, and there need not be an equilibrium in the sense of Theorem 5.4."
    )
    return found("fails", detail, float(number), 1.0, meaning)


def check_compactness(survey: Survey) -> Result:
    """Gamma_1 has no end: no group's norm can go to 0, and its curvature is bounded."""
    groups = survey.groups
    if groups is not None and len(groups) > 1:
        norms = torch.stack([survey.points[:, list(g)].norm(dim=1) for g in groups])
        return not_compact(len(groups), float(norms.min()), float(norms.max()))
    values = survey.spectrum[0][:, -1]
    function = curvature(survey.subject, survey.rank, largest=True)
    where, inverse = lowest(survey, function, survey.points, -values)
    largest = 1.0 / inverse
    growth = largest / float(values.median())
    if growth >= GROWING:
        verdict: Verdict = "fails" if growth >= UNBOUNDED else "undecided"
        detail = (
            f"the largest eigenvalue of H grows along Gamma_1 from {float(values.median()):.3g} "
            f"to {largest:.2g} at {show_point(where)}"
        )
        meaning = "The loss has a singularity that Gamma_1 runs into: Gamma_1 is not compact."
        return found(verdict, detail, growth, UNBOUNDED, meaning)
    detail = (
        f"the curvature of the loss is bounded on what was searched: the largest eigenvalue of H "
        f"is {float(values.median()):.3g} at the median point and nowhere found above "
        f"{largest:.3g}; unit minimisers of a smooth loss are closed"
    )
    return found("holds", detail, growth, UNBOUNDED)


CHECKS = (
    assumption("one scaling group", ("Assumption 5.1", "Theorem 5.4"), check_groups),
    assumption("compactness", ("Assumption 5.1",), check_compactness),
)
