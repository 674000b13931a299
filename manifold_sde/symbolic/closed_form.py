"""A closed form of the limit map Phi of gradient flow, checked before it is believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import mpmath
import sympy
import torch
from torch import Tensor
from torch.func import vjp, vmap

from manifold_sde.errors import SymbolicError
from manifold_sde.paper import implements
from manifold_sde.symbolic.expressions import (
    WORKING_DIGITS,
    Evaluator,
    Point,
    random_points,
)
from manifold_sde.symbolic.generated import GeneratedFunction, pullback, pushforward, same_batch
from manifold_sde.symbolic.loss import SymbolicLoss

#: Points that are tried, and points in the domain of the closed form that are asked for.
_TRIED, _NEEDED = 200, 6
#: Largest relative defect of a property that counts as rounding, of exact expressions and of
#: those with rounded numbers; and of what is computed in float64.
_EXACT, _ROUNDED, _FLOAT = 1e-25, 1e-9, 1e-6


@implements("Definition 2.6")
class ClosedForm:
    r"""Phi and its derivatives where SymPy knows Phi, exact and batched.

    The functions take any leading batch and check nothing, so that they can be traced. Where a
    point is outside the domain of the closed form, they give what the formula gives, often NaN.

    Args:
        expressions: The D coordinates of Phi(x), in real symbols.
        symbols: The coordinates.

    Attributes:
        defects: What :meth:`verify` measured: the largest relative defect of each property.
    """

    def __init__(self, expressions: Sequence[sympy.Expr], symbols: Sequence[sympy.Symbol]) -> None:
        self.code = GeneratedFunction(expressions, symbols)
        self.defects: Mapping[str, float] = MappingProxyType({})

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.code, dict(self.defects))

    @property
    def expressions(self) -> tuple[sympy.Expr, ...]:
        """The D coordinates of Phi(x)."""
        return self.code.expressions

    def source(self) -> str:
        """Torch code that was generated for Phi."""
        return self.code.source

    def limit_map(self, x: Tensor) -> Tensor:
        """Phi(x): (..., D) -> (..., D)."""
        return self.code(x)

    def tangent_projection(self, y: Tensor, v: Tensor) -> Tensor:
        """The Jacobian of Phi at y times v, on Gamma and off it: (..., D) each -> (..., D)."""
        return pushforward(self.code, *same_batch(y, v))

    def second_derivative(self, y: Tensor, covariance: Tensor) -> Tensor:
        """Sum over i, j of covariance_ij d_i d_j Phi(y): (..., D), (..., D, D) -> (..., D)."""
        batch = torch.broadcast_shapes(y.shape[:-1], covariance.shape[:-2])
        y = y.expand(*batch, y.shape[-1])
        basis = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)

        def contracted(weights: Tensor) -> Tensor:
            pull = vjp(lambda z: pullback(self.code, z, weights), y)[1]
            hessian = vmap(lambda e: pull(e.expand_as(y))[0])(basis).movedim(0, -1)
            return (hessian * covariance).sum((-2, -1))

        return pullback(contracted, torch.zeros_like(y), torch.ones_like(y[..., 0]))

    def verify(self, loss: SymbolicLoss, *, rounded: bool = False) -> None:
        """Check that the map is the limit map of the loss's gradient flow.

        At random points in its domain, to 60 digits: the gradient vanishes at Phi(x); the loss
        does not grow; Phi is 1-homogeneous and preserves the norm; Phi(Phi(x)) = Phi(x); and Phi is
        constant along gradient flow, dPhi(x) grad L(x) = 0, which the nearest-point map is not.
        In float64: dPhi(y) is the orthogonal projection onto the kernel of the Hessian at
        y = Phi(x), as it is where Phi fixes the whole manifold.

        Args:
            loss: The loss.
            rounded: Whether the expressions hold rounded numbers.

        Raises:
            SymbolicError: With the property that fails and its value.
        """
        symbols = self.code.symbols
        phi, value = Evaluator(self.expressions, symbols), Evaluator(loss.code.expressions, symbols)
        worst: dict[str, float] = {}
        used: list[Point] = []
        for point in random_points(len(symbols), _TRIED):
            measured = _defects(phi, value, point)
            if measured is None:
                continue
            for name, defect in measured.items():
                worst[name] = max(worst.get(name, 0.0), defect)
            used.append(point)
            if len(used) == _NEEDED:
                break
        if not used:
            raise _refused(
                "map and loss are real and finite, at x and at Phi(x)",
                f"none of {_TRIED} random points where they are",
            )
        for name, defect in worst.items():
            if not defect <= (_ROUNDED if rounded else _EXACT):
                raise _refused(name, f"a relative defect of {defect:.2g}")
        points = torch.tensor([[float(c) for c in p] for p in used], dtype=torch.float64)
        name = "dPhi(y) is the projection onto the kernel of the Hessian at y = Phi(x)"
        worst[name] = self._projection_defect(loss, points)
        if not worst[name] <= _FLOAT:
            raise _refused(name, f"a difference of {worst[name]:.2g}")
        self.defects = MappingProxyType(worst)

    def _projection_defect(self, loss: SymbolicLoss, points: Tensor) -> float:
        y = self.limit_map(points)
        identity = torch.eye(y.shape[-1], dtype=y.dtype)
        jacobian = self.tangent_projection(y.unsqueeze(-2), identity)
        values, vectors = torch.linalg.eigh(loss.hessian(y))
        kernel = values.abs() <= 1e-8 * values.abs().amax(-1, keepdim=True)
        projection = (vectors * kernel.unsqueeze(-2)) @ vectors.mT
        difference = (jacobian - projection).abs().amax((-1, -2))
        return float(difference.max())


def _restore(code: GeneratedFunction, defects: dict[str, float]) -> ClosedForm:
    form = ClosedForm.__new__(ClosedForm)
    form.code = code
    form.defects = MappingProxyType(defects)
    return form


def _defects(phi: Evaluator, loss: Evaluator, x: Point) -> dict[str, float] | None:
    """Relative defect of each property at a point; ``None`` outside the domain."""
    gradient, y, start = loss.gradient(x), phi(x), loss(x)
    if gradient is None or y is None or start is None:
        return None
    end, at_limit = loss(y), loss.gradient(y)
    again, along = phi(y), phi.along(x, gradient)
    with mpmath.workdps(WORKING_DIGITS):
        scaled = phi([2 * c for c in x])
        if end is None or at_limit is None or again is None or along is None or scaled is None:
            return None
        norm, slope = mpmath.norm(x), mpmath.norm(gradient)
        slope = slope if slope else mpmath.mpf(1)

        def distance(a: Point, b: Point) -> mpmath.mpf:
            return mpmath.norm([p - q for p, q in zip(a, b, strict=True)])

        rise = max(0, mpmath.fsum(end) - mpmath.fsum(start)) / len(start)
        measured = {
            "the gradient of L vanishes at Phi(x)": mpmath.norm(at_limit) / slope,
            "L(Phi(x)) is at most L(x)": rise / (slope * norm),
            "Phi(Phi(x)) = Phi(x)": distance(again, y) / norm,
            "Phi(2 x) = 2 Phi(x)": distance(scaled, [2 * c for c in y]) / norm,
            "|Phi(x)| = |x|": abs(mpmath.norm(y) - norm) / norm,
            "dPhi(x) grad L(x) = 0": mpmath.norm(along) / slope,
        }
        return {name: float(defect) for name, defect in measured.items()}


def _refused(name: str, received: str) -> SymbolicError:
    nearest = "dPhi(x)" in name or "|" in name
    return SymbolicError(
        f"limit_map is not the limit map of gradient flow, for which {name}",
        received=received,
        expected="a closed form of Phi(x) = lim of gradient flow from x (Definition 2.6)",
        remedy="the nearest minimiser is not Phi: follow gradient flow, which keeps |x|, to its end"
        if nearest
        else "check it against Geometry(problem).limit_map, or leave limit_map out",
    )
