"""The expected clock against simulation of optimizers on pure noise.

Each test states a difference of the simulated -2 ln E cos and norms from theory in standard
errors (at most 4, seeds fixed), and shows what the same test says of a broken formula.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manifold_sde.errors import ArgumentError
from manifold_sde.training import ExpectedClock, expected_clock
from manifold_sde.training.expected import RELATIVE
from manifold_sde.training.update_variance import (
    adam_variance,
    average_norm,
    lion_variance,
    muon_variance,
    signum_variance,
)

PATHS, DIM = 150, 120
Make = Callable[[Tensor], Any]
Step = Callable[[Tensor, Tensor], None]


class Simulated:
    """Directions and norms of paths of an optimizer that sees noise alone."""

    def __init__(self, x: Tensor, start: Tensor) -> None:
        cos = (x * start).sum(-1) / (x.norm(dim=-1) * start.norm(dim=-1))
        n = len(cos)
        self.cos, self.cos_error = float(cos.mean()), float(cos.std()) / math.sqrt(n)
        square = x.square().sum(-1)
        self.square, self.square_error = float(square.mean()), float(square.std()) / math.sqrt(n)

    def off(self, v: float) -> float:
        """E cos against e^{-v/2}, in standard errors, of which 1/D is no part."""
        return abs(self.cos - math.exp(-v / 2.0)) / (self.cos_error + 0.25 / DIM)

    def norm_off(self, square: float) -> float:
        """E|x|^2 against theory, in standard errors and half a percent."""
        return abs(self.square - square) / (self.square_error + 0.00125 * square)


def noise_at(
    x: Tensor, generator: torch.Generator, *, trace: float = 1.0, eps: float = 0.0
) -> Tensor:
    """Tangential noise of E|g|^2 = trace / (|x|^2 + eps)."""
    z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    square = x.square().sum(-1, keepdim=True)
    z = z - x * ((x * z).sum(-1, keepdim=True) / square)
    return z * torch.sqrt(trace / ((x.shape[-1] - 1) * (square + eps)))


def simulate(
    step: Step,
    steps: int,
    *,
    norm: float = 1.0,
    seed: int = 0,
    dim: int = DIM,
    **noise: float,
) -> Simulated:
    """``step(x, g)`` moves x (paths, D) in place."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(PATHS, dim, generator=generator, dtype=torch.float64)
    x *= norm / x.norm(dim=1, keepdim=True)
    start = x.clone()
    for _ in range(steps):
        step(x, noise_at(x, generator, **noise))
    return Simulated(x, start)


def with_optimizer(make: Make, **schedules: Any) -> Step:
    """A torch optimizer under schedules, one value a step."""
    optimizer: Any = None
    k = 0

    def step(x: Tensor, g: Tensor) -> None:
        nonlocal optimizer, k
        if optimizer is None:
            optimizer = make(x)
        for name, values in schedules.items():
            optimizer.param_groups[0][name] = float(values[k])
        x.grad = g
        optimizer.step()
        k += 1

    return step


def warm_up_and_drop(steps: int, top: float) -> Any:
    rates = np.full(steps, top)
    rates[steps // 2 :] *= 0.1
    rates[: steps // 8] *= np.linspace(0.1, 1.0, steps // 8)
    return rates


def sgd(**options: Any) -> Make:
    return lambda x: torch.optim.SGD([x], lr=1.0, **options)


def agree(simulated: Simulated, expected: ExpectedClock) -> None:
    assert simulated.off(expected.total) < 4.0
    assert simulated.norm_off(float(expected.norms[-1]) ** 2) < 4.0


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.95}, {"momentum": 0.9, "nesterov": True}]
)
def test_sgd_under_a_schedule(options: dict[str, Any]) -> None:
    beta = options.get("momentum", 0.0)
    rates = warm_up_and_drop(240, 0.1 * (1.0 - beta))
    step = with_optimizer(sgd(weight_decay=0.02, **options), lr=rates)
    simulated = simulate(step, 240)
    agree(simulated, expected_clock(rates, weight_decay=0.02, **options))
    if beta:  # Broken twin: η for η/(1 - β).
        assert simulated.off(expected_clock(rates, weight_decay=0.02).total) > 20.0


