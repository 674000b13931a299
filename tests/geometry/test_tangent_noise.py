"""Where the noise does not reach: counted, and the groups of weights found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manifold_sde import (
    CustomNoise,
    DirectionDiffusion,
    Geometry,
    LimitingDiffusion,
    Problem,
    SamplingNoise,
    SphericalNoise,
    problems,
)
from manifold_sde.errors import NoDiffusionWarning
from manifold_sde.geometry.tangent_noise import Degeneracy, noise_along
from manifold_sde.scale_invariance import scaling_groups
from manifold_sde.solvers import extrapolate, predict_sgd, solve

GROUPS = ((0, 3, 4), (1, 2, 5))


def two_groups(x: Tensor) -> Tensor:
    """Interleaved groups, each of which can be scaled; the samples disagree on the minimum."""
    a, b = x[[0, 3, 4]], x[[1, 2, 5]]
    a, b = a / a.norm(), b / b.norm()
    targets = x.new_tensor([0.5, 0.2, -0.4])
    slopes = x.new_tensor([[1.0, 0.3, 0.2], [-0.4, 1.0, 0.1], [0.3, -0.2, 1.0]])
    return 0.5 * (b[0] + a[0] * b[1] - targets) ** 2 + 0.3 * (slopes @ a - 0.1) * (slopes @ b)


def test_one_group_and_all_directions() -> None:
    for problem in (problems.great_circle(), problems.mixed_noise_circle()):
        found = Degeneracy.of(problem, problem.minimizer)
        assert (found.manifold_dim, found.noise_rank) == (1, 1)
        assert found.groups == ((0, 1, 2),)
        assert found.statement is None


def test_label_noise_is_no_diffusion() -> None:
    problem = problems.label_noise_circle()
    found = Degeneracy.of(problem, problem.minimizer)
    assert found.noise_rank == 0
    assert "deterministic flow" in str(found.statement)


def test_groups_of_scalings() -> None:
    points = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem = Problem(two_groups, 6, SamplingNoise())
    assert scaling_groups(problem.pointwise, points) == GROUPS
    tied = Problem(lambda x: two_groups(x) + (x[0] / x.norm()) ** 2, 6, SamplingNoise())
    assert scaling_groups(tied.pointwise, points) == (tuple(range(6)),)


def test_several_groups_and_few_directions_are_said() -> None:
    """One residual of two groups, with noise of the sphere and of one direction."""

    def loss(x: Tensor) -> Tensor:
        return 0.5 * (x[0] / x[:2].norm() - 0.6) ** 2 + 0.5 * (x[2] / x[2:].norm()) ** 2

    problem = Problem(loss, 5, SphericalNoise(0.3))
    y = Geometry(problem).limit_map(torch.tensor([0.5, 0.9, 0.1, 0.7, 0.3], dtype=torch.float64))
    found = Degeneracy.of(problem, y)
    assert (found.manifold_dim, found.noise_rank) == (2, 2)
    assert found.groups == ((0, 1), (2, 3, 4))
    assert "2 groups of weights" in str(found.statement)


def test_noise_along_some_directions() -> None:
    sphere = problems.great_sphere(5)

    def samples(x: Tensor) -> Tensor:
        y = x / x.norm()
        return 0.5 * y[-1] ** 2 + 0.3 * torch.stack([y[0] * y[1], -y[0] * y[1]])

    problem = Problem(samples, 5, SamplingNoise())
    found = Degeneracy.of(problem, sphere.minimizer)
    assert found.noise_rank < found.manifold_dim == 3
    assert found.noise_rank == 1
    assert "1 of the 3 dimensions" in str(found.statement)


@pytest.mark.parametrize("noise", [SphericalNoise(0.1), SamplingNoise(2)])
def test_with_noise(noise: SphericalNoise | SamplingNoise) -> None:
    problem = problems.mixed_noise_circle()
    problem.kernels["key"] = 1
    other = problem.with_noise(noise)
    assert other.noise is noise
    assert other.kernels == {}
    assert other.minimizer is problem.minimizer
    assert repr(problem.noise) == "SamplingNoise(batch_size=1)"
    y = problem.minimizer
    torch.testing.assert_close(other.gradient(y), problem.gradient(y))
    if isinstance(noise, SamplingNoise):
        torch.testing.assert_close(other.noise_covariance(y), 0.5 * problem.noise_covariance(y))


Y0 = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)


def across_and_along(along: float, at: Tensor | None = None) -> Problem:
    """A great circle, with noise across it and this much along it; none of that at one point."""

    def factor(x: Tensor) -> Tensor:
        y = x / x.norm()
        up = torch.stack([-y[2] * y[0], -y[2] * y[1], 1.0 - y[2] ** 2])
        size = along if at is None else along * (1.0 - (y * at.to(y)).sum() ** 2)
        round_it = size * torch.stack([-y[1], y[0], 0.0 * y[0]])
        return torch.stack([0.3 * up, 0.3 * round_it], dim=1) / x.norm()

    return Problem(lambda x: 0.5 * (x[2] / x.norm()) ** 2, 3, CustomNoise(factor))


@pytest.mark.parametrize("method", ["dense", "matrix_free"])
def test_noise_across_the_manifold_is_said_before_a_run(method: str) -> None:
    problem = across_and_along(0.0)
    sde = DirectionDiffusion(problem, geometry=Geometry(problem, method=method))
    with pytest.warns(NoDiffusionWarning, match="P sigma = 0.*standstill"):
        found = solve(sde, Y0, [0.0, 0.1], n_paths=2)
    assert found.stats["noise_along"] == 0.0
    assert str(problem).endswith("noise along the manifold: 0 % of tr Sigma")


def test_noise_across_the_manifold_is_said_of_every_kind_of_run() -> None:
    problem = across_and_along(0.0)
    with pytest.warns(NoDiffusionWarning, match="standstill"):
        predict_sgd(problem, Y0, 0.01, 0.05, 10, n_paths=2)
    sde = DirectionDiffusion(problem)
    with pytest.warns(NoDiffusionWarning, match="standstill"):
        extrapolate(sde, Y0, [0.0, 0.1], lambda y: y[:, 0], n_paths=2, dt=0.1)


def test_label_noise_is_said_to_be_a_flow() -> None:
    problem = problems.label_noise_circle()
    with pytest.warns(NoDiffusionWarning) as caught:
        solve(LimitingDiffusion(problem), problem.minimizer, [0.0, 0.1])
    said = float(str(caught[0].message).split("speed up to ")[1].split()[0])
    assert 0.1 * largest_speed(problem) < said <= 1.01 * largest_speed(problem)


def largest_speed(problem: Problem) -> float:
    """Largest speed of the flow of label noise, over tr Sigma, on the circle (at 16 points)."""
    angles = torch.linspace(0.0, 6.3, 16, dtype=torch.float64)
    points = torch.stack([angles.cos(), angles.sin(), 0.1 * torch.ones(16)], dim=1)
    y = Geometry(problem).limit_map(points / points.norm(dim=1, keepdim=True))
    drift = 0.5 * Geometry(problem).second_derivative(y)
    drift = drift - y * (y * drift).sum(1, keepdim=True)
    return float((drift.norm(dim=1) / problem.noise_trace(y)).max())


def test_a_start_without_noise_among_points_with_noise() -> None:
    problem = across_and_along(1.0, at=Y0)
    with pytest.warns(NoDiffusionWarning, match="at the start, though it has one around it"):
        solve(DirectionDiffusion(problem), Y0, [0.0, 0.1])
    both = torch.stack([Y0, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)])
    assert solve(DirectionDiffusion(problem), both, [0.0, 0.1]).stats["noise_along"] > 0.1


def test_an_isolated_minimiser_is_a_standstill() -> None:
    problem = Problem(lambda x: 0.5 * (x[1:] / x.norm()).square().sum(), 3, SphericalNoise(0.3))
    with pytest.warns(NoDiffusionWarning, match="standstill"):
        solve(DirectionDiffusion(problem), torch.tensor([1.0, 0.0, 0.0]).double(), [0.0, 0.1])


@pytest.mark.parametrize(("along", "share"), [(1.0, 0.5), (0.0316, 1e-3), (1e-4, 1e-8)])
@pytest.mark.parametrize("method", ["dense", "matrix_free"])
def test_noise_along_the_manifold_is_measured_and_not_refused(
    along: float, share: float, method: str
) -> None:
    """No warning, which would be an error here; the share is said."""
    problem = across_and_along(along)
    sde = DirectionDiffusion(problem, geometry=Geometry(problem, method=method))
    found = solve(sde, Y0, [0.0, 0.1], n_paths=2)
    assert found.stats["noise_along"] == pytest.approx(share, rel=5e-3)
    assert float(noise_along(problem, Y0[None], 1)) == pytest.approx(share, rel=5e-3)
    described = problem.describe()
    assert float(described["noise along Γ"].split()[0]) == pytest.approx(share, rel=6e-3)
    assert f"{100 * found.stats['noise_along']:.3g} %" in str(problem)
    assert "\n" not in repr(problem)


def test_the_share_of_noise_of_the_sphere() -> None:
    """For the noise of (18) it is (D - M - 1) / (D - 1), whatever measures it."""
    problem = problems.great_sphere(5)
    found = solve(DirectionDiffusion(problem), problem.minimizer, [0.0, 0.1])
    assert found.stats["noise_along"] == pytest.approx(3.0 / 4.0)
    assert float(noise_along(problem, problem.minimizer[None], 1)) == pytest.approx(3.0 / 4.0)
    assert str(problem.with_noise(SphericalNoise(0.1))) == repr(
        problem.with_noise(SphericalNoise(0.1))
    )


def test_no_diffusion_is_a_line_of_the_description() -> None:
    assert "no diffusion" in across_and_along(0.0).describe()["noise along Γ"]
    assert "no diffusion" in problems.label_noise_circle().describe()["noise along Γ"]
