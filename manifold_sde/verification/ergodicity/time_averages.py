"""Averages along chains, weighted by the norm's fourth power, against the law in time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

from manifold_sde.errors import NotMixedWarning
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.ergodicity.runs import BURN_IN, CHAIN, STARTS, ErgodicRuns
from manifold_sde.verification.result import Design, Result, Verdict
from manifold_sde.verification.statistics import holm
from manifold_sde.verification.subject import Subject

NAME = "time averages under the equilibrium"
_STATEMENTS = ("Theorem 5.4",)

#: Chains, function of states, burn-in -> ``EquilibriumAverage``.
Average = Callable[[Any, Any, float], Any]


def weighted_average(solution: Any, function: Any, burn_in: float) -> Any:
    """The solution's own average under pi."""
    return solution.equilibrium(function, burn_in=burn_in)


def check_time_averages(
    subject: Subject, effort: Effort, average: Average = weighted_average
) -> list[Result]:
    """Compare weighted averages over the chains with means over independent runs in time.

    Args:
        subject: The subject.
        effort: The effort.
        average: How chains are averaged.
    """
    runs = ErgodicRuns.of(subject, effort)
    if not runs.is_regular:
        return []
    names = list(runs.functionals)
    design = Design(
        "averages over the chains are means of the law in time",
        effort.false_alarm,
        f"a mean that differs by {runs.effect:g} standard deviations",
        effort.miss,
        STARTS * runs.runs_per_start + runs.n_chains,
    )
    chains = runs.chains
    burn_in = float(chains.ts[-1]) * BURN_IN / CHAIN
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", NotMixedWarning)
        found = average(chains, runs.functionals.tensor, burn_in)
    drifting = any(issubclass(warning.category, NotMixedWarning) for warning in told)
    ends = runs.functionals.table(np.concatenate(list(runs.end_directions())))
    error = np.sqrt(found.standard_error.numpy() ** 2 + ends.var(0, ddof=1) / len(ends))
    z = (found.mean.numpy() - ends.mean(0)) / error
    # The error is that of so many chains: Student's law.
    p_values = 2.0 * stats.t.sf(np.abs(z), found.paths - 1)
    p = float(holm(p_values.tolist()).min())
    worst = int(np.argmin(p_values))
    draws = float(found.effective_sample_size.min())
    detail = (
        f"p = {p:.2g} between {found.paths} chains ({draws:.0f} effective draws) and {len(ends)} "
        f"runs; most apart in {names[worst]}, by {abs(z[worst]):.1f} standard errors"
    )
    verdict: Verdict = "holds"
    meaning = ""
    if p <= effort.false_alarm:
        verdict, meaning = (
            "fails",
            "The average over a long run is not the mean over many runs. States that are kept in "
            "the clock u are to be weighted by the norm's fourth power.",
        )
    elif drifting or not _enough(runs, draws):
        verdict, meaning = "undecided", "The chains are too short for their equilibrium."
    return [
        Result(
            NAME,
            verdict,
            detail,
            statistic=float(np.abs(z).max()),
            limit=float(stats.t.isf(0.5 * effort.false_alarm / len(names), found.paths - 1)),
            p_value=p,
            statements=_STATEMENTS,
            kind="statistics",
            meaning=meaning,
            design=design,
            tests=dict(zip(names, p_values.tolist(), strict=True)),
        )
    ]


def _enough(runs: ErgodicRuns, draws: float) -> bool:
    """Whether the departure is found with both samples as they came out."""
    independent = 1.0 / (1.0 / draws + 1.0 / (STARTS * runs.runs_per_start))
    return independent >= runs.runs(len(runs.functionals), 1.0) or math.isinf(draws)


CHECKS = (Check(NAME, "statistics", _STATEMENTS, check_time_averages),)
