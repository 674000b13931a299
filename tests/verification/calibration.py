"""Error rates of the statistical checks over many seeds, on the model of section 6.1.

``python -m tests.verification.calibration`` prints the table. Every seed's p-values are a line of
``results/calibration.jsonl``, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from manifold_sde.verification import Effort, Result, Subject
from manifold_sde.verification.check import Check
from manifold_sde.verification.laws import LIMIT_THEOREMS
from manifold_sde.verification.laws.equilibrium import INDEPENDENCE, ONE_EQUILIBRIUM
from manifold_sde.verification.laws.known_laws import EXACT_LAW, VOLUME_OF_HESSIAN
from tests.verification.departures import Equilibria, Limits, problem

SEEDS = int(os.environ.get("MANIFOLD_SDE_SEEDS", "200"))
PATH = Path(__file__).parents[2] / "results" / "calibration.jsonl"
#: Few runs; the checks reject at 1 %, so that false alarms can be counted, and may miss 5 %.
FALSE_ALARM, MISS = 0.01, 0.05
EFFORT = Effort(
    "calibration",
    points=4,
    departure=0.4,
    false_alarm=FALSE_ALARM,
    miss=MISS,
    step_size=0.05,
    runs=200,
    steps=256,
)
CHECKS: tuple[Check, ...] = (
    *LIMIT_THEOREMS,
    EXACT_LAW,
    INDEPENDENCE,
    ONE_EQUILIBRIUM,
    VOLUME_OF_HESSIAN,
)
#: Single tests whose p-values are bounds, so that small ones are rarer than they say.
BOUNDS = ("covariance", "independence of runs", "independence of steps")
#: Single tests that feel what extrapolation leaves of SGD's error, which their checks tolerate.
BIASED = {
    "SGD at a fixed ratio tends to (8)": ("log norm",),
    "norm of SGD's weights": ("E |x|^4",),
}
#: One seed in so many is run with a part broken too.
BROKEN_EVERY = 4


_LIMITS, _EQUILIBRIA = Limits(EFFORT), Equilibria(EFFORT)
#: What is broken to see whether a departure of the declared size is found.
BROKEN: dict[str, Callable[[Subject, float], Subject]] = {
    "Z of (7) tends to a Brownian motion": _LIMITS.steps,
    "Z of (15) to (17) tends to a Brownian motion": _LIMITS.steps,
    "SGD at a fixed ratio tends to (8)": _LIMITS.sgd,
    "SGD in the time tau tends to (13)": _LIMITS.sgd,
    "the SDE of SGD in the time tau tends to (13)": _LIMITS.limiting,
    "weight decay changes time and norm of (8)": _LIMITS.decaying,
    "SGD without weight decay comes later": _LIMITS.sgd_without_decay,
    "SGD at two pairs of rates has one law": _LIMITS.sgd_at_the_second_rates,
    "norm of SGD's weights": _LIMITS.norms,
    "equilibrium norm of SGD's weights": _LIMITS.steps,
    "laws of the direction against the exact law": _EQUILIBRIA.direction,
    "independence of the runs": _EQUILIBRIA.dependent,
    "one equilibrium from every start": _EQUILIBRIA.one_start,
    "equilibrium and the volume of the Hessian": _EQUILIBRIA.all_starts,
}


def one_seed(seed: int) -> dict[str, Any]:
    """P-values of all checks, and of those of which a part is broken."""
    subject = Subject.of(problem(), seed=seed)
    row: dict[str, Any] = {"seed": seed, "right": {}, "single": {}, "wrong": {}}
    for check in CHECKS:
        for result in check(subject, EFFORT):
            if result.p_value is None:
                continue
            row["right"][result.name] = result.p_value
            row["single"][result.name] = dict(result.tests)
            if result.name in BROKEN and seed % BROKEN_EVERY == 0:
                row["wrong"][result.name] = _broken(check, subject, result)
    return row


def _broken(check: Check, subject: Subject, right: Result) -> float:
    assert right.design is not None
    assert right.design.size is not None
    broken = BROKEN[right.name](subject, right.design.size)
    broken.__dict__["walks"] = subject.walks
    (found,) = (r for r in check(broken, EFFORT) if r.name == right.name)
    return 1.0 if found.p_value is None else found.p_value


def rows(seeds: int = SEEDS, path: Path = PATH) -> Iterator[dict[str, Any]]:
    """The rows of all seeds, from the file where they are there."""
    path.parent.mkdir(exist_ok=True)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {row["seed"]: row for row in done}
    with path.open("a", encoding="utf-8") as file:
        for seed in range(seeds):
            if seed not in known:
                known[seed] = one_seed(seed)
                file.write(json.dumps(known[seed]) + "\n")
                file.flush()
            yield known[seed]


@dataclass(frozen=True)
class Rates:
    """What came out for a check.

    Attributes:
        name: The check.
        seeds: Number n of seeds.
        uniform: Smallest p-value of Kolmogorov's tests that the single tests' p-values are
            uniform, times their number; one-sided for bounds.
        alarms: False alarms at 1 %.
        found: Share of the declared departures that were found, or ``None``.
        broken: Number of seeds at which they were there.
    """

    name: str
    seeds: int
    uniform: float
    alarms: int
    found: float | None
    broken: int

    @property
    def good(self) -> bool:
        """Whether the declared rates can be true: each of three tests at 1e-4."""
        alarms = stats.binomtest(self.alarms, self.seeds, FALSE_ALARM, alternative="greater")
        missed = 0 if self.found is None else round((1.0 - self.found) * self.broken)
        misses = stats.binomtest(missed, self.broken or 1, MISS, alternative="greater")
        return min(self.uniform, float(alarms.pvalue), float(misses.pvalue)) > 1e-4


def table(found: list[dict[str, Any]]) -> list[Rates]:
    """The rates of each check."""
    rates = []
    for name in found[0]["right"]:
        p = np.array([row["right"][name] for row in found])
        single: dict[str, list[float]] = {}
        for row in found:
            for test, value in row["single"][name].items():
                single.setdefault(test, []).append(value)
        for test in BIASED.get(name, ()):
            single.pop(test, None)
        side = {test: "greater" if test in BOUNDS else "two-sided" for test in single}
        tests = [
            float(stats.kstest(values, "uniform", alternative=side[test]).pvalue)
            for test, values in single.items()
        ]
        if not tests:
            tests = [float(stats.kstest(p, "uniform", alternative="greater").pvalue)]
        wrong = [row["wrong"][name] for row in found if name in row["wrong"]]
        share = float((np.array(wrong) <= FALSE_ALARM).mean()) if wrong else None
        alarms = int((p <= FALSE_ALARM).sum())
        uniform = min(1.0, min(tests) * len(tests))
        rates.append(Rates(name, len(found), uniform, alarms, share, len(wrong)))
    return rates


def markdown(rates: list[Rates]) -> str:
    """The table, as it stands in the documentation."""
    lines = ["| check | uniform, p | false alarms | found |", "|---|---|---|---|"]
    for r in rates:
        share = "" if r.found is None else f"{r.found:.0%} of {r.broken}"
        lines.append(f"| {r.name} | {r.uniform:.2g} | {r.alarms} of {r.seeds} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(markdown(table(list(rows()))))
