"""The step that is chosen makes the error that was asked for, and says so.

Errors are biases in E cos(angle) by quadrature, without sampling, against exact laws.
"""

import pytest
import torch

from benchmarks.weak_errors import Setting, bias, our_step
from manifold_sde import DirectionDiffusion, LimitingDiffusion, problems
from manifold_sde.errors import ArgumentError
from manifold_sde.solvers import solve
from manifold_sde.solvers.step_choice import ACCURACY

SETTINGS = {
    "section 6.1": lambda: Setting("", problems.normalized_linear(), 3),
    "section 6.1, another draw": lambda: Setting("", problems.normalized_linear(seed=4), 3),
    "section 6.1, a third draw": lambda: Setting("", problems.normalized_linear(seed=6), 3),
    "section 6.1, a small circle": lambda: Setting("", problems.normalized_linear(seed=1), 3),
    "orthogonal inputs": lambda: Setting("", problems.normalized_linear(design="orthogonal"), 3),
    "great circle": lambda: Setting("", problems.great_circle(noise_scale=1.0), 3),
    "varying circle": lambda: Setting("", problems.varying_circle(noise_scale=1.0), 61),
}


def chosen(setting: Setting, accuracy: float | None, *, plain: bool = True) -> tuple[float, float]:
    """The step of the clock, and the error that is expected of it."""
    start = setting.circle.point(torch.tensor(0.0, dtype=torch.float64))
    sde = DirectionDiffusion(setting.plain() if plain else setting.problem)
    stats = solve(sde, start, [0.0, setting.clock], n_paths=2, accuracy=accuracy).stats
    return stats["dt"], stats["expected_error"]


def bias_at(setting: Setting, h: float, *, plain: bool = True) -> float:
    """Bias of "weak2" with a step of the clock."""
    start = setting.circle.point(torch.tensor(0.0, dtype=torch.float64))[None]
    problem = setting.plain() if plain else setting.problem
    step = our_step(problem, start, "weak2", clock=True, compiled=True)
    steps = max(1, round(setting.clock / h))
    found = bias(setting, step, steps, clock=True, flows=2, rule=10)
    assert found.lost < 0.05
    return abs(found.value)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_default_step_makes_the_declared_error(name: str) -> None:
    setting = SETTINGS[name]()
    h, expected = chosen(setting, None)
    assert expected <= ACCURACY
    assert bias_at(setting, h) <= ACCURACY


@pytest.mark.parametrize("seed", [2, 6])
def test_least_squares_takes_longer_steps(seed: int) -> None:
    """Zero residuals: the rows of the Jacobian lead further than the Hessian."""
    setting = Setting("", problems.normalized_linear(seed=seed), 3)
    h, expected = chosen(setting, None, plain=False)
    assert h > chosen(setting, None)[0]
    assert expected <= ACCURACY
    assert bias_at(setting, h, plain=False) <= ACCURACY


@pytest.mark.parametrize("accuracy", [1e-2, 1e-4])
def test_the_step_follows_the_accuracy(accuracy: float) -> None:
    setting = SETTINGS["section 6.1"]()
    h, expected = chosen(setting, accuracy)
    found = bias_at(setting, h)
    assert found <= accuracy
    assert expected <= accuracy
    assert (h > chosen(setting, None)[0]) == (accuracy > ACCURACY)


def test_broken_twin_one_step_for_all_problems() -> None:
    """What is fine for the others is wrong by a twentieth on a small circle."""
    setting = SETTINGS["section 6.1, a small circle"]()
    start = setting.circle.point(torch.tensor(0.0, dtype=torch.float64))[None]
    step = our_step(setting.plain(), start, "weak2", clock=True, compiled=True)
    steps = round(setting.clock * setting.trace * 32)
    assert abs(bias(setting, step, steps, clock=True, flows=2, rule=10).value) > 0.05


def test_the_step_depends_on_the_problem_alone() -> None:
    """Not on how many paths there are, nor on the seed."""
    problem = problems.normalized_linear(dim=6, n_samples=4, seed=1)
    runs = [
        solve(LimitingDiffusion(problem), problem.minimizer, [0.0, 0.5], n_paths=n, seed=seed)
        for n, seed in ((1, 0), (40, 0), (3, 5))
    ]
    assert len({run.stats["dt"] for run in runs}) == 1
    torch.testing.assert_close(runs[0].ys[:, 0], runs[1].ys[:, 0], rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"dt": 0.1}, {"rtol": 1e-3}, {"method": "euler"}, {"accuracy": 2.0}, {"accuracy": "fine"}],
)
def test_where_no_step_can_be_chosen_it_is_said(options: dict[str, object]) -> None:
    problem = problems.great_circle()
    with pytest.raises(ArgumentError, match=r"accuracy"):
        solve(
            LimitingDiffusion(problem),
            problem.minimizer,
            [0.0, 0.1],
            **{"accuracy": 1e-3, **options},  # type: ignore[arg-type]
        )
