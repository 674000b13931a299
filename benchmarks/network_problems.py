"""Normalised networks on the digits as problems of any size, with a minimiser.

The targets are the outputs of the network itself, so that its weights fit them: what an operation
costs does not depend on which minimiser it is done at.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from manifold_sde import LeastSquaresProblem, Problem, SphericalNoise
from manifold_sde.networks import NormalizedMLP
from manifold_sde.networks.data import digits

CLASSES = 10
#: Hidden layers by what the benchmarks call the size; the number of parameters is near it.
HIDDEN = {
    "1k": (16,),
    "10k": (100, 36),
    "20k": (200, 36),
    "86k": (230, 230, 80),
    "100k": (250, 250, 84),
    "1M": (900, 900, 147),
}


@functools.lru_cache(maxsize=2)
def network(size: str, samples: int) -> tuple[LeastSquaresProblem, Tensor]:
    """A problem whose noise has trace 1 at norm 1, and a minimiser of norm 1.

    Args:
        size: One of :data:`HIDDEN`.
        samples: Number of digits; each has ten residuals.
    """
    data = digits(samples)
    module = NormalizedMLP((64, *HIDDEN[size], CLASSES), seed=1).double()
    with torch.no_grad():
        targets = module(data.inputs)
    problem = Problem.from_module(
        module, nn.MSELoss(), data.inputs, targets, SphericalNoise(1.0), name=f"digits, {size}"
    )
    assert isinstance(problem, LeastSquaresProblem)
    x = problem.vector(module)
    return problem.with_noise(SphericalNoise((problem.dim - 1) ** -0.5)), x / x.norm()
