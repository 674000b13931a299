"""Batch normalisation in training mode: steps of torch.optim.SGD on random batches, in law."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from manifold_sde import Problem, SamplingNoise, errors
from manifold_sde.networks import (
    GhostBatchNorm,
    NormalizedMLP,
    RandomBatches,
    batch_law,
)
from manifold_sde.solvers import run_sgd

#: False-alarm rate of a statistical test, and steps that torch takes for it.
ALARM, STEPS = 1e-4, 800
GENERATOR = torch.Generator().manual_seed(4)
INPUTS = torch.randn(60, 5, dtype=torch.float64, generator=GENERATOR)
CLASSES = torch.randint(0, 3, (60,), generator=GENERATOR)
BATCHES = RandomBatches(size=4, count=800, seed=1)
LR = 0.1


@functools.cache
def module() -> nn.Module:
    layers = nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    made = nn.Sequential(*layers).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=GENERATOR))
    return made


def make(**options: Any) -> Problem:
    given = {"batches": BATCHES} | options
    return Problem.from_module(
        module(), nn.CrossEntropyLoss(), INPUTS, CLASSES, SamplingNoise(), **given
    )


problem = functools.cache(make)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


@functools.cache
def torch_steps(train: bool = True) -> Tensor:
    """Steps of torch.optim.SGD from the module's weights, each on a random batch, over -lr."""
    generator, found = torch.Generator().manual_seed(17), []
    before = flat(module().parameters())
    for _ in range(STEPS):
        net = copy.deepcopy(module()).train(train)
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        rows = torch.randperm(60, generator=generator)[:4]
        nn.CrossEntropyLoss()(net(INPUTS[rows]), CLASSES[rows]).backward()
        optimizer.step()
        found.append((before - flat(net.parameters())) / LR)
    return torch.stack(found)


