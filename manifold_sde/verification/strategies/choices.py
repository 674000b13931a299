"""Strategies for problems and their noise, alone and with points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from hypothesis import strategies as st
from torch import Tensor

from manifold_sde import (
    CustomNoise,
    LabelNoise,
    LeastSquaresProblem,
    Problem,
    SamplingNoise,
    SphericalNoise,
)
from manifold_sde.errors import ArgumentError
from manifold_sde.noise import Noise
from manifold_sde.verification.strategies import points
from manifold_sde.verification.strategies.models import (
    NormalizedNetwork,
    ResidualModel,
    SymbolicModel,
    TangentColumns,
    TiltedModel,
    make,
)

Family = Literal["residuals", "tilted", "network", "symbolic"]
Place = Literal["manifold", "attraction", "cone"]

_FAMILIES: tuple[Family, ...] = ("residuals", "tilted", "network", "symbolic")
_PLACES = {"manifold": points.manifold_points, "attraction": points.attraction_points}
_SCALES = (0.3, 1.0, 0.1, 2.0)
#: Dimensions and ranks of residuals, widths and inputs of networks, coefficients of expressions.
_RANKS = tuple((dim, rank) for dim in range(3, 9) for rank in range(1, dim - 1))
_WIDTHS = ((2, 2), (2, 3), (3, 2))
_COEFFICIENTS = ((0, 0, 1), (0, 1, 2), (0, 0, 1, 2), (0, 1, -1, 2))
#: Few seeds: each problem undergoes its checks once.
_SEEDS = st.integers(0, 4)


@st.composite
def noises(draw: st.DrawFn, problem: Problem) -> Noise:
    """Noises of degree -1, orthogonal to the weights, that fit a problem.

    Spherical and custom ones fit every problem; samples have that of drawing them, and least
    squares label noise. They shrink towards ``SphericalNoise(0.3)``.

    Args:
        draw: Given by Hypothesis.
        problem: The problem.
    """
    kinds = ["spherical", "custom"]
    samples = problem.n_samples or 0
    kinds += ["sampling"] * (samples > 1) + ["label"] * isinstance(problem, LeastSquaresProblem)
    kind, scale = draw(st.sampled_from(kinds)), draw(st.sampled_from(_SCALES))
    if kind == "spherical":
        return SphericalNoise(scale)
    if kind == "custom":
        columns, seed = draw(st.integers(1, problem.dim)), draw(st.integers(0, 9))
        return CustomNoise(TangentColumns(problem.dim, columns, scale, seed))
    if kind == "label":
        return LabelNoise(scale, draw(st.integers(1, 4)))
    replacement = draw(st.booleans()) or samples < 3
    batch_size = draw(st.integers(1, 4 if replacement else samples - 1))
    return SamplingNoise(batch_size, replacement=replacement)


@st.composite
def problems(
    draw: st.DrawFn,
    families: Sequence[Family] = _FAMILIES,
    *,
    max_dim: int = 6,
    noise: Noise | None = None,
) -> Problem:
    """Scale-invariant problems: random residuals, samples that disagree, networks, expressions.

    Their manifolds have dimension 1 and more, their Hessians are well conditioned, and each knows
    a minimiser. They print as the code that makes them, and shrink towards
    ``strategies.ResidualModel(dim=3, rank=1, seed=0, curvature=0.0,
    noise=SphericalNoise(scale=0.3))``.

    Args:
        draw: Given by Hypothesis.
        families: Which of "residuals", "tilted", "network" and "symbolic".
        max_dim: Largest dimension D, from 4 to 8.
        noise: The noise of all; drawn for each by default (:func:`noises`).
    """
    unknown = [family for family in families if family not in _FAMILIES]
    if unknown or not families or not 4 <= max_dim <= 8:
        raise ArgumentError(
            "there are no problems of this kind",
            received=f"families={families!r}, max_dim={max_dim!r}",
            expected=f"some of {', '.join(_FAMILIES)}, and max_dim from 4 to 8",
            remedy="leave them out for problems of all families",
        )
    family = draw(st.sampled_from(list(families)))
    base = _base(draw, family, max_dim)
    return base.with_noise(noise or draw(noises(base)))


def _base(draw: st.DrawFn, family: Family, max_dim: int) -> Problem:
    """A problem of a family; three draws or more for each, so that none shrinks to another."""
    spherical = SphericalNoise(0.3)
    if family == "symbolic":
        fitting = [c for c in _COEFFICIENTS if len(c) <= max_dim]
        return make(
            SymbolicModel,
            spherical,
            coefficients=draw(st.sampled_from(fitting)),
            weight=draw(st.sampled_from((0.0, 0.5))),
            height=draw(st.sampled_from((0.0, 0.5))),
        )
    if family == "network":
        inputs, width = draw(st.sampled_from([w for w in _WIDTHS if w[0] * w[1] <= max_dim]))
        return make(
            NormalizedNetwork,
            spherical,
            inputs=inputs,
            width=width,
            n_samples=draw(st.integers(1, 2)),
            seed=draw(_SEEDS),
        )
    dim, rank = draw(st.sampled_from([r for r in _RANKS if r[0] <= max_dim]))
    curvature = draw(st.sampled_from((0.0, 0.25, 0.5)))
    shape = {"dim": dim, "rank": rank, "seed": draw(_SEEDS), "curvature": curvature}
    if family == "residuals":
        return make(ResidualModel, spherical, **shape)
    return make(TiltedModel, spherical, **shape, tilt=draw(st.sampled_from((0.25, 0.5))))


@st.composite
def problems_with_points(
    draw: st.DrawFn,
    place: Place = "attraction",
    families: Sequence[Family] = _FAMILIES,
    *,
    max_dim: int = 6,
    noise: Noise | None = None,
) -> tuple[Problem, Tensor]:
    """Problems of :func:`problems`, each with a point, as a tuple (problem, x).

    Args:
        draw: Given by Hypothesis.
        place: Where x is: on the "manifold", in the "attraction" set, or anywhere in the "cone".
        families: As for :func:`problems`.
        max_dim: Likewise.
        noise: Likewise.
    """
    if place != "cone" and place not in _PLACES:
        raise ArgumentError(
            "there are no points of this kind",
            received=repr(place),
            expected='"manifold", "attraction" or "cone"',
            remedy='place="attraction"',
        )
    problem = draw(problems(families, max_dim=max_dim, noise=noise))
    if place == "cone":
        return problem, draw(points.cone_points(problem.dim))
    return problem, draw(_PLACES[place](problem))
