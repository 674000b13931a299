"""The statistical checks keep the error rates that they declare: p-values over 200 seeds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.verification.calibration import Rates, rows, table


@pytest.mark.thorough
def test_error_rates_over_many_seeds() -> None:
    rates = table(list(rows()))
    assert [r for r in rates if not r.good] == []


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
