"""The time scale of constant learning rate and weight decay: (9) to (12) against the truth.

The truth is mpmath at 50 digits with the doubles taken exactly, SciPy's quadrature of the integral
in (12), and sums and paths of SGD done by hand.
"""

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from scipy.integrate import quad

from manifold_sde import errors, schedules, time_scale
from manifold_sde.time_scale import TimeScale

TOLERANCE = 2e-14  # ten times what was measured
RATIOS = [1e-8, 1e-6, 1e-4, 1e-2, 0.1, 0.5, 1.0, 10.0, 1e4]  # η/(2λ)
PRODUCTS = [1e-14, 1e-10, 1e-7, 1e-4, 1e-2, 0.5, 0.99]  # ηλ
STEPS = [0.0, 1e-3, 1.0, 37.5, 1e3, 1e6, 1e9, 1e12]
TIMES = [0.0, 1e-9, 1e-4, 0.03, 0.5, 1.0, 7.0, 15.58, 100.0, 349.0, 356.0, 1e3]

mp = mpmath.mp.clone()
mp.dps = 50


def rates(ratio: float, product: float) -> tuple[float, float]:
    """η and λ with η/(2λ) and ηλ as given, up to rounding."""
    return math.sqrt(2 * ratio * product), math.sqrt(product / (2 * ratio))


PAIRS = [rates(ratio, product) for ratio in RATIOS for product in PRODUCTS]


def exact(*values: float) -> list[mpmath.mpf]:
    return [mp.mpf(float(value)) for value in values]


def exact_radius(lr: float, weight_decay: float, t: float) -> mpmath.mpf:
    eta, lam, t = exact(lr, weight_decay, t)
    if lam == 0:
        return (1 + 2 * eta**2 * t) ** mp.mpf("0.25")
    with mp.workdps(450):  # as printed it cancels where λ is tiny
        ratio = eta / (2 * lam)
        return (ratio + mp.exp(-4 * eta * lam * t) * (1 - ratio)) ** mp.mpf("0.25")


def exact_tau(lr: float, weight_decay: float, t: float) -> mpmath.mpf:
    eta, lam, t = exact(lr, weight_decay, t)
    if lam == 0:
        return mp.log1p(2 * eta**2 * t) / 2
    return mp.log1p(mp.expm1(4 * eta * lam * t) * eta / (2 * lam)) / 2


def exact_tau_inverse(lr: float, weight_decay: float, T: float) -> mpmath.mpf:
    eta, lam, T = exact(lr, weight_decay, T)
    if lam == 0:
        return mp.expm1(2 * T) / (2 * eta**2)
    return mp.log1p(2 * lam / eta * mp.expm1(2 * T)) / (4 * eta * lam)


def exact_discrete(lr: float, weight_decay: float, k: int) -> mpmath.mpf:
    """t0 after k steps, as a geometric sum."""
    eta, lam = exact(lr, weight_decay)
    q = 1 - eta * lam
    return eta**2 * k if lam == 0 else eta**2 * (q ** (-4 * k) - 1) / (q**-2 - q**2)


def assert_close(got: float, want: mpmath.mpf, tolerance: float = TOLERANCE) -> None:
    """Relative error at most the tolerance, and zero for zero."""
    assert math.isfinite(got)
    assert abs(mp.mpf(float(got)) - want) <= tolerance * abs(want), (got, want)


def assert_is_equation_12(tau: Callable[[float, float, float], float]) -> None:
    """The assertion that the true τ passes and the broken ones do not."""
    for lr, weight_decay in PAIRS:
        for t in STEPS:
            assert_close(tau(lr, weight_decay, t), exact_tau(lr, weight_decay, t))


# (11) and (12) against mpmath.


@pytest.mark.paper("Equation (12)")
def test_tau_matches_mpmath() -> None:
    assert_is_equation_12(lambda lr, weight_decay, t: TimeScale(lr, weight_decay).tau(t))


