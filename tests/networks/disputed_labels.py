"""A network whose samples disagree on its minimisers: sampling noise along the manifold.

The loss of a sample is -<output, target> with outputs on a sphere. Of a few inputs the target is
where the network has its output; each of the others comes twice, with opposite targets. These pull
at the weights in turn, and cancel in the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manifold_sde import Problem, SamplingNoise


class Sphere(nn.Module):
    """Values brought to the length that is the root of their number."""

    def forward(self, x: Tensor) -> Tensor:
        """Values (n, k) -> (n, k)."""
        return x * x.square().mean(-1, keepdim=True).rsqrt()


def disputed(
    inputs: int = 3,
    width: int = 4,
    outputs: int = 3,
    agreed: int = 2,
    n_samples: int = 14,
    seed: int = 0,
) -> tuple[Problem, Tensor]:
    """The problem, and its minimiser of norm 1.

    Args:
        inputs: Size of an input.
        width: Size of the hidden layer.
        outputs: Size of an output.
        agreed: Inputs whose target is the output: the rank is outputs - 1 for each.
        n_samples: Number of samples.
        seed: Seed of inputs, weights and targets.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    module = nn.Sequential(
        nn.Linear(inputs, width, bias=False),
        Sphere(),
        nn.Tanh(),
        nn.Linear(width, outputs, bias=False),
        Sphere(),
    ).double()
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(normal(*weight.shape))
    pairs = (n_samples - agreed) // 2
    first, others, targets = normal(agreed, inputs), normal(pairs, inputs), normal(pairs, outputs)
    with torch.no_grad():
        agreement = 2.0 * n_samples / agreed * module(first) / outputs
    problem = Problem.from_module(
        module,
        lambda found, target: -(found * target).sum(1),
        torch.cat([first, others, others]),
        torch.cat([agreement, targets, -targets]),
        SamplingNoise(),
        rank=agreed * (outputs - 1),
    )
    x = problem.vector(module)
    return problem, x / x.norm()
