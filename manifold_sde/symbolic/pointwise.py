"""The loss of a symbolic problem, with derivatives in generated torch code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor

from manifold_sde.pointwise import Pointwise
from manifold_sde.symbolic.differentiation import forward, reverse
from manifold_sde.symbolic.graph import Graph, Node
from manifold_sde.symbolic.jacobian import half_hessian, jacobian
from manifold_sde.symbolic.packing import Packer
from manifold_sde.symbolic.printing import generate

#: Largest dimension in which a Hessian is computed entry by entry: passes over many tiny matrices
#: are slower than over a few long vectors.
_ENTRYWISE = 4

#: What a function computes: node, inputs beside x, shape of the result without the batch, and
#: what symmetry it has, as in :func:`generate`.
Recipe = tuple[Node, list[str], tuple[int, ...], str | None]


class GeneratedCode:
    """Torch functions generated from SymPy expressions, each when it is first needed.

    Args:
        expressions: SymPy expressions in the symbols alone.
        symbols: The coordinates x_1, ..., x_D, real.

    Raises:
        SymbolicError: If an expression holds a function that torch does not have.
    """

    def __init__(self, expressions: Sequence[sympy.Expr], symbols: Sequence[sympy.Symbol]) -> None:
        self.expressions = tuple(sympy.sympify(e) for e in expressions)
        self.symbols = tuple(symbols)
        self._graph = Graph()
        self._x = self._graph.input("x", len(symbols))
        self._values = Packer(self._graph, symbols, self._x).pack(self.expressions)
        self._functions: dict[str, Callable[..., Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # Generated functions do not pickle: the code is generated again from the expressions.
        return type(self), (self.expressions, self.symbols)

    def __getitem__(self, name: str) -> Callable[..., Tensor]:
        """The function of a name; see the methods ``_node_...`` of the subclasses."""
        function = self._functions.get(name)
        return self._generate(name) if function is None else function

    @torch.compiler.disable  # it computes no tensors; called once, it is not in the way
    def _generate(self, name: str) -> Callable[..., Tensor]:
        node, inputs, event, symmetry = getattr(self, f"_node_{name}")()
        function = generate(name, self._graph, node, ["x", *inputs], event, symmetry=symmetry)
        self._functions[name] = function
        return function

    def source(self, name: str) -> str:
        """Torch code of a generated function."""
        return self[name].source  # type: ignore[attr-defined]


class LossCode(GeneratedCode):
    """Generated functions of a loss, the mean of one or more expressions."""

    def _dim(self) -> int:
        return len(self.symbols)

    def _loss(self) -> Node:
        count = len(self.expressions)
        return self._graph.linear(np.full((1, count), 1.0 / count), self._values)

    def _gradient(self) -> Node:
        return reverse(self._graph, self._loss(), self._graph.one, self._x)

    def _weighted(self) -> tuple[Node, Node]:
        weights = self._graph.input("weights", len(self.expressions))
        seed = weights
        if self._values.size == 1:
            seed = self._graph.reduce(weights, len(self.expressions))
        return reverse(self._graph, self._values, seed, self._x), weights

    def _node_loss(self) -> Recipe:
        return self._loss(), [], (), None

    def _node_sample_losses(self) -> Recipe:
        return self._values, [], (len(self.expressions),), None

    def _node_gradient(self) -> Recipe:
        return self._gradient(), [], (self._dim(),), None

    def _node_hessian(self) -> Recipe:
        dim = self._dim()
        if dim <= _ENTRYWISE:
            whole = jacobian(self._graph, self._gradient(), dim, self._x)
            return whole, [], (dim, dim), "upper"
        half = half_hessian(self._graph, self._gradient(), self._x)
        return half, [], (dim, dim), "half"

    def _node_hessian_product(self) -> Recipe:
        v = self._graph.input("v", self._dim())
        return forward(self._graph, self._gradient(), {self._x: v}), ["v"], (self._dim(),), None

    def _node_third_derivative(self) -> Recipe:
        a, b = (self._graph.input(name, self._dim()) for name in "ab")
        first = forward(self._graph, self._gradient(), {self._x: a})
        second = forward(self._graph, first, {self._x: b})
        return second, ["a", "b"], (self._dim(),), None

    def _node_weighted_gradient(self) -> Recipe:
        return self._weighted()[0], ["weights"], (self._dim(),), None

    def _node_sample_derivatives(self) -> Recipe:
        v = self._graph.input("v", self._dim())
        along = forward(self._graph, self._values, {self._x: v})
        return along, ["v"], (len(self.expressions),), None

    def _node_sample_jacobian(self) -> Recipe:
        """The transposed Jacobian of the sample losses, (D, Xi)."""
        count = len(self.expressions)
        return jacobian(self._graph, self._values, count, self._x), [], (self._dim(), count), None


class SymbolicPointwise(Pointwise):
    """Loss of one vector from SymPy expressions, with exact derivatives in torch code.

    Every function takes any leading batch, the batches of several arguments being broadcast.

    Args:
        expressions: One expression, or the Xi sample losses.
        symbols: The coordinates x_1, ..., x_D, real.
        scalar: Whether the loss is one number; then there is one expression.
    """

    batches = True

    def __init__(
        self, expressions: Sequence[sympy.Expr], symbols: Sequence[sympy.Symbol], scalar: bool
    ) -> None:
        self.code = LossCode(expressions, symbols)
        super().__init__(self._value, len(symbols), None if scalar else len(expressions))

    def __reduce__(self) -> tuple[Any, ...]:
        scalar = self.n_samples is None
        return type(self), (self.code.expressions, self.code.symbols, scalar)

    def _value(self, x: Tensor) -> Tensor:
        return self.code["loss" if self.n_samples is None else "sample_losses"](x)

    def source(self, name: str) -> str:
        """Torch code that was generated for one of the functions, such as ``"gradient"``."""
        return self.code.source(name)

    def loss(self, x: Tensor) -> Tensor:
        """L(x), the mean over the samples: (..., D) -> (...)."""
        return self.code["loss"](x)

    def sample_losses(self, x: Tensor) -> Tensor:
        """The sample losses L_xi(x): (..., D) -> (..., Xi)."""
        return self.code["sample_losses"](x)

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient of L: (..., D) -> (..., D)."""
        return self.code["gradient"](x)

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """The Hessian of L times v: (..., D) each -> (..., D)."""
        return self.code["hessian_product"](x, v)

    def hessian(self, x: Tensor) -> Tensor:
        """The Hessian of L, exactly symmetric: (..., D) -> (..., D, D)."""
        return self.code["hessian"](x)

    def third_derivative(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Second directional derivative of the gradient along a and b: (..., D) -> (..., D)."""
        return self.code["third_derivative"](x, a, b)

    def weighted_gradient(self, x: Tensor, weights: Tensor) -> Tensor:
        """Sum of weights_xi times the gradient of L_xi: (..., D), (..., Xi) -> (..., D)."""
        return self.code["weighted_gradient"](x, weights)

    def sample_derivatives(self, x: Tensor, v: Tensor) -> Tensor:
        """Directional derivatives <grad L_xi(x), v>: (..., D) each -> (..., Xi)."""
        return self.code["sample_derivatives"](x, v)

    def sample_gradients(self, x: Tensor) -> Tensor:
        """Gradients of all sample losses: (..., D) -> (..., Xi, D)."""
        return self.code["sample_jacobian"](x).mT


class MapCode(GeneratedCode):
    """Generated functions of a map from R^D to R^D."""

    def _node_value(self) -> Recipe:
        return self._values, [], (len(self.expressions),), None

    def _node_derivative(self) -> Recipe:
        v = self._graph.input("v", len(self.symbols))
        along = forward(self._graph, self._values, {self._x: v})
        return along, ["v"], (len(self.expressions),), None

    def _node_second(self) -> Recipe:
        """Second directional derivative along v and w."""
        v, w = (self._graph.input(name, len(self.symbols)) for name in "vw")
        first = forward(self._graph, self._values, {self._x: v})
        second = forward(self._graph, first, {self._x: w})
        return second, ["v", "w"], (len(self.expressions),), None

    def contracted_second(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Sum over i, j of matrix_ij times the second derivatives: (..., D), (..., D, D)."""
        basis = torch.eye(len(self.symbols), dtype=x.dtype, device=x.device)
        return self["second"](x.unsqueeze(-2), basis, matrix).sum(-2)
