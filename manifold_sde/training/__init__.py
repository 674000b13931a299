"""The training clock: norms, directions and mixing of a network in training."""

from manifold_sde.training.expected import ExpectedClock, expected_clock
from manifold_sde.training.groups import ScaleGroup, ScaleGroups, scale_invariant_groups
from manifold_sde.training.records import Records, directions_of, logits_on, loss_on
from manifold_sde.training.relaxation_time import Relaxation, relaxation

__all__ = [
    "ExpectedClock",
    "Records",
    "Relaxation",
    "ScaleGroup",
    "ScaleGroups",
    "directions_of",
    "expected_clock",
    "logits_on",
    "loss_on",
    "relaxation",
    "scale_invariant_groups",
]
