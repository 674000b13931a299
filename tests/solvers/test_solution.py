"""The outcome of a run: means, files, named dimensions."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from manifold_sde import problems
from manifold_sde.errors import ArgumentError, CheckpointError, MissingDependencyError
from manifold_sde.solvers import Solution, run_sgd
from manifold_sde.solvers.archive import write_archive


@pytest.fixture(scope="module")
def solution() -> Solution:
    problem = problems.great_circle()
    return run_sgd(problem, problem.minimizer, 0.1, 0.1, [0, 5, 9], n_paths=7, compile=False)


def test_directions_and_norms(solution):
    assert solution.directions.shape == (3, 7, 3)
    torch.testing.assert_close(solution.directions * solution.norms[..., None], solution.ys)


def test_expectation_is_the_mean_over_paths(solution):
    mean, error = solution.expectation(lambda y: y[:, :2] ** 2)
    values = solution.ys[..., :2] ** 2
    torch.testing.assert_close(mean, values.sum(1) / 7)
    deviation = ((values - mean[:, None]) ** 2).sum(1) / 6
    torch.testing.assert_close(error, (deviation / 7).sqrt())


def test_expectation_needs_paths():
    problem = problems.great_circle()
    one = run_sgd(problem, problem.minimizer, 0.1, 0.1, 5, compile=False)
    with pytest.raises(ArgumentError, match="several paths"):
        one.expectation(lambda y: y[:, 0])


def test_it_is_frozen(solution):
    with pytest.raises(dataclasses.FrozenInstanceError):
        solution.ts = torch.zeros(3)


def test_round_trip(solution, tmp_path):
    path = tmp_path / "deep" / "solution.npz"
    solution.save(path)
    again = Solution.load(path)
    for name in ("ts", "ys", "clock"):
        assert torch.equal(getattr(solution, name), getattr(again, name))
    assert again.stats == solution.stats
    assert again.config == solution.config
    assert again.config["seed"] == 0
    assert list(tmp_path.glob("deep/.*")) == []


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        Solution.load(tmp_path / "nothing.npz")


def test_another_kind_of_file_is_named(tmp_path):
    path = tmp_path / "other.npz"
    write_archive(path, "something else", {}, {})
    with pytest.raises(CheckpointError, match="something else"):
        Solution.load(path)


def test_an_incomplete_file_is_named(tmp_path):
    path = tmp_path / "part.npz"
    write_archive(path, "solution", {"stats": {}}, {"ts": torch.zeros(2).numpy()})
    with pytest.raises(CheckpointError, match="incomplete"):
        Solution.load(path)


def test_named_dimensions(solution):
    pytest.importorskip("xarray")
    data = solution.to_xarray()
    assert data["state"].dims == ("time", "path", "component")
    assert data["norm"].dims == ("time", "path")
    assert data.attrs["seed"] == 0
    assert float(data["state"].sel(time=5).isel(path=2, component=1)) == float(solution.ys[1, 2, 1])


def test_xarray_missing_names_its_install_command(solution, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "xarray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[io\]"):
        solution.to_xarray()
