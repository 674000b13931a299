"""The training clock: norms, directions and mixing of a network in training."""

from manifold_sde.training.auditing import audit
from manifold_sde.training.callbacks import lightning_callback, trainer_callback
from manifold_sde.training.clock import MixingClock
from manifold_sde.training.cooldown import Cooldown
from manifold_sde.training.expected import ExpectedClock, expected_clock
from manifold_sde.training.group_audit import GroupAudit
from manifold_sde.training.groups import ScaleGroups, scale_invariant_groups
from manifold_sde.training.plan_start import plan_options
from manifold_sde.training.planner import Change, Plan, plan
from manifold_sde.training.records import Records, directions_of, logits_on, loss_on
from manifold_sde.training.relaxation_time import Relaxation, relaxation
from manifold_sde.training.report import AuditReport
from manifold_sde.training.scale_group import ScaleGroup
from manifold_sde.training.training_settings import TrainingSettings

__all__ = [
    "AuditReport",
    "Change",
    "Cooldown",
    "ExpectedClock",
    "GroupAudit",
    "MixingClock",
    "Plan",
    "Records",
    "Relaxation",
    "ScaleGroup",
    "ScaleGroups",
    "TrainingSettings",
    "audit",
    "directions_of",
    "expected_clock",
    "lightning_callback",
    "logits_on",
    "loss_on",
    "plan",
    "plan_options",
    "relaxation",
    "scale_invariant_groups",
    "trainer_callback",
]


def __dir__() -> list[str]:
    return sorted(__all__)
