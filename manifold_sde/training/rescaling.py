"""Whether groups of weights can be scaled without a change of the output, seen by scaling them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manifold_sde.training.euler import Probe
from manifold_sde.training.scale_group import ScaleGroup


def confirmed(
    probe: Probe, saved: dict[str, Tensor], groups: list[ScaleGroup], epsilon: float
) -> tuple[list[ScaleGroup], dict[str, float]]:
    """The groups that can be scaled: all at once, or one by one where that fails.

    Args:
        probe: The module.
        saved: Its weights.
        groups: The groups by measurement.
        epsilon: Rounding of its numbers.

    Returns:
        The groups, and by how much scaling changes the output, of the tensors of the others.
    """
    if not groups:
        return [], {}
    with torch.no_grad():
        probe.perturb(saved, 0)
        start = {name: p.detach().clone() for name, p in probe.tensors.items()}
        before = [out.detach().double() for out in probe.outputs()]
        spread = sum(float((out - out.mean()).square().sum()) for out in before) or 1.0

        def change(chosen: Sequence[ScaleGroup]) -> float:
            generator = torch.Generator().manual_seed(probe.seed)
            for group in chosen:
                factors = 0.5 * 4.0 ** torch.rand(group.parts, generator=generator)
                for name in group.parameters:
                    tensor = probe.tensors[name]
                    _scale(group, tensor.data, factors.to(tensor))
            after = probe.outputs()
            for name in {n for g in chosen for n in g.parameters}:
                probe.tensors[name].copy_(start[name])
            moved = sum(
                float((a.double() - b).square().sum()) for a, b in zip(after, before, strict=True)
            )
            return float((moved / spread) ** 0.5)

        limit = max(0.02, 64.0 * epsilon)

        def holds(chosen: Sequence[ScaleGroup]) -> bool:
            most = 10.0 * limit if any(g.eps_matters for g in chosen) else limit
            return change(chosen) <= most

        if holds(groups):
            return groups, {}
        kept: list[ScaleGroup] = []
        failed: dict[str, float] = {}
        for group in groups:
            if holds([group]):
                kept.append(group)
            else:
                failed |= dict.fromkeys(group.parameters, change([group]))
        return kept, failed


def _scale(group: ScaleGroup, tensor: Tensor, factors: Tensor) -> None:
    """Scale each part of a group by its factor, in place."""
    if not group.size:
        tensor.mul_(factors[0])
        return
    if tensor.dim() > 1 and group.axis:
        tensor = tensor.transpose(0, group.axis)
    if group.rows is not None:
        tensor = tensor[group.rows[0] : group.rows[1]]
    each = factors.repeat_interleave(group.size)
    tensor.mul_(each.reshape(-1, *[1] * (tensor.dim() - 1)))
