"""Broken parts that are put in place of the right ones, to see the checks reject them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde import (
    CustomNoise,
    FixedRatioDiffusion,
    LimitingDiffusion,
    Problem,
    TimeScale,
    problems,
)
from manifold_sde.equations import StochasticEquation
from manifold_sde.noise import Noise
from manifold_sde.solvers import run_sgd, sgd_step, solve
from manifold_sde.verification import Effort, Result, Subject
from manifold_sde.verification.check import Check
from tests import drift_terms

#: Cheap runs that find a clock off by a fourth.
SMALL = Effort("small", points=8, departure=0.25, runs=1024, steps=256, step_size=0.05)
#: Runs that go far enough for the drift to show: larger steps and more of them.
FAR = Effort("far", points=8, departure=0.25, runs=4096, steps=768, step_size=0.05)
#: Noise that moves far in few steps: the drift of the limit shows.
CIRCLE = problems.varying_circle(noise_scale=1.0)


def correlated(x: Tensor) -> Tensor:
    """Noise along the circles x_3 = const and across them at once: one column (3, 1)."""
    u = x / x.norm()
    along = torch.stack([-u[1], u[0], torch.zeros_like(u[0])]) / u[:2].norm()
    return 0.35 * (along + torch.linalg.cross(u, along))[:, None] / x.norm()


CORRELATED = problems.mixed_noise_circle(noise=CustomNoise(correlated))


def found(check: Check, subject: Subject, effort: Effort = SMALL) -> Result:
    """The result of a check that bears its name, or its last one."""
    results = check(subject, effort)
    return next((r for r in results if r.name == check.name), results[-1])


def verdict(check: Check, subject: Subject, effort: Effort = SMALL) -> str:
    return found(check, subject, effort).verdict


# SGD.


def other_rates(lr: float = 1.0, decay: float = 1.0) -> Callable[..., Any]:
    """SGD at rates multiplied by factors."""

    def run(problem: Problem, x0: Tensor, eta: Any, weight_decay: Any, *a: Any, **k: Any) -> Any:
        return run_sgd(problem, x0, lr * eta, decay * weight_decay, *a, **k)

    return run


def faster_with_decay(
    problem: Problem, x0: Tensor, lr: float, decay: float, *arguments: Any, **options: Any
) -> Any:
    """SGD whose learning rate is larger by a fifth where there is weight decay."""
    return run_sgd(problem, x0, lr * (1.2 if decay else 1.0), decay, *arguments, **options)


def other_problem(other: Problem) -> Callable[..., Any]:
    """SGD on another problem."""

    def run(problem: Problem, *arguments: Any, **options: Any) -> Any:
        return run_sgd(other, *arguments, **options)

    return run


def repeating(*, every: int | None = None, runs: int | None = None) -> Callable[..., Any]:
    """SGD whose random numbers come again after some steps, or in other runs."""
    numbers = Noise.numbers

    def again(noise: Noise, loss: Any, key: Any, paths: Tensor, steps: Tensor, dtype: Any) -> Any:
        steps = steps if every is None else steps % every
        paths = paths if runs is None else paths % runs
        return numbers(noise, loss, key, paths, steps, dtype)

    def run(*arguments: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Noise, "numbers", again)
            patch.setattr(sgd_step, "c_step", lambda *_: None)  # which draws in C
            return run_sgd(*arguments, **options)

    return run


# The time scale.


class WrongRadius(TimeScale):
    """R as the square root of what (11) takes the fourth root of."""

    def radius(self, t: Any) -> Any:
        return super().radius(t) ** 2


class WrongTau(TimeScale):
    """(12) without its factor one half."""

    def tau(self, t: Any) -> Any:
        return 2.0 * super().tau(t)

    def tau_inverse(self, T: Any) -> Any:
        return super().tau_inverse(np.asarray(T) / 2.0)

    def steps(self, T: Any, **options: Any) -> Any:
        return super().steps(np.asarray(T) / 2.0, **options)


class WithoutWeightDecay(TimeScale):
    """Steps as if there were no weight decay."""

    def steps(self, T: Any, **options: Any) -> Any:
        return TimeScale(float(self.lr), 0.0).steps(T, **options)  # type: ignore[arg-type]


# Diffusions.


def at(problem: Problem, angle: float) -> Tensor:
    """A point of a problem's circle."""
    return problem.facts.circle.point(torch.tensor(angle, dtype=torch.float64))


def mixed_term(y: Tensor) -> Tensor:
    return drift_terms.mixed_term(CORRELATED, y)


def third_term(y: Tensor) -> Tensor:
    return drift_terms.third_term(CORRELATED, y)


def sigma_term(y: Tensor) -> Tensor:
    return drift_terms.sigma_term(CORRELATED, y)


def with_drift(fault: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """The solver for (8) and (13) with something added to the drift at unit vectors (D,)."""

    def added(x: Tensor) -> Tensor:
        r = x.norm(dim=0)
        return vmap(fault, 1, 1)(x / r) / r**3

    class Broken(FixedRatioDiffusion):
        def drift(self, x: Tensor, basis: Tensor) -> Tensor:
            return super().drift(x, basis) + added(x)

        def drift_and_noise(self, x: Tensor, basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            drift, noise = super().drift_and_noise(x, basis, w)
            return drift + added(x), noise

    def broken(sde: StochasticEquation, *arguments: Any, **options: Any) -> Any:
        if isinstance(sde, FixedRatioDiffusion):
            sde = Broken(sde.problem, sde.ratio, sde.calculus)
        return solve(sde, *arguments, **options)

    return broken


def on(other: Problem) -> Callable[..., Any]:
    """The solver for (8) and (13) on another problem."""

    def broken(sde: StochasticEquation, *arguments: Any, **options: Any) -> Any:
        if isinstance(sde, LimitingDiffusion):
            sde = LimitingDiffusion(other, sde.calculus)
        elif isinstance(sde, FixedRatioDiffusion):
            sde = FixedRatioDiffusion(other, sde.ratio, sde.calculus)
        return solve(sde, *arguments, **options)

    return broken


def square_time_change(
    sde: StochasticEquation, y0: Tensor, ts: Any, dt: float, **options: Any
) -> Any:
    """(8) with weight decay as (8) without it at (e^{2Ct} - 1) / 2C."""
    if type(sde) is not FixedRatioDiffusion or sde.ratio == 0.0:
        return solve(sde, y0, ts, dt=dt, **options)
    c = sde.ratio
    changed = [math.expm1(2 * c * t) / (2 * c) for t in ts]
    free = solve(
        FixedRatioDiffusion(sde.problem, 0.0, sde.calculus),
        y0,
        changed,
        dt=dt * changed[-1] / ts[-1],
        **options,
    )
    factors = torch.tensor([math.exp(-c * t) for t in ts], dtype=free.ys.dtype)
    return replace(free, ys=free.ys * factors[:, None, None])
