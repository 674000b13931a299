"""Strategies for scales, covariances, learning rates and times."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from manifold_sde.errors import ArgumentError

_MANTISSAS = (1, 2, 5, 3, 7)
#: Largest eta / lambda of the rates that Remark 4.2 adds: eta < 2 C lambda with C = 10.
_LARGEST_RATIO = 20.0


@st.composite
def _decimals(draw: st.DrawFn, low: int, high: int) -> float:
    """Numbers of one digit, from 10^low to below 10^(high + 1); they shrink towards 1."""
    exponents = sorted(range(low, high + 1), key=lambda e: (abs(e), e < 0))
    mantissa, exponent = draw(st.sampled_from(_MANTISSAS)), draw(st.sampled_from(exponents))
    return float(f"{mantissa}e{exponent}")


@st.composite
def scales(draw: st.DrawFn) -> float:
    """Factors alpha of weights, from 1e-6 to 1e6, of one digit; they shrink towards 1."""
    return min(draw(_decimals(-6, 6)), 1e6)


@st.composite
def times(draw: st.DrawFn) -> float:
    """Times T of the limiting diffusion (13), from 0 to 5, in hundredths; they shrink towards 0."""
    return draw(st.integers(0, 500)) / 100


@st.composite
def rates(draw: st.DrawFn, *, within_theorem: bool = False) -> tuple[float, float]:
    """Learning rate and weight decay over the range of the theorems, as a tuple (eta, lambda).

    eta lambda goes down to 1e-8, lambda is at most 1, and eta < 2 C lambda with C = 10, as Remark
    4.2 allows. They shrink towards (0.1, 0.1).

    Args:
        draw: Given by Hypothesis.
        within_theorem: Whether eta < 2 lambda always, as Theorems 4.1 and 4.4 ask.
    """
    decay = draw(_decimals(-4, -1).filter(lambda value: value <= 1.0))
    ratio = draw(_decimals(-4, 1))
    most = 2.0 if within_theorem else _LARGEST_RATIO
    ratio = min(ratio, 0.9 * most)
    return min(float(f"{ratio * decay:.3g}"), 1.0 if not within_theorem else 1.9 * decay), decay


@st.composite
def factors(draw: st.DrawFn, dim: int, *, max_rank: int | None = None, min_rank: int = 0) -> Tensor:
    """Factors F (D, m) of a covariance F F^T of any rank, in quarters.

    Args:
        draw: Given by Hypothesis.
        dim: Dimension D.
        max_rank: Largest m; D by default.
        min_rank: Smallest m; a factor of rank 0 has one column of zeros.
    """
    most = dim if max_rank is None else max_rank
    if not 0 <= min_rank <= most <= dim:
        raise ArgumentError(
            "there are no covariances of these ranks",
            received=f"min_rank={min_rank!r}, max_rank={max_rank!r}, dim={dim!r}",
            expected="0 <= min_rank <= max_rank <= dim",
            remedy="leave them out for all ranks",
        )
    rank = draw(st.integers(min_rank, most))
    # A unit lower triangular block makes the rank what it is; its rows are permuted.
    order = draw(st.permutations(range(dim)))
    entries = draw(
        st.lists(st.integers(-8, 8), min_size=dim * max(rank, 1), max_size=dim * max(rank, 1))
    )
    factor = torch.tensor(entries, dtype=torch.float64).reshape(dim, -1) / 4.0
    if rank == 0:
        return torch.zeros(dim, 1, dtype=torch.float64)
    block = factor[:rank].tril(-1) + torch.eye(rank, dtype=torch.float64)
    return torch.cat([block, factor[rank:]])[list(order)]


@st.composite
def covariances(
    draw: st.DrawFn, dim: int, *, max_rank: int | None = None, min_rank: int = 0
) -> Tensor:
    """Covariances (D, D) of any rank from 0 to D; arguments as for :func:`factors`."""
    factor = draw(factors(dim, max_rank=max_rank, min_rank=min_rank))
    return factor @ factor.mT