@pytest.mark.parametrize(("first", "last"), [(0.5, 0.95), (0.95, 0.5)])
def test_a_momentum_that_changes(first: float, last: float) -> None:
    momenta = np.linspace(first, last, 150)
    rates = np.full(150, 0.01)
    simulated = simulate(with_optimizer(sgd(momentum=first), lr=rates, momentum=momenta), 150)
    agree(simulated, expected_clock(rates, momentum=momenta))
    # Broken twin: η/(1 - β) at each step, half as much again.
    naive = 0.5 * math.log1p(2.0 * float(((rates / (1.0 - momenta)) ** 2).sum()))
    assert simulated.off(naive) > 10.0


def test_the_first_step_is_not_dampened() -> None:
    steps, rates = 100, np.full(100, 0.05)
    simulated = simulate(with_optimizer(sgd(momentum=0.9, dampening=0.9), lr=rates), steps)
    agree(simulated, expected_clock(rates, momentum=0.9, dampening=0.9))
    broken = expected_clock(0.005, steps, momentum=0.9).total  # dampened from the first step
    assert simulated.off(broken) > 8.0


def test_sgdw() -> None:
    optimizer: Any = None
    rates = warm_up_and_drop(240, 0.01)

    def step(x: Tensor, g: Tensor) -> None:
        nonlocal optimizer
        optimizer = optimizer or torch.optim.SGD([x], lr=1.0, momentum=0.9)
        k = step.k  # type: ignore[attr-defined]
        step.k += 1  # type: ignore[attr-defined]
        optimizer.param_groups[0]["lr"] = float(rates[k])
        x.grad = g
        x.mul_(1.0 - float(rates[k]) * 0.5)
        optimizer.step()

    step.k = 0  # type: ignore[attr-defined]
    simulated = simulate(step, 240)
    agree(simulated, expected_clock(rates, optimizer="sgdw", weight_decay=0.5, momentum=0.9))
    coupled = expected_clock(rates, weight_decay=0.5 * 0.9, momentum=0.0)
    assert simulated.norm_off(float(coupled.norms[-1]) ** 2) > 8.0


@pytest.mark.paper("Equation (10)")
def test_three_groups_have_three_clocks() -> None:
    eta, lam, steps = 0.02, 0.02, 6000
    groups = {(1.0, 1.0): 4.454, (4.0, 3.0): 2.952, (0.25, 0.5): 5.147}
    found = [expected_clock(eta, steps, weight_decay=lam, noise=v, norm=r).total for v, r in groups]
    assert found == pytest.approx(list(groups.values()), abs=0.01)
    # Broken twin: one clock for all, 2 ηλ steps.
    assert max(abs(v - 2 * eta * lam * steps) for v in found) == pytest.approx(1.85, abs=0.01)


def test_norm_in_equilibrium() -> None:
    """|x|^4 = ηe V/(2λ), with the correction of order ηλ for coupled decay."""
    eta, lam, beta = 0.02, 0.01, 0.9
    run = expected_clock(eta, 6000, weight_decay=lam, momentum=beta, noise=3.0)
    effective = eta / (1 - beta)
    exact = effective * 3.0 / (lam * (2.0 - eta * lam / (1 + beta)))
    assert float(run.norms[-1]) ** 4 == pytest.approx(exact, rel=1e-9)
    decoupled = expected_clock(
        eta, 6000, optimizer="sgdw", weight_decay=10 * lam, momentum=beta, noise=3.0
    )
    q = 1 - eta * 10 * lam
    own = eta**2 * 3.0 / (1 - beta**2) * (1 + q * beta) / ((1 - q * beta) * (1 - q * q))
    assert float(decoupled.norms[-1]) ** 4 == pytest.approx(own, rel=1e-9)


