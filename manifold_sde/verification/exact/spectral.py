"""Fourier and Chebyshev collocation: functions by their values at nodes."""

from __future__ import annotations

import math

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

#: Size up to which the exponential of a matrix is computed as a whole.
_SMALL = 200
#: The pole of the rational Krylov space is at this number over the length.
_POLE = 20.0
#: Its most vectors, how often it is compared with itself, and to what it has to agree.
_MOST_VECTORS, _COMPARED, _AGREED = 100, 5, 1e-12


def fourier_nodes(n: int) -> Array:
    """Return the n equally spaced angles 2 pi j / n."""
    return 2.0 * math.pi * np.arange(n) / n


def fourier_derivative(n: int) -> Array:
    """Return the matrix (n, n) that differentiates values at an odd number n of nodes.

    It is exact for trigonometric polynomials of degree (n - 1) / 2, and antisymmetric.
    """
    index = np.arange(n)
    apart = index[:, None] - index
    half = np.pi * apart / n
    np.fill_diagonal(half, 1.0)
    matrix = np.where(apart % 2 == 0, 0.5, -0.5) / np.sin(half)
    np.fill_diagonal(matrix, 0.0)
    return matrix


def fourier_cardinals(n: int, angle: ArrayLike) -> Array:
    """Return the weights of n values in their trigonometric interpolant at angles: (..., n)."""
    away = np.asarray(angle, dtype=np.float64)[..., None] - fourier_nodes(n)
    modes = np.arange(1, (n + 1) // 2)
    return (1.0 + 2.0 * np.cos(away[..., None] * modes).sum(-1)) / n


def fourier_tail(values: Array) -> float:
    """Return the largest of the last Fourier coefficients, relative to the largest value.

    The last eighth is looked at: it is at rounding level where the values resolve their function.
    """
    size = float(np.abs(values).max())
    if size == 0.0:
        return 0.0
    modes = np.abs(np.fft.rfft(values, axis=0)) / len(values)
    last = max(2, len(modes) // 8)
    return float(modes[-last:].max()) / size


def chebyshev(n: int) -> tuple[Array, Array]:
    """Return n Chebyshev-Lobatto nodes from -1 to 1 and their differentiation matrix (n, n).

    One node is at 0, and has no derivative; an odd n always has a node at 0.
    """
    if n == 1:
        return np.zeros(1), np.zeros((1, 1))
    index = np.arange(n)
    nodes = np.sin(np.pi * (2 * index - (n - 1)) / (2 * (n - 1)))
    weights = np.where(index % 2 == 0, 1.0, -1.0)
    weights[[0, -1]] *= 2.0
    apart = nodes[:, None] - nodes
    np.fill_diagonal(apart, 1.0)
    matrix = np.outer(weights, 1.0 / weights) / apart
    np.fill_diagonal(matrix, 0.0)
    np.fill_diagonal(matrix, -matrix.sum(1))
    return nodes, matrix


def chebyshev_size(half: float) -> int:
    """Return an odd number of nodes for functions on [1 - half, 1 + half] singular at 0."""
    decay = math.log((1.0 + math.sqrt(1.0 - half**2)) / half)
    return 2 * math.ceil((math.log(1e9) / decay + 4.0) / 2.0) + 1


def propagate(row: Array, matrix: scipy.sparse.csr_array, length: float) -> Array:
    """Multiply a row of sum 1 by exp(length * matrix), of a generator: the sum stays 1.

    A large matrix is factored once, and the exponential taken on a rational Krylov space, whose
    size hardly depends on the length. Where that does not converge, as for a drift that turns many
    times before the noise has spread, the exponential is taken as a whole.

    Source: J. van den Eshof, M. Hochbruck, SIAM J. Sci. Comput. 27 (2006).
    """
    size = float(abs(matrix).sum(1).max())
    # Beyond, the least rate of the matrix is its rounding error.
    length = min(length, float(1.0 / (np.finfo(np.float64).eps * size)))
    moved = None if len(row) <= _SMALL else _by_shifted_inverse(row, matrix, length)
    if moved is None:
        moved = row @ scipy.linalg.expm(length * matrix.toarray())
    # The sum is lost by rounding where the length is large.
    return np.asarray(moved / moved.sum(), dtype=np.float64)


def _by_shifted_inverse(row: Array, matrix: scipy.sparse.csr_array, length: float) -> Array | None:
    """Multiply a row by exp(length * matrix) on the Krylov space of (1 - g * matrix)^-1.

    Returns:
        The row, up to its sum, or None where the space has not converged.
    """
    g = length / _POLE
    factors = scipy.linalg.lu_factor(np.eye(len(row)) - g * matrix.T.toarray())
    basis = np.empty((_MOST_VECTORS + 1, len(row)))
    reduced = np.zeros((_MOST_VECTORS + 1, _MOST_VECTORS))
    basis[0] = row / np.linalg.norm(row)
    last = None
    for k in range(1, _MOST_VECTORS + 1):
        new = scipy.linalg.lu_solve(factors, basis[k - 1])
        for _ in range(2):  # once more, against rounding
            shares = basis[:k] @ new
            reduced[:k, k - 1] += shares
            new -= shares @ basis[:k]
        reduced[k, k - 1] = np.linalg.norm(new)
        whole = not reduced[k, k - 1] > 1e-14
        if whole or k % _COMPARED == 0:
            inverse = np.linalg.inv(reduced[:k, :k])
            found = scipy.linalg.expm(_POLE * (np.eye(k) - inverse))[:, 0] @ basis[:k]
            found /= found.sum()
            if whole or (
                last is not None and np.abs(found - last).max() <= _AGREED * np.abs(found).max()
            ):
                return np.asarray(found, dtype=np.float64)
            last = found
        basis[k] = new / reduced[k, k - 1]
    return None


def invariant_row(matrix: Array) -> Array:
    """Find the row of sum 1 that the matrix takes to 0."""
    n = len(matrix)
    bordered = np.ones((n + 1, n + 1))
    bordered[:n, :n] = matrix.T
    bordered[n, n] = 0.0
    # The scale of the border is that of the matrix, for a well-conditioned system.
    size = np.abs(matrix).max()
    bordered[:n, n] = bordered[n, :n] = size
    right = np.zeros(n + 1)
    right[n] = size
    return np.asarray(np.linalg.solve(bordered, right)[:n], dtype=np.float64)


def slowest_eigenvalues(matrix: scipy.sparse.csr_array, count: int = 6) -> NDArray[np.complex128]:
    """Find the eigenvalues of a generator nearest to 0, with 0 itself."""
    size = float(abs(matrix).sum(1).max())
    start = np.ones(matrix.shape[0])
    start[::2] = 0.5
    # Shifted to the right of the spectrum, where the matrix is not singular.
    values = scipy.sparse.linalg.eigs(
        matrix.tocsc(), count, sigma=1e-6 * size, v0=start, return_eigenvectors=False
    )
    return np.asarray(values, dtype=np.complex128)
