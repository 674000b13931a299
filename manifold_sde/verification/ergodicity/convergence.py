"""Theorem 5.4: from any start the direction comes to one law."""

from __future__ import annotations

import math

import numpy as np

from manifold_sde.paper import implements
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.ergodicity.independence import independent
from manifold_sde.verification.ergodicity.runs import STARTS, ErgodicRuns
from manifold_sde.verification.ergodicity.total_variation import CELLS, cells, total_variation
from manifold_sde.verification.result import Design, Picture, Result, Series, Verdict
from manifold_sde.verification.statistics import holm
from manifold_sde.verification.subject import Subject
from manifold_sde.verification.two_sample import compare_laws

NAME = "one equilibrium from every start"
_STATEMENTS = ("Theorem 5.4", "Theorem 1.2")


def theorem_does_not_apply(runs: ErgodicRuns) -> Result | None:
    """What is to be said where an assumption of Theorem 5.4 fails for good."""
    degeneracy = runs.degeneracy
    if runs.is_regular:
        return None
    detail = (
        f"groups of weights: {len(degeneracy.groups)}; the noise has rank {degeneracy.noise_rank} "
        f"along the {degeneracy.manifold_dim} dimensions of Gamma_1"
    )
    return Result(
        NAME,
        "fails",
        detail,
        statements=_STATEMENTS,
        kind="statistics",
        meaning=str(degeneracy.statement),
    )


@implements("Theorem 5.4")
def check_convergence(subject: Subject, effort: Effort) -> list[Result]:
    """Compare the laws at the end of runs from starts that are far apart."""
    runs = ErgodicRuns.of(subject, effort)
    refused = theorem_does_not_apply(runs)
    if refused is not None:
        return [refused]
    n = runs.runs_per_start
    design = Design(
        f"the law of the direction at T is the same from {STARTS} starts that are far apart",
        effort.false_alarm,
        f"a mean of a declared function that differs by {runs.effect:g} standard deviations, as "
        f"somewhere in laws at a total variation distance of {effort.departure:g}",
        effort.miss,
        STARTS * n,
        runs.effect,
    )
    ends = runs.end_directions()
    comparisons = [
        compare_laws(ends[i], np.delete(ends, i, 0).reshape(-1, ends.shape[-1]), runs.functionals)
        for i in range(STARTS)
    ]
    p = float(holm([found.p_value for found in comparisons]).min())
    worst = comparisons[int(np.argmin([found.p_value for found in comparisons]))].worst
    distances = _distances(runs)
    detail = (
        f"p = {p:.2g} at T = {runs.end:.3g}, {runs.relaxations:.2g} relaxation times "
        f"({runs.relaxation.source}); most apart in {worst}"
    )
    if distances:
        value, error = distances[-1][0][-1], distances[-1][1][-1]
        detail += f"; total variation distance {value:.3f} +- {error:.3f} at the end"
    verdict, meaning = _verdict(runs, p)
    return [
        Result(
            NAME,
            verdict,
            detail,
            statistic=1.0 - p,
            limit=1.0 - effort.false_alarm,
            p_value=p,
            statements=_STATEMENTS,
            kind="statistics",
            meaning=meaning,
            design=design,
            tests={
                f"start {i}, {name}": value
                for i, found in enumerate(comparisons)
                for name, value in found.p_values.items()
            },
            pictures=_pictures(runs, distances),
        )
    ]


def _verdict(runs: ErgodicRuns, p: float) -> tuple[Verdict, str]:
    degeneracy = runs.degeneracy
    if p <= runs.effort.false_alarm:
        return (
            "fails",
            "Where the direction ends depends on where it started. Either it takes longer than its "
            "relaxation time says, or there are several equilibria: Gamma_1 in several pieces, or "
            "noise that does not reach all of it.",
        )
    if not independent(runs):
        return "undecided", "The runs are not independent, so that nothing follows from them."
    if degeneracy.noise_rank < degeneracy.manifold_dim:
        return "undecided", str(degeneracy.statement)
    needed = math.log(2.0 * math.sqrt(2.0) / (0.1 * runs.effect))
    if runs.relaxations < 0.999 * needed:
        return (
            "undecided",
            f"The runs are too short to have mixed: T = {needed * runs.relaxation.time:.3g} is "
            "needed.",
        )
    return "holds", ""


def _distances(runs: ErgodicRuns) -> list[tuple[list[float], list[float]]]:
    """Distance of the law at each kept time from the law at the end, and error, by start.

    The law at the end is that of the other starts' runs, which are independent.
    """
    dimension = runs.degeneracy.manifold_dim
    if dimension not in CELLS:
        return []
    walks = runs.subject.walks
    centers = cells(walks[len(walks) // 3 :].flatten(0, 1).numpy(), CELLS[dimension])
    directions = runs.ends.directions.numpy()
    directions = directions.reshape(len(directions), STARTS, -1, directions.shape[-1])
    found = []
    for i in range(STARTS):
        common = np.delete(directions[-1], i, 0).reshape(-1, directions.shape[-1])
        pairs = [total_variation(now[i], common, centers) for now in directions]
        found.append(([v for v, _ in pairs], [e for _, e in pairs]))
    return found


def _pictures(
    runs: ErgodicRuns, distances: list[tuple[list[float], list[float]]]
) -> tuple[Picture, ...]:
    if not distances:
        return ()
    times = runs.ends.ts.tolist()
    series = [
        Series(f"start {i + 1}", times, values, "points", errors)
        for i, (values, errors) in enumerate(distances)
    ]
    fine = [times[-1] * k / 60 for k in range(61)]
    decay = [math.exp(-t / runs.relaxation.time) for t in fine]
    series.append(Series("exp(-T / relaxation time)", fine, decay, "dashed"))
    return (
        Picture(
            "Distance of the law of the direction from that at the end",
            "time T of (13)",
            "total variation distance",
            tuple(series),
        ),
    )


CHECKS = (Check(NAME, "statistics", _STATEMENTS, check_convergence),)