@pytest.mark.parametrize("clip", [0.3, 0.6])
def test_clipped_gradients(clip: float) -> None:
    inner = with_optimizer(sgd(weight_decay=0.1, momentum=0.9), lr=np.full(100, 0.01))

    def step(x: Tensor, g: Tensor) -> None:
        inner(x, g * (clip / g.norm(dim=1, keepdim=True)).clamp(max=1.0))

    simulated = simulate(step, 100)
    expected = expected_clock(0.01, 100, weight_decay=0.1, momentum=0.9, clip=clip)
    agree(simulated, expected)
    # Broken twin: the clock of 1/|x|^4 along the same norms.
    broken = 0.1**2 * float((expected.norms[:-1] ** -4.0).sum())
    assert simulated.off(broken) > 10.0


def test_eps_of_the_normalization() -> None:
    inner = with_optimizer(sgd(weight_decay=0.1), lr=np.full(150, 0.1))
    simulated = simulate(inner, 150, eps=1.0)
    expected = expected_clock(0.1, 150, weight_decay=0.1, normalization_eps=1.0)
    agree(simulated, expected)
    # Broken twin: the clock of |x|^-4.
    broken = (0.1**2 * expected.norms[:-1] ** -4.0).sum()
    assert simulated.off(float(broken)) > 10.0


