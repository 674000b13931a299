"""SGD and the SDE (3) against the limiting diffusions: Theorems 3.2, 4.1 and 4.4."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from manifold_sde.paper import implements
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.limit_theorems.comparison import (
    Side,
    compare,
    design,
    shares_of,
)
from manifold_sde.verification.limit_theorems.regime import Rates
from manifold_sde.verification.limit_theorems.simulations import Simulations
from manifold_sde.verification.result import Result
from manifold_sde.verification.subject import Subject

#: Factors of the steps of the two runs of the SDE (3), which costs more than SGD.
_OF_SDE = (2, 4)
#: Whole steps of SGD at a time that rounding puts just below them.
_ROUNDING = 1e-9


@implements("Theorem 3.2")
def sgd_at_fixed_ratio(subject: Subject, effort: Effort) -> Sequence[Result]:
    """SGD after t / eta^2 steps at lambda = C eta, against (8) at t."""
    simulations = Simulations.of(subject, effort)
    regime = simulations.regime
    rates = regime.runs[0]
    shares = shares_of(1, (regime.coarseness,))
    made = design(
        simulations,
        f"Phi of SGD's weights after t / eta^2 steps at lambda / eta = {rates.ratio:.3g} has the "
        f"law of (8) at t up to {rates.times[-1]:.3g}, as eta goes to 0",
        shares,
    )
    coarser = rates.coarser(regime.coarseness)
    fine, coarse = simulations.sgd(rates, 110), simulations.sgd(coarser, 111)
    diffusion = simulations.diffusion(rates.ratio, rates.times, 112)
    return [
        compare(
            simulations,
            SGD_AT_FIXED_RATIO.name,
            SGD_AT_FIXED_RATIO.statements,
            made,
            Side("SGD", fine, coarse, regime.coarseness),
            Side("diffusion (8)", diffusion),
            shares,
            norms=True,
            wrong="SGD does not tend to the diffusion (8): the noise that its steps draw, or Phi, "
            "its second derivative or sigma in the drift of (8), is not that of this problem.",
        )
    ]


def general_times(simulations: Simulations) -> tuple[float, ...]:
    """Times T of (13) at the moments, for a start of norm 1."""
    return tuple(0.5 * math.log1p(2.0 * t) for t in simulations.regime.elapsed)


def steps_at(simulations: Simulations, rates: Rates, times: tuple[float, ...]) -> Rates:
    """The rates with the step counts that the time scale says for T."""
    scale = simulations.subject.time_scale(rates.lr, rates.weight_decay)
    counts = np.asarray(scale.steps(np.array(times) * (1.0 + _ROUNDING)))
    return replace(rates, counts=tuple(int(k) for k in counts))


def rescaled(simulations: Simulations, rates: Rates, use: int) -> Tensor:
    """Phi of SGD's weights, divided by R."""
    radius = simulations.subject.time_scale(rates.lr, rates.weight_decay).radius
    values = simulations.sgd(rates, use)
    return values / values.new_tensor([float(radius(k)) for k in rates.counts])[:, None, None]


@implements("Theorem 4.4")
def sgd_in_general(subject: Subject, effort: Effort) -> Sequence[Result]:
    """SGD after floor(tau^{-1}(T)) steps, divided by R, against (13) at T."""
    simulations = Simulations.of(subject, effort)
    regime = simulations.regime
    shares = shares_of(1, (regime.coarseness,))
    times = general_times(simulations)
    rates = steps_at(simulations, regime.runs[1], times)
    coarser = steps_at(simulations, rates.coarser(regime.coarseness), times)
    made = design(
        simulations,
        f"Phi of SGD's weights after floor(tau^-1(T)) steps, divided by R, has the law of (13) at "
        f"T up to {times[-1]:.3g}, as eta lambda goes to 0 (eta = {rates.lr:.2g}, "
        f"lambda = {rates.weight_decay:.2g})",
        shares,
    )
    fine, coarse = (rescaled(simulations, r, use) for r, use in ((rates, 113), (coarser, 114)))
    return [
        compare(
            simulations,
            SGD_IN_GENERAL.name,
            SGD_IN_GENERAL.statements,
            made,
            Side("SGD", fine, coarse, regime.coarseness),
            Side("diffusion (13)", simulations.limiting(times, 115)),
            shares,
            norms=True,
            wrong="SGD, divided by R in the time tau, does not tend to (13): the noise, the "
            "weight decay or the learning rate of the steps, R or tau is not what the theory says.",
        )
    ]


@implements("Theorem 4.1")
def sde_in_general(subject: Subject, effort: Effort) -> Sequence[Result]:
    """The SDE (3) at tau^{-1}(T), divided by R, against (13) at T."""
    simulations = Simulations.of(subject, effort)
    shares = (1.0, 5.0)
    times = general_times(simulations)
    first, second = (simulations.regime.runs[1].coarser(c) for c in _OF_SDE)
    made = design(
        simulations,
        "Phi of the SDE (3) at tau^-1(T), divided by R, has the law of (13) at T up to "
        f"{times[-1]:.3g}, as eta lambda goes to 0 (eta = {first.lr:.2g}, "
        f"lambda = {first.weight_decay:.2g})",
        shares,
    )
    states = []
    for rates, use in ((first, 116), (second, 117)):
        scale = subject.time_scale(rates.lr, rates.weight_decay)
        moments = tuple(float(t) for t in scale.tau_inverse(np.array(times)))
        found = simulations.continuous(rates, moments, use)
        radius = found.new_tensor([float(scale.radius(t)) for t in moments])
        states.append(found / radius[:, None, None])
    return [
        compare(
            simulations,
            SDE_IN_GENERAL.name,
            SDE_IN_GENERAL.statements,
            made,
            Side("SDE (3)", states[0], states[1], _OF_SDE[1] // _OF_SDE[0]),
            Side("diffusion (13)", simulations.limiting(times, 115)),
            shares,
            norms=True,
            wrong="The SDE (3), divided by R in the time tau, does not tend to (13): R, tau, "
            "sigma, or Phi and its second derivative is not what the theory says.",
        )
    ]


SGD_AT_FIXED_RATIO = Check(
    "SGD at a fixed ratio tends to (8)",
    "statistics",
    ("Theorem 3.2", "Equation (8)"),
    sgd_at_fixed_ratio,
)
SGD_IN_GENERAL = Check(
    "SGD in the time tau tends to (13)",
    "statistics",
    ("Theorem 4.4", "Equation (11)", "Equation (12)", "Equation (13)"),
    sgd_in_general,
)
SDE_IN_GENERAL = Check(
    "the SDE of SGD in the time tau tends to (13)",
    "statistics",
    ("Theorem 4.1", "Equation (3)", "Equation (13)"),
    sde_in_general,
)
CHECKS = (SGD_AT_FIXED_RATIO, SGD_IN_GENERAL, SDE_IN_GENERAL)
