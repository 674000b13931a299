"""Where training starts: the attraction set U of the manifold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from manifold_sde.verification.assumptions.survey import Survey, assumption, show_point
from manifold_sde.verification.result import Result, found
from manifold_sde.verification.sampling import unit

#: Radii of the balls around the start, relative to its norm; the first one has to flow to Gamma.
RADII = (1e-3, 1e-2, 1e-1)


def check_attraction(survey: Survey) -> Result | None:
    """Gradient flow takes the start, and a ball around it, to the manifold."""
    return attracted(survey, survey.effort.points, RADII)


def attracted(survey: Survey, n: int, radii: Sequence[float]) -> Result | None:
    """The start, and points at some radii around it; ``None`` where no start is given.

    Args:
        survey: The survey.
        n: Points at each radius.
        radii: The radii, relative to the norm of the start.
    """
    subject = survey.subject
    if survey.unreached is not None:
        detail = f"{survey.unreached.problem}: {survey.unreached.received}"
        meaning = (
            "Training that starts there is not described by the limit. The other assumptions were "
            "looked at on minimisers that are found from random directions. "
            + survey.unreached.remedy
        )
        return found("fails", detail, 1.0, 0.0, meaning)
    if subject.x_init is None:
        return None
    x = subject.x_init
    norm = x.norm()
    limit = subject.geometry.limit_map(x)
    distance = float((x - limit).norm() / norm)
    noise = unit(subject.normals(66, n, len(x)))
    shares = []
    for radius in radii:
        ends = subject.limits(x + radius * norm * noise)
        arrived = survey.on_level(unit(ends))
        shares.append(float(arrived.to(torch.float64).mean()))
    spread = ", ".join(
        f"{share:.0%} within {radius:g}" for share, radius in zip(shares, radii, strict=True)
    )
    detail = (
        f"|x - Phi(x)| / |x| = {distance:.3g}, Phi(x) / |x| = {show_point(limit / norm)}; of "
        f"{n} {'points' if n > 1 else 'point'} around x there flow to minimisers of the same "
        f"loss: {spread} of |x|"
    )
    if shares[0] < 1.0:
        meaning = (
            "The start is at the border of the attraction set: which minimisers training comes "
            "to depends on its first steps."
        )
        return found("fails", detail, 1.0 - shares[0], 0.0, meaning)
    meaning = ""
    if shares[-1] < 1.0:
        meaning = "A learning rate that is not small can take the first steps out of it."
    return found("holds", detail, 0.0, 0.0, meaning)


CHECKS = (
    assumption(
        "attraction set around the start", ("Definition 2.6", "Lemma 2.7"), check_attraction
    ),
)
