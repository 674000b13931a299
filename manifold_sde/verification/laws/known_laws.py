"""Laws of the direction and the norm that are known: the solver's runs against them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from manifold_sde.errors import ManifoldSDEError
from manifold_sde.noise import SphericalNoise
from manifold_sde.paper import implements
from manifold_sde.sdes import DirectionDiffusion
from manifold_sde.verification.exact import (
    AngleLaw,
    CircleDiffusion,
    PeriodicLaw,
    ReversibleLaw,
    SphereLaw,
    curve_of,
)
from manifold_sde.verification.exact.wrapped_normal import WrappedNormal
from manifold_sde.verification.laws.engine import (
    Array,
    Tests,
    densities,
    judged,
    law,
    mean_and_error,
    mean_p_value,
    means_by_start,
    planned,
)
from manifold_sde.verification.laws.long_runs import STARTS, LongRuns
from manifold_sde.verification.result import Design, Picture, Result, Series, found
from manifold_sde.verification.statistics import watson_test
from manifold_sde.verification.subject import Subject

#: The clocks of the exact law, in relaxation times, and steps in one.
_CLOCKS, _STEPS = (0.25, 0.75, 1.5), 8
#: Degrees of the harmonics that are tested on spheres, and the random numbers of their pole.
_DEGREES, _USE = (1, 2, 3), 141
#: Step of the differences along the manifold, and weights at -2, -1, 0, 1, 2 of order four.
_STEP = 0.03
_FIRST = (1 / 12, -8 / 12, 0.0, 8 / 12, -1 / 12)
_SECOND = (-1 / 12, 16 / 12, -30 / 12, 16 / 12, -1 / 12)
#: Largest relative error of a norm that is known: that of quadratures of constants.
_ROUNDING = 1e-9


# The exact law.


def clocks(runs: LongRuns) -> list[float]:
    """The clocks u at which the laws are compared."""
    return [runs.relaxation.clock * clock for clock in _CLOCKS]


def sample_size(runs: LongRuns, *, on_sphere: bool) -> int:
    """Runs that find a mean of a low harmonic that is off by the effect.

    Watson's test spends its power on some four moments of the angle: with twice the runs that the
    mean of one of them takes, its power is at least what is declared (a test measures it).
    """
    if on_sphere:
        return runs.runs(2 * len(_CLOCKS) * len(_DEGREES), 1.5)
    return runs.runs(4 * len(_CLOCKS), 2.0)


def exact_law(runs: LongRuns, made: Design) -> Result:
    """Watson's test on curves, means of zonal harmonics on spheres."""
    subject, n, departure = runs.subject, made.sample_size, runs.effort.departure
    times = [0.0, *clocks(runs)]
    solution = subject.solve(
        DirectionDiffusion(subject.problem),
        subject.start,
        times,
        n_paths=n,
        dt=min(runs.relaxation.clock / _STEPS, 0.5 * runs.local_step)
        / max(1.0, math.sqrt(0.25 / departure)),
        seed=runs.seed("early"),
        compile="auto" if departure < 0.2 else False,
    )
    states = dict(zip(times[1:], solution.directions[1:], strict=True))
    on = _on_sphere if isinstance(runs.law, SphereLaw) else _on_curve
    p_values, pictures = on(subject, runs.law, states)
    tests = Tests(p_values, made.false_alarm)
    detail = (
        f"p = {tests.p:.2g} of {n} runs against {type(runs.law).__name__} at the clocks "
        f"{', '.join(f'{u:.3g}' for u in times[1:])}; least at {tests.worst}"
    )
    return judged(tests, made, detail, pictures=pictures)


def _on_curve(
    subject: Subject, known: Any, states: dict[float, Tensor]
) -> tuple[dict[str, float], tuple[Picture, ...]]:
    curve = curve_of(subject.problem, subject.start)
    start = float(curve.angle(subject.start))
    p_values: dict[str, float] = {}
    series: list[Series] = []
    for u, directions in states.items():
        exact: WrappedNormal | PeriodicLaw
        exact = known.at_clock(u) if isinstance(known, AngleLaw) else known.at_clock(u, start)
        angles = curve.angle(directions).numpy()
        p_values[f"u = {u:.3g}"] = float(watson_test(angles, exact.cdf).p_value)
        series += densities(f"exact, u = {u:.3g}", angles, exact.density, 18)
    picture = Picture(
        "Law of the direction", "angle along Gamma_1 (radians)", "density", tuple(series)
    )
    return p_values, (picture,)


