"""Assumption 5.1: the unit minimisers are connected, as far as paths between them tell."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from manifold_sde.paper import implements
from manifold_sde.verification.assumptions.paths import Trace, join, trace_curve
from manifold_sde.verification.assumptions.survey import Survey, assumption, ranks_of, show_point
from manifold_sde.verification.result import Picture, Result, Series, found
from manifold_sde.verification.sampling import random_walk
from manifold_sde.verification.subject import Subject

#: Distance of points of a manifold of dimension 0 that are two.
_APART = 1e-6
#: Rounds in which closest pairs of components are tried, pairs in each, and points of a segment.
_ROUNDS, _PAIRS, _NODES = 3, 8, 9
#: Walkers for each component, steps of their walks before and after they are told apart by where
#: they are, and the largest length of a step.
_WALKERS, _WALK, _STRIDE = 128, 64, 0.2
#: Most components that are told apart; share of walks that come from elsewhere in a component, of
#: the half that it is where they are mixed, above which a component counts as walked over.
_MOST, _MIXED = 6, 0.25
#: Probability of no crossing in all walks, which says how rare a passage can still be.
_LEVEL = 1e-4


@dataclass(frozen=True)
class Components:
    """The components that points belong to, as far as paths were found.

    Attributes:
        labels: Component of each point, from 0, (n,).
        tried: Number of paths that were tried.
    """

    labels: np.ndarray
    tried: int

    @property
    def count(self) -> int:
        """Number of components."""
        return int(self.labels.max()) + 1


@implements("Assumption 5.1")
def check_connectedness(survey: Survey) -> Result:
    """Minimisers found from independent starts at the same loss are joined by paths on Gamma_1."""
    restarts = survey.restarts
    dim = survey.manifold_dim
    rank_at = ranks_of(torch.linalg.eigvalsh(survey.subject.problem.hessian(restarts)))
    other = restarts[rank_at != survey.rank]
    if len(other):
        detail = (
            f"{len(other)} of {len(restarts)} independent starts end at minimisers of the same "
            f"loss but another rank, as {show_point(other[0])}"
        )
        return _fails(survey, detail, 2.0)
    if dim == 0:
        return _points(survey)
    if dim == 1:
        return _curve(survey)
    return _paths(survey)


def _points(survey: Survey) -> Result:
    """Gamma_1 is a set of points."""
    distances = (survey.restarts - survey.start).norm(dim=1)
    others = survey.restarts[distances > _APART]
    if len(others):
        detail = (
            f"Gamma_1 has dimension 0, and {len(others)} of {len(distances)} independent starts "
            f"end elsewhere than the start, as at {show_point(others[0])}"
        )
        return _fails(survey, detail, 2.0)
    detail = f"Gamma_1 has dimension 0, and all of {len(distances)} starts end at one point"
    return _holds(survey, detail)


def _curve(survey: Survey) -> Result:
    """Gamma_1 is a curve, which can be followed all around: then it is known what is not on it."""
    subject, restarts = survey.subject, survey.restarts
    trace = trace_curve(subject, survey.start)
    place = torch.cdist(restarts, trace.points).argmin(1)
    on_curve = torch.zeros(len(restarts), dtype=torch.bool)
    if len(restarts):
        on_curve, _ = join(subject, trace.points[place], restarts)
    elsewhere = restarts[~on_curve]
    pictures = (_picture(trace, restarts[on_curve], elsewhere),)
    followed = f"the curve through the start has length {trace.length:.3g}"
    if not trace.closed:
        detail = (
            f"{followed} and more: it has not closed after {len(trace.points)} steps, where it is "
            f"at {show_point(trace.points[-1])}; {len(elsewhere)} of {len(restarts)} independent "
            "starts are not on this part"
        )
        meaning = "The curve ends, or is too long or too bent to follow: nothing is decided."
        return found("undecided", detail, limit=1.0, meaning=meaning, pictures=pictures)
    if len(elsewhere):
        other = trace_curve(subject, elsewhere[0])
        gap = float(torch.cdist(other.points, trace.points).min())
        if gap <= max(trace.spacing, other.spacing):
            detail = (
                f"{followed} and is closed; {len(elsewhere)} of {len(restarts)} independent starts "
                f"are not on it, but on a curve that comes as near as {gap:.2g} to it"
            )
            meaning = "Where the two meet, Gamma is no manifold; or they are close, and do not."
            return found("undecided", detail, 2.0, 1.0, meaning, pictures=pictures)
        detail = (
            f"{followed} and is closed; {len(elsewhere)} of {len(restarts)} independent starts at "
            f"the same loss are not on it, but on another one, {gap:.2g} away, as at "
            f"{show_point(elsewhere[0])}. This is certain up to the numerics of following a curve"
        )
        return _fails(survey, detail, 2.0, pictures)
    detail = (
        f"{followed} and is closed; all {len(restarts)} independent starts at this loss are on it"
    )
    return _holds(survey, detail, pictures)


def _paths(survey: Survey) -> Result:
    """Gamma_1 has at least two dimensions: paths between points components."""
    nodes = torch.cat([survey.points[:1], survey.restarts])
    components = find_components(survey.subject, nodes)
    if components.count == 1:
        detail = (
            f"the start and {len(nodes) - 1} independent starts at its loss are joined by paths on "
            f"Gamma_1 ({components.tried} were tried), neighbours at most "
            f"{separation(nodes, components.labels)[1]:.2g} apart"
        )
        return _holds(survey, detail)
    sizes = np.bincount(components.labels)
    detail = (
        f"{components.count} components of {', '.join(map(str, sizes[:6]))} points that none of "
        f"{components.tried} paths joins: walks on Gamma_1, and images of segments under Phi"
    )
    if components.count <= _MOST:
        seen = walk_apart(survey.subject, nodes, components.labels)
        best = min(seen, key=lambda s: (not s.apart, s.crossings, -s.mixed))
        detail += f"; {best}"
        if best.apart:
            return _fails(survey, detail, float(components.count))
    meaning = (
        "There may be two components, or a way between them that was not found: more starts and "
        "another effort can tell."
    )
    return found("undecided", detail, float(components.count), 1.0, meaning)


@dataclass(frozen=True)
class Separation:
    """What walks over a presumed component and over the others have seen.

    Attributes:
        walks: Number of walks from the component.
        crossings: Walks from either side that end nearest to one from the other.
        mixed: Share of the walks within the component whose nearest one comes from its other
            half: one half where the walks are mixed, 0 where they have not got there.
        gap: Shortest distance of ends on different sides.
    """

    walks: int
    crossings: int
    mixed: float
    gap: float

    @property
    def passage(self) -> float:
        """Share of walks that cross, above which no crossing has a probability below 1e-4."""
        return -math.log(_LEVEL) / self.walks

    @property
    def apart(self) -> bool:
        """Whether the walks find their way all over the component, and never out of it or in.

        Sheets that are nearer than a step are not told apart.
        """
        return self.crossings == 0 and self.mixed >= _MIXED and self.gap > _STRIDE

    def __str__(self) -> str:
        return (
            f"of {self.walks} random walks from one, and as many from each other, {self.crossings} "
            f"cross; none would with probability {_LEVEL:g} if {self.passage:.1%} of walks did; "
            f"within, {self.mixed:.0%} come from the other half (50% where they are mixed); the "
            f"sides are {self.gap:.2g} apart"
        )


def walk_apart(subject: Subject, nodes: Tensor, labels: np.ndarray) -> list[Separation]:
    """Random walks in small steps, which do not leave a component, from each component.

    Were a presumed component a part of a larger one, walks that are seen to get from one half of
    it to the other in so many steps would be seen to leave it, and others to enter. Crossing is
    told by the nearest end of another walk, whatever the shape of the manifold.

    Args:
        subject: The system under test.
        nodes: Points of Gamma_1 (n, D).
        labels: Presumed component of each (n,), from 0.

    Returns:
        What was seen for each component against all the others.
    """
    count = int(labels.max()) + 1
    rows = [np.resize(np.nonzero(labels == label)[0], _WALKERS) for label in range(count)]
    y = nodes[torch.from_numpy(np.concatenate(rows))]

    def walk(y: Tensor, use: int) -> Tensor:
        noise = subject.normals(use, _WALK, *y.shape)
        return random_walk(subject.geometry, y, noise, _STRIDE, adapting=True)[-1]

    before = walk(y, 68)
    after = walk(before, 69).numpy()
    marks = np.repeat(np.arange(count), _WALKERS)
    distances = squareform(pdist(after))
    np.fill_diagonal(distances, np.inf)
    seen = []
    for label in range(count):
        inside = marks == label
        nearest = distances.argmin(1)
        crossings = int((inside != inside[nearest]).sum())
        gap = float(distances[np.ix_(inside, ~inside)].min())
        mixed = _mixed(before[inside], after[inside])
        seen.append(Separation(_WALKERS, crossings, mixed, gap))
    return seen


def _mixed(before: Tensor, after: np.ndarray) -> float:
    """Share of points whose nearest one was in the other half before: (n, D), (n, D)."""
    centred = before - before.mean(0)
    along = (centred @ torch.linalg.svd(centred, full_matrices=False)[2][0]).numpy()
    upper = along > np.median(along)
    distances = squareform(pdist(after))
    np.fill_diagonal(distances, np.inf)
    return float((upper != upper[distances.argmin(1)]).mean())


def find_components(subject: Subject, nodes: Tensor) -> Components:
    """Components of points, by paths along a minimal spanning tree and between closest pairs.

    Args:
        subject: The system under test.
        nodes: Points of Gamma_1 (n, D).
    """
    distances = torch.cdist(nodes, nodes)
    tree = minimum_spanning_tree(distances.numpy() + 1e-9).tocoo()
    tried = [np.stack([tree.row, tree.col], 1).astype(np.int64)]
    joined = [_joined(subject, nodes, tried[0])]
    labels = _label(len(nodes), tried, joined)
    for _ in range(_ROUNDS):
        pairs = _closest_pairs(distances.numpy(), labels, tried)
        if not len(pairs):
            break
        tried.append(pairs)
        joined.append(_joined(subject, nodes, pairs))
        labels = _label(len(nodes), tried, joined)
    return Components(labels, sum(map(len, tried)))


def separation(points: Tensor, labels: np.ndarray) -> tuple[float, float]:
    """Shortest distance between components, and the longest link within one.

    Links are those of the minimal spanning tree of all points.
    """
    tree = minimum_spanning_tree(torch.cdist(points, points).numpy() + 1e-12).tocoo()
    within = labels[tree.row] == labels[tree.col]
    return float(tree.data[~within].min(initial=np.inf)), float(tree.data[within].max(initial=0.0))


def _joined(subject: Subject, nodes: Tensor, pairs: np.ndarray) -> np.ndarray:
    """Which pairs are joined, by a walk there, back, or along the image of the segment."""
    a, b = (nodes[torch.from_numpy(pairs[:, side])] for side in (0, 1))
    good, _ = join(subject, a, b)
    rest = torch.nonzero(~good)[:, 0]
    if len(rest):
        good[rest] = join(subject, b[rest], a[rest])[0]
        rest = torch.nonzero(~good)[:, 0]
    if len(rest):
        good[rest] = _segments(subject, a[rest], b[rest])
    result: np.ndarray = good.numpy()
    return result


def _segments(subject: Subject, a: Tensor, b: Tensor) -> Tensor:
    """Whether the images under Phi of the points of segments are joined by walks, (n,)."""
    places = torch.linspace(0.0, 1.0, _NODES, dtype=a.dtype)[1:-1]
    between = a[:, None] + places[:, None] * (b - a)[:, None]
    between = between / between.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    images = subject.limits(between.flatten(0, 1)).reshape(between.shape)
    images = images / images.norm(dim=-1, keepdim=True)
    chain = torch.cat([a[:, None], images, b[:, None]], dim=1)
    good = torch.isfinite(chain).all(-1).all(-1)
    rows = torch.nonzero(good)[:, 0]
    if len(rows):
        arrived, _ = join(subject, chain[rows, :-1].flatten(0, 1), chain[rows, 1:].flatten(0, 1))
        good[rows] = arrived.reshape(len(rows), -1).all(-1)
    return good


def _label(n: int, tried: list[np.ndarray], joined: list[np.ndarray]) -> np.ndarray:
    pairs = np.concatenate(tried)[np.concatenate(joined)]
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    labels: np.ndarray = connected_components(graph, directed=False)[1]
    return labels


def _closest_pairs(
    distances: np.ndarray, labels: np.ndarray, tried: list[np.ndarray]
) -> np.ndarray:
    """The closest pairs of different components that were not tried, a few for each component."""
    known = {tuple(pair) for pairs in tried for pair in pairs.tolist()}
    chosen: list[tuple[int, int]] = []
    for label in range(int(labels.max()) + 1):
        inside, outside = np.nonzero(labels == label)[0], np.nonzero(labels != label)[0]
        if not len(outside):
            continue
        order = np.argsort(distances[np.ix_(inside, outside)], axis=None)
        count = 0
        for flat in order:
            i, j = inside[flat // len(outside)], outside[flat % len(outside)]
            if (i, j) not in known and (j, i) not in known:
                known.add((int(i), int(j)))
                chosen.append((int(i), int(j)))
                count += 1
            if count == _PAIRS:
                break
    return np.array(chosen, dtype=np.int64).reshape(-1, 2)


def _elsewhere(survey: Survey) -> str:
    """What became of the independent starts that have not the loss of the start."""
    ends = survey.ends
    finite = torch.isfinite(ends).all(1)
    other = finite & ~survey.on_level(ends)
    parts = []
    if bool(other.any()):
        heights = survey.above(ends[other])
        worse = "higher" if float(heights.min()) > 0 else "another"
        parts.append(f"{int(other.sum())} of {len(ends)} starts end at {worse} loss")
    if not bool(finite.all()):
        parts.append(f"{int((~finite).sum())} of {len(ends)} do not come to a manifold")
    return f" ({'; '.join(parts)}: these are no part of Gamma here)" if parts else ""


def _holds(survey: Survey, detail: str, pictures: tuple[Picture, ...] = ()) -> Result:
    if not len(survey.restarts):
        meaning = "No independent start comes to this loss: of other components nothing is known."
        return found("undecided", detail + _elsewhere(survey), 1.0, 1.0, meaning, pictures=pictures)
    return found("holds", detail + _elsewhere(survey), 1.0, 1.0, pictures=pictures)


def _fails(survey: Survey, detail: str, count: float, pictures: tuple[Picture, ...] = ()) -> Result:
    meaning = (
        "The set of minimisers has several components. The limiting diffusion stays in that of "
        "Phi(x_init): each has an equilibrium of its own, and which one training comes to is "
        "decided before the limit begins. On one component alone the theory stands."
    )
    return found("fails", detail + _elsewhere(survey), count, 1.0, meaning, pictures=pictures)


def _picture(trace: Trace, on_curve: Tensor, elsewhere: Tensor) -> Picture:
    everything = torch.cat([trace.points, elsewhere])
    center = everything.mean(0)
    axes = torch.linalg.svd(everything - center, full_matrices=False)[2][:2]

    def series(label: str, points: Tensor, style: str) -> Series:
        plane = (points - center) @ axes.T
        return Series(label, plane[:, 0].tolist(), plane[:, 1].tolist(), style)  # type: ignore[arg-type]

    ring = torch.cat([trace.points, trace.points[:1]]) if trace.closed else trace.points
    ring = ring[:: -(-len(ring) // 400)]
    shown = [series("the curve through the start", ring, "line")]
    if len(on_curve):
        shown.append(series("independent starts on it", on_curve, "points"))
    if len(elsewhere):
        shown.append(series("independent starts elsewhere", elsewhere, "points"))
    return Picture("Unit minimisers", "first principal axis", "second", tuple(shown))


CHECKS = (assumption("connectedness", ("Assumption 5.1",), check_connectedness),)
