"""Where training starts: the attraction set U of the manifold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from manifold_sde.verification.assumptions.survey import Survey, show_point
from manifold_sde.verification.assumptions.verdict import assumption
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.result import Result
from manifold_sde.verification.subject import Subject

_NAME = "attraction set around the start"
_STATEMENTS = ("Definition 2.6", "Lemma 2.7")
_result = partial(assumption, _STATEMENTS, _NAME)
#: Radii of the balls around the start, relative to its norm; the first one has to flow to Gamma.
_RADII = (1e-3, 1e-2, 1e-1)


def check_attraction(subject: Subject, effort: Effort) -> Sequence[Result]:
    """Gradient flow takes the start, and a ball around it, to the manifold."""
    if subject.x_init is None:
        return []
    survey = Survey.of(subject, effort)
    if survey.unreached is not None:
        detail = f"{survey.unreached.problem}: {survey.unreached.received}"
        meaning = (
            "Training that starts there is not described by the limit. The other assumptions were "
            "looked at on minimisers that are found from random directions. "
            + survey.unreached.remedy
        )
        return [_result("fails", detail, 1.0, 0.0, meaning)]
    x = subject.x_init.reshape(-1)
    norm = x.norm()
    limit = subject.geometry.limit_map(x)
    distance = float((x - limit).norm() / norm)
    noise = subject.normals(66, effort.points, len(x))
    noise = noise / noise.norm(dim=1, keepdim=True)
    shares = []
    for radius in _RADII:
        ends = subject.limits(x + radius * norm * noise)
        arrived = survey.on_level(ends / ends.norm(dim=1, keepdim=True))
        shares.append(float(arrived.to(torch.float64).mean()))
    spread = ", ".join(
        f"{share:.0%} within {radius:g}" for share, radius in zip(shares, _RADII, strict=True)
    )
    detail = (
        f"|x - Phi(x)| / |x| = {distance:.3g}, Phi(x) / |x| = {show_point(limit / norm)}; of "
        f"{effort.points} points around x there flow to minimisers of the same loss: {spread} of "
        "|x|"
    )
    if shares[0] < 1.0:
        meaning = (
            "The start is at the border of the attraction set: which minimisers training comes "
            "to depends on its first steps."
        )
        return [_result("fails", detail, 1.0 - shares[0], 0.0, meaning)]
    meaning = ""
    if shares[-1] < 1.0:
        meaning = "A learning rate that is not small can take the first steps out of it."
    return [_result("holds", detail, 0.0, 0.0, meaning)]


CHECKS = (Check(_NAME, "assumption", _STATEMENTS, check_attraction),)
