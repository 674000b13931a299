"""The groups in one parameter group of an optimizer, and their steps that are not counted yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde.number_arrays import Array
from manifold_sde.training.rules import Options
from manifold_sde.training.track import Details, Track
from manifold_sde.training.watch import Watch


@dataclass
class Pending:
    """A step that was not counted yet; tensors are still on their device."""

    options: Options
    active: tuple[bool, ...] = ()
    first: Tensor | None = None
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


def count_steps(lane: Lane) -> None:
    """Read what the steps of a lane left on the device, and count them."""
    kept = [
        t
        for step in lane.pending
        for t in (step.first, step.skipped, *(step.details or []), step.gradient, step.after)
        if t is not None
    ]
    rows = iter(torch.stack([t.double() for t in kept]).cpu().numpy())
    read: list[tuple[Array | None, bool, Details | None, Array | None, Array | None]] = []
    for step in lane.pending:
        first = next(rows) if step.first is not None else None
        left_out = step.skipped is not None and bool(next(rows)[0])
        details = Details(*(next(rows) for _ in step.details)) if step.details else None
        gradient = next(rows) if step.gradient is not None else None
        after = next(rows) if step.after is not None else None
        read.append((first, left_out, details, gradient, after))
    track = lane.track
    for k, (step, (first, left_out, details, gradient, after)) in enumerate(
        zip(lane.pending, read, strict=True)
    ):
        track.begin(track.square if first is None else first)
        if after is None:
            # Between two norms that were taken, they grow by the same factor each step.
            ahead = next(i for i in range(k, len(read)) if read[i][4] is not None)
            whole = np.asarray(read[ahead][4]) / track.square
            after = track.square * whole ** (1.0 / (ahead - k + 1))
        active: Any = np.repeat(step.active, lane.watch.parts) & (not left_out)
        if details is not None:
            gradient = details.gradient
        details = None if left_out else details
        track.advance(step.options.numbers(), active, after, gradient, details)
    lane.pending.clear()
