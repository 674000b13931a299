"""Broken parts to put in the place of the toolkit's, for the properties to reject."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde import Geometry, LimitingDiffusion, Problem, TimeScale, problems
from manifold_sde.solvers import run_sgd
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.properties import CHECKS
from manifold_sde.verification.result import Result
from manifold_sde.verification.subject import Subject

SMALL = Effort("small", points=8, departure=0.25)


def check(name: str, subject: Subject, effort: Effort = SMALL) -> Result:
    """The result of the check of a name."""
    found = next(check for check in CHECKS if check.name == name)
    (result,) = found(subject, effort)
    return result


@lru_cache
def base(name: str) -> Subject:
    """The subject of one of ``problems``, whose walk over the manifold is made once."""
    problem = getattr(problems, name)()
    if name == "normalized_linear":
        problem = problems.normalized_linear(design="orthogonal")
    subject = Subject.of(problem)
    assert len(subject.walks)
    return subject


def on(name: str, **changed: Any) -> Subject:
    """That subject with broken parts, at the same points."""
    subject = base(name)
    twin = replace(subject, **changed)
    twin.__dict__.update(start=subject.start, walks=subject.walks)
    return twin


def with_geometry(name: str, twin: type[Geometry]) -> Subject:
    return on(name, geometry=twin(base(name).problem))


# Limit maps.


class NearestPoint(Geometry):
    """The nearest point of the cone x_3 = 0 at the same norm, in the place of Phi."""

    def limit_map(self, x: Tensor) -> Tensor:
        flat = torch.cat([x[..., :2], torch.zeros_like(x[..., 2:])], -1)
        return flat * (x.norm(dim=-1, keepdim=True) / flat.norm(dim=-1, keepdim=True))


class ShorterNearestPoint(Geometry):
    """The nearest point itself, which is shorter."""

    def limit_map(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., :2], torch.zeros_like(x[..., 2:])], -1)


class AbsoluteTolerance(Geometry):
    """A flow that stops where the gradient is below 1e-6: at large norms it never starts."""

    def limit_map(self, x: Tensor) -> Tensor:
        at_rest = self.problem.gradient(x).norm(dim=-1, keepdim=True) < 1e-6
        return torch.where(at_rest, x, super().limit_map(x))


class StoppedEarly(Geometry):
    """A flow that ends a thousandth of the way before the manifold."""

    def limit_map(self, x: Tensor) -> Tensor:
        y = super().limit_map(x) + 1e-3 * (x - super().limit_map(x))
        return y * (x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True))


class DriftingPoints(Geometry):
    """A limit map that turns every point by 1e-6 about the third axis."""

    def limit_map(self, x: Tensor) -> Tensor:
        y = super().limit_map(x)
        turned = torch.stack([-y[..., 1], y[..., 0], torch.zeros_like(y[..., 0])], -1)
        return y + 1e-6 * turned


# Projectors.


class ObliqueProjector(Geometry):
    """A projector on the tangent space along a direction that is not normal."""

    def tangent_projection(self, y: Tensor, v: Tensor) -> Tensor:
        tangent = super().tangent_projection(y, v)
        normal = v - tangent
        slant = super().tangent_projection(y, torch.ones_like(v))
        return tangent + 1e-3 * slant * normal.sum(-1, keepdim=True)


class RankTooSmall(Geometry):
    """The rank of the Hessian less one: the flattest normal direction counts as tangent."""

    def rank(self, y: Tensor) -> Tensor:
        return super().rank(y) - 1


class TangentTooLarge(Geometry):
    """A tangent projection that leaves the flattest normal direction."""

    def tangent_projection(self, y: Tensor, v: Tensor) -> Tensor:
        basis = torch.linalg.eigh(self.problem.hessian(y))[1]
        kept = basis[..., : y.shape[-1] - int(self.rank(y).max()) + 1]
        return (kept @ (kept.mT @ v[..., None]))[..., 0]


# Second derivatives.


def second_derivative_twin(change: Callable[[Geometry, Tensor, Tensor], Tensor]) -> type[Geometry]:
    """A geometry whose second derivative is another function of (geometry, y, Sigma)."""

    class Twin(Geometry):
        def second_derivative(
            self, y: Tensor, covariance: Tensor | None = None, *, factor: Tensor | None = None
        ) -> Tensor:
            if factor is not None:
                covariance = factor @ factor.mT
            sigma = self.problem.noise_covariance(y) if covariance is None else covariance
            return change(self, y, sigma)

    return Twin


def right(geometry: Geometry, y: Tensor, sigma: Tensor) -> Tensor:
    return Geometry.second_derivative(geometry, y, sigma)


def parts(geometry: Geometry, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P Sigma P, the mixed part, and N Sigma N."""
    eye = torch.eye(y.shape[-1], dtype=y.dtype).expand(*y.shape, y.shape[-1])
    p = Geometry.tangent_projection(geometry, y[..., None, :].expand_as(eye), eye)
    n = eye - p
    return p @ sigma @ p, p @ sigma @ n + n @ sigma @ p, n @ sigma @ n


SECOND_DERIVATIVES: dict[str, Callable[[Geometry, Tensor, Tensor], Tensor]] = {
    "dropped": lambda g, y, s: torch.zeros_like(right(g, y, s)),
    "halved": lambda g, y, s: 0.5 * right(g, y, s),
    "of the wrong sign": lambda g, y, s: -right(g, y, s),
    "without its first term": lambda g, y, s: right(g, y, s - parts(g, y, s)[0]),
    "without its mixed term": lambda g, y, s: right(g, y, s - parts(g, y, s)[1]),
    "with the mixed term once": lambda g, y, s: right(g, y, s - 0.5 * parts(g, y, s)[1]),
    "without its third term": lambda g, y, s: right(g, y, s - parts(g, y, s)[2]),
    "of degree 0": lambda g, y, s: right(g, y, s) * y.norm(dim=-1, keepdim=True),
}


