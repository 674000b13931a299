"""Whether a loss has an intrinsic clock: the radial part of its gradient at one point."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.loss import Loss
from manifold_sde.loss_checks import fixed_directions
from manifold_sde.networks import measurement
from manifold_sde.problem import Problem
from manifold_sde.scale_invariance import INVARIANCE_TOLERANCE
from manifold_sde.torch_norms import ElementaryFunction


def radial_gradient(problem: Problem, start: Tensor) -> dict[str, float]:
    """For the ``stats`` of a run, how far its loss is from having a clock u; nothing if it has one.

    It is one gradient: of the loss at a fixed point, or of a few samples of a network at a generic
    point near the first start, since the effect of an eps depends on the size of the weights.

    Args:
        problem: The problem.
        start: Starts (n, D).

    Returns:
        ``{"radial_gradient": |<x, grad L>| / (|x| |grad L|)}`` where that is no rounding.
    """
    if problem.network is None:
        x = fixed_directions(problem.dim, 1)[0].to(start)
        slope = problem.gradient(x)
    else:
        few = problem.network.few(measurement.SAMPLES)
        x = measurement.points_near(start[0], 2)[1]
        samples = few.n_blocks if few.samples else None
        slope = Loss(ElementaryFunction(few.losses), problem.dim, samples).gradient(x)
    size = (x.norm() * slope.norm()).clamp(min=torch.finfo(x.dtype).tiny)
    part = float((x @ slope).abs() / size)
    return {"radial_gradient": part} if part > INVARIANCE_TOLERANCE[x.dtype] else {}
