"""Steps that a path does not survive are taken by their halves: no path is lost, and the law holds.

The problem is section 6.1 at steps that are too long for some paths.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manifold_sde import DirectionDiffusion, LimitingDiffusion, Problem, problems
from manifold_sde.errors import LostPathsWarning
from manifold_sde.solvers import DirectionSolution, Solution, halving, solve
from manifold_sde.verification.exact import CircleDiffusion

PROBLEM = problems.normalized_linear()
DT = 0.25
PATHS = 1500


def run(n_paths: int = PATHS, **options: Any) -> Solution:
    options = {"dt": DT, "compile": True, "seed": 3, **options}
    sde = LimitingDiffusion(Problem(PROBLEM.loss, PROBLEM.dim, PROBLEM.noise))
    return solve(sde, PROBLEM.minimizer, [0.0, 0.33, 1.0], n_paths=n_paths, **options)


@pytest.fixture(scope="module")
def whole() -> Solution:
    return run()


def test_no_path_is_lost(whole: Solution) -> None:
    assert whole.stats["lost_paths"] == 0
    assert bool(torch.isfinite(whole.ys).all())
    assert 10 < whole.stats["halved_steps"] < PATHS
    gradient = PROBLEM.gradient(whole.directions[-1])
    assert float(gradient.norm(dim=-1).max()) < 1e-12


def test_broken_twin_without_halving(monkeypatch: pytest.MonkeyPatch, whole: Solution) -> None:
    monkeypatch.setattr(halving, "MOST_HALVINGS", 0)
    with pytest.warns(LostPathsWarning):
        found = run()
    assert found.stats["lost_paths"] > 10
    # The others are what they were.
    finite = torch.isfinite(found.ys)
    torch.testing.assert_close(found.ys[finite], whole.ys[finite], rtol=0.0, atol=1e-11)


def test_a_path_is_the_same_alone_and_among_others(whole: Solution) -> None:
    """To rounding, in other company and in chunks of another size, those of halved steps too."""
    assert run(200).stats["halved_steps"] > 0
    for found in (run(200), run(200, chunk_size=64)):
        torch.testing.assert_close(found.ys, whole.ys[:, :200], rtol=0.0, atol=1e-11)


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "weak2"])
def test_all_methods_halve(method: str) -> None:
    calculus = "ito" if method == "euler" else "stratonovich"
    found = solve(
        DirectionDiffusion(PROBLEM, calculus),
        PROBLEM.minimizer,
        [0.0, 0.5, 1.3],
        n_paths=600,
        method=method,
        dt=0.25,
        compile=True,
    )
    assert found.stats["lost_paths"] == 0


def test_what_is_read_off_a_direction_is_not_lost_either() -> None:
    """Its path is taken up again in steps that have to be halved."""
    problem = Problem(PROBLEM.loss, PROBLEM.dim, PROBLEM.noise)
    found = solve(
        DirectionDiffusion(problem), PROBLEM.minimizer, [0.0, 1.5], n_paths=400, dt=0.25, seed=3
    )
    assert isinstance(found, DirectionSolution)
    assert found.stats["halved_steps"] > 0
    assert bool(torch.isfinite(found.at(ratio=0.5, times=[0.2, 0.7, 1.0]).ys).all())


def test_the_law_is_right_where_steps_are_halved() -> None:
    """E cos(angle) within 4 standard errors (false alarm 6e-5) of the exact law.

    At the step of the clock 1/32 over V one path in 1600 meets a step that it does not survive.
    """
    problem = problems.normalized_linear(seed=2)
    assert problem.facts.circle is not None
    plain = Problem(problem.loss, problem.dim, problem.noise)
    trace = float(problem.noise_trace(problem.minimizer / problem.minimizer.norm()))
    found = solve(
        DirectionDiffusion(plain),
        problem.minimizer / problem.minimizer.norm(),
        [0.0, 1.0],
        n_paths=16_000,
        dt=1.0 / (32.0 * trace),
        compile=True,
    )
    assert found.stats["lost_paths"] == 0
    assert found.stats["halved_steps"] > 0
    circle = problem.facts.circle
    begin = circle.angle(found.ys[0, :1])
    value = torch.cos(circle.angle(found.ys[-1]) - begin)
    want = CircleDiffusion.reversible(problem).expectation(np.cos, 1.0)
    error = float(value.std()) / len(value) ** 0.5
    assert abs(float(value.mean()) - float(want)) < 4.0 * error


class Ending(DirectionDiffusion):
    """A retraction that never comes back from beyond a neighbourhood of the start."""

    def retract(self, x: Tensor, basis: Tensor, fresh_steps: int = 2) -> tuple[Tensor, Tensor]:
        y, basis = super().retract(x, basis, fresh_steps)
        return torch.where(y[:1] < 0.995, torch.nan, y), basis


@pytest.mark.parametrize("level", [3, 7])
def test_steps_are_halved_as_far_as_the_tree_goes(level: int) -> None:
    """A path is lost beyond, however short the steps are from which it begins."""
    problem = problems.great_circle(noise_scale=1.0)
    with pytest.warns(LostPathsWarning):
        found = solve(
            Ending(problem, "stratonovich"),
            problem.minimizer,
            [0.0, 0.01, 0.02],
            n_paths=20,
            method="heun",
            dt=2.0**-level,
            compile=False,
        )
    assert 0 < found.stats["lost_paths"] < 20