def _on_sphere(
    subject: Subject, known: SphereLaw, states: dict[float, Tensor]
) -> tuple[dict[str, float], tuple[Picture, ...]]:
    other = known.tangent.T @ (known.tangent @ subject.normals(_USE, subject.problem.dim).numpy())
    poles = {"the start": known.start, "another pole": other / np.linalg.norm(other)}
    p_values = {}
    for u, directions in states.items():
        for name, pole in poles.items():
            for degree in _DEGREES:
                mean, error = mean_and_error(known.zonal(degree, directions.numpy() @ pole))
                label = f"u = {u:.3g}, degree {degree} about {name}"
                p_values[label] = mean_p_value(mean - known.zonal_mean(degree, pole, u), error)
    return p_values, ()


# The volume of the Hessian.


def generator_values(subject: Subject, points: Tensor, runs: LongRuns) -> Array:
    r"""Delta f - <grad log pdet H, grad f> / 2 on Gamma_1, for each declared f: (n, m).

    Its mean under the density pdet(H)^{-1/2} against the volume is 0, whatever f. For orthonormal
    tangent vectors e_i at y, with R the way back to Gamma_1,

    .. math::

        \Delta f = \sum_i \frac{d^2}{dh^2} f(R(y + h e_i)), \qquad
        \langle\nabla g, \nabla f\rangle
        = \sum_i \frac{d}{dh} g(R(y + h e_i)) \frac{d}{dh} f(R(y + h e_i)),

    by differences of order four: no formula of the solver's drift is in it.

    Args:
        subject: The system under test.
        points: Points of Gamma_1, (n, D).
        runs: What is declared.
    """
    dimension = runs.degeneracy.manifold_dim
    vectors = torch.linalg.eigh(subject.problem.hessian(points))[1][..., : dimension + 1]
    across = vectors - points[:, :, None] * (points[:, None] @ vectors)
    basis = torch.linalg.svd(across, full_matrices=False)[0][..., :dimension]
    n, dim = points.shape
    offsets = _STEP * torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=points.dtype)
    moved = points[:, None, None] + offsets[:, None] * basis.mT[:, :, None]  # (n, d, 5, D)
    moved = subject.geometry.retract(moved.reshape(-1, dim))
    moved = moved / moved.norm(dim=1, keepdim=True)
    g = subject.geometry.log_pseudo_determinant(moved).numpy().reshape(n, dimension, 5)
    f = runs.functionals.table(moved).reshape(n, dimension, 5, -1)
    second = np.einsum("k,ndkm->nm", _SECOND, f) / _STEP**2
    slope_f = np.einsum("k,ndkm->ndm", _FIRST, f) / _STEP
    slope_g = np.einsum("k,ndk->nd", _FIRST, g) / _STEP
    return np.asarray(second - 0.5 * np.einsum("nd,ndm->nm", slope_g, slope_f))


@implements("Remark 6.1")
def volume_of_hessian(runs: LongRuns, made: Design) -> Result:
    """With the noise of (18) the equilibrium is pdet(H)^{-1/2} times the volume."""
    ends = runs.all_ends()
    values = generator_values(runs.subject, torch.from_numpy(ends), runs)
    # Where pdet H is constant and f linear, values can vanish: rounding of the differences.
    rounding = 1e-8 * np.maximum(np.abs(values).max(0), 1e-8)
    error = np.maximum(values.std(0, ddof=1) / np.sqrt(len(ends)), rounding)
    z = np.abs(values.mean(0) / error)
    p_values = dict(zip(runs.functionals, (2.0 * stats.norm.sf(z)).tolist(), strict=True))
    pictures: tuple[Picture, ...] = ()
    if runs.degeneracy.manifold_dim == 1:
        p_values["the density (Watson)"], pictures = _along_curve(runs.subject, ends)
    tests = Tests(p_values, made.false_alarm)
    return judged(
        tests,
        made,
        f"p = {tests.p:.2g} at the end of {len(ends)} runs; least in {tests.worst}; largest mean "
        f"of the generator {z.max():.1f} standard errors",
        statistic=float(z.max()),
        limit=float(stats.norm.isf(0.5 * made.false_alarm / len(p_values))),
        pictures=pictures,
    )


def _along_curve(subject: Subject, ends: Array) -> tuple[float, tuple[Picture, ...]]:
    try:
        curve = curve_of(subject.problem, subject.start)
        exact = ReversibleLaw.of(
            subject.problem,
            lambda angles: curve.point(torch.from_numpy(angles)).numpy(),
            dimension=1,
            log_pseudo_determinant=subject.geometry.log_pseudo_determinant,
        ).periodic
    except ManifoldSDEError:
        return 1.0, ()  # the curve cannot be traced: the generator decides alone
    angles = curve.angle(torch.from_numpy(ends)).numpy()
    picture = Picture(
        "Law of the direction at the end of the runs",
        "angle along Gamma_1 (radians)",
        "density",
        densities("pdet(H)^(-1/2) dvol", angles, exact.density, 24),
    )
    return float(watson_test(angles, exact.cdf).p_value), (picture,)


# The norm.


