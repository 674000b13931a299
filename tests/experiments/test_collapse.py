"""SGD of a network against its diffusion: what is run, what is kept, what is said and drawn."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from manifold_sde import TimeScale
from manifold_sde.errors import ArgumentError, CheckpointError, LimitMapError
from manifold_sde.experiments import cli
from manifold_sde.experiments.collapse import (
    CollapseData,
    Settings,
    distances,
    measure,
    plot_collapse,
    plot_curves,
    simulate,
    simulation,
    verdicts,
)
from manifold_sde.experiments.collapse.network import FUNCTIONS, SHARPNESS, make_task
from manifold_sde.experiments.collapse.simulation import AXES, ensemble_path
from manifold_sde.experiments.settings.collapse import read_rates
from manifold_sde.solvers import run_sgd

TINY = Settings(
    rates=((0.02, 0.01), (0.01, 0.02)),
    widths=(64, 16, 10),
    n_samples=2,
    test_images=20,
    paths=3,
    diffusion_paths=3,
    horizon=0.02,
    snapshots=2,
    dt=0.01,
    limit_points=1,
    compiled=False,
)


@pytest.fixture(scope="module")
def tiny() -> CollapseData:
    return simulate(TINY)


def assert_same(first: CollapseData, second: CollapseData) -> None:
    """The same to the bit."""
    assert first.settings == second.settings
    for a, b in zip((*first.runs, first.diffusion), (*second.runs, second.diffusion), strict=True):
        assert a.header() == b.header()
        for name, value in a.arrays().items():
            assert np.array_equal(value, b.arrays()[name]), name


def test_the_task_is_what_the_settings_say() -> None:
    task = make_task(TINY)
    start = task.start
    assert float(start.norm()) == pytest.approx(1.0)
    assert float(task.problem.loss(start)) < 1e-25
    assert float(task.problem.noise_trace(start)) == pytest.approx(1.0)
    assert task.rank == 20
    found = task.evaluate(torch.stack([start, start]))
    values = torch.linalg.eigvalsh(task.problem.hessian(start))[-20:]
    assert found["cosine"] == pytest.approx([1.0, 1.0])
    assert found["log_pdet"] == pytest.approx(2 * [float(values.log().sum())])
    assert found["trace"] == pytest.approx(2 * [float(values.sum())])
    assert found[SHARPNESS] == pytest.approx(2 * [float(values[-1])])
    assert found["smallest_group"] == pytest.approx([1.0, 1.0])  # one layer
    assert 0.0 < found["accuracy"][0] <= 1.0


def test_two_layers_are_two_groups() -> None:
    task = make_task(dataclasses.replace(TINY, widths=(64, 16, 16, 10)))
    norms = [float(task.problem.part(task.start, f"hidden.{i}").norm()) for i in range(2)]
    assert task.evaluate(task.start[None])["smallest_group"] == pytest.approx([min(norms)])
    doubled = task.start.clone()
    doubled[: 64 * 16] *= 2.0
    assert float(task.problem.loss(doubled)) < 1e-24


def test_few_steps_of_the_flow_are_nearer_to_the_limit_map_than_a_retraction() -> None:
    """Broken twin: the retraction, whose second order is another."""
    task = make_task(TINY)
    run = run_sgd(task.problem, task.start, 0.02, 0.01, [0, 40], n_paths=4, compile=False)
    x = 3.0 * run.ys[-1]  # of any norm
    limit = task.geometry.limit_map(x)
    points, by_limit_map = task.onto_manifold(x)
    assert by_limit_map == 0
    assert float(task.problem.loss(points).max()) < 1e-25
    near = (points - limit).norm(dim=1).max()
    retracted = (task.geometry.retract(x) - limit).norm(dim=1).max()
    assert float(near) < 0.1 * float(retracted)


def test_snapshots_are_at_equal_clocks(tiny: CollapseData) -> None:
    for run in tiny.runs:
        assert run.lr is not None
        assert run.weight_decay is not None
        predicted = TimeScale(run.lr, run.weight_decay).clock(run.steps.astype(int), 1.0, 1.0)
        # The noise of |x|^2 about its mean is of the order of a step.
        assert np.allclose(run.clock, predicted[:, None], rtol=0.03)
        assert np.allclose(run.clock.mean(1), TINY.clocks, atol=run.largest_step**2 * 2)
        assert np.array_equal(run.positions("steps"), run.steps)
        assert np.allclose(run.positions("lr_decay_steps"), run.lr * run.weight_decay * run.steps)
        assert run.largest_step <= 1.1 * TINY.largest_step
        assert run.stability < 2
        assert (run.distances[0] == 0).all()
        assert (run.distances[1:] > 0).all()
    assert np.allclose(tiny.diffusion.clock.mean(1), TINY.clocks)
    with pytest.raises(ArgumentError, match="no steps of SGD"):
        tiny.diffusion.positions("steps")


def test_ensembles_are_independent(tiny: CollapseData) -> None:
    assert len({TINY.noise_seed(index) for index in range(2)}) == 2
    first, second = (run.values["cosine"][-1] for run in tiny.runs)
    assert not np.isin(first, second).any()


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(
    tiny: CollapseData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = simulation._evaluate, 0

    def stop(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(simulation, "_evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        simulate(TINY, folder=tmp_path)
    assert ensemble_path(TINY, 0, tmp_path).exists()
    assert not ensemble_path(TINY, 1, tmp_path).exists()
    assert list(tmp_path.glob("*.ckpt"))  # SGD of the second is not run again
    assert_same(simulate(TINY, folder=tmp_path), tiny)
    assert not list(tmp_path.glob("*.ckpt"))
    assert calls == 4


def test_data_are_read_back(tiny: CollapseData, tmp_path: Path) -> None:
    tiny.save(tmp_path / "data.npz")
    assert_same(CollapseData.load(tmp_path / "data.npz"), tiny)
    path = ensemble_path(TINY, 0, tmp_path)
    tiny.runs[0].save(path)
    with pytest.raises(CheckpointError):
        CollapseData.load(path)
    assert path != ensemble_path(dataclasses.replace(TINY, seed=1), 0, tmp_path)


def test_every_function_is_measured_on_every_axis(tiny: CollapseData) -> None:
    rows, apart = measure(tiny), distances(tiny)
    assert [(r.function, r.axis) for r in rows] == [(f, a) for f in FUNCTIONS for a in AXES]
    assert len(apart) == len(FUNCTIONS) * len(TINY.rates)
    text = " ".join(verdicts(tiny, rows, apart))
    assert "smallest share of a layer's norm: does not move" in text  # there is one layer
    assert "SGD against the diffusion" in text
    assert "against Φ" in text
    cosine = {r.axis: r.result.unexplained for r in rows if r.function == "cosine"}
    assert min(cosine, key=lambda axis: cosine[axis]) == "clock"


def test_panels(tiny: CollapseData) -> None:
    ax = plot_curves(tiny, "trace", "clock", linewidth=3.0)
    assert len(ax.lines) == 3
    assert {line.get_linewidth() for line in ax.lines} == {3.0}
    assert len(plot_curves(tiny, "trace", "steps").lines) == 2
    canvas = plot_collapse(tiny)
    assert len(canvas.axes) == 20
    assert [ax.get_xlabel() != "" for ax in canvas.axes] == 16 * [False] + 4 * [True]
    with pytest.raises(ArgumentError, match="no such panel"):
        plot_curves(tiny, "trace", "time")


@pytest.mark.parametrize(
    "changes",
    [
        {"rates": ((0.01, 0.01),)},
        {"rates": ((0.01, 0.01), (0.01, 0.01))},
        {"rates": ((0.01, 0.0), (0.01, 0.01))},
        {"rates": ((0.3, 0.01), (0.01, 0.01))},  # a step goes beyond the horizon
        {"horizon": 0.0},
        {"paths": 1},
        {"snapshots": 0},
        {"widths": (64, 10)},
        {"widths": (64, 10, 10)},
        {"widths": (32, 12, 10)},
    ],
)
def test_settings_that_cannot_be_run(changes: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]


def test_rates_beyond_stability_are_refused() -> None:
    with pytest.raises(ArgumentError, match="unstable"):
        make_task(
            dataclasses.replace(TINY, rates=((0.9, 0.01), (0.01, 0.01)), horizon=3.0, snapshots=1)
        )


def test_more_residuals_than_weights_have_no_minimiser_to_start_from() -> None:
    settings = dataclasses.replace(TINY, widths=(64, 11, 10), n_samples=80)
    with pytest.raises(LimitMapError, match="no minimiser"):
        make_task(settings)


def test_rates_are_read() -> None:
    assert read_rates(["0.02,0.01", "1e-3, 2"]) == ((0.02, 0.01), (0.001, 2.0))
    for text in ("0.1", "a,b", "1,2,3"):
        with pytest.raises(ArgumentError, match="rates of SGD"):
            read_rates([text])


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["collapse", *arguments])


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(Settings, "quick", classmethod(lambda *_, **__: TINY))
    done = call("--out", str(tmp_path / "new"))
    assert done.exit_code == 0, done.output
    kinds = [".csv", ".npz", ".pdf", ".png", ".toml", ".txt", "_diffusion.csv"]
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == [f"collapse_quick{kind}" for kind in kinds]
    assert (tmp_path / "new" / "collapse_quick.png").read_bytes().startswith(b"\x89PNG")
    assert "Test accuracy on 20 other" in (tmp_path / "new" / "collapse_quick.txt").read_text()
    with (tmp_path / "new" / "collapse_quick.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 20
    for part in ("cosine with the start", "collapse --full", "standard error"):
        assert part in done.output
    rest = [line for line in done.output.splitlines() if str(tmp_path) not in line]
    assert all(len(line) <= 80 for line in rest)


def test_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("manifold_sde.experiments.collapse.command.simulate", stop)
    done = call("--out", str(tmp_path))
    assert done.exit_code == 130
    assert "goes on from here" in done.stderr


@pytest.mark.parametrize("arguments", [["--rates", "0.1"], ["--until", "0"], ["--paths", "1"]])
def test_bad_options(arguments: list[str], tmp_path: Path) -> None:
    assert call("--out", str(tmp_path), *arguments).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_help_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert all(len(line) <= 80 for line in call("--help").output.splitlines())
