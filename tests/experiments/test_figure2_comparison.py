"""The comparison on data that are known: samples of the limit's law, and of faulty laws."""

import csv
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from manifold_sde.experiments.experiment import write_csv
from manifold_sde.experiments.figure2 import Comparison, Figure2, Run, Settings, compare
from manifold_sde.experiments.figure2.command import findings
from manifold_sde.experiments.figure2.comparison import (
    FALSE_ALARM,
    limit_law,
    ratio_curve,
    verdicts,
)
from manifold_sde.experiments.settings.figure2 import DESIGNS
from manifold_sde.verification.exact import AngleLaw

SETTINGS = Settings.quick(law_runs=240)
LAWS = {design: AngleLaw.of(SETTINGS.problem(design)) for design in DESIGNS}


def drawn(seed: int, *, stretch: float = 1.0, clock: str = "limit") -> Figure2:
    """A Figure 2 whose angles are drawn from the limit's law, or from a broken twin of it.

    Args:
        seed: Seed of the angles.
        stretch: Factor of the variance.
        clock: "limit", or "linear": the time eta lambda k that the paper tells apart from its own.
    """
    generator = np.random.default_rng(seed)
    runs = []
    for design in DESIGNS:
        for plan in SETTINGS.plans(design):
            law = LAWS[design]
            angles = []
            for k in plan.law_steps:
                here = law.at_steps(plan.lr, 0.05, k)
                if clock == "linear":
                    here = law.at(plan.lr * 0.05 * k)
                wide = dataclasses.replace(here, variance=stretch * here.variance)
                angles.append(wide.sample(240, generator))
            boxes = np.full((len(plan.box_steps), 60, 2), 0.1)
            runs.append(Run(plan, boxes, np.array(angles), np.array(angles)))
    return Figure2(SETTINGS, tuple(runs), LAWS, dict.fromkeys(DESIGNS, 10.0))


@pytest.mark.paper("Figure 2")
def test_samples_of_the_limit_pass_as_often_as_declared() -> None:
    """60 figures at a false alarm rate of 1e-3 each: one alarm has probability 6 %, two 0.2 %."""
    alarms = sum(any(row.differs for row in compare(drawn(seed))) for seed in range(60))
    assert alarms <= 1


def test_rows_are_complete_and_in_order() -> None:
    rows = compare(drawn(0))
    assert [(row.design, row.lr, row.T) for row in rows] == [
        (design, lr, T) for design in DESIGNS for lr in (1e-2, 1e-3, 1e-4) for T in (1.0, 2.0)
    ]
    for row in rows:
        assert row.runs == 240
        assert abs(row.variance_ratio - 1) < 5 * row.standard_error
        assert row.standard_error == pytest.approx(math.sqrt(2 / 239), rel=0.4)
        assert row.kurtosis == pytest.approx(3.0, abs=1.5)
        assert row.distance < 0.25
        assert row.coarse_ratio == row.variance_ratio


@pytest.mark.parametrize("stretch", [2.0, 0.5])
def test_broken_twin_of_the_variance_is_rejected_in_every_row(stretch: float) -> None:
    assert all(row.differs for row in compare(drawn(3, stretch=stretch)))


@pytest.mark.paper("Equation (12)")
def test_broken_twin_of_the_time_scale_is_rejected() -> None:
    """Time counted as lr weight_decay k: at T = 1 that is 1.6 at lr = 1e-3, and 2.2 at 1e-4."""
    rows = compare(drawn(3, clock="linear"))
    assert [row.differs for row in rows if row.lr < 0.01 and row.T == 1.0] == [True] * 4


def test_windings_are_seen_although_the_circle_hides_them() -> None:
    figure = drawn(1)
    run = figure.runs[0]
    turned = run.angles + 2 * math.pi * (np.arange(240) % 10 == 0)
    found = compare(dataclasses.replace(figure, runs=(dataclasses.replace(run, angles=turned),)))
    last = found[-1]
    assert last.p_angle > 1e-4
    assert last.differs
    assert last.beyond > 0.09
    assert last.limit_beyond == pytest.approx(
        2 * (1 - _normal(math.pi / last.limit_variance**0.5)), rel=1e-9
    )
    words = verdicts(found)[0]
    assert "not at the limit" in words
    assert "half a turn" in words
    assert f"{last.circular_ratio:.2f} times if whole turns do not count" in words
    assert last.circular_ratio == pytest.approx(compare(figure)[1].circular_ratio, rel=1e-9)
    assert abs(last.circular_ratio - 1) < 0.4


def _normal(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def test_verdicts_say_what_was_found_and_what_could_have_been() -> None:
    *sentences, power = verdicts(compare(drawn(0)))
    assert len(sentences) == 6
    assert all("no difference from the limit was found" in text for text in sentences)
    assert sentences[0].startswith("The paper's design at η = 0.01")
    assert "With 240 runs" in power
    assert f"{FALSE_ALARM:g}" in power
    assert verdicts([]) == []


def test_ratio_curve_is_one_for_the_limit() -> None:
    figure = drawn(5)
    times, ratios = ratio_curve(figure, figure.runs[0])
    assert times[-1] == 2.0
    assert len(times) == len(ratios) == 20
    assert all(abs(r.value - 1) < 5 * r.standard_error for r in ratios)


def test_limit_law_is_that_of_the_whole_step() -> None:
    figure = drawn(0)
    plan = figure.runs[0].plan
    assert limit_law(figure, plan, 9).variance == pytest.approx(
        LAWS["gaussian"].at(1.0).variance, rel=1e-3
    )


def test_table_is_read_back(tmp_path: Path) -> None:
    figure = drawn(0)
    rows = compare(figure)
    found = findings(figure)
    write_csv(tmp_path / "table.csv", *found.csv[".csv"])
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == [field.name for field in dataclasses.fields(Comparison)]
    assert [float(row["variance_ratio"]) for row in read] == [row.variance_ratio for row in rows]
