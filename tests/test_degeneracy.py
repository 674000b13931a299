"""Where the noise does not reach: counted, and the groups of weights found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manifold_sde import Geometry, Problem, SamplingNoise, SphericalNoise, problems
from manifold_sde.degeneracy import Degeneracy
from manifold_sde.invariance import scaling_groups

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
