"""The outcome of a run: means, files, named dimensions."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest
import torch

from manifold_sde import LimitingDiffusion, WeightDecaySDE, problems
from manifold_sde.errors import (
    ArgumentError,
    CheckpointError,
    LostPathsWarning,
    MissingDependencyError,
    NotMixedWarning,
)
from manifold_sde.solvers import DirectionSolution, Solution, citations, run_sgd, solve
from manifold_sde.solvers.archive import read_archive, write_archive
from manifold_sde.solvers.schemes import SCHEMES


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
    assert again.config["versions"]["torch"] == torch.__version__
    assert repr(again) == repr(solution)
    assert list(tmp_path.glob("deep/.*")) == []


def test_observables_come_back(tmp_path):
    observed = {
        "first": (torch.tensor([1.0, 2.0]), torch.tensor([0.1, torch.nan])),
        "both": (torch.zeros(2, 2), torch.ones(2, 2)),
    }
    states = torch.zeros(2, 0, 3)
    found = Solution(torch.arange(2.0), states, torch.zeros(2, 0), {"paths": 9}, {}, observed)
    found.save(tmp_path / "observed.npz")
    again = Solution.load(tmp_path / "observed.npz")
    assert list(again.observed) == ["first", "both"]
    for name, values in observed.items():
        torch.testing.assert_close(again.observed[name], values, rtol=0, atol=0, equal_nan=True)
    assert repr(again).splitlines() == [
        "Solution(observed 'first', 'both' over 9 paths, 2 times from 0 to 1, dim=3)",
        "  first    2 at the end",
        "  both     (2,) numbers at each time",
    ]


@pytest.mark.parametrize("spoil", ["cut", "noise", "empty"])
def test_a_spoilt_file_is_named(solution, tmp_path, spoil):
    path = tmp_path / "solution.npz"
    solution.save(path)
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-30], "noise": b"x" * 1000, "empty": b""}[spoil])
    with pytest.raises(CheckpointError, match="corrupted"):
        Solution.load(path)


def test_a_file_of_an_unknown_class_is_named(solution, tmp_path):
    path = tmp_path / "later.npz"
    solution.save(path)
    header, arrays = read_archive(path, "solution")
    write_archive(path, "solution", {**header, "class": "Later"}, arrays)
    with pytest.raises(CheckpointError, match="Later"):
        Solution.load(path)


def test_one_path_says_so():
    problem = problems.great_circle()
    one = run_sgd(problem, problem.minimizer, 0.1, 0.1, 5, compile=False)
    assert repr(one).startswith("Solution(one path, at 5, dim=3)\n  norm     ")


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
    assert data.attrs["version_torch"] == torch.__version__
    assert float(data["state"].sel(time=5).isel(path=2, component=1)) == float(solution.ys[1, 2, 1])


def test_named_dimensions_of_observables():
    pytest.importorskip("xarray")
    observed = {"both": (torch.zeros(2, 4), torch.ones(2, 4))}
    states = torch.zeros(2, 0, 3)
    data = Solution(torch.arange(2.0), states, torch.zeros(2, 0), observed=observed).to_xarray()
    assert data["mean_both"].dims == data["standard_error_both"].dims == ("time", "both_1")
    assert float(data["standard_error_both"].sum()) == 8.0
    # The paths were not kept, and no empty arrays stand for them.
    assert set(data.data_vars) == {"mean_both", "standard_error_both"}


def test_what_a_solution_cites():
    """The software, the paper, and the methods that it used; each scheme has a source."""
    problem = problems.great_circle()

    def keys(run):
        return re.findall(r"^@\w+\{(\w+),", run.cite(), re.MULTILINE)

    def solved(**options):
        sde = LimitingDiffusion(problem)
        return solve(sde, problem.minimizer, [0.0, 0.1], compile=False, **options)

    sgd = run_sgd(problem, problem.minimizer, 0.1, 0.1, [2])
    assert keys(sgd) == ["manifold_sde", "LiWangYu2022", "Salmon2011"]
    common = [*keys(sgd), "LiWongChenDuvenaud2020"]
    assert keys(solved(dt=0.1)) == [*common, "NinomiyaNinomiya2009"]
    euler = solved(dt=0.1, method="euler")
    assert keys(euler) == [*common, "KloedenPlaten1992"]
    adaptive = solved(rtol=0.1)
    assert keys(adaptive)[4:] == ["KloedenPlaten1992", "FosterJelincic2023", "GainesLyons1997"]
    assert f"version   = {{{euler.config['versions']['manifold_sde']}}}" in euler.cite()
    assert set(citations._OF_SCHEMES) == set(SCHEMES)
    assert set(citations._OF_SCHEMES.values()) < citations.entries().keys()
    # A solution that was made by hand knows no method.
    assert keys(Solution(torch.zeros(1), torch.ones(1, 3), torch.zeros(1)))[1:] == ["LiWangYu2022"]


def test_versions_are_those_that_made_the_solution(solution, tmp_path):
    pytest.importorskip("xarray")
    versions = {"torch": "1.0", "manifold_sde": "0.0.1"}
    old = dataclasses.replace(solution, config={**solution.config, "versions": versions})
    old.save(tmp_path / "old.npz")
    data = Solution.load(tmp_path / "old.npz").to_xarray()
    assert data.attrs["version_torch"] == "1.0"
    assert data.attrs["version_manifold_sde"] == "0.0.1"


def test_xarray_goes_to_netcdf_and_back(solution, tmp_path):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("netCDF4")
    data = solution.to_xarray()
    data.to_netcdf(tmp_path / "solution.nc", engine="netcdf4")
    with xarray.open_dataset(tmp_path / "solution.nc", engine="netcdf4") as again:
        xarray.testing.assert_identical(again.load(), data)


def test_xarray_missing_names_its_install_command(solution, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "xarray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[io\]"):
        solution.to_xarray()


# Averages under the equilibrium: what they refuse. Their law is tested elsewhere.


def test_no_weight_decay_has_no_equilibrium():
    problem = problems.great_circle()
    start = problem.minimizer
    runs = [
        run_sgd(problem, start, 0.1, 0.0, [0, 5], n_paths=30, compile=False),
        solve(WeightDecaySDE(problem, 0.1, 0.0), start, [0, 1], n_paths=30, compile=False),
        Solution(torch.arange(2.0), torch.ones(2, 30, 3), torch.ones(2, 30), {}, {"ratio": 0.0}),
    ]
    for run in runs:
        with pytest.raises(ArgumentError, match="without weight decay"):
            run.equilibrium(lambda y: y[:, 0])


@pytest.mark.parametrize("burn_in", [9.5, float("nan"), float("inf"), "half", True])
def test_burn_in_is_a_time_of_the_run(solution, burn_in):
    with pytest.raises(ArgumentError, match="burn_in"):
        solution.equilibrium(lambda y: y[:, 0], burn_in=burn_in)


def test_an_average_needs_states(solution):
    """Seven paths at two times are fewer than 20 parts."""
    with pytest.raises(ArgumentError, match="too few states") as caught:
        solution.equilibrium(lambda y: y[:, 0], burn_in=5)
    assert "7 paths" in caught.value.received
    assert "2 kept times from 5 on" in caught.value.received


@pytest.mark.parametrize("pairs", [False, True])
def test_the_average_is_that_of_the_late_states(pairs):
    """Equal weights: means over time, over the paths; lost ones and their pairs left out."""
    ys = torch.randn(5, 120, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ys[3, 6] = torch.nan
    config = {"antithetic": pairs}
    found = Solution(torch.arange(5.0), ys, torch.zeros(5, 120), config=config)
    with pytest.warns((LostPathsWarning, NotMixedWarning)):
        result = found.equilibrium(lambda y: y**2, burn_in=2.0)
    lost = [6, 7] if pairs else [6]
    late = (ys[2:, [i for i in range(120) if i not in lost]] ** 2).mean(0)
    parts = late.reshape(-1, 2, 2).mean(1) if pairs else late
    torch.testing.assert_close(result.mean, late.mean(0), rtol=1e-13, atol=0)
    error = parts.std(0) / len(parts) ** 0.5
    torch.testing.assert_close(result.standard_error, error, rtol=1e-12, atol=0)
    assert result.paths == 120 - len(lost)
    assert result.burn_in == 2.0


@pytest.mark.filterwarnings("ignore::manifold_sde.errors.NotMixedWarning")
def test_weights_are_the_fourth_powers_of_the_norms():
    """The clock's states count by e^a / E, here 1, 2 and 4; the start, where E = 0, not at all."""
    ys = torch.randn(4, 30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64)[:, None].expand(4, 30)
    zeros = torch.zeros(4, 30, dtype=torch.float64)
    found = DirectionSolution(
        torch.arange(4.0),
        ys,
        zeros,
        growth=zeros,
        log_elapsed=-weights.log(),
        grid_ys=ys,
        grid_growth=zeros,
        grid_log_elapsed=zeros,
        grid_position=zeros,
        grid_level=zeros,
    )
    result = found.equilibrium(lambda y: y[:, 0], burn_in=1.0)
    expected = (ys[1:, :, 0] * weights[1:]).sum(0) / 7
    torch.testing.assert_close(result.mean, expected.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.standard_error, expected.std() / 30**0.5, rtol=1e-10, atol=0)
    plain = Solution.equilibrium(Solution(found.ts, ys, zeros), lambda y: y[:, 0], burn_in=1.0)
    assert abs(float(plain.mean - result.mean)) > 0.01, "the broken twin: no weights"
    with pytest.raises(ArgumentError, match="the start of the run"):
        found.equilibrium(lambda y: y[:, 0], burn_in=0.0)


