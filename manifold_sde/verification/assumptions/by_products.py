"""The assumptions where matrices of D x D do not fit: ranks and noise by products, few points.

The points are the start and those of a short walk. No search goes along Gamma_1 to the worst of
them, and what follows from independent starts, whose flows take minutes, is left undecided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde.deadline import shared_property
from manifold_sde.errors import (
    NoiseError,
    NotOnManifoldError,
    RankError,
    ScaleInvarianceError,
)
from manifold_sde.geometry.rank import MIN_GAP
from manifold_sde.networks import InvariantGroups, invariant_groups
from manifold_sde.noise import CustomNoise, SphericalNoise
from manifold_sde.verification.assumptions import attraction
from manifold_sde.verification.assumptions import groups as dense_groups
from manifold_sde.verification.assumptions import minimisers as dense
from manifold_sde.verification.assumptions.controllability import (
    IN_GROUPS,
    NONE,
    SMALL,
    VANISHES,
    not_unique,
)
from manifold_sde.verification.assumptions.survey import Survey, show_point
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.result import Result, Verdict, found
from manifold_sde.verification.sampling import unit
from manifold_sde.verification.spectra import DOUBT, Extremes, HessianRange, extremes_of
from manifold_sde.verification.subject import Subject

#: Random directions at which losses are compared with those of the minimisers.
_STARTS = 8
#: Columns of sigma up to which all are looked at, and random ones otherwise.
_COLUMNS, _PROBES = 256, 16
#: Bytes that the matrix of a custom noise may take.
_MOST_BYTES = 2**31
#: Probability that a singular value of the noise is smaller than what is said of it.
_SURELY = f"but with probability {DOUBT:g}"


@dataclass(frozen=True)
class Look:
    """What is seen at a point of Gamma_1.

    Attributes:
        point: The point (D,).
        values: Eigenvalues of H that are not zero, ascending, (M,).
        gap, left, lowest: As in :class:`~manifold_sde.verification.spectra.HessianRange`.
        trace: tr Sigma.
        share: tr P Sigma P / tr Sigma, and its standard error, 0 where it is exact.
        noise: Extremes of P Sigma P on the tangent space of Gamma_1; ``None`` where sigma has
            fewer columns than this has dimensions.
        in_groups: The same without the groups' radial vectors.
    """

    point: Tensor
    values: Tensor
    gap: float
    left: float
    lowest: float
    trace: float
    share: tuple[float, float]
    noise: Extremes | None
    in_groups: Extremes | None


class SizedSurvey(Survey):
    """The survey where only products are at hand: a few points, looked at one after the other."""

    lines = 2

    @cached_property
    def starts(self) -> Tensor:
        """Random directions (n, D), whose flows are not followed."""
        return unit(self.subject.normals(60, _STARTS, self.subject.problem.dim))

    @property
    def ends(self) -> Tensor:
        """None, (0, D)."""
        return self.starts[:0]

    @shared_property
    def points(self) -> Tensor:
        """The start, and points of a walk from it that have its loss, (n, D)."""
        try:
            points = self.subject.manifold_points(self.effort.points + 2)
        except (RankError, NotOnManifoldError):
            return self.start[None]
        keep = self.on_level(points)
        keep[0] = True
        return points[keep]

    @cached_property
    def tops(self) -> Tensor:
        """Largest eigenvalue of H at the points, (n,)."""
        return torch.stack([look.values[-1] for look in self.looks])

    @shared_property
    def looks(self) -> list[Look]:
        """What is seen at the points.

        Raises:
            RankError: If H has no range that can be found.
            NoiseError: If the matrix of the noise does not fit into memory.
        """
        require_products(self.subject)
        # The start last: its range is the one that is kept.
        seen = [_look(self, point) for point in self.points.flip(0)]
        return seen[::-1]

    @property
    def rank(self) -> int:
        """Rank of H at the start.

        Raises:
            RankError: If the spectrum has no clear gap there.
        """
        first = self.looks[0]
        if first.gap < MIN_GAP[torch.float64]:
            raise RankError(
                "the dimension of the manifold cannot be read off the Hessian",
                received=f"a largest ratio of neighbouring eigenvalues of {first.gap:.2g}",
                expected=f"a gap of at least {MIN_GAP[torch.float64]:.0e}",
                remedy="rank=M with the problem, if it is known",
            )
        return len(first.values)

    @cached_property
    def weight_groups(self) -> InvariantGroups | None:
        """The groups of a network's weights; ``None`` where they are not known."""
        if self.subject.problem.network is None:
            return None
        try:
            return invariant_groups(self.subject.problem, self.start)
        except ScaleInvarianceError:
            return None

    def radial(self, y: Tensor) -> Tensor:
        """Unit vectors along the groups' parts of a point, (G, D)."""
        groups = self.weight_groups
        return (y / y.norm())[None] if groups is None else groups.radial_vectors(y)


