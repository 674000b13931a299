"""Are the runs independent? What repeats is noticed before anything is concluded from it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.ergodicity.runs import STARTS, ErgodicRuns
from manifold_sde.verification.result import Design, Result
from manifold_sde.verification.statistics import holm
from manifold_sde.verification.subject import Subject

Array = NDArray[np.float64]

NAME = "independence of the runs"
#: States of norm 1 that are nearer than this are the same run.
_SAME = 1e-9


def repeated(directions: Array) -> int:
    """Runs whose end state is that of another one: of (n, D)."""
    order = np.lexsort(np.round(directions / _SAME).T)
    ordered = directions[order]
    same = np.linalg.norm(np.diff(ordered, axis=0), axis=1) <= _SAME * math.sqrt(ordered.shape[1])
    return int(same.sum())


def dependence(ends: Array, table: Array) -> float:
    """P-value of the hypothesis that runs of the same number are independent between starts.

    Args:
        ends: End states (STARTS, n, D), for their shape.
        table: Values (STARTS, n, m) of functions of them.
    """
    n = ends.shape[1]
    p_values = []
    for i in range(len(ends)):
        for j in range(i):
            for k in range(table.shape[-1]):
                a, b = table[i, :, k], table[j, :, k]
                if min(a.std(), b.std()) > 0:
                    correlation = float(np.corrcoef(a, b)[0, 1])
                    z = math.sqrt(n - 3) * math.atanh(np.clip(correlation, -1 + 1e-12, 1 - 1e-12))
                    p_values.append(2.0 * float(stats.norm.sf(abs(z))))
    return float(holm(p_values).min()) if p_values else 0.0


def independent(runs: ErgodicRuns) -> bool:
    """Whether nothing speaks against the independence of the runs."""
    ends = runs.end_directions()
    table = np.stack([runs.functionals.table(part) for part in ends])
    halves = _halves(table)
    alarm = runs.effort.false_alarm
    return not any(map(repeated, ends)) and min(dependence(ends, table), halves) > alarm


def _halves(table: Array) -> float:
    """P-value for the two halves of the runs of each start: (STARTS, n, m)."""
    half = table.shape[1] // 2
    parts = [
        dependence(pair, pair) for part in table for pair in [np.stack([part[:half], part[-half:]])]
    ]
    return float(holm(parts).min())


def _check(subject: Subject, effort: Effort) -> list[Result]:
    runs = ErgodicRuns.of(subject, effort)
    if not runs.is_regular:
        return []
    n = runs.runs_per_start
    found = math.sqrt(2.0) * (stats.norm.isf(effort.false_alarm / 100) + 2.33) / math.sqrt(n)
    design = Design(
        "the runs are independent",
        effort.false_alarm,
        f"two that are the same, and correlations of {found:.2f} between runs of two starts, or "
        "the halves of one",
        effort.miss,
        STARTS * n,
    )
    ends = runs.end_directions()
    table = np.stack([runs.functionals.table(part) for part in ends])
    copies = sum(map(repeated, ends))
    p = float(holm([dependence(ends, table), _halves(table)]).min())
    good = copies == 0 and p > effort.false_alarm
    detail = (
        f"{copies} of {STARTS * n} runs end where another one does; correlations between starts "
        f"and between halves: p = {p:.2g}"
    )
    return [
        Result(
            NAME,
            "holds" if good else "fails",
            detail,
            statistic=float(copies),
            limit=0.0,
            p_value=0.0 if copies else p,
            kind="statistics",
            meaning=""
            if good
            else "Runs share their random numbers: no test can be believed that takes them as "
            "independent. Look at the source of the Brownian paths.",
            design=design,
        )
    ]


CHECKS = (Check(NAME, "statistics", (), _check),)
