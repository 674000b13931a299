"""Files of direction solutions: with their equation again, they answer with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from manifold_sde import DirectionDiffusion, LimitingDiffusion, problems
from manifold_sde.errors import ArgumentError, CheckpointError, DTypeError
from manifold_sde.problem import Problem
from manifold_sde.solvers import DirectionSolution, Solution, solve
from manifold_sde.solvers.archive import read_archive, write_archive


def problem() -> Problem:
    return problems.mixed_noise_circle()


def simulate(**options: Any) -> DirectionSolution:
    sde = DirectionDiffusion(problem())
    options = {"n_paths": 4, "antithetic": True, **options}
    found = solve(
        sde,
        sde.problem.minimizer,
        [0.0, 0.33, 1.0],
        method="euler",
        dt=0.25,
        seed=7,
        compile=False,
        **options,
    )
    assert isinstance(found, DirectionSolution)
    return found


@pytest.fixture(scope="module")
def solution() -> DirectionSolution:
    return simulate()


@pytest.fixture(scope="module")
def file(solution: DirectionSolution, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.npz"
    solution.save(path)
    return path


def assert_same_bits(one: Solution, other: Solution) -> None:
    assert type(one) is type(other)
    mine, theirs = one._arrays(), other._arrays()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, equal_nan=True)
    assert one.stats == other.stats
    assert one.config == other.config


def questions(solution: DirectionSolution) -> list[Solution]:
    return [
        solution.at(ratio=0.5, times=[0.0, 0.1, 0.3], norm=1.2),
        solution.at_steps(lr=0.05, weight_decay=0.01, steps=[10, 40], norm=1.1),
    ]


@pytest.mark.parametrize("how", ["load", "attach", "other form"])
def test_at_has_the_same_bits_after_loading(
    solution: DirectionSolution, file: Path, how: str
) -> None:
    sde = DirectionDiffusion(problem(), "stratonovich" if how == "other form" else "ito")
    if how == "load":
        again = DirectionSolution.load(file, sde=sde)
    else:
        loaded = Solution.load(file)
        assert isinstance(loaded, DirectionSolution)
        again = loaded.attach(sde)
    assert_same_bits(again, solution)
    for one, other in zip(questions(again), questions(solution), strict=True):
        assert_same_bits(one, other)


def test_broken_twin_another_seed_answers_otherwise(
    solution: DirectionSolution, file: Path
) -> None:
    """The comparison sees a plan that came back with another Brownian path."""
    header, arrays = read_archive(file, "solution")
    header["plan"]["seed"] = 8
    twin = file.with_name("twin.npz")
    write_archive(twin, "solution", header, arrays)
    again = DirectionSolution.load(twin, sde=DirectionDiffusion(problem()))
    with pytest.raises(AssertionError, match="not equal"):
        assert_same_bits(questions(again)[0], questions(solution)[0])


def test_a_file_needs_its_equation_only_to_step_again(
    solution: DirectionSolution, file: Path
) -> None:
    loaded = DirectionSolution.load(file)
    mean, error = loaded.expectation(lambda y: y[:, 0])
    assert torch.equal(mean, solution.expectation(lambda y: y[:, 0])[0])
    assert torch.equal(error, solution.expectation(lambda y: y[:, 0])[1])
    for ask in (
        lambda: loaded.at(ratio=0.5, times=[0.1]),
        lambda: loaded.at_steps(0.05, 0.01, 10),
        lambda: loaded.at_steps(0.05, 0.01, 10, batch_size=2),
    ):
        with pytest.raises(ArgumentError, match=r"solution.attach\(sde\)"):
            ask()


def test_a_loaded_file_can_be_saved_again(
    solution: DirectionSolution, file: Path, tmp_path: Path
) -> None:
    DirectionSolution.load(file).save(tmp_path / "again.npz")
    again = DirectionSolution.load(tmp_path / "again.npz", sde=DirectionDiffusion(problem()))
    assert_same_bits(again, solution)
    assert_same_bits(questions(again)[0], questions(solution)[0])


def test_one_path(tmp_path: Path) -> None:
    one = simulate(n_paths=None, antithetic=False)
    assert one.ys.shape == (3, 3)
    one.save(tmp_path / "one.npz")
    again = DirectionSolution.load(tmp_path / "one.npz", sde=DirectionDiffusion(problem()))
    assert_same_bits(again, one)
    assert_same_bits(questions(again)[0], questions(one)[0])


@pytest.mark.parametrize(
    "other",
    [
        lambda: problems.great_circle(),
        lambda: problems.normalized_linear(),
        lambda: problems.mixed_noise_circle().__class__(
            problem().pointwise.function, 3, problem().noise, name="another name"
        ),
    ],
)
def test_another_problem_is_refused(file: Path, other: Any) -> None:
    with pytest.raises(CheckpointError, match="another equation") as caught:
        DirectionSolution.load(file, sde=DirectionDiffusion(other()))
    assert "mixed" in caught.value.expected


def test_problems_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    """Their repr is the same; gradient and noise are compared at a point."""
    first = problems.normalized_linear(seed=1)
    found = solve(
        DirectionDiffusion(first), first.minimizer, [0.0, 0.01], dt=0.01, method="phi_jet"
    )
    assert isinstance(found, DirectionSolution)
    found.save(tmp_path / "first.npz")
    second = problems.normalized_linear(seed=2)
    assert repr(first) == repr(second)
    with pytest.raises(CheckpointError, match="another equation"):
        DirectionSolution.load(tmp_path / "first.npz", sde=DirectionDiffusion(second))
    with pytest.raises(CheckpointError, match="another equation"):
        found.attach(DirectionDiffusion(second))


def test_only_its_own_kind_of_equation_is_attached(solution: DirectionSolution) -> None:
    with pytest.raises(DTypeError, match="LimitingDiffusion"):
        solution.attach(LimitingDiffusion(problem()))  # type: ignore[arg-type]


def test_a_solution_of_another_kind_is_named(tmp_path: Path) -> None:
    states = torch.zeros(1, 3, 2)
    Solution(torch.zeros(1), states, torch.zeros(1, 3)).save(tmp_path / "plain.npz")
    with pytest.raises(CheckpointError, match=r"Solution\.load"):
        DirectionSolution.load(tmp_path / "plain.npz")


@pytest.mark.parametrize("missing", ["growth", "grid_ys", "probe", "probe_noise"])
def test_an_incomplete_file_is_named(file: Path, tmp_path: Path, missing: str) -> None:
    header, arrays = read_archive(file, "solution")
    del arrays[missing]
    write_archive(tmp_path / "part.npz", "solution", header, arrays)
    with pytest.raises(CheckpointError, match="incomplete") as caught:
        Solution.load(tmp_path / "part.npz")
    assert missing in caught.value.received


def test_observables_of_a_direction_are_kept(tmp_path: Path) -> None:
    found = simulate(observables={"first": lambda y: y[:, 0], "both": lambda y: y[:, :2]})
    found.save(tmp_path / "observed.npz")
    again = Solution.load(tmp_path / "observed.npz")
    assert repr(again) == repr(found)
    assert again.observed.keys() == found.observed.keys()
    for name, values in found.observed.items():
        torch.testing.assert_close(again.observed[name], values, rtol=0, atol=0, equal_nan=True)


def test_named_dimensions(solution: DirectionSolution) -> None:
    pytest.importorskip("xarray")
    data = solution.to_xarray()
    assert data.attrs["seed"] == 7
    assert set(data.data_vars) == {
        "state",
        "norm",
        "clock",
        "growth",
        "log_elapsed",
        "grid_state",
        "grid_growth",
        "grid_log_elapsed",
    }
    for name, value in data.data_vars.items():
        components = ("component",) if "state" in str(name) else ()
        assert value.dims == ("time", "path", *components)
    assert float(data["growth"].sel(time=1.0).isel(path=3)) == float(solution.growth[2, 3])
    observed = simulate(observables={"first": lambda y: y[:, 0]}).to_xarray()
    assert observed["mean_first"].dims == ("time",)
    assert set(observed.data_vars) == {"mean_first", "standard_error_first"}  # no empty arrays
