"""Second methods for the laws of the direction and the norm on a circle, in NumPy and SciPy.

Gradients, noise and coefficients are by hand, derivatives along the circle by FFT or by
differences, those in q from NumPy's Chebyshev polynomials. The equation in (angle, q) is solved as
it stands, at its own c, on a window that moves with the norm. Nothing of the toolkit is in it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.polynomial import chebyshev
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from manifold_sde.verification.exact import CircleDiffusion

Array = np.ndarray

#: Amplitude, tilt and height of problems.mixed_noise_circle().
AMPLITUDE, TILT, HEIGHT = 0.5, 0.3, 0.6
RADIUS = 0.8


def mixed_gradient(x: Array) -> Array:
    """Gradient of the loss of mixed_noise_circle at points (n, 3)."""
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    u = x / norm
    weight, height = 1 + AMPLITUDE * u[:, 0], u[:, 2] - HEIGHT
    slope = np.zeros_like(x)
    slope[:, 0] = AMPLITUDE * weight * height**2
    slope[:, 2] = weight**2 * height
    return tangential(u, slope) / norm


def mixed_factor(x: Array) -> Array:
    """A factor (n, 3, 2) of the sampling noise: the gradients of the two tilts over sqrt(2)."""
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    u = x / norm
    zero, one = np.zeros(len(x)), np.ones(len(x))
    first = np.stack([one, zero, zero], 1)
    second = np.stack([u[:, 2], one, u[:, 0]], 1)
    columns = [tangential(u, TILT * g) / norm / np.sqrt(2) for g in (first, second)]
    return np.stack(columns, 2)


def tangential(u: Array, slope: Array) -> Array:
    return slope - u * (u * slope).sum(1, keepdims=True)


def mixed_point(angle: float) -> Array:
    return np.array([RADIUS * np.cos(angle), RADIUS * np.sin(angle), HEIGHT])


def mixed_limit(x: Array) -> Array:
    """Phi at points (n, 3) by SciPy, one at a time."""
    ends = []
    for point in x:
        found = solve_ivp(
            lambda _, z: -mixed_gradient(z[None])[0],
            (0.0, 400.0),
            point / np.linalg.norm(point),
            "LSODA",
            rtol=1e-12,
            atol=1e-14,
        )
        ends.append(found.y[:, -1] * np.linalg.norm(point))
    return np.array(ends)


def mixed_coefficients(angle: float) -> tuple[float, float, float]:
    """Drift, variance and trace at an angle, from the angle of Phi(y + h sigma_j).

    The generator applied to a function f of the angle is half the sum over the columns of the
    second derivative of f(Phi(y + h sigma_j)) at h = 0: no tangent, no projection, no curvature.
    """
    y = mixed_point(angle)
    factor = mixed_factor(y[None])[0]
    h = 0.1
    drift = variance = 0.0
    for column in factor.T:
        ends = mixed_limit(y + h * np.arange(-3, 4)[:, None] * column)
        turned = np.arctan2(ends[:, 1], ends[:, 0]) - angle
        turned = (turned + np.pi) % (2 * np.pi) - np.pi
        second = np.array([2, -27, 270, -490, 270, -27, 2]) @ turned / (180 * h**2)
        first = np.array([-1, 9, -45, 0, 45, -9, 1]) @ turned / (60 * h)
        drift += 0.5 * second
        variance += first**2
    return drift, variance, float((factor**2).sum())


def chain_expectation(
    coefficients: Callable[[Array], tuple[Array, Array]], f: Array, start: int, u: float
) -> float:
    """E f(angle) at the clock u by the exponential of a Markov chain on equally spaced angles.

    Args:
        coefficients: Angles (n,) -> drift and variance.
        f: Values (n,) of the function at the angles 2 pi j / n.
        start: Index of the start.
        u: The clock.
    """
    n = len(f)
    step = 2 * np.pi / n
    drift, variance = coefficients(step * np.arange(n))
    up, down = (0.5 * variance / step**2 + sign * 0.5 * drift / step for sign in (1, -1))
    assert min(up.min(), down.min()) > 0
    matrix = np.diag(-(up + down))
    index = np.arange(n)
    matrix[index, (index + 1) % n] += up
    matrix[index, (index - 1) % n] += down
    return float((expm(u * matrix) @ f)[start])


def window_expectation(
    drift: Array,
    variance: Array,
    trace: Array,
    f: Callable[[Array, Array], Array],
    t: float,
    c: float,
    q0: float,
    *,
    norm_nodes: int = 17,
) -> Array:
    """E f(angle, q) at the time t from each of the starts (angle 2 pi j / n, q0): (n,).

    Kolmogorov's backward equation with the generator q^{-1} G + (-4 c q + 2 V) d/dq, on the window
    between the solutions of dq/dt = -4 c q + 2 V for the extremes of V, which nothing enters.

    Args:
        drift: Values (n,) at the angles, n odd.
        variance: Values (n,).
        trace: Values (n,).
        f: Function of angles (n, 1) and q (m,).
        t: Time.
        c: Strength of the decay.
        q0: Start of q.
        norm_nodes: Number m of nodes in q.
    """
    n = len(drift)
    angles = 2 * np.pi * np.arange(n) / n
    modes = 1j * np.fft.rfftfreq(n, 1 / n)
    x = np.polynomial.chebyshev.chebpts2(norm_nodes)
    vandermonde = chebyshev.chebvander(x, norm_nodes - 1)
    slopes = chebyshev.chebvander(x, norm_nodes - 2) @ chebyshev.chebder(np.eye(norm_nodes))
    along_q = slopes @ np.linalg.inv(vandermonde)

    def edges(s: float) -> tuple[float, float, float, float]:
        values = []
        for extreme, start in ((trace.min(), 0.99 * q0), (trace.max(), 1.01 * q0)):
            grown = np.expm1(-4 * c * s) / (-4 * c) if c > 0 else s
            values.append(start * np.exp(-4 * c * s) + 2 * extreme * grown)
        low, high = values
        speeds = -4 * c * low + 2 * trace.min(), -4 * c * high + 2 * trace.max()
        return low, high, *speeds

    def rate(remaining: float, state: Array) -> Array:
        w = state.reshape(n, norm_nodes)
        low, high, low_speed, high_speed = edges(t - remaining)
        half = 0.5 * (high - low)
        q = low + half * (1 + x)
        spectrum = np.fft.rfft(w, axis=0)
        first = np.fft.irfft(modes[:, None] * spectrum, n, axis=0)
        second = np.fft.irfft(modes[:, None] ** 2 * spectrum, n, axis=0)
        turning = (drift[:, None] * first + 0.5 * variance[:, None] * second) / q
        window = low_speed + 0.5 * (1 + x) * (high_speed - low_speed)
        speed = (-4 * c * q + 2 * trace[:, None] - window) / half
        return (turning + speed * (w @ along_q.T)).ravel()

    low, high, *_ = edges(t)
    q = low + 0.5 * (high - low) * (1 + x)
    end = np.broadcast_to(f(angles[:, None], q), (n, norm_nodes)).ravel()
    found = solve_ivp(rate, (0.0, t), end, "DOP853", rtol=1e-10, atol=1e-12)
    assert found.success
    final = found.y[:, -1].reshape(n, norm_nodes)
    return chebyshev.chebval(0.0, np.linalg.inv(vandermonde) @ final.T)


def invariant_density(
    coefficients: Callable[[Array], tuple[Array, Array]], n: int = 2**14
) -> tuple[Array, Array]:
    """Angles and invariant density of a diffusion on the circle, by its formula in integrals.

    With S(x) = int_0^x 2 b / v the density is proportional to
    e^{S(x)} / v(x) times int_x^{x + 2 pi} e^{-S}.
    """
    x = 2 * np.pi * np.arange(2 * n + 1) / n
    drift, variance = coefficients(x)
    ratio = 2 * drift / variance
    step = x[1]
    # Simpson's rule between neighbours by the midpoint values.
    middle = coefficients(x[:-1] + 0.5 * step)
    inner = 2 * middle[0] / middle[1]
    scale = np.concatenate([[0.0], np.cumsum(step / 6 * (ratio[:-1] + 4 * inner + ratio[1:]))])
    falling = np.exp(-scale)
    total = np.concatenate([[0.0], np.cumsum(0.5 * step * (falling[:-1] + falling[1:]))])
    density = np.exp(scale[:n]) / variance[:n] * (total[n : 2 * n] - total[:n])
    return x[:n], density / (density.mean() * 2 * np.pi)


def interpolated(values: Array, angles: Array) -> Array:
    """Trigonometric interpolation by FFT."""
    spectrum = np.fft.rfft(values) / len(values)
    waves = np.exp(1j * np.multiply.outer(np.asarray(angles), np.arange(1, len(spectrum))))
    return spectrum[0].real + 2 * (waves @ spectrum[1:]).real


def along(law: CircleDiffusion) -> Callable[[Array], tuple[Array, Array]]:
    return lambda x: (interpolated(law.drift, x), interpolated(law.variance, x))


def constant(drift: float, variance: float, trace: float = 0.2) -> CircleDiffusion:
    """Drift, variance and trace that do not vary."""
    ones = np.ones(33)
    return CircleDiffusion(drift * ones, variance * ones, trace * ones)