def p_values(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Of equal means (16 functionals) and of equal variances (4) of samples (n, D)."""
    ways = torch.randn(ours.shape[1], 16, dtype=torch.float64, generator=GENERATOR.manual_seed(6))
    a, b = ours @ ways, theirs @ ways
    squares = [(v[:, :4] - v[:, :4].mean(0)).square() for v in (a, b)]
    return hotelling(a, b), hotelling(*squares)


def hotelling(a: Tensor, b: Tensor) -> float:
    """Hotelling's test of equal means, with the degrees of freedom of the smaller sample."""
    apart, k, n = a.mean(0) - b.mean(0), a.shape[1], min(len(a), len(b))
    covariance = torch.cov(a.T) / len(a) + torch.cov(b.T) / len(b)
    square = float(apart @ torch.linalg.solve(covariance, apart))
    return float(stats.f.sf(square * (n - k) / (k * (n - 1)), k, n - k))


def test_a_batch_has_the_gradient_of_torch_and_the_module_is_left_alone() -> None:
    before = copy.deepcopy(module().state_dict())
    p = make(batches=RandomBatches(size=6, count=8, seed=3))
    assert p.n_samples == 8
    for name, value in module().state_dict().items():
        assert torch.equal(value, before[name])
    x = p.vector(module())
    gradients = p.pointwise.sample_gradients(x)
    for rows, gradient in zip(
        RandomBatches(size=6, count=8, seed=3).draw(60), gradients, strict=True
    ):
        net = copy.deepcopy(module())
        nn.CrossEntropyLoss()(net(INPUTS[rows]), CLASSES[rows]).backward()
        wanted = flat(q.grad for q in net.parameters())
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(p.gradient(x), gradients.mean(0), rtol=1e-12, atol=1e-14)
    assert max(p.derivative_errors(x / x.norm()).values()) < 1e-6
    run = run_sgd(p, x, lr=LR, weight_decay=0.0, steps=[0, 1], n_paths=5, compile=False)
    for step in (x - run.ys[-1]) / LR:
        assert float((step - gradients).norm(dim=1).min()) < 1e-12
    assert p.outputs(x).shape == (48, 3)
    own = copy.deepcopy(module())(INPUTS).detach()
    torch.testing.assert_close(p.outputs(x, INPUTS), own, rtol=1e-12, atol=1e-12)


def test_least_squares_of_batches() -> None:
    targets = INPUTS[:, :3].cos()
    batches = RandomBatches(size=6, count=5)
    p = Problem.from_module(
        module(), nn.MSELoss(), INPUTS, targets, SamplingNoise(), batches=batches
    )
    losses = [
        nn.MSELoss()(copy.deepcopy(module())(INPUTS[rows]), targets[rows]).detach()
        for rows in batches.draw(60)
    ]
    torch.testing.assert_close(p.sample_losses(p.vector(module())), torch.stack(losses))


@pytest.mark.paper("Equation (2)")
def test_mean_and_covariance_of_a_step_are_those_of_torch() -> None:
    p = problem()
    x = p.vector(module())
    gradients = p.pointwise.sample_gradients(x)
    assert min(p_values(gradients, torch_steps())) > ALARM
    # Sigma is that of these batches, exactly.
    centred = gradients - gradients.mean(0)
    torch.testing.assert_close(p.noise_covariance(x), centred.T @ centred / BATCHES.count)


def by_running_statistics() -> Tensor:
    """Batches of a module in eval mode, whose statistics are those of all data."""
    net = copy.deepcopy(module()).train()
    net[1].momentum = 1.0
    net(INPUTS)
    p = Problem.from_module(net.eval(), nn.CrossEntropyLoss(), INPUTS, CLASSES, SamplingNoise())
    gradients = p.pointwise.sample_gradients(p.vector(net))
    return gradients[RandomBatches(size=4, count=800, seed=1).draw(60)].mean(1)


def of_the_whole_batch() -> Tensor:
    """The gradient of the loss with the statistics of all data, with the noise that is right."""
    net = copy.deepcopy(module()).train()
    nn.CrossEntropyLoss()(net(INPUTS), CLASSES).backward()
    whole = flat(q.grad for q in net.parameters())
    gradients = problem().pointwise.sample_gradients(problem().vector(module()))
    return gradients - gradients.mean(0) + whole


@pytest.mark.parametrize("twin", [by_running_statistics, of_the_whole_batch])
def test_other_statistics_are_told(twin: Callable[[], Tensor]) -> None:
    assert min(p_values(twin(), torch_steps())) < ALARM


def test_larger_batches_are_told() -> None:
    """The twin of the covariance: batches of 8."""
    p = make(batches=RandomBatches(size=8, count=800, seed=1))
    assert p_values(p.pointwise.sample_gradients(p.vector(module())), torch_steps())[1] < ALARM


def test_the_errors_that_are_reported() -> None:
    """Against torch's steps: the mean is as far as is said, and so is the trace."""
    p = problem()
    law = batch_law(p, p.vector(module()))
    theirs = torch_steps()
    apart = float((law.gradient - theirs.mean(0)).norm())
    expected = 2.0**0.5 * law.gradient_error  # as many steps as batches
    assert 0.4 * expected < apart < 1.8 * expected
    trace = float((theirs - theirs.mean(0)).square().sum()) / (STEPS - 1)
    assert abs(trace - law.trace) < 4.0 * 2.0**0.5 * law.trace_error
    assert law.trace == pytest.approx(
        float(p.noise_trace(p.vector(module()))) * BATCHES.count / (BATCHES.count - 1)
    )
    assert "standard error" in str(law)
    few = make(batches=RandomBatches(size=4, count=20, seed=9))
    rough = batch_law(few, few.vector(module()))
    assert 4.0 < rough.gradient_error / law.gradient_error < 10.0  # 6.3 by the counts


def test_batch_normalisation_without_eps_is_scale_invariant() -> None:
    net = NormalizedMLP((5, 6, 3), norm="batch", seed=2).double()
    batches = RandomBatches(size=6, count=8)
    p = Problem.from_module(
        net, nn.CrossEntropyLoss(), INPUTS, CLASSES, SamplingNoise(), batches=batches
    )
    assert float(p.scale_invariance_violation()) < 1e-12
    assert max(p.noise_violations().values()) < 1e-11
    with pytest.raises(errors.NoiseError):
        Problem.from_module(net, nn.CrossEntropyLoss(), INPUTS, CLASSES, SamplingNoise())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RandomBatches(1, 5), errors.ArgumentError, "GroupNorm"),
        (lambda: RandomBatches(4, 1), errors.ArgumentError, "count"),
        (lambda: make(batches=RandomBatches(60, 5)), errors.ArgumentError, "smaller than the data"),
        (lambda: make(batches=(6, 5)), errors.DTypeError, "RandomBatches"),
        (lambda: make(ghost_size=6), errors.ArgumentError, "two forms"),
        (
            lambda: Problem.from_module(
                copy.deepcopy(module()).eval(),
                *(nn.CrossEntropyLoss(), INPUTS, CLASSES, SamplingNoise()),
                batches=BATCHES,
            ),
            errors.ArgumentError,
            "module.train",
        ),
        (
            lambda: Problem.from_module(
                nn.Sequential(nn.Linear(5, 3), GhostBatchNorm(3)).double(),
                *(nn.CrossEntropyLoss(), INPUTS, CLASSES, SamplingNoise()),
                batches=BATCHES,
            ),
            errors.ArgumentError,
            "do not divide a batch",
        ),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
