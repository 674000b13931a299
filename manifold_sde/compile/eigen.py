"""Eigendecompositions of many small symmetric matrices at once, in C.

Householder's reduction to a tridiagonal matrix, and QL steps with implicit shifts, eight doubles or
sixteen singles side by side: LAPACK takes the matrices one by one, 14 times as long for D = 3,
5 times for D = 10 and twice for D = 32. A matrix that has converged is left alone while its
neighbours are not: what comes out for one does not depend on the others. As in LAPACK errors are a
few units of rounding of the largest eigenvalue: what is below counts as zero.

Source: Golub and Van Loan, Matrix Computations, 2013, section 8.3.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from manifold_sde.compile.c_library import CKernel, CompilerFailed, c_compiler, library
from manifold_sde.compile.c_source import VECTOR, header

#: Largest dimension: that up to which functions are compiled in seconds.
LARGEST = 32
#: Most steps for one eigenvalue; one to three are usual.
_STEPS = 30
#: Units of rounding, of the root mean square eigenvalue, that count as zero beside the diagonal.
_NEGLIGIBLE = 2.0
#: Units of rounding, of the largest entry, that a trial may be off.
_ROUNDING = 100.0

_CODE = """\
#define D {dim}
#define FAST __attribute__((optimize("O3")))
FAST static inline V root(V x) {{
  for (long l = 0; l < W; l++) ((S *)&x)[l] = {sqrt}(((S *)&x)[l]);
  return x;
}}
FAST static inline long any(B m) {{
  J found = 0;
  for (long l = 0; l < W; l++) found |= ((J *)&m)[l];
  return found;
}}
FAST static void reduce(V *a, V *q, V *d, V *e, V least) {{
  V v[D > 2 ? D - 2 : 1][D], scale[D];
  for (long k = 0; k < D - 2; k++) {{
    V *u = v[k], w[D], square = C(0), along = C(0);
    for (long i = k + 1; i < D; i++) square += a[i * D + k] * a[i * D + k];
    V size = root(square), first = a[(k + 1) * D + k];
    B kept = square > least;
    e[k] = sel(kept, sel(first < 0, size, -size), C(0));
    for (long i = k + 1; i < D; i++) u[i] = sel(kept, a[i * D + k], C(0));
    u[k + 1] -= e[k];
    scale[k] = sel(kept, C(1) / (square - e[k] * first), C(0));
    for (long i = k + 1; i < D; i++) {{
      w[i] = C(0);
      for (long j = k + 1; j < D; j++) w[i] += a[(i > j ? i * D + j : j * D + i)] * u[j];
      w[i] *= scale[k];
      along += w[i] * u[i];
    }}
    along *= C(0.5) * scale[k];
    for (long i = k + 1; i < D; i++) w[i] -= along * u[i];
    for (long i = k + 1; i < D; i++)
      for (long j = k + 1; j <= i; j++) a[i * D + j] -= u[i] * w[j] + w[i] * u[j];
  }}
  if (D > 1) e[D > 1 ? D - 2 : 0] = a[(D - 1) * D + (D > 1 ? D - 2 : 0)];
  e[D - 1] = C(0);
  for (long k = 0; k < D; k++) d[k] = a[k * D + k];
  for (long k = 0; k < D * D; k++) q[k] = C(k % (D + 1) == 0);
  for (long k = D - 3; k >= 0; k--)
    for (long j = k + 1; j < D; j++) {{
      V along = C(0);
      for (long i = k + 1; i < D; i++) along += v[k][i] * q[j * D + i];
      along *= scale[k];
      for (long i = k + 1; i < D; i++) q[j * D + i] -= along * v[k][i];
    }}
}}
FAST static B diagonalise(V *q, V *d, V *e, V least) {{
  B left = (B)C(0);
  V sines[D], cosines[D];
  for (long l = 0; l < D - 1; l++)
    for (long step = 0;; step++) {{
      V end = C(D - 1);
      for (long m = D - 2; m >= l; m--) end = sel(e[m] * e[m] <= least, C(m), end);
      B needed = end > C(l);
      if (!any(needed)) break;
      if (step == {steps}) {{
        left |= needed;
        break;
      }}
      V g = (d[l + 1] - d[l]) / (C(2) * e[l]), r = root(g * g + C(1));
      V shift = e[l] / (g + sel(g < 0, -r, r)) - d[l], s = C(1), c = C(1), p = C(0);
      long last = D - 2;
      while (last > l && !any(end > C(last))) last--;
      for (long i = last; i >= l; i--) {{
        B now = needed & (C(i) < end);
        g = sel(now & (end == C(i + 1)), d[i + 1] + shift, g);
        V f = s * e[i], b = c * e[i], square = f * f + g * g;
        B turned = now & (square > least);
        V inverse = C(1) / root(square);
        r = square * inverse;
        V cosine = sel(turned, g * inverse, C(1)), sine = sel(turned, f * inverse, C(0));
        e[i + 1] = sel(now & (end > C(i + 1)), sel(turned, r, C(0)), e[i + 1]);
        V above = d[i + 1] - p;
        V t = (d[i] - above) * sine + C(2) * cosine * b;
        V moved = sine * t;
        d[i + 1] = sel(now, above + moved, d[i + 1]);
        g = sel(now, cosine * t - b, g);
        p = sel(now, moved, p);
        s = sel(now, sine, s);
        c = sel(now, cosine, c);
        sines[i] = sine;
        cosines[i] = cosine;
      }}
      for (long k = 0; k < D; k++) {{
        V below = q[(last + 1) * D + k];
        for (long i = last; i >= l; i--) {{
          V x = q[i * D + k];
          q[(i + 1) * D + k] = sines[i] * x + cosines[i] * below;
          below = cosines[i] * x - sines[i] * below;
        }}
        q[l * D + k] = below;
      }}
      d[l] = sel(needed, d[l] - p, d[l]);
      for (long m = l; m < D - 1; m++)
        e[m] = sel(needed & (end == C(m)), C(0), e[m]);
      e[l] = sel(needed, g, e[l]);
    }}
  return left;
}}
static inline V load(const S *from, long lanes) {{
  V x = C(0);
  if (lanes == W) return *(const U *)from;
  memcpy(&x, from, lanes * sizeof(S));
  return x;
}}
static inline void store(S *to, V x, long lanes) {{
  if (lanes == W) *(U *)to = x;
  else memcpy(to, &x, lanes * sizeof(S));
}}
void kernel(long n, const S *const *in, S *const *out, const S *const *given, V *a) {{
  V *q = a + D * D;
  for (long first = 0; first < n; first += W) {{
    long lanes = n - first < W ? n - first : W;
    V whole = C(0), largest = C(0), d[D], e[D], order[D];
    for (long k = 0; k < D * D; k++) {{
      a[k] = load(in[0] + k * n + first, lanes);
      V size = sel(a[k] < 0, -a[k], a[k]);
      largest = sel(size > largest, size, largest);
    }}
    V scale = sel(largest > C({tiny}), largest, C(1)), inverse = C(1) / scale;
    for (long k = 0; k < D * D; k++) {{
      a[k] *= inverse;
      whole += a[k] * a[k];
    }}
    V least = C({small}) * whole;
    reduce(a, q, d, e, least);
    B left = diagonalise(q, d, e, least);
    V lost = sel(left, C(NAN), whole - whole);
    for (long j = 0; j < D; j++) {{
      d[j] = d[j] * scale + lost;
      order[j] = C(j);
    }}
    for (long last = D - 1; last > 0; last--)
      for (long j = 0; j < last; j++) {{
        V x = d[j], y = d[j + 1], u = order[j], v = order[j + 1];
        B swap = x > y;
        d[j] = sel(swap, y, x);
        d[j + 1] = sel(swap, x, y);
        order[j] = sel(swap, v, u);
        order[j + 1] = sel(swap, u, v);
      }}
    for (long j = 0; j < D; j++) {{
      store(out[0] + j * n + first, d[j], lanes);
      for (long k = 0; k < D; k++) {{
        V column;
        for (long l = 0; l < W; l++)
          ((S *)&column)[l] = ((S *)(q + (long)((S *)(order + j))[l] * D + k))[l];
        store(out[1] + (k * D + j) * n + first, column + lost, lanes);
      }}
    }}
  }}
}}
"""


@functools.cache
def eigen_kernel(dim: int, dtype: torch.dtype) -> CKernel | None:
    """Eigenvalues, ascending, and eigenvectors: (D, D, n) -> (D, n), (D, D, n).

    NaN where a matrix is not finite, or has not converged.

    Args:
        dim: The dimension D.
        dtype: Of all numbers.

    Returns:
        The kernel, or ``None`` where it cannot be had: no C compiler, or a dimension too large.
    """
    if dtype not in (torch.float64, torch.float32) or dim > LARGEST or c_compiler() is None:
        return None
    double, unit = dtype == torch.float64, torch.finfo(dtype).eps
    small = (_NEGLIGIBLE * unit) ** 2 / dim
    code = header(dtype) + _CODE.format(
        dim=dim,
        sqrt="sqrt" if double else "sqrtf",
        steps=_STEPS,
        small=small,
        tiny=4.0 * torch.finfo(dtype).tiny,
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
