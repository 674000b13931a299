"""The noise of (18): is the equilibrium pdet(H)^{-1/2} times the volume?"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from manifold_sde.errors import ManifoldSDEError
from manifold_sde.noise import SphericalNoise
from manifold_sde.paper import implements
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.ergodicity.runs import STARTS, ErgodicRuns
from manifold_sde.verification.exact import ReversibleLaw, curve_of
from manifold_sde.verification.result import Design, Picture, Result, Series
from manifold_sde.verification.statistics import holm, watson_test
from manifold_sde.verification.subject import Subject

Array = NDArray[np.float64]

NAME = "equilibrium and the volume of the Hessian"
_STATEMENTS = ("Theorem 5.4", "Remark 6.1")
#: Step of the differences along the manifold, and weights at -2, -1, 0, 1, 2 of order four.
_STEP = 0.03
_FIRST = (1 / 12, -8 / 12, 0.0, 8 / 12, -1 / 12)
_SECOND = (-1 / 12, 16 / 12, -30 / 12, 16 / 12, -1 / 12)


def generator_values(subject: Subject, points: Tensor, runs: ErgodicRuns) -> Array:
    r"""Delta f - <grad log pdet H, grad f> / 2 on Gamma_1, for each declared f: (n, m).

    Its mean under the density pdet(H)^{-1/2} against the volume is 0, whatever f. For orthonormal
    tangent vectors e_i at y, with R the way back to Gamma_1,

    .. math::

        \Delta f = \sum_i \frac{d^2}{dh^2} f(R(y + h e_i)), \qquad
        \langle\nabla g, \nabla f\rangle
        = \sum_i \frac{d}{dh} g(R(y + h e_i)) \frac{d}{dh} f(R(y + h e_i)),

    by differences of order four: no formula of the solver's drift is in it.

    Args:
        subject: The subject.
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
def check_reversible(subject: Subject, effort: Effort) -> list[Result]:
    """Test the end of independent runs against the density."""
    runs = ErgodicRuns.of(subject, effort)
    if not runs.is_regular or type(subject.problem.noise) is not SphericalNoise:
        return []
    names = list(runs.functionals)
    curve = runs.degeneracy.manifold_dim == 1
    ends = np.concatenate(list(runs.end_directions()))
    design = Design(
        "the law at the end has the density pdet(H)^(-1/2) against the volume of Gamma_1",
        effort.false_alarm,
        f"a mean of the generator applied to a declared function of {runs.effect:g} standard "
        "deviations, in place of 0",
        effort.miss,
        STARTS * runs.runs_per_start,
        runs.effect,
    )
    values = generator_values(subject, torch.from_numpy(ends), runs)
    spread = values.std(0, ddof=1)
    size = np.abs(values).max(0)
    # Where pdet H is constant and f linear, values can vanish: rounding of the differences.
    error = np.maximum(spread / np.sqrt(len(ends)), 1e-8 * np.maximum(size, 1e-8))
    z = values.mean(0) / error
    p_values = {name: float(2 * stats.norm.sf(abs(v))) for name, v in zip(names, z, strict=True)}
    pictures: tuple[Picture, ...] = ()
    if curve:
        p_values["the density (Watson)"], pictures = _along_curve(subject, ends)
    p = float(holm(list(p_values.values())).min())
    worst = min(p_values, key=lambda name: p_values[name])
    good = p > effort.false_alarm
    return [
        Result(
            NAME,
            "holds" if good else "fails",
            f"p = {p:.2g} at the end of {len(ends)} runs; least in {worst}; largest mean of the "
            f"generator {np.abs(z).max():.1f} standard errors",
            statistic=float(np.abs(z).max()),
            limit=float(stats.norm.isf(0.5 * effort.false_alarm / len(p_values))),
            p_value=p,
            statements=_STATEMENTS,
            kind="statistics",
            meaning=""
            if good
            else "The runs end in another law than the noise of (18) leads to: the drift along the "
            "manifold is wrong, or the runs have not mixed.",
            design=design,
            tests=p_values,
            pictures=pictures,
        )
    ]


def _along_curve(subject: Subject, ends: Array) -> tuple[float, tuple[Picture, ...]]:
    try:
        curve = curve_of(subject.problem, subject.start)
        law = ReversibleLaw.of(
            subject.problem,
            lambda angles: curve.point(torch.from_numpy(angles)).numpy(),
            dimension=1,
            log_pseudo_determinant=subject.geometry.log_pseudo_determinant,
        ).periodic
    except ManifoldSDEError:
        return 1.0, ()  # the curve cannot be traced: the generator decides alone
    angles = curve.angle(torch.from_numpy(ends)).numpy()
    p = float(watson_test(angles, law.cdf).p_value)
    edges = np.linspace(-np.pi, np.pi, 25)
    middles = 0.5 * (edges[1:] + edges[:-1])
    counts = np.histogram(angles, edges)[0]
    width = edges[1] - edges[0]
    fine = np.linspace(-np.pi, np.pi, 121)
    picture = Picture(
        "Law of the direction at the end of the runs",
        "angle along Gamma_1 (radians)",
        "density",
        (
            Series("pdet(H)^(-1/2) dvol", fine.tolist(), law.density(fine).tolist()),
            Series(
                "runs",
                middles.tolist(),
                (counts / len(angles) / width).tolist(),
                "points",
                (np.sqrt(counts) / len(angles) / width).tolist(),
            ),
        ),
    )
    return p, (picture,)


CHECKS = (Check(NAME, "statistics", _STATEMENTS, check_reversible),)
