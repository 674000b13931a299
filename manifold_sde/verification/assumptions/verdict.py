"""The result of the check of an assumption."""

from __future__ import annotations

import math

from manifold_sde.verification.result import Picture, Result


def assumption(
    statements: tuple[str, ...],
    name: str,
    verdict: str,
    detail: str,
    statistic: float = math.nan,
    limit: float = math.nan,
    meaning: str = "",
    pictures: tuple[Picture, ...] = (),
) -> Result:
    """A result of the kind "assumption"; the arguments are those of :class:`Result`."""
    return Result(
        name,
        verdict,  # type: ignore[arg-type]
        detail,
        statistic,
        limit,
        statements=statements,
        kind="assumption",
        meaning=meaning,
        pictures=pictures,
    )
