r"""Batch normalisation in training mode: the mini-batch is what has a loss.

Each step of training normalises by the statistics of its own batch b, drawn anew. So the loss that
SGD descends is the mean over batches, :math:`\bar L = E_b L_b`, which differs from the loss of the
whole data set, and a step has the noise :math:`\operatorname{Cov}_b \nabla L_b`. Both are
estimated here from R batches that are drawn once; given these, all is exact: a batch is what the
theory calls a sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manifold_sde.arguments import check_integer, check_point, kind_of
from manifold_sde.errors import ArgumentError, DTypeError, NoiseError
from manifold_sde.loss import Loss
from manifold_sde.networks.copies import independent_copy
from manifold_sde.networks.invariance_report import NetworkProblem
from manifold_sde.networks.layers import GhostBatchNorm
from manifold_sde.networks.mlp import generator_of
from manifold_sde.networks.module_checks import RUNNING
from manifold_sde.paper import implements


@dataclass(frozen=True)
class RandomBatches:
    """Random mini-batches of a data set, drawn once.

    Each is a set of different samples, every set as likely as any other: what a loader that
    shuffles gives at one step.

    Attributes:
        size: Number B of samples in a batch.
        count: Number R of batches. What they estimate has an error of the order of 1 / sqrt(R).
        seed: Seed.

    Raises:
        ArgumentError: If an attribute is out of range.

    Example:
        >>> from manifold_sde.networks import RandomBatches
        >>> RandomBatches(size=2, count=3).draw(5).shape
        torch.Size([3, 2])
    """

    size: int
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        one = "GroupNorm or LayerNorm, which normalise each sample by itself"
        check_integer("size", self.size, 2, 2**31, one)
        check_integer("count", self.count, 2, 2**31, "count=256, of which the error is a sixteenth")
        generator_of(self.seed)

    def draw(self, n_samples: int) -> Tensor:
        """Numbers of the samples in each batch, (R, B).

        Raises:
            ArgumentError: If there are no more samples than in a batch.
        """
        if self.size >= n_samples:
            raise ArgumentError(
                "a random batch has to be smaller than the data",
                received=f"size={self.size} of {n_samples} samples",
                expected=f"size below {n_samples}: all batches would be the same",
                remedy="a smaller size; without batches= for the loss of the whole data set",
            )
        generator = generator_of(self.seed)
        orders = (torch.randperm(n_samples, generator=generator) for _ in range(self.count))
        return torch.stack([order[: self.size] for order in orders])


def by_batch_statistics(module: nn.Module, size: int) -> nn.Module:
    """A copy of a module that normalises as in training, and leaves its running statistics alone.

    Args:
        module: The module.
        size: Number of samples in a batch.

    Raises:
        ArgumentError: If it normalises by running statistics, or has ghost batches that do not
            divide a batch.
    """
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, RUNNING)]
    fixed = [n for n, m in layers if m.track_running_stats and not m.training]
    if fixed:
        raise ArgumentError(
            "the batches change nothing: the module normalises by running statistics",
            received=f"in eval mode: {', '.join(fixed)}",
            expected="layers that normalise by the statistics of a batch",
            remedy="module.train(); without batches= for the module as it is",
        )
    ghosts = {m.size for m in module.modules() if isinstance(m, GhostBatchNorm) and m.size}
    if any(size % ghost for ghost in ghosts):
        raise ArgumentError(
            "the ghost batches do not divide a batch",
            received=f"ghost batches of {', '.join(map(str, sorted(ghosts)))}, batches of {size}",
            expected="batches of a multiple of their size",
            remedy="another size of the batches; GhostBatchNorm(None) for the whole of a batch",
        )
    other = independent_copy(module, "module")
    for own, before in zip(other.parameters(), module.parameters(), strict=True):
        own.requires_grad_(before.requires_grad)
    for layer in other.modules():
        if isinstance(layer, RUNNING):
            layer.track_running_stats = False
    return other


@dataclass(frozen=True)
class BatchLaw:
    """Mean and covariance of the gradient of a random batch, as R batches estimate them.

    Attributes:
        gradient: The mean over the batches, (D,): that of the loss which SGD descends.
        gradient_error: Its standard error: root of the mean square of its distance from the
            expectation over all batches.
        trace: Trace of the covariance of one batch, without bias.
        trace_error: Its standard error.
        n_batches: Number R of batches.
    """

    gradient: Tensor
    gradient_error: float
    trace: float
    trace_error: float
    n_batches: int

    def __str__(self) -> str:
        size = float(self.gradient.norm())
        return (
            f"of {self.n_batches} batches: mean gradient {size:.3g} with a standard error of "
            f"{self.gradient_error:.2g}, trace of the covariance {self.trace:.3g} "
            f"with one of {self.trace_error:.2g}"
        )


@implements("Equation (2)")
def batch_law(problem: NetworkProblem, x: Tensor) -> BatchLaw:
    """What the batches of a problem say of a step of SGD on random batches, and how surely.

    Args:
        problem: A problem of a module with ``batches=``, or with ghost batches.
        x: Point (D,).

    Raises:
        DTypeError: If it is none.
        NoiseError: If it has no losses of batches or samples.
    """
    if not isinstance(getattr(problem, "pointwise", None), Loss):
        raise DTypeError(
            "the problem is not a Problem",
            received=kind_of(problem),
            expected="a problem of a module with batches",
            remedy="Problem.from_module(..., batches=RandomBatches(size=32, count=256))",
        )
    loss: Loss = problem.pointwise
    if loss.n_samples is None or loss.n_samples < 2:
        raise NoiseError(
            "the problem has no losses of batches",
            received=f"{problem!r}",
            expected="a problem of several batches",
            remedy="Problem.from_module(..., batches=RandomBatches(size=32, count=256))",
        )
    x = check_point(x, loss.dim, values=True)
    mean, count = loss.gradient(x), loss.n_samples
    squares = torch.cat(
        [(loss.gradients_of(x, which) - mean).square().sum(1) for which in loss.blocks_of_samples()]
    )
    trace = float(squares.sum()) / (count - 1)
    return BatchLaw(
        gradient=mean,
        gradient_error=math.sqrt(trace / count),
        trace=trace,
        trace_error=float(squares.std()) / math.sqrt(count),
        n_batches=count,
    )
