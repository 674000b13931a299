"""What problems are made from besides a function: SymPy expressions and torch modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from manifold_sde.derivatives import batched, check_point
from manifold_sde.elementary import ElementaryFunction
from manifold_sde.errors import ArgumentError
from manifold_sde.noise.base import Noise

if TYPE_CHECKING:
    import sympy

    from manifold_sde.networks.function import NetworkFunction
    from manifold_sde.networks.weights import ParameterBlock
    from manifold_sde.problem import Problem


class Sources:
    """The part of a problem that knows where it comes from.

    Attributes:
        network: The network on its data, or ``None`` for a problem that was not made from a module.
    """

    network: NetworkFunction | None = None

    @classmethod
    def from_sympy(
        cls,
        losses: sympy.Expr | Sequence[sympy.Expr],
        symbols: Sequence[sympy.Symbol],
        noise: Noise,
        *,
        limit_map: Sequence[sympy.Expr] | None = None,
        rank: int | None = None,
        name: str | None = None,
    ) -> Problem:
        """Problem from SymPy expressions, with exact derivatives and a proof of scale invariance.

        Args:
            losses: One expression, or the Xi sample losses.
            symbols: The coordinates x_1, ..., x_D, in order.
            noise: The gradient noise.
            limit_map: Closed form of Phi, D expressions, where one is known.
            rank: Rank M of the Hessian on the manifold of minimisers, where it is known.
            name: Name used in messages and figures.

        Returns:
            A :class:`~manifold_sde.symbolic.SymbolicProblem`.

        Raises:
            SymbolicError: If the expressions are malformed.
            ScaleInvarianceError: If SymPy refutes that a loss is 0-homogeneous.
        """
        from manifold_sde.symbolic import SymbolicProblem

        return SymbolicProblem(losses, symbols, noise, limit_map=limit_map, rank=rank, name=name)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        criterion: nn.Module | Callable[[Tensor, Tensor], Tensor],
        inputs: Tensor | tuple[Tensor, ...],
        targets: Tensor,
        noise: Noise,
        *,
        rank: int | None = None,
        name: str | None = None,
        frozen: str | Iterable[str] = (),
        ghost_size: int | None = None,
        memory: int | str | None = None,
    ) -> Problem:
        """Problem from a module, a criterion and data: x is the vector of trained parameters.

        The module is copied, and never changed. Its buffers and frozen parameters are constants; a
        parameter that is used under several names appears once. Everything follows the dtype and
        device of x.

        Args:
            module: The network, in the mode (``train`` or ``eval``) in which it is meant.
            criterion: A criterion of ``torch.nn`` whose value is a mean over the samples of every
                batch, or a function of outputs and targets that returns (Xi,) or (Xi, K), whose
                mean over a sample's entries is its loss. L is the mean over the samples: the value
                of the criterion. ``nn.MSELoss`` makes a
                :class:`~manifold_sde.LeastSquaresProblem`.
            inputs: What the module is called with, (N, ...); a tuple for several arguments.
            targets: Targets (N, ...).
            noise: The gradient noise.
            rank: Rank M of the Hessian on the manifold of minimisers, where it is known.
            name: Name used in messages and figures; by default that of the module's class.
            frozen: Names of parameters or of submodules that are constants; those that do not
                require a gradient are constants anyway.
            ghost_size: Number of samples, one after the other, that form a ghost batch, for a
                module that couples them; :class:`~manifold_sde.networks.GhostBatchNorm` is found by
                itself. The mean loss of a ghost batch is then one sample loss, and Xi = N / B.
            memory: Bytes that one pass over samples may take, or a string such as ``"2 GiB"``;
                1 GiB by default. Where samples do not act on each other, the loss and its
                derivatives are sums over as many passes as are needed.

        Returns:
            A problem with ``vector``, ``load_into``, ``layers`` and ``part``. Where the outputs
            of a sample depend on the others without ghost batches, it has one loss and no sample
            losses.

        Raises:
            ArgumentError, ShapeError: If the module is random, changes its buffers or raises, if
                data and criterion do not fit it, or if a sample has no loss that is the same in
                every batch.
            DTypeError: If data have the wrong dtype, or a layer rounds to lower precision.
            NonFiniteError: If the loss of a sample or its derivatives are not finite.
            NoiseError: If the noise needs samples that the network couples.
            DifferentiationError: If torch cannot differentiate the network three times, or does so
                wrongly for any sample.
        """
        from manifold_sde.networks.module import problem_from_module

        return problem_from_module(
            module,
            criterion,
            inputs,
            targets,
            noise,
            rank=rank,
            name=name,
            frozen=frozen,
            ghost_size=ghost_size,
            memory=memory,
        )

    def require_network(self) -> NetworkFunction:
        """The network on its data.

        Raises:
            ArgumentError: If the problem was not made from a module.
        """
        if self.network is None:
            raise ArgumentError(
                "the problem has no module",
                received=repr(self),
                expected="a problem that was made from a module",
                remedy="Problem.from_module(module, criterion, inputs, targets, noise)",
            )
        return self.network

    @property
    def layers(self) -> Mapping[str, ParameterBlock]:
        """The trained parameters of the module, each with its shape and place in x, by name.

        Raises:
            ArgumentError: If the problem was not made from a module.
        """
        return self.require_network().weights.parameters

    def vector(self, module: nn.Module | None = None) -> Tensor:
        """The trained parameters of a module as x (D,), in the module's dtype.

        Args:
            module: A module like the one that the problem was made from; by default that one, with
                the weights that it had then.

        Raises:
            ArgumentError, ShapeError, DTypeError: If the module is another.
        """
        network = self.require_network()
        return network.start.clone() if module is None else network.weights.vector(module)

    def load_into(self, module: nn.Module, x: Tensor) -> None:
        """Write x (D,) into the trained parameters of a module, in place.

        Raises:
            ArgumentError, ShapeError, DTypeError: If the module is another, or has other values in
                its frozen parameters.
        """
        network = self.require_network()
        network.weights.load(module, x, network.constants)

    def part(self, x: Tensor, name: str) -> Tensor:
        """The coordinates of a parameter, or of all of a submodule: (..., D) -> (..., n).

        Args:
            x: Points (..., D).
            name: Name of a parameter or of a submodule, as in ``module.named_parameters()``.

        Raises:
            ArgumentError: If nothing trained has this name.
        """
        weights = self.require_network().weights
        return weights.part(check_point(x, weights.dim, allow_zero=True, allow_nan=True), name)

    def breaking_parameters(self, x: Tensor) -> tuple[tuple[int, ...], str] | None:
        """Coordinates of the parameters that break scale invariance, and the layers at fault.

        Args:
            x: Point (D,).

        Returns:
            Both, or ``None`` where none are found near x.

        Raises:
            ArgumentError: If the problem was not made from a module.
        """
        from manifold_sde.networks.invariance_report import scale_invariance_report

        self.require_network()
        report = scale_invariance_report(cast("Problem", self), x)
        breaking = [self.layers[p.name] for p in report.parameters if p.breaks]
        if not breaking:
            return None
        coordinates = tuple(i for block in breaking for i in range(block.start, block.stop))
        layers = [f"{cause.name} ({cause.kind})" for cause in report.causes]
        shown = ", ".join(layers or [block.name for block in breaking])
        return coordinates, f"{shown}; scale_invariance_report(problem) says more"

    @torch.no_grad()
    def outputs(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """Outputs of the module, on its own data or on other inputs.

        Args:
            x: Points (..., D).
            *inputs: What the module is called with, (n, ...) each; by default the problem's data.

        Returns:
            Tensor (..., n, ...).

        Raises:
            ArgumentError: If the problem was not made from a module, or the module cannot be called
                with the inputs.
        """
        network = self.require_network()
        if inputs:
            network = network.on(tuple(v.contiguous() for v in inputs), network.targets)
        check_point(x, network.weights.dim)
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
