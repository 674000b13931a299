"""The training clock: norms, directions and mixing of a network in training."""

from manifold_sde.training.expected import ExpectedClock, expected_clock
from manifold_sde.training.groups import ScaleGroup, ScaleGroups, scale_invariant_groups

__all__ = [
    "ExpectedClock",
    "ScaleGroup",
    "ScaleGroups",
    "expected_clock",
    "scale_invariant_groups",
]