def require_products(subject: Subject) -> None:
    """Refuse a noise whose matrix does not fit into memory, by a NoiseError."""
    problem = subject.problem
    size = 8 * problem.dim * problem.n_noise
    if isinstance(problem.noise, CustomNoise) and size > _MOST_BYTES:
        raise NoiseError(
            "the noise is a matrix that is too large to be looked at",
            received=f"a factor of {problem.dim} x {problem.n_noise}, {size / 1e9:.1f} GB",
            expected=f"at most {_MOST_BYTES / 1e9:.1f} GB",
            remedy="a subclass of Noise whose product needs no matrix, as that of SphericalNoise",
        )


def _look(survey: SizedSurvey, y: Tensor) -> Look:
    subject = survey.subject
    own = subject.hessian_range(y)
    noise = in_groups = None
    dims = subject.problem.dim - own.rank - 1
    if 0 < dims <= subject.problem.n_noise:
        noise = _extremes(subject, own, y, y[None])
    radial = survey.radial(y)
    if len(radial) > 1 and 0 < dims + 1 - len(radial) <= subject.problem.n_noise:
        in_groups = _extremes(subject, own, y, radial)
    return Look(
        point=y,
        values=own.values,
        gap=own.gap,
        left=own.left,
        lowest=own.lowest,
        trace=float(subject.problem.noise_trace(y)),
        share=_share(subject, own, y),
        noise=noise,
        in_groups=in_groups,
    )


def _extremes(subject: Subject, own: HessianRange, y: Tensor, radial: Tensor) -> Extremes:
    """Extremes of P Sigma P on ker H without orthonormal rows (G, D) of it."""
    problem = subject.problem
    noise, loss = problem.noise, problem.pointwise

    def project(v: Tensor) -> Tensor:
        v = own.project(v)
        return v - (radial @ v) @ radial

    def product(v: Tensor) -> Tensor:
        return noise.product(loss, y, noise.transposed_product(loss, y, v))

    dims = problem.dim - own.rank - len(radial)
    return extremes_of(product, project, subject.normals(9, problem.dim), dims)


def _share(subject: Subject, own: HessianRange, y: Tensor) -> tuple[float, float]:
    """The part of the noise along Gamma_1, and its standard error."""
    problem = subject.problem
    if isinstance(problem.noise, SphericalNoise):
        return (problem.dim - own.rank - 1) / (problem.dim - 1), 0.0
    exact = problem.n_noise <= _COLUMNS
    probes = torch.eye(problem.n_noise, dtype=y.dtype)
    if not exact:
        probes = subject.normals(11, _PROBES, problem.n_noise)
    moves = vmap(lambda w: problem.noise.product(problem.pointwise, y, w))(probes)
    along = own.project(moves)
    along = (along - (along @ y)[:, None] * y).square().sum(1)
    whole = moves.square().sum(1).mean().clamp(min=1e-300)
    shares = along / whole
    error = 0.0 if exact else float(shares.std()) / len(shares) ** 0.5
    return float(shares.mean()), error


# The checks.


def _few(survey: SizedSurvey) -> str:
    return f"at {len(survey.looks)} points, by products; no search for the worst at this size"


def check_rank(survey: SizedSurvey) -> Result:
    """The rank of H, by the gap of its spectrum, is that of the geometry, and the same."""
    subject, looks = survey.subject, survey.looks
    if min(look.lowest for look in looks) < -dense.NEGATIVE:
        return found("undecided", "the points are no minimisers")
    rank = survey.rank
    ranks = [len(look.values) for look in looks]
    other = next((i for i, r in enumerate(ranks) if r != rank), None)
    if other is not None:
        detail = (
            f"rank {rank} at {show_point(looks[0].point)} and {ranks[other]} at "
            f"{show_point(looks[other].point)}, by gaps of {looks[0].gap:.1e} and "
            f"{looks[other].gap:.1e}"
        )
        return found("fails", detail, 1.0, 0.0, "The minimisers are not one manifold.")
    claimed, of = subject.problem.rank, "the rank of the problem"
    if claimed is None:
        claimed, of = int(subject.geometry.rank(looks[0].point)), "the rank of the geometry"
    gap = min(look.gap for look in looks)
    if claimed != rank:
        detail = f"{of} is {claimed}, that of H {rank}, by a gap of {gap:.1e} in its spectrum"
        meaning = "Phi, its derivatives and all diffusions are those of another manifold."
        return found("fails", detail, float(abs(claimed - rank)), 0.0, meaning)
    smallest = torch.stack([look.values[0] for look in looks])
    ratio = float(smallest.min() / smallest.max())
    condition = float((survey.tops / smallest).max())
    left = max(look.left for look in looks)
    detail = (
        f"rank {rank} {_few(survey)}; smallest gap {gap:.1e}, where {MIN_GAP[torch.float64]:.0e} "
        f"is asked for: what is outside the range of H has size at most {left:.1g} of the largest "
        f"eigenvalue, {_SURELY}; condition number of H up to {condition:.3g}; its smallest "
        f"nonzero eigenvalue is between {float(smallest.min()):.3g} and {float(smallest.max()):.3g}"
    )
    verdict: Verdict = "holds"
    if ratio <= dense.FALLING:
        verdict = "fails" if ratio <= dense.FALLEN else "undecided"
    return found(verdict, detail, -ratio, -dense.FALLEN)