# Problems.


class WrongHessian(Problem):
    """A Hessian of degree -1.99."""

    def hessian(self, x: Tensor) -> Tensor:
        return super().hessian(x) * (x.norm(dim=-1) ** 0.01)[..., None, None]


class WrongGradient(Problem):
    """A gradient of degree -0.99."""

    def gradient(self, x: Tensor) -> Tensor:
        return super().gradient(x) * x.norm(dim=-1, keepdim=True) ** 0.01


class WrongThirdDerivative(Problem):
    """A third derivative of degree -2.99."""

    def third_derivative(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return super().third_derivative(x, a, b) * x.norm(dim=-1, keepdim=True) ** 0.01


def as_class(problem: Problem, twin: type[Problem]) -> Problem:
    other = copy.copy(problem)
    other.__class__ = type(twin.__name__, (twin, type(problem)), {})
    return other


# Equations.


class OtherRatio(LimitingDiffusion):
    """(13) with 0.475 in the place of 1/2."""

    def __init__(self, problem: Problem, calculus: str = "ito") -> None:
        super().__init__(problem, calculus)
        self.ratio = 0.475


class UncorrectedCalculus(LimitingDiffusion):
    """(13) with the Stratonovich drift where Ito's is asked for."""

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return LimitingDiffusion(self.problem, "stratonovich").f(t, y)


class NormalDrift(LimitingDiffusion):
    """A Stratonovich drift that leaves the manifold slowly."""

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        drift = super().f(t, y)
        if self.calculus == "ito":
            return drift
        return drift + 1e-3 * self.problem.gradient(y + 0.1 * y.roll(1, dims=-1))


class TangentDrift(LimitingDiffusion):
    """A Stratonovich drift with a little rotation, as where a derivative of sigma is left out."""

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        drift = super().f(t, y)
        if self.calculus == "ito":
            return drift
        return drift + 1e-3 * torch.stack([-y[:, 1], y[:, 0], torch.zeros_like(y[:, 0])], 1)


# SGD and time scales.


def sgd_with(lr: float = 1.0, weight_decay: float = 1.0, **fixed: Any) -> Callable[..., Any]:
    """SGD whose rates are off by factors, or that ignores what it is given."""

    def scaled(rate: Any, factor: float) -> Any:
        return [factor * r for r in rate] if isinstance(rate, list) else factor * rate

    def run(problem: Problem, x0: Tensor, eta: Any, decay: Any, steps: Any, **options: Any) -> Any:
        rates = scaled(eta, lr), scaled(decay, weight_decay)
        return run_sgd(problem, x0, *rates, steps, **{**options, **fixed})

    return run


def coupled_decay(problem: Problem, x0: Tensor, eta: Any, decay: Any, steps: Any, **o: Any) -> Any:
    """Weight decay lambda x in place of eta lambda x."""
    if isinstance(eta, list):
        decays = decay if isinstance(decay, list) else [decay] * len(eta)
        decay = [d * 0.03 / e for d, e in zip(decays, eta, strict=True)]
    else:
        decay = decay * 0.03 / eta
    return run_sgd(problem, x0, eta, decay, steps, **o)


class TwoForFour(TimeScale):
    """Tau with e^{2 eta lambda t} in the place of e^{4 eta lambda t}."""

    def tau(self, t: Any) -> Any:
        return super().tau(np.asarray(t) / 2)


class RadiusWithoutStart(TimeScale):
    """R^4 = eta / (2 lambda) + e^{-4 eta lambda t}, without the 1 - eta / (2 lambda)."""

    def radius(self, t: Any) -> Any:
        eta, decay = float(self.lr), float(self.weight_decay)
        return (eta / (2 * decay) + np.exp(-4 * eta * decay * np.asarray(t))) ** 0.25


class RadiusSquareRoot(TimeScale):
    """R^2 in the place of R."""

    def radius(self, t: Any) -> Any:
        return super().radius(t) ** 2


class InverseWithoutTwo(TimeScale):
    """Tau^{-1} with lambda / eta in the place of 2 lambda / eta."""

    def tau_inverse(self, T: Any) -> Any:
        eta, decay = float(self.lr), float(self.weight_decay)
        return np.log1p(np.expm1(2 * np.asarray(T)) * decay / eta) / (4 * eta * decay)


class StepsRoundedUp(TimeScale):
    """The first step after T in the place of the last one before it."""

    def steps(self, T: Any, **options: Any) -> Any:
        return super().steps(T, **options) + 1


class WrongPowers(TimeScale):
    """Remark 4.2 with C in the place of its roots."""

    def rescaled(self, C: float) -> Any:
        return TimeScale(float(self.lr) / C, float(self.weight_decay) * C), C**-0.5


class WrongEffectiveRates(TimeScale):
    """Effective rates eta_k / a_k^2."""

    def effective_lr(self, k: Any) -> Any:
        steps = np.asarray(k)
        return super().effective_lr(k) * self.shrinkage(steps + 1) / self.shrinkage(steps)


def wrong_decay(lr: Any, weight_decay: Any) -> TimeScale:
    """A time scale whose weight decay is off by 5 %."""
    decays = weight_decay
    return TimeScale(lr, [1.05 * d for d in decays] if isinstance(decays, list) else 1.05 * decays)
