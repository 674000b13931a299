"""Expressions of users: checked, made exact, and evaluated to many digits."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import mpmath
import sympy

from manifold_sde.errors import SymbolicError

#: Decimal digits of the evaluations; about forty are left of a derivative.
WORKING_DIGITS = 60
#: Relative step of difference quotients, whose error is its fourth power.
_STEP = mpmath.mpf(10) ** -10


def check_symbols(symbols: object) -> tuple[sympy.Symbol, ...]:
    """The coordinates, as distinct symbols without assumptions that restrict them.

    Raises:
        SymbolicError: If they are something else.
    """
    if isinstance(symbols, (str, sympy.Basic)) or not isinstance(symbols, Sequence):
        raise _bad_symbols(repr(symbols))
    for symbol in symbols:
        if not isinstance(symbol, sympy.Symbol):
            raise _bad_symbols(f"{symbol!r} among them")
    names = [s.name for s in symbols]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise _bad_symbols(f"{', '.join(repeated)} more than once")
    if len(names) < 2:
        raise _bad_symbols(f"{len(names)} of them: there are no directions in one dimension")
    for symbol in symbols:
        narrow = (
            symbol.is_real is False
            or symbol.is_nonnegative is not None
            or symbol.is_nonpositive is not None
            or symbol.is_integer is not None
        )
        if narrow:
            known = ", ".join(sorted(k for k, v in symbol.assumptions0.items() if v))
            raise _bad_symbols(f"{symbol} assumed to be {known}")
    return tuple(symbols)


def _bad_symbols(received: str) -> SymbolicError:
    return SymbolicError(
        "symbols are not coordinates x_1, ..., x_D",
        received=received,
        expected="a sequence of at least two distinct SymPy symbols, free to take any real value",
        remedy="symbols = sympy.symbols('x1:4'), or with real=True",
    )


def check_expressions(
    expressions: Sequence[object], symbols: Sequence[sympy.Symbol], what: str
) -> list[sympy.Expr]:
    """Expressions in real coordinates with exact numbers.

    Floating-point numbers become the rational numbers that they are, exactly.

    Args:
        expressions: What the user gave.
        symbols: The user's coordinates.
        what: Name of one expression in messages.

    Returns:
        The expressions in the symbols of :func:`real_symbols`.

    Raises:
        SymbolicError: If one is not a real expression in the coordinates.
    """
    return [
        _checked(e, symbols, what if len(expressions) == 1 else f"{what} {i}")
        for i, e in enumerate(expressions)
    ]


def real_symbols(symbols: Sequence[sympy.Symbol]) -> tuple[sympy.Symbol, ...]:
    """Real symbols of the same names."""
    return tuple(sympy.Symbol(s.name, real=True) for s in symbols)


def _checked(expression: object, symbols: Sequence[sympy.Symbol], what: str) -> sympy.Expr:
    if isinstance(expression, (int, float)) and not isinstance(expression, bool):
        expression = sympy.sympify(expression)
    if not isinstance(expression, sympy.Expr) or not expression.is_commutative:
        raise SymbolicError(
            f"{what} is not a SymPy expression",
            received=f"{expression!r}, a {type(expression).__name__}",
            expected="a scalar SymPy expression in the coordinates",
            remedy="build it from the symbols with +, *, ** and functions of sympy",
        )
    unknown = sorted(expression.free_symbols - set(symbols), key=str)
    if unknown:
        names = {s.name for s in symbols}
        same = [s.name for s in unknown if s.name in names]
        raise SymbolicError(
            f"{what} contains symbols that are not coordinates",
            received=", ".join(map(str, unknown)),
            expected="no symbols other than " + _listed(symbols),
            remedy=f"{', '.join(same)} has other assumptions than the coordinate of that name: "
            "use one symbol for both"
            if same
            else "put in numbers for parameters, loss.subs({a: 2}), or add them to symbols",
        )
    replacements = dict(zip(symbols, real_symbols(symbols), strict=True))
    replacements |= {f: sympy.Rational(f) for f in expression.atoms(sympy.Float) if f.is_finite}
    result = expression.xreplace(replacements)
    if result.is_number and not result.is_finite:
        result = sympy.nan
    bad = (sympy.I, sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)
    if result.has(*bad) or result.is_real is False:
        raise SymbolicError(
            f"{what} is not real and finite",
            received=short(result),
            expected="a real expression of real coordinates",
            remedy="look for square roots and logarithms of negative numbers, and divisions by 0",
        )
    return result


def _listed(symbols: Sequence[sympy.Symbol]) -> str:
    names = [s.name for s in symbols]
    return ", ".join(names) if len(names) <= 8 else f"{names[0]}, ..., {names[-1]}"


def short(expression: sympy.Basic, length: int = 60) -> str:
    """An expression as text, cut where it is long."""
    text = str(expression)
    return text if len(text) <= length else text[: length - 3] + "..."


Point = list[Any]


class Evaluator:
    """Values and derivatives of expressions to many digits.

    Args:
        expressions: SymPy expressions.
        symbols: Their symbols.
    """

    def __init__(self, expressions: Sequence[sympy.Expr], symbols: Sequence[sympy.Symbol]) -> None:
        self._function = sympy.lambdify([list(symbols)], list(expressions), "mpmath", cse=True)

    def __call__(self, point: Point) -> Point | None:
        """Values at a point; ``None`` where one is not a finite real number."""
        with mpmath.workdps(WORKING_DIGITS):
            try:
                values = [mpmath.mpmathify(v) for v in self._function(point)]
            except (ValueError, ZeroDivisionError, OverflowError, TypeError):
                return None
            if any(isinstance(v, mpmath.mpc) and v.imag != 0 for v in values):
                return None
            values = [mpmath.re(v) for v in values]
            return values if all(mpmath.isfinite(v) for v in values) else None

    def along(self, point: Point, direction: Point) -> Point | None:
        """Directional derivatives at a point, by differences of fourth order."""
        with mpmath.workdps(WORKING_DIGITS):
            length = mpmath.norm(direction)
            step = _STEP * mpmath.norm(point) / (length if length else 1)
            rows = []
            for place in (-2, -1, 1, 2):
                moved = [p + place * step * d for p, d in zip(point, direction, strict=True)]
                values = self(moved)
                if values is None:
                    return None
                rows.append(values)
            return [(8 * (c - b) - (d - a)) / (12 * step) for a, b, c, d in zip(*rows, strict=True)]

    def gradient(self, point: Point) -> Point | None:
        """Gradient of the mean of the expressions."""
        columns = [self.along(point, unit(len(point), i)) for i in range(len(point))]
        if any(c is None for c in columns):
            return None
        with mpmath.workdps(WORKING_DIGITS):
            return [mpmath.fsum(c) / len(c) for c in columns if c is not None]


def unit(dim: int, index: int) -> Point:
    """A unit vector."""
    return [mpmath.mpf(int(i == index)) for i in range(dim)]


def random_points(dim: int, count: int, seed: int = 0) -> Iterator[Point]:
    """Random points near the unit sphere, always the same ones."""
    source = random.Random(seed)
    with mpmath.workdps(WORKING_DIGITS):
        for _ in range(count):
            raw = [mpmath.mpf(source.gauss(0.0, 1.0)) for _ in range(dim)]
            scale = mpmath.mpf(source.uniform(0.8, 1.25)) / mpmath.norm(raw)
            yield [scale * r for r in raw]
