"""The reference set: its exact laws by a second method, and solvers that it passes and refuses.

The second method knows the diffusion by its drift and noise, from derivatives, and no differences
of gradient flow; it solves the backward equation by finite differences, and no Fourier series.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.linalg import expm_multiply
from torch import Tensor
from torch.func import vmap

from manifold_sde import DirectionDiffusion, LimitingDiffusion
from manifold_sde.errors import ArgumentError
from manifold_sde.solvers import solve
from manifold_sde.verification import Reference
from manifold_sde.verification.reference import TIMES, Comparison
from tests import drift_terms

CIRCLES = ("great_circle", "varying_circle", "normalized_linear", "mixed_noise_circle")
#: Nodes of the angle and of the norm, and what the moments then agree to.
ANGLES, NORMS, AGREE = 48, 24, 1e-5


@functools.cache
def entry(name: str) -> Reference:
    return Reference.of(name)


# The second method.


def coefficients(name: str, angles: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drift and variance of the angle in the clock u, and V, from the equation's coefficients."""
    problem = entry(name).problem
    circle = problem.facts.circle
    a = torch.from_numpy(angles)
    y = circle.point(a)
    wave = torch.stack([-a.sin(), a.cos()], dim=1) @ circle.basis
    sde, time = DirectionDiffusion(problem), torch.zeros((), dtype=torch.float64)
    drift = (sde.f(time, y) * wave).sum(1) / circle.radius
    along = torch.einsum("nd,ndm->nm", wave, sde.g(time, y)) / circle.radius
    found = (drift, along.square().sum(1), problem.noise_trace(y))
    return tuple(t.numpy() for t in found)  # type: ignore[return-value]


def around(n: int) -> tuple[Any, Any]:
    """First and second differences of sixth order on a circle of n angles."""
    h = 2.0 * math.pi / n
    first = {1: 45, 2: -9, 3: 1}
    second = {0: -490, 1: 270, 2: -27, 3: 2}

    def matrix(weights: dict[int, float]) -> Any:
        rows = np.arange(n)
        parts = [(rows, (rows + k) % n, np.full(n, w)) for k, w in weights.items()]
        i, j, v = (np.concatenate(part) for part in zip(*parts, strict=True))
        return scipy.sparse.csr_array((v, (i, j)), shape=(n, n))

    odd = matrix({k: w for j, v in first.items() for k, w in ((j, v), (-j, -v))}) / (60.0 * h)
    even = matrix({k: w for j, v in second.items() for k, w in ((j, v), (-j, v))})
    even = even + matrix({0: -490.0 - even[[0], [0]][0]})
    return odd, even / (180.0 * h * h)


def along(n: int, h: float) -> Any:
    """First differences of fourth order on an interval of n points."""
    matrix = scipy.sparse.lil_array((n, n))
    inner = np.array([1.0, -8.0, 0.0, 8.0, -1.0])
    ends = np.array([[-25.0, 48.0, -36.0, 16.0, -3.0], [-3.0, -10.0, 18.0, -6.0, 1.0]])
    for i in range(n):
        begin = min(max(i - 2, 0), n - 5)
        place = i - begin
        row = inner if place == 2 else ends[place] if place < 2 else -ends[4 - place][::-1]
        matrix[i, begin : begin + 5] = row / (12.0 * h)
    return matrix.tocsr()


