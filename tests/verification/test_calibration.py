"""The statistical checks keep the error rates that they declare: p-values over 200 seeds."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from manifold_sde.verification import Effort, Subject
from manifold_sde.verification.effort import QUICK, THOROUGH
from manifold_sde.verification.exact import AngleLaw
from manifold_sde.verification.laws.known_laws import clocks, sample_size
from manifold_sde.verification.laws.long_runs import LongRuns
from manifold_sde.verification.statistics import watson_test
from tests.verification.calibration import EFFORT, Rates, rows, table
from tests.verification.departures import (
    cosine_deviation,
    noise_for_shift,
    problem,
    spread_for_shift,
)


@pytest.mark.thorough
def test_error_rates_over_many_seeds() -> None:
    rates = table(list(rows()))
    assert [r for r in rates if not r.good] == []


@functools.cache
def runs_of(effort: Effort) -> LongRuns:
    return LongRuns.of(Subject.of(problem()), effort)


def at_clocks(effort: Effort, angles: Callable[[float, np.random.Generator], np.ndarray]) -> float:
    """Share of 400 samples of angles that Watson's test at the clocks rejects."""
    runs = runs_of(effort)
    law = AngleLaw.of(runs.subject.problem)
    rng = np.random.default_rng(0)
    p_values = [
        watson_test(angles(law.at_clock(u).variance, rng), law.at_clock(u).cdf).p_value
        for u in clocks(runs)
    ]
    least = np.min(p_values, axis=0) * len(p_values)
    return float((least <= effort.false_alarm).mean())


@pytest.mark.parametrize("effort", [EFFORT, QUICK, THOROUGH], ids=lambda effort: effort.name)
@pytest.mark.parametrize("kind", ["more noise", "another start"])
def test_watsons_test_has_the_power_that_is_declared(effort: Effort, kind: str) -> None:
    """Samples of the wrong law itself: a low harmonic off by exactly the declared effect."""
    runs = runs_of(effort)
    n, effect = sample_size(runs, on_sphere=False), runs.effect
    law = AngleLaw.of(runs.subject.problem)
    variances = [law.at_clock(u).variance for u in clocks(runs)]
    noise = 1.0 + noise_for_shift(effect, variances)
    # E sin is e^{-v/2} sin(shift), and the variance of sin (1 - e^{-2v}) / 2.
    first = variances[0]
    deviation = math.sqrt(0.5 * (1.0 - math.exp(-2.0 * first)))
    shift = math.asin(effect * deviation / math.exp(-0.5 * first))

    def angles(variance: float, rng: np.random.Generator) -> np.ndarray:
        factor, mean = (noise, 0.0) if kind == "more noise" else (1.0, shift)
        start = law.start + mean
        return start + rng.normal(0.0, math.sqrt(factor * variance), (400, n))

    misses = round(400 * (1.0 - at_clocks(effort, angles)))
    assert stats.binomtest(misses, 400, effort.miss, alternative="greater").pvalue > 1e-4


def test_the_noise_takes_the_mean_off_by_the_effect() -> None:
    """Against sampled angles: the departure is the declared one, and at one clock no less."""
    rng = np.random.default_rng(1)
    variances, effect = [0.5, 1.5, 3.0], 0.8
    factor = 1.0 + noise_for_shift(effect, variances)
    shifts = []
    for v in variances:
        right, wrong = (np.cos(rng.normal(0.0, math.sqrt(f * v), 10**6)) for f in (1.0, factor))
        assert right.std() == pytest.approx(cosine_deviation(v), abs=5e-3)
        shifts.append((right.mean() - wrong.mean()) / right.std())
    assert max(shifts) == pytest.approx(effect, abs=1e-2)
    assert np.cos(rng.normal(0.0, math.sqrt(spread_for_shift(effect)), 10**6)).mean() / math.sqrt(
        0.5
    ) == pytest.approx(effect, abs=1e-2)


def invented(p_values: np.ndarray, wrong: np.ndarray) -> Rates:
    """Rates of a check with these p-values."""
    found = [
        {"right": {"a": p}, "single": {"a": {"t": p}}, "wrong": {"a": w}}
        for p, w in zip(p_values.tolist(), wrong.tolist(), strict=True)
    ]
    return table(found)[0]


def test_what_is_not_calibrated_is_noticed() -> None:
    uniform = (np.arange(200) + 0.5) / 200
    assert invented(uniform, np.zeros(200)).good
    # Too many alarms; p-values that are too large to be p-values; departures that are missed.
    assert not invented(uniform**2, np.zeros(200)).good
    assert not invented(np.sqrt(uniform), np.zeros(200)).good
    assert not invented(uniform, np.where(uniform < 0.2, 0.5, 0.0)).good


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    made: list[int] = []

    def one_seed(seed: int) -> dict[str, int]:
        made.append(seed)
        return {"seed": seed}

    monkeypatch.setattr("tests.verification.calibration.one_seed", one_seed)
    assert [row["seed"] for row in rows(2, path)] == [0, 1]
    assert [row["seed"] for row in rows(3, path)] == [0, 1, 2]
    assert made == [0, 1, 2]
    assert [json.loads(line)["seed"] for line in path.read_text().splitlines()] == [0, 1, 2]
