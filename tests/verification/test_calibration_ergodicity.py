"""Error rates of the checks of ergodicity over many seeds, on the problem of section 6.1.

Each seed's p-values go to a line of results/calibration_ergodicity.jsonl; a run that was stopped
goes on where it was. MANIFOLD_SDE_SEEDS is the number of seeds, 200 by default.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from manifold_sde import SphericalNoise, problems
from manifold_sde.verification import Effort, Subject
from manifold_sde.verification.ergodicity import convergence, end_law, independence, reversible
from manifold_sde.verification.ergodicity.runs import ErgodicRuns
from tests.verification.ergodic import on_another, run, with_solver

SEEDS = int(os.environ.get("MANIFOLD_SDE_SEEDS", "200"))
PATH = Path("results") / "calibration_ergodicity.jsonl"
#: False-alarm rate of each test here.
LEVEL = 1e-4
#: The checks reject at 1 %, so that false alarms can be counted, and may miss 5 %.
EFFORT = Effort("calibration", points=8, departure=0.4, false_alarm=0.01, miss=0.05)
#: Variance of the noise that shifts E cos(angle) at the last clock by the effect, or more.
WRONG_SCALE = 0.75

CHECKED = [*end_law.CHECKS, *independence.CHECKS, *convergence.CHECKS, *reversible.CHECKS]


def problem() -> Any:
    return problems.normalized_linear(design="orthogonal")


def one_seed(seed: int) -> dict[str, float]:
    """P-values of the checks on the right solver, and of one on a wrong one."""
    made = problem()
    found = run(CHECKED, Subject.of(made, seed=seed), EFFORT)
    rows = {name: float(result.p_value or 0.0) for name, result in found.items()}
    louder = made.with_noise(SphericalNoise(WRONG_SCALE))
    broken = with_solver(made, on_another(louder), seed)
    wrong = run(end_law.CHECKS, broken, EFFORT)
    return rows | {"broken: " + name: float(r.p_value or 0.0) for name, r in wrong.items()}


def test_a_seed_takes_about_a_second_and_repeats() -> None:
    """Shared simulations are made once: the second check of a subject costs next to nothing."""
    subject = Subject.of(problem(), seed=3)
    first = run(independence.CHECKS, subject, EFFORT)
    runs = ErgodicRuns.of(subject, EFFORT)
    assert "ends" in runs.__dict__
    again = run(independence.CHECKS, Subject.of(problem(), seed=3), EFFORT)
    assert first[independence.NAME].p_value == again[independence.NAME].p_value


@pytest.mark.thorough
def test_error_rates_over_many_seeds() -> None:
    PATH.parent.mkdir(exist_ok=True)
    done = [json.loads(line) for line in PATH.read_text().splitlines()] if PATH.exists() else []
    known = {row["seed"] for row in done}
    with PATH.open("a", encoding="utf-8") as file:
        for seed in range(SEEDS):
            if seed not in known:
                row = {"seed": seed, **one_seed(seed)}
                done.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
    rows = [row for row in done if row["seed"] < SEEDS]
    for check in CHECKED:
        p = np.array([row[check.name] for row in rows])
        alarms = int((p <= EFFORT.false_alarm).sum())
        # Holm's p-values are at least as large as uniform ones: one-sided.
        assert stats.kstest(p, "uniform", alternative="greater").pvalue > LEVEL, check.name
        assert (
            stats.binomtest(alarms, len(p), EFFORT.false_alarm, alternative="greater").pvalue
            > LEVEL
        ), f"{check.name}: {alarms} of {len(p)}"
    p = np.array([row["broken: " + end_law.NAME] for row in rows])
    missed = int((p > EFFORT.false_alarm).sum())
    assert stats.binomtest(missed, len(p), EFFORT.miss, alternative="greater").pvalue > LEVEL, (
        f"{missed} of {len(p)} missed"
    )
