"""What tells one problem from another: its gradient and its noise at a point."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.loss_checks import fixed_directions
from manifold_sde.problem import Problem

#: Largest relative difference of gradients and noise that counts as that of two machines.
_SAME = {torch.float64: 1e-9, torch.float32: 1e-4}


def probe(problem: Problem, ys: Tensor) -> dict[str, Tensor]:
    """What tells a problem apart: a point near the first state, gradient and noise there."""
    states = ys[0].reshape(-1, ys.shape[-1])
    point = states[0] + 0.125 if len(states) else ys.new_zeros(ys.shape[-1])
    if not len(states):
        return {"probe": point, "probe_gradient": point, "probe_noise": point}
    found = values_at(problem, point)
    return {"probe": point, **{f"probe_{name}": value for name, value in found.items()}}


def values_at(problem: Problem, point: Tensor) -> dict[str, Tensor]:
    """What tells a problem apart at a point (D,): its gradient, and sigma times one vector."""
    weights = fixed_directions(problem.n_noise, 1)[0].to(point)
    gradient, noise = problem.gradient(point), problem.noise_product(point, weights)
    return {"gradient": gradient.detach(), "noise": noise.detach()}


def close(mine: Tensor, stored: Tensor) -> bool:
    """Whether two tensors agree to rounding, which differs from machine to machine."""
    if mine.shape != stored.shape:
        return False
    apart = float((mine - stored.to(mine)).abs().max())
    return apart <= _SAME.get(mine.dtype, 1e-4) * float(stored.abs().max())
