"""Losses given by SymPy expressions."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from manifold_sde.errors import SymbolicError
from manifold_sde.paper import implements
from manifold_sde.symbolic.analyticity import prove_analyticity
from manifold_sde.symbolic.closed_form import ClosedForm
from manifold_sde.symbolic.expressions import (
    check_expressions,
    check_symbols,
    random_points,
    real_symbols,
    short,
)
from manifold_sde.symbolic.loss import SymbolicLoss
from manifold_sde.symbolic.proofs import all_of, prove_scale_invariance


@implements("Assumption 2.3")
def expressed_loss(
    losses: object, symbols: Sequence[sympy.Symbol], limit_map: object = None
) -> SymbolicLoss:
    r"""The loss that SymPy expressions give, with exact derivatives and proofs of its properties.

    Floating-point numbers in the expressions stand for the rational numbers that they are.

    Args:
        losses: One expression, or the Xi sample losses, whose mean is the loss L.
        symbols: The coordinates x_1, ..., x_D, in order.
        limit_map: Closed form of the limit map Phi of gradient flow, D expressions.

    Raises:
        SymbolicError: If the expressions are malformed, cannot be written in torch, or
            ``limit_map`` is not the limit map.
        ScaleInvarianceError: If a loss is not scale-invariant.

    Example:
        >>> import sympy, torch
        >>> from manifold_sde import Problem, SphericalNoise
        >>> x1, x2, x3 = x = sympy.symbols("x1:4")
        >>> norm = sympy.sqrt(x1**2 + x2**2 + x3**2)
        >>> r = sympy.sqrt(x1**2 + x2**2)
        >>> problem = Problem.from_sympy(
        ...     (x3 / norm) ** 2 / 2, x, SphericalNoise(0.3),
        ...     limit_map=[norm * x1 / r, norm * x2 / r, 0], rank=1,
        ... )
        >>> print(problem.scale_invariance)
        proved (degrees of homogeneity): every sub-expression is homogeneous, the whole of degree 0
        >>> problem.gradient(torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
        tensor([-0.2500,  0.0000,  0.2500], dtype=torch.float64)
        >>> problem.closed_form.limit_map(torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64))
        tensor([5., 0., 0.], dtype=torch.float64)
    """
    given = check_symbols(symbols)
    listed, scalar = _list_losses(losses)
    expressions = check_expressions(listed, given, "the loss" if scalar else "sample loss")
    images = None if limit_map is None else _list_images(limit_map, len(given))
    phi = None if images is None else check_expressions(images, given, "limit_map entry")
    real = real_symbols(given)
    loss = SymbolicLoss(expressions, real, scalar)
    _require_finite(loss, listed)
    rounded = [sympy.sympify(e).has(sympy.Float) for e in (*listed, *(images or []))]
    loss.scale_invariance = all_of(
        [
            prove_scale_invariance(
                expression,
                real,
                "the loss" if scalar else f"sample loss {i}",
                rounded=rounded[i],
                shown=sympy.sympify(listed[i]),
            )
            for i, expression in enumerate(expressions)
        ],
        "sample loss",
    )
    loss.analyticity = prove_analyticity(expressions, real)
    if phi is not None:
        loss.closed_form = ClosedForm(phi, real)
        loss.closed_form.verify(loss, rounded=any(rounded))
    return loss


def _require_finite(loss: SymbolicLoss, listed: Sequence[object]) -> None:
    """Refuse losses that are not real and finite almost everywhere."""
    points = [[float(c) for c in p] for p in random_points(loss.dim, 16, seed=1)]
    values = loss.code(torch.tensor(points, dtype=torch.float64))
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        index = int(bad.any(0).nonzero()[0])
        raise SymbolicError(
            "the loss is not real and finite away from the origin",
            received=f"not so at {int(bad[:, index].sum())} of 16 random points: "
            + short(sympy.sympify(listed[index])),
            expected="a finite value at every x other than 0",
            remedy="look for square roots and logarithms of negative numbers, and divisions by 0",
        )


def _list_losses(losses: object) -> tuple[list[object], bool]:
    """The sample losses, and whether there is one loss instead of samples."""
    if isinstance(losses, sympy.MatrixBase):
        return list(losses), False
    if isinstance(losses, Sequence) and not isinstance(losses, str):
        if not losses:
            raise SymbolicError(
                "there are no sample losses",
                received="an empty sequence",
                expected="one SymPy expression, or the Xi sample losses",
                remedy="pass the expressions before taking their mean",
            )
        return list(losses), False
    return [losses], True


def _list_images(limit_map: object, dim: int) -> list[object]:
    listed = isinstance(limit_map, (Sequence, sympy.MatrixBase)) and not isinstance(limit_map, str)
    images = list(limit_map) if listed else None  # type: ignore[call-overload]
    if images is None or len(images) != dim:
        received = type(limit_map).__name__ if images is None else f"{len(images)} entries"
        raise SymbolicError(
            "limit_map is not a map into R^D",
            received=received,
            expected=f"a sequence of D = {dim} expressions: the coordinates of Phi(x)",
            remedy="give one expression for each symbol, in their order",
        )
    return images
