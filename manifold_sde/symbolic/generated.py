"""Functions of torch generated from SymPy expressions, and their derivatives.

The value alone is generated; ``torch.func`` differentiates it, by reverse mode in every order:
forward mode takes a slow way round where a tensor meets a number (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.func import vjp

from manifold_sde.symbolic.packing import Packer


class GeneratedFunction:
    """Values of SymPy expressions: (..., D) -> (..., n).

    Args:
        expressions: The n SymPy expressions, in the symbols alone.
        symbols: The coordinates x_1, ..., x_D, real.

    Attributes:
        source: Torch code that computes the values.

    Raises:
        SymbolicError: If an expression holds a function that torch does not have.
    """

    def __init__(self, expressions: Sequence[sympy.Expr], symbols: Sequence[sympy.Symbol]) -> None:
        self.expressions = tuple(sympy.sympify(e) for e in expressions)
        self.symbols = tuple(symbols)
        self._value = Packer(symbols).function(self.expressions)
        self.source: str = self._value.source  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        # Generated functions do not pickle: the code is generated again from the expressions.
        return type(self), (self.expressions, self.symbols)

    def __call__(self, x: Tensor) -> Tensor:
        """The values at x: (..., D) -> (..., n)."""
        return self._value(x)


Function = Callable[[Tensor], Tensor]


def pullback(function: Function, x: Tensor, weights: Tensor) -> Tensor:
    """Transposed Jacobian of a function times weights, a point at a time: (..., D)."""
    product: Tensor = vjp(function, x)[1](weights)[0]
    return product


def pushforward(function: Function, x: Tensor, v: Tensor) -> Tensor:
    """Jacobian of a function times v, from the transposed one, which is linear in its weights."""
    return pullback(lambda w: pullback(function, x, w), torch.zeros_like(function(x)), v)


def same_batch(*tensors: Tensor) -> list[Tensor]:
    """The tensors (..., n) with one batch shape."""
    batch = torch.broadcast_shapes(*(t.shape[:-1] for t in tensors))
    return [t.expand(*batch, t.shape[-1]) for t in tensors]
