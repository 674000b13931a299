"""Scale invariance of a loss, proved or refuted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mpmath
import sympy

from manifold_sde.errors import ScaleInvarianceError, SymbolicError
from manifold_sde.paper import implements
from manifold_sde.symbolic.expressions import (
    WORKING_DIGITS,
    Evaluator,
    Point,
    random_points,
    short,
    unit,
)

#: Largest number of operations for which SymPy is asked to simplify.
SIMPLIFICATION_LIMIT = 400
#: Relative Euler defects from here on refute scale invariance: of exact expressions, and of those
#: with floating-point numbers, which the user rounded.
REFUTATION_EXACT = 1e-30
REFUTATION_ROUNDED = 1e-12
_POINTS = 6


@dataclass(frozen=True)
class Proof:
    """What is known of a property, and how.

    Attributes:
        verdict: "proved" or "undecided". (What is refuted raises an error.)
        method: How it was proved, or what was tried.
        detail: What the argument rests on, or where it stops.
    """

    verdict: str
    method: str
    detail: str

    def __bool__(self) -> bool:
        return self.verdict == "proved"

    def __str__(self) -> str:
        return f"{self.verdict} ({self.method}): {self.detail}"


def all_of(proofs: Sequence[Proof], what: str) -> Proof:
    """Proof for several expressions from one for each."""
    open_ones = [i for i, p in enumerate(proofs) if not p]
    if open_ones:
        first = proofs[open_ones[0]]
        where = "" if len(proofs) == 1 else f"{what} {open_ones[0]}: "
        more = "" if len(open_ones) == 1 else f" (and {len(open_ones) - 1} more)"
        return Proof("undecided", first.method, f"{where}{first.detail}{more}")
    methods = list(dict.fromkeys(p.method for p in proofs))
    detail = proofs[0].detail if len(proofs) == 1 else f"each of {len(proofs)} {what}es"
    return Proof("proved", ", ".join(methods), detail)


@implements("Definition 2.2")
def prove_scale_invariance(
    loss: sympy.Expr,
    symbols: Sequence[sympy.Symbol],
    name: str = "the loss",
    *,
    rounded: bool = False,
    shown: sympy.Expr | None = None,
) -> Proof:
    """Prove that a loss does not change along rays, or refuse it.

    Three proofs are tried: the degree of homogeneity of every sub-expression, from the
    coordinates up; Euler's theorem, sum x_i dL/dx_i = 0, simplified by SymPy; and L(a x) - L(x) = 0
    for positive a, simplified. A refutation is a measured Euler defect, at random points to 60
    digits.

    Args:
        loss: Expression in real symbols.
        symbols: The coordinates.
        name: Name of the loss in messages.
        rounded: Whether its numbers are rounded, so that a defect at rounding level refutes
            nothing.
        shown: The loss as the user wrote it, for messages.

    Returns:
        A proof, or "undecided" where nothing proves it and no point refutes it.

    Raises:
        ScaleInvarianceError: If it is refuted.
        SymbolicError: If the loss is not real and finite at any of the points.

    Source: Definition 2.2, Lemma 2.5 with k = 0.
    """
    if degree(loss) == 0:
        detail = "every sub-expression is homogeneous, the whole of degree 0"
        return Proof("proved", "degrees of homogeneity", detail)
    tolerance = REFUTATION_ROUNDED if rounded else REFUTATION_EXACT
    defect = _refute(loss, symbols, name, tolerance, loss if shown is None else shown)
    tried = "degrees of homogeneity"
    if sympy.count_ops(loss) <= SIMPLIFICATION_LIMIT:
        euler = sympy.Add(*(x * loss.diff(x) for x in symbols))
        if _vanishes(euler):
            return Proof("proved", "Euler's theorem", "sum of x_i dL/dx_i simplifies to 0")
        factor = sympy.Dummy("a", positive=True)
        scaled = loss.xreplace({x: factor * x for x in symbols})
        if _vanishes(scaled - loss):
            return Proof("proved", "substitution", "L(a x) - L(x) simplifies to 0 for a > 0")
        tried += ", Euler's theorem, substitution"
    detail = f"largest relative |<x, grad L>| at {_POINTS} random points: {mpmath.nstr(defect, 2)}"
    return Proof("undecided", tried, detail)


def degree(expression: sympy.Expr) -> sympy.Rational | None:
    """Degree of homogeneity under positive factors, where the expression shows it."""
    known: dict[sympy.Expr, sympy.Rational | None] = {}

    def visit(node: sympy.Expr) -> sympy.Rational | None:
        if node not in known:
            known[node] = inspect(node)
        return known[node]

    def inspect(node: sympy.Expr) -> sympy.Rational | None:
        if node.is_number:
            return sympy.Integer(0)
        if node.is_Symbol:
            return sympy.Integer(1)
        if not isinstance(node, sympy.Expr):
            return None
        # Zero has every degree.
        degrees = [visit(a) for a in node.args if a != 0 or node.is_Pow]
        if any(d is None for d in degrees):
            return None
        if node.is_Add or isinstance(node, (sympy.Max, sympy.Min)):
            return degrees[0] if len(set(degrees)) == 1 else None
        if node.is_Mul:
            return sympy.Add(*degrees)
        if node.is_Pow and node.exp.is_number:
            return degrees[0] * node.exp
        if isinstance(node, sympy.Abs):
            return degrees[0]
        if isinstance(node, sympy.sign) or all(d == 0 for d in degrees):
            return sympy.Integer(0)
        return None

    return visit(expression)


def _vanishes(expression: sympy.Expr) -> bool:
    """Whether SymPy simplifies an expression to zero."""
    for simplify in (
        lambda e: e,
        sympy.expand,
        lambda e: sympy.expand_log(e, force=False),
        sympy.together,
        lambda e: sympy.cancel(sympy.together(e)),
        sympy.simplify,
    ):
        try:
            if simplify(expression) == 0:
                return True
        except (sympy.PolynomialError, NotImplementedError, ValueError, RecursionError):
            continue
    return False


def _refute(
    loss: sympy.Expr,
    symbols: Sequence[sympy.Symbol],
    name: str,
    tolerance: float,
    shown: sympy.Expr,
) -> mpmath.mpf:
    """The largest relative Euler defect at random points, if it is at rounding level."""
    value = Evaluator([loss], symbols)
    worst, guilty, usable = mpmath.mpf(0), None, 0
    for point in random_points(len(symbols), _POINTS):
        along, gradient = value.along(point, point), value.gradient(point)
        if along is None or gradient is None:
            continue
        usable += 1
        with mpmath.workdps(WORKING_DIGITS):
            size = mpmath.norm(point) * mpmath.norm(gradient)
            defect = abs(along[0]) / size if size > mpmath.mpf(10) ** -30 else mpmath.mpf(0)
        if defect > worst:
            worst, guilty = defect, point
    if not usable:
        raise SymbolicError(
            f"{name} is not real and finite at any of {_POINTS} random points",
            received=short(shown),
            expected="a loss that is defined on R^D without the origin",
            remedy="look for square roots and logarithms of negative numbers, and divisions by 0",
        )
    if guilty is not None and worst > tolerance:
        coordinates = _coordinates(value, guilty)
        names = ", ".join(str(symbols[i]) for i in coordinates)
        raise ScaleInvarianceError(
            f"{name} is not scale-invariant (Definition 2.2)",
            violation=float(worst),
            coordinates=coordinates,
            received=f"|<x, grad L>| / (|x| |grad L|) = {float(worst):.3g} at a random point, "
            f"caused by {names}; L = {short(shown)}",
            expected="0: each sample loss is constant along rays",
            remedy="normalise what these coordinates feed, for example divide them by "
            "sympy.sqrt(sum(x**2 for x in symbols)), or take them out of x",
        )
    return worst


def _coordinates(value: Evaluator, point: Point) -> tuple[int, ...]:
    """Coordinates on which the Euler sum depends most."""

    def euler(place: Point) -> mpmath.mpf:
        along = value.along(place, place)
        return mpmath.mpf(0) if along is None else along[0]

    sizes = []
    with mpmath.workdps(WORKING_DIGITS):
        step = mpmath.mpf(10) ** -6
        for i, p in enumerate(point):
            move = [step * u for u in unit(len(point), i)]
            ahead = euler([a + b for a, b in zip(point, move, strict=True)])
            behind = euler([a - b for a, b in zip(point, move, strict=True)])
            sizes.append(abs(p * (ahead - behind) / (2 * step)))
    largest = max(sizes)
    return tuple(i for i, s in enumerate(sizes) if s > largest / 10)
