"""Normalised networks on the digits as problems of any size, with a minimiser.

The targets are the outputs of the network itself, so that its weights fit them: what an operation
costs does not depend on which minimiser it is done at.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from manifold_sde import LeastSquaresProblem, Problem, SamplingNoise, SphericalNoise
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


class Sphere(nn.Module):
    """Values brought to the length that is the root of their number."""

    def forward(self, x: Tensor) -> Tensor:
        """Values (n, k) -> (n, k)."""
        return x * x.square().mean(-1, keepdim=True).rsqrt()


def against(outputs: Tensor, targets: Tensor) -> Tensor:
    """Losses (n,) of outputs and targets (n, k): - <output, target>."""
    return -(outputs * targets).sum(1)


@functools.lru_cache(maxsize=2)
def disputed_digits(
    samples: int, width: int, outputs: int = 5, agreed: int = 1
) -> tuple[Problem, Tensor, nn.Module, tuple[Tensor, Tensor]]:
    """Sampling noise along the manifold: digits whose labels contradict each other.

    Outputs are on a sphere, and the loss is - <output, target>. Of a few digits the target is the
    output; each of the others comes twice, with opposite targets, which cancel in the mean.

    Args:
        samples: Number of samples.
        width: Width of the hidden layer, of 64 + ``outputs`` weights each.
        outputs: Numbers of an output; the rank of H is one less for each digit agreed upon.
        agreed: Digits that are agreed upon.

    Returns:
        The problem, a minimiser of norm 1, and the module and its data.
    """
    pairs = (samples - agreed) // 2
    inputs = digits(agreed + pairs).inputs.double().flatten(1)
    first, second = nn.Linear(64, width, bias=False), nn.Linear(width, outputs, bias=False)
    module = nn.Sequential(first, Sphere(), nn.Tanh(), second, Sphere()).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():  # layers of one norm
            weight.normal_(generator=generator).div_(weight.norm())
    with torch.no_grad():
        agreement = 30.0 * module(inputs[:agreed])
    targets = torch.randn(pairs, outputs, dtype=torch.float64, generator=generator)
    data = torch.cat([inputs, inputs[agreed:]]), torch.cat([agreement, targets, -targets])
    problem = Problem.from_module(
        module, against, *data, SamplingNoise(), rank=agreed * (outputs - 1), name="disputed digits"
    )
    x = problem.vector(module)
    return problem, x / x.norm(), module, data
