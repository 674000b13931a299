"""Analyticity of a loss away from the origin, read off its expression tree."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from manifold_sde.paper import implements
from manifold_sde.symbolic.expressions import short
from manifold_sde.symbolic.proofs import Proof

#: Analytic on the whole real line.
_ENTIRE = (
    sympy.exp,
    sympy.sin,
    sympy.cos,
    sympy.sinh,
    sympy.cosh,
    sympy.tanh,
    sympy.sech,
    sympy.asinh,
    sympy.atan,
    sympy.acot,
    sympy.erf,
    sympy.erfc,
)
#: Analytic on the positive half line.
_POSITIVE = (sympy.log, sympy.loggamma, sympy.gamma, sympy.digamma, sympy.polygamma)
_KNOWN = (
    sympy.Symbol,
    sympy.Add,
    sympy.Mul,
    sympy.Pow,
    sympy.Abs,
    sympy.sign,
    *_ENTIRE,
    *_POSITIVE,
)
#: Bounded functions of a real argument, with their bounds.
_BOUNDS = {
    sympy.sin: (-1, 1),
    sympy.cos: (-1, 1),
    sympy.tanh: (-1, 1),
    sympy.erf: (-1, 1),
    sympy.erfc: (0, 2),
    sympy.atan: (-sympy.pi / 2, sympy.pi / 2),
    sympy.sign: (-1, 1),
    sympy.sech: (0, 1),
}
#: Largest quadratic form whose definiteness is computed.
_FORM_LIMIT = 16


@implements("Assumption 5.3")
def prove_analyticity(expressions: Sequence[sympy.Expr], symbols: Sequence[sympy.Symbol]) -> Proof:
    """Prove that expressions are analytic on R^D without the origin, or say where that stops.

    Analytic functions of analytic arguments are analytic. Roots, logarithms and reciprocals need
    an argument that is positive away from the origin: squares that add up to a definite form,
    exponentials, bounded functions beside a larger constant.

    Args:
        expressions: Expressions in real symbols, such as the sample losses.
        symbols: The coordinates.

    Returns:
        A proof, or "undecided" with the sub-expression that it stops at.

    Source: Assumption 5.3. It asks that tr Sigma and Gamma are analytic; analytic losses give both
        for the noise of drawing samples and for the noise of (18).
    """
    walk = _Walk(symbols)
    for index, expression in enumerate(expressions):
        obstacle = walk.obstacle(expression)
        if obstacle is not None:
            where = f"sample loss {index}: " if len(expressions) > 1 else ""
            return Proof("undecided", "expression tree", where + obstacle)
    detail = "analytic functions of analytic arguments on R^D without the origin"
    return Proof("proved", "expression tree", detail)


class _Walk:
    """Walks expressions, remembering what was found."""

    def __init__(self, symbols: Sequence[sympy.Symbol]) -> None:
        self.symbols = tuple(symbols)
        self._obstacles: dict[sympy.Expr, str | None] = {}
        self._positive: dict[sympy.Expr, bool] = {}

    def obstacle(self, node: sympy.Expr) -> str | None:
        """Why an expression is not proved analytic; ``None`` if it is."""
        if node not in self._obstacles:
            if not node.is_number and not isinstance(node, _KNOWN):
                return f"{short(node)}: {type(node).__name__} is not known to be analytic"
            inner = (self.obstacle(a) for a in node.args if not a.is_number)
            own = None if node.is_number else self._own(node)
            self._obstacles[node] = next(filter(None, inner), None) or own
        return self._obstacles[node]

    def _own(self, node: sympy.Expr) -> str | None:
        if isinstance(node, (sympy.Symbol, sympy.Add, sympy.Mul, *_ENTIRE)):
            return None
        if isinstance(node, _POSITIVE):
            argument = node.args[-1]
            return None if self.positive(argument) else _not_positive(node, argument)
        if isinstance(node, sympy.Pow):
            base, exponent = node.args
            if exponent.is_Integer:
                if exponent >= 0 or self.nonzero(base):
                    return None
                return f"{short(node)}: {short(base)} is not proved nonzero away from the origin"
            return None if self.positive(base) else _not_positive(node, base)
        # What is left of the known ones: Abs and sign.
        if self.nonzero(node.args[0]):
            return None
        return f"{short(node)} is not analytic where {short(node.args[0])} is 0"

    def nonzero(self, node: sympy.Expr) -> bool:
        """Whether an expression has no zero away from the origin, as far as can be shown."""
        if node.is_number:
            return node.is_zero is False
        if node.is_Mul:
            return all(self.nonzero(a) for a in node.args)
        if node.is_Pow and node.exp.is_number:
            return self.nonzero(node.base)
        return self.positive(node) or self.positive(-node)

    def positive(self, node: sympy.Expr) -> bool:
        """Whether an expression is positive away from the origin, as far as can be shown."""
        if node not in self._positive:
            self._positive[node] = self._is_positive(node)
        return self._positive[node]

    def _is_positive(self, node: sympy.Expr) -> bool:
        if node.is_number:
            return bool(node.is_positive)
        low = self.bounds(node)[0]
        if low.is_positive:
            return True
        if isinstance(node, (sympy.exp, sympy.cosh, sympy.sech)):
            return True
        if isinstance(node, sympy.Abs):
            return self.nonzero(node.args[0])
        if node.is_Pow:
            even = node.exp.is_Integer and node.exp % 2 == 0
            return self.positive(node.base) or (even and self.nonzero(node.base))
        if node.is_Mul:
            return all(self.positive(a) for a in node.args) or (
                self.nonnegative(node) and self.nonzero(node)
            )
        if node.is_Add:
            if all(self.nonnegative(a) for a in node.args):
                if any(self.positive(a) for a in node.args):
                    return True
                if self._vanish_only_at_origin(node.args):
                    return True
            return self._definite_form(node)
        return False

    def nonnegative(self, node: sympy.Expr) -> bool:
        """Whether an expression is nowhere negative, as far as can be shown."""
        if node.is_number:
            return bool(node.is_nonnegative)
        if node.is_Pow and node.exp.is_Integer and node.exp % 2 == 0:
            return True
        if isinstance(node, sympy.Abs) or self.bounds(node)[0].is_nonnegative:
            return True
        if node.is_Pow and self.nonnegative(node.base):
            return True
        if node.is_Mul and all(self.nonnegative(a) for a in node.args):
            return True
        if node.is_Add and all(self.nonnegative(a) for a in node.args):
            return True
        return not (node.is_Mul or node.is_Pow) and self.positive(node)

    def _vanish_only_at_origin(self, terms: Sequence[sympy.Expr]) -> bool:
        """Whether nonnegative terms c L(x)^(2n), with L linear, vanish together at 0 alone."""
        rows = []
        for term in terms:
            base = term.as_coeff_Mul()[1]
            while (base.is_Pow and base.exp.is_positive) or isinstance(base, sympy.Abs):
                base = base.args[0]
            slopes = base.as_coefficients_dict()
            if set(slopes) <= set(self.symbols):
                rows.append([slopes.get(s, sympy.Integer(0)) for s in self.symbols])
        if len(rows) < len(self.symbols):
            return False
        if all(sum(1 for s in row if s != 0) == 1 for row in rows):
            covered = {next(i for i, s in enumerate(row) if s != 0) for row in rows}
            return len(covered) == len(self.symbols)
        return bool(sympy.Matrix(rows).rank() == len(self.symbols))

    def _definite_form(self, node: sympy.Expr) -> bool:
        """Whether an expression is a positive definite quadratic form."""
        if len(self.symbols) > _FORM_LIMIT or not node.is_polynomial(*self.symbols):
            return False
        form = sympy.Poly(node, *self.symbols)
        if any(sum(powers) != 2 for powers in form.monoms()):
            return False
        return bool(sympy.hessian(form.as_expr(), self.symbols).is_positive_definite)

    def bounds(self, node: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
        """Lower and upper bound of an expression, infinite where none is seen."""
        if node.is_number:
            return node, node
        for kind, (low, high) in _BOUNDS.items():
            if isinstance(node, kind):
                return sympy.sympify(low), sympy.sympify(high)
        if isinstance(node, sympy.cosh):
            return sympy.Integer(1), sympy.oo
        if node.is_Pow and node.exp.is_Integer and node.exp % 2 == 0 and node.exp > 0:
            return sympy.Integer(0), sympy.oo
        if node.is_Add:
            parts = [self.bounds(a) for a in node.args]
            if any(p[0] == -sympy.oo for p in parts):
                return -sympy.oo, sympy.oo
            return sympy.Add(*(p[0] for p in parts)), sympy.Add(*(p[1] for p in parts))
        coefficient, rest = node.as_coeff_Mul()
        if node.is_Mul and coefficient != 1:
            low, high = self.bounds(rest)
            ends = (coefficient * low, coefficient * high)
            return ends if coefficient > 0 else (ends[1], ends[0])
        return -sympy.oo, sympy.oo


def _not_positive(node: sympy.Expr, argument: sympy.Expr) -> str:
    return f"{short(node)}: {short(argument)} is not proved positive away from the origin"
