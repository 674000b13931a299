"""What a module, a criterion and data compute, as a function of one vector of weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from manifold_sde.arguments import check_point
from manifold_sde.derivatives import batched
from manifold_sde.errors import ArgumentError
from manifold_sde.loss import PerSampleFunction, follow, joined, slices
from manifold_sde.loss_checks import fixed_directions
from manifold_sde.networks.copies import independent_copy, unchanged
from manifold_sde.networks.criteria import Criterion
from manifold_sde.networks.weights import Weights
from manifold_sde.torch_norms import ElementaryFunction


class NetworkFunction:
    """Sample losses, or residuals, of a network as a function of x (D,).

    Frozen parameters and buffers are constants, copied when it is made; they and the data follow
    the dtype and device of x.

    Args:
        module: The module; a copy is kept, and the module is never changed.
        criterion: The criterion.
        inputs: What the module is called with, (N, ...) each.
        targets: The targets (N, ...).
        weights: Which parameters make up x.
        block: Number of samples, one after the other, whose mean loss is one sample loss.
        samples: Whether the samples, or blocks of them, have losses of their own.
        per_pass: Number of blocks evaluated at once; all of them where it is ``None``.
        apart: Whether the module sees one block at a call, as if it was all there is.

    Attributes:
        module, criterion, inputs, targets, weights, block, samples, per_pass, apart: As given.
        constants: Frozen parameters and buffers, by name.
        start: The module's weights, as x (D,).
    """

    def __init__(
        self,
        module: nn.Module,
        criterion: Criterion,
        inputs: tuple[Tensor, ...],
        targets: Tensor,
        weights: Weights,
        *,
        block: int = 1,
        samples: bool = True,
        per_pass: int | None = None,
        apart: bool = False,
    ) -> None:
        self.apart = apart
        self.module = independent_copy(module, "module")
        self.criterion = criterion
        self.inputs = inputs
        self.targets = targets
        self.weights = weights
        self.block = block
        self.samples = samples
        self.per_pass = per_pass
        self.start = weights.vector(module)
        tensors = [*self.module.named_parameters(), *self.module.named_buffers()]
        self.constants = {n: t.detach() for n, t in tensors if n not in weights.parameters}
        first = {id(t): n for n, t in tensors}
        every = [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]
        #: The name of each tensor that a call replaces, and of that in whose place it stands.
        self._names = [(n, first[id(t)]) for n, t in every]
        self.__name__ = type(module).__name__

    def with_samples(self, *, block: int, samples: bool) -> NetworkFunction:
        """The same network with losses of other blocks of samples, or with one loss."""
        other = copy.copy(self)
        other.block, other.samples = block, samples
        return other

    def on(self, inputs: tuple[Tensor, ...], targets: Tensor) -> NetworkFunction:
        """The same network on other data."""
        other = copy.copy(self)
        other.inputs, other.targets = inputs, targets
        return other

    def subset(self, index: Tensor) -> NetworkFunction:
        """The same network on some of the samples, given by their numbers."""
        large = self.per_pass is not None and len(index) > self.per_pass * self.block
        inputs: Any = tuple(
            _Rows(value, index) if large else value[index.to(value.device)] for value in self.inputs
        )
        return self.on(inputs, self.targets[index.to(self.targets.device)])

    def of_blocks(self, blocks: Sequence[int]) -> NetworkFunction:
        """The same network on some of the blocks of samples."""
        index = torch.arange(len(self.targets)).reshape(-1, self.block)
        return self.subset(index[torch.tensor(blocks)].flatten())

    def few(self, count: int) -> NetworkFunction:
        """The same network on so many of its blocks of samples; on all where they are coupled."""
        if not self.samples or self.n_blocks <= count:
            return self
        return self.of_blocks([i * self.n_blocks // count for i in range(count)])

    @property
    def test_point(self) -> Tensor:
        """A fixed direction, as x (D,)."""
        return fixed_directions(self.weights.dim, 1)[0]

    @property
    def n_blocks(self) -> int:
        """Number Xi of blocks of samples."""
        return len(self.targets) // self.block

    def constants_for(self, x: Tensor) -> dict[str, Tensor]:
        """Frozen parameters and buffers in the dtype and on the device of x."""
        return {name: follow(value, x) for name, value in self.constants.items()}

    def outputs(self, x: Tensor, constants: dict[str, Tensor] | None = None) -> Tensor:
        """Outputs of the module for weights x (D,): (N, ...).

        Args:
            x: Point (D,).
            constants: Frozen parameters and buffers in place of the network's own; where the module
                changes one of them, the dictionary holds the changed one afterwards.
        """
        with unchanged(self.module):
            return self.call(x, self.constants_for(x) if constants is None else constants)

    @torch.no_grad()
    def outputs_at(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """Outputs at points (..., D), on the network's data or on other inputs: (..., n, ...).

        Other inputs are one batch, where the network has statistics of batches.

        Raises:
            ArgumentError: If the module cannot be called with the inputs.
        """
        network = self
        if inputs:
            network = self.on(tuple(v.contiguous() for v in inputs), self.targets)
            network.apart = False
        x = check_point(x, self.weights.dim)
        try:
            return batched(ElementaryFunction(network.outputs), x)
        except RuntimeError as error:
            shapes = [tuple(value.shape) for value in network.inputs]
            raise ArgumentError(
                "the module cannot be called with these inputs",
                received=f"inputs of shapes {shapes}: {str(error).splitlines()[0]}",
                expected="what the module takes, (n, ...) each",
                remedy="problem.outputs(x) for the problem's own data",
            ) from error

    def call(self, x: Tensor, constants: dict[str, Tensor]) -> Tensor:
        """As :meth:`outputs`, with what the module keeps of a call left in it."""
        values = self.weights.unflatten(x) | constants
        values = {name: values[first] for name, first in self._names}
        size = self.per_pass and self.per_pass * self.block

        def of_some(which: slice) -> Tensor:
            inputs = tuple(follow(value[which], x) for value in self.inputs)
            if not self.apart:
                return of_inputs(*inputs)
            blocks = (value.reshape(-1, self.block, *value.shape[1:]) for value in inputs)
            return vmap(of_inputs)(*blocks).flatten(0, 1)

        def of_inputs(*inputs: Tensor) -> Tensor:
            outputs: Tensor = functional_call(self.module, values, inputs, tie_weights=False)
            return outputs

        outputs = joined(of_some, slices(len(self.inputs[0]), size))
        constants.update((name, values[name]) for name in constants)
        return outputs

    def losses(self, x: Tensor) -> Tensor:
        """The mean loss of each block (Xi,), or of all samples (): one vector (D,)."""
        return self.losses_of(self.outputs(x))

    def losses_of(self, outputs: Tensor) -> Tensor:
        """The same, from the outputs (N, ...) of the module."""
        losses = self.criterion.sample_losses(outputs, follow(self.targets, outputs))
        if not self.samples:
            return losses.mean()
        return losses if self.block == 1 else losses.reshape(-1, self.block).mean(1)

    def residuals(self, x: Tensor) -> Tensor:
        """The residuals of each block: (D,) -> (Xi, K)."""
        values = self.criterion.residuals(self.outputs(x), follow(self.targets, x))
        return values.reshape(self.n_blocks, -1) / self.block**0.5

    def __call__(self, x: Tensor) -> Tensor:
        """The residuals of least squares, the losses of other criteria."""
        return self.residuals(x) if self.criterion.is_least_squares else self.losses(x)

    def by_samples(self) -> PerSampleFunction:
        """The same function, of which each block of samples can be evaluated by itself."""
        blocks = (
            value.reshape(self.n_blocks, self.block, *value.shape[1:])
            for value in (self.targets, *self.inputs)
        )
        function = _OfBlocks(self.on((), self.targets[:0]))
        return PerSampleFunction(function, *blocks, per_pass=self.per_pass)


class _Rows:
    """Rows of a tensor in another order, of which those of a pass are copied when it comes."""

    def __init__(self, tensor: Tensor, index: Tensor) -> None:
        self.tensor, self.index = tensor, index.to(tensor.device)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, which: slice) -> Tensor:
        return self.tensor[self.index[which]]


class _OfBlocks:
    """A network as a function of x and of the data of any blocks, (n, block, ...) each."""

    def __init__(self, network: NetworkFunction) -> None:
        self.network = network
        self.__name__ = network.__name__

    def __call__(self, x: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
        """The residuals (n, K) of least squares, the losses (n,) of other criteria."""
        data = tuple(value.flatten(0, 1) for value in inputs)
        return self.network.on(data, targets.flatten(0, 1))(x)
