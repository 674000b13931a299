"""Recursions of linear optimizers against PyTorch's own steps, to rounding."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manifold_sde.errors import TimeScaleError
from manifold_sde.training.recursions import (
    LinearStep,
    RunningClock,
    adjoint_weights,
    sgd_step,
    sgd_twin,
)

STEPS, DIM = 150, 6
RNG = np.random.default_rng(5)
LR = 0.02 * np.exp(RNG.normal(0.0, 0.5, STEPS))
DECAY = 0.02 * np.exp(RNG.normal(0.0, 0.5, STEPS))
MOMENTUM = np.linspace(0.5, 0.9, STEPS)
SKEW = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
START = torch.linspace(0.5, 1.5, DIM, dtype=torch.float64)


def gradient(x: Tensor) -> Tensor:
    """Tangential and of degree -1, as the gradient of a scale-invariant loss."""
    y = x / x.norm()
    z = SKEW @ torch.sin(3.0 * y)
    return (z - y * (y @ z)) / x.norm()


def torch_run(
    lr: Any,
    decay: Any,
    momentum: Any,
    *,
    decoupled: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Points (K + 1, D) and gradients (K, D) of torch.optim.SGD; SGDW decays before its step."""
    x = torch.nn.Parameter(START.clone())
    optimizer = torch.optim.SGD([x], lr=0.1, momentum=0.9, **options)
    points, gradients = [START], []
    for eta, lam, beta in zip(*np.broadcast_arrays(lr, decay, momentum), strict=True):
        (group,) = optimizer.param_groups
        group |= {"lr": float(eta), "momentum": float(beta)}
        group["weight_decay"] = 0.0 if decoupled else float(lam)
        x.grad = gradient(x.detach())
        gradients.append(x.grad.clone())
        if decoupled:
            x.data.mul_(1.0 - float(eta * lam))
        optimizer.step()
        points.append(x.detach().clone())
    return torch.stack(points), torch.stack(gradients)


def steps_of(lr: Any, decay: Any, momentum: Any, **options: Any) -> list[LinearStep]:
    rows = zip(*np.broadcast_arrays(lr, decay, momentum), strict=True)
    return [sgd_step(*map(float, row), **options, first=k == 0) for k, row in enumerate(rows)]


def twin_defect(lr: Any, momentum: Any, points: Tensor, log_a: Any, dampening: float) -> float:
    """How far x_k / a_k is from the run without decay at these learning rates and momenta."""
    twin, _ = torch_run(lr, 0.0, momentum, dampening=dampening)
    scaled = points / torch.from_numpy(np.exp(log_a))[:, None]
    return float((scaled - twin).norm(dim=1).max() / scaled.norm(dim=1).max())


@pytest.mark.parametrize("dampening", [0.0, 0.4])
def test_the_run_without_decay_has_the_same_directions(dampening: float) -> None:
    points, _ = torch_run(LR, DECAY, MOMENTUM, dampening=dampening)
    log_a, log_lr = sgd_twin(LR, DECAY, MOMENTUM, dampening=dampening)
    assert twin_defect(np.exp(log_lr), MOMENTUM, points, log_a, dampening) < 1e-12
    naive = np.cumsum(np.log1p(-LR * DECAY * (1 - dampening) / (1 - MOMENTUM)))
    rough = np.concatenate([[0.0], naive])
    naive_lr = LR * np.exp(-rough[:-1] - rough[1:])
    assert twin_defect(naive_lr, MOMENTUM, points, rough, dampening) > 1e-3


def test_decoupled_decay_has_a_twin_of_smaller_momentum() -> None:
    points, _ = torch_run(LR, 20.0 * DECAY, MOMENTUM, decoupled=True)
    log_a, log_lr = sgd_twin(LR, 20.0 * DECAY, MOMENTUM, decoupled=True)
    smaller = MOMENTUM * np.concatenate([[1.0], 1.0 - 20.0 * LR[:-1] * DECAY[:-1]])
    assert twin_defect(np.exp(log_lr), smaller, points, log_a, 0.0) < 1e-12
    # Broken twin: momentum as it was.
    assert twin_defect(np.exp(log_lr), MOMENTUM, points, log_a, 0.0) > 1e-2


def test_warm_up_may_start_at_rate_zero() -> None:
    rates = LR * np.minimum(1.0, np.arange(STEPS) / 20.0)
    points, _ = torch_run(rates, DECAY, 0.9)
    log_a, log_lr = sgd_twin(rates, DECAY, 0.9)
    assert twin_defect(np.exp(log_lr), 0.9, points, log_a, 0.0) < 1e-12


def test_too_strong_decay_is_refused() -> None:
    most = (1.0 - np.sqrt(0.9)) ** 2
    sgd_twin(np.full(2000, 0.99 * most), 1.0, 0.9)
    with pytest.raises(TimeScaleError, match=r"less than 0\.00263: beyond it"):
        sgd_twin(np.full(9, 1.01 * most), 1.0, 0.9)
    sgd_twin(np.full(9, 1.01 * most), 1.0, 0.9, dampening=0.1)
    with pytest.raises(TimeScaleError, match="less than 1: beyond it"):
        sgd_twin([1.0], 1.0, 0.9, decoupled=True)
    # Momentum that jumps leaves a buffer that takes the weights past 0.
    with pytest.raises(TimeScaleError, match="change the sign"):
        sgd_twin([1e-6] * 400 + [1.0] * 9, [2e3] * 400 + [0.0] * 9, [0.9] * 400 + [0.999] * 9)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"nesterov": True},
    {"dampening": 0.9},
    {"decoupled": True},
    {"decoupled": True, "dampening": 0.3},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_the_last_point_is_the_weighted_sum_of_the_gradients(options: dict[str, Any]) -> None:
    points, gradients = torch_run(LR, DECAY, MOMENTUM, **options)
    weights, log_a = adjoint_weights(steps_of(LR, DECAY, MOMENTUM, **options))
    shares = torch.from_numpy(weights * np.exp(-log_a[:-1]))
    expected = START - shares @ gradients
    assert float((points[-1] * np.exp(-log_a[-1]) - expected).norm()) < 1e-12
    # Broken twin: the learning rate over 1 - momentum at the gradient's own step.
    effective = LR * (1 - options.get("dampening", 0.0)) / (1 - MOMENTUM)
    naive = torch.from_numpy(effective * np.exp(-log_a[1:]))
    assert float((points[-1] * np.exp(-log_a[-1]) - START + naive @ gradients).norm()) > 1e-2


