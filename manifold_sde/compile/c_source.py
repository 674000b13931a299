"""C code of a program of scalar operations, for many points at once.

A value is a vector of eight doubles or sixteen singles: as many points side by side. The operations
stand in a row without loops, in functions of a few hundred; what one function leaves for another
lies in a workspace that stays in the cache. All points go through the same operations, those that
fill up the last vector too: a result does not depend on how many points there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from manifold_sde.compile.scalar_program import BOOL, ScalarProgram

#: Bytes of a vector, and operations of one C function.
VECTOR = 64
_FUNCTION = 400

_HEADER = """\
#include <math.h>
#include <string.h>
typedef {scalar} S;
typedef {integer} J;
typedef S V __attribute__((vector_size({vector}), aligned({vector}), may_alias));
typedef J B __attribute__((vector_size({vector}), aligned({vector}), may_alias));
typedef S U __attribute__((vector_size({vector}), aligned(sizeof(S)), may_alias));
#define W ((long)(sizeof(V) / sizeof(S)))
#define C(a) ((S)(a) - (V){{}})
static inline V sel(B m, V a, V b) {{ return (V)((m & (B)a) | (~m & (B)b)); }}
static inline B selb(B m, B a, B b) {{ return (m & a) | (~m & b); }}
"""
_FUNCTIONS = """\
#define MAP(name) __attribute__((noinline, optimize("O3"))) static V m_##name(V x) {{ V y; \
  for (long l = 0; l < W; l++) ((S *)&y)[l] = {function}(((S *)&x)[l]); return y; }}
#define MAP2(name) __attribute__((noinline, optimize("O3"))) static V m_##name(V x, V z) {{ V y; \
  for (long l = 0; l < W; l++) ((S *)&y)[l] = {function}(((S *)&x)[l], ((S *)&z)[l]); return y; }}
