"""Blocks of numbers and the operations between them: what torch code is generated from.

A node stands for a block of ``size`` numbers a point, in torch a tensor (..., size). Nodes are
interned, so equal sub-expressions are one node and are computed once. A block of size 1 serves
wherever a longer one with equal entries is meant.

Numbers are float64 here, rounded once from SymPy's exact ones; exponents stay exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """A block of numbers.

    Attributes:
        kind: "input" (data: its name), "constant" (its values), "sum" (the coefficients of the
            arguments, and a number to add), "product" (the exponents of the arguments), "call"
            (the name of an elementwise function), "linear" (the matrix, (size, size of the
            argument)), or one of the matrix-valued "terms" and "matmul", which
            :mod:`~manifold_sde.symbolic.jacobian` makes.
        args: Nodes that it is computed from.
        size: Length of the block.
        data: See kind.
        index: Place in the graph; arguments come first.
    """

    kind: str
    args: tuple[Node, ...]
    size: int
    data: Any
    index: int


class Graph:
    """Builder of interned nodes, with the simplifications that need no look ahead."""

    def __init__(self) -> None:
        self._nodes: dict[Any, Node] = {}
        self.zero = self.constant([0.0])
        self.one = self.constant([1.0])

    def make(self, kind: str, args: tuple[Node, ...], size: int, data: Any) -> Node:
        """The one node of this description."""
        key = (kind, tuple(a.index for a in args), size, _hashable(data))
        node = self._nodes.get(key)
        if node is None:
            node = Node(kind, args, size, data, len(self._nodes))
            self._nodes[key] = node
        return node

    def input(self, name: str, size: int) -> Node:
        """A block that the caller hands in."""
        return self.make("input", (), size, name)

    def constant(self, values: Sequence[float] | Array) -> Node:
        """A block of numbers; of size 1 where they are all equal."""
        array = np.asarray(values, dtype=np.float64) + 0.0  # no negative zeros
        if (array == array[0]).all():
            array = array[:1]
        return self.make("constant", (), len(array), array)

    def sum(self, terms: Iterable[tuple[float, Node]], offset: float = 0.0) -> Node:
        """Linear combination of blocks, plus a number.

        Multiples of one block by numbers that change from point to point are collected, so that
        the sum is taken over single numbers and not over blocks.
        """
        coefficients: dict[Node, float] = {}
        constant: Array = np.array([offset])
        for coefficient, term in terms:
            if term.kind == "constant":
                constant = constant + coefficient * term.data
                continue
            scale, core = split(term)
            coefficients[core] = coefficients.get(core, 0.0) + coefficient * scale
        kept = self._collected({n: c for n, c in coefficients.items() if c != 0.0})
        if not kept:
            return self.constant(constant)
        shift = self.constant(constant)
        if shift.size > 1:
            kept[shift] = 1.0
        number = float(shift.data[0]) if shift.size == 1 else 0.0
        nodes = tuple(sorted(kept, key=lambda n: n.index))
        if len(nodes) == 1 and kept[nodes[0]] == 1.0 and number == 0.0:
            return nodes[0]
        size = max(n.size for n in nodes)
        return self.make("sum", nodes, size, (tuple(float(kept[n]) for n in nodes), number))

    def _collected(self, terms: dict[Node, float]) -> dict[Node, float]:
        if len(terms) < 2:
            return terms
        groups: dict[Node, list[tuple[float, Node, Node]]] = {}
        for term, coefficient in terms.items():
            number, block = self.parts(term) if term.size > 1 else (self.one, term)
            groups.setdefault(block, []).append((coefficient, number, term))
        collected: dict[Node, float] = {}
        for block, group in groups.items():
            if len(group) == 1:
                core, coefficient = group[0][2], group[0][0]
            else:
                numbers = self.sum((c, number) for c, number, _ in group)
                coefficient, core = split(self.multiply(numbers, block))
            if coefficient != 0.0 and core is not self.zero:
                collected[core] = coefficient
        return collected

    def parts(self, node: Node) -> tuple[Node, Node]:
        """A block as a number a point times a block without such factors."""
        scale, core = split(node)
        if core.size == 1:
            return node, self.one
        if core.kind != "product" or all(n.size > 1 for n in core.args):
            return self.constant([scale]), core
        factors = list(zip(core.args, core.data, strict=True))
        number = self.product([(n, e) for n, e in factors if n.size == 1])
        block = self.product([(n, e) for n, e in factors if n.size > 1])
        return self.scale(scale, number), block

    def scale(self, factor: float, node: Node) -> Node:
        """A block times a number."""
        return self.sum([(factor, node)])

    def product(self, factors: Iterable[tuple[Node, Fraction | int]]) -> Node:
        """Product of powers of blocks, entry by entry."""
        number = 1.0
        vector: Array = np.ones(1)
        exponents: dict[Node, Fraction] = {}
        stack = [(node, Fraction(exponent)) for node, exponent in factors]
        while stack:
            node, exponent = stack.pop()
            integer = exponent.denominator == 1
            if node.kind == "constant" and (integer or (node.data > 0).all()):
                if (node.data == 0).all() and exponent > 0:
                    return self.zero
                vector = vector * node.data ** (int(exponent) if integer else float(exponent))
                continue
            scale, core = split(node)
            if scale != 1.0 and (integer or scale > 0):
                number *= scale ** (int(exponent) if integer else float(exponent))
                node = core
            if node.kind == "product" and integer:
                stack += [(n, e * exponent) for n, e in zip(node.args, node.data, strict=True)]
                continue
            exponents[node] = exponents.get(node, Fraction(0)) + exponent
        kept = {n: e for n, e in exponents.items() if e != 0}
        if number == 0.0:
            return self.zero
        if not kept:
            return self.constant(number * vector)
        shift = self.constant(vector)
        if shift.size == 1:
            number *= float(shift.data[0])
        else:
            kept[shift] = Fraction(1)
        nodes = tuple(sorted(kept, key=lambda n: n.index))
        if len(nodes) == 1 and kept[nodes[0]] == 1:
            return self.scale(number, nodes[0])
        data = tuple(kept[n] for n in nodes)
        core = self.make("product", nodes, max(n.size for n in nodes), data)
        return self.scale(number, core)

    def multiply(self, *nodes: Node) -> Node:
        """Product of blocks, entry by entry."""
        return self.product([(n, 1) for n in nodes])

    def call(self, name: str, node: Node) -> Node:
        """Elementwise function of a block."""
        return self.make("call", (node,), node.size, name)

    def linear(self, matrix: Array, node: Node) -> Node:
        """A constant matrix (rows, columns) times a block."""
        matrix = np.asarray(matrix, dtype=np.float64)
        if node.size == 1 and matrix.shape[1] > 1:
            matrix = matrix.sum(1, keepdims=True)
        assert matrix.shape[1] == node.size, (matrix.shape, node)
        scale, core = split(node)
        if scale != 1.0:
            return self.scale(scale, self.linear(matrix, core))
        if node.kind == "constant":
            return self.constant(matrix @ node.data)
        if not matrix.any():
            return self.zero
        if matrix.shape[1] == 1:
            return self.multiply(self.constant(matrix[:, 0]), node)
        if node.kind == "product" and node.size > 1:
            outside, inside = [], []
            for factor, exponent in zip(node.args, node.data, strict=True):
                if factor.size == 1:
                    outside.append((factor, exponent))
                elif factor.kind == "constant" and exponent == 1:
                    matrix = matrix * factor.data
                else:
                    inside.append((factor, exponent))
            if len(inside) < len(node.args):
                rest = self.linear(matrix, self.product(inside))
                return self.product([*outside, (rest, Fraction(1))])
        square = matrix.shape[0] == matrix.shape[1]
        if square and np.array_equal(matrix, np.diag(np.diag(matrix))):
            return self.multiply(self.constant(np.diag(matrix)), node)
        if node.kind == "linear" and (is_selection(matrix) or is_selection(node.data)):
            return self.linear(matrix @ node.data, node.args[0])
        pivot = matrix[0, np.argmax(matrix[0] != 0)]
        if len(matrix) == 1 and pivot != 1.0:
            return self.scale(pivot, self.linear(matrix / pivot, node))
        return self.make("linear", (node,), matrix.shape[0], matrix)

    def reduce(self, node: Node, count: int) -> Node:
        """Sum of the ``count`` entries of a block."""
        return self.linear(np.ones((1, count)), node)


def split(node: Node) -> tuple[float, Node]:
    """Coefficient and rest of a block that is a multiple of another one."""
    if node.kind == "sum" and len(node.args) == 1 and node.data[1] == 0.0:
        return node.data[0][0], node.args[0]
    return 1.0, node


def is_selection(matrix: Array) -> bool:
    """Whether every row picks one entry."""
    return bool(((matrix == 0) | (matrix == 1)).all() and ((matrix != 0).sum(1) == 1).all())


def ancestors(outputs: Iterable[Node]) -> list[Node]:
    """The nodes that the outputs are computed from, themselves included, arguments first."""
    found: dict[int, Node] = {}
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node.index not in found:
            found[node.index] = node
            stack.extend(node.args)
    return [found[i] for i in sorted(found)]


def _hashable(data: Any) -> Any:
    if isinstance(data, np.ndarray):
        return data.shape, data.tobytes()
    if isinstance(data, tuple):
        return tuple(_hashable(d) for d in data)
    return data