@functools.cache
def second_method(name: str) -> dict[str, np.ndarray]:
    """Means at the times: of functions of the angle and q = |Y|^4, from (0, 1)."""
    angles = 2.0 * math.pi * np.arange(ANGLES) / ANGLES
    drift, variance, trace = coefficients(name, angles)
    odd, even = around(ANGLES)
    generator = (
        scipy.sparse.diags_array(drift) @ odd + scipy.sparse.diags_array(0.5 * variance) @ even
    )
    # q' = -2 q + 2 V stays between the extremes of V and 1, in which the grid is one of log q.
    low, high = math.log(trace.min()), max(0.0, math.log(trace.max()))
    w = np.linspace(low, high, NORMS)
    q = np.exp(w)
    speed = (-2.0 * q + 2.0 * trace[:, None]) / q
    whole = scipy.sparse.kron(generator, scipy.sparse.diags_array(1.0 / q))
    whole = whole + scipy.sparse.diags_array(speed.ravel()) @ scipy.sparse.kron(
        scipy.sparse.eye_array(ANGLES), along(NORMS, w[1] - w[0])
    )
    norm = q**0.25
    ones = np.ones((ANGLES, NORMS))
    functions = {
        "cos(angle)": np.cos(angles)[:, None] * ones,
        "sin(angle)": np.sin(angles)[:, None] * ones,
        "cos(2 angle)": np.cos(2 * angles)[:, None] * ones,
        "sin(2 angle)": np.sin(2 * angles)[:, None] * ones,
        "norm": norm * ones,
        "norm cos(angle)": np.cos(angles)[:, None] * norm,
    }
    values = np.stack([f.ravel() for f in functions.values()], 1)
    found = expm_multiply(whole.tocsr(), values, 0.0, TIMES[-1], 1 + round(TIMES[-1] / 0.5))
    place = int(np.argmin(np.abs(w)))
    assert abs(w[place]) < 1e-12  # the start is a node
    rows = [round(t / 0.5) for t in TIMES]
    return dict(zip(functions, found[rows, place].T, strict=True))


@pytest.mark.parametrize("name", CIRCLES)
def test_the_moments_by_a_second_method(name: str) -> None:
    found = second_method(name)
    for k, T in enumerate(TIMES):
        exact = entry(name).moments(T)
        assert exact.keys() == found.keys()
        for function, (mean, _) in exact.items():
            assert mean == pytest.approx(found[function][k], abs=AGREE), (T, function)


def test_broken_twin_the_second_method_sees_a_drift_that_is_left_out() -> None:
    """Of the circle of varying curvature, whose drift is all that tells it from the great one."""
    exact = entry("varying_circle").moments(3.0)["cos(angle)"][0]
    assert abs(second_method("great_circle")["cos(angle)"][2] - exact) > 1000 * AGREE


def test_the_moments_on_the_sphere_by_their_equations() -> None:
    """D E[u] = -(d/2) s^2 E[u] du, and d E[c^2] = s^2 (1 - (d + 1) E[c^2]) du, with d = 2."""
    scale, d = 0.3, 2
    trace = 3 * scale**2
    for T in TIMES:
        norm4 = trace + (1.0 - trace) * math.exp(-2.0 * T)
        u = math.log1p(trace * math.expm1(2.0 * T)) / (2.0 * trace)
        square = 1.0 / 3.0 + 2.0 / 3.0 * math.exp(-(d + 1) * scale**2 * u)
        exact = entry("great_sphere").moments(T)
        assert exact["norm"] == (pytest.approx(norm4**0.25, abs=1e-12), 0.0)
        mean = math.exp(-0.5 * d * scale**2 * u)
        assert exact["cosine"][0] == pytest.approx(mean, abs=1e-12)
        assert exact["cosine"][1] == pytest.approx(math.sqrt(square - mean**2), abs=1e-12)
        assert exact["P2(cosine)"][0] == pytest.approx(1.5 * square - 0.5, abs=1e-12)
        assert exact["sideways"][1] == pytest.approx(math.sqrt(0.5 * (1 - square)), abs=1e-12)


@pytest.mark.parametrize("name", Reference.names())
def test_the_densities_have_the_moments(name: str) -> None:
    law = entry(name).law
    low, high = law.ends
    points, weights = np.polynomial.legendre.leggauss(160)
    points, weights = 0.5 * (low + high + (high - low) * points), 0.5 * (high - low) * weights
    on_circle = name in CIRCLES
    first = np.cos(points) if on_circle else points
    for T in TIMES:
        density = law.density(T, points)
        assert weights @ density == pytest.approx(1.0, abs=1e-8)
        mean, deviation = law.moments(T)["cos(angle)" if on_circle else "cosine"]
        assert weights @ (density * first) == pytest.approx(mean, abs=1e-8)
        spread = weights @ (density * (first - mean) ** 2)
        assert spread == pytest.approx(deviation**2, abs=1e-8)


# Solvers.


