"""The training clock: norms, directions and mixing of a network in training."""

from manifold_sde.training.auditing import audit
from manifold_sde.training.clock import MixingClock
from manifold_sde.training.expected import ExpectedClock, expected_clock
from manifold_sde.training.groups import ScaleGroup, ScaleGroups, scale_invariant_groups
from manifold_sde.training.report import AuditReport, GroupAudit

__all__ = [
    "AuditReport",
    "ExpectedClock",
    "GroupAudit",
    "MixingClock",
    "ScaleGroup",
    "ScaleGroups",
    "audit",
    "expected_clock",
    "scale_invariant_groups",
]
