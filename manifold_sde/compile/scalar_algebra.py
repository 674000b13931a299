"""Factorisations of small matrices in scalars: their loops are written out.

Rows are exchanged by choices between values, as the largest entry of a column depends on the point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manifold_sde.compile.recording import Unsupported
from manifold_sde.compile.scalar_program import ScalarProgram
from manifold_sde.compile.scalar_rules import Numbers, table

#: Most rows of a matrix that is factored.
MOST_ROWS = 8

Rows = list[list[int]]


def _matrices(run: Any, a: Any, *, square: bool = True) -> tuple[list[Rows], tuple[int, ...]]:
    """The entries of matrices, one after the other, and their batch shape."""
    values = run.numbers(a).values
    if values.shape[-2] > MOST_ROWS or (square and values.shape[-2] != values.shape[-1]):
        raise Unsupported(f"a matrix of {values.shape[-2]} rows is not factored in C")
    return values.reshape(-1, *values.shape[-2:]).tolist(), tuple(values.shape[:-2])


def _exchange(program: ScalarProgram, rows: Rows, k: int, place: int) -> None:
    """Exchange row k with the one at a place of the program, which is k or below it."""
    for i in range(k + 1, len(rows)):
        here = program.apply("eq", place, program.constant(float(i)))
        pairs = list(zip(rows[k], rows[i], strict=True))
        rows[k] = [program.apply("where", here, b, a) for a, b in pairs]
        rows[i] = [program.apply("where", here, a, b) for a, b in pairs]


def _factor(program: ScalarProgram, rows: Rows, pivot: bool) -> tuple[Rows, list[int]]:
    """L and U in one matrix, and the row that each was exchanged with."""
    rows, n = [list(row) for row in rows], len(rows)
    places = [program.constant(float(k)) for k in range(n)]
    for k in range(n):
        if pivot:
            largest = program.apply("abs", rows[k][k])
            for i in range(k + 1, n):
                size = program.apply("abs", rows[i][k])
                better = program.apply("lt", largest, size)
                largest = program.apply("max", largest, size)
                number = program.constant(float(i))
                places[k] = program.apply("where", better, number, places[k])
            _exchange(program, rows, k, places[k])
        for i in range(k + 1, n):
            ratio = program.apply("div", rows[i][k], rows[k][k])
            rows[i][k] = ratio
            for j in range(k + 1, n):
                part = program.apply("mul", ratio, rows[k][j])
                rows[i][j] = program.apply("sub", rows[i][j], part)
    return rows, places


def _triangular(program: ScalarProgram, a: Rows, b: Rows, *, upper: bool, unit: bool) -> Rows:
    """Solve a x = b for a triangular matrix."""
    n = len(a)
    x: Rows = [[] for _ in range(n)]
    for i in reversed(range(n)) if upper else range(n):
        before = range(i + 1, n) if upper else range(i)
        for c, value in enumerate(b[i]):
            terms = [program.apply("mul", a[i][j], x[j][c]) for j in before]
            left = program.apply("sub", value, program.total(terms))
            x[i].append(left if unit else program.apply("div", left, a[i][i]))
    return x


def _transposed(rows: Rows) -> Rows:
    return [list(column) for column in zip(*rows, strict=True)]


def _solved(
    program: ScalarProgram, factors: Rows, places: list[int], b: Rows, adjoint: bool
) -> Rows:
    """Solve P L U x = b, or its transpose."""
    b = [list(row) for row in b]
    if adjoint:
        turned = _transposed(factors)
        b = _triangular(program, turned, b, upper=False, unit=False)
        b = _triangular(program, turned, b, upper=True, unit=True)
        for k in reversed(range(len(places))):
            _exchange(program, b, k, places[k])
        return b
    for k, place in enumerate(places):
        _exchange(program, b, k, place)
    b = _triangular(program, factors, b, upper=False, unit=True)
    return _triangular(program, factors, b, upper=True, unit=False)


def _no_error(batch: tuple[int, ...]) -> Tensor:
    """A singular matrix gives infinities, as everywhere in C code."""
    return torch.zeros(batch, dtype=torch.int32)


def _lu_factor(run: Any, a: Any, *, pivot: bool = True, check_errors: bool = False) -> Any:
    matrices, batch = _matrices(run, a)
    pairs = [_factor(run.program, rows, pivot) for rows in matrices]
    n = run.numbers(a).values.shape[-1]
    factors = table([rows for rows, _ in pairs], (*batch, n, n))
    places = table([places for _, places in pairs], (*batch, n))
    one = run.program.constant(1.0)
    counted = [run.program.apply("add", k, one) for k in places.flatten().tolist()]
    pivots = Numbers(table(counted, places.shape), torch.int32)
    return run.numbers(a).like(factors), pivots, _no_error(batch)


def _places(run: Any, pivots: Any) -> list[list[int]]:
    values = run.numbers(pivots).values
    one = run.program.constant(1.0)
    rows = values.reshape(-1, values.shape[-1]).tolist()
    return [[run.program.apply("sub", k, one) for k in row] for row in rows]


def _lu_unpack(
    run: Any, factors: Any, pivots: Any, unpack_data: bool = True, unpack_pivots: bool = True
) -> Any:
    like = run.numbers(factors)
    matrices, batch = _matrices(run, factors)
    n, program = like.values.shape[-1], run.program
    zero, one = 0, program.constant(1.0)
    identity = [[one if i == j else zero for j in range(n)] for i in range(n)]
    orders = []
    for places in _places(run, pivots):
        rows = [list(row) for row in identity]
        for k in reversed(range(n)):
            _exchange(program, rows, k, places[k])
        orders.append(rows)
    lower = [
        [[rows[i][j] if j < i else identity[i][j] for j in range(n)] for i in range(n)]
        for rows in matrices
    ]
    upper = [
        [[rows[i][j] if j >= i else zero for j in range(n)] for i in range(n)] for rows in matrices
    ]
    return tuple(like.like(table(part, (*batch, n, n))) for part in (orders, lower, upper))


def _together(run: Any, a: Any, b: Any) -> tuple[Numbers, Numbers]:
    """Matrices and right-hand sides of one batch shape."""
    a, b = run.numbers(a), run.numbers(b)
    batch = torch.broadcast_shapes(a.values.shape[:-2], b.values.shape[:-2])
    return tuple(m.like(m.values.expand(*batch, *m.values.shape[-2:])) for m in (a, b))


def _each(
    run: Any, a: Any, b: Any, solve: Callable[[int, Rows, Rows], Rows], *, left: bool
) -> Numbers:
    """A solution for each matrix and its right-hand side; of x a = b where not left."""
    a, b = _together(run, a, b)
    if not left:
        a, b = (m.like(m.values.mT) for m in (a, b))
    matrices, batch = _matrices(run, a)
    sides, _ = _matrices(run, b, square=False)
    found = [solve(k, *pair) for k, pair in enumerate(zip(matrices, sides, strict=True))]
    values = table(found, (*batch, *b.values.shape[-2:]))
    return b.like(values if left else values.mT)


def _solve_triangular(
    run: Any, a: Any, b: Any, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Numbers:
    def solve(_: int, rows: Rows, side: Rows) -> Rows:
        return _triangular(run.program, rows, side, upper=upper == left, unit=unitriangular)

    return _each(run, a, b, solve, left=left)


def _lu_solve(
    run: Any, factors: Any, pivots: Any, b: Any, *, left: bool = True, adjoint: bool = False
) -> Numbers:
    factors, b = _together(run, factors, b)
    values = run.numbers(pivots).values
    all_places = _places(
        run, Numbers(values.expand(*factors.values.shape[:-2], values.shape[-1]), torch.int32)
    )

    def solve(k: int, rows: Rows, side: Rows) -> Rows:
        return _solved(run.program, rows, all_places[k], side, adjoint == left)

    if left:
        return _each(run, factors, b, solve, left=True)
    # x a = b is a^T x^T = b^T
    solution = _each(run, factors, b.like(b.values.mT), solve, left=True)
    return solution.like(solution.values.mT)


def _inverse(run: Any, a: Any, *, check_errors: bool = False) -> Any:
    matrices, batch = _matrices(run, a)
    a, program = run.numbers(a), run.program
    n = a.values.shape[-1]
    one = program.constant(1.0)
    identity = [[one if i == j else 0 for j in range(n)] for i in range(n)]
    found = [_solved(program, *_factor(program, rows, True), identity, False) for rows in matrices]
    return a.like(table(found, a.values.shape)), _no_error(batch)


def _cholesky(run: Any, a: Any, *, upper: bool = False, check_errors: bool = False) -> Any:
    matrices, batch = _matrices(run, a)
    a, program = run.numbers(a), run.program
    found = []
    for rows in matrices:
        source, n = _transposed(rows) if upper else rows, len(rows)
        factor: Rows = [[0] * n for _ in range(n)]
        for j in range(n):
            for i in range(j, n):
                terms = [program.apply("mul", factor[i][k], factor[j][k]) for k in range(j)]
                left = program.apply("sub", source[i][j], program.total(terms))
                factor[i][j] = (
                    program.apply("sqrt", left)
                    if i == j
                    else program.apply("div", left, factor[j][j])
                )
        found.append(_transposed(factor) if upper else factor)
    return a.like(table(found, a.values.shape)), _no_error(batch)


def _cholesky_solve(run: Any, b: Any, factor: Any, upper: bool = False) -> Numbers:
    factor = run.numbers(factor)
    lower = factor.like(factor.values.mT) if upper else factor
    inside = _solve_triangular(run, lower, b, upper=False)
    return _solve_triangular(run, lower.like(lower.values.mT), inside, upper=True)


RULES: dict[str, Callable[..., Any]] = {
    "linalg_lu_factor_ex": _lu_factor,
    "lu_unpack": _lu_unpack,
    "linalg_lu_solve": _lu_solve,
    "linalg_inv_ex": _inverse,
    "linalg_cholesky_ex": _cholesky,
    "cholesky_solve": _cholesky_solve,
    "linalg_solve_triangular": _solve_triangular,
}
