"""Schemes on the manifold, by name."""

from __future__ import annotations

from manifold_sde.solvers.schemes.base import Scheme, StepNoise
from manifold_sde.solvers.schemes.euler import Euler
from manifold_sde.solvers.schemes.heun import Heun
from manifold_sde.solvers.schemes.midpoint import Midpoint
from manifold_sde.solvers.schemes.phi_jet import PhiJet
from manifold_sde.solvers.schemes.walk import Walk
from manifold_sde.solvers.schemes.weak2 import Weak2

#: All schemes, by the names that ``solve`` takes.
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme for scheme in (Euler(), PhiJet(), Walk(), Heun(), Midpoint(), Weak2())
}

__all__ = [
    "SCHEMES",
    "Euler",
    "Heun",
    "Midpoint",
    "PhiJet",
    "Scheme",
    "StepNoise",
    "Walk",
    "Weak2",
]
