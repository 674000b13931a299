"""The groups in one parameter group of an optimizer, and their steps that are not counted yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde.number_arrays import Array
from manifold_sde.training.rules import Options
from manifold_sde.training.track import Details, Track
from manifold_sde.training.watch import Watch, are_finite


@dataclass
class Pending:
    """A step that was not counted yet; tensors are still on their device.

    The first one of a lane begins with |x|^2, and what there is of the optimizer's buffer.
    """

    options: Options
    active: tuple[bool, ...] = ()
    begin: list[Tensor] = field(default_factory=list)
    skipped: Tensor | None = None
    after: Tensor | None = None
    gradient: Tensor | None = None
    details: list[Tensor] | None = None


@dataclass
class Lane:
    """The groups in one parameter group of the optimizer."""

    index: int
    watch: Watch
    track: Track
    pending: list[Pending] = field(default_factory=list)
    started: bool = False
    stopped: bool = False
    before: dict[str, Tensor] | None = None
    open: list[Tensor] | None = None


def split(lane: Lane, values: Array) -> list[Array]:
    """Values of all parts, group by group."""
    return np.split(np.asarray(values), np.cumsum(lane.watch.parts)[:-1])


def group_norms(lanes: Sequence[Lane]) -> list[float]:
    """The root mean square norm of each group."""
    return [float(np.sqrt(np.mean(z))) for lane in lanes for z in split(lane, lane.track.square)]


def group_clocks(lanes: Sequence[Lane]) -> list[tuple[float, int, str]]:
    """Clock v (of the median of its parts), weights and name of each group that moves, sorted."""
    return sorted(
        (float(np.median(part)), group.weights, group.name)
        for lane in lanes
        for group, part, count in zip(
            lane.watch.groups,
            split(lane, lane.track.clock),
            split(lane, lane.track.count),
            strict=True,
        )
        if count.max() > 0
    )


def middle(clocks: Sequence[tuple[float, int, str]]) -> tuple[float, str]:
    """Clock v and name of the group up to which half of the weights that move have less."""
    half, before = 0.5 * sum(weights for _, weights, _ in clocks), 0
    for v, weights, name in clocks:
        before += weights
        if before >= half:
            return v, name
    return 0.0, ""


def lost_since(lanes: Sequence[Lane]) -> int | None:
    """The first step at which something of a part was not finite, or ``None``."""
    lost = np.concatenate([lane.track.lost for lane in lanes])
    return int(lost[lost > 0].min()) if lost.any() else None


def look_at_others(lanes: Sequence[Lane], optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Count a run as lost from here on where a trained tensor outside of all groups is not finite.

    The groups themselves are so a step later. It waits for the device.
    """
    own = {id(tensor) for lane in lanes for tensor in lane.watch.tensors.values()}
    others = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not are_finite([p.detach() for p in others if id(p) not in own]):
        for lane in lanes:
            lane.track.lost = np.where(lane.track.lost == 0, steps, lane.track.lost)


def count_steps(lane: Lane, steps: int) -> None:
    """Read what the steps of a lane left on the device, and count them.

    Args:
        lane: The lane.
        steps: The number of the last of them.
    """
    kept = [
        t
        for step in lane.pending
        for t in (*step.begin, step.skipped, *(step.details or []), step.gradient, step.after)
        if t is not None
    ]
    rows = iter(torch.stack([t.double() for t in kept]).cpu().numpy())
    read: list[tuple[list[Array], bool, Details | None, Array | None, Array | None]] = []
    for step in lane.pending:
        begin = [next(rows) for _ in step.begin]
        left_out = step.skipped is not None and bool(next(rows)[0])
        details = Details(*(next(rows) for _ in step.details)) if step.details else None
        gradient = next(rows) if step.gradient is not None else None
        after = next(rows) if step.after is not None else None
        read.append((begin, left_out, details, gradient, after))
    track, before = lane.track, steps - len(read)
    for k, (step, (begin, left_out, details, gradient, after)) in enumerate(
        zip(lane.pending, read, strict=True)
    ):
        track.begin(begin[0] if begin else track.square)
        if begin[1:]:
            track.go_on(step.options.numbers(), *begin[1:])
        if after is None:
            # Between two norms that were taken, they grow by the same factor each step.
            ahead = next(i for i in range(k, len(read)) if read[i][4] is not None)
            whole = np.asarray(read[ahead][4]) / track.square
            after = track.square * whole ** (1.0 / (ahead - k + 1))
        active: Any = np.repeat(step.active, lane.watch.parts) & (not left_out)
        if details is not None:
            gradient = details.gradient
        details = None if left_out else details
        track.look(before + k + 1, active, after, gradient, details)
        track.advance(step.options.numbers(), active, after, gradient, details)
    lane.pending.clear()
