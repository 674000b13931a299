"""What is said of paths that were lost: one rule for every average over those that are left.

A step or a tolerance loses the paths that came where the manifold is hard to follow, or ends, so
that the others are not a random sample of all.
"""

from __future__ import annotations

import warnings
from typing import Any

from manifold_sde.errors import LostPathsError, LostPathsWarning

#: Share of lost paths up to which the others are averaged, with a warning.
SHARE = 0.01
_SMALLER_STEP = "a smaller dt"


def remedy_of(config: Any) -> str:
    """What loses fewer paths in a run, by its configuration."""
    if config.get("method") == "sgd":
        return "a smaller learning rate"
    if "rtol" in config:
        return "smaller steps (dt_min), or a larger tolerance"
    if not _halves(config):
        return _SMALLER_STEP
    return (
        "times before paths are lost, if check_assumptions(problem) finds that the manifold ends "
        f"or the rank of the Hessian falls; else {_SMALLER_STEP}"
    )


def _halves(config: Any) -> bool:
    """Whether a run took the steps that a path does not survive by their halves."""
    return not str(config.get("method", "torchsde")).startswith("torchsde")


def check_average(
    lost: int,
    paths: int,
    *,
    when: str = "",
    partial: Any = None,
    survivors: str = "solution.ys holds every path, NaN where it is lost",
    remedy: str = _SMALLER_STEP,
) -> None:
    """Refuse an average over survivors where more than one path in a hundred is lost.

    Args:
        lost: Number of paths that do not count, at the worst of the save times.
        paths: Number of all paths.
        when: Where they were lost, after the numbers.
        partial: The average over the others, for the error.
        survivors: How the others are seen all the same.
        remedy: What loses fewer paths.

    Warns:
        LostPathsWarning: If fewer are lost.

    Raises:
        LostPathsError: If more are.
    """
    if not lost:
        return
    counted = f"{lost} of {paths} paths lost{when}"
    if lost > SHARE * paths:
        raise LostPathsError(
            "an average would leave out paths that were lost",
            lost=lost,
            paths=paths,
            partial=partial,
            received=counted,
            expected="at most one in a hundred: those that are left are not a random sample",
            remedy=f"{remedy}. For the survivors all the same: {survivors}",
        )
    warnings.warn(
        f"an average leaves out {counted}. Those that are left are not a random sample: {remedy}",
        LostPathsWarning,
        stacklevel=4,
    )


def warn_of_lost_paths(lost: int, paths: int, config: Any, *, stacklevel: int = 4) -> None:
    """Say that paths of a run were lost, and why."""
    if not lost:
        return
    why = "a step too large for the retraction"
    if "rtol" in config:
        why = "a step of the smallest size did not meet the tolerance"
    elif _halves(config):
        why = "no part of a step, however short, came back to the manifold"
    warnings.warn(
        f"{lost} of {paths} paths were lost and are NaN ({why}). Those that are left are not a "
        f"random sample: take {remedy_of(config)}",
        LostPathsWarning,
        stacklevel=stacklevel,
    )