BROKEN = {
    "half the rate": lambda e, w, t: 0.5 * np.log1p(np.expm1(2 * e * w * t) * e / (2 * w)),
    "no half": lambda e, w, t: np.log1p(np.expm1(4 * e * w * t) * e / (2 * w)),
    "ratio twice": lambda e, w, t: 0.5 * np.log1p(np.expm1(4 * e * w * t) * e / w),
    "overflows": lambda e, w, t: 0.5 * np.log1p(np.expm1(4 * e * w * t) * e / (2 * w)),
    "cancels": lambda e, w, t: float(TimeScale(e, w).tau(t) + 1.0) - 1.0,
    "whole steps": lambda e, w, t: TimeScale(e, w).discrete_time(math.floor(t)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tau_is_rejected(name: str) -> None:
    with np.errstate(over="ignore"), pytest.raises(AssertionError):
        assert_is_equation_12(BROKEN[name])


@pytest.mark.paper("Equation (11)")
def test_radius_matches_mpmath() -> None:
    for lr, weight_decay in PAIRS:
        for t in STEPS:
            got = TimeScale(lr, weight_decay).radius(t)
            assert_close(got, exact_radius(lr, weight_decay, t))


@pytest.mark.paper("Equation (12)")
def test_tau_inverse_matches_mpmath() -> None:
    for lr, weight_decay in PAIRS:
        for T in TIMES:
            got = TimeScale(lr, weight_decay).tau_inverse(T)
            assert_close(got, exact_tau_inverse(lr, weight_decay, T))


@pytest.mark.paper("Equation (12)")
@pytest.mark.parametrize("ratio", [1e-8, 1e-4, 0.1, 0.5, 1.0, 10.0])
@pytest.mark.parametrize("exponent", [1e-3, 0.1, 1.0, 10.0, 30.0])
def test_tau_is_the_integral_in_12(ratio: float, exponent: float) -> None:
    lr, weight_decay = rates(ratio, 1e-5)
    t = exponent / (4 * lr * weight_decay)

    def integrand(s: float) -> float:
        level = lr / (2 * weight_decay)
        return lr**2 / (level + math.exp(-4 * lr * weight_decay * s) * (1 - level))

    integral, error = quad(integrand, 0.0, t, epsabs=0.0, epsrel=1e-12, limit=500)
    assert error <= 1e-11 * integral
    assert TimeScale(lr, weight_decay).tau(t) == pytest.approx(integral, rel=1e-11)


@pytest.mark.paper("Equation (11)", "Equation (12)")
def test_derivative_of_tau_is_the_inverse_fourth_power_of_radius() -> None:
    for lr, weight_decay in [*PAIRS, (0.1, 0.0)]:
        scale = TimeScale(lr, weight_decay)
        for t in [1e-2, 1.0, 1e3]:
            h = 1e-4 * t / (1 + lr * weight_decay * t)
            slope = (scale.tau(t + h) - scale.tau(t - h)) / ((t + h) - (t - h))
            assert slope == pytest.approx(lr**2 / scale.radius(t) ** 4, rel=1e-6)


@pytest.mark.paper("Equation (12)")
def test_tau_inverse_undoes_tau() -> None:
    for lr, weight_decay in PAIRS:
        scale = TimeScale(lr, weight_decay)
        t = np.array(STEPS)
        np.testing.assert_allclose(scale.tau_inverse(scale.tau(t)), t, rtol=1e-12)
        T = np.array(TIMES)
        np.testing.assert_allclose(scale.tau(scale.tau_inverse(T)), T, rtol=1e-13)


@pytest.mark.paper("Theorem 4.1", "Equation (11)")
def test_radius_at_a_diffusion_time() -> None:
    """R(τ^{-1}(T))^4 = 1 / (e^{-2T} + (1 - e^{-2T}) 2λ/η), by which Theorem 4.1 divides."""
    T = np.array(TIMES)
    for lr, weight_decay in PAIRS:
        scale = TimeScale(lr, weight_decay)
        fourth = 1 / (np.exp(-2 * T) - np.expm1(-2 * T) * 2 * weight_decay / lr)
        # Where the radius falls at T = 1000, t has 1000 and more decay times, each rounded.
        np.testing.assert_allclose(scale.radius(scale.tau_inverse(T)) ** 4, fourth, rtol=2e-12)


# λ = 0 and its neighbourhood.


@pytest.mark.paper("Equation (12)")
@pytest.mark.parametrize("weight_decay", [0.0, 5e-324, 1e-308, 1e-100, 1e-39])
@pytest.mark.parametrize("lr", [1e-37, 1e-4, 0.1, 3.0, 1e37])
def test_small_weight_decay_tends_to_none(lr: float, weight_decay: float) -> None:
    scale = TimeScale(lr, weight_decay)
    for t in STEPS:
        assert_close(scale.tau(t), exact_tau(lr, weight_decay, t), 2e-13)
        assert_close(scale.radius(t), exact_radius(lr, weight_decay, t))
    for T in TIMES:
        want = exact_tau_inverse(lr, weight_decay, T)
        if want < 1e308:
            assert_close(scale.tau_inverse(T), want, 1e-12)
        else:
            with pytest.raises(errors.TimeScaleError, match="smaller T"):
                scale.tau_inverse(T)


def test_no_weight_decay_has_no_shrinkage() -> None:
    scale = TimeScale(0.1, 0)
    assert str(scale.log_shrinkage(5)) == "0.0"
    assert scale.shrinkage(5) == 1.0
    assert scale.effective_lr(7) == pytest.approx(0.1, rel=1e-15)
    assert scale.discrete_time(50) == scale.tau(50) == pytest.approx(0.5 * math.log(2))


# Whole steps.


@pytest.mark.paper("Theorem 4.4")
def test_steps_is_the_floor_of_tau_inverse() -> None:
    for lr, weight_decay in PAIRS:
        for T in TIMES:
            want = exact_tau_inverse(lr, weight_decay, T)
            if want > 2**52:
                continue
            got = TimeScale(lr, weight_decay).steps(T)
            assert isinstance(got, int)
            whole = abs(want - mp.nint(want)) < 1e-12 * (1 + want)
            assert got == int(mp.floor(want)) or (whole and abs(got - want) < 1.01)


@pytest.mark.paper("Theorem 4.4")
def test_steps_undoes_tau_at_whole_steps() -> None:
    k = np.array([0, 1, 2, 3, 10, 997, 12345, 10**6, 10**8 + 1])
    for lr, weight_decay in [(0.01, 0.05), (1e-4, 0.05), (0.8, 5e-4), (0.1, 0.0), (0.5, 1.9)]:
        scale = TimeScale(lr, weight_decay)
        np.testing.assert_array_equal(scale.steps(scale.tau(k)), k)
        if weight_decay > 0:
            later = scale.steps(np.nextafter(scale.tau(k[1:]), 0))
            np.testing.assert_array_equal(later, k[1:] - 1)


@pytest.mark.paper("Equation (12)")
def test_discrete_quantities_match_the_geometric_sum() -> None:
    steps = [0, 1, 2, 37, 1000, 10**6, 10**9, 10**12]
    for lr, weight_decay in [*PAIRS, (0.1, 0.0)]:
        scale = TimeScale(lr, weight_decay)
        keep = 1 - exact(lr)[0] * exact(weight_decay)[0]
        for k in steps:
            t0 = exact_discrete(lr, weight_decay, k)
            assert_close(scale.discrete_time(k), mp.log1p(2 * t0) / 2)
            assert_close(scale.log_shrinkage(k), k * mp.log(keep))
            log_lr = mp.log(mp.mpf(lr)) - (2 * k + 1) * mp.log(keep)
            size = 1 + abs(mp.log(mp.mpf(lr))) + abs(log_lr)
            assert abs(mp.mpf(float(scale.log_effective_lr(k))) - log_lr) < TOLERANCE * size
            if k > 0:
                got = mp.mpf(float(scale.log_accumulated(k)))
                assert abs(got - mp.log(t0)) < TOLERANCE * (1 + abs(mp.log(t0)))
            if t0 < 1e300:
                assert_close(scale.accumulated(k), t0, 1e-12)
            if abs(log_lr) < 600:
                assert_close(scale.effective_lr(k), mp.exp(log_lr), 1e-12)
                assert_close(scale.shrinkage(k), keep**k, 1e-12)
    assert TimeScale(0.1, 0.1).log_accumulated(0) == -math.inf
    assert TimeScale(0.1, 0.1).accumulated(0) == 0
    assert TimeScale(0.1, 0.5).shrinkage(10**9) == 0


@pytest.mark.paper("Equation (12)")
@pytest.mark.parametrize("ratio", [1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("exponent", [0.5, 4.0, 20.0])
def test_discrete_time_tends_to_tau_at_rate_one(ratio: float, exponent: float) -> None:
    """At fixed T, with k doubling and ηλ = exponent/(4k) halving."""
    differences = []
    for k in [2**i for i in range(10, 18)]:
        scale = TimeScale(*rates(ratio, exponent / (4 * k)))
        differences.append(abs(scale.discrete_time(k) - scale.tau(k)))
    slopes = np.diff(np.log2(differences))
    np.testing.assert_allclose(slopes, -1.0, atol=0.03)


@pytest.mark.paper("Theorem 3.2")
@pytest.mark.parametrize("C", [0.0, 0.3, 2.0])
def test_accumulated_tends_to_the_time_change_of_theorem_3_2(C: float) -> None:
    t = 1.5
    limit = t if C == 0 else math.expm1(4 * C * t) / (4 * C)
    differences = []
    for lr in [2.0**-i for i in range(4, 9)]:
        k = round(t / lr**2)
        differences.append(abs(TimeScale(lr, C * lr).accumulated(k) - limit))
    if C == 0:
        np.testing.assert_allclose(differences, 0.0, atol=1e-14)
    else:  # ηλ = Cη²
        np.testing.assert_allclose(np.diff(np.log2(differences)), -2.0, atol=0.15)


# Norms and the clock of the direction.


@pytest.mark.paper("Equation (10)")
def test_norm_matches_mpmath() -> None:
    for lr, weight_decay in [*PAIRS, (0.1, 0.0)]:
        scale = TimeScale(lr, weight_decay)
        for t in STEPS:
            for norm, trace in [(1.0, 1.0), (3.0, 0.0), (1e-6, 0.81), (1e5, 30.0)]:
                eta, lam, time, start, V = exact(lr, weight_decay, t, norm, trace)
                left = mp.exp(-4 * eta * lam * time)
                gain = 2 * eta**2 * time if lam == 0 else (1 - left) * eta / (2 * lam)
                want = (start**4 * left + V * gain) ** mp.mpf("0.25")
                if trace > 0 or eta * lam * time < 300:
                    assert_close(scale.norm(t, norm, trace), want, 2e-13)
                elif eta * lam * time > 1e3:
                    assert scale.norm(t, norm, trace) == 0


@pytest.mark.paper("Equation (10)", "Equation (11)")
def test_norm_of_unit_trace_and_start_is_the_radius() -> None:
    scale = TimeScale(0.02, 0.3)
    t = np.array(STEPS)
    np.testing.assert_allclose(scale.norm(t, 1.0, 1.0), scale.radius(t), rtol=1e-15)
    assert scale.norm(1e12, 7.0, 0.81) == pytest.approx(scale.equilibrium_norm(0.81), rel=1e-15)
    assert scale.equilibrium_norm(0.0) == 0


@pytest.mark.paper("Equation (10)")
def test_norm_solves_its_differential_equation() -> None:
    """d||X||² = (-2ηλ||X||² + η²V/||X||²) dt, which the paper states before (10)."""
    lr, weight_decay, trace = 0.03, 0.2, 2.5
    scale = TimeScale(lr, weight_decay)
    for t in [5.0, 50.0, 300.0]:
        h = 1e-3
        slope = (scale.norm(t + h, 2.0, trace) ** 2 - scale.norm(t - h, 2.0, trace) ** 2) / (2 * h)
        square = scale.norm(t, 2.0, trace) ** 2
        want = -2 * lr * weight_decay * square + lr**2 * trace / square
        assert slope == pytest.approx(want, rel=1e-7)


@pytest.mark.paper("Theorem 4.1", "Equation (10)")
def test_norm_over_radius_is_the_norm_of_the_diffusion() -> None:
    """||X||/R at τ^{-1}(T) is the norm of (13): ||Y||^4 = V + (||Y(0)||^4 - V) e^{-2T}."""
    T = np.linspace(0.0, 12.0, 25)
    for lr, weight_decay in [(0.01, 0.05), (0.3, 0.2), (0.5, 0.01)]:
        scale = TimeScale(lr, weight_decay)
        t = scale.tau_inverse(T)
        for norm, trace in [(1.0, 0.81), (2.0, 0.3), (0.7, 0.0)]:
            want = (trace + (norm**4 - trace) * np.exp(-2 * T)) ** 0.25
            got = scale.norm(t, norm, trace) / scale.radius(t)
            np.testing.assert_allclose(got, want, rtol=1e-12)


def test_clock_matches_mpmath() -> None:
    for lr, weight_decay in [*PAIRS, (0.1, 0.0)]:
        scale = TimeScale(lr, weight_decay)
        for t in STEPS:
            grown = mp.expm1(2 * exact_tau(lr, weight_decay, t))
            for norm, trace in [(1.0, 1.0), (0.5, 0.81), (20.0, 1e-9), (1.0, 30.0), (2.0, 0.0)]:
                V, fourth = mp.mpf(trace), mp.mpf(norm) ** 4
                want = grown / (2 * fourth) if V == 0 else mp.log1p(V * grown / fourth) / (2 * V)
                if want < 1e300:
                    # With a tiny trace, or none, u is e^{2T} itself.
                    size = 1 + float(mp.log1p(grown)) if trace < 1e-3 else 1
                    assert_close(scale.clock(t, trace, norm), want, 2e-13 * size)


def test_clock_at_a_thousand_does_not_overflow() -> None:
    scale = TimeScale(0.01, 0.05)
    t = scale.tau_inverse(1e3)
    want = (2e3 + math.log(0.81) - 4 * math.log(0.5)) / (2 * 0.81)
    assert scale.clock(t, 0.81, 0.5) == pytest.approx(want, rel=1e-14)
    with pytest.raises(errors.TimeScaleError, match="clock is too large"):
        scale.clock(t, 0.0, 0.5)
    assert scale.clock(0.0, 0.0, 0.5) == 0


@pytest.mark.paper("Equation (10)")
@pytest.mark.parametrize(("norm", "trace"), [(1.0, 0.81), (2.0, 0.1), (0.6, 3.0)])
def test_clock_is_the_integral_along_the_norm(norm: float, trace: float) -> None:
    lr, weight_decay = 0.02, 0.1
    scale = TimeScale(lr, weight_decay)
    for t in [10.0, 1e3, 1e4]:
        integral, _ = quad(
            lambda s: lr**2 / float(scale.norm(s, norm, trace)) ** 4, 0, t, epsrel=1e-11, limit=200
        )
        assert scale.clock(t, trace, norm) == pytest.approx(integral, rel=1e-9)


@pytest.mark.parametrize(
    "test",
    [
        test_tau_matches_mpmath,
        test_radius_matches_mpmath,
        test_tau_inverse_matches_mpmath,
        test_tau_inverse_undoes_tau,
        test_steps_is_the_floor_of_tau_inverse,
        test_discrete_quantities_match_the_geometric_sum,
        test_norm_matches_mpmath,
        test_clock_matches_mpmath,
        lambda: test_small_weight_decay_tends_to_none(3.0, 0.0),
        lambda: test_small_weight_decay_tends_to_none(1e37, 5e-324),
        lambda: test_small_weight_decay_tends_to_none(1e-4, 1e-100),
    ],
)
def test_the_formulas_do_not_need_long_double(
    test: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bounds, where long double is no longer than double."""
    for module in (schedules, time_scale):
        monkeypatch.setattr(module, "WIDE", np.float64)
    test()


# Other learning rates with the same directions.


def sgd(
    x: np.ndarray, lr: np.ndarray, weight_decay: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """SGD on ½(x₃/‖x‖)² with tangential noise of degree -1; the path, shape (steps + 1, 3)."""
    rng = np.random.default_rng(seed)
    path = [x]
    for eta, lam in zip(lr, weight_decay, strict=True):
        square = x @ x
        gradient = x[2] / square * (np.array([0.0, 0.0, 1.0]) - x[2] / square * x)
        noise = rng.normal(size=3)
        noise = (noise - (noise @ x) / square * x) / math.sqrt(square)
        x = (1 - eta * lam) * x - eta * (gradient + noise)
        path.append(x)
    path = np.array(path)
    return path, path / np.linalg.norm(path, axis=1, keepdims=True)


START = np.array([0.6, -1.1, 0.3])


@pytest.mark.paper("Equation (9)")
def test_reparametrised_runs_have_the_same_directions() -> None:
    scale = TimeScale(0.05, 0.4)
    other, factor = scale.reparametrised()
    assert other.lr == other.weight_decay == pytest.approx(math.sqrt(0.05 * 0.4), rel=1e-15)
    assert factor == pytest.approx((0.4 / 0.05) ** 0.25, rel=1e-15)
    same, same_factor = scale.rescaled(0.05 / 0.4)
    assert (same.lr, same_factor) == pytest.approx((other.lr, factor), rel=1e-15)
    _, first = sgd(START, np.full(300, 0.05), np.full(300, 0.4), seed=1)
    lr, weight_decay = np.full(300, other.lr), np.full(300, other.weight_decay)
    _, second = sgd(factor * START, lr, weight_decay, seed=1)
    np.testing.assert_allclose(second, first, atol=1e-12)
    _, twin = sgd(START, lr, weight_decay, seed=1)
    assert np.abs(twin - first).max() > 0.1  # without the factor of the norm


@pytest.mark.paper("Remark 4.2")
@pytest.mark.parametrize("C", [0.1, 1.0, 5.0])
def test_rescaled_runs_are_the_same_up_to_the_factor(C: float) -> None:
    scale = TimeScale(0.05, 0.4)
    other, factor = scale.rescaled(C)
    path, _ = sgd(START, np.full(300, 0.05), np.full(300, 0.4), seed=2)
    lr, weight_decay = np.full(300, other.lr), np.full(300, other.weight_decay)
    twin, _ = sgd(factor * START, lr, weight_decay, seed=2)
    np.testing.assert_allclose(twin, factor * path, atol=1e-12)
    k = np.arange(0, 1000, 50)
    np.testing.assert_allclose(other.accumulated(k), scale.accumulated(k) / C, rtol=1e-13)
    # η/(2Cλ) stands in (11) where η/(2λ) was.
    level = 0.05 / (2 * C * 0.4)
    want = level + np.exp(-4 * 0.05 * 0.4 * k) * (1 - level)
    np.testing.assert_allclose(other.radius(k) ** 4, want, rtol=1e-13)
    # The clock of the direction is the same for both, from the start that belongs to each.
    np.testing.assert_allclose(other.clock(k, 2.0, factor), scale.clock(k, 2.0, 1.0), rtol=1e-13)


def test_within_theorem() -> None:
    assert TimeScale(0.1, 0.0501).within_theorem
    assert not TimeScale(0.1, 0.05).within_theorem
    assert TimeScale(0.1, 0.04).rescaled(1.3)[0].within_theorem
