"""Which clock collapses the curves of SGD, SGD with momentum and AdamW on digits."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import jacrev, vmap
from typer.testing import CliRunner

from manifold_sde.errors import ArgumentError, LimitMapError, NotOnManifoldError
from manifold_sde.experiments import cli
from manifold_sde.experiments.collapse import labelled_digits, optimizer_command, optimizers
from manifold_sde.experiments.collapse.comparison import Row, measure_runs
from manifold_sde.experiments.collapse.labelled_digits import FUNCTIONS, make_task
from manifold_sde.experiments.collapse.optimizer_command import (
    BOTH,
    HEADS,
    NAMES,
    ORDERS,
    OptimizerRow,
    measured,
    plot_optimizers,
    selected,
)
from manifold_sde.experiments.collapse.optimizers import (
    AXES,
    OptimizerData,
    batches,
    planned_steps,
    simulate,
)
from manifold_sde.experiments.settings.optimizers import CASES, OPTIMIZERS, SCHEDULES, Settings
from manifold_sde.training import expected_clock

QUICK = Settings.quick()
TINY = dataclasses.replace(
    QUICK,
    paths=2,
    horizon=0.01,
    n_rates=2,
    snapshots=3,
    cases=tuple(CASES),
    schedules=SCHEDULES,
    crowd=60,
)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quick() -> OptimizerData:
    return simulate(QUICK)


def rows_of(data: OptimizerData, optimizer: str, function: str) -> dict[str, Row]:
    runs = selected(data, "independent", optimizer, "all")
    rows = measure_runs(runs, [function], AXES, resamples=200, permutations=19)
    return {row.axis: row for row in rows}


def left(row: Row) -> tuple[float, float]:
    return row.result.unexplained, row.result.standard_error


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, BOTH])
@pytest.mark.parametrize("function", ["cosine", "trace"])
def test_curves_collapse_on_the_clock_and_on_no_other_axis(
    quick: OptimizerData, optimizer: str, function: str
) -> None:
    """Up to 2 %, of which finite rates make some; 4 standard errors of the other axes.

    Broken twins are the axes of rules of thumb, and the clock with the other power of the norm:
    that of AdamW for SGD, and that of SGD for AdamW.
    """
    rows = rows_of(quick, optimizer, function)
    value, error = left(rows["clock"])
    assert value < 0.02 + 2 * error
    for axis in ("steps", "lr_steps", "lr_decay_steps", "other_power"):
        other, own = left(rows[axis])
        assert other > value + max(0.03, 4 * np.hypot(error, own)), axis


def test_broken_twin_clock_without_the_factor_of_momentum(quick: OptimizerData) -> None:
    """SGD with and without momentum share the clock; without 1 / (1 - beta) they are far apart."""
    rows = rows_of(quick, BOTH, "cosine")
    assert left(rows["no_momentum"])[0] > 0.5
    assert left(rows["clock"])[0] < 0.03


def test_the_clock_is_that_of_the_recorded_norms(quick: OptimizerData) -> None:
    for one in quick.curves:
        if one.run.optimizer == "sgd":
            whole = one.fourths / (1 - one.run.lr * one.run.weight_decay) ** 2
            assert np.allclose(one.clock[1:], whole[1:], rtol=0.02)
        elif one.run.optimizer == "momentum":  # the last steps' gradients have not all arrived
            assert np.all(one.clock[-1] < 100 * one.fourths[-1])
            assert np.allclose(one.clock[-1], 100 * one.fourths[-1], rtol=0.12)


def test_runs_have_the_length_that_was_planned(quick: OptimizerData) -> None:
    """The clock at the end is the planned one: the noise of the digits changes on the way."""
    noise = make_task(QUICK, "independent").noise(QUICK.batch_size)
    for one in quick.curves:
        reached = one.clock[-1].mean() * (1.0 if one.run.optimizer == "adamw" else noise)
        assert 0.9 < reached / QUICK.horizon < 1.3


def test_every_schedule_is_planned_to_the_same_clock() -> None:
    for run in dataclasses.replace(QUICK, schedules=SCHEDULES, n_rates=2).runs:
        if run.optimizer == "adamw":  # the plan does not know the memory of its second moment
            continue
        steps = planned_steps(QUICK, run, 2.0, 2048)
        momentum = run.training.momentum
        rates = run.learning_rates(steps)
        found = expected_clock(rates, weight_decay=run.weight_decay, momentum=momentum, noise=2.0)
        # The last gradients of a run with momentum have not arrived.
        assert found.total == pytest.approx(QUICK.horizon, rel=0.12 if momentum else 0.02)


def test_the_task_is_fitted_and_stays_noisy() -> None:
    task = make_task(QUICK, "independent")
    one = task.copies(1)
    fitted = one(task.unique[None])[0].detach()
    assert torch.allclose(fitted, task.means, rtol=0, atol=1e-4)
    assert torch.allclose(task.means.sum(1), torch.ones(QUICK.n_images, dtype=torch.float64))
    assert task.noise(10) == pytest.approx(0.1 * task.noise(1))

    def outputs(weight: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        z = weight @ image
        z = z - z.mean()
        return task.head @ torch.tanh(z / z.square().mean().sqrt())

    jacobian = vmap(jacrev(outputs), (None, 0))(task.start, task.unique).flatten(0, 1).flatten(1)
    trace = float(jacobian.square().sum()) / QUICK.n_images
    assert float(task.evaluate(one)["trace"][0]) == pytest.approx(trace)
    residuals = (task.targets.view(QUICK.n_images, -1, 10) - task.means[:, None])[..., None]
    each = (jacobian.view(QUICK.n_images, 1, 10, -1) * residuals).sum(2)
    assert task.noise(1) == pytest.approx(float(each.square().sum(-1).mean()), rel=1e-3)


def test_newton_brings_weights_to_where_they_fit() -> None:
    """The least step there: its first is J^T (J J^T)^-1 r. Broken twin: the weights themselves."""
    task = make_task(QUICK, "independent")
    copies = task.copies(2)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(copies.weight.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        copies.weight.add_(1e-4 * noise).mul_(3.0)
    fitted = task.fitted(copies)
    images = task.unique.expand(2, -1, -1)
    with torch.no_grad():
        assert torch.allclose(fitted(images)[1], task.means, rtol=0, atol=1e-9)
        assert float((copies(images) - task.means).abs().max()) > 1e-4
        moved = fitted.weight - copies.weight / copies.weight.flatten(1).norm(dim=1).view(2, 1, 1)
        assert 0 < float(moved.norm()) < 1e-4 * float(noise.norm())
        copies.weight.normal_(generator=generator)
    with pytest.raises(NotOnManifoldError, match="fit all images"):
        task.fitted(copies)


def test_batches_in_epochs_and_independent_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    epochs = batches(20, 5, 3, generator, epochs=True)
    for _ in range(2):
        seen = torch.cat([next(epochs) for _ in range(4)], 1)
        assert torch.equal(seen.sort(1).values, torch.arange(20).expand(3, -1))
    drawn = batches(20, 5, 3, generator, epochs=False)
    seen = torch.cat([next(drawn) for _ in range(4)], 1)
    assert not torch.equal(seen.sort(1).values, torch.arange(20).expand(3, -1))


def test_all_cases_go_on_where_they_were_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls, whole = tmp_path / "unfinished", 0, optimizers._train

    def stop(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(optimizers, "_train", stop)
    with pytest.raises(KeyboardInterrupt):
        simulate(TINY, folder=folder)
    kept = len(list(folder.iterdir()))
    assert kept == 19
    done: list[str] = []
    data = simulate(TINY, folder=folder, done=lambda case, _: done.append(case))
    assert calls == 20 + len(TINY.runs) - kept
    assert done == list(CASES)
    data.save(tmp_path / "data.npz")
    again = OptimizerData.load(tmp_path / "data.npz")
    assert again.settings == TINY
    assert [one.run for one in again.curves] == list(TINY.runs)
    for one, other in zip(data.curves, again.curves, strict=True):
        for name, value in one.arrays().items():
            assert np.array_equal(value, other.arrays()[name]), name
    assert len({one.values["trace"][-1, 0] for one in data.curves}) == len(data.curves)
    rows = measured(data, resamples=9, permutations=9)
    assert len(rows) == (4 + 3 * len(CASES) + 3) * len(FUNCTIONS) * len(AXES)
    assert len(plot_optimizers(data, rows).axes) == 12 + 12


def test_command(quick: OptimizerData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(optimizer_command, "simulate", lambda *_, **__: quick)
    runner = CliRunner()
    done = runner.invoke(cli.app, ["collapse-optimizers", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    kinds = (".csv", ".npz", ".pdf", ".png", ".toml", ".txt")
    assert names == [f"collapse_optimizers_quick{kind}" for kind in kinds]
    assert "SGD and SGD + momentum, independent batches" in " ".join(done.output.split())
    assert "collapse-optimizers --full" in done.output
    lines = [line for line in done.output.splitlines() if str(tmp_path) not in line]
    assert all(len(line) <= 80 for line in lines)
    assert "…" not in done.output
    text = runner.invoke(cli.app, ["collapse-optimizers", "--help"]).output
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize(
    "changes",
    [
        {"cases": ("slow",)},
        {"schedules": ()},
        {"n_rates": 5},
        {"paths": 1},
        {"batch_size": 7},
        {"wrong": 0.0},
        {"horizon": float("nan")},
    ],
)
def test_settings_that_cannot_be_run(changes: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match="collapse of optimizers"):
        dataclasses.replace(QUICK, **changes)  # type: ignore[arg-type]


def test_too_many_images_are_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled_digits, "_TRAINING_STEPS", 50)
    with pytest.raises(LimitMapError, match="mean labels"):
        make_task(dataclasses.replace(QUICK, n_images=100, hidden=11), "independent")


# What `manifold-sde collapse-optimizers --full` wrote, and the page that shows it.

SAVED = ROOT / "docs" / "_static" / "collapse_optimizers.csv"
SHOWN = ("steps", "lr_steps", "lr_decay_steps", "clock", "other_power")


def saved() -> dict[tuple[str, str, str, str, str], OptimizerRow]:
    with SAVED.open() as file:
        rows = [
            OptimizerRow(
                *(row["case"], row["optimizer"], row["schedules"], int(row["curves"])),
                *(row["function"], row["axis"], float(row["end"]), float(row["unexplained"])),
                *(float(row["standard_error"]), float(row["p_value"])),
            )
            for row in csv.DictReader(file)
        ]
    return {(r.case, r.optimizer, r.schedules, r.function, r.axis): r for r in rows}


def lines_of_page() -> list[str]:
    """Both tables of docs/collapse.md, from what was saved."""
    rows = saved()
    lines = []
    for optimizer in (*OPTIMIZERS, BOTH):
        name = " and ".join(NAMES[one] for one in optimizer.split(", "))
        for function, words in FUNCTIONS.items():
            cells = [rows["independent", optimizer, "all", function, axis].shown for axis in SHOWN]
            lines.append("| " + " | ".join([name, words, *cells]).replace("±", " ± ") + " |")
    for case in (*CASES, ORDERS):
        words, cells = " and ".join(CASES[one] for one in case.split(", ")), []
        for optimizer in OPTIMIZERS:
            found = [rows[case, optimizer, "constant", "cosine", axis] for axis in SHOWN[:4]]
            best = min(found[:3], key=lambda row: row.unexplained)
            cells.append(f"{found[3].shown}; {HEADS[best.axis]} {best.shown}")
        lines.append("| " + " | ".join([words, *cells]).replace("±", " ± ") + " |")
    return lines


def test_the_page_shows_what_was_saved() -> None:
    page = (ROOT / "docs" / "collapse.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines_of_page() if line not in page] == []


def test_the_full_run_collapsed_where_the_theory_holds_and_not_elsewhere() -> None:
    rows = saved()

    def left(case: str, optimizer: str, schedules: str, function: str, axis: str) -> float:
        return rows[case, optimizer, schedules, function, axis].unexplained

    for optimizer in OPTIMIZERS:
        for function in ("cosine", "trace"):
            assert rows["independent", optimizer, "all", function, "clock"].curves == 12
            assert left("independent", optimizer, "all", function, "clock") < 0.01
            for axis in ("steps", "lr_steps", "lr_decay_steps", "other_power"):
                assert left("independent", optimizer, "all", function, axis) > 0.1
        assert left("crowded", optimizer, "constant", "cosine", "clock") > 0.25
    assert left(ORDERS, "momentum", "constant", "cosine", "clock") > 0.15
    assert left("independent", BOTH, "all", "cosine", "no_momentum") > 0.7
