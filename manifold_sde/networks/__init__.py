"""Networks: layers and architectures with scale-invariant losses, and what breaks them."""

from manifold_sde.networks.groups import InvariantGroups, WeightGroup, invariant_groups
from manifold_sde.networks.invariance_report import (
    Cause,
    ParameterInvariance,
    ScaleInvarianceReport,
    scale_invariance_report,
)
from manifold_sde.networks.layers import GhostBatchNorm, GroupNorm, LayerNorm, WeightNorm
from manifold_sde.networks.mlp import NormalizedMLP
from manifold_sde.networks.preresnet import ScaleInvariantPreResNet
from manifold_sde.networks.random_batches import BatchLaw, RandomBatches, batch_law

__all__ = [
    "BatchLaw",
    "Cause",
    "GhostBatchNorm",
    "GroupNorm",
    "InvariantGroups",
    "LayerNorm",
    "NormalizedMLP",
    "ParameterInvariance",
    "RandomBatches",
    "ScaleInvarianceReport",
    "ScaleInvariantPreResNet",
    "WeightGroup",
    "WeightNorm",
    "batch_law",
    "invariant_groups",
    "scale_invariance_report",
]


def __dir__() -> list[str]:
    return sorted(__all__)