def check_minimality(survey: SizedSurvey) -> Result:
    """H has no negative eigenvalue, the loss does not fall nearby, and ker H is tangent."""
    lowest = min(look.lowest for look in survey.looks)
    if lowest < -dense.NEGATIVE:
        where = min(survey.looks, key=lambda look: look.lowest).point
        detail = f"H has an eigenvalue of {lowest:.2g} of the largest at {show_point(where)}"
        return dense.no_minimum(detail, -lowest, dense.NEGATIVE)
    directions = survey.subject.normals(63, 4, *survey.points.shape)
    own = survey.subject.hessian_range(survey.start)
    directions[:2, 0] = own.project(directions[:2, 0])
    fall, size, where, distance = dense.largest_fall(survey, directions)
    if fall > dense.UNITS:
        detail = (
            f"the loss falls by {fall * size:.2g} within {distance:g} of {show_point(where)}, "
            f"where rounding is {size:.1g}"
        )
        return dense.no_minimum(detail, fall, dense.UNITS)
    step = own.project(survey.subject.normals(64, survey.subject.problem.dim))
    step = dense.STEP * step / step.norm()
    end = survey.subject.limits((survey.start + step)[None])[0]
    off = float((end - survey.start - step).norm().nan_to_num(nan=1e9)) / dense.STEP
    if not off <= dense.OFF:
        detail = (
            f"a step of {dense.STEP:g} along ker H from the start is off the manifold by "
            f"{off:.2g} of its length"
        )
        meaning = "The kernel of the Hessian is larger than the tangent space."
        return found("fails", detail, off, dense.OFF, meaning)
    detail = (
        f"no negative curvature (at most {max(-lowest, 0.0):.1g} of the largest eigenvalue) "
        f"{_few(survey)}; the loss does not fall near them; a step along ker H from the start "
        f"stays on the manifold to {off:.1g} of its length"
    )
    return found("holds", detail, -lowest, dense.NEGATIVE)


def check_groups(survey: SizedSurvey) -> Result:
    """The groups of a network's weights, which its layers say."""
    groups = survey.weight_groups
    if groups is None:
        detail = "groups of more than 512 coordinates are looked for in networks alone"
        return found("undecided", detail, meaning=dense_groups.NOT_KNOWN)
    if len(groups) == 1:
        return found("holds", "all weights are one group", 1.0, 1.0)
    problem, y = survey.subject.problem, survey.start
    radial = groups.radial_vectors(y)
    loss, noise = problem.pointwise, problem.noise
    top = float(survey.tops[0])
    bent = max(float(loss.hessian_product(y, r).norm()) / top for r in radial)
    size = survey.looks[0].trace ** 0.5
    moved = [float(noise.transposed_product(loss, y, r).norm()) / max(size, 1e-300) for r in radial]
    shown = "; ".join(groups.names[: dense_groups.SHOWN])
    more = len(groups) - dense_groups.SHOWN
    detail = (
        f"{len(groups)} groups of weights can be scaled separately ({shown}"
        f"{f'; and {more} more' if more > 0 else ''}), and the loss stays as it is: along the "
        f"scaling of each, H has {bent:.1g} of its largest eigenvalue, and the noise at most "
        f"{max(moved):.1g} of its whole"
    )
    return found("fails", detail, float(len(groups)), 1.0, dense_groups.SEPARATE)


def check_compactness(survey: SizedSurvey) -> Result:
    """No group's norm can go to 0, and the curvature is bounded at the points."""
    groups = survey.weight_groups
    if groups is not None and len(groups) > 1:
        norms = groups.norms(survey.points)
        return dense_groups.not_compact(len(groups), float(norms.min()), float(norms.max()))
    growth = float(survey.tops.max() / survey.tops.min())
    detail = (
        f"the largest eigenvalue of H is between {float(survey.tops.min()):.3g} and "
        f"{float(survey.tops.max()):.3g} {_few(survey)}"
    )
    if groups is None:
        detail += "; whether there are several groups is not known"
        return found("undecided", detail, growth, dense_groups.GROWING, dense_groups.NOT_KNOWN)
    verdict: Verdict = "holds" if growth < dense_groups.GROWING else "undecided"
    return found(verdict, detail, growth, dense_groups.UNBOUNDED)


