"""Stochastic differential equations on manifolds of minimisers of scale-invariant losses."""

from manifold_sde import networks, problems
from manifold_sde.description import Description
from manifold_sde.errors import ManifoldSDEError
from manifold_sde.geometry import Geometry
from manifold_sde.group_sdes import GroupDirectionDiffusion
from manifold_sde.noise import CustomNoise, LabelNoise, SamplingNoise, SphericalNoise
from manifold_sde.problem import LeastSquaresProblem, Problem
from manifold_sde.sdes import (
    DirectionDiffusion,
    FixedRatioDiffusion,
    LimitingDiffusion,
    WeightDecaySDE,
)
from manifold_sde.time_scale import TimeScale

__version__ = "0.1.0"

__all__ = [
    "CustomNoise",
    "Description",
    "DirectionDiffusion",
    "FixedRatioDiffusion",
    "Geometry",
    "GroupDirectionDiffusion",
    "LabelNoise",
    "LeastSquaresProblem",
    "LimitingDiffusion",
    "ManifoldSDEError",
    "Problem",
    "SamplingNoise",
    "SphericalNoise",
    "TimeScale",
    "WeightDecaySDE",
    "networks",
    "problems",
]


def __dir__() -> list[str]:
    return sorted(__all__)
