"""Have long chains mixed? R-hat and the effective sample size, by ArviZ."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manifold_sde.errors import MissingDependencyError
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.ergodicity.runs import BURN_IN, CHAIN, ErgodicRuns
from manifold_sde.verification.result import Design, Picture, Result, Series
from manifold_sde.verification.subject import Subject

Array = NDArray[np.float64]

NAME = "chains that have mixed"
#: Factor by which relaxation may be slower than supposed before chains count as not mixed.
_SLOWER = 2.0


def diagnostics() -> Any:
    """ArviZ's diagnostics of arrays.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        return importlib.import_module("arviz_stats.base").array_stats
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "R-hat and the effective sample size need ArviZ",
            received="no module arviz_stats",
            expected="arviz-stats, an optional dependency",
            remedy='pip install "manifold_sde[verification]"',
        ) from error


def r_hat_limit(length: float) -> float:
    """The R-hat of chains in equilibrium whose relaxation is slower by a factor of 2.

    With the relaxation time as the unit, the mean of half a chain has the variance 2 / (length /
    2) of a state, and so R-hat^2 = 1 + 4 / length; chains that are stuck have a larger one.

    Args:
        length: Length of the chains in relaxation times.
    """
    return math.sqrt(1.0 + _SLOWER * 4.0 / length)


def _check(subject: Subject, effort: Effort) -> list[Result]:
    runs = ErgodicRuns.of(subject, effort)
    if not runs.is_regular:
        return []
    arviz = diagnostics()
    counted = CHAIN - BURN_IN
    limit = r_hat_limit(counted)
    needed = runs.runs(len(runs.functionals))
    design = Design(
        "each chain explores what the others do",
        1e-6,
        f"a relaxation slower than supposed by a factor of {2 * _SLOWER:g}",
        effort.miss,
        runs.n_chains,
    )
    solution = runs.chains
    late = solution.ys[solution.ts >= solution.ts[-1] * BURN_IN / CHAIN]
    table = np.stack([runs.functionals.table(y) for y in late])
    names = list(runs.functionals)
    r_hats = [float(arviz.rhat(table[:, :, k].T, method="split")) for k in range(len(names))]
    sizes = [float(arviz.ess(table[:, :, k].T, method="mean")) for k in range(len(names))]
    worst = int(np.argmax(r_hats))
    good = r_hats[worst] <= limit and min(sizes) >= 0.5 * needed
    detail = (
        f"R-hat of {r_hats[worst]:.3f} ({names[worst]}), {limit:.3f} allowed; {min(sizes):.0f} "
        f"effective draws from {table.shape[1]} chains of {counted:g} relaxation times"
    )
    return [
        Result(
            NAME,
            "holds" if good else "undecided",
            detail,
            statistic=r_hats[worst],
            limit=limit,
            statements=("Theorem 5.4",),
            kind="statistics",
            meaning=""
            if good
            else "The chains have not mixed: averages over them are not averages under the "
            f"equilibrium. A clock of more than {float(solution.ts[-1]):.3g} is needed, or there "
            "is no one equilibrium.",
            design=design,
            pictures=(_picture(runs, solution, names[worst]),),
        )
    ]


def _picture(runs: ErgodicRuns, solution: Any, name: str) -> Picture:
    values = np.stack([runs.functionals[name](y.numpy()) for y in solution.ys])
    return Picture(
        "Some of the chains",
        "intrinsic clock u",
        name,
        tuple(
            Series("", solution.ts.tolist(), values[:, i].tolist())
            for i in range(min(4, values.shape[1]))
        ),
    )


CHECKS = (Check(NAME, "statistics", ("Theorem 5.4",), _check),)