"""
_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "lt": "<",
    "le": "<=",
    "eq": "==",
    "ne": "!=",
    "and": "&",
    "or": "|",
}
_PAIRS = ("pow", "atan2")
#: Arguments of what is computed once a call, and of what is for each vector of points.
_BEFORE = "V *u, V *t, const S *const *given"
_BLOCK = "const S *const *x, S *const *y, long w, const V *u, V *t"
#: Functions of which the C library of Linux on x86 has vectors.
_VECTORISED = ("exp", "log", "sin", "cos", "pow")


def c_source(program: ScalarProgram, dtype: torch.dtype) -> tuple[str, int]:
    """Code of a program.

    Args:
        program: The program.
        dtype: Of all numbers, float64 or float32.

    Returns:
        The code, with a function ``void kernel(long n, const S **inputs, S **outputs,
        const S **given, S *workspace)``, and the number of vectors in its workspace.
    """
    return _Writer(program, dtype).write()


def header(dtype: torch.dtype) -> str:
    """Types of numbers, vectors and truths, and the choice between two vectors."""
    double = dtype == torch.float64
    scalar, integer = ("double", "long long") if double else ("float", "int")
    return _HEADER.format(scalar=scalar, integer=integer, vector=VECTOR)


class _Writer:
    def __init__(self, program: ScalarProgram, dtype: torch.dtype) -> None:
        self.program = program
        self.dtype, self.double = dtype, dtype == torch.float64
        self.order = program.order([a for out in program.outputs for a in out])
        self.uniform: set[int] = set()
        for a in self.order:
            name = program.operations[a][0]
            needs = program.needs(a)
            if name == "given" or (
                needs and all(b in self.uniform or self.is_constant(b) for b in needs)
            ):
                self.uniform.add(a)

    def is_constant(self, a: int) -> bool:
        """Whether a value is a known number."""
        return self.program.operations[a][0] == "const"

    def write(self) -> tuple[str, int]:
        """The code, and the size of the workspace."""
        before = [a for a in self.order if a in self.uniform]
        inside = [a for a in self.order if a not in self.uniform and not self.is_constant(a)]
        used = {b for a in inside for b in self.program.needs(a)}
        used |= {a for out in self.program.outputs for a in out}
        kept = {a: k for k, a in enumerate(a for a in before if a in used)}
        results: dict[int, list[tuple[int, int]]] = {}
        for k, out in enumerate(self.program.outputs):
            for i, a in enumerate(out):
                results.setdefault(a, []).append((k, i))
        lines = [self._prelude()]
        shared, names = self._functions("before", before, kept, {}, lines)
        calls = " ".join(f"{n}(u, t, given);" for n in names)
        lines.append(f"static void before({_BEFORE}) {{ {calls} }}")
        slots, names = self._functions("part", inside, kept, results, lines)
        calls = " ".join(f"{n}(x, y, w, u, t);" for n in names)
        lines.append(f"static void block({_BLOCK}) {{ {calls} }}")
        inputs, outputs = self._counts(), [len(out) for out in self.program.outputs]
        scratch = max(shared, slots)
        lines.append(
            _DRIVER.format(
                inputs=len(inputs),
                outputs=len(outputs),
                sizes=", ".join(map(str, inputs)) or "0",
                results=", ".join(map(str, outputs)) or "0",
                kept=len(kept),
                scratch=scratch,
            )
        )
        return "\n".join(lines), len(kept) + scratch + sum(inputs) + sum(outputs) + 1

    def _counts(self) -> list[int]:
        counts: dict[int, int] = {}
        for operation in self.program.operations:
            if operation[0] == "input":
                k, i = int(operation[1]), int(operation[2])
                counts[k] = max(counts.get(k, 0), i + 1)
        return [counts.get(k, 0) for k in range(max(counts, default=-1) + 1)]

    def _prelude(self) -> str:
        suffix = "" if self.double else "f"
        names = {str(self.program.operations[a][0]) for a in self.order}
        known = {*_INFIX, "const", "input", "given", "neg", "not", "where", "max", "min", "abs"}
        functions = sorted(names - known)
        found = [
            header(self.dtype),
            _FUNCTIONS.format(function="name" if self.double else "name##f"),
        ]
        vectors = [f for f in functions if f in _VECTORISED]
        if vectors:
            found.append("#ifdef VECTORS")
            for f in vectors:
                more = ", S" if f in _PAIRS else ""
                found.append(f'__attribute__((simd("notinbranch"))) S {f}{suffix}(S{more});')
            found.append("#endif")
        for f in functions:
            found.append(f"MAP2({f})" if f in _PAIRS else f"MAP({f})")
        if "abs" in names:
            found.append("static inline V m_abs(V x) { return sel(x < 0, -x, x); }")
        return "\n".join(found)

    # Functions of a few hundred operations.

    def _functions(
        self,
        prefix: str,
        order: Sequence[int],
        kept: dict[int, int],
        results: dict[int, list[tuple[int, int]]],
        lines: list[str],
    ) -> tuple[int, list[str]]:
        """Write operations in functions of a few hundred.

        Args:
            prefix: Name of the functions, with a number; those "before" see no point.
            order: The operations.
            kept: Places of what the functions "before" keep for the others.
            results: Where values are to be stored, as results and entries.
            lines: What is written.

        Returns:
            The number of vectors that the functions share, and their names.
        """
        before = prefix == "before"
        pieces = [order[k : k + _FUNCTION] for k in range(0, len(order), _FUNCTION)]
        place = {a: k for k, piece in enumerate(pieces) for a in piece}
        last: dict[int, int] = {}
        for k, piece in enumerate(pieces):
            for a in piece:
                last |= {b: k for b in self.program.needs(a) if place.get(b, k) != k}
        slots: dict[int, int] = {}
        free: list[int] = []
        names, size = [], 0
        left = [a for a in results if a not in place]  # constants, and what is kept
        if left:
            pieces.append([])
        for k, piece in enumerate(pieces):
            function = _Function(self, {} if before else kept, slots)
            for a in piece:
                function.define(a)
                if before and a in kept:
                    function.body.append(f"u[{kept[a]}] = (V)v{a};")
                if a in last:
                    slots[a] = free.pop() if free else size
                    size = max(size, slots[a] + 1)
                    function.body.append(f"t[{slots[a]}] = (V)v{a};")
            for a in piece or left:
                for r, i in results.get(a, ()):
                    function.use(a)
                    function.body.append(f"*(U *)(y[{r}] + {i} * w) = {self._stored(a)};")
            free += [slots[b] for b, end in last.items() if end == k]
            names.append(f"{prefix}{k}")
            arguments = _BEFORE if before else _BLOCK
            lines.append(f"__attribute__((noinline)) static void {names[-1]}({arguments}) {{")
            lines += [*function.body, "}"]
        return size, names

    def _stored(self, a: int) -> str:
        if self.is_constant(a):
            number = self.program.known(a)
            assert number is not None
            return f"C({self._number(float(number))})"
        if self.program.kind(a) == BOOL:
            return f"sel(v{a}, C(1), C(0))"
        return f"v{a}"

    def _number(self, number: float) -> str:
        if number != number:
            return "NAN"
        if number in (float("inf"), float("-inf")):
            return "INFINITY" if number > 0 else "(-INFINITY)"
        text = f"(S){float(number).hex()}"
        return f"({text})" if number < 0 else text

    def kind(self, a: int) -> str:
        """The C type of a value."""
        return "B" if self.program.kind(a) == BOOL else "V"

    def literal(self, a: int) -> str:
        """A known number."""
        number = self.program.known(a)
        assert number is not None
        if isinstance(number, bool):
            return f"((B){{}} {'==' if number else '!='} (B){{}})"
        return f"C({self._number(number)})"

    def expression(self, a: int, use: Callable[[int], str]) -> str:
        """A value by others."""
        name, *rest = self.program.operations[a]
        if name == "input":
            return f"*(const U *)(x[{rest[0]}] + {rest[1]} * w)"
        if name == "given":
            return f"C(given[{rest[0]}][{rest[1]}])"
        parts = [use(int(b)) for b in rest]
        if name in _INFIX:
            return f"{parts[0]} {_INFIX[str(name)]} {parts[1]}"
        if name == "neg":
            return f"-{parts[0]}"
        if name == "not":
            return f"~{parts[0]}"
        if name == "where":
            select = "selb" if self.program.kind(a) == BOOL else "sel"
            return f"{select}({', '.join(parts)})"
        if name in ("max", "min"):  # NaN where either is
            sign = "<" if name == "max" else ">"
            x, z = parts
            return f"sel(({x} {sign} {z}) | ({z} != {z}), {z}, {x})"
        return f"m_{name}({', '.join(parts)})"


class _Function:
    """The body of one C function.

    Args:
        writer: What knows the program.
        kept: Places of values that were kept before.
        slots: Places of values that other functions left.
    """

    def __init__(self, writer: _Writer, kept: dict[int, int], slots: dict[int, int]) -> None:
        self.writer, self.kept, self.slots = writer, kept, slots
        self.body: list[str] = []
        self._here: set[int] = set()

    def use(self, a: int) -> str:
        """The name of a value, which is loaded where it is not there yet."""
        if self.writer.is_constant(a):
            return self.writer.literal(a)
        if a not in self._here:
            source = f"u[{self.kept[a]}]" if a in self.kept else f"t[{self.slots[a]}]"
            self._declare(a, f"({self.writer.kind(a)}){source}")
        return f"v{a}"

    def define(self, a: int) -> None:
        """Compute a value."""
        self._declare(a, self.writer.expression(a, self.use))

    def _declare(self, a: int, text: str) -> None:
        self.body.append(f"{self.writer.kind(a)} v{a} = {text};")
        self._here.add(a)


_DRIVER = """\
void kernel(long n, const S *const *inputs, S *const *outputs, const S *const *given, V *t) {{
  const long sizes[] = {{{sizes}}}, results[] = {{{results}}};
  V *u = t; t += {kept};
  S *pads = (S *)(t + {scratch});
  before(u, t, given);
  const S *x[{inputs} + 1]; S *y[{outputs} + 1];
  long i = 0;
  for (; i + W <= n; i += W) {{
    for (long k = 0; k < {inputs}; k++) x[k] = inputs[k] + i;
    for (long k = 0; k < {outputs}; k++) y[k] = outputs[k] + i;
    block(x, y, n, u, t);
  }}
  if (i == n) return;
  S *pad = pads;
  for (long k = 0; k < {inputs}; k++) {{
    x[k] = pad;
    for (long j = 0; j < sizes[k]; j++, pad += W)
      for (long l = 0; l < W; l++) pad[l] = inputs[k][j * n + (i + l < n ? i + l : n - 1)];
  }}
  for (long k = 0; k < {outputs}; k++) {{ y[k] = pad; pad += results[k] * W; }}
  block(x, y, W, u, t);
  for (long k = 0; k < {outputs}; k++)
    for (long j = 0; j < results[k]; j++)
      memcpy(outputs[k] + j * n + i, y[k] + j * W, (n - i) * sizeof(S));
}}
"""
