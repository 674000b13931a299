"""Eigendecompositions of many small symmetric matrices at once, in C.

Jacobi's method in cycles, eight doubles or sixteen singles side by side: LAPACK takes the matrices
one by one, eleven times as long for D = 3 and three times for D = 10. A matrix that has converged
is left alone while its neighbours are not: what comes out for one does not depend on the others.

Source: Golub and Van Loan, Matrix Computations, 2013, section 8.5.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from manifold_sde.compile.c_library import CKernel, CompilerFailed, c_compiler, library
from manifold_sde.compile.c_source import VECTOR, header

#: Largest dimension: beyond, LAPACK is about as fast.
LARGEST = 16
#: Most cycles; six to eight are usual.
_CYCLES = 20
#: Units of rounding, of the largest entry, that a trial may be off.
_ROUNDING = 100.0

_CODE = """\
#define D {dim}
#define FAST __attribute__((optimize("O3")))
FAST static V root(V x) {{
  for (long l = 0; l < W; l++) ((S *)&x)[l] = {sqrt}(((S *)&x)[l]);
  return x;
}}
FAST static long any(B m) {{
  J found = 0;
  for (long l = 0; l < W; l++) found |= ((J *)&m)[l];
  return found;
}}
FAST static void turn(V *a, long j, long k, V c, V s) {{
  V x = a[j], y = a[k];
  a[j] = c * x - s * y;
  a[k] = s * x + c * y;
}}
FAST static long rotate(V *a, V *q, long j, long k, V least) {{
  V b = a[k * D + j], d = a[k * D + k] - a[j * D + j];
  B needed = ~(b * b <= least);
  if (!any(needed)) return 0;
  V size = root(d * d + C(4) * b * b) + sel(d < 0, -d, d);
  V t = sel(needed, C(2) * sel(d < 0, -b, b) / size, C(0));
  V c = C(1) / root(C(1) + t * t), s = t * c;
  a[j * D + j] -= t * b;
  a[k * D + k] += t * b;
  a[k * D + j] = sel(needed, C(0), b);
  for (long i = 0; i < j; i++) turn(a, j * D + i, k * D + i, c, s);
  for (long i = j + 1; i < k; i++) turn(a, i * D + j, k * D + i, c, s);
  for (long i = k + 1; i < D; i++) turn(a, i * D + j, i * D + k, c, s);
  for (long i = 0; i < D; i++) turn(q, j * D + i, k * D + i, c, s);
  return 1;
}}
static void sort(V *a, V *q) {{
  for (long last = D - 1; last > 0; last--)
    for (long j = 0; j < last; j++) {{
      V x = a[j * D + j], y = a[(j + 1) * D + j + 1];
      B swap = x > y;
      a[j * D + j] = sel(swap, y, x);
      a[(j + 1) * D + j + 1] = sel(swap, x, y);
      for (long i = 0; i < D; i++) {{
        V u = q[j * D + i], v = q[(j + 1) * D + i];
        q[j * D + i] = sel(swap, v, u);
        q[(j + 1) * D + i] = sel(swap, u, v);
      }}
    }}
}}
void kernel(long n, const S *const *in, S *const *out, const S *const *given, V *a) {{
  V *q = a + D * D;
  for (long first = 0; first < n; first += W) {{
    size_t bytes = (n - first < W ? n - first : W) * sizeof(S);
    for (long k = 0; k < D * D; k++) {{
      a[k] = C(0);
      memcpy(a + k, in[0] + k * n + first, bytes);
      q[k] = C(k % (D + 1) == 0);
    }}
    V whole = C(0);
    for (long k = 0; k < D * D; k++) whole += a[k] * a[k];
    for (long k = 0; k < D * D; k++) q[k] += whole - whole;
    for (long j = 0; j < D; j++) a[j * D + j] += whole - whole;
    for (long cycle = 0, left = 1; left && cycle < {cycles}; cycle++) {{
      left = 0;
      for (long j = 0; j < D - 1; j++)
        for (long k = j + 1; k < D; k++) left |= rotate(a, q, j, k, C({small}) * whole);
    }}
    sort(a, q);
    for (long j = 0; j < D; j++) memcpy(out[0] + j * n + first, a + j * (D + 1), bytes);
    for (long j = 0; j < D; j++)
      for (long k = 0; k < D; k++) memcpy(out[1] + (k * D + j) * n + first, q + j * D + k, bytes);
  }}
}}
"""


@functools.cache
def eigen_kernel(dim: int, dtype: torch.dtype) -> CKernel | None:
    """Eigenvalues, ascending, and eigenvectors: (D, D, n) -> (D, n), (D, D, n).

    NaN where a matrix, or the sum of its squares, is not finite.

    Args:
        dim: The dimension D.
        dtype: Of all numbers.

    Returns:
        The kernel, or ``None`` where it cannot be had: no C compiler, or a dimension too large.
    """
    if dtype not in (torch.float64, torch.float32) or dim > LARGEST or c_compiler() is None:
        return None
    double, unit = dtype == torch.float64, torch.finfo(dtype).eps
    code = header(dtype) + _CODE.format(
        dim=dim, sqrt="sqrt" if double else "sqrtf", cycles=_CYCLES, small=(unit / dim) ** 2
    )
    try:
        loaded, name = library(code)
    except CompilerFailed:
        return None
    shapes = [(dim,), (dim, dim)]
    kernel = CKernel(name, loaded, shapes, False, 2 * dim * dim, (), dtype)
    return kernel if _decomposes(kernel, dim, dtype) else None


def _decomposes(kernel: CKernel, dim: int, dtype: torch.dtype) -> bool:
    """Whether what comes out of a kernel are the decompositions of some matrices."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(dim, dim, 2 * VECTOR, dtype=dtype, generator=generator)
    matrices = torch.einsum("ikn,jkn->ijn", factors, factors).contiguous()
    found = kernel(matrices)
    assert isinstance(found, tuple)
    values, vectors = found
    back = torch.einsum("ikn,kn,jkn->ijn", vectors, values, vectors)
    whole = torch.einsum("kin,kjn->ijn", vectors, vectors)
    allowed = _ROUNDING * torch.finfo(dtype).eps
    close: Tensor = (back - matrices).abs().amax((0, 1)) <= allowed * matrices.abs().amax((0, 1))
    identity = torch.eye(dim, dtype=dtype)[..., None]
    return bool(close.all()) and bool(((whole - identity).abs() <= allowed).all())
