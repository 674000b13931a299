"""What weight decay does: Theorem 3.2's change of time, Remark 3.3, and Theorem 5.5's one law."""

from __future__ import annotations

import math
from collections.abc import Sequence

from manifold_sde.paper import implements
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.limit_theorems.comparison import Side, compare, design, shares_of
from manifold_sde.verification.limit_theorems.convergence import general_times, steps_at
from manifold_sde.verification.limit_theorems.regime import Rates
from manifold_sde.verification.limit_theorems.simulations import Simulations
from manifold_sde.verification.result import Result
from manifold_sde.verification.subject import Subject


@implements("Theorem 3.2")
def diffusions_at_two_ratios(subject: Subject, effort: Effort) -> Sequence[Result]:
    """Y_C(t) against Y_0((e^{4Ct} - 1) / 4C) e^{-Ct}, each solved in its own time."""
    simulations = Simulations.of(subject, effort)
    rates = simulations.regime.runs[0]
    shares = shares_of(2, ())
    made = design(
        simulations,
        f"Y_C(t) and Y_0((e^(4Ct) - 1) / 4C) e^(-Ct) have one law at C = {rates.ratio:.3g}, "
        f"t up to {rates.times[-1]:.3g}",
        shares,
    )
    decaying = simulations.diffusion(rates.ratio, rates.times, 112)
    free = simulations.diffusion(0.0, simulations.regime.elapsed, 118)
    shrunk = (
        free * free.new_tensor([math.exp(-rates.ratio * t) for t in rates.times])[:, None, None]
    )
    return [
        compare(
            simulations,
            DIFFUSIONS_AT_TWO_RATIOS.name,
            DIFFUSIONS_AT_TWO_RATIOS.statements,
            made,
            Side("Y_C", decaying),
            Side("Y_0 with its time changed", shrunk),
            shares,
            norms=True,
            exact=True,
            wrong="The diffusions at two ratios are not one process with time and norm changed: "
            "the noise is not (-1)-homogeneous, or (8) is not solved rightly at one of them.",
        )
    ]


@implements("Remark 3.3")
def sgd_without_weight_decay(subject: Subject, effort: Effort) -> Sequence[Result]:
    """SGD at lambda = 0, exponentially later, against SGD with weight decay."""
    simulations = Simulations.of(subject, effort)
    regime = simulations.regime
    rates = regime.runs[0]
    c = regime.coarseness
    counts = tuple(round(t / rates.lr**2) for t in regime.elapsed)
    free = Rates(rates.lr, 0.0, counts)
    coarse = Rates(c * rates.lr, 0.0, tuple(max(1, round(k / c**2)) for k in counts))
    shares = shares_of(0, (c, c))
    made = design(
        simulations,
        "the directions of SGD without weight decay after (e^(4Ct) - 1) / 4C / eta^2 = "
        f"{counts[-1]} steps have the law of those with it after t / eta^2 = {rates.counts[-1]}",
        shares,
    )
    later = f"SGD without, {counts[-1] / rates.counts[-1]:.2f} times the steps"
    sides = [
        Side(label, simulations.sgd(fine, use), simulations.sgd(large, use + 1), c)
        for label, fine, large, use in (
            ("SGD with weight decay", rates, rates.coarser(c), 110),
            (later, free, coarse, 119),
        )
    ]
    return [
        compare(
            simulations,
            SGD_WITHOUT_WEIGHT_DECAY.name,
            SGD_WITHOUT_WEIGHT_DECAY.statements,
            made,
            sides[0],
            sides[1],
            shares,
            norms=False,
            wrong="Weight decay does more here than change time and norm: the loss or the noise "
            "is not scale-invariant, or the steps do not decay as they say.",
        )
    ]


@implements("Theorem 5.5")
def sgd_at_two_rates(subject: Subject, effort: Effort) -> Sequence[Result]:
    """SGD at two pairs of rates, each at its own steps for the same T."""
    simulations = Simulations.of(subject, effort)
    regime = simulations.regime
    c = regime.coarseness
    times = general_times(simulations)
    shares = shares_of(0, (c, c))
    pairs = [steps_at(simulations, rates, times) for rates in regime.runs]
    shown = " and ".join(
        f"{r.counts[-1]} steps at eta = {r.lr:.2g}, lambda = {r.weight_decay:.2g}" for r in pairs
    )
    made = design(
        simulations,
        f"the directions of SGD have one law after {shown}, both at T = {times[-1]:.3g}",
        shares,
    )
    sides = []
    for rates, use in zip(pairs, (110, 113), strict=True):
        coarser = steps_at(simulations, rates.coarser(c), times)
        fine, coarse = simulations.sgd(rates, use), simulations.sgd(coarser, use + 1)
        sides.append(Side(f"SGD at eta = {rates.lr:.2g}", fine, coarse, c))
    return [
        compare(
            simulations,
            SGD_AT_TWO_RATES.name,
            SGD_AT_TWO_RATES.statements,
            made,
            sides[0],
            sides[1],
            shares,
            norms=False,
            wrong="The directions depend on more than T: the time scale, the learning rate or the "
            "weight decay is not what the steps have.",
        )
    ]


DIFFUSIONS_AT_TWO_RATIOS = Check(
    "weight decay changes time and norm of (8)",
    "statistics",
    ("Theorem 3.2", "Equation (8)"),
    diffusions_at_two_ratios,
)
SGD_WITHOUT_WEIGHT_DECAY = Check(
    "SGD without weight decay comes later",
    "statistics",
    ("Remark 3.3",),
    sgd_without_weight_decay,
)
SGD_AT_TWO_RATES = Check(
    "SGD at two pairs of rates has one law", "statistics", ("Theorem 5.5",), sgd_at_two_rates
)
CHECKS = (DIFFUSIONS_AT_TWO_RATIOS, SGD_WITHOUT_WEIGHT_DECAY, SGD_AT_TWO_RATES)
