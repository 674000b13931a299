"""Problems of which something is known in closed form."""

from manifold_sde.problems.circles import label_noise_circle, mixed_noise_circle, varying_circle
from manifold_sde.problems.facts import Circle, Facts
from manifold_sde.problems.linear_model import NormalizedLinear, normalized_linear
from manifold_sde.problems.spheres import great_circle, great_sphere

__all__ = [
    "Circle",
    "Facts",
    "NormalizedLinear",
    "great_circle",
    "great_sphere",
    "label_noise_circle",
    "mixed_noise_circle",
    "normalized_linear",
    "varying_circle",
]


def __dir__() -> list[str]:
    return sorted(__all__)
