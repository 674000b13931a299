"""The runs behind Figure 2: what is run, what is kept, and that stopping changes nothing."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from manifold_sde import Geometry, TimeScale
from manifold_sde.errors import ArgumentError, CheckpointError, NonFiniteError
from manifold_sde.experiments.experiment import discard
from manifold_sde.experiments.figure2 import Figure2, Settings, simulate
from manifold_sde.experiments.figure2.simulation import run_design, run_path
from manifold_sde.experiments.settings.figure2 import DESIGNS
from manifold_sde.solvers import run_sgd
from tests.warm import Program

TINY = Settings(lrs=(0.02, 0.01), runs=3, law_runs=8, horizon=0.05, columns=4, compiled=False)


@pytest.fixture(scope="module")
def tiny() -> Figure2:
    return simulate(TINY)


def assert_same(first: Figure2, second: Figure2) -> None:
    """The same to the bit."""
    assert first.settings == second.settings
    assert first.laws == second.laws
    assert [run.plan for run in first.runs] == [run.plan for run in second.runs]
    for a, b in zip(first.runs, second.runs, strict=True):
        for name, value in a.arrays().items():
            assert np.array_equal(value, b.arrays()[name]), (a.plan.label, name)


@pytest.mark.paper("Figure 2")
def test_the_default_is_the_setting_of_the_paper() -> None:
    settings = Settings()
    assert (settings.dim, settings.n_samples, settings.noise_scale) == (10, 8, 0.3)
    assert (settings.weight_decay, settings.lrs, settings.runs) == (0.05, (1e-2, 1e-3, 1e-4), 60)
    *_, last = settings.plans("gaussian")
    assert last.lr == 1e-4
    assert TimeScale(1e-4, 0.05).tau(last.box_steps[-1]) == pytest.approx(15.58, abs=1e-4)
    # All rows have the same columns of learning rate times steps.
    for plan in settings.plans("gaussian"):
        products = plan.lr * np.array(plan.box_steps)
        assert np.allclose(products, settings.column_products(), atol=plan.lr)
    problem = settings.problem("gaussian")
    assert float(problem.minimizer.norm()) == pytest.approx(1.0)
    assert problem.design == "gaussian"


def test_the_quick_form_leaves_out_the_end_and_nothing_else() -> None:
    quick, full = Settings.quick(), Settings()
    for design in DESIGNS:
        for short, long in zip(quick.plans(design), full.plans(design), strict=True):
            assert short.law_steps == long.law_steps
            assert short.spacing == long.spacing
            assert short.box_steps == long.box_steps[: len(short.box_steps)]
            assert short.kept[-1] <= 560_000
    assert len(quick.plans("gaussian")[-1].box_steps) == 4
    uncompiled = Settings.quick(compiled=False)
    assert uncompiled == quick.without_compiler()
    assert [plan.lr for plan in uncompiled.plans("gaussian")] == [1e-2, 1e-3]
    assert uncompiled.plans("gaussian")[-1].law_times[-1] == 2.0
    # Without a limit nothing is left out, however long it takes.
    assert full.without_compiler() == dataclasses.replace(full, compiled=False)


def test_records_are_near_each_other() -> None:
    """A record apart, the direction moves by a twentieth of the radius: 20 sigma to the centre."""
    settings = Settings()
    for design in DESIGNS:
        radius = settings.problem(design).facts.circle.radius
        for plan in settings.plans(design):
            assert np.diff(plan.records).max() <= plan.spacing
            if plan.spacing > 1:
                square = TimeScale(plan.lr, 0.05).equilibrium_norm(0.81) ** 2
                moved = 0.3 * plan.lr / square * plan.spacing**0.5
                assert 0.04 * radius < moved <= radius / 20


def test_boxes_and_angles_are_those_of_sgd(tiny: Figure2) -> None:
    """Against runs of SGD recorded at every step."""
    for design in DESIGNS:
        problem = TINY.problem(design)
        circle = problem.facts.circle
        for lr in TINY.lrs:
            run = tiny.run(design, lr)
            assert run is not None
            steps = list(range(run.plan.kept[-1] + 1))
            seed = TINY.noise_seed(design)
            whole = run_sgd(
                problem, problem.minimizer, lr, 0.05, steps, n_paths=8, seed=seed, compile=False
            )
            angles = np.unwrap(circle.angle(whole.ys).numpy(), axis=0)
            assert np.allclose(run.angles, angles[list(run.plan.law_steps)], atol=1e-12)
            boxes = circle.plane_coordinates(whole.ys[list(run.plan.box_steps), :3]).numpy()
            assert np.allclose(run.boxes, boxes, atol=1e-12)
            assert run.boxes.shape == ((4, 3, 2) if design == "gaussian" else (0, 3, 2))
            assert np.allclose(run.coarse_angles, run.angles, atol=1e-12)


@pytest.mark.paper("Figure 2", "Definition 2.6")
def test_the_angle_of_x_is_that_of_its_limit_under_gradient_flow() -> None:
    problem = Settings().problem("gaussian")
    geometry = Geometry(problem)
    run = run_sgd(problem, problem.minimizer, 0.01, 0.05, 300, n_paths=4, compile=False)
    x = run.ys[-1]
    circle = problem.facts.circle
    assert float((x / x.norm(dim=-1, keepdim=True) - geometry.limit_map(x)).norm()) > 0.1
    assert torch.allclose(circle.angle(geometry.limit_map(x)), circle.angle(x), atol=1e-8)


def test_designs_draw_different_noise() -> None:
    assert TINY.noise_seed("gaussian") != TINY.noise_seed("orthogonal")


def test_saved_and_loaded_is_the_same(tiny: Figure2, tmp_path: Path) -> None:
    tiny.save(tmp_path / "figure.npz")
    loaded = Figure2.load(tmp_path / "figure.npz")
    assert_same(loaded, tiny)
    assert loaded.conditions == tiny.conditions


@pytest.mark.parametrize("fault", ["missing", "corrupt", "other"])
def test_broken_files_are_refused(fault: str, tiny: Figure2, tmp_path: Path) -> None:
    path = tmp_path / "figure.npz"
    if fault == "corrupt":
        tiny.save(path)
        path.write_bytes(path.read_bytes()[:-200])
    elif fault == "other":
        tiny.runs[0].save(path)
    with pytest.raises(CheckpointError):
        Figure2.load(path)


def test_finished_ensembles_are_not_run_again(tiny: Figure2, tmp_path: Path) -> None:
    run_design(TINY, "gaussian", tmp_path)
    marked = run_path(TINY, tiny.runs[0].plan, tmp_path)
    changed = dataclasses.replace(tiny.runs[0], angles=tiny.runs[0].angles + 1.0)
    changed.save(marked)
    found = run_design(TINY, "gaussian", tmp_path)[1]
    assert np.array_equal(found[0].angles, changed.angles)
    # With another seed nothing of it is used.
    other = run_design(dataclasses.replace(TINY, seed=7), "gaussian", tmp_path)[1]
    assert not np.array_equal(other[0].angles, changed.angles)
    assert list(tmp_path.glob("*.ckpt")) == []
    discard(tmp_path)
    assert not tmp_path.exists()


KILLED = """
import sys
from manifold_sde.experiments.figure2 import Settings, simulate
from manifold_sde.solvers import stopping

