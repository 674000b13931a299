"""How long the direction takes to forget where it was."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from manifold_sde.errors import ManifoldSDEError
from manifold_sde.verification.exact import AngleLaw, CircleDiffusion, SphereLaw, law_of
from manifold_sde.verification.subject import Subject

Array = NDArray[np.float64]

#: Condition number of H up to which SciPy's explicit flow gives Phi for the exact law.
_SMOOTH = 20.0
#: Autocorrelations below this multiple of their standard error are not told from 0.
_SIGNIFICANT = 3.0

ExactLaw = AngleLaw | SphereLaw | CircleDiffusion


@dataclass(frozen=True)
class Relaxation:
    """The slowest of the times in which expectations settle.

    Attributes:
        clock: In the intrinsic clock u.
        time: In the time T of (13), with the norm.
        source: Where it is from, in words.
    """

    clock: float
    time: float
    source: str


def exact_law(subject: Subject) -> ExactLaw | None:
    """The exact law of the problem, if there is one.

    Phi for the coefficients on a curve is SciPy's gradient flow; where that is stiff it is the
    subject's, which the solver does not use.
    """
    problem = subject.problem
    values = torch.linalg.eigvalsh(problem.hessian(subject.start))
    positive = values[values > 1e-8 * values[-1]]
    stiff = float(values[-1] / positive[0]) > _SMOOTH

    def limit_map(x: Array) -> Array:
        return np.asarray(subject.geometry.limit_map(torch.from_numpy(x)))

    try:
        return law_of(problem, subject.start, limit_map=limit_map if stiff else None)
    except ManifoldSDEError:
        return None


def exact_relaxation(law: ExactLaw, trace: float) -> Relaxation | None:
    """The relaxation time of an exact law.

    Args:
        law: The law.
        trace: Mean of V on Gamma_1: at equilibrium dT = V du where V is constant.
    """
    norm = 0.5  # 1 / (4 c) at c = 1/2
    if isinstance(law, AngleLaw):
        clock = 2.0 * (law.radius / law.noise_scale) ** 2
        return Relaxation(clock, max(law.noise_trace * clock, norm), "exact")
    if isinstance(law, SphereLaw):
        clock = 1.0 / law.rate(1)
        return Relaxation(clock, max(law.noise_trace * clock, norm), "exact")
    try:
        clock, time = law.relaxation_time, 1.0 / law.spectral_gap_in_time()
    except ManifoldSDEError:
        return None
    return Relaxation(clock, max(time, norm), "spectral gap of the generator on the curve")


def slowest_time(values: Array, spacing: float) -> float:
    """The slowest exponential decay of autocorrelations of several functions along chains.

    At each lag the slowest decay is the largest eigenvalue of C(0)^{-1/2} C(lag) C(0)^{-1/2},
    symmetrised; the lag is the largest one at which it is told from 0.

    Args:
        values: Values (K, n, m) at K equally spaced times, of n chains and m functions, settled.
        spacing: Time between them.

    Returns:
        The time, at least that between two values over 3.
    """
    moments, chains, _ = values.shape
    centred = values - values.mean((0, 1))
    flat = centred.reshape(-1, centred.shape[-1])
    spectrum, basis = np.linalg.eigh(flat.T @ flat / len(flat))
    kept = spectrum > 1e-6 * spectrum[-1]
    white = centred @ (basis[:, kept] / np.sqrt(spectrum[kept]))
    longest = spacing / 3.0
    for lag in range(1, moments // 2):
        pairs = (moments - lag) * chains
        moved = np.einsum("kni,knj->ij", white[:-lag], white[lag:]) / pairs
        largest = float(np.linalg.eigvalsh(0.5 * (moved + moved.T))[-1])
        # Independent pairs: chains times the relaxation times that fit in.
        independent = chains * max(1.0, (moments - lag) * spacing / (2.0 * longest))
        if largest <= _SIGNIFICANT / math.sqrt(independent):
            break
        longest = max(longest, lag * spacing / max(-math.log(min(largest, 0.9999)), 1e-4))
    return longest
