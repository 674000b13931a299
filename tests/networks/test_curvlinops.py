"""Products of networks against curvlinops, which takes them from the module by itself."""

from __future__ import annotations

import pytest
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator, JacobianLinearOperator
from torch import Tensor, nn

from manifold_sde import Geometry, LeastSquaresProblem, Problem, SphericalNoise
from manifold_sde.networks import NormalizedMLP

GENERATOR = torch.Generator().manual_seed(4)
INPUTS = torch.randn(6, 4, dtype=torch.float64, generator=GENERATOR)
V = torch.randn(12 * 4, dtype=torch.float64, generator=GENERATOR)


def fitted() -> tuple[LeastSquaresProblem, NormalizedMLP, Tensor]:
    """A network that fits six samples of three outputs: the targets are its own."""
    module = NormalizedMLP((4, 12, 3), seed=2).double()
    targets = module(INPUTS).detach()
    problem = Problem.from_module(module, nn.MSELoss(), INPUTS, targets, SphericalNoise(0.1))
    assert isinstance(problem, LeastSquaresProblem)
    return problem, module, targets


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def test_jacobian_and_hessian() -> None:
    problem, module, targets = fitted()
    y, data = problem.vector(module), [(INPUTS, targets)]
    jacobian = JacobianLinearOperator(module, trained(module), data)
    scale = (2.0 / 3.0) ** 0.5  # residuals of nn.MSELoss with three outputs
    ours = problem.pointwise.residual_product(y, V)
    torch.testing.assert_close(ours, scale * (jacobian @ V))
    hessian = HessianLinearOperator(module, nn.MSELoss(), trained(module), data)
    torch.testing.assert_close(problem.pointwise.hessian_product(y, V), hessian @ V)


@pytest.mark.paper("Lemma 2.8")
def test_the_projection_is_on_the_kernel_of_the_curvature() -> None:
    """At a minimiser the Gauss-Newton matrix is the Hessian; P v is in its kernel, v - P v not."""
    problem, module, targets = fitted()
    y, data = problem.vector(module), [(INPUTS, targets)]
    curvature = GGNLinearOperator(module, nn.MSELoss(), trained(module), data)
    along = Geometry(problem, "matrix_free").projector(y)(V)
    size = float((curvature @ V).norm())
    assert float((curvature @ along).norm()) < 1e-12 * size
    torch.testing.assert_close(curvature @ (V - along), curvature @ V)
    assert abs(float(along @ (V - along))) < 1e-12 * float(V @ V)
