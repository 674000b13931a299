"""Sizes and products of samples' gradients from what layers receive, against the gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from manifold_sde import LeastSquaresProblem, Problem, SamplingNoise, ghost_products, reverse_mode
from manifold_sde.geometry.matrix_free_spaces import JacobianSpace
from manifold_sde.loss import LeastSquaresLoss, Loss, PerSampleFunction
from manifold_sde.networks import NormalizedMLP

GENERATOR = torch.Generator().manual_seed(3)
INPUTS = torch.randn(7, 4, 5, dtype=torch.float64, generator=GENERATOR)
TARGETS = torch.randn(7, 3, dtype=torch.float64, generator=GENERATOR)


class Rows(nn.Module):
    """Samples of four rows in each of two layers, one of which has a bias; then their mean."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))).mean(1)


class Gains(Rows):
    """Further weights, of no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.gain)


class Tied(Rows):
    """A layer that is called twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.square())


def one_row(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(20, width), nn.Tanh(), nn.Linear(width, 3))


def made(module: nn.Module, criterion: object, **options: object) -> Problem:
    return Problem.from_module(
        module.double(), criterion, INPUTS, TARGETS, SamplingNoise(), **options
    )  # type: ignore[arg-type]


def gradients(loss: Loss, x: Tensor) -> Tensor:
    assert loss.n_samples is not None
    return loss.map_samples(reverse_mode.gradient, x, slice(0, loss.n_samples))


def point(loss: Loss) -> Tensor:
    return torch.randn(loss.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def against(outputs: Tensor, targets: Tensor) -> Tensor:
    return (torch.sin(outputs) * targets).sum(1)


TAKEN_APART: dict[str, Callable[[], Problem]] = {
    "one row": lambda: made(one_row(), against),
    "normalised": lambda: made(
        nn.Sequential(nn.Flatten(), NormalizedMLP((20, 6, 3))), nn.MSELoss()
    ),
    "few rows": lambda: made(Rows(30), against),
    "many rows": lambda: made(Rows(2), nn.MSELoss()),
    "ghost batches": lambda: Problem.from_module(
        one_row().double(), against, INPUTS[:6], TARGETS[:6], SamplingNoise(), ghost_size=2
    ),
    "in passes": lambda: made(one_row(), nn.MSELoss(), memory="22 KiB"),
}


@pytest.mark.parametrize("name", TAKEN_APART)
def test_the_squares_are_those_of_the_gradients(name: str) -> None:
    problem = TAKEN_APART[name]()
    loss = problem.pointwise
    assert name != "in passes" or len(loss.per_sample.passes(2)) > 1  # type: ignore[union-attr]
    x = point(loss)
    with torch.no_grad():
        found = ghost_products.mean_and_squares(loss, x)
        trace = problem.noise_trace(x)
    assert found is not None
    rows = gradients(loss, x)
    torch.testing.assert_close(found[0], rows.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], rows.square().sum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trace, rows.var(0, correction=0).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["normalised", "in passes"])
def test_the_products_are_those_of_the_jacobian(name: str) -> None:
    problem = TAKEN_APART[name]()
    loss = problem.pointwise
    assert isinstance(loss, LeastSquaresLoss)
    x = point(loss)
    with torch.no_grad():
        found = JacobianSpace(problem, 3, 1 << 20).gram(x)
    rows = loss.rows(x, 0, loss.n_samples)
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-12, atol=1e-12)
    assert loss.by_layers
    layers = ghost_products.jacobian(loss, x)
    assert layers is not None
    v, w = torch.sin(torch.arange(loss.dim).to(x)), torch.cos(torch.arange(len(rows)).to(x))
    torch.testing.assert_close(layers.product(v), rows @ v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layers.transposed_product(w), w @ rows, rtol=1e-12, atol=1e-12)


