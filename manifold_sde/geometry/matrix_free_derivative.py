r"""The derivative of the flow of ONE point by products, as exact as its steps.

A step of collocation from x with stages :math:`U_i` takes a tangent t to the last of the W with

.. math:: W_i + h \sum_j a_{ij}\, \nabla^2 L(U_j)\, W_j = t,

which is the variational equation of gradient flow by the same method; its transpose takes
cotangents back. Both are solved by GMRES, preconditioned by the frame that the flow itself is
solved with: what the frame leaves out of the Hessian costs iterations and no accuracy.

Source: Saad and Schultz, "GMRES", SIAM J. Sci. Stat. Comput. 7, 1986.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from manifold_sde.errors import DifferentiationError
from manifold_sde.geometry.matrix_free import MatrixFreeSpace
from manifold_sde.geometry.matrix_free_flow import Linearisation, Step
from manifold_sde.geometry.radau import STAGES, tableau

#: Iterations of a solution, and those beyond which the next step has a frame of its own.
_MOST, _FEW = 40, 10
#: Residual at which a step's equation is solved: rounding, whatever the accuracy of the flow.
_SOLVED = {torch.float64: 1e-12, torch.float32: 1e-5}


def push_forward(space: MatrixFreeSpace, steps: Sequence[Step], rows: Tensor) -> Tensor:
    """Carry tangents along the steps of a flow: the derivative of its end by its start.

    Args:
        space: Makes frames, as for the flow.
        steps: The steps.
        rows: Tangents at the start, (k, D).

    Raises:
        DifferentiationError: If an equation of a step cannot be solved.
    """
    return _carry(space, steps, rows, back=False)


def pull_back(space: MatrixFreeSpace, steps: Sequence[Step], rows: Tensor) -> Tensor:
    """Carry cotangents at the end back along the steps: the transpose of :func:`push_forward`."""
    return _carry(space, steps[::-1], rows, back=True)


def _carry(space: MatrixFreeSpace, steps: Sequence[Step], rows: Tensor, *, back: bool) -> Tensor:
    together = max(1, space.block(rows) // (STAGES * _MOST))
    return torch.cat([_carry_few(space, steps, few, back) for few in rows.split(together)])


def _carry_few(space: MatrixFreeSpace, steps: Sequence[Step], rows: Tensor, back: bool) -> Tensor:
    """The same of as many rows as are solved for at once."""
    near, last, tolerance = None, None, _SOLVED.get(rows.dtype, 1e-5)
    for step in steps:
        for fresh in (False, True):
            if last is None or fresh:
                near = space.start_at(step.x) if near is None else near
                last = Linearisation(space, step.x, space.frame_at(step.x, near))
                near = space.reference_at(step.x, last.frame)
            found, left, rounds = _through(step, last, rows, tolerance, back)
            if bool((left <= tolerance).all()):
                break
            if last.base is step.x:
                raise DifferentiationError(
                    "the derivative of the limit map did not converge",
                    received=f"a residual of {float(left.max()):.2g} after {rounds} iterations",
                    expected=f"at most {tolerance:.2g}",
                    remedy="a start closer to Gamma",
                )
        rows = found
        if rounds > _FEW:
            last = None
    return rows


def _through(
    step: Step, frame: Linearisation, rows: Tensor, tolerance: float, back: bool
) -> tuple[Tensor, Tensor, int]:
    """Rows (k, D) through one step, the relative residuals (k,), and the number of iterations."""
    method = tableau(STAGES, rows.dtype, rows.device)
    matrix = step.h * (method.matrix.T if back else method.matrix)
    inverse = frame.inverse(method, step.h)
    inverse = inverse.mT if back else inverse

    def bent(w: Tensor) -> Tensor:
        """The Hessians at the stages times (k, s, D)."""
        both = zip(step.stages, w.unbind(1), strict=True)
        found = [frame.space.products(u, v.T).T for u, v in both]
        return torch.stack(found, 1)

    def system(w: Tensor) -> Tensor:
        return w + (bent(matrix @ w) if back else matrix @ bent(w))

    def precondition(w: Tensor) -> Tensor:
        return w + frame.change(w, inverse)

    right = rows[:, None].expand(-1, STAGES, -1)
    if back:
        right = torch.cat([torch.zeros_like(right[:, 1:]), rows[:, None]], 1)
    solved, left, rounds = gmres(lambda w: system(precondition(w)), right, tolerance, _MOST)
    solved = precondition(solved)
    return solved.sum(1) if back else solved[:, -1], left, rounds


def gmres(
    apply: Callable[[Tensor], Tensor], right: Tensor, tolerance: float, most: int
) -> tuple[Tensor, Tensor, int]:
    """Solve k linear systems, each by its own Krylov space, side by side.

    Args:
        apply: The linear map of (k, ...) that acts on each of k vectors by itself.
        right: Right-hand sides (k, ...).
        tolerance: Residual relative to the right-hand side at which a system is solved.
        most: Largest number of iterations.

    Returns:
        Solutions (k, ...), their relative residuals (k,), and the number of iterations.
    """
    k = len(right)
    flat = right.reshape(k, -1)
    size = flat.norm(dim=1)
    basis = flat.new_empty(k, most + 1, flat.shape[1])
    basis[:, 0] = flat / torch.where(size > 0.0, size, 1.0)[:, None]
    upper = flat.new_zeros(k, most + 1, most)
    unit = flat.new_zeros(k, most + 1, 1)
    unit[:, 0] = 1.0
    weights, left, rounds = flat.new_zeros(k, 0, 1), torch.ones_like(size), 0
    left = torch.where(size > 0.0, left, 0.0)
    while rounds < most and bool((left > tolerance).any()):
        moved = apply(basis[:, rounds].reshape(right.shape)).reshape(k, -1, 1)
        there = basis[:, : rounds + 1]
        for _ in range(2):  # the second pass keeps the basis orthogonal to rounding
            along = there @ moved
            upper[:, : rounds + 1, rounds] += along[..., 0]
            moved = moved - there.mT @ along
        length = moved.norm(dim=1)[:, 0]
        upper[:, rounds + 1, rounds] = length
        basis[:, rounds + 1] = moved[..., 0] / torch.where(length > 0.0, length, 1.0)[:, None]
        rounds += 1
        small, wanted = upper[:, : rounds + 1, :rounds], unit[:, : rounds + 1]
        weights = torch.linalg.pinv(small) @ wanted
        left = torch.where(size > 0.0, (small @ weights - wanted).norm(dim=(1, 2)), 0.0)
    solution = size[:, None] * (basis[:, :rounds].mT @ weights)[..., 0]
    return solution.reshape(right.shape), left, rounds
