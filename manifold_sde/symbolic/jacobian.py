"""Whole Jacobians, kept as sums of structured terms as long as they have structure.

The Jacobian of a block by the coordinates, directions first, is a matrix (..., D, size). Most of
its parts are cheap: outer products, constant matrices times a number, diagonals. Each is a term
``diag(left) core diag(right)`` with a constant core, so that for a loss of linear maps and norms
the Hessian costs a few passes over its D^2 entries and no matrix product a point.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from manifold_sde.symbolic.differentiation import slopes
from manifold_sde.symbolic.functions import derivative
from manifold_sde.symbolic.graph import Array, Graph, Node, ancestors, split


@dataclass(frozen=True, eq=False)
class Term:
    """The matrices diag(left) core diag(right).

    Attributes:
        left: Block of one number a direction, or of size 1.
        core: Constant matrix (D, size), matrix-valued node, or ``None`` for a matrix of ones.
        right: Block of the size that is differentiated, or of size 1.
    """

    left: Node
    core: Array | Node | None
    right: Node


def jacobian(graph: Graph, output: Node, size: int, source: Node) -> Node:
    """Transposed Jacobian of a block by the input, (..., D, size), as a node of kind "terms".

    Args:
        graph: Graph to build in.
        output: The block that is differentiated.
        size: Its length, which the node does not tell where all entries are equal.
        source: The input.
    """
    return _node(graph, _terms(graph, output, source), size)


def half_hessian(graph: Graph, gradient: Node, source: Node) -> Node:
    """A matrix (..., D, D), of kind "terms", whose sum with its transpose is the Hessian.

    An outer product may stand for its transpose there, so that products with a factor in common
    become one.
    """
    terms = [
        Term(graph.scale(0.5, t.left), t.core, t.right) for t in _terms(graph, gradient, source)
    ]
    lefts = {t.left for t in (_normal(graph, t) for t in terms) if t.core is None}
    turned = []
    for term in (_normal(graph, t) for t in terms):
        number, right = graph.parts(term.right)
        if term.core is None and right in lefts and right.index < term.left.index:
            turned.append(Term(right, None, graph.multiply(number, term.left)))
        elif isinstance(term.core, np.ndarray) and term.left.size == term.right.size == 1:
            turned.append(Term(term.left, 0.5 * (term.core + term.core.T), term.right))
        else:
            turned.append(term)
    return _node(graph, _merged(graph, turned), source.size)


def _terms(graph: Graph, output: Node, source: Node) -> list[Term]:
    moving: dict[Node, list[Term]] = {source: [Term(graph.one, np.eye(source.size), graph.one)]}
    for node in ancestors([output]):
        if node in moving:
            continue
        terms: list[Term] = []
        if node.kind == "sum":
            for coefficient, part in zip(node.data[0], node.args, strict=True):
                terms += [
                    Term(graph.scale(coefficient, t.left), t.core, t.right)
                    for t in moving.get(part, [])
                ]
        elif node.kind == "product":
            for part, slope in slopes(graph, node):
                terms += _times(graph, moving.get(part, []), slope)
        elif node.kind == "call":
            terms = _times(graph, moving.get(node.args[0], []), derivative(graph, node))
        elif node.kind == "linear":
            terms = _mapped(graph, moving.get(node.args[0], []), node.data)
        if terms:
            moving[node] = _merged(graph, [_normal(graph, t) for t in terms])
    return moving.get(output, [])


def _node(graph: Graph, terms: list[Term], size: int) -> Node:
    args: list[Node] = []
    for term in terms:
        args += [term.left, term.right]
        if isinstance(term.core, Node):
            args.append(term.core)
    cores = tuple("node" if isinstance(t.core, Node) else t.core for t in terms)
    return graph.make("terms", tuple(args), size, cores)


def terms_of(node: Node) -> list[Term]:
    """The terms of a node of kind "terms"."""
    args = iter(node.args)
    terms = []
    for core in node.data:
        left, right = next(args), next(args)
        terms.append(Term(left, next(args) if isinstance(core, str) else core, right))
    return terms


def _times(graph: Graph, terms: list[Term], slope: Node) -> list[Term]:
    """Terms of a block, each entry times an entry of the slope."""
    return [Term(t.left, t.core, graph.multiply(t.right, slope)) for t in terms]


def _mapped(graph: Graph, terms: list[Term], matrix: Array) -> list[Term]:
    """Terms of a constant matrix times a block."""
    mapped, dense = [], []
    for term in terms:
        if term.core is None:
            mapped.append(Term(term.left, None, graph.linear(matrix, term.right)))
        elif isinstance(term.core, np.ndarray) and term.right.size == 1:
            left = graph.multiply(term.left, term.right)
            mapped.append(Term(left, term.core @ matrix.T, graph.one))
        elif isinstance(term.core, np.ndarray) and len(matrix) == 1:
            along = graph.linear(term.core * matrix, term.right)
            mapped.append(Term(graph.multiply(term.left, along), None, graph.one))
        else:
            dense.append(term)
    if dense:
        whole = _node(graph, dense, matrix.shape[1])
        core = graph.make("matmul", (whole,), matrix.shape[0], np.ascontiguousarray(matrix.T))
        mapped.append(Term(graph.one, core, graph.one))
    return mapped


def _normal(graph: Graph, term: Term) -> Term:
    """The same term with what is simple about it made plain."""
    left, core, right = term.left, term.core, term.right
    if isinstance(core, np.ndarray):
        if not core.any():
            return Term(graph.zero, None, graph.zero)
        entries = core != 0
        if (entries.sum(0) <= 1).all() and (entries.sum(1) <= 1).all() and right.size > 1:
            # A diagonal, or a part of one: both factors scale the rows.
            left = graph.multiply(left, graph.linear(core, right))
            core, right = entries.astype(np.float64), graph.one
        else:
            row = int(np.argmax(entries.any(1)))
            column = int(np.argmax(entries[row]))
            across = core[row] / core[row, column]
            if np.array_equal(core, np.outer(core[:, column], across)):
                left = graph.multiply(left, graph.constant(core[:, column]))
                right = graph.multiply(right, graph.constant(across))
                core = None
    if core is None:
        # Numbers go to the right, so that equal directions are found equal.
        number, left = graph.parts(left)
        return Term(left, None, graph.multiply(number, right))
    if right.size == 1:
        left, right = graph.multiply(left, right), graph.one
    return Term(left, core, right)


def _merged(graph: Graph, terms: list[Term]) -> list[Term]:
    """Fewer terms with the same sum: equal factors are taken out."""
    outer = [t for t in terms if t.core is None]
    other = [t for t in terms if t.core is not None]
    by_left: dict[Node, list[Node]] = {}
    for term in outer:
        by_left.setdefault(term.left, []).append(term.right)
    rights = {left: graph.sum(_opened(parts)) for left, parts in by_left.items()}
    by_right: dict[Node, list[tuple[float, Node]]] = {}
    for left, right in rights.items():
        scale, core = split(right)
        by_right.setdefault(core, []).append((scale, left))
    merged = [
        Term(graph.sum(parts), None, right)
        for right, parts in by_right.items()
        if right is not graph.zero
    ]
    by_core: dict[tuple[object, Node], list[Term]] = {}
    for term in other:
        by_core.setdefault((_identity(term.core), term.right), []).append(term)
    for group in by_core.values():
        left = graph.sum((1.0, t.left) for t in group)
        if left is not graph.zero:
            merged.append(Term(left, group[0].core, group[0].right))
    return merged


def _opened(nodes: list[Node]) -> list[tuple[float, Node]]:
    """Terms of the sum of some blocks, with those that are sums opened to find equal terms."""
    terms: list[tuple[float, Node]] = []
    stack = [(1.0, node) for node in nodes]
    while stack:
        coefficient, node = stack.pop()
        if node.kind == "sum" and node.data[1] == 0.0:
            stack += [(coefficient * c, n) for c, n in zip(node.data[0], node.args, strict=True)]
        else:
            terms.append((coefficient, node))
    return terms


def _identity(core: Array | Node | None) -> object:
    return (core.shape, core.tobytes()) if isinstance(core, np.ndarray) else core