def clock_of(steps: list[LinearStep], norms: Any) -> float:
    clock = RunningClock()
    for step, norm in zip(steps, norms, strict=True):
        clock.advance(step, norm**-4.0)
    return float(clock.value)


@pytest.mark.parametrize("options", VARIANTS)
def test_the_running_clock_is_the_sum_over_all_gradients(options: dict[str, Any]) -> None:
    points, _ = torch_run(LR, DECAY, MOMENTUM, **options)
    norms = points[:-1].norm(dim=1).numpy()
    steps = steps_of(LR, DECAY, MOMENTUM, **options)
    weights, _ = adjoint_weights(steps)
    whole = float((weights**2 / norms**4).sum())
    assert clock_of(steps, norms) == pytest.approx(whole, rel=1e-11)
    # Broken twins: η for η/(1 - β), and η/(1 - β) under a schedule of the momentum.
    new = 1 - options.get("dampening", 0.0)
    for rate in (LR * new, LR * new / (1 - MOMENTUM)):
        assert abs(float((rate**2 / norms**4).sum()) / whole - 1.0) > 0.02


def test_the_three_numbers_of_pytorch_momentum() -> None:
    """The form for momentum and coupled decay in which the numbers are usually written."""
    points, _ = torch_run(LR, DECAY, MOMENTUM, dampening=0.4)
    norms = points.norm(dim=1).numpy()
    log_a, _ = sgd_twin(LR, DECAY, MOMENTUM, dampening=0.4)
    u, b, c = 0.0, 0.0, norms[0] ** -4.0
    for k in range(STEPS):
        h, w = LR[k], np.exp(log_a[k] - log_a[k + 1])
        u += 2 * h * w * b + h**2 * w**2 * c
        beta = MOMENTUM[min(k + 1, STEPS - 1)]
        b, c = beta * w**2 * (b + h * w * c), beta**2 * w**4 * c + 0.6**2 * norms[k + 1] ** -4.0
    steps = steps_of(LR, DECAY, MOMENTUM, dampening=0.4)
    assert clock_of(steps, norms[:-1]) == pytest.approx(u, rel=1e-11)


def test_a_drop_of_the_rate_is_seen_by_the_gradients_before_it() -> None:
    """η/(1 - β) counts 2(1-f)β/(1-β) - (1-f)^2 β^2/(1-β^2) steps too many at the old rate."""
    beta, f = 0.9, 0.1
    too_many = 2 * (1 - f) * beta / (1 - beta) - (1 - f) ** 2 * beta**2 / (1 - beta**2)
    rates = np.concatenate([np.full(2000, 1.0), np.full(2000, f)])
    weights, _ = adjoint_weights(steps_of(rates, 0.0, beta))
    ended, _ = adjoint_weights(steps_of(rates[2000:], 0.0, beta))
    tail = 2000 - float((ended**2).sum()) * (1 - beta) ** 2 / f**2
    counted = float((weights**2).sum()) * (1 - beta) ** 2 + tail * f**2
    assert 2000 * (1 + f**2) - counted == pytest.approx(too_many, abs=1e-8)
    assert tail == pytest.approx(2 * beta / (1 - beta) - beta**2 / (1 - beta**2), abs=1e-8)


def test_the_first_step_is_not_dampened() -> None:
    beta = d = 0.9
    steps = steps_of(np.full(2000, 0.1), 0.0, beta, dampening=d)
    broken = [sgd_step(0.1, 0.0, beta, dampening=d)] * 2000
    counts = [clock_of(s, np.ones(2000)) / 0.1**2 for s in (steps, broken)]
    assert counts[0] - counts[1] == pytest.approx((1 - d) ** -2 - 1, abs=1e-8)  # 99 steps


def test_groups_have_clocks_side_by_side() -> None:
    norms = np.array([1.0, 2.0, 0.5])
    clock = RunningClock()
    for step in steps_of(LR, DECAY, MOMENTUM):
        clock.advance(step, norms**-4.0)
    alone = [clock_of(steps_of(LR, DECAY, MOMENTUM), np.full(STEPS, n)) for n in norms]
    np.testing.assert_allclose(clock.value, alone, rtol=1e-12)


def test_nothing_overflows_however_long_the_decay() -> None:
    clock = RunningClock()
    step: Callable[..., LinearStep] = sgd_step
    for k in range(20000):
        clock.advance(step(0.1, 1.0, 0.0, first=k == 0), 1.0)
    assert clock.log_factor == pytest.approx(20000 * np.log(0.9))
    # At the norm that decay holds, 1/|x|^4 each step: a geometric sum in a^4.
    assert clock.value == pytest.approx((0.1 / 0.9) ** 2 * 20000)