def norm_at_rest(runs: LongRuns, made: Design | None) -> Result:
    """Where V is constant q = |Y|^4 is V + (q_0 - V) e^{-2T} on every path; else its moments.

    From dq = (-2 q + 2 V) dT the means of q - V and of q (q - V) are 0 in equilibrium.
    """
    q, times = runs.ends.norms.numpy() ** 4, runs.ends.ts.tolist()
    pictures = (_norms_in_time(runs, q, times),)
    if made is None:
        v = float(runs.traces.mean())
        expected = v + (q[:1] - v) * np.exp(-2.0 * np.array(times)[:, None])
        error = float(np.abs(q / expected - 1.0).max())
        return found(
            "holds" if error <= _ROUNDING else "fails",
            f"V = {v:.6g} is constant on Gamma_1, and |Y(T)|^4 = V + (|Y(0)|^4 - V) exp(-2T) "
            f"up to {error:.2g} on every path; {q[-1].mean():.6g} at T = {times[-1]:.3g}",
            statistic=error,
            limit=_ROUNDING,
            pictures=pictures,
        )
    ends, last = torch.from_numpy(runs.all_ends()), q[-1]
    trace = runs.subject.problem.noise_trace(ends).numpy()
    apart = {"E |Y|^4 = E V": last - trace, "E |Y|^8 = E V |Y|^4": last * (last - trace)}
    if isinstance(runs.law, CircleDiffusion):
        apart |= _against_joint_law(runs.subject, runs.law, ends, last)
    means = {name: mean_and_error(values) for name, values in apart.items()}
    z = {name: abs(mean) / max(error, 1e-300) for name, (mean, error) in means.items()}
    tests = Tests({name: mean_p_value(*pair) for name, pair in means.items()}, made.false_alarm)
    return judged(
        tests,
        made,
        f"p = {tests.p:.2g}; E |Y|^4 = {last.mean():.4g} and E V = {trace.mean():.4g} at the end; "
        f"most off: {tests.worst}, by {z[tests.worst]:.1f} standard errors",
        statistic=max(z.values()),
        limit=float(stats.norm.isf(0.5 * made.false_alarm / len(z))),
        pictures=pictures,
    )


def _against_joint_law(
    subject: Subject, known: CircleDiffusion, ends: Tensor, q: Array
) -> dict[str, Array]:
    """Moments of the norm and the angle less those of the exact law, each (n,)."""
    angle = curve_of(subject.problem, subject.start).angle(ends).numpy()
    joint = known.joint_equilibrium()
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


def _norms_in_time(runs: LongRuns, q: Array, times: list[float]) -> Picture:
    trace = float(runs.subject.problem.noise_trace(runs.ends.directions[-1]).mean())
    return Picture(
        "The norm forgets where it started",
        "time T of (13)",
        "mean of |Y|^4",
        (
            *means_by_start(times, q, STARTS),
            Series("E V at the end", [times[0], times[-1]], [trace, trace], "dashed"),
        ),
    )


EXACT_LAW = law(
    "laws of the direction against the exact law",
    ("Equation (13)",),
    LongRuns,
    planned(
        "the direction has the exact law at the clock u, from one start",
        "a mean of a low harmonic off by {size:g} standard deviations",
        lambda runs: sample_size(runs, on_sphere=isinstance(runs.law, SphereLaw)),
        lambda runs: runs.effect,
    ),
    exact_law,
    "The solver's direction does not have the law that the equation has: drift, noise or scheme "
    "are wrong, or its step is too large.",
    applies=lambda runs: runs.is_regular and runs.law is not None,
)
VOLUME_OF_HESSIAN = law(
    "equilibrium and the volume of the Hessian",
    ("Theorem 5.4", "Remark 6.1"),
    LongRuns,
    planned(
        "the law at the end has the density pdet(H)^(-1/2) against the volume of Gamma_1",
        "a mean of the generator applied to a declared function of {size:g} standard deviations, "
        "in place of 0",
        lambda runs: STARTS * runs.runs_per_start,
        lambda runs: runs.effect,
    ),
    volume_of_hessian,
    "The runs end in another law than the noise of (18) leads to: the drift along the manifold is "
    "wrong, or the runs have not mixed.",
    applies=lambda runs: runs.is_regular and type(runs.subject.problem.noise) is SphericalNoise,
)
NORM_AT_REST = law(
    "norm in equilibrium",
    ("Theorem 5.4", "Equation (10)"),
    LongRuns,
    planned(
        "the norm and the direction are in their joint equilibrium",
        "a mean that is off by {runs.effect:g} standard deviations",
        lambda runs: STARTS * runs.runs_per_start,
        when=lambda runs: not runs.trace_is_constant,
    ),
    norm_at_rest,
    "The norm does not come to the equilibrium that the noise's trace gives it: the noise that was "
    "simulated is not that of the problem, or the runs have not mixed.",
)
