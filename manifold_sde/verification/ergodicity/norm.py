"""The norm in equilibrium, jointly with the direction."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.ergodicity.runs import STARTS, ErgodicRuns
from manifold_sde.verification.exact import CircleDiffusion, curve_of
from manifold_sde.verification.result import Design, Picture, Result, Series
from manifold_sde.verification.statistics import holm
from manifold_sde.verification.subject import Subject

Array = NDArray[np.float64]

NAME = "norm in equilibrium"
_STATEMENTS = ("Theorem 5.4", "Equation (10)")
#: Largest relative error of a norm that is known: that of quadratures of constants.
_ROUNDING = 1e-9


def check_norm(subject: Subject, effort: Effort) -> list[Result]:
    """The fourth power of the norm at the end of independent runs."""
    runs = ErgodicRuns.of(subject, effort)
    if not runs.is_regular:
        return []
    return [_constant(runs) if runs.trace_is_constant else _varying(runs)]


def _constant(runs: ErgodicRuns) -> Result:
    """Q = V + (q_0 - V) e^{-2T} on every path."""
    trace = float(runs.traces.mean())
    q = runs.ends.norms.numpy() ** 4
    times = runs.ends.ts.numpy()[:, None]
    expected = trace + (q[:1] - trace) * np.exp(-2.0 * times)
    error = float(np.abs(q / expected - 1.0).max())
    good = error <= _ROUNDING
    return Result(
        NAME,
        "holds" if good else "fails",
        f"V = {trace:.6g} is constant on Gamma_1, and |Y(T)|^4 = V + (|Y(0)|^4 - V) exp(-2T) up to "
        f"{error:.2g} on every path; {q[-1].mean():.6g} at T = {float(times[-1, 0]):.3g}",
        statistic=error,
        limit=_ROUNDING,
        statements=_STATEMENTS,
        kind="statistics",
        meaning="" if good else _MEANING,
        pictures=(_picture(runs, q),),
    )


def _varying(runs: ErgodicRuns) -> Result:
    """Moments of q = |Y|^4: from dq = (-2 q + 2 V) dT, and from the exact law on a curve."""
    subject, effort = runs.subject, runs.effort
    ends = torch.from_numpy(np.concatenate(list(runs.end_directions())))
    q = runs.ends.norms[-1].numpy() ** 4
    trace = subject.problem.noise_trace(ends).numpy()
    # Each is of mean 0 in equilibrium: d E q = 0 and d E q^2 = 0.
    deviations = {"E |Y|^4 = E V": q - trace, "E |Y|^8 = E V |Y|^4": q * (q - trace)}
    if isinstance(runs.law, CircleDiffusion):
        deviations |= _against_law(runs, runs.law, ends, q)
    design = Design(
        "the norm and the direction are in their joint equilibrium",
        effort.false_alarm,
        f"a mean that is off by {runs.effect:g} standard deviations",
        effort.miss,
        STARTS * runs.runs_per_start,
    )
    p_values = {}
    z = {}
    for name, values in deviations.items():
        error = float(values.std(ddof=1)) / np.sqrt(len(values))
        z[name] = float(values.mean()) / max(error, 1e-300)
        p_values[name] = float(2.0 * stats.norm.sf(abs(z[name])))
    p = float(holm(list(p_values.values())).min())
    worst = min(p_values, key=lambda name: p_values[name])
    good = p > effort.false_alarm
    return Result(
        NAME,
        "holds" if good else "fails",
        f"p = {p:.2g}; E |Y|^4 = {q.mean():.4g} and E V = {trace.mean():.4g} at the end; most off: "
        f"{worst}, by {abs(z[worst]):.1f} standard errors",
        statistic=max(map(abs, z.values())),
        limit=float(stats.norm.isf(0.5 * effort.false_alarm / len(z))),
        p_value=p,
        statements=_STATEMENTS,
        kind="statistics",
        meaning="" if good else _MEANING,
        design=design,
        tests=p_values,
        pictures=(_picture(runs, runs.ends.norms.numpy() ** 4),),
    )


_MEANING = (
    "The norm does not come to the equilibrium that the noise's trace gives it: the noise that was "
    "simulated is not that of the problem, or the runs have not mixed."
)


def _against_law(
    runs: ErgodicRuns, law: CircleDiffusion, ends: torch.Tensor, q: Array
) -> dict[str, Array]:
    curve = curve_of(runs.subject.problem, runs.subject.start)
    angle = curve.angle(ends).numpy()
    joint = law.joint_equilibrium()
    scale = joint.norm_moment(4)
    moments = {
        "the norm": lambda a, r: r**4 / scale + 0.0 * a,
        "norm times cosine": lambda a, r: r**4 / scale * np.cos(a),
        "norm times sine": lambda a, r: r**4 / scale * np.sin(a),
        "square of the norm": lambda a, r: (r**4 / scale) ** 2 + 0.0 * a,
    }
    return {
        f"{name} in the exact law": f(angle, q**0.25) - joint.expectation(f)
        for name, f in moments.items()
    }


def _picture(runs: ErgodicRuns, q: Array) -> Picture:
    times = runs.ends.ts.tolist()
    by_start = q.reshape(len(q), STARTS, -1)
    series = [
        Series(
            f"start {i + 1}",
            times,
            by_start[:, i].mean(1).tolist(),
            "points",
            (by_start[:, i].std(1) / np.sqrt(by_start.shape[2])).tolist(),
        )
        for i in range(STARTS)
    ]
    trace = runs.subject.problem.noise_trace(runs.ends.directions[-1]).numpy().mean()
    series.append(Series("E V at the end", [times[0], times[-1]], [trace, trace], "dashed"))
    return Picture(
        "The norm forgets where it started", "time T of (13)", "mean of |Y|^4", tuple(series)
    )


CHECKS = (Check(NAME, "statistics", _STATEMENTS, check_norm),)
