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

__all__ = [
    "Cause",
    "GhostBatchNorm",
    "GroupNorm",
    "InvariantGroups",
    "LayerNorm",
    "NormalizedMLP",
    "ParameterInvariance",
    "ScaleInvarianceReport",
    "ScaleInvariantPreResNet",
    "WeightGroup",
    "WeightNorm",
    "invariant_groups",
    "scale_invariance_report",
]


def __dir__() -> list[str]:
    return sorted(__all__)