def test_a_solution_says_in_a_few_lines_what_it_is(solution):
    lines = repr(solution).splitlines()
    assert lines[0] == "Solution(7 paths, 3 times from 0 to 9, dim=3)"
    end = solution.norms[-1]
    error = float(end.std()) / 7**0.5
    assert lines[1] == f"  norm     1 to {float(end.mean()):.4g} ± {error:.2g}"
    assert "lr 0.1, weight_decay 0.1" in lines[-1]
    assert len(lines) < 9
    assert max(map(len, lines)) <= 80


def test_a_notebook_shows_a_table_without_what_it_would_run(solution):
    named = dataclasses.replace(solution, config={"problem": "<script>", "seed": 0})
    shown = named._repr_html_()
    assert "<table>" in shown
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown


def test_lost_paths_are_in_what_is_shown(solution):
    ys = solution.ys.clone()
    ys[1:, 0] = torch.nan
    lost = dataclasses.replace(solution, ys=ys, stats={"lost_paths": 1, "paths": 7})
    assert "1 of 7 paths are NaN" in repr(lost)
    assert "nan" not in repr(lost).splitlines()[1]


def test_paths_are_the_chains_of_arviz(solution):
    pytest.importorskip("xarray")
    chains = solution.to_inference_data({"second": lambda y: y[:, 1]}, burn_in=1.0)["posterior"]
    assert chains["second"].dims == ("chain", "draw")
    assert chains["time"].values.tolist() == [5.0, 9.0]
    assert float(chains["second"][3, 1]) == float(solution.ys[2, 3, 1])
    default = solution.to_inference_data()["posterior"]
    assert default["direction"].dims == ("chain", "draw", "direction_dim_0")
    assert float(default["norm"][2, 1]) == float(solution.norms[1, 2])
    still = dataclasses.replace(solution, ys=solution.directions)
    assert "norm" not in still.to_inference_data()["posterior"]
    with pytest.raises(ArgumentError, match="after the burn-in"):
        solution.to_inference_data(burn_in=10.0)


def test_arviz_tells_chains_that_agree_from_chains_that_do_not():
    pytest.importorskip("xarray")
    stats = pytest.importorskip("arviz_stats.base").array_stats
    draws = torch.randn(200, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    found = []
    for shift in (0.0, 2.0):
        ys = draws + shift * torch.arange(4.0)[:, None]
        run = Solution(torch.arange(200.0), ys, torch.zeros(200, 4))
        chains = run.to_inference_data({"first": lambda y: y[:, 0]})["posterior"]["first"].values
        found.append(float(stats.rhat(chains, method="split")))
        assert (float(stats.ess(chains, method="mean")) > 400) == (shift == 0.0)
    assert found[0] < 1.02 < 1.5 < found[1]


def test_a_missing_xarray_is_named(solution, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install \"manifold_sde\[io\]\""):
        solution.to_inference_data()