def adam(kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> Make:
    return lambda x: kind([x], **{"lr": 0.01, "eps": 1e-30, "weight_decay": 0.0, **options})  # type: ignore[call-arg]


@pytest.mark.parametrize("second", [0.95, 0.999])
def test_adamw_and_the_lag_of_its_second_average(second: float) -> None:
    steps, betas, decay = 600, (0.9, second), 0.3
    rates = 0.01 * 0.5 * (1.0 + np.cos(np.pi * np.arange(steps) / steps))
    step = with_optimizer(adam(betas=betas, weight_decay=decay), lr=rates)
    simulated = simulate(step, steps, norm=3.0, seed=3)
    expected = expected_clock(
        rates, optimizer="adamw", weight_decay=decay, size=DIM, betas=betas, norm=3.0
    )
    assert simulated.off(expected.total) < 4.0
    assert simulated.square == pytest.approx(float(expected.norms[-1]) ** 2, rel=0.01)
    # Broken twins: no lag, U^2 = D at every step; the rotation of single steps.
    log_a = np.cumsum(np.log1p(-rates * decay))
    growth = 1.0 + DIM / 9.0 * float((rates**2 * np.exp(-2.0 * log_a)).sum())
    if second == 0.999:
        assert simulated.off(math.log(growth)) > 4.0
        assert growth * 9.0 * math.exp(2.0 * log_a[-1]) < 0.92 * simulated.square
    assert simulated.off(expected.total / 19.0) > 20.0


def test_adam_with_decay_in_the_gradient() -> None:
    steps, keywords = 300, {"weight_decay": 0.02, "size": DIM, "betas": (0.9, 0.99)}
    step = with_optimizer(
        adam(torch.optim.Adam, betas=(0.9, 0.99), weight_decay=0.02), lr=np.full(steps, 0.02)
    )
    simulated = simulate(step, steps, norm=3.0, seed=4, trace=float(DIM))
    expected = expected_clock(0.02, steps, optimizer="adam", norm=3.0, noise=float(DIM), **keywords)
    agree(simulated, expected)
    decoupled = expected_clock(
        0.02, steps, optimizer="adamw", norm=3.0, noise=float(DIM), **keywords
    )
    assert simulated.norm_off(float(decoupled.norms[-1]) ** 2) > 4.0
    with pytest.raises(ArgumentError, match="no clock here"):
        expected_clock(0.02, 9, optimizer="adam", weight_decay=0.1, noise=[1.0, 1.0, 2.0], size=3)


def test_eps_of_adam() -> None:
    steps = 300
    step = with_optimizer(adam(eps=0.05, betas=(0.9, 0.99)), lr=np.full(steps, 0.01))
    simulated = simulate(step, steps, norm=2.0, seed=5)
    keywords: dict[str, Any] = {
        "size": DIM,
        "betas": (0.9, 0.99),
        "optimizer": "adamw",
        "norm": 2.0,
    }
    expected = expected_clock(0.01, steps, eps=0.05, **keywords)
    assert simulated.off(expected.total) < 4.0
    assert simulated.square == pytest.approx(float(expected.norms[-1]) ** 2, rel=0.01)
    assert simulated.off(expected_clock(0.01, steps, **keywords).total) > 20.0
    each = expected_clock(0.01, steps, eps=0.05, **keywords | {"noise": np.full(DIM, 1 / DIM)})
    np.testing.assert_allclose(each.clock, expected.clock, rtol=1e-12)


def test_equilibrium_of_adam() -> None:
    run = expected_clock(0.01, 20000, optimizer="adamw", weight_decay=0.2, size=400)
    q, b, u2 = 1 - 0.002, 0.9, 400 * adam_variance((0.9, 0.999))
    g = u2 * (1 - b) / (1 + b)
    square = 0.01**2 * g * (1 + q * b) / ((1 - q * b) * (1 - q * q))
    assert float(run.norms[-1]) ** 2 == pytest.approx(square, rel=1e-3)
    coupled = expected_clock(
        0.01, 20000, optimizer="adam", weight_decay=1e-3, size=400, noise=400.0, norm=10.0
    )
    assert float(coupled.norms[-1]) ** 3 == pytest.approx(0.01 * u2 / 2e-3, rel=5e-3)


class Averages:
    """Optimizers that torch does not have, on paths side by side, in their few lines."""

    def __init__(self, kind: str, lr: float, beta: float, decay: float = 0.0) -> None:
        self.kind, self.lr, self.beta, self.decay = kind, lr, beta, decay
        self.m: Any = 0.0
        self.v: Any = 0.0

    def __call__(self, x: Tensor, g: Tensor) -> None:
        lr, beta = self.lr, self.beta
        norm = x.norm(dim=1, keepdim=True)
        if self.kind == "lars":
            whole = g + self.decay * x
            self.m = beta * self.m + lr * norm / whole.norm(dim=1, keepdim=True) * whole
            x -= self.m
            return
        if self.kind == "lion":
            update = torch.sign(beta * self.m + (1 - beta) * g)
            self.m = 0.99 * self.m + 0.01 * g
        elif self.kind == "lamb":
            self.m, self.v = beta * self.m + (1 - beta) * g, 0.999 * self.v + 0.001 * g**2
            update = self.m / (self.v.sqrt() + 1e-12)
            update = update + self.decay * x
            update = update / update.norm(dim=1, keepdim=True) * norm
            x -= lr * update
            return
        else:
            self.m = beta * self.m + (1 - beta) * g
            if self.kind == "muon":
                left, _, right = torch.linalg.svd(
                    self.m.unflatten(1, (10, 12)), full_matrices=False
                )
                update = (left @ right).flatten(1)
            elif self.kind in ("signum", "signsgd"):
                update = torch.sign(self.m)
            else:
                update = self.m / self.m.norm(dim=1, keepdim=True)
        x *= 1.0 - lr * self.decay
        x -= lr * update
        if self.kind == "hyperball":
            x *= norm / x.norm(dim=1, keepdim=True)


def of_this_length(kind: str, lr: float, beta: float, decay: float, steps: int) -> Any:
    """What updates of fixed size add to |x~|^2 in 1, 2, ... steps: all pairs of them, in full.

    The start, where the buffer is empty, and the updates that are unfinished at the end are in it.
    Each is a running average of white noise, over its norm, or the sign of it (arcsine law).
    """
    own, past, keep = {"lion": (1 - beta, beta * 0.01, 0.99)}.get(kind, (1.0, beta, beta))
    lag = np.subtract.outer(np.arange(steps), np.arange(steps))
    weights = np.where(lag > 0, past * keep ** np.maximum(lag - 1.0, 0.0), own * (lag == 0))
    if kind != "lars":  # whose buffer is of normalised gradients, and is not divided itself
        weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    alike = weights @ weights.T
    if kind in ("lion", "signum", "signsgd"):
        alike = DIM * 2 / math.pi * np.arcsin(np.minimum(alike, 1.0))
    rates = lr * (1.0 - lr * decay) ** -np.arange(1.0, steps + 1)
    return np.cumsum(np.cumsum(alike * np.outer(rates, rates), 0), 1).diagonal()


@pytest.mark.parametrize(
    ("kind", "lr", "beta", "decay", "steps", "single"),
    [
        ("signsgd", 0.005, 0.0, 0.5, 300, 1.0),
        ("signum", 0.002, 0.9, 0.5, 300, signum_variance(0.9)),
        ("lion", 0.0004, 0.9, 0.5, 800, lion_variance((0.9, 0.99))),
        ("normalised_sgd", 0.05, 0.0, 0.2, 300, 1.0),
        ("normalised_sgd", 0.015, 0.9, 0.2, 300, 19.0),
        ("muon", 0.005, 0.9, 0.2, 200, 14.7),
        ("lamb", 0.015, 0.9, 0.1, 300, 19.0),
        ("lars", 0.005, 0.9, 0.01, 300, 19.0),
        ("hyperball", 0.015, 0.9, 0.0, 300, 19.0),
    ],
)
def test_updates_of_fixed_size(
    kind: str, lr: float, beta: float, decay: float, steps: int, single: float
) -> None:
    simulated = simulate(Averages(kind, lr, beta, decay), steps, seed=11)
    keywords: dict[str, Any] = {
        "optimizer": kind,
        "momentum": beta if kind != "lion" else 0.0,
        "betas": (beta, 0.99),
        "weight_decay": decay,
        "size": (10, 12) if kind == "muon" else DIM,
    }
    expected = expected_clock(lr, steps, **keywords)
    if kind == "muon":
        # The end of the run holds unfinished updates, 2β/(1 - β) steps.
        low, high = expected.total * (1.0 - 9.0 / steps), expected.total
        assert max(0.0, simulated.off(low), simulated.off(high)) < 4.0
    else:
        added = of_this_length(kind, lr, beta, 0.0 if kind in RELATIVE else decay, steps)
        assert simulated.off(added[-1] if kind in RELATIVE else math.log1p(added[-1])) < 4.0
        # Both ends cancel in what two lengths of run differ by, and U^2 is left.
        keywords["weight_decay"] = 0.0
        clock = expected_clock(lr, steps, **keywords).clock
        whole = clock if kind in RELATIVE else np.expm1(clock)
        added, mark = of_this_length(kind, lr, beta, 0.0, steps), 3 * steps // 4
        late = added[-1] - added[mark - 1]
        assert whole[-1] - whole[mark] == pytest.approx(late, rel=2e-3)
    if single > 1.0:
        assert simulated.off(expected.total / single) > 10.0
    if kind in ("signsgd", "normalised_sgd") and beta == 0.0:
        agree(simulated, expected)
    if kind == "hyperball":
        assert simulated.square == pytest.approx(float(expected.norms[-1]) ** 2)


def test_muon_is_not_a_running_average() -> None:
    for shape, beta, value in (((64, 64), 0.9, 14.7), ((32, 64), 0.9, 17.4), ((8, 64), 0.95, 38.1)):
        assert muon_variance(shape, beta) / min(shape) == pytest.approx(value, rel=0.03)


@pytest.mark.parametrize("kurtosis", [3.0, 6.0])
def test_size_of_adams_updates(kurtosis: float) -> None:
    """Long-run variance of Adam's update of noise: from sums over all steps, coordinate by one."""
    generator = torch.Generator().manual_seed(2)
    steps, count, betas = 600, 6000 if kurtosis == 3.0 else 20000, (0.0, 0.97)
    x = torch.zeros(count, dtype=torch.float64)
    optimizer = torch.optim.Adam([x], lr=1.0, betas=betas, eps=1e-30)
    optimizer.zero_grad()
    for k in range(steps):
        if k == 200:
            optimizer.param_groups[0]["lr"] = 1.0
            x.zero_()
        z = torch.randn(count, generator=generator, dtype=torch.float64)
        if kurtosis != 3.0:  # a mixture of two scales, of kurtosis 3 (1 + 1) = 6
            wide = torch.rand(count, generator=generator) < 0.5
            z *= torch.where(wide, math.sqrt(2.0), 0.0) + 1e-9
        x.grad = z
        optimizer.step()
    square = x.square() / 400
    error = float(square.std()) / math.sqrt(count)
    expected = adam_variance(betas, kurtosis=kurtosis)
    # What is left out is of the order of the square of the excess.
    slack = 0.5 * ((kurtosis - 1) * (1 - betas[1])) ** 2
    assert abs(float(square.mean()) - expected) < 4.0 * error + slack
    assert abs(float(square.mean()) - 1.0) > 4.0 * error or kurtosis == 3.0


def test_signal_makes_adams_noise_smaller() -> None:
    """With half of E g^2 signal, the noise of an update is .1875 of D, not 1 or 1/2."""
    generator = torch.Generator().manual_seed(3)
    steps, count, f, second = 2400, 1500, 0.5, 0.99
    x = torch.zeros(count, dtype=torch.float64)
    optimizer = torch.optim.Adam([x], lr=1.0, betas=(0.0, second), eps=1e-30)
    for k in range(steps):
        if k == 400:
            x.zero_()
        z = torch.randn(count, generator=generator, dtype=torch.float64)
        x.grad = math.sqrt(f) * z + math.sqrt(1 - f)
        optimizer.step()
    per_step = float(x.var()) / (steps - 400)
    error = per_step * math.sqrt(2 / count)
    expected = adam_variance((0.0, 1.0), noise_share=f)
    assert expected == pytest.approx(0.1875)
    assert abs(per_step - expected) < 4.0 * error + 2.0 * (1 - second) * expected
    assert abs(per_step - f) > 20.0 * error


def test_heavy_tails_are_refused() -> None:
    with pytest.raises(ArgumentError, match="heavy tails"):
        adam_variance((0.9, 0.95), kurtosis=12.0)


def test_moving_average_of_the_weights() -> None:
    eta, lam, alpha = 0.1, 0.05, 0.9
    inner = with_optimizer(sgd(weight_decay=lam), lr=np.full(300, eta))
    average: Any = None

    def step(x: Tensor, g: Tensor) -> None:
        nonlocal average
        inner(x, g)
        average = x.clone() if average is None else alpha * average + (1 - alpha) * x
        step.ratio = average.square().sum(1) / x.square().sum(1)  # type: ignore[attr-defined]

    simulate(step, 300, norm=1.0)
    ratio = step.ratio  # type: ignore[attr-defined]
    error = float(ratio.std()) / math.sqrt(PATHS)
    assert abs(float(ratio.mean()) - average_norm(eta, lam, alpha)) < 4.0 * error + 1e-3
    with pytest.raises(ArgumentError, match="have turned"):
        average_norm(eta, lam, 0.99)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="number of steps is missing"):
        expected_clock(0.1)
    with pytest.raises(ArgumentError, match="not one of its choices"):
        expected_clock(0.1, 9, optimizer="adagrad")
    with pytest.raises(ArgumentError, match="number of coordinates"):
        expected_clock(0.1, 9, optimizer="adamw")
    with pytest.raises(ArgumentError, match="momentum ends before"):
        expected_clock(0.1, 9, momentum=[0.9] * 8)
    with pytest.raises(ArgumentError, match="size of the gradient"):
        expected_clock(0.1, 9, optimizer="lion", size=9, clip=1.0)
    with pytest.raises(ArgumentError, match="shape of the matrix"):
        expected_clock(0.1, 9, optimizer="muon", size=9)
    with pytest.raises(ArgumentError, match="is a schedule"):
        expected_clock(0.1, 2, optimizer="signum", momentum=[0.8, 0.9], size=9)
