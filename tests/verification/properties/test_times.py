"""The time scale: R, tau and its inverse, by quadrature, by recursion, and at C of Remark 4.2."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from manifold_sde import TimeScale
from manifold_sde.verification import strategies
from manifold_sde.verification.properties import Defect
from tests.verification.properties import twins

#: A time scale of a learning rate and a weight decay.
Made = Callable[[float, float], Any]

#: Rates (eta, lambda) that are looked at, eta < 2 lambda in the first three.
_RATES = ((1e-2, 5e-2), (1e-3, 0.5), (1e-4, 1.0), (0.1, 5e-4), (0.3, 0.03))
#: Rates at which steps are so small that the recursion is close to its continuous form.
_SMALL_RATES = ((1e-2, 5e-2), (1e-3, 0.5), (5e-3, 5e-3))
#: Times in units of 1 / (4 eta lambda), the relaxation time of R^4.
_TIMES = (1e-3, 0.1, 1.0, 5.0, 40.0)
#: Units of rounding of the closed formulas in float64: a few functions, one after the other.
_UNITS = 64.0
_DIGITS = 30
#: Most steps of the recursion.
_MOST_STEPS = 20_000


def quadrature(made: Made, lr: float, weight_decay: float) -> Defect:
    """R of (11) solves the equation of the norm, and tau of (12) is the integral of eta^2 / R^4.

    R^4 is integrated from d R^4 / dt = 2 eta^2 - 4 eta lambda R^4, the equation of |X|^4 for noise
    of trace 1, by mpmath to 30 digits, as the integral of 2 eta^2 e^(4 eta lambda s).

    Returns:
        The largest relative defect of R and tau over five times.

    Source: equations (11) and (12).
    """
    scale = made(lr, weight_decay)
    values = []
    with mpmath.workdps(_DIGITS):
        eta, decay = mpmath.mpf(lr), mpmath.mpf(weight_decay)
        rate = 4 * eta * decay

        def fourth_power(t: mpmath.mpf) -> mpmath.mpf:
            grown = mpmath.quad(lambda s: 2 * eta**2 * mpmath.exp(rate * (s - t)), [0, t])
            return mpmath.exp(-rate * t) + grown

        # In closed form inside the second integral, where it was just integrated.
        def known(t: mpmath.mpf) -> mpmath.mpf:
            return mpmath.exp(-rate * t) - 2 * eta**2 / rate * mpmath.expm1(-rate * t)

        for place in _TIMES:
            t = place / (4 * lr * weight_decay)
            exact = mpmath.mpf(t)
            pieces = mpmath.linspace(0, exact, 2 + int(place / 3))
            radius = mpmath.root(fourth_power(exact), 4)
            tau = mpmath.quad(lambda s: eta**2 / known(s), pieces)
            for claimed, true in ((scale.radius(t), radius), (scale.tau(t), tau)):
                values.append(float(abs(mpmath.mpf(float(claimed)) / true - 1)))
    return Defect.of(_tensor(values), _rounding(), f"R and tau at {_shown(lr, weight_decay)}")


def inverse(made: Made, lr: float, weight_decay: float) -> Defect:
    """tau^{-1} inverts tau, both rise, and steps(T) is the floor of tau^{-1}(T).

    Returns:
        The largest relative |tau^{-1}(tau(t)) - t| and |tau(tau^{-1}(T)) - T|; infinite where one
        of them does not rise or a step count is not the floor.

    Source: equation (12), Theorem 4.4.
    """
    scale = made(lr, weight_decay)
    t = np.geomspace(1e-3, _TIMES[-1], 40) / (4 * lr * weight_decay)
    T = np.asarray(scale.tau(t))
    back, forth = np.asarray(scale.tau_inverse(T)), np.asarray(scale.tau(scale.tau_inverse(T)))
    # tau is flat in the logarithm where its own derivative is: d log t / d log T is its condition.
    condition = T / (np.asarray(scale.radius(t)) ** -4 * lr**2 * t)
    values = np.maximum(np.abs(back / t - 1) / np.maximum(condition, 1.0), np.abs(forth / T - 1))
    steps = np.asarray(scale.steps(T))
    floors = np.asarray(scale.tau(np.maximum(steps, 0))) <= T * (1 + _rounding())
    floors &= np.asarray(scale.tau(steps + 1)) >= T * (1 - _rounding())
    rises = np.diff(T, prepend=0.0) > 0
    values = np.where(floors & rises, values, np.inf)
    return Defect.of(
        torch.from_numpy(values), _rounding(), f"tau and its inverse at {_shown(lr, weight_decay)}"
    )


def recursion(made: Made, lr: float, weight_decay: float) -> Defect:
    """R is the norm of SGD whose noise has size 1 / |x| and is orthogonal to x, to first order.

    One step takes |x|^2 to (1 - eta lambda)^2 |x|^2 + eta^2 / |x|^2. Against (11) it has a local
    error of at most 2 (eta lambda)^2 + (eta^2 / R^4)^2 relative to R^4, which is forgotten at the
    rate 2 eta^2 / R^4: over the run, e (1 + ln(1 + 2 lambda / eta) / 2) with e the largest
    relative change of R^4 by one step.

    Returns:
        The largest relative difference of R^4, and of T = tau from the sum of eta^2 / |x|^4.

    Source: equations (1), (10) and (11).
    """
    scale = made(lr, weight_decay)
    product = lr * weight_decay
    count = int(min(_MOST_STEPS, 2.0 / product if product > 0 else _MOST_STEPS))
    squares, times = np.ones(count + 1), np.zeros(count + 1)
    for k in range(count):
        square = squares[k]
        moved = (1.0 - product) ** 2 * square
        squares[k + 1] = moved + lr**2 / square
        # The mean of eta^2 / |x|^4 over the step, for |x|^4 linear in it to second order.
        times[k + 1] = times[k] + 0.5 * lr**2 * (square**-2 + squares[k + 1] ** -2)
    t = np.arange(count + 1.0)
    fourth = np.asarray(scale.radius(t)) ** 4
    largest = max(4 * product, 2 * lr**2 / float(squares.min()) ** 2)
    memory = math.log1p(2 * weight_decay / lr)
    radius_gap = np.abs(squares**2 / fourth - 1.0)
    time_gap = np.abs(np.asarray(scale.tau(t)) - times) / np.maximum(times, 1.0)
    values = np.maximum(radius_gap, time_gap)
    kept = values[:: max(1, count // 200)]
    tolerance = largest * (1.0 + 0.5 * memory)
    shown = f"R and tau against the recursion at {_shown(lr, weight_decay)}"
    return Defect.of(torch.from_numpy(kept), tolerance, shown)


def rescaled(made: Made, lr: float, weight_decay: float, C: float) -> Defect:
    """Remark 4.2: the rates C^(-1/2) eta and C^(1/2) lambda put eta / (2 C lambda) into (11).

    At the same step e^{2T} - 1 is divided by C, and R^4 is that of the new ratio.

    Returns:
        The largest relative defect of R^4, of e^{2T} - 1, and of the rates.

    Source: Remark 4.2.
    """
    here = made(lr, weight_decay)
    there, factor = here.rescaled(C)
    t = np.asarray(_TIMES) / (4 * lr * weight_decay)
    part = lr / (2 * C * weight_decay)
    expected = np.exp(-4 * lr * weight_decay * t) - part * np.expm1(-4 * lr * weight_decay * t)
    grown, reference = np.expm1(2 * there.tau(t)), np.expm1(2 * here.tau(t)) / C
    condition = np.maximum(1.0, 2 * np.maximum(here.tau(t), there.tau(t)))
    gaps = [
        np.abs(there.radius(t) ** 4 / expected - 1.0),
        np.abs(grown / reference - 1.0) / condition,
        np.full_like(t, abs(there.lr * math.sqrt(C) / lr - 1.0)),
        np.full_like(t, abs(there.weight_decay / math.sqrt(C) / weight_decay - 1.0)),
        np.full_like(t, abs(factor * C**0.25 - 1.0)),
    ]
    return Defect.of(
        torch.from_numpy(np.max(gaps, 0)),
        _rounding(),
        f"R and tau at C = {C:g} of Remark 4.2",
    )


def _tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _rounding() -> float:
    return _UNITS * float(np.finfo(np.float64).eps)


def _shown(lr: float, weight_decay: float) -> str:
    return f"eta = {lr:g}, lambda = {weight_decay:g}"


def _defects(made: Made) -> list[Defect]:
    """Of all properties at some rates."""
    return [
        *(quadrature(made, *rates) for rates in _RATES[1::2]),
        *(inverse(made, *rates) for rates in _RATES),
        *(recursion(made, *rates) for rates in _SMALL_RATES),
        *(rescaled(made, *rates, C) for rates in _RATES for C in (0.5, 300.0)),
    ]


@pytest.mark.paper("Equation (11)", "Equation (12)", "Remark 4.2")
def test_the_time_scale_is_that_of_the_paper() -> None:
    for defect in (*_defects(TimeScale), *(quadrature(TimeScale, *r) for r in _RATES[::2])):
        defect.require()


@pytest.mark.paper("Equation (11)", "Equation (12)", "Remark 4.2")
@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(strategies.rates(), strategies.scales())
def test_the_time_scale_at_drawn_rates(rates: tuple[float, float], C: float) -> None:
    quadrature(TimeScale, *rates).require()
    inverse(TimeScale, *rates).require()
    rescaled(TimeScale, *rates, C).require()


@pytest.mark.paper("Equation (11)", "Equation (12)", "Remark 4.2")
@pytest.mark.parametrize(
    "twin",
    [
        twins.TwoForFour,
        twins.RadiusWithoutStart,
        twins.RadiusSquareRoot,
        twins.InverseWithoutTwo,
        twins.StepsRoundedUp,
        twins.WrongPowers,
        twins.wrong_decay,
    ],
)
def test_another_time_scale_is_rejected(twin: Made) -> None:
    assert "fails" in {defect.verdict for defect in _defects(twin)}
