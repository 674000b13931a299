"""What ``manifold-sde info`` says of problems, good and bad."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from manifold_sde import CustomNoise, Problem, SamplingNoise, SphericalNoise, problems
from manifold_sde.experiments.cli import main


def described(problem: Problem) -> dict[str, str]:
    return dict(problem.describe().rows)


def test_a_problem_that_knows_itself() -> None:
    found = described(problems.normalized_linear())
    assert found["dimension D"] == "10"
    assert found["sample losses"] == "8"
    assert found["scale invariance"].startswith("holds")
    assert found["rank M of H"].startswith("8, condition number 14")
    assert found["dim of Γ₁"] == "1"
    assert float(found["tr Σ at norm 1"]) == pytest.approx(0.81)
    assert found["minimiser"] == "known"
    assert "circle" in found["known of it"]


def test_a_minimiser_is_looked_for() -> None:
    problem = Problem(lambda x: 0.5 * (x[2] / x.norm()) ** 2, 3, SphericalNoise(0.3))
    found = described(problem)
    assert "gradient flow" in found["minimiser"]
    assert found["rank M of H"].startswith("1")
    assert "known of it" not in found
    assert found["sample losses"] == "one loss, no samples"


def test_what_fails_is_said() -> None:
    def biased(x: Tensor) -> Tensor:
        return 0.5 * (x[2] / x[:3].norm() - 0.1 * x[3]) ** 2

    noise = CustomNoise(lambda x: torch.eye(5, dtype=x.dtype)[:, :2])
    found = described(Problem(biased, 5, noise))
    assert found["scale invariance"].startswith("FAILS")
    assert "coordinate 3" in found["scale invariance"]
    assert found["σ(ax) = σ(x)/a"].startswith("FAILS")
    assert found["σ(x)ᵀx = 0"].startswith("FAILS")
    assert "dim of Γ₁" not in found


def test_steps_that_depend_on_each_other_are_named() -> None:
    found = described(problems.mixed_noise_circle(noise=SamplingNoise(1, replacement="epoch")))
    assert found["independent steps"].startswith("FAILS: 0 of the noise")
    assert "independent steps" not in described(problems.mixed_noise_circle())


def test_flow_that_ends_nowhere_is_said() -> None:
    problem = Problem(lambda x: torch.exp(-x[0] / x.norm()) * 0.0, 3, SphericalNoise(0.3))
    assert "minimiser" in described(problem)


def test_vanishing_noise_is_said() -> None:
    def interpolating(x: Tensor) -> Tensor:
        y = x / x.norm()
        return torch.stack([y[0] ** 2, y[1] ** 2])

    found = described(Problem(interpolating, 4, SamplingNoise()))
    assert "no noise, so no drift and no diffusion" in found["tr Σ at norm 1"]


def test_what_is_printed_fits_and_is_what_info_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    problem = problems.mixed_noise_circle()
    shown = repr(problem.describe())
    assert max(map(len, shown.splitlines())) <= 80
    assert problem.describe()["dimension D"] == "3"
    assert "<th" in problem.describe()._repr_html_()
    (tmp_path / "mine.py").write_text(
        "from manifold_sde import problems\nproblem = problems.mixed_noise_circle()\n"
    )
    monkeypatch.setattr("sys.argv", ["manifold-sde", "info", f"{tmp_path}/mine.py:problem"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.rstrip() == shown