assert hasattr(stopping, "_CHECKPOINT_SECONDS")
stopping._CHECKPOINT_SECONDS = 0.2
settings = Settings(lrs=(0.01,), runs=3, law_runs=8, horizon=0.3, columns=4, compiled=False)
simulate(settings, folder=sys.argv[1]).save(sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.paper("Figure 2")
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    folder, result = tmp_path / "unfinished", tmp_path / "figure.npz"
    command = ["-c", KILLED, str(folder), str(result)]
    process = Program(*command)
    deadline = time.monotonic() + 120
    while not (checkpoints := list(folder.glob("*.ckpt"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    assert checkpoints
    assert not result.exists()
    assert Program(*command).wait().returncode == 0
    settings = Settings(lrs=(0.01,), runs=3, law_runs=8, horizon=0.3, columns=4, compiled=False)
    assert_same(Figure2.load(result), simulate(settings))


def test_learning_rates_that_blow_up_are_an_error() -> None:
    settings = dataclasses.replace(TINY, lrs=(1e160,), weight_decay=1e-170, horizon=1e-9)
    with pytest.raises((NonFiniteError, ArgumentError)):
        simulate(settings)


@pytest.mark.parametrize(
    "change",
    [
        {"lrs": ()},
        {"lrs": (0.01, 0.01)},
        {"lrs": (-0.01,)},
        {"weight_decay": 0.0},
        {"horizon": 0.0},
        {"horizon": float("nan")},
        {"runs": 0},
        {"columns": 1},
        {"dim": 11},
        {"law_runs": 7},
    ],
    ids=str,
)
def test_bad_settings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        Settings(**change)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.compile
def test_compiled_runs_are_those_of_plain_ones_to_rounding() -> None:
    plain = simulate(dataclasses.replace(TINY, lrs=(0.01,)))
    compiled = simulate(dataclasses.replace(TINY, lrs=(0.01,), compiled=True))
    assert compiled.settings.compiled
    for a, b in zip(plain.runs, compiled.runs, strict=True):
        assert np.allclose(a.angles, b.angles, atol=1e-10)


def test_without_a_working_compiler_the_runs_are_uncompiled(
    monkeypatch: pytest.MonkeyPatch, tiny: Figure2
) -> None:
    """A compiler that is found but fails is noticed, and the settings say what was done."""
    from manifold_sde.compile import compiler

    def fail(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(compiler, "_said", set())
    monkeypatch.setattr(compiler, "trace", fail)
    monkeypatch.setattr(compiler, "compiler_available", lambda: True)
    monkeypatch.setattr(compiler, "c_compiler", lambda: None)
    figure = simulate(dataclasses.replace(TINY, compiled=True))
    assert_same(figure, tiny)
