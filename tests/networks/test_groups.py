"""Groups of weights that can be scaled separately."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manifold_sde import Geometry, Problem, SamplingNoise, SphericalNoise, errors, problems
from manifold_sde.networks import (
    NormalizedMLP,
    ScaleInvariantPreResNet,
    WeightNorm,
    invariant_groups,
)
from manifold_sde.scale_invariance import scaling_groups

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(5, 3, dtype=torch.float64, generator=GENERATOR)
TARGETS = torch.randn(5, 2, dtype=torch.float64, generator=GENERATOR)


def made(module: nn.Module) -> Problem:
    return Problem.from_module(module, nn.MSELoss(), ROWS, TARGETS, SphericalNoise(0.1))


def filters() -> nn.Module:
    """Each row of the first layer feeds a normalisation of its own."""
    last = nn.Linear(4, 2, bias=False).requires_grad_(False)
    return nn.Sequential(WeightNorm(nn.Linear(3, 4, bias=False)), nn.Tanh(), last)


@pytest.mark.parametrize(
    ("module", "count"), [(NormalizedMLP((3, 4, 6, 2), seed=1), 2), (filters(), 4)]
)
def test_the_same_groups_as_from_the_coordinates(module: nn.Module, count: int) -> None:
    """An independent way: the linear space of scalings that leave the losses alone."""
    problem = made(module)
    found = invariant_groups(problem)
    assert len(found) == count
    own = {tuple(int(i) for i in group.of(torch.arange(problem.dim))) for group in found.groups}
    points = problem.vector().double() + 0.1 * torch.randn(
        4, problem.dim, dtype=torch.float64, generator=GENERATOR
    )
    assert own == set(scaling_groups(problem.pointwise, points))


def test_norms_and_radial_vectors() -> None:
    module = NormalizedMLP((3, 4, 6, 2), seed=1).double()
    problem = Problem.from_module(
        module, nn.MSELoss(), ROWS, module(ROWS).detach(), SphericalNoise(0.1)
    )
    x = problem.vector(module)
    found = invariant_groups(problem)
    norms = found.norms(torch.stack([x, 3.0 * x]))
    parts = torch.stack([problem.part(x, name).norm() for name in found.names]) / x.norm()
    torch.testing.assert_close(norms, parts.expand(2, -1))
    torch.testing.assert_close(norms.square().sum(1), torch.ones(2, dtype=x.dtype))
    assert float(found.smallest_norm(x)) == pytest.approx(float(parts.min()))
    radial = found.radial_vectors(x)
    curvature = problem.hessian(x) @ radial.T
    assert float(curvature.norm()) < 1e-12 * float(problem.hessian(x).norm())
    tangent = Geometry(problem, "matrix_free").projector(x)(radial)
    torch.testing.assert_close(tangent, radial)
    # The twin: a vector that mixes weights of a group is no such direction.
    mixed = radial.clone()
    mixed[0, : len(x) // 6] *= -1.0
    assert float((problem.hessian(x) @ mixed.T).norm()) > 1e-3


def test_weights_that_are_invariant_together_are_one_group() -> None:
    images = torch.rand(4, 1, 8, 8, dtype=torch.float64, generator=GENERATOR)
    network = ScaleInvariantPreResNet(8, 2, in_channels=1, activation=torch.tanh)
    problem = Problem.from_module(
        network, nn.CrossEntropyLoss(), images, torch.arange(4), SamplingNoise()
    )
    found = invariant_groups(problem)
    assert len(found) == 4
    assert "stem.weight" in found.names[-1]
    assert "blocks.1.shortcut.1.weight" in found.names[-1]
    covered = torch.cat([group.of(torch.arange(problem.dim)) for group in found.groups])
    assert covered.sort().values.tolist() == list(range(problem.dim))
    text = str(found)
    assert max(map(len, text.splitlines()[-3:])) <= 80
    assert "5.4 does not apply" in text
    loss = problem.loss(problem.vector().double())
    for group in found.groups:
        scaled = problem.vector().double()
        for part in group.parts:
            scaled[part] *= 7.0
        torch.testing.assert_close(problem.loss(scaled), loss)


def test_one_group_says_so() -> None:
    assert "one group" in str(invariant_groups(made(NormalizedMLP((3, 4, 2)))))


def test_errors() -> None:
    with pytest.raises(errors.ArgumentError, match="module"):
        invariant_groups(problems.great_circle())
    broken = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with pytest.raises(errors.ScaleInvarianceError, match="not scale-invariant"):
        invariant_groups(made(broken))
