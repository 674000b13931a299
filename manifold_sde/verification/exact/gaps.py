"""The relaxation time of the direction by a road of its own: its generator, without a run."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manifold_sde import rng
from manifold_sde.arguments import check_choice, check_count
from manifold_sde.errors import ArgumentError, LostPathsWarning
from manifold_sde.number_arrays import check_number
from manifold_sde.problem import Problem, require_problem
from manifold_sde.sdes import DirectionDiffusion
from manifold_sde.solvers import solve
from manifold_sde.verification.exact.angle_law import AngleLaw
from manifold_sde.verification.exact.applicable import curve_of
from manifold_sde.verification.exact.circle_diffusion import CircleDiffusion
from manifold_sde.verification.exact.facts import chart_of, minimizer_or
from manifold_sde.verification.exact.spectral import Array
from manifold_sde.verification.exact.sphere_law import SphereLaw

#: Most functions of a basis, and points for each of them.
_MOST_FUNCTIONS, _POINTS_EACH = 320, 8
#: Coordinates of the points that are kept, and their smallest spread over the largest.
_MOST_COORDINATES, _FLAT = 8, 1e-6
#: A function with a larger residual is no eigenfunction.
_RESIDUAL = 0.5
#: Steps of the walk that finds the points, in a relaxation time of a sphere.
_STEPS = 20
_LONGEST_WALK = 4
#: Powers of the norm beside the functions of the direction.
_NORM_POWERS = (0, 1, -1, 2, -2, 3)
_CONSTANT = 1e-9


@dataclass(frozen=True)
class SpectralGap:
    """The slowest rates at which expectations relax, with their errors.

    Attributes:
        rate: Of the direction, per unit of the clock u.
        error: Its numerical error: what coarser solutions change, in sum.
        rate_in_time: Of direction and norm, per unit of the time of (8) at the ratio, or of T.
        error_in_time: Its error.
        ratio: The ratio C of (8); 1/2 is (13).
        method: "known", "fourier" or "galerkin".
        functions: Number of basis functions, 0 where the rate is known in closed form.
    """

    rate: float
    error: float
    rate_in_time: float
    error_in_time: float
    ratio: float
    method: str
    functions: int

    @property
    def relaxation_time(self) -> float:
        """1 / rate, in the clock u."""
        return 1.0 / self.rate

    @property
    def relaxation_time_in_time(self) -> float:
        """1 / rate_in_time."""
        return 1.0 / self.rate_in_time

    def steps(self, lr: float, weight_decay: float) -> float:
        r"""Steps of SGD that make one relaxation time of direction and norm.

        Steps per unit of T of (13) are :math:`1 / (2 \eta\lambda)`, and the rate in the time of (8)
        is proportional to the ratio.

        Args:
            lr: Learning rate eta, of SGD without momentum.
            weight_decay: Weight decay lambda.
        """
        eta = check_number("lr", lr, "lr=0.02, a constant one", least=1e-300)
        decay = check_number("weight_decay", weight_decay, "weight_decay=0.05", least=1e-300)
        return self.ratio * self.relaxation_time_in_time / (eta * decay)


def spectral_gap(
    problem: Problem,
    start: Tensor | None = None,
    *,
    ratio: float = 0.5,
    method: str = "auto",
    points: int = 2000,
    seed: int = 0,
) -> SpectralGap:
    r"""Compute the relaxation rate of the direction, in the clock u and in time.

    ==================================================  ===========================================
    Gamma_1                                             How
    ==================================================  ===========================================
    circle or sphere, noise (18), pdet H constant       closed form
    any other closed curve                              Fokker-Planck equation, by Fourier
                                                        collocation
    of more dimensions                                  Galerkin's method for the generator, with
                                                        polynomials, at points of a walk on Gamma_1
    ==================================================  ===========================================

    In time the pair of direction and q = ||Y||^4 has the generator
    :math:`q^{-1} \mathcal G + (-4cq + 2V)\partial_q`, whose own slowest rate is that of the
    equilibrium of Theorem 5.4: time weights the clock by ||Y||^4. Per step of SGD it is
    ``rate_in_time`` at the ratio lambda / eta, times eta^2.

    Galerkin's method finds the smooth slow functions. It sees what the points have visited: a part
    of Gamma_1 behind a narrow passage is not seen, and its rate is then too large.

    Args:
        problem: The problem.
        start: A point of the manifold (D,); by default the minimiser that the problem knows, or
            that gradient flow finds from random directions.
        ratio: The ratio C of (8); 1/2 is (13).
        method: "auto", or "galerkin" where another would do, to compare.
        points: Number of points for Galerkin's method.
        seed: Seed of the walk, and of those directions.

    Returns:
        The rates, with errors.

    Raises:
        ArgumentError: If an argument is out of range, the noise does not move the direction, or no
            slow function is found.
        NotOnManifoldError, NoiseError, LimitMapError: As ``CircleDiffusion.of``.

    Example:
        >>> from manifold_sde import problems
        >>> spectral_gap(problems.great_sphere()).rate  # l (l + d - 1) s^2 / 2 at l = 1, d = 2
        0.09
    """
    require_problem(problem)
    c = check_number("ratio", ratio, "(8) has C >= 0, and (13) is C = 1/2")
    if c == 0.0:
        raise ArgumentError(
            "without weight decay nothing relaxes in time",
            received="ratio=0",
            expected="a positive ratio",
            remedy="ratio=0.5; the rate in the clock is the same for each",
        )
    check_choice("method", method, ("auto", "galerkin"), 'method="auto"')
    points = check_count("points", points, "points", "points=2000", least=200)
    rng.seed_key(seed)
    y = minimizer_or(problem, start, int(seed))
    closed = _closed(problem, y) if method == "auto" else None
    if closed is not None:
        rate, trace = closed
        return SpectralGap(rate, 0.0, min(2.0 * c * rate / trace, 4.0 * c), 0.0, c, "known", 0)
    if method == "auto" and _is_curve(problem, y):
        coarse, fine = _curve_laws(problem, y)
        rates = [(law.spectral_gap, law.spectral_gap_in_time(c)) for law in (coarse, fine)]
        errors = [abs(a - b) for a, b in zip(*rates, strict=True)]
        return SpectralGap(rates[1][0], errors[0], rates[1][1], errors[1], c, "fourier", 129)
    return _galerkin(problem, y / y.norm(), c, points, seed)


def _closed(problem: Problem, y: Tensor) -> tuple[float, float] | None:
    """Rate in the clock, and V, of the laws in closed form."""
    with contextlib.suppress(ArgumentError):
        angle = AngleLaw.of(problem, y)
        return 0.5 * (angle.noise_scale / angle.radius) ** 2, angle.noise_trace
    with contextlib.suppress(ArgumentError):
        sphere = SphereLaw.of(problem, y)
        return sphere.rate(1), sphere.noise_trace
    return None


def _is_curve(problem: Problem, y: Tensor) -> bool:
    values = np.linalg.eigvalsh(problem.hessian(y.detach().to(torch.float64)).numpy())
    return int((np.abs(values) < 1e-6 * np.abs(values).max()).sum()) == 2


def _curve_laws(problem: Problem, y: Tensor) -> list[CircleDiffusion]:
    chart = chart_of(curve_of(problem, y))
    return [CircleDiffusion.of(problem, chart, nodes=nodes) for nodes in (65, 129)]


# Galerkin's method.


def _galerkin(problem: Problem, y: Tensor, c: float, points: int, seed: int) -> SpectralGap:
    """The slowest rates on polynomials, at the points of a walk that is long beside them."""
    sde = DirectionDiffusion(problem)
    noise = sde.g(torch.zeros(()), y[None])[0]
    spread = float(noise.square().sum())
    if not spread > 1e-12 * float(problem.noise_trace(y)):
        raise ArgumentError(
            "the noise does not move the direction along the manifold",
            received=f"a tangential variance of {spread:.2g}",
            expected="a diffusion: noise with a tangential part (Assumption 5.2)",
            remedy="for label noise and at interpolation the limit is a flow, or stands still",
        )
    # Of a sphere with this noise: the first walk takes four of its relaxation times.
    relaxed = 2.0 / spread
    for _ in range(_LONGEST_WALK):
        walk = _Walk.of(sde, y, relaxed, points, seed)
        bases = [walk.monomials(degree) for degree in range(1, 10)]
        fitting = [e for e in bases if len(e) <= min(_MOST_FUNCTIONS, points // _POINTS_EACH)]
        rate, error = _converged(walk.in_clock, fitting, points)
        if 1.0 / rate <= 1.5 * relaxed:
            break
        relaxed = 1.0 / rate
    trace = walk.trace
    if float(np.ptp(trace)) <= _CONSTANT * float(trace.max()):
        factor = 2.0 * c / float(trace.mean())
        in_time, error_in_time = min(factor * rate, 4.0 * c), factor * error
        return SpectralGap(rate, error, in_time, error_in_time, c, "galerkin", len(fitting[-1]))
    middle = 0.5 * float(trace.max() + trace.min())
    few = 2 * points // (_POINTS_EACH * len(_NORM_POWERS))
    smaller = [e for e in fitting if len(e) <= few] or fitting[:1]
    slow, error_in_time = _converged(walk.in_time, smaller, points)
    other = _slowest(*walk.in_time(smaller[-1], _NORM_POWERS[:-2]))
    error_in_time += math.inf if other is None else abs(other - slow)
    factor = 2.0 * c / middle
    in_time = min(factor * slow, 4.0 * c)
    return SpectralGap(
        rate, error, in_time, factor * error_in_time, c, "galerkin", len(fitting[-1])
    )


@dataclass(frozen=True, eq=False)
class _Walk:
    """Points of the manifold with what the generator needs there.

    Attributes:
        z: Coordinates (N, d): principal components of the points.
        drift: Their drift (N, d).
        covariance: Their covariance (N, d, d).
        trace: V (N,).
    """

    z: Array
    drift: Array
    covariance: Array
    trace: Array

    @classmethod
    def of(
        cls, sde: DirectionDiffusion, y: Tensor, relaxed: float, points: int, seed: int
    ) -> _Walk:
        """Walk from one point, and keep the last quarter of the way."""
        ends = 4.0 * relaxed * torch.tensor([0.0, 0.75, 0.85, 0.95, 1.0], dtype=torch.float64)
        paths = -(-points // 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LostPathsWarning)  # of the points no law is asked
            run = solve(
                sde,
                y,
                ends,
                n_paths=paths,
                dt=relaxed / _STEPS,
                seed=seed,
                method="walk",
                compile=False,
            )
        places = run.ys[1:].reshape(-1, len(y))
        places = places[torch.isfinite(places).all(1)][:points]
        zero = torch.zeros((), dtype=torch.float64)
        drift, factor = sde.f(zero, places).numpy(), sde.g(zero, places).numpy()
        trace = sde.problem.noise_trace(places).numpy()
        around = places.numpy() - places.numpy().mean(0)
        _, sizes, axes = np.linalg.svd(around, full_matrices=False)
        kept = axes[:_MOST_COORDINATES][sizes[:_MOST_COORDINATES] > _FLAT * sizes[0]]
        kept = kept * (math.sqrt(len(places)) / sizes[: len(kept), None])
        along = np.einsum("kd,ndm->nkm", kept, factor)
        return cls(around @ kept.T, drift @ kept.T, along @ along.transpose(0, 2, 1), trace)

    def monomials(self, degree: int) -> Array:
        """Exponents (n, d) of the monomials up to a degree."""
        d = self.z.shape[1]
        if math.comb(d + degree, degree) > 4 * _MOST_FUNCTIONS:
            return np.zeros((4 * _MOST_FUNCTIONS, d), dtype=int)  # too many to be used
        chosen = itertools.product(range(degree + 1), repeat=d)
        return np.array([e for e in chosen if sum(e) <= degree], dtype=int)

    def in_clock(self, exponents: Array) -> tuple[Array, Array]:
        """Values and their generator in the clock, (N, n) each."""
        d = self.z.shape[1]
        powers = self.z[:, :, None] ** np.arange(int(exponents.max()) + 1)

        def derived(*by: int) -> Array:
            left, factor = exponents.copy(), np.ones(len(exponents))
            for i in by:
                factor = factor * left[:, i]
                left[:, i] = np.maximum(left[:, i] - 1, 0)
            value = np.prod([powers[:, i, left[:, i]] for i in range(d)], axis=0)
            return np.asarray(factor * value)

        moved = np.zeros((len(self.z), len(exponents)))
        for i in range(d):
            moved += self.drift[:, i, None] * derived(i)
            for j in range(i + 1):
                share = 0.5 if i == j else 1.0
                moved += share * self.covariance[:, i, j, None] * derived(i, j)
        return derived(), moved

    def in_time(
        self, exponents: Array, powers: tuple[int, ...] = _NORM_POWERS
    ) -> tuple[Array, Array]:
        """The same with the norm: z^-1 G + 2 (V - V_m z) d/dz, for z between the extremes of V."""
        values, moved = self.in_clock(exponents)
        middle = 0.5 * float(self.trace.max() + self.trace.min())
        half = 0.5 * float(np.ptp(self.trace)) / middle
        # Places of z that have nothing to do with those of the direction: a golden sequence.
        z = 1.0 + half * (2.0 * ((np.arange(len(self.z)) * 0.6180339887498949) % 1.0) - 1.0)
        speed = 2.0 * (self.trace - middle * z)
        functions, generated = [], []
        for power in powers:
            functions.append(values * (z**power)[:, None])
            turned = moved * (z ** (power - 1))[:, None]
            generated.append(turned + values * (power * speed * z ** (power - 1.0))[:, None])
        return np.hstack(functions), np.hstack(generated)


def _converged(
    generator: Callable[[Array], tuple[Array, Array]], bases: list[Array], points: int
) -> tuple[float, float]:
    """The slowest rate on the largest basis, and how much a smaller one and half points change.

    Raises:
        ArgumentError: If there is no slow function.
    """
    values, moved = generator(bases[-1])
    rate = _slowest(values, moved)
    fewer = _slowest(*generator(bases[-2])) if len(bases) > 1 else None
    halves = [_slowest(values[i::2], moved[i::2]) for i in (0, 1)]
    if rate is None:
        raise ArgumentError(
            "no slow function of the direction was found",
            received=f"{values.shape[1]} functions at {len(values)} points, none nearly an "
            "eigenfunction",
            expected="smooth slow functions, which polynomials approximate",
            remedy=f"points={4 * points}",
        )
    others = [other for other in (fewer, *halves) if other is not None]
    return rate, sum(abs(other - rate) for other in others) if others else math.inf


def _slowest(values: Array, moved: Array) -> float | None:
    """The smallest rate of a function that the generator nearly multiplies, but for constants.

    Functions are orthonormal at the points; of a pair of complex rates the real part is meant.
    """
    u, sizes, right = np.linalg.svd(values / math.sqrt(len(values)), full_matrices=False)
    kept = sizes > 1e-7 * sizes[0]
    basis = u[:, kept]
    image = (moved / math.sqrt(len(values))) @ (right[kept].T / sizes[kept])
    rates, vectors = np.linalg.eig(basis.T @ image)
    functions = image @ vectors - (basis @ vectors) * rates
    residual = np.linalg.norm(functions, axis=0) / np.maximum(np.abs(rates), 1e-300)
    size = float(np.abs(rates).max())
    good = (residual < _RESIDUAL) & (rates.real < 0) & (np.abs(rates) > 1e-9 * size)
    return float((-rates.real[good]).min()) if good.any() else None
