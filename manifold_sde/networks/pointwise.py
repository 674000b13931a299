"""Losses of networks whose samples do not depend on each other, with all their gradients at once.

Where each sample is differentiated by itself, the gradients of all of them take Xi passes over one
sample; where their losses are differentiated one by one, Xi passes over all samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from manifold_sde.elementary import ElementaryFunction
from manifold_sde.networks.function import NetworkFunction
from manifold_sde.pointwise import LeastSquaresPointwise, Pointwise


class _Blocks:
    """A function of x and of one block of samples, and the data of all blocks."""

    def __init__(self, network: NetworkFunction, elementary: bool) -> None:
        self.network = network
        self.elementary = elementary

    def data(self) -> tuple[Tensor, ...]:
        """Targets and inputs, (Xi, block, ...) each."""
        network = self.network
        return tuple(
            value.reshape(network.n_blocks, network.block, *value.shape[1:])
            for value in (network.targets, *network.inputs)
        )

    def over(self, derivative: Callable[..., Tensor], x: Tensor) -> Tensor:
        """A derivative (function, x, block) -> Tensor at one x, for every block."""

        def of_block(targets: Tensor, *inputs: Tensor) -> Tensor:
            part = self.network.on(inputs, targets)
            return derivative(ElementaryFunction(part) if self.elementary else part, x)

        return vmap(of_block)(*self.data())

    def drawn_losses(self, drawn: Tensor) -> Callable[[Tensor], Tensor]:
        """The mean loss of the blocks of these numbers, (B,), as a function of x."""
        targets, *inputs = (value[drawn.to(value.device)].flatten(0, 1) for value in self.data())
        losses = self.network.on(tuple(inputs), targets).losses
        function = ElementaryFunction(losses) if self.elementary else losses
        return lambda z: function(z).mean()


class NetworkPointwise(Pointwise):
    """The sample losses of a network.

    Args:
        network: The network on its data.
        elementary: Whether it runs in elementary operations.
    """

    n_samples: int

    def __init__(self, network: NetworkFunction, elementary: bool) -> None:
        function = ElementaryFunction(network) if elementary else network
        super().__init__(function, network.weights.dim, network.n_blocks)
        self._blocks = _Blocks(network, elementary)

    def sample_gradients(self, x: Tensor) -> Tensor:
        """Gradients of all sample losses, each sample by itself: (D,) -> (Xi, D)."""
        return self._blocks.over(lambda f, z: grad(lambda v: f(v)[0])(z), x)

    def drawn_gradient(self, x: Tensor, drawn: Tensor) -> Tensor:
        """Mean gradient of the samples drawn, which alone are evaluated: (D,), (B,) -> (D,)."""
        if len(drawn) >= self.n_samples:
            return super().drawn_gradient(x, drawn)
        return grad(self._blocks.drawn_losses(drawn))(x)


class NetworkLeastSquaresPointwise(LeastSquaresPointwise):
    """The residuals of a network.

    Args:
        network: The network on its data.
        elementary: Whether it runs in elementary operations.
        n_outputs: Number K of residuals of a sample.
    """

    def __init__(self, network: NetworkFunction, elementary: bool, n_outputs: int) -> None:
        function = ElementaryFunction(network) if elementary else network
        super().__init__(function, network.weights.dim, network.n_blocks, n_outputs)
        self._blocks = _Blocks(network, elementary)

    def sample_gradients(self, x: Tensor) -> Tensor:
        """Gradients of all sample losses, each sample by itself: (D,) -> (Xi, D)."""
        return self._blocks.over(lambda f, z: grad(lambda v: 0.5 * f(v).square().sum())(z), x)

    def jacobian(self, x: Tensor) -> Tensor:
        """Jacobian of the residuals, K reverse modes on each sample: (D,) -> (Xi K, D)."""
        if self.n_outputs >= self.dim:
            return super().jacobian(x)
        identity = torch.eye(self.n_outputs, dtype=x.dtype, device=x.device)

        def of_block(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
            pull = vjp(lambda v: f(v)[0], z)[1]
            return vmap(lambda w: pull(w)[0])(identity)

        return self._blocks.over(of_block, x).flatten(0, 1)

    def drawn_gradient(self, x: Tensor, drawn: Tensor) -> Tensor:
        """Mean gradient of the samples drawn, which alone are evaluated: (D,), (B,) -> (D,)."""
        if len(drawn) >= self.n_samples:
            return super().drawn_gradient(x, drawn)
        return grad(self._blocks.drawn_losses(drawn))(x)
