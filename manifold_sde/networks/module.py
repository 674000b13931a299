"""Problems made from a module, a criterion and data."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from manifold_sde import loss_checks
from manifold_sde.elementary import elementary
from manifold_sde.least_squares import LeastSquaresProblem
from manifold_sde.memory import bytes_of
from manifold_sde.networks import module_checks, passes, sample_checks
from manifold_sde.networks.criteria import Criterion
from manifold_sde.networks.function import NetworkFunction
from manifold_sde.networks.randomness import Generators
from manifold_sde.networks.weights import Weights
from manifold_sde.noise.base import Noise, check_noise
from manifold_sde.pointwise import LeastSquaresPointwise, Pointwise
from manifold_sde.problem import Problem

#: Number of sample losses on which derivatives are held against differences.
_CHECKED = 2


class ModuleProblem(Problem):
    """The loss of a network, by :meth:`Problem.from_module`.

    Args:
        network: The network on its data.
        noise: The gradient noise.
        rank: Rank M of the Hessian on the manifold of minimisers, where it is known.
        name: Name used in messages and figures.
    """

    def __init__(
        self, network: NetworkFunction, noise: Noise, *, rank: int | None, name: str | None
    ) -> None:
        checked = _pointwise(_few(network))
        loss_checks.require_derivatives(checked, checked.function, "network's loss")
        self.network = network
        self._setup(_pointwise(network), noise, rank, name or network.__name__)


class ModuleLeastSquaresProblem(LeastSquaresProblem):
    """The mean squared error of a network, by :meth:`Problem.from_module`.

    The residuals of a sample are sqrt(2/K) times the differences of its K outputs from the
    targets, so that L is what ``nn.MSELoss()`` computes.

    Args:
        network: The network on its data.
        noise: The gradient noise.
        rank: Rank M of the Hessian on the manifold of minimisers, where it is known.
        name: Name used in messages and figures.
    """

    def __init__(
        self, network: NetworkFunction, noise: Noise, *, rank: int | None, name: str | None
    ) -> None:
        few = _function(_few(network))
        dim = network.weights.dim
        value = few(loss_checks.fixed_directions(dim, 1)[0])
        checked = LeastSquaresPointwise(few, dim, *value.shape)
        loss_checks.require_derivatives(checked, few, "network's loss")
        self.network = network
        n_outputs = value.shape[1]
        pointwise = LeastSquaresPointwise(_function(network), dim, network.n_blocks, n_outputs)
        self._setup(pointwise, noise, rank, name or network.__name__)


def _pointwise(network: NetworkFunction) -> Pointwise:
    count = network.n_blocks if network.samples else None
    return Pointwise(_function(network), network.weights.dim, count)


def _function(network: NetworkFunction) -> Callable[[Tensor], Tensor]:
    """The network as a function of x, in elementary operations where torch's are wrong."""
    function = network.by_samples() if network.samples else network
    return elementary(function, loss_checks.fixed_directions(network.weights.dim, 1)[0])


def _few(network: NetworkFunction) -> NetworkFunction:
    """The network on a few of its blocks of samples: checks do not get slower with the data."""
    count = min(_CHECKED, network.n_blocks)
    if not network.samples or count == network.n_blocks:
        return network
    return network.of_blocks([i * network.n_blocks // count for i in range(count)])


def problem_from_module(
    module: nn.Module,
    criterion: object,
    inputs: Tensor | tuple[Tensor, ...],
    targets: Tensor,
    noise: Noise,
    *,
    rank: int | None,
    name: str | None,
    frozen: str | Iterable[str],
    ghost_size: int | None,
    memory: int | str | None,
) -> Problem:
    """The problem of a module; :meth:`Problem.from_module` documents the arguments."""
    check_noise(noise)
    module_checks.check_module(module)
    measure = Criterion(criterion)
    tensors, targets = module_checks.check_data(inputs, targets)
    weights = Weights(module, frozen)
    loss_checks.check_dim(weights.dim)
    block = module_checks.block_of(module, ghost_size, len(targets))
    limit = passes.DEFAULT_MEMORY if memory is None else bytes_of(memory)
    with torch.no_grad():
        network = NetworkFunction(
            module, measure, tensors, measure.convert(targets), weights, block=block
        )
        generators = Generators()
        usage = passes.measure(network, generators)
        if usage is not None:
            network.per_pass = passes.blocks_per_pass(usage, limit)
        outputs = module_checks.check_forward(network, generators)
        measure.check_targets(outputs, network.targets, generators)
        coupled = module_checks.coupled(network, outputs)
        if coupled:
            module_checks.require_uncoupled_noise(network, noise)
            if usage and memory is not None:
                passes.require_one_pass(usage, limit, network.n_blocks)
            network = network.with_samples(block=len(targets), samples=measure.is_least_squares)
        else:
            sample_checks.check_places(network)
    sample_checks.check_all_samples(network)
    with torch.no_grad():
        measure.check_mean(outputs, network.targets, batches=not coupled)
    kind = ModuleLeastSquaresProblem if measure.is_least_squares else ModuleProblem
    return kind(network, noise, rank=rank, name=name)
