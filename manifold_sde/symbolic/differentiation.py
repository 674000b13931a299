"""Derivatives of a graph, as further nodes of the same graph.

The chain rule is applied to blocks, with the derivatives of elementary functions from SymPy, so
derivatives are exact and share what they have in common with each other and with the function.
"""

from __future__ import annotations

from collections.abc import Mapping

from manifold_sde.symbolic.functions import derivative
from manifold_sde.symbolic.graph import Graph, Node, ancestors


def reverse(graph: Graph, output: Node, seed: Node, source: Node) -> Node:
    """Transposed Jacobian of a block with respect to an input, times a block.

    Args:
        graph: Graph to build in.
        output: The block that is differentiated.
        seed: Block of the output's size that the transposed Jacobian is applied to.
        source: The input.

    Returns:
        Block of the input's size, or of size 1 if its entries are equal.
    """
    received: dict[Node, list[tuple[float, Node]]] = {output: [(1.0, seed)]}
    for node in reversed(ancestors([output])):
        if node is source or node not in received:
            continue
        adjoint = graph.sum(received.pop(node))
        if adjoint is graph.zero:
            continue
        for part, factor, contribution in _pullbacks(graph, node, adjoint):
            received.setdefault(part, []).append((factor, contribution))
    return graph.sum(received.get(source, []))


def _pullbacks(graph: Graph, node: Node, adjoint: Node) -> list[tuple[Node, float, Node]]:
    """What each argument of a node receives: (argument, coefficient, block)."""

    def fit(part: Node, block: Node) -> Node:
        return graph.reduce(block, node.size) if part.size == 1 < node.size else block

    if node.kind == "sum":
        fitted = ((part, fit(part, adjoint)) for part in node.args)
        return [(p, c, f) for c, (p, f) in zip(node.data[0], fitted, strict=True)]
    if node.kind == "product":
        return [
            (part, 1.0, fit(part, graph.multiply(adjoint, slope)))
            for part, slope in slopes(graph, node)
        ]
    if node.kind == "call":
        (part,) = node.args
        return [(part, 1.0, graph.multiply(adjoint, derivative(graph, node)))]
    if node.kind == "linear":
        return [(node.args[0], 1.0, graph.linear(node.data.T, adjoint))]
    return []


def slopes(graph: Graph, node: Node) -> list[tuple[Node, Node]]:
    """Partial derivatives of a product by its arguments that are not constant."""
    found = []
    for i, part in enumerate(node.args):
        if part.kind == "constant":
            continue
        exponents = list(node.data)
        leading, exponents[i] = exponents[i], exponents[i] - 1
        slope = graph.product(zip(node.args, exponents, strict=True))
        found.append((part, graph.scale(float(leading), slope)))
    return found


def forward(graph: Graph, output: Node, tangents: Mapping[Node, Node]) -> Node:
    """Directional derivative of a block.

    Args:
        graph: Graph to build in.
        output: The block that is differentiated.
        tangents: Direction of each input that moves.

    Returns:
        Block of the output's size, or of size 1 if its entries are equal.
    """
    moving: dict[Node, Node] = dict(tangents)

    def tangent(node: Node) -> Node:
        return moving.get(node, graph.zero)

    for node in ancestors([output]):
        if node in moving:
            continue
        if node.kind == "sum":
            parts = zip(node.data[0], node.args, strict=True)
            moving[node] = graph.sum((c, tangent(part)) for c, part in parts)
        elif node.kind == "product":
            moving[node] = graph.sum(
                (1.0, graph.multiply(slope, tangent(part)))
                for part, slope in slopes(graph, node)
                if tangent(part) is not graph.zero
            )
        elif node.kind == "call":
            moving[node] = graph.multiply(derivative(graph, node), tangent(node.args[0]))
        elif node.kind == "linear":
            moving[node] = graph.linear(node.data, tangent(node.args[0]))
    return tangent(output)
