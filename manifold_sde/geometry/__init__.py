"""The limiting map of gradient flow, and the manifold of minimisers that it maps to."""

from manifold_sde.geometry.geometry import Geometry

__all__ = ["Geometry"]
