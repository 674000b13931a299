"""Strategies for points of the cone, of the attraction set and of the manifold."""

from __future__ import annotations

from functools import lru_cache

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from manifold_sde.errors import LimitMapError
from manifold_sde.problem import Problem
from manifold_sde.verification.strategies.numbers import scales
from manifold_sde.verification.subject import Subject

#: Largest offset of each coordinate from a minimiser, in eighths, divided by the root of D.
_EIGHTHS = 4
#: Decimals of a point of the attraction set, before it is scaled.
_DECIMALS = 3


@lru_cache(maxsize=512)
def _subject(problem: Problem) -> Subject:
    return Subject.of(problem)


def _scaled(x: Tensor, alpha: float) -> Tensor:
    """Alpha x, each coordinate rounded as its decimal notation is read."""
    return torch.tensor([float(f"{v * alpha:.12g}") for v in x.tolist()], dtype=torch.float64)


@st.composite
def cone_points(draw: st.DrawFn, dim: int) -> Tensor:
    """Points (D,) other than 0, in any direction, of norms from about 1e-6 to 1e6.

    Their directions have coordinates in eighths; they shrink towards the first unit vector.

    Args:
        draw: Given by Hypothesis.
        dim: Dimension D.
    """
    eighths = draw(st.lists(st.integers(-8, 8), min_size=dim, max_size=dim))
    x = torch.tensor(eighths, dtype=torch.float64) / 8.0
    if not bool((x != 0).any()):
        x[0] = 1.0
    return _scaled(x, draw(scales()))


def _near(draw: st.DrawFn, problem: Problem) -> Tensor:
    """A point near a minimiser, in thousandths: (D,)."""
    start = _subject(problem).start
    offsets = st.integers(-_EIGHTHS, _EIGHTHS)
    drawn = draw(st.lists(offsets, min_size=problem.dim, max_size=problem.dim))
    offset = torch.tensor(drawn, dtype=torch.float64) / 8.0 / problem.dim**0.5
    return (start + offset).round(decimals=_DECIMALS)


def _limit(problem: Problem, x: Tensor) -> Tensor | None:
    try:
        return _subject(problem).geometry.limit_map(x)
    except LimitMapError:
        return None


@st.composite
def attraction_points(draw: st.DrawFn, problem: Problem) -> Tensor:
    """Points (D,) from which gradient flow ends on the manifold, of norms from 1e-6 to 1e6.

    They shrink towards a minimiser. A problem of your own has to have one that is found: see
    ``Subject.start``.

    Args:
        draw: Given by Hypothesis.
        problem: The problem.
    """
    x = _near(draw, problem)
    assume(bool((x != 0).any()) and _limit(problem, x) is not None)
    return _scaled(x, draw(scales()))


@st.composite
def manifold_points(draw: st.DrawFn, problem: Problem) -> Tensor:
    """Points (D,) of the manifold of minimisers, of norms from 1e-6 to 1e6.

    Args:
        draw: Given by Hypothesis.
        problem: The problem.
    """
    x = _near(draw, problem)
    assume(bool((x != 0).any()))
    y = _limit(problem, x)
    assume(y is not None)
    assert y is not None
    return y * (draw(scales()) / y.norm())
