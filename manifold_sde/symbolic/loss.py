"""A loss given by SymPy expressions, its value in generated torch code."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import Tensor
from torch.func import vjp, vmap

from manifold_sde.loss import Loss
from manifold_sde.symbolic.generated import GeneratedFunction, pullback, pushforward, same_batch


class SymbolicLoss(Loss):
    """Loss of one vector from SymPy expressions.

    Every function takes any leading batch, the batches of several arguments being broadcast.

    Args:
        expressions: One expression, or the Xi sample losses.
        symbols: The coordinates x_1, ..., x_D, real.
        scalar: Whether the loss is one number; then there is one expression.

    Attributes:
        code: The generated function of the expressions.
        scale_invariance: :class:`Proof` that each loss is scale-invariant; undecided where SymPy
            does not find a proof and no point refutes it.
        analyticity: :class:`Proof` that each loss is analytic on R^D without the origin.
        closed_form: :class:`ClosedForm` of Phi, or ``None``.
    """

    batches = True

    def __init__(
        self, expressions: Sequence[sympy.Expr], symbols: Sequence[sympy.Symbol], scalar: bool
    ) -> None:
        self.code = GeneratedFunction(expressions, symbols)
        super().__init__(self._value, len(symbols), None if scalar else len(expressions))

    def _value(self, x: Tensor) -> Tensor:
        values = self.code(x)
        return values.squeeze(-1) if self.n_samples is None else values

    def source(self) -> str:
        """Torch code that was generated for the sample losses."""
        return self.code.source

    def loss(self, x: Tensor) -> Tensor:
        """L(x), the mean over the samples: (..., D) -> (...)."""
        value = self._value(x)
        return value if self.n_samples is None else value.mean(-1)

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient of L: (..., D) -> (..., D)."""
        return pullback(self.loss, x, torch.ones_like(x[..., 0]))

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """The Hessian of L times v: (..., D) each -> (..., D)."""
        return pullback(self.gradient, *same_batch(x, v))

    def hessian(self, x: Tensor) -> Tensor:
        """The Hessian of L, exactly symmetric: (..., D) -> (..., D, D)."""
        pull = vjp(self.gradient, x)[1]
        basis = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        columns = vmap(lambda e: pull(e.expand_as(x))[0])(basis).movedim(0, -1)
        return 0.5 * (columns + columns.mT)

    def third_derivative(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Second directional derivative of the gradient along a and b: (..., D) -> (..., D)."""
        x, a, b = same_batch(x, a, b)
        return pullback(lambda z: self.hessian_product(z, a), x, b)

    def weighted_gradient(self, x: Tensor, weights: Tensor) -> Tensor:
        """Sum of weights_xi times the gradient of L_xi: (..., D), (..., Xi) -> (..., D)."""
        return pullback(self.code, *same_batch(x, weights))

    def sample_derivatives(self, x: Tensor, v: Tensor) -> Tensor:
        """Directional derivatives <grad L_xi(x), v>: (..., D) each -> (..., Xi)."""
        return pushforward(self.code, *same_batch(x, v))

    def sample_gradients(self, x: Tensor) -> Tensor:
        """Gradients of all sample losses: (..., D) -> (..., Xi, D)."""
        identity = torch.eye(len(self.code.expressions), dtype=x.dtype, device=x.device)
        return vmap(lambda w: self.weighted_gradient(x, w))(identity).movedim(0, -2)
