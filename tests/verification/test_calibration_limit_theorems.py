"""False alarms of the checks of limit theorems, counted over many seeds.

Each check is run with small budgets for many seeds on a problem for which all of it is true. The
p-values are kept in a file of JSON lines, a line for each seed and check, so that a run that was
stopped goes on. A p-value is a bound where something is tolerated, so that small ones may be rarer
than they say, and not more frequent: the share below each level is held against it. Those of Z are
exact, but for Holm's and Bonferroni's corrections.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from scipy import stats

from manifold_sde import problems
from manifold_sde.verification import Effort, Subject
from manifold_sde.verification.limit_theorems import CHECKS

#: 20 seeds by default; MANIFOLD_SDE_CALIBRATION_SEEDS=200 for more.
SEEDS = int(os.environ.get("MANIFOLD_SDE_CALIBRATION_SEEDS", "20"))
CHEAP = Effort("cheap", points=4, departure=0.4, runs=200, steps=256, step_size=0.05)
FILE = Path(__file__).parents[2] / "results" / "calibration_limit_theorems.jsonl"
#: Levels at which false alarms are counted; each count is judged at ALARM.
LEVELS = (0.3, 0.1, 0.05, 0.01)
ALARM = 1e-4

Key = tuple[int, str]


def stored() -> dict[Key, float]:
    """P-values of earlier runs, by seed and name of the result."""
    if not FILE.exists():
        return {}
    lines = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    return {(line["seed"], line["name"]): line["p_value"] for line in lines}


def append(seed: int, values: dict[str, float]) -> None:
    FILE.parent.mkdir(exist_ok=True)
    with FILE.open("a", encoding="utf-8") as file:
        for name, p_value in values.items():
            file.write(json.dumps({"seed": seed, "name": name, "p_value": p_value}) + "\n")


def p_values(seed: int) -> dict[str, float]:
    """P-values of all statistical results at a seed."""
    subject = Subject.of(problems.great_sphere(), seed=seed)
    results = [result for check in CHECKS for result in check(subject, CHEAP)]
    return {r.name: r.p_value for r in results if r.p_value is not None}


@pytest.mark.thorough
def test_false_alarms_are_no_more_frequent_than_declared() -> None:
    known = stored()
    for seed in range(SEEDS):
        if not any(key[0] == seed for key in known):
            append(seed, p_values(seed))
    known = {key: p for key, p in stored().items() if key[0] < SEEDS}
    names = {name for _, name in known}
    assert len(names) == len(CHECKS)
    for name in names:
        found = [p for (_, other), p in known.items() if other == name]
        assert len(found) == SEEDS
        for level in LEVELS:
            alarms = sum(p <= level for p in found)
            enough = stats.binomtest(alarms, SEEDS, level, alternative="greater")
            assert enough.pvalue > ALARM / len(LEVELS), (name, level, alarms)