def test_no_gradient_of_a_sample_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = TAKEN_APART["one row"]()
    x = point(problem.pointwise)
    right = problem.noise_trace(x)
    monkeypatch.setattr(Loss, "map_samples", None)
    assert torch.equal(problem.noise_trace(x), right)
    problem.pointwise.by_layers = False
    with pytest.raises(TypeError):
        problem.noise_trace(x)


@pytest.mark.parametrize("module", [Gains, Tied])
def test_weights_of_no_layer_and_of_one_that_is_called_twice(module: type[nn.Module]) -> None:
    problem = made(module(), against)
    loss = problem.pointwise
    x = point(loss)
    assert ghost_products.mean_and_squares(loss, x) is None
    expected = gradients(loss, x).var(0, correction=0).sum()
    torch.testing.assert_close(problem.noise_trace(x), expected, rtol=1e-12, atol=1e-12)


def test_rows_in_another_order_are_told() -> None:
    """A layer that gets the rows of samples side by side: the squares are not theirs."""

    def function(x: Tensor, inputs: Tensor) -> Tensor:
        mixed = nn.functional.linear(inputs.transpose(0, 1), x.reshape(3, 5))
        return torch.tanh(mixed).sum((0, 2))

    loss = Loss(PerSampleFunction(function, INPUTS), 15, len(INPUTS))
    x = point(loss)
    assert ghost_products.mean_and_squares(loss, x) is None
    loss.by_layers = True  # the twin, which does not look
    found = ghost_products.mean_and_squares(loss, x)
    assert found is not None
    assert not torch.allclose(found[1], gradients(loss, x).square().sum(1), rtol=1e-3)


def test_derivatives_and_batches_go_by_the_gradients() -> None:
    problem = TAKEN_APART["one row"]()
    loss = problem.pointwise
    x = torch.stack([point(loss), point(loss).flip(0)])
    expected = torch.stack([gradients(loss, z).var(0, correction=0).sum() for z in x])
    torch.testing.assert_close(problem.noise_trace(x), expected, rtol=1e-12, atol=1e-12)
    slope = torch.func.grad(lambda z: problem.noise.trace(loss, z))(x[0])
    step = 1e-6 * torch.ones_like(x[0])
    ahead, behind = problem.noise_trace(x[0] + step), problem.noise_trace(x[0] - step)
    torch.testing.assert_close(2 * slope @ step, ahead - behind, rtol=1e-6, atol=1e-12)


@torch.no_grad()
def test_points_of_large_networks_are_taken_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Traces and frames of two points at once: the same, and nothing of either is batched."""
    problem = made(nn.Sequential(nn.Flatten(), NormalizedMLP((20, 6, 3))), nn.MSELoss())
    loss = problem.pointwise
    assert isinstance(loss, LeastSquaresLoss)
    space = JacobianSpace(problem, loss.n_residuals, 1 << 20)
    y = torch.stack([point(loss), point(loss).flip(0)], 1)
    basis = space.reference_basis(y)
    together = space.kernels.noise_trace(y), *space.frame(y, basis)
    assert ghost_products.is_by_layers(loss, y[:, 0])
    monkeypatch.setattr(ghost_products, "_SINGLY", 10)
    monkeypatch.setattr(Loss, "map_samples", None)
    monkeypatch.setattr(LeastSquaresLoss, "rows", None)
    singly = space.kernels.noise_trace(y), *space.frame(y, basis)
    torch.testing.assert_close(singly[:2], together[:2], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(singly[2].abs(), together[2].abs(), rtol=1e-8, atol=1e-10)


def test_least_squares_of_several_rows_go_by_the_rows_of_the_jacobian() -> None:
    problem = TAKEN_APART["many rows"]()
    assert isinstance(problem, LeastSquaresProblem)
    loss = problem.pointwise
    x = point(loss)
    assert ghost_products.jacobian(loss, x) is None
    rows = loss.rows(x, 0, loss.n_samples)
    found = JacobianSpace(problem, 3, 1 << 20).gram(x)
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-12, atol=1e-12)
