"""The law of the direction at several clocks against the exact law."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from manifold_sde.sdes import DirectionDiffusion
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.ergodicity.relaxation import ExactLaw
from manifold_sde.verification.ergodicity.runs import ErgodicRuns
from manifold_sde.verification.exact import AngleLaw, PeriodicLaw, SphereLaw, curve_of
from manifold_sde.verification.exact.wrapped_normal import WrappedNormal
from manifold_sde.verification.result import Design, Picture, Result, Series
from manifold_sde.verification.statistics import holm, watson_test
from manifold_sde.verification.subject import Subject

Array = NDArray[np.float64]

NAME = "laws of the direction against the exact law"
_STATEMENTS = ("Equation (13)",)
#: The clocks, in relaxation times, and steps in one.
_CLOCKS = (0.25, 0.75, 1.5)
_STEPS = 8
#: Degrees of the harmonics that are tested on spheres.
_DEGREES = (1, 2, 3)
_USE = 141


def clocks(runs: ErgodicRuns) -> list[float]:
    """The clocks u at which the laws are compared."""
    return [runs.relaxation.clock * clock for clock in _CLOCKS]


def sample_size(runs: ErgodicRuns, *, on_sphere: bool) -> int:
    """Runs that find a mean of a low harmonic that is off by the effect.

    Watson's test spends its power on some four moments of the angle: with twice the runs that the
    mean of one of them takes, its power is at least what is declared (a test measures it).
    """
    if on_sphere:
        return runs.runs(2 * len(_CLOCKS) * len(_DEGREES), 1.5)
    return runs.runs(4 * len(_CLOCKS), 2.0)


def check_end_law(subject: Subject, effort: Effort) -> list[Result]:
    """Watson's test on curves, means of zonal harmonics on spheres."""
    runs = ErgodicRuns.of(subject, effort)
    if not runs.is_regular or runs.law is None:
        return []
    law = runs.law
    n = sample_size(runs, on_sphere=isinstance(law, SphereLaw))
    design = Design(
        "the direction has the exact law at the clock u, from one start",
        effort.false_alarm,
        f"a mean of a low harmonic off by {runs.effect:g} standard deviations",
        effort.miss,
        n,
        runs.effect,
    )
    relaxation = runs.relaxation.clock
    times = [0.0, *clocks(runs)]
    refine = max(1.0, math.sqrt(0.25 / effort.departure))
    solution = subject.solve(
        DirectionDiffusion(subject.problem),
        subject.start,
        times,
        n_paths=n,
        dt=min(relaxation / _STEPS, 0.5 * runs.local_step) / refine,
        seed=runs.seed("early"),
        compile="auto" if effort.departure < 0.2 else False,
    )
    pictures: tuple[Picture, ...] = ()
    if isinstance(law, SphereLaw):
        p_values = _on_sphere(subject, law, solution.directions[1:].numpy(), times[1:])
    else:
        p_values, pictures = _on_curve(subject, law, solution.directions[1:], times[1:])
    p = float(holm(list(p_values.values())).min())
    worst = min(p_values, key=lambda name: p_values[name])
    good = p > effort.false_alarm
    kind = type(law).__name__
    return [
        Result(
            NAME,
            "holds" if good else "fails",
            f"p = {p:.2g} of {n} runs against {kind} at the clocks "
            f"{', '.join(f'{u:.3g}' for u in times[1:])}; least at {worst}",
            statistic=1.0 - p,
            limit=1.0 - effort.false_alarm,
            p_value=p,
            statements=_STATEMENTS,
            kind="statistics",
            meaning=""
            if good
            else "The solver's direction does not have the law that the equation has: drift, noise "
            "or scheme are wrong, or its step is too large.",
            design=design,
            tests=p_values,
            pictures=pictures,
        )
    ]


def _on_curve(
    subject: Subject, law: ExactLaw, directions: Tensor, times: list[float]
) -> tuple[dict[str, float], tuple[Picture, ...]]:
    assert not isinstance(law, SphereLaw)
    curve = curve_of(subject.problem, subject.start)
    start = float(curve.angle(subject.start))
    p_values = {}
    series = []
    fine = np.linspace(-math.pi, math.pi, 121)
    edges = np.linspace(-math.pi, math.pi, 19)
    width = edges[1] - edges[0]
    for u, states in zip(times, directions, strict=True):
        exact: WrappedNormal | PeriodicLaw
        exact = law.at_clock(u) if isinstance(law, AngleLaw) else law.at_clock(u, start)
        angles = curve.angle(states).numpy()
        p_values[f"u = {u:.3g}"] = float(watson_test(angles, exact.cdf).p_value)
        counts = np.histogram(angles, edges)[0]
        series += [
            Series(f"exact, u = {u:.3g}", fine.tolist(), exact.density(fine).tolist()),
            Series(
                "runs",
                (0.5 * (edges[1:] + edges[:-1])).tolist(),
                (counts / len(angles) / width).tolist(),
                "points",
                (np.sqrt(counts) / len(angles) / width).tolist(),
            ),
        ]
    picture = Picture(
        "Law of the direction", "angle along Gamma_1 (radians)", "density", tuple(series)
    )
    return p_values, (picture,)


def _on_sphere(
    subject: Subject, law: SphereLaw, directions: Array, times: list[float]
) -> dict[str, float]:
    other = law.tangent.T @ (law.tangent @ subject.normals(_USE, subject.problem.dim).numpy())
    poles = {"the start": law.start, "another pole": other / np.linalg.norm(other)}
    p_values = {}
    for u, states in zip(times, directions, strict=True):
        for name, pole in poles.items():
            for degree in _DEGREES:
                values = law.zonal(degree, states @ pole)
                error = float(values.std(ddof=1)) / math.sqrt(len(values))
                z = (float(values.mean()) - law.zonal_mean(degree, pole, u)) / error
                label = f"u = {u:.3g}, degree {degree} about {name}"
                p_values[label] = float(2.0 * stats.norm.sf(abs(z)))
    return p_values


CHECKS = (Check(NAME, "statistics", _STATEMENTS, check_end_law),)
