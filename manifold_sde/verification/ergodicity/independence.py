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


def dependence(table: Array) -> float:
    """P-value of the hypothesis that no run knows of another one.

    Each function is correlated with each other one, of the run so many numbers later, for every
    such number that leaves a quarter of the runs: random numbers that repeat do so at some of them.

    Args:
        table: Values (N, m) of functions of the runs' ends, of mean 0 and variance 1.
    """
    n, count = table.shape
    spectrum = np.fft.rfft(table, 2 * n, axis=0)
    largest = n - max(n // 4, 20)
    smallest, tests = 1.0, 0
    overlap = n - np.arange(1, largest + 1)
    for k in range(count):
        for j in range(count):
            sums = np.fft.irfft(spectrum[:, k].conj() * spectrum[:, j], 2 * n)[1 : largest + 1]
            correlation = np.clip(sums / overlap, -0.999999, 0.999999)
            z = np.abs(np.arctanh(correlation)) * np.sqrt(overlap - 3.0)
            smallest = min(smallest, 2.0 * float(stats.norm.sf(z.max())))
            tests += len(z)
    return min(1.0, smallest * tests)


def standardised(runs: ErgodicRuns) -> Array:
    """Values of the declared functions at the ends (N, m), of mean 0 and variance 1 by start."""
    tables = []
    for part in runs.end_directions():
        table = runs.functionals.table(part)
        tables.append((table - table.mean(0)) / np.maximum(table.std(0), 1e-12))
    return np.concatenate(tables)


def independent(runs: ErgodicRuns) -> bool:
    """Whether nothing speaks against the independence of the runs."""
    if any(map(repeated, runs.end_directions())):
        return False
    return dependence(standardised(runs)) > runs.effort.false_alarm


def _check(subject: Subject, effort: Effort) -> list[Result]:
    runs = ErgodicRuns.of(subject, effort)
    if not runs.is_regular:
        return []
    n = runs.runs_per_start
    tests = STARTS * n * len(runs.functionals) ** 2
    quantiles = stats.norm.isf(0.5 * effort.false_alarm / tests) + stats.norm.isf(effort.miss)
    found = math.tanh(quantiles / math.sqrt(0.25 * STARTS * n))
    design = Design(
        "the runs are independent",
        effort.false_alarm,
        f"two that are the same, and correlations of {found:.2f} between runs a fixed number apart",
        effort.miss,
        STARTS * n,
        found,
    )
    ends = runs.end_directions()
    copies = sum(map(repeated, ends))
    p = dependence(standardised(runs))
    good = copies == 0 and p > effort.false_alarm
    detail = (
        f"{copies} of {STARTS * n} runs end where another one does; correlations between "
        f"runs at any distance: p = {p:.2g}"
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
