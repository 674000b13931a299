"""Radau IIA collocation: its coefficients, one step on linear and nonlinear flows, its order."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from manifold_sde.geometry import radau
from manifold_sde.geometry.radau import Linearisation, Tableau, tableau

CPU = torch.device("cpu")


def method(stages: int) -> Tableau:
    return tableau(stages, torch.float64, CPU)


def step(loss, x: Tensor, h: float, stages: int = radau.STAGES) -> Tensor:  # type: ignore[no-untyped-def]
    """Stages of one step from points (n, D), as displacements (n, s, D)."""
    gradient = vmap(grad(loss))
    matrix = vmap(torch.func.hessian(loss))(x)
    values, basis = torch.linalg.eigh(matrix)
    force = -(gradient(x)[:, None] @ basis)[:, 0]
    start = Linearisation(x, force, values, basis)
    sizes = torch.full((len(x),), h, dtype=x.dtype)
    guess = x.new_zeros(len(x), stages, x.shape[1])
    inside, converged, _ = radau.solve_stages(gradient, start, sizes, guess, 1e-13 + 0 * sizes)
    assert bool(converged.all())
    return inside @ basis.mT


@pytest.mark.parametrize("stages", [3, 5])
def test_coefficients_satisfy_the_order_conditions(stages: int) -> None:
    """B(2s - 1), C(s) and stiff accuracy, which make order 2s - 1; and A is diagonalised."""
    m = method(stages)
    c, a = m.nodes.numpy(), m.matrix.numpy()
    weights = a[-1]
    for k in range(1, 2 * stages):
        assert abs(weights @ c ** (k - 1) - 1 / k) < 1e-13
    for k in range(1, stages + 1):
        np.testing.assert_allclose(a @ c ** (k - 1), c**k / k, atol=1e-13)
    assert c[-1] == 1.0
    np.testing.assert_allclose(
        (m.right * m.eigenvalues) @ m.left, m.matrix.to(torch.complex128), atol=1e-12
    )
    assert float((m.eigenvalues - m.gamma).abs().min()) < 1e-14


def test_three_stages_are_radau5() -> None:
    root = 6**0.5
    np.testing.assert_allclose(method(3).nodes, [(4 - root) / 10, (4 + root) / 10, 1], atol=1e-14)
    np.testing.assert_allclose(
        method(3).matrix[-1],
        [(16 - root) / 36, (16 + root) / 36, float(Fraction(1, 9))],
        atol=1e-14,
    )
    assert abs(method(3).gamma - 0.2748888295956774) < 1e-12


def test_linear_flow_is_the_pade_approximant_and_stiff_directions_die() -> None:
    curvatures = torch.tensor([0.0, 0.5, 1.0, 1e8], dtype=torch.float64)
    x = torch.ones(1, 4, dtype=torch.float64)
    end = (x + step(lambda z: 0.5 * (curvatures * z * z).sum(), x, 1.0)[:, -1])[0]
    assert float(end[0]) == 1.0
    torch.testing.assert_close(end[1:3], torch.exp(-curvatures[1:3]), rtol=1e-7, atol=0)
    assert abs(float(end[3])) < 1e-6


def test_order_nine() -> None:
    """The flow -x^3 from 1: the error of one step falls like h^10."""
    x = torch.ones(1, 1, dtype=torch.float64)
    errors = []
    for h in (0.2, 0.1):
        end = 1.0 + float(step(lambda z: 0.25 * (z**4).sum(), x, h)[0, -1, 0])
        errors.append(abs(end - (1 + 2 * h) ** -0.5))
    assert 8 < np.log2(errors[0] / errors[1]) < 11


def test_extrapolation_is_exact_for_polynomials() -> None:
    m = method(5)

    def path(t: Tensor) -> Tensor:
        return torch.stack([t**5 - t, 2 * t**3 + t**2], -1)

    ratio = torch.tensor([1.0, 2.5], dtype=torch.float64)
    stages = path(m.nodes).expand(2, 5, 2)
    expected = path(1 + m.nodes * ratio[:, None]) - path(torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(radau.extrapolate(m, stages, ratio), expected)


def test_derivative_of_a_step_is_exact() -> None:
    """Against differences of the step itself; and push and pull are transposes."""
    generator = torch.Generator().manual_seed(0)
    bend = torch.randn(3, 3, 3, dtype=torch.float64, generator=generator)

    def loss(z: Tensor) -> Tensor:
        r = z + 0.5 * (bend @ z) @ z
        return 0.5 * (torch.tensor([1.0, 2.0, 5.0], dtype=z.dtype) * r * r).sum()

    x = torch.tensor([[0.1, -0.2, 0.05]], dtype=torch.float64)
    h, eps = 0.3, 1e-4
    stages = x[:, None] + step(loss, x, h)
    hessians = vmap(vmap(torch.func.hessian(loss)))(stages)
    sizes, identity = torch.tensor([h], dtype=x.dtype), torch.eye(3, dtype=x.dtype)[None]
    pushed = radau.push_step(hessians, sizes, identity)[0]

    def end(z: Tensor) -> Tensor:
        return z + step(loss, z, h)[:, -1]

    sides = [end(x + k * eps * identity[0]) - end(x - k * eps * identity[0]) for k in (1, 2)]
    expected = ((8 * sides[0] - sides[1]) / (12 * eps)).T
    torch.testing.assert_close(pushed, expected, rtol=1e-8, atol=1e-10)
    pulled = radau.pull_step(hessians, sizes, identity)[0]
    torch.testing.assert_close(pulled, pushed.T, rtol=1e-13, atol=1e-14)


def test_stages_that_do_not_converge_are_told() -> None:
    x = torch.tensor([[1.0], [0.01]], dtype=torch.float64)
    loss = vmap(grad(lambda z: (z**2 + 5 * z**4).sum()))
    values = torch.tensor([[0.01], [2.0]], dtype=torch.float64)  # wrong at the first point
    start = Linearisation(x, -loss(x), values, torch.ones(2, 1, 1, dtype=torch.float64))
    h = torch.tensor([5.0, 0.5], dtype=torch.float64)
    _, converged, _ = radau.solve_stages(loss, start, h, x.new_zeros(2, 5, 1), 1e-13 + 0 * h)
    assert converged.tolist() == [False, True]
