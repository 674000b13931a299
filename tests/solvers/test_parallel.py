"""Chunks in processes of joblib's loky: the bits of one process, and named errors."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from manifold_sde import DirectionDiffusion, Problem, SphericalNoise, WeightDecaySDE, problems
from manifold_sde.errors import ManifoldSDEError, MissingDependencyError, WorkerError
from manifold_sde.solvers import DirectionSolution, Solution, solve
from manifold_sde.solvers.chunk import Chunk
from manifold_sde.solvers.simulation import Simulation

joblib = pytest.importorskip("joblib")

TIMES = [0.0, 3.5, 20.0]


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    """The workers are loky's own, kept from test to test, and ended here."""
    yield
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True, kill_workers=True)


def run(problem: Problem | None = None, **options: Any) -> Solution:
    problem = problem or problems.great_circle()
    sde = WeightDecaySDE(problem, lr=0.1, weight_decay=0.1)
    options = {"n_paths": 11, "chunk_size": 4, "seed": 2, "compile": False, **options}
    return solve(sde, problems.great_circle().minimizer, TIMES, **options)


def assert_same_bits(one: Solution, other: Solution) -> None:
    for name in ("ts", "ys", "clock"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)
    assert one.observed.keys() == other.observed.keys()
    for name, values in one.observed.items():
        torch.testing.assert_close(values, other.observed[name], rtol=0, atol=0, equal_nan=True)
    assert one.stats == other.stats
    assert one.config == other.config


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_bits(workers: int) -> None:
    assert_same_bits(run(workers=workers), run())


def test_observables_and_pairs_in_workers() -> None:
    """Functions of a test's own body travel too."""
    shift = 0.25
    options: dict[str, Any] = {"n_paths": 10, "antithetic": True}
    options["observables"] = {"shifted": lambda y: y[:, :2] + shift}
    found = run(workers=2, **options)
    assert_same_bits(found, run(**options))
    assert found.observed["shifted"][0].shape == (3, 2)


def test_directions_are_taken_up_again_after_a_run_in_workers() -> None:
    problem = problems.mixed_noise_circle()

    def direction(**options: Any) -> DirectionSolution:
        found = solve(
            DirectionDiffusion(problem),
            problem.minimizer,
            [0.0, 0.5],
            n_paths=6,
            chunk_size=4,
            method="euler",
            dt=0.25,
            compile=False,
            **options,
        )
        assert isinstance(found, DirectionSolution)
        return found

    alone, together = direction(), direction(workers=2)
    assert_same_bits(together, alone)
    assert_same_bits(
        together.at(ratio=1.0, times=[0.1, 0.2]), alone.at(ratio=1.0, times=[0.1, 0.2])
    )


def test_broken_twin_noise_that_is_numbered_within_a_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each worker that numbers its paths from 0 repeats the paths of the others."""
    whole = run()
    real = Simulation.chunks

    def from_zero(self: Simulation, checkpoint: Path | None = None) -> Iterator[Chunk]:
        return (
            dataclasses.replace(chunk, paths=chunk.paths - chunk.paths[0])
            for chunk in real(self, checkpoint)
        )

    monkeypatch.setattr(Simulation, "chunks", from_zero)
    with pytest.raises(AssertionError, match="not equal"):
        assert_same_bits(run(workers=1), whole)


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_threads_of_the_caller_are_left_alone(workers: int | None) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(workers=workers)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_progress_counts_chunks(capfd: pytest.CaptureFixture[str]) -> None:
    run(workers=2, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "3/3" in err
    assert "chunk" in err


# What goes wrong.


def test_a_killed_worker_is_named_and_the_same_call_ends_the_run(tmp_path: Path) -> None:
    """The third chunk's worker kills itself, once, with SIGKILL."""
    here, fuse = os.getpid(), tmp_path / "fuse"

    def first(y: torch.Tensor) -> torch.Tensor:
        if os.getpid() != here and len(y) == 3 and not fuse.exists():
            fuse.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return y[:, 0]

    options: dict[str, Any] = {"observables": {"first": first}}
    folder = tmp_path / "run"
    with pytest.raises(WorkerError, match="a worker died") as caught:
        run(workers=2, checkpoint=folder, **options)
    assert fuse.exists()
    assert str(folder) in caught.value.remedy
    assert_same_bits(run(workers=2, checkpoint=folder, **options), run(**options))
    fuse.unlink()
    with pytest.raises(WorkerError, match="checkpoint=FOLDER"):
        run(workers=2, **options)


def test_errors_of_a_worker_come_back_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "chunk-000001.npz"
    file.write_bytes(b"no archive")
    with pytest.raises(ManifoldSDEError, match="corrupted") as caught:
        run(workers=2, checkpoint=tmp_path)
    assert "chunk-000001.npz" in caught.value.received


def test_what_cannot_be_sent_is_named() -> None:
    lock = threading.Lock()

    def first(y: torch.Tensor) -> torch.Tensor:
        with lock:
            return y[:, 0]

    with pytest.raises(WorkerError, match="cannot be sent") as caught:
        run(workers=2, observables={"first": first})
    assert "lock" in caught.value.received
    assert run(observables={"first": first}).observed["first"][0].shape == (3,)


@pytest.fixture
def user_module(tmp_path: Path) -> Iterator[ModuleType]:
    """A user's file, loaded as the command line loads FILE.py:NAME."""
    path = tmp_path / "users_problem.py"
    path.write_text("def loss(x):\n    return 0.5 * (x[2] / x.norm()) ** 2\n")
    spec = importlib.util.spec_from_file_location("users_problem", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["users_problem"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["users_problem"]


def test_functions_of_a_file_that_is_no_module_are_named(user_module: ModuleType) -> None:
    problem = Problem(user_module.loss, 3, SphericalNoise(0.3), rank=1)
    with pytest.raises(WorkerError, match="cannot import") as caught:
        run(problem, workers=2)
    assert "users_problem" in caught.value.received
    assert "PYTHONPATH" in caught.value.remedy
    assert_same_bits(run(problem, workers=1), run(problem))


@pytest.mark.parametrize("name", ["joblib", "cloudpickle"])
def test_a_missing_package_is_named_with_its_install_command(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"manifold_sde\[cluster\]") as caught:
        run(workers=2)
    assert name in caught.value.received
    assert "leave workers out" in caught.value.remedy
    assert run().stats["paths"] == 11
