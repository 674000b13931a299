"""Paths that reach a point where the rank of the Hessian falls are told."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from manifold_sde import (
    CustomNoise,
    DirectionDiffusion,
    LeastSquaresProblem,
    LimitingDiffusion,
    Problem,
    SphericalNoise,
    problems,
)
from manifold_sde.errors import RankWarning, StepSizeWarning
from manifold_sde.solvers import extrapolate, predict_sgd, solve


def crossing(x: Tensor) -> Tensor:
    """Two great circles, which cross at (0, 0, 1)."""
    y = x / x.norm()
    return 0.5 * (y[0] * y[1]) ** 2


def residual(x: Tensor) -> Tensor:
    y = x / x.norm()
    return (y[0] * y[1])[None]


def along(x: Tensor) -> Tensor:
    """Noise that turns around the axis of x[1], (3, 1)."""
    y = x / x.norm()
    return torch.stack([-y[2], 0.0 * y[0], y[0]])[:, None] / x.norm()


SPHERICAL = SphericalNoise(0.8)
#: By elimination, by rows of a Jacobian, by eigenbases.
CASES = {
    "plain": Problem(crossing, 3, SPHERICAL),
    "least squares": LeastSquaresProblem(residual, 3, SPHERICAL),
    "any noise": Problem(crossing, 3, CustomNoise(along)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_crossing_that_paths_reach_is_told(name: str) -> None:
    sde = DirectionDiffusion(CASES[name])
    early = solve(sde, [1, 0, 0], [0, 0.05], n_paths=500, seed=1)
    assert 1.0 <= early.stats["flatness"] < 30.0
    with pytest.warns(RankWarning, match="flatter"):
        late = solve(sde, [1, 0, 0], [0, 3], n_paths=500, seed=1)
    assert late.stats["flatness"] > 300.0
    # What it says: the smallest of the nonzero eigenvalues, y[0]^2, against the median.
    small = late.ys[-1, :, 0].square()
    ratio = float(small.nanmedian() / small[torch.isfinite(small)].min())
    assert 0.05 * ratio < late.stats["flatness"] < 20.0 * ratio


def test_chunks_that_keep_no_paths_tell_it_too_and_after_a_restart(tmp_path: Path) -> None:
    sde = LimitingDiffusion(CASES["plain"])
    found = []
    for _ in range(2):
        with pytest.warns(RankWarning):
            solution = solve(
                sde, [1, 0, 0], [0, 3], n_paths=600, chunk_size=200, seed=1, checkpoint=tmp_path,
                observables={"first": lambda x: x[:, 0] / x.norm(dim=1)},
            )  # fmt: skip
        found.append(solution.stats["flatness"])
    assert found[0] == found[1]


def test_expectations_of_several_runs_tell_it_too() -> None:
    sde, first = DirectionDiffusion(CASES["plain"]), lambda x: x[:, 0] / x.norm(dim=1)
    with pytest.warns(RankWarning):
        extrapolate(sde, [1, 0, 0], [0, 3], first, n_paths=2000, dt=0.125)


def test_a_manifold_of_one_rank_is_not_accused() -> None:
    problem = problems.varying_circle()
    solution = solve(DirectionDiffusion(problem), problem.minimizer, [0, 3], n_paths=500, seed=1)
    assert 1.0 < solution.stats["flatness"] < 100.0


def test_a_prediction_far_from_the_manifold_is_told() -> None:
    """SGD is on the other circle by then; at a hundredth of the rates it is near until it is."""
    problem = CASES["plain"]
    with pytest.warns(RankWarning), pytest.warns(StepSizeWarning, match="away"):
        found = predict_sgd(problem, [1, 0, 0], 0.02, 0.05, 1500, n_paths=500)
    assert found.stats["off_manifold"] > 0.5
    found = predict_sgd(problem, [1, 0, 0], 0.002, 0.05, 1000, n_paths=500)
    assert found.stats["off_manifold"] < 0.1
