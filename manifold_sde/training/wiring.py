"""Which groups a clock watches, and which of an optimizer's parameter groups holds each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manifold_sde.errors import ArgumentError
from manifold_sde.training.euler import Forward
from manifold_sde.training.groups import ScaleGroup, ScaleGroups, scale_invariant_groups


def chosen_groups(
    model: nn.Module,
    groups: ScaleGroups | Sequence[ScaleGroup | str] | None,
    inputs: Any,
    forward: Forward | None,
) -> list[ScaleGroup]:
    """The groups that are given, named, or measured.

    Raises:
        ArgumentError: If there is none, or no way to find them.
    """
    tensors = dict(model.named_parameters())
    if groups is None:
        if inputs is None:
            raise ArgumentError(
                "which weights are scale-invariant is not known",
                received="neither groups nor inputs",
                expected="groups, or inputs to measure them",
                remedy="MixingClock(model, optimizer, inputs=batch)",
            )
        groups = scale_invariant_groups(model, inputs, forward=forward)
    chosen = []
    for group in groups:
        if isinstance(group, str):
            if group not in tensors:
                raise ArgumentError(
                    "there is no parameter of this name",
                    received=repr(group),
                    expected="a name of model.named_parameters()",
                    remedy=", ".join(list(tensors)[:6]),
                )
            count = tensors[group].numel()
            group = ScaleGroup(group, (group,), 0, 0, None, 1, count, float("nan"))
        chosen.append(group)
    if not chosen:
        raise ArgumentError(
            "nothing in the model is scale-invariant",
            received="no group",
            expected="weights that feed a normalisation",
            remedy="print(scale_invariant_groups(model, inputs)) says why of each tensor; in eval "
            "mode batch normalisation does not count",
        )
    return chosen


def by_parameter_group(
    optimizer: torch.optim.Optimizer, groups: Sequence[ScaleGroup], tensors: dict[str, Any]
) -> dict[int, list[ScaleGroup]]:
    """The groups of each of the optimizer's parameter groups."""
    home = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    found: dict[int, list[ScaleGroup]] = {}
    for group in groups:
        homes = {home.get(id(tensors[name])) for name in group.parameters}
        if None in homes:
            raise ArgumentError(
                f"the optimizer does not have all weights of the group {group.name!r}",
                received=", ".join(n for n in group.parameters if id(tensors[n]) not in home),
                expected="an optimizer of the model's parameters",
                remedy="make the clock with the optimizer that trains them, or pass the groups "
                "that it has",
            )
        indices = sorted(i for i in homes if i is not None)
        options = [
            {k: v for k, v in optimizer.param_groups[i].items() if k not in ("params", "name")}
            for i in indices
        ]
        if any(other != options[0] for other in options[1:]):
            raise ArgumentError(
                f"the weights of the group {group.name!r} have different options",
                received=f"parameter groups {', '.join(map(str, indices))} of the optimizer",
                expected="one learning rate and weight decay for weights that scale together",
                remedy="groups.optimizer_groups(lr=..., weight_decay=...) keeps them together",
            )
        found.setdefault(indices[0], []).append(group)
    return found


def has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has a state that only steps leave."""
    return any(
        isinstance(state.get("momentum_buffer"), Tensor) or float(state.get("step", 0)) > 0
        for state in optimizer.state.values()
    )
