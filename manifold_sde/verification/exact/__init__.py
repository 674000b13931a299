"""Exact laws: the truth that simulations are measured against."""

from manifold_sde.verification.exact.angle_law import AngleLaw
from manifold_sde.verification.exact.wrapped_normal import WrappedNormal

__all__ = ["AngleLaw", "WrappedNormal"]
