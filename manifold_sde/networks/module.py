"""The loss of a module, a criterion and data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from manifold_sde import loss_checks
from manifold_sde.arguments import bytes_of, kind_of
from manifold_sde.errors import ArgumentError, DTypeError
from manifold_sde.loss import LeastSquaresLoss, Loss
from manifold_sde.networks import datasets, module_checks, passes, sample_checks
from manifold_sde.networks.criteria import Criterion
from manifold_sde.networks.function import NetworkFunction
from manifold_sde.networks.random_batches import RandomBatches, by_batch_statistics
from manifold_sde.networks.randomness import Generators
from manifold_sde.networks.weights import Weights
from manifold_sde.noise.base import Noise, check_noise
from manifold_sde.torch_norms import elementary

#: Number of sample losses on which derivatives are held against differences.
_CHECKED = 2


def network_loss(
    module: nn.Module,
    criterion: object,
    inputs: Tensor | tuple[Tensor, ...] | Dataset[Any] | DataLoader[Any],
    targets: Tensor | None,
    noise: Noise,
    frozen: str | Iterable[str],
    ghost_size: int | None,
    batches: RandomBatches | None,
    memory: int | str | None,
    progress: bool | str,
) -> tuple[NetworkFunction, Loss]:
    """The network of :meth:`Problem.from_module`, which documents the arguments, and its loss.

    The residuals of mean squared errors are sqrt(2/K) times the differences of a sample's K outputs
    from the targets, so that L is what ``nn.MSELoss()`` computes.
    """
    check_noise(noise)
    if batches is not None:
        module = _as_in_training(module, batches, ghost_size)
    module_checks.check_module(module)
    measure = Criterion(criterion)
    limit = passes.DEFAULT_MEMORY if memory is None else bytes_of(memory)
    data: tuple[object, object] = inputs, targets
    if targets is None and isinstance(inputs, (Dataset, DataLoader)):
        data = datasets.read(inputs, limit, progress)
    tensors, targets = module_checks.check_data(*data)
    weights = Weights(module, frozen)
    loss_checks.check_dim(weights.dim)
    if batches is None:
        block = module_checks.block_of(module, ghost_size, len(targets))
    else:
        block, rows = batches.size, batches.draw(len(targets)).flatten()
        tensors = tuple(value[rows.to(value.device)] for value in tensors)
        targets = targets[rows.to(targets.device)]
    with torch.no_grad():
        network = NetworkFunction(
            *(module, measure, tensors, measure.convert(targets), weights),
            block=block,
            apart=batches is not None,
        )
        generators = Generators()
        usage, whole = passes.measure(network, generators), 0
        if usage is not None:
            whole = usage.fixed + network.n_blocks * usage.per_block
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
    small = network.few(_CHECKED)
    few = _function(small)
    with torch.no_grad():
        n_outputs = len(few(small.test_point)[0]) if measure.is_least_squares else None
    checked = _loss(few, small, n_outputs)
    reverses = functools.cache(partial(loss_checks.reverses_alone, checked, few))
    alone = sample_checks.check_all_samples(network, progress, reverses)
    with torch.no_grad():
        measure.check_mean(outputs, network.targets, batches=not coupled)
    loss_checks.require_derivatives(checked, few, "network's loss", alone=alone)
    made = _loss(_function(network), network, n_outputs)
    made.reverses, made.forwards = checked.reverses, checked.forwards
    made.gradient_bytes = whole
    return network, made


def _as_in_training(module: object, batches: object, ghost_size: int | None) -> nn.Module:
    """The module with the statistics of batches, after it is known that these can be drawn.

    Raises:
        DTypeError, ArgumentError: If they cannot.
    """
    if not isinstance(batches, RandomBatches):
        raise DTypeError(
            "the batches are no random batches",
            received=kind_of(batches),
            expected="manifold_sde.networks.RandomBatches",
            remedy="batches=RandomBatches(size=32, count=256)",
        )
    if ghost_size is not None:
        raise ArgumentError(
            "ghost batches and random batches are two forms of the same",
            received=f"ghost_size={ghost_size!r} and {batches!r}",
            expected="one of them",
            remedy="batches=RandomBatches(size, count) alone, for batches that are drawn",
        )
    if not isinstance(module, nn.Module):
        module_checks.check_module(module)
    assert isinstance(module, nn.Module)
    return by_batch_statistics(module, batches.size)


def _loss(
    function: Callable[[Tensor], Tensor], network: NetworkFunction, n_outputs: int | None
) -> Loss:
    dim, count = network.weights.dim, network.n_blocks
    if n_outputs is not None:
        return LeastSquaresLoss(function, dim, count, n_outputs)
    return Loss(function, dim, count if network.samples else None)


def _function(network: NetworkFunction) -> Callable[[Tensor], Tensor]:
    """The network as a function of x, in elementary operations where torch's are wrong."""
    function = network.by_samples() if network.samples else network
    return elementary(function, network.test_point)