def check_diffusion(survey: SizedSurvey) -> Result | None:
    """The noise does not vanish on the manifold, and has a part along it."""
    problem, looks = survey.subject.problem, survey.looks
    if problem.dim - survey.rank - 1 == 0:
        return None
    whole = max(look.trace for look in looks)
    away = float(problem.noise_trace(survey.starts).median())
    if whole <= NONE * away:
        detail = (
            f"tr Sigma is at most {whole:.1g} on Gamma_1, and {away:.2g} at a random direction: "
            "the noise vanishes on the manifold"
        )
        meaning = (
            "Every sample is fitted, or the noise is none: there is no drift and no diffusion, "
            "and the direction stands still."
        )
        return found("fails", detail, 1.0, 0.0, meaning)
    most, error = max(look.share for look in looks)
    least = min(look.share for look in looks)[0]
    if most <= NONE:
        detail = f"tr Sigma is {whole:.2g} on Gamma_1, and the part along it {most:.1g} of that"
        meaning = "This is no diffusion but a deterministic flow."
        return found("fails", detail, 1.0, 0.0, meaning)
    detail = (
        f"tr Sigma is between {min(look.trace for look in looks):.2g} and {whole:.2g} "
        f"{_few(survey)}; {least:.0%} to {most:.0%} of it along Gamma_1"
        f"{f', give or take {error:.1%}' if error else ''}"
    )
    return found("holds", detail, 0.0, 0.0)


def check_controllability(survey: SizedSurvey) -> Sequence[Result]:
    """The smallest singular value of the noise along Gamma_1, by Lanczos' method with its error."""
    dims = survey.subject.problem.dim - survey.rank - 1
    results = [_spanned(survey, dims, [look.noise for look in survey.looks])]
    groups = survey.weight_groups
    if groups is not None and len(groups) > 1:
        own = [look.in_groups for look in survey.looks]
        result = _spanned(survey, dims + 1 - len(groups), own)
        results.append(replace(result, name=IN_GROUPS))
    return results


def _spanned(survey: SizedSurvey, dims: int, seen: Sequence[Extremes | None]) -> Result:
    if dims < 1:
        return found("holds", "there is no direction to move in", 0.0, 0.0)
    known = [one for one in seen if one is not None]
    if len(known) < len(seen):
        detail = (
            f"sigma has {survey.subject.problem.n_noise} columns, and so moves along at most as "
            f"many of the {dims} dimensions, at each point"
        )
        return found("fails", detail, 0.0, -VANISHES, not_unique(dims))
    top = max(one.largest for one in known) ** 0.5
    away = float(survey.subject.problem.noise_trace(survey.starts).median()) ** 0.5
    if top <= NONE**0.5 * away:
        detail = f"the noise moves along none of the {dims} dimensions at any point"
        return found("fails", detail, 0.0, -VANISHES, not_unique(dims))
    worst = min(known, key=lambda one: one.smallest)
    # What a vector is multiplied by is measured on it: squares of rounding are not subtracted.
    noise, index = survey.subject.problem.noise, known.index(worst)
    point = survey.looks[index].point
    moved = noise.transposed_product(survey.subject.problem.pointwise, point, worst.vector)
    ratio, least = float(moved.norm()) / top, min(one.least for one in known) ** 0.5 / top
    detail = (
        f"the smallest singular value of the noise along the {dims} dimensions is at most "
        f"{ratio:.2g} of the largest, {top:.2g}, and not below {least:.2g} of it, {_SURELY}, after "
        f"{worst.steps} steps of Lanczos' method, {_few(survey)}"
    )
    if ratio <= VANISHES:
        meaning = "There is a direction along Gamma_1 in which the noise does not move: "
        return found("fails", detail, -ratio, -VANISHES, meaning + not_unique(dims))
    if least <= SMALL:
        meaning = "Lanczos' method cannot exclude a direction that the noise does not reach."
        return found("undecided", detail, -least, -VANISHES, meaning)
    return found("holds", detail, -least, -VANISHES)


def check_attraction(survey: SizedSurvey) -> Result | None:
    """Gradient flow takes the start, and one point near it, to the manifold."""
    return attraction.attracted(survey, 1, attraction.RADII[:1])


def sized(
    look: Callable[[SizedSurvey], Result | Sequence[Result] | None],
) -> Callable[[Subject, Effort], Result | Sequence[Result] | None]:
    """The function of a check, of a look at a sized survey."""
    return lambda subject, effort: look(SizedSurvey.of(subject, effort))
