"""Strategies for Hypothesis: problems, points, noises, rates, that shrink and print as code.

``from manifold_sde.verification import strategies``; Hypothesis is an optional dependency. While
this module is imported, Hypothesis prints tensors with all their digits.
"""

from manifold_sde.errors import MissingDependencyError

try:
    import hypothesis as _hypothesis  # noqa: F401
except ModuleNotFoundError as _error:
    raise MissingDependencyError(
        "strategies need Hypothesis, which is not installed",
        received=str(_error),
        expected="hypothesis",
        remedy="pip install 'manifold_sde[verification]'",
    ) from _error

from manifold_sde.verification.strategies.choices import noises, problems, problems_with_points
from manifold_sde.verification.strategies.models import (
    NormalizedNetwork,
    ResidualModel,
    SymbolicModel,
    TangentColumns,
    TiltedModel,
)
from manifold_sde.verification.strategies.numbers import (
    covariances,
    factors,
    rates,
    scales,
    times,
)
from manifold_sde.verification.strategies.points import (
    attraction_points,
    cone_points,
    manifold_points,
)
from manifold_sde.verification.strategies.printing import register as _register

_register()

__all__ = [
    "NormalizedNetwork",
    "ResidualModel",
    "SymbolicModel",
    "TangentColumns",
    "TiltedModel",
    "attraction_points",
    "cone_points",
    "covariances",
    "factors",
    "manifold_points",
    "noises",
    "problems",
    "problems_with_points",
    "rates",
    "scales",
    "times",
]


def __dir__() -> list[str]:
    return sorted(__all__)
