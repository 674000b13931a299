"""From SymPy expressions to blocks of numbers, and a torch function of them.

A human writes ``(x @ Z.T / x.norm() - y) ** 2``, not a sum of eighty products. The same structure
is found here in expanded expressions: sub-expressions that depend equally deeply on the
coordinates and are of one kind become one block; sums with constant coefficients become a
constant matrix times a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import sympy
from torch import Tensor

from manifold_sde.symbolic.functions import elementary, fraction, function_name, number
from manifold_sde.symbolic.printing import Array, Block, Writer

#: Constant part and (coefficient, sub-expression) pairs of an expression.
Linear = tuple[float, list[tuple[float, sympy.Expr]]]


class Packer:
    """Puts the sub-expressions of some expressions into blocks.

    Args:
        symbols: The coordinates.
    """

    def __init__(self, symbols: Sequence[sympy.Symbol]) -> None:
        self._writer = Writer()
        point = Block("x", len(symbols))
        #: Block and place of every sub-expression that is computed.
        self.places: dict[sympy.Expr, tuple[Block, int]] = {
            s: (point, i) for i, s in enumerate(symbols)
        }
        self._levels: dict[sympy.Expr, int] = dict.fromkeys(symbols, 0)
        self._linear: dict[sympy.Expr, Linear] = {}

    def function(self, expressions: Sequence[sympy.Expr]) -> Callable[[Tensor], Tensor]:
        """Function of the values of n expressions, in order: (..., D) -> (..., n).

        Its attribute ``source`` is its code.
        """
        prepared = [elementary(e) for e in expressions]
        for expression in prepared:
            for _, atom in self._split(expression)[1]:
                self._level(atom)
        by_level: dict[int, list[sympy.Expr]] = {}
        for atom, level in self._levels.items():
            by_level.setdefault(level, []).append(atom)
        for level in sorted(by_level):
            if level:
                self._place_level([a for a in by_level[level] if a not in self.places])
        values = self._assemble([self._reference(e) for e in prepared])
        return self._writer.function(values, len(prepared))

    # What an expression consists of.

    def _split(self, expression: sympy.Expr) -> Linear:
        """Constant and linear combination of atoms that an expression is, an Add opened."""
        known = self._linear.get(expression)
        if known is None:
            offset, terms = 0.0, []
            for term in sympy.Add.make_args(expression):
                factors = sympy.Mul.make_args(term)
                moving = [f for f in factors if not f.is_number]
                coefficient = number(sympy.Mul(*(f for f in factors if f.is_number)))
                if moving:
                    terms.append((coefficient, sympy.Mul(*moving)))
                else:
                    offset += coefficient
            known = self._linear[expression] = (offset, terms)
        return known

    def _reference(self, expression: sympy.Expr) -> Linear:
        """Like :meth:`_split`, but a sum that has a place of its own is not opened."""
        if expression in self.places:
            return 0.0, [(1.0, expression)]
        return self._split(expression)

    @staticmethod
    def _factors(atom: sympy.Expr) -> list[tuple[sympy.Expr, Fraction]]:
        """Bases and constant exponents of a product or power."""
        pairs = (factor.as_base_exp() for factor in sympy.Mul.make_args(atom))
        return [(base, fraction(exponent)) for base, exponent in pairs]

    def _parts(self, atom: sympy.Expr) -> list[sympy.Expr]:
        """Atoms that an atom is computed from."""
        if atom.is_Add:
            return [part for _, part in self._split(atom)[1]]
        if atom.is_Function:
            return [self._anchor(atom.args[-1])]
        return [self._anchor(base) for base, _ in self._factors(atom)]

    def _anchor(self, value: sympy.Expr) -> sympy.Expr:
        """The atom that an argument or base is, or is a multiple of."""
        return value if value.is_Add else self._split(value)[1][0][1]

    def _level(self, atom: sympy.Expr) -> int:
        level = self._levels.get(atom)
        if level is None:
            level = self._levels[atom] = 1 + max(self._level(p) for p in self._parts(atom))
        return level

    # Blocks.

    def _place_level(self, atoms: list[sympy.Expr]) -> None:
        groups: dict[object, list[sympy.Expr]] = {}
        for atom in atoms:
            groups.setdefault(self._signature(atom), []).append(atom)
        for members in groups.values():
            if members[0].is_Add:
                block = self._assemble([self._split(a) for a in members])
            elif members[0].is_Function:
                argument = self._assemble([self._reference(a.args[-1]) for a in members])
                block = self._writer.call(function_name(members[0]) or "", argument)
            else:
                members.sort(key=self._positions)
                block = self._monomials(members)
            for position, atom in enumerate(members):
                self.places[atom] = (block, position)

    def _signature(self, atom: sympy.Expr) -> tuple[object, ...]:
        """What atoms of one block have in common."""
        if atom.is_Add:
            return "sum", frozenset(self.places[p][0] for p in self._parts(atom))
        if atom.is_Function:
            return "call", function_name(atom), self.places[self._parts(atom)[0]][0]
        return "product", *((self.places[self._anchor(b)][0], e) for b, e in self._operands(atom))

    def _operands(self, atom: sympy.Expr) -> list[tuple[sympy.Expr, Fraction]]:
        def order(pair: tuple[sympy.Expr, Fraction]) -> tuple[int, str, Fraction, int]:
            block, position = self.places[self._anchor(pair[0])]
            return len(block.name), block.name, pair[1], position

        return sorted(self._factors(atom), key=order)

    def _positions(self, atom: sympy.Expr) -> list[int]:
        return [self.places[self._anchor(base)][1] for base, _ in self._operands(atom)]

    def _monomials(self, members: list[sympy.Expr]) -> Block:
        columns = zip(*(self._operands(a) for a in members), strict=True)
        return self._writer.product(
            (self._assemble([self._reference(base) for base, _ in column]), column[0][1])
            for column in columns
        )

    def _assemble(self, rows: list[Linear]) -> Block:
        """Block whose entries are the given linear combinations; of size 1 if all are one."""
        if all(row == rows[0] for row in rows):
            rows = rows[:1]
        matrices: dict[Block, Array] = {}
        for i, (_, terms) in enumerate(rows):
            for coefficient, atom in terms:
                block, position = self.places[atom]
                matrix = matrices.setdefault(block, np.zeros((len(rows), block.size)))
                # A block whose entries are all equal has size 1, whatever the place.
                matrix[i, position if block.size > 1 else 0] += coefficient
        parts = [self._writer.linear(m, block) for block, m in matrices.items()]
        return self._writer.sum(parts, np.array([offset for offset, _ in rows]))
