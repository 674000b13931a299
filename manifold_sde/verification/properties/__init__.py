"""What the theory says of every problem, as functions that measure how far it is from holding.

Each takes a problem (or a :class:`~manifold_sde.verification.subject.Subject`, with other code for
the toolkit's) and points, and returns a :class:`Defect`: a value, the tolerance that
rounding and truncation call for, and ``.require()``, for tests.
"""

from manifold_sde.verification.properties import derivatives, drift, homogeneity, limit_map, runs
from manifold_sde.verification.properties.defect import Defect
from manifold_sde.verification.properties.derivatives import (
    normal_trace,
    projector,
    second_derivative,
    second_derivative_degree,
    tangent_projection,
)
from manifold_sde.verification.properties.drift import (
    calculus_correction,
    norm_identity,
    stratonovich_tangency,
)
from manifold_sde.verification.properties.homogeneity import (
    derivative_degree,
    euler,
    noise_degree,
    noise_is_tangent,
    scale_invariance,
)
from manifold_sde.verification.properties.limit_map import (
    limit_map_degree,
    limit_map_flow,
    limit_map_idempotent,
    limit_map_norm,
)
from manifold_sde.verification.properties.runs import (
    decay_as_rate,
    decay_equation_scaling,
    reparametrisation,
    stable_rate,
)

#: The checks of all properties, from the loss to the runs.
CHECKS = (
    *homogeneity.CHECKS,
    *limit_map.CHECKS,
    *derivatives.CHECKS,
    *drift.CHECKS,
    *runs.CHECKS,
)

__all__ = [
    "CHECKS",
    "Defect",
    "calculus_correction",
    "decay_as_rate",
    "decay_equation_scaling",
    "derivative_degree",
    "euler",
    "limit_map_degree",
    "limit_map_flow",
    "limit_map_idempotent",
    "limit_map_norm",
    "noise_degree",
    "noise_is_tangent",
    "norm_identity",
    "normal_trace",
    "projector",
    "reparametrisation",
    "scale_invariance",
    "second_derivative",
    "second_derivative_degree",
    "stable_rate",
    "stratonovich_tangency",
    "tangent_projection",
]


def __dir__() -> list[str]:
    return sorted(__all__)
