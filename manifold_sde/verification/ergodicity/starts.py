"""Starts that are far apart."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.errors import ManifoldSDEError
from manifold_sde.verification.subject import Subject

_USE = 140
#: Points of the walk, and random directions whose limits are looked at besides.
_WALKED, _RANDOM = 256, 32
#: Largest loss above that at the start, relative to the losses off the manifold.
_SAME_LOSS = 1e-6


def far_apart(subject: Subject, count: int) -> Tensor:
    """Points of Gamma_1 that are far from each other, (count, D), the first of them the start.

    Each is the farthest of all candidates from those chosen before. The candidates are what a walk
    over the manifold has reached, and the limits of gradient flow from random directions, which
    lie on other components if there are any.
    """
    walked = subject.manifold_points(_WALKED)
    directions = subject.normals(_USE, _RANDOM, subject.problem.dim)
    directions = directions / directions.norm(dim=1, keepdim=True)
    reached = subject.limits(directions)
    reached = reached[torch.isfinite(reached).all(1)]
    if len(reached):
        losses = subject.problem.loss(reached)
        typical = float(subject.problem.loss(directions).mean())
        level = float(subject.problem.loss(subject.start[None])[0])
        same = (losses - level).abs() <= _SAME_LOSS * max(abs(typical - level), 1e-300)
        reached = _on_manifold(subject, reached[same])
    candidates = torch.cat([walked, reached / reached.norm(dim=1, keepdim=True)])
    chosen = [subject.start]
    for _ in range(count - 1):
        distances = torch.cdist(candidates, torch.stack(chosen)).amin(1)
        chosen.append(candidates[int(distances.argmax())])
    return torch.stack(chosen)


def _on_manifold(subject: Subject, points: Tensor) -> Tensor:
    """Those at which the Hessian has the rank that it has at the start."""
    if not len(points):
        return points
    try:
        ranks = subject.geometry.rank(points)
    except ManifoldSDEError:
        # Some are not on a manifold of this rank: one by one.
        kept = [_on_manifold(subject, point[None]) for point in points] if len(points) > 1 else []
        return torch.cat([points[:0], *kept])
    return points[ranks == int(subject.geometry.rank(subject.start))]