class WithoutIto(LimitingDiffusion):
    """(13) without half of the second derivative of Phi."""

    def drift(self, x: Tensor, basis: Tensor) -> Tensor:
        return -0.5 * x

    def drift_and_noise(self, x: Tensor, basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return self.drift(x, basis), self.noise(x, basis, w)


class WithoutMixedTerm(LimitingDiffusion):
    """(13) without the term of the tangential and normal parts of the noise together."""

    def drift(self, x: Tensor, basis: Tensor) -> Tensor:
        problem, norm = self.problem, x.norm(dim=0)
        term = vmap(lambda y: drift_terms.mixed_term(problem, y), 1, 1)(x / norm)
        return super().drift(x, basis) + term / norm**3

    def drift_and_noise(self, x: Tensor, basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return self.drift(x, basis), self.noise(x, basis, w)


def euler(sde: type[LimitingDiffusion], paths: int) -> Comparison:
    """Euler's scheme at a step whose own weak error, below 0.01, is allowed."""
    reference = entry("mixed_noise_circle")
    made = solve(
        sde(reference.problem),
        reference.problem.minimizer,
        [0.0, *TIMES],
        n_paths=paths,
        method="euler",
        dt=1.0 / 16.0,
        compile=False,
        seed=3,
    )
    return reference.compare(made.ys[1:], bias=0.01)


def test_the_right_equation_passes() -> None:
    assert euler(LimitingDiffusion, 200).passed


def test_broken_twin_a_solver_without_the_ito_term() -> None:
    found = euler(WithoutIto, 200)
    assert not found.passed
    assert "FAILS" in str(found)


@pytest.mark.thorough
def test_broken_twin_a_solver_without_the_mixed_term() -> None:
    """The angle circulates another way."""
    found = euler(WithoutMixedTerm, 10_000)
    assert not found.passed
    assert any("sin" in row.name for row in found.rows if not row.passed)


@pytest.mark.parametrize("name", ["great_sphere", "varying_circle"])
def test_draws_pass_and_those_of_another_entry_do_not(name: str) -> None:
    draws = entry(name).draws(1000, seed=2)
    assert entry(name).compare(draws).passed
    # Those of a later time in place of the first.
    wrong = draws.copy()
    wrong[0] = draws[1]
    assert not entry(name).compare(wrong).passed


def test_lost_paths_do_not_pass() -> None:
    draws = entry("great_circle").draws(200, seed=2)
    draws[1:, 7] = math.nan
    found = entry("great_circle").compare(draws)
    assert found.lost == 1
    assert not found.passed


def test_the_false_alarm_rate_is_declared() -> None:
    """Forty sets of draws, each refused at a rate of 1e-4."""
    reference = entry("great_circle")
    sets = reference.draws(40 * 50, seed=5).reshape(len(TIMES), 40, 50, 3)
    assert all(reference.compare(sets[:, k]).passed for k in range(40))


# Files.


def test_what_is_written_can_be_read_without_the_toolkit(tmp_path: Path) -> None:
    files, comparison = entry("varying_circle").write(tmp_path, 200, seed=1)
    assert comparison.passed
    assert sorted(file.name for file in files) == ["varying_circle.json", "varying_circle.npz"]
    found = json.loads((tmp_path / "varying_circle.json").read_text())
    states = np.load(tmp_path / "varying_circle.npz")["states"]
    assert states.shape == (len(found["times"]), found["draws"]["paths"], found["dim"])
    angle = np.arctan2(states[:, :, 1], states[:, :, 0])
    mean = np.array(found["functions"]["cos(angle)"]["mean"])
    error = np.array(found["functions"]["cos(angle)"]["standard_deviation"]) / math.sqrt(200)
    assert np.abs((np.cos(angle).mean(1) - mean) / error).max() < 4.0
    assert found["draws"]["diagnostics"]["passed"] is True
    assert found["draws"]["diagnostics"]["r_hat"] < 1.1
    # The loss as it stands there.
    a, x = found["parameters"]["a"], np.array([0.3, -0.2, 0.5])
    u = x / np.linalg.norm(x)
    value = float(entry("varying_circle").problem.loss(torch.from_numpy(x)))
    assert value == pytest.approx(0.5 * ((1 + a * u[0]) * u[2]) ** 2)


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(ArgumentError, match="not states"):
        entry("great_circle").compare(torch.ones(2, 10, 3, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="name"):
        Reference.of("circle")
