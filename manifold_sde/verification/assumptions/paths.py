"""Paths on the manifold: from one point to another, and all around a closed curve."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde.errors import NotOnManifoldError, RankError
from manifold_sde.verification.sampling import advance, along_manifold, unit
from manifold_sde.verification.subject import Subject

#: Longest and shortest step, in radians.
_LONGEST, _SHORTEST = 0.1, 1e-4
#: Steps of a path, and the distance at which it has arrived.
_STEPS, _ARRIVED = 120, 1e-7
#: Steps of a closed curve, and the cosine by which its tangent may turn in one.
_CURVE_STEPS, _TURN = 4000, math.cos(0.3)


def join(subject: Subject, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Walk on Gamma_1 from points towards others, in small steps that are seen to stay on it.

    Args:
        subject: The system under test.
        a: Points of Gamma_1 (n, D).
        b: Where they shall go, (n, D).

    Returns:
        Whether they arrive (n,), and the points that are closest to b (n, D). A walk that ends
        before proves nothing: the way there need not come closer all the time.
    """
    y = a.clone()
    length = torch.full((len(a),), _LONGEST, dtype=a.dtype)
    distance = (b - y).norm(dim=1)
    going = distance > _ARRIVED
    for _ in range(_STEPS):
        rows = torch.nonzero(going)[:, 0]
        if not len(rows):
            break
        here = y[rows]
        towards = along_manifold(subject.geometry, here, b[rows] - here)
        size = towards.norm(dim=1)
        step = torch.minimum(size, length[rows])
        move = towards / size.clamp(min=1e-300)[:, None] * step[:, None]
        moved, good = advance(subject.geometry, here, move)
        left = (b[rows] - moved).norm(dim=1)
        good &= left < distance[rows]
        y[rows[good]], distance[rows[good]] = moved[good], left[good]
        length[rows] = torch.where(good, (1.5 * step).clamp(max=_LONGEST), 0.5 * step)
        # At rest where the way to b is across the manifold.
        stuck = (length[rows] < _SHORTEST) & (distance[rows] > 10 * _SHORTEST)
        stuck |= length[rows] < 1e-3 * _ARRIVED
        going[rows] = (distance[rows] > _ARRIVED) & ~stuck
    return distance <= _ARRIVED, y


@dataclass(frozen=True)
class Trace:
    """A curve of minimisers, followed from a point.

    Attributes:
        points: Points along it, in order, (k, D).
        closed: Whether it has come back to where it began.
        length: Length that was followed, in radians.
        spacing: Largest distance of neighbouring points.
    """

    points: Tensor
    closed: bool
    length: float
    spacing: float


def trace_curve(subject: Subject, start: Tensor) -> Trace:
    """Follow a one-dimensional Gamma_1 all around.

    Steps of at most 0.1, shorter where the curve bends: the tangent turns by at most 0.3 in one.

    Args:
        subject: The system under test.
        start: A point of Gamma_1 (D,).
    """
    y = start[None]
    tangent = unit(along_manifold(subject.geometry, y, subject.normals(67, 1, len(start))))
    first, points = tangent, [y]
    step, length = _LONGEST, 0.0
    while len(points) < _CURVE_STEPS and step >= _SHORTEST:
        moved, good = advance(subject.geometry, y, step * tangent)
        turned = tangent
        if bool(good):
            try:
                turned = unit(along_manifold(subject.geometry, moved, tangent))
            except (RankError, NotOnManifoldError):
                good = torch.zeros_like(good)
        if not bool(good) or float((turned * tangent).sum()) < _TURN:
            step *= 0.5
            continue
        length += float((moved - y).norm())
        back = start[None] - y
        gap = float(back.norm())
        ahead = float((back * tangent).sum()) > 0.0
        near = len(points) > 3 and gap <= 1.1 * step and ahead
        # The step would go past the start: it is on the way there, or on another sheet.
        if near and float((tangent * first).sum()) > 0 and bool(join(subject, y, start[None])[0]):
            return _trace(points, True, length - float((moved - y).norm()) + gap)
        y, tangent = moved, turned
        points.append(y)
        step = min(1.5 * step, _LONGEST)
    return _trace(points, False, length)


def _trace(points: list[Tensor], closed: bool, length: float) -> Trace:
    whole = torch.cat(points)
    ring = torch.cat([whole, whole[:1]]) if closed else whole
    spacing = float(ring.diff(dim=0).norm(dim=1).max()) if len(ring) > 1 else 0.0
    return Trace(whole, closed, length, spacing)
