"""What is said of the runs of Figures 1 and 3: right where it is known, and able to say no."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifold_sde.experiments.experiment import write_csv
from manifold_sde.experiments.training import (
    Settings,
    TrainingRun,
    after_decay,
    norm_curves,
    sentences,
    summarise,
    train,
)
from manifold_sde.experiments.training.analysis import (
    at_full_training_accuracy,
    rows,
)
from manifold_sde.experiments.training.command import findings
from tests.experiments.test_training_simulation import tiny

STEPS = 10


def drawn(gain: float = 0.02, *, runs: int = 6, noise: float = 0.002, seed: int = 0) -> TrainingRun:
    """Runs on plateaus from epoch 20 on, whose test accuracy after decays rises by ``gain`` later.

    It rises linearly from epoch 20 to epoch 100, and stays. The trace is 3, and the norm that of
    (10).
    """
    settings = Settings(runs=runs, epochs=300, decays=20, lr=0.5, weight_decay=0.002)
    generator = np.random.default_rng(seed)
    records, times = np.array(settings.records), np.array(settings.decay_times)
    shape = (runs, len(records))
    train_accuracy = np.tile(np.clip(records / 20, 0, 1) * 0.9 + 0.09, (runs, 1))
    test = np.clip((times - 20) / 80, 0, 1) * gain + 0.9 - 0.1 * (times < 20)
    after = test + noise * generator.standard_normal((runs, len(times)))
    grid = np.linspace(0, 1, len(settings.branch_records))
    epochs = np.arange(settings.epochs + 1)
    curve = settings.scale.norm(epochs * STEPS, 5.0, 3.0)
    ones = np.ones((runs, len(times), len(grid)))
    return TrainingRun(
        settings,
        STEPS,
        train_accuracy=train_accuracy,
        test_accuracy=train_accuracy - 0.1,
        train_loss=1 - train_accuracy,
        trace=np.full(shape, 3.0),
        mean_square=np.full(shape, 1.0),
        norm=np.tile(curve, (runs, 1)),
        square=np.full((runs, settings.epochs), 3.0),
        branch_train=ones * np.minimum(1.0, 0.9 + 0.2 * grid),
        branch_test=0.8 + (after[..., None] - 0.8) * grid,
        branch_norm=np.full((runs, len(times)), 5.0),
    )


@pytest.mark.paper("Equation (10)")
def test_norm_curves_are_exact_where_the_trace_is_constant() -> None:
    run = drawn()
    curves = norm_curves(run)
    for curve in (curves.equation10, curves.varying, curves.whole):
        assert curve == pytest.approx(run.norm, rel=1e-12)
    found = summarise(run)
    lr, decay = run.settings.lr, run.settings.weight_decay
    equilibrium = (lr * 3.0 / (2 * decay)) ** 0.25
    late = run.norm[0, 225:].mean() / equilibrium
    assert found.norm_ratio.value == pytest.approx(late)
    assert found.norm_ratio.standard_error == pytest.approx(0.0, abs=1e-12)
    assert found.varying_error < 1e-12
    assert found.gradient_share == pytest.approx(0.25)
    assert found.trace_range == pytest.approx((1.0, 1.0))


def test_norm_equation_follows_a_trace_that_changes() -> None:
    """A trace that is 16 times as large from the middle on doubles the equilibrium."""
    run = drawn()
    jump = np.array(run.settings.records) >= 150
    run = dataclasses.replace(run, trace=3.0 * np.where(jump, 16.0, 1.0)[None].repeat(6, 0))
    curves = norm_curves(run)
    equilibrium = (0.5 * 3.0 / 0.004) ** 0.25
    assert curves.varying[0, 140] == pytest.approx(equilibrium, rel=1e-2)
    assert curves.varying[0, -1] == pytest.approx(2 * equilibrium, rel=1e-2)


@pytest.mark.paper("Equation (10)")
def test_norm_equation_with_the_whole_gradient_is_the_norm_of_sgd() -> None:
    """Of a real run: what (10) leaves out is the full gradient, and O(lr wd)."""
    run = train(tiny(epochs=6, weight_decay=5e-3))
    curves = norm_curves(run)
    assert curves.whole == pytest.approx(run.norm, rel=5e-3)
    assert not np.allclose(curves.varying, run.norm, rtol=1e-2)


@pytest.mark.paper("Figure 3")
def test_a_gain_is_found_where_it_is() -> None:
    found = summarise(drawn())
    assert found.mixing_epochs == pytest.approx(100.0)
    assert 15 <= found.train_plateau <= 24
    assert found.gain.value == pytest.approx(0.02, abs=0.004)
    assert found.gain.value > 5 * found.gain.standard_error
    assert found.better == 6
    assert found.saturation in [t for t in drawn().settings.decay_times if 60 <= t <= 140]
    assert found.branches_full == 1.0
    assert sentences(drawn())[1].startswith("As in the paper")


@pytest.mark.parametrize(
    ("gain", "runs", "says"),
    [
        (0.0, 6, "No effect like the paper's"),
        (-0.02, 6, "Unlike in the paper"),
        (0.02, 1, "One run cannot tell"),
    ],
)
def test_broken_twin_other_runs_are_not_called_like_the_paper(
    gain: float, runs: int, says: str
) -> None:
    run = drawn(gain, runs=runs, seed=4)
    assert sentences(run)[1].startswith(says)


def test_what_still_rises_is_not_called_saturated() -> None:
    run = drawn()
    rising = after_decay(run) + 1e-3 * np.array(run.settings.decay_times)
    run = dataclasses.replace(run, branch_test=run.branch_test.copy())
    run.branch_test[:, :, -1] = rising
    assert summarise(run).saturation is None
    assert "does not saturate within the 300 epochs" in sentences(run)[2]


def test_norm_off_its_equilibrium_is_said() -> None:
    assert sentences(drawn())[3].startswith("The norm is at the equilibrium")
    off = dataclasses.replace(drawn(), norm=1.2 * drawn().norm)
    assert sentences(off)[3].startswith("The norm is not at the equilibrium")


def test_full_training_accuracy_is_taken_where_it_is_first_reached() -> None:
    run = drawn(noise=0.0)
    grid = np.linspace(0, 1, len(run.settings.branch_records))
    first = int(np.argmax(0.9 + 0.2 * grid >= 1.0))
    assert 0 < first < len(grid) - 1
    assert np.array_equal(at_full_training_accuracy(run), run.branch_test[:, :, first])
    never = dataclasses.replace(run, branch_train=np.full_like(run.branch_train, 0.99))
    assert np.array_equal(at_full_training_accuracy(never), after_decay(run))


def test_table_has_a_row_for_each_decay(tmp_path: Path) -> None:
    run = drawn()
    path = tmp_path / "table.csv"
    write_csv(path, *findings(1, run).csv[".csv"])
    with path.open(encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in read] == run.settings.decay_times
    table: list[dict[str, Any]] = [dict(row) for row in rows(run)]
    last = run.branch_test[:, -1, -1]
    assert table[-1]["test_after"] == pytest.approx(last.mean())
    assert table[-1]["test_after_se"] == pytest.approx(last.std(ddof=1) / 6**0.5)
    assert table[-1]["lr_wd_steps"] == pytest.approx(0.5 * 0.002 * 3000)
