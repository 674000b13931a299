"""Assumption 2.3, and the two properties of the noise that follow from it."""

from __future__ import annotations

import torch

from manifold_sde import loss_checks
from manifold_sde.scale_invariance import INVARIANCE_TOLERANCE, euler_defects
from manifold_sde.verification.assumptions.survey import Survey, assumption, show_point
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.result import Result, Verdict, found
from manifold_sde.verification.subject import Subject

INVARIANCE = "scale invariance"
_STATEMENTS = ("Assumption 2.3",)
_LIMIT = INVARIANCE_TOLERANCE[torch.float64]
#: Factors by which minimisers are scaled.
_FACTORS = (1e-3, 0.5, 2.0, 1e3)


def check_invariance(subject: Subject, effort: Effort) -> Result:
    """Every sample loss is constant along rays, by Euler's theorem (Lemma 2.5 with k = 0)."""
    problem = subject.problem
    x = subject.cone_points(effort.points)
    fixed = loss_checks.fixed_directions(problem.dim)
    sums, size = euler_defects(problem.pointwise, torch.cat([x, fixed]))
    defects = sums.abs() / size.clamp(min=1e-300)
    defects = defects.nan_to_num(nan=torch.inf)
    point, sample = divmod(int(defects.argmax()), defects.shape[1])
    worst = float(defects.max())
    where = torch.cat([x, fixed])[point]
    if worst > _LIMIT:
        culprits = problem.offending_coordinates(fixed)[1]
        which = "" if problem.n_samples is None else f" of sample {sample}"
        detail = (
            f"|<x, grad L>| / (|x| |grad L|) = {worst:.2g}{which} at "
            f"{show_point(where / where.norm())} times {float(where.norm()):.2g}, caused by "
            f"{culprits}"
        )
        meaning = (
            "The norm of the weights changes the loss, and no statement of the theory holds as it "
            "stands. Normalise what these coordinates feed (no bias, no affine parameters, no "
            "eps), or take them out of x. Where the violation is small, what follows describes "
            "the run as long as its effect is."
        )
        return found("fails", detail, worst, _LIMIT, meaning)
    losses = "the loss is" if problem.n_samples in (None, 1) else f"{problem.n_samples} losses are"
    detail = f"{losses} constant along rays to {worst:.1g}, at {len(defects)} points"
    if problem.scale_invariance is not None:
        detail += f"; symbolically {problem.scale_invariance.verdict}"
    return found("holds", detail, worst, _LIMIT)


def check_cone(survey: Survey) -> Result:
    """Multiples of minimisers are minimisers with the same loss."""
    problem, points = survey.subject.problem, survey.points
    worst, where, factor = 0.0, points[0], 1.0
    for a in _FACTORS:
        # The gradient of a 0-homogeneous function has degree -1, its Hessian -2.
        off = a * problem.gradient(a * points).norm(dim=1) / survey.tops.clamp(min=1e-300)
        off = torch.maximum(off, survey.above(a * points).abs()).nan_to_num(nan=torch.inf)
        if float(off.max()) > worst:
            worst, where, factor = float(off.max()), points[off.argmax()], a
    if worst > _LIMIT:
        detail = f"{factor:g} times the minimiser {show_point(where)} is off by {worst:.2g}"
        meaning = "The minimisers are no cone: the norm of the weights matters."
        return found("fails", detail, worst, _LIMIT, meaning)
    detail = (
        f"{len(points)} minimisers times {_FACTORS[0]:g} to {_FACTORS[-1]:g} are minimisers with "
        f"the same loss, to {worst:.1g}"
    )
    return found("holds", detail, worst, _LIMIT)


def check_noise(survey: Survey) -> Result:
    """The noise has degree -1 and no radial part."""
    problem = survey.subject.problem
    share = problem.noise.lasting_share(problem.pointwise)
    if share != 1.0:
        detail = f"{problem.noise!r}: of the noise of an epoch {share:.2g} is left in its sum"
        meaning = (
            "The theory is about independent steps. Here steps undo each other's noise: norms are "
            "as it says, the motion along the manifold is not. SamplingNoise(batch_size) is what "
            "(1) draws."
        )
        return found("fails", detail, 1.0 - share, 0.0, meaning)
    points = [loss_checks.fixed_directions(problem.dim), survey.arrived]
    violations = [problem.noise_violations(x) for x in points if len(x)]
    degree, radial = (max(v[name] for v in violations) for name in ("degree", "radial"))
    worst = max(degree, radial)
    detail = (
        f"sigma(a x) = sigma(x) / a to {degree:.1g}, and sigma(x)^T x = 0 to {radial:.1g} of "
        f"|sigma| |x|, at {sum(map(len, points))} points"
    )
    meaning = ""
    if degree > _LIMIT:
        meaning = "A noise of another degree has no intrinsic clock: the toolkit refuses it."
    elif radial > _LIMIT:
        meaning = (
            "The noise changes the norm at first order: the norm's equation holds only in mean, "
            "and Theorems 4.1 and 4.4 do not cover it."
        )
    verdict: Verdict = "holds" if worst <= _LIMIT else "fails"
    return found(verdict, detail, worst, _LIMIT, meaning)


CHECKS = (
    Check(INVARIANCE, "assumption", _STATEMENTS, check_invariance),
    assumption("cone of minimisers", _STATEMENTS, check_cone),
    assumption(
        "properties of the noise", ("Assumption 2.3", "Lemma 2.4", "Lemma 2.5"), check_noise
    ),
)
