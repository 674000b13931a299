r"""Radau IIA collocation: the tableau, one implicit step for a batch, and its exact derivative.

The step of s stages from x is the polynomial u of degree s with u(0) = x whose derivative is the
force -grad L(u) at the s Radau nodes; its end is u(h). The method has order 2s - 1, is stiffly
accurate and L-stable, so that directions whose curvature is far above 1/h are brought to rest,
and its solution is defined by the loss alone: the Hessian enters only how the stages are found.
That is why its derivative needs no third derivatives of the loss, and inherits its accuracy.

Source: Hairer and Wanner, "Solving Ordinary Differential Equations II", 2nd ed. (1996), sections
IV.5 (the methods) and IV.8 (simplified Newton, its stopping and the estimate of the error).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Number s of stages: order 9. More make fewer, dearer steps; 3, 4 and 7 were slower.
STAGES = 5
#: Newton iterations of one step, and the ratio of two corrections at which it is given up.
MAX_ITERATIONS = 15
_MAX_CONTRACTION = 0.95

BatchFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tableau:
    """Coefficients of a Radau IIA method, as tensors of one dtype and device.

    Attributes:
        nodes: The nodes c_1 < ... < c_s = 1, (s,).
        matrix: The coefficients a_ij, (s, s).
        gamma: The real eigenvalue of the matrix, which scales the estimate of the error.
        slope_at_start: Weights w with u'(0) = sum_i w_i (U_i - x) / h, (s,).
        eigenvalues, right, left: The matrix is right diag(eigenvalues) left; complex.
        monomials: Takes the values at 0 and at the nodes to monomial coefficients, (s+1, s+1).
    """

    nodes: Tensor
    matrix: Tensor
    gamma: float
    slope_at_start: Tensor
    eigenvalues: Tensor
    right: Tensor
    left: Tensor
    monomials: Tensor


@functools.cache
def tableau(stages: int, dtype: torch.dtype, device: torch.device) -> Tableau:
    """The Radau IIA method with an odd number of stages, so that its matrix has a real eigenvalue.

    Args:
        stages: Number s of stages, odd.
        dtype: Real dtype of the tensors.
        device: Their device.
    """
    from scipy.special import roots_jacobi  # half a second that most processes do not need

    nodes = np.append((roots_jacobi(stages - 1, 1, 0)[0] + 1) / 2, 1.0)
    powers = np.vander(nodes, stages, increasing=True)
    integrals = nodes[:, None] ** np.arange(1, stages + 1) / np.arange(1, stages + 1)
    matrix = integrals @ np.linalg.inv(powers)
    eigenvalues, right = np.linalg.eig(matrix)
    real = int(np.abs(eigenvalues.imag).argmin())
    start = np.linalg.inv(powers)[0] @ np.linalg.inv(matrix)
    monomials = np.linalg.inv(np.vander(np.append(0.0, nodes), stages + 1, increasing=True))
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64

    def make(array: np.ndarray) -> Tensor:
        wanted = complex_dtype if np.iscomplexobj(array) else dtype
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, wanted)

    return Tableau(
        make(nodes),
        make(matrix),
        float(eigenvalues[real].real),
        make(start),
        make(eigenvalues),
        make(right),
        make(np.linalg.inv(right)),
        make(monomials),
    )


@dataclass(frozen=True)
class Linearisation:
    """The flow at the beginning of a step, in the eigenbasis of the Hessian there.

    Attributes:
        x: Points (n, D).
        force: Minus the gradient, in the eigenbasis, (n, D).
        values: Eigenvalues of the Hessian, ascending, (n, D).
        basis: Eigenvectors as columns, (n, D, D).
    """

    x: Tensor
    force: Tensor
    values: Tensor
    basis: Tensor

    def __getitem__(self, rows: Tensor) -> Linearisation:
        return Linearisation(self.x[rows], self.force[rows], self.values[rows], self.basis[rows])


def extrapolate(method: Tableau, stages: Tensor, ratio: Tensor) -> Tensor:
    """Stages of the next step by the polynomial of the last one.

    Args:
        method: The tableau.
        stages: U_i - x of the last step, (n, s, D).
        ratio: Size of the next step over that of the last one, (n,).

    Returns:
        Tensor (n, s, D): displacements from the end of the last step.
    """
    times = 1.0 + method.nodes * ratio[:, None]
    powers = times[..., None] ** torch.arange(
        len(method.nodes) + 1, device=times.device, dtype=times.dtype
    )
    weights = (powers @ method.monomials)[..., 1:]
    return weights @ stages - stages[:, -1:]


def solve_stages(
    gradient: BatchFunction,
    start: Linearisation,
    h: Tensor,
    guess: Tensor,
    tolerance: Tensor,
) -> tuple[Tensor, Tensor, int]:
    """The stages of one step, by Newton's method with the Hessian of the beginning.

    Each point iterates until its own corrections have converged.

    Args:
        gradient: Batched gradient (n, D) -> (n, D).
        start: Where the step begins.
        h: Step sizes (n,).
        guess: First displacements U_i - x, (n, s, D).
        tolerance: Size of the error at which a point is done, (n,).

    Returns:
        The displacements U_i - x in the eigenbasis, (n, s, D), whether each point converged, (n,),
        and the number of gradients evaluated.
    """
    method = tableau(guess.shape[1], guess.dtype, guess.device)
    n, stages, dim = guess.shape
    # (I + h lambda A)^{-1} for each eigenvalue, (n, D, s, s).
    damped = 1.0 / (1.0 + (h[:, None] * start.values)[..., None] * method.eigenvalues)
    inverse = ((method.right * damped[..., None, :]) @ method.left).real
    inside = guess @ start.basis
    converged = torch.zeros(n, dtype=torch.bool, device=h.device)
    last = torch.full_like(h, torch.inf)
    rows = torch.arange(n, device=h.device)
    evaluations = 0
    for iteration in range(MAX_ITERATIONS):
        here = inside[rows]
        points = start.x[rows, None] + here @ start.basis[rows].mT
        force = -gradient(points.reshape(-1, dim)).reshape(points.shape) @ start.basis[rows]
        evaluations += len(rows) * stages
        residual = here - h[rows, None, None] * (method.matrix @ force)
        change = (inverse[rows] @ residual.mT[..., None])[..., 0].mT
        inside[rows] = here - change
        size = change.flatten(1).norm(dim=1)
        done, keep = size <= tolerance[rows], torch.isfinite(size)
        if iteration:
            contraction = size / last[rows]
            ahead = contraction / (1.0 - contraction)
            done |= (contraction < 1.0) & (size * ahead <= tolerance[rows])
            remaining = MAX_ITERATIONS - 1 - iteration
            keep &= contraction <= _MAX_CONTRACTION
            keep &= size * contraction**remaining * ahead <= tolerance[rows]
        converged[rows[done]] = True
        keep &= ~done
        last[rows] = size
        rows = rows[keep]
        if len(rows) == 0:
            break
    return inside, converged, evaluations


def error_estimate(start: Linearisation, inside: Tensor, h: Tensor, fast: Tensor) -> Tensor:
    """How badly the polynomial's slope at the beginning misses the force there.

    It is of order s + 1 in h, where the method itself errs by order 2s. Stiff directions are
    damped as the method damps them.

    Args:
        start: Where the step begins.
        inside: Displacements in the eigenbasis, (n, s, D).
        h: Step sizes (n,).
        fast: Whether a direction is stiff, (n, D).

    Returns:
        Tensor (n, D), in the eigenbasis.
    """
    method = tableau(inside.shape[1], inside.dtype, inside.device)
    slope = (inside.mT @ method.slope_at_start) - h[:, None] * start.force
    damping = torch.where(fast, method.gamma * h[:, None] * start.values, 0.0).clamp(min=0.0)
    return method.gamma * slope / (1.0 + damping)


def step_matrix(hessians: Tensor, h: Tensor) -> Tensor:
    """The Jacobian I + h (A x I) diag(H_i) of the stage equations.

    Args:
        hessians: Hessians at the stages, (n, s, D, D).
        h: Step sizes (n,).

    Returns:
        Tensor (n, s D, s D).
    """
    n, stages, dim, _ = hessians.shape
    method = tableau(stages, hessians.dtype, hessians.device)
    scaled = h[:, None, None] * method.matrix
    blocks = scaled[:, :, None, :, None] * hessians.permute(0, 2, 1, 3)[:, None]
    matrix = blocks.reshape(n, stages * dim, stages * dim)
    matrix.diagonal(dim1=1, dim2=2).add_(1.0)
    return matrix


def push_step(hessians: Tensor, h: Tensor, tangents: Tensor) -> Tensor:
    """Derivative of the end of a step by its beginning, times tangents.

    Args:
        hessians: Hessians at the stages, (n, s, D, D).
        h: Step sizes (n,).
        tangents: (n, D, k).

    Returns:
        Tensor (n, D, k).
    """
    stages, dim = hessians.shape[1:3]
    right = tangents.repeat(1, stages, 1)
    return torch.linalg.solve(step_matrix(hessians, h), right)[:, -dim:]


def pull_step(hessians: Tensor, h: Tensor, cotangents: Tensor) -> Tensor:
    """Transposed derivative of the end of a step by its beginning, times cotangents.

    Args:
        hessians: Hessians at the stages, (n, s, D, D).
        h: Step sizes (n,).
        cotangents: (n, D, k).

    Returns:
        Tensor (n, D, k).
    """
    n, stages, dim, _ = hessians.shape
    right = torch.cat(
        [cotangents.new_zeros(n, (stages - 1) * dim, cotangents.shape[2]), cotangents], 1
    )
    solved = torch.linalg.solve(step_matrix(hessians, h).mT, right)
    return solved.reshape(n, stages, dim, -1).sum(1)
