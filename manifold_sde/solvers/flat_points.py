"""Points of the manifold near which the rank of the Hessian falls, seen where paths end.

Where a nonzero eigenvalue of H falls to 0 on the manifold, Assumption 2.1 fails: another piece of
the manifold begins there, or a minimum that is flat across. A path can step over such a point
without a trace, and what it does from there on is not the limit of SGD.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from manifold_sde.columns import column_norms
from manifold_sde.equations import ManifoldEquation, StochasticEquation
from manifold_sde.errors import RankWarning
from manifold_sde.solvers.fixed import PathStates

#: Paths of a chunk that are looked at, random vectors for each, and the least that is told.
_PATHS, _VECTORS, _TOLD = 512, 4, 300.0


def flatness(sde: StochasticEquation, state: PathStates) -> float:
    """How much flatter the flattest direction across the manifold is at a path than at most.

    By the size of the pseudo-inverse of H on random vectors, at directions: its largest over its
    median over the paths. Of several groups of weights it is that at the norms that they have.

    Args:
        sde: The equation whose steps were taken.
        state: Where they ended.

    Returns:
        The ratio; 0 where it is not looked at: off the manifold, without matrices, a single path.
    """
    if not isinstance(sde, ManifoldEquation) or sde.geometry.products is not None:
        return 0.0
    alive = torch.nonzero(torch.isfinite(state.x).all(0))[:, 0]
    if len(alive) < 2:
        return 0.0
    few = alive[:: -(-len(alive) // _PATHS)]
    x = state.x[:, few]
    return _largest_over_median(sde, x / column_norms(x), state.basis[..., few])


def _largest_over_median(sde: ManifoldEquation, y: Tensor, basis: Tensor) -> float:
    frame = sde.space.frame(y.contiguous(), basis.contiguous())
    generator = torch.Generator().manual_seed(0)
    square = y.new_zeros(y.shape[1])
    for _ in range(_VECTORS):
        v = torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y)
        square += sde.space.inverse(y, frame, v).square().sum(0)
    square = square[torch.isfinite(square)]
    return float((square.max() / square.median()).sqrt()) if len(square) else 0.0


def warn_of_flat_points(found: float) -> None:
    """Say that some paths end where the rank of the Hessian all but falls.

    Warns:
        RankWarning: If they do.
    """
    if found < _TOLD:
        return
    warnings.warn(
        f"some paths end where a direction across the manifold is over {_TOLD:g} times flatter "
        "than at most: the rank of the Hessian may fall there (Assumption 2.1), and what paths do "
        "that pass such a point is not the limit of SGD. Way out: check_assumptions(problem, y) "
        "finds such points; stop before paths reach them, or compare with run_sgd",
        RankWarning,
        stacklevel=4,
    )
