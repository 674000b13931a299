"""The error of a drift that is taken by random columns of the noise, estimated."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from manifold_sde.equations import ManifoldEquation
from manifold_sde.geometry.matrix_free import MatrixFreeSpace
from manifold_sde.geometry.sketched_drift import error_of_drift, numbers
from manifold_sde.solvers.brownian import BrownianPath
from manifold_sde.solvers.brownian_nodes import DEEPEST
from manifold_sde.solvers.simulation import Simulation

#: States at which it is looked at, and the least number of columns.
_LOOKS, _COLUMNS = 4, 8


def drift_error(simulation: Simulation, states: Tensor) -> dict[str, float]:
    """How far the drift by random columns is from the drift; nothing where that is exact.

    Args:
        simulation: What was run.
        states: States (..., D, n), of which some are looked at; NaN where a path was lost.

    Returns:
        "drift_error": the standard error of the drift of a step over the size of what is stepped
        with, root mean squares over the states. "drift_variance": the part of the variance of a
        step that it makes up.
    """
    equation = simulation.equation
    if not isinstance(equation, ManifoldEquation) or simulation.scheme != "walk":
        return {}
    columns = equation.drift_columns
    if not columns:
        return {}
    states = states.movedim(-2, -1).flatten(0, -2)
    states = states[torch.isfinite(states).all(1)]
    if not len(states):
        return {}
    space = equation.space
    assert isinstance(space, MatrixFreeSpace)
    few = states[:: -(-len(states) // _LOOKS)]
    y = (few / few.norm(dim=1, keepdim=True)).T.contiguous()
    # The numbers of intervals that are shorter than any step.
    source = BrownianPath(simulation.seed, 1, len(few), dtype=y.dtype, device=y.device)
    normals = source.auxiliary(DEEPEST, 0, numbers(space, max(_COLUMNS, columns)))
    basis = space.over_points(space.reference_basis, y)
    found = space.over_points(functools.partial(error_of_drift, space), y, basis, normals)
    variance, square, along = (float(part.mean()) for part in found)
    error = variance / columns
    size = max(square, 0.0) + error
    return {
        "drift_error": (error / size) ** 0.5 if size else 0.0,
        "drift_variance": simulation.grid.h * error / along if along else 0.0,
    }
