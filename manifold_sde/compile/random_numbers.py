"""Philox and Box-Muller as C code, on a processor: the words to the bit, normals to rounding."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from manifold_sde.compile.c_library import CompilerFailed, library

_WORDS = """\
#include <math.h>
#include <stdint.h>
#ifdef VECTORS
#define SIMD __attribute__((simd("notinbranch")))
SIMD double log(double); SIMD double sin(double); SIMD double cos(double);
SIMD float logf(float); SIMD float sinf(float); SIMD float cosf(float);
#endif
#define N 256
#define FAST __attribute__((optimize("O3"), noinline)) static
FAST void words(uint32_t block, const int64_t *level, const int64_t *path, const int64_t *step,
                uint32_t stream, uint32_t key0, uint32_t key1, uint32_t *restrict w) {
  for (long i = 0; i < N; i++) {
    uint32_t c0 = block + ((uint32_t)level[i] << 24), c1 = (uint32_t)path[i];
    uint32_t c2 = (uint32_t)step[i], c3 = (uint32_t)((uint64_t)step[i] >> 32) + (stream << 16);
    uint32_t k0 = key0, k1 = key1;
#pragma GCC unroll 10
    for (int r = 0; r < 10; r++) {
      uint64_t p = (uint64_t)c0 * 0xD2511F53u, q = (uint64_t)c2 * 0xCD9E8D57u;
      c0 = (uint32_t)(q >> 32) ^ c1 ^ k0; c1 = (uint32_t)q;
      c2 = (uint32_t)(p >> 32) ^ c3 ^ k1; c3 = (uint32_t)p;
      k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
    }
    w[i] = c0; w[N + i] = c1; w[2 * N + i] = c2; w[3 * N + i] = c3;
  }
}
"""
_NUMBERS = """\
FAST void uniform_@(const uint32_t *w, S *restrict v) {
  for (long i = 0; i < 4 * N; i++) v[i] = ((S)(w[i] >> DROP) + (S)0.5) * UNIT;
}
FAST void normal_@(S *restrict v) { /* cosines and sines apart, which makes loops of vectors */
  S angle[2 * N], radius[2 * N];
  for (long i = 0; i < N; i++) {
    radius[i] = F(sqrt)((S)-2 * F(log)(v[i]));
    radius[N + i] = F(sqrt)((S)-2 * F(log)(v[2 * N + i]));
    angle[i] = (S)6.283185307179586 * v[N + i];
    angle[N + i] = (S)6.283185307179586 * v[3 * N + i];
  }
  for (long j = 0; j < 2; j++) {
    S *a = angle + j * N, *r = radius + j * N, *o = v + 2 * j * N;
    for (long i = 0; i < N; i++) o[i] = r[i] * F(cos)(a[i]);
    for (long i = 0; i < N; i++) o[N + i] = r[i] * F(sin)(a[i]);
  }
}
void fill_@(long normal, long nodes, long n, long count, long stream, long key0, long key1,
            const int64_t *paths, const int64_t *levels, const int64_t *steps, long wide,
            const S *scales, long wide_scales, S *out, long by_node, long by_component) {
  uint32_t w[4 * N]; S v[4 * N]; int64_t level[N], step[N], path[N];
  for (long j = 0; j < nodes; j++)
    for (long i = 0; i < n; i += N) {
      long most = n - i < N ? n - i : N;
      for (long l = 0; l < N; l++) {
        long p = i + (l < most ? l : 0), q = wide ? j * n + p : j;
        path[l] = paths[p]; step[l] = steps[q]; level[l] = levels ? levels[q] : 0;
      }
      for (long b = 0; 4 * b < count; b++) {
        words((uint32_t)b, level, path, step, (uint32_t)stream, (uint32_t)key0, (uint32_t)key1, w);
        uniform_@(w, v);
        if (normal) normal_@(v);
        for (long c = 0; c < 4 && 4 * b + c < count; c++) {
          S *o = out + j * by_node + (4 * b + c) * by_component + i;
          if (!scales) for (long l = 0; l < most; l++) o[l] = v[c * N + l];
          else for (long l = 0; l < most; l++)
            o[l] = v[c * N + l] * scales[wide_scales ? j * n + i + l : j];
        }
      }
    }
}
"""


@functools.cache
def _library() -> ctypes.CDLL | None:
    code = _WORDS
    for name, kind, function, drop, unit in (
        ("double", "double", "x", 0, "0x1p-32"),
        ("single", "float", "x##f", 9, "0x1p-23f"),
    ):
        defined = f"#define S {kind}\n#define F(x) {function}\n#define DROP {drop}\n"
        code += f"{defined}#define UNIT {unit}\n{_NUMBERS.replace('@', name)}"
        code += "#undef S\n#undef F\n#undef DROP\n#undef UNIT\n"
    try:
        return library(code)[0]
    except CompilerFailed:
        return None


def fills(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tensors of this kind can be filled: on a processor, where C is compiled."""
    kind = device.type == "cpu" and dtype in (torch.float64, torch.float32)
    return kind and _library() is not None


def fill(
    out: Tensor,
    *,
    normal: bool,
    key: tuple[int, int],
    stream: int,
    paths: Tensor,
    steps: Tensor,
    levels: Tensor | None = None,
    scales: Tensor | None = None,
    components_first: bool,
) -> Tensor:
    """Fill a tensor with the numbers of nodes and paths, where :func:`fills` says so.

    Args:
        out: Contiguous, (k, count, n), or (count, k, n) with the components first.
        normal: Normals, or else uniforms.
        key: Words of the seed.
        stream: Stream.
        paths: Path indices (n,).
        steps: Steps or positions (k, n), or (k, 1) for all paths.
        levels: Levels of the nodes, of the same shape.
        scales: What the numbers are multiplied by, (k, n) or (k, 1).
        components_first: Whether the components come before the nodes.
    """
    library = _library()
    assert library is not None
    call = library.fill_double if out.dtype == torch.float64 else library.fill_single
    k, n = steps.shape[0], len(paths)
    count = out.shape[0] if components_first else out.shape[1]
    paths, steps = paths.contiguous(), steps.contiguous()
    levels = None if levels is None else levels.expand_as(steps).contiguous()
    scales = None if scales is None else scales.contiguous()
    by_node, by_component = (n, k * n) if components_first else (count * n, n)
    numbers = [int(normal), k, n, count, stream, *key]
    long, address = ctypes.c_long, ctypes.c_void_p
    call(
        *map(long, numbers),
        address(paths.data_ptr()),
        address(None if levels is None else levels.data_ptr()),
        address(steps.data_ptr()),
        long(int(steps.shape[1] > 1)),
        address(None if scales is None else scales.data_ptr()),
        long(int(scales is not None and scales.shape[1] > 1)),
        address(out.data_ptr()),
        long(by_node),
        long(by_component),
    )
    return out
