"""Which groups a clock watches, and which of an optimizer's parameter groups holds each."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manifold_sde.errors import ArgumentError, MixingClockWarning
from manifold_sde.training.euler import Forward
from manifold_sde.training.groups import ScaleGroups, scale_invariant_groups
from manifold_sde.training.scale_group import ScaleGroup

_FEW = 0.05
"""Share of a group's weights that may have options of their own."""


def chosen_groups(
    model: nn.Module,
    groups: ScaleGroups | Sequence[ScaleGroup | str] | None,
    inputs: Any,
    forward: Forward | None,
    optimizer: torch.optim.Optimizer,
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
        # What is frozen now and held by the optimizer may be trained later.
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        frozen = [p for p in tensors.values() if id(p) in held and not p.requires_grad]
        try:
            for p in frozen:
                p.requires_grad_(True)
            groups = scale_invariant_groups(model, inputs, forward=forward)
        finally:
            for p in frozen:
                p.requires_grad_(False)
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
    """The groups of each of the optimizer's parameter groups.

    Weights that scale together need the same options. Where a few of them have others, as biases
    without decay, the rest stands for all; where many have, the group is left out.

    Raises:
        ArgumentError: If the optimizer does not have the weights of a group, or none is left.
    """
    home = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    found: dict[int, list[ScaleGroup]] = {}
    refused: list[ArgumentError] = []
    for group in groups:
        missing = [name for name in group.parameters if id(tensors[name]) not in home]
        if missing:
            raise ArgumentError(
                f"the optimizer does not have all weights of the group {group.name!r}",
                received=f"an optimizer without {', '.join(missing[:4])}",
                expected="an optimizer of the model's parameters",
                remedy="make the clock with the optimizer that trains them, or pass the groups "
                "that it has",
            )
        counts: dict[str, int] = {}
        first: dict[str, int] = {}
        for name in group.parameters:
            index = home[id(tensors[name])]
            options = optimizer.param_groups[index]
            key = repr({k: v for k, v in options.items() if k not in ("params", "name")})
            counts[key] = counts.get(key, 0) + tensors[name].numel()
            first.setdefault(key, index)
        most = max(counts, key=lambda key: counts[key])
        others = 1.0 - counts[most] / sum(counts.values())
        if others > 0.0:
            error = ArgumentError(
                f"the weights of the group {group.name!r} have different options",
                received=f"{100.0 * others:.2g} % of them with other rates than the rest",
                expected="one learning rate and weight decay for weights that scale together",
                remedy="groups.optimizer_groups(lr=..., weight_decay=...) keeps them together",
            )
            left_out = others > _FEW
            what = "It has no clock." if left_out else "The clock is that of the rest."
            if left_out:
                refused.append(error)
            if not left_out or len(groups) > 1:
                warnings.warn(f"{error}\n{what}", MixingClockWarning, stacklevel=4)
            if left_out:
                continue
        found.setdefault(first[most], []).append(group)
    if not found:
        raise refused[0]
    return found


def has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has a state that only steps leave."""
    return any(
        isinstance(state.get("momentum_buffer"), Tensor) or float(state.get("step", 0)) > 0
        for state in optimizer.state.values()
    )
