"""Exact laws: the truth that simulations are measured against."""

from manifold_sde.verification.exact.angle_law import AngleLaw
from manifold_sde.verification.exact.applicable import Convergence, convergence, curve_of, law_of
from manifold_sde.verification.exact.circle_diffusion import CircleDiffusion
from manifold_sde.verification.exact.gaps import SpectralGap, spectral_gap
from manifold_sde.verification.exact.periodic_law import CircleNormLaw, PeriodicLaw
from manifold_sde.verification.exact.reversible_law import ReversibleLaw
from manifold_sde.verification.exact.sphere_law import SphereLaw
from manifold_sde.verification.exact.traced_curve import TracedCurve
from manifold_sde.verification.exact.wrapped_normal import WrappedNormal

__all__ = [
    "AngleLaw",
    "CircleDiffusion",
    "CircleNormLaw",
    "Convergence",
    "PeriodicLaw",
    "ReversibleLaw",
    "SpectralGap",
    "SphereLaw",
    "TracedCurve",
    "WrappedNormal",
    "convergence",
    "curve_of",
    "law_of",
    "spectral_gap",
]


def __dir__() -> list[str]:
    return sorted(__all__)
